-- What the sweep does besides draining: housekeeping that any replica may do, and at most one does at a time.

-- purge(letters_kept): deletes consumed log rows, old drain records (all but the cursor and the last hour) and closed
-- dead letters older than `letters_kept`. Below the xmin of the cursor's snapshot everything has been seen; the
-- cursor is committed, or this statement could not see it. Returns the number of log rows deleted.
CREATE OR REPLACE FUNCTION listener.purge(letters_kept interval DEFAULT '30 days') RETURNS bigint
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_custom_plan SET jit = off AS $function$
DECLARE
    consumed_below xid8;
    cursor_id bigint;
    deleted bigint;
BEGIN
    IF NOT pg_try_advisory_xact_lock(listener.lock_key(0, 'purge')) THEN
        RETURN 0;
    END IF;
    SELECT l.id, pg_snapshot_xmin(l.snapshot) INTO cursor_id, consumed_below
    FROM listener.drain_log l ORDER BY l.id DESC LIMIT 1;
    DELETE FROM listener.change_log c WHERE c.xid < consumed_below;
    GET DIAGNOSTICS deleted = ROW_COUNT;
    DELETE FROM listener.drain_log l WHERE l.id < cursor_id AND l.drained_at < clock_timestamp() - interval '1 hour';
    DELETE FROM listener.dead_letter d WHERE d.status <> 'open' AND d.closed_at < clock_timestamp() - letters_kept;
    RETURN deleted;
END
$function$;

-- changed_definitions(): the views whose definition, nested views or functions read differently than they did when
-- they were registered; and takes note of it: finds their tables anew, puts triggers on those that are new, and marks
-- every tenant dirty. Runs with the owner's rights, because only the owner may create triggers.
CREATE OR REPLACE FUNCTION listener.changed_definitions() RETURNS SETOF text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    managed listener.managed_view;
    definition regclass;
    found_ids integer[];
BEGIN
    IF NOT pg_try_advisory_xact_lock(listener.lock_key(0, 'definitions')) THEN
        RETURN;
    END IF;
    FOR managed IN SELECT v.* FROM listener.managed_view v ORDER BY v.id LOOP
        definition := to_regclass('listener.definition_' || managed.id);
        CONTINUE WHEN definition IS NULL OR listener.fingerprint(definition) = managed.fingerprint;
        SELECT r.source_ids INTO found_ids
        FROM listener.register_sources(definition, managed.tenant_column, coalesce(managed.depends_on, '{}')::regclass[]) r;
        INSERT INTO listener.view_source SELECT managed.id, s FROM unnest(found_ids) s ON CONFLICT DO NOTHING;
        PERFORM listener.attach_capture(found_ids);
        UPDATE listener.managed_view v SET fingerprint = listener.fingerprint(definition) WHERE v.id = managed.id;
        PERFORM listener.mark_all_dirty(managed.id);
        RETURN NEXT managed.name;
    END LOOP;
END
$function$;

-- readiness(): what keeps the service from being ready, one line each; no row when nothing does.
CREATE OR REPLACE FUNCTION listener.readiness() RETURNS SETOF text
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
    SELECT format('row-level security is not enabled and forced on %I.%I, which %s reads',
                  s.schema_name, s.table_name, string_agg(v.name, ', ' ORDER BY v.name))
    FROM listener.managed_view v
    JOIN listener.view_source w ON w.view_id = v.id
    JOIN listener.source s ON s.id = w.source_id AND s.tenant_column IS NOT NULL
    LEFT JOIN pg_namespace n ON n.nspname = s.schema_name
    LEFT JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = s.table_name
    WHERE v.tenant_secured AND c.oid IS NOT NULL AND NOT (c.relrowsecurity AND c.relforcerowsecurity)
    GROUP BY s.schema_name, s.table_name
    UNION ALL
    SELECT format('the source %I.%I is gone', s.schema_name, s.table_name) FROM listener.source s
    WHERE to_regclass(format('%I.%I', s.schema_name, s.table_name)) IS NULL
    UNION ALL
    SELECT format('the target %I.%I of %s is gone', v.target_schema, v.target_name, v.name)
    FROM listener.managed_view v
    WHERE to_regclass(format('%I.%I', v.target_schema, v.target_name)) IS NULL
    UNION ALL
    SELECT 'the setting app.current_tenant_id cannot be set'
    WHERE set_config('app.current_tenant_id', '', true) IS DISTINCT FROM ''
$function$;

-- regenerate(): makes anew what is generated from the catalog, after a new release of these files was applied.
CREATE OR REPLACE FUNCTION listener.regenerate() RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    PERFORM listener.generate_capture(s.id) FROM listener.source s ORDER BY s.id;
    UPDATE listener.managed_view v SET difference = listener.difference_statement(v)
    WHERE to_regclass(format('%I.%I', v.target_schema, v.target_name)) IS NOT NULL
      AND v.difference <> listener.difference_statement(v);
END
$function$;

-- uninstall(drop_targets): drops every capture trigger and definition; targets stay as plain tables unless told.
-- The tables and functions of the schema itself are dropped by whoever calls this: the migration, or DROP SCHEMA.
CREATE OR REPLACE FUNCTION listener.uninstall(drop_targets boolean DEFAULT false) RETURNS void
LANGUAGE plpgsql AS $function$
DECLARE
    previous_role text := listener.become_owner();
BEGIN
    PERFORM listener.drop_view(v.name, NOT drop_targets) FROM listener.managed_view v;
    PERFORM listener.detach_capture(s.id) FROM listener.source s;
    DELETE FROM listener.source;
    PERFORM pg_catalog.set_config('role', previous_role, true);
END
$function$;
