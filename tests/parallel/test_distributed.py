"""Processes that find each other, agree, and stop together; with real processes over loopback."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time

import jax
import pytest

from maxlm.errors import ClusterError
from maxlm.parallel import distributed
from maxlm.parallel.distributed import DistributedConfig, Signals, resolve_cluster
from maxlm.parallel.rendezvous import Cluster, meet
from tests.processes import free_port, report, run_processes

START = """
import json
from maxlm.parallel import distributed
distributed.initialize(distributed.DistributedConfig(timeout_seconds=60))
import jax, jax.numpy as jnp, numpy as np
from maxlm.parallel.mesh import MeshConfig, make_mesh
me, n = jax.process_index(), jax.process_count()
"""

COLLECTIVES = """
mesh = make_mesh(MeshConfig(data=n, fsdp=2))
rows = np.arange(4 * n, dtype=np.float32)
sharding = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
x = jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])
with jax.set_mesh(mesh):
    total = jax.jit(jax.shard_map(lambda a: jax.lax.psum(a.sum(), ("data", "fsdp")), out_specs=jax.P()))(x)
    gathered = distributed.gather_json({"process": me, "text": "ü" * me})
    told = distributed.broadcast_json({"from": me})
    distributed.barrier("all here")
print("RESULT", json.dumps([len(jax.devices()), float(total), gathered, told, distributed.is_main()]))
"""

STOPS_TOGETHER = """
import os, signal
mesh = make_mesh(MeshConfig(fsdp=-1))
x = jax.device_put(np.ones(8 * n, np.float32), jax.NamedSharding(mesh, jax.P("fsdp")))
with jax.set_mesh(mesh), distributed.Signals() as signals:
    step_of = jax.jit(lambda x: x * (1 + 0 * jnp.sum(x)))
    for step in range(1, 101):
        x = step_of(x)
        if me == 1 and step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        if distributed.agree(signals.stop_requested):
            break
print("RESULT", step, signals.received)
"""

FAILS_IN_ONE = """
from maxlm.errors import StorageError
distributed.barrier("start")
if me == 1:
    raise StorageError("the disk of process 1 is full")
distributed.barrier("never reached by process 1")
"""

FAILS_IN_ONE_COMMAND = """
import sys
from maxlm import cli
distributed.barrier("start")
if me == 1:
    sys.exit(cli.main(["config", "no-such-config.yaml"]))
