"""Tables of the documentation that are made of what tests are parametrised with, and of the commands' options: ``make
docs`` writes them, and tests/whole/test_docs.py compares them.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import checkpoint_formats
import decoder_families
import option_tables
import stateful_modules

TABLES: dict[tuple[str, str], Callable[[], list[str]]] = {
    ("models.md", "families"): decoder_families.table,
    ("checkpoints.md", "formats"): checkpoint_formats.table,
    ("python.md", "stateful kinds"): stateful_modules.table,
    **option_tables.TABLES,
}
"""(page in docs/, name of the table) -> its lines. The page has the table between ``<!-- NAME, by make docs -->`` and
``<!-- end of NAME -->``."""


def with_table(text: str, name: str, lines: list[str]) -> str:
    """The text of a page with a table's lines between its marks. Raises ValueError for a page without the marks."""
    first, last = f"<!-- {name}, by make docs -->\n", f"<!-- end of {name} -->\n"
    if text.count(first) != 1 or text.count(last) != 1:
        raise ValueError(f"the page has no table between {first.strip()!r} and {last.strip()!r}")
    made = "\n".join(["", *lines, "", ""])
    return re.sub(f"{re.escape(first)}.*{re.escape(last)}", lambda _: f"{first}{made}{last}", text, flags=re.DOTALL)
