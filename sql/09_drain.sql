-- Drain: change_log -> dirty_key, one drainer at a time.

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
           nullif(max(c.app_correlation_id), '')
    FROM (SELECT l.* FROM listener.change_log l WHERE l.xid >= seen_below
          UNION ALL
          SELECT l.* FROM listener.change_log l WHERE l.xid = ANY (unseen)) c
    GROUP BY c.source_id, c.view_id, c.tenant;
END
$function$;

-- canonical_or_null(tenant, tenant_type): canonical_tenant, NULL where it would raise.
CREATE OR REPLACE FUNCTION listener.canonical_or_null(tenant text, tenant_type text) RETURNS text
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    RETURN listener.canonical_tenant(tenant, tenant_type);
EXCEPTION WHEN OTHERS THEN
    RETURN NULL;
END
$function$;

-- state_of(view_id, tenant): the row of refresh_state of a key, if there is one; without crossing its dead versions.
CREATE OR REPLACE FUNCTION listener.state_of(view_id integer, tenant text) RETURNS SETOF listener.refresh_state
LANGUAGE sql STABLE ROWS 1 AS $function$
    SELECT r.* FROM listener.refresh_state r
    WHERE r.view_id OPERATOR(pg_catalog.=) $1 AND r.tenant OPERATOR(pg_catalog.=) $2
    ORDER BY r.refreshed_at DESC NULLS LAST LIMIT 1
$function$;

-- drained_keys(drain): the keys that a drain found changed, in the columns of drain(); the answer of a drain that found
-- few, and where the keys of one that found many are read. Ages are as of the drain.
CREATE OR REPLACE FUNCTION listener.drained_keys(drain bigint)
RETURNS TABLE (
    outcome text, drained_at timestamptz, changes bigint, keys bigint, correlation_id text, app_correlation_id text,
    view_id integer, view_name text, tenant text, version bigint,
    first_change_age double precision, last_change_age double precision,
    refresh_started_age double precision, retry_in double precision,
    quiet_period double precision, max_wait double precision, edge text, bulk boolean, paused boolean)
LANGUAGE plpgsql STABLE
-- Planning took half of a small drain. Every table here is reached by its key whatever its size, so the plan may be
-- kept; and it must not have been made for small tables.
SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan SET jit = off
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $function$
BEGIN
    RETURN QUERY
    SELECT 'drained', d.drained_at, d.changes, d.keys, k.correlation_id, k.app_correlation_id, k.view_id, v.name,
           k.tenant, k.version,
           -- What an earlier drain found, and no refresh has shown yet, is older.
           extract(epoch FROM d.drained_at - least(k.first_change_at, (
               SELECT min(e.first_change_at) FROM listener.dirty_key e
               WHERE e.view_id = k.view_id AND e.tenant = k.tenant
                 AND e.version > coalesce(r.refreshed_version, -1))))::float8,
           extract(epoch FROM d.drained_at - k.last_change_at)::float8,
           extract(epoch FROM d.drained_at - r.started_at)::float8,
           extract(epoch FROM r.retry_at - d.drained_at)::float8,
           extract(epoch FROM v.quiet_period)::float8, extract(epoch FROM v.max_wait)::float8, v.edge, k.bulk,
           v.paused_at IS NOT NULL
    FROM listener.drain_log d
    -- Fenced: joined with its view, the primary key would be read through, with all that is deleted and not gone yet.
    CROSS JOIN LATERAL (SELECT * FROM listener.dirty_key y WHERE y.version + 0 = d.id OFFSET 0) k
    JOIN listener.managed_view v ON v.id = k.view_id
    LEFT JOIN LATERAL listener.state_of(k.view_id, k.tenant) r ON true
    WHERE d.id = drain;
END
$function$;

