"""The compiler options that each chip is trained and planned with, each for a measured reason.

`train` gives them to the compiler through the same call as `plan`, so that the step planned is the step run. Figures
are of docs/performance-log.md, where what did not help stands too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """One setting of the compiler, and what was measured that speaks for it."""

    value: str | bool
    reason: str


_WINDOWS = (
    "{} KiB of VMEM for one fused operation instead of 16,384: the feed-forward block of a Llama-3 8B layer takes "
    "{} of the compiler's cycles"
)
_V6E_WINDOWS = (
    "65,536 KiB of VMEM for one fused operation: a step of Llama-3 8B takes 0.80 of the compiler's cycles, for 1.8 "
    "times the time of compiling; 49,152 give 0.87 (1.5 times), 98,304 give 0.77 (3 times)"
)
_LATENCY_HIDING = Option(
    True,
    "on an A100 every collective is synchronous without it; on an H100 it is what the compiler does anyway, as "
    "long as its estimator of latencies is on",
)

# One or two of them do nothing. v5e's compiler does so without being asked; on tpu7x they change nothing.
_BESIDE = {
    name: Option(
        True,
        "the three together put gathers of weights beside products: of Llama-3 8B 62% of the bytes of all collectives, "
        "where otherwise none are, for 0.2% (v5p) and 1% (v6e) more cycles and 0.4 GiB more heap",
    )
    for name in (
        "xla_enable_async_all_gather",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
        "xla_tpu_overlap_compute_collective_tc",
    )
}

OPTIONS: Mapping[str, Mapping[str, Option]] = {
    "v5e": {
        "xla_tpu_scoped_vmem_limit_kib": Option("24576", _WINDOWS.format("24,576", "0.92")),
        "xla_tpu_prefer_async_allgather_to_allreduce": Option(
            True,
            "without it the weights of keys and values are gathered on 16x16 as sums of zero-padded buffers, twice the "
            "bytes: 1.09 GB a step of Llama-3 8B",
        ),
    },
    "v5p": {"xla_tpu_scoped_vmem_limit_kib": Option("24576", _WINDOWS.format("24,576", "0.85")), **_BESIDE},
    "v6e": {"xla_tpu_scoped_vmem_limit_kib": Option("65536", _V6E_WINDOWS), **_BESIDE},
} | {
    chip: {"xla_gpu_enable_latency_hiding_scheduler": _LATENCY_HIDING}
    for chip in ("A100-40GB", "A100-80GB", "H100", "H200", "B200")
}


def compiler_options(chip_name: str | None) -> dict[str, str | bool]:
    """The options for a chip by its name in the hardware table; {} for one that is not known, such as a CPU."""
    return {name: option.value for name, option in OPTIONS.get(chip_name or "", {}).items()}
