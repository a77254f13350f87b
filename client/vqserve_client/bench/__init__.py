"""A load generator: `vqserve bench`, and `measure` for any gRPC method that takes and gives bytes."""

from vqserve_client.bench.load import Closed, Open
from vqserve_client.bench.measure import measure
from vqserve_client.bench.measurement import Latency, Measurement, Server
from vqserve_client.bench.request import Request
from vqserve_client.bench.schedule import Schedule
from vqserve_client.bench.served import decode_stats, encode_stats

__all__ = [
    "Closed",
    "Latency",
    "Measurement",
    "Open",
    "Request",
    "Schedule",
    "Server",
    "decode_stats",
    "encode_stats",
    "measure",
]
