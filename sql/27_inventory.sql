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
--   findings        why not; and what would be read whole
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
    findings := coalesce(findings, '{}');
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
    hidden regclass;
    home regnamespace := (SELECT c.relnamespace FROM pg_class c WHERE c.oid = relation);
    tied text := (SELECT string_agg(t, '; ' ORDER BY t) FROM listener.tied_to(relation) t);
BEGIN
    SELECT i.* INTO installed FROM listener.installation i;
    mends := '{}';
    FOR read IN
        SELECT i.relid::regclass AS source, i.relkind, c.relowner, c.relnamespace
        FROM (SELECT t.relid, t.relkind FROM listener.tenant_inputs(relation, NULL) t
              UNION SELECT r.relid, r.relkind FROM listener.reads(relation) r WHERE r.relid < 16384 OR r.relkind = 'S') i
        JOIN pg_class c ON c.oid = i.relid ORDER BY i.relid
    LOOP
        BEGIN
            PERFORM listener.check_source(read.source, NULL);
        EXCEPTION WHEN SQLSTATE 'LSN03' THEN
            strategy := 'refused';
            why := SQLERRM;
            IF read.relkind = 'm' THEN
                mends := ARRAY[format('adopt %s first: its changes are seen then', read.source)];
            END IF;
            RETURN;
        END;
        IF NOT pg_has_role(installed.owner_role, read.relowner, 'USAGE') THEN
            mends := mends || format('GRANT %I TO %I;', pg_get_userbyid(read.relowner), installed.owner_role);
        END IF;
        IF NOT (has_schema_privilege(installed.service_role, read.relnamespace, 'USAGE')
                AND has_any_column_privilege(installed.service_role, read.source, 'SELECT')) THEN
            mends := mends || format('GRANT USAGE ON SCHEMA %s TO %I; GRANT SELECT ON %s TO %I;', read.relnamespace::regnamespace,
                                     installed.service_role, read.source, installed.service_role);
        END IF;
    END LOOP;
    SELECT string_agg(DISTINCT f.funcid::regprocedure::text, ', ') INTO hiding 
    FROM (SELECT relation::oid AS relid UNION SELECT v.relid FROM listener.tenant_views(relation) v) v
    CROSS JOIN LATERAL listener.hiding_functions(v.relid) f;
    IF hiding IS NOT NULL THEN
        mends := mends || format('depends_on: the tables that %s reads, or ''{}''', hiding);
    END IF;
    IF NOT pg_has_role(installed.owner_role, (SELECT c.relowner FROM pg_class c WHERE c.oid = relation), 'USAGE') THEN
        mends := mends || (SELECT format('GRANT %I TO %I;', pg_get_userbyid(c.relowner), installed.owner_role) FROM pg_class c WHERE c.oid = relation);
    END IF;
    IF NOT has_schema_privilege(installed.service_role, home, 'USAGE') THEN
        mends := mends || format('GRANT USAGE ON SCHEMA %s TO %I;', home, installed.service_role);
    END IF;
    mends := ARRAY(SELECT m.mend FROM unnest(mends) WITH ORDINALITY AS m (mend, ord) GROUP BY m.mend ORDER BY min(m.ord));
    IF tied IS NOT NULL THEN
        strategy := 'refused';
        why := 'tied to its row type, or to itself, are ' || tied;
        mends := mends || 'drop these first and make them again afterwards; or keep it as it is: --strategy materialized-view'::text;
        RETURN;
    END IF;
    key_columns := coalesce(unique_key, '{}');
    -- From the service's role, with no tenant set.
    hidden := (SELECT min(i.relid)::regclass FROM listener.tenant_inputs(relation, NULL) i WHERE listener.hides_rows(i.relid));
    IF separable THEN
        strategy := 'tenant';
        why := format('a tenant''s rows depend on that tenant''s rows alone, by %I', tenant_column);
        key_columns := CASE WHEN key_columns = '{}' OR tenant_column = ANY (key_columns) THEN key_columns ELSE tenant_column || key_columns END;
        IF hidden IS NOT NULL THEN
            mends := mends || format('tenants_query: %s has row-level security, so a query is needed that lists the tenants, and that %I may run',
                                     hidden, installed.service_role);
        END IF;
    ELSE
        why := CASE WHEN tenant_column IS NULL THEN 'it has no tenant column'
                    WHEN separable IS NULL THEN 'whether its tenants'' rows are apart could not be found out'
                    ELSE 'it is not proven that a tenant''s rows depend on that tenant''s rows alone' END;
        IF hidden IS NULL THEN
            strategy := 'whole';
            why := why || ': a table is refreshed as a whole, and only rows that differ are written';
        ELSE
            strategy := 'materialized view';
            why := why || format(', and row-level security hides rows of %s from the service: it stays, and is refreshed with its owner''s rights', hidden);
            key_columns := NULL;
            IF unique_key IS NULL THEN
                mends := mends || format('CREATE UNIQUE INDEX ON %s (…), or its readers wait for each refresh', relation);
            END IF;
        END IF;
    END IF;
END
$function$;

-- compare_materialized_view(relation): how many rows only its query has now, and how many only it has: how stale it is. Computed
-- with the rights of its owner where this role may take them, as REFRESH computes it; where it may not, and row-level security would
-- show this role other rows, raises LSN03. Takes as long as a refresh, within the caller's statement_timeout.
CREATE OR REPLACE FUNCTION listener.compare_materialized_view(relation regclass, OUT missing bigint, OUT extra bigint)
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp SET jit = off AS $function$
DECLARE
    previous_role text := current_setting('role');
    class pg_class;
BEGIN
    SELECT c.* INTO STRICT class FROM pg_class c WHERE c.oid = relation AND c.relkind = 'm';
    IF pg_has_role(current_user, class.relowner, 'MEMBER') THEN
        PERFORM set_config('role', pg_get_userbyid(class.relowner), true);
    ELSIF EXISTS (SELECT FROM listener.tenant_inputs(relation, NULL) i JOIN pg_class c ON c.oid = i.relid WHERE c.relrowsecurity)
    AND NOT (SELECT r.rolsuper OR r.rolbypassrls FROM pg_roles r WHERE r.rolname = current_user) THEN
        RAISE EXCEPTION 'row-level security would show % other rows than its owner', current_user USING ERRCODE = 'LSN03',
            HINT = format('Run it as %I, or a member of it.', pg_get_userbyid(class.relowner));
    END IF;
    EXECUTE format($sql$
        WITH fresh AS MATERIALIZED (SELECT q::text FROM (%s) q), held AS MATERIALIZED (SELECT q::text FROM %s q)
        SELECT (SELECT count(*) FROM (SELECT * FROM fresh EXCEPT ALL SELECT * FROM held) m),
               (SELECT count(*) FROM (SELECT * FROM held EXCEPT ALL SELECT * FROM fresh) e)$sql$,
        rtrim(pg_get_viewdef(relation), '; '), relation) INTO missing, extra;
    PERFORM set_config('role', previous_role, true);
END
$function$;
