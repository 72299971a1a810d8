SET ROLE listener_owner;

-- Row-level security, enabled and FORCEd: not even the owner sees rows of a tenant that it did not name, and a session
-- that names none gets an error instead of an empty result.
DO $security$
DECLARE
    relation text;
BEGIN
    FOREACH relation IN ARRAY ARRAY['revenue_ledger', 'attribution_events', 'attribution_allocations', 'dead_events',
                                    'reconciliation_runs'] LOOP
        EXECUTE format('ALTER TABLE public.%I ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY', relation);
        EXECUTE format($policy$
            CREATE POLICY tenant ON public.%I
            USING (tenant_id = current_setting('app.current_tenant_id')::uuid)
            WITH CHECK (tenant_id = current_setting('app.current_tenant_id')::uuid)$policy$, relation);
    END LOOP;
END
$security$;

-- Ingestion is not a worker's to write, whatever its grants say one day.
CREATE FUNCTION public.refuse_workers() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    IF current_setting('app.execution_context', true) = 'worker' THEN
        RAISE EXCEPTION 'a worker may not write %', TG_TABLE_NAME USING ERRCODE = 'insufficient_privilege';
    END IF;
    RETURN NULL;
END
$function$;
CREATE TRIGGER refuse_workers BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON public.attribution_events
    FOR EACH STATEMENT EXECUTE FUNCTION public.refuse_workers();
CREATE TRIGGER refuse_workers BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON public.dead_events
    FOR EACH STATEMENT EXECUTE FUNCTION public.refuse_workers();

GRANT SELECT, INSERT ON public.tenants TO listener_app;
GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE
    ON public.revenue_ledger, public.attribution_allocations, public.reconciliation_runs TO listener_app;
GRANT SELECT, INSERT ON public.attribution_events, public.dead_events TO listener_app;
GRANT SELECT ON public.tenants, public.revenue_ledger, public.attribution_events, public.attribution_allocations,
    public.dead_events, public.reconciliation_runs TO listener_service;

RESET ROLE;
