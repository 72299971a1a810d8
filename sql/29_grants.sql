-- Who may do what. Nobody but the owner and the service's role has any right on this schema unless it is granted:
-- GRANT USAGE ON SCHEMA listener, and EXECUTE or SELECT on what a role is to use.
DO $grants$
DECLARE
    installed listener.installation;
    routine regprocedure;
BEGIN
    SELECT i.* INTO installed FROM listener.installation i;
    FOR routine IN SELECT p.oid FROM pg_catalog.pg_proc p WHERE p.pronamespace = 'listener'::regnamespace LOOP
        EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', routine);
    END LOOP;
    -- An earlier release gave the service's role functions to own, which it could have altered.
    FOR routine IN SELECT p.oid FROM pg_catalog.pg_proc p
                   WHERE p.pronamespace = 'listener'::regnamespace
                     AND p.proowner <> pg_catalog.to_regrole(pg_catalog.quote_ident(installed.owner_role)) LOOP
        EXECUTE format('ALTER FUNCTION %s OWNER TO %I', routine, installed.owner_role);
    END LOOP;
    DELETE FROM listener.installed_function f WHERE f.signature LIKE 'listener.%';
    INSERT INTO listener.installed_function (signature, digest)
    SELECT p.oid::regprocedure::text, listener.function_digest(p.oid) FROM pg_catalog.pg_proc p
    WHERE p.pronamespace = 'listener'::regnamespace
      -- The capture functions of a source are left out: capture_digest() compares them.
      AND p.proname !~ '^(capture|tenant_of|key_of|tenants_by)_[0-9]';
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
        'listener.and_members(text)',
        'listener.body_names(oid)',
        'listener.body_relations(oid)',
        'listener.calls_of(name[])',
        'listener.canonical_tenant(text, text)',
        'listener.capture_findings()',
        'listener.changed_definitions()',
        'listener.check_caller(text)',
        'listener.check_drift(text, text)',
        'listener.check_source(regclass, name)',
        'listener.clock_advice(regclass)',
        'listener.clock_columns(regclass)',
        'listener.code_of(regclass)',
        'listener.compare(text, text)',
        'listener.compare_alter(text, text)',
        'listener.compare_materialized_view(regclass)',
        'listener.check_may_act(name)',
        'listener.computing_roles(regclass)',
        'listener.concurrent_index(regclass)',
        'listener.evaluate_as(name, text, text, jsonb, text)',
        'listener.evaluating_body()',
        'listener.plan_as(name, text[], jsonb, jsonb)',
        'listener.planned(regclass, text[], jsonb)',
        'listener.planning_body()',
        'listener.planning_settings()',
        'listener.set_clauses(jsonb)',
        'listener.stand_in_statements(regclass, text)',
        'listener.default_setting(text)',
        'listener.default_settings()',
        'listener.discard_letter(uuid)',
        'listener.drain()',
        'listener.drained_keys(bigint)',
        'listener.end_lease()',
        'listener.equalities(text, text)',
        'listener.exact_text(anyelement)',
        'listener.exact_value(text, anyelement)',
        'listener.expand(text)',
        'listener.explain_key(text, text)',
        'listener.explain_upstream(text, text)',
        'listener.find_view(text)',
        'listener.fingerprint(regclass)',
        'listener.foreign_equality(regclass)',
        'listener.give_back_tenant(text)',
        'listener.hiding_functions(regclass)',
        'listener.check_columns(regclass, name, name[])',
        'listener.hidden_from_owner(regclass)',
        'listener.hidden_source(regclass)',
        'listener.hidden_source(regclass, oid)',
        'listener.hides_rows(oid, oid)',
        'listener.lists_target(pg_policy)',
        'listener.hold_lease()',
        'listener.implied(jsonb, text)',
        'listener.index_advice(oid, name[])',
        'listener.index_scans(jsonb, text)',
        'listener.inventory_names()',
        'listener.is_past(xid8)',
        'listener.is_shown(integer, text, bigint)',
        'listener.is_stale(integer, text)',
        'listener.is_undetermined(text, text)',
        'listener.keeps_tenant(oid, text, text)',
        'listener.known_version(integer, text)',
        'listener.lease_is_wrong()',
        'listener.leave_nothing(oid[])',
        'listener.lock_holder(bigint)',
        'listener.lock_key(integer, text)',
        'listener.lost_guarantees()',
        'listener.missing_columns(listener.managed_view)',
        'listener.must_poll()',
        'listener.next_keys(integer, text, integer, interval)',
        'listener.nobody(text)',
        'listener.pending_keys(boolean)',
        'listener.plain_text(text, text)',
        'listener.plan_nodes(jsonb)',
        'listener.plan_scans(jsonb)',
        'listener.progress_findings()',
        'listener.proposal(regclass, name, boolean, name[])',
        'listener.purge(interval, bigint)',
        'listener.query_of(oid)',
        'listener.raising_policies()',
        'listener.readiness()',
        'listener.reached(regclass)',
        'listener.reads(regclass)',
        'listener.reads_unseen(name)',
        'listener.record_failure(integer, text, text, text, text, text, text, text, text, integer, interval, interval, interval)',
        'listener.record_refusal(text, text, text, text, text)',
        'listener.refresh(text, bigint)',
        'listener.refresh(text, text)',
        'listener.refresh(text, uuid)',
        'listener.refresh_all_for_tenant(bigint)',
        'listener.refresh_all_for_tenant(text)',
        'listener.refresh_all_for_tenant(uuid)',
        'listener.refresh_dirty(integer, text, text, bigint)',
        'listener.refresh_key(text, text)',
        'listener.refresh_materialized_view_for_tenant(bigint, text)',
        'listener.refresh_materialized_view_for_tenant(text, text)',
        'listener.refresh_materialized_view_for_tenant(uuid, text)',
        'listener.refreshed_by(regclass)',
        'listener.repair_capture()',
        'listener.result_findings()',
        'listener.ring_for_all()',
        'listener.rows_without_tenant(text)',
        'listener.scope_advice(jsonb, jsonb, integer[], "char", boolean, text, name, name, name[])',
        'listener.scope_findings(text[])',
        'listener.seconds_text(interval)',
        'listener.server_findings(integer, interval)',
        'listener.run_refresh(text, text)',
        'listener.serves(text)',
        'listener.kept_settings()',
        'listener.session_dependence(regclass)',
        'listener.session_refusal(regclass)',
        'listener.session_settings()',
        'listener.use_settings(jsonb)',
        'listener.shell_word(text)',
        'listener.some_tenant(text)',
        'listener.staleness()',
        'listener.state_findings()',
        'listener.state_of(integer, text)',
        'listener.take_mark()',
        'listener.take_stock(regclass, name[])',
        'listener.tenant_column_of(regclass, name[])',
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
        'listener.view_plans(regclass)',
        'listener.view_text(oid, text)',
        'listener.view_troubles()',
        'listener.zone_differs(text, text)']::regprocedure[]
    LOOP
        EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %I', routine, installed.service_role);
    END LOOP;
    -- What belongs to a view comes and goes with it: doctor knows what that needs.
    INSERT INTO listener.needed_right (kind, object, right_name)
    SELECT 'FUNCTION', p.oid::regprocedure::text, 'EXECUTE'
    FROM pg_catalog.pg_proc p
    WHERE p.pronamespace = 'listener'::regnamespace
      AND pg_catalog.has_function_privilege(installed.service_role, p.oid, 'EXECUTE')
    UNION ALL
    SELECT CASE c.relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END, c.oid::regclass::text, a.privilege_type
    FROM pg_catalog.pg_class c CROSS JOIN LATERAL pg_catalog.aclexplode(c.relacl) a
    WHERE c.relnamespace = 'listener'::regnamespace AND c.relkind IN ('r', 'v', 'S')
      AND c.relname !~ '^(definition|tenants|lookup|tenant_of|key_of|reference_of)_[0-9]'
      AND pg_catalog.pg_get_userbyid(a.grantee) = installed.service_role;
    PERFORM listener.grant_definition(v) FROM listener.managed_view v
    WHERE pg_catalog.to_regclass('listener.definition_' || v.id) IS NOT NULL
      AND pg_catalog.to_regclass('listener.tenants_' || v.id) IS NOT NULL;
END
$grants$;
