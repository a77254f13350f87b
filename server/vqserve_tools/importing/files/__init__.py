"""Reading of untrusted files (.npy, .npz, .safetensors, torch files) and folders of them as named arrays.

No pickle is ever run: numpy files are read with allow_pickle=False, and the pickles in torch files are read as data by
an interpreter that imports and calls nothing (unpickler.py). Every size that a file claims is compared with the size of
its data, or with a limit, before memory is allocated.
"""

from vqserve_data.foreign.foreign_array import UNNAMED, ForeignArray
from vqserve_tools.importing.files.opening import open_foreign
from vqserve_tools.importing.files.weights import Weights, check_whole, has_one_model, weights_of

__all__ = ["UNNAMED", "ForeignArray", "Weights", "check_whole", "has_one_model", "open_foreign", "weights_of"]
