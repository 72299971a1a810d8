-- Reading a plan of PostgreSQL's: which scans there are, and what its conditions say of their columns. What all this is
-- for, and why it may be trusted, stands in 20_scope.sql. The longer ones are PL/pgSQL's, whose plans a session keeps:
-- planning them took longer than running them.

-- plan_nodes(plan): the nodes of a plan as EXPLAIN (FORMAT JSON) gives it, each with its path from the root: the place of
-- each ancestor among its siblings, and its own.
CREATE OR REPLACE FUNCTION listener.plan_nodes(plan jsonb) RETURNS TABLE (path integer[], node jsonb)
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $function$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        WITH RECURSIVE walk (path, node) AS (
            SELECT '{1}'::integer[], plan -> 0 -> 'Plan'
            UNION ALL
            SELECT w.path || c.ord::integer, c.node
            FROM walk w CROSS JOIN LATERAL jsonb_array_elements(w.node -> 'Plans') WITH ORDINALITY AS c (node, ord)
        )
        SELECT w.path, w.node - 'Plans' FROM walk w;
END
$function$;

-- plain_text(text, constant): a text of a plan in which nothing is quoted: the constant is K, any other one L, and a quoted
-- name is Q and a hash, which no unquoted name can be.
CREATE OR REPLACE FUNCTION listener.plain_text(qual text, constant text) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT regexp_replace(string_agg(CASE
               WHEN t.part[1] = quote_literal(constant) THEN 'K'
               WHEN t.part[1] LIKE '''%' THEN 'L'
               WHEN t.part[1] LIKE '"%' THEN 'Q' || md5(t.part[1])
               ELSE replace(t.part[1], 'character varying', 'varchar') END, '' ORDER BY t.ord),
               -- An integer is not quoted.
               CASE WHEN constant ~ '^[0-9]+$' THEN '\m' || constant || '\M' ELSE 'K' END, 'K', 'g')
    FROM regexp_matches(qual, '''(?:[^'']|'''')*''|"(?:[^"]|"")*"|[^''"]+', 'g') WITH ORDINALITY AS t (part, ord)
$function$;

-- and_members(qual): the members of an AND, through brackets; the condition itself where it is none. qual as plain_text()
-- gives it: the server puts brackets around each member.
CREATE OR REPLACE FUNCTION listener.and_members(qual text) RETURNS SETOF text
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    depth integer := 0;
    opened integer;
    started integer := 1;
    whole boolean := left(qual, 1) = '(';
    members text[] := ARRAY[]::text[];
    found record;
BEGIN
    FOR found IN
        SELECT m.part[1] AS part, (sum(length(m.part[1])) OVER (ORDER BY m.ord))::integer AS ends
        FROM regexp_matches(qual, '[()]| (?:AND|OR) |[^() ]+| ', 'g') WITH ORDINALITY AS m (part, ord) ORDER BY m.ord
    LOOP
        IF found.part = '(' THEN
            depth := depth + 1;
        ELSIF found.part = ')' THEN
            depth := depth - 1;
            whole := whole AND (depth > 0 OR found.ends = length(qual));
        ELSIF depth = 0 AND found.part = ' OR ' THEN
            RETURN NEXT qual;
            RETURN;
        ELSIF depth = 0 AND found.part = ' AND ' THEN
            opened := found.ends - length(found.part);
            members := members || substr(qual, started, opened - started + 1);
            started := found.ends + 1;
        END IF;
    END LOOP;
    IF cardinality(members) > 0 THEN
        RETURN QUERY SELECT a.member FROM unnest(members || substr(qual, started)) AS m (part)
                     CROSS JOIN LATERAL listener.and_members(m.part) AS a (member);
    ELSIF whole THEN
        RETURN QUERY SELECT a.member FROM listener.and_members(substr(qual, 2, length(qual) - 2)) AS a (member);
    ELSE
        RETURN NEXT qual;
    END IF;
END
$function$;

-- uncast(term): the term without its casts, and the casts from the innermost on: t for text or varchar, n for an
-- integer, u for uuid. keeps_tenant() says which of them matter.
CREATE OR REPLACE FUNCTION listener.uncast(INOUT term text, OUT casts text)
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $function$
    WITH RECURSIVE peeled (term, casts) AS (
        SELECT uncast.term, ''
        UNION ALL
        SELECT t.part[1], CASE WHEN t.part[2] IN ('text', 'varchar') THEN 't' WHEN t.part[2] = 'uuid' THEN 'u' ELSE 'n' END || p.casts
        FROM peeled p
        CROSS JOIN LATERAL regexp_match(p.term, '^\((.+)\)::(uuid|text|varchar|bigint|integer|smallint)$') AS t (part)
        WHERE t.part IS NOT NULL
    )
    SELECT p.term, p.casts FROM peeled p ORDER BY length(p.casts) DESC LIMIT 1
$function$;

-- equalities(qual, constant): what a condition says is equal whenever it is true; each both ways. A side is a column of an
-- alias, as plain_text() writes names, or the constant, where alias and name are NULL; and the casts that it went
-- through.
CREATE OR REPLACE FUNCTION listener.equalities(qual text, constant text)
RETURNS TABLE (alias text, name text, casts text, other_alias text, other_name text, other_casts text)
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $function$
    WITH sides AS (
        SELECT regexp_match(a.term, t.pattern) AS a, a.casts AS a_casts, regexp_match(b.term, t.pattern) AS b, b.casts AS b_casts
        FROM listener.and_members(listener.plain_text(qual, constant)) AS m (member)
        CROSS JOIN LATERAL regexp_match(m.member, '^([^ ]+) = ([^ ]+)$') AS s (part)
        CROSS JOIN LATERAL listener.uncast(s.part[1]) AS a
        CROSS JOIN LATERAL listener.uncast(s.part[2]) AS b
        CROSS JOIN (VALUES ('^(?:(K)(?:::(?:uuid|text|bigint))?|'
                            '([a-z_][a-z0-9_]*|Q[0-9a-f]{32})\.([a-z_][a-z0-9_]*|Q[0-9a-f]{32}))$')) AS t (pattern)
        WHERE s.part IS NOT NULL
    )
    SELECT x.a[2], x.a[3], x.a_casts, x.b[2], x.b[3], x.b_casts
    FROM (SELECT s.a, s.a_casts, s.b, s.b_casts FROM sides s UNION ALL SELECT s.b, s.b_casts, s.a, s.a_casts FROM sides s)
         AS x (a, a_casts, b, b_casts)
    WHERE x.a[2] IS NOT NULL AND x.b IS NOT NULL
$function$;

-- plan_scans(plan): the scans of tables, by the alias that the plan's texts name them by, as plain_text() writes it.
CREATE OR REPLACE FUNCTION listener.plan_scans(plan jsonb) RETURNS TABLE (path integer[], alias text, node jsonb)
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT n.path, listener.plain_text(quote_ident(n.node ->> 'Alias'), ''), n.node
    FROM listener.plan_nodes(plan) n WHERE n.node ? 'Relation Name'
$function$;

-- implied(plan, constant): what the conditions of a plan make of each other: only rows of `alias` in which the column
-- `name` has the tenant's value matter to the result, if that is so for other_name of other_alias; where that is NULL, it is
-- so by the constant itself. Both are compared after their casts.
CREATE OR REPLACE FUNCTION listener.implied(plan jsonb, constant text)
RETURNS TABLE (alias text, name text, casts text, other_alias text, other_name text, other_casts text)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        WITH nodes AS MATERIALIZED (
            SELECT n.path, cardinality(n.path) AS depth, n.node ->> 'Node Type' AS type, n.node FROM listener.plan_nodes(plan) n
        ), scans AS MATERIALIZED (
            -- Two with one alias: neither is meant for certain.
            SELECT s.path, s.alias FROM (
                SELECT listener.plain_text(quote_ident(n.node ->> 'Alias'), '') AS alias, n.path, n.node ? 'Relation Name' AS is_scan,
                       count(*) OVER (PARTITION BY n.node ->> 'Alias') AS named
                FROM nodes n WHERE n.node ? 'Alias') s
            WHERE s.is_scan AND s.named = 1
        ), conditions AS MATERIALIZED (
            SELECT n.path, n.depth, n.type, n.node ->> 'Join Type' AS join_type, c.kind, e.*
            FROM nodes n
            CROSS JOIN unnest('{Filter,Index Cond,Hash Cond,Merge Cond,Join Filter}'::text[]) AS c (kind)
            CROSS JOIN LATERAL listener.equalities(n.node ->> c.kind, constant) e
        ), named AS MATERIALIZED (
            -- The scan that is meant, and the one that it is set equal to.
            SELECT c.*, s.path AS scan, o.path AS other
            FROM conditions c
            JOIN scans s ON s.alias = c.alias
            LEFT JOIN scans o ON o.alias = c.other_alias
            WHERE (c.other_alias IS NULL OR o.alias IS NOT NULL)
              -- Through a set operation a name is not that of one scan.
              AND NOT EXISTS (
                  SELECT FROM nodes b
                  WHERE b.type IN ('Append', 'Merge Append', 'SetOp', 'Recursive Union')
                    AND ((b.path = o.path[:b.depth] AND o.path[:b.depth + 1] IS DISTINCT FROM c.path[:b.depth + 1])
                      OR (b.path = s.path[:b.depth] AND s.path[:b.depth + 1] IS DISTINCT FROM c.path[:b.depth + 1])))
        )
        SELECT n.alias, n.name, n.casts, n.other_alias, n.other_name, n.other_casts FROM named n
        WHERE n.path = n.scan AND n.kind IN ('Filter', 'Index Cond')
          AND n.type IN ('Seq Scan', 'Index Scan', 'Index Only Scan', 'Bitmap Heap Scan')
        UNION
        SELECT n.alias, n.name, n.casts, n.other_alias, n.other_name, n.other_casts
        FROM named n
        -- The side of the join on which the scan is.
        JOIN nodes side ON side.path = n.scan[:n.depth + 1]
        WHERE n.kind IN ('Hash Cond', 'Merge Cond', 'Join Filter')
          AND n.type IN ('Nested Loop', 'Hash Join', 'Merge Join')
          AND n.path = n.scan[:n.depth] AND n.path = n.other[:n.depth] AND n.scan[n.depth + 1] <> n.other[n.depth + 1]
          -- A row of it without a partner is dropped.
          AND (n.join_type, side.node ->> 'Parent Relationship') IN (
              VALUES ('Inner', 'Outer'), ('Inner', 'Inner'), ('Semi', 'Outer'), ('Semi', 'Inner'), ('Right Semi', 'Outer'),
                     ('Right Semi', 'Inner'), ('Left', 'Inner'), ('Right', 'Outer'), ('Anti', 'Inner'), ('Right Anti', 'Outer'))
          AND NOT EXISTS (
              SELECT FROM nodes b
              WHERE b.depth > n.depth AND b.path = n.scan[:b.depth]
                AND (coalesce(b.node ->> 'Parent Relationship', '') NOT IN ('Outer', 'Inner')
                     OR (b.path <> n.scan
                         AND b.type NOT IN ('Hash', 'Sort', 'Incremental Sort', 'Materialize', 'Result', 'Nested Loop', 'Hash Join',
                                            'Merge Join')
                         AND NOT (b.type IN ('Aggregate', 'Group') AND NOT b.node ? 'Grouping Sets' AND EXISTS (
                             SELECT FROM jsonb_array_elements_text(b.node -> 'Group Key') k (key)
                             WHERE listener.plain_text(k.key, '') = n.alias || '.' || n.name)))));
END
$function$;

-- index_scans(plan, constant): of each scan of a table, the relation, its alias and whether an index finds the rows that its
-- conditions ask for: the index's first column is set equal to something. A scan through a whole index is none.
CREATE OR REPLACE FUNCTION listener.index_scans(plan jsonb, constant text)
RETURNS TABLE (relid oid, alias text, indexed boolean, filter text)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        WITH nodes AS MATERIALIZED (SELECT n.path, n.node FROM listener.plan_nodes(plan) n),
        scans AS MATERIALIZED (
            SELECT s.path, s.alias, c.oid AS relid, listener.plain_text(s.node ->> 'Filter', constant) AS filter
            FROM listener.plan_scans(plan) s
            JOIN pg_namespace n ON n.nspname = s.node ->> 'Schema'
            JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = s.node ->> 'Relation Name'
        )
        SELECT s.relid, s.alias, EXISTS (
            SELECT FROM nodes n
            JOIN pg_index x ON x.indrelid = s.relid
            JOIN pg_class i ON i.oid = x.indexrelid AND i.relname = n.node ->> 'Index Name'
            CROSS JOIN LATERAL listener.and_members(listener.plain_text(n.node ->> 'Index Cond', constant)) AS m (member)
            LEFT JOIN pg_attribute a ON a.attrelid = x.indrelid AND a.attnum = x.indkey[0]
            -- Of a bitmap's scan the index is named below it.
            WHERE n.path[:cardinality(s.path)] = s.path
              AND CASE WHEN x.indkey[0] = 0 THEN m.member ~ ' = K(::[a-z]+)?$'
                       ELSE m.member ~ format('^\(*%s\.%s(\)::[a-z]+)* = ', s.alias, listener.plain_text(quote_ident(a.attname), ''))
                            AND EXISTS (SELECT FROM listener.equalities(n.node ->> 'Index Cond', constant) e WHERE e.alias = s.alias) END),
            s.filter
        FROM scans s;
END
$function$;
