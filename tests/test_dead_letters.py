"""Dead letters from the failure to the operator: written once, found by any spelling, retried, closed, never lost."""

from __future__ import annotations

import json
import re
from typing import Any

import anyio
import pytest

from books import ANNA, BEN, book, open_books, transaction
from command import listener
from conftest import Database, eventually
from process import service_process

pytestmark = pytest.mark.anyio

NOBODY = "99999999-9999-4999-8999-999999999999"
SHARES = """
    SET ROLE listener_owner;
    SELECT listener.create_view('shares',
        'SELECT tenant_id, id AS row_id, 100 / revenue_cents AS share FROM public.revenue_ledger', '{tenant_id,row_id}',
        tenants_query => 'SELECT id FROM public.tenants');
    SELECT listener.create_view('doubts',
        'SELECT tenant_id, id AS row_id, 1 / (revenue_cents * 0) AS doubt FROM public.revenue_ledger',
        '{tenant_id,row_id}', tenants_query => 'SELECT id FROM public.tenants');
    RESET ROLE;
"""


@pytest.fixture
async def books(sample: Database) -> Database:
    """Two tenants whose shares cannot be computed; everything else is fresh."""
    await open_books(sample)
    async with sample.connect() as superuser:
        await superuser.execute(SHARES)
    for tenant in (ANNA, BEN):
        async with transaction(sample, tenant) as application:
            await book(application, tenant, 0)
    return sample


async def fail(books: Database) -> None:
    """Four letters: of two views and two tenants each."""
    swept = listener("sweep", url=books.url(), LISTENER_MAX_ATTEMPTS="1")
    assert swept.returncode == 1
    assert len(letters(books)) == 4


def letters(books: Database, *options: str) -> list[dict[str, Any]]:
    listed = listener("dead-letters", "list", "--json", *options, url=books.url())
    assert (listed.returncode, listed.stderr) == (0, "")
    found: list[dict[str, Any]] = json.loads(listed.stdout)
    return found


async def mend(books: Database, tenant: object = ANNA) -> None:
    async with books.connect() as superuser:
        await superuser.execute("UPDATE public.revenue_ledger SET revenue_cents = 50 WHERE tenant_id = %s", (tenant,))


async def test_letters_are_found_by_view_and_tenant_however_they_are_spelled(books: Database) -> None:
    await fail(books)
    everyone = letters(books)
    assert everyone[0].keys() == {
        "id", "view_name", "tenant_id", "status", "error_type", "sqlstate", "exception_class", "error_message",
        "retry_count", "correlation_id", "app_correlation_id", "worker", "failed_at", "traceback", "view_id",
    }  # fmt: skip
    assert {(letter["view_name"], letter["tenant_id"]) for letter in everyone} == {
        (view, str(tenant)) for view in ("shares", "doubts") for tenant in (ANNA, BEN)
    }
    for options, number in (
        (["--view", "shares"], 2), (["--view", "public.shares"], 2), (["--tenant", str(ANNA)], 2),
        (["--tenant", f"{{{str(ANNA).upper()}}}"], 2), (["--view", "shares", "--tenant", str(BEN)], 1),
        (["--view", "mv_realtime_revenue"], 0), (["--view", "shares", "--tenant", "x"], 0),
    ):  # fmt: skip
        assert len(letters(books, *options)) == number, options
    one = everyone[0]["id"]
    for spelled in (one, f"{{{one.upper()}}}"):
        shown = listener("dead-letters", "show", spelled, "--json", url=books.url())
        assert json.loads(shown.stdout)["id"] == one
    assert "DivisionByZero" in listener("dead-letters", "show", one, url=books.url()).stdout


async def test_bad_ids_unknown_views_and_contradictions_are_one_line(books: Database) -> None:
    await fail(books)
    one = letters(books)[0]["id"]
    for arguments, what in (
        (["show", "x"], "there is no letter x. See: listener dead-letters list --closed"),
        (["show", NOBODY], "there is no letter"),
        (["retry", "%s' OR true --"], "there is no letter"),
        (["list", "--view", "nothing"], "there is no managed view 'nothing'"),
        (["discard", "--view", "nothing", "--tenant", str(ANNA)], "there is no managed view 'nothing'"),
        (["discard"], "say which letters"),
        (["retry", one, "--all"], "say which letters"),
        (["discard", "--all", "--view", "shares"], "say which letters"),
    ):
        ended = listener("dead-letters", *arguments, url=books.url())
        assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1), ended
        assert what in ended.stderr, arguments
    assert len(letters(books)) == 4, "nothing was closed"
    # Nothing to do is not an error.
    ended = listener("dead-letters", "retry", "--view", "mv_realtime_revenue", url=books.url())
    assert (ended.returncode, ended.stdout) == (0, "no dead letters\n")
    ended = listener("dead-letters", "discard", "--tenant", NOBODY, url=books.url())
    assert (ended.returncode, ended.stdout) == (0, "0 letters discarded\n")


