-- What the sweep does besides draining: housekeeping that any replica may do, and at most one does at a time.

-- purge(letters_kept, batch): deletes what is consumed: up to `batch` log rows, the dirty_key rows that a refresh has
-- shown, old drain records (all but the cursor and the last hour), closed dead letters older than `letters_kept`, and
-- what dropped views left, whose letters it closes. Below the xmin of the cursor's snapshot everything has been seen;
-- the cursor is committed, or this statement could not see it. Each starts from the last purge's mark, so that nothing
-- deleted before is crossed.
-- Returns the number of log rows deleted; where that is `batch`, there may be more.
CREATE OR REPLACE FUNCTION listener.purge(letters_kept interval DEFAULT '30 days', batch bigint DEFAULT 500000)
RETURNS bigint
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_custom_plan SET jit = off
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off
AS $function$
DECLARE
    last_mark listener.purge_mark;
    consumed_below xid8;
    cursor_id bigint;
    reached xid8;
    deleted bigint;
    shown bigint;
    dirty_from bigint;
BEGIN
    IF NOT pg_try_advisory_xact_lock(listener.lock_key(0, 'purge')) THEN
        RETURN 0;
    END IF;
    SELECT l.id, pg_snapshot_xmin(l.snapshot) INTO cursor_id, consumed_below
    FROM listener.drain_log l ORDER BY l.id DESC LIMIT 1;
    SELECT m.* INTO last_mark FROM listener.purge_mark m ORDER BY m.id DESC LIMIT 1;
    WITH gone AS (
        DELETE FROM listener.change_log c WHERE c.ctid = ANY (ARRAY(
            SELECT o.ctid FROM listener.change_log o
            WHERE o.xid >= coalesce(last_mark.log_from, '0') AND o.xid < consumed_below ORDER BY o.xid LIMIT batch))
        RETURNING c.xid)
    SELECT count(*), max(g.xid) INTO deleted, reached FROM gone g;
    -- Not above the cursor: what a later drain finds must stay until it is shown.
    DELETE FROM listener.dirty_key k
    WHERE k.version + 0 >= coalesce(last_mark.dirty_from, 0) AND k.version + 0 <= cursor_id
      AND k.version <= (SELECT r.refreshed_version FROM listener.state_of(k.view_id, k.tenant) r);
    GET DIAGNOSTICS shown = ROW_COUNT;
    IF deleted + shown > 0 THEN
        SELECT coalesce(min(k.version + 0), cursor_id + 1) INTO dirty_from
        FROM listener.dirty_key k WHERE k.version + 0 >= coalesce(last_mark.dirty_from, 0);
        INSERT INTO listener.purge_mark (log_from, dirty_from)
        VALUES (CASE WHEN deleted = 0 THEN coalesce(last_mark.log_from, '0')
                     WHEN deleted < batch THEN consumed_below ELSE reached END, dirty_from);
        DELETE FROM listener.purge_mark m WHERE m.id <= last_mark.id;
    END IF;
    -- From the oldest on, and more of them than there are drains between two sweeps: not all of the hour's are read.
    IF (SELECT l.drained_at FROM listener.drain_log l ORDER BY l.id LIMIT 1) < clock_timestamp() - interval '1 hour' THEN
        DELETE FROM listener.drain_log l WHERE l.drained_at < clock_timestamp() - interval '1 hour' AND l.id = ANY (
            ARRAY(SELECT o.id FROM listener.drain_log o WHERE o.id < cursor_id ORDER BY o.id LIMIT 5000));
    END IF;
    DELETE FROM listener.dead_letter d WHERE d.status <> 'open' AND d.closed_at < clock_timestamp() - letters_kept;
    -- A failure that was recorded while its view was being dropped.
    UPDATE listener.dead_letter d SET status = 'discarded', closed_at = clock_timestamp()
    WHERE d.status = 'open' AND d.view_id IS NOT NULL AND NOT EXISTS (
        SELECT FROM listener.managed_view v WHERE v.id = d.view_id);
    -- From one view to the next through the index, backwards: the rows of those that are there are not read, and each
    -- step meets the newest version of a key first.
    DELETE FROM listener.refresh_state r WHERE r.view_id IN (
        WITH RECURSIVE seen (view_id) AS (
            SELECT max(s.view_id) FROM listener.refresh_state s
            UNION ALL
            SELECT (SELECT max(s.view_id) FROM listener.refresh_state s WHERE s.view_id < seen.view_id)
            FROM seen WHERE seen.view_id IS NOT NULL
        )
        SELECT seen.view_id FROM seen EXCEPT SELECT v.id FROM listener.managed_view v);
    RETURN deleted;
