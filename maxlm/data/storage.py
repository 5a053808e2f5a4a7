"""Where stores lie: a path or URL becomes a TensorStore key-value store, and its errors become ours."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from maxlm.errors import ConfigError, DataError, StorageError

if TYPE_CHECKING:
    import tensorstore as ts

_SCHEMES = "a path, file://, gs://, s3:// or memory://"


def kvstore_spec(url: str) -> dict[str, str]:
    """The TensorStore kvstore spec of a store's path or URL. Raises ConfigError for a URL of another kind."""
    match = re.match(r"([a-z][a-z0-9+.-]*)://(.*)", url, re.DOTALL)
    scheme, rest = match.groups() if match else ("", url)
    rest = rest.rstrip("/")
    if scheme in ("", "file"):
        if scheme and not rest.startswith("/"):
            raise ConfigError(f"{url}: a file:// URL needs an absolute path, as in file:///data/store.")
        if not rest:
            raise ConfigError(f"{url!r}: no path. Name a folder for the store.")
        return {"driver": "file", "path": os.path.abspath(os.path.expanduser(rest)) + "/"}
    if scheme == "memory":
        return {"driver": "memory", "path": f"{rest}/"}
    if scheme in ("gs", "s3"):
        bucket, _, path = rest.partition("/")
        if not bucket or not path:
            raise ConfigError(f"{url}: needs a bucket and a folder in it, as in {scheme}://bucket/folder.")
        return {"driver": "gcs" if scheme == "gs" else "s3", "bucket": bucket, "path": f"{path}/"}
    raise ConfigError(f"{url}: stores cannot lie at {scheme}:// URLs. Give {_SCHEMES}.")


@functools.cache
def shared_context() -> ts.Context:
    """One context for every store, so that memory:// stores are seen by all who open them."""
    import tensorstore as ts

    return ts.Context({})


def storage_error(error: Exception, where: str) -> StorageError | DataError:
    """Our error for one of TensorStore's (ValueError with a status code in front) or the system's."""
    message = str(error).splitlines()[0] if str(error) else type(error).__name__
    message = re.sub(r" \[(tensorstore_spec|source locations)=.*", "", message).replace("\0", "/")
    if re.search(r"No space left|quota exceeded|File too large", message, re.IGNORECASE):
        return StorageError(f"{where}: the disk is full ({_last(message)}). Free some space, then run it again.")
    if re.search(r"PERMISSION_DENIED|Permission denied|Read-only file system|not permitted|UNAUTHENTICATED", message):
        return StorageError(
            f"{where}: may not be written or read ({_last(message)}). Check its rights, or name another."
        )
    if re.search(r"DATA_LOSS|CRC-32C|checksum|Invalid data|corrupt|decod", message, re.IGNORECASE):
        return DataError(
            f"{where}: damaged ({message[:300]}). Remove the store and make it again with `maxlm data prepare`."
        )
    return StorageError(f"{where}: storage failed: {message[:300]}.")


def _last(message: str) -> str:
    """The system's own words, at the end of TensorStore's chain of contexts."""
    return re.sub(r" \[.*", "", message.rsplit(": ", 1)[-1])


@contextlib.contextmanager
def storage_errors(where: str) -> Iterator[None]:
    """Turns TensorStore's and the system's errors inside into StorageError or DataError that name `where`."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, NotImplementedError) as error:
        raise storage_error(error, where) from error


class Storage:
    """Files by name under a path or URL. Writes are atomic and, on local disks, synced. Errors name the file."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.spec = kvstore_spec(url)
        self._store: Any = None

    def where(self, name: str = "") -> str:
        """The file's name for people."""
        return f"{self.url}/{name}" if name else self.url

    @property
    def kvstore(self) -> Any:
        """The TensorStore key-value store."""
        if self._store is None:
            import tensorstore as ts

            with storage_errors(self.where()):
                self._store = ts.KvStore.open(self.spec, context=shared_context()).result()
        return self._store

    def read(self, name: str) -> bytes | None:
        """The file's content, None where there is no such file."""
        with storage_errors(self.where(name)):
            result = self.kvstore.read(name).result()
        return result.value if result.state == "value" else None

    def write(self, name: str, content: bytes) -> None:
        """Writes the file whole or not at all."""
        with storage_errors(self.where(name)):
            self.kvstore.write(name, content).result()

    def list(self, folder: str) -> list[str]:
        """The names of the files under `folder`."""
        import tensorstore as ts

        with storage_errors(self.where(folder)):
            return [key.decode() for key in self.kvstore.list(ts.KvStore.KeyRange(f"{folder}/", f"{folder}0")).result()]

    def delete(self, folder: str) -> None:
        """Removes all files under `folder`."""
        import tensorstore as ts

        with storage_errors(self.where(folder)):
            self.kvstore.delete_range(ts.KvStore.KeyRange(f"{folder}/", f"{folder}0")).result()
            if self.spec["driver"] == "file":  # the empty folders stay otherwise
                shutil.rmtree(os.path.join(self.spec["path"], folder), ignore_errors=True)
