-- What the result of a definition depends on besides the rows that it reads: functions, types, policies and the like,
-- and what these depend on in turn. docs/capture.md says which of it is refused, which becomes a source, and which the
-- sweep compares.

-- body_relations(funcid): the tables and views that the text of a function in SQL or PL/pgSQL names after FROM, JOIN
-- and the like, or after a comma. A name without a schema is looked up in the search_path that the function sets; if it
-- sets none, in every schema. So this may be more than the function reads, and never less than its text names.
CREATE OR REPLACE FUNCTION listener.body_relations(funcid oid) RETURNS TABLE (relid oid)
LANGUAGE sql STABLE ROWS 3 SET search_path = pg_catalog, pg_temp AS $function$
    WITH body AS (
        SELECT regexp_replace(p.prosrc, '--[^\n]*|/\*.*?\*/', ' ', 'g') AS text,
               (SELECT split_part(c.setting, '=', 2) FROM unnest(p.proconfig) AS c (setting)
                WHERE c.setting LIKE 'search_path=%') AS path
        FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang AND l.lanname IN ('sql', 'plpgsql')
        WHERE p.oid = funcid AND p.prosqlbody IS NULL
    ), named AS (
        SELECT DISTINCT b.path, n.parts[1] AS schema, n.parts[2] AS name
        FROM body b
        CROSS JOIN LATERAL regexp_matches(b.text,
            '(?:\m(?:from|join|table|into|update|using|only)\M|,)[\s(]*(?:("[^"]+"|[[:alpha:]_][[:alnum:]_$]*)\s*\.\s*)?'
            '("[^"]+"|[[:alpha:]_][[:alnum:]_$]*)(?![[:alnum:]_$])(?!\s*[(.])', 'gi') AS m (found)
        CROSS JOIN LATERAL (
            SELECT ARRAY(SELECT CASE WHEN f.part LIKE '"%' THEN trim(f.part, '"') ELSE lower(f.part) END
                         FROM unnest(m.found) WITH ORDINALITY AS f (part, ord) ORDER BY f.ord)) AS n (parts)
    )
    SELECT DISTINCT c.oid
    FROM named x
    JOIN pg_class c ON c.relname = x.name AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
    JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspname !~ '^pg_(toast|temp)'
    WHERE n.nspname = x.schema OR (x.schema IS NULL AND (
        x.path IS NULL OR n.nspname = 'pg_catalog'
        OR n.nspname = ANY (SELECT trim(s.schema, ' "') FROM unnest(string_to_array(x.path, ',')) AS s (schema))))
$function$;

-- body_names(funcid): what the text of a function in SQL or PL/pgSQL may call: each user's function whose name stands
-- before a bracket, each user's operator whose sign is in the text, and the function of each user's cast.
CREATE OR REPLACE FUNCTION listener.body_names(funcid oid) RETURNS TABLE (classid oid, objid oid)
LANGUAGE plpgsql STABLE ROWS 5 SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    body text := (SELECT regexp_replace(p.prosrc, '--[^\n]*|/\*.*?\*/', ' ', 'g')
                  FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang AND l.lanname IN ('sql', 'plpgsql')
                  WHERE p.oid = funcid AND p.prosqlbody IS NULL);
BEGIN
    IF body IS NULL THEN
        RETURN;
    END IF;
    RETURN QUERY
        SELECT DISTINCT 'pg_proc'::regclass::oid, p.oid
        FROM regexp_matches(body, '("[^"]+"|[[:alpha:]_][[:alnum:]_$]*)\s*\(', 'g') AS m (found)
        JOIN pg_proc p ON p.proname = CASE WHEN m.found[1] LIKE '"%' THEN trim(m.found[1], '"') ELSE lower(m.found[1]) END
        -- Ours read no source, and many have names that others have too.
        WHERE p.oid >= 16384 AND p.pronamespace NOT IN ('listener'::regnamespace, 'listener_private'::regnamespace)
        UNION ALL
        SELECT 'pg_operator'::regclass::oid, o.oid FROM pg_operator o
        WHERE o.oid >= 16384 AND position(o.oprname IN body) > 0 AND NOT EXISTS (
            SELECT FROM pg_depend e WHERE e.classid = 'pg_operator'::regclass AND e.objid = o.oid AND e.deptype = 'e')
        UNION ALL
        SELECT 'pg_proc'::regclass::oid, c.castfunc FROM pg_cast c
        WHERE c.oid >= 16384 AND c.castfunc <> 0 AND NOT EXISTS (
            SELECT FROM pg_depend e WHERE e.classid = 'pg_cast'::regclass AND e.objid = c.oid AND e.deptype = 'e');
