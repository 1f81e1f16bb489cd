"""`tightfit generate` and `tightfit chat` as a person uses them: what transformers answers, within the memory that was
said.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from answering import answered_by_transformers
from decoder_families import FAMILIES
from peft_adapters import merged_by_peft, save_adapter, save_model, with_values
from places import SOURCES
from reference import CONFIGS, stored_weights
from tiny_models import byte_level_tokenizer, random_weights, write_directory
from tokenizers import Tokenizer

import tightfit
from tightfit.profiles.sources.lookup import resolve, vocabulary
from tightfit.profiles.weights.store_file import build_store
from tightfit.runtime.common.files import cache_directory
from tightfit.runtime.data.chat import ChatTemplate
from tightfit.runtime.results.evaluation import temporary_folder

pytestmark = pytest.mark.usefixtures("cache")
CONFIG = CONFIGS["llama"] | {"max_position_embeddings": 512}
MIB = 1 << 20
QUESTION = "Is this review positive or negative?"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    weights = {name: value * 4 if value.dim() > 1 else value for name, value in random_weights(CONFIG).items()}
    return write_directory(folder, CONFIG, weights, tokenizer=byte_level_tokenizer())


@pytest.fixture(scope="module")
def exact(model: Path, cache: Path) -> Any:
    """transformers' model with the packed weights."""
    made = with_values(CONFIG, stored_weights(build_store(resolve(str(model)), cache_directory() / "stores")))
    made.generation_config.eos_token_id = None
    return made


@pytest.fixture(scope="module")
def adapter(model: Path, exact: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    return save_adapter(
        copy.deepcopy(exact), folder, str(model), r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"]
    )


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "tightfit.runtime.cli.main", *map(str, words)]


def called(*words: object, written: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(SOURCES)}
    return subprocess.run(command(*words), env=environment, capture_output=True, text=True, check=False, input=written)


