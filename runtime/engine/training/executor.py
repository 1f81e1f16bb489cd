"""The executor: carries out a plan's instructions one after the other on tensors in the device's arena.

Every decision is the plan's. Results do not depend on it: an operator gets the same shapes, strides and 64-byte
alignment wherever its tensors lie in the arena, and transfers change no bits.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tightfit.runtime.engine.device.channels import TransferChannel
from tightfit.runtime.engine.device.device import Device, Mark, get_now
from tightfit.runtime.engine.device.draws import Draws
from tightfit.runtime.engine.kernels.compiled import CompiledOperator, compile_operator
from tightfit.runtime.engine.training.job import (
    ACCUMULATE,
    CODES,
    DROPOUT,
    FETCH,
    FREE,
    LOSS,
    PASS,
    PASSING,
    PERTURB,
    READ,
    RUN,
    SPILL,
    UNIT,
    UNPACK,
    UPDATE,
    Job,
    program_values,
    tensors_of,
)
from tightfit.runtime.engine.training.job_tables import Names, Trainable
from tightfit.runtime.engine.training.routing import Routing
from tightfit.runtime.engine.training.step_trace import StepTrace
from tightfit.runtime.engine.training.storage import Storage
from tightfit.runtime.engine.training.updates import Updates
from tightfit.runtime.engine.weights.store import WeightStore

if TYPE_CHECKING:
    from tightfit.runtime.engine.fleet.role import FleetRole

__all__ = ["CompiledOperator", "Executor", "compile_operator"]


class View:
    """A strided view of a tensor, made again only where the tensor lies elsewhere than before: a plan's offsets are the
    same in every step.
    """

    __slots__ = ("at", "container", "dtype", "elements", "key", "offset", "place", "size", "stride", "tensor", "window")

    def __init__(
        self,
        place: int,
        value: dict[str, Any],
        operand: dict[str, Any],
        device: Device,
        container: Any = None,
        key: Any = None,
    ) -> None:
        """`operand` has size, stride and offset in the tensor `value`, one of the operator's `tensors`, at `place` in
        them. The view is kept in `container[key]` too, if there is one.
        """
        self.place, self.container, self.key = place, container, key
        self.size, self.stride, self.offset = tuple(operand["size"]), tuple(operand["stride"]), operand.get("offset", 0)
        self.elements: int = max(
            _elements(value["shape"], value["stride"]), self.offset + _elements(self.size, self.stride)
        )
        """of the tensor"""
        self.window = device.window(value["dtype"])
        self.dtype: torch.dtype = getattr(torch, value["dtype"])
        self.at = -1
        self.tensor: Tensor | None = None

    @property
    def bytes(self) -> int:
        """of the tensor"""
        return self.elements * self.dtype.itemsize

    def move(self, at: int) -> Tensor:
        """The view, with the tensor at offset `at` of the arena."""
        self.at = at
        self.tensor = self.window(at, self.elements).as_strided(self.size, self.stride, self.offset)
        if self.container is not None:
            self.container[self.key] = self.tensor
        return self.tensor


def _elements(size: Sequence[int], stride: Sequence[int]) -> int:
    """Elements that a strided tensor spans, from its first to its last."""
    return 0 if 0 in size else 1 + sum((length - 1) * step for length, step in zip(size, stride))


class BoundOperator:
    """A compiled operator whose views of the arena are prepared but for their offsets.

    It belongs to a program, which equal layers share; so it names tensors by their index in a layer's table, which
    gives the tensor's number. Equal operators of a layer in tiles share all but these names (`on`).
    """

    __slots__ = ("call", "draws", "gathers", "inputs", "keywords", "name", "partial", "reads", "tensors", "writes")

    def __init__(
        self,
        operator: dict[str, Any],
        values: dict[str, dict[str, Any]],
        local: dict[str, int],
        device: Device,
        store: WeightStore | None,
    ) -> None:
        names = tensors_of(operator)
        self.tensors = tuple(local[name] for name in names)
        """of each tensor its index in a layer's table"""
        place = {name: number for number, name in enumerate(names)}
        compiled = compile_operator(operator, values, device.kernels)
        self.call = compiled.call
        self.name = compiled.name
        self.reads = [
            View(place[operand["value"]], values[operand["value"]], operand, device, container, key)
            for container, key, operand in compiled.slots
        ]
        self.partial = compiled.partial
        self.keywords = compiled.kwargs
        self.draws = compiled.name.startswith(DROPOUT)
        """whether it draws random numbers, which depend on the layer"""
        self.inputs = tuple(dict.fromkeys(read.place for read in self.reads))
        self.writes = [
            None
            if name is None
            else View(
                place[name], values[name], {"size": values[name]["shape"], "stride": values[name]["stride"]}, device
            )
            for name in operator["outputs"]
        ]
        self.gathers = [(container, key, place[operand["value"]]) for container, key, operand in compiled.gathers]
        if self.gathers:
            compiled.kwargs["store"] = store

    def on(self, tensors: tuple[int, ...]) -> BoundOperator:
        """The same operator on other tensors of the layer's table."""
        other = object.__new__(BoundOperator)
        for name in self.__slots__:
            setattr(other, name, getattr(self, name))
        other.tensors = tensors
        return other


