"""The two questions a scheduler asks, for one model: how good is this pod for this prefix, and which pods are good for it."""

from __future__ import annotations

from kvatlas.indexer import Indexer
from kvatlas.keys import TokenIds
from kvatlas.results import PodScore, Query
from kvatlas.types import PodId


class CacheScorer:
    """Scores prefixes (token ids from the prompt's start) of one model or adapter."""

    def __init__(self, indexer: Indexer, model: str, scorer: str | None = None) -> None:
        self._indexer = indexer
        self._model = model
        self._scorer = scorer

    def score(self, prefix: TokenIds, pod: PodId) -> float:
        """Return a pod's score for a prefix, in the scorer's unit; 0 for a pod that holds nothing or is not known."""
        result = self._indexer.score(Query(prefix, self._model, pods=frozenset({pod}), scorer=self._scorer))
        return result.pods[0].score if result.pods else 0.0

    def get_candidates(self, prefix: TokenIds, limit: int | None = None) -> tuple[PodScore, ...]:
        """Return the pods that hold something of a prefix, best first."""
        return self._indexer.candidates(Query(prefix, self._model, scorer=self._scorer), limit)
