-- Refresh: lock -> compute -> record, one transaction.

-- The two steps of a refresh that touch the state, and is_shown(). Their plans are kept: planning them anew took longer
-- than running them. enable_seqscan is off so that a plan made while the tables were small is the right one later.

-- known_version(view_id, tenant): the dirty version of the key, that is, the newest drain that found it changed, 0 where
-- none ever did; and the correlation id of that drain. What is shown already is looked up first: dirty_key is read above
-- it, where nothing was deleted yet, and so crosses no dead rows. was_quick: its last refresh succeeded, and took no
-- longer than 20 ms.
CREATE OR REPLACE FUNCTION listener.known_version(
    view_id integer, tenant text, OUT version bigint, OUT correlation_id text, OUT was_quick boolean)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
-- Both read all entries of a key where the index's order would give the newest at once.
SET enable_bitmapscan = off SET enable_sort = off AS $function$
#variable_conflict use_column
DECLARE
    shown record;
BEGIN
    SELECT r.refreshed_version AS version, r.correlation_id, r.duration <= '20 ms' AND r.failures = 0 AS quick INTO shown
    FROM listener.state_of(known_version.view_id, known_version.tenant) r;
    was_quick := coalesce(shown.quick, false);
    SELECT k.version, k.correlation_id INTO version, correlation_id
    FROM listener.dirty_key k
    WHERE k.view_id = known_version.view_id AND k.tenant = known_version.tenant
      AND k.version > coalesce(shown.version, -1)
    ORDER BY k.version DESC LIMIT 1;
    IF version IS NULL THEN
        version := greatest(shown.version, 0);
        correlation_id := shown.correlation_id;
    END IF;
END
$function$;

-- record_refresh(...): the key is as fresh as `version`; its failures are over, its dead letter is closed. The caller
-- holds the key's lock. Returns how long it took.
CREATE OR REPLACE FUNCTION listener.record_refresh(
    view_id integer, tenant text, version bigint, started timestamptz, inserted bigint, updated bigint, deleted bigint,
    correlation_id text) RETURNS interval
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan SET enable_seqscan = off AS $function$
#variable_conflict use_column
DECLARE
    now_at timestamptz := clock_timestamp();
BEGIN
    UPDATE listener.refresh_state r SET
        refreshed_version = record_refresh.version, started_at = started, refreshed_at = now_at,
        duration = now_at - started, inserted = record_refresh.inserted, updated = record_refresh.updated,
        deleted = record_refresh.deleted, correlation_id = record_refresh.correlation_id,
        failures = 0, failed_at = NULL, retry_at = NULL, last_error = NULL
    WHERE r.ctid = (SELECT s.ctid FROM listener.refresh_state s
                    WHERE s.view_id = record_refresh.view_id AND s.tenant = record_refresh.tenant
                    ORDER BY s.refreshed_at DESC NULLS LAST LIMIT 1);
    -- Of a key that no drain found, with no rows and no record before, none is kept: the tenant may be forgotten, and
    -- somebody held its key.
    IF NOT FOUND AND record_refresh.version + record_refresh.inserted + record_refresh.updated + record_refresh.deleted > 0 THEN
        INSERT INTO listener.refresh_state
            (view_id, tenant, refreshed_version, started_at, refreshed_at, duration, inserted, updated, deleted,
             correlation_id)
        VALUES (record_refresh.view_id, record_refresh.tenant, record_refresh.version, started, now_at,
                now_at - started, record_refresh.inserted, record_refresh.updated, record_refresh.deleted,
                record_refresh.correlation_id);
    END IF;
    UPDATE listener.dead_letter d SET status = 'resolved', closed_at = now_at
    WHERE d.view_id = record_refresh.view_id AND d.tenant = record_refresh.tenant AND d.status = 'open';
    RETURN now_at - started;
END
$function$;