-- drain(): folds every committed change that no drain has seen yet into dirty_key.
--   outcome  'drained', one row per key touched; or one row 'nothing'; or one row 'busy': another session is draining
--            and may have looked before your change, so ask again; never read it as "nothing new".
--   keys     how many keys were touched. Of very many only this is said, in one row without a key: drained_keys(version)
--            has them. The answer must fit into what a socket takes in without its reader: a client that stops reading
--            would keep the transaction open, and with it the lock that all who drain need, for ever.
--   restored: this database is a copy, or was restored, since the last drain
--   ages and windows are in seconds by the server's clock.
-- Reads change_log, view_source, managed_view, refresh_state; appends to dirty_key and drain_log; writes dead_letter.
-- The cursor is the newest drain_log row. New is what was not visible in its snapshot, or what its own transaction
-- wrote: no snapshot lists its own transaction, so a caller that drains and then writes would lose that write.
-- Stored transaction ids of another cluster, another database, or of the future (a restored copy) mean nothing: then
-- the whole log is folded in and emptied, and every view is marked dirty.
-- Raises LSN05 outside READ COMMITTED, LSN06 for a service that is too old.
CREATE OR REPLACE FUNCTION listener.drain()
RETURNS TABLE (
    outcome text, drained_at timestamptz, changes bigint, keys bigint, correlation_id text, app_correlation_id text,
    view_id integer, view_name text, tenant text, version bigint,
    first_change_age double precision, last_change_age double precision,
    refresh_started_age double precision, retry_in double precision,
    quiet_period double precision, max_wait double precision, edge text, bulk boolean, paused boolean,
    restored boolean)
LANGUAGE plpgsql SECURITY DEFINER
-- As for drained_keys().
SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan SET jit = off
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $function$
#variable_conflict use_column
DECLARE
    last_drain listener.drain_log;
    this_system bigint := (SELECT c.system_identifier FROM pg_control_system() c);
    this_database oid := (SELECT d.oid FROM pg_database d WHERE d.datname = current_database());
    started timestamptz;
    seen_below xid8;
    unseen xid8[];
    is_copy boolean;
    batch text := gen_random_uuid()::text;
    this_drain bigint;
    folded record;
