"""What llm-d reads of requests, and sets on them. Source: llm-d-router, ``requesthandling`` and ``requestcontrol``."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from kvatlas.route.inert.plugin import Inert
from kvatlas.route.parameters import GoDuration


class BodyParser(Inert):
    """Reads the request bodies of an API, or passes them on unread."""

    done_by = "the front doors, which know a body by its path, and pass on unread what they don't know"


class Resolution(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Pixels."""

    width: int = 0
    height: int = 0


class StaticImage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    static_token: int = 0


class Factor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    factor: int = 0


class ImageEstimate(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    mode: Literal["", "dynamic", "static"] = ""
    default_resolution: Resolution | None = None
    static: StaticImage | None = None
    dynamic: Factor | None = None


class StaticFrame(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    num_tokens_per_frame: int = 0


class FrameTokens(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    mode: Literal["", "dynamic", "static"] = ""
    static: StaticFrame | None = None
    dynamic: Factor | None = None


class SampledFrames(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    sample_fps: float = msgspec.field(default=0.0, name="sampleFPS")
    temporal_patch_size: int = 0


class StridedFrames(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    default_source_fps: float = msgspec.field(default=0.0, name="defaultSourceFPS")
    frame_stride: int = 0


class Frames(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    mode: Literal["", "sampled", "strided"] = ""
    min_frames: int = 0
    max_frames: int = 0
    sampled: SampledFrames | None = None
    strided: StridedFrames | None = None


class VideoEstimate(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    default_resolution: Resolution | None = None
    default_duration: float = 0.0
    """Seconds."""
    tokens_per_frame: FrameTokens | None = None
    frames: Frames | None = None
    max_video_tokens: int = 0


class Estimate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Tokens guessed from bytes."""

    image: ImageEstimate | None = None
    video: VideoEstimate | None = None


class Renderer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """A vLLM that tokenizes for others."""

    url: Annotated[str, msgspec.Meta(pattern=r"^https?://\S+$")] = "http://localhost:8000"
    timeout: GoDuration = GoDuration(5.0)
    mm_timeout: GoDuration = GoDuration(30.0)
    """Where images, audio or video have to be fetched."""


class TokenizerSocket(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """A TokenizationService."""

    socket_file: str = ""
    """Empty: nobody is asked. With ``use_tcp``: ``host:port``."""
    use_tcp: bool = msgspec.field(default=False, name="useTCP")
    model_tokenizer_map: dict[str, str] = {}


class TokenProducer(Inert):
    """Finds the tokens of a request."""

    class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
        model_name: str = ""
        vllm: Renderer | None = None
        estimate: Estimate | None = None
        uds_tokenizer_config: TokenizerSocket | None = None

        def __post_init__(self) -> None:
            if self.estimate is not None and (self.vllm is not None or self.uds_tokenizer_config is not None):
                raise ValueError("estimate: excludes other backends; allowed: one of vllm, estimate, udsTokenizerConfig")

        @property
        def service_address(self) -> str | None:
            """Where a TokenizationService is asked; None: nowhere."""
            service = self.uds_tokenizer_config
            if service is None or not service.socket_file:
                return None
            return service.socket_file if service.use_tcp else f"unix://{service.socket_file}"

        @property
        def asked_renderer(self) -> Renderer | None:
            """The renderer that is asked: as it is written, or for a model's name alone the default one."""
            return self.vllm or (Renderer() if self.model_name else None)

    adopted = frozenset({"modelName", "vllm", "udsTokenizerConfig"})
    done_by = "the front doors, with the backends in the section `tokens` of kvatlas' own settings"


class InflightLoadProducer(Inert):
    """Counts what is in flight at each endpoint."""

    class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
        add_estimated_output_tokens: bool = False
        output_ratio: Annotated[float, msgspec.Meta(ge=0)] | None = None
        max_estimated_output_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None
        matches_of: str = msgspec.field(default="", name="prefixMatchInfoProducerName")
        """Without effect, and no reason to have that producer: what the decision goes by counts."""
        sync_cross_replica_state: bool | None = None

    done_by = "the router, which counts the prompts of all requests that go through it (LoadBook)"


class DisaggHeadersHandler(Inert):
    """Sets x-prefiller-host-port and x-encoder-hosts-ports."""

    class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
        prefill_profile: str = "prefill"
        encode_profile: str = "encode"

    done_by = "the front doors, from the decision"


class SessionIdProducer(Inert):
    """Finds the id of a request's session."""

    class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
        header_name: str = ""
        cookie_name: str = ""

    done_by = "session-affinity-scorer and session-affinity-filter, which read headers themselves"