END
$function$;

-- changed_definitions(): the views whose fingerprint is not the stored one: the definition or anything that its result
-- depends on (see reached()) changed, a table of depends_on or the columns of the target changed, the definition was
-- dropped by CASCADE with something that it reads, or a materialized view that is kept as one was created again. For
-- each of them it makes the definition again, looks which tables it reads, puts triggers on new ones, and marks every
-- tenant dirty. Runs with the owner's rights, because only the owner may create triggers.
--   trouble: why that failed, NULL where it did not; the other views are done all the same
CREATE OR REPLACE FUNCTION listener.changed_definitions() RETURNS TABLE (view text, trouble text)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off AS $function$
#variable_conflict use_column
DECLARE
    managed listener.managed_view;
    definition regclass;
    kept regclass;
    is_gone boolean;
    found_ids integer[];
BEGIN
    IF NOT pg_try_advisory_xact_lock(listener.lock_key(0, 'registration')) THEN
        RETURN;
    END IF;
    FOR managed IN SELECT v.* FROM listener.managed_view v ORDER BY v.id LOOP
        definition := to_regclass('listener.definition_' || managed.id);
        kept := CASE WHEN managed.strategy = 'materialized view'
                     THEN to_regclass(format('%I.%I', managed.target_schema, managed.target_name)) END;
        is_gone := definition IS NULL OR to_regclass('listener.tenants_' || managed.id) IS NULL;
        -- Somebody dropped it, and made one that may read other tables.
        IF listener.query_of(kept) <> managed.query THEN
            managed.query := listener.query_of(kept);
            is_gone := true;
        END IF;
        -- A function finds its tables by name: another table may bear it now.
        CONTINUE WHEN NOT is_gone
            AND coalesce(listener.view_fingerprint(managed) = managed.fingerprint, true)
            AND NOT EXISTS (
                SELECT FROM unnest(managed.depends_on) d (name)
                WHERE to_regclass(d.name) NOT IN (
                    SELECT s.relid FROM listener.view_source w JOIN listener.source s ON s.id = w.source_id
                    WHERE w.view_id = managed.id AND (s.explicit OR s.tenant_column IS NULL OR managed.tenant_column IS NULL)));
        view := managed.name;
        trouble := NULL;
        BEGIN
            IF is_gone THEN
                definition := listener.restore_definition(managed);
            END IF;
            IF kept IS NULL THEN
                PERFORM listener.check_readable(definition, listener.grantee_of(managed));
            END IF;
            SELECT r.source_ids INTO found_ids
            FROM listener.register_sources(definition, managed.tenant_column, coalesce(managed.depends_on, '{}')::regclass[]) r;
            IF is_gone THEN
                PERFORM listener.restore_tenants(managed, found_ids);
            ELSE
                -- Replaced, so that sessions drop the plan that they keep. By themselves they do not: servers before 18
                -- when a role gets other rights, all servers when an IMMUTABLE function is replaced that planning has
                -- computed.
                PERFORM listener.generate_difference(managed);
            END IF;
            INSERT INTO listener.view_source (view_id, source_id, same_form)
            SELECT managed.id, s, listener.same_form(s, managed.tenant_type) FROM unnest(found_ids) s
            ON CONFLICT DO NOTHING;
            IF kept IS NOT NULL THEN
                UPDATE listener.managed_view v SET query = managed.query WHERE v.id = managed.id;
                DELETE FROM listener.view_source w WHERE w.view_id = managed.id AND w.source_id <> ALL (found_ids);
                PERFORM listener.grant_kept(kept);
            END IF;
            -- A view that is no longer read may be dropped, and may read this one.
            DELETE FROM listener.view_source w USING listener.source s, listener.view_reads r
            WHERE w.view_id = managed.id AND s.id = w.source_id AND s.id <> ALL (found_ids)
              AND r.view_id = managed.id AND s.relid = (
                SELECT to_regclass(format('%I.%I', u.target_schema, u.target_name)) FROM listener.managed_view u
                WHERE u.id = r.upstream_id);
            PERFORM listener.check_cycles();
            PERFORM listener.attach_capture(found_ids, 5);
            -- Without its target it is looked at again once that is back.
            UPDATE listener.managed_view v SET fingerprint = coalesce(listener.view_fingerprint(v), v.fingerprint)
            WHERE v.id = managed.id;
            PERFORM listener.mark_all_dirty(managed.id);
        EXCEPTION WHEN OTHERS THEN
            trouble := SQLERRM;
        END;
        RETURN NEXT;
    END LOOP;