async def test_a_retry_shows_what_came_of_each_key(books: Database) -> None:
    await fail(books)
    await mend(books)
    retried = listener("dead-letters", "retry", "--view", "shares", "--json", url=books.url())
    assert retried.returncode == 1
    rows = {row["tenant_id"]: row for row in json.loads(retried.stdout)}
    assert (rows[str(ANNA)]["outcome"], rows[str(ANNA)]["rows"]) == ("refreshed", 1)
    assert (rows[str(BEN)]["outcome"], rows[str(BEN)]["rows"]) == ("failed: division by zero", None)
    resolved = rows[str(ANNA)]["id"]
    assert [letter["id"] for letter in letters(books, "--view", "shares")] == [rows[str(BEN)]["id"]]
    (closed,) = [letter for letter in letters(books, "--closed") if letter["status"] == "resolved"]
    assert closed["id"] == resolved
    for command in ("retry", "discard"):
        ended = listener("dead-letters", command, resolved, url=books.url())
        assert (ended.returncode, ended.stderr) == (1, f"listener: letter {resolved} is resolved already.\n")
    await mend(books, BEN)
    ended = listener("dead-letters", "retry", rows[str(BEN)]["id"], url=books.url())
    assert (ended.returncode, ended.stdout) == (0, f"shares of tenant {BEN}: refreshed, 1 row changed\n")
    discarded = json.loads(listener("dead-letters", "discard", "--all", "--json", url=books.url()).stdout)
    assert len(discarded["discarded"]) == 2
    assert letters(books) == []


async def test_the_correlation_id_leads_from_the_letter_to_the_logs(books: Database) -> None:
    # Shown before the service starts: a key that has failed would wait for its retry, whatever is written.
    await mend(books)
    listener("sweep", url=books.url())
    async with service_process(books.url(), max_attempts="1") as service:
        await service.until("serving")
        async with transaction(books) as application:
            await application.execute("SELECT set_config('app.correlation_id', 'of the application', true)")
            await book(application, ANNA, 0)
        await service.until(
            "refresh failed; the key is quarantined",
            view="shares",
            tenant_id=str(ANNA),
            app_correlation_id="of the application",
        )
        letter = letters(books, "--view", "shares", "--tenant", str(ANNA))[0]
        of_the_letter = {"correlation_id": letter["correlation_id"]}
        (failed,) = service.logged(
            "refresh failed; the key is quarantined", view="shares", tenant_id=str(ANNA), **of_the_letter
        )
        assert failed["dead_letter"] == letter["id"]
        (drained,) = service.logged("drained", **of_the_letter)
        assert f"shares/{ANNA}" in drained["named"]
        # The keys of one drain share its id; no other drain has it.
        await service.until("refreshed", view="mv_realtime_revenue", tenant_id=str(ANNA), **of_the_letter)
        assert await service.end() == 0
    async with books.connect() as superuser:
        cursor = await superuser.execute(
            "SELECT app_correlation_id FROM listener.dead_letter WHERE id = %s", (letter["id"],)
        )
        assert await cursor.fetchone() == ("of the application",)


async def test_a_retry_by_hand_and_the_services_own_do_not_get_in_each_others_way(books: Database) -> None:
    brisk = {"max_attempts": 1, "retry_quarantined": "20ms", "sweep_interval": "100ms"}
    async with books.service(**brisk) as running:

        async def are_open(number: int) -> bool:
            async with books.connect() as superuser:
                cursor = await superuser.execute("SELECT count(*) FROM listener.dead_letter WHERE status = 'open'")
                return await cursor.fetchone() == (number,)

        await eventually(lambda: are_open(4))
        for _ in range(3):
            retried = await anyio.to_thread.run_sync(
                lambda: listener("dead-letters", "retry", "--view", "shares", url=books.url())
            )
            assert (retried.returncode, retried.stderr) == (1, "")
            assert re.fullmatch(r"(shares of tenant [0-9a-f-]{36}: failed: division by zero\n){2}", retried.stdout)
            # The service's failures, ours beside them: still one letter a key.
            assert await are_open(4)
        for tenant in (ANNA, BEN):
            await mend(books, tenant)
        retried = await anyio.to_thread.run_sync(
            lambda: listener("dead-letters", "retry", "--view", "shares", url=books.url())
        )
        assert retried.returncode == 0
        await running.until_refreshed("mv_realtime_revenue", BEN)
        await eventually(lambda: are_open(2))


