"""Prepares answers of a model, with an adapter or without, under a budget: weights packed, prompts tokenised, a plan
made.

`tightfit generate` and `tightfit chat` hand what is prepared here to the process that shows answers
(`tightfit.runtime.supervision.answering`, `tightfit.runtime.results.chat`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tightfit.planner.generation.answer_plan import GenerationPlan, plan_answers
from tightfit.planner.generation.problem import AdapterPair, Problem
from tightfit.profiles.measuring.cpu_load import our_cores
from tightfit.profiles.measuring.cpu_quota import quota_cores, useful_threads
from tightfit.profiles.models.answer_steps import INSTEAD, Answers
from tightfit.profiles.option_fields import keywords_of
from tightfit.profiles.sources.lookup import end_tokens, longest_sequence, resolve_traced, tokenizer_file
from tightfit.profiles.sources.storing import stored_weights
from tightfit.profiles.sources.tokenizer_file import TokenizerFile
from tightfit.profiles.sources.tokenizer_memory import KnownMemory
from tightfit.profiles.weights.source import Source
from tightfit.profiles.worker_process import held_bytes, predicted_bytes
from tightfit.runtime.common.errors import InfeasibleError, InputError
from tightfit.runtime.common.files import cache_directory, read_whole
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.run_folder import writing_to
from tightfit.runtime.common.units import MIB, format_size
from tightfit.runtime.data.samples import Prompt, parse_prompt
from tightfit.runtime.engine.device.resident import memory
from tightfit.runtime.engine.start.process import child_environment
from tightfit.runtime.engine.training.adapter import BODY, WEIGHTS
from tightfit.runtime.engine.weights.layout import Entry, read_header
from tightfit.runtime.results.adapter_changes import AdapterFolder
from tightfit.runtime.results.answer_options import CONTEXT, AnswerOptions
from tightfit.runtime.results.answer_texts import TABLE, answer_texts
from tightfit.runtime.results.evaluation import temporary_folder
from tightfit.runtime.results.generation_figures import CHILD, job_of, measured
from tightfit.runtime.results.generation_steps import answers_of
from tightfit.runtime.results.place import adapter_folder
from tightfit.runtime.session.output import locked
from tightfit.runtime.supervision import answering
from tightfit.runtime.supervision.answering import AnswerOrder, answers
from tightfit.runtime.supervision.training_process import RunOrder

QUESTION = 128
"""tokens of a question in a conversation, for which the plan is to be fast"""


@dataclass(frozen=True, kw_only=True)
class AnsweringModel:
    """A model that is ready to answer, but for a plan."""

    source: Source
    steps: Answers
    tokenizer: TokenizerFile
    store: Path
    fingerprint: str
    entries: dict[str, Entry]
    ends: list[int]
    """tokens that end an answer by what the model's files say"""
    longest: int | None
    """tokens that the model was made for"""
    pairs: dict[str, AdapterPair]
    adapter: Path | None
    body: str


@keywords_of(AnswerOptions)
def generate(
    model: str, prompts: Prompt | Sequence[Prompt], budget: int, options: AnswerOptions
) -> list[dict[str, Any]]:
    """The answers of a model to one prompt (a string, or a tuple of messages) or a list of them, within `budget` bytes.

    The options are those of `tightfit generate`. The memory of this program does not count, and of the budget as much
    is left unused as the command's own process would take. `shown` is called with the text as it comes. Returns for
    each prompt `text`, `end` ("end", "length"), `tokens`, `seconds`, `token_seconds` and `peak_bytes` as predicted and
    as measured, and more. Raises what `prepared` raises, CapError and RunError.
    """
    single = isinstance(prompts, str) or (isinstance(prompts, tuple) and all(isinstance(one, dict) for one in prompts))
    asked: list[Any] = [prompts] if single else list(prompts)
    if not asked:
        return []
    found = []
    with prepared(model, budget, options, prompts=asked, counted=False) as order:
        assert order.prompts is not None
        with answers(order) as asking, open(order.prompts, encoding="utf-8") as lines:
            for prompt, line in zip(asked, lines, strict=True):
                for text in asking.ask(json.loads(line)["ids"]):
                    if options.shown:
                        options.shown(text)
                found.append({"prompt": prompt, **asking.answered})
    return found


