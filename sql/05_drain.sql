-- Drain: change_log -> dirty_key, one drainer at a time.

-- lock_key(view_id, tenant): the 64-bit advisory lock of a refresh key; lock_key(0, '') is the drain's.
CREATE OR REPLACE FUNCTION listener.lock_key(view_id integer, tenant text) RETURNS bigint
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $function$
    SELECT pg_catalog.hashtextextended('listener:' || view_id::text || ':' || tenant, 0)
$function$;

-- new_changes(seen_below, unseen): what capture logged since, per source (or marked view) and tenant: the rows whose
-- transaction id is at least seen_below, or one of `unseen`. Ages start at `not_before` at the earliest: a transaction
-- that stayed open is not staleness of ours, the last drain could not see it.
-- Planned anew each time: a plan made while the log was small would later scan every consumed row. STABLE, so that it
-- looks with the snapshot of the statement that calls it.
CREATE OR REPLACE FUNCTION listener.new_changes(seen_below xid8, unseen xid8[], not_before timestamptz)
RETURNS TABLE (source_id integer, view_id integer, tenant text, changes bigint, first_change timestamptz,
               last_change timestamptz, app_correlation_id text)
LANGUAGE plpgsql STABLE ROWS 100
SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_custom_plan SET jit = off AS $function$
BEGIN
    RETURN QUERY
    SELECT c.source_id, c.view_id, c.tenant, count(*),
           CASE WHEN c.source_id IS NULL THEN min(c.changed_at) ELSE greatest(min(c.changed_at), not_before) END,
           CASE WHEN c.source_id IS NULL THEN max(c.changed_at) ELSE greatest(max(c.changed_at), not_before) END,
           max(c.app_correlation_id)
    FROM (SELECT l.* FROM listener.change_log l WHERE l.xid >= seen_below
          UNION ALL
          SELECT l.* FROM listener.change_log l WHERE l.xid = ANY (unseen)) c
    GROUP BY c.source_id, c.view_id, c.tenant;
END
$function$;

-- drain(): folds every committed change that no drain has seen yet into dirty_key.
--   outcome  'drained', one row per key touched; or one row 'nothing'; or one row 'busy': another session is draining
--            and may have looked before your change, so ask again; never read it as "nothing new".
--   ages and windows are in seconds by the server's clock.
-- Reads change_log, view_source, managed_view, refresh_state; writes dirty_key, drain_log, dead_letter.
-- The cursor is the newest drain_log row. New is what was not visible in its snapshot, or what its own transaction
-- wrote: no snapshot lists its own transaction, so a caller that drains and then writes would lose that write.
-- Stored transaction ids of another cluster, another database, or of the future (a restored copy) mean nothing: then
-- the whole log is folded in and emptied, and every view is marked dirty.
-- Raises LSN05 outside READ COMMITTED.
CREATE OR REPLACE FUNCTION listener.drain()
RETURNS TABLE (
    outcome text, drained_at timestamptz, changes bigint, correlation_id text, app_correlation_id text,
    view_id integer, view_name text, tenant text, version bigint,
    first_change_age double precision, last_change_age double precision,
    refresh_started_age double precision, retry_in double precision,
    quiet_period double precision, max_wait double precision, edge text, bulk boolean, paused boolean)
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
-- Planning took half of a small drain. Every table here is reached by its key whatever its size, so the plan may be
-- kept; and it must not have been made for small tables.
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET jit = off
AS $function$
#variable_conflict use_column
DECLARE
    last_drain listener.drain_log;
    this_system bigint := (SELECT c.system_identifier FROM pg_control_system() c);
    this_database oid := (SELECT d.oid FROM pg_database d WHERE d.datname = current_database());
    started timestamptz;
    seen_below xid8;
    unseen xid8[];
    restored boolean;
    batch text := gen_random_uuid()::text;
