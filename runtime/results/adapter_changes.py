"""An adapter in PEFT's format, read as changes of its base's weights: LoRA pairs, DoRA's magnitudes, and modules that
were trained in full.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tightfit.profiles.models.lora import OF_EXPERTS, LoraConfig, Pair, from_peft
from tightfit.profiles.sources.stacked_experts import spans
from tightfit.profiles.weights.precision import PUBLISHED
from tightfit.profiles.weights.tensor_file import TensorFile
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.engine.training.adapter import BODY, MAGNITUDE, PREFIX, WEIGHTS

if TYPE_CHECKING:
    from torch import Tensor

A, B = ".lora_A.weight", ".lora_B.weight"
LENGTHS = MAGNITUDE.removesuffix(".weight")
NESTED = ".base_layer"
"""end of what PEFT calls the pairs of the first of two matrices of experts"""
ADVICE = "give the folder of an adapter, such as a run's OUT/adapter"


@dataclass(frozen=True, kw_only=True)
class WeightChange:
    """W becomes W + scale * B A; with DoRA each row of that is brought to its length in `magnitude`. Where the matrices
    of several `experts` stand below one another in W, so do their A, and columns of B belong to one expert after the
    other.
    """

    a: Tensor
    """float32 [experts * rank, inputs]"""
    b: Tensor
    """float32 [outputs of an expert, rank * experts]"""
    scale: float
    magnitude: Tensor | None = None
    """float32 [outputs]"""
    experts: int = 1

    def rows(self, weight: Tensor, start: int) -> Tensor:
        """The changed rows of W from row `start` on, for the rows `weight`, float32 [n, inputs]."""
        import torch

        stop = start + len(weight)
        if self.experts > 1:
            found = list(spans(start, stop, len(self.b)))
            parts = weight.split([last - first for _, first, last in found])
            own = zip(found, parts, strict=True)
            return torch.cat([self._of_expert(number).rows(part, first) for (number, first, _), part in own])
        changed = torch.addmm(weight, self.b[start:stop], self.a, alpha=self.scale)
        if self.magnitude is None:
            return changed
        lengths: Tensor = torch.ops.aten.linalg_vector_norm.default(changed, 2, [1])
        return changed * (self.magnitude[start:stop] / lengths).view(-1, 1)

    def _of_expert(self, number: int) -> WeightChange:
        rank = len(self.a) // self.experts
        a, b = self.a[rank * number : rank * (number + 1)], self.b[:, number :: self.experts]
        return WeightChange(a=a, b=b, scale=self.scale)

    def columns(self, weight: Tensor, start: int) -> Tensor:
        """The changed columns of W from column `start` on, for the columns `weight`, float32 [n, outputs]: what a file
        holds that has rows and columns the other way round. Without the magnitudes, for which whole rows are needed.
        """
        import torch

        return torch.addmm(weight, self.a[:, start : start + len(weight)].t(), self.b.t(), alpha=self.scale)


class AdapterFolder:
    """The adapter in a folder, for a base whose decoder's names begin with `body`.

    Raises InputError for a folder without one, and for what no LoRA adapter of tightfit's or PEFT's holds.
    """

    def __init__(self, folder: Path, body: str = BODY) -> None:
        self.folder = folder
        self.settings: LoraConfig = from_peft(folder)
        path = folder / WEIGHTS
        if not path.is_file():
            raise InputError(f"{path}: no such file; {ADVICE}")
        self._file = TensorFile(path, "copy the adapter again")
        self._layers: dict[str, str] = {}
        self.tables: dict[str, str] = {}
        """weight of a module that was trained in full, by our name -> its key in the adapter"""
        tensors = self._file.tensors
        for key, (kind, shape) in tensors.items():
            name = key.removeprefix(PREFIX)
            stem = name.removesuffix(A).removesuffix(B).removesuffix(LENGTHS)
            in_full = stem == name
            recognised = key.startswith(PREFIX) and kind in PUBLISHED and len(shape) in (1, 2)
            if not recognised or (in_full and (not name.endswith(".weight") or ".lora_" in name)):
                raise InputError(
                    f"{path}: holds {key} ({kind}), which no LoRA adapter that tightfit trains has; {ADVICE}"
                )
            name_here = BODY + stem.removeprefix(body) if stem.startswith(body) else stem
            if in_full:
                self.tables[name_here] = key
            else:
                self._layers[self._weight_of(name_here, stem)] = stem
        for weight, layer in self._layers.items():
            pair_parts = [A, B, *([LENGTHS] if self.settings.dora else [])]
            if missing := next((part for part in pair_parts if f"{PREFIX}{layer}{part}" not in tensors), None):
                raise InputError(
                    f"{path}: no tensor {PREFIX}{layer}{missing} beside the others of {weight}; copy the adapter again"
                )

    def _weight_of(self, layer: str, stem: str) -> str:
        """Our name of the weight of a layer, which PEFT calls `stem`: of a module with experts it nests the pairs."""
        gate_up, down = OF_EXPERTS
        if self.settings.experts and layer.endswith(NESTED):
            return f"{layer.removesuffix(NESTED)}.{gate_up}"
        nested = self.settings.experts and f"{PREFIX}{stem}{NESTED}{A}" in self._file.tensors
        return f"{layer}.{down}" if nested else f"{layer}.weight"

    @property
    def weights(self) -> list[str]:
        """The weights that have pairs, by our names."""
        return list(self._layers)

    def pair(self, weight: str, shape: tuple[int, ...]) -> Pair | None:
        """The pair of a weight [outputs, inputs]; None: it has none. Raises InputError where it is of another shape."""
        layer = self._layers.get(weight)
        if layer is None:
            return None
        pair = self.settings.pair(layer)
        for part, size in self._parts(weight, pair, shape).items():
            self._check(f"{PREFIX}{layer}{part}", size)
        return pair

    def change(self, weight: str, shape: tuple[int, ...]) -> WeightChange | None:
        """What becomes of a weight [outputs, inputs]; None: it stays. Raises InputError as `pair`, and for values that
        are no finite numbers.
        """
        pair = self.pair(weight, shape)
        if pair is None:
            return None
        keys = {part: f"{PREFIX}{self._layers[weight]}{part}" for part in self._parts(weight, pair, shape)}
        factors = {part: self._rows(key, 0, self._file.tensors[key][1][0]) for part, key in keys.items()}
        experts = self._experts(weight, pair)
        return WeightChange(
            a=factors[A], b=factors[B], scale=pair.scale, magnitude=factors.get(LENGTHS), experts=experts
        )

    def _experts(self, weight: str, pair: Pair) -> int:
        """How many experts have their matrices in a weight, of which each has a pair; 1 for any other weight."""
        if not (self.settings.experts and weight.endswith(OF_EXPERTS)):
            return 1
        return max(1, self._file.tensors[f"{PREFIX}{self._layers[weight]}{A}"][1][0] // pair.rank)

    def _parts(self, weight: str, pair: Pair, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The shapes of a pair's tensors, by the ends of their names."""
        outputs, inputs = shape
        experts = self._experts(weight, pair)
        rank = experts * pair.rank
        parts: dict[str, tuple[int, ...]] = {A: (rank, inputs), B: (outputs // experts, rank)}
        return parts | ({LENGTHS: (outputs,)} if pair.dora else {})

    def table(self, weight: str, shape: tuple[int, ...]) -> Callable[[int, int], Tensor]:
        """Reads rows, float32, of a module that was trained in full. Raises InputError where it is of another
        `shape`.
        """
        key = self.tables[weight]
        self._check(key, shape)

        return partial(self._rows, key)

    def _check(self, key: str, shape: tuple[int, ...]) -> None:
        actual = self._file.tensors[key][1]
        if actual != shape:
            raise InputError(
                f"{self._file.path}: {key} is {list(actual)} and the base wants {list(shape)}; give the base that the"
                f" adapter was trained on with {spelled('base')}"
            )

    def _rows(self, key: str, start: int, stop: int) -> Tensor:
        import torch

        values = self._file.rows(key, start, stop).float()
        if not torch.isfinite(values).all():
            raise InputError(
                f"{self._file.path}: {key} holds values that are no finite numbers; give the adapter of another run"
            )
        return values