END
$function$;

-- first_fingerprint(view): what view_fingerprint() returned until migration 0003: see regenerate().
CREATE OR REPLACE FUNCTION listener.first_fingerprint(view listener.managed_view) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    WITH nested AS MATERIALIZED (
        SELECT t.definition, v.relid
        FROM (SELECT to_regclass('listener.definition_' || view.id) AS definition) t
        CROSS JOIN LATERAL (SELECT t.definition::oid UNION
                            SELECT r.relid FROM listener.reads(t.definition) r WHERE r.relkind = 'v') AS v (relid)
    )
    SELECT md5(concat_ws(E'\n', (
            SELECT md5(string_agg(p.part, E'\n' ORDER BY p.part))
            FROM (SELECT CASE WHEN n.relid = n.definition THEN '' ELSE n.relid::regclass::text END
                         || pg_get_viewdef(n.relid)
                  FROM nested n
                  UNION ALL
                  SELECT f.oid::regprocedure::text || pg_get_functiondef(f.oid)
                  FROM (SELECT DISTINCT p.oid
                        FROM nested n
                        JOIN pg_rewrite w ON w.ev_class = n.relid
                        JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = w.oid
                                        AND d.refclassid = 'pg_proc'::regclass
                        JOIN pg_proc p ON p.oid = d.refobjid AND p.provolatile <> 'i'
                        WHERE (p.pronamespace NOT IN ('pg_catalog'::regnamespace, 'information_schema'::regnamespace)
                               OR p.proname ~ '^(query|cursor|table|schema|database)_to_xml' OR p.proname = 'ts_stat')
                          AND NOT EXISTS (SELECT FROM pg_depend e WHERE e.classid = 'pg_proc'::regclass
                                            AND e.objid = p.oid AND e.deptype = 'e')) f) AS p (part)),
        to_regclass(format('%I.%I', view.target_schema, view.target_name))::oid,
        (SELECT string_agg(concat_ws(' ', a.attnum, d.attname), E'\n' ORDER BY d.attnum)
         FROM pg_attribute d
         LEFT JOIN pg_attribute a ON a.attrelid = to_regclass(format('%I.%I', view.target_schema, view.target_name))
                                 AND a.attname = d.attname AND a.attnum > 0
         WHERE d.attrelid = to_regclass('listener.definition_' || view.id) AND d.attnum > 0)))
$function$;

