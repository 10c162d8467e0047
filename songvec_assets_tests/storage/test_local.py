"""Files of a folder: synced, renamed, and nothing left over; see `test_contract` for what all kinds have in common."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from songvec_assets.errors import StoreError, UnwritableError
from songvec_assets.storage import local
from songvec_assets.storage.local import LocalStorage


@pytest.fixture
def storage(tmp_path):
    return LocalStorage(tmp_path / "store")


@pytest.mark.parametrize(
    "write", [lambda it: it.put("file/one", b"1"), lambda it: it.put_if_unchanged("file/one", b"1", None)]
)
def test_a_write_that_the_disk_refuses_names_the_object(storage, write):
    storage.put("file", b"in the way")
    with pytest.raises(StoreError, match=r"could not write .*file.*make room, or give access"):
        write(storage)


def test_room_is_what_the_disk_has_free_before_the_folder_exists_too(storage, monkeypatch):
    free = shutil.disk_usage(storage.root.parent).free
    within = storage.within("deep").within("deeper")
    within.check_room(free // 2)
    with pytest.raises(UnwritableError, match=r"has [\d,.]+ MB free, expected [\d,.]+ MB .* make room"):
        within.check_room(free * 2)


@pytest.fixture
def path(storage):
    return storage.root / "a" / "one"


def names(folder):
    return sorted(each.name for each in folder.iterdir())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [None, b"old"])
def test_an_error_within_the_block_changes_nothing_and_leaves_nothing_behind(storage, path, before, error):
    if before is not None:
        storage.put("a/one", before)
    with pytest.raises(error), storage.write("a/one") as file:
        file.write(b"half of the n")
        file.flush()
        raise error
    assert (path.read_bytes() if path.exists() else None) == before
    assert names(path.parent) == ([path.name] if before else [])


def test_a_file_is_written_in_the_folder_it_belongs_to(storage, path):
    """A rename is atomic within one file system only."""
    with storage.write("a/one") as file:
        assert Path(file.name).parent == path.parent
        assert Path(file.name).name.startswith(".")
        assert not file.name.endswith(path.suffix or path.name)


def test_a_killed_writer_leaves_the_former_object_and_the_next_one_succeeds(storage, path, monkeypatch):
    storage.put("a/one", b"old")
    program = (
        "import os, signal, sys; from pathlib import Path; from songvec_assets.storage.local import LocalStorage\n"
        "with LocalStorage(Path(sys.argv[1])).write('a/one') as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(storage.root)], check=False)
    assert killed.returncode == -9
    assert path.read_bytes() == b"old"
    assert len(names(path.parent)) == 2, "what it left behind"
    storage.put("a/one", b"new")
    assert path.read_bytes() == b"new"
    storage.delete_leftovers("a")
    assert len(names(path.parent)) == 2, "another writer may be at it"
    monkeypatch.setattr(local, "LEFTOVER_S", -1.0)
    storage.delete_leftovers("a")
    assert names(path.parent) == ["one"]


def test_content_is_synced_before_the_rename_and_the_folder_after_it(storage, path, monkeypatch):
    """Looks at fsync itself: no test can cut the power."""
    storage.put("a/one", b"old")
    synced = []
    real = os.fsync

    def fsync(descriptor):
        real(descriptor)
        state = os.fstat(descriptor)
        synced.append((state.st_ino, state.st_size, path.read_bytes()))

    monkeypatch.setattr(os, "fsync", fsync)
    storage.put("a/one", b"new content")
    (new, size, seen_before), (folder, _, seen_after) = synced
    assert (new, size, seen_before) == (path.stat().st_ino, 11, b"old")
    assert (folder, seen_after) == (path.parent.stat().st_ino, b"new content")
