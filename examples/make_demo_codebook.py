"""Make the bundled demo codebook anew, from photographs that ship inside a PyPI package.

    .venv/bin/python -m pip install scikit-image==0.26.0
    .venv/bin/python examples/make_demo_codebook.py

The photographs are read as files of that package. Two of them train the codebook; the demo picture, a third, takes no
part in it. server/vqserve_server/assets/README.md names their licences.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
from patches import PATCH, picture_to_latents
from PIL import Image

from vqserve_tools.training.job import train_file
from vqserve_tools.training.options import TrainingOptions

ASSETS = Path(__file__).parents[1] / "server" / "vqserve_server" / "assets"
PACKAGE = "scikit-image"
VERSION = "0.26.0"
TRAINING_PICTURES = {"astronaut.png": "NASA, public domain", "coffee.png": "Rachel Michetti, CC0"}
DEMO_PICTURE = "chelsea.png"
DEMO_BOX = (56, 16, 408, 288)  # left, top, right, bottom: the cat's face, in whole patches

# Two photographs hold few colours and much contrast; softer copies fill the space between with patches of soft light.
CONTRASTS = (1.0, 0.6, 0.4)
SATURATION = 0.7
OPTIONS = TrainingOptions(num_codes=4096, steps=120, decay=0.97, seed=0, device="cpu")


def main() -> int:
    """Write demo.safetensors and demo.png; return the exit status."""
    parser = argparse.ArgumentParser(description="Make the bundled demo codebook and picture anew.")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder to write to (default: %(default)s)")
    out: Path = parser.parse_args().out
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        print(f"the photographs are missing: pip install {PACKAGE}=={VERSION}", file=sys.stderr)
        return 1
    if version(PACKAGE) != VERSION:
        print(f"warning: {PACKAGE} is {version(PACKAGE)}, the codebook was made with {VERSION}", file=sys.stderr)
    photographs = Path(package.origin).parent / "data"

    with Image.open(photographs / DEMO_PICTURE) as cat:
        cat.convert("RGB").crop(DEMO_BOX).save(out / "demo.png", optimize=True)

    rows = np.concatenate([training_rows(read_picture(photographs / name)) for name in TRAINING_PICTURES])
    with tempfile.TemporaryDirectory() as folder:
        latents = Path(folder) / "demo-latents.npy"
        np.save(latents, rows)
        made = train_file(
            [str(latents)],
            out / "demo.safetensors",
            OPTIONS,
            force=True,
            progress=True,
            notes={
                "pictures": TRAINING_PICTURES,
                "pictures_from": f"{PACKAGE} {version(PACKAGE)}",
                "transform": "examples/patches.py",
                "variants": "mirrored, turned, shifted by half a patch",
                "contrasts": list(CONTRASTS),
                "saturation": SATURATION,
            },
        )
    quality = made.trained.quality
    print(f"{len(rows)} training patches: mean squared error {quality.mean_squared_error:.3g},")
    print(f"perplexity {quality.perplexity:.0f}, {quality.used_codes} of {OPTIONS.num_codes} codes used")
    return 0


def read_picture(path: Path) -> npt.NDArray[np.uint8]:
    """Return a picture file as (H, W, 3) RGB."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def training_rows(picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Return the latents of all variants of a picture, (n, 16)."""
    latents = [picture_to_latents(variant)[0] for variant in variants(picture)]
    return np.concatenate([grid.reshape(len(grid), -1).T for grid in latents])


def variants(picture: npt.NDArray[np.uint8]) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield a picture mirrored and turned, in several contrasts, on two grids of patches."""
    grey = picture.mean(axis=2, keepdims=True)
    for contrast in CONTRASTS:
        soft = (grey + SATURATION * (picture - grey) - 127.5) * contrast + 127.5
        soft_picture = np.clip(np.rint(soft), 0, 255).astype(np.uint8)
        for turned in (soft_picture, soft_picture.transpose(1, 0, 2)):
            for mirrored in (turned, turned[:, ::-1], turned[::-1], turned[::-1, ::-1]):
                for shift in (0, PATCH // 2):
                    yield mirrored[shift:, shift:]


if __name__ == "__main__":
    sys.exit(main())
