"""The processes of a run meet over a plain socket, before `jax.distributed` starts.

`jax.distributed` ends the whole process, with a stack trace, when a peer does not come; here whoever is missing or
miscounted is named. Each of the others connects to process 0 and says who it is; when all have come, process 0 answers
every one with {"go": true} and leaves the port to `jax.distributed`.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from dataclasses import dataclass
from typing import Any

from maxlm.errors import ClusterError

_HELLO_SECONDS = 5.0
_RETRY_SECONDS = 0.1


@dataclass(frozen=True)
class Cluster:
    """Where process 0 listens, how many processes there are, and which one this is."""

    host: str
    port: int
    num_processes: int
    process_id: int

    @property
    def address(self) -> str:
        """HOST:PORT, with an IPv6 host in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"process {self.process_id} of {self.num_processes} at {self.address}"


def meet(cluster: Cluster, timeout_seconds: float) -> None:
    """Returns when all processes of `cluster` have come to its address; else ClusterError names who has not."""
    try:
        socket.getaddrinfo(cluster.host, cluster.port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise ClusterError(
            f"distributed.coordinator: process {cluster.process_id} cannot find the host {cluster.host!r} "
            f"({error.strerror}); give the address at which the others reach process 0"
        ) from error
    if cluster.process_id == 0:
        _wait_for_peers(cluster, timeout_seconds)
    else:
        _report_to_coordinator(cluster, timeout_seconds)


def _wait_for_peers(cluster: Cluster, timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    peers: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        try:
            listener = stack.enter_context(_listen(cluster.port))
        except OSError as error:
            raise ClusterError(
                f"distributed.coordinator: process 0 cannot listen on port {cluster.port} ({error.strerror}); "
                "another run may be using it: choose another port, the same in every process"
            ) from error
        while len(peers) < cluster.num_processes - 1:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                _refuse(peers, _absence(cluster, peers, timeout_seconds))
            listener.settimeout(remaining)
            try:
                connection, where = listener.accept()
            except TimeoutError:
                continue
            stack.enter_context(connection)
            hello = _receive(connection, _HELLO_SECONDS)
            if not isinstance(hello.get("process_id"), int):
                continue  # not one of ours: a port scan or a health check
            problem = _misfit(cluster, hello, peers, where[0])
            peers.setdefault(hello["process_id"], connection)
            if problem:
                _send(connection, {"error": problem})
                _refuse(peers, problem)
        for connection in peers.values():
            _send(connection, {"go": True})


def _listen(port: int) -> socket.socket:
    try:
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    except (OSError, ValueError):  # no IPv6 on this machine, or the port is taken: IPv4 tells which
        return socket.create_server(("", port))


def _absence(cluster: Cluster, peers: dict[int, socket.socket], timeout_seconds: float) -> str:
    missing = [str(i) for i in range(1, cluster.num_processes) if i not in peers]
    return (
        f"process{'es' if len(missing) > 1 else ''} {', '.join(missing)} of {cluster.num_processes} did not come to "
        f"the coordinator {cluster.address} within {timeout_seconds:g} s; see that every process was started with this "
        "distributed.coordinator and its own distributed.process_id, and that the port is open"
    )


def _misfit(cluster: Cluster, hello: dict[str, Any], peers: dict[int, socket.socket], where: str) -> str | None:
    process_id, num_processes = hello["process_id"], hello.get("num_processes")
    if num_processes != cluster.num_processes:
        return (
            f"distributed.num_processes is {cluster.num_processes} in process 0 and {num_processes} in process "
            f"{process_id} (at {where}); start all with the same"
        )
    if process_id in peers or process_id == 0:
        return f"two processes have distributed.process_id = {process_id} (one at {where}); each needs its own"
    return None


def _refuse(peers: dict[int, socket.socket], problem: str) -> None:
    for connection in peers.values():
        _send(connection, {"error": problem})
    raise ClusterError(f"distributed: {problem}")


def _report_to_coordinator(cluster: Cluster, timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    reason = "no answer"
    while (remaining := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection((cluster.host, cluster.port), timeout=remaining)
        except OSError as error:
            reason = error.strerror or "no answer"
            time.sleep(min(_RETRY_SECONDS, max(0.0, remaining)))
            continue
        with connection:
            _send(connection, {"process_id": cluster.process_id, "num_processes": cluster.num_processes})
            # Process 0 started its clock at another time, so its answer may come later than our own deadline.
            answer = _receive(connection, timeout_seconds + _HELLO_SECONDS)
        if answer.get("go") is True:
            return
        if "error" in answer:
            raise ClusterError(f"distributed: {answer['error']}")
        reason = "something answers there that is not process 0 of this run, or it ended"
        time.sleep(_RETRY_SECONDS)
    raise ClusterError(
        f"distributed: process {cluster.process_id} of {cluster.num_processes} could not reach the coordinator "
        f"{cluster.address} within {timeout_seconds:g} s ({reason}); see that process 0 runs there, and that "
        "distributed.coordinator names its address"
    )


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # a peer that is gone is noticed by its absence
        connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket, timeout_seconds: float) -> dict[str, Any]:
    connection.settimeout(timeout_seconds)
    try:
        with connection.makefile("rb") as stream:
            message = json.loads(stream.readline(4096))
    except (OSError, ValueError):
        return {}
    return message if isinstance(message, dict) else {}
