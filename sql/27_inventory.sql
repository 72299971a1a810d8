-- What there is to take over: every materialized view and every managed view, and what listener would do with each.

-- refreshed_by(relation): who refreshes a materialized view now, as far as the database shows: pg_cron's jobs, where this role may
-- read them, functions that name it, and the triggers that call these.
CREATE OR REPLACE FUNCTION listener.refreshed_by(relation regclass) RETURNS SETOF text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    called name := (SELECT c.relname FROM pg_class c WHERE c.oid = relation);
    -- As a whole word, in quotes or not.
    names text := '(^|[^[:alnum:]_])' || regexp_replace(called, '([^[:alnum:]_])', '\\\1', 'g') || '($|[^[:alnum:]_])';
    refreshing text := 'refresh\s+materialized\s+view';
    routines text[];
BEGIN
    routines := ARRAY(
        SELECT p.oid::regprocedure::text FROM pg_proc p
        -- The cheapest first: there are thousands.
        WHERE p.prosrc ILIKE '%materialized%' AND p.prosrc ~* refreshing AND p.prosrc ~* names AND p.pronamespace NOT IN ('listener'::regnamespace, 'pg_catalog'::regnamespace)
        ORDER BY 1);
    RETURN QUERY SELECT 'the function ' || r FROM unnest(routines) r;
    RETURN QUERY
        SELECT format('the trigger %I on %s', g.tgname, g.tgrelid::regclass) FROM pg_trigger g
        WHERE NOT g.tgisinternal AND g.tgfoid::regprocedure::text = ANY (routines) ORDER BY 1;
    IF EXISTS (SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = 'cron' AND c.relname = 'job') THEN
        BEGIN
            RETURN QUERY EXECUTE format(
                'SELECT concat(''the job '', j.jobid, '' of pg_cron, at '', j.schedule) FROM %I.%I j
                 WHERE (j.command ~* $1 AND j.command ~* $2)
                    OR EXISTS (SELECT FROM unnest($3) r (name) WHERE strpos(j.command, split_part(r.name, ''('', 1)) > 0)
                 ORDER BY j.jobid', 'cron', 'job')
            USING refreshing, names, routines;
        EXCEPTION WHEN insufficient_privilege OR undefined_column OR undefined_function THEN
            NULL;  -- not ours to read
        END;
    END IF;
END
$function$;

-- tenant_column_of(relation, names): the first of these names that is a column of the relation of a type that a tenant can have,
-- and the type as tenant_scope() takes it.
CREATE OR REPLACE FUNCTION listener.tenant_column_of(relation regclass, names name[], OUT name name, OUT type text)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT a.attname, CASE WHEN a.atttypid = 'varchar'::regtype THEN 'text' ELSE format_type(a.atttypid, NULL) END
    FROM unnest(names) WITH ORDINALITY AS n (name, ord)
    JOIN pg_attribute a ON a.attrelid = relation AND a.attname = n.name AND a.attnum > 0 AND NOT a.attisdropped
    WHERE a.atttypid = ANY ('{uuid,text,varchar,int8,int4}'::regtype[])
    ORDER BY n.ord LIMIT 1
$function$;

-- inventory_names(): every materialized view, and every target of a managed view, by name.
CREATE OR REPLACE FUNCTION listener.inventory_names() RETURNS TABLE (relation regclass)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT c.oid::regclass
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname NOT IN ('pg_catalog', 'information_schema', 'listener') AND n.nspname !~ '^pg_(temp|toast)'
      AND (c.relkind = 'm'
           OR EXISTS (SELECT FROM listener.managed_view v WHERE v.target_schema = n.nspname AND v.target_name = c.relname))
    ORDER BY n.nspname, c.relname
$function$;

-- take_stock(relation, tenant_columns): one of them:
--   managed         its name as a managed view, NULL where it is none; strategy: as it is refreshed
--   rows            an estimate, as of the last ANALYZE, VACUUM or refresh; NULL: never. bytes: with indexes
--   unique_key      the columns of an index by which REFRESH … CONCURRENTLY works, NULL where there is none
--   tenant_column   the first of tenant_columns that it has
--   reads           tables and materialized views, through views
--   separable       whether its rows of a tenant depend on that tenant's rows alone; NULL: without a tenant column, or unknown
--   findings        why not; what would be read whole; columns that count the clock
--   timed, zoned, volatile   the functions of time_dependence(); max_age: what it proposes
--   refreshed_by    who refreshes it now, as far as the database shows
--   rewritten_at    when the transaction was committed that gave it its present storage, or altered it; NULL: not known
-- What a role may not see is NULL or missing. It waits for no lock: where one is held, bytes is NULL.
CREATE OR REPLACE FUNCTION listener.take_stock(
    relation regclass, tenant_columns name[],
    OUT schema name, OUT name name, OUT kind text, OUT owner name, OUT managed text, OUT strategy text, OUT rows bigint, OUT bytes bigint,
    OUT populated boolean, OUT unique_key name[], OUT tenant_column name, OUT tenant_type text, OUT reads text[], OUT separable boolean,
    OUT findings text[], OUT timed text[], OUT zoned text[], OUT volatile text[], OUT max_age interval, OUT refreshed_by text[],
    OUT rewritten_at timestamptz)
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp SET lock_timeout = '100ms' SET jit = off AS $function$
#variable_conflict use_column
DECLARE
    view listener.managed_view;
    class pg_class;
    query regclass := relation;
BEGIN
    SELECT c.* INTO STRICT class FROM pg_class c WHERE c.oid = relation;
    schema := (SELECT n.nspname FROM pg_namespace n WHERE n.oid = class.relnamespace);
    name := class.relname;
    kind := CASE class.relkind WHEN 'm' THEN 'materialized view' ELSE 'table' END;
    owner := pg_get_userbyid(class.relowner);
    rows := nullif(class.reltuples, -1)::bigint;
    populated := class.relispopulated;
    SELECT v.* INTO view FROM listener.managed_view v WHERE v.target_schema = take_stock.schema AND v.target_name = take_stock.name;
    managed := view.name;
    strategy := view.strategy;
    IF view.id IS NOT NULL THEN
        query := coalesce(to_regclass('listener.definition_' || view.id), relation);
    END IF;
    BEGIN
        bytes := pg_total_relation_size(relation);
    EXCEPTION WHEN lock_not_available THEN
        NULL;
    END;
    unique_key := (SELECT array_agg(a.attname ORDER BY k.ord)
                   FROM pg_index x CROSS JOIN LATERAL unnest(x.indkey::smallint[]) WITH ORDINALITY AS k (attnum, ord)
                   JOIN pg_attribute a ON a.attrelid = x.indrelid AND a.attnum = k.attnum
                   WHERE x.indexrelid = listener.concurrent_index(relation) AND k.ord <= x.indnkeyatts);
    SELECT t.name, t.type INTO tenant_column, tenant_type
    FROM listener.tenant_column_of(query, CASE WHEN view.tenant_column IS NOT NULL THEN ARRAY[view.tenant_column] ELSE tenant_columns END) t;
    reads := ARRAY(SELECT i.relid::regclass::text FROM listener.tenant_inputs(query, NULL) i ORDER BY 1);
    IF tenant_column IS NOT NULL THEN
        SELECT coalesce(bool_and(s.proven), true), array_agg(DISTINCT s.advice) FILTER (WHERE s.advice IS NOT NULL)
        INTO separable, findings
        FROM listener.tenant_scope(query, tenant_column, tenant_type) s
        -- What functions read, depends_on said of a managed view.
        WHERE view.depends_on IS NULL OR s.source IS NOT NULL;
        IF EXISTS (SELECT FROM unnest(findings) f WHERE f LIKE 'PostgreSQL could not plan%') THEN
            separable := NULL;
        END IF;
    END IF;
    SELECT coalesce(array_agg(t.what) FILTER (WHERE t.dependence = 'time'), '{}'),
           coalesce(array_agg(t.what) FILTER (WHERE t.dependence = 'time zone'), '{}'),
           coalesce(array_agg(t.what) FILTER (WHERE t.dependence = 'volatile'), '{}'), min(t.max_age)
    INTO timed, zoned, volatile, max_age
    FROM listener.time_dependence(query) t;
    findings := coalesce(findings, '{}') || ARRAY(SELECT a FROM listener.clock_advice(query) a);
    refreshed_by := CASE WHEN view.id IS NOT NULL THEN ARRAY['listener'] ELSE ARRAY(SELECT r FROM listener.refreshed_by(relation) r) END;
    IF current_setting('track_commit_timestamp') = 'on' AND class.relkind = 'm' THEN
        rewritten_at := (SELECT pg_xact_commit_timestamp(c.xmin) FROM pg_class c WHERE c.oid = relation);
    END IF;
END
$function$;

-- proposal(relation, …): what `listener adopt` would do with a materialized view, and why; of what take_stock() says of it.
--   strategy   'tenant': a table that is refreshed by tenant; 'whole': a table that is refreshed as a whole; 'materialized view':
--              it stays, and is refreshed as a whole; 'refused'
--   mends      what must, or should, be done before
CREATE OR REPLACE FUNCTION listener.proposal(
    relation regclass, tenant_column name, separable boolean, unique_key name[], OUT strategy text, OUT why text, OUT key_columns name[],
    OUT mends text[])
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS $function$
#variable_conflict use_column
DECLARE
    read record;
    installed listener.installation;
    hiding text;
    owner name := (SELECT pg_get_userbyid(c.relowner) FROM pg_class c WHERE c.oid = relation);
    hidden regclass;
    -- Why it cannot be a table.
    odd text;
    hidden_from_owner regclass := listener.hidden_from_owner(relation);
    -- Grants that an adoption needs; a materialized view that stays one does not.
    creating text[] := '{}'::text[];
    home regnamespace := (SELECT c.relnamespace FROM pg_class c WHERE c.oid = relation);
    -- Left out are the views on top that need only a grant: see tied_to().
    tied text := (SELECT string_agg(t, '; ' ORDER BY t) FROM listener.tied_to(relation) t WHERE t !~ ': GRANT ');
BEGIN
    SELECT i.* INTO installed FROM listener.installation i;
    mends := '{}';
    FOR read IN
        SELECT i.relid::regclass AS source, i.relkind, c.relowner, c.relnamespace
        FROM (SELECT t.relid, t.relkind FROM listener.tenant_inputs(relation, NULL) t
              UNION SELECT r.relid, r.relkind FROM listener.reads(relation) r WHERE r.relid < 16384 OR r.relkind = 'S'
              UNION SELECT v.relid, 'v' FROM listener.tenant_views(relation) v) i
        JOIN pg_class c ON c.oid = i.relid ORDER BY i.relkind = 'v', i.relid
    LOOP
        BEGIN
            IF read.relkind <> 'v' THEN
                PERFORM listener.check_source(read.source, NULL);
            END IF;
        EXCEPTION WHEN SQLSTATE 'LSN03' THEN
            strategy := 'refused';
            why := SQLERRM;
            IF read.relkind = 'm' THEN
                mends := ARRAY[format('adopt %s first: its changes are seen then', read.source)];
            END IF;
            RETURN;
        END;
        IF read.relkind <> 'v' AND NOT pg_has_role(installed.owner_role, read.relowner, 'USAGE') THEN
            mends := mends || (listener.made_ours(read.source) || ';');
        END IF;
        IF NOT (has_schema_privilege(installed.service_role, read.relnamespace, 'USAGE')
                AND has_any_column_privilege(installed.service_role, read.source, 'SELECT')) THEN
            mends := mends || format('GRANT USAGE ON SCHEMA %s TO %I; GRANT SELECT ON %s TO %I;', read.relnamespace::regnamespace,
                                     installed.service_role, read.source, installed.service_role);
        END IF;
    END LOOP;
    IF listener.session_refusal(relation) IS NOT NULL THEN
        strategy := 'refused';
        why := format('its rows depend on the session that computes them: it reads %s', listener.session_refusal(relation));
        mends := ARRAY['leave that out, or store the value in a column'];
        RETURN;
    END IF;
    SELECT string_agg(DISTINCT f.funcid::regprocedure::text, ', ') INTO hiding 
    FROM (SELECT relation::oid AS relid UNION SELECT v.relid FROM listener.tenant_views(relation) v) v
    CROSS JOIN LATERAL listener.hiding_functions(v.relid) f;
    IF hiding IS NOT NULL THEN
        mends := mends || format('depends_on: the tables that %s reads, or ''{}''', hiding);
    END IF;
    IF NOT pg_has_role(installed.owner_role, owner, 'USAGE') THEN
        mends := mends || (listener.made_ours(relation) || ';');
    END IF;
    mends := mends || ARRAY(SELECT substring(t FROM ': (GRANT .*)$') || ';' FROM listener.tied_to(relation) t WHERE t ~ ': GRANT ');
    IF NOT has_schema_privilege(installed.service_role, home, 'USAGE')
       AND NOT EXISTS (SELECT FROM unnest(mends) m
                       WHERE starts_with(m, format('GRANT USAGE ON SCHEMA %s TO %I;', home, installed.service_role))) THEN
        mends := mends || format('GRANT USAGE ON SCHEMA %s TO %I;', home, installed.service_role);
    END IF;
    creating := ARRAY(
        SELECT format('GRANT %s ON SCHEMA %s TO %s;%s', n.rights, home, string_agg(quote_ident(n.role), ', ' ORDER BY n.role),
                      CASE WHEN n.rights ~ 'CREATE' THEN ' -- CREATE until it is adopted' ELSE '' END)
        FROM (SELECT r.role, string_agg(p.name, ', ' ORDER BY p.name DESC) AS rights
              FROM (SELECT DISTINCT x FROM unnest(ARRAY[installed.owner_role, owner]) x) AS r (role)
              CROSS JOIN unnest('{USAGE,CREATE}'::text[]) AS p (name)
              WHERE NOT has_schema_privilege(r.role, home, p.name) GROUP BY r.role) n
        GROUP BY n.rights ORDER BY 1);
    mends := ARRAY(SELECT m.mend FROM unnest(mends) WITH ORDINALITY AS m (mend, ord) GROUP BY m.mend ORDER BY min(m.ord));
    IF tied IS NOT NULL THEN
        strategy := 'refused';
        why := 'tied to its row type, or to itself, are ' || tied;
        mends := mends || ('drop these first and make them again afterwards'
                           || CASE WHEN hidden_from_owner IS NULL THEN '; or keep it as it is: --strategy materialized-view' ELSE '' END);
        RETURN;
    END IF;
    key_columns := coalesce(unique_key, '{}');
    -- Hidden from the role that computes, while no tenant is set.
    hidden := listener.hidden_source(relation);
    BEGIN
        IF separable OR hidden IS NULL THEN
            PERFORM listener.check_columns(relation, CASE WHEN separable THEN tenant_column END, key_columns);
        END IF;
    EXCEPTION WHEN SQLSTATE 'LSN03' THEN
        odd := SQLERRM;
        IF separable THEN
            strategy := 'refused';
            why := odd;
            RETURN;
        END IF;
    END;
    IF separable THEN
        mends := mends || creating;
        strategy := 'tenant';
        why := format('a tenant''s rows depend on that tenant''s rows alone, by %I', tenant_column)
               || coalesce(format('; until then REFRESH would empty it, or fail: row-level security hides rows of %s from its '
                                  'owner %I', hidden_from_owner, owner), '');
        key_columns := CASE WHEN key_columns = '{}' OR tenant_column = ANY (key_columns) THEN key_columns ELSE tenant_column || key_columns END;
        IF hidden IS NOT NULL THEN
            mends := mends || format('tenants_query: %s has row-level security, so a query is needed that lists the tenants, and that %I may run',
                                     hidden, installed.service_role);
        END IF;
    ELSE
        why := CASE WHEN tenant_column IS NULL THEN 'it has no tenant column'
                    WHEN separable IS NULL THEN 'whether its tenants'' rows are apart could not be found out'
                    ELSE 'it is not proven that a tenant''s rows depend on that tenant''s rows alone' END;
        IF hidden IS NULL AND odd IS NULL THEN
            strategy := 'whole';
            mends := mends || creating;
            why := why || ': a table is refreshed as a whole, and only rows that differ are written';
        ELSIF hidden_from_owner IS NOT NULL THEN
            strategy := 'refused';
            why := why || format(', %s, and row-level security hides rows of %s from its owner %I: as a materialized view, the next REFRESH '
                                 'would empty it', coalesce(odd, format('row-level security hides rows of %s from the service', hidden)),
                                 hidden_from_owner, owner);
            key_columns := NULL;
            mends := mends || format('write it so that a tenant''s rows depend on that tenant''s alone; or CREATE POLICY listener_refresh ON '
                                     '%s FOR SELECT TO %I USING (true); each session of that role then sees all rows',
                                         hidden_from_owner, owner);
        ELSE
            strategy := 'materialized view';
            why := why || format(', and %s: it stays, and is refreshed with its owner''s rights',
                                 coalesce(odd, format('row-level security hides rows of %s from the service', hidden)));
            key_columns := NULL;
            IF unique_key IS NULL THEN
                mends := mends || format('CREATE UNIQUE INDEX ON %s (…), or its readers wait for each refresh', relation);
            END IF;
        END IF;
    END IF;
END
$function$;

-- compare_materialized_view(relation): how many rows only its query has now, and how many only it has: how stale it is. Computed
-- as its owner, as REFRESH computes it. Takes as long as a refresh, within the caller's statement_timeout.
-- Raises LSN03 where row-level security hides rows from the owner: without a tenant, what REFRESH would write is no measure.
-- Also where the calling role may not act as the owner: row-level security may show it other rows, and the
-- query runs the owner's code.
CREATE OR REPLACE FUNCTION listener.compare_materialized_view(relation regclass, OUT missing bigint, OUT extra bigint)
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp SET jit = off AS $function$
DECLARE
    found jsonb;
    owner name := (SELECT pg_get_userbyid(c.relowner) FROM pg_class c WHERE c.oid = relation AND c.relkind = 'm');
    hidden regclass := listener.hidden_from_owner(relation);
BEGIN
    IF hidden IS NOT NULL THEN
        RAISE EXCEPTION 'row-level security hides rows of % from the owner %, whose rights the comparison has', hidden, owner
            USING ERRCODE = 'LSN03';
    END IF;
    found := listener.evaluate_as(owner, format($sql$
        WITH fresh AS MATERIALIZED (SELECT q::text FROM (%s) q), held AS MATERIALIZED (SELECT q::text FROM %s q)
        SELECT jsonb_build_object(
            'missing', (SELECT count(*) FROM (SELECT * FROM fresh EXCEPT ALL SELECT * FROM held) m),
            'extra', (SELECT count(*) FROM (SELECT * FROM held EXCEPT ALL SELECT * FROM fresh) e))$sql$,
        rtrim(listener.query_of(relation), '; '), relation), NULL, listener.default_settings());
    missing := (found ->> 'missing')::bigint;
    extra := (found ->> 'extra')::bigint;
END
$function$;
