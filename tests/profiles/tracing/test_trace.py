"""The traced step against transformers + peft under autograd, and what a trace must not do."""

from __future__ import annotations

import statistics
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from interpreter import run_step
from reference import CONFIGS, VARIANTS, all_layers, gradients_of, loss_of, peft_model, relative_error
from traced import ALPHA, RANK, interpret, random_batch, random_weights, trace_decoder

from examples.vision import residual_cnn, vision_transformer
from tightfit.profiles.schema import Layer
from tightfit.profiles.tracing.segments import LARGEST_SEGMENT
from tightfit.profiles.tracing.trace import trace
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.training.adapter import trained_name

FEW, SIZES = (3, 29), {"gemma3_text": (11, 29), "llama": (1, 300)}
"""(batch, tokens): attention in one call, in two of which the last has fewer samples, and of one sample longer than
usual
"""


def reference(
    config: dict[str, Any], weights: dict[str, torch.Tensor], data: dict[str, torch.Tensor], dtype: torch.dtype
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and LoRA gradients by transformers + peft + autograd, computed in `dtype`."""
    model = peft_model(config, weights, all_layers(RANK, ALPHA), dtype)
    loss = loss_of(model, data["input_ids"], data["labels"])
    loss.backward()
    return float(loss.detach()), {trained_name(key): gradient for key, gradient in gradients_of(model).items()}


@pytest.mark.slow_but_for("llama-1-300", "gemma3_text-11-29")
@pytest.mark.parametrize(
    ("family", "batch", "seq"),
    [(family, *size) for family, size in SIZES.items()] + [(family, *FEW) for family in CONFIGS | VARIANTS],
)
def test_float32_loss_and_lora_gradients_match_autograd(family: str, batch: int, seq: int) -> None:
    config = (CONFIGS | VARIANTS)[family]
    weights, data = random_weights(config, torch.float32), random_batch(config, batch, seq)
    made = interpret(trace_decoder(config, torch.float32, batch, seq), weights, data)
    loss, gradients = reference(config, weights, data, torch.float32)
    assert float(made["head/out0"]) == pytest.approx(loss, rel=1e-5)
    assert len(gradients) == 14 * config["num_hidden_layers"]
    for name, exact in gradients.items():
        assert relative_error(made[f"grad:{name}"], exact) < 1e-4, name


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
def test_bfloat16_gradients_are_as_near_to_the_exact_ones_as_autograds(family: str) -> None:
    """Exact: float32 autograd on the same bfloat16-rounded weights. The yardstick: autograd in bfloat16, over all
    tensors, since gradients of q and k are small differences whose single errors are chance.
    """
    config = CONFIGS[family]
    weights, data = random_weights(config, torch.bfloat16), random_batch(config, *FEW)
    made = interpret(trace_decoder(config, torch.bfloat16, *FEW), weights, data)
    loss, exact = reference(config, {n: w.float() for n, w in weights.items()}, data, torch.float32)
    _, theirs = reference(config, weights, data, torch.bfloat16)
    assert float(made["head/out0"]) == pytest.approx(loss, rel=1e-2)
    assert all(made[f"grad:{name}"].dtype == torch.float32 for name in exact)
    own_errors = [relative_error(made[f"grad:{name}"], gradient) for name, gradient in exact.items()]
    their_errors = [relative_error(theirs[name], gradient) for name, gradient in exact.items()]
    assert statistics.median(own_errors) < 1.1 * statistics.median(their_errors)
    assert max(own_errors) < 1.5 * max(their_errors)


@pytest.mark.slow
def test_equal_layers_share_a_program() -> None:
    config = CONFIGS["llama"] | {"num_hidden_layers": 6}
    traced = trace_decoder(config, torch.bfloat16, 1, 16)
    programs = [layer.program for layer in traced.layers if layer.name.startswith("model.layers.")]
    assert len(programs) == 6
    assert len(set(programs[1:])) == 1  # the first needs no gradient for its input


@pytest.mark.slow
def test_the_head_weight_is_cut_into_slices() -> None:
    config = CONFIGS["llama"] | {"vocab_size": 60_000}
    traced = trace_decoder(config, torch.bfloat16, 1, 16)
    slices = [t for t in traced.tensors if t.name.startswith("model.embed_tokens.weight[")]
    assert sorted(t.shape[0] for t in slices) == [60_000 - 32_768, 32_768]
    assert sum(t.bytes for t in slices) == 60_000 * 64 * 2


class Branching(torch.nn.Module):
    """A value with two consumers in different layers, and one parameter used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
        self.shared = torch.nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a = torch.relu(self.blocks[0](x)) * self.shared
        b = torch.tanh(self.blocks[1](a))
        c = self.blocks[2](b * self.shared)
        return (a + b + c - y).square().mean()


@pytest.mark.slow
def test_gradients_of_branches_are_summed() -> None:
    torch.manual_seed(0)
    module = Branching()
    x, y = torch.randn(5, 8), torch.randn(5, 8)
    traced = trace(module, {"x": x, "y": y})
    made = run_step(
        traced.layers, {p.name: p for p in traced.programs}, dict(module.named_parameters()) | {"x": x, "y": y}
    )
    loss = module(x, y)
    loss.backward()
    torch.testing.assert_close(made[traced.loss], loss.detach())
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(made[f"grad:{name}"], parameter.grad)
    assert any(layer.name.startswith("sum(") for layer in traced.layers)


class Sharing(torch.nn.Module):
    """One layer at four places, and an embedding that is the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(9, 8), torch.nn.Linear(8, 9)
        self.head.weight = self.embed.weight
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(8, 8)] * 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.embed(x)
        for block in self.blocks:
            y = torch.tanh(block(y))
        return torch.nn.functional.cross_entropy(self.head(y), x)


@pytest.mark.slow
def test_a_tensor_that_modules_share_has_one_gradient() -> None:
    torch.manual_seed(0)
    module, x = Sharing(), torch.randint(0, 9, (12,))
    traced = trace(module, {"x": x})
    parameters = dict(module.named_parameters())
    assert {t.name for t in traced.tensors if t.kind == "trainable"} == set(parameters)
    made = run_step(traced.layers, {p.name: p for p in traced.programs}, parameters | {"x": x})
    module(x).backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(made[f"grad:{name}"], parameter.grad)


class Recurrent(torch.nn.Module):
    def __init__(self, kind: type[torch.nn.RNNBase], **settings: Any) -> None:
        super().__init__()
        self.recurrent = kind(6, 8, 2, **settings)
        self.head = torch.nn.Linear(8 * (1 + self.recurrent.bidirectional), 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        made, _ = self.recurrent(x)
        return torch.nn.functional.cross_entropy(self.head(made[:, -1]), y)


class Stateful(torch.nn.Module):
    """An LSTM that begins with trained states, of which the last states are read too."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.recurrent, self.head = torch.nn.LSTM(6, 8, **settings), torch.nn.Linear(8, 4)
        ways = 1 + self.recurrent.bidirectional
        self.first = torch.nn.ParameterList(torch.randn(ways, 5, 8) for _ in range(2))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        _, (hidden, cell) = self.recurrent(x, tuple(self.first))
        return torch.nn.functional.cross_entropy(self.head(hidden.sum(0) + cell.mean(0)), y)


RECURRENT = {
    "lstm": lambda: Recurrent(torch.nn.LSTM, batch_first=True),
    "lstm of two ways": lambda: Recurrent(torch.nn.LSTM, bidirectional=True, bias=False),
    "states of an lstm": lambda: Stateful(bidirectional=True),
    "gru": lambda: Recurrent(torch.nn.GRU, batch_first=True),
}


@pytest.mark.slow_but_for("states of an lstm", "gru")
@pytest.mark.parametrize("name", RECURRENT)
def test_gradients_through_recurrent_layers_match_autograd(name: str) -> None:
    torch.manual_seed(0)
    module = RECURRENT[name]()
    rows = 3 if name in ("lstm", "gru", "lstm of two ways") else 5
    batch = {"x": torch.randn(3, 5, 6), "y": torch.randint(0, 4, (rows,))}
    traced = trace(module, batch)
    parameters = dict(module.named_parameters())
    given = {key: parameter.detach() for key, parameter in parameters.items()}
    made = run_step(traced.layers, {p.name: p for p in traced.programs}, given | batch)
    loss = module(**batch)
    loss.backward()
    torch.testing.assert_close(made[traced.loss], loss.detach())
    for key, parameter in parameters.items():
        torch.testing.assert_close(made[f"grad:{key}"], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_an_lstm_takes_as_many_operators_for_long_sequences_as_for_short_ones() -> None:
    def operators(length: int) -> list[str]:
        traced = trace(Recurrent(torch.nn.LSTM), {"x": torch.randn(length, 5, 6), "y": torch.randint(0, 4, (length,))})
        return [operator.target for program in traced.programs for operator in program.operators]

    assert operators(20) == operators(3)
    assert operators(3).count("tightfit.lstm") == operators(3).count("tightfit.lstm_backward") == 2


class Residual(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, width))
        self.act = torch.nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.body(x) + x)


