"""The chips that maxlm knows: what each can do at most, and who says so.

A peak is the dense rate (no structured sparsity) of the matrix units, since MFU is model FLOP/s over it. TPU figures
are Google Cloud's pages, a chip; NVIDIA's data sheets give tensor-core rates with 2:4 sparsity, which are halved here.
A CPU has no such sheet: its peak is measured, see `measure_matmul_flops`.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

GB = 10**9
MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Chip:
    """One accelerator chip. Rates are of the whole chip, also where JAX shows it as several devices."""

    name: str
    platform: str
    """JAX's name of the platform: `tpu` or `gpu`."""
    device_kinds: tuple[str, ...]
    """What `device.device_kind` says for it, exactly: an H100 PCIe or a MIG slice is another chip with other peaks."""
    peak_flops: Mapping[str, float] = field(hash=False)
    """Dense FLOP/s by dtype: `bfloat16`, `float8`, `tensorfloat32`, `float32`. What is not published is not here."""
    hbm_bytes: int
    hbm_bytes_per_s: float
    ici_bytes_per_s: float
    """ICI (TPU) or NVLink (GPU) of a chip: all links, both directions added, as both vendors give it."""
    dcn_bytes_per_s: float | None
    """Network between slices or hosts, one direction, a chip's share; None where it is not published."""
    source: str
    torus_axes: int = 0
    """Axes of the ICI torus; 0 for a switched network (NVLink)."""
    devices_per_chip: int = 1
    usable_hbm_bytes: int | None = None
    """What the compiler lets a program have of a *device's* memory, as its out-of-memory error of jax 0.10.2 with
    libtpu 0.0.42.1 says; None for a GPU, whose allocator may be given nearly all."""
    vmem_bytes: int | None = None
    """On-chip memory of the TensorCores, all of a chip; None for a GPU."""
    clock_hz: float | None = None
    """The TensorCore's clock, which turns the compiler's cycles into seconds; None for a GPU."""
    cores_per_chip: int = 1
    """What accelerator names count in a chip: TensorCores of v4 and v5p, JAX devices of tpu7x, else chips."""
    host_chips: int = 8
    """Chips of a host (a virtual machine, one JAX process) in a slice of several hosts."""
    lone_host_chips: int = 8
    """Chips of the largest slice that is a single host."""
    largest_shape: tuple[int, ...] = ()
    """The largest slice along each torus axis; () for a GPU."""

    @property
    def hbm_bytes_per_device(self) -> int:
        """Bytes that a program may use of a JAX device's memory."""
        return self.usable_hbm_bytes or self.hbm_bytes // self.devices_per_chip

    @property
    def ici_bytes_per_s_per_axis(self) -> float | None:
        """What a chip sends along one torus axis with wraparound: two links, each half of its both-ways figure.

        Halve it on an axis without wraparound, where a ring must run back over the same links. None for a GPU.
        """
        return self.ici_bytes_per_s / (2 * self.torus_axes) if self.torus_axes else None


# VMEM is jax/_src/pallas/mosaic/tpu_info.py's, times the cores of a chip. Clocks: v4, Jouppi et al. 2023, table 4; v5e,
# the scaling book (jax-ml.github.io/scaling-book/tpus); v5p, v6e and tpu7x follow from the peak, two FLOPs a cycle for
# each multiplier: 459e12 / (8 x 128^2), 918e12 / (4 x 256^2), 2307e12 / (8 x 256^2). Hosts and largest slices are from
# the pages' tables of configurations; v5e and v6e have one host of 8 chips, or several of 4.
TPU_PAGES = "https://docs.cloud.google.com/tpu/docs/"
H100_WHITE_PAPER = "NVIDIA H100 Tensor Core GPU Architecture, v1.04, table 3"

