"""The songs of the embedded database: the samples, and generated ones."""

import pytest
import sqlalchemy as sa

from songvec_assets.postgres.embedded import add_generated_songs, create_songs_table, generate_songs
from songvec_assets.postgres.engine import Database
from songvec_assets.samples import read_sample_songs
from songvec_assets_tests.administration import dispose, execute

pytestmark = pytest.mark.slow


class TestSongs:
    def test_the_songs_table_is_the_sample_catalogue(self, database: Database) -> None:
        create_songs_table(database)
        samples = read_sample_songs()
        rows = execute(database.adbc_uri, "SELECT id, name, artist, lyrics FROM songs ORDER BY id")
        assert rows == [(place, *song) for place, song in enumerate(samples.rows(), start=1)]
        assert samples.height >= 100

    @pytest.mark.parametrize(
        ("range_size", "starts"), [(50_000, [0, 50_000, 100_000, 150_000]), (10, [0, 44, 88, 132])]
    )
    def test_the_samples_begin_four_ranges_of_a_demo(
        self, database: Database, range_size: int, starts: list[int]
    ) -> None:
        create_songs_table(database, range_size)
        rows = execute(database.adbc_uri, "SELECT id, name, artist, lyrics FROM songs ORDER BY id")
        samples = read_sample_songs()
        ids = [start + place for start in starts for place in range(1, 45)]
        assert rows == [(song_id, *song) for song_id, song in zip(ids, samples.rows(), strict=True)]
        add_generated_songs(database, 2)
        assert execute(database.adbc_uri, "SELECT max(id) FROM songs") == [(starts[-1] + 46,)]

    def test_a_songs_table_that_is_there_stays_as_it_is(self, database: Database) -> None:
        execute(database.adbc_uri, "CREATE TABLE songs (id integer PRIMARY KEY, mine text)")
        execute(database.adbc_uri, "INSERT INTO songs VALUES (7, 'kept')")
        create_songs_table(database)
        assert execute(database.adbc_uri, "SELECT * FROM songs") == [(7, "kept")]

    def test_generated_songs_are_added_up_to_the_number_asked_for(self, database: Database) -> None:
        create_songs_table(database)
        samples = read_sample_songs()
        statement = "SELECT name, artist, lyrics FROM songs ORDER BY id"
        for asked, expected in ((30, 30), (30, 30), (10, 30), (45, 45)):
            add_generated_songs(database, asked)
            rows = execute(database.adbc_uri, statement)
            assert rows == samples.rows() + list(generate_songs(samples, samples.height + 1, expected))

    def test_a_song_depends_on_its_number_alone(self) -> None:
        samples = read_sample_songs()
        songs = list(generate_songs(samples, 1000, 50))
        assert list(generate_songs(samples, 1020, 30)) == songs[20:]
        names, _, lyrics = zip(*songs, strict=True)
        assert len(set(names)) == len(set(lyrics)) == 50
        assert 600 < sum(len(each.encode()) for each in lyrics) / 50 < 2400

    def test_generated_songs_can_follow_songs_that_were_deleted(self, database: Database) -> None:
        create_songs_table(database)
        add_generated_songs(database, 5)
        with database.get_connection() as connection:
            connection.execute(sa.text("DELETE FROM songs WHERE id IN (3, (SELECT max(id) FROM songs))"))
        add_generated_songs(database, 5)
        n_songs, n_names = execute(database.adbc_uri, "SELECT count(*), count(DISTINCT name) FROM songs")[0]
        assert n_songs == read_sample_songs().height + 5
        assert n_names == n_songs
        dispose(database.url)
