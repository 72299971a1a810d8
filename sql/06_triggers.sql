-- Triggers: which a source should have, put on and taken off without holding writers up.

-- lock_registration(): one change of what is managed at a time. Without it, a view that is being made and another that
-- is being dropped could take the triggers of the table that both read.
CREATE OR REPLACE FUNCTION listener.lock_registration() RETURNS void
LANGUAGE sql VOLATILE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT pg_catalog.pg_advisory_xact_lock(listener.lock_key(0, 'registration'))
$function$;

-- tables_below(relid): a table, and the tables whose rows a query of it reads: its partitions, or its inheritance
-- children.
CREATE OR REPLACE FUNCTION listener.tables_below(relid oid) RETURNS TABLE (relid oid)
LANGUAGE sql STABLE ROWS 5 SET search_path = pg_catalog, pg_temp AS $function$
    WITH RECURSIVE below (oid) AS (
        SELECT $1
        UNION
        SELECT i.inhrelid FROM below b JOIN pg_inherits i ON i.inhparent = b.oid
    )
    SELECT b.oid FROM below b
$function$;

-- capture_tables(relid): the tables that need triggers for a source. A statement fires the triggers of the table that
-- it names, and of no other. So these are the source, the tables below it (partitions, or inheritance children), and
-- the tables above any of them. A view of one partition thus refreshes the tenants of rows that are written to the
-- other partitions through the root: too many tenants, never too few. Left out are foreign tables, which cannot have
-- these triggers (view_troubles() names them), and temporary ones, which belong to one session.
--   by_name   it is another table than the source. Its columns may have another order; and once it is detached, before any
--             sweep, somebody may give it columns of other types, fewer or more
CREATE OR REPLACE FUNCTION listener.capture_tables(relid oid) RETURNS TABLE (relation regclass, by_name boolean)
LANGUAGE sql STABLE ROWS 5 SET search_path = pg_catalog, pg_temp AS $function$
    WITH RECURSIVE tree (oid) AS (
        SELECT b.relid FROM listener.tables_below($1) b
        UNION
        SELECT i.inhparent FROM tree t JOIN pg_inherits i ON i.inhrelid = t.oid
    )
    SELECT c.oid::regclass, c.oid <> $1
    FROM tree t JOIN pg_class c ON c.oid = t.oid
    WHERE c.relkind IN ('r', 'p') AND (c.relpersistence <> 't' OR c.oid = $1)
$function$;

-- wanted_triggers(source_id): the triggers that a source should have. Those named `row` are for tables that a
-- subscription fills: logical replication's apply fires no statement triggers. They fire in it alone.
--   watch, moved   for MERGE on partitions: it moves a row to another partition without showing it to the UPDATE
--                  trigger. `watch` runs before each UPDATE or MERGE that names a partitioned table. From then on, to
--                  the end of the transaction, `moved` runs for each row that leaves a partition; if the source is a
--                  partition, also for each row that comes into one. See generate_moves()
CREATE OR REPLACE FUNCTION listener.wanted_triggers(source_id integer)
RETURNS TABLE (relation regclass, name name, event text, referencing text, level text, function name, enabled "char")
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT t.relation, format('listener_%s_%s', s.id, e.name)::name,
           CASE WHEN e.name = 'moved' AND o.relispartition THEN 'AFTER INSERT OR DELETE' ELSE e.event END, e.referencing,
           e.level || CASE e.name WHEN 'moved' THEN format(' WHEN (pg_catalog.current_setting(%L, true) = ''watch'')',
                                                           'listener.moved_' || s.id) ELSE '' END,
           format('capture_%s_%s%s', s.id, e.name,
                  CASE WHEN t.by_name AND e.name NOT IN ('watch', 'moved') THEN '_by_name' ELSE '' END)::name, e.enabled
    FROM listener.source s
    JOIN pg_class o ON o.oid = s.relid
    CROSS JOIN LATERAL listener.capture_tables(s.relid) t
    JOIN pg_class c ON c.oid = t.relation
    CROSS JOIN (VALUES ('insert', 'AFTER INSERT', 'REFERENCING NEW TABLE AS new_rows', 'STATEMENT', 'A'::"char"),
                       ('update', 'AFTER UPDATE', 'REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows', 'STATEMENT', 'A'),
                       ('delete', 'AFTER DELETE', 'REFERENCING OLD TABLE AS old_rows', 'STATEMENT', 'A'),
                       ('truncate', 'AFTER TRUNCATE', '', 'STATEMENT', 'A'),
                       ('watch', 'BEFORE UPDATE', '', 'STATEMENT', 'A'),
                       ('moved', 'AFTER DELETE', '', 'ROW', 'A'),
                       ('row', 'AFTER INSERT OR UPDATE OR DELETE', '', 'ROW', 'R'))
        AS e (name, event, referencing, level, enabled)
    WHERE s.id = $1
      AND CASE e.name
          WHEN 'watch' THEN c.relkind = 'p'
          WHEN 'moved' THEN c.relkind = 'r' AND c.relispartition
          WHEN 'row' THEN c.relkind = 'r' AND EXISTS (
              SELECT FROM pg_subscription_rel r
              WHERE r.srrelid IN (SELECT a.relid FROM pg_partition_ancestors(t.relation) a UNION SELECT t.relation))
          ELSE true END
