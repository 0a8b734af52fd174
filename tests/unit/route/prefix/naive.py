"""Routing history said in the most naive way: for each endpoint a list of prefixes, the one routed longest ago first."""

from __future__ import annotations

from collections.abc import Sequence

Prefix = tuple[int, ...]


class NaiveHistory:
    """A block is the whole prefix that it ends."""

    def __init__(self) -> None:
        self.held: dict[str, list[Prefix]] = {}

    def record(self, endpoint: str, prompt: Sequence[int], capacity: int) -> None:
        held = self.held.setdefault(endpoint, [])
        for end in range(min(len(prompt), capacity), 0, -1):
            prefix = tuple(prompt[:end])
            if prefix in held:
                held.remove(prefix)
            held.append(prefix)
        del held[: max(0, len(held) - capacity)]

    def match(self, prompt: Sequence[int]) -> dict[str, int]:
        found = {}
        for endpoint, held in self.held.items():
            count = 0
            while count < len(prompt) and tuple(prompt[: count + 1]) in held:
                count += 1
            if count:
                found[endpoint] = count
        return found
