"""Finds the best schedules of tiny bare graphs with offloading by exhaustive search over states, from the rules alone.

Besides running and freeing, a schedule may write a resident output to the disk (once), and fetch one that was written
and is no longer resident; its memory is taken when the fetch is issued. The disk does one transfer at a time, in the
order in which they are issued; a transfer takes latency + bytes / bandwidth. A run waits for the fetches of its inputs,
a free waits for the write of what it frees (and for a fetch of it). The graph is done when the last run and the last
transfer are.
"""

from __future__ import annotations

import heapq

INFINITY = float("inf")


def best(operators, channels, budget, order="any", fixed=0):
    """Seconds of the fastest schedule within `budget` bytes; infinity if there is none.

    `order`: ``any`` allows every order; ``first`` makes the first runs of operators follow the list; with ``stages``
    the recomputations between two first runs, or after the last, follow the list too, and moves happen only before a
    run or at the end: writes, then frees, then fetches, each in the list's order.
    """
    return _search(operators, channels, order, budget - fixed)


def least(operators, channels, order="any", fixed=0):
    """The smallest budget in bytes at which `best` finds a schedule.

    Moves take no time in this search: only bytes matter.
    """
    instant = {way: {"bytes_per_second": INFINITY, "latency_seconds": 0} for way in channels}
    timeless = [op | {"seconds": 0} for op in operators]
    high = sum(op["output_bytes"] + op.get("workspace_bytes", 0) for op in operators)
    low = 0
    while low < high:
        middle = (low + high) // 2
        if _search(timeless, instant, order, middle) < INFINITY:
            high = middle
        else:
            low = middle + 1
    return fixed + low


def _search(operators, channels, order, budget):
    index = {op["name"]: i for i, op in enumerate(operators)}
    inputs = [[index[name] for name in op.get("inputs", [])] for op in operators]
    size = [op["output_bytes"] for op in operators]
    work = [op.get("workspace_bytes", 0) for op in operators]
    count = len(operators)

    def transfer(way, i):
        return channels[way]["latency_seconds"] + size[i] / channels[way]["bytes_per_second"]

    writing = [transfer("write", i) for i in range(count)]
    reading = [transfer("read", i) for i in range(count)]
    everything = (1 << count) - 1
    keep = sum(1 << i for i, op in enumerate(operators) if op.get("keep_until_end"))
    # A state: outputs in memory, operators that have run, outputs on disk, seconds until the disk is idle, transfers
    # under way as (direction, operator, seconds until it ends), last run of this stage, last move before the next run
    # (kind and operator).
    start = (0, 0, 0, 0, (), -1, (0, -1))
    heap = [(0, 0, start)]
    settled = set()
    ticket = 0
    while heap:
        now, _, state = heapq.heappop(heap)
        if state is None:
            return now
        if state in settled:
            continue
        settled.add(state)
        live, done, disk, idle, under_way, last, gap = state
        held = sum(size[i] for i in range(count) if live >> i & 1)
        following = []

        def moved(kind, i, gap=gap):
            """The state's new `gap` (last move before the next run) after a move; None if the order forbids it."""
            if order != "stages":
                return (0, -1)
            return (kind, i) if (kind, i) > gap else None

        def begun(way, i, seconds, under_way=under_way):
            return tuple(sorted([*under_way, (way, i, seconds)])) if seconds else under_way

        def later(delay, idle=idle, under_way=under_way):
            """(seconds until the disk is idle, transfers still under way), `delay` seconds from now."""
            return max(0, idle - delay), tuple((way, i, end - delay) for way, i, end in under_way if end > delay)

        if done == everything and live & keep == keep:
            following.append((now + idle, None))
        for i in range(count):
            bit = 1 << i
            if live & bit:
                if not disk & bit and (mark := moved(0, i)) is not None:
                    end = idle + writing[i]
                    following.append((now, (live, done, disk | bit, end, begun("write", i, end), last, mark)))
                if (mark := moved(1, i)) is not None:
                    delay = max([0, *(end for _, j, end in under_way if j == i)])
                    following.append((now + delay, (live & ~bit, done, disk, *later(delay), last, mark)))
                continue
            if disk & bit and held + size[i] <= budget and (mark := moved(2, i)) is not None:
                end = idle + reading[i]
                following.append((now, (live | bit, done, disk, end, begun("read", i, end), last, mark)))
            if any(not live >> j & 1 for j in inputs[i]):
                continue
            again = bool(done & bit)
            if again and not operators[i].get("recomputable", True):
                continue
            if order != "any" and not again and done != bit - 1:
                continue
            if order == "stages" and again and i <= last:
                continue
            if held + size[i] + work[i] > budget:
                continue
            delay = max([0, *(end for way, j, end in under_way if way == "read" and j in inputs[i])])
            spent = delay + operators[i]["seconds"]
            stays = -1 if order != "stages" or not again else i
            following.append((now + spent, (live | bit, done | bit, disk, *later(spent), stays, (0, -1))))
        for value, item in following:
            if item is None or item not in settled:
                ticket += 1
                heapq.heappush(heap, (value, ticket, item))
    return INFINITY
