"""Definitions of every breadth that SQL has, tenant-local and with one right result each; and random writes to what they read.

A definition over types shows values whose equality is looser than their text (1.0 and 1.00, 1 day and 24 hours, 0 and -0): these
are never grouped as they are, since which of two equal ones is shown would be chance.
"""

# ruff: noqa: S608, E501 - the statements are made of the text below, a line each

from __future__ import annotations

import random
import re
from typing import NamedTuple

# Of each type four tenants, as literals; the texts of the third are odd.
TENANTS = {
    "text": ["'anna'", "'Bert'", "'C''est \\ \"3\"'", "'7'"],
    "uuid": [f"'{digit * 8}-1111-4111-8111-111111111111'" for digit in "1ab4"],
    "bigint": ["1", "22", "'-3'", "9223372036854775807"],
    "integer": ["1", "22", "'-3'", "2147483647"],
}


class Family(NamedTuple):
    """A type: how its column is declared, values as literals, and expressions over the column `v`."""

    declared: str
    values: list[str]
    expressions: list[str]


TYPES = {
    "numeric": Family("numeric", ["1.0", "1.00", "-2.5", "1e20", "'NaN'"], ["v * 2", "round(v, 1)", "v > 1", "trunc(v)::text"]),
    "decimal": Family("numeric(10, 2)", ["1", "2.345", "-7.1"], ["v / 3", "v::int"]),
    "float8": Family("float8", ["0.1", "'-0'", "1e300", "'NaN'", "'-Infinity'"], ["v * 0.5", "v = 0", "v::real"]),
    "real": Family("real", ["0.1", "2.5", "'Infinity'"], ["v + 1", "v::float8"]),
    "text": Family("text", ["''", "'a'", "'A'", "'ä b'", "E'x\\ny'"], ["upper(v)", "length(v)", "v || '!'", "split_part(v, ' ', 2)", "md5(v)"]),
    "char": Family("char(4)", ["'a'", "'a  '", "'abcd'"], ["v || '|'", "v = 'a'"]),
    "varchar": Family("varchar(9)", ["'x'", "'yz'"], ["v LIKE 'y%'", "left(v, 1)"]),
    "bytea": Family("bytea", ["'\\x00ff'", "'\\x'", "'\\xdead'"], ["length(v)", "encode(v, 'base64')"]),
    "json": Family("json", ["'{\"b\": 1,  \"a\": [1, null]}'", "'null'", "'[1, 2]'"], ["v ->> 'b'", "json_typeof(v)", "v #>> '{a,0}'"]),
    "jsonb": Family("jsonb", ["'{\"b\": 1, \"a\": {\"c\": \"x\"}}'", "'null'", "'[1, 2]'", "'{\"b\": 2.50}'"], ["v -> 'a' ->> 'c'", "v ? 'b'", "v || '{}'", "jsonb_path_exists(v, '$.b ? (@ > 1)')"]),
    "array": Family("int[]", ["'{1,2,NULL}'", "'{}'", "'[0:1]={5,6}'", "'{{1,2},{3,4}}'"], ["cardinality(v)", "2 = ANY (v)", "v || v", "array_length(v, 1)", "v[1]"]),
    "texts": Family("text[]", ["'{a,\"b c\",NULL,\"NULL\"}'", "'{}'"], ["array_to_string(v, '-', '?')", "v[2]", "v @> '{a}'"]),
    "range": Family("int4range", ["'[1,5)'", "'empty'", "'(,3]'"], ["v @> 2", "lower(v)", "isempty(v)", "v * '[2,4)'"]),
    "multirange": Family("int4multirange", ["'{[1,3),[5,7)}'", "'{}'"], ["v @> 2", "range_merge(v)"]),
    "times": Family("tstzrange", ["'[2026-01-01 00:00+02,2026-02-01 00:00+00)'", "'(,)'"], ["upper_inf(v)", "lower(v)"]),
    "enum": Family("mood", ["'low'", "'high'", "'so so'"], ["v >= 'so so'", "v::text || '.'"]),
    "domain": Family("positive", ["1", "2", "30"], ["v * 2", "v % 2 = 0"]),
    "composite": Family("spot", ["'(1,a)'", "'(,\"b \"\"c\"\"\")'", "'(,)'"], ["(v).x", "(v).label IS NULL", "v IS NULL"]),
    "uuid": Family("uuid", ["'aaaaaaaa-0000-4000-8000-000000000001'", "'BBBBBBBB-0000-4000-8000-000000000002'"], ["v::text", "left(v::text, 8)"]),
    "inet": Family("inet", ["'10.0.0.1/8'", "'10.0.0.1'", "'::1'"], ["host(v)", "masklen(v)", "network(v)", "v << '10.0.0.0/8'"]),
    "macaddr": Family("macaddr", ["'08:00:2b:01:02:03'", "'08:00:2b:01:02:04'"], ["trunc(v)"]),
    "money": Family("money", ["'1.50'", "'-2'", "'1000'"], ["v * 2", "v::numeric", "v > '1'::money"]),
    "interval": Family("interval", ["'1 day'", "'24 hours'", "'-1 mon 3 s'"], ["v * 2", "extract(epoch FROM v)", "justify_hours(v)"]),
    "timestamptz": Family("timestamptz", ["'2026-03-29 01:30+00'", "'2026-10-25 03:30+02'", "'infinity'"], ["v AT TIME ZONE 'Europe/Vienna'", "v > '2026-06-01 00:00+00'", "isfinite(v)"]),
    "date": Family("date", ["'2026-02-28'", "'0044-03-15 BC'"], ["v + 1", "extract(isodow FROM v)", "to_char(v, 'IYYY-IW')"]),
    "time": Family("time", ["'12:00'", "'24:00'", "'00:00:00.000001'"], ["v + interval '1 hour'"]),
    "tsvector": Family("tsvector", ["'a:1A b:2'", "''"], ["v @@ 'a'::tsquery", "length(v)", "strip(v)"]),
    "bit": Family("bit(4)", ["B'1010'", "B'0000'"], ["v & B'1100'", "v::text", "bit_count(v)"]),
    "point": Family("point", ["'(1,2)'", "'(-0,0)'"], ["v[0]", "v <-> '(0,0)'"]),
    "box": Family("box", ["'(1,2),(0,0)'"], ["area(v)", "center(v)"]),
    "bool": Family("bool", ["true", "false"], ["NOT v", "v IS NOT FALSE", "v::int"]),
    "oid": Family("oid", ["7", "4294967295"], ["v::text"]),
    "xml": Family("xml", ["'<a>1</a>'", "'<b x=\"1\"/>'"], ["v::text", "xpath('/a/text()', v)::text"]),
}  # fmt: skip

