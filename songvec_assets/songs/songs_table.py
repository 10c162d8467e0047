"""A table as PostgreSQL's system catalog describes it: its columns, their types, and what this user may read.

When to add here: another property from the system catalog. Keep out: messages about it (`advice`), and the checks and
statements of a source (`source`).
"""

from dataclasses import dataclass
from typing import cast

import sqlalchemy as sa
from psycopg2 import sql

# pg_type.typcategory: strings and enums; a domain has the category of its base type
_TEXT_CATEGORIES = ("S", "E")
IS_TABLE = "c.relkind IN ('r', 'p', 'v', 'm', 'f')"

# below a view, policies apply to the view's owner; to a table's own owner they apply only if they are forced
_ROW_SECURITY = """
    WITH RECURSIVE below (oid, reader) AS (
        SELECT CAST(:oid AS oid), oid FROM pg_roles WHERE rolname = current_user
        UNION
        SELECT d.refobjid, CASE WHEN EXISTS (
            SELECT FROM pg_options_to_table(v.reloptions)
            WHERE option_name = 'security_invoker' AND option_value::boolean
        ) THEN reader ELSE v.relowner END
        FROM below
        JOIN pg_class v ON v.oid = below.oid AND v.relkind IN ('v', 'm')
        JOIN pg_rewrite r ON r.ev_class = v.oid
        JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid
            AND d.refclassid = 'pg_class'::regclass AND d.refobjid <> v.oid
    )
    SELECT EXISTS (
        SELECT FROM below JOIN pg_class t ON t.oid = below.oid JOIN pg_roles u ON u.oid = below.reader
        WHERE t.relrowsecurity AND NOT u.rolsuper AND NOT u.rolbypassrls
          AND (t.relforcerowsecurity OR NOT pg_has_role(u.oid, t.relowner, 'USAGE'))
    )
"""
_COLUMNS = """
    WITH RECURSIVE base AS (
        SELECT attname, attnum, format_type(atttypid, NULL) AS kind, atttypid AS type
        FROM pg_attribute WHERE attrelid = :oid AND attnum > 0 AND NOT attisdropped
        UNION ALL SELECT attname, attnum, kind, typbasetype
        FROM base JOIN pg_type t ON t.oid = base.type WHERE t.typtype = 'd'
    )
    SELECT attname, attnum, kind, format_type(t.oid, NULL) AS base_kind,
           coalesce(element.typcategory, t.typcategory) AS category,
           t.typcategory = 'A' AS is_array, has_column_privilege(:oid, attnum, 'SELECT') AS is_readable
    FROM base JOIN pg_type t ON t.oid = base.type AND t.typtype <> 'd'
    LEFT JOIN pg_type element ON t.typcategory = 'A' AND element.oid = t.typelem
    ORDER BY attnum
"""


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        quoted: its name for SQL.
        number: its attnum.
        kind: its type's name.
        base_kind: the same; of a domain, that of its base type.
        category: the type's category in pg_type; for an array, that of its elements.
        is_array: whether the type is an array.
        is_readable: whether this user may read it.
    """

    quoted: str
    number: int
    kind: str
    base_kind: str
    category: str
    is_array: bool
    is_readable: bool

    @property
    def is_text(self) -> bool:
        """Whether it holds strings, enums or arrays of them."""
        return self.category in _TEXT_CATEGORIES

    def expression(self, separator: str) -> str:
        """SQL for the column's text; an array's elements are joined by the separator, an SQL literal."""
        return f"array_to_string({self.quoted}, {separator})" if self.is_array else self.quoted


@dataclass(frozen=True)
class Table:
    """A table or view.

    Attributes:
        oid: its identity.
        name: as in the settings, for messages.
        schema: its schema.
        relation: its name with the schema, quoted for SQL.
        columns: by name.
        row_security: whether policies may hide rows from this user.
    """

    oid: int
    name: str
    schema: str
    relation: str
    columns: dict[str, Column]
    row_security: bool


def find_table(connection: sa.Connection, name: str) -> Table | None:
    """The table of that name, first as written, then in lower case; None if it is in no schema of the search_path."""
    for schema, _, table in (each.rpartition(".") for each in (name, name.lower())):
        found = connection.execute(
            sa.text(f"""
                SELECT n.nspname, c.relname, c.oid
                FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                WHERE c.relname = :table AND {IS_TABLE}
                  AND CASE WHEN :schema = '' THEN pg_table_is_visible(c.oid) ELSE n.nspname = :schema END
            """),
            {"schema": schema, "table": table},
        ).one_or_none()
        if found is not None:
            oid = {"oid": found.oid}
            columns = {
                column: Column(quote(connection, column), *facts)
                for column, *facts in connection.execute(sa.text(_COLUMNS), oid)
            }
            relation = quote(connection, found.nspname, found.relname)
            row_security = bool(connection.scalar(sa.text(_ROW_SECURITY), oid))
            return Table(found.oid, name, found.nspname, relation, columns, row_security)
    return None


def find_primary_key(connection: sa.Connection, table: Table) -> list[str]:
    """The columns of a table's primary key; empty if it has none."""
    statement = """
        SELECT a.attname
        FROM pg_index i
        JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1])
        WHERE i.indisprimary AND i.indrelid = :oid
    """
    return list(connection.scalars(sa.text(statement), {"oid": table.oid}))


def quote(connection: sa.Connection, *parts: str) -> str:
    """A name, or the parts of a qualified name, quoted for SQL."""
    return cast(str, sql.Identifier(*parts).as_string(connection.connection.driver_connection))
