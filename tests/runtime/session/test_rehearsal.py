"""Rehearsals: what they teach about a step, and that a plan which they have corrected is what then happens."""

import json
from dataclasses import dataclass, field

import numpy as np
import pytest
from tiny_plans import CONFIG, decoder_profile, naive_plan

from tightfit.planner.instructions import Read, Run
from tightfit.planner.io import load_plan
from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.problem.optimizers import chosen
from tightfit.planner.simulation.plan_index import PlanIndex
from tightfit.planner.simulation.replay import Replay
from tightfit.planner.simulation.simulate import simulate
from tightfit.profiles.api import profile as profiled
from tightfit.profiles.io import save_profile
from tightfit.profiles.learned import (
    ABOVE,
    SPREAD_BYTES,
    LearnedFigures,
    Rehearsal,
    corrected,
    figures_id,
    learned_path,
    load_learned,
)
from tightfit.runtime.common.errors import RunError
from tightfit.runtime.session import rehearsal
from tightfit.runtime.session.launch import run
from tightfit.runtime.session.rehearsal import TracedRehearsal, rehearsed

MIB = 1 << 20


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# --- what is learned, from a run whose truth is known -------------------------------------------------------------


def timed(profile, seconds=lambda operator: 1e-9 * (1 + sum(map(len, operator.inputs))), **channels):
    """A profile with made-up seconds for everything, and a start that holds less than a step."""
    floor = profile.device.floor.model_copy(update={"import_peak_bytes": MIB, "resident_bytes": MIB})
    channels = {way: getattr(profile.device, way).model_copy(update=told) for way, told in channels.items()}
    device = profile.device.model_copy(update={"floor": floor, **channels})
    tensors = [
        tensor.model_copy(update={"unpack_seconds": 2e-4, "update_seconds": 1e-4} if tensor.kind != "batch" else {})
        for tensor in profile.tensors
    ]
    programs = [
        program.model_copy(
            update={"operators": [one.model_copy(update={"seconds": seconds(one)}) for one in program.operators]}
        )
        for program in profile.programs
    ]
    return profile.model_copy(update={"device": device, "tensors": tensors, "programs": programs})


@dataclass
class Watched(Replay):
    """The simulator as the machine: when each instruction and each transfer begins and ends."""

    moments: list = field(default_factory=list)
    moves: list = field(default_factory=list)

    def __init__(self, *given):
        super().__init__(*given)
        self.moments, self.moves = [], []

    def _record(self, workspace):
        super()._record(workspace)
        self.moments.append((self.now, self.totals.stall))

    def _move(self, size, *, out):
        begin = max(self.disk, self.now)
        done = super()._move(size, out=out)
        self.moves.append((begin, done))
        return done


def happened(plan, truth):
    """What a rehearsal of `plan` finds on a machine whose figures are those of the profile `truth`."""
    real = plan.model_copy(update={"device": truth.device, "tensors": truth.tensors, "programs": truth.programs})
    replay = Watched(PlanIndex(real), plan.train, "train", "train")
    replay.run()
    now, stall = np.asarray(replay.moments).T
    stalled = np.diff(stall)
    return TracedRehearsal(
        rehearsal=Rehearsal(
            budget_bytes=plan.budget_bytes,
            policy=plan.policy,
            predicted_seconds=plan.train.seconds,
            seconds=replay.now,
            predicted_bytes=plan.peak_bytes,
            held_bytes=plan.peak_bytes - SPREAD_BYTES,
            busy_cores=0.0,
            judged=True,
        ),
        phases=[plan.train],
        busy=[np.diff(now) - stalled],
        stalled=[stalled],
        transfers=[np.asarray(replay.moves).reshape(-1, 2)],
    )


CHANNEL = {"bytes_per_second": 2e8, "latency_seconds": 1e-4, "compute_seconds_per_transfer": 2e-5}
SLOWER = {"bytes_per_second": 5e7, "latency_seconds": 3e-4, "compute_seconds_per_transfer": 6e-5}


