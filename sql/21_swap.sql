-- Putting a relation in the place of another under its name, in one short transaction: what adopt, unadopt and a changed
-- definition share. All of it acts as the role that owns the schema, which must be a member of the old one's owner.

-- dependent_views(relation): the views that read a relation directly, those that read others of them first: that is
-- the order in which a reader locks them. definition: their text, with every name qualified.
CREATE OR REPLACE FUNCTION listener.dependent_views(relation regclass)
RETURNS TABLE (view regclass, owner name, options text, definition text)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT c.oid::regclass, pg_get_userbyid(c.relowner),
           (SELECT string_agg(format('%s = %L', o.option_name, o.option_value), ', ')
            FROM pg_options_to_table(c.reloptions) o),
           listener.query_of(c.oid)
    FROM pg_class c
    WHERE c.relkind = 'v' AND c.oid IN (
        SELECT w.ev_class FROM pg_depend d JOIN pg_rewrite w ON w.oid = d.objid AND w.rulename = '_RETURN'
        WHERE d.classid = 'pg_rewrite'::regclass AND d.refclassid = 'pg_class'::regclass AND d.refobjid = relation)
    ORDER BY c.oid DESC
$function$;

-- made_ours(relation): what lets the owner of this schema change a relation of another role.
CREATE OR REPLACE FUNCTION listener.made_ours(relation regclass) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT CASE WHEN o.rolsuper
                THEN format('ALTER %s %s OWNER TO a role that is no superuser and that %I is a member of',
                            CASE c.relkind WHEN 'm' THEN 'MATERIALIZED VIEW' WHEN 'v' THEN 'VIEW' ELSE 'TABLE' END, relation,
                            i.owner_role)
                ELSE format('GRANT %I TO %I', o.rolname, i.owner_role) END
    FROM listener.installation i, pg_class c JOIN pg_roles o ON o.oid = c.relowner WHERE c.oid = relation
$function$;

-- tied_to(relation): what cannot be led over to another relation of the same name, since the catalog ties it to this
-- one's row type or to this one itself: one line each. Indexes, statistics, grants, comments and the views that read its
-- columns can; the last must belong to roles that the owner of this schema is a member of.
CREATE OR REPLACE FUNCTION listener.tied_to(relation regclass) RETURNS SETOF text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    WITH old AS (
        SELECT c.oid, c.reltype, t.typarray,
               -- A whole row leaves no dependency of its own: its type stands in the parsed query.
               format(':[a-z_]*type(id)? (%s|%s)\M', c.reltype, t.typarray) AS whole_row
        FROM pg_class c JOIN pg_type t ON t.oid = c.reltype WHERE c.oid = relation
    ), depending AS (
        SELECT DISTINCT d.classid, d.objid, d.objsubid
        FROM old o JOIN pg_depend d ON (d.refclassid = 'pg_class'::regclass AND d.refobjid = o.oid)
                                    OR (d.refclassid = 'pg_type'::regclass AND d.refobjid IN (o.reltype, o.typarray))
        WHERE NOT (d.classid = 'pg_type'::regclass AND d.objid IN (o.reltype, o.typarray))
    )
    SELECT DISTINCT CASE
        WHEN c.relkind = 'm' THEN format('materialized view %s, which reads it', c.oid::regclass)
        WHEN c.relkind = 'v' AND w.rulename = '_RETURN' AND w.ev_action::text ~ o.whole_row
            THEN format('view %s, which names its whole row', c.oid::regclass)
        WHEN c.relkind = 'v' AND w.rulename = '_RETURN'
            THEN format('view %s, which belongs to %I: %s', c.oid::regclass, pg_get_userbyid(c.relowner),
                        listener.made_ours(c.oid))
        WHEN u.oid IS NOT NULL
            THEN format('publication %1$I, which belongs to %2$I: ALTER PUBLICATION %1$I OWNER TO %3$I', u.pubname,
                        pg_get_userbyid(u.pubowner), current_user)
        ELSE pg_describe_object(d.classid, d.objid, d.objsubid) END
    FROM depending d CROSS JOIN old o
    LEFT JOIN pg_rewrite w ON d.classid = 'pg_rewrite'::regclass AND w.oid = d.objid
    LEFT JOIN pg_class c ON c.oid = w.ev_class
    LEFT JOIN pg_class r ON d.classid = 'pg_class'::regclass AND r.oid = d.objid AND d.objsubid = 0
    LEFT JOIN pg_constraint k ON d.classid = 'pg_constraint'::regclass AND k.oid = d.objid
    LEFT JOIN pg_policy p ON d.classid = 'pg_policy'::regclass AND p.oid = d.objid
    LEFT JOIN pg_publication_rel l ON d.classid = 'pg_publication_rel'::regclass AND l.oid = d.objid
    LEFT JOIN pg_publication u ON u.oid = l.prpubid
    WHERE CASE
        WHEN w.oid IS NOT NULL THEN NOT (w.rulename = '_RETURN' AND (
            w.ev_class = o.oid OR (c.relkind = 'v' AND w.ev_action::text !~ o.whole_row
                                   AND pg_has_role((SELECT i.owner_role FROM listener.installation i), c.relowner, 'USAGE'))))
        WHEN r.oid IS NOT NULL THEN r.relkind NOT IN ('i', 't')
        WHEN k.oid IS NOT NULL THEN NOT (k.contype = 'n' AND k.conrelid = o.oid)
        WHEN p.oid IS NOT NULL THEN NOT (p.polrelid = o.oid AND p.polname LIKE 'listener\_%')
        WHEN u.oid IS NOT NULL THEN NOT pg_has_role(u.pubowner, 'USAGE')
        ELSE d.classid <> 'pg_statistic_ext'::regclass END
    UNION ALL
    SELECT format('extension %s, which it is part of', e.extname)
    FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid
    WHERE d.classid = 'pg_class'::regclass AND d.objid = relation AND d.refclassid = 'pg_extension'::regclass
