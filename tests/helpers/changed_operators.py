"""Profiles and plans whose operators have other figures."""

from __future__ import annotations


def with_operators(made, change):
    """The profile or plan with fields of its operators replaced by `change`(operator), a dict."""
    programs = [
        program.model_copy(update={"operators": [one.model_copy(update=change(one)) for one in program.operators]})
        for program in made.programs
    ]
    return made.model_copy(update={"programs": programs})
