"""Who is there, and how busy they say they are: endpoints from flags, a file or Kubernetes; their metrics and their health."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from kvatlas.route.endpoint import Endpoint


class Discovery(Protocol):
    """Tells which endpoints there are, as long as it runs."""

    async def run(self, changed: Callable[[Sequence[Endpoint]], None]) -> None:
        """Call ``changed`` with all endpoints: once at the start, then whenever they are others. Runs until it is cancelled.

        Raises ConfigError where nothing can be told at the start; what fails later leaves the endpoints as they were.
        ``changed`` is called on the event loop and must not wait.
        """
        ...
