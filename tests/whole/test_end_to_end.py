"""The whole road on small models: profile, plan, run in the capped child; against transformers + peft under
autograd.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import (
    CONFIGS,
    adapted_by_peft,
    all_layers,
    evaluated,
    loss_of,
    peft_model,
    random_model,
    relative_error,
    starting_weights,
    stored_weights,
    take,
    trained_by_adamw,
    trained_by_peft,
    training_batches,
)
from safetensors.torch import load_file
from tiny_models import byte_level_tokenizer, random_weights, write_directory
from traced import samples_of

from examples.vision import residual_cnn, vision_transformer
from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.plan import plan
from tightfit.planner.schema import Plan
from tightfit.profiles.api import profile
from tightfit.profiles.schema import Profile
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.session.launch import run

pytestmark = pytest.mark.usefixtures("cache")
BATCH, SEQ, RANK, STEPS = 3, 29, 4, 4
LR = 5e-3
TEXTS = [
    {"prompt": "Is the fox quick? ", "completion": "positive"},
    {"prompt": "lazy dog? ", "completion": "negative"},
    {"prompt": "over ", "completion": "the moon"},
    {"prompt": "user said: ", "completion": "they've 12"},
    {"text": "The quick brown fox jumps over the lazy dog."},
]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    return path


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            config = {**CONFIGS[family], "vocab_size": 640 if family == "gemma3_text" else 320}
            made[family] = tmp_path_factory.mktemp(family)
            write_directory(made[family], config, random_weights(config), tokenizer=byte_level_tokenizer())
        return made[family]

    return make


@pytest.fixture(scope="session")
def profiled(model_directory: Any, llama_of_one: Profile) -> Any:
    made = {("llama", "float32"): llama_of_one}

    def make(family: str, dtype: str) -> Profile:
        if (family, dtype) not in made:
            made[family, dtype] = profile(
                str(model_directory(family)), batch=BATCH, seq=SEQ, lora_rank=RANK, lora_alpha=8.0, dtype=dtype
            )
        return made[family, dtype]

    return make


def losses_and_moments(
    made: Profile, out: Path, config: dict[str, Any], dtype: torch.dtype
) -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The same steps by transformers + peft + torch.optim.AdamW on the dequantised weights, on the very batches of the
    run.
    """
    model = peft_model(config, starting_weights(made, dtype), all_layers(RANK, 8.0), dtype)
    trained = trained_by_peft(model)
    batches = training_batches(out, STEPS, made.batch, SEQ, packing=True)
    samples = [samples_of(dict(zip(("input_ids", "labels", "positions"), batch))) for batch in batches]
    assert any(sum(bool((labels >= 0).any()) for _, labels in one) > made.batch for one in samples)  # some share a row
    losses, optimizer = trained_by_adamw(trained.values(), partial(loss_of, model), batches, lr=LR)
    moments = {n: optimizer.state[p]["exp_avg"] for n, p in trained.items()}
    return losses, moments, {n: p.detach() for n, p in trained.items()}


