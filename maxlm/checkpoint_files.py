"""The files of a checkpoint: their manifest, their checksums, and the errors of the disk that they lie on."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from maxlm.errors import CheckpointError, MaxlmError, StorageError
from maxlm.files import write_synced

MANIFEST = "manifest.json"
FORMAT = 1
_BLOCK_BYTES = 1 << 22
_READERS = 4  # files that a process reads at once; zlib.crc32 releases the interpreter lock

_REMEDIES = {
    errno.ENOSPC: "make room on that disk, or keep fewer checkpoints (checkpoint.keep_last)",
    errno.EDQUOT: "make room within the quota, or keep fewer checkpoints (checkpoint.keep_last)",
    errno.EROFS: "the file system is read-only: choose another run_dir",
    errno.EACCES: "change its permissions, or choose another run_dir",
    errno.EPERM: "change its permissions, or choose another run_dir",
    errno.ENOTDIR: "a part of that path is a file: choose another run_dir",
    errno.EEXIST: "a file is in the way: move it, or choose another run_dir",
    errno.EIO: "the disk reports an error: look at the system's log, or choose another run_dir",
}


class DamagedError(Exception):
    """A file of a checkpoint that is missing, or not as it was written; the message names it and says how."""


def remove(folder: Path) -> None:
    """Removes a folder that nobody trusts; what cannot be removed is left for the next try."""
    shutil.rmtree(folder, ignore_errors=True)


def describe_array(x: Any) -> dict[str, Any]:
    """Shape and dtype of an array or of a `jax.ShapeDtypeStruct`, as JSON."""
    return {"shape": list(x.shape), "dtype": str(x.dtype)}


def storage_error(path: Path, error: BaseException) -> MaxlmError:
    """`error` of a write to `path` as one of ours: StorageError where the disk refused, else CheckpointError."""
    if isinstance(error, MaxlmError):
        return error
    number, text = _errno(error), (str(error).strip() or type(error).__name__).splitlines()[0]
    if number is not None:
        remedy = _REMEDIES.get(number, "see that the folder can be written")
        return StorageError(
            f"{path}: {os.strerror(number).lower()}; {remedy}. The checkpoints saved before are untouched"
        )
    return CheckpointError(f"{path}: the checkpoint could not be written: {text}")


def _errno(error: BaseException) -> int | None:
    """The system's error number, also where TensorStore tells it in words only."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.errno in _REMEDIES:
            return link.errno
        for number in _REMEDIES:
            if os.strerror(number) in str(link):
                return number
        link = link.__cause__ or link.__context__
    return None


def sum_files(checkpoint: Path, me: int, processes: int) -> dict[str, dict[str, Any]]:
    """Size and CRC-32 of this process's share of the files under `checkpoint`, by relative name.

    What Orbax wrote as process i is summed by process i, whose machine has it in memory still; the rest goes round.
    """
    names = sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())
    names = [name for name in names if not re.fullmatch(r"sums\.\d+", name)]
    mine = [name for index, name in enumerate(names) if _writer(name, index) % processes == me]
    with ThreadPoolExecutor(_READERS) as pool:
        return dict(zip(mine, pool.map(lambda name: _sum(checkpoint / name), mine), strict=True))


def _writer(name: str, index: int) -> int:
    match = re.search(r"/ocdbt\.process_(\d+)/", name)
    return int(match[1]) if match else index


def _sum(path: Path) -> dict[str, Any]:
    crc = size = 0
    with open(path, "rb", buffering=0) as stream:
        while block := stream.read(_BLOCK_BYTES):
            crc = zlib.crc32(block, crc)
            size += len(block)
    return {"bytes": size, "crc32": f"{crc:08x}"}


def write_manifest(checkpoint: Path, manifest: dict[str, Any]) -> None:
    """Writes manifest.json, with a checksum of its own."""
    body = {"format": FORMAT, **manifest}
    write_synced(checkpoint / MANIFEST, json.dumps({"crc32": _crc(body), **body}, indent=1) + "\n")


def _crc(body: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(body, sort_keys=True).encode()):08x}"


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; raises DamagedError, and CheckpointError for one of a later maxlm."""
    content = _content(checkpoint, MANIFEST)
    try:
        body = json.loads(content)
        crc = body.pop("crc32")
    except (ValueError, AttributeError, LookupError) as error:
        raise DamagedError(f"{MANIFEST} cannot be parsed") from error
    if crc != _crc(body):
        raise DamagedError(f"{MANIFEST} has changed since it was written")
    if body["format"] != FORMAT:
        raise CheckpointError(f"{checkpoint} is of format {body['format']} and this maxlm reads {FORMAT}; update maxlm")
    if str(body["step"]) != checkpoint.name:
        raise DamagedError(f"it is the checkpoint of step {body['step']}, under another name")
    return body


def read_verified(checkpoint: Path, name: str) -> bytes:
    """A small file of a checkpoint as it was written; raises DamagedError."""
    entry, content = read_manifest(checkpoint)["files"].get(name), _content(checkpoint, name)
    if entry != {"bytes": len(content), "crc32": f"{zlib.crc32(content):08x}"}:
        raise DamagedError(f"{name} has changed since it was written")
    return content


def _content(checkpoint: Path, name: str) -> bytes:
    try:
        return (checkpoint / name).read_bytes()
    except FileNotFoundError as error:
        raise DamagedError(f"{name} is missing") from error
    except OSError as error:
        raise DamagedError(f"{name} cannot be read: {os.strerror(error.errno or 0)}") from error


def verify_files(checkpoint: Path, me: int, processes: int) -> str | None:
    """What is wrong with this process's share of the files of `checkpoint`, or None."""
    try:
        files = read_manifest(checkpoint)["files"]
    except DamagedError as error:
        return str(error)
    mine = [name for index, name in enumerate(sorted(files)) if index % processes == me]
    with ThreadPoolExecutor(_READERS) as pool:
        problems = pool.map(lambda name: _problem(checkpoint, name, files[name]), mine)
        return next((problem for problem in problems if problem), None)


def _problem(checkpoint: Path, name: str, entry: dict[str, Any]) -> str | None:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        return f"{MANIFEST} names {name!r}, which is outside the checkpoint"
    try:
        size = (checkpoint / name).stat().st_size
        if size != entry["bytes"]:
            return f"{name} has {size:,} bytes and was written with {entry['bytes']:,}"
        found = _sum(checkpoint / name)
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None if found == entry else f"{name} has changed since it was written (CRC-32)"
