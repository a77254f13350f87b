"""A load generator: `vqserve bench`, and `measure` for any gRPC method that takes and gives bytes."""

from vqserve_bench.load import Closed, Open
from vqserve_bench.measure import measure
from vqserve_bench.measurement import Latency, Measurement, Server
from vqserve_bench.request import Request
from vqserve_bench.schedule import Schedule
from vqserve_bench.served import decode_stats, encode_stats

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
