-- Has PostgreSQL plan a query for one tenant: over stand-ins, so that no policy and no partition is in the plan, and over
-- the tables, to see which indexes serve. Why, 20_scope.sql says.

-- some_tenant(tenant_type): a constant that occurs nowhere else.
CREATE OR REPLACE FUNCTION listener.some_tenant(tenant_type text) RETURNS text
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    RETURN CASE tenant_type
        WHEN 'uuid' THEN gen_random_uuid()::text
        WHEN 'bigint' THEN (4611686018427387904 + floor(random() * 4e18)::bigint)::text
        WHEN 'integer' THEN (1073741824 + floor(random() * 1e9)::integer)::text
        ELSE 'tenant ' || gen_random_uuid() END;
END
$function$;

-- view_text(relation, path): the query of a view or a materialized view, as PostgreSQL writes it under this
-- search_path.
CREATE OR REPLACE FUNCTION listener.view_text(relation oid, path text) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    -- pg_temp last: there the stand-ins would hide the real tables, whose names would then be qualified.
    PERFORM set_config('search_path', path || ', pg_temp', true);
    RETURN pg_catalog.rtrim(pg_catalog.pg_get_viewdef(relation), '; ');
END
$function$;

-- stand_in_statements(relation, path): the statements that make temporary tables and views for all that a view or a
-- materialized view reads, by their names. path: the schemas in which these are found without being qualified; the role
-- that runs them needs TEMPORARY.
-- A stand-in has the primary key, which GROUP BY may rest on, and where the query has EXISTS, IN and the like is as large as
-- makes the planner leave these as they are: one that became a hash table would not show what correlates it.
-- Raises LSN03 where two of what it reads have the same name.
CREATE OR REPLACE FUNCTION listener.stand_in_statements(relation regclass, path text) RETURNS SETOF text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    -- Only of these the planner makes hash tables.
    compares boolean := pg_get_viewdef(relation) ~* '\m(exists|in|any|some|all)\M' OR EXISTS (
        SELECT FROM listener.tenant_views(relation) v WHERE pg_get_viewdef(v.relid) ~* '\m(exists|in|any|some|all)\M');
    twice text := (
        SELECT min(quote_ident(c.relname))
        FROM (SELECT i.relid FROM listener.tenant_inputs(relation, NULL) i
              UNION SELECT r.relid FROM listener.tenant_views(relation) r) x JOIN pg_class c ON c.oid = x.relid
        GROUP BY c.relname HAVING count(*) > 1 LIMIT 1);
BEGIN
    IF twice IS NOT NULL THEN
        RAISE EXCEPTION 'it reads two relations named %, and what stands in for them has no schema', twice USING ERRCODE = 'LSN03';
    END IF;
    RETURN QUERY
        SELECT s.statement
        FROM (SELECT c.relname, string_agg(format('ADD COLUMN %I %s%s', a.attname, format_type(a.atttypid, a.atttypmod),
                                                  CASE WHEN a.attcollation <> t.typcollation
                                                       THEN format(' COLLATE %I.%I', n.nspname, l.collname) ELSE '' END),
                                           ', ' ORDER BY a.attnum)
                                || coalesce((SELECT ', ADD ' || pg_get_constraintdef(k.oid) FROM pg_constraint k
                                             WHERE k.conrelid = c.oid AND k.contype = 'p'), '') AS changes
              FROM listener.tenant_inputs(relation, NULL) i
              JOIN pg_class c ON c.oid = i.relid
              JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
              JOIN pg_type t ON t.oid = a.atttypid
              LEFT JOIN pg_collation l ON l.oid = a.attcollation
              LEFT JOIN pg_namespace n ON n.oid = l.collnamespace
              GROUP BY c.oid) AS copied
        CROSS JOIN LATERAL (VALUES
            (1, format('CREATE TEMPORARY TABLE pg_temp.%I AS SELECT repeat(''x'', 1900) AS filling FROM generate_series(1, %s)',
                       copied.relname, CASE WHEN compares THEN 800 ELSE 0 END)),
            (2, format('DELETE FROM pg_temp.%I', copied.relname)),
            (3, format('ALTER TABLE pg_temp.%I %s', copied.relname, copied.changes)),
            (4, format('ALTER TABLE pg_temp.%I DROP COLUMN filling', copied.relname))) AS s (step, statement)
        ORDER BY copied.relname, s.step;
    RETURN QUERY
        SELECT format('SET LOCAL search_path = pg_temp, %s; CREATE TEMPORARY VIEW %I AS %s', path, c.relname,
                      listener.view_text(v.relid, path))
        FROM listener.tenant_views(relation) v JOIN pg_class c ON c.oid = v.relid ORDER BY v.depth DESC;
