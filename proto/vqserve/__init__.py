"""The wire contract of vqserve: what client and server both know, with numpy and protobuf only."""

__version__ = "0.1.0"
