-- What is fresh, and why not.

-- unconsumed(): the log rows that no drain has folded in yet, by the rule of drain().
CREATE OR REPLACE FUNCTION listener.unconsumed() RETURNS SETOF listener.change_log
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_custom_plan SET jit = off AS $function$
DECLARE
    last_drain listener.drain_log;
    seen_below xid8;
BEGIN
    SELECT l.* INTO last_drain FROM listener.drain_log l ORDER BY l.id DESC LIMIT 1;
    seen_below := coalesce(pg_snapshot_xmax(last_drain.snapshot), '0');
    RETURN QUERY
    SELECT c.* FROM listener.change_log c WHERE c.xid >= seen_below
    UNION ALL
    SELECT c.* FROM listener.change_log c
    WHERE c.xid = ANY (ARRAY(SELECT i.xid FROM (SELECT pg_snapshot_xip(last_drain.snapshot) AS xid
                                                UNION SELECT last_drain.xid) i WHERE i.xid < seen_below));
END
$function$;

-- is_pending(view_id, tenant): whether a change of this key is known that its target does not show yet: logged and not
-- drained, drained and not refreshed, marked for all tenants and not written out, or a row that moved and may be looked
-- up by somebody who has not seen that. A tenant that is NULL is any of the view's; the one key of a view without tenants,
-- '', has a change by any.
CREATE OR REPLACE FUNCTION listener.is_pending(view_id integer, tenant text) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT EXISTS (
        SELECT FROM listener.dirty_key k
        LEFT JOIN LATERAL listener.state_of(k.view_id, k.tenant) r ON true
        WHERE $2 IS NOT NULL AND k.view_id = $1 AND k.tenant IN ($2, '') AND k.version > coalesce(r.refreshed_version, -1)
    ) OR ($2 IS NULL AND EXISTS (SELECT FROM listener.dirty k WHERE k.view_id = $1))
    OR EXISTS (
        SELECT FROM listener.unconsumed() c
        WHERE ($2 IS NULL OR $2 = '' OR c.tenant IN ($2, ''))
          AND (c.view_id = $1 OR c.source_id IN (SELECT s.source_id FROM listener.view_source s WHERE s.view_id = $1))
    ) OR EXISTS (
        SELECT FROM listener.moved_tenant m
        WHERE ($2 IS NULL OR $2 = '' OR m.tenant IN ($2, ''))
          AND m.source_id IN (SELECT s.source_id FROM listener.view_source s WHERE s.view_id = $1)
    )
$function$;

-- pending_upstream(view_id, tenant): the views upstream of this one with a pending change that may reach this key, and
-- the tenant whose change it is, NULL where it may be any.
CREATE OR REPLACE FUNCTION listener.pending_upstream(view_id integer, tenant text)
RETURNS TABLE (upstream_id integer, upstream_tenant text)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT u.upstream_id, t.tenant
    FROM listener.view_upstream u CROSS JOIN LATERAL (SELECT CASE WHEN u.by_tenant THEN $2 END) AS t (tenant)
    WHERE u.view_id = $1 AND listener.is_pending(u.upstream_id, t.tenant)
$function$;

-- is_stale(view_id, tenant): whether a change is known that this key's target does not show yet: its own, or one of a
-- view upstream.
CREATE OR REPLACE FUNCTION listener.is_stale(view_id integer, tenant text) RETURNS boolean
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
    SELECT listener.is_pending($1, $2) OR EXISTS (SELECT FROM listener.pending_upstream($1, $2))
$function$;

