"""``kvatlas doctor``."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.text import Text

from kvatlas.cli.client import ServiceClient
from kvatlas.cli.options import DEFAULT_URL, AsJson, ConfigFile, Engines, ServiceToken, duration, engines_override
from kvatlas.cli.screen import quiet_logs, screen, show_json, table
from kvatlas.config import Config, load_config
from kvatlas.doctor import (
    Check,
    EngineExpectations,
    ExpectedKeys,
    Outcome,
    ServiceState,
    check_engine,
    check_installation,
    check_service,
    check_tokens,
    sample_engines,
)
from kvatlas.errors import ConfigError, RequestError
from kvatlas.ingest.decode import load_decoder
from kvatlas.keys.engine_hashes import UNSET_SEED, HashScheme
from kvatlas.netloc import netloc

FOUND_FAULTS = 1
"""Exit status where a check failed."""

_STYLES = {Outcome.OK: "green", Outcome.WARN: "yellow", Outcome.FAIL: "bold red", Outcome.SKIP: "dim"}


def doctor(
    config: ConfigFile = None,
    url: Annotated[
        str | None,
        typer.Option(
            help="A running service. By default that of the settings, if it runs.", envvar="KVATLAS_URL", metavar="URL"
        ),
    ] = None,
    engine: Engines = None,
    duration_text: Annotated[str, typer.Option("--duration", help="How long to listen to engines.", metavar="DURATION")] = "5s",
    block_size: Annotated[
        int | None,
        typer.Option(min=1, max=65536, help="The index's block size; by default that of the settings.", metavar="TOKENS"),
    ] = None,
    seed: Annotated[
        list[str] | None,
        typer.Option(help="PYTHONHASHSEED of the engines, to recognize their hashes by. Can be repeated.", metavar="SEED"),
    ] = None,
    token: ServiceToken = None,
    json: AsJson = False,
) -> None:
    """Check this installation, a running service, and engines' events. Changes nothing.

    A service is asked what it sees; engines named with --engine or in the settings are listened to directly, beside whoever
    else does. Exit status 1: a check failed. With --json each check is an object on a line of its own, and the last line is
    {"summary": ...}.

    Examples:

        kvatlas doctor
        kvatlas doctor --url http://10.0.0.5:8080
        kvatlas doctor --engine tcp://10.0.0.7:5557,replay=tcp://10.0.0.7:5607 --duration 20s
        kvatlas doctor --config kvatlas.yaml --json
    """
    quiet_logs()
    listen_s = duration("--duration", duration_text) or 5.0
    overrides = engines_override(engine or ())
    if block_size is not None:
        overrides.append(f"keys.blockSize={block_size}")
    settings, found = _settings(config, overrides)
    checks = check_installation(settings.index.core) + found
    with screen(stderr=True).status("loading tokenizers"):
        checks += check_tokens(settings.tokens)
    if url is not None or engine is None:
        checks += _service(settings, url, token)
    if settings.zmq.engines:
        checks += _engines(settings, EngineExpectations(duration_s=listen_s, seeds=seed or ()))
    _show(checks, json)
    if any(check.outcome is Outcome.FAIL for check in checks):
        raise typer.Exit(FOUND_FAULTS)


def _settings(path: Path | None, overrides: Sequence[str]) -> tuple[Config, list[Check]]:
    """Return the settings, or the defaults where they are wrong and only the file or the environment can be."""
    try:
        settings = load_config(path, overrides=overrides)
    except ConfigError as error:
        fallback = load_config(environ={}, overrides=overrides)
        remedy = "correct it; the other checks use defaults"
        return fallback, [Check("installation", "settings", Outcome.FAIL, str(error), remedy)]
    seen = f"{path} and the environment" if path else "defaults and the environment"
    return settings, [Check("installation", "settings", Outcome.OK, seen)]


def _service(settings: Config, url: str | None, token: str | None) -> list[Check]:
    api = settings.api
    scheme = "http" if api.tls_cert_file is None else "https"
    host = "127.0.0.1" if api.host in ("0.0.0.0", "::", "*") else api.host  # noqa: S104  # asked, not listened on
    client = ServiceClient(url or f"{scheme}://{netloc(host, api.port)}", token or api.token)
    try:
        ready, reason = client.ready()
        state = ServiceState(client.url, ready, reason, client.block_size_tokens(), client.pods()[0], client.metrics())
    except RequestError as error:
        if url is None:
            remedy = f"start it (kvatlas serve), or name it: kvatlas doctor --url {DEFAULT_URL}"
            return [Check(client.url, "service", Outcome.SKIP, error.problem, remedy)]
        return [Check(client.url, "service", Outcome.FAIL, error.problem, error.remedy)]
    return check_service(state)


def _engines(settings: Config, expected: EngineExpectations) -> list[Check]:
    engines = settings.zmq.engines
    expected = msgspec.structs.replace(
        expected,
        block_size_tokens=settings.keys.block_size,
        keys=ExpectedKeys(settings.keys.mode, _expected_scheme(settings)),
        topic_filter=settings.zmq.topic_filter,
    )
    decoders = [load_decoder(engine.decoder) for engine in engines]
    console = screen(stderr=True)
    with console.status(f"listening to {len(engines)} engines for {expected.duration_s:g} s"):
        samples = asyncio.run(sample_engines(engines, decoders, expected.duration_s))
    return [check for sample in samples for check in check_engine(sample, expected)]


def _expected_scheme(settings: Config) -> HashScheme | None:
    engine = settings.keys.engine
    if settings.keys.mode != "engine":
        return None
    return HashScheme(engine.algorithm, UNSET_SEED if engine.seed is None else engine.seed)


def _show(checks: Sequence[Check], as_json: bool) -> None:
    counts = Counter(check.outcome.value for check in checks)
    summary = {outcome.value: counts[outcome.value] for outcome in Outcome}
    if as_json:
        for check in checks:
            show_json(check)
        show_json({"summary": summary})
        return
    console = screen()
    for subject in dict.fromkeys(check.subject for check in checks):
        shown = table(subject, "", "check", "what was seen, and what to do", whole=("",))
        for check in checks:
            if check.subject == subject:
                told = Text(check.seen)
                if check.remedy:
                    told.append(f"\n→ {check.remedy}", "italic")
                shown.add_row(Text(check.outcome.value, _STYLES[check.outcome]), check.name, told)
        console.print(shown)
    console.print(", ".join(f"{count} {outcome}" for outcome, count in summary.items()))
