"""One job in the training process: loads the resident tensors, runs steps and evaluations, saves and loads
their state.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.engine.device.channels import Channel
from tightfit.runtime.engine.device.device import Device
from tightfit.runtime.engine.device.spill import SpillFile
from tightfit.runtime.engine.kernels.optimizer import (
    AdamW,
    ClippedUpdate,
    Exact,
    MeZO,
    Perturbation,
    Update,
    optimizer_of,
    state_shape,
)
from tightfit.runtime.engine.training import adapter
from tightfit.runtime.engine.training.batches import Batches, ReceivedBatches, TrainingBatches, open_batches
from tightfit.runtime.engine.training.checkpoint import write_json
from tightfit.runtime.engine.training.devices import open_device
from tightfit.runtime.engine.training.executor import Executor
from tightfit.runtime.engine.training.job import BLOCK, STATES, Job, operators_run
from tightfit.runtime.engine.training.job_tables import Place, Trainable, Trainables, Weights
from tightfit.runtime.engine.training.operator_warmup import warm_up_operators
from tightfit.runtime.engine.training.records import TokenRecord
from tightfit.runtime.engine.training.session_protocol import Requests
from tightfit.runtime.engine.weights import safetensors_file
from tightfit.runtime.engine.weights.layout import Entry
from tightfit.runtime.engine.weights.safetensors_file import Item
from tightfit.runtime.engine.weights.store import Store

if TYPE_CHECKING:
    from tightfit.runtime.engine.fleet.exchange import Exchange
    from tightfit.runtime.engine.fleet.seat import Seat
    from tightfit.runtime.engine.fleet.stage import Stage
    from tightfit.runtime.engine.training.pair_scores import PairScores
    from tightfit.runtime.engine.training.pairs import PairBatches

CHUNK = 1 << 20
BUFFER = "buffer"
"""prefix of the keys of buffers in a checkpoint"""
NORM = "tightfit.dora_norm"
NORM_ELEMENTS = 1 << 17
"""of a weight that are unpacked at a time to find the lengths of its rows"""


class Training:
    """A loaded job: `step` takes a training step, `evaluate` and `loss` run the evaluation schedule."""

    def __init__(
        self,
        job: Job,
        channel: Channel,
        directory: str,
        device: Device | None = None,
        stopping: Callable[[], bool] = lambda: False,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Load what stays resident. `directory` takes the spill file; `device` defaults to the one named in the job;
        `stopping` is asked while a fleet's member waits for the others, and `say` told for whom.
        """
        header = job.header
        self.job, self.header = job, header
        self.device = device or open_device(header)
        self.store = Store.open(header["store"]) if header["store"] else None
        self.spill = SpillFile(directory, header["spill_bytes"])
        self.channel = channel
        self.meter = self.device.meter
        # The JSON forms are dropped from the header: they are many times as large as these tables.
        self.weights = Weights(header.pop("weights"), job.weights)
        self.trainables = Trainables(header.pop("trainables"), job.trainables)
        self._hole: tuple[int, int] = tuple(header["hole"])
        optimizer = optimizer_of(header["optimizer"])
        seat = self._seat()
        self.exchange = (
            None if seat is None or seat.in_turn else self._joined(seat, optimizer, directory, stopping, say)
        )
        """with the other members of a fleet, which makes the updates"""
        self.update: Update | Perturbation | None = None
        if isinstance(optimizer, MeZO):
            self.update = Perturbation(optimizer, header["seed"])
        elif header["max_grad_norm"] is not None:  # no member of a fleet clips
            self.update = ClippedUpdate(optimizer, header["max_grad_norm"], header["accumulate"])
        elif not self.exchange:
            self.update = Update(optimizer, header["accumulate"])
        self.executor = Executor(
            job,
            self.device,
            self.store,
            self.spill,
            self.channel,
            self.update,
            self.weights,
            self.trainables,
            self.exchange,
        )
        ran = sorted(operators_run(job))
        warm_up_operators(
            (programs[program][operator] for programs in self.executor.programs.values() for program, operator in ran),
            self.device,
        )
        self.stage = self._in_pipeline(seat, stopping, say) if seat is not None and seat.in_turn else None
        """this member's place in a pipeline, whose members each compute some of the layers"""
        self.buffers: dict[str, list[Any]] = {name: place for name, *place in header["buffers"]}
        """name -> [dtype, shape, byte offset in the arena] of the buffers that a step changes: running statistics"""
        self._load_frozen()
        self._input_places = [at for _, _, _, at in header["inputs"]]
        self._expected = {step["seq"]: step["expected_seconds"] for step in header["shorter"]}
        """seconds of the shorter steps as planned, by their length, the shortest first"""
        self._inputs: dict[int | None, list[Tensor]] = {
            length: [self.device.host(at, shape, dtype) for _, dtype, shape, at in step["inputs"]]
            for length, step in (
                (None if step is header else step["seq"], step) for step in (*header["shorter"], header)
            )
        }
        self._length: int | None = None
        """of the shorter step that is taken; None: it is the whole one"""
        self.inputs = self._inputs[None]
        """the tensors of the batch in host memory, in the plan's order and of the length that the batch has"""
        self.batches: TrainingBatches = self._batches(header["requests"])
        self.tokens: int | None = None
        """tokens in the latest step's batch without padding; None if unknown (a module's batches, a Session)"""
        self.samples: int | None = None
        """samples in it; None if unknown"""
        self.of_pairs: dict[str, float] = {}
        """of the latest step on pairs of answers: the share in which the chosen one has the higher reward, and the margin"""
        self.grad_norm: float | None = None
        """of the update that the latest step made, before it was clipped; None: it made none, or gradients are not clipped"""
        self.update_seconds = 0.0
        """of the latest update, where gradients are clipped"""

    def _seat(self) -> Seat | None:
        if not self.header.get("fleet"):
            return None
        from tightfit.runtime.engine.fleet.seat import seat_of

        return seat_of(self.header["fleet"])

    def _batches(self, requests: int | None) -> TrainingBatches:
        if requests is not None:
            return Requests(requests)
        if self.header["data"] is None:
            assert self.stage
            return ReceivedBatches(self.stage)
        return self._opened(self.header["data"])

    def _opened(self, path: str) -> Batches:
        """A data file, for training or evaluating: the samples of both share rows, or those of neither do."""
        packing, by_length = self.header.get("packing", False), bool(self._expected)
        return open_batches(path, self.header["seed"], packing=packing, by_length=by_length, loss=self.loss_of_pairs)

    @property
    def loss_of_pairs(self) -> str | None:
        """The loss of a model that learns from pairs of answers; None: it has another."""
        preference = self.header.get("preference")
        return preference["loss"] if preference else None

    def _in_pipeline(self, seat: Seat, stopping: Callable[[], bool], say: Callable[[str], None]) -> Stage:
        """Meet the other members of a pipeline."""
        from tightfit.runtime.engine.fleet.seat import join_pipeline

        stage = join_pipeline(seat, stopping, say)
        self.executor.join(stage)
        return stage

    @property
    def fleet(self) -> Exchange | Stage | None:
        """What a run has to do with the other members of its fleet; None: it is one of its own."""
        return self.exchange or self.stage

    def _joined(
        self,
        seat: Seat,
        optimizer: Exact | MeZO,
        directory: str,
        stopping: Callable[[], bool],
        say: Callable[[str], None],
    ) -> Exchange:
        """Meet the other members of a fleet that exchanges gradients."""
        from tightfit.runtime.engine.fleet.seat import join

        assert isinstance(optimizer, AdamW)
        return join(
            seat,
            optimizer,
            [one.shape for one in self.trainables],
            directory,
            self.channel,
            parameter=self._value,
            keep=lambda tensor, values: self._keep(self.trainables[tensor].value, values),
            stopping=stopping,
            say=say,
        )

    def _value(self, tensor: int) -> Tensor:
        """The values of a trainable, by its number: where they lie in the arena, or a copy of what is in the spill
        file.
        """
        one = self.trainables[tensor]
        if one.value.at >= 0:
            return self.device.host(one.value.at, one.shape, "float32")
        value = torch.empty(one.shape)
        self.spill.read(value.data_ptr(), self.job.sizes[one.value.number], self.job.extents[one.value.number])
        return value

    def set_rate(self, lr: float | None) -> None:
        """Set the base learning rate from the next step on; None sets that of the run again."""
        assert self.update is not None  # the members of a fleet take the rate that they agreed on
        lr = self.header["optimizer"]["lr"] if lr is None else lr
        self.update.optimizer = replace(self.update.optimizer, lr=lr)

    @property
    def rate(self) -> float:
        """The base learning rate."""
        taker = self.exchange or self.update
        assert taker is not None
        return taker.optimizer.lr

    def rate_of(self, step: int) -> float:
        """The learning rate of the update to which step `step` belongs, counted from 1."""
        taker = self.exchange or self.update
        assert taker is not None
        steps = self.exchange.share.micro_batches if self.exchange else self.header["accumulate"]
        return taker.optimizer.rate(-(-step // steps) * steps, steps)

    def _take_length(self, longest: int | None) -> None:
        """Run the shortest step whose rows have room for `longest` positions, from now on; None: the whole one."""
        length = None if longest is None else next((one for one in self._expected if one >= longest), None)
        self.inputs = self._inputs[length]
        self.executor.take(length)
        self._length = length

    @property
    def of_length(self) -> dict[str, float]:
        """Of the latest step, where the plan has shorter ones: the positions of its rows, padding included, and the seconds that
        were planned for it.
        """
        if not self._expected:
            return {}
        seconds = self.header["expected_seconds"] if self._length is None else self._expected[self._length]
        return {"places": self.inputs[0].numel(), "expected": seconds}

    def step(self, number: int) -> float:
        """Take training step `number`, counted from 1; returns its loss, with MeZO the mean of its two.

        In a pipeline also the forwards of other micro-batches that are due before and after it.
        """
        if self.stage is None:
            return self._train(number)
        for other in self.stage.ahead_before(number):
            self._ahead(self.stage, other)
        self.stage.begin(number, "train")
        loss = self._train(number)
        for other in self.stage.ahead_after(number):
            self._ahead(self.stage, other)
        return loss

    def _ahead(self, stage: Stage, number: int) -> None:
        """Take the forward of a micro-batch ahead."""
        self.batches.training(number - 1, self.inputs)
        self._deliver()
        stage.begin(number, "ahead")
        self.executor.draws.step = number  # as in the training of the micro-batch
        self.executor.execute(self.job.evaluate)

    def _train(self, number: int) -> float:
        if self._expected:
            self._take_length(self.batches.longest(number - 1, self.inputs[0].shape[0]))
        self.tokens = self.batches.training(number - 1, self.inputs)
        self.samples = self.batches.samples
        self._deliver()

        def seed() -> None:
            torch.default_generator.manual_seed(self.header["seed"] * 1_000_003 + number)

        seed()
        self.executor.draws.step = number
        self.executor.between_forwards = seed  # MeZO's two forwards of one step draw the same random numbers
        if isinstance(self.update, Perturbation):
            self.update.begin(number)
        else:
            taker = self.exchange or self.update
            assert taker is not None
            taker.begin(number, self._averaged())
        cycles, position = divmod(number - 1, len(self.header["cycle"]))
        begin, end = self.header["cycle"][position]
        self.executor.execute(self.job.train, begin, end, cycles)
        loss = self.executor.loss
        if self.loss_of_pairs and self.samples:
            scores = self._pair_scores()
            scores.add(self.executor.losses, self.inputs, 2 * self.samples)
            told = scores.result(0.0)
            self.of_pairs = {name: told[name] for name in ("reward_accuracy", "reward_margin")}
        self.grad_norm = None
        if isinstance(self.update, ClippedUpdate) and self.update.due:
            self.grad_norm = self._update_all(self.update, number)
        return loss

    def _update_all(self, update: ClippedUpdate, number: int) -> float:
        """Update all trainables after step `number`, the last of an update; returns the norm of their gradients."""
        norm, before, began = update.norm(), dict(self.executor.seconds), time.perf_counter()
        begin, end = self.header["update"]
        self.executor.execute(self.job.train, begin, end, number - 1)
        for kind, seconds in before.items():
            self.executor.seconds[kind] += seconds
        self.update_seconds = time.perf_counter() - began
        return norm

    def _deliver(self) -> None:
        """Copy the batch from `inputs` to the device."""
        for at, host in zip(self._input_places, self.inputs):
            self.device.put(at, host)

    def _averaged(self) -> int:
        """How many terms the loss of the batch is a mean over: the weight of its gradient in an update of several
        steps.

        For a decoder the labelled tokens, or where it learns from pairs of answers these. For a module it is unknown, so each
        batch has weight 1.
        """
        if self.loss_of_pairs:
            from tightfit.runtime.engine.training.pair_scores import averaged

            return averaged(self.inputs[1])
        return int((self.inputs[1] >= 0).sum()) if self.header["kind"] == "decoder" else 1

    def loss(self) -> float:
        """The loss of the next training batch, without a step or dropout; for a decoder the mean over labelled tokens."""
        if self._expected:
            self._take_length(self.batches.longest(0, self.inputs[0].shape[0]))
        self.batches.training(0, self.inputs)
        self._deliver()
        self.executor.draws.step = None
        self.executor.execute(self.job.evaluate)
        return self.executor.loss

    def evaluate(self, path: str | None, progress: Callable[[int, int], None]) -> dict[str, Any]:
        """Evaluate on the data file `path`: the mean loss and, if the records are choices of questions, the accuracy.

        The loss is a decoder's mean over labelled tokens, a module's mean over batches. Wrong choices do not count in
        it, so that it is comparable with the training loss. A question counts as right if its right choice has the
        highest summed log-likelihood, the first of them where several have. `progress(done, batches)` is called after every batch. Returns `loss`, `accuracy`
        (None without questions), `questions`, `records` and `seconds`. On pairs of answers the loss is that of all pairs as if
        they were one batch, and there are `pairs`, `reward_accuracy`, the share of them in which the chosen answer has the higher
        reward, and `reward_margin`, the mean difference of the rewards, as TRL counts them. A server that trains a side network has no file: a
        device sends it the batches, and counts the losses that it sends back.
        """
        scores = self._pair_scores() if self.loss_of_pairs else Scores()
        before = time.perf_counter()
        self.executor.draws.step = None
        with_records = None if path is None else self._opened(path)
        if with_records is not None and self.refers:
            with_records.open_references(self.header["conditions"])  # type: ignore[attr-defined]
        batches = 0 if with_records is None else with_records.evaluation_count(self.inputs)
        served = self.stage if self.stage and self.stage.one_way else None
        if served:
            batches = served.count(batches)
        for number in range(batches):
            if self._expected and with_records is not None:
                self._take_length(with_records.longest_in_evaluation(number, self.inputs[0].shape[0]))
            found = [] if with_records is None else with_records.evaluation(number, self.inputs)
            if self.stage:
                self.stage.begin_evaluation()
            if with_records is None:
                self.batches.training(number, self.inputs)
            self._deliver()
            self.executor.execute(self.job.evaluate)
            progress(number + 1, batches)
            losses = self.executor.losses
            if served:
                losses = served.losses(losses, self.inputs[1].numel())
            if isinstance(scores, Scores):
                scores.add(self.executor.loss, losses, found)
            else:
                scores.add(losses, self.inputs, len(found))
        if with_records is not None:
            with_records.close()
        result = scores.result(time.perf_counter() - before)
        return self.stage.agreed(result) if self.stage else result

    def _pair_scores(self) -> PairScores:
        from tightfit.runtime.engine.training.pair_scores import SCORES, PairScores

        return PairScores(self.device.kernels.fused[SCORES], **self.header["preference"])

    @property
    def refers(self) -> bool:
        """Whether the loss compares with what the model with its adapter switched off says of the same answers (DPO)."""
        return self.loss_of_pairs == "dpo"

    def refer(self, batches: PairBatches, pairs: Sequence[int]) -> None:
        """Write the references of a batch of pairs: the log-probabilities of their answers with what is trained now, which is to
        be what `initialise` makes without a given adapter.
        """
        from tightfit.runtime.engine.training.pair_scores import SCORES, answers_of

        assert batches.references is not None
        references, batches.references = batches.references, None
        if self._expected:
            self._take_length(batches.longest_of(pairs))
        batches.fill(pairs, self.inputs)
        batches.references = references
        self._deliver()
        self.executor.draws.step = None
        self.executor.execute(self.job.evaluate)
        assert self.executor.losses is not None
        found = answers_of(self.device.kernels.fused[SCORES], self.executor.losses, self.inputs[1])
        for place, pair in enumerate(pairs):
            references.put(pair, found[2 * place], found[2 * place + 1])

    def initialise(self, *, switched_off: bool = False) -> None:
        """Make the state before step 1: initial values of the trainables, those of an adapter if one is given, of the
        buffers that a step changes, and zeros in the optimizer's states. With `switched_off` the adapter is one that changes
        nothing, whether one is given or not: a new one, whose pairs add zero.
        """
        for name, (dtype, shape, at) in self.buffers.items():
            self._load(name, at, shape, dtype)
        given = None if switched_off else self._given_adapter()
        for trainable in self.trainables:
            value = self._temporary(trainable.value, trainable.shape)
            if given:
                _fill(value, given, self._key(trainable.name), _skipped(trainable))
            elif own := adapter.table_slice(trainable.name):
                self._unpack(f"{self.header['tables'][own.module]}[{own.start}:{own.stop}]", value)
            elif weight := adapter.scaled_weight(trainable.name):
                self._row_norms(weight, value)
            elif self.header["kind"] == "decoder":
                adapter.initialise(trainable.name, self.header["seed"], value)
            else:
                self._unpack(trainable.name, value)
            self._keep(trainable.value, value)
            for place in trainable.states:
                if place.at >= 0:
                    self.device.raw(place.at, self.job.sizes[place.number]).zero_()
                else:
                    self.spill.zero(self.job.sizes[place.number], self.job.extents[place.number])
        if given:
            given.close()
        if self.exchange:
            self.exchange.states.zero()

    def _given_adapter(self) -> safetensors_file.Reader | None:
        """The adapter that training starts from, as it was when the run was prepared; None: it starts from new values."""
        if not self.header.get("adapter"):
            return None
        directory, checksum = self.header["adapter"]
        reader = safetensors_file.Reader(os.path.join(directory, adapter.WEIGHTS), "start the run again")
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
        others: list[Item] = []
        if whole and self.stage and self.stage.gathers:
            if self.stage.first:
                others = self.stage.collected(CHUNK)
            else:
                self.stage.hand_in(self._trained_items)

        def items() -> Iterator[Item]:
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

    def _trained_items(self) -> Iterator[Item]:
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
            if name in self.buffers:
                yield self._buffer_item(key, name)
            elif name not in places:
                yield self._stored_item(key, name)
            elif key != name:  # another state_dict key of a parameter that several modules share
                trainable = self.trainables[places[name]]
                yield self._item(key, trainable.value, trainable.shape)

    def _state_items(self) -> Iterator[Item]:
        if self.exchange:
            yield from self._fleet_state_items(self.exchange)
            return
        for name in self.buffers:
            yield self._buffer_item(f"{BUFFER}:{name}", name)
        for trainable in self.trainables:
            for role, place in zip(self._saved_states, trainable.states):
                yield self._item(f"{role}:{trainable.name}", place, state_shape(role, trainable.shape))

    def _fleet_state_items(self, exchange: Exchange) -> Iterator[Item]:
        """The same items as those of a process that accumulates gradients, whose sum is zero after an update."""
        for number, trainable in enumerate(self.trainables):
            for row, role in enumerate(STATES):

                def chunks(number: int = number, row: int = row) -> Iterator[memoryview]:
                    at_rest = torch.zeros(self.trainables[number].shape)
                    values = exchange.state(row, number) if row < 2 else at_rest
                    yield memoryview((ctypes.c_char * (values.numel() * 4)).from_address(values.data_ptr())).cast("B")

                shape = list(trainable.shape)
                yield Item(name=f"{role}:{trainable.name}", dtype="float32", shape=shape, chunks=chunks)

    def save_state(self, directory: str) -> dict[str, Any]:
        """Write the files of a checkpoint into `directory`; returns the entries for its ``state.json``."""
        self.channel.drain()
        checksums = self.save_trained(directory)
        checksums["optimizer.safetensors"] = safetensors_file.write(
            os.path.join(directory, "optimizer.safetensors"), self._state_items, {}
        )
        entries: dict[str, Any] = {"checksums": checksums}
        if isinstance(self.update, ClippedUpdate):
            entries["sums"] = self.update.sums
        # Between the updates of a fleet nothing is summed up.
        summed = self.update.summed if isinstance(self.update, Update) else 0.0
        return entries | ({} if isinstance(self.update, Perturbation) else {"summed": summed})

    def load_state(self, directory: str, state: dict[str, Any]) -> None:
        """Load a checkpoint directory; `state` is its ``state.json``. Raises InputError if a file is missing or
        damaged.
        """
        checksums = state["checksums"]
        if isinstance(self.update, Update):
            self.update.summed = state.get("summed", 0.0)
        if isinstance(self.update, ClippedUpdate):
            self.update.sums = state["sums"]
        file = adapter.WEIGHTS if self.header["lora"] else "model.safetensors"
        with_adapter = ((self._key(t.name), t, t.value, t.shape, partial(self._keep, t.value)) for t in self.trainables)
        for name, wanted in ((file, with_adapter), ("optimizer.safetensors", self._states_wanted())):
            reader = safetensors_file.Reader(os.path.join(directory, name))
            reader.verify(checksums[name])
            for key, trainable, place, shape, keep in wanted:
                value = self._temporary(place, shape)
                plain = adapter.adapter_key(trainable.name)  # the key in checkpoints of plans without `adapter_body`
                skipped = _skipped(trainable) if name == file else 0
                _fill(value, reader, plain if plain in reader else key, skipped)
                keep(value)
            if name != file:
                for buffer, (dtype, shape, at) in self.buffers.items():
                    host = self.device.host(at, shape, dtype)
                    _fill(host, reader, f"{BUFFER}:{buffer}")
                    self.device.put(at, host)
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
                for role, place in zip(self._saved_states, t.states):
                    yield f"{role}:{t.name}", t, place, state_shape(role, t.shape), partial(self._keep, place)

    @property
    def _saved_states(self) -> tuple[str, ...]:
        """The states that a checkpoint has: where gradients are clipped, no sums that the next step begins anew."""
        states = tuple(self.header["states"])
        return states[:-1] if isinstance(self.update, ClippedUpdate) and not self.update.sums else states

    @property
    def _body(self) -> str:
        body: str = self.header.get("adapter_body", adapter.BODY)
        return body

    def _key(self, name: str) -> str:
        """The key of a trainable in the saved adapter or model."""
        return adapter.adapter_key(name, self._body) if self.header["lora"] else name

    def close(self) -> None:
        self.channel.close()
        if self.fleet:
            self.fleet.close()
        self.spill.close()
        if self.store:
            self.store.close()

    def _load_frozen(self) -> None:
        """Load the constants, and the weights that stay in the arena, packed or unpacked."""
        for name, dtype, shape, at in self.header.pop("constants"):
            self._load(name, at, shape, dtype)
        for weight in self.weights:
            if weight.packed_at >= 0:
                self._place(weight.name, weight.packed_at, weight.packed_bytes)
            if weight.at >= 0:
                self._load(weight.name, weight.at, weight.shape, weight.dtype)

    @property
    def _store(self) -> Store:
        if self.store is None:
            raise InputError("the plan reads weights and names no weight store; profile the model again")
        return self.store

    def _place(self, name: str, at: int, size: int) -> None:
        """Read a weight's packed bytes into the arena at offset `at`."""
        host = self.device.host(at, (size,), "uint8")
        self._store.read_into(name, host)
        self.device.put(at, host)

    def _load(self, name: str, at: int, shape: Iterable[int], dtype: str) -> None:
        """Read a weight or constant and unpack it into the arena at offset `at`."""
        host = self.device.host(at, shape, dtype)
        self._unpack(name, host)
        self.device.put(at, host)

    def _unpack(self, name: str, out: Tensor) -> None:
        staging = self._room(self._store.packed_bytes(name))
        self._store.read_into(name, staging)
        self._store.unpack(name, staging, out)

    def _row_norms(self, name: str, out: Tensor) -> None:
        """Fill `out` with the lengths of a weight's rows as its operators read them: the magnitudes that DoRA starts from.

        A few rows are in memory at a time. Raises InputError where all elements of a row are zero.
        """
        entry = self._store.entries[name]
        dtype = next(weight.dtype for weight in self.weights if weight.name == name)
        step = max(1, NORM_ELEMENTS // (entry.columns * entry.segment_rows)) * entry.segment_rows
        rows = torch.empty(min(step, entry.rows), entry.columns, dtype=getattr(torch, dtype))
        # The operator that divides by the lengths, with a pair that adds nothing: the first quotients are exactly 1.
        length, a, b = self.device.kernels.fused[NORM], torch.zeros(1, entry.columns), torch.zeros(len(rows), 1)
        scratch = torch.empty(rows.shape)
        for start in range(0, entry.rows, step):
            stop = min(start + step, entry.rows)
            part = rows[: stop - start]
            self._store.load(f"{name}[{start}:{stop}]", part)
            length(part, a, b[: len(part)], 1.0, out=(out[start:stop], scratch))
        if not out.all():
            raise InputError(
                f"row {int(out.argmin())} of {name} is zero, and DoRA divides by its length; profile without {spelled('dora')}, or leave the"
                f" layer out with {spelled('lora_targets')}"
            )

    def _room(self, size: int) -> Tensor:
        """A uint8 buffer [size] to read into, at the start of the arena's hole; from the heap if the hole is
        too small.
        """
        start, end = self._hole
        return (
            self.device.host(start, (size,), "uint8") if end - start >= size else torch.empty(size, dtype=torch.uint8)
        )

    def _temporary(self, place: Place, shape: Sequence[int]) -> Tensor:
        """A float32 tensor of this shape, which has the bytes of the tensor `place`, to prepare a value in.

        It lies at the end of the arena's hole, where it does not overlap the packed bytes that `_room` has at the
        start, or on the heap if the hole is too small.
        """
        size = self.job.sizes[place.number]
        start, end = self._hole
        if end - start >= 2 * size + 3 * BLOCK:
            return self.device.host((end - size) // BLOCK * BLOCK, shape, "float32")
        return torch.empty(tuple(shape))

    def _keep(self, place: Place, value: Tensor) -> None:
        size = self.job.sizes[place.number]
        if place.at >= 0:
            self.device.put(place.at, value)
        else:
            self.spill.write(value.data_ptr(), size, self.job.extents[place.number])

    def _item(self, name: str, place: Place, shape: Sequence[int]) -> Item:
        return Item(name=name, dtype="float32", shape=list(shape), chunks=lambda: self._chunks(place))

    def _buffer_item(self, key: str, name: str) -> Item:
        """The present values of a buffer that a step changes."""
        dtype, shape, at = self.buffers[name]

        def chunks() -> Iterator[memoryview]:
            host = self.device.host(at, shape, dtype)
            self.device.get(at, host)
            size = host.numel() * host.itemsize
            yield memoryview((ctypes.c_char * size).from_address(host.data_ptr())).cast("B")

        return Item(name=key, dtype=dtype, shape=list(shape), chunks=chunks)

    def _table_item(self, key: str, slices: list[Trainable]) -> Item:
        """A module that is trained in full as one tensor, from its slices in their order, none of which is copied."""
        shape = [sum(one.shape[0] for one in slices), *slices[0].shape[1:]]

        def chunks() -> Iterator[memoryview | bytes]:
            for one in slices:
                yield from self._chunks(one.value)

        return Item(name=key, dtype="float32", shape=shape, chunks=chunks)

    def _stored_item(self, key: str, name: str) -> Item:
        """A frozen parameter or a buffer, with the dtype and bytes that the store holds."""
        entry = self._store.entries[name]
        return Item(name=key, dtype=entry.format, shape=list(entry.shape), chunks=lambda: self._stored_chunks(entry))

    def _stored_chunks(self, entry: Entry) -> Iterator[memoryview]:
        segments = max(1, CHUNK // max(1, entry.segment_rows * entry.row_bytes))
        step = segments * entry.segment_rows
        for start in range(0, entry.rows if entry.bytes else 0, step):
            rows = f"[{start}:{min(start + step, entry.rows)}]" if len(entry.shape) > 1 else ""
            extent = self._store.extent(entry.name + rows)
            staging = self._room(extent.bytes)
            self._store.read_into(entry.name + rows, staging)
            yield memoryview((ctypes.c_char * extent.row_bytes).from_address(staging.data_ptr() + extent.skip)).cast(
                "B"
            )

    def _chunks(self, place: Place) -> Iterator[memoryview | bytes]:
        size = self.job.sizes[place.number]
        buffer = self._room(min(CHUNK, size)) if place.at < 0 else None
        for done in range(0, size, CHUNK):
            part = min(CHUNK, size - done)
            if buffer is None:
                host = self.device.host(place.at + done, (part,), "uint8")
                self.device.get(place.at + done, host)
                yield memoryview((ctypes.c_char * part).from_address(host.data_ptr())).cast("B")
            else:
                address = buffer.data_ptr()
                self.spill.read(address, part, self.job.extents[place.number] + done)
                yield memoryview((ctypes.c_char * part).from_address(address)).cast("B")


class Scores:
    """The losses of an evaluation, counted up batch by batch."""

    def __init__(self) -> None:
        self._best: dict[int, tuple[float, int, bool]] = {}
        """of each question, by its example: (summed loss, number, whether it is right) of the likeliest choice; of equal ones the
        first, in whatever order they come"""
        self._total, self._labelled, self._records = 0.0, 0, 0

    def add(self, loss: float, losses: Tensor | None, found: Iterable[TokenRecord]) -> None:
        """Add a batch: its mean loss, or where there are `losses` of each token, those of the records `found`."""
        if losses is None:
            self._total, self._labelled = self._total + loss, self._labelled + 1
            return
        for record in found:
            own = float(losses.view(-1)[record.begin : record.begin + record.length].sum())
            self._records += 1
            if record.choice < 0 or record.answer:
                self._total, self._labelled = self._total + own, self._labelled + int((record.labels >= 0).sum())
            if record.choice >= 0:
                choice = (own, record.choice, record.answer)
                self._best[record.example] = min(self._best.get(record.example, choice), choice)

    def result(self, seconds: float) -> dict[str, Any]:
        """As `Training.evaluate` returns it."""
        best = self._best
        return {
            "loss": self._total / max(1, self._labelled),
            "accuracy": sum(answer for *_, answer in best.values()) / len(best) if best else None,
            "questions": len(best),
            "records": self._records,
            "seconds": seconds,
        }


def _skipped(trainable: Trainable) -> int:
    """Bytes before a trainable in the tensor of an adapter that it is a slice of; 0: it is a tensor of its own."""
    own = adapter.table_slice(trainable.name)
    return 4 * own.start * trainable.shape[1] if own else 0


def _fill(value: Tensor, reader: safetensors_file.Reader, key: str, skipped: int = 0) -> None:
    """Copy the bytes that a file has under `key`, after the first `skipped` ones, into a tensor."""
    done = 0
    for chunk in reader.chunks(key, begin=skipped, count=value.numel() * value.itemsize):
        ctypes.memmove(value.data_ptr() + done, chunk, len(chunk))
        done += len(chunk)
