"""Completes the trace of a decoder in which one layer of each kind stands for all of that kind.

What is traced takes its time layer by layer, and equal layers give the same program with other names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from types import MappingProxyType
from typing import Protocol

from tightfit.profiles.schema import Layer, Program
from tightfit.profiles.tracing.traced import Trace, global_tensors

BLOCK = re.compile(r"(?<![\w.])model\.layers\.(\d+)(?=[./#:@)]|$)")
"""the block of the decoder that a name speaks of"""
BETWEEN = re.compile(r"(?<![\w.])between\.(\d+)(?=[/#:@)]|$)")
"""a stretch between named layers, by its number among all of them"""


class Blocks(Protocol):
    """A decoder whose blocks have numbers."""

    def block_kinds(self) -> Sequence[Hashable]: ...

    def keep_blocks(self, numbers: Collection[int]) -> None: ...


def traced_by_kinds(decoder: Blocks, trace: Callable[[], Trace]) -> Trace:
    """What `trace` makes of a decoder, in which one block of each kind is left, completed by all others; of one that
    tells no kinds all blocks are traced.
    """
    stand_ins = representatives(decoder.block_kinds())
    if not stand_ins:
        return trace()
    decoder.keep_blocks(stand_ins)
    return with_all_blocks(trace(), stand_ins)


def representatives(kinds: Sequence[Hashable]) -> list[int]:
    """For each block the number of the first block of its kind."""
    first: dict[Hashable, int] = {}
    return [first.setdefault(kind, number) for number, kind in enumerate(kinds)]


def with_all_blocks(traced: Trace, stand_ins: Sequence[int]) -> Trace:
    """The trace of a whole decoder, given that of the blocks which stand for the others: block i is equal to block
    `stand_ins[i]`.
    """
    kept = sorted(set(stand_ins))
    of_block: dict[int, list[Layer]] = {number: [] for number in kept}
    before: list[Layer] = []
    after: list[Layer] = []
    for layer in traced.layers:
        match = BLOCK.match(layer.name) or _block_of_sum(layer)
        if match:
            of_block[int(match[1])].append(layer)
        else:
            (after if of_block[kept[0]] else before).append(layer)
    previous = dict(zip(kept[1:], kept, strict=False))
    traced_before_the_end = [*before, *chain.from_iterable(of_block.values())]
    layers = list(before)
    for number, stand_in in enumerate(stand_ins):
        numbers = {block: block for block in kept} if stand_in == number else {}  # it may read what any block has made
        numbers |= {stand_in: number} | ({previous[stand_in]: number - 1} if stand_in in previous else {})
        layers += [_renamed(layer, numbers) for layer in of_block[stand_in]]
    added = sum(not _sums(layer) for layer in layers) - sum(not _sums(layer) for layer in traced_before_the_end)
    moved = {match[0]: int(match[1]) + added for layer in after if (match := BETWEEN.match(layer.name))}
    layers += [_renamed(layer, {kept[-1]: len(stand_ins) - 1}, moved) for layer in after]
    programs, layers = _numbered(traced.programs, layers)
    by_name = {program.name: program for program in programs}
    return replace(traced, layers=layers, programs=programs, tensors=global_tensors(layers, by_name))


def _sums(layer: Layer) -> bool:
    """Whether a layer sums up gradients, and is no part of the forward."""
    return layer.name.startswith("sum(")


def _block_of_sum(layer: Layer) -> re.Match[str] | None:
    """The block whose gradients a layer sums up: it stands before the part of that block which contributed last."""
    return BLOCK.search(layer.bindings.get("part1", "").partition("@")[2]) if _sums(layer) else None


def _renamed(layer: Layer, numbers: Mapping[int, int], moved: Mapping[str, int] = MappingProxyType({})) -> Layer:
    """The layer with other numbers of blocks in its names, and of those stretches between layers that have `moved`."""

    def rename(name: str) -> str:
        name = BLOCK.sub(lambda match: f"model.layers.{numbers[int(match[1])]}", name)
        return BETWEEN.sub(lambda match: f"between.{moved.get(match[0], match[1])}", name)

    bindings = {value: rename(name) for value, name in layer.bindings.items()}
    return layer.model_copy(update={"name": rename(layer.name), "bindings": bindings})


def _numbered(programs: Sequence[Program], layers: Sequence[Layer]) -> tuple[list[Program], list[Layer]]:
    """Programs in the order in which a trace of all layers meets them, which is that of the backward."""
    met = dict.fromkeys(layer.program for layer in reversed(layers) if layer.program.startswith("program"))
    names = {program: f"program{number}" for number, program in enumerate(met)}
    renamed = [program.model_copy(update={"name": names.get(program.name, program.name)}) for program in programs]
    order = {name: number for number, name in enumerate(names.values())}
    renamed.sort(key=lambda program: order.get(program.name, len(order)))
    return renamed, [layer.model_copy(update={"program": names.get(layer.program, layer.program)}) for layer in layers]
