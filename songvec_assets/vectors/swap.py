"""The table built beside takes the serving one's place, in one short transaction; and the way back."""

import contextlib
from collections.abc import Callable, Iterator

import sqlalchemy as sa
from sqlalchemy import text

from songvec_assets.errors import TableMismatchError
from songvec_assets.postgres.brief import run_briefly
from songvec_assets.postgres.engine import Database, raw_cursor
from songvec_assets.vectors.build import building_name, replaced_name
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
    WITH target AS (
        SELECT c.*, ARRAY[c.reltype, t.typarray] AS row_types
        FROM pg_class c LEFT JOIN pg_type t ON t.oid = c.reltype WHERE c.oid = to_regclass(:table)
    ), dependents AS (
        SELECT d.classid, d.objid, d.objsubid FROM pg_depend d, target
        WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = target.oid
           OR d.refclassid = 'pg_type'::regclass AND d.refobjid = ANY (target.row_types)
    )
    SELECT 'view ' || r.ev_class::regclass::text
    FROM dependents d JOIN pg_rewrite r ON r.oid = d.objid, target
    WHERE d.classid = 'pg_rewrite'::regclass AND r.ev_class <> target.oid
    UNION SELECT 'rule ' || rulename FROM pg_rewrite, target WHERE ev_class = target.oid
    UNION SELECT 'trigger ' || tgname FROM pg_trigger, target WHERE tgrelid = target.oid AND NOT tgisinternal
    UNION SELECT 'foreign key ' || conname FROM pg_constraint, target
    WHERE contype = 'f' AND target.oid IN (conrelid, confrelid)
    UNION SELECT 'constraint ' || conname FROM pg_constraint, target WHERE contype = 'c' AND conrelid = target.oid
    UNION SELECT 'column ' || attname FROM pg_attribute, target
    WHERE attrelid = target.oid AND attnum > 0 AND NOT attisdropped
      AND attname NOT IN ('song_id', 'embedding', 'created_at')
    UNION SELECT 'default of column ' || attname
    FROM pg_attribute a JOIN pg_attrdef e ON (e.adrelid, e.adnum) = (a.attrelid, a.attnum), target
    WHERE a.attrelid = target.oid AND a.attname IN ('song_id', 'embedding', 'created_at')
      AND (a.attname <> 'created_at' OR pg_get_expr(e.adbin, e.adrelid) NOT IN ('now()', 'CURRENT_TIMESTAMP'))
    UNION SELECT 'index ' || i.indexrelid::regclass::text
    FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid, target
    WHERE i.indrelid = target.oid AND NOT i.indisprimary AND i.indisvalid AND c.relname <> ALL (:indexes)
    UNION SELECT 'row security' FROM target WHERE relrowsecurity
    UNION SELECT 'row security of its owner' FROM target WHERE relforcerowsecurity
    UNION SELECT 'replica identity' FROM target WHERE relreplident <> 'd'
    UNION SELECT 'security label of ' || provider FROM pg_seclabel, target
    WHERE classoid = 'pg_class'::regclass AND objoid = target.oid
    UNION SELECT 'parent ' || inhparent::regclass::text FROM pg_inherits, target WHERE inhrelid = target.oid
    UNION SELECT 'publication ' || p.pubname
    FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid, target WHERE r.prrelid = target.oid
    UNION SELECT 'a subscription' FROM pg_subscription_rel, target WHERE srrelid = target.oid
    UNION SELECT 'order CLUSTER ON ' || indexrelid::regclass::text FROM pg_index, target
    WHERE indrelid = target.oid AND indisclustered
    UNION SELECT 'tablespace ' || spcname FROM pg_tablespace t, target WHERE t.oid = target.reltablespace
    UNION SELECT 'comment on ' || pg_describe_object(e.classoid, e.objoid, 0)
    FROM pg_description e, target
    WHERE e.classoid = 'pg_class'::regclass
          AND e.objoid IN (SELECT indexrelid FROM pg_index WHERE indrelid = target.oid)
       OR e.classoid = 'pg_constraint'::regclass
          AND e.objoid IN (SELECT oid FROM pg_constraint WHERE conrelid = target.oid AND contype = 'p')
       OR e.classoid = 'pg_statistic_ext'::regclass
          AND e.objoid IN (SELECT oid FROM pg_statistic_ext WHERE stxrelid = target.oid)
    UNION SELECT 'options of index ' || i.indexrelid::regclass::text
    FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid, target
    WHERE i.indrelid = target.oid AND i.indisprimary AND c.reloptions <> '{}'
    UNION SELECT 'statistics target of ' || stxname FROM pg_statistic_ext s, target
    WHERE s.stxrelid = target.oid AND (to_jsonb(s) ->> 'stxstattarget')::int >= 0
    -- policies, functions, columns of the row's type, children, sequences, and whatever later servers know
    UNION SELECT pg_describe_object(d.classid, d.objid, d.objsubid) FROM dependents d, target
    WHERE d.classid <> ALL (ARRAY[
        'pg_rewrite', 'pg_attrdef', 'pg_publication_rel', 'pg_statistic_ext']::regclass[]::oid[])
      AND NOT (d.classid = 'pg_type'::regclass AND d.objid = ANY (target.row_types))
      AND NOT EXISTS (SELECT FROM pg_trigger WHERE d.classid = 'pg_trigger'::regclass AND oid = d.objid
                      AND tgrelid = target.oid)
      AND NOT EXISTS (SELECT FROM pg_constraint WHERE d.classid = 'pg_constraint'::regclass AND oid = d.objid
                      AND target.oid IN (conrelid, confrelid))
      AND NOT EXISTS (SELECT FROM pg_index WHERE d.classid = 'pg_class'::regclass AND indexrelid = d.objid)
      AND NOT (d.classid = 'pg_class'::regclass AND d.objid IN (target.oid, target.reltoastrelid))
    ORDER BY 1
