-- Who may do what, and to which tenant's rows.
SET ROLE listener_owner;
SET search_path = public;

GRANT SELECT ON tenants TO listener_app, listener_service, listener_reader;
GRANT INSERT ON tenants TO listener_app;
GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE
    ON revenue_ledger, attribution_allocations, reconciliation_runs TO listener_app;
-- Append-only: no UPDATE, no DELETE, no TRUNCATE.
GRANT SELECT, INSERT ON attribution_events, dead_events TO listener_app;
GRANT SELECT ON revenue_ledger, attribution_events, attribution_allocations, reconciliation_runs TO listener_service;

-- FORCE binds the owner too. The policy is strict: a session that names no tenant gets an error, not an empty table.
ALTER TABLE revenue_ledger ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant ON revenue_ledger
    USING (tenant_id = current_setting('app.current_tenant_id')::uuid)
    WITH CHECK (tenant_id = current_setting('app.current_tenant_id')::uuid);
ALTER TABLE attribution_events ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant ON attribution_events
    USING (tenant_id = current_setting('app.current_tenant_id')::uuid)
    WITH CHECK (tenant_id = current_setting('app.current_tenant_id')::uuid);
ALTER TABLE attribution_allocations ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant ON attribution_allocations
    USING (tenant_id = current_setting('app.current_tenant_id')::uuid)
    WITH CHECK (tenant_id = current_setting('app.current_tenant_id')::uuid);
ALTER TABLE dead_events ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant ON dead_events
    USING (tenant_id = current_setting('app.current_tenant_id')::uuid)
    WITH CHECK (tenant_id = current_setting('app.current_tenant_id')::uuid);
ALTER TABLE reconciliation_runs ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant ON reconciliation_runs
    USING (tenant_id = current_setting('app.current_tenant_id')::uuid)
    WITH CHECK (tenant_id = current_setting('app.current_tenant_id')::uuid);

-- refuse_worker(): a background worker reads events and never makes them, whatever it was granted.
-- Raises insufficient_privilege where app.execution_context is 'worker'.
CREATE FUNCTION refuse_worker() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    IF current_setting('app.execution_context', true) = 'worker' THEN
        RAISE EXCEPTION '% on % is refused to a worker', TG_OP, TG_TABLE_NAME USING ERRCODE = 'insufficient_privilege';
    END IF;
    RETURN NULL;
END
$function$;
CREATE TRIGGER refuse_worker BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON attribution_events
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_worker();
CREATE TRIGGER refuse_worker BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON dead_events
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_worker();

RESET search_path;
RESET ROLE;
