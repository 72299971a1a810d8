"""Two teams share one service: each has a role that computes its views, and its code reaches nothing of the other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import AsyncConnection

from command import listener
from conftest import Database, Server

pytestmark = pytest.mark.anyio

# What the code of team a tries, each of which must fail. {b} is the schema of team b, and {l} is listener: a table that
# a function's text names would become a source of the view.
ATTEMPTS = (
    "SELECT secret FROM {b}.sources",
    "SELECT n FROM {b}.totals",
    "UPDATE {b}.totals SET n = 666",
    "DELETE FROM {b}.totals",
    "TRUNCATE {b}.totals",
    "SELECT * FROM {l}.change_log",
    "SELECT * FROM {l}.refresh_state",
    "UPDATE {l}.refresh_state SET refreshed_version = 9999",
    "INSERT INTO {l}.change_log (xid, changed_at, view_id, tenant) VALUES (pg_current_xact_id(), now(), 2, '')",
    "SELECT * FROM {l}.definition_2",
    "SELECT * FROM {l}.tenants_2",
    "SELECT listener_private.evaluate_2('SELECT to_jsonb(s) FROM {b}.sources s', 't1')",
    "SELECT * FROM listener_private.difference_2('t1')",
    "SELECT {l}.refresh('{b}.totals', 't1')",
    "SELECT {l}.tenants('{b}.totals')",
    "SELECT {l}.compare('{b}.totals', 't1')",
    "SELECT {l}.drain()",
    "SELECT {l}.record_failure(2, 't1', 'i', 'e', 's', 'c', 'm', 't', 'w', 1, '1 s', '1 s', '1 h')",
    "SELECT {l}.set_window('{b}.totals', max_wait => '1 day')",
    "ALTER FUNCTION listener_private.evaluate_1(text, text) SECURITY INVOKER",
    "ALTER FUNCTION {l}.refresh(text, text) SECURITY INVOKER",
    "SET ROLE listener_compute",
    "SET ROLE team_b_compute",
    "SET ROLE listener_owner",
    "SET SESSION AUTHORIZATION listener_service",
    "GRANT team_b_compute TO team_a",
    "ALTER ROLE team_a SUPERUSER",
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'listener_service'",
    "COPY {b}.totals TO PROGRAM 'true'",
)

TEAMS = """
DO $$ BEGIN
    IF to_regrole('team_a') IS NULL THEN
        CREATE ROLE team_a; CREATE ROLE team_b; CREATE ROLE team_a_compute NOLOGIN; CREATE ROLE team_b_compute NOLOGIN;
    END IF;
END $$;
GRANT team_a, team_b, team_a_compute, team_b_compute TO listener_owner;
CREATE SCHEMA team_a AUTHORIZATION team_a;
CREATE SCHEMA team_b AUTHORIZATION team_b;
SET ROLE team_a;
CREATE TABLE team_a.tried (attempt text, as_role text, succeeded boolean);
GRANT INSERT ON team_a.tried TO team_a_compute;
GRANT USAGE ON SCHEMA team_a TO team_a_compute;
GRANT USAGE, CREATE ON SCHEMA team_a TO listener_owner;
CREATE TABLE team_a.sources (tenant_id text NOT NULL, secret text);
INSERT INTO team_a.sources VALUES ('t1', 'of a');
GRANT SELECT ON team_a.sources TO team_a_compute;
CREATE FUNCTION team_a.sees(tenant text) RETURNS boolean LANGUAGE plpgsql AS $sees$
DECLARE
    attempt text;
    succeeded boolean;
    attempts CONSTANT text[] := {attempts};
BEGIN
    FOREACH attempt IN ARRAY attempts LOOP
        BEGIN
            EXECUTE pg_catalog.replace(pg_catalog.replace(attempt, '{b}', 'team_' || 'b'), '{l}', 'list' || 'ener');
            succeeded := true;
        EXCEPTION WHEN OTHERS THEN
            succeeded := false;
        END;
        EXECUTE pg_catalog.replace('INSERT INTO {a}.tried VALUES ($1, $2, $3)', '{a}', 'team_' || 'a')
        USING attempt, current_user, succeeded;
    END LOOP;
    RETURN tenant = nullif(current_setting('app.current_tenant_id', true), '');
