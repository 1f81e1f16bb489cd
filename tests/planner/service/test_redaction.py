"""What clients are told of the server's paths."""

from __future__ import annotations

from pathlib import Path

import pytest

from tightfit.planner.service.http.redaction import Redaction
from tightfit.planner.service.wire.schema import Error, Job


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("/srv/my models/llama/config.json: not JSON (line 1)", "llama/config.json: not JSON (line 1)"),
        ("'/srv/my models/a b.jsonl' is empty; give data", "'a b.jsonl' is empty; give data"),
        ("/srv/my models: no model.safetensors", "my models: no model.safetensors"),
        ("/srv/my models-2/x: denied", "my models-2/x: denied"),
        ("/var/lib/tightfit/data/runs/job-1/out: the disk is full", "runs/job-1/out: the disk is full"),
        ("[Errno 2] No such file or directory: '/usr/lib/python3/x.py'", "[Errno 2] No such file or directory: 'x.py'"),
        ("look into /tmp/a/b.c.", "look into b.c."),
        ("(/home/me/.cache/huggingface)", "(huggingface)"),
        (
            "file:///etc/passwd, see https://pytorch.org/docs/stable",
            "file:///etc/passwd, see https://pytorch.org/docs/stable",
        ),
        ("2.5 MiB/s, read/write, 1 / 2, and/or, n/a", "2.5 MiB/s, read/write, 1 / 2, and/or, n/a"),
        ("org/model: no such directory", "org/model: no such directory"),
    ],
)
def test_paths_are_relative_to_what_is_open_or_names(words, told):
    redaction = Redaction([Path("/srv/my models"), Path("/var/lib/tightfit/data"), Path("/")])
    assert redaction.text(words) == told


def test_a_link_s_target_is_an_open_folder_too(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    redaction = Redaction([tmp_path / "link"])
    assert redaction.text(f"{tmp_path}/real/a.json: damaged") == "a.json: damaged"
    assert redaction.text(f"{tmp_path}/link/a.json: damaged") == "a.json: damaged"


def test_a_job_tells_its_request_and_its_error_so():
    request = {"source": "/srv/models/llama", "data": "random", "seq": 16, "eval_data": None}
    error = Error(code="input", message="/srv/models/llama/config.json: not JSON")
    job = Job(
        id="job-0123456789abcdef", kind="profile", state="failed", created=0.0, attempts=1, request=request, error=error
    )
    told = Redaction([Path("/srv/models")]).job(job)
    assert told.request == request | {"source": "llama"}
    assert told.error.message == "llama/config.json: not JSON"
