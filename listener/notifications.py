"""Listen: a dedicated connection that hears the doorbell, is probed, and comes back by itself.

What a notification says is never trusted, the change log is; it only says when to look. So the loop over
`notifies()` does nothing but set an event: leaving or cancelling its body would lose the rest of the batch.
A half-open connection, a frozen server and a transaction pooler all look like silence. So every `probe_interval` the
connection notifies itself, and a probe that does not come back within `probe_timeout` ends the connection.
After every connect: LISTEN first, then ring, so that what was written meanwhile is drained.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import anyio
import psycopg
import structlog

from listener.backoff import Backoff
from listener.database_url import libpq_url
from listener.errors import public_reason, reason

CHANNEL = "listener_changes"
log = structlog.get_logger("listener.notifications")


@dataclass(slots=True)
class ListenState:
    """What readiness and metrics want to know of the listening connection."""

    connected: bool = False
    probe_answered: bool = False
    trouble: str | None = None  # for anybody to see
    on_reconnect: Callable[[], None] = field(default=lambda: None)
    on_malformed: Callable[[], None] = field(default=lambda: None)


async def listen(
    url: str, ring: Callable[[], None], state: ListenState, *, probe_interval: float, probe_timeout: float
) -> None:
    """Rings for each notification, and once after each connect. Runs until cancelled; seconds."""
    backoff = Backoff(base=0.1, cap=10)
    connected_before = False
    while True:
        try:
            async with await psycopg.AsyncConnection.connect(
                libpq_url(url),
                autocommit=True,
                application_name="listener listen",
                client_encoding="utf8",
                connect_timeout=max(2, int(probe_timeout)),
                keepalives_idle=10,
                keepalives_interval=5,
                keepalives_count=3,
                tcp_user_timeout=int(probe_timeout * 1000),
            ) as connection:
                await connection.execute("LISTEN listener_changes")
                if connected_before:
                    state.on_reconnect()
                    log.info("listening again")
                connected_before = True
                state.connected, state.trouble = True, None
                ring()
                await _receive(connection, ring, state, probe_interval, probe_timeout, backoff)
        except (psycopg.Error, OSError) as error:
            state.connected = state.probe_answered = False
            state.trouble = public_reason(error)
            delay = backoff.next_delay()
            log.warning("not listening; trying again", reason=reason(error), retry_in=round(delay, 2))
            await anyio.sleep(delay)


async def _receive(
    connection: psycopg.AsyncConnection[Any],
    ring: Callable[[], None],
    state: ListenState,
    probe_interval: float,
    probe_timeout: float,
    backoff: Backoff,
) -> None:
    """Alternates between waiting for notifications and probing. Raises TimeoutError when a probe is lost."""
    while True:
        token = uuid.uuid4().hex
        try:
            with anyio.fail_after(probe_timeout):
                await connection.execute(
                    "SELECT pg_catalog.pg_notify('listener_changes', %s)", (json.dumps({"probe": token}),)
                )
        except TimeoutError:
            raise TimeoutError(f"a probe could not be sent within {probe_timeout:g} s") from None
        deadline = anyio.current_time() + probe_timeout
        answered = False
        while not answered and (left := deadline - anyio.current_time()) > 0:
            async for notification in connection.notifies(timeout=left, stop_after=1):
                answered = _heard(notification.payload, token, ring, state) or answered
        if not answered:
            raise TimeoutError(f"a probe of the listening connection did not come back within {probe_timeout:g} s")
        state.probe_answered = True
        backoff.reset()
        async for notification in connection.notifies(timeout=probe_interval):
            _heard(notification.payload, token, ring, state)


def _heard(payload: str, token: str, ring: Callable[[], None], state: ListenState) -> bool:
    """Rings unless it is a probe, or nothing that capture sends; whether it is the awaited probe."""
    try:
        message = json.loads(payload)
        probe = message.get("probe")
        if probe is None:
            if not (isinstance(message["source"], str) and isinstance(message["tenant_id"], str | None)):
                raise TypeError
        elif not isinstance(probe, str):
            raise TypeError
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        state.on_malformed()
        return False
    if probe is None:
        ring()
    return bool(probe == token)
