"""What readers and the catalog see of a relation: for comparing one with what takes its place."""

from __future__ import annotations

from typing import Any, LiteralString

from psycopg import AsyncConnection

from shop import one, rows

COLUMNS: LiteralString = """
    SELECT a.attname::text, format_type(a.atttypid, a.atttypmod), a.attcollation::regcollation::text,
           nullif(a.attstattarget, -1), col_description(a.attrelid, a.attnum)
    FROM pg_attribute a WHERE a.attrelid = %s::regclass AND a.attnum > 0 ORDER BY a.attnum
"""
INDEXES: LiteralString = """
    SELECT c.relname::text, pg_get_indexdef(c.oid), obj_description(c.oid, 'pg_class')
    FROM pg_index x JOIN pg_class c ON c.oid = x.indexrelid WHERE x.indrelid = %s::regclass ORDER BY 1
"""
GRANTS: LiteralString = """
    SELECT g.column, pg_get_userbyid(x.grantor)::text, x.grantee::regrole::text, x.privilege_type, x.is_grantable
    FROM (SELECT NULL, c.relacl, c.relowner FROM pg_class c WHERE c.oid = %(relation)s::regclass
          UNION ALL SELECT a.attname::text, a.attacl, c.relowner
          FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid WHERE c.oid = %(relation)s::regclass)
        AS g ("column", acl, owner)
    CROSS JOIN LATERAL aclexplode(g.acl) x WHERE x.grantee <> g.owner ORDER BY 1 NULLS FIRST, 3, 4, 2
"""
VIEWS: LiteralString = """
    SELECT c.oid::regclass::text, pg_get_viewdef(c.oid), c.reloptions, c.relacl::text, c.relowner::regrole::text,
           obj_description(c.oid, 'pg_class')
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind = 'v' AND n.nspname = 'reporting' ORDER BY 1
"""
# What an adoption under way could leave behind.
LEFTOVERS: LiteralString = """
    SELECT c.oid::regclass::text FROM pg_class c WHERE c.relname ~ '^listener_(alter|back|new|old)_'
    UNION ALL SELECT 'adoption of ' || relation_name FROM listener.adoption WHERE state <> 'adopted'
    UNION ALL SELECT 'trigger ' || tgname FROM pg_trigger WHERE tgname LIKE 'listener\\_%'
                                                            AND NOT EXISTS (SELECT FROM listener.source)
"""


async def likeness(superuser: AsyncConnection[Any], relation: str) -> dict[str, Any]:
    """Columns, indexes, grants, comment, owner, options and the views of its schema."""
    return {
        "columns": await rows(superuser, COLUMNS, relation),
        "indexes": await rows(superuser, INDEXES, relation),
        "grants": await (await superuser.execute(GRANTS, {"relation": relation})).fetchall(),
        "comment": await one(superuser, "SELECT obj_description(%s::regclass, 'pg_class')", relation),
        "owner": await one(
            superuser, "SELECT relowner::regrole::text FROM pg_class WHERE oid = %s::regclass", relation
        ),
        "options": await rows(
            superuser, "SELECT unnest(reloptions) FROM pg_class WHERE oid = %s::regclass ORDER BY 1", relation
        ),
        "views": await rows(superuser, VIEWS),
    }


async def kind(superuser: AsyncConnection[Any], relation: str) -> str:
    """`m` a materialized view, `r` a table."""
    return str(await one(superuser, "SELECT relkind FROM pg_class WHERE oid = %s::regclass", relation))
