"""The inexact searches that people use today, each as a function from rows to indices."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection

import numpy as np
import torch

Search = Callable[[torch.Tensor], object]
# A peer that needs a larger matrix than this is not run.
MAX_MATRIX_BYTES = 2 << 30


def translation(codes: torch.Tensor) -> Search:
    """The quantizers' own line: the whole distance matrix, then argmin."""

    def search(rows: torch.Tensor) -> torch.Tensor:
        d = (rows**2).sum(1, keepdim=True) + (codes**2).sum(1) - 2 * rows @ codes.T
        return d.argmin(1)

    return search


def tiled(codes: torch.Tensor) -> Search:
    """The same in tiles that stay in cache, without the row's own norm."""
    half, transposed = 0.5 * (codes**2).sum(1), codes.T.contiguous()
    step = max(16, (1 << 19) // len(codes)) if codes.device.type == "cpu" else max(16, (1 << 26) // len(codes))

    def search(rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.addmm(half, part, transposed, alpha=-1).argmin(1) for part in rows.split(step)])

    return search


def compiled(codes: torch.Tensor) -> Search:
    """torch.compile of the translation, for any number of rows: compiled once."""
    return torch.compile(translation(codes), dynamic=True)


def faiss_flat(codes: torch.Tensor, blas_threshold: int) -> Search:
    """FAISS's exhaustive index; the threshold chooses between its fused and its BLAS kernel."""
    import faiss

    index = faiss.IndexFlatL2(codes.shape[1])
    index.add(codes.numpy())

    def search(rows: torch.Tensor) -> np.ndarray:
        faiss.cvar.distance_compute_blas_threshold = blas_threshold
        return index.search(rows.numpy(), 1)[1]

    return search


def k_d_tree(codes: torch.Tensor) -> Search:
    """SciPy's k-d tree on all cores."""
    from scipy.spatial import cKDTree

    tree = cKDTree(codes.numpy())
    return lambda rows: tree.query(rows.numpy(), workers=-1 if len(rows) > 256 else 1)[1]


def cuvs_brute_force(codes: torch.Tensor) -> Search:
    """RAPIDS cuVS, exhaustive."""
    from cuvs.neighbors import brute_force

    index = brute_force.build(codes)
    return lambda rows: brute_force.search(index, rows, 1)[1]


def faiss_on_gpu(codes: torch.Tensor) -> Search:
    """FAISS's exhaustive index in the GPU's memory; rows and results stay there."""
    import faiss
    import faiss.contrib.torch_utils

    if not hasattr(faiss, "StandardGpuResources"):
        raise ImportError("this faiss was built without CUDA")
    resources = faiss.StandardGpuResources()
    index = faiss.GpuIndexFlatL2(resources, codes.shape[1])
    index.add(codes)

    def search(rows: torch.Tensor) -> object:
        return resources, index.search(rows, 1)[1]

    return search


def flash_kmeans(codes: torch.Tensor) -> Search:
    """The assignment step of flash-kmeans: a Triton kernel that computes products of float32 in TensorFloat-32."""
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    needs_norms = "x_sq" in inspect.signature(euclid_assign_triton).parameters

    def search(rows: torch.Tensor) -> object:
        norms = {"x_sq": (rows**2).sum(1)[None]} if needs_norms else {}
        return euclid_assign_triton(rows[None], codes[None], **norms)

    return search


def peers(codes: torch.Tensor, names: Collection[str] | None = None) -> dict[str, Search]:
    """Return what can run on the codes' device, by name; of these names only, if there are any."""
    found: dict[str, Search] = {"translation": translation(codes), "torch tiled": tiled(codes)}
    optional: dict[str, Callable[[], Search]] = {}
    if codes.device.type == "cuda":
        optional = {
            "torch.compile": lambda: compiled(codes),
            "flash-kmeans": lambda: flash_kmeans(codes),
            "cuVS": lambda: cuvs_brute_force(codes),
            "FAISS on the GPU": lambda: faiss_on_gpu(codes),
        }
    else:
        # 20 is FAISS's default; the other keeps its fused kernel at every size.
        optional = {"FAISS": lambda: faiss_flat(codes, 20), "FAISS fused": lambda: faiss_flat(codes, 1)}
        if codes.shape[1] <= 8:
            optional["k-d tree"] = lambda: k_d_tree(codes)
    if names is not None:
        found = {name: search for name, search in found.items() if name in names}
        optional = {name: make for name, make in optional.items() if name in names}
    for name, make in optional.items():
        try:
            found[name] = make()
        except ImportError as error:
            print(f"{name} does not run here: {error}")
    return found
