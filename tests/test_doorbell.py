"""The doorbell: that writers need not notify while somebody polls, and that none of their changes is lost by it.

The tests with a service leave it no sweep, and listen beside it: what is shown without a notification was looked for.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from psycopg import AsyncConnection, sql

from conftest import DEADLINE, Database, RunningService, eventually
from listener import queries, view_queries
from listener.doorbell import (
    BUSY_WITHIN,
    CLOSING_PAUSES,
    LEASE,
    LONGEST_PAUSE,
    PAUSE_PER_DRAIN,
    SHORTEST_PAUSE,
    Doorbell,
)
from shop import ANNA, BERT, SALES, application, create_view, heard, one, open_shop, order, rows

ALWAYS = settings(max_examples=300, deadline=None, database=None, print_blob=True)
POLL_INTERVAL = 0.1


# -- the object ------------------------------------------------------------------------------------------------------

LOOKS = st.tuples(
    st.sampled_from((0.0, 0.004, 0.03, 0.2, 0.6)),  # since the drain before
    st.booleans(),  # it found something
    st.sampled_from((0.0005, 0.01, 0.4)),  # it took so long
    st.booleans(),  # every transaction below the mark had ended
    st.integers(0, 19),  # 0: an operator forbids notifying, 1: or allows it
)


@ALWAYS
@given(st.lists(LOOKS, max_size=80))
def test_it_looks_by_itself_while_a_writer_may_have_seen_a_lease(
    looks: list[tuple[float, bool, float, bool, int]],
) -> None:
    doorbell = Doorbell(POLL_INTERVAL)
    now = 0.0
    found_at = close_at = float("-inf")  # a drain found something; two that did came close together
    held_at: float | None = None  # when the lease was last given
    unseen = False  # a writer that saw a lease may not have ended yet
    for pause, found, took, all_ended, operator in looks:
        if operator == 0:
            doorbell.must_poll = True
        elif operator == 1 and doorbell.must_poll:
            doorbell.must_poll = False
            held_at, unseen = None, True
            doorbell.ended("mark", now)
        past = doorbell.mark is not None and all_ended
        now += pause + took
        if past:
            unseen = False
            doorbell.closed()
        close = found and now - found_at < max(
            BUSY_WITHIN, 2 * min(max(SHORTEST_PAUSE, PAUSE_PER_DRAIN * took), LONGEST_PAUSE)
        )
        found_at = now if found else found_at
        close_at = now if close else close_at
        deed = doorbell.drained(now, found=found, took=took)
        if deed == "hold":
            assert close, "changes do not come closely, and the lease was extended"
            assert not doorbell.must_poll
            assert held_at is None or now - held_at > LEASE / 2, "extended too often"
            held_at, unseen = now, True
            doorbell.held(now)
        elif deed == "end":
            assert held_at is not None
            assert now - close_at > LEASE or doorbell.must_poll, "ended while changes come"
            held_at = None
            doorbell.ended("mark", now)
        elif held_at is not None:
            assert not doorbell.must_poll, "no lease is needed where nobody notifies"
            assert now - close_at <= LEASE, "changes do not come closely, and the lease was not ended"
            assert not close or now - held_at <= LEASE / 2, "changes came, and the lease was not extended"
        assert doorbell.state == ("polling" if held_at is not None else "closing" if unseen else "resting")
        assert_looks(doorbell, now)


def assert_looks(doorbell: Doorbell, now: float) -> None:
    """It has a next look unless it rests, and not too late."""
    look = doorbell.next_look(now)
    if doorbell.state == "resting" and not doorbell.must_poll:
        assert look is None
        return
    assert look is not None
    if doorbell.state == "polling":
        assert 0 <= look <= LONGEST_PAUSE
    elif doorbell.state == "closing":
        assert CLOSING_PAUSES[0] <= look <= CLOSING_PAUSES[1]
    else:
        assert 0 < look <= max(POLL_INTERVAL, LONGEST_PAUSE)


@ALWAYS
@given(st.floats(0, 1e6), st.lists(st.floats(0, 100), min_size=2))
def test_closing_looks_less_often_the_longer_it_takes(ended_at: float, waited: list[float]) -> None:
    doorbell = Doorbell(POLL_INTERVAL)
    doorbell.held(ended_at)
    doorbell.ended("mark", ended_at)
    pauses = [doorbell.next_look(ended_at + seconds) or 0.0 for seconds in sorted(waited)]
    assert pauses == sorted(pauses)
    assert all(CLOSING_PAUSES[0] <= pause <= CLOSING_PAUSES[1] for pause in pauses)
    assert doorbell.next_look(ended_at + 100) == CLOSING_PAUSES[1]


@ALWAYS
@given(st.integers(0, 40), st.booleans())
def test_single_changes_now_and_then_never_take_the_lease(changes: int, must_poll: bool) -> None:  # noqa: FBT001
    doorbell = Doorbell(POLL_INTERVAL)
    doorbell.must_poll = must_poll
    for number in range(changes):
        assert doorbell.drained(float(number), found=True, took=0.001) is None
    assert doorbell.state == "resting"
    assert (doorbell.next_look(changes + 1.0) == POLL_INTERVAL) is must_poll


def test_two_changes_in_a_row_take_the_lease() -> None:
    doorbell = Doorbell(POLL_INTERVAL)
    assert doorbell.drained(1.0, found=True, took=0.001) is None
    assert doorbell.drained(1.02, found=True, took=0.001) == "hold"


# -- in SQL ----------------------------------------------------------------------------------------------------------


@pytest.fixture
async def shop(database: Database) -> Database:
    """With one view, whose changes are shown at once."""
    await open_shop(database)
    await create_view(database, "sales", SALES, ["product"], quiet_period="10 ms", max_wait="50 ms")
    return database


@pytest.fixture
async def listening(shop: Database) -> AsyncIterator[AsyncConnection[Any]]:
    async with shop.connect() as connection:
        await connection.execute("LISTEN listener_changes")
        yield connection


async def lease_is_held(superuser: AsyncConnection[Any]) -> bool:
    """By the rule of capture."""
    return bool(
        await one(
            superuser,
            "SELECT last_value - extract(epoch FROM clock_timestamp()) * 1000 BETWEEN 0 AND 1000"
            " FROM listener.doorbell",
        )
    )


async def set_lease(superuser: AsyncConnection[Any], seconds_from_now: float) -> None:
    """The lease as another clock would have given it."""
    await superuser.execute(
        "SELECT setval('listener.doorbell', ((extract(epoch FROM clock_timestamp()) + %s) * 1000)::bigint)",
        (seconds_from_now,),
    )


@pytest.mark.anyio
async def test_a_lease_silences_until_it_is_ended(
    shop: Database,
    superuser: AsyncConnection[Any],
    service: AsyncConnection[Any],
    listening: AsyncConnection[Any],
) -> None:
    async with application(shop, ANNA) as app:
        async with service.transaction():
            await service.execute("SELECT listener.hold_lease()")
            await order(app, ANNA, "a")
            # A sequence does not wait for the commit of whoever sets it.
            assert await lease_is_held(superuser)
        assert await heard(listening, superuser) == []
        await service.execute("SELECT listener.end_lease()")
        await order(app, ANNA, "a")
        assert await heard(listening, superuser) == [{"tenant_id": ANNA, "source": "shop.orders"}]


@pytest.mark.anyio
@pytest.mark.parametrize(("seconds", "rings"), [(-3600, 1), (-0.001, 1), (0.9, 0)])
async def test_a_lease_that_ran_out_silences_nobody(
    shop: Database, superuser: AsyncConnection[Any], listening: AsyncConnection[Any], seconds: float, rings: int
) -> None:
    async with application(shop, ANNA) as app:
        await set_lease(superuser, seconds)
        await order(app, ANNA, "a")
    assert len(await heard(listening, superuser)) == rings


@pytest.mark.anyio
@pytest.mark.parametrize(("seconds", "wrong"), [(-3600, False), (0.9, False), (1.5, True), (3600, True)])
async def test_a_lease_reaches_no_further_than_a_second(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any], seconds: float, *, wrong: bool
) -> None:
    await set_lease(superuser, seconds)
    assert await queries.lease_is_wrong(service) is wrong


@pytest.mark.anyio
@pytest.mark.parametrize("mode", ["when_idle", "always", "never", None])
async def test_the_notify_mode_decides(
    shop: Database, superuser: AsyncConnection[Any], listening: AsyncConnection[Any], mode: str | None
) -> None:
    async with shop.connect("listener_migrator") as migrator:
        await migrator.execute("SELECT listener.set_notify(%s)", (mode,))
    async with application(shop, ANNA) as app:
        await set_lease(superuser, 0)
        await order(app, ANNA, "a")
        idle = len(await heard(listening, superuser))
        await set_lease(superuser, 0.9)
        await order(app, ANNA, "a")
        polled = len(await heard(listening, superuser))
    expected = {"always": (1, 1), "never": (0, 0)}
    assert (idle, polled) == expected.get(str(mode), (1, 0))
    assert await one(superuser, "SELECT count(*) FROM listener.change_log WHERE source_id IS NOT NULL") == 2
    assert await one(superuser, "SELECT listener.must_poll()") is (mode == "never")


@pytest.mark.anyio
async def test_there_is_no_other_notify_mode(shop: Database) -> None:
    async with shop.connect("listener_migrator") as migrator:
        with pytest.raises(psycopg.Error, match="when_idle, always or never") as refused:
            await migrator.execute("SELECT listener.set_notify('sometimes')")
    assert refused.value.sqlstate == "LSN02"


@pytest.mark.anyio
async def test_a_mark_needs_a_transaction_of_its_own(shop: Database, service: AsyncConnection[Any]) -> None:
    await service.set_autocommit(False)
    # setval() takes an id too.
    for statement in ("SELECT pg_current_xact_id()", "SELECT listener.end_lease()"):
        await service.execute(sql.SQL(statement))
        with pytest.raises(psycopg.Error, match="a transaction of its own") as refused:
            await service.execute("SELECT listener.take_mark()")
        assert refused.value.sqlstate == "LSN05"
        await service.rollback()
    await service.execute("SELECT listener.take_mark()")


@pytest.mark.anyio
async def test_whoever_saw_the_lease_is_below_the_mark(shop: Database, service: AsyncConnection[Any]) -> None:
    """Not so with a mark from the transaction that ends the lease.

    An id is older than what its transaction does. Here a writer comes between the two: it gets a later id than the
    transaction that is about to end the lease, and still sees it.
    """
    async with application(shop, ANNA, autocommit=False) as app, shop.connect() as other:
        await service.execute("SELECT listener.hold_lease()")
        async with service.transaction():
            shared = await one(service, "SELECT pg_current_xact_id()::text::bigint")
            await order(app, ANNA, "a")
            assert await lease_is_held(other), "too slow: the writer may not have seen the lease"
            await service.execute("SELECT listener.end_lease()")
        mark = await queries.take_mark(service)
        writer = await one(app, "SELECT pg_current_xact_id()::text::bigint")
        assert shared < writer < int(mark)
        assert not await queries.is_past(service, mark), "the writer has not ended"
        assert await queries.is_past(service, str(shared)), "and such a mark would not wait for it"
        await app.commit()
        # No transaction id was given out since.
        assert await queries.is_past(service, mark)


# -- a service without a sweep ---------------------------------------------------------------------------------------


@asynccontextmanager
async def serving(shop: Database) -> AsyncIterator[RunningService]:
    """A service that learns of changes by notification or by looking, and by nothing else; at rest."""
    async with shop.service(sweep_interval=3600.0, probe_interval=3600.0) as running:
        await at_rest(shop, running)
        yield running


async def at_rest(shop: Database, running: RunningService) -> None:
    """Until all is shown, and only a notification would make the service look."""
    async with shop.connect() as superuser:

        async def is_at_rest() -> bool:
            drainer = running.service.drainer
            return (
                drainer.doorbell.state == "resting"
                and not drainer.bell.is_rung
                and running.service.listening.probe_answered
                and await view_queries.all_fresh(superuser)
            )

        await eventually(is_at_rest)


@asynccontextmanager
async def silent_writer(
    shop: Database, running: RunningService, listening: AsyncConnection[Any]
) -> AsyncIterator[AsyncConnection[Any]]:
    """A transaction that wrote while the service held the lease; what it wrote is not committed."""
    drainer = running.service.drainer
    async with (
        shop.connect() as superuser,
        application(shop, BERT) as noise,
        application(shop, ANNA, autocommit=False) as writer,
    ):

        async def wrote_under_the_lease() -> bool:
            await order(noise, BERT, "noise")
            if drainer.doorbell.state != "polling":
                return False
            await order(writer, ANNA, "late")
            if await lease_is_held(superuser):
                return True
            await writer.rollback()
            return False

        await eventually(wrote_under_the_lease)
        await heard(listening, superuser)  # that of the noise, before the lease
        yield writer


async def commit_unheard(shop: Database, writer: AsyncConnection[Any], listening: AsyncConnection[Any]) -> None:
    """Commits what nobody is told of."""
    await writer.commit()
    async with shop.connect() as superuser:
        assert await heard(listening, superuser) == []


async def shown(shop: Database, tenant: str) -> dict[str, int]:
    """The target's products, and how many orders each has."""
    async with shop.connect() as superuser:
        return dict(await rows(superuser, "SELECT product, orders FROM sales WHERE tenant_id = %s", tenant))


