-- What makes the result of a query change although nobody writes.

-- time_dependence(relation): the functions by which the result of a view or a materialized view depends on more than its
-- tables, through nested views and through the functions that it calls.
--   dependence   'time': now() and the like, no write announces what changes by itself; 'time zone': what a day is, say, is the
--                session's; 'volatile': it is another one at each refresh, as far as the function's own declaration says
--   what         the function
--   max_age      of 'time': how often each key should be refreshed at least. An hour where the time counts by days, a minute else
-- The catalog has no dependency on PostgreSQL's own functions, so the stored query is searched for their numbers; and the text
-- of a function in another language than that of queries, for their names.
CREATE OR REPLACE FUNCTION listener.time_dependence(relation regclass)
RETURNS TABLE (dependence text, what text, max_age interval)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        WITH code AS MATERIALIZED (
            SELECT c.tree, c.source FROM listener.code_of(relation) c
            WHERE c.place = 'query' AND (c.routine IS NULL OR c.language IN ('sql', 'plpgsql'))
        ), called AS (
            SELECT DISTINCT p.oid, p.proname, p.provolatile, p.pronargs, c.source, p.pronamespace = 'pg_catalog'::regnamespace AS builtin,
                   p.pronamespace = 'pg_catalog'::regnamespace
                   AND (p.proname IN ('now', 'transaction_timestamp', 'statement_timestamp', 'clock_timestamp', 'timeofday')
                        OR (p.proname = 'age' AND p.pronargs = 1 AND p.prorettype = 'interval'::regtype)) AS tells_time
            FROM code c
            CROSS JOIN LATERAL regexp_matches(c.tree, ':(?:funcid|opfuncid|aggfnoid|winfnoid) (\d+)', 'g') AS m (found)
            JOIN pg_proc p ON p.oid = m.found[1]::oid
        ), timed AS (
            SELECT c.proname::text || '()' AS what, c.source, c.proname = 'age' AS by_days FROM called c WHERE c.tells_time
            UNION
            SELECT (ARRAY['CURRENT_DATE', 'CURRENT_TIME', 'CURRENT_TIME', 'CURRENT_TIMESTAMP', 'CURRENT_TIMESTAMP', 'LOCALTIME',
                          'LOCALTIME', 'LOCALTIMESTAMP', 'LOCALTIMESTAMP'])[m.found[1]::integer + 1], c.source, m.found[1] = '0'
            FROM code c CROSS JOIN LATERAL regexp_matches(c.tree, 'SQLVALUEFUNCTION :op ([0-8]) ', 'g') AS m (found)
            UNION
            SELECT CASE WHEN m.found[1] IS NOT NULL THEN lower(m.found[1]) || '()' ELSE upper(m.found[2]) END, c.source,
                   lower(m.found[2]) IS NOT DISTINCT FROM 'current_date'
            FROM code c
            CROSS JOIN LATERAL regexp_matches(
                regexp_replace(c.source, '--[^\n]*|/\*.*?\*/', '', 'g'),
                '\m(?:(now|transaction_timestamp|statement_timestamp|clock_timestamp|timeofday)\s*\(|'
                '(current_date|current_time|current_timestamp|localtime|localtimestamp)\M)', 'gi') AS m (found)
            WHERE c.tree = ''
        )
        SELECT 'time', t.what,
               min(CASE WHEN t.by_days
                          -- What is left when each that is cut to a day, or more, is taken away.
                          OR regexp_replace(t.source,
                              '\(*' || g.call || '( AT TIME ZONE [^)]*)?\)*::date'
                              '|date_trunc\(''(day|week|month|quarter|year|decade|century|millennium)''(::text)?, \(?' || g.call, '', 'gi')
                             !~* g.call
                        THEN interval '1 hour' ELSE interval '1 min' END)
        FROM timed t CROSS JOIN LATERAL (SELECT '\m' || replace(replace(t.what, '(', '\('), ')', '\)')) AS g (call)
        GROUP BY t.what
        UNION ALL
        SELECT 'time zone', c.oid::regprocedure::text, NULL
        FROM called c JOIN pg_proc p ON p.oid = c.oid
        WHERE c.builtin AND NOT c.tells_time AND c.provolatile = 's'
          AND ARRAY[p.prorettype] || p.proargtypes::oid[] && '{timestamptz,timetz}'::regtype[]::oid[]
        GROUP BY c.oid
        UNION ALL
        SELECT 'volatile', c.oid::regprocedure::text, NULL
        FROM called c WHERE c.provolatile = 'v' AND NOT c.tells_time GROUP BY c.oid
        ORDER BY 1, 2;
END
$function$;

-- warn_of_definition(view, definition): warns of what is no error and will cause trouble: a query that is not proven to
-- be tenant-local, a source that would be read whole for each tenant, rows without a tenant, a result that is not
-- determined or changes with no write. Each warning has a hint.
CREATE OR REPLACE FUNCTION listener.warn_of_definition(view listener.managed_view, definition regclass) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    found record;
    proposed interval;
    timed text;
    untenanted bigint := listener.untenanted_rows(view);
BEGIN
    IF untenanted > 0 THEN
        RAISE WARNING '% no tenant (% is NULL%), and % never has them',
            CASE untenanted WHEN 1 THEN '1 row has' ELSE untenanted || ' rows have' END, quote_ident(view.tenant_column),
            CASE view.tenant_type WHEN 'text' THEN ' or ''''' ELSE '' END, view.name
            USING HINT = 'Give these rows a tenant; or leave them out in the query; or register it with tenant_column => NULL, which '
                         'keeps them and refreshes the view as a whole.';
    END IF;
    FOR found IN SELECT u.* FROM listener.undetermined(definition) u LOOP
        RAISE WARNING '% may have more than one right result, and change although nothing was written: %', view.name, found.what
            USING HINT = upper(left(found.fix, 1)) || substr(found.fix, 2) || '.';
    END LOOP;
    IF view.strategy = 'tenant' THEN
        FOR found IN
            SELECT DISTINCT s.source, s.proven, s.advice
            FROM listener.tenant_scope(definition, view.tenant_column, view.tenant_type) s
            -- What functions read, depends_on said.
            WHERE s.advice IS NOT NULL AND (s.source IS NOT NULL OR NOT EXISTS (SELECT FROM listener.hiding_functions(definition)))
        LOOP
            IF found.proven THEN
                RAISE WARNING '%', found.advice;
            ELSE
                RAISE WARNING 'a tenant''s rows of % are not proven to depend on that tenant''s rows of % alone: %', view.name,
                    coalesce(found.source::text, 'its sources'), found.advice;
            END IF;
        END LOOP;
    END IF;
    SELECT min(t.max_age), string_agg(t.what, ', ') INTO proposed, timed
    FROM listener.time_dependence(definition) t WHERE t.dependence = 'time';
    IF timed IS NOT NULL AND view.max_age IS NULL THEN
        RAISE WARNING '% depends on the time (%), and no write announces what changes by itself', view.name, timed
            USING HINT = format('max_age => %L refreshes each key at least so often.', CASE WHEN proposed < '1 hour' THEN '1 min' ELSE '1 hour' END);
    END IF;
    SELECT string_agg(t.what, ', ') INTO timed FROM listener.time_dependence(definition) t WHERE t.dependence = 'volatile';
    IF timed IS NOT NULL THEN
        RAISE WARNING '% calls %, which may return something else at each refresh, so that each writes all rows anew', view.name, timed
            USING HINT = 'Leave it away; or declare it STABLE or IMMUTABLE where it is a function of yours that is.';
    END IF;
END
$function$;
