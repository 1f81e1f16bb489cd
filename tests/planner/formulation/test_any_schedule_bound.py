"""What is proven of every plan: of any schedule against programs of a few shares solved by hand, of the class's rows
against schedules of any decisions carried out, on disks that take their time.

The planner takes the smaller of a bound and the step that it found, so that a bound which is too high shows in no plan:
it would only call it optimal.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from decisions import random_decision
from synthetic import PAGE, ProgramBuilder, decoder_like, device, profile_of, small_chain

from tightfit.planner.cutoff import NEVER
from tightfit.planner.formulation.any_schedule_bound import AnyScheduleBound
from tightfit.planner.formulation.step_constraints import add_step_constraints
from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.problem.build_layers import layered
from tightfit.planner.problem.layer_figures import FIELDS, KIB, MS, LayerFigures
from tightfit.planner.schedule.column_bytes import charged_bytes, instruction_count
from tightfit.planner.schedule.layer_schedule import measure
from tightfit.planner.schedule.lowering import live_profile
from tightfit.planner.schedule.realize import CyclePart, realize
from tightfit.planner.solve.model_search import SearchResult
from tightfit.planner.solve.policies import mebp, rule_columns, smallest
from tightfit.planner.solvers.lp import Linear, LinearProgram
from tightfit.profiles.schema import EXCHANGE, Channel, DeviceFigures, Floor, Layer, Tensor, adamw

# --- any schedule, by hand -----------------------------------------------------------------------------------------

RESIDENT, INSTRUCTION, WORKSPACE = 1000, 10, 5000
ON = DeviceFigures(
    name="by hand",
    kind="cpu",
    threads=1,
    floor=Floor(import_peak_bytes=9000, resident_bytes=RESIDENT, instruction_bytes=INSTRUCTION),
    read=Channel(
        bytes_per_second=PAGE / 4e-3,
        latency_seconds=1e-3,
        compute_seconds_per_byte=0.125e-3 / PAGE,
        compute_seconds_per_transfer=0.25e-3,
    ),
    write=Channel(
        bytes_per_second=PAGE / 8e-3,
        latency_seconds=2e-3,
        compute_seconds_per_byte=0.5e-3 / PAGE,
        compute_seconds_per_transfer=0.5e-3,
    ),
)
"""to read a page: 5 ms of the disk and 0.375 of the cores; to write it: 10 ms and 1"""
SIZES = {
    "x": (1, "batch"),
    "t": (1, "trainable"),
    "w": (4, "weight"),
    "a": (4, "activation"),
    "s": (4, "activation"),
    "p": (1, "activation"),
    "g": (1, "gradient"),
    "grad:t": (1, "gradient"),
}
"""pages"""


def bound_ms(operators, pages):
    """The bound with room for so many pages beside the loss and what no choice touches, of operators
    (forward or backward, inputs, outputs, ms), of which those with a ! after their ms may not run again.
    """
    made = ProgramBuilder("p")
    used = {name for _, inputs, outputs, _ in operators for name in [*inputs, *outputs]}
    for name in sorted(used - {"loss"}):
        size, kind = SIZES[name]
        made.value(name, size * PAGE, kind)
    made.value("loss", 4)
    for number, (phase, inputs, outputs, ms) in enumerate(operators):
        once = isinstance(ms, str)
        seconds = float(str(ms).rstrip("!")) * 1e-3
        made.run(f"o{number}", inputs, outputs, seconds, phase=phase, workspace=WORKSPACE, recomputable=not once)
    known = {
        "x": Tensor(name="x", kind="batch", shape=[1], dtype="uint8", bytes=PAGE),
        "t": Tensor(name="t", kind="trainable", shape=[1], dtype="uint8", bytes=PAGE, update_seconds=0.5e-3),
        "w": Tensor(
            name="w", kind="weight", shape=[1], dtype="uint8", bytes=4 * PAGE, packed_bytes=PAGE, unpack_seconds=0.2e-3
        ),
    }
    tensors = [tensor for name, tensor in known.items() if name in used]
    bound = [name for name in ("x", "t", "w", "grad:t", "loss") if name in used]
    layer = Layer(name="l", program="p", bindings={name: name for name in bound})
    problem = layered(profile_of([made.program()], [layer], tensors, "loss", on=ON))
    forward = sum(phase == "forward" for phase, *_ in operators)
    always = sum(tensor.bytes for tensor in tensors if tensor.kind != "weight")
    taken = RESIDENT + WORKSPACE + INSTRUCTION * (len(operators) + forward) + always
    return AnyScheduleBound(problem).step_seconds(taken + 4 + pages * PAGE) * 1e3


def says(found, exact):
    """Never above, and below by no more than the solver's tolerance and the four bytes of a loss that is made again."""
    assert found <= exact * (1 + 1e-12)
    assert found == pytest.approx(exact, rel=2e-3)