# Definitions over the tables below. Where it says tenant_id, that is the view's; keys are left out where whole rows are.
SHAPES = """
SELECT tenant_id, id, row_number() OVER w AS a, rank() OVER (PARTITION BY tenant_id ORDER BY n) AS b, lag(n) OVER w AS c, sum(n) OVER w AS d FROM things WINDOW w AS (PARTITION BY tenant_id ORDER BY n, id)
SELECT tenant_id, id, sum(n) OVER (PARTITION BY tenant_id ORDER BY id ROWS BETWEEN 2 PRECEDING AND CURRENT ROW EXCLUDE TIES) AS a FROM things
SELECT tenant_id, id, count(*) OVER (PARTITION BY tenant_id ORDER BY n RANGE BETWEEN 1 PRECEDING AND 1 FOLLOWING) AS a FROM things
SELECT tenant_id, id, sum(n) OVER (PARTITION BY tenant_id ORDER BY n GROUPS BETWEEN 1 PRECEDING AND CURRENT ROW) AS a FROM things
SELECT tenant_id, id, ntile(3) OVER (PARTITION BY tenant_id ORDER BY id) AS a, cume_dist() OVER (PARTITION BY tenant_id ORDER BY n) AS b, percent_rank() OVER (PARTITION BY tenant_id ORDER BY n) AS c FROM things
SELECT tenant_id, id, nth_value(id, 2) OVER (PARTITION BY tenant_id ORDER BY id ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING) AS a FROM things
SELECT tenant_id, t, sum(count(*)) OVER (PARTITION BY tenant_id) AS a, count(*) AS b FROM things GROUP BY 1, 2
SELECT * FROM (SELECT tenant_id, id, t, row_number() OVER (PARTITION BY tenant_id, t ORDER BY n DESC, id) AS place FROM things) x WHERE place <= 2
SELECT tenant_id, id, dense_rank() OVER (PARTITION BY tenant_id ORDER BY n NULLS FIRST) AS a, avg(n) FILTER (WHERE n > 1) OVER (PARTITION BY tenant_id, t) AS b FROM things
SELECT tenant_id, id, string_agg(t, ',') OVER (PARTITION BY tenant_id ORDER BY id) AS a FROM things
SELECT tenant_id, t FROM things UNION SELECT tenant_id, t FROM parts
SELECT tenant_id, n FROM things UNION ALL SELECT tenant_id, n FROM parts UNION ALL SELECT tenant_id, n FROM things WHERE n > 2
SELECT tenant_id, n FROM things INTERSECT SELECT tenant_id, n FROM parts
SELECT tenant_id, n FROM things INTERSECT ALL SELECT tenant_id, n FROM parts
SELECT tenant_id, n FROM things EXCEPT SELECT tenant_id, n FROM parts
SELECT tenant_id, n FROM things EXCEPT ALL SELECT tenant_id, n FROM parts
(SELECT tenant_id, n FROM things UNION SELECT tenant_id, n FROM parts) EXCEPT SELECT tenant_id, 1 FROM things
SELECT tenant_id, kind, sum(n) AS n FROM (SELECT tenant_id, 'thing' AS kind, n FROM things UNION ALL SELECT tenant_id, 'part', n FROM parts) u GROUP BY 1, 2
SELECT tenant_id, t, n % 2 AS odd, grouping(t, n % 2) AS level, count(*) AS k FROM things GROUP BY tenant_id, GROUPING SETS ((t, n % 2), (t), ())
SELECT tenant_id, t, n, count(*) AS k FROM things GROUP BY tenant_id, ROLLUP (t, n)
SELECT tenant_id, t, n, count(*) AS k, grouping(t, n) AS g FROM things GROUP BY tenant_id, CUBE (t, n)
SELECT tenant_id, t, sum(n) AS n FROM things GROUP BY GROUPING SETS ((tenant_id, t), (tenant_id)) HAVING count(*) > 1
SELECT tenant_id, t, count(*) AS k FROM things GROUP BY DISTINCT tenant_id, ROLLUP (t), ROLLUP (t)
SELECT a.tenant_id, a.id, x.id AS x FROM things a CROSS JOIN LATERAL (SELECT b.id FROM parts b WHERE b.tenant_id = a.tenant_id AND b.n <= a.n ORDER BY b.n DESC, b.id LIMIT 2) x
SELECT a.tenant_id, a.id, x.n, x.k FROM things a LEFT JOIN LATERAL (SELECT sum(l.n) AS n, count(*) AS k FROM lines l WHERE l.thing_id = a.id) x ON true
SELECT a.tenant_id, a.id, g.i FROM things a CROSS JOIN LATERAL generate_series(1, a.n) AS g (i)
SELECT a.tenant_id, a.id, u.value, u.place FROM things a CROSS JOIN LATERAL unnest(ARRAY[a.n, a.parent, 7]) WITH ORDINALITY AS u (value, place)
SELECT a.tenant_id, a.id, w.word FROM things a CROSS JOIN LATERAL regexp_split_to_table(coalesce(a.t, 'none at all'), ' ') AS w (word)
SELECT a.tenant_id, a.id, j.key, j.value FROM things a CROSS JOIN LATERAL jsonb_each_text(to_jsonb(a) - 'tenant_id' - 'id') AS j (key, value)
SELECT a.tenant_id, a.id, e.x FROM things a CROSS JOIN LATERAL ROWS FROM (generate_series(1, 2), unnest(ARRAY['p', 'q', 'r'])) AS e (i, x)
WITH RECURSIVE tree AS (SELECT tenant_id, id, 1 AS depth FROM things WHERE parent IS NULL UNION ALL SELECT c.tenant_id, c.id, p.depth + 1 FROM things c JOIN tree p ON c.parent = p.id AND c.tenant_id = p.tenant_id WHERE p.depth < 9) SELECT * FROM tree
WITH RECURSIVE up AS (SELECT tenant_id, id AS start, id, parent FROM things UNION SELECT u.tenant_id, u.start, p.id, p.parent FROM up u JOIN things p ON p.id = u.parent AND p.tenant_id = u.tenant_id) SELECT tenant_id, start, count(*) AS above FROM up GROUP BY 1, 2
WITH RECURSIVE tree AS (SELECT tenant_id, id, n FROM things WHERE parent IS NULL UNION ALL SELECT c.tenant_id, c.id, c.n FROM things c JOIN tree p ON c.parent = p.id AND c.tenant_id = p.tenant_id) CYCLE id SET looped USING path SELECT tenant_id, id, n, looped FROM tree
WITH RECURSIVE tree AS (SELECT tenant_id, id FROM things WHERE parent IS NULL UNION ALL SELECT c.tenant_id, c.id FROM things c JOIN tree p ON c.parent = p.id AND c.tenant_id = p.tenant_id) SEARCH DEPTH FIRST BY id SET way CYCLE id SET looped USING path SELECT tenant_id, id, array_length(way, 1) AS depth FROM tree
WITH RECURSIVE days (i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM days WHERE i < 3) SELECT a.tenant_id, a.id, d.i FROM things a CROSS JOIN days d
WITH sums AS (SELECT tenant_id, sum(n) AS n FROM things GROUP BY 1) SELECT a.tenant_id, a.id, a.n * 100 / nullif(s.n, 0) AS share FROM things a JOIN sums s USING (tenant_id)
WITH x AS MATERIALIZED (SELECT tenant_id, t, max(n) AS n FROM things GROUP BY 1, 2), y AS (SELECT tenant_id, count(*) AS k FROM x GROUP BY 1) SELECT x.*, y.k FROM x JOIN y USING (tenant_id)
SELECT tenant_id, array_agg(id ORDER BY n DESC, id) AS a, string_agg(t, ';' ORDER BY t, id) AS b, jsonb_agg(n ORDER BY id) AS c FROM things GROUP BY 1
SELECT tenant_id, json_object_agg(id, n ORDER BY id) AS a, jsonb_object_agg(id::text, t) AS b FROM things GROUP BY 1
SELECT tenant_id, count(*) FILTER (WHERE n > 1) AS a, sum(n) FILTER (WHERE t IS NOT NULL) AS b, max(id) FILTER (WHERE false) AS c FROM things GROUP BY 1
SELECT tenant_id, percentile_disc(0.5) WITHIN GROUP (ORDER BY n) AS a, percentile_cont(ARRAY[0.25, 0.75]) WITHIN GROUP (ORDER BY n) AS b, mode() WITHIN GROUP (ORDER BY t) AS c FROM things GROUP BY 1
SELECT tenant_id, rank(2) WITHIN GROUP (ORDER BY n) AS a, bool_and(n > 0) AS b, every(t IS NULL) AS c, bit_or(n) AS d FROM things GROUP BY 1
SELECT tenant_id, count(DISTINCT n) AS a, array_agg(DISTINCT n) AS b, sum(DISTINCT n) AS c, avg(n)::numeric(10, 3) AS d, variance(n) AS e, stddev_pop(n::numeric) AS f FROM things GROUP BY 1
SELECT tenant_id, corr(n::numeric::float8, 1) IS NULL AS a, regr_count(n, id) AS b, range_agg(int4range(least(n, 5), 6)) AS c FROM things GROUP BY 1
SELECT DISTINCT ON (tenant_id, t) tenant_id, t, id, n FROM things ORDER BY tenant_id, t, n DESC NULLS LAST, id
SELECT DISTINCT ON (tenant_id) * FROM (SELECT tenant_id, id, n FROM things UNION ALL SELECT tenant_id, -id, n FROM parts) u ORDER BY tenant_id, n, id
SELECT DISTINCT tenant_id, n > 1 AS large, t FROM things
SELECT tenant_id, id, CASE WHEN n IS NULL THEN 'none' WHEN n > 2 THEN 'large' ELSE 'small' END AS size, CASE t WHEN 'a' THEN 1 END AS a FROM things
SELECT tenant_id, id, coalesce(t, 'none') AS a, nullif(n, 1) AS b, greatest(n, parent, 2) AS c, least(n, parent) AS d FROM things
SELECT tenant_id, id FROM things a WHERE EXISTS (SELECT FROM parts b WHERE b.tenant_id = a.tenant_id AND b.n = a.n)
SELECT tenant_id, id FROM things a WHERE NOT EXISTS (SELECT FROM parts b WHERE b.tenant_id = a.tenant_id AND b.t = a.t)
SELECT tenant_id, id FROM things a WHERE n = ANY (SELECT b.n FROM parts b WHERE b.tenant_id = a.tenant_id)
SELECT tenant_id, id FROM things a WHERE n >= ALL (SELECT b.n FROM parts b WHERE b.tenant_id = a.tenant_id AND b.n IS NOT NULL)
SELECT tenant_id, id FROM things a WHERE n NOT IN (SELECT b.n FROM parts b WHERE b.tenant_id = a.tenant_id)
SELECT tenant_id, id FROM things a WHERE (n, t) IN (SELECT b.n, b.t FROM parts b WHERE b.tenant_id = a.tenant_id)
SELECT tenant_id, id, n IN (1, 2) AS a, t = ANY ('{a,b}') AS b, n BETWEEN 1 AND 2 AS c, t LIKE '%a%' AS d, t ~ '^[ab]' AS e, t SIMILAR TO '(a|b)%' AS f FROM things
SELECT a.tenant_id, a.id, v.name FROM things a LEFT JOIN (VALUES (0, 'none'), (1, 'one'), (2, 'two')) v (n, name) ON v.n = a.n
SELECT a.tenant_id, v.i, sum(a.n * v.i) AS n FROM things a CROSS JOIN (VALUES (1), (2)) v (i) GROUP BY 1, 2
SELECT a.tenant_id, a.id, b.id AS b FROM things a JOIN parts b ON b.tenant_id = a.tenant_id AND b.n = a.n
SELECT a.tenant_id, a.id, b.id AS b FROM things a LEFT JOIN parts b ON b.tenant_id = a.tenant_id AND b.t = a.t
SELECT b.tenant_id, a.id, b.id AS b FROM things a RIGHT JOIN parts b ON b.tenant_id = a.tenant_id AND b.n = a.n
SELECT coalesce(a.tenant_id, b.tenant_id) AS tenant_id, a.id, b.id AS b FROM things a FULL JOIN parts b ON b.tenant_id = a.tenant_id AND b.id = a.id
SELECT tenant_id, t, a.n, b.n AS m FROM (SELECT tenant_id, t, sum(n) AS n FROM things WHERE t IS NOT NULL GROUP BY 1, 2) a FULL JOIN (SELECT tenant_id, t, sum(n) AS n FROM parts WHERE t IS NOT NULL GROUP BY 1, 2) b USING (tenant_id, t)
SELECT tenant_id, a.id, b.id AS b FROM things a JOIN parts b USING (tenant_id, id)
SELECT tenant_id, id, t FROM things NATURAL JOIN (SELECT tenant_id, id FROM parts) b
SELECT a.tenant_id, a.id, b.id AS b FROM things a JOIN things b ON b.tenant_id = a.tenant_id AND b.n = a.n AND b.id > a.id
SELECT c.tenant_id, c.id, p.t AS parent FROM things c LEFT JOIN things p ON p.id = c.parent AND p.tenant_id = c.tenant_id
SELECT a.tenant_id, a.id FROM things a LEFT JOIN parts b ON b.tenant_id = a.tenant_id AND b.n = a.n WHERE b.id IS NULL
SELECT tenant_id, id, (SELECT count(*) FROM parts b WHERE b.tenant_id = a.tenant_id AND b.n < a.n) AS k FROM things a
SELECT tenant_id, id, ARRAY(SELECT b.id FROM parts b WHERE b.tenant_id = a.tenant_id ORDER BY b.id) AS ids FROM things a
SELECT tenant_id, id, (SELECT b.t FROM parts b WHERE b.tenant_id = a.tenant_id ORDER BY b.n DESC, b.id LIMIT 1) AS best FROM things a
SELECT tenant_id, id FROM things a WHERE n > (SELECT avg(b.n) FROM things b WHERE b.tenant_id = a.tenant_id AND b.t IS NOT DISTINCT FROM a.t)
SELECT tenant_id, sum(n) AS n FROM things a GROUP BY 1 HAVING sum(n) > (SELECT coalesce(sum(b.n), 0) FROM parts b WHERE b.tenant_id = a.tenant_id)
SELECT * FROM big
SELECT tenant_id, count(*) AS k FROM big JOIN totals USING (tenant_id) GROUP BY 1
SELECT t.tenant_id, t.n, b.id FROM totals t LEFT JOIN big b USING (tenant_id)
SELECT tenant_id, id, gen, gen + n AS more FROM things
SELECT tenant_id, gen, count(*) AS k FROM things GROUP BY 1, 2 HAVING count(*) > 1
SELECT tenant_id, id, n, t FROM parts
SELECT tenant_id, t, count(*) AS k, min(id) AS first FROM parts GROUP BY 1, 2
SELECT tenant_id, id, lead(id) OVER (PARTITION BY tenant_id ORDER BY id) AS next FROM parts WHERE id % 2 = 0
SELECT a.tenant_id, l.id, l.n FROM things a JOIN lines l ON l.thing_id = a.id
SELECT a.tenant_id, a.id, count(l.id) AS k, sum(l.n) AS n FROM things a LEFT JOIN lines l ON l.thing_id = a.id GROUP BY 1, 2
SELECT a.tenant_id, a.t, l.n FROM things a JOIN lines l ON l.thing_id = a.id WHERE l.n = (SELECT max(m.n) FROM lines m WHERE m.thing_id = a.id)
SELECT a.tenant_id, a.id, a.n * r.factor AS worth FROM things a JOIN rates r ON r.t = a.t
SELECT a.tenant_id, r.t, count(a.id) AS k FROM (SELECT DISTINCT tenant_id FROM things) x CROSS JOIN rates r LEFT JOIN things a ON a.tenant_id = x.tenant_id AND a.t = r.t GROUP BY a.tenant_id, r.t HAVING a.tenant_id IS NOT NULL
SELECT tenant_id, id, n FROM things WHERE t IN (SELECT t FROM rates WHERE factor > 1)
SELECT tenant_id, (sum(n) / nullif(count(*), 0))::numeric(12, 4) AS a, (array_agg(id ORDER BY id))[1] AS b FROM things GROUP BY 1
SELECT tenant_id, jsonb_build_object('id', id, 'n', n, 'lines', (SELECT jsonb_agg(l.n ORDER BY l.id) FROM lines l WHERE l.thing_id = a.id)) AS doc FROM things a
SELECT tenant_id, to_jsonb(a) - 'tenant_id' AS doc, a.id FROM (SELECT tenant_id, id, n, t FROM things) a
SELECT tenant_id, id, format('%s-%s', n, t) AS a, concat_ws(':', t, n, parent) AS b, t COLLATE "C" < 'b' AS c, row(n, t) = row(1, 'a') AS d FROM things
SELECT tenant_id, id, x.* FROM things a CROSS JOIN LATERAL (SELECT a.n + 1 AS more, CASE WHEN a.n = 0 THEN NULL ELSE 10 / a.n END AS part) x
SELECT tenant_id, count(*) AS k, '{"a": 1}'::jsonb AS constant, 1.50 AS number, NULL::text AS nothing FROM things GROUP BY 1
SELECT tenant_id, width_bucket(n, 0, 4, 2) AS bucket, count(*) AS k FROM things WHERE n IS NOT NULL GROUP BY 1, 2
"""

