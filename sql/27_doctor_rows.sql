-- Whose rows a view reads and shows, for `listener doctor`: what row-level security lets through, whether a refresh reads its
-- tenant's rows alone, and who could make a target wrong.

-- row_security_findings(): whether row-level security keeps the service to the tenant whose refresh it is: on each source
-- that has a tenant column, through nested views, and on targets.
CREATE OR REPLACE FUNCTION listener.row_security_findings()
RETURNS TABLE ("check" text, level text, view text, object text, problem text, mend text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off AS $function$
    WITH installed AS (
        SELECT i.owner_role, i.service_role, r.rolsuper OR r.rolbypassrls AS is_unbound
        FROM listener.installation i JOIN pg_roles r ON r.rolname = i.service_role
    ), listed AS MATERIALIZED (
        -- The service reads these with no tenant set, and is meant to see them whole.
        SELECT r.relid FROM listener.managed_view v
        CROSS JOIN LATERAL listener.reads(to_regclass('listener.tenants_' || v.id)) r
        WHERE v.tenants_query IS NOT NULL
        UNION
        SELECT s.relid FROM listener.managed_view v JOIN listener.view_source w ON w.view_id = v.id
        JOIN listener.source s ON s.id = w.source_id
        WHERE v.strategy = 'whole'
    ), nested AS MATERIALIZED (
        SELECT v.name AS view, r.relid FROM listener.managed_view v
        CROSS JOIN LATERAL listener.reads(to_regclass('listener.definition_' || v.id)) r
        WHERE r.relkind = 'v'
    ), known AS MATERIALIZED (
        SELECT DISTINCT ON (c.oid) c.oid, c.oid::regclass::text AS source, a.attname AS tenant_column,
               format_type(a.atttypid, NULL) AS tenant_type, c.relrowsecurity, c.relforcerowsecurity, c.relowner,
               (SELECT string_agg(v.name, ', ' ORDER BY v.name) FROM listener.view_source w
                JOIN listener.managed_view v ON v.id = w.view_id WHERE w.source_id = s.id) AS readers,
               EXISTS (SELECT FROM listener.view_source w JOIN listener.managed_view v ON v.id = w.view_id
                       WHERE w.source_id = s.id AND v.tenant_secured) AS is_promised
        FROM listener.source s JOIN pg_class c ON c.oid = s.relid AND c.relrowsecurity
        JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = s.tenant_column AND NOT a.attisdropped
        WHERE c.oid NOT IN (SELECT l.relid FROM listed l)
        ORDER BY c.oid, s.id
    ), policy AS MATERIALIZED (
        -- Those that decide what the service reads.
        SELECT k.oid, p.polname, p.polpermissive, pg_get_expr(p.polqual, p.polrelid) AS qual,
               pg_get_expr(p.polqual, p.polrelid) LIKE '%app.current_tenant_id%' OR EXISTS (
                   SELECT FROM pg_depend d JOIN pg_proc f ON f.oid = d.refobjid
                   WHERE d.classid = 'pg_policy'::regclass AND d.objid = p.oid AND d.refclassid = 'pg_proc'::regclass
                     AND f.prosrc LIKE '%app.current_tenant_id%') AS reads_tenant
        FROM installed i CROSS JOIN known k JOIN pg_policy p ON p.polrelid = k.oid AND p.polcmd IN ('r', '*')
        WHERE EXISTS (SELECT FROM unnest(p.polroles) o (role) WHERE o.role = 0 OR pg_has_role(i.service_role, o.role, 'USAGE'))
          AND p.polname <> 'listener_lookup' AND NOT listener.lists_target(p)
    ), summed AS (
        SELECT k.*, format('%I = current_setting(''app.current_tenant_id'')::%s', k.tenant_column, k.tenant_type) AS mine,
               count(p.polname) FILTER (WHERE p.polpermissive) AS permissive,
               min(p.polname::text) FILTER (WHERE p.polpermissive AND p.qual = 'true') AS open_policy,
               min(p.polname::text) FILTER (WHERE p.polpermissive) AS some_policy,
               min(p.qual) FILTER (WHERE p.polpermissive) AS some_qual,
               coalesce(bool_or(p.reads_tenant), false) AS reads_tenant,
               coalesce(bool_or(p.reads_tenant) FILTER (WHERE NOT p.polpermissive), false) AS restricted
        FROM known k LEFT JOIN policy p ON p.oid = k.oid
        GROUP BY k.oid, k.source, k.tenant_column, k.tenant_type, k.relrowsecurity, k.relforcerowsecurity, k.relowner,
                 k.readers, k.is_promised
    ), target AS (
        SELECT v.name, v.strategy, v.target_rls, c.oid, c.oid::regclass::text AS target, c.relacl, c.relowner
        FROM listener.managed_view v JOIN pg_class c ON c.oid = to_regclass(format('%I.%I', v.target_schema, v.target_name))
    )
    SELECT 'row security', 'warning', s.readers, s.source,
           format('its row-level security is enabled and not forced: it does not bind %I, which owns it.', pg_get_userbyid(s.relowner)),
           format('ALTER TABLE %s FORCE ROW LEVEL SECURITY;', s.source)
    FROM summed s
    WHERE NOT s.relforcerowsecurity AND NOT s.is_promised
    UNION ALL
    SELECT 'row security', 'error', s.readers, s.source,
           format('no policy lets %I read a row of it: dashboards turn empty.', i.service_role),
           format('CREATE POLICY listener_tenant ON %s FOR SELECT TO %I USING (%s);', s.source, i.service_role, s.mine)
    FROM installed i CROSS JOIN summed s
    WHERE s.permissive = 0 AND NOT i.is_unbound
    UNION ALL
    SELECT 'row security', 'error', s.readers, s.source,
           format('its policy %I shows %I every tenant''s rows.', s.open_policy, i.service_role),
           format('CREATE POLICY listener_tenant ON %s AS RESTRICTIVE FOR SELECT TO %I USING (%s);', s.source, i.service_role, s.mine)
    FROM installed i CROSS JOIN summed s
    WHERE s.open_policy IS NOT NULL AND NOT s.restricted
    UNION ALL
    -- What the application's policy says to everybody else stays as it is.
    SELECT 'row security', 'warning', s.readers, s.source,
           format('none of its policies reads app.current_tenant_id, which a refresh sets (%I: %s).', s.some_policy, s.some_qual),
           format('ALTER POLICY %I ON %s USING (CASE WHEN current_user = %L THEN %s ELSE %s END);', s.some_policy, s.source,
                  i.service_role, s.mine, s.some_qual)
    FROM installed i CROSS JOIN summed s
    WHERE s.permissive > 0 AND s.open_policy IS NULL AND NOT s.reads_tenant
    UNION ALL
    SELECT 'row security', 'warning', NULL, p.relation::text,
           format('its policy %I raises an error in a session that names no tenant now, and named one or refreshed a view before: '
                  'PostgreSQL leaves app.current_tenant_id as an empty text, which is no %s.', p.policy, p.type),
           coalesce(format('ALTER POLICY %I ON %s ', p.policy, p.relation) || p.mended || ';',
                    'Write nullif(current_setting(…, true), '''') in the function that it calls.')
    FROM listener.raising_policies() p
    UNION ALL
    SELECT 'row security', 'ok', s.readers, s.source, format('enabled and forced, by %I', s.some_policy), NULL
    FROM summed s
    WHERE s.relforcerowsecurity AND s.reads_tenant AND (s.open_policy IS NULL OR s.restricted)
    UNION ALL
    SELECT 'row security', 'error', string_agg(DISTINCT n.view, ', '), n.nested::regclass::text,
           format('it reads %s with the rights of %I, whom row-level security there does not bind.',
                  string_agg(DISTINCT n.source, ', '), pg_get_userbyid(n.owner)),
           format('ALTER VIEW %s SET (security_invoker = true);', n.nested::regclass)
    FROM (
        SELECT v.view, x.oid AS nested, x.relowner AS owner, k.source
        FROM nested v JOIN pg_class x ON x.oid = v.relid
        JOIN pg_rewrite w ON w.ev_class = x.oid
        JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = w.oid AND d.refclassid = 'pg_class'::regclass
        JOIN known k ON k.oid = d.refobjid
        JOIN pg_roles o ON o.oid = x.relowner
        WHERE NOT EXISTS (SELECT FROM pg_options_to_table(x.reloptions) p
                          WHERE p.option_name = 'security_invoker' AND p.option_value::boolean)
          AND (o.rolsuper OR o.rolbypassrls OR (NOT k.relforcerowsecurity AND pg_has_role(x.relowner, k.relowner, 'USAGE')))
    ) n
    GROUP BY n.nested, n.owner
    UNION ALL
    SELECT 'row security', 'warning', t.name, t.target, 'everybody may read it, and it shows every tenant''s rows.',
           format('REVOKE SELECT ON %s FROM PUBLIC;', t.target)
    FROM target t
    WHERE t.strategy = 'tenant' AND NOT t.target_rls AND EXISTS (
        SELECT FROM aclexplode(t.relacl) a WHERE a.grantee = 0 AND a.privilege_type = 'SELECT')
    UNION ALL
    SELECT 'row security', 'warning', t.name, t.target, format('its policy %I shows its readers every tenant''s rows.', p.polname),
           format('DROP POLICY %I ON %s;', p.polname, t.target)
    FROM target t CROSS JOIN installed i JOIN pg_policy p ON p.polrelid = t.oid
    WHERE t.target_rls AND p.polpermissive AND p.polcmd IN ('r', '*') AND pg_get_expr(p.polqual, p.polrelid) = 'true'
      AND NOT p.polroles <@ ARRAY[to_regrole(quote_ident(i.service_role))::oid]
    UNION ALL
    SELECT 'row security', 'ok', t.name, t.target,
           format('read by %s, %s', coalesce(g.readers, 'nobody yet'),
                  CASE WHEN t.strategy <> 'tenant' THEN 'and has no tenants'
                       WHEN t.target_rls THEN 'who see the tenant in app.current_tenant_id' ELSE 'who see every tenant' END), NULL
    FROM target t CROSS JOIN installed i
    CROSS JOIN LATERAL (
        SELECT string_agg(CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END, ', ') AS readers
        FROM aclexplode(t.relacl) a
        WHERE a.privilege_type = 'SELECT' AND a.grantee <> t.relowner AND a.grantee <> to_regrole(quote_ident(i.service_role))) g
$function$;

-- scope_findings(left_out): findings, with `kind` for `check`: whether a refresh reads its tenant's rows alone and finds them by
-- an index, as PostgreSQL plans it; see tenant_scope(). Runs as its caller and plans each view, which takes some 50 ms: doctor
-- asks, /health/ready does not.
--   left_out: views whose rights or policies are not as they should be, which says more than a plan made under them
CREATE OR REPLACE FUNCTION listener.scope_findings(left_out text[] DEFAULT '{}')
RETURNS TABLE (kind text, level text, view text, object text, problem text, mend text)
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp SET jit = off AS $function$
#variable_conflict use_column
DECLARE
    managed listener.managed_view;
BEGIN
    FOR managed IN
        SELECT v.* FROM listener.managed_view v
        WHERE v.strategy = 'tenant' AND v.name <> ALL (left_out) AND to_regclass('listener.definition_' || v.id) IS NOT NULL
        ORDER BY v.name
    LOOP
        RETURN QUERY
        SELECT 'scope', CASE WHEN s.proven AND s.indexed IS NOT FALSE AND s.advice IS NULL THEN 'ok' ELSE 'warning' END, managed.name,
               coalesce(s.source::text, managed.name),
               CASE WHEN NOT s.proven THEN format('%s may read other tenants'' rows of it: %s.', managed.name, s.advice)
                    WHEN s.advice IS NULL THEN format('%s reads one tenant''s rows of it', managed.name)
                                               || CASE WHEN s.indexed THEN ', by an index' ELSE '' END
                    WHEN s.advice ~ 'CREATE INDEX' THEN format('%s reads it whole for each tenant.', managed.name)
                    ELSE format('%s: %s.', managed.name, split_part(s.advice, ': ', 1)) END,
               CASE WHEN s.advice IS NOT NULL THEN coalesce(substring(s.advice FROM '(?:CREATE INDEX|SELECT listener\.).*$') || ';',
                    format('listener views alter %s --query FILE', listener.shell_word(managed.name))) END
        FROM (SELECT t.source, bool_and(t.proven) AS proven, bool_and(t.indexed) AS indexed,
                     coalesce(min(t.advice) FILTER (WHERE NOT t.proven), min(t.advice)) AS advice
              FROM listener.tenant_scope(to_regclass('listener.definition_' || managed.id), managed.tenant_column,
                                         managed.tenant_type) t
              -- What depends_on says was asked for when the view was made.
              WHERE t.source IS NOT NULL OR managed.depends_on IS NULL
              GROUP BY t.source) s;
    END LOOP;
    RETURN QUERY
        SELECT 'scope', 'warning', v.name, v.name, a.advice || '.',
            format('listener views alter %s --query FILE', listener.shell_word(v.name))
        FROM listener.managed_view v CROSS JOIN LATERAL listener.clock_advice(to_regclass('listener.definition_' || v.id)) AS a (advice)
        ORDER BY v.name;
END
$function$;

-- target_findings(): who could make a target wrong: a role of the application (one that owns the target, or writes
-- sources) that may write the target, empty it, or switch its row-level security off; and materialized views that
-- REFRESH would empty.
CREATE OR REPLACE FUNCTION listener.target_findings()
RETURNS TABLE ("check" text, level text, view text, object text, problem text, mend text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off AS $function$
    WITH target AS MATERIALIZED (
        SELECT v.id, v.name, v.strategy, c.oid, c.oid::regclass::text AS target, c.relowner, c.relacl
        FROM listener.managed_view v JOIN pg_class c ON c.oid = to_regclass(format('%I.%I', v.target_schema, v.target_name))
    ), installed AS (
        SELECT i.owner_role, o.oid AS owner_id, s.oid AS service_id
        FROM listener.installation i JOIN pg_roles o ON o.rolname = i.owner_role JOIN pg_roles s ON s.rolname = i.service_role
    ), captured AS MATERIALIZED (
        SELECT DISTINCT c.relowner, c.relacl FROM listener.source s JOIN pg_class c ON c.oid = s.relid
        WHERE NOT EXISTS (SELECT FROM target t WHERE t.oid = c.oid)
    ), writer AS MATERIALIZED (
        -- Roles that may log in, and write sources.
        SELECT r.oid, r.rolname FROM pg_roles r CROSS JOIN installed i
        WHERE r.rolcanlogin AND NOT r.rolsuper AND r.oid NOT IN (i.owner_id, i.service_id)
            AND NOT pg_has_role(r.oid, i.owner_id, 'MEMBER')
          AND EXISTS (SELECT FROM captured c WHERE c.relowner = r.oid OR EXISTS (
                          SELECT FROM aclexplode(c.relacl) a
                          WHERE a.privilege_type IN ('INSERT', 'UPDATE', 'DELETE', 'TRUNCATE')
                              AND (a.grantee = 0 OR pg_has_role(r.oid, a.grantee, 'USAGE'))))
    ), able AS (
        SELECT t.*, r.rolname AS role, pg_has_role(r.oid, t.relowner, 'USAGE') AS owns,
               ARRAY(SELECT p.name FROM unnest('{INSERT,UPDATE,DELETE,TRUNCATE}'::text[]) WITH ORDINALITY AS p (name, ord)
                     WHERE has_table_privilege(r.oid, t.oid, p.name) ORDER BY p.ord) AS rights
        FROM target t
        CROSS JOIN LATERAL (SELECT w.oid, w.rolname FROM writer w
                            UNION
                            SELECT r.oid, r.rolname FROM pg_roles r CROSS JOIN installed i
                            WHERE r.oid = t.relowner AND r.rolcanlogin AND NOT r.rolsuper
                              AND r.oid NOT IN (i.owner_id, i.service_id)) r
        WHERE t.strategy <> 'materialized view'
    )
    SELECT 'roles', 'warning', a.name, a.target,
           format('%s, a role of the application, %s it: it may write it, empty it, and switch its row-level security off.', quote_ident(a.role),
                  CASE WHEN pg_get_userbyid(a.relowner) = a.role THEN 'owns' ELSE 'is a member of the role that owns' END),
           format('ALTER TABLE %s OWNER TO %I; GRANT SELECT ON %s TO %I;', a.target, i.owner_role, a.target, pg_get_userbyid(a.relowner))
    FROM able a CROSS JOIN installed i WHERE a.owns
    UNION ALL
    SELECT 'roles', 'warning', a.name, a.target,
           format('%s, which writes sources, may write this target, too: %s.', quote_ident(a.role), array_to_string(a.rights, ', ')),
           format('REVOKE %s ON %s FROM %s;', array_to_string(a.rights, ', '), a.target,
                  (SELECT string_agg(DISTINCT CASE g.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(g.grantee)) END, ', ')
                   FROM aclexplode(a.relacl) g
                   WHERE g.privilege_type = ANY (a.rights) AND (g.grantee = 0 OR pg_has_role(a.role, g.grantee, 'USAGE'))))
    FROM able a WHERE NOT a.owns AND a.rights <> '{}'
    UNION ALL
    SELECT 'row security', 'error', t.name, h.hidden::text,
           format('its row-level security hides rows from %I, which owns the materialized view %s: REFRESH would empty that.',
                  pg_get_userbyid(t.relowner), t.target),
           format('CREATE POLICY listener_refresh ON %s FOR SELECT TO %I USING (true);', h.hidden, pg_get_userbyid(t.relowner))
    FROM target t CROSS JOIN LATERAL (SELECT listener.hidden_from_owner(t.oid) AS hidden) h
    WHERE t.strategy = 'materialized view' AND h.hidden IS NOT NULL
$function$;
