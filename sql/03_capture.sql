-- Capture: statement-level AFTER triggers with transition tables, and one generated function per source. It is static
-- SQL: with dynamic SQL every write of the application would parse and plan anew. docs/capture.md says what each part
-- of it costs. Longer than the other files, so that all that runs in a writer's transaction is read in one place.

-- ring(source_id, source_name, mode): the doorbell: notifies listener_changes of the tenants that this transaction
-- logged for a source, one notification a tenant up to eight, else one for all. Called by capture where nobody polls.
-- It says nothing where the session has set listener.notify to 'off'; nor, while no mode was chosen, where prepared
-- transactions are allowed: PREPARE TRANSACTION refuses a transaction that has notified. A transaction rings for its
-- first eight statements, once more for all tenants, and then no more: one commit wakes whoever listens once.
CREATE OR REPLACE FUNCTION listener.ring(source_id integer, source_name text, mode text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $function$
DECLARE
    tenants text[];
    -- Ends with the transaction, or with its savepoint, as the notifications do.
    rung integer := coalesce(nullif(current_setting('listener.rung', true), '')::integer, 0);
BEGIN
    IF rung > 8 OR current_setting('listener.notify', true) = 'off'
       OR (mode IS NULL AND current_setting('max_prepared_transactions') <> '0') THEN
        RETURN;
    END IF;
    PERFORM set_config('listener.rung', (rung + 1)::text, true);
    SELECT array_agg(logged.tenant) INTO tenants
    FROM (SELECT DISTINCT l.tenant FROM listener.change_log l
          WHERE l.xid = pg_current_xact_id() AND l.source_id = ring.source_id LIMIT 9) AS logged;
    IF rung = 8 OR cardinality(tenants) > 8 THEN
        tenants := '{""}';
    END IF;
    PERFORM pg_notify('listener_changes', json_build_object(
                'tenant_id', CASE WHEN t.tenant <> '' AND octet_length(t.tenant) <= 1024 THEN t.tenant END,
                'source', source_name)::text)
    FROM unnest(tenants) AS t (tenant);
END
$function$;

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
        SELECT f.name, a.attname, format_type(coalesce(nullif(t.typbasetype, 0), t.oid), -1) AS type
        FROM (SELECT 'tenant_of_' || source.id, source.tenant_column WHERE source.tenant_column IS NOT NULL
              UNION ALL
              SELECT format('key_of_%s_%s', source.id, k.ord), k.name
              FROM unnest(source.through_keys) WITH ORDINALITY AS k (name, ord)) AS f (name, attname)
        JOIN pg_attribute a ON a.attrelid = source.relid AND a.attname = f.attname AND NOT a.attisdropped
        JOIN pg_type t ON t.oid = a.atttypid
    LOOP
        IF NOT listener.tracks_by_view() THEN
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

-- touched_tenants(source, rows, by_name, deleted): the query, for capture, of the tenants of the transition table `rows`.
-- by_name: for a partition whose columns stand in another order than the root's, whose rows the functions above do not
-- take. It looks the column up by its name, slower, and a name that is gone means all tenants.
CREATE OR REPLACE FUNCTION listener.touched_tenants(source listener.source, rows text, by_name boolean, deleted boolean)
RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    keys text;
    names text;
    unnamed text;
BEGIN
    IF source.tenant_column IS NOT NULL THEN
        RETURN format('SELECT DISTINCT %s FROM %s r',
                      CASE WHEN by_name THEN format('pg_catalog.to_jsonb(r) OPERATOR(pg_catalog.->>) %L', source.tenant_column)
                           WHEN listener.tracks_by_view() THEN format('r.%I::pg_catalog.text', source.tenant_column)
                           ELSE format('listener.tenant_of_%1$s(ROW(r.*)::listener.row_%1$s)::pg_catalog.text', source.id) END,
                      rows);
    ELSIF source.through_id IS NULL THEN
        RETURN format('SELECT ''''::pg_catalog.text FROM %s r LIMIT 1', rows);
    END IF;
    SELECT string_agg(CASE WHEN by_name
               THEN format('(pg_catalog.to_jsonb(r) OPERATOR(pg_catalog.->>) %L)::%s AS k%s', k.name,
                           listener.key_type(source.id, k.ord), k.ord)
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

-- generate_capture(source_id): makes or replaces what a source's triggers call: listener.capture_<id>, its form
-- capture_<id>_by_name for partitions of another column order, and their forms for each row, for rows that
-- logical replication applies: that fires no statement trigger.
-- Each appends one change_log row per tenant that the statement touched, then rings the doorbell unless somebody
-- holds its lease. The order matters: whoever saw the lease had its transaction id before, see listener/doorbell.py.
-- A statement that touched no row does neither. Appending locks nothing that two writers share.
CREATE OR REPLACE FUNCTION listener.generate_capture(source_id integer) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    source listener.source;
    mode text := (SELECT i.notify FROM listener.installation i);
    form record;
    log_tenants text;
    log_row text;
    log_moves text;
    looked_through boolean;
    unlinked boolean;
    ring text;
    name text;
    renamed text := 'false';
BEGIN
    SELECT s.* INTO STRICT source FROM listener.source s WHERE s.id = source_id;
    PERFORM listener.generate_tenant_of(source.id);
    IF listener.tracks_by_view() THEN
        SELECT coalesce(string_agg(CASE WHEN t.attnum IS NULL THEN 'true' ELSE format(
                   'pg_catalog.right((pg_catalog.pg_identify_object(''pg_catalog.pg_class''::pg_catalog.regclass, TG_RELID, %s)).identity, %s)
                    IS DISTINCT FROM %L', t.attnum, length('.' || quote_ident(n.attname)), '.' || quote_ident(n.attname)) END,
                   ' OR '), 'false')
        INTO renamed
        FROM (SELECT 'tenant_of_' || source.id, source.tenant_column WHERE source.tenant_column IS NOT NULL
              UNION ALL
              SELECT format('key_of_%s_%s', source.id, k.ord), k.name
              FROM unnest(source.through_keys) WITH ORDINALITY AS k (name, ord)) AS n (tracker, attname)
        LEFT JOIN LATERAL listener.tracked(n.tracker) t ON true;
    END IF;
    log_tenants := format($sql$
        INSERT INTO listener.change_log (xid, changed_at, source_id, tenant, app_correlation_id)
        SELECT pg_catalog.pg_current_xact_id(), pg_catalog.clock_timestamp(), %s, COALESCE(touched.tenant, ''),
               pg_catalog.left(NULLIF(pg_catalog.current_setting('app.correlation_id', true), ''), 200)
        FROM (%%s) AS touched (tenant);$sql$, source.id);
    -- A row can only have moved where the statement touched two tenants. Where no foreign key holds the looked-up row,
    -- a new one may take the place of another.
    SELECT count(*) > 0, coalesce(bool_or(NOT EXISTS (
               SELECT FROM pg_constraint c
               WHERE c.contype = 'f' AND c.conrelid = o.relid AND c.confrelid = source.relid)), false)
    INTO looked_through, unlinked FROM listener.source o WHERE o.through_id = source.id;
    log_moves := format($sql$
        INSERT INTO listener.moved_tenant (xid, source_id, tenant)
        SELECT pg_catalog.pg_current_xact_id(), %s, COALESCE(moved.tenant, '') FROM (%%s) AS moved (tenant);$sql$, source.id);
    -- Runs of one tenant in a transaction are one row: that setting ends with the transaction, or with its savepoint.
    log_row := format($sql$
        FOR touched IN %%s LOOP
            CONTINUE WHEN pg_catalog.current_setting('listener.applied_%1$s', true) = '=' || COALESCE(touched.tenant, '');
            INSERT INTO listener.change_log (xid, changed_at, source_id, tenant)
            VALUES (pg_catalog.pg_current_xact_id(), pg_catalog.clock_timestamp(), %1$s, COALESCE(touched.tenant, ''));
            PERFORM pg_catalog.set_config('listener.applied_%1$s', '=' || COALESCE(touched.tenant, ''), true);
            rung := false;
        END LOOP;$sql$, source.id);
    ring := CASE mode WHEN 'never' THEN '' ELSE format($sql$
    %s
    PERFORM listener.ring(%s, %L, %L);$sql$,
        CASE WHEN mode = 'always' THEN '' ELSE $sql$
    -- A lease lies half a second ahead at the most; one that lies further was given by a clock that stepped back.
    IF pg_catalog.pg_sequence_last_value('listener.doorbell'::pg_catalog.regclass)
           - pg_catalog.date_part('epoch', pg_catalog.clock_timestamp()) * 1000 BETWEEN 0 AND 1000 THEN
        RETURN NULL;
    END IF;$sql$ END, source.id, source.schema_name || '.' || source.table_name, mode) END;
    FOR form IN SELECT f.by_name, CASE WHEN f.by_name THEN '_by_name' ELSE '' END AS suffix
                FROM (VALUES (false), (true)) AS f (by_name) LOOP
        name := format('capture_%s%s', source.id, form.suffix);
        EXECUTE format($create$
CREATE OR REPLACE FUNCTION listener.%I() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $capture$
DECLARE
    tenants bigint := 1;
BEGIN
    IF %s THEN %s
    ELSIF TG_OP = 'INSERT' THEN %s
    ELSIF TG_OP = 'UPDATE' THEN %s
    ELSIF TG_OP = 'DELETE' THEN %s
    ELSE %s
    END IF;
    IF NOT FOUND AND tenants < 2 THEN
        RETURN NULL;
    END IF;%s
    RETURN NULL;
END
$capture$
$create$, name,
            CASE WHEN form.by_name THEN 'false' ELSE renamed END, format(log_tenants, 'SELECT ''''::pg_catalog.text'),
            format(log_tenants, listener.touched_tenants(source, 'new_rows', form.by_name, false))
                || CASE WHEN unlinked THEN format(log_moves, listener.touched_tenants(source, 'new_rows', form.by_name, false))
                        ELSE '' END,
            format(log_tenants, format('(%s) UNION (%s)',
                                       listener.touched_tenants(source, 'new_rows', form.by_name, false),
                                       listener.touched_tenants(source, 'old_rows', form.by_name, false)))
                || CASE WHEN looked_through THEN format($sql$
        GET DIAGNOSTICS tenants = ROW_COUNT;
        IF tenants > 1 THEN %s
        END IF;$sql$, format(log_moves, listener.touched_tenants(source, 'new_rows', form.by_name, false))) ELSE '' END,
            format(log_tenants, listener.touched_tenants(source, 'old_rows', form.by_name, true)),
            format(log_tenants, 'SELECT ''''::pg_catalog.text'), ring);
        -- Firing needs no EXECUTE; with it, anybody could put the function on a table of his own and fill the log.
        EXECUTE format('REVOKE EXECUTE ON FUNCTION listener.%I() FROM PUBLIC', name);
        name := format('capture_%s_row%s', source.id, form.suffix);
        EXECUTE format($create$
CREATE OR REPLACE FUNCTION listener.%I() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $capture$
DECLARE
    touched record;
    rung boolean := true;
BEGIN
    IF %s THEN %s
    ELSE
    IF TG_OP <> 'DELETE' THEN %s
    END IF;
    IF TG_OP <> 'INSERT' THEN %s
    END IF;%s
    END IF;
    IF rung THEN
        RETURN NULL;
    END IF;%s
    RETURN NULL;
END
$capture$
$create$, name,
            CASE WHEN form.by_name THEN 'false' ELSE renamed END, format(log_row, 'SELECT ''''::pg_catalog.text AS tenant'),
            format(log_row, format('SELECT n.tenant FROM (%s) AS n (tenant)',
                                   listener.touched_tenants(source, '(SELECT NEW.*)', form.by_name, false))),
            format(log_row, format('SELECT o.tenant FROM (%s) AS o (tenant)',
                                   listener.touched_tenants(source, '(SELECT OLD.*)', form.by_name, false))),
            CASE WHEN unlinked THEN format($sql$
    IF TG_OP = 'INSERT' THEN %s
    END IF;$sql$, format(log_moves, listener.touched_tenants(source, '(SELECT NEW.*)', form.by_name, false))) ELSE '' END
            || CASE WHEN looked_through THEN format($sql$
    IF TG_OP = 'UPDATE' THEN %s
    END IF;$sql$, format(log_moves, format('(%s) EXCEPT (%s)',
                listener.touched_tenants(source, '(SELECT NEW.*)', form.by_name, false),
                listener.touched_tenants(source, '(SELECT OLD.*)', form.by_name, false)))) ELSE '' END,
            ring);
        EXECUTE format('REVOKE EXECUTE ON FUNCTION listener.%I() FROM PUBLIC', name);
    END LOOP;
