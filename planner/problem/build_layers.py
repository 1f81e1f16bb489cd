"""Splits a profile into layers: which storages have a fixed lifetime, which the solver decides on, and which layers are
equal.

The solver decides on storages within one layer's own windows. A storage that crosses layers is either owned by one
layer, whose decision covers it, or has a fixed lifetime that is the same in every plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

from tightfit.planner.problem.clipping import accumulate_seconds, clipped_seconds
from tightfit.planner.problem.layer_types import (
    ALWAYS,
    LayeredStep,
    LayerOperator,
    LayerType,
    LayerWeight,
    TrainableUpdate,
    WeightMode,
    compute_seconds,
    transfer_seconds,
)
from tightfit.planner.problem.step_graph import (
    PACKED_ALIGNMENT,
    StepGraph,
    StepOperator,
    aligned,
    state_bytes,
    state_names,
    state_roles,
    step_graph,
)
from tightfit.profiles.schema import Profile
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.training.adapter import table_slice

HEAD_CHUNK = "tightfit.head_chunk"
MINOR_SHARE = 1 / 50
"""a tensor below this share of the bytes of all its layer's candidates is never offloaded: it is not worth a transfer
of its own
"""


def layered(profile: Profile) -> LayeredStep:
    """Split the step into layers, find what has a fixed lifetime, and merge equal layers into types.

    Raises InputError where the profile contradicts itself.
    """
    graph = step_graph(profile)
    return _Splitter(profile, graph).split()


class _Splitter:
    """Computes lifetimes across layers once, then describes each layer."""

    def __init__(self, profile: Profile, graph: StepGraph) -> None:
        self.profile = profile
        self.graph = graph
        self.roles = state_roles(profile.optimizer)
        self.tensors = {tensor.name: tensor for tensor in profile.tensors}
        self.tiles = {program.name: (program.tiles, program.tile_operators) for program in profile.programs}
        self.apart = profile.accumulate if profile.max_grad_norm is not None else 0
        self.count = len(graph.layers)
        self.steps: list[dict[str, list[StepOperator]]] = [
            {"forward": [], "backward": [], "inference": []} for _ in range(self.count)
        ]
        for step in (*graph.steps, *graph.inference):
            self.steps[step.layer][step.phase].append(step)
        self.outcome = {name for name in (profile.loss, profile.token_losses) if name is not None}
        self.rewritten = {
            name
            for name, storage in graph.storages.items()
            if len(storage.producers) > 1 and graph.steps[storage.producers[0]].phase == "forward"
        }
        self.moving = frozenset(
            tensor.name for tensor in profile.tensors if tensor.movable and self._moves(tensor.name)
        )
        self.carried = self._carried()
        self.recomputable = [self._recomputable(layer) for layer in range(self.count)]
        self._lifetimes()

    def kind(self, name: str) -> str:
        return self.graph.storages[name].kind

    def lives(self, name: str) -> bool:
        """Whether the storage is an activation or gradient, with a lifetime inside the step."""
        return self.kind(name) not in ALWAYS and self.kind(name) != "weight"

    def _moves(self, name: str) -> bool:
        """Whether a trainable's values may lie on disk between their uses: one layer alone uses it, and its backward
        reads it, so that it is there for its update.
        """
        storage, gradient = self.graph.storages[name], self.graph.storages.get(f"grad:{name}")
        if storage.kind != "trainable" or gradient is None or not gradient.producers:
            return False
        readers = [self.graph.steps[index] for index in storage.consumers]
        layers = {step.layer for step in readers}
        layers |= {self.graph.steps[index].layer for index in (*gradient.producers, *gradient.consumers)}
        return len(layers) == 1 and any(step.phase == "backward" for step in readers)

    def _carried(self) -> set[str]:
        """Activations that the last layer's last forward operator makes and its first backward operator reads.

        Nothing runs between the two, so recomputing such a tensor would take time and save no memory.
        """
        last = self.steps[self.count - 1]
        if not last["forward"] or not last["backward"]:
            return set()
        outputs = {name for name in last["forward"][-1].outputs if name is not None}
        return {
            name for name in outputs & set(last["backward"][0].inputs) if self.graph.storages[name].kind == "activation"
        }

    def _recomputable(self, layer: int) -> dict[int, StepOperator]:
        """Forward steps of the layer that may run again in its backward window: operator -> step."""
        forward = {name: step for step in self.steps[layer]["forward"] for name in step.outputs if name is not None}
        needed = [name for step in self.steps[layer]["backward"] for name in step.inputs if name not in self.carried]
        recomputable: dict[int, StepOperator] = {}
        while needed:
            step = forward.get(needed.pop())
            if step is None or step.operator in recomputable or not step.recomputable:
                continue
            # The result of an in-place operator cannot be recomputed: its input has been overwritten.
            if self.rewritten & {*step.inputs, *filter(None, step.outputs)}:
                continue
            recomputable[step.operator] = step
            needed.extend(step.inputs)
        return recomputable

    def _lifetimes(self) -> None:
        """Find each storage's first and last window, its owner or that it is `forced`. Of n layers, the forward of
        layer l is window l and its backward window 2n - 1 - l.
        """
        windows = 2 * self.count
        self.made_in: dict[str, int] = {}
        self.last_window: dict[str, int] = {}
        self.last_forward: dict[str, int] = {}
        backward_layers: dict[str, set[int]] = {}
        possible: dict[str, set[int]] = {}
        for step in self.graph.steps:
            window = step.layer if step.phase == "forward" else windows - 1 - step.layer
            for name in filter(None, step.outputs):
                self.made_in.setdefault(name, window)
            for name in [*step.inputs, *filter(None, step.outputs)]:
                self.last_window[name] = window
                if step.phase == "forward":
                    self.last_forward[name] = window
                elif name in self.made_in and self.made_in[name] < self.count:
                    backward_layers.setdefault(name, set()).add(step.layer)
        for layer, steps_again in enumerate(self.recomputable):
            for step in steps_again.values():
                for name in step.inputs:
                    backward_layers.setdefault(name, set()).add(layer)
                    possible.setdefault(name, set()).add(layer)
        self.owner: dict[str, int] = {}
        self.forced: set[str] = set()
        self.whole_window: dict[str, int] = {}
        for name, layers in backward_layers.items():
            if not self.lives(name) or name in self.outcome or name not in self.made_in:
                continue
            first_window = self.made_in[name]
            if first_window >= self.count:
                continue
            only = min(layers)
            if len(layers) == 1 and self.last_forward[name] == only and name not in self.carried:
                self.owner[name] = only
                continue
            self.forced.add(name)
            final = windows - 1 - min(layers)
            self.last_window[name] = max(self.last_window[name], final)
            if min(possible.get(name, {self.count})) == min(layers):
                self.whole_window[name] = self.last_window[name]
        for name in self.outcome:
            self.last_window[name] = 2 * windows
            self.last_forward[name] = 2 * windows
        self.updated = self._updated()
        for trainable, window in self.updated.items():
            gradient = f"grad:{trainable}"
            if gradient in self.made_in:
                self.last_window[gradient] = window

    def _updated(self) -> dict[str, int]:
        """Trainable -> the backward window in which it is updated: the last one that reads it, or makes or reads its
        gradient.
        """
        result = {}
        for name, storage in self.graph.storages.items():
            gradient = self.graph.storages.get(f"grad:{name}")
            if storage.kind != "trainable":
                continue
            if gradient is None or not gradient.producers:
                raise InputError(
                    f"trainable {name} has no gradient: no operator makes 'grad:{name}'; mark it constant or trace it"
                    " again"
                )
            layers = {self.graph.steps[i].layer for i in (*gradient.producers, *gradient.consumers, *storage.consumers)}
            result[name] = 2 * self.count - 1 - min(layers)
        return result

    def split(self) -> LayeredStep:
        types: list[LayerType] = []
        layer_type: list[int] = []
        for layer in range(self.count):
            described = self._describe(layer)
            if described not in types:
                types.append(described)
            layer_type.append(types.index(described))
        storages = self.graph.storages
        always = [name for name, storage in storages.items() if storage.kind in ALWAYS and name not in self.moving]
        return LayeredStep(
            profile=self.profile,
            graph=self.graph,
            types=tuple(types),
            layer_type=tuple(layer_type),
            constant_bytes=sum(aligned(storages[name].bytes) for name in always),
            across_forward=tuple(self._across(layer, layer) for layer in range(self.count)),
            across_backward=tuple(self._across(layer, 2 * self.count - 1 - layer) for layer in range(self.count)),
            across_evaluate=tuple(self._across(layer, layer, evaluate=True) for layer in range(self.count)),
            always=tuple(always),
            moving=self.moving,
            workspace_bytes=max(
                (step.workspace_bytes for step in (*self.graph.steps, *self.graph.inference)), default=0
            ),
            forced=frozenset(self.forced),
        )

    def _touched(self, layer: int, window: int) -> set[str]:
        steps = self.steps[layer]["forward" if window < self.count else "backward"]
        names = {name for step in steps for name in [*step.inputs, *filter(None, step.outputs)]}
        if window >= self.count:
            for step in self.recomputable[layer].values():
                names.update(step.inputs, filter(None, step.outputs))
            names |= {f"grad:{name}" for name, update_window in self.updated.items() if update_window == window}
        return names

    def _last_window(self, name: str, last_windows: dict[str, int]) -> int:
        """The last window in which the storage is resident in every plan, without what its owner decides."""
        return self.last_forward[name] if name in self.owner else last_windows[name]

    @cached_property
    def across_windows(self) -> dict[bool, list[int]]:
        """Bytes by window of what lives before and after it; True: in an evaluation, which ends with the forward."""
        result: dict[bool, list[int]] = {}
        for evaluate, last_windows in ((False, self.last_window), (True, self.last_forward)):
            changes = [0] * (2 * self.count + 1)
            for name, first_window in self.made_in.items():
                last = min(2 * self.count, self._last_across(name, last_windows))
                if first_window + 1 < last:
                    changes[first_window + 1] += aligned(self.graph.storages[name].bytes)
                    changes[last] -= aligned(self.graph.storages[name].bytes)
            result[evaluate] = list(accumulate(changes))
        return result

    def _last_across(self, name: str, last_windows: dict[str, int]) -> int:
        """The same for what can lie across windows; -1 for what cannot."""
        made_backward = last_windows is self.last_forward and self.made_in[name] >= self.count
        return -1 if made_backward or not self.lives(name) else self._last_window(name, last_windows)

    def _across(self, layer: int, window: int, *, evaluate: bool = False) -> int:
        """Bytes that live before and after a window of the layer and are not touched in it."""
        last_windows = self.last_forward if evaluate else self.last_window
        touched = sum(
            aligned(self.graph.storages[name].bytes)
            for name in self._touched(layer, window)
            if name in self.made_in and self.made_in[name] < window < self._last_across(name, last_windows)
        )
        return self.across_windows[evaluate][window] - touched

    def _describe(self, layer: int) -> LayerType:
        local: dict[str, str] = {}
        for value, name in self.graph.names[layer].items():
            local.setdefault(name, value)
        forward_window, backward_window = layer, 2 * self.count - 1 - layer
        forward = tuple(self._layer_operator(layer, step, local) for step in self.steps[layer]["forward"])
        backward = tuple(self._layer_operator(layer, step, local) for step in self.steps[layer]["backward"])
        inference = tuple(self._layer_operator(layer, step, local) for step in self.steps[layer]["inference"])

        def touched(window: int, holds: Callable[[int, str], bool]) -> frozenset[str]:
            """Storages with a lifetime that the window touches and for which `holds`, called with first window and
            name, is true.
            """
            return frozenset(
                local[name]
                for name in self._touched(layer, window)
                if name in local and self.lives(name) and name in self.made_in and holds(self.made_in[name], name)
            )

        def entering(window: int) -> frozenset[str]:
            return touched(window, lambda first, name: first < window <= self._last_window(name, self.last_window))

        def leaving(window: int, last_windows: dict[str, int]) -> frozenset[str]:
            return touched(window, lambda first, name: first <= window < self._last_window(name, last_windows))

        leaves_evaluate = leaving(forward_window, self.last_forward)
        if inference:
            weights = frozenset(weight for operation in (*forward, *backward) for weight in operation.weights)
            self._check_inference(layer, forward, inference, leaves_evaluate, entering(forward_window), weights)
        own_storages = {name for name, owner in self.owner.items() if owner == layer}
        candidates = tuple(sorted(local[name] for name in own_storages))
        owned = frozenset(local[name] for name in own_storages if self.made_in[name] != layer)
        sizes = {
            local[name]: aligned(self.graph.storages[name].bytes)
            for window in (forward_window, backward_window)
            for name in self._touched(layer, window)
            if name in local and self.lives(name)
        }
        for operation in [*forward, *inference]:
            for value in operation.outputs:
                sizes[value] = aligned(self.graph.storages[self.graph.names[layer][value]].bytes)
        events = _events(forward, backward, set(candidates), set(self.recomputable[layer]))
        tiles, length = self._tiles(layer)
        layer_weights = self._weights(layer, forward, backward, events, tiles)
        alike = _alike(forward[: tiles * length], length, {value: sizes[value] for value in candidates})
        total = sum(sizes[value] for value in candidates)
        return LayerType(
            program=self.profile.layers[layer].program,
            forward=forward,
            backward=backward,
            evaluate=inference or forward,
            bytes=dict(sorted(sizes.items())),
            raw_bytes=self._raw_bytes(layer, local, window=backward_window, candidates=candidates),
            enters_forward=entering(forward_window),
            leaves_forward=leaving(forward_window, self.last_window),
            enters_backward=entering(backward_window),
            leaves_backward=leaving(backward_window, self.last_window),
            leaves_evaluate=leaves_evaluate,
            closes_backward=frozenset(
                local[name] for name, last in self.whole_window.items() if last == backward_window and name in local
            ),
            owned=owned,
            weights=layer_weights,
            updates=self._updates(layer, local, events),
            candidates=candidates,
            offloadable=_offloadable(
                forward, {value: tiles * sizes[value] for value in candidates}, MINOR_SHARE * total
            ),
            events=events,
            read=self.profile.device.read,
            write=self.profile.device.write,
            apart=self.apart,
            tiles=tiles,
            tile_length=length,
            alike=alike | self._alike_weights(layer, layer_weights),
            across_evaluate=self._across(layer, forward_window, evaluate=True) if self.apart else 0,
        )

    def _tiles(self, layer: int) -> tuple[int, int]:
        """(tiles of a layer, forward operators of each); one tile where operators were added between them, as for a
        fleet.
        """
        targets = [step.target for step in self.steps[layer]["forward"]]
        tiles, length = self.tiles[self.profile.layers[layer].program]
        equal = tiles > 1 and targets[: tiles * length] == targets[:length] * tiles
        return (tiles, length) if equal else (1, max(1, len(targets)))

    def _check_inference(
        self,
        layer: int,
        forward: tuple[LayerOperator, ...],
        inference: tuple[LayerOperator, ...],
        leaving: frozenset[str],
        entering: frozenset[str],
        weights: frozenset[str],
    ) -> None:
        """Raises InputError where a layer's operators for inference do not use a weight, or a storage shared with other
        layers, that its forward uses, or read one that does not exist in an evaluation.
        """
        used = {value for op in inference for value in [*op.inputs, *op.outputs, *op.weights]}
        required = (entering | leaving).union(*(op.weights for op in forward))
        for value in sorted(required - used):
            raise InputError(
                f"layer {self.graph.layers[layer]}: its forward uses {value} and its operators for inference do not;"
                " trace the model again"
            )
        available = set(entering | weights)
        for op in inference:
            for value in [*op.inputs, *op.weights]:
                if value not in available and (value in op.weights or self.lives(self.graph.names[layer][value])):
                    raise InputError(
                        f"layer {self.graph.layers[layer]}: its operators for inference read {value}, which neither"
                        " enters the layer nor is made before by them; trace the model again"
                    )
            available.update(op.outputs)

    def _raw_bytes(
        self, layer: int, local: dict[str, str], *, window: int, candidates: tuple[str, ...]
    ) -> dict[str, int]:
        result = {value: self.graph.storages[self.graph.names[layer][value]].bytes for value in candidates}
        for name, update_window in self.updated.items():
            if update_window == window:
                local_name = local.get(name, name)
                if name in self.moving:
                    result[local_name] = self.graph.storages[name].bytes
                result.update(zip(state_names(local_name, self.roles), self._state_bytes(name), strict=True))
        return dict(sorted(result.items()))

    def _state_bytes(self, trainable: str) -> list[int]:
        """Bytes of each of a trainable's optimizer states."""
        if trainable not in self.tensors:
            return [self.graph.storages[trainable].bytes for _ in self.roles]
        return [state_bytes(role, self.tensors[trainable]) for role in self.roles]

    def _layer_operator(self, layer: int, step: StepOperator, local: dict[str, str]) -> LayerOperator:
        return LayerOperator(
            index=step.operator,
            inputs=tuple(local[name] for name in step.inputs if self.lives(name)),
            weights=tuple(local[name] for name in step.inputs if self.kind(name) == "weight" or name in self.moving),
            outputs=tuple(local[name] for name in step.outputs if name is not None),
            seconds=step.seconds,
            recomputable=step.operator in self.recomputable[layer],
        )

    def _weights(
        self,
        layer: int,
        forward: tuple[LayerOperator, ...],
        backward: tuple[LayerOperator, ...],
        events: dict[int, tuple[int, ...]],
        tiles: int,
    ) -> dict[str, LayerWeight]:
        result, tensors = {}, self.tensors
        for value in sorted({w for op in [*forward, *backward] for w in op.weights}):
            name = self.graph.names[layer][value]
            tensor = tensors.get(name)
            if tensor is None:
                raise InputError(f"weight {name} is used by layer {self.graph.layers[layer]} but is not in `tensors`")
            ahead = [t for t, op in enumerate(forward) if value in op.weights]
            behind = [t for t, op in enumerate(backward) if value in op.weights]
            recomputing = tuple(t for t, op in enumerate(forward) if value in op.weights and events.get(op.index))
            late = any(t > min(behind, default=-1) for k in recomputing for t in events[forward[k].index])
            if name in self.moving:
                updated_after = self._updated_after(layer, name, events)
                result[value] = self._moving_weight(
                    tensor.bytes, ahead=bool(ahead), behind=behind, recomputing=recomputing, updated_after=updated_after
                )
                continue
            users = {self.graph.steps[i].layer for i in self.graph.storages[name].consumers}
            modes = SHARED if len(users) > 1 else weight_modes(bool(ahead), bool(behind), len(recomputing), late=late)
            unpacked_per_use = modes in {SHARED, UNIFORM}
            repeated = tiles > 1 and len(ahead) > 1
            if repeated:
                modes = held_modes(modes if len(users) > 1 or not behind else FREE)
                unpacked_per_use = False
            packed = aligned(tensor.packed_bytes, PACKED_ALIGNMENT)
            result[value] = LayerWeight(
                bytes=aligned(tensor.bytes),
                packed_bytes=packed,
                unpack_seconds=tensor.unpack_seconds,
                read_seconds=transfer_seconds(self.profile.device.read, tensor.packed_bytes),
                read_compute_seconds=compute_seconds(self.profile.device.read, tensor.packed_bytes),
                backward_first=min(behind, default=-1),
                backward_last=max(behind, default=-1),
                backward_uses=len(behind),
                recomputing=recomputing,
                modes=modes,
                unpacked_per_use=unpacked_per_use,
                repeated=repeated,
            )
        return result

    def _alike_weights(self, layer: int, weights: Mapping[str, LayerWeight]) -> dict[str, str]:
        """Slice of a matrix -> the first slice of the same matrix of equal size and use, and small trainable -> the
        first one of equal use. Slices of the head, which no other layer is like, and of what is trained in full are
        decided on one by one.
        """
        alike: dict[str, str] = {}
        first: dict[tuple[Any, ...], str] = {}
        if any(step.target == HEAD_CHUNK for step in self.steps[layer]["forward"]):
            return alike
        small = MINOR_PART * sum(weight.bytes for weight in weights.values() if weight.trained)
        for name, weight in weights.items():
            matrix, cut, _ = name.partition("[")
            if weight.trained and weight.bytes < small and not table_slice(self.graph.names[layer].get(name, name)):
                like = first.setdefault(("trained", weight.modes), name)
            elif cut:
                use = (
                    weight.backward_uses,
                    len(weight.recomputing),
                    weight.modes,
                    weight.unpacked_per_use,
                    weight.repeated,
                )
                like = first.setdefault((matrix, weight.bytes, weight.packed_bytes, *use), name)
            else:
                continue
            if like != name:
                alike[name] = like
        return alike

    def _moving_weight(
        self, size: int, *, ahead: bool, behind: list[int], recomputing: tuple[int, ...], updated_after: int
    ) -> LayerWeight:
        """A trainable of `size` bytes whose values may lie on disk, read by backward operations at positions `behind`.
        They stay until it is updated, after the one at `updated_after`, but where updates are apart.
        """
        read = self.profile.device.read
        return LayerWeight(
            bytes=aligned(size),
            packed_bytes=0,
            unpack_seconds=0.0,
            read_seconds=transfer_seconds(read, size),
            read_compute_seconds=compute_seconds(read, size),
            backward_first=min(behind),
            backward_last=max(behind) if self.apart else updated_after,
            backward_uses=len(behind),
            recomputing=recomputing,
            modes=MOVING if ahead else (MOVING[0], MOVING[-1]),
            unpacked_per_use=False,
            trained=True,
        )

    def _updated_after(self, layer: int, name: str, events: dict[int, tuple[int, ...]]) -> int:
        """The position of the backward operation after which a trainable is updated: its last possible reader, or the
        last that makes or reads its gradient.
        """
        gradient = f"grad:{name}"
        after = 0
        for position, step in enumerate(self.steps[layer]["backward"]):
            if name in step.inputs or gradient in (*step.inputs, *step.outputs):
                after = position
        for step in self.recomputable[layer].values():
            if name in step.inputs:
                after = max([after, *events.get(step.operator, ())])
        return after

    def _updates(
        self, layer: int, local: dict[str, str], events: dict[int, tuple[int, ...]]
    ) -> tuple[TrainableUpdate, ...]:
        window, tensors = 2 * self.count - 1 - layer, self.tensors
        names = [name for name, update_window in self.updated.items() if update_window == window]
        sizes = {name: aligned(self.graph.storages[name].bytes) for name in names}
        result = []
        for name in names:
            after = self._updated_after(layer, name, events)
            seconds = tensors[name].update_seconds if name in tensors else 0.0
            apart = 0.0
            if self.apart and name in tensors:
                seconds = accumulate_seconds(tensors[name], self.profile.optimizer)
                apart = clipped_seconds(tensors[name], self.profile.optimizer)
            result.append(
                TrainableUpdate(
                    trainable=local.get(name, name),
                    gradient=local.get(f"grad:{name}", f"grad:{name}"),
                    after=after,
                    roles=self.roles,
                    role_bytes=tuple(map(aligned, self._state_bytes(name))),
                    seconds=seconds,
                    minor=sizes[name] < MINOR_PART * sum(sizes.values()),
                    apart_seconds=apart,
                )
            )
        return tuple(sorted(result, key=lambda update: (update.after, update.trainable)))


