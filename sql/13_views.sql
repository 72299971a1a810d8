-- Managed views: made, dropped, paused, resumed. All of these act as the role that owns the schema.

-- create_view(...): registers a query as a managed view.
--   name            the target table that dashboards read, with or without a schema; it must not exist yet
--   query           any SELECT that returns the tenant column; row-level security binds it, so it needs no predicate
--   key_columns     the columns that tell two rows of one tenant apart; they may be NULL. '{}': the whole row, and equal
--                   rows may stand there more than once
--   tenant_column   of type uuid, text, varchar, bigint or integer; NULL: the rows have no tenant, or read those of
--                   others, and the whole view is one key
--   tenants_query   one column: every tenant there is; required where a source has row-level security
--   depends_on      the tables that functions in the query read ('{}': none). A change to one of them refreshes every
--                   tenant, unless add_source() said whose its rows are
--   quiet_period, max_wait, edge   the window: default 250 ms, 2 s, leading
--   max_age         the longest time between two refreshes of a key: for queries that depend on the time
--   timezone        the time zone in which the query is read and computed
--   target_rls      row-level security on the target, by app.current_tenant_id
--   max_staleness   the age that a change may reach before the view shows it: docs/operations.md, ListenerTooStale
--   compute_role    the role that computes the query, so that its team's code reaches nothing of other teams; left out:
--                   that of the installation. check_compute_role() says what it must be
-- The query is read and computed under the settings that the session has now, DateStyle say: managed_view.settings
-- keeps them. A change to a table that a policy reads refreshes every tenant, unless the table's own policies keep
-- tenants apart. Makes listener.definition_<id> and listener.tenants_<id> (security_invoker views), the target and its
-- unique index, the capture triggers, and marks every tenant dirty: filling is refreshing. Everything or nothing.
-- Raises LSN03 with a hint where the query or the privileges do not allow it. Warns of what warn_of_definition() finds.
CREATE OR REPLACE FUNCTION listener.create_view(
    name text, query text, key_columns name[] DEFAULT '{}', tenant_column name DEFAULT 'tenant_id',
    tenants_query text DEFAULT NULL, depends_on regclass[] DEFAULT NULL,
    quiet_period interval DEFAULT NULL, max_wait interval DEFAULT NULL, edge text DEFAULT NULL,
    max_age interval DEFAULT NULL, timezone text DEFAULT 'UTC', target_rls boolean DEFAULT false,
    max_staleness interval DEFAULT NULL, compute_role name DEFAULT NULL)
RETURNS void
LANGUAGE plpgsql AS $function$
#variable_conflict use_variable
DECLARE
    previous_role text;
    callers_path text;
    callers_schema name;
    parts text[];
    view listener.managed_view;
    previous jsonb;
    definition regclass;
    source_ids integer[];
    keys name[];
