"""Quantizers prepared for serving: they never change, so everything is prepared once."""
