"""``lora-affinity-scorer``: who has the adapter, or could load it."""

from __future__ import annotations

from collections.abc import Sequence

from kvatlas.route.cycle import Candidate, Cycle
from kvatlas.route.plugins import NoParameters, Services

ACTIVE = 1.0
LOADABLE = 0.8
WAITING = 0.6


class LoraAffinityScorer:
    """1 where the adapter runs, 0.8 where there is room for one more, 0.6 where it waits for room, else 0.

    An engine that reports no adapters, or did not report yet, has no room: 0. Source: llm-d-router, lora-affinity-scorer.
    """

    Parameters = NoParameters

    def __init__(self, name: str, parameters: NoParameters, services: Services) -> None:
        self.name = name

    def score(self, cycle: Cycle, candidates: Sequence[Candidate]) -> list[float]:
        adapter = cycle.request.lora_name or cycle.request.model
        scores = []
        for one in candidates:
            report = one.load.report
            if report is None:
                scores.append(0.0)
            elif adapter in report.loras_running:
                scores.append(ACTIVE)
            elif len(report.loras_running) + len(report.loras_waiting) < (report.loras_max or 0):
                scores.append(LOADABLE)
            elif adapter in report.loras_waiting:
                scores.append(WAITING)
            else:
                scores.append(0.0)
        return scores
