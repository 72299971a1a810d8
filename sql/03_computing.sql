-- Which role computes. A definition, a policy of a table that it reads, a function that either calls, a trigger or a
-- check of a target: all of this is code of a team, and runs with the rights of the role that computes. So only the
-- view's compute role runs it: a role that cannot log in, and that may read the team's sources and write its targets.
--
-- Four things keep such code within these rights:
--   * It runs in SECURITY DEFINER functions that the compute role owns. In such a function PostgreSQL refuses SET ROLE
--     and SET SESSION AUTHORIZATION, so the code cannot become the session's user. (It could after a SET ROLE, by RESET
--     ROLE; so nothing here sets a role and then plans or evaluates.)
--   * The owner of a function may alter it: to SECURITY INVOKER, say, and then it would run with the rights of its next
--     caller. So these functions are in the schema listener_private, which only its owner may use: a statement that
--     alters a function has to name it, and the compute role cannot.
--   * What only looks (compares, lists, plans) runs in a subtransaction that is rolled back. So no setting, temporary
--     object or row of such code is left in the session of an administrator.
--   * A prepared statement, a session's advisory lock, a cursor WITH HOLD and a temporary object outlive the code that
--     made them, and the first two also outlive a rollback. A later statement that uses such a name would run that code
--     with the rights of the session. So leave_nothing() removes them wherever such code has run.
--
-- Each view has difference_<id>, which writes (see 10_difference.sql), and evaluate_<id> and plan_<id>, which only
-- look.

-- set_clauses(settings): the SET clauses of a function, from name -> value. The value of search_path is a list of
-- quoted names; quoted as a whole, it would be one name.
CREATE OR REPLACE FUNCTION listener.set_clauses(settings jsonb) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT string_agg(CASE s.key WHEN 'search_path' THEN 'SET search_path = ' || s.value
                                 ELSE format('SET %I = %L', s.key, s.value) END, ' ' ORDER BY s.key)
    FROM jsonb_each_text(settings) s
$function$;

-- settings_of(view): pinned_settings() by name.
CREATE OR REPLACE FUNCTION listener.settings_of(view listener.managed_view) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT jsonb_object_agg(s.name, s.value) FROM listener.pinned_settings(view) s
$function$;

-- evaluating_body(): the body of a function (statement text, tenant text) RETURNS jsonb. It evaluates a statement that
-- returns one row of one jsonb column, for the tenant $1 (NULL: that of the session), and leaves nothing behind. It
-- runs under the search_path of the view, so everything in it is qualified.
CREATE OR REPLACE FUNCTION listener.evaluating_body() RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT $body$
DECLARE
    computed pg_catalog.jsonb;
    is_done pg_catalog.bool;
BEGIN
    BEGIN
        IF tenant IS NOT NULL THEN
            PERFORM pg_catalog.set_config('app.current_tenant_id', tenant, true),
                    pg_catalog.set_config('app.execution_context', 'worker', true);
        END IF;
        EXECUTE statement INTO computed USING tenant;
        is_done := true;
        RAISE EXCEPTION USING ERRCODE = 'LSN00', MESSAGE = 'what was evaluated leaves nothing behind';
    EXCEPTION WHEN SQLSTATE 'LSN00' THEN
        IF is_done IS NOT TRUE THEN
            RAISE;
        END IF;
    END;
    RETURN computed;
END
$body$
$function$;

-- planning_body(): the body of a function (preparation text[], questions jsonb) RETURNS jsonb. It runs the statements
-- of `preparation`, plans each question, and leaves nothing behind.
--   questions   [{"query", "path": the search_path, "settings": {name: value}, "opens": true to open it as a cursor
--               instead}]
-- Returns an array: for each question its plan, or {"error", "sqlstate"}; or one such object where the preparation
-- failed.
-- Each branch sets the search path as its last step: what this body evaluates after that would be resolved in `path`.
CREATE OR REPLACE FUNCTION listener.planning_body() RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT $body$
DECLARE
    step text;
    question jsonb;
    query text;
    explain text;
    opened refcursor;
    plan json;
    answer jsonb;
    answers jsonb := '[]';
    is_planned boolean;
    is_done boolean;
