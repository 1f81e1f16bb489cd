"""Gradients of several steps that make one update: against one large batch under autograd, at any budget, across an
interruption.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from reference import relative_error, state_of, updates_of_large_batches
from safetensors.torch import load_file
from spilling_plans import spilling_plan
from wide_regression import FACTORY, regression

from tightfit.planner.compare import compare
from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.plan import plan
from tightfit.planner.report.explain import explain
from tightfit.planner.report.summary import profile_summary
from tightfit.planner.solve.policies import APPROXIMATE, approximate_of, refused_of
from tightfit.profiles.api import profile
from tightfit.profiles.devices.data_sheets import find_device
from tightfit.profiles.devices.estimate import estimate_profile
from tightfit.profiles.schema import MOBILLM, Profile, adamw
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.kernels.optimizer import AdamW, GradientUpdate
from tightfit.runtime.session.launch import run
from tightfit.runtime.session.settings import _sorts
from tightfit.runtime.supervision.report import _typical

TOGETHER, STEPS, LR = 3, 12, 5e-3
ROWS = [
    {"prompt": "Is the fox quick? ", "completion": "positive"},
    {"prompt": "lazy dog? ", "completion": "negative, it is not"},
    {"prompt": "over ", "completion": "12"},
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


@pytest.fixture(scope="module")
def whole(decoder: Profile, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run at the smallest budget."""
    out = tmp_path_factory.mktemp("whole")
    smallest = spilling_plan(decoder)
    report = run(smallest, data, steps=STEPS, out=out, lr=LR, schedule="linear", packing=False)
    assert report["peak_bytes"]["measured"] <= smallest.peak_bytes
    return out, report


