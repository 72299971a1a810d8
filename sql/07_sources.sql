-- Sources: which tables are captured, and how their rows find their tenant: by a column or a look-up. Longer than the
-- other files, because the two are told apart throughout.

-- check_source(relation, tenant_column): raises LSN03 for a table that triggers cannot cover, or that has such a
-- partition; and for a tenant column that is missing, is computed only when read, is of a type to which another role
-- could give code, or has a collation that takes different texts for equal. (Capture logs one of the texts; rows with
-- the other would go stale.)
CREATE OR REPLACE FUNCTION listener.check_source(relation regclass, tenant_column name) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    class record;
    column_type oid;
    column_generated "char";
    column_collation regcollation;
    refusal text;
BEGIN
    SELECT c.relname, n.nspname, c.relkind, c.relpersistence,
           c.relkind = 'r' AND NOT c.relispartition
               AND EXISTS (SELECT FROM pg_inherits i WHERE c.oid IN (i.inhparent, i.inhrelid)) AS inherits
    INTO class FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = relation;
    refusal := CASE
        WHEN class.relkind = 'm' THEN 'a materialized view: its changes fire no trigger'
        WHEN class.relkind = 'f' THEN 'a foreign table: its changes happen elsewhere and fire no trigger'
        WHEN class.nspname IN ('pg_catalog', 'information_schema') THEN 'a system catalog, whose changes fire no trigger'
        WHEN class.relkind = 'S' THEN 'a sequence, whose changes fire no trigger'
        WHEN class.relkind NOT IN ('r', 'p') THEN 'no table'
        WHEN class.relpersistence = 'u' THEN 'unlogged: a crash empties it and fires no trigger'
        WHEN class.relpersistence = 't' THEN 'a temporary table'
        WHEN class.nspname = 'listener' THEN 'part of the schema listener itself'
        WHEN class.inherits THEN 'part of an inheritance tree: a trigger on a parent does not see its children''s rows'
        ELSE (SELECT min(format('partitioned, and its partition %s is %s', c.oid::regclass,
                                CASE c.relkind WHEN 'f' THEN 'a foreign table: its changes happen elsewhere and fire no trigger'
                                               ELSE 'unlogged: a crash empties it and fires no trigger' END))
              FROM pg_partition_tree(relation) t JOIN pg_class c ON c.oid = t.relid
              WHERE c.relkind = 'f' OR c.relpersistence = 'u')
    END;
    IF refusal IS NOT NULL THEN
        RAISE EXCEPTION '% cannot be a source: it is %', relation, refusal USING ERRCODE = 'LSN03';
    END IF;
    IF tenant_column IS NULL THEN
        RETURN;
    END IF;
    SELECT coalesce(nullif(t.typbasetype, 0), t.oid), a.attgenerated, l.oid INTO column_type, column_generated, column_collation
    FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
    LEFT JOIN pg_collation l ON l.oid = a.attcollation AND NOT l.collisdeterministic
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
    IF column_collation IS NOT NULL THEN
        RAISE EXCEPTION 'tenant column % of % has the collation %, which takes different texts for equal', tenant_column, relation,
            column_collation
            USING ERRCODE = 'LSN03',
                  HINT = format('Give it a deterministic one (ALTER TABLE %s ALTER %I TYPE … COLLATE "C"), or let a change refresh every '
                                'tenant: listener.add_source(%L).', relation, tenant_column, relation::text);
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
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
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
        PERFORM listener.check_source(relation, NULL), listener.check_lookups_apart(false, true);
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
    UPDATE listener.source s
    SET through_references = listener.tracked_names(s.through_references, 'reference_of_' || s.id)
    WHERE s.id = ANY (dependents);
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
        PERFORM listener.check_cycles();
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
    reference record;
    called text;
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
        -- Planning a look-up calls these, with the rights of this role, before its own policy makes the others needless.
        SELECT string_agg(DISTINCT f.oid::regprocedure::text, ', ') INTO called
        FROM pg_policy p
        JOIN pg_depend d ON d.classid = 'pg_policy'::regclass AND d.objid = p.oid AND d.refclassid = 'pg_proc'::regclass
        JOIN pg_proc f ON f.oid = d.refobjid AND f.oid >= 16384 AND f.provolatile = 'i'
        WHERE p.polrelid = through.relid AND p.polcmd IN ('r', '*');
        IF called IS NOT NULL THEN
            RAISE EXCEPTION 'a policy of % calls %, which a look-up would run with the rights of %', through.relid::regclass, called, current_user
                USING ERRCODE = 'LSN03', HINT = format('Declare it STABLE; or ALTER ROLE %I BYPASSRLS: then no policy is run.', current_user);
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
    -- Which column is k1 is told by neither the view nor the catalog, once one was renamed.
    FOR reference IN SELECT r.name, r.ord FROM unnest(source.through_references) WITH ORDINALITY AS r (name, ord) LOOP
        EXECUTE format('CREATE VIEW listener.%I AS SELECT p.%I AS tracked FROM %s p',
                       format('reference_of_%s_%s', source.id, reference.ord), reference.name, through.relid::regclass);
    END LOOP;
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
    tracker text;
