"""The errors that a caller can catch. Each message is one line that says what is wrong, and where possible the mend."""

from __future__ import annotations

import re

import psycopg
from psycopg_pool import PoolTimeout

# SQLSTATEs of the schema that are told apart here; sql/01_names.sql has them all.
UNKNOWN_VIEW, INVALID, RELEASE_TOO_OLD = "LSN01", "LSN02", "LSN06"


class ListenerError(Exception):
    """Base of the errors raised on purpose; `hint` says how to mend it, where that is known."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        """Message and hint, in one line."""
        message = " ".join(str(self.args[0]).split())
        if not self.hint:
            return message
        return f"{message}{'' if message.endswith(('.', '!', '?', ':', ';')) else '.'} {self.hint}"


class SetupError(ListenerError):
    """The database, its schema, a role or a setting is not as the service needs it."""


class RefusedError(ListenerError):
    """The database refused a call: unknown view, missing tenant, wrong definition. `sqlstate` tells which."""

    def __init__(self, message: str, *, sqlstate: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.sqlstate = sqlstate

    @property
    def is_validation(self) -> bool:
        """Whether the call named no valid key: its tenant is missing or malformed."""
        return self.sqlstate == INVALID


class UnavailableError(ListenerError):
    """The database cannot be used now, and waiting may mend it: no answer, a standby, no connection free."""


# What the server, libpq or a pooler says when it refuses a connection for good. A failed attempt to connect has no
# SQLSTATE, so its text is all there is; what stands in another language is waited out.
REFUSALS = re.compile(
    r"authentication (failed|method requirement)|no password supplied|no such (database|user)"
    r"|(role|database|user) \".*?\" does not exist|pg_hba\.conf|not permitted to log in|permission denied (for|to)"
    r"|does not support SSL|certificate|unsupported startup parameter|unrecognized configuration parameter"
    r"|(bad|invalid) (\w+ )?value"
)
# SQLSTATE classes of what passes by itself: connection, conflict, resources, limits, lock, stopping, the system.
PASSING = frozenset({"08", "40", "53", "54", "55", "57", "58"})
READ_ONLY = "25006"


LONGEST_LINE = 2000
# A URL's password reaches to the last @ of the word: one that was not escaped may hold some. After `password` stands
# what libpq takes (password = 'it''s'), what a URL holds (?password=x&), and what SQL does (PASSWORD 'x').
SECRET = re.compile(
    r"""(://[^:/@\s]*:)\S{1,500}(?=@)
      | (password\s*=\s*|password\s+(?='))(?:'(?:[^'\\]|''|\\.)*'|[^\s&'"]+)""",
    re.IGNORECASE | re.VERBOSE,
)


def without_secrets(text: str) -> str:
    """The text with *** for passwords."""
    return SECRET.sub(lambda found: f"{found[1] or found[2]}***", text)


def one_line(text: str) -> str:
    """The text without line breaks and without passwords; its beginning, where somebody raised a whole document."""
    line = without_secrets(" ".join(text.split()))
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}…"


def is_lost(error: psycopg.Error) -> bool:
    """Whether it is the connection that is of no use any more, not one statement that failed.

    It is gone; or it leads to a server that only reads: a standby, and the next connection may find the primary.
    """
    state = error.sqlstate
    return state is None or state[:2] == "08" or state[:3] == "57P" or state == READ_ONLY


def passes(error: psycopg.Error) -> bool:
    """Whether waiting may mend it. A wrong password does not pass, nor does a database that is not there."""
    if error.sqlstate is None:
        return not REFUSALS.search(str(error))
    return error.sqlstate[:2] in PASSING or error.sqlstate == READ_ONLY


def from_database(error: psycopg.Error, *, role: str | None = None, needed: str | None = None) -> ListenerError:
    """The error of ours that says in one line, without secrets, what the database said.

    `role` is who was connected, `needed` who may do it, where the caller knows them.
    """
    message = one_line(error.diag.message_primary or str(error)).removeprefix("validation_error: ")
    hint = one_line(error.diag.message_hint or "") or None
    if error.sqlstate is None and not passes(error):
        return SetupError(f"the database refuses the connection: {message}")
    if error.sqlstate == READ_ONLY:
        return UnavailableError(f"the server only reads: {message}", hint="Is it a standby? Connect to the primary.")
    if error.sqlstate is None or is_lost(error):
        return UnavailableError(f"the database does not answer: {message}")
    if error.sqlstate == "57014":
        hint = hint or (
            "Somebody cancelled it, or it ran into statement_timeout: the service's is LISTENER_STATEMENT_TIMEOUT."
        )
    if error.sqlstate == "2BP01" and error.diag.message_detail:
        # CASCADE, which the server proposes, would take away what is the user's.
        hint = f"Drop these first: {one_line('; '.join(error.diag.message_detail.splitlines()))}."
    if error.sqlstate == "42501":
        # With a context it was raised inside a function that the role may call: the definition reads or writes what
        # the role that computes it may not.
        if error.diag.context:
            hint = hint or "GRANT the view's compute role, or the service, what the view reads and its target."
        else:
            message += f" (role {role})" if role else ""
            hint = hint or (f"Run it as {needed}." if needed else None)
    if error.sqlstate in {"3F000", "42P01", "42883"} and "listener" in message:
        return SetupError(message, hint="Is the schema there? Run: listener migrate")
    return RefusedError(message, sqlstate=error.sqlstate, hint=hint)


# What a background loop waits out: the database says no, or nothing at all.
DATABASE_TROUBLE = (psycopg.Error, PoolTimeout)


def reason(error: BaseException) -> str:
    """Why something did not work, in one line."""
    if isinstance(error, psycopg.Error):
        return str(from_database(error))
    return one_line(str(error)) or type(error).__name__


def public_reason(error: BaseException) -> str:
    """The same for whoever asks over HTTP: what the server said of a statement can name a tenant, so only its kind."""
    if not isinstance(error, psycopg.Error) or is_lost(error) or error.sqlstate in {RELEASE_TOO_OLD, READ_ONLY}:
        return reason(error)
    return f"{type(error).__name__} ({error.sqlstate}); the log has the text"
