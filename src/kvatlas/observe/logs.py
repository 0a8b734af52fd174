"""Structured logs on standard error. Prompts and token ids never reach them.

Loggers from :func:`get_logger` work without set-up (they are standard library loggers underneath, so that an application
that embeds kvatlas decides); a service calls :func:`configure_logs` once.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, TextIO, cast

import msgspec
import structlog
from structlog.stdlib import BoundLogger, ProcessorFormatter
from structlog.typing import Processor

from kvatlas.config import LogSettings

_PRIVATE = frozenset({"prompt", "text", "token_ids", "tokens", "body", "messages", "token", "authorization"})
_QUIET = ("uvicorn", "uvicorn.error", "uvicorn.access", "asyncio", "grpc")


def get_logger(name: str) -> BoundLogger:
    """Return a logger: ``log.info("engine restarted", pod=pod)``. ``name``: the module's."""
    logger = structlog.wrap_logger(
        logging.getLogger(name),
        processors=[structlog.stdlib.filter_by_level, withhold_private, ProcessorFormatter.wrap_for_formatter],
        wrapper_class=BoundLogger,
    )
    return cast(BoundLogger, logger)


def configure_logs(settings: LogSettings, stream: TextIO | None = None, *, bound: Mapping[str, object] | None = None) -> None:
    """Send all logs of the process, other libraries' included, to ``stream`` (standard error) in one form.

    Replaces handlers set before. Other libraries are heard from warnings on. ``bound``: what every line says besides.
    """
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(_formatter(settings, bound or {}))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(settings.level.upper())
    logging.captureWarnings(True)
    structlog.configure(  # for loggers made with structlog.get_logger, ours or an extension's
        processors=[structlog.stdlib.filter_by_level, withhold_private, ProcessorFormatter.wrap_for_formatter],
        wrapper_class=BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    for name in _QUIET:
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
        library.setLevel(max(logging.WARNING, root.level))


def withhold_private(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Take out what must not be logged, should it be handed in by mistake; say that something was there."""
    for key in _PRIVATE.intersection(event):
        event[key] = "[withheld]"
    return event


def _formatter(settings: LogSettings, bound: Mapping[str, object]) -> logging.Formatter:
    def add_bound(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event.update(bound)
        return event

    shared: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        add_bound,
    ]
    if settings.format == "json":
        shared.append(structlog.processors.format_exc_info)
        last: Processor = structlog.processors.JSONRenderer(serializer=_json)
    else:
        last = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(),
            exception_formatter=structlog.dev.plain_traceback,  # others print local variables: prompts among them
        )
    return ProcessorFormatter(
        processors=[*shared, ProcessorFormatter.remove_processors_meta, last], foreign_pre_chain=[withhold_private]
    )


def _json(event: Any, **_options: Any) -> str:
    try:
        return msgspec.json.encode(event, enc_hook=repr).decode()
    except (ValueError, OverflowError):  # lone surrogates, integers beyond 64 bits
        return json.dumps(event, default=repr)