def seconds_of(factor):
    """Of each operator something else, between `factor` and 1.6 times that."""
    return lambda operator: 2e-5 * factor * (1 + 0.1 * (len(operator.target) % 7))


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "channel"), [(1.7, CHANNEL), (0.4, CHANNEL), (1.0, SLOWER), (1.4, SLOWER)], ids=str)
def test_a_plan_has_the_seconds_of_the_machine_after_one_rehearsal(tmp_path, factor, channel):
    """At the budget that was rehearsed, and about so at others that were not."""
    bare = decoder_profile(tmp_path, config=CONFIG | {"num_hidden_layers": 6})
    measured = timed(bare, seconds_of(1.0), read=CHANNEL, write=CHANNEL)
    truth = timed(bare, seconds_of(factor), read=channel, write=channel)
    planner = ModelPlanner(measured)
    least = planner.minimum_bytes(time_limit=5)
    plan = planner.plan(least + 300_000, time_limit=5)
    assert any(isinstance(one, Read) for one in plan.train.instructions), "the plan moves something"
    taken = happened(plan, truth)
    wrong = plan.step_seconds / taken.rehearsal.seconds
    assert abs(wrong - 1) > 0.1, "what was measured is not what happens"
    learned = rehearsal._learn(LearnedFigures(), measured, plan, taken)
    known = corrected(measured, learned)
    again = plan.model_copy(
        update={"device": known.device, "tensors": known.tensors, "programs": known.programs, "budget_bytes": 1 << 40}
    )
    assert simulate(again).step_seconds == pytest.approx(taken.rehearsal.seconds, rel=0.02)
    for spare in (50_000, 2_000_000):
        other = planner.plan(least + spare, time_limit=5)
        there = other.model_copy(
            update={
                "device": known.device,
                "tensors": known.tensors,
                "programs": known.programs,
                "budget_bytes": 1 << 40,
            }
        )
        right = happened(other, truth).rehearsal.seconds
        assert simulate(there).step_seconds == pytest.approx(right, rel=0.1)
        assert abs(simulate(there).step_seconds / right - 1) <= abs(other.step_seconds / right - 1) + 1e-6


def test_of_a_crowded_machine_only_the_peak_is_learned(tmp_path):
    measured = timed(decoder_profile(tmp_path), seconds_of(1.0))
    plan = naive_plan(measured)
    taken = happened(plan, timed(measured, seconds_of(3.0)))
    busy = taken.rehearsal.model_copy(update={"judged": False, "held_bytes": plan.peak_bytes + 5 * MIB})
    learned = rehearsal._learn(LearnedFigures(), measured, plan, TracedRehearsal(**{**vars(taken), "rehearsal": busy}))
    assert learned.added_bytes == 5 * MIB + SPREAD_BYTES
    assert corrected(measured, learned).programs == measured.programs


@pytest.mark.slow_but_for("9437184-9764864")
@pytest.mark.parametrize(
    ("held", "added"),
    [
        (9 * MIB, 9 * MIB + SPREAD_BYTES),
        (-SPREAD_BYTES, 0),
        (-2 * SPREAD_BYTES, 0),  # less than a hundredth above what is held
        (-200 * MIB, None),
    ],
)
def test_a_peak_is_raised_to_what_was_held_and_lowered_where_it_is_far_above(tmp_path, held, added):
    measured = timed(decoder_profile(tmp_path), seconds_of(1.0))
    plan = naive_plan(measured).model_copy(update={"peak_bytes": 400 * MIB})
    taken = happened(plan, measured)
    told = taken.rehearsal.model_copy(update={"held_bytes": plan.peak_bytes + held})
    learned = rehearsal._learn(LearnedFigures(), measured, plan, TracedRehearsal(**{**vars(taken), "rehearsal": told}))
    expected = -200 * MIB + SPREAD_BYTES + int(ABOVE * 400 * MIB) if added is None else added
    assert learned.added_bytes == expected
    unjudged = told.model_copy(update={"judged": False})
    assert rehearsal._agrees(plan, unjudged) == (held in {-SPREAD_BYTES, -2 * SPREAD_BYTES})
    floor = plan.device.floor.model_copy(update={"import_peak_bytes": 400 * MIB})
    starting = plan.model_copy(update={"device": plan.device.model_copy(update={"floor": floor})})
    assert starting.start_bytes, "the start sets the peak"
    assert rehearsal._agrees(starting, unjudged) == (held <= -SPREAD_BYTES)
    # A later rehearsal that holds less does not take back what an earlier one needed.
    later = rehearsal._learn(
        learned,
        measured,
        plan.model_copy(update={"peak_bytes": plan.peak_bytes + learned.added_bytes}),
        TracedRehearsal(
            **{
                **vars(taken),
                "rehearsal": told.model_copy(
                    update={
                        "predicted_bytes": plan.peak_bytes + learned.added_bytes,
                        "held_bytes": told.held_bytes - MIB,
                    }
                ),
            }
        ),
    )
    assert later.added_bytes == learned.added_bytes


