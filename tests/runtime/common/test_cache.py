"""The cache folder: a file for each thing that is known, whole or not there, and not without end."""

from __future__ import annotations

import json
import os

import pytest

from tightfit.runtime.common import cache
from tightfit.runtime.common.cache import cache_place, keep, kept
from tightfit.runtime.common.errors import InputError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path))
    return tmp_path


def refused(content):
    raise InputError(f"{content!r} is of another version")


def test_what_is_kept_is_found_by_all_that_it_depends_on(folder):
    place = cache_place("kind", 1, {"b": 2, "a": [3]})
    assert place == cache_place("kind", 1, {"a": [3], "b": 2})
    assert place.parent == folder / "kind"
    assert place not in {cache_place("other", 1, {"b": 2, "a": [3]}), cache_place("kind", 1, {"b": 2, "a": [4]})}
    assert kept(place, json.loads) is None
    keep(place, "[7]")
    assert kept(place, json.loads) == [7]


@pytest.mark.parametrize("parse", [json.loads, refused])
def test_what_cannot_be_read_is_removed(parse):
    place = cache_place("kind", 1)
    keep(place, "{")
    assert kept(place, parse) is None
    assert not place.exists()


def test_of_many_those_go_that_were_used_longest_ago(monkeypatch):
    monkeypatch.setattr(cache, "MOST_FILES", 3)
    places = [cache_place("kind", number) for number in range(5)]
    for number, place in enumerate(places[:3]):
        keep(place, "1")
        os.utime(place, (number, number))
    assert kept(places[0], json.loads) == 1  # used now
    keep(places[3], "1")
    assert [place.exists() for place in places] == [True, False, True, True, False]
