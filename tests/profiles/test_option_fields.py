"""Options that stand once: a function has the fields of a record as its keywords, and a command as its options."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
import pytest
import torch
import typer
from pydantic import Field
from typer.testing import CliRunner

from tightfit.profiles.option_fields import Options, keywords_of, option, options_of, types_of
from tightfit.runtime.cli.command import Command
from tightfit.runtime.cli.options import read, with_options
from tightfit.runtime.common.errors import InputError


class Cake(Options):
    eggs: int = option(2, "How many eggs.", ge=1, le=12)
    sugar: float | None = option(None, "Grams of sugar.", metavar="GRAMS", primary=True)
    nuts: bool = option(False, "Whether there are nuts.")
    kind: Literal["round", "square"] = option("round", "Its form.")
    layers: Mapping[str, Annotated[int, Field(ge=1)]] | None = option(
        None, "Centimetres of each layer.", metavar="NAME=CENTIMETRES"
    )
    fruit: Sequence[str] | None = option(None, "What is on it.")
    oven: object = None


@keywords_of(Cake)
def bake(name: str, options: Cake) -> tuple[str, Cake]:
    """A cake of that name."""
    return name, options


def test_a_function_takes_the_fields_of_its_record_as_keywords() -> None:
    assert bake("tart", eggs=3, fruit=["plum"]) == ("tart", Cake(eggs=3, fruit=["plum"]))
    assert bake(name="tart") == ("tart", Cake())
    assert list(inspect.signature(bake).parameters) == ["name", *Cake.model_fields]
    assert inspect.signature(bake).parameters["eggs"].default == 2
    assert bake.__doc__ == "A cake of that name."
    with pytest.raises(TypeError, match=r"bake\(\) got an unexpected keyword argument 'salt'"):
        bake("tart", salt=1)
    with pytest.raises(TypeError, match="name"):
        bake(eggs=3)


def test_a_record_says_what_its_options_are() -> None:
    options = options_of(Cake)
    assert list(options) == ["sugar", "eggs", "nuts", "kind", "layers", "fruit"]  # most people need the first
    assert (options["eggs"].description, options["eggs"].default) == ("How many eggs.", 2)
    assert types_of(options["sugar"].annotation) == (float,)
    assert types_of(options["fruit"].annotation) == (Sequence[str],)


def test_numbers_of_other_libraries_become_python_s_own() -> None:
    cake = Cake(eggs=np.int64(3), sugar=torch.tensor(0.5))
    assert (type(cake.eggs), type(cake.sugar)) == (int, float)
    assert cake == Cake(eggs=3, sugar=0.5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eggs": 0}, "eggs 0: it should be greater than or equal to 1"),
        ({"eggs": 13}, "eggs 13: it should be less than or equal to 12"),
        ({"eggs": True}, "eggs True: it should be a valid integer"),
        ({"eggs": "3"}, "eggs '3': it should be a valid integer"),
        ({"sugar": float("nan")}, "sugar nan: it should be a finite number"),
        ({"kind": "flat"}, "kind 'flat': it should be 'round' or 'square'"),
        ({"layers": {"dough": 0}}, "layers dough 0: it should be greater than or equal to 1"),
        ({"fruit": "plum"}, "fruit 'plum': 'str' instances are not allowed as a Sequence value"),
        ({"salt": 1}, "salt: Extra inputs are not permitted"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_by_name(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Cake(**values)
    assert str(caught.value) == message


def command(*words: str, **decoration: object) -> dict[str, object]:
    found: list[dict[str, object]] = []
    app = typer.Typer(rich_markup_mode=None)

    @app.command(cls=Command)
    @with_options(Cake, **decoration)
    def main(name: str, oven: str = "hot", **options: object) -> None:
        found.append({"name": name, "oven": oven} | read(Cake, options).model_dump(exclude={"oven"}))

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
        "kind": "round",
        "layers": {"dough": 2, "cream": 1},
        "fruit": ("plum", "cherry"),
    }
    usual = command("tart", eggs=4)
    assert (usual["eggs"], usual["nuts"], usual["layers"], usual["fruit"]) == (4, False, None, None)
    shown = command("--help-all", after="oven")["help"]
    places = [
        shown.index(word) for word in ("--oven", "--sugar GRAMS", "--eggs", "--nuts / --no-nuts", "--layers NAME=")
    ]
    assert places == sorted(places)
    assert "How many eggs." in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--eggs", "0"), "eggs 0: it should be greater than or equal to 1"),
        (("--layers", "dough"), "--layers 'dough': give a pattern of names and a number"),
        (("--layers", "dough=two"), "--layers 'dough=two': give a pattern of names and a number"),
    ],
)
def test_what_an_option_cannot_be_is_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        command("tart", *words)
