"""What tensor-parallel ranks send each other beside their products."""

import pytest

from tests.helpers import REPO, run_distributed


@pytest.mark.parametrize("processes", [2, 3])
def test_everything_arrives(processes):
    run_distributed(processes, REPO / "tests" / "dist" / "exchange_worker.py", ["cpu"])
