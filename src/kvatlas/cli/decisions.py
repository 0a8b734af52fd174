"""Decisions of all workers of a service: each keeps its own, and a request reached one of them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import msgspec

from kvatlas.cli.client import ServiceClient
from kvatlas.errors import RequestError
from kvatlas.serve.routing.explain import DecisionShown


class Found(msgspec.Struct, frozen=True):
    """What workers answered."""

    decisions: tuple[DecisionShown, ...]
    """Newest first."""
    missing: tuple[str, ...] = ()
    """Whose decisions are not among them, and why."""


def decisions_of_all(client: ServiceClient, request_id: str | None, endpoint: str | None, limit: int) -> Found:
    """Ask all workers at once. RequestError where none of them knows, or the one that is asked does not answer."""
    name, workers = client.workers()
    if len(workers) == 1:
        others = (f"this is worker {name}; ask the others by --url: they have decisions of their own",) if name else ()
        return Found(client.decisions(request_id, endpoint, limit)[0], others)

    def ask(worker: ServiceClient) -> tuple[DecisionShown, ...] | RequestError:
        try:
            return worker.decisions(request_id, endpoint, limit)[0]
        except RequestError as error:
            return error

    with ThreadPoolExecutor(len(workers)) as threads:
        answers = list(threads.map(ask, workers))
    errors = [one for one in answers if isinstance(one, RequestError)]
    refusals = [error for error in errors if error.field in ("id", "endpoint")]
    missing = tuple(str(error) for error in errors if error not in refusals)
    decisions = sorted((one for each in answers if isinstance(each, tuple) for one in each), key=lambda one: -one.at_s)
    if len(errors) == len(answers):
        first = (refusals or errors)[0]
        asked = f"not all workers answered: {'; '.join(missing)}" if missing else f"all {len(workers)} workers were asked"
        raise RequestError(first.field, first.problem, asked if first.field == "id" else f"{first.remedy}; {asked}")
    return Found(tuple(decisions[:limit]), missing)