@pytest.mark.anyio
@pytest.mark.parametrize("another", ["others write", "nobody writes"])
async def test_a_commit_after_the_lease_ended_is_shown(
    shop: Database, listening: AsyncConnection[Any], another: str
) -> None:
    async with serving(shop) as running, silent_writer(shop, running, listening) as writer:
        drainer = running.service.drainer
        await eventually(lambda: drainer.doorbell.state != "polling")
        # Its looks find nothing that would end the closing.
        outcomes = watch(drainer)
        await eventually(lambda: len(outcomes) > 2 or drainer.doorbell.state == "resting")
        seen = len(running.outcomes)
        if another == "others write":
            async with application(shop, BERT) as other:
                await order(other, BERT, "b")
            await running.until_refreshed("sales", BERT, after=seen)
            async with shop.connect() as superuser:
                assert len(await heard(listening, superuser)) == 1
            assert drainer.doorbell.state == "closing"
        await commit_unheard(shop, writer, listening)
        await running.until_refreshed("sales", ANNA, after=seen)
        assert await shown(shop, ANNA) == {"late": 1}
        await at_rest(shop, running)


@pytest.mark.anyio
async def test_a_commit_while_another_replica_drains_is_shown(
    shop: Database, service: AsyncConnection[Any], listening: AsyncConnection[Any]
) -> None:
    async with serving(shop) as running, silent_writer(shop, running, listening) as writer:
        drainer = running.service.drainer
        await eventually(lambda: drainer.doorbell.state != "polling")
        seen = len(running.outcomes)
        async with service.transaction():
            assert await one(service, "SELECT outcome FROM listener.drain()") == "nothing"
            await commit_unheard(shop, writer, listening)
            # All have ended, and the service's drains are busy: it must not take that for "nothing new".
            mark = drainer.doorbell.mark
            assert mark is not None
            outcomes = watch(drainer)
            await eventually(lambda: len(outcomes) > 2)
            assert set(outcomes) == {"busy"}
            assert drainer.doorbell.mark == mark
        await running.until_refreshed("sales", ANNA, after=seen)
        assert await shown(shop, ANNA) == {"late": 1}