-- freshness: one row per refresh key that was ever dirty or refreshed. Ages are as of now, by the server's clock.
--   waits_for: the view upstream, and its tenant, whose change this key has yet to see; its oldest
CREATE OR REPLACE VIEW listener.freshness AS
SELECT v.name AS view_name, coalesce(k.tenant, r.tenant) AS tenant_id,
       CASE WHEN v.paused_at IS NOT NULL THEN 'paused'
            WHEN d.id IS NOT NULL THEN 'quarantined'
            WHEN r.failures > 0 THEN 'failing'
            WHEN k.version IS NOT NULL THEN 'dirty'
            ELSE 'fresh' END AS status,
       coalesce(k.version, r.refreshed_version) AS version, r.refreshed_version, k.dirty_since, k.last_change_at,
       r.refreshed_at,
       CASE WHEN k.version IS NOT NULL
            THEN greatest(CASE v.edge WHEN 'leading' THEN k.dirty_since
                          ELSE least(k.last_change_at + v.quiet_period, k.dirty_since + v.max_wait) END,
                          r.started_at + v.quiet_period, r.retry_at) END AS due_at,
       r.duration, r.inserted, r.updated, r.deleted, r.failures, r.retry_at, r.last_error,
       coalesce(k.correlation_id, r.correlation_id) AS correlation_id, k.app_correlation_id,
       coalesce(own.what, anybodys.what) AS waits_for
FROM listener.dirty k
FULL JOIN listener.refresh_state r ON r.view_id = k.view_id AND r.tenant = k.tenant
JOIN listener.managed_view v ON v.id = coalesce(k.view_id, r.view_id)
LEFT JOIN listener.dead_letter d ON d.view_id = v.id AND d.tenant = coalesce(k.tenant, r.tenant) AND d.status = 'open'
-- Grouped by what they are joined by: whoever does not ask for waits_for does not pay for it.
LEFT JOIN (
    SELECT p.view_id, w.tenant, (array_agg(u.name || ' of tenant ' || w.tenant ORDER BY w.dirty_since))[1] AS what
    FROM listener.view_upstream p JOIN listener.dirty w ON w.view_id = p.upstream_id AND w.tenant <> '' AND p.by_tenant
    JOIN listener.managed_view u ON u.id = p.upstream_id
    GROUP BY p.view_id, w.tenant) own ON own.view_id = v.id AND own.tenant = coalesce(k.tenant, r.tenant)
LEFT JOIN (
    SELECT p.view_id, (array_agg(CASE w.tenant WHEN '' THEN u.name || ' of all tenants' ELSE u.name || ' of tenant ' || w.tenant END
                                 ORDER BY w.dirty_since))[1] AS what
    FROM listener.view_upstream p
    JOIN listener.dirty w ON w.view_id = p.upstream_id AND (w.tenant = '' OR NOT p.by_tenant)
    JOIN listener.managed_view u ON u.id = p.upstream_id
    GROUP BY p.view_id) anybodys ON anybodys.view_id = v.id
WHERE coalesce(k.tenant, r.tenant) <> '' OR k.version IS NOT NULL OR v.tenant_column IS NULL;

-- compare(view, tenant_id): the target against its definition for one tenant, exactly, in one snapshot.
--   missing, extra: rows that only the definition, only the target has; held: rows of the target
--   stale: whether a known change explains a difference
-- Computed as refresh() computes. Raises what refresh() raises, apart from LSN04 and LSN05.
CREATE OR REPLACE FUNCTION listener.compare(
    view text, tenant_id text, OUT missing bigint, OUT extra bigint, OUT held bigint, OUT stale boolean)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_custom_plan SET jit = off
AS $function$
DECLARE
    managed listener.managed_view := listener.find_view(view);
    tenant_key text := listener.canonical_tenant(tenant_id, managed.tenant_type);
    comparison text := listener.comparison_statement(managed);
BEGIN
    -- TRUNCATE empties a table for snapshots that are older than it, and this statement has its snapshot before it has its
    -- locks. So what nothing explains is looked at once more: by then the snapshot shows what TRUNCATE logged.
    FOR attempt IN 1 .. 2 LOOP
        -- One statement: both look with its snapshot.
        SELECT (c.found ->> 'missing')::bigint, (c.found ->> 'extra')::bigint, (c.found ->> 'held')::bigint,
               listener.is_stale(managed.id, tenant_key)
        INTO missing, extra, held, stale
        FROM listener.evaluate(managed, comparison, tenant_key) AS c (found);
        EXIT WHEN stale OR missing + extra = 0;
    END LOOP;