BEGIN
    BEGIN
        FOREACH step IN ARRAY preparation LOOP
            EXECUTE step;
            PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
        END LOOP;
        FOR question IN SELECT q.item FROM jsonb_array_elements(questions) WITH ORDINALITY AS q (item, ord) ORDER BY q.ord LOOP
            query := question ->> 'query';
            explain := 'EXPLAIN (VERBOSE, FORMAT JSON, COSTS OFF) ' || query;
            is_planned := false;
            BEGIN
                PERFORM set_config(s.key, s.value, true) FROM jsonb_each_text(question -> 'settings') s;
                IF (question ->> 'opens')::boolean THEN
                    PERFORM set_config('search_path', question ->> 'path', true);
                    OPEN opened FOR EXECUTE query;
                ELSE
                    PERFORM set_config('search_path', question ->> 'path', true);
                    EXECUTE explain INTO plan;
                END IF;
                is_planned := true;
                RAISE EXCEPTION USING ERRCODE = 'LSN00', MESSAGE = 'what was planned leaves nothing behind';
            EXCEPTION WHEN OTHERS THEN
                answer := CASE WHEN is_planned THEN coalesce(to_jsonb(plan), 'null')
                               ELSE jsonb_build_object('error', SQLERRM, 'sqlstate', SQLSTATE) END;
            END;
            answers := answers || jsonb_build_array(answer);
        END LOOP;
        is_done := true;
        RAISE EXCEPTION USING ERRCODE = 'LSN00', MESSAGE = 'what was prepared leaves nothing behind';
    EXCEPTION WHEN OTHERS THEN
        IF is_done IS NOT TRUE THEN
            RETURN jsonb_build_object('error', SQLERRM, 'sqlstate', SQLSTATE);
        END IF;
    END;
    RETURN answers;
END
$body$
$function$;

-- planning_settings(): the settings for a plan that can be read: each condition stands where it is applied, each table
-- has one scan, and no worker is parallel.
CREATE OR REPLACE FUNCTION listener.planning_settings() RETURNS jsonb
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT '{"search_path": "pg_catalog, pg_temp", "jit": "off", "standard_conforming_strings": "on", "quote_all_identifiers": "off",
             "max_parallel_workers_per_gather": "0", "enable_partition_pruning": "off", "constraint_exclusion": "off",
             "enable_partitionwise_join": "off", "enable_partitionwise_aggregate": "off", "enable_memoize": "off",
             "work_mem": "64kB", "hash_mem_multiplier": "1", "client_min_messages": "warning", "enable_seqscan": "on",
             "enable_indexscan": "off", "enable_indexonlyscan": "off", "enable_bitmapscan": "off"}'::jsonb
$function$;

-- function_digest(routine): changes when somebody alters a function: its body, SECURITY DEFINER, settings, volatility
-- or owner.
CREATE OR REPLACE FUNCTION listener.function_digest(routine regprocedure) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT md5(concat_ws(E'\n', p.prosrc, p.prosqlbody, p.prosecdef, p.proconfig, p.provolatile, p.proleakproof, p.proowner))
    FROM pg_proc p WHERE p.oid = routine
$function$;

