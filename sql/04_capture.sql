-- Capture: statement-level AFTER triggers with transition tables, and generated functions for each source. They are
-- static SQL: with dynamic SQL every write of the application would parse and plan anew. docs/capture.md says what each
-- part of it costs.

-- ring(source_id, source_name, mode): the doorbell: notifies listener_changes of the tenants that this transaction
-- logged for a source, one notification a tenant up to eight, else one for all. Called by capture where nobody polls.
-- It says nothing where the session has set listener.notify to 'off'; nor, while no mode was chosen, where prepared
-- transactions are allowed: PREPARE TRANSACTION refuses a transaction that has notified. A transaction rings for its
-- first eight statements, once more for all tenants, and then no more: one commit wakes whoever listens once.
-- source_name NULL: the installation hides names. Then it notifies once and names neither tenant nor table, with the
-- text of ring_for_all(), which a service of any release understands.
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
    IF source_name IS NULL THEN
        PERFORM set_config('listener.rung', '9', true),
                pg_notify('listener_changes', '{"tenant_id": null, "source": "listener"}');
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

-- generate_capture(source_id): makes or replaces what a source's triggers call: listener.capture_<id>_<event>, and
-- their forms _by_name for partitions of another column order. The event is insert, update, delete or truncate; or row,
-- for rows that logical replication applies: that fires no statement trigger.
-- Each appends one change_log row per tenant that the statement touched, then rings the doorbell unless somebody
-- holds its lease. The order matters: whoever saw the lease had its transaction id before, see listener/doorbell.py.
-- A statement that touched no row does neither. Appending locks nothing that two writers share.
-- A function per event, and no variable or condition that an event does not need: each costs every transaction anew.
CREATE OR REPLACE FUNCTION listener.generate_capture(source_id integer) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    source listener.source;
    mode text;
    notify_names boolean;
    form record;
    log_tenants text;
    log_moves text;
    looked_through boolean;
    unlinked boolean;
    ring text;
    body text;
    renamed text;
    partitioned boolean;
