"""What HTTP and gRPC ask of the index, and the bounds on it. Nothing here knows a protocol."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

from kvatlas.config import ApiSettings, Config
from kvatlas.errors import RequestError
from kvatlas.keys.tokens import TokenIds, as_token_array
from kvatlas.observe.metrics import Metrics
from kvatlas.results import BlockLocality, PodScore, PodStatus, Query, ScoreResult
from kvatlas.types import BlockKey, Frame, MultimodalItem, PodId

KEY_MAX = 0xFFFF_FFFF_FFFF_FFFF


class ServedIndex(Protocol):
    """What the service needs of :class:`kvatlas.indexer.Indexer`."""

    @property
    def config(self) -> Config: ...
    @property
    def metrics(self) -> Metrics: ...
    def score(self, query: Query) -> ScoreResult: ...
    def candidates(self, query: Query, limit: int | None = None) -> tuple[PodScore, ...]: ...
    def locality(self, keys: Sequence[BlockKey], pods: Collection[PodId] | None = None) -> tuple[BlockLocality, ...]: ...
    def block_keys(self, query: Query) -> list[BlockKey]: ...
    def pods(self) -> tuple[PodStatus, ...]: ...
    def ready(self) -> tuple[bool, str]: ...
    def publish(self, frame: Frame, *, decoder: str = "vllm", pod: PodId | None = None, model: str | None = None) -> None: ...


def make_query(
    limits: ApiSettings,
    *,
    token_ids: TokenIds,
    model: str,
    lora_name: str | None = None,
    cache_salt: str | None = None,
    multimodal: Sequence[MultimodalItem] = (),
    pods: Sequence[str] | None = None,
    scorer: str | None = None,
) -> Query:
    """Return a query within the limits. Raises RequestError or TokensError that names the field."""
    tokens = checked_tokens(limits, token_ids)
    if not model:
        raise RequestError("model", "is empty", "name the model as the engines do")
    for position, item in enumerate(multimodal):
        if not 0 <= item.offset_tokens < len(tokens):
            raise RequestError(
                f"multimodal[{position}].offset_tokens",
                f"{item.offset_tokens} is outside the prompt of {len(tokens)} tokens",
                "give the position of the item's first placeholder token",
            )
    return Query(
        token_ids=tokens,
        model=model,
        lora_name=lora_name or None,
        cache_salt=cache_salt or None,
        multimodal=tuple(multimodal),
        pods=None if pods is None else frozenset(map(PodId, pods)),
        scorer=scorer or None,
    )


def checked_tokens(limits: ApiSettings, token_ids: TokenIds) -> array[int]:
    """Return token ids as one array. Raises RequestError beyond api.tokensMax, TokensError for values that are none."""
    tokens = as_token_array(token_ids)
    if len(tokens) > limits.tokens_max:
        raise RequestError(
            "token_ids",
            f"{len(tokens)} tokens are more than api.tokensMax ({limits.tokens_max})",
            "send a shorter prefix, or raise the setting",
        )
    return tokens


def checked_keys(limits: ApiSettings, keys: Sequence[int | str]) -> list[BlockKey]:
    """Return block keys from integers, decimal digits or 0x hexadecimal. Raises RequestError that names the position."""
    if len(keys) > limits.keys_max:
        raise RequestError("keys", f"{len(keys)} keys are more than api.keysMax ({limits.keys_max})", "ask in several requests")
    return [_key(value, position) for position, value in enumerate(keys)]


def known_parameters(given: Iterable[str], names: frozenset[str]) -> None:
    """Check the parameters of a URL. Raises RequestError for one that has none of these names."""
    for name in given:
        if name not in names:
            allowed = f"parameters: {', '.join(sorted(names))}" if names else "this path has no URL parameters"
            raise RequestError(f"{name:.80}", "is no parameter here", allowed)


def key_text(key: BlockKey) -> str:
    """Return a key as JSON carries it: JavaScript's numbers cannot hold 64 bits."""
    return f"0x{key:016x}"


def _key(value: int | str, position: int) -> BlockKey:
    number = value if isinstance(value, int) else _number(value)
    if number is None or not 0 <= number <= KEY_MAX:
        raise RequestError(
            f"keys[{position}]",
            f"{value!r:.40} is no block key",
            'pass 64-bit unsigned integers: as "0x00ff...", as decimal digits in a string, or as a JSON integer',
        )
    return BlockKey(number)


def _number(text: str) -> int | None:
    if not text.isascii() or len(text) > 20:
        return None
    if text.isdigit():
        return int(text)
    digits = text[2:] if text[:2] in ("0x", "0X") else ""
    return int(digits, 16) if digits.isalnum() and all(digit in "0123456789abcdefABCDEF" for digit in digits) else None
