"""What the endpoint picker is held against: the plainest ext_proc server, gRPC's threaded one, that sends all to one engine.

python -m benchmarks.sides.extproc_stub IP:PORT    prints its port; ends with its standard input
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc

from kvatlas.proto.envoy.service.ext_proc.v3 import external_processor_pb2_grpc
from kvatlas.proto.envoy.service.ext_proc.v3.external_processor_pb2 import ProcessingRequest, ProcessingResponse

THREADS = 64


class Stub(external_processor_pb2_grpc.ExternalProcessorServicer):
    """Reads nothing of the body."""

    def __init__(self, engine: str) -> None:
        self._engine = engine.encode()

    def Process(  # noqa: N802  # gRPC's name
        self, requests: Iterator[ProcessingRequest], _context: object
    ) -> Iterator[ProcessingResponse]:
        body = b""
        for message in requests:
            if message.HasField("request_body"):
                body += message.request_body.body
                if message.request_body.end_of_stream:
                    yield self._head()
                    reply = ProcessingResponse()
                    piece = reply.request_body.response.body_mutation.streamed_response
                    piece.body, piece.end_of_stream = body, True
                    yield reply

    def _head(self) -> ProcessingResponse:
        reply = ProcessingResponse()
        common = reply.request_headers.response
        common.clear_route_cache = True
        option = common.header_mutation.set_headers.add(append_action=2)
        option.header.key, option.header.raw_value = "x-gateway-destination-endpoint", self._engine
        return reply


if __name__ == "__main__":
    server = grpc.server(ThreadPoolExecutor(THREADS))
    external_processor_pb2_grpc.add_ExternalProcessorServicer_to_server(Stub(sys.argv[1]), server)
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    sys.stdin.read()
    server.stop(0)
