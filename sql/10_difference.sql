-- The difference: the statements that compare a tenant's rows with its target rows. Generated from the target's
-- columns when a view is registered, and again after each migration.

-- images(target, definition): how each target column is compared. A type whose equality means the same bytes is compared as it is;
-- any other (numeric: 1.0 = 1.00; float: 0 = -0; json: no equality at all) by its text, and cast back when written.
-- One EXCEPT then serves all types, and it hashes. A column that somebody added
-- to the target is none of ours.
CREATE OR REPLACE FUNCTION listener.images(target regclass, definition regclass)
RETURNS TABLE (attnum smallint, attname name, type text, as_is boolean)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT a.attnum, a.attname, format_type(a.atttypid, a.atttypmod),
           CASE WHEN t.typtype = 'd' THEN t.typbasetype ELSE a.atttypid END = ANY (
               '{bool,int2,int4,int8,oid,uuid,text,varchar,bpchar,name,date,time,timestamp,timestamptz,bytea}'::regtype[])
               AND (a.attcollation = 0 OR l.collisdeterministic)
    FROM pg_attribute a
    JOIN pg_attribute d ON d.attrelid = definition AND d.attname = a.attname AND d.attnum > 0
    JOIN pg_type t ON t.oid = a.atttypid
    LEFT JOIN pg_collation l ON l.oid = a.attcollation
    WHERE a.attrelid = target AND a.attnum > 0 AND NOT a.attisdropped
$function$;

-- exact_text(value), exact_value(image, value): a value as text, and that text as the same value again. Under some
-- settings two values have one text: two times an hour apart when clocks go back, if DateStyle is not ISO; a NULL in an
-- array and 'NULL', if array_nulls is off. A view may be computed under such settings, and its rows still need exact
-- comparing and writing.
CREATE OR REPLACE FUNCTION listener.exact_text(value anyelement) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET DateStyle = 'ISO, YMD' SET array_nulls = on
SET xmloption = 'content' AS $function$
BEGIN
    RETURN value::text;
END
$function$;
CREATE OR REPLACE FUNCTION listener.exact_value(image text, INOUT value anyelement)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET DateStyle = 'ISO, YMD' SET array_nulls = on
SET xmloption = 'content' AS $function$
BEGIN
    value := image;
END
$function$;

-- text_of(view, expression), value_of(view, expression, type): the SQL for these in a statement that runs under the
-- settings of the view. Where casts_exactly(view), it is a plain cast.
CREATE OR REPLACE FUNCTION listener.casts_exactly(view listener.managed_view) RETURNS boolean
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT view.settings ->> 'DateStyle' LIKE 'ISO%' AND view.settings ->> 'array_nulls' = 'on'
       AND view.settings ->> 'xmloption' = 'content'
$function$;
CREATE OR REPLACE FUNCTION listener.text_of(view listener.managed_view, expression text) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT CASE WHEN listener.casts_exactly(view) THEN expression || '::pg_catalog.text'
                ELSE format('listener.exact_text(%s)', expression) END
$function$;
CREATE OR REPLACE FUNCTION listener.value_of(view listener.managed_view, expression text, type text) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT CASE WHEN listener.casts_exactly(view) THEN format('%s::%s', expression, type)
                ELSE format('listener.exact_value(%s, NULL::%s)', expression, type) END
$function$;

-- is_of_tenant(view, prefix): the condition that a row of definition or target is of tenant $1; true where the view has
-- no tenants. Everything is qualified: it runs with the creator's search_path, and whoever may create an operator there
-- must not come into it.
CREATE OR REPLACE FUNCTION listener.is_of_tenant(view listener.managed_view, prefix text) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT CASE WHEN view.tenant_column IS NULL THEN 'true'
                ELSE format('%s%I OPERATOR(pg_catalog.=) $1::%s', prefix, view.tenant_column,
                            CASE WHEN view.tenant_type IN ('text', 'uuid') THEN 'pg_catalog.' ELSE '' END || view.tenant_type) END
$function$;

-- difference_statement(view): one statement, so that no reader sees a state between old and new. $1 is the tenant as
-- text. Returns inserted, updated, deleted, and a key that occurs twice, in which case nothing is written.
-- Deleted rows are found by key. The keys are compared as records, because they may be NULL and IS NOT DISTINCT FROM
-- can neither hash nor merge; the set of keys that are gone is nearly always empty, and then that join costs nothing.
-- Without key columns the whole row is the key, and equal rows may stand in the result more than once: the n-th of them is
-- told from the others by its number. Rows are compared by their text, which tells NULL from ''.
CREATE OR REPLACE FUNCTION listener.difference_statement(view listener.managed_view) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    target regclass := format('%I.%I', view.target_schema, view.target_name)::regclass;
    definition text := format('listener.%I', 'definition_' || view.id);
    mine text := listener.is_of_tenant(view, '');
    keys text := (SELECT string_agg(quote_ident(k.name), ', ' ORDER BY k.ord)
                  FROM unnest(view.key_columns) WITH ORDINALITY AS k (name, ord));
    columns text;
    compared text;
    written text;
    updates text;
