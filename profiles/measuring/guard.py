"""Checks, when operators are measured, that each one writes its whole outputs and nothing else.

In the arena other tensors lie next to an output, and no kernel may resize it. Some of PyTorch's out variants, such as
those of reducing losses, use the output as scratch space of the size of their inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tightfit.profiles.measuring.sample import work
from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.engine.cpu.arena import Arena
from tightfit.runtime.engine.cpu.cpu import KERNELS
from tightfit.runtime.engine.cpu.operators import OPERATORS
from tightfit.runtime.engine.kernels.compiled import CompiledOperator, compile_operator

GUARD_BYTES = 4096
PATTERN = 0xA5
UNWRITTEN = 0xFF  # NaN as a float, so that an operator that reads its output before writing it is noticed
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Largest difference of an element, relative to the largest element of the tensor."""


class OutputGuard:
    """Runs operators and checks what they write; those that do the same (`work`) are checked once."""

    def __init__(self) -> None:
        self._known: dict[str, bool] = {}

    def check(
        self,
        operator: Mapping[str, Any],
        values: Mapping[str, Mapping[str, Any]],
        tensors: dict[str, Any],
        store: Any = None,
    ) -> bool:
        """Run an operator of a profile (as a dict) on `tensors`, by name, leaving its results there.

        Returns whether it has to be run by its functional form, with the result copied into place, because its out
        variant writes outside its outputs or fails. `store` is what gathering operators read rows from. Raises RunError
        if one of tightfit's own operators writes outside its outputs, and whatever the operator raises.
        """
        outputs = [None if name is None else tensors[name] for name in operator["outputs"]]
        key = work(operator, values)
        direct = compile_operator(operator, values, KERNELS)
        own = operator["target"] in OPERATORS
        if key in self._known or direct.functional:
            copied = self._known.get(key, False)
            compile_operator({**operator, "copied": copied}, values, KERNELS).run(tensors, outputs, store)
            return copied
        if own:
            direct.run(tensors, outputs, store)
        else:
            torch.default_generator.manual_seed(0)
            compile_operator({**operator, "copied": True}, values, KERNELS).run(tensors, outputs, store)
        faithful = _faithful(direct, tensors, outputs, store, compare=not own)
        if own and not faithful:
            raise RunError(f"{operator['target']} writes beside its outputs; please report it, with the model's shapes")
        self._known[key] = not faithful
        return not faithful


def check_program(
    program: Mapping[str, Any],
    tensors: dict[str, Any],
    guard: OutputGuard,
    store: Any = None,
    *,
    stand_in: Callable[[int], int | None] = lambda number: None,
) -> list[bool]:
    """`OutputGuard.check` of every operator of a program, in order. One that has a `stand_in`, by their numbers, is not
    run and is said to be like that. Raises InputError for one that cannot be run.
    """
    values = {value["name"]: value for value in program["values"]}
    copied: list[bool] = []
    for number, operator in enumerate(program["operators"]):
        other = stand_in(number)
        if other is not None:
            copied.append(copied[other])
            continue
        try:
            copied.append(guard.check(operator, values, tensors, store))
        except (ArithmeticError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            if "alloc" in str(error):  # torch has no MemoryError
                raise
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"operator {operator['target']} is not supported ({first}); use other layers in the model"
            ) from error
    return copied


def _faithful(
    operator: CompiledOperator,
    tensors: Mapping[str, Any],
    expected: Sequence[Tensor | None],
    store: Any,
    *,
    compare: bool,
) -> bool:
    """Whether the operator, given outputs that cannot be resized, fills them with `expected` and leaves the bytes
    around them alone.

    Without `compare` only the bytes around the outputs are checked.
    """
    largest_bytes = max([_span(tensor) for tensor in tensors.values() if isinstance(tensor, Tensor)], default=0)
    outputs: list[Tensor | None] = []
    guards: list[Tensor] = []
    for tensor in expected:
        if tensor is None:
            outputs.append(None)
            continue
        end = GUARD_BYTES + _span(tensor)
        # The arena goes on behind the output for whatever a kernel may write there; pages that are never touched take
        # no memory.
        arena = Arena(end + GUARD_BYTES + largest_bytes)
        guards.extend(arena.raw(offset, GUARD_BYTES).fill_(PATTERN) for offset in (0, end))
        flat = arena.raw(GUARD_BYTES, _span(tensor)).fill_(UNWRITTEN).view(tensor.dtype)
        outputs.append(flat.as_strided(tensor.size(), tensor.stride()))
    torch.default_generator.manual_seed(0)
    try:
        operator.run(tensors, outputs, store)
    except RuntimeError as error:
        if not compare or "alloc" in str(error):
            raise
        return False
    if not all(bool((guard == PATTERN).all()) for guard in guards):
        return False
    return not compare or all(map(_equal, outputs, expected))


def _span(tensor: Tensor) -> int:
    """Bytes from the first element of a tensor to the end of its last."""
    if not tensor.numel():
        return 0
    last = sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride()))
    return (1 + last) * tensor.element_size()


def _equal(output: Tensor | None, expected: Tensor | None) -> bool:
    if output is None or expected is None:
        return output is expected
    if output.shape != expected.shape or output.stride() != expected.stride():
        return False
    if torch.equal(output, expected):
        return True
    if not output.dtype.is_floating_point:
        return False
    tolerance = TOLERANCE.get(output.dtype, 0.0)
    finite = expected[expected.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    return bool(torch.allclose(output, expected, rtol=tolerance, atol=tolerance * largest, equal_nan=True))