BEGIN
    SELECT s.* INTO STRICT source FROM listener.source s WHERE s.id = source_id;
    SELECT i.notify, i.notify_names INTO mode, notify_names FROM listener.installation i;
    partitioned := EXISTS (SELECT FROM pg_class c WHERE c.oid = source.relid AND (c.relkind = 'p' OR c.relispartition));
    PERFORM listener.generate_tenant_of(source.id);
    IF listener.tracks_by_view() THEN
        SELECT string_agg(CASE WHEN t.attnum IS NULL THEN 'true' ELSE format(
                   'pg_catalog.right((pg_catalog.pg_identify_object(''pg_catalog.pg_class''::pg_catalog.regclass, TG_RELID, %s)).identity, %s)
                    IS DISTINCT FROM %L', t.attnum, length('.' || quote_ident(n.attname)), '.' || quote_ident(n.attname)) END,
                   ' OR ')
        INTO renamed
        FROM (SELECT 'tenant_of_' || source.id, source.tenant_column WHERE source.tenant_column IS NOT NULL
              UNION ALL
              SELECT format('key_of_%s_%s', source.id, k.ord), k.name
              FROM unnest(source.through_keys) WITH ORDINALITY AS k (name, ord)) AS n (tracker, attname)
        LEFT JOIN LATERAL listener.tracked(n.tracker) t ON true;
    END IF;
    log_tenants := format($sql$
    INSERT INTO listener.change_log (xid, changed_at, source_id, tenant, app_correlation_id)
    SELECT pg_catalog.pg_current_xact_id(), pg_catalog.statement_timestamp(), %s, COALESCE(touched.tenant::pg_catalog.text, ''),
           pg_catalog.left(pg_catalog.current_setting('app.correlation_id', true), 200)
    FROM (%%s) AS touched (tenant);$sql$, source.id);
    -- A row can only have moved where the statement touched two tenants. Where no foreign key holds the looked-up row,
    -- a new one may take the place of another.
    SELECT count(*) > 0, coalesce(bool_or(NOT EXISTS (
               SELECT FROM pg_constraint c
               WHERE c.contype = 'f' AND c.conrelid = o.relid AND c.confrelid = source.relid)), false)
    INTO looked_through, unlinked FROM listener.source o WHERE o.through_id = source.id;
    log_moves := format($sql$
    INSERT INTO listener.moved_tenant (xid, source_id, tenant)
    SELECT pg_catalog.pg_current_xact_id(), %s, COALESCE(moved.tenant::pg_catalog.text, '') FROM (%%s) AS moved (tenant);$sql$,
        source.id);
    ring := CASE mode WHEN 'never' THEN '' ELSE format($sql$%s
    PERFORM listener.ring(%s, %L, %L);$sql$,
        CASE WHEN mode = 'always' THEN '' ELSE $sql$
    IF pg_catalog.pg_sequence_last_value('listener.doorbell'::pg_catalog.regclass)
           > pg_catalog.date_part('epoch', pg_catalog.clock_timestamp()) * 1000 THEN
        RETURN NULL;
    END IF;$sql$ END, source.id, CASE WHEN notify_names THEN source.schema_name || '.' || source.table_name END, mode) END;
    FOR form IN SELECT e.event, n.by_name, n.suffix,
                       CASE e.event
                           WHEN 'insert' THEN listener.touched_tenants(source, 'new_rows', n.by_name, false)
                           WHEN 'delete' THEN listener.touched_tenants(source, 'old_rows', n.by_name, true)
                           WHEN 'update' THEN format('(%s) UNION (%s)',
                                                     listener.touched_tenants(source, 'new_rows', n.by_name, false),
                                                     listener.touched_tenants(source, 'old_rows', n.by_name, false))
                           ELSE 'SELECT ''''::pg_catalog.text' END AS tenants,
                       CASE WHEN NOT n.by_name THEN listener.lone_tenant(source, e.event) END AS lone_tenant,
                       listener.touched_tenants(source, 'new_rows', n.by_name, false) AS moved
                FROM unnest('{insert,update,delete,truncate}'::text[]) AS e (event)
                CROSS JOIN (VALUES (false, ''), (true, '_by_name')) AS n (by_name, suffix) LOOP
        body := format(log_tenants, form.tenants)
            || CASE WHEN looked_through AND form.event = 'update' THEN format($sql$
    GET DIAGNOSTICS tenants = ROW_COUNT;
    IF tenants > 1 THEN%s
    END IF;$sql$, format(log_moves, form.moved))
                    WHEN unlinked AND form.event = 'insert' THEN format(log_moves, form.moved) ELSE '' END || $sql$
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;$sql$;
        IF form.lone_tenant IS NOT NULL AND NOT (unlinked AND form.event = 'insert') THEN
            body := format(log_tenants, form.lone_tenant) || format($sql$
    IF NOT FOUND THEN%s
    END IF;$sql$, body);
        END IF;
        IF partitioned AND form.event = 'update' THEN
            body := format($sql$
    IF pg_catalog.current_setting('listener.moved_%1$s', true) = 'moved' THEN
        GET DIAGNOSTICS callers = PG_CONTEXT;
        everybody := NOT listener.is_plain_update(callers, pg_catalog.current_query());
    END IF;
    IF everybody THEN%2$s%3$s
        PERFORM pg_catalog.set_config('listener.moved_%1$s', 'logged', true);
    ELSE%4$s
    END IF;$sql$, source.id, format(log_tenants, 'SELECT ''''::pg_catalog.text'),
                CASE WHEN looked_through THEN format(log_moves, 'SELECT ''''::pg_catalog.text') ELSE '' END, body);
        END IF;
        PERFORM listener.create_capture_function(
            format('capture_%s_%s%s', source.id, form.event, form.suffix),
            CASE WHEN looked_through AND form.event = 'update' THEN 'tenants bigint;' ELSE '' END
            || CASE WHEN partitioned AND form.event = 'update' THEN ' callers text; everybody boolean := false;' ELSE '' END,
            CASE WHEN NOT form.by_name AND form.event <> 'truncate' THEN renamed END,
            format(log_tenants, 'SELECT ''''::pg_catalog.text'), body, ring);
    END LOOP;
    PERFORM listener.generate_row_capture(source, renamed, looked_through, unlinked, log_moves, ring);
    IF partitioned THEN
        PERFORM listener.generate_moves(source.id);
    END IF;
    UPDATE listener.source s SET capture_digest = listener.capture_digest(s.id) WHERE s.id = source.id;
