"""What can be refused before anything is measured, for whatever profiles, plans and runs in one go: options that the
plan or the run would refuse later, and data of a kind that the model does not take. What is in the data,
`tightfit.runtime.data.sequence` reads first.

Imports neither PyTorch nor NumPy: the memory of reading data, which comes next, counts against the budget.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from tightfit.planner.search_options import PlanOptions, check_policy
from tightfit.profiles.sources.lookup import names_module
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.data.samples import checked_columns
from tightfit.runtime.data.tokenization import RANDOM
from tightfit.runtime.engine.kernels.optimizer import OPTIMIZERS
from tightfit.runtime.session.options import RunOptions, TrainingOptions

SINGLE = ("eps", "eps2", "beta2_decay", "clip_threshold", "momentum")
"""options that are fields of the optimizers that have them, by the same names"""
Data = str | os.PathLike[str] | Iterable[Any]


def check_beforehand(
    model: str | os.PathLike[str],
    data: Data,
    *,
    planning: PlanOptions,
    training: RunOptions,
) -> None:
    """Raise InputError for what the plan or the run of `model` would refuse, as far as that can be told without a
    profile.
    """
    check_policy(planning.policy or "solver")
    training.check_end()
    check_held_out(training)
    optimizer = planning.policy if planning.policy in OPTIMIZERS else planning.optimizer
    optimizer_settings(optimizer or "adamw", training)
    checked_columns(training.columns)
    module = names_module(model)
    check_data(data, training.columns, module=module)
    if training.eval_data is not None:
        check_data(training.eval_data, None, module=module)


def check_held_out(options: RunOptions) -> None:
    """Raise InputError where evaluations are asked for and there is nothing to evaluate on."""
    if options.eval_every is not None and options.eval_data is None:
        raise InputError(
            f"{spelled('eval_every')} {options.eval_every}: there is nothing to evaluate on; give held-out data"
        )


def check_data(data: Data, columns: Mapping[str, str] | None, *, module: bool) -> None:
    """Raise InputError for data of a kind that a language model, or a module, is not trained on."""
    name = os.fspath(data) if isinstance(data, str | os.PathLike) else None
    if columns and (module or name == RANDOM):
        raise InputError(
            f"{spelled('columns')} {', '.join(columns.values())}: the data given have none; leave them out"
        )
    if module and name not in (None, RANDOM):
        raise InputError(
            f"a module trains on batches of tensors (from Python) or on 'random', its sample batch; got {name!r}"
        )
    if not module and name is None:
        raise InputError("a language model trains on a file of samples, a directory of them, or 'random'")


def optimizer_settings(name: str, options: TrainingOptions) -> dict[str, Any]:
    """Those settings of the optimizer `name` that `options` give and not all optimizers have. Raises InputError for one
    that it does not have.
    """
    optimizer = OPTIMIZERS[name]
    betas: tuple[float, float] | None = getattr(optimizer, "betas", None)
    available = {"beta1": betas is not None, "beta2": betas is not None, "momentum": name == "momentum"}
    for option in ("beta1", "beta2", *SINGLE):
        value = getattr(options, option)
        if value is not None and not available.get(option, hasattr(optimizer, option)):
            raise InputError(
                f"{spelled(option)} {value:g}: the plan's optimizer, {name}, has none; leave it out, or plan with"
                " another optimizer"
            )
    settings: dict[str, Any] = {key: getattr(options, key) for key in SINGLE if getattr(options, key) is not None}
    if betas is not None:
        replaced = (options.beta1, options.beta2)
        settings["betas"] = tuple(old if new is None else new for old, new in zip(betas, replaced, strict=True))
    return settings
