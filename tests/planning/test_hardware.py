"""The table of chips, and the peak that MFU is counted against."""

import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from maxlm.planning.hardware import CHIPS, chip_named, chip_of, measure_matmul_flops, peak_flops_per_device


def devices_of(kind: str, platform: str = "tpu") -> list:
    return [SimpleNamespace(device_kind=kind, platform=platform)]


@pytest.mark.parametrize(
    ("kind", "name", "bfloat16"),
    [
        ("TPU v4", "v4", 275e12),
        ("TPU v5 lite", "v5e", 197e12),
        ("TPU v5", "v5p", 459e12),
        ("TPU v6 lite", "v6e", 918e12),
        ("TPU7x", "tpu7x", 2307e12 / 2),  # JAX shows two devices a chip
        ("NVIDIA A100-SXM4-80GB", "A100-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", "H100", 989.4e12),
        ("NVIDIA H200", "H200", 989.4e12),
        ("NVIDIA B200", "B200", 2250e12),
    ],
)
def test_what_jax_calls_a_device_finds_its_chip_and_dense_peak(kind, name, bfloat16):
    assert chip_of(devices_of(kind)[0]).name == name
    peak, meaning = peak_flops_per_device(devices_of(kind), "bfloat16")
    assert peak == bfloat16
    assert f"dense bfloat16 peak of {name}" in meaning


@pytest.mark.parametrize(
    "kind", ["NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA L4", "TPU v3", "cpu"]
)
def test_a_chip_with_other_peaks_is_not_taken_for_one_in_the_table(kind):
    assert chip_of(devices_of(kind)[0]) is None
    peak, meaning = peak_flops_per_device(devices_of(kind, "gpu"), "bfloat16")
    assert peak is None
    assert f"not known for '{kind}'" in meaning


def test_a_float32_run_on_a_gpu_is_held_to_tf32_unless_more_precision_is_asked():
    h100 = devices_of("NVIDIA H100 80GB HBM3", "gpu")
    assert peak_flops_per_device(h100, "float32")[0] == 494.7e12
    with jax.default_matmul_precision("highest"):
        assert peak_flops_per_device(h100, "float32")[0] == 66.9e12


def test_a_peak_that_is_not_published_is_none_and_says_so():
    peak, meaning = peak_flops_per_device(devices_of("TPU v5"), "float32")
    assert peak is None
    assert "float32 peak of v5p, which is not published" in meaning


def test_every_chip_is_cited_and_its_figures_are_of_the_right_size():
    assert len({kind for chip in CHIPS for kind in chip.device_kinds}) == sum(len(chip.device_kinds) for chip in CHIPS)
    for chip in CHIPS:
        assert chip.source
        assert 1e14 < chip.peak_flops["bfloat16"] < 1e16
        assert chip.peak_flops.get("float8", 1e16) >= chip.peak_flops["bfloat16"]
        assert 15e9 < chip.hbm_bytes < 300e9
        assert 0.5e12 < chip.hbm_bytes_per_s < 1e13
        # FLOPs a byte of HBM: no accelerator of these years lies far from 200 to 600.
        assert 100 < chip.peak_flops["bfloat16"] / chip.hbm_bytes_per_s < 700
        assert chip.dcn_bytes_per_s is None or 1e9 < chip.dcn_bytes_per_s < 1e11
        assert (chip.platform == "tpu") == (chip.torus_axes > 0)


def test_what_planning_needs_of_a_tpu_is_there_and_agrees_with_its_peak():
    for chip in CHIPS:
        if chip.platform == "gpu":
            assert chip.vmem_bytes is chip.clock_hz is chip.usable_hbm_bytes is None
            assert chip.hbm_bytes_per_device == chip.hbm_bytes
            continue
        assert chip.clock_hz is not None
        assert chip.usable_hbm_bytes is not None
        # A clock makes the peak of whole 128 x 128 arrays of multipliers, an even number of them.
        arrays = chip.peak_flops["bfloat16"] / (2 * chip.clock_hz * 128**2)
        assert arrays == pytest.approx(round(arrays), rel=0.005), chip.name
        assert round(arrays) in (4, 8, 16, 32), chip.name
        assert 0.95 < chip.usable_hbm_bytes * chip.devices_per_chip / chip.hbm_bytes <= 1.01, chip.name
        assert len(chip.largest_shape) == chip.torus_axes
        assert chip.host_chips == 4


def test_vmem_is_what_jax_says():
    from jax._src.pallas.mosaic import tpu_info

    versions = {str(version): version for version in tpu_info.ChipVersion}
    for name in ("v4", "v5e", "v5p", "v6e", "tpu7x"):
        version = versions[name.removeprefix("tpu")]
        cores = version.num_physical_tensor_cores_per_chip
        info = tpu_info.get_tpu_info_for_chip(version, 1)  # of one core
        chip = chip_named(name)
        assert chip is not None
        assert chip.vmem_bytes == cores * info.vmem_capacity_bytes, name


def test_a_torus_axis_carries_both_links_one_way():
    per_axis = {chip.name: chip.ici_bytes_per_s_per_axis for chip in CHIPS}
    assert per_axis["v5e"] == 100e9
    assert per_axis["v5p"] == per_axis["v6e"] == per_axis["tpu7x"] == 200e9
    assert per_axis["H100"] is None


def test_a_cpus_peak_is_measured_and_is_much_the_same_again():
    peak, meaning = peak_flops_per_device(jax.devices("cpu")[:1], "float32")
    assert peak is not None
    assert "measured matmul peak of this CPU in float32" in meaning
    again = measure_matmul_flops(jax.devices("cpu")[0], "float32", seconds=0.1)
    assert 0.2 < again / peak < 5  # other load comes and goes, but the size is right
    assert peak > 1e9


def test_simulated_devices_share_the_measured_peak():
    program = """
import jax
from maxlm.planning.hardware import measure_matmul_flops, peak_flops_per_device
peak, meaning = peak_flops_per_device(jax.devices(), "float32")
assert "(its cores shared by 8 simulated devices)" in meaning, meaning
whole = measure_matmul_flops(jax.devices()[0], "float32", seconds=0.1)
assert 8 / 5 < whole / peak < 8 * 5, (whole, peak)
"""
    flags = "--xla_force_host_platform_device_count=8"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
