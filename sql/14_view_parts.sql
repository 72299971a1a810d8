-- The steps of create_view, each with what it refuses.

-- check_one_select(view, query, what, hint): raises LSN03 where the text is not one SELECT. EXECUTE would run
-- every statement of it, and brackets around the text keep nobody in: "SELECT 1); DROP TABLE x; SELECT (1". So it is
-- looked at where it is data: as the body of a function that is never called, which is parsed and analysed and nothing
-- more; then as a cursor's query, since a cursor takes one statement. That plans it, and planning may run functions that
-- call themselves immutable, so the view's plan_<id> opens the cursor. Both read it under the search_path and the
-- settings of the view.
CREATE OR REPLACE FUNCTION listener.check_one_select(view listener.managed_view, query text, what text, hint text)
    RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    statement text;
    answer jsonb;
    previous jsonb;
BEGIN
    query := format(E'(\n%s\n)', query);
    BEGIN
        statement := format('CREATE FUNCTION listener.check_query() RETURNS SETOF record LANGUAGE sql AS %L', query);
        previous := listener.use_settings(listener.reading_settings(view));
        PERFORM set_config('search_path', view.search_path, true);
        EXECUTE statement;
        DROP FUNCTION listener.check_query();
        PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    EXCEPTION WHEN OTHERS THEN
        RAISE EXCEPTION 'the % is refused: %', what, SQLERRM USING ERRCODE = 'LSN03',
            HINT = CASE WHEN SQLSTATE = '42501' THEN pg_catalog.format('GRANT what is missing to %I.', current_user)
                        ELSE hint END;
    END;
    PERFORM listener.use_settings(previous);
    answer := listener.plan(view.id, '{}', jsonb_build_array(
        jsonb_build_object('query', query, 'path', view.search_path, 'opens', true)));
    -- syntax_error, invalid_cursor_definition. Other errors of planning (of a policy without its setting, say) are no
    -- fault of the text.
    IF answer -> 0 ->> 'sqlstate' IN ('42601', '42P11') THEN
        RAISE EXCEPTION 'the % is refused: %', what, answer -> 0 ->> 'error' USING ERRCODE = 'LSN03', HINT = hint;
    END IF;
END
$function$;

-- make_definition(view), make_tenants(view): make listener.definition_<id> and listener.tenants_<id>, of texts that
-- check_one_select() has passed. Only the texts are read under the view's search_path and settings. The definition is
-- security_invoker, so that row-level security binds the role that computes it; that of a materialized view is not.
CREATE OR REPLACE FUNCTION listener.make_definition(view listener.managed_view) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    previous jsonb;
    statement text := format(E'CREATE VIEW listener.%I WITH (security_invoker = %s) AS (\n%s\n)', 'definition_' || view.id,
                             (view.strategy <> 'materialized view')::text, rtrim(view.query, E'; \n\r\t'));
BEGIN
    previous := listener.use_settings(listener.reading_settings(view));
    PERFORM set_config('search_path', view.search_path, true);
    EXECUTE statement;
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true), listener.use_settings(previous);
END
$function$;
CREATE OR REPLACE FUNCTION listener.make_tenants(view listener.managed_view) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    previous jsonb;
    statement text := format(
        E'CREATE VIEW listener.%I WITH (security_invoker = true) AS SELECT t.tenant::pg_catalog.text FROM (\n%s\n) AS t (tenant)',
        'tenants_' || view.id, rtrim(view.tenants_query, E'; \n\r\t'));
BEGIN
    previous := listener.use_settings(listener.reading_settings(view));
    PERFORM set_config('search_path', view.search_path, true);
    EXECUTE statement;
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true), listener.use_settings(previous);
END
$function$;