def watch(drainer: Any) -> list[str]:
    """The outcomes of the drainer's looks from now on."""
    outcomes: list[str] = []
    look = drainer.look

    async def watched() -> Any:
        drained = await look()
        outcomes.append(drained.outcome)
        return drained

    drainer.look = watched
    return outcomes


@pytest.mark.anyio
async def test_a_writer_that_saw_the_lease_at_the_last_moment_is_waited_for(
    shop: Database, listening: AsyncConnection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another replica's lease: this one ends it, and a writer saw it while this one was about to."""
    end_lease = queries.end_lease
    async with serving(shop) as running, shop.connect() as other, application(shop, ANNA, autocommit=False) as writer:

        async def end_lease_after_a_write(connection: AsyncConnection[Any]) -> None:
            if writer.info.transaction_status == psycopg.pq.TransactionStatus.IDLE:
                await other.execute("SELECT listener.hold_lease()")
                await order(writer, ANNA, "late")
                assert await lease_is_held(other), "too slow: the writer may not have seen the lease"
            await end_lease(connection)

        monkeypatch.setattr(queries, "end_lease", end_lease_after_a_write)
        async with silent_writer(shop, running, listening) as early:
            await early.rollback()
            drainer = running.service.drainer
            await eventually(lambda: drainer.doorbell.state != "polling")
            outcomes = watch(drainer)
            await eventually(lambda: len(outcomes) > 2 or drainer.doorbell.state == "resting")
            seen = len(running.outcomes)
            await commit_unheard(shop, writer, listening)
            await running.until_refreshed("sales", ANNA, after=seen)
            assert await shown(shop, ANNA) == {"late": 1}


@pytest.mark.anyio
async def test_a_dead_poller_loses_its_lease_by_itself(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any], listening: AsyncConnection[Any]
) -> None:
    async with serving(shop) as running, application(shop, ANNA) as app:
        # As by a replica that is killed right after.
        await service.execute("SELECT listener.hold_lease()")
        began = await one(superuser, "SELECT clock_timestamp()")

        async def is_over() -> bool:
            return not await lease_is_held(superuser)

        await eventually(is_over)
        assert await one(superuser, "SELECT clock_timestamp() - %s < interval '1 s'", began)
        seen = len(running.outcomes)
        await order(app, ANNA, "a")
        assert len(await heard(listening, superuser)) == 1
        await running.until_refreshed("sales", ANNA, after=seen)


