"""Writing files so that a crash leaves nothing half-written that is trusted."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from maxlm.errors import StorageError


def write_synced(path: Path | str, content: bytes | str) -> None:
    """Writes a file down to the disk, in a folder that nobody trusts yet. Raises OSError."""
    with open(path, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path | str, content: bytes | str) -> None:
    """Writes a file under a temporary name beside it, syncs, and renames: a reader, or a rerun, sees all of it or none.

    Makes the folder where it is missing. Raises StorageError, which names the file and the reason.
    """
    path = Path(path)
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(descriptor)
        write_synced(temporary, content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {(error.strerror or str(error)).lower()}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