END
$function$;

-- lock_holder(key): the backend that holds this advisory lock, its query, and how many seconds its transaction is old, as
-- far as the caller may see them; no row where nobody does.
CREATE OR REPLACE FUNCTION listener.lock_holder(key bigint) RETURNS TABLE (pid integer, query text, held float8)
LANGUAGE sql VOLATILE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT l.pid, a.query, extract(epoch FROM clock_timestamp() - a.xact_start)::float8
    FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid
    WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted
      AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
      AND (l.classid::bigint << 32 | l.objid::bigint) = key
    LIMIT 1
$function$;

-- explain_key(view, tenant_id): what is known of one key, for "why is this stale?". Ages in seconds.
--   app_correlation_id: what the application set as app.correlation_id with the newest change that is not shown, if it
--       did
CREATE OR REPLACE FUNCTION listener.explain_key(
    view text, tenant_id text,
    OUT view_name text, OUT tenant text, OUT paused boolean, OUT undrained bigint, OUT oldest_undrained_age float8,
    OUT version bigint, OUT refreshed_version bigint, OUT dirty_age float8, OUT due_in float8, OUT refreshed_age float8,
    OUT all_tenants_pending boolean, OUT failures integer, OUT retry_in float8, OUT last_error text,
    OUT letter_id uuid, OUT lock_holder integer, OUT lock_holder_query text, OUT drain_holder integer,
    OUT correlation_id text, OUT app_correlation_id text)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
#variable_conflict use_column
DECLARE
    managed listener.managed_view := listener.find_view(view);
    now_at timestamptz := clock_timestamp();
    logged_with text;
BEGIN
    view_name := managed.name;
    tenant := listener.canonical_tenant(tenant_id, managed.tenant_type);
    paused := managed.paused_at IS NOT NULL;
    SELECT count(*), extract(epoch FROM now_at - min(c.changed_at)),
           (array_agg(c.app_correlation_id ORDER BY c.changed_at DESC) FILTER (WHERE c.app_correlation_id <> ''))[1]
    INTO undrained, oldest_undrained_age, logged_with
    FROM listener.unconsumed() c
    WHERE (explain_key.tenant = '' OR c.tenant IN (explain_key.tenant, '')) AND (c.view_id = managed.id OR c.source_id IN (
        SELECT s.source_id FROM listener.view_source s WHERE s.view_id = managed.id));
    SELECT f.version, f.refreshed_version, extract(epoch FROM now_at - f.dirty_since),
           extract(epoch FROM f.due_at - now_at), extract(epoch FROM now_at - f.refreshed_at),
           f.failures, extract(epoch FROM f.retry_at - now_at), f.last_error, f.correlation_id,
           f.app_correlation_id
    INTO version, refreshed_version, dirty_age, due_in, refreshed_age, failures, retry_in, last_error, correlation_id,
         app_correlation_id
    FROM listener.freshness f WHERE f.view_name = managed.name AND f.tenant_id = explain_key.tenant;
    app_correlation_id := coalesce(logged_with, app_correlation_id);
    all_tenants_pending := managed.tenant_column IS NOT NULL AND EXISTS (SELECT FROM listener.freshness f WHERE f.view_name = managed.name AND f.tenant_id = '');
    SELECT d.id INTO letter_id FROM listener.dead_letter d
    WHERE d.view_id = managed.id AND d.tenant = explain_key.tenant AND d.status = 'open';
    SELECT h.pid, h.query INTO lock_holder, lock_holder_query
    FROM listener.lock_holder(listener.lock_key(managed.id, tenant)) h;
    drain_holder := (SELECT h.pid FROM listener.lock_holder(listener.lock_key(0, '')) h);
END
$function$;

