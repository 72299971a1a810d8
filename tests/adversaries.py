"""Queries that look tenant-local and are not: each joins, groups or compares tenants by something looser than their text.

Tenants of one number or one word have several texts here: '7' and '07', 'a' and 'A', a uuid in capital letters.
"""

# ruff: noqa: S608, E501 - the queries are a line each

from __future__ import annotations

import random
from collections.abc import Callable

ID = "aaaaaaaa-0000-4000-8000-00000000000"
UUIDS = [f"{ID}1", f"{ID}2", f"{ID}3"]
# By the type of the view's tenant column: the tenants, as they are written there.
TENANTS = {
    "text": ["7", "07", "a", "A", "a ", "ab", *UUIDS[:2], UUIDS[0].upper()],
    "uuid": UUIDS,
    "integer": ["7", "8", "17"],
    "bigint": ["7", "8", "17"],
}

SCHEMA = """
CREATE SCHEMA odd AUTHORIZATION listener_owner;
SET ROLE listener_owner;
SET search_path = odd;
CREATE TABLE words (id int PRIMARY KEY, tenant_id text, code text, n int);
CREATE TABLE notes (id int PRIMARY KEY, tenant_id text, code text, n int);
CREATE TABLE brief (id int PRIMARY KEY, tenant_id varchar, n int);
CREATE TABLE short (id int PRIMARY KEY, tenant_id varchar, n int);
CREATE TABLE ids (id int PRIMARY KEY, tenant_id uuid, n int);
CREATE TABLE numbers (id int PRIMARY KEY, tenant_id int, n int);
CREATE TABLE others (id int PRIMARY KEY, tenant_id int, n int);
CREATE TABLE lists (id int PRIMARY KEY, whose text[], tenant_id text, n int);
-- A row of items finds its tenant through its box, by the box's code.
CREATE TABLE boxes (code text PRIMARY KEY, tenant_id text, n int);
CREATE TABLE items (id int PRIMARY KEY, code text, n int);
CREATE FUNCTION same(text, text) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT lower($1) = lower($2)';
CREATE FUNCTION same_word(text, text) RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS 'BEGIN RETURN lower($1) = lower($2); END';
CREATE OPERATOR = (leftarg = text, rightarg = text, function = same_word);
CREATE FUNCTION same_varchar(varchar, varchar) RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS 'BEGIN RETURN lower($1) = lower($2); END';
CREATE OPERATOR = (leftarg = varchar, rightarg = varchar, function = same_varchar);
CREATE FUNCTION same_number(text, int) RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS 'BEGIN RETURN ltrim($1, ''0'') = $2::text; END';
CREATE OPERATOR = (leftarg = text, rightarg = int, function = same_number);
CREATE FUNCTION inlined(text, text) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT $1 OPERATOR(odd.=) $2';
CREATE FUNCTION parsed(text, text) RETURNS boolean LANGUAGE sql IMMUTABLE RETURN $1 OPERATOR(odd.=) $2;
CREATE FUNCTION rounded(text, int) RETURNS text LANGUAGE sql IMMUTABLE RETURN left($1, $2);
CREATE DOMAIN word AS text;
CREATE FUNCTION as_number(text) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT length($1)';
CREATE VIEW by_word AS SELECT lower(btrim(tenant_id)) AS word, sum(n) AS n FROM notes GROUP BY 1;
CREATE VIEW folded AS SELECT w.tenant_id, m.n FROM words w JOIN notes m ON m.tenant_id OPERATOR(odd.=) w.tenant_id;
CREATE FUNCTION id_of(text) RETURNS uuid LANGUAGE plpgsql IMMUTABLE AS
    'BEGIN RETURN overlay(lower($1) PLACING ''1'' FROM length($1)); END';
GRANT USAGE ON SCHEMA odd TO listener_service, listener_migrator;
GRANT SELECT ON ALL TABLES IN SCHEMA odd TO listener_service;
RESET search_path;
RESET ROLE;
CREATE CAST (varchar AS uuid) WITH FUNCTION odd.id_of(text);
"""

