"""One run to a folder: a lock that the system takes back when the process ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

from maxlm.errors import StorageError
from maxlm.parallel.distributed import is_main

log = logging.getLogger("maxlm")

NAME = "run.lock"
_ORPHANS_SECONDS = 10.0
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class RunLock:
    """While it is open, no other run can open the lock of `run_dir`, which it makes. Process 0 alone takes it.

    Raises StorageError where another run holds it, naming the process, and where the folder cannot be written.
    """

    def __init__(self, run_dir: Path | str):
        self.path = Path(os.path.abspath(run_dir)) / NAME
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        if not is_main():
            return self
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise StorageError(
                f"{self.path.parent}: the run's folder cannot be written ({error.strerror}); choose another run_dir"
            ) from error
        try:
            self._take(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None

    def _take(self, descriptor: int) -> None:
        deadline = time.monotonic() + _ORPHANS_SECONDS
        while not self._try(descriptor):
            holder = _holder(descriptor)
            # The children of a run that was killed hold its lock until they notice.
            if _is_dead(holder) and time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            raise StorageError(
                f"{self.path.parent}: another run writes here ({_describe(holder)}); stop it, or choose another run_dir"
            )
        if before := _holder(descriptor):
            log.warning("%s: taking over from a run that was cut off (%s)", self.path.parent, _describe(before))
        mine = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, (json.dumps(mine) + "\n").encode(), 0)
        except OSError as error:
            raise StorageError(f"{self.path}: {error.strerror}; make room, or choose another run_dir") from error

    def _try(self, descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise StorageError(
                    f"{self.path}: cannot be locked ({error.strerror}); choose another run_dir"
                ) from error
            log.warning("%s: this file system has no locks; see that no other run writes here", self.path.parent)
        return True


def _holder(descriptor: int) -> dict[str, Any]:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _describe(holder: dict[str, Any]) -> str:
    if not holder:
        return "of which nothing is known"
    return f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether the process is known to have ended; of one on another machine nothing is known."""
    if holder.get("host") != socket.gethostname() or not isinstance(holder.get("pid"), int):
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