END
$function$;

-- planned(relation, preparation, questions): what listener.plan() or plan_as() returns for a view or a materialized
-- view. Planning runs functions that are declared IMMUTABLE, which are a team's code. So the role that plans is, for
-- the definition of a managed view, its compute role; else the owner of the relation, or, where the caller may not act
-- as the owner, the service, if that is the caller, or the installation's compute role. Raises LSN03 where the caller
-- may act as none of them.
CREATE OR REPLACE FUNCTION listener.planned(relation regclass, preparation text[], questions jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    view_id integer := (
        SELECT substr(c.relname, length('definition_') + 1)::integer FROM pg_class c
        WHERE c.oid = relation AND c.relnamespace = 'listener'::regnamespace AND c.relname ~ '^definition_[0-9]+$');
    owner name := (SELECT pg_get_userbyid(c.relowner) FROM pg_class c WHERE c.oid = relation);
    other name;
BEGIN
    IF view_id IS NOT NULL THEN
        RETURN listener.plan(view_id, preparation, questions);
    END IF;
    BEGIN
        PERFORM listener.check_may_act(owner);
    EXCEPTION WHEN SQLSTATE 'LSN03' THEN
        SELECT CASE WHEN current_user = i.service_role THEN i.service_role ELSE i.compute_role END INTO other
        FROM listener.installation i
        WHERE current_user = i.service_role OR pg_has_role(current_user, i.compute_role, 'MEMBER');
        IF other IS NULL THEN
            RAISE;
        END IF;
    END;
    RETURN listener.plan_as(coalesce(other, owner), preparation, questions);
END
$function$;

-- tenant_plans(relation, tenant_column, tenant_type): the query of a view or a materialized view, planned for one tenant:
--   by_constant  for a constant K, whose text is `constant`, over stand-ins, without indexes, so that each condition stands
--                where it is applied, and each scan is one
--   by_unknown   the same for a value that the planner does not know
--   by_index     for the constant, over the tables, by indexes wherever one serves; NULL: a policy stands in the way
--   stood_in     false: nothing of it has row-level security, stand-ins could not be made, and the tables were planned for
-- Planned as planned() says. Raises LSN03 with what planning raises.
CREATE OR REPLACE FUNCTION listener.tenant_plans(
    relation regclass, tenant_column name, tenant_type text,
    OUT constant text, OUT by_constant jsonb, OUT by_unknown jsonb, OUT by_index jsonb, OUT stood_in boolean)
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp SET jit = off AS $function$
DECLARE
    secured boolean := EXISTS (
        SELECT FROM listener.tenant_inputs(relation, NULL) i JOIN pg_class c ON c.oid = i.relid WHERE c.relrowsecurity);
    path text := 'pg_catalog' || coalesce((
        SELECT string_agg(DISTINCT ', ' || quote_ident(n.nspname), '')
        FROM (SELECT i.relid FROM listener.tenant_inputs(relation, NULL) i
              UNION SELECT r.relid FROM listener.tenant_views(relation) r) x
        JOIN pg_class c ON c.oid = x.relid JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname <> 'pg_catalog'), '');
    other text := listener.some_tenant(tenant_type);
    set_tenant jsonb := jsonb_build_object('app.current_tenant_id', other, 'listener.some_tenant', other);
    by_value text := format('SELECT * FROM %%s AS d WHERE d.%I OPERATOR(pg_catalog.=) %%s::%s', tenant_column, tenant_type);
    unknown text := 'pg_catalog.current_setting(''listener.some_tenant'')';
    over_tables text := CASE WHEN (SELECT c.relkind FROM pg_class c WHERE c.oid = relation) = 'v' THEN relation::text
                             ELSE format('(%s)', listener.view_text(relation, 'pg_catalog')) END;
    over_stand_ins text := format('(%s)', listener.view_text(relation, path));
    answers jsonb;
    problem text;
BEGIN
    constant := listener.some_tenant(tenant_type);
    BEGIN
        answers := listener.planned(relation, ARRAY(SELECT s FROM listener.stand_in_statements(relation, path) s), jsonb_build_array(
            jsonb_build_object('query', format(by_value, over_stand_ins, quote_literal(constant)),
                               'path', 'pg_temp, ' || path, 'settings', set_tenant),
            jsonb_build_object('query', format(by_value, over_stand_ins, unknown), 'path', 'pg_temp, ' || path, 'settings', set_tenant)));
        problem := coalesce(answers ->> 'error', answers -> 0 ->> 'error', answers -> 1 ->> 'error');
    EXCEPTION WHEN SQLSTATE 'LSN03' THEN
        problem := SQLERRM;
    END;
    stood_in := problem IS NULL;
    IF stood_in THEN
        by_constant := answers -> 0;
        by_unknown := answers -> 1;
    ELSIF secured THEN
        RAISE EXCEPTION '%', problem USING ERRCODE = 'LSN03';
    END IF;
    -- Policies are asked for their setting in planning already; a text may be any tenant's id there.
    answers := listener.planned(relation, '{}', (
        SELECT jsonb_agg(jsonb_build_object(
                   'query', format(by_value, over_tables, q.value), 'path', 'pg_catalog, pg_temp',
                   'settings', set_tenant || q.settings) ORDER BY q.ord)
        FROM (SELECT 1, quote_literal(constant), '{}'::jsonb
              UNION ALL SELECT 2, unknown, '{}'
              UNION ALL
              SELECT 3, quote_literal(constant), jsonb_build_object(
                         'app.current_tenant_id', listener.some_tenant(t.type), 'enable_seqscan', 'off', 'enable_indexscan', 'on',
                         'enable_indexonlyscan', 'on', 'enable_bitmapscan', 'on')
              FROM unnest(ARRAY[tenant_type, 'uuid', 'integer']) AS t (type)) AS q (ord, value, settings)));
    IF NOT stood_in THEN
        problem := coalesce(answers -> 0 ->> 'error', answers -> 1 ->> 'error');
        IF problem IS NOT NULL THEN
            RAISE EXCEPTION '%', problem USING ERRCODE = 'LSN03';
        END IF;
        by_constant := answers -> 0;
        by_unknown := answers -> 1;
    END IF;
    by_index := (SELECT a.answer FROM jsonb_array_elements(answers) WITH ORDINALITY AS a (answer, ord)
                 WHERE a.ord > 2 AND jsonb_typeof(a.answer) = 'array' ORDER BY a.ord LIMIT 1);
END
$function$;

-- view_plans(definition): tenant_plans() of a managed view, for the service, which may not use listener_private.
CREATE OR REPLACE FUNCTION listener.view_plans(
    definition regclass, OUT constant text, OUT by_constant jsonb, OUT by_unknown jsonb, OUT by_index jsonb, OUT stood_in boolean)
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
    SELECT p.* FROM listener.managed_view v
    CROSS JOIN LATERAL listener.tenant_plans(definition, v.tenant_column, v.tenant_type) p
    WHERE definition = to_regclass('listener.definition_' || v.id)
$function$;
