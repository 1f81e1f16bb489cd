"""One job in the training process, composed of its parts when it is opened: takes its steps, evaluates, saves and loads their state."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tightfit.runtime.engine.device.channels import TransferChannel
from tightfit.runtime.engine.device.device import Device, put_now
from tightfit.runtime.engine.device.spill import SpillFile
from tightfit.runtime.engine.kernels.optimizer import AdamW, Exact, MeZO, optimizer_of
from tightfit.runtime.engine.training.batches import Batches, ReceivedBatches, TrainingBatches, open_batches
from tightfit.runtime.engine.training.devices import open_device
from tightfit.runtime.engine.training.executor import Executor
from tightfit.runtime.engine.training.job import Job, operators_run
from tightfit.runtime.engine.training.losses import loss_of, loss_of_pairs
from tightfit.runtime.engine.training.operator_warmup import warm_up_operators
from tightfit.runtime.engine.training.session_protocol import Requests
from tightfit.runtime.engine.training.storage import Storage
from tightfit.runtime.engine.training.trained_state import TrainedState
from tightfit.runtime.engine.training.updates import updates_of
from tightfit.runtime.engine.weights.store import WeightStore

if TYPE_CHECKING:
    from tightfit.runtime.engine.fleet.exchange import Exchange
    from tightfit.runtime.engine.fleet.seat import Seat
    from tightfit.runtime.engine.fleet.stage import Stage
    from tightfit.runtime.engine.training.pairs import PairBatches


class Training:
    """A loaded job: `step` takes a training step, `evaluate` and `loss` run the evaluation schedule.

    It is composed of `storage` and `state` (the job's tensors between steps), `updates` (what becomes of gradients), `executor`,
    `batches` and `loss_kind` (what losses mean).
    """

    def __init__(
        self,
        job: Job,
        channel: TransferChannel,
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
        self.store = WeightStore.open(header["store"]) if header["store"] else None
        self.spill = SpillFile(directory, header["spill_bytes"])
        self.channel = channel
        self.meter = self.device.meter
        self.storage = Storage(job, self.device, self.store, self.spill)
        self.trainables = self.storage.trainables
        optimizer = optimizer_of(header["optimizer"])
        seat = self._seat()
        self.exchange = (
            None if seat is None or seat.in_turn else self._joined(seat, optimizer, directory, stopping, say)
        )
        """with the other members of a fleet, which makes the updates"""
        self.updates = updates_of(header, optimizer, self.exchange)
        self.executor = Executor(
            job,
            self.device,
            self.store,
            self.spill,
            self.channel,
            self.updates,
            self.storage.weights,
            self.trainables,
        )
        ran = sorted(operators_run(job))
        warm_up_operators(
            (programs[program][operator] for programs in self.executor.programs.values() for program, operator in ran),
            self.device,
        )
        self.stage = self._in_pipeline(seat, stopping, say) if seat is not None and seat.in_turn else None
        """this member's place in a pipeline, whose members each compute some of the layers"""
        self.state = TrainedState(header, self.storage, self.updates, self.exchange, self.stage)
        self.loss_kind = loss_of(header, self.device.kernels.fused)
        self.storage.load_frozen()
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
        self.of_loss: dict[str, float] = {}
        """of the latest step, what its kind of loss tells beside the loss: rewards of pairs of answers"""
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
        return open_batches(
            path, self.header["seed"], packing=packing, by_length=by_length, loss=loss_of_pairs(self.header)
        )

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
            parameter=self.storage.value,
            keep=lambda tensor, values: self.storage.keep(self.trainables[tensor].value, values),
            stopping=stopping,
            say=say,
        )

    def set_rate(self, lr: float | None) -> None:
        """Set the base learning rate from the next step on; None sets that of the run again."""
        lr = self.header["optimizer"]["lr"] if lr is None else lr
        self.updates.optimizer = replace(self.updates.optimizer, lr=lr)

    @property
    def rate(self) -> float:
        """The base learning rate."""
        return self.updates.optimizer.lr

    def rate_of(self, step: int) -> float:
        """The learning rate of the update to which step `step` belongs, counted from 1."""
        steps = self.updates.steps
        return self.updates.optimizer.rate(-(-step // steps) * steps, steps)

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
        self.updates.begin(number, partial(self.loss_kind.weight, self.inputs))
        cycles, position = divmod(number - 1, len(self.header["cycle"]))
        begin, end = self.header["cycle"][position]
        self.executor.execute(self.job.train, begin, end, cycles)
        loss = self.executor.loss
        self.of_loss = self.loss_kind.of_step(self.executor.losses, self.inputs, self.samples)
        self.grad_norm = self.updates.norm()
        if self.grad_norm is not None:
            self._update_all(number)
        return loss

    def _update_all(self, number: int) -> None:
        """Update all trainables after step `number`, the last of an update with clipped gradients."""
        before, began = dict(self.executor.seconds), time.perf_counter()
        begin, end = self.header["update"]
        self.executor.execute(self.job.train, begin, end, number - 1)
        for kind, seconds in before.items():
            self.executor.seconds[kind] += seconds
        self.update_seconds = time.perf_counter() - began

    def _deliver(self) -> None:
        """Copy the batch from `inputs` to the device."""
        for at, host in zip(self._input_places, self.inputs):
            put_now(self.device, at, host)

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
        scores = self.loss_kind.scores()
        before = time.perf_counter()
        self.executor.draws.step = None
        with_records = None if path is None else self._opened(path)
        if with_records is not None and self.loss_kind.refers:
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
            scores.add(self.executor.loss, losses, self.inputs, found)
        if with_records is not None:
            with_records.close()
        result = scores.result(time.perf_counter() - before)
        return self.stage.agreed(result) if self.stage else result

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
        """Make the state before step 1, as of `TrainedState.initialise`."""
        self.state.initialise(switched_off=switched_off)

    def save_state(self, directory: str) -> dict[str, Any]:
        """Write the files of a checkpoint into `directory`; returns the entries for its ``state.json``."""
        self.channel.drain()
        return self.state.save(directory)

    def load_state(self, directory: str, state: dict[str, Any]) -> None:
        """Load a checkpoint, as of `TrainedState.load`."""
        self.state.load(directory, state)

    def save_trained(self, directory: str, *, whole: bool = False) -> dict[str, int]:
        """Write what is trained, as of `TrainedState.save_trained`; transfers must have ended."""
        return self.state.save_trained(directory, whole=whole)

    def close(self) -> None:
        self.channel.close()
        if self.fleet:
            self.fleet.close()
        self.spill.close()
        if self.store:
            self.store.close()