# The kinds are those of jax/_src/pallas/mosaic/tpu_info.py for TPUs, and CUDA's device names for GPUs.
CHIPS: tuple[Chip, ...] = (
    Chip(
        name="v4",
        platform="tpu",
        device_kinds=("TPU v4",),
        peak_flops={"bfloat16": 275e12},
        hbm_bytes=32 * GIB,
        hbm_bytes_per_s=1.2e12,
        ici_bytes_per_s=600e9,  # 6 links of 50 GB/s each way
        dcn_bytes_per_s=None,
        torus_axes=3,
        usable_hbm_bytes=int(30.75 * GIB),
        vmem_bytes=2 * 16 * MIB,
        clock_hz=1.05e9,
        cores_per_chip=2,
        host_chips=4,
        lone_host_chips=4,
        largest_shape=(16, 16, 16),
        source=TPU_PAGES + "v4; ICI: Jouppi et al. 2023, arXiv:2304.01433, table 4",
    ),
    Chip(
        name="v5e",
        platform="tpu",
        device_kinds=("TPU v5 lite", "TPU v5e"),
        peak_flops={"bfloat16": 197e12},
        hbm_bytes=16 * GIB,  # "16 GB" on the page, of which libtpu gives 15.75 GiB
        hbm_bytes_per_s=819e9,
        ici_bytes_per_s=400e9,
        dcn_bytes_per_s=6.4e12 / 8 / 256,  # 6.4 Tb/s a pod of 256 chips
        torus_axes=2,
        usable_hbm_bytes=int(15.75 * GIB),
        vmem_bytes=128 * MIB,
        clock_hz=1.5e9,
        host_chips=4,
        largest_shape=(16, 16),
        source=TPU_PAGES + "v5e",
    ),
    Chip(
        name="v5p",
        platform="tpu",
        device_kinds=("TPU v5", "TPU v5p"),
        peak_flops={"bfloat16": 459e12, "float8": 459e12},
        hbm_bytes=95 * GIB,
        hbm_bytes_per_s=2765e9,
        ici_bytes_per_s=1200e9,
        dcn_bytes_per_s=50e9 / 8,
        torus_axes=3,
        usable_hbm_bytes=int(95.74 * GIB),
        vmem_bytes=2 * 64 * MIB,
        clock_hz=1.75e9,
        cores_per_chip=2,
        host_chips=4,
        lone_host_chips=4,
        largest_shape=(16, 16, 24),
        source=TPU_PAGES + "v5p and " + TPU_PAGES + "tpu7x (fp8, GiB, DCN)",
    ),
    Chip(
        name="v6e",
        platform="tpu",
        device_kinds=("TPU v6 lite", "TPU v6e"),
        peak_flops={"bfloat16": 918e12, "float8": 918e12},
        hbm_bytes=32 * GIB,
        hbm_bytes_per_s=1638e9,
        ici_bytes_per_s=800e9,
        dcn_bytes_per_s=100e9 / 8,
        torus_axes=2,
        usable_hbm_bytes=int(31.25 * GIB),
        vmem_bytes=128 * MIB,
        clock_hz=1.75e9,
        host_chips=4,
        largest_shape=(16, 16),
        source=TPU_PAGES + "v6e and " + TPU_PAGES + "tpu7x (fp8, GiB, DCN)",
    ),
    Chip(
        name="tpu7x",
        platform="tpu",
        device_kinds=("TPU7x",),
        peak_flops={"bfloat16": 2307e12, "float8": 4614e12},
        hbm_bytes=192 * GIB,
        hbm_bytes_per_s=7380e9,
        ici_bytes_per_s=1200e9,
        dcn_bytes_per_s=100e9 / 8,
        torus_axes=3,
        devices_per_chip=2,  # "lets you access two TPU devices instead of the single logical core"
        usable_hbm_bytes=int(94.75 * GIB),
        vmem_bytes=2 * 64 * MIB,
        clock_hz=2.2e9,
        cores_per_chip=2,
        host_chips=4,
        lone_host_chips=4,
        largest_shape=(16, 24, 24),  # 9,216 chips, the pod
        source=TPU_PAGES + "tpu7x",
    ),
    Chip(
        name="A100-40GB",
        platform="gpu",
        device_kinds=("NVIDIA A100-SXM4-40GB",),
        peak_flops={"bfloat16": 312e12, "tensorfloat32": 156e12, "float32": 19.5e12},
        hbm_bytes=40 * GB,
        hbm_bytes_per_s=1555e9,
        ici_bytes_per_s=600e9,
        dcn_bytes_per_s=200e9 / 8,  # DGX A100 data sheet: one 200 Gb/s adapter a GPU
        source="NVIDIA A100 Tensor Core GPU data sheet (SXM); DGX A100 data sheet (network)",
    ),
    Chip(
        name="A100-80GB",
        platform="gpu",
        device_kinds=("NVIDIA A100-SXM4-80GB",),
        peak_flops={"bfloat16": 312e12, "tensorfloat32": 156e12, "float32": 19.5e12},
        hbm_bytes=80 * GB,
        hbm_bytes_per_s=2039e9,
        ici_bytes_per_s=600e9,
        dcn_bytes_per_s=200e9 / 8,
        source="NVIDIA A100 Tensor Core GPU data sheet (SXM); DGX A100 data sheet (network)",
    ),
    Chip(
        name="H100",
        platform="gpu",
        device_kinds=("NVIDIA H100 80GB HBM3",),
        peak_flops={"bfloat16": 989.4e12, "float8": 1978.9e12, "tensorfloat32": 494.7e12, "float32": 66.9e12},
        hbm_bytes=80 * GB,
        hbm_bytes_per_s=3.35e12,
        ici_bytes_per_s=900e9,
        dcn_bytes_per_s=400e9 / 8,  # DGX H100 data sheet: one 400 Gb/s adapter a GPU
        source=H100_WHITE_PAPER + " (SXM5); H100 data sheet (HBM, NVLink); DGX H100 data sheet (network)",
    ),
    Chip(
        name="H200",
        platform="gpu",
        device_kinds=("NVIDIA H200",),
        peak_flops={"bfloat16": 989.4e12, "float8": 1978.9e12, "tensorfloat32": 494.7e12, "float32": 66.9e12},
        hbm_bytes=141 * GB,
        hbm_bytes_per_s=4.8e12,
        ici_bytes_per_s=900e9,
        dcn_bytes_per_s=400e9 / 8,
        source="NVIDIA H200 data sheet (SXM: the H100's compute); "
        + H100_WHITE_PAPER
        + "; DGX H200 data sheet (network)",
    ),
    Chip(
        name="B200",
        platform="gpu",
        device_kinds=("NVIDIA B200",),
        peak_flops={"bfloat16": 2250e12, "float8": 4500e12, "tensorfloat32": 1100e12, "float32": 80e12},
        hbm_bytes=180 * GB,  # 1,440 GB a system of 8; 192 GB, often quoted, is what the package carries
        hbm_bytes_per_s=8e12,
        ici_bytes_per_s=1800e9,
        dcn_bytes_per_s=400e9 / 8,
        source="NVIDIA Blackwell Architecture Technical Brief (HGX B200, 1 kW); DGX B200 data sheet (memory, network)",
    ),
)

