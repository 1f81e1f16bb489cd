"""A gradient that several layers' backwards add to, one after the other, in one storage: two values of a program are
bound to it.
"""

from __future__ import annotations

import pytest
from synthetic import PAGE, ProgramBuilder, profile_of

from tightfit.planner.instructions import Run
from tightfit.planner.plan import minimum_budget, plan
from tightfit.planner.simulation.simulate import simulate
from tightfit.profiles.schema import Layer, Tensor

COUNT, WIDE, SUM = 4, 16 * PAGE, 128 * PAGE


def tile_program(index):
    """y = f(x, p); its backward adds to the sum, which only the last tile begins and the first tile uses."""
    made = ProgramBuilder(f"tile{index}")
    first, last = index == 0, index == COUNT - 1
    made.value("x", WIDE, "batch" if first else "activation")
    made.value("y", WIDE)
    made.value("p", PAGE, "trainable")
    made.value("gy", WIDE, "gradient")
    made.value("grad:p", PAGE, "gradient")
    made.value("new", SUM, "gradient")
    made.run("f", ["x", "p"], ["y"], 1e-3)
    inputs, outputs = ["gy", "x", "p"], ["new"]
    if not last:
        inputs.append(made.value("old", SUM, "gradient"))
    if not first:
        outputs.append(made.value("gx", WIDE, "gradient"))
    made.run("b", inputs, outputs, 1e-3, phase="backward")
    made.run("gp", ["gy", *(["new"] if first else [])], ["grad:p"], 1e-3, phase="backward")
    return made.program()


def tiles(*, in_place):
    programs = [tile_program(index) for index in range(COUNT)]
    tensors = [Tensor(name="data", kind="batch", shape=[WIDE], dtype="uint8", bytes=WIDE)]
    layers = []
    for index, program in enumerate(programs):
        names = {"x": f"h{index}" if index else "data", "y": f"h{index + 1}", "gx": f"g{index}", "gy": f"g{index + 1}"}
        names |= {"p": f"p{index}", "grad:p": f"grad:p{index}"}
        names |= {"new": "sum", "old": "sum"} if in_place else {"new": f"sum{index}", "old": f"sum{index + 1}"}
        present = {value.name for value in program.values}
        layers.append(
            Layer(
                name=f"l{index}",
                program=program.name,
                bindings={value: name for value, name in names.items() if value in present},
            )
        )
        tensors.append(Tensor(name=f"p{index}", kind="trainable", shape=[PAGE], dtype="uint8", bytes=PAGE))
    head = ProgramBuilder("head")
    head.value("x", WIDE)
    head.value("gx", WIDE, "gradient")
    head.value("loss", 4)
    head.run("l", ["x"], ["loss"], 1e-3)
    head.run("b", ["x"], ["gx"], 1e-3, phase="backward")
    bindings = {"x": f"h{COUNT}", "gx": f"g{COUNT}", "loss": "loss"}
    layers.append(Layer(name="head", program="head", bindings=bindings))
    profile = profile_of([*programs, head.program()], layers, tensors, "loss")
    return profile.model_copy(update={"fingerprint": f"in place: {in_place}"})  # known plans go by it


@pytest.mark.parametrize("spare", [1.0, 1.5])
def test_a_sum_that_is_written_again_stays_where_it_is(spare):
    profile = tiles(in_place=True)
    made = plan(profile, int(spare * minimum_budget(profile)))
    simulate(made)
    runs = [step for step in made.steps[0].instructions if isinstance(step, Run) and step.layer != "head"]
    places = {step.at[0] for step in runs if step.operator == 1}
    assert len(places) == 1


def test_it_is_never_held_twice():
    both, one = (minimum_budget(tiles(in_place=in_place)) for in_place in (False, True))
    assert both - one == SUM
