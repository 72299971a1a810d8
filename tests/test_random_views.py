"""Random tables, views and transactions: whatever is written and in whatever order, every target ends as its query.

What happens is drawn first, as a list of steps on a few connections, and then done one step at a time. A writer that
would wait for another's lock gives up and rolls back. LISTENER_TEST_EXAMPLES (25) says how many plans are tried.
A failure prints its plan and how to have it again; LISTENER_TEST_SHRINK=1 makes it smaller first, which takes minutes.
"""

# ruff: noqa: S608 - the statements are made of the text below

from __future__ import annotations

import os
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import anyio
import psycopg
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from psycopg import AsyncConnection

from conftest import Database, Server
from shop import create_view, differences, one, rows, settle

EXAMPLES = int(os.environ.get("LISTENER_TEST_EXAMPLES", "25"))
SHRINK = (Phase.shrink,) if os.environ.get("LISTENER_TEST_SHRINK") else ()
WRITERS = ("writer 1", "writer 2", "writer 3")
SERVICE = ("drain", "drain and refresh", "drain and refresh", "refresh", "refresh all", "purge", "repair")
DRAINERS = ("service", "other service")
# Of each type six tenants, as literals.
TENANTS = {
    "uuid": [f"'{digit * 8}-1111-4111-8111-111111111111'" for digit in "1ac4e5"],
    "bigint": ["1", "22", "-3", "4", "5", "9223372036854775807"],
    "text": ["'anna'", "'Bo \"x\" Ünal'", "'C''est\\ 3'", "'d'", "'e'", "'NULL'"],
}
NUMBERS = st.integers(0, 4)
IDS = st.integers(1, 12)
PRODUCTS = st.sampled_from(("'x'", "'y'", "'z'", "NULL"))


@dataclass(frozen=True)
class Step:
    """Something that one connection does. `sql` is a statement, or one of the words below."""

    who: str
    sql: str
    copied: str = ""


@dataclass(frozen=True)
class View:
    """What create_view is given."""

    query: str
    keys: list[str]
    tenants_query: str | None


@dataclass(frozen=True)
class Plan:
    """One example."""

    tenant_type: str
    tables: str
    add_source: str
    views: list[View]
    steps: list[Step]


# -- tables ----------------------------------------------------------------------------------------------------------


def table(name: str, kind: str, tenant_type: str) -> str:
    """One of plain, list or range. The second part of a range has its columns in another order."""
    columns = f"id bigint NOT NULL, tenant_id {tenant_type} NOT NULL, product text, n int NOT NULL DEFAULT 0"
    if kind == "plain":
        return f"CREATE TABLE {name} ({columns}, PRIMARY KEY (id));"
    if kind == "list":
        first = TENANTS[tenant_type][0]
        return f"""
            CREATE TABLE {name} ({columns}, PRIMARY KEY (id, tenant_id)) PARTITION BY LIST (tenant_id);
            CREATE TABLE {name}_1 PARTITION OF {name} FOR VALUES IN ({first});
            CREATE TABLE {name}_2 PARTITION OF {name} DEFAULT;
        """
    return f"""
        CREATE TABLE {name} ({columns}, PRIMARY KEY (id)) PARTITION BY RANGE (id);
        CREATE TABLE {name}_1 PARTITION OF {name} FOR VALUES FROM (MINVALUE) TO (5);
        CREATE TABLE {name}_2 (n int NOT NULL DEFAULT 0, product text, tenant_id {tenant_type} NOT NULL,
                               id bigint NOT NULL, PRIMARY KEY (id));
        ALTER TABLE {name} ATTACH PARTITION {name}_2 FOR VALUES FROM (5) TO (MAXVALUE);
    """


def rows_of(name: str, tenant_type: str) -> str:
    """What the table has from the start."""
    written = [
        f"({number}, {TENANTS[tenant_type][number % 6]}, '{'xyz'[number % 2]}', {number % 5})" for number in range(1, 7)
    ]
    return f"INSERT INTO {name} ({WRITTEN}) VALUES {', '.join(written)};"


# -- queries ---------------------------------------------------------------------------------------------------------

