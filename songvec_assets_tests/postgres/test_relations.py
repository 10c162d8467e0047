"""What users have added to a table: what would be left behind is named, what can be copied is copied."""

import uuid

import pytest

from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.relations import copying_properties, find_attachments
from songvec_assets_tests.administration import execute, login_role

TABLE = "(song_id integer PRIMARY KEY, embedding vector(3), created_at timestamptz DEFAULT now())"


@pytest.fixture
def tables(database: Database) -> Database:
    """`served` and `new`, as they are made by this package."""
    execute(database.adbc_uri, f"CREATE TABLE served {TABLE}; CREATE TABLE new {TABLE}")
    return database


def attachments(database: Database, *ours: str) -> list[str]:
    with database.get_connection() as connection:
        return find_attachments(connection, "served", ours)


def test_a_table_as_it_was_made_and_one_that_is_not_there_have_none(tables: Database) -> None:
    assert attachments(tables) == []
    execute(tables.adbc_uri, "DROP TABLE served")
    assert attachments(tables) == []


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("CREATE VIEW seen AS SELECT song_id FROM served", "view seen"),
        ("ALTER TABLE served ADD COLUMN note text", "column note"),
        ("ALTER TABLE served ADD CONSTRAINT positive CHECK (song_id > 0)", "constraint positive"),
        ("CREATE INDEX mine ON served (created_at)", "index mine"),
        ("CREATE TABLE other (id integer REFERENCES served); ", "foreign key other_id_fkey"),
        ("ALTER TABLE served ALTER COLUMN created_at SET DEFAULT '2026-01-01'", "default of column created_at"),
        ("ALTER TABLE served ENABLE ROW LEVEL SECURITY", "row security"),
        ("ALTER TABLE served REPLICA IDENTITY FULL", "replica identity"),
        ("CREATE RULE quiet AS ON DELETE TO served DO INSTEAD NOTHING", "rule quiet"),
        ("CREATE FUNCTION of_served(served) RETURNS integer RETURN 1", "function of_served(served)"),
    ],
)
def test_what_would_be_left_behind_is_named(tables: Database, statement: str, named: str) -> None:
    execute(tables.adbc_uri, statement)
    assert named in attachments(tables)


def test_indexes_of_ours_are_not(tables: Database) -> None:
    execute(tables.adbc_uri, "CREATE INDEX ours ON served USING ivfflat (embedding vector_cosine_ops)")
    assert attachments(tables, "ours") == []


def test_rights_options_comments_and_statistics_are_copied_and_rights_of_the_new_table_alone_are_not(
    tables: Database,
) -> None:
    url = tables.adbc_uri
    with login_role(url) as reader, login_role(url) as stranger:
        execute(
            url,
            f"""
            GRANT SELECT ON served TO {reader}; GRANT UPDATE (created_at) ON served TO {reader};
            GRANT ALL ON new TO {stranger};
            ALTER TABLE served SET (fillfactor = 80);
            ALTER TABLE served ALTER COLUMN song_id SET STATISTICS 7;
            COMMENT ON TABLE served IS 'it''s 100% : mine'; COMMENT ON COLUMN served.embedding IS 'by %s';
            CREATE STATISTICS both_columns ON song_id, created_at FROM served;
            """,
        )
        with tables.get_connection() as connection, copying_properties(connection, "served", "new"):
            connection.exec_driver_sql("ALTER TABLE served RENAME TO old")
            connection.exec_driver_sql("ALTER TABLE new RENAME TO served")
        held = f"""
            SELECT has_table_privilege('{reader}', 'served', 'SELECT'),
                has_column_privilege('{reader}', 'served', 'created_at', 'UPDATE'),
                has_table_privilege('{stranger}', 'served', 'SELECT'),
                reloptions, obj_description(oid), col_description(oid, 2),
                (SELECT attstattarget FROM pg_attribute WHERE attrelid = c.oid AND attname = 'song_id'),
                (SELECT count(*) FROM pg_statistic_ext WHERE stxrelid = c.oid AND stxname = 'both_columns')
            FROM pg_class c WHERE oid = 'served'::regclass
        """
        assert execute(url, held) == [(True, True, False, ["fillfactor=80"], "it's 100% : mine", "by %s", 7, 1)]
        execute(url, f"DROP OWNED BY {reader}, {stranger}")


def test_a_name_that_must_be_quoted_is(tables: Database) -> None:
    name = f"Odd {uuid.uuid4().hex[:6]}"
    execute(tables.adbc_uri, f'ALTER TABLE served RENAME TO "{name}"')
    with tables.get_connection() as connection:
        assert find_attachments(connection, f'"{name}"', []) == []
