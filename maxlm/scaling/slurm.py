"""A sweep as a Slurm array job: a task a run, after one job that prepares the data."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from maxlm.files import write_atomically
from maxlm.scaling.ladder import Ladder
from maxlm.scaling.sweep import tasks

LEAVE_SECONDS = 180
"""before a task's time is up it is asked to leave: its runs save, and it is queued again"""

TASK = """\
leave() {{
  kill -TERM "$task"
  wait "$task" || true
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
}}
trap leave TERM
{command} --only "$SLURM_ARRAY_TASK_ID" &
task=$!
wait "$task"
"""

PREPARE, ARRAY, SUBMIT = "prepare.sbatch", "runs.sbatch", "submit.sh"


def render(
    ladder: Ladder, spec: str | Path, folder: Path, *, at_once: int, options: tuple[str, ...] = ()
) -> list[Path]:
    """Writes the scripts into `folder` and returns their paths, that of submit.sh last.

    `spec` is as `maxlm sweep run` takes it. `at_once` tasks run at a time; `options` are of sbatch, such as
    `--partition=gpu`, for every job. A task that is requeued goes on where it was. Raises StorageError.
    """
    name = ladder.sweep.spec.name
    path = Path(spec)
    what = shlex.quote(str(path.absolute()) if path.is_file() else str(spec))
    command = f"{shlex.quote(sys.executable)} -m maxlm.cli sweep run {what}"
    common = "".join(f"#SBATCH {option}\n" for option in options)
    logs = folder.absolute() / "logs"
    last = len(tasks(ladder)) - 1
    head = f"#!/usr/bin/env bash\n#SBATCH --job-name={name}"
    body = f"set -euo pipefail\ncd {shlex.quote(str(Path.cwd()))}\n"
    scripts = {
        PREPARE: f"{head}-prepare\n#SBATCH --output={logs}/prepare-%j.log\n{common}{body}exec {command} --prepare\n",
        ARRAY: f"{head}\n#SBATCH --array=0-{last}%{at_once}\n#SBATCH --output={logs}/task-%A-%a.log\n"
        f"#SBATCH --requeue\n#SBATCH --signal=B:TERM@{LEAVE_SECONDS}\n{common}{body}{TASK.format(command=command)}",
        SUBMIT: f"#!/usr/bin/env bash\n# {last + 1} tasks of {len(ladder.runs)} runs; {at_once} at once.\n"
        "set -euo pipefail\n"
        f"mkdir -p {shlex.quote(str(logs))}\ncd {shlex.quote(str(folder.absolute()))}\n"
        f"prepared=$(sbatch --parsable {PREPARE})\n"
        f'sbatch --dependency="afterok:${{prepared%%;*}}" {ARRAY}\n',
    }
    for file, text in scripts.items():
        write_atomically(folder / file, text)
    (folder / SUBMIT).chmod(0o755)
    return [folder / file for file in scripts]
