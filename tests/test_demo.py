"""`make demo`: its script end to end, its assets, its patch transform."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

import vqserve_server
from vqserve_server.codebooks import load_codebook

ROOT = Path(__file__).parents[1]
ASSETS = Path(vqserve_server.__file__).parent / "assets"


@pytest.fixture(scope="module")
def patches() -> ModuleType:
    spec = importlib.util.spec_from_file_location("patches", ROOT / "examples" / "patches.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_demo_runs_end_to_end() -> None:
    result = subprocess.run(
        [sys.executable, ROOT / "examples" / "demo.py"], capture_output=True, text=True, check=False, timeout=240
    )
    assert result.returncode == 0, result.stderr
    quality = re.search(r"PSNR (\d+\.\d+) dB", result.stdout)
    assert quality is not None
    assert float(quality[1]) >= 28
    for promised in ("ready on 127.0.0.1:", "0.75 bits per pixel", "round trip ", "the same tokens", "exit code 0"):
        assert promised in result.stdout
    with Image.open(ASSETS / "demo.png") as original, Image.open(ROOT / "out" / "demo.png") as pair:
        assert pair.size == (2 * original.width + 8, original.height)
        left = np.asarray(pair.convert("RGB"))[:, : original.width]
        np.testing.assert_array_equal(left, np.asarray(original.convert("RGB")))


def test_the_committed_picture_is_what_the_demo_makes() -> None:
    # Not byte for byte: another Pillow may compress otherwise.
    with Image.open(ROOT / "docs" / "demo.png") as committed, Image.open(ASSETS / "demo.png") as original:
        pixels = np.asarray(committed.convert("RGB")).astype(float)
        width = original.width
        np.testing.assert_array_equal(pixels[:, :width], np.asarray(original.convert("RGB")))
    assert 10 * np.log10(255**2 / np.mean((pixels[:, :width] - pixels[:, width + 8 :]) ** 2)) >= 28
    assert (ROOT / "docs" / "demo.png").stat().st_size < 300_000


def test_the_demo_codebook_is_small_and_says_how_it_was_made() -> None:
    path = ASSETS / "demo.safetensors"
    assert path.stat().st_size < 1_000_000
    codebook = load_codebook(path)
    assert (codebook.quantizer.num_codes, codebook.quantizer.input_dim) == (4096, 16)
    assert set(codebook.provenance["pictures"]) == {"astronaut.png", "coffee.png"}
    assert codebook.provenance["quality"]["used_codes"] > 4000


def test_the_transform_keeps_pictures_of_low_frequency(patches: ModuleType) -> None:
    ramp = np.linspace(60, 200, 32)[:, None, None] + np.linspace(-20, 20, 24)[:, None] + np.array([0.0, 8.0, -8.0])
    picture = np.rint(ramp).astype(np.uint8)
    latents = patches.picture_to_latents(picture)
    assert (latents.shape, latents.dtype) == ((1, 16, 8, 6), np.float32)
    assert latents.flags.c_contiguous
    assert patches.psnr_db(picture, patches.latents_to_picture(latents)) > 45


def test_the_transform_is_orthonormal(patches: ModuleType) -> None:
    # The picture of each single channel has the energy of that channel, and pictures of two are orthogonal. Zero
    # itself lies between two pixel values, and is rounded.
    units = np.eye(16, dtype=np.float32).reshape(16, 1, 16, 1, 1)
    grey, *pictures = (patches.latents_to_picture(latents).astype(float) for latents in [0 * units[0], *units])
    waves = (np.stack(pictures) - grey).reshape(16, -1) / 255
    np.testing.assert_allclose(waves @ waves.T, np.eye(16), atol=5e-2)


def test_the_transform_cuts_what_is_no_whole_patch(patches: ModuleType) -> None:
    picture = np.random.default_rng(0).integers(0, 256, size=(11, 14, 3), dtype=np.uint8)
    np.testing.assert_array_equal(patches.picture_to_latents(picture), patches.picture_to_latents(picture[:8, :12]))


def test_equal_pictures_are_infinitely_alike(patches: ModuleType) -> None:
    picture = np.zeros((4, 4, 3), np.uint8)
    assert patches.psnr_db(picture, picture) == float("inf")
    assert patches.psnr_db(picture, picture + 255) == 0.0