KEPT = [("forward", ["x"], ["a"], 4), ("forward", ["a"], ["loss"], 2), ("backward", ["a", "loss"], ["g"], 3)]
TRIP = (2 + 4 * 8) + (1 + 4 * 4)
"""ms of the disk for a, there and back"""
TRIP_COST = (0.5 + 4 * 0.5) + (0.25 + 4 * 0.125)


def test_what_is_not_kept_is_made_again_or_moved():
    says(bound_ms(KEPT, 4), 9)
    # Three fourths of a: moved as long as the disk is through no later than the cores, which takes them less, then made
    # again.
    moved = 12 / (TRIP + 4 - TRIP_COST)
    says(bound_ms(KEPT, 1), 9 + 4 * (0.75 - moved) + TRIP_COST * moved)


def test_what_may_not_run_again_is_moved():
    """The disk is busy for longer than the cores."""
    once = [("forward", ["x"], ["a"], "4!"), *KEPT[1:]]
    says(bound_ms(once, 4), 9)
    says(bound_ms(once, 1), 0.75 * TRIP)


def test_outputs_of_one_operator_are_made_again_together():
    """To make both again takes no longer than one, and half of both no longer than half a run."""
    both = [
        ("forward", ["x"], ["a", "s"], 4),
        ("forward", ["a", "s"], ["loss"], 200),
        ("backward", ["a", "s", "loss"], ["g"], 3),
    ]
    # A trip of either would take the cores less than the run, those of both take more; the disk has the time.
    says(bound_ms(both, 4), 207 + 2)
    says(bound_ms(both, 0), 207 + 4)


WEIGHT = [("forward", ["x", "w"], ["loss"], 6), ("backward", ["x", "w", "loss"], ["g"], 6)]


def test_weights_are_unpacked_packed_or_read_at_the_loss_and_between_steps():
    says(bound_ms(WEIGHT, 4), 12)
    says(bound_ms(WEIGHT, 1), 12 + 2 * 0.2)
    says(bound_ms(WEIGHT, 0), 12 + 2 * (0.2 + 0.375))
    quick = [(phase, inputs, outputs, 1) for phase, inputs, outputs, _ in WEIGHT]
    says(bound_ms(quick, 0), 2 * 5)


def test_weights_of_the_forward_wait_between_steps_beside_no_activation():
    apart = [
        ("forward", ["x", "w"], ["a"], "40!"),
        ("forward", ["a"], ["loss"], 2),
        ("backward", ["a", "loss"], ["g"], 60),
    ]
    says(bound_ms(apart, 4), 102)
    after = [
        ("forward", ["x"], ["a"], "40!"),
        ("forward", ["a"], ["loss"], 2),
        ("backward", ["a", "loss", "w"], ["g"], 60),
    ]
    says(bound_ms(after, 5), 102 + 0.2)
    says(bound_ms(after, 4), 102 + 0.2 + 0.375)