-- run_refresh(view, tenant_id): what refresh() does; see there.
--
-- Each statement has a snapshot of its own, and their order is the proof: the version is read before the rows are
-- computed, so a change that was drained earlier is visible to the computation, and one that is drained later raises
-- the version again. difference_<id> computes the rows, as the view's compute role and under the view's settings, so
-- the result never depends on the caller, and row-level security binds it. This function has the rights of the owner of
-- the schema; so nothing else in it touches a source or a target. The app.* settings are restored by hand: only a
-- superuser may put a parameter that no extension defines into a SET clause. An error restores them with the
-- transaction.
CREATE OR REPLACE FUNCTION listener.run_refresh(
    view text, tenant_id text,
    OUT outcome text, OUT inserted bigint, OUT updated bigint, OUT deleted bigint, OUT version bigint, OUT duration interval)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = auto
SET jit = off
AS $function$
#variable_conflict use_column
DECLARE
    managed listener.managed_view := listener.find_view(view);
    tenant_key text := listener.canonical_tenant(tenant_id, managed.tenant_type);
    started timestamptz := clock_timestamp();
    batch text;
    was_quick boolean;
    twice text;
    difference text := format('SELECT * FROM listener_private.%I($1)', 'difference_' || managed.id);
    callers_tenant text := current_setting('app.current_tenant_id', true);
    callers_context text := current_setting('app.execution_context', true);
    custom jsonb := listener.custom_settings(managed);
    temporary oid[] := listener.temporary_objects();
    -- In the service's own sessions such triggers run at once: see generate_difference().
    waiting jsonb;
    deferred jsonb := CASE WHEN session_user <> (SELECT i.service_role FROM listener.installation i)
                           THEN listener.deferred_writes() END;
BEGIN
    PERFORM listener.check_caller('listener.refresh()');
    IF managed.paused_at IS NOT NULL THEN
        outcome := 'paused';
        RETURN;
    END IF;
    IF NOT pg_try_advisory_xact_lock(listener.lock_key(managed.id, tenant_key)) THEN
        outcome := 'busy';
        RETURN;
    END IF;
    PERFORM set_config('app.current_tenant_id', tenant_key, true), set_config('app.execution_context', 'worker', true);
    SELECT k.version, k.correlation_id, k.was_quick INTO version, batch, was_quick
    FROM listener.known_version(managed.id, tenant_key) k;
    -- A kept plan saves most of a small refresh. It may be wrong for a tenant unlike the others, or have been made when
    -- the tables were small: a key whose last refresh was not quick is planned anew, which then costs next to nothing.
    -- Not before: the expressions here would be planned anew as well, each time.
    IF NOT was_quick THEN
        PERFORM set_config('plan_cache_mode', 'force_custom_plan', true);
    END IF;
    IF custom <> '{}' THEN
        custom := listener.use_settings(custom);
    END IF;

    BEGIN
        EXECUTE difference INTO inserted, updated, deleted, twice USING tenant_key;
        -- What waited has run, and may have left more to wait.
        IF deferred IS NULL AND managed.compute_role IS NOT NULL THEN
            FOR attempt IN 1..3 LOOP
                waiting := listener.deferred_writes();
                deferred := waiting;
                EXIT WHEN waiting = '{}';
                EXECUTE difference USING NULL::text;
                waiting := listener.deferred_writes();
                EXIT WHEN waiting = deferred;
            END LOOP;
        END IF;
    EXCEPTION WHEN OTHERS OR query_canceled OR assert_failure THEN
        -- The rollback takes settings and temporary objects with it.
        PERFORM listener.leave_nothing(NULL);
        RAISE;
    END;
    -- Before anything is called by a name that is not qualified: what the definition calls may have set a path.
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true),
            pg_catalog.set_config('plan_cache_mode', 'auto', true),
            pg_catalog.set_config('app.execution_context', callers_context, true);
    PERFORM listener.leave_nothing(temporary), listener.give_back_tenant(callers_tenant);
    IF custom <> '{}' THEN
        PERFORM listener.use_settings(custom);
    END IF;
    IF deferred IS NOT NULL AND deferred <> listener.deferred_writes() THEN
        RAISE EXCEPTION 'refreshing % fires a trigger that waits for the end of the transaction, where it would run with the rights of %',
                managed.name, session_user
            USING ERRCODE = 'LSN04', HINT = 'Let the service refresh it, or make the trigger NOT DEFERRABLE.';
    END IF;
    IF twice IS NOT NULL THEN
        RAISE EXCEPTION '% returns two rows with one key: %', managed.name, twice
            USING ERRCODE = 'LSN04', HINT = 'Its key columns are ' || array_to_string(managed.key_columns, ', ')
                || ': group by them, or register the view with the columns that tell these rows apart.';
    END IF;
    duration := listener.record_refresh(managed.id, tenant_key, version, started, inserted, updated, deleted, batch);
    outcome := 'refreshed';
