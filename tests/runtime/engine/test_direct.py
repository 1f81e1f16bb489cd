"""PyTorch's operators in forms that write into given tensors: the same results, nothing made beside them, unused
outputs left out.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from tightfit.runtime.engine.cpu import direct
from tightfit.runtime.engine.cpu.cpu import KERNELS
from tightfit.runtime.engine.kernels.compiled import compile_operator

aten = torch.ops.aten
ONE = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)


def images(
    side: int, kernel: int = 1, stride: int = 1, inputs: int = 6, outputs: int = 10, **where: Any
) -> tuple[list[Any], Tensor]:
    """(arguments of a convolution, a gradient of its result)."""
    torch.manual_seed(0)
    x = torch.randn(3, inputs, side, side).contiguous(**where)
    weight, bias = torch.randn(outputs, inputs, kernel, kernel), torch.randn(outputs)
    arguments = [x, weight, bias, [stride, stride], [kernel // 2] * 2, *ONE[2:]]
    return arguments, torch.randn_like(aten.convolution.default(*arguments))


CASES = {
    "of points": {"side": 16},
    "of few points": {"side": 3},
    "of every second point": {"side": 33, "stride": 2},
    "of every second of few points": {"side": 8, "stride": 2},
    "of three by three": {"side": 16, "kernel": 3},
    "with channels last": {"side": 16, "memory_format": torch.channels_last},
    "of every second point with channels last": {"side": 9, "stride": 2, "memory_format": torch.channels_last},
    "of one channel last": {"side": 16, "inputs": 1, "memory_format": torch.channels_last},
    "of three by three with channels last": {"side": 16, "kernel": 3, "memory_format": torch.channels_last},
}


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_convolutions_and_their_gradients(case: str, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "PART_BYTES", 2 * 4 * 16 * 16 * 16)  # two of three samples of 16 x 16
    arguments, dy = images(**CASES[case])
    if not biased:
        arguments[2] = None
    wanted = aten.convolution.default(*arguments)
    made = torch.full_like(wanted, torch.nan)
    direct.convolution(*arguments, out=[made])
    torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-5)
    x, weight, _, *others = arguments
    told = [dy, x, weight, [len(weight)], *others, [True, True, biased]]
    due = aten.convolution_backward.default(*told)
    found = [one if one is None else torch.full_like(one, torch.nan) for one in due]
    direct.convolution_backward(*told, out=found)
    for one, other in zip(found, due, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_of_points_makes_nothing_beside_its_results(
    order: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's own, which makes a tensor, is not called; gradients that are not wanted are left out."""
    arguments, dy = images(16, memory_format=order)
    due = aten.convolution_backward.default(dy, arguments[0], arguments[1], None, *ONE, [True, True, False])
    monkeypatch.setattr(direct, "aten", SimpleNamespace())
    y, dx, dweight = torch.empty_like(dy), torch.empty_like(due[0]), torch.empty_like(due[1])
    direct.convolution(*arguments, out=[y])
    for out in ([dx, None, None], [None, dweight, None]):
        direct.convolution_backward(dy, arguments[0], arguments[1], None, *ONE, [True, True, False], out=out)
    torch.testing.assert_close(dx, due[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dweight, due[1], rtol=1e-5, atol=1e-4)


def test_convolutions_take_a_few_samples_at_a_time_where_the_weights_are_small() -> None:
    x, small, large = torch.empty(9, 64, 56, 56), torch.empty(64, 64, 3, 3), torch.empty(4096, 64, 3, 3)
    assert [part.stop - part.start for part in direct._parts(x, small, x)] == [5, 4]
    assert [part.stop for part in direct._parts(x, large, x)] == [9]


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("weighted", [True, False])
def test_the_gradient_of_batch_norm(
    weighted: bool, order: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a batch far from zero, with no tensor beside its results, beside autograd in double precision."""
    monkeypatch.setattr(direct, "PART_BYTES", 0)
    torch.manual_seed(0)
    x, dy = (one.contiguous(memory_format=order) for one in (100 + torch.randn(4, 3, 5, 6), torch.randn(4, 3, 5, 6)))
    weight = torch.rand(3)
    exact = [one.double().requires_grad_() for one in (x, weight if weighted else torch.ones(3), torch.zeros(3))]
    y = torch.nn.functional.batch_norm(exact[0], None, None, exact[1], exact[2], training=True)
    due = torch.autograd.grad(y, exact, dy.double())
    mean, rstd = x.mean((0, 2, 3)), (x.var((0, 2, 3), unbiased=False) + 1e-5).rsqrt()
    made = [torch.full_like(one, torch.nan, dtype=torch.float32) for one in due]
    arguments = [dy, x, weight if weighted else None, None, None, mean, rstd, True, 1e-5, [True, True, True]]
    sums = Mock(wraps=aten.native_batch_norm_backward.default)
    monkeypatch.setattr(direct, "aten", SimpleNamespace(native_batch_norm_backward=SimpleNamespace(default=sums)))
    direct.batch_norm_backward(*arguments, out=made)
    assert [call.args[-1] for call in sums.call_args_list] == [[False, True, True]]
    for one, other in zip(made, due, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-4, atol=1e-4)
    monkeypatch.undo()
    monkeypatch.setattr(direct, "PART_BYTES", 1 << 20)
    again = [torch.empty_like(made[0]), None, None]
    direct.batch_norm_backward(*arguments, out=again)
    torch.testing.assert_close(again[0], made[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", ["max", "avg"])
def test_gradients_of_pooling_read_no_more_of_the_images_than_their_shape(
    kind: str, order: torch.memory_format
) -> None:
    x = torch.randn(2, 3, 6, 8).contiguous(memory_format=order).requires_grad_()
    if kind == "max":
        y, *indices = torch.nn.functional.max_pool2d_with_indices(x, 2)
        settings: list[Any] = [[2, 2], [2, 2], [0, 0], [1, 1], False, *indices]
    else:
        y = torch.nn.functional.avg_pool2d(x, 2)
        settings = [[2, 2], [2, 2], [0, 0], False, True, None]
    dy = torch.randn_like(y)
    (due,) = torch.autograd.grad(y, x, dy)
    made = torch.full_like(x, torch.nan).detach()
    name = {"max": "max_pool2d_with_indices", "avg": "avg_pool2d"}[kind]
    direct.DIRECT[f"aten.{name}_backward.default"](dy, torch.zeros(()).expand(x.shape), *settings, out=[made])
    assert torch.equal(made, due)


def test_relu_is_pytorchs_to_the_bit() -> None:
    x = torch.tensor([-1.5, -0.0, 0.0, 2.0, torch.nan, torch.inf, -torch.inf])
    made = torch.empty_like(x)
    direct.relu(x, out=[made])
    assert torch.equal(made.view(torch.int32), torch.relu(x).view(torch.int32))


@pytest.mark.parametrize("target", ["mm", "addmm", "bmm", "baddbmm"])
def test_products_of_float32_are_those_of_float32(target: str) -> None:
    """With operands rounded to bfloat16 the error would be a thousand times as large."""
    torch.manual_seed(0)
    shape = (2,) if "b" in target else ()
    left, right, addend = torch.randn(*shape, 33, 256), torch.randn(*shape, 256, 65), torch.randn(*shape, 33, 65)
    given = (
        {"left": left, "right": right} if target in ("mm", "bmm") else {"addend": addend, "left": left, "right": right}
    )
    values = {
        name: {"name": name, "shape": list(one.shape), "stride": list(one.stride()), "dtype": "float32"}
        for name, one in (given | {"made": addend}).items()
    }
    operands = [
        {"operand": {"value": name, "size": values[name]["shape"], "stride": values[name]["stride"]}} for name in given
    ]
    kwargs = {} if target in ("mm", "bmm") else {"alpha": 0.5, "beta": 2.0}
    before = torch._C._get_fp32_precision_getter("mkldnn", "matmul")
    exact = left.double() @ right.double()
    exact = exact * 0.5 + addend.double() * 2 if kwargs else exact
    for copied in (False, True):
        operator = {
            "target": f"aten.{target}.default",
            "args": operands,
            "kwargs": kwargs,
            "outputs": ["made"],
            "copied": copied,
        }
        compiled = compile_operator(operator, values, KERNELS)
        assert compiled.functional == copied
        made = torch.empty_like(addend)
        compiled.run(given, [made])
        assert float((made - exact).abs().max()) < 1e-4
    assert torch._C._get_fp32_precision_getter("mkldnn", "matmul") == before
