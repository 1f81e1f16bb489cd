"""A plan's training in the process of the tests: the executor as the capped child runs it, without the child."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from planner.schema import Plan
from runtime.channels import Channel
from runtime.job import compile_job
from runtime.optimizer import OPTIMIZERS
from runtime.training import Training


def make_training(plan: Plan, records: str, directory: Path, *, lr: float, seed: int = 7) -> Training:
    """The job of a plan, loaded; `records` is a file of prepared data."""
    optimizer = OPTIMIZERS[plan.optimizer["name"]](lr=lr)
    settings = {
        "store": plan.model.store,
        "data": records,
        "evaluation": records,
        "out": str(directory),
        "steps": 1,
        "seed": seed,
        "base_model": "tiny",
        "optimizer": dataclasses.asdict(optimizer),
    }
    return Training(compile_job(plan.model_dump(), settings), Channel(), str(directory))
