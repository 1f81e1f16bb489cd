"""What runs where no backward follows: the loss head without its gradient, in evaluations and in MeZO's two
forwards.
"""

from __future__ import annotations

import pytest
import torch
from broken_plans import listed
from changed_operators import with_operators
from in_process import make_training, random_records
from interpreter import run_inference, run_step
from safetensors.torch import load_file
from tiny_plans import CONFIG, decoder_profile
from traced import interpret, random_batch, random_weights, trace_decoder

from tightfit.planner.formulation.layer_constraints import LayerProgram
from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.problem.build_layers import layered
from tightfit.planner.problem.gradients import two_forwards
from tightfit.planner.problem.layer_figures import FIELDS
from tightfit.planner.problem.layer_types import WeightMode
from tightfit.planner.schedule.layer_schedule import Decision, measure
from tightfit.planner.simulation.simulate import InvalidSchedule, simulate
from tightfit.planner.solvers.lp import Linear, LinearProgram
from tightfit.profiles.devices.data_sheets import find_device
from tightfit.profiles.devices.estimate import estimate_profile
from tightfit.runtime.common.errors import InputError

UNLIMITED = 1 << 40
MIB = 1 << 20
WIDE = CONFIG | {"vocab_size": 60_000}
"""two slices of the head"""


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    return decoder_profile(tmp_path_factory.mktemp("store"), config=WIDE)


@pytest.fixture(scope="module")
def records(tmp_path_factory, profile):
    return random_records(tmp_path_factory.mktemp("data"), seq=profile.seq)


def head(profile):
    """The head's program."""
    return next(program for program in profile.programs if program.name == profile.layers[-1].program)


def without_inference(profile):
    """The profile as it was before operators for inference: the forward stands in for them."""
    programs = [
        program.model_copy(update={"operators": [o for o in program.operators if o.phase != "inference"]})
        for program in profile.programs
    ]
    return profile.model_copy(update={"programs": programs})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_the_same_to_the_bit(dtype):
    """Over several slices of the vocabulary and several blocks of tokens, some of them unlabelled."""
    batch, seq = 3, 100
    traced = trace_decoder(WIDE, dtype, batch, seq)
    weights, data = random_weights(WIDE, dtype), random_batch(WIDE, batch, seq)
    trained = interpret(traced, weights, data, run_step)
    judged = interpret(traced, weights, data, run_inference)
    assert {name for name in judged if name.startswith("head/inference.head_chunk")} >= {
        "head/inference.head_chunk_1.0"
    }
    assert not torch.isnan(judged[traced.loss])
    for name in (traced.loss, traced.token_losses):
        assert torch.equal(trained[name], judged[name])


@pytest.mark.slow
def test_half_of_the_heads_arithmetic_and_none_of_its_gradients_memory(profile):
    program = head(profile)
    ahead = [operator for operator in program.operators if operator.phase == "forward"]
    judged = [program.operators[position] for position in program.inference]
    assert all(operator.phase == "inference" for operator in judged)
    assert sum(o.flops for o in judged) == sum(o.flops for o in ahead) / 2 > 0
    assert [operator.target for operator in ahead if operator.gathers] == ["tightfit.head_rows"]
    assert not any(operator.gathers for operator in judged)
    values = {value.name: value for value in program.values}
    tokens, hidden = values["in0"].shape
    states = {o.outputs[0] for o in judged if o.target in {"tightfit.head_begin", "tightfit.head_chunk"}}
    assert {tuple(values[name].shape) for name in states} == {(tokens, 3)}
    as_large = {o.target for o in judged for name in o.outputs if values[name].shape == [tokens, hidden]}
    assert as_large == {"tightfit.rms_norm"}


def ran(phase, plan, layer):
    """Operators of a layer that the phase runs, in order."""
    programs = {program.name: program for program in plan.programs}
    operators = programs[next(one.program for one in plan.layers if one.name == layer)].operators
    return [operators[i[2]] for i in listed(phase) if i[0] == "run" and i[1] == layer]


def test_mezo_is_planned_with_half_the_heads_time(profile):
    """Times by FLOPs alone: of a device that moves bytes at once."""
    on = find_device("zen4-2core").model_copy(update={"bytes_per_second": 1e18, "call_seconds": 0.0})
    estimated = estimate_profile(profile, on)
    layer = profile.layers[-1].name
    mezo, exact = (ModelPlanner(estimated).plan(UNLIMITED, policy=policy) for policy in ("mezo", "keep-all"))
    full, forwards = (
        sum(
            operator.seconds
            for operator in ran(plan.train, plan, layer)
            if "head_" in operator.target and not operator.gathers
        )
        for plan in (exact, mezo)
    )
    assert forwards / 2 == pytest.approx(full / 2, rel=1e-6)
    assert mezo.train.compute_seconds == pytest.approx(
        sum(operator.seconds for one in mezo.layers for operator in ran(mezo.train, mezo, one.name)), rel=1e-6
    )
    told = [sum(operator.flops for operator in ran(phase, plan, layer)) for plan, phase in (
        (exact, exact.train), (exact, exact.evaluate), (mezo, mezo.train), (mezo, mezo.evaluate),
    )]  # fmt: skip
    assert told == [told[0], told[0] / 2, told[0], told[0] / 2]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mezo", "keep-all"])
