"""gRPC over HTTP/2 for many short streams: a server of the few hundred lines that this needs, at a fraction of grpc's cost.

``frames.py``: bytes of frames; ``headers.py``: header blocks; ``connection.py``: one connection's state, bytes in and events
out, no IO; ``calls.py``: gRPC messages over its streams; ``server.py``: sockets. Sources: RFC 9113 (HTTP/2), RFC 7541 (HPACK),
gRPC over HTTP/2 (PROTOCOL-HTTP2.md).
"""
