"""Bounds how deep JSON that is sent is nested: what walks it or writes it down again would not get to its end."""

from __future__ import annotations

from typing import Any

DEEPEST = 64
"""levels of objects and lists nested in one another"""


def too_deep(data: Any) -> bool:
    """Whether JSON has objects and lists nested in one another in more than `DEEPEST` levels."""
    level = [data]
    for _ in range(DEEPEST + 1):
        level = [one for one in level if isinstance(one, (dict, list))]
        if not level:
            return False
        level = [part for one in level for part in (one.values() if isinstance(one, dict) else one)]
    return True
