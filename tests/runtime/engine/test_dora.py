"""The operators of DoRA against float64 and PyTorch autograd, and the memory that they take."""

import pytest
import torch
from largest_storage import LargestStorage

from tightfit.profiles.tracing.dora_ops import dora_norm as traced_norm
from tightfit.profiles.tracing.dora_ops import dora_scale as traced_scale
from tightfit.runtime.engine.cpu.dora import (
    BLOCK_ELEMENTS,
    dora_norm,
    dora_scale,
    dora_scale_backward,
    norm_scratch,
    scale_scratch,
)

SHAPES = [(5, 7), (700, 900), (3, BLOCK_ELEMENTS + 1)]
"""rows and columns: one block; several, the last not full; rows that are larger than a block"""
HALF_ULP = {torch.float32: 2e-6, torch.bfloat16: 4e-3}


def norms(weight, a, b, scale):
    made = torch.empty(len(weight))
    dora_norm(weight, a, b, scale, out=(made, torch.empty(norm_scratch(*weight.shape))))
    return made


def tensors(rows, columns, dtype, rank=4):
    generator = torch.Generator().manual_seed(rows)
    weight = (torch.randn(rows, columns, generator=generator) * 0.1).to(dtype)
    return weight, torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_norms_are_those_of_the_sum(shape, dtype):
    weight, a, b = tensors(*shape, dtype)
    norm = norms(weight, a, b, 0.3)
    exact = torch.linalg.norm(weight.double() + 0.3 * (b.double() @ a.double()), dim=1)
    torch.testing.assert_close(norm.double(), exact, rtol=2e-6 if shape[1] < 1000 else 4e-6, atol=0)


def test_norms_hold_where_the_pair_cancels_the_weight():
    """A norm that is a ten-thousandth of the weight's: ||W||² + 2 s W·(B A) + s² ||B A||² has no digit left there."""
    _, a, b = tensors(64, 300, torch.float32)
    weight = -0.5 * (b @ a) + 1e-4 * torch.randn(64, 300, generator=torch.Generator().manual_seed(1))
    norm = norms(weight, a, b, 0.5)
    exact = torch.linalg.norm(weight.double() + 0.5 * (b.double() @ a.double()), dim=1)
    assert float((exact / torch.linalg.norm(weight.double(), dim=1)).max()) < 1e-3
    torch.testing.assert_close(norm.double(), exact, rtol=1e-3, atol=0)
    square = weight.square().sum(1) + ((weight @ a.t()) * b).sum(1) + 0.25 * ((b @ (a @ a.t())) * b).sum(1)
    assert float((square.clamp(min=0).sqrt() / exact - 1).abs().max()) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pair_of_zeros_leaves_the_bits_of_the_weight_s_own_norms(dtype):
    """Training starts from norms that are taken of some rows at a time: the first quotients have to be 1."""
    weight, a, b = tensors(700, 900, dtype)
    whole = norms(weight, a, torch.zeros_like(b), 2.0)
    parts = [norms(part, torch.zeros(1, 900), torch.zeros(len(part), 1), 1.0) for part in weight.split(128)]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_scaled_products_and_their_gradients(bias, dtype):
    generator = torch.Generator().manual_seed(0)
    z, dy = (torch.randn(500, 700, generator=generator).to(dtype) for _ in range(2))
    magnitude, norm, added = (torch.rand(700, generator=generator) + 0.5 for _ in range(3))
    exact_z, exact_m = (x.double().requires_grad_() for x in (z, magnitude))
    exact = exact_z * (exact_m / norm.double()) + (added.double() if bias else 0.0)
    exact.backward(dy.double())
    y, dz, dm = torch.empty_like(z), torch.empty_like(z), torch.empty(700)
    scratch = [torch.empty(scale_scratch(500, 700, dtype, backward=backward)) for backward in (False, True)]
    dora_scale(z, magnitude, norm, added if bias else None, out=(y, scratch[0]))
    dora_scale_backward(dy, z, magnitude, norm, out=(dz, dm, scratch[1]))
    tolerance = HALF_ULP[dtype]
    torch.testing.assert_close(y.double(), exact.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(dz.double(), exact_z.grad, rtol=tolerance, atol=tolerance)
    assert dm.dtype is torch.float32
    torch.testing.assert_close(dm.double(), exact_m.grad, rtol=1e-5, atol=1e-4)


def test_quotients_of_one_leave_a_product_as_it_is():
    z, norm = torch.randn(40, 30).bfloat16(), torch.rand(30) + 0.1
    y = torch.empty_like(z)
    dora_scale(z, norm, norm, None, out=(y, torch.empty(scale_scratch(40, 30, z.dtype, backward=False))))
    assert torch.equal(y, z)


def test_gradients_go_to_product_and_magnitude_and_not_through_the_norm():
    weight, a, b = tensors(6, 5, torch.float32)
    a.requires_grad_()
    b.requires_grad_()
    z, magnitude = torch.randn(4, 6, requires_grad=True), torch.rand(6, requires_grad=True)
    norm, _ = traced_norm(weight, a, b, 2.0)
    assert not norm.requires_grad
    y, _ = traced_scale(z, magnitude, norm, torch.ones(6))
    y.square().sum().backward()
    ours = z.grad.clone(), magnitude.grad.clone()
    z.grad = magnitude.grad = None
    (z * (magnitude / norm) + 1.0).square().sum().backward()
    torch.testing.assert_close(ours, (z.grad, magnitude.grad))
    assert a.grad is None
    assert b.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_temporary_is_larger_than_a_row_and_no_scratch_than_its_blocks(dtype):
    weight, a, b = tensors(4000, 300, dtype)
    norm = torch.empty(4000)
    z, dz, dm = torch.zeros(300, 4000, dtype=dtype), torch.zeros(300, 4000, dtype=dtype), torch.empty(4000)
    assert min(weight.numel(), z.numel()) > 4 * BLOCK_ELEMENTS
    scratch = [torch.empty(norm_scratch(4000, 300))]
    scratch += [torch.empty(scale_scratch(300, 4000, dtype, backward=backward)) for backward in (False, True)]
    assert max(one.numel() for one in scratch) <= 2 * BLOCK_ELEMENTS
    with LargestStorage((weight, a, b, norm, z, dz, dm, *scratch)) as largest:
        dora_norm(weight, a, b, 1.0, out=(norm, scratch[0]))
        dora_scale(z, norm, norm, None, out=(dz, scratch[1]))
        dora_scale_backward(dz, z, norm, norm, out=(dz, dm, scratch[2]))
    assert 0 < largest.elements <= 4000
