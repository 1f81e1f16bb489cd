"""The length of sequences that the data need: counted by hand, and by whether preparing them refuses a sample."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT
from tiny_models import byte_level_tokenizer, write_directory, write_gguf
from tiny_plans import CONFIG

from tightfit.profiles.sources.lookup import longest_sequence, vocabulary
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.data.sequence import MOST, STEP, choose_seq
from tightfit.runtime.data.tokenization import prepare, tokens_file

BUDGET = 1 << 40
WORDS = " The quick brown fox jumps over the lazy dog."


@pytest.fixture
def model(tmp_path):
    write_directory(
        tmp_path / "model", CONFIG | {"max_position_embeddings": 1000}, {}, tokenizer=byte_level_tokenizer()
    )
    return str(tmp_path / "model")


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def made_for(model, positions):
    path = Path(model) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": positions}))


def test_every_sample_has_room_and_not_32_positions_more(model, tmp_path):
    data = lines(tmp_path / "a.jsonl", *({"prompt": WORDS * n, "completion": " yes"} for n in (1, 5, 3)))
    ids = vocabulary(model).tokenizer.encode(WORDS * 5 + " yes").ids
    positions = len(ids) + 1 - 1  # the end-of-text token follows, and the last token is only predicted
    seq, why = choose_seq(model, data, truncate=False, budget=BUDGET)
    assert seq == -(-positions // STEP) * STEP
    assert (
        why
        == f"the longest sample of the data has {positions} positions; samples that do not share rows are padded to {seq}"
    )
    for length, fits in ((seq, True), (positions, True), (positions - 1, False)):
        words = {"seq": length, "vocab_size": 512}
        if fits:
            assert prepare(data, vocabulary(model), tmp_path / "out", **words).count == 3
        else:
            with pytest.raises(InputError, match="1 bad line of 3"):
                prepare(data, vocabulary(model), tmp_path / "out", **words)


def test_held_out_samples_have_room_too(model, tmp_path):
    data = lines(tmp_path / "a.jsonl", {"prompt": WORDS, "completion": "yes"})
    question = {"prompt": WORDS, "choices": ["no", WORDS * 4], "answer": 0}
    asked = lines(tmp_path / "b.jsonl", question)
    ids = vocabulary(model).tokenizer.encode(WORDS + WORDS * 4).ids
    seq, _ = choose_seq(model, data, asked, truncate=False, budget=BUDGET)
    assert seq == -(-(len(ids) - 1) // STEP) * STEP > choose_seq(model, data, truncate=False, budget=BUDGET)[0]


def test_both_answers_of_a_pair_have_room(model, tmp_path):
    pair = {"prompt": WORDS, "chosen": "yes", "rejected": WORDS * 4}
    data = lines(tmp_path / "a.jsonl", pair)
    ids = vocabulary(model).tokenizer.encode(WORDS + WORDS * 4).ids
    assert choose_seq(model, data, truncate=False, budget=BUDGET, pairs=True)[0] == -(-len(ids) // STEP) * STEP


def test_texts_are_never_too_long(model, tmp_path):
    made_for(model, 100)
    seq, why = choose_seq(model, lines(tmp_path / "a.jsonl", {"text": WORDS * 50}), truncate=False, budget=BUDGET)
    assert seq == 100
    assert "; samples are cut there, and texts go on in the next row; " in why


def test_a_sample_longer_than_the_model_is_refused(model, tmp_path):
    made_for(model, 48)
    data = lines(tmp_path / "a.jsonl", {"prompt": WORDS * 9, "completion": "yes"})
    with pytest.raises(InputError) as caught:
        choose_seq(model, data, truncate=False, budget=BUDGET)
    assert str(caught.value).startswith(f"1 bad line of 1 in the data:\n{data}:1: ")
    assert re.search(
        r"\nthe model was made for 48 positions, and the longest sample has \d+; shorten the samples, or cut them with"
        " truncate=True$",
        str(caught.value),
    )
    assert choose_seq(model, data, truncate=True, budget=BUDGET)[0] == 48


def test_a_sample_longer_than_is_chosen_unasked_is_refused_with_the_option(model, tmp_path):
    made_for(model, 1 << 20)
    data = lines(tmp_path / "a.jsonl", {"prompt": "a" * 9000, "completion": " yes"})
    positions = len(vocabulary(model).tokenizer.encode("a" * 9000 + " yes").ids)
    assert positions > MOST
    with pytest.raises(InputError) as caught:
        choose_seq(model, data, truncate=False, budget=BUDGET)
    assert str(caught.value).endswith(
        f"\nseq={positions} has room for every sample; or shorten them, or cut them with truncate=True"
    )
    assert choose_seq(model, data, truncate=True, budget=BUDGET)[0] == MOST


def test_data_without_a_length(model, tmp_path):
    assert choose_seq(model, "random", truncate=False, budget=BUDGET)[0] == 256
    made_for(model, 40)
    assert choose_seq(model, "random", truncate=False, budget=BUDGET)[0] == 40
    prepared = prepare("random", None, tmp_path, seq=40, vocab_size=512)
    assert choose_seq(model, str(prepared.path), truncate=False, budget=BUDGET)[0] == 40


def test_a_model_without_a_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    data = lines(tmp_path / "a.jsonl", {"text": "a"})
    with pytest.raises(InputError, match=r"the model has no tokenizer; put tokenizer\.json beside its config\.json"):
        choose_seq(str(tmp_path / "config.json"), data, truncate=False, budget=BUDGET)


def test_a_line_that_the_budget_cannot_tokenise_is_refused_without_tokenising_it(model, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "modules", {name: one for name, one in sys.modules.items() if name != "torch"})
    data = lines(tmp_path / "a.jsonl", {"text": WORDS * 200_000})
    with pytest.raises(InputError, match=r"a line of 9000013 bytes, and what the run's budget leaves is enough"):
        choose_seq(model, data, truncate=False, budget=3 << 30)


def test_what_models_say_that_they_were_made_for(model, tmp_path):
    assert longest_sequence(model) == 1000
    file = write_gguf(tmp_path / "model.gguf", CONFIG, {}, tokenizer=byte_level_tokenizer())
    assert longest_sequence(str(file)) == CONFIG["max_position_embeddings"]
    assert longest_sequence("package.module:factory") is None
    config = tmp_path / "gpt2.json"
    config.write_text(json.dumps({"model_type": "gpt2", "n_positions": 1024}))
    assert longest_sequence(str(config)) == 1024


SAMPLES = [
    {"prompt": WORDS, "completion": " yes"},
    {"text": WORDS * 30},
    {"prompt": WORDS * 2, "choices": [" no", " yes", WORDS], "answer": 1},
    {"text": "a"},
    {"messages": [{"role": "user", "content": WORDS}, {"role": "assistant", "content": WORDS * 9}]},
]


@pytest.mark.parametrize("positions", [1000, 64], ids=["all have room", "some are cut"])
def test_data_that_were_kept_as_tokens_become_the_same_records(model, tmp_path, positions, monkeypatch):
    made_for(model, positions)
    data = {"train": lines(tmp_path / "a.jsonl", *SAMPLES), "evaluate": lines(tmp_path / "b.jsonl", *SAMPLES[::-1])}
    words = vocabulary(model)
    seq, _ = choose_seq(model, *data.values(), truncate=True, budget=BUDGET, keep=tmp_path / "kept")
    shape = {"seq": seq, "vocab_size": 512, "too_long": "truncate"}
    for purpose, file in data.items():
        prepare(file, words, tmp_path / "fresh", purpose=purpose, **shape).close()
    monkeypatch.setattr("tightfit.runtime.data.tokenization.read_samples", None)
    for purpose, file in data.items():
        seen = []
        kept = tokens_file(tmp_path / "kept", purpose)
        prepare(file, words, tmp_path / "again", purpose=purpose, kept=kept, progress=seen.append, **shape).close()
        assert seen == [1, 2, 3, 4, 5]
        name = f"{purpose}.records"
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()


def test_kept_tokens_that_cannot_be_used_are_refused(model, tmp_path):
    data, kept = lines(tmp_path / "a.jsonl", *SAMPLES), tokens_file(tmp_path / "kept", "train")
    choose_seq(model, data, truncate=True, budget=BUDGET, keep=tmp_path / "kept")
    with pytest.raises(InputError, match="outside the model's vocabulary of 5"):
        prepare(data, vocabulary(model), tmp_path / "out", seq=64, vocab_size=5, kept=kept)
    kept.write_bytes(kept.read_bytes()[:-1])
    with pytest.raises(InputError, match="cut off; tokenise the data again"):
        prepare(data, vocabulary(model), tmp_path / "out", seq=64, vocab_size=512, too_long="truncate", kept=kept)


MEASURED = """
import sys
from tightfit.runtime.data.sequence import choose_seq
from tightfit.runtime.engine.device.resident import memory
seq, _ = choose_seq(sys.argv[1], sys.argv[2], truncate=False, budget=1 << 34)
print(seq, memory().peak, *({"torch", "numpy", "ortools"} & sys.modules.keys()))
"""


def test_looking_at_the_data_imports_no_pytorch_and_holds_no_more_for_more_lines(model, tmp_path):
    row = {"messages": [{"role": "user", "content": WORDS}, {"role": "assistant", "content": "yes"}]}
    found = []
    for count in (500, 6000):
        data = lines(tmp_path / f"{count}.jsonl", *[row] * count)
        words = [sys.executable, "-c", MEASURED, model, data]
        _, peak, *heavy = subprocess.check_output(words, text=True, cwd=ROOT).split()
        assert heavy == []
        found.append(int(peak))
    assert found[1] - found[0] < 4 << 20
