-- Whether the role that computes a view sees all rows that the view reads, while no tenant is set; and what is refused where
-- it does not.

-- lists_target(policy): whether it is the one that shows a target whole to the service while no tenant is set.
CREATE OR REPLACE FUNCTION listener.lists_target(policy pg_policy) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT policy.polname = 'listener_list' AND EXISTS (
        SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        JOIN listener.managed_view v ON v.target_schema = n.nspname AND v.target_name = c.relname
        WHERE c.oid = policy.polrelid)
$function$;

-- hides_rows(relation, reader): whether row-level security hides rows of a table from a role while no tenant is set: no
-- permissive policy is USING (true) for it, or it has a restrictive policy. What other policies let through without a
-- tenant is not computed: they count as hiding rows.
CREATE OR REPLACE FUNCTION listener.hides_rows(relation oid, reader oid) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT EXISTS (
        SELECT FROM pg_roles r
        JOIN pg_class c ON c.oid = relation AND c.relrowsecurity
        WHERE r.oid = reader AND NOT r.rolbypassrls AND NOT r.rolsuper
          AND (c.relforcerowsecurity OR NOT pg_has_role(reader, c.relowner, 'USAGE'))
          AND (NOT EXISTS (SELECT FROM pg_policy p
                           WHERE p.polrelid = c.oid AND p.polpermissive AND p.polcmd IN ('r', '*')
                             AND (pg_get_expr(p.polqual, p.polrelid) = 'true' OR listener.lists_target(p))
                             AND EXISTS (SELECT FROM unnest(p.polroles) o (role)
                                         WHERE o.role = 0 OR pg_has_role(reader, o.role, 'USAGE')))
               OR EXISTS (SELECT FROM pg_policy p
                          WHERE p.polrelid = c.oid AND NOT p.polpermissive AND p.polcmd IN ('r', '*')
                            AND EXISTS (SELECT FROM unnest(p.polroles) o (role)
                                        WHERE o.role = 0 OR pg_has_role(reader, o.role, 'USAGE')))))
$function$;

-- hidden_source(relation, reader): a table of which hides_rows() is true when `reader` runs the query of this view or
-- materialized view. A nested view reads with the rights of its own owner, unless it is security_invoker. NULL: there
-- is none.
CREATE OR REPLACE FUNCTION listener.hidden_source(relation regclass, reader oid) RETURNS regclass
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    WITH RECURSIVE walk (relid, read_by, reads_as) AS (
        SELECT relation::oid, reader, reader
        UNION
        SELECT c.oid, w.reads_as,
               CASE WHEN c.relkind <> 'v' THEN NULL
                    WHEN EXISTS (SELECT FROM pg_options_to_table(c.reloptions) o
                                 WHERE o.option_name = 'security_invoker' AND o.option_value::boolean) THEN reader
                    ELSE c.relowner END
        FROM walk w
        JOIN pg_rewrite r ON r.ev_class = w.relid AND w.reads_as IS NOT NULL
        JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid AND d.refclassid = 'pg_class'::regclass
        JOIN pg_class c ON c.oid = d.refobjid AND c.relkind IN ('r', 'p', 'v') AND c.oid <> w.relid
    )
    SELECT w.relid::regclass FROM walk w WHERE w.relid <> relation AND listener.hides_rows(w.relid, w.read_by)
    ORDER BY w.relid LIMIT 1
$function$;

-- hidden_source(relation): such a table for the installation's compute role.
CREATE OR REPLACE FUNCTION listener.hidden_source(relation regclass) RETURNS regclass
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT listener.hidden_source(relation, (SELECT to_regrole(quote_ident(i.compute_role))::oid FROM listener.installation i))
$function$;

-- hidden_from_owner(relation): such a table for the owner of a materialized view, as which REFRESH runs its query.
CREATE OR REPLACE FUNCTION listener.hidden_from_owner(relation regclass) RETURNS regclass
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT listener.hidden_source(relation, (SELECT c.relowner FROM pg_class c WHERE c.oid = relation))
$function$;

-- check_listable(view_id): raises LSN03 where row-level security would hide tenants from the service, which lists them
-- with no tenant set: filling and verify would silently leave them out.
CREATE OR REPLACE FUNCTION listener.check_listable(view_id integer) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    hidden regclass := listener.hidden_source(to_regclass('listener.tenants_' || view_id));
BEGIN
    IF hidden IS NOT NULL THEN
        RAISE EXCEPTION 'the tenants cannot be listed: row-level security hides the rows of %', hidden
            USING ERRCODE = 'LSN03',
                  HINT = format('Let the service list them: CREATE POLICY listener_lists ON %s FOR SELECT TO %I USING (true);',
                                hidden, (SELECT i.service_role FROM listener.installation i));
    END IF;
END
$function$;

-- check_whole(definition): raises LSN03 where the service cannot read all that a view without tenants reads: no one tenant
-- that it could name would show it everything.
CREATE OR REPLACE FUNCTION listener.check_whole(definition regclass) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    hidden regclass := listener.hidden_source(definition);
BEGIN
    IF hidden IS NOT NULL THEN
        RAISE EXCEPTION 'the whole view cannot be computed: row-level security hides rows of % from the service', hidden
            USING ERRCODE = 'LSN03',
                  HINT = format('Make it a materialized view and listener.keep_materialized_view(name); or let the service read '
                                'every tenant: CREATE POLICY listener_reads ON %s FOR SELECT TO %I USING (true);',
                                hidden, (SELECT i.service_role FROM listener.installation i));
    END IF;
END
$function$;

-- check_readable(relation, role): raises LSN03 where this role, which computes the view, may not read what the view
-- reads.
CREATE OR REPLACE FUNCTION listener.check_readable(relation regclass, role name) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    denied text;
BEGIN
    SELECT string_agg(format('GRANT USAGE ON SCHEMA %I TO %I; GRANT SELECT ON %s TO %I',
                             n.nspname, role, r.relid::regclass, role), '; ') INTO denied
    FROM listener.reads(relation) r JOIN pg_class c ON c.oid = r.relid JOIN pg_namespace n ON n.oid = c.relnamespace
    -- Grants in the schema listener come with the view.
    WHERE n.nspname <> 'listener'
      AND (NOT has_any_column_privilege(role, r.relid, 'SELECT') OR NOT has_schema_privilege(role, n.oid, 'USAGE'));
    IF denied IS NOT NULL THEN
        RAISE EXCEPTION 'role % may not read what the query reads', role USING ERRCODE = 'LSN03', HINT = denied || ';';
    END IF;
END
$function$;
