-- Turning an adoption back: the materialized view is made again next to the target, filled, compared, and put in its
-- place.
--
-- REFRESH computes a materialized view as its owner, with no tenant. Where row-level security hides rows from that
-- role, REFRESH would leave the view empty, and nothing else can put rows into it. There the materialized view is made
-- on a view of its own, which reads the target while REFRESH runs, and gets the query afterwards.

-- owner_back(view, adoption): the owner of the materialized view: the owner of the target by now. Where that is the role that
-- adopt named, or the owner of this schema, as doctor advises, it is the role that owned the materialized view before.
CREATE OR REPLACE FUNCTION listener.owner_back(view listener.managed_view, adoption listener.adoption) RETURNS name
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT CASE WHEN pg_get_userbyid(c.relowner) IN (adoption.request ->> 'owner', i.owner_role)
                     AND to_regrole(quote_ident(adoption.owner_role)) IS NOT NULL THEN adoption.owner_role
                ELSE pg_get_userbyid(c.relowner) END
    FROM listener.installation i CROSS JOIN pg_class c
    WHERE c.oid = to_regclass(format('%I.%I', view.target_schema, view.target_name))
$function$;

-- query_back(view, adoption): the query of the materialized view, as it is now: a table that it reads may have another
-- name.
CREATE OR REPLACE FUNCTION listener.query_back(view listener.managed_view, adoption listener.adoption) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT rtrim(coalesce(listener.query_of(to_regclass('listener.definition_' || view.id)), adoption.definition), E'; \n')
$function$;

-- query_view_name(view, adoption): a free name for the view that holds the query; NULL: none is needed, since the owner
-- of the materialized view sees all rows.
CREATE OR REPLACE FUNCTION listener.query_view_name(view listener.managed_view, adoption listener.adoption) RETURNS name
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT n.name
    FROM generate_series(1, 100) AS g (number)
    -- At most 63 bytes; a letter has four at most.
    CROSS JOIN LATERAL (SELECT CASE WHEN octet_length(view.target_name) <= 52 THEN view.target_name::text
        ELSE left(view.target_name, 13) END
                               || '_query' || CASE WHEN g.number > 1 THEN '_' || g.number ELSE '' END) AS n (name)
    WHERE listener.hidden_source(to_regclass('listener.definition_' || view.id),
                                 to_regrole(quote_ident(listener.owner_back(view, adoption)))) IS NOT NULL
      AND to_regclass(format('%I.%I', view.target_schema, n.name)) IS NULL
    ORDER BY g.number LIMIT 1
$function$;

-- making_query_view(view, adoption, name): the statements that make that view, with the rows of the target at first.
CREATE OR REPLACE FUNCTION listener.making_query_view(view listener.managed_view, adoption listener.adoption, name name)
    RETURNS SETOF text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT s.statement
    FROM (SELECT format('%I.%I', view.target_schema, name) AS made, format('%I.%I', view.target_schema, view.target_name) AS target) n
    CROSS JOIN LATERAL (VALUES
        (1, format(E'CREATE VIEW %s AS\nSELECT %s\nFROM %s', n.made, (
                SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum)
                FROM pg_attribute a JOIN pg_attribute t ON t.attrelid = n.target::regclass AND t.attname = a.attname AND t.attnum > 0
                WHERE a.attrelid = to_regclass('listener.definition_' || view.id) AND a.attnum > 0), n.target)),
        (2, format('GRANT SELECT ON %s TO %I', n.made, listener.owner_back(view, adoption))),
        (3, format('COMMENT ON VIEW %s IS %L', n.made, format('The query of the materialized view %s.', n.target)))
    ) AS s (step, statement)
    ORDER BY s.step
$function$;