COLUMNS = "tenant_id, id, product, n"
WRITTEN = "id, tenant_id, product, n"
LINES = "(SELECT a.tenant_id, l.id, a.product, l.n FROM a JOIN lines l ON l.a_id = a.id)"
TABLES = st.sampled_from(("a", "b", LINES))
# Each has the columns above, and `id` is unique in a tenant.
RELATIONS = st.recursive(
    TABLES,
    lambda smaller: st.one_of(
        st.builds(lambda r, n: f"(SELECT {COLUMNS} FROM {r} AS r WHERE n > {n})", smaller, NUMBERS),
        st.builds(
            lambda r, s: (
                f"(SELECT tenant_id, id * 2 AS id, product, n FROM {r} AS r"
                f" UNION ALL SELECT tenant_id, id * 2 + 1, product, n FROM {s} AS s)"
            ),
            smaller,
            smaller,
        ),
        st.builds(
            lambda r: f"(SELECT DISTINCT ON (tenant_id, product) {COLUMNS} FROM {r} AS r ORDER BY 1, product, n, id)",
            smaller,
        ),
        st.builds(
            lambda r, s, word: (
                f"(SELECT {COLUMNS} FROM {r} AS r WHERE {word} EXISTS (SELECT FROM {s} AS s"
                " WHERE s.tenant_id = r.tenant_id AND s.product IS NOT DISTINCT FROM r.product))"
            ),
            smaller,
            smaller,
            st.sampled_from(("", "NOT")),
        ),
    ),
    max_leaves=3,
)
HAVING = st.one_of(
    st.just(""),
    st.builds(lambda n: f"HAVING count(*) > {n}", st.integers(0, 2)),
    st.builds(lambda n: f"HAVING sum(n) <= {n}", NUMBERS),
)


def per_product(relation: str, having: str) -> str:
    return f"""SELECT tenant_id, product, count(*) AS rows, sum(n) AS n, count(*) FILTER (WHERE n > 2) AS large,
        min(id) AS first FROM {relation} AS r GROUP BY 1, 2 {having}"""


QUERIES: st.SearchStrategy[tuple[str, list[str]]] = st.one_of(
    st.builds(lambda r, having: (per_product(r, having), ["product"]), RELATIONS, HAVING),
    st.builds(
        lambda r: (
            f"""SELECT {COLUMNS}, row_number() OVER (PARTITION BY tenant_id ORDER BY n, id) AS place,
            sum(n) OVER (PARTITION BY tenant_id, product) AS of_product, lag(n) OVER w AS previous
            FROM {r} AS r WINDOW w AS (PARTITION BY tenant_id ORDER BY id)""",
            ["id"],
        ),
        RELATIONS,
    ),
    st.builds(lambda r: (f"SELECT DISTINCT tenant_id, product FROM {r} AS r", ["product"]), RELATIONS),
    st.builds(
        lambda r, s, join: (
            f"""SELECT r.tenant_id, r.id, r.product, count(s.id) AS found, sum(s.n) AS n
            FROM {r} AS r {join} {s} AS s ON s.tenant_id = r.tenant_id AND s.product = r.product GROUP BY 1, 2, 3""",
            ["id"],
        ),
        RELATIONS,
        RELATIONS,
        st.sampled_from(("JOIN", "LEFT JOIN")),
    ),
    st.builds(
        lambda r, s: (
            f"""WITH x AS ({per_product(r, "")}), y AS ({per_product(s, "")})
            SELECT coalesce(x.tenant_id, y.tenant_id) AS tenant_id, coalesce(x.product, y.product) AS product,
                   x.product IS NULL AS no_left, y.product IS NULL AS no_right,
                   coalesce(x.n, 0) - coalesce(y.n, 0) AS n
            FROM x FULL JOIN y ON y.tenant_id = x.tenant_id AND y.product = x.product""",
            ["product", "no_left", "no_right"],
        ),
        RELATIONS.map(lambda r: f"(SELECT * FROM {r} AS q WHERE product IS NOT NULL)"),
        RELATIONS,
    ),
    st.builds(
        lambda r, s: (
            f"SELECT tenant_id, product, n FROM {r} AS r UNION SELECT tenant_id, product, n FROM {s} AS s",
            ["product", "n"],
        ),
        RELATIONS,
        RELATIONS,
    ),
    st.builds(
        lambda r: (
            f"""SELECT r.tenant_id, r.id, r.n * x.factor AS worth, x.factor FROM {r} AS r
            LEFT JOIN rates x ON x.product = r.product""",
            ["id"],
        ),
        RELATIONS,
    ),
    st.builds(
        lambda r: (
            f"""SELECT r.tenant_id, r.id, (SELECT count(*) FROM lines l WHERE l.a_id = r.id) AS lines
            FROM a r WHERE r.n <= (SELECT max(n) FROM {r} AS q WHERE q.tenant_id = r.tenant_id)""",
            ["id"],
        ),
        RELATIONS,
    ),
)