$function$;

-- capture_state(source_id, relid): what the catalog says of a source's triggers on a table, of the table's place
-- among partitions, and whether it is logged. It changes with whatever may have let a write go by unseen, even if that
-- was undone since: the rows' xmin is in it.
CREATE OR REPLACE FUNCTION listener.capture_state(source_id integer, relid oid) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT concat((SELECT string_agg(concat_ws(' ', g.tgname, g.tgenabled, g.xmin), ', ' ORDER BY g.tgname)
                   FROM pg_trigger g
                   WHERE g.tgrelid = $2 AND g.tgname LIKE format('listener\_%s\_%%', $1)),
                  (SELECT string_agg(concat_ws(' ', '; part of', i.inhparent, i.xmin), '')
                   FROM pg_inherits i WHERE i.inhrelid = $2),
                  (SELECT '; unlogged' FROM pg_class c WHERE c.oid = $2 AND c.relpersistence = 'u'))
$function$;

-- is_rehearsal(): whether this transaction only tries what adopting would do: see begin_rehearsal(). The setting holds
-- the number of this transaction, which no session has there by chance.
CREATE OR REPLACE FUNCTION listener.is_rehearsal() RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT coalesce(current_setting('listener.rehearsal', true) = pg_current_xact_id_if_assigned()::text, false)
$function$;

-- attach_capture(source_ids, attempts): creates the triggers that are missing or wrong, takes those away that are on
-- tables which are no part of the source any more, and notes the state. ENABLE ALWAYS: session_replication_role =
-- replica must not silence them. CREATE TRIGGER waits for writers and makes later ones wait, so it gives way after
-- 200 ms, lets them all pass and tries again. Raises LSN03 when it never got the locks, or does not own a table.
CREATE OR REPLACE FUNCTION listener.attach_capture(source_ids integer[], attempts integer DEFAULT 50) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    wanted record;
    attempt integer := 0;
    previous_timeout text := current_setting('lock_timeout');
BEGIN
    IF listener.is_rehearsal() THEN
        FOR wanted IN
            SELECT DISTINCT t.relation, c.relowner FROM unnest(source_ids) AS s (id) CROSS JOIN LATERAL listener.wanted_triggers(s.id) t
            JOIN pg_class c ON c.oid = t.relation WHERE NOT pg_has_role(c.relowner, 'USAGE') ORDER BY 1
        LOOP
            RAISE EXCEPTION 'role % cannot put capture triggers on %: it is no member of the role that owns it',
                current_user, wanted.relation
                USING ERRCODE = 'LSN03', HINT = format('GRANT %I TO %I.', pg_get_userbyid(wanted.relowner), current_user);
        END LOOP;
        RETURN;
    END IF;
    LOOP
        BEGIN
            PERFORM set_config('lock_timeout', '200ms', true);
            FOR wanted IN
                SELECT t.*, s.id FROM unnest(source_ids) AS s (id) CROSS JOIN LATERAL listener.wanted_triggers(s.id) t
                WHERE NOT EXISTS (SELECT FROM pg_trigger g
                                  WHERE g.tgrelid = t.relation AND g.tgname = t.name AND g.tgenabled = t.enabled
                                    AND g.tgfoid = to_regproc('listener.' || t.function)::oid)
                ORDER BY t.relation::oid, t.name
            LOOP
                EXECUTE format('CREATE OR REPLACE TRIGGER %I %s ON %s %s FOR EACH %s EXECUTE FUNCTION listener.%I()',
                               wanted.name, wanted.event, wanted.relation, wanted.referencing, wanted.level, wanted.function);
                EXECUTE format('ALTER TABLE %s ENABLE %s TRIGGER %I', wanted.relation,
                               CASE wanted.enabled WHEN 'A' THEN 'ALWAYS' ELSE 'REPLICA' END, wanted.name);
            END LOOP;
            PERFORM listener.drop_triggers(s.id, g.tgrelid)
            FROM unnest(source_ids) AS s (id)
            JOIN (SELECT DISTINCT t.tgrelid, t.tgname FROM pg_trigger t WHERE t.tgname LIKE 'listener\_%\_insert') g
              ON g.tgname = format('listener_%s_insert', s.id)
            WHERE g.tgrelid NOT IN (SELECT c.relation FROM listener.source o
                                    CROSS JOIN LATERAL listener.capture_tables(o.relid) c WHERE o.id = s.id);
            EXIT;
        EXCEPTION
            WHEN lock_not_available THEN
                attempt := attempt + 1;
                IF attempt >= attempts THEN
                    RAISE EXCEPTION 'no lock on the source tables after % attempts', attempt
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
    PERFORM set_config('lock_timeout', previous_timeout, true);
    DELETE FROM listener.source_table t WHERE t.source_id = ANY (source_ids);
    INSERT INTO listener.source_table (source_id, schema_name, table_name, relid, fingerprint)
    SELECT s.id, n.nspname, c.relname, c.oid, listener.capture_state(s.id, c.oid)
    FROM listener.source s CROSS JOIN LATERAL listener.capture_tables(s.relid) t
    JOIN pg_class c ON c.oid = t.relation JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE s.id = ANY (source_ids);
