-- The settings that a definition is computed under, so that its rows depend on the view and on nothing that the caller has set.
--
-- All settings of PostgreSQL 15 to 18 that a session may change were gone through. Pinned are those that reach a result; these
-- are left out:
--   plans (enable_*, *_cost, work_mem, jit_*, geqo*, parallel workers, constraint_exclusion, plan_cache_mode …): they choose among
--   ways to one result. Where a query has more than one right result, pinning them would not make it have one.
--   limits, logging, storage, replication, vacuum (statement_timeout, default_tablespace, synchronous_commit …): no expression
--   reads them but current_setting(), which session_dependence() finds.
--   application_name, client_encoding: they say who is connected and how to speak to that client. session_dependence() finds
--   the functions that return them.
--   default_transaction_*, transaction_*: a refresh refuses every isolation level but READ COMMITTED.
--   escape_string_warning, check_function_bodies, client_min_messages, createrole_self_grant …: they decide on messages, or on
--   commands that no query contains.
--   those that only a superuser may set (lc_messages, session_replication_role, lo_compat_privileges …): no caller has set them.
-- timezone_abbreviations reaches a result too, but PostgreSQL reads a file each time that a function pins it (40 µs):
-- custom_settings() names it where the caller has another value.

-- default_setting(name): the value of a setting in a session that sets nothing itself: the database's, else the server's. One that
-- ALTER ROLE gave the role that asks is not taken for it.
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

-- pinned_settings(view): the settings that a function of the view pins in SET clauses, each with its value. Those of the
-- registration count; else the value that has always been pinned, or PostgreSQL's default.
--   search_path   a list of quoted names, all others are plain values
-- synchronize_seqscans is among them since it changes the order in which rows are read. A gin_fuzzy_search_limit drops rows.
CREATE OR REPLACE FUNCTION listener.pinned_settings(view listener.managed_view) RETURNS TABLE (name text, value text)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT s.name, coalesce(s.own, view.settings ->> s.name, s.fallback)
    FROM (VALUES
        ('search_path', view.search_path, NULL),
        ('TimeZone', view.time_zone, NULL),
        ('DateStyle', NULL, 'ISO, YMD'),
        ('IntervalStyle', NULL, 'postgres'),
        ('extra_float_digits', NULL, '1'),
        ('bytea_output', NULL, 'hex'),
        ('array_nulls', NULL, 'on'),
        ('xmloption', NULL, 'content'),
        ('xmlbinary', NULL, 'base64'),
        ('lc_monetary', NULL, listener.default_setting('lc_monetary')),
        ('lc_numeric', NULL, listener.default_setting('lc_numeric')),
        ('lc_time', NULL, listener.default_setting('lc_time')),
        ('default_text_search_config', NULL, listener.default_setting('default_text_search_config')),
        ('quote_all_identifiers', NULL, 'off'),
        ('standard_conforming_strings', NULL, 'on'),
        ('backslash_quote', NULL, 'safe_encoding'),
        ('transform_null_equals', NULL, 'off'),
        ('row_security', 'on', NULL),
        ('gin_fuzzy_search_limit', '0', NULL),
        ('synchronize_seqscans', 'off', NULL),
        ('restrict_nonsystem_relation_kind', '', NULL),
        ('jit', 'off', NULL)
    ) AS s (name, own, fallback)
    -- Not every minor release of PostgreSQL 15 to 17 has each of them.
    WHERE current_setting(s.name, true) IS NOT NULL
$function$;

-- custom_settings(view): the settings that a view is computed under and that no SET clause can pin, those of them that the session
-- has otherwise: name -> value. set_config() sets them for the computation, and the caller's are given back afterwards.
CREATE OR REPLACE FUNCTION listener.custom_settings(view listener.managed_view) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT coalesce(jsonb_object_agg(s.key, s.value), '{}')
    FROM (SELECT 'timezone_abbreviations' AS key, coalesce(view.settings ->> 'timezone_abbreviations', 'Default') AS value
          UNION ALL
          -- A setting that no server defines has a dot in its name.
          SELECT o.key, o.value FROM jsonb_each_text(view.settings) o WHERE o.key LIKE '%.%') s
    WHERE current_setting(s.key, true) IS DISTINCT FROM s.value
$function$;