class Pooled(torch.nn.Sequential):
    """A sequence of blocks that are sequences themselves, the first of which pools."""

    def __init__(self) -> None:
        first = torch.nn.Sequential(
            torch.nn.Conv2d(2, 4, 1), torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.Flatten()
        )
        super().__init__(first, Residual(16), Residual(16), torch.nn.Linear(16, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).square().mean()


def test_blocks_of_a_sequence_are_layers_whose_backward_reads_no_more_than_it_needs() -> None:
    """The output of a block is read by the next one's backward alone, and what is pooled by none."""
    torch.manual_seed(0)
    module, x = Pooled(), torch.randn(3, 2, 4, 4)
    traced = trace(module, {"x": x})
    assert [layer.name for layer in traced.layers] == ["0", "1", "2", "3", "head"]
    programs = {program.name: program for program in traced.programs}

    def read(layer: Layer) -> set[str]:
        backward = [op for op in programs[layer.program].operators if op.phase == "backward"]
        return {layer.bindings.get(name, name) for op in backward for name in op.inputs}

    readers = {layer.name: read(layer) for layer in traced.layers}
    assert [name for name, names in readers.items() if "1/out0" in names] == ["2"]
    pooling = [op for op in programs[traced.layers[0].program].operators if "max_pool2d" in op.target]
    assert pooling[0].inputs[0] not in pooling[1].inputs
    parameters = dict(module.named_parameters())
    made = run_step(traced.layers, programs, {key: value.detach() for key, value in parameters.items()} | {"x": x})
    module(x).backward()
    for key, parameter in parameters.items():
        torch.testing.assert_close(made[f"grad:{key}"], parameter.grad)


class Dense(torch.nn.Module):
    """A DenseNet as timm and torchvision name its layers, without an index: each reads what all before it made."""

    def __init__(self, layers: int, width: int = 4) -> None:
        super().__init__()
        self.features = torch.nn.ModuleDict({"conv0": torch.nn.Conv2d(3, width, 3, padding=1)})
        for index in range(layers):
            self.features[f"denselayer{index + 1}"] = torch.nn.Sequential(
                OrderedDict(
                    norm=torch.nn.BatchNorm2d((index + 1) * width),
                    act=torch.nn.ReLU(),
                    conv=torch.nn.Conv2d((index + 1) * width, width, 3, padding=1),
                )
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, *layers = self.features.values()
        made = [first(x)]
        for layer in layers:
            made.append(layer(torch.cat(made, 1)))
        return torch.cat(made, 1).square().mean()


@pytest.mark.slow
def test_a_network_whose_modules_have_no_index_is_cut_at_its_modules_into_layers_of_a_bounded_size() -> None:
    torch.manual_seed(0)
    module, x = Dense(40), torch.randn(2, 3, 8, 8)
    traced = trace(module, {"x": x})
    programs = {program.name: program for program in traced.programs}
    layers = [layer for layer in traced.layers if not layer.name.startswith("sum(")]
    assert len(layers) >= 3
    for layer in layers:
        forward = [one for one in programs[layer.program].operators if one.phase == "forward"]
        assert len(forward) <= LARGEST_SEGMENT
    made = run_step(traced.layers, programs, dict(module.named_parameters()) | dict(module.named_buffers()) | {"x": x})
    loss = module(x)
    loss.backward()
    torch.testing.assert_close(made[traced.loss], loss.detach())
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(made[f"grad:{name}"], parameter.grad, rtol=1e-4, atol=1e-6)


class Classifier(torch.nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.head, self.loss = torch.nn.Linear(6, 5), torch.nn.CrossEntropyLoss(**settings)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.loss(self.head(x), y)


@pytest.mark.parametrize(
    ("settings", "joined"),
    [
        ({}, True),
        ({"reduction": "sum", "ignore_index": 2}, True),
        ({"label_smoothing": 0.1}, False),
        ({"weight": torch.arange(1.0, 6)}, False),
    ],
)
def test_the_gradient_of_a_cross_entropy_is_one_operator(settings: dict[str, Any], joined: bool) -> None:
    torch.manual_seed(0)
    module, ignored = Classifier(**settings), settings.get("ignore_index", -100)
    batch = {"x": torch.randn(7, 6), "y": torch.tensor([0, ignored, 1, 4, ignored, 3, 3])}
    traced = trace(module, batch)
    targets = [operator.target for program in traced.programs for operator in program.operators]
    assert ("tightfit.cross_entropy_backward" in targets) == joined == ("aten.nll_loss_backward.default" not in targets)
    held = {key: value.detach() for key, value in (*module.named_parameters(), *module.named_buffers())}
    made = run_step(traced.layers, {program.name: program for program in traced.programs}, held | batch)
    loss = module(**batch)
    loss.backward()
    torch.testing.assert_close(made[traced.loss], loss.detach())
    for key, parameter in module.named_parameters():
        torch.testing.assert_close(made[f"grad:{key}"], parameter.grad)


class Encoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.5, activation="gelu", batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.layer(x)[:, -1] - x[:, 0]).square().mean()


def test_dropout_inside_attention_has_the_gradient_of_what_was_drawn() -> None:
    """The slope of the loss along the gradient, everything drawn alike."""
    torch.manual_seed(0)
    module, batch = Encoder(), {"x": torch.randn(4, 5, 16)}
    traced = trace(module, batch)
    programs = {p.name: p for p in traced.programs}
    drawn = [op for p in traced.programs for op in p.operators if op.target == "tightfit.dropout"]
    assert [op.args[1:] for op in drawn if op.phase == "forward"] == [[0.5, site] for site in range(4)]
    assert all(op.recomputable for op in drawn)

    def step(shift: float) -> dict[str, torch.Tensor]:
        moved = {n: p.detach() + shift * gradients.get(n, 0.0) for n, p in module.named_parameters()}
        return run_step(traced.layers, programs, moved | batch)

    gradients: dict[str, torch.Tensor] = {}
    made = step(0.0)
    gradients = {n: made[f"grad:{n}"] for n, _ in module.named_parameters()}
    slope = (step(1e-2)[traced.loss] - step(-1e-2)[traced.loss]) / 2e-2
    assert float(slope) == pytest.approx(sum(float(g.square().sum()) for g in gradients.values()), rel=1e-2)


class Changing(torch.nn.Module):
    """Its forward changes the batch that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.nn.functional.dropout(x.relu_(), 0.5, inplace=True) + x).square().mean()


def test_a_batch_that_is_changed_in_place_is_no_result() -> None:
    module, batch = Changing(), {"x": torch.randn(6, 4)}
    traced = trace(module, batch)
    made = run_step(traced.layers, {p.name: p for p in traced.programs}, dict(module.named_parameters()) | batch)
    (drop,) = [op for p in traced.programs for op in p.operators if op.target == "tightfit.dropout"]
    (left,) = [made[name] for name in made if name.endswith(f"/{drop.outputs[0]}")]
    assert torch.equal((left == 0) | (left == 2 * batch["x"].relu()), torch.ones(6, 4, dtype=torch.bool))
    torch.testing.assert_close(made[traced.loss], module.linear(2 * left).square().mean().detach())


class Noisy(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.linear(x) * torch.randn_like(x)).square().mean()


def test_what_else_is_drawn_is_never_drawn_again() -> None:
    traced = trace(Noisy(), {"x": torch.randn(6, 4)})
    (drawn,) = [op for p in traced.programs for op in p.operators if op.target == "aten.randn_like.default"]
    assert not drawn.recomputable


class Counting(torch.nn.Module):
    """Batch norm in training, beside a buffer that is changed otherwise."""

    def __init__(self, *, seen: bool) -> None:
        super().__init__()
        self.norm, self.seen = torch.nn.BatchNorm1d(4), seen
        self.register_buffer("largest", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.seen:
            self.largest.copy_(torch.maximum(self.largest, x.detach().amax(0)))
        return self.norm(x).square().mean()


def test_running_statistics_are_kept_once_and_other_changes_of_buffers_refused() -> None:
    traced = trace(Counting(seen=False), {"x": torch.randn(6, 4)})
    kept = [op for p in traced.programs for op in p.operators if op.target == "tightfit.keep_state"]
    assert len(kept) == 3  # mean, variance and number of batches
    assert {(op.phase, op.recomputable, len(op.outputs)) for op in kept} == {("forward", False, 0)}
    evaluated = [op.target for p in traced.programs for op in p.operators if op.phase == "inference"]
    assert "tightfit.batch_norm_inference" in evaluated
    assert not {"tightfit.batch_norm", "tightfit.keep_state"} & set(evaluated)
    with pytest.raises(InputError, match=r"Counting changes the buffer largest in its forward at .*\.largest\.copy_"):
        trace(Counting(seen=True), {"x": torch.randn(6, 4)})


class Answering(torch.nn.Module):
    def __init__(self, answer: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.answer = torch.nn.Linear(4, 4), answer

    def forward(self, x: torch.Tensor) -> Any:
        return self.answer(self.linear(x))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            lambda y: y.square(),
            r"forward must return one scalar loss, not a tensor of shape \[6, 4\]; take its mean or sum",
        ),
        (lambda y: (y.mean(), y.square().sum()), "forward must return one scalar loss, not 2 results"),
        (lambda y: None, "forward must return one scalar loss, and returns no tensor"),
        (lambda y: y.detach().mean(), "the loss depends on no parameter that requires a gradient"),
    ],
)
def test_a_forward_that_returns_no_loss_is_refused(answer: Callable[[torch.Tensor], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        trace(Answering(answer), {"x": torch.randn(6, 4)})


class Dynamic(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum() if x.sum() > 0 else x.mean()


def test_data_dependent_control_flow_is_refused() -> None:
    with pytest.raises(InputError, match=r"Dynamic cannot be traced by torch\.export"):
        trace(Dynamic(), {"x": torch.randn(6)})


@pytest.mark.parametrize("factory", [residual_cnn, vision_transformer])
def test_any_module_trains_in_full(factory: Any) -> None:
    torch.manual_seed(0)
    module, sample = factory()
    batch = {f"batch{index}": tensor for index, tensor in enumerate(sample)}
    traced = trace(module, batch)
    made = run_step(
        traced.layers,
        {p.name: p for p in traced.programs},
        dict(module.named_parameters()) | dict(module.named_buffers()) | batch,
    )
    loss = module(*sample)
    loss.backward()
    torch.testing.assert_close(made[traced.loss], loss.detach())
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(made[f"grad:{name}"], parameter.grad, rtol=1e-4, atol=1e-6)
        assert made[f"grad:{name}"].stride() == parameter.stride()


class Images(torch.nn.Module):
    """A small U-Net; `flat` makes rows of what it computes, of all of an image's values in their order."""

    def __init__(self, flat: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.down = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=2, padding=1), torch.nn.GroupNorm(2, 8))
        self.deep = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up, self.norm = torch.nn.ConvTranspose2d(8, 3, 2, stride=2), torch.nn.BatchNorm2d(6)
        self.mix, self.head, self.flat = torch.nn.Conv2d(6, 2, 1), torch.nn.Linear(128, 1), flat

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = self.down(x)
        low = low + torch.nn.functional.silu(self.deep(torch.nn.functional.interpolate(low, scale_factor=1.0)))
        wide = self.norm(torch.cat([x, self.up(low)], 1))
        return self.head(self.flat(self.mix(wide))).square().mean()


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("flat", [lambda y: y.flatten(1), lambda y: y.view(len(y), -1)])
def test_a_sample_of_images_is_read_as_a_batch_is_written_whatever_its_order_in_memory(
    flat: Callable[[torch.Tensor], torch.Tensor], order: torch.memory_format
) -> None:
    torch.manual_seed(0)
    module, x = Images(flat), torch.randn(2, 3, 8, 8)
    traced = trace(module, {"x": x.contiguous(memory_format=order)})
    (given,) = (tensor for tensor in traced.tensors if tensor.kind == "batch")
    assert given.shape == [2, 3, 8, 8]
    read = [value for program in traced.programs for value in program.values if value.kind == "batch"]
    assert read
    assert all(value.stride == [192, 64, 8, 1] for value in read)
    held = {name: value.detach().clone() for name, value in module.state_dict().items()}
    made = run_step(traced.layers, {p.name: p for p in traced.programs}, held | {"x": x})
    loss = module(x)
    loss.backward()
    torch.testing.assert_close(made[traced.loss], loss.detach())
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(made[f"grad:{name}"], parameter.grad, rtol=1e-4, atol=1e-6)
        assert made[f"grad:{name}"].stride() == parameter.stride()
