"""Objects of a real S3 server read in part: how many requests it takes, and what if they change meanwhile."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from songvec_assets.errors import StorageError, StoreError
from songvec_assets.storage import open_storage
from songvec_assets.storage.opened import HEAD_BYTES

CONTENT = bytes(range(256)) * 8192


@pytest.fixture
def storage(bucket):
    return open_storage(bucket)


@pytest.fixture
def opened(storage, s3):
    storage.put("a/one", CONTENT)
    s3.requests()
    return storage.open("a/one")


def test_a_small_object_is_one_request_and_is_read_as_if_it_were_mapped(storage, s3):
    storage.put("a/small", CONTENT[:HEAD_BYTES])
    s3.requests()
    opened = storage.open("a/small")
    assert opened.mapped.to_pybytes() == opened.file().read() == CONTENT[:HEAD_BYTES]
    assert s3.count() == {"GET": 1}


@pytest.mark.parametrize("method", ["", "GET"])
def test_a_refusal_that_mentions_416_is_not_taken_for_an_empty_object(opened, storage, s3, method):
    s3.spoil({"do": "answer", "method": method, "status": 400, "body": "<Error><Code>Denied416</Code></Error>"})
    with pytest.raises(StorageError, match="Denied416" if method else "400"):
        storage.open("a/one")


def test_of_a_large_object_what_is_read_is_requested_and_near_spans_together(opened, s3):
    assert (opened.mapped, opened.size) == (None, len(CONTENT))
    opened.read([(0, HEAD_BYTES)])
    assert s3.count() == {"GET": 1}, "the beginning is known"
    opened.read([(200_000, 200_100), (300_000, 300_100), (2_000_000, 2_000_100)])
    assert s3.count() == {"GET": 2}


def test_a_parquet_file_is_read_by_its_footer_and_its_columns(storage, s3):
    table = pa.table({"a": range(100_000), "b": [f"{number:050}" for number in range(100_000)]})
    with storage.write("a/songs") as file:
        pq.write_table(table, file, compression="none", use_dictionary=False)
    s3.requests()
    assert pq.read_metadata(storage.open("a/songs").file()).num_rows == 100_000
    assert s3.count()["GET"] <= 3
    found = pq.ParquetFile(storage.open("a/songs").file(), pre_buffer=True).read(["a"])
    assert found["a"].to_pylist() == list(range(100_000))
    assert s3.count()["GET"] <= 4


@pytest.mark.parametrize("is_deleted", [False, True])
def test_an_object_that_changes_while_it_is_read_is_not_read_half_and_half(opened, storage, is_deleted):
    file = opened.file()
    file.seek(500_000)
    assert file.read(10) == CONTENT[500_000:500_010]
    storage.put("a/one", CONTENT[::-1])
    if is_deleted:
        storage.delete("a/one")
    with pytest.raises(StoreError, match="was replaced while it was read") as caught:
        file.read(10)
    assert caught.value.code == "storage.changed"
    if is_deleted:
        with pytest.raises(StoreError, match="was replaced while it was read"):
            opened.read([(1_000_000, 1_000_010)])
