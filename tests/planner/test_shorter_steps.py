"""Plans with shorter steps: one schedule for all lengths, and what each of them takes, against sums by hand and replays."""

from __future__ import annotations

import io
import json

import pytest
from broken_plans import rejected
from rich.console import Console
from tiny_plans import CONFIG

from tightfit.planner.io import load_plan, save_plan
from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.plan import plan
from tightfit.planner.report.explain import explain
from tightfit.planner.report.summary import plan_summary, profile_summary
from tightfit.planner.simulation.simulate import simulate
from tightfit.planner.solve.policies import APPROXIMATE, POLICIES
from tightfit.profiles.api import profile
from tightfit.profiles.io import load_profile, save_profile
from tightfit.profiles.schema import shortened, without_shorter
from tightfit.runtime.cli.answers import profile_sentence, profile_text
from tightfit.runtime.common.units import MIB, format_seconds

ON = "zen4-2core"
LENGTHS = [8, 24]
UNLIMITED = 1 << 40


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    made = tmp_path_factory.mktemp("model") / "config.json"
    made.write_text(json.dumps(CONFIG | {"num_hidden_layers": 4}))
    return str(made)


@pytest.fixture(scope="module")
def measured(path):
    """A profile, estimated, of steps of 40, 24 and 8 tokens."""
    return profile(path, seq=40, batch=2, buckets="24,8", device=ON)


@pytest.fixture(scope="module")
def kept(measured):
    return plan(measured, UNLIMITED, policy="keep-all")


@pytest.fixture(scope="module")
def streamed(measured):
    """A plan that reads and unpacks its weights in every step, and computes layers again."""
    made = ModelPlanner(measured).smallest_plan(policy="mebp")
    assert made.train.read_bytes
    assert made.train.recompute_seconds
    return made


def seconds_by_hand(source):
    """Seconds of a step in which every operator runs once and every trainable is updated, and those of an evaluation."""
    programs = {program.name: program for program in source.programs}
    step = sum(tensor.update_seconds for tensor in source.tensors if tensor.kind == "trainable")
    evaluation = 0.0
    for layer in source.layers:
        operators = programs[layer.program].operators
        step += sum(operator.seconds for operator in operators if operator.phase != "inference")
        evaluation += sum(operators[place].seconds for place in programs[layer.program].inference)
    return step, evaluation


def test_where_nothing_is_streamed_a_step_takes_its_own_operators_seconds(measured, kept):
    assert (kept.train.read_bytes, kept.train.unpack_seconds, kept.train.recompute_seconds) == (0, 0, 0)
    assert [step.seq for step in kept.shorter] == LENGTHS
    for step, like in zip(kept.shorter, measured.shorter, strict=True):
        train, evaluation = seconds_by_hand(shortened(measured, like))
        assert step.step_seconds == pytest.approx(train)
        assert step.evaluation_seconds == pytest.approx(evaluation)
    train, evaluation = seconds_by_hand(measured)
    assert (kept.step_seconds, kept.evaluate.seconds) == pytest.approx((train, evaluation))
    assert kept.shorter[0].step_seconds < kept.shorter[1].step_seconds < kept.step_seconds
    assert kept.shorter[0].evaluation_seconds < kept.shorter[1].evaluation_seconds < kept.evaluate.seconds


def assert_replayed(made):
    """The plan states what a replay at each length alone finds, which is within its peak and at its offsets."""
    assert [step.seq for step in made.shorter] == LENGTHS
    for step in made.shorter:
        alone = shortened(made, step)
        found = simulate(alone)
        assert step.step_seconds == found.step_seconds > 0
        assert step.evaluation_seconds == found.evaluate.seconds > 0
        assert found.peak_bytes <= made.peak_bytes
        assert found.live_bytes <= simulate(made).live_bytes
        assert (alone.resident, alone.train.instructions) == (made.resident, made.train.instructions)
        assert [program.name for program in step.programs] == [program.name for program in made.programs]


@pytest.mark.parametrize("policy", [*POLICIES, *APPROXIMATE])
def test_each_rule_states_the_seconds_that_a_replay_gives(measured, policy):
    made = plan(measured, UNLIMITED, policy=policy)
    assert made.policy == policy
    assert_replayed(made)


def test_a_plan_that_streams_does(streamed):
    assert_replayed(streamed)
    # Weights take as long to read and to unpack whatever the length is.
    for step in streamed.shorter:
        found = simulate(shortened(streamed, step))
        assert found.train.read_bytes == streamed.train.read_bytes
        assert found.train.unpack_seconds == streamed.train.unpack_seconds


def test_the_solver_does(measured, streamed, kept):
    budget = (streamed.peak_bytes + kept.peak_bytes) // 2
    made = plan(measured, budget, time_limit=20.0)
    assert made.policy == "solver"
    assert made.peak_bytes <= budget
    assert_replayed(made)
    # Shorter lengths are no part of what is decided.
    alone = plan(measured.model_copy(update={"shorter": []}), budget, time_limit=20.0)
    assert alone.shorter == []
    assert alone.step_seconds == pytest.approx(made.step_seconds, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"accumulate": 2}, {"accumulate": 2, "max_grad_norm": 1.0}, {"optimizer": "sgd"}])
def test_steps_that_share_an_update_do(path, options):
    accumulate = options.get("accumulate", 1)
    source = profile(path, seq=40, buckets="24,8", device=ON, accumulate=accumulate)
    told = {name: value for name, value in options.items() if name != "accumulate"}
    assert_replayed(plan(source, UNLIMITED, policy="keep-all", **told))


