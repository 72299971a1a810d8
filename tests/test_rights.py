"""Nobody's code runs with somebody else's rights: a team's functions, policies, operators, casts, checks, triggers.

A team's code tries what it can at each place where a command plans or evaluates it. What it finds out it writes into
sequences, which no rollback takes back: `ran` that it ran at all, `broken` that it had rights that it must not have.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import AsyncConnection

from command import listener
from conftest import Database

pytestmark = pytest.mark.anyio


ON_TARGET = """
CREATE INDEX ON team.totals (team.fee(fee));
ALTER TABLE team.totals ADD CHECK (team.fee(1) = 2);
CREATE FUNCTION team.on_write() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM team.attack(); RETURN NEW; END $$;
CREATE TRIGGER on_write BEFORE INSERT OR UPDATE ON team.totals FOR EACH ROW EXECUTE FUNCTION team.on_write();
"""

QUERY = """
SELECT tenant_id, sum(team.fee(v))::bigint::team.amount AS n, team.fee(4) AS fee FROM team.sales GROUP BY tenant_id
"""


@pytest.fixture
async def team(database: Database) -> AsyncIterator[AsyncConnection[Any]]:
    """A database with the team's schema; the superuser's connection, which looks what came of it."""
    async with database.connect() as superuser:
        await superuser.execute((Path(__file__).parent / "team.sql").read_bytes())
        try:
            yield superuser
        finally:
            await superuser.execute("ALTER ROLE team NOSUPERUSER")


async def unharmed(superuser: AsyncConnection[Any], what: str) -> None:
    """Nothing of the team's code ran with rights that are not its own, and it got none."""
    cursor = await superuser.execute(
        """
        SELECT (SELECT is_called FROM team.broken), (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = 'team'),
               pg_catalog.pg_has_role('team', 'listener_owner', 'MEMBER'),
               (SELECT count(*) FROM pg_catalog.pg_proc p
                WHERE p.proname IN ('compare', 'refresh', 'evaluate_1', 'difference_1')
                AND p.pronamespace IN (to_regnamespace('listener'), to_regnamespace('listener_private'))
                AND NOT p.prosecdef AND p.prolang <> (SELECT oid FROM pg_catalog.pg_language WHERE lanname = 'sql'))
        """
    )
    assert await cursor.fetchone() == (False, False, False, 0), what


async def has_run(superuser: AsyncConnection[Any]) -> bool:
    """Whether the team's code ran since this was asked last: an attack that never runs proves nothing."""
    cursor = await superuser.execute("SELECT is_called, setval('team.ran', 1, false) FROM team.ran")
    row = await cursor.fetchone()
    assert row is not None
    return bool(row[0])


@pytest.mark.parametrize("user", ["postgres", "rights_admin"])
async def test_no_command_lends_its_rights_to_the_code_of_a_team(
    team: AsyncConnection[Any], database: Database, user: str, tmp_path: Path
) -> None:
    url = database.url(user)
    (tmp_path / "query.sql").write_text(QUERY)
    files = str(tmp_path / "views")
    adopting = (
        "adopt",
        "team.totals",
        "--tenants-query",
        "SELECT id FROM team.tenants",
        "--strategy",
        "tenant",
        "--depends-on",
        "",
    )
    commands: list[tuple[tuple[str, ...], bool]] = [
        (("inventory",), True),
        (("inventory", "--compare"), True),
        ((*adopting, "--dry-run"), False),
        (adopting, True),
        (("doctor",), True),
        (("status",), False),
        (("explain", "totals", "--tenant", "t1"), False),
        (("verify",), True),
        (("fill", "totals"), False),
        (("refresh", "totals", "--tenant", "t1"), True),
        (("sweep",), False),
        (("views", "export", files), False),
        (("views", "plan", files), False),
        (("views", "alter", "totals", "--query", str(tmp_path / "query.sql"), "--yes"), True),
        (("doctor",), True),
        (("dead-letters", "list"), False),
        (("unadopt", "totals", "--dry-run"), False),
        (("unadopt", "totals"), True),
        (("inventory",), True),
        (("migrate",), False),
        (("uninstall", "--yes"), False),
    ]
    for arguments, runs_code in commands:
        ended = listener(*arguments, url=url, LISTENER_ALLOW_SUPERUSER="true")
        what = f"{user}: {' '.join(arguments)}\n{ended.stdout}{ended.stderr}"
        await unharmed(team, what)
        assert ended.returncode == 0 or arguments[0] == "doctor", what
        assert await has_run(team) or not runs_code, what
        if arguments == adopting:
            # As itself: whoever sets a role and runs a team's code has lent it the session.
            async with database.connect("team") as owner:
                await owner.execute(ON_TARGET.encode())
            # In a session of its own it may do some of what it tries.
            await team.execute("SELECT setval('team.broken', 1, false)")
        elif arguments[:2] == ("views", "plan"):
            # Nothing may be tied to a target that is altered or turned back.
            await team.execute(
                "DROP TRIGGER on_write ON team.totals; ALTER TABLE team.totals DROP CONSTRAINT totals_check;"
                # Else the doctor has more to say of the view than a plan does.
                "ALTER TABLE team.sales FORCE ROW LEVEL SECURITY"
            )