END
$function$;

-- set_notify(mode): whether capture notifies: 'when_idle' (unless somebody polls), 'always', 'never' (the service polls
-- alone); NULL: when_idle, or never where max_prepared_transactions is above 0. Raises LSN02 for anything else.
CREATE OR REPLACE FUNCTION listener.set_notify(mode text) RETURNS void
LANGUAGE plpgsql AS $function$
DECLARE
    previous_role text := listener.become_owner();
BEGIN
    IF mode NOT IN ('when_idle', 'always', 'never') THEN
        RAISE EXCEPTION 'notify must be when_idle, always or never, not %', pg_catalog.quote_literal(mode)
            USING ERRCODE = 'LSN02';
    END IF;
    UPDATE listener.installation SET notify = mode;
    PERFORM listener.generate_capture(s.id) FROM listener.source s
    WHERE EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid = s.relid);
    PERFORM pg_catalog.set_config('role', previous_role, true);
END
$function$;

-- hold_lease(): takes or extends the doorbell's lease: for the next half second writers need not notify.
CREATE OR REPLACE FUNCTION listener.hold_lease() RETURNS void
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
    SELECT setval('listener.doorbell', (date_part('epoch', clock_timestamp()) * 1000 + 500)::bigint)
$function$;

-- end_lease(): gives the lease up: from now on writers notify.
CREATE OR REPLACE FUNCTION listener.end_lease() RETURNS void
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
    SELECT setval('listener.doorbell', 0)
