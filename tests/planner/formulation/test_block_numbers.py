"""The numbered blocks of docs/formulation.md stand in the code where the page's table says, and no others do."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PLANNER = ROOT / "planner"
PAGE = (ROOT / "docs" / "formulation.md").read_text()


def numbers_of_cell(cell):
    """[1, 2, 3, 5] of `(1)–(3), (5)`."""
    parts = re.findall(r"\((\d+)\)(?:–\((\d+)\))?", cell)
    return [number for first, last in parts for number in range(int(first), int(last or first) + 1)]


def files_by_number():
    """Number of a block -> the file in which the table says that it stands; raises AssertionError for two rows of one
    block.
    """
    files = {}
    for cell, file in re.findall(r"^\| (\(\d.*?) \|.*\| `(\S+\.py)` \|$", PAGE, re.MULTILINE):
        for number in numbers_of_cell(cell):
            assert number not in files, f"({number}) has two rows"
            files[number] = file
    return files


def remarks(source):
    """Comments and docstrings of a file, but for its own docstring, without the marks around them."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string.lstrip("# ")
    module = ast.parse(source)
    statements = (node.value for node in ast.walk(module) if isinstance(node, ast.Expr) and node is not module.body[0])
    yield from (value.value for value in statements if isinstance(value, ast.Constant) and isinstance(value.value, str))


def blocks_by_file():
    """(number, file) for every comment or docstring that begins with the number of a block."""
    found = set()
    for path in PLANNER.rglob("*.py"):
        heads = (re.match(r"\((\d+)\)(?! to \()", remark) for remark in remarks(path.read_text()))
        found |= {(int(head[1]), path.relative_to(PLANNER).as_posix()) for head in heads if head}
    return found


def test_the_page_numbers_its_blocks_without_gaps_and_its_table_has_them_all():
    blocks = [int(number) for number in re.findall(r"\*\*\((\d+)\)", PAGE)]
    assert sorted(blocks) == list(range(1, len(blocks) + 1))
    assert sorted(files_by_number()) == sorted(blocks)


def test_every_block_stands_in_the_code_where_the_table_says_and_nowhere_else():
    assert blocks_by_file() == set(files_by_number().items())


def test_remarks_in_the_code_name_no_block_that_the_page_has_not():
    known = set(files_by_number())
    for path in PLANNER.rglob("*.py"):
        for remark in remarks(path.read_text()):
            named = {int(number) for number in re.findall(r"(?<!\w)\((\d+)\)", remark)}
            assert named <= known, f"{path.relative_to(ROOT)}: {remark}"