END
$function$;

-- restore_path(callers_path): gives a session its search_path back after what a definition calls has run in it. Such
-- code can set a path for the session, and a SET clause of a function undoes its own setting, not that one: the next
-- statement would take its operators from the schema of a team. An administrator's path is set in any case: such code
-- can hide what it set below a setting that ends with the transaction. To be called by a function without a SET clause
-- for the path.
CREATE OR REPLACE FUNCTION listener.restore_path(callers_path text) RETURNS void
LANGUAGE plpgsql VOLATILE AS $function$
BEGIN
    IF pg_catalog.current_setting('search_path') OPERATOR(pg_catalog.<>) callers_path OR listener.is_administrator() THEN
        PERFORM pg_catalog.set_config('search_path', callers_path, false);
    END IF;
END
$function$;

-- refresh(view, tenant_id): makes one tenant's rows of the target equal to its definition.
--   outcome   'refreshed'; 'busy': another session is refreshing this key, ask again; 'paused': nothing was done
--   inserted, updated, deleted: rows of the target. version: the dirty version that is now reflected. duration: how
--   long it took, as refresh_state keeps it; NULL where nothing was done
-- Reads the definition's sources and dirty_key; writes the target, refresh_state, and closes the key's dead letter.
-- Raises LSN01, LSN02, LSN04, LSN05, LSN06, and whatever the definition raises.
CREATE OR REPLACE FUNCTION listener.refresh(
    view text, tenant_id text,
    OUT outcome text, OUT inserted bigint, OUT updated bigint, OUT deleted bigint, OUT version bigint, OUT duration interval)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER AS $function$
#variable_conflict use_column
DECLARE
    -- Qualified like all here: it is read with the caller's path.
    callers_path pg_catalog.text := pg_catalog.current_setting('search_path');
BEGIN
    SELECT r.* INTO outcome, inserted, updated, deleted, version, duration FROM listener.run_refresh(view, tenant_id) r;
    PERFORM listener.restore_path(callers_path);
END
$function$;

-- The same for a tenant that is passed as uuid or bigint: PostgreSQL casts neither to text by itself.
CREATE OR REPLACE FUNCTION listener.refresh(
    view text, tenant_id uuid,
    OUT outcome text, OUT inserted bigint, OUT updated bigint, OUT deleted bigint, OUT version bigint, OUT duration interval)
LANGUAGE sql VOLATILE AS $function$ SELECT * FROM listener.refresh(view, tenant_id::pg_catalog.text) $function$;
CREATE OR REPLACE FUNCTION listener.refresh(
    view text, tenant_id bigint,
    OUT outcome text, OUT inserted bigint, OUT updated bigint, OUT deleted bigint, OUT version bigint, OUT duration interval)
LANGUAGE sql VOLATILE AS $function$ SELECT * FROM listener.refresh(view, tenant_id::pg_catalog.text) $function$;

