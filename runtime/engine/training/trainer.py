"""One job in the training process, composed of its parts when it is opened: takes its steps, evaluates, saves and loads
their state.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from tightfit.runtime.engine.device.channels import TransferChannel
from tightfit.runtime.engine.device.device import Device, put_now
from tightfit.runtime.engine.fleet.role import FleetRole
from tightfit.runtime.engine.kernels.optimizer import AdamW, Exact, MeZO, optimizer_of
from tightfit.runtime.engine.training.batches import Batches, TrainingBatches, open_batches
from tightfit.runtime.engine.training.devices import open_device
from tightfit.runtime.engine.training.executor import Executor
from tightfit.runtime.engine.training.job import Job, operators_run
from tightfit.runtime.engine.training.losses import loss_of, loss_of_pairs
from tightfit.runtime.engine.training.operator_warmup import warm_up_operators
from tightfit.runtime.engine.training.sample_order import Rows
from tightfit.runtime.engine.training.session_protocol import Requests
from tightfit.runtime.engine.training.storage import Storage
from tightfit.runtime.engine.training.trained_state import TrainedState
from tightfit.runtime.engine.training.updates import updates_of

if TYPE_CHECKING:
    from tightfit.runtime.engine.training.pairs import PairBatches


class Training:
    """A loaded job: `step` takes a training step, `evaluate` and `loss` run the evaluation schedule.

    It is composed of `storage` and `state` (the job's tensors between steps), `role` (in a fleet), `updates` (what
    becomes of gradients), `executor`, `batches` and `loss_kind` (what losses mean).
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
        self.channel = channel
        self.meter = self.device.meter
        self.storage = Storage(job, self.device, directory)
        self.trainables = self.storage.trainables
        optimizer = optimizer_of(header["optimizer"])
        self.role = self._role(optimizer, directory, stopping, say)
        self.updates = updates_of(header, optimizer, self.role.exchange)
        self.executor = Executor(job, self.storage, channel, self.updates)
        ran = sorted(operators_run(job))
        warm_up_operators((self.executor.programs[program][operator] for program, operator in ran), self.device)
        self.executor.join(self.role)
        self.state = TrainedState(header, self.storage, self.updates, self.role)
        self.loss_kind = loss_of(header, self.device.kernels.fused)
        self.storage.load_frozen()
        self._input_places = [at for _, _, _, at in header["inputs"]]
        self.inputs = [self.device.host(at, shape, dtype) for _, dtype, shape, at in header["inputs"]]
        """the tensors of the batch in host memory, in the plan's order"""
        requests = header["requests"]
        self.batches: TrainingBatches = self._opened(header["data"]) if requests is None else Requests(requests)
        self.figures: dict[str, Any] = {}
        """of the latest step, where they are known: `tokens` of its batch without padding, `samples` in it, what its
        kind of loss tells beside the loss, and of the update that it made with clipped gradients their norm before,
        `grad_norm`, and `update_seconds`
        """

    def _role(
        self,
        optimizer: Exact | MeZO,
        directory: str,
        stopping: Callable[[], bool],
        say: Callable[[str], None],
    ) -> FleetRole:
        """Meet the other members of the fleet, if the job is a member's."""
        if not self.header.get("fleet"):
            return FleetRole()
        from tightfit.runtime.engine.fleet.exchange import Trained
        from tightfit.runtime.engine.fleet.seat import seat_of

        assert isinstance(optimizer, AdamW)
        trained = Trained(
            optimizer=optimizer,
            shapes=[one.shape for one in self.trainables],
            value=self.storage.value,
            keep=lambda tensor, values: self.storage.keep(self.trainables[tensor].value, values),
            directory=directory,
            channel=self.channel,
        )
        return seat_of(self.header["fleet"]).take(trained, stopping, say)

    def _opened(self, path: str | None) -> Batches:
        """A data file, for training or evaluating: the samples of both share rows, or those of neither do. None: what
        another member of the fleet sends.
        """
        if path is None:
            assert self.role.received
            return self.role.received
        packing = self.header.get("packing", False)
        return open_batches(path, self.header["seed"], packing=packing, loss=loss_of_pairs(self.header))

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

    def step(self, number: int) -> float:
        """Take training step `number`, counted from 1, and what else is due in this member's fleet; returns its loss,
        with MeZO the mean of its two.
        """
        loss = 0.0
        for due, trained in self.role.passes(number):
            if trained:
                loss = self._train(due)
            else:
                self.batches.training(due - 1, self.inputs)
                self._forward(due)
        return loss

    def _train(self, number: int) -> float:
        tokens, samples = self.batches.training(number - 1, self.inputs), self.batches.samples
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
        counted = {"tokens": tokens, "samples": samples}
        self.figures = {name: count for name, count in counted.items() if count is not None}
        self.figures |= self.loss_kind.of_step(self.executor.losses, self.inputs, samples)
        norm = self.updates.norm()
        if norm is not None:
            self.figures |= {"grad_norm": norm, "update_seconds": self._update_all(number)}
        return loss

    def _update_all(self, number: int) -> float:
        """Update all trainables after step `number`, the last of an update with clipped gradients; returns the seconds
        that it took.
        """
        before, began = dict(self.executor.seconds), time.perf_counter()
        begin, end = self.header["update"]
        self.executor.execute(self.job.train, begin, end, number - 1)
        for kind, seconds in before.items():
            self.executor.seconds[kind] += seconds
        return time.perf_counter() - began

    def _forward(self, step: int | None = None) -> None:
        """Run the forward alone on the batch in `inputs`, with the random numbers that training step `step` draws;
        None: it draws none.
        """
        self._deliver()
        self.executor.draws.step = step
        self.executor.execute(self.job.evaluate)

    def _deliver(self) -> None:
        """Copy the batch from `inputs` to the device."""
        for at, host in zip(self._input_places, self.inputs):
            put_now(self.device, at, host)

    def loss(self) -> float:
        """The loss of the next training batch, without a step or dropout; for a decoder the mean over labelled
        tokens.
        """
        self.batches.training(0, self.inputs)
        self._forward()
        return self.executor.loss

    def evaluate(self, path: str | None, progress: Callable[[int, int], None]) -> dict[str, Any]:
        """Evaluate on the data file `path`: the mean loss and, if the records are choices of questions, the accuracy.

        The loss is a decoder's mean over labelled tokens, a module's mean over batches. Wrong choices do not count in
        it, so that it is comparable with the training loss. A question counts as right if its right choice has the
        highest summed log-likelihood, the first of them where several have. `progress(done, batches)` is called after
        every batch. Returns `loss`, `accuracy` (None without questions), `questions`, `records` and `seconds`. On pairs
        of answers the loss is that of all pairs as if they were one batch, and there are `pairs`, `reward_accuracy`,
        the share of them in which the chosen answer has the higher reward, and `reward_margin`, the mean difference of
        the rewards, as TRL counts them. A server that trains a side network has no file: a device sends it the batches,
        and counts the losses that it sends back.
        """
        scores = self.loss_kind.scores()
        before = time.perf_counter()
        opened = self._opened(path)
        if self.loss_kind.refers:
            opened.open_references(self.header["conditions"])  # type: ignore[attr-defined]
        batches = self.role.count(opened.evaluation_count(self.inputs))
        for number in range(batches):
            self.role.begin_evaluation()
            records = opened.evaluation(number, self.inputs)
            self._forward()
            progress(number + 1, batches)
            losses = self.role.losses(self.executor.losses, self.inputs)
            scores.add(self.executor.loss, losses, self.inputs, records)
        opened.close()
        return self.role.agreed(scores.result(time.perf_counter() - before))

    def refer(self, batches: PairBatches, rows: Rows) -> None:
        """Write the references of the pairs in the rows of a batch: the log-probabilities of their answers with what is
        trained now, which is to be what `initialise` makes without a given adapter.
        """
        from tightfit.runtime.engine.training.pair_scores import SCORES, answers_of
        from tightfit.runtime.engine.training.pairs import pairs_in

        assert batches.references is not None
        references, batches.references = batches.references, None
        batches.fill(rows, self.inputs)
        batches.references = references
        self._forward()
        assert self.executor.losses is not None
        found = answers_of(self.device.kernels.fused[SCORES], self.executor.losses, self.inputs[1], self.inputs[-1])
        for place, pair in enumerate(pairs_in(rows)):
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
        self.role.close()
        self.storage.close()
