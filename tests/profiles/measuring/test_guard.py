"""Operators write their outputs and nothing else: those that would not are found when they are measured, and run
another way.
"""

from __future__ import annotations

import ctypes
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tightfit.profiles.measuring.guard import OutputGuard
from tightfit.profiles.measuring.worker import ScratchStores, settle_operators
from tightfit.profiles.schema import Layer
from tightfit.profiles.tracing.trace import trace
from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.engine.cpu.cpu import Cpu
from tightfit.runtime.engine.cpu.operators import OPERATORS
from tightfit.runtime.engine.device.meter import Meter
from tightfit.runtime.engine.training.executor import bind
from tightfit.runtime.engine.training.job import program_headers

N, CLASSES = 300, 7  # 2,100 elements: beyond what fits into the guards beside an output


def signs(*shape: int) -> Tensor:
    return torch.where(torch.rand(*shape) > 0.5, 1.0, -1.0)


def probabilities(*shape: int) -> Tensor:
    return torch.rand(*shape) * 0.9 + 0.05


def labels() -> Tensor:
    return torch.randint(0, CLASSES, (N,))


def features() -> Tensor:
    return torch.randn(N, CLASSES)


LOSSES: dict[str, list[Any]] = {
    "L1Loss": [features],
    "MSELoss": [features],
    "SmoothL1Loss": [features],
    "HuberLoss": [features],
    "SoftMarginLoss": [lambda: signs(N, CLASSES)],
    "KLDivLoss": [lambda: probabilities(N, CLASSES)],
    "BCELoss": [lambda: probabilities(N, CLASSES)],
    "BCEWithLogitsLoss": [lambda: probabilities(N, CLASSES)],
    "PoissonNLLLoss": [lambda: torch.rand(N, CLASSES) * 3],
    "GaussianNLLLoss": [features, lambda: probabilities(N, CLASSES)],
    "HingeEmbeddingLoss": [lambda: signs(N, CLASSES)],
    "MultiLabelSoftMarginLoss": [lambda: torch.randint(0, 2, (N, CLASSES)).float()],
    "MultiLabelMarginLoss": [lambda: torch.stack([torch.randperm(CLASSES) for _ in range(N)])],
    "MultiMarginLoss": [labels],
    "NLLLoss": [labels],
    "CrossEntropyLoss": [labels],
    "CosineEmbeddingLoss": [features, lambda: signs(N)],
    "MarginRankingLoss": [features, lambda: signs(N, CLASSES)],
    "TripletMarginLoss": [features, features],
    "TripletMarginWithDistanceLoss": [features, features],
}
"""class -> what makes its arguments behind the input"""
ELSEWHERE = {"CTCLoss", "LinearCrossEntropyLoss", "NLLLoss2d"}
"""CTCLoss sizes its workspace by the lengths that it is given and is refused, the second is a layer too, the third
another name
"""


def test_every_loss_of_torch_is_tried():
    found = {
        name
        for name, kind in vars(nn.modules.loss).items()
        if inspect.isclass(kind) and issubclass(kind, nn.modules.loss._Loss) and not name.startswith("_")
    }
    assert found - ELSEWHERE == set(LOSSES)


class Losing(nn.Module):
    """The sum of some losses of the same class."""

    def __init__(self, *losses: nn.Module) -> None:
        super().__init__()
        self.linear, self.losses = nn.Linear(CLASSES, CLASSES), nn.ModuleList(losses)

    def forward(self, x: Tensor, *targets: Tensor) -> Tensor:
        made = self.linear(x)
        # Inputs of these have to be logarithms of probabilities, or probabilities.
        if isinstance(self.losses[0], nn.NLLLoss | nn.KLDivLoss):
            made = made.log_softmax(1)
        if isinstance(self.losses[0], nn.BCELoss):
            made = made.sigmoid()
        return sum(loss(made, *targets) for loss in self.losses)


