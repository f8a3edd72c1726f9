"""Memory goes by the chunk, not by the number of samples."""

from __future__ import annotations

import pytest

from benchmarks.memory import apart

pytestmark = pytest.mark.slow


def test_twenty_times_the_samples_take_less_than_60_mb_more() -> None:
    few, many = apart(2_000), apart(40_000)
    assert many["megabytes"] - few["megabytes"] < 60, (few, many)
    assert many["seconds"] < 60
