"""Many processes as one run: finding each other, agreeing, and stopping together."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import sys
import time
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from maxlm.errors import ClusterError
from maxlm.parallel.rendezvous import Cluster, meet
from maxlm.section import Section, key

if TYPE_CHECKING:
    import jax

ENVIRONMENT = {
    "coordinator": "MAXLM_COORDINATOR",
    "num_processes": "MAXLM_NUM_PROCESSES",
    "process_id": "MAXLM_PROCESS_ID",
}


class DistributedConfig(Section):
    """How the processes of a run find each other. With nothing set, the run is one process."""

    coordinator: str | None = key(
        None,
        "HOST:PORT of process 0; auto: as Slurm, a TPU pod, Kubernetes or Open MPI tells; null: $MAXLM_COORDINATOR, "
        "and where that is unset one process",
    )
    num_processes: int | None = key(None, "processes of the run; null: $MAXLM_NUM_PROCESSES", unit="processes", ge=1)
    process_id: int | None = key(None, "number of this process, from 0; null: $MAXLM_PROCESS_ID", ge=0)
    timeout_seconds: int = key(300, "how long to wait for the other processes at the start", unit="seconds", ge=1)


def initialize(config: DistributedConfig) -> None:
    """Joins the other processes of the run, before any device is touched; alone, it does nothing.

    Keys that are null are read from the environment (`MAXLM_COORDINATOR`, `MAXLM_NUM_PROCESSES`, `MAXLM_PROCESS_ID`).
    Raises ClusterError when a key is missing or wrong, or when a process does not come in time.
    """
    automatic = _setting(config, "coordinator") == "auto"
    cluster = None if automatic else resolve_cluster(config)
    if cluster is None and not automatic:
        return
    import jax

    if jax.distributed.is_initialized():
        return
    if jax.config.jax_cpu_collectives_implementation is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if hasattr(jax.config, "jax_enable_preemption_service"):
        # It would take SIGTERM for itself; `Signals` and `agree` do its work, for SIGINT as well.
        jax.config.update("jax_enable_preemption_service", False)
    deadline = time.monotonic() + config.timeout_seconds
    if cluster is None:
        _initialize_automatically(config.timeout_seconds)
    else:
        meet(cluster, config.timeout_seconds)
        try:
            jax.distributed.initialize(
                cluster.address,
                cluster.num_processes,
                cluster.process_id,
                cluster_detection_method="deactivate",
                initialization_timeout=max(30, round(deadline - time.monotonic())),
            )
        except (RuntimeError, ValueError) as error:
            raise ClusterError(f"distributed: {cluster} could not join the run: {_first_line(error)}") from error
    _leave_on_uncaught_errors()


def _initialize_automatically(timeout_seconds: int) -> None:
    import jax

    try:
        jax.distributed.initialize(initialization_timeout=timeout_seconds)
    except ValueError as error:
        raise ClusterError(
            "distributed.coordinator is auto, and neither Slurm, a TPU pod, Kubernetes nor Open MPI started this "
            f"process ({_first_line(error)}); give distributed.coordinator=HOST:PORT, num_processes and process_id"
        ) from error
    except RuntimeError as error:
        raise ClusterError(
            f"distributed.coordinator is auto, and the processes did not find each other: {_first_line(error)}"
        ) from error


def resolve_cluster(config: DistributedConfig) -> Cluster | None:
    """The cluster that the config and the environment name, or None for a single process. Raises ClusterError."""
    coordinator = _setting(config, "coordinator")
    num_processes, process_id = _count(config, "num_processes"), _count(config, "process_id")
    if num_processes is not None and process_id is not None and process_id >= num_processes:
        raise ClusterError(
            f"{_name(config, 'process_id')} is {process_id} and {_name(config, 'num_processes')} is {num_processes}; "
            f"processes are numbered 0 to {num_processes - 1}"
        )
    if num_processes == 1 or (coordinator is None and num_processes is None and process_id is None):
        return None
    settings = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in settings.items() if value is None]
    if coordinator is None or num_processes is None or process_id is None:
        given = " and ".join(f"{_name(config, name)} = {settings[name]}" for name in settings if name not in missing)
        wanted = " and ".join(f"distributed.{name} (${ENVIRONMENT[name]})" for name in missing)
        raise ClusterError(f"{given} is given without {wanted}; a run of many processes needs all three")
    host, port = _host_and_port(coordinator, _name(config, "coordinator"))
    return Cluster(host, port, num_processes, process_id)


def _setting(config: DistributedConfig, name: str) -> Any:
    value = getattr(config, name)
    return (os.environ.get(ENVIRONMENT[name]) or None) if value is None else value


def _name(config: DistributedConfig, name: str) -> str:
    return f"distributed.{name}" if getattr(config, name) is not None else f"${ENVIRONMENT[name]}"


def _count(config: DistributedConfig, name: str) -> int | None:
    value = _setting(config, name)
    if value is None or isinstance(value, int):
        return value
    least = 1 if name == "num_processes" else 0
    if not value.isdecimal() or int(value) < least:
        raise ClusterError(f"{_name(config, name)} is {value!r}; it must be a whole number of at least {least}")
    return int(value)


def _host_and_port(coordinator: str, name: str) -> tuple[str, int]:
    match = re.fullmatch(r"(?:\[(?P<six>[0-9a-fA-F:.]+)\]|(?P<host>[^\s:\[\]/]+)):(?P<port>\d{1,5})", coordinator)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise ClusterError(
            f"{name} is {coordinator!r}; it must be HOST:PORT of process 0, with a port from 1 to 65535 "
            "(for example 10.0.0.1:1234), or auto"
        )
    return match["six"] or match["host"], int(match["port"])


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# Ending.


def leave(exit_code: int) -> None:
    """Ends this process at once when it is one of many; returns when it is alone.

    After an error in one process the others wait for it in a collective, and it would wait for them at the barrier of
    `jax.distributed.shutdown`, for minutes. Ending breaks the connections, and so ends the others.
    """
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _leave_on_uncaught_errors() -> None:
    report = sys.excepthook

    def report_and_leave(
        kind: type[BaseException], error: BaseException, traceback: types.TracebackType | None
    ) -> None:
        report(kind, error, traceback)
        leave(getattr(error, "exit_code", 1))

    sys.excepthook = report_and_leave


# Agreeing. All processes make the same calls in the same order, from the main thread: each is a collective.


def is_main() -> bool:
    """Whether this is process 0, which writes what there is one of."""
    import jax

    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when all processes are at the barrier `name`."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def gather_json(value: Any) -> list[Any]:
    """Every process's JSON `value`, by process."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return [value]
    payload = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(payload.size))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: payload.size] = payload
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def broadcast_json(value: Any) -> Any:
    """Process 0's JSON `value`, in every process; what the others pass is not used."""
    return gather_json(value if is_main() else None)[0]