SCHEMA = """
SET ROLE listener_owner;
CREATE TYPE mood AS ENUM ('low', 'so so', 'high');
CREATE DOMAIN positive AS int CHECK (VALUE > 0);
CREATE TYPE spot AS (x int, label text);
CREATE TABLE things (id int PRIMARY KEY, tenant_id {tenant} NOT NULL, n int, t text, parent int,
                     gen int GENERATED ALWAYS AS (coalesce(n, 0) * 2) STORED);
CREATE TABLE values_of (id int PRIMARY KEY, tenant_id {tenant} NOT NULL, n int, {typed});
CREATE TABLE parts (id int PRIMARY KEY, tenant_id {tenant} NOT NULL, n int, t text) PARTITION BY RANGE (id);
CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (MINVALUE) TO (8);
CREATE TABLE parts_2 (t text, n int, tenant_id {tenant} NOT NULL, id int PRIMARY KEY);
ALTER TABLE parts ATTACH PARTITION parts_2 FOR VALUES FROM (8) TO (MAXVALUE);
CREATE TABLE lines (id int PRIMARY KEY, thing_id int, n int);
CREATE TABLE rates (t text PRIMARY KEY, factor int);
CREATE INDEX ON things (tenant_id); CREATE INDEX ON parts (tenant_id); CREATE INDEX ON values_of (tenant_id);
CREATE INDEX ON lines (thing_id);
CREATE VIEW big WITH (security_invoker) AS SELECT tenant_id, id, n, t FROM things WHERE n > 1;
CREATE VIEW totals WITH (security_invoker) AS SELECT tenant_id, sum(n) AS n FROM (SELECT * FROM big UNION ALL SELECT tenant_id, id, n, t FROM parts) u GROUP BY 1;
GRANT SELECT ON ALL TABLES IN SCHEMA public TO listener_service;
RESET ROLE;
"""
LOOKUP = (
    "SELECT listener.add_source('lines', through => 'things', columns => '{thing_id}', references_columns => '{id}')"
)


