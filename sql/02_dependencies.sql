-- What a definition reads, from the catalog.

-- reads(relation): every relation that a view reads, through views, the view itself left out.
CREATE OR REPLACE FUNCTION listener.reads(relation regclass)
RETURNS TABLE (relid oid, relkind "char")
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    WITH RECURSIVE walk (relid, relkind) AS (
        SELECT c.oid, c.relkind FROM pg_class c WHERE c.oid = relation
        UNION
        SELECT c.oid, c.relkind
        FROM walk w
        JOIN pg_rewrite r ON r.ev_class = w.relid AND w.relkind = 'v'
        JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid
                        AND d.refclassid = 'pg_class'::regclass
        JOIN pg_class c ON c.oid = d.refobjid AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
    )
    SELECT w.relid, w.relkind FROM walk w WHERE w.relid <> relation
$function$;

-- hiding_functions(relation): the functions called by a view, or by views it reads, that could read a table which the
-- catalog does not know of: written by a user, not IMMUTABLE, not part of an extension.
CREATE OR REPLACE FUNCTION listener.hiding_functions(relation regclass) RETURNS TABLE (funcid oid)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT DISTINCT p.oid
    FROM (SELECT relation::oid AS relid UNION SELECT r.relid FROM listener.reads(relation) r WHERE r.relkind = 'v') v
    JOIN pg_rewrite w ON w.ev_class = v.relid
    JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = w.oid AND d.refclassid = 'pg_proc'::regclass
    JOIN pg_proc p ON p.oid = d.refobjid
    WHERE p.provolatile <> 'i'
      AND (p.pronamespace NOT IN ('pg_catalog'::regnamespace, 'information_schema'::regnamespace)
           -- These run a query, or read a table, that they are given by name.
           OR p.proname ~ '^(query|cursor|table|schema|database)_to_xml' OR p.proname = 'ts_stat')
      AND NOT EXISTS (SELECT FROM pg_depend e
                      WHERE e.classid = 'pg_proc'::regclass AND e.objid = p.oid AND e.deptype = 'e')
$function$;

-- fingerprint(relation): changes whenever the text of the view, of a view it reads or of a function they call does.
-- CREATE OR REPLACE can add a table to either, and no dependency of the definition would change.
CREATE OR REPLACE FUNCTION listener.fingerprint(relation regclass) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT md5(string_agg(part, E'\n' ORDER BY part))
    FROM (
        SELECT pg_get_viewdef(relation)
        UNION ALL
        SELECT r.relid::regclass::text || pg_get_viewdef(r.relid) FROM listener.reads(relation) r WHERE r.relkind = 'v'
        UNION ALL
        SELECT f.funcid::regprocedure::text || pg_get_functiondef(f.funcid)
        FROM listener.hiding_functions(relation) f
    ) AS parts (part)
$function$;
