"""Objects of real S3 servers, through a proxy that spoils what it is told to; see `test_contract` for the rest."""

import numpy as np
import obstore
import pytest

from songvec_assets.cache.parts import CachedRows, PartIdentity, write_part
from songvec_assets.cache.slices import open_stored
from songvec_assets.errors import SettingsError, StorageError
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.storage import objects, open_storage

IDENTITY = PartIdentity("m", 3, SongIdRange(0, 100_000))
IN_VAIN = {"status": 403, "body": "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"}


@pytest.fixture
def storage(bucket):
    return open_storage(bucket)


@pytest.mark.parametrize(
    "fault",
    [
        {"do": "answer", "status": 500},
        {"do": "answer", "status": 503, "body": "<Error><Code>SlowDown</Code></Error>"},
        {"do": "reset"},
        {"do": "slow", "seconds": 0.3},
        {"do": "lose"},
    ],
    ids=lambda fault: f"{fault['do']}-{fault.get('status', '')}",
)
def test_what_fails_for_a_moment_is_tried_again_and_done_once(storage, s3, fault):
    s3.spoil(fault | {"times": 2})
    version = storage.put_if_unchanged("a/one", b"1", None)
    assert version is not None
    s3.spoil(fault | {"times": 2})
    newer = storage.put_if_unchanged("a/one", b"2", version)
    assert newer is not None
    s3.spoil(fault | {"times": 2})
    assert storage.read("a/one") == (b"2", newer)
    s3.spoil(fault | {"times": 2})
    storage.put("a/two", b"3")
    s3.spoil(fault | {"times": 2})
    assert storage.scan("a").objects == {"one": 1, "two": 1}
    s3.spoil(fault | {"times": 2})
    storage.delete("a/two")
    assert storage.scan("a").objects == {"one": 1}


def test_an_answer_that_breaks_off_is_read_on_from_there(storage, s3):
    content = bytes(range(256)) * 4096
    storage.put("a/one", content)
    s3.spoil({"do": "truncate", "method": "GET", "times": 2})
    assert storage.read("a/one").content == content
    opened = storage.open("a/one")
    s3.spoil({"do": "truncate", "method": "GET", "times": 1})
    assert opened.read([(150_000, 950_000)])[0].to_pybytes() == content[150_000:950_000]


def test_a_writer_whose_answer_was_lost_knows_that_it_won_and_another_that_it_lost(storage, s3):
    first = storage.put("a/one", b"0")
    # the write is done, the answer lost; then the retry is refused, because the object has changed
    s3.spoil({"do": "lose", "method": "PUT", "times": 1})
    second = storage.put_if_unchanged("a/one", b"1", first)
    assert storage.read("a/one") == (b"1", second)
    assert storage.put_if_unchanged("a/one", b"1", first) is None, "the same content, written by another"


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        ({"do": "answer", "status": 500}, "storage.unreachable", "wait until it answers again"),
        ({"do": "reset"}, "storage.unreachable", "check the network"),
        ({"do": "answer", **IN_VAIN}, "storage.denied", "allow to get, put, list and delete"),
        (
            {"do": "answer", "status": 400, "body": "<Error><Code>ExpiredToken</Code><Message>…</Message></Error>"},
            "storage.expired",
            "renew them",
        ),
        (
            {"do": "answer", "status": 404, "body": "<Error><Code>NoSuchBucket</Code><Message>…</Message></Error>"},
            "storage.no-bucket",
            "create it, or correct SONGVEC_STORAGE",
        ),
    ],
    ids=["500", "reset", "denied", "expired", "no bucket"],
)
def test_what_keeps_failing_says_what_to_do(storage, s3, fault, code, words):
    storage.put("a/one", bytes(1 << 18))
    opened = storage.open("a/one")
    s3.spoil(fault)
    calls = [
        ("read", lambda: storage.read("a/one")),
        ("read", lambda: storage.open("a/one")),
        ("read", lambda: opened.read([(1 << 17, 1 << 18)])),
        ("write", lambda: storage.put("a/one", b"1")),
        ("write", lambda: storage.put_if_unchanged("a/one", b"1", None)),
        ("list", lambda: storage.scan("a")),
        ("delete", lambda: storage.delete("a/one")),
    ]
    for what, call in calls:
        with pytest.raises(StorageError, match=words) as caught:
            call()
        assert caught.value.code == code
        assert f"could not {what} s3://" in str(caught.value)
        assert "secret" not in str(caught.value)


