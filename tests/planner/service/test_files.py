"""What lies under the roots, listed without a typed path; published shapes, each of which can be profiled."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest
from reference import CONFIGS
from served import service
from tiny_models import byte_level_tokenizer, random_weights, write_directory, write_gguf

from tightfit.planner.service.http import root_files
from tightfit.planner.service.http.root_files import files_under
from tightfit.planner.service.http.routes_machine import get_gallery
from tightfit.planner.service.jobs.kinds import source_of
from tightfit.planner.service.jobs.paths import confined
from tightfit.planner.service.wire.requests import ProfileRequest
from tightfit.planner.service.wire.settings import Settings
from tightfit.profiles.api import profile
from tightfit.profiles.sources.gguf_metadata import read_header

LLAMA, QWEN = CONFIGS["llama"], CONFIGS["qwen2"]
ROW = '{"prompt": "a", "completion": "b"}\n'


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "root"
    weights = random_weights(LLAMA)
    write_directory(root / "llama", LLAMA, weights, tokenizer=byte_level_tokenizer(), shards=2)
    write_gguf(root / "small.gguf", LLAMA, weights)
    (root / "cut.gguf").write_bytes((root / "small.gguf").read_bytes()[:100])
    (root / "bare").mkdir()
    (root / "bare" / "config.json").write_text(json.dumps(QWEN))
    (root / "sizes.json").write_text(json.dumps(QWEN))
    (root / "notes.json").write_text('{"a": 1}')
    hub = root / "models--org--name"
    (hub / "blobs").mkdir(parents=True)
    write_directory(hub / "blobs" / "files", LLAMA, weights)
    snapshot = hub / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for file in (hub / "blobs" / "files").iterdir():
        file.rename(hub / "blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    for name in ("config.json", "model.safetensors"):
        (hub / "blobs" / name).rename(hub / "blobs" / name.replace(".", "-"))
        (snapshot / name).unlink()
        (snapshot / name).symlink_to(f"../../blobs/{name.replace('.', '-')}")
    outside = write_directory(tmp_path / "outside", LLAMA, weights)
    (root / "led").symlink_to(outside)
    (root / "leading").mkdir()
    (root / "leading" / "config.json").write_text(json.dumps(LLAMA))
    (root / "leading" / "model.safetensors").symlink_to(outside / "model.safetensors")
    (root / "round").symlink_to(root)
    return root


def by_path(answer):
    return {file.path: file for file in answer.files}


def test_models_are_listed_with_what_their_headers_say(root):
    answer = files_under([root], "models")
    models = by_path(answer)
    told = {path: (m.name, m.kind, m.family, m.precision) for path, m in models.items()}
    assert told == {
        "llama": ("llama", "folder", "llama", "F32"),
        "small.gguf": ("small", "gguf", "llama", "Q4_1"),
        "cut.gguf": ("cut", "gguf", None, None),
        "bare/config.json": ("bare", "config", "qwen2", None),
        "sizes.json": ("sizes.json", "config", "qwen2", None),
        "models--org--name/snapshots/0123": ("org/name", "folder", "llama", "F32"),
    }
    counted = {name: sum(w.numel() for w in random_weights(c).values()) for name, c in (("l", LLAMA), ("q", QWEN))}
    assert models["llama"].parameters == models["small.gguf"].parameters == counted["l"]
    assert models["sizes.json"].parameters == counted["q"]
    assert models["cut.gguf"].parameters is None
    assert models["llama"].bytes == sum(
        file.stat().st_size for file in (root / "llama").iterdir() if file.name.startswith(("config", "model-"))
    )
    assert (answer.roots, answer.cut) == (["root"], False)


def test_every_path_that_is_listed_may_be_named_and_leads_there(root):
    """The listing says nothing that a request could not use, and a name of two roots is listed for the first alone."""
    second = root.parent / "second"
    (second / "llama").mkdir(parents=True)
    (second / "llama" / "config.json").write_text(json.dumps(QWEN))
    (second / "other.gguf").write_bytes((root / "small.gguf").read_bytes())
    roots = [root, second]
    answer = files_under(roots, "models")
    for file in answer.files:
        assert Path(confined(file.path, roots, "path")).exists()
    models = by_path(answer)
    assert (models["llama"].family, models["other.gguf"].family) == ("llama", "llama")
    assert "llama/config.json" not in models  # a request for it would get that of the first root
    assert not {path for path in models if path.startswith(("led", "leading/model", "round", "/", ".."))}


def test_data_are_listed_as_they_are_read(tmp_path):
    root = tmp_path / "root"
    for name in ("one/train.jsonl", "two/a.jsonl", "two/b.jsonl.gz", "mixed/a.jsonl", "mixed/b.csv", "t.tsv"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(ROW)
    dataset = root / "saved"
    dataset.mkdir()
    (dataset / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": f"data-{part}.arrow"} for part in (0, 1)]})
    )
    for part in (0, 1):
        (dataset / f"data-{part}.arrow").write_bytes(b"x")
    split = root / "splits" / "train"
    split.mkdir(parents=True)
    (root / "splits" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (split / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    (split / "data-00000-of-00001.arrow").write_bytes(b"x")
    (root / "notes.txt").write_text("no data")
    (root / ".hidden.jsonl").write_text(ROW)
    data = by_path(files_under([root], "data"))
    assert {path: file.kind for path, file in data.items()} == {
        "one/train.jsonl": "jsonl",
        "two": "folder",
        "two/a.jsonl": "jsonl",
        "two/b.jsonl.gz": "jsonl",
        "mixed/a.jsonl": "jsonl",
        "mixed/b.csv": "csv",
        "t.tsv": "csv",
        "saved": "folder",
        "splits/train": "folder",
    }
    assert data["two"].bytes == 2 * len(ROW)


@pytest.mark.parametrize(
    ("limit", "most", "listed"), [("MOST_LISTED", 3, 3), ("MOST_LOOKED_AT", 3, 3), ("MOST_SECONDS", -1.0, 8)]
)
def test_how_much_is_looked_at_is_bounded_and_said(tmp_path, monkeypatch, limit, most, listed):
    """When the time is over, the folder at hand is still listed, which its names alone do, and no other."""
    (tmp_path / "below").mkdir()
    for number in range(8):
        (tmp_path / f"{number}.{('csv', 'jsonl')[number % 2]}").write_text(ROW)
        (tmp_path / "below" / f"{number}.csv").write_text(ROW)
    assert len(files_under([tmp_path], "data").files) == 17
    monkeypatch.setattr(root_files, limit, most)
    answer = files_under([tmp_path], "data")
    assert answer.cut
    assert len(answer.files) == listed


def test_no_model_is_opened_when_the_time_is_over(root, monkeypatch):
    monkeypatch.setattr(root_files, "MOST_SECONDS", -1.0)
    monkeypatch.setattr(root_files, "read_header", lambda path: pytest.fail(f"{path} was opened"))
    answer = files_under([root], "models")
    assert (answer.files, answer.cut) == ([], True)


def test_headers_are_read_once_until_the_file_changes(root, monkeypatch):
    read = []
    monkeypatch.setattr(root_files, "read_header", lambda path: read.append(path) or read_header(path))
    files_under([root], "models")
    files_under([root], "models")
    assert sorted(path.name for path in read) == ["cut.gguf", "small.gguf"]
    os.utime(root / "small.gguf", ns=(1, 1))
    files_under([root], "models")
    assert [path.name for path in read[2:]] == ["small.gguf"]


def test_over_http_the_listing_tells_no_path_of_the_machine(root, tmp_path):
    with service(root.parent, roots=(root,)) as http:
        answer = http.get("/v1/files", params={"kind": "models"})
        assert {file["path"] for file in answer.json()["files"]} >= {"llama", "small.gguf"}
        assert str(root.parent) not in answer.text
        assert http.get("/v1/files", params={"kind": "all"}).status_code == 422
        assert http.get("/v1/files").status_code == 422
        shapes = http.get("/v1/gallery").json()["shapes"]
        assert [shape["parameters"] for shape in shapes] == sorted(shape["parameters"] for shape in shapes)
    with service(tmp_path / "rootless") as http:
        assert http.get("/v1/files", params={"kind": "data"}).json() == {"roots": [], "files": [], "cut": False}


def shapes():
    return asyncio.run(get_gallery()).shapes


PUBLISHED = {
    "SmolLM2-135M": 134_515_008,
    "Qwen2.5-0.5B": 494_032_768,
    "Llama-3.2-1B": 1_235_814_400,
    "Gemma 3 1B": 999_885_952,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Llama-3.1-8B": 8_030_261_248,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Llama-3.3-70B": 70_553_706_496,
}
"""numbers of parameters, as the models' own files have them"""


def test_the_gallery_has_the_published_numbers_of_parameters():
    told = {shape.name: shape.parameters for shape in shapes()}
    assert 10 <= len(told) <= 17
    assert told | PUBLISHED == told


@pytest.mark.slow
@pytest.mark.parametrize("shape", {shape.family: shape for shape in shapes()}.values(), ids=lambda shape: shape.family)
def test_a_shape_of_each_family_in_the_gallery_can_be_profiled(shape, tmp_path, cache):
    """By the road of a request with `config`: checked by the service, then traced; its times are estimated here."""
    settings = Settings(data_dir=tmp_path, command=("tightfit",))
    request = source_of(settings, ProfileRequest(config=shape.config, seq=64))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(request["config"]))
    made = profile(file, seq=64, lora_rank=8, device="phone")
    assert len(made.layers) == shape.layers + 2
    assert made.model.config["model_type"] == shape.family
