"""Messages about a songs table that cannot be used: what is wrong, and the statements and settings that fix it.

When to add here: the message for another defect of a table. Keep out: the checks themselves (`source`).
"""

from collections.abc import Sequence

import sqlalchemy as sa

from songvec_assets.songs.songs_table import IS_TABLE, Table, quote


def describe_missing(connection: sa.Connection, name: str) -> str:
    """Why no table of that name is found: its schema is not searched or not permitted, or there is no such table."""
    elsewhere = connection.execute(
        sa.text(f"""
            SELECT n.nspname, c.relname, has_schema_privilege(n.oid, 'USAGE') AS usable
            FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
            WHERE c.relname = ANY (:tables) AND {IS_TABLE} AND n.nspname !~ '^pg_|^information_schema$'
            ORDER BY usable DESC, n.nspname
        """),
        {"tables": [each.rpartition(".")[2] for each in (name, name.lower())]},
    ).all()
    usable = [f"{found}.{table}" for found, table, usable in elsewhere if usable]
    if usable:
        return (
            f"table {name} is not in a schema that is searched, this database has one elsewhere: set "
            f"SONGVEC_SONGS_TABLE={' or '.join(usable)}"
        )
    if elsewhere:
        found, table, _ = elsewhere[0]
        return (
            f"table {name} is in a schema that this user lacks a right on: let its owner run "
            f"GRANT USAGE ON SCHEMA {quote(connection, found)} TO {_user(connection)}; then set "
            f"SONGVEC_SONGS_TABLE={found}.{table}"
        )
    return (
        f"this database has no table {name} in any schema: name the table of songs with SONGVEC_SONGS_TABLE, also as "
        "schema.table, or correct POSTGRES_URL"
    )


def list_grants(connection: sa.Connection, table: Table, wanted: Sequence[str]) -> list[str]:
    """The statements that the table's owner must run before this user may read some of its columns."""
    usable = connection.scalar(sa.text("SELECT has_schema_privilege(:schema, 'USAGE')"), {"schema": table.schema})
    user = _user(connection)
    grants = [] if usable else [f"GRANT USAGE ON SCHEMA {quote(connection, table.schema)} TO {user};"]
    lacking = [table.columns[each].quoted for each in wanted if not table.columns[each].is_readable]
    if lacking:
        columns = f" ({', '.join(lacking)})" if len(lacking) < len(wanted) else ""
        grants.append(f"GRANT SELECT{columns} ON {table.relation} TO {user};")
    return grants


def _user(connection: sa.Connection) -> str:
    return quote(connection, str(connection.scalar(sa.text("SELECT current_user"))))


def describe_types(
    connection: sa.Connection, table: Table, song_id: str, kept: Sequence[str], texts: Sequence[str]
) -> str:
    """Which columns are not text, and a view that has text instead.

    Args:
        table: with columns of other types.
        song_id: its id column.
        kept: columns that the view must have.
        texts: columns that must be text.
    """
    wrong = [column for column in texts if not table.columns[column].is_text]
    joins: list[str] = []
    selected = []
    for column in dict.fromkeys(kept):
        quoted = table.columns[column].quoted
        expression = f"s.{quoted}"
        if column in wrong:
            join, text = _make_text(connection, table, column, f"t{len(joins) + 1}")
            joins += join
            expression = f"{text} AS {quoted}"
        selected.append(expression)
    view = f"{table.name.rpartition('.')[2]}_as_text"
    kinds = ", ".join(f"column {column!r} is {table.columns[column].kind}" for column in dict.fromkeys(wrong))
    return (
        f"table {table.name}: expected text to embed, got other types: {kinds}. Create a view that has text there "
        "(look it over: the columns it takes are a guess) and set "
        f"SONGVEC_SONGS_TABLE={table.schema}.{view} SONGVEC_SONG_ID_COLUMN={song_id}: "
        f"CREATE VIEW {quote(connection, table.schema, view)} AS SELECT {', '.join(selected)} "
        f"FROM {' '.join([f'{table.relation} AS s', *joins])};"
    )


def _make_text(connection: sa.Connection, table: Table, column: str, alias: str) -> tuple[list[str], str]:
    """The joins (one or none) and the SQL expression that turn a column into text."""
    facts = table.columns[column]
    value = f"s.{facts.quoted}"
    referenced = connection.execute(
        sa.text("""
            SELECT n.nspname, c.relname, k.attname AS key, a.attname AS text
            FROM pg_constraint f
            JOIN pg_class c ON c.oid = f.confrelid JOIN pg_namespace n ON n.oid = c.relnamespace
            JOIN pg_attribute k ON k.attrelid = c.oid AND k.attnum = f.confkey[1]
            JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
            JOIN pg_type t ON t.oid = a.atttypid AND t.typcategory = 'S'
            WHERE f.contype = 'f' AND f.conrelid = :oid AND f.conkey = ARRAY[CAST(:number AS smallint)]
            ORDER BY a.attname IN ('name', 'title', :column) DESC, a.attnum LIMIT 1
        """),
        {"oid": table.oid, "number": facts.number, "column": column},
    ).one_or_none()
    if referenced is not None:
        other = quote(connection, referenced.nspname, referenced.relname)
        key, text = (quote(connection, each) for each in (referenced.key, referenced.text))
        return [f"LEFT JOIN {other} AS {alias} ON {alias}.{key} = {value}"], f"{alias}.{text}"
    if facts.is_array:
        return [], f"array_to_string({value}, ', ')"
    kind = facts.kind
    if kind in ("json", "jsonb"):
        return [], (
            f"CASE {kind}_typeof({value}) WHEN 'object' THEN {value} ->> 'text' WHEN 'array' THEN "
            f"(SELECT string_agg(line, E'\\n') FROM {kind}_array_elements_text({value}) AS line) "
            f"ELSE {value} #>> '{{}}' END"
        )
    return [], f"convert_from({value}, 'UTF8')" if kind == "bytea" else f"{value}::text"


def describe_numbering(connection: sa.Connection, table: Table, column: str) -> str:
    """The statements that number the songs of a table whose ids are not INTEGER, and the settings for the view."""
    base = table.name.rpartition(".")[2].lower()
    numbers, view = (quote(connection, table.schema, f"{base}_{end}") for end in ("numbers", "numbered"))
    song_id = table.columns[column].quoted
    return (
        # row_number() would change with each new song, and detach songs from the vectors that were paid for
        "number the songs in a separate table, so that their numbers never change: "
        f"CREATE TABLE {numbers} (song_number integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY, "
        f"{song_id} {table.columns[column].kind} NOT NULL UNIQUE); "
        f"INSERT INTO {numbers} ({song_id}) SELECT {song_id} FROM {table.relation} ON CONFLICT DO NOTHING; "
        f"CREATE VIEW {view} AS SELECT n.song_number, s.* FROM {table.relation} AS s "
        f"JOIN {numbers} AS n ON n.{song_id} = s.{song_id}; "
        f"set SONGVEC_SONGS_TABLE={table.schema}.{base}_numbered SONGVEC_SONG_ID_COLUMN=song_number, and run the "
        "INSERT again after new songs"
    )