END
$function$;

-- computing_roles(relation): the roles whose rights decide which rows a definition reads: the role that computes it,
-- and the owners of the views in it that are not security_invoker. The owner of a materialized view computes that.
CREATE OR REPLACE FUNCTION listener.computing_roles(relation regclass) RETURNS oid[]
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    WITH defined AS (
        SELECT c.relkind, c.relowner, v.compute_role, m.relowner AS kept_by
        FROM pg_class c
        LEFT JOIN listener.managed_view v ON c.relname = 'definition_' || v.id AND c.relnamespace = 'listener'::regnamespace
        LEFT JOIN pg_class m ON m.oid = CASE WHEN v.strategy = 'materialized view'
                                             THEN to_regclass(format('%I.%I', v.target_schema, v.target_name)) END
        WHERE c.oid = relation
    )
    SELECT ARRAY(
        SELECT coalesce(d.kept_by, CASE WHEN d.relkind = 'm' THEN d.relowner END, r.oid)
        FROM defined d CROSS JOIN listener.installation i LEFT JOIN pg_roles r ON r.rolname = coalesce(d.compute_role, i.compute_role)
        UNION
        SELECT c.relowner FROM listener.reads(relation) d JOIN pg_class c ON c.oid = d.relid
        WHERE d.relkind = 'v' AND (c.reloptions @> '{security_invoker=true}') IS NOT TRUE
        ORDER BY 1)
$function$;

-- reached(relation): the objects that the result of a view or a materialized view depends on, as the catalog names
-- them:
--   classid, objid, objsubid   as in pg_depend. A column of pg_class is one that is used; a row of pg_attribute one
--                              that belongs to a row which is used as a whole, so that its name counts too
--   by_policy                  reached through a policy: the rows of such a table decide which rows the view shows
-- The catalog does not know what the text of a function uses, so that is searched for names. PostgreSQL's own objects
-- are left out: they do not change.
CREATE OR REPLACE FUNCTION listener.reached(relation regclass)
RETURNS TABLE (classid oid, objid oid, objsubid integer, by_policy boolean)
LANGUAGE plpgsql STABLE ROWS 50 SET search_path = pg_catalog, pg_temp SET jit = off
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $function$
#variable_conflict use_column
DECLARE
    roles oid[] := listener.computing_roles(relation);
