-- Whether a query has one right result. Rows with equal sort keys may come in either order, and floats may be added up
-- in any order. Then the result depends on the plan, on the order of rows in the table and on the number of workers,
-- and changes although nobody writes.
--
-- The stored query is read as a tree. An ORDER BY determines the order where its expressions tell each row from any
-- other: see tells_apart(). An ORDER BY that is not understood is reported. A query whose tree cannot be read is not
-- reported at all.

-- node_tree(nodes): a stored tree of nodes as JSON: {"node": its type, field: value …}, lists as arrays, all else as
-- texts; the bytes of constants are left out. NULL where it cannot be read.
CREATE OR REPLACE FUNCTION listener.node_tree(nodes text) RETURNS jsonb
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    RETURN (
        SELECT string_agg(CASE
                   WHEN p.word ~ '^:[a-z]' THEN ',' || to_json(substr(p.word, 2)) || ':'
                   WHEN p.word IN ('}', ')') THEN translate(p.word, ')', ']')
                   ELSE CASE WHEN p.previous IN ('}', ')') OR p.previous !~ '^([:({]|$)' THEN ',' ELSE '' END
                        || CASE WHEN p.word = '(' THEN '[' WHEN p.word LIKE '{%' THEN '{"node":' || to_json(substr(p.word, 2))
                                WHEN p.word = '<>' THEN 'null' ELSE to_json(p.word)::text END END, '' ORDER BY p.ord)
        FROM (SELECT m.found[1] AS word, m.ord, coalesce(lag(m.found[1]) OVER (ORDER BY m.ord), '') AS previous
              FROM regexp_matches(nodes, '\{[A-Z_]+|[(){}]|"(?:[^"\\]|\\.)*"|\[[-\d ]*\]|(?:\\.|[^\s(){}\\])+', 'g')
                   WITH ORDINALITY AS m (found, ord)
              WHERE m.found[1] !~ '^\[[-\d ]*\]$') p)::jsonb;
EXCEPTION WHEN OTHERS THEN
    RETURN NULL;
END
$function$;

-- query_nodes(start): all nodes below `start`, a part of a query, without those of subqueries.
CREATE OR REPLACE FUNCTION listener.query_nodes(start jsonb) RETURNS SETOF jsonb
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $function$
    WITH RECURSIVE walk (node) AS (
        SELECT start
        UNION ALL
        SELECT c.node
        FROM walk w CROSS JOIN LATERAL (
            SELECT e.value FROM jsonb_each(CASE WHEN jsonb_typeof(w.node) = 'object' AND w.node ->> 'node' <> 'QUERY'
                THEN w.node ELSE '{}' END) e
            UNION ALL
            SELECT e.value FROM jsonb_array_elements(CASE WHEN jsonb_typeof(w.node) = 'array' THEN w.node ELSE '[]' END) e) AS c (node)
        WHERE jsonb_typeof(c.node) IN ('object', 'array')
    )
    SELECT w.node FROM walk w WHERE jsonb_typeof(w.node) = 'object'
$function$;

-- node_column(query, expression): the column of the query's FROM that an expression is, as '<range table
-- index>.<number>'; 'fixed' where it has one value for all rows; NULL otherwise.
CREATE OR REPLACE FUNCTION listener.node_column(query jsonb, expression jsonb) RETURNS text
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    entry jsonb;
BEGIN
    WHILE expression ->> 'node' = 'RELABELTYPE' LOOP
        expression := expression -> 'arg';
    END LOOP;
    IF expression ->> 'node' IN ('CONST', 'PARAM') OR (expression ->> 'node' = 'VAR' AND expression ->> 'varlevelsup' <> '0') THEN
        RETURN 'fixed';
    ELSIF expression ->> 'node' <> 'VAR' THEN
        RETURN NULL;
    END IF;
    entry := query -> 'rtable' -> ((expression ->> 'varno')::integer - 1);
    -- From PostgreSQL 18 on, the expressions of GROUP BY are an entry of the range table.
    IF entry ->> 'rtekind' = '9' THEN
        RETURN listener.node_column(query, entry -> 'groupexprs' -> ((expression ->> 'varattno')::integer - 1));
    END IF;
    RETURN format('%s.%s', expression ->> 'varno', expression ->> 'varattno');
END
$function$;

-- from_indexes(part): the range table indexes of what a part of a FROM reads.
CREATE OR REPLACE FUNCTION listener.from_indexes(part jsonb) RETURNS text[]
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT array_agg(n.node ->> 'rtindex') FROM listener.query_nodes(part) AS n (node) WHERE n.node ->> 'node' = 'RANGETBLREF'
$function$;

