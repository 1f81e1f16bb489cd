"""Operator times where nothing can be measured: a roofline of floating-point operations and bytes moved.

Source of the model: Williams, Waterman and Patterson 2009, "Roofline". Used for devices that are not at hand; a profile
made this way says so (`Device.measured` is False).
"""

from __future__ import annotations

from collections.abc import Mapping

from profiles.schema import Operator, Program, Tensor


def estimate_program(
    program: Program, *, flops_per_second: Mapping[str, float], bytes_per_second: float, call_seconds: float
) -> Program:
    """`program` with `seconds` filled. `flops_per_second` is by torch dtype name, `call_seconds` the fixed cost of a call."""
    values = {value.name: value for value in program.values}

    def seconds(op: Operator) -> float:
        touched = sum(values[n].bytes for n in [*op.inputs, *op.outputs] if n and n not in op.gathers)
        made = next((values[n] for n in op.outputs if n), None)
        rate = flops_per_second.get(made.dtype if made else "float32", flops_per_second["float32"])
        return max(op.flops / rate, touched / bytes_per_second) + call_seconds

    return program.model_copy(
        update={"operators": [op.model_copy(update={"seconds": seconds(op)}) for op in program.operators]}
    )


def estimate_tensor(tensor: Tensor, *, bytes_per_second: float) -> Tensor:
    """`tensor` with its unpack time (weights: packed read, unpacked written) or update time (trainables: seven passes) filled."""
    if tensor.kind == "weight":
        return tensor.model_copy(update={"unpack_seconds": (tensor.packed_bytes + tensor.bytes) / bytes_per_second})
    if tensor.kind == "trainable":
        return tensor.model_copy(update={"update_seconds": 7 * tensor.bytes / bytes_per_second})
    return tensor
