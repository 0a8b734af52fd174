"""Choose and run a benchmark."""

from __future__ import annotations

import argparse
import importlib

from benchmarks.result import show

BENCHMARKS = {
    "reference": "the Python reference index: ingest, removal, queries, memory per entry; the baseline of what follows",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", nargs="?", choices=BENCHMARKS)
    parser.add_argument("--quick", action="store_true", help="smaller scenarios; ends within 50 seconds")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    given = parser.parse_args()
    if given.name is None:
        for name, what in BENCHMARKS.items():
            print(f"{name:12} {what}")
        return
    show(importlib.import_module(f"benchmarks.{given.name}").run(quick=given.quick), as_json=given.json)


if __name__ == "__main__":
    main()
