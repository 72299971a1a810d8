-- What a definition reads, from the catalog.

-- reads(relation): every relation that a view or a materialized view reads, also through views; not the view itself.
-- The catalog keeps no dependency on its own tables, so the stored query is searched for their numbers. What
-- PostgreSQL's own views read is left out.
CREATE OR REPLACE FUNCTION listener.reads(relation regclass)
RETURNS TABLE (relid oid, relkind "char")
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    WITH RECURSIVE walk (relid, relkind) AS (
        SELECT c.oid, c.relkind FROM pg_class c WHERE c.oid = relation
        UNION
        SELECT c.oid, c.relkind
        FROM walk w
        JOIN pg_rewrite r ON r.ev_class = w.relid AND w.relid >= 16384 AND (w.relkind = 'v' OR w.relid = relation)
        CROSS JOIN LATERAL (
            SELECT d.refobjid FROM pg_depend d
            WHERE d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid AND d.refclassid = 'pg_class'::regclass
            UNION ALL
            SELECT m.found[1]::oid FROM regexp_matches(r.ev_action::text, ':relid (\d{1,5}) ', 'g') AS m (found)
            WHERE m.found[1]::oid < 16384) AS d (refobjid)
        JOIN pg_class c ON c.oid = d.refobjid AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
    )
    SELECT w.relid, w.relkind FROM walk w WHERE w.relid <> relation
$function$;

-- query_of(relation): the query of a view or a materialized view, with every name qualified. Every session gets the
-- same text, and reads its dates and times as the same ones. Money is written, and read, as lc_monetary says.
CREATE OR REPLACE FUNCTION listener.query_of(relation oid) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp SET TimeZone = 'UTC' SET DateStyle = 'ISO, YMD'
SET IntervalStyle = 'postgres' SET extra_float_digits = 1 SET bytea_output = 'hex' SET quote_all_identifiers = off
SET standard_conforming_strings = on AS $function$
    SELECT pg_get_viewdef(relation)
$function$;

-- view_reads: which managed view reads the target of which other.
--   by_tenant: the rows of a tenant there are those of the same tenant here; else any of them may concern any tenant
CREATE OR REPLACE VIEW listener.view_reads AS
SELECT w.view_id, u.id AS upstream_id,
       (s.through_id IS NULL AND s.tenant_column = u.tenant_column AND v.tenant_type = u.tenant_type) IS TRUE AS by_tenant
FROM listener.managed_view u
JOIN pg_namespace n ON n.nspname = u.target_schema
JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = u.target_name
JOIN listener.source s ON s.relid = c.oid
JOIN listener.view_source w ON w.source_id = s.id
JOIN listener.managed_view v ON v.id = w.view_id;

-- view_upstream: the same with what those read in turn.
CREATE OR REPLACE VIEW listener.view_upstream AS
WITH RECURSIVE way (view_id, upstream_id, by_tenant) AS (
    SELECT r.view_id, r.upstream_id, r.by_tenant FROM listener.view_reads r
    UNION
    SELECT w.view_id, r.upstream_id, w.by_tenant AND r.by_tenant
    FROM way w JOIN listener.view_reads r ON r.view_id = w.upstream_id
)
SELECT w.view_id, w.upstream_id, bool_and(w.by_tenant) AS by_tenant FROM way w GROUP BY w.view_id, w.upstream_id;

-- check_cycles(): raises LSN03, naming them, where managed views read each other's targets in a circle: each refresh
-- would wake the next for ever.
CREATE OR REPLACE FUNCTION listener.check_cycles() RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    circle text[];
BEGIN
    WITH RECURSIVE way (start, at, names) AS (
        SELECT v.id, v.id, ARRAY[v.name] FROM listener.managed_view v
        WHERE v.id IN (SELECT u.view_id FROM listener.view_upstream u WHERE u.upstream_id = u.view_id)
        UNION ALL
        SELECT w.start, r.upstream_id, w.names || u.name
        FROM way w JOIN listener.view_reads r ON r.view_id = w.at
        JOIN listener.managed_view u ON u.id = r.upstream_id
        -- Round once, and no other circle on the way.
        WHERE (w.at <> w.start OR cardinality(w.names) = 1) AND (u.id = w.start OR u.name <> ALL (w.names))
    )
    SELECT w.names INTO circle FROM way w
    WHERE w.at = w.start AND cardinality(w.names) > 1 ORDER BY cardinality(w.names), w.start LIMIT 1;
    IF circle IS NOT NULL THEN
        RAISE EXCEPTION 'managed views would read each other in a circle: % reads %', circle[1],
                array_to_string(circle[2:], ', which reads ')
            USING ERRCODE = 'LSN03', HINT = 'Take the target of one of them out of what another reads.';
    END IF;
END
$function$;
