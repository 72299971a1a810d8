-- What adopting a materialized view is made of, each with what it refuses; and what it would do.

-- find_materialized_view(name, search_path): the materialized view of that name. Raises LSN02 where there is none, LSN03 where
-- it is in a schema that may not be used.
CREATE OR REPLACE FUNCTION listener.find_materialized_view(name text, search_path text) RETURNS regclass
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    found regclass;
    managed text;
    hidden_owner name;
    hidden_in name;
    owner_role name := (SELECT i.owner_role FROM listener.installation i);
BEGIN
    IF name IS NULL THEN
        RAISE EXCEPTION 'the name must be given' USING ERRCODE = 'LSN02';
    END IF;
    BEGIN
        PERFORM set_config('search_path', find_materialized_view.search_path, true);
        found := pg_catalog.to_regclass(name);
        PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    EXCEPTION WHEN OTHERS THEN
        found := NULL;  -- it is no name at all
    END;
    SELECT pg_get_userbyid(c.relowner), n.nspname INTO hidden_owner, hidden_in
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind = 'm' AND NOT has_schema_privilege(n.oid, 'USAGE')
      AND name IN (format('%I.%I', n.nspname, c.relname), format('%s.%s', n.nspname, c.relname));
    IF found IS NULL AND hidden_owner IS NOT NULL THEN
        RAISE EXCEPTION '% belongs to %, and role % may not use the schema %', name, hidden_owner, owner_role, hidden_in
            USING ERRCODE = 'LSN03', HINT = format('GRANT %I TO %I;', hidden_owner, owner_role);
    ELSIF found IS NULL THEN
        RAISE EXCEPTION 'there is no materialized view %', name USING ERRCODE = 'LSN02',
            HINT = coalesce('There are: ' || (
                SELECT string_agg(format('%I.%I', m.schemaname, m.matviewname), ', ' ORDER BY m.schemaname, m.matviewname) FROM pg_matviews m) || '.',
                'There is none in this database.');
    END IF;
    SELECT v.name INTO managed FROM listener.managed_view v WHERE to_regclass(format('%I.%I', v.target_schema, v.target_name)) = found;
    IF managed IS NOT NULL THEN
        RAISE EXCEPTION '% is managed already, as %', found, managed USING ERRCODE = 'LSN02';
    ELSIF (SELECT c.relkind FROM pg_class c WHERE c.oid = found) <> 'm' THEN
        RAISE EXCEPTION '% is no materialized view', found USING ERRCODE = 'LSN02',
            HINT = 'A new name for a query of your own: listener.create_view(…).';
    END IF;
    RETURN found;
END
$function$;

-- proposed_key(relation, tenant_column): the columns of its unique index, one with the tenant column before others, few
-- before many; '{}', the whole row, where there is none on plain columns.
CREATE OR REPLACE FUNCTION listener.proposed_key(relation regclass, tenant_column name) RETURNS name[]
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT coalesce((SELECT i.columns FROM listener.indexes_of(relation) i WHERE i.is_key
                     ORDER BY (tenant_column = ANY (i.columns)) DESC NULLS LAST, cardinality(i.columns), i.id LIMIT 1), '{}')
$function$;

-- default_time_zone(): what a session has that says nothing of its own: that of the database, else the server's.
CREATE OR REPLACE FUNCTION listener.default_time_zone() RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT listener.default_setting('TimeZone')
$function$;

-- adopted_key(relation, key_columns, tenant_column): the key that a target of this materialized view has: the tenant
-- column before the others where it is not among them.
CREATE OR REPLACE FUNCTION listener.adopted_key(relation regclass, key_columns name[], tenant_column name) RETURNS name[]
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT CASE WHEN tenant_column = ANY (k.keys) OR tenant_column IS NULL OR k.keys = '{}' THEN k.keys
                ELSE tenant_column || k.keys END
    FROM (SELECT coalesce(key_columns, listener.proposed_key(relation, tenant_column))) AS k (keys)
$function$;

-- adopted_max_age(relation, max_age): the max_age that is given; else, where the result depends on the time, the one
-- that time_dependence() proposes.
CREATE OR REPLACE FUNCTION listener.adopted_max_age(relation regclass, max_age interval) RETURNS interval
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT coalesce(max_age, (SELECT min(t.max_age) FROM listener.time_dependence(relation) t WHERE t.dependence = 'time'))
$function$;