BEGIN
    RETURN QUERY
        WITH RECURSIVE walk (classid, objid, objsubid, by_policy) AS (
            SELECT 'pg_class'::regclass::oid, relation::oid, 0, false
            UNION
            SELECT n.classid, n.objid, n.objsubid, w.by_policy OR n.by_policy
            FROM walk w
            CROSS JOIN LATERAL (
                SELECT 'pg_rewrite'::regclass::oid AS classid, r.oid AS objid, 0 AS objsubid, false AS by_policy
                FROM pg_rewrite r JOIN pg_class c ON c.oid = r.ev_class
                WHERE w.classid = 'pg_class'::regclass AND w.objsubid = 0 AND r.ev_class = w.objid AND c.relkind IN ('v', 'm')
                UNION ALL
                -- What the catalog knows. A row type is followed by its columns, below. A table whose columns are used
                -- comes as those columns, and as a whole only where a query, a function or a policy reads it; the
                -- table that a policy is on does not count as read by that policy.
                SELECT d.refclassid, d.refobjid, s.refobjsubid, false
                FROM pg_depend d
                CROSS JOIN LATERAL (
                    SELECT d.refobjsubid
                    UNION
                    SELECT 0 WHERE d.refclassid = 'pg_class'::regclass AND w.classid NOT IN ('pg_class'::regclass, 'pg_attrdef'::regclass)
                               AND NOT EXISTS (SELECT FROM pg_policy p WHERE w.classid = 'pg_policy'::regclass AND p.oid = w.objid
                                                 AND p.polrelid = d.refobjid)) AS s (refobjsubid)
                WHERE d.classid = w.classid AND d.objid = w.objid AND d.deptype IN ('n', 'i')
                  AND d.refclassid IN ('pg_class'::regclass, 'pg_proc'::regclass, 'pg_type'::regclass, 'pg_operator'::regclass,
                                       'pg_collation'::regclass, 'pg_ts_config'::regclass, 'pg_ts_dict'::regclass)
                  AND CASE w.classid WHEN 'pg_class'::regclass THEN w.objsubid > 0 AND d.objsubid = w.objsubid
                                     WHEN 'pg_type'::regclass THEN d.refclassid <> 'pg_class'::regclass
                                     WHEN 'pg_operator'::regclass THEN d.refclassid <> 'pg_proc'::regclass
                                     ELSE true END
                UNION ALL
                -- Not its selectivity functions.
                SELECT 'pg_proc'::regclass, o.oprcode, 0, false FROM pg_operator o
                WHERE w.classid = 'pg_operator'::regclass AND o.oid = w.objid AND o.oprcode >= 16384
                UNION ALL
                -- Sorting and grouping by an operator calls the comparison function of its operator family.
                SELECT 'pg_proc'::regclass, p.amproc, 0, false
                FROM pg_amop m JOIN pg_amproc p ON p.amprocfamily = m.amopfamily AND p.amproc >= 16384
                WHERE w.classid = 'pg_operator'::regclass AND m.amopopr = w.objid
                UNION ALL
                -- Where a row is used as a whole: all columns of the tables that are read there.
                SELECT 'pg_attribute'::regclass, a.attrelid, a.attnum, false
                FROM (SELECT r.ev_action::text FROM pg_rewrite r WHERE w.classid = 'pg_rewrite'::regclass AND r.oid = w.objid
                      UNION ALL
                      SELECT p.prosqlbody::text FROM pg_proc p WHERE w.classid = 'pg_proc'::regclass AND p.oid = w.objid
                      UNION ALL
                      SELECT p.polqual::text FROM pg_policy p WHERE w.classid = 'pg_policy'::regclass AND p.oid = w.objid) AS t (tree)
                JOIN pg_depend d ON d.classid = w.classid AND d.objid = w.objid AND d.refclassid = 'pg_class'::regclass
                JOIN pg_class c ON c.oid = d.refobjid AND c.relkind <> 'v'
                JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0
                WHERE t.tree LIKE '%:varattno 0 %'
                UNION ALL
                SELECT 'pg_attribute'::regclass, a.attrelid, a.attnum, false
                FROM pg_type t JOIN pg_attribute a ON a.attrelid = t.typrelid AND a.attnum > 0
                WHERE w.classid = 'pg_type'::regclass AND t.oid = w.objid AND t.typrelid <> 0
                UNION ALL
                SELECT 'pg_class'::regclass, w.objid, w.objsubid, false WHERE w.classid = 'pg_attribute'::regclass
                UNION ALL
                SELECT 'pg_constraint'::regclass, k.oid, 0, false FROM pg_constraint k
                WHERE w.classid = 'pg_type'::regclass AND k.contypid = w.objid
                UNION ALL
                SELECT 'pg_attrdef'::regclass, e.oid, 0, false
                FROM pg_attrdef e JOIN pg_attribute a ON a.attrelid = e.adrelid AND a.attnum = e.adnum AND a.attgenerated <> ''
                WHERE w.classid = 'pg_class'::regclass AND w.objsubid > 0 AND e.adrelid = w.objid AND e.adnum = w.objsubid
                UNION ALL
                SELECT 'pg_policy'::regclass, p.oid, 0, true
                FROM pg_class c JOIN pg_policy p ON p.polrelid = c.oid
                WHERE w.classid = 'pg_class'::regclass AND w.objsubid = 0 AND c.oid = w.objid AND c.relrowsecurity
                  AND p.polcmd IN ('r', '*')
                  AND EXISTS (SELECT FROM unnest(p.polroles) AS o (role) CROSS JOIN unnest(roles) AS c (role)
                              WHERE o.role = 0 OR pg_has_role(c.role, o.role, 'USAGE'))
                UNION ALL
                SELECT f.classid, f.objid, 0, false FROM listener.body_names(w.objid) f WHERE w.classid = 'pg_proc'::regclass
                UNION ALL
                SELECT 'pg_class'::regclass, f.relid, 0, false FROM listener.body_relations(w.objid) f
                WHERE w.classid = 'pg_proc'::regclass
            ) AS n
        )
        SELECT w.classid, w.objid, w.objsubid, w.by_policy FROM walk w;
