"""Reading of untrusted files (.npy, .npz, .safetensors, torch files) as named arrays.

No pickle is ever run: numpy files are read with allow_pickle=False, and the pickles in torch files are read as data by
an interpreter that imports and calls nothing (unpickler.py). Every size that a file claims is compared with the size of
its data, or with a limit, before memory is allocated.
"""

from vqserve_tools.importing.files.foreign_array import UNNAMED, ForeignArray
from vqserve_tools.importing.files.opening import open_foreign

__all__ = ["UNNAMED", "ForeignArray", "open_foreign"]
