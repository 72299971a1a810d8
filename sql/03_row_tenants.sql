-- How a changed row finds its tenant: by a column, by a look-up, or not at all. What is generated here runs in the
-- writer's transaction, as part of capture; docs/capture.md says what it costs.

-- tracks_by_view(): whether this server is older than 18. There, a function with a parsed body stands in the way of every
-- ALTER TABLE that rewrites the table whose row it takes. So capture names its columns in its text, a view keeps track of
-- them, and each statement first sees whether the column still has that name: about 2 microseconds. A column that was
-- renamed means all tenants, until the next sweep has generated capture anew.
CREATE OR REPLACE FUNCTION listener.tracks_by_view() RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT current_setting('server_version_num')::integer < 180000
$function$;

-- tracked(name): the column that the function or the view listener.<name> reads, whatever it is called now.
CREATE OR REPLACE FUNCTION listener.tracked(name text) RETURNS TABLE (attnum smallint, attname name)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT a.attnum, a.attname
    FROM (SELECT 'pg_proc'::regclass, p.oid FROM pg_proc p
          WHERE p.pronamespace = 'listener'::regnamespace AND p.proname = $1
          UNION ALL
          SELECT 'pg_rewrite'::regclass, w.oid FROM pg_rewrite w JOIN pg_class c ON c.oid = w.ev_class
          WHERE c.relnamespace = 'listener'::regnamespace AND c.relname = $1) AS o (classid, oid)
    JOIN pg_depend d ON d.classid = o.classid AND d.objid = o.oid
                    AND d.refclassid = 'pg_class'::regclass AND d.refobjsubid > 0
    JOIN pg_class t ON t.oid = d.refobjid AND t.relnamespace <> 'listener'::regnamespace
    JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid AND NOT a.attisdropped
$function$;

-- tracked_names(names, tracker): the columns that <tracker>_1, <tracker>_2, … read, by the names that they have now; one
-- that was dropped keeps the name that it is given here.
CREATE OR REPLACE FUNCTION listener.tracked_names(names name[], tracker text) RETURNS name[]
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT array_agg(coalesce(t.attname, n.name) ORDER BY n.ord)
    FROM unnest(names) WITH ORDINALITY AS n (name, ord)
    LEFT JOIN LATERAL listener.tracked(format('%s_%s', tracker, n.ord)) t ON true
$function$;

-- base_type(type): what a domain is of in the end, a type itself otherwise. A cast to a domain runs its checks, which are the code of
-- whoever made it, and capture has the rights of the owner of this schema.
CREATE OR REPLACE FUNCTION listener.base_type(type oid) RETURNS oid
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    WITH RECURSIVE base (oid) AS (
        SELECT type
        UNION ALL
        SELECT t.typbasetype FROM base b JOIN pg_type t ON t.oid = b.oid AND t.typbasetype <> 0
    )
    SELECT b.oid FROM base b JOIN pg_type t ON t.oid = b.oid AND t.typbasetype = 0
$function$;

-- generate_tenant_of(source_id): makes listener.row_<id>, a name for the table's row that survives a renamed table,
-- and the functions of a row that capture calls: tenant_of_<id>, or for a look-up key_of_<id>_<n>.
-- Each is an SQL function whose body is parsed once: it names columns by number, so a renamed column cannot break the
-- application's next write, and the planner inlines it, so it costs nothing. If the column is dropped with CASCADE the
-- function goes with it; then the one that takes any row is called, and its NULL means all tenants.
CREATE OR REPLACE FUNCTION listener.generate_tenant_of(source_id integer) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    source listener.source;
    wanted record;
