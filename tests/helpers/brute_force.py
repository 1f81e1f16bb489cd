"""Tries every decision of the planner's class on a small chain: a reference written from the rules, not from the
planner.

The disk is assumed to be instant (no latency, infinite bandwidth); a transfer costs compute time only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

PLACES = ("disk", "packed", "unpacked")


def modes(two_gaps: bool) -> list[tuple[str, str, str]]:
    """The modes of a weight that the class allows, each as three places ("disk", "packed" or "unpacked").

    The places are: from forward to backward, from backward to the next forward, and inside the backward window after a
    recomputation. Without `two_gaps`, for a weight that no backward operator reads, the three are the same.
    """
    if not two_gaps:
        return [(place, place, place) for place in PLACES]
    result = []
    for behind, ahead, hold in itertools.product(PLACES, PLACES, PLACES):
        if {behind, ahead} == {"packed", "unpacked"}:
            continue
        holds = {"unpacked": {"unpacked"}, "packed": {"packed", "unpacked"}, "disk": set(PLACES)}[behind]
        if behind == "disk" and ahead == "packed":
            holds = {"disk", "packed"}
        if hold in holds:
            result.append((behind, ahead, hold))
    return result


def cost(channel, size: int) -> float:
    """Compute seconds of one transfer."""
    return channel.compute_seconds_per_transfer + size * channel.compute_seconds_per_byte


def round_up(size: int, unit: int) -> int:
    return (size + unit - 1) // unit * unit


@dataclass
class Chain:
    """A profile's layers, operators and sizes as plain dicts, and the decisions that they leave open."""

    profile: object

    def __post_init__(self):
        profile = self.profile
        self.tensors = {tensor.name: tensor for tensor in profile.tensors}
        self.programs = {program.name: program for program in profile.programs}
        self.layers = []
        for layer in profile.layers:
            program = self.programs[layer.program]
            names = {v.name: layer.bindings.get(v.name, f"{layer.name}/{v.name}") for v in program.values}
            kinds = {names[v.name]: v.kind for v in program.values}
            sizes = {names[v.name]: v.bytes for v in program.values}
            ops = [
                (o.phase, [names[i] for i in o.inputs], [names[x] for x in o.outputs], o.seconds)
                for o in program.operators
            ]
            self.layers.append(
                {
                    "forward": [o for o in ops if o[0] == "forward"],
                    "backward": [o for o in ops if o[0] == "backward"],
                    "kinds": kinds,
                    "sizes": sizes,
                }
            )
        self.size = {n: s for layer in self.layers for n, s in layer["sizes"].items()}
        self.kind = {n: k for layer in self.layers for n, k in layer["kinds"].items()}

    def choices(self, index: int) -> Iterator[dict]:
        """Every decision for one layer: fates of activations, modes of weights, places of optimizer states."""
        layer = self.layers[index]
        made = {name: op for op in layer["forward"] for name in op[2]}
        read = {name for op in layer["backward"] for name in op[1]}
        wanted, open_ = list(read), []
        while wanted:
            name = wanted.pop()
            if name in open_ or self.kind[name] != "activation" or name == "loss":
                continue
            open_.append(name)
            if name in made:
                wanted.extend(made[name][1])
        weights = [n for n, k in layer["kinds"].items() if k == "weight"]
        trainables = [n for n, k in layer["kinds"].items() if k == "trainable"]
        for fate in itertools.product(*[("keep", "offload", "drop")] * len(open_)):
            for places in itertools.product(*[modes(self._behind(layer, w)) for w in weights]):
                for away in itertools.product(*[(False, True)] * len(trainables)):
                    yield {
                        "fate": dict(zip(open_, fate)),
                        "weights": dict(zip(weights, places)),
                        "away": dict(zip(trainables, away)),
                    }

    @staticmethod
    def _behind(layer, weight) -> bool:
        return any(weight in op[1] for op in layer["backward"])

    def count(self) -> int:
        total = 1
        for index in range(len(self.layers)):
            total *= sum(1 for _ in self.choices(index))
        return total

    def all(self) -> Iterator[tuple[int, float]]:
        """(peak bytes, seconds) of every feasible combination of the layers' decisions."""
        listed = [
            [(choice, order) for choice in self.choices(i) if (order := self._order(i, choice)) is not None]
            for i in range(len(self.layers))
        ]
        for combination in itertools.product(*listed):
            yield Run(self, combination).result()

    def _order(self, index: int, choice: dict) -> list | None:
        """The backward operators in order, with recomputed operators before the ones that need them; None if
        infeasible.
        """
        layer = self.layers[index]
        made = {name: op for op in layer["forward"] for name in op[2]}
        there = {name for name, fate in choice["fate"].items() if fate != "drop"}
        order = []

        def bring(name) -> bool:
            if self.kind[name] != "activation" or name == "loss" or name in there:
                return True
            if name not in made:
                return False
            op = made[name]
            for source in op[1]:
                if not bring(source):
                    return False
            if any(choice["fate"].get(output) == "offload" for output in op[2]):
                return False
            order.append(op)
            there.update(op[2])
            return True

        for op in layer["backward"]:
            for name in op[1]:
                if not bring(name):
                    return None
            order.append(op)
        return order


