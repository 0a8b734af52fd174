"""``kvatlas tokenizer``."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from kvatlas.cli.options import ConfigFile
from kvatlas.errors import RequestError

DEFAULT_LISTEN = "127.0.0.1:50052"

_MODES = {"600": 0o600, "0600": 0o600, "660": 0o660, "0660": 0o660}


def tokenizer(
    listen: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Where to listen: unix:///PATH or HOST:PORT. Can be repeated.  [{DEFAULT_LISTEN}]", metavar="ADDRESS"
        ),
    ] = None,
    tokenizers: Annotated[
        list[Path] | None,
        typer.Option("--tokenizers", "-t", help="Where tokenizers are. Can be repeated.  [tokens.directories]", metavar="DIR"),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="A model's tokenizer. Can be repeated.  [tokens.models]", metavar="NAME=PATH"),
    ] = None,
    socket_mode: Annotated[
        str, typer.Option("--socket-mode", help="Who may connect to a Unix socket: 600, its owner; 660, its group too.")
    ] = "600",
    config: ConfigFile = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="One setting, as tokens.loadedMax=2. Can be repeated.", metavar="PATH=VALUE"),
    ] = None,
) -> None:
    """Serve tokenizers over gRPC: prompts become tokens here, for other kvatlas services and for llm-d's clients.

    A Unix socket is for processes on this machine, and for its owner alone; TCP takes the settings of api: token, TLS, limits.
    Logs are JSON lines on standard error.

    Examples:

        kvatlas tokenizer --tokenizers /models
        kvatlas tokenizer --listen unix:///run/kvatlas/tokenizer.sock --model qwen=/models/qwen3
    """
    from kvatlas.config import load_config
    from kvatlas.observe.logs import configure_logs

    mode = _MODES.get(socket_mode)
    if mode is None:
        raise RequestError("--socket-mode", f"{socket_mode!r} is none", "give 600 or 660")
    loaded = load_config(config, overrides=[*(settings or ()), *_overrides(tokenizers or (), model or ())])
    configure_logs(loaded.log)
    asyncio.run(_serve(loaded, listen or [DEFAULT_LISTEN], mode))


async def _serve(config: object, listen: Sequence[str], mode: int) -> None:
    from kvatlas.config import Config
    from kvatlas.serve.stopping import stopping_by
    from kvatlas.serve.tokenization_server import serve_tokenization

    assert isinstance(config, Config)
    with stopping_by(None) as stopping:
        await serve_tokenization(config, listen, stopping.asked, socket_mode=mode)


def _overrides(tokenizers: Sequence[Path], models: Sequence[str]) -> list[str]:
    """Return the overrides that the options stand for. RequestError for a bad one."""
    overrides = []
    if tokenizers:
        overrides.append(f"tokens.directories={msgspec.json.encode([str(path) for path in tokenizers]).decode()}")
    named = {}
    for text in models:
        name, separator, path = text.partition("=")
        if not name or not separator or not path:
            raise RequestError("--model", f"{text!r} has no name or no path", "give NAME=PATH, such as qwen=/models/qwen3")
        named[name] = str(Path(path).resolve()) if Path(path).is_dir() else path  # else a name in one of the directories
    if named:
        overrides.append(f"tokens.models={msgspec.json.encode(named).decode()}")
    return overrides
