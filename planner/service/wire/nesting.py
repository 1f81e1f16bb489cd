"""Bounds how deep JSON that is sent is nested: what walks it or writes it down again would not get to its end."""

from __future__ import annotations

from typing import Any

from tightfit.runtime.common.strict_json import is_deeper

DEEPEST = 64
"""levels of objects and lists nested in one another"""


def too_deep(data: Any) -> bool:
    """Whether JSON has objects and lists nested in one another in more than `DEEPEST` levels."""
    return is_deeper(data, DEEPEST)
