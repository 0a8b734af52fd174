"""``kvatlas engine``."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvatlas.cli.screen import screen, show_json
from kvatlas.errors import RequestError

if TYPE_CHECKING:
    from kvatlas.keys.engine_hashes import HashScheme
    from kvatlas.sim.engines import EngineSpec
    from kvatlas.sim.live.server import Started

HASHES = ("sha256_cbor", "xxhash_cbor")
"""Those of vLLM that do not depend on Python's pickle."""

SpecFile = Annotated[
    Path | None, typer.Option("--spec", help="A file that `kvatlas calibrate` wrote.", metavar="FILE", show_default=False)
]


def engine(
    model: Annotated[
        str, typer.Option("--model", "-m", help="The model's name, as requests have it.", metavar="NAME")
    ] = "tiny",
    alias: Annotated[
        list[str] | None, typer.Option(help="Another name of the model. Can be repeated.", metavar="NAME", show_default=False)
    ] = None,
    preset: Annotated[
        str, typer.Option(help="How fast it is: `small`, or a preset of the simulator.", metavar="NAME")
    ] = "small",
    spec: SpecFile = None,
    gpu_blocks: Annotated[
        int | None, typer.Option(min=2, help="KV blocks that it has; else the preset's.", metavar="COUNT", show_default=False)
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a block; else the preset's.", metavar="TOKENS", show_default=False)
    ] = None,
    speed: Annotated[
        float, typer.Option(min=0.01, max=1000, help="So many of its seconds pass in one of ours.", metavar="FACTOR")
    ] = 1.0,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="A model's directory with a tokenizer.json; else a small packaged one.", metavar="DIR", show_default=False
        ),
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens of prompt and answer at most.", metavar="TOKENS", show_default=False)
    ] = None,
    host: Annotated[str, typer.Option(help="Address on which it listens.", metavar="ADDRESS")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the API; 0 takes a free one.")] = 8000,
    events_port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the KV events; 0 takes a free one.")] = 0,
    replay_port: Annotated[int, typer.Option(min=0, max=65535, help="Port of their replay; 0 takes a free one.")] = 0,
    pod: Annotated[
        str | None, typer.Option(help="Its name in events; else ADDRESS:PORT.", metavar="NAME", show_default=False)
    ] = None,
    hash_algorithm: Annotated[
        str, typer.Option(help="How blocks are hashed: sha256_cbor or xxhash_cbor.", metavar="NAME")
    ] = "sha256_cbor",
    hash_seed: Annotated[str, typer.Option(help="What an engine has as PYTHONHASHSEED.", metavar="TEXT")] = "0",
    output_tokens: Annotated[int, typer.Option(min=1, help="Of a chat that does not say.", metavar="COUNT")] = 64,
    requests_max: Annotated[
        int, typer.Option(min=1, help="Requests in progress; further ones get 503.", metavar="COUNT")
    ] = 1024,
    fault: Annotated[
        list[str] | None,
        typer.Option(
            help="What goes wrong: a status, hang, reset, cut, stall or lose-events; :SHARE of requests. Can be repeated.",
            metavar="KIND[:SHARE]",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Say where it listens as one line of JSON.")] = False,
) -> None:
    """Run an engine without a GPU: OpenAI's API, metrics and KV events of a vLLM, in real time, with words for answers.

    Batches, prefix cache, eviction and times are the simulator's; events and block hashes are those of vLLM 0.32. It computes
    no model: equal requests get equal answers that mean nothing.

    Examples:

        kvatlas engine
        kvatlas engine --port 8001 --gpu-blocks 2000 --model llama
        kvatlas engine --spec h100.yaml --speed 10
        kvatlas engine --fault 503:0.1 --fault cut:0.05
    """
    from kvatlas.sim.live.choice import chosen_spec
    from kvatlas.sim.live.faults import read_fault
    from kvatlas.sim.live.server import EngineOptions, serve

    chosen = chosen_spec(preset, spec, gpu_blocks, block_size)
    options = EngineOptions(
        host=host,
        port=port,
        events_port=events_port,
        replay_port=replay_port,
        model=model,
        aliases=tuple(alias or ()),
        pod=pod,
        tokenizer=tokenizer,
        max_model_len=max_model_len,
        scheme=_scheme(hash_algorithm, hash_seed),
        output_tokens=output_tokens,
        requests_max=requests_max,
        speed=speed,
        faults=tuple(map(read_fault, fault or ())),
    )
    show = show_json if as_json else lambda started: _show(started, chosen)
    asyncio.run(serve(chosen, options, started=show))


def _scheme(algorithm: str, seed: str) -> HashScheme:
    from kvatlas.keys.engine_hashes import HashScheme

    if algorithm not in HASHES:
        raise RequestError("--hash-algorithm", f"{algorithm!r:.40} is none of {', '.join(HASHES)}", "give one of them")
    return HashScheme(algorithm, seed)


def _show(started: Started, spec: EngineSpec) -> None:
    out = screen()
    out.print(f"engine   {started.url}  model {started.model}: {spec.gpu_blocks} blocks of {spec.block_size_tokens} tokens")
    out.print(f"events   {started.events}, replay {started.replay}, as pod {started.pod}")
    body = f'{{"model": "{started.model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    out.print(f"try it   curl -s {started.url}/v1/chat/completions -d '{body}'", soft_wrap=True)
    out.print(
        f"route    kvatlas route --port 0 --endpoint '{started.url}?kvEvents={started.events}&replayEndpoint={started.replay}'"
        f" --set zmq.bind=false --set 'tokens.renderer.endpoints=[\"{started.url}\"]'",
        soft_wrap=True,
    )
