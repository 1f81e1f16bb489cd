"""Libraries that lie in the page cache in large folios, as after an installation."""

import os

import pytest

from tightfit.runtime.engine.start.page_cache import MOST_AROUND, forget_large_folios, mapped_around

MIB = 1 << 20


def around(path):
    with path.open("rb") as file:
        return mapped_around(file.fileno())


def test_a_library_that_was_written_in_one_go_is_mapped_in_small_pieces(tmp_path):
    library = tmp_path / "library.so"
    content = os.urandom(64 * MIB)
    library.write_bytes(content)
    if around(library) <= MOST_AROUND:
        pytest.skip("this kernel or file system makes no large folios")
    assert forget_large_folios(library)
    assert around(library) <= MOST_AROUND
    assert not forget_large_folios(library)
    assert library.read_bytes() == content


def test_what_is_no_library_is_left_alone(tmp_path):
    (tmp_path / "empty.so").touch()
    assert not forget_large_folios(tmp_path / "empty.so")
    assert not forget_large_folios(tmp_path / "none.so")
