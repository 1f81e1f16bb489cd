"""The operators of a step by which a tensor passes to another device, or comes from one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from tightfit.profiles.schema import Operator, Value
from tightfit.runtime.engine.training.job import SEND

Direction = Literal["up", "down"]
"""activations pass up, gradients down"""


def message_operator(
    target: str,
    value: Value,
    number: int,
    bits: int,
    seconds: float,
    *,
    phase: Literal["forward", "backward"] = "forward",
    direction: Direction = "up",
    outputs: Sequence[str] = (),
) -> Operator:
    """The operator (`SEND` or `RECEIVE`) that puts a value into the message in a direction as tensor `number` of it, or
    takes it from there, where its numbers have so many bits; one that sends may have `outputs` that mean nothing.
    """
    sends = target == SEND
    operand = {"operand": {"value": value.name, "size": value.shape, "stride": value.stride, "offset": 0}}
    return Operator(
        target=target,
        phase=phase,
        args=[operand] if sends else [],
        kwargs={"direction": direction, "number": number, "bits": bits},
        inputs=[value.name] if sends else [],
        outputs=[*outputs] if sends else [value.name],
        seconds=seconds,
        recomputable=False,
    )
