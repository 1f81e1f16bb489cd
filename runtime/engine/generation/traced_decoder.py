"""The forward on new tokens of a decoder that transformers builds: its programs, traced once for a single token and once for a
group, run operator by operator.

Matrix products are made for all groups of a pass together, other operators for one group after the other; attention goes to the
cache. The last group of a pass may have fewer tokens than its program: operators then compute rows that nobody reads, and matrix
products, attention and embeddings leave them out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tightfit.runtime.engine.cpu.cached_attention_sizes import GROUP
from tightfit.runtime.engine.cpu.products import blocks
from tightfit.runtime.engine.device.device import Device
from tightfit.runtime.engine.generation.cached_decoder import CachedDecoder
from tightfit.runtime.engine.generation.job import GenerationJob
from tightfit.runtime.engine.generation.names import ATTEND, GATHER, HELD, IDS, POSITIONS, PROJECTION, VALUES
from tightfit.runtime.engine.generation.sizes import aligned
from tightfit.runtime.engine.generation.stream import StreamedPieces
from tightfit.runtime.engine.kernels.compiled import CompiledOperator
from tightfit.runtime.engine.weights.store import WeightStore


@dataclass(frozen=True)
class CompiledProgram:
    """A layer's operators; `own` are the offsets of what it makes for itself."""

    values: Mapping[str, Mapping[str, Any]]
    own: Mapping[str, int]
    operators: list[tuple[Mapping[str, Any], CompiledOperator | None]]
    """the compiled form is None for what the decoder carries out itself"""


@dataclass(frozen=True)
class Frame:
    """A layer of a step, in a pass of so many groups."""

    tokens: int
    program: CompiledProgram
    bindings: Mapping[str, str]
    passed: Mapping[str, int]
    groups: Sequence[slice]


