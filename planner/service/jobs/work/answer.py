"""The job that answers a prompt with a model that was measured here, and a run's adapter if one is named: `tightfit
generate`, whose text is told as it comes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tightfit.planner.service.jobs.orders import EventWriter, JobOrder
from tightfit.planner.service.jobs.store import Row
from tightfit.planner.service.jobs.work.commands import carry_out
from tightfit.planner.service.jobs.work.inputs import adapter_of, profile_of
from tightfit.planner.service.jobs.work.run import device
from tightfit.planner.service.wire.redaction import with_paths
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.strict_json import to_json

AUTO = "auto"
"""memory where none is asked for: what the machine can spare"""
FIGURES = ("text", "tokens", "seconds", "first_seconds", "end", "peak_bytes", "budget_bytes")


def do(order: JobOrder, events: EventWriter) -> Row:
    """Answer a prompt, alone on the device."""
    with (
        device(order, events) as lock,
        tempfile.TemporaryDirectory(dir=Path(order.objects) / "tmp", prefix="answer-") as folder,
    ):
        events.progress(always=True, stage="preparing")
        command = _command(order, Path(folder))
        answered = carry_out(command, "the answer", lock, _TextSoFar(events))
    return {"result": {name: answered.get(name) for name in FIGURES}, "files": []}


class _TextSoFar:
    """Tells the text of the pieces that come."""

    def __init__(self, events: EventWriter) -> None:
        self._events, self._text = events, ""

    def __call__(self, printed: Row) -> None:
        if "piece" in printed:
            self._text += printed["piece"]
            self._events.progress(stage="answering", text=self._text)


def _command(order: JobOrder, folder: Path) -> list[str]:
    request = order.request
    profile = profile_of(order)
    if profile.model.kind != "decoder":
        raise InputError(f"{profile.model.name} is no language model, and answers nothing")
    model = with_paths(profile.model, order.paths)
    prompts = folder / "prompts.jsonl"
    prompts.write_text(to_json({"prompt": request["prompt"]}) + "\n")
    memory = request["memory"]
    words = [*order.command, "generate", model.source, "--json", "--stream", f"--prompts={prompts}"]
    words += [f"--memory={AUTO if memory is None else memory}", f"--max-tokens={request['max_tokens']}"]
    words += [f"--{name}={bits}" for name, bits in (("base", model.base), ("embeddings", model.embeddings)) if bits]
    if not request["template"]:
        words.append("--no-template")
    if request["run"] is not None:
        words.append(f"--adapter={adapter_of(order, folder)}")
    return words
