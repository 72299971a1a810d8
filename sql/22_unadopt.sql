-- Turning an adoption back: the materialized view is made anew beside the target, filled, and put in its place.

-- unadopting(view, adoption): the statements that make the materialized view anew beside the target, the first of them
-- that itself. Its definition is what it is by now, since a table that it reads may have another name.
CREATE OR REPLACE FUNCTION listener.unadopting(view listener.managed_view, adoption listener.adoption) RETURNS SETOF text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    WITH names AS (
        SELECT format('%I.%I', view.target_schema, view.target_name)::regclass AS target,
               format('%I.%I', view.target_schema, listener.name_beside(view)) AS beside, i.service_role
        FROM listener.installation i
    ), grants AS (
        -- Who may read it now; and the service, and the privileges that a table did not take over, as it was.
        SELECT coalesce(jsonb_agg(u.g), '[]') AS all
        FROM (SELECT g FROM names n CROSS JOIN LATERAL jsonb_array_elements(listener.grants_of(n.target)) g
              WHERE g ->> 'grantee' IS DISTINCT FROM n.service_role
              UNION ALL
              SELECT g FROM names n CROSS JOIN LATERAL jsonb_array_elements(adoption.grants) g
              WHERE g ->> 'grantee' = n.service_role OR g ->> 'privilege' <> 'SELECT') AS u (g)
    )
    SELECT format(E'CREATE MATERIALIZED VIEW %s AS\n%s\nWITH NO DATA', n.beside, rtrim(coalesce(
        listener.query_of(to_regclass('listener.definition_' || view.id)), adoption.definition), E'; \n'))
    FROM names n
    UNION ALL
    SELECT s FROM names n CROSS JOIN grants g
    CROSS JOIN LATERAL listener.carried(n.target, n.beside, 'm', '{}', adoption.indexes, g.all) s
$function$;

-- check_unread(view): raises LSN03 where other managed views read its target.
CREATE OR REPLACE FUNCTION listener.check_unread(view listener.managed_view) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    readers text := (SELECT string_agg(v.name, ', ' ORDER BY v.name)
                     FROM listener.view_reads r JOIN listener.managed_view v ON v.id = r.view_id WHERE r.upstream_id = view.id);
BEGIN
    IF readers IS NOT NULL THEN
        RAISE EXCEPTION '% is read by %', view.name, readers USING ERRCODE = 'LSN03',
            HINT = 'A materialized view fires no trigger: drop these first, or turn them back.';
    END IF;
END
$function$;

