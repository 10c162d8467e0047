"""What users have added to a table, by the system catalog: what can be copied to its replacement, and what cannot.

When to add here: another property of tables, of a later PostgreSQL. Keep out: which table replaces which
(`vectors.swap`).
"""

import contextlib
from collections.abc import Collection, Iterator

import sqlalchemy as sa
from sqlalchemy import text

from songvec_assets.postgres.engine import raw_cursor

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

# statements that copy properties to the table %(new)s; their order matters
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


def find_attachments(connection: sa.Connection, table: str, indexes: Collection[str]) -> list[str]:
    """What users have added to a table and would be left behind if another table replaced it.

    Args:
        indexes: names of indexes to ignore, which this package created.
    """
    return list(connection.scalars(text(_ATTACHMENTS), {"table": table, "indexes": list(indexes)}))


@contextlib.contextmanager
def copying_properties(connection: sa.Connection, table: str, new: str) -> Iterator[None]:
    """Copy a table's owner, rights, options, comments and statistics to the table that replaces it.

    Rights that only the new table has, for example by default privileges, are revoked. Extended statistics have unique
    names, so they are dropped, and created again after the block has renamed the tables.
    """
    statistics = connection.execute(text(_STATISTICS), {"table": table}).all()
    with raw_cursor(connection) as cursor:  # names and comments may hold colons and percent signs
        cursor.execute(_PROPERTIES.format(new=new, grantee=_GRANTEE), {"table": table, "new": new})
        for (statement,) in cursor.fetchall():
            cursor.execute(statement)
        for name, _ in statistics:
            cursor.execute(f"DROP STATISTICS {name}")
        yield
        for _, definition in statistics:
            cursor.execute(definition)