# A look-up of items through boxes, by the box's code.
LOOKUP = "SELECT listener.add_source('odd.items', 'tenant_id', 'odd.boxes', '{code}', '{code}')"

JOINED = "SELECT w.tenant_id, w.id, m.n FROM words w JOIN notes m ON "
SHORT = "SELECT w.tenant_id, w.id, m.n FROM brief w JOIN short m ON "

# By the type of the tenant column: queries over tables of texts that are all numbers, or all uuids, where they say so.
QUERIES: dict[str, tuple[str, str]] = {
    # -- a cast in a join
    "as numbers": ("text", f"{JOINED} w.tenant_id::int = m.tenant_id::int"),
    "as large numbers": ("text", f"{JOINED} w.tenant_id::bigint = m.tenant_id::bigint"),
    "as small numbers": ("text", f"{JOINED} w.tenant_id::smallint = m.tenant_id::smallint"),
    "as numbers of two sizes": ("text", f"{JOINED} w.tenant_id::int = m.tenant_id::bigint"),
    "as decimals": ("text", f"{JOINED} w.tenant_id::numeric = m.tenant_id::numeric"),
    "as floats": ("text", f"{JOINED} w.tenant_id::float8 = m.tenant_id::float8"),
    "as numbers and back": ("text", f"{JOINED} w.tenant_id::int::text = m.tenant_id::int::text"),
    "one side a number and back": ("text", f"{JOINED} w.tenant_id = m.tenant_id::int::text"),
    "as numbers, where": ("text", "SELECT w.tenant_id, m.n FROM words w, notes m WHERE w.tenant_id::int = m.tenant_id::int"),
    "as numbers, left": ("text", "SELECT w.tenant_id, m.n FROM words w LEFT JOIN notes m ON w.tenant_id::int = m.tenant_id::int"),
    "as numbers, exists": (
        "text", "SELECT tenant_id, id FROM words w WHERE EXISTS (SELECT FROM notes m WHERE m.tenant_id::int = w.tenant_id::int)"),
    "as numbers, not exists": (
        "text", "SELECT tenant_id, id FROM words w WHERE NOT EXISTS (SELECT FROM notes m WHERE m.tenant_id::int = w.tenant_id::int)"),
    "as numbers, in": ("text", "SELECT tenant_id, id FROM words w WHERE tenant_id::int IN (SELECT tenant_id::int FROM notes)"),
    "as numbers, a row": (
        "text", "SELECT tenant_id, id FROM words w WHERE (tenant_id::int, n) IN (SELECT tenant_id::int, n FROM notes)"),
    "as numbers, rows compared": ("text", f"{JOINED} (w.tenant_id::int, w.n) = (m.tenant_id::int, m.n)"),
    "as numbers, lateral": (
        "text", "SELECT w.tenant_id, x.n FROM words w CROSS JOIN LATERAL (SELECT sum(n) AS n FROM notes m WHERE m.tenant_id::int = w.tenant_id::int) x"),
    "as numbers, a subquery": (
        "text", "SELECT tenant_id, (SELECT sum(n) FROM notes m WHERE m.tenant_id::int = w.tenant_id::int) FROM words w"),
    "as numbers, using": (
        "text", "SELECT w.tenant_id, m.n FROM (SELECT *, tenant_id::int AS t FROM words) w JOIN (SELECT tenant_id::int AS t, n FROM notes) m USING (t)"),
    "as numbers, grouped first": (
        "text", "SELECT w.tenant_id, m.n FROM words w JOIN (SELECT tenant_id::int AS t, sum(n) AS n FROM notes GROUP BY 1) m ON m.t = w.tenant_id::int"),
    "as numbers, full": (
        "text", "SELECT coalesce(w.tenant_id, m.tenant_id) AS tenant_id, w.n, m.n AS k FROM words w FULL JOIN notes m ON w.tenant_id::int = m.tenant_id::int"),
    "as numbers, not distinct": ("text", f"{JOINED} w.tenant_id::int IS NOT DISTINCT FROM m.tenant_id::int"),
    "through a table of numbers": (
        "text", "SELECT w.tenant_id, m.n FROM words w JOIN numbers x ON x.tenant_id = w.tenant_id::int JOIN notes m ON m.tenant_id::int = x.tenant_id"),
    "as numbers, with": (
        "text", "WITH m AS (SELECT tenant_id::int AS t, n FROM notes) SELECT w.tenant_id, m.n FROM words w JOIN m ON m.t = w.tenant_id::int"),
    # -- texts and uuids
    "a uuid shown as text": ("text", "SELECT i.tenant_id::text AS tenant_id, m.n FROM ids i JOIN notes m ON i.tenant_id = m.tenant_id::uuid"),
    "a uuid shown as text, by a subquery": (
        "text", "SELECT i.tenant_id::text AS tenant_id, (SELECT sum(n) FROM notes m WHERE m.tenant_id::uuid = i.tenant_id) FROM ids i"),
    "as uuids": ("text", f"{JOINED} w.tenant_id::uuid = m.tenant_id::uuid"),
    "as uuids and back": ("text", f"{JOINED} w.tenant_id::uuid::text = m.tenant_id::uuid::text"),
    "a number shown as text": ("text", "SELECT x.tenant_id::text AS tenant_id, m.n FROM numbers x JOIN notes m ON m.tenant_id::int = x.tenant_id"),
    # -- shortened
    "one letter": ("text", f"{JOINED} w.tenant_id::varchar(1) = m.tenant_id::varchar(1)"),
    "one letter of one side": ("text", f"{JOINED} w.tenant_id::varchar(1) = m.tenant_id"),
    "blanks at the end": ("text", f"{JOINED} w.tenant_id::bpchar = m.tenant_id::bpchar"),
    "blanks at the end of one": ("text", f"{JOINED} w.tenant_id = m.tenant_id::char(4)"),
    "blanks and back": ("text", f"{JOINED} w.tenant_id::bpchar::text = m.tenant_id::bpchar::text"),
    "a single byte": ("text", f'{JOINED} w.tenant_id::"char" = m.tenant_id::"char"'),
    # -- computed
    "lower": ("text", f"{JOINED} lower(w.tenant_id) = lower(m.tenant_id)"),
    "upper of one side": ("text", f"{JOINED} w.tenant_id = upper(m.tenant_id)"),
    "trimmed": ("text", f"{JOINED} btrim(w.tenant_id) = btrim(m.tenant_id)"),
    "left": ("text", f"{JOINED} left(w.tenant_id, 1) = left(m.tenant_id, 1)"),
    "a length": ("text", f"{JOINED} length(w.tenant_id) = length(m.tenant_id)"),
    "a hash": ("text", f"{JOINED} length(md5(w.tenant_id)) = length(md5(m.tenant_id))"),
    "case": ("text", f"{JOINED} CASE WHEN w.tenant_id = 'A' THEN 'a' ELSE w.tenant_id END = m.tenant_id"),
    "coalesce": ("text", f"{JOINED} coalesce(nullif(w.tenant_id, 'A'), 'a') = m.tenant_id"),
    "nullif": ("text", f"{JOINED} nullif(w.tenant_id, 'a') IS NOT DISTINCT FROM nullif(m.tenant_id, 'A')"),
    "ilike": ("text", f"{JOINED} w.tenant_id ILIKE m.tenant_id"),
    "like": ("text", f"{JOINED} w.tenant_id LIKE m.tenant_id || '%'"),
    "a regular expression": ("text", f"{JOINED} w.tenant_id ~* m.code"),
    "greater": ("text", f"{JOINED} w.tenant_id >= m.tenant_id"),
    "different": ("text", f"{JOINED} w.tenant_id <> m.tenant_id"),
    "a range": ("text", f"{JOINED} m.tenant_id BETWEEN w.tenant_id AND w.tenant_id || 'zz'"),
    "or": ("text", f"{JOINED} w.tenant_id = m.tenant_id OR lower(w.tenant_id) = m.tenant_id"),
    "not": ("text", f"{JOINED} NOT (w.tenant_id = m.tenant_id) AND w.n = m.n"),
    "true or": ("text", f"{JOINED} (w.tenant_id = m.tenant_id) IS NOT NULL"),
    "the outcome compared": ("text", f"{JOINED} (w.tenant_id = m.tenant_id) = (w.n = m.n)"),
    "any of a list": ("text", "SELECT w.tenant_id, l.n FROM words w JOIN lists l ON w.tenant_id = ANY (l.whose)"),
    "a list of one": ("text", "SELECT w.tenant_id, l.n FROM words w JOIN lists l ON l.whose[1] = w.tenant_id"),
    "a list contains": ("text", "SELECT w.tenant_id, l.n FROM words w JOIN lists l ON l.whose @> ARRAY[w.tenant_id]"),
    "another column": ("text", f"{JOINED} w.tenant_id = m.code"),
    "both, by another column": ("text", f"{JOINED} w.code = m.code"),
    # -- an operator, a cast or a function of somebody's own
    "an operator of one's own": ("text", f"{JOINED} w.tenant_id OPERATOR(odd.=) m.tenant_id"),
    "an operator of one's own, exists": (
        "text", "SELECT tenant_id FROM words w WHERE EXISTS (SELECT FROM notes m WHERE m.tenant_id OPERATOR(odd.=) w.tenant_id)"),
    "an operator of one's own, a subquery": (
        "text", "SELECT tenant_id, (SELECT sum(n) FROM notes m WHERE m.tenant_id OPERATOR(odd.=) w.tenant_id) FROM words w"),
    "an operator that is found first": ("text", f"{SHORT} w.tenant_id = m.tenant_id"),
    "an operator that is found first, using": (
        "text", "SELECT w.tenant_id, w.id, m.n FROM (SELECT tenant_id, tenant_id AS t, id FROM brief) w JOIN (SELECT tenant_id AS t, n FROM short) m USING (t)"),
    "an operator that is found first, in": ("text", "SELECT tenant_id, id FROM brief WHERE tenant_id IN (SELECT tenant_id FROM short)"),
    "an operator between two types": ("text", "SELECT w.tenant_id, x.n FROM words w JOIN numbers x ON w.tenant_id = x.tenant_id"),
    "an operator in a nested view": ("text", "SELECT * FROM folded"),
    "a function that is inlined": ("text", f"{JOINED} same(w.tenant_id, m.tenant_id)"),
    "an operator in a function that is inlined": ("text", f"{JOINED} inlined(w.tenant_id, m.tenant_id)"),
    "an operator in a function that is parsed": ("text", f"{JOINED} parsed(w.tenant_id, m.tenant_id)"),
    "a function that shortens": ("text", f"{JOINED} rounded(w.tenant_id, 1) = rounded(m.tenant_id, 1)"),
    "a function for a number": ("text", f"{JOINED} as_number(w.tenant_id) = as_number(m.tenant_id)"),
    "a cast of one's own": ("uuid", "SELECT i.tenant_id, s.n FROM ids i JOIN short s ON s.tenant_id::uuid = i.tenant_id"),
    # -- grouped, numbered, limited by something looser
    "grouped by a number": ("text", "SELECT min(tenant_id) AS tenant_id, sum(n) FROM words GROUP BY tenant_id::int"),
    "grouped by a word": ("text", "SELECT max(tenant_id) AS tenant_id, sum(n) FROM words GROUP BY lower(tenant_id)"),
    "a window by a number": ("text", "SELECT tenant_id, id, sum(n) OVER (PARTITION BY tenant_id::int) FROM words"),
    "a window by a word": ("text", "SELECT tenant_id, id, sum(n) OVER (PARTITION BY lower(tenant_id)) FROM words"),
    "distinct on a number": ("text", "SELECT DISTINCT ON (tenant_id::int) tenant_id, id FROM words ORDER BY tenant_id::int, n, id"),
    "distinct on a word": ("text", "SELECT DISTINCT ON (lower(tenant_id)) tenant_id, id FROM words ORDER BY lower(tenant_id), n, id"),
    "a nested view by word": ("text", "SELECT w.tenant_id, b.n FROM words w JOIN by_word b ON b.word = lower(w.tenant_id)"),
    "shown in lower case": ("text", "SELECT lower(tenant_id) AS tenant_id, sum(n) FROM words GROUP BY 1"),
    "shown as a number": ("text", "SELECT tenant_id::int::text AS tenant_id, sum(n) FROM words GROUP BY 1"),
    "shown trimmed": ("text", "SELECT btrim(tenant_id) AS tenant_id, sum(n) FROM words GROUP BY 1"),
    "a remainder": ("integer", "SELECT tenant_id % 10 AS tenant_id, sum(n) FROM numbers GROUP BY 1"),
    "rounded": ("integer", "SELECT a.tenant_id, b.n FROM numbers a JOIN others b ON a.tenant_id % 10 = b.tenant_id % 10"),
    "the distance": ("bigint", "SELECT a.tenant_id::bigint AS tenant_id, b.n FROM numbers a JOIN others b ON abs(a.tenant_id - b.tenant_id) < 2"),
    "a sum": ("integer", "SELECT a.tenant_id, b.n FROM numbers a JOIN others b ON a.tenant_id + 1 = b.tenant_id"),
    # -- a look-up by a key that is looser than the look-up's own
    "a look-up by numbers": ("text", "SELECT b.tenant_id, i.id, i.n FROM boxes b JOIN items i ON i.code::int = b.code::int"),
    "a look-up by words": ("text", "SELECT b.tenant_id, i.id, i.n FROM boxes b JOIN items i ON lower(i.code) = lower(b.code)"),
    "a look-up by an operator": ("text", "SELECT b.tenant_id, i.id, i.n FROM boxes b JOIN items i ON i.code OPERATOR(odd.=) b.code"),
    "a look-up by blanks": ("text", "SELECT b.tenant_id, i.id, i.n FROM boxes b JOIN items i ON i.code::bpchar = b.code::bpchar"),
    "a look-up by the first letter": ("text", "SELECT b.tenant_id, i.id, i.n FROM boxes b JOIN items i ON i.code::varchar(1) = b.code::varchar(1)"),
}  # fmt: skip

