-- What a view or a materialized view reads, through views, and how the rows of each table find their tenant.

-- tenant_views(relation): the views through which a view or a materialized view reads, each with how deep it stands. The planner
-- expects many, and would read the catalog of dependencies whole.
CREATE OR REPLACE FUNCTION listener.tenant_views(relation regclass) RETURNS TABLE (relid oid, depth integer) ROWS 5
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $function$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        WITH RECURSIVE walk (relid, depth) AS (
            SELECT relation::oid, 0
            UNION
            SELECT c.oid, w.depth + 1
            FROM walk w
            JOIN pg_rewrite r ON r.ev_class = w.relid
            JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid AND d.refclassid = 'pg_class'::regclass
            JOIN pg_class c ON c.oid = d.refobjid AND c.relkind = 'v' AND c.oid <> w.relid
        )
        SELECT w.relid, max(w.depth) FROM walk w WHERE w.depth > 0 GROUP BY w.relid;
END
$function$;

-- tenant_inputs(relation, tenant_column): what a view or a materialized view reads, through views, and how the rows of each
-- find their tenant, as register_sources() would have it: by name or, where a look-up says so, through another.
--   through_id, keys, referenced: of a look-up. name, keys and referenced are columns' names as they are now.
CREATE OR REPLACE FUNCTION listener.tenant_inputs(relation regclass, tenant_column name)
RETURNS TABLE (relid oid, relkind "char", source_id integer, name name, through_id integer, through_relid oid,
    keys name[], referenced name[]) ROWS 5
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $function$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        WITH read AS (
            SELECT DISTINCT c.oid, c.relkind
            FROM (SELECT relation::oid AS relid UNION SELECT v.relid FROM listener.tenant_views(relation) v) v
            JOIN pg_rewrite r ON r.ev_class = v.relid
            JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid AND d.refclassid = 'pg_class'::regclass
            JOIN pg_class c ON c.oid = d.refobjid AND c.relkind IN ('r', 'p', 'm', 'f') AND c.oid <> relation
        )
        SELECT r.oid, r.relkind, known.id,
               CASE WHEN known.id IS NULL THEN a.attname
                    WHEN known.tenant_column IS NOT NULL THEN coalesce(
                        (SELECT t.attname FROM listener.tracked('tenant_of_' || known.id) t), known.tenant_column) END,
               known.through_id, (SELECT s.relid FROM listener.source s WHERE s.id = known.through_id),
               listener.tracked_names(known.through_keys, 'key_of_' || known.id),
               listener.tracked_names(known.through_references, 'reference_of_' || known.id)
        FROM read r
        LEFT JOIN pg_attribute a ON a.attrelid = r.oid AND a.attname = tenant_inputs.tenant_column
                                AND a.attnum > 0 AND NOT a.attisdropped
        LEFT JOIN LATERAL (
            SELECT s.* FROM listener.source s
            WHERE s.relid = r.oid AND (s.explicit OR (a.attname IS NULL AND EXISTS (
                SELECT FROM listener.source o WHERE o.through_id = s.id)))
            ORDER BY s.explicit DESC, s.id LIMIT 1) known ON true;
END
$function$;
