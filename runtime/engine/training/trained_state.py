"""What a run trains, with the states of its optimizer: their initial values, checkpoints, and the adapter or module
that is saved.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from tightfit.runtime.engine.device.device import put_now
from tightfit.runtime.engine.fleet.role import FleetRole
from tightfit.runtime.engine.training import adapter
from tightfit.runtime.engine.training.checkpoint import write_json
from tightfit.runtime.engine.training.job_tables import TensorPlace, Trainable
from tightfit.runtime.engine.training.storage import Storage
from tightfit.runtime.engine.training.updates import Updates
from tightfit.runtime.engine.weights import safetensors_file
from tightfit.runtime.engine.weights.safetensors_file import TensorItem

OPTIMIZER = "optimizer.safetensors"
BUFFER = "buffer"
"""prefix of the keys of buffers in a checkpoint"""


class TrainedState:
    """The trainables of a job, the buffers that its steps change, and the optimizer's states."""

    def __init__(self, header: dict[str, Any], storage: Storage, updates: Updates, role: FleetRole) -> None:
        self.header, self.storage, self.updates, self.role = header, storage, updates, role
        self.trainables = storage.trainables

    def initialise(self, *, switched_off: bool = False) -> None:
        """Make the state before step 1: initial values of the trainables, those of an adapter if one is given, of the
        buffers that a step changes, and zeros in the optimizer's states. With `switched_off` the adapter is one that
        changes nothing, whether one is given or not: a new one, whose pairs add zero.
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
        if given:
            given.close()
        self.updates.initialise(self.storage)

    def _given_adapter(self) -> safetensors_file.SafetensorsReader | None:
        """The adapter that training starts from, as it was when the run was prepared; None: it starts from new
        values.
        """
        if not self.header.get("adapter"):
            return None
        directory, checksum = self.header["adapter"]
        reader = safetensors_file.SafetensorsReader(os.path.join(directory, adapter.WEIGHTS), "start the run again")
        reader.verify(checksum)
        return reader

    def save_trained(self, directory: str, *, whole: bool = False) -> dict[str, int]:
        """Write a PEFT adapter, or a module's state_dict or a side network as ``model.safetensors``. Returns checksums
        by file.

        A member of a pipeline has the part of its own layers; with `whole` all members are in this call, and the first
        one writes what all have.
        """
        lora, file = self.header["lora"], self._file
        others = self.role.gathered(self._trained_items) if whole else []

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
        for name in self.storage.buffers:
            yield self._buffer_item(f"{BUFFER}:{name}", name)
        for state in self.updates.saved_states(self.storage, self.header["states"]):
            yield TensorItem(name=state.key, dtype="float32", shape=list(state.shape), chunks=state.chunks)

    def save(self, directory: str) -> dict[str, Any]:
        """Write the files of a checkpoint into `directory`; returns the entries for its ``state.json``."""
        checksums = self.save_trained(directory)
        checksums[OPTIMIZER] = safetensors_file.write(os.path.join(directory, OPTIMIZER), self._state_items, {})
        return {"checksums": checksums, **self.updates.progress()}

    def load(self, directory: str, state: dict[str, Any]) -> None:
        """Load a checkpoint directory; `state` is its ``state.json``. Raises InputError if a file is missing or
        damaged.
        """
        self.updates.resume(state)
        reader = self._reader(directory, self._file, state)
        for trainable in self.trainables:
            value = self.storage.temporary(trainable.value, trainable.shape)
            plain = adapter.adapter_key(trainable.name)  # the key in checkpoints of plans without `adapter_body`
            _fill(value, reader, plain if plain in reader else self._key(trainable.name), _skipped(trainable))
            self.storage.keep(trainable.value, value)
        reader.close()
        reader = self._reader(directory, OPTIMIZER, state)
        for kept in self.updates.saved_states(self.storage, self.header["states"]):
            value = self.storage.temporary(kept.place, kept.shape)
            _fill(value, reader, kept.key)
            kept.keep(value)
        for buffer, (dtype, shape, at) in self.storage.buffers.items():
            host = self.storage.device.host(at, shape, dtype)
            _fill(host, reader, f"{BUFFER}:{buffer}")
            put_now(self.storage.device, at, host)
        reader.close()

    def _reader(self, directory: str, name: str, state: dict[str, Any]) -> safetensors_file.SafetensorsReader:
        reader = safetensors_file.SafetensorsReader(os.path.join(directory, name))
        reader.verify(state["checksums"][name])
        return reader

    @property
    def _file(self) -> str:
        """What is trained is saved in this file."""
        return adapter.WEIGHTS if self.header["lora"] else "model.safetensors"

    @property
    def _body(self) -> str:
        body: str = self.header.get("adapter_body", adapter.BODY)
        return body

    def _key(self, name: str) -> str:
        """The key of a trainable in the saved adapter or model."""
        return adapter.adapter_key(name, self._body) if self.header["lora"] else name

    def _item(self, name: str, place: TensorPlace, shape: Sequence[int]) -> TensorItem:
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
