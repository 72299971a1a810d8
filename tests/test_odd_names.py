"""Names and values full of what SQL, formats, logs and terminals give a meaning to go the whole way, and never run."""

from __future__ import annotations

import json
from typing import Any

import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families
from psycopg import sql

from command import listener
from conftest import Database, eventually
from process import ServiceProcess, service_process

pytestmark = pytest.mark.anyio

# At most 40 bytes each: the names of two columns, a table and a view are made of it.
NAMES = {
    "quotes": "it's \"q\"'); DROP TABLE canary; --",
    "a quoted name's end": "x\"; DROP TABLE canary; -- \\' %s %I {}",
    "dollar quotes": "$capture$; DROP TABLE canary;$difference$",
    "lines": "one\ntwo\r\nthree\t$$ . %1$s {0} %(x)s",
    "more than ASCII": "Ünïcödé 漢字 🦄 [bold]x[/] \x1b[31m",
}
# Tenants have the same values, and these.
MORE = ["' OR 'a'='a", "a b\\", "%", "NULL", "\x7f", '{"tenant_id": null}', "🦄" * 250]


@pytest.fixture
async def odd(database: Database) -> Database:
    """A table that would go if any of it was run."""
    async with database.connect() as superuser:
        await superuser.execute("CREATE TABLE public.canary (); ALTER TABLE public.canary OWNER TO listener_owner")
    return database


async def arrange(database: Database, name: str) -> str:
    """A schema with a source, a look-up into it and a view, all of this name; the view's, as SQL writes it."""
    names = {
        "schema": sql.Identifier(name), "tenant": sql.Identifier(f"{name} t"), "key": sql.Identifier(f"{name} k"),
        "lines": sql.Identifier(f"{name} l"),
    }  # fmt: skip
    async with database.connect() as superuser:
        await superuser.execute(
            sql.SQL(
                """
                CREATE SCHEMA {schema} AUTHORIZATION listener_owner;
                SET ROLE listener_owner;
                GRANT USAGE ON SCHEMA {schema} TO listener_service;
                CREATE TABLE {schema}.{schema} ({tenant} text NOT NULL, {key} text UNIQUE, cents bigint NOT NULL);
                CREATE TABLE {schema}.{lines} ({key} text REFERENCES {schema}.{schema} ({key}), n bigint);
                ALTER TABLE {schema}.{schema} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
                CREATE POLICY p ON {schema}.{schema} USING ({tenant} = current_setting('app.current_tenant_id'));
                CREATE TABLE {schema}.tenants (id text);
                GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO listener_service;
                """
            ).format(**names)
        )
    view = sql.Identifier(name, f"{name} v").as_string(None)
    query = sql.SQL(
        """SELECT s.{tenant}, s.{key}, 100 / sum(s.cents) AS share, count(l.n) AS "lines"
           FROM {schema}.{schema} s LEFT JOIN {schema}.{lines} l ON l.{key} = s.{key} GROUP BY 1, 2"""
    ).format(**names)
    tenants = sql.SQL("SELECT id FROM {schema}.tenants").format(**names)
    async with database.connect("listener_migrator") as migrator:
        await migrator.execute(
            sql.SQL(
                """
                SELECT listener.add_source({lines}, {tenant}, through => {source});
                SELECT listener.create_view({view}, {query}, {key}, {tenant}, tenants_query => {tenants},
                                            target_rls => true, max_age => '1 h')
                """
            ).format(
                lines=sql.Identifier(name, f"{name} l").as_string(None),
                source=sql.Identifier(name, name).as_string(None),
                view=view, query=query.as_string(None), key=[f"{name} k"], tenant=f"{name} t",
                tenants=tenants.as_string(None),
            )
        )  # fmt: skip
    return view


