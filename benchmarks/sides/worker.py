"""The process of one side: reads ``{"do": NAME, ...}`` a line, measures, writes ``{"value": ...}`` or ``{"error": ...}``.

Runs in the side's own environment, so it imports the standard library, ``benchmarks.streams`` and the side only.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import TextIO

from benchmarks.sides.measured import MeasuredSide


def load(side: str) -> MeasuredSide:
    if side == "kvatlas":
        from benchmarks.sides.kvatlas_side import KvatlasSide

        return KvatlasSide()
    from benchmarks.sides.dynamo_side import DynamoSide

    return DynamoSide()


def serve(side: MeasuredSide, requests: TextIO, answers: TextIO) -> None:
    for line in requests:
        request = json.loads(line)
        try:
            answer = {"value": getattr(side, request.pop("do"))(**request)}
        except Exception as error:  # whatever it is, the asking process has to hear of it
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    side, cores = sys.argv[1:]
    os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # what a library prints does not belong among the answers
        try:
            loaded = load(side)
        except ImportError as error:
            answers.write(json.dumps({"error": f"{side} cannot be imported: {error}"}) + "\n")
            return
        serve(loaded, sys.stdin, answers)


if __name__ == "__main__":
    main()
