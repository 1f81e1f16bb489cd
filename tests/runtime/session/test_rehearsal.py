"""Rehearsals: what they teach about a step, and that a plan which they have corrected is what then happens."""

import json
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from tiny_plans import CONFIG, decoder_profile, naive_plan

from tightfit.planner import schema
from tightfit.planner.instructions import Read
from tightfit.planner.io import load_plan
from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.problem.optimizers import chosen
from tightfit.planner.report.explain import explain
from tightfit.planner.report.summary import plan_summary
from tightfit.planner.simulation.plan_index import PlanIndex
from tightfit.planner.simulation.replay import Replay
from tightfit.planner.simulation.simulate import simulate
from tightfit.profiles.api import profile as profiled
from tightfit.profiles.io import save_profile
from tightfit.profiles.learned import (
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
        rehearsal=Rehearsal(seconds=replay.now, held_bytes=plan.peak_bytes - SPREAD_BYTES, busy_cores=0.0),
        phases=[plan.train],
        busy=[np.diff(now) - stalled],
        stalled=[stalled],
        transfers=[np.asarray(replay.moves).reshape(-1, 2)],
    )


CHANNEL = {"bytes_per_second": 2e8, "latency_seconds": 1e-4, "compute_seconds_per_transfer": 2e-5}
SLOWER = CHANNEL | {"bytes_per_second": 5e7, "latency_seconds": 3e-4}


def seconds_of(factor):
    """Of each operator something else, between `factor` and 1.6 times that."""
    return lambda operator: 2e-5 * factor * (1 + 0.1 * (len(operator.target) % 7))


@pytest.mark.slow_but_for("slower disk")
@pytest.mark.parametrize(("factor", "channel"), [(1.7, CHANNEL), (1.4, SLOWER)], ids=["cores", "slower disk"])
def test_after_one_rehearsal_the_model_has_the_seconds_of_the_machine(tmp_path, factor, channel):
    """At the budget that was rehearsed, and about so at others that were not."""
    bare = decoder_profile(tmp_path, config=CONFIG | {"num_hidden_layers": 6})
    measured = timed(bare, seconds_of(1.0), read=CHANNEL, write=CHANNEL)
    truth = timed(bare, seconds_of(factor), read=channel, write=channel)
    planner = ModelPlanner(measured)
    least = planner.minimum_bytes(time_limit=5)
    plan = planner.plan(least + 300_000, time_limit=5)
    assert any(isinstance(one, Read) for one in plan.train.instructions), "the plan moves something"
    assert (plan.expected_from, plan.expected_seconds) == ("model", plan.step_seconds)
    taken = happened(plan, truth)
    known = corrected(measured, rehearsal._learn_seconds(LearnedFigures(), plan, taken)[0])
    for other in (plan, planner.plan(least + 2_000_000, time_limit=5)):
        figures = {"device": known.device, "tensors": known.tensors, "programs": known.programs}
        again = simulate(other.model_copy(update=figures | {"budget_bytes": 1 << 40})).step_seconds
        right = happened(other, truth).rehearsal.seconds
        assert again == pytest.approx(right, rel=0.1)
        assert abs(again / right - 1) < abs(other.step_seconds / right - 1), "what was measured is not what happens"


def test_the_expected_step_is_that_of_the_last_rehearsal_and_the_models_seconds_stand_beside_it(tmp_path):
    measured = timed(decoder_profile(tmp_path), seconds_of(1.0))
    plan = naive_plan(measured)
    taken = happened(plan, timed(measured, seconds_of(3.0)))
    made, anew = rehearsal.taught("figures", plan, taken, 1)
    assert (made.expected_from, made.expected_seconds) == ("rehearsal", taken.rehearsal.seconds)
    assert (made.step_seconds, made.bound_seconds, made.gap) == (plan.step_seconds, plan.bound_seconds, plan.gap)
    assert not made.busy_machine
    assert not anew
    words = f"{taken.rehearsal.seconds:.3f} s as rehearsed ({plan.step_seconds:.3f} s by the model)"
    assert [line for line in explain(made) if line.startswith(f"one step takes {words} and peaks at")]
    figures = plan_summary(made)
    assert figures["expected_seconds"] == taken.rehearsal.seconds != figures["step_seconds"]
    assert figures["expected_from"] == "rehearsal"