_CHIP_BY_KIND = {kind: chip for chip in CHIPS for kind in chip.device_kinds}


_CHIP_BY_NAME = {chip.name.lower(): chip for chip in CHIPS} | {
    "v5litepod": next(chip for chip in CHIPS if chip.name == "v5e"),
    "a100": next(chip for chip in CHIPS if chip.name == "A100-80GB"),
}


def chip_named(name: str) -> Chip | None:
    """The chip of that name in any case (`v5litepod` is the v5e, `a100` the one with 80 GB), or None."""
    return _CHIP_BY_NAME.get(name.lower())


def chip_names() -> tuple[str, ...]:
    """Every name that `chip_named` knows."""
    return tuple(_CHIP_BY_NAME)


def chip_of(device: Any) -> Chip | None:
    """The chip of a JAX device (or of any object with its `device_kind`), or None if it is not in the table."""
    return _CHIP_BY_KIND.get(device.device_kind)


def peak_flops_per_device(devices: Sequence[Any], dtype: str) -> tuple[float | None, str]:
    """The FLOP/s of a JAX device that MFU is counted against, and what they are: "MFU is model FLOP/s over the ...".

    Args:
        devices: the devices of the mesh, all of one kind. A CPU's peak is measured (about 0.3 s), see below.
        dtype: what the matrix products are computed in: `bfloat16`, `float32` or `float8`.

    Returns:
        None in place of the peak where none is known; then there is no MFU, and the words say why. All simulated
        devices of a process share its cores, so that each has its part of the measured rate.
    """
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        if dtype not in ("bfloat16", "float32"):
            return None, f"{dtype} peak, which is not measured on a CPU, so it is left out"
        local = [device for device in devices if device.process_index == devices[0].client.process_index()]
        n_sharing = max(len(local), 1)
        peak = measure_matmul_flops((local or list(devices))[0], dtype) / n_sharing
        shared = f" (its cores shared by {n_sharing} simulated devices)" if n_sharing > 1 else ""
        return peak, f"measured matmul peak of this CPU in {dtype}: {_flops(peak)} a device{shared}"
    chip = chip_of(devices[0])
    if chip is None:
        return None, f"peak of the chip, which is not known for {kind!r}, so it is left out"
    rate_of = _rate_name(chip, dtype)
    if rate_of not in chip.peak_flops:
        return None, f"{dtype} peak of {chip.name}, which is not published, so it is left out"
    peak = chip.peak_flops[rate_of] / chip.devices_per_chip
    part = f" (one of {chip.devices_per_chip} devices of a chip)" if chip.devices_per_chip > 1 else ""
    return peak, f"dense {rate_of} peak of {chip.name}: {_flops(peak)} a device{part}"


