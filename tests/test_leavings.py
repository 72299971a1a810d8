"""What the code of a team leaves in the session that computes: nothing that a later statement would run.

A prepared statement, a cursor WITH HOLD, a type of a common name, a trigger that waits for the commit: PostgreSQL runs
each with the rights that the session has by then, not with those of the code that made it.
"""

# ruff: noqa: S608 - the statements are made of the text below

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import AsyncConnection, sql

from conftest import Database
from shop import one, rows, settle

pytestmark = pytest.mark.anyio

TEAM: LiteralString = """
DO $$ BEGIN
    IF to_regrole('leaver') IS NULL THEN CREATE ROLE leaver LOGIN; END IF;
    IF to_regrole('leaver_compute') IS NULL THEN CREATE ROLE leaver_compute NOLOGIN; END IF;
END $$;
GRANT leaver, leaver_compute TO listener_owner;
CREATE SCHEMA leaver AUTHORIZATION leaver;
GRANT USAGE ON SCHEMA leaver TO PUBLIC;
GRANT CREATE ON SCHEMA leaver TO listener_owner;
SET ROLE leaver;
CREATE TABLE leaver.ran (how text, as_role name);
CREATE TABLE leaver.side (x int);
GRANT ALL ON leaver.ran, leaver.side TO PUBLIC;
CREATE TABLE leaver.sales (tenant_id text NOT NULL, v int NOT NULL);
INSERT INTO leaver.sales VALUES ('t1', 1), ('t2', 2);
GRANT SELECT ON leaver.sales TO leaver_compute;
CREATE FUNCTION leaver.note(how text) RETURNS int LANGUAGE plpgsql AS
    $$ BEGIN INSERT INTO leaver.ran VALUES (how, current_user); RETURN 1; END $$;
CREATE FUNCTION leaver.on_side() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN PERFORM leaver.note('deferred'); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER waits AFTER INSERT ON leaver.side DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION leaver.on_side();
CREATE FUNCTION leaver.act() RETURNS void LANGUAGE plpgsql AS 'BEGIN END';
CREATE FUNCTION leaver.leave(v int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS
    'BEGIN PERFORM leaver.act(); RETURN v; END';
RESET ROLE;
SELECT listener.create_view('leaver.shown',
                            'SELECT tenant_id, leaver.leave(sum(v)::int) AS v FROM leaver.sales GROUP BY 1',
                            '{tenant_id}', depends_on => '{}', compute_role => 'leaver_compute');
"""

# What the code of the team does, and what a session that computed does later.
LEAVINGS: dict[str, tuple[LiteralString, LiteralString]] = {
    "a prepared statement": ("EXECUTE 'PREPARE theirs AS SELECT leaver.note(''prepared'')'", "EXECUTE theirs"),
    "a cursor that outlives the transaction": (
        "EXECUTE 'DECLARE theirs CURSOR WITH HOLD FOR SELECT leaver.note(''held'')'",
        "FETCH theirs",
    ),
    "a type of a common name": (
        "CREATE DOMAIN pg_temp.text AS pg_catalog.text CHECK (leaver.note('checked') = 1)",
        "SELECT 'x'::text",
    ),
    "a function": (
        "CREATE FUNCTION pg_temp.theirs() RETURNS int LANGUAGE sql AS 'SELECT leaver.note(''called'')'",
        "SELECT pg_temp.theirs()",
    ),
    "a table": (
        "CREATE TEMPORARY TABLE pg_class (x int DEFAULT leaver.note('inserted'))",
        "INSERT INTO pg_class DEFAULT VALUES",
    ),
    "a trigger that waits": ("INSERT INTO leaver.side VALUES (1)", "SELECT 1"),
    "a lock": ("PERFORM pg_advisory_lock(listener_lock.key) FROM (SELECT 4711) AS listener_lock (key)", "SELECT 1"),
}


@pytest.fixture
async def team(database: Database) -> AsyncIterator[AsyncConnection[Any]]:
    """The superuser's connection, with the team's view filled once."""
    async with database.connect() as superuser:
        await superuser.execute(TEAM)
        async with database.connect("listener_service") as service:
            await settle(service)
        yield superuser


async def leaves(superuser: AsyncConnection[Any], what: LiteralString, *, fails: bool = False) -> None:
    """The team's function does this from now on, and then fails or not."""
    await superuser.execute("TRUNCATE leaver.ran")
    await superuser.execute(
        sql.SQL(
            "SET ROLE leaver; CREATE OR REPLACE FUNCTION leaver.act() RETURNS void LANGUAGE plpgsql AS {}; RESET ROLE"
        ).format(
            sql.Literal(
                f"BEGIN PERFORM leaver.note('computed'); {what}; {'RAISE query_canceled;' if fails else ''} END"
            )
        )
    )