def _offloadable(forward: Sequence[LayerOperator], sizes: dict[str, int], least: float) -> frozenset[str]:
    """The candidates with at least so many bytes, and what their operators make besides: one of these that stays off
    the disk, and is not kept, has the operator run again.
    """
    large = {value for value, size in sizes.items() if size >= least}
    together = {value for op in forward if large.intersection(op.outputs) for value in op.outputs}
    return frozenset(large | (together & sizes.keys()))


def _alike(forward: Sequence[LayerOperator], length: int, sizes: dict[str, int]) -> dict[str, str]:
    """Candidate, of those in `sizes`, of a later tile -> the candidate of the first tile that it equals. A tile has
    `length` of the operators `forward`.
    """
    alike: dict[str, str] = {}
    for number, op in enumerate(forward[length:]):
        first = forward[number % length]
        pairs = list(zip(op.outputs, first.outputs))
        if len(op.inputs) == len(first.inputs):  # attention has more inputs from tile to tile
            pairs += zip(op.inputs, first.inputs)
        alike.update(
            (value, like)
            for value, like in pairs
            if value != like and value in sizes and sizes[value] == sizes.get(like)
        )
    return alike


def _events(
    forward: Iterable[LayerOperator], backward: Iterable[LayerOperator], candidates: set[str], recomputable: set[int]
) -> dict[int, tuple[int, ...]]:
    """Forward operation -> backward positions before which it may run again: those of the first backward reader of each
    candidate that it makes, or that is recomputed from what it makes.
    """
    forward, backward = list(forward), list(backward)
    needed_at: dict[str, set[int]] = {}
    first_reader: dict[str, int] = {}
    for t, op in enumerate(backward):
        for value in op.inputs:
            if value in candidates and value not in first_reader:
                first_reader[value] = t
                needed_at[value] = {t}
    events: dict[int, tuple[int, ...]] = {}
    for op in reversed(forward):
        if op.index not in recomputable:
            continue
        times: set[int] = set()
        for value in op.outputs:
            if value in candidates:
                # Once its first backward reader has run the value is resident, whether kept, fetched or recomputed.
                times |= {t for t in needed_at.get(value, ()) if t <= first_reader.get(value, len(backward))}
        if not times:
            continue
        events[op.index] = tuple(sorted(times))
        for value in op.inputs:
            if value in candidates:
                needed_at.setdefault(value, set()).update(times)
    return dict(sorted(events.items()))


