"""Modules whose attention has a bias that is trained, and models of transformers as they come, with their caches:
trained as by PyTorch's own loop.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from in_process import make_training
from safetensors.torch import load_file
from tiny_plans import module_profile, naive_plan
from torch import Tensor, nn
from torch.nn import functional as F

from tightfit.profiles.sources.factory import build_module
from tightfit.profiles.tracing.trace import trace
from tightfit.runtime.engine.training.batches import write_batches
from tightfit.runtime.session.python_batches import as_planned

HEADS, TOKENS, WIDTH = 4, 12, 16
LR, STEPS = 1e-2, 4
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
SMALL = {"vocab_size": 64} | SIZES


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)  # the gradient of a bias of keys is rounding alone
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        made = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return x + self.out(made.transpose(1, 2).reshape(x.shape))


class Biased(nn.Module):
    """Two layers of attention that share a bias, or have one each."""

    def __init__(self, *biases: nn.Module) -> None:
        super().__init__()
        self.layers, self.biases = nn.ModuleList([Attention(), Attention()]), nn.ModuleList(biases)

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(x, self.biases[number % len(self.biases)](x))
        return x.square().mean()


class Table(nn.Module):
    """A row of a table for each distance, as in Swin, in another layout than attention wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2 * TOKENS - 1, HEADS))
        places = torch.arange(TOKENS)
        self.register_buffer("distance", places[:, None] - places[None] + TOKENS - 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.table[self.distance].permute(2, 0, 1)[None]


class Embedded(Table):
    """The same by `F.embedding`, expanded over the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(self.distance, self.table).permute(2, 0, 1).expand(len(x), -1, -1, -1)


class Slopes(nn.Module):
    """ALiBi with trained slopes; the distances are a buffer that is a view."""

    def __init__(self) -> None:
        super().__init__()
        self.slopes = nn.Parameter(torch.rand(HEADS))
        places = torch.arange(float(TOKENS))
        self.register_buffer("distance", -(places[:, None] - places[None]).abs()[None, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.slopes.view(1, HEADS, 1, 1) * self.distance


class Continuous(nn.Module):
    """A small network of the distance, as in Swin v2."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, HEADS))
        self.register_buffer("distances", torch.linspace(-1, 1, 2 * TOKENS - 1)[:, None])
        places = torch.arange(TOKENS)
        self.register_buffer("which", places[:, None] - places[None] + TOKENS - 1)

    def forward(self, x: Tensor) -> Tensor:
        return 4 * torch.sigmoid(self.network(self.distances)[self.which]).permute(2, 0, 1)


class Language(nn.Module):
    """A model of transformers with all that it returns, a cache among it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Any:
        return self.model(input_ids=ids, labels=ids)


class Image(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor, labels: Tensor) -> Any:
        return self.model(pixel_values=pixels, labels=labels)


def features() -> tuple[Tensor]:
    return (torch.randn(2, TOKENS, WIDTH),)


def tokens() -> tuple[Tensor]:
    return (torch.randint(0, 64, (2, TOKENS)),)


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 32, 32), torch.randint(0, 5, (2,))


def shared_table() -> Any:
    return Biased(Table()), features()


def table_of_each() -> Any:
    return Biased(Table(), Embedded()), features()


def slopes() -> Any:
    return Biased(Slopes()), features()


def continuous() -> Any:
    return Biased(Continuous(), Continuous()), features()


def t5() -> Any:
    config = transformers.T5Config(**T5, decoder_start_token_id=0)
    return Language(transformers.T5ForConditionalGeneration(config)), tokens()


def beit() -> Any:
    config = transformers.BeitConfig(
        **SIZES, image_size=32, patch_size=8, num_labels=5, out_indices=[1, 2], use_relative_position_bias=True,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, drop_path_rate=0.0,
    )  # fmt: skip
    return Image(transformers.BeitForImageClassification(config)), images()


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return Language(transformers.GPT2LMHeadModel(config)), tokens()


def loss_apart() -> Any:
    (ids,) = tokens()

    def loss(made: Any, labels: Tensor) -> Tensor:
        return F.cross_entropy(made.logits.flatten(0, 1), labels.flatten())

    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)), (ids, ids), loss


FACTORIES = [shared_table, table_of_each, slopes, continuous, t5, beit, gpt2, loss_apart]


@pytest.mark.slow_but_for("shared_table", "continuous")
@pytest.mark.parametrize("factory", FACTORIES)
def test_it_trains_as_a_loop_of_pytorch_s(factory: Callable[[], Any], tmp_path: Path) -> None:
    plan = naive_plan(module_profile(tmp_path, f"{__name__}:{factory.__name__}"))
    torch.manual_seed(0)
    module, *given = factory()
    batches = [given[0], factory()[1]] * (STEPS // 2)
    module.train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, weight_decay=0.0)
    expected = []
    for batch in batches:
        made = given[1](module(batch[0]), batch[1]) if len(given) > 1 else module(*batch)
        loss = made if isinstance(made, Tensor) else made.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(float(loss.detach()))
    data = write_batches(str(tmp_path / "data"), [as_planned(plan, batch, "it") for batch in batches])
    training = make_training(plan, data, tmp_path, lr=LR)
    training.header["state_dict"] = plan.model.config["state_dict"]
    training.initialise()
    assert [training.step(number) for number in range(1, STEPS + 1)] == pytest.approx(expected, rel=1e-5)
    training.save_trained(str(tmp_path))
    saved = load_file(tmp_path / "model.safetensors")
    for name, value in module.state_dict().items():
        if name in saved:  # tied ones are saved once
            torch.testing.assert_close(saved[name], value, rtol=1e-3, atol=1e-4)
    training.close()


@pytest.mark.slow
def test_nothing_is_appended_to_an_empty_cache() -> None:
    """Keys and values are not copied into a cache that ends with the step."""
    module, sample, _ = build_module(f"{__name__}:gpt2")
    traced = trace(module, {f"batch{index}": tensor for index, tensor in enumerate(sample)})
    forward = [op.target for program in traced.programs for op in program.operators if op.phase == "forward"]
    assert any("attention" in target for target in forward)
    assert "aten.cat.default" not in forward