BEGIN
    PERFORM listener.require_read_committed('listener.drain()');
    IF NOT pg_try_advisory_xact_lock(listener.lock_key(0, '')) THEN
        outcome := 'busy';
        drained_at := clock_timestamp();
        changes := 0;
        RETURN NEXT;
        RETURN;
    END IF;

    -- A statement of its own, after the lock: its snapshot includes the drain that held the lock before.
    SELECT l.* INTO last_drain FROM listener.drain_log l ORDER BY l.id DESC LIMIT 1;
    started := clock_timestamp();
    restored := last_drain.id IS NOT NULL
        AND (last_drain.system_identifier <> this_system OR last_drain.database_oid <> this_database
             OR pg_snapshot_xmax(last_drain.snapshot) > pg_snapshot_xmax(pg_current_snapshot()));
    IF restored THEN
        RAISE WARNING 'listener: this database is a copy or was restored: every view is marked dirty';
        PERFORM listener.fold_restored_log();
        seen_below := '0';
        unseen := '{}';
    ELSE
        seen_below := coalesce(pg_snapshot_xmax(last_drain.snapshot), '0');
        unseen := ARRAY(SELECT i.xid FROM (SELECT pg_snapshot_xip(last_drain.snapshot) AS xid
                                           UNION SELECT last_drain.xid) i
                        WHERE i.xid < seen_below);
    END IF;
    RETURN QUERY
    WITH per_source AS MATERIALIZED (
        SELECT n.* FROM listener.new_changes(seen_below, unseen, last_drain.drained_at) n
    ), touched AS (
        SELECT coalesce(p.view_id, s.view_id) AS view_id, p.tenant, min(p.first_change) AS first_change,
               max(p.last_change) AS last_change, bool_and(p.source_id IS NULL OR p.tenant = '') AS bulk,
               max(p.app_correlation_id) AS app_correlation_id
        FROM per_source p LEFT JOIN listener.view_source s ON s.source_id = p.source_id
        WHERE coalesce(p.view_id, s.view_id) IS NOT NULL AND octet_length(p.tenant) <= 1024
        GROUP BY 1, 2
    ), refused AS (
        INSERT INTO listener.dead_letter (tenant, error_type, exception_class, error_message, correlation_id)
        SELECT left(p.tenant, 100), 'validation_error', 'TenantTooLong',
               format('a tenant of %s bytes in %s.%s is longer than 1024', octet_length(p.tenant), o.schema_name, o.table_name),
               batch
        FROM per_source p JOIN listener.source o ON o.id = p.source_id WHERE octet_length(p.tenant) > 1024
    ), raised AS (
        INSERT INTO listener.dirty_key AS k
            (view_id, tenant, version, dirty_since, last_change_at, bulk, correlation_id, app_correlation_id)
        SELECT t.view_id, t.tenant, 1, t.first_change, t.last_change, t.bulk, batch, t.app_correlation_id FROM touched t
        ON CONFLICT (view_id, tenant) DO UPDATE SET
            version = k.version + 1,
            last_change_at = greatest(k.last_change_at, excluded.last_change_at),
            correlation_id = excluded.correlation_id,
            app_correlation_id = coalesce(excluded.app_correlation_id, k.app_correlation_id),
            (dirty_since, bulk) = (
                SELECT CASE WHEN clean.yes THEN excluded.dirty_since
                            ELSE least(k.dirty_since, excluded.dirty_since) END,
                       excluded.bulk AND (clean.yes OR k.bulk)
                FROM (SELECT EXISTS (SELECT FROM listener.refresh_state r
                                     WHERE r.view_id = k.view_id AND r.tenant = k.tenant
                                       AND r.refreshed_version >= k.version)) AS clean (yes))
        RETURNING k.*
    ), logged AS (
        INSERT INTO listener.drain_log
            (drained_at, snapshot, xid, changes, keys, correlation_id, system_identifier, database_oid)
        SELECT started, pg_current_snapshot(), pg_current_xact_id(), sum(p.changes), (SELECT count(*) FROM touched),
               batch, this_system, this_database
        FROM per_source p HAVING count(*) > 0
        RETURNING changes
    )
    SELECT 'drained', started, l.changes, batch, k.app_correlation_id, k.view_id, v.name, k.tenant, k.version,
           extract(epoch FROM started - k.dirty_since)::float8, extract(epoch FROM started - k.last_change_at)::float8,
           extract(epoch FROM started - r.started_at)::float8, extract(epoch FROM r.retry_at - started)::float8,
           extract(epoch FROM v.quiet_period)::float8, extract(epoch FROM v.max_wait)::float8, v.edge, k.bulk,
           v.paused_at IS NOT NULL
    FROM logged l
    LEFT JOIN (raised k JOIN listener.managed_view v ON v.id = k.view_id) ON true
    LEFT JOIN listener.refresh_state r ON r.view_id = k.view_id AND r.tenant = k.tenant;
    -- Nothing new: nothing was written, and no transaction id was spent.
    IF NOT FOUND THEN
        outcome := 'nothing';
        drained_at := started;
        changes := 0;
        RETURN NEXT;
    END IF;