-- is_shown(view_id, tenant, version): whether a refresh has shown this version of the key, and none failed since. Apart
-- from refresh_dirty(), which must not plan a definition with these settings.
CREATE OR REPLACE FUNCTION listener.is_shown(view_id integer, tenant text, version bigint) RETURNS boolean
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
SET enable_bitmapscan = off SET enable_sort = off AS $function$
BEGIN
    RETURN EXISTS (SELECT FROM listener.state_of(is_shown.view_id, is_shown.tenant) r
                   WHERE r.refreshed_version >= is_shown.version AND r.failures = 0);
END
$function$;

-- refresh_key(view, tenant): what is done for a key, dirty or not: refresh(), or expand() where it stands for all tenants
-- of a view that has some (inserted: how many).
CREATE OR REPLACE FUNCTION listener.refresh_key(
    view text, tenant text,
    OUT outcome text, OUT inserted bigint, OUT updated bigint, OUT deleted bigint, OUT version bigint, OUT duration interval)
LANGUAGE plpgsql VOLATILE AS $function$
#variable_conflict use_column
BEGIN
    IF tenant OPERATOR(pg_catalog.=) '' AND (listener.find_view(view)).strategy OPERATOR(pg_catalog.=) 'tenant' THEN
        SELECT e.outcome, e.tenants INTO outcome, inserted FROM listener.expand(view) e;
    ELSE
        SELECT r.* INTO outcome, inserted, updated, deleted, version, duration FROM listener.refresh(view, tenant) r;
    END IF;
END
$function$;

-- refresh_dirty(view_id, view, tenant, version): what a replica does for a key that it heard of: refresh_key();
-- and nothing where another replica has shown this version meanwhile: 'fresh'.
CREATE OR REPLACE FUNCTION listener.refresh_dirty(
    view_id integer, view text, tenant text, INOUT version bigint,
    OUT outcome text, OUT inserted bigint, OUT updated bigint, OUT deleted bigint, OUT duration interval)
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS $function$
#variable_conflict use_column
BEGIN
    IF listener.is_shown(view_id, tenant, version) THEN
        outcome := 'fresh';
    ELSIF tenant = '' AND (listener.find_view(view)).strategy = 'tenant' THEN
        SELECT e.outcome, e.tenants INTO outcome, inserted FROM listener.expand(view) e;
    ELSE
        SELECT r.outcome, r.inserted, r.updated, r.deleted, r.version, r.duration
        INTO outcome, inserted, updated, deleted, version, duration FROM listener.run_refresh(view, tenant) r;
    END IF;
END
$function$;

-- refresh_materialized_view_for_tenant(tenant_id, view_name): refresh() under the name, and with the order of
-- arguments, that callers of a home-made refresh function expect. Returns the outcome.
CREATE OR REPLACE FUNCTION listener.refresh_materialized_view_for_tenant(tenant_id text, view_name text) RETURNS text
LANGUAGE sql VOLATILE AS $function$ SELECT outcome FROM listener.refresh(view_name, tenant_id) $function$;
CREATE OR REPLACE FUNCTION listener.refresh_materialized_view_for_tenant(tenant_id uuid, view_name text) RETURNS text
LANGUAGE sql VOLATILE AS $function$ SELECT outcome FROM listener.refresh(view_name, tenant_id::pg_catalog.text) $function$;
CREATE OR REPLACE FUNCTION listener.refresh_materialized_view_for_tenant(tenant_id bigint, view_name text) RETURNS text
LANGUAGE sql VOLATILE AS $function$ SELECT outcome FROM listener.refresh(view_name, tenant_id::pg_catalog.text) $function$;

