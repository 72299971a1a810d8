-- Capture: statement-level AFTER triggers with transition tables, one generated function per source. The function is
-- static SQL: with dynamic SQL every write of the application would parse and plan anew.

-- generate_capture(source_id): makes or replaces the function listener.capture_<id>. It appends one change_log row
-- per tenant that the statement touched and rings the doorbell. A statement that touched no row does neither.
-- Appending locks nothing that two writers share.
CREATE OR REPLACE FUNCTION listener.generate_capture(source_id integer) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    source listener.source;
    tenant_of text;
    log_and_collect text;
BEGIN
    SELECT s.* INTO STRICT source FROM listener.source s WHERE s.id = source_id;
    tenant_of := CASE WHEN source.tenant_column IS NULL THEN '''''::pg_catalog.text'
                      ELSE format('%I::pg_catalog.text', source.tenant_column) END;
    -- %%s is filled below with what the statement touched.
    log_and_collect := format($sql$
        WITH logged AS (
            INSERT INTO listener.change_log (xid, changed_at, source_id, tenant, app_correlation_id)
            SELECT pg_catalog.pg_current_xact_id(), pg_catalog.clock_timestamp(), %s,
                   COALESCE(touched.tenant, ''),
                   NULLIF(pg_catalog.current_setting('app.correlation_id', true), '')
            FROM (%%s) AS touched (tenant)
            RETURNING tenant)
        SELECT pg_catalog.array_agg(logged.tenant) INTO tenants FROM logged;$sql$, source.id);
    EXECUTE format($create$
CREATE OR REPLACE FUNCTION listener.%I() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $capture$
DECLARE
    tenants text[];
BEGIN
    IF TG_OP = 'INSERT' THEN %s
    ELSIF TG_OP = 'UPDATE' THEN %s
    ELSIF TG_OP = 'DELETE' THEN %s
    ELSE %s
    END IF;
    IF tenants IS NULL OR pg_catalog.current_setting('listener.notify', true) = 'off' THEN
        RETURN NULL;
    END IF;
    IF pg_catalog.cardinality(tenants) > 8 THEN
        tenants := '{""}';
    END IF;
    PERFORM pg_catalog.pg_notify('listener_changes', pg_catalog.json_build_object(
        'tenant_id', CASE WHEN ring.tenant <> '' AND pg_catalog.octet_length(ring.tenant) <= 1024 THEN ring.tenant END,
        'source', %L)::text)
    FROM pg_catalog.unnest(tenants) AS ring (tenant);
    RETURN NULL;
END
$capture$
$create$,
        'capture_' || source.id,
        format(log_and_collect, format('SELECT DISTINCT %s FROM new_rows', tenant_of)),
        format(log_and_collect, format('SELECT %s FROM new_rows UNION SELECT %s FROM old_rows', tenant_of, tenant_of)),
        format(log_and_collect, format('SELECT DISTINCT %s FROM old_rows', tenant_of)),
        format(log_and_collect, 'SELECT ''''::pg_catalog.text'),
        source.schema_name || '.' || source.table_name);
    -- Firing needs no EXECUTE; with it, anybody could put the function on a table of his own and fill the log.
    EXECUTE format('REVOKE EXECUTE ON FUNCTION listener.%I() FROM PUBLIC', 'capture_' || source.id);
END
$function$;

-- capture_tables(source_id): the tables that need triggers for a source: the table, and every partition of it, since
-- a trigger on the root does not see a statement that names a leaf.
CREATE OR REPLACE FUNCTION listener.capture_tables(source_id integer) RETURNS SETOF regclass
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT c.oid::regclass
    FROM listener.source s
    JOIN pg_namespace n ON n.nspname = s.schema_name
    JOIN pg_class r ON r.relnamespace = n.oid AND r.relname = s.table_name AND r.relkind IN ('r', 'p')
    CROSS JOIN LATERAL (SELECT r.oid UNION SELECT t.relid FROM pg_partition_tree(r.oid) t) AS c (oid)
    WHERE s.id = source_id
$function$;

-- attach_capture(source_ids): creates the triggers that are missing, and enables them ALWAYS, so that
-- session_replication_role = replica does not silence them. CREATE TRIGGER waits for writers and makes later ones
-- wait, so it gives way after 200 ms, lets them all pass and tries again, 50 times at the most.
-- Raises LSN03 when it never got the locks, or when the role does not own a table.
CREATE OR REPLACE FUNCTION listener.attach_capture(source_ids integer[]) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    wanted record;
    attempts integer := 0;
    previous_timeout text := current_setting('lock_timeout');