-- begin_rehearsal(): from here on this transaction only tries what adopting would do, and the caller rolls it back. It
-- puts no trigger on a source, and takes no lock that a writer would notice.
CREATE OR REPLACE FUNCTION listener.begin_rehearsal() RETURNS void
LANGUAGE sql VOLATILE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT set_config('listener.rehearsal', pg_current_xact_id()::text, true)
$function$;

-- check_new_owner(relation, owner): raises LSN03 where this role cannot own what takes the place of a relation.
CREATE OR REPLACE FUNCTION listener.check_new_owner(relation regclass, owner name) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    schema name := (SELECT n.nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = relation);
    given oid := to_regrole(quote_ident(owner));
BEGIN
    IF owner IS NULL THEN
        RETURN;
    ELSIF given IS NULL THEN
        RAISE EXCEPTION 'there is no role %', quote_ident(owner) USING ERRCODE = 'LSN02';
    ELSIF NOT pg_has_role(given, 'USAGE')
          OR NOT pg_has_role(given, CASE WHEN current_setting('server_version_num')::integer < 160000 THEN 'MEMBER' ELSE 'SET' END) THEN
        IF (SELECT r.rolsuper FROM pg_roles r WHERE r.oid = given) THEN
            RAISE EXCEPTION '% cannot belong to %: that role is a superuser', relation, owner
                USING ERRCODE = 'LSN03', HINT = format('Name another role, for example %I.', current_user);
        END IF;
        RAISE EXCEPTION '% cannot belong to %: role % is no member of it', relation, owner, current_user
            USING ERRCODE = 'LSN03', HINT = format('GRANT %I TO %I;', owner, current_user);
    ELSIF NOT has_schema_privilege(given, schema, 'CREATE') THEN
        RAISE EXCEPTION '% cannot belong to %: that role may not create in the schema %', relation, owner, schema
            USING ERRCODE = 'LSN03', HINT = format('GRANT CREATE ON SCHEMA %I TO %I; you can revoke it afterwards.', schema, owner);
    END IF;
END
$function$;

-- clock_columns(relation): the columns of a view or a materialized view whose value counts the clock: now() is in the
-- expression itself, not in a condition or in an aggregate, and not cut to a day. In subqueries and nested views a
-- column is known by its name. Found in the stored query; used for advice alone.
CREATE OR REPLACE FUNCTION listener.clock_columns(relation regclass) RETURNS SETOF name
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    clocks oid[] := ARRAY(SELECT p.oid FROM pg_proc p WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.pronargs = 0
                          AND p.proname IN ('now', 'transaction_timestamp', 'statement_timestamp', 'clock_timestamp'));
    cuts oid[] := ARRAY(SELECT p.oid FROM pg_proc p WHERE p.pronamespace = 'pg_catalog'::regnamespace
                        AND p.proname IN ('date_trunc', 'date'));
    tree text;
    token text[];
    -- The nodes around the token; and for each, whether it cuts to a day, or is a column that counts the clock.
    kinds text[];
    marks boolean[];
    depth integer;
    found name[] := '{}'::name[];
BEGIN
    FOR tree IN
        SELECT r.ev_action::text FROM (SELECT relation::oid AS relid UNION SELECT v.relid FROM listener.tenant_views(relation) v) n
        JOIN pg_rewrite r ON r.ev_class = n.relid
    LOOP
        kinds := '{}';
        marks := '{}';
        depth := 0;
        FOR token IN
            SELECT m FROM regexp_matches(
                tree, E'\\\\.|\\{([A-Z_]+)|(\\})|:(funcid|op|resname) ((?:\\\\.|[^\\s{}()\\\\])+)', 'g') AS m
        LOOP
            IF token[1] IS NOT NULL THEN
                depth := depth + 1;
                kinds[depth] := token[1];
                marks[depth] := false;
            ELSIF token[2] IS NOT NULL THEN
                depth := depth - 1;
            ELSIF token[3] = 'resname' AND kinds[depth] = 'TARGETENTRY' AND marks[depth] THEN
                found := found || regexp_replace(token[4], E'\\\\(.)', E'\\1', 'g')::name;
            ELSIF token[3] = 'funcid' AND token[4]::oid = ANY (cuts) THEN
                marks[depth] := true;
            ELSIF (token[3] = 'funcid' AND token[4]::oid = ANY (clocks))
                  OR (token[3] = 'op' AND kinds[depth] = 'SQLVALUEFUNCTION' AND token[4] <> '0') THEN
                FOR above IN REVERSE depth..2 LOOP
                    IF kinds[above] = 'TARGETENTRY' THEN
                        marks[above] := kinds[above - 1] = 'QUERY';
                        EXIT;
                    END IF;
                    EXIT WHEN marks[above] OR kinds[above] IN ('AGGREF', 'WINDOWFUNC', 'QUERY');
                END LOOP;
            END IF;
        END LOOP;
    END LOOP;
    RETURN QUERY SELECT a.attname FROM pg_attribute a
                 WHERE a.attrelid = relation AND a.attnum > 0 AND NOT a.attisdropped AND a.attname = ANY (found) ORDER BY a.attnum;
