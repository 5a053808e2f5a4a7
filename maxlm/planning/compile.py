"""The run's own step, compiled for devices that are not here, by the compiler that would make it there.

libtpu and XLA's CUDA plugin compile on any Linux host for clusters of any size. What they say is exact and repeatable:
memory, collectives, and, for TPUs, the cycles that the compiler counts on.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maxlm.errors import MaxlmError
from maxlm.planning.topology import Topology
from maxlm.planning.xla_options import compiler_options

if TYPE_CHECKING:
    import jax

    from maxlm.config import RunConfig

# For libtpu on a host without a TPU: no questions to a metadata server, and no lock file that a second plan would fail
# at. The accelerator type is only what it believes of this host.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class CompilerMissingError(MaxlmError):
    """The compiler that a topology needs is not installed."""


class OutOfMemoryError(MaxlmError):
    """The compiled step needs more memory than a device has. Its text is the compiler's."""

    def __init__(self, message: str, text: str | None):
        super().__init__(message)
        self.text = text
        """The scheduled program that did not fit; None where the compiler left none."""


@dataclass(frozen=True)
class LoweredStep:
    """The step as StableHLO, before the compiler: its hash is the same for a plan and for the run planned."""

    lowered: jax.stages.Lowered
    topology: Topology
    program_sha256: str
    sizes: dict[str, int]
    device_order: tuple[int, ...]
    options: dict[str, str | bool]
    seconds: float


@dataclass(frozen=True)
class CompiledStep:
    """What the compiler made of the step. Bytes are of one device."""

    text: str
    memory: dict[str, int]
    flops: float | None
    compile_seconds: float
    cpu_seconds: float
    peak_rss_bytes: int


def require_compiler(topology: Topology) -> str:
    """The name of the topology's compiler. Raises CompilerMissingError, saying how to install it."""
    name, module, extra = (
        ("libtpu", "libtpu", "tpu") if topology.is_tpu else ("xla-cuda", "jax_plugins.xla_cuda12", "cuda12")
    )
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise CompilerMissingError(
            f"{topology.name} needs the compiler {name}, which is not installed: pip install 'maxlm[{extra}]' "
            f"(it needs no {'TPU' if topology.is_tpu else 'GPU'})"
        )
    return name


def versions(topology: Topology) -> dict[str, str | None]:
    """The versions that decide what is compiled: of jax and of the compiler, None where it is not installed."""
    import importlib.metadata

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    compiler = "libtpu" if topology.is_tpu else "jax-cuda12-plugin"
    return {"jax": version("jax"), compiler: version(compiler)}


def topology_devices(topology: Topology) -> list[Any]:
    """The devices of a cluster that is not here, to compile for. Raises CompilerMissingError."""
    require_compiler(topology)
    os.environ["JAX_PLATFORMS"] = "cpu"
    if not topology.is_tpu:
        from maxlm.planning.cuda import cuda_topology_devices

        return cuda_topology_devices(topology)
    for name, value in TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    chip = topology.chip
    flat = len(topology.shape) == 2
    host = (min(4, topology.shape[0]), min(4, topology.shape[1]), 1) if flat else (2, 2, 1)
    if topology.shape in ((1, 1), (1, 1, 1)):
        host = (1, 1, 1)
    described = topologies.get_topology_desc(
        platform="tpu",
        topology_name=topology.name,
        chip_config_name="megacore" if chip.cores_per_chip > 1 and chip.devices_per_chip == 1 else "default",
        chips_per_host_bounds=host,
        num_slices=topology.slices,
        wrap=(*topology.wrap, *(True,) * flat),
    )
    return list(described.devices)


def lower_step(config: RunConfig, topology: Topology) -> LoweredStep:
    """The step of a config, lowered for a topology: seconds, whatever the size of model and cluster.

    Raises CompilerMissingError, and ClusterError or ConfigError where mesh, model and batch do not suit each other.
    """
    devices = topology_devices(topology)
    began = time.perf_counter()
    lowered, mesh = lower_on(config, devices)
    return LoweredStep(
        lowered=lowered,
        topology=topology,
        program_sha256=program_hash(lowered),
        sizes=dict(mesh.shape),
        device_order=tuple(int(device.id) for device in mesh.devices.flat),
        options=compiler_options(topology.chip.name),
        seconds=time.perf_counter() - began,
    )


def lower_on(config: RunConfig, devices: list[Any]) -> tuple[jax.stages.Lowered, jax.sharding.Mesh]:
    """The step of a config lowered for devices, which need not be here, and its mesh over them."""
    import jax

    from maxlm.parallel import support
    from maxlm.parallel.mesh import make_mesh
    from maxlm.training.program import Program

    mesh = make_mesh(config.mesh, devices)
    support.check_mesh(config, dict(mesh.shape))
    with jax.set_mesh(mesh):
        return Program(config, mesh).lower(), mesh


def program_hash(lowered: jax.stages.Lowered) -> str:
    """The hash of a lowered program's StableHLO, without the places in the source that it came from."""
    return hashlib.sha256(lowered.as_text().encode()).hexdigest()


def compile_step(step: LoweredStep) -> CompiledStep:
    """Compiles a lowered step; a minute or two for a large model. Raises OutOfMemoryError with the compiler's text."""
    import jax

    began, cpu_began = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory(prefix="maxlm-plan-") as dumped:
        dump: dict[str, str | bool] = {"xla_dump_to": dumped, "xla_dump_hlo_as_text": True}
        options = step.options | (dump if step.topology.is_tpu else {})
        try:
            compiled = step.lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise OutOfMemoryError(str(error), _dumped(dumped, "after_optimizations")) from error
            raise
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
        assignment = _dumped(dumped, "after_optimizations-buffer-assignment")
    stats: Any = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    return CompiledStep(
        text=compiled.as_text() or "",
        memory=_memory(stats, heap_bytes(assignment) if assignment else None),
        flops=cost.get("flops"),
        compile_seconds=seconds,
        cpu_seconds=cpu_seconds,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _dumped(folder: str, stage: str) -> str | None:
    """The text that the compiler left of the step's program at a stage."""
    found = sorted(Path(folder).glob(f"*train_step*.{stage}.txt"))
    return found[-1].read_text() if found else None


_HEAP = re.compile(r"^allocation \d+: size (\d+), preallocated-temp:", re.MULTILINE)


def heap_bytes(assignment: str) -> int:
    """What XLA's buffer assignment, as text, sets aside for temporaries in the device's own memory, gaps included.

    Other memories, such as a TPU's vector memory and the host's, have a colour and are left out.
    """
    return sum(int(size) for size in _HEAP.findall(assignment))


def _memory(stats: Any, heap: int | None) -> dict[str, int]:
    """The compiler's own figures, with what a device has to have: `required`.

    The heap counts, not libtpu's `temp`: that adds "fragmentation" to it, by which libtpu means all that is not live at
    one instant of its own choice (of Llama-3 8B on v5e-256 a heap of 8.69 GiB and 3.54 GiB of that). Where a program
    does not fit libtpu itself counts the heap with the arguments.
    """
    memory = {
        "argument": stats.argument_size_in_bytes,
        "output": stats.output_size_in_bytes,
        "alias": stats.alias_size_in_bytes,
        "temp": stats.temp_size_in_bytes,
        "host_temp": stats.host_temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
        "peak": stats.peak_memory_in_bytes,
    }
    memory["heap"] = memory["temp"] if heap is None else heap
    memory["required"] = memory["argument"] + memory["output"] - memory["alias"] + memory["code"] + memory["heap"]
    return memory