MINOR_PART = 1 / 4
"""of what a layer trains: trainables that are a smaller part of it share their decisions, that for values and that for
states
"""
MOVING = (
    WeightMode("disk", "disk", "unpacked"),
    WeightMode("unpacked", "disk", "unpacked"),
    WeightMode("unpacked", "unpacked", "unpacked"),
)
"""modes of a trainable. None keeps it between steps and drops it before the backward: it would be written in every
step
"""
SHARED = (WeightMode("disk", "disk", "disk"),)
UNIFORM = tuple(WeightMode(where, where, where) for where in ("disk", "packed", "unpacked"))
FREE = (
    WeightMode("disk", "disk", "disk"),
    WeightMode("disk", "disk", "packed"),
    WeightMode("disk", "disk", "unpacked"),
    WeightMode("packed", "disk", "packed"),
    WeightMode("packed", "disk", "unpacked"),
    WeightMode("unpacked", "disk", "unpacked"),
    WeightMode("disk", "packed", "disk"),
    WeightMode("disk", "packed", "packed"),
    WeightMode("packed", "packed", "packed"),
    WeightMode("packed", "packed", "unpacked"),
    WeightMode("disk", "unpacked", "disk"),
    WeightMode("disk", "unpacked", "packed"),
    WeightMode("disk", "unpacked", "unpacked"),
    WeightMode("unpacked", "unpacked", "unpacked"),
)


