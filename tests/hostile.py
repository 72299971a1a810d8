"""What an application that may create objects can put in the way of SQL that other roles run.

Whatever of it is called counts in the sequence public.hijacked, which no rollback takes back, and then raises.
"""

from __future__ import annotations

from typing import LiteralString

from psycopg import sql

from conftest import Database

# What PostgreSQL 14 gave to everybody, and many databases still do.
ALLOW = "GRANT CREATE ON SCHEMA public TO {app}; GRANT TEMPORARY ON DATABASE {database} TO {app}"

# Run by the application's role. A name in the path's first schema wins; so does, in any, one whose parameters fit
# better than those of pg_catalog: "char" for text, name for text, anything for a polymorphic or variadic one.
PLANT: LiteralString = """
-- Or it would fall into its own traps.
SET search_path = pg_catalog;
CREATE SEQUENCE public.hijacked;
GRANT ALL ON SEQUENCE public.hijacked TO PUBLIC;
CREATE TYPE public.evil AS (word text);
DO $plant$
DECLARE
    wanted record;
    body text := $body$BEGIN
        PERFORM pg_catalog.nextval('public.hijacked');
        RAISE EXCEPTION 'hijacked: %%', %L USING ERRCODE = 'HIJCK';
    END$body$;
BEGIN
    -- Functions: with the parameters that those of pg_catalog have, and with others that may fit better.
    FOR wanted IN
        WITH used AS (
            SELECT DISTINCT c.proname, c.prokind FROM pg_proc c
            JOIN (SELECT DISTINCT m.word[1] AS word FROM pg_proc p
                  CROSS JOIN LATERAL regexp_matches(p.prosrc, '(\\w+)\\(', 'g') AS m (word)
                  WHERE p.pronamespace = 'listener'::regnamespace) w ON w.word = c.proname
            WHERE c.pronamespace = 'pg_catalog'::regnamespace
        ), simple (type, number) AS (
            SELECT t.type, t.number FROM unnest(ARRAY['text', 'name', 'integer', 'bigint', 'oid', '"char"', 'regclass',
                'smallint', 'uuid', 'text[]', 'name[]', 'integer[]']) WITH ORDINALITY AS t (type, number)
        )
        SELECT DISTINCT ON (u.proname, a.arguments) u.proname, a.arguments, a.result
        FROM used u CROSS JOIN LATERAL (
            SELECT 1, oidvectortypes(p.proargtypes),
                   CASE WHEN p.proretset THEN 'SETOF ' ELSE '' END || format_type(p.prorettype, NULL)
            FROM pg_proc p WHERE p.proname = u.proname AND p.pronamespace = 'pg_catalog'::regnamespace
                             AND p.prokind = 'f' AND p.proargmodes IS NULL
                             AND NOT 'internal'::regtype = ANY (p.proargtypes)
                             AND NOT 'cstring'::regtype = ANY (p.proargtypes)
            UNION ALL SELECT 2, s.type, 'text' FROM simple s
            UNION ALL SELECT 2, s.type || ', ' || r.type, 'text' FROM simple s, simple r
                      WHERE s.number < 6 AND r.number < 6
            UNION ALL SELECT 2, 'text, ' || s.type || ', ' || r.type, 'text' FROM simple s, simple r
                      WHERE s.number < 4 AND r.number < 4) AS a (ord, arguments, result)
        ORDER BY u.proname, a.arguments, a.ord
    LOOP
        EXECUTE format('CREATE FUNCTION public.%I(%s) RETURNS %s LANGUAGE plpgsql AS %L', wanted.proname,
                       wanted.arguments, wanted.result, format(body, wanted.proname || '(' || wanted.arguments || ')'));
    END LOOP;
    -- Operators, of all pairs of types.
    FOR wanted IN
        SELECT o.name, o.result, l.type AS l, r.type AS r
        FROM (VALUES ('=', 'boolean'), ('<>', 'boolean'), ('<', 'boolean'), ('>', 'boolean'), ('<=', 'boolean'),
                     ('>=', 'boolean'), ('~', 'boolean'), ('||', 'text'), ('+', 'bigint'), ('*', 'bigint'))
            AS o (name, result)
        CROSS JOIN unnest(ARRAY['text', 'name', 'integer', 'bigint', 'oid', '"char"', 'regclass', 'name[]', 'integer[]',
                                'uuid', 'double precision', 'public.evil']) AS l (type)
        CROSS JOIN unnest(ARRAY['text', 'name', 'integer', 'bigint', 'oid', '"char"', 'regclass', 'name[]', 'integer[]',
                                'uuid', 'double precision', 'public.evil']) AS r (type)
        -- A literal beside a number would be taken for a number too, and not be one.
        WHERE NOT (o.name = '||' AND l.type = r.type AND l.type NOT IN ('text', 'name'))
    LOOP
        EXECUTE format('CREATE OR REPLACE FUNCTION public.%I(%s, %s) RETURNS %s LANGUAGE plpgsql AS %L',
                       'operator' || wanted.name, wanted.l, wanted.r, wanted.result,
                       format(body, concat_ws(' ', wanted.l, wanted.name, wanted.r)));
        EXECUTE format('CREATE OPERATOR public.%s (LEFTARG = %s, RIGHTARG = %s, FUNCTION = public.%I)', wanted.name,
                       wanted.l, wanted.r, 'operator' || wanted.name);
    END LOOP;
    -- Casts to a type of the application's own, taken wherever nothing else fits.
    FOR wanted IN SELECT t.type FROM unnest('{text,name,integer,bigint,uuid,regclass}'::text[]) AS t (type) LOOP
        EXECUTE format('CREATE FUNCTION public.to_evil(%s) RETURNS public.evil LANGUAGE plpgsql AS %L', wanted.type,
                       format(body, 'cast of ' || wanted.type));
        EXECUTE format('CREATE CAST (%1$s AS public.evil) WITH FUNCTION public.to_evil(%1$s) AS IMPLICIT', wanted.type);
    END LOOP;
    CREATE FUNCTION public.spring() RETURNS boolean LANGUAGE plpgsql AS $spring$BEGIN
        PERFORM pg_catalog.nextval('public.hijacked');
        RETURN true;
    END$spring$;
    -- Types, whose conversion calls something.
    FOR wanted IN SELECT t.type FROM unnest('{text,uuid,name,jsonb,xid,xid8,regclass}'::text[]) AS t (type) LOOP
        EXECUTE format('CREATE DOMAIN public.%I AS pg_catalog.%1$I CHECK (public.spring())', wanted.type);
    END LOOP;
END
$plant$;
"""

