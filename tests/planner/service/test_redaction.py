"""What clients are told of the server's paths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightfit.planner.service.wire.redaction import Redaction, with_paths
from tightfit.planner.service.wire.schema import Error, ServiceJob
from tightfit.profiles.schema import Model


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
    request = {
        "source": "/srv/models/llama",
        "data": "random",
        "seq": 16,
        "eval_data": None,
        "adapter": "/srv/models/a",
    }
    error = Error(code="input", message="/srv/models/llama/config.json: not JSON")
    job = ServiceJob(
        id="job-0123456789abcdef",
        kind="profile",
        state="failed",
        created=0.0,
        attempts=1,
        label="l",
        request=request,
        error=error,
    )
    told = Redaction([Path("/srv/models")]).job(job)
    assert told.request == request | {"source": "llama", "adapter": "a"}
    assert told.error.message == "llama/config.json: not JSON"


FOLDERS = [Path("/srv/my models"), Path("/var/lib/data/cache"), Path("/var/lib/data")]
INSIDE = st.lists(st.from_regex(r"[A-Za-z0-9][\w-]{0,8}", fullmatch=True), min_size=1, max_size=3).map("/".join)
PATHS = st.builds(lambda folder, inside: f"{folder}/{inside}", st.sampled_from([*FOLDERS, Path("/home/me")]), INSIDE)
WORDS = st.sampled_from(["org/model", "samples/s", "", "random"])
DATA = st.recursive(
    PATHS | WORDS | st.none() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from("abc"), inner),
)


@given(DATA)
def test_no_path_is_left_in_json(data):
    told = json.dumps(Redaction(FOLDERS).value(data))
    assert not any(root in told for root in ("/srv", "/var", "/home"))
    assert told.count("org/model") == json.dumps(data).count("org/model")


@given(PATHS | WORDS, st.none() | PATHS, st.none() | PATHS | WORDS)
def test_a_model_is_told_without_paths_and_finds_them_again(source, store, base):
    config = {"layers": 2} | ({} if base is None else {"adapter_base": base})
    model = Model(name="m", source=source, kind="decoder", store=store, config=config)
    told, paths = Redaction(FOLDERS).model(model)
    assert not any(root in told.model_dump_json() for root in ("/srv", "/var", "/home"))
    assert with_paths(told, json.loads(json.dumps(paths))) == model
