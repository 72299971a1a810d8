"""The pages are open to whoever reaches the port: they show no tenant, change nothing, and listen on loopback."""

from __future__ import annotations

import socket

import httpx
import pytest

from books import ANNA, BEN, LEDGER_VIEW, book, open_books, settled, transaction
from conftest import Database, RunningService, eventually
from listener import web
from web_client import get

pytestmark = pytest.mark.anyio

PAGES = ("/health", "/health/ready", "/metrics")
LONG = "Annas-very-own-" * 100
# A definition, a drain and a sweep that fail, each with a tenant in its message; and a tenant that the drain refuses.
TROUBLE = """
    CREATE FUNCTION public.tell(tenant text) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN
        RAISE EXCEPTION 'no luck with %', tenant USING HINT = 'see ' || tenant, DETAIL = tenant, ERRCODE = '22012';
    END $$;
    CREATE FUNCTION public.tell_row() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        PERFORM public.tell(NEW.tenant);
    END $$;
    SET ROLE listener_owner;
    CREATE TABLE public.visits (tenant_id text NOT NULL, n bigint);
    GRANT SELECT ON public.visits TO listener_service;
    SELECT listener.create_view('visited', 'SELECT tenant_id, sum(n)::bigint AS n FROM public.visits GROUP BY 1',
                                '{tenant_id}');
    SELECT listener.create_view('told', 'SELECT tenant_id, public.tell(tenant_id::text) FROM public.revenue_ledger',
                                '{tenant_id}', tenants_query => 'SELECT id FROM public.tenants', depends_on => '{}');
    RESET ROLE;
"""


@pytest.fixture
async def books(sample: Database) -> Database:
    await open_books(sample)
    return sample


async def pages(running: RunningService) -> dict[str, httpx.Response]:
    return {path: await get(running, path) for path in PAGES}


async def test_no_page_names_a_tenant_whatever_fails(books: Database, capfd: pytest.CaptureFixture[str]) -> None:
    async with books.connect() as superuser, books.service(max_attempts=1, sweep_interval="200ms") as running:
        await settled(books, running)
        await superuser.execute(TROUBLE)
        async with transaction(books) as application:
            await book(application, ANNA, 100)
        await superuser.execute("INSERT INTO public.visits VALUES (%s, 1)", (LONG,))

        async def has_letters() -> bool:
            cursor = await superuser.execute("SELECT error_type FROM listener.dead_letter ORDER BY 1")
            return await cursor.fetchall() == [("definition_error",), ("validation_error",)]

        await eventually(has_letters)
        with_letters = await pages(running)
        assert 'listener_dead_letters{view="told"} 1.0' in with_letters["/metrics"].text

        await superuser.execute(
            "CREATE TRIGGER tell BEFORE INSERT ON listener.dirty_key FOR EACH ROW EXECUTE FUNCTION public.tell_row()"
        )
        async with transaction(books, BEN) as application:
            await book(application, BEN, 100)
        await eventually(lambda: running.service.drainer.trouble and running.service._sweep_trouble)
        drain_fails = await pages(running)
        why = drain_fails["/health/ready"].json()["reasons"]
        assert "not draining: DivisionByZero (22012); the log has the text" in why
        assert "the last sweep failed: DivisionByZero (22012); the log has the text" in why
        await superuser.execute("DROP TRIGGER tell ON listener.dirty_key")
        await running.until_refreshed(LEDGER_VIEW, BEN)

        # What the page asks itself.
        await superuser.execute(
            "ALTER FUNCTION listener.readiness() RENAME TO ready;"
            "CREATE FUNCTION listener.readiness() RETURNS SETOF text LANGUAGE sql AS"
            f" $$ SELECT public.tell('{ANNA}')::text $$;"
            "GRANT EXECUTE ON FUNCTION listener.readiness() TO listener_service"
        )
        page_fails = await pages(running)
        assert "the database cannot be asked: DivisionByZero (22012)" in page_fails["/health/ready"].text
    for answers in (with_letters, drain_fails, page_fails):
        for path, answer in answers.items():
            said = f"{answer.headers} {answer.text}"
            assert [name for name in (str(ANNA), str(BEN), LONG[:15], "no luck") if name in said] == [], path
    log = capfd.readouterr().out
    for event, tenant in (
        ("refresh failed", ANNA), ("not draining", BEN), ("sweep failed", BEN), ("the database cannot be asked", ANNA),
    ):  # fmt: skip
        assert any(event in line and f"no luck with {tenant}" in line for line in log.splitlines()), event


async def test_nothing_but_the_three_pages_is_there_and_nothing_can_be_sent_to_them(books: Database) -> None:
    async with (
        books.service() as running,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{running.service.port}", timeout=10) as client,
    ):
        for path in PAGES:
            for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "REFRESH"):
                assert (await client.request(method, path)).status_code == 405, (method, path)
            assert (await client.head(path)).content == b""
        for path in ("/", "/docs", "/openapi.json", "/health/ready/x", "/metrics/x", "/tenants", "/..%2fetc/passwd"):
            answer = await client.get(path)
            assert (answer.status_code, answer.text) == (404, "Not Found"), path


@pytest.mark.parametrize(("given", "address"), [({}, "127.0.0.1"), ({"http_host": "0.0.0.0"}, "0.0.0.0")])  # noqa: S104
async def test_the_pages_are_on_loopback_unless_somebody_says_otherwise(
    books: Database, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], address: str
) -> None:
    bound: list[str] = []
    bind = web.bind

    def noting(host: str, port: int) -> socket.socket:
        made = bind(host, port)
        bound.append(made.getsockname()[0])
        return made

    monkeypatch.setattr(web, "bind", noting)
    async with books.service(**given):
        assert bound == [address]
