"""The embedded Postgres with pgvector as a database, and its `songs`: the sample catalogue plus generated songs.

For demos and tests. When to add here: another kind of made-up songs. Keep out: how the server starts (`server`).
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa
from psycopg2.extras import execute_values
from sqlalchemy import text

from songvec_assets.postgres.engine import Database, raw_cursor
from songvec_assets.postgres.server import start_server
from songvec_assets.samples import read_sample_songs

if TYPE_CHECKING:  # a search needs no frames
    import polars as pl


def start_embedded_server(folder: Path) -> Database:
    """The database of the embedded server in a folder; see `start_server`."""
    return Database(start_server(folder), embedded=True)


def create_songs_table(database: Database, range_size: int = 0) -> None:
    """Create `songs` with the sample catalogue, unless the table exists.

    Args:
        range_size: song_ids per range; each of the first four ranges then begins with a quarter of the samples, so that
            a demo shows several ranges. 0: consecutive ids.
    """
    with database.get_connection() as connection:
        if connection.scalar(text("SELECT to_regclass('songs') IS NOT NULL")):
            return
        samples = read_sample_songs()
        quarter = -(-samples.height // 4)
        connection.execute(
            text("CREATE TABLE songs (id serial PRIMARY KEY, name text NOT NULL, artist text NOT NULL, lyrics text)")
        )
        for first in range(0, samples.height, quarter):
            start = first // quarter * max(range_size, quarter)
            connection.execute(text("SELECT setval('songs_id_seq', :next, false)"), {"next": start + 1})
            _insert(connection, samples[first : first + quarter].rows())


def add_generated_songs(database: Database, n_generated: int) -> None:
    """Add generated songs until `songs` has at least `n_generated` more than the samples."""
    samples = read_sample_songs()
    with database.get_connection() as connection:
        n_songs, highest = connection.execute(text("SELECT count(*), coalesce(max(id), 0) FROM songs")).one()
        missing = samples.height + n_generated - n_songs
        if missing > 0:
            _insert(connection, generate_songs(samples, highest + 1, missing))


def generate_songs(samples: "pl.DataFrame", first: int, n_songs: int) -> Iterator[tuple[str, str, str]]:
    """Songs for tests of size: random lines of the samples, about 1.2 KB per song; numbers keep them distinct.

    Each line joins two of the samples': a line that many songs share would be reported as boilerplate.
    """
    lines = [line for lyrics in samples["lyrics"].drop_nulls() for line in lyrics.splitlines()]
    names, artists = samples["name"].to_list(), samples["artist"].to_list()
    for number in range(first, first + n_songs):
        draw = random.Random(number)
        drawn = draw.choices(lines, k=32)
        lyrics = "\n".join(map(", ".join, zip(drawn[::2], drawn[1::2], strict=True)))
        yield f"{draw.choice(names)} no. {number}", draw.choice(artists), lyrics


def _insert(connection: sa.Connection, songs: "list[tuple[object, ...]] | Iterator[tuple[str, str, str]]") -> None:
    with raw_cursor(connection) as cursor:
        execute_values(cursor, "INSERT INTO songs (name, artist, lyrics) VALUES %s", songs, page_size=1000)
