"""The one exception a user can cause, and the wrapper every command-line program runs under: data_prep's own."""

from __future__ import annotations

import sys
from collections.abc import Callable

import data_prep.errors
from data_prep.errors import UserError

__all__ = ["UserError", "run_cli"]


def run_cli(main: Callable[[], int | None]) -> None:
    """data_prep's; where several processes of a run fail with one sentence, one of them tells it."""
    def telling_once() -> int | None:
        try:
            return main()
        except UserError as error:
            from based_mp.parallel import state
            if not state.tells(error):
                sys.exit(2)
            raise

    data_prep.errors.run_cli(telling_once)