async def write(database: Database, name: str, tenant: str, cents: int) -> None:
    """A row, and a line of it, of this tenant."""
    async with database.connect() as superuser, superuser.transaction():
        await superuser.execute("SET LOCAL ROLE listener_owner")
        await superuser.execute("SELECT set_config('app.current_tenant_id', %s, true)", (tenant,))
        await superuser.execute(
            sql.SQL(
                "INSERT INTO {schema}.{schema} VALUES ({tenant}, {tenant}, {cents}); INSERT INTO {schema}.{lines}"
                " VALUES ({tenant}, 1)"
            ).format(
                schema=sql.Identifier(name), lines=sql.Identifier(f"{name} l"), tenant=sql.Literal(tenant),
                cents=sql.Literal(cents),
            )
        )  # fmt: skip


async def shown(database: Database, name: str) -> list[tuple[Any, ...]]:
    """What the target holds."""
    async with database.connect() as superuser:
        cursor = await superuser.execute(
            sql.SQL("SELECT * FROM {}.{} ORDER BY 1").format(sql.Identifier(name), sql.Identifier(f"{name} v"))
        )
        return await cursor.fetchall()


def one_line(*arguments: str, url: str) -> str:
    ended = listener(*arguments, url=url)
    assert (ended.returncode, ended.stderr.count("\n"), ended.stdout) == (1, 1, ""), ended
    assert "Traceback" not in ended.stderr
    assert "\x1b" not in ended.stderr
    return ended.stderr


async def assert_metrics_name(service: ServiceProcess, views: set[str]) -> None:
    text = (await service.get("/metrics")).text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    assert {s.labels["view"] for s in samples if s.name == "listener_refreshes_total"} == views
    assert all(set(s.labels) <= {"view", "outcome", "le"} for s in samples)


async def test_odd_names_go_the_whole_way(odd: Database) -> None:
    views = {name: await arrange(odd, name) for name in NAMES.values()}
    values = sorted([*NAMES.values(), *MORE])
    async with service_process(odd.url(), max_attempts="1", sweep_interval="300ms") as service:
        await service.until("serving")
        for name in views:
            for tenant in values:
                await write(odd, name, tenant, 50)
        for name in views:

            async def is_shown(name: str = name) -> bool:
                found = await shown(odd, name)
                return sorted((t, k, int(share), n) for t, k, share, n in found) == [(v, v, 2, 1) for v in values]

            await eventually(is_shown)
        # The log is lines of JSON, each key by its own name; a name in lines did not end one.
        for name in views:
            for tenant in values:
                await service.until("refreshed", view=f"{name} v", tenant_id=tenant)
        await assert_metrics_name(service, {f"{name} v" for name in views})

        # And where one fails: backoff, letter, retry.
        name, view = next(iter(views.items()))
        poison = NAMES["lines"] + NAMES["quotes"]
        await write(odd, name, poison, 0)
        failed = await service.until("refresh failed; the key is quarantined", tenant_id=poison)
        (letter,) = json.loads(listener("dead-letters", "list", "--json", "--tenant", poison, url=odd.url()).stdout)
        assert (letter["id"], letter["view_name"]) == (failed["dead_letter"], f"{name} v")
        explained = json.loads(listener("explain", view, "--tenant", poison, "--json", url=odd.url()).stdout)
        assert (explained["view_name"], explained["tenant"]) == (f"{name} v", poison)
        retried = listener("dead-letters", "retry", "--view", f"{name} v", "--tenant", poison, url=odd.url())
        assert (retried.returncode, "failed: division by zero" in retried.stdout) == (1, True)
        assert "1 letter discarded" in listener("dead-letters", "discard", letter["id"], url=odd.url()).stdout
        assert (await service.get("/health/ready")).status_code == 200
        assert await service.end() == 0

    verified = json.loads(listener("verify", "--json", url=odd.url()).stdout)
    assert (verified["different"], verified["stale"], verified["failed"]) == (0, 0, 1)
    status = listener("status", url=odd.url()).stdout
    assert "\x1b" not in status
    assert status.count("\n") == 1 + len(views)
    for name in (NAMES["lines"], NAMES["more than ASCII"]):
        assert listener("pause", views[name], url=odd.url("listener_migrator")).returncode == 0
        assert "is paused" in one_line("refresh", views[name], "--tenant", name, url=odd.url())
        assert listener("resume", f"{name} v", url=odd.url("listener_migrator")).returncode == 0
        refreshed = listener("refresh", views[name], "--tenant", name, "--json", url=odd.url())
        assert json.loads(refreshed.stdout)["outcome"] == "refreshed"
    async with odd.connect("listener_migrator") as migrator:
        for view in list(views.values())[1:]:
            await migrator.execute("SELECT listener.drop_view(%s)", (view,))
    assert listener("uninstall", "--drop-targets", "--yes", url=odd.url("listener_migrator")).returncode == 0
    async with odd.connect() as superuser:
        cursor = await superuser.execute(
            "SELECT to_regclass('public.canary') IS NOT NULL, to_regnamespace('listener') IS NULL,"
            " NOT EXISTS (SELECT FROM pg_trigger WHERE tgname LIKE 'listener%'),"
            " NOT EXISTS (SELECT FROM pg_class WHERE relkind = 'r' AND relname LIKE '% v')"
        )
        assert await cursor.fetchone() == (True, True, True, True)


