"""The whole step over its layers: bytes window by window, time, disk; small models as one program, large ones by columns.

Each layer enters through a few figures (`FIELDS`): bytes it holds between its windows and inside them, seconds of
compute and disk. A window's bytes are what every layer holds at that time plus the layer's own peak there, so two rows
per layer say the same as a row per instruction. Equal layers share columns (decisions with their figures) and pricing
problems, so the cost grows with layer types.

Time: the step lasts as long as its windows; a window at least its compute; and by the end of a window the disk has done
what had to be done by then. Look-ahead is left unbounded, which makes the time a lower bound for the class; what a plan
really takes the simulator says.

Bound: Lagrangian. With row duals of the master, sum of the cheapest priced column of each layer, by the pricing
problem's own proven bound (Dantzig and Wolfe 1960; for its use as a bound see Lasdon 1970).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from planner.formulation import KIB, MS, Block
from planner.layers import Layered, transfer_seconds
from planner.linear import Linear, Program
from planner.pricing import FIELDS, Pool, Prices
from planner.windows import Column, measure

MOVE_PRICE = 1e-4
"""price of a second of disk time beside a second of the step: breaks ties in favour of moving less"""
JOINT_BINARIES = 150
"""models with fewer choices are solved as one program, to optimality"""
OVERFLOW_PRICE = 10.0
"""ms per KiB over the limit, while no fitting combination is known"""
WHOLE_NODES = 20
"""of the search for whole columns: work is counted, not timed, so that the same input gives the same plan"""
WHOLE = 0.999
"""share of one column from which on a layer is not mixed"""
NEAR = 1e-3
"""share of the step's time; columns whose reduced cost is less may be part of a good choice"""
FEW = 5
"""such columns per layer"""
INSTANT = 1e5
"""KiB per ms above which a disk's transfers are taken to need no time of their own"""
ROUNDS = 60
SHARE = 0.25
"""of what pricing could gain, left to the next round once there are new columns"""
Terms = dict[str, Linear]
Progress = Callable[[dict[str, float | str]], None]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Columns chosen per layer, and the proof."""

    columns: tuple[Column, ...]
    bound_seconds: float
    """no plan of the class is faster"""
    proven: bool
    """the columns are optimal for the model, within tolerance"""


@dataclass(frozen=True, kw_only=True)
class Relaxed:
    """The master over the pool's columns, solved as a linear program."""

    value: float
    over: float
    """KiB by which the limit is passed"""
    prices: list[Prices]
    """per layer"""
    convexity: list[float]
    """per layer: what the layer costs at its prices"""
    shares: list[NDArray[np.float64]]
    """per layer: share of each of its type's columns"""


def live_bytes(problem: Layered, columns: tuple[Column, ...]) -> int:
    """Most bytes of live tensors over all windows of the step and of evaluation, exactly."""
    outside = sum(column.outside for column in columns)
    held = outside
    worst = 0
    for layer, column in enumerate(columns):
        held -= column.outside
        worst = max(
            worst,
            held + column.forward_peak + problem.across_forward[layer],
            held + column.backward_peak + problem.across_backward[layer],
            outside - column.outside + column.evaluate_peak + problem.across_evaluate[layer],
        )
        held += column.between
    return worst + problem.constant_bytes


def instruction_count(problem: Layered, columns: tuple[Column, ...]) -> int:
    """Of both schedules; the outcome (loss, token losses) is freed at the end of each."""
    outcome = 1 + (problem.profile.token_losses is not None)
    return sum(column.instructions for column in columns) + 2 * outcome


def charged_bytes(problem: Layered, columns: tuple[Column, ...]) -> int:
    """Live bytes plus what the instructions themselves occupy in the runtime."""
    per_instruction = problem.profile.device.floor.instruction_bytes
    return live_bytes(problem, columns) + per_instruction * instruction_count(problem, columns)


@dataclass(kw_only=True)
class Rows:
    """The step's rows in a model; `limit` is None where the bytes themselves are minimised."""

    program: Program
    bytes: int
    """KiB over all windows, instructions included"""
    total_ms: Linear
    disk_ms: Linear


