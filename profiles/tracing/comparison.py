"""Compares a module's traced programs with the module as PyTorch trains it, in several steps on different batches.

PyTorch takes the steps in this process. The programs take each from the same parameters in the measuring process,
through the operators that a run calls (`tightfit.profiles.measuring.whole_step`). Tensors are exchanged in files.
"""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tightfit.profiles.schema import NOT_COMPARED, Layer, Operator, Program
from tightfit.profiles.tracing.eager_steps import (
    NOISE,
    STEPS,
    Batch,
    EagerResult,
    EagerSteps,
    beyond_rounding,
    describe_distances,
    distances,
    eager_step,
    load,
    perturbed_step,
)
from tightfit.profiles.tracing.evaluation import in_eval_mode
from tightfit.profiles.tracing.own_state import MOST_OBJECTS, shown
from tightfit.profiles.tracing.tensor_files import EVALUATION, read_tensors, write_tensors
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.progress import Progress
from tightfit.runtime.common.units import format_size
from tightfit.runtime.engine.training.job import DROPOUT, KEEP_STATE, kept_buffers
from tightfit.runtime.supervision.spare_memory import free_memory

if TYPE_CHECKING:
    from tightfit.profiles.tracing.traced import Trace

TOLERANCE = 1e-3
"""Largest norm of the difference from autograd's gradient of a parameter, relative to the norm of the latter. float32
sums in another order differ this much."""
LOSS_TOLERANCE = 1e-4
ROOM = 2.0
"""How many times the bytes of the step have to be free for it to be compared."""