"""

# what a table that takes another's name is given, as statements about %(new)s; their order matters
_PROPERTIES = """
    WITH target AS (SELECT * FROM pg_class WHERE oid = %(table)s::regclass),
    columns AS (
        SELECT a.* FROM pg_attribute a, target WHERE a.attrelid = target.oid AND a.attnum > 0 AND NOT a.attisdropped
    ),
    grants AS (
        SELECT '' AS columns, acl.* FROM target, aclexplode(relacl) acl WHERE acl.grantee <> relowner
        UNION ALL SELECT format('(%%I)', attname), acl.* FROM columns, aclexplode(attacl) acl
    ),
    old_grants AS (
        SELECT DISTINCT acl.grantee FROM target, (
            SELECT (aclexplode(relacl)).grantee FROM pg_class WHERE oid = %(new)s::regclass
            UNION ALL SELECT (aclexplode(attacl)).grantee FROM pg_attribute WHERE attrelid = %(new)s::regclass
        ) acl, pg_class c
        WHERE c.oid = %(new)s::regclass AND acl.grantee NOT IN (c.relowner, target.relowner)
    )
    SELECT statement FROM (
        SELECT 1 AS step, format('ALTER TABLE {new} OWNER TO %%I', pg_get_userbyid(target.relowner)) AS statement
        FROM target JOIN pg_class c ON c.oid = %(new)s::regclass WHERE c.relowner <> target.relowner
        UNION ALL SELECT 2, format('REVOKE ALL ON {new} FROM %%s CASCADE', {grantee}) FROM old_grants
        UNION ALL SELECT 3, format(
            'GRANT %%s %%s ON {new} TO %%s%%s', privilege_type, columns, {grantee},
            CASE WHEN is_grantable THEN ' WITH GRANT OPTION' END
        ) FROM grants
        UNION ALL SELECT 4, format('ALTER TABLE {new} SET (%%s)', array_to_string(reloptions, ', '))
        FROM target WHERE reloptions <> '{{}}'
        UNION ALL SELECT 4, format('ALTER TABLE {new} SET (toast.%%s)', array_to_string(t.reloptions, ', toast.'))
        FROM target JOIN pg_class t ON t.oid = target.reltoastrelid WHERE t.reloptions <> '{{}}'
        UNION ALL SELECT 4, format(
            'ALTER TABLE {new} ALTER COLUMN %%I SET (%%s)', attname, array_to_string(attoptions, ', ')
        ) FROM columns WHERE attoptions <> '{{}}'
        UNION ALL SELECT 4, format('ALTER TABLE {new} ALTER COLUMN %%I SET STATISTICS %%s', attname, attstattarget)
        FROM columns WHERE attstattarget >= 0
        UNION ALL SELECT 4, format('COMMENT ON TABLE {new} IS %%L', obj_description(oid, 'pg_class'))
        FROM target WHERE obj_description(oid, 'pg_class') IS NOT NULL
        UNION ALL SELECT 4, format('COMMENT ON COLUMN {new}.%%I IS %%L', attname, col_description(attrelid, attnum))
        FROM columns WHERE col_description(attrelid, attnum) IS NOT NULL
    ) AS statements ORDER BY step
"""
_GRANTEE = "CASE WHEN grantee = 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END"

_STATISTICS = """
    SELECT quote_ident(n.nspname) || '.' || quote_ident(s.stxname), pg_get_statisticsobjdef(s.oid)
    FROM pg_statistic_ext s JOIN pg_namespace n ON n.oid = s.stxnamespace WHERE s.stxrelid = to_regclass(:table)
