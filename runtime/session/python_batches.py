"""Checks batches that a Python program gives, and converts them to the tensors that the plan's inputs are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tightfit.planner.schema import Plan
from tightfit.profiles.schema import POSITIONS
from tightfit.profiles.sources.factory import INPUTS, as_trained, flat_batch
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.engine.training.records import IGNORED


def as_planned(plan: Plan, batch: Sequence[Any] | Tensor, name: str) -> list[Tensor]:
    """The tensors of a batch that are the plan's inputs, contiguous and in the plan's order; messages call the batch
    `name`.

    For a module, `batch` has the shapes and dtypes that it was profiled with; tensors that it does not use are left
    out; float16 and bfloat16 stand for float32, float64 is refused. Where its factory gave a loss_fn, `batch` is
    (inputs, targets), either of them a tensor or a tuple of tensors. For a language model, `batch` is (input_ids,
    labels) or input_ids alone, as transformers takes them: integers [rows, tokens] of at most the planned shape, padded
    on the right; labels[t] is the token at place t, or -100 to predict nothing there. Each row is one sample, unless
    the batch is (input_ids, labels, positions), whose positions begin again from 0 with each sample of a row. The
    result is int64 [batch, seq], and its labels are shifted to the place that predicts them.

    Raises InputError for other tensors.
    """
    if isinstance(batch, Tensor):  # iterating over it would take its rows for the batch's tensors
        raise InputError(f"{name} is a tensor; a batch is a tuple of tensors: give (tensor,)")
    inputs = plan.model.config.get(INPUTS) if plan.model.kind == "module" else None
    if inputs is not None:
        batch, given_inputs = flat_batch(batch, name)
        if given_inputs != inputs:
            raise InputError(
                f"{name} has {given_inputs} inputs, the module takes {inputs}; give (inputs, targets) as the factory"
                " does"
            )
    for index, tensor in enumerate(batch):
        if not isinstance(tensor, Tensor):
            raise InputError(f"{name}: item {index} is of type {type(tensor).__name__}; a batch is a tuple of tensors")
    batch = [tensor.detach().cpu() for tensor in batch]
    if plan.model.kind == "decoder":
        return _tokens(plan, batch, name)
    # The plan lists the tensors that the module uses, in the order of their first use.
    planned = {int(t.name.removeprefix("batch")): (t.dtype, t.shape) for t in plan.tensors if t.kind == "batch"}
    tensors = list(as_trained(batch, name))
    for index, (kind, _) in planned.items():
        dtype = getattr(torch, kind)
        if index < len(tensors) and tensors[index].is_floating_point() and dtype.is_floating_point:
            tensors[index] = tensors[index].to(dtype)
    given = [(str(t.dtype).removeprefix("torch."), list(t.shape)) for t in tensors]
    if max(planned, default=-1) >= len(tensors) or any(given[index] != form for index, form in planned.items()):
        form = [planned[index] for index in sorted(planned)]
        raise InputError(
            f"{name} has tensors {given}, the plan was made for {form}; profile with a batch of that shape"
        )
    return [tensors[index] for index in planned]


def _tokens(plan: Plan, batch: Sequence[Tensor], name: str) -> list[Tensor]:
    assert plan.seq is not None
    rows, seq, vocab_size = plan.batch, plan.seq, plan.model.config["vocab_size"]
    if not 1 <= len(batch) <= 3:
        raise InputError(f"{name} has {len(batch)} tensors; give input_ids and labels, or input_ids alone")
    ids, labels = batch[0], batch[min(1, len(batch) - 1)]
    given = [(str(t.dtype).removeprefix("torch."), list(t.shape)) for t in batch]
    if any(t.is_floating_point() or t.is_complex() or t.dtype == torch.bool for t in batch) or ids.ndim != 2:
        raise InputError(f"{name} has tensors {given}; give integers of shape [rows, tokens]")
    positions = batch[2] if len(batch) == 3 else torch.arange(ids.shape[1]).expand(ids.shape)
    if ids.shape != labels.shape or ids.shape != positions.shape or ids.shape[0] > rows or not 1 <= ids.shape[1] <= seq:
        raise InputError(
            f"{name} has tensors {given}, the plan was made for at most {rows} rows of {seq} tokens, labels like"
            f" input_ids; cut the batch, or profile with another {spelled('batch')} and {spelled('seq')}"
        )
    ids, labels, positions = ids.long(), labels.long(), positions.long()
    has_positions = any(tensor.kind == "batch" and tensor.name == POSITIONS for tensor in plan.tensors)
    starts = positions == 0
    if not bool(starts[:, 0].all() and (starts[:, 1:] | (positions[:, 1:] == positions[:, :-1] + 1)).all()):
        raise InputError(
            f"{name} has 3 tensors, and the third are no positions: they are counted from 0 in each sample of a row,"
            " one sample after the other"
        )
    if not has_positions and bool(starts[:, 1:].any()):
        why = plan.model.rows_apart or "it has no attention"
        raise InputError(
            f"{name} has rows of several samples, which this model does not allow: {why}; give each its own"
        )
    for part, values in (("input_ids", ids), ("labels", labels[labels != IGNORED])):
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < vocab_size:
            token = int(values.min()) if int(values.min()) < 0 else int(values.max())
            raise InputError(f"{name}: {part} has the token {token}; the model has tokens 0 to {vocab_size - 1}")
    # Place t predicts the token at place t + 1, if that is of the same sample.
    labels = F.pad(labels[:, 1:].masked_fill(starts[:, 1:], IGNORED), (0, 1), value=IGNORED)
    if not bool((labels >= 0).any()):
        raise InputError(f"{name} has no label after the first token; give at least one token to predict")
    padding = (0, seq - ids.shape[1], 0, rows - ids.shape[0])
    padded = torch.arange(seq).repeat(rows, 1)
    if len(batch) == 3:
        padded[: ids.shape[0], ids.shape[1] :] -= ids.shape[1]  # padding is a sample of its own
        padded[: ids.shape[0], : ids.shape[1]] = positions
    tensors = [F.pad(ids, padding).contiguous(), F.pad(labels, padding, value=IGNORED).contiguous()]
    return [*tensors, padded] if has_positions else tensors
