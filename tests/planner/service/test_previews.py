"""Data shown as a run would read them: with the tokenizer of a model that was measured here, from a root or an
upload.
"""

from __future__ import annotations

import pytest
from damage import CONFIG, ROWS, lines
from served import Served, service
from tiny_models import byte_level_tokenizer, random_weights, write_directory

from tightfit.planner.service.client import connect
from tightfit.planner.service.http.example import example_profile
from tightfit.planner.service.jobs.store import JobStore
from tightfit.planner.service.jobs.work.keeping import keep_profile
from tightfit.planner.service.wire.objects import ObjectStore
from tightfit.planner.service.wire.redaction import Redaction
from tightfit.profiles.api import profile
from tightfit.runtime.common.errors import InputError

SEQ = 40


@pytest.fixture(scope="module")
def served(tmp_path_factory, cache):
    """A service to whose store a profile was added as if it had measured it."""
    folder = tmp_path_factory.mktemp("previews")
    root = folder / "root"
    write_directory(root / "model", CONFIG, random_weights(CONFIG), tokenizer=byte_level_tokenizer())
    (root / "data.jsonl").write_text(lines([*ROWS, {"prompt": "the fox " * 40, "completion": "yes"}]) + "{\n")
    (folder / "data").mkdir()
    made = profile(root / "model", seq=SEQ, batch=2, lora_rank=4, device="phone")
    model, paths = Redaction([root]).model(made.model)
    made = made.model_copy(update={"model": model})
    objects = ObjectStore(folder / "data" / "objects")
    row = keep_profile(objects, made, origin="made", paths=paths)
    store = JobStore(folder / "data" / "service.sqlite", objects)
    store.add(row)
    store.close()
    assert made.model.source == "model"
    service = Served(folder / "data", "--root", str(root)).start()
    service.profile = row["id"]
    yield service
    assert service.stop() == 0
    assert not [line for line in service.lines() if line["level"] == "error"]


@pytest.mark.slow
def test_samples_are_shown_and_lines_refused(served):
    shown = served.result("/v1/previews", profile=served.profile, data="data.jsonl")
    assert [sample["line"] for sample in shown["samples"]] == [1, 2, 3]
    texts = [("".join(p["text"] for p in s["pieces"]), s["pieces"][-1]) for s in shown["samples"]]
    assert texts[0][0].endswith("Is the fox quick? positive<|im_end|>")
    assert [last for _, last in texts] == [{"text": f"{row['completion']}<|im_end|>", "trained": True} for row in ROWS]
    assert [refused["line"] for refused in shown["refused"]] == [4, 5]
    assert f"positions where the plan has {SEQ}" in shown["refused"][0]["why"]
    assert (shown["counted"], shown["cut"], shown["whole"], shown["seq"]) == (5, 0, True, SEQ)
    cut = served.result("/v1/previews", profile=served.profile, data="data.jsonl", truncate=True)
    assert (cut["cut"], [refused["line"] for refused in cut["refused"]]) == (1, [5])
    # More samples in a row, less padding.
    packed = served.result("/v1/previews", profile=served.profile, data="data.jsonl", packing=True)
    assert 0 < packed["padding_share"] < shown["padding_share"] < 1


@pytest.mark.slow
def test_uploaded_data_are_shown_with_their_columns(served):
    with connect(served.url) as client:
        asked = [{"question": "Is it? ", "reply": "yes"}]
        file = served.data / "asked.jsonl"
        file.write_text(lines(asked))
        data = client.upload_data(file)
        columns = {"prompt": "question", "completion": "reply"}
        shown = client.preview(served.profile, data, columns=columns)
        assert [piece["trained"] for piece in shown["samples"][0]["pieces"]] == [False, True]
        assert shown["samples"][0]["file"] == "asked.jsonl"
        (refused,) = client.preview(served.profile, data)["refused"]
        assert "reply" in refused["why"]
        with pytest.raises(InputError, match="no upload"):
            client.preview(served.profile, f"upload:{'0' * 64}")
        with pytest.raises(InputError, match="is no file or folder under a folder that is open"):
            client.preview(served.profile, "../data/asked.jsonl")
    assert not list((served.data / "objects" / "tmp").glob("preview-*"))


@pytest.mark.slow
def test_a_model_that_is_not_here_shows_nothing(tmp_path):
    with service(tmp_path, example=True) as http:
        (example,) = http.get("/v1/profiles").json()["items"]
        body = {"profile": example["id"], "data": "random"}
        answer = http.post("/v1/previews", json=body)
        assert (answer.status_code, answer.json()["error"]["fields"][0]["field"]) == (422, "body.profile")
        assert answer.json()["error"]["message"].startswith("the example was measured on another machine; put SmolLM2")
    with service(tmp_path / "uploaded") as http:
        headers = {"Content-Type": "application/json"}
        stored = http.post("/v1/uploads/profile", content=example_profile(), headers=headers).json()
        answer = http.post("/v1/previews", json={"profile": stored["id"], "data": "x"})
        assert "was not made by this service" in answer.json()["error"]["message"]
