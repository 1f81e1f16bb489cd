"""The text of tokens, one by one, against what the tokenizers decode all at once."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tiny_models import TEXT, byte_level_tokenizer, sentence_piece_tokenizer
from tokenizers import Tokenizer, decoders, models

from tightfit.profiles.sources.vocabulary import Vocabulary
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.data.token_bytes import token_bytes
from tightfit.runtime.supervision.token_text import NO_SPACE, TokenText, write_table


def metaspace_tokenizer() -> Tokenizer:
    tokenizer = sentence_piece_tokenizer()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


@pytest.mark.parametrize("made", [byte_level_tokenizer, sentence_piece_tokenizer, metaspace_tokenizer])
def test_tokens_one_by_one_are_the_text_of_all(made, tmp_path: Path) -> None:
    tokenizer = made()
    write_table(str(tmp_path / "table"), *token_bytes(Vocabulary(tokenizer=tokenizer), tokenizer.get_vocab_size()))
    shown = TokenText(str(tmp_path / "table"))
    chosen = random.Random(0)
    texts = [tokenizer.encode(text, add_special_tokens=True).ids for text in [*TEXT, " two  spaces", "日本語 ñ"]]
    plain = [number for token, number in tokenizer.get_vocab().items() if not token.startswith("<")]
    for ids in [*texts, *([chosen.choice(plain) for _ in range(30)] for _ in range(20))]:
        shown.begin()
        parts = [shown.add(token) for token in ids]
        text = "".join(parts) + shown.end()
        assert text == tokenizer.decode(ids, skip_special_tokens=True)
    shown.close()


def test_letters_of_several_tokens_come_when_they_are_complete(tmp_path: Path) -> None:
    write_table(str(tmp_path / "table"), [b"a", "é".encode()[:1], "é".encode()[1:]], NO_SPACE)
    shown = TokenText(str(tmp_path / "table"))
    assert [shown.add(token) for token in (0, 1, 2, 1, 7)] == ["a", "", "é", "", ""]
    assert shown.end() == "\N{REPLACEMENT CHARACTER}"


def test_an_unknown_decoder_is_refused() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(InputError, match="the tokenizer decodes with WordPiece, which tightfit cannot show"):
        token_bytes(Vocabulary(tokenizer=tokenizer), 1)
