"""``kvatlas serve``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from kvatlas.cli.options import AsJson, ConfigFile, Engines, Overrides, engines_override
from kvatlas.cli.screen import screen, show_json


def serve(
    config: ConfigFile = None,
    settings: Overrides = None,
    host: Annotated[
        str | None, typer.Option(help="Address on which HTTP and gRPC listen.  [api.host, api.grpcHost]", metavar="ADDRESS")
    ] = None,
    port: Annotated[int | None, typer.Option(help="HTTP port; 0 takes a free one.  [api.port]", metavar="PORT")] = None,
    grpc_port: Annotated[
        int | None, typer.Option(help="gRPC port; 0 takes a free one.  [api.grpcPort]", metavar="PORT")
    ] = None,
    engine: Engines = None,
    help_config: Annotated[bool, typer.Option("--help-config", help="List every setting and exit.")] = False,
    json: AsJson = False,
) -> None:
    """Serve the index: reads engines' KV events, answers over HTTP and gRPC.

    Without settings it listens on loopback and binds tcp://127.0.0.1:5557, where engines publish to. Options go over --set,
    that over the environment (KVATLAS_INDEX_MAX_SIZE), that over the file. Logs are JSON lines on standard error.

    Examples:

        kvatlas serve
        kvatlas serve --engine tcp://10.0.0.7:5557,replay=tcp://10.0.0.7:5607
        kvatlas serve --config kvatlas.yaml --set index.ttl=2h --port 9000
        kvatlas serve --help-config
    """
    if help_config:
        _list_settings(json)
        return
    from kvatlas.config import load_config
    from kvatlas.serve.workers.supervisor import run

    overrides = [*(settings or ()), *engines_override(engine or ())]
    for path, value in (("api.host", host), ("api.grpcHost", host), ("api.port", port), ("api.grpcPort", grpc_port)):
        if value is not None:
            overrides.append(f"{path}={value}")
    run(load_config(config, overrides=overrides))


def _list_settings(as_json: bool) -> None:
    from kvatlas.config import describe_config
    from kvatlas.config.layers import env_name

    settings = describe_config()
    if as_json:
        for setting in settings:
            show_json(setting._asdict())
        return
    console = screen()
    for setting in settings:
        of_a_list = "[]" in setting.path or "<" in setting.path
        variable = "" if of_a_list else f"  {env_name(setting.path)}"
        console.print(Text.assemble((setting.path, "bold"), (variable, "dim")), soft_wrap=True)
        default = setting.default if setting.default == "required" else f"default {setting.default}"
        console.print(f"    {setting.type}, {default}. {setting.doc}", soft_wrap=True)
