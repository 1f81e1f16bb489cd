"""What a run trains, with the states of its optimizer: their initial values, checkpoints, and the adapter or module that is saved."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tightfit.runtime.engine.device.device import put_now
from tightfit.runtime.engine.kernels.optimizer import state_shape
from tightfit.runtime.engine.training import adapter
from tightfit.runtime.engine.training.checkpoint import write_json
from tightfit.runtime.engine.training.job import STATES
from tightfit.runtime.engine.training.job_tables import Place, Trainable
from tightfit.runtime.engine.training.storage import CHUNK, Storage
from tightfit.runtime.engine.training.updates import Updates
from tightfit.runtime.engine.weights import safetensors_file
from tightfit.runtime.engine.weights.safetensors_file import TensorItem

if TYPE_CHECKING:
    from tightfit.runtime.engine.fleet.exchange import Exchange
    from tightfit.runtime.engine.fleet.stage import Stage

BUFFER = "buffer"
"""prefix of the keys of buffers in a checkpoint"""


class TrainedState:
    """The trainables of a job, the buffers that its steps change, and the optimizer's states."""

    def __init__(
        self,
        header: dict[str, Any],
        storage: Storage,
        updates: Updates,
        exchange: Exchange | None,
        stage: Stage | None,
    ) -> None:
        """`exchange`: has the optimizer's states of a fleet's member; `stage`: of a pipeline's, who trains some of the layers."""
        self.header, self.storage, self.updates = header, storage, updates
        self.exchange, self.stage = exchange, stage
        self.trainables = storage.trainables

    def initialise(self, *, switched_off: bool = False) -> None:
        """Make the state before step 1: initial values of the trainables, those of an adapter if one is given, of the
        buffers that a step changes, and zeros in the optimizer's states. With `switched_off` the adapter is one that changes
        nothing, whether one is given or not: a new one, whose pairs add zero.
        """
        for name, (dtype, shape, at) in self.storage.buffers.items():
            self.storage.load(name, at, shape, dtype)
        given = None if switched_off else self._given_adapter()
        for trainable in self.trainables:
            value = self.storage.temporary(trainable.value, trainable.shape)
            if given:
                _fill(value, given, self._key(trainable.name), _skipped(trainable))
            elif own := adapter.table_slice(trainable.name):
                self.storage.unpack(f"{self.header['tables'][own.module]}[{own.start}:{own.stop}]", value)
            elif weight := adapter.scaled_weight(trainable.name):
                self.storage.row_norms(weight, value)
            elif self.header["kind"] == "decoder":
                adapter.initialise(trainable.name, self.header["seed"], value)
            else:
                self.storage.unpack(trainable.name, value)
            self.storage.keep(trainable.value, value)
            for place in trainable.states:
                self.storage.zero(place)
        if given:
            given.close()
        if self.exchange:
            self.exchange.states.zero()

    def _given_adapter(self) -> safetensors_file.SafetensorsReader | None:
        """The adapter that training starts from, as it was when the run was prepared; None: it starts from new values."""
        if not self.header.get("adapter"):
            return None
        directory, checksum = self.header["adapter"]
        reader = safetensors_file.SafetensorsReader(os.path.join(directory, adapter.WEIGHTS), "start the run again")
        reader.verify(checksum)
        return reader

    def save_trained(self, directory: str, *, whole: bool = False) -> dict[str, int]:
        """Write a PEFT adapter, or a module's state_dict or a side network as ``model.safetensors``. Returns checksums by
        file.

        A member of a pipeline has the part of its own layers; with `whole` all members are in this call, and the first
        one writes what all have.
        """
        lora = self.header["lora"]
        file = adapter.WEIGHTS if lora else "model.safetensors"
        others: list[TensorItem] = []
        if whole and self.stage and self.stage.gathers:
            if self.stage.first:
                others = self.stage.collected(CHUNK)
            else:
                self.stage.hand_in(self._trained_items)

        def items() -> Iterator[TensorItem]:
            yield from self._trained_items()
            yield from others

        checksum = safetensors_file.write(os.path.join(directory, file), items, {"format": "pt"})
        if lora:
            names = [*self.trainables.names, *(self._name(item.name) for item in others)]
            config = adapter.adapter_config(lora, names, self.header["base_model"], self._body)
            write_json(os.path.join(directory, adapter.CONFIG), config)
        if self.header.get("side"):
            write_json(os.path.join(directory, adapter.SIDE_CONFIG), self.header["side"])
        return {file: checksum}

    def _name(self, key: str) -> str:
        """The trainable whose key in an adapter is `key`."""
        return adapter.trained_name(key, self._body)

    def _trained_items(self) -> Iterator[TensorItem]:
        tables: dict[str, list[tuple[int, int]]] = {}
        """key of a module that is trained in full -> (first row, number) of its slices"""
        for number, trainable in enumerate(self.trainables):
            key = self._key(trainable.name)
            if own := adapter.table_slice(trainable.name):
                tables.setdefault(key, []).append((own.start, number))
            else:
                yield self._item(key, trainable.value, trainable.shape)
        for key, slices in tables.items():
            yield self._table_item(key, [self.trainables[number] for _, number in sorted(slices)])
        state_dict = self.header.get("state_dict") or {}
        places = {name: place for place, name in enumerate(self.trainables.names)} if state_dict else {}
        for key, name in state_dict.items():
            if name in self.storage.buffers:
                yield self._buffer_item(key, name)
            elif name not in places:
                yield self._stored_item(key, name)
            elif key != name:  # another state_dict key of a parameter that several modules share
                trainable = self.trainables[places[name]]
                yield self._item(key, trainable.value, trainable.shape)

    def _state_items(self) -> Iterator[TensorItem]:
        if self.exchange:
            yield from self._fleet_state_items(self.exchange)
            return
        for name in self.storage.buffers:
            yield self._buffer_item(f"{BUFFER}:{name}", name)
        for trainable in self.trainables:
            for role, place in zip(self.updates.saved_states(self.header["states"]), trainable.states):
                yield self._item(f"{role}:{trainable.name}", place, state_shape(role, trainable.shape))

    def _fleet_state_items(self, exchange: Exchange) -> Iterator[TensorItem]:
        """The same items as those of a process that accumulates gradients, whose sum is zero after an update."""
        for number, trainable in enumerate(self.trainables):
            for row, role in enumerate(STATES):

                def chunks(number: int = number, row: int = row) -> Iterator[memoryview]:
                    at_rest = torch.zeros(self.trainables[number].shape)
                    values = exchange.state(row, number) if row < 2 else at_rest
                    yield memoryview((ctypes.c_char * (values.numel() * 4)).from_address(values.data_ptr())).cast("B")

                shape = list(trainable.shape)
                yield TensorItem(name=f"{role}:{trainable.name}", dtype="float32", shape=shape, chunks=chunks)

    def save(self, directory: str) -> dict[str, Any]:
        """Write the files of a checkpoint into `directory`; returns the entries for its ``state.json``."""
        checksums = self.save_trained(directory)
        checksums["optimizer.safetensors"] = safetensors_file.write(
            os.path.join(directory, "optimizer.safetensors"), self._state_items, {}
        )
        return {"checksums": checksums, **self.updates.progress()}

    def load(self, directory: str, state: dict[str, Any]) -> None:
        """Load a checkpoint directory; `state` is its ``state.json``. Raises InputError if a file is missing or
        damaged.
        """
        checksums = state["checksums"]
        self.updates.resume(state)
        file = adapter.WEIGHTS if self.header["lora"] else "model.safetensors"
        with_adapter = (
            (self._key(t.name), t, t.value, t.shape, partial(self.storage.keep, t.value)) for t in self.trainables
        )
        for name, wanted in ((file, with_adapter), ("optimizer.safetensors", self._states_wanted())):
            reader = safetensors_file.SafetensorsReader(os.path.join(directory, name))
            reader.verify(checksums[name])
            for key, trainable, place, shape, keep in wanted:
                value = self.storage.temporary(place, shape)
                plain = adapter.adapter_key(trainable.name)  # the key in checkpoints of plans without `adapter_body`
                skipped = _skipped(trainable) if name == file else 0
                _fill(value, reader, plain if plain in reader else key, skipped)
                keep(value)
            if name != file:
                for buffer, (dtype, shape, at) in self.storage.buffers.items():
                    host = self.storage.device.host(at, shape, dtype)
                    _fill(host, reader, f"{BUFFER}:{buffer}")
                    put_now(self.storage.device, at, host)
            reader.close()

    def _states_wanted(self) -> Iterator[tuple[str, Trainable, Place, tuple[int, ...], Callable[[Tensor], None]]]:
        """(key in a checkpoint, trainable, a place of its size, its shape, what puts it in its place) of every state of the
        optimizer.
        """
        for number, t in enumerate(self.trainables):
            if self.exchange:
                for row, role in enumerate(STATES[:2]):
                    yield f"{role}:{t.name}", t, t.value, t.shape, partial(self.exchange.set_state, row, number)
            else:
                for role, place in zip(self.updates.saved_states(self.header["states"]), t.states):
                    yield f"{role}:{t.name}", t, place, state_shape(role, t.shape), partial(self.storage.keep, place)

    @property
    def _body(self) -> str:
        body: str = self.header.get("adapter_body", adapter.BODY)
        return body

    def _key(self, name: str) -> str:
        """The key of a trainable in the saved adapter or model."""
        return adapter.adapter_key(name, self._body) if self.header["lora"] else name

    def _item(self, name: str, place: Place, shape: Sequence[int]) -> TensorItem:
        return TensorItem(name=name, dtype="float32", shape=list(shape), chunks=lambda: self.storage.chunks(place))

    def _buffer_item(self, key: str, name: str) -> TensorItem:
        """The present values of a buffer that a step changes."""
        dtype, shape, _ = self.storage.buffers[name]
        return TensorItem(name=key, dtype=dtype, shape=list(shape), chunks=lambda: self.storage.buffer_chunks(name))

    def _table_item(self, key: str, slices: list[Trainable]) -> TensorItem:
        """A module that is trained in full as one tensor, from its slices in their order, none of which is copied."""
        shape = [sum(one.shape[0] for one in slices), *slices[0].shape[1:]]

        def chunks() -> Iterator[memoryview | bytes]:
            for one in slices:
                yield from self.storage.chunks(one.value)

        return TensorItem(name=key, dtype="float32", shape=shape, chunks=chunks)

    def _stored_item(self, key: str, name: str) -> TensorItem:
        """A frozen parameter or a buffer, with the dtype and bytes that the store holds."""
        entry = self.storage.store.entries[name]
        return TensorItem(
            name=key, dtype=entry.format, shape=list(entry.shape), chunks=lambda: self.storage.stored_chunks(entry)
        )


def _skipped(trainable: Trainable) -> int:
    """Bytes before a trainable in the tensor of an adapter that it is a slice of; 0: it is a tensor of its own."""
    own = adapter.table_slice(trainable.name)
    return 4 * own.start * trainable.shape[1] if own else 0


def _fill(value: Tensor, reader: safetensors_file.SafetensorsReader, key: str, skipped: int = 0) -> None:
    """Copy the bytes that a file has under `key`, after the first `skipped` ones, into a tensor."""
    done = 0
    for chunk in reader.chunks(key, begin=skipped, count=value.numel() * value.itemsize):
        ctypes.memmove(value.data_ptr() + done, chunk, len(chunk))
        done += len(chunk)