STATES = [
    ("forward", ["x", "t"], ["p"], "50!"),
    ("forward", ["p"], ["loss"], 20),
    ("backward", ["p", "loss"], ["grad:t"], 3),
]


def test_states_are_kept_or_read_after_the_loss_and_written_before_the_next_step():
    says(bound_ms(STATES, 3), 73.5)
    # At the loss p stays, which costs most to move, and both states are read; between steps there is room for one.
    says(bound_ms(STATES, 1), 73.5 + 2 * 0.375 + 1)


def test_states_of_what_has_its_gradient_before_the_loss_may_be_anywhere():
    early = [("forward", ["x", "t"], ["grad:t"], 5), ("forward", ["x", "grad:t"], ["loss"], 2)]
    says(bound_ms(early, 0), 7.5)


def test_what_the_loss_does_not_wait_for_may_be_made_after_it():
    side = [
        ("forward", ["x"], ["s"], "4!"),
        ("forward", ["x"], ["loss"], 2),
        ("backward", ["s", "loss"], ["g"], 3),
    ]
    says(bound_ms(side, 0), 9)


def test_what_is_made_anew_after_the_loss_need_not_be_there_before():
    anew = [
        ("forward", ["x"], ["s"], "4!"),
        ("forward", ["s"], ["loss"], 2),
        ("backward", ["loss"], ["s"], 3),
        ("backward", ["s"], ["g"], 1),
    ]
    says(bound_ms(anew, 0), 10)


def test_what_does_not_wait_for_the_loss_may_be_read_before_it():
    early = [
        ("forward", ["x"], ["a"], "4!"),
        ("forward", ["a"], ["loss"], 2),
        ("backward", ["a"], ["g"], 3),
    ]
    says(bound_ms(early, 0), 9)


# --- the class's rows ----------------------------------------------------------------------------------------------

SPEEDS = (2e5, 1e6, 5e6)
"""bytes per second: an operator of some ms lets a page or two pass"""
SEEDS = (0, 1, 3, 4, 8, 10, 11, 12, 23)
"""with and without weights, trainables, and transfers that cost the cores much time; those of the last three wait for
the disk as long as a row that is a window off would not allow
"""