def add_rows(program: Program, problem: Layered, layers: list[Terms], *, careful: bool = False) -> Rows:
    """Post the rows of the whole step over the layers' figures."""
    count = len(layers)
    used = program.variable()
    instructions = program.variable()
    outcome = 1 + (problem.profile.token_losses is not None)
    program.at_least(Linear(-2.0 * outcome).add(instructions), *(terms["instructions"] for terms in layers))
    per_instruction = problem.profile.device.floor.instruction_bytes / KIB

    def chain(order: list[int], fields: tuple[str, ...]) -> list[Linear]:
        """Running sums over the layers in `order`: entry i is the sum before the i-th."""
        sums: list[Linear] = [Linear()]
        for index in order:
            step = program.variable()
            program.at_least(Linear().add(step).plus(sums[-1], -1.0), *(layers[index][f] for f in fields))
            sums.append(Linear().add(step))
        return sums

    ahead, back = list(range(count)), list(reversed(range(count)))
    before = chain(ahead, ("between",))
    after = chain(back, ("outside",))
    outside = after[count]
    constant = problem.constant_bytes / KIB
    peaks: list[Linear] = [Linear()] * (2 * count)
    """per window: KiB that are left for what waits for the disk"""
    for index, terms in enumerate(layers):
        others = Linear(constant).plus(before[index]).plus(after[count - 1 - index]).add(instructions, per_instruction)
        for moment, across, peak in (
            (index, problem.across_forward[index], "forward_peak"),
            (2 * count - 1 - index, problem.across_backward[index], "backward_peak"),
        ):
            peaks[moment] = Linear(-across / KIB).add(used).plus(others, -1.0).plus(terms[peak], -1.0)
        program.at_least(
            Linear(-constant - problem.across_evaluate[index] / KIB)
            .add(used)
            .add(instructions, -per_instruction)
            .plus(outside, -1.0)
            .plus(terms["outside"]),
            terms["evaluate_peak"],
        )
    clock = [Linear()]
    windows = [*((i, "forward") for i in ahead), *((i, "backward") for i in back)]
    for index, phase in windows:
        now = program.variable()
        program.at_least(Linear().add(now).plus(clock[-1], -1.0), layers[index][f"{phase}_ms"])
        clock.append(Linear().add(now))
    _add_disk(program, problem, layers, clock, peaks, careful=careful)
    nested = chain(back, ("spills_forward_ms", "fetches_backward_ms"))
    spilled = chain(ahead, ("states_spilled_ms",))
    for index in ahead:
        inside = Linear().plus(clock[2 * count - index]).plus(clock[index], -1.0)
        program.at_least(inside, nested[count - index])
        tail = Linear().plus(clock[2 * count]).plus(clock[2 * count - 1 - index], -1.0)
        program.at_least(tail, spilled[index + 1])
    total = program.variable()
    traffic = [name for name in FIELDS if name.startswith(("reads", "spills", "fetches", "states"))]
    program.at_least(Linear().add(total), *(terms[name] for terms in layers for name in traffic))
    program.at_least(Linear().plus(clock[-1]).add(total, -1.0))
    return Rows(program=program, bytes=used, total_ms=clock[-1], disk_ms=Linear().add(total))