BEGIN
    previous_role := listener.become_owner();
    -- The caller's path is for the queries alone. Anything else that was found through it, an operator say, would run
    -- with the rights of the owner. As it resolves now; pg_temp last, or a session's own table could stand in for a real one.
    callers_path := pg_catalog.current_setting('search_path');
    callers_schema := pg_catalog.current_schema();
    view.search_path := pg_catalog.array_to_string(
        ARRAY(SELECT pg_catalog.quote_ident(s.schema)
              FROM pg_catalog.unnest(pg_catalog.current_schemas(false)) WITH ORDINALITY AS s (schema, ord) ORDER BY s.ord)
        OPERATOR(pg_catalog.||) 'pg_temp'::pg_catalog.text, ', ');
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    PERFORM listener.lock_registration();
    view.settings := listener.session_settings() - 'TimeZone';
    previous := listener.use_settings(listener.own_settings());
    IF previous ->> 'standard_conforming_strings' <> 'on' AND pg_catalog.strpos(query || coalesce(tenants_query, ''), E'\\') > 0 THEN
        RAISE EXCEPTION 'standard_conforming_strings is off here, and the query of a view is read with it on: a backslash would change'
            USING ERRCODE = 'LSN03', HINT = 'SET standard_conforming_strings = on.';
    ELSIF name IS NULL OR query IS NULL OR key_columns IS NULL THEN
        RAISE EXCEPTION 'name, query and key_columns must be given' USING ERRCODE = 'LSN02';
    ELSIF tenant_column IS NULL AND (tenants_query IS NOT NULL OR target_rls) THEN
        RAISE EXCEPTION 'a view without a tenant column has neither a tenants_query nor target_rls' USING ERRCODE = 'LSN02';
    END IF;
    BEGIN
        parts := pg_catalog.parse_ident(name);
    EXCEPTION WHEN OTHERS THEN
        RAISE EXCEPTION 'view name % is no valid name: %', pg_catalog.quote_literal(name), SQLERRM USING ERRCODE = 'LSN02',
            HINT = 'Names that are not lower case or hold other characters go in double quotes.';
    END;
    IF pg_catalog.cardinality(parts) > 2 OR pg_catalog.octet_length(parts[pg_catalog.cardinality(parts)]) > 63 THEN
        RAISE EXCEPTION 'view name % must be name or schema.name, each at most 63 bytes', name USING ERRCODE = 'LSN02';
    END IF;
    view.target_name := parts[pg_catalog.cardinality(parts)];
    view.target_schema := CASE WHEN pg_catalog.cardinality(parts) = 2 THEN parts[1] ELSE callers_schema END;
    IF view.target_schema = 'listener' THEN
        RAISE EXCEPTION 'a target does not belong into the schema listener' USING ERRCODE = 'LSN03',
            HINT = 'Choose another schema: it goes when this one is uninstalled.';
    END IF;
    IF pg_catalog.to_regclass(pg_catalog.format('%I.%I', view.target_schema, view.target_name)) IS NOT NULL THEN
        RAISE EXCEPTION '%.% already exists', view.target_schema, view.target_name
            USING ERRCODE = 'LSN03', HINT = 'Choose another name, or drop it first.';
    END IF;
    view.name := listener.free_name(view.target_schema, view.target_name);
    view.query := query;
    view.strategy := CASE WHEN tenant_column IS NULL THEN 'whole' ELSE 'tenant' END;
    view.tenant_column := tenant_column;
    -- The tenant column belongs to the key: without it two tenants' rows could collide.
    SELECT pg_catalog.array_agg(k.key ORDER BY k.ord) INTO keys
    FROM (SELECT DISTINCT ON (u.key) u.key, u.ord
          FROM pg_catalog.unnest(pg_catalog.array_remove(ARRAY[tenant_column], NULL) || key_columns) WITH ORDINALITY AS u (key, ord)
          WHERE pg_catalog.cardinality(key_columns) > 0
          ORDER BY u.key, u.ord) k;
    view.key_columns := coalesce(keys, '{}');
    view.tenants_query := tenants_query;
    view.depends_on := listener.qualified_names(depends_on);
    view.quiet_period := coalesce(quiet_period, '250 ms');
    view.max_wait := coalesce(max_wait, greatest('2 s', view.quiet_period));
    view.edge := coalesce(edge, 'leading');
    view.max_age := max_age;
    view.time_zone := timezone;
    view.target_rls := target_rls;
    view.max_staleness := max_staleness;
    view.compute_role := compute_role;
    PERFORM listener.check_compute_role(compute_role);
    IF compute_role IS NOT NULL THEN
        PERFORM listener.check_lookups_apart(true, false);
    END IF;
    PERFORM listener.check_window(
        view.quiet_period, view.max_wait, view.edge, view.max_age, view.time_zone, view.max_staleness);

    view.id := pg_catalog.nextval(pg_catalog.pg_get_serial_sequence('listener.managed_view', 'id'));
    PERFORM listener.generate_computing(view);
    definition := listener.create_definition(view);
    view.tenant_type := listener.check_columns(definition, view.tenant_column, view.key_columns);
    SELECT r.source_ids, r.tenant_secured INTO source_ids, view.tenant_secured
    FROM listener.register_sources(definition, tenant_column, depends_on) r;
    PERFORM listener.check_readable(definition, listener.grantee_of(view));
    view.settings := view.settings || listener.check_session(view.name, ARRAY[
        definition, pg_catalog.to_regclass('listener.tenants_' || view.id)]);
    IF tenants_query IS NULL THEN
        PERFORM listener.create_default_tenants(view, source_ids);
    END IF;
    IF tenant_column IS NULL THEN
        PERFORM listener.check_whole(definition);
    END IF;
    PERFORM listener.create_target(view, definition);
    PERFORM listener.warn_of_definition(view, definition);
    PERFORM listener.register_view(view, source_ids);
    PERFORM listener.use_settings(previous), pg_catalog.set_config('role', previous_role, true),
            pg_catalog.set_config('search_path', callers_path, true);
END
$function$;

