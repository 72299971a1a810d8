-- Refreshes every view of one tenant: for an application that has written something, and wants to read it in all of
-- them.

-- run_refresh_all(tenant_id): what refresh_all_for_tenant() does; see there.
CREATE OR REPLACE FUNCTION listener.run_refresh_all(tenant_id text)
RETURNS TABLE (
    view_name text, outcome text, inserted bigint, updated bigint, deleted bigint, version bigint, duration interval)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
#variable_conflict use_column
DECLARE
    key record;
    started timestamptz;
    shown integer[] := '{}'::integer[];
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
        -- The more views are upstream of a view, the later it comes: it has at least one more than each of these.
        ORDER BY (SELECT count(*) FROM listener.view_upstream u WHERE u.view_id = v.id), v.name
    LOOP
        started := clock_timestamp();
        BEGIN
            -- Asked here, after what it reads was refreshed: what changed there is logged by now.
            IF key.tenant = '' AND NOT key.is_paused AND NOT listener.is_pending(key.id, '') THEN
                SELECT 'fresh', 0, 0, 0, r.refreshed_version INTO outcome, inserted, updated, deleted, version
                FROM (SELECT) AS nothing LEFT JOIN LATERAL listener.state_of(key.id, '') r ON true;
            ELSE
                SELECT r.outcome, r.inserted, r.updated, r.deleted, r.version
                INTO outcome, inserted, updated, deleted, version FROM listener.run_refresh(key.name, key.tenant) r;
                -- Before anything is called by a name that is not qualified: what the definition calls may have set a
                -- path.
                PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
            END IF;
        EXCEPTION WHEN OTHERS THEN
            GET STACKED DIAGNOSTICS failed_message = MESSAGE_TEXT, failed_detail = PG_EXCEPTION_DETAIL,
                                    failed_hint = PG_EXCEPTION_HINT;
            RAISE EXCEPTION '%: %', key.name, failed_message USING ERRCODE = SQLSTATE,
                DETAIL = concat_ws(' ', nullif(failed_detail, ''), 'What this call refreshed before is undone.'),
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
    -- The refresh of a target logs a change, for which each view that reads the target would be refreshed once more.
    -- That is not needed: these views were computed after it, and the lock of its key, which is held to the end of this
    -- transaction, keeps others from writing these rows in between. So these log rows are deleted: those of this
    -- tenant, and only where every reader was refreshed. Those of the application stay.
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

-- refresh_all_for_tenant(tenant_id): refreshes each view for this tenant, in the transaction of the caller. A view
-- comes before the views that read it, so that they compute with its new rows. Returns one row per view, in this order.
--   outcome    of a view by tenant: as refresh() says; it is always computed
--              of a view without tenants: 'fresh' where it shows every known change, and then it is not computed; else
--              as refresh() says
--   duration   how long this view took
-- Left out are a view whose tenants have a type that this tenant cannot have, and one that is still being filled for an
-- adoption or an alteration.
-- Everything or nothing: an error of one view undoes what was refreshed before it. It keeps its SQLSTATE, and names the
-- view.
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
