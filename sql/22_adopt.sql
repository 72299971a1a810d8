-- Adopting a materialized view: a managed view of the same query is made beside it, filled while writes go on, and put in
-- its place; and turning that back. Each step is a transaction of its own, and until the swap the materialized view is
-- as it was:
--   begin_adoption(name, …) → the service fills, or refresh() does → finish_adoption(view); abort_adoption(view)
--   begin_unadoption(view) → fill_unadoption(view) → finish_unadoption(view) → drop_view(view, keep_target => true)

-- begin_adoption(name, …): registers the query of a materialized view as a managed view whose target stands beside it,
-- under the name listener_new_<oid>, with its columns, indexes, grants and comments; and marks every tenant dirty. The
-- arguments are those of create_view.
--   key_columns     left out: proposed_key()
--   tenant_column   NULL: the view is refreshed as a whole
--   max_age         left out: where the query depends on the time, an hour if that counts by days, else a minute
--   timezone        left out: the database's. A materialized view was computed in that of whoever refreshed it
--   compute_role    as for create_view
--   owner           owner of the target; left out: the owner of the materialized view, who then may write it
-- Called again with the same arguments it goes on from what is there, and with others it starts over.
-- Returns the name of the managed view. Raises LSN02, and LSN03 where something is tied to the materialized view, or as
-- create_view does; then nothing was done.
CREATE OR REPLACE FUNCTION listener.begin_adoption(
    name text, key_columns name[] DEFAULT NULL, tenant_column name DEFAULT 'tenant_id', tenants_query text DEFAULT NULL,
    depends_on regclass[] DEFAULT NULL, quiet_period interval DEFAULT NULL, max_wait interval DEFAULT NULL,
    edge text DEFAULT NULL, max_age interval DEFAULT NULL, timezone text DEFAULT NULL, target_rls boolean DEFAULT false,
    owner name DEFAULT NULL, compute_role name DEFAULT NULL, search_path text DEFAULT pg_catalog.current_setting('search_path'))
RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
#variable_conflict use_variable
DECLARE
    previous_role text := listener.become_owner();
    old regclass := listener.find_materialized_view(name, search_path);
    class record;
    before listener.adoption;
    managed listener.managed_view;
    request jsonb := jsonb_build_object(
        'key_columns', key_columns, 'tenant_column', tenant_column, 'tenants_query', tenants_query,
        'depends_on', depends_on::text, 'quiet_period', quiet_period, 'max_wait', max_wait, 'edge', edge,
        'max_age', max_age, 'timezone', timezone, 'target_rls', target_rls)
        || CASE WHEN owner IS NULL THEN '{}' ELSE jsonb_build_object('owner', owner) END
        || CASE WHEN compute_role IS NULL THEN '{}' ELSE jsonb_build_object('compute_role', compute_role) END;
    rehearsed boolean := listener.is_rehearsal();
    beside_name name := CASE WHEN rehearsed THEN 'listener_try_' ELSE 'listener_new_' END || old::oid;
    beside text;
    query text;
    keys name[];
    zone text := coalesce(timezone, listener.default_time_zone());
    age interval := listener.adopted_max_age(old, max_age);
    -- The materialized view was computed under these, and create_view() takes the session's.
    previous jsonb := listener.use_settings(listener.default_settings() || '{"standard_conforming_strings": "on"}');
    statement text;
