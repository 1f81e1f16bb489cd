"""The replay against schedules written out here, every figure of theirs counted by hand; and what each of their edits
breaks.
"""

from __future__ import annotations

import pytest
from broken_plans import changed, rejected
from hand_schedule import EVALUATE, FLOOR, MS, OPERATORS, RESIDENT, TRAIN, operator, page, written
from synthetic import PAGE

from tightfit.planner.instructions import read_all
from tightfit.planner.plan_result import drafted_phase
from tightfit.planner.schema import MEZO
from tightfit.planner.simulation.replay import LINE
from tightfit.planner.simulation.simulate import simulate
from tightfit.profiles.schema import Layer, Program, Tensor, Value


@pytest.fixture(scope="module")
def plan():
    return written(OPERATORS, TRAIN, EVALUATE, arena=page(10) + LINE, optimizer={"name": "adamw", "state_tensors": 2})


def test_time_by_hand(plan):
    found = simulate(plan).train
    assert found.seconds == pytest.approx(81.5 * MS)
    waits = [5 - 4.375, 24 - 9.5, 33 - 24.5, 51 - 41.75, 61.5 - 53.5, 71.5 - 61.5, 81.5 - 72.5]
    assert found.stall_seconds == pytest.approx(sum(waits) * MS)
    transfers = [0.375, 1.5, 0.5, 0.375, 0.375, 1, 1, 1]
    assert found.compute_seconds == pytest.approx((4 + 2 + 3 + 1 + 0.5 + sum(transfers)) * MS)
    assert found.recompute_seconds == pytest.approx(4 * MS)
    assert found.unpack_seconds == pytest.approx(1 * MS)
    assert (found.read_bytes, found.write_bytes) == (page(5), page(5))


def test_time_of_an_evaluation_by_hand(plan):
    found = simulate(plan).evaluate
    assert found.seconds == pytest.approx(13 * MS)
    assert found.stall_seconds == pytest.approx((5 - 0.375) * MS)
    assert (found.read_bytes, found.write_bytes) == (PAGE, 0)


def test_what_is_being_fetched_is_freed_once_it_has_landed(plan):
    """From 37 on: the disk until 42, and the backward only then, which ends at 46 instead of 41."""
    place = at(["run", "l", 3])
    edit = put(place, ["fetch", "adam_m:t", page(8)], ["free", "adam_m:t"])
    assert simulate(changed(plan, edit)).train.seconds == pytest.approx((81.5 + 5) * MS)


def test_what_is_being_written_is_freed_once_that_is_through(plan):
    """From 40 on: the disk until 58, and what is left of the backward only then, which ends at 59 instead of 41."""

    def edit(instructions):
        instructions.remove(["free", "w"])
        instructions[at(["run", "l", 4]) : at(["run", "l", 4])] = [["spill", "w"], ["free", "w"]]

    assert simulate(changed(plan, edit)).train.seconds == pytest.approx((81.5 + 18) * MS)


def test_memory_by_hand(plan):
    found = simulate(plan)
    instructions = 10 * (len(TRAIN) + len(EVALUATE))
    assert found.arena_bytes == page(10) + LINE  # of the evaluation, to a whole line
    assert found.workspace_bytes == 6000  # of the evaluation
    assert found.peak_bytes == 1000 + instructions + page(10) + LINE + 6000
    assert found.live_bytes == page(8) + 4  # x, t, w, b and loss of the evaluation
    assert found.train.peak_bytes == 1000 + instructions + page(7) + 4 + 5000
    assert found.evaluate.peak_bytes == 1000 + instructions + page(10) + 4 + 6000


def test_a_peak_by_hand(plan):
    """With its workspace the operator that runs again holds more than the unpacking, whose tensors take more."""
    found = simulate(plan)
    assert found.train.peak.instruction == 8
    assert found.train.peak.text == "l: first (forward again)"
    assert found.train.peak.tensors == {"l/a": page(2), "w": page(2), "t": PAGE, "x": PAGE, "loss": 4}
    assert list(found.train.peak.tensors) == ["l/a", "w", "t", "x", "loss"]
    point = next(point for point in found.timeline if point.instruction == 8)
    floor = 1000 + 10 * (len(TRAIN) + len(EVALUATE))
    assert point.bytes == floor + page(7) + 4 + 5000
    assert point.by_kind == {
        "floor": floor,
        "batch": PAGE,
        "trainable": PAGE,
        "weight": page(2),
        "activation": page(2) + 4,
        "workspace": 5000,
        "fragmentation": PAGE,  # below l/a
    }
    assert all(point.bytes == sum(point.by_kind.values()) for point in found.timeline)


