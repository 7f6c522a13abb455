"""Runs a script as `run_distributed` wants it: one thread, poisoned torch.empty. Usage: worker.py SCRIPT ARGS…"""

from __future__ import annotations

import runpy
import sys

import torch

from tests.helpers import poison_empty

if __name__ == "__main__":
    torch.set_num_threads(1)
    poison_empty()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
