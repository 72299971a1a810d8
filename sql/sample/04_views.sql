-- The five dashboards. No query names a tenant: row-level security and the refresh both add the predicate, and every
-- key begins with the tenant, so that it reaches the tables.
-- Sums are cast: sum(bigint) is numeric, and the type of a target's column is what its query returns.
SET ROLE listener_owner;
SET search_path = public;

-- What a tenant earned, in units (a product is exact to the cent, a quotient of large numbers is not), and how fresh
-- that is. The target holds the time of the newest update, which changes only when
-- the ledger does; the view over it below counts the seconds at the moment of reading.
SELECT listener.create_view(
    name => 'dashboard.mv_realtime_revenue',
    query => $query$
        SELECT l.tenant_id,
               sum(l.revenue_cents) * 0.01 AS total_revenue,
               bool_or(l.is_verified) AS verified,
               max(l.updated_at) AS newest_update_at
        FROM revenue_ledger l
        GROUP BY l.tenant_id
    $query$,
    key_columns => '{tenant_id}',
    tenants_query => 'SELECT id FROM tenants',
    target_rls => true);
GRANT SELECT ON dashboard.mv_realtime_revenue TO listener_reader;

-- Not below zero: the application's clock may be ahead of the server's.
CREATE VIEW mv_realtime_revenue WITH (security_invoker = true) AS
SELECT r.tenant_id, r.total_revenue, r.verified,
       greatest(0, floor(extract(epoch FROM clock_timestamp() - r.newest_update_at)))::bigint AS data_freshness_seconds
FROM dashboard.mv_realtime_revenue r;
GRANT SELECT ON mv_realtime_revenue TO listener_reader;

-- The latest run of a tenant: the id decides between two of the same time, so that there is one row, always the same.
SELECT listener.create_view(
    name => 'mv_reconciliation_status',
    query => $query$
        SELECT DISTINCT ON (r.tenant_id) r.tenant_id, r.state, r.last_run_at, r.id AS reconciliation_run_id
        FROM reconciliation_runs r
        ORDER BY r.tenant_id, r.last_run_at DESC, r.id DESC
    $query$,
    key_columns => '{tenant_id}',
    tenants_query => 'SELECT id FROM tenants');
GRANT SELECT ON mv_reconciliation_status TO listener_reader;

-- Money by the day that it was verified. The day is UTC's, whatever the session's time zone is.
SELECT listener.create_view(
    name => 'mv_daily_revenue_summary',
    query => $query$
        SELECT l.tenant_id,
               (l.verification_timestamp AT TIME ZONE 'UTC')::date AS revenue_date,
               l.state, l.currency,
               sum(l.amount_cents)::bigint AS total_amount_cents,
               count(*) AS transaction_count
        FROM revenue_ledger l
        WHERE l.state IN ('captured', 'refunded', 'chargeback') AND l.verification_timestamp IS NOT NULL
        GROUP BY 1, 2, 3, 4
    $query$,
    key_columns => '{tenant_id,revenue_date,state,currency}',
    tenants_query => 'SELECT id FROM tenants',
    target_rls => true);
GRANT SELECT ON mv_daily_revenue_summary TO listener_reader;

-- current_day(): today in UTC. Reads no table.
CREATE FUNCTION current_day() RETURNS date
LANGUAGE sql STABLE RETURN (now() AT TIME ZONE 'UTC')::date;

-- The last ninety days, today among them. A day leaves at midnight without any write; max_age is how long a tenant
-- that writes nothing may go on showing it.
SELECT listener.create_view(
    name => 'mv_channel_performance',
    query => $query$
        SELECT a.tenant_id, a.channel_code,
               (a.allocated_at AT TIME ZONE 'UTC')::date AS allocation_date,
               count(DISTINCT a.event_id) AS total_conversions,
               sum(a.allocated_revenue_cents)::bigint AS total_revenue_cents,
               round(avg(a.confidence_score), 4) AS avg_confidence_score,
               count(*) AS total_allocations
        FROM attribution_allocations a
        WHERE a.allocated_at >= (current_day() - 89)::timestamp AT TIME ZONE 'UTC'
        GROUP BY 1, 2, 3
    $query$,
    key_columns => '{tenant_id,channel_code,allocation_date}',
    tenants_query => 'SELECT id FROM tenants',
    depends_on => '{}',
    max_age => '5 min');
GRANT SELECT ON mv_channel_performance TO listener_reader;

-- Whether what was allocated adds up to what the event earned. The join carries the tenant: without it the predicate
-- would not reach the events. Where the event is gone, or there never was one, nobody can say: NULL.
SELECT listener.create_view(
    name => 'mv_allocation_summary',
    query => $query$
        SELECT a.tenant_id, a.event_id, a.model_version,
               sum(a.allocated_revenue_cents)::bigint AS total_allocated_cents,
               e.revenue_cents AS event_revenue_cents,
               sum(a.allocated_revenue_cents)::bigint = e.revenue_cents AS is_balanced,
               sum(a.allocated_revenue_cents)::bigint - e.revenue_cents AS drift_cents
        FROM attribution_allocations a
        LEFT JOIN attribution_events e ON e.tenant_id = a.tenant_id AND e.id = a.event_id
        GROUP BY a.tenant_id, a.event_id, a.model_version, e.revenue_cents
    $query$,
    key_columns => '{tenant_id,event_id,model_version}',
    tenants_query => 'SELECT id FROM tenants');
GRANT SELECT ON mv_allocation_summary TO listener_reader;

RESET search_path;
RESET ROLE;
