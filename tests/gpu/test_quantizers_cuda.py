"""The quantizers on a GPU: the CPU's tokens and rows, and nothing that waits for the device without need."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from vqserve_server.errors import IndexOutOfRange, NonFiniteLatents
from vqserve_server.quantizers import (
    AbstractQuantizer,
    EMAVectorQuantizer,
    GumbelQuantizer,
    VectorQuantizer,
    VectorQuantizerWithInputProjection,
    freeze,
    measure_perplexity,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]

DEVICE = "cuda"
K = 512
USED = [9, 3, 400, 3, 0, 511]
REMAPS = [{}, {"remap": USED}, {"remap": USED, "unknown_index": "extra"}, {"remap": USED, "unknown_index": 1000}]
SHAPES = {2: (70, 12), 3: (2, 50, 12), 4: (2, 12, 8, 9), 5: (2, 12, 3, 4, 5)}


@pytest.fixture(params=["vq", "vq_weight_norm", "ema", "gumbel", "vq_projection"])
def make(request):
    def build(**arguments) -> AbstractQuantizer:
        torch.manual_seed(0)
        if request.param == "ema":
            return EMAVectorQuantizer(K, 12, 0.25, **arguments)
        if request.param == "gumbel":
            return GumbelQuantizer(12, 6, K, **arguments)
        if request.param == "vq_projection":
            return VectorQuantizerWithInputProjection(12, K, 6, output_dim=5, **arguments)
        return VectorQuantizer(K, 12, embedding_weight_norm=request.param == "vq_weight_norm", **arguments)

    return build


@pytest.mark.parametrize("arguments", REMAPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_encode_and_decode_are_the_cpu_s_bit_for_bit(make, arguments, dtype):
    module = make(**arguments)
    latents = [torch.randn(shape).to(dtype) for shape in SHAPES.values()]
    expected = [module.encode(z) for z in latents]
    positions = torch.arange(module.decodable)
    rows, entries = module.decode(positions), module.get_codebook_entry(positions)
    module.to(DEVICE)
    for z, indices in zip(latents, expected, strict=True):
        got = module.encode(z.to(DEVICE))
        assert got.device.type == DEVICE
        assert torch.equal(got.cpu(), indices)
    assert torch.equal(module.decode(positions.to(DEVICE)).cpu(), rows)
    assert torch.equal(module.get_codebook_entry(positions.to(DEVICE)).cpu(), entries)


@pytest.mark.parametrize("arguments", REMAPS)
def test_frozen_rows_are_the_cpu_s_bit_for_bit(make, arguments):
    module = make(**arguments)
    rows = torch.randn(300, 12)
    on_cpu = freeze(module, device="cpu")
    for source in (module, make(**arguments).to(DEVICE)):
        frozen = freeze(source, device=DEVICE)
        assert torch.equal(frozen.encode_rows(rows.to(DEVICE)).cpu(), on_cpu.encode_rows(rows))
        positions = torch.arange(frozen.decodable)
        for output in ("latents", "code_rows"):
            for narrower in (torch.float16, torch.bfloat16):
                rounded = frozen.decode_rows(positions.to(DEVICE), output=output, dtype=narrower)
                assert torch.equal(rounded.cpu(), on_cpu.decode_rows(positions, output=output, dtype=narrower))
            got = frozen.decode_rows(positions.to(DEVICE), output=output)
            assert got.device.type == DEVICE
            assert torch.equal(got.cpu(), on_cpu.decode_rows(positions, output=output))


def test_forward_and_gradients_are_the_cpu_s(make):
    module = make().eval()
    if isinstance(module, GumbelQuantizer):
        pytest.skip("its noise comes from the device's own generator: see the test below")
    z = torch.randn(SHAPES[4])
    results = []
    for device in ("cpu", DEVICE):
        module.to(device).zero_grad()
        latents = z.to(device).requires_grad_()
        z_q, info = module(latents)
        (z_q.square().sum() + info["loss/vq"]).backward()
        gradients = [value.grad.cpu() for value in (latents, *module.parameters()) if value.grad is not None]
        indices = info.get("min_encoding_indices", info.get("encoding_indices"))
        results.append((z_q.detach().cpu(), info["loss/vq"].detach().cpu(), indices.cpu(), gradients))
    (cpu_z_q, cpu_loss, cpu_indices, cpu_gradients), (z_q, loss, indices, gradients) = results
    assert torch.equal(indices, cpu_indices)
    torch.testing.assert_close(z_q, cpu_z_q, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss, cpu_loss)
    torch.testing.assert_close(gradients, cpu_gradients, rtol=1e-3, atol=1e-3)


def test_gumbel_draws_what_torch_draws_on_the_device():
    torch.manual_seed(0)
    module = GumbelQuantizer(12, 6, K).to(DEVICE).train()
    z = torch.randn(SHAPES[4], device=DEVICE)
    torch.manual_seed(7)
    z_q, info = module(z, temp=0.8)
    torch.manual_seed(7)
    y = functional.gumbel_softmax(module.proj(z), 0.8, hard=True, dim=1)
    assert torch.equal(info["indices"], y.argmax(dim=1))
    torch.testing.assert_close(z_q, torch.einsum("bkhw,kd->bdhw", y, module.embed.weight), rtol=1e-3, atol=1e-3)


def test_an_ema_step_is_the_cpu_s_and_nan_skips_it():
    torch.manual_seed(0)
    module = EMAVectorQuantizer(K, 12, 0.25).train()
    z = torch.randn(SHAPES[4])
    states = []
    for device in ("cpu", DEVICE):
        copy = EMAVectorQuantizer(K, 12, 0.25).to(device).train()
        copy.load_state_dict(module.state_dict())
        for _ in range(2):
            copy(z.to(device))
        states.append({name: value.cpu() for name, value in copy.state_dict().items()})
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-4)
    broken = z.to(DEVICE)
    broken[1, 3, 2, 1] = float("nan")
    before = {name: value.clone() for name, value in copy.state_dict().items()}
    copy(broken)
    assert all(torch.equal(value, before[name]) for name, value in copy.state_dict().items())


def test_the_ema_update_and_perplexity_do_not_wait_for_the_device():
    module = EMAVectorQuantizer(K, 12, 0.25).to(DEVICE)
    rows, ids = torch.randn(100, 12, device=DEVICE), torch.randint(0, K, (100,), device=DEVICE)
    rows[3, 2] = float("inf")
    torch.cuda.set_sync_debug_mode("error")
    try:
        module.embedding.update_from(rows, ids)
        measure_perplexity(ids, K)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_perplexity_of_ids_out_of_range_is_nan():
    perplexity, _ = measure_perplexity(torch.tensor([0, K], device=DEVICE), K)
    assert torch.isnan(perplexity)
    perplexity, in_use = measure_perplexity(torch.arange(K, device=DEVICE), K)
    assert abs(perplexity.item() - K) < 0.01
    assert in_use.item() == K


@pytest.mark.parametrize("value", [-1, K, 2**40])
def test_an_index_out_of_range_is_rejected_before_the_gather(make, value):
    # A gather out of range would end the process's use of the GPU.
    module = make().to(DEVICE)
    indices = torch.tensor([0, value], device=DEVICE)
    for verb in (module.decode, module.get_codebook_entry, module.remap_to_used, module.unmap_to_all):
        with pytest.raises(IndexOutOfRange, match=rf"indices\[1\] is {value}"):
            verb(indices)
    torch.cuda.synchronize()


def test_latents_that_are_not_finite_are_named(make):
    z = torch.randn(SHAPES[4])
    z[1, 3, 2, 1] = float("nan")
    with pytest.raises(NonFiniteLatents, match=r"latents\[1, 3, 2, 1\] is nan"):
        make().to(DEVICE).encode(z.to(DEVICE))


def test_autocast_changes_no_token(make):
    for dtype in (torch.float16, torch.bfloat16):
        module = make().to(DEVICE).train()
        z = torch.randn(SHAPES[4], device=DEVICE)
        indices = module.encode(z)
        with torch.autocast(DEVICE, dtype=dtype):
            assert torch.equal(module.encode(z), indices)
            assert module.decode(indices).dtype == torch.float32
            assert torch.isfinite(module(z)[1]["loss/vq"])


def test_random_draws_are_those_of_the_cpu_s_generator(make):
    module = make(remap=USED)
    ids = torch.arange(K)
    torch.manual_seed(5)
    expected = module.remap_to_used(ids)
    torch.manual_seed(5)
    assert torch.equal(module.to(DEVICE).remap_to_used(ids.to(DEVICE)).cpu(), expected)


def test_a_state_dict_crosses_devices(make):
    source, target = make(remap=USED, unknown_index="extra"), make(unknown_index="extra").to(DEVICE)
    target.load_state_dict(source.state_dict())
    assert target.used.device.type == DEVICE
    z = torch.randn(SHAPES[4])
    assert torch.equal(target.encode(z.to(DEVICE)).cpu(), source.encode(z))
    target.cpu()
    assert torch.equal(target.encode(z), source.encode(z))