-- ending_query_view(view, adoption, name): the statements that give that view the query, and the owner of the
-- materialized view.
CREATE OR REPLACE FUNCTION listener.ending_query_view(view listener.managed_view, adoption listener.adoption, name name)
    RETURNS SETOF text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT s.statement
    FROM (SELECT format('%I.%I', view.target_schema, name) AS made, listener.grantee_of(view) AS grantee) n
    CROSS JOIN LATERAL (VALUES
        (1, format(E'CREATE OR REPLACE VIEW %s WITH (security_invoker = true) AS\n%s', n.made, listener.query_back(view, adoption))),
        (2, format('GRANT SELECT ON %s TO %I', n.made, n.grantee)),
        (3, format('ALTER VIEW %s OWNER TO %I', n.made, listener.owner_back(view, adoption)))) AS s (step, statement)
    ORDER BY s.step
$function$;

-- unadopting(view, adoption, query_view): the statements that make the materialized view again next to the target. The
-- first one creates it, of its query, or on the view that holds the query.
CREATE OR REPLACE FUNCTION listener.unadopting(view listener.managed_view, adoption listener.adoption, query_view name)
    RETURNS SETOF text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    WITH names AS (
        SELECT format('%I.%I', view.target_schema, view.target_name)::regclass AS target,
               format('%I.%I', view.target_schema, listener.name_beside(view)) AS beside, i.service_role
        FROM listener.installation i
    ), grants AS (
        -- Who may read it now; and the roles that write the target, and the privileges that a table did not take over, as it was.
        SELECT coalesce(jsonb_agg(u.g), '[]') AS all
        FROM (SELECT g FROM names n CROSS JOIN LATERAL jsonb_array_elements(listener.grants_of(n.target)) g
              WHERE g ->> 'grantee' IS NULL OR g ->> 'grantee' NOT IN (n.service_role, listener.grantee_of(view))
              UNION ALL
              SELECT g FROM names n CROSS JOIN LATERAL jsonb_array_elements(adoption.grants) g
              WHERE g ->> 'grantee' IN (n.service_role, listener.grantee_of(view)) OR g ->> 'privilege' <> 'SELECT') AS u (g)
    )
    SELECT format(E'CREATE MATERIALIZED VIEW %s AS\n%s\nWITH NO DATA', n.beside,
                  CASE WHEN query_view IS NULL THEN listener.query_back(view, adoption)
                       ELSE format('SELECT * FROM %I.%I', view.target_schema, query_view) END)
    FROM names n
    UNION ALL
    SELECT s FROM names n CROSS JOIN grants g
    CROSS JOIN LATERAL listener.carried(n.target, n.beside, 'm', '{}', adoption.indexes, g.all, listener.owner_back(view, adoption)) s
$function$;

-- check_unread(view): raises LSN03 where other managed views read its target.
CREATE OR REPLACE FUNCTION listener.check_unread(view listener.managed_view) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    readers text := (SELECT string_agg(v.name, ', ' ORDER BY v.name)
                     FROM listener.view_reads r JOIN listener.managed_view v ON v.id = r.view_id WHERE r.upstream_id = view.id);
BEGIN
    IF readers IS NOT NULL THEN
        RAISE EXCEPTION '% is read by %', view.name, readers USING ERRCODE = 'LSN03',
            HINT = 'A materialized view fires no trigger: drop these first, or turn them back.';
    END IF;
END
$function$;

