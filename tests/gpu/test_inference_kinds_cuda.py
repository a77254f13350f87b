"""The kinds that only infer, on a GPU: the CPU's tokens and latents, bit for bit."""

from __future__ import annotations

import pytest
import torch

from vqserve_server.quantizers import (
    CosineQuantizer,
    DotQuantizer,
    FiniteScalarQuantizer,
    LookupFreeQuantizer,
    Quantizer,
    ResidualFiniteScalarQuantizer,
    ResidualQuantizer,
    freeze,
)
from vqserve_server.quantizers.fsq_boundaries import boundaries
from vqserve_server.quantizers.inference.first_bound import Curve, FirstBound

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]

DEVICE = "cuda"
KINDS = {
    "cosine": lambda: CosineQuantizer(512, 12),
    "cosine_all": lambda: CosineQuantizer(512, 6, True, input_dim=12, output_dim=5),
    "dot": lambda: DotQuantizer(512, 12),
    "fsq": lambda: FiniteScalarQuantizer([8, 5, 4, 3, 2, 2, 2, 2, 2, 2, 2, 2]),
    "fsq_projected": lambda: FiniteScalarQuantizer([8, 8, 8, 5, 5, 5], "tan", input_dim=12, output_dim=12),
    "lfq": lambda: LookupFreeQuantizer(12, "big"),
    "lfq_projected": lambda: LookupFreeQuantizer(18, "little", spherical=True, input_dim=12, output_dim=7),
    "rvq": lambda: ResidualQuantizer(8, 512, 12),
    "rvq_grouped": lambda: ResidualQuantizer(8, 512, 6, groups=2),
    "rvq_dac": lambda: ResidualQuantizer(9, 512, 8, 12, "cosine", stage_projections=True),
    "rvq_mimi": lambda: ResidualQuantizer(8, 512, 6, 12, inner_dim=6, first_quantizers=1),
    "rvq_sizes": lambda: ResidualQuantizer(4, [4096, 512, 7, 512], 12),
    "rvq_unitok": lambda: ResidualQuantizer(3, [512, 300, 512], 4, 12, "cosine", decode_normalized=True, groups=3),
    "rvq_normalized_residuals": lambda: ResidualQuantizer(4, 512, 12, normalize_residuals=True),
    "rvq_double": lambda: ResidualQuantizer(4, 512, 12).double(),
    "residual_fsq": lambda: ResidualFiniteScalarQuantizer([2, 3, 4, 5, 6, 7] * 2, 4, "symmetric", "levels_minus_one"),
    "residual_fsq_x_codec": lambda: ResidualFiniteScalarQuantizer(
        [4] * 8, 1, "atanh_twice", "levels_minus_one", input_dim=12, output_dim=12
    ),
    "residual_fsq_grouped": lambda: ResidualFiniteScalarQuantizer(
        [17, 8, 5, 5], 8, "soft_clamp", "levels", groups=2, input_dim=12, output_dim=8
    ),
}


@pytest.fixture(params=KINDS)
def quantizer(request) -> Quantizer:
    torch.manual_seed(0)
    made = KINDS[request.param]()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(70, 12), (2, 12, 50), (2, 12, 8, 9)])
def test_encode_and_decode_are_the_cpu_s(quantizer, dtype, shape):
    quantizer.layout = "channels_first"
    z = torch.randn(shape).to(dtype)
    indices = quantizer.encode(z)
    decoded = quantizer.decode(indices)
    quantizer.to(DEVICE)
    got = quantizer.encode(z.to(DEVICE))
    assert got.device.type == DEVICE
    assert torch.equal(got.cpu(), indices)
    assert torch.equal(quantizer.decode(got).cpu(), decoded)


def test_frozen_rows_are_the_cpu_s(quantizer):
    rows = torch.randn(3000, 12)
    on_cpu, on_gpu = freeze(quantizer, device="cpu"), freeze(quantizer, device=DEVICE)
    for count in {1, (quantizer.num_quantizers + 1) // 2, quantizer.num_quantizers}:
        indices = on_cpu.encode_rows(rows, num_quantizers=count)
        assert torch.equal(on_gpu.encode_rows(rows.to(DEVICE), num_quantizers=count).cpu(), indices)
        assert torch.equal(on_gpu.decode_rows(indices.to(DEVICE)).cpu(), on_cpu.decode_rows(indices))


def test_the_numbers_around_every_boundary():
    levels = [2, 3, 4, 5, 6, 7, 8, 16]
    for level in levels:
        edges = torch.from_numpy(boundaries(level, "atanh"))
        near = torch.cat([edges, torch.nextafter(edges, edges + 1), torch.nextafter(edges, edges - 1)])[:, None]
        quantizer = FiniteScalarQuantizer([level])
        for z in (near, near.float()):
            assert torch.equal(quantizer.encode(z.to(DEVICE)).cpu(), quantizer.encode(z))


@pytest.mark.parametrize("curve", [Curve.of_fsq(2), Curve.of_fsq(5), Curve.of_fsq(8), Curve.of_soft_clamp(4)])
def test_the_bound_before_the_first_stage_of_residual_fsq(curve):
    z = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.tensor([0.0, -3.0])
    z[:8, 0] = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e30, -1e30, 64.0, 3e-39])
    for numbers in (z, z.double() * 1.1):
        on_cpu = FirstBound.of([curve, curve], torch.device("cpu"))(numbers)
        on_gpu = FirstBound.of([curve, curve], torch.device(DEVICE))(numbers.to(DEVICE))
        assert torch.equal(on_gpu.cpu().view(torch.int32), on_cpu.view(torch.int32))
