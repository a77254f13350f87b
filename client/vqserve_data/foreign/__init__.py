"""Files of torch from strangers, read by an interpreter of pickles that runs nothing (docs/strangers-files.md)."""
