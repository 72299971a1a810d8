-- Sources: which tables are captured, and that they stay so.

-- lock_registration(): one change of what is managed at a time. Without it, a view that is being made and another that
-- is being dropped could take the triggers of the table that both read.
CREATE OR REPLACE FUNCTION listener.lock_registration() RETURNS void
LANGUAGE sql VOLATILE AS $function$
    SELECT pg_catalog.pg_advisory_xact_lock(listener.lock_key(0, 'registration'))
$function$;

-- row_shape(relid): the names and types of a table's columns in their order.
CREATE OR REPLACE FUNCTION listener.row_shape(relid oid) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT string_agg(a.attname || ' ' || a.atttypid, ',' ORDER BY a.attnum)
    FROM pg_attribute a WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped
$function$;

-- capture_tables(relid): the tables that need triggers for a source: the table, and every partition of it, since a
-- trigger on the root does not see a statement that names a leaf. by_name: the columns stand in another order than
-- the root's.
CREATE OR REPLACE FUNCTION listener.capture_tables(relid oid) RETURNS TABLE (relation regclass, by_name boolean)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT t.oid::regclass, listener.row_shape(t.oid) IS DISTINCT FROM listener.row_shape($1)
    FROM (SELECT c.oid FROM pg_class c WHERE c.oid = $1 AND c.relkind IN ('r', 'p')
          UNION SELECT p.relid FROM pg_partition_tree($1) p) AS t (oid)
$function$;

-- wanted_triggers(source_id): the triggers that a source should have. Those for each row are for tables that a
-- subscription fills: logical replication's apply fires no statement triggers. They fire in it alone.
CREATE OR REPLACE FUNCTION listener.wanted_triggers(source_id integer)
RETURNS TABLE (relation regclass, name name, event text, referencing text, level text, function name, enabled "char")
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT t.relation, format('listener_%s_%s', s.id, e.name)::name, e.event, e.referencing, e.level,
           format('capture_%s%s%s', s.id, e.form, CASE WHEN t.by_name THEN '_by_name' ELSE '' END)::name, e.enabled
    FROM listener.source s
    CROSS JOIN LATERAL listener.capture_tables(s.relid) t
    JOIN pg_class c ON c.oid = t.relation
    CROSS JOIN (VALUES ('insert', 'INSERT', 'REFERENCING NEW TABLE AS new_rows', 'STATEMENT', '', 'A'::"char"),
                       ('update', 'UPDATE', 'REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows', 'STATEMENT', '', 'A'),
                       ('delete', 'DELETE', 'REFERENCING OLD TABLE AS old_rows', 'STATEMENT', '', 'A'),
                       ('truncate', 'TRUNCATE', '', 'STATEMENT', '', 'A'),
                       ('row', 'INSERT OR UPDATE OR DELETE', '', 'ROW', '_row', 'R'))
        AS e (name, event, referencing, level, form, enabled)
    WHERE s.id = $1
      AND (e.level = 'STATEMENT' OR (c.relkind = 'r' AND EXISTS (
              SELECT FROM pg_subscription_rel r
              WHERE r.srrelid IN (SELECT a.relid FROM pg_partition_ancestors(t.relation) a UNION SELECT t.relation))))
$function$;

