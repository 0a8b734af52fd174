"""Settings of tokenization: where tokenizers are, what prefix stores hold, how long a request waits, who is asked elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from kvatlas.config.kinds import Capacity, Limit, Wait
from kvatlas.config.layers import Secret
from kvatlas.config.quantities import Bytes, Seconds


class RendererSettings(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """vLLM's render endpoints, which tokenize as the engine itself does (``vllm launch render``, or an engine with
    ``--enable-scale-out``; without that, ``/tokenize``)."""

    endpoints: Annotated[
        tuple[Annotated[str, Meta(pattern=r"https?://\S+")], ...],
        Meta(
            description="Where renderers answer. The first one that works is asked, the others are for when it fails.",
            extra={"allowed": 'addresses such as "http://10.0.0.7:8000"'},
        ),
    ] = ()
    token: Annotated[Secret | None, Meta(description="Bearer token for them.")] = None
    timeout: Annotated[Wait, Meta(description="Longest time of a call.")] = Seconds(2)
    calls_max: Annotated[Limit, Meta(description="Calls in progress; further ones wait within their time.")] = 16
    failures_max: Annotated[Limit, Meta(description="Failures in a row after which an endpoint is left alone.")] = 5
    retry_after: Annotated[Wait, Meta(description="How long it is left alone before one call tries it again.")] = Seconds(10)
    answer_bytes_max: Annotated[Capacity, Meta(description="A longer answer counts as a failure.")] = Bytes(64 << 20)


class TokenServiceSettings(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """A tokenization service over gRPC: `kvatlas tokenizer`, or llm-d's."""

    address: Annotated[
        str | None,
        Meta(
            description="Where it listens.",
            pattern=r"unix:\S+|[^\s:/]+:[0-9]{1,5}|\[[0-9a-fA-F:.]+\]:[0-9]{1,5}",
            extra={"allowed": '"unix:///run/kvatlas/tokenizer.sock" or "127.0.0.1:50052"'},
        ),
    ] = None
    token: Annotated[Secret | None, Meta(description="Bearer token for it.")] = None
    ca_file: Annotated[str | None, Meta(description="PEM certificates to check it by; without them the call is in clear.")] = (
        None
    )
    timeout: Annotated[Wait, Meta(description="Longest time of a call.")] = Seconds(2)
    calls_max: Annotated[Limit, Meta(description="Calls in progress; further ones wait within their time.")] = 16
    failures_max: Annotated[Limit, Meta(description="Failures in a row after which it is left alone.")] = 5
    retry_after: Annotated[Wait, Meta(description="How long it is left alone before one call tries it again.")] = Seconds(10)


class PrefixStoreSettings(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """Tokens of text prefixes that were seen before, so that a chat's next turn costs what is new in it."""

    kind: Annotated[
        Literal["segments", "trie", "chunks", "none"],
        Meta(
            description=(
                "segments: words and whatever lies between two seams, in the native core; as trie without it, and for "
                "tokenizers that it does not read. trie: a prefix tree, to the character; chunks: hashed pieces of text, less "
                "memory; none."
            )
        ),
    ] = "segments"
    bytes_max: Annotated[
        Annotated[Bytes, Meta(ge=1 << 20)], Meta(description="Estimated memory of each; beyond it the least recently used go.")
    ] = Bytes(256 << 20)
    chunk_chars: Annotated[int, Meta(ge=16, le=65536, description="Characters of one chunk.")] = 256


class TokenSettings(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """From text and chats to token ids."""

    models: Annotated[
        Mapping[str, str],
        Meta(description="Tokenizers of models: served name to a directory, or to a name in one of the directories."),
    ] = msgspec.field(default_factory=dict)
    directories: Annotated[
        tuple[str, ...],
        Meta(description="Where tokenizers are looked for: a Hugging Face cache, or directories nested as models are named."),
    ] = ()
    hub: Annotated[bool, Meta(description="Fetch tokenizers that are not found from the Hugging Face hub.")] = False
    revisions: Annotated[
        Mapping[str, str], Meta(description="Revision by model: a branch, tag or commit. By default main.")
    ] = msgspec.field(default_factory=dict)
    loaded_max: Annotated[Limit, Meta(description="Tokenizers kept loaded; beyond it the least recently used goes.")] = 8
    max_model_len: Annotated[
        Mapping[str, int],
        Meta(description="Tokens that engines of a model take (--max-model-len); by default what its config.json says."),
    ] = msgspec.field(default_factory=dict)
    chat_templates: Annotated[
        Mapping[str, str], Meta(description="Chat template files by model, where engines run with --chat-template.")
    ] = msgspec.field(default_factory=dict)
    trust_request_template: Annotated[
        bool, Meta(description="Use chat templates that come with requests (as vLLM's --trust-request-chat-template).")
    ] = False
    text_chars_max: Annotated[Limit, Meta(description="A longer text, or chat as text, is refused.")] = 8 << 20
    store: PrefixStoreSettings = PrefixStoreSettings()
    policy: Annotated[
        Literal["exact", "stored", "within"],
        Meta(
            description=(
                "Which tokens a request waits for. exact: all. stored: those of a known prefix; the rest is tokenized for "
                "later. within: all within the budget, else those of a known prefix."
            )
        ),
    ] = "exact"
    budget: Annotated[Wait, Meta(description="How long the policy within waits.")] = Seconds(0.02)
    timeout: Annotated[Wait, Meta(description="Longest wait for tokens.")] = Seconds(5)
    workers: Annotated[int, Meta(ge=1, le=256, description="Threads that tokenize.")] = 4
    queue_max: Annotated[Limit, Meta(description="Prompts that wait for a worker; beyond it they are refused.")] = 1024
    renderer: RendererSettings = RendererSettings()
    service: TokenServiceSettings = TokenServiceSettings()

    @property
    def configured(self) -> bool:
        """Whether there is anything to tokenize with."""
        here = self.models or self.directories or self.hub
        return bool(here or self.renderer.endpoints or self.service.address)