@pytest.mark.parametrize("less", [SPREAD_BYTES, 20 * MIB])
def test_where_the_start_sets_the_peak_what_is_held_later_is_lowered_all_the_same(tmp_path, less):
    """The start reaches 1,000 bytes more than the step is predicted to hold, and the whole holds `less` than the step's prediction."""
    measured = timed(decoder_profile(tmp_path), seconds_of(1.0))
    plan = naive_plan(measured)
    floor = plan.device.floor.model_copy(update={"resident_bytes": plan.device.floor.resident_bytes + 400 * MIB})
    later = plan.peak_bytes + 400 * MIB - plan.start_bytes
    floor = floor.model_copy(update={"import_peak_bytes": later + 1000 - floor.supervisor_bytes})
    device = plan.device.model_copy(update={"floor": floor})
    plan = plan.model_copy(update={"device": device, "peak_bytes": later + 1000})
    assert plan.start_bytes == 1000
    taken = happened(plan, measured)
    told = taken.rehearsal.model_copy(update={"held_bytes": later - less, "judged": False})
    learned = rehearsal._learn(LearnedFigures(), measured, plan, TracedRehearsal(**{**vars(taken), "rehearsal": told}))
    far = less > SPREAD_BYTES
    assert learned.added_bytes == (SPREAD_BYTES - less + int(ABOVE * plan.peak_bytes) if far else 0)
    assert rehearsal._agrees(plan, told) == (not far)


def rehearsed_beyond(tmp_path, monkeypatch, beyond, start=0):
    """What `rehearsed` makes of plans with the same bytes whose rehearsals hold so many bytes more than predicted, and these rehearsals.
    `start`: bytes of PyTorch's start, if that sets the peak.
    """
    measured = timed(decoder_profile(tmp_path), seconds_of(1.0))
    floor = measured.device.floor.model_copy(update={"resident_bytes": 100 * MIB})
    measured = measured.model_copy(update={"device": measured.device.model_copy(update={"floor": floor})})
    further = iter(beyond)
    rehearsals = []

    def carried_out(plan, stages):
        taken = happened(plan, measured)
        held = plan.peak_bytes + next(further)
        rehearsals.append(taken.rehearsal.model_copy(update={"held_bytes": held}))
        return TracedRehearsal(**{**vars(taken), "rehearsal": rehearsals[-1]})

    def make(step):
        plan = naive_plan(step).model_copy(update={"peak_bytes": step.device.floor.resident_bytes + 300 * MIB})
        floor = plan.device.floor.model_copy(update={"import_peak_bytes": start and plan.peak_bytes})
        return plan.model_copy(update={"device": plan.device.model_copy(update={"floor": floor})}) if start else plan

    monkeypatch.setattr(rehearsal, "_carry_out", carried_out)
    monkeypatch.setattr(rehearsal, "why_not", lambda plan: None)
    return rehearsed(measured, lambda step: step, make), rehearsals