-- capture_state(source_id, relid): what the catalog says of a source's triggers on a table, and of the table's place
-- among partitions. It changes with whatever may have let a write go by unseen, even if that was undone since: the
-- rows' xmin is in it.
CREATE OR REPLACE FUNCTION listener.capture_state(source_id integer, relid oid) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT concat((SELECT string_agg(concat_ws(' ', g.tgname, g.tgenabled, g.xmin), ', ' ORDER BY g.tgname)
                   FROM pg_trigger g
                   WHERE g.tgrelid = $2 AND g.tgname LIKE format('listener\_%s\_%%', $1)),
                  (SELECT string_agg(concat_ws(' ', '; part of', i.inhparent, i.xmin), '')
                   FROM pg_inherits i WHERE i.inhrelid = $2))
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
                EXECUTE format('CREATE OR REPLACE TRIGGER %I AFTER %s ON %s %s FOR EACH %s EXECUTE FUNCTION listener.%I()',
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

-- detach_capture(source_id): drops a source's triggers, its functions and its record. DROP TRIGGER waits for readers,
-- too, and makes later ones wait, so it gives way as attach_capture does. Raises LSN03 when it never got the locks.
CREATE OR REPLACE FUNCTION listener.detach_capture(source_id integer) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    attempt integer := 0;
    routine text;
    previous_timeout text := current_setting('lock_timeout');
BEGIN
    LOOP
        BEGIN
            PERFORM set_config('lock_timeout', '200ms', true);
            PERFORM listener.drop_triggers(detach_capture.source_id, g.tgrelid)
            FROM (SELECT DISTINCT t.tgrelid FROM pg_trigger t
                  WHERE t.tgname LIKE format('listener\_%s\_%%', detach_capture.source_id)) g;
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
    PERFORM listener.drop_lookup(detach_capture.source_id);
    FOR routine IN
        SELECT p.oid::regprocedure FROM pg_proc p
        WHERE p.pronamespace = 'listener'::regnamespace
          AND p.proname ~ format('^(capture|tenant_of|key_of|tenants_by)_%s(_[a-z0-9_]+)?$', detach_capture.source_id)
    LOOP
        EXECUTE format('DROP FUNCTION %s', routine);
    END LOOP;
    IF to_regtype(format('listener.%I', 'row_' || detach_capture.source_id)) IS NOT NULL THEN
        EXECUTE format('DROP DOMAIN listener.%I', 'row_' || detach_capture.source_id);
    END IF;
    DELETE FROM listener.source s WHERE s.id = detach_capture.source_id;
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

-- check_source(relation, tenant_column): raises LSN03 for a table that triggers cannot cover, and for a tenant column
-- that is missing, is computed only when read, or is of a type that another role could give code of its own to.
CREATE OR REPLACE FUNCTION listener.check_source(relation regclass, tenant_column name) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    class record;
    column_type oid;
    column_generated "char";
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
    IF tenant_column IS NULL THEN
        RETURN;
    END IF;
    SELECT coalesce(nullif(t.typbasetype, 0), t.oid), a.attgenerated INTO column_type, column_generated
    FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
    WHERE a.attrelid = relation AND a.attname = tenant_column AND a.attnum > 0 AND NOT a.attisdropped;
    IF column_type IS NULL THEN
        RAISE EXCEPTION '% has no column %', relation, tenant_column USING ERRCODE = 'LSN03';
    END IF;
    IF column_generated = 'v' THEN
        RAISE EXCEPTION 'tenant column % of % is a virtual generated column: a trigger cannot read it', tenant_column, relation
            USING ERRCODE = 'LSN03',
                  HINT = format('Make it STORED, or let a change refresh every tenant: listener.add_source(%L).', relation);
    END IF;
    IF column_type <> ALL ('{uuid,text,varchar,bpchar,name,int2,int4,int8}'::regtype[]) THEN
        RAISE EXCEPTION 'tenant column % of % is of type %', tenant_column, relation, column_type::regtype
            USING ERRCODE = 'LSN03', HINT = 'Supported are uuid, text, varchar, char, bigint, integer and smallint.';
    END IF;
END
$function$;

-- register_source(relation, tenant_column): the id of the source, made where it is new; one that was added by hand wins.
-- Generates what its triggers call; the triggers are attach_capture's. Raises LSN03 as check_source does.
CREATE OR REPLACE FUNCTION listener.register_source(relation regclass, tenant_column name) RETURNS integer
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
#variable_conflict use_column
DECLARE
    found_id integer;
BEGIN
    SELECT s.id INTO found_id FROM listener.source s WHERE s.relid = relation AND s.explicit;
    IF found_id IS NULL THEN
        PERFORM listener.check_source(relation, tenant_column);
        SELECT s.id INTO found_id FROM listener.source s
        WHERE s.relid = relation AND s.through_id IS NULL AND s.tenant_column IS NOT DISTINCT FROM register_source.tenant_column;
    END IF;
    IF found_id IS NULL THEN
        INSERT INTO listener.source (schema_name, table_name, relid, tenant_column)
        SELECT n.nspname, c.relname, c.oid, register_source.tenant_column
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = relation
        RETURNING id INTO found_id;
        PERFORM listener.generate_capture(found_id);
    END IF;
    RETURN found_id;
END
$function$;

-- add_source(relation, tenant_column, through, columns, references_columns): says how the rows of a table find their
-- tenant where create_view cannot see it, before or after the views that read the table are made:
--   tenant_column      the table's own column, under whatever name; NULL and no `through`: the table is shared, a
--                      change to it refreshes every tenant
--   through            a look-up: the table (an order line) finds its tenant through a row of this one (its order)
--   columns, references_columns   this table's columns and those they equal there; left out: those of the foreign key
-- The looked-up table becomes a source too, by `tenant_column` of its own unless it was added before. The look-up is
-- made by the owner of this schema; where row-level security is on, it gets a policy that lets this role, which cannot
-- log in, read the rows. Raises LSN03 for a table that triggers cannot cover, a missing column or foreign key.
CREATE OR REPLACE FUNCTION listener.add_source(
    relation regclass, tenant_column name DEFAULT NULL, through regclass DEFAULT NULL, columns name[] DEFAULT NULL,
    references_columns name[] DEFAULT NULL) RETURNS void
LANGUAGE plpgsql AS $function$
#variable_conflict use_column
DECLARE
    previous_role text := listener.become_owner();
    link_columns name[];
    link_references name[];
    link_cascades boolean := false;
    added_id integer;
    via_id integer;
    readers integer[];
    dependents integer[];
BEGIN
    PERFORM listener.lock_registration();
    IF through IS NULL THEN
        PERFORM listener.check_source(relation, tenant_column);
    ELSIF through = relation THEN
        RAISE EXCEPTION '% would look its tenant up through itself', relation USING ERRCODE = 'LSN03';
    ELSE
        PERFORM listener.check_source(relation, NULL);
        SELECT l.columns, l.references_columns, l.cascades INTO link_columns, link_references, link_cascades
        FROM listener.find_link(relation, through, add_source.columns, add_source.references_columns) l;
    END IF;
    -- The views that read the table, however they found its tenants until now.
    SELECT coalesce(pg_catalog.array_agg(DISTINCT w.view_id), '{}') INTO readers
    FROM listener.view_source w JOIN listener.source s ON s.id = w.source_id WHERE s.relid = relation;
    SELECT s.id INTO added_id FROM listener.source s WHERE s.relid = relation AND s.explicit;
    IF added_id IS NULL THEN
        INSERT INTO listener.source (schema_name, table_name, relid, tenant_column, through_id, explicit, through_keys)
        SELECT n.nspname, c.relname, c.oid, NULL, NULL, true, NULL
        FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        WHERE c.oid = relation
        ON CONFLICT (schema_name, table_name, tenant_column, through_id) DO UPDATE SET explicit = true
        RETURNING id INTO added_id;
    END IF;
    -- One of the same table that was found before, by the same column: this one takes its place.
    UPDATE listener.view_source w SET source_id = added_id FROM listener.source s
    WHERE s.id = w.source_id AND s.relid = relation AND s.id <> added_id
      AND NOT EXISTS (SELECT FROM listener.view_source x WHERE x.view_id = w.view_id AND x.source_id = added_id);
    DELETE FROM listener.view_source w USING listener.source s
    WHERE s.id = w.source_id AND s.relid = relation AND s.id <> added_id;
    UPDATE listener.source s SET through_id = added_id WHERE s.through_id IN (
        SELECT o.id FROM listener.source o WHERE o.relid = relation AND o.id <> added_id);
    PERFORM listener.drop_orphans();
    -- Look-ups of other tables that go through this one read it, and are made anew.
    dependents := ARRAY(SELECT d.id FROM listener.looking_through(added_id) d ORDER BY d.depth);
    PERFORM listener.drop_lookup(d.id)
    FROM (SELECT u.id FROM pg_catalog.unnest(added_id || dependents) WITH ORDINALITY AS u (id, ord) ORDER BY u.ord DESC) d;
    IF through IS NOT NULL THEN
        -- Not before: as long as no look-up goes through it, it is an orphan.
        via_id := listener.register_source(through, coalesce(tenant_column, 'tenant_id'));
        PERFORM listener.attach_capture(ARRAY[via_id]);
    END IF;
    UPDATE listener.source s SET
        tenant_column = CASE WHEN through IS NULL THEN add_source.tenant_column END,
        through_id = via_id, through_keys = link_columns, through_references = link_references,
        through_cascades = link_cascades
    WHERE s.id = added_id;
    IF through IS NOT NULL THEN
        PERFORM listener.generate_tenant_of(added_id);
        PERFORM listener.create_lookup(added_id);
        -- Whoever reads the lines depends on the orders, too: a deleted order takes its lines with it.
        INSERT INTO listener.view_source (view_id, source_id, same_form)
        SELECT r.view_id, o.source_id, listener.same_form(o.source_id, v.tenant_type)
        FROM pg_catalog.unnest(readers) AS r (view_id) JOIN listener.managed_view v ON v.id = r.view_id
        CROSS JOIN LATERAL listener.through_sources(added_id) AS o (source_id)
        ON CONFLICT DO NOTHING;
    END IF;
    PERFORM listener.create_lookup(d.id)
    FROM (SELECT u.id FROM pg_catalog.unnest(dependents) WITH ORDINALITY AS u (id, ord) ORDER BY u.ord) d;
    UPDATE listener.view_source w SET same_form = listener.same_form(w.source_id, v.tenant_type)
    FROM listener.managed_view v WHERE v.id = w.view_id AND w.source_id = ANY (added_id || dependents);
    PERFORM listener.generate_capture(added_id);
    IF via_id IS NOT NULL THEN
        PERFORM listener.generate_capture(via_id);  -- which now logs its moves
    END IF;
    PERFORM listener.attach_capture(ARRAY[added_id]);
    PERFORM listener.drop_orphans();
    -- What was captured before in another way may have named the wrong tenants.
    PERFORM listener.mark_all_dirty(r.view_id) FROM pg_catalog.unnest(readers) AS r (view_id);
    PERFORM pg_catalog.set_config('role', previous_role, true);
END
$function$;

-- find_link(relation, through, columns, references_columns): how a table's rows name the row that they belong to.
-- Raises LSN03 where that is not told and there is no foreign key, or more than one.
CREATE OR REPLACE FUNCTION listener.find_link(
    relation regclass, through regclass, INOUT columns name[], INOUT references_columns name[], OUT cascades boolean)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    keys record;
BEGIN
    SELECT count(*) AS found, min(k.own) AS own, min(k.refs) AS refs, bool_and(k.cascades) AS cascades INTO keys
    FROM (SELECT ARRAY(SELECT a.attname FROM unnest(c.conkey) WITH ORDINALITY n (attnum, ord)
                       JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = n.attnum ORDER BY n.ord)::text[],
                 ARRAY(SELECT a.attname FROM unnest(c.confkey) WITH ORDINALITY n (attnum, ord)
                       JOIN pg_attribute a ON a.attrelid = c.confrelid AND a.attnum = n.attnum ORDER BY n.ord)::text[],
                 c.confdeltype = 'c' AND NOT c.condeferrable AND c.convalidated
          FROM pg_constraint c WHERE c.contype = 'f' AND c.conrelid = relation AND c.confrelid = through) AS k (own, refs, cascades)
    WHERE find_link.columns IS NULL OR (k.own = find_link.columns::text[] AND k.refs = find_link.references_columns::text[]);
    IF columns IS NULL THEN
        IF keys.found <> 1 THEN
            RAISE EXCEPTION '% has % foreign keys to %', relation, CASE keys.found WHEN 0 THEN 'no' ELSE 'several' END, through
                USING ERRCODE = 'LSN03', HINT = 'Say which columns: columns => ''{order_id}'', references_columns => ''{id}''.';
        END IF;
        columns := keys.own;
        references_columns := keys.refs;
    ELSIF cardinality(columns) IS DISTINCT FROM cardinality(references_columns) OR cardinality(columns) = 0 THEN
        RAISE EXCEPTION 'columns and references_columns must name as many columns each' USING ERRCODE = 'LSN03';
    END IF;
    cascades := keys.found = 1 AND keys.cascades;
    PERFORM listener.check_source_columns(relation, columns), listener.check_source_columns(through, references_columns);
    IF EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = relation AND a.attname = ANY (columns) AND a.attgenerated = 'v') THEN
        RAISE EXCEPTION 'a column of % that names its row of % is a virtual generated column: a trigger cannot read it',
            relation, through USING ERRCODE = 'LSN03', HINT = 'Make it STORED.';
    END IF;
