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
    DELETE FROM listener.needed_right;
    IF installed.service_role = installed.owner_role THEN
        RETURN;
    END IF;
    -- Nothing is left of what an earlier release, or somebody, granted.
    EXECUTE format('REVOKE ALL ON ALL TABLES IN SCHEMA listener FROM %I', installed.service_role);
    EXECUTE format('REVOKE ALL ON ALL SEQUENCES IN SCHEMA listener FROM %I', installed.service_role);
    EXECUTE format('REVOKE ALL ON ALL FUNCTIONS IN SCHEMA listener FROM %I', installed.service_role);
    EXECUTE format('GRANT USAGE ON SCHEMA listener TO %I', installed.service_role);
    EXECUTE format('GRANT SELECT ON ALL TABLES IN SCHEMA listener TO %I', installed.service_role);
    EXECUTE format('GRANT INSERT, UPDATE, DELETE ON listener.refresh_state, listener.dead_letter TO %I', installed.service_role);
    EXECUTE format('GRANT INSERT, DELETE ON listener.change_log, listener.drain_log, listener.dirty_key, listener.purge_mark,
        listener.moved_tenant TO %I', installed.service_role);
    FOREACH routine IN ARRAY ARRAY[
        'listener.alter_statement(listener.managed_view, listener.managed_view)',
        'listener.altered(listener.managed_view)',
        'listener.and_members(text)',
        'listener.body_names(oid)',
        'listener.body_relations(oid)',
        'listener.calls_of(name[])',
        'listener.canonical_or_null(text, text)',
        'listener.canonical_tenant(text, text)',
        'listener.capture_findings()',
        'listener.changed_definitions()',
        'listener.check_caller(text)',
        'listener.check_drift(text, text)',
        'listener.check_source(regclass, name)',
        'listener.compare(text, text)',
        'listener.compare_alter(text, text)',
        'listener.compare_materialized_view(regclass)',
        'listener.compared_rows(listener.managed_view)',
        'listener.comparison_statement(listener.managed_view)',
        'listener.computing_roles(regclass)',
        'listener.concurrent_index(regclass)',
        'listener.digest_statement(listener.managed_view, text)',
        'listener.discard_letter(uuid)',
        'listener.drain()',
        'listener.drained_keys(bigint)',
        'listener.drift_example(text, text)',
        'listener.end_lease()',
        'listener.equalities(text, text)',
        'listener.expand(text)',
        'listener.explain_key(text, text)',
        'listener.explain_upstream(text, text)',
        'listener.explained(text, text)',
        'listener.find_view(text)',
        'listener.fingerprint(regclass)',
        'listener.fold_restored_log()',
        'listener.forget_rows(text, text)',
        'listener.hiding_functions(regclass)',
        'listener.hides_rows(oid)',
        'listener.lists_target(pg_policy)',
        'listener.hold_lease()',
        'listener.images(regclass, regclass)',
        'listener.implied(jsonb, text)',
        'listener.index_advice(oid, name[])',
        'listener.index_scans(jsonb, text)',
        'listener.inventory_names()',
        'listener.is_of_tenant(listener.managed_view, text)',
        'listener.is_past(xid8)',
        'listener.is_pending(integer, text)',
        'listener.is_shown(integer, text, bigint)',
        'listener.is_stale(integer, text)',
        'listener.known_version(integer, text)',
        'listener.lease_is_wrong()',
        'listener.lock_holder(bigint)',
        'listener.lock_key(integer, text)',
        'listener.lost_guarantees()',
        'listener.make_stand_ins(regclass, text)',
        'listener.missing_columns(listener.managed_view)',
        'listener.must_poll()',
        'listener.new_changes(xid8, xid8[], timestamptz)',
        'listener.next_keys(integer, text, integer, interval)',
        'listener.pending_keys(boolean)',
        'listener.pending_upstream(integer, text)',
        'listener.plain_text(text, text)',
        'listener.plan_nodes(jsonb)',
        'listener.plan_scans(jsonb)',
        'listener.progress_findings()',
        'listener.proposal(regclass, name, boolean, name[])',
        'listener.purge(interval, bigint)',
        'listener.readiness()',
        'listener.reached(regclass)',
        'listener.reads(regclass)',
        'listener.reads_unseen(name)',
        'listener.record_failure(integer, text, text, text, text, text, text, text, text, integer, interval, interval, interval)',
        'listener.record_refresh(integer, text, bigint, timestamptz, bigint, bigint, bigint, text)',
        'listener.record_refusal(text, text, text, text, text)',
        'listener.refresh(text, bigint)',
        'listener.refresh(text, text)',
        'listener.refresh(text, uuid)',
        'listener.refresh_dirty(integer, text, text, bigint)',
        'listener.refresh_key(text, text)',
        'listener.refresh_materialized_view_for_tenant(bigint, text)',
        'listener.refresh_materialized_view_for_tenant(text, text)',
        'listener.refresh_materialized_view_for_tenant(uuid, text)',
        'listener.refreshed_by(regclass)',
        'listener.repair_capture()',
        'listener.ring_for_all()',
        'listener.scope_advice(jsonb, jsonb, integer[], "char", boolean, text, name, name, name[])',
        'listener.scope_findings(text[])',
        'listener.seconds_text(interval)',
        'listener.server_findings(integer, interval)',
        'listener.serves(text)',
        'listener.shell_word(text)',
        'listener.some_tenant(text)',
        'listener.state_findings()',
        'listener.state_of(integer, text)',
        'listener.take_mark()',
        'listener.take_stock(regclass, name[])',
        'listener.tenant_column_of(regclass, name[])',
        'listener.tenant_digest(text, text)',
        'listener.tenant_inputs(regclass, name)',
        'listener.tenant_plans(regclass, name, text)',
        'listener.tenant_scope(regclass, name, text)',
        'listener.tenant_views(regclass)',
        'listener.tenants(text)',
        'listener.text_search_digest()',
        'listener.time_dependence(regclass)',
        'listener.made_ours(regclass)',
        'listener.tied_to(regclass)',
        'listener.tracked(text)',
        'listener.tracked_names(name[], text)',
        'listener.tracks_by_view()',
        'listener.uncast(text)',
        'listener.unconsumed()',
        'listener.view_fingerprint(listener.managed_view)',
        'listener.view_text(oid, text)',
        'listener.view_troubles()',
        'listener.zone_differs(text, text)']::regprocedure[]
    LOOP
        EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %I', routine, installed.service_role);
    END LOOP;
    -- These run with the rights of the service's role, whoever calls: it owns them. An owner needs CREATE on the
    -- schema at the moment of the hand-over, and must not keep it.
    EXECUTE format('GRANT CREATE ON SCHEMA listener TO %I', installed.service_role);
    FOREACH computing IN ARRAY ARRAY[
        'listener.check_drift(text, text)',
        'listener.compare(text, text)',
        'listener.compare_alter(text, text)',
        'listener.discard_letter(uuid)',
        'listener.drain()',
        'listener.drift_example(text, text)',
        'listener.expand(text)',
        'listener.explain_key(text, text)',
        'listener.explain_upstream(text, text)',
        'listener.forget_rows(text, text)',
        'listener.is_stale(integer, text)',
        'listener.pending_keys(boolean)',
        'listener.purge(interval, bigint)',
        'listener.record_failure(integer, text, text, text, text, text, text, text, text, integer, interval, interval, interval)',
        'listener.record_refusal(text, text, text, text, text)',
        'listener.refresh(text, text)',
        'listener.tenant_digest(text, text)',
        'listener.tenants(text)',
        'listener.unconsumed()']::regprocedure[]
    LOOP
        EXECUTE format('ALTER FUNCTION %s OWNER TO %I', computing, installed.service_role);
        -- Who may make and drop views may fill and compare them, and ask doctor, also where it is no member any more.
        EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %I, %I', computing, installed.owner_role, installed.service_role);
    END LOOP;
    EXECUTE format('REVOKE CREATE ON SCHEMA listener FROM %I', installed.service_role);
    -- What belongs to a view comes and goes with it: doctor knows what that needs.
    INSERT INTO listener.needed_right (kind, object, right_name)
    SELECT 'FUNCTION', p.oid::regprocedure::text, r.right_name
    FROM pg_catalog.pg_proc p
    CROSS JOIN LATERAL (
        SELECT 'EXECUTE' WHERE pg_catalog.has_function_privilege(installed.service_role, p.oid, 'EXECUTE')
        UNION ALL SELECT 'OWNER' WHERE pg_catalog.pg_get_userbyid(p.proowner) = installed.service_role) AS r (right_name)
    WHERE p.pronamespace = 'listener'::regnamespace AND p.proname !~ '^difference_[0-9]+$'
    UNION ALL
    SELECT CASE c.relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END, c.oid::regclass::text, a.privilege_type
    FROM pg_catalog.pg_class c CROSS JOIN LATERAL pg_catalog.aclexplode(c.relacl) a
    WHERE c.relnamespace = 'listener'::regnamespace AND c.relkind IN ('r', 'v', 'S')
      AND c.relname !~ '^(definition|tenants|lookup|tenant_of|key_of|reference_of)_[0-9]'
      AND pg_catalog.pg_get_userbyid(a.grantee) = installed.service_role;
    PERFORM listener.grant_definition(v.id) FROM listener.managed_view v
    WHERE pg_catalog.to_regclass('listener.definition_' || v.id) IS NOT NULL
      AND pg_catalog.to_regclass('listener.tenants_' || v.id) IS NOT NULL;
END
$grants$;
