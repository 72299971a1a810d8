-- Whether a view that is being adopted can be refreshed by tenant: proven, or computed both ways.

-- digest_statement(view, rows): counts and hashes the rows of a query by tenant, columns as comparison_statement() takes
-- them: tenant, held, digest. The hash is a sum, which knows no order. A view without tenants has the one tenant ''.
CREATE OR REPLACE FUNCTION listener.digest_statement(view listener.managed_view, rows text) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT format('SELECT %s AS tenant, pg_catalog.count(*) AS held, pg_catalog.sum(pg_catalog.hashtextextended(pg_catalog.concat_ws(''|'', %s), 0)::pg_catalog.numeric) AS digest FROM %s GROUP BY 1',
        CASE WHEN view.tenant_column IS NULL THEN '''''::pg_catalog.text' ELSE format('q.%I::pg_catalog.text', view.tenant_column) END,
        string_agg(CASE WHEN i.type IN ('double precision', 'real') THEN format('pg_catalog.to_char(q.%I, ''9.99999999999EEEE'')', i.attname)
                        ELSE format('pg_catalog.quote_nullable(q.%I::pg_catalog.text)', i.attname) END, ', ' ORDER BY i.attnum),
        rows)
    FROM listener.images(format('%I.%I', view.target_schema, view.target_name)::regclass,
                         ('listener.definition_' || view.id)::regclass) i
$function$;

-- tenant_digest(view, tenant_id): one tenant's rows of the definition, computed as refresh() computes them.
CREATE OR REPLACE FUNCTION listener.tenant_digest(view text, tenant_id text, OUT held bigint, OUT digest numeric)
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_custom_plan SET jit = off AS $function$
DECLARE
    managed listener.managed_view := listener.find_view(view);
    tenant_key text := listener.canonical_tenant(tenant_id, managed.tenant_type);
    statement text := format(
        'SELECT pg_catalog.jsonb_build_object(''held'', d.held, ''digest'', d.digest) FROM (%s) AS d (tenant, held, digest)',
        listener.digest_statement(managed, format('listener.%I AS q WHERE %s', 'definition_' || managed.id,
                                                  listener.is_of_tenant(managed, 'q.'))));
    found jsonb := listener.evaluate(managed, statement, tenant_key);
BEGIN
    held := coalesce((found ->> 'held')::bigint, 0);
    digest := (found ->> 'digest')::numeric;
END
$function$;

-- digests_statement(view, rows): digest_statement() as one jsonb array.
CREATE OR REPLACE FUNCTION listener.digests_statement(view listener.managed_view, rows text) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT format('SELECT COALESCE(pg_catalog.jsonb_agg(d), ''[]''::pg_catalog.jsonb) FROM (%s) AS d',
                  listener.digest_statement(view, rows))
$function$;

-- tenants_held(adoption, tenant_column): the tenants of which the materialized view has rows now, NULL for rows without
-- a tenant. No row where it was never populated.
CREATE OR REPLACE FUNCTION listener.tenants_held(adoption listener.adoption, tenant_column name) RETURNS SETOF text
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    IF (SELECT c.relispopulated FROM pg_class c WHERE c.oid = adoption.relid) THEN
        RETURN QUERY SELECT t FROM jsonb_array_elements_text(listener.evaluate_as(
            adoption.owner_role, format('SELECT COALESCE(pg_catalog.jsonb_agg(DISTINCT m.%I::pg_catalog.text), ''[]''::pg_catalog.jsonb) FROM %s m',
                                        tenant_column, adoption.relid::regclass), NULL)) t;
    END IF;
END
$function$;

-- is_by_tenant(view): while a view is being adopted, whether it is proven that a tenant's rows depend on that tenant's rows
-- alone (see tenant_scope()), the view lists every tenant that the materialized view has, and no row-level security may
-- show the service other rows than the materialized view's owner. Costs next to nothing; where it says no,
-- differing_tenants() knows.
CREATE OR REPLACE FUNCTION listener.is_by_tenant(view text) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off AS $function$
DECLARE
    previous_role text := listener.become_owner();
    managed listener.managed_view := listener.find_view(view);
    adoption listener.adoption := listener.find_adoption(view, '{filling}');
    proven boolean;
BEGIN
    SELECT bool_and(s.proven) INTO proven
    FROM listener.tenant_scope(to_regclass('listener.definition_' || managed.id), managed.tenant_column, managed.tenant_type) s;
    SELECT proven AND NOT bool_or(c.relrowsecurity) INTO proven
    FROM listener.tenant_inputs(adoption.relid, managed.tenant_column) i JOIN pg_class c ON c.oid = i.relid;
    IF proven THEN
        proven := NOT EXISTS (SELECT h FROM listener.tenants_held(adoption, managed.tenant_column) h
                              EXCEPT SELECT listener.tenants(managed.name));
    END IF;
    PERFORM set_config('role', previous_role, true);
    RETURN coalesce(proven, false);
END
$function$;

-- why_not_by_tenant(view): while a view is being adopted by tenant: why it is not known that its rows are right. NULL:
-- it is, or a comparison will show it. Where row-level security hides rows from the owner of the materialized view,
-- neither the whole query nor REFRESH returns the right rows. So there a proof that the query is tenant-local is
-- needed.
CREATE OR REPLACE FUNCTION listener.why_not_by_tenant(view text) RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off AS $function$
DECLARE
    managed listener.managed_view := listener.find_view(view);
    adoption listener.adoption := listener.find_adoption(view, '{filling}');
    hidden regclass := listener.hidden_from_owner(adoption.relid);
    doubt text;
BEGIN
    IF hidden IS NULL OR managed.tenant_column IS NULL THEN
        RETURN NULL;
    END IF;
    SELECT coalesce(min(s.advice), '') INTO doubt
    FROM listener.tenant_scope(to_regclass('listener.definition_' || managed.id), managed.tenant_column, managed.tenant_type) s
    WHERE NOT s.proven HAVING count(*) > 0;
    RETURN format('its owner %s does not see all rows of %s without a tenant, so neither the whole query nor REFRESH can be trusted, '
                  'and it is not proven that a tenant''s rows depend on its own alone%s', adoption.owner_role, hidden,
                      ': ' || nullif(doubt, ''))
    WHERE doubt IS NOT NULL;
END
$function$;

-- check_comparable(view): raises LSN03 where why_not_by_tenant() has an answer.
CREATE OR REPLACE FUNCTION listener.check_comparable(view text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    why text := listener.why_not_by_tenant(view);
BEGIN
    IF why IS NOT NULL THEN
        RAISE EXCEPTION '% cannot be refreshed by tenant: %', view, why USING ERRCODE = 'LSN03',
            HINT = 'Write the query so that PostgreSQL''s planner can prove it, or let the owner of the materialized view see all rows.';
    END IF;
END
$function$;

-- differing_tenants(view): while a view is being adopted, the tenants whose rows are others when they are computed alone,
-- as refresh() does, than when the whole query is: a rank among all tenants, say, or a tenant that the tenants query does
-- not list. No row: it can be refreshed by tenant. One statement computes all of it, in one snapshot and at one now().
--   alone, whole   how many rows; they may be as many and differ
-- Where row-level security hides rows from the owner of the materialized view, the whole query is nothing to compare
-- with. Then these are the tenants that have rows in the materialized view and in the query, and are not listed.
-- Costs what the materialized view's REFRESH costs, and that of refreshing each tenant.
CREATE OR REPLACE FUNCTION listener.differing_tenants(view text) RETURNS TABLE (tenant text, alone bigint, whole bigint)
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp SET jit = off AS $function$
#variable_conflict use_column
DECLARE
    previous_role text := listener.become_owner();
    managed listener.managed_view := listener.find_view(view);
    adoption listener.adoption := listener.find_adoption(view, '{filling}');
    differing jsonb;
BEGIN
    IF listener.hidden_from_owner(adoption.relid) IS NOT NULL THEN
        RETURN QUERY
            SELECT h.tenant, coalesce(d.held, 0), 0::bigint
            FROM (SELECT t FROM listener.tenants_held(adoption, managed.tenant_column) t
                  EXCEPT SELECT listener.tenants(managed.name)) AS h (tenant)
            LEFT JOIN LATERAL (SELECT e.held FROM listener.tenant_digest(managed.name, h.tenant) e WHERE h.tenant <> '') d ON true
            -- A tenant that is gone has none in the query.
            WHERE d.held IS DISTINCT FROM 0 ORDER BY 1;
    ELSE
        differing := listener.evaluate_as(
            adoption.owner_role, listener.digests_statement(managed, format('(%s) AS q', rtrim(adoption.definition, E'; \n'))),
            NULL, listener.settings_of(managed), format($sql$
                WITH whole AS MATERIALIZED (
                    SELECT w.* FROM pg_temp.listener_evaluate($1, $2) AS e (found)
                    CROSS JOIN LATERAL jsonb_to_recordset(e.found) AS w (tenant text, held bigint, digest numeric)
                ), alone AS MATERIALIZED (
                    SELECT t.tenant, d.held, d.digest FROM listener.tenants(%1$L) AS t (tenant)
                    CROSS JOIN LATERAL listener.tenant_digest(%1$L, t.tenant) d
                )
                SELECT jsonb_agg(jsonb_build_array(coalesce(a.tenant, w.tenant), coalesce(a.held, 0), coalesce(w.held, 0)))
                FROM whole w FULL JOIN alone a ON a.tenant = w.tenant
                WHERE (coalesce(a.held, 0), a.digest) IS DISTINCT FROM (coalesce(w.held, 0), w.digest)$sql$, managed.name));
        RETURN QUERY SELECT d ->> 0, (d ->> 1)::bigint, (d ->> 2)::bigint
                     FROM jsonb_array_elements(coalesce(differing, '[]')) d ORDER BY 1;
    END IF;
    PERFORM set_config('role', previous_role, true);
END
$function$;

-- rows_changed(view): while a view is being adopted, how many rows only the target has, or only the materialized view
-- as of its last REFRESH; NULL where its owner cannot compare them.
CREATE OR REPLACE FUNCTION listener.rows_changed(view text) RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off AS $function$
DECLARE
    previous_role text := listener.become_owner();
    managed listener.managed_view := listener.find_view(view);
    adoption listener.adoption := listener.find_adoption(view, '{filling}');
    changed bigint;
BEGIN
    IF NOT managed.target_rls AND (SELECT c.relispopulated FROM pg_class c WHERE c.oid = adoption.relid) THEN
        changed := listener.evaluate_as(adoption.owner_role, format(
            'WITH old AS MATERIALIZED (SELECT ROW(o.*)::pg_catalog.text AS r FROM %s o),
                  new AS MATERIALIZED (SELECT ROW(n.*)::pg_catalog.text AS r FROM %I.%I n)
             SELECT pg_catalog.to_jsonb((SELECT pg_catalog.count(*) FROM (SELECT r FROM old EXCEPT ALL SELECT r FROM new) d)
                    OPERATOR(pg_catalog.+) (SELECT pg_catalog.count(*) FROM (SELECT r FROM new EXCEPT ALL SELECT r FROM old) d))',
            adoption.relid::regclass, managed.target_schema, managed.target_name), NULL)::text::bigint;
    END IF;
    PERFORM set_config('role', previous_role, true);
    RETURN changed;
END
$function$;
