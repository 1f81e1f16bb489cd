"""The lengths of a job's steps: where its plan has shorter ones, a batch takes the shortest that has room for its samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tightfit.runtime.engine.device.device import Device
from tightfit.runtime.engine.training.executor import Executor

if TYPE_CHECKING:
    from torch import Tensor


class StepLengths:
    """Chooses the length of each step. `inputs` are the tensors of a batch of that length in host memory, in the plan's order."""

    def __init__(self, header: dict[str, Any], device: Device, executor: Executor) -> None:
        self._executor = executor
        self._shorter: list[int] = [step["seq"] for step in header["shorter"]]
        """the shortest first"""
        steps = dict(zip([*self._shorter, None], [*header["shorter"], header]))
        self._expected: dict[int | None, float] = {length: step["expected_seconds"] for length, step in steps.items()}
        self._inputs: dict[int | None, list[Tensor]] = {
            length: [device.host(at, shape, dtype) for _, dtype, shape, at in step["inputs"]]
            for length, step in steps.items()
        }
        self._length: int | None = None
        """None: the whole step"""
        self.inputs = self._inputs[None]

    def take(self, longest: Callable[[int], int | None]) -> None:
        """Choose the length of the next step: `longest(rows)` is the number of positions of the longest of its rows, None where it
        is unknown and the whole step is taken.
        """
        if not self._shorter:
            return
        wanted = longest(self.inputs[0].shape[0])
        self._length = None if wanted is None else next((one for one in self._shorter if one >= wanted), None)
        self.inputs = self._inputs[self._length]
        self._executor.take(self._length)

    @property
    def figures(self) -> dict[str, float]:
        """Of the latest step, where the plan has shorter ones: the positions of its rows, padding included, and the seconds that were
        planned for it.
        """
        if not self._shorter:
            return {}
        return {"places": self.inputs[0].numel(), "expected": self._expected[self._length]}
