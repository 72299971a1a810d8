"""`listener doctor` as people and machines see it, and of a database that is not set up at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import psycopg
import pytest

from command import listener
from conftest import Database, Server, settings_for
from harms import HARMS
from listener.doctor import unusable
from shop import open_shop


@pytest.fixture
def bare(server: Server, template: str) -> Iterator[Database]:
    """A database without the schema; the roles are there."""
    name = server.clone("template0")
    yield Database(server, name)
    server.drop(name)


@pytest.fixture
def sample(sample: Database) -> Database:
    """As it is when it was just made: what was logged minutes ago, nobody has drained."""
    with psycopg.connect(sample.url("postgres"), autocommit=True) as superuser:
        superuser.execute("UPDATE listener.change_log SET changed_at = clock_timestamp()")
    return sample


def told(database: Database | str, *options: str, **given: str) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON."""
    url = database if isinstance(database, str) else database.url()
    ended = listener("doctor", "--json", *options, url=url, **given)
    assert ended.stderr == ""
    return ended.returncode, json.loads(ended.stdout)


def test_the_sample_has_nothing_to_complain_of(sample: Database) -> None:
    ended = listener("doctor", url=sample.url())
    assert (ended.returncode, ended.stdout[:22]) == (0, "0 errors, 0 warnings, ")
    assert len(ended.stdout.splitlines()) == 1


def test_evidence_lists_each_right_with_what_the_server_says_of_it(sample: Database) -> None:
    code, said = told(sample)
    assert (code, said["errors"], said["warnings"]) == (0, 0, 0)
    rights = {(f["object"], f["problem"]) for f in said["findings"] if f["check"] == "rights"}
    assert {
        ("public.revenue_ledger", "listener_service has SELECT"),
        ("public.mv_channel_performance", "listener_service has DELETE"),
        ("schema dashboard", "listener_service has USAGE"),
        ("listener.drain()", "listener_service has EXECUTE"),
        ("listener.drain()", "listener_service has EXECUTE"),
        ("role pg_read_all_stats", "listener_service has MEMBER"),
    } <= rights
    assert {problem for what, problem in rights if "revenue_ledger" in what} == {"listener_service has SELECT"}
    shown = listener("doctor", "--verbose", url=sample.url()).stdout
    assert "  rights: public.revenue_ledger: listener_service has SELECT\n" in shown


@pytest.mark.anyio
async def test_errors_come_first_each_with_its_mend_on_the_next_line_and_lines_fit(sample: Database) -> None:
    async with sample.connect() as superuser:
        await superuser.execute(
            """
            GRANT INSERT ON revenue_ledger TO listener_service;
            DROP TRIGGER listener_1_insert ON revenue_ledger;
            CREATE POLICY all_of_it ON attribution_events FOR SELECT TO listener_service USING (true)
            """
        )
    ended = listener("doctor", url=sample.url())
    assert (ended.returncode, ended.stderr) == (1, "")
    lines = ended.stdout.splitlines()
    assert lines[0] == "errors"
    assert lines.index("errors") < lines.index("warnings")
    assert lines[1].startswith("  capture: public.revenue_ledger: its capture triggers are missing")
    assert lines[2] == "    mend: SELECT * FROM listener.repair_capture();"
    assert lines[-1].startswith("2 errors, 1 warning, ")
    assert all(len(line) <= 100 for line in lines if not line.startswith("    mend: "))
    # Whoever grants too much is warned, and no more than that.
    async with sample.connect() as superuser:
        await superuser.execute("DROP POLICY all_of_it ON attribution_events; SELECT listener.repair_capture()")
    ended = listener("doctor", url=sample.url())
    assert (ended.returncode, ended.stdout.splitlines()[0]) == (0, "warnings")


class Trouble(NamedTuple):
    """What is not there, what is said, and the command that mends it."""

    url: str
    says: str
    mend: str


def test_without_the_schema_the_mend_is_to_migrate(bare: Database) -> None:
    code, said = told(bare)
    wrong = [f for f in said["findings"] if f["level"] == "error"]
    assert (code, len(wrong), wrong[0]["check"], wrong[0]["mend"]) == (1, 1, "schema", "listener migrate")
    assert "has no schema listener" in wrong[0]["problem"]