END
$function$;

-- check_source_columns(relation, columns): raises LSN03 where one is missing.
CREATE OR REPLACE FUNCTION listener.check_source_columns(relation regclass, columns name[]) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    missing text := (SELECT string_agg(k.name, ', ') FROM unnest(columns) AS k (name) WHERE NOT EXISTS (
        SELECT FROM pg_attribute a WHERE a.attrelid = relation AND a.attname = k.name AND a.attnum > 0 AND NOT a.attisdropped));
BEGIN
    IF missing IS NOT NULL THEN
        RAISE EXCEPTION '% has no column %', relation, missing USING ERRCODE = 'LSN03';
    END IF;
END
$function$;

-- through_sources(source_id): the sources that a look-up goes through, all the way to the one that has the column.
CREATE OR REPLACE FUNCTION listener.through_sources(source_id integer) RETURNS SETOF integer
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    WITH RECURSIVE way (id) AS (
        SELECT s.through_id FROM listener.source s WHERE s.id = $1 AND s.through_id IS NOT NULL
        UNION
        SELECT s.through_id FROM way w JOIN listener.source s ON s.id = w.id WHERE s.through_id IS NOT NULL
    )
    SELECT w.id FROM way w
$function$;

-- looking_through(source_id): the sources whose look-ups go through this one, with the number of steps from it.
CREATE OR REPLACE FUNCTION listener.looking_through(source_id integer) RETURNS TABLE (id integer, depth integer)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    WITH RECURSIVE way (id, depth) AS (
        SELECT s.id, 1 FROM listener.source s WHERE s.through_id = $1
        UNION ALL
        SELECT s.id, w.depth + 1 FROM way w JOIN listener.source s ON s.through_id = w.id
    )
    SELECT w.id, w.depth FROM way w