def state(out: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(adapter, optimizer state) of the last checkpoint."""
    checkpoint = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return load_file(checkpoint / "adapter_model.safetensors"), load_file(checkpoint / "optimizer.safetensors")


@pytest.mark.slow_but_for("llama")
@pytest.mark.parametrize("family", CONFIGS)
def test_steps_match_peft_and_autograd(family: str, profiled: Any, data: Path, tmp_path: Path) -> None:
    """float32: losses, Adam's first moment (a sum of gradients) and the trained factors, at the smallest budget."""
    made = profiled(family, "float32")
    config = {**CONFIGS[family], "vocab_size": made.model.config["vocab_size"]}
    smallest = plan(made, ModelPlanner(made).minimum().peak_bytes)
    report = run(smallest, data, steps=STEPS, out=tmp_path, lr=LR, packing=True)
    losses, moments, trained = losses_and_moments(made, tmp_path, config, torch.float32)
    assert report["loss"] == pytest.approx(losses, rel=2e-5)
    adapter, optimizer = state(tmp_path)
    assert len(moments) == 14 * config["num_hidden_layers"]
    for name, moment in moments.items():
        own = optimizer[f"adam_m:{name}"]
        assert relative_error(own, moment) < 2e-3, name
        assert relative_error(adapter[f"base_model.model.{name}"], trained[name]) < 1e-2, name
        if "lora_B" in name:
            assert adapter[f"base_model.model.{name}"].abs().max() > 0, name


@pytest.mark.slow
def test_bfloat16_losses_match_peft(profiled: Any, data: Path, tmp_path: Path) -> None:
    made = profiled("llama", "bfloat16")
    report = run(plan(made, 1 << 40), data, steps=STEPS, out=tmp_path, lr=LR, packing=True)
    losses, _, _ = losses_and_moments(made, tmp_path, CONFIGS["llama"], torch.bfloat16)
    assert report["loss"] == pytest.approx(losses, rel=5e-3)


def test_results_do_not_depend_on_the_budget(tmp_path: Path) -> None:
    """Losses, adapter and optimizer state, to the bit, at the smallest budget and the largest; every run inside its
    cap, as predicted.
    """
    sizes = {"hidden_size": 192, "intermediate_size": 512, "vocab_size": 4096, "num_hidden_layers": 4}
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIGS["llama"] | sizes))
    made = profile(str(config), batch=24, seq=64)  # activations enough to matter beside the process itself
    planner = ModelPlanner(made)
    smallest = planner.minimum().peak_bytes
    most = planner.plan(1 << 40).peak_bytes
    assert most > smallest + (8 << 20)
    plans, seen = [planner.plan(budget) for budget in (smallest, most)], []
    for budget, planned in zip((smallest, most), plans):
        out = tmp_path / str(budget)
        report = run(planned, "random", steps=STEPS, out=out, lr=LR)
        assert report["peak_bytes"]["measured"] <= min(budget, planned.peak_bytes)
        seen.append((report["loss"], *state(out)))
    assert seen[0][0] == seen[1][0]
    for mine, theirs in zip(seen[0][1:], seen[1][1:], strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert plans[0].train != plans[1].train
    assert plans[1].step_seconds < plans[0].step_seconds


def test_peft_loads_the_adapter_and_gives_the_same_loss(profiled: Any, data: Path, tmp_path: Path) -> None:
    made = profiled("llama", "float32")
    report = run(plan(made, 1 << 40), data, steps=STEPS, out=tmp_path, lr=LR, eval_data=data)
    base = random_model(CONFIGS["llama"])
    take(base, stored_weights(made.model.store), CONFIGS["llama"])
    loss = evaluated(adapted_by_peft(base, Path(report["adapter"])), tmp_path, made.batch, SEQ)
    assert report["evaluation"]["after"]["loss"] == pytest.approx(loss, rel=1e-4)
    assert report["evaluation"]["before"]["loss"] != pytest.approx(loss, rel=1e-3)


@pytest.mark.slow
def test_wrong_choices_have_no_part_in_the_loss_of_an_evaluation(profiled: Any, data: Path, tmp_path: Path) -> None:
    planned = plan(profiled("llama", "float32"), 1 << 40)
    losses = []
    for wrong in ("negative", "they've 12"):
        questions = tmp_path / "questions.jsonl"
        questions.write_text(json.dumps({"prompt": "lazy dog? ", "choices": ["positive", wrong], "answer": 0}))
        report = run(planned, data, steps=1, out=tmp_path / wrong, eval_data=questions)
        losses.append(report["evaluation"]["before"]["loss"])
        assert report["evaluation"]["before"]["records"] == 2
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("factory", [residual_cnn, vision_transformer])
def test_any_module_trains_in_full_inside_its_cap(factory: Callable[[], Any], tmp_path: Path) -> None:
    """All parameters and Adam states, against the same steps by torch.optim.AdamW: the first to rounding, and after
    several, when rounding has grown with every step, as near to those in float64 as PyTorch's own in float32.
    """
    made = profile(f"examples.vision:{factory.__name__}")
    smallest = ModelPlanner(made).minimum().peak_bytes

    def expected(steps: int, dtype: torch.dtype) -> tuple[list[float], dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        module, sample = factory()
        batch = [one.to(dtype) if one.is_floating_point() else one for one in sample]
        losses, optimizer = trained_by_adamw(module.to(dtype).parameters(), module, [batch] * steps, lr=1e-3)
        return losses, {name: optimizer.state[one]["exp_avg"] for name, one in module.named_parameters()}

    _, first = expected(1, torch.float32)
    losses, theirs = expected(STEPS, torch.float32)
    _, exact = expected(STEPS, torch.float64)
    planned = plan(made, smallest)
    report = run(planned, "random", steps=STEPS, out=tmp_path, lr=1e-3, checkpoint_every=1, keep_checkpoints=STEPS)
    assert report["loss"] == pytest.approx(losses, rel=1e-4)
    assert report["peak_bytes"]["measured"] <= planned.peak_bytes <= smallest
    begun, ended = (load_file(tmp_path / f"checkpoint-{step}" / "optimizer.safetensors") for step in (1, STEPS))
    for name, values in exact.items():
        mine = f"adam_m:{name}"
        assert relative_error(begun[mine], first[name]) < 1e-4, name
        grown = relative_error(theirs[name].double(), values)
        assert relative_error(ended[mine].double(), values) < 1e-3 + 4 * grown, name


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.mse_loss(self.second(torch.relu(self.first(x))), y)


class Backwards(Small):
    """Reads its batch from the end, and not all of it."""

    def forward(self, x: torch.Tensor, unused: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return (2 * y - self.second(torch.relu(self.first(x)))).square().mean()


class Unusual(torch.nn.Module):
    """One whose weights and batch are in half precision, one of whose weights and batch are no contiguous tensors, and
    `Backwards`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.halved, self.turned, self.backwards = Small().to(torch.bfloat16), Small(), Backwards()
        self.turned.first.weight = torch.nn.Parameter(torch.randn(16, 16).t())

    def forward(
        self,
        half_x: torch.Tensor,
        half_y: torch.Tensor,
        turned_x: torch.Tensor,
        turned_y: torch.Tensor,
        x: torch.Tensor,
        unused: torch.Tensor,
        y: torch.Tensor,
    ) -> torch.Tensor:
        loss: torch.Tensor = (
            self.halved(half_x, half_y) + self.turned(turned_x, turned_y) + self.backwards(x, unused, y)
        )
        return loss


def unusual() -> Any:
    half = torch.randn(4, 16).bfloat16(), torch.randn(4, 16).bfloat16()
    turned = torch.randn(16, 4).t(), torch.randn(1, 16).expand(4, 16)
    return Unusual(), (*half, *turned, torch.randn(4, 16), torch.ones(3), torch.randn(4, 16))


class Kept(Small):
    """A frozen layer, one that the loss does not need, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first.requires_grad_(False)
        self.unused = torch.nn.Linear(3, 600)
        self.register_buffer("scale", torch.arange(16.0))
        self.register_buffer("mask", torch.arange(16) < 12)
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("sign", -torch.ones(16), persistent=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return super().forward(x * self.scale * self.sign, torch.where(self.mask, y, 0.0))


def kept() -> Any:
    return Kept(), (torch.randn(4, 16), torch.randn(4, 16))


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(50, 32), torch.nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.head(torch.tanh(self.embed(x))).flatten(0, 1), y.flatten())


class Shared(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(16, 16)] * 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return torch.nn.functional.mse_loss(x, y)


class Linked(torch.nn.Module):
    """A weight in two places, and a layer in four."""

    def __init__(self) -> None:
        super().__init__()
        self.tied, self.shared = Tied(), Shared()

    def forward(self, words: torch.Tensor, labels: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.tied(words, labels) + self.shared(x, y)
        return loss


def linked() -> Any:
    words = torch.randint(0, 50, (4, 16)), torch.randint(0, 50, (4, 16))
    return Linked(), (*words, torch.randn(4, 16), torch.randn(4, 16))


@pytest.mark.slow
@pytest.mark.parametrize("factory", [unusual, kept, linked])
def test_a_small_module_trains_as_by_autograd(factory: Any, tmp_path: Path) -> None:
    """Losses and the saved model, against torch.optim.AdamW in float32."""
    torch.manual_seed(0)
    module, sample = factory()
    module, sample = module.float(), [t.float() if t.is_floating_point() else t for t in sample]
    losses, _ = trained_by_adamw(module.parameters(), module, [sample] * STEPS, lr=LR)
    made = profile(f"{__name__}:{factory.__name__}")
    report = run(plan(made, ModelPlanner(made).minimum().peak_bytes), "random", steps=STEPS, out=tmp_path, lr=LR)
    assert report["loss"] == pytest.approx(losses, rel=3e-5)  # of a sum of up to three losses
    saved = load_file(tmp_path / "model" / "model.safetensors")
    for name, expected in module.state_dict().items():
        torch.testing.assert_close(saved[name], expected, rtol=1e-3, atol=1e-4)
    module.load_state_dict(saved, strict=True)


class Making(Small):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return super().forward(x * torch.tensor([2.0]), y)


class Both(Small):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        return super().forward(x, y), (x - y).square().mean(1)


def making() -> Any:
    return Making(), (torch.randn(4, 16), torch.randn(4, 16))


def both() -> Any:
    return Both(), (torch.randn(4, 16), torch.randn(4, 16))


@pytest.mark.slow_but_for("both-forward must return one scalar loss, not 2 results")
@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (making, r"forward makes a tensor of shape \[1\] \(lifted_tensor_0\) of numbers of its own"),
        (both, "forward must return one scalar loss, not 2 results"),
    ],
)
def test_a_module_that_cannot_be_run_is_refused_before_it_is_measured(factory: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        profile(f"{__name__}:{factory.__name__}")


def test_a_larger_plan_than_the_budget_is_infeasible(llama_of_one: Profile) -> None:
    smallest = ModelPlanner(llama_of_one).minimum(time_limit=600).peak_bytes
    answer: Plan = plan(llama_of_one, smallest - 1, time_limit=600)
    assert answer.status == "infeasible"
    assert answer.minimum_budget_bytes == smallest
    assert plan(llama_of_one, smallest, time_limit=600).peak_bytes == smallest
