"""Plans for optimizers other than AdamW: their states, seconds and words, and what is refused."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from decisions import figures_of_decisions
from pydantic import ValidationError
from sample_plans import sample_plan
from synthetic import SLICE, decoder_like, tables

from tightfit.planner.compare import compare
from tightfit.planner.instructions import Fetch, Spill
from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.plan import minimum_budget, plan, policies_of
from tightfit.planner.problem.build_layers import layered
from tightfit.planner.problem.clipping import clipped
from tightfit.planner.problem.optimizers import ADAFACTOR_BYTES, with_optimizer
from tightfit.planner.problem.step_graph import STATE_PREFIXES, state_bytes
from tightfit.planner.problem.tensor_index import TensorIndex
from tightfit.planner.report.explain import explain
from tightfit.planner.report.summary import plan_summary, update_words
from tightfit.planner.schema import Phase, Plan
from tightfit.planner.simulation.simulate import simulate
from tightfit.profiles.schema import EXCHANGE, OPTIMIZER_STATES, Profile, Tensor, adamw
from tightfit.runtime.common.errors import InputError

PASSES = {"adamw": 7, "adam": 7, "sgd": 3, "momentum": 5, "lion": 5, "adafactor": 24}
"""gradient and parameter are read, the parameter is written, each state is read and written; Adafactor takes as long as
so many
"""
ROWS = 1024
"""of a slice, where it is a matrix"""


def matrices(count: int, **said: Any) -> Profile:
    """A step that trains matrices as large as slices of tables."""
    profile = tables(count, **said)
    shape = [ROWS, SLICE // 4 // ROWS]
    tensors = [t.model_copy(update={"shape": shape}) if t.kind == "trainable" else t for t in profile.tensors]
    return profile.model_copy(update={"tensors": tensors})


@pytest.mark.parametrize("name", OPTIMIZER_STATES)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("limit", [None, 1.0])
def test_plans_have_the_states_of_their_optimizer(name: str, steps: int, limit: float | None) -> None:
    profile = tables(3).model_copy(update={"optimizer": adamw(steps)})
    made = plan(profile, 1 << 40, optimizer=name, max_grad_norm=limit)
    simulate(made)
    summed = steps > 1 or limit is not None
    states = [one for one in made.resident if one.startswith(STATE_PREFIXES)]
    roles = (*OPTIMIZER_STATES[name], *(["grad_sum"] if summed else []))
    assert sorted(states) == sorted(f"{role}:table[{at}.0]" for role in roles for at in range(3))
    assert made.bound_seconds <= made.step_seconds
    assert made.status == "optimal"
    assert plan_summary(made)["optimizer"] == name


@pytest.mark.slow
def test_fewer_states_fit_less_memory() -> None:
    least = {name: ModelPlanner(with_optimizer(tables(3), name)).minimum().peak_bytes for name in OPTIMIZER_STATES}
    assert least["adam"] == least["adamw"]
    assert least["momentum"] == least["lion"] == pytest.approx(least["adamw"] - SLICE, abs=SLICE // 8)
    assert least["sgd"] < least["lion"]


def test_means_of_rows_and_columns_fit_less_memory_than_adamws_moments() -> None:
    """Where matrices are trained, one mean for each row and column is all that is left of two moments; of vectors, one
    state is.
    """
    factored = (ROWS + SLICE // 4 // ROWS) * 4
    usual, made = ModelPlanner(matrices(3)), ModelPlanner(with_optimizer(matrices(3), "adafactor"))
    saved = usual.minimum().peak_bytes - made.minimum().peak_bytes
    assert saved == pytest.approx(2 * SLICE - factored - ADAFACTOR_BYTES, abs=SLICE // 8)
    vectors = ModelPlanner(with_optimizer(tables(3), "adafactor")).minimum().peak_bytes
    assert vectors > made.minimum().peak_bytes + SLICE // 2
    # With ample memory all states stay there.
    roomy = [planner.plan(1 << 40) for planner in (usual, made)]
    assert roomy[0].arena_bytes - roomy[1].arena_bytes == pytest.approx(3 * (2 * SLICE - factored), abs=SLICE // 8)
    index = TensorIndex(roomy[1])
    assert {index.tensors[f"adafactor_v:table[{at}.0]"].bytes for at in range(3)} == {factored}


@pytest.mark.parametrize("shape", [[], [7], [6, 5], [4, 6, 5], [3, 2, 5, 4], [9, 8, 1, 1]])
def test_the_bytes_of_a_state_are_those_of_torchs(shape: list[int]) -> None:
    parameter = torch.nn.Parameter(torch.ones(shape))
    parameter.grad = torch.ones(shape)
    optimizer = torch.optim.Adafactor([parameter])
    optimizer.step()
    kept = [one for name, one in optimizer.state[parameter].items() if name != "step"]
    tensor = Tensor(name="p", kind="trainable", shape=shape, dtype="float32", bytes=parameter.numel() * 4)
    assert state_bytes("adafactor_v", tensor) == sum(one.nbytes for one in kept if one is not None)
    assert state_bytes("adam_m", tensor) == tensor.bytes


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("limit", [None, 1.0])
def test_states_of_several_sizes_are_moved_by_their_own_bytes(steps: int, limit: float | None) -> None:
    """At the smallest budget all states are on disk; a step moves each of them once in both directions, counted by
    hand.
    """
    profile = matrices(3, movable=False).model_copy(update={"optimizer": adamw(steps)})
    wanted = with_optimizer(profile, "adafactor")
    planner = ModelPlanner(wanted if limit is None else clipped(wanted, limit))
    made = planner.plan(planner.minimum().peak_bytes)
    simulate(made)
    assert not [one for one in made.resident if one.startswith(STATE_PREFIXES)]
    factored = (ROWS + SLICE // 4 // ROWS) * 4
    assert made.train is not None
    moved = states_moved(made, made.train)
    if limit is None:
        whole = 3 * (factored + (SLICE if steps > 1 else 0))
        assert moved == (whole, whole)
        return
    assert made.update is not None
    assert moved == (3 * SLICE if steps > 1 else 0, 3 * SLICE)
    assert states_moved(made, made.update) == (3 * (SLICE + factored), 3 * factored)


def states_moved(made: Plan, phase: Phase) -> tuple[int, int]:
    """Bytes that a schedule reads and writes as its plan says, less those of activations that it moves."""
    values = {value.name: value.bytes for program in made.programs for value in program.values}
    values |= {tensor.name: tensor.bytes for tensor in made.tensors}

    def others(verb: type[Fetch | Spill]) -> int:
        names = [one.tensor for one in phase.instructions if isinstance(one, verb)]
        return sum(values[name.rpartition("/")[2]] for name in names if not name.startswith(STATE_PREFIXES))

    return phase.read_bytes - others(Fetch), phase.write_bytes - others(Spill)


def test_a_table_that_is_trained_in_slices_is_refused() -> None:
    profile = matrices(1)
    model = profile.model.model_copy(update={"tables": {"lm_head": "lm_head.weight"}})
    with pytest.raises(
        InputError, match="optimizer adafactor: lm_head is trained in slices, and its step needs means over"
    ):
        plan(profile.model_copy(update={"model": model}), 1 << 40, optimizer="adafactor")


def test_measured_seconds_of_adafactor_are_those_of_its_plans() -> None:
    tensor = Tensor(
        name="table[0.0]",
        kind="trainable",
        shape=[1],
        dtype="float32",
        bytes=4,
        update_seconds=7.0,
        clipped_seconds=9.0,
        adafactor_seconds=40.0,
    )
    profile = tables(1).model_copy(update={"tensors": [tensor]})
    found = with_optimizer(profile, "adafactor").tensors[0]
    assert (found.update_seconds, found.clipped_seconds) == (40.0, 42.0)
    shared = tensor.model_copy(update={"update_seconds": 3 + (7 + 3) / 4})
    several = profile.model_copy(update={"optimizer": adamw(4), "tensors": [shared]})
    assert with_optimizer(several, "adafactor").tensors[0].update_seconds == pytest.approx(3 + (40 + 3) / 4)
    assert with_optimizer(profile, "lion").tensors[0].update_seconds == pytest.approx(5.0)


@pytest.mark.parametrize("name", ["sgd", "lion", "adafactor"])
@pytest.mark.parametrize("limit", [None, 1.0])
def test_the_layer_model_says_what_the_layers_schedule_does(name: str, limit: float | None) -> None:
    rng = random.Random(0)
    made = with_optimizer(matrices(2, in_layer=2), name)
    for kind in layered(made if limit is None else clipped(made, limit)).types:
        for _, told, counted in figures_of_decisions(rng, kind, 6):
            assert told == pytest.approx(counted, rel=1e-6, abs=1e-5)


@pytest.mark.parametrize("name", PASSES)
def test_seconds_follow_from_the_bytes_that_are_touched(name: str) -> None:
    tensor = Tensor(
        name="table[0.0]",
        kind="trainable",
        shape=[1],
        dtype="float32",
        bytes=4,
        update_seconds=7.0,
        clipped_seconds=9.0,
    )
    profile = tables(1).model_copy(update={"tensors": [tensor]})
    found = with_optimizer(profile, name).tensors[0]
    assert found.update_seconds == pytest.approx(PASSES[name])
    assert found.clipped_seconds == pytest.approx(PASSES[name] + 2)
    # With four steps to an update each adds to the sum; the last divides and zeroes it besides.
    shared = tensor.model_copy(update={"update_seconds": 3 + (7 + 3) / 4})
    several = profile.model_copy(update={"optimizer": adamw(4), "tensors": [shared]})
    assert with_optimizer(several, name).tensors[0].update_seconds == pytest.approx(3 + (PASSES[name] + 3) / 4)


def test_the_profiles_own_optimizer_changes_nothing() -> None:
    profile = decoder_like(2, tokens=64, hidden=96, ffn=192, slices=3)
    one, other = plan(profile, 1 << 40), plan(profile, 1 << 40, optimizer="adamw")
    assert one.fingerprint == other.fingerprint


def test_a_plan_says_which_optimizer_updates() -> None:
    made = plan(tables(2), 1 << 40, optimizer="lion")
    assert any("updates by lion, which has one state of each trained tensor" in sentence for sentence in explain(made))
    assert not any("updates by" in sentence for sentence in explain(plan(tables(2), 1 << 40)))
    made = plan(matrices(2), 1 << 40, optimizer="adafactor")
    assert any("updates by adafactor, which has a mean for each row and each column" in one for one in explain(made))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "limit"), [("lion", None), ("sgd", 1.0), (None, 1.0)])
def test_comparisons_and_the_smallest_budget_are_of_the_same_step_as_plans(
    name: str | None, limit: float | None
) -> None:
    """Every rule, too, has the states, the seconds and the smallest budget of a plan with this optimizer and
    clipping.
    """
    profile = matrices(3)
    chosen: dict[str, Any] = {"optimizer": name, "max_grad_norm": limit}
    least = minimum_budget(profile, **chosen)
    assert plan(profile, least, **chosen).fits
    assert not plan(profile, least - 1, **chosen).fits
    rules = policies_of(profile)
    found = compare(profile, [least, 1 << 40], **chosen)
    assert found.policies == ["solver", *rules]
    for policy in rules:
        mine = plan(profile, 1 << 40, policy=policy, **chosen)
        theirs = found.plan(1 << 40, policy)
        assert theirs.optimizer == mine.optimizer == with_choice(profile, name, limit).optimizer
        assert (theirs.step_seconds, theirs.peak_bytes) == (mine.step_seconds, mine.peak_bytes)
        assert theirs.max_grad_norm == limit
        needs = minimum_budget(profile, policy=policy, **chosen)
        assert plan(profile, needs, policy=policy, **chosen).fits
        assert needs >= least
        usual = plan(profile, 1 << 40, policy=policy)
        assert theirs.step_seconds != usual.step_seconds
    assert (
        update_words(found.plans[0])
        == {
            ("lion", None): "lion",
            ("sgd", 1.0): "sgd, gradients clipped to a norm of 1",
            (None, 1.0): "gradients clipped to a norm of 1",
        }[name, limit]
    )


def with_choice(profile: Profile, name: str | None, limit: float | None) -> Profile:
    made = profile if name is None else with_optimizer(profile, name)
    return made if limit is None else clipped(made, limit)


def test_a_comparison_refuses_rules_with_another_optimizer() -> None:
    with pytest.raises(
        InputError, match="max_grad_norm 1 needs the gradients of all that is trained, which mezo never has"
    ):
        compare(tables(1, movable=False), [1 << 40], ["mezo"], max_grad_norm=1.0)
    with pytest.raises(InputError, match="optimizer sgd: mezo moves along a random direction"):
        compare(tables(1, movable=False), [1 << 40], ["mezo"], optimizer="sgd")


def test_what_is_no_optimizer_or_has_another_is_refused() -> None:
    with pytest.raises(
        InputError, match="optimizer 'adagrad': it should be 'adamw', 'adam', 'sgd', 'momentum', 'lion' or 'adafactor'"
    ):
        plan(tables(1), 1 << 40, optimizer="adagrad")
    with pytest.raises(InputError, match="optimizer sgd: mezo moves along a random direction, by an update of its own"):
        plan(tables(1, movable=False), 1 << 40, optimizer="sgd", policy="mezo")
    with pytest.raises(InputError, match="optimizer sgd: mobillm trains a side network on a server, with AdamW"):
        plan(tables(1), 1 << 40, optimizer="sgd", policy="mobillm")
    member = tables(1).model_copy(update={"optimizer": {"name": EXCHANGE, "state_tensors": 0}})
    with pytest.raises(InputError, match="optimizer sgd: members of fleets train with AdamW"):
        plan(member, 1 << 40, optimizer="sgd")


@pytest.mark.parametrize(
    ("optimizer", "told"),
    [
        ({"name": "sgd", "state_tensors": 1}, "state_tensors is 1; with accumulate 1 it is 0"),
        ({"name": "lion", "state_tensors": 2}, "state_tensors is 2; with accumulate 1 it is 1"),
        ({"name": "lion", "state_tensors": 1, "accumulate": 2}, "state_tensors is 1; with accumulate 2 it is 2"),
    ],
)
def test_a_file_with_other_states_is_refused(optimizer: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        sample_plan(optimizer=optimizer)
