"""Runs that clip gradients by the norm of all of them: against transformers + peft, autograd and `clip_grad_norm_`, at
two budgets, across an interruption.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import relative_error, state_of, updates_of_large_batches
from safetensors.torch import load_file
from spilling_plans import spilling_plan
from wide_regression import FACTORY, regression

from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.plan import plan
from tightfit.planner.problem.clipping import clipped
from tightfit.planner.schema import Plan
from tightfit.profiles.api import profile
from tightfit.profiles.schema import Profile, adamw
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.kernels.optimizer import AdamW, ClippedUpdate, GradientUpdate
from tightfit.runtime.session.launch import run
from tightfit.runtime.session.session import Session

STEPS, LR = 12, 5e-3
TOGETHER, LIMIT = 3, 0.4
"""steps of an update, and a limit above some of the norms and below others"""
ROWS = [
    {"prompt": "Is the fox quick? ", "completion": "positive"},
    {"prompt": "lazy dog? ", "completion": "negative, it is not"},
    {"text": "The quick brown fox jumps over the lazy dog."},
]


@pytest.fixture(scope="module")
def decoder(llama_of_one: Profile) -> Profile:
    return llama_of_one.model_copy(update={"optimizer": adamw(TOGETHER)})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def smallest(made: Profile, limit: float) -> Plan:
    planner = ModelPlanner(clipped(made, limit))
    return planner.plan(planner.minimum().peak_bytes)


@pytest.fixture(scope="module")
def whole(decoder: Profile, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run at the smallest budget, with every checkpoint."""
    out = tmp_path_factory.mktemp("whole")
    made = smallest(decoder, LIMIT)
    report = run(made, data, steps=STEPS, out=out, lr=LR, packing=False, checkpoint_every=2, keep_checkpoints=STEPS)
    assert report["peak_bytes"]["measured"] <= made.peak_bytes
    return out, report


@pytest.mark.slow
def test_updates_are_those_of_peft_clipped_by_pytorch(decoder: Profile, whole: tuple[Path, dict[str, Any]]) -> None:
    out, report = whole
    adamw_of = partial(torch.optim.AdamW, lr=LR, weight_decay=0.0)
    losses, norms, trained = updates_of_large_batches(decoder, out, STEPS, adamw_of, limit=LIMIT)
    assert min(norms) < LIMIT < max(norms)
    assert report["loss"] == pytest.approx(losses, rel=2e-5)
    assert report["grad_norm"] == pytest.approx(norms, rel=1e-4)
    found = state_of(out, STEPS)
    for name, expected in trained.items():
        own = found[f"base_model.model.{name}"]
        assert relative_error(own, expected) < 1e-3, name


def test_norms_are_in_the_metrics_of_each_update_and_the_update_in_the_report(
    whole: tuple[Path, dict[str, Any]],
) -> None:
    out, report = whole
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    told = {line["step"]: line["grad_norm"] for line in lines if "grad_norm" in line}
    assert list(told) == list(range(TOGETHER, STEPS + 1, TOGETHER))
    assert list(told.values()) == report["grad_norm"]
    assert report["max_grad_norm"] == LIMIT
    update = report["phases"]["update"]
    assert 0 < update["peak_bytes"]["measured"] <= update["peak_bytes"]["predicted"]
    assert update["seconds"]["predicted"] > 0
    assert update["seconds"]["measured"] > 0
    assert report["phases"]["train"]["measured_seconds"]["accumulate"] > 0


