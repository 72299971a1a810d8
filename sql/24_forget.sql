-- Forget: what is kept of a tenant that is no more.

-- tenant_presence(view, tenant): where a tenant of a view is still: 'its tenants query', 'what it reads'; NULL where it
-- is gone from both. Raises whatever the definition or the tenants query raises.
CREATE OR REPLACE FUNCTION listener.tenant_presence(view listener.managed_view, tenant text) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    -- The tenants query runs with no tenant set, the definition for this tenant.
    SELECT CASE WHEN EXISTS (
        SELECT FROM jsonb_array_elements_text(listener.evaluate(
            view, format('SELECT COALESCE(pg_catalog.jsonb_agg(t.tenant), ''[]''::pg_catalog.jsonb) FROM listener.%I t',
                         'tenants_' || view.id), '')) AS l (tenant)
        WHERE listener.canonical_or_null(l.tenant, view.tenant_type) = $2) THEN 'its tenants query'
    WHEN listener.evaluate(view, format('SELECT pg_catalog.to_jsonb(EXISTS (SELECT FROM listener.%I WHERE %s))',
                                        'definition_' || view.id, listener.is_of_tenant(view, '')), $2)::boolean
    THEN 'what it reads' END
$function$;

-- spellings(tenant, tenant_type): the tenant as a view of this type has it, none where it can be no tenant of it. A text
-- that is a uuid is looked for as it was given, and as the type uuid writes it.
CREATE OR REPLACE FUNCTION listener.spellings(tenant text, tenant_type text) RETURNS SETOF text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT DISTINCT s.spelled
    FROM (VALUES (listener.canonical_or_null(tenant, tenant_type)),
                 (CASE WHEN tenant_type = 'text' THEN listener.canonical_or_null(tenant, 'uuid') END)) AS s (spelled)
    WHERE s.spelled IS NOT NULL
$function$;

-- without_tenant(message, tenant): a message of some other tenant with this one struck out, where the tenant is a uuid or
-- a name of eight characters or more: a shorter one, or a number, is part of too many words.
CREATE OR REPLACE FUNCTION listener.without_tenant(message text, tenant text) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT CASE WHEN listener.canonical_or_null(tenant, 'uuid') IS NOT NULL
                THEN regexp_replace(message, listener.canonical_or_null(tenant, 'uuid'), '(forgotten)', 'gi')
                WHEN length(tenant) >= 8 AND listener.canonical_or_null(tenant, 'bigint') IS NULL
                THEN replace(message, tenant, '(forgotten)')
                ELSE message END
$function$;

-- keys_of(tenant, view_id): the keys that a tenant has, or may have, in the views by tenant, or in one: first those of views
-- that others read.
CREATE OR REPLACE FUNCTION listener.keys_of(tenant text, view_id integer)
RETURNS TABLE (view_id integer, view_name text, spelled text)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT v.id, v.name, s.spelled
    FROM listener.managed_view v CROSS JOIN LATERAL listener.spellings($1, v.tenant_type) AS s (spelled)
    WHERE v.strategy = 'tenant' AND ($2 IS NULL OR v.id = $2)
    ORDER BY (SELECT count(*) FROM listener.view_upstream u WHERE u.view_id = v.id), v.id, s.spelled
$function$;

-- forget(tenant, view): deletes what is kept of a tenant that is no more, in every view by tenant, or in one: its rows
-- of the target, its keys and what came of their refreshes, its dead letters, its rows of the logs; and strikes it out
-- of the messages of others.
--   view_name, rows_deleted: rows of the target; records: of the tables of this schema. One row per view; in the end one
--   without a name, for what belongs to no view
-- It waits for refreshes of these keys and for the drain, and keeps them out to the end of its transaction, so that none of
-- them writes the tenant down again. A service that still holds the key refreshes it once more: it finds nothing, and of
-- a key that nobody knows a refresh leaves no record.
-- Raises LSN02 for what can be no tenant of the views, LSN03 where the tenant is still there, since it would come back with
-- the next refresh, or where a refresh does not end within 10 s.
CREATE OR REPLACE FUNCTION listener.forget(tenant text, view text DEFAULT NULL)
RETURNS TABLE (view_name text, rows_deleted bigint, records bigint)
LANGUAGE plpgsql AS $function$
DECLARE
    callers_path pg_catalog.text := pg_catalog.current_setting('search_path');
