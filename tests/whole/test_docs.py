"""Tables in the documentation of what is tested are those of the tests; its links lead somewhere; files say what they
are.

``python tests/whole/test_docs.py`` (``make docs``) writes the tables anew.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("profiles", "planner", "runtime")
PROMISES = "What README promises"


def first_sentence(path):
    """The first paragraph of a file's docstring, on one line."""
    doc = ast.get_docstring(ast.parse(path.read_text()), clean=True) or ""
    return " ".join(doc.split("\n\n")[0].split())


def test_tables_of_what_is_tested_are_those_of_the_tests():
    from documented_tables import TABLES, with_table

    for (name, table), lines in TABLES.items():
        text = (ROOT / "docs" / name).read_text()
        assert text == with_table(text, table, lines()), "run `make docs`"


def test_every_file_says_what_it_is():
    silent = [path for top in FOLDERS for path in (ROOT / top).rglob("*.py") if not first_sentence(path)]
    assert not silent


def anchors(path):
    """The addresses of the headings of a page, as GitHub makes them."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    broken = []
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for link, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", path.read_text()):
            if link.startswith(("http:", "https:")):
                continue
            target = path.parent / link if link else path
            if not target.exists() or (anchor and anchor not in anchors(target)):
                broken.append(f"{path.relative_to(ROOT)}: {link}#{anchor}")
    assert not broken


def rows(page):
    """(heading, cells) of every row in the tables of a page, but for their own headings."""
    heading, found = "", []
    for line in page.splitlines():
        if line.startswith("## "):
            heading = line[3:]
        elif line.startswith("| ") and not line.startswith(("| expected", "| promise")):
            found.append((heading, [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]))
    return found


def test_what_people_expect_is_shown_by_tests_and_options_that_there_are():
    import typer

    from tightfit.runtime.cli.main import app

    def options(command):
        for other in getattr(command, "commands", {}).values():
            yield from options(other)
        yield from (word for parameter in command.params for word in (*parameter.opts, *parameter.secondary_opts))

    known = set(options(typer.main.get_command(app)))
    table = [(heading, cells) for heading, cells in rows((ROOT / "docs" / "expectations.md").read_text())]
    assert len(table) > 60
    for heading, cells in table:
        here = cells[2] if heading != PROMISES else cells[0]
        assert set(re.findall(r"`[^`]*?(--[a-z-]+)", here)) <= known, here
        if heading == "What is not here":
            continue
        tests = re.findall(r"`(tests/[a-z_/]+\.py)::([a-z_]+)`", cells[-1])
        assert tests, cells
        for file, name in tests:
            functions = {
                one.name: [ast.unparse(decorator) for decorator in one.decorator_list]
                for one in ast.parse((ROOT / file).read_text()).body
                if isinstance(one, ast.FunctionDef)
            }
            assert name in functions, f"{file}::{name}"
            assert "pytest.mark.slow" not in functions[name], f"{file}::{name} is not among the tests of `make test`"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    from documented_tables import TABLES, with_table

    for (name, table), lines in TABLES.items():
        path = ROOT / "docs" / name
        path.write_text(with_table(path.read_text(), table, lines()))
    sys.stdout.write("".join(f"{path}\n" for path in (ROOT / "docs" / name for name, _ in TABLES)))
