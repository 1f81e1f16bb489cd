"""Programs for forwards without a backward, as in an evaluation or in steps of forwards alone. Imports no PyTorch."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from tightfit.profiles.schema import Operator, Program
from tightfit.runtime.engine.training.job import renamed_arguments


def with_inference(program: Program, inference: Program, results: Collection[str]) -> Program:
    """`program` with the operators of `inference` added as those of phase inference.

    `inference` is the forward of the same module, traced by itself. Inputs, slices of weights and `results` are the
    same values in both; intermediate values of `inference` become further values of the program.
    """
    made_names = {name for operator in inference.operators for name in operator.outputs if name is not None}
    names = {name: f"inference.{name}" for name in made_names.difference(results)}
    operators = [renamed(operator, names).model_copy(update={"phase": "inference"}) for operator in inference.operators]
    values = [value.model_copy(update={"name": names.get(value.name, value.name)}) for value in inference.values]
    present = {value.name for value in program.values}
    forward_count = sum(operator.phase == "forward" for operator in program.operators)
    return program.model_copy(
        update={
            "values": [*program.values, *(value for value in values if value.name not in present)],
            "operators": [*program.operators[:forward_count], *operators, *program.operators[forward_count:]],
        }
    )


def inference_only(program: Program) -> Program:
    """The program for a step without a backward: its forward is the inference operators, or if there are none the
    forward.
    """
    operators = [program.operators[position].model_copy(update={"phase": "forward"}) for position in program.inference]
    used = {name for operator in operators for name in [*operator.inputs, *operator.outputs]}
    values = [value for value in program.values if value.name in used]
    return Program(name=f"{program.name} inference", values=values, operators=operators)


def renamed(op: Operator, names: Mapping[str, str]) -> Operator:
    """A copy of the operator with its storages renamed by `names`; storages not in `names` keep their names."""

    def rename(name: str) -> str:
        return names.get(name, name)

    return op.model_copy(
        update={
            "args": renamed_arguments(op.args, names),
            "kwargs": renamed_arguments(op.kwargs, names),
            "inputs": [rename(n) for n in op.inputs],
            "outputs": [None if n is None else rename(n) for n in op.outputs],
            "gathers": [rename(n) for n in op.gathers],
        }
    )