@pytest.mark.anyio
async def test_who_starts_looks_for_what_was_written_under_the_lease_of_a_dead_poller(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any], listening: AsyncConnection[Any]
) -> None:
    async with application(shop, ANNA, autocommit=False) as writer:
        await service.execute("SELECT listener.hold_lease()")
        await order(writer, ANNA, "late")
        assert await lease_is_held(superuser), "too slow: the writer may not have seen the lease"
        async with shop.service(sweep_interval=3600.0, probe_interval=3600.0) as running:
            assert running.service.drainer.doorbell.state == "closing"
            await heard(listening, superuser)  # the probe of the new service
            await commit_unheard(shop, writer, listening)
            await running.until_refreshed("sales", ANNA)


@pytest.mark.anyio
async def test_who_stops_gives_its_lease_up_and_has_the_others_look(
    shop: Database, superuser: AsyncConnection[Any], listening: AsyncConnection[Any]
) -> None:
    async with serving(shop) as running, silent_writer(shop, running, listening):
        running.service.stop()
        # Not by heard(), which drops what arrives together with its own word.
        told = False
        async with aclosing(listening.notifies(timeout=DEADLINE)) as notifications:
            async for notification in notifications:
                told = json.loads(notification.payload) == {"tenant_id": None, "source": "listener"}
                if told:
                    break
        assert told
        assert not await lease_is_held(superuser)


