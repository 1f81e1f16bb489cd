"""A tokenizer is held by a process of its own; what that takes is predicted from the file, then known."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import SPECIAL, write_gguf
from tiny_plans import CONFIG
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tightfit.profiles import worker_process
from tightfit.profiles.sources.lookup import tokenizer_file
from tightfit.profiles.sources.tokenizer_file import TokenizerFile
from tightfit.profiles.sources.tokenizer_memory import KnownMemory
from tightfit.profiles.sources.tokenizer_process import WORK_BYTES
from tightfit.profiles.sources.vocabulary import TOKENIZER, refusals
from tightfit.profiles.worker_process import held_bytes
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.data.tokenizing import longest_samples

COUNT = 12_000


LETTERS = 'abcdefghijklmnopqrstuvwxyz"\\éΩ中'


def words() -> list[str]:
    """Different words of one letter and more."""
    chosen, different = random.Random(0), dict.fromkeys(LETTERS)
    while len(different) < COUNT:
        different["".join(chosen.choices(LETTERS, k=chosen.randint(2, 9)))] = None
    return list(different)


def byte_pairs() -> Tokenizer:
    """Each token but a letter is made of two others."""
    chosen, tokens = random.Random(0), list(LETTERS)
    ids, merges = {token: number for number, token in enumerate([*SPECIAL, *LETTERS])}, []
    while len(ids) < COUNT:
        left, right = chosen.choice(tokens[: len(tokens) // 2 + 1]), chosen.choice(tokens[:200])
        if left + right not in ids:
            ids[left + right] = len(ids)
            tokens.append(left + right)
            merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(ids, merges))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def word_pieces() -> Tokenizer:
    return Tokenizer(models.WordPiece({token: number for number, token in enumerate(words())}, unk_token="a"))


def unigrams() -> Tokenizer:
    return Tokenizer(models.Unigram([(token, -number / 100) for number, token in enumerate(words())], 0))


@pytest.mark.parametrize("form", ["byte pairs", "word pieces", "unigrams", "gguf"])
def test_the_first_process_takes_at_most_what_the_file_makes_likely_and_the_next_what_it_took(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path / "cache"))
    tokenizer = {"word pieces": word_pieces, "unigrams": unigrams}.get(form, byte_pairs)()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace() if form == "word pieces" else pre_tokenizers.ByteLevel()
    if form == "gguf":
        model = str(write_gguf(tmp_path / "model.gguf", CONFIG, {}, tokenizer=tokenizer))
    else:
        model = str(tmp_path)
        (tmp_path / "config.json").write_text("{}")
        tokenizer.save(str(tmp_path / TOKENIZER), pretty=form == "byte pairs")
    file = tokenizer_file(model)
    assert file is not None
    computed = KnownMemory.of(file)
    assert not computed.measured
    (tmp_path / "data.jsonl").write_text('{"text": "abc def"}\n')
    options = {"most": 8, "too_long": "truncate", "positions": None, "columns": None, "pairs": False, "keep": None}
    for known in (computed, None):
        monkeypatch.setattr(worker_process, "MEMORY_OF_WORKERS", type(worker_process.MEMORY_OF_WORKERS)())
        longest_samples({"train": str(tmp_path / "data.jsonl")}, model, budget_bytes=None, report=None, **options)
        predicted = (known or KnownMemory.of(file)).bytes + WORK_BYTES
        assert held_bytes() <= predicted
        assert worker_process.MEMORY_OF_WORKERS.predicted_bytes == predicted
    assert KnownMemory.of(file).measured
    assert KnownMemory.of(file).bytes <= computed.bytes
    computed.place.write_text("damaged")
    assert KnownMemory.of(file) == computed
    assert not computed.place.exists()


def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.json: unreadable tokenizer \(No such file or directory\)"):
        KnownMemory.of(TokenizerFile(kind="directory", path=str(tmp_path)))


class PanicException(BaseException):
    """As the library's, which is no Exception either."""


def test_what_the_library_raises_is_refused_in_words() -> None:
    for error in (Exception("no such merge"), PanicException("index out of bounds")):
        with (
            pytest.raises(InputError, match=rf"^the file \({error}\); get another$"),
            refusals("the file", "get another"),
        ):
            raise error
    with pytest.raises(KeyboardInterrupt), refusals("the file", "get another"):
        raise KeyboardInterrupt


def test_the_library_is_not_imported_by_who_asks_what_it_takes() -> None:
    code = (
        "import sys, tightfit.profiles.sources.tokenizer_memory, tightfit.runtime.data.sequence, tightfit.runtime.results.generation;"
        "print('tokenizers' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
