"""Runs several real Python processes as one cluster over loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from subprocess import CompletedProcess

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def run_processes(
    n: int,
    arguments: Sequence[str | Path],
    *,
    devices_per_process: int = 1,
    env: Mapping[str, str] | None = None,
    timeout: float = 120.0,
    check: bool = True,
) -> list[CompletedProcess[str]]:
    """`python ARGUMENTS` in `n` processes at once, told of each other by the MAXLM_ variables; the results, by process.

    With n = 1 there is no cluster. `check` fails the test with all the outputs unless every process exits with 0. When
    one fails (or after `timeout` seconds) those that are still running get a few seconds, and are then killed.
    """
    address = f"127.0.0.1:{free_port()}"
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2 * n)]
        processes = []
        for i in range(n):
            cluster = {"MAXLM_COORDINATOR": address, "MAXLM_NUM_PROCESSES": str(n), "MAXLM_PROCESS_ID": str(i)}
            process = subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                cwd=ROOT,
                env=_environment(devices_per_process) | (cluster if n > 1 else {}) | dict(env or {}),
                stdout=files[2 * i],
                stderr=files[2 * i + 1],
            )
            stack.callback(_kill, process)
            processes.append(process)
        _wait(processes, timeout)
        results = []
        for i, process in enumerate(processes):
            out, err = files[2 * i], files[2 * i + 1]
            out.seek(0)
            err.seek(0)
            results.append(CompletedProcess(process.args, process.returncode, out.read(), err.read()))
    if check and any(result.returncode for result in results):
        raise AssertionError("\n".join(f"--- process {i}: {report(result)}" for i, result in enumerate(results)))
    return results


def report(result: CompletedProcess[str]) -> str:
    """What a process left behind, for the message of a failing test."""
    return f"exit code {result.returncode}\nstdout:\n{result.stdout[-4000:]}\nstderr:\n{result.stderr[-6000:]}"


def _environment(devices_per_process: int) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MAXLM_")}
    path = os.pathsep.join(filter(None, [str(ROOT), clean.get("PYTHONPATH")]))
    return clean | {
        "PYTHONPATH": path,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices_per_process}",
    }


def _wait(processes: Sequence[subprocess.Popen[bytes]], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if any(process.returncode for process in processes):
            deadline = min(deadline, time.monotonic() + 15)
        time.sleep(0.02)
    for process in processes:
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
        process.wait()
