"""The same step at shorter lengths: which ones are asked for, and what a trace at such a length has to have in common with the
trace of the whole step, whose schedule it follows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tightfit.profiles.schema import Operator, Program, ShorterStep
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled

if TYPE_CHECKING:
    from tightfit.profiles.tracing.trace import Trace  # imports PyTorch, which an estimate does without

SHORTENED = ("batch", "activation", "gradient")
"""kinds of tensors whose size depends on the length"""
MOST_LENGTHS = 8
"""every length is traced and measured, and its kernels take memory in a run"""
MOST_DIGITS = 7
"""of a length: no sequence has more"""


def bucket_lengths(text: str | None, seq: int) -> tuple[int, ...]:
    """The lengths that "64,128" stands for, the shortest first, all below `seq`. Raises InputError for anything else."""
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) <= MOST_DIGITS and int(part) for part in parts):
        raise InputError(f"{spelled('buckets')} {text}: give lengths in tokens, separated by commas, such as 64,128")
    lengths = sorted({int(part) for part in parts})
    if lengths[-1] >= seq:
        raise InputError(
            f"{spelled('buckets')} {text}: {lengths[-1]} is not shorter than the sequence of {seq}; give lengths below it, or a longer {spelled('seq')}"
        )
    if len(lengths) > MOST_LENGTHS:
        raise InputError(f"{spelled('buckets')} {text}: {len(lengths)} lengths; give at most {MOST_LENGTHS}")
    return tuple(lengths)


def shorter_step(whole: Trace, short: Trace, seq: int) -> ShorterStep:
    """What differs in `short`, the trace of the step of `whole` at the shorter length `seq`.

    Raises InputError where that step has other operators, or tensors that are larger. Storage that an operator works in may be larger
    (`with_room`).
    """
    if (difference := _difference(whole, short)) is not None:
        raise InputError(
            f"buckets {seq}: at {seq} tokens the model's step is not the same as at its whole length ({difference}), as where a sliding"
            " window holds all of the shorter one; leave this length out"
        )
    smaller = [shorter for tensor, shorter in zip(whole.tensors, short.tensors, strict=True) if shorter != tensor]
    return ShorterStep(seq=seq, tensors=smaller, programs=short.programs)


def _difference(whole: Trace, short: Trace) -> str | None:
    """In words, in what else than sizes two traces differ; None: in nothing."""
    if _form_of_layers(whole) != _form_of_layers(short):
        return "its layers differ"
    for tensor, shorter_tensor in zip(whole.tensors, short.tensors, strict=True):
        if shorter_tensor.bytes > tensor.bytes or (shorter_tensor != tensor and tensor.kind not in SHORTENED):
            return f"{tensor.name} has shape {shorter_tensor.shape} in the place of {tensor.shape}"
    bound_values = {(layer.program, value) for layer in whole.layers for value in layer.bindings}
    for program, shorter_program in zip(whole.programs, short.programs, strict=True):
        if _form(program) != _form(shorter_program):
            return f"the operators of {program.name} differ"
        for value, shorter_value in zip(program.values, shorter_program.values, strict=True):
            if shorter_value.bytes > value.bytes and (program.name, value.name) in bound_values:
                return f"{value.name} of {program.name} has shape {shorter_value.shape} in the place of {value.shape}"
    return None


def _form_of_layers(traced: Trace) -> list[Any]:
    tensors = [(tensor.name, tensor.kind, tensor.dtype) for tensor in traced.tensors]
    return [tensors, traced.layers, [program.name for program in traced.programs], traced.loss, traced.token_losses]


def _form(program: Program) -> list[Any]:
    values = [(value.name, value.kind, value.dtype) for value in program.values]
    return [values, [_form_of_operator(operator) for operator in program.operators]]


def _form_of_operator(operator: Operator) -> tuple[Any, ...]:
    return (
        operator.target,
        operator.phase,
        operator.inputs,
        operator.outputs,
        operator.gathers,
        operator.recomputable,
    )


def renamed_programs(step: ShorterStep) -> Iterator[Program]:
    """The programs of a shorter step under names of their own, beside which those of the whole step can be measured."""
    return (program.model_copy(update={"name": shorter_name(program.name, step)}) for program in step.programs)


def shorter_name(name: str, step: ShorterStep) -> str:
    """What `renamed_programs` calls a program."""
    return f"{name} of {step.seq}"


def with_room(programs: Sequence[Program], steps: Sequence[ShorterStep]) -> list[Program]:
    """The programs of a whole step with the bytes that their values and the workspace of their operators take at any length, which a
    plan counts: attention works on more rows at a time where they are short, and a smaller product may take a kernel that needs more.
    """

    def roomy(number: int) -> Program:
        program, *others = (programs[number], *(step.programs[number] for step in steps))
        operators, values = [], []
        for index, operator in enumerate(program.operators):
            largest = max((other.operators[index].workspace_bytes for other in others), default=0)
            operators.append(operator.model_copy(update={"workspace_bytes": max(operator.workspace_bytes, largest)}))
        for index, value in enumerate(program.values):
            largest = max((other.values[index].bytes for other in others), default=0)
            values.append(value.model_copy(update={"bytes": max(value.bytes, largest)}))
        return program.model_copy(update={"operators": operators, "values": values})

    return [roomy(number) for number in range(len(programs))] if steps else list(programs)