def tokens_of(model: Path, *said: str) -> list[int]:
    """A conversation as the model's template has it, up to the assistant's next turn."""
    words = vocabulary(str(model))
    assert words is not None
    turns = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(said)]
    text = ChatTemplate(words).render(turns, generation_prompt=True)
    ids: list[int] = words.tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def text_of(model: Path, exact: Any, ids: Sequence[int], count: int) -> tuple[str, int]:
    """What transformers answers, up to the end of the turn, and how many tokens that are."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    answer = answered_by_transformers(exact, ids, count)
    ends = tokenizer.token_to_id("<|im_end|>")
    answer = answer[: answer.index(ends) + 1] if ends in answer else answer
    return tokenizer.decode(answer), len(answer)


def left() -> list[Path]:
    return list((cache_directory() / "evaluations").iterdir())


@pytest.mark.slow
def test_prompts_from_a_file(model: Path, exact: Any, adapter: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    asked = [QUESTION, [{"role": "user", "content": "lazy dog?"}]]
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in asked))
    merged = merged_by_peft(copy.deepcopy(exact), adapter)
    done = called(
        "generate",
        model,
        "--prompts",
        file,
        "--adapter",
        adapter,
        "--max-tokens",
        40,
        "--memory",
        "300MiB",
        "--json",
        "--stream",
    )
    assert done.returncode == 0, done.stderr
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    told = [one for one in printed if "piece" not in one]
    pieces = [one["piece"] for one in printed if "piece" in one]
    assert "".join(pieces) == "".join(one["text"] for one in told)
    assert len(pieces) > len(told)
    assert [one["prompt"] for one in told] == asked
    for one, question in zip(told, (QUESTION, "lazy dog?"), strict=True):
        text, count = text_of(model, merged, tokens_of(model, question), 40)
        assert one["text"] == text
        assert one["tokens"] == count
        assert one["end"] == ("length" if count == 40 else "end")
        assert one["peak_bytes"]["measured"] <= one["peak_bytes"]["predicted"] <= one["budget_bytes"] == 300 * MIB
        assert one["peak_bytes"]["measured"] >= one["peak_bytes"]["predicted"] - 13 * MIB  # of the start, 10
        assert one["token_seconds"]["measured"] > 0
    assert "peak" in done.stderr
    assert left() == []


@pytest.mark.slow
def test_a_long_prompt_stays_within_its_plan(tmp_path: Path) -> None:
    """It goes through the layers in passes of groups, whose keys become more and more; the buffers of their products
    are there from the beginning.
    """
    config = CONFIG | {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    config |= {"max_position_embeddings": 16384, "num_hidden_layers": 2}
    folder = write_directory(tmp_path / "long", config, random_weights(config), tokenizer=byte_level_tokenizer())
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "The quick brown fox jumps over the lazy dog. " * 240}) + "\n")
    done = called("generate", folder, "--prompts", file, "--max-tokens", 2, "--memory", "300MiB", "--json")
    assert done.returncode == 0, done.stderr
    (told,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert told["prompt_tokens"] > 6000
    computing = told["processes"]["computing"]
    assert computing["predicted"] - 8 * MIB < computing["measured"] <= computing["predicted"]


def test_text_is_printed_as_it_comes(model: Path, exact: Any) -> None:
    environment = os.environ | {"PYTHONPATH": str(SOURCES)}
    words = ["generate", model, "--prompt", "The quick", "--no-template", "--max-tokens", 60, "--memory", "300MiB"]
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode("The quick").ids
    text, _ = text_of(model, exact, ids, 60)
    with subprocess.Popen(command(*words), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        parts = []
        while part := os.read(child.stdout.fileno(), 1 << 16):
            parts.append(part)
        told = child.stderr.read().decode()
    assert child.returncode == 0
    assert b"".join(parts).decode() == f"{text}\n"
    assert len(parts) > 3
    assert "tokens in" in told
    assert "(" in told


def test_a_program_asks(model: Path, exact: Any, adapter: Path) -> None:
    shown: list[str] = []
    found = tightfit.generate(str(model), QUESTION, 300 * MIB, adapter=adapter, max_tokens=6, shown=shown.append)
    assert len(found) == 1
    assert found[0]["text"] == "".join(shown)
    merged = merged_by_peft(copy.deepcopy(exact), adapter)
    assert found[0]["text"] == text_of(model, merged, tokens_of(model, QUESTION), 6)[0]
    assert set(found[0]["processes"]) == {"computing"}
    assert found[0]["peak_bytes"]["measured"] <= found[0]["peak_bytes"]["predicted"]
    assert tightfit.generate(str(model), [], 300 * MIB) == []


@pytest.mark.slow
def test_a_decoder_that_transformers_builds(model: Path, tmp_path: Path) -> None:
    config = FAMILIES["SmolLM3"] | {"vocab_size": CONFIG["vocab_size"], "max_position_embeddings": 512}
    folder = save_model(tmp_path / "smollm3", config)
    for file in model.glob("*token*"):
        shutil.copy(file, folder)
    store = build_store(resolve(str(folder)), cache_directory() / "stores")
    parameters = {name: value for name, value in stored_weights(store).items() if not name.endswith("inv_freq")}
    exact = with_values(config, parameters)
    exact.generation_config.eos_token_id = None
    targets = ["q_proj", "o_proj", "down_proj"]
    adapter = save_adapter(
        copy.deepcopy(exact), tmp_path / "adapter", str(folder), r=4, lora_alpha=16, target_modules=targets
    )
    for given, due in ((None, exact), (adapter, merged_by_peft(copy.deepcopy(exact), adapter))):
        more = [] if given is None else ["--adapter", given]
        done = called(
            *("generate", folder, "--prompt", QUESTION, "--max-tokens", 40, "--memory", "300MiB", "--json", *more)
        )
        assert done.returncode == 0, done.stderr
        (told,) = [json.loads(line) for line in done.stdout.splitlines()]
        assert told["text"] == text_of(folder, due, tokens_of(folder, QUESTION), 40)[0]
        assert told["peak_bytes"]["measured"] <= told["peak_bytes"]["predicted"] <= 300 * MIB
        assert told["peak_bytes"]["measured"] >= told["peak_bytes"]["predicted"] - 13 * MIB


@pytest.mark.slow
def test_a_conversation(model: Path, exact: Any) -> None:
    questions = ["The quick brown fox?", QUESTION]
    done = called(
        *("chat", model, "--memory", "320MiB", "--max-tokens", 12, "--context", 256, "--json"),
        written="".join(f"{one}\n" for one in [*questions, "", "/new", questions[1]]),
    )
    assert done.returncode == 0, done.stderr
    first, second, anew = (json.loads(line) for line in done.stdout.splitlines())
    ids = tokens_of(model, questions[0])
    assert first["text"] == text_of(model, exact, ids, 12)[0]
    longer = tokens_of(model, questions[0], first["text"], questions[1])
    assert second["text"] == text_of(model, exact, longer, 12)[0]
    assert second["reused_tokens"] >= len(ids)
    assert anew["text"] == text_of(model, exact, tokens_of(model, questions[1]), 12)[0]
    for one in (first, second, anew):
        assert one["peak_bytes"]["measured"] <= one["peak_bytes"]["predicted"]
    assert left() == []


@pytest.mark.slow
def test_a_seed_says_what_is_drawn(model: Path) -> None:
    drawn = []
    for _ in range(2):
        found = tightfit.generate(
            str(model), ["The quick"] * 2, 300 * MIB, max_tokens=8, temperature=2.0, top_k=200, seed=1
        )
        drawn.append([one["text"] for one in found])
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[0][1]


@pytest.mark.slow
def test_what_cannot_be_is_refused(model: Path, adapter: Path, refused: Any, tmp_path: Path) -> None:
    ask = ["generate", model, "--prompt", "So?"]
    told = refused(3, *ask, "--memory", "40MiB")
    assert "is too small" in told
    least = told.split("give --memory ")[1].split()[0]
    assert 40 < int(least.removesuffix("MiB")) < 300
    assert "give a smaller --max-tokens" in refused(2, *ask, "--max-tokens", 600, "--memory", "300MiB")
    assert "--prompt TEXT or --prompts FILE is missing" in refused(2, "generate", model)
    assert "give --temperature too" in refused(2, *ask, "--top-p", 0.5)
    assert "--cache 'int3': it should be 'float32' or 'bfloat16'" in refused(2, *ask, "--cache", "int3")
    assert "no such file or directory; give the folder of an adapter" in refused(2, *ask, "--adapter", tmp_path, "--memory", "300MiB").lower()  # fmt: skip
    other = refused(
        2, "generate", save_model(tmp_path / "gemma2", FAMILIES["Gemma 2"]), "--prompt", "So?", "--memory", "300MiB"
    )
    assert "a gemma2 decoder cannot answer token by token here: its Gemma2Attention computes more than" in other
    assert (
        "merge the adapter into a model of its own (tightfit merge) and generate with transformers, or with llama.cpp"
        in other
    )
    (tmp_path / "empty").write_text("\n")
    assert "no prompt; write one a line" in refused(2, "generate", model, "--prompts", tmp_path / "empty")
    (tmp_path / "bad.jsonl").write_text('{"question": 1}\n')
    assert '"prompt" is missing or null' in refused(2, "generate", model, "--prompts", tmp_path / "bad.jsonl")


@pytest.mark.slow
def test_an_interrupted_answer_leaves_nothing(model: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(SOURCES)}
    words = command("generate", model, "--prompt", "The", "--no-template", "--max-tokens", 500, "--memory", "300MiB")
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        os.read(child.stdout.fileno(), 1)
        child.send_signal(signal.SIGTERM)
        told = child.stderr.read().decode()
    assert child.returncode == 4
    assert "interrupted; start again" in told
    assert left() == []


@pytest.mark.slow
def test_an_interrupt_ends_an_answer_and_not_the_conversation(model: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(SOURCES)}
    words = command("chat", model, "--memory", "320MiB", "--max-tokens", 300, "--context", 500)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, env=environment, **pipes) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(b"The quick brown fox?\n")
        child.stdin.flush()
        os.read(child.stdout.fileno(), 1)
        child.send_signal(signal.SIGINT)
        out, told = child.communicate(f"{QUESTION}\n".encode())
    assert child.returncode == 0
    answered = [int(line.split()[0]) for line in told.decode().splitlines() if " tokens in " in line]
    assert len(answered) == 2
    assert answered[0] < 300
    assert out.count(b"\n") >= 2
    assert left() == []


@pytest.mark.slow
def test_nothing_outlives_a_killed_command(model: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(SOURCES)}
    words = command("generate", model, "--prompt", "The", "--no-template", "--max-tokens", 500, "--memory", "300MiB")
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        assert child.stdout is not None
        os.read(child.stdout.fileno(), 1)
        others = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        assert len(others) == 1
        child.kill()
    waited = time.monotonic()
    while Path(f"/proc/{others[0]}").exists() and time.monotonic() < waited + 60:
        time.sleep(0.05)
    assert not Path(f"/proc/{others[0]}").exists()
    with temporary_folder() as other:  # removes what was left there
        assert left() == [other]
