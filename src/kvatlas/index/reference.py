"""The reference index: plain Python, slow and obvious. It is the specification that faster ones are compared with.

Memory is bounded by counts and by an estimate in bytes. It charges each kind of record (key, entry, named engine block, orphan,
promise) what it costs CPython 3.11 with 16-token blocks, as ``python -m benchmarks reference`` measures it.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence

from kvatlas.index.cache import Chunk, EngineBlock, EngineCache, Orphan, Place
from kvatlas.index.promises import Promises
from kvatlas.index.protocol import PLACES_MAX, IndexLimits
from kvatlas.keys import ChainedKeys, ChainEnd, EngineKeys, KeyRecipe, KeySchema
from kvatlas.types import (
    GPU,
    AllBlocksCleared,
    ApplyReport,
    BlockKey,
    BlockRemoved,
    BlockStored,
    EngineHash,
    EventBatch,
    Extra,
    GroupIdx,
    GroupSpec,
    IndexStats,
    Lookup,
    PodId,
    Slot,
    StaleReason,
    Stream,
    StreamInfo,
)

KEY_BYTES = 400
"""A block key with its place in the eviction order."""
ENTRY_BYTES = 150
"""A (key, slot) pair."""
ENGINE_BLOCK_BYTES = 545
"""A named engine block with its chain end, chunk and reverse entries."""
ORPHAN_BYTES = 420
PROMISE_BYTES = 360


class ReferenceIndex:
    """An in-memory :class:`~kvatlas.index.protocol.Index`. One lock guards all; a batch is applied as a whole."""

    def __init__(
        self,
        schema: KeyRecipe | None = None,
        limits: IndexLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.schema: KeyRecipe = schema or KeySchema()
        self.limits = limits or IndexLimits()
        self._clock = clock
        self._lock = threading.Lock()
        self._caches: dict[Stream, EngineCache] = {}
        self._holders: dict[BlockKey, dict[Slot, int]] = {}
        self._used_s: OrderedDict[BlockKey, float] = OrderedDict()
        self._entries = 0
        self._promises = Promises(self.limits.promises_max)
        self._evicted = {"ttl": 0, "size": 0, "bytes": 0}

    @property
    def core(self) -> str:
        return "reference"

    # -- write path -------------------------------------------------------------------------------------------------

    def apply(self, stream: Stream, batch: EventBatch) -> ApplyReport:
        with self._lock:
            report = ApplyReport()
            cache = self._caches.setdefault(stream, EngineCache(stream))
            cache.model = batch.model or cache.model
            cache.last_event_s = batch.timestamp_s or cache.last_event_s
            for event in batch.events:
                if isinstance(event, BlockStored):
                    self._store(cache, event, report)
                elif isinstance(event, BlockRemoved):
                    self._remove(cache, event, report)
                else:
                    self._clear(cache, event, report)
                self._age_retired(cache)
            self._expire()
            self._shrink()
            return report

    def _store(self, cache: EngineCache, event: BlockStored, report: ApplyReport) -> None:
        if event.spec is not None:
            self._learn_group(cache, event.group, event.spec)
        if isinstance(self.schema, EngineKeys) and event.block_size_tokens not in (None, 0, self.schema.block_size_tokens):
            report.refused += len(event.hashes)  # a hash of other blocks than prompts are cut into is nobody's key
            return
        place: Place = (event.tier, event.group)
        if place not in cache.copies and len(cache.copies) == PLACES_MAX:
            report.refused += len(event.hashes)
            return
        if isinstance(self.schema, EngineKeys):
            self._name_by_hash(cache, event)
        else:
            self._name_all(self.schema, cache, event, report)
        held = cache.copies.setdefault(place, {})
        for block in event.hashes:
            report.stored += 1
            report.duplicates += block in held
            if block not in cache.blocks and block not in cache.orphans:
                cache.orphans[block] = Orphan()
                report.orphaned += 1
            self._set_copies(cache, place, block, held.get(block, 0) + 1)
        for block in reversed(event.hashes):  # the first block last: eviction takes a prefix from its end
            named = cache.blocks.get(block)
            for chunk in reversed(named.chunks) if named else ():
                if chunk.key in self._used_s:
                    self._touch(chunk.key)
        while len(cache.orphans) > self.limits.orphans_max:
            self._drop_block(cache, next(iter(cache.orphans)))
            report.orphans_dropped += 1

    def _learn_group(self, cache: EngineCache, group: GroupIdx, spec: GroupSpec) -> None:
        known = cache.groups.get(group)
        if known == spec or (known is None and len(cache.groups) == PLACES_MAX):
            return  # beyond that many, no copy could lie in the group
        if known is not None and (known.block_size_tokens or 0) > (spec.block_size_tokens or 0):
            return  # the beginning of a block, cached by itself (vLLM's partial blocks), is not the group's block size
        cache.groups = {**cache.groups, group: spec}

    def _remove(self, cache: EngineCache, event: BlockRemoved, report: ApplyReport) -> None:
        for block in event.hashes:
            places = [
                (tier, group) for tier, group in cache.held_in(block) if tier == event.tier and event.group in (None, group)
            ]
            report.removed += bool(places)
            report.removed_unknown += not places
            for place in places:
                self._set_copies(cache, place, block, cache.copies[place][block] - 1)

    def _clear(self, cache: EngineCache, event: AllBlocksCleared, report: ApplyReport) -> None:
        tier = event.tier or GPU
        for place in [place for place in cache.copies if place[0] == tier]:
            for block in list(cache.copies[place]):
                report.cleared += 1
                self._set_copies(cache, place, block, 0)

    # -- naming: engine hash -> keys ----------------------------------------------------------------------------------

    def _name_by_hash(self, cache: EngineCache, event: BlockStored) -> None:
        """Give the event's blocks their keys, which are their hashes."""
        for block in event.hashes:
            if block not in cache.blocks:
                cache.blocks[block] = EngineBlock(ChainEnd(block), ())
                cache.retired_young[block] = None
                self._add_chunk(cache, Chunk(BlockKey(block), (block,)))

    def _name_all(self, schema: ChainedKeys, cache: EngineCache, event: BlockStored, report: ApplyReport) -> None:
        """Learn what the event's blocks hold, if it says so for each of them (sliding-window events list only some)."""
        size = event.block_size_tokens
        if not size or len(event.token_ids) // size != len(event.hashes):
            return
        root = event.lora_name or cache.model or ""
        parent = event.parent
        for i, block in enumerate(event.hashes):
            if block not in cache.blocks:
                tokens = event.token_ids[i * size : (i + 1) * size]
                extras = event.extras[i] if event.extras else ()
                known = _chain_end(schema, cache, parent, root)
                if known is None:
                    self._keep_orphan(cache, block, Orphan(parent, tokens, extras), report)
                else:
                    self._name(schema, cache, block, known, tokens, extras, report)
            parent = block

    def _keep_orphan(self, cache: EngineCache, block: EngineHash, orphan: Orphan, report: ApplyReport) -> None:
        known = cache.orphans.get(block)
        if known is not None and known.tokens is not None:
            return
        report.orphaned += known is None
        cache.orphans[block] = orphan
        if orphan.parent is not None:
            cache.children.setdefault(orphan.parent, []).append(block)

    def _name(
        self,
        schema: ChainedKeys,
        cache: EngineCache,
        block: EngineHash,
        after: tuple[ChainEnd, tuple[EngineHash, ...]],
        tokens: array[int],
        extras: Sequence[Extra],
        report: ApplyReport,
    ) -> None:
        """Give a block its keys, then every orphan that waited for it, and for those, and so on."""
        todo = [(block, after, tokens, extras)]
        while todo:
            block, (end, unfinished), tokens, extras = todo.pop()
            orphan = cache.orphans.pop(block, None)
            if orphan is not None:
                report.adopted += 1
                cache.orphans_resident -= block in cache.places
                cache.stop_waiting(block, orphan)
            keys, end = schema.extend(end, tokens, extras)
            parts = (*unfinished, block)
            chunks = [Chunk(key, parts if i == 0 else (block,)) for i, key in enumerate(keys)]
            if keys:
                unfinished = (block,) if end.pending else ()
            else:
                unfinished = parts
            cache.blocks[block] = EngineBlock(end, unfinished)
            if block not in cache.places:
                cache.retired_young[block] = None
            for chunk in chunks:
                self._add_chunk(cache, chunk)
            for child in cache.children.pop(block, ()):
                waiting = cache.orphans[child]
                assert waiting.tokens is not None
                todo.append((child, (end, unfinished), waiting.tokens, waiting.extras))

    def _add_chunk(self, cache: EngineCache, chunk: Chunk) -> None:
        if not cache.has_parts(chunk):
            return  # the key can't be followed
        cache.chunks[chunk.key] = (*cache.chunks.get(chunk.key, ()), chunk)
        for part in chunk.hashes:
            cache.blocks[part].chunks += (chunk,)
        for place in cache.copies:
            self._hold(cache, place, chunk.key, cache.copies_of(place, chunk))

    # -- copies -------------------------------------------------------------------------------------------------------

    def _set_copies(self, cache: EngineCache, place: Place, block: EngineHash, count: int) -> None:
        """Set how many copies of an engine block a place has, and carry the change over to its keys."""
        held = cache.copies[place]
        named = cache.blocks.get(block)
        chunks = named.chunks if named else ()
        before = [cache.copies_of(place, chunk) for chunk in chunks]
        known = block in held
        if count > 0:
            held[block] = count
            if not known:
                cache.orphans_resident += block not in cache.places and block in cache.orphans
                cache.places[block] = cache.places.get(block, 0) + 1
                cache.recall(block)
        elif known:
            del held[block]
            cache.places[block] -= 1
            if not cache.places[block]:
                del cache.places[block]
                cache.orphans_resident -= block in cache.orphans
                self._held_nowhere(cache, block)
        for chunk, had in zip(chunks, before, strict=True):
            self._hold(cache, place, chunk.key, cache.copies_of(place, chunk) - had)

    def _held_nowhere(self, cache: EngineCache, block: EngineHash) -> None:
        if block in cache.blocks:
            cache.retired_young[block] = None
            return
        orphan = cache.orphans.get(block)
        if orphan is not None and orphan.tokens is None:
            del cache.orphans[block]  # nothing is known of it: it could not help anybody

    def _age_retired(self, cache: EngineCache) -> None:
        """When the young generation of retired blocks is full, it becomes the old one, and the old one is forgotten."""
        retired_max = self.limits.retired_max
        if len(cache.retired_young) < max(1, retired_max // 2):
            return
        self._forget(cache, cache.retired_old)
        cache.retired_young, cache.retired_old = cache.retired_old, cache.retired_young
        if len(cache.retired_old) > retired_max:
            self._forget(cache, cache.retired_old)

    def _forget(self, cache: EngineCache, retired: dict[EngineHash, None]) -> None:
        for block in list(retired):
            self._drop_block(cache, block)

    def _hold(self, cache: EngineCache, place: Place, key: BlockKey, change: int) -> None:
        """Change a slot's copies of a key."""
        if change == 0:
            return
        slot = Slot(cache.stream, *place)
        slots = self._holders.setdefault(key, {})
        count = slots.get(slot, 0) + change
        if count > 0:
            self._entries += slot not in slots
            slots[slot] = count
            if change > 0:
                self._touch(key)
                self._promises.keep(key, cache.stream)
            return
        del slots[slot]
        self._entries -= 1
        if not slots:
            del self._holders[key], self._used_s[key]

    def _touch(self, key: BlockKey) -> None:
        self._used_s[key] = self._clock()
        self._used_s.move_to_end(key)

    # -- giving up ----------------------------------------------------------------------------------------------------

    def _drop_block(self, cache: EngineCache, block: EngineHash) -> None:
        """Forget an engine block: its copies, its keys, and that it ever was."""
        for place in list(cache.held_in(block)):
            self._set_copies(cache, place, block, 0)
        named = cache.blocks.get(block)
        for chunk in named.chunks if named else ():
            self._drop_chunk(cache, chunk)
        cache.blocks.pop(block, None)
        cache.recall(block)
        orphan = cache.orphans.pop(block, None)
        if orphan is not None:
            cache.stop_waiting(block, orphan)

    def _drop_chunk(self, cache: EngineCache, chunk: Chunk) -> None:
        for place in cache.copies:
            self._hold(cache, place, chunk.key, -cache.copies_of(place, chunk))
        for part in chunk.hashes:
            cache.blocks[part].chunks = _without(cache.blocks[part].chunks, chunk)
        left = _without(cache.chunks[chunk.key], chunk)
        if left:
            cache.chunks[chunk.key] = left
        else:
            del cache.chunks[chunk.key]

    def _evict(self, key: BlockKey, reason: str) -> None:
        """Evict a key everywhere, and the engine blocks that make up nothing else."""
        self._evicted[reason] += 1
        for cache in {slot.stream: self._caches[slot.stream] for slot in self._holders[key]}.values():
            for chunk in cache.chunks[key]:
                self._drop_chunk(cache, chunk)
                for part in chunk.hashes:
                    if not cache.blocks[part].chunks:
                        self._drop_block(cache, part)

    def _expire(self) -> int:
        now = self._clock()
        self._promises.expire(now)
        evicted = 0
        while self._used_s:
            key, used_s = next(iter(self._used_s.items()))
            if now - used_s < self.limits.ttl_s:
                break
            self._evict(key, "ttl")
            evicted += 1
        return evicted

    def _shrink(self) -> None:
        while len(self._holders) > self.limits.blocks_max:
            self._evict(next(iter(self._used_s)), "size")
        while self._bytes() > self.limits.bytes_max:
            if self._forget_retired() or self._drop_oldest("orphans"):
                continue
            if self._used_s:
                self._evict(next(iter(self._used_s)), "bytes")
            elif not self._drop_oldest("blocks"):  # beginnings of larger index blocks, which have no key yet
                self._promises.give_up_next()

    def _forget_retired(self) -> bool:
        """Forget a generation of retired blocks, the old one first, in the cache that keeps most of them."""
        cache = max(self._caches.values(), key=lambda cache: len(cache.retired_old) + len(cache.retired_young))
        retired = cache.retired_old or cache.retired_young
        forgot = bool(retired)
        self._forget(cache, retired)
        return forgot

    def _drop_oldest(self, waiting: str) -> bool:
        """Give up the oldest block that is kept just in case, in the cache that keeps most of them."""
        cache = max(self._caches.values(), key=lambda cache: len(getattr(cache, waiting)))
        oldest = next(iter(getattr(cache, waiting)), None)
        if oldest is not None:
            self._drop_block(cache, oldest)
        return oldest is not None

    def _bytes(self) -> int:
        return (
            len(self._holders) * KEY_BYTES
            + self._entries * ENTRY_BYTES
            + sum(len(cache.blocks) for cache in self._caches.values()) * ENGINE_BLOCK_BYTES
            + sum(len(cache.orphans) for cache in self._caches.values()) * ORPHAN_BYTES
            + self._promises.records * PROMISE_BYTES
        )

    # -- promises -----------------------------------------------------------------------------------------------------

    def promise(self, stream: Stream, keys: Sequence[BlockKey], ttl_s: float) -> None:
        with self._lock:
            end_s = self._clock() + ttl_s
            for key in keys:
                if not any(slot.stream == stream for slot in self._holders.get(key, ())):
                    self._promises.make(key, stream, end_s)

    # -- read path ----------------------------------------------------------------------------------------------------

    def lookup(self, keys: Sequence[BlockKey], pods: Collection[PodId] | None = None) -> Lookup:
        with self._lock:
            self._expire()
            wanted = None if pods is None else frozenset(pods)
            holders: list[dict[Slot, int]] = []
            promised: list[frozenset[Stream]] = []
            for key in keys:
                slots = self._holders.get(key, {})
                streams = self._promises.of(key)
                if wanted is None:
                    holders.append(dict(slots))
                    promised.append(frozenset(streams))
                else:
                    holders.append({slot: copies for slot, copies in slots.items() if slot.stream.pod in wanted})
                    promised.append(frozenset(stream for stream in streams if stream.pod in wanted))
            for key in reversed(keys):  # the first block last: eviction takes a prefix from its end
                if key in self._used_s:
                    self._touch(key)
            infos = self._infos(wanted)
            for stream in frozenset().union(*promised):
                infos.setdefault(stream, StreamInfo(stream, None, {}, None, 0, 0, None))
            return Lookup(keys, holders, promised, infos)

    def _infos(self, pods: Collection[PodId] | None) -> dict[Stream, StreamInfo]:
        return {
            stream: StreamInfo(
                stream=stream,
                model=cache.model,
                groups=cache.groups,
                stale=cache.stale,
                blocks=len(cache.places),
                orphans=cache.orphans_resident,
                last_event_s=cache.last_event_s,
            )
            for stream, cache in self._caches.items()
            if pods is None or stream.pod in pods
        }

    # -- streams ------------------------------------------------------------------------------------------------------

    def mark(self, stream: Stream, stale: StaleReason | None) -> None:
        with self._lock:
            self._caches.setdefault(stream, EngineCache(stream)).stale = stale

    def drop(self, stream: Stream) -> int:
        with self._lock:
            old = self._caches.get(stream)
            if old is None:
                return 0
            dropped = self._empty(old)
            fresh = EngineCache(stream)
            fresh.model, fresh.stale = old.model, old.stale
            self._caches[stream] = fresh
            return dropped

    def forget(self, stream: Stream) -> int:
        with self._lock:
            cache = self._caches.pop(stream, None)
            return 0 if cache is None else self._empty(cache)

    def _empty(self, cache: EngineCache) -> int:
        before = self._entries
        for place, held in cache.copies.items():
            for block in held:
                named = cache.blocks.get(block)
                for chunk in named.chunks if named else ():
                    slot = Slot(cache.stream, *place)
                    copies = self._holders.get(chunk.key, {}).get(slot)
                    if copies is not None:
                        self._hold(cache, place, chunk.key, -copies)
        return before - self._entries

    def expire(self) -> int:
        with self._lock:
            return self._expire()

    def streams(self) -> Mapping[Stream, StreamInfo]:
        with self._lock:
            return self._infos(None)

    def stats(self) -> IndexStats:
        with self._lock:
            return IndexStats(
                blocks=len(self._holders),
                entries=self._entries,
                orphans=sum(cache.orphans_resident for cache in self._caches.values()),
                speculative=len(self._promises),
                streams=len(self._caches),
                pods=len({stream.pod for stream in self._caches}),
                bytes_estimated=self._bytes(),
                evicted_ttl=self._evicted["ttl"],
                evicted_size=self._evicted["size"],
                evicted_bytes=self._evicted["bytes"],
            )


def _chain_end(
    schema: ChainedKeys, cache: EngineCache, parent: EngineHash | None, root: str
) -> tuple[ChainEnd, tuple[EngineHash, ...]] | None:
    if parent is None:
        return schema.root(root), ()
    block = cache.blocks.get(parent)
    return None if block is None else (block.end, block.unfinished)


def _without(chunks: tuple[Chunk, ...], gone: Chunk) -> tuple[Chunk, ...]:
    return tuple(chunk for chunk in chunks if chunk is not gone)
