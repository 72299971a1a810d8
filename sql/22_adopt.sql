-- Adopting a materialized view: a managed view of the same query is made beside it, filled while writes go on, and put in
-- its place; and turning that back. Each step is a transaction of its own, and until the swap the materialized view is
-- as it was:
--   begin_adoption(name, …) → the service fills, or refresh() does → finish_adoption(view); abort_adoption(view)
--   begin_unadoption(view) → fill_unadoption(view) → finish_unadoption(view) → drop_view(view, keep_target => true)

-- find_materialized_view(name, search_path): the materialized view of that name. Raises LSN02 where there is none.
CREATE OR REPLACE FUNCTION listener.find_materialized_view(name text, search_path text) RETURNS regclass
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    found regclass;
    managed text;
BEGIN
    IF name IS NULL THEN
        RAISE EXCEPTION 'the name must be given' USING ERRCODE = 'LSN02';
    END IF;
    BEGIN
        PERFORM set_config('search_path', find_materialized_view.search_path, true);
        found := pg_catalog.to_regclass(name);
        PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    EXCEPTION WHEN OTHERS THEN
        found := NULL;  -- it is no name at all
    END;
    IF found IS NULL THEN
        RAISE EXCEPTION 'there is no materialized view %', name USING ERRCODE = 'LSN02',
            HINT = coalesce('There are: ' || (
                SELECT string_agg(format('%I.%I', m.schemaname, m.matviewname), ', ' ORDER BY 1) FROM pg_matviews m) || '.',
                'There is none in this database.');
    END IF;
    SELECT v.name INTO managed FROM listener.managed_view v WHERE to_regclass(format('%I.%I', v.target_schema, v.target_name)) = found;
    IF managed IS NOT NULL THEN
        RAISE EXCEPTION '% is managed already, as %', found, managed USING ERRCODE = 'LSN02';
    ELSIF (SELECT c.relkind FROM pg_class c WHERE c.oid = found) <> 'm' THEN
        RAISE EXCEPTION '% is no materialized view', found USING ERRCODE = 'LSN02',
            HINT = 'A new name for a query of your own: listener.create_view(…).';
    END IF;
    RETURN found;
END
$function$;

-- proposed_key(relation, tenant_column): the columns of its unique index, one with the tenant column before others, few
-- before many; '{}', the whole row, where there is none on plain columns.
CREATE OR REPLACE FUNCTION listener.proposed_key(relation regclass, tenant_column name) RETURNS name[]
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT coalesce((SELECT i.columns FROM listener.indexes_of(relation) i WHERE i.is_key
                     ORDER BY (tenant_column = ANY (i.columns)) DESC NULLS LAST, cardinality(i.columns), i.id LIMIT 1), '{}')
$function$;

-- default_time_zone(): what a session has that says nothing of its own: that of the database, else the server's.
CREATE OR REPLACE FUNCTION listener.default_time_zone() RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT coalesce(
        (SELECT o.option_value FROM pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase
         CROSS JOIN LATERAL pg_options_to_table(s.setconfig) o
         WHERE d.datname = current_database() AND s.setrole = 0 AND lower(o.option_name) = 'timezone'),
        (SELECT g.reset_val FROM pg_settings g WHERE lower(g.name) = 'timezone'))
$function$;

-- check_sources(relation): raises LSN03 where a materialized view reads another, whose changes fire no trigger.
CREATE OR REPLACE FUNCTION listener.check_sources(relation regclass) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    stored regclass := (SELECT i.relid FROM listener.tenant_inputs(relation, NULL) i WHERE i.relkind = 'm' LIMIT 1);
BEGIN
    IF stored IS NOT NULL THEN
        RAISE EXCEPTION '% reads the materialized view %, whose changes fire no trigger', relation, stored
            USING ERRCODE = 'LSN03', HINT = 'Adopt that one first, or have this one read what that one does.';
    END IF;
END
$function$;