-- explain_upstream(view, tenant_id): the keys upstream of this one with a change that is not shown there yet.
--   tenant: '' for all tenants, NULL where any tenant's rows concern this key; dirty_age in seconds, NULL where the change
--   is not drained yet
CREATE OR REPLACE FUNCTION listener.explain_upstream(view text, tenant_id text)
RETURNS TABLE (view_name text, tenant text, dirty_age float8, paused boolean)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off AS $function$
#variable_conflict use_column
DECLARE
    managed listener.managed_view := listener.find_view(view);
BEGIN
    RETURN QUERY
    SELECT v.name, coalesce(d.tenant, p.upstream_tenant), extract(epoch FROM clock_timestamp() - d.dirty_since)::float8,
           v.paused_at IS NOT NULL
    FROM listener.pending_upstream(managed.id, listener.canonical_tenant(tenant_id, managed.tenant_type)) p
    JOIN listener.managed_view v ON v.id = p.upstream_id
    LEFT JOIN LATERAL (
        SELECT k.tenant, k.dirty_since FROM listener.dirty k
        WHERE k.view_id = p.upstream_id AND (p.upstream_tenant IS NULL OR k.tenant IN (p.upstream_tenant, ''))
        ORDER BY k.dirty_since LIMIT 1) d ON true
    -- The first of a chain first: the others wait for it.
    ORDER BY (SELECT count(*) FROM listener.view_upstream u WHERE u.view_id = v.id), v.name;
END
$function$;

-- staleness(): how old the oldest change is that a view does not show, whatever keeps it: not drained yet, waiting for
-- its refresh, failing, paused, or shown so far only by a view that this one reads. One row per view.
--   dirty_keys, dirty_since   of what is drained, and the view's own
--   since                     of all; NULL: nothing is known that is not shown
--   max_staleness             NULL too for a view that does not have its place yet: nobody reads it
CREATE OR REPLACE FUNCTION listener.staleness()
RETURNS TABLE (view_id integer, view_name text, dirty_keys bigint, dirty_since timestamptz, since timestamptz,
               staleness interval, max_staleness interval)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off AS $function$
    WITH drained AS MATERIALIZED (
        SELECT k.view_id, count(*) AS keys, min(k.dirty_since) AS since FROM listener.dirty k GROUP BY k.view_id
    ), logged AS MATERIALIZED (
        -- As the drain dates them: a transaction that stayed open is not staleness of ours.
        SELECT c.source_id, c.view_id,
               CASE WHEN c.source_id IS NULL THEN min(c.changed_at) ELSE greatest(min(c.changed_at), (
                   SELECT l.drained_at FROM listener.drain_log l ORDER BY l.id DESC LIMIT 1)) END AS since
        FROM listener.unconsumed() c GROUP BY c.source_id, c.view_id
    ), own AS MATERIALIZED (
        SELECT o.view_id, min(o.since) AS since
        FROM (SELECT d.view_id, d.since FROM drained d
              UNION ALL SELECT l.view_id, l.since FROM logged l WHERE l.view_id IS NOT NULL
              UNION ALL SELECT w.view_id, l.since FROM logged l JOIN listener.view_source w ON w.source_id = l.source_id) o
        GROUP BY o.view_id
    )
    SELECT v.id, v.name, coalesce(d.keys, 0), d.since, s.since, clock_timestamp() - s.since,
           CASE WHEN v.replaces IS NULL AND NOT EXISTS (
               SELECT FROM listener.adoption a WHERE a.view_id = v.id AND a.state = 'filling') THEN v.max_staleness END
    FROM listener.managed_view v
    LEFT JOIN drained d ON d.view_id = v.id
    CROSS JOIN LATERAL (
        SELECT min(o.since) AS since FROM own o
        WHERE o.view_id = v.id
           OR o.view_id IN (SELECT u.upstream_id FROM listener.view_upstream u WHERE u.view_id = v.id)) s
$function$;
