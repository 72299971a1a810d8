-- Rows that a view leaves out, and keys whose definition has more than one right result: what verify and `listener
-- doctor` ask.

-- untenanted_rows(view): how many rows of a definition have no tenant: their tenant column is NULL or ''. No tenant's
-- refresh returns them, so the target never has them. Counts the rows that the view's compute role sees while no tenant
-- is set. NULL: the view has no tenants; or the rows cannot be counted, since a policy raises an error where no tenant
-- is set.
CREATE OR REPLACE FUNCTION listener.untenanted_rows(view listener.managed_view) RETURNS bigint
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET jit = off AS $function$
DECLARE
    statement text;
BEGIN
    IF view.strategy <> 'tenant' THEN
        RETURN NULL;
    END IF;
    statement := format('SELECT pg_catalog.to_jsonb(pg_catalog.count(*)) FROM listener.%I d WHERE d.%I IS NULL%s',
                        'definition_' || view.id, view.tenant_column,
                        CASE WHEN view.tenant_type = 'text'
                             THEN format(' OR d.%I OPERATOR(pg_catalog.=) ''''::pg_catalog.text', view.tenant_column) ELSE '' END);
    RETURN listener.evaluate(view, statement, '')::bigint;
EXCEPTION WHEN OTHERS THEN
    RETURN NULL;
END
$function$;

-- rows_without_tenant(view): untenanted_rows() by the view's name. Raises LSN01.
CREATE OR REPLACE FUNCTION listener.rows_without_tenant(view text) RETURNS bigint
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
    SELECT listener.untenanted_rows(v) FROM listener.find_view(view) v
$function$;

-- is_undetermined(view, tenant_id): whether check_drift() found that the definition gives this key another result
-- although nothing changed, and nothing has changed since. Raises LSN01, LSN02.
CREATE OR REPLACE FUNCTION listener.is_undetermined(view text, tenant_id text) RETURNS boolean
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
    SELECT EXISTS (
        SELECT FROM listener.find_view(view) v
        CROSS JOIN LATERAL listener.state_of(v.id, listener.canonical_tenant(tenant_id, v.tenant_type)) r
        WHERE r.undetermined_version = r.refreshed_version)
$function$;

-- result_findings(): findings: rows that have no tenant, and keys with more than one right result. It counts the rows
-- of each definition, so only doctor asks for it, and not /health/ready.
CREATE OR REPLACE FUNCTION listener.result_findings()
RETURNS TABLE ("check" text, level text, view text, object text, problem text, mend text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off AS $function$
    SELECT 'result', CASE WHEN r.rows > 0 THEN 'warning' ELSE 'ok' END, v.name, v.name,
           CASE WHEN r.rows > 0
                THEN format('%s no tenant (%I is NULL%s), and the target never has them.',
                            CASE r.rows WHEN 1 THEN '1 row of it has' ELSE r.rows || ' rows of it have' END, v.tenant_column,
                            CASE v.tenant_type WHEN 'text' THEN ' or ''''' ELSE '' END)
                ELSE 'each of its rows has a tenant' END,
           CASE WHEN r.rows > 0 THEN format('listener views alter %s --query FILE', listener.shell_word(v.name)) END
    FROM listener.managed_view v CROSS JOIN LATERAL listener.untenanted_rows(v) AS r (rows)
    WHERE r.rows IS NOT NULL AND to_regclass('listener.definition_' || v.id) IS NOT NULL
    UNION ALL
    SELECT 'result', 'warning', v.name, v.name,
           format('%s more than one right result: computed again, it came out differently.%s',
                  CASE k.keys WHEN 1 THEN '1 key of it has' ELSE k.keys || ' keys of it have' END,
                  (SELECT ' ' || string_agg(DISTINCT u.what || ': ' || u.fix, '; ') || '.'
                   FROM listener.undetermined(to_regclass('listener.definition_' || v.id)) u)),
           format('listener views alter %s --query FILE', listener.shell_word(v.name))
    FROM listener.managed_view v
    CROSS JOIN LATERAL (SELECT count(*) FROM listener.refresh_state r
                        WHERE r.view_id = v.id AND r.undetermined_version = r.refreshed_version) AS k (keys)
    WHERE k.keys > 0
$function$;