# The texts that the query can cast; where it casts to none of these types, any.
CASTS = {"::int": ["7", "07", "8"], "::bigint": ["7", "07"], "::smallint": ["7", "07"], "::uuid": [UUIDS[0], UUIDS[0].upper(), UUIDS[1]],
         "::numeric": ["7", "07"], "::float8": ["7", "07"], " numbers x": ["7", "07", "8"]}  # fmt: skip

TABLES = ("words", "notes", "brief", "short", "ids", "numbers", "others", "lists", "boxes")


def filling(query: str, chance: random.Random) -> list[str]:
    """Random rows, of texts that the query can cast."""
    texts = next((texts for cast, texts in CASTS.items() if cast in query), TENANTS["text"])

    def text() -> str:
        return f"'{chance.choice(texts)}'"

    def number() -> int:
        return chance.randint(0, 3)

    def some(table: str, row: Callable[[], str]) -> str:
        return f"INSERT INTO {table} VALUES " + ", ".join(f"({key}, {row()})" for key in range(chance.randint(4, 8)))

    return [
        *(some(table, lambda: f"{text()}, {text()}, {number()}") for table in ("words", "notes")),
        *(some(table, lambda: f"{text()}, {number()}") for table in ("brief", "short", "items")),
        *(some(table, lambda: f"{chance.choice((7, 8, 17))}, {number()}") for table in ("numbers", "others")),
        some("ids", lambda: f"'{chance.choice(UUIDS)}', {number()}"),
        some("lists", lambda: f"ARRAY[{text()}, {text()}], {text()}, {number()}"),
        "INSERT INTO boxes VALUES " + ", ".join(f"('{code}', {text()}, {number()})" for code in texts),
    ]
