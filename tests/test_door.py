"""`import tightfit` is the documented door: every name is there, and nothing heavy comes before it is asked for."""

from __future__ import annotations

import json
import subprocess
import sys

import tightfit


def test_every_name_of_the_door_is_there():
    for name in tightfit.__all__:
        assert getattr(tightfit, name).__name__ == name
    assert set(tightfit.__all__) <= set(dir(tightfit))
    assert not hasattr(tightfit, "nothing_like_that")


def test_the_door_itself_loads_nothing():
    code = "import json, sys; before = set(sys.modules); import tightfit; print(json.dumps(sorted(set(sys.modules) - before)))"
    loaded = json.loads(subprocess.check_output([sys.executable, "-c", code]))
    assert [name for name in loaded if name.partition(".")[0] not in sys.stdlib_module_names] == ["tightfit"]


def test_what_an_editor_reads_is_what_the_interpreter_finds():
    """The imports under TYPE_CHECKING and the table of places say the same."""
    import ast
    import inspect

    (block,) = (node for node in ast.parse(inspect.getsource(tightfit)).body if isinstance(node, ast.If))
    read = {alias.name: node.module for node in block.body for alias in node.names}
    assert read == tightfit._PLACE
    assert sorted(read) == tightfit.__all__