END
$function$;

-- fold_restored_log(): the log of a restored or copied database. Its transaction ids mean nothing here, so its rows
-- are emptied out and stand again under transaction id 0, which the drain that calls this reads and no later one, and
-- every view is marked for all tenants.
CREATE OR REPLACE FUNCTION listener.fold_restored_log() RETURNS void
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $function$
    WITH emptied AS (
        DELETE FROM listener.change_log RETURNING source_id, view_id, tenant, changed_at, app_correlation_id
    )
    INSERT INTO listener.change_log (xid, changed_at, source_id, view_id, tenant, app_correlation_id)
    SELECT '0'::xid8, clock_timestamp(), e.source_id, e.view_id, e.tenant, max(e.app_correlation_id)
    FROM emptied e GROUP BY e.source_id, e.view_id, e.tenant
    UNION ALL
    SELECT '0'::xid8, clock_timestamp(), NULL, v.id, '', NULL FROM listener.managed_view v
$function$;

-- pending_keys(overdue): the dirty keys, in the columns of drain(); all of them, or those that are past max_wait and
-- their retry; and every clean key whose view has a
-- max_age that has passed. The service rebuilds its debouncer from the first at start, and sweeps up the second.
CREATE OR REPLACE FUNCTION listener.pending_keys(overdue boolean)
RETURNS TABLE (
    outcome text, drained_at timestamptz, changes bigint, correlation_id text, app_correlation_id text,
    view_id integer, view_name text, tenant text, version bigint,
    first_change_age double precision, last_change_age double precision,
    refresh_started_age double precision, retry_in double precision,
    quiet_period double precision, max_wait double precision, edge text, bulk boolean, paused boolean)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off AS $function$
    SELECT 'dirty', n.now, 0::bigint, k.correlation_id, k.app_correlation_id, k.view_id, v.name, k.tenant, k.version,
           extract(epoch FROM n.now - k.dirty_since)::float8, extract(epoch FROM n.now - k.last_change_at)::float8,
           extract(epoch FROM n.now - r.started_at)::float8, extract(epoch FROM r.retry_at - n.now)::float8,
           extract(epoch FROM v.quiet_period)::float8, extract(epoch FROM v.max_wait)::float8, v.edge, k.bulk, false
    FROM (SELECT clock_timestamp()) AS n (now)
    CROSS JOIN listener.dirty_key k
    JOIN listener.managed_view v ON v.id = k.view_id AND v.paused_at IS NULL
    LEFT JOIN listener.refresh_state r ON r.view_id = k.view_id AND r.tenant = k.tenant
    WHERE r.refreshed_version IS DISTINCT FROM k.version
      AND (NOT overdue OR (k.dirty_since + v.max_wait < n.now AND coalesce(r.retry_at < n.now, true)))
    UNION ALL
    SELECT 'aged', n.now, 0::bigint, gen_random_uuid()::text, NULL, r.view_id, v.name, r.tenant, k.version,
           extract(epoch FROM n.now - (r.refreshed_at + v.max_age))::float8,
           extract(epoch FROM n.now - (r.refreshed_at + v.max_age))::float8,
           extract(epoch FROM n.now - r.started_at)::float8, extract(epoch FROM r.retry_at - n.now)::float8,
           extract(epoch FROM v.quiet_period)::float8, extract(epoch FROM v.max_wait)::float8, v.edge, true, false
    FROM (SELECT clock_timestamp()) AS n (now)
    CROSS JOIN listener.refresh_state r
    JOIN listener.managed_view v ON v.id = r.view_id AND v.paused_at IS NULL AND v.max_age IS NOT NULL
    LEFT JOIN listener.dirty_key k ON k.view_id = r.view_id AND k.tenant = r.tenant
    WHERE r.tenant <> '' AND r.refreshed_at < n.now - v.max_age
      AND r.refreshed_version = coalesce(k.version, 0)
$function$;