# In a session of the application's own: names that are looked up before any other unless the path says otherwise.
PLANT_IN_SESSION: LiteralString = """
DO $plant$
DECLARE
    wanted record;
BEGIN
    FOR wanted IN
        SELECT DISTINCT c.relname FROM pg_catalog.pg_class c -- other sessions have tables of these names, too
        WHERE (c.relnamespace = 'listener'::pg_catalog.regnamespace AND c.relkind IN ('r', 'v', 'S'))
           OR c.relname IN ('pg_class', 'pg_proc', 'pg_attribute', 'pg_trigger', 'pg_roles', 'pg_locks', 'pg_namespace',
                            'pg_database', 'pg_type', 'new_rows', 'old_rows', 'touched', 'fresh', 'gone', 'changed')
    LOOP
        EXECUTE pg_catalog.format('CREATE TEMPORARY TABLE %I (word text CHECK (public.spring()))', wanted.relname);
    END LOOP;
    FOR wanted IN
        SELECT t.type FROM pg_catalog.unnest('{text,uuid,name,jsonb,xid,xid8,regclass}'::pg_catalog._text) AS t (type)
    LOOP
        EXECUTE pg_catalog.format('CREATE DOMAIN pg_temp.%I AS pg_catalog.%1$I CHECK (public.spring())', wanted.type);
    END LOOP;
END
$plant$;
SET search_path = pg_temp, public, pg_catalog;
"""


async def plant(database: Database, app: str) -> None:
    """Lets the application's role create objects, and has it create all of these."""
    async with database.connect() as superuser:
        await superuser.execute(sql.SQL(ALLOW).format(app=sql.Identifier(app), database=sql.Identifier(database.name)))
    async with database.connect(app) as application:
        await application.execute(PLANT)


async def hijacked(database: Database) -> int:
    """How often anything of it was called."""
    async with database.connect() as superuser:
        cursor = await superuser.execute(
            "SELECT CASE WHEN s.is_called THEN s.last_value ELSE 0 END FROM public.hijacked s"
        )
        row = await cursor.fetchone()
        assert row is not None
        return int(row[0])