async def ran_as(superuser: AsyncConnection[Any]) -> set[str]:
    """The roles that the team's code ran as, without those that it may run as."""
    return {role for (role,) in await rows(superuser, "SELECT as_role FROM leaver.ran")} - {"leaver", "leaver_compute"}


@pytest.mark.parametrize("leaving", LEAVINGS)
async def test_nothing_of_what_code_leaves_in_the_services_session_runs_there_later(
    team: AsyncConnection[Any], database: Database, leaving: str
) -> None:
    left, later = LEAVINGS[leaving]
    await leaves(team, left)
    async with database.connect("listener_service") as service:
        assert await one(service, "SELECT outcome FROM listener.refresh('shown', 't1')") == "refreshed"
        try:
            await service.execute(later)
        except psycopg.Error as error:
            assert error.sqlstate in {"26000", "34000", "42883", "42501"}  # noqa: PT017 - it is not there, or not theirs
        assert await one(team, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 4711") == 0
    assert await one(team, "SELECT count(*) FROM leaver.ran") > 0
    assert await ran_as(team) == set()


@pytest.mark.parametrize("user", ["postgres", "listener_service"])
@pytest.mark.parametrize("call", ["refresh('shown', 't1')", "compare('shown', 't1')"])
@pytest.mark.parametrize("fails", [False, True])
async def test_a_statement_that_code_prepared_is_gone_whether_it_failed_or_was_rolled_back(
    team: AsyncConnection[Any], database: Database, user: str, call: str, *, fails: bool
) -> None:
    await leaves(
        team,
        "BEGIN EXECUTE 'DEALLOCATE theirs'; EXCEPTION WHEN OTHERS THEN END; "
        "EXECUTE 'PREPARE theirs AS SELECT leaver.note(''prepared'')'; EXECUTE 'PREPARE prepare AS SELECT 1'",
        fails=fails,
    )
    async with database.connect(user) as session:
        await session.execute("PREPARE own AS SELECT 1")
        try:
            await session.execute(f"SELECT count(*) FROM listener.{call}".encode())
        except psycopg.errors.QueryCanceled:
            assert fails
        assert await rows(session, "SELECT name FROM pg_prepared_statements") == [("own",)]


async def test_what_a_caller_has_of_its_own_in_the_session_stays(
    team: AsyncConnection[Any], database: Database
) -> None:
    await leaves(team, "CREATE TEMPORARY TABLE IF NOT EXISTS theirs (x int)")
    async with database.connect("listener_service") as service:
        await service.execute("CREATE TEMPORARY TABLE own (x int)")
        await service.execute("PREPARE own AS SELECT 1")
        await service.execute("DECLARE own CURSOR WITH HOLD FOR SELECT 1")
        assert await one(service, "SELECT outcome FROM listener.refresh('shown', 't1')") == "refreshed"
        await service.execute("INSERT INTO own VALUES (1)")
        await service.execute("EXECUTE own")
        await service.execute("FETCH own")
        assert await one(service, "SELECT to_regclass('pg_temp.theirs') IS NULL")


async def test_a_session_that_is_not_the_services_is_not_lent_to_a_trigger_that_waits(
    team: AsyncConnection[Any], database: Database
) -> None:
    await leaves(team, "INSERT INTO leaver.side VALUES (1)")
    with pytest.raises(psycopg.Error, match="waits for the end of the transaction") as refused:
        await team.execute("SELECT outcome FROM listener.refresh('shown', 't1')")
    assert refused.value.sqlstate == "LSN04"
    assert await ran_as(team) == set()


async def test_a_trigger_that_waits_and_lets_another_wait_is_refused_in_the_services_session(
    team: AsyncConnection[Any], database: Database
) -> None:
    await leaves(team, "INSERT INTO leaver.side VALUES (1)")
    await team.execute(
        """
        SET ROLE leaver;
        CREATE OR REPLACE FUNCTION leaver.on_side() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM leaver.note('deferred');
            IF NEW.x < 20 THEN
                SET CONSTRAINTS ALL DEFERRED;
                INSERT INTO leaver.side VALUES (NEW.x + 1);
            END IF;
            RETURN NULL;
        END $$;
        RESET ROLE
        """
    )
    async with database.connect("listener_service") as service:
        with pytest.raises(psycopg.Error, match="waits for the end of the transaction"):
            await service.execute("SELECT outcome FROM listener.refresh('shown', 't1')")
    assert await ran_as(team) == set()
    assert await one(team, "SELECT count(*) FROM leaver.ran") == 0
