"""Finds the best schedules of small bare graphs by exhaustive search over states, written from the graph's rules alone.

A state is the set of outputs in memory and the set of operators that have run. An operator can run if its inputs are in
memory and its output is not; while it runs, its inputs, its output, its workspace, every other output in memory and the
fixed bytes count. Freeing costs nothing.
"""

from __future__ import annotations

import heapq
import random

INFINITY = float("inf")


def best(operators, budget, order="any", fixed=0):
    """Seconds of the fastest schedule within `budget` bytes; infinity if there is none.

    `operators`: dicts as in the graph's JSON. `order`: ``any`` allows every order; ``first`` makes the first runs of
    operators follow the list; with ``stages`` the recomputations between two first runs follow the list too.
    """
    return _search(operators, order, lambda seconds, _: seconds, budget - fixed)


def least(operators, order="any", fixed=0):
    """The smallest budget in bytes at which `best` finds a schedule."""
    return fixed + _search(operators, order, lambda _, peak: peak, INFINITY)


def _search(operators, order, cost, budget):
    index = {op["name"]: i for i, op in enumerate(operators)}
    inputs = [[index[name] for name in op.get("inputs", [])] for op in operators]
    size = [op["output_bytes"] for op in operators]
    count = len(operators)
    everything = (1 << count) - 1
    keep = sum(1 << i for i, op in enumerate(operators) if op.get("keep_until_end"))
    by_peak = cost(0, 1) == 1
    start = (0, 0, -1)  # in memory, has run, last run of this stage
    heap = [(0, start)]
    settled = set()
    while heap:
        value, state = heapq.heappop(heap)
        if state in settled:
            continue
        settled.add(state)
        live, done, last = state
        if done == everything and live & keep == keep:
            return value
        held = sum(size[i] for i in range(count) if live >> i & 1)
        following = []
        for i in range(count):
            bit = 1 << i
            if live & bit:
                following.append((value, (live & ~bit, done, last)))
                continue
            if any(not live >> j & 1 for j in inputs[i]):
                continue
            again = bool(done & bit)
            if again and not operators[i].get("recomputable", True):
                continue
            if order != "any" and not again and done != bit - 1:
                continue
            if order == "stages" and again and i <= last:
                continue
            here = held + size[i] + operators[i].get("workspace_bytes", 0)
            if here > budget:
                continue
            spent = max(value, here) if by_peak else value + operators[i]["seconds"]
            stays = -1 if order != "stages" or not again else i
            following.append((spent, (live | bit, done | bit, stays)))
        for item in following:
            if item[1] not in settled:
                heapq.heappush(heap, item)
    return INFINITY


def random_graph(seed, most=7):
    """Operators of a small random graph: a chain, a training chain, a layered DAG or a U-shape; costs equal or not."""
    rng = random.Random(seed)
    shape = rng.choice(("chain", "training", "layered", "u"))
    count = rng.randint(2, most)
    equal = rng.random() < 0.3
    if shape == "chain":
        inputs = [[i - 1] if i else [] for i in range(count)]
    elif shape == "training":
        half = count // 2
        count = 2 * half
        inputs = [[i - 1] if i else [] for i in range(half)]
        inputs += [sorted({half + i - 1, half - 1 - i}) for i in range(half)]
    elif shape == "layered":
        inputs = [sorted(rng.sample(range(i), rng.randint(1, min(3, i)))) if i else [] for i in range(count)]
    else:
        inputs = [[i - 1] if i else [] for i in range(count)]
        for i in range(count // 2 + 1, count):
            inputs[i] = sorted({i - 1, count - 1 - i})
    operators = []
    for i in range(count):
        op = {
            "name": f"op{i}",
            "seconds": 1 if equal else rng.randint(0, 5),
            "output_bytes": 1 if equal else rng.randint(0, 6),
            "inputs": [f"op{j}" for j in inputs[i]],
        }
        if not equal and rng.random() < 0.3:
            op["workspace_bytes"] = rng.randint(1, 4)
        if rng.random() < 0.1:
            op["recomputable"] = False
        if rng.random() < 0.1:
            op["keep_until_end"] = True
        if shape == "training":
            op["phase"] = "forward" if i < count // 2 else "backward"
        operators.append(op)
    return operators