"""


def find_attachments(connection: sa.Connection) -> list[str]:
    """What people have added to the serving table that would stay with it when another takes its name."""
    indexes = [index_name(), building_name(TABLE), replaced_name(TABLE)]
    found = connection.scalars(text(_ATTACHMENTS), {"table": TABLE, "indexes": indexes})
    return list(found)


def check_attachments(connection: sa.Connection) -> None:
    """Refuse to give the serving table's name to another while people's additions would stay behind.

    Raises:
        TableMismatchError: names them.
    """
    attachments = find_attachments(connection)
    if attachments:
        raise TableMismatchError(
            f"{', '.join(attachments)} of table {TABLE} would stay with the old table: drop them, start the same "
            "command again, which goes on from here, and create them again afterwards"
        )


def put_in_place(
    database: Database,
    keep: bool,
    check: Callable[[], None],
    check_held: Callable[[], None] = lambda: None,
    confirm: Callable[[sa.Connection], None] = lambda _: None,
) -> None:
    """Let the table built beside take the serving one's place, with its rights, settings, index and records.

    Args:
        database: where they are.
        keep: whether what served till now stays as KEPT, or is dropped.
        check: called while another session holds a lock on a table; raises to give up.
        check_held: called right before the commit; raises where LOCK was lost.
        confirm: called while nobody else can change either table; raises to give up.

    Raises:
        DatabaseError: another session held its lock for ten minutes; the old table still serves.
        TableMismatchError: see `check_attachments`; both tables are as they were.
    """

    def swap(connection: sa.Connection) -> None:
        connection.execute(text(f"LOCK TABLE {TABLE}, {BESIDE} IN ACCESS EXCLUSIVE MODE"))
        # again: a build takes hours, in which people go on working
        check_attachments(connection)
        confirm(connection)
        with _copying_properties(connection, BESIDE):
            if keep:
                _rename(connection, TABLE, KEPT)
            else:
                drop_table(connection, TABLE)
            _rename(connection, BESIDE, TABLE)
        check_held()

    run_briefly(database, swap, check)


def roll_back(
    database: Database, check: Callable[[], None] = lambda: None, check_held: Callable[[], None] = lambda: None
) -> TableSpec:
    """Let what served before the last swap serve again; what serves now stays as BESIDE.

    Args:
        database: where they are.
        check: called while another session holds a lock on a table; raises to give up.
        check_held: called right before the commit; raises where LOCK was lost.

    Returns:
        What serves now.

    Raises:
        TableMismatchError: no table was kept, one is being built beside, or see `check_attachments`.
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
        check_attachments(connection)
        with _copying_properties(connection, KEPT):
            _rename(connection, TABLE, BESIDE)
            _rename(connection, KEPT, TABLE)
        check_held()

    run_briefly(database, swap, check)
    with database.get_connection() as connection:
        serving = read_spec(connection)
    assert serving is not None
    return serving


def drop_others(
    database: Database, check: Callable[[], None] = lambda: None, check_held: Callable[[], None] = lambda: None
) -> list[str]:
    """Drop what an earlier swap kept, and what was built beside and does not serve.

    Args:
        database: where they are.
        check: called while another session holds a lock on a table; raises to give up.
        check_held: called right before the commit; raises where LOCK was lost.

    Returns:
        The names of the tables that were there.
    """
    dropped: list[str] = []

    def drop(connection: sa.Connection) -> None:
        dropped[:] = [table for table in (BESIDE, KEPT) if table_exists(connection, table)]
        for table in (BESIDE, KEPT):
            drop_table(connection, table)
        check_held()

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


@contextlib.contextmanager
def _copying_properties(connection: sa.Connection, new: str) -> Iterator[None]:
    """Give the serving table's owner, rights, options, comments and statistics to the one that takes its name.

    Rights that the new table alone has, by default privileges or from an earlier day, are taken away. Objects of
    extended statistics have names of their own, so they move: created again when the block has renamed the tables.
    """
    statistics = connection.execute(text(_STATISTICS), {"table": TABLE}).all()
    with raw_cursor(connection) as cursor:  # names and comments may hold colons and percent signs
        cursor.execute(_PROPERTIES.format(new=new, grantee=_GRANTEE), {"table": TABLE, "new": new})
        for (statement,) in cursor.fetchall():
            cursor.execute(statement)
        for name, _ in statistics:
            cursor.execute(f"DROP STATISTICS {name}")
        yield
        for _, definition in statistics:
            cursor.execute(definition)
