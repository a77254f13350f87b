"""Writers: one module a format, and what finds the writer of a name."""
