"""Checks before anything is paid for or loaded: whether the table can be created and indexed afterwards.

A scratch table of one row is created and indexed in the serving table's schema, and rolled back. Rights are read from
the catalog. Memory and disk are computed, as an index on one row needs neither. Nothing here touches the serving table.
When to add here: what can be known beforehand. Keep out: what depends on the rows themselves (`load`).
"""

from uuid import uuid4

import sqlalchemy as sa
from pgvector import Vector
from sqlalchemy import text

from songvec_assets.errors import DatabaseError, TableMismatchError
from songvec_assets.postgres import relations
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.extension import check_search_path
from songvec_assets.vectors.index import bits, sizing
from songvec_assets.vectors.index.build_plan import IndexSettings, plan_build
from songvec_assets.vectors.index.kinds import IndexKind
from songvec_assets.vectors.spec import SERVING, TableSpec
from songvec_assets.vectors.table import VectorTable, define_table, search_schema_of_serving_table

_LOCK_TIMEOUT = "250ms"
_NEEDED = "SELECT, INSERT, UPDATE, DELETE"

# the tables that every run writes
_LACKING = """
    SELECT c.oid::regclass::text, quote_ident(current_user)
    FROM pg_class c
    WHERE c.oid IN (
        to_regclass(:table), to_regclass('songvec.settings'), to_regclass('songvec.rate_limits'),
        to_regclass('songvec.rate_seconds'), to_regclass('songvec.loaded_ranges'), to_regclass('songvec.budgets')
    )
      AND EXISTS (SELECT FROM unnest(CAST(:needed AS text[])) AS needed WHERE NOT has_table_privilege(c.oid, needed))
    ORDER BY 1
"""
_SCHEMA = """
    SELECT quote_ident(n.nspname) AS name, quote_ident(current_user) AS role,
        has_schema_privilege(n.oid, 'CREATE') AS may_create,
        quote_ident(pg_get_userbyid(c.relowner)) AS owner, pg_has_role(c.relowner, 'USAGE') AS is_owner,
        row_security_active(c.oid) AS hides_rows
    FROM (SELECT to_regclass(:table)::oid AS oid) AS target
    LEFT JOIN pg_class c ON c.oid = target.oid
    JOIN pg_namespace n ON n.oid = coalesce(c.relnamespace, quote_ident(current_schema())::regnamespace)
"""


def check_target(target: VectorTable, spec: TableSpec, wanted: IndexSettings, n_songs: int) -> None:
    """Refuse what could not be loaded or indexed. The serving table must fit: see `check_loadable`.

    Args:
        target: the serving table, or the staging table if that is built.
        wanted: how it is to be indexed.
        n_songs: rows that it is to have.

    Raises:
        DatabaseError: says which right, schema, memory or disk is missing, and the statement that helps.
        SettingsError: the number of lists that was set does not fit into memory.
    """
    n_new = max(0, n_songs - target.ledger.count_songs())
    with target.database.get_connection() as connection:
        check_search_path(connection)
        n_changed = target.read_changes(connection) + n_new
    plan = plan_build(target, spec, wanted, n_songs, n_changed)
    with target.database.get_connection() as connection:
        schema = _check_rights(connection, plan.reason is not None or not target.is_serving)
    if plan.reason is not None:
        _try_out(target.database, spec, schema, plan.kind)
        plan.capacity.check_disk(plan.estimate, sizing.table_bytes(n_new, spec.dimensions, spec.vector_type))


def _check_rights(connection: sa.Connection, builds: bool) -> str:
    """The schema of the table, quoted; raises if a right is missing.

    VACUUM needs no further right: for anybody but the owner, the server only warns.
    """
    lacking = connection.execute(text(_LACKING), {"table": SERVING, "needed": _NEEDED.split(", ")}).all()
    if lacking:
        tables, role = ", ".join(table for table, _ in lacking), lacking[0][1]
        raise DatabaseError(
            f"this user may not read and write {tables}: let the owner run GRANT {_NEEDED} ON {tables} TO {role}",
            "database.no-right",
        )
    schema = connection.execute(text(_SCHEMA), {"table": SERVING}).one()
    if schema.hides_rows:
        raise DatabaseError(
            f"row security of table {SERVING} applies to {schema.role}, so that rows cannot be loaded or counted: let "
            f"{schema.owner} run ALTER TABLE {SERVING} NO FORCE ROW LEVEL SECURITY, or use a user that it "
            "does not bind",
            "database.no-right",
        )
    if not builds:
        return str(schema.name)
    if not schema.may_create:
        raise DatabaseError(
            f"this user may not create tables and indexes in schema {schema.name}: let its owner run GRANT CREATE ON "
            f"SCHEMA {schema.name} TO {schema.role}, or use another user in POSTGRES_URL",
            "database.no-right",
        )
    if schema.is_owner is False:
        raise DatabaseError(
            f"table {SERVING} belongs to {schema.owner}, and only its owner may index or replace it: let "
            f"{schema.owner} or a superuser run GRANT {schema.owner} TO {schema.role}, or ALTER TABLE {SERVING} "
            f"OWNER TO {schema.role}",
            "database.no-right",
        )
    return str(schema.name)


def _try_out(database: Database, spec: TableSpec, schema: str, kind: IndexKind) -> None:
    """Create a table of one row and its index in the real one's schema, and roll both back."""
    scratch = f"songvec_preflight_{uuid4().hex[:16]}"  # two runs at once need two names
    try:
        with database.get_connection() as connection:
            memory_kib = -(-sizing.build_bytes(1, spec.dimensions, kind.indexed_type(spec.vector_type)) // 1024)
            connection.execute(
                text("""
                    SELECT set_config('lock_timeout', :timeout, true), set_config('maintenance_work_mem', :memory, true)
                """),
                {"timeout": _LOCK_TIMEOUT, "memory": f"{memory_kib}kB"},
            )
            search_schema_of_serving_table(connection)
            define_table(spec, scratch).create(connection)
            connection.execute(
                text(f"INSERT INTO {scratch} (song_id, embedding) VALUES (1, CAST(:ones AS {spec.vector_type}))"),
                {"ones": Vector([1.0] * spec.dimensions).to_text()},
            )
            function = ""
            if kind.is_bits:
                mean = str([uuid4().int % 10**6] * spec.dimensions)
                function = bits.create_function(connection, mean)
            definition = kind.define(spec.vector_type, spec.dimensions, 1, function)
            connection.execute(text(f"CREATE INDEX ON {scratch} {definition}"))
            connection.rollback()
    except DatabaseError as error:
        raise DatabaseError(
            f"a table of {spec.column_type} cannot be made and indexed in schema {schema}, so nothing was sent or "
            f"loaded: {error}"
        ) from error


def find_attachments(connection: sa.Connection, serving: VectorTable) -> list[str]:
    """What people added to the serving table, and a swap would leave behind with it."""
    indexes = serving.index_name, serving.building_index, serving.replaced_index
    return relations.find_attachments(connection, serving.name, indexes)


def check_attachments(connection: sa.Connection, serving: VectorTable) -> None:
    """Refuse to replace the serving table if additions of people would be left behind.

    Raises:
        TableMismatchError: names them.
    """
    if attachments := find_attachments(connection, serving):
        raise TableMismatchError(
            f"{', '.join(attachments)} of table {SERVING} would stay with the old table: drop them, start the same "
            "command again, which goes on from here, and create them again afterwards",
            "table.swap-blocked",
        )
