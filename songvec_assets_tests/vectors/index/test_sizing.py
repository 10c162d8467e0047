"""What an index takes, against what the server itself asks for and uses."""

import re
from contextlib import closing

import psycopg2
import pytest
import sqlalchemy as sa

from songvec_assets.errors import DatabaseError
from songvec_assets.postgres.engine import Database
from songvec_assets.vectors.index.sizing import (
    SORT_MEMORY_PER_PROCESS,
    build_bytes,
    choose_lists,
    estimate_build,
    estimate_graph,
    format_bytes,
    graph_bytes,
    graph_memory_bytes,
    index_bytes,
    kmeans_bytes,
    most_lists,
)
from songvec_assets.vectors.table import TableSpec, VectorTable
from songvec_assets_tests.administration import execute
from songvec_assets_tests.vectors.conftest import SPEC
from songvec_assets_tests.vectors.indexes import fill

MEBIBYTE, GIBIBYTE = 2**20, 2**30
HALF = TableSpec("model-a", 16, "halfvec")


@pytest.mark.parametrize(
    ("n_rows", "lists"), [(0, 1), (1, 1), (10, 3), (400, 20), (10_000, 100), (1_000_000, 1000), (12_425_000, 3525)]
)
def test_lists_are_the_square_root_of_the_rows(n_rows: int, lists: int) -> None:
    assert choose_lists(n_rows) == lists


@pytest.mark.parametrize(("lists", "mebibytes"), [(316, 148), (1000, 600), (3525, 3846)])
def test_memory_is_what_was_measured_at_2000_dimensions(lists: int, mebibytes: int) -> None:
    assert kmeans_bytes(lists, 2000) / MEBIBYTE == pytest.approx(mebibytes, abs=1)


@pytest.mark.parametrize(
    ("spec", "lists", "n_rows"), [(SPEC, 150, 10_000), (SPEC, 250, 12_500), (HALF, 150, 10_000)], ids=str
)
def test_memory_is_what_the_server_itself_asks_for(
    database: Database, spec: TableSpec, lists: int, n_rows: int
) -> None:
    VectorTable(database).ensure(spec)
    fill(database, 1, n_rows, spec)
    expected = kmeans_bytes(lists, spec.dimensions, spec.vector_type)
    build = sa.text(
        f"CREATE INDEX ON song_embeddings USING ivfflat (embedding {spec.vector_type}_cosine_ops) WITH (lists={lists})"
    )
    with pytest.raises(DatabaseError) as caught, database.get_connection() as connection:
        connection.execute(sa.text(f"SET LOCAL maintenance_work_mem = '{expected * 99 // 100 // 1024}kB'"))
        connection.execute(build)
    asked = re.search(r"memory required is (\d+) MB", str(caught.value))
    assert asked is not None
    assert int(asked[1]) == expected // MEBIBYTE + 1


def test_a_build_gets_what_k_means_needs_or_what_keeps_its_workers() -> None:
    assert kmeans_bytes(3464, 2000) < build_bytes(3464, 2000) < 1.05 * kmeans_bytes(3464, 2000)
    assert build_bytes(3464, 2000, workers=8) == build_bytes(3464, 2000)
    assert build_bytes(10, 8) == 64 * MEBIBYTE
    assert build_bytes(10, 8, workers=4) == 5 * SORT_MEMORY_PER_PROCESS


@pytest.mark.parametrize("vector_type", ["vector", "halfvec"])
@pytest.mark.parametrize("memory", [MEBIBYTE * 64, MEBIBYTE * 300, GIBIBYTE * 2])
def test_the_most_lists_fit_and_one_more_does_not(memory: int, vector_type: str) -> None:
    lists = most_lists(memory, 2000, vector_type)
    if not lists:
        assert build_bytes(1, 2000, vector_type) > memory
        return
    assert build_bytes(lists, 2000, vector_type) <= memory < build_bytes(lists + 1, 2000, vector_type)


def test_where_memory_is_no_question_lists_end_where_pgvectors_do() -> None:
    assert most_lists(10**15, 2000) == 32_768


@pytest.mark.parametrize("spec", [SPEC, TableSpec("model-a", 500), TableSpec("model-a", 2000), HALF], ids=str)
def test_the_size_of_an_index_is_foretold(database: Database, spec: TableSpec) -> None:
    VectorTable(database).ensure(spec)
    fill(database, 1, 1_000, spec)
    execute(
        database.adbc_uri,
        "SET maintenance_work_mem = '128MB'; CREATE INDEX made ON song_embeddings "
        f"USING ivfflat (embedding {spec.vector_type}_cosine_ops) WITH (lists=30)",
    )
    [(size,)] = execute(database.adbc_uri, "SELECT pg_relation_size('made')")
    assert index_bytes(1_000, 30, spec.dimensions, spec.vector_type) == pytest.approx(size, rel=0.2)