BEGIN
    FOR routine IN SELECT p.oid FROM pg_proc p WHERE p.pronamespace = 'listener'::regnamespace
                   AND p.proname = 'tenants_by_' || drop_lookup.source_id LOOP
        EXECUTE format('DROP FUNCTION %s', routine);
    END LOOP;
    FOR tracker IN SELECT c.oid::regclass FROM pg_class c
                   WHERE c.relnamespace = 'listener'::regnamespace AND c.relkind = 'v'
                     AND c.relname ~ format('^(lookup_%1$s|reference_of_%1$s_[0-9]+)$', drop_lookup.source_id) LOOP
        EXECUTE format('DROP VIEW %s', tracker);
    END LOOP;
    IF EXISTS (SELECT FROM pg_policy p WHERE p.polrelid = through AND p.polname = 'listener_lookup')
       AND NOT EXISTS (SELECT FROM listener.source s JOIN listener.source t ON t.id = s.through_id
                       WHERE t.relid = through AND s.id <> drop_lookup.source_id) THEN
        EXECUTE format('DROP POLICY listener_lookup ON %s', through);
    END IF;
END
$function$;

-- same_form(source_id, tenant_type): whether a source writes a tenant as a view with that tenant type does: an integer
-- has one spelling, and so has a uuid that is one; a text column may spell a uuid in many ways. Never where the view
-- has no tenants: whichever tenant is logged, its one key is dirty.
CREATE OR REPLACE FUNCTION listener.same_form(source_id integer, tenant_type text) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    WITH last (relid, attname) AS (
        SELECT s.relid, s.tenant_column FROM listener.source s
        WHERE s.tenant_column IS NOT NULL
          AND s.id IN (SELECT $1 UNION SELECT listener.through_sources($1))
    )
    SELECT tenant_type IS NOT NULL AND (NOT EXISTS (SELECT FROM last) OR EXISTS (
        SELECT FROM last l JOIN pg_attribute a ON a.attrelid = l.relid AND a.attname = l.attname
        JOIN pg_type t ON t.oid = a.atttypid
        WHERE coalesce(nullif(t.typbasetype, 0), t.oid) = ANY (CASE tenant_type
            WHEN 'uuid' THEN '{uuid}' WHEN 'text' THEN '{text,varchar,bpchar,name,uuid,int2,int4,int8}'
            WHEN 'integer' THEN '{int2,int4}' ELSE '{int2,int4,int8}' END::regtype[])))
$function$;

-- remove_source(relation): drops the table's triggers. Raises LSN03 while a view reads it, or a look-up goes through it.
CREATE OR REPLACE FUNCTION listener.remove_source(relation regclass) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
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
