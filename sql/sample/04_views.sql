-- The five dashboard views. Each query is what the dashboard would ask for one tenant; row-level security and the
-- refresh add the tenant.
SET ROLE listener_owner;
SET search_path = public;

CREATE SCHEMA IF NOT EXISTS dashboard;
GRANT USAGE ON SCHEMA dashboard TO listener_service, listener_reader;

-- The age of the newest update is different at each reading, so the target stores its time and a view counts.
SELECT listener.create_view(
    name => 'dashboard.mv_realtime_revenue',
    query => $query$
        SELECT tenant_id, (sum(revenue_cents) / 100.0)::numeric(20, 2) AS total_revenue,
               bool_or(is_verified) AS verified, max(updated_at) AS newest_update_at
        FROM revenue_ledger GROUP BY tenant_id
    $query$,
    key_columns => '{tenant_id}', tenants_query => 'SELECT id FROM tenants', target_rls => true);
CREATE VIEW mv_realtime_revenue WITH (security_invoker = true) AS
SELECT tenant_id, total_revenue, verified,
       greatest(0, floor(extract(epoch FROM statement_timestamp() - newest_update_at)))::bigint AS data_freshness_seconds
FROM dashboard.mv_realtime_revenue;

-- One row a tenant even when two runs share a time: the greater id wins.
SELECT listener.create_view(
    name => 'mv_reconciliation_status',
    query => $query$
        SELECT DISTINCT ON (tenant_id) tenant_id, state, last_run_at, id AS reconciliation_run_id
        FROM reconciliation_runs ORDER BY tenant_id, last_run_at DESC, id DESC
    $query$,
    key_columns => '{tenant_id}', tenants_query => 'SELECT id FROM tenants');

SELECT listener.create_view(
    name => 'mv_daily_revenue_summary',
    query => $query$
        SELECT tenant_id, (verification_timestamp AT TIME ZONE 'UTC')::date AS revenue_date, state, currency,
               sum(amount_cents)::bigint AS total_amount_cents, count(*) AS transaction_count
        FROM revenue_ledger
        WHERE state IN ('captured', 'refunded', 'chargeback') AND verification_timestamp IS NOT NULL
        GROUP BY tenant_id, revenue_date, state, currency
    $query$,
    key_columns => '{tenant_id,revenue_date,state,currency}', tenants_query => 'SELECT id FROM tenants',
    target_rls => true);

-- Today, in a function of its own, so that a test can let midnight pass.
CREATE FUNCTION current_day() RETURNS date
LANGUAGE sql STABLE RETURN (now() AT TIME ZONE 'UTC')::date;
GRANT EXECUTE ON FUNCTION current_day() TO listener_service;

-- A row leaves when its day does, with no write: max_age refreshes every key once in five minutes, so that a
-- dashboard shows yesterday's window for no longer.
SELECT listener.create_view(
    name => 'mv_channel_performance',
    query => $query$
        SELECT tenant_id, channel_code, (allocated_at AT TIME ZONE 'UTC')::date AS allocation_date,
               count(DISTINCT event_id) AS total_conversions, sum(allocated_revenue_cents)::bigint AS total_revenue_cents,
               avg(confidence_score)::numeric(7, 6) AS avg_confidence_score, count(*) AS total_allocations
        FROM attribution_allocations
        WHERE allocated_at >= (current_day() - 90)::timestamp AT TIME ZONE 'UTC'
        GROUP BY tenant_id, channel_code, allocation_date
    $query$,
    key_columns => '{tenant_id,channel_code,allocation_date}', tenants_query => 'SELECT id FROM tenants',
    depends_on => '{}', max_age => '5 min');

-- The join carries the tenant, so that the tenant's predicate reaches both tables.
SELECT listener.create_view(
    name => 'mv_allocation_summary',
    query => $query$
        SELECT a.tenant_id, a.event_id, a.model_version,
               sum(a.allocated_revenue_cents)::bigint AS total_allocated_cents,
               e.revenue_cents AS event_revenue_cents,
               sum(a.allocated_revenue_cents) = e.revenue_cents AS is_balanced,
               (sum(a.allocated_revenue_cents) - e.revenue_cents)::bigint AS drift_cents
        FROM attribution_allocations a
        LEFT JOIN attribution_events e ON e.tenant_id = a.tenant_id AND e.id = a.event_id
        GROUP BY a.tenant_id, a.event_id, a.model_version, e.revenue_cents
    $query$,
    key_columns => '{tenant_id,event_id,model_version}', tenants_query => 'SELECT id FROM tenants');

GRANT SELECT ON mv_realtime_revenue, dashboard.mv_realtime_revenue, mv_reconciliation_status, mv_daily_revenue_summary,
    mv_channel_performance, mv_allocation_summary TO listener_reader;

RESET search_path;
RESET ROLE;