BEGIN
    LOOP
        BEGIN
            PERFORM set_config('lock_timeout', '200ms', true);
            FOR wanted IN
                SELECT t.relation, s.id, e.event, e.referencing
                FROM unnest(source_ids) AS s (id)
                CROSS JOIN LATERAL listener.capture_tables(s.id) AS t (relation)
                CROSS JOIN (VALUES ('insert', 'REFERENCING NEW TABLE AS new_rows'),
                                   ('update', 'REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows'),
                                   ('delete', 'REFERENCING OLD TABLE AS old_rows'),
                                   ('truncate', '')) AS e (event, referencing)
                WHERE NOT EXISTS (SELECT FROM pg_trigger g
                                  WHERE g.tgrelid = t.relation AND g.tgname = 'listener_capture_' || e.event
                                    AND g.tgenabled = 'A'
                                    AND g.tgfoid = to_regproc('listener.capture_' || s.id)::oid)
                ORDER BY t.relation::oid, e.event
            LOOP
                EXECUTE format('CREATE OR REPLACE TRIGGER %I AFTER %s ON %s %s FOR EACH STATEMENT EXECUTE FUNCTION listener.%I()',
                               'listener_capture_' || wanted.event, wanted.event, wanted.relation, wanted.referencing,
                               'capture_' || wanted.id);
                EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER %I',
                               wanted.relation, 'listener_capture_' || wanted.event);
            END LOOP;
            PERFORM set_config('lock_timeout', previous_timeout, true);
            RETURN;
        EXCEPTION
            WHEN lock_not_available THEN
                attempts := attempts + 1;
                IF attempts = 50 THEN
                    RAISE EXCEPTION 'no lock on the source tables after % attempts', attempts
                        USING ERRCODE = 'LSN03',
                              HINT = 'A long transaction holds one: see pg_stat_activity, then call this again.';
                END IF;
            WHEN insufficient_privilege THEN
                RAISE EXCEPTION 'role % cannot put capture triggers on %: %', current_user, wanted.relation, SQLERRM
                    USING ERRCODE = 'LSN03', HINT = format('GRANT %I TO %I.',
                        (SELECT pg_get_userbyid(c.relowner) FROM pg_class c WHERE c.oid = wanted.relation), current_user);
        END;
        PERFORM set_config('lock_timeout', previous_timeout, true);
        PERFORM pg_sleep(0.05 + random() * 0.2);
    END LOOP;
END
$function$;

-- detach_capture(source_id): drops a source's triggers and its function.
CREATE OR REPLACE FUNCTION listener.detach_capture(source_id integer) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    attached record;
BEGIN
    FOR attached IN
        SELECT g.tgrelid::regclass AS relation, g.tgname
        FROM pg_trigger g
        WHERE g.tgfoid = to_regproc('listener.capture_' || source_id)::oid
        ORDER BY g.tgrelid, g.tgname
    LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', attached.tgname, attached.relation);
    END LOOP;
    EXECUTE format('DROP FUNCTION IF EXISTS listener.%I()', 'capture_' || source_id);
END
$function$;

-- register_source(relation, tenant_column, explicit): the id of the source, made where it is new. Generates its
-- capture function; the triggers are attach_capture's. Raises LSN03 for tables that triggers cannot cover.
CREATE OR REPLACE FUNCTION listener.register_source(relation regclass, tenant_column name, explicit boolean)
RETURNS integer
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    class record;
    source_id integer;
    refusal text;