-- tenants(view): the tenants of a view as text: what its tenants query lists, the keys, and the target's own. Those
-- that can be no tenant (NULL, malformed, over 1 kB) are left out: the drain refuses them where they are written. '' alone
-- where the view has none. The query and the target are read for no tenant: a target under row-level security is shown
-- whole to who works for none.
CREATE OR REPLACE FUNCTION listener.tenants(view text) RETURNS SETOF text
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off AS $function$
DECLARE
    managed listener.managed_view := listener.find_view(view);
BEGIN
    IF managed.tenant_column IS NULL THEN
        RETURN NEXT '';
        RETURN;
    END IF;
    RETURN QUERY
        SELECT c.tenant
        FROM (SELECT l.tenant
              FROM jsonb_array_elements_text(listener.evaluate(managed, listener.listing_statement(managed), '')) AS l (tenant)
              UNION SELECT k.tenant FROM listener.dirty_key k WHERE k.view_id = managed.id
              UNION SELECT r.tenant FROM listener.refresh_state r WHERE r.view_id = managed.id) AS known (tenant)
        CROSS JOIN LATERAL listener.canonical_or_null(known.tenant, managed.tenant_type) AS c (tenant)
        WHERE c.tenant IS NOT NULL GROUP BY c.tenant;
END
$function$;

-- listing_statement(view): lists the tenants that the tenants query and the target have, as one jsonb array.
CREATE OR REPLACE FUNCTION listener.listing_statement(view listener.managed_view) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT format('SELECT COALESCE(pg_catalog.jsonb_agg(known.tenant), ''[]''::pg_catalog.jsonb)
                   FROM (SELECT t.tenant FROM listener.%I t UNION SELECT t.%I::pg_catalog.text FROM %I.%I t) AS known (tenant)',
                  'tenants_' || view.id, view.tenant_column, view.target_schema, view.target_name)
$function$;

-- expand(view): writes "all tenants" out: logs a change of the view for each of its tenants. It is the refresh of the
-- key of tenant '', with the same proof: the version is read before the tenants are listed.
--   outcome 'expanded', with the number of tenants; 'busy'; 'paused'; where the view has no tenants, that of refresh()
-- Reads the tenants query and dirty_key; writes change_log and refresh_state.
CREATE OR REPLACE FUNCTION listener.expand(view text, OUT outcome text, OUT tenants bigint)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_custom_plan SET jit = off AS $function$
DECLARE
    managed listener.managed_view := listener.find_view(view);
    started timestamptz := clock_timestamp();
    known record;
    dirty record;
BEGIN
    PERFORM listener.check_caller('listener.expand()');
    IF managed.tenant_column IS NULL THEN
        -- A service of an older release asks for this key so.
        SELECT r.outcome, r.inserted INTO outcome, tenants FROM listener.refresh(managed.name, '') r;
        RETURN;
    END IF;
    IF managed.paused_at IS NOT NULL THEN
        outcome := 'paused';
        RETURN;
    END IF;
    IF NOT pg_try_advisory_xact_lock(listener.lock_key(managed.id, '')) THEN
        outcome := 'busy';
        RETURN;
    END IF;
    SELECT k.* INTO known FROM listener.known_version(managed.id, '') k;
    SELECT min(k.first_change_at) AS since, max(k.app_correlation_id) AS app_correlation_id INTO dirty
    FROM listener.dirty_key k LEFT JOIN LATERAL listener.state_of(k.view_id, k.tenant) r ON true
    WHERE k.view_id = managed.id AND k.tenant = '' AND k.version > coalesce(r.refreshed_version, -1);
    INSERT INTO listener.change_log (xid, changed_at, view_id, tenant, app_correlation_id)
    SELECT pg_current_xact_id(), coalesce(dirty.since, started), managed.id, t.tenant, dirty.app_correlation_id
    FROM listener.tenants(managed.name) AS t (tenant);
    GET DIAGNOSTICS tenants = ROW_COUNT;
    PERFORM listener.record_refresh(managed.id, '', known.version, started, tenants, 0, 0, known.correlation_id);
    outcome := 'expanded';
END
$function$;
