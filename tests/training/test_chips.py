"""The table of chips: found by what JAX calls them, and plausible."""

import pytest

from jaxzoo.training.chips import CHIPS, chip


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU v6e", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
    ],
)
def test_chips_are_found_by_the_names_that_jax_gives(kind, name):
    found = chip(kind)
    assert found is not None and found.name == name


@pytest.mark.parametrize("kind", ["cpu", "", "TPU v5 liter", "NVIDIA H100 PCIe"])
def test_others_are_none_and_no_chip_is_taken_for_another(kind):
    assert chip(kind) is None


def test_no_kind_stands_twice():
    kinds = [kind for each in CHIPS for kind in each.kinds]
    assert len(kinds) == len(set(kinds))


# FLOPs per byte at which compute and memory take the same time, by the datasheets.
BALANCE = {
    "v4": 229, "v5e": 241, "v5p": 166, "v6e": 560, "tpu7x": 313, "A100 40GB": 201,
    "A100 80GB": 153, "H100": 295, "H200": 206, "B200": 281,
}  # fmt: skip


@pytest.mark.parametrize("each", CHIPS, ids=lambda each: each.name)
def test_figures_are_per_device_and_hang_together(each):
    assert each.flops / each.bandwidth == pytest.approx(BALANCE[each.name], abs=1)
    assert 10 * 2**30 < each.hbm < 200 * 2**30
    assert each.bandwidth > 3 * each.interconnect
    assert (each.links == 0) == (each.network > 0)
    assert each.interconnect > 5 * each.network
    assert each.sources
    if each.links:  # links of 50 or 100 GB/s, shared by the devices of a chip
        link = each.interconnect * each.per_chip / each.links
        assert link in (50e9, 100e9)
