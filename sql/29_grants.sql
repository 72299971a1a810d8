-- Who may do what. Nobody but the owner and the service's role has any right on this schema unless it is granted:
-- GRANT USAGE ON SCHEMA listener, and EXECUTE or SELECT on what a role is to use.
DO $grants$
DECLARE
    installed listener.installation;
    computing regprocedure;
    routine regprocedure;
BEGIN
    SELECT i.* INTO installed FROM listener.installation i;
    FOR routine IN SELECT p.oid FROM pg_catalog.pg_proc p WHERE p.pronamespace = 'listener'::regnamespace LOOP
        EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', routine);
    END LOOP;
    IF installed.service_role = installed.owner_role THEN
        RETURN;
    END IF;
    EXECUTE format('GRANT USAGE ON SCHEMA listener TO %I', installed.service_role);
    EXECUTE format('GRANT SELECT ON ALL TABLES IN SCHEMA listener TO %I', installed.service_role);
    EXECUTE format('GRANT INSERT, UPDATE, DELETE ON listener.refresh_state, listener.dead_letter TO %I', installed.service_role);
    EXECUTE format('GRANT INSERT, DELETE ON listener.change_log, listener.drain_log, listener.dirty_key, listener.purge_mark,
        listener.moved_tenant TO %I', installed.service_role);
    FOREACH routine IN ARRAY ARRAY[
        'listener.find_view(text)', 'listener.canonical_tenant(text, text)', 'listener.canonical_or_null(text, text)',
        'listener.check_caller(text)', 'listener.serves(text)',
        'listener.lock_key(integer, text)', 'listener.new_changes(xid8, xid8[], timestamptz)',
        'listener.known_version(integer, text)', 'listener.state_of(integer, text)',
        'listener.record_refresh(integer, text, bigint, timestamptz, bigint, bigint, bigint, text)',
        'listener.drained_keys(bigint)', 'listener.drain()', 'listener.fold_restored_log()',
        'listener.pending_keys(boolean)', 'listener.images(regclass, regclass)',
        'listener.comparison_statement(listener.managed_view)', 'listener.missing_columns(listener.managed_view)',
        'listener.refresh(text, text)', 'listener.refresh(text, uuid)', 'listener.refresh(text, bigint)',
        'listener.is_shown(integer, text, bigint)', 'listener.refresh_dirty(integer, text, text, bigint)',
        'listener.refresh_materialized_view_for_tenant(text, text)',
        'listener.refresh_materialized_view_for_tenant(uuid, text)',
        'listener.refresh_materialized_view_for_tenant(bigint, text)', 'listener.tenants(text)',
        'listener.expand(text)', 'listener.unconsumed()', 'listener.is_stale(integer, text)',
        'listener.compare(text, text)', 'listener.explain_key(text, text)',
        'listener.record_failure(integer, text, text, text, text, text, text, text, text, integer, interval, interval, interval)',
        'listener.record_refusal(text, text, text, text, text)', 'listener.discard_letter(uuid)',
        'listener.purge(interval, bigint)', 'listener.changed_definitions()', 'listener.repair_capture()',
        'listener.hold_lease()', 'listener.end_lease()', 'listener.take_mark()', 'listener.is_past(xid8)',
        'listener.must_poll()', 'listener.lease_is_wrong()', 'listener.ring_for_all()',
        'listener.lock_holder(bigint)', 'listener.view_troubles()', 'listener.readiness()',
        -- Planning for one tenant happens as this role.
        'listener.reads(regclass)', 'listener.hiding_functions(regclass)', 'listener.tracked(text)',
        'listener.tracked_names(name[], text)', 'listener.tenant_inputs(regclass, name)',
        'listener.make_stand_ins(regclass, text)', 'listener.view_text(oid, text)', 'listener.explained(text, text)',
        'listener.some_tenant(text)', 'listener.tenant_plans(regclass, name, text)', 'listener.plan_nodes(jsonb)',
        'listener.plain_text(text, text)', 'listener.and_members(text)', 'listener.uncast(text)',
        'listener.equalities(text, text)', 'listener.plan_scans(jsonb)', 'listener.implied(jsonb, text)',
        'listener.index_scans(jsonb, text)', 'listener.tenant_scope(regclass, name, text)', 'listener.index_advice(oid, name[])',
        'listener.scope_advice(jsonb, jsonb, integer[], "char", boolean, text, name, name, name[])'
        ]::regprocedure[]
    LOOP
        EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %I', routine, installed.service_role);
    END LOOP;
    -- These run with the rights of the service's role, whoever calls: it owns them. An owner needs CREATE on the
    -- schema at the moment of the hand-over, and must not keep it.
    EXECUTE format('GRANT CREATE ON SCHEMA listener TO %I', installed.service_role);
    FOREACH computing IN ARRAY ARRAY[
        'listener.drain()', 'listener.pending_keys(boolean)', 'listener.refresh(text, text)', 'listener.tenants(text)',
        'listener.expand(text)', 'listener.unconsumed()', 'listener.is_stale(integer, text)',
        'listener.compare(text, text)', 'listener.explain_key(text, text)', 'listener.record_failure(integer, text, text, text, text, text, text, text, text, integer, interval, interval, interval)',
        'listener.record_refusal(text, text, text, text, text)', 'listener.discard_letter(uuid)',
        'listener.purge(interval, bigint)']::regprocedure[]
    LOOP
        EXECUTE format('ALTER FUNCTION %s OWNER TO %I', computing, installed.service_role);
    END LOOP;
    EXECUTE format('REVOKE CREATE ON SCHEMA listener FROM %I', installed.service_role);
END
$grants$;