-- regenerate(): makes what is generated from the catalog again, after a new release of these files was applied. It
-- replaces a fingerprint of the formula before by a new one where the formula before still gives the stored value; so
-- the next sweep does not refresh everything for nothing. Otherwise, or where a policy reads a table that is no source
-- yet, the fingerprint stays and the sweep refreshes the view: no change from before the migration, or during it, is
-- lost.
CREATE OR REPLACE FUNCTION listener.regenerate() RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    target regclass;
BEGIN
    -- A later difference means a copy, which repair_capture() and drain() have to see.
    UPDATE listener.installation i SET
        system_identifier = (SELECT c.system_identifier FROM pg_control_system() c),
        database_oid = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
    WHERE i.system_identifier IS NULL;
    PERFORM listener.generate_capture(s.id) FROM listener.source s
    WHERE EXISTS (SELECT FROM pg_class c WHERE c.oid = s.relid) ORDER BY s.id;
    PERFORM listener.generate_difference(v) FROM listener.managed_view v;
    UPDATE listener.managed_view v SET fingerprint = coalesce(listener.view_fingerprint(v), v.fingerprint)
    WHERE v.fingerprint NOT LIKE '2 %' AND v.fingerprint = listener.first_fingerprint(v) AND NOT EXISTS (
        SELECT FROM listener.policy_sources(to_regclass('listener.definition_' || v.id), v.tenant_column) p
        WHERE p.relid NOT IN (SELECT s.relid FROM listener.view_source w JOIN listener.source s ON s.id = w.source_id
                              WHERE w.view_id = v.id AND (p.is_apart OR s.explicit OR s.tenant_column IS NULL
                                  OR v.tenant_column IS NULL)));
    -- As the first release made it, the policy showed the service every tenant's rows at any time.
    FOR target IN
        SELECT p.polrelid::regclass FROM pg_policy p
        JOIN listener.managed_view v ON to_regclass(format('%I.%I', v.target_schema, v.target_name)) = p.polrelid
        WHERE p.polname = 'listener_list' AND pg_get_expr(p.polqual, p.polrelid) = 'true'
    LOOP
        EXECUTE format('ALTER POLICY listener_list ON %s USING (%s)', target, listener.list_condition());
    END LOOP;
END
$function$;

-- lock_for_uninstall(): takes every lock that uninstall needs at once, or none: one that is held while the next is
-- waited for would stop the application. Raises lock_not_available, naming who is in the way, after 200 ms.
CREATE OR REPLACE FUNCTION listener.lock_for_uninstall() RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET lock_timeout = '200ms' AS $function$
DECLARE
    -- The sources with their leaves, the targets, the tables of the schema itself.
    relations regclass[] := ARRAY(
        SELECT g.tgrelid FROM pg_trigger g JOIN listener.source s ON g.tgname LIKE format('listener\_%s\_%%', s.id)
        UNION SELECT c.oid FROM listener.managed_view v
              JOIN pg_class c ON c.oid = to_regclass(format('%I.%I', v.target_schema, v.target_name)) AND c.relkind <> 'm'
        UNION SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
              WHERE n.nspname = 'listener' AND c.relkind = 'r' AND c.relowner = n.nspowner);
    holder text;
BEGIN
    EXECUTE (SELECT format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE', string_agg(format('ONLY %s', r), ', ' ORDER BY r))
             FROM unnest(relations) r);
EXCEPTION WHEN lock_not_available THEN
    SELECT format('backend %s (%s) holds one of them', a.pid, coalesce(nullif(a.application_name, ''), a.usename))
    INTO holder
    FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
    WHERE l.relation = ANY (relations) AND l.granted AND l.pid <> pg_backend_pid()
    ORDER BY a.xact_start LIMIT 1;
    RAISE EXCEPTION 'no lock on the tables within 200 ms' USING ERRCODE = 'lock_not_available',
        HINT = coalesce(holder, 'A transaction holds one of them') || ': see pg_stat_activity, then uninstall again.';
END
$function$;

-- uninstall(drop_targets): drops every capture trigger and definition; targets stay as plain tables unless told.
-- The tables and functions of the schema itself are dropped by whoever calls this: the migration, or DROP SCHEMA.
CREATE OR REPLACE FUNCTION listener.uninstall(drop_targets boolean DEFAULT false) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    previous_role text := listener.become_owner();
    name text;
    is_beside boolean;
BEGIN
    PERFORM listener.lock_for_uninstall();
    -- What capture made for a target that is a source, too, would keep it.
    UPDATE listener.source SET explicit = false;
    -- A view before those that it reads: upstream of it are all that are upstream of them, and they. What stands beside one
    -- to take its place goes with it.
    FOR name, is_beside IN
        SELECT v.name, a.state IS NOT NULL
        FROM listener.managed_view v LEFT JOIN listener.adoption a ON a.view_id = v.id AND a.state = 'filling'
        WHERE v.replaces IS NULL
        ORDER BY (SELECT count(*) FROM listener.view_upstream u WHERE u.view_id = v.id) DESC
    LOOP
        PERFORM listener.drop_view(name, NOT (drop_targets OR is_beside));
    END LOOP;
    PERFORM listener.drop_orphans();
    PERFORM pg_catalog.set_config('role', previous_role, true);
END
$function$;