distributed.barrier("never reached by process 1")
"""


def results(outputs: list) -> list[str]:
    """What each process printed after RESULT."""
    return [re.findall(r"^RESULT (.*)$", output.stdout, re.M)[0] for output in outputs]


@pytest.mark.processes
@pytest.mark.parametrize("n", [2, 4])
def test_processes_share_devices_sums_and_values(n):
    outputs = run_processes(n, ["-c", START + COLLECTIVES], devices_per_process=2)
    gathered = [{"process": i, "text": "ü" * i} for i in range(n)]
    for i, result in enumerate(results(outputs)):
        assert json.loads(result) == [2 * n, sum(range(4 * n)), gathered, {"from": 0}, i == 0]


@pytest.mark.processes
def test_a_signal_to_one_process_stops_all_after_the_same_step():
    outputs = run_processes(2, ["-c", START + STOPS_TOGETHER], devices_per_process=2)
    assert results(outputs) == ["8 None", "8 SIGTERM"]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("code", "exit_code", "message"),
    [
        (FAILS_IN_ONE, 5, "the disk of process 1 is full"),
        (FAILS_IN_ONE_COMMAND, 2, "error: .*no-such-config.yaml"),
    ],
    ids=["uncaught", "command"],
)
def test_an_error_in_one_process_ends_all_soon(code, exit_code, message):
    started = time.monotonic()
    first, second = run_processes(2, ["-c", START + code], check=False)
    assert second.returncode == exit_code, report(second)
    assert re.search(message, second.stderr)
    assert first.returncode == 1, report(first)
    assert time.monotonic() - started < 30


@pytest.mark.processes
def test_a_process_that_does_not_come_is_named_by_all_the_others():
    # Of three processes the third is not started.
    outputs = run_processes(
        2,
        ["-c", START.replace("timeout_seconds=60", "timeout_seconds=2")],
        env={"MAXLM_NUM_PROCESSES": "3"},
        check=False,
    )
    for output in outputs:
        assert output.returncode == 1, report(output)
        assert re.search(
            r"ClusterError: .*process 2 of 3 did not come to the coordinator 127\.0\.0\.1:\d+", output.stderr
        )


def in_threads(clusters: list[Cluster], timeout: float) -> list[str]:
    """The outcome of `meet` in each of `clusters` at once."""
    outcomes = [""] * len(clusters)

    def join(i: int) -> None:
        try:
            meet(clusters[i], timeout)
            outcomes[i] = "met"
        except ClusterError as error:
            outcomes[i] = str(error)

    threads = [threading.Thread(target=join, args=(i,)) for i in range(len(clusters))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_processes_meet_whatever_else_knocks_at_the_port():
    port = free_port()

    def knock() -> None:
        for _ in range(20):
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=1) as stray:
                    stray.sendall(b"GET / HTTP/1.0\r\n\r\n")
                    return
            except OSError:
                time.sleep(0.02)

    threading.Thread(target=knock).start()
    assert in_threads([Cluster("127.0.0.1", port, 3, i) for i in range(3)], 10) == ["met"] * 3


def test_two_processes_of_one_number_are_refused():
    port = free_port()
    outcomes = in_threads([Cluster("127.0.0.1", port, 3, i) for i in (0, 1, 1)], 3)
    assert all("two processes have distributed.process_id = 1" in outcome for outcome in outcomes), outcomes


def test_processes_that_count_differently_are_refused():
    port = free_port()
    outcomes = in_threads([Cluster("127.0.0.1", port, 2, 0), Cluster("127.0.0.1", port, 4, 1)], 3)
    assert all("num_processes is 2 in process 0 and 4 in process 1" in outcome for outcome in outcomes), outcomes


def test_a_coordinator_that_is_not_there_is_named():
    (outcome,) = in_threads([Cluster("127.0.0.1", free_port(), 2, 1)], 0.5)
    assert re.search(r"process 1 of 2 could not reach the coordinator 127.0.0.1:\d+ within 0.5 s", outcome)


def test_a_port_in_use_is_named():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        (outcome,) = in_threads([Cluster("127.0.0.1", port, 2, 0)], 0.5)
    assert f"process 0 cannot listen on port {port}" in outcome


def test_an_unknown_host_is_named():
    (outcome,) = in_threads([Cluster("no-such-host.invalid", 1234, 2, 1)], 0.5)
    assert "cannot find the host 'no-such-host.invalid'" in outcome


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"coordinator": "10.0.0.1", "num_processes": 2, "process_id": 0},
            "coordinator is '10.0.0.1'; it must be HOST:PORT",
        ),
        ({"coordinator": "h:70000", "num_processes": 2, "process_id": 0}, "a port from 1 to 65535"),
        ({"coordinator": "a b:1", "num_processes": 2, "process_id": 0}, "must be HOST:PORT"),
        ({"coordinator": "h:1", "num_processes": 2, "process_id": 2}, "process_id is 2 and .*num_processes is 2"),
        ({"coordinator": "h:1", "num_processes": 2}, "without distributed.process_id \\(\\$MAXLM_PROCESS_ID\\)"),
        ({"num_processes": 2, "process_id": 1}, "without distributed.coordinator"),
        ({"coordinator": "h:1"}, "num_processes .* and distributed.process_id"),
    ],
)
def test_wrong_keys_are_named(keys, message):
    with pytest.raises(ClusterError, match=message):
        resolve_cluster(DistributedConfig(**keys))


def test_the_environment_fills_in_what_the_config_leaves_open(monkeypatch):
    monkeypatch.setenv("MAXLM_COORDINATOR", "[::1]:1234")
    monkeypatch.setenv("MAXLM_NUM_PROCESSES", "4")
    monkeypatch.setenv("MAXLM_PROCESS_ID", "1")
    assert resolve_cluster(DistributedConfig(process_id=3)) == Cluster("::1", 1234, 4, 3)
    monkeypatch.setenv("MAXLM_PROCESS_ID", "one")
    with pytest.raises(ClusterError, match=r"\$MAXLM_PROCESS_ID is 'one'"):
        resolve_cluster(DistributedConfig())


def test_alone_there_is_nothing_to_join():
    distributed.initialize(DistributedConfig())
    distributed.initialize(DistributedConfig(num_processes=1))
    assert not jax.distributed.is_initialized()
    assert distributed.is_main()
    assert distributed.agree(True)
    assert not distributed.agree(False)
    assert distributed.gather_json({"a": 1}) == [{"a": 1}]
    assert distributed.broadcast_json([1]) == [1]
    distributed.barrier("alone")


@pytest.mark.processes
def test_no_cluster_to_detect_is_a_cluster_error():
    start = START.replace("timeout_seconds=60", 'coordinator="auto", timeout_seconds=1')
    (output,) = run_processes(1, ["-c", start], check=False)
    assert "ClusterError: distributed.coordinator is auto, and neither Slurm" in output.stderr, report(output)


def test_the_first_signal_asks_to_stop_and_the_second_interrupt_interrupts():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Signals() as signals:
        assert not signals.stop_requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.stop_requested
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