END
$function$;

-- clock_advice(relation): what to do about clock_columns(); no row where there are none.
CREATE OR REPLACE FUNCTION listener.clock_advice(relation regclass) RETURNS SETOF text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT format('%s the clock: each refresh writes every row again, and between two refreshes the value is old. Return the time '
                  'itself, and count from it in a view on top',
                  CASE count(*) WHEN 1 THEN 'the column ' || min(quote_ident(c.name)) || ' counts'
                                ELSE 'the columns ' || string_agg(quote_ident(c.name), ', ') || ' count' END)
    FROM listener.clock_columns(relation) AS c (name) HAVING count(*) > 0
$function$;

-- check_sources(relation): raises LSN03 where a materialized view reads another, whose changes fire no trigger.
CREATE OR REPLACE FUNCTION listener.check_sources(relation regclass) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    stored regclass := (SELECT i.relid FROM listener.tenant_inputs(relation, NULL) i WHERE i.relkind = 'm' LIMIT 1);
BEGIN
    IF stored IS NOT NULL THEN
        RAISE EXCEPTION '% reads the materialized view %, whose changes fire no trigger', relation, stored
            USING ERRCODE = 'LSN03', HINT = 'Adopt that one first, or have this one read what that one does.';
    END IF;
END
$function$;

-- only_select(grants): what a reader of a materialized view was granted. The other privileges did nothing there, and would
-- let their holders write a table.
CREATE OR REPLACE FUNCTION listener.only_select(grants jsonb) RETURNS jsonb
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT coalesce(jsonb_agg(g ORDER BY ord), '[]') FROM jsonb_array_elements(grants) WITH ORDINALITY AS e (g, ord)
    WHERE g ->> 'privilege' = 'SELECT'
$function$;

-- adopting(old, new, keys, owner): the statements that give the target what the materialized view has: see carried().
CREATE OR REPLACE FUNCTION listener.adopting(old regclass, new text, keys name[], owner name) RETURNS SETOF text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT s FROM listener.carried(old, new, 'r', keys, '{}', listener.only_select(listener.grants_of(old)), owner) s
$function$;

-- losses(relation, keys): one line for each thing that a target of a materialized view does not have of it.
CREATE OR REPLACE FUNCTION listener.losses(relation regclass, keys name[]) RETURNS SETOF text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT format('the unique index %I is not unique any more: a target has one unique index, that of its key (%s)',
                  i.name, array_to_string(keys, ', '))
    FROM listener.indexes_of(relation) i WHERE i.is_unique AND NOT (i.is_key AND i.columns IS NOT DISTINCT FROM keys)
    UNION ALL
    SELECT format('%s keeps SELECT alone, and not %s', coalesce(g ->> 'grantee', 'PUBLIC'),
                  string_agg(g ->> 'privilege', ', ' ORDER BY g ->> 'privilege'))
    FROM jsonb_array_elements(listener.grants_of(relation)) g WHERE g ->> 'privilege' <> 'SELECT' GROUP BY g ->> 'grantee'
$function$;

-- check_same_columns(old, new): raises LSN03 where they differ in the names, types or collations of their columns.
CREATE OR REPLACE FUNCTION listener.check_same_columns(old regclass, new regclass) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    shapes text[] := ARRAY(
        SELECT string_agg(concat_ws(' ', quote_ident(a.attname), format_type(a.atttypid, a.atttypmod),
                                    nullif(a.attcollation, 0)::regcollation), ', ' ORDER BY a.attnum)
        FROM unnest(ARRAY[old, new]) WITH ORDINALITY AS r (oid, ord)
        JOIN pg_attribute a ON a.attrelid = r.oid AND a.attnum > 0 AND NOT a.attisdropped
        GROUP BY r.ord ORDER BY r.ord);