-- free_name(schema, relation): what the view is called: the short name where it is free, so that commands and metrics
-- read as people speak of it.
CREATE OR REPLACE FUNCTION listener.free_name(schema name, relation name) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT n.free
    FROM (VALUES (1, relation::text), (2, schema || '.' || relation), (3, format('%I.%I', schema, relation))) AS n (ord, free)
    WHERE NOT EXISTS (SELECT FROM listener.managed_view v WHERE v.name = n.free) ORDER BY n.ord LIMIT 1
$function$;

-- qualified_names(relations): with their schemas: they are read again under another search_path.
CREATE OR REPLACE FUNCTION listener.qualified_names(relations regclass[]) RETURNS text[]
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT CASE WHEN relations IS NOT NULL THEN ARRAY(
        SELECT format('%I.%I', n.nspname, c.relname) FROM unnest(relations) AS d (relid)
        JOIN pg_class c ON c.oid = d.relid JOIN pg_namespace n ON n.oid = c.relnamespace) END
$function$;

-- register_view(view, source_ids): the last steps for a view whose definition and target are there: it is managed from
-- here on, and filled.
CREATE OR REPLACE FUNCTION listener.register_view(view listener.managed_view, source_ids integer[]) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    PERFORM listener.generate_difference(view);
    view.fingerprint := listener.view_fingerprint(view);
    view.created_at := clock_timestamp();
    view.settings := coalesce(view.settings, '{}');
    INSERT INTO listener.managed_view OVERRIDING SYSTEM VALUE SELECT view.*;
    -- From here on the role that computes the view is known, and so which policies bind it.
    source_ids := source_ids || ARRAY(
        SELECT listener.register_source(p.relid::regclass, NULL)
        FROM listener.policy_sources(to_regclass('listener.definition_' || view.id), view.tenant_column) p
        WHERE NOT EXISTS (SELECT FROM listener.source s WHERE s.id = ANY (source_ids) AND s.relid = p.relid
                            AND (p.is_apart OR s.explicit OR s.tenant_column IS NULL OR view.tenant_column IS NULL)));
    UPDATE listener.managed_view v SET fingerprint = coalesce(listener.view_fingerprint(v), v.fingerprint) WHERE v.id = view.id;
    INSERT INTO listener.view_source
    SELECT view.id, s, listener.same_form(s, view.tenant_type) FROM unnest(source_ids) s;
    PERFORM listener.check_cycles();
    -- Last, so that writers wait for as little as can be.
    PERFORM listener.attach_capture(source_ids);
    PERFORM listener.mark_all_dirty(view.id);
END
$function$;

-- set_window(view, ...): changes a view's window. NULL leaves a value as it is; `without_max_age` and
-- `without_max_staleness` remove that value. A running service takes it over with the next change or sweep.
CREATE OR REPLACE FUNCTION listener.set_window(
    view text, quiet_period interval DEFAULT NULL, max_wait interval DEFAULT NULL, edge text DEFAULT NULL,
    max_age interval DEFAULT NULL, without_max_age boolean DEFAULT false, max_staleness interval DEFAULT NULL,
    without_max_staleness boolean DEFAULT false) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    previous_role text := listener.become_owner();
    managed listener.managed_view := listener.find_view(view);
BEGIN
    PERFORM listener.check_window(
        coalesce(set_window.quiet_period, managed.quiet_period), coalesce(set_window.max_wait, managed.max_wait),
        coalesce(set_window.edge, managed.edge), coalesce(set_window.max_age, managed.max_age), managed.time_zone,
        CASE WHEN NOT without_max_staleness THEN coalesce(set_window.max_staleness, managed.max_staleness) END);
    -- What is to take its place too: the window is none of its own.
    UPDATE listener.managed_view v SET
        quiet_period = coalesce(set_window.quiet_period, v.quiet_period),
        max_wait = coalesce(set_window.max_wait, v.max_wait),
        edge = coalesce(set_window.edge, v.edge),
        max_age = CASE WHEN NOT without_max_age THEN coalesce(set_window.max_age, v.max_age) END,
        max_staleness = CASE WHEN NOT without_max_staleness THEN coalesce(set_window.max_staleness, v.max_staleness) END
    WHERE managed.id IN (v.id, v.replaces);
    PERFORM pg_catalog.set_config('role', previous_role, true);
END
$function$;

-- grant_reader(view, role): lets a role read the target; its schema is not ours to open.
CREATE OR REPLACE FUNCTION listener.grant_reader(view text, role name) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    previous_role text := listener.become_owner();
    managed listener.managed_view := listener.find_view(view);
BEGIN
    EXECUTE pg_catalog.format('GRANT SELECT ON %I.%I TO %I', managed.target_schema, managed.target_name, role);
    PERFORM pg_catalog.set_config('role', previous_role, true);
