"""The nouns that every stage speaks of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

# The tenant of the key that stands for "all tenants of this view, not yet written out". Never a real tenant: a
# setting that was once set locally reads '' afterwards.
EVERYBODY = ""


class RefreshKey(NamedTuple):
    """What is refreshed at once: one tenant of one view."""

    view_id: int
    view: str
    tenant: str


@dataclass(frozen=True, slots=True)
class Window:
    """When a change becomes a refresh; seconds."""

    quiet_period: float
    max_wait: float
    edge: Literal["leading", "trailing"]


@dataclass(frozen=True, slots=True)
class Change:
    """A key that must be refreshed, and since when.

    Times are the service's monotonic clock, in seconds: they were ages by the server's clock when they were read, so
    neither clock's steps matter.
    """

    key: RefreshKey
    window: Window
    version: int
    first_change: float
    last_change: float
    correlation_id: str
    app_correlation_id: str | None = None
    refresh_started: float | None = None
    retry_at: float | None = None
    bulk: bool = False
    # nothing changed: the key is older than its view's max_age
    aged: bool = False