-- adopted_key(relation, key_columns, tenant_column): the key that a target of this materialized view has: the tenant
-- column before the others where it is not among them.
CREATE OR REPLACE FUNCTION listener.adopted_key(relation regclass, key_columns name[], tenant_column name) RETURNS name[]
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT CASE WHEN tenant_column = ANY (k.keys) OR tenant_column IS NULL OR k.keys = '{}' THEN k.keys
                ELSE tenant_column || k.keys END
    FROM (SELECT coalesce(key_columns, listener.proposed_key(relation, tenant_column))) AS k (keys)
$function$;

-- begin_adoption(name, …): registers the query of a materialized view as a managed view whose target stands beside it,
-- under the name listener_new_<oid>, with its columns, indexes, grants and comments; and marks every tenant dirty. The
-- arguments are those of create_view.
--   key_columns     left out: proposed_key()
--   tenant_column   NULL: the view is refreshed as a whole
--   max_age         left out: an hour where the query depends on the time
--   timezone        left out: the database's. A materialized view was computed in that of whoever refreshed it
-- Called again with the same arguments it goes on from what is there, and with others it starts over.
-- Returns the name of the managed view. Raises LSN02, and LSN03 where something is tied to the materialized view, or as
-- create_view does; then nothing was done.
CREATE OR REPLACE FUNCTION listener.begin_adoption(
    name text, key_columns name[] DEFAULT NULL, tenant_column name DEFAULT 'tenant_id', tenants_query text DEFAULT NULL,
    depends_on regclass[] DEFAULT NULL, quiet_period interval DEFAULT NULL, max_wait interval DEFAULT NULL,
    edge text DEFAULT NULL, max_age interval DEFAULT NULL, timezone text DEFAULT NULL, target_rls boolean DEFAULT false,
    search_path text DEFAULT pg_catalog.current_setting('search_path'))
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
        'max_age', max_age, 'timezone', timezone, 'target_rls', target_rls);
    beside text;
    query text;
    keys name[];
    zone text := coalesce(timezone, listener.default_time_zone());
    age interval := listener.adopted_max_age(old, max_age);
    statement text;
BEGIN
    PERFORM listener.lock_registration();
    PERFORM listener.check_swappable(old), listener.check_sources(old);
    SELECT c.relname, n.nspname, pg_get_userbyid(c.relowner) AS owner, c.relispopulated, c.reloptions INTO class
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = old;
    query := pg_get_viewdef(old);
    SELECT a.* INTO before FROM listener.adoption a
    WHERE a.state = 'filling' AND a.schema_name = class.nspname AND a.relation_name = class.relname;
    IF FOUND THEN
        SELECT v.* INTO STRICT managed FROM listener.managed_view v WHERE v.id = before.view_id;
        IF before.relid = old AND before.definition = query AND before.request = request
           AND to_regclass(format('%I.%I', managed.target_schema, managed.target_name)) IS NOT NULL THEN
            PERFORM listener.resume(managed.name);
            PERFORM set_config('role', previous_role, true);
            RETURN managed.name;
        END IF;
        PERFORM listener.drop_view(managed.name);
    END IF;
    keys := listener.adopted_key(old, key_columns, tenant_column);
    beside := format('%I.%I', class.nspname, 'listener_new_' || old::oid);
    PERFORM set_config('search_path', begin_adoption.search_path, true);
    PERFORM listener.create_view(
        name => beside, query => query, key_columns => keys, tenant_column => tenant_column, tenants_query => tenants_query,
        depends_on => depends_on, quiet_period => quiet_period, max_wait => max_wait, edge => edge, max_age => age,
        timezone => zone, target_rls => target_rls);
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    -- Known by the name that it will have, from the beginning.
    UPDATE listener.managed_view v SET name = listener.free_name(class.nspname, class.relname)
    WHERE (v.target_schema, v.target_name) = (class.nspname, ('listener_new_' || old::oid)::name)
    RETURNING v.* INTO managed;
    PERFORM listener.check_same_columns(old, beside::regclass);
    PERFORM listener.revoke_defaults(beside::regclass);
    PERFORM listener.name_key_index(old, beside::regclass, managed.id);
    FOREACH statement IN ARRAY ARRAY(
        SELECT s FROM listener.carried(old, beside, 'r', managed.key_columns, '{}', listener.only_select(listener.grants_of(old))) s)
    LOOP
        EXECUTE statement;
    END LOOP;
    INSERT INTO listener.adoption (view_id, state, schema_name, relation_name, relid, owner_role, definition, populated,
                                   options, indexes, grants, request)
    VALUES (managed.id, 'filling', class.nspname, class.relname, old, class.owner, query, class.relispopulated,
            class.reloptions,
            (SELECT coalesce(jsonb_object_agg(i.name, jsonb_build_object('unique', i.is_unique, 'rest', i.rest)), '{}')
             FROM listener.indexes_of(old) i),
            listener.grants_of(old), request);
    IF age IS DISTINCT FROM max_age THEN
        RAISE NOTICE '% depends on the time: each key is refreshed once an hour at least; max_age says how often', old;
    END IF;
    FOREACH statement IN ARRAY ARRAY(SELECT l FROM listener.losses(old, managed.key_columns) l) LOOP
        RAISE NOTICE '%', statement;
    END LOOP;
    PERFORM set_config('role', previous_role, true);
    RETURN managed.name;
