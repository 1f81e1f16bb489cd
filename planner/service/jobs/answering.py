"""The job that answers a prompt with a model that was measured here, and a run's adapter if one is named: `tightfit generate`, whose
text is told as it comes.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import tempfile
from functools import partial
from pathlib import Path
from signal import SIGKILL
from typing import IO

from tightfit.planner.service.jobs.orders import EventWriter, JobOrder
from tightfit.planner.service.jobs.running import failure_of, wait_for
from tightfit.planner.service.jobs.store import Row
from tightfit.planner.service.wire.redaction import with_paths
from tightfit.profiles.io import parse_profile
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.parent import end_with_parent
from tightfit.runtime.common.strict_json import to_json

AUTO = "auto"
"""memory where none is asked for: what the machine can spare"""


def answer(order: JobOrder, events: EventWriter) -> Row:
    """Answer a prompt, alone on the device."""
    assert order.lock is not None
    events.progress(always=True, stage="waiting for the device")
    with (
        Path(order.lock).open("w") as lock,
        tempfile.TemporaryDirectory(dir=Path(order.objects) / "tmp", prefix="answer-") as folder,
    ):
        wait_for(lock.fileno(), sys.stdin.fileno())
        events.progress(always=True, stage="preparing")
        command = _command(order, Path(folder))
        with tempfile.TemporaryFile() as stderr:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                pass_fds=(lock.fileno(),),
                preexec_fn=partial(end_with_parent, SIGKILL),  # noqa: PLW1509  no thread runs yet
            )
            assert child.stdout is not None
            answered = _follow(child.stdout, events)
            code = child.wait()
            stderr.seek(0)
            last = (stderr.read().decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
    if code or "text" not in answered:
        raise failure_of(code, answered, f"the answer {{}}: {last}")
    figures = ("text", "tokens", "seconds", "first_seconds", "end", "peak_bytes", "budget_bytes")
    return {"result": {name: answered.get(name) for name in figures}, "files": []}


def _follow(lines: IO[bytes], events: EventWriter) -> Row:
    """Tell the text as it comes; returns the last object that was printed: the answer, or an error."""
    text, last = "", {}
    for line in lines:
        try:
            last = json.loads(line)
        except ValueError:
            continue
        if "piece" in last:
            text += last["piece"]
            events.progress(stage="answering", text=text)
    return last


def _command(order: JobOrder, folder: Path) -> list[str]:
    request = order.request
    profile = parse_profile(order.content(request["profile"]), f"the stored profile {request['profile']}")
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
        with tarfile.open(fileobj=io.BytesIO(order.content(request["run"]))) as archive:
            archive.extractall(folder, filter="data")
        words.append(f"--adapter={folder / 'adapter'}")
    return words