END
$function$;

-- set_compute_role(view, role): another role computes the view from now on; NULL: that of the installation. The role
-- before loses its grants on the target and the definition. The new role must already have the grants on what the query
-- reads.
-- Raises LSN03 as check_compute_role() and check_readable() do, having done nothing.
CREATE OR REPLACE FUNCTION listener.set_compute_role(view text, role name) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    previous_role text := listener.become_owner();
    managed listener.managed_view;
    before name;
    target text;
BEGIN
    PERFORM listener.lock_registration(), listener.check_compute_role(role);
    IF role IS NOT NULL THEN
        PERFORM listener.check_lookups_apart(true, false);
    END IF;
    managed := listener.find_view(view);
    before := listener.grantee_of(managed);
    managed.compute_role := role;
    target := format('%I.%I', managed.target_schema, managed.target_name);
    IF managed.strategy = 'materialized view' THEN
        RAISE EXCEPTION '% is a materialized view: its owner computes it, and no other role can', managed.name USING ERRCODE = 'LSN03';
    END IF;
    PERFORM listener.check_readable(to_regclass('listener.definition_' || managed.id), listener.grantee_of(managed)),
            listener.check_readable(to_regclass('listener.tenants_' || managed.id), listener.grantee_of(managed));
    UPDATE listener.managed_view v SET compute_role = role WHERE v.id = managed.id;
    EXECUTE format('REVOKE ALL ON %s, listener.%I, listener.%I FROM %I', target, 'definition_' || managed.id,
                   'tenants_' || managed.id, before);
    PERFORM listener.grant_target(managed), listener.grant_definition(managed), listener.generate_difference(managed);
    IF managed.target_rls THEN
        EXECUTE format('ALTER POLICY listener_list ON %s TO %I', target, listener.grantee_of(managed));
    END IF;
    UPDATE listener.managed_view v SET fingerprint = coalesce(listener.view_fingerprint(v), v.fingerprint) WHERE v.id = managed.id;
    -- Row-level security may show another role other rows.
    PERFORM listener.mark_all_dirty(managed.id), set_config('role', previous_role, true);
END
$function$;

-- drop_view(view, keep_target): drops the definition, the target unless it is to be kept as a plain table, the triggers of
-- tables that no other view reads, and what stands beside the target to take its place. A materialized view that was there
-- before stays. Raises LSN03 where other managed views read a target that is to go.
CREATE OR REPLACE FUNCTION listener.drop_view(view text, keep_target boolean DEFAULT false) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    previous_role text := listener.become_owner();
    managed listener.managed_view;
    readers text;
    adoption_state text;
    is_back boolean;
BEGIN
    PERFORM listener.lock_registration();
    -- Not before: whoever held the lock may have put another in its place.
    managed := listener.find_view(view);
    SELECT pg_catalog.string_agg(v.name, ', ' ORDER BY v.name) INTO readers
    FROM listener.view_reads r JOIN listener.managed_view v ON v.id = r.view_id
    WHERE r.upstream_id = managed.id AND NOT keep_target;
    IF readers IS NOT NULL THEN
        RAISE EXCEPTION '% is read by %', managed.name, readers USING ERRCODE = 'LSN03',
            HINT = 'Drop these first, or keep its target as a plain table: keep_target => true.';
    END IF;
    PERFORM listener.drop_view(v.name) FROM listener.managed_view v WHERE v.replaces = managed.id;
    SELECT a.state INTO adoption_state FROM listener.adoption a WHERE a.view_id = managed.id;
    is_back := coalesce(adoption_state = 'turned back', false);
    IF adoption_state = 'turning back' THEN
        PERFORM listener.drop_beside(managed);
    END IF;
    PERFORM listener.unregister(managed);
    IF NOT (keep_target OR is_back OR managed.strategy = 'materialized view') THEN
        EXECUTE pg_catalog.format('DROP TABLE IF EXISTS %I.%I', managed.target_schema, managed.target_name);
    END IF;
    PERFORM pg_catalog.set_config('role', previous_role, true);
END
$function$;

-- unregister(view): all of a view but its target goes: definition, keys, open letters, the triggers that no other needs.
CREATE OR REPLACE FUNCTION listener.unregister(view listener.managed_view) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    -- Taking locks from readers may take some tries: first what gives way.
    DELETE FROM listener.view_source w WHERE w.view_id = view.id;
    PERFORM listener.drop_orphans();
    PERFORM listener.drop_records(view);
END
$function$;

