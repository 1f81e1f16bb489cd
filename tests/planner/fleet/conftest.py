"""Small fleets whose plans take little time: a profile of few layers with gradients of some size, on devices of any
speed.
"""

from __future__ import annotations

import pytest
from fleet_kinds import plan_data, plan_pipeline
from synthetic import MIB, ProgramBuilder, device, profile_of

from tightfit.planner.fleet.members import MemberSpec
from tightfit.planner.fleet.schema import Link
from tightfit.profiles.schema import Layer, Tensor

KIB = 1 << 10
HELD = {"import_peak": 6 * MIB, "resident": 5 * MIB, "per_instruction": 50}
"""of the process, before a model is loaded"""


def _layers(layers=4, *, trained=256 * KIB, speed=1.0, hidden=MIB, on=None):
    """A chain of layers y = f2(f1(x, w), t) with a weight w and a trained t; `speed` divides all seconds."""
    programs, placed, tensors = [], [], []
    for index in range(layers):
        first, last = index == 0, index == layers - 1
        made = ProgramBuilder(f"p{index}")
        made.value("x", hidden, "batch" if first else "activation")
        made.value("w", 2 * MIB, "weight")
        made.value("t", trained, "trainable")
        made.value("a", 2 * hidden)
        made.value("y", 4 if last else hidden)
        made.run("f1", ["x", "w"], ["a"], 0.02 / speed)
        made.run("f2", ["a", "t"], ["y"], 0.01 / speed)
        if not last:
            made.value("gy", hidden, "gradient")
        made.value("ga", hidden, "gradient")
        made.value("grad:t", trained, "gradient")
        made.run("b2", ["y" if last else "gy", "a", "t"], ["ga"], 0.01 / speed, phase="backward")
        made.run("bt", ["ga", "a"], ["grad:t"], 0.01 / speed, phase="backward")
        if not first:
            made.value("gx", hidden, "gradient")
            made.run("b1", ["ga", "w"], ["gx"], 0.02 / speed, phase="backward")
        bindings = {
            "x": "data" if first else f"h{index}",
            "y": "loss" if last else f"h{index + 1}",
            "w": f"l{index}.w",
            "t": f"l{index}.t",
            "grad:t": f"grad:l{index}.t",
            "gx": f"g{index}",
            "gy": f"g{index + 1}",
        }
        own = {value: name for value, name in bindings.items() if value in made.values}
        placed.append(Layer(name=f"l{index}", program=f"p{index}", bindings=own))
        programs.append(made.program())
        weight = {"dtype": "uint8", "bytes": 2 * MIB, "packed_bytes": MIB // 2, "unpack_seconds": 0.002 / speed}
        tensors.append(Tensor(name=f"l{index}.w", kind="weight", shape=[2 * MIB], **weight))
        update = {"dtype": "float32", "bytes": trained, "update_seconds": 1e-4 / speed}
        tensors.append(Tensor(name=f"l{index}.t", kind="trainable", shape=[trained // 4], **update))
    tensors.append(Tensor(name="data", kind="batch", shape=[hidden], dtype="uint8", bytes=hidden))
    return profile_of(programs, placed, tensors, "loss", on=on or device(**HELD))


def _in_floats(profile):
    """The profile with activations and gradients in float32, four to a row, as they can be sent."""
    programs = [
        program.model_copy(
            update={
                "values": [
                    value.model_copy(
                        update={"dtype": "float32", "shape": [value.bytes // 16, 4] if value.bytes > 4 else []}
                    )
                    for value in program.values
                ]
            }
        )
        for program in profile.programs
    ]
    return profile.model_copy(update={"programs": programs})


def _link(rate=12.5e6, latency=5e-4):
    return Link(up_bytes_per_second=rate, down_bytes_per_second=rate, latency_seconds=latency)


def _members(speeds, *, budget=26 * MIB, rate=12.5e6, layers=4):
    """A member a, b, c … for each speed, with equal budgets and links."""
    return [
        MemberSpec(name=name, profile=_layers(layers, speed=speed), budget_bytes=budget, link=_link(rate))
        for name, speed in zip("abcdefgh", speeds)
    ]


@pytest.fixture(scope="session")
def layers():
    return _layers


@pytest.fixture(scope="session")
def link():
    return _link


@pytest.fixture(scope="session")
def members():
    return _members


def _stages(speeds, *, budget=16 * MIB, rate=12.5e6, latency=5e-4, layers=4, disk=None):
    """Members of a pipeline: 2 MiB of every layer are trained, 128 KiB pass over a cut, and messages take little
    memory.
    """
    floor = device(**HELD).floor.model_copy(update={"exchange_bytes": 64 * KIB})
    on = device(**HELD).model_copy(update={"floor": floor} | ({"read": disk, "write": disk} if disk else {}))
    made = {}
    for speed in speeds:
        if speed not in made:
            made[speed] = _in_floats(_layers(layers, speed=speed, trained=2 * MIB, hidden=128 * KIB, on=on))
    return [
        MemberSpec(name=name, profile=made[speed], budget_bytes=budget, link=_link(rate, latency))
        for name, speed in zip("abcdefgh", speeds)
    ]


@pytest.fixture(scope="session")
def stages():
    return _stages


@pytest.fixture(scope="session")
def planned():
    """A fleet of three of which all take part, and their plans."""
    return plan_data(_members((1.0, 0.5, 0.4)), 8)


@pytest.fixture(scope="session")
def pipelined(stages):
    """A pipeline of two of which neither could hold the whole model, and their plans."""
    return plan_pipeline(stages((1.0, 1.0), budget=20 * MIB), 4)
