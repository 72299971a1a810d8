-- What a relation hands on to another that is to take its place: written out as statements, so that they can be shown
-- before they are run. See 21_swap.sql.

-- grants_of(relation): who was granted what by whom, on the relation and on its columns, as JSON; not what its owner has
-- by owning it.
CREATE OR REPLACE FUNCTION listener.grants_of(relation regclass) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT coalesce(jsonb_agg(jsonb_build_object(
        'column', g.attname, 'privilege', x.privilege_type, 'grantable', x.is_grantable,
        'grantor', pg_get_userbyid(x.grantor), 'grantee', CASE WHEN x.grantee <> 0 THEN pg_get_userbyid(x.grantee) END)
        -- What a grantor may give on he was given by the owner.
        ORDER BY x.grantor <> g.relowner, g.attnum, x.grantee, x.privilege_type), '[]')
    FROM (SELECT c.relowner, NULL::name AS attname, 0 AS attnum, c.relacl AS acl FROM pg_class c WHERE c.oid = relation
          UNION ALL
          SELECT c.relowner, a.attname, a.attnum, a.attacl FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
          WHERE c.oid = relation AND a.attnum > 0 AND NOT a.attisdropped) AS g
    CROSS JOIN LATERAL aclexplode(g.acl) x
    WHERE x.grantee <> g.relowner
$function$;

-- granted(grants, new, owner): the statements that grant the same on another relation, which belongs to `owner`: by the
-- same grantors where the session may act as them, else by the owner. Who is no role any more is left out.
CREATE OR REPLACE FUNCTION listener.granted(grants jsonb, new text, owner name) RETURNS SETOF text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT s.statement
    FROM jsonb_array_elements(grants) WITH ORDINALITY AS g (item, ord)
    CROSS JOIN LATERAL (
        SELECT format('GRANT %s%s ON %s TO %s%s', item ->> 'privilege', ' (' || quote_ident(item ->> 'column') || ')', new,
                      coalesce(quote_ident(item ->> 'grantee'), 'PUBLIC'),
                      CASE WHEN (item ->> 'grantable')::boolean THEN ' WITH GRANT OPTION' END) AS grant,
               item ->> 'grantor' <> owner AND to_regrole(quote_ident(item ->> 'grantor')) IS NOT NULL
                   AND pg_has_role(session_user, to_regrole(quote_ident(item ->> 'grantor')),
                                   CASE WHEN current_setting('server_version_num')::integer < 160000 THEN 'MEMBER' ELSE 'SET' END)
                   AS as_grantor
    ) AS f
    CROSS JOIN LATERAL (
        VALUES (1, CASE WHEN f.as_grantor THEN format('SET LOCAL ROLE %I', item ->> 'grantor') END), (2, f.grant),
               (3, CASE WHEN f.as_grantor THEN format('SET LOCAL ROLE %I', current_user) END)) AS s (step, statement)
    WHERE s.statement IS NOT NULL
      AND (item ->> 'grantee' IS NULL OR to_regrole(quote_ident(item ->> 'grantee')) IS NOT NULL)
    ORDER BY g.ord, s.step
$function$;

-- handed_on(grants, old_owner, new_owner, still_reads): the grants on a relation of `old_owner`, for another one that
-- takes its place and belongs to `new_owner`: the new owner is the grantor where the old one was. still_reads: the old
-- owner keeps SELECT.
CREATE OR REPLACE FUNCTION listener.handed_on(grants jsonb, old_owner name, new_owner name, still_reads boolean)
    RETURNS jsonb
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT CASE WHEN old_owner = new_owner THEN grants ELSE (
        SELECT coalesce(jsonb_agg(CASE WHEN g ->> 'grantor' = old_owner THEN g || jsonb_build_object('grantor', new_owner) ELSE g END
                                  ORDER BY ord), '[]')
        FROM jsonb_array_elements(CASE WHEN still_reads THEN jsonb_build_array(jsonb_build_object(
            'column', NULL, 'privilege', 'SELECT', 'grantable', false, 'grantor', new_owner, 'grantee', old_owner))
                ELSE '[]' END || grants)
            WITH ORDINALITY AS e (g, ord)
        WHERE g ->> 'grantee' IS DISTINCT FROM new_owner) END
$function$;

-- indexes_of(relation): its valid indexes. is_key: it is unique, and on plain columns alone. rest: what follows USING.
CREATE OR REPLACE FUNCTION listener.indexes_of(relation regclass)
RETURNS TABLE (id oid, name name, is_unique boolean, is_key boolean, columns name[], rest text)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT c.oid, c.relname, x.indisunique,
           x.indisunique AND x.indpred IS NULL AND x.indexprs IS NULL AND x.indnatts = x.indnkeyatts, k.columns,
           substr(f.text, length(format('CREATE %sINDEX %I ON %s USING ', CASE WHEN x.indisunique THEN 'UNIQUE ' END,
                                        c.relname, relation)) + 1)
    FROM pg_index x JOIN pg_class c ON c.oid = x.indexrelid
    CROSS JOIN LATERAL pg_get_indexdef(c.oid) AS f (text)
    CROSS JOIN LATERAL (
        SELECT array_agg(a.attname ORDER BY n.ord)::name[] FROM unnest(x.indkey::smallint[]) WITH ORDINALITY AS n (attnum, ord)
        JOIN pg_attribute a ON a.attrelid = relation AND a.attnum = n.attnum) AS k (columns)
    WHERE x.indrelid = relation AND x.indisvalid
    ORDER BY c.oid
$function$;

-- noted_indexes(relation): the same, as adoption notes them.
CREATE OR REPLACE FUNCTION listener.noted_indexes(relation regclass) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT coalesce(jsonb_object_agg(i.name, jsonb_build_object('unique', i.is_unique, 'rest', i.rest)), '{}')
    FROM listener.indexes_of(relation) i
$function$;

-- carried(old, new, kind, keys, written, grants): the statements that give `new`, a relation beside `old` that is still
-- empty, what `old` has: owner, storage options, indexes, statistics, comments, and these grants.
--   kind      'r' a table, 'm' a materialized view
--   keys      the columns of the unique index that `new` has already: the first of `old` on the same ones is that, and
--             must bear the name below. A table of ours has no other unique index (one statement deletes, updates and
--             inserts, in no order): the others are made without being unique
--   written   indexes that are to be made otherwise than `old` has them: name -> {"unique", "rest"}
--   owner     owner of `new`; left out: the owner of `old`. It is the grantor where that one was: handed_on()
-- Indexes and statistics get the name listener_new_<oid of the old one>, which swap() replaces by the old one's.
CREATE OR REPLACE FUNCTION listener.carried(
    old regclass, new text, kind "char", keys name[], written jsonb, grants jsonb, owner name DEFAULT NULL) RETURNS SETOF text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    WITH class AS (
        SELECT c.*, n.nspname, CASE kind WHEN 'm' THEN 'MATERIALIZED VIEW' ELSE 'TABLE' END AS word,
               coalesce(carried.owner, pg_get_userbyid(c.relowner)) AS new_owner, pg_get_userbyid(c.relowner) AS old_owner
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = old
    ), indexes AS (
        SELECT i.id, i.name, coalesce((written -> i.name ->> 'unique')::boolean, i.is_unique) AS is_unique,
               coalesce(written -> i.name ->> 'rest', i.rest) AS rest,
               coalesce(kind = 'r' AND i.id = (SELECT min(k.id) FROM listener.indexes_of(old) k
                                               WHERE k.is_key AND k.columns = keys), false) AS is_there
        FROM listener.indexes_of(old) i WHERE i.name NOT LIKE 'listener\_key\_%'
    ), statements (ord, part, statement) AS (
        SELECT 1, 0::bigint, format('ALTER TABLE %s OWNER TO %I', new, c.new_owner) FROM class c
        UNION ALL
        SELECT 2, 0, format('ALTER TABLE %s SET TABLESPACE %I', new, s.spcname)
        FROM class c JOIN pg_tablespace s ON s.oid = c.reltablespace
        UNION ALL
        SELECT 2, 1, format('ALTER TABLE %s SET ACCESS METHOD %I', new, m.amname)
        FROM class c JOIN pg_am m ON m.oid = c.relam WHERE m.amname <> current_setting('default_table_access_method')
        UNION ALL
        SELECT 3, 0, format('ALTER TABLE %s SET (%s%s = %L)', new, p.prefix, o.option_name, o.option_value)
        FROM class c LEFT JOIN pg_class t ON t.oid = c.reltoastrelid
        CROSS JOIN LATERAL (VALUES ('', c.reloptions), ('toast.', t.reloptions)) AS p (prefix, options)
        CROSS JOIN LATERAL pg_options_to_table(p.options) o
        UNION ALL
        SELECT 4, a.attnum, format('ALTER TABLE %s ALTER COLUMN %I %s', new, a.attname, w.what)
        FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
        CROSS JOIN LATERAL (
            SELECT format('SET STATISTICS %s', a.attstattarget) WHERE a.attstattarget >= 0
            UNION ALL
            -- pg_*: what newer servers note there for themselves.
            SELECT format('SET (%s = %s)', o.option_name, o.option_value) FROM pg_options_to_table(a.attoptions) o
            WHERE o.option_name NOT LIKE 'pg\_%'
            UNION ALL
            SELECT 'SET STORAGE ' || CASE a.attstorage WHEN 'p' THEN 'PLAIN' WHEN 'e' THEN 'EXTERNAL'
                                                       WHEN 'x' THEN 'EXTENDED' ELSE 'MAIN' END
            WHERE a.attstorage <> t.typstorage
            UNION ALL
            SELECT 'SET COMPRESSION ' || CASE a.attcompression WHEN 'l' THEN 'lz4' ELSE 'pglz' END
            WHERE a.attcompression <> '') AS w (what)
        WHERE a.attrelid = old AND a.attnum > 0 AND NOT a.attisdropped
        UNION ALL
        SELECT 5, i.id::bigint, format('CREATE %sINDEX %I ON %s USING %s',
                                       CASE WHEN i.is_unique AND kind = 'm' THEN 'UNIQUE ' END, 'listener_new_' || i.id, new, i.rest)
        FROM indexes i WHERE NOT i.is_there
        UNION ALL
        SELECT 6, x.id::bigint, s.statement
        FROM class c CROSS JOIN indexes x JOIN pg_class i ON i.oid = x.id JOIN pg_index p ON p.indexrelid = x.id
        CROSS JOIN LATERAL (
            SELECT format('ALTER INDEX %I.%I SET TABLESPACE %I', c.nspname, 'listener_new_' || x.id, t.spcname)
            FROM pg_tablespace t WHERE t.oid = i.reltablespace
            UNION ALL
            SELECT format('ALTER INDEX %I.%I ALTER COLUMN %s SET STATISTICS %s', c.nspname, 'listener_new_' || x.id, a.attnum,
                          a.attstattarget)
            FROM pg_attribute a WHERE a.attrelid = x.id AND a.attstattarget >= 0
            UNION ALL
            SELECT format('ALTER TABLE %s CLUSTER ON %I', new, 'listener_new_' || x.id) WHERE p.indisclustered) AS s (statement)
        UNION ALL
        SELECT 7, e.oid::bigint, replace(replace(pg_get_statisticsobjdef(e.oid),
                   format('CREATE STATISTICS %I.%I ', n.nspname, e.stxname),
                   format('CREATE STATISTICS %I.%I ', n.nspname, 'listener_new_' || e.oid)), ' FROM ' || old, ' FROM ' || new)
        FROM pg_statistic_ext e JOIN pg_namespace n ON n.oid = e.stxnamespace WHERE e.stxrelid = old
        UNION ALL
        SELECT 8, e.oid::bigint, format('ALTER STATISTICS %I.%I %s', n.nspname, 'listener_new_' || e.oid, w.what)
        FROM pg_statistic_ext e JOIN pg_namespace n ON n.oid = e.stxnamespace
        CROSS JOIN LATERAL (
            SELECT format('OWNER TO %I', pg_get_userbyid(e.stxowner)) WHERE pg_has_role(e.stxowner, 'USAGE')
            UNION ALL
            SELECT format('SET STATISTICS %s', e.stxstattarget) WHERE e.stxstattarget >= 0) AS w (what)
        WHERE e.stxrelid = old
        UNION ALL
        SELECT 9, d.objsubid, CASE d.objsubid
            WHEN 0 THEN format('COMMENT ON %s %s IS %L', c.word, new, d.description)
            ELSE format('COMMENT ON COLUMN %s.%I IS %L', new, a.attname, d.description) END
        FROM class c JOIN pg_description d ON d.classoid = 'pg_class'::regclass AND d.objoid = c.oid
        LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = d.objsubid AND d.objsubid > 0
        WHERE NOT (d.objsubid = 0 AND d.description LIKE 'Kept fresh by listener from listener.definition\_%')
        UNION ALL
        SELECT 10, i.id::bigint, format('COMMENT ON INDEX %I.%I IS %L', c.nspname, 'listener_new_' || i.id, d.description)
        FROM class c CROSS JOIN indexes i JOIN pg_description d ON d.classoid = 'pg_class'::regclass AND d.objoid = i.id
        UNION ALL
        SELECT 11, g.ord, g.statement FROM class c
        CROSS JOIN LATERAL listener.granted(listener.handed_on(grants, c.old_owner, c.new_owner, kind = 'r'), new,
            c.new_owner) WITH ORDINALITY AS g (statement, ord)
    )
    SELECT s.statement FROM statements s ORDER BY s.ord, s.part, s.statement
$function$;

-- name_key_index(old, new, view_id): gives the index that a new target has already the name that swap() replaces by that of
-- the first of `old` on the same columns; or, where there is none, listener_key_<view id>, which is never handed on.
CREATE OR REPLACE FUNCTION listener.name_key_index(old regclass, new regclass, view_id integer) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    own record;
    schema name := (SELECT n.nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = new);
BEGIN
    SELECT i.* INTO own FROM listener.indexes_of(new) i ORDER BY i.id LIMIT 1;
    IF FOUND THEN
        EXECUTE format('ALTER INDEX %I.%I RENAME TO %I', schema, own.name, coalesce(
            (SELECT 'listener_new_' || i.id FROM listener.indexes_of(old) i
             WHERE own.is_key AND i.is_key AND i.columns = own.columns ORDER BY i.id LIMIT 1), 'listener_key_' || view_id));
    END IF;
END
$function$;

-- carry_again(old, new, view_id, statements): gives `new` what `old` got since `statements`, those of carried(), were run
-- for the first time, and takes from it what `old` lost: a grant, an index. Filling takes long, and the old one is in use.
-- Waits at most 200 ms for a refresh of `new`, which nobody reads yet: raises lock_not_available.
CREATE OR REPLACE FUNCTION listener.carry_again(old regclass, new regclass, view_id integer, statements text[]) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    previous_timeout text := current_setting('lock_timeout');
    schema name := (SELECT n.nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = new);
    gone record;
    statement text;
BEGIN
    PERFORM set_config('lock_timeout', '200ms', true);
    FOR gone IN
        SELECT i.name, i.is_unique AND c.relkind = 'r' AS is_needed
        FROM listener.indexes_of(new) i JOIN pg_class c ON c.oid = new
        WHERE i.name ~ '^listener_new_[0-9]+$'
          AND NOT EXISTS (SELECT FROM listener.indexes_of(old) o WHERE i.name = 'listener_new_' || o.id)
    LOOP
        EXECUTE CASE WHEN gone.is_needed THEN format('ALTER INDEX %I.%I RENAME TO %I', schema, gone.name, 'listener_key_' || view_id)
                     ELSE format('DROP INDEX %I.%I', schema, gone.name) END;
    END LOOP;
    PERFORM listener.revoke_defaults(new);
    FOREACH statement IN ARRAY statements LOOP
        BEGIN
            EXECUTE statement;
        -- It is there already; or a column goes or changes its type, which was told before.
        EXCEPTION WHEN duplicate_table OR duplicate_object OR undefined_column OR undefined_object OR undefined_function
                       OR datatype_mismatch OR wrong_object_type THEN
            CONTINUE;
        END;
    END LOOP;
    PERFORM set_config('lock_timeout', previous_timeout, true);
END
$function$;