-- create_definition(view): makes listener.definition_<id>, and listener.tenants_<id> where a tenants query is given.
-- Returns the definition. Raises LSN03 with the parser's own message.
CREATE OR REPLACE FUNCTION listener.create_definition(view listener.managed_view) RETURNS regclass
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    PERFORM listener.check_one_select(view, rtrim(view.query, E'; \n\r\t'), 'query',
                                      'It must be one SELECT that can stand in a view.');
    BEGIN
        PERFORM listener.make_definition(view);
    EXCEPTION WHEN syntax_error_or_access_rule_violation OR feature_not_supported OR undefined_object
                OR invalid_schema_name OR data_exception OR invalid_table_definition THEN
        RAISE EXCEPTION 'the query is refused: %', SQLERRM USING ERRCODE = 'LSN03',
            HINT = CASE WHEN SQLSTATE = '42501' THEN pg_catalog.format('GRANT what is missing to %I.', current_user)
                        ELSE 'It must be one SELECT that can stand in a view.' END;
    END;
    IF pg_catalog.pg_get_viewdef(pg_catalog.to_regclass('listener.definition_' || view.id))
           OPERATOR(pg_catalog.~) '\mFOR (NO KEY )?(UPDATE|SHARE|KEY SHARE)( OF [^''()]+)?;?\s*$' THEN
        RAISE EXCEPTION 'the query is refused: it locks rows' USING ERRCODE = 'LSN03',
            HINT = 'Leave FOR UPDATE or FOR SHARE away.';
    END IF;
    IF view.tenants_query IS NOT NULL THEN
        -- ARRAY() takes one column: a second one would be ignored below.
        PERFORM listener.check_one_select(
            view, format(wrapped, rtrim(view.tenants_query, E'; \n\r\t')), 'tenants query',
            'It must be one SELECT of one column, for example SELECT id FROM tenants.')
        FROM unnest(ARRAY['%s', E'SELECT ARRAY(\n%s\n)']) AS w (wrapped);
        BEGIN
            PERFORM listener.make_tenants(view);
        EXCEPTION WHEN syntax_error_or_access_rule_violation OR feature_not_supported THEN
            RAISE EXCEPTION 'the tenants query is refused: %', SQLERRM USING ERRCODE = 'LSN03',
                HINT = 'It must be one SELECT of one column, for example SELECT id FROM tenants.';
        END;
        PERFORM listener.check_readable(('listener.tenants_' || view.id)::regclass, listener.grantee_of(view));
        PERFORM listener.check_listable(view.id);
    END IF;
    RETURN pg_catalog.to_regclass('listener.definition_' || view.id);
END
$function$;

-- create_default_tenants(view, source_ids): the tenants of the definition's own rows, for sources that the service can
-- read whole; '' alone where the view has none. Raises LSN03 where row-level security would hide them.
CREATE OR REPLACE FUNCTION listener.create_default_tenants(view listener.managed_view, source_ids integer[])
RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    secured text := (SELECT string_agg(t.relation::text, ', ') FROM unnest(source_ids) s (id)
                     JOIN listener.source o ON o.id = s.id
                     CROSS JOIN LATERAL listener.capture_tables(o.relid) t
                     JOIN pg_class c ON c.oid = t.relation WHERE c.relrowsecurity
                       -- Policies of a table above the source bind only statements that name that table.
                       AND (c.oid = o.relid OR c.oid NOT IN (SELECT p.relid FROM pg_partition_ancestors(o.relid) p))
                       AND NOT EXISTS (SELECT FROM pg_policy p WHERE p.polrelid = c.oid AND listener.lists_target(p)));