@contextmanager
def prepared(
    model: str,
    budget: int,
    options: AnswerOptions,
    *,
    prompts: Sequence[Prompt] | None,
    as_json: bool = False,
    stream: bool = False,
    debug: bool = False,
    counted: bool = True,
    told: Callable[[GenerationPlan], None] = lambda plan: None,
) -> Iterator[AnswerOrder]:
    """Prepare answers to `prompts`, or with None a conversation, within `budget` bytes of all processes that then live.

    `told` is called with the plan. Yields the order to carry out, by a process whose memory counts if that is
    `counted`; its files lie in a temporary folder, which is removed when the block ends. Raises InputError for a model,
    adapter or prompt that cannot be used, InfeasibleError where the budget is too small, RunError if measuring fails.
    """
    ready = open_model(model, options)
    vocab_size = ready.source.config["vocab_size"]
    with temporary_folder() as directory, locked(directory) as lock:
        texts = answer_texts(
            ready.tokenizer,
            directory,
            prompts,
            vocab_size=vocab_size,
            ends=ready.ends,
            system=options.system,
            template=options.template,
        )
        encoded = texts.prompts
        problem = _problem(ready, options, encoded)
        tokenizer = None
        if encoded is None:
            from tightfit.runtime.results import chat

            front = chat.command("--measure", str(directory), str(problem.context))
            tokenizer = KnownMemory.of(ready.tokenizer)
            called = f"chat {problem.context} {tokenizer.place.stem}"
        else:
            with writing_to(directory):
                _write_prompts(directory / "prompts", prompts or (), encoded)
            front, called = answering.command("--measure"), "generate"
        threads = options.threads or useful_threads(our_cores(), quota_cores())
        if options.stages:
            options.stages("measuring", 0, 1)
        figures = measured(
            problem,
            ready.store,
            ready.fingerprint,
            front,
            called=called,
            threads=threads,
            force=options.force,
        )
        if options.stages:
            options.stages("measuring", 1, 1)
        plan = plan_answers(problem, figures, budget, options.choose)
        if tokenizer is not None and tokenizer.bytes > budget:
            raise InfeasibleError(
                f"the budget of {format_size(budget)} is too small: loading the tokenizer, before the conversation"
                f" begins, takes {format_size(tokenizer.bytes)}; give {spelled('memory')}"
                f" {-(-tokenizer.bytes // MIB)}MiB or more",
                tokenizer.bytes,
            )
        told(plan)
        job = job_of(
            problem,
            plan,
            ready.store,
            cap_bytes=budget - plan.front_bytes,
            adapter=None if ready.adapter is None else str(ready.adapter),
            body=ready.body,
        )
        summary = plan.summary()
        run = RunOrder(
            directory=str(directory),
            lock=lock,
            environment=child_environment(threads),
            planned={
                "budget_bytes": budget,
                "supervisor_bytes": plan.front_bytes,
                "peak_bytes": plan.peak_bytes,
            },
            cgroup=options.cgroup,
            evaluates=True,
            module=CHILD,
            called="process that computes answers",
            anew=f"measure again with {spelled('force', True)}",
        )
        with writing_to(directory):
            job.write(run.job)
        yield AnswerOrder(
            run=run,
            table=str(directory / TABLE),
            prompts=None if encoded is None else str(directory / "prompts"),
            several=encoded is not None and len(encoded) > 1,
            ends=texts.ends,
            max_tokens=options.max_tokens,
            sampling=asdict(options.sampling),
            system=options.system,
            vocabulary=vocab_size,
            plan=summary,
            as_json=as_json,
            stream=stream,
            debug=debug,
            counted=counted,
            preparation_bytes=memory().peak + held_bytes(),
            stage_bytes={
                "preparing the answers": {
                    "predicted": predicted_bytes() or None,
                    "measured": memory().peak + held_bytes(),
                }
            },
            group=None,
            home=None,
        )