def test_importing_may_be_the_peak(plan):
    """A process that has imported PyTorch has held as much as that takes."""
    floor = FLOOR.model_copy(update={"import_peak_bytes": 1 << 20})
    found = simulate(plan.model_copy(update={"device": plan.device.model_copy(update={"floor": floor})}))
    assert found.peak_bytes == found.train.peak_bytes == 1 << 20


@pytest.mark.parametrize(
    ("claim", "true"), [("arena_bytes", page(10) + LINE), ("workspace_bytes", 6000), ("peak_bytes", None)]
)
def test_a_plan_states_no_less_than_is_found(plan, claim, true):
    true = true or simulate(plan).peak_bytes
    simulate(plan.model_copy(update={claim: true}))
    less = plan.model_copy(update={claim: true - 1})
    assert rejected(less, "claims").tensor == claim


def at(instruction, *, nth=0):
    """Where the schedule has an instruction that begins so."""
    return [index for index, entry in enumerate(TRAIN) if entry[: len(instruction)] == instruction][nth]


def without(*gone):
    def edit(instructions):
        instructions[:] = [entry for entry in instructions if entry[:2] not in gone]

    return edit


def put(place, *added):
    def edit(instructions):
        instructions[place:place] = added

    return edit


def altered(place, operand, value):
    def edit(instructions):
        instructions[place][operand] = value

    return edit


UPDATE = at(["update"])
END = len(TRAIN)


@pytest.mark.parametrize(
    ("edit", "invariant", "tensor"),
    [
        pytest.param(put(END, ["run", "l", 5, []]), "form", "l", id="an operator after the last"),
        pytest.param(put(END, ["run", "l", -1, []]), "form", "l", id="an operator before the first"),
        pytest.param(altered(1, 3, [page(3), None, None]), "form", "l", id="more offsets than outputs"),
        pytest.param(altered(1, 3, [page(3)]), "form", "l", id="fewer offsets than outputs"),
        pytest.param(altered(1, 3, [page(3), page(8)]), "form", "l", id="an offset for what is unused"),
        pytest.param(altered(1, 3, [None, None]), "form", "l/a", id="no offset"),
        pytest.param(altered(8, 3, [page(8), None]), "already-resident", "l/a", id="made again in another place"),
        pytest.param(altered(10, 3, [page(8)]), "already-resident", "grad:t", id="added to in another place"),
        pytest.param(put(0, ["spill", "l/a"]), "use-before-resident", "l/a", id="written before it is made"),
        pytest.param(put(END, ["free", "x"], ["fetch", "x", page(5)]), "leak", "x", id="back in another place"),
        pytest.param(
            without(["fetch", "adam_v:t"], ["spill", "adam_v:t"], ["free", "adam_v:t"]),
            "use-before-resident",
            "adam_v:t",
            id="updated without its state",
        ),
        pytest.param(put(UPDATE, ["free", "grad:t"]), "use-before-resident", "grad:t", id="without its gradient"),
        pytest.param(put(UPDATE, ["free", "t"]), "use-before-resident", "t", id="updated while it is away"),
        pytest.param(
            put(UPDATE, ["spill", "adam_m:t"]), "lost-state", "adam_m:t", id="updated while its state is written"
        ),
        pytest.param(
            put(
                at(["run", "l", 4]),
                ["fetch", "adam_m:t", page(8)],
                ["fetch", "adam_v:t", page(9)],
                ["update", "t"],
            ),
            "update-once",
            "t",
            id="updated with half its gradient",
        ),
        pytest.param(
            put(UPDATE + 1, ["spill", "adam_m:t"], ["free", "adam_m:t"], ["fetch", "adam_v:t", page(8)]),
            "transfer",
            "adam_v:t",
            id="fetched as it was before its update",
        ),
        pytest.param(put(END, ["read", "t", page(2)]), "transfer", "t", id="a trainable read from the store"),
    ],
)
def test_what_an_edit_breaks(plan, edit, invariant, tensor):
    assert rejected(changed(plan, edit), invariant).tensor == tensor


