-- Refresh of everything that one tenant has: what an application calls that has written, and wants to read it in every view.

-- run_refresh_all(tenant_id): what refresh_all_for_tenant() does; see there.
CREATE OR REPLACE FUNCTION listener.run_refresh_all(tenant_id text)
RETURNS TABLE (
    view_name text, outcome text, inserted bigint, updated bigint, deleted bigint, version bigint, duration interval)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
#variable_conflict use_column
DECLARE
    key record;
    started timestamptz;
    shown integer[] := '{}';
    failed_message text;
    failed_detail text;
    failed_hint text;
BEGIN
    PERFORM listener.check_caller('listener.refresh_all_for_tenant()');
    IF NOT EXISTS (SELECT FROM listener.managed_view v
                   WHERE v.strategy = 'tenant'
                     AND listener.canonical_or_null(run_refresh_all.tenant_id, v.tenant_type) IS NOT NULL) THEN
        RAISE EXCEPTION 'validation_error: % can be no tenant of any view',
            coalesce(quote_literal(left(run_refresh_all.tenant_id, 100)), 'NULL') USING ERRCODE = 'LSN02',
            HINT = coalesce('Their tenants are of type ' || (
                SELECT string_agg(DISTINCT v.tenant_type, ', ') FROM listener.managed_view v WHERE v.strategy = 'tenant')
                || '.', 'No view by tenant is registered: see listener.create_view.');
    END IF;
    FOR key IN
        SELECT v.id, v.name, t.tenant, v.paused_at IS NOT NULL AS is_paused
        FROM listener.managed_view v
        CROSS JOIN LATERAL (
            SELECT CASE WHEN v.strategy <> 'tenant' THEN ''
                        ELSE listener.canonical_or_null(run_refresh_all.tenant_id, v.tenant_type) END) AS t (tenant)
        WHERE t.tenant IS NOT NULL AND v.replaces IS NULL
          AND NOT EXISTS (SELECT FROM listener.adoption a WHERE a.view_id = v.id AND a.state IN ('filling', 'turned back'))
        -- A view has all that its own upstream has upstream, and one more.
        ORDER BY (SELECT count(*) FROM listener.view_upstream u WHERE u.view_id = v.id), v.name
    LOOP
        started := clock_timestamp();
        BEGIN
            -- Asked after what it reads was refreshed: what changed there is logged by then.
            IF key.tenant = '' AND NOT key.is_paused AND NOT listener.is_pending(key.id, '') THEN
                SELECT 'fresh', 0, 0, 0, r.refreshed_version INTO outcome, inserted, updated, deleted, version
                FROM (SELECT) AS nothing LEFT JOIN LATERAL listener.state_of(key.id, '') r ON true;
            ELSE
                SELECT r.outcome, r.inserted, r.updated, r.deleted, r.version
                INTO outcome, inserted, updated, deleted, version FROM listener.run_refresh(key.name, key.tenant) r;
                -- Before anything is called by a name that is not qualified: what the definition calls may have set a path.
                PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
            END IF;
        EXCEPTION WHEN OTHERS THEN
            GET STACKED DIAGNOSTICS failed_message = MESSAGE_TEXT, failed_detail = PG_EXCEPTION_DETAIL,
                                    failed_hint = PG_EXCEPTION_HINT;
            RAISE EXCEPTION '%: %', key.name, failed_message USING ERRCODE = SQLSTATE,
                DETAIL = concat_ws(' ', nullif(failed_detail, ''), 'What this call refreshed before it is taken back.'),
                HINT = coalesce(nullif(failed_hint, ''),
                                'Each other view can be refreshed by itself: SELECT * FROM listener.refresh(view, tenant_id).');
        END;
        IF outcome IN ('refreshed', 'fresh') THEN
            shown := shown || key.id;
        END IF;
        view_name := key.name;
        duration := clock_timestamp() - started;
        RETURN NEXT;
    END LOOP;
    -- What the refresh of a target logged would have each view that reads it refreshed once more, and for nothing: these
    -- were computed after it, and the lock of its key, which is held to the end of this transaction, lets nobody write these
    -- rows in between. Only what is of this tenant, and where every reader is shown; a change of the application's stays.
    DELETE FROM listener.change_log l
    USING listener.managed_view u, listener.source s
    WHERE l.xid = pg_current_xact_id() AND l.source_id = s.id
      AND u.id = ANY (shown) AND u.strategy = 'tenant'
      AND l.tenant = listener.canonical_or_null(run_refresh_all.tenant_id, u.tenant_type)
      AND s.relid = to_regclass(format('%I.%I', u.target_schema, u.target_name))
      AND s.tenant_column = u.tenant_column AND s.through_id IS NULL
      AND NOT EXISTS (SELECT FROM listener.source o WHERE o.through_id = s.id)
      AND NOT EXISTS (
          SELECT FROM listener.view_source w JOIN listener.managed_view d ON d.id = w.view_id
          WHERE w.source_id = s.id
            AND (d.id <> ALL (shown) OR (d.strategy = 'tenant' AND d.tenant_type <> u.tenant_type)));
END
$function$;

-- refresh_all_for_tenant(tenant_id): refreshes each view for this tenant, in the transaction of the caller; a view that
-- others read before those that read it, so that they compute with its new rows. One row per view, in this order.
--   outcome    of a view by tenant: as refresh() says; it is computed in any case
--              of a view without tenants, which is one key for everybody: 'fresh', and nothing is computed, where no change
--              is known that it does not show; else as refresh() says
--   duration   how long this view took
-- Left out: a view whose tenants are of a type that this one cannot be, and one that does not have its place yet, since it
-- is still being filled for an adoption or an alteration.
-- Everything or nothing: an error of one view takes back what was refreshed before it. It is raised with the SQLSTATE that it
-- has, and names the view.
-- Raises LSN02 where this can be no tenant of any view, and what refresh() raises.
CREATE OR REPLACE FUNCTION listener.refresh_all_for_tenant(tenant_id text)
RETURNS TABLE (
    view_name text, outcome text, inserted bigint, updated bigint, deleted bigint, version bigint, duration interval)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER AS $function$
DECLARE
    -- Qualified like all here: it is read with the caller's path.
    callers_path pg_catalog.text := pg_catalog.current_setting('search_path');
BEGIN
    RETURN QUERY SELECT r.* FROM listener.run_refresh_all(tenant_id) r;
    PERFORM listener.restore_path(callers_path);
END
$function$;

-- The same for a tenant that is passed as uuid or bigint: PostgreSQL casts neither to text by itself.
CREATE OR REPLACE FUNCTION listener.refresh_all_for_tenant(tenant_id uuid)
RETURNS TABLE (
    view_name text, outcome text, inserted bigint, updated bigint, deleted bigint, version bigint, duration interval)
LANGUAGE sql VOLATILE AS $function$ SELECT * FROM listener.refresh_all_for_tenant(tenant_id::pg_catalog.text) $function$;
CREATE OR REPLACE FUNCTION listener.refresh_all_for_tenant(tenant_id bigint)
RETURNS TABLE (
    view_name text, outcome text, inserted bigint, updated bigint, deleted bigint, version bigint, duration interval)
LANGUAGE sql VOLATILE AS $function$ SELECT * FROM listener.refresh_all_for_tenant(tenant_id::pg_catalog.text) $function$;