-- column_equalities(query): the columns that the conditions of a query say are equal to another column, or fixed
-- (NULL): where `known` is the same in two rows, `name` is. An outer join says so of the side that it may leave NULL
-- alone.
CREATE OR REPLACE FUNCTION listener.column_equalities(query jsonb) RETURNS TABLE (known text, name text)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT s.known, s.name
    FROM listener.query_nodes(query -> 'jointree') AS j (node)
    CROSS JOIN LATERAL (SELECT CASE j.node ->> 'jointype' WHEN '1' THEN listener.from_indexes(j.node -> 'rarg')
                                                          WHEN '3' THEN listener.from_indexes(j.node -> 'larg')
                                                          WHEN '2' THEN '{}' END) AS filled (sides)
    CROSS JOIN LATERAL jsonb_array_elements(CASE WHEN j.node #>> '{quals,boolop}' = 'and' THEN j.node #> '{quals,args}'
                                                 ELSE jsonb_build_array(j.node -> 'quals') END) AS c (node)
    JOIN pg_operator o ON o.oid::text = c.node ->> 'opno' AND o.oprname = '=' AND (o.oprcanhash OR o.oprcanmerge)
    CROSS JOIN LATERAL (SELECT listener.node_column(query, c.node #> '{args,0}'),
        listener.node_column(query, c.node #> '{args,1}')) AS x (a, b)
    CROSS JOIN LATERAL (VALUES (x.a, x.b), (x.b, x.a)) AS s (known, name)
    WHERE j.node ->> 'node' IN ('FROMEXPR', 'JOINEXPR') AND c.node ->> 'node' = 'OPEXPR'
      AND s.known IS NOT NULL AND s.name <> 'fixed' AND (filled.sides IS NULL OR split_part(s.name, '.', 1) = ANY (filled.sides))
$function$;

-- entry_keys(query, index): sets of columns that are unique in this entry of the range table.
CREATE OR REPLACE FUNCTION listener.entry_keys(query jsonb, index text) RETURNS TABLE (columns text[])
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    entry jsonb := query -> 'rtable' -> (index::integer - 1);
    inner_query jsonb := CASE entry ->> 'rtekind'
        WHEN '1' THEN entry -> 'subquery'
        WHEN '0' THEN CASE WHEN entry ->> 'relkind' = 'v' THEN (
            SELECT listener.node_tree(r.ev_action::text) -> 0 FROM pg_rewrite r
                WHERE r.ev_class::text = entry ->> 'relid' AND r.rulename = '_RETURN') END
        WHEN '6' THEN (SELECT c.node -> 'ctequery' FROM jsonb_array_elements(query -> 'cteList') AS c (node)
                       WHERE entry ->> 'ctelevelsup' = '0' AND entry ->> 'self_reference' = 'false'
                           AND c.node ->> 'ctename' = entry ->> 'ctename') END;
BEGIN
    RETURN QUERY
        SELECT ARRAY(SELECT format('%s.%s', index, k.attnum) FROM unnest(x.indkey) WITH ORDINALITY AS k (attnum, ord)
            WHERE k.ord <= x.indnkeyatts)
        FROM pg_index x
        WHERE entry ->> 'rtekind' = '0' AND x.indrelid::text = entry ->> 'relid' AND x.indisunique AND x.indisvalid
          AND x.indpred IS NULL AND x.indexprs IS NULL
          AND (x.indnullsnotdistinct OR NOT EXISTS (
              SELECT FROM pg_attribute a WHERE a.attrelid = x.indrelid AND a.attnum = ANY (x.indkey) AND NOT a.attnotnull));
    IF inner_query IS NOT NULL THEN
        RETURN QUERY SELECT ARRAY(SELECT format('%s.%s', index, r.number) FROM unnest(k.numbers) AS r (number))
                     FROM listener.query_keys(inner_query) k;
    END IF;
END
$function$;

-- determined(query, columns): the columns that are equal in two rows wherever these are. '<index>.*' stands for an
-- entry of the FROM of which all columns are.
CREATE OR REPLACE FUNCTION listener.determined(query jsonb, columns text[]) RETURNS text[]
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    equal jsonb := (SELECT jsonb_agg(jsonb_build_array(e.known, e.name)) FROM listener.column_equalities(query) e);
    keys jsonb := (SELECT jsonb_agg(jsonb_build_array(i.index, to_jsonb(k.columns)))
                   FROM unnest(listener.from_indexes(query -> 'jointree')) AS i (index)
                   CROSS JOIN LATERAL listener.entry_keys(query, i.index) k);
    known text[] := array_remove(columns, NULL) || 'fixed'::text;
    found text[];
BEGIN
    LOOP
        SELECT array_agg(DISTINCT f.name) INTO found FROM (
            SELECT u.name FROM unnest(known) AS u (name)
            UNION ALL
            SELECT e.pair ->> 1 FROM jsonb_array_elements(equal) AS e (pair)
            WHERE ARRAY[e.pair ->> 0, split_part(e.pair ->> 0, '.', 1) || '.*'] && known
            UNION ALL
            SELECT (k.pair ->> 0) || '.*' FROM jsonb_array_elements(keys) AS k (pair)
            WHERE NOT EXISTS (SELECT FROM jsonb_array_elements_text(k.pair -> 1) AS c (name) WHERE c.name <> ALL (known))) f;
        EXIT WHEN cardinality(found) = cardinality(known);
        known := found;
    END LOOP;
    RETURN known;
END
$function$;

-- query_keys(query): sets of output columns, by number, that are unique in the result of the query.
CREATE OR REPLACE FUNCTION listener.query_keys(query jsonb) RETURNS TABLE (numbers text[])
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    shown jsonb := (SELECT jsonb_agg(t.entry) FROM jsonb_array_elements(query -> 'targetList') AS t (entry)
        WHERE t.entry ->> 'resjunk' = 'false');
    refs text[] := (SELECT array_agg(c.clause ->> 'tleSortGroupRef') FROM jsonb_array_elements(
        coalesce(nullif(query -> 'distinctClause', 'null'), nullif(query -> 'groupClause', 'null'), '[]')) AS c (clause));
BEGIN
    IF jsonb_typeof(query -> 'setOperations') = 'object' THEN
        IF query #>> '{setOperations,all}' = 'false' THEN
            RETURN QUERY SELECT array_agg(t.entry ->> 'resno') FROM jsonb_array_elements(shown) AS t (entry);
        END IF;
    ELSIF refs IS NOT NULL THEN
        RETURN QUERY
            SELECT array_agg(t.entry ->> 'resno') FROM jsonb_array_elements(shown) AS t (entry)
            WHERE t.entry ->> 'ressortgroupref' = ANY (refs) AND jsonb_typeof(query -> 'groupingSets') = 'null'
            HAVING count(DISTINCT t.entry ->> 'ressortgroupref') = cardinality(refs);
    ELSIF query ->> 'hasAggs' = 'true' THEN
        RETURN QUERY SELECT '{}'::text[];
    ELSIF query ->> 'hasTargetSRFs' = 'false' THEN
        RETURN QUERY
            SELECT k.numbers
            FROM unnest(listener.from_indexes(query -> 'jointree')) AS i (index)
            CROSS JOIN LATERAL listener.entry_keys(query, i.index) e
            CROSS JOIN LATERAL (
                SELECT array_agg(t.entry ->> 'resno') AS numbers,
                    array_agg(DISTINCT listener.node_column(query, t.entry -> 'expr')) AS columns
                FROM jsonb_array_elements(shown) AS t (entry)
                WHERE listener.node_column(query, t.entry -> 'expr') = ANY (e.columns)) k
            WHERE e.columns <@ k.columns
              AND NOT EXISTS (SELECT FROM unnest(listener.from_indexes(query -> 'jointree')) AS o (index)
                              WHERE o.index || '.*' <> ALL (listener.determined(query, e.columns)));
    END IF;
END
$function$;

-- tells_apart(query, expressions, refs): whether rows for which these expressions are equal are equal in all that the
-- query shows.
--   refs: the numbers by which GROUP BY, DISTINCT and ORDER BY refer to the expressions
CREATE OR REPLACE FUNCTION listener.tells_apart(query jsonb, expressions jsonb, refs text[]) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    known text[] := listener.determined(query, ARRAY(
        SELECT listener.node_column(query, e.expression) FROM jsonb_array_elements(expressions) AS e (expression)));
    grouping text := CASE WHEN jsonb_typeof(query -> 'groupClause') = 'array' THEN 'groupClause'
                    WHEN jsonb_typeof(query -> 'distinctClause') = 'array' AND query ->> 'hasDistinctOn' = 'false'
                        THEN 'distinctClause' END;
BEGIN
    IF grouping IS NOT NULL THEN
        RETURN NOT EXISTS (
            SELECT FROM jsonb_array_elements(query -> grouping) AS c (clause)
            JOIN jsonb_array_elements(query -> 'targetList') AS t (entry) ON t.entry ->> 'ressortgroupref' = c.clause ->> 'tleSortGroupRef'
            CROSS JOIN LATERAL (SELECT listener.node_column(query, t.entry -> 'expr')) AS x (name)
            WHERE c.clause ->> 'tleSortGroupRef' <> ALL (refs)
              AND (ARRAY[x.name, split_part(x.name, '.', 1) || '.*'] && known) IS NOT TRUE);
    ELSIF jsonb_typeof(query -> 'setOperations') = 'object' THEN
        RETURN NOT EXISTS (SELECT FROM jsonb_array_elements(query -> 'targetList') AS t (entry)
            WHERE t.entry ->> 'ressortgroupref' <> ALL (refs));
    ELSIF query ->> 'hasAggs' = 'true' THEN
        RETURN true;
    END IF;
    RETURN NOT EXISTS (SELECT FROM unnest(listener.from_indexes(query -> 'jointree')) AS i (index) WHERE i.index || '.*' <> ALL (known))
        OR (query ->> 'hasSubLinks' = 'false' AND query ->> 'hasTargetSRFs' = 'false' AND NOT EXISTS (
            SELECT FROM listener.query_nodes(query -> 'targetList') AS n (node)
            CROSS JOIN LATERAL (SELECT listener.node_column(query, n.node)) AS x (name)
            WHERE n.node ->> 'node' = 'VAR' AND NOT ARRAY[x.name, split_part(x.name, '.', 1) || '.*'] && known));
END
$function$;

-- undetermined(relation): what in the query of a view or a materialized view, or in a view that it reads, has more than
-- one right result: what it is, and how to fix it.
CREATE OR REPLACE FUNCTION listener.undetermined(relation regclass) RETURNS TABLE (what text, fix text)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET jit = off AS $function$
#variable_conflict use_column
DECLARE
    query jsonb;
BEGIN
    FOR query IN
        SELECT q.node
        FROM (SELECT relation::oid AS relid UNION SELECT v.relid FROM listener.tenant_views(relation) v) v
        JOIN pg_rewrite r ON r.ev_class = v.relid AND r.rulename = '_RETURN'
        CROSS JOIN LATERAL jsonb_path_query(listener.node_tree(r.ev_action::text), 'strict $.** ? (@.node == "QUERY")') AS q (node)
    LOOP
        RETURN QUERY
            WITH node AS MATERIALIZED (
                SELECT n.node, coalesce(n.node ->> 'aggfnoid', n.node ->> 'winfnoid')::oid AS function, p.proname AS name,
                       p.proargtypes::oid[] AS types, n.node ->> 'node' = 'WINDOWFUNC' AS windowed
                FROM listener.query_nodes(jsonb_build_array(query -> 'targetList', query -> 'havingQual')) AS n (node)
                JOIN pg_proc p ON p.oid::text IN (n.node ->> 'aggfnoid', n.node ->> 'winfnoid')
                WHERE n.node ->> 'node' IN ('AGGREF', 'WINDOWFUNC') AND p.pronamespace = 'pg_catalog'::regnamespace
            ), by_order AS (
                SELECT n.*, n.name ~ '^(array|string|xml|jsonb?)_?agg$|^jsonb?_(object_)?agg(_strict|_unique)*$' AS gathers FROM node n
            ), aggregate AS (
                SELECT n.name,
                       -- Rows of a subquery that is ordered come in its order.
                       (jsonb_typeof(n.node -> 'aggorder') = 'array' OR jsonb_typeof(n.node -> 'aggdistinct') = 'array' OR EXISTS (
                            SELECT FROM unnest(listener.from_indexes(query -> 'jointree')) AS i (index)
                            WHERE cardinality(listener.from_indexes(query -> 'jointree')) = 1
                              AND jsonb_typeof(query #> ARRAY['rtable', (i.index::integer - 1)::text, 'subquery',
                                  'sortClause']) = 'array')) AS ordered,
                       jsonb_typeof(n.node -> 'aggorder') = 'array' AND NOT (
                           NOT EXISTS (SELECT FROM jsonb_array_elements(n.node -> 'args') AS a (entry)
                                       WHERE a.entry ->> 'resjunk' = 'false' AND a.entry #>> '{expr,node}' <> 'CONST'
                                         AND a.entry ->> 'ressortgroupref' <> ALL (o.refs))
                           OR NOT EXISTS (SELECT FROM unnest(listener.from_indexes(query -> 'jointree')) AS i (index)
                                          WHERE i.index || '.*' <> ALL (listener.determined(query, ARRAY(
                                              SELECT listener.node_column(query, a.entry -> 'expr')
                                                  FROM jsonb_array_elements(n.node -> 'args') AS a (entry)
                                              WHERE a.entry ->> 'ressortgroupref' = ANY (o.refs)))))) AS tied
                FROM by_order n
                CROSS JOIN LATERAL (SELECT coalesce(array_agg(c.clause ->> 'tleSortGroupRef'), '{}') FROM jsonb_array_elements(
                    coalesce(nullif(n.node -> 'aggorder', 'null'), '[]')) AS c (clause)) AS o (refs)
                WHERE n.gathers AND NOT n.windowed
            ), windowed AS (
                SELECT n.name, listener.tells_apart(query, o.expressions, o.refs) AS told
                FROM by_order n
                JOIN jsonb_array_elements(query -> 'windowClause') AS w (clause) ON w.clause ->> 'winref' = n.node ->> 'winref'
                CROSS JOIN LATERAL (
                    SELECT coalesce(array_agg(t.entry ->> 'ressortgroupref'), '{}'), coalesce(jsonb_agg(t.entry -> 'expr'), '[]')
                    FROM jsonb_array_elements(coalesce(nullif(w.clause -> 'partitionClause', 'null'), '[]')
                                              || coalesce(nullif(w.clause -> 'orderClause', 'null'), '[]')) AS c (clause)
                    JOIN jsonb_array_elements(query -> 'targetList') AS t (entry) ON t.entry ->> 'ressortgroupref' = c.clause ->> 'tleSortGroupRef'
                ) AS o (refs, expressions)
                WHERE n.windowed AND (n.gathers
                    OR n.name IN ('row_number', 'ntile', 'lag', 'lead', 'first_value', 'last_value', 'nth_value')
                    -- ROWS BETWEEN: which of two equal rows comes first matters.
                    OR ((w.clause ->> 'frameOptions')::integer & 4 <> 0 AND (w.clause ->> 'frameOptions')::integer & 288 <> 288
                        AND n.name NOT IN ('rank', 'dense_rank', 'percent_rank', 'cume_dist')))
            ), sorted (refs, expressions) AS (
                SELECT coalesce(array_agg(t.entry ->> 'ressortgroupref'), '{}'), coalesce(jsonb_agg(t.entry -> 'expr'), '[]')
                FROM jsonb_array_elements(coalesce(nullif(query -> 'sortClause', 'null'),
                    nullif(query -> 'distinctClause', 'null'), '[]')) AS c (clause)
                JOIN jsonb_array_elements(query -> 'targetList') AS t (entry) ON t.entry ->> 'ressortgroupref' = c.clause ->> 'tleSortGroupRef'
            )
            SELECT format('%s() takes its values in any order', a.name),
                'write ORDER BY, ending with a unique column, within its brackets'
            FROM aggregate a WHERE NOT a.ordered
            UNION
            SELECT format('the ORDER BY within %s() may have ties', a.name), 'end it with a unique column' FROM aggregate a WHERE a.tied
            UNION
            SELECT 'any_value() returns any', 'take min() or max() instead' FROM node n WHERE n.name = 'any_value'
            UNION
            SELECT format('%s() of floats depends on the order in which they are added', n.name),
                format('cast to numeric within it: %s(x::numeric)', n.name)
            FROM node n
            WHERE n.types[0] = ANY ('{float4,float8}'::regtype[])
                AND n.name ~ '^(sum$|avg$|var|stddev|corr$|covar|regr_)' AND n.name <> 'regr_count'
            UNION
            SELECT format('the window of %s() may have ties', w.name), 'end its ORDER BY with a unique column'
                FROM windowed w WHERE NOT w.told
            UNION
            SELECT CASE WHEN query ->> 'hasDistinctOn' = 'true'
                        THEN 'DISTINCT ON keeps any of the rows that its ORDER BY does not tell apart'
                        ELSE 'LIMIT or OFFSET keeps any of the rows that its ORDER BY does not tell apart' END,
                   'end its ORDER BY with a unique column'
            FROM sorted s
            WHERE (query ->> 'hasDistinctOn' = 'true' OR jsonb_typeof(query -> 'limitCount') = 'object'
                OR jsonb_typeof(query -> 'limitOffset') = 'object')
              AND query ->> 'limitOption' <> '1' AND NOT listener.tells_apart(query, s.expressions, s.refs);
    END LOOP;
END
$function$;
