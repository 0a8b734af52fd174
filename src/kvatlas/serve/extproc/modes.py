"""How Envoy's filter sends bodies, and what that means for when a request can be decided.

Source: Envoy's processing_mode.proto and external_processor.proto.
"""

from __future__ import annotations

import enum

from kvatlas.errors import KvatlasError
from kvatlas.proto.envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from kvatlas.proto.envoy.service.ext_proc.v3.external_processor_pb2 import ProcessingRequest


class ProtocolError(KvatlasError):
    """Envoy sent what it should not, or is configured for what cannot be served. The stream fails, with this text."""


class Bodies(enum.Enum):
    """How a request's body comes, and how it is answered."""

    DUPLEX = enum.auto()
    """All is held until the body is complete; then headers and body are sent back. What Envoy should be configured for."""
    COUNTED = enum.auto()
    """STREAMED without waiting for headers: the same, but each piece is answered by one message."""
    BUFFERED = enum.auto()
    """Headers are let pass, the body comes in one piece, and the answer to it carries the decision."""
    UNSEEN = enum.auto()
    """Headers have to be answered before the body comes, or it never comes: decided without it."""


_UNUSABLE = frozenset({ProcessingMode.BUFFERED_PARTIAL, ProcessingMode.GRPC})


def request_bodies(first: ProcessingRequest) -> Bodies:
    """Return how bodies of requests come. An Envoy that does not say (before 1.33) is taken to be configured as it should be.

    Raises ProtocolError for modes that give no whole body.
    """
    if not first.HasField("protocol_config"):
        return Bodies.DUPLEX
    mode = first.protocol_config.request_body_mode
    if mode in _UNUSABLE:
        name = ProcessingMode.BodySendMode.Name(mode)
        raise ProtocolError(f"request_body_mode {name} does not give whole bodies; configure FULL_DUPLEX_STREAMED")
    if mode == ProcessingMode.FULL_DUPLEX_STREAMED:
        return Bodies.DUPLEX
    if mode == ProcessingMode.BUFFERED:
        return Bodies.BUFFERED
    if mode == ProcessingMode.STREAMED and first.protocol_config.send_body_without_waiting_for_header_response:
        return Bodies.COUNTED
    return Bodies.UNSEEN


class Answers(enum.Enum):
    """How the body of the engine's answer comes."""

    DUPLEX = enum.auto()
    """Each piece is sent back."""
    WATCHED = enum.auto()
    """Each piece is let pass."""
    UNSEEN = enum.auto()


def answer_bodies(first: ProcessingRequest) -> Answers:
    """Return how bodies of answers come."""
    if not first.HasField("protocol_config"):
        return Answers.DUPLEX
    mode = first.protocol_config.response_body_mode
    if mode == ProcessingMode.NONE:
        return Answers.UNSEEN
    return Answers.DUPLEX if mode == ProcessingMode.FULL_DUPLEX_STREAMED else Answers.WATCHED
