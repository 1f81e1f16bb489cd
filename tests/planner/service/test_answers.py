"""A model is asked over HTTP, by itself and with a run's adapter: the text comes as it is made, as `tightfit generate`
makes it.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sqlite3
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from damage import MEASURED
from served import Served, service

from tightfit.planner.service.client import connect
from tightfit.planner.service.http.example import example_profile
from tightfit.planner.service.jobs.orders import JobOrder
from tightfit.planner.service.jobs.work.answer import _command, _TextSoFar
from tightfit.planner.service.jobs.work.commands import carry_out
from tightfit.planner.service.jobs.work.inputs import extract
from tightfit.planner.service.wire.objects import ObjectStore
from tightfit.profiles.sources.gguf_source import gguf_source
from tightfit.profiles.sources.huggingface import directory_source
from tightfit.runtime.common.errors import CapError, InputError, RunError
from tightfit.runtime.common.strict_json import to_json

UNKNOWN = "0" * 64
RUN = "job-0123456789abcdef"


def asked(tmp_path, **request):
    objects = ObjectStore(tmp_path / "objects")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        entry = tarfile.TarInfo("adapter/adapter_config.json")
        entry.size = 2
        archive.addfile(entry, io.BytesIO(b"{}"))
    profile, adapter = objects.put(example_profile()), objects.put(packed.getvalue())
    for written in (profile, adapter):
        objects.place(written.digest, written.staged)
    return JobOrder(
        kind="answer",
        request={"profile": "p", "run": None, "prompt": "hi", "max_tokens": 7, "template": True, "memory": None}
        | request,
        objects=str(objects.folder),
        memory_bytes=None,
        digests={"p": profile.digest, RUN: adapter.digest},
        command=["tightfit"],
        paths={"source": "/models/tiny.gguf"},
    )


def test_a_request_becomes_a_command_that_reads_the_prompt_from_a_file(tmp_path):
    words = _command(asked(tmp_path), tmp_path)
    prompts = f"--prompts={tmp_path / 'prompts.jsonl'}"
    assert words == [
        "tightfit",
        "generate",
        "/models/tiny.gguf",
        "--json",
        "--stream",
        prompts,
        "--memory=auto",
        "--max-tokens=7",
    ]
    assert json.loads((tmp_path / "prompts.jsonl").read_text()) == {"prompt": "hi"}
    talk = [{"role": "user", "content": "--help\n"}]
    words = _command(asked(tmp_path, run=RUN, prompt=talk, template=False, memory=1 << 30), tmp_path)
    assert words[-3:] == ["--max-tokens=7", "--no-template", f"--adapter={tmp_path / 'adapter'}"]
    assert "--memory=1073741824" in words
    assert (tmp_path / "adapter" / "adapter_config.json").read_text() == "{}"
    assert json.loads((tmp_path / "prompts.jsonl").read_text()) == {"prompt": talk}


def test_the_text_is_told_as_it_comes():
    told = []
    lines = [{"piece": "a "}, {"piece": "fox"}, {"text": "a fox", "tokens": 2}]
    code = "".join(f"print({to_json(line)!r});" for line in lines) + "print('words of a library')"
    events = SimpleNamespace(progress=lambda **what: told.append(what["text"]))
    with Path("/dev/null").open("rb") as lock:
        assert carry_out([sys.executable, "-c", code], "it", lock.fileno(), _TextSoFar(events)) == lines[-1]
    assert told == ["a ", "a fox"]


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        ('print(\'{"error": {"message": "no such model"}}\'); exit(2)', InputError, "^no such model$"),
        ("import sys; sys.stderr.write('lost\\n'); exit(5)", CapError, "^the answer ended with status 5: lost$"),
        ("import os; os.kill(os.getpid(), 9)", RunError, "^the answer was ended by SIGKILL: it said nothing$"),
        ("", RunError, "ended with status 0: it said nothing"),
    ],
)
def test_what_a_command_fails_with_is_raised(code, error, message):
    with Path("/dev/null").open("rb") as lock, pytest.raises(error, match=message):
        carry_out([sys.executable, "-c", code], "the answer", lock.fileno())


def test_what_cannot_be_asked_is_refused_at_once(tmp_path):
    with service(tmp_path, example=True) as http:
        (example,) = http.get("/v1/profiles").json()["items"]

        def refused(status, field, **body):
            answer = http.post("/v1/answers", json={"profile": example["id"], "prompt": "hi"} | body)
            assert answer.status_code == status, answer.text
            error = answer.json()["error"]
            assert [fault["field"] for fault in error["fields"]] == ([] if field is None else [field])
            return error["message"]

        assert refused(422, "body.profile").startswith("the example was measured on another machine")
        assert "no profile" in refused(404, "body.profile", profile=UNKNOWN)
        refused(422, "body.max_tokens", max_tokens=0)
        assert http.post("/v1/answers", json={"profile": example["id"], "prompt": []}).status_code == 422


def service_bytes(served):
    with contextlib.closing(sqlite3.connect(served.data / "service.sqlite")) as database:
        return database.execute("SELECT sum(stored_bytes) FROM files").fetchone()[0]


@pytest.mark.slow
def test_a_model_answers_by_itself_and_with_the_adapter_of_a_run(tmp_path, work, measured, tightfit):
    shutil.copytree(measured, tmp_path / "data")
    served = Served(tmp_path / "data", "--root", str(work)).start()
    try:
        made = served.result("/v1/profiles", **MEASURED)["profile"]
        plan = served.result("/v1/plans", profile=made, memory="1GiB", policy="keep-all")["plan"]
        run = served.wait(served.ask("/v1/runs", plan=plan, data="data.jsonl", steps=12, lr=0.5))
        assert run["state"] == "succeeded", run
        texts = []
        with connect(served.url) as client:
            plain = client.answer(made, "the fox ", max_tokens=12, progress=lambda what: texts.append(what.get("text")))
            tuned = client.answer(made, "the fox ", run=run["id"], max_tokens=12)
            talk = client.answer(made, [{"role": "user", "content": "fox?"}], max_tokens=3, memory=1 << 30)
            with pytest.raises(InputError, match="there is no job"):
                client.answer(made, "the fox ", run=RUN)
            with pytest.raises(InputError, match=f"the run {run['id']} was not merged"):
                client._send("GET", f"/v1/runs/{run['id']}/merged")
            # The adapter is added to the model where it lies.
            packed = client.merged(run["id"], tmp_path / "merged.tar", "safetensors")
            with tarfile.open(packed) as archive:
                extract(archive, tmp_path)
            file = client.merged(run["id"], tmp_path / "merged.gguf")
        merged = directory_source(tmp_path / "merged")
        original = directory_source(work / "model")
        assert {name: entry.shape for name, entry in merged.entries.items()} == {
            name: entry.shape for name, entry in original.entries.items()
        }
        assert (tmp_path / "merged" / "model.safetensors").read_bytes() != (
            work / "model" / "model.safetensors"
        ).read_bytes()
        assert gguf_source(file).config["hidden_size"] == original.config["hidden_size"]
        again = served.http.post("/v1/merges", json={"run": run["id"], "format": "gguf"})
        assert (again.status_code, again.json()["kind"]) == (200, "merge")
        kept = service_bytes(served)
        assert served.http.delete(f"/v1/jobs/{again.json()['id']}").status_code == 204
        assert service_bytes(served) == kept - file.stat().st_size
        code, out, _ = tightfit("generate", work / "model", "--prompt", "the fox ", "--max-tokens", 12, "--json")
        assert code == 0
        assert plain["text"] == json.loads(out)["text"]
        assert 0 < plain["tokens"] <= 12
        assert tuned["text"] != plain["text"]
        assert talk["budget_bytes"] == 1 << 30
        assert all(plain["text"].startswith(text) for text in texts if text)
        assert not list((served.data / "objects" / "tmp").glob("answer-*"))
        # What an answer needs cannot be deleted while it waits; afterwards the run's adapter can.
        assert served.http.delete(f"/v1/jobs/{run['id']}").status_code == 204
    finally:
        served.stop()