$function$;

-- create_lookup(source_id): the view listener.lookup_<id>, the tenants of the rows that the source's rows belong to, by
-- their keys; and the policies that its owner, the owner of this schema, needs to see them.
-- Raises LSN03 for a circle, for a shared table, and for a restrictive policy, which no other can lift.
CREATE OR REPLACE FUNCTION listener.create_lookup(source_id integer) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    source listener.source;
    through listener.source;
    keys text;
    chain text;
    previous_timeout text := current_setting('lock_timeout');
BEGIN
    SELECT s.* INTO STRICT source FROM listener.source s WHERE s.id = create_lookup.source_id;
    SELECT s.* INTO STRICT through FROM listener.source s WHERE s.id = source.through_id;
    IF source.id IN (SELECT listener.through_sources(source.id)) THEN
        RAISE EXCEPTION '% would look its tenant up through itself', source.relid::regclass USING ERRCODE = 'LSN03';
    ELSIF through.tenant_column IS NULL AND through.through_id IS NULL THEN
        RAISE EXCEPTION '% has no tenant that % could find', through.relid::regclass, source.relid::regclass
            USING ERRCODE = 'LSN03', HINT = 'Say how it finds its own first: listener.add_source(…).';
    END IF;
    IF (SELECT c.relrowsecurity FROM pg_class c WHERE c.oid = through.relid)
       AND NOT (SELECT r.rolbypassrls OR r.rolsuper FROM pg_roles r WHERE r.rolname = current_user) THEN
        IF EXISTS (SELECT FROM pg_policy p WHERE p.polrelid = through.relid AND NOT p.polpermissive) THEN
            RAISE EXCEPTION '% has a restrictive policy, which would hide rows from the look-up', through.relid::regclass
                USING ERRCODE = 'LSN03', HINT = format('ALTER ROLE %I BYPASSRLS.', current_user);
        END IF;
        IF NOT EXISTS (SELECT FROM pg_policy p WHERE p.polrelid = through.relid AND p.polname = 'listener_lookup') THEN
            PERFORM set_config('lock_timeout', '2s', true);
            EXECUTE format('CREATE POLICY listener_lookup ON %s FOR SELECT TO %I USING (true)',
                           through.relid::regclass, current_user);
            PERFORM set_config('lock_timeout', previous_timeout, true);
        END IF;
    END IF;
    SELECT string_agg(format('p.%I AS k%s', r.name, r.ord), ', ' ORDER BY r.ord) INTO keys
    FROM unnest(source.through_references) WITH ORDINALITY AS r (name, ord);
    SELECT string_agg(format('l.k%s = p.%I', k.ord, k.name), ' AND ' ORDER BY k.ord) INTO chain
    FROM unnest(through.through_keys) WITH ORDINALITY AS k (name, ord);
    EXECUTE format('CREATE VIEW listener.%I AS SELECT %s, %s AS tenant FROM %s p %s', 'lookup_' || source.id, keys,
                   CASE WHEN chain IS NULL THEN format('p.%I::text', through.tenant_column) ELSE 'l.tenant' END,
                   through.relid::regclass,
                   CASE WHEN chain IS NOT NULL THEN format('LEFT JOIN listener.%I l ON %s', 'lookup_' || through.id, chain) END);
    PERFORM listener.generate_tenants_by(source.id);