END
$function$;

-- drop_triggers(source_id, relid): takes a source's triggers off a table.
CREATE OR REPLACE FUNCTION listener.drop_triggers(source_id integer, relid oid) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    trigger_name name;
BEGIN
    FOR trigger_name IN
        SELECT g.tgname FROM pg_trigger g
        WHERE g.tgrelid = relid AND g.tgname LIKE format('listener\_%s\_%%', source_id) ORDER BY g.tgname
    LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', trigger_name, relid::regclass);
    END LOOP;
END
$function$;

-- detach_capture(source_id): drops a source's triggers, its functions and its record. Raises as drop_capture() does.
CREATE OR REPLACE FUNCTION listener.detach_capture(source_id integer) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    PERFORM listener.drop_capture(detach_capture.source_id);
    DELETE FROM listener.source s WHERE s.id = detach_capture.source_id;
END
$function$;

-- drop_capture(source_id): drops a source's triggers and all that was generated for it. DROP TRIGGER waits for readers,
-- too, and makes later ones wait, so it gives way as attach_capture does. Raises LSN03 when it never got the locks.
CREATE OR REPLACE FUNCTION listener.drop_capture(source_id integer) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    attempt integer := 0;
    routine text;
    previous_timeout text := current_setting('lock_timeout');
BEGIN
    LOOP
        BEGIN
            PERFORM set_config('lock_timeout', '200ms', true);
            PERFORM listener.drop_triggers(drop_capture.source_id, g.tgrelid)
            FROM (SELECT DISTINCT t.tgrelid FROM pg_trigger t
                  WHERE t.tgname LIKE format('listener\_%s\_%%', drop_capture.source_id)) g;
            EXIT;
        EXCEPTION WHEN lock_not_available THEN
            attempt := attempt + 1;
            IF attempt = 50 THEN
                RAISE EXCEPTION 'no lock on the source tables after % attempts', attempt USING ERRCODE = 'LSN03',
                    HINT = 'A long transaction holds one: see pg_stat_activity, then call this again.';
            END IF;
        END;
        PERFORM set_config('lock_timeout', previous_timeout, true);
        PERFORM pg_sleep(0.05 + random() * 0.2);
    END LOOP;
    PERFORM set_config('lock_timeout', previous_timeout, true);
    PERFORM listener.drop_lookup(drop_capture.source_id);
    FOR routine IN
        SELECT p.oid::regprocedure FROM pg_proc p
        WHERE p.pronamespace = 'listener'::regnamespace
          AND p.proname ~ format('^(capture|tenant_of|key_of|tenants_by)_%s(_[a-z0-9_]+)?$', drop_capture.source_id)
    LOOP
        EXECUTE format('DROP FUNCTION %s', routine);
    END LOOP;
    FOR routine IN
        SELECT c.oid::regclass FROM pg_class c
        WHERE c.relnamespace = 'listener'::regnamespace AND c.relkind = 'v'
          AND c.relname ~ format('^(tenant_of_%1$s|key_of_%1$s_[0-9]+)$', drop_capture.source_id)
    LOOP
        EXECUTE format('DROP VIEW %s', routine);
    END LOOP;
    IF to_regtype(format('listener.%I', 'row_' || drop_capture.source_id)) IS NOT NULL THEN
        EXECUTE format('DROP DOMAIN listener.%I', 'row_' || drop_capture.source_id);
    END IF;
END
$function$;

-- drop_orphans(): detaches the sources that no view reads, no look-up goes through, and nobody added by hand.
CREATE OR REPLACE FUNCTION listener.drop_orphans() RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    orphan integer;
BEGIN
    LOOP
        SELECT s.id INTO orphan FROM listener.source s
        WHERE NOT s.explicit AND NOT EXISTS (SELECT FROM listener.view_source w WHERE w.source_id = s.id)
          AND NOT EXISTS (SELECT FROM listener.source o WHERE o.through_id = s.id)
        ORDER BY s.id LIMIT 1;
        EXIT WHEN orphan IS NULL;
        PERFORM listener.detach_capture(orphan);
    END LOOP;
END
$function$;

-- ring_for_all(): rings the doorbell for something of our own, where notifying is allowed.
CREATE OR REPLACE FUNCTION listener.ring_for_all() RETURNS void
LANGUAGE sql VOLATILE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT pg_notify('listener_changes', '{"tenant_id": null, "source": "listener"}') WHERE NOT listener.must_poll()
$function$;

-- mark_all_dirty(view_id): logs "every tenant of this view", which the next drain picks up like any change.
CREATE OR REPLACE FUNCTION listener.mark_all_dirty(view_id integer) RETURNS void
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $function$
    INSERT INTO listener.change_log (xid, changed_at, view_id, tenant)
    VALUES (pg_current_xact_id(), clock_timestamp(), mark_all_dirty.view_id, '');
    SELECT listener.ring_for_all();
$function$;
