-- A definition changes: the new one is made beside the old, filled while writes and readers go on, compared, and put in
-- its place; or taken back. Each step is a transaction of its own:
--   begin_alter(view, query, …) → the service fills, or refresh() does → compare_alter(view, tenant) →
--   analyze_replacement(the new view) → finish_alter(view) → end_alter(), or abort_alter(view)

-- altered(view): the view that is to take this one's place, as begin_alter() made it. Raises LSN03 where there is none.
CREATE OR REPLACE FUNCTION listener.altered(view listener.managed_view) RETURNS listener.managed_view
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    beside listener.managed_view;
BEGIN
    SELECT v.* INTO beside FROM listener.managed_view v WHERE v.replaces = view.id;
    IF beside.id IS NULL THEN
        RAISE EXCEPTION '% is not being altered', view.name USING ERRCODE = 'LSN03',
            HINT = 'SELECT listener.begin_alter(view, query) begins it.';
    END IF;
    RETURN beside;
END
$function$;

-- begin_alter(view, query, …): registers the new definition beside the view: its target has the old one's owner, indexes,
-- grants and comments, and every tenant is marked dirty. What is left out stays as it is; the window stays in any case.
--   query           the new definition, read with the search_path of the old one
--   tenants_query   '': none any more
-- An alteration that was begun before is taken back first. Returns the name of the new view until it is in place.
-- Raises LSN03 where something is tied to the target, where a view on top reads a column that goes or changes its type, and
-- as create_view does; then nothing was done.
CREATE OR REPLACE FUNCTION listener.begin_alter(
    view text, query text DEFAULT NULL, key_columns name[] DEFAULT NULL, tenants_query text DEFAULT NULL,
    depends_on regclass[] DEFAULT NULL, max_age interval DEFAULT NULL, timezone text DEFAULT NULL,
    target_rls boolean DEFAULT NULL) RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
#variable_conflict use_variable
DECLARE
    previous_role text := listener.become_owner();
    managed listener.managed_view;
    beside listener.managed_view;
    adoption_state text;
    old regclass;
    new text;
    previous jsonb;
    statement text;
BEGIN
    PERFORM listener.lock_registration();
    managed := listener.find_view(view);
    old := to_regclass(format('%I.%I', managed.target_schema, managed.target_name));
    new := format('%I.%I', managed.target_schema, 'listener_alter_' || managed.id);
    SELECT a.state INTO adoption_state FROM listener.adoption a WHERE a.view_id = managed.id AND a.state <> 'adopted';
    IF managed.replaces IS NOT NULL THEN
        RAISE EXCEPTION '% is to take the place of another view', managed.name USING ERRCODE = 'LSN03';
    ELSIF managed.strategy = 'materialized view' THEN
        RAISE EXCEPTION '% is a materialized view of your own', managed.name USING ERRCODE = 'LSN03',
            HINT = format('SELECT listener.drop_view(%L), which leaves it; replace it; then listener.keep_materialized_view.', managed.name);
    ELSIF old IS NULL THEN
        RAISE EXCEPTION 'the target of % is gone', managed.name USING ERRCODE = 'LSN03',
            HINT = 'listener.restore_target(view) makes it again.';
    ELSIF adoption_state IS NOT NULL THEN
        RAISE EXCEPTION '% is %', managed.name, adoption_state USING ERRCODE = 'LSN03',
            HINT = 'Finish that first, or take it back: listener.abort_adoption(view).';
    END IF;
    PERFORM listener.check_alterable(old);
    PERFORM listener.drop_view(v.name) FROM listener.managed_view v WHERE v.replaces = managed.id;
    -- create_view() takes the settings of the session.
    previous := listener.use_settings(listener.registered_settings(managed));
    PERFORM set_config('search_path', managed.search_path, true);
    PERFORM listener.create_view(
        name => new, query => coalesce(query, managed.query),
        key_columns => coalesce(key_columns, managed.key_columns), tenant_column => managed.tenant_column,
        tenants_query => nullif(coalesce(tenants_query, managed.tenants_query), ''),
        depends_on => coalesce(depends_on, managed.depends_on::regclass[]),
        quiet_period => managed.quiet_period, max_wait => managed.max_wait, edge => managed.edge,
        max_age => coalesce(max_age, managed.max_age), timezone => coalesce(timezone, managed.time_zone),
        target_rls => coalesce(target_rls, managed.target_rls), max_staleness => managed.max_staleness,
        compute_role => managed.compute_role);
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true), listener.use_settings(previous);
    UPDATE listener.managed_view v SET replaces = managed.id
    WHERE (v.target_schema, v.target_name) = (managed.target_schema, ('listener_alter_' || managed.id)::name)
    RETURNING v.* INTO beside;
    PERFORM listener.check_readers(managed, old, new::regclass);
    PERFORM listener.revoke_defaults(new::regclass), listener.name_key_index(old, new::regclass, beside.id);
    FOR statement IN SELECT s FROM listener.carried(old, new, 'r', beside.key_columns, '{}', listener.grants_of(old)) s LOOP
        BEGIN
            EXECUTE statement;
        EXCEPTION WHEN undefined_column OR undefined_object OR undefined_function OR datatype_mismatch OR wrong_object_type THEN
            RAISE NOTICE 'left out, since a column goes or changes its type: %', statement;
        END;
    END LOOP;
    PERFORM set_config('role', previous_role, true);
    RETURN beside.name;