def test_a_server_that_is_not_there_is_named(storage, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    away = open_storage(storage.location)
    with pytest.raises(StorageError, match="check the network and AWS_ENDPOINT_URL") as caught:
        away.read("a/one")
    assert caught.value.code == "storage.unreachable"


@pytest.mark.parametrize("header", ["If-Match", "If-None-Match"])
def test_a_server_that_lets_two_writers_win_is_refused_once_and_for_all(bucket, s3, header):
    storage = open_storage(bucket)
    s3.spoil({"do": "drop", "method": "PUT", "header": header})
    for _ in range(2):
        with pytest.raises(StorageError, match="cannot keep two runs apart") as caught:
            storage.within("a").check_writes()
        assert caught.value.code == "storage.unconditional"
    assert dict(storage.list_keys()) == {}, "the object that it was tried with is deleted"


def test_a_server_that_knows_no_conditions_is_refused(bucket, s3):
    s3.spoil({"do": "answer", "method": "PUT", "status": 501, "body": "<Error><Code>NotImplemented</Code></Error>"})
    with pytest.raises(StorageError, match="cannot keep two runs apart"):
        open_storage(bucket).check_writes()


def test_a_storage_that_takes_no_writes_says_so_and_one_that_passed_is_not_tried_again(storage, s3):
    s3.spoil({"do": "answer", "method": "PUT", **IN_VAIN})
    with pytest.raises(StorageError) as caught:
        storage.check_writes()
    assert caught.value.code == "storage.denied"
    s3.spoil()
    storage.check_writes()
    s3.requests()
    storage.check_writes()
    storage.within("a").check_writes()
    assert not s3.requests()


def test_a_large_object_is_sent_in_pieces_and_appears_as_a_whole(storage, s3, monkeypatch):
    monkeypatch.setattr(objects, "SINGLE_BYTES", 1 << 20)
    content = bytes(range(256)) * (20 << 12)
    with storage.write("a/large") as file:
        file.write(content[:100])
        file.write(content[100:])
        assert storage.scan("a").objects == {}
    assert storage.read("a/large").content == content
    assert s3.count()["POST"] == 2, "begun and completed"
    s3.spoil({"do": "answer", "method": "PUT", **IN_VAIN})
    with pytest.raises(StorageError), storage.write("a/other") as file:
        file.write(content)
    s3.spoil()
    assert list(storage.scan("a").objects) == ["large"]


def test_vectors_of_a_part_are_sent_from_where_they_are(storage, monkeypatch):
    put, vectors = obstore.put, np.ones((2048, 3), np.float32)
    sent = []

    def put_and_look(client, path, content, **given):
        sent.extend(np.frombuffer(each, np.uint8) for each in content)
        return put(client, path, content, **given)

    monkeypatch.setattr(obstore, "put", put_and_look)
    rows = CachedRows.of(range(2048), [bytes(16)] * 2048, vectors)
    with storage.write("a/one") as file:
        write_part(file, IDENTITY, rows, [vectors])
        n_bytes = file.tell()
    assert sum(np.shares_memory(each, vectors) for each in sent) == 1
    assert sum(map(len, sent)) == n_bytes == storage.scan("a").objects["one"]
    [stored] = open_stored(storage.open("a/one"), IDENTITY, "a/one")
    assert (stored.load().embeddings == vectors).all()


def test_a_secret_may_be_in_a_file(bucket, monkeypatch, tmp_path):
    path = tmp_path / "secret"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY_FILE", str(path))
    with pytest.raises(SettingsError, match="are both set"):
        open_storage(bucket)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(SettingsError, match="cannot be read"):
        open_storage(bucket)
    path.write_text("from a file\n")
    storage = open_storage(bucket)
    assert storage.bucket.client.config["secret_access_key"] == "from a file"
    storage.put("a/one", b"1")
    assert open_storage("gs://bucket").location == "gs://bucket", "another store has other variables"


def test_calls_for_many_items_wait_together(storage, s3):
    s3.spoil({"do": "slow", "seconds": 0.2})
    storage.map(storage.read, [str(number) for number in range(16)])
    assert len(s3.requests()) == 16