@pytest.mark.parametrize("user", ["postgres", "rights_admin"])
async def test_no_function_lends_its_rights_to_the_code_of_a_team(
    team: AsyncConnection[Any], database: Database, user: str
) -> None:
    async with database.connect(user) as administrator:
        await administrator.execute("SET search_path = pg_catalog, pg_temp")
        await administrator.execute(
            """
            SELECT listener.create_view('team.turnover', %s, '{tenant_id}',
                                        tenants_query => 'SELECT id FROM team.tenants',
                                        depends_on => '{}')
            """,
            (QUERY,),
        )
        await unharmed(team, "create_view")
        assert await has_run(team)
        for call in (
            "SELECT t FROM listener.tenants('turnover') t",
            "SELECT outcome FROM listener.refresh('turnover', 't1')",
            "SELECT outcome FROM listener.refresh('turnover', 't2')",
            "SELECT missing FROM listener.compare('turnover', 't1')",
            "SELECT listener.drift_example('turnover', 't1')",
            "SELECT outcome FROM listener.check_drift('turnover', 't1')",
            "SELECT tenants FROM listener.expand('turnover')",
            "SELECT source FROM listener.scope_findings() f (kind, level, view, source)",
            "SELECT missing FROM listener.compare_materialized_view('team.totals')",
            "SELECT kind FROM listener.take_stock('team.totals', '{tenant_id}')",
            "SELECT view FROM listener.changed_definitions()",
            "SELECT source FROM listener.repair_capture()",
            "SELECT trouble FROM listener.view_troubles()",
            "SELECT listener.begin_alter('turnover', key_columns => '{tenant_id, n}')",
            "SELECT listener.abort_alter('turnover')",
        ):
            await administrator.execute(call.encode())
            # In the session that is left: an operator without its schema, of types that team has one for.
            await administrator.execute("SELECT 'a'::text = 'a'::text")
            await unharmed(team, call)
        await team.execute("DELETE FROM team.sales WHERE tenant_id = 't2'; DELETE FROM team.tenants WHERE id = 't2'")
        await administrator.execute("SELECT view_name FROM listener.forget('t2')")
        await administrator.execute("SELECT 'a'::text = 'a'::text")
        await unharmed(team, "forget")
        await administrator.execute("SELECT listener.drop_view('turnover')")
        await unharmed(team, "drop_view")


async def test_the_role_that_the_service_logs_in_as_owns_no_function_and_may_alter_none(
    team: AsyncConnection[Any], database: Database
) -> None:
    await team.execute(
        """
        SELECT listener.create_view('turnover', 'SELECT tenant_id, sum(v) AS v FROM team.sales GROUP BY 1',
                                    tenants_query => 'SELECT id FROM team.tenants', depends_on => '{}')
        """
    )
    cursor = await team.execute(
        """
        SELECT p.oid::regprocedure::text FROM pg_proc p
        WHERE p.pronamespace IN ('listener'::regnamespace, 'listener_private'::regnamespace)
          AND pg_has_role('listener_service', p.proowner, 'MEMBER')
        """
    )
    assert await cursor.fetchall() == []
    async with database.connect("listener_service") as service:
        for statement in (
            "ALTER FUNCTION listener.compare(text, text) SECURITY INVOKER",
            "ALTER FUNCTION listener_private.evaluate_1(text, text) SECURITY INVOKER",
            "SELECT listener_private.evaluate_1('SELECT to_jsonb(1)', 't1')",
            "SET ROLE listener_compute",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                await service.execute(statement.encode())


ALTERED = {
    "to its caller's rights": "ALTER FUNCTION listener.compare(text, text) SECURITY INVOKER",
    "to another path": "ALTER FUNCTION listener.tenants(text) SET search_path = team, pg_catalog",
    "of a view, to its caller's rights": "ALTER FUNCTION listener_private.evaluate_1(text, text) SECURITY INVOKER",
    "dropped": "DROP FUNCTION listener_private.plan_1(text[], jsonb)",
}


@pytest.mark.parametrize("alteration", ALTERED)
async def test_doctor_finds_a_function_that_somebody_altered_and_migrate_makes_it_again(
    team: AsyncConnection[Any], database: Database, alteration: str
) -> None:
    await team.execute(
        """
        SELECT listener.create_view('turnover', 'SELECT tenant_id, sum(v) AS v FROM team.sales GROUP BY 1',
                                    tenants_query => 'SELECT id FROM team.tenants', depends_on => '{}')
        """
    )
    findings = "SELECT object, mend FROM listener.function_findings() WHERE level = 'error'"
    assert await (await team.execute(findings)).fetchall() == []
    await team.execute(ALTERED[alteration].encode())
    found = await (await team.execute(findings)).fetchall()
    assert [mend for _, mend in found] == ["listener migrate"]
    assert listener("migrate", url=database.url("listener_migrator")).returncode == 0
    assert await (await team.execute(findings)).fetchall() == []