def test_results_do_not_depend_on_it(policy, profile, records, tmp_path):
    """Training and evaluation by the operators for inference, and by the forward instead of them."""
    results = []
    for number, made in enumerate((profile, without_inference(profile))):
        directory = tmp_path / str(number)
        directory.mkdir()
        training = make_training(ModelPlanner(made).plan(UNLIMITED, policy=policy), records, directory, lr=1e-3)
        training.initialise()
        losses = [training.step(step) for step in (1, 2, 3)]
        found = training.evaluate(records, lambda done, total: None)
        training.save_state(str(directory))
        training.close()
        results.append((losses, found["loss"], load_file(directory / "adapter_model.safetensors")))
    (losses, loss, adapter), (other_losses, other_loss, other) = results
    assert (losses, loss) == (other_losses, other_loss)
    assert all(torch.equal(adapter[name], other[name]) for name in other)


def test_an_evaluation_runs_no_forward_that_a_backward_would_follow(profile):
    plan = ModelPlanner(profile).plan(UNLIMITED, policy="keep-all")
    assert {o.phase for layer in plan.layers for o in ran(plan.train, plan, layer.name)} == {"forward", "backward"}
    assert {o.phase for o in ran(plan.evaluate, plan, plan.layers[-1].name)} == {"inference"}
    before = ModelPlanner(without_inference(profile)).plan(UNLIMITED, policy="keep-all")
    wrong = plan.model_copy(update={"evaluate": before.evaluate})
    with pytest.raises(InvalidSchedule, match=r"operator-order"):
        simulate(wrong)


def test_mezo_counts_neither_kernels_nor_workspace_of_a_backward(profile):
    floor = profile.device.floor.model_copy(update={"inference_resident_bytes": 110 * MIB, "import_peak_bytes": 0})

    def workspace(operator):
        if "head_" in operator.target or operator.phase == "backward":
            return {"workspace_bytes": (3 if operator.phase == "inference" else 7) * MIB}
        return {}

    device = profile.device.model_copy(update={"floor": floor})
    planner = ModelPlanner(with_operators(profile.model_copy(update={"device": device}), workspace))
    mezo, mebp = (planner.plan(UNLIMITED, policy=policy) for policy in ("mezo", "mebp"))
    assert (mezo.floor_bytes, mebp.floor_bytes) == (110 * MIB, 130 * MIB)
    assert (mezo.workspace_bytes, mebp.workspace_bytes) == (3 * MIB, 7 * MIB)
    least = planner.minimum(policy="mezo").peak_bytes
    assert planner.plan(least, policy="mezo").peak_bytes == least < planner.minimum(policy="mebp").peak_bytes
    refused = planner.plan(least - 1, policy="mezo")
    assert refused.minimum_budget_bytes == least
    assert f"{110 * MIB} bytes of Python and PyTorch" in refused.minimum_budget_reason


def test_a_profile_without_a_floor_for_inference_counts_the_whole_one(profile):
    assert two_forwards(profile).profile.device.floor == profile.device.floor


def test_the_layer_model_tells_the_peak_of_the_evaluation(profile):
    """That of a whole-number program, and the windows' own, whatever becomes of the head's slices between steps."""
    kind = layered(profile).types[-1]
    assert kind.evaluate != kind.forward
    for mode in ("disk", "packed", "unpacked"):
        weights = tuple((name, WeightMode(mode, mode, mode)) for name in kind.weights)
        decision = Decision(keep=frozenset(kind.candidates), offload=frozenset(), weights=weights, states=frozenset())
        block = LayerProgram(LinearProgram(), kind)
        block.fix(decision)
        goal = Linear()
        for figure in block.figures().values():
            goal.plus(figure)
        result = block.program.solve(goal)
        counted = dict(zip(FIELDS, measure(kind, decision).row))
        assert counted["evaluate_peak"] < counted["forward_peak"]
        for name in ("evaluate_peak", "forward_peak", "instructions"):
            assert getattr(block.figures(), name).value(result.values) == pytest.approx(counted[name], rel=1e-6), name


def test_operators_for_inference_must_use_what_the_forward_uses(profile):
    """Else an evaluation would keep it for ever."""
    program = head(profile)
    names = {value.name for value in program.values if value.name.startswith("in2[0")}
    cut = [o for o in program.operators if o.phase != "inference" or not names & set(o.inputs)]
    programs = [p.model_copy(update={"operators": cut}) if p is program else p for p in profile.programs]
    with pytest.raises(InputError, match=r"its forward uses in2\[0:\d+\] and its operators for inference do not"):
        layered(profile.model_copy(update={"programs": programs}))


def test_operators_for_inference_read_only_what_is_there(profile):
    program = head(profile)
    chunk = next(o for o in program.operators if o.target == "tightfit.head_chunk" and o.phase == "inference")
    forward = next(o for o in program.operators if o.target == "tightfit.head_begin" and o.phase == "forward")
    inputs = [forward.outputs[0] if name == chunk.inputs[0] else name for name in chunk.inputs]
    there = [o.model_copy(update={"inputs": inputs}) if o is chunk else o for o in program.operators]
    programs = [p.model_copy(update={"operators": there}) if p is program else p for p in profile.programs]
    with pytest.raises(InputError, match=r"its operators for inference read head_begin\S*, which neither enters"):
        layered(profile.model_copy(update={"programs": programs}))