def definitions(*, xml: bool) -> list[tuple[list[str], str]]:
    """Key columns and query of each."""
    typed: list[tuple[list[str], str]] = []
    for name, family in families(xml=xml).items():
        column = f"{name}_"
        shown = ", ".join(f"{renamed(text, column)} AS x{i}" for i, text in enumerate(family.expressions))
        typed += [
            (["id"], f"SELECT tenant_id, id, {column}, {shown} FROM values_of"),
            (["n"], f"""SELECT tenant_id, n, count({column}) AS k, count(DISTINCT {column}::text) AS d,
                        string_agg({column}::text, '|' ORDER BY id) AS gathered,
                        (array_agg({column}::text ORDER BY id DESC))[1] AS last FROM values_of GROUP BY 1, 2"""),
            ([], f"""SELECT tenant_id, {column}, lag({column}) OVER (PARTITION BY tenant_id ORDER BY id) AS before,
                     CASE WHEN n > 1 THEN {column} END AS some FROM values_of WHERE n IS DISTINCT FROM 0"""),
        ]  # fmt: skip
    return typed + [([], line) for line in SHAPES.strip().splitlines()]


def renamed(expression: str, column: str) -> str:
    """The expression over this column."""
    return re.sub(r"\bv\b", column, expression)


def families(*, xml: bool) -> dict[str, Family]:
    """The types; a server may have been built without xml."""
    return {name: family for name, family in TYPES.items() if xml or name != "xml"}