def test_beside_other_programs_seconds_are_marked_and_nothing_is_learned_of_them(tmp_path):
    measured = timed(decoder_profile(tmp_path), seconds_of(1.0))
    plan = naive_plan(measured)
    taken = happened(plan, timed(measured, seconds_of(3.0)))
    busy = taken.rehearsal.model_copy(update={"busy_cores": 1.6, "held_bytes": plan.peak_bytes + 5 * MIB})
    made, anew = rehearsal.taught("figures", plan, replace(taken, rehearsal=busy), 1)
    assert anew, "it held more than it says"
    learned = load_learned("figures")
    assert learned == LearnedFigures(added_bytes=5 * MIB + 2 * SPREAD_BYTES)
    assert corrected(measured, learned).programs == measured.programs
    assert made.busy_machine
    assert f"{busy.seconds:.3f} s as rehearsed beside other programs on 1.6 cores (" in explain(made)[0]
    assert plan_summary(made)["busy_machine"] is True
    # So are the model's, where the profile was measured beside others.
    device = measured.device.model_copy(update={"busy_cores": 1.6})
    plan = naive_plan(measured.model_copy(update={"device": device}))
    assert plan.busy_machine
    assert [line for line in explain(plan) if "s by the model, measured beside other programs on 1.6 cores" in line]


def test_a_plan_is_made_anew_once_where_another_may_be_faster_with_what_was_learned(tmp_path, monkeypatch):
    """Operators that take three times as long as they were measured, beside a disk that does not, and all alike."""
    bare = decoder_profile(tmp_path, config=CONFIG | {"num_hidden_layers": 6})
    measured = timed(bare, seconds_of(1.0), read=CHANNEL, write=CHANNEL)
    planner = ModelPlanner(measured)
    tight = planner.plan(planner.minimum_bytes(time_limit=5) + 300_000, time_limit=5)
    roomy = planner.plan(1 << 40, time_limit=5)
    dearer = timed(bare, seconds_of(3.0), read=CHANNEL, write=CHANNEL)
    alike = {"bytes_per_second": 2e8 / 3, "latency_seconds": 3e-4, "compute_seconds_per_transfer": 6e-5}
    slower = timed(bare, seconds_of(3.0), read=alike, write=alike)
    tensors = [
        tensor.model_copy(
            update={"unpack_seconds": 3 * tensor.unpack_seconds, "update_seconds": 3 * tensor.update_seconds}
        )
        for tensor in slower.tensors
    ]
    cases = (
        (tight, dearer, True),
        (tight, slower.model_copy(update={"tensors": tensors}), False),  # the same plan is the best
        (roomy, dearer, False),  # little memory costs it nothing
    )
    for number, (plan, truth, expected) in enumerate(cases):
        assert [rehearsal.taught(f"case {number}", plan, happened(plan, truth), rounds)[1] for rounds in (1, 2)] == [
            expected,
            False,
        ]
    ruled = tight.model_copy(update={"policy": "keep-all"})
    assert not rehearsal.taught("a rule", ruled, happened(ruled, dearer), 1)[1]