BEGIN
    PERFORM listener.check_caller('listener.drain()');
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
    this_drain := coalesce(last_drain.id, 0) + 1;
    is_copy := last_drain.id IS NOT NULL
        AND (last_drain.system_identifier <> this_system OR last_drain.database_oid <> this_database
             OR pg_snapshot_xmax(last_drain.snapshot) > pg_snapshot_xmax(pg_current_snapshot()));
    IF is_copy THEN
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
    WITH again AS (
        -- Moves that an earlier drain saw and whose every possible writer with the old tenant has ended since.
        DELETE FROM listener.moved_tenant m
        WHERE EXISTS (SELECT FROM listener.drain_log d
                      WHERE pg_visible_in_snapshot(m.xid, d.snapshot)
                        AND d.xid < pg_snapshot_xmin(pg_current_snapshot()))
        RETURNING m.source_id, m.tenant
    ), per_source AS MATERIALIZED (
        SELECT n.* FROM listener.new_changes(seen_below, unseen, last_drain.drained_at) n
        UNION ALL
        SELECT m.source_id, NULL, m.tenant, 0, started, started, NULL FROM again m GROUP BY m.source_id, m.tenant
    ), reached AS MATERIALIZED (
        SELECT v.id AS view_id, p.tenant AS logged,
               CASE WHEN p.tenant = '' OR s.same_form THEN p.tenant
                    ELSE listener.canonical_or_null(p.tenant, v.tenant_type) END AS tenant,
               p.first_change, p.last_change, p.tenant = '' AND v.tenant_type IS NOT NULL AS bulk, p.app_correlation_id
        FROM per_source p JOIN listener.view_source s ON s.source_id = p.source_id
        JOIN listener.managed_view v ON v.id = s.view_id
        UNION ALL
        SELECT v.id, p.tenant, p.tenant, p.first_change, p.last_change, true, p.app_correlation_id
        FROM per_source p JOIN listener.managed_view v ON v.id = p.view_id
    ), touched AS (
        SELECT r.view_id, r.tenant, min(r.first_change) AS first_change, max(r.last_change) AS last_change,
               bool_and(r.bulk) AS bulk, max(r.app_correlation_id) AS app_correlation_id
        FROM reached r WHERE octet_length(r.tenant) <= 1024
        GROUP BY 1, 2
    ), refused AS (
        INSERT INTO listener.dead_letter
            (view_name, tenant, error_type, exception_class, error_message, correlation_id, app_correlation_id)
        SELECT v.name, left(r.logged, 100), 'validation_error',
               CASE WHEN octet_length(r.logged) > 1024 THEN 'TenantTooLong' ELSE 'TenantMalformed' END, m.message, batch,
               r.app_correlation_id
        FROM reached r JOIN listener.managed_view v ON v.id = r.view_id
        CROSS JOIN LATERAL (SELECT CASE WHEN octet_length(r.logged) > 1024
                THEN format('a tenant of %s bytes is longer than 1024', octet_length(r.logged))
                ELSE format('%L is no tenant of type %s', left(r.logged, 100), v.tenant_type) END) AS m (message)
        WHERE (r.tenant IS NULL OR octet_length(r.tenant) > 1024)
          -- One open letter, however often such a tenant is written.
          AND NOT EXISTS (SELECT FROM listener.dead_letter d
                          WHERE d.status = 'open' AND d.view_id IS NULL AND d.view_name = v.name
                            AND d.tenant = left(r.logged, 100) AND d.error_message = m.message)
    ), raised AS (
        INSERT INTO listener.dirty_key
            (view_id, tenant, version, first_change_at, last_change_at, bulk, correlation_id, app_correlation_id)
        SELECT t.view_id, t.tenant, this_drain, t.first_change, t.last_change, t.bulk, batch, t.app_correlation_id
        FROM touched t
    ), logged AS (
        INSERT INTO listener.drain_log
            (id, drained_at, snapshot, xid, changes, keys, correlation_id, system_identifier, database_oid)
        SELECT this_drain, started, pg_current_snapshot(), pg_current_xact_id(), sum(p.changes),
               (SELECT count(*) FROM touched), batch, this_system, this_database
        FROM per_source p HAVING count(*) > 0
        RETURNING changes, keys
    )
    SELECT l.changes, l.keys,
           -- What the rest of a row takes is about 350 bytes.
           (SELECT sum(400 + octet_length(t.tenant) + coalesce(octet_length(t.app_correlation_id), 0))
            FROM touched t) AS bytes
    INTO folded FROM logged l;

    drained_at := started;
    restored := is_copy;
    -- Nothing new: nothing was written, and no transaction id was spent.
    IF folded.changes IS NULL THEN
        outcome := 'nothing';
        changes := 0;
        RETURN NEXT;
        RETURN;
    END IF;
    -- Half of what a Unix socket holds.
    IF folded.bytes <= 100000 THEN
        RETURN QUERY SELECT k.*, is_copy FROM listener.drained_keys(this_drain) k;
        IF FOUND THEN
            RETURN;
        END IF;
    END IF;
    outcome := 'drained';
    changes := folded.changes;
    keys := folded.keys;
    correlation_id := batch;
    version := this_drain;
    RETURN NEXT;
END
$function$;

-- fold_restored_log(): the log of a restored or copied database. Its transaction ids mean nothing here, so its rows
-- are emptied out and stand again under transaction id 0, which the drain that calls this reads and no later one, and
-- every view is marked for all tenants.
CREATE OR REPLACE FUNCTION listener.fold_restored_log() RETURNS void
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $function$
    DELETE FROM listener.purge_mark;
    DELETE FROM listener.moved_tenant;
    WITH emptied AS (
        DELETE FROM listener.change_log RETURNING source_id, view_id, tenant, changed_at, app_correlation_id
    )
    INSERT INTO listener.change_log (xid, changed_at, source_id, view_id, tenant, app_correlation_id)
    SELECT '0'::xid8, clock_timestamp(), e.source_id, e.view_id, e.tenant, max(e.app_correlation_id)
    FROM emptied e GROUP BY e.source_id, e.view_id, e.tenant
    UNION ALL
    SELECT '0'::xid8, clock_timestamp(), NULL, v.id, '', NULL FROM listener.managed_view v
$function$;

-- dirty: the dirty keys, one row each: the newest version, the oldest change that no refresh has shown. Reads from the
-- purge's mark on: with an index scan, rows deleted long ago are not crossed.
CREATE OR REPLACE VIEW listener.dirty AS
SELECT k.view_id, k.tenant, max(k.version) AS version, min(k.first_change_at) AS dirty_since,
       max(k.last_change_at) AS last_change_at, bool_and(k.bulk) AS bulk,
       (array_agg(k.correlation_id ORDER BY k.version DESC))[1] AS correlation_id,
       (array_agg(k.app_correlation_id ORDER BY k.version DESC) FILTER (WHERE k.app_correlation_id IS NOT NULL))[1]
           AS app_correlation_id
