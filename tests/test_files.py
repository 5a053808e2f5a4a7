"""Files are written whole or not at all."""

import pytest

from maxlm.errors import StorageError
from maxlm.files import write_atomically


def test_written_file_is_whole_or_not_there(tmp_path):
    write_atomically(tmp_path / "a" / "b", b"old")
    (tmp_path / "a" / "c").mkdir()
    with pytest.raises(StorageError, match="a/c"):
        write_atomically(tmp_path / "a" / "c", b"a folder is in the way")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["b", "c"]