def test_the_part_of_a_device_beside_a_side_network_has_none(measured):
    assert plan(measured, UNLIMITED, policy="mobillm").shorter == []


# --- what the simulator refuses ---------------------------------------------------------------------------------------


def with_shorter(made, number, step):
    """The plan with another shorter step in the place of one of its own."""
    steps = [*made.shorter]
    steps[number] = step
    return made.model_copy(update={"shorter": steps})


def own_activations(made, program):
    """What a step makes of a program's values in each of its layers."""
    bound = {value for layer in made.layers if layer.program == program.name for value in layer.bindings}
    forward = (operator for operator in program.operators if operator.phase == "forward")
    return {name for operator in forward for name in operator.outputs if name and name not in bound}


@pytest.mark.parametrize("number", range(len(LENGTHS)))
def test_a_shorter_step_with_a_larger_tensor_is_refused(kept, number):
    """Wherever it lies: one byte more than the whole arena has no room."""
    step = kept.shorter[number]
    tried = 0
    for place, program in enumerate(step.programs):
        own = own_activations(kept, program)
        for index, value in enumerate(program.values):
            if value.name not in own:
                continue
            values = [*program.values]
            values[index] = value.model_copy(update={"bytes": kept.arena_bytes + 1})
            programs = [*step.programs]
            programs[place] = program.model_copy(update={"values": values})
            worse = with_shorter(kept, number, step.model_copy(update={"programs": programs}))
            rejected(worse, "offset")
            tried += 1
            break
    assert tried >= 2


def test_a_shorter_step_with_more_workspace_is_refused(kept):
    step = kept.shorter[0]
    program = step.programs[1]
    operator = program.operators[0].model_copy(update={"workspace_bytes": kept.workspace_bytes + 1})
    programs = [*step.programs]
    programs[1] = program.model_copy(update={"operators": [operator, *program.operators[1:]]})
    worse = with_shorter(kept, 0, step.model_copy(update={"programs": programs}))
    assert rejected(worse, "claims").tensor == "workspace_bytes"
    # Where the plan states no figures of its own, what the whole step needs is the measure.
    operator = operator.model_copy(update={"workspace_bytes": 1 << 33})
    programs[1] = program.model_copy(update={"operators": [operator, *program.operators[1:]]})
    worse = with_shorter(kept, 0, step.model_copy(update={"programs": programs}))
    silent = {"workspace_bytes": 0, "peak_bytes": 0}
    assert simulate(kept.model_copy(update=silent)).peak_bytes == kept.peak_bytes
    assert rejected(worse.model_copy(update=silent), "claims").tensor == f"its step of {LENGTHS[0]} tokens"


# --- files and words --------------------------------------------------------------------------------------------------


def test_files_keep_shorter_steps(measured, kept, tmp_path):
    save_profile(measured, tmp_path / "profile.json")
    assert load_profile(tmp_path / "profile.json") == measured
    save_plan(kept, tmp_path / "plan.json")
    again = load_plan(tmp_path / "plan.json")
    assert again == kept
    assert simulate(again).shorter == simulate(kept).shorter


def test_without_shorter_steps_their_kernels_take_no_memory(measured):
    floor = measured.device.floor.model_copy(update={"shorter_bytes": 5 * MIB})
    whole = measured.model_copy(update={"device": measured.device.model_copy(update={"floor": floor})})
    left = without_shorter(whole)
    assert left.shorter == []
    assert left.device.floor.resident_bytes == floor.resident_bytes - 5 * MIB
    assert left.device.floor.shorter_bytes == 0
    assert without_shorter(left) == left
    assert (left.programs, left.tensors) == (whole.programs, whole.tensors)


def printed(renderable):
    console = Console(file=io.StringIO(), width=200)
    console.print(renderable)
    return console.file.getvalue()


def test_words_name_the_lengths(measured, kept):
    short, longer = kept.shorter
    sentence = (
        f"it takes {format_seconds(short.step_seconds)} where no sample has more than 8 tokens and"
        f" {format_seconds(longer.step_seconds)} where no sample has more than 24 tokens, by the same instructions in the"
        " same places"
    )
    assert sentence in " ".join(explain(kept)).replace("It takes", "it takes")
    assert plan_summary(kept)["shorter"] == [
        {"seq": one.seq, "step_seconds": one.step_seconds, "evaluation_seconds": one.evaluation_seconds}
        for one in (short, longer)
    ]
    told = profile_summary(measured)
    assert (told["shorter"], told["shorter_bytes"]) == (LENGTHS, 0)
    assert "at 8 and 24 tokens, for batches of short samples\n" in _trimmed(printed(profile_text(measured)))
    assert "2 × 40 tokens (and 8 and 24)" in profile_sentence(measured)
    floor = measured.device.floor.model_copy(update={"shorter_bytes": 5 * MIB})
    costly = measured.model_copy(update={"device": measured.device.model_copy(update={"floor": floor})})
    assert profile_summary(costly)["shorter_bytes"] == 5 * MIB
    assert "for batches of short samples; their kernels take 5.0 MiB of the floor" in printed(profile_text(costly))


def _trimmed(text):
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def test_a_plan_of_one_length_says_nothing_of_others(measured):
    alone = measured.model_copy(update={"shorter": []})
    made = plan(alone, UNLIMITED, policy="keep-all")
    assert plan_summary(made)["shorter"] == profile_summary(alone)["shorter"] == []
    assert "where no sample" not in " ".join(explain(made))
    assert "shorter steps" not in printed(profile_text(alone))
    assert "(and" not in profile_sentence(alone)