def test_without_the_roles_the_mend_is_the_script_that_makes_them(bare: Database) -> None:
    roles = {"LISTENER_OWNER_ROLE": "acme_keeper", "LISTENER_SERVICE_ROLE": "acme_service"}
    code, said = told(bare.url("postgres"), **roles)
    wrong = [f for f in said["findings"] if f["level"] == "error"]
    assert (code, len(wrong)) == (1, 1)
    assert wrong[0]["problem"] == "the roles acme_keeper and acme_service are not there."
    assert wrong[0]["mend"] == f"listener roles --database {bare.name} | psql --dbname {bare.name}"
    script = listener("roles", "--database", bare.name, **roles).stdout
    try:
        with psycopg.connect(bare.url("postgres"), autocommit=True) as superuser:
            superuser.execute(script.encode())
        code, said = told(bare.url("postgres"), **roles)
        assert [f["mend"] for f in said["findings"] if f["level"] == "error"] == ["listener migrate"]
        assert listener("migrate", url=bare.url("postgres"), **roles).returncode == 0
        assert told(bare.url("acme_service"), **roles)[0] == 0
    finally:
        with psycopg.connect(bare.url("postgres"), autocommit=True) as superuser:
            superuser.execute("DROP OWNED BY acme_keeper, acme_service; DROP ROLE acme_keeper, acme_service")


def test_whoever_cannot_connect_is_told_why_in_one_line_with_a_command(bare: Database) -> None:
    for trouble in (
        Trouble(
            bare.url("nobody_such"),
            "the database refuses the connection: connection failed: connection to server on socket",
            f"listener roles --database {bare.name} | psql --dbname {bare.name}",
        ),
        Trouble(bare.server.url("listener_service", "no_such"), "does not exist", "createdb no_such"),
        Trouble("postgresql://x@127.0.0.1:1/app", "does not answer", "pg_isready --host 127.0.0.1 --port 1"),
        Trouble("mysql://x", "LISTENER_DATABASE_URL", ""),
    ):
        ended = listener("doctor", url=trouble.url)
        assert ended.returncode == 1
        assert ended.stderr == ""
        assert trouble.says in " ".join(ended.stdout.split())
        assert f"mend: {trouble.mend}" in ended.stdout
        assert ended.stdout.splitlines()[-1] == "1 error, 0 warnings, 0 ok"


@pytest.mark.anyio
async def test_a_missing_right_on_the_schema_is_named_to_the_services_role_itself(database: Database) -> None:
    await open_shop(database)
    async with database.connect() as superuser:
        await superuser.execute(HARMS["the schema's USAGE"].statement)
        code, said = told(database)
        wrong = [f for f in said["findings"] if f["level"] == "error"]
        assert (code, [f["mend"] for f in wrong]) == (1, ["GRANT USAGE ON SCHEMA listener TO listener_service;"])
        await superuser.execute(wrong[0]["mend"])
    assert told(database)[0] == 0


def test_a_way_to_listen_that_leads_elsewhere_is_told(database: Database) -> None:
    elsewhere = database.server.url("listener_service", "postgres")
    code, said = told(database, LISTENER_LISTEN_DATABASE_URL=elsewhere)
    wrong = [f for f in said["findings"] if f["level"] == "error"]
    assert (code, [f["mend"] for f in wrong]) == (1, ["unset LISTENER_LISTEN_DATABASE_URL"])
    assert told(database, LISTENER_LISTEN_DATABASE_URL=database.url())[0] == 0


def test_a_wrong_password_is_told_with_how_to_set_one() -> None:
    # What libpq says: the tests' servers ask for none.
    url = "postgresql://listener_service:wrong@db.example/app"
    said = psycopg.OperationalError('FATAL:  password authentication failed for user "listener_service"')
    found = unusable(said, url, settings_for(url))
    assert found.mend == "psql --dbname app --command '\\password \"listener_service\"'"
    assert "wrong" not in str(found)
