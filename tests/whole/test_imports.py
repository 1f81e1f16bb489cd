"""Files import each other in one direction: no circle, not even through an import inside a function."""

from __future__ import annotations

import ast
from pathlib import Path

import networkx as nx

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("profiles", "planner", "runtime")


def modules():
    """Path of every module of the package, by name."""
    found = {}
    for path in (path for top in FOLDERS for path in (ROOT / top).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(("tightfit", *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    return found


def imported(tree):
    """What a file imports at any place, but for what only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from imported(node)


def graph_of(found):
    graph = nx.DiGraph()
    for module, path in found.items():
        for name in imported(ast.parse(path.read_text())):
            target = name if name in found else name.rpartition(".")[0]
            if target in found and target != module:
                graph.add_edge(module, target)
    return graph


def test_no_files_import_each_other_in_a_circle():
    found = modules()
    graph = graph_of(found)
    assert graph.has_edge("tightfit.runtime.engine.training.trainer", "tightfit.runtime.engine.training.updates")
    assert graph.has_edge("tightfit.runtime.cli.plan", "tightfit.planner.plan")  # inside a function
    circles = [sorted(part) for part in nx.strongly_connected_components(graph) if len(part) > 1]
    assert not circles


def test_a_circle_is_found(tmp_path):
    (tmp_path / "a.py").write_text("import b\n")
    (tmp_path / "b.py").write_text("def f():\n    from a import g\n")
    graph = graph_of({name: tmp_path / f"{name}.py" for name in "ab"})
    assert [len(part) for part in nx.strongly_connected_components(graph)] == [2]