# -- statements ------------------------------------------------------------------------------------------------------


def statements(tenant_type: str, kinds: dict[str, str]) -> st.SearchStrategy[tuple[str, str]]:
    """A statement, and what it copies."""
    tenants = st.sampled_from(TENANTS[tenant_type])
    names = st.sampled_from([name for name, kind in kinds.items() for _ in range(3)])
    # A statement may name a partition.
    written = st.one_of(
        names,
        st.sampled_from(
            [name + part for name, kind in kinds.items() if kind != "plain" for part in ("_1", "_2")] or ["a"]
        ),
    )
    row = st.builds(lambda i, t, p, n: f"({i}, {t}, {p}, {n})", IDS, tenants, PRODUCTS, NUMBERS)
    some = st.lists(row, min_size=1, max_size=4, unique_by=lambda text: text.split(",")[0]).map(", ".join)
    where = st.one_of(
        st.builds(lambda t: f"tenant_id = {t}", tenants),
        st.builds(lambda i: f"id <= {i}", IDS),
        st.builds(lambda p: f"product = {p}", PRODUCTS),
    )
    conflict = {name: "(id, tenant_id)" if kind == "list" else "(id)" for name, kind in kinds.items()}
    lines = st.lists(st.tuples(IDS, IDS, NUMBERS), min_size=1, max_size=4, unique_by=lambda line: line[0])

    def plain(strategy: st.SearchStrategy[str]) -> st.SearchStrategy[tuple[str, str]]:
        return strategy.map(lambda text: (text, ""))

    return st.one_of(
        plain(st.builds(lambda t, r: f"INSERT INTO {t} ({WRITTEN}) VALUES {r} ON CONFLICT DO NOTHING", written, some)),
        plain(st.builds(lambda t, r: f"INSERT INTO {t} ({WRITTEN}) VALUES {r}", written, some)),
        plain(st.builds(lambda t, n, w: f"UPDATE {t} SET n = {n} WHERE {w}", written, NUMBERS, where)),
        plain(st.builds(lambda t, p, w: f"UPDATE {t} SET product = {p} WHERE {w}", written, PRODUCTS, where)),
        *[plain(st.builds(lambda t, to, w: f"UPDATE {t} SET tenant_id = {to} WHERE {w}", names, tenants, where))] * 3,
        plain(st.builds(lambda t, i, to: f"UPDATE {t} SET id = {to} WHERE id = {i}", names, IDS, IDS)),
        plain(st.builds(lambda t, w: f"DELETE FROM {t} WHERE {w}", written, where)),
        plain(
            st.builds(
                lambda t, r: (
                    f"INSERT INTO {t} ({WRITTEN}) VALUES {r} ON CONFLICT {conflict[t]} DO UPDATE"
                    " SET n = excluded.n, product = excluded.product"
                    + ("" if kinds[t] == "list" else ", tenant_id = excluded.tenant_id")
                ),
                names,
                some,
            )
        ),
        plain(
            st.builds(
                lambda t, r, n: (
                    f"""MERGE INTO {t} USING (VALUES {r}) AS v (id, tenant, product, n)
                    ON {t}.id = v.id AND {t}.tenant_id = v.tenant::{tenant_type}
                    WHEN MATCHED AND v.n > {n} THEN DELETE
                    WHEN MATCHED THEN UPDATE SET n = v.n, product = v.product
                    WHEN NOT MATCHED THEN INSERT ({WRITTEN})
                        VALUES (v.id, v.tenant::{tenant_type}, v.product, v.n)"""
                ),
                names,
                some,
                NUMBERS,
            )
        ),
        plain(st.sampled_from([f"TRUNCATE {name} CASCADE" for name in (*kinds, "lines")])),
        st.builds(
            lambda t, i, tenant, n: (
                f"COPY {t} ({WRITTEN}) FROM STDIN WITH (FORMAT csv, QUOTE '~')",
                "".join(f"{number},~{unquoted(tenant)}~,x,{n}\n" for number in {i, i + 1}),
            ),
            written,
            IDS,
            tenants,
            NUMBERS,
        ),
        plain(
            lines.map(
                lambda some: (
                    f"INSERT INTO lines (id, a_id, n) VALUES {', '.join(map(str, some))}"
                    " ON CONFLICT (id) DO UPDATE SET n = excluded.n, a_id = excluded.a_id"
                )
            )
        ),
        plain(st.builds(lambda i, a: f"UPDATE lines SET a_id = {a} WHERE id <= {i}", IDS, IDS)),
        plain(st.builds(lambda i: f"DELETE FROM lines WHERE id = {i}", IDS)),
        plain(
            st.builds(
                lambda p, n: f"INSERT INTO rates VALUES ({p}, {n}) ON CONFLICT (product) DO UPDATE SET factor = {n}",
                st.sampled_from(("'x'", "'y'")),
                NUMBERS,
            )
        ),
    )


