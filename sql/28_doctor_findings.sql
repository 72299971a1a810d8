-- What `listener doctor` shows, and what of it /health/ready shows: one set of checks.

-- state_findings(): those that the catalog alone can tell, in milliseconds: what somebody altered, rights, row-level
-- security.
CREATE OR REPLACE FUNCTION listener.state_findings()
RETURNS TABLE ("check" text, level text, view text, object text, problem text, mend text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off AS $function$
    -- Cause, colon, statement. What several views suffer from is one finding.
    SELECT 'view', 'error', t.views, coalesce(t.views, 'sources'), (s.parts)[1] || '.', (s.parts)[2]
    FROM (SELECT string_agg(v.view, ', ' ORDER BY v.view) AS views, v.trouble
          FROM listener.view_troubles() v GROUP BY v.trouble) t
    CROSS JOIN LATERAL (SELECT coalesce(regexp_match(t.trouble, '^(.*?): ((?:ALTER|CREATE|TRUNCATE|GRANT|SELECT|make) .*)$'),
                                        regexp_match(t.trouble, '^(.*?): (.*)$'), ARRAY[t.trouble])) AS s (parts)
    UNION ALL
    SELECT 'rights', CASE WHEN n.held THEN 'ok' ELSE n.level END, n.view, n.object,
           CASE WHEN n.held THEN format('%I has %s', n.role, n.right_name)
                WHEN n.right_name = 'OWNER' THEN format('it does not belong to %I, and runs with the wrong rights.', n.role)
                WHEN n.right_name = 'MEMBER' THEN format('%I is no member.', n.role)
                ELSE format('%I lacks %s.', n.role, n.right_name) END,
           CASE WHEN NOT n.held THEN n.mend END
    FROM listener.needed_rights() n
    WHERE n.held OR n.level <> 'ok'
    UNION ALL SELECT * FROM listener.excess_findings()
    UNION ALL SELECT * FROM listener.row_security_findings()
    UNION ALL SELECT * FROM listener.target_findings()
$function$;

-- readiness(): what keeps the service from being ready, one line each; no row when nothing does. Of the role of the service
-- itself the service knows what it was allowed to be.
CREATE OR REPLACE FUNCTION listener.readiness() RETURNS SETOF text
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off AS $function$
    SELECT DISTINCT CASE f."check" WHEN 'view' THEN concat_ws(': ', rtrim(f.problem, '.'), f.mend)
                                   ELSE format('%s: %s %s', f.object, f.problem, f.mend) END
    FROM listener.state_findings() f
    WHERE f.level = 'error' AND f."check" <> 'roles'
    ORDER BY 1
$function$;
