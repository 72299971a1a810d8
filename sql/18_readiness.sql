-- Readiness: what is wrong with the tables of views as the catalog shows it, and what mends it.

-- view_troubles(): one line for each thing that somebody did to a source, a definition or a target, and that keeps a view
-- from being refreshed, or its tenants from being kept apart: the cause, and the statement that mends it. Shown by
-- /health/ready and by `listener explain`.
--   view: NULL where no view reads the source
-- Without jit, which would compile for seconds what runs for milliseconds.
CREATE OR REPLACE FUNCTION listener.view_troubles() RETURNS TABLE (view text, trouble text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off AS $function$
    WITH read AS (
        SELECT s.id, s.tenant_column, s.through_id, v.name AS view, v.tenant_secured, c.oid AS relid,
               c.relrowsecurity AND c.relforcerowsecurity AS secured, format('%I.%I', s.schema_name, s.table_name) AS source
        FROM listener.source s
        LEFT JOIN listener.view_source w ON w.source_id = s.id
        LEFT JOIN listener.managed_view v ON v.id = w.view_id
        LEFT JOIN pg_class c ON c.oid = s.relid
    ), target AS (
        SELECT v AS managed, v.id, v.name AS view, v.target_rls, i.owner_role, listener.grantee_of(v) AS service_role,
               format('%I.%I', v.target_schema, v.target_name) AS target, c.oid AS relid, c.relowner,
               c.relrowsecurity, c.relforcerowsecurity, to_regclass('listener.definition_' || v.id) AS definition,
               ARRAY(SELECT k.name FROM unnest(v.key_columns) k (name) ORDER BY k.name) AS keys,
               (SELECT string_agg(quote_ident(k.name), ', ' ORDER BY k.ord)
                FROM unnest(v.key_columns) WITH ORDINALITY AS k (name, ord)) AS key_list
        FROM listener.managed_view v CROSS JOIN listener.installation i
        LEFT JOIN pg_class c ON c.oid = to_regclass(format('%I.%I', v.target_schema, v.target_name))
    )
    SELECT r.view, format('row-level security is not enabled and forced on %s, which %s %s: ALTER TABLE %s ENABLE ROW '
                          'LEVEL SECURITY, FORCE ROW LEVEL SECURITY', r.source, string_agg(r.view, ', ') OVER readers,
                          CASE count(*) OVER readers WHEN 1 THEN 'reads' ELSE 'read' END, r.source)
    FROM read r
    WHERE r.tenant_secured AND NOT r.secured AND (r.tenant_column IS NOT NULL OR r.through_id IS NOT NULL)
    WINDOW readers AS (PARTITION BY r.source)
    UNION ALL
    SELECT r.view, format('the source %s is gone', r.source)
                   || coalesce(', which ' || string_agg(r.view, ', ') OVER readers
                               || CASE count(*) OVER readers WHEN 1 THEN ' reads' ELSE ' read' END
                               || ': make it again, or listener.drop_view', ': make it again')
    FROM read r
    WHERE r.relid IS NULL AND to_regclass(r.source) IS NULL
    WINDOW readers AS (PARTITION BY r.source)
    UNION ALL
    SELECT t.view, format('the definition of %s reads %s, %s, whose changes fire no trigger: take it out of the query', t.view,
                          r.relid::regclass, CASE r.relkind WHEN 'S' THEN 'a sequence' ELSE 'a system catalog' END)
    FROM target t CROSS JOIN LATERAL listener.reads(t.definition) r
    WHERE r.relid < 16384 OR r.relkind = 'S'
    UNION ALL
    -- Only the tables below: the view does not read those above.
    SELECT r.view, format('%s%s is %s', c.oid::regclass,
                          CASE WHEN c.oid <> r.relid THEN format(', which is read with %s,', r.source) ELSE '' END,
                          CASE WHEN c.relkind = 'f'
                               THEN format('a foreign table, and its changes fire no trigger: detach it from %s', r.source)
                               ELSE format('unlogged, so that a crash empties it and fires no trigger: ALTER TABLE %s SET LOGGED',
                                           c.oid::regclass) END)
    FROM read r CROSS JOIN LATERAL listener.tables_below(r.relid) b JOIN pg_class c ON c.oid = b.relid
    WHERE c.relkind = 'f' OR (c.relpersistence = 'u' AND c.relkind = 'r')
    UNION ALL
    SELECT r.view, format('the tenant column %I of %s is gone: a write to it marks every tenant, until listener.add_source '
                          'says how its rows find theirs', r.tenant_column, r.source)
    FROM read r
    WHERE r.tenant_column IS NOT NULL AND r.relid IS NOT NULL AND listener.tracked_column(r.id) IS NULL
    UNION ALL
    SELECT t.view, format('the definition of %s is gone, since something that it reads was dropped with CASCADE: it is made '
                          'again once that is back, or SELECT listener.drop_view(%L)', t.view, t.view)
    FROM target t
    WHERE t.definition IS NULL OR to_regclass('listener.tenants_' || t.id) IS NULL
    UNION ALL
    -- Known by its comment after a renaming.
    SELECT t.view, CASE WHEN o.relname IS NULL
        THEN CASE WHEN (t.managed).strategy = 'materialized view'
                  THEN format('the materialized view %s is gone: create it again, or SELECT listener.drop_view(%L)', t.target, t.view)
                  ELSE format('the target %s of %s is gone: SELECT listener.restore_target(%L)', t.target, t.view, t.view) END
        ELSE format('the target %s of %s is called %I.%I now: ', t.target, t.view, o.nspname, o.relname)
             || CASE WHEN o.nspname <> (t.managed).target_schema
                     THEN format('ALTER TABLE %I.%I SET SCHEMA %I', o.nspname, o.relname, (t.managed).target_schema)
                     ELSE format('ALTER TABLE %I.%I RENAME TO %I', o.nspname, o.relname, (t.managed).target_name) END END
    FROM target t
    LEFT JOIN LATERAL (
        SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind IN ('r', 'p')
          AND obj_description(c.oid, 'pg_class') LIKE format('Kept fresh by listener from listener.definition\_%s;%%', t.id)
        LIMIT 1) o ON true
    WHERE t.relid IS NULL
    UNION ALL
    -- What is left of a row without its key can be told from no other.
    SELECT t.view, format('the target %s lacks what its definition returns: %sALTER TABLE %s %s', t.target,
                          CASE WHEN bool_or(m.name = ANY (t.keys)) THEN format('TRUNCATE %s; ', t.target) END, t.target,
                          string_agg(format('ADD COLUMN %I %s', m.name, m.type), ', '))
    FROM target t CROSS JOIN LATERAL listener.missing_columns(t.managed) m
    -- A materialized view that was made anew has the columns that it has: the sweep follows.
    WHERE (t.managed).strategy <> 'materialized view'
    GROUP BY t.view, t.target
    UNION ALL
    SELECT t.view, format('the target %s has other types than its definition: ALTER TABLE %s %s', t.target, t.target,
                          string_agg(format('ALTER COLUMN %1$I TYPE %2$s USING %1$I::text::%2$s', a.attname,
                                            format_type(d.atttypid, d.atttypmod)), ', ' ORDER BY a.attnum))
    FROM target t
    JOIN pg_attribute a ON a.attrelid = t.relid AND a.attnum > 0 AND NOT a.attisdropped
    JOIN pg_attribute d ON d.attrelid = t.definition AND d.attname = a.attname AND d.attnum > 0
    WHERE (a.atttypid, a.atttypmod) <> (d.atttypid, d.atttypmod) AND (t.managed).strategy <> 'materialized view'
    GROUP BY t.view, t.target
    UNION ALL
    SELECT t.view, format('nothing fills what was added to the target %s: ALTER TABLE %s %s', t.target, t.target,
                          string_agg(format('ALTER COLUMN %I DROP NOT NULL', a.attname), ', ' ORDER BY a.attnum))
    FROM target t
    JOIN pg_attribute a ON a.attrelid = t.relid AND a.attnum > 0 AND NOT a.attisdropped
    WHERE a.attnotnull AND NOT a.atthasdef AND a.attidentity = '' AND t.definition IS NOT NULL
      AND NOT EXISTS (SELECT FROM pg_attribute d WHERE d.attrelid = t.definition AND d.attname = a.attname AND d.attnum > 0)
    GROUP BY t.view, t.target
    UNION ALL
    SELECT t.view, format('the unique index of the target %s is gone: CREATE UNIQUE INDEX ON %s (%s) NULLS NOT DISTINCT',
                          t.target, t.target, t.key_list)
    FROM target t
    WHERE t.relid IS NOT NULL AND cardinality(t.keys) > 0
      AND NOT EXISTS (SELECT FROM listener.missing_columns(t.managed)) AND NOT EXISTS (
        SELECT FROM pg_index x
        WHERE x.indrelid = t.relid AND x.indisunique AND x.indisvalid AND x.indpred IS NULL AND x.indexprs IS NULL
          AND t.keys = ARRAY(SELECT a.attname FROM pg_attribute a
                             WHERE a.attrelid = t.relid AND a.attnum = ANY (x.indkey::smallint[]) ORDER BY a.attname))
    UNION ALL
    SELECT t.view, format('row-level security is not enabled and forced on the target %s, and its readers see every tenant: '
                          'ALTER TABLE %s ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY', t.target, t.target)
    FROM target t
    WHERE t.target_rls AND NOT (t.relrowsecurity AND t.relforcerowsecurity)
    UNION ALL
    SELECT t.view, format('row-level security lets %I write nothing into the target %s: ', t.service_role, t.target)
                   || CASE WHEN t.target_rls THEN listener.target_policy(t.managed)
                           ELSE format('ALTER TABLE %s DISABLE ROW LEVEL SECURITY', t.target) END
    FROM target t
    WHERE t.relrowsecurity AND NOT EXISTS (
        SELECT FROM pg_policy p
        WHERE p.polrelid = t.relid AND p.polpermissive AND p.polcmd IN ('a', '*')
          AND EXISTS (SELECT FROM unnest(p.polroles) o (role) WHERE o.role = 0 OR pg_has_role(t.service_role, o.role, 'USAGE')))
    UNION ALL
    SELECT t.view, format('%I may not write the target %s: GRANT SELECT, INSERT, UPDATE, DELETE ON %s TO %I', t.service_role,
                          t.target, t.target, t.service_role)
    FROM target t
    WHERE t.relid IS NOT NULL AND (t.managed).strategy <> 'materialized view' AND EXISTS (
        SELECT FROM unnest('{SELECT,INSERT,UPDATE,DELETE}'::text[]) p (granted)
        WHERE NOT has_table_privilege(t.service_role, t.relid, p.granted))
    UNION ALL
    SELECT t.view, format('the target %s belongs to %I, so that %I can neither mend nor drop it: ',
                          t.target, pg_get_userbyid(t.relowner), t.owner_role)
                   -- What is adopted or kept belongs to the team's role, and stays so.
                   || CASE WHEN (t.managed).strategy = 'materialized view'
                                OR EXISTS (SELECT FROM listener.adoption a WHERE a.view_id = t.id)
                           THEN format('GRANT %I TO %I', pg_get_userbyid(t.relowner), t.owner_role)
                           ELSE format('ALTER TABLE %s OWNER TO %I', t.target, t.owner_role) END
    FROM target t
    WHERE NOT pg_has_role(t.owner_role, t.relowner, 'USAGE')
$function$;