def _rate_name(chip: Chip, dtype: str) -> str:
    """Which published rate applies. On GPUs XLA computes float32 products in TF32 unless asked for more precision."""
    if dtype != "float32" or "tensorfloat32" not in chip.peak_flops:
        return dtype
    import jax

    return (
        "float32"
        if str(getattr(jax.config, "jax_default_matmul_precision", None)) in ("highest", "float32")
        else "tensorfloat32"
    )


def _flops(rate: float) -> str:
    return f"{rate / 1e12:,.1f} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:,.1f} GFLOP/s"


def measure_matmul_flops(device: Any, dtype: str, *, seconds: float = 0.3) -> float:
    """FLOP/s of a big square matrix product on `device`: the best of those that fit in `seconds`, at least three.

    The best and not the mean, since it stands for what the machine could do; other load on it only takes away. The
    side is chosen so that one product takes some milliseconds: long beside its dispatch, short beside the budget.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    multiply = jax.jit(jnp.matmul)
    # A mesh of this device alone, whatever mesh is current: that may span processes.
    with jax.set_mesh(jax.sharding.Mesh(np.array([device]), ("device",))):
        for side in (1024, 2048, 4096, 8192):
            x = jax.device_put(np.ones((side, side), jnp.dtype(dtype)), device)
            multiply(x, x).block_until_ready()
            best = _seconds_of(multiply, x)
            if best > 5e-3:
                break
        deadline = time.perf_counter() + seconds
        n_timed = 0
        while n_timed < 3 or time.perf_counter() < deadline:
            best = min(best, _seconds_of(multiply, x))
            n_timed += 1
    return 2 * side**3 / best


def _seconds_of(multiply: Any, x: Any) -> float:
    start = time.perf_counter()
    multiply(x, x).block_until_ready()
    return time.perf_counter() - start