_asked: jax.Array | None = None


def agree(flag: bool) -> bool:
    """Whether any process raised its flag: the same answer in all, so that they stop after the same step.

    Called once a step. With many processes the answer is to the call before this one (False at the first), so that it
    waits for a step that is done and not for the one that was just dispatched; a flag must therefore stay raised.
    """
    import jax
    import numpy as np

    global _asked
    if jax.process_count() == 1:
        return flag
    before, _asked = _asked, _ask(flag)
    return before is not None and bool(np.asarray(before.addressable_data(0)))


def _ask(flag: bool) -> jax.Array:
    import jax
    import numpy as np

    mesh, any_of = _any_of()
    sharding = jax.NamedSharding(mesh, jax.P("process"))
    mine = jax.device_put(np.array([flag], np.int32), next(iter(sharding.addressable_devices)))
    flags = jax.make_array_from_single_device_arrays((jax.process_count(),), sharding, [mine])
    with jax.set_mesh(mesh):
        return any_of(flags)


@functools.cache
def _any_of() -> tuple[jax.sharding.Mesh, Callable[[jax.Array], jax.Array]]:
    """A mesh of one device a process, and the jitted maximum over it."""
    import jax
    import jax.numpy as jnp

    firsts: dict[int, Any] = {}
    for device in jax.devices():
        firsts.setdefault(device.process_index, device)
    mesh = jax.sharding.Mesh([firsts[i] for i in sorted(firsts)], ("process",))
    return mesh, jax.jit(jnp.max, out_shardings=jax.NamedSharding(mesh, jax.P()))


class Signals:
    """While it is open, SIGTERM and SIGINT ask the run to stop; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.stop_requested = False
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        del frame
        if number == signal.SIGINT and self.received == "SIGINT":
            raise KeyboardInterrupt
        self.stop_requested = True
        self.received = signal.Signals(number).name
