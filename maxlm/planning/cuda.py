"""GPU clusters that are not here, for XLA's CUDA compiler: the description of the device that it asks for.

The compiler needs no GPU, but has to be told what a GPU would say of itself. Figures of a device are those that XLA
keeps from real ones (openxla/xla, xla/backends/gpu/target_config/specs); those of an architecture are the CUDA C++
Programming Guide's table "Technical Specifications per Compute Capability". What is not described here (rates of single
instructions) the compiler takes from the architecture.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import Any

from maxlm.errors import ConfigError
from maxlm.planning.topology import Topology

KIB = 2**10
LINKS = 18
"""NVLinks of a GPU to the switches of its host: 18 since Hopper (H100 white paper, B200 brief), 12 on an A100."""


@dataclass(frozen=True)
class Target:
    """What a GPU says of itself, as far as the compiler asks."""

    capability: int
    """Major number of the compute capability; the minor one of all of them is 0."""
    cores: int
    """Streaming multiprocessors."""
    memory_bytes: int
    """What the driver reports: less than the data sheet's figure times 2^30, more than it times 10^9."""
    memory_bytes_per_s: int
    l2_bytes: int
    clock_ghz: float
    lanes_per_core: int = 128
    """float32 lanes of a multiprocessor; 64 on compute capability 8.0."""
    shared_bytes_per_core: int = 228 * KIB
    links: int = LINKS
    source: str = "openxla/xla, target_config/specs"

    @property
    def accelerated(self) -> bool:
        """Whether it has instructions of its generation alone, `sm_90a` and `sm_100a`: those of the tensor cores."""
        return self.capability >= 9


_HOPPER_L2 = 50 * 2**20  # H100 white paper, table 3

# By the chip's name in the hardware table.
TARGETS: dict[str, Target] = {
    "A100-40GB": Target(
        capability=8,
        cores=108,
        memory_bytes=42_331_013_120,
        memory_bytes_per_s=1_555_200_000_000,
        l2_bytes=40 * 2**20,
        clock_ghz=1.41,
        lanes_per_core=64,
        shared_bytes_per_core=164 * KIB,
        links=12,
        source="openxla/xla, target_config/specs/a100_sxm_40.txtpb; A100 white paper (NVLink)",
    ),
    "A100-80GB": Target(
        capability=8,
        cores=108,
        memory_bytes=85_100_068_864,
        memory_bytes_per_s=2_039_040_000_000,
        l2_bytes=40 * 2**20,
        clock_ghz=1.41,
        lanes_per_core=64,
        shared_bytes_per_core=164 * KIB,
        links=12,
        source="openxla/xla, target_config/specs/a100_sxm_80.txtpb; A100 white paper (NVLink)",
    ),
    "H100": Target(
        capability=9,
        cores=132,
        memory_bytes=84_942_979_072,
        memory_bytes_per_s=3_352_320_000_000,
        l2_bytes=_HOPPER_L2,
        clock_ghz=1.98,
        source="openxla/xla, target_config/specs/h100_sxm.txtpb",
    ),
    "H200": Target(
        capability=9,
        cores=132,
        memory_bytes=151_397_597_184,
        memory_bytes_per_s=4_800_000_000_000,
        l2_bytes=_HOPPER_L2,
        clock_ghz=1.98,
        source="openxla/xla, target_config/specs/h200.txtpb",
    ),
    "B200": Target(
        capability=10,
        cores=148,
        memory_bytes=191_514_411_008,
        memory_bytes_per_s=7_672_320_000_000,
        l2_bytes=132_644_864,
        clock_ghz=1.965,
        source="openxla/xla, target_config/specs/b200.txtpb",
    ),
}


def target_config(topology: Topology) -> str:
    """The description of a topology's GPU, in the text format of XLA's `GpuTargetConfigProto`.

    Its cuDNN is the one that is installed, else 9.8. Raises ConfigError for a chip that is not described.
    """
    chip = topology.chip
    target = TARGETS.get(chip.name)
    if target is None:
        raise ConfigError(
            f"{topology.name}: no description of {chip.name} to compile for; there is one for {', '.join(TARGETS)}"
        )
    reserved = KIB  # of a multiprocessor's shared memory a block may have all but this
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "threads_per_core_limit": 2048,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "shared_memory_per_block": 48 * KIB,
        "shared_memory_per_block_optin": target.shared_bytes_per_core - reserved,
        "shared_memory_per_core": target.shared_bytes_per_core,
        "registers_per_core_limit": 64 * KIB,
        "registers_per_block_limit": 64 * KIB,
        "core_count": target.cores,
        "fpus_per_core": target.lanes_per_core,
        "memory_bandwidth": target.memory_bytes_per_s,
        "l2_cache_size": target.l2_bytes,
        "clock_rate_ghz": target.clock_ghz,
        "device_memory_size": target.memory_bytes,
    }
    capability: dict[str, Any] = {"major": target.capability}
    if target.accelerated:
        capability["feature_extension"] = "ACCELERATED_FEATURES"
    major, minor = _cudnn_version()
    return "\n".join(
        (
            f"gpu_device_info {{ {_fields(device)}",
            f"  cuda_compute_capability {{ {_fields(capability)} }}",
            f"  device_interconnect_info {{ active_links: {target.links} }} }}",
            'platform_name: "CUDA"',
            f"dnn_version_info {{ {_fields({'major': major, 'minor': minor})} }}",
            f'device_description_str: "{chip.device_kinds[0]}"',
        )
    )


def cuda_topology_devices(topology: Topology) -> list[Any]:
    """The GPUs of a cluster that is not here, host by host, for `jax.jit(...).lower(...).compile()` to compile for.

    Needs the `cuda12` extra, but no GPU. Where JAX has not chosen its platforms yet it is given the CPU alone: with a
    choice open it looks for GPUs, finds none, and then does not know the platform at all.

    Raises ConfigError for a chip that is not described.
    """
    text = target_config(topology)
    import jax
    from jax.experimental import topologies

    if not jax.config.jax_platforms:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_platforms", "cpu")
    hosts, per_host = topology.shape
    described = topologies.get_topology_desc(
        platform="cuda", topology_name=topology.name, target_config=text, topology=f"1x{hosts}x{per_host}"
    )
    return list(described.devices)


def _cudnn_version() -> tuple[int, int]:
    try:
        major, minor, *_ = importlib.metadata.version("nvidia-cudnn-cu12").split(".")
    except importlib.metadata.PackageNotFoundError:
        return 9, 8
    return int(major), int(minor)


def _fields(values: dict[str, Any]) -> str:
    return " ".join(f"{name}: {value}" for name, value in values.items())
