"""A schedule written by hand, with its times counted by hand in comments, as a reference for the simulator."""

from __future__ import annotations

from synthetic import PAGE, profile_of

from tightfit.planner.plan_result import drafted, drafted_phase
from tightfit.profiles.schema import Channel, DeviceFigures, Floor, Layer, Operator, Program, Tensor, Value

MS = 1e-3

READ = Channel(
    bytes_per_second=PAGE / 4e-3,
    latency_seconds=1 * MS,
    compute_seconds_per_byte=0.125e-3 / PAGE,
    compute_seconds_per_transfer=0.25 * MS,
)
"""Reading a page takes 5 ms of the disk and 0.375 ms of the cores."""

WRITE = Channel(
    bytes_per_second=PAGE / 8e-3,
    latency_seconds=2 * MS,
    compute_seconds_per_byte=0.5e-3 / PAGE,
    compute_seconds_per_transfer=0.5 * MS,
)
"""Writing a page takes 10 ms of the disk and 1 ms of the cores."""

FLOOR = Floor(import_peak_bytes=0, resident_bytes=1000, instruction_bytes=10)

VALUES = {
    "x": (PAGE, "batch"),
    "t": (PAGE, "trainable"),
    "w": (2 * PAGE, "weight"),
    "table": (PAGE, "weight"),
    "a": (2 * PAGE, "activation"),
    "b": (4 * PAGE, "activation"),
    "loss": (4, "activation"),
    "grad:t": (PAGE, "gradient"),
}

BOUND = ("x", "t", "w", "table", "loss", "grad:t")

TENSORS = [
    Tensor(name="x", kind="batch", shape=[PAGE], dtype="uint8", bytes=PAGE),
    Tensor(name="t", kind="trainable", shape=[PAGE], dtype="uint8", bytes=PAGE, update_seconds=0.5 * MS),
    Tensor(
        name="w", kind="weight", shape=[PAGE], dtype="uint8", bytes=2 * PAGE, packed_bytes=PAGE, unpack_seconds=1 * MS
    ),
    Tensor(name="table", kind="weight", shape=[PAGE], dtype="uint8", bytes=PAGE, packed_bytes=PAGE),
]

X, T = 0, PAGE

RESIDENT = {"x": X, "t": T}


def page(number):
    return number * PAGE


TRAIN = [
    ["read", "w", page(2)],  # the disk until 5, the cores until 0.375
    ["run", "l", 0, [page(3), None]],  # until 4.375
    ["unpack", "w", page(5)],  # waits until 5, until 6
    ["free", "packed:w"],
    ["spill", "l/a"],  # two pages from 6: the disk until 24, the cores until 7.5
    ["run", "l", 1, [page(7)]],  # reads what is being written; until 9.5
    ["free", "l/a"],  # waits until 24
    ["fetch", "l/a", page(3)],  # two pages: the disk until 33, the cores until 24.5
    ["run", "l", 0, [page(3), None]],  # again, in the place that is being filled: waits until 33, until 37
    ["run", "l", 3, [page(2)]],  # until 40
    ["run", "l", 4, [page(2)]],  # adds to the same gradient; until 41
    ["free", "w"],
    ["free", "l/a"],
    ["fetch", "adam_m:t", page(3)],  # the disk until 46, the cores until 41.375
    ["fetch", "adam_v:t", page(4)],  # the disk until 51, the cores until 41.75
    ["update", "t"],  # waits until 51, until 51.5
    ["spill", "adam_m:t"],  # the disk until 61.5, the cores until 52.5
    ["spill", "adam_v:t"],  # the disk until 71.5, the cores until 53.5
    ["free", "grad:t"],
    ["free", "adam_m:t"],  # waits until 61.5
    ["free", "adam_v:t"],  # waits until 71.5
    ["free", "loss"],
    ["spill", "x"],  # the disk until 81.5, which ends the step; the cores until 72.5
]

EVALUATE = [
    ["read", "w", page(6)],  # the disk until 5, the cores until 0.375
    ["unpack", "w", page(8)],  # waits until 5, until 6
    ["free", "packed:w"],
    ["run", "l", 2, [page(10), page(2)]],  # until 13
    ["free", "w"],
    ["free", "l/b"],
    ["free", "loss"],
]


def operator(target, inputs, outputs, milliseconds, *, phase="forward", workspace=0, gathers=()):
    return Operator(
        target=target,
        phase=phase,
        args=[],
        inputs=inputs,
        outputs=outputs,
        seconds=milliseconds * MS,
        workspace_bytes=workspace,
        gathers=list(gathers),
    )


OPERATORS = [
    operator("first", ["x", "t", "table"], ["a", None], 4, workspace=5000, gathers=["table"]),
    operator("second", ["a", "w"], ["loss"], 2),
    operator("whole", ["x", "t", "w"], ["loss", "b"], 7, phase="inference", workspace=6000),
    operator("third", ["a", "w"], ["grad:t"], 3, phase="backward"),
    operator("fourth", ["x", "grad:t"], ["grad:t"], 1, phase="backward"),
]


def written(operators, train, evaluate, *, arena, optimizer):
    program = Program(
        name="p",
        values=[
            Value(name=name, shape=[size], stride=[1], dtype="uint8", bytes=size, kind=kind)
            for name, (size, kind) in VALUES.items()
        ],
        operators=operators,
    )
    device = DeviceFigures(name="by hand", kind="cpu", threads=1, floor=FLOOR, read=READ, write=WRITE)
    layer = Layer(name="l", program="p", bindings={name: name for name in BOUND})
    profile = profile_of([program], [layer], TENSORS, "loss", on=device).model_copy(update={"optimizer": optimizer})
    return drafted(
        profile,
        profile,
        policy="by hand",
        budget_bytes=1 << 30,
        decisions={},
        resident=RESIDENT,
        train=[drafted_phase(train)],
        evaluate=drafted_phase(evaluate),
        arena_bytes=arena,
    )
