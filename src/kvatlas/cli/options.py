"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from kvatlas.config.quantities import DURATION_FORMS, Seconds, parse_duration
from kvatlas.errors import RequestError

DEFAULT_URL = "http://127.0.0.1:8080"

ServiceUrl = Annotated[str, typer.Option("--url", help="Where the service listens.", envvar="KVATLAS_URL", metavar="URL")]
ServiceToken = Annotated[
    str | None,
    typer.Option("--token", help="The service's bearer token.", envvar="KVATLAS_API_TOKEN", show_envvar=True, metavar="TOKEN"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="YAML file of settings.", metavar="FILE", show_default=False),
]
Engines = Annotated[
    list[str] | None,
    typer.Option(
        "--engine",
        "-e",
        help="An engine's event address, with more after commas: tcp://HOST:5557[,replay=tcp://HOST:5607][,pod=NAME]"
        "[,model=NAME][,dp=RANKS][,decoder=NAME]. Can be repeated; replaces zmq.engines.",
        metavar="ADDRESS",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="One setting, as index.maxSize=500000. Can be repeated.", metavar="PATH=VALUE"),
]
BlockSize = Annotated[int, typer.Option("--block-size", min=1, max=65536, help="Tokens of one index block.", metavar="TOKENS")]

_ENGINE_KEYS = {"replay": "replayEndpoint", "pod": "pod", "model": "model", "dp": "dpRanks", "decoder": "decoder"}


def engines_override(engines: Sequence[str]) -> list[str]:
    """Return the override that ``--engine`` options stand for; none where there are none. RequestError for a bad one."""
    if not engines:
        return []
    return [f"zmq.engines={msgspec.json.encode([_engine(text) for text in engines]).decode()}"]


def _engine(text: str) -> dict[str, str | int]:
    endpoint, *parts = text.split(",")
    engine: dict[str, str | int] = {"endpoint": endpoint}
    for part in parts:
        key, separator, value = part.partition("=")
        name = _ENGINE_KEYS.get(key)
        if name is None or not separator or not value:
            raise RequestError(
                "--engine", f"{part!r} is none of its parts", f"after the address: {', '.join(_ENGINE_KEYS)} = VALUE"
            )
        engine[name] = int(value) if key == "dp" and value.isascii() and value.isdigit() else value
    return engine


def duration(option: str, text: str | None) -> Seconds | None:
    """Return a duration option in seconds. RequestError for what is none."""
    if text is None:
        return None
    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise RequestError(option, str(error), f"give {DURATION_FORMS}") from None
    if seconds <= 0:
        raise RequestError(option, "is zero", f"give {DURATION_FORMS}")
    return seconds