END
$function$;

-- only_select(grants): what a reader of a materialized view was granted. The other privileges did nothing there, and would
-- let their holders write a table.
CREATE OR REPLACE FUNCTION listener.only_select(grants jsonb) RETURNS jsonb
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT coalesce(jsonb_agg(g ORDER BY ord), '[]') FROM jsonb_array_elements(grants) WITH ORDINALITY AS e (g, ord)
    WHERE g ->> 'privilege' = 'SELECT'
$function$;

-- losses(relation, keys): one line for each thing that a target of a materialized view does not have of it.
CREATE OR REPLACE FUNCTION listener.losses(relation regclass, keys name[]) RETURNS SETOF text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT format('the unique index %I is not unique any more: a target has one unique index, that of its key (%s)',
                  i.name, array_to_string(keys, ', '))
    FROM listener.indexes_of(relation) i WHERE i.is_unique AND NOT (i.is_key AND i.columns IS NOT DISTINCT FROM keys)
    UNION ALL
    SELECT format('%s keeps SELECT alone, and not %s', coalesce(g ->> 'grantee', 'PUBLIC'),
                  string_agg(g ->> 'privilege', ', ' ORDER BY g ->> 'privilege'))
    FROM jsonb_array_elements(listener.grants_of(relation)) g WHERE g ->> 'privilege' <> 'SELECT' GROUP BY g ->> 'grantee'
$function$;

-- adopted_max_age(relation, max_age): an hour where none is given and the result depends on the time: whoever refreshed it by
-- a timer knew that rows leave it without a write.
CREATE OR REPLACE FUNCTION listener.adopted_max_age(relation regclass, max_age interval) RETURNS interval
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT coalesce(max_age, (SELECT interval '1 hour' FROM listener.time_dependence(relation) t
                              WHERE t.dependence = 'time' LIMIT 1))
$function$;

-- check_same_columns(old, new): raises LSN03 where they differ in the names, types or collations of their columns.
CREATE OR REPLACE FUNCTION listener.check_same_columns(old regclass, new regclass) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    shapes text[] := ARRAY(
        SELECT string_agg(concat_ws(' ', quote_ident(a.attname), format_type(a.atttypid, a.atttypmod),
                                    nullif(a.attcollation, 0)::regcollation), ', ' ORDER BY a.attnum)
        FROM unnest(ARRAY[old, new]) WITH ORDINALITY AS r (oid, ord)
        JOIN pg_attribute a ON a.attrelid = r.oid AND a.attnum > 0 AND NOT a.attisdropped
        GROUP BY r.ord ORDER BY r.ord);
BEGIN
    IF shapes[1] IS DISTINCT FROM shapes[2] THEN
        RAISE EXCEPTION 'the query of % returns other columns than it has: (%) instead of (%)', old, shapes[2], shapes[1]
            USING ERRCODE = 'LSN03';
    END IF;
END
$function$;

-- revoke_defaults(relation): takes what default privileges gave on a new relation; the service keeps what it needs.
CREATE OR REPLACE FUNCTION listener.revoke_defaults(relation regclass) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    grantee text;
BEGIN
    FOR grantee IN
        SELECT DISTINCT coalesce(quote_ident(g ->> 'grantee'), 'PUBLIC')
        FROM jsonb_array_elements(listener.grants_of(relation)) g
        WHERE g ->> 'grantee' IS DISTINCT FROM (SELECT i.service_role FROM listener.installation i)
    LOOP
        EXECUTE format('REVOKE ALL ON %s FROM %s', relation, grantee);
    END LOOP;
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