def unquoted(literal: str) -> str:
    return literal[1:-1].replace("''", "'") if literal.startswith("'") else literal


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    tenant_type = draw(st.sampled_from(sorted(TENANTS)))
    kinds = {name: draw(st.sampled_from(("plain", "list", "range"))) for name in ("a", "b")}
    has_key = kinds["a"] != "list"
    on_delete = draw(st.sampled_from(("ON DELETE CASCADE", "ON DELETE SET NULL", ""))) if has_key else None
    links = "" if on_delete is None else f"REFERENCES a (id) {on_delete}"
    tables = f"""
        SET ROLE listener_owner;
        {table("a", kinds["a"], tenant_type)}
        {table("b", kinds["b"], tenant_type)}
        CREATE TABLE lines (id bigint PRIMARY KEY, a_id bigint {links}, n int NOT NULL);
        CREATE TABLE rates (product text PRIMARY KEY, factor int NOT NULL);
        CREATE TABLE tenants (id {tenant_type} PRIMARY KEY);
        INSERT INTO tenants VALUES {", ".join(f"({tenant})" for tenant in TENANTS[tenant_type])};
        {rows_of("a", tenant_type)}
        {rows_of("b", tenant_type)}
        INSERT INTO lines SELECT i, i, i % 4 FROM generate_series(1, 6) i;
        INSERT INTO rates VALUES ('x', 2);
        GRANT SELECT ON ALL TABLES IN SCHEMA public TO listener_service;
        RESET ROLE;
    """
    columns = ", columns => '{a_id}', references_columns => '{id}'" if on_delete is None else ""
    listed = draw(st.sampled_from((None, "SELECT id FROM tenants")))
    views = [View(query, keys, listed) for query, keys in draw(st.lists(QUERIES, min_size=1, max_size=3))]
    statement = statements(tenant_type, kinds)
    step = st.one_of(
        *[st.builds(lambda who, s: Step(who, *s), st.sampled_from(WRITERS), statement)] * 5,
        st.builds(lambda who, s: Step(who, "undone " + s[0], s[1]), st.sampled_from(WRITERS), statement),
        *[st.builds(Step, st.sampled_from(WRITERS), st.sampled_from(("commit",) * 5 + ("rollback",)))] * 3,
        *[st.builds(Step, st.just("service"), st.sampled_from(SERVICE))] * 3,
        st.builds(Step, st.just("other service"), st.sampled_from(("drain", "refresh", "commit", "rollback"))),
    )
    # Somebody else commits, and is drained and shown, while a transaction is open.
    overtaken = st.builds(
        lambda order, open_one, other, drained: [
            Step(order[0], *open_one),
            Step(order[1], *other),
            Step(order[1], "commit"),
            Step("service", drained),
            Step(order[0], "commit"),
        ],
        st.permutations(WRITERS),
        statement,
        statement,
        st.sampled_from(("drain", "drain and refresh")),
    )
    chunks = draw(st.lists(st.one_of(step.map(lambda one_step: [one_step]), overtaken), min_size=10, max_size=25))
    steps = [one_step for chunk in chunks for one_step in chunk]
    return Plan(tenant_type, tables, f"SELECT listener.add_source('lines', through => 'a'{columns})", views, steps)


# -- the run ---------------------------------------------------------------------------------------------------------

did: Counter[str] = Counter()
# A lock that another holds, a row twice in one statement, a row that another moved to another partition.
GAVE_UP = (
    psycopg.errors.LockNotAvailable,
    psycopg.errors.IntegrityError,
    psycopg.errors.CardinalityViolation,
    psycopg.errors.SerializationFailure,
)


