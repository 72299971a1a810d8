-- Whether a view that is being adopted can be refreshed by tenant: proven, or computed both ways.

-- digest_statement(view, rows): counts and hashes the rows of a query by tenant, columns as comparison_statement() takes
-- them. The hash is a sum, which knows no order.
CREATE OR REPLACE FUNCTION listener.digest_statement(view listener.managed_view, rows text) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT format('SELECT q.%I::pg_catalog.text, pg_catalog.count(*), pg_catalog.sum(pg_catalog.hashtextextended(pg_catalog.concat_ws(''|'', %s), 0)::pg_catalog.numeric) FROM %s GROUP BY 1',
        view.tenant_column,
        string_agg(CASE WHEN i.type IN ('double precision', 'real') THEN format('pg_catalog.to_char(q.%I, ''9.99999999999EEEE'')', i.attname)
                        ELSE format('pg_catalog.quote_nullable(%s)', listener.text_of(view, format('q.%I', i.attname))) END, ', ' ORDER BY i.attnum),
        rows)
    FROM listener.images(format('%I.%I', view.target_schema, view.target_name)::regclass,
                         ('listener.definition_' || view.id)::regclass) i
$function$;

-- whole_digests(view): by tenant, the rows of the materialized view's query computed as a whole, with its owner's rights
-- as REFRESH computes them.
CREATE OR REPLACE FUNCTION listener.whole_digests(view text) RETURNS TABLE (tenant text, held bigint, digest numeric)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp SET TimeZone = 'UTC' SET DateStyle = 'ISO, YMD' SET IntervalStyle = 'postgres'
SET extra_float_digits = 1 SET bytea_output = 'hex' SET jit = off AS $function$
DECLARE
    managed listener.managed_view := listener.find_view(view);
    adoption listener.adoption := listener.find_adoption(view, '{filling}');
    statement text := listener.digest_statement(managed, format('(%s) AS q', rtrim(adoption.definition, E'; \n')));
    previous_role text := current_setting('role');
BEGIN
    PERFORM set_config('role', adoption.owner_role, true), set_config('TimeZone', managed.time_zone, true),
            set_config('search_path', managed.search_path, true);
    RETURN QUERY EXECUTE statement;
    PERFORM pg_catalog.set_config('role', previous_role, true);
END
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
    unlisted boolean;
    proven boolean;
BEGIN
    SELECT bool_and(s.proven) INTO proven
    FROM listener.tenant_scope(to_regclass('listener.definition_' || managed.id), managed.tenant_column, managed.tenant_type) s;
    SELECT proven AND NOT bool_or(c.relrowsecurity) INTO proven
    FROM listener.tenant_inputs(adoption.relid, managed.tenant_column) i JOIN pg_class c ON c.oid = i.relid;
    IF (SELECT c.relispopulated FROM pg_class c WHERE c.oid = adoption.relid) THEN
        EXECUTE format('SELECT EXISTS (SELECT m.%I::text FROM %s m EXCEPT SELECT listener.tenants(%L))', managed.tenant_column,
                       adoption.relid::regclass, managed.name) INTO unlisted;
    END IF;
    PERFORM set_config('role', previous_role, true);
    RETURN coalesce(proven AND NOT unlisted, false);
END
$function$;

-- differing_tenants(view): while a view is being adopted, the tenants whose rows are others when they are computed alone,
-- as refresh() does, than when the whole query is: a rank among all tenants, say, or a tenant that the tenants query does
-- not list. No row: it can be refreshed by tenant. One snapshot for all of it, since each function called is STABLE.
--   alone, whole   how many rows; they may be as many and differ
-- Costs what the materialized view's REFRESH costs, and that of refreshing each tenant.
CREATE OR REPLACE FUNCTION listener.differing_tenants(view text) RETURNS TABLE (tenant text, alone bigint, whole bigint)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET jit = off AS $function$
DECLARE
    previous_role text := listener.become_owner();
BEGIN
    RETURN QUERY
    SELECT coalesce(a.tenant, w.tenant), coalesce(a.held, 0), coalesce(w.held, 0)
    FROM listener.whole_digests(view) w
    FULL JOIN (SELECT t.tenant, d.held, d.digest FROM listener.tenants(view) AS t (tenant)
               CROSS JOIN LATERAL listener.tenant_digest(view, t.tenant) d) a ON a.tenant = w.tenant
    WHERE (coalesce(a.held, 0), a.digest) IS DISTINCT FROM (coalesce(w.held, 0), w.digest)
    ORDER BY 1;
    PERFORM set_config('role', previous_role, true);
END
$function$;