@pytest.mark.parametrize(
    ("start", "held", "added", "passed"),
    [
        (0, 9 * MIB, 9 * MIB + 2 * SPREAD_BYTES, True),
        (0, -SPREAD_BYTES + 1, SPREAD_BYTES + 1, True),  # a run may hold a spread more
        (0, -SPREAD_BYTES, 0, False),
        (0, -2 * SPREAD_BYTES - 4 * MIB, 0, False),  # not far above what is held
        (0, -200 * MIB, -196 * MIB + 2 * SPREAD_BYTES, False),
        (MIB, 0, 0, False),  # the start's peak has the spread in it
        (MIB, 1, MIB + 1 + 2 * SPREAD_BYTES, True),
        (MIB, -200 * MIB, -195 * MIB + 2 * SPREAD_BYTES, False),
    ],
)
def test_a_peak_is_raised_to_what_was_held_and_lowered_where_it_is_far_above(tmp_path, start, held, added, passed):
    """A peak of 400 MiB, `start` bytes of it because of PyTorch's start; a run holds `held` more."""
    plan = naive_plan(timed(decoder_profile(tmp_path), seconds_of(1.0)))
    later = plan.peak_bytes - plan.start_bytes - plan.device.floor.resident_bytes
    floor = plan.device.floor.model_copy(update={"resident_bytes": 400 * MIB - start - later, "import_peak_bytes": 0})
    if start:
        floor = floor.model_copy(update={"import_peak_bytes": 400 * MIB - floor.supervisor_bytes})
    device = plan.device.model_copy(update={"floor": floor})
    plan = plan.model_copy(update={"device": device, "peak_bytes": 400 * MIB})
    assert plan.start_bytes == start
    learned, over = rehearsal._learn_bytes(LearnedFigures(), plan, plan.peak_bytes + held)
    assert (learned.added_bytes, over) == (added, passed)
    # A later rehearsal that holds less does not take back what an earlier one needed.
    later, over = rehearsal._learn_bytes(LearnedFigures(added_bytes=5 * MIB), plan, plan.peak_bytes - 200 * MIB)
    assert (later.added_bytes, over) == (5 * MIB, False)


@pytest.mark.parametrize(
    ("beyond", "count"),
    [
        ((-SPREAD_BYTES,), 1),
        ((6 * MIB, -2 * SPREAD_BYTES), 2),
        ((6 * MIB, -SPREAD_BYTES), 2),  # the second of one plan holds a spread more
        ((6 * MIB, MIB, 2 * MIB, -SPREAD_BYTES), 4),
    ],
)
def test_a_plan_that_held_more_than_it_says_is_made_anew_until_one_holds(tmp_path, monkeypatch, beyond, count):
    """Rehearsals hold so many bytes `beyond` what is predicted."""
    measured = timed(decoder_profile(tmp_path), seconds_of(1.0))
    floor = measured.device.floor.model_copy(update={"resident_bytes": 100 * MIB})
    measured = measured.model_copy(update={"device": measured.device.model_copy(update={"floor": floor})})
    further, taken = iter(beyond), []

    def carried_out(plan, stages):
        one = happened(plan, measured)
        held = one.rehearsal.model_copy(update={"held_bytes": plan.peak_bytes + next(further)})
        taken.append(replace(one, rehearsal=held))
        return taken[-1]

    monkeypatch.setattr(rehearsal, "_carry_out", carried_out)
    monkeypatch.setattr(rehearsal, "why_not", lambda plan: None)
    plan, interrupted = rehearsed(measured, lambda step: step, naive_plan)
    assert not interrupted
    assert len(taken) == count
    assert plan.rehearsal == taken[-1].rehearsal
    assert plan.rehearsal.held_bytes + SPREAD_BYTES <= plan.peak_bytes


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
    made, _ = rehearsed(
        wrong, lambda step: step, lambda step: ModelPlanner(step).plan(budget, policy="keep-all"), tell=said.append
    )
    assert made.rehearsal is not None
    assert made.rehearsal.held_bytes <= made.peak_bytes <= budget
    assert [line.split(":")[0] for line in said] == ["rehearsed", "planned anew with what that taught", "rehearsed"]
    report = run(made, "random", steps=3, out=tmp_path / "out")
    assert report["processes"]["training"]["measured"] <= report["processes"]["training"]["predicted"]
    # Another budget of the same profile knows it before anything runs.
    known = corrected(wrong, load_learned(figures_id(wrong)))
    lacked = made.rehearsal.held_bytes - kept.peak_bytes
    assert lacked > 2 * MIB, "what is missing is more than the allowance for the heap"
    assert known.device.floor.resident_bytes >= low.resident_bytes + lacked
    assert chosen(wrong, None, None) == known
    assert chosen(wrong, "sgd", None).device.floor == known.device.floor
    assert not list((tmp_path / "cache").glob("rehearsal-*")), "nothing is left behind"


