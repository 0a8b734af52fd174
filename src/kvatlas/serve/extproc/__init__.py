"""The Envoy ext-proc endpoint picker: Envoy tells of each HTTP request over a gRPC stream, and is told where it goes."""
