"""``kvatlas route``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from kvatlas.cli.options import ConfigFile, Engines, Overrides, engines_override


def route(
    config: ConfigFile = None,
    endpoint: Annotated[
        list[str] | None,
        typer.Option(
            "--endpoint",
            help="An engine's URL, http://10.0.0.7:8000[?pod=NAME&dpRanks=2]. Can be repeated.  [route.endpoints]",
            metavar="URL",
            show_default=False,
        ),
    ] = None,
    endpoints_file: Annotated[
        Path | None, typer.Option(help="A file that lists engines; it is followed.  [route.endpointsFile]", metavar="FILE")
    ] = None,
    picker_config: Annotated[
        Path | None, typer.Option(help="An EndpointPickerConfig, as for llm-d's router.  [route.pickerConfig]", metavar="FILE")
    ] = None,
    ext_proc: Annotated[
        bool, typer.Option("--ext-proc", help="Be Envoy's endpoint picker instead of a proxy.  [route.frontDoors]")
    ] = False,
    host: Annotated[
        str | None,
        typer.Option(help="Address on which requests are taken.  [proxy.host, extProc.host]", metavar="ADDRESS"),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(help="Port on which requests are taken; 0 takes a free one.", metavar="PORT", show_default=False),
    ] = None,
    api_port: Annotated[
        int | None, typer.Option(help="Port of the API: decisions, scores, metrics.  [api.port]", metavar="PORT")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that share the proxy's port.  [route.workers]", metavar="COUNT", show_default=False),
    ] = None,
    engine: Engines = None,
    settings: Overrides = None,
) -> None:
    """Route requests to the engine that holds their prefix: as an OpenAI-compatible proxy, or as Envoy's endpoint picker.

    It reads engines' KV events like `kvatlas serve`, and answers the same API. Where engines send no events, it goes by what it
    routed before. The proxy listens on 127.0.0.1:8000, Envoy's endpoint picker on 127.0.0.1:9002, the API on 8080 and 50051
    (gRPC). Without --engine it also binds tcp://127.0.0.1:5557 for engines that connect; --set zmq.bind=false does without.
    Every setting is in `kvatlas serve --help-config`.

    Examples:

        kvatlas route --endpoint http://10.0.0.7:8000 --endpoint http://10.0.0.8:8000
        kvatlas route --endpoints-file fleet.yaml --set tokens.models.llama=/models/llama
        kvatlas route --endpoints-file fleet.yaml --picker-config epp.yaml --ext-proc
        kvatlas explain
    """
    from kvatlas.config import load_config
    from kvatlas.serve.workers.supervisor import run

    given: list[tuple[str, object]] = [
        ("route.endpoints", endpoint or None),
        ("route.endpointsFile", endpoints_file),
        ("route.pickerConfig", picker_config),
        ("route.frontDoors", ["ext-proc"] if ext_proc else None),
        ("proxy.host", host),
        ("extProc.host", host),
        ("extProc.port" if ext_proc else "proxy.port", port),
        ("api.port", api_port),
        ("route.workers", workers),
    ]
    overrides = [*(settings or ()), *engines_override(engine or ())]
    overrides += [f"{path}={_written(value)}" for path, value in given if value is not None]
    loaded = load_config(config, overrides=overrides)
    if not loaded.route.front_doors:
        loaded = load_config(config, overrides=[*overrides, 'route.frontDoors=["proxy"]'])
    run(loaded)


def _written(value: object) -> str:
    return msgspec.json.encode(value).decode() if isinstance(value, list) else str(value)