async def test_a_view_is_found_however_sql_may_write_its_name(database: Database) -> None:
    async with database.connect() as superuser:
        await superuser.execute(
            """
            CREATE TABLE public.numbers (n int);
            GRANT SELECT ON public.numbers TO listener_service;
            ALTER TABLE public.numbers OWNER TO listener_owner
            """
        )
        for name in ("public.plain", 'public."Odd.one"'):
            await superuser.execute(
                "SELECT listener.create_view(%s, 'SELECT n FROM public.numbers', tenant_column => NULL)", (name,)
            )
        found = "SELECT (listener.find_view(%s)).target_name::text"
        for spelled in ("plain", "public.plain", '"public"."plain"', 'public."plain"', "PUBLIC.Plain", ' "plain" '):
            assert await (await superuser.execute(found, (spelled,))).fetchone() == ("plain",)
        for spelled in ("Odd.one", '"Odd.one"', 'public."Odd.one"', '"public"."Odd.one"', "public.Odd.one"):
            assert await (await superuser.execute(found, (spelled,))).fetchone() == ("Odd.one",)
        for spelled in ('"Plain"', "odd.one", '"plain', "public.", "", "a.b.c.d"):
            with pytest.raises(psycopg.Error, match="there is no managed view"):
                await superuser.execute(found, (spelled,))


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
async def test_odd_names_that_nothing_has_are_refused_in_one_line(odd: Database, name: str) -> None:
    assert "there is no managed view" in one_line("refresh", name, "--tenant", name, url=odd.url())
    assert "no view has a tenant" in one_line("status", "--tenant", name, url=odd.url())
    assert "there is no letter" in one_line("dead-letters", "show", name, url=odd.url())
    async with odd.connect("listener_migrator") as migrator:
        for statement in (
            "SELECT listener.create_view(%(odd)s, 'SELECT 1 AS tenant_id', '{tenant_id}')",
            "SELECT listener.create_view('v', %(odd)s, '{tenant_id}')",
            "SELECT listener.create_view('v', 'SELECT 1 AS tenant_id', ARRAY[%(odd)s])",
            "SELECT listener.create_view('v', 'SELECT 1 AS tenant_id', '{tenant_id}', %(odd)s)",
            "SELECT listener.create_view('v', 'SELECT 1 AS tenant_id', '{tenant_id}', tenants_query => %(odd)s)",
            "SELECT listener.create_view('v', 'SELECT 1 AS tenant_id', '{tenant_id}', timezone => %(odd)s)",
            "SELECT listener.create_view('v', 'SELECT 1 AS tenant_id', '{tenant_id}', edge => %(odd)s)",
            "SELECT listener.drop_view(%(odd)s)",
            "SELECT listener.pause(%(odd)s)",
            "SELECT listener.set_notify(%(odd)s)",
        ):
            with pytest.raises(psycopg.Error) as refused:
                await migrator.execute(statement.encode(), {"odd": name})
            assert (refused.value.sqlstate or "").startswith("LSN"), (statement, refused.value)
        cursor = await migrator.execute("SELECT to_regclass('public.canary') IS NOT NULL")
        assert await cursor.fetchone() == (True,)