BEGIN
    SELECT c.relname, n.nspname, c.relkind, c.relpersistence,
           c.relkind = 'r' AND NOT c.relispartition
               AND EXISTS (SELECT FROM pg_inherits i WHERE c.oid IN (i.inhparent, i.inhrelid)) AS inherits
    INTO class FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = relation;
    refusal := CASE
        WHEN class.relkind = 'm' THEN 'a materialized view: its changes fire no trigger'
        WHEN class.relkind = 'f' THEN 'a foreign table: its changes happen elsewhere and fire no trigger'
        WHEN class.relkind NOT IN ('r', 'p') THEN 'no table'
        WHEN class.relpersistence = 'u' THEN 'unlogged: a crash empties it and fires no trigger'
        WHEN class.relpersistence = 't' THEN 'a temporary table'
        WHEN class.nspname IN ('pg_catalog', 'information_schema') THEN 'a system catalog'
        WHEN class.nspname = 'listener' THEN 'part of the schema listener itself'
        WHEN class.inherits THEN 'part of an inheritance tree: a trigger on a parent does not see its children''s rows'
    END;
    IF refusal IS NOT NULL THEN
        RAISE EXCEPTION '% cannot be a source: it is %', relation, refusal USING ERRCODE = 'LSN03';
    END IF;
    IF tenant_column IS NOT NULL AND NOT EXISTS (
        SELECT FROM pg_attribute a
        WHERE a.attrelid = relation AND a.attname = tenant_column AND a.attnum > 0 AND NOT a.attisdropped) THEN
        RAISE EXCEPTION '% has no column %', relation, tenant_column USING ERRCODE = 'LSN03';
    END IF;
    INSERT INTO listener.source AS s (schema_name, table_name, tenant_column, explicit)
    VALUES (class.nspname, class.relname, tenant_column, explicit)
    ON CONFLICT (schema_name, table_name) DO UPDATE
        -- A column named by add_source wins over what create_view finds.
        SET tenant_column = CASE WHEN excluded.explicit OR NOT s.explicit THEN excluded.tenant_column
                                 ELSE s.tenant_column END,
            explicit = s.explicit OR excluded.explicit
    RETURNING s.id INTO source_id;
    PERFORM listener.generate_capture(source_id);
    RETURN source_id;
END
$function$;

-- add_source(relation, tenant_column): says which column of a table is the tenant where its name is not the view's,
-- before or after the views that read it are made; NULL: the table is shared, a change to it dirties every tenant.
CREATE OR REPLACE FUNCTION listener.add_source(relation regclass, tenant_column name) RETURNS void
LANGUAGE plpgsql AS $function$
DECLARE
    previous_role text := listener.become_owner();
    added_id integer := listener.register_source(relation, tenant_column, true);
BEGIN
    PERFORM listener.attach_capture(ARRAY[added_id]);
    -- What was captured before by another column may have named the wrong tenants.
    PERFORM listener.mark_all_dirty(s.view_id) FROM listener.view_source s WHERE s.source_id = added_id;
    PERFORM pg_catalog.set_config('role', previous_role, true);
END
$function$;

-- remove_source(relation): drops the table's triggers. Raises LSN03 while a view reads it.
CREATE OR REPLACE FUNCTION listener.remove_source(relation regclass) RETURNS void
LANGUAGE plpgsql AS $function$
DECLARE
    previous_role text := listener.become_owner();
    removed_id integer;
    readers text;
BEGIN
    SELECT s.id INTO removed_id FROM listener.source s
    JOIN pg_catalog.pg_namespace n ON n.nspname = s.schema_name
    JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = s.table_name WHERE c.oid = relation;
    IF removed_id IS NULL THEN
        RAISE EXCEPTION '% is no source', relation USING ERRCODE = 'LSN03';
    END IF;
    SELECT pg_catalog.string_agg(v.name, ', ' ORDER BY v.name) INTO readers
    FROM listener.view_source s JOIN listener.managed_view v ON v.id = s.view_id WHERE s.source_id = removed_id;
    IF readers IS NOT NULL THEN
        RAISE EXCEPTION '% is read by %', relation, readers
            USING ERRCODE = 'LSN03', HINT = 'Drop these views first: listener.drop_view(name).';
    END IF;
    PERFORM listener.detach_capture(removed_id);
    DELETE FROM listener.source WHERE id = removed_id;
    PERFORM pg_catalog.set_config('role', previous_role, true);
END
$function$;

-- mark_all_dirty(view_id): logs "every tenant of this view", which the next drain picks up like any change.
CREATE OR REPLACE FUNCTION listener.mark_all_dirty(view_id integer) RETURNS void
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $function$
    INSERT INTO listener.change_log (xid, changed_at, view_id, tenant)
    VALUES (pg_current_xact_id(), clock_timestamp(), mark_all_dirty.view_id, '');
    SELECT pg_notify('listener_changes', '{"tenant_id": null, "source": "listener"}');
$function$;