$function$;

-- take_mark(): a transaction id assigned after the lease ended, in a transaction of its own after end_lease(), because
-- setval() takes its transaction's id before it changes the sequence. Every writer that saw the lease had its id
-- before it looked, so it is below the mark; is_past(mark) says when they all have ended.
-- The snapshot's xmax would not do: ids at and above it may have been given out already.
CREATE OR REPLACE FUNCTION listener.take_mark() RETURNS xid8
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    IF pg_current_xact_id_if_assigned() IS NOT NULL THEN
        RAISE EXCEPTION 'listener.take_mark() needs a transaction of its own' USING ERRCODE = 'LSN05';
    END IF;
    RETURN pg_current_xact_id();
END
$function$;

-- is_past(mark): whether every transaction below the mark has ended. A drain that begins after that, and is not busy,
-- sees whatever they wrote.
CREATE OR REPLACE FUNCTION listener.is_past(mark xid8) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT pg_snapshot_xmin(pg_current_snapshot()) > mark
$function$;

-- must_poll(): whether capture never notifies, so that whoever drains has to look by itself.
CREATE OR REPLACE FUNCTION listener.must_poll() RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT coalesce(i.notify = 'never', current_setting('max_prepared_transactions') <> '0')
    FROM listener.installation i
$function$;