def test_states_that_stay_in_memory_are_on_disk_once_they_are_written(plan):
    states = {"adam_m:t": page(8), "adam_v:t": page(9)}
    moved = [entry for entry in TRAIN if entry[0] != "update" and entry[1] in states]
    beside = [entry if entry[0] != "unpack" else ["unpack", "w", page(6)] for entry in EVALUATE]
    beside[0] = ["read", "w", page(12)]
    stays = plan.model_copy(
        update={
            "resident": RESIDENT | states,
            "arena_bytes": page(13),
            "train": drafted_phase([entry for entry in TRAIN if entry not in moved]),
            "evaluate": drafted_phase(beside),
        }
    )
    assert simulate(stays).train.read_bytes == page(3)
    back = changed(stays, put(0, ["free", "adam_m:t"], ["fetch", "adam_m:t", page(8)]))
    assert rejected(back, "transfer").tensor == "adam_m:t"


def test_the_arena_ends_where_it_ends(plan):
    beyond = changed(plan, altered(3, 3, [page(10) + LINE, page(2)]), "evaluate")
    assert rejected(beyond, "offset").tensor == "loss"


@pytest.mark.parametrize(("place", "other"), [(page(4), "l/a"), (page(6), "w"), (page(7) - LINE, "w")])
def test_overlap_with_what_lies_below(plan, place, other):
    """The loss is made inside of what begins below it."""
    error = rejected(changed(plan, altered(at(["run", "l", 1]), 3, [place])), "overlap")
    assert error.tensor == "loss"
    assert other in str(error)


def test_overlap_with_what_lies_above(plan):
    error = rejected(changed(plan, altered(at(["run", "l", 3]), 3, [page(3) - LINE])), "overlap")
    assert error.tensor == "grad:t"
    assert "l/a" in str(error)


# --- two forwards --------------------------------------------------------------------------------------------------

TWICE = [
    operator("first", ["x", "t"], ["a"], 1),
    operator("second", ["a"], ["b"], 1),
    operator("third", ["b", "t"], ["loss"], 1, workspace=100),
]
FORWARD = [["run", "l", 0, [page(2)]], ["run", "l", 1, [page(4)]], ["run", "l", 2, [page(8)]]]
FREED = [["free", "l/a"], ["free", "l/b"], ["free", "loss"]]
TWO_FORWARDS = [["perturb", "t", 1], *FORWARD, ["perturb", "t", -2], *FORWARD, ["update", "t"], *FREED]


@pytest.fixture(scope="module")
def two_forwards():
    optimizer = {"name": MEZO, "state_tensors": 0}
    return written(TWICE, TWO_FORWARDS, [*FORWARD, *FREED], arena=page(8) + LINE, optimizer=optimizer)


def test_two_forwards_by_hand(two_forwards):
    """A trainable is drawn noise for three times: its bytes, for the time of an update each."""
    found = simulate(two_forwards)
    assert found.train.seconds == pytest.approx((2 * 3 + 3 * 0.5) * MS)
    assert found.train.recompute_seconds == 0
    assert found.workspace_bytes == PAGE
    assert found.train.peak.instruction == 4
    assert found.train.peak.text == "perturb t"


@pytest.mark.parametrize(
    ("edit", "invariant"),
    [
        pytest.param(put(8, ["perturb", "t", 1]), "perturbed", id="not taken back by the update"),
        pytest.param(put(9, ["perturb", "t", 1]), "perturbed", id="after the update"),
        pytest.param(put(0, ["free", "t"]), "use-before-resident", id="while it is away"),
        pytest.param(put(6, FORWARD[2]), "operator-order", id="with what the first forward made"),
        pytest.param(put(4, *FORWARD), "perturbed", id="the second forward without a perturbation"),
    ],
)
def test_what_an_edit_of_two_forwards_breaks(two_forwards, edit, invariant):
    rejected(changed(two_forwards, edit), invariant)


def test_what_is_perturbed_is_resident(two_forwards):
    error = rejected(changed(two_forwards, put(0, ["free", "t"])), "use-before-resident")
    assert (error.tensor, error.instruction) == ("t", 1)


# --- a backward left out -------------------------------------------------------------------------------------------

