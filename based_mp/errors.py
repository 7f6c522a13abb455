"""The one exception a user can cause, and the wrapper every command-line program runs under."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input, a wrong configuration or an unusable machine, told in one sentence that says what to change."""


def run_cli(main: Callable[[], int | None]) -> None:
    """Run `main`, turning a `UserError` into one line on stderr and exit status 2."""
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
