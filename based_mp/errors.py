"""The one exception a user can cause, and the wrapper every command-line program runs under: data_prep's own."""

from data_prep.errors import UserError, run_cli

__all__ = ["UserError", "run_cli"]
