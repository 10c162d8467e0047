"""Fixtures of the table's room, for searches; and sixty songs that a provider embedded, loaded and indexed."""

from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from songvec_assets.pipeline import Pipeline
from songvec_assets_tests.administration import borrow_database, dispose, execute
from songvec_assets_tests.conftest import TEMPLATE, make_pipeline
from songvec_assets_tests.provider import Provider, running_provider
from songvec_assets_tests.vectors.conftest import cache

__all__ = ["cache"]

N_SONGS = 60
SONGS = f"""
    CREATE TYPE mood AS ENUM ('low', 'high');
    CREATE TABLE songs (
        id bigint PRIMARY KEY, name text, artist varchar(40), lyrics text, year integer, genre varchar(4), feeling mood,
        released date, tags json, secret text
    );
    INSERT INTO songs SELECT
        n, 'Song ' || n, (ARRAY['Ann', 'Ben', '100%_Cy'])[n % 3 + 1], 'words ' || n, 1980 + n % 20,
        (ARRAY['folk', 'jazz'])[n % 2 + 1], (ARRAY['low', 'high']::mood[])[n % 2 + 1], date '2020-01-01' + n::integer,
        '{{}}', 'secret'
    FROM generate_series(1, {N_SONGS}) n
"""


@pytest.fixture(scope="module")
def songs_provider() -> Iterator[Provider]:
    """A provider for a module's searches."""
    with running_provider() as running:
        yield running


@pytest.fixture(scope="module")
def pipeline(server_url: str, songs_provider: Provider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """Sixty songs, embedded, loaded and indexed; searches visit one list. Tests of a module share it."""
    with borrow_database(server_url, TEMPLATE) as database:
        execute(database.adbc_uri, SONGS)
        columns = "artist, year, genre, feeling, released, tags, missing"
        given = {"filter_columns": columns, "lists": 8, "query_prompt": "find {query}"}
        made = make_pipeline(database, songs_provider, tmp_path_factory.mktemp("store"), **given)
        made.run()
        execute(database.adbc_uri, "UPDATE songvec.settings SET value = '1' WHERE key = 'probes'")
        # the planner takes the index though the table is small
        for setting in ("enable_seqscan", "enable_sort"):
            execute(database.adbc_uri, f"ALTER DATABASE {sa.make_url(database.url).database} SET {setting} = off")
        dispose(database.url)
        yield made