@pytest.mark.slow_but_for("the step")
@pytest.mark.parametrize("start", [0, 400 * MIB], ids=["the step", "the start"])
def test_a_plan_that_held_more_than_it_says_is_made_anew_until_one_holds(tmp_path, monkeypatch, start):
    """A first rehearsal held far less than was predicted; what the second plan, with the lower prediction, holds is known then."""
    beyond = (-40 * MIB, 2 * MIB, MIB, 0, -SPREAD_BYTES, -SPREAD_BYTES)
    made, rehearsals = rehearsed_beyond(tmp_path, monkeypatch, beyond, start)
    assert made.plan.rehearsal == rehearsals[-1]
    assert rehearsals[-1].held_bytes <= rehearsals[-1].predicted_bytes == made.plan.peak_bytes
    assert len(rehearsals) == (4 if start else 5)


@pytest.mark.parametrize(
    ("second", "count"), [(-SPREAD_BYTES // 2, 2), (0, 2), (1, 3)], ids=["half a spread", "a spread", "more"]
)
def test_one_plan_may_hold_more_than_the_last_time_by_the_spread_between_runs(tmp_path, monkeypatch, second, count):
    """The first held 6 MiB more than predicted, so that the second is predicted to hold that and a spread."""
    made, rehearsals = rehearsed_beyond(tmp_path, monkeypatch, (6 * MIB, second, -SPREAD_BYTES))
    assert len(rehearsals) == count
    assert rehearsals[-1].held_bytes <= made.plan.peak_bytes


# --- real runs -----------------------------------------------------------------------------------------------------


WIDE = CONFIG | {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 5, "num_attention_heads": 4}
"""a decoder whose activations are more than what starting PyTorch takes"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The profile of a tiny decoder, measured in earnest."""
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIGHTFIT_CACHE", str(folder / "cache"))
        (folder / "config.json").write_text(json.dumps(WIDE))
        return profiled(str(folder / "config.json"), seq=128, batch=8, threads=1)


def planned(profile):
    return ModelPlanner(profile).plan(1 << 40, policy="keep-all")


@pytest.mark.slow
def test_a_plan_whose_process_holds_more_than_was_predicted_is_made_anew_and_runs_in_its_cap(measured, tmp_path):
    """A floor that was measured 6 MiB too low, as a convolution's clones once were."""
    floor = measured.device.floor
    low = floor.model_copy(update={"resident_bytes": floor.resident_bytes - 6 * MIB})
    wrong = measured.model_copy(update={"device": measured.device.model_copy(update={"floor": low})})
    kept = ModelPlanner(wrong).plan(1 << 40, policy="keep-all")
    assert not kept.start_bytes, "the step holds more than the start"
    budget = kept.peak_bytes + 8 * MIB
    said = []
    made = rehearsed(
        wrong, lambda step: step, lambda step: ModelPlanner(step).plan(budget, policy="keep-all"), tell=said.append
    )
    assert made.plan.rehearsal is not None
    assert made.plan.rehearsal.held_bytes <= made.plan.peak_bytes <= budget
    assert [line.split(":")[0] for line in said] == ["rehearsed", "planned anew with what that taught", "rehearsed"]
    assert made.lines == said
    report = run(made.plan, "random", steps=3, out=tmp_path / "out")
    assert report["processes"]["training"]["measured"] <= report["processes"]["training"]["predicted"]
    # Another budget of the same profile knows it before anything runs.
    known = corrected(wrong, load_learned(figures_id(wrong)))
    lacked = made.plan.rehearsal.held_bytes - kept.peak_bytes
    assert lacked > 2 * MIB, "what is missing is more than the allowance for the heap"
    assert known.device.floor.resident_bytes >= low.resident_bytes + lacked
    assert chosen(wrong, None, None) == known
    assert chosen(wrong, "sgd", None).device.floor == known.device.floor
    assert not list((tmp_path / "cache").glob("rehearsal-*")), "nothing is left behind"


@pytest.mark.slow
def test_seconds_that_were_measured_wrongly_are_those_of_the_run_afterwards(measured, monkeypatch):
    """All operators twenty times too long, as beside a busy machine."""
    monkeypatch.setattr(rehearsal, "crowded", lambda taken, threads: False)
    programs = [
        program.model_copy(
            update={"operators": [one.model_copy(update={"seconds": one.seconds * 20}) for one in program.operators]}
        )
        for program in measured.programs
    ]
    wrong = measured.model_copy(update={"programs": programs})
    made = rehearsed(wrong, lambda step: step, planned)
    first = load_learned(figures_id(wrong)).rehearsals[0]
    assert first.predicted_seconds > 4 * first.seconds
    assert made.plan.rehearsal.predicted_seconds < 3 * made.plan.rehearsal.seconds


@pytest.mark.slow
def test_a_rehearsal_that_fails_leaves_the_plan_and_says_why(measured, monkeypatch):
    def failing(*given, **options):
        raise RunError("the disk is full")

    monkeypatch.setattr(rehearsal, "supervise", failing)
    made = rehearsed(measured, lambda step: step, planned)
    assert made.lines == ["not rehearsed: the disk is full"]
    assert made.plan.rehearsal is None
    assert not made.interrupted
    assert not learned_path(figures_id(measured)).exists()


@pytest.mark.slow
def test_where_memory_is_short_nothing_is_started(measured, monkeypatch):
    monkeypatch.setattr(rehearsal, "free_memory", lambda **given: (30 * MIB, "30.0 MiB are left of the cgroup's 400.0"))
    monkeypatch.setattr(rehearsal, "supervise", lambda *given, **options: pytest.fail("no process is started"))
    made = rehearsed(measured, lambda step: step, planned)
    (said,) = made.lines
    assert said.startswith("not rehearsed: 30.0 MiB are left of the cgroup's 400.0, beside which the ")


@pytest.mark.slow
def test_ctrl_c_in_a_rehearsal_keeps_the_plan(measured, monkeypatch):
    def pressed(*given, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(rehearsal, "supervise", pressed)
    made = rehearsed(measured, lambda step: step, planned)
    assert made.interrupted
    assert made.plan.train is not None


@pytest.mark.slow
def test_a_plan_for_another_device_is_not_rehearsed(measured):
    elsewhere = measured.model_copy(update={"device": measured.device.model_copy(update={"measured": False})})
    made = rehearsed(elsewhere, lambda step: step, planned)
    assert made.lines[0].startswith("not rehearsed: the plan's times and floor are estimated")
    assert made.plan.rehearsal is None


@pytest.mark.slow
def test_damaged_files_of_what_was_learned_are_as_none(measured, cache):
    place = learned_path(figures_id(measured))
    place.parent.mkdir(parents=True)
    for content in ("", "{", '{"version": 99}', '{"operators": 3}'):
        place.write_text(content)
        assert load_learned(figures_id(measured)) == LearnedFigures()


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_says_what_the_rehearsal_found_and_the_plan_has_it(measured, tmp_path, tightfit):
    path = save_profile(measured, tmp_path / "profile.json")
    code, out, err = tightfit("plan", path, "--memory", "1GiB", "-o", tmp_path / "plan.json", "--json")
    assert code == 0
    assert "rehearsed: a step of" in err
    plan = load_plan(tmp_path / "plan.json")
    assert json.loads(out)["rehearsal"] == plan.rehearsal.model_dump(mode="json")
    code, out, err = tightfit("plan", path, "--memory", "1GiB", "-o", tmp_path / "plan.json", "--json", "--no-rehearse")
    assert (code, "rehearsed" in err, json.loads(out)["rehearsal"]) == (0, False, None)
    assert load_plan(tmp_path / "plan.json").rehearsal is None


@pytest.mark.slow
def test_operators_are_timed_with_the_layer_that_ran_them(measured, monkeypatch):
    """Every operator of the step has a figure afterwards, in the place where the program has it."""
    monkeypatch.setattr(rehearsal, "crowded", lambda taken, threads: False)
    made = rehearsed(measured, lambda step: step, planned)
    learned = load_learned(figures_id(measured))
    ran = {(one.layer, one.operator) for one in made.plan.train.instructions if isinstance(one, Run)}
    programs = {layer.name: layer.program for layer in measured.layers}
    for layer, operator in ran:
        assert learned.operators[programs[layer]][operator] is not None
