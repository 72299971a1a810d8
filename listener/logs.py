"""Log lines: structlog, on a terminal for people, else one JSON object a line."""

from __future__ import annotations

import logging
import sys

import structlog
from structlog.typing import EventDict, Processor


def _what_first(_logger: object, _method: str, line: EventDict) -> EventDict:
    """Time, level and event lead the line: what a person reads first."""
    lead = {name: line.pop(name) for name in ("timestamp", "level", "event") if name in line}
    return lead | dict(line)


def configure(level: str, form: str) -> None:
    """Sets logging up for the process. `form`: auto, console or json."""
    console = form == "console" or (form == "auto" and sys.stderr.isatty())
    shared: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        _what_first,
    ]
    renderer: Processor = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
        if console
        else structlog.processors.JSONRenderer(ensure_ascii=False)
    )
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    # Lines of libraries take the same form, or a reader of JSON would stumble over them.
    libraries = logging.StreamHandler(sys.stderr)
    libraries.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
            foreign_pre_chain=shared,
        )
    )
    logging.basicConfig(handlers=[libraries], level=logging.WARNING, force=True)
    # psycopg's pool reports each failed attempt by itself; our own lines say it once, with backoff.
    logging.getLogger("psycopg.pool").setLevel(logging.CRITICAL)
