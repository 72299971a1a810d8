"""On a managed service: an administrator who is no superuser sets everything up, and roles may be shared."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio
import psycopg
import pytest
from psycopg import sql
from structlog.testing import capture_logs

from command import listener
from conftest import DEADLINE, Database, RunningService, Server, settings_for
from listener.doctor import Finding, examine
from listener.service import Service

pytestmark = pytest.mark.anyio

TENANT = "11111111-1111-4111-8111-111111111111"
TABLES = """
CREATE TABLE tenants (id uuid PRIMARY KEY);
CREATE TABLE sales (tenant_id uuid NOT NULL, cents bigint NOT NULL);
CREATE INDEX ON sales (tenant_id);
ALTER TABLE sales ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant ON sales USING (tenant_id = current_setting('app.current_tenant_id')::uuid);
INSERT INTO tenants VALUES ('11111111-1111-4111-8111-111111111111')
"""
VIEW = """
SELECT listener.create_view('turnover', 'SELECT tenant_id, sum(cents)::bigint AS cents FROM public.sales GROUP BY 1',
                            '{}', tenants_query => 'SELECT id FROM public.tenants')
"""


@dataclass(frozen=True)
class Managed:
    """A database of `managed_admin`, who may make roles and databases and is no superuser."""

    database: Database
    settings: dict[str, str]

    def do(self, user: str, statements: str) -> None:
        """As this user, a statement at a time."""
        with psycopg.connect(self.database.url(user), autocommit=True) as connection:
            connection.execute(statements.encode())

    def command(self, *arguments: str, user: str = "managed_admin") -> str:
        """What it prints; it must succeed."""
        ended = listener(*arguments, url=self.database.url(user), **self.settings)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    def given(self) -> dict[str, str]:
        """The settings of a service in this process."""
        return {name.removeprefix("LISTENER_").lower(): value for name, value in self.settings.items()}


ROLES = ("managed_keeper", "managed_compute", "managed_app_compute", "managed_service", "managed_app", "managed_admin")


@pytest.fixture
def managed(server: Server) -> Iterator[Managed]:
    """The administrator, his database, the application's role and tables; nothing of listener's."""
    name = "listener_managed"
    with psycopg.connect(server.url("postgres", "postgres"), autocommit=True) as superuser:
        superuser.execute("CREATE ROLE managed_admin LOGIN CREATEROLE CREATEDB")
    with psycopg.connect(server.url("managed_admin", "postgres"), autocommit=True) as administrator:
        administrator.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        administrator.execute("CREATE ROLE managed_app LOGIN")
    database = Database(server, name)
    made = Managed(database, {"LISTENER_OWNER_ROLE": "managed_keeper", "LISTENER_SERVICE_ROLE": "managed_service"})
    try:
        # In a database of one's own `public` is the owner's to grant.
        made.do("managed_admin", "GRANT CREATE ON SCHEMA public TO managed_app")
        made.do("managed_app", TABLES)
        yield made
    finally:
        server.drop(name)
        with psycopg.connect(server.url("postgres", "postgres"), autocommit=True) as superuser:
            for role in ROLES:
                superuser.execute(sql.SQL("DROP ROLE IF EXISTS {}").format(sql.Identifier(role)))


@asynccontextmanager
async def running(managed: Managed) -> AsyncIterator[RunningService]:
    """A service with these roles."""
    user = managed.settings["LISTENER_SERVICE_ROLE"]
    replica = RunningService()
    replica.service = Service(settings_for(managed.database.url(user), **managed.given()), on_outcome=replica.record)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(replica.service.run)
        with anyio.fail_after(DEADLINE):
            await replica.service.started.wait()
        try:
            yield replica
        finally:
            replica.service.stop()


def set_up(managed: Managed) -> None:
    """As docs/managed-services.md tells: nobody here is a superuser."""
    managed.do("managed_admin", managed.command("roles", "--database", managed.database.name))
    managed.command("migrate")
    owner, service = managed.settings["LISTENER_OWNER_ROLE"], managed.settings["LISTENER_SERVICE_ROLE"]
    statements = [f"GRANT USAGE, CREATE ON SCHEMA public TO {owner}", f"GRANT USAGE ON SCHEMA public TO {service}"]
    if "managed_app" not in {owner, service}:
        statements.append(f"GRANT managed_app TO {owner}")
    for statement in statements:
        managed.do("managed_admin", statement)
    if service != "managed_app":
        managed.do("managed_app", f"GRANT SELECT ON tenants, sales TO {service}")
    managed.do("managed_admin", VIEW)


def sweep(managed: Managed) -> int:
    """What the target shows after a write and a sweep by hand."""
    service = managed.settings["LISTENER_SERVICE_ROLE"]
    with psycopg.connect(managed.database.url("managed_app"), autocommit=True) as application:
        application.execute("SELECT set_config('app.current_tenant_id', %s, false)", (TENANT,))
        application.execute("INSERT INTO sales VALUES (%s, 5)", (TENANT,))
    managed.command("sweep", user=service)
    managed.command("verify", user=service)
    with psycopg.connect(managed.database.url(service), autocommit=True) as reader:
        row = reader.execute("SELECT cents FROM turnover WHERE tenant_id = %s", (TENANT,)).fetchone()
    assert row is not None
    return int(row[0])


async def complaints(managed: Managed, user: str) -> list[Finding]:
    """Errors and warnings of the doctor."""
    found = await examine(settings_for(managed.database.url(user), **managed.given()))
    return [f for f in found if f.level != "ok"]


async def test_an_administrator_who_is_no_superuser_sets_it_up_and_takes_it_away(managed: Managed) -> None:
    set_up(managed)
    assert sweep(managed) == 5
    found = await complaints(managed, "managed_service")
    if found:  # from PostgreSQL 16 on, no administrator may give this one right without having its ADMIN option
        assert [f.mend for f in found] == ["GRANT pg_read_all_stats TO managed_service;"]
        managed.do("postgres", found[0].mend or "")
    assert await complaints(managed, "managed_service") == []
    managed.command("pause")
    managed.command("resume")
    managed.command("migrate")
    assert sweep(managed) == 10
    managed.command("uninstall", "--yes", "--drop-targets")


async def test_a_service_runs_where_nobody_is_a_superuser(managed: Managed) -> None:
    set_up(managed)
    async with managed.database.connect("managed_app") as application:
        await application.execute("SELECT set_config('app.current_tenant_id', %s, false)", (TENANT,))
        async with running(managed) as service:
            await application.execute("INSERT INTO sales VALUES (%s, 7)", (TENANT,))
            await service.until_refreshed("turnover", TENANT)
            assert await service.service.reasons_not_ready() == []


SHARED = {
    "service": (
        {"LISTENER_OWNER_ROLE": "managed_keeper", "LISTENER_SERVICE_ROLE": "managed_app"},
        ["the service may write public.sales", "the application may read the change log and refresh every tenant"],
    ),
    "owner": (
        {"LISTENER_OWNER_ROLE": "managed_app", "LISTENER_SERVICE_ROLE": "managed_service"},
        ["the application may change what the schema listener manages, and read and refresh every tenant"],
    ),
    "both": (
        {"LISTENER_OWNER_ROLE": "managed_app", "LISTENER_SERVICE_ROLE": "managed_app"},
        [
            "the service may change what the schema listener manages",
            "the application may change what the schema listener manages, and read and refresh every tenant",
            "the service may write public.sales",
        ],
    ),
}


@pytest.mark.parametrize("what", SHARED)
async def test_the_applications_role_may_be_the_services_or_the_owners_and_what_falls_away_is_told(
    managed: Managed, what: str
) -> None:
    settings, lost = SHARED[what]
    managed = Managed(managed.database, settings)
    set_up(managed)
    assert sweep(managed) == 5
    service = settings["LISTENER_SERVICE_ROLE"]
    found = [f for f in await complaints(managed, service) if "pg_read_all_stats" not in (f.mend or "")]
    assert [(f.level, f.object, f.problem) for f in found] == [
        ("warning", service, f"roles are shared, and guarantees fall away: {'; '.join(lost)}.")
    ]
    with capture_logs() as logged:
        async with running(managed) as replica, managed.database.connect("managed_app") as application:
            await application.execute("SELECT set_config('app.current_tenant_id', %s, false)", (TENANT,))
            await application.execute("INSERT INTO sales VALUES (%s, 7)", (TENANT,))
            await replica.until_refreshed("turnover", TENANT)
            assert await replica.service.reasons_not_ready() == []
    told = [line for line in logged if line["event"].startswith("roles are shared")]
    assert [line["guarantees"] for line in told] == [lost]
    # Row-level security is forced: it binds the owner of the table, too, and the target is exact.
    managed.command("verify", user=service)


async def test_a_shared_role_that_row_security_does_not_bind_is_told(managed: Managed) -> None:
    managed = Managed(managed.database, SHARED["service"][0])
    managed.do("managed_app", "ALTER TABLE sales NO FORCE ROW LEVEL SECURITY")
    set_up(managed)
    assert sweep(managed) == 5
    found = await complaints(managed, "managed_app")
    assert any("row-level security of public.sales does not bind the service" in f.problem for f in found)
