"""How many answers a new one will be beside, at each candidate. Pure.

    usage_e = blocks in use there, as a share, with the prompts that are on their way
    crowd_e = answers of all candidates x usage_e / usage of all candidates

Answers that are there now are what an engine happens to answer. KV usage counts every prefix that is in use as well, once, with
all its tokens; who uses it will come again. So an engine that holds many prefixes of which few happen to be used now counts as
fuller than one that holds few of them and answers many requests of these: the next new prefix goes to the latter.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvatlas.route.cycle import Candidate
from kvatlas.route.load import Load


def crowds(candidates: Sequence[Candidate]) -> list[float]:
    """Return the answers to be expected at each candidate: those that are there, where not every engine tells its KV usage."""
    answers = [float(one.load.in_flight.answering) for one in candidates]
    usages = []
    for one in candidates:
        usage = _usage(one.load)
        if usage is None:
            return answers
        usages.append(usage)
    used = sum(usages)
    if not used:
        return answers
    each = sum(answers) / used
    return [each * usage for usage in usages]


def _usage(load: Load) -> float | None:
    """Return the share of an engine's KV blocks that is in use, or will be; None where it does not tell."""
    report, in_flight = load.report, load.in_flight
    if report is None or (not report.kv_usage and report.running):
        return None
    if not report.gpu_blocks or not report.block_size_tokens:
        return report.kv_usage
    return report.kv_usage + in_flight.prefill_tokens / (report.gpu_blocks * report.block_size_tokens)
