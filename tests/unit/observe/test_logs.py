"""Logs: one JSON object a line, and nothing private in it."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from kvatlas.config import LogSettings
from kvatlas.observe.logs import configure_logs, get_logger


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """Logs configured to a buffer, and the root logger as it was afterwards."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    stream = io.StringIO()
    configure_logs(LogSettings(level="info"), stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()


def parsed(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_is_one_json_object_with_time_level_and_logger(lines: io.StringIO) -> None:
    get_logger("kvatlas.ingest").info("engine restarted", pod="a\nb", lost=3)
    (line,) = parsed(lines)
    assert line["event"] == "engine restarted"
    assert (line["pod"], line["lost"], line["level"], line["logger"]) == ("a\nb", 3, "info", "kvatlas.ingest")
    assert line["timestamp"].endswith("Z")


def test_prompts_tokens_and_secrets_are_withheld_even_when_handed_in(lines: io.StringIO) -> None:
    private = {"prompt": "secret", "text": "secret", "token_ids": [42424242], "authorization": "Bearer secret"}
    get_logger("kvatlas").warning("refused", **private)
    assert "secret" not in lines.getvalue()
    assert "42424242" not in lines.getvalue()
    assert parsed(lines)[0]["prompt"] == "[withheld]"


def test_loggers_made_with_structlog_alone_write_the_same_lines(lines: io.StringIO) -> None:
    structlog.get_logger("kvatlas.extension").info("seen", token_ids=[42424242])
    (line,) = parsed(lines)
    assert (line["event"], line["logger"], line["token_ids"]) == ("seen", "kvatlas.extension", "[withheld]")


def test_below_its_level_nothing_is_written(lines: io.StringIO) -> None:
    get_logger("kvatlas").debug("detail")
    assert not lines.getvalue()


def test_other_libraries_are_heard_in_the_same_form_from_warnings_on(lines: io.StringIO) -> None:
    logging.getLogger("uvicorn.error").info("started")
    logging.getLogger("uvicorn.error").warning("bad %s", "request")
    (line,) = parsed(lines)
    assert (line["event"], line["logger"]) == ("bad request", "uvicorn.error")


def test_an_exception_is_one_line_without_local_variables(lines: io.StringIO) -> None:
    prompt = "a private prompt"
    try:
        len(prompt).to_bytes(0, "big")
    except OverflowError:
        get_logger("kvatlas").exception("failed")
    (line,) = parsed(lines)
    assert "OverflowError" in line["exception"]
    assert prompt not in line["exception"]


def test_values_that_json_cannot_hold_are_still_logged(lines: io.StringIO) -> None:
    get_logger("kvatlas").info("odd", name="\ud800", big=1 << 80, thing=object())
    assert parsed(lines)[0]["big"] == 1 << 80
