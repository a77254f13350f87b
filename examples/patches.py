"""Pictures as latents: a fixed, orthonormal transform of small patches, so that the demo needs no trained network.

Each patch of 4 x 4 pixels becomes one latent of 16 channels in three steps, all linear but for the rounding at the end
of the way back:

1. Colours are turned by an orthonormal matrix into a brightness axis (1, 1, 1) and two colour axes (1, 0, -1) and
   (1, -2, 1), as YCbCr does, but without stretching space.
2. Each of the three planes of a patch goes through the orthonormal DCT-II along both axes, as in JPEG.
3. The lowest frequencies stay: u + v <= 3 of brightness (10 channels), u + v <= 1 of either colour (3 each).

The transform is orthonormal: squared errors of latents are squared errors of pixels, so the code that is nearest to a
latent is also the one that looks nearest, and 16 of 48 numbers cost no more than what the dropped frequencies held.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

PATCH = 4
_PEAK = 255.0

_COLOURS = np.array([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])
_COLOURS /= np.linalg.norm(_COLOURS, axis=1, keepdims=True)

_FREQUENCIES = np.arange(PATCH)
_DCT = np.sqrt(2.0 / PATCH) * np.cos(np.pi * (2 * _FREQUENCIES + 1) * _FREQUENCIES[:, None] / (2 * PATCH))
_DCT[0] /= np.sqrt(2.0)

# (3, 4, 4): the frequencies of each plane that are kept; channels follow in C order.
_SUMS = _FREQUENCIES[:, None] + _FREQUENCIES
_KEPT = np.stack([_SUMS <= 3, _SUMS <= 1, _SUMS <= 1])

CHANNELS = int(_KEPT.sum())


def picture_to_latents(picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Return the latents of a picture.

    Args:
        picture: (H, W, 3) RGB; H and W are cut to multiples of 4.

    Returns:
        (1, 16, H // 4, W // 4) float32.
    """
    h, w = picture.shape[0] // PATCH, picture.shape[1] // PATCH
    pixels = picture[: h * PATCH, : w * PATCH].astype(np.float64) / _PEAK - 0.5
    patches = pixels.reshape(h, PATCH, w, PATCH, 3)
    planes: npt.NDArray[np.float64] = np.einsum("ui,vj,pc,yixjc->puvyx", _DCT, _DCT, _COLOURS, patches, optimize=True)
    return np.ascontiguousarray(planes[_KEPT][None], dtype=np.float32)


def latents_to_picture(latents: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    """Return the picture (H, W, 3) RGB of latents (1, 16, H // 4, W // 4); dropped frequencies are zero."""
    _, _, h, w = latents.shape
    planes = np.zeros((*_KEPT.shape, h, w))
    planes[_KEPT] = latents[0]
    patches = np.einsum("ui,vj,pc,puvyx->yixjc", _DCT, _DCT, _COLOURS, planes, optimize=True)
    pixels: npt.NDArray[np.float64] = (patches.reshape(h * PATCH, w * PATCH, 3) + 0.5) * _PEAK
    return np.clip(np.rint(pixels), 0, _PEAK).astype(np.uint8)


def psnr_db(original: npt.NDArray[np.uint8], copy: npt.NDArray[np.uint8]) -> float:
    """Return the peak signal-to-noise ratio in dB: infinite for equal pictures."""
    mean_squared_error = float(np.mean((original.astype(np.float64) - copy) ** 2))
    return float(10 * np.log10(_PEAK**2 / mean_squared_error)) if mean_squared_error else float("inf")