END
$function$;

-- drop_lookup(source_id): drops a source's look-up, and the policy of the table that it went through where no other
-- look-up needs it.
CREATE OR REPLACE FUNCTION listener.drop_lookup(source_id integer) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    through regclass := (SELECT t.relid::regclass FROM listener.source s JOIN listener.source t ON t.id = s.through_id
                         WHERE s.id = drop_lookup.source_id);
    routine regprocedure;
BEGIN
    FOR routine IN SELECT p.oid FROM pg_proc p WHERE p.pronamespace = 'listener'::regnamespace
                   AND p.proname = 'tenants_by_' || drop_lookup.source_id LOOP
        EXECUTE format('DROP FUNCTION %s', routine);
    END LOOP;
    IF to_regclass(format('listener.%I', 'lookup_' || drop_lookup.source_id)) IS NOT NULL THEN
        EXECUTE format('DROP VIEW listener.%I', 'lookup_' || drop_lookup.source_id);
    END IF;
    IF EXISTS (SELECT FROM pg_policy p WHERE p.polrelid = through AND p.polname = 'listener_lookup')
       AND NOT EXISTS (SELECT FROM listener.source s JOIN listener.source t ON t.id = s.through_id
                       WHERE t.relid = through AND s.id <> drop_lookup.source_id) THEN
        EXECUTE format('DROP POLICY listener_lookup ON %s', through);
    END IF;
