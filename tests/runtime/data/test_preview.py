"""A preview shows what a run's records hold: the same tokens learned, the same samples cut and refused, the same
padding.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from tiny_models import CHAT, byte_level_tokenizer, sentence_piece_tokenizer

from tightfit.profiles.sources.vocabulary import Vocabulary
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.data import preview as module
from tightfit.runtime.data.preview import preview
from tightfit.runtime.data.tokenization import prepare
from tightfit.runtime.engine.training.batches import open_batches
from tightfit.runtime.engine.training.records import IGNORED

SEQ, SIZE = 40, 320
ROWS = [
    {"prompt": "Is the fox quick? ", "completion": "yes"},
    {"messages": [{"role": "user", "content": "dog?"}, {"role": "assistant", "content": "lazy"}]},
    {"prompt": "over ", "choices": ["the sun", "the moon"], "answer": 1},
    {"prompt": "a", "completion": "é", "more": 1},
]
LONG = {"prompt": "the quick brown fox jumps over the lazy dog and the moon " * 3, "completion": "positive"}


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary(
        tokenizer=byte_level_tokenizer(),
        chat_template=CHAT,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )


def step(*, seq=SEQ, batch=2, size=SIZE, preference=None):
    """What a preview asks of a profile."""
    model = SimpleNamespace(
        config={"vocab_size": size}, preference=preference, rows_of_sample=1 if preference is None else 2
    )
    return SimpleNamespace(seq=seq, batch=batch, model=model)


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def learned(vocabulary, records):
    """The text that each record's labels spell, special tokens included."""
    tokenizer = vocabulary.tokenizer
    return [
        tokenizer.decode([t for t in records.read(n).labels.tolist() if t != IGNORED], skip_special_tokens=False)
        for n in range(len(records))
    ]


@pytest.mark.parametrize("rows", [ROWS, [*ROWS, LONG]], ids=["short", "cut"])
def test_what_is_shown_as_learned_is_what_the_records_predict(tmp_path, vocabulary, rows):
    data = write(tmp_path / "a.jsonl", rows)
    shown = preview(data, vocabulary, step(), tmp_path, too_long="truncate")
    with prepare(data, vocabulary, tmp_path, seq=SEQ, vocab_size=SIZE, too_long="truncate") as records:
        found = learned(vocabulary, records)
    assert ["".join(p.text for p in sample.pieces if p.trained) for sample in shown.samples] == found
    assert (found[0], found[1], found[3]) == ("yes<|im_end|>", "lazy<|im_end|>\n"[: len(found[1])], "é<|im_end|>")
    assert [sample.line for sample in shown.samples] == list(range(1, len(rows) + 1))
    assert (shown.counted, shown.cut, shown.refused, shown.whole) == (len(rows), len(rows) - 4, [], True)
    assert shown.samples[0].pieces[0].text.endswith("Is the fox quick? ")
    if len(rows) > 4:
        last = shown.samples[-1]
        assert last.cut == last.tokens - 1 - SEQ > 0
        assert last.pieces[-1].text == "positive<|im_end|>"


def test_lines_that_a_run_would_refuse_are_refused_with_their_line(tmp_path, vocabulary):
    data = write(tmp_path / "a.jsonl", ["{", ROWS[0], {"prompt": "a"}, LONG])
    shown = preview(data, vocabulary, step(), tmp_path)
    with pytest.raises(InputError) as caught:
        prepare(data, vocabulary, tmp_path, seq=SEQ, vocab_size=SIZE)
    for refused in shown.refused:
        assert f"{data}:{refused.line}: {refused.why}" in str(caught.value)
    assert [refused.line for refused in shown.refused] == [1, 3, 4]
    assert (shown.refused_count, shown.counted, len(shown.samples)) == (3, 4, 1)
    nothing = preview(write(tmp_path / "b.jsonl", ["{"]), vocabulary, step(), tmp_path)
    assert (nothing.padding_share, nothing.samples) == (None, [])
    with pytest.raises(InputError, match="the model has no tokenizer"):
        preview(data, None, step(), tmp_path)