class TracedDecoder(CachedDecoder):
    """A decoder of which the job holds the steps."""

    def __init__(self, job: GenerationJob, device: Device, store: WeightStore, stream: StreamedPieces) -> None:
        super().__init__(job, device, store, stream)
        assert job.steps is not None
        self.steps = {step["tokens"]: step for step in job.steps}
        self.programs = {
            tokens: {name: self._compiled(program) for name, program in step["programs"].items()}
            for tokens, step in self.steps.items()
        }
        self._start = job.places[VALUES][0]
        self._views: dict[tuple[int, int, str], Tensor] = {}
        """storages of the step of one token, which needs hundreds of them every time"""

    def _compiled(self, program: Mapping[str, Any]) -> CompiledProgram:
        kernels, values = self.device.kernels, program["values"]
        operators: list[tuple[Mapping[str, Any], CompiledOperator | None]] = []
        for operator in program["operators"]:
            own = operator["target"] in (ATTEND, PROJECTION, GATHER)
            # Nothing has tested which of PyTorch's out variants write beside their output: none is used.
            told = operator | {"copied": operator["target"] not in kernels.direct}
            operators.append((operator, None if own else CompiledOperator(told, values, kernels)))
        return CompiledProgram(values, program["own"], operators)

    def _layers(self, ids: Sequence[int], between: Callable[[], None], *, alone: bool) -> Tensor:
        tokens = 1 if alone else GROUP
        step, programs = self.steps[tokens], self.programs[tokens]
        groups = list(blocks(len(ids), tokens))
        begin = self.length
        self._give(step, IDS, list(ids), groups)
        self._give(step, POSITIONS, list(range(begin, begin + len(ids))), groups)
        frames = [
            Frame(tokens, programs[program], bindings, step["passed"], groups) for program, bindings in step["layers"]
        ]
        attended = 0
        for frame in frames:
            for operator, compiled in frame.program.operators:
                if operator["target"] == ATTEND:
                    self._call_attention(frame, operator, attended)
                    attended += 1
                else:
                    self._call(frame, operator, compiled)
            between()
        last = frames[-1]
        return self._made_rows(last, next(name for name, bound in last.bindings.items() if bound == step["result"]))

    def _last(self, hidden: Tensor) -> Tensor:
        return hidden[-1:]

    def _give(self, step: Mapping[str, Any], name: str, numbers: list[int], groups: Sequence[slice]) -> None:
        """Hand over an input; what is missing of the last group repeats its last number."""
        if name not in step["passed"]:
            return
        tokens = step["tokens"]
        for number, rows in enumerate(groups):
            own = numbers[rows]
            own += own[-1:] * (tokens - len(own))
            at = self._start + step["passed"][name] * len(groups) + number * aligned(8 * tokens)
            self._view(at, 8 * tokens, "int64").copy_(torch.tensor(own, dtype=torch.int64))

    def _call(self, frame: Frame, operator: Mapping[str, Any], compiled: CompiledOperator | None) -> None:
        target, arguments = operator["target"], operator["args"]
        if compiled is not None:
            self._run(frame, operator, compiled)
        elif target == PROJECTION:
            x, weight, bias = arguments[:3]
            held = None if bias is None else self._place(frame.bindings[bias["operand"]["value"]])
            matrix = frame.bindings[weight["operand"]["value"]]
            (made,) = operator["outputs"]
            out = self._made_rows(frame, made)
            self.products.multiply(matrix, self._rows(frame, x["operand"]), frame.groups, held, out=out)
        else:
            table, ids, scale = arguments
            for number, rows in enumerate(frame.groups):
                count = rows.stop - rows.start
                wanted = self._window(frame, ids["operand"], number).reshape(-1)[:count].tolist()
                self._embed(
                    frame.bindings[table["operand"]["value"]],
                    wanted,
                    scale,
                    self._made(frame, operator, number)[:count],
                )

    def _call_attention(self, frame: Frame, operator: Mapping[str, Any], layer: int) -> None:
        *tensors, _, _, _, scale = operator["args"]
        for number, rows in enumerate(frame.groups):
            count = rows.stop - rows.start
            q, k, v, cos, sin = (self._window(frame, tensor["operand"], number)[:count] for tensor in tensors)
            self._attend(layer, q, k, v, cos, sin, scale, self._made(frame, operator, number)[:count])

    def _run(self, frame: Frame, operator: Mapping[str, Any], compiled: CompiledOperator) -> None:
        names = {operand["value"] for _, _, operand in compiled.slots}
        for number in range(len(frame.groups)):
            outputs = [None if name is None else self._whole(frame, name, number) for name in operator["outputs"]]
            compiled.run({name: self._storage(frame, name, number) for name in names}, outputs)

    def _made(self, frame: Frame, operator: Mapping[str, Any], group: int) -> Tensor:
        (name,) = operator["outputs"]
        return self._whole(frame, name, group)

    def _whole(self, frame: Frame, name: str, group: int) -> Tensor:
        value = frame.program.values[name]
        base = self._storage(frame, name, group)
        return base.as_strided(value["shape"], value["stride"], base.storage_offset())

    def _window(self, frame: Frame, operand: Mapping[str, Any], group: int) -> Tensor:
        base = self._storage(frame, operand["value"], group)
        return base.as_strided(operand["size"], operand["stride"], base.storage_offset() + operand["offset"])

    def _rows(self, frame: Frame, operand: Mapping[str, Any]) -> Tensor:
        """The rows [t, columns] of all groups of a pass, which lie one after the other."""
        count, columns = frame.groups[-1].stop, operand["size"][1]
        (stride, _), offset = operand["stride"], operand["offset"]
        base = self._storage(frame, operand["value"], 0, offset + (count - 1) * stride + columns)
        return base.as_strided((count, columns), (stride, 1), base.storage_offset() + offset)

    def _made_rows(self, frame: Frame, name: str) -> Tensor:
        """The rows of all groups of a matrix that an operator makes."""
        shape = frame.program.values[name]["shape"]
        return self._rows(frame, {"value": name, "size": shape, "stride": [shape[1], 1], "offset": 0})

    def _storage(self, frame: Frame, name: str, group: int, elements: int = 0) -> Tensor:
        """The elements of a value, for a group; with `elements`, at least so many from there on, those of later groups."""
        value, bound = frame.program.values[name], frame.bindings.get(name)
        if bound is not None and value["kind"] in HELD:
            return self._place(bound)
        at = frame.program.own[name] if bound is None else frame.passed[bound]
        place = self._start + at * len(frame.groups) + group * aligned(value["bytes"])
        size = max(value["bytes"], elements * getattr(torch, value["dtype"]).itemsize)
        if frame.tokens > 1:
            return self._view(place, size, value["dtype"])
        key = place, size, value["dtype"]
        if key not in self._views:
            self._views[key] = self._view(*key)
        return self._views[key]

    def _view(self, at: int, size: int, dtype: str) -> Tensor:
        return self.device.tensor(at, (size // getattr(torch, dtype).itemsize,), dtype)