$function$;

-- check_swappable(relation): raises LSN03 where something is tied to it, or where it, or its schema, is not ours to change.
CREATE OR REPLACE FUNCTION listener.check_swappable(relation regclass) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    owner oid := (SELECT c.relowner FROM pg_class c WHERE c.oid = relation);
    schema name := (SELECT n.nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = relation);
    tied text := (SELECT string_agg(t, '; ' ORDER BY t) FROM listener.tied_to(relation) t);
BEGIN
    IF NOT pg_has_role(owner, 'USAGE') THEN
        RAISE EXCEPTION '% belongs to %, and role % is no member of it', relation, pg_get_userbyid(owner), current_user
            USING ERRCODE = 'LSN03', HINT = listener.made_ours(relation);
    ELSIF NOT (has_schema_privilege(schema, 'CREATE') AND has_schema_privilege(owner, schema, 'CREATE')) THEN
        RAISE EXCEPTION 'nothing can be put beside % by %, or belong to % there', relation, current_user, pg_get_userbyid(owner)
            USING ERRCODE = 'LSN03',
                  HINT = format('GRANT USAGE, CREATE ON SCHEMA %I TO %I, %I;', schema, current_user, pg_get_userbyid(owner));
    ELSIF tied IS NOT NULL THEN
        RAISE EXCEPTION '% cannot be replaced: tied to it are %', relation, tied USING ERRCODE = 'LSN03',
            HINT = 'Drop these first and make them again afterwards; a function with RETURNS TABLE (…) is tied to no row type.'
                || CASE WHEN (SELECT c.relkind FROM pg_class c WHERE c.oid = relation) = 'm'
                        THEN ' Or keep it a materialized view: listener.keep_materialized_view(name).' ELSE '' END;
    END IF;
END
$function$;

-- swapping(old, new): the statements of the swap itself, in their order. `new` is the name of a relation in the schema of
-- `old`; it need not exist for them to be shown, but only those that exist there have their names changed.
CREATE OR REPLACE FUNCTION listener.swapping(old regclass, new name) RETURNS SETOF text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    WITH class AS (
        SELECT c.oid, c.relname, c.relkind, n.oid AS schema_id, n.nspname
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = old
    ), statements (ord, part, statement) AS (
        SELECT 1, 0::bigint, format('ALTER TABLE %s RENAME TO %I', old, 'listener_old_' || c.oid) FROM class c
        UNION ALL
        SELECT 2, 0, format('ALTER TABLE %I.%I RENAME TO %I', c.nspname, new, c.relname) FROM class c
        UNION ALL
        -- The text still names the old one's name, which by now is the new one's. What is not said here would be lost.
        SELECT 3, -v.view::oid::bigint, format(E'CREATE OR REPLACE VIEW %s%s AS\n%s', v.view, ' WITH (' || v.options || ')',
                                               v.definition)
        FROM listener.dependent_views(old) v
        UNION ALL
        SELECT 4, 0, format('DROP %s %I.%I', CASE c.relkind WHEN 'm' THEN 'MATERIALIZED VIEW' ELSE 'TABLE' END, c.nspname,
                            'listener_old_' || c.oid) FROM class c
        UNION ALL
        SELECT 5, i.id::bigint, format('ALTER INDEX %I.%I RENAME TO %I', c.nspname, 'listener_new_' || i.id, i.name)
        FROM class c CROSS JOIN listener.indexes_of(old) i
        WHERE to_regclass(format('%I.%I', c.nspname, 'listener_new_' || i.id)) IS NOT NULL
        UNION ALL
        SELECT 6, e.oid::bigint, format('ALTER STATISTICS %I.%I RENAME TO %I', n.nspname, 'listener_new_' || e.oid, e.stxname)
        FROM pg_statistic_ext e JOIN pg_namespace n ON n.oid = e.stxnamespace
        WHERE e.stxrelid = old AND EXISTS (SELECT FROM pg_statistic_ext f
                                           WHERE f.stxnamespace = n.oid AND f.stxname = 'listener_new_' || e.oid)
        UNION ALL
        SELECT 7, p.oid::bigint, format('ALTER PUBLICATION %I ADD TABLE %I.%I%s%s', p.pubname, c.nspname, c.relname,
            (SELECT format(' (%s)', string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum))
             FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum = ANY (r.prattrs::smallint[])
             HAVING r.prattrs IS NOT NULL),
            ' WHERE (' || pg_get_expr(r.prqual, c.oid) || ')')
        FROM class c JOIN pg_publication_rel r ON r.prrelid = c.oid JOIN pg_publication p ON p.oid = r.prpubid
    )
    SELECT s.statement FROM statements s ORDER BY s.ord, s.part
