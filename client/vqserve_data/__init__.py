"""Sets of arrays on disk and in object stores: what reads them item by item, and what writes them.

Knows nothing of servers and codebooks. The client's bulk jobs and the training tools stand on it.
"""

# What a user may name, for the help of commands, which import no reader for it.
SOURCES_HELP = "files, folders, globs or URLs of .npy, .npz, .safetensors, .pt, tars, Parquet, Arrow, HDF5 and Zarr"
