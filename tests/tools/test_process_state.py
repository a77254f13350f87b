"""What a process may have set around an import or a training changes no byte of the codebook file."""

from __future__ import annotations

import numpy as np
import pytest

from libraries.comparison import import_golden
from libraries.golden import Golden
from make_foreign import FOREIGN
from support.process_state import STATES
from vqserve_server.codebooks import save_codebook
from vqserve_tools.latents.array import ArrayRows
from vqserve_tools.training.options import TrainingOptions
from vqserve_tools.training.trainer import train

# Several dtypes, projections, weight norm, sums that are divided, a matrix that is multiplied out.
FAMILIES = ["taming_gumbel", "dac", "mimi", "lucidrains_simvq", "lucidrains_fsq", "lucidrains_grouped_rvq"]


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("state", STATES)
def test_import(tmp_path, state, family):
    golden = Golden.load(FOREIGN / f"{family}.npz")
    for folder in ("usual", "inside"):
        (tmp_path / folder).mkdir()
    usual = import_golden(golden, tmp_path / "usual")
    with STATES[state]():
        inside = import_golden(golden, tmp_path / "inside")
    assert inside.read_bytes() == usual.read_bytes()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("kind", ["vq", "ema"])
@pytest.mark.parametrize("state", STATES)
def test_train(tmp_path, state, kind):
    np.save(tmp_path / "latents.npy", np.random.default_rng(0).normal(size=(500, 4)).astype(np.float32))
    options = TrainingOptions(num_codes=16, kind=kind, steps=20, batch_size=100, device="cpu")
    files = [tmp_path / "usual.safetensors", tmp_path / "inside.safetensors"]
    save_codebook(train(ArrayRows.open(tmp_path / "latents.npy"), options).quantizer, files[0])
    with STATES[state]():
        quantizer = train(ArrayRows.open(tmp_path / "latents.npy"), options).quantizer
        save_codebook(quantizer, files[1])
    assert files[0].read_bytes() == files[1].read_bytes()
