"""The gRPC edge: messages to jobs, errors to statuses. No torch."""

from vqserve_server.rpc.server import RpcServer

__all__ = ["RpcServer"]