-- make_private(role, signature, arguments, volatility, settings, body): makes or replaces a function of
-- listener_private that `role` owns, and that the owner of this schema may call. `role` gets CREATE on the schema for
-- the moment of ALTER OWNER.
CREATE OR REPLACE FUNCTION listener.make_private(
    role name, signature text, arguments text, volatility text, settings jsonb, body text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    owner_role name := (SELECT i.owner_role FROM listener.installation i);
    routine regprocedure;
    is_handed_over boolean;
BEGIN
    -- As a literal, since a column's name in the body may hold the end of a dollar quote.
    EXECUTE format('CREATE OR REPLACE FUNCTION listener_private.%s LANGUAGE plpgsql %s SECURITY DEFINER %s AS %L',
                   arguments, volatility, listener.set_clauses(settings), body);
    routine := to_regprocedure('listener_private.' || signature);
    EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', routine);
    SELECT p.proowner = to_regrole(quote_ident(role)) INTO is_handed_over FROM pg_proc p WHERE p.oid = routine;
    IF NOT is_handed_over THEN
        EXECUTE format('GRANT CREATE ON SCHEMA listener_private TO %I', role);
        EXECUTE format('ALTER FUNCTION %s OWNER TO %I', routine, role);
        EXECUTE format('REVOKE CREATE ON SCHEMA listener_private FROM %I', role);
    END IF;
    -- The owner may cease to be a member of that role.
    EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %I', routine, owner_role);
    INSERT INTO listener.installed_function (signature, digest) VALUES (routine::text, listener.function_digest(routine))
    ON CONFLICT ON CONSTRAINT installed_function_pkey DO UPDATE SET digest = excluded.digest;
END
$function$;

-- generate_computing(view): makes or replaces evaluate_<id> and plan_<id> of a view. A statement that writes rows never
-- gets parallel workers, so evaluate_<id>, which compares with these rows, gets none either: with them ties and sums of
-- floats could come out differently.
CREATE OR REPLACE FUNCTION listener.generate_computing(view listener.managed_view) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    role name := listener.compute_role_of(view);
    settings jsonb := listener.settings_of(view);
BEGIN
    PERFORM listener.make_private(role, format('evaluate_%s(text, text)', view.id),
                format('evaluate_%s(statement text, tenant text) RETURNS jsonb', view.id), 'STABLE',
                settings || '{"max_parallel_workers_per_gather": "0"}', listener.evaluating_body()),
            listener.make_private(role, format('plan_%s(text[], jsonb)', view.id),
                format('plan_%s(preparation text[], questions jsonb) RETURNS jsonb', view.id), 'VOLATILE',
                settings || listener.planning_settings(), listener.planning_body());
END
$function$;

-- drop_computing(view_id): drops the functions of a view in listener_private.
CREATE OR REPLACE FUNCTION listener.drop_computing(view_id integer) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    routine regprocedure;
BEGIN
    FOR routine IN
        SELECT p.oid FROM pg_proc p
        WHERE p.pronamespace = 'listener_private'::regnamespace
          AND p.proname IN ('difference_' || view_id, 'evaluate_' || view_id, 'plan_' || view_id)
    LOOP
        DELETE FROM listener.installed_function f WHERE f.signature = routine::text;
        EXECUTE format('DROP FUNCTION %s', routine);
    END LOOP;
END
$function$;

-- evaluate(view, statement, tenant): the one jsonb that a statement returns, computed for a tenant ($1) as refresh()
-- computes: as the view's compute role, under the view's settings. It leaves nothing behind, and has the snapshot of
-- the calling statement. The functions of this schema that run as its owner read a definition, a source or a target by
-- it alone.
CREATE OR REPLACE FUNCTION listener.evaluate(view listener.managed_view, statement text, tenant text) RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    callers_tenant text := current_setting('app.current_tenant_id', true);
    computed jsonb;
    previous jsonb := listener.use_settings(listener.custom_settings(view));
    call text := format('SELECT listener_private.%I($1, $2)', 'evaluate_' || view.id);
BEGIN
    BEGIN
        EXECUTE call INTO computed USING statement, tenant;
    EXCEPTION WHEN OTHERS OR query_canceled OR assert_failure THEN
        PERFORM listener.leave_nothing(NULL);
        RAISE;
    END;
    PERFORM listener.leave_nothing(NULL), listener.use_settings(previous), listener.give_back_tenant(callers_tenant);
    RETURN computed;
END
$function$;

-- plan(view_id, preparation, questions): runs planning_body() as the view's compute role.
CREATE OR REPLACE FUNCTION listener.plan(view_id integer, preparation text[], questions jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    callers_tenant text := current_setting('app.current_tenant_id', true);
    answers jsonb;
    call text := format('SELECT listener_private.%I($1, $2)', 'plan_' || view_id);
BEGIN
    BEGIN
        EXECUTE call INTO answers USING preparation, questions;
    EXCEPTION WHEN OTHERS OR query_canceled OR assert_failure THEN
        PERFORM listener.leave_nothing(NULL);
        RAISE;
    END;
    PERFORM listener.leave_nothing(NULL), listener.give_back_tenant(callers_tenant);
    RETURN answers;
END
$function$;

-- check_may_act(role): raises LSN03 where the calling role may not run a query as `role`. A superuser may, and the
-- members of `role`.
CREATE OR REPLACE FUNCTION listener.check_may_act(role name) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    IF to_regrole(quote_ident(role)) IS NULL THEN
        RAISE EXCEPTION 'there is no role %', role USING ERRCODE = 'LSN03';
    ELSIF current_user <> role AND NOT pg_has_role(current_user, role, CASE
            WHEN current_setting('server_version_num')::integer < 160000 THEN 'MEMBER' ELSE 'SET' END) THEN
        RAISE EXCEPTION 'role % may not run a query as %', current_user, role USING ERRCODE = 'LSN03',
            -- With the rights of a team the service could write its sources.
            HINT = format('Run it as a member of %I', role)
                || CASE WHEN EXISTS (SELECT FROM listener.installation i WHERE i.service_role = current_user) THEN '.'
                        ELSE format(', or: GRANT %I TO %I.', role, current_user) END;
    ELSIF NOT has_database_privilege(role, current_database(), 'TEMPORARY') THEN
        RAISE EXCEPTION 'role % may not create temporary objects in the database %', role, current_database() USING ERRCODE = 'LSN03',
            HINT = format('GRANT TEMPORARY ON DATABASE %I TO %I;', current_database(), role);
    END IF;
END
$function$;

-- evaluate_as(role, statement, tenant, settings, calling), plan_as(role, preparation, questions, settings): as
-- evaluate() and plan(), for a query of no managed view: that of a materialized view, say, as its owner. The function
-- that runs it is temporary, belongs to the role, and is gone with a subtransaction after this one call.
--   settings   name -> value, for SET clauses
--   calling    a statement of the caller's own that calls this function, and computes more in the same snapshot
-- Raises LSN03 where the caller may not act as the role, and what the statement raises.
CREATE OR REPLACE FUNCTION listener.evaluate_as(
    role name, statement text, tenant text, settings jsonb DEFAULT '{}',
    calling text DEFAULT 'SELECT pg_temp.listener_evaluate($1, $2)') RETURNS jsonb
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    callers_tenant text := current_setting('app.current_tenant_id', true);
    computed jsonb;
    is_done boolean;
BEGIN
    PERFORM listener.check_may_act(role);
    BEGIN
        EXECUTE format('CREATE FUNCTION pg_temp.listener_evaluate(statement text, tenant text) RETURNS jsonb
                        LANGUAGE plpgsql STABLE SECURITY DEFINER %s AS %L',
                       listener.set_clauses('{"search_path": "pg_catalog, pg_temp", "jit": "off"}' || settings),
                       listener.evaluating_body());
        EXECUTE format('ALTER FUNCTION pg_temp.listener_evaluate(text, text) OWNER TO %I', role);
        EXECUTE calling INTO computed USING statement, tenant;
        is_done := true;
        RAISE EXCEPTION USING ERRCODE = 'LSN00', MESSAGE = 'the function goes';
    EXCEPTION WHEN OTHERS OR query_canceled OR assert_failure THEN
        PERFORM listener.leave_nothing(NULL);
        IF is_done IS NOT TRUE OR SQLSTATE <> 'LSN00' THEN
            RAISE;
        END IF;
    END;
    PERFORM listener.give_back_tenant(callers_tenant);
    RETURN computed;
END
$function$;
CREATE OR REPLACE FUNCTION listener.plan_as(role name, preparation text[], questions jsonb, settings jsonb DEFAULT '{}')
    RETURNS jsonb
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    callers_tenant text := current_setting('app.current_tenant_id', true);
    answers jsonb;
    is_done boolean;
BEGIN
    PERFORM listener.check_may_act(role);
    BEGIN
        EXECUTE format('CREATE FUNCTION pg_temp.listener_plan(preparation text[], questions jsonb) RETURNS jsonb
                        LANGUAGE plpgsql VOLATILE SECURITY DEFINER %s AS %L',
                       listener.set_clauses(settings || listener.planning_settings()), listener.planning_body());
        EXECUTE format('ALTER FUNCTION pg_temp.listener_plan(text[], jsonb) OWNER TO %I', role);
        EXECUTE format('SELECT pg_temp.%I($1, $2)', 'listener_plan') INTO answers USING preparation, questions;
        is_done := true;
        RAISE EXCEPTION USING ERRCODE = 'LSN00', MESSAGE = 'the function goes';
    EXCEPTION WHEN OTHERS OR query_canceled OR assert_failure THEN
        PERFORM listener.leave_nothing(NULL);
        IF is_done IS NOT TRUE OR SQLSTATE <> 'LSN00' THEN
            RAISE;
        END IF;
    END;
    PERFORM listener.give_back_tenant(callers_tenant);
    RETURN answers;
END
$function$;