-- drop_records(view): the same, but for the triggers. What refers to it is deleted here: in a session that replicates, the
-- foreign keys do nothing.
CREATE OR REPLACE FUNCTION listener.drop_records(view listener.managed_view) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    EXECUTE format('DROP VIEW IF EXISTS listener.%I', 'tenants_' || view.id);
    EXECUTE format('DROP VIEW IF EXISTS listener.%I', 'definition_' || view.id);
    PERFORM listener.drop_computing(view.id);
    DELETE FROM listener.view_source w WHERE w.view_id = view.id;
    DELETE FROM listener.adoption a WHERE a.view_id = view.id;
    UPDATE listener.managed_view v SET replaces = NULL WHERE v.replaces = view.id;
    DELETE FROM listener.managed_view v WHERE v.id = view.id;
    DELETE FROM listener.dirty_key k WHERE k.view_id = view.id;
    DELETE FROM listener.refresh_state r WHERE r.view_id = view.id;
    UPDATE listener.dead_letter d SET status = 'discarded', closed_at = clock_timestamp()
    WHERE d.view_id = view.id AND d.status = 'open';
END
$function$;

-- pause(view, capture): stops refreshing a view, or all of them where view is NULL. Changes go on being captured, and
-- are refreshed after resume(). With capture => true (for all views only) the triggers are disabled as well, and the
-- application's writes cost what they cost without this schema.
CREATE OR REPLACE FUNCTION listener.pause(view text DEFAULT NULL, capture boolean DEFAULT false) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    previous_role text := listener.become_owner();
    managed_id integer := CASE WHEN view IS NOT NULL THEN (listener.find_view(view)).id END;
BEGIN
    IF capture AND view IS NOT NULL THEN
        RAISE EXCEPTION 'capture can be paused for all views only: sources are shared' USING ERRCODE = 'LSN02';
    END IF;
    UPDATE listener.managed_view v SET paused_at = coalesce(v.paused_at, pg_catalog.clock_timestamp())
    WHERE managed_id IS NULL OR v.id = managed_id;
    IF capture THEN
        PERFORM listener.switch_capture(false);
    END IF;
    PERFORM pg_catalog.set_config('role', previous_role, true);
END
$function$;

-- resume(view): takes up refreshing again. The keys that got dirty meanwhile are logged anew, so that the next drain
-- hands them out at once; where capture was paused, enables the triggers and marks every tenant of every view dirty,
-- since nobody knows what was missed.
CREATE OR REPLACE FUNCTION listener.resume(view text DEFAULT NULL) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    previous_role text := listener.become_owner();
    managed_id integer := CASE WHEN view IS NOT NULL THEN (listener.find_view(view)).id END;
BEGIN
    INSERT INTO listener.change_log (xid, changed_at, view_id, tenant)
    SELECT pg_catalog.pg_current_xact_id(), k.dirty_since, k.view_id, k.tenant
    FROM listener.dirty k
    JOIN listener.managed_view v ON v.id = k.view_id AND v.paused_at IS NOT NULL
    WHERE managed_id IS NULL OR v.id = managed_id;
    UPDATE listener.managed_view v SET paused_at = NULL WHERE managed_id IS NULL OR v.id = managed_id;
    IF EXISTS (SELECT FROM listener.source s WHERE s.capture_paused) THEN
        PERFORM listener.switch_capture(true);
        PERFORM listener.mark_all_dirty(v.id) FROM listener.managed_view v;
    END IF;
    PERFORM listener.ring_for_all();
    PERFORM pg_catalog.set_config('role', previous_role, true);
END
$function$;

-- switch_capture(enable): enables (ALWAYS) or disables the capture triggers of every source.
CREATE OR REPLACE FUNCTION listener.switch_capture(enable boolean) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    attached record;
    previous_timeout text := current_setting('lock_timeout');
BEGIN
    PERFORM set_config('lock_timeout', '2s', true);
    FOR attached IN
        SELECT g.tgrelid::regclass AS relation, g.tgname
        FROM listener.source s JOIN pg_trigger g ON g.tgname LIKE format('listener\_%s\_%%', s.id) AND NOT enable
        ORDER BY g.tgrelid, g.tgname
    LOOP
        EXECUTE format('ALTER TABLE %s DISABLE TRIGGER %I', attached.relation, attached.tgname);
    END LOOP;
    UPDATE listener.source SET capture_paused = NOT enable;
    IF enable THEN
        PERFORM listener.attach_capture(ARRAY(SELECT s.id FROM listener.source s ORDER BY s.id));
    END IF;
    PERFORM set_config('lock_timeout', previous_timeout, true);
END
$function$;