-- begin_unadoption(view): makes the materialized view anew, beside the target and empty: the definition as it stands,
-- owner, options, indexes with their uniqueness, grants and comments. Called again it starts over.
-- Raises LSN03 where other managed views read the target, or something is tied to it, and for a view that was not adopted.
CREATE OR REPLACE FUNCTION listener.begin_unadoption(view text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    previous_role text := listener.become_owner();
    managed listener.managed_view;
    adoption listener.adoption;
    target regclass;
    published name;
    statement text;
    created boolean := false;
BEGIN
    PERFORM listener.lock_registration();
    managed := listener.find_view(view);
    adoption := listener.find_adoption(view, '{adopted,turning back}');
    target := to_regclass(format('%I.%I', managed.target_schema, managed.target_name));
    SELECT p.pubname INTO published FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid WHERE r.prrelid = target LIMIT 1;
    IF target IS NULL THEN
        RAISE EXCEPTION 'the target of % is gone', managed.name USING ERRCODE = 'LSN03',
            HINT = 'listener.restore_target(view) makes it again.';
    ELSIF EXISTS (SELECT FROM listener.managed_view v WHERE v.replaces = managed.id) THEN
        RAISE EXCEPTION '% is being altered', managed.name USING ERRCODE = 'LSN03',
            HINT = 'Finish that first, or take it back: listener.abort_alter(view).';
    ELSIF published IS NOT NULL THEN
        RAISE EXCEPTION '% is part of the publication %, and a materialized view cannot be', target, published USING ERRCODE = 'LSN03',
            HINT = format('ALTER PUBLICATION %I DROP TABLE %s;', published, target);
    END IF;
    PERFORM listener.check_unread(managed), listener.check_swappable(target);
    PERFORM listener.drop_beside(managed);
    FOREACH statement IN ARRAY ARRAY(SELECT s FROM listener.unadopting(managed, adoption) s) LOOP
        EXECUTE statement;
        IF NOT created THEN
            PERFORM listener.revoke_defaults(format('%I.%I', managed.target_schema, listener.name_beside(managed))::regclass);
            created := true;
        END IF;
    END LOOP;
    UPDATE listener.adoption a SET state = 'turning back', begun_at = clock_timestamp() WHERE a.view_id = managed.id;
    PERFORM set_config('role', previous_role, true);
END
$function$;

-- fill_unadoption(view): fills the materialized view, under the settings that the managed view had.
CREATE OR REPLACE FUNCTION listener.fill_unadoption(view text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    previous_role text := listener.become_owner();
    managed listener.managed_view := listener.find_view(view);
    adoption listener.adoption := listener.find_adoption(view, '{turning back}');
    statement text := format('REFRESH MATERIALIZED VIEW %I.%I', managed.target_schema, listener.name_beside(managed));
    previous jsonb := listener.use_settings(listener.registered_settings(managed));
BEGIN
    PERFORM set_config('search_path', managed.search_path, true);
    EXECUTE statement;
    PERFORM pg_catalog.set_config('role', previous_role, true), listener.use_settings(previous);
END
$function$;

-- finish_unadoption(view): puts the materialized view in the place of the target, and drops that. The managed view is
-- paused from then on, and drop_view(view, keep_target => true) ends it: its triggers are taken off the sources in a
-- transaction of their own, since that may wait.
-- Returns how long readers were locked out. Raises as finish_adoption() does.
CREATE OR REPLACE FUNCTION listener.finish_unadoption(view text) RETURNS interval
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    previous_role text := listener.become_owner();
    managed listener.managed_view;
    adoption listener.adoption;
    target regclass;
    beside regclass;
    locked interval;
BEGIN
    PERFORM listener.lock_registration();
    managed := listener.find_view(view);
    adoption := listener.find_adoption(view, '{turning back}');
    target := format('%I.%I', managed.target_schema, managed.target_name)::regclass;
    beside := to_regclass(format('%I.%I', managed.target_schema, listener.name_beside(managed)));
    IF NOT coalesce((SELECT c.relispopulated FROM pg_class c WHERE c.oid = beside), false) THEN
        RAISE EXCEPTION 'the materialized view beside % is not filled', target USING ERRCODE = 'LSN03',
            HINT = 'SELECT listener.fill_unadoption(view) first.';
    END IF;
    PERFORM listener.check_unread(managed), listener.check_swappable(target);
    PERFORM listener.carry_again(target, beside, managed.id, ARRAY(
        SELECT s FROM listener.unadopting(managed, adoption) WITH ORDINALITY AS u (s, ord) WHERE u.ord > 1 ORDER BY u.ord));
    locked := (listener.swap(target, beside));
    UPDATE listener.adoption a SET state = 'turned back' WHERE a.view_id = managed.id;
    UPDATE listener.managed_view v SET paused_at = coalesce(v.paused_at, clock_timestamp()) WHERE v.id = managed.id;
    PERFORM set_config('role', previous_role, true);
    RETURN locked;
END
$function$;

-- plan_unadoption(view): the same for unadopt; 'beside' is what begin_unadoption() runs.
CREATE OR REPLACE FUNCTION listener.plan_unadoption(view text) RETURNS TABLE (part text, statement text)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    previous_role text := listener.become_owner();
    managed listener.managed_view := listener.find_view(view);
    adoption listener.adoption := listener.find_adoption(view, '{adopted,turning back}');
    target regclass := format('%I.%I', managed.target_schema, managed.target_name)::regclass;
BEGIN
    PERFORM listener.check_unread(managed), listener.check_swappable(target);
    RETURN QUERY
    SELECT 'name', target::text
    UNION ALL
    SELECT 'view', managed.name
    UNION ALL
    SELECT 'lock', l.view::text FROM listener.dependent_views(target) l
    UNION ALL
    SELECT 'lock', target::text
    UNION ALL
    SELECT 'beside', s FROM listener.unadopting(managed, adoption) s
    UNION ALL
    SELECT 'swap', s FROM listener.swapping(target, listener.name_beside(managed)) s;
    PERFORM set_config('role', previous_role, true);
END
$function$;