def run_in_an_arena(
    layers: list[Layer], programs: list[dict[str, Any]], tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """One forward and backward, every tensor in one arena, one right behind the other and nothing behind the last."""
    headers = {program["name"]: program for program in programs}
    names: dict[str, Tensor] = dict(tensors)
    for phase, order in (("forward", layers), ("backward", layers[::-1])):
        for layer in order:
            program = headers[layer.program]
            values = {value["name"]: value for value in program["values"]}
            sizes = {n: -(-v["bytes"] // 64) * 64 for n, v in values.items()}
            arena = Cpu(sum(sizes.values()), Meter(1 << 60))
            where, end = {}, 0
            for name in sorted(sizes, key=lambda name: sizes[name], reverse=True):  # small ones last
                where[name], end = end, end + sizes[name]
            place = {name: index for index, name in enumerate(values)}
            slots = {}
            for name, value in values.items():
                whole = arena.window(value["dtype"])(
                    where[name], value["bytes"] // getattr(torch, value["dtype"]).itemsize
                )
                slots[place[name]] = whole.as_strided(value["shape"], value["stride"])
                known = names.get(layer.bindings.get(name, f"{layer.name}/{name}"))
                if known is not None:
                    slots[place[name]].copy_(known)
            for operator, bound in zip(
                program["operators"], *bind(json.loads(json.dumps(program_headers([program]))), arena, None)
            ):
                if operator["phase"] != phase:
                    continue
                for read in bound.reads:
                    read.move(slots[bound.tensors[read.place]].data_ptr() - arena.address)
                bound.call([None if name is None else slots[place[name]] for name in operator["outputs"]])
                for name in filter(None, operator["outputs"]):
                    names[layer.bindings.get(name, f"{layer.name}/{name}")] = slots[place[name]].clone()
    return names


@pytest.mark.slow_but_for("CrossEntropyLoss", "BCELoss", "KLDivLoss", "NLLLoss")
@pytest.mark.filterwarnings("ignore:reduction")  # KLDivLoss of what its mean is
@pytest.mark.parametrize("kind", LOSSES)
def test_losses_and_their_gradients_are_pytorch_s(kind, tmp_path):
    torch.manual_seed(0)
    check_losses([getattr(nn, kind)(reduction=reduction) for reduction in ("mean", "sum")], LOSSES[kind], tmp_path)


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="this torch has none")
def test_the_loss_with_a_layer_of_its_own(tmp_path):
    torch.manual_seed(0)
    loss = nn.LinearCrossEntropyLoss(CLASSES, CLASSES)
    check_losses([loss], [labels], tmp_path)


@pytest.mark.slow
def test_a_loss_whose_shapes_depend_on_lengths_is_refused():
    lengths = {
        "targets": torch.randint(1, CLASSES, (4, 5)),
        "inputs": torch.full((4,), 12),
        "ends": torch.full((4,), 5),
    }
    with pytest.raises(
        InputError, match=r"Losing cannot be traced .*what follows depends on the values of tensors \(aten\._ctc_loss"
    ):
        trace(Losing(nn.CTCLoss()), {"x": torch.randn(12, 4, CLASSES)} | lengths)


def check_losses(losses: list[nn.Module], makers: list[Any], tmp_path: Path) -> None:
    module = Losing(*losses)
    batch = {"x": features()} | {f"y{i}": make() for i, make in enumerate(makers)}
    traced = trace(module, batch)
    programs = [program.model_dump() for program in traced.programs]
    guard = OutputGuard()
    with torch.no_grad():
        for program in programs:
            settle_operators(program, guard, ScratchStores(tmp_path))
        made = run_in_an_arena(traced.layers, programs, dict(module.named_parameters()) | batch)
    loss = module(*batch.values())
    loss.backward()
    torch.testing.assert_close(made[traced.loss], loss.detach())
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(made[f"grad:{name}"], parameter.grad)


def value(name: str, *shape: int) -> dict[str, Any]:
    stride = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        stride[axis] = stride[axis + 1] * shape[axis + 1]
    return {"name": name, "shape": list(shape), "stride": stride, "dtype": "float32", "kind": "activation"}


def operator(target: str, values: dict[str, Any], *args: Any) -> dict[str, Any]:
    def operand(argument: Any) -> Any:
        if not isinstance(argument, str):
            return argument
        own = values[argument]
        return {"operand": {"value": argument, "size": own["shape"], "stride": own["stride"], "offset": 0}}

    return {
        "target": target,
        "args": [operand(argument) for argument in args],
        "kwargs": {},
        "inputs": [argument for argument in args if isinstance(argument, str)],
        "outputs": ["out"],
        "gathers": [],
    }


@pytest.mark.parametrize("elements", [50, 5000])  # within the guard behind the output, and beyond it
def test_an_out_variant_that_needs_room_is_found(elements):
    values = {"x": value("x", elements), "y": value("y", elements), "out": value("out")}
    x, y = torch.rand(elements), torch.rand(elements)
    tensors = {"x": x, "y": y, "out": torch.tensor(0.0)}
    assert OutputGuard().check(operator("aten.binary_cross_entropy.default", values, "x", "y"), values, tensors)
    torch.testing.assert_close(tensors["out"], nn.functional.binary_cross_entropy(x, y))
    values["out"], tensors["out"] = value("out", elements), torch.empty(elements)
    assert not OutputGuard().check(operator("aten.mul.Tensor", values, "x", "y"), values, tensors)
    assert torch.equal(tensors["out"], x * y)


@pytest.mark.parametrize("offset", [-1, 4])
def test_an_operator_of_ours_that_writes_beside_its_output_stops(offset, monkeypatch):
    def beside(x: Tensor, *, out: Any) -> None:
        out[0].copy_(x)
        ctypes.c_float.from_address(out[0].data_ptr() + offset * x.element_size()).value = 0.0

    monkeypatch.setitem(OPERATORS, "tightfit.copy", beside)
    values = {"x": value("x", 4), "out": value("out", 4)}
    tensors = {"x": torch.rand(4), "out": torch.empty(64)[:4]}
    if offset < 0:
        tensors["out"] = torch.empty(64)[8:12]
    with pytest.raises(RunError, match=r"tightfit\.copy writes beside its outputs"):
        OutputGuard().check(operator("tightfit.copy", values, "x"), values, tensors)


def test_an_operator_that_takes_no_contents_is_named(tmp_path):
    values = {"x": value("x", 4, 4), "y": value("y", 3), "out": value("out", 4)}
    described = [{**one, "bytes": 64} for one in values.values()]
    program = {"name": "p", "values": described, "operators": [operator("aten.mv.default", values, "x", "y")]}
    with pytest.raises(InputError, match=r"operator aten\.mv\.default is not supported \(size mismatch"):
        settle_operators(program, OutputGuard(), ScratchStores(tmp_path))
