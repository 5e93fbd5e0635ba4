"""The table of accelerators."""

import pytest

from ddpm_jax.parallel.chips import CHIPS, device_peak_flops, find_chip


@pytest.mark.parametrize(
    "device_kind,name",
    [
        ("TPU v2", "v2"),
        ("TPU v3", "v3"),
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA L4", "L4"),
    ],
)
def test_a_device_is_found_by_the_name_that_jax_gives_it(device_kind, name):
    assert find_chip(device_kind).name == name


def test_an_unknown_device_has_no_chip():
    for device_kind in ("cpu", "NVIDIA L40S", "TPU v50", ""):
        assert find_chip(device_kind) is None
        assert device_peak_flops(device_kind) is None


def test_a_device_that_is_half_a_chip_has_half_its_speed():
    assert device_peak_flops("TPU v3") == 123e12 / 2
    assert device_peak_flops("TPU v5") == 459e12


def test_the_table_is_in_the_units_it_says():
    for chip in CHIPS:
        assert 40e12 < chip.peak_flops < 1e15
        assert 16e9 <= chip.hbm_bytes < 200e9
        assert 3e11 <= chip.hbm_bandwidth < 5e12
        assert 3e10 <= chip.link_bandwidth < 1e12
        # A chip needs from 100 to 700 operations for each byte that it reads.
        assert 60 < chip.peak_flops / chip.hbm_bandwidth < 700