def _add_disk(
    program: Program,
    problem: Layered,
    layers: list[Terms],
    clock: list[Linear],
    peaks: list[Linear],
    *,
    careful: bool,
) -> None:
    """What the disk does window by window, and the memory that waits for it.

    A window lasts at least as long as the disk is busy in it. Reads and fetches that come before their window, and
    spills that are not yet written, take memory meanwhile. The rows hold for any plan of the class; with `careful` they
    ask for fetches one window ahead and count a spill to the end of its window, which plans can really keep.
    """
    count = len(layers)
    rates = _kib_per_ms(problem)
    needed = {name: Linear() for name in rates}
    flown = {name: Linear() for name in rates}
    for moment in range(2 * count):
        forward = moment < count
        index = moment if forward else 2 * count - 1 - moment
        terms = layers[index]
        asks = {
            "reads": terms["reads_forward_ms" if forward else "reads_backward_ms"],
            "fetches": Linear() if forward else terms["fetches_backward_ms"],
            "spills": terms["spills_forward_ms"] if forward else Linear(),
        }
        busy = Linear().plus(clock[moment + 1]).plus(clock[moment], -1.0)
        states = [] if forward or not careful else [terms["states_fetched_ms"], terms["states_spilled_ms"]]
        waiting = Linear()
        flows: list[Linear] = []
        for name, rate in rates.items():
            if not rate:
                continue
            before, due = flown[name], needed[name]
            if asks[name].terms or asks[name].constant:
                step = program.variable()
                program.exactly(Linear().add(step), due, asks[name])
                needed[name] = Linear().add(step)
            now = program.variable()
            flown[name] = Linear().add(now)
            flows.append(Linear().add(now).plus(before, -1.0))
            program.at_least(flows[-1])
            if name == "spills":
                # Only what is there can be written; what is not written stays in memory.
                program.at_least(Linear().plus(needed[name]).add(now, -1.0))
                left = Linear().plus(needed[name] if careful else due).add(now, -1.0)
            else:
                program.at_least(Linear().add(now).plus(needed[name], -1.0))
                if careful and name == "fetches":
                    program.at_least(Linear().plus(before).plus(needed[name], -1.0))
                left = Linear().plus(flown[name] if careful else before).plus(needed[name], -1.0)
            held = program.variable()
            program.at_least(Linear().add(held), left)
            waiting.add(held, rate)
        program.at_least(busy, *flows, *states)
        # The window's memory row gains what waits for the disk.
        program.at_least(peaks[moment], waiting)
    if rates["spills"]:
        program.at_least(flown["spills"], needed["spills"])


def _kib_per_ms(problem: Layered) -> dict[str, float]:
    """The least that a millisecond of disk time moves, for each sort of transfer; 0 where there is none."""
    reads: list[float] = []
    spills: list[float] = []
    fetches: list[float] = []
    for kind in problem.types:
        reads.extend(w.packed_bytes / w.read_seconds for w in kind.weights.values() if w.read_seconds)
        for value in kind.offloadable:
            size = kind.raw_bytes[value]
            spills.append(size / transfer_seconds(kind.write, size))
            fetches.append(size / transfer_seconds(kind.read, size))
    result = {}
    for name, rates in (("reads", reads), ("fetches", fetches), ("spills", spills)):
        rate = min(rates, default=0.0) / KIB / MS
        # Nothing ever waits for such a disk, and its rates would spoil the numbers of the program.
        result[name] = rate if rate <= INSTANT else 0.0
    return result


