"""The options of a search in one record, and checks of budget, time limit and gap."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, SupportsIndex

from pydantic import Field

from tightfit.profiles.option_fields import Options, option
from tightfit.runtime.common.errors import InputError

TIME_LIMIT = 30.0
"""seconds for one plan, unless others are asked for"""
LONGEST_LIMIT = 86400.0
"""largest time limit in seconds: a day"""
NEIGHBOUR_BYTES = 50 << 20
"""distance in bytes between the budgets whose bounds are compared to value memory"""
SOLVER = "solver"
"""the policy that is no fixed rule"""
POLICY_NAMES = (
    SOLVER, "keep-all", "checkpoint-layers", "checkpoint-sqrt", "mebp", "mesp", "mezo", "lcsb", "mobillm",
)  # fmt: skip
"""the solver, and the rules in `planner/solve/policies.py`, which is not imported here, as it takes much memory"""
SearchProgress = Callable[[dict[str, float | str]], None]
Seconds = Annotated[float, Field(gt=0, le=LONGEST_LIMIT)]
"""time that planning may take"""
Gap = Annotated[float, Field(ge=0, lt=1)]
"""share of a step's time by which a plan may be slower than the best that is proven, for its search to end"""


class PlanOptions(Options):
    """How one budget is planned for (`tightfit.planner.plan.plan` says more of each).

    The fields made by `option` are the options, with the same words, of `tightfit plan` and `compare`, of the service's
    `/v1/plans` and `/v1/comparisons` and of the forms on its page (`tightfit.profiles.option_fields`). Where several
    policies are compared, a list takes the place of `policy`.
    """

    policy: str | None = option(
        None,
        "A fixed rule instead of the solver: keep-all, checkpoint-layers, checkpoint-sqrt, mebp or mesp; mezo or lcsb,"
        " whose gradient is not the exact one; mobillm, the part of a device whose side network a server trains; for a"
        " bare graph one of the first three.",
    )
    time_limit: Seconds | None = option(
        None,
        f"Seconds the solver may take for one plan. Without it {TIME_LIMIT:g}, and on as long as there is neither a"
        " plan nor a proof that none fits.",
        over_http="Seconds the solver may take for one plan.",
        metavar="SECONDS",
        primary=True,
    )
    gap: Gap = option(
        0.0,
        "End a search once its plan is proven to be slower than the best of its kind by at most this share, for example"
        " 0.001 for 0.1 %; 0: go on to the proof, as long as that gains anything within the time limit.",
        metavar="SHARE",
    )
    optimizer: Literal["adamw", "adam", "sgd", "momentum", "lion", "adafactor"] | None = option(
        None,
        "adamw (unless another is named), adam, sgd, momentum, lion or adafactor: what it keeps of each trained tensor"
        " is in the plan.",
        metavar="NAME",
        primary=True,
    )
    max_grad_norm: float | None = option(
        None,
        "Clip gradients: scale all of an update down together to a norm of at most X, as torch.nn.utils.clip_grad_norm_"
        " does.",
        label="Largest gradient norm",
        metavar="X",
        gt=0,
    )
    progress: SearchProgress | None = None

    @property
    def seconds(self) -> float:
        """The time limit, where none is given the usual one."""
        return TIME_LIMIT if self.time_limit is None else self.time_limit


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """The parts that a search consists of, each of which can be switched off.

    Planning uses all of them. `tests/benchmarks/ablation.py` plans with one switched off at a time and reports what the
    part is worth, so that parts worth nothing are deleted.
    """

    # --- models ---
    one_program: bool = True
    """all decisions of a small model in one integer program; off: column generation"""
    greedy: bool = True
    """a first schedule of columns that are known, chosen greedily"""
    early_choice: bool = True
    """whole columns chosen near the first mixtures, before columns are priced under careful constraints"""
    careful: bool = True
    """columns priced under constraints that plans can really keep"""
    reserves: bool = True
    """further choices of columns that leave other shares of the arena free, once one has given a schedule"""
    reserve_pricing: bool = True
    """columns priced anew for a larger reserve, where schedules wait for the disk"""
    stand_ins: bool = True
    """one pricing program for all layer types that differ only in what an evaluation leaves resident"""
    rounding: bool = True
    """the local search that fits whole columns into what the mixtures hold"""
    few_free: bool = True
    """the integer program over a few mixed layers"""
    all_near: bool = True
    """the integer program over all layers and the columns near their mixtures"""
    rules: bool = True
    """fixed rules realised beside the search, so that no plan is slower than one of them"""
    spreading: bool = True
    """transfers moved within a smaller share of the arena, where moved within all of it they leave no layout"""
    moving_in_place: bool = True
    """transfers moved only as far as the layout of the drafted schedule allows"""
    packing: bool = True
    """the search for a packing of the arena, where no rule packs it well enough"""
    # --- bare graphs ---
    exact: bool = True
    """small graphs solved by one program over all schedules of the class"""
    exact_moves: bool = True
    """small graphs with a disk solved exactly by CP-SAT"""
    chains: bool = True
    """the optimal checkpoints of a chain as a starting point"""
    sweep: bool = True
    """a sweep that evicts what is read farthest ahead as a starting point"""
    ruin_and_recreate: bool = True
    """random re-runs of a schedule taken back and others put in their place"""
    cuts: bool = True
    """linear programs with further moments and paths, after the first"""
    paths: bool = True
    """rows of paths (33) in these"""
    few_moments: bool = True
    """integer programs of few moments"""
    refined: bool = True
    """integer programs with the moments of the best linear program, and more round by round"""
    crowded: bool = True
    """rows of crowded runs (35) in these"""
    polishing: bool = True
    """re-optimisation of stretches of the schedule"""
    prices: bool = True
    """searches with transfers at several prices of the disk; off: at one"""
    shares: bool = True
    """searches with transfers within smaller shares of the budget"""


ALL = SearchOptions()
"""every part is on"""


def check_policy(policy: str) -> None:
    """Raise InputError for a name that is no policy for any model."""
    if policy not in POLICY_NAMES:
        raise InputError(f"no policy is called {policy!r}; choose one of {', '.join(POLICY_NAMES)}")


def checked_budget(budget_bytes: object) -> int:
    """A budget in bytes as a plain int. Raises InputError where it is not an int above 0."""
    if isinstance(budget_bytes, bool) or not isinstance(budget_bytes, SupportsIndex):
        raise InputError(
            f"a budget is an int of bytes, not {budget_bytes!r}; `tightfit.parse_size` makes one of '600MiB'"
        )
    size = operator.index(budget_bytes)
    if size <= 0:
        raise InputError(f"a budget of {budget_bytes} bytes is no budget; name a positive size such as 600MiB")
    return size


def checked_limit(time_limit: float) -> float:
    """A time limit in seconds. Raises InputError where no plan can be given it (`PlanOptions`)."""
    return PlanOptions(time_limit=time_limit).seconds


def checked_gap(gap: float) -> float:
    """The gap at which a search may stop. Raises InputError where no plan can be given it (`PlanOptions`)."""
    return PlanOptions(gap=gap).gap
