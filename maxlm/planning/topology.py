"""A cluster by its name: `v5p:4x4x4` (chip and shape of a slice) or `v5p-128` (an accelerator type), `h100:16x8`.

Shapes are those that Google rents (docs.cloud.google.com/tpu/docs, a page a chip): v5e and v6e in two dimensions up to
16 x 16; v4, v5p and tpu7x in three, every side a multiple of 4 or all at most 4, ascending. GPUs are
hosts x GPUs a host.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from dataclasses import dataclass
from functools import cache

from maxlm.errors import ConfigError
from maxlm.planning.hardware import Chip, chip_named, chip_names

# 3D slices smaller than a cube of 4 x 4 x 4, as the pages write them: a host is 2 x 2 x 1.
_SMALL_3D = ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_SHAPES_2D = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))

# A side of the v5e's and v6e's torus closes only over the whole pod.
_WRAPPED_SIDE_2D = 16


@dataclass(frozen=True)
class Topology:
    """So many slices (or one GPU cluster) of a chip. Counts are of all slices together unless they say otherwise."""

    chip: Chip
    shape: tuple[int, ...]
    """Chips along each torus axis of one slice; for GPUs (hosts, GPUs a host)."""
    slices: int = 1

    @property
    def is_tpu(self) -> bool:
        return self.chip.platform == "tpu"

    @property
    def name(self) -> str:
        """`v5p:4x4x4`, `h100:16x8`: of one slice."""
        return f"{self.chip.name.lower()}:{_times(self.shape)}"

    @property
    def accelerator(self) -> str:
        """One slice as an accelerator type: `v5p-128`, `v6e-256`, `tpu7x-128`, `h100-128`."""
        return f"{self.chip.name.lower()}-{math.prod(self.shape) * self.chip.cores_per_chip}"

    @property
    def n_chips(self) -> int:
        return self.slices * math.prod(self.shape)

    @property
    def n_devices(self) -> int:
        """JAX devices."""
        return self.n_chips * self.chip.devices_per_chip

    @property
    def devices_per_slice(self) -> int:
        return self.n_devices // self.slices

    @property
    def hosts(self) -> int:
        """Hosts, each of which runs one JAX process."""
        if not self.is_tpu:
            return self.shape[0]
        chips = math.prod(self.shape)
        return self.slices * (1 if chips <= self.chip.lone_host_chips else chips // self.chip.host_chips)

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Which torus axes close to a ring. () for GPUs.

        In three dimensions all, where every side is a multiple of 4: then the optical switches between cubes close them
        (Jouppi et al. 2023, arXiv:2304.01433, section 2.2). In two, a side of the whole pod.
        """
        if not self.is_tpu:
            return ()
        if self.chip.torus_axes == 2:
            return tuple(side == _WRAPPED_SIDE_2D for side in self.shape)
        return (all(side % 4 == 0 for side in self.shape),) * 3

    @property
    def hbm_bytes_per_device(self) -> int:
        """Bytes that a program may use of a device's memory."""
        return self.chip.hbm_bytes_per_device

    def peak_flops_per_device(self, dtype: str) -> float:
        """Dense FLOP/s of a device for products of `dtype` as XLA computes them by default.

        float32 is TF32 on a GPU, and one pass of bfloat16 on a TPU. Raises ConfigError for a rate not published.
        """
        peaks = self.chip.peak_flops
        name = dtype if dtype != "float32" else "bfloat16" if self.is_tpu else "tensorfloat32"
        if name not in peaks:
            raise ConfigError(f"{dtype} peak of {self.chip.name} is not published; it has {', '.join(peaks)}")
        return peaks[name] / self.chip.devices_per_chip

    @property
    def hbm_bytes_per_s_per_device(self) -> float:
        return self.chip.hbm_bytes_per_s / self.chip.devices_per_chip

    @property
    def dcn_bytes_per_s_per_device(self) -> float | None:
        """What a device sends over the network between slices (or hosts of GPUs), one direction, if published."""
        rate = self.chip.dcn_bytes_per_s
        return None if rate is None else rate / self.chip.devices_per_chip


def parse_topology(text: str, slices: int = 1) -> Topology:
    """The topology of a name of either kind, in any case.

    Raises ConfigError for a chip or a shape that there is not, naming those that are near.
    """
    text = text.strip().lower()
    if slices < 1:
        raise ConfigError(f"{slices} slices; give 1 or more (--slices N)")
    if ":" in text:
        name, _, shape_text = text.partition(":")
        chip = _chip(name, text)
        if not re.fullmatch(r"\d+(x\d+)*", shape_text):
            raise ConfigError(f"topology {text!r}: {shape_text!r} is no shape; {_form(chip)}")
        shape = tuple(int(side) for side in shape_text.split("x"))
        _check_shape(chip, shape, text)
    else:
        name, dash, count = text.rpartition("-")
        if not dash or not count.isdigit():
            hint = _form(chip) if (chip := chip_named(text)) else f"give CHIP:SHAPE or CHIP-N; chips are {_known()}"
            raise ConfigError(f"topology {text!r} names no shape and no number; {hint}")
        chip = _chip(name, text)
        shape = _default_shape(chip, int(count), text)
    if slices > 1 and chip.platform != "tpu":
        raise ConfigError(f"{slices} slices of {text}: GPU clusters are one; give all hosts in the shape")
    if slices > 1 and chip.dcn_bytes_per_s is None:
        raise ConfigError(f"{slices} slices of {text}: the network between slices of {chip.name} is not published")
    return Topology(chip, shape, slices)


