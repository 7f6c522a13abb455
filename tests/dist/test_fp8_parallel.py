"""fp8 matrix products under tensor parallelism, with and without sequence parallelism."""

import pytest

from tests.helpers import REPO, run_distributed


@pytest.mark.parametrize("way", ["sequence_parallel", "replicated"])
def test_linear_layers_on_two_ranks(way):
    run_distributed(2, REPO / "tests" / "dist" / "fp8_worker.py", [way])
