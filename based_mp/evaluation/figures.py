"""Figures as PNG files."""

from __future__ import annotations

import importlib.util
from types import ModuleType

from based_mp.errors import UserError


def pyplot() -> ModuleType:
    """matplotlib.pyplot without a screen. Raises UserError where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the figure needs matplotlib: pip install '.[plot]'")
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot
