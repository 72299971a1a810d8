-- Whether a query can be refreshed by tenant: whether the rows that it returns for a tenant depend on the rows of that
-- tenant alone, and are found without reading everybody's.
--
-- PostgreSQL's planner is the prover. It is asked to plan
--     SELECT * FROM <definition> WHERE <tenant column> = <K>
-- and it moves that condition down only as far as the result stays the same: through joins, but not to the side that an
-- outer join keeps; below GROUP BY, DISTINCT and window functions only where each of them is split by the column. A plan
-- is a function of what its scans emit. So where each scan of a source emits only rows of tenant K, the result does not
-- depend on other rows: the definition is tenant-local, for every K, since K is a constant that occurs nowhere else.
--
-- What that rests on, and what is done about it:
--   * An arm of the query may be missing from the plan because it is of another tenant: SELECT 'five', count(*) FROM orders
--     has no row for K, and counts everybody's for five. So the same is planned with a value that the planner does not know;
--     where that scans a source more often, something was left out, and is not proven.
--   * Row-level security is no proof: what is asked is whether the query itself is tenant-local. But its conditions cannot be
--     told from the query's, once the planner has concluded that a.tenant_id = <setting> = b.tenant_id. So what is planned is
--     the query over stand-ins: empty temporary tables with the names and columns of the sources, which have no policies, and
--     no partitions either. They are gone with a subtransaction that is rolled back.
--   * A condition counts only as a whole member of an AND, in the scan itself: alias.column = K, or = alias.column of a scan
--     that is bound itself (a correlated subquery, which runs once for each row of that one), or = in a join, where the
--     rows that do not match are dropped and all that lies between the scan and the join treats each row, or each group
--     that is formed by the column, by itself. Anything else that the plan's text may say is not understood, and so
--     proves nothing.
--   * The text of a plan names the columns of a UNION by those of its first arm. A name that would have to be seen through a
--     set operation is not understood.
--   * Equal columns are one tenant only where their texts, in the form of the view's tenant type, are equal too. Which
--     casts keep that, and which operators and collations are not PostgreSQL's own: 20_equality.sql.
--   * A materialized view or a foreign table holds rows whose origin is not seen here.

-- tenant_scope(definition, tenant_column, tenant_type): for each scan of a source, whether the planner carries "tenant = K" to
-- it, which proves that a tenant's rows depend on that tenant's rows alone, and whether an index serves it.
--   definition     a view or a materialized view that returns tenant_column, which is of type uuid, text, bigint or integer
--   source         NULL where a function may read what the catalog does not show, or the query could not be planned
--   proven         the result depends on none of its rows but the tenant's
--   indexed        false: it would be read whole for each tenant; NULL: a policy stands in the way of planning
--   advice         what mends it, or, of a table that is shared by all tenants although the query finds a tenant's rows in it,
--                  what would tell them apart; NULL where there is nothing to say
-- A table that all tenants share needs no proof, and stands here only with that advice.
CREATE OR REPLACE FUNCTION listener.tenant_scope(definition regclass, tenant_column name, tenant_type text)
RETURNS TABLE (source regclass, proven boolean, indexed boolean, advice text)
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp SET jit = off AS $function$
DECLARE
    plans record;
    scans jsonb;
    facts jsonb;
    bound text[] := ARRAY[]::text[];
    found text[];
    own text := listener.foreign_equality(definition);
BEGIN
    RETURN QUERY
        SELECT NULL::regclass, false, false,
               format('%s may read what the catalog does not show: name it, depends_on => ''{table, …}'', or ''{}'' where it reads no table',
                      f.funcid::regprocedure)
        FROM (SELECT definition::oid AS relid UNION SELECT v.relid FROM listener.tenant_views(definition) v) v
        CROSS JOIN LATERAL listener.hiding_functions(v.relid) f
        GROUP BY f.funcid;
    BEGIN
        IF has_schema_privilege('listener_private', 'USAGE') OR definition::text !~ '^listener\.definition_[0-9]+$' THEN
            SELECT p.* INTO plans FROM listener.tenant_plans(definition, tenant_column, tenant_type) p;
        ELSE
            SELECT p.* INTO plans FROM listener.view_plans(definition) p;
        END IF;
    EXCEPTION WHEN OTHERS THEN
        RETURN QUERY SELECT NULL::regclass, false, false, format('PostgreSQL could not plan it for one tenant: %s', SQLERRM);
        RETURN;
    END;
    WITH input AS MATERIALIZED (
        SELECT t.*, c.relname FROM listener.tenant_inputs(definition, tenant_column) t JOIN pg_class c ON c.oid = t.relid
    )
    SELECT jsonb_agg(jsonb_build_object(
        'alias', s.alias, 'path', s.path, 'relid', coalesce(i.relid, r.oid), 'kind', i.relkind, 'source', i.source_id,
        'name', listener.plain_text(quote_ident(i.name), ''), 'through', i.through_relid,
        'keys', ARRAY(SELECT listener.plain_text(quote_ident(k.name), '') FROM unnest(i.keys) WITH ORDINALITY AS k (name, ord) ORDER BY k.ord),
        'referenced', ARRAY(SELECT listener.plain_text(quote_ident(k.name), '') FROM unnest(i.referenced) WITH ORDINALITY AS k (name, ord) ORDER BY k.ord),
        'traceable', i.relkind IN ('r', 'p')
            AND s.node ->> 'Node Type' IN ('Seq Scan', 'Index Scan', 'Index Only Scan', 'Bitmap Heap Scan')
            AND (i.name IS NULL OR EXISTS (
                SELECT FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
                LEFT JOIN pg_collation l ON l.oid = a.attcollation
                WHERE a.attrelid = i.relid AND a.attname = i.name AND l.collisdeterministic IS NOT FALSE
                  AND coalesce(nullif(t.typbasetype, 0), t.oid) = ANY ('{uuid,text,varchar,bpchar,name,int2,int4,int8}'::regtype[])))))
    INTO scans
    FROM listener.plan_scans(plans.by_constant) s
    LEFT JOIN LATERAL (
        SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relname = s.node ->> 'Relation Name' AND n.nspname = s.node ->> 'Schema') r ON true
    LEFT JOIN LATERAL (
        SELECT t.* FROM input t
        WHERE CASE WHEN plans.stood_in THEN s.node ->> 'Schema' ~ '^pg_temp' AND t.relname = s.node ->> 'Relation Name'
                   ELSE t.relid = r.oid OR t.relid IN (SELECT p.relid FROM pg_partition_ancestors(r.oid) p) END
        ORDER BY t.relid = r.oid DESC LIMIT 1) i ON true;
    -- What each equality proves: `tells`: both sides are one tenant; `links`: the other row is the one that a look-up
    -- finds.
    WITH read AS MATERIALIZED (
        SELECT s.alias, listener.plain_text(quote_ident(a.attname), '') AS name, coalesce(nullif(t.typbasetype, 0), t.oid) AS type,
               a.attcollation AS collation, l.collisdeterministic IS NOT FALSE AS deterministic,
               -- A user's type has an = that may not be the one of the look-up.
               coalesce(nullif(t.typbasetype, 0), t.oid) = ANY (ARRAY(
                   SELECT o.oprleft FROM pg_operator o WHERE o.oprname = '=' AND o.oprleft >= 16384)) AS own
        FROM jsonb_to_recordset(scans) AS s (alias text, relid oid)
        JOIN pg_attribute a ON a.attrelid = s.relid AND a.attnum > 0 AND NOT a.attisdropped
        JOIN pg_type t ON t.oid = a.atttypid
        LEFT JOIN pg_collation l ON l.oid = a.attcollation
    )
    SELECT jsonb_agg(to_jsonb(i) || jsonb_build_object(
        'tells', r.deterministic AND listener.keeps_tenant(r.type, i.casts, tenant_type)
                 AND (i.other_alias IS NULL
                      OR coalesce(o.deterministic AND listener.keeps_tenant(o.type, i.other_casts, tenant_type), false)),
        -- A look-up compares by the types' own equality, with no cast.
        'links', coalesce(NOT r.own AND NOT o.own AND (r.deterministic AND o.deterministic OR r.collation = o.collation)
                 AND ((i.casts = '' AND i.other_casts = '')
                      OR (listener.keeps_tenant(r.type, i.casts, 'text')
                          AND listener.keeps_tenant(o.type, i.other_casts, 'text'))), false)))
    INTO facts
    FROM listener.implied(plans.by_constant, plans.constant) i
    JOIN read r ON r.alias = i.alias AND r.name = i.name
    LEFT JOIN read o ON o.alias = i.other_alias AND o.name = i.other_name;

    -- Until nothing more follows: alias.name is bound to the tenant; alias.* says so of the rows as a whole.
    LOOP
        WITH scan AS (
            SELECT * FROM jsonb_to_recordset(scans) AS s (alias text, relid oid, source integer, name text, through oid,
                                                          keys text[], referenced text[], traceable boolean)
        ), fact AS (
            SELECT * FROM jsonb_to_recordset(facts) AS f (alias text, name text, other_alias text, other_name text,
                tells boolean, links boolean)
        )
        SELECT array_agg(b.name) INTO found FROM (
            SELECT u.name FROM unnest(bound) AS u (name)
            UNION
            SELECT f.alias || '.' || f.name FROM fact f
            WHERE f.tells AND (f.other_alias IS NULL OR f.other_alias || '.' || f.other_name = ANY (bound))
            UNION
            SELECT s.alias || '.*' FROM scan s WHERE s.traceable AND s.alias || '.' || s.name = ANY (bound)
            UNION
            -- A look-up's, by the row that has the tenant, or by another row that belongs to it.
            SELECT s.alias || '.*'
            FROM scan s JOIN scan o ON o.alias <> s.alias AND o.alias || '.*' = ANY (bound)
                                   AND (o.relid = s.through OR o.source = s.source)
            WHERE s.traceable AND s.through IS NOT NULL AND cardinality(s.keys) > 0 AND NOT EXISTS (
                SELECT FROM generate_subscripts(s.keys, 1) AS k (n)
                WHERE NOT EXISTS (SELECT FROM fact f
                                  WHERE f.links AND f.alias = s.alias AND f.name = s.keys[k.n] AND f.other_alias = o.alias
                                    AND f.other_name = CASE WHEN o.relid = s.through THEN s.referenced[k.n] ELSE o.keys[k.n] END))
        ) AS b (name);
        EXIT WHEN cardinality(found) IS NOT DISTINCT FROM cardinality(bound) OR found IS NULL;
        bound := found;
    END LOOP;

    RETURN QUERY
        WITH input AS MATERIALIZED (
            SELECT t.*, c.relname FROM listener.tenant_inputs(definition, tenant_column) t JOIN pg_class c ON c.oid = t.relid
        ), scan AS MATERIALIZED (
            SELECT s.*, s.alias || '.*' = ANY (bound) AS proven,
                   -- A shared table's column in which the query looks for the tenant.
                   (SELECT min(a.attname::text) FROM pg_attribute a
                    WHERE a.attrelid = s.relid AND s.name IS NULL AND s.through IS NULL AND s.kind IN ('r', 'p')
                      AND s.alias || '.' || listener.plain_text(quote_ident(a.attname), '') = ANY (bound)
                      AND a.atttypid = ANY ('{uuid,text,varchar,int2,int4,int8}'::regtype[])) AS finds
            FROM jsonb_to_recordset(scans) AS s (alias text, path integer[], relid oid, kind "char", name text, through oid, traceable boolean)
        ), served AS MATERIALIZED (
            SELECT x.*, coalesce((SELECT i.relid FROM input i WHERE i.relid = x.relid),
                                 (SELECT i.relid FROM input i JOIN pg_partition_ancestors(x.relid) p ON p.relid = i.relid LIMIT 1)) AS input
            FROM listener.index_scans(plans.by_index, plans.constant) x
        ), judged AS (
            SELECT s.relid, s.alias, s.path, s.proven, s.kind, s.finds, i.name, i.keys, s.kind IS NULL AS hidden, s.traceable,
                   coalesce(bool_and(v.found) FILTER (WHERE v.alias = s.alias),
                            bool_and(v.found) FILTER (WHERE regexp_replace(v.alias, '_[0-9]+$', '') = s.alias),
                            bool_and(v.found), CASE WHEN plans.by_index IS NOT NULL THEN false END) AS indexed
            FROM scan s
            LEFT JOIN input i ON i.relid = s.relid
            LEFT JOIN LATERAL (
                -- The planner may have found something quicker than an index that would serve.
                SELECT x.alias, x.indexed OR EXISTS (
                    SELECT FROM pg_index o JOIN pg_attribute a ON a.attrelid = o.indrelid AND a.attnum = o.indkey[0]
                    CROSS JOIN LATERAL listener.and_members(x.filter) AS m (member)
                    WHERE o.indrelid = x.relid AND a.attname = coalesce(i.name, s.finds) AND o.indisvalid AND o.indpred IS NULL
                      AND m.member ~ format('^%s\.%s = K(::[a-z]+)?$', x.alias, listener.plain_text(quote_ident(a.attname), ''))) AS found
                FROM served x WHERE x.input = s.relid) v ON true
            WHERE s.kind IS NULL OR s.kind IN ('m', 'f') OR s.name IS NOT NULL OR s.through IS NOT NULL OR s.finds IS NOT NULL
            GROUP BY s.relid, s.alias, s.path, s.proven, s.kind, s.finds, i.name, i.keys, s.traceable
        )
        SELECT j.relid::regclass, (j.proven OR j.finds IS NOT NULL) AND own IS NULL, j.indexed,
               CASE WHEN own IS NOT NULL
                    THEN format('the query has %s, which may take two tenants for one: compare tenants by PostgreSQL''s own =, '
                                'without it', own)
                    WHEN j.hidden THEN format('a function of the query reads %s: join it in the query itself', j.relid::regclass)
                    WHEN j.finds IS NOT NULL
                    THEN format('a change to %s refreshes every tenant, although the query looks for the tenant in its column %I: '
                                'SELECT listener.add_source(%L, %L)', j.relid::regclass, j.finds, j.relid::regclass, j.finds)
                    WHEN NOT j.proven AND EXISTS (
                        SELECT FROM jsonb_to_recordset(facts) AS f (alias text, name text, other_alias text, casts text, other_casts text,
                                                                    tells boolean, links boolean)
                        WHERE f.alias = j.alias AND NOT f.tells AND NOT f.links AND f.casts || f.other_casts <> '')
                    THEN format('%s is compared by a cast, which may take two tenants for one: compare columns of the same type, without casts',
                                j.relid::regclass)
                    WHEN NOT j.proven
                    THEN listener.scope_advice(plans.by_constant, facts, j.path, j.kind, j.traceable, j.alias, tenant_column, j.name, j.keys)
                    WHEN NOT j.indexed THEN listener.index_advice(j.relid, CASE WHEN j.name IS NULL THEN j.keys ELSE ARRAY[j.name] END) END
        FROM judged j
        UNION ALL
        -- Left out of the plan for the constant.
        SELECT i.relid::regclass, false, false,
               format('a part of the query reads %s for a tenant that it names by a literal: it reads every tenant''s rows there', i.relid::regclass)
        FROM input i
        CROSS JOIN LATERAL (
            SELECT ARRAY(SELECT i.relname UNION SELECT c.relname FROM pg_partition_tree(i.relid) t JOIN pg_class c ON c.oid = t.relid)::text[]) AS n (names)
        WHERE (i.name IS NOT NULL OR i.through_id IS NOT NULL OR i.relkind IN ('m', 'f'))
          AND (SELECT count(*) FROM listener.plan_scans(plans.by_unknown) u WHERE u.node ->> 'Relation Name' = ANY (n.names))
              > (SELECT count(*) FROM listener.plan_scans(plans.by_constant) u WHERE u.node ->> 'Relation Name' = ANY (n.names));