async def write(connection: AsyncConnection[Any], step: Step) -> None:
    """One statement; where it fails, the transaction is over."""
    statement, undone = step.sql.removeprefix("undone "), step.sql.startswith("undone ")
    try:
        if undone:
            await connection.execute("SAVEPOINT s")
        if step.copied:
            async with connection.cursor() as cursor, cursor.copy(statement.encode()) as copy:
                await copy.write(step.copied)
        else:
            await connection.execute(statement.encode())
        if undone:
            await connection.execute("ROLLBACK TO s")
        did[f"{'undone ' if undone else ''}{statement.split()[0]}"] += 1
    except GAVE_UP:
        await connection.rollback()
        did["gave up"] += 1


async def serve(service: AsyncConnection[Any], what: str) -> None:
    """What the service does, one thing at a time."""
    if what in {"drain", "purge", "repair"}:
        name = "repair_capture" if what == "repair" else what
        await service.execute(f"SELECT listener.{name}()".encode())
        did[what] += 1
        return
    if what == "drain and refresh":
        await serve(service, "drain")
    keys = await rows(service, "SELECT view_name, tenant FROM listener.pending_keys(false) WHERE outcome = 'dirty'")
    for view, tenant in keys[:1] if what == "refresh" else keys:
        if tenant == "":
            await service.execute("SELECT listener.expand(%s)", (view,))
        else:
            await service.execute("SELECT listener.refresh(%s, %s::text)", (view, tenant))
        did["refresh"] += 1


async def do(connection: AsyncConnection[Any], step: Step) -> None:
    if step.sql == "commit":
        await connection.commit()
    elif step.sql == "rollback":
        await connection.rollback()
    elif step.who in WRITERS:
        await write(connection, step)
    else:
        try:
            await serve(connection, step.sql)
        except psycopg.errors.LockNotAvailable:
            # Behind a TRUNCATE: the service would try again.
            if not connection.autocommit:
                await connection.rollback()


async def run(database: Database, plan: Plan) -> list[Any]:
    """Every difference that is left when all have committed and nothing is dirty any more."""
    async with AsyncExitStack() as opened:
        superuser = await opened.enter_async_context(database.connect())
        await superuser.execute(plan.tables.encode())
        await superuser.execute("GRANT listener_owner TO listener_migrator")
        for number, view in enumerate(plan.views):
            await create_view(database, f"v{number}", view.query, view.keys, tenants_query=view.tenants_query)
            if number == 0:
                async with database.connect("listener_migrator") as migrator:
                    await migrator.execute(plan.add_source.encode())
        connections: dict[str, AsyncConnection[Any]] = {}
        for who in (*WRITERS, *DRAINERS):
            user = "postgres" if who in WRITERS else "listener_service"
            connection = await opened.enter_async_context(database.connect(user))
            await connection.execute("SET lock_timeout = '15ms'")
            await connection.set_autocommit(who == "service")
            connections[who] = connection
        with anyio.fail_after(20):
            await settle(connections["service"])
        for step in plan.steps:
            await do(connections[step.who], step)
        for connection in connections.values():
            await connection.commit()
        service = connections["service"]
        await service.execute("RESET lock_timeout")
        with anyio.fail_after(60):
            await settle(service)
        wrong: list[Any] = []
        for number in range(len(plan.views)):
            wrong += [(number, *row) for row in await differences(superuser, f"v{number}")]
            for tenant in TENANTS[plan.tenant_type]:
                compared = await rows(
                    service,
                    "SELECT missing, extra, stale FROM listener.compare(%s, %s)",
                    f"v{number}",
                    unquoted(tenant),
                )
                wrong += [(number, tenant, *row) for row in compared if row != (0, 0, False)]
        assert await one(superuser, "SELECT count(*) FROM listener.dead_letter") == 0
        return wrong


def show(plan: Plan) -> None:
    """For whoever reads a failure."""
    note(plan.tables + plan.add_source)
    for view in plan.views:
        note(str(view))
    for step in plan.steps:
        note(f"{step.who}: {step.sql} {step.copied!r}")


def test_after_any_transactions_every_target_equals_its_query(server: Server, template: str) -> None:
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        print_blob=True,
        phases=(Phase.explicit, Phase.generate, *SHRINK),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(plans())
    def check(plan: Plan) -> None:
        show(plan)
        name = server.clone(template)
        try:
            assert anyio.run(run, Database(server, name), plan) == []
        finally:
            server.drop(name)

    did.clear()
    check()
    print(dict(sorted(did.items())))
