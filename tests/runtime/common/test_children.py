"""Processes of tightfit's own: their environment, what they read, and what they said last."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from tightfit.runtime.common.children import LAST_BYTES, SILENT, last_words, own_environment, start
from tightfit.runtime.common.interpreter import python_path

TELL = "import os, sys, tightfit; print(sys.stdin.read(), os.environ.get('A'), os.environ['PYTHONPATH'], tightfit.__file__)"


def said(*words, **options):
    child = start([sys.executable, "-P", "-c", *words], stdout=subprocess.PIPE, **options)
    return child.communicate(timeout=60)[0].decode().split()


def test_a_process_runs_these_packages_and_reads_nothing(monkeypatch):
    import tightfit

    monkeypatch.setenv("A", "inherited")
    told = said(TELL)
    assert told == ["inherited", python_path(), tightfit.__file__]
    assert said(TELL, environment=own_environment(A="given"))[0] == "given"


@pytest.mark.parametrize("of", [str, lambda text: io.BytesIO(text.encode())])
def test_the_last_line_is_what_a_process_said_last(of):
    assert last_words(of("first\nlast \n\n")) == "last"
    assert last_words(of(" \n")) == SILENT
    assert last_words(of(""), "exit status 3") == "exit status 3"
    assert last_words(of("x" * LAST_BYTES + "\nlast")) == "last"
