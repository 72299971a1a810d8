"""Tables of tenants, and queries over them: those whose rows of a tenant depend on that tenant's rows alone, and others.

Of those that are not proven some are tenant-local all the same, which is said.
"""

# ruff: noqa: S608, E501 - the queries are made of the text below, and some are a line each

from __future__ import annotations

import random

from shop import ANNA, BERT, CLEO

SCHEMA = """
CREATE SCHEMA trade AUTHORIZATION listener_owner;
SET ROLE listener_owner;
SET search_path = trade;
CREATE TABLE tenants (id uuid PRIMARY KEY, name text);
CREATE TABLE orders (id int PRIMARY KEY, tenant_id uuid, product text, n int);
CREATE TABLE payments (id int PRIMARY KEY, tenant_id uuid NOT NULL, order_id int, product text, n int);
CREATE TABLE lines (id int PRIMARY KEY, order_id int, n int);
CREATE TABLE rates (product text PRIMARY KEY, factor int);
CREATE TABLE invoices (id int PRIMARY KEY, account uuid, n int);
CREATE TABLE texts (id int PRIMARY KEY, tenant_id varchar, n int);
CREATE TABLE numbers (id int PRIMARY KEY, tenant_id int, n int);
CREATE TABLE parts (id int, tenant_id uuid, product text, n int, PRIMARY KEY (id)) PARTITION BY RANGE (id);
CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (MINVALUE) TO (5);
CREATE TABLE parts_2 PARTITION OF parts FOR VALUES FROM (5) TO (MAXVALUE);
CREATE TABLE nodes (id int PRIMARY KEY, tenant_id uuid, parent int);
CREATE INDEX ON orders (tenant_id);
CREATE INDEX ON payments (tenant_id);
CREATE INDEX ON lines (order_id);
CREATE INDEX ON parts (tenant_id);
CREATE VIEW big AS SELECT * FROM orders WHERE n > 1;
CREATE VIEW ranked AS SELECT tenant_id, id, rank() OVER (ORDER BY n, id) AS place FROM big;
CREATE VIEW totals WITH (security_invoker) AS SELECT tenant_id, sum(n) AS n FROM big GROUP BY tenant_id;
CREATE MATERIALIZED VIEW stored AS SELECT tenant_id, id, rank() OVER (ORDER BY n, id) AS place FROM orders;
CREATE FUNCTION worth(int) RETURNS bigint LANGUAGE sql STABLE AS 'SELECT sum(n) FROM trade.payments WHERE id > $1';
GRANT USAGE ON SCHEMA trade TO listener_service, listener_migrator;
GRANT SELECT ON ALL TABLES IN SCHEMA trade TO listener_service;
RESET search_path;
RESET ROLE;
"""
SECURED = ("orders", "payments", "parts", "nodes")

