-- Who may do what, for `listener doctor`: the rights that the service's role needs, those that nobody should have, and
-- what row-level security lets through.

-- needed_rights(): every right that the service's role and each view's compute role need, and some that the owner
-- needs; and whether the role has it.
--   level: of a missing right. A right that only create_view or a migration needs is a warning.
CREATE OR REPLACE FUNCTION listener.needed_rights()
RETURNS TABLE (level text, view text, object text, right_name text, role name, held boolean, mend text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off AS $function$
    WITH RECURSIVE installed AS (
        SELECT i.owner_role, i.service_role, i.service_role <> i.owner_role AS apart FROM listener.installation i
    ), walk (view, role, relid, relkind) AS (
        SELECT v.name, listener.grantee_of(v), c.oid, c.relkind FROM listener.managed_view v
        JOIN pg_class c ON c.oid IN (to_regclass('listener.definition_' || v.id), to_regclass('listener.tenants_' || v.id))
        -- What its owner computes, as a materialized view's, needs no right of the service's.
        WHERE c.reloptions @> '{security_invoker=true}'
        UNION
        SELECT w.view, w.role, c.oid, c.relkind
        FROM walk w JOIN pg_rewrite r ON r.ev_class = w.relid AND w.relkind = 'v'
        JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid AND d.refclassid = 'pg_class'::regclass
        JOIN pg_class c ON c.oid = d.refobjid AND c.relkind IN ('r', 'p', 'v', 'm', 'f') AND c.oid <> w.relid
    ), used AS MATERIALIZED (
        -- By whom a relation is read decides the view that names it: its owner, unless it is security_invoker.
        SELECT w.view, w.role, d.refclassid, d.refobjid, d.refobjsubid,
               w.relid IN (SELECT c.oid FROM pg_class c, pg_options_to_table(c.reloptions) o
                           WHERE c.oid = w.relid AND o.option_name = 'security_invoker' AND o.option_value::boolean) AS by_caller
        FROM walk w JOIN pg_rewrite r ON r.ev_class = w.relid AND w.relkind = 'v'
        JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid
        WHERE d.refobjid <> w.relid AND d.refclassid IN ('pg_class'::regclass, 'pg_proc'::regclass)
    ), read AS (
        SELECT string_agg(DISTINCT u.view, ', ' ORDER BY u.view) AS view, u.role, c.oid, c.relnamespace,
            bool_or(u.by_caller) AS by_caller,
               array_agg(DISTINCT u.refobjsubid) FILTER (WHERE u.refobjsubid > 0) AS columns
        FROM used u JOIN pg_class c ON c.oid = u.refobjid AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
        WHERE u.refclassid = 'pg_class'::regclass AND c.relnamespace <> 'listener'::regnamespace
        GROUP BY c.oid, u.role
    ), target AS (
        SELECT v.id, v.name, v.strategy, listener.grantee_of(v) AS role, c.oid, c.relnamespace
        FROM listener.managed_view v
        JOIN pg_class c ON c.oid = to_regclass(format('%I.%I', v.target_schema, v.target_name))
    )
    SELECT 'error', NULL, 'schema listener', 'USAGE', i.service_role,
           has_schema_privilege(i.service_role, 'listener', 'USAGE'),
           format('GRANT USAGE ON SCHEMA listener TO %I;', i.service_role)
    FROM installed i WHERE i.apart
    UNION ALL
    -- What is not there any more, whose name somebody changed, has no right either.
    SELECT 'error', NULL, n.object, n.right_name, i.service_role,
           coalesce(CASE WHEN n.kind = 'FUNCTION' THEN has_function_privilege(i.service_role, n.routine, n.right_name)
                         WHEN n.kind = 'SEQUENCE' THEN has_sequence_privilege(i.service_role, n.relation, n.right_name)
                         ELSE has_table_privilege(i.service_role, n.relation, n.right_name) END, false),
           CASE WHEN coalesce(n.routine, n.relation) IS NULL THEN 'listener migrate'
                ELSE format('GRANT %s ON %s %s TO %I;', n.right_name, n.kind, n.object, i.service_role) END
    FROM installed i CROSS JOIN (
        SELECT r.*, to_regprocedure(CASE r.kind WHEN 'FUNCTION' THEN r.object END)::oid AS routine,
               to_regclass(CASE r.kind WHEN 'FUNCTION' THEN NULL ELSE r.object END)::oid AS relation
        FROM listener.needed_right r) n
    UNION ALL
    SELECT 'error', v.name, c.oid::regclass::text, 'SELECT', g.role, has_table_privilege(g.role, c.oid, 'SELECT'),
           format('GRANT SELECT ON %s TO %I;', c.oid::regclass, g.role)
    FROM listener.managed_view v CROSS JOIN LATERAL listener.grantee_of(v) AS g (role)
    JOIN pg_class c ON c.oid IN (to_regclass('listener.definition_' || v.id), to_regclass('listener.tenants_' || v.id))
    UNION ALL
    -- That the target may be written, view_troubles() says.
    SELECT 'ok', t.name, t.oid::regclass::text, w.right_name, t.role,
           has_table_privilege(t.role, t.oid, w.right_name), NULL
    FROM target t CROSS JOIN unnest('{SELECT,INSERT,UPDATE,DELETE}'::text[]) w (right_name)
    WHERE t.strategy <> 'materialized view'
    UNION ALL
    SELECT 'error', string_agg(t.name, ', ' ORDER BY t.name), 'schema ' || n.nspname, 'USAGE', t.role,
           has_schema_privilege(t.role, n.oid, 'USAGE'),
           format('GRANT USAGE ON SCHEMA %I TO %I;', n.nspname, t.role)
    FROM target t JOIN pg_namespace n ON n.oid = t.relnamespace
    GROUP BY n.oid, n.nspname, t.role
    UNION ALL
    -- To make the target again, and whatever comes next.
    SELECT 'warning', NULL, 'schema ' || n.nspname, w.right_name, i.owner_role,
           has_schema_privilege(i.owner_role, n.oid, w.right_name),
           format('GRANT %s ON SCHEMA %I TO %I;', w.right_name, n.nspname, i.owner_role)
    FROM installed i CROSS JOIN (
        SELECT t.relnamespace, bool_and(a.view_id IS NOT NULL) AS is_adopted
        FROM target t LEFT JOIN listener.adoption a ON a.view_id = t.id AND a.state = 'adopted'
        WHERE t.strategy <> 'materialized view' GROUP BY 1) t
    JOIN pg_namespace n ON n.oid = t.relnamespace
    CROSS JOIN unnest('{USAGE,CREATE}'::text[]) w (right_name)
    -- CREATE may be revoked where all targets were adopted: docs/adopting.md.
    WHERE w.right_name <> 'CREATE' OR NOT t.is_adopted
    UNION ALL
    SELECT CASE WHEN r.by_caller THEN 'error' ELSE 'warning' END, r.view, r.oid::regclass::text, 'SELECT', r.role,
           has_table_privilege(r.role, r.oid, 'SELECT')
               OR (has_any_column_privilege(r.role, r.oid, 'SELECT') AND NOT EXISTS (
                       SELECT FROM unnest(r.columns) c (attnum)
                           WHERE NOT has_column_privilege(r.role, r.oid, c.attnum::smallint, 'SELECT'))),
           format('GRANT SELECT ON %s TO %I;', r.oid::regclass, r.role)
    FROM read r
    UNION ALL
    SELECT 'warning', string_agg(r.view, ', '), 'schema ' || n.nspname, 'USAGE', r.role,
           has_schema_privilege(r.role, n.oid, 'USAGE'),
           format('GRANT USAGE ON SCHEMA %I TO %I;', n.nspname, r.role)
    FROM read r JOIN pg_namespace n ON n.oid = r.relnamespace
    WHERE r.relnamespace NOT IN (SELECT t.relnamespace FROM target t WHERE t.role = r.role)
    GROUP BY n.oid, n.nspname, r.role
    UNION ALL
    SELECT 'error', string_agg(DISTINCT u.view, ', '), p.oid::regprocedure::text, 'EXECUTE', u.role,
           has_function_privilege(u.role, p.oid, 'EXECUTE'),
           format('GRANT EXECUTE ON FUNCTION %s TO %I;', p.oid::regprocedure, u.role)
    FROM used u JOIN pg_proc p ON u.refclassid = 'pg_proc'::regclass AND p.oid = u.refobjid
    WHERE p.pronamespace <> 'listener'::regnamespace
    GROUP BY p.oid, u.role
    UNION ALL
    -- Every drain looks which cluster this is.
    SELECT 'error', NULL, 'pg_control_system()', 'EXECUTE', i.service_role,
           has_function_privilege(i.service_role, 'pg_control_system()', 'EXECUTE'),
           format('GRANT EXECUTE ON FUNCTION pg_control_system() TO %I;', i.service_role)
    FROM installed i
    UNION ALL
    SELECT 'warning', NULL, 'role pg_read_all_stats', 'MEMBER', i.service_role,
           pg_has_role(i.service_role, 'pg_read_all_stats', 'USAGE'),
           format('GRANT pg_read_all_stats TO %I;', i.service_role)
    FROM installed i
    UNION ALL
    -- A migration, and create_view(), give the functions that compute to the compute role.
    SELECT 'warning', NULL, 'role ' || quote_ident(r.compute_role), 'MEMBER', i.owner_role,
           pg_has_role(i.owner_role, r.compute_role, 'MEMBER'), format('GRANT %I TO %I;', r.compute_role, i.owner_role)
    FROM installed i CROSS JOIN (
        SELECT n.compute_role FROM listener.installation n
        UNION SELECT v.compute_role FROM listener.managed_view v WHERE v.compute_role IS NOT NULL) r
    WHERE i.apart
$function$;

-- held_by(service_role, acl): the rights in a list that reach this role, and through whom.
CREATE OR REPLACE FUNCTION listener.held_by(service_role name, acl aclitem[]) RETURNS TABLE (grantee text, right_name text)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT CASE WHEN a.grantee = 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END, a.privilege_type
    FROM aclexplode(acl) a
    WHERE a.grantee = 0 OR pg_has_role(service_role, a.grantee, 'MEMBER')
$function$;

-- lost_guarantees(): what cannot be promised where roles are shared: where the service logs in as the role that owns the
-- schema listener or a source, or the application as the one that owns the schema. No row where each has its own.
CREATE OR REPLACE FUNCTION listener.lost_guarantees() RETURNS SETOF text
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
    WITH installed AS (
        SELECT i.owner_role, i.service_role, i.owner_role = i.service_role AS is_one, s.rolsuper, o.rolcanlogin AS owner_logs_in
        FROM listener.installation i JOIN pg_roles s ON s.rolname = i.service_role
        JOIN pg_roles o ON o.rolname = i.owner_role
    ), captured AS (
        SELECT DISTINCT c.oid, c.relowner, c.relrowsecurity AND NOT c.relforcerowsecurity AS is_open
        FROM listener.source s JOIN pg_class c ON c.oid = s.relid
        WHERE NOT EXISTS (SELECT FROM listener.managed_view v
                          WHERE to_regclass(format('%I.%I', v.target_schema, v.target_name)) = c.oid)
    ), owned AS (
        SELECT c.*, i.is_one FROM installed i JOIN captured c ON pg_has_role(i.service_role, c.relowner, 'MEMBER') AND NOT i.rolsuper
    )
    SELECT 'the service may change what the schema listener manages' FROM installed i WHERE i.is_one
    UNION ALL
    SELECT 'the application may change what the schema listener manages, and read and refresh every tenant' FROM installed i
    WHERE i.owner_logs_in AND EXISTS (SELECT FROM captured c WHERE pg_get_userbyid(c.relowner) = i.owner_role)
    UNION ALL
    SELECT format('the service may write %s', CASE count(*) WHEN 1 THEN min(o.oid::regclass::text) ELSE count(*) || ' sources' END)
    FROM owned o HAVING count(*) > 0
    UNION ALL
    SELECT format('row-level security of %s does not bind the service, since it is not forced',
                  string_agg(o.oid::regclass::text, ', ' ORDER BY o.oid))
    FROM owned o WHERE o.is_open HAVING count(*) > 0
    UNION ALL
    SELECT 'the application may read the change log and refresh every tenant'
    FROM owned o WHERE NOT o.is_one HAVING count(*) > 0
$function$;

-- function_findings(): functions of this schema that somebody altered, compute roles that have too many rights, or are
-- shared by teams (see 03_computing.sql), and policies that capture runs with the rights of the owner of the schema.
CREATE OR REPLACE FUNCTION listener.function_findings()
RETURNS TABLE ("check" text, level text, view text, object text, problem text, mend text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off AS $function$
    WITH roles AS (
        SELECT r.*, i.service_role, i.owner_role, v.views, r.rolname = i.service_role AS is_service
        FROM listener.installation i
        CROSS JOIN LATERAL (SELECT x.role, string_agg(x.view, ', ' ORDER BY x.view) AS views
                            FROM (SELECT i.compute_role AS role, NULL::text AS view
                                  UNION ALL
                                  SELECT w.compute_role, w.name FROM listener.managed_view w WHERE w.compute_role IS NOT NULL) x
                            GROUP BY x.role) v
        JOIN pg_roles r ON r.rolname = v.role
        WHERE i.owner_role <> i.service_role
    )
    SELECT 'roles', 'error', NULL, f.signature,
           CASE WHEN p.routine IS NULL THEN 'it is gone.'
                ELSE 'somebody altered it: it is not as listener made it.' END, 'listener migrate'
    FROM listener.installed_function f CROSS JOIN LATERAL (SELECT to_regprocedure(f.signature) AS routine) p
    WHERE p.routine IS NULL OR listener.function_digest(p.routine) <> f.digest
    UNION ALL
    SELECT 'roles', 'warning', r.views, quote_ident(r.rolname),
           'the service logs in as this role, and it computes definitions: a role that cannot log in should compute them.',
           'listener roles, run by an administrator; then listener migrate'
    FROM roles r WHERE r.is_service
    UNION ALL
    SELECT 'roles', 'warning', o.views, quote_ident(o.role),
           format('it computes views over tables of %s: the code of each of them may read and write the tables of the others.', o.owners),
           format('SELECT listener.set_compute_role(%L, %L);', split_part(o.views, ', ', 1), split_part(o.owners, ', ', 1) || '_compute')
    FROM (SELECT x.role, string_agg(DISTINCT x.owner, ', ' ORDER BY x.owner) AS owners,
        string_agg(DISTINCT x.view, ', ' ORDER BY x.view) AS views
          FROM (SELECT listener.compute_role_of(v) AS role, v.name AS view, pg_get_userbyid(c.relowner)::text AS owner
                FROM listener.installation i CROSS JOIN listener.managed_view v
                JOIN listener.view_source w ON w.view_id = v.id JOIN listener.source s ON s.id = w.source_id
                JOIN pg_class c ON c.oid = s.relid
                WHERE v.strategy <> 'materialized view' AND i.owner_role <> i.service_role
                  -- The owner of a target says nothing: its sources do.
                  AND NOT EXISTS (SELECT FROM listener.managed_view t
                      WHERE to_regclass(format('%I.%I', t.target_schema, t.target_name)) = c.oid)) x
          -- An owner that is a member of another one has its rights anyway.
          WHERE NOT EXISTS (SELECT FROM listener.view_source w JOIN listener.source s ON s.id = w.source_id
              JOIN pg_class c ON c.oid = s.relid
                            WHERE c.relowner <> to_regrole(quote_ident(x.owner)) AND pg_has_role(x.owner, c.relowner, 'MEMBER'))
          GROUP BY x.role HAVING count(DISTINCT x.owner) > 1) o
    UNION ALL
    -- Its own policy lets the look-up see every row, but the others are computed all the same.
    SELECT DISTINCT 'roles',
           CASE WHEN EXISTS (SELECT FROM listener.managed_view v WHERE v.compute_role IS NOT NULL) THEN 'error' ELSE 'warning' END,
           NULL, c.oid::regclass::text,
           format('capture looks tenants up in it with the rights of %I, and so runs the code of its policy %I with them.',
                  i.owner_role, p.polname),
           format('ALTER ROLE %I BYPASSRLS;', i.owner_role)
    FROM listener.installation i
    JOIN pg_roles o ON o.rolname = i.owner_role AND NOT o.rolsuper AND NOT o.rolbypassrls
    CROSS JOIN listener.source s
    JOIN listener.source t ON t.id = s.through_id
    JOIN pg_class c ON c.oid = t.relid AND c.relrowsecurity AND (c.relforcerowsecurity OR NOT pg_has_role(o.oid, c.relowner, 'USAGE'))
    JOIN pg_policy p ON p.polrelid = c.oid AND p.polcmd IN ('r', '*')
                    AND EXISTS (SELECT FROM unnest(p.polroles) AS r (role) WHERE r.role = 0 OR pg_has_role(o.oid, r.role, 'USAGE'))
    WHERE EXISTS (SELECT FROM pg_depend d
                  WHERE d.classid = 'pg_policy'::regclass AND d.objid = p.oid AND d.refobjid >= 16384
                    AND d.refclassid IN ('pg_proc'::regclass, 'pg_operator'::regclass))
    UNION ALL
    SELECT 'roles', a.level, r.views, quote_ident(r.rolname), a.problem, a.mend
    FROM roles r CROSS JOIN LATERAL (VALUES
        (r.rolsuper, 'error', 'it computes definitions, and is a superuser.', format('ALTER ROLE %I NOSUPERUSER;', r.rolname)),
        (r.rolbypassrls, 'error', 'it computes definitions, and row-level security does not bind it.',
         format('ALTER ROLE %I NOBYPASSRLS;', r.rolname)),
        (r.rolcanlogin, 'warning', 'it computes definitions, and may log in.', format('ALTER ROLE %I NOLOGIN;', r.rolname)),
        (r.rolcreaterole, 'error', 'it computes definitions, and may make roles.', format('ALTER ROLE %I NOCREATEROLE;', r.rolname)),
        -- Where it is so through the service, another finding names the service.
        (pg_has_role(r.rolname, r.owner_role, 'MEMBER') AND NOT pg_has_role(r.service_role, r.owner_role, 'MEMBER'), 'error',
         format('it computes definitions, and may change whatever the schema listener manages, as a member of %I.', r.owner_role),
         format('REVOKE %I FROM %I;', r.owner_role, r.rolname)),
        (has_schema_privilege(r.rolname, 'listener_private', 'USAGE'), 'error',
         'it may use the schema listener_private, so the code of definitions may alter the functions that compute them.',
         format('REVOKE ALL ON SCHEMA listener_private FROM %I;', r.rolname)))
        AS a (has, level, problem, mend)
    WHERE a.has AND NOT r.rolsuper AND NOT r.is_service
       OR a.has AND r.rolsuper AND a.problem LIKE '%superuser%' AND NOT r.is_service
$function$;

-- excess_findings(): rights that the service's role should not have, and what others have in the schema listener. Where the
-- service shares its role with the owner or the application, one warning says so instead.
CREATE OR REPLACE FUNCTION listener.excess_findings()
RETURNS TABLE ("check" text, level text, view text, object text, problem text, mend text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off AS $function$
    WITH installed AS (
        SELECT i.owner_role, i.service_role, quote_ident(i.service_role) AS service, r.oid AS service_id, r.rolsuper,
               r.rolbypassrls, r.rolcreaterole, r.rolcreatedb, r.rolreplication,
               i.service_role <> i.owner_role AS apart
        FROM listener.installation i JOIN pg_roles r ON r.rolname = i.service_role
    ), target AS MATERIALIZED (
        SELECT to_regclass(format('%I.%I', v.target_schema, v.target_name))::oid AS relid FROM listener.managed_view v
    ), captured AS MATERIALIZED (
        -- A target that another view reads is written by the service, and must be.
        SELECT DISTINCT c.oid, c.oid::regclass::text AS name, c.relowner, c.relacl, c.relnamespace
        FROM (SELECT t.relid FROM listener.source_table t UNION SELECT s.relid FROM listener.source s) t
        JOIN pg_class c ON c.oid = t.relid
        WHERE NOT EXISTS (SELECT FROM target x WHERE x.relid = c.oid)
    ), shared AS (
        -- The role owns a source: it is the application's.
        SELECT i.*, NOT i.apart OR EXISTS (SELECT FROM captured c WHERE c.relowner = i.service_id) AS is_shared FROM installed i
    ), too_much AS (
        SELECT c.name AS object, h.grantee, string_agg(h.right_name, ', ' ORDER BY h.right_name) AS rights
        FROM shared i CROSS JOIN captured c CROSS JOIN LATERAL listener.held_by(i.service_role, c.relacl) h
        WHERE NOT i.is_shared AND h.right_name IN ('INSERT', 'UPDATE', 'DELETE', 'TRUNCATE')
          AND NOT pg_has_role(i.service_role, c.relowner, 'MEMBER')
        GROUP BY c.name, h.grantee
        UNION ALL
        SELECT c.name, h.grantee, string_agg(format('%s (%I)', h.right_name, a.attname), ', ' ORDER BY a.attnum)
        FROM shared i CROSS JOIN captured c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attacl IS NOT NULL
        CROSS JOIN LATERAL listener.held_by(i.service_role, a.attacl) h
        WHERE NOT i.is_shared AND h.right_name IN ('INSERT', 'UPDATE') AND NOT pg_has_role(i.service_role, c.relowner, 'MEMBER')
        GROUP BY c.name, h.grantee
    )
    SELECT 'roles', 'warning', NULL, i.service, format('roles are shared, and guarantees fall away: %s.', l.lost),
           'LISTENER_OWNER_ROLE=listener_owner LISTENER_SERVICE_ROLE=listener_service listener roles'
    FROM shared i CROSS JOIN LATERAL (SELECT string_agg(g, '; ') AS lost FROM listener.lost_guarantees() g) l
    WHERE l.lost IS NOT NULL AND (i.is_shared OR EXISTS (
        SELECT FROM captured c JOIN pg_roles o ON o.oid = c.relowner WHERE o.rolname = i.owner_role AND o.rolcanlogin))
    UNION ALL
    SELECT 'roles', a.level, NULL, i.service, a.problem, format('ALTER ROLE %s %s;', i.service, a.mend)
    FROM installed i CROSS JOIN LATERAL (VALUES
        (i.rolsuper, 'error', 'it is a superuser: row-level security does not bind it.', 'NOSUPERUSER'),
        (i.rolbypassrls, 'error', 'it has BYPASSRLS: row-level security does not bind it.', 'NOBYPASSRLS'),
        (i.rolcreaterole, 'warning', 'it may make roles, and needs none.', 'NOCREATEROLE'),
        (i.rolcreatedb, 'warning', 'it may make databases, and needs none.', 'NOCREATEDB'),
        (i.rolreplication, 'warning', 'it may replicate the whole server, and needs none of it.', 'NOREPLICATION'))
        AS a (has, level, problem, mend)
    WHERE a.has
    UNION ALL
    SELECT 'roles', 'error', NULL, i.service, format('it is a member of %I, and may change whatever the schema listener manages.',
                                                     i.owner_role), format('REVOKE %I FROM %s;', i.owner_role, i.service)
    FROM installed i
    WHERE i.apart AND NOT i.rolsuper AND pg_has_role(i.service_role, i.owner_role, 'MEMBER')
    UNION ALL
    SELECT 'roles', 'error', NULL, i.service,
           format('it is a member of %I, which owns %s: it may write sources, and row-level security that is not forced does not bind it.',
                  pg_get_userbyid(c.relowner), CASE count(*) WHEN 1 THEN min(c.name) ELSE count(*) || ' sources' END),
           format('REVOKE %I FROM %s;', pg_get_userbyid(c.relowner), i.service)
    FROM shared i JOIN captured c ON pg_has_role(i.service_role, c.relowner, 'MEMBER')
    WHERE NOT i.is_shared AND NOT i.rolsuper AND pg_get_userbyid(c.relowner) <> i.owner_role
    GROUP BY c.relowner, i.owner_role, i.service
    UNION ALL
    SELECT 'rights', 'warning', NULL, t.object, format('%s may write it (%s%s), and never needs to.', i.service, t.rights,
                                                       CASE WHEN t.grantee <> i.service THEN ' through ' || t.grantee ELSE '' END),
           CASE WHEN t.grantee IN (i.service, 'PUBLIC') THEN format('REVOKE %s ON %s FROM %s;', t.rights, t.object, t.grantee)
                ELSE format('REVOKE %s FROM %s;', t.grantee, i.service) END
    FROM installed i CROSS JOIN too_much t
    UNION ALL
    SELECT 'rights', CASE n.nspname WHEN 'listener' THEN 'error' ELSE 'warning' END, NULL, 'schema ' || n.nspname,
           format('%s may create in it%s, and what is made there may be called instead of what was meant.', i.service,
                  CASE WHEN h.grantee <> i.service THEN ' through ' || h.grantee ELSE '' END),
           CASE WHEN h.grantee IN (i.service, 'PUBLIC') THEN format('REVOKE CREATE ON SCHEMA %I FROM %s;', n.nspname, h.grantee)
                ELSE format('REVOKE %s FROM %s;', h.grantee, i.service) END
    FROM shared i CROSS JOIN pg_namespace n CROSS JOIN LATERAL listener.held_by(i.service_role, n.nspacl) h
    WHERE NOT i.is_shared AND h.right_name = 'CREATE' AND NOT pg_has_role(i.service_role, i.owner_role, 'MEMBER')
      AND (n.nspname = 'listener' OR n.oid IN (SELECT c.relnamespace FROM captured c)
           OR n.oid IN (SELECT c.relnamespace FROM target t JOIN pg_class c ON c.oid = t.relid))
    UNION ALL
    SELECT 'roles', 'warning', NULL, c.oid::regclass::text, format('it belongs to %s, which should own no table.', i.service),
           format('ALTER %s %s OWNER TO %I;', CASE c.relkind WHEN 'v' THEN 'VIEW' WHEN 'm' THEN 'MATERIALIZED VIEW' ELSE 'TABLE' END,
                  c.oid::regclass, i.owner_role)
    FROM shared i JOIN pg_class c ON c.relowner = i.service_id AND c.relkind IN ('r', 'p', 'v', 'm')
    WHERE NOT i.is_shared AND c.relpersistence <> 't' AND NOT c.relispartition
    UNION ALL
    SELECT 'roles', 'error', NULL, p.oid::regprocedure::text,
           format('it belongs to %I, and runs with the wrong rights.', pg_get_userbyid(p.proowner)),
           format('ALTER FUNCTION %s OWNER TO %I;', p.oid::regprocedure, i.owner_role)
    FROM installed i JOIN pg_proc p ON p.pronamespace = 'listener'::regnamespace
    WHERE pg_get_userbyid(p.proowner) <> i.owner_role
    UNION ALL SELECT * FROM listener.function_findings()
    UNION ALL
    SELECT 'rights', a.level, NULL, o.object, format(a.problem, a.grantee), format('REVOKE ALL ON %s FROM %s;', o.what, a.grantee)
    FROM installed i CROSS JOIN (
        SELECT 'schema listener', 'SCHEMA listener', n.nspacl FROM pg_namespace n WHERE n.nspname = 'listener'
        UNION ALL
        SELECT c.oid::regclass::text, CASE c.relkind WHEN 'S' THEN 'SEQUENCE ' ELSE 'TABLE ' END || c.oid::regclass, c.relacl
        FROM pg_class c WHERE c.relnamespace = 'listener'::regnamespace AND c.relkind IN ('r', 'v', 'S')
        UNION ALL
        SELECT p.oid::regprocedure::text, 'FUNCTION ' || p.oid::regprocedure, coalesce(p.proacl, acldefault('f', p.proowner))
        FROM pg_proc p WHERE p.pronamespace = 'listener'::regnamespace) AS o (object, what, acl)
    CROSS JOIN LATERAL (
        SELECT DISTINCT 'error', 'PUBLIC', 'everybody (%s) has rights on it.' FROM aclexplode(o.acl) g WHERE g.grantee = 0
        UNION ALL
        SELECT DISTINCT 'warning', quote_ident(pg_get_userbyid(g.grantee)), '%s, which writes sources, has rights on it: the application needs none.'
        FROM aclexplode(o.acl) g
        WHERE g.grantee <> 0 AND pg_get_userbyid(g.grantee) NOT IN (i.owner_role, i.service_role) AND EXISTS (
            SELECT FROM captured c CROSS JOIN LATERAL aclexplode(c.relacl) w
            WHERE w.grantee = g.grantee AND w.privilege_type IN ('INSERT', 'UPDATE', 'DELETE', 'TRUNCATE')
              AND pg_get_userbyid(c.relowner) <> pg_get_userbyid(g.grantee))) AS a (level, grantee, problem)
$function$;