@pytest.mark.slow
def test_a_plan_of_figures_measured_wrongly_expects_what_its_rehearsal_took(measured, monkeypatch):
    """All operators twenty times too long, as beside a busy machine: the next plan's model knows better."""
    monkeypatch.setattr(schema, "crowded", lambda taken, threads: False)
    programs = [
        program.model_copy(
            update={"operators": [one.model_copy(update={"seconds": one.seconds * 20}) for one in program.operators]}
        )
        for program in measured.programs
    ]
    wrong = measured.model_copy(update={"programs": programs})
    made, _ = rehearsed(wrong, lambda step: step, planned)
    assert made.expected_seconds == made.rehearsal.seconds < made.step_seconds / 4
    assert planned(corrected(wrong, load_learned(figures_id(wrong)))).step_seconds < 3 * made.expected_seconds


@pytest.mark.slow
def test_a_rehearsal_that_fails_leaves_the_plan_and_says_why(measured, monkeypatch):
    def failing(*given, **options):
        raise RunError("the disk is full")

    monkeypatch.setattr(rehearsal, "supervise", failing)
    said = []
    made, interrupted = rehearsed(measured, lambda step: step, planned, tell=said.append)
    assert said == ["not rehearsed: the disk is full"]
    assert (made.rehearsal, interrupted) == (None, False)
    assert not learned_path(figures_id(measured)).exists()


@pytest.mark.slow
def test_where_memory_is_short_nothing_is_started(measured, monkeypatch):
    monkeypatch.setattr(rehearsal, "free_memory", lambda **given: (30 * MIB, "30.0 MiB are left of the cgroup's 400.0"))
    monkeypatch.setattr(rehearsal, "supervise", lambda *given, **options: pytest.fail("no process is started"))
    said = []
    rehearsed(measured, lambda step: step, planned, tell=said.append)
    assert len(said) == 1
    assert said[0].startswith("not rehearsed: 30.0 MiB are left of the cgroup's 400.0, beside which the ")


@pytest.mark.slow
def test_ctrl_c_in_a_rehearsal_keeps_the_plan(measured, monkeypatch):
    def pressed(*given, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(rehearsal, "supervise", pressed)
    made, interrupted = rehearsed(measured, lambda step: step, planned)
    assert interrupted
    assert made.train is not None


@pytest.mark.slow
def test_a_plan_for_another_device_is_not_rehearsed(measured):
    elsewhere = measured.model_copy(update={"device": measured.device.model_copy(update={"measured": False})})
    made, _ = rehearsed(elsewhere, lambda step: step, planned)
    assert made.rehearsal is None
    assert f"not rehearsed, since it is for {made.device.name}: its seconds and its peak are the model's" in explain(
        made
    )


@pytest.mark.slow
def test_damaged_files_of_what_was_learned_are_as_none(measured, cache):
    place = learned_path(figures_id(measured))
    place.parent.mkdir(parents=True)
    for content in ("", "{", '{"version": 99}', '{"kinds": 3}'):
        place.write_text(content)
        assert load_learned(figures_id(measured)) == LearnedFigures()


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_says_what_the_rehearsal_found_and_the_plan_has_it(measured, tmp_path, tightfit):
    path = save_profile(measured, tmp_path / "profile.json")
    code, out, err = tightfit("plan", path, "--memory", "1GiB", "-o", tmp_path / "plan.json", "--json", "--no-wait")
    assert code == 0
    assert "rehearsed: a step took" in err
    plan = load_plan(tmp_path / "plan.json")
    assert json.loads(out)["rehearsal"] == plan.rehearsal.model_dump(mode="json")
    code, out, err = tightfit("plan", path, "--memory", "1GiB", "-o", tmp_path / "plan.json", "--json", "--no-rehearse")
    assert (code, "rehearsed" in err, json.loads(out)["rehearsal"]) == (0, False, None)
    assert load_plan(tmp_path / "plan.json").rehearsal is None
