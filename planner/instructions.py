"""The instructions of a schedule, one type each: what the planner writes, the simulator replays and the runtime executes.

They have two encodings. A plan file holds JSON arrays, the verb first and the fields in the order in which they stand here
(`to_json`, `from_json`); the training process reads runs of int32 words (`tightfit.runtime.session.job_compiler`). A field `at`
is an offset in the arena, in bytes: every instruction that makes a tensor resident says where, so that nothing is left to
decide at run time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from tightfit.runtime.common.errors import InputError


@dataclass(frozen=True, slots=True)
class Read:
    """Start reading the packed bytes of a weight from the store into ``packed:`` and its name."""

    verb: ClassVar[str] = "read"
    weight: str
    at: int


@dataclass(frozen=True, slots=True)
class Unpack:
    """Wait for the read; make the weight from its packed bytes."""

    verb: ClassVar[str] = "unpack"
    weight: str
    at: int


@dataclass(frozen=True, slots=True)
class Run:
    """Run one operator of the layer's program; `at` has an offset for each output, None for one that is not used."""

    verb: ClassVar[str] = "run"
    layer: str
    operator: int
    at: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Free:
    """Give the bytes of a tensor back; waits for a spill of it that is still being written."""

    verb: ClassVar[str] = "free"
    tensor: str


@dataclass(frozen=True, slots=True)
class Spill:
    """Start writing a tensor to the spill file; it stays resident until it is freed."""

    verb: ClassVar[str] = "spill"
    tensor: str


@dataclass(frozen=True, slots=True)
class Fetch:
    """Start reading a tensor back from the spill file; its users wait for it."""

    verb: ClassVar[str] = "fetch"
    tensor: str
    at: int


@dataclass(frozen=True, slots=True)
class Update:
    """One optimizer update of a trainable in place, from its gradient and states, all of them resident."""

    verb: ClassVar[str] = "update"
    trainable: str


@dataclass(frozen=True, slots=True)
class Perturb:
    """Add `times` epsilon z to a trainable; z ~ N(0, 1) is drawn again from the step's seed and the trainable's name."""

    verb: ClassVar[str] = "perturb"
    trainable: str
    times: int


@dataclass(frozen=True, slots=True)
class Pass:
    """The gradient `above` becomes the gradient `below`, of the same shape, where it lies; `above` is gone."""

    verb: ClassVar[str] = "pass"
    above: str
    below: str


Instruction = Read | Unpack | Run | Free | Spill | Fetch | Update | Perturb | Pass
TYPES: tuple[type[Instruction], ...] = (Read, Unpack, Run, Free, Spill, Fetch, Update, Perturb, Pass)
BY_VERB: dict[str, type[Instruction]] = {kind.verb: kind for kind in TYPES}
_TEXTS = {kind.verb: tuple(field.type == "str" for field in fields(kind)) for kind in TYPES}
"""verb -> of each field, whether it is a name; the others are whole numbers, or the outputs of a run"""


def to_json(instruction: Instruction) -> list[Any]:
    """The array of a plan file."""
    if isinstance(instruction, Run):
        return ["run", instruction.layer, instruction.operator, list(instruction.at)]
    return [instruction.verb, *(getattr(instruction, name) for name in instruction.__slots__)]


def from_json(array: Sequence[Any]) -> Instruction:
    """The instruction that an array of a plan file says. Raises InputError where it says none."""
    kind = BY_VERB.get(array[0]) if array and isinstance(array[0], str) else None
    if kind is None:
        raise InputError(f"{array!r} is no instruction; the plan is damaged or of another version, plan again")
    operands, texts = array[1:], _TEXTS[kind.verb]
    if kind is Run and len(operands) == len(texts) and isinstance(operands[2], list | tuple):
        operands = (*operands[:2], tuple(operands[2]))
    if len(operands) != len(texts) or not all(map(_fits, operands, texts)):
        raise InputError(f"{array!r}: wrong operands; the plan is damaged or of another version, plan again")
    return kind(*operands)


def _fits(operand: Any, text: bool) -> bool:
    if text:
        return isinstance(operand, str)
    if isinstance(operand, tuple):
        return all(at is None or type(at) is int for at in operand)
    return type(operand) is int


def read_all(arrays: Iterable[Any]) -> list[Instruction]:
    """Instructions as they are, or as a plan file has them."""
    return [one if isinstance(one, TYPES) else from_json(one) for one in arrays]


def write_all(instructions: Iterable[Instruction]) -> list[list[Any]]:
    """As a plan file has them."""
    return [to_json(one) for one in instructions]
