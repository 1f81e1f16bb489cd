"""Compares the loss and gradients of a module's traced programs with those of autograd, on the sample batch.

Autograd runs in this process. The programs run in the measuring process, through the operators that a run calls
(`tightfit.profiles.measuring.whole_step`). Tensors are exchanged in files.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tightfit.profiles.schema import NOT_COMPARED, Layer, Program
from tightfit.profiles.tracing.own_code import own_traceback
from tightfit.profiles.tracing.own_dropout import dropout_off
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.units import format_size
from tightfit.runtime.engine.training.job import KEEP_STATE

if TYPE_CHECKING:
    from tightfit.profiles.tracing.trace import Trace

TOLERANCE = 1e-3
"""Largest norm of the difference from autograd's gradient of a parameter, relative to the norm of the latter. float32
sums in another order differ this much."""
NOISE = 1e-6
"""Part of a difference that is ignored, relative to the norm of all gradients together: a gradient that should be zero
is of this size if it comes from sums that cancel."""
LOSS_TOLERANCE = 1e-4
UNSTEADY = 10.0
"""If the tolerances are exceeded, a difference of up to this many times autograd's own error is accepted: what its results differ
by where parameters differ in their last bits, or from those in double precision."""
ROOM = 2.0
"""How many times the bytes of the step have to be free for it to be compared."""
GIVEN, MADE = "given.pt", "made.pt"
Step = tuple[float, dict[str, Tensor]]
"""(loss, gradients by name of the parameter)."""


class GradientComparison:
    """One comparison of a traced module with autograd, in two calls.

    `request` runs autograd, before the measuring process starts, so that the two do not compete for cores; `conclude`
    compares, once that process has run the step. Both exchange tensors through files in `folder`.
    """

    def __init__(self, name: str, module: nn.Module, batch: tuple[Tensor, ...], traced: Trace) -> None:
        self.name, self.module, self.batch, self.traced = name, module, batch, traced
        targets = {op.target for p in traced.programs for op in p.operators if not op.recomputable}
        self.random = sorted(targets - {KEEP_STATE})

    def why_not(self) -> str | None:
        """Why there is no comparison, in words, if memory is too short for it; else None."""
        needed, free = step_bytes(self.traced.layers, self.traced.programs, self.module), free_bytes()
        if ROOM * needed <= free:
            return None
        return f"{NOT_COMPARED}: a step without a plan takes {format_size(needed)}, and {format_size(free)} are free"

    def request(self, folder: Path) -> dict[str, Any]:
        """Run the step under autograd and return the request to the measuring process.

        Raises InputError if the module fails.
        """
        self.theirs = autograd_step(self.module, self.batch)
        held = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        types = {tensor.name: getattr(torch, tensor.dtype) for tensor in self.traced.tensors}
        tensors = {name: tensor.detach().to(types.get(name, tensor.dtype)) for name, tensor in held.items()}
        torch.save(tensors | {f"batch{index}": tensor for index, tensor in enumerate(self.batch)}, folder / GIVEN)
        names = [name for name, parameter in self.module.named_parameters() if parameter.requires_grad]
        return {
            "given": str(folder / GIVEN),
            "made": str(folder / MADE),
            "layers": [layer.model_dump() for layer in self.traced.layers],
            "wanted": [self.traced.loss, *(f"grad:{name}" for name in names)],
        }

    def conclude(self, folder: Path) -> str:
        """Compare the two results; returns in words how close they are.

        Raises InputError if they differ beyond the tolerances.
        """
        made = torch.load(folder / MADE, weights_only=True)
        loss = float(made.pop(self.traced.loss))
        own = loss, {name.removeprefix("grad:"): gradient for name, gradient in made.items()}
        theirs = self.theirs
        if not math.isfinite(theirs[0]) or not all(bool(g.isfinite().all()) for g in theirs[1].values()):
            return f"{NOT_COMPARED}: its loss on the sample batch is {theirs[0]:g}, or a gradient no number"
        apart = distances(own, theirs)
        for otherwise in (_shaken, _in_double_precision):  # the second takes twice the memory of training
            if not self._beyond(apart) or self.random:
                break
            other = otherwise(self.module, self.batch)
            if other is not None:
                unsteady = distances(theirs, other)
                apart = {name: max(0.0, apart[name] - UNSTEADY * unsteady.get(name, 0.0)) for name in apart}
        if self.random and apart["loss"] > LOSS_TOLERANCE:
            return f"{NOT_COMPARED}: random operators ({', '.join(self.random)}) draw otherwise than in PyTorch"
        if beyond := self._beyond(apart):
            worst = max(beyond, key=apart.__getitem__)
            what = (
                f"the loss is {own[0]:g} for {theirs[0]:g}"
                if worst == "loss"
                else f"the gradient of {worst} differs by {apart[worst]:.2g} times its size"
            )
            raise InputError(
                f"{self.name}: the traced step does not compute what autograd does on the sample batch: {what}"
                f" ({len(beyond)} of {len(apart)} results differ); it would not train this module as it is written"
            )
        far = max(apart.values())
        return f"loss and gradients are autograd's on the sample batch, {f'to {far:.0e} of their size' if far else 'exactly'}"

    @staticmethod
    def _beyond(apart: dict[str, float]) -> list[str]:
        return [name for name, far in apart.items() if not far <= (LOSS_TOLERANCE if name == "loss" else TOLERANCE)]


def autograd_step(module: nn.Module, batch: Iterable[Tensor]) -> Step:
    """Loss and gradients of one step of the module under autograd, without dropout and with torch's generator seeded with 0.

    Raises InputError, with the user's own traceback, if the module fails.
    """
    module.zero_grad(set_to_none=True)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.enable_grad(), dropout_off():
            warnings.simplefilter("ignore")  # warnings of the user's own code are shown when they train
            torch.manual_seed(0)
            results = pytree.tree_leaves(module(*(tensor.clone() for tensor in batch)))
            loss = next(result for result in results if isinstance(result, Tensor))
            loss.backward()
    except Exception as error:
        raise InputError(
            f"{type(module).__name__} fails on the sample batch; correct it\n{own_traceback(error)}"
        ) from error
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return float(loss.detach()), gradients


def distances(own: Step, theirs: Step) -> dict[str, float]:
    """Relative differences of loss ("loss") and gradients (by parameter) from `theirs`; a missing gradient counts as
    zero.
    """
    norms = {name: float(gradient.double().norm()) for name, gradient in theirs[1].items()}
    whole = math.sqrt(sum(norm**2 for norm in norms.values()))
    apart = {"loss": abs(own[0] - theirs[0]) / max(abs(theirs[0]), NOISE)}
    for name in dict.fromkeys((*own[1], *theirs[1])):
        one, other = own[1].get(name), theirs[1].get(name)
        difference = (
            float((one.double() - other.double()).norm())
            if one is not None and other is not None
            else float((one if one is not None else other).double().norm())  # type: ignore[union-attr]
        )
        size = norms.get(name, 0.0)
        beyond = max(0.0, difference - NOISE * whole)
        apart[name] = beyond / size if size else (math.inf if beyond else 0.0)
    return apart


def _shaken(module: nn.Module, batch: tuple[Tensor, ...]) -> Step | None:
    """`autograd_step` with every parameter changed in its last bit: how far the results then are from those before is about how
    far rounding has moved these. None if the module cannot be copied.
    """
    try:
        other = copy.deepcopy(module)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in other.parameters():
                signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
                parameter.mul_(1 + torch.finfo(parameter.dtype).eps * signs)
        return autograd_step(other, batch)
    except Exception:
        return None


def _in_double_precision(module: nn.Module, batch: tuple[Tensor, ...]) -> Step | None:
    """`autograd_step` in float64; None if the module cannot be run in it."""
    try:
        wide = copy.deepcopy(module).double()
        return autograd_step(wide, [t.double() if t.is_floating_point() else t for t in batch])
    except Exception:
        return None


def step_bytes(layers: Iterable[Layer], programs: Iterable[Program], module: nn.Module) -> int:
    """Bytes of a step that keeps all it makes: twice parameters and buffers, plus activations and gradients."""
    made = {
        program.name: sum(value.bytes for value in program.values if value.kind in ("activation", "gradient"))
        for program in programs
    }
    held = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    return 2 * held + sum(made[layer.program] for layer in layers)


def free_bytes() -> int:
    """Bytes of memory that this process may still take: the machine's available memory, or what its cgroup leaves if
    less.
    """
    import psutil

    free = int(psutil.virtual_memory().available)
    for folder, most, now in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            limit, taken = (int((Path(folder) / name).read_text()) for name in (most, now))
        except (OSError, ValueError):  # no such cgroup, or no limit ("max")
            continue
        free = min(free, max(0, limit - taken))
    return free