# Each returns tenant_id; True: the planner proves it. None: it may or may not.
QUERIES: dict[str, tuple[bool | None, str]] = {
    "a table": (True, "SELECT * FROM orders"),
    "groups": (True, "SELECT tenant_id, product, sum(n) AS n FROM orders GROUP BY 1, 2"),
    "groups without the tenant": (
        False,
        "SELECT o.tenant_id, o.id, s.n FROM orders o JOIN (SELECT product, sum(n) AS n FROM orders GROUP BY 1) s USING (product)",
    ),
    "having": (True, "SELECT tenant_id, count(*) FROM orders GROUP BY 1 HAVING count(*) > 2"),
    "having of all": (
        False,
        "SELECT tenant_id, count(*) FROM orders GROUP BY 1 HAVING count(*) > (SELECT avg(n) FROM orders)",
    ),
    "rank by tenant": (True, "SELECT tenant_id, id, rank() OVER (PARTITION BY tenant_id ORDER BY n, id) FROM orders"),
    "rank of all": (False, "SELECT tenant_id, id, rank() OVER (ORDER BY n, id) FROM orders"),
    "two windows, one of all": (
        False,
        "SELECT tenant_id, id, rank() OVER (PARTITION BY tenant_id ORDER BY id), sum(n) OVER () FROM orders",
    ),
    "a share of the whole": (False, "SELECT tenant_id, sum(n) * 100 / sum(sum(n)) OVER () FROM orders GROUP BY 1"),
    "distinct on the tenant": (True, "SELECT DISTINCT ON (tenant_id) * FROM orders ORDER BY tenant_id, n, id"),
    "distinct on something else": (False, "SELECT DISTINCT ON (product) * FROM orders ORDER BY product, n, id"),
    "distinct": (True, "SELECT DISTINCT tenant_id, product FROM orders"),
    "limit": (False, "SELECT * FROM orders ORDER BY n, id LIMIT 3"),
    "offset": (False, "SELECT * FROM orders ORDER BY n, id OFFSET 3"),
    "a scalar subquery of all": (False, "SELECT tenant_id, id, n - (SELECT max(n) FROM payments) FROM orders"),
    "a scalar subquery by tenant": (
        True,
        "SELECT tenant_id, id, (SELECT max(n) FROM payments p WHERE p.tenant_id = o.tenant_id) FROM orders o",
    ),
    "a scalar subquery by product": (
        False,
        "SELECT tenant_id, id, (SELECT max(n) FROM payments p WHERE p.product = o.product) FROM orders o",
    ),
    "a scalar subquery by tenant, or": (
        False,
        "SELECT tenant_id, id, (SELECT max(n) FROM payments p WHERE p.tenant_id = o.tenant_id OR p.n = 1) FROM orders o",
    ),
    "a scalar subquery within a subquery": (
        True,
        """SELECT tenant_id, id, (SELECT count(*) FROM payments p WHERE p.tenant_id = o.tenant_id AND p.n >= (
            SELECT max(q.n) FROM payments q WHERE q.tenant_id = o.tenant_id AND q.product = p.product)) FROM orders o""",
    ),
    "exists by tenant": (
        True,
        "SELECT * FROM orders o WHERE EXISTS (SELECT FROM payments p WHERE p.tenant_id = o.tenant_id AND p.n = o.n)",
    ),
    "exists by tenant, shown": (
        True,
        "SELECT tenant_id, id, EXISTS (SELECT FROM payments p WHERE p.tenant_id = o.tenant_id AND p.n = o.n) FROM orders o",
    ),
    "exists without the tenant": (
        False,
        "SELECT * FROM orders o WHERE EXISTS (SELECT FROM payments p WHERE p.product = o.product)",
    ),
    "exists of anything": (False, "SELECT * FROM orders WHERE EXISTS (SELECT FROM payments)"),
    "not exists by tenant": (
        True,
        "SELECT * FROM orders o WHERE NOT EXISTS (SELECT FROM payments p WHERE p.tenant_id = o.tenant_id AND p.n = o.n)",
    ),
    "not exists without the tenant": (
        False,
        "SELECT * FROM orders o WHERE NOT EXISTS (SELECT FROM payments p WHERE p.n = o.n)",
    ),
    "in": (False, "SELECT * FROM orders WHERE product IN (SELECT product FROM payments)"),
    "in by tenant": (
        True,
        "SELECT * FROM orders o WHERE product IN (SELECT product FROM payments p WHERE p.tenant_id = o.tenant_id)",
    ),
    "in by a row": (
        True,
        "SELECT * FROM orders o WHERE (tenant_id, product) IN (SELECT tenant_id, product FROM payments)",
    ),
    "not in": (False, "SELECT * FROM orders WHERE id NOT IN (SELECT id FROM payments)"),
    "join": (True, "SELECT o.tenant_id, o.id, p.id AS p FROM orders o JOIN payments p USING (tenant_id, product)"),
    "join without the tenant": (
        False,
        "SELECT o.tenant_id, o.id, p.id AS p FROM orders o JOIN payments p ON p.product = o.product",
    ),
    "cross join": (False, "SELECT o.tenant_id, o.id, p.id AS p FROM orders o, payments p"),
    "self join": (
        True,
        "SELECT a.tenant_id, a.id, b.id AS b FROM orders a JOIN orders b ON b.tenant_id = a.tenant_id AND b.n = a.n",
    ),
    "self join without the tenant": (
        False,
        "SELECT a.tenant_id, a.id, b.id AS b FROM orders a JOIN orders b ON b.n = a.n",
    ),
    "join by the key alone": (
        False,
        "SELECT o.tenant_id, o.id, p.n FROM orders o JOIN payments p ON p.order_id = o.id",
    ),
    "left join": (
        True,
        "SELECT o.tenant_id, o.id, p.n FROM orders o LEFT JOIN payments p ON p.tenant_id = o.tenant_id AND p.n = o.n",
    ),
    "left join without the tenant": (
        False,
        "SELECT o.tenant_id, o.id, p.n FROM orders o LEFT JOIN payments p ON p.product = o.product",
    ),
    "left join, the tenant of the other side": (
        False,
        "SELECT p.tenant_id, o.id FROM orders o LEFT JOIN payments p ON p.n = o.n AND p.product = o.product",
    ),
    "left join, missing": (
        True,
        """SELECT o.tenant_id, o.id FROM orders o LEFT JOIN payments p ON p.tenant_id = o.tenant_id AND p.n = o.n
           WHERE p.id IS NULL""",
    ),
    "right join": (
        True,
        "SELECT o.tenant_id, o.id, p.n FROM payments p RIGHT JOIN orders o ON p.tenant_id = o.tenant_id AND p.n = o.n",
    ),
    "full join": (
        True,
        """SELECT coalesce(a.tenant_id, b.tenant_id) AS tenant_id, a.n, b.n AS m
           FROM (SELECT tenant_id, sum(n) AS n FROM orders GROUP BY 1) a
           FULL JOIN (SELECT tenant_id, sum(n) AS n FROM payments GROUP BY 1) b ON a.tenant_id = b.tenant_id""",
    ),
    "full join without the tenant": (
        False,
        """SELECT coalesce(a.tenant_id, b.tenant_id) AS tenant_id, a.id, b.id AS b
           FROM orders a FULL JOIN payments b ON a.id = b.id""",
    ),
    "union all": (True, "SELECT tenant_id, n FROM orders UNION ALL SELECT tenant_id, n FROM payments"),
    "union": (True, "SELECT tenant_id, product FROM orders UNION SELECT tenant_id, product FROM payments"),
    "except": (False, "SELECT tenant_id, product FROM orders EXCEPT SELECT tenant_id, product FROM payments"),
    "union all, one arm of all": (
        False,
        "SELECT tenant_id, n FROM orders UNION ALL SELECT o.tenant_id, p.n FROM orders o JOIN payments p USING (product)",
    ),
    "union all, one arm a literal's": (
        False,
        f"SELECT tenant_id, count(*) FROM orders GROUP BY 1 UNION ALL SELECT '{ANNA}'::uuid, count(*) FROM orders",
    ),
    "union all, a literal's total and a maximum": (
        False,
        f"SELECT tenant_id, max(n) FROM orders GROUP BY 1 UNION ALL SELECT '{BERT}'::uuid, max(n) + min(n) FROM orders",
    ),
    "a union seen through its first arm": (
        False,
        """SELECT o.tenant_id, o.id, p.id AS p
           FROM (SELECT tenant_id, id, tenant_id AS whose FROM orders
                 UNION ALL SELECT q.tenant_id, q.id, r.tenant_id FROM payments q JOIN orders r ON r.n = q.n) o
           JOIN LATERAL (SELECT p.id FROM payments p WHERE p.tenant_id = o.whose ORDER BY n, id LIMIT 1) p ON true""",
    ),
    "a union seen through its first arm by a subquery": (
        False,
        """SELECT u.tenant_id, (SELECT max(p.n) FROM payments p WHERE p.tenant_id = u.whose)
           FROM (SELECT tenant_id, tenant_id AS whose FROM orders
                 UNION ALL SELECT o.tenant_id, t.id FROM orders o, tenants t) u""",
    ),
    "a nested view": (True, "SELECT * FROM totals"),
    "a nested view of all": (False, "SELECT * FROM ranked"),
    "a nested view joined": (True, "SELECT o.tenant_id, o.id, t.n FROM orders o JOIN totals t USING (tenant_id)"),
    "with, once": (True, "WITH x AS (SELECT tenant_id, sum(n) AS n FROM orders GROUP BY 1) SELECT * FROM x"),
    "with, twice": (
        False,
        "WITH x AS (SELECT tenant_id, n FROM orders) SELECT a.tenant_id, a.n, b.n AS m FROM x a JOIN x b USING (tenant_id)",
    ),
    "with, twice, not materialized": (
        True,
        """WITH x AS NOT MATERIALIZED (SELECT tenant_id, n FROM orders)
           SELECT a.tenant_id, a.n, b.n AS m FROM x a JOIN x b USING (tenant_id)""",
    ),
    "with, materialized": (False, "WITH x AS MATERIALIZED (SELECT tenant_id, n FROM orders) SELECT * FROM x"),
    "with, recursive": (
        False,
        """WITH RECURSIVE tree AS (SELECT tenant_id, id, 1 AS depth FROM nodes WHERE parent IS NULL
           UNION ALL SELECT n.tenant_id, n.id, t.depth + 1 FROM nodes n
           JOIN tree t ON n.parent = t.id AND n.tenant_id = t.tenant_id) SELECT * FROM tree""",
    ),
    # It is one; the planner does not move a condition below grouping sets.
    "grouping sets with the tenant": (
        False,
        "SELECT tenant_id, product, sum(n) FROM orders GROUP BY GROUPING SETS ((tenant_id, product), (tenant_id))",
    ),
    "grouping sets without it": (
        False,
        """SELECT coalesce(g.tenant_id, t.id) AS tenant_id, g.product, g.n
           FROM (SELECT tenant_id, product, sum(n) AS n FROM orders GROUP BY GROUPING SETS ((tenant_id), (product))) g
           JOIN tenants t ON t.id = g.tenant_id OR g.tenant_id IS NULL""",
    ),
    "rollup": (
        False,
        """SELECT coalesce(tenant_id, id) AS tenant_id, s
           FROM (SELECT tenant_id, sum(n) AS s FROM orders GROUP BY ROLLUP (tenant_id)) r, tenants""",
    ),
    "lateral by tenant": (
        True,
        """SELECT o.tenant_id, o.id, p.id AS p FROM orders o
           CROSS JOIN LATERAL (SELECT * FROM payments p WHERE p.tenant_id = o.tenant_id ORDER BY n, id LIMIT 2) p""",
    ),
    "lateral without the tenant": (
        False,
        """SELECT o.tenant_id, o.id, p.id AS p FROM orders o
           CROSS JOIN LATERAL (SELECT * FROM payments p WHERE p.n >= o.n ORDER BY n, id LIMIT 2) p""",
    ),
    "a list of tenants": (
        True,
        "SELECT t.id AS tenant_id, (SELECT count(*) FROM orders o WHERE o.tenant_id = t.id) FROM tenants t",
    ),
    "a list of tenants, left join": (
        True,
        "SELECT t.id AS tenant_id, count(o.id) FROM tenants t LEFT JOIN orders o ON o.tenant_id = t.id GROUP BY t.id",
    ),
    "a list of tenants, by its key": (
        True,
        "SELECT t.id AS tenant_id, t.name, count(o.id) FROM tenants t LEFT JOIN orders o ON o.tenant_id = t.id GROUP BY t.id",
    ),
    "shared": (True, "SELECT tenant_id, id, n * factor FROM orders LEFT JOIN rates USING (product)"),
    "a computed tenant": (
        False,
        "SELECT (CASE WHEN n > 1 THEN tenant_id ELSE tenant_id END) AS tenant_id, count(*) FROM orders GROUP BY 1",
    ),
    "a tenant of two": (
        False,
        "SELECT coalesce(o.tenant_id, p.tenant_id) AS tenant_id, o.id FROM orders o JOIN payments p ON p.id = o.id",
    ),
    "the least tenant": (False, "SELECT min(tenant_id::text)::uuid AS tenant_id, sum(n) FROM orders GROUP BY product"),
    "a tenant by lag": (
        False,
        "SELECT lag(tenant_id) OVER (ORDER BY id) AS tenant_id, id FROM orders",
    ),
    "a tenant that is a text": (True, "SELECT tenant_id::uuid AS tenant_id, sum(n) FROM texts GROUP BY 1"),
    "a tenant that is a text, joined": (
        True,
        """SELECT o.tenant_id, o.id, t.n FROM orders o
           CROSS JOIN LATERAL (SELECT n FROM texts t WHERE t.tenant_id::uuid = o.tenant_id ORDER BY n LIMIT 1) t""",
    ),
    "a tenant that is cut": (
        False,
        "SELECT (left(tenant_id, 1) || substr(tenant_id::text, 2))::uuid AS tenant_id, n FROM texts",
    ),
    "partitions": (True, "SELECT tenant_id, sum(n) FROM parts GROUP BY 1"),
    "partitions, correlated": (
        True,
        "SELECT tenant_id, id, (SELECT max(n) FROM parts q WHERE q.tenant_id = p.tenant_id) FROM parts p",
    ),
    "partitions without the tenant": (
        False,
        "SELECT tenant_id, id, (SELECT max(n) FROM parts q WHERE q.product = p.product) FROM parts p",
    ),
    "two uses of one partition": (
        False,
        "SELECT p.tenant_id, p.id, q.id AS q FROM parts_1 p JOIN parts_1 q ON q.product = p.product",
    ),
    "a look-up": (True, "SELECT o.tenant_id, l.id, l.n FROM orders o JOIN lines l ON l.order_id = o.id"),
    "a look-up, left join": (
        True,
        "SELECT o.tenant_id, o.id, l.n FROM orders o LEFT JOIN lines l ON l.order_id = o.id",
    ),
    "a look-up, distinct first": (
        True,
        "SELECT o.tenant_id, o.id FROM orders o JOIN (SELECT DISTINCT order_id FROM lines) l ON l.order_id = o.id",
    ),
    # It is one, but all lines are read; whether it is proven depends on how the planner joins.
    "a look-up, grouped first": (
        None,
        """SELECT o.tenant_id, o.id, l.n FROM orders o
           JOIN (SELECT order_id, sum(n) AS n FROM lines GROUP BY 1) l ON l.order_id = o.id""",
    ),
    "a look-up, correlated": (
        True,
        "SELECT o.tenant_id, o.id, (SELECT sum(l.n) FROM lines l WHERE l.order_id = o.id) FROM orders o",
    ),
    "a look-up, exists": (
        True,
        "SELECT o.* FROM orders o WHERE EXISTS (SELECT FROM lines l WHERE l.order_id = o.id AND l.n > 1)",
    ),
    "a look-up, not exists": (
        True,
        "SELECT o.* FROM orders o WHERE NOT EXISTS (SELECT FROM lines l WHERE l.order_id = o.id)",
    ),
    "a look-up, ranked over all": (
        False,
        """SELECT o.tenant_id, o.id, l.place FROM orders o
           JOIN (SELECT order_id, rank() OVER (ORDER BY n, id) AS place FROM lines) l ON l.order_id = o.id""",
    ),
    "a look-up by something else": (
        False,
        "SELECT o.tenant_id, o.id, l.n FROM orders o JOIN lines l ON l.n = o.n",
    ),
    "a look-up on the side that is kept": (
        False,
        """SELECT o.tenant_id, l.id FROM lines l LEFT JOIN orders o ON o.id = l.order_id, tenants t WHERE t.id = o.tenant_id
           UNION ALL SELECT t.id, count(*) FROM tenants t, lines l GROUP BY 1""",
    ),
    "a full join of a look-up": (
        False,
        """SELECT t.id AS tenant_id, x.n FROM tenants t,
           LATERAL (SELECT count(*) AS n FROM (SELECT * FROM orders WHERE tenant_id = t.id) o
                    FULL JOIN lines l ON l.order_id = o.id) x""",
    ),
    "a left join that counts what it keeps": (
        False,
        """SELECT t.id AS tenant_id, x.n FROM tenants t,
           LATERAL (SELECT count(*) AS n FROM lines l
                    LEFT JOIN (SELECT * FROM orders WHERE tenant_id = t.id) o ON l.order_id = o.id) x""",
    ),
    "a materialized view": (False, "SELECT * FROM stored"),
    "a materialized view joined": (
        False,
        "SELECT o.tenant_id, o.id, s.place FROM orders o JOIN stored s USING (tenant_id, id)",
    ),
    "a function": (False, "SELECT tenant_id, id, trade.worth(n) FROM orders"),
    "a sample": (False, "SELECT * FROM orders TABLESAMPLE SYSTEM (50) REPEATABLE (1)"),
    "quoted like the plan": (
        True,
        """SELECT o.tenant_id, o.id, '(p.tenant_id = o.tenant_id) AND' AS "a = b AND ("
           FROM orders o WHERE o.product <> ') AND (o.tenant_id = ''x''::uuid'""",
    ),
    "a name like a condition": (
        False,
        """SELECT o.tenant_id, "p.tenant_id = o".n FROM orders o
           JOIN payments AS "p.tenant_id = o" ON "p.tenant_id = o".n = o.n AND "p.tenant_id = o".product <> 'tenant_id'""",
    ),
    "an or": (
        False,
        "SELECT o.tenant_id, p.id FROM orders o JOIN payments p ON p.tenant_id = o.tenant_id OR p.n = o.n",
    ),
    "a negation": (
        False,
        "SELECT o.tenant_id, p.id FROM orders o JOIN payments p ON NOT (p.tenant_id = o.tenant_id)",
    ),
    "rows from a list": (True, "SELECT tenant_id, v.x FROM orders, (VALUES (1), (2)) v (x)"),
    "a literal tenant alone": (
        False,
        f"SELECT tenant_id, (SELECT sum(n) FROM payments) FROM orders WHERE tenant_id = '{CLEO}'",
    ),
}