BEGIN
    IF shapes[1] IS DISTINCT FROM shapes[2] THEN
        RAISE EXCEPTION 'the query of % returns other columns than it has: (%) instead of (%)', old, shapes[2], shapes[1]
            USING ERRCODE = 'LSN03';
    END IF;
END
$function$;

-- revoke_defaults(relation): takes back what default privileges granted on a new relation. The service keeps its grants, and so
-- does the compute role of the view whose target this is.
CREATE OR REPLACE FUNCTION listener.revoke_defaults(relation regclass) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    grantee text;
BEGIN
    FOR grantee IN
        SELECT DISTINCT coalesce(quote_ident(g ->> 'grantee'), 'PUBLIC')
        FROM jsonb_array_elements(listener.grants_of(relation)) g
        WHERE g ->> 'grantee' IS DISTINCT FROM (SELECT i.service_role FROM listener.installation i)
          AND NOT EXISTS (SELECT FROM listener.managed_view v
                          WHERE v.compute_role = g ->> 'grantee'
                            AND to_regclass(format('%I.%I', v.target_schema, v.target_name)) = relation)
    LOOP
        EXECUTE format('REVOKE ALL ON %s FROM %s CASCADE', relation, grantee);
    END LOOP;
END
$function$;

-- plan_adoption(name, key_columns, tenant_column, owner): what adopt would do, for somebody to read; it changes
-- nothing.
--   part   'name', 'view': of the relation, of the managed view; 'source': a table that gets capture triggers;
--          'beside': a statement that begin_adoption() runs after it made the target; 'swap': one of finish_adoption();
--          'lock': a relation that the swap locks; 'key': the key columns; 'loss': what the target will not have, or
--          what to do about a column; 'time zone', 'max_age': the value that is taken where none is given
-- Raises what begin_adoption() raises for the materialized view itself.
CREATE OR REPLACE FUNCTION listener.plan_adoption(
    name text, key_columns name[] DEFAULT NULL, tenant_column name DEFAULT 'tenant_id', owner name DEFAULT NULL,
    search_path text DEFAULT pg_catalog.current_setting('search_path')) RETURNS TABLE (part text, statement text)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
#variable_conflict use_variable
DECLARE
    previous_role text := listener.become_owner();
    old regclass := listener.find_materialized_view(name, search_path);
    keys name[] := listener.adopted_key(old, key_columns, tenant_column);
    new name := 'listener_new_' || old::oid;
BEGIN
    PERFORM listener.check_swappable(old), listener.check_sources(old), listener.check_new_owner(old, owner);
    RETURN QUERY
    SELECT 'name', old::text
    UNION ALL
    SELECT 'view', listener.free_name(c.nspname, c.relname)
    FROM (SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = old) c
    UNION ALL
    SELECT 'key', k FROM unnest(keys) k
    UNION ALL
    SELECT 'source', o.name
    FROM (SELECT DISTINCT t.relation::text FROM listener.tenant_inputs(old, NULL) i CROSS JOIN LATERAL listener.capture_tables(i.relid) t
          ORDER BY 1) AS o (name)
    UNION ALL
    SELECT 'lock', l.view::text FROM listener.dependent_views(old) l
    UNION ALL
    SELECT 'lock', old::text
    UNION ALL
    SELECT 'beside', s
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    CROSS JOIN LATERAL listener.adopting(old, format('%I.%I', n.nspname, new), keys, owner) s
    WHERE c.oid = old
    UNION ALL
    SELECT 'swap', s FROM listener.swapping(old, new) s
    UNION ALL
    SELECT 'loss', l FROM listener.losses(old, keys) l
    UNION ALL
    SELECT 'loss', a FROM listener.clock_advice(old) a
    UNION ALL
    SELECT 'time zone', listener.default_time_zone()
    UNION ALL
    SELECT 'max_age', a::text FROM listener.adopted_max_age(old, NULL) a WHERE a IS NOT NULL;
    PERFORM set_config('role', previous_role, true);
END
$function$;
