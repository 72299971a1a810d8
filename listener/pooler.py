"""Behind a transaction pooler: which backend a statement gets changes with each transaction.

So nothing may belong to the session. PgBouncer refuses a connection whose start-up parameters hold `options`, a SET
would reach whichever backend is next, and a prepared statement is unknown to the others. What a session of the pool is
set to is therefore set for each transaction, and each statement is one, as it is in autocommit.

It costs two round trips a statement, and is used only where a pooler was found.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from psycopg import AsyncCursor, sql
from psycopg.pq import TransactionStatus

if TYPE_CHECKING:
    from collections.abc import Mapping

    from psycopg import AsyncConnection


class TransactionCursor(AsyncCursor[Any]):
    """A cursor whose every statement is a transaction of its own, READ COMMITTED, with these settings."""

    def __init__(self, connection: AsyncConnection[Any], *, settings: Mapping[str, str] = {}, **options: Any) -> None:
        super().__init__(connection, **options)
        # Not SET LOCAL: that takes a list of schemas for the name of one.
        self._set = sql.SQL("; ").join(
            [
                sql.SQL("SET TRANSACTION ISOLATION LEVEL READ COMMITTED"),
                *(
                    sql.SQL("SELECT pg_catalog.set_config({}, {}, true)").format(name, value)
                    for name, value in settings.items()
                ),
            ]
        )

    async def execute(self, *arguments: Any, **options: Any) -> Self:
        """As AsyncCursor does. In a transaction of the caller's that is what is set, each time anew."""
        async with self._transaction():
            return await super().execute(*arguments, **options)

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[None]:
        in_one = self.connection.info.transaction_status == TransactionStatus.INTRANS
        async with nullcontext() if in_one else self.connection.transaction():
            await AsyncCursor(self.connection).execute(self._set)
            yield


def transactions_with(settings: Mapping[str, str]) -> Any:
    """The cursor factory of a connection whose statements are such transactions."""
    return partial(TransactionCursor, settings=settings)


async def is_pooled(connection: AsyncConnection[Any]) -> bool:
    """Whether something stands between that hands connections on: the backend is not the one that was promised."""
    row = await (await connection.execute("SELECT pg_backend_pid()")).fetchone()
    return row != (connection.info.backend_pid,)


async def hears(listening: AsyncConnection[Any], notifying: AsyncConnection[Any], token: str, patience: float) -> bool:
    """Whether what one connection notifies reaches the other, which sends nothing meanwhile; in so many seconds.

    Behind a transaction pooler LISTEN succeeds, and a connection that notifies itself may even hear it, where it gets
    the same backend again. One that waits has no backend, and hears nothing.
    """
    await listening.execute("LISTEN listener_startup")
    await notifying.execute("SELECT pg_notify('listener_startup', %s)", (token,))
    async with aclosing(listening.notifies(timeout=patience)) as notifications:
        async for notification in notifications:
            if notification.payload == token:
                return True
    return False