END
$function$;

-- generate_moves(source_id): makes listener.capture_<id>_watch and listener.capture_<id>_moved, see wanted_triggers().
-- A MERGE gives its UPDATE trigger only the rows that stay in their partition. It gives those that move to the DELETE
-- and INSERT triggers, which fire only if the MERGE has such actions. So `watch` sets listener.moved_<id>, and `moved`
-- notes in it that a row left its partition. The UPDATE trigger fires last, and then marks every tenant, unless
-- is_plain_update() says that the statement was no MERGE. The setting ends with the transaction, or with its savepoint,
-- as the log rows do.
CREATE OR REPLACE FUNCTION listener.generate_moves(source_id integer) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    made record;
BEGIN
    FOR made IN SELECT format(m.name, source_id) AS name, format(m.body, source_id) AS body FROM (VALUES
        ('capture_%s_watch', $body$
BEGIN
    IF COALESCE(pg_catalog.current_setting('listener.moved_%1$s', true), '') = '' THEN
        PERFORM pg_catalog.set_config('listener.moved_%1$s', 'watch', true);
    END IF;
    RETURN NULL;
END
$body$), ('capture_%s_moved', $body$
BEGIN
    IF pg_catalog.current_setting('listener.moved_%1$s', true) = 'watch' THEN
        PERFORM pg_catalog.set_config('listener.moved_%1$s', 'moved', true);
    END IF;
    RETURN NULL;
END
$body$)) AS m (name, body) LOOP
        EXECUTE format('CREATE OR REPLACE FUNCTION listener.%I() RETURNS trigger
                        LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS %L', made.name, made.body);
        EXECUTE format('REVOKE EXECUTE ON FUNCTION listener.%I() FROM PUBLIC', made.name);
    END LOOP;
END
$function$;

-- is_plain_update(callers, query): whether the statement that fired the trigger is surely an UPDATE and no MERGE, so
-- that the trigger has every row. `callers` is PG_CONTEXT in the trigger, `query` what the client sent. If no function
-- is in between, `query` is the statement; else the second line of `callers` shows it. If neither does (an SQL
-- function, a prepared statement, messages in another language), the answer is no, and every tenant is refreshed.
CREATE OR REPLACE FUNCTION listener.is_plain_update(callers text, query text) RETURNS boolean
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT CASE WHEN position(E'\n' IN callers) = 0 THEN coalesce(query !~* '\m(merge|execute)\M', false)
                ELSE split_part(callers, E'\n', 2) ~* '^SQL statement "\s*UPDATE\s' END
$function$;

-- capture_digest(source_id): of the capture functions of a source as they are now: generate_capture notes it, and doctor compares.
CREATE OR REPLACE FUNCTION listener.capture_digest(source_id integer) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT md5(string_agg(concat_ws(' ', p.proname, p.prosecdef, p.proconfig, md5(p.prosrc)), E'\n' ORDER BY p.proname))
    FROM pg_proc p
    WHERE p.pronamespace = 'listener'::regnamespace AND p.prorettype = 'trigger'::regtype
      AND p.proname IN (SELECT format('capture_%s_%s%s', $1, e.event, n.suffix)
                        FROM unnest('{insert,update,delete,truncate,row,watch,moved}'::text[]) e (event)
                        CROSS JOIN unnest('{"",_by_name}'::text[]) n (suffix))
$function$;

-- create_capture_function(name, declarations, renamed, log_everybody, body, ring): a trigger function of capture.
-- renamed: the condition, where there is one, on which the columns have other names than the body's: then it is
-- log_everybody that runs.
CREATE OR REPLACE FUNCTION listener.create_capture_function(
    name text, declarations text, renamed text, log_everybody text, body text, ring text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    IF renamed IS NOT NULL THEN
        body := format($sql$
    IF %s THEN%s
    ELSE%s
    END IF;$sql$, renamed, log_everybody, body);
    END IF;
    -- As a literal: a column's name may hold whatever a dollar quote ends with.
    EXECUTE format('CREATE OR REPLACE FUNCTION listener.%I() RETURNS trigger
                    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS %L', name, format($capture$
DECLARE
    %s
BEGIN%s
    RETURN NULL;
END
$capture$, declarations, body || ring));
    -- Firing needs no EXECUTE; with it, anybody could put the function on a table of his own and fill the log.
    EXECUTE format('REVOKE EXECUTE ON FUNCTION listener.%I() FROM PUBLIC', name);
END
$function$;

-- generate_row_capture(...): listener.capture_<id>_row and its form _by_name, see generate_capture. Runs of one tenant in a
-- transaction are one log row: the setting that says so ends with the transaction, or with its savepoint.
CREATE OR REPLACE FUNCTION listener.generate_row_capture(
    source listener.source, renamed text, looked_through boolean, unlinked boolean, log_moves text, ring text)
RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    form record;
    log_row text := format($sql$
        FOR touched IN SELECT t.tenant::pg_catalog.text AS tenant FROM (%%s) AS t (tenant) LOOP
            CONTINUE WHEN pg_catalog.current_setting('listener.applied_%1$s', true) = '=' || COALESCE(touched.tenant, '');
            INSERT INTO listener.change_log (xid, changed_at, source_id, tenant)
            VALUES (pg_catalog.pg_current_xact_id(), pg_catalog.clock_timestamp(), %1$s, COALESCE(touched.tenant, ''));
            PERFORM pg_catalog.set_config('listener.applied_%1$s', '=' || COALESCE(touched.tenant, ''), true);
            rung := false;
        END LOOP;$sql$, source.id);
    body text;
BEGIN
    FOR form IN SELECT n.by_name, n.suffix,
                       listener.touched_tenants(source, '(SELECT NEW.*)', n.by_name, false) AS new_tenant,
                       listener.touched_tenants(source, '(SELECT OLD.*)', n.by_name, false) AS old_tenant
                FROM (VALUES (false, ''), (true, '_by_name')) AS n (by_name, suffix) LOOP
        body := format($sql$
    IF TG_OP <> 'DELETE' THEN%s
    END IF;
    IF TG_OP <> 'INSERT' THEN%s
    END IF;%s%s$sql$, format(log_row, form.new_tenant), format(log_row, form.old_tenant),
            CASE WHEN unlinked THEN format($sql$
    IF TG_OP = 'INSERT' THEN%s
    END IF;$sql$, format(log_moves, form.new_tenant)) ELSE '' END,
            CASE WHEN looked_through THEN format($sql$
    IF TG_OP = 'UPDATE' THEN%s
    END IF;$sql$, format(log_moves, format('(%s) EXCEPT (%s)', form.new_tenant, form.old_tenant))) ELSE '' END);
        PERFORM listener.create_capture_function(
            format('capture_%s_row%s', source.id, form.suffix), 'touched record; rung boolean := true;',
            CASE WHEN NOT form.by_name THEN renamed END, format(log_row, 'SELECT ''''::pg_catalog.text'), body, $sql$
    IF rung THEN
        RETURN NULL;
    END IF;$sql$ || ring);
    END LOOP;
END
$function$;