def open_model(model: str, options: AnswerOptions) -> AnsweringModel:
    """Open a model, pack its weights into the cache unless they are there, and check the adapter.

    Raises InputError for what cannot answer, by name, with what to do.
    """
    adapter, stages = options.adapter, options.stages
    source, bundle = resolve_traced(model, options.bundle, base=options.base, embeddings=options.embeddings)
    if source.kind == "module":
        raise InputError(f"{source.name} is a module of your own and no language model; call it yourself")
    longest = longest_sequence(model)
    if stages and bundle is None:
        stages("tracing", 0, 1)
    steps = answers_of(source) if bundle is None else bundle.answers
    steps.of(longest or CONTEXT)  # refuses what cannot answer, before its weights are packed
    tokenizer = tokenizer_file(model)
    if tokenizer is None:
        raise InputError(f"{source.name} has no tokenizer; put tokenizer.json beside its config.json")
    pack = (lambda _, done, total: stages("packing the weights", done, total)) if stages else None
    store = stored_weights(source, cache_directory() / "stores", pack)
    header = read_header(store)
    body = source.config.get("adapter_body", BODY)
    folder = None if adapter is None else adapter_folder(Path(adapter).absolute())
    return AnsweringModel(
        source=source,
        steps=steps,
        tokenizer=tokenizer,
        store=store,
        fingerprint=header.fingerprint,
        entries=header.entries,
        ends=end_tokens(model),
        longest=longest,
        pairs={} if folder is None else pairs_of(folder, body, header.entries, source.name),
        adapter=None if folder is None else folder / WEIGHTS,
        body=body,
    )


def pairs_of(folder: Path, body: str, entries: dict[str, Entry], name: str) -> dict[str, AdapterPair]:
    """The pairs of an adapter. Raises InputError for one that is not of this model or holds more than pairs."""
    given = AdapterFolder(folder, body)
    if given.tables:
        raise InputError(
            f"{folder}: the adapter holds {', '.join(sorted(given.tables))}, trained in full, which tightfit"
            f" cannot generate with beside a packed base; {INSTEAD}"
        )
    pairs = {}
    for weight in given.weights:
        entry = entries.get(weight)
        if entry is None or len(entry.shape) != 2 or not re.search(r"\.\d+\.", weight):
            raise InputError(f"{folder}: holds a pair for {weight}, which {name} lacks; give an adapter of this model")
        pair = given.pair(weight, entry.shape)
        assert pair is not None
        pairs[weight] = AdapterPair(rank=pair.rank, scale=pair.scale, dora=pair.dora)
    return pairs


def _problem(ready: AnsweringModel, options: AnswerOptions, encoded: Sequence[Sequence[int]] | None) -> Problem:
    """What is to be planned. Raises InputError where the model was not made for so many tokens."""
    if encoded is None:
        context = options.context or min(CONTEXT, ready.longest or CONTEXT)
        if context <= options.max_tokens:
            raise InputError(
                f"{spelled('context')} {context} leaves no room for a question beside an answer of {options.max_tokens}"
                f" tokens; give more, or a smaller {spelled('max_tokens')}"
            )
        prompt = context - options.max_tokens
    else:
        prompt = max(map(len, encoded))
        context = prompt + options.max_tokens
    if ready.longest is not None and context > ready.longest:
        raise InputError(
            f"{prompt} tokens of a prompt and {options.max_tokens} of its answer are more than the {ready.longest}"
            f" positions that {ready.source.name} was made for; give a smaller {spelled('max_tokens')}"
        )
    problem = Problem(
        steps=ready.steps.of(context),
        entries=ready.entries,
        prompt_tokens=prompt,
        answer_tokens=options.max_tokens,
        new_tokens=None if encoded else QUESTION,
        sampling=options.sampling,
        pairs=ready.pairs,
        cache_dtype=options.cache,
    )
    apart = sorted(ready.pairs.keys() - set(problem.form.matrices()))
    if apart:
        raise InputError(f"the adapter holds a pair for {apart[0]}, with which nothing is multiplied; {INSTEAD}")
    return problem


def _write_prompts(path: Path, prompts: Sequence[Prompt], encoded: Sequence[list[int]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for prompt, ids in zip(prompts, encoded, strict=True):
            file.write(json.dumps({"prompt": prompt, "ids": ids}) + "\n")


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts in a file: of JSON lines ("prompt": a string or a list of messages) where its name ends with .jsonl,
    else one a line.

    Raises InputError for a file that cannot be read, or holds none.
    """
    try:
        lines = read_whole(path).splitlines()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give a file of prompts, one a line") from error
    found: list[Prompt] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(parse_prompt(line) if path.suffix == ".jsonl" else line.decode())
        except InputError as error:
            raise InputError(f"{path}: line {number}: {error}") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: line {number} is not UTF-8 (byte {error.start} of it)") from error
    if not found:
        raise InputError(f"{path}: no prompt; write one a line")
    return found
