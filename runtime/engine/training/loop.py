"""The loop of a run in the training process: evaluates, takes the steps, writes checkpoints, evaluates again.

It sends a message about each of these to the parent process, and appends a line per step to ``metrics.jsonl``, and one
per evaluation where evaluations are made between the steps.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

from tightfit.runtime.common.errors import InputError, MemberGoneError, RunError
from tightfit.runtime.common.files import sync_directory, write_all
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.run_folder import how_to_continue
from tightfit.runtime.engine.device.channels import TransferChannel
from tightfit.runtime.engine.device.resident import memory
from tightfit.runtime.engine.start.kernel_warmup import settle, tidy
from tightfit.runtime.engine.start.process import narrow_file_mappings, release_file_pages
from tightfit.runtime.engine.training import checkpoint
from tightfit.runtime.engine.training.batches import open_batches
from tightfit.runtime.engine.training.job import Job
from tightfit.runtime.engine.training.losses import loss_of_pairs
from tightfit.runtime.engine.training.session_protocol import EVALUATE, FINISH, STEP, Gone, Requests
from tightfit.runtime.engine.training.step_trace import StepTrace
from tightfit.runtime.engine.training.trainer import Training

if TYPE_CHECKING:
    from tightfit.runtime.engine.training.evaluations import Evaluations

Send = Callable[..., None]
INTERRUPTED = 4
OF_PAIRS = ("reward_accuracy", "reward_margin")
"""what an evaluation on pairs of answers has besides"""


def run(job: Job, channel: TransferChannel, send: Send, stopping: Callable[[], bool]) -> int:
    """Carry out a job; returns the exit code: 0, or `INTERRUPTED`.

    `send(event, **content)` sends a message to the parent. `stopping()` is asked between steps and evaluation batches;
    once it is true, the run saves a checkpoint and ends.
    """
    one = _Run(job, channel, send, stopping)
    try:
        one.begin()
        for step in one.steps():
            one.take(step)
        if not one.alone:
            one.evaluate("after")
    except (_Stopped, Gone):
        one.interrupted()
        return INTERRUPTED
    except MemberGoneError as error:
        one.left_alone(error)
    except BaseException as error:
        one.role.leave(f"has ended: {error}")
        raise
    one.finish()
    return 0


class _Run:
    def __init__(self, job: Job, channel: TransferChannel, send: Send, stopping: Callable[[], bool]) -> None:
        header = job.header
        self.header, self.send, self.stopping = header, send, stopping
        self.out: str = header["out"]
        self.training = Training(job, channel, self.out, stopping=stopping, say=lambda text: send("note", text=text))
        batches = self.training.batches
        self.alone = header["steps"] == 0
        """whether the run evaluates once, takes no step and leaves nothing"""
        self.requests = batches if isinstance(batches, Requests) else None
        """the pipe of a Session, which asks for steps one by one; None in a run over prepared data"""
        self.role = self.training.role
        """what the run does in a fleet"""
        data, self.held_out = self.role.data(batches.fingerprint, _fingerprint(header))
        self.conditions = {**header["conditions"], "data": data}
        settings = self.conditions | {
            "number of steps": header["steps"],
            "checkpoint interval": header["checkpoint_every"],
        }
        self.role.agree(settings, self.held_out, self.out, resume=header["resume"])
        self.untold: list[tuple[int, dict[str, Any]]] = []
        """steps whose loss another member of a pipeline knows, with their figures"""
        self.found = checkpoint.load_latest(self.out, self.conditions) if header["resume"] else None
        self.done = self.found.step if self.found else 0
        self.path = self.found.path if self.found else ""
        """path of the latest checkpoint"""
        self.saved = self.done if self.found else -1
        """the step after which the latest checkpoint was made; -1: there is none"""
        self.before = self.found.state.get("evaluated before", {}) if self.found else {}
        """result of the evaluation before step 1, and the fingerprint of its data"""
        self.evaluations = self._evaluations()
        """those between the steps; None: there are none"""
        self.peaks: dict[str, int] = {}
        """VmHWM in bytes at the end of each part of the run"""
        self.begun = 0
        """the step after which this start goes on"""
        self.trace: StepTrace | None = None
        self.narrowed = False
        """whether only those pages of code are mapped that an exchange runs"""

    def begin(self) -> None:
        """Load the checkpoint or the initial state, and evaluate the model as it is before step 1, if that is still
        due.
        """
        training, found, send = self.training, self.found, self.send
        # A resumed run may have held-out data that were not evaluated before step 1. Then it first takes the initial
        # state again, evaluates that, and loads the checkpoint afterwards.
        begun = self.done > 0 and (self.held_out is None or self.before.get("data") == self.held_out)
        self._make_room()
        if training.loss_kind.refers:
            self._refer()
        if found:
            send("resumed", step=self.done, checkpoint=found.path)
        if found and begun:
            training.load_state(found.path, found.state)
            if self.held_out is not None:
                send("evaluated", when="before", data=self.held_out, **self.before["result"])
        else:
            training.initialise()
        known = self.evaluations.step if self.evaluations else None
        self.begun = self.done
        self.metrics = MetricsFile(os.path.join(self.out, "metrics.jsonl"), self.done, known)
        if self.role.joined:
            self.updates = MetricsFile(os.path.join(self.out, "fleet.jsonl"), self.done)
        settle()
        self.peaks["load"] = training.meter.check_peak()
        send(
            "loaded",
            step=self.done,
            peak_bytes=self.peaks["load"],
            resident_bytes=memory().resident,
            spill_bytes=self.header["spill_bytes"],
        )
        if not begun:
            self.evaluate("alone" if self.alone else "before")
            if found:
                training.load_state(found.path, found.state)
        if self.evaluations and found:
            self._catch_up(self.evaluations)
        self.watched = self.role.watched(self.done, self.header["steps"], self.header["accumulate"])
        self.updated = time.perf_counter()
        """when the latest update of a fleet ended"""

    def _refer(self) -> None:
        """Compute what DPO compares with, for all pairs that the run sees and whose references are not there yet: the
        log-probabilities of their answers with the adapter switched off. Raises _Stopped on a signal.
        """
        from tightfit.runtime.engine.training.pairs import PairBatches, pairs_in

        training, header, before = self.training, self.header, time.perf_counter()
        own, asked = training.batches, []
        assert isinstance(own, PairBatches)
        if not self.alone:
            asked.append((own, header["steps"]))
        if self.held_out is not None:
            loss, packing = header["preference"]["loss"], header["packing"]
            held_out = PairBatches(header["evaluation"], header["seed"], loss, packing=packing)
            asked.append((held_out, None))
        rows = training.inputs[0].shape[0] // 2
        for batches, _ in asked:
            batches.open_references(header["conditions"])
        due = [sum(1 for _ in batches.without_references(steps, rows)) for batches, steps in asked]
        done, pairs = 0, 0
        if sum(due):
            training.initialise(switched_off=True)
            settle()
            expected = sum(due) * header["expected_evaluation_seconds"]
            self.send("referring", done=0, total=sum(due), expected=expected)
            for batches, steps in asked:
                for batch in batches.without_references(steps, rows):
                    training.refer(batches, batch)
                    done, pairs = done + 1, pairs + len(pairs_in(batch))
                    self.send("referring", done=done, total=sum(due), expected=expected)
                    if self.stopping():
                        if self.found is None:  # the checkpoint that is made now has the state before step 1
                            settle()
                            training.initialise()
                        raise _Stopped
                assert batches.references is not None
                batches.references.sync()
            self.peaks["evaluate references"] = training.meter.check_peak()
            seconds = time.perf_counter() - before
            self.send("referred", pairs=pairs, expected=expected, seconds=seconds)
            settle()
        for batches, _ in asked:
            if batches is not own:
                batches.close()

    def steps(self) -> Iterator[int]:
        """Numbers of the steps to take, from 1; in a Session as the caller asks for them."""
        if self.requests:
            self.requests.stopping = self.stopping
            yield from self._asked(self.requests)
            if self.saved != self.done:
                self._save()
        else:
            while self.done < self.header["steps"] and not (self.evaluations and self.evaluations.over):
                yield from self.role.share.steps(self.done)

    def _asked(self, requests: Requests) -> Iterator[int]:
        """Yield a step for each STEP request, and answer the other requests. Raises Gone if the pipe closes without
        FINISH.
        """
        while request := requests.next():
            if request.kind == FINISH:
                return
            if request.kind == STEP:
                self.training.set_rate(request.lr)
                yield self.done + 1
            elif request.kind == EVALUATE:
                loss = self.training.loss()
                tidy()
                self.peaks["evaluate"] = self.training.meter.check_peak()
                self.send("loss", loss=loss, peak_bytes=self.peaks["evaluate"])
            elif self.saved == self.done:
                self.send("checkpoint", step=self.done, path=self.path)
            else:
                self._save()
        raise Gone

    def take(self, step: int) -> None:
        """Take a step; in a fleet a micro-batch, after the last of which the members exchange their gradients."""
        told = self._step(step, self.watched.get(step))
        if self.role.knows_losses:
            self._tell(step, told)
        else:
            self.untold.append((step, told))
        self.role.told(told["loss"])
        if step != self.role.share.steps(self.done)[-1]:
            return
        step, stop = self._finish_step(stop=self.stopping())
        every, last = self.header["checkpoint_every"], step == self.header["steps"]
        before, self.done = self.done, step
        best = False
        if self.evaluations and self.evaluations.due(step):
            # Before the checkpoint, which knows the outcome, and which has to be there before what is kept of the best.
            best = self._evaluate_between(self.evaluations) and self.header["keep_best"]
            last = last or self.evaluations.over
        if last or best or (every and step // every > before // every):
            self._save()
        if best:
            self._keep_best()
        if stop and not last:
            raise _Stopped

    def _step(self, step: int, watched: str | None) -> dict[str, Any]:
        """Take one step; returns its figures. With `watched`, also send a timeline under that name."""
        training = self.training
        if watched:
            training.meter.watch(self.header["expected_seconds"])
        traced = step - self.begun in self.header["traced_steps"]
        if traced and self.trace is None:
            self.trace = StepTrace(self.out)
        training.executor.trace = self.trace if traced else None
        before = time.perf_counter()
        loss = training.step(step)
        seconds = time.perf_counter() - before
        tidy()
        training.executor.trace = None
        if watched:
            self.send("timeline", which=watched, samples=training.meter.stop())
        peak = self.peaks["train"] = training.meter.check_peak()
        told = {
            "loss": loss,
            "lr": training.rate_of(step),
            **self._epoch(step),
            "time": time.time(),
            "seconds": seconds,
        }
        told |= {"resident_bytes": memory().resident, "peak_bytes": peak, **training.figures}
        if training.executor.routing is not None:
            told["reads_left_out"] = training.executor.routing.left_out
        if "grad_norm" in told:
            self.peaks["update"] = peak
        return {**told, "spent": dict(training.executor.seconds)}

    def _epoch(self, step: int) -> dict[str, float]:
        """How often the steps up to `step` have gone through the data; nothing where the data have no end (a
        Session).
        """
        steps = self.header.get("epoch_steps")
        return {"epoch": round(step / steps, 4)} if steps else {}

    def _tell(self, step: int, told: dict[str, Any]) -> None:
        """Send the figures of a step and add them to the metrics. Raises InputError if its loss is not finite."""
        self.metrics.add(step=step, **{name: value for name, value in told.items() if name != "spent"})
        self.send("step", step=step, **told)
        for what, value, wanted in (
            ("loss", told["loss"], "a number"),
            ("norm of the gradients", told.get("grad_norm", 0.0), "finite"),
        ):
            if not math.isfinite(value):
                raise InputError(
                    f"the {what} of step {step} is not {wanted}; lower the learning rate (lr {self.training.rate}) or"
                    " check the data"
                )

    def _finish_step(self, *, stop: bool) -> tuple[int, bool]:
        """End a step of all members of a fleet, if there are others; returns the number of micro-batches taken since
        the run began, and whether some member is to end.
        """
        step = self.done + self.role.share.micro_batches
        made = self.role.finish(step, stop=stop)
        if made is None:
            return step, stop
        tidy()
        if not self.narrowed:
            # What a micro-batch takes as workspace comes on top of the code that exchanging leaves: 2 MiB if its
            # neighbours in the files stay as well.
            narrow_file_mappings()
            release_file_pages()
            self.narrowed = True
        for (number, figures), loss in zip(self.untold, made.losses):
            self._tell(number, {**figures, "loss": loss})
        self.untold.clear()
        now = time.perf_counter()
        told = {
            "losses": made.losses,
            "seconds": now - self.updated,
            "exchange_seconds": made.exchange_seconds,
            "update_seconds": made.update_seconds,
        }
        self.updated = now
        self.updates.add(step=step, **told)
        self.peaks["exchange"] = self.training.meter.check_peak()
        self.send("exchanged", step=step, peak_bytes=self.peaks["exchange"], **told)
        return step, made.stop

    def evaluate(self, when: str) -> None:
        """Evaluate on the held-out data, if there are any; `when` is "before" or "after" all steps. Raises _Stopped on
        a signal.
        """
        if self.held_out is None:
            return
        made = self.evaluations
        if made and made.latest and when == "after" and made.step == self.done:
            result = made.latest
        else:
            result = self._evaluate(when)
        if when == "before":
            self.before.update(data=self.held_out, result=result)
            if made:
                self.metrics.add(step=0, **self._evaluated(0, result))
        peak = self.peaks.get(f"evaluate {when}", 0)
        self.send("evaluated", when=when, data=self.held_out, **result, peak_bytes=peak)

    def _evaluations(self) -> Evaluations | None:
        if not self.header.get("eval_every"):
            return None
        from tightfit.runtime.engine.training.evaluations import Evaluations

        return Evaluations.of(self.header, self.held_out, self.found.state if self.found else {})

    def _catch_up(self, evaluations: Evaluations) -> None:
        """In a run that is resumed, make the evaluation that was broken off after the checkpoint's step, if one was,
        and see to it that what is kept of the best is there: the process may have been killed between checkpoint and
        that.
        """
        best = evaluations.due(self.done) and self._evaluate_between(evaluations)
        if not self.header["keep_best"] or evaluations.best is None:
            return
        if best or evaluations.best["step"] == self.done:
            self._keep_best()
        elif not os.path.isdir(self._best):  # nothing was kept so far: the best is the best from here on
            evaluations.best, evaluations.since_best = None, 0

    def _evaluate_between(self, evaluations: Evaluations) -> bool:
        """Evaluate after the step that was taken last; returns whether the result is the best so far."""
        step = self.done
        result = self._evaluate(f"after step {step}")
        best = evaluations.add(step, result)
        told = {**self._evaluated(step, result), "best": best}
        self.metrics.add(step=step, **told)
        self.send("evaluated", when="between", step=step, **told, over=evaluations.over)
        return best

    def _evaluated(self, step: int, result: dict[str, Any]) -> dict[str, Any]:
        """The figures of an evaluation as the metrics have them."""
        told = {
            **self._epoch(step),
            "time": time.time(),
            "eval_loss": result["loss"],
            "eval_seconds": result["seconds"],
        }
        if result["accuracy"] is not None:
            told["eval_accuracy"] = result["accuracy"]
        return told | {f"eval_{name}": result[name] for name in OF_PAIRS if name in result}

    @property
    def _best(self) -> str:
        return os.path.join(self.out, "best")

    def _keep_best(self) -> None:
        """Write what is trained now in the place of what was the best before."""
        self._make_room()
        _save_trained(self.training, self._best)
        self.peaks["checkpoint"] = self.training.meter.check_peak()
        settle()

    def _evaluate(self, when: str) -> dict[str, Any]:
        """Evaluate on the held-out data; `when` says in words which evaluation it is."""

        def evaluating(batch: int, batches: int) -> None:
            self.send("evaluating", when=when, done=batch, total=batches)
            if self.stopping():
                self.role.leave("was asked to end")
                raise _Stopped

        result = self.training.evaluate(self.header["evaluation"], evaluating)
        self.peaks[f"evaluate {when}" if when in ("before", "after") else "evaluate"] = self.training.meter.check_peak()
        settle()
        return result

    def _make_room(self) -> None:
        """Before initial values are loaded or a checkpoint is saved: weights, values and states that stay may fill the
        arena, and what building kernels, reading weights or a step left beside it would come on top (7 MiB with
        convolutions in bfloat16, 11 where 927 weights of a small mixture had been read).
        """
        settle()

    def _save(self) -> None:
        def fill(path: str) -> dict[str, Any]:
            made = {"evaluations": self.evaluations.state()} if self.evaluations else {}
            return {"evaluated before": self.before, **made, **self.training.save_state(path)}

        self._make_room()
        self.path = checkpoint.save(self.out, self.done, self.conditions, fill, self.header["keep_checkpoints"])
        self.saved = self.done
        self.peaks["checkpoint"] = self.training.meter.check_peak()
        settle()  # gives back the pages of library code that only saving runs
        self.send("checkpoint", step=self.done, path=self.path, peak_bytes=self.peaks["checkpoint"])

    def interrupted(self) -> None:
        # A Session that has taken no step has nothing to save; the user begins it again.
        if self.saved != self.done and not self.alone and not (self.requests and self.done == 0):
            self._save()
        self.send("interrupted", step=self.done, checkpoint=self.path)
        self.training.close()

    def left_alone(self, error: MemberGoneError) -> NoReturn:
        """Save, since another member of the fleet has ended; raises RunError, which says which one."""
        self.role.leave(f"has ended: {error}")
        if self.done and self.saved != self.done:
            self._save()
        saved = f"everything up to step {self.done} is saved in {self.path}" if self.path else "nothing is trained yet"
        again = f"start the fleet again with {spelled('resume', True)}" if self.path else "start the fleet again"
        raise RunError(f"{error}; {saved}, {again}") from error

    def finish(self) -> None:
        name = "side" if self.header.get("side") else "adapter" if self.header["lora"] else "model"
        if len(self.training.trainables) and not self.alone:  # a device whose side network a server trains has none
            self.send("saved", path=_save_trained(self.training, os.path.join(self.out, name)))
        self.training.close()
        made = {"best": self.evaluations.best, "over": self.evaluations.over} if self.evaluations else {}
        self.send("done", peak_bytes=self.training.meter.check_peak(), peaks=self.peaks, **made)


def _fingerprint(header: dict[str, Any]) -> str | None:
    """Fingerprint of the held-out data; None if there are none."""
    if not header["evaluation"]:
        return None
    batches = open_batches(header["evaluation"], header["seed"], loss=loss_of_pairs(header))
    batches.close()
    return batches.fingerprint


class _Stopped(Exception):  # noqa: N818  not an error
    """A signal asked to save and end."""


def _save_trained(training: Training, path: str) -> str:
    """Write the adapter or model under another name, then rename it to `path`, so that it is never there in part.

    Returns `path`. Raises RunError if the disk refuses.
    """
    partial = f"{path}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        os.makedirs(partial)
        training.channel.drain()
        training.save_trained(partial, whole=True)
        sync_directory(partial)
        if os.path.islink(path):
            os.unlink(path)
        shutil.rmtree(path, ignore_errors=True)
        os.rename(partial, path)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(
            f"saving {path} failed: {error.strerror}; the last checkpoint holds the same tensors; free disk space and"
            f" continue with {spelled('resume', True)}"
        ) from error
    return path


class MetricsFile:
    """``metrics.jsonl``: one line per step or evaluation. A resumed run keeps the lines up to the step it resumes at
    and drops later ones; also evaluations after step `evaluated`, which it makes again.
    """

    def __init__(self, path: str, done: int, evaluated: int | None = None) -> None:
        self._path = path
        temporary = f"{path}.{os.getpid()}"
        try:
            kept = _lines_until(path, done, done if evaluated is None else evaluated)
            with open(temporary, "wb") as file:
                file.write(kept)
            os.replace(temporary, path)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        except OSError as error:
            with suppress(OSError):
                os.unlink(temporary)
            raise self._failed(error) from error

    def add(self, **line: Any) -> None:
        try:
            write_all(self._descriptor, json.dumps(line).encode() + b"\n")
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> RunError:
        way = how_to_continue(os.path.dirname(self._path))
        return RunError(f"writing {self._path} failed: {error.strerror}; free disk space and {way}")


def _lines_until(path: str, step: int, evaluated: int) -> bytes:
    kept = []
    try:
        with open(path, "rb") as file:
            for line in file:
                try:
                    told = json.loads(line)
                    if line.endswith(b"\n") and told["step"] <= (evaluated if "eval_loss" in told else step):
                        kept.append(line)
                except (ValueError, KeyError, TypeError):
                    continue  # a line cut short by a kill
    except FileNotFoundError:
        pass
    return b"".join(kept)
