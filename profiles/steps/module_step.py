"""The step of a module of the user's own, whose parameters are trained as they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from tightfit.profiles.options import ProfileOptions
from tightfit.profiles.sources.factory import build_with_batches, narrowed
from tightfit.profiles.steps.step import LORA, ProfiledStep
from tightfit.profiles.tracing.comparison import GradientComparison
from tightfit.profiles.tracing.fold import constant_made
from tightfit.profiles.tracing.loss_function import loss_maker
from tightfit.profiles.tracing.own_state import digest_of_code
from tightfit.profiles.tracing.trace import trace
from tightfit.profiles.tracing.traced import Trace
from tightfit.profiles.weights.source import Source
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.progress import Progress


class ModuleStep(ProfiledStep):
    """Its factory gives the module, a sample batch or several, and a loss_fn where the module returns no loss."""

    kind = "module"
    default_dtype = "float32"
    phrase = "{name} is a module"
    worth_a_process = False  # its gradients are compared with autograd's, by this process
    refused = {
        ("batch", "seq"): ", whose factory gives the sample batch; give it there",
        ("modules_to_save", *LORA): ", trained in full itself; leave the option out",
        ("tile", "matrix_rows"): ", whose operators run on whole tensors; leave the option out",
        (
            "loss",
            "beta",
        ): " with a loss of its own, and only a language model learns from pairs of answers; leave the option out",
        ("side_rank", "side_blocks"): ", and a side network is trained beside a language model; leave the option out",
    }

    def __init__(self, source: Source, options: ProfileOptions) -> None:
        super().__init__(source, options)
        self._traced: Trace | None = None
        self._ignored = options.ignore_state or ()

    def settings(self, report: Progress) -> list[Any]:
        """Its code, and that of a loss_fn, is part of what the profile depends on."""
        traced = self.trace(report)
        parts = [part.model_dump() for part in (*traced.tensors, *traced.programs, *traced.layers)]
        digest = hashlib.sha256(json.dumps([parts, traced.loss]).encode()).hexdigest()
        return [digest, self.dtype, self._code, sorted(self._ignored)]

    def trace(self, report: Progress) -> Trace:
        if self._traced is None:
            self._traced = self._traced_now(report)
        return self._traced

    def _traced_now(self, report: Progress) -> Trace:
        source = self.source
        module, batches, inputs = build_with_batches(source.path)
        if self.dtype != "float32":
            batches = [narrowed(module, batch, inputs, getattr(torch, self.dtype))[1] for batch in batches]
        names: Mapping[str, torch.Tensor] = {f"batch{index}": tensor for index, tensor in enumerate(batches[0])}
        traced = trace(module, names, progress=report, evaluated=True)
        self._code = digest_of_code(traced.code)
        if traced.token_losses is not None:
            raise InputError(f"{source.name}: {loss_maker(module)} must return one scalar loss, not 2 results")
        for tensor in traced.tensors:
            if tensor.kind in ("trainable", "weight", "constant") and tensor.name not in source.entries:
                raise InputError(f"{source.name}: {constant_made(tensor.shape, tensor.name)}")
        self.batch = next((t.shape[0] for t in traced.tensors if t.kind == "batch" and t.shape), 1)
        self._module, self._batches = module, batches
        return traced

    def model_fields(self) -> dict[str, Any]:
        assert self._traced
        other = self._traced.other_evaluation
        return super().model_fields() | {"ignored_state": sorted(self._ignored), "other_evaluation": other}

    def comparison(self) -> GradientComparison:
        assert self._traced
        first, *others = self._batches
        return GradientComparison(self.source.name, self._module, first, self._traced, others, self._ignored)
