"""Listen: a dedicated connection that hears the doorbell, is probed, and comes back by itself.

What a notification says is never trusted, the change log is; it only says when to look. So the loop over
`notifies()` does nothing but set an event: leaving or cancelling its body would lose the rest of the batch.
A half-open connection, a frozen server and a transaction pooler all look like silence. So every `probe_interval` the
connection notifies itself, and a probe that does not come back within `probe_timeout` ends the connection. One that
came back is the moment to ask the server about the other connections: `on_probe`.
After every connect: LISTEN first, then ring, so that what was written meanwhile is drained.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import anyio
import psycopg
import structlog

from listener.backoff import Backoff
from listener.database_url import libpq_url
from listener.errors import public_reason, reason
from listener.silence import PatientConnection

RETRY_CAP = 1.0  # seconds: what an outage costs once it is over
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
    url: str,
    ring: Callable[[], None],
    state: ListenState,
    *,
    probe_interval: float,
    probe_timeout: float,
    on_probe: Callable[[psycopg.AsyncConnection[Any]], Awaitable[None]],
    on_lost: Callable[[], Awaitable[None]],
) -> None:
    """Rings for each notification, and once after each connect. Runs until cancelled; seconds.

    `on_probe` may use the connection after each probe that came back, `on_lost` is called once it was lost.
    """
    backoff = Backoff(base=0.05, cap=RETRY_CAP)
    connected_before = False
    while True:
        try:
            async with await PatientConnection.connect(
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
                connection.patience = probe_timeout
                await connection.execute("LISTEN listener_changes")
                if connected_before:
                    state.on_reconnect()
                    log.info("listening again")
                connected_before = True
                state.connected, state.trouble = True, None
                ring()
                while True:
                    token = await _probe(connection, ring, state, probe_timeout)
                    state.probe_answered = True
                    backoff.reset()
                    await on_probe(connection)
                    async for notification in connection.notifies(timeout=probe_interval):
                        _heard(notification.payload, token, ring, state)
        except (psycopg.Error, OSError) as error:
            was_connected = state.connected
            state.connected = state.probe_answered = False
            state.trouble = public_reason(error)
            delay = backoff.next_delay()
            log.warning("not listening; trying again", reason=reason(error), retry_in=round(delay, 2))
            if was_connected:
                await on_lost()
            await anyio.sleep(delay)


async def _probe(
    connection: PatientConnection, ring: Callable[[], None], state: ListenState, probe_timeout: float
) -> str:
    """Notifies itself, and waits for that; its token. Raises TimeoutError, or psycopg.Error, where it is lost."""
    token = uuid.uuid4().hex
    await connection.execute("SELECT pg_catalog.pg_notify('listener_changes', %s)", (json.dumps({"probe": token}),))
    deadline = anyio.current_time() + probe_timeout
    answered = False
    while not answered and (left := deadline - anyio.current_time()) > 0:
        async for notification in connection.notifies(timeout=left, stop_after=1):
            answered = _heard(notification.payload, token, ring, state) or answered
    if not answered:
        raise TimeoutError(f"a probe of the listening connection did not come back within {probe_timeout:g} s")
    return token


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
