-- What somebody dropped from under a view, made again.

-- restore_definition(view): makes the definition of a view again, which went when something that it reads was dropped
-- with CASCADE. Its text was looked at when the view was registered. Raises LSN03 where the tenant column has another
-- type now, and what PostgreSQL raises where something that the definition reads is not there.
CREATE OR REPLACE FUNCTION listener.restore_definition(view listener.managed_view) RETURNS regclass
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    definition regclass;
    tenant_type text;
BEGIN
    EXECUTE format('DROP VIEW IF EXISTS listener.%I, listener.%I', 'tenants_' || view.id, 'definition_' || view.id);
    PERFORM listener.make_definition(view);
    IF view.tenants_query IS NOT NULL THEN
        PERFORM listener.make_tenants(view);
    END IF;
    definition := to_regclass('listener.definition_' || view.id);
    tenant_type := listener.check_columns(definition, view.tenant_column, view.key_columns);
    IF tenant_type IS DISTINCT FROM view.tenant_type THEN
        RAISE EXCEPTION 'its tenant column is of type % now, and was %', tenant_type, view.tenant_type
            USING ERRCODE = 'LSN03';
    END IF;
    RETURN definition;
END
$function$;

-- restore_tenants(view, source_ids): what belongs to a definition that was made again: who its tenants are, what the
-- service may read, and the difference.
CREATE OR REPLACE FUNCTION listener.restore_tenants(view listener.managed_view, source_ids integer[]) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    IF view.tenants_query IS NULL THEN
        PERFORM listener.create_default_tenants(view, source_ids);
    END IF;
    PERFORM listener.grant_definition(view);
    PERFORM listener.generate_difference(view);
END
$function$;

-- restore_target(view): makes the target of a view again after somebody dropped it, and fills it. Whoever reads it has
-- to be granted that again. Raises LSN03 where it is there, or its definition is not.
CREATE OR REPLACE FUNCTION listener.restore_target(view text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    previous_role text := listener.become_owner();
    managed listener.managed_view := listener.find_view(view);
    definition regclass := to_regclass('listener.definition_' || managed.id);
    target text := format('%I.%I', managed.target_schema, managed.target_name);
BEGIN
    PERFORM listener.lock_registration();
    IF to_regclass(target) IS NOT NULL THEN
        RAISE EXCEPTION '% is there', target USING ERRCODE = 'LSN03';
    ELSIF managed.strategy = 'materialized view' THEN
        RAISE EXCEPTION '% was a materialized view of your own', target USING ERRCODE = 'LSN03',
            HINT = format('Create it again, or SELECT listener.drop_view(%L).', managed.name);
    ELSIF definition IS NULL THEN
        RAISE EXCEPTION 'the definition of % is gone', managed.name USING ERRCODE = 'LSN03',
            HINT = 'The sweep makes it again once what it reads is back.';
    END IF;
    PERFORM listener.create_target(managed, definition);
    PERFORM listener.generate_difference(managed);
    PERFORM listener.mark_all_dirty(managed.id);
    PERFORM set_config('role', previous_role, true);
END
$function$;

-- missing_columns(view): the columns of the definition that the target lacks, since somebody dropped or renamed them.
CREATE OR REPLACE FUNCTION listener.missing_columns(view listener.managed_view) RETURNS TABLE (name name, type text)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT d.attname, format_type(d.atttypid, d.atttypmod)
    FROM pg_attribute d
    WHERE d.attrelid = to_regclass('listener.definition_' || view.id) AND d.attnum > 0
      AND to_regclass(format('%I.%I', view.target_schema, view.target_name)) IS NOT NULL
      AND NOT EXISTS (SELECT FROM pg_attribute a
                      WHERE a.attrelid = to_regclass(format('%I.%I', view.target_schema, view.target_name))
                        AND a.attname = d.attname AND a.attnum > 0 AND NOT a.attisdropped)
    ORDER BY d.attnum
$function$;

-- view_fingerprint(view): changes with what the definition and its tenants query depend on, see fingerprint(); with the
-- columns of the tables that depends_on names, since rewriting a table fires no trigger; and with the columns of the
-- target that the definition fills, since a column that was dropped and added again is empty for every tenant. It
-- begins with the number of the formula. NULL while the definition or the target is gone, or the columns of both
-- differ: nothing can be filled then.
CREATE OR REPLACE FUNCTION listener.view_fingerprint(view listener.managed_view) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT '2 ' || md5(concat_ws(E'\n', listener.fingerprint(t.definition),
                         CASE WHEN view.tenants_query IS NOT NULL THEN listener.fingerprint(t.tenants) END,
                         (SELECT string_agg(concat_ws(' ', c.attrelid, c.attnum, c.xmin), ',' ORDER BY c.attrelid, c.attnum)
                          FROM pg_attribute c
                          WHERE c.attrelid IN (SELECT to_regclass(n.name) FROM unnest(view.depends_on) n (name)) AND c.attnum > 0),
                         t.target::oid, string_agg(concat_ws(' ', a.attnum, d.attname), E'\n' ORDER BY d.attnum)))
    FROM (SELECT to_regclass('listener.definition_' || view.id) AS definition, to_regclass('listener.tenants_' || view.id) AS tenants,
                 to_regclass(format('%I.%I', view.target_schema, view.target_name)) AS target) t
    JOIN pg_attribute d ON d.attrelid = t.definition AND d.attnum > 0
    LEFT JOIN pg_attribute a ON a.attrelid = t.target AND a.attname = d.attname AND a.attnum > 0
                            AND (a.atttypid, a.atttypmod) = (d.atttypid, d.atttypmod)
    GROUP BY t.definition, t.tenants, t.target
    HAVING bool_and(a.attnum IS NOT NULL)
$function$;
