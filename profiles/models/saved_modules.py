"""An embedding and a head that are trained in full beside the LoRA pairs: PEFT's ``modules_to_save``.

As with PEFT a copy of the module in float32 is trained and the base stays as it is: in a model whose head is its
embedding, the copy of the one leaves the other alone. A table is trained in slices of rows, each a tensor of its own,
so that the plan places its values, gradient and optimizer states by themselves. Slices stand in groups, which are
layers to the planner: equal layers share its decisions' figures, and any number of them can be held in memory while the
others lie on disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tightfit.profiles.tracing.table_ops import rounds, table_head, table_rows
from tightfit.profiles.tracing.torch_ops import loss_of_tokens
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled

PART = "modules_to_save"
"""what PEFT calls the trained copy inside a module"""
SLICE_BYTES = 6 << 20
"""largest size of a slice of a table, trained or only read by the loss head: an update has four slices in memory,
value, gradient and two states"""
MOST_LAYERS = 24
"""layers of a table, at most; planning time grows with their number"""


@dataclass(frozen=True, kw_only=True)
class SavedModule:
    """A module that can be trained in full."""

    name: str
    """our name, such as model.embed_tokens"""
    called: str
    """as PEFT calls it: the body may have another prefix"""
    weight: str
    """the tensor that it starts from, by its name in the store"""
    refusal: str = ""
    """why it cannot be trained after all, in words"""


def chosen(
    wanted: Sequence[str], there: Sequence[SavedModule], model: str, modules: Sequence[str] = ()
) -> list[SavedModule]:
    """Those of `there` that are called so, by their names or the last parts of them, in the order of `there`.

    `model` is its name in messages, `modules` what PEFT calls all of its modules. Raises InputError for a name that
    none of `there` has or that PEFT finds in other modules too, and for a module that cannot be trained.
    """
    names = ", ".join(one.called.rpartition(".")[2] for one in there if not one.refusal) or "none"
    can = f"of {model} these modules can be trained in full: {names}"
    found = []
    for name in wanted:
        known = [one for one in there if f".{one.called}".endswith(f".{name}")]
        if not known:
            raise InputError(
                f"{spelled('modules_to_save')} {name!r}: {can}; others (norms, linear layers of blocks, embeddings of"
                " positions) stay as they are: give one of these, or leave the option out"
            )
        for one in known:
            if one.refusal:
                raise InputError(f"{spelled('modules_to_save')} {name!r}: {one.refusal}; {can}")
        others = [module for module in modules if module.endswith(name) and module not in {one.called for one in known}]
        if others:
            raise InputError(
                f"{spelled('modules_to_save')} {name!r}: PEFT would take {', '.join(others)} for it as well; give the"
                f" module's whole name, {known[0].called}"
            )
        found += known
    return [one for one in there if one in found]


def stored(tables: Sequence[SavedModule]) -> dict[str, str]:
    """What a profile says of modules that are trained in full: module -> the tensor in the store that it starts
    from.
    """
    return {table.name: table.weight for table in tables}


class Slices(nn.Module):
    """Neighbouring slices of a table: a layer to the planner."""

    def __init__(self, start: int, stop: int, rows: int, width: int) -> None:
        super().__init__()
        self.start = start
        self.starts = list(range(start, stop, rows))
        for first in self.starts:
            last = min(first + rows, stop)
            made = nn.Parameter(torch.zeros(last - first, width, dtype=torch.float32))
            self.register_parameter(f"weight[{first}:{last}]", made)

    def slices(self) -> Iterator[tuple[int, Tensor]]:
        """(rows before it in this group, values) of each slice."""
        for first, values in zip(self.starts, self._parameters.values(), strict=True):
            assert values is not None
            yield first - self.start, values


def _groups(rows: int, width: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, rows of a slice) of each group of slices of a table [rows, width]."""
    size = slice_rows(rows, width, 4)
    in_group = size * math.ceil(math.ceil(rows / size) / MOST_LAYERS)
    for start in range(0, rows, in_group):
        yield start, min(start + in_group, rows), size


def slice_rows(rows: int, width: int, element_bytes: int, most_bytes: int | None = None) -> int:
    """Rows of a slice of a table [rows, width]: the largest power of two (checksums need one), 128 or more, within
    `most_bytes`, by default `SLICE_BYTES`.
    """
    return min(rows, 1 << max(7, ((most_bytes or SLICE_BYTES) // (width * element_bytes)).bit_length() - 1))


class _Rows(Slices):
    def forward(self, before: Tensor, ids: Tensor, base: Tensor, vocabulary: int, scale: float, padding: int) -> Tensor:
        for offset, values in self.slices():
            before = table_rows(before, values, ids, base, offset, vocabulary, scale, padding)
        return before


class TrainedEmbedding(nn.ModuleList):
    """ids -> rows [ids, width] in `dtype`, times `scale`; the row of the token `padding` gets no gradient."""

    def __init__(
        self, rows: int, width: int, dtype: torch.dtype, scale: float = 1.0, padding: int | None = None
    ) -> None:
        super().__init__(_Rows(*group, width) for group in _groups(rows, width))
        self.rows, self.width, self.dtype, self.scale = rows, width, dtype, scale
        self.padding = -1 if padding is None else padding % rows

    def forward(self, ids: Tensor) -> Tensor:
        bases = _bases(self)
        made = torch.zeros(ids.numel(), self.width, dtype=self.dtype)
        for part, base in zip(self, bases, strict=True):
            made = part(made, ids, base, self.rows, self.scale, self.padding)
        return made


class _Logits(Slices):
    def forward(
        self, lse: Tensor, own: Tensor, hidden: Tensor, labels: Tensor, base: Tensor, cap: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        for offset, values in self.slices():
            lse, own, *_ = table_head(lse, own, hidden, values, labels, base, offset, cap, dtype, rounds(dtype))
        return lse, own


class TrainedHead(nn.ModuleList):
    """hidden states [T, width], labels and what a loss of pairs takes -> (loss float32 [], token losses float32 [T]),
    as `Decoder.forward` returns them.

    With a `cap` a logit is cap * tanh(logit / cap).
    """

    def __init__(self, rows: int, width: int, cap: float | None = None) -> None:
        super().__init__(_Logits(*group, width) for group in _groups(rows, width))
        self.cap = cap or 0.0

    def forward(self, hidden: Tensor, labels: Tensor, *pairs: Any) -> tuple[Tensor, Tensor]:
        # In float32 the gradients of hidden states, one from each layer, are added up without rounding.
        wide, bases = hidden.float(), _bases(self)
        flat = labels.reshape(-1)
        lse, own = torch.full((flat.numel(),), -math.inf), torch.zeros(flat.numel())
        for part, base in zip(self, bases, strict=True):
            lse, own = part(lse, own, wide, labels, base, self.cap, hidden.dtype)
        labelled = flat >= 0
        token_losses = torch.where(labelled, lse - own, 0.0)
        return loss_of_tokens(token_losses, labels, *pairs), token_losses


def _bases(parts: nn.ModuleList) -> list[Tensor]:
    """The first row of each group: as tensors, so that equal groups share a program."""
    return [torch.full((), int(part.start), dtype=torch.int64) for part in parts]  # type: ignore[arg-type]


def attach(module: nn.Module, trained: nn.Module) -> None:
    """Put a trained copy into the module that it stands for."""
    module.add_module(PART, trained)


def trained_copy(module: nn.Module) -> nn.Module | None:
    """The trained copy of a module; None: it is not trained."""
    return module._modules.get(PART)
