"""An engine's replay endpoint as its stream's worker sees it: does it answer, and when to ask again."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping

from kvatlas.ingest.sources import Replayer
from kvatlas.observe.logs import get_logger
from kvatlas.observe.metrics import Metrics
from kvatlas.types import Frame, PodId

log = get_logger("kvatlas.ingest")

BACKOFF_MAX_S = 60.0


class ReplayPort:
    """Leaves an endpoint that did not answer alone for ``backoff_s``, doubled with each failure, up to BACKOFF_MAX_S.

    So an endpoint that is configured wrongly costs one timeout now and then, instead of one for every gap.
    """

    def __init__(
        self,
        replayer: Replayer,
        metrics: Metrics,
        pod: PodId,
        names: Mapping[str, object],
        backoff_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.answers: bool | None = None
        """Whether it answered the last question; None before the first one."""
        self.problem: str | None = None
        """Why it did not."""
        self._replayer = replayer
        self._metrics = metrics
        self._pod = pod
        self._names = names
        self._backoff_s = backoff_s
        self._clock = clock
        self._failures = 0
        self._again_s = 0.0

    def may_be_asked(self) -> bool:
        return self._clock() >= self._again_s

    def replay(self, start_seq: int) -> AsyncGenerator[Frame, None]:
        """Yield frames as :class:`~kvatlas.ingest.sources.Replayer` does."""
        return self._replayer.replay(start_seq)

    def answered(self) -> None:
        """It answered in full."""
        self.answers, self.problem = True, None
        self.forgive()

    def failed(self, error: Exception, taken: int) -> None:
        """It did not answer, or broke off after ``taken`` frames."""
        self.answers = False
        wait_s = min(BACKOFF_MAX_S, self._backoff_s * 2**self._failures)
        self._failures += 1
        self._again_s = self._clock() + wait_s
        self._metrics.replay(self._pod, "timeout", taken)
        self.problem = str(error) or "no answer in time: is the replay endpoint right?"
        log.warning("replay failed", problem=self.problem, again_in_s=wait_s, **self._names)

    def forgive(self) -> None:
        """Things have changed: it may be asked at once."""
        self._failures, self._again_s = 0, 0.0
