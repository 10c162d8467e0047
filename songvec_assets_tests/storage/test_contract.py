"""What all kinds of storage have in common: objects under keys, whole or not there, and one winner of two writers."""

import threading

import pytest

from songvec_assets.errors import SettingsError
from songvec_assets.storage import check_location, objects, open_storage
from songvec_assets.storage.local import LocalStorage
from songvec_assets.storage.objects import ObjectStorage

SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("weed", "google", "azure")]


@pytest.fixture(params=["local", "moto", *SLOW])
def storage(request, tmp_path):
    """A storage of each kind, with nothing in it."""
    if request.param == "local":
        return open_storage(str(tmp_path / "store"))
    return open_storage(request.getfixturevalue("new_url")(request.param))


def test_what_was_put_is_read_and_listed_by_its_key(storage):
    assert storage.read("a/b/one") is None
    assert storage.scan("a/b").objects == {}
    storage.put("a/b/one", b"1")
    storage.put("a/b/two", b"22")
    assert storage.read("a/b/one").content == b"1"
    assert storage.open("a/b/two").mapped.to_pybytes() == b"22"
    assert storage.scan("a/b").objects == {"one": 1, "two": 2}
    assert storage.scan().prefixes == ["a"]
    assert storage.within("a").scan().prefixes == ["b"]
    storage.delete("a/b/one")
    storage.delete("a/b/one")
    assert storage.scan("a/b").objects == {"two": 2}
    storage.delete_all("a/b")
    assert storage.scan("a").prefixes == []


def test_an_object_is_there_when_its_block_has_ended_well(storage):
    with storage.write("a/one") as file:
        file.write(b"first ")
        file.flush()
        assert storage.scan("a").objects == {}
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
    assert [storage.put_if_unchanged("a/one", b"3", version) for version in (None, first)] == [None, None]
    assert storage.read("a/one") == (b"2", second)


def test_of_many_writers_at_once_one_succeeds(storage):
    version, outcomes, begin = storage.put("a/one", b"0"), [], threading.Barrier(8)

    def write(number):
        begin.wait()
        outcomes.append(storage.put_if_unchanged("a/one", str(number).encode(), version))

    writers = [threading.Thread(target=write, args=(number,)) for number in range(1, 9)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len([each for each in outcomes if each]) == 1
    assert storage.read("a/one").version in outcomes


def test_bytes_are_read_where_they_are_asked_for(storage):
    content = bytes(range(256)) * 2048
    storage.put("a/large", content)
    opened = storage.open("a/large")
    spans = [(0, 10), (200_000, 200_003), (250_000, 251_000), (len(content) - 5, len(content))]
    assert opened.size == len(content)
    assert [each.to_pybytes() for each in opened.read(spans)] == [content[start:stop] for start, stop in spans]
    file = opened.file()
    file.seek(300_000)
    assert (bytes(file.read(7)), file.tell()) == (content[300_000:300_007], 300_007)
    assert bytes(file.read()) == content[300_007:]
    storage.put("a/empty", b"")
    assert (storage.open("a/empty").size, bytes(storage.open("a/empty").file().read())) == (0, b"")
    with pytest.raises(FileNotFoundError):
        storage.open("a/missing")


def test_an_object_of_any_size_appears_as_a_whole(storage, monkeypatch):
    monkeypatch.setattr(objects, "SINGLE_BYTES", 1 << 20)
    content = bytes(range(256)) * (20 << 12)
    with storage.write("a/large") as file:
        file.write(content)
        assert storage.scan("a").objects == {}
    opened = storage.open("a/large")
    assert opened.size == len(content)
    [found] = opened.read([(0, len(content))])
    assert found.to_pybytes() == content


def test_all_keys_below_a_prefix_are_listed_with_their_sizes(storage):
    for number, key in enumerate(("one", "a/two", "a/b/three", "ab/four")):
        storage.put(key, bytes(number))
    assert dict(storage.list_keys()) == {"one": 0, "a/two": 1, "a/b/three": 2, "ab/four": 3}
    assert dict(storage.list_keys("a")) == {"a/two": 1, "a/b/three": 2}
    assert "a/two" in storage and "a/b" not in storage and "two" in storage.within("a")
    assert storage.within("a").describe("two") == f"{storage}/a/two"


def test_a_storage_in_which_one_writer_wins_passes_and_is_as_it_was(storage):
    storage.within("a").check_writes()
    assert dict(storage.list_keys()) == {}


def test_a_location_is_a_folder_or_the_url_of_an_object_store():
    assert isinstance(open_storage("some/folder"), LocalStorage)
    assert isinstance(open_storage("s3://bucket/prefix"), ObjectStorage)
    assert open_storage("s3://bucket/prefix/").location == "s3://bucket/prefix"
    for location in ("memory://", "s3:///prefix", "s3://", "http://host/path"):
        with pytest.raises(SettingsError, match=r"expected a folder, s3://bucket/prefix, .* got "):
            open_storage(location)
        with pytest.raises(ValueError, match="a folder"):
            check_location(location)