def schedules(seed):
    """Of a chain, by rules and by decisions drawn at random, in as little memory as they can do with and in more: its
    planner, columns and their schedules.
    """
    rng = random.Random(seed)
    costs = {"per_byte": 3e-7, "per_transfer": 5e-4} if seed % 4 == 0 else {"per_byte": 0.0, "per_transfer": 0.0}
    on = device(
        read=rng.choice(SPEEDS),
        write=rng.choice(SPEEDS),
        latency=rng.choice([0.0, 1e-3]),
        resident=50_000,
        import_peak=70_000,
        per_instruction=100,
        **costs,
    )
    layers = rng.choice([2, 3, 4])
    planner = ModelPlanner(small_chain(seed, layers=layers, on=on, weights=seed % 2 == 0, trainables=seed % 3 == 0))
    problem = planner.problem
    drawn = [[measure(kind, random_decision(rng, kind)) for _ in range(3)] for kind in problem.types]
    combined = [tuple(rng.choice(drawn[kind]) for kind in problem.layer_type) for _ in range(3)]
    for columns in [*(rule_columns(problem, rule) for rule in (mebp, smallest)), *combined]:
        least = charged_bytes(problem, columns)
        for room in (least, least + least // 50, least + least // 4):
            schedule, _ = realize(problem, columns, room)
            if schedule is not None:
                yield planner, columns, schedule


def rows_of(problem, columns, *, careful=False):
    """A program of the rows over these very columns, and the rows."""
    terms = [LayerFigures(**{name: Linear(value) for name, value in zip(FIELDS, column.row)}) for column in columns]
    program = LinearProgram()
    return program, add_step_constraints(program, problem, terms, careful=careful)


def told(problem, columns, limit_bytes, *, careful):
    """Seconds by the rows; None where the columns do not fit."""
    program, rows = rows_of(problem, columns, careful=careful)
    program.bounds(rows.bytes, 0.0, limit_bytes / KIB)
    result = program.solve(rows.total_ms)
    return None if result.infeasible else result.objective / MS


def between_steps_alone(kind):
    """A decision that holds little within a step and unpacked weights from one to the next: an evaluation holds
    most.
    """
    decision = smallest(kind, last=False)
    held = {
        name: next((m for m in weight.modes if m.step_gap == "unpacked" and m.backward_gap == "disk"), weight.modes[0])
        for name, weight in kind.weights.items()
    }
    return replace(decision, weights=tuple(held.items()))


def test_the_rows_hold_what_the_schedule_holds_and_its_instructions():
    evaluations = 0
    for seed in range(6):
        rng = random.Random(seed)
        on = device(per_instruction=100)
        decoder = decoder_like(2, tokens=64, hidden=96, ffn=192, slices=3, on=on)
        for problem in (layered(small_chain(seed, layers=4, on=on)), layered(decoder)):
            drawn = [measure(kind, random_decision(rng, kind)) for kind in problem.types]
            waiting = [measure(kind, between_steps_alone(kind)) for kind in problem.types]
            for by_type in (drawn, waiting):
                columns = tuple(by_type[kind] for kind in problem.layer_type)
                joined = CyclePart(problem=problem, columns=columns).draft()
                count = len(joined.train) + len(joined.evaluate)
                assert instruction_count(problem, columns) == count
                train, evaluate = (
                    max(live_profile(entries, joined.resident, joined.sizes))
                    for entries in (joined.train, joined.evaluate)
                )
                evaluations += evaluate > train
                held = max(train, evaluate) + 100 * count
                assert charged_bytes(problem, columns) == held
                program, rows = rows_of(problem, columns)
                told = program.solve(Linear().add(rows.bytes)).objective * KIB
                assert told == pytest.approx(held, abs=1)
    assert evaluations >= 3


def test_a_step_between_updates_needs_no_moments():
    """Whether it moves them or not: of many steps that make an update only the last needs them."""
    on = device(read=2e7, write=2e7)
    one = decoder_like(2, tokens=128, rank=64, on=on).model_copy(
        update={"optimizer": {"name": "adamw", "state_tensors": 1}}
    )
    bounds = []
    for profile in (one, one.model_copy(update={"optimizer": adamw(64)})):
        any_schedule = AnyScheduleBound(layered(profile))
        bounds.append([any_schedule.step_seconds(any_schedule.taken + room) for room in (1 << 20, 4 << 20, 1 << 40)])
    assert bounds[0][0] > bounds[0][1] > bounds[0][2]
    assert bounds[1] == pytest.approx(bounds[0])


class Figures:
    """The rows over figures of two layers that are made up, in KiB and ms, 0 where they are not named."""

    def __init__(self):
        on = device(read=1e6, write=1e6, latency=5e-3)
        self.problem = layered(small_chain(0, layers=2, on=on))
        sizes = [k.raw_bytes[value] for k in self.problem.types for value in k.offloadable]
        assert max(sizes) > min(sizes)
        assert self.problem.across_forward == (0, 0)
        self.slowest = min(size / KIB / (5 + size / 1e3) for size in sizes)
        """KiB per ms: the least that moves, of what may"""

    def least_ms(self, limit, *layers):
        """Of the step, in `limit` KiB beside what is always there."""
        program = LinearProgram()
        terms = [LayerFigures.of(lambda name, given=given: Linear(given.get(name, 0.0))) for given in layers]
        rows = add_step_constraints(program, self.problem, terms)
        program.bounds(rows.bytes, 0.0, limit + self.problem.constant_bytes / KIB)
        return program.solve(rows.total_ms).objective


def test_what_the_disk_does_may_wait_as_long_as_there_is_room():
    made = Figures()
    wide, slow = {"forward_peak": 1000.0, "forward_seconds": 1.0}, {"backward_seconds": 100.0}
    # What the fullest window spills may be written once it is through, and what the slow one fetches be read in it.
    assert made.least_ms(1000, wide | slow | {"spills_forward": 10.0}, {}) == pytest.approx(101)
    assert made.least_ms(1000, wide | slow | {"fetches_backward": 10.0}, {}) == pytest.approx(101)
    assert made.least_ms(1000, {"forward_seconds": 1.0, "fetches_backward": 10.0}, {}) == pytest.approx(10)


def test_what_a_transfer_costs_the_cores_may_be_paid_while_they_wait():
    """The first layer waits 10 ms for its weights, in which the read of the second's can be asked for: 2 ms that nobody
    notices.
    """
    made = Figures()
    first = {"forward_seconds": 0.1, "reads_forward": 10.0}
    then = {"forward_seconds": 10.0, "reads_forward": 2.5, "arriving_forward": 2.0}
    assert made.least_ms(1e6, first, then) == pytest.approx(20.0)
    # Without anything to wait for it is paid all the same.
    assert made.least_ms(1e6, {"forward_seconds": 10.0}, then) == pytest.approx(22.0)
    # What the first window needs is paid in it, and what the second reads may be read meanwhile.
    assert made.least_ms(1e6, then, {"forward_seconds": 0.1}) == pytest.approx(12.1)
    assert made.least_ms(1e6, then, first) == pytest.approx(12.5)
    assert made.least_ms(1e6, {"backward_seconds": 10.0, "leaving": 3.0}, {}) == pytest.approx(13.0)


def test_what_waits_for_the_disk_takes_memory():
    made = Figures()
    first = {"spills_forward": 10.0, "backward_seconds": 100.0}
    then = {"forward_peak": 1000.0, "forward_seconds": 1.0}
    waiting = 10 * made.slowest
    assert made.least_ms(1000 + waiting, first, then) == pytest.approx(101)
    # Half of it has to be written before the second layer's window, or in it.
    assert made.least_ms(1000 + waiting / 2, first, then) == pytest.approx(100 + 5)
    assert made.least_ms(1000, first, then) == pytest.approx(100 + 10)


def test_no_schedule_is_faster_than_its_columns_rows():
    """In the very bytes that it takes. By their compute alone the rows would say much less, and careful ones too
    much.
    """
    ratios, computing, more = [], [], 0
    for seed in SEEDS:
        for planner, columns, schedule in schedules(seed):
            problem = planner.problem
            made = planner._finish(1 << 40, "solver", SearchResult(schedule=schedule, bound_seconds=0.0), NEVER)
            # What it says of itself is what the simulator finds.
            assert made.step_seconds == pytest.approx(schedule.seconds)
            assert made.peak_bytes == schedule.peak_bytes
            limit = schedule.peak_bytes - problem.profile.device.floor.resident_bytes - problem.workspace_bytes
            bound = told(problem, columns, limit, careful=False)
            assert bound is not None, seed
            assert bound <= schedule.seconds * (1 + 1e-6), seed
            ratios.append(bound / schedule.seconds)
            own = sum(column.core_seconds for column in columns)
            computing.append(own / schedule.seconds)
            careful = told(problem, columns, limit, careful=True)
            more += careful is None or careful > schedule.seconds
    assert sum(ratios) > 0.85 * len(ratios)
    assert sum(ratios) > 1.05 * sum(computing)
    assert more > 10


@pytest.mark.slow
def test_the_states_of_a_fleets_member_are_not_counted():
    """Its plan has none, however many steps make an update."""
    made = decoder_like(2, tokens=256, slices=3)
    tight = ModelPlanner(made).minimum_bytes()

    def bound(accumulate):
        optimizer = {"name": EXCHANGE, "state_tensors": 0, "accumulate": accumulate}
        return AnyScheduleBound(layered(made.model_copy(update={"optimizer": optimizer}))).step_seconds(tight)

    assert bound(4) == bound(1) > 0