def _chip(name: str, text: str) -> Chip:
    if chip := chip_named(name):
        return chip
    near = difflib.get_close_matches(name, chip_names(), n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ConfigError(f"topology {text!r}: no chip {name!r}; {hint}They are {_known()}")


def _known() -> str:
    return ", ".join(sorted(chip_names()))


def _form(chip: Chip) -> str:
    """How a shape of this chip is written."""
    name = chip.name.lower()
    example = f"{name}:16x8 (16 hosts of 8 GPUs)" if chip.platform != "tpu" else f"{name}:{_times(shapes(chip)[4])}"
    return (
        f"write {example} or an accelerator type like {name}-{_count(chip, shapes(chip)[4]) if shapes(chip) else 128}"
    )


@cache
def shapes(chip: Chip) -> tuple[tuple[int, ...], ...]:
    """Every slice of a TPU that can be had, smallest first and among equal ones the most cubic first. () for GPUs."""
    if chip.platform != "tpu":
        return ()
    if chip.torus_axes == 2:
        return _SHAPES_2D
    sides = range(4, chip.largest_shape[-1] + 1, 4)
    cubes = [
        shape
        for shape in itertools.combinations_with_replacement(sides, 3)
        if math.prod(shape) <= math.prod(chip.largest_shape)
    ]
    return tuple(sorted((*_SMALL_3D, *cubes), key=lambda shape: (math.prod(shape), sum(shape))))


def _check_shape(chip: Chip, shape: tuple[int, ...], text: str) -> None:
    if chip.platform != "tpu":
        hosts_of = chip.host_chips
        if len(shape) != 2 or shape[0] < 1 or not 1 <= shape[1] <= hosts_of or (shape[0] > 1 and hosts_of % shape[1]):
            raise ConfigError(
                f"topology {text!r}: a GPU cluster is HOSTS x GPUS with up to {hosts_of} GPUs a host; {_form(chip)}"
            )
        return
    if shape in shapes(chip):
        return
    if tuple(sorted(shape)) in shapes(chip):
        why = "sides are given in ascending order"
    elif len(shape) != chip.torus_axes:
        why = f"{chip.name} has a torus of {chip.torus_axes} axes"
    elif chip.torus_axes == 2:
        why = "slices of it are a square, or twice that, of sides 1, 2, 4, 8 or 16"
    else:
        why = f"sides are multiples of 4 (up to {_times(chip.largest_shape)}), or one of " + ", ".join(
            map(_times, _SMALL_3D)
        )
    raise ConfigError(f"topology {text!r} cannot be had: {why}; near it: {_near(chip, math.prod(shape))}")


def _default_shape(chip: Chip, count: int, text: str) -> tuple[int, ...]:
    if chip.platform != "tpu":
        if 1 <= count <= chip.host_chips:
            return (1, count)
        if count % chip.host_chips or not count:
            low = count // chip.host_chips * chip.host_chips or 1
            near = f"{chip.name.lower()}-{low} or {chip.name.lower()}-{low + chip.host_chips}"
            raise ConfigError(f"topology {text!r}: {count} GPUs are not whole hosts of {chip.host_chips}; take {near}")
        return (count // chip.host_chips, chip.host_chips)
    for shape in shapes(chip):
        if _count(chip, shape) == count:
            return shape
    counts = {1: "chips", 2: "JAX devices, 2 a chip" if chip.devices_per_chip > 1 else "TensorCores, 2 a chip"}
    raise ConfigError(
        f"topology {text!r} cannot be had ({chip.name}-N counts {counts[chip.cores_per_chip]}); "
        f"near it: {_near(chip, count // chip.cores_per_chip)}"
    )


def _near(chip: Chip, n_chips: int) -> str:
    """Up to two shapes smaller and two larger, with their accelerator types."""
    ordered = list({math.prod(shape): shape for shape in reversed(shapes(chip))}.values())
    ordered.sort(key=math.prod)
    smaller = [shape for shape in ordered if math.prod(shape) <= n_chips][-2:]
    larger = [shape for shape in ordered if math.prod(shape) > n_chips][:2]
    return ", ".join(
        f"{chip.name}:{_times(shape)} ({chip.name}-{_count(chip, shape)})" for shape in (*smaller, *larger)
    )


def _count(chip: Chip, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * chip.cores_per_chip


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