-- begin_unadoption(view): makes the materialized view again, next to the target and empty: with the definition as it is
-- now, owner, options, indexes with their uniqueness, grants and comments; and the view that holds its query, where one
-- is needed. Called again it starts over.
-- Raises LSN03 where other managed views read the target, or something is tied to it, and for a view that was not adopted.
CREATE OR REPLACE FUNCTION listener.begin_unadoption(view text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    previous_role text := listener.become_owner();
    managed listener.managed_view;
    adoption listener.adoption;
    target regclass;
    published name;
    statement text;
    created boolean := false;
    previous jsonb := listener.use_settings(listener.own_settings());
BEGIN
    PERFORM listener.lock_registration();
    managed := listener.find_view(view);
    adoption := listener.find_adoption(view, '{adopted,turning back}');
    target := to_regclass(format('%I.%I', managed.target_schema, managed.target_name));
    SELECT p.pubname INTO published FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid WHERE r.prrelid = target LIMIT 1;
    IF target IS NULL THEN
        RAISE EXCEPTION 'the target of % is gone', managed.name USING ERRCODE = 'LSN03',
            HINT = 'listener.restore_target(view) makes it again.';
    ELSIF EXISTS (SELECT FROM listener.managed_view v WHERE v.replaces = managed.id) THEN
        RAISE EXCEPTION '% is being altered', managed.name USING ERRCODE = 'LSN03',
            HINT = 'Finish that first, or take it back: listener.abort_alter(view).';
    ELSIF published IS NOT NULL THEN
        RAISE EXCEPTION '% is part of the publication %, and a materialized view cannot be', target, published USING ERRCODE = 'LSN03',
            HINT = format('ALTER PUBLICATION %I DROP TABLE %s;', published, target);
    END IF;
    PERFORM listener.check_unread(managed), listener.check_swappable(target),
            listener.check_new_owner(target, listener.owner_back(managed, adoption));
    PERFORM listener.drop_beside(managed);
    adoption.query_view := listener.query_view_name(managed, adoption);
    IF adoption.query_view IS NOT NULL THEN
        FOREACH statement IN ARRAY ARRAY(SELECT s FROM listener.making_query_view(managed, adoption, adoption.query_view) s) LOOP
            EXECUTE statement;
        END LOOP;
    END IF;
    FOREACH statement IN ARRAY ARRAY(SELECT s FROM listener.unadopting(managed, adoption, adoption.query_view) s) LOOP
        EXECUTE statement;
        IF NOT created THEN
            PERFORM listener.revoke_defaults(format('%I.%I', managed.target_schema, listener.name_beside(managed))::regclass);
            created := true;
        END IF;
    END LOOP;
    UPDATE listener.adoption a SET state = 'turning back', begun_at = clock_timestamp(), query_view = adoption.query_view
    WHERE a.view_id = managed.id;
    PERFORM listener.use_settings(previous), set_config('role', previous_role, true);
END
$function$;

-- fill_unadoption(view): fills the materialized view, under the settings of the managed view, and compares it tenant by
-- tenant with the definition, computed as the service computes it, at the same now().
-- Where the rows come from the target and depend on the time, refresh each tenant before, in the same transaction.
-- Raises LSN03, which undoes the filling, where rows differ and no change of this moment explains it.
CREATE OR REPLACE FUNCTION listener.fill_unadoption(view text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    previous_role text := listener.become_owner();
    managed listener.managed_view := listener.find_view(view);
    adoption listener.adoption := listener.find_adoption(view, '{turning back}');
    beside text := format('%I.%I', managed.target_schema, listener.name_beside(managed));
    statement text := format('REFRESH MATERIALIZED VIEW %s', beside);
    started timestamptz := clock_timestamp();
    previous jsonb;
BEGIN
    previous := listener.use_settings(listener.registered_settings(managed));
    PERFORM set_config('search_path', managed.search_path, true);
    EXECUTE statement;
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    PERFORM listener.use_settings(previous), listener.use_settings(listener.own_settings());
    IF adoption.query_view IS NOT NULL THEN
        FOREACH statement IN ARRAY ARRAY(SELECT s FROM listener.ending_query_view(managed, adoption, adoption.query_view) s) LOOP
            EXECUTE statement;
        END LOOP;
    END IF;
    PERFORM listener.use_settings(previous);
    PERFORM listener.check_filled_back(managed, started);
    IF adoption.query_view IS NOT NULL THEN
        RAISE NOTICE 'the query of % is in the view %.% from now on: its owner % does not see all rows without a tenant, so a REFRESH '
                     'would empty the materialized view, as before it was adopted', managed.name, managed.target_schema,
                         adoption.query_view,
                     listener.owner_back(managed, adoption);
    END IF;
    PERFORM pg_catalog.set_config('role', previous_role, true);
END
$function$;

-- check_filled_back(view, since): compares the materialized view, whose filling began at `since`, with the
-- definition. A change that is not shown yet, or was shown after that, explains a difference. REFRESH may also differ,
-- and be right, where the definition has more than one right result (with as many rows), or is not proven to be
-- tenant-local: a notice says so.
-- Raises LSN03 with the tenants whose rows differ otherwise.
CREATE OR REPLACE FUNCTION listener.check_filled_back(view listener.managed_view, since timestamptz) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    filled regclass := format('%I.%I', view.target_schema, listener.name_beside(view))::regclass;
    digests jsonb := listener.evaluate_as(
        (SELECT pg_get_userbyid(c.relowner) FROM pg_class c WHERE c.oid = filled),
        listener.digests_statement(view, filled || ' AS q'), NULL, listener.settings_of(view) - 'search_path');
    unlike jsonb;
    differing text[];
    without bigint;
    named text;
    undetermined boolean;
BEGIN
    SELECT jsonb_agg(d) FILTER (WHERE d.tenant IS NOT NULL), sum(d.held) FILTER (WHERE d.tenant IS NULL) INTO unlike, without
    FROM (
        SELECT coalesce(t.tenant, f.tenant) AS tenant, f.held, f.digest
        FROM (SELECT nullif(r.tenant, CASE WHEN view.tenant_column IS NOT NULL THEN '' END) AS tenant, r.held, r.digest
              FROM jsonb_to_recordset(digests) AS r (tenant text, held bigint, digest numeric)) f
        FULL JOIN (SELECT l.tenant, d.held, d.digest
                   FROM (SELECT x FROM listener.tenants(view.name) x
                         UNION SELECT r.tenant FROM jsonb_to_recordset(digests) AS r (tenant text)
                               WHERE view.tenant_column IS NOT NULL AND r.tenant <> '') AS l (tenant)
                   CROSS JOIN LATERAL listener.tenant_digest(view.name, l.tenant) d) t ON t.tenant = f.tenant
        WHERE (coalesce(t.held, 0), t.digest) IS DISTINCT FROM (coalesce(f.held, 0), f.digest)
          AND NOT listener.is_stale(view.id, coalesce(t.tenant, f.tenant))
          AND NOT EXISTS (SELECT FROM listener.state_of(view.id, coalesce(t.tenant, f.tenant)) s WHERE s.refreshed_at >= since)
    ) d;
    IF without > 0 THEN
        RAISE NOTICE '% rows of % have no tenant: the table did not have them', without, view.name;
    END IF;
    IF unlike IS NULL THEN
        RETURN;
    END IF;
    undetermined := EXISTS (SELECT FROM listener.undetermined(to_regclass('listener.definition_' || view.id)));
    differing := ARRAY(SELECT f.tenant FROM jsonb_to_recordset(unlike) AS f (tenant text, held bigint)
                       CROSS JOIN LATERAL listener.tenant_digest(view.name, f.tenant) t
                       WHERE NOT undetermined OR t.held IS DISTINCT FROM f.held ORDER BY 1);
    IF differing = '{}' THEN
        RAISE NOTICE 'the query of % has more than one right result: for % of its keys the rows differ from those of the table', view.name,
            jsonb_array_length(unlike);
        RETURN;
    END IF;
    named := array_to_string(differing[:3], ', ')
             || CASE WHEN cardinality(differing) > 3 THEN format(' and %s more', cardinality(differing) - 3) ELSE '' END;
    IF view.tenant_column IS NOT NULL AND EXISTS (
            SELECT FROM listener.tenant_scope(to_regclass('listener.definition_' || view.id), view.tenant_column, view.tenant_type) s
            WHERE NOT s.proven AND (view.depends_on IS NULL OR s.source IS NOT NULL)) THEN
        RAISE NOTICE 'computed with all other tenants, the rows of % differ from those of the table', named;
        RETURN;
    END IF;
    RAISE EXCEPTION 'the new materialized view for % has other rows than its query%', view.name,
            CASE WHEN view.tenant_column IS NULL THEN '' ELSE ' for ' || named END
        USING ERRCODE = 'LSN03', HINT = 'The table stays in place. A policy or a function may show its owner other rows than the service.';
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
    managed listener.managed_view;
    adoption listener.adoption;
    target regclass;
    beside regclass;
    locked interval;
BEGIN
    PERFORM listener.lock_registration();
    managed := listener.find_view(view);
    adoption := listener.find_adoption(view, '{turning back}');
    target := format('%I.%I', managed.target_schema, managed.target_name)::regclass;
    beside := to_regclass(format('%I.%I', managed.target_schema, listener.name_beside(managed)));
    IF NOT coalesce((SELECT c.relispopulated FROM pg_class c WHERE c.oid = beside), false) THEN
        RAISE EXCEPTION 'the materialized view beside % is not filled', target USING ERRCODE = 'LSN03',
            HINT = 'SELECT listener.fill_unadoption(view) first.';
    END IF;
    PERFORM listener.check_unread(managed), listener.check_swappable(target),
            listener.check_new_owner(target, listener.owner_back(managed, adoption));
    PERFORM listener.carry_again(target, beside, managed.id, ARRAY(
        SELECT s FROM listener.unadopting(managed, adoption, adoption.query_view) WITH ORDINALITY AS u (s, ord)
        WHERE u.ord > 1 ORDER BY u.ord));
    locked := (listener.swap(target, beside));
    UPDATE listener.adoption a SET state = 'turned back' WHERE a.view_id = managed.id;
    UPDATE listener.managed_view v SET paused_at = coalesce(v.paused_at, clock_timestamp()) WHERE v.id = managed.id;
    PERFORM set_config('role', previous_role, true);
    RETURN locked;
END
$function$;

-- fills_from_target(view): whether fill_unadoption() takes the rows of the target, and whether they depend on the time.
CREATE OR REPLACE FUNCTION listener.fills_from_target(view text, OUT is_so boolean, OUT depends_on_time boolean)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    managed listener.managed_view := listener.find_view(view);
    adoption listener.adoption := listener.find_adoption(view, '{adopted,turning back}');
BEGIN
    is_so := adoption.query_view IS NOT NULL OR listener.query_view_name(managed, adoption) IS NOT NULL;
    depends_on_time := EXISTS (SELECT FROM listener.time_dependence(to_regclass('listener.definition_' || managed.id)) t
                               WHERE t.dependence = 'time');
END
$function$;

-- plan_unadoption(view): what unadopt would do, as plan_adoption() says it; 'beside': a statement of
-- begin_unadoption(); 'filled': one that fill_unadoption() runs after REFRESH; 'now': present where the transaction
-- that fills must refresh each tenant first.
CREATE OR REPLACE FUNCTION listener.plan_unadoption(view text) RETURNS TABLE (part text, statement text)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    previous_role text := listener.become_owner();
    managed listener.managed_view := listener.find_view(view);
    adoption listener.adoption := listener.find_adoption(view, '{adopted,turning back}');
    target regclass := format('%I.%I', managed.target_schema, managed.target_name)::regclass;
    query_view name := listener.query_view_name(managed, adoption);
BEGIN
    PERFORM listener.check_unread(managed), listener.check_swappable(target),
            listener.check_new_owner(target, listener.owner_back(managed, adoption));
    RETURN QUERY
    SELECT 'name', target::text
    UNION ALL
    SELECT 'view', managed.name
    UNION ALL
    SELECT 'lock', l.view::text FROM listener.dependent_views(target) l
    UNION ALL
    SELECT 'lock', target::text
    UNION ALL
    SELECT 'beside', s FROM listener.making_query_view(managed, adoption, query_view) s WHERE query_view IS NOT NULL
    UNION ALL
    SELECT 'beside', s FROM listener.unadopting(managed, adoption, query_view) s
    UNION ALL
    SELECT 'now', managed.name FROM listener.fills_from_target(managed.name) f WHERE f.is_so AND f.depends_on_time
    UNION ALL
    SELECT 'filled', s FROM listener.ending_query_view(managed, adoption, query_view) s WHERE query_view IS NOT NULL
    UNION ALL
    SELECT 'swap', s FROM listener.swapping(target, listener.name_beside(managed)) s;
    PERFORM set_config('role', previous_role, true);
END
$function$;