BEGIN
    PERFORM listener.lock_registration();
    PERFORM listener.check_swappable(old), listener.check_sources(old), listener.check_new_owner(old, owner);
    SELECT c.relname, n.nspname, pg_get_userbyid(c.relowner) AS owner INTO class
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = old;
    query := listener.query_of(old);
    PERFORM listener.check_written(old, query);
    SELECT a.* INTO before FROM listener.adoption a
    WHERE a.state = 'filling' AND a.schema_name = class.nspname AND a.relation_name = class.relname;
    -- A rehearsal leaves an adoption that is under way alone: to abort it would lock the sources.
    IF FOUND AND NOT rehearsed THEN
        SELECT v.* INTO STRICT managed FROM listener.managed_view v WHERE v.id = before.view_id;
        IF before.relid = old AND before.definition = query AND before.request = request
           AND to_regclass(format('%I.%I', managed.target_schema, managed.target_name)) IS NOT NULL THEN
            PERFORM listener.resume(managed.name);
            PERFORM listener.use_settings(previous), set_config('role', previous_role, true);
            RETURN managed.name;
        END IF;
        PERFORM listener.drop_view(managed.name);
    END IF;
    keys := listener.adopted_key(old, key_columns, tenant_column);
    beside := format('%I.%I', class.nspname, beside_name);
    PERFORM set_config('search_path', begin_adoption.search_path, true);
    PERFORM listener.create_view(
        name => beside, query => query, key_columns => keys, tenant_column => tenant_column, tenants_query => tenants_query,
        depends_on => depends_on, quiet_period => quiet_period, max_wait => max_wait, edge => edge, max_age => age,
        timezone => zone, target_rls => target_rls,
        -- An adoption that starts over keeps the limit that was set for it.
        max_staleness => managed.max_staleness, compute_role => compute_role);
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    -- Known by the name that it will have, from the beginning.
    UPDATE listener.managed_view v SET name = listener.free_name(class.nspname, class.relname)
    WHERE (v.target_schema, v.target_name) = (class.nspname, beside_name)
    RETURNING v.* INTO managed;
    PERFORM listener.check_same_columns(old, beside::regclass);
    PERFORM listener.revoke_defaults(beside::regclass);
    IF before.view_id IS NULL OR NOT rehearsed THEN
        PERFORM listener.name_key_index(old, beside::regclass, managed.id);
        FOREACH statement IN ARRAY ARRAY(SELECT s FROM listener.adopting(old, beside, managed.key_columns, owner) s) LOOP
            EXECUTE statement;
        END LOOP;
    END IF;
    INSERT INTO listener.adoption (view_id, state, schema_name, relation_name, relid, owner_role, definition, indexes,
                                   grants, request)
    VALUES (managed.id, 'filling', class.nspname, class.relname, old, class.owner, query, listener.noted_indexes(old),
            listener.grants_of(old), request);
    IF age IS DISTINCT FROM max_age THEN
        RAISE NOTICE '% depends on the time: each key is refreshed at least once %; max_age says how often', old,
            CASE WHEN age < '1 hour' THEN 'a minute' ELSE 'an hour' END;
    END IF;
    FOREACH statement IN ARRAY ARRAY(SELECT l FROM listener.losses(old, managed.key_columns) l
                                     UNION ALL SELECT listener.clock_advice(old)) LOOP
        RAISE NOTICE '%', statement;
    END LOOP;
    PERFORM listener.use_settings(previous), set_config('role', previous_role, true);
    RETURN managed.name;
END
$function$;

-- find_adoption(view, states): what is noted of an adopted view. Raises LSN03 where it is in none of these states.
CREATE OR REPLACE FUNCTION listener.find_adoption(view text, states text[]) RETURNS listener.adoption
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    managed listener.managed_view := listener.find_view(view);
    found listener.adoption;
BEGIN
    SELECT a.* INTO found FROM listener.adoption a WHERE a.view_id = managed.id;
    IF found.state IS NULL THEN
        RAISE EXCEPTION '% was not adopted', managed.name USING ERRCODE = 'LSN03',
            HINT = 'It was made by listener.create_view: there is nothing to turn back to.';
    ELSIF found.state <> ALL (states) THEN
        RAISE EXCEPTION '% is %', managed.name, found.state USING ERRCODE = 'LSN03',
            HINT = CASE found.state WHEN 'filling' THEN 'Adopt it again to go on, or listener.abort_adoption(view).'
                   WHEN 'adopted' THEN 'It is in its place; listener.begin_unadoption(view) turns back.'
                   ELSE 'Go on with `listener unadopt`, or listener.abort_adoption(view).' END;
    END IF;
    RETURN found;
END
$function$;

-- unfilled(view): its keys that no refresh has filled yet.
CREATE OR REPLACE FUNCTION listener.unfilled(view text) RETURNS SETOF text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT t FROM listener.tenants(view) t
    WHERE NOT EXISTS (SELECT FROM listener.refresh_state r
                      WHERE r.view_id = (listener.find_view(view)).id AND r.tenant = t AND r.refreshed_at IS NOT NULL)
$function$;

-- name_beside(view): what the materialized view is called that is made beside the target. By the view's id: the target
-- may be made again meanwhile, and has another oid in a restored copy.
CREATE OR REPLACE FUNCTION listener.name_beside(view listener.managed_view) RETURNS name
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT 'listener_back_' || view.id
$function$;

