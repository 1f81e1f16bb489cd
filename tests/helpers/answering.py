"""Answers inside the test process: plans with chosen figures, the decoder with its cache, and what transformers
answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tightfit.planner.generation.answer_plan import GenerationPlan, laid_out, plan_answers
from tightfit.planner.generation.problem import Figures, Problem, RowPiece
from tightfit.profiles.models.decoder_config import handwritten
from tightfit.profiles.models.transformers_decoder import facts
from tightfit.profiles.sources.lookup import resolve
from tightfit.profiles.steps.answer_tracing import answer_steps
from tightfit.profiles.weights.store_file import build_store
from tightfit.runtime.engine.cpu.cached_attention_sizes import GROUP
from tightfit.runtime.engine.device.channels import TransferChannel
from tightfit.runtime.engine.generation.cached_decoder import CachedDecoder
from tightfit.runtime.engine.generation.decoder import open_decoder
from tightfit.runtime.engine.generation.names import multiply_key, unpack_key, unpacked_key
from tightfit.runtime.engine.training.adapter import BODY, WEIGHTS
from tightfit.runtime.engine.training.devices import open_device
from tightfit.runtime.engine.weights.layout import read_header
from tightfit.runtime.engine.weights.store import WeightStore
from tightfit.runtime.results.generation import pairs_of
from tightfit.runtime.results.generation_figures import job_of

BESIDE = 3 << 20
"""bytes that the processes of `figures` hold beside the arena, without the allowance for the heap"""


def figures(pieces: Sequence[RowPiece], *, unpacked: float = 0.5, read: float = 1e-9, core: float = 1e-10) -> Figures:
    """Figures with which a matrix that stays unpacked takes `unpacked` of the seconds of one that is unpacked every
    time.
    """
    rates: dict[str, float] = {}
    for piece in pieces:
        entry = piece.entry
        rates[unpack_key(entry.format, entry.group, entry.columns)] = 1e-9
        for rows in (1, GROUP):
            rates[multiply_key(rows, entry.columns)] = rows * 1e-9
            rates[unpacked_key(rows, entry.columns)] = rows * 1e-9 * unpacked * 2
    return Figures(
        start_bytes=0,
        base_bytes={"0": BESIDE - (7 << 18)},
        rates=rates,
        group_seconds=1e-4,
        token_seconds=1e-5,
        key_seconds=1e-8,
        read_seconds_per_byte=read,
        read_core_seconds_per_byte=core,
        front_bytes=1 << 20,
    )


def plan_of(problem: Problem, states: Sequence[str], pass_tokens: int) -> GenerationPlan:
    """A plan whose matrices are in these states in turn, and whose passes take up to so many tokens of the prompt."""
    pieces = problem.pieces()
    turns = [states[number % len(states)] for number in range(len(pieces))]
    return laid_out(problem, figures(pieces), pieces, turns, pass_tokens, budget=1 << 40)


def packed(folder: Path, **precision: Any) -> Path:
    """The packed store of a model, beside it."""
    return build_store(resolve(str(folder), **precision), folder / "stores")


def problem_of(
    config: dict[str, Any], store: Path, prompt: int, answer: int, *, adapter: Path | None = None, **more: Any
) -> Problem:
    entries = read_header(store).entries
    body = BODY if handwritten(config) else facts(config).config.get("adapter_body", BODY)
    pairs = {} if adapter is None else pairs_of(adapter, body, entries, "the model")
    return Problem(
        steps=answer_steps(config, entries, prompt + answer),
        entries=entries,
        prompt_tokens=prompt,
        answer_tokens=answer,
        pairs=pairs,
        **more,
    )


@contextmanager
def opened(
    problem: Problem,
    plan: GenerationPlan,
    store: Path,
    adapter: Path | None = None,
    body: str = BODY,
    channel: TransferChannel | None = None,
) -> Iterator[CachedDecoder]:
    """The decoder of a plan, in this process; `body` is what the adapter calls the model's, `channel` what reads
    ahead.
    """
    file = None if adapter is None else str(adapter / WEIGHTS)
    job = job_of(problem, plan, store, cap_bytes=1 << 62, adapter=file, body=body)
    channel = channel or TransferChannel()
    with WeightStore.open(store) as weights, torch.no_grad():
        yield open_decoder(job, open_device(vars(job)), weights, channel)
        channel.close()


def planned(problem: Problem, budget: int, **figured: Any) -> GenerationPlan:
    return plan_answers(problem, figures(problem.pieces(), **figured), budget)


def greedy(decoder: CachedDecoder, ids: Sequence[int], count: int) -> tuple[list[int], torch.Tensor]:
    """The tokens that follow `ids`, each the likeliest, and the logits of all of them."""
    new, answer, logits = list(ids), [], []
    for _ in range(count):
        found = decoder.run(new, lambda: None)
        logits.append(found.clone())
        new = [int(found.argmax())]
        answer += new
    return answer, torch.stack(logits)


def answered_by_transformers(model: Any, ids: Sequence[int], count: int) -> list[int]:
    """What transformers generates greedily, with its own cache, and no end."""
    made = model.generate(
        torch.tensor([list(ids)]), do_sample=False, max_new_tokens=count, min_new_tokens=count, pad_token_id=0
    )
    return made[0, len(ids) :].tolist()  # type: ignore[no-any-return]
