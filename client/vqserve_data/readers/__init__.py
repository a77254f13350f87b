"""Readers: one module a format, and what finds the reader of a file."""
