"""Makes plans without solver or model, for tests of tables, pictures and pages."""

from __future__ import annotations

from tightfit.planner.schema import Peak, Phase, Plan, TimelinePoint
from tightfit.profiles.schema import Channel, DeviceFigures, Floor, Layer, Model, Operator, Program, Value
from tightfit.runtime.common.units import MIB

FLOOR = 220 * MIB


def sample_plan(policy="solver", budget=350 * MIB, *, peak=340 * MIB, seconds=1.25, layers=6, **changes):
    """A feasible plan whose activations rise and fall once, with the peak in the middle of the step."""
    timeline = []
    steps = 8 * layers
    room = peak - FLOOR - 20 * MIB
    for index in range(steps):
        height = 1 - abs(2 * index / (steps - 1) - 1)
        activation = int(room * 0.8 * height)
        weight = int(room * 0.2) if index % 2 else int(room * 0.05)
        by_kind = {
            "floor": FLOOR,
            "trainable": 8 * MIB,
            "optimizer": 12 * MIB,
            "weight": weight,
            "activation": activation,
        }
        timeline.append(
            TimelinePoint(
                instruction=index, seconds=seconds * (index + 1) / steps, bytes=sum(by_kind.values()), by_kind=by_kind
            )
        )
    highest = max(timeline, key=lambda point: point.bytes)
    passes = steps // 3
    train = Phase(
        instructions=_instructions(passes),
        seconds=seconds,
        peak_bytes=peak,
        peak=Peak(
            instruction=highest.instruction,
            text="layer 5: aten.mm.default",
            tensors={"layer5/hidden": 5 * MIB, "model.layers.5.mlp.up_proj.weight": 2 * MIB},
        ),
        compute_seconds=seconds * 0.8,
        recompute_seconds=seconds * 0.1,
        unpack_seconds=seconds * 0.1,
        stall_seconds=seconds * 0.05,
        read_bytes=60 * MIB,
        write_bytes=MIB,
    )
    values = {
        "fingerprint": "f" * 64,
        "profile_fingerprint": "p" * 64,
        "policy": policy,
        "status": "optimal",
        "budget_bytes": budget,
        "floor_bytes": FLOOR,
        "peak_bytes": peak,
        "step_seconds": seconds,
        "bound_seconds": seconds,
        "any_schedule_bound_seconds": seconds * 0.8,
        "gap": 0.0,
        "any_schedule_gap": 0.2,
        "solve_seconds": 1.5,
        "model": Model(name="Tiny <model>", source="tiny", kind="decoder", lora={"rank": 8, "alpha": 16}),
        "batch": 2,
        "seq": 64,
        "compute_dtype": "bfloat16",
        "optimizer": {"name": "adamw", "state_tensors": 2},
        "device": sample_device(),
        "tensors": [],
        "programs": [_program(seconds / 2 / passes)],
        "layers": [Layer(name=f"layer {index}", program="block", bindings={}) for index in range(passes)],
        "loss": "loss",
        "token_losses": None,
        "decisions": {
            "model.layers.0.mlp.up_proj.weight": "streamed",
            "model.layers.0/hidden": "recomputed",
            "a": "kept",
        },
        "resident": {},
        "arena_bytes": peak - FLOOR - MIB,
        "workspace_bytes": MIB,
        "train": train,
        "evaluate": None,
        "timeline": timeline,
    }
    return Plan(**values | changes)


def _program(seconds):
    """A forward operator that saves a value and a backward operator that reads it."""
    value = Value(name="saved", shape=[MIB], stride=[1], dtype="uint8", bytes=MIB, kind="activation")
    forward = Operator(
        target="aten.mm.default", phase="forward", args=[], inputs=[], outputs=["saved"], seconds=seconds
    )
    backward = forward.model_copy(update={"phase": "backward", "inputs": ["saved"], "outputs": [None]})
    return Program(name="block", values=[value], operators=[forward, backward])


def _instructions(layers):
    """All layers forward, then backward: what each has saved lies in a place of its own until then."""
    backward = [[["run", f"layer {index}", 1, [None]], ["free", f"layer {index}/saved"]] for index in range(layers)]
    forward = [["run", f"layer {index}", 0, [index * MIB]] for index in range(layers)]
    return [*forward, *(one for pair in reversed(backward) for one in pair)]


def infeasible_plan(policy="keep-all", budget=250 * MIB, minimum=int(412.34 * MIB)):
    """The infeasible plan that answers a budget below `minimum` bytes."""
    return sample_plan(
        policy,
        budget,
        status="infeasible",
        minimum_budget_bytes=minimum,
        minimum_budget_reason="layer 5: aten.mm.default needs its input, its weight and its output at once",
        train=None,
        timeline=[],
    )


def sample_device():
    channel = Channel(bytes_per_second=1e9, latency_seconds=1e-4)
    floor = Floor(import_peak_bytes=FLOOR, resident_bytes=150 * MIB, instruction_bytes=600)
    return DeviceFigures(name="cpu-test", kind="cpu", threads=2, floor=floor, read=channel, write=channel)


def sample_plans():
    """Plans of three policies at four budgets, some of them infeasible."""
    budgets = [250 * MIB, 350 * MIB, 500 * MIB, 800 * MIB]
    plans = [
        sample_plan("solver", budget, peak=min(budget - 4 * MIB, 640 * MIB), seconds=0.8 + 120 / (budget / MIB))
        for budget in budgets
    ]
    plans += [infeasible_plan("keep-all", budget, 640 * MIB) for budget in budgets[:3]]
    plans.append(sample_plan("keep-all", budgets[3], peak=640 * MIB, seconds=0.95))
    plans.append(infeasible_plan("mebp", budgets[0], 262 * MIB))
    plans += [sample_plan("mebp", budget, peak=262 * MIB, seconds=1.7) for budget in budgets[1:]]
    return plans
