"""One run to a folder, however the run before it ended."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys

import pytest

from maxlm.errors import StorageError
from maxlm.run_lock import RunLock

HOLDS_THE_LOCK = """
import os, sys, time
from maxlm.run_lock import RunLock
with RunLock(sys.argv[1]):
    if len(sys.argv) > 2 and os.fork() == 0:
        time.sleep(1.0)  # a child that outlives its killed parent for a while, with the lock
        os._exit(0)
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.mark.processes
@pytest.mark.parametrize("child", [[], ["with-child"]])
def test_a_folder_has_one_run_and_is_free_again_after_kill_9(tmp_path, caplog, child):
    with subprocess.Popen([sys.executable, "-c", HOLDS_THE_LOCK, tmp_path, *child], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(StorageError, match=f"another run writes here .process {process.pid} on"), RunLock(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        with caplog.at_level(logging.WARNING), RunLock(tmp_path):
            assert f"taking over from a run that was cut off (process {process.pid} on" in caplog.text
    caplog.clear()
    with RunLock(tmp_path):
        assert not caplog.records, "a run that ended by itself leaves nothing to take over"


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="the run's folder cannot be written"), RunLock(tmp_path / "file" / "run"):
        pass