-- OFFSET 0: from the mark on, and then to the views; by the views' keys it would cross all that was deleted.
FROM (SELECT n.* FROM listener.dirty_key n
      WHERE n.version + 0 >= coalesce((SELECT m.dirty_from FROM listener.purge_mark m ORDER BY m.id DESC LIMIT 1), 0)
      OFFSET 0) k
JOIN listener.managed_view v ON v.id = k.view_id
LEFT JOIN LATERAL (
    -- As state_of(), which whoever may read this view need not be allowed to call.
    SELECT s.refreshed_version FROM listener.refresh_state s WHERE s.view_id = k.view_id AND s.tenant = k.tenant
    ORDER BY s.refreshed_at DESC NULLS LAST LIMIT 1) r ON true
WHERE k.version > coalesce(r.refreshed_version, -1)
GROUP BY k.view_id, k.tenant;

-- pending_keys(overdue): the dirty keys, in the columns of drain(); all of them, or those that are past max_wait and
-- their retry; and every clean key whose view has a max_age that has passed. The service rebuilds its debouncer from
-- the first at start, and sweeps up the second.
CREATE OR REPLACE FUNCTION listener.pending_keys(overdue boolean)
RETURNS TABLE (
    outcome text, drained_at timestamptz, changes bigint, keys bigint, correlation_id text, app_correlation_id text,
    view_id integer, view_name text, tenant text, version bigint,
    first_change_age double precision, last_change_age double precision,
    refresh_started_age double precision, retry_in double precision,
    quiet_period double precision, max_wait double precision, edge text, bulk boolean, paused boolean,
    restored boolean)
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $function$
    SELECT 'dirty', n.now, 0::bigint, NULL::bigint, k.correlation_id, k.app_correlation_id, k.view_id, v.name,
           k.tenant, k.version,
           extract(epoch FROM n.now - k.dirty_since)::float8, extract(epoch FROM n.now - k.last_change_at)::float8,
           extract(epoch FROM n.now - r.started_at)::float8, extract(epoch FROM r.retry_at - n.now)::float8,
           extract(epoch FROM v.quiet_period)::float8, extract(epoch FROM v.max_wait)::float8, v.edge, k.bulk, false,
           false
    FROM (SELECT clock_timestamp()) AS n (now)
    CROSS JOIN listener.dirty k
    JOIN listener.managed_view v ON v.id = k.view_id AND v.paused_at IS NULL
    LEFT JOIN LATERAL listener.state_of(k.view_id, k.tenant) r ON true
    WHERE NOT overdue OR (k.dirty_since + v.max_wait < n.now AND coalesce(r.retry_at < n.now, true))
    UNION ALL
    SELECT 'aged', n.now, 0::bigint, NULL, gen_random_uuid()::text, NULL, r.view_id, v.name, r.tenant,
           r.refreshed_version,
           extract(epoch FROM n.now - (r.refreshed_at + v.max_age))::float8,
           extract(epoch FROM n.now - (r.refreshed_at + v.max_age))::float8,
           extract(epoch FROM n.now - r.started_at)::float8, extract(epoch FROM r.retry_at - n.now)::float8,
           extract(epoch FROM v.quiet_period)::float8, extract(epoch FROM v.max_wait)::float8, v.edge, true, false,
           false
    FROM (SELECT clock_timestamp()) AS n (now)
    CROSS JOIN listener.refresh_state r
    JOIN listener.managed_view v ON v.id = r.view_id AND v.paused_at IS NULL AND v.max_age IS NOT NULL
    WHERE (r.tenant <> '' OR v.tenant_type IS NULL) AND r.refreshed_at < n.now - v.max_age AND r.failures = 0
      AND NOT EXISTS (SELECT FROM listener.dirty_key k
                      WHERE k.view_id = r.view_id AND k.tenant = r.tenant AND k.version > r.refreshed_version)
$function$;
