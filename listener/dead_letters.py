"""Failures: backoff, quarantine, and what an operator does with a dead letter."""

from __future__ import annotations

import contextlib
import os
import socket
import traceback
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.rows import DictRow, dict_row

from listener.errors import INVALID, one_line, without_secrets
from listener.view_queries import spellings

if TYPE_CHECKING:
    from datetime import timedelta

    from psycopg import AsyncConnection

    from listener.views import Change

LONGEST_TRACE = 20_000
WORKER = f"{socket.gethostname()}:{os.getpid()}"
# SQLSTATE classes of failures that pass by themselves; the others are the definition's or the data's.
TRANSIENT = {"40": "conflict", "53": "resources", "55": "lock", "57": "cancelled"}
# Quarantined at once, a key would stay stale for `slow` after the disk has room again or a migration's lock is gone. So
# these have so many times the attempts. Not what was cancelled: each attempt took the whole of statement_timeout.
PATIENCE = 3
PATIENT_WITH = {"conflict", "resources", "lock"}


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """`attempts` before the dead letter; waits double from `base` to `cap`; a quarantined key is tried every `slow`."""

    attempts: int
    base: timedelta
    cap: timedelta
    slow: timedelta

    def attempts_of(self, kind: str) -> int:
        """How many failures in a row open a dead letter, where the last one is of this kind; see error_type()."""
        if kind == "validation_error":
            return 1  # a malformed tenant does not get better by waiting
        return self.attempts * PATIENCE if kind in PATIENT_WITH else self.attempts


@dataclass(frozen=True, slots=True)
class Failure:
    """What was recorded: failures in a row, seconds until the next attempt, the open letter if there is one."""

    failures: int
    retry_in: float
    letter_id: str | None


def error_type(error: psycopg.Error) -> str:
    """`definition_error`, `validation_error` of a malformed tenant, or what passes by itself: see TRANSIENT."""
    if error.sqlstate == INVALID:
        return "validation_error"
    return TRANSIENT.get((error.sqlstate or "")[:2], "definition_error")


async def record_failure(
    connection: AsyncConnection[Any], change: Change, error: psycopg.Error, policy: RetryPolicy
) -> Failure:
    """Records a failed refresh, in a transaction of its own: the refresh took its record with it."""
    # What the database said, without the statement that it said it of: that is in the traceback.
    message = one_line(error.diag.message_primary or str(error)) + (f" ({error.sqlstate})" if error.sqlstate else "")
    trace = without_secrets("".join(traceback.format_exception(error)))
    if len(trace) > LONGEST_TRACE:
        trace = f"{trace[: LONGEST_TRACE // 2]}\n…\n{trace[-LONGEST_TRACE // 2 :]}"
    kind = error_type(error)
    cursor = await connection.execute(
        "SELECT failures, retry_in, letter_id::text"
        " FROM listener.record_failure(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
        (
            change.key.view_id,
            change.key.tenant,
            change.correlation_id,
            kind,
            error.sqlstate,
            type(error).__name__,
            message,
            trace,
            WORKER,
            policy.attempts_of(kind),
            policy.base,
            policy.cap,
            policy.slow,
        ),
    )
    row = await cursor.fetchone()
    assert row is not None
    return Failure(*row)


async def record_refusal(connection: AsyncConnection[Any], view: str, tenant: str, message: str) -> None:
    """A dead letter for a call that named no valid tenant."""
    await connection.execute("SELECT listener.record_refusal(%s, %s, %s, NULL, %s)", (view, tenant, message, WORKER))


async def letters(
    connection: AsyncConnection[Any],
    *,
    letter_id: str | None = None,
    view: str | None = None,
    tenant: str | None = None,
    status: str | None = "open",
) -> list[DictRow]:
    """Dead letters, newest first, narrowed by what is given; `status` None: closed ones too.

    An id or a tenant may be spelled in any way that its type can be.
    """
    with contextlib.suppress(ValueError):
        letter_id = None if letter_id is None else str(uuid.UUID(letter_id))
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(
            """
            SELECT d.id::text, d.view_name, d.tenant AS tenant_id, d.status, d.error_type, d.sqlstate,
                   d.exception_class, d.error_message, d.retry_count, d.correlation_id, d.app_correlation_id,
                   d.worker, d.failed_at, d.traceback, d.view_id
            FROM listener.dead_letter d
            WHERE (%(id)s::text IS NULL OR d.id::text = %(id)s)
              AND (%(view)s::text IS NULL OR d.view_name = %(view)s)
              AND (%(tenants)s::text[] IS NULL OR d.tenant = ANY (%(tenants)s))
              AND (%(status)s::text IS NULL OR d.status = %(status)s)
            ORDER BY d.failed_at DESC, d.id
            """,
            {
                "id": letter_id,
                "view": view,
                "tenants": None if tenant is None else list(filter(None.__ne__, spellings(tenant).values())),
                "status": status,
            },
        )
        return await cursor.fetchall()


async def discard(connection: AsyncConnection[Any], letter_id: str) -> bool:
    """Closes a letter without a retry; False where it was closed already."""
    row = await (await connection.execute("SELECT listener.discard_letter(%s)", (letter_id,))).fetchone()
    return bool(row and row[0])
