"""Files that are whole or not there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from songvec_assets.files import replace_atomically, sync_folder


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store.json"


def names(folder):
    return sorted(each.name for each in folder.iterdir())


def test_a_file_is_there_when_the_block_has_ended(path):
    with replace_atomically(path) as file:
        file.write(b"first ")
        file.write(b"second")
    assert path.read_bytes() == b"first second"
    assert names(path.parent) == [path.name]


def test_until_then_readers_see_the_former_file_or_none(path):
    with replace_atomically(path) as file:
        file.write(b"old")
        file.flush()
        assert not path.exists()
    with replace_atomically(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("before", [None, b"old"])
def test_an_error_within_the_block_changes_nothing_and_leaves_nothing_behind(path, before, error):
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(error), replace_atomically(path) as file:
        file.write(b"half of the n")
        file.flush()
        raise error
    assert (path.read_bytes() if path.exists() else None) == before
    assert names(path.parent) == ([path.name] if before else [])


def test_a_file_is_written_in_the_folder_it_belongs_to(path):
    """A rename is atomic within one file system only."""
    with replace_atomically(path) as file:
        assert Path(file.name).parent == path.parent
        assert Path(file.name).name.startswith(".")
        assert not file.name.endswith(path.suffix)


def test_a_killed_writer_leaves_the_former_file_and_the_next_one_succeeds(path):
    path.write_bytes(b"old")
    program = (
        "import os, signal, sys; from pathlib import Path; from songvec_assets.files import replace_atomically\n"
        "with replace_atomically(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert killed.returncode == -9
    assert path.read_bytes() == b"old"
    assert len(names(path.parent)) == 2, "what it left behind"
    with replace_atomically(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"


def test_content_is_synced_before_the_rename_and_the_folder_after_it(path, monkeypatch):
    """Looks at fsync itself: no test can cut the power."""
    path.write_bytes(b"old")
    synced = []
    real = os.fsync

    def fsync(descriptor):
        real(descriptor)
        state = os.fstat(descriptor)
        synced.append((state.st_ino, state.st_size, path.read_bytes()))

    monkeypatch.setattr(os, "fsync", fsync)
    with replace_atomically(path) as file:
        file.write(b"new content")
    (new, size, seen_before), (folder, _, seen_after) = synced
    assert (new, size, seen_before) == (path.stat().st_ino, 11, b"old")
    assert (folder, seen_after) == (path.parent.stat().st_ino, b"new content")


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), replace_atomically(tmp_path / "none" / "x"):
        pass
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "none")