$function$;

-- check_way(relations): raises lock_not_available where a transaction held a lock on one of them 50 ms ago and holds it
-- still. Asking for a lock behind it would make every later reader wait for it, too.
CREATE OR REPLACE FUNCTION listener.check_way(relations regclass[]) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    here oid := (SELECT d.oid FROM pg_database d WHERE d.datname = current_database());
    before text[] := ARRAY(
        SELECT l.virtualtransaction FROM pg_locks l
        WHERE l.locktype = 'relation' AND l.database = here AND l.relation = ANY (relations) AND l.granted
          AND l.pid IS DISTINCT FROM pg_backend_pid());
    holder record;
BEGIN
    IF before = '{}' THEN
        RETURN;
    END IF;
    PERFORM pg_sleep(0.05);
    SELECT l.pid, l.relation::regclass AS relation, coalesce(nullif(a.application_name, ''), a.usename) AS who INTO holder
    FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid
    WHERE l.locktype = 'relation' AND l.database = here AND l.relation = ANY (relations) AND l.granted
      AND l.virtualtransaction = ANY (before) AND l.pid IS DISTINCT FROM pg_backend_pid()
    LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION '% is in use', holder.relation USING ERRCODE = 'lock_not_available',
            HINT = format('%s holds a lock on it: see pg_stat_activity.',
                          coalesce(format('Backend %s (%s)', holder.pid, holder.who), 'A prepared transaction'));
    END IF;
END
$function$;

-- lock_readers(old, new, first): the locks of a swap, each ACCESS EXCLUSIVE until the transaction ends: `new`, then `first`, the
-- views that read `old`, `old`. Those that readers use are had within 200 ms or not at all, and not asked for while a
-- long transaction holds one; the order is that in which a reader takes them. Nothing else is locked, no source above all.
--   first   relations of ours that a refresh of `old` locks before it
-- Returns when readers began to be locked out. Raises lock_not_available, having done nothing: try again.
CREATE OR REPLACE FUNCTION listener.lock_readers(old regclass, new regclass, first regclass[]) RETURNS timestamptz
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    readers regclass[] := first || ARRAY(SELECT v.view FROM listener.dependent_views(old) v) || old;
    previous_timeout text := current_setting('lock_timeout');
    relation regclass;
    asked timestamptz;
BEGIN
    -- It waits for refreshes of the new one, and nobody reads that yet.
    PERFORM set_config('lock_timeout', '200ms', true);
    PERFORM listener.lock_out(new);
    PERFORM listener.check_way(readers);
    asked := clock_timestamp();
    FOREACH relation IN ARRAY readers LOOP
        PERFORM set_config('lock_timeout', greatest(
            1, 200 - round(1000 * extract(epoch FROM clock_timestamp() - asked)))::integer || 'ms', true);
        PERFORM listener.lock_out(relation);
    END LOOP;
    PERFORM set_config('lock_timeout', previous_timeout, true);
    RETURN asked;
END
$function$;

-- swap(old, new): puts `new` in the place of `old`, its name and its readers, and drops `old`; lock_readers() says what it
-- locks.
-- locked: how long readers have been locked out when this returns; the commit comes on top.
-- Raises lock_not_available, having done nothing: try again. Raises LSN03 where something is tied to `old` by now.
CREATE OR REPLACE FUNCTION listener.swap(old regclass, new regclass, OUT locked interval)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    new_name name := (SELECT c.relname FROM pg_class c WHERE c.oid = new);
    statement text;
    asked timestamptz;
    -- The queries of the views on top are read under the settings under which they were written.
    previous jsonb := listener.use_settings(listener.own_settings());
BEGIN
    PERFORM listener.check_swappable(old);
    -- What takes longer the first time has been done once when readers wait for it.
    PERFORM count(*) FROM listener.swapping(old, new_name);
    asked := listener.lock_readers(old, new, '{}');
    -- As it is now that nobody can change it.
    PERFORM listener.check_swappable(old);
    FOREACH statement IN ARRAY ARRAY(SELECT s FROM listener.swapping(old, new_name) s) LOOP
        EXECUTE statement;
    END LOOP;
    PERFORM listener.use_settings(previous);
    locked := clock_timestamp() - asked;
END
$function$;

-- lock_out(relation): ACCESS EXCLUSIVE on a relation of any kind, and on nothing else: LOCK TABLE refuses a materialized
-- view, and locks all that a view reads.
CREATE OR REPLACE FUNCTION listener.lock_out(relation regclass) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    EXECUTE format('ALTER TABLE %s OWNER TO %I', relation,
                   (SELECT pg_get_userbyid(c.relowner) FROM pg_class c WHERE c.oid = relation));
END
$function$;