@pytest.mark.parametrize("packing", [False, True])
def test_the_share_of_padding_is_that_of_the_batches_of_an_epoch(tmp_path, vocabulary, packing):
    rows = [{"prompt": "x" * (number % 7), "completion": "y" * (1 + number % 5)} for number in range(41)]
    data = write(tmp_path / "a.jsonl", rows)
    shown = preview(data, vocabulary, step(batch=4), tmp_path, packing=packing)
    with prepare(data, vocabulary, tmp_path, seq=SEQ, vocab_size=SIZE) as records:
        lengths = [records.length(n) for n in range(len(records))]
        path = str(records.path)
    if not packing:
        assert shown.padding_share == pytest.approx(1 - sum(lengths) / (41 * SEQ))
        assert (shown.epoch_steps, shown.evaluation_batches) == (41 / 4, 11)
        # What a step of fewer tokens would hold of them.
        assert dict(shown.longer)[16] == sum(length > 16 for length in lengths)
        assert all(common < SEQ for common, _ in shown.longer)
        return
    # As the loop of a run takes them.
    batches = open_batches(path, 5, packing=True)
    steps = round(batches.epoch_steps(4))
    assert shown.epoch_steps == pytest.approx(steps, abs=1)
    assert shown.evaluation_batches == pytest.approx(steps, abs=1)
    assert shown.padding_share < 0.3
    assert shown.padding_share == pytest.approx(1 - sum(lengths) / (steps * 4 * SEQ), abs=0.05)
    batches.close()


def test_texts_and_pairs_are_shown_as_such(tmp_path, vocabulary):
    text = write(tmp_path / "a.jsonl", [{"text": "over the moon " * 9}])
    (shown,) = preview(text, vocabulary, step(), tmp_path).samples
    assert (shown.part, shown.cut, [piece.trained for piece in shown.pieces]) == ("text", 0, [False, True])
    assert preview(text, vocabulary, step(), tmp_path).longer == []  # texts fill rows of any length
    pair = write(tmp_path / "b.jsonl", [{"prompt": "Is it? ", "chosen": "yes", "rejected": "no"}])
    both = preview(pair, vocabulary, step(preference=SimpleNamespace(loss="dpo")), tmp_path).samples
    assert [(each.part, each.pieces[-1].text) for each in both] == [
        ("chosen", "yes<|im_end|>"),
        ("rejected", "no<|im_end|>"),
    ]


def test_a_sentence_piece_tokenizer_shows_blanks(tmp_path):
    own = Vocabulary(tokenizer=sentence_piece_tokenizer(), bos_token="<s>", eos_token="</s>", add_bos=True)
    data = write(tmp_path / "a.jsonl", [{"prompt": "the fox ", "completion": "is quick"}])
    (shown,) = preview(data, own, step(size=420), tmp_path).samples
    assert "".join(piece.text for piece in shown.pieces).replace(" ", "") == "<s>thefoxisquick</s>"
    assert "is quick" in shown.pieces[-1].text


@pytest.mark.parametrize(("limit", "most"), [("MOST_SAMPLES", 3), ("MOST_SECONDS", -1.0), ("MOST_LETTERS", 1)])
def test_how_much_is_read_and_shown_is_bounded(tmp_path, vocabulary, monkeypatch, limit, most):
    monkeypatch.setattr(module, limit, most)
    monkeypatch.setattr(module, "MOST_SHOWN", 2)
    data = write(tmp_path / "a.jsonl", [ROWS[0]] * 9)
    shown = preview(data, vocabulary, step(), tmp_path)
    read = {"MOST_SAMPLES": 3, "MOST_SECONDS": 1, "MOST_LETTERS": 9}[limit]
    assert (shown.counted, shown.whole) == (read, read == 9)
    assert len(shown.samples) == (2 if limit == "MOST_SAMPLES" else 1)
