"""The table built beside takes the serving one's place, in one short transaction; and the way back."""

from collections.abc import Callable

import sqlalchemy as sa
from sqlalchemy import text

from songvec_assets.errors import TableMismatchError
from songvec_assets.postgres.brief import run_briefly
from songvec_assets.postgres.engine import Database, raw_cursor
from songvec_assets.vectors.table import (
    BESIDE,
    FACTS,
    KEPT,
    TABLE,
    TableSpec,
    drop_table,
    fact_key,
    forget_table,
    index_name,
    read_spec,
    table_exists,
)

LOCK = "publish"
"""Held by whoever loads, builds beside, swaps or drops: one at a time."""

_ATTACHMENTS = """
    SELECT 'view ' || r.ev_class::regclass::text
    FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid
    WHERE d.classid = 'pg_rewrite'::regclass AND d.refobjid = to_regclass(:table) AND r.ev_class <> d.refobjid
    UNION SELECT 'trigger ' || tgname FROM pg_trigger WHERE tgrelid = to_regclass(:table) AND NOT tgisinternal
    UNION SELECT 'foreign key ' || conname FROM pg_constraint
    WHERE contype = 'f' AND to_regclass(:table) IN (conrelid, confrelid)
    UNION SELECT 'column ' || attname FROM pg_attribute
    WHERE attrelid = to_regclass(:table) AND attnum > 0 AND NOT attisdropped
      AND attname NOT IN ('song_id', 'embedding', 'created_at')
    UNION SELECT 'index ' || indexrelid::regclass::text FROM pg_index
    WHERE indrelid = to_regclass(:table) AND NOT indisprimary
      AND indisvalid AND NOT starts_with(indexrelid::regclass::text, :index)
    UNION SELECT 'row security' FROM pg_class WHERE oid = to_regclass(:table) AND relrowsecurity
    UNION SELECT 'publication ' || p.pubname FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid
    WHERE r.prrelid = to_regclass(:table)
    ORDER BY 1
"""

_GRANTS = """
    SELECT CASE WHEN grantee = 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END AS grantee,
        privilege_type, is_grantable
    FROM pg_class, aclexplode(relacl) WHERE oid = to_regclass(:table) AND grantee <> relowner
"""


def find_attachments(connection: sa.Connection) -> list[str]:
    """What people have added to the serving table, which would stay with the old one when another takes its place."""
    found = connection.scalars(text(_ATTACHMENTS), {"table": TABLE, "index": index_name()})
    return list(found)


def put_in_place(database: Database, keep: bool, check: Callable[[], None]) -> None:
    """Let the table built beside take the serving one's place, with its rights, index and records.

    Args:
        database: where they are.
        keep: whether what served till now stays as KEPT, or is dropped.
        check: called while another session holds a lock on the table; raises to give up.

    Raises:
        DatabaseError: another session held its lock for ten minutes; the old table still serves.
    """

    def swap(connection: sa.Connection) -> None:
        connection.execute(text(f"LOCK TABLE {TABLE}, {BESIDE} IN ACCESS EXCLUSIVE MODE"))
        _copy_grants(connection)
        if keep:
            _rename(connection, TABLE, KEPT)
        else:
            drop_table(connection, TABLE)
        _rename(connection, BESIDE, TABLE)

    run_briefly(database, swap, check)


def roll_back(database: Database, check: Callable[[], None] = lambda: None) -> TableSpec:
    """Let what served before the last swap serve again; what serves now stays as BESIDE.

    Returns:
        What serves now.

    Raises:
        TableMismatchError: no table was kept, or one is being built beside.
    """

    def swap(connection: sa.Connection) -> None:
        if not table_exists(connection, KEPT):
            raise TableMismatchError(f"there is no table {KEPT} to go back to: it was dropped, or nothing was swapped")
        if table_exists(connection, BESIDE):
            raise TableMismatchError(
                f"table {BESIDE} is in the way: {read_spec(connection, BESIDE)} is being built there. Finish that with "
                f"`songvec swap`, or let its owner run DROP TABLE {BESIDE}; then roll back"
            )
        connection.execute(text(f"LOCK TABLE {TABLE}, {KEPT} IN ACCESS EXCLUSIVE MODE"))
        _rename(connection, TABLE, BESIDE)
        _rename(connection, KEPT, TABLE)

    run_briefly(database, swap, check)
    with database.get_connection() as connection:
        serving = read_spec(connection)
    assert serving is not None
    return serving


def drop_others(database: Database, check: Callable[[], None] = lambda: None) -> list[str]:
    """Drop what an earlier swap kept, and what was built beside and does not serve.

    Returns:
        The names of the tables that were there.
    """
    dropped: list[str] = []

    def drop(connection: sa.Connection) -> None:
        dropped[:] = [table for table in (BESIDE, KEPT) if table_exists(connection, table)]
        for table in (BESIDE, KEPT):
            drop_table(connection, table)

    run_briefly(database, drop, check)
    return dropped


def _rename(connection: sa.Connection, table: str, new: str) -> None:
    """Rename a table with its indexes and all that is recorded of it."""
    forget_table(connection, new)
    connection.execute(text(f"ALTER TABLE {table} RENAME TO {new}"))
    for index, name in {f"{table}_pkey": f"{new}_pkey", index_name(table): index_name(new)}.items():
        connection.execute(text(f"ALTER INDEX IF EXISTS {index} RENAME TO {name}"))
    connection.execute(
        text("UPDATE songvec.loaded_ranges SET table_name = :new WHERE table_name = :table"),
        {"table": table, "new": new},
    )
    for fact in FACTS:
        connection.execute(
            text("UPDATE songvec.settings SET key = :new WHERE key = :key"),
            {"key": fact_key(fact, table), "new": fact_key(fact, new)},
        )


def _copy_grants(connection: sa.Connection) -> None:
    grants = connection.execute(text(_GRANTS), {"table": TABLE}).all()
    with raw_cursor(connection) as cursor:  # names may hold colons and percent signs
        for grantee, privilege, grantable in grants:
            option = " WITH GRANT OPTION" if grantable else ""
            cursor.execute(f"GRANT {privilege} ON {BESIDE} TO {grantee}{option}")
