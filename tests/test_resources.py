"""Every kernel compiles for every architecture without a GPU, within the committed table of registers and spills."""

from __future__ import annotations

import re

import pytest
import resources

from jax_flash.__main__ import ARCHS

REGISTER_MARGIN = 16  # of another release of NVRTC, or of a small change


@pytest.fixture(scope="module")
def table():
    return resources.read()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("call", resources.SAMPLE)
def test_kernels_stay_within_the_table(table, call, arch):
    rows = resources.measure(call, arch)
    assert {row.direction for row in rows} >= ({"backward"} if "fp8" in call else {"forward", "backward"})
    for row in rows:
        known = table.get(row.key)
        assert known, f"{row.key} is not in the table: make resources"
        assert row.spill_bytes <= known.spill_bytes, f"{row} spills more than {known}"
        assert set(row.waits.split()) <= set(known.waits.split()), f"{row} makes wgmma wait, unlike {known}"
        assert row.registers <= known.registers + REGISTER_MARGIN, f"{row} needs more registers than {known}"


def test_the_table_covers_the_support_table(table):
    assert {row.call for row in table.values()} == set(resources.ALL)
    assert len({row.arch for row in table.values()}) == len(ARCHS)


def test_no_kernel_of_the_table_is_serialised(table):
    assert [row for row in table.values() if re.search("C751[0-5]", row.waits)] == []
