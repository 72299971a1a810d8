-- Which equality proves that two values are one tenant. Capture logs the text of a source's tenant column, the drain
-- writes it in the form of the view's tenant type, and a view shows the text of its own tenant column: a proof needs
-- that these texts are equal. PostgreSQL's own `=` proves it between columns of the types that a tenant can have. A
-- user's cast, collation or operator may take two tenants for one.

-- keeps_tenant(type, casts, tenant_type): whether a value of this type that went through these casts, as uncast()
-- writes them, is the same tenant as before, for a view whose tenants are of tenant_type.
-- '07' and '7' are one number and two texts; as the tenants of a view of integers they are one.
CREATE OR REPLACE FUNCTION listener.keeps_tenant(type oid, casts text, tenant_type text) RETURNS boolean
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT CASE tenant_type
        WHEN 'uuid' THEN casts ~ '^[tu]*$'
        WHEN 'text' THEN casts ~ CASE WHEN type = ANY ('{int2,int4,int8}'::regtype[]) THEN '^n*t*$'
                                      WHEN type = 'uuid'::regtype THEN '^u*t*$' ELSE '^t*$' END
        ELSE casts ~ '^[tn]*$' END
       AND type = ANY ('{uuid,text,varchar,bpchar,name,int2,int4,int8}'::regtype[])
$function$;

-- foreign_equality(relation): a user's operator, cast, collation or function in a query that may take two tenants for
-- one, in words; NULL: there is none. A plan's text shows these as if they were PostgreSQL's own, so the stored query
-- is searched, through nested views and through the SQL functions that the planner may inline.
CREATE OR REPLACE FUNCTION listener.foreign_equality(relation regclass) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    -- The first object that is not PostgreSQL's own.
    ours constant oid := 16384;
    tenant_types constant oid[] := '{uuid,text,varchar,bpchar,name,int2,int4,int8}'::regtype[];
    what text;
BEGIN
    WITH RECURSIVE code (tree, source, function) AS (
        SELECT r.ev_action::text COLLATE "C", NULL::text COLLATE "C", NULL::regprocedure
        FROM (SELECT relation::oid UNION SELECT v.relid FROM listener.tenant_views(relation) v) AS n (relid)
        JOIN pg_rewrite r ON r.ev_class = n.relid
        UNION
        SELECT coalesce(p.prosqlbody::text, '') COLLATE "C", p.prosrc COLLATE "C", p.oid::regprocedure
        FROM code c
        CROSS JOIN LATERAL regexp_matches(c.tree, ':(?:funcid|opfuncid) (\d+)', 'g') AS m (found)
        JOIN pg_proc p ON p.oid = m.found[1]::oid AND p.oid >= ours
        JOIN pg_language l ON l.oid = p.prolang AND l.lanname = 'sql'
    ), tenantish AS (
        -- A domain may be over any of these.
        SELECT t.oid FROM pg_type t WHERE t.typtype IN ('d', 'p') OR t.oid = ANY (tenant_types)
    ), own_operator AS (
        SELECT o.oid FROM pg_operator o
        WHERE o.oprname = '=' AND o.oid >= ours AND o.oprleft IN (SELECT t.oid FROM tenantish t)
          AND o.oprright IN (SELECT t.oid FROM tenantish t)
    ), own_cast AS (
        SELECT x.castfunc FROM pg_cast x
        WHERE x.castfunc >= ours AND x.casttarget IN (SELECT t.oid FROM tenantish t)
    )
    SELECT f.what INTO what FROM (
        SELECT format('the operator %s', m.found[1]::oid::regoperator) AS what
        FROM code c CROSS JOIN LATERAL regexp_matches(c.tree, ':opno (\d+)', 'g') AS m (found)
        WHERE m.found[1]::oid IN (SELECT o.oid FROM own_operator o)
        UNION ALL
        -- A cast that changes no byte makes rows be grouped by another type's equality; the planner looks through it.
        SELECT format('the cast to %s', o.oprleft::regtype)
        FROM code c CROSS JOIN LATERAL regexp_matches(c.tree, ':eqop (\d+)', 'g') AS m (found)
        JOIN pg_operator o ON o.oid = m.found[1]::oid AND o.oid >= ours
        WHERE EXISTS (SELECT FROM code d WHERE d.tree ~ format('\{RELABELTYPE :arg .* :resulttype %s ', o.oprleft::oid))
        UNION ALL
        SELECT format('the cast by %s', m.found[1]::oid::regprocedure)
        FROM code c
        CROSS JOIN LATERAL regexp_matches(
            c.tree, ':funcid (\d+) :funcresulttype \d+ :funcretset \w+ :funcvariadic \w+ :funcformat [12] ', 'g') AS m (found)
        WHERE m.found[1]::oid IN (SELECT x.castfunc FROM own_cast x)
        UNION ALL
        SELECT format('the collation %s', m.found[1]::oid::regcollation)
        FROM code c CROSS JOIN LATERAL regexp_matches(c.tree, ':collOid (\d+)', 'g') AS m (found)
        JOIN pg_collation l ON l.oid = m.found[1]::oid AND NOT l.collisdeterministic
        UNION ALL
        -- What is in the text of such a function is known only when it is called.
        SELECT format('the function %s', c.function)
        FROM code c
        WHERE c.tree = '' AND (EXISTS (SELECT FROM own_operator) OR EXISTS (SELECT FROM own_cast)
                               OR (c.source ~* '\mcollate\M' AND EXISTS (SELECT FROM pg_collation l WHERE NOT l.collisdeterministic)))
    ) f ORDER BY f.what LIMIT 1;
    RETURN what;
END
$function$;
