"""Choose and run a benchmark."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from benchmarks.result import show
from benchmarks.sides import BaselineError, Placement, WorkerError

BENCHMARKS = {
    "reference": "the Python reference index: ingest, removal, queries, memory per entry; what a faster core is held against",
    "ingest": "vLLM frames into the index, 64 blocks an event and 1, beside NVIDIA Dynamo's",
    "removal": "blocks removed event by event, and a whole pod, beside NVIDIA Dynamo's",
    "score": "32k tokens to every pod's score, beside NVIDIA Dynamo's",
    "find": "the longest prefix by keys, beside NVIDIA Dynamo's",
    "memory": "resident bytes per (pod, block) entry, beside NVIDIA Dynamo's",
    "snapshot": "size and time of a snapshot, time of restoring it, beside NVIDIA Dynamo's",
    "readers": "queries while events pour in, beside idle",
    "tokens": "text and chats to tokens and scores, cold and warm, beside the tokenizers package alone; a trace of agents",
    "decide": "CPU time of a routed request by stage, for 2, 8 and 64 endpoints, beside the same in pure Python",
    "proxy": "requests per second and added latency of kvatlas route, beside other routers",
    "extproc": "the Envoy endpoint picker with a real Envoy, beside Envoy alone and a plain gRPC stub; needs wrk",
    "routing_live": "cache hits and time to first token of real traces behind kvatlas route, beside other routers",
    "simulate": "the fleet simulator: virtual seconds per CPU second, memory on long traces; --ladder: llm-d's benchmark",
    "dashboard": "a look at 500 engines, and queries while pages are open, beside none open",
    "scaling": "cost as entries, pods and threads grow; --plot FILE draws it",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", nargs="?", choices=BENCHMARKS)
    parser.add_argument("--quick", action="store_true", help="smaller scenarios; ends within 50 seconds")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--cores", type=int, default=1, help="cores that both sides are pinned to (default 1)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="scaling only: draw the curves into FILE (.svg or .png)")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="tokens only: another tokenizer than the tiny model's")
    parser.add_argument("--ladder", action="store_true", help="simulate only: llm-d's benchmark beside its published figures")
    given = parser.parse_args()
    if given.name is None:
        for name, what in BENCHMARKS.items():
            print(f"{name:12} {what}")
        return
    if given.plot and given.name != "scaling":
        parser.error("only scaling has a plot")
    if given.tokenizer and given.name != "tokens":
        parser.error("only tokens has a tokenizer")
    if given.ladder and given.name != "simulate":
        parser.error("only simulate has a ladder")
    own = {"scaling": {"plot": given.plot}, "tokens": {"tokenizer": given.tokenizer}, "simulate": {"ladder": given.ladder}}
    options = own.get(given.name, {})
    place = Placement.of(given.cores)
    try:
        results = importlib.import_module(f"benchmarks.{given.name}").run(quick=given.quick, place=place, **options)
    except (BaselineError, WorkerError) as error:
        sys.exit(f"benchmarks {given.name}: {error}")
    show(results, as_json=given.json)


if __name__ == "__main__":
    main()