COLUMNS = "tenant_id, id, product, n"


def some_query(chance: random.Random, depth: int = 3) -> str:
    """A random query that returns COLUMNS: some are tenant-local, most are not."""
    if depth == 0 or chance.random() < 0.15:
        return chance.choice((
            f"SELECT {COLUMNS} FROM orders",
            f"SELECT {COLUMNS} FROM payments",
            f"SELECT {COLUMNS} FROM parts",
            f"SELECT {COLUMNS} FROM big",
            "SELECT o.tenant_id, l.id, o.product, l.n FROM orders o JOIN lines l ON l.order_id = o.id",
            "SELECT t.id AS tenant_id, r.factor AS id, r.product, 1 AS n FROM tenants t, rates r",
        ))  # fmt: skip
    one, other = some_query(chance, depth - 1), some_query(chance, chance.randint(0, depth - 1))
    keys = ", ".join(chance.sample(("tenant_id", "product", "n", "id"), chance.randint(1, 3)))
    by = " AND ".join(
        chance.sample(("a.tenant_id = b.tenant_id", "a.product = b.product", "a.n = b.n"), chance.randint(1, 2))
    )
    whose = chance.choice(("a.tenant_id", "a.tenant_id", "b.tenant_id", "coalesce(a.tenant_id, b.tenant_id)"))
    join = chance.choice(("JOIN", "LEFT JOIN", "RIGHT JOIN", "FULL JOIN"))
    limit = chance.choice(("", "", "ORDER BY n, id, product, tenant_id LIMIT 2"))
    materialized = chance.choice(("", "MATERIALIZED", "NOT MATERIALIZED"))
    return chance.choice((
        f"SELECT * FROM ({one}) a WHERE n > {chance.randint(0, 2)}",
        f"SELECT * FROM ({one}) a WHERE tenant_id = '{chance.choice((ANNA, BERT))}'",
        f"SELECT * FROM (SELECT * FROM ({one}) a ORDER BY n, id, product, tenant_id LIMIT 3) b",
        f"SELECT * FROM ({one}) a UNION ALL SELECT * FROM ({other}) b",
        f"SELECT * FROM ({one}) a UNION ALL SELECT '{ANNA}'::uuid, id, product, n FROM ({other}) b",
        f"SELECT * FROM ({one}) a {chance.choice(('UNION', 'EXCEPT', 'INTERSECT'))} SELECT * FROM ({other}) b",
        f"SELECT DISTINCT ON ({keys}) {COLUMNS} FROM ({one}) a ORDER BY {keys}, tenant_id, id, product, n",
        f"SELECT DISTINCT {COLUMNS} FROM ({one}) a",
        f"""SELECT min(tenant_id::text)::uuid AS tenant_id, count(*)::int AS id, min(product) AS product, sum(n)::int AS n
            FROM ({one}) a GROUP BY {keys}""",
        f"""SELECT tenant_id, count(*)::int AS id, max(product) AS product, sum(n)::int AS n
            FROM ({one}) a GROUP BY tenant_id HAVING count(*) > (SELECT count(*) / 4 FROM ({other}) b)""",
        f"SELECT tenant_id, max(id) AS id, max(product) AS product, sum(n)::int AS n FROM ({one}) a GROUP BY tenant_id",
        f"""SELECT tenant_id, rank() OVER (PARTITION BY {keys} ORDER BY n, id)::int AS id, product,
                   sum(n) OVER (PARTITION BY tenant_id)::int AS n FROM ({one}) a""",
        f"SELECT {whose} AS tenant_id, a.id, b.product, b.n FROM ({one}) a {join} ({other}) b ON {by}",
        f"SELECT {whose} AS tenant_id, a.id, b.product, b.n FROM ({one}) a {join} ({other}) b ON {by}",
        f"SELECT * FROM ({one}) a WHERE {chance.choice(('', 'NOT'))} EXISTS (SELECT FROM ({other}) b WHERE {by})",
        f"SELECT tenant_id, id, product, EXISTS (SELECT FROM ({other}) b WHERE {by})::int AS n FROM ({one}) a",
        f"SELECT tenant_id, id, product, (SELECT sum(b.n)::int FROM ({other}) b WHERE {by}) AS n FROM ({one}) a",
        f"SELECT * FROM ({one}) a WHERE n IN (SELECT n FROM ({other}) b WHERE {by})",
        f"""SELECT {chance.choice(('a.tenant_id', 'b.tenant_id'))} AS tenant_id, a.id, b.product, b.n FROM ({one}) a
            CROSS JOIN LATERAL (SELECT * FROM ({other}) b WHERE {by} {limit}) b""",
        f"SELECT a.tenant_id, l.id, a.product, l.n FROM ({one}) a {join} lines l ON l.order_id = a.id",
        f"""SELECT a.tenant_id, a.id, a.product, l.n FROM ({one}) a
            {join} (SELECT order_id, sum(n)::int AS n FROM lines GROUP BY 1) l ON l.order_id = a.id""",
        f"""WITH x AS {materialized} ({one}) SELECT a.tenant_id, a.id, b.product, b.n FROM x a JOIN x b ON {by}""",
        f"""WITH x AS {materialized} ({one}) SELECT * FROM x a""",
    ))  # fmt: skip