PROGRAMS = {
    "low": [
        operator("forward", ["x", "t"], ["h"], 1),
        operator("backward", ["gh", "x"], ["grad:t"], 1, phase="backward"),
    ],
    "middle": [
        operator("forward", ["h", "u"], ["y"], 1),
        operator("backward", ["gy", "h"], ["gh", "grad:u"], 1, phase="backward"),
    ],
    "top": [
        operator("forward", ["y"], ["loss"], 1),
        operator("backward", ["loss"], ["gy"], 1, phase="backward"),
        operator("backward", ["gy", "y"], ["gy"], 1, phase="backward"),
    ],
}
KINDS = {"x": "batch", "t": "trainable", "u": "trainable", "gy": "gradient", "gh": "gradient", "grad:t": "gradient"}
KINDS |= {"grad:u": "gradient", "h": "activation", "y": "activation", "loss": "activation"}
ONCE = [
    ["run", "low", 0, [page(3)]],
    ["run", "middle", 0, [page(4)]],
    ["run", "top", 0, [page(5)]],
    ["run", "top", 1, [page(6)]],
    ["run", "top", 2, [page(6)]],
]
WHOLE = [
    *ONCE,
    ["run", "middle", 1, [page(7), page(8)]],
    ["update", "u"],
    ["run", "low", 1, [page(9)]],
    ["update", "t"],
    *(["free", name] for name in ("h", "y", "loss", "gy", "gh", "grad:u", "grad:t")),
]
PASSED = [
    *ONCE,
    ["pass", "gy", "gh"],
    ["run", "low", 1, [page(9)]],
    ["update", "t"],
    *(["free", name] for name in ("h", "y", "loss", "gh", "grad:t")),
]
PASS = PASSED.index(["pass", "gy", "gh"])


@pytest.fixture(scope="module")
def cycle(plan):
    """A step without the backward of the layer in the middle, and one with all."""
    sizes = {name: 4 if name == "loss" else PAGE for name in KINDS}
    programs = [
        Program(
            name=name,
            values=[
                Value(name=v, shape=[sizes[v]], stride=[1], dtype="uint8", bytes=sizes[v], kind=KINDS[v])
                for v in dict.fromkeys(v for op in operators for v in [*op.inputs, *op.outputs])
            ],
            operators=operators,
        )
        for name, operators in PROGRAMS.items()
    ]
    layers = [
        Layer(name=program.name, program=program.name, bindings={value.name: value.name for value in program.values})
        for program in programs
    ]
    tensors = [
        Tensor(name=name, kind=KINDS[name], shape=[PAGE], dtype="uint8", bytes=PAGE, update_seconds=0.5 * MS)
        for name in ("x", "t", "u")
    ]
    return plan.model_copy(
        update={
            "programs": programs,
            "layers": layers,
            "tensors": tensors,
            "optimizer": {"name": "sgd", "state_tensors": 0},
            "resident": {"x": 0, "t": PAGE, "u": page(2)},
            "train": drafted_phase(PASSED).model_copy(update={"skipped": ["middle"]}),
            "cycle": [drafted_phase(WHOLE)],
            "evaluate": drafted_phase([*ONCE[:3], ["free", "h"], ["free", "y"], ["free", "loss"]]),
        }
    )


def test_a_cycle_by_hand(cycle):
    found = simulate(cycle)
    assert found.train.seconds == pytest.approx((5 + 1 + 0.5) * MS)
    assert found.cycle[0].seconds == pytest.approx((5 + 2 + 2 * 0.5) * MS)
    assert found.step_seconds == pytest.approx((6.5 + 8) / 2 * MS)


def test_in_a_cycle_everything_is_trained(cycle):
    alone = cycle.model_copy(update={"cycle": []})
    assert rejected(alone, "update-once").tensor == "u"


@pytest.mark.parametrize(
    ("edit", "invariant"),
    [
        pytest.param(put(PASS - 1, PASSED[PASS]), "passed-once", id="half of it"),
        pytest.param(put(PASS - 2, PASSED[PASS]), "use-before-resident", id="before it is made"),
        pytest.param(put(PASS + 1, PASSED[PASS]), "passed-once", id="twice"),
        pytest.param(altered(PASS, 2, "grad:t"), "passed-once", id="as another gradient"),
        pytest.param(put(PASS, ["run", "middle", 1, [page(7), page(8)]]), "operator-order", id="a skipped backward"),
    ],
)
def test_what_an_edit_of_a_passage_breaks(cycle, edit, invariant):
    rejected(changed(cycle, edit), invariant)


def test_a_gradient_passes_no_layer_whose_backward_runs(cycle):
    step = cycle.cycle[0].model_copy(update={"instructions": read_all([*ONCE, PASSED[PASS], *WHOLE[len(ONCE) :]])})
    assert rejected(cycle.model_copy(update={"cycle": [step]}), "passed-once").tensor == "gy"