@pytest.mark.anyio
async def test_a_lease_left_by_a_clock_that_stepped_back_is_ended_by_the_sweep(
    shop: Database, superuser: AsyncConnection[Any], listening: AsyncConnection[Any]
) -> None:
    async with (
        serving(shop) as running,
        application(shop, BERT) as app,
        application(shop, ANNA, autocommit=False) as writer,
    ):
        await set_lease(superuser, 3600)
        await order(writer, ANNA, "late")
        # What each sweep does.
        await running.service.drainer.heed_installation()
        assert await one(superuser, "SELECT last_value FROM listener.doorbell") == 0
        await order(app, BERT, "a")
        assert len(await heard(listening, superuser)) == 1
        await running.until_refreshed("sales", BERT)
        seen = len(running.outcomes)
        await commit_unheard(shop, writer, listening)
        await running.until_refreshed("sales", ANNA, after=seen)


@pytest.mark.anyio
async def test_a_lease_whose_taking_was_not_answered_is_closed_all_the_same(
    shop: Database, listening: AsyncConnection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is lost after the server has taken the lease."""
    hold_lease = queries.hold_lease
    async with (
        serving(shop) as running,
        application(shop, BERT) as noise,
        application(shop, ANNA, autocommit=False) as writer,
    ):
        drainer = running.service.drainer
        lost_at: list[float | None] = []

        async def hold_and_lose(connection: AsyncConnection[Any]) -> None:
            await hold_lease(connection)
            if not lost_at:
                await order(writer, ANNA, "late")
                lost_at.append(drainer.looked_at)
                raise psycopg.OperationalError("the connection is lost")

        monkeypatch.setattr(queries, "hold_lease", hold_and_lose)

        async def is_lost() -> bool:
            if not lost_at:
                await order(noise, BERT, "noise")
            return bool(lost_at)

        await eventually(is_lost)
        await eventually(lambda: drainer.looked_at != lost_at[0])
        await heard(listening, noise)
        seen = len(running.outcomes)
        await commit_unheard(shop, writer, listening)
        await running.until_refreshed("sales", ANNA, after=seen)
        assert await shown(shop, ANNA) == {"late": 1}


@pytest.mark.anyio
async def test_busy_means_no_notification_at_all(
    shop: Database, superuser: AsyncConnection[Any], listening: AsyncConnection[Any]
) -> None:
    async with serving(shop) as running, silent_writer(shop, running, listening) as writer:
        await writer.rollback()
        doorbell = running.service.drainer.doorbell
        silent = loud = 0
        async with application(shop, ANNA) as app:
            began = await one(superuser, "SELECT clock_timestamp()")
            # Longer than a lease, which is therefore extended.
            while not await one(superuser, "SELECT clock_timestamp() - %s > interval '1.2 s'", began):
                before = doorbell.state == "polling" and await lease_is_held(superuser)
                await order(app, ANNA, "a")
                if before and await lease_is_held(superuser):
                    silent += 1
                else:
                    loud += 1
        assert len(await heard(listening, superuser)) <= loud
        assert silent > 10 * loud, "the lease was not extended"
        await at_rest(shop, running)
        assert await shown(shop, ANNA) == {"a": silent + loud}


@pytest.mark.anyio
async def test_idle_means_one_notification_a_write(
    shop: Database, superuser: AsyncConnection[Any], listening: AsyncConnection[Any]
) -> None:
    async with serving(shop) as running, application(shop, ANNA) as app:
        for number in range(1, 4):
            seen = len(running.outcomes)
            await order(app, ANNA, "a")
            await running.until_refreshed("sales", ANNA, after=seen)
            assert await heard(listening, superuser) == [{"tenant_id": ANNA, "source": "shop.orders"}]
            assert await shown(shop, ANNA) == {"a": number}
            # The next one is no busy stream.
            await superuser.execute("SELECT pg_sleep(0.3)")
            assert running.service.drainer.doorbell.state == "resting"


@pytest.mark.anyio
async def test_where_notifying_is_forbidden_the_service_polls_and_keeps_no_lease(
    shop: Database, superuser: AsyncConnection[Any], listening: AsyncConnection[Any]
) -> None:
    async with (
        serving(shop) as running,
        silent_writer(shop, running, listening) as writer,
        shop.connect("listener_migrator") as migrator,
    ):
        await migrator.execute("SELECT listener.set_notify('never')")
        await running.service.drainer.heed_installation()
        await writer.rollback()
        await at_rest(shop, running)
        seen = len(running.outcomes)
        async with application(shop, ANNA) as app:
            await order(app, ANNA, "a")
        await running.until_refreshed("sales", ANNA, after=seen)
        assert await heard(listening, superuser) == []
        # Whoever wrote before it was allowed again did not ring, and may not have ended.
        async with application(shop, ANNA, autocommit=False) as late:
            await order(late, ANNA, "late")
            await migrator.execute("SELECT listener.set_notify('when_idle')")
            await running.service.drainer.heed_installation()
            seen = len(running.outcomes)
            await commit_unheard(shop, late, listening)
            await running.until_refreshed("sales", ANNA, after=seen)
        assert await shown(shop, ANNA) == {"a": 1, "late": 1}