-- analyze_replacement(view): gathers statistics of the relation that is to be put in place, whose name has none yet.
CREATE OR REPLACE FUNCTION listener.analyze_replacement(view text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    previous_role text := listener.become_owner();
    managed listener.managed_view := listener.find_view(view);
    adoption listener.adoption := listener.find_adoption(view, '{filling,turning back}');
BEGIN
    EXECUTE format('ANALYZE %I.%I', adoption.schema_name, CASE adoption.state WHEN 'filling' THEN managed.target_name
                                                              ELSE listener.name_beside(managed) END);
    PERFORM set_config('role', previous_role, true);
END
$function$;

-- finish_adoption(view): puts the filled target in the place of the materialized view, and drops that: see swap() for the
-- locks. Refreshing goes on where it was paused: a refresh that begins just before may otherwise find that its target
-- has another name, fail, and be tried again, so pause(view) before this spares the log an error.
-- Returns how long readers were locked out. Raises lock_not_available, or object_not_in_prerequisite_state while a key was
-- not filled yet, having done nothing: try again. Raises LSN03 where the materialized view is not the one that this was
-- begun with, and where something is tied to it by now.
CREATE OR REPLACE FUNCTION listener.finish_adoption(view text) RETURNS interval
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    previous_role text := listener.become_owner();
    managed listener.managed_view := listener.find_view(view);
    adoption listener.adoption := listener.find_adoption(view, '{filling}');
    old regclass := to_regclass(format('%I.%I', adoption.schema_name, adoption.relation_name));
    unfilled bigint;
    locked interval;
BEGIN
    PERFORM listener.lock_registration();
    IF old IS DISTINCT FROM adoption.relid::regclass OR pg_get_viewdef(old) <> adoption.definition THEN
        RAISE EXCEPTION '%.% is not the materialized view that this was begun with', adoption.schema_name, adoption.relation_name
            USING ERRCODE = 'LSN03', HINT = 'Adopt it again: it starts over.';
    END IF;
    SELECT count(*) INTO unfilled FROM listener.unfilled(managed.name);
    IF unfilled > 0 THEN
        RAISE EXCEPTION '% of %: not filled yet', CASE unfilled WHEN 1 THEN 'a key' ELSE unfilled || ' keys' END, managed.name
            USING ERRCODE = 'object_not_in_prerequisite_state', HINT = 'The service fills it, and so does `listener refresh --all-tenants`.';
    END IF;
    locked := (listener.swap(old, format('%I.%I', managed.target_schema, managed.target_name)::regclass));
    UPDATE listener.managed_view v SET target_name = adoption.relation_name WHERE v.id = managed.id RETURNING v.* INTO managed;
    PERFORM listener.generate_difference(managed);
    UPDATE listener.adoption a SET state = 'adopted', adopted_at = clock_timestamp() WHERE a.view_id = managed.id;
    PERFORM listener.resume(managed.name);
    PERFORM set_config('role', previous_role, true);
    RETURN locked;
END
$function$;

-- unfilled(view): its keys that no refresh has filled yet.
CREATE OR REPLACE FUNCTION listener.unfilled(view text) RETURNS SETOF text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT t FROM listener.tenants(view) t
    WHERE NOT EXISTS (SELECT FROM listener.refresh_state r
                      WHERE r.view_id = (listener.find_view(view)).id AND r.tenant = t AND r.refreshed_at IS NOT NULL)
$function$;

-- abort_adoption(view): takes back what begin_adoption() or begin_unadoption() made beside what is in place, which stays
-- as it is.
CREATE OR REPLACE FUNCTION listener.abort_adoption(view text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    previous_role text := listener.become_owner();
    managed listener.managed_view := listener.find_view(view);
    adoption listener.adoption := listener.find_adoption(view, '{filling,turning back}');
BEGIN
    PERFORM listener.lock_registration();
    IF adoption.state = 'filling' THEN
        PERFORM listener.drop_view(managed.name);
    ELSE
        PERFORM listener.drop_beside(managed);
        UPDATE listener.adoption a SET state = 'adopted' WHERE a.view_id = managed.id;
        PERFORM listener.resume(managed.name);
    END IF;
    PERFORM set_config('role', previous_role, true);
END
$function$;

-- name_beside(view): what the materialized view is called that is made beside the target.
CREATE OR REPLACE FUNCTION listener.name_beside(view listener.managed_view) RETURNS name
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT 'listener_new_' || to_regclass(format('%I.%I', view.target_schema, view.target_name))::oid
$function$;

-- drop_beside(view): drops the materialized view that was made beside its target, where there is one.
CREATE OR REPLACE FUNCTION listener.drop_beside(view listener.managed_view) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    beside text := format('%I.%I', view.target_schema, listener.name_beside(view));
BEGIN
    IF to_regclass(beside) IS NOT NULL THEN
        EXECUTE format('DROP MATERIALIZED VIEW %s', beside);
    END IF;
END
$function$;

-- unadopting(view, adoption): the statements that make the materialized view anew beside the target, the first of them
-- that itself. Its definition is what it is by now, since a table that it reads may have another name.
CREATE OR REPLACE FUNCTION listener.unadopting(view listener.managed_view, adoption listener.adoption) RETURNS SETOF text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    WITH names AS (
        SELECT format('%I.%I', view.target_schema, view.target_name)::regclass AS target,
               format('%I.%I', view.target_schema, listener.name_beside(view)) AS beside, i.service_role
        FROM listener.installation i
    ), grants AS (
        -- Who may read it now; and the service, and the privileges that a table did not take over, as it was.
        SELECT coalesce(jsonb_agg(u.g), '[]') AS all
        FROM (SELECT g FROM names n CROSS JOIN LATERAL jsonb_array_elements(listener.grants_of(n.target)) g
              WHERE g ->> 'grantee' IS DISTINCT FROM n.service_role
              UNION ALL
              SELECT g FROM names n CROSS JOIN LATERAL jsonb_array_elements(adoption.grants) g
              WHERE g ->> 'grantee' = n.service_role OR g ->> 'privilege' <> 'SELECT') AS u (g)
    )
    SELECT format(E'CREATE MATERIALIZED VIEW %s AS\n%s\nWITH NO DATA', n.beside, rtrim(coalesce(
        pg_get_viewdef(to_regclass('listener.definition_' || view.id)), adoption.definition), E'; \n'))
    FROM names n
    UNION ALL
    SELECT s FROM names n CROSS JOIN grants g
    CROSS JOIN LATERAL listener.carried(n.target, n.beside, 'm', '{}', adoption.indexes, g.all) s
$function$;

-- begin_unadoption(view): makes the materialized view anew, beside the target and empty: the definition as it stands,
-- owner, options, indexes with their uniqueness, grants and comments. Called again it starts over.
-- Raises LSN03 where something is tied to the target, and for a view that was not adopted.
CREATE OR REPLACE FUNCTION listener.begin_unadoption(view text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    previous_role text := listener.become_owner();
    managed listener.managed_view := listener.find_view(view);
    adoption listener.adoption := listener.find_adoption(view, '{adopted,turning back}');
    target regclass := to_regclass(format('%I.%I', managed.target_schema, managed.target_name));
    statement text;
    created boolean := false;
BEGIN
    PERFORM listener.lock_registration();
    IF target IS NULL THEN
        RAISE EXCEPTION 'the target of % is gone', managed.name USING ERRCODE = 'LSN03',
            HINT = 'listener.restore_target(view) makes it again.';
    END IF;
    PERFORM listener.check_swappable(target);
    PERFORM listener.drop_beside(managed);
    FOREACH statement IN ARRAY ARRAY(SELECT s FROM listener.unadopting(managed, adoption) s) LOOP
        EXECUTE statement;
        IF NOT created THEN
            PERFORM listener.revoke_defaults(format('%I.%I', managed.target_schema, listener.name_beside(managed))::regclass);
            created := true;
        END IF;
    END LOOP;
    UPDATE listener.adoption a SET state = 'turning back' WHERE a.view_id = managed.id;
    PERFORM set_config('role', previous_role, true);
END
$function$;

-- fill_unadoption(view): fills the materialized view, in the time zone that the managed view had.
CREATE OR REPLACE FUNCTION listener.fill_unadoption(view text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET TimeZone = 'UTC' AS $function$
DECLARE
    previous_role text := listener.become_owner();
    managed listener.managed_view := listener.find_view(view);
    adoption listener.adoption := listener.find_adoption(view, '{turning back}');
    statement text := format('REFRESH MATERIALIZED VIEW %I.%I', managed.target_schema, listener.name_beside(managed));
BEGIN
    PERFORM set_config('TimeZone', managed.time_zone, true), set_config('search_path', managed.search_path, true);
    EXECUTE statement;
    PERFORM pg_catalog.set_config('role', previous_role, true);
END
$function$;

-- finish_unadoption(view): puts the materialized view in the place of the target, and drops that. The managed view is
-- paused from then on, and drop_view(view, keep_target => true) ends it: its triggers are taken off the sources in a
-- transaction of their own, since that may wait.
-- Returns how long readers were locked out. Raises as finish_adoption() does.
CREATE OR REPLACE FUNCTION listener.finish_unadoption(view text) RETURNS interval
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    previous_role text := listener.become_owner();
    managed listener.managed_view := listener.find_view(view);
    adoption listener.adoption := listener.find_adoption(view, '{turning back}');
    target regclass := format('%I.%I', managed.target_schema, managed.target_name)::regclass;
    beside regclass := to_regclass(format('%I.%I', managed.target_schema, listener.name_beside(managed)));
    locked interval;
BEGIN
    PERFORM listener.lock_registration();
    IF NOT coalesce((SELECT c.relispopulated FROM pg_class c WHERE c.oid = beside), false) THEN
        RAISE EXCEPTION 'the materialized view beside % is not filled', target USING ERRCODE = 'LSN03',
            HINT = 'SELECT listener.fill_unadoption(view) first.';
    END IF;
    locked := (listener.swap(target, beside));
    UPDATE listener.adoption a SET state = 'turned back' WHERE a.view_id = managed.id;
    UPDATE listener.managed_view v SET paused_at = coalesce(v.paused_at, clock_timestamp()) WHERE v.id = managed.id;
    PERFORM set_config('role', previous_role, true);
    RETURN locked;
END
$function$;

-- digest_statement(view, rows): counts and hashes the rows of a query by tenant, columns as comparison_statement() takes
-- them. The hash is a sum, which knows no order.
CREATE OR REPLACE FUNCTION listener.digest_statement(view listener.managed_view, rows text) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT format('SELECT q.%I::pg_catalog.text, pg_catalog.count(*), pg_catalog.sum(pg_catalog.hashtextextended(pg_catalog.concat_ws(''|'', %s), 0)::pg_catalog.numeric) FROM %s GROUP BY 1',
        view.tenant_column,
        string_agg(CASE WHEN i.type IN ('double precision', 'real') THEN format('pg_catalog.to_char(q.%I, ''9.99999999999EEEE'')', i.attname)
                        ELSE format('pg_catalog.quote_nullable(q.%I::pg_catalog.text)', i.attname) END, ', ' ORDER BY i.attnum),
        rows)
    FROM listener.images(format('%I.%I', view.target_schema, view.target_name)::regclass,
                         ('listener.definition_' || view.id)::regclass) i
$function$;

-- whole_digests(view): by tenant, the rows of the materialized view's query computed as a whole, with its owner's rights
-- as REFRESH computes them.
CREATE OR REPLACE FUNCTION listener.whole_digests(view text) RETURNS TABLE (tenant text, held bigint, digest numeric)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp SET TimeZone = 'UTC' SET DateStyle = 'ISO, YMD' SET IntervalStyle = 'postgres'
SET extra_float_digits = 1 SET bytea_output = 'hex' SET jit = off AS $function$
DECLARE
    managed listener.managed_view := listener.find_view(view);
    adoption listener.adoption := listener.find_adoption(view, '{filling}');
    statement text := listener.digest_statement(managed, format('(%s) AS q', rtrim(adoption.definition, E'; \n')));
    previous_role text := current_setting('role');
BEGIN
    PERFORM set_config('role', adoption.owner_role, true), set_config('TimeZone', managed.time_zone, true),
            set_config('search_path', managed.search_path, true);
    RETURN QUERY EXECUTE statement;
    PERFORM pg_catalog.set_config('role', previous_role, true);
END
$function$;

-- tenant_digest(view, tenant_id): one tenant's rows of the definition, computed as refresh() computes them.
CREATE OR REPLACE FUNCTION listener.tenant_digest(view text, tenant_id text, OUT held bigint, OUT digest numeric)
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET TimeZone = 'UTC' SET DateStyle = 'ISO, YMD' SET IntervalStyle = 'postgres'
SET extra_float_digits = 1 SET bytea_output = 'hex' SET plan_cache_mode = force_custom_plan SET jit = off AS $function$
DECLARE
    managed listener.managed_view := listener.find_view(view);
    tenant_key text := listener.canonical_tenant(tenant_id, managed.tenant_type);
    statement text := listener.digest_statement(managed, format('listener.%I AS q WHERE %s', 'definition_' || managed.id,
                                                                listener.is_of_tenant(managed, 'q.')));
    callers_tenant text := current_setting('app.current_tenant_id', true);
    callers_context text := current_setting('app.execution_context', true);
    ignored text;
BEGIN
    PERFORM set_config('app.current_tenant_id', tenant_key, true),
            set_config('app.execution_context', 'worker', true),
            set_config('TimeZone', managed.time_zone, true),
            set_config('search_path', managed.search_path, true);
    EXECUTE statement INTO ignored, held, digest USING tenant_key;
    held := coalesce(held, 0);
    PERFORM pg_catalog.set_config('app.current_tenant_id', callers_tenant, true),
            pg_catalog.set_config('app.execution_context', callers_context, true);
END
$function$;

-- is_by_tenant(view): while a view is being adopted, whether it is proven that a tenant's rows depend on that tenant's rows
-- alone (see tenant_scope()), the view lists every tenant that the materialized view has, and no row-level security may
-- show the service other rows than the materialized view's owner. Costs next to nothing; where it says no,
-- differing_tenants() knows.
CREATE OR REPLACE FUNCTION listener.is_by_tenant(view text) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off AS $function$
DECLARE
    previous_role text := listener.become_owner();
    managed listener.managed_view := listener.find_view(view);
    adoption listener.adoption := listener.find_adoption(view, '{filling}');
    unlisted boolean;
    proven boolean;
BEGIN
    SELECT bool_and(s.proven) INTO proven
    FROM listener.tenant_scope(to_regclass('listener.definition_' || managed.id), managed.tenant_column, managed.tenant_type) s;
    SELECT proven AND NOT bool_or(c.relrowsecurity) INTO proven
    FROM listener.tenant_inputs(adoption.relid, managed.tenant_column) i JOIN pg_class c ON c.oid = i.relid;
    IF (SELECT c.relispopulated FROM pg_class c WHERE c.oid = adoption.relid) THEN
        EXECUTE format('SELECT EXISTS (SELECT m.%I::text FROM %s m EXCEPT SELECT listener.tenants(%L))', managed.tenant_column,
                       adoption.relid::regclass, managed.name) INTO unlisted;
    END IF;
    PERFORM set_config('role', previous_role, true);
    RETURN coalesce(proven AND NOT unlisted, false);
END
$function$;

-- differing_tenants(view): while a view is being adopted, the tenants whose rows are others when they are computed alone,
-- as refresh() does, than when the whole query is: a rank among all tenants, say, or a tenant that the tenants query does
-- not list. No row: it can be refreshed by tenant. One snapshot for all of it, since each function called is STABLE.
--   alone, whole   how many rows; they may be as many and differ
-- Costs what the materialized view's REFRESH costs, and that of refreshing each tenant.
CREATE OR REPLACE FUNCTION listener.differing_tenants(view text) RETURNS TABLE (tenant text, alone bigint, whole bigint)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET jit = off AS $function$
DECLARE
    previous_role text := listener.become_owner();
BEGIN
    RETURN QUERY
    SELECT coalesce(a.tenant, w.tenant), coalesce(a.held, 0), coalesce(w.held, 0)
    FROM listener.whole_digests(view) w
    FULL JOIN (SELECT t.tenant, d.held, d.digest FROM listener.tenants(view) AS t (tenant)
               CROSS JOIN LATERAL listener.tenant_digest(view, t.tenant) d) a ON a.tenant = w.tenant
    WHERE (coalesce(a.held, 0), a.digest) IS DISTINCT FROM (coalesce(w.held, 0), w.digest)
    ORDER BY 1;
    PERFORM set_config('role', previous_role, true);
END
$function$;

-- plan_adoption(name, key_columns, tenant_column): what adopt would do, for somebody to read; it changes nothing.
--   part   'name', 'view': of the relation, of the managed view; 'source': a table that gets capture triggers; 'beside': a statement that begin_adoption() runs after it made
--          the target; 'swap': one of finish_adoption(); 'lock': a relation that the swap locks; 'key': the key columns;
--          'loss': what the target will not have; 'time zone': what is taken where none is given
-- Raises what begin_adoption() raises for the materialized view itself.
CREATE OR REPLACE FUNCTION listener.plan_adoption(
    name text, key_columns name[] DEFAULT NULL, tenant_column name DEFAULT 'tenant_id',
    search_path text DEFAULT pg_catalog.current_setting('search_path')) RETURNS TABLE (part text, statement text)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
#variable_conflict use_variable
DECLARE
    previous_role text := listener.become_owner();
    old regclass := listener.find_materialized_view(name, search_path);
    keys name[] := listener.adopted_key(old, key_columns, tenant_column);
    new name := 'listener_new_' || old::oid;
BEGIN
    PERFORM listener.check_swappable(old), listener.check_sources(old);
    RETURN QUERY
    SELECT 'name', old::text
    UNION ALL
    SELECT 'view', listener.free_name(c.nspname, c.relname)
    FROM (SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = old) c
    UNION ALL
    SELECT 'key', k FROM unnest(keys) k
    UNION ALL
    SELECT 'source', o.name
    FROM (SELECT DISTINCT t.relation::text FROM listener.tenant_inputs(old, NULL) i CROSS JOIN LATERAL listener.capture_tables(i.relid) t
          ORDER BY 1) AS o (name)
    UNION ALL
    SELECT 'lock', l.view::text FROM listener.dependent_views(old) l
    UNION ALL
    SELECT 'lock', old::text
    UNION ALL
    SELECT 'beside', s
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    CROSS JOIN LATERAL listener.carried(old, format('%I.%I', n.nspname, new), 'r', keys, '{}',
                                        listener.only_select(listener.grants_of(old))) s
    WHERE c.oid = old
    UNION ALL
    SELECT 'swap', s FROM listener.swapping(old, new) s
    UNION ALL
    SELECT 'loss', l FROM listener.losses(old, keys) l
    UNION ALL
    SELECT 'time zone', listener.default_time_zone();
    PERFORM set_config('role', previous_role, true);
END
$function$;

-- plan_unadoption(view): the same for unadopt; 'beside' is what begin_unadoption() runs.
CREATE OR REPLACE FUNCTION listener.plan_unadoption(view text) RETURNS TABLE (part text, statement text)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    previous_role text := listener.become_owner();
    managed listener.managed_view := listener.find_view(view);
    adoption listener.adoption := listener.find_adoption(view, '{adopted,turning back}');
    target regclass := format('%I.%I', managed.target_schema, managed.target_name)::regclass;
BEGIN
    PERFORM listener.check_swappable(target);
    RETURN QUERY
    SELECT 'name', target::text
    UNION ALL
    SELECT 'view', managed.name
    UNION ALL
    SELECT 'lock', l.view::text FROM listener.dependent_views(target) l
    UNION ALL
    SELECT 'lock', target::text
    UNION ALL
    SELECT 'beside', s FROM listener.unadopting(managed, adoption) s
    UNION ALL
    SELECT 'swap', s FROM listener.swapping(target, listener.name_beside(managed)) s;
    PERFORM set_config('role', previous_role, true);
END
$function$;