def held_modes(gaps: Iterable[WeightMode]) -> tuple[WeightMode, ...]:
    """The modes of a weight that each window uses several times: it is unpacked anew at each use, or stays as it is,
    packed or unpacked, until the last one. Its places in the gaps are those of the modes `gaps`.
    """
    order = {"disk": 0, "packed": 1, "unpacked": 2}
    found = dict.fromkeys((mode.backward_gap, mode.step_gap) for mode in gaps)
    return tuple(
        WeightMode(behind, ahead, hold)
        for behind, ahead in found
        for hold in order
        if order[hold] >= max(order[behind], order[ahead])
    )


def weight_modes(ahead: bool, behind: bool, recomputing: int, *, late: bool) -> tuple[WeightMode, ...]:
    """The modes that make sense for a weight: `ahead` and `behind` say whether forward and backward operators read it,
    `recomputing` how many operators that may run again do, `late` whether such a re-run may come after the first
    backward use.

    If both do, and at most one such operator, never after the first backward use, the gaps are chosen independently.
    Otherwise every use unpacks the weight for itself, and it is in the same place in all gaps.
    """
    if not ahead or not behind or recomputing > 1 or late:
        return UNIFORM
    if recomputing == 0:
        seen: dict[tuple[str, str], WeightMode] = {}
        for mode in FREE:
            seen.setdefault(
                (mode.backward_gap, mode.step_gap), WeightMode(mode.backward_gap, mode.step_gap, mode.backward_gap)
            )
        return tuple(seen.values())
    return FREE