BEGIN
    IF view.tenant_column IS NULL THEN
        EXECUTE format('CREATE VIEW listener.%I AS SELECT ''''::pg_catalog.text AS tenant', 'tenants_' || view.id);
        RETURN;
    ELSIF secured IS NOT NULL THEN
        RAISE EXCEPTION 'the tenants cannot be listed: row-level security hides the rows of %', secured
            USING ERRCODE = 'LSN03',
                  HINT = 'Give tenants_query, a query that the service may read, for example SELECT id FROM tenants.';
    END IF;
    EXECUTE format('CREATE VIEW listener.%I WITH (security_invoker = true) AS SELECT DISTINCT d.%I::text AS tenant FROM listener.%I d',
                   'tenants_' || view.id, view.tenant_column, 'definition_' || view.id);
END
$function$;

-- check_columns(definition, tenant_column, key_columns): the type of the tenant column. Raises LSN03 where a column is
-- missing, the type of the tenant column is not supported, its collation takes two tenants for one, the type of a key
-- column cannot be indexed, or a column has a name that the difference of whole rows uses itself.
CREATE OR REPLACE FUNCTION listener.check_columns(definition regclass, tenant_column name, key_columns name[])
RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    missing text;
    tenant_type text;
BEGIN
    SELECT string_agg(quote_ident(k.key), ', ') INTO missing FROM unnest(key_columns) k (key)
    WHERE NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = definition AND a.attname = k.key AND a.attnum > 0);
    IF missing IS NOT NULL THEN
        RAISE EXCEPTION 'the query returns no column %', missing USING ERRCODE = 'LSN03',
            HINT = 'It returns ' || (SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum)
                                     FROM pg_attribute a WHERE a.attrelid = definition AND a.attnum > 0)
                   || coalesce('; it must return the tenant column (' || quote_ident(tenant_column) || ') and the key columns.',
                               '; it must return the key columns.');
    END IF;
    SELECT CASE WHEN a.atttypid = 'varchar'::regtype THEN 'text' ELSE format_type(a.atttypid, NULL) END
    INTO tenant_type FROM pg_attribute a WHERE a.attrelid = definition AND a.attname = tenant_column;
    IF tenant_type NOT IN ('uuid', 'text', 'bigint', 'integer') THEN
        RAISE EXCEPTION 'tenant column % is of type %', tenant_column, tenant_type USING ERRCODE = 'LSN03',
            HINT = 'Supported are uuid, text, varchar, bigint and integer: cast it in the query.';
    END IF;
    SELECT l.oid::regcollation::text INTO missing
    FROM pg_attribute a JOIN pg_collation l ON l.oid = a.attcollation AND NOT l.collisdeterministic
    WHERE a.attrelid = definition AND a.attname = tenant_column;
    IF missing IS NOT NULL THEN
        RAISE EXCEPTION 'tenant column % has the collation %, which takes different texts for equal', tenant_column, missing
            USING ERRCODE = 'LSN03', HINT = 'Return the column of a source whose collation is deterministic, or add COLLATE "C" in the query.';
    END IF;
    SELECT string_agg(format('%I (%s)', a.attname, format_type(a.atttypid, a.atttypmod)), ', ') INTO missing
    FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
    CROSS JOIN LATERAL (SELECT CASE WHEN t.typcategory = 'A' THEN t.typelem ELSE t.oid END) AS e (id)
    WHERE a.attrelid = definition AND a.attname = ANY (key_columns) AND t.typtype = 'b'
      AND NOT EXISTS (SELECT FROM pg_type y WHERE y.oid = e.id AND y.typtype IN ('e', 'r', 'm', 'c', 'd'))
      AND NOT EXISTS (SELECT FROM pg_opclass o JOIN pg_am m ON m.oid = o.opcmethod AND m.amname = 'btree'
                      WHERE o.opcdefault AND (o.opcintype = e.id
                            OR EXISTS (SELECT FROM pg_cast x WHERE x.castsource = e.id
                                       AND x.casttarget = o.opcintype AND x.castmethod = 'b')));
    IF missing IS NOT NULL THEN
        RAISE EXCEPTION 'key columns must have an order: %', missing USING ERRCODE = 'LSN03',
            HINT = 'Choose other key columns, or cast these to text in the query.';
    END IF;
    SELECT string_agg(quote_ident(a.attname), ', ') INTO missing FROM pg_attribute a
    WHERE a.attrelid = definition AND a.attname IN ('listener.row', 'listener.n') AND cardinality(key_columns) = 0;
    IF missing IS NOT NULL THEN
        RAISE EXCEPTION 'no column may be called %', missing USING ERRCODE = 'LSN03',
            HINT = 'Call it otherwise in the query, or give key columns.';
    END IF;
    RETURN tenant_type;
END
$function$;

-- target_tenant_column(relation, definition, tenant_column): the tenant column of a relation that is the target of a
-- managed view, whatever it is called there, where it is of the type that the definition's is.
CREATE OR REPLACE FUNCTION listener.target_tenant_column(relation oid, definition regclass, tenant_column name) RETURNS name
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT v.tenant_column
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    JOIN listener.managed_view v ON v.target_schema = n.nspname AND v.target_name = c.relname
    JOIN pg_attribute t ON t.attrelid = c.oid AND t.attname = v.tenant_column
    JOIN pg_attribute d ON d.attrelid = $2 AND d.attname = $3 AND d.atttypid = t.atttypid
    WHERE c.oid = $1
$function$;

-- register_sources(definition, tenant_column, depends_on): registers every table that the definition reads, and those
-- that policies read while it is computed.
--   source_ids; tenant_secured: row-level security is forced on each that has tenants
-- A view without a tenant column takes a table as it is captured already, or as a view by tenant would most likely have it
-- later: two sets of triggers on it would cost its writers twice. Otherwise a table with a column of the tenant
-- column's name has tenants. All other tables are shared by all tenants, unless add_source named their column. So are,
-- unless add_source said otherwise, a table that depends_on names, and one that a policy reads without keeping tenants
-- apart: nothing shows whose rows a function or a policy reads. Raises LSN03 for a function that may hide a table.
CREATE OR REPLACE FUNCTION listener.register_sources(
    definition regclass, tenant_column name, depends_on regclass[], OUT source_ids integer[], OUT tenant_secured boolean)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    hiding text;
    shared text;
    told text;
    asked text;
    likely name := coalesce((SELECT v.tenant_column FROM listener.managed_view v WHERE v.tenant_column IS NOT NULL
                             GROUP BY 1 ORDER BY count(*) DESC, 1 LIMIT 1), 'tenant_id');
BEGIN
    PERFORM listener.check_source(r.relid::regclass, NULL) FROM listener.reads(definition) r WHERE r.relid < 16384 OR r.relkind = 'S';
    SELECT string_agg(f.funcid::regprocedure::text, ', ') INTO hiding FROM listener.hiding_functions(definition) f;
    IF hiding IS NOT NULL AND depends_on IS NULL THEN
        RAISE EXCEPTION 'the query calls %, which may read tables that the catalog does not show', hiding
            USING ERRCODE = 'LSN03',
                  HINT = 'Name them: depends_on => ''{table, …}'', or ''{}'' when it reads none.';
    END IF;
    SELECT array_agg(listener.register_source(t.relid::regclass, t.tenant_column) ORDER BY t.relid),
           register_sources.tenant_column IS NOT NULL
               AND coalesce(bool_and(t.secured) FILTER (WHERE t.found_column IS NOT NULL OR t.through), false),
           string_agg(t.relid::regclass::text, ', ') FILTER (WHERE t.found_column IS NULL AND NOT t.through),
           string_agg(t.relid::regclass::text, ', ') FILTER (WHERE t.tenant_column IS NULL AND t.found_column IS NOT NULL AND t.is_named),
           string_agg(t.relid::regclass::text, ', ') FILTER (
               WHERE t.tenant_column IS NULL AND t.found_column IS NOT NULL AND NOT t.is_named)
    INTO source_ids, tenant_secured, shared, told, asked
    FROM (
        SELECT x.*, CASE WHEN x.is_apart OR x.is_explicit OR register_sources.tenant_column IS NULL
                         THEN x.found_column END AS tenant_column
        FROM (
            SELECT c.oid AS relid, c.relrowsecurity AND c.relforcerowsecurity AS secured, known.through_id IS NOT NULL AS through,
                   read.is_apart, read.is_named, known.explicit IS TRUE AS is_explicit,
                   CASE WHEN known.id IS NOT NULL THEN known.tenant_column ELSE coalesce(
                       a.attname, listener.target_tenant_column(c.oid, definition, register_sources.tenant_column)) END AS found_column
            FROM (SELECT r.relid, bool_and(r.is_apart) AS is_apart, bool_or(r.is_named) AS is_named
                  FROM (SELECT d.relid, true, false FROM listener.reads(definition) d WHERE d.relkind <> 'v'
                        UNION ALL SELECT d, false, true FROM unnest(depends_on) d
                        UNION ALL
                        SELECT p.relid, p.is_apart, false FROM listener.policy_sources(definition, register_sources.tenant_column) p)
                      AS r (relid, is_apart, is_named)
                  GROUP BY r.relid) read
            JOIN pg_class c ON c.oid = read.relid
            LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = coalesce(register_sources.tenant_column, likely)
                                    AND a.attnum > 0 AND NOT a.attisdropped
                                    AND (register_sources.tenant_column IS NOT NULL
                                         OR a.attgenerated <> 'v' AND a.atttypid = ANY ('{uuid,text,varchar,int4,int8}'::regtype[]))
            -- A table that a look-up goes through has the column that the look-up named, if it has none of this name.
            LEFT JOIN LATERAL (
                SELECT s.* FROM listener.source s
                WHERE s.relid = c.oid AND (s.explicit OR register_sources.tenant_column IS NULL OR (a.attname IS NULL AND EXISTS (
                    SELECT FROM listener.source o WHERE o.through_id = s.id)))
                ORDER BY s.explicit DESC, s.tenant_column IS NULL, s.id LIMIT 1) known ON true) x
    ) t;
    -- A look-up's rows are their parents': when those change tenant, or go, these do.
    SELECT array_agg(DISTINCT i.id) INTO source_ids
    FROM (SELECT s.id FROM unnest(source_ids) s (id)
          UNION SELECT listener.through_sources(s.id) FROM unnest(source_ids) s (id)) i;
    IF shared IS NOT NULL AND tenant_column IS NOT NULL THEN
        RAISE NOTICE '% has no column %: a change to it refreshes every tenant', shared, tenant_column;
    END IF;
    IF told IS NOT NULL THEN
        RAISE NOTICE 'depends_on names %: a change to it refreshes every tenant, since nothing shows whose rows the function reads', told
            USING HINT = format('If it reads the rows of the tenant alone: SELECT listener.add_source(''…'', %L).', tenant_column);
    END IF;
    IF asked IS NOT NULL THEN
        RAISE NOTICE 'a policy reads %: a change to it refreshes every tenant', asked
            USING HINT = format('If it reads the rows of the tenant alone: SELECT listener.add_source(''…'', %L).', tenant_column);
    END IF;
END
$function$;

-- create_target(view, definition): the table that holds the result, empty, with the key as its only unique index.
CREATE OR REPLACE FUNCTION listener.create_target(view listener.managed_view, definition regclass) RETURNS regclass
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    target text := format('%I.%I', view.target_schema, view.target_name);
    grantee name := listener.grantee_of(view);
    schema_id oid := to_regnamespace(quote_ident(view.target_schema));
BEGIN
    IF (has_schema_privilege(schema_id, 'CREATE') AND has_schema_privilege(schema_id, 'USAGE')) IS NOT TRUE THEN
        RAISE EXCEPTION 'role % cannot create a table in schema %', current_user, view.target_schema
            USING ERRCODE = 'LSN03', HINT = CASE WHEN schema_id IS NULL
                THEN format('CREATE SCHEMA %I AUTHORIZATION %I;', view.target_schema, current_user)
                ELSE format('GRANT USAGE, CREATE ON SCHEMA %I TO %I;', view.target_schema, current_user) END;
    END IF;
    EXECUTE format('CREATE TABLE %s (LIKE listener.%I)', target, 'definition_' || view.id);
    IF view.tenant_column IS NOT NULL THEN
        EXECUTE format('ALTER TABLE %s ALTER COLUMN %I SET NOT NULL', target, view.tenant_column);
    END IF;
    -- Without a primary key (its columns could not be NULL), a publication FOR ALL TABLES would stop the refresh.
    EXECUTE format('ALTER TABLE %s REPLICA IDENTITY FULL', target);
    IF cardinality(view.key_columns) > 0 THEN
        EXECUTE format('CREATE UNIQUE INDEX ON %s (%s) NULLS NOT DISTINCT', target,
                       (SELECT string_agg(quote_ident(k.key), ', ' ORDER BY k.ord)
                        FROM unnest(view.key_columns) WITH ORDINALITY AS k (key, ord)));
    ELSIF view.tenant_column IS NOT NULL THEN
        EXECUTE format('CREATE INDEX ON %s (%I)', target, view.tenant_column);
    END IF;
    EXECUTE format('COMMENT ON TABLE %s IS %L', target,
                   'Kept fresh by listener from listener.definition_' || view.id || '; not to be written by hand.');
    PERFORM listener.grant_target(view), listener.grant_definition(view);
    IF NOT has_schema_privilege(grantee, view.target_schema, 'USAGE') THEN
        RAISE EXCEPTION 'role % has no USAGE on schema %', grantee, view.target_schema USING ERRCODE = 'LSN03',
            HINT = format('GRANT USAGE ON SCHEMA %I TO %I;', view.target_schema, grantee);
    END IF;
    IF view.target_rls THEN
        EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY', target);
        EXECUTE listener.target_policy(view);
        EXECUTE format('CREATE POLICY listener_list ON %s FOR SELECT TO %I USING (%s)', target, grantee,
                       listener.list_condition());
    END IF;
    RETURN target::regclass;
END
$function$;

-- target_policy(view): the statement that makes the policy of a target whose readers see the tenant that they name.
CREATE OR REPLACE FUNCTION listener.target_policy(view listener.managed_view) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT format('CREATE POLICY listener_tenant ON %I.%I USING (%I = nullif(current_setting(''app.current_tenant_id'', true), '''')::%s)',
                  view.target_schema, view.target_name, view.tenant_column, view.tenant_type)
