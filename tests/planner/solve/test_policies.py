"""The fixed rules carried out: the exact ones against autograd and each other, MeZO and LCSB against their definitions.

Everything but the last tests runs in this process, on a decoder of five layers with 4-bit weights.
"""

from __future__ import annotations

import hashlib
import itertools

import pytest
import torch
from broken_plans import listed
from in_process import random_records, train
from reference import CONFIGS, all_layers, loss_of, peft_model, relative_error, starting_weights, trained_by_peft
from safetensors.torch import load
from tiny_plans import CONFIG, decoder_profile

from tightfit.planner.compare import compare
from tightfit.planner.cutoff import NEVER
from tightfit.planner.io import load_plan, save_plan
from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.problem.gradients import lcsb_cycle, trained_blocks, two_forwards, without_resting_states
from tightfit.planner.report.explain import explain
from tightfit.planner.schedule.multi_layer_recompute import equal_segments, rerun_layers
from tightfit.planner.schedule.realize import realize
from tightfit.planner.solve.model_search import SearchResult
from tightfit.planner.solve.policies import APPROXIMATE, POLICIES, mebp, rule_columns, smallest
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.training.adapter import initialise, trained_name
from tightfit.runtime.engine.training.batches import open_batches

LAYERS, RANK, SEED = 5, 4, 7
LR = {"mezo": 1e-3}
DEEP = CONFIG | {"num_hidden_layers": LAYERS, "hidden_act": "silu"}
UNLIMITED = 1 << 40


@pytest.fixture(scope="module")
def planner(tmp_path_factory):
    """float32, so that the references may be compared closely."""
    return ModelPlanner(decoder_profile(tmp_path_factory.mktemp("store"), config=DEEP, rank=RANK, dtype="float32"))


@pytest.fixture(scope="module")
def records(tmp_path_factory, planner):
    return random_records(tmp_path_factory.mktemp("data"), seq=planner.profile.seq)


def trained(plan, records, directory, steps):
    """Losses, adapter and optimizer state after some steps."""
    losses, adapter, states = train(plan, records, directory, steps, lr=LR.get(plan.policy, 5e-3), seed=SEED)
    return losses, {trained_name(key): value for key, value in load(adapter).items()}, load(states)


class Reference:
    """transformers + peft on the dequantised weights and the very batches of a run."""

    def __init__(self, profile, records):
        weights = starting_weights(profile, seed=SEED)
        self.names = [t.name for t in profile.tensors if t.kind == "trainable"]
        self.start = {name: weights[name].clone() for name in self.names}
        self.model = peft_model(DEEP, weights, all_layers(RANK, 2.0 * RANK), torch.float32)
        held = trained_by_peft(self.model)
        self.trained = {name: held[name] for name in self.names}
        self.inputs = [torch.empty(profile.batch, profile.seq, dtype=torch.int64) for _ in range(2)]
        self.batches = open_batches(records, SEED)

    def loss(self, step):
        """Of the batch of a step, counted from 1."""
        self.batches.training(step - 1, self.inputs)
        return loss_of(self.model, *self.inputs)


@pytest.fixture
def reference(planner, records):
    made = Reference(planner.profile, records)
    yield made
    made.batches.close()


