"""Options that stand once: a function has the fields of a record as its keywords, and a command as its options."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest
import typer
from typer.testing import CliRunner

from tightfit.runtime.cli.command import Command
from tightfit.runtime.cli.options import values_of, with_options
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.options import default_of, keywords_of, option, said, types_of


@dataclass(frozen=True, kw_only=True)
class Cake:
    eggs: int = option(2, "How many eggs.", least=1)
    sugar: float | None = option(None, "Grams of sugar.", metavar="GRAMS")
    nuts: bool = option(False, "Whether there are nuts.")
    layers: Mapping[str, int] | None = option(None, "Centimetres of each layer.", metavar="NAME=CENTIMETRES")
    fruit: Sequence[str] | None = option(None, "What is on it.")
    oven: object = None


@keywords_of(Cake)
def bake(name: str, options: Cake) -> tuple[str, Cake]:
    """A cake of that name."""
    return name, options


def test_a_function_takes_the_fields_of_its_record_as_keywords() -> None:
    assert bake("tart", eggs=3, fruit=["plum"]) == ("tart", Cake(eggs=3, fruit=["plum"]))
    assert bake(name="tart") == ("tart", Cake())
    assert str(inspect.signature(bake)).startswith("(name: 'str', *, eggs: 'int' = 2, sugar: 'float | None' = None")
    assert bake.__doc__ == "A cake of that name."
    with pytest.raises(TypeError, match=r"bake\(\) got an unexpected keyword argument 'salt'"):
        bake("tart", salt=1)
    with pytest.raises(TypeError, match="name"):
        bake(eggs=3)


def test_a_record_says_what_its_options_are() -> None:
    assert list(said(Cake)) == ["eggs", "sugar", "nuts", "layers", "fruit"]
    assert (said(Cake)["eggs"].help, said(Cake)["eggs"].least) == ("How many eggs.", 1)
    assert (default_of(Cake, "eggs"), default_of(Cake, "sugar")) == (2, None)
    assert types_of(Cake, "sugar") == (float,)
    assert types_of(Cake, "layers") == (Mapping[str, int],)


def command(*words: str, **decoration: object) -> dict[str, object]:
    found: list[dict[str, object]] = []
    app = typer.Typer(rich_markup_mode=None)

    @app.command(cls=Command)
    @with_options(Cake, **decoration)
    def main(name: str, oven: str = "hot", **options: object) -> None:
        found.append({"name": name, "oven": oven} | values_of(Cake, options))

    result = CliRunner().invoke(app, words)
    if isinstance(result.exception, InputError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return found[0] if found else {"help": result.output}


def test_a_command_has_the_options_of_a_record() -> None:
    given = command(
        "tart", "--eggs", "3", "--nuts", "--layers", "dough=2", "--layers", "cream=1", "--fruit", "plum, cherry"
    )
    assert given == {
        "name": "tart",
        "oven": "hot",
        "eggs": 3,
        "sugar": None,
        "nuts": True,
        "layers": {"dough": 2, "cream": 1},
        "fruit": ("plum", "cherry"),
    }
    usual = command("tart", eggs=4)
    assert (usual["eggs"], usual["nuts"], usual["layers"], usual["fruit"]) == (4, False, {}, ())
    shown = command("--help", after="oven")["help"]
    places = [
        shown.index(word) for word in ("--oven", "--eggs", "--sugar GRAMS", "--nuts / --no-nuts", "--layers NAME=")
    ]
    assert places == sorted(places)
    assert "How many eggs." in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--eggs", "0"), "--eggs 0: give a number of at least 1"),
        (("--layers", "dough"), "--layers 'dough': give a pattern of names and a number"),
        (("--layers", "dough=two"), "--layers 'dough=two': give a pattern of names and a number"),
    ],
)
def test_what_an_option_cannot_be_is_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        command("tart", *words)