END
$sees$;
ALTER TABLE team_a.sources ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant ON team_a.sources USING (team_a.sees(tenant_id));
RESET ROLE;
SET ROLE team_b;
GRANT USAGE ON SCHEMA team_b TO team_b_compute;
GRANT USAGE, CREATE ON SCHEMA team_b TO listener_owner;
CREATE TABLE team_b.sources (tenant_id text NOT NULL, secret text);
INSERT INTO team_b.sources VALUES ('t1', 'of b'), ('t1', 'of b, too');
GRANT SELECT ON team_b.sources TO team_b_compute;
RESET ROLE;
"""
VIEWS = """
SELECT listener.create_view('team_a.totals', 'SELECT tenant_id, count(*) AS n FROM team_a.sources GROUP BY 1',
    '{tenant_id}', tenants_query => $$SELECT 't1'$$, depends_on => '{}', compute_role => 'team_a_compute');
SELECT listener.create_view('team_b.totals', 'SELECT tenant_id, count(*) AS n FROM team_b.sources GROUP BY 1',
    '{tenant_id}', compute_role => 'team_b_compute');
"""


def literal(statements: tuple[str, ...]) -> str:
    return "ARRAY[" + ", ".join("'" + s.replace("'", "''") + "'" for s in statements) + "]"


@pytest.fixture
async def teams(database: Database) -> AsyncIterator[AsyncConnection[Any]]:
    """Both teams with a view each; a superuser, who looks."""
    async with database.connect() as superuser:
        await superuser.execute(TEAMS.replace("{attempts}", literal(ATTEMPTS)).encode())
        await superuser.execute(VIEWS.encode())
        yield superuser


async def test_the_code_of_one_team_reaches_nothing_of_another(teams: AsyncConnection[Any], database: Database) -> None:
    for arguments in (("sweep",), ("verify",), ("doctor",)):
        ended = listener(*arguments, url=database.url())
        assert ended.returncode in {0, 1}, ended.stdout + ended.stderr
    cursor = await teams.execute("SELECT * FROM team_a.totals UNION ALL SELECT * FROM team_b.totals")
    assert await cursor.fetchall() == [("t1", 1), ("t1", 2)]
    cursor = await teams.execute("SELECT DISTINCT attempt, as_role FROM team_a.tried")
    assert set(await cursor.fetchall()) == {(attempt, "team_a_compute") for attempt in ATTEMPTS}
    cursor = await teams.execute("SELECT DISTINCT attempt FROM team_a.tried WHERE succeeded")
    # It finds no session that it may end.
    assert [attempt for (attempt,) in await cursor.fetchall() if "pg_terminate_backend" not in attempt] == []
    cursor = await teams.execute("SELECT count(*) FROM pg_stat_activity WHERE usename = 'listener_service'")
    assert await cursor.fetchone() is not None


async def test_the_service_itself_may_read_neither_team(teams: AsyncConnection[Any], database: Database) -> None:
    async with database.connect("listener_service") as service:
        for relation in ("team_a.sources", "team_b.sources", "team_a.totals", "listener.definition_1"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                await service.execute(f"SELECT FROM {relation}".encode())
    cursor = await teams.execute("SELECT source FROM listener.changed_definitions() c (source)")
    assert await cursor.fetchall() == []


async def test_a_running_service_keeps_the_views_of_both(teams: AsyncConnection[Any], database: Database) -> None:
    async with database.service() as service:
        await teams.execute("INSERT INTO team_b.sources VALUES ('t2', 'new')")
        await service.until_refreshed("team_b.totals", "t2")
        assert await service.service.reasons_not_ready() == []
    cursor = await teams.execute("SELECT n FROM team_b.totals WHERE tenant_id = 't2'")
    assert await cursor.fetchall() == [(1,)]


async def test_a_view_changes_the_role_that_it_is_computed_as(teams: AsyncConnection[Any], database: Database) -> None:
    assert listener("sweep", url=database.url()).returncode == 0
    with pytest.raises(psycopg.Error, match="may not read what the query reads"):
        await teams.execute("SELECT listener.set_compute_role('team_b.totals', 'team_a_compute')")
    await teams.execute(
        "GRANT SELECT ON team_b.sources TO listener_service; GRANT USAGE ON SCHEMA team_b TO listener_service"
    )
    await teams.execute("SELECT listener.set_compute_role('team_b.totals', NULL)")
    await teams.execute("INSERT INTO team_b.sources VALUES ('t3', 'new')")
    assert listener("sweep", url=database.url()).returncode == 0
    cursor = await teams.execute("SELECT n FROM team_b.totals WHERE tenant_id = 't3'")
    assert await cursor.fetchall() == [(1,)]
    cursor = await teams.execute("SELECT has_table_privilege('team_b_compute', 'team_b.totals', 'SELECT')")
    assert await cursor.fetchone() == (False,)


async def test_doctor_warns_where_the_views_of_two_teams_are_computed_as_one_role(teams: AsyncConnection[Any]) -> None:
    findings: LiteralString = """
        SELECT object, view FROM listener.function_findings()
        WHERE problem LIKE '%views over tables of team_a, team_b:%'
        """
    assert await (await teams.execute(findings)).fetchall() == []
    await teams.execute(
        """
        GRANT USAGE ON SCHEMA team_a, team_b TO listener_service;
        GRANT SELECT ON team_a.sources, team_b.sources TO listener_service;
        SELECT listener.set_compute_role('team_a.totals', NULL), listener.set_compute_role('team_b.totals', NULL)
        """
    )
    cursor = await teams.execute(findings)
    assert await cursor.fetchall() == [("listener_compute", "team_b.totals, totals")]


async def test_a_materialized_view_is_adopted_altered_and_turned_back_with_a_role_of_its_own(
    teams: AsyncConnection[Any], database: Database
) -> None:
    await teams.execute(
        """
        CREATE ROLE team_b_reader;
        SET ROLE team_b;
        CREATE MATERIALIZED VIEW team_b.secrets AS SELECT tenant_id, count(*) AS n FROM team_b.sources GROUP BY 1;
        CREATE UNIQUE INDEX ON team_b.secrets (tenant_id);
        GRANT SELECT ON team_b.secrets TO team_b_reader, PUBLIC;
        RESET ROLE
        """
    )

    def ok(*arguments: str) -> None:
        ended = listener(*arguments, url=database.url("postgres"))
        assert ended.returncode == 0, ended.stdout + ended.stderr

    async def rights() -> set[str]:
        cursor = await teams.execute(
            """
            SELECT CASE WHEN a.grantee = 0 THEN 'PUBLIC' ELSE pg_get_userbyid(a.grantee) END || ' ' || a.privilege_type
            FROM pg_class c CROSS JOIN LATERAL aclexplode(c.relacl) a
            WHERE c.oid = 'team_b.secrets'::regclass AND a.grantee <> c.relowner
            """
        )
        return {row[0] for row in await cursor.fetchall()}

    try:
        readers = {"team_b_reader SELECT", "PUBLIC SELECT"}
        writer = {f"team_b_compute {right}" for right in ("SELECT", "INSERT", "UPDATE", "DELETE")}
        ok("adopt", "team_b.secrets", "--compute-role", "team_b_compute")
        assert await rights() == readers | writer
        await teams.execute("INSERT INTO team_b.sources VALUES ('t2', 'new')")
        ok("sweep")
        ok("views", "alter", "secrets", "--timezone", "Europe/Berlin", "--yes")
        assert await rights() == readers | writer
        await teams.execute("INSERT INTO team_b.sources VALUES ('t2', 'newer')")
        ok("sweep")
        ok("verify", "secrets")
        ok("unadopt", "team_b.secrets")
        assert await rights() == readers
        cursor = await teams.execute("SELECT tenant_id, n FROM team_b.secrets ORDER BY 1")
        assert await cursor.fetchall() == [("t1", 2), ("t2", 2)]
    finally:
        await teams.execute("DROP OWNED BY team_b_reader; DROP ROLE team_b_reader")


LOOK_UP: LiteralString = """
SET ROLE team_b;
CREATE TABLE team_b.parents (id int PRIMARY KEY, tenant_id text);
CREATE TABLE team_b.lines (parent_id int REFERENCES team_b.parents);
RESET ROLE;
"""
ADD_LOOK_UP: LiteralString = "SELECT listener.add_source('team_b.lines', through => 'team_b.parents')"


async def test_teams_that_are_kept_apart_have_no_look_up_unless_it_runs_no_policy(
    teams: AsyncConnection[Any],
) -> None:
    await teams.execute(LOOK_UP)
    with pytest.raises(psycopg.Error, match="teams are not kept apart") as refused:
        await teams.execute(ADD_LOOK_UP)
    assert refused.value.sqlstate == "LSN03"
    await teams.execute("SELECT listener.drop_view('team_a.totals'), listener.drop_view('team_b.totals')")
    await teams.execute(ADD_LOOK_UP)
    with pytest.raises(psycopg.Error, match="teams are not kept apart") as refused:
        await teams.execute(VIEWS.encode())
    assert "BYPASSRLS" in str(refused.value.diag.message_hint)
    await teams.execute("ALTER ROLE listener_owner BYPASSRLS")
    try:
        await teams.execute(VIEWS.encode())
    finally:
        await teams.execute("ALTER ROLE listener_owner NOBYPASSRLS")


REFUSED = {
    "none of that name": ("SELECT 1", "nobody_computes", "there is no such role", "CREATE ROLE"),
    "one that may log in": ("CREATE ROLE may_log_in LOGIN", "may_log_in", "it may log in", "NOLOGIN"),
    "one that row-level security does not bind": (
        "CREATE ROLE unbound BYPASSRLS", "unbound", "row-level security does not bind it", "NOBYPASSRLS",
    ),
    # Nobody is told to take away what somebody may need.
    "a superuser": ("CREATE ROLE above_all SUPERUSER", "above_all", "it is a superuser", "Name another role"),
    "a member of the service": (
        "CREATE ROLE of_service; GRANT listener_service TO of_service",
        "of_service", "member of listener_service", "REVOKE",
    ),
    "one that the owner may not act as": (
        "CREATE ROLE of_nobody", "of_nobody", "is no member of it", "GRANT of_nobody TO",
    ),
    "the service": ("SELECT 1", "listener_compute", "it is a role of the installation", "CREATE ROLE"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
async def test_a_role_that_is_not_fit_is_refused_with_what_to_do(
    teams: AsyncConnection[Any], server: Server, what: str
) -> None:
    statement, role, message, hint = REFUSED[what]
    try:
        await teams.execute(statement.encode())
        with pytest.raises(psycopg.Error, match=message) as refused:
            await teams.execute("SELECT listener.set_compute_role('team_a.totals', %s)", (role,))
        assert refused.value.sqlstate == "LSN03"
        assert hint in str(refused.value.diag.message_hint)
    finally:
        if statement.startswith("CREATE"):
            await teams.execute(f"DROP ROLE {role}".encode())


async def test_a_view_of_a_team_is_computed_under_any_style(teams: AsyncConnection[Any], database: Database) -> None:
    """Values whose text depends on DateStyle are compared and written through functions that the role may call."""
    await teams.execute("SET DateStyle = 'SQL, DMY'")
    await teams.execute(
        """SELECT listener.create_view('team_b.ranges',
               'SELECT tenant_id, count(*)::numeric AS n, tstzrange(''2 March 2026'', NULL) AS since
                FROM team_b.sources GROUP BY 1',
               '{tenant_id}', tenants_query => $$SELECT 't1'$$, compute_role => 'team_b_compute')"""
    )
    assert listener("sweep", url=database.url()).returncode == 0
    cursor = await teams.execute("SELECT n FROM team_b.ranges WHERE lower(since) = '2026-03-02 00:00+00'")
    assert await cursor.fetchall() == [(2,)]