def test_exact_rules_give_the_same_bits(planner, records, tmp_path):
    seen = []
    for policy in POLICIES:
        (tmp_path / policy).mkdir()
        seen.append(trained(planner.plan(UNLIMITED, policy=policy), records, tmp_path / policy, 3))
    for (losses, *tensors), (others, *more) in itertools.pairwise(seen):
        assert losses == others
        for mine, theirs in zip(tensors, more, strict=True):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_layers_that_go_forward_twice_give_the_same_bits(planner, records, tmp_path):
    """Weights streamed, and everything on disk that can be: what enters a segment is fetched for both passes."""
    problem = planner.problem
    segments = equal_segments(problem, 2)
    assert len(segments) == 2
    losses, *tensors = trained(planner.plan(UNLIMITED, policy="keep-all"), records, tmp_path, 3)
    for rule in (mebp, smallest):
        schedule, _ = realize(problem, rule_columns(problem, rule), UNLIMITED, segments=segments)
        outcome = SearchResult(schedule=schedule, bound_seconds=0.0)
        made = planner._finish(UNLIMITED, "solver", outcome, NEVER)
        assert len(rerun_layers(made)) == 4
        (tmp_path / rule.__name__).mkdir()
        others, *more = trained(made, records, tmp_path / rule.__name__, 3)
        assert losses == others
        for one, other in zip(tensors, more, strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_mesp_decides(planner):
    """No more memory than mebp, bought with unpacking: the same reads and recomputation."""
    mesp, mebp = (planner.plan(UNLIMITED, policy=policy) for policy in ("mesp", "mebp"))
    counted = [[i[0] for i in listed(plan.train)] for plan in (mesp, mebp)]
    assert mesp.arena_bytes <= mebp.arena_bytes
    assert counted[0].count("read") == counted[1].count("read")
    assert counted[0].count("unpack") > counted[1].count("unpack")
    assert counted[0].count("run") == counted[1].count("run")
    assert {d for name, d in mesp.decisions.items() if "lora_down" in name} == {"recomputed"}


def noise(name, step, like):
    """As the runtime promises to draw it."""
    key = hashlib.sha256(f"{SEED}:{step}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    return torch.empty_like(like).normal_(generator=generator)


def test_mezo_is_algorithm_1_of_its_paper(planner, records, reference, tmp_path):
    steps, epsilon, lr = 4, 1e-3, LR["mezo"]
    losses, adapter, states = trained(planner.plan(UNLIMITED, policy="mezo"), records, tmp_path, steps)
    assert states == {}
    expected = []
    with torch.no_grad():
        for step in range(1, steps + 1):
            drawn = {name: noise(name, step, parameter) for name, parameter in reference.trained.items()}
            sides = []
            for times in (1, -2):
                for name, parameter in reference.trained.items():
                    parameter.add_(drawn[name], alpha=times * epsilon)
                sides.append(float(reference.loss(step)))
            slope = (sides[0] - sides[1]) / (2 * epsilon)
            for name, parameter in reference.trained.items():
                parameter.add_(drawn[name], alpha=epsilon)
                parameter.sub_(drawn[name], alpha=lr * slope)
            expected.append(sum(sides) / 2)
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, parameter in reference.trained.items():
        moved = parameter.detach() - reference.start[name]
        assert float(moved.norm()) > 1e-4
        assert relative_error(adapter[name] - reference.start[name], moved) < 1e-2, name


def test_a_mezo_step_of_rate_zero_restores_every_trainable(planner, records, tmp_path, monkeypatch):
    monkeypatch.setitem(LR, "mezo", 0.0)
    _, adapter, _ = trained(planner.plan(UNLIMITED, policy="mezo"), records, tmp_path, 2)
    for name, value in adapter.items():
        start = torch.empty_like(value)
        initialise(name, SEED, start)
        assert torch.allclose(value, start, atol=1e-7), name


def pass_by(layer):
    """The layer's result, with the identity for a derivative."""
    forward = layer.forward

    def changed(hidden, *arguments, **options):
        with torch.no_grad():
            made = forward(hidden, *arguments, **options)
        assert isinstance(made, torch.Tensor)
        return hidden + (made - hidden).detach()

    return forward, changed


def test_lcsb_is_autograd_with_skipped_layers_as_identities(planner, records, reference, tmp_path):
    """Two whole cycles; torch.optim.AdamW leaves alone what has no gradient, its step count included."""
    plan = planner.plan(UNLIMITED, policy="lcsb")
    assert [len(step.skipped) for step in plan.steps] == [4, 4, 4, 3]
    steps = 2 * len(plan.steps)
    losses, adapter, moments = trained(plan, records, tmp_path, steps)
    layers = reference.model.base_model.model.model.layers
    optimizer = torch.optim.AdamW(reference.trained.values(), lr=5e-3, weight_decay=0.0)
    expected, trained_layers = [], []
    for step in range(1, steps + 1):
        position = (step - 1) % 4
        chosen = range(position * LAYERS // 4, (position + 1) * LAYERS // 4)
        trained_layers.append(set(chosen))
        kept = {}
        for index, layer in enumerate(layers):
            if index not in chosen:
                kept[index], layer.forward = pass_by(layer)
        loss = reference.loss(step)
        loss.backward()
        for index, forward in kept.items():
            layers[index].forward = forward
        expected.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert set().union(*trained_layers) == set(range(LAYERS))
    assert losses == pytest.approx(expected, rel=2e-5)
    for name, parameter in reference.trained.items():
        state = optimizer.state[parameter]
        assert relative_error(moments[f"adam_m:{name}"], state["exp_avg"]) < 2e-3, name
        assert relative_error(adapter[name], parameter.detach()) < 1e-2, name


def test_lcsb_reads_no_weight_in_the_backward_of_a_skipped_layer(planner):
    plan = planner.plan(UNLIMITED, policy="lcsb")
    for step in plan.steps:
        reads = [i[1] for i in listed(step) if i[0] == "read"]
        for index in range(LAYERS):
            own = [name for name in reads if name.startswith(f"model.layers.{index}.")]
            again = len(own) - len(set(own))
            assert (again == 0) == (f"model.layers.{index}" in step.skipped)
        backward = {i[1] for i in listed(step) if i[0] == "update"}
        assert not any(name.startswith(f"{layer}.") for name in backward for layer in step.skipped)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3_text"])
def test_every_family_has_residuals(family, tmp_path):
    profile = decoder_profile(tmp_path, config=CONFIGS[family], batch=1, seq=8)
    blocks = trained_blocks(profile)
    assert len(blocks) == CONFIGS[family]["num_hidden_layers"]
    steps = lcsb_cycle(profile, positions=len(blocks))
    assert [len(step.passages) for step in steps] == list(
        reversed(range(len(blocks)))
    )  # from the head down to its block
    assert all(len(step.skipped) == len(blocks) - 1 for step in steps)


@pytest.mark.slow_but_for("mezo")
@pytest.mark.parametrize("policy", APPROXIMATE)
def test_approximate_rules_are_planned_like_any_other(planner, policy):
    made = planner.plan(UNLIMITED, policy=policy)
    assert (made.policy, made.status, made.exact) == (policy, "feasible", False)
    assert made.step_seconds == pytest.approx(sum(s.seconds for s in made.steps) / len(made.steps))
    said = explain(made)[1]
    assert said.startswith(
        {"mezo": "two forwards and no", "lcsb": "a cycle of 4 steps: a backward through 1 / 1 / 1 / 2 of 5"}[policy]
    )
    smallest = planner.minimum(policy=policy).peak_bytes
    assert planner.plan(smallest, policy=policy).peak_bytes == smallest
    assert planner.plan(smallest - 1, policy=policy).minimum_budget_bytes == smallest


@pytest.mark.slow
def test_another_gradient_is_compared_only_where_it_is_named(planner, tmp_path):
    profile = planner.profile
    assert compare(profile, [UNLIMITED], ["keep-all"]).plan(UNLIMITED, "keep-all").exact
    assert not set(APPROXIMATE) & set(planner.policies())
    named = compare(profile, [UNLIMITED], ["keep-all", *APPROXIMATE])
    for policy in APPROXIMATE:
        made = named.plan(UNLIMITED, policy)
        assert load_plan(save_plan(made, tmp_path / policy)) == made
        assert made.bound_seconds <= made.step_seconds
    with pytest.raises(InputError, match=r"no policy is called 'zomb'; choose from solver, .*, mesp, mezo, lcsb"):
        compare(profile, [UNLIMITED], ["zomb"])


def test_mezo_needs_something_to_move(planner):
    frozen = [
        t.model_copy(update={"kind": "constant"}) if t.kind == "trainable" else t for t in planner.profile.tensors
    ]
    with pytest.raises(InputError, match=r"mezo moves trained tensors and .* has none; choose another policy"):
        two_forwards(planner.profile.model_copy(update={"tensors": frozen}))


def test_no_bound_of_a_cycle_counts_states_at_rest(planner):
    """Optimizer states of resting layers may lie on disk: room for them changes no bound."""
    part = next(part for part in planner._cycle_of("lcsb") if part.skipped)
    free = without_resting_states(part.problem.profile)
    gone = {t.name for t in part.problem.profile.tensors} - {t.name for t in free.tensors}
    assert gone
    assert all(name.startswith(("adam_m:", "adam_v:")) for name in gone)
    budget = planner.minimum_bytes(policy="lcsb")
    assert planner.plan(budget, policy="lcsb").any_schedule_bound_seconds <= planner._any_bound(
        budget - 1, "lcsb", NEVER
    )