class Run:
    """One combination of decisions, executed step by step while counting memory and time."""

    def __init__(self, chain: Chain, combination) -> None:
        self.chain = chain
        self.combination = combination
        self.live: dict[str, int] = {}
        self.peak = 0
        self.seconds = 0.0
        device = chain.profile.device
        self.device = device

    def add(self, name: str) -> None:
        if name not in self.live:
            if name.startswith("packed:"):
                size = round_up(self.chain.tensors[name[7:]].packed_bytes, 4096)
            elif name.startswith("state"):
                size = round_up(self.chain.size[name[7:]], 64)
            else:
                size = round_up(self.chain.size[name], 64)
            self.live[name] = size
            self.peak = max(self.peak, sum(self.live.values()))

    def drop(self, name: str) -> None:
        self.live.pop(name, None)

    def start(self) -> None:
        self.live = {}
        for name, kind in self.chain.kind.items():
            if kind in ("batch", "trainable", "constant"):
                self.add(name)
        for choice, _ in self.combination:
            for weight, (_, ahead, _) in choice["weights"].items():
                if ahead != "disk":
                    self.add(weight if ahead == "unpacked" else f"packed:{weight}")
            for trainable, away in choice["away"].items():
                if not away:
                    self.add(f"state1:{trainable}")
                    self.add(f"state2:{trainable}")

    def load(self, weight: str) -> None:
        if weight in self.live:
            return
        if f"packed:{weight}" not in self.live:
            self.add(f"packed:{weight}")
            self.seconds += cost(self.device.read, self.chain.tensors[weight].packed_bytes)
        self.add(weight)
        self.seconds += self.chain.tensors[weight].unpack_seconds

    def result(self) -> tuple[int, float]:
        self.start()
        used = [{name for op in order for name in op[1]} for _, order in self.combination]
        for index in range(len(self.chain.layers)):
            self.forward(index, used, train=True)
        for index in reversed(range(len(self.chain.layers))):
            self.backward(index)
        step = self.seconds
        self.start()
        for index in range(len(self.chain.layers)):
            self.forward(index, used, train=False)
        return self.peak, step

    def forward(self, index: int, used, *, train: bool) -> None:
        layer = self.chain.layers[index]
        choice, _ = self.combination[index]
        ops = layer["forward"]
        for position, (_, inputs, outputs, seconds) in enumerate(ops):
            for name in inputs:
                if self.chain.kind[name] == "weight":
                    self.load(name)
                    behind, ahead, _ = choice["weights"][name]
                    if (behind if train else ahead) != "packed":
                        self.drop(f"packed:{name}")
            for name in outputs:
                self.add(name)
            self.seconds += seconds
            for name in [*inputs, *outputs]:
                if any(name in op[1] for op in ops[position + 1 :]):
                    continue
                if self.chain.kind[name] == "weight":
                    behind, ahead, _ = choice["weights"][name]
                    if (behind if train else ahead) != "unpacked":
                        self.drop(name)
                elif self.chain.kind[name] == "activation" and name != "loss":
                    following = self.chain.layers[index + 1 :]
                    if any(name in op[1] for other in following for op in other["forward"]):
                        continue
                    fate = choice["fate"].get(name)
                    if train and fate == "offload" and name in used[index]:
                        self.seconds += cost(self.device.write, self.chain.size[name])
                    if not (train and fate == "keep" and name in used[index]):
                        self.drop(name)

    def backward(self, index: int) -> None:
        layer = self.chain.layers[index]
        choice, order = self.combination[index]
        direct = layer["backward"]
        for position, op in enumerate(order):
            _, inputs, outputs, seconds = op
            later = order[position + 1 :]
            for name in inputs:
                if choice["fate"].get(name) == "offload" and name not in self.live:
                    self.add(name)
                    self.seconds += cost(self.device.read, self.chain.size[name])
            for name in inputs:
                if self.chain.kind[name] == "weight":
                    self.load(name)
                    behind, ahead, hold = choice["weights"][name]
                    after = hold if any(name in o[1] for o in later) else ahead
                    if not (behind == ahead == "packed" or after == "packed"):
                        self.drop(f"packed:{name}")
            for name in outputs:
                self.add(name)
            self.seconds += seconds
            for name in [*inputs, *outputs]:
                if any(name in o[1] for o in later):
                    continue
                kind = self.chain.kind[name]
                if kind == "weight":
                    if choice["weights"][name][1] != "unpacked":
                        self.drop(name)
                elif kind == "gradient":
                    before = self.chain.layers[:index]
                    if name.startswith("grad:") or any(name in o[1] for other in before for o in other["backward"]):
                        continue
                    self.drop(name)
                elif kind == "activation" and name != "loss":
                    self.drop(name)
            for name in inputs:
                again = self.chain.kind[name] == "weight" and any(name in o[1] for o in later)
                if again and choice["weights"][name][2] != "unpacked":
                    self.drop(name)
            if op in direct:
                self.update(choice, direct, direct.index(op))

    def update(self, choice, direct, position: int) -> None:
        for trainable, away in choice["away"].items():
            touching = [i for i, op in enumerate(direct) if trainable in op[1] or f"grad:{trainable}" in op[2]]
            if max(touching) != position:
                continue
            names = [f"state1:{trainable}", f"state2:{trainable}"]
            size = self.chain.size[trainable]
            for name in names:
                if away:
                    self.add(name)
                    self.seconds += cost(self.device.read, size) + cost(self.device.write, size)
            self.seconds += self.chain.tensors[trainable].update_seconds
            for name in names:
                if away:
                    self.drop(name)
            self.drop(f"grad:{trainable}")