END
$function$;

-- same_form(source_id, tenant_type): whether a source writes a tenant as a view with that tenant type does: an integer
-- has one spelling, and so has a uuid that is one; a text column may spell a uuid in many ways.
CREATE OR REPLACE FUNCTION listener.same_form(source_id integer, tenant_type text) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    WITH last (relid, attname) AS (
        SELECT s.relid, s.tenant_column FROM listener.source s
        WHERE s.tenant_column IS NOT NULL
          AND s.id IN (SELECT $1 UNION SELECT listener.through_sources($1))
    )
    SELECT NOT EXISTS (SELECT FROM last) OR EXISTS (
        SELECT FROM last l JOIN pg_attribute a ON a.attrelid = l.relid AND a.attname = l.attname
        JOIN pg_type t ON t.oid = a.atttypid
        WHERE coalesce(nullif(t.typbasetype, 0), t.oid) = ANY (CASE tenant_type
            WHEN 'uuid' THEN '{uuid}' WHEN 'text' THEN '{text,varchar,bpchar,name,uuid,int2,int4,int8}'
            WHEN 'integer' THEN '{int2,int4}' ELSE '{int2,int4,int8}' END::regtype[]))
$function$;

-- remove_source(relation): drops the table's triggers. Raises LSN03 while a view reads it, or a look-up goes through it.
CREATE OR REPLACE FUNCTION listener.remove_source(relation regclass) RETURNS void
LANGUAGE plpgsql AS $function$
DECLARE
    previous_role text := listener.become_owner();
    readers text;
BEGIN
    PERFORM listener.lock_registration();
    IF NOT EXISTS (SELECT FROM listener.source s WHERE s.relid = relation) THEN
        RAISE EXCEPTION '% is no source', relation USING ERRCODE = 'LSN03';
    END IF;
    SELECT pg_catalog.string_agg(r.name, ', ' ORDER BY r.name) INTO readers
    FROM (SELECT v.name FROM listener.source s JOIN listener.view_source w ON w.source_id = s.id
          JOIN listener.managed_view v ON v.id = w.view_id WHERE s.relid = relation
          UNION
          SELECT o.table_name::text FROM listener.source s JOIN listener.source o ON o.through_id = s.id
          WHERE s.relid = relation) r;
    IF readers IS NOT NULL THEN
        RAISE EXCEPTION '% is read by %', relation, readers
            USING ERRCODE = 'LSN03', HINT = 'Drop these views first: listener.drop_view(name).';
    END IF;
    PERFORM listener.detach_capture(s.id) FROM listener.source s WHERE s.relid = relation;
    PERFORM listener.drop_orphans();
    PERFORM pg_catalog.set_config('role', previous_role, true);
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

-- repair_capture(): compares what the catalog says of every source with what was noted, and mends what is no longer
-- as it was: a trigger disabled or dropped, a partition attached, detached or added, a table renamed or made anew, a
-- column renamed, a subscription that fills a table, a restored copy. Where a write may have gone by unseen, every
-- tenant of the views that read the source is marked dirty. Called by every sweep; nothing to mend is one query.
--   source, outcome ('repaired', 'renamed', 'failed'), detail: one row for each source that was not as noted
CREATE OR REPLACE FUNCTION listener.repair_capture() RETURNS TABLE (source text, outcome text, detail text)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
#variable_conflict use_column
DECLARE
    here listener.installation;
    elsewhere boolean;
    known listener.source;
    attempts integer := 5;
