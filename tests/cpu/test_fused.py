"""The Triton kernels in Triton's interpreter against float64, forward and backward, at ragged sizes.

They run in a process of their own: the interpreter is chosen when Triton is imported.
"""

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.helpers import REPO


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton (it comes with CUDA torch)")
@pytest.mark.parametrize("op", ["norm", "embedding", "swiglu", "cross_entropy", "rope", "selective_scan", "training"])
def test_kernels_in_the_interpreter(op):
    result = subprocess.run([sys.executable, "-m", "tests.fused_checks", op], cwd=REPO, capture_output=True, text=True,
                            env=os.environ | {"TRITON_INTERPRET": "1"}, timeout=100)
    assert result.returncode == 0, result.stderr[-3000:]