def schema(tenant_type: str, *, xml: bool) -> str:
    """The tables, empty."""
    typed = ", ".join(f"{name}_ {family.declared}" for name, family in families(xml=xml).items())
    return SCHEMA.format(tenant=tenant_type, typed=typed)


class Writer:
    """Random statements; few ids and few values, so that tenants and rows meet."""

    def __init__(self, chance: random.Random, tenant_type: str, *, xml: bool) -> None:
        self._chance = chance
        self._tenants = TENANTS[tenant_type]
        self._families = families(xml=xml)

    def statement(self) -> str:
        """One."""
        pick, number = self._chance.choice, self._chance.randint
        table = pick(("things", "things", "parts", "values_of"))
        ids = f"id BETWEEN {(low := number(0, 14))} AND {low + number(0, 4)}"
        rows = ", ".join(self._row(table, key) for key in self._chance.sample(range(15), number(1, 6)))
        columns = self._columns(table)
        changed = ", ".join(f"{name} = excluded.{name}" for name in columns if name != "id")
        return pick((
            f"INSERT INTO {table} ({', '.join(columns)}) VALUES {rows} ON CONFLICT DO NOTHING",
            f"INSERT INTO {table} ({', '.join(columns)}) VALUES {rows} ON CONFLICT (id) DO UPDATE SET {changed}",
            f"INSERT INTO {table} ({', '.join(columns)}) VALUES {rows} ON CONFLICT (id) DO UPDATE SET {changed}",
            f"UPDATE {table} SET n = {self._number()} WHERE {ids}",
            f"UPDATE {table} SET tenant_id = {pick(self._tenants)} WHERE {ids}",
            f"UPDATE values_of SET {self._typed_change()} WHERE {ids}",
            f"UPDATE things SET parent = {pick(('NULL', str(number(0, 14))))}, t = {self._text()} WHERE {ids}",
            f"UPDATE parts SET id = {number(0, 14)} WHERE id = {number(0, 14)}",
            f"DELETE FROM {table} WHERE {ids} AND n > {number(0, 4)}",
            f"""MERGE INTO things USING (VALUES ({number(0, 14)}, {self._number()}), ({number(15, 16)}, 3)) s (id, n) ON things.id = s.id
                WHEN MATCHED AND s.n > 2 THEN DELETE WHEN MATCHED THEN UPDATE SET n = s.n, tenant_id = {pick(self._tenants)}
                WHEN NOT MATCHED THEN INSERT (id, tenant_id, n) VALUES (s.id, {pick(self._tenants)}, s.n)""",
            f"""INSERT INTO lines SELECT i, {number(0, 14)}, {number(0, 4)} FROM generate_series({low}, {low + 2}) i
                ON CONFLICT (id) DO UPDATE SET thing_id = excluded.thing_id, n = excluded.n""",
            f"DELETE FROM lines WHERE {ids}",
            f"""INSERT INTO rates VALUES ({pick(("'a'", "'b'", "'a b'"))}, {number(0, 3)}) ON CONFLICT (t) DO UPDATE SET factor = excluded.factor""",
            *(f"TRUNCATE {pick((table, 'lines', 'rates'))}" for _ in range(number(0, 9) == 0)),
        ))  # fmt: skip

    def _columns(self, table: str) -> list[str]:
        own = {"things": ["t", "parent"], "parts": ["t"], "values_of": [f"{name}_" for name in self._families]}
        return ["id", "tenant_id", "n", *own[table]]

    def _row(self, table: str, key: int) -> str:
        own = {
            "things": lambda: [self._text(), self._chance.choice(("NULL", str(self._chance.randint(0, 14))))],
            "parts": lambda: [self._text()],
            "values_of": lambda: [self._value(family) for family in self._families.values()],
        }
        return f"({', '.join([str(key), self._chance.choice(self._tenants), self._number(), *own[table]()])})"

    def _number(self) -> str:
        return self._chance.choice(("0", "1", "2", "3", "4", "NULL"))

    def _text(self) -> str:
        return self._chance.choice(("'a'", "'b'", "'a b'", "'A'", "''", "NULL"))

    def _value(self, family: Family) -> str:
        return self._chance.choice([*family.values, "NULL"])

    def _typed_change(self) -> str:
        some = self._chance.sample(sorted(self._families), 6)
        return ", ".join(f"{name}_ = {self._value(self._families[name])}" for name in some)
