"""One prompt against all streams, in whichever way the index can: fused, where it scores by itself, or by a lookup."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Collection, Sequence

import msgspec

from kvatlas.index.protocol import FusedIndex, Index, Weighing
from kvatlas.keys import KeyRecipe, KeySchema, prompt_extras
from kvatlas.score.holdings import Holdings
from kvatlas.score.prefix import longest_prefix
from kvatlas.score.scorers import Coverage, HighestBlockHit, LongestPrefix, Scorer
from kvatlas.score.weights import TierWeights
from kvatlas.types import BlockKey, Lookup, MultimodalItem, PodId, PromptScores, Stream, StreamScore

_FUSED: dict[type[Scorer], str] = {
    LongestPrefix: "longest-prefix",
    HighestBlockHit: "highest-block-hit",
    Coverage: "coverage",
}
"""The scorers that a fused index knows. Others, from other packages, score what a lookup finds."""


class Prompt(msgspec.Struct, frozen=True, gc=False):
    """A prompt with all that its keys depend on. ``model``: as streams name it. ``pods`` None means all."""

    tokens: array[int]
    model: str
    lora_name: str | None = None
    cache_salt: str | None = None
    multimodal: Sequence[MultimodalItem] = ()
    pods: Collection[PodId] | None = None


class Matcher:
    """Matches prompts with what streams hold. Candidates are the streams of the prompt's model, and who scores above 0."""

    def __init__(self, index: Index, schema: KeyRecipe, weights: TierWeights, stale_weight: float = 1.0) -> None:
        """``stale_weight``: a factor on the score of a stream whose entries may be wrong."""
        self._index = index
        self._fused = index if isinstance(index, FusedIndex) else None
        self._schema = schema
        self._weights = weights
        self._stale_weight = stale_weight
        self._weighing = {
            scorer: Weighing(name, weights.by_tier, weights.unknown, stale_weight) for scorer, name in _FUSED.items()
        }

    def match(self, prompt: Prompt, scorer: Scorer) -> PromptScores:
        """Return every candidate's score, in no order."""
        weighing = self._weighing.get(type(scorer))
        if self._fused is None or weighing is None:
            return self._match_lookup(prompt, scorer)
        if isinstance(self._schema, KeySchema):
            root = self._schema.root(prompt.lora_name or prompt.model).key
            extras = prompt_extras(prompt.cache_salt, prompt.multimodal)
            return self._fused.score_prompt(prompt.tokens, root, extras, prompt.model, prompt.pods, weighing)
        keys = self._keys(prompt)
        confined = self._schema.confines(prompt.model, prompt.lora_name)
        return self._fused.score_keys(keys, len(prompt.tokens), prompt.model, prompt.pods, weighing, confined=confined)

    def _keys(self, prompt: Prompt) -> list[BlockKey]:
        return self._schema.keys(
            prompt.tokens,
            prompt.model,
            lora_name=prompt.lora_name,
            cache_salt=prompt.cache_salt,
            multimodal=prompt.multimodal,
        )

    def _match_lookup(self, prompt: Prompt, scorer: Scorer) -> PromptScores:
        keys = self._keys(prompt)
        lookup = self._index.lookup(keys, prompt.pods)
        if self._schema.confines(prompt.model, prompt.lora_name):
            lookup = _confined(lookup, prompt.model)
        holdings = Holdings(lookup, self._weights)
        streams = []
        for stream, info in holdings.streams.items():
            scored = self._score_stream(scorer, holdings, stream, len(prompt.tokens))
            if info.model in (None, prompt.model) or scored.score > 0:
                streams.append(scored)
        return PromptScores(streams, keys, holdings.blocks_held)

    def _score_stream(self, scorer: Scorer, holdings: Holdings, stream: Stream, prompt_tokens: int) -> StreamScore:
        hit = longest_prefix(holdings, stream, prompt_tokens, self._schema.block_size_tokens)
        info = holdings.streams[stream]
        score = scorer.score(holdings, stream, hit)
        return StreamScore(
            stream=stream,
            model=info.model,
            score=score if info.stale is None else score * self._stale_weight,
            matched_blocks=len(hit.tiers),
            matched_tokens=hit.tokens,
            cached_tokens=hit.cached_tokens,
            tiers=Counter(hit.tiers),
            speculative=hit.speculative,
            stale=info.stale,
        )


def _confined(lookup: Lookup, model: str) -> Lookup:
    """Return a lookup without the streams that are known to be of another model."""
    streams = {stream: info for stream, info in lookup.streams.items() if info.model in (None, model)}
    return Lookup(
        lookup.keys,
        [{slot: copies for slot, copies in slots.items() if slot.stream in streams} for slots in lookup.holders],
        [{stream for stream in promised if stream in streams} for promised in lookup.speculative],
        streams,
    )
