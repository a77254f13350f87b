"""A load generator: `vqserve bench`, and `measure` for any gRPC method that takes and gives bytes."""

from typing import TYPE_CHECKING

from vqserve.renamed import renamed
from vqserve_bench.load import ClosedLoop, OpenLoop
from vqserve_bench.measure import measure
from vqserve_bench.measurement import Latency, Measurement, Server
from vqserve_bench.request import Request
from vqserve_bench.schedule import Schedule
from vqserve_bench.served import decode_stats, encode_stats

if TYPE_CHECKING:
    Closed = ClosedLoop
    Open = OpenLoop
else:
    __getattr__ = renamed(__name__, Closed=ClosedLoop, Open=OpenLoop)

__all__ = [
    "ClosedLoop",
    "Latency",
    "Measurement",
    "OpenLoop",
    "Request",
    "Schedule",
    "Server",
    "decode_stats",
    "encode_stats",
    "measure",
]
