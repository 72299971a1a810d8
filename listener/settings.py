"""Settings of the service, read from the environment (LISTENER_*). Durations: `250ms`, `5s`, `2min`, `1h`, seconds."""

from __future__ import annotations

import os
import re
from datetime import timedelta
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

from listener.errors import SetupError

UNITS = {"ms": 0.001, "s": 1, "min": 60, "m": 60, "h": 3600, "d": 86400, "": 1}


def _duration(value: object) -> object:
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|min|m|h|d|)\s*", value)
    if match is None:
        raise ValueError("a duration is a number and a unit: 250ms, 5s, 2min, 1h")
    try:
        return timedelta(seconds=float(match[1]) * UNITS[match[2]])
    except OverflowError:
        raise ValueError("no duration is that long") from None


def duration_text(value: timedelta) -> str:
    """As a setting is written: `250ms`, `5s`, `30d`."""
    seconds = value.total_seconds()
    for unit in ("d", "h", "min", "s"):
        if seconds % UNITS[unit] == 0:
            return f"{seconds / UNITS[unit]:g}{unit}"
    return f"{seconds * 1000:g}ms"


class _AtMost:
    """Bounds of a duration: at least a millisecond, the smallest unit that the server's settings have."""

    def __init__(self, longest: timedelta) -> None:
        self.longest = longest

    def __call__(self, value: timedelta) -> timedelta:
        if not timedelta(milliseconds=1) <= value <= self.longest:
            raise ValueError(f"it must be 1ms at least and {duration_text(self.longest)} at most")
        return value


# What the service waits for stays below a day; what it keeps may be kept for ten years. The server counts
# statement_timeout in milliseconds, in 31 bits.
Duration = Annotated[timedelta, BeforeValidator(_duration), AfterValidator(_AtMost(timedelta(days=1)))]
ServerTimeout = Annotated[timedelta, BeforeValidator(_duration), AfterValidator(_AtMost(timedelta(days=24)))]
LongDuration = Annotated[timedelta, BeforeValidator(_duration), AfterValidator(_AtMost(timedelta(days=3650)))]


def _set(value: object) -> object:
    """An empty variable is what `${NAME:-}` makes of one that is not set."""
    if isinstance(value, str) and not value.strip():
        raise PydanticCustomError("missing", "is not set")
    return value


def _set_or_none(value: object) -> object:
    return None if isinstance(value, str) and not value.strip() else value


Name = Annotated[str, Field(min_length=1, max_length=63)]


def compute_role_of(given: dict[str, Any]) -> str:
    """The compute role where none is named: `listener_compute` for `listener_service`."""
    owner, service = str(given.get("owner_role")), str(given.get("service_role"))
    return owner if owner == service else service.removesuffix("_service")[: 63 - len("_compute")] + "_compute"


class Settings(BaseSettings):
    """What `listener run` and the commands need; see `listener run --help` for each."""

    model_config = SettingsConfigDict(env_prefix="LISTENER_", frozen=True, extra="ignore")

    database_url: Annotated[SecretStr, BeforeValidator(_set)] = Field(
        description="postgresql://user@host:5432/database; postgresql+psycopg:// is taken too"
    )
    listen_database_url: Annotated[SecretStr | None, BeforeValidator(_set_or_none)] = Field(
        default=None,
        description="a direct connection for LISTEN, where database_url goes through a transaction pooler",
    )
    owner_role: Name = Field(default="listener_owner", description="owns the schema, definitions and targets")
    service_role: Name = Field(default="listener_service", description="the role that drains and refreshes")
    compute_role: Name = Field(
        default_factory=compute_role_of,
        description="the role that computes definitions; it cannot log in. Default: the service's name with _compute"
        " for _service, or the owner where owner and service are one role",
    )
    allow_superuser: bool = Field(
        default=False, description="run as a superuser, whom row-level security does not bind"
    )

    workers: int = Field(
        default=4,
        ge=1,
        le=100,
        description="refreshes at the same time, each on a connection of its own; one tenant has half of them at most;"
        " a replica has four connections more",
    )
    poll_interval: Duration = Field(
        default=timedelta(milliseconds=100), description="how often to look for changes while nobody may notify"
    )
    sweep_interval: Duration = Field(default=timedelta(seconds=5), description="how often to look for what was missed")
    probe_interval: Duration = Field(default=timedelta(seconds=10), description="how often the connections are probed")
    probe_timeout: Duration = Field(default=timedelta(seconds=5), description="how long a probe may take")
    statement_timeout: ServerTimeout = Field(
        default=timedelta(seconds=60), description="the longest that one refresh may run"
    )
    grace_period: Duration = Field(
        default=timedelta(seconds=10),
        description="how long an end takes after SIGTERM; refreshes under way have all of it but 4s",
    )
    max_attempts: int = Field(
        default=5,
        ge=1,
        le=1_000_000,
        description="failures of a key before it goes to the dead letters; three times as many where they pass by"
        " themselves (conflict, lock, resources)",
    )
    retry_base: Duration = Field(
        default=timedelta(milliseconds=500), description="wait after the first failure; doubles"
    )
    retry_cap: Duration = Field(default=timedelta(seconds=30), description="the longest wait before a dead letter")
    retry_quarantined: LongDuration = Field(
        default=timedelta(minutes=5), description="how often a dead-lettered key is tried"
    )
    verify_keys: int = Field(
        default=10,
        ge=0,
        le=6000,
        description="keys a minute that a replica compares with their definition in the background; 0: none",
    )
    letters_kept: LongDuration = Field(default=timedelta(days=30), description="how long closed dead letters are kept")

    http_host: str = Field(
        default="127.0.0.1", min_length=1, description="address of /health, /health/ready and /metrics"
    )
    http_port: int = Field(default=9546, ge=0, le=65535, description="port of the same")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "console", "json"] = Field(default="auto", description="auto: console on a terminal")

    def effective(self) -> dict[str, str | int | bool]:
        """Every setting but the URLs, as log lines show them."""
        return {
            name: duration_text(value) if isinstance(value, timedelta) else value
            for name, value in self
            if not name.endswith("database_url")
        }


def load(**given: str) -> Settings:
    """The settings from the environment, with defaults of the caller's own for what must be set.

    Raises SetupError with one line that names each wrong variable.
    """
    try:
        unset = {
            name: value for name, value in given.items() if not os.environ.get(f"LISTENER_{name.upper()}", "").strip()
        }
        return Settings.model_validate(unset)
    except ValidationError as error:
        wrong = "; ".join(
            f"LISTENER_{str(e['loc'][0]).upper()} "
            + ("is not set" if e["type"] == "missing" else f"is wrong: {e['msg'].removeprefix('Value error, ')}")
            for e in error.errors()
            # Follows from another setting that is wrong, and that is named.
            if e["type"] != "default_factory_not_called"
        )
        raise SetupError(wrong + ".", hint="See: listener run --help") from None