def test_updates_are_those_of_one_large_batch(decoder: Profile, whole: tuple[Path, dict[str, Any]]) -> None:
    out, report = whole
    adamw_of = partial(torch.optim.AdamW, weight_decay=0.0)
    rates = [LR * (1 - update / (STEPS // TOGETHER)) for update in range(STEPS // TOGETHER)]  # linear decay, by updates
    losses, _, trained = updates_of_large_batches(decoder, out, STEPS, adamw_of, rates=rates)
    assert report["loss"] == pytest.approx(losses, rel=2e-5)
    found = state_of(out, STEPS)
    for name, expected in trained.items():
        own = found[f"base_model.model.{name}"]
        assert relative_error(own, expected) < 1e-3, name
        assert not found[f"grad_sum:{name}"].any(), name


def test_a_run_does_not_go_on_with_another_number_of_steps_an_update(
    decoder: Profile, data: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    part = tmp_path / "part"
    shutil.copytree(whole[0], part)
    other = plan(decoder.model_copy(update={"optimizer": {**decoder.optimizer, "accumulate": 2}}), 1 << 40)
    with pytest.raises(InputError, match="made with 3 steps to an update, this run has 2"):
        run(other, data, steps=STEPS, out=part, lr=LR, schedule="linear", packing=False, resume=True)


@pytest.mark.slow
def test_batches_of_a_module_count_alike(tmp_path: Path) -> None:
    """At the smallest budget, where sums go to disk and come back like any other state."""
    made = profile(FACTORY, accumulate=2)
    torch.manual_seed(6)
    batches = [(torch.randn(4, 256), torch.randn(4, 256)) for _ in range(6)]
    smallest = plan(made, ModelPlanner(made).minimum().peak_bytes)
    assert "offloaded" in {place for name, place in smallest.decisions.items() if name.startswith("grad_sum:")}
    # What has no length is asked for as many as there are steps.
    report = run(smallest, chain(batches, repeat(batches[0])), steps=6, out=tmp_path, lr=LR)
    module, _ = regression()
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, weight_decay=0.0)
    losses = []
    for first, second in zip(batches[::2], batches[1::2]):
        optimizer.zero_grad()
        both = [module(*first), module(*second)]
        losses += [float(loss.detach()) for loss in both]
        (sum(both) / 2).backward()
        optimizer.step()
    assert report["loss"] == pytest.approx(losses, rel=1e-5)
    for name, value in load_file(tmp_path / "model" / "model.safetensors").items():
        # Where a gradient is all but zero, Adam's quotient is of any size.
        apart = ~torch.isclose(value, module.state_dict()[name], rtol=1e-3, atol=1e-5)
        assert float(apart.float().mean()) < 2e-3, name


def test_a_warmup_that_ends_within_an_update_never_exceeds_the_rate() -> None:
    uneven = AdamW(lr=LR, schedule="linear", warmup_steps=6, total_steps=40)
    rates = [uneven.rate(step, 4) for step in range(4, 41, 4)]
    assert rates[0] == pytest.approx(LR * 4 / 6)
    assert rates[1] == LR
    assert rates[1:] == sorted(rates[1:], reverse=True)


@pytest.mark.parametrize("accumulate", [2, 8])
def test_the_typical_step_is_the_mean_over_an_update(accumulate: int, decoder: Profile) -> None:
    """One of several steps moves trained tensors, which takes longer; what is out of the ordinary does not count."""
    planned = plan(decoder.model_copy(update={"optimizer": adamw(accumulate)}), 1 << 40)
    taken = [3.0 if (step + 1) % accumulate == 0 else 1.0 for step in range(4 * accumulate)]
    taken[0] = taken[accumulate] = 9.0
    assert _typical(taken, 0, _sorts(planned)) == pytest.approx((accumulate + 2) / accumulate)
    assert _typical(taken[3:], 3, _sorts(planned)) == pytest.approx((accumulate + 2) / accumulate)
    assert _typical([], 0, _sorts(planned)) is None


@pytest.mark.parametrize(
    "optimizer",
    [
        {"state_tensors": 3, "accumulate": 0},
        {"state_tensors": 3, "accumulate": -4},
        {"state_tensors": 3, "accumulate": 2.5},
        {"state_tensors": 3, "accumulate": "abc"},
        {"state_tensors": 3, "accumulate": None},
        {"state_tensors": 3, "accumulate": 10**12},
        {"state_tensors": 2, "accumulate": 4},
        {"accumulate": 4},
        {"state_tensors": 3},
        {"state_tensors": -1},
    ],
)
def test_an_optimizer_that_is_none_is_refused_by_name(optimizer: dict[str, Any], decoder: Profile) -> None:
    edited = decoder.model_dump() | {"optimizer": {"name": "adamw", **optimizer}}
    with pytest.raises(ValidationError, match=r"optimizer[\s\S]*(accumulate|state_tensors) is"):
        Profile.model_validate(edited)


def test_more_steps_than_anyone_sums_are_refused() -> None:
    with pytest.raises(InputError, match="accumulate 1000000000000: it should be less than or equal to 65536"):
        profile(FACTORY, accumulate=10**12)


def test_what_is_labelled_nowhere_has_no_gradient() -> None:
    update = GradientUpdate(AdamW(lr=LR), accumulate=2)
    parameter, gradient, *states = (torch.ones(8), *(torch.zeros(8) for _ in range(4)))
    for step in (1, 2):
        update.begin(step, 0)
        update.apply(step, parameter, gradient, *states)
    assert torch.equal(parameter, torch.ones(8))


class Loader:
    """As a DataLoader over a data set of unknown length: asked for one, it raises TypeError."""

    def __len__(self) -> int:
        raise TypeError("object of type 'Numbers' has no len()")

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        return repeat((torch.zeros(4, 256), torch.zeros(4, 256)))


@pytest.mark.slow
def test_what_has_no_length_is_cut_to_the_steps_and_says_so(tmp_path: Path) -> None:
    planned = plan(profile(FACTORY, accumulate=2), 1 << 40)
    told: list[str] = []
    run(
        planned,
        Loader(),
        steps=2,
        out=tmp_path,
        stages=lambda what, done, total: told.append(f"{what} {done} of {total}"),
    )
    assert told == ["writing batches down 1 of 1", "writing batches down 2 of 2"]
    with pytest.raises(
        InputError, match=r"the batches given \(the first 4 of an iterator without a length; give a list"
    ):
        run(planned, Loader(), steps=4, out=tmp_path, resume=True)


def test_steps_that_leave_an_update_unfinished_are_refused(decoder: Profile, data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="steps 10: an update takes 3 steps, as profiled; give a multiple, for example 9"
    ):
        run(plan(decoder, 1 << 40), data, steps=10, out=tmp_path / "out")
    with pytest.raises(InputError, match="for example 3"):
        run(plan(decoder, 1 << 40), data, steps=2, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("policy", ["mezo", "lcsb"])
def test_rules_that_move_tensors_after_every_step_are_refused(policy: str, decoder: Profile) -> None:
    with pytest.raises(InputError, match=f"{policy} moves trained tensors after every step.*gradients of 3"):
        plan(decoder, 1 << 40, policy=policy)
    with pytest.raises(InputError, match=f"{policy} moves trained tensors after every step.*gradients of 3"):
        compare(decoder, [1 << 40], policies=[policy])


def test_each_rule_of_another_gradient_is_either_offered_or_refused(decoder: Profile) -> None:
    alone = decoder.model_copy(update={"optimizer": adamw()})
    assert (approximate_of(alone), refused_of(alone)) == ((*APPROXIMATE, MOBILLM), {})
    assert (approximate_of(decoder), list(refused_of(decoder))) == ((MOBILLM,), list(APPROXIMATE))


def test_it_is_said_and_costs_memory_and_time(decoder: Profile) -> None:
    facts = profile_summary(decoder)
    assert facts["accumulate"] == TOGETHER
    assert facts["state_bytes"] == 3 * facts["trainable_bytes"]
    made = plan(decoder, 1 << 40)
    assert any(f"gradients of {TOGETHER} steps make one update" in line for line in explain(made))
    alone = decoder.model_copy(update={"optimizer": {"name": "adamw", "state_tensors": 2}})
    assert made.arena_bytes - plan(alone, 1 << 40).arena_bytes >= facts["trainable_bytes"]
    seconds = {}
    for profiled in (alone, decoder):
        estimated = estimate_profile(profiled, find_device("phone"))
        seconds[profiled.accumulate] = sum(t.update_seconds for t in estimated.tensors)
    # Three passes for each sum, and ten of them for the update of three steps, where one alone has seven.
    assert 0.6 < seconds[TOGETHER] / seconds[1] < 2.2