END
$function$;

-- index_advice(relid, columns): what serves a scan that reads the table whole.
CREATE OR REPLACE FUNCTION listener.index_advice(relid oid, columns name[]) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT CASE WHEN EXISTS (
        SELECT FROM pg_index x JOIN pg_attribute a ON a.attrelid = x.indrelid AND a.attnum = x.indkey[0]
        WHERE x.indrelid = index_advice.relid AND x.indisvalid AND x.indpred IS NULL AND a.attname = columns[1])
    THEN format('%1$s is read whole for each tenant, although there is an index on %2$I: compare %2$I as it is, without casts and '
                'functions, and join by it before rows are grouped', index_advice.relid::regclass, columns[1])
    ELSE format('%s is read whole for each tenant: CREATE INDEX ON %s (%s)', index_advice.relid::regclass,
                coalesce(pg_partition_root(index_advice.relid), index_advice.relid::regclass),
                (SELECT string_agg(quote_ident(c.name), ', ' ORDER BY c.ord) FROM unnest(columns) WITH ORDINALITY AS c (name, ord))) END
$function$;

-- scope_advice(...): why the planner did not carry the tenant to a scan, and what mends it. What it carried it to below a
-- node passed that node, so the one to blame is the nearest below which it reached nothing.
CREATE OR REPLACE FUNCTION listener.scope_advice(
    plan jsonb, facts jsonb, path integer[], kind "char", traceable boolean, alias text, tenant_column name, name name, keys name[])
RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    blamed record;
    known_as text := (SELECT s.node ->> 'Alias' FROM listener.plan_scans(plan) s WHERE s.path = scope_advice.path);
    own text := (SELECT string_agg(format('%I.%I', known_as, c.name), ', ') FROM unnest(CASE WHEN scope_advice.name IS NULL THEN keys ELSE ARRAY[scope_advice.name] END) AS c (name));
BEGIN
    IF kind = 'm' OR kind = 'f' THEN
        RETURN format('%I is a %s, and whose rows its rows were made of is not seen: read the tables that it is made of', known_as,
                      CASE kind WHEN 'm' THEN 'materialized view' ELSE 'foreign table' END);
    ELSIF NOT traceable THEN
        RETURN format('%s cannot tell tenants apart: a tenant column is a uuid, a text or an integer, with a deterministic '
                      'collation, and read whole rather than by TABLESAMPLE', own);
    END IF;
    WITH bound AS (
        SELECT s.path FROM listener.plan_scans(plan) s
        JOIN jsonb_to_recordset(facts) AS f (alias text, other_alias text, tells boolean)
          ON f.alias = s.alias AND f.other_alias IS NULL AND f.tells
    )
    SELECT n.node ->> 'Node Type' AS type, n.node ->> 'Parent Relationship' AS place, n.node ->> 'Subplan Name' AS subplan,
           n.node ? 'Grouping Sets' AS sets
    INTO blamed
    FROM listener.plan_nodes(plan) n
    WHERE n.path = scope_advice.path[:cardinality(n.path)]
      AND NOT EXISTS (SELECT FROM bound b WHERE b.path[:cardinality(n.path)] = n.path AND b.path <> n.path)
      AND (n.node ->> 'Parent Relationship' IN ('InitPlan', 'SubPlan')
           OR n.node ->> 'Node Type' IN ('WindowAgg', 'Limit', 'Unique', 'Aggregate', 'Group', 'SetOp', 'Recursive Union'))
      AND NOT (n.node ->> 'Node Type' IN ('Aggregate', 'Group') AND n.node ->> 'Parent Relationship' IS DISTINCT FROM 'InitPlan'
               AND NOT n.node ? 'Grouping Sets' AND EXISTS (
          SELECT FROM jsonb_array_elements_text(n.node -> 'Group Key') AS k (key)
          WHERE listener.plain_text(k.key, '') = scope_advice.alias || '.' || listener.plain_text(quote_ident(scope_advice.name), '')))
    ORDER BY cardinality(n.path) DESC LIMIT 1;
    RETURN CASE
        WHEN blamed.type = 'Recursive Union' OR EXISTS (
            SELECT FROM listener.plan_nodes(plan) n
            WHERE n.path = scope_advice.path[:cardinality(n.path)] AND n.node ->> 'Node Type' = 'Recursive Union')
        THEN format('a recursive query is computed for all tenants at once: start it from one row of a list of tenants, in a LATERAL '
                    'subquery with %s = that tenant', own)
        WHEN blamed.subplan LIKE 'CTE %'
        THEN format('WITH %1$s is computed for all tenants at once: write WITH %1$s AS NOT MATERIALIZED (…)', quote_ident(substr(blamed.subplan, 5)))
        WHEN blamed.type = 'WindowAgg'
        THEN format('a window function goes over all tenants'' rows: OVER (PARTITION BY %s …) in each', own)
        WHEN blamed.type = 'Limit'
        THEN format('LIMIT counts all tenants'' rows: number them, row_number() OVER (PARTITION BY %s ORDER BY …), and compare the number', own)
        WHEN blamed.type = 'Unique' THEN format('DISTINCT goes over all tenants'' rows: DISTINCT ON (%s, …), or return it', own)
        WHEN blamed.sets THEN format('a grouping set goes over all tenants'' rows: put %s into each', own)
        WHEN blamed.type = 'SetOp' THEN format('EXCEPT or INTERSECT compares all tenants'' rows: [NOT] EXISTS (… AND %s = the other''s)', own)
        WHEN blamed.place = 'InitPlan'
        THEN format('a subquery reads all tenants'' rows: add WHERE %s = the tenant of the row that it is computed for', own)
        WHEN blamed.type IN ('Aggregate', 'Group') AND blamed.place IS DISTINCT FROM 'SubPlan'
        THEN format('an aggregate goes over all tenants'' rows: %s', CASE WHEN scope_advice.name IS NULL
            THEN 'join the table that has the tenant within it, and GROUP BY the tenant as well'
            ELSE format('GROUP BY %s, and return it', own) END)
        WHEN blamed.place = 'SubPlan'
        THEN format('a subquery reads all tenants'' rows: add AND %s = the tenant of the row that it is computed for', own)
        ELSE format('the tenant does not reach %s: join it by the tenant (… AND %s = the other''s) and return the tenant column as it is, '
                    'neither computed nor from the side that an outer join may leave NULL', quote_ident(known_as), own) END;
END
$function$;