END
$function$;

-- check_alterable(target): check_swappable(), apart from what is ours: what other managed views have of the target as
-- their source is made anew when the new one is in place.
CREATE OR REPLACE FUNCTION listener.check_alterable(target regclass) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    IF NOT EXISTS (SELECT FROM listener.source s WHERE s.relid = target) OR EXISTS (
        SELECT FROM listener.tied_to(target) t
        WHERE t !~ '^(trigger listener_[0-9]+_[a-z]+ on |(function|type|view) listener\.)') THEN
        PERFORM listener.check_swappable(target);
    END IF;
END
$function$;

-- column_changes(view): the columns of the definition that come, go or change their type with the alteration.
--   change   added, removed, retyped; before, after: the types
CREATE OR REPLACE FUNCTION listener.column_changes(view text)
RETURNS TABLE (name name, change text, before text, after text)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT coalesce(n.attname, o.attname),
           CASE WHEN o.attname IS NULL THEN 'added' WHEN n.attname IS NULL THEN 'removed' ELSE 'retyped' END,
           format_type(o.atttypid, o.atttypmod), format_type(n.atttypid, n.atttypmod)
    FROM (SELECT v.id FROM listener.find_view(view) v) AS v
    CROSS JOIN LATERAL (SELECT a.* FROM pg_attribute a
                        WHERE a.attrelid = to_regclass('listener.definition_' || v.id) AND a.attnum > 0) o
    FULL JOIN (SELECT a.* FROM listener.find_view(view) f
               JOIN pg_attribute a ON a.attrelid = to_regclass('listener.definition_' || (listener.altered(f)).id) AND a.attnum > 0) n
        ON n.attname = o.attname
    WHERE (o.atttypid, o.atttypmod) IS DISTINCT FROM (n.atttypid, n.atttypmod)
    ORDER BY n.attnum NULLS FIRST, o.attnum
$function$;

-- check_readers(view, old, new): raises LSN03 where a view on top reads a column of the old target that the new one lacks or
-- has with another type: CREATE OR REPLACE VIEW would fail, or change the type of its own column, which PostgreSQL refuses.
CREATE OR REPLACE FUNCTION listener.check_readers(view listener.managed_view, old regclass, new regclass) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    broken text := (
        SELECT string_agg(DISTINCT format('%s reads %I', coalesce('the managed view ' || m.name, w.ev_class::regclass::text), a.attname), '; ')
        FROM pg_depend d
        JOIN pg_rewrite w ON d.classid = 'pg_rewrite'::regclass AND w.oid = d.objid AND w.ev_class <> old
        JOIN pg_attribute a ON a.attrelid = old AND a.attnum = d.refobjsubid AND d.refobjsubid > 0
        LEFT JOIN listener.managed_view m ON to_regclass('listener.definition_' || m.id) = w.ev_class
        WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = old AND NOT EXISTS (
            SELECT FROM pg_attribute n
            WHERE n.attrelid = new AND n.attname = a.attname AND NOT n.attisdropped
              AND (n.atttypid, n.atttypmod) = (a.atttypid, a.atttypmod)));
BEGIN
    IF broken IS NOT NULL THEN
        RAISE EXCEPTION 'a column that goes, or changes its type, is read on top of %: %', view.name, broken USING ERRCODE = 'LSN03',
            HINT = 'Drop what reads it first, or keep the column.';
    END IF;
END
$function$;