@dataclass(kw_only=True)
class Search:
    """One budget. `limit_bytes` None asks for the fewest bytes instead of the shortest step."""

    pool: Pool
    limit_bytes: int | None
    deadline: float
    careful: bool = False
    tolerance: float = 2e-3
    progress: Progress | None = None
    started: float = field(default_factory=time.monotonic)
    timely: bool = True
    """whether the search for columns came to its end before the deadline"""

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def report(self, stage: str, incumbent: float, bound: float) -> None:
        if self.progress is not None:
            gap = (incumbent - bound) / incumbent if incumbent > 0 else 0.0
            seconds = time.monotonic() - self.started
            self.progress({"stage": stage, "incumbent": incumbent, "bound": bound, "gap": gap, "seconds": seconds})

    def goal(self, rows: Rows, program: Program, limit_bytes: int | None) -> Linear:
        """Objective of the step: its time with a small price on moves, or its bytes."""
        if limit_bytes is None:
            return Linear().add(rows.bytes).plus(rows.total_ms, 1e-6)
        over = program.variable()
        program.at_least(Linear(limit_bytes / KIB).add(over).add(rows.bytes, -1.0))
        self.over = over
        return Linear().plus(rows.total_ms).plus(rows.disk_ms, MOVE_PRICE).add(over, OVERFLOW_PRICE)

    # --- one program -----------------------------------------------------------------------------------------------

    def joint(self) -> Answer | None:
        """All blocks side by side: the optimum of the class. None where nothing fits."""
        problem = self.pool.problem
        program = Program()
        blocks = [Block(program, problem.types[kind]) for kind in problem.layer_type]
        rows = add_rows(
            program, problem, [{name: block.field(name) for name in FIELDS} for block in blocks], careful=self.careful
        )
        goal = self.goal(rows, program, self.limit_bytes)
        if self.limit_bytes is not None:
            program.bounds(self.over, 0.0, 0.0)
        result = program.solve(goal, self.left())
        if result.values is None:
            return None
        values = result.values
        columns = tuple(
            measure(problem.types[kind], block.decision(values)) for kind, block in zip(problem.layer_type, blocks)
        )
        return Answer(columns=columns, bound_seconds=self.bound(result.bound), proven=result.optimal)

    def bound(self, objective: float) -> float:
        """Seconds that no plan undercuts, from a bound on time + MOVE_PRICE * disk time (disk time <= time)."""
        return max(0.0, objective / (1 + MOVE_PRICE) / MS)

    # --- columns ---------------------------------------------------------------------------------------------------

    def columns(self) -> tuple[float, float, bool]:
        """Price columns until the bound meets the master: (bound, master value, whether the limit is kept).

        Past the deadline the bound is the best so far, and `timely` is False.
        """
        best, value, kept = 0.0, float("inf"), False
        for _ in range(ROUNDS):
            try:
                relaxed = self._relaxation(self.limit_bytes)
            except TimeoutError:
                self.timely = False
                break
            steady = value - relaxed.value <= self.tolerance / 4 * relaxed.value
            value, kept = relaxed.value, relaxed.over < 1e-4
            gain, new = self._price(relaxed, best, steady=steady)
            best = max(best, value - gain)
            self.report("columns", value / MS, best / MS)
            if not self.timely or value - best <= self.tolerance / 4 * value or not new:
                break
        return best, value, kept

    def _price(self, relaxed: Relaxed, best: float, *, steady: bool) -> tuple[float, bool]:
        """Price layers until what could still be gained in the others is little: (most that could be gained, new columns).

        The most promising layer first; what its answer proves often settles layers at similar prices. Prices that still
        move are not worth a proof: unless they are `steady`, new columns end the round early.
        """
        pool, kinds, prices = self.pool, self.pool.problem.layer_type, relaxed.prices
        gap = min(1e-2, max(self.tolerance / 10, (relaxed.value - best) / relaxed.value / 10))
        least = [pool.bound(kind, prices[i]) for i, kind in enumerate(kinds)]

        def short(i: int) -> float:
            return max(0.0, relaxed.convexity[i] - least[i])

        def settled(i: int) -> bool:
            # A program is solved to `gap` of its cost: to ask again at such prices would prove no more.
            return not short(i) or pool.known(kinds[i], prices[i]) - least[i] <= 1.5 * gap * least[i]

        little = self.tolerance / 8 * relaxed.value
        some = max(little, SHARE * sum(map(short, range(len(kinds)))))
        open_ = [i for i in range(len(kinds)) if not settled(i)]
        new = False
        while open_ and sum(map(short, range(len(kinds)))) > (some if new and not steady else little):
            most = max(open_, key=short)
            try:
                new = pool.price(kinds[most], prices[most], gap, self.left()) or new
            except TimeoutError:
                self.timely = False
                break
            self.report("pricing", relaxed.value / MS, best / MS)
            open_.remove(most)
            for i in [most, *open_]:
                if pool.stand_in[kinds[i]] == pool.stand_in[kinds[most]]:
                    least[i] = pool.bound(kinds[i], prices[i])
            open_ = [i for i in open_ if not settled(i)]
        return sum(map(short, range(len(kinds)))), new

    def _relaxation(self, limit_bytes: int | None) -> Relaxed:
        """Solve the master over the pool's columns as a linear program; duals as prices of each layer's figures."""
        problem = self.pool.problem
        program = Program()
        layers: list[Terms] = []
        definitions: list[list[int]] = []
        convexity: list[int] = []
        shares: list[list[int]] = []
        for kind in problem.layer_type:
            every = list(range(len(self.pool.columns[kind])))
            variables = [program.variable() for _ in every]
            terms = self._terms(kind, variables, every)
            rows: list[int] = []
            for name in FIELDS:
                figure = program.variable()
                rows.append(program.at_least(Linear().add(figure), terms[name]))
                terms[name] = Linear().add(figure)
            convexity.append(program.exactly(Linear.sum(variables), 1.0))
            shares.append(variables)
            definitions.append(rows)
            layers.append(terms)
        posted = add_rows(program, problem, layers, careful=self.careful)
        goal = self.goal(posted, program, limit_bytes)
        result = program.solve(goal, self.left())
        duals, values = result.duals, result.values
        if duals is None or values is None:
            raise TimeoutError
        return Relaxed(
            value=result.objective,
            over=values[self.over] if limit_bytes is not None else 0.0,
            prices=[np.array([max(0.0, duals[row]) for row in rows]) for rows in definitions],
            convexity=[duals[row] for row in convexity],
            shares=[np.array([values[variable] for variable in variables]) for variables in shares],
        )

    def _terms(self, kind: int, variables: list[int], columns: list[int]) -> Terms:
        """A layer's figures over the variables of some of its columns."""
        terms: Terms = {}
        for name, values in zip(FIELDS, self.pool.figures[kind][columns].T.tolist()):
            total = Linear()
            for variable, value in zip(variables, values):
                if value:
                    total.add(variable, value)
            terms[name] = total
        return terms

    def choose(self, limit_bytes: int | None) -> tuple[Column, ...] | None:
        """Good whole columns within `limit_bytes` over the pool; None where none fits.

        Layers that the linear program mixes get a whole column near their mixture. Then the others stay as they are, or,
        where that costs too much, may take any column that costs little more, or at last any at all.
        """
        kinds = self.pool.problem.layer_type
        relaxed = self._relaxation(limit_bytes)
        if limit_bytes is not None and relaxed.over > 1e-4:
            return None
        mixed = [layer for layer, shares in enumerate(relaxed.shares) if shares.max() < WHOLE]
        for layer in mixed[:FEW]:
            mixture = relaxed.shares[layer] @ self.pool.figures[kinds[layer]][: len(relaxed.shares[layer])]
            self.pool.fill(kinds[layer], relaxed.prices[layer], mixture, 1e-3, self.left())
        near, fixed = [], []
        for layer, kind in enumerate(kinds):
            reduced = self.pool.figures[kind] @ relaxed.prices[layer] - relaxed.convexity[layer]
            used = relaxed.shares[layer]
            reduced[: len(used)][used > 1e-6] = 0.0
            best = np.argsort(reduced, kind="stable")
            near.append([int(i) for i in best[:FEW] if reduced[i] <= NEAR * relaxed.value])
            fixed.append([int(used.argmax())] if used.max() >= WHOLE else [int(i) for i in best[: 2 * FEW]])
        every = [list(range(len(self.pool.columns[kind]))) for kind in kinds]
        found: tuple[float, tuple[Column, ...]] | None = None
        for candidates in (*([fixed] if len(mixed) <= FEW else []), near, every):
            whole = self._whole(limit_bytes, candidates)
            if whole is not None and (found is None or whole[0] < found[0]):
                found = whole
            if found is not None and (found[0] <= (1 + self.tolerance / 2) * relaxed.value or candidates is near):
                break
        return None if found is None else found[1]

    def _whole(self, limit_bytes: int | None, candidates: list[list[int]]) -> tuple[float, tuple[Column, ...]] | None:
        """The best combination of one candidate per layer (indices into the pool's columns), with its objective."""
        problem = self.pool.problem
        program = Program()
        layers: list[Terms] = []
        picks: list[list[int]] = []
        for kind, allowed in zip(problem.layer_type, candidates):
            variables = [program.choice() for _ in allowed]
            program.exactly(Linear.sum(variables), 1.0)
            layers.append(self._terms(kind, variables, allowed))
            picks.append(variables)
        rows = add_rows(program, problem, layers, careful=self.careful)
        goal = Linear().add(rows.bytes).plus(rows.total_ms, 1e-6)
        if limit_bytes is not None:
            goal = Linear().plus(rows.total_ms).plus(rows.disk_ms, MOVE_PRICE)
            program.bounds(rows.bytes, 0.0, limit_bytes / KIB)
        result = program.solve(goal, self.left(), self.tolerance / 2, nodes=WHOLE_NODES)
        chosen = result.values
        if chosen is None:
            return None
        return result.objective, tuple(
            self.pool.columns[kind][allowed[max(range(len(variables)), key=lambda i: chosen[variables[i]])]]
            for kind, allowed, variables in zip(problem.layer_type, candidates, picks)
        )
