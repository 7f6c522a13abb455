"""What a user can get wrong, told in one sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input or an impossible request; the message says what to change."""


def run_cli(main: Callable[[], int | None]) -> None:
    """Run `main`; a `UserError` becomes one line on stderr and exit status 2."""
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
