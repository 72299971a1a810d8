-- Drift: a target that is not as its definition says, and no change explains it. A few keys are looked at in the
-- background; what differs is refreshed.

-- next_keys(after_view, after_tenant, keys, slowest): the next keys to compare, in the order of their index, from the given
-- one on; from a random one where none is given, so that replicas do not look at the same. Left out are those of paused
-- views, keys that fail, that took longer than `slowest` to refresh, or were refreshed less than their view's max_age ago: what the
-- time has changed since is none of a target's faults.
-- Reads refresh_state: a key that was never refreshed has nothing to compare.
CREATE OR REPLACE FUNCTION listener.next_keys(after_view integer, after_tenant text, keys integer, slowest interval)
RETURNS TABLE (view_id integer, view_name text, tenant text)
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_custom_plan SET jit = off
AS $function$
#variable_conflict use_column
BEGIN
    IF after_view IS NULL THEN
        SELECT r.view_id, r.tenant INTO after_view, after_tenant FROM listener.refresh_state r
        OFFSET floor(random() * (SELECT count(*) FROM listener.refresh_state)) LIMIT 1;
    END IF;
    RETURN QUERY
    SELECT r.view_id, v.name, r.tenant
    FROM listener.refresh_state r JOIN listener.managed_view v ON v.id = r.view_id
    WHERE (r.view_id, r.tenant) > (after_view, after_tenant)
      AND (r.tenant = '') = (v.strategy <> 'tenant') AND v.paused_at IS NULL AND r.failures = 0
      AND r.duration <= slowest AND coalesce(r.refreshed_at < clock_timestamp() - v.max_age, true)
    ORDER BY r.view_id, r.tenant LIMIT keys;
END
$function$;

-- drift_example(view, tenant_id): one row that only the definition or only the target has, as text; NULL where there is
-- none any more. Computed as refresh() computes.
CREATE OR REPLACE FUNCTION listener.drift_example(view text, tenant_id text) RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_custom_plan SET jit = off
AS $function$
DECLARE
    managed listener.managed_view := listener.find_view(view);
    statement text := format($sql$%s
SELECT pg_catalog.to_jsonb(COALESCE((SELECT 'missing ' OPERATOR(pg_catalog.||) m::pg_catalog.text
                                     FROM (SELECT * FROM fresh EXCEPT ALL SELECT * FROM held) m LIMIT 1),
                                    (SELECT 'extra ' OPERATOR(pg_catalog.||) e::pg_catalog.text
                                     FROM (SELECT * FROM held EXCEPT ALL SELECT * FROM fresh) e LIMIT 1)))$sql$,
        listener.compared_rows(managed));
    example text := listener.evaluate(managed, statement, listener.canonical_tenant(tenant_id, managed.tenant_type)) #>> '{}';
BEGIN
    RETURN CASE WHEN length(example) > 300 THEN left(example, 300) || '…' ELSE example END;
END
$function$;

-- run_drift_check(view, tenant_id): what check_drift() does; see there.
CREATE OR REPLACE FUNCTION listener.run_drift_check(
    view text, tenant_id text,
    OUT outcome text, OUT missing bigint, OUT extra bigint, OUT example text, OUT app_correlation_id text)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
#variable_conflict use_column
DECLARE
    managed listener.managed_view := listener.find_view(view);
    tenant_key text := listener.canonical_tenant(tenant_id, managed.tenant_type);
    shown listener.refresh_state;
    again record;
BEGIN
    PERFORM listener.check_caller('listener.check_drift()');
    IF NOT pg_try_advisory_xact_lock(listener.lock_key(0, 'drift'))
       OR EXISTS (SELECT FROM listener.lock_holder(listener.lock_key(managed.id, tenant_key))) THEN
        outcome := 'busy';
        RETURN;
    END IF;
    SELECT c.* INTO again FROM listener.compare(managed.name, tenant_key) c;
    missing := again.missing;
    extra := again.extra;
    outcome := CASE WHEN missing + extra = 0 THEN 'exact'
                    -- A nested view that was replaced is noticed by the next sweep, which marks everybody.
                    WHEN again.stale OR listener.view_fingerprint(managed) IS DISTINCT FROM managed.fingerprint THEN 'stale'
                    -- Its max_age has just passed, and the sweep refreshes it.
                    WHEN managed.max_age IS NOT NULL AND EXISTS (
                        SELECT FROM listener.time_dependence(to_regclass('listener.definition_' || managed.id)) t
                        WHERE t.dependence IN ('time', 'volatile')) THEN 'stale'
                    ELSE 'drift' END;
    IF outcome <> 'drift' THEN
        RETURN;
    END IF;
    SELECT r.* INTO shown FROM listener.state_of(managed.id, tenant_key) r;
    IF shown.undetermined_version = shown.refreshed_version THEN
        outcome := 'undetermined';
        RETURN;
    ELSIF NOT pg_try_advisory_xact_lock(listener.lock_key(managed.id, tenant_key)) THEN
        outcome := 'busy';
        RETURN;
    END IF;
    example := listener.drift_example(managed.name, tenant_key);
    IF shown.drift_version IS NULL THEN
        app_correlation_id := gen_random_uuid()::text;
        INSERT INTO listener.change_log (xid, changed_at, view_id, tenant, app_correlation_id)
        VALUES (pg_current_xact_id(), clock_timestamp(), managed.id, tenant_key, run_drift_check.app_correlation_id);
        PERFORM listener.ring_for_all();
        UPDATE listener.refresh_state r SET drift_version = shown.refreshed_version
        WHERE r.view_id = managed.id AND r.tenant = tenant_key;
        RETURN;
    END IF;
    PERFORM listener.run_refresh(managed.name, tenant_key);
    SELECT c.* INTO again FROM listener.compare(managed.name, tenant_key) c;
    IF (again.missing + again.extra > 0 AND NOT again.stale) OR shown.drift_version = shown.refreshed_version THEN
        outcome := 'undetermined';
    END IF;
    UPDATE listener.refresh_state r
    SET drift_version = r.refreshed_version,
        undetermined_version = CASE WHEN outcome = 'undetermined' THEN r.refreshed_version END
    WHERE r.view_id = managed.id AND r.tenant = tenant_key;
END
$function$;

-- check_drift(view, tenant_id): compares one key, and marks it dirty where it differs and nothing explains that.
--   outcome   'exact'; 'stale': a known change that is not shown yet, or the passing of time, explains the difference;
--             'drift': nothing does, and the key is refreshed: at its first drift like any dirty key, later by this
--             call; 'undetermined': its definition has more than one right result, and nothing is done until the key
--             changes; 'busy': a session refreshes the key, or another replica compares one
--   missing, extra   how many rows only the definition has, only the target has
--   example   one of them; NULL where it was reported before
--   app_correlation_id   that of the refresh that will follow
-- The refresh by this call leaves the key's version as it is. Where the key differs again at once, or later at the same
-- version, no change explains it: its definition has more than one right result.
-- Writes change_log and refresh_state. Raises what compare() and refresh() raise.
CREATE OR REPLACE FUNCTION listener.check_drift(
    view text, tenant_id text,
    OUT outcome text, OUT missing bigint, OUT extra bigint, OUT example text, OUT app_correlation_id text)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER AS $function$
#variable_conflict use_column
DECLARE
    -- Qualified like all here, as in refresh().
    callers_path pg_catalog.text := pg_catalog.current_setting('search_path');
BEGIN
    SELECT c.* INTO outcome, missing, extra, example, app_correlation_id FROM listener.run_drift_check(view, tenant_id) c;
    PERFORM listener.restore_path(callers_path);
END
$function$;