-- alter_statement(view, beside): counts, for tenant $1, the rows that only the new target has, only the old one, and those
-- that both have by their key and that differ in a column that both have. Where the key is not the same, or is the whole
-- row, a changed row counts as one removed and one added.
CREATE OR REPLACE FUNCTION listener.alter_statement(view listener.managed_view, beside listener.managed_view) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    WITH common AS (
        SELECT n.attname, n.attnum FROM pg_attribute o JOIN pg_attribute n ON n.attname = o.attname
        WHERE o.attrelid = format('%I.%I', view.target_schema, view.target_name)::regclass
          AND n.attrelid = format('%I.%I', beside.target_schema, beside.target_name)::regclass
          AND o.attnum > 0 AND n.attnum > 0 AND NOT o.attisdropped AND NOT n.attisdropped
          AND EXISTS (SELECT FROM pg_attribute d WHERE d.attrelid = to_regclass('listener.definition_' || view.id)
                                                   AND d.attname = o.attname AND d.attnum > 0)
    ), keys (list) AS (
        SELECT string_agg(listener.text_of(view, quote_ident(c.attname)), ', ' ORDER BY c.attnum) FROM common c
        WHERE c.attname = ANY (beside.key_columns)
           OR NOT (cardinality(beside.key_columns) > 0 AND beside.key_columns @> view.key_columns AND view.key_columns @> beside.key_columns)
    ), columns (list) AS (
        SELECT string_agg(listener.text_of(view, quote_ident(c.attname)), ', ' ORDER BY c.attnum) FROM common c
    ), sides AS (
        SELECT string_agg(format($side$%s AS MATERIALIZED (
    SELECT s.*, pg_catalog.row_number() OVER (PARTITION BY s.key) AS n
    FROM (SELECT %s AS key, %s AS image FROM %I.%I WHERE %s) s
)$side$, s.side, listener.text_of(view, format('ROW(%s)', k.list)), listener.text_of(view, format('ROW(%s)', c.list)),
                                 (s.of).target_schema, (s.of).target_name, listener.is_of_tenant(s.of, '')), ', ' ORDER BY s.side) AS text
        FROM keys k CROSS JOIN columns c CROSS JOIN (VALUES ('before', view), ('afterwards', beside)) AS s (side, of)
    )
    SELECT format('WITH %s
SELECT pg_catalog.jsonb_build_object(
    ''added'', pg_catalog.count(*) FILTER (WHERE b.key IS NULL), ''removed'', pg_catalog.count(*) FILTER (WHERE a.key IS NULL),
    ''changed'', pg_catalog.count(*) FILTER (WHERE b.image OPERATOR(pg_catalog.<>) a.image), ''rows'', pg_catalog.count(*))
FROM before b FULL JOIN afterwards a ON a.key OPERATOR(pg_catalog.=) b.key AND a.n OPERATOR(pg_catalog.=) b.n', s.text)
    FROM sides s
$function$;

-- compare_alter(view, tenant_id): what the alteration changes for one tenant, in one snapshot: rows added, removed, changed;
-- of how many. What is written meanwhile shows in whichever of the two was refreshed later.
-- Computed as refresh() computes. Raises LSN01, LSN02, LSN03.
CREATE OR REPLACE FUNCTION listener.compare_alter(
    view text, tenant_id text, OUT added bigint, OUT removed bigint, OUT changed bigint, OUT rows bigint)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off
AS $function$
DECLARE
    managed listener.managed_view := listener.find_view(view);
    altered listener.managed_view := listener.altered(managed);
    found jsonb := listener.evaluate(altered, listener.alter_statement(managed, altered),
                                     listener.canonical_tenant(tenant_id, managed.tenant_type));
BEGIN
    added := (found ->> 'added')::bigint;
    removed := (found ->> 'removed')::bigint;
    changed := (found ->> 'changed')::bigint;
    rows := (found ->> 'rows')::bigint;
END
$function$;

-- finish_alter(view): puts the new target in the place of the old one, in one transaction: name, readers, the views on top
-- and the managed views that read it, whose tenants are all marked dirty. The adoption of the view, if it was adopted,
-- is the new one's. The triggers of tables that nothing reads any more are left to end_alter(): taking them may wait.
-- Returns how long readers were locked out. Raises lock_not_available, having done nothing: try again;
-- object_not_in_prerequisite_state while a tenant was not filled yet; LSN03 where something is tied to the target by now.
CREATE OR REPLACE FUNCTION listener.finish_alter(view text) RETURNS interval
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    previous_role text := listener.become_owner();
    managed listener.managed_view;
    beside listener.managed_view;
    old regclass;
    new regclass;
    unfilled bigint;
    source_ids integer[];
    asked timestamptz;
BEGIN
    PERFORM listener.lock_registration();
    managed := listener.find_view(view);
    beside := listener.altered(managed);
    old := to_regclass(format('%I.%I', managed.target_schema, managed.target_name));
    new := to_regclass(format('%I.%I', beside.target_schema, beside.target_name));
    source_ids := ARRAY(SELECT s.id FROM listener.source s WHERE s.relid = old);
    SELECT count(*) INTO unfilled FROM listener.unfilled(beside.name);
    IF old IS NULL OR new IS NULL THEN
        RAISE EXCEPTION 'a target of % is gone', managed.name USING ERRCODE = 'LSN03', HINT = 'SELECT listener.abort_alter(view).';
    ELSIF unfilled > 0 THEN
        RAISE EXCEPTION '% of %: not filled yet', CASE unfilled WHEN 1 THEN 'a key' ELSE unfilled || ' keys' END, beside.name
            USING ERRCODE = 'object_not_in_prerequisite_state', HINT = 'The service fills it, and so does `listener refresh --all-tenants`.';
    END IF;
    PERFORM listener.check_alterable(old), listener.check_readers(managed, old, new);
    PERFORM listener.carry_again(old, new, beside.id, ARRAY(
        SELECT s FROM listener.carried(old, new::text, 'r', beside.key_columns, '{}', listener.grants_of(old)) s));
    -- Before what capture has of the old target is touched, which readers would wait for, too. Its definition goes: a
    -- refresh that held that, and waited for the target, would be in a deadlock with this.
    asked := listener.lock_readers(old, new, ARRAY(
        SELECT to_regclass(d || managed.id) FROM unnest('{listener.tenants_,listener.definition_}'::text[]) d
        WHERE to_regclass(d || managed.id) IS NOT NULL));
    -- What capture has of the old target's row type would stand in the way.
    PERFORM listener.drop_capture(s) FROM unnest(source_ids) s;
    DELETE FROM listener.source_table t WHERE t.source_id = ANY (source_ids);
    PERFORM listener.check_readers(managed, old, new);
    PERFORM listener.swap(old, new);
    UPDATE listener.adoption a SET view_id = beside.id WHERE a.view_id = managed.id;
    PERFORM listener.drop_records(managed);
    UPDATE listener.managed_view v SET name = managed.name, target_name = managed.target_name, replaces = NULL,
        paused_at = managed.paused_at, created_at = managed.created_at
    WHERE v.id = beside.id RETURNING v.* INTO beside;
    PERFORM listener.generate_difference(beside);
    UPDATE listener.managed_view v SET fingerprint = coalesce(listener.view_fingerprint(v), v.fingerprint)
    WHERE v.id = beside.id OR v.id IN (SELECT w.view_id FROM listener.view_source w WHERE w.source_id = ANY (source_ids));
    UPDATE listener.source s SET relid = new WHERE s.id = ANY (source_ids);
    PERFORM listener.generate_capture(s) FROM unnest(source_ids) s;
    PERFORM listener.attach_capture(source_ids);
    PERFORM listener.mark_all_dirty(w.view_id) FROM listener.view_source w WHERE w.source_id = ANY (source_ids) GROUP BY w.view_id;
    -- Who refreshes knew it by another name until now.
    INSERT INTO listener.change_log (xid, changed_at, view_id, tenant)
    SELECT pg_current_xact_id(), k.dirty_since, k.view_id, k.tenant FROM listener.dirty k WHERE k.view_id = beside.id;
    PERFORM listener.ring_for_all();
    PERFORM set_config('role', previous_role, true);
    RETURN clock_timestamp() - asked;
END
$function$;

-- end_alter(): takes the triggers off the tables that only definitions of before read. Raises LSN03 where it never gets the
-- locks for that: then the next view that is dropped or altered does it.
CREATE OR REPLACE FUNCTION listener.end_alter() RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    previous_role text := listener.become_owner();
BEGIN
    PERFORM listener.lock_registration();
    PERFORM listener.drop_orphans();
    PERFORM set_config('role', previous_role, true);
END
$function$;

-- abort_alter(view): takes the alteration back: the view is as it was.
CREATE OR REPLACE FUNCTION listener.abort_alter(view text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    previous_role text := listener.become_owner();
BEGIN
    PERFORM listener.drop_view((listener.altered(listener.find_view(view))).name);
    PERFORM set_config('role', previous_role, true);
END
$function$;

-- same_query(view, query): whether a query is the view's, however it is written: as PostgreSQL writes it back.
-- Raises LSN03 where it is no query.
CREATE OR REPLACE FUNCTION listener.same_query(view text, query text) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    previous_role text := listener.become_owner();
    managed listener.managed_view := listener.find_view(view);
    other listener.managed_view;
    is_same boolean;
BEGIN
    other := managed;
    other.id := 0;
    other.query := same_query.query;
    other.tenants_query := NULL;
    PERFORM listener.generate_computing(other);
    PERFORM listener.create_definition(other);
    is_same := listener.query_of(to_regclass('listener.definition_0'))
             = listener.query_of(to_regclass('listener.definition_' || managed.id));
    DROP VIEW listener.definition_0;
    PERFORM listener.drop_computing(0);
    PERFORM set_config('role', previous_role, true);
    RETURN coalesce(is_same, false);
END
$function$;