BEGIN
    IF NOT pg_try_advisory_xact_lock(listener.lock_key(0, 'registration')) THEN
        RETURN;
    END IF;
    SELECT i.* INTO here FROM listener.installation i;
    elsewhere := (here.system_identifier, here.database_oid) IS DISTINCT FROM (
        (SELECT c.system_identifier FROM pg_control_system() c),
        (SELECT d.oid FROM pg_database d WHERE d.datname = current_database()));
    IF elsewhere THEN
        UPDATE listener.installation SET
            system_identifier = (SELECT c.system_identifier FROM pg_control_system() c),
            database_oid = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database());
        UPDATE listener.source s SET relid = coalesce(to_regclass(format('%I.%I', s.schema_name, s.table_name)), 0);
        -- What was noted there means nothing here, and its numbers may be those of other tables.
        DELETE FROM listener.source_table;
    END IF;
    FOR known IN
        SELECT s.* FROM listener.source s WHERE NOT s.capture_paused AND (
            elsewhere
            OR NOT EXISTS (SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                           WHERE c.oid = s.relid AND c.relname = s.table_name AND n.nspname = s.schema_name)
            OR (s.tenant_column IS NOT NULL AND NOT EXISTS (
                    SELECT FROM pg_attribute a WHERE a.attrelid = s.relid AND a.attname = s.tenant_column
                      AND a.attnum = listener.tracked_column(s.id)))
            OR (s.through_id IS NOT NULL AND (
                    s.through_keys::text[] IS DISTINCT FROM listener.tracked_keys(s.id)::text[]
                    OR to_regclass('listener.lookup_' || s.id) IS NULL
                    OR (s.through_cascades AND NOT listener.still_cascades(s.id))))
            OR EXISTS (
                SELECT FROM listener.capture_tables(s.relid) w
                FULL JOIN (SELECT t.* FROM listener.source_table t WHERE t.source_id = s.id) t ON t.relid = w.relation
                WHERE w.relation IS NULL OR t.relid IS NULL
                   OR t.fingerprint IS DISTINCT FROM listener.capture_state(s.id, w.relation))
            OR EXISTS (
                SELECT FROM listener.wanted_triggers(s.id) w
                WHERE NOT EXISTS (SELECT FROM pg_trigger g WHERE g.tgrelid = w.relation AND g.tgname = w.name
                                    AND g.tgenabled = w.enabled)))
        ORDER BY s.id
    LOOP
        source := format('%s.%s', known.schema_name, known.table_name);
        BEGIN
            SELECT r.outcome, r.detail INTO outcome, detail FROM listener.repair_source(known, attempts) r;
            CONTINUE WHEN outcome IS NULL;
        EXCEPTION WHEN OTHERS THEN
            outcome := 'failed';
            detail := SQLERRM;
        END;
        RETURN NEXT;
        -- The locks on the tables of a mended source are held to the end. A writer may wait for one of them and hold
        -- what the next source needs: do not wait for him long, or he is the victim of a deadlock. There is a next sweep.
        EXIT WHEN outcome = 'failed' AND attempts = 1;
        IF outcome = 'repaired' THEN
            attempts := 1;
        END IF;
    END LOOP;
END
$function$;

-- tracked_column(source_id): the number of the tenant column that capture reads, whatever it is called now; NULL where
-- it was dropped.
CREATE OR REPLACE FUNCTION listener.tracked_column(source_id integer) RETURNS smallint
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT d.refobjsubid::smallint
    FROM pg_proc p JOIN pg_depend d ON d.classid = 'pg_proc'::regclass AND d.objid = p.oid
                                   AND d.refclassid = 'pg_class'::regclass AND d.refobjsubid > 0
    WHERE p.pronamespace = 'listener'::regnamespace AND p.proname = 'tenant_of_' || $1
$function$;

-- still_cascades(source_id): whether a foreign key still deletes a look-up's rows with those that they belong to.
CREATE OR REPLACE FUNCTION listener.still_cascades(source_id integer) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT EXISTS (
        SELECT FROM listener.source s JOIN listener.source t ON t.id = s.through_id
        JOIN pg_constraint c ON c.contype = 'f' AND c.conrelid = s.relid AND c.confrelid = t.relid
        WHERE s.id = $1 AND c.confdeltype = 'c' AND NOT c.condeferrable AND c.convalidated)
$function$;

-- tracked_keys(source_id): the columns that a look-up reads, by the names that they have now; a dropped one's stays.
CREATE OR REPLACE FUNCTION listener.tracked_keys(source_id integer) RETURNS name[]
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT array_agg(coalesce(t.attname, k.name) ORDER BY k.ord)
    FROM listener.source s CROSS JOIN unnest(s.through_keys) WITH ORDINALITY AS k (name, ord)
    LEFT JOIN (SELECT p.proname, a.attname FROM pg_proc p
               JOIN pg_depend d ON d.classid = 'pg_proc'::regclass AND d.objid = p.oid
                               AND d.refclassid = 'pg_class'::regclass AND d.refobjsubid > 0
               JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
               WHERE p.pronamespace = 'listener'::regnamespace) t ON t.proname = format('key_of_%s_%s', s.id, k.ord)
    WHERE s.id = $1
