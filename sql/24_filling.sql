-- Filling: how far a view is that is being filled, or was marked for all tenants.

-- filling: one row per view by tenant that is being filled, or written out again because something that all tenants share
-- changed. Nothing is kept for it: it is what the state of the keys says.
--   total, done      keys; NULL while "all tenants" is not written out yet, and with it nobody knows how many there are
--   remaining        keys that are still to be refreshed; failing: those of them whose last refresh failed
--   since            when all tenants were written out; before that, when they were marked
--   rate             refreshes a second, of the last minute
--   time_left        at that rate; NULL where nothing was refreshed
CREATE OR REPLACE VIEW listener.filling AS
SELECT v.name AS view_name, t.total, t.total - least(t.total, d.remaining) AS done, d.remaining, d.failing, t.since,
       n.rate::float8 AS rate, make_interval(secs => (d.remaining / nullif(n.rate, 0))::float8) AS time_left,
       v.paused_at IS NOT NULL AS paused
FROM listener.managed_view v
JOIN (
    SELECT p.view_id, bool_or(p.tenant = '') AS marked, min(p.first_change_at) AS since,
           count(*) FILTER (WHERE p.tenant <> '') AS remaining, count(*) FILTER (WHERE p.failing) AS failing
    FROM (
        SELECT u.view_id, u.tenant, min(u.first_change_at) AS first_change_at, bool_or(u.failing) AS failing
        FROM (
            SELECT k.view_id, k.tenant, k.first_change_at, coalesce(r.failures, 0) > 0 AS failing
            -- From the purge's mark on, as in `dirty`.
            FROM (SELECT b.* FROM listener.dirty_key b
                  WHERE b.version + 0 >= coalesce(
                      (SELECT m.dirty_from FROM listener.purge_mark m ORDER BY m.id DESC LIMIT 1), 0) OFFSET 0) k
            LEFT JOIN LATERAL (
                SELECT s.refreshed_version, s.failures FROM listener.refresh_state s
                WHERE s.view_id = k.view_id AND s.tenant = k.tenant
                ORDER BY s.refreshed_at DESC NULLS LAST LIMIT 1) r ON true
            WHERE k.bulk AND k.version > coalesce(r.refreshed_version, -1)
            UNION ALL
            SELECT c.view_id, c.tenant, c.changed_at, false FROM listener.unconsumed() c WHERE c.view_id IS NOT NULL
        ) u
        GROUP BY u.view_id, u.tenant
    ) p
    GROUP BY p.view_id
) d ON d.view_id = v.id AND v.strategy = 'tenant'
LEFT JOIN LATERAL (
    SELECT s.inserted, s.started_at FROM listener.refresh_state s WHERE s.view_id = v.id AND s.tenant = '' AND NOT d.marked
    ORDER BY s.refreshed_at DESC NULLS LAST LIMIT 1) e ON true
CROSS JOIN LATERAL (SELECT e.inserted AS total, coalesce(e.started_at, d.since) AS since) t
CROSS JOIN LATERAL (
    SELECT count(*) / greatest(least(60, extract(epoch FROM clock_timestamp() - t.since)), 0.001) AS rate
    FROM listener.refresh_state s
    WHERE s.view_id = v.id AND s.tenant <> ''
      AND s.refreshed_at > greatest(t.since, clock_timestamp() - interval '1 minute')) n;
