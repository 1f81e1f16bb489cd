"""What all commands have in common: which options their help shows, how messages name them, and advice on unknown
ones.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

from typer.core import TyperCommand

from tightfit.profiles.option_fields import PRIMARY
from tightfit.runtime.cli.options import key_of
from tightfit.runtime.cli.other_tools import hint
from tightfit.runtime.common.option_names import named_as, on_command_line

LIBRARY_NAMES = {"out": "output"}
"""name of an option in Python -> name of the command's parameter, where they differ"""
EVERYTHING = "help_all"
"""key in a context's `meta`: all options are to be shown"""


class Command(TyperCommand):
    """A command whose help shows the options that most people need, and all of them with ``--help-all``.

    Those are the ones that have to be given and those that say so where they are declared (`PRIMARY`); a command
    none of whose options says so shows all.
    """

    def get_params(self, ctx: Any) -> list[Any]:
        params, help_option = super().get_params(ctx), self.get_help_option(ctx)
        if help_option is None or not self._primary():
            return params
        help_all = copy.copy(help_option)
        help_all.name, help_all.opts, help_all.callback = EVERYTHING, ["--help-all"], _show_all
        help_all.help = f"Show all {len(params)} options and exit."
        return [*params, help_all]

    def _primary(self) -> set[str]:
        """The names of the options that say that most people need them."""
        function: Any = inspect.unwrap(self.callback) if self.callback else None
        parameters = inspect.signature(function, eval_str=True).parameters if function else {}
        return {name for name, parameter in parameters.items() if PRIMARY in get_args(parameter.annotation)[1:]}

    @contextmanager
    def hinting(self) -> Iterator[None]:
        """While entered, the error about an unknown option says what tightfit calls it, if it is one of other
        trainers.
        """
        try:
            yield
        except Exception as error:
            if type(error).__name__ == "NoSuchOption":
                unknown: Any = error
                spellings = {
                    key_of(each): max(each.opts, key=len)
                    if each.param_type_name == "option"
                    else each.metavar or each.name
                    for each in self.params
                }
                if advice := hint(unknown.option_name.lstrip("-"), spellings, near=False):
                    unknown.message, unknown.possibilities = f"No such option: {unknown.option_name}{advice}", None
            raise

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with self.hinting():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        by_name = {str(parameter.name): parameter for parameter in self.params}

        def naming(name: str, value: Any = None) -> str:
            parameter = by_name.get(LIBRARY_NAMES.get(name, name))
            if parameter is None:
                return on_command_line(name, value)
            source = getattr(ctx.get_parameter_source(parameter.name), "name", "")
            if ctx.default_map and source != "COMMANDLINE":  # its place is the file of options
                return key_of(parameter) if value is None else f"{key_of(parameter)} = {value}"
            return on_command_line(key_of(parameter), value)

        with named_as(naming):
            return super().invoke(ctx)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        primary = self._primary()
        if not primary or ctx.meta.get(EVERYTHING):
            self.format_all(ctx, formatter)
            return
        arguments, needed, others = [], [], []
        for parameter in self.get_params(ctx):
            if not (record := parameter.get_help_record(ctx)):
                continue
            if parameter.param_type_name == "argument":
                arguments.append(record)
            elif parameter.required:
                needed.append(record)
            elif parameter.name in primary or parameter.is_eager:
                others.append(record)
        for heading, records in (("Arguments", arguments), ("Options", needed + others)):
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)

    def format_all(self, ctx: Any, formatter: Any) -> None:
        """Show every option."""
        super().format_options(ctx, formatter)


def _show_all(ctx: Any, parameter: Any, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        ctx.meta[EVERYTHING] = True
        print(ctx.get_help())  # noqa: T201  as --help does
        ctx.exit()