BEGIN
    SELECT s.* INTO STRICT source FROM listener.source s WHERE s.id = source_id;
    IF to_regtype(format('listener.row_%s', source.id)) IS NULL THEN
        EXECUTE format('CREATE DOMAIN listener.%I AS %s', 'row_' || source.id, source.relid::regclass);
    END IF;
    FOR wanted IN
        SELECT f.name, a.attname, format_type(listener.base_type(a.atttypid), -1) AS type
        FROM (SELECT 'tenant_of_' || source.id, source.tenant_column WHERE source.tenant_column IS NOT NULL
              UNION ALL
              SELECT format('key_of_%s_%s', source.id, k.ord), k.name
              FROM unnest(source.through_keys) WITH ORDINALITY AS k (name, ord)) AS f (name, attname)
        JOIN pg_attribute a ON a.attrelid = source.relid AND a.attname = f.attname AND NOT a.attisdropped
    LOOP
        IF NOT listener.tracks_by_view() THEN
            -- As an earlier release made it, it returned the domain that another is over.
            IF (SELECT p.prorettype <> wanted.type::regtype FROM pg_proc p
                WHERE p.oid = to_regprocedure(format('listener.%I(%s)', wanted.name, source.relid::regclass))) THEN
                EXECUTE format('DROP FUNCTION listener.%I(%s)', wanted.name, source.relid::regclass);
            END IF;
            EXECUTE format(
                'CREATE OR REPLACE FUNCTION listener.%1$I(%2$s) RETURNS %3$s LANGUAGE sql STABLE PARALLEL SAFE
                 BEGIN ATOMIC SELECT ($1).%4$I::%3$s; END',
                wanted.name, source.relid::regclass, wanted.type, wanted.attname);
            EXECUTE format('REVOKE EXECUTE ON FUNCTION listener.%I(%s) FROM PUBLIC', wanted.name, source.relid::regclass);
        ELSIF to_regclass(format('listener.%I', wanted.name)) IS NULL THEN
            EXECUTE format('CREATE VIEW listener.%I AS SELECT r.%I AS tracked FROM %s r', wanted.name, wanted.attname,
                           source.relid::regclass);
        END IF;
        -- The table may be one made anew, whose column is of another type.
        IF to_regprocedure(format('listener.%I(anyelement)', wanted.name)) IS NOT NULL THEN
            EXECUTE format('DROP FUNCTION listener.%I(anyelement)', wanted.name);
        END IF;
        EXECUTE format(
            'CREATE FUNCTION listener.%1$I(anyelement) RETURNS %2$s LANGUAGE sql STABLE PARALLEL SAFE
             AS %3$L', wanted.name, wanted.type, 'SELECT NULL::' || wanted.type);
        EXECUTE format('REVOKE EXECUTE ON FUNCTION listener.%I(anyelement) FROM PUBLIC', wanted.name);
    END LOOP;
    IF source.through_id IS NOT NULL THEN
        PERFORM listener.generate_tenants_by(source.id);
    END IF;
END
$function$;

-- key_type(source_id, ord): the type of a look-up's key as capture reads it.
CREATE OR REPLACE FUNCTION listener.key_type(source_id integer, ord bigint) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT min(format_type(p.prorettype, -1)) FROM pg_proc p
    WHERE p.proargtypes[0] = 'anyelement'::regtype AND p.pronamespace = 'listener'::regnamespace AND p.proname = format('key_of_%s_%s', $1, $2)
$function$;

-- generate_tenants_by(source_id): the functions tenants_by_<id>, from the keys of a look-up to the tenants. The one
-- that reads listener.lookup_<id> is inlined, and goes with the view where a table or a column of it is dropped with
-- CASCADE; then the one that takes anything where this one takes a boolean is called, and its NULL means all tenants.
CREATE OR REPLACE FUNCTION listener.generate_tenants_by(source_id integer) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    name text := 'tenants_by_' || source_id;
    types text;
    matches text;
    other regprocedure;
BEGIN
    SELECT string_agg(listener.key_type(source_id, k.ord), ', ' ORDER BY k.ord),
           string_agg(format('l.k%s = $%s', k.ord, k.ord + 1), ' AND ' ORDER BY k.ord)
    INTO types, matches
    FROM listener.source s CROSS JOIN unnest(s.through_keys) WITH ORDINALITY AS k (name, ord) WHERE s.id = source_id;
    IF to_regclass('listener.lookup_' || source_id) IS NULL OR types IS NULL THEN
        RETURN;
    END IF;
    EXECUTE format('CREATE OR REPLACE FUNCTION listener.%I(boolean, %s) RETURNS SETOF text LANGUAGE sql STABLE
                    BEGIN ATOMIC SELECT l.tenant FROM listener.%I l WHERE $1 AND %s; END',
                   name, types, 'lookup_' || source_id, matches);
    -- The table may be one made anew, whose key is of another type.
    FOR other IN SELECT p.oid FROM pg_proc p
                 WHERE p.pronamespace = 'listener'::regnamespace AND p.proname = name
                   AND p.proargtypes[0] = 'anyelement'::regtype LOOP
        EXECUTE format('DROP FUNCTION %s', other);
    END LOOP;
    EXECUTE format('CREATE FUNCTION listener.%I(anyelement, %s) RETURNS SETOF text LANGUAGE sql STABLE
                    AS ''SELECT NULL::text''', name, types);
    EXECUTE format('REVOKE EXECUTE ON FUNCTION listener.%1$I(boolean, %2$s), listener.%1$I(anyelement, %2$s) FROM PUBLIC',
                   name, types);
END
$function$;

-- column_by_name(name, expression, type): an expression of a column of the row `r`, which may stand anywhere in that row; NULL where
-- there is none of this name any more: then the name means that of the query around.
CREATE OR REPLACE FUNCTION listener.column_by_name(name name, expression text, type text) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT format('(SELECT (SELECT %s FROM (SELECT r.*) AS "listener.row") FROM (SELECT NULL::%s AS %I) AS "listener.gone")',
                  expression, type, name)
$function$;

-- row_tenant(source, by_name): the tenant of the row `r` of a table that has a tenant column. Where equal values are the
-- same text it is left as it is: a million uuids are told apart in half the time that their texts take.
-- by_name: for a partition, or whatever else is captured along with the source, whose rows tenant_of_<id> may not take: see
-- column_by_name(). Its value becomes text as the type writes it, without a cast, which could be somebody's own;
-- that keeps the blanks at the end of a char(n), which a cast takes away.
CREATE OR REPLACE FUNCTION listener.row_tenant(source listener.source, by_name boolean) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT CASE WHEN by_name
                THEN listener.column_by_name(source.tenant_column, format(CASE WHEN EXISTS (
                                SELECT FROM pg_attribute a
                                WHERE a.attrelid = source.relid AND a.attname = source.tenant_column AND NOT a.attisdropped
                                  AND listener.base_type(a.atttypid) = 'bpchar'::regtype)
                            THEN 'CASE WHEN %1$I IS NOT NULL THEN pg_catalog.rtrim(pg_catalog.concat(%1$I)) END'
                            ELSE 'CASE WHEN %1$I IS NOT NULL THEN pg_catalog.concat(%1$I) END' END, source.tenant_column), 'pg_catalog.text')
                     || ' COLLATE pg_catalog."C"'
                ELSE format(CASE WHEN listener.tracks_by_view() THEN 'r.%2$I' ELSE 'listener.tenant_of_%1$s(ROW(r.*)::listener.row_%1$s)' END,
                            source.id, source.tenant_column)
                     || CASE WHEN EXISTS (
                            SELECT FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
                            WHERE a.attrelid = source.relid AND a.attname = source.tenant_column AND NOT a.attisdropped
                              AND coalesce(nullif(t.typbasetype, 0), t.oid) = ANY ('{uuid,int2,int4,int8}'::regtype[]))
                        THEN '' ELSE '::pg_catalog.text COLLATE pg_catalog."C"' END END
$function$;

-- lone_tenant(source, event): the query, for capture, of the tenant of a statement that touched one row, none where
-- it touched more or moved the row to another tenant. Telling tenants apart (setting up a hash table) costs a
-- one-row statement more than writing the log row does. NULL: there is nothing to gain.
CREATE OR REPLACE FUNCTION listener.lone_tenant(source listener.source, event text) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT format('SELECT %1$s FROM %2$s r WHERE NOT EXISTS (SELECT FROM %2$s OFFSET 1)%3$s', t.tenant,
                  CASE WHEN event = 'delete' THEN 'old_rows' ELSE 'new_rows' END,
                  CASE WHEN event = 'update'
                       THEN format(' AND %1$s OPERATOR(pg_catalog.=) (SELECT %1$s FROM old_rows r LIMIT 1)', t.tenant)
                       ELSE '' END)
    FROM listener.row_tenant(source, false) AS t (tenant)
    WHERE source.tenant_column IS NOT NULL AND event <> 'truncate'
$function$;

-- touched_tenants(source, rows, by_name, deleted): the query, for capture, of the tenants of the transition table `rows`.
CREATE OR REPLACE FUNCTION listener.touched_tenants(source listener.source, rows text, by_name boolean, deleted boolean)
RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    keys text;
    names text;
    unnamed text;
BEGIN
    IF source.tenant_column IS NOT NULL THEN
        RETURN format('SELECT DISTINCT %s FROM %s r', listener.row_tenant(source, by_name), rows);
    ELSIF source.through_id IS NULL THEN
        RETURN format('SELECT ''''::pg_catalog.text FROM %s r LIMIT 1', rows);
    END IF;
    SELECT string_agg(CASE WHEN by_name
               THEN format('%s AS k%s', listener.column_by_name(k.name, format('%I::%s', k.name, listener.key_type(source.id, k.ord)),
                                                               listener.key_type(source.id, k.ord)), k.ord)
               WHEN listener.tracks_by_view()
               THEN format('r.%I::%s AS k%s', k.name, listener.key_type(source.id, k.ord), k.ord)
               ELSE format('listener.key_of_%1$s_%2$s(ROW(r.*)::listener.row_%1$s) AS k%2$s', source.id, k.ord) END,
               ', ' ORDER BY k.ord),
           string_agg(format('k.k%s', k.ord), ', ' ORDER BY k.ord), string_agg(format('k.k%s IS NULL', k.ord), ' OR ')
    INTO keys, names, unnamed
    FROM unnest(source.through_keys) WITH ORDINALITY AS k (name, ord);
    -- A transaction that does not look anew for each statement may have taken its snapshot long before its id: then a
    -- move of the looked-up row could be forgotten before it ends (see moved_tenant), so its rows are anybody's.
    names := format('pg_catalog.current_setting(''transaction_isolation'') = ''read committed'', %s', names);
    -- A row that finds nothing may be anybody's. But where a foreign key cascades, a deleted row that names a parent
    -- and does not find it lost it in this transaction, and the parent's own capture logs the tenant.
    IF deleted AND source.through_cascades THEN
        RETURN format('SELECT DISTINCT l.tenant FROM (SELECT DISTINCT %1$s FROM %2$s r) k
                       JOIN LATERAL listener.tenants_by_%3$s(%4$s) l (tenant) ON true
                       UNION (SELECT NULL FROM (SELECT %1$s FROM %2$s r) k WHERE %5$s LIMIT 1)',
                      keys, rows, source.id, names, unnamed);
    END IF;
    RETURN format('SELECT DISTINCT l.tenant FROM (SELECT DISTINCT %s FROM %s r) k
                   LEFT JOIN LATERAL listener.tenants_by_%s(%s) l (tenant) ON true', keys, rows, source.id, names);
END
$function$;

