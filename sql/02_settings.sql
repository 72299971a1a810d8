-- The settings under which a definition is read and computed, so that its rows do not depend on the caller.
--
-- Of all settings of PostgreSQL 15 to 18 that a session may change, those that can change a result are pinned. Others:
--   * those that choose among plans (enable_*, *_cost, work_mem, jit_*, geqo*, parallel workers, constraint_exclusion,
--     plan_cache_mode …): all plans have one result. A query with several right results would have them under one
--     plan, too
--   * limits, logging, storage, replication, vacuum (statement_timeout, default_tablespace, synchronous_commit …): a
--     query reads them by current_setting() alone, which session_dependence() finds
--   * application_name, client_encoding: session_dependence() finds the functions that return them
--   * default_transaction_*, transaction_*: a refresh refuses every isolation level but READ COMMITTED
--   * escape_string_warning, check_function_bodies, client_min_messages, createrole_self_grant …: they change messages,
--     or commands that no query contains
--   * what only a superuser may set (lc_messages, session_replication_role, lo_compat_privileges …)

-- kept_settings(): the settings for which no one value is right: a view keeps those of the session that registers it,
-- in managed_view.settings. The time zone has a column of its own.
CREATE OR REPLACE FUNCTION listener.kept_settings() RETURNS text[]
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT '{DateStyle,IntervalStyle,array_nulls,xmloption,xmlbinary,lc_monetary,lc_numeric,lc_time,default_text_search_config,'
           'quote_all_identifiers,backslash_quote,transform_null_equals,timezone_abbreviations}'::text[]
$function$;

-- session_settings(): what this session has of these, and its time zone: name -> value.
CREATE OR REPLACE FUNCTION listener.session_settings() RETURNS jsonb
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT jsonb_object_agg(k.name, current_setting(k.name)) FROM unnest(listener.kept_settings() || '{TimeZone}') k (name)
$function$;

-- own_settings(): the settings under which the code of this schema, and the texts that query_of() writes, are read. In
-- some sessions a backslash means something else, or PostgreSQL quotes names that need no quotes.
CREATE OR REPLACE FUNCTION listener.own_settings() RETURNS jsonb
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT '{"standard_conforming_strings": "on", "quote_all_identifiers": "off", "transform_null_equals": "off",
             "array_nulls": "on", "xmloption": "content", "DateStyle": "ISO, YMD", "IntervalStyle": "postgres"}'::jsonb
$function$;