class GradientComparison:
    """One comparison of a traced module with PyTorch, in two calls.

    `request` takes the steps in PyTorch, before the measuring process starts, so that the two do not compete for cores;
    `conclude` compares, once that process has taken them. Both exchange tensors through files in `folder`: given, eager
    and traced, each with the number of the step. `others` are batches that the factory gave beside
    the sample, `ignored` the names of what its forward may change in Python.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        sample: Batch,
        traced: Trace,
        others: Sequence[Batch] = (),
        ignored: Sequence[str] = (),
    ) -> None:
        self.name, self.module, self.traced = name, module, traced
        self.steps = EagerSteps(name, module, sample, others, ignored=ignored)
        targets = {op.target for program in traced.programs for op in program.operators if not op.recomputable}
        self.random = sorted(targets - {KEEP_STATE})
        self.trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        self.kept = kept_buffers(traced.layers, traced.programs)
        self.other_evaluation = traced.other_evaluation
        """why an evaluation is not what the module computes in eval mode, as far as is known yet"""
        self.twice: set[str] = set()
        """names of the buffers that PyTorch's backward changes a second time"""
        self.evaluations: list[float] = []
        """the losses of the steps' batches in eval mode, before each step"""

    @property
    def step_bytes(self) -> int:
        return step_bytes(self.traced.layers, self.traced.programs, self.module)

    def why_not(self, folder: Path, memory: int | None = None) -> str | None:
        """Why there is no comparison, in words, if memory (`memory` bytes, or None: all that is free) or the disk of
        `folder` is too short for it; else None.
        """
        needed_bytes, free = ROOM * self.step_bytes, free_memory()[0]
        free = free if memory is None else min(free, memory)
        file_bytes = 3 * STEPS * module_bytes(self.module)
        if needed_bytes > free:
            return (
                f"{NOT_COMPARED}: it takes {format_size(int(needed_bytes))} beside what is held, and"
                f" {format_size(free)} are free"
            )
        if file_bytes > (free := shutil.disk_usage(folder).free):
            return (
                f"{NOT_COMPARED}: it takes {format_size(file_bytes)} of the disk of {folder}, and {format_size(free)}"
                " are free"
            )
        return None

    def request(self, folder: Path, progress: Progress | None = None) -> dict[str, Any]:
        """Take the steps in PyTorch and return the request to the measuring process.

        Raises InputError if the module fails, or cannot be followed by a traced step.
        """
        report = progress or (lambda stage, done, total: None)
        report("compare", 0, STEPS)
        types = {tensor.name: getattr(torch, tensor.dtype) for tensor in self.traced.tensors}

        def write_step(number: int, batch: Batch, given: Mapping[str, Tensor], eager: EagerResult) -> None:
            if changed := [name for name in eager.statistics if name not in self.kept]:
                raise InputError(
                    f"{self.name}: its forward changes the buffer {changed[0]} unseen by the trace (.data, detach()),"
                    " which a traced step leaves out; leave it out"
                )
            self.twice.update(eager.twice)
            names = (*self.trained, *self.kept) if number else given  # what no step changes is written once
            inputs = {name: given[name].to(types.get(name, given[name].dtype)) for name in names}
            samples = {f"batch{index}": tensor for index, tensor in enumerate(batch)}
            write_tensors(folder / f"given{number}", inputs | samples)
            statistics = {name: eager.statistics.get(name, given[name]) for name in self.kept}
            torch.save([eager.loss, eager.gradients, statistics], folder / f"eager{number}")
            if not number:
                self.evaluations.clear()  # the steps may begin again
            self._evaluate(number, batch, given)
            report("compare", number + 1, STEPS)

        self.count = self.steps.take(write_step)
        if unchanged := [name for name in self.steps.look.ignored if name not in self.steps.look.let_through]:
            raise InputError(
                f"{self.name}: {spelled('ignore_state')} has {unchanged[0]}, which its forward does not change;"
                " leave it out"
            )
        return {
            "folder": str(folder),
            "steps": self.count,
            "layers": [layer.model_dump() for layer in self.traced.layers],
            "loss": self.traced.loss,
            "wanted": [self.traced.loss, *self.kept, *(f"grad:{name}" for name in self.trained)],
        }

    def _evaluate(self, number: int, batch: Batch, given: Mapping[str, Tensor]) -> None:
        """Keep what the module returns in eval mode with the parameters and buffers `given`, with which it leaves it
        as it is.
        """
        if self.other_evaluation:
            return
        after = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        load(self.module, given)
        try:
            with in_eval_mode(self.module):
                eager = eager_step(self.module, batch, seed=number, gradients=False, dropout=True)
            self.evaluations.append(eager.loss)
        except InputError as error:
            self.other_evaluation = f"in eval mode it fails: {str(error).splitlines()[-1]}"
        load(self.module, after)

    def conclude(self, folder: Path) -> str:
        """Compare the results of the steps; returns in words how close they are.

        Raises InputError if they differ beyond the tolerances.
        """
        largest = 0.0
        for number in range(self.count):
            traced = read_tensors(folder / f"traced{number}")
            self._compare_evaluation(number, float(traced.pop(EVALUATION)))
            loss, statistics = float(traced.pop(self.traced.loss)), {name: traced.pop(name) for name in self.kept}
            gradients = {name.removeprefix("grad:"): gradient for name, gradient in traced.items()}
            ours = EagerResult(loss=loss, gradients=gradients, statistics=statistics)
            loss, gradients, statistics = torch.load(folder / f"eager{number}", weights_only=True)
            theirs = EagerResult(loss=loss, gradients=gradients, statistics=statistics)
            if not theirs.finite:
                return f"{NOT_COMPARED}: its loss on the sample batch is {theirs.loss:g}, or a gradient no number"
            relative = self._unexplained(ours, theirs, folder, number)
            if self.random and relative["loss"] > LOSS_TOLERANCE:
                return f"{NOT_COMPARED}: random operators ({', '.join(self.random)}) draw otherwise than in PyTorch"
            if beyond := self._beyond(relative):
                description = describe_distances({name: relative[name] for name in beyond}, ours, theirs)
                step_note = (
                    ""
                    if not number
                    else f", in step {number + 1} and not before: something changes that it does not know of"
                )
                raise InputError(
                    f"{self.name}: the traced step does not compute what PyTorch does on {self.steps.batches}:"
                    f" {description} ({len(beyond)} of {len(relative)} results differ{step_note}); it would not train"
                    " this module as it is written"
                )
            largest = max(largest, *relative.values())
        steps = f"{self.count} steps of AdamW on {self.steps.batches}"
        notes = [
            (
                f"loss and gradients are PyTorch's in {steps},"
                f" {f'to {largest:.0e} of their size' if largest else 'exactly'}"
            )
        ]
        if self.twice:
            norms = sorted({name.rpartition(".")[0] for name in self.twice})
            others = f" and {len(norms) - 1} more" if len(norms) > 1 else ""
            notes.append(
                f"under torch.utils.checkpoint PyTorch changes the running statistics of {norms[0]}{others} twice in a"
                " step; here they change once"
            )
        if not self.steps.copied:
            notes.append("the module cannot be copied, so that no step was taken by one without a history")
        if self.steps.filled:
            notes.append(f"its forward fills {shown(self.steps.filled)} in the first call, the same for every batch")
        look = self.steps.look
        if look.let_through:
            notes.append(f"let through: its forward changes {', '.join(sorted(look.let_through))}")
        if look.ended:
            notes.append(f"of what its forward may change {MOST_OBJECTS:,} objects were looked at, and not all")
        return "; ".join(notes)

    def _compare_evaluation(self, number: int, traced: float) -> None:
        if self.other_evaluation:
            return
        eager = self.evaluations[number]
        far = abs(traced - eager) / max(abs(eager), NOISE)
        if far > TOLERANCE and math.isfinite(eager):
            drawn = sorted({op.target for program in self.traced.programs for op in _drawn(program)})
            self.other_evaluation = (
                f"the loss of {'the sample' if not number else f'batch {number + 1}'} is {eager:g} in eval mode in"
                f" PyTorch, and {traced:g} here"
                + (f"; it draws at random in eval mode, too ({', '.join(drawn)})" if drawn else "")
            )

    def _unexplained(self, own: EagerResult, theirs: EagerResult, folder: Path, number: int) -> dict[str, float]:
        """`distances`, less what rounding explains where they are beyond the tolerances."""
        relative = distances(own, theirs)
        if not self._beyond(relative) or self.random:
            return relative
        inputs = [read_tensors(folder / f"given{step}") for step in dict.fromkeys((0, number))]
        batch = tuple(inputs[-1][f"batch{index}"] for index in range(len(self.steps.sample)))
        for tensors in inputs:
            load(self.module, tensors)
        for variant in (perturbed_step, _in_double_precision):  # the second takes twice the memory of training
            varied = variant(self.module, batch, seed=number) if self._beyond(relative) else None
            if varied is not None:
                relative = beyond_rounding(relative, distances(theirs, varied))
        load(self.module, inputs[0])
        return relative

    @staticmethod
    def _beyond(relative: dict[str, float]) -> list[str]:
        return [name for name, far in relative.items() if not far <= (LOSS_TOLERANCE if name == "loss" else TOLERANCE)]


def _drawn(program: Program) -> list[Operator]:
    """What the program draws in an evaluation."""
    operators = (program.operators[position] for position in program.inference)
    return [op for op in operators if op.target.startswith(DROPOUT) or not (op.recomputable or op.target == KEEP_STATE)]


def _in_double_precision(module: nn.Module, batch: Sequence[Tensor], *, seed: int) -> EagerResult | None:
    """`eager_step` in float64; None if the module cannot be run in it."""
    try:
        wide = copy.deepcopy(module).double()
        return eager_step(wide, [t.double() if t.is_floating_point() else t for t in batch], seed=seed)
    except Exception:
        return None


def step_bytes(layers: Iterable[Layer], programs: Iterable[Program], module: nn.Module) -> int:
    """Bytes of a step that keeps all it makes: three times parameters and buffers, plus activations and gradients."""
    bytes_by_program = {
        program.name: sum(value.bytes for value in program.values if value.kind in ("activation", "gradient"))
        for program in programs
    }
    return 3 * module_bytes(module) + sum(bytes_by_program[layer.program] for layer in layers)


def module_bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
