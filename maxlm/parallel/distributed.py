"""Many processes as one run: finding each other, agreeing, and stopping together."""

from __future__ import annotations

from maxlm.section import Section, key


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