BEGIN
    RETURN QUERY SELECT f.view_name, f.rows_deleted, f.records FROM listener.forget_keys(tenant, view) f;
    PERFORM listener.restore_path(callers_path);
END
$function$;

-- forget_keys(tenant, view): what forget() does.
CREATE OR REPLACE FUNCTION listener.forget_keys(tenant text, view text)
RETURNS TABLE (view_name text, rows_deleted bigint, records bigint)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
#variable_conflict use_column
DECLARE
    callers_tenant text := current_setting('app.current_tenant_id', true);
    previous_role text := listener.become_owner();
    only_view listener.managed_view;
    key record;
    present text;
    custom jsonb;
    deleted bigint;
    counted bigint;
    everywhere text[];
BEGIN
    IF forget_keys.view IS NOT NULL THEN
        only_view := listener.find_view(forget_keys.view);
        IF only_view.tenant_column IS NULL THEN
            RAISE EXCEPTION '% has no tenants', only_view.name USING ERRCODE = 'LSN02',
                HINT = 'What it holds is what it reads: delete the tenant there.';
        END IF;
    END IF;
    IF coalesce(forget_keys.tenant, '') = '' OR NOT EXISTS (SELECT FROM listener.keys_of(forget_keys.tenant, only_view.id)) THEN
        RAISE EXCEPTION '% can be no tenant of %', coalesce(quote_literal(left(forget_keys.tenant, 100)), 'NULL'),
            coalesce(only_view.name, 'any view') USING ERRCODE = 'LSN02';
    END IF;
    PERFORM listener.lock_keys(forget_keys.tenant, only_view.id);
    rows_deleted := 0;
    records := 0;
    FOR key IN
        SELECT k.*, lead(k.view_id) OVER () IS DISTINCT FROM k.view_id AS is_last
            FROM listener.keys_of(forget_keys.tenant, only_view.id) k
    LOOP
        present := listener.tenant_presence(listener.find_view(key.view_name), key.spelled);
        IF present IS NOT NULL THEN
            RAISE EXCEPTION 'tenant % is still there: % has it by %', forget_keys.tenant, key.view_name, present
                USING ERRCODE = 'LSN03', HINT = 'It would come back with the next refresh: delete it there first.';
        END IF;
        view_name := key.view_name;
        -- The definition has no row of it, so the statement of a refresh deletes the rows of the target, also of a
        -- paused view.
        PERFORM set_config('app.current_tenant_id', key.spelled, true), set_config('app.execution_context', 'worker', true);
        custom := listener.use_settings(listener.custom_settings(listener.find_view(key.view_name)));
        EXECUTE format('SELECT d.column3 FROM listener_private.%I($1) d', 'difference_' || key.view_id) INTO deleted USING key.spelled;
        PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true),
            pg_catalog.set_config('app.execution_context', '', true);
        PERFORM listener.give_back_tenant(callers_tenant), listener.use_settings(custom);
        rows_deleted := rows_deleted + deleted;
        DELETE FROM listener.refresh_state r WHERE r.view_id = key.view_id AND r.tenant = key.spelled;
        GET DIAGNOSTICS counted = ROW_COUNT;
        records := records + counted;
        DELETE FROM listener.dirty_key d WHERE d.view_id = key.view_id AND d.tenant = key.spelled;
        GET DIAGNOSTICS counted = ROW_COUNT;
        records := records + counted;
        DELETE FROM listener.dead_letter l WHERE l.view_id = key.view_id AND l.tenant = key.spelled;
        GET DIAGNOSTICS counted = ROW_COUNT;
        records := records + counted;
        DELETE FROM listener.change_log c WHERE c.view_id = key.view_id AND c.tenant = key.spelled;
        GET DIAGNOSTICS counted = ROW_COUNT;
        records := records + counted;
        IF key.is_last THEN
            RETURN NEXT;
            rows_deleted := 0;
            records := 0;
        END IF;
    END LOOP;
    IF only_view.id IS NULL THEN
        -- Last: views over those whose rows were just deleted have logged that. However it is spelled: a table may write a
        -- tenant in another form than the views that read it.
        everywhere := ARRAY(
            SELECT t.tenant
            FROM (SELECT c.tenant FROM listener.change_log c UNION SELECT m.tenant FROM listener.moved_tenant m
                  UNION SELECT l.tenant FROM listener.dead_letter l
                  UNION SELECT l.arguments OPERATOR(pg_catalog.->>) 'tenant_id' FROM listener.dead_letter l) t
            WHERE t.tenant <> '' AND EXISTS (
                SELECT FROM listener.managed_view v CROSS JOIN LATERAL listener.spellings(forget_keys.tenant, v.tenant_type) s (spelled)
                WHERE s.spelled = listener.canonical_or_null(t.tenant, v.tenant_type)));
        view_name := NULL;
        DELETE FROM listener.change_log c WHERE c.tenant = ANY (everywhere);
        GET DIAGNOSTICS records = ROW_COUNT;
        DELETE FROM listener.moved_tenant m WHERE m.tenant = ANY (everywhere);
        GET DIAGNOSTICS counted = ROW_COUNT;
        records := records + counted;
        DELETE FROM listener.dead_letter l
        WHERE l.tenant = ANY (everywhere) OR l.arguments OPERATOR(pg_catalog.->>) 'tenant_id' = ANY (everywhere);
        GET DIAGNOSTICS counted = ROW_COUNT;
        records := records + counted;
        UPDATE listener.dead_letter l SET
            error_message = listener.without_tenant(l.error_message, forget_keys.tenant),
            traceback = listener.without_tenant(l.traceback, forget_keys.tenant)
        WHERE concat(l.error_message, l.traceback)
              <> listener.without_tenant(concat(l.error_message, l.traceback), forget_keys.tenant);
        GET DIAGNOSTICS counted = ROW_COUNT;
        records := records + counted;
        UPDATE listener.refresh_state r SET last_error = listener.without_tenant(r.last_error, forget_keys.tenant)
        WHERE r.last_error <> listener.without_tenant(r.last_error, forget_keys.tenant);
        GET DIAGNOSTICS counted = ROW_COUNT;
        records := records + counted;
        RETURN NEXT;
    END IF;
    PERFORM set_config('role', previous_role, true);
