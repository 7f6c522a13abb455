"""The search for the largest micro-batch."""

import pytest

from benchmarks.train_throughput import largest


@pytest.mark.parametrize("estimate", [1, 2, 14, 41])
@pytest.mark.parametrize("limit", [0, 1, 9, 13, 14, 15, 40, 43])
def test_largest_micro_batch(estimate, limit):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= limit

    assert largest(fits, estimate) == limit
    assert len(tried) == len(set(tried)) and min(tried) > 0
    if estimate * 2 // 3 <= limit <= estimate:
        assert len(tried) <= 7
