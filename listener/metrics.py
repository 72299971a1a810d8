"""What /metrics shows. No tenant id is ever a label."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 10, 30, 60, 300)


class Metrics:
    """The metrics of one service, in a registry of their own."""

    def __init__(self) -> None:
        # A second series for each counter, with the time of its birth, is noise on a dashboard.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        r = self.registry
        self.not_ready_reasons = Gauge(
            "listener_not_ready_reasons", "How many reasons /health/ready gives for not being ready.", registry=r
        )
        self.changes_drained = Counter("listener_changes_drained", "Change log rows drained.", registry=r)
        self.refreshes = Counter("listener_refreshes", "Refreshes by outcome.", ["view", "outcome"], registry=r)
        self.refresh_duration = Histogram(
            "listener_refresh_duration_seconds", "Time of one refresh.", ["view"], buckets=SECONDS, registry=r
        )
        self.staleness = Histogram(
            "listener_staleness_seconds",
            "From when the oldest change included could be seen to after the refresh's commit.",
            ["view"],
            buckets=SECONDS,
            registry=r,
        )
        self.dirty_keys = Gauge(
            "listener_dirty_keys",
            "Keys with a change that is not shown, of views that are not paused.",
            ["view"],
            registry=r,
        )
        self.oldest_dirty_age = Gauge(
            "listener_oldest_dirty_age_seconds",
            "Age of the oldest change that is not shown.",
            ["view"],
            registry=r,
        )
        self.view_staleness = Gauge(
            "listener_view_staleness_seconds",
            "Age of the oldest change that the view does not show, whatever the reason; a pause counts, too.",
            ["view"],
            registry=r,
        )
        self.view_max_staleness = Gauge(
            "listener_view_max_staleness_seconds",
            "The view's max_staleness: the age that such a change may reach. Absent where the view has no limit.",
            ["view"],
            registry=r,
        )
        self.dead_letters = Gauge("listener_dead_letters", "Open dead letters.", ["view"], registry=r)
        self.paused = Gauge(
            "listener_paused", "1 where the view is paused; its keys do not count as dirty.", ["view"], registry=r
        )
        self.sweep_recovered = Counter("listener_sweep_recovered", "Keys that only the sweep found.", registry=r)
        self.capture_repaired = Counter(
            "listener_capture_repaired",
            "Sources whose triggers were not as they should be, and were mended.",
            registry=r,
        )
        self.verified = Counter(
            "listener_verified",
            "Keys compared with their definition in the background, by what came of it.",
            ["outcome"],
            registry=r,
        )
        self.drift = Counter(
            "listener_drift",
            "Keys whose target differed from its definition without a change that explains it, and were refreshed.",
            ["view"],
            registry=r,
        )
        self.change_log_rows = Gauge("listener_change_log_rows", "Rows of the change log, an estimate.", registry=r)
        self.oldest_transaction_age = Gauge(
            "listener_oldest_transaction_age_seconds",
            "Age of the oldest transaction that holds dead rows back, in any database.",
            registry=r,
        )
        self.notification_queue_ratio = Gauge(
            "listener_notification_queue_ratio", "How full the server's notification queue is, 0 to 1.", registry=r
        )
        self.reconnects = Counter("listener_reconnects", "Reconnects of the listening connection.", registry=r)
        self.given_up = Counter(
            "listener_connections_given_up", "Connections of the pool whose answer would never come.", registry=r
        )
        self.lock_busy = Counter("listener_lock_busy", "Refreshes that found their key locked.", registry=r)
        self.malformed_notifications = Counter(
            "listener_malformed_notifications", "Notifications that were not understood.", registry=r
        )

    def show(self, views: Iterable[Mapping[str, Any]]) -> None:
        """Takes view_queries.view_gauges over; a view that was dropped is no longer shown."""
        gauges = {
            "dirty_keys": self.dirty_keys,
            "oldest_dirty_age": self.oldest_dirty_age,
            "dead_letters": self.dead_letters,
            "paused": self.paused,
            "staleness": self.view_staleness,
            "max_staleness": self.view_max_staleness,
        }
        for gauge in gauges.values():
            gauge.clear()
        for view in views:
            # From the first look on it is 0, so that its first rise is seen.
            self.drift.labels(view["view"])
            for name, gauge in gauges.items():
                if view[name] is not None:
                    gauge.labels(view["view"]).set(view[name])