END
$function$;

-- lock_keys(tenant, view_id): takes the locks of a tenant's keys, of "all tenants" of their views, which writes them down,
-- of the purge, and last of the drain, which nobody is to wait for long. None of those who hold one waits for another.
-- Raises LSN03 where one is not had within 10 s.
CREATE OR REPLACE FUNCTION listener.lock_keys(tenant text, view_id integer) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET lock_timeout = '10s' AS $function$
DECLARE
    wanted record;
BEGIN
    FOR wanted IN
        SELECT DISTINCT k.view_id, k.view_name, t.tenant, l.key
        FROM listener.keys_of($1, $2) k CROSS JOIN LATERAL (VALUES (''), (k.spelled)) AS t (tenant)
        CROSS JOIN LATERAL (SELECT listener.lock_key(k.view_id, t.tenant)) AS l (key)
        ORDER BY k.view_id, t.tenant
    LOOP
        PERFORM pg_advisory_xact_lock(wanted.key);
    END LOOP;
    wanted := NULL;
    PERFORM pg_advisory_xact_lock(listener.lock_key(0, 'purge'));
    PERFORM pg_advisory_xact_lock(listener.lock_key(0, ''));
EXCEPTION WHEN lock_not_available THEN
    IF wanted IS NULL THEN
        RAISE EXCEPTION 'the drain or the purge has not ended within 10 s' USING ERRCODE = 'LSN03',
            HINT = 'See: listener explain';
    END IF;
    RAISE EXCEPTION 'a refresh of % has not ended within 10 s: backend % is at it', wanted.view_name,
        (SELECT h.pid FROM listener.lock_holder(wanted.key) h) USING ERRCODE = 'LSN03', HINT = 'See: listener explain';
END
$function$;