def bind(programs: list[dict[str, Any]], device: Device, store: WeightStore | None) -> list[list[BoundOperator]]:
    """Bind the operators of the programs of a step, which are in the form of the job's header (`program_headers`) and
    are taken out of the list.
    """
    bound: list[list[BoundOperator]] = []
    while programs:
        program = programs.pop(0)
        values = program_values(program)
        local = {name: index for index, name in enumerate(values)}
        bound.append([])
        for operator in program["operators"]:
            if "like" in operator:
                place, number = operator["like"]
                bound[-1].append(bound[place][number].on(tuple(local[name] for name in operator["values"])))
            else:
                bound[-1].append(BoundOperator(operator, values, local, device, store))
    return bound


class Executor:
    """`execute` runs one step or one evaluation batch.

    `seconds` then holds its wall time by kind of instruction, and as "stall" the part of it spent waiting for the disk.
    """

    def __init__(self, job: Job, storage: Storage, channel: TransferChannel, updates: Updates) -> None:
        header = job.header
        self.device, self.store, self.spill = storage.device, storage.opened, storage.spill
        self.weights = storage.weights
        self.trainables: Sequence[Trainable] = storage.trainables
        self.channel, self.updates = channel, updates
        self.extents = job.extents
        self.where = job.where
        """Byte offset of every tensor in the arena; means nothing while the tensor is not resident."""
        ends = [*job.starts[1:], len(job.tables)]
        self.tables = [job.tables[start:end] for start, end in zip(job.starts, ends)]
        del job.tables[:]
        # Once bound, the JSON form is dropped from the header: it is as large as the bound operators.
        self.programs = bind(header.pop("programs"), self.device, self.store)
        self._layers = [self.programs[index] for index in header["layer_programs"]]
        self._sizes = job.sizes
        self._token_losses: tuple[int, list[int]] | None = header["token_losses"]
        """number and shape of their tensor"""
        self.draws = Draws(header["seed"])
        """what operators draw random numbers of; the trainer sets the step"""
        for operator in self.operators():
            if operator.draws:
                operator.keywords["draws"] = self.draws
        self.layer_names = Names(header["layer_names"])
        """empty where no operator draws random numbers"""
        self.gathered = dict(header["gathered"])
        self.states: Sequence[str] = header["states"]
        """what the optimizer's states of a trainable are called"""
        self.loss_number = header["loss"]
        routed = header.pop("routed")
        self.routing = Routing(routed, self.device, self.where) if routed else None
        """what a mixture of experts does without in a step"""
        self.arriving: dict[int, int] = {}
        self.leaving: dict[int, int] = {}
        """By tensor number, the channel's tickets of unfinished transfers: `arriving` reads and fetches, `leaving`
        spills.
        """
        self.landed: dict[int, Mark] = {}
        """Marks of the copies to the device that reads and fetches ended with; the channel's thread adds them."""
        self.seconds = dict.fromkeys((*CODES, "stall"), 0.0)
        self.trace: StepTrace | None = None
        """where the seconds of every instruction are recorded while this is one"""
        self.forwards: list[float] = []
        self.losses: Tensor | None = None
        self.between_forwards: Callable[[], object] = lambda: None
        """Called after every forward."""

    @property
    def loss(self) -> float:
        """Mean loss over the forwards of the last step: one, or two with MeZO."""
        return sum(self.forwards) / len(self.forwards)

    def join(self, role: FleetRole) -> None:
        """Let the operators that send and receive, if there are any, do so in this role, once all have been tried
        out.
        """
        for operator in self.operators():
            if operator.name in PASSING:
                operator.keywords["stage"] = role

    def operators(self) -> Iterator[BoundOperator]:
        return (operator for program in self.programs for operator in program)

    def execute(self, words: array[int], begin: int = 0, end: int | None = None, cycles: int = 0) -> None:
        """Run the step or evaluation batch in words [begin, end) of the job.

        `cycles` is the number of whole cycles of steps before this step; the number of an update follows from it.
        Afterwards `forwards` holds the loss of every forward and, if the schedule has TOKEN_LOSSES, `losses` a copy of
        the token losses. Raises what a transfer raised (RunError, InputError), and CapError if the resident set is
        above the cap.
        """
        where, arriving, leaving, routing = self.where, self.arriving, self.leaving, self.routing
        layers, sizes, token_losses = self._layers, self._sizes, self._token_losses
        spent = [0.0] * len(CODES)
        device, clock, check = self.device, time.perf_counter, self.device.meter.check
        self.seconds["stall"] = 0.0
        self.forwards.clear()
        if routing is not None:
            routing.left_out = 0
        place, index, length = begin, 0, len(words) if end is None else end
        trace = self.trace
        if trace is not None:
            trace.begin()
        before = clock()
        while place < length:
            code = words[place]
            if code == RUN:
                layer = words[place + 1]
                operator, table = layers[layer][words[place + 2]], self.tables[layer]
                tensors = operator.tensors
                if arriving:
                    for number in operator.inputs:
                        if table[tensors[number]] in arriving:
                            self._arrive(table[tensors[number]])
                for read in operator.reads:
                    at = where[table[tensors[read.place]]]
                    if at != read.at:
                        read.move(at)
                for container, key, number in operator.gathers:
                    container[key] = self.gathered[table[tensors[number]]]
                if operator.draws:
                    self.draws.layer = self.layer_names[layer]
                place += 4
                outputs: list[Tensor | None] = []
                for write in operator.writes:
                    at = words[place] * UNIT
                    place += 1
                    if write is None:
                        outputs.append(None)
                    elif at < 0:  # unused, so the plan gives it no place; some kernels write it all the same
                        outputs.append(
                            None
                            if operator.partial
                            else torch.empty_strided(write.size, write.stride, dtype=write.dtype)
                        )
                    else:
                        where[table[tensors[write.place]]] = at
                        outputs.append(write.tensor if at == write.at else write.move(at))
                operator.call(outputs)
                outputs.clear()
                if routing is not None:
                    for write in operator.writes:
                        if write is not None:
                            routing.made(table[tensors[write.place]])
            elif code == FREE:
                number = words[place + 1]
                if routing is not None:
                    routing.freed(number)
                if number in leaving:
                    self._wait(leaving.pop(number))
                if number in arriving:
                    self._arrive(number)
                place += 2
            elif code == READ:
                weight = self.weights[words[place + 1]]
                number, at = words[place + 2], words[place + 3] * UNIT
                where[number] = at
                if routing is not None and routing.unneeded(words[place + 1]):
                    routing.left_out += 1
                else:
                    after = device.mark()  # an operator may still read the freed tensor that this overwrites
                    host = device.host(at, (weight.packed_bytes,), "uint8")
                    arriving[number] = self._submit(self._read, number, weight.name, at, host, after)
                place += 4
            elif code == UNPACK:
                weight = self.weights[words[place + 1]]
                number, source, at = words[place + 2], words[place + 3], words[place + 4] * UNIT
                if source in arriving:
                    self._arrive(source)
                where[number] = at
                if routing is None or not routing.unneeded(words[place + 1]):
                    packed = device.raw(where[source], weight.packed_bytes)
                    made = device.tensor(at, weight.shape, weight.dtype)
                    self.store.unpack(weight.name, packed, made)  # type: ignore[union-attr]
                place += 5
            elif code == UPDATE:
                self.updates.update(self, words[place + 1], cycles * words[place + 2] + words[place + 3])
                place += 4
            elif code == ACCUMULATE:
                self.updates.accumulate(self, words[place + 1], words[place + 2] * UNIT)
                place += 3
            elif code == PERTURB:
                self.updates.perturb(self, words[place + 1], words[place + 2])
                place += 3
            elif code == PASS:
                where[words[place + 2]] = where[words[place + 1]]
                place += 3
            elif code == SPILL:
                number = words[place + 1]
                after = device.mark()  # the operator that makes the tensor may still be running
                host = device.host(where[number], (sizes[number],), "uint8")
                leaving[number] = self._submit(self._spill, where[number], host, self.extents[number], after)
                place += 2
            elif code == FETCH:
                number, at = words[place + 1], words[place + 2] * UNIT
                where[number] = at
                after = device.mark()
                host = device.host(at, (sizes[number],), "uint8")
                arriving[number] = self._submit(self._fetch, number, at, host, self.extents[number], after)
                place += 3
            elif code == LOSS:
                at = where[self.loss_number]
                self.forwards.append(get_now(device, at, device.host(at, (), "float32")).item())
                self.between_forwards()
                place += 1
            else:
                assert token_losses is not None
                number, shape = token_losses
                self.losses = get_now(device, where[number], torch.empty(tuple(shape)))
                place += 1
            now = clock()
            taken = now - before
            spent[code] += taken
            before = now
            check(index)
            if code < LOSS:
                index += 1
                if trace is not None:
                    trace.instruction(taken, self.seconds["stall"])
        for name, value in zip(CODES, spent):
            self.seconds[name] = value
        if trace is not None:
            self.channel.drain()
            trace.end()

    def _submit(self, transfer: Callable[..., None], *arguments: Any) -> int:
        """Have the channel make a transfer; its ticket."""
        if self.trace is None:
            return self.channel.submit(transfer, *arguments)
        return self.channel.submit(self.trace.transfer, transfer, *arguments)

    # --- transfers, in the channel's thread ------------------------------------------------------------------------

    def _read(self, number: int, weight: str, at: int, host: Tensor, after: Mark) -> None:
        self.store.read_into(weight, host)  # type: ignore[union-attr]
        self.landed[number] = self.device.put(at, host, after)

    def _fetch(self, number: int, at: int, host: Tensor, extent: int, after: Mark) -> None:
        self.spill.read(host.data_ptr(), host.numel(), extent)
        self.landed[number] = self.device.put(at, host, after)

    def _spill(self, at: int, host: Tensor, extent: int, after: Mark) -> None:
        self.device.get(at, host, after).wait()
        self.spill.write(host.data_ptr(), host.numel(), extent)

    # --- tensors of updates, waiting ----------------------------------------------------------------------------------

    def resident(self, number: int, shape: Sequence[int], at: int | None = None) -> Tensor:
        """Tensor `number`, float32, in the arena, at offset `at` if it is new there; waits until it has arrived."""
        if number in self.arriving:
            self._arrive(number)
        if at is not None:
            self.where[number] = at
        return self.device.tensor(self.where[number], shape, "float32")

    def _arrive(self, number: int) -> None:
        self._wait(self.arriving.pop(number))
        self.device.follow(self.landed.pop(number))

    def _wait(self, ticket: int) -> None:
        before = time.perf_counter()
        self.channel.wait(ticket)
        self.seconds["stall"] += time.perf_counter() - before
