"""What is recognised in a transformers model, what is not, and the head with capped logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from traced import trace_step

from tightfit.profiles.models import decoder_module, saved_modules
from tightfit.profiles.models.decoder_module import without_values
from tightfit.profiles.models.lora import LoraConfig
from tightfit.profiles.models.transformers_decoder import AnyDecoder
from tightfit.profiles.models.transformers_kernels import computes_linear, fuse_gate, replace_embedding, replace_norm
from tightfit.profiles.tracing.torch_ops import capped_head_loss

pytest.importorskip("transformers")


class ScaledNorm(nn.Module):
    """RMSNorm with the weight plus an offset, and epsilon inside or outside of the root."""

    def __init__(self, offset: float = 0.0, inside: bool = True) -> None:
        super().__init__()
        self.weight, self.eps, self.offset, self.inside = nn.Parameter(torch.empty(12)), 1e-5, offset, inside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        square = x.float().square().mean(-1, keepdim=True)
        root = (square + self.eps).rsqrt() if self.inside else 1 / (square.sqrt() + self.eps)
        return (x.float() * root * (self.offset + self.weight.float())).type_as(x)


@pytest.mark.parametrize(("offset", "unit_offset"), [(0.0, False), (1.0, True)])
def test_a_norm_is_replaced_by_what_computes_the_same(offset: float, unit_offset: bool) -> None:
    norm = ScaledNorm(offset)
    norm.weight.data.normal_()
    made = replace_norm(norm)
    assert made is not None
    assert (made.unit_offset, made.eps) == (unit_offset, 1e-5)
    made.weight.data.copy_(norm.weight.data)
    x = torch.randn(2, 5, 3, 12)
    torch.testing.assert_close(made(x), norm(x))


@pytest.mark.parametrize(
    "norm", [ScaledNorm(0.5), ScaledNorm(inside=False), nn.LayerNorm(12, bias=False), nn.LayerNorm(12)]
)
def test_another_norm_stays(norm: nn.Module) -> None:
    assert replace_norm(norm) is None


class Gated(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second, self.third = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "silu":
            return self.third(F.silu(self.first(x)) * self.second(x))
        if self.kind == "gelu_tanh, the other first":
            return self.third(self.first(x) * F.gelu(self.second(x), approximate="tanh"))
        if self.kind == "gelu":
            return self.third(F.gelu(self.first(x)) * self.second(x))
        return self.third(F.silu(self.first(x)) + self.second(x))


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(6, 20), nn.Linear(10, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, gate = self.both(x).chunk(2, dim=-1)
        return self.down(up * F.silu(gate))


@pytest.mark.parametrize(
    ("mlp", "recognised"),
    [
        (Gated("silu"), True),
        (Gated("gelu_tanh, the other first"), True),
        (Fused(), True),
        (Gated("gelu"), False),
        (Gated("a sum"), False),
        (nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 6)), False),
    ],
)
def test_gated_products_are_recognised_by_what_they_compute(mlp: nn.Module, recognised: bool) -> None:
    x = torch.randn(2, 3, 6)
    before = mlp(x).detach()
    fuse_gate(mlp)
    assert ("forward" in mlp.__dict__) == recognised
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), before)


class Scaled(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * 3.0


class Shifted(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) + 1.0


def test_embeddings_may_have_a_factor_and_nothing_else() -> None:
    plain, scaled = replace_embedding(nn.Embedding(20, 8)), replace_embedding(Scaled(20, 8))
    assert replace_embedding(nn.Embedding(20, 8, padding_idx=19)) is not None
    assert plain is not None
    assert scaled is not None
    assert (plain.scale, scaled.scale) == (1.0, 3.0)
    assert replace_embedding(Shifted(20, 8)) is None


def test_classes_made_of_linear_are_looked_at() -> None:
    class Same(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.T + self.bias

    class Other(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).clamp(-1, 1)

    assert computes_linear(Same(6, 4))
    assert not computes_linear(Other(6, 4))


@pytest.mark.parametrize("slice_rows", [32, 50])
def test_capped_logits_in_slices_give_the_loss_and_gradient_of_the_whole(slice_rows: int) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 16, requires_grad=True), torch.randn(50, 16) * 3
    labels = torch.randint(0, 50, (9,))
    labels[::4] = -100
    loss, token_losses, _ = capped_head_loss(hidden, weight, labels, slice_rows, 30.0)
    loss.backward()
    own, hidden.grad = hidden.grad, None
    exact = F.cross_entropy(30.0 * torch.tanh(hidden @ weight.T / 30.0), labels, ignore_index=-100)
    exact.backward()
    torch.testing.assert_close(loss.detach(), exact.detach())
    torch.testing.assert_close(own, hidden.grad)
    torch.testing.assert_close(token_losses.sum() / (labels >= 0).sum(), exact.detach())


@pytest.mark.slow
def test_a_capped_head_reads_its_weight_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_modules, "SLICE_BYTES", 1024)
    monkeypatch.setattr(decoder_module, "CAPPED_SLICES", 1)
    config = {
        "model_type": "gemma2", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True,
    }  # fmt: skip
    module = AnyDecoder(config, dtype=torch.float32, seq=8, lora=LoraConfig(rank=2))
    with FakeTensorMode():
        without_values(module)
    traced = trace_step(module, 1, 8)
    sizes = {tensor.name: tensor.shape for tensor in traced.tensors if tensor.name.startswith("model.embed_tokens")}
    name = "model.embed_tokens.weight"
    assert sizes == {
        name: [300, 32],
        f"{name}[0:128]": [128, 32],
        f"{name}[128:256]": [128, 32],
        f"{name}[256:300]": [44, 32],
    }
    head = next(layer for layer in traced.layers if layer.name == "head")
    read = {value for op in {p.name: p for p in traced.programs}[head.program].operators for value in op.inputs}
    whole = next(local for local, bound in head.bindings.items() if bound == name)
    gathering = [op for p in traced.programs if p.name == head.program for op in p.operators if whole in op.inputs]
    assert read
    assert {op.target for op in gathering} == {"tightfit.head_rows"}