async def test_the_letters_of_a_view_that_was_dropped_are_kept_and_one_made_anew_has_its_own(books: Database) -> None:
    await fail(books)
    before = {letter["id"] for letter in letters(books, "--view", "shares")}
    async with books.connect("listener_migrator") as migrator:
        await migrator.execute("SELECT listener.drop_view('shares')")
    assert letters(books, "--view", "shares") == []
    kept = letters(books, "--view", "shares", "--closed")
    assert ({letter["id"] for letter in kept}, {letter["status"] for letter in kept}) == (before, {"discarded"})
    async with books.connect() as superuser:
        await superuser.execute(SHARES.partition("SELECT listener.create_view('doubts'")[0].encode())
    assert listener("sweep", url=books.url(), LISTENER_MAX_ATTEMPTS="1").returncode == 1
    anew = {letter["id"] for letter in letters(books, "--view", "shares")}
    assert len(anew) == 2
    assert not anew & before
    assert {letter["id"] for letter in letters(books, "--view", "shares", "--closed")} == anew | before


async def test_a_failure_recorded_while_its_view_is_dropped_leaves_no_open_letter(books: Database) -> None:
    async with books.connect() as superuser, books.connect("listener_service", autocommit=False) as service:
        cursor = await superuser.execute("SELECT id FROM listener.managed_view WHERE name = 'shares'")
        ((view_id,),) = await cursor.fetchall()
        await service.execute(
            "SELECT listener.record_failure(%s, %s, 'id', 'definition_error', '22012', 'DivisionByZero', 'm', 't', 'w',"
            " 1, '1 s', '1 s', '1 h')",
            (view_id, str(ANNA)),
        )
        await superuser.execute("SELECT listener.drop_view('shares')")
        await service.commit()
        assert [letter["view_id"] for letter in letters(books)] == [view_id]
        await superuser.execute("SELECT listener.purge()")
        assert letters(books) == []
        (letter,) = letters(books, "--closed")
        assert letter["status"] == "discarded"


async def test_closed_letters_are_kept_for_as_long_as_the_setting_says(books: Database) -> None:
    await fail(books)
    assert listener("dead-letters", "discard", "--view", "shares", url=books.url()).returncode == 0
    async with books.service(letters_kept="1d"):
        assert len(letters(books, "--closed")) == 4
    async with books.service(letters_kept="1ms"):
        # The open ones stay, however old.
        assert {letter["view_name"] for letter in letters(books, "--closed")} == {"doubts"}
        assert len(letters(books)) == 2


async def test_a_huge_error_is_cut_and_does_not_fill_the_log_or_the_tables(books: Database) -> None:
    async with books.connect() as superuser:
        await superuser.execute(
            """
            CREATE FUNCTION public.speech(text) RETURNS int LANGUAGE plpgsql STABLE AS $$ BEGIN
                RAISE EXCEPTION '%', repeat(E'so it goes\\n://a:password=x ', 200000)
                    USING DETAIL = repeat('d', 1000000), HINT = repeat('h', 1000000);
            END $$;
            SET ROLE listener_owner;
            SELECT listener.create_view('speeches',
                'SELECT tenant_id, public.speech(currency) AS n FROM public.revenue_ledger', '{tenant_id}',
                tenants_query => 'SELECT id FROM public.tenants', depends_on => '{}');
            """
        )
    swept = listener("sweep", url=books.url(), LISTENER_MAX_ATTEMPTS="1")
    assert (swept.returncode, len(swept.stderr) < 10_000, swept.stderr.count("\n")) == (1, True, 2)
    for letter in letters(books, "--view", "speeches"):
        assert letter["error_message"].startswith("so it goes")
        assert len(letter["error_message"]) < 3000
        assert len(letter["traceback"]) < 25_000
        assert "psycopg" in letter["traceback"]
    assert len(listener("dead-letters", "list", "--view", "speeches", url=books.url()).stdout) < 10_000
    explained = listener("explain", "speeches", "--tenant", str(ANNA), url=books.url()).stdout
    assert max(map(len, explained.splitlines())) < 300


async def test_a_letter_of_all_tenants_is_found_and_retried(books: Database) -> None:
    async with books.connect() as superuser:
        await superuser.execute("REVOKE SELECT ON public.tenants FROM listener_service")
        await superuser.execute("SELECT listener.mark_all_dirty(id) FROM listener.managed_view WHERE name = 'shares'")
    listener("sweep", url=books.url(), LISTENER_MAX_ATTEMPTS="1")
    (letter,) = letters(books, "--tenant", "", "--view", "shares")
    assert "shares of all tenants" in listener("dead-letters", "list", "--tenant", "", url=books.url()).stdout
    retried = listener("dead-letters", "retry", letter["id"], url=books.url())
    assert (retried.returncode, "permission denied for table tenants" in retried.stdout) == (1, True)
    async with books.connect() as superuser:
        await superuser.execute("GRANT SELECT ON public.tenants TO listener_service")
    retried = listener("dead-letters", "retry", "--tenant", "", "--view", "shares", url=books.url())
    assert (retried.returncode, retried.stdout) == (0, "shares of all tenants: expanded\n")