$function$;

-- repair_source(known, attempts): mends one source, trying so many times to get the locks on its tables; the outcome is
-- NULL where there is nothing to mend it with.
CREATE OR REPLACE FUNCTION listener.repair_source(
    known listener.source, attempts integer, OUT outcome text, OUT detail text)
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    source listener.source := known;
    column_now name;
    followed boolean;
    before text := (SELECT string_agg(concat(t.relid, t.fingerprint), ' ' ORDER BY t.relid)
                    FROM listener.source_table t WHERE t.source_id = known.id);
    seen text;
BEGIN
    IF NOT EXISTS (SELECT FROM pg_class c WHERE c.oid = source.relid) THEN
        source.relid := to_regclass(format('%I.%I', source.schema_name, source.table_name));
        IF source.relid IS NULL THEN
            RETURN;  -- readiness() says so
        END IF;
    END IF;
    SELECT n.nspname, c.relname INTO source.schema_name, source.table_name
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = source.relid;
    SELECT a.attname INTO column_now FROM pg_attribute a
    WHERE a.attrelid = source.relid AND a.attnum = listener.tracked_column(source.id) AND NOT a.attisdropped;
    followed := column_now IS NOT NULL OR source.tenant_column IS NULL;
    IF column_now IS NULL AND source.tenant_column IS NOT NULL THEN
        SELECT a.attname INTO column_now FROM pg_attribute a
        WHERE a.attrelid = source.relid AND a.attname = source.tenant_column AND NOT a.attisdropped;
    END IF;
    IF column_now IS NULL AND source.tenant_column IS NOT NULL AND source.relid = known.relid
       AND before = (SELECT string_agg(concat(t.oid::oid, listener.capture_state(known.id, t.oid)), ' ' ORDER BY t.oid::oid)
                     FROM (SELECT c.relation FROM listener.capture_tables(known.relid) c) AS t (oid)) THEN
        RETURN;  -- the column is gone, and readiness() says so
    END IF;
    source.tenant_column := coalesce(column_now, source.tenant_column);
    -- Two tables may have exchanged their names; the other source's turn comes.
    UPDATE listener.source s SET table_name = s.relid::text
    WHERE s.relid <> source.relid AND s.schema_name = source.schema_name AND s.table_name = source.table_name
      AND EXISTS (SELECT FROM pg_class c WHERE c.oid = s.relid);
    source.through_keys := listener.tracked_keys(source.id);
    source.through_cascades := source.through_cascades AND listener.still_cascades(source.id);
    UPDATE listener.source s SET (schema_name, table_name, relid, tenant_column, through_keys, through_cascades) = (
        SELECT source.schema_name, source.table_name, source.relid, source.tenant_column, source.through_keys,
               source.through_cascades)
    WHERE s.id = source.id;
    IF source.relid <> known.relid THEN
        PERFORM listener.check_source(source.relid::regclass, source.tenant_column);
    END IF;
    IF source.through_id IS NOT NULL AND to_regclass('listener.lookup_' || source.id) IS NULL THEN
        PERFORM listener.create_lookup(source.id);
    END IF;
    PERFORM listener.generate_capture(source.id);
    PERFORM listener.attach_capture(ARRAY[source.id], attempts);
    seen := (SELECT string_agg(concat(t.relid, t.fingerprint), ' ' ORDER BY t.relid)
             FROM listener.source_table t WHERE t.source_id = source.id);
    detail := format('%I.%I', source.schema_name, source.table_name)
              || coalesce(', tenant column ' || quote_ident(source.tenant_column), '');
    IF seen IS NOT DISTINCT FROM before AND source.relid = known.relid AND followed
       AND source.through_cascades IS NOT DISTINCT FROM known.through_cascades THEN
        IF (source.schema_name, source.table_name, source.tenant_column, source.through_keys)
               IS DISTINCT FROM (known.schema_name, known.table_name, known.tenant_column, known.through_keys) THEN
            outcome := 'renamed';
        END IF;
        RETURN;
    END IF;
    outcome := 'repaired';
    INSERT INTO listener.change_log (xid, changed_at, source_id, tenant)
    VALUES (pg_current_xact_id(), clock_timestamp(), source.id, '');
    PERFORM listener.ring_for_all();
END
$function$;