END
$function$;

-- policy_sources(relation, tenant_column): the tables that policies read while a definition is computed, themselves or
-- through views and functions: a change to one of them may show or hide any row.
--   is_apart   whether a refresh sees only its tenant's rows of the table. So it is where all policies of the table
--              compare its tenant column with app.current_tenant_id and nothing reads it with other rights; and where a
--              look-up goes through the table by that column
CREATE OR REPLACE FUNCTION listener.policy_sources(relation regclass, tenant_column name)
    RETURNS TABLE (relid oid, is_apart boolean)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    WITH reached AS MATERIALIZED (
        SELECT DISTINCT w.classid, w.objid FROM listener.reached(relation) w WHERE w.by_policy AND w.objsubid = 0
    ), roles AS (
        SELECT r.role FROM unnest(listener.computing_roles(relation)) AS r (role)
    ), lent AS (
        SELECT FROM reached w JOIN pg_proc p ON w.classid = 'pg_proc'::regclass AND p.oid = w.objid AND p.prosecdef
        UNION ALL
        SELECT FROM reached w JOIN pg_class c ON w.classid = 'pg_class'::regclass AND c.oid = w.objid AND c.relkind = 'v'
        WHERE (c.reloptions @> '{security_invoker=true}') IS NOT TRUE
    )
    SELECT c.oid,
           EXISTS (SELECT FROM listener.source s JOIN listener.source o ON o.through_id = s.id
                   WHERE s.relid = c.oid AND s.tenant_column = policy_sources.tenant_column)
           OR (c.relrowsecurity AND NOT EXISTS (SELECT FROM lent)
               AND NOT EXISTS (SELECT FROM roles r JOIN pg_roles o ON o.oid = r.role
                               WHERE o.rolsuper OR o.rolbypassrls
                                  OR (NOT c.relforcerowsecurity AND pg_has_role(r.role, c.relowner, 'USAGE')))
               AND NOT EXISTS (
                   SELECT FROM pg_policy p
                   WHERE p.polrelid = c.oid AND p.polpermissive AND p.polcmd IN ('r', '*')
                     AND EXISTS (SELECT FROM unnest(p.polroles) AS o (role) CROSS JOIN roles r
                                 WHERE o.role = 0 OR pg_has_role(r.role, o.role, 'USAGE'))
                     AND regexp_replace(pg_get_expr(p.polqual, p.polrelid), '[()]|::[a-z ]+', '', 'g')
                         NOT IN (SELECT format(f.form, quote_ident(policy_sources.tenant_column)) FROM unnest(ARRAY[
                             '%s = current_setting''app.current_tenant_id''', '%s = current_setting''app.current_tenant_id'', true',
                             '%s = NULLIFcurrent_setting''app.current_tenant_id'', true, ''''']) AS f (form))))
    FROM reached w
    JOIN pg_class c ON w.classid = 'pg_class'::regclass AND c.oid = w.objid AND c.relkind IN ('r', 'p', 'm', 'f')
    WHERE c.oid >= 16384 AND c.relnamespace <> 'listener'::regnamespace
$function$;

-- reads_unseen(name): whether a function of PostgreSQL or of an extension returns what capture cannot see: it runs a
-- query that it is given as text, or reads a table that it is given by name, a sequence, a large object, a file or the
-- catalog.
CREATE OR REPLACE FUNCTION listener.reads_unseen(name name) RETURNS boolean
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT $1 ~ ('^(query|cursor|table|schema|database)_to_xml|^(crosstab|connectby|dblink|xpath_table|lo_|pgp_armor_headers$)'
                 '|^(ts_stat|nextval|currval|lastval|setval|loread|pg_sequence_last_value|pg_get_sequence_data)$'
                 '|^(obj|col|shobj)_description$|^has_.*_privilege$|^pg_has_role$|_is_visible$'
                 '|^pg_(get_|ls_|read_|stat_|statio_|show_|table_size|total_|relation_|indexes_size|database_size|tablespace_|'
                 'partition_|lock_status|cursor|prepared_|timezone_|describe_|identify_|available_|hba_|tables_)')
$function$;

-- hiding_functions(relation): the functions through which a view may read a table that the catalog does not know of,
-- called by it, by an operator, an aggregate, a cast or a type, or by one of these functions, at any depth:
--   * a user's function that is not IMMUTABLE, or whose text names a table or runs a statement that it puts together
--   * a function of PostgreSQL or of an extension that reads_unseen() names
--   * a user's function that only a policy calls: if its text runs a statement that it puts together, or names a system
--     catalog. Such functions are seldom IMMUTABLE; the tables that they name, policy_sources() finds
CREATE OR REPLACE FUNCTION listener.hiding_functions(relation regclass) RETURNS TABLE (funcid oid)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET jit = off AS $function$
#variable_conflict use_column
DECLARE
    unseen oid[] := ARRAY(SELECT p.oid FROM pg_proc p
                           WHERE p.pronamespace = 'pg_catalog'::regnamespace AND listener.reads_unseen(p.proname));
BEGIN
    RETURN QUERY
        WITH reached AS MATERIALIZED (
            SELECT DISTINCT w.classid, w.objid, w.by_policy FROM listener.reached(relation) w
        ), called AS MATERIALIZED (
            SELECT p.oid, p.proname, p.provolatile, p.prosqlbody, w.by_policy,
                   regexp_replace(p.prosrc, '--[^\n]*|/\*.*?\*/', ' ', 'g') AS body, l.lanname, EXISTS (
                       SELECT FROM pg_depend e WHERE e.classid = 'pg_proc'::regclass AND e.objid = p.oid AND e.deptype = 'e')
                   OR p.pronamespace IN ('pg_catalog'::regnamespace, 'information_schema'::regnamespace) AS builtin
            FROM reached w JOIN pg_proc p ON w.classid = 'pg_proc'::regclass AND p.oid = w.objid
            JOIN pg_language l ON l.oid = p.prolang
        ), tree (tree) AS (
            SELECT r.ev_action::text FROM reached w JOIN pg_rewrite r ON w.classid = 'pg_rewrite'::regclass AND r.oid = w.objid
            WHERE NOT w.by_policy
            UNION ALL
            SELECT c.prosqlbody::text FROM called c WHERE NOT c.by_policy
            UNION ALL
            SELECT e.adbin::text FROM reached w JOIN pg_attrdef e ON w.classid = 'pg_attrdef'::regclass AND e.oid = w.objid
            WHERE NOT w.by_policy
        )
        SELECT c.oid FROM called c
        WHERE NOT c.builtin AND CASE WHEN c.by_policy
            THEN c.body ~* '\mexecute\M' OR EXISTS (SELECT FROM listener.body_relations(c.oid) r WHERE r.relid < 16384)
            ELSE c.provolatile <> 'i'
                 OR (c.lanname = 'plpgsql' AND c.body ~* '\mexecute\M')
                 OR (c.lanname NOT IN ('sql', 'plpgsql') AND c.body ~* '\m(plpy|plv8)\.(execute|prepare|cursor)|\mspi_')
                 OR EXISTS (SELECT FROM listener.body_relations(c.oid))
                 OR EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_proc'::regclass AND d.objid = c.oid
                              AND d.refclassid = 'pg_class'::regclass AND d.deptype = 'n') END
        UNION
        SELECT c.oid FROM called c WHERE c.builtin AND NOT c.by_policy AND listener.reads_unseen(c.proname)
        UNION
        SELECT b.oid FROM tree t
        CROSS JOIN LATERAL regexp_matches(t.tree, ':(?:funcid|opfuncid) (\d+) ', 'g') AS m (found)
        JOIN unnest(unseen) AS b (oid) ON b.oid = m.found[1]::oid
        UNION
        SELECT p.oid FROM called c
        CROSS JOIN LATERAL regexp_matches(lower(c.body), '([[:alpha:]_][[:alnum:]_]*)\s*\(', 'g') AS m (found)
        JOIN pg_proc p ON p.proname = m.found[1]
        WHERE NOT c.builtin AND NOT c.by_policy AND p.oid = ANY (unseen);
END
$function$;

-- calls_of(names): a pattern that finds a call of these functions of PostgreSQL's own in a stored query.
CREATE OR REPLACE FUNCTION listener.calls_of(names name[]) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT format(':(?:funcid|opfuncid) (?:%s) ', string_agg(p.oid::text, '|'))
    FROM pg_proc p WHERE p.proname = ANY (names) AND p.pronamespace = 'pg_catalog'::regnamespace
$function$;

-- text_search_digest(): changes with any configuration or dictionary of text search.
CREATE OR REPLACE FUNCTION listener.text_search_digest() RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT md5(concat((SELECT string_agg(m::text, ' ' ORDER BY m.mapcfg, m.maptokentype, m.mapseqno) FROM pg_ts_config_map m),
                      (SELECT string_agg(concat_ws(' ', c.oid, c.cfgname, c.cfgparser), ' ' ORDER BY c.oid) FROM pg_ts_config c),
                      (SELECT string_agg(concat_ws(' ', d.oid, d.dicttemplate, d.dictinitoption), ' ' ORDER BY d.oid) FROM pg_ts_dict d)))
$function$;

-- fingerprint(relation): changes with everything that the result of a view depends on, except rows: see reached(). It
-- begins with the number of the formula: fingerprints of two formulas cannot be compared, see regenerate().
CREATE OR REPLACE FUNCTION listener.fingerprint(relation regclass) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET jit = off
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $function$
#variable_conflict use_column
DECLARE
    roles oid[] := listener.computing_roles(relation);
    text_search text := listener.calls_of('{to_tsvector,json_to_tsvector,jsonb_to_tsvector,to_tsquery,plainto_tsquery,'
        'phraseto_tsquery,websearch_to_tsquery,ts_headline,ts_lexize,ts_debug,ts_match_tt,ts_match_tq,get_current_ts_config}');
    membership text := listener.calls_of('{pg_has_role}');
    digest text;
BEGIN
    WITH reached AS MATERIALIZED (
        SELECT DISTINCT w.classid, w.objid, w.objsubid FROM listener.reached(relation) w
    ), tree (tree, body) AS MATERIALIZED (
        SELECT r.ev_action::text, NULL FROM reached w JOIN pg_rewrite r ON w.classid = 'pg_rewrite'::regclass AND r.oid = w.objid
        UNION ALL
        SELECT p.prosqlbody::text, CASE WHEN p.prosqlbody IS NULL THEN p.prosrc END
        FROM reached w JOIN pg_proc p ON w.classid = 'pg_proc'::regclass AND p.oid = w.objid
        UNION ALL
        SELECT p.polqual::text, NULL FROM reached w JOIN pg_policy p ON w.classid = 'pg_policy'::regclass AND p.oid = w.objid
        UNION ALL
        SELECT e.adbin::text, NULL FROM reached w JOIN pg_attrdef e ON w.classid = 'pg_attrdef'::regclass AND e.oid = w.objid
    ), part (part) AS (
        SELECT concat_ws(' ', 'query', r.ev_class, md5(r.ev_action::text))
        FROM reached w JOIN pg_rewrite r ON w.classid = 'pg_rewrite'::regclass AND r.oid = w.objid
        UNION ALL
        -- Whose rights decide, of a view; of a table, which roles its policies bind.
        SELECT CASE WHEN c.relkind IN ('v', 'm')
                    THEN concat_ws(' ', 'view', c.oid, (SELECT string_agg(o, ',' ORDER BY o) FROM unnest(c.reloptions) o),
                                   CASE WHEN (c.reloptions @> '{security_invoker=true}') IS NOT TRUE THEN c.relowner END)
                    ELSE concat_ws(' ', 'table', c.oid, c.relrowsecurity,
                                   CASE WHEN c.relrowsecurity THEN concat_ws(' ', c.relforcerowsecurity, (
                                       SELECT string_agg(concat_ws(' ', r.rolsuper, r.rolbypassrls,
                                           pg_has_role(r.oid, c.relowner, 'USAGE')),
                                                         ',' ORDER BY r.oid)
                                       FROM pg_roles r WHERE r.oid = ANY (roles))) END) END
        FROM reached w JOIN pg_class c ON w.classid = 'pg_class'::regclass AND w.objsubid = 0 AND c.oid = w.objid
        UNION ALL
        SELECT concat_ws(' ', 'column', a.attrelid, a.attnum, a.atttypid, a.atttypmod, a.attcollation, a.attgenerated,
                         CASE WHEN w.classid = 'pg_attribute'::regclass THEN a.attname END, a.attisdropped)
        FROM reached w JOIN pg_attribute a ON a.attrelid = w.objid AND a.attnum = w.objsubid
        WHERE w.classid = 'pg_attribute'::regclass OR (w.classid = 'pg_class'::regclass AND w.objsubid > 0)
        UNION ALL
        SELECT concat_ws(' ', 'function', p.oid::regprocedure, p.prolang, p.provolatile, p.proisstrict, p.proretset, p.prorettype,
                         p.prosecdef, CASE WHEN p.prosecdef THEN p.proowner END, p.proconfig,
                         md5(concat(p.prosrc, p.probin, p.prosqlbody::text, p.proargdefaults::text)), a::text)
        FROM reached w JOIN pg_proc p ON w.classid = 'pg_proc'::regclass AND p.oid = w.objid
        LEFT JOIN pg_aggregate a ON a.aggfnoid = p.oid
        UNION ALL
        SELECT concat_ws(' ', 'operator', o.oid, o.oprname, o.oprcode::oid)
        FROM reached w JOIN pg_operator o ON w.classid = 'pg_operator'::regclass AND o.oid = w.objid
        UNION ALL
        SELECT concat_ws(' ', 'type', t.oid, t.typnotnull, t.typdefault, t.typbasetype, t.typtypmod, t.typinput::oid, t.typoutput::oid,
                         (SELECT string_agg(concat_ws(' ', e.oid, e.enumsortorder, quote_literal(e.enumlabel)), ','
                             ORDER BY e.enumsortorder)
                          FROM pg_enum e WHERE t.typtype = 'e' AND e.enumtypid = t.oid))
        FROM reached w JOIN pg_type t ON w.classid = 'pg_type'::regclass AND t.oid = w.objid
        UNION ALL
        SELECT concat_ws(' ', 'constraint', k.contypid, k.convalidated, k.conbin::text)
        FROM reached w JOIN pg_constraint k ON w.classid = 'pg_constraint'::regclass AND k.oid = w.objid
        UNION ALL
        SELECT concat_ws(' ', 'expression', e.adrelid, e.adnum, e.adbin::text)
        FROM reached w JOIN pg_attrdef e ON w.classid = 'pg_attrdef'::regclass AND e.oid = w.objid
        UNION ALL
        SELECT concat_ws(' ', 'policy', p.polrelid, p.polcmd, p.polpermissive, p.polroles, p.polqual::text)
        FROM reached w JOIN pg_policy p ON w.classid = 'pg_policy'::regclass AND p.oid = w.objid
        UNION ALL
        SELECT concat_ws(' ', 'collation', l.oid, l.collisdeterministic, l.collversion, pg_collation_actual_version(l.oid))
        FROM reached w JOIN pg_collation l ON w.classid = 'pg_collation'::regclass AND l.oid = w.objid
        UNION ALL
        SELECT concat('collation ', pg_database_collation_actual_version(d.oid)) FROM pg_database d WHERE d.datname = current_database()
        UNION ALL
        -- A setting may say which configuration text search takes, so all of them count.
        SELECT listener.text_search_digest()
        WHERE EXISTS (SELECT FROM tree t WHERE t.tree ~ text_search OR t.body ~* 'to_ts(vector|query)|ts_(headline|lexize|debug)|@@')
        UNION ALL
        -- The memberships of these roles, where a function asks for them.
        SELECT concat_ws(' ', 'member', m.member, m.roleid)
        FROM (WITH RECURSIVE has (member, roleid) AS (
                  SELECT m.member, m.roleid FROM pg_auth_members m WHERE m.member = ANY (roles)
                  UNION
                  SELECT m.member, m.roleid FROM has h JOIN pg_auth_members m ON m.member = h.roleid)
              SELECT h.member, h.roleid FROM has h) m
        WHERE EXISTS (SELECT FROM tree t WHERE t.tree ~ membership OR t.body ~* 'pg_has_role|pg_auth_members|pg_roles|pg_user')
    )
    SELECT '2 ' || md5(string_agg(p.part, E'\n' ORDER BY p.part COLLATE "C")) INTO digest FROM part p;
    RETURN digest;
END
$function$;
