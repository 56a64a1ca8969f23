"""A few seconds of the load that sdk_load makes for a minute: real SDK processes, many clients, nothing lost and nothing doubled."""

import pytest
from sdk_load import load

pytest.importorskip("tinker")


def test_load(start):
    got = load(start(), seconds=3, clients=16, samples=100, futures=160, processes=2, data=1)
    assert got["steps"] >= 2 and got["counts"]["sample"] >= 100