BEGIN
    SELECT string_agg(quote_ident(i.attname), ', ' ORDER BY i.attnum),
           string_agg(CASE WHEN i.as_is THEN quote_ident(i.attname)
                           ELSE format('%s COLLATE pg_catalog."C" AS %I', listener.text_of(view, quote_ident(i.attname)), i.attname)
                      END, ', ' ORDER BY i.attnum),
           string_agg(CASE WHEN i.as_is THEN quote_ident(i.attname)
                           ELSE listener.value_of(view, quote_ident(i.attname), i.type) END, ', ' ORDER BY i.attnum),
           string_agg(format('%I = excluded.%I', i.attname, i.attname), ', ' ORDER BY i.attnum)
    INTO columns, compared, written, updates
    FROM listener.images(target, definition::regclass) i;
    RETURN format(CASE WHEN keys IS NULL THEN $sql$
WITH fresh AS MATERIALIZED (
    SELECT f.*, pg_catalog.row_number() OVER (PARTITION BY f."listener.row") AS "listener.n"
    FROM (SELECT %2$s, %12$s COLLATE pg_catalog."C" AS "listener.row" FROM %8$s WHERE %7$s) f
), held AS MATERIALIZED (
    SELECT h.*, pg_catalog.row_number() OVER (PARTITION BY h."listener.row") AS "listener.n"
    FROM (SELECT ctid AS "listener.at", %12$s COLLATE pg_catalog."C" AS "listener.row"
          FROM %6$s WHERE %7$s) h
), deleted AS (
    DELETE FROM %6$s t USING held h
    WHERE t.ctid OPERATOR(pg_catalog.=) h."listener.at" AND NOT EXISTS (
        SELECT FROM fresh f WHERE f."listener.row" OPERATOR(pg_catalog.=) h."listener.row"
                              AND f."listener.n" OPERATOR(pg_catalog.=) h."listener.n")
    RETURNING 1
), written AS (
    INSERT INTO %6$s (%2$s)
    SELECT %2$s FROM fresh f WHERE NOT EXISTS (
        SELECT FROM held h WHERE h."listener.row" OPERATOR(pg_catalog.=) f."listener.row"
                             AND h."listener.n" OPERATOR(pg_catalog.=) f."listener.n")
    RETURNING 1
)
SELECT (SELECT pg_catalog.count(*) FROM written), 0::pg_catalog.int8, (SELECT pg_catalog.count(*) FROM deleted),
       NULL::pg_catalog.text$sql$ ELSE $sql$
WITH fresh AS MATERIALIZED (
    SELECT %2$s FROM %8$s WHERE %7$s
), twice AS MATERIALIZED (
    SELECT pg_catalog.to_json(f.*)::pg_catalog.text AS key
    FROM (SELECT %1$s FROM fresh GROUP BY %1$s HAVING pg_catalog.count(*) OPERATOR(pg_catalog.>) 1 LIMIT 1) f
), changed AS MATERIALIZED (
    SELECT %3$s FROM fresh EXCEPT SELECT %3$s FROM %6$s WHERE %7$s
), gone AS (
    SELECT %1$s FROM %6$s WHERE %7$s EXCEPT SELECT %1$s FROM fresh
), deleted AS (
    DELETE FROM %6$s t USING (SELECT %1$s FROM gone) g
    WHERE %11$s AND ROW(%9$s)::record OPERATOR(pg_catalog.=) ROW(%10$s)::record AND NOT EXISTS (SELECT FROM twice)
    RETURNING 1
), written AS (
    INSERT INTO %6$s AS t (%2$s)
    SELECT %4$s FROM changed WHERE NOT EXISTS (SELECT FROM twice)
    ON CONFLICT (%1$s) DO UPDATE SET %5$s
    RETURNING t.xmax OPERATOR(pg_catalog.=) '0'::pg_catalog.xid AS inserted
)
SELECT (SELECT pg_catalog.count(*) FROM written w WHERE w.inserted),
       (SELECT pg_catalog.count(*) FROM written w WHERE NOT w.inserted),
       (SELECT pg_catalog.count(*) FROM deleted), (SELECT key FROM twice)$sql$ END,
        keys, columns, compared, written, updates, target, mine, definition,
        (SELECT string_agg(format('t.%I', k.name), ', ' ORDER BY k.ord)
         FROM unnest(view.key_columns) WITH ORDINALITY AS k (name, ord)),
        (SELECT string_agg(format('g.%I', k.name), ', ' ORDER BY k.ord)
         FROM unnest(view.key_columns) WITH ORDINALITY AS k (name, ord)),
        listener.is_of_tenant(view, 't.'), listener.text_of(view, format('ROW(%s)', columns)));
