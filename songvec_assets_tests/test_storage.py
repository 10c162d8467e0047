"""Objects under keys: whole or not there, and of two writers of one version one succeeds."""

import threading

import pytest

from songvec_assets.errors import StoreError
from songvec_assets.storage import Storage


@pytest.fixture
def storage(tmp_path):
    return Storage(tmp_path / "store")


def test_what_was_put_is_read_and_listed_by_its_key(storage):
    assert storage.read("a/b/one") is None
    assert storage.list_objects("a/b") == {}
    storage.put("a/b/one", b"1")
    storage.put("a/b/two", b"22")
    assert storage.read("a/b/one").content == b"1"
    assert storage.open("a/b/two").to_pybytes() == b"22"
    assert storage.list_objects("a/b") == {"one": 1, "two": 2}
    assert storage.list_prefixes() == ["a"]
    assert storage.within("a").list_prefixes() == ["b"]
    storage.delete("a/b/one")
    storage.delete("a/b/one")
    assert storage.list_objects("a/b") == {"two": 2}
    storage.delete_all("a/b")
    assert storage.list_prefixes("a") == []


def test_an_object_is_there_when_its_block_has_ended_well(storage):
    with storage.write("a/one") as file:
        file.write(b"first ")
        file.flush()
        assert storage.list_objects("a") == {}
        file.write(b"second")
    assert storage.read("a/one").content == b"first second"
    with pytest.raises(ValueError, match="halfway"), storage.write("a/one") as file:
        file.write(b"third")
        raise ValueError("halfway")
    assert storage.read("a/one").content == b"first second"


def test_an_object_is_replaced_only_as_it_was_read(storage):
    first = storage.put_if_unchanged("a/one", b"1", None)
    assert first == storage.read("a/one").version
    second = storage.put_if_unchanged("a/one", b"2", first)
    for version in (None, first):
        with pytest.raises(StoreError, match=r"one was changed by another process .*Start the same command again"):
            storage.put_if_unchanged("a/one", b"3", version)
    assert storage.read("a/one") == (b"2", second)


def test_of_many_writers_at_once_one_succeeds(storage):
    version, outcomes, begin = storage.put("a/one", b"0"), [], threading.Barrier(8)

    def write(number):
        begin.wait()
        try:
            outcomes.append(storage.put_if_unchanged("a/one", str(number).encode(), version))
        except StoreError:
            outcomes.append(None)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(1, 9)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len([each for each in outcomes if each]) == 1
    assert storage.read("a/one").version in outcomes