@pytest.mark.slow
def test_a_run_goes_on_with_the_same_bits_by_a_plan_that_spills(
    decoder: Profile, data: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """From checkpoints at the end of an update and in its midst, which alone hold sums."""
    spilling = spilling_plan(clipped(decoder, LIMIT))
    assert spilling.train.instructions != smallest(decoder, LIMIT).train.instructions
    for step in (4, 6):
        part = tmp_path / str(step)
        shutil.copytree(whole[0], part)
        for later in range(step + 2, STEPS + 1, 2):
            shutil.rmtree(part / f"checkpoint-{later}")
        sums = [tensor for name, tensor in state_of(part, step).items() if "grad_sum:" in name]
        assert any(tensor.any() for tensor in sums) == bool(sums) == bool(step % TOGETHER)
        report = run(spilling, data, steps=STEPS, out=part, lr=LR, packing=False, checkpoint_every=2, resume=True)
        assert report["resumed_step"] == step
        assert (report["loss"], report["grad_norm"]) == (whole[1]["loss"], whole[1]["grad_norm"])
        mine, theirs = state_of(part, STEPS), state_of(whole[0], STEPS)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_run_does_not_go_on_with_another_limit(
    decoder: Profile, data: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    part = tmp_path / "part"
    shutil.copytree(whole[0], part)
    for limit, words in (
        (2.0, "this run is with gradients clipped to 2"),
        (None, "this run is without clipped gradients"),
    ):
        with pytest.raises(
            InputError,
            match=f"was made with gradients clipped to {LIMIT:g}, {words}; resume with the same",
        ):
            run(
                plan(decoder, 1 << 40, max_grad_norm=limit),
                data,
                steps=STEPS,
                out=part,
                lr=LR,
                packing=False,
                resume=True,
            )


@pytest.mark.slow
def test_a_module_in_full_with_its_sums_on_disk(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = profile(FACTORY)
    batches = [(torch.randn(4, 256), torch.randn(4, 256)) for _ in range(6)]
    limit = 0.05
    small = smallest(made, limit)
    assert "offloaded" in {place for name, place in small.decisions.items() if name.startswith("grad_sum:")}
    report = run(small, batches, steps=6, out=tmp_path / "small", lr=LR)
    assert report["peak_bytes"]["measured"] <= small.peak_bytes
    roomy = run(plan(made, 1 << 40, max_grad_norm=limit), batches, steps=6, out=tmp_path / "roomy", lr=LR)
    files = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("small", "roomy")]
    assert files[0] == files[1]
    assert report["grad_norm"] == roomy["grad_norm"]
    module, _ = regression()
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, weight_decay=0.0)
    losses, norms = [], []
    for batch in batches:
        optimizer.zero_grad()
        loss = module(*batch)
        loss.backward()
        losses.append(float(loss.detach()))
        norms.append(float(torch.nn.utils.clip_grad_norm_(module.parameters(), limit)))
        optimizer.step()
    assert min(norms) > limit
    assert report["loss"] == pytest.approx(losses, rel=1e-5)
    assert report["grad_norm"] == pytest.approx(norms, rel=1e-4)
    for name, value in load_file(tmp_path / "small" / "model" / "model.safetensors").items():
        torch.testing.assert_close(value, module.state_dict()[name], rtol=1e-3, atol=1e-5)
    with Session(plan(made, 1 << 40, max_grad_norm=limit), out=tmp_path / "session", lr=LR) as session:
        assert [session.step(*batch) for batch in batches] == report["loss"]


# --- the arithmetic ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("limit", [0.3, 1e6])
def test_sums_and_scales_are_those_of_pytorch(accumulate: int, limit: float) -> None:
    """Shapes of several pieces and of none that is whole; weights of steps that differ; gradients in any order."""
    torch.manual_seed(accumulate)
    shapes = [(3, 5), (20_001,), (128, 64), ()]
    ours = [torch.randn(shape) for shape in shapes]
    theirs = [torch.nn.Parameter(value.clone()) for value in ours]
    states = [[torch.zeros(shape) for _ in range(2)] + [torch.full(shape, torch.nan)] for shape in shapes]
    update = ClippedUpdate(AdamW(lr=1e-2), limit, accumulate)
    optimizer = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.0)
    weights = [5.0, 2.0, 9.0][:accumulate]
    for number in range(1, 4):
        for parameter in theirs:
            parameter.grad = torch.zeros_like(parameter)
        for at, weight in enumerate(weights, 1):
            step = (number - 1) * accumulate + at
            update.begin(step, weight)
            gradients = [torch.randn(shape) for shape in shapes]
            order = torch.randperm(len(shapes)).tolist()
            for one in order:
                update.add(gradients[one], states[one][2])
                assert theirs[one].grad is not None
                theirs[one].grad.add_(gradients[one], alpha=weight / sum(weights))
            assert update.due == (at == accumulate)
            assert update.sums != update.due
        expected = torch.nn.utils.clip_grad_norm_(theirs, limit)
        assert update.norm() == pytest.approx(float(expected), rel=1e-6)
        for value, (first, second, total) in zip(ours, states):
            update.apply_sum(number * accumulate, value, first, second, total)
        optimizer.step()
    for value, parameter in zip(ours, theirs):
        torch.testing.assert_close(value, parameter.detach(), rtol=1e-5, atol=1e-6)


def test_the_norm_does_not_depend_on_the_order_of_gradients() -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(1000) * 10.0**power for power in (-6, 3, 0, -2, 5)]
    norms = set()
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        update = ClippedUpdate(AdamW(), 1.0)
        update.begin(1)
        for one in order:
            update.add(gradients[one], torch.empty(1000))
        norms.add(update.norm())
    assert len(norms) == 1


def test_a_single_gradient_below_the_limit_updates_as_without_one() -> None:
    torch.manual_seed(0)
    start, gradient = torch.randn(77), torch.randn(77)
    plain, limited = start.clone(), start.clone()
    update = GradientUpdate(AdamW(lr=LR))
    update.begin(1, 7)
    update.apply(1, plain, gradient, torch.zeros(77), torch.zeros(77))
    clipping = ClippedUpdate(AdamW(lr=LR), 1e6)
    clipping.begin(1, 7)
    total = torch.empty(77)
    clipping.add(gradient, total)
    clipping.norm()
    clipping.apply_sum(1, limited, torch.zeros(77), torch.zeros(77), total)
    assert torch.equal(plain, limited)