END
$function$;

-- generate_difference(view): makes or replaces listener_private.difference_<id>(tenant), which runs that statement, and
-- what else computes the view: see 03_computing.sql. It is static SQL, so that a session parses it once, and may keep
-- its plan: parsing and planning took two thirds of a small refresh. Which plan is taken, refresh() says. It runs as
-- the view's compute role. For a materialized view it runs as the owner of this schema: PostgreSQL lets only the owner
-- of a materialized view, and its members, refresh it, and runs the query with that owner's rights. Nothing is made
-- where target or definition are gone, or the target lacks a column: the statement would leave that column out for
-- good.
CREATE OR REPLACE FUNCTION listener.generate_difference(view listener.managed_view) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    kept boolean := view.strategy = 'materialized view';
BEGIN
    IF to_regclass('listener.definition_' || view.id) IS NULL THEN
        RETURN;
    END IF;
    PERFORM listener.generate_computing(view);
    IF to_regclass(format('%I.%I', view.target_schema, view.target_name)) IS NULL
       OR EXISTS (SELECT FROM listener.missing_columns(view)) THEN
        RETURN;
    END IF;
    PERFORM listener.make_private(
        CASE WHEN kept THEN (SELECT i.owner_role FROM listener.installation i) ELSE listener.compute_role_of(view) END,
        format('difference_%s(text)', view.id),
        format('difference_%s(text, OUT bigint, OUT bigint, OUT bigint, OUT text)', view.id), 'VOLATILE', listener.settings_of(view),
        CASE WHEN kept THEN listener.refresh_statement(view) ELSE format($difference$
#variable_conflict use_column
BEGIN
    -- NULL: only what waits.
    IF $1 IS NOT NULL THEN%s
        INTO $2, $3, $4, $5;
    END IF;
    IF session_user OPERATOR(pg_catalog.=) %L THEN
        SET CONSTRAINTS ALL IMMEDIATE;
    END IF;
END
$difference$, listener.difference_statement(view), (SELECT i.service_role FROM listener.installation i)) END);
END
$function$;

-- compared_rows(view): the rows of tenant $1 that the definition returns, `fresh`, and those that the target has, `held`.
-- Sums of floats depend on the order of addition: columns of float type are rounded to twelve digits, so that verify does
-- not report noise. Raises LSN03 where the target lacks a column.
CREATE OR REPLACE FUNCTION listener.compared_rows(view listener.managed_view) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    target regclass := format('%I.%I', view.target_schema, view.target_name)::regclass;
    definition text := format('listener.%I', 'definition_' || view.id);
    mine text := listener.is_of_tenant(view, '');
    compared text;
    missing text := (SELECT string_agg(quote_ident(m.name), ', ') FROM listener.missing_columns(view) m);
BEGIN
    IF missing IS NOT NULL THEN
        RAISE EXCEPTION 'the target % lacks %', target, missing USING ERRCODE = 'LSN03',
            HINT = '`listener explain` says how to mend it.';
    END IF;
    SELECT string_agg(CASE WHEN i.as_is THEN quote_ident(i.attname)
                           WHEN i.type IN ('double precision', 'real') THEN
                               format('pg_catalog.to_char(%I, ''9.99999999999EEEE'')', i.attname)
                           ELSE listener.text_of(view, quote_ident(i.attname)) || ' COLLATE pg_catalog."C"' END, ', ' ORDER BY i.attnum)
    INTO compared FROM listener.images(target, definition::regclass) i;
    RETURN format($sql$
WITH fresh AS MATERIALIZED (SELECT %1$s FROM %2$s WHERE %4$s),
     held AS MATERIALIZED (SELECT %1$s FROM %3$s WHERE %4$s)$sql$,
        compared, definition, target, mine);
END
$function$;

-- comparison_statement(view): counts the rows that only the definition has, `missing`, those that only the target has,
-- `extra`, and those of the target, `held`, for tenant $1, as jsonb. Raises as compared_rows().
CREATE OR REPLACE FUNCTION listener.comparison_statement(view listener.managed_view) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT format($sql$%s
SELECT pg_catalog.jsonb_build_object(
    'missing', (SELECT pg_catalog.count(*) FROM (SELECT * FROM fresh EXCEPT ALL SELECT * FROM held) m),
    'extra', (SELECT pg_catalog.count(*) FROM (SELECT * FROM held EXCEPT ALL SELECT * FROM fresh) e),
    'held', (SELECT pg_catalog.count(*) FROM held))$sql$, listener.compared_rows(view))
$function$;