@pytest.fixture
def bits_of(database: Database) -> str:
    """Creates a table of 3,000 vectors of 512 values; gives the key of an index of their bits."""
    spec = TableSpec("model-a", 512)
    VectorTable(database).ensure(spec)
    fill(database, 1, 3_000, spec)
    return "((binary_quantize(embedding))::bit(512)) bit_hamming_ops"


def test_the_memory_of_lists_of_bits_is_what_the_server_itself_asks_for(database: Database, bits_of: str) -> None:
    expected = kmeans_bytes(200, 512, "bit")
    copies = "SELECT 10000 * n + song_id, embedding FROM song_embeddings, generate_series(1, 3) n"
    execute(database.adbc_uri, f"INSERT INTO song_embeddings {copies}")
    with pytest.raises(DatabaseError) as caught, database.get_connection() as connection:
        connection.execute(sa.text(f"SET LOCAL maintenance_work_mem = '{expected * 9 // 10 // 1024}kB'"))
        connection.execute(sa.text(f"CREATE INDEX ON song_embeddings USING ivfflat ({bits_of}) WITH (lists = 200)"))
    asked = re.search(r"memory required is (\d+) MB", str(caught.value))
    assert asked is not None
    assert int(asked[1]) == expected // MEBIBYTE + 1


@pytest.mark.parametrize("method", ["ivfflat", "hnsw"])
def test_the_size_of_an_index_of_bits_is_foretold(database: Database, bits_of: str, method: str) -> None:
    options = " WITH (lists = 55)" if method == "ivfflat" else ""
    execute(database.adbc_uri, f"CREATE INDEX made ON song_embeddings USING {method} ({bits_of}){options}")
    [(size,)] = execute(database.adbc_uri, "SELECT pg_relation_size('made')")
    expected = index_bytes(3_000, 55, 512, "bit") if method == "ivfflat" else graph_bytes(3_000, 512)
    assert expected == pytest.approx(size, rel=0.1)


def test_the_memory_of_a_graph_is_what_it_fits_into(database: Database, bits_of: str) -> None:
    with closing(psycopg2.connect(database.adbc_uri)) as connection, connection.cursor() as cursor:
        cursor.execute("SET maintenance_work_mem = '1MB'; SET max_parallel_maintenance_workers = 0")
        cursor.execute(f"CREATE INDEX made ON song_embeddings USING hnsw ({bits_of})")
        fitted = re.search(r"no longer fits into maintenance_work_mem after (\d+) tuples", "".join(connection.notices))
    assert fitted is not None
    assert graph_memory_bytes(int(fitted[1]), 512) == pytest.approx(MEBIBYTE, rel=0.1)
    estimate = estimate_graph(12_000_000, 2000, 20 * GIBIBYTE)
    assert (estimate.lists, estimate.temporary_bytes) == (0, 0)
    assert estimate.index_bytes == pytest.approx(6.6e9, rel=0.02)
    assert estimate.memory_bytes == pytest.approx(11.5e9, rel=0.1)
    assert estimate.describe().startswith("a graph, ")
    assert estimate_graph(12_000_000, 2000, GIBIBYTE).memory_bytes == GIBIBYTE


def test_an_estimate_is_told_in_one_line() -> None:
    estimate = estimate_build(12_000_000, 3464, 2000, workers=1)
    assert estimate.index_bytes == pytest.approx(98e9, rel=0.02)
    assert estimate.temporary_bytes == pytest.approx(97e9, rel=0.02)
    assert re.fullmatch(
        r"3,464 lists, 3\.7 GiB of memory, 91\.\d GiB of disk and up to 89\.\d GiB more while it sorts",
        estimate.describe(),
    )


def test_rows_that_fit_into_memory_are_sorted_there_unless_workers_hand_them_over() -> None:
    assert estimate_build(1_000, 32, 2000).temporary_bytes == 0
    assert estimate_build(1_000, 32, 2000, workers=1).temporary_bytes > 0
    assert "while it sorts" not in estimate_build(1_000, 32, 2000).describe()


@pytest.mark.parametrize(("n_bytes", "words"), [(0, "0 MiB"), (512 * MEBIBYTE, "512 MiB"), (98 * 10**9, "91.3 GiB")])
def test_sizes_are_told_in_words(n_bytes: int, words: str) -> None:
    assert format_bytes(n_bytes) == words
