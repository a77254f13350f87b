"""Reading of untrusted files (.npy, .npz, .safetensors, torch files) as named arrays.

No pickle is ever run: numpy files are read with allow_pickle=False, torch files with weights_only=True. Every size that
a file claims is compared with the size of its data, or with a limit, before memory is allocated.
"""

from vqserve_tools.importing.files.foreign_array import UNNAMED, ForeignArray
from vqserve_tools.importing.files.opening import open_foreign

__all__ = ["UNNAMED", "ForeignArray", "open_foreign"]