-- analyze_replacement(view): gathers statistics of the relation that an adoption, or an alteration, is to put in place.
CREATE OR REPLACE FUNCTION listener.analyze_replacement(view text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    previous_role text := listener.become_owner();
    managed listener.managed_view := listener.find_view(view);
BEGIN
    EXECUTE format('ANALYZE %I.%I', managed.target_schema,
                   CASE WHEN managed.replaces IS NULL
                             AND (listener.find_adoption(view, '{filling,turning back}')).state = 'turning back'
                        THEN listener.name_beside(managed) ELSE managed.target_name END);
    PERFORM set_config('role', previous_role, true);
END
$function$;

-- finish_adoption(view): puts the filled target in the place of the materialized view, and drops that: see swap() for the
-- locks. Refreshing goes on where it was paused: a refresh that begins just before may otherwise find that its target
-- has another name, fail, and be tried again, so pause(view) before this spares the log an error.
-- Returns how long readers were locked out. Raises lock_not_available, or object_not_in_prerequisite_state while a key was
-- not filled yet, having done nothing: try again. Raises LSN03 where the materialized view is not the one that this was
-- begun with, where something is tied to it by now, and as check_comparable().
CREATE OR REPLACE FUNCTION listener.finish_adoption(view text) RETURNS interval
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    previous_role text := listener.become_owner();
    managed listener.managed_view;
    adoption listener.adoption;
    old regclass;
    new regclass;
    unfilled bigint;
    locked interval;
BEGIN
    PERFORM listener.lock_registration();
    managed := listener.find_view(view);
    adoption := listener.find_adoption(view, '{filling}');
    old := to_regclass(format('%I.%I', adoption.schema_name, adoption.relation_name));
    IF old IS DISTINCT FROM adoption.relid::regclass OR listener.query_of(old) <> adoption.definition THEN
        RAISE EXCEPTION '%.% is not the materialized view that this was begun with', adoption.schema_name, adoption.relation_name
            USING ERRCODE = 'LSN03', HINT = 'Adopt it again: it starts over.';
    END IF;
    SELECT count(*) INTO unfilled FROM listener.unfilled(managed.name);
    IF unfilled > 0 THEN
        RAISE EXCEPTION '% of %: not filled yet', CASE unfilled WHEN 1 THEN 'a key' ELSE unfilled || ' keys' END, managed.name
            USING ERRCODE = 'object_not_in_prerequisite_state', HINT = 'The service fills it, and so does `listener refresh --all-tenants`.';
    END IF;
    new := format('%I.%I', managed.target_schema, managed.target_name)::regclass;
    PERFORM listener.check_swappable(old), listener.check_comparable(managed.name);
    PERFORM listener.carry_again(old, new, managed.id, ARRAY(
        SELECT s FROM listener.adopting(old, new::text, managed.key_columns, (adoption.request ->> 'owner')::name) s));
    UPDATE listener.adoption a SET indexes = listener.noted_indexes(old), grants = listener.grants_of(old)
    WHERE a.view_id = managed.id;
    locked := (listener.swap(old, new));
    UPDATE listener.managed_view v SET target_name = adoption.relation_name WHERE v.id = managed.id RETURNING v.* INTO managed;
    PERFORM listener.generate_difference(managed);
    UPDATE listener.adoption a SET state = 'adopted', adopted_at = clock_timestamp() WHERE a.view_id = managed.id;
    PERFORM listener.resume(managed.name);
    PERFORM set_config('role', previous_role, true);
    RETURN locked;
END
$function$;

-- drop_beside(view): drops the materialized view that was made next to its target, and the view with its query, where
-- there are any.
CREATE OR REPLACE FUNCTION listener.drop_beside(view listener.managed_view) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    beside text := format('%I.%I', view.target_schema, listener.name_beside(view));
    query_view name := (SELECT a.query_view FROM listener.adoption a WHERE a.view_id = view.id);
BEGIN
    IF to_regclass(beside) IS NOT NULL THEN
        EXECUTE format('DROP MATERIALIZED VIEW %s', beside);
    END IF;
    IF query_view IS NOT NULL THEN
        EXECUTE format('DROP VIEW IF EXISTS %I.%I', view.target_schema, query_view);
    END IF;
END
$function$;

-- abort_adoption(view): takes back what begin_adoption() or begin_unadoption() made beside what is in place, which stays
-- as it is.
CREATE OR REPLACE FUNCTION listener.abort_adoption(view text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    previous_role text := listener.become_owner();
    managed listener.managed_view;
    adoption listener.adoption;
BEGIN
    PERFORM listener.lock_registration();
    managed := listener.find_view(view);
    adoption := listener.find_adoption(view, '{filling,turning back}');
    IF adoption.state = 'filling' THEN
        PERFORM listener.drop_view(managed.name);
    ELSE
        PERFORM listener.drop_beside(managed);
        UPDATE listener.adoption a SET state = 'adopted', query_view = NULL WHERE a.view_id = managed.id;
    END IF;
    PERFORM set_config('role', previous_role, true);
END
$function$;