$function$;

-- list_condition(): when the service sees a whole target: while it works for no tenant, and lists them. A refresh is bound to
-- its own tenant, also that of a view which reads this target.
CREATE OR REPLACE FUNCTION listener.list_condition() RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT 'nullif(current_setting(''app.current_tenant_id'', true), '''') IS NULL'
$function$;

-- grant_target(view): lets the role that computes a view write its target.
CREATE OR REPLACE FUNCTION listener.grant_target(view listener.managed_view) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON %I.%I TO %I', view.target_schema, view.target_name,
                   listener.grantee_of(view));
END
$function$;

-- grant_definition(view): lets the role that computes a view read its definition and its tenants query.
CREATE OR REPLACE FUNCTION listener.grant_definition(view listener.managed_view) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    IF view.compute_role IS NOT NULL THEN
        EXECUTE format('GRANT USAGE ON SCHEMA listener TO %I', view.compute_role);
        -- See text_of() and value_of().
        EXECUTE format('GRANT EXECUTE ON FUNCTION listener.exact_text(anyelement), listener.exact_value(text, anyelement) TO %I',
                       view.compute_role);
    END IF;
    EXECUTE format('GRANT SELECT ON listener.%I, listener.%I TO %I', 'definition_' || view.id, 'tenants_' || view.id,
                   listener.grantee_of(view));
END
$function$;

-- check_window(...): raises LSN02 where a window makes no sense.
CREATE OR REPLACE FUNCTION listener.check_window(
    quiet_period interval, max_wait interval, edge text, max_age interval, time_zone text,
    max_staleness interval DEFAULT NULL) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    wrong text := CASE
        WHEN quiet_period < '0' THEN 'quiet_period must not be negative'
        WHEN max_wait < quiet_period THEN format('max_wait (%s) must not be shorter than quiet_period (%s)', max_wait, quiet_period)
        WHEN edge NOT IN ('leading', 'trailing') THEN format('edge must be leading or trailing, not %s', edge)
        WHEN max_age <= '0' THEN 'max_age must be longer than 0'
        WHEN max_staleness < max_wait OR max_staleness <= '0' THEN format(
            'max_staleness (%s) must not be shorter than max_wait (%s), for which each change may wait', max_staleness, max_wait)
        WHEN greatest(quiet_period, max_wait, max_age, max_staleness) > '1 year' THEN 'no window is longer than a year'
        WHEN NOT EXISTS (SELECT FROM pg_timezone_names t WHERE lower(t.name) = lower(time_zone))
            THEN format('there is no time zone %L', time_zone) END;
BEGIN
    IF wrong IS NOT NULL THEN
        RAISE EXCEPTION '%', wrong USING ERRCODE = 'LSN02';
    END IF;
END
$function$;