-- use_settings(settings): sets these for the rest of the transaction, name -> value. Returns what they were before, so
-- that use_settings() of that restores them. An error restores them with the transaction.
CREATE OR REPLACE FUNCTION listener.use_settings(settings jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    previous jsonb := '{}'::jsonb;
BEGIN
    IF settings <> '{}' THEN
        previous := (SELECT jsonb_object_agg(n, current_setting(n, true)) FROM jsonb_object_keys(settings) n);
        PERFORM set_config(s.key, s.value, true) FROM jsonb_each_text(settings) s;
    END IF;
    RETURN previous;
END
$function$;

-- default_setting(name): the value of a setting in a session that sets nothing itself: that of the database, else that
-- of the server. What is set for a role does not count.
CREATE OR REPLACE FUNCTION listener.default_setting(name text) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT coalesce(
        (SELECT o.option_value FROM pg_db_role_setting s LEFT JOIN pg_database d ON d.oid = s.setdatabase
         CROSS JOIN LATERAL pg_options_to_table(s.setconfig) o
         WHERE (d.datname = current_database() OR s.setdatabase = 0) AND s.setrole = 0
           AND lower(o.option_name) = lower(default_setting.name)
         ORDER BY s.setdatabase = 0 LIMIT 1),
        (SELECT g.reset_val FROM pg_settings g WHERE lower(g.name) = lower(default_setting.name)))
$function$;

-- default_settings(): session_settings() of such a session. A materialized view was computed under these.
CREATE OR REPLACE FUNCTION listener.default_settings() RETURNS jsonb
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    -- PostgreSQL writes them out: 'DMY' is a whole DateStyle together with what was in force before.
    previous jsonb := listener.use_settings(listener.session_settings() || '{"DateStyle": "ISO, MDY"}');
    defaults jsonb;
BEGIN
    PERFORM listener.use_settings((SELECT jsonb_object_agg(p.key, listener.default_setting(p.key))
        FROM jsonb_object_keys(previous) p (key)));
    defaults := listener.session_settings();
    PERFORM listener.use_settings(previous);
    RETURN defaults;
END
$function$;

-- code_of(relation): the code that a view runs: its stored query and those of the views that it reads, the conditions
-- of the policies on the tables that these read, and the functions that any of them calls.
--   place     'query', or 'policy' for what only a policy leads to
--   tree      as PostgreSQL stores it; '' for a function whose body is a text
--   source    as people write it
--   routine, language   of a function; NULL where it is not one
CREATE OR REPLACE FUNCTION listener.code_of(relation regclass)
RETURNS TABLE (place text, tree text, source text, routine oid, language name)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
SET standard_conforming_strings = on AS $function$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        WITH RECURSIVE nested (relid) AS (
            SELECT relation::oid UNION SELECT v.relid FROM listener.tenant_views(relation) v
        ), code (place, tree, source, routine, language) AS (
            SELECT 'query' COLLATE "C", r.ev_action::text COLLATE "C", listener.query_of(n.relid) COLLATE "C",
                NULL::oid, NULL::name COLLATE "C"
            FROM nested n JOIN pg_rewrite r ON r.ev_class = n.relid
            UNION
            SELECT 'policy' COLLATE "C", p.polqual::text COLLATE "C", pg_get_expr(p.polqual, p.polrelid) COLLATE "C",
                NULL::oid, NULL::name COLLATE "C"
            FROM listener.tenant_inputs(relation, NULL) i
            JOIN pg_class c ON c.oid = i.relid AND c.relrowsecurity
            JOIN pg_policy p ON p.polrelid = c.oid AND p.polqual IS NOT NULL AND p.polcmd IN ('r', '*')
            UNION
            SELECT c.place, coalesce(p.prosqlbody::text, '') COLLATE "C", coalesce(pg_get_function_sqlbody(p.oid), p.prosrc) COLLATE "C",
                   p.oid, l.lanname COLLATE "C"
            FROM code c
            CROSS JOIN LATERAL regexp_matches(c.tree, ':(?:funcid|opfuncid|aggfnoid|winfnoid) (\d+)', 'g') AS m (found)
            JOIN pg_proc p ON p.oid = m.found[1]::oid
            JOIN pg_language l ON l.oid = p.prolang
            WHERE p.pronamespace <> 'pg_catalog'::regnamespace
        )
        SELECT c.place, c.tree, c.source, c.routine, c.language FROM code c;
END
$function$;

-- session_dependence(relation): what makes the rows of a view depend on the session that computes it: in nested views,
-- in the policies of the tables that it reads, and in the functions of all these.
--   place   'query': the query, or that of a nested view; 'function': a function that the query calls; 'policy'
--   kind    'session': what no setting decides, session_user say; 'setting': a setting that is not pinned; 'unknown
--           setting': a setting whose name is not a constant; 'custom setting': a setting that can be set for the
--           computation
--   what    the function, or the setting
-- The catalog has no dependency on PostgreSQL's own functions, so stored queries are searched for their numbers, and
-- texts for their names.
CREATE OR REPLACE FUNCTION listener.session_dependence(relation regclass)
    RETURNS TABLE (place text, kind text, what text)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp SET standard_conforming_strings = on AS $function$
    WITH code AS (
        SELECT CASE WHEN c.place = 'query' AND c.routine IS NOT NULL THEN 'function' ELSE c.place END AS place, c.tree, c.routine,
               regexp_replace(c.source, '--[^\n]*|/\*.*?\*/', '', 'g') AS source
        FROM listener.code_of(relation) c
    ), telling (name) AS (
        VALUES ('system_user'), ('inet_client_addr'), ('inet_client_port'), ('inet_server_addr'), ('inet_server_port'),
               ('pg_backend_pid'), ('current_query'), ('pg_client_encoding'), ('pg_current_xact_id'), ('txid_current'),
               ('pg_current_xact_id_if_assigned'), ('txid_current_if_assigned'), ('pg_current_snapshot'), ('txid_current_snapshot'),
               ('pg_my_temp_schema'), ('pg_listening_channels'), ('pg_show_all_settings'), ('pg_trigger_depth'), ('pg_stat_get_activity')
    ), settings AS (
        SELECT c.place, m.found[1] AS name
        FROM code c CROSS JOIN LATERAL regexp_matches(
            c.source, '\mcurrent_setting\s*\(\s*(?:''([^'']+)''(?:::(?:pg_catalog\.)?text)?\s*[,)])?', 'gi') AS m (found)
    )
    SELECT DISTINCT f.place, f.kind, f.what
    FROM (
        SELECT c.place, 'session' AS kind, 'session_user' AS what FROM code c
        WHERE c.tree ~ 'SQLVALUEFUNCTION :op 12 ' OR c.tree = '' AND c.source ~* '\msession_user\M'
        UNION ALL
        SELECT c.place, 'session', p.proname || '()'
        FROM code c
        CROSS JOIN LATERAL regexp_matches(c.tree, ':funcid (\d+)', 'g') AS m (found)
        JOIN pg_proc p ON p.oid = m.found[1]::oid AND p.pronamespace = 'pg_catalog'::regnamespace
        JOIN telling t ON t.name = p.proname
        UNION ALL
        SELECT c.place, 'session', t.name || '()'
        FROM code c JOIN telling t ON c.tree = '' AND c.source ~* ('\m' || t.name || '\s*\(')
        UNION ALL
        SELECT s.place,
               CASE WHEN s.name IS NULL THEN 'unknown setting' WHEN s.name LIKE '%.%' THEN 'custom setting' ELSE 'setting' END,
               coalesce(lower(s.name), 'current_setting(…)')
        FROM settings s
        -- Each refresh sets the tenant and the context. What is pinned, or only the server can change, is the same in
        -- every session.
        WHERE s.name IS NULL
           OR lower(s.name) NOT IN ('app.current_tenant_id', 'app.execution_context', 'search_path', 'timezone', 'extra_float_digits',
                                    'bytea_output', 'standard_conforming_strings', 'row_security', 'gin_fuzzy_search_limit',
                                    'synchronize_seqscans', 'restrict_nonsystem_relation_kind', 'jit', 'transaction_isolation')
              AND lower(s.name) NOT IN (SELECT lower(k.name) FROM unnest(listener.kept_settings()) k (name))
              AND NOT EXISTS (SELECT FROM pg_settings g WHERE lower(g.name) = lower(s.name)
                                                          AND g.context IN ('internal', 'postmaster', 'sighup'))
        UNION ALL
        -- What an extension lets sessions set, pg_trgm.similarity_threshold say, decides on what its operators find.
        SELECT c.place, 'custom setting', g.name
        FROM code c JOIN pg_proc p ON p.oid = c.routine AND p.probin IS NOT NULL
        JOIN pg_settings g ON g.context = 'user' AND split_part(g.name, '.', 1) = regexp_replace(p.probin, '^.*/', '')
            AND g.name LIKE '%.%'
    ) f
    ORDER BY 1, 2, 3
$function$;

-- session_refusal(relation): for what a view is refused: what makes its rows depend on the session, cannot be set for
-- the computation, and is not in a policy. NULL: nothing.
CREATE OR REPLACE FUNCTION listener.session_refusal(relation regclass) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT string_agg(DISTINCT d.what, ', ') FROM listener.session_dependence(relation) d
    WHERE d.place <> 'policy' AND (d.kind IN ('session', 'setting') OR (d.kind = 'unknown setting' AND d.place = 'query'))
$function$;

-- check_session(name, relations): raises LSN03 where session_refusal() says something of one of these views; warns of
-- what else may make rows depend on the session.
-- Returns the custom settings that the views read, name -> value: the value of this session, else of the database, else
-- ''.
CREATE OR REPLACE FUNCTION listener.check_session(name text, relations regclass[]) RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    found record;
    custom jsonb := '{}'::jsonb;
    value text;
    refused text := (SELECT string_agg(listener.session_refusal(r), ', ') FROM unnest(relations) r);
BEGIN
    IF refused IS NOT NULL THEN
        RAISE EXCEPTION 'the rows of % would depend on the session that computes them: it reads %', check_session.name, refused
            USING ERRCODE = 'LSN03', HINT = 'Leave it out, or store the value in a column. current_user is allowed: it is the same role for '
                'every refresh. So is a setting of your own whose name is a constant: current_setting(''app.…'', true).';
    END IF;
    FOR found IN
        SELECT DISTINCT d.place, d.kind, d.what FROM unnest(relations) r (relation)
        CROSS JOIN LATERAL listener.session_dependence(r.relation) d ORDER BY 1, 2, 3
    LOOP
        IF found.kind = 'custom setting' THEN
            value := coalesce(nullif(current_setting(found.what, true), ''), listener.default_setting(found.what), '');
            custom := custom || jsonb_build_object(found.what, value);
            IF found.what NOT IN (SELECT g.name FROM pg_settings g) THEN
                RAISE NOTICE '% is computed with % = %, whatever a caller sets', check_session.name, found.what, quote_literal(value);
            END IF;
        ELSIF found.place = 'policy' THEN
            RAISE WARNING 'a policy of a table that % reads may show each session other rows: it reads %', check_session.name, found.what
                USING HINT = 'Compare with current_user, which is the same role for every refresh, or with app.execution_context.';
        ELSE
            RAISE WARNING 'a function that % calls reads a setting whose name is not a constant', check_session.name
                USING HINT = 'Unless that setting is app.current_tenant_id, the rows depend on the session that refreshes them. '
                    'Write the name of the setting in the function.';
        END IF;
    END LOOP;
    RETURN custom;
END
$function$;

-- reads_locale(relation): whether the rows of a view may depend on lc_*: it formats or reads text by a template, or
-- money; or it calls a function in a language other than SQL and PL/pgSQL, which is not searched.
CREATE OR REPLACE FUNCTION listener.reads_locale(relation regclass) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp SET standard_conforming_strings = on AS $function$
    SELECT EXISTS (
        SELECT FROM listener.code_of(relation) c
        WHERE c.language NOT IN ('sql', 'plpgsql')
            OR c.source ~* '\m(to_char|to_number|to_date|to_timestamp|money|lc_(monetary|numeric|time))\M'
           OR c.tree ~ ':[a-z]*type (790|791)\M')
$function$;

-- reads_search_configuration(relation): whether the rows of a view may depend on default_text_search_config.
CREATE OR REPLACE FUNCTION listener.reads_search_configuration(relation regclass) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp SET standard_conforming_strings = on AS $function$
    SELECT EXISTS (
        SELECT FROM listener.code_of(relation) c
        WHERE c.language NOT IN ('sql', 'plpgsql')
           OR c.source ~* '@@|tsquery|tsvector|\m(json(b)?_to_tsvector|array_to_tsvector|ts_headline|get_current_ts_config|default_text_search_config)\M')
$function$;

-- pinned_settings(view): the settings that the functions of a view pin in SET clauses, each with its value: that of the
-- registration, where it has no other here. search_path is a list of quoted names.
CREATE OR REPLACE FUNCTION listener.pinned_settings(view listener.managed_view) RETURNS TABLE (name text, value text)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
#variable_conflict use_column
DECLARE
    definition regclass := to_regclass('listener.definition_' || view.id);
    -- What a definition does not read is pinned to a value that every server has: not every one has each locale.
    by_locale boolean := definition IS NULL OR listener.reads_locale(definition);
    by_configuration boolean := definition IS NULL OR listener.reads_search_configuration(definition);
BEGIN
    RETURN QUERY
        SELECT s.name, coalesce(s.own, view.settings ->> s.name)
        FROM (VALUES
            ('search_path', view.search_path),
            ('TimeZone', view.time_zone),
            ('DateStyle', NULL),
            ('IntervalStyle', NULL),
            ('array_nulls', NULL),
            ('xmloption', NULL),
            ('xmlbinary', NULL),
            ('quote_all_identifiers', NULL),
            ('backslash_quote', NULL),
            ('transform_null_equals', NULL),
            ('lc_monetary', CASE WHEN NOT by_locale THEN 'C' END),
            ('lc_numeric', CASE WHEN NOT by_locale THEN 'C' END),
            ('lc_time', CASE WHEN NOT by_locale THEN 'C' END),
            ('default_text_search_config', CASE WHEN NOT by_configuration THEN 'pg_catalog.simple' END),
            ('extra_float_digits', '1'),
            ('bytea_output', 'hex'),
            ('standard_conforming_strings', 'on'),
            ('row_security', 'on'),
            -- Above 0 it leaves rows out.
            ('gin_fuzzy_search_limit', '0'),
            -- It decides in which order rows are read.
            ('synchronize_seqscans', 'off'),
            ('restrict_nonsystem_relation_kind', ''),
            ('jit', 'off')
        ) AS s (name, own)
        -- Not every minor release of PostgreSQL 15 to 17 has each of them.
        WHERE current_setting(s.name, true) IS NOT NULL;
END
$function$;

-- custom_settings(view): name -> value of the settings that no SET clause can pin, where the session has another value
-- than the view. They are set for the computation; afterwards the caller's values are restored.
--   names with a dot   only a superuser may put a setting that no extension defines into a SET clause
--   timezone_abbreviations   PostgreSQL reads a file each time that a function pins it, which takes 40 µs
CREATE OR REPLACE FUNCTION listener.custom_settings(view listener.managed_view) RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    RETURN (
        SELECT coalesce(jsonb_object_agg(s.key, s.value), '{}')
        FROM (SELECT 'timezone_abbreviations' AS key, view.settings ->> 'timezone_abbreviations' AS value
              UNION ALL
              SELECT o.key, o.value FROM jsonb_each_text(view.settings) o WHERE o.key LIKE '%.%') s
        WHERE current_setting(s.key, true) IS DISTINCT FROM s.value);
END
$function$;

-- reading_settings(view): the settings under which the texts of a view's queries are read. A literal such as
-- '2026-03-01' becomes a time when it is read, not when it is computed.
CREATE OR REPLACE FUNCTION listener.reading_settings(view listener.managed_view) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT jsonb_build_object('TimeZone', view.time_zone, 'standard_conforming_strings', 'on')
           || (SELECT jsonb_object_agg(k.name, view.settings -> k.name)
               FROM unnest('{DateStyle,IntervalStyle,timezone_abbreviations,array_nulls,xmloption,lc_monetary,backslash_quote,'
                           'transform_null_equals}'::text[]) AS k (name))
$function$;

-- check_written(relation, query): raises LSN03 where the query of a materialized view, as query_of() writes it, would
-- be read as another one under the database's settings.
CREATE OR REPLACE FUNCTION listener.check_written(relation regclass, query text) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    IF listener.default_setting('array_nulls') = 'off' AND query ~* '[{,]NULL[,}]' THEN
        RAISE EXCEPTION 'the query of % holds an array with a NULL, which the database reads as the text NULL (array_nulls is off)', relation
            USING ERRCODE = 'LSN03', HINT = format('ALTER DATABASE %I SET array_nulls = on; or write ARRAY[…] in the query.', current_database());
    END IF;
END
$function$;

-- registered_settings(view): all settings of a view, for a session that registers or fills another one like it.
CREATE OR REPLACE FUNCTION listener.registered_settings(view listener.managed_view) RETURNS jsonb
LANGUAGE sql VOLATILE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT listener.default_settings() || listener.reading_settings(view) || view.settings
$function$;
