"""`tightfit train`: its options are those of its stages; files of options; what it keeps of an earlier call; how it
ends.
"""

from __future__ import annotations

import functools
import json
import re
import signal
from pathlib import Path
from typing import Annotated

import pytest
import typer
from synthetic import decoder_like, device
from tiny_plans import CONFIG

from tightfit.planner.io import load_plan
from tightfit.planner.search_options import PlanOptions
from tightfit.profiles.api import load_profile
from tightfit.profiles.option_fields import PRIMARY, WORD, extras
from tightfit.profiles.option_fields import options_of as fields_of
from tightfit.profiles.options import ProfileOptions
from tightfit.runtime.cli import main, train_stages
from tightfit.runtime.cli import train as stages
from tightfit.runtime.cli.config_file import FOR_ONE_CALL, read_file, write_options
from tightfit.runtime.cli.options import key_of
from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.engine.start.lean_torch import installed_version
from tightfit.runtime.session.options import RunOptions

COMMANDS = typer.main.get_command(main.app).commands
TRAIN = COMMANDS["train"]
OWN = {"--seq", "--memory", "--adapter", "--output"}
"""options that several stages have, or that mean more here"""
DECLARED_ANEW = {("train", "adapter"), ("compare", "policy")}
"""(command, option of a record that it declares itself)"""


def context(*words):
    return TRAIN.make_context("train", [str(word) for word in words])


def options_of(*words):
    """What the command would write down, by key."""
    found = context(*words)
    return train_stages._settings(found, found.params | {"output": Path(found.params["output"])})


# --- options of the stages --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["profile", "plan", "run"])
def test_every_option_of_a_stage_is_one_of_train(name):
    own = {parameter.opts[-1]: parameter for parameter in TRAIN.params}
    for parameter in COMMANDS[name].params:
        if parameter.param_type_name == "argument" or getattr(parameter, "hidden", False):
            continue
        mine = own[parameter.opts[-1]]
        assert (mine.name, mine.opts, mine.secondary_opts) == (parameter.name, parameter.opts, parameter.secondary_opts)
        if parameter.opts[-1] not in OWN:
            assert (mine.default, mine.required, mine.help, mine.metavar, mine.multiple) == (
                parameter.default,
                parameter.required,
                parameter.help,
                parameter.metavar,
                parameter.multiple,
            )


@pytest.mark.parametrize("name", ["profile", "plan", "run"])
def test_every_option_in_the_help_of_a_stage_is_in_that_of_train(tightfit, name):
    shown = set(re.findall(r"^  .*?(--[a-z-]+)", tightfit("train", "--help-all")[1], re.MULTILINE))
    assert len(shown) > 40
    assert set(re.findall(r"^  .*?(--[a-z-]+)", tightfit(name, "--help-all")[1], re.MULTILINE)) <= shown


def test_the_help_has_headings(tightfit):
    code, said, err = tightfit("train", "--help-all")
    assert (code, err) == (0, "")
    parts = re.split(r"^(\S.*):$", said, flags=re.MULTILINE)
    under = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert [*under] == ["Arguments", "Model and step", "Memory", "Training", "Options"]
    for heading, option in (
        ("Arguments", "MODEL"),
        ("Model and step", "--lora-rank"),
        ("Memory", "--policy"),
        ("Training", "--lr"),
        ("Options", "--json"),
    ):
        assert [one for one, text in under.items() if re.search(rf"^  {option} ", text, re.MULTILINE)] == [heading]
    assert "--stages" not in said


@pytest.mark.parametrize(
    "name",
    [
        *("train", "profile", "plan", "compare", "run", "generate", "chat", "eval", "fleet plan", "fleet run"),
        "fleet federate run",
    ],
)
def test_the_help_shows_first_what_people_need_and_the_rest_on_request(tightfit, name):
    def options(words):
        return re.findall(r"^  (?:-\w, )?(--[a-z0-9-]+)", tightfit(*name.split(), words)[1], re.MULTILINE)

    command = functools.reduce(lambda group, word: group.commands[word], name.split(), typer.main.get_command(main.app))
    primary, every = options("--help"), options("--help-all")
    assert len(every) == len({*every})
    assert {*primary} <= {*every}
    needed = [one.opts[-1] for one in command.params if one.required and one.param_type_name == "option"]
    assert sorted(primary[: len(needed)]) == sorted(needed)
    declared = [
        record
        for record in (ProfileOptions, PlanOptions, RunOptions)
        if {*fields_of(record)} <= {one.name for one in command.params}
    ]
    for record in declared:
        for option, told in fields_of(record).items():
            shown = (extras(told)[WORD] or f"--{option.replace('_', '-')}") in primary
            assert shown == (extras(told)[PRIMARY] or f"--{option}" in needed or (name, option) in DECLARED_ANEW), (
                option
            )
    assert len(primary) < 0.75 * len(every)
    assert tightfit(*name.split(), "--help")[1].count("\n") < 85


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("fleet", "run", "--num-train-epochs=3"), "--num-train-epochs; it is --epochs here"),
        (("fleet", "federate", "run", "--learning-rate=1e-4"), "--learning-rate; it is --lr here"),
        (("fleet", "plan", "--lora-r=8"), "--lora-r; `tightfit profile` and `tightfit train` have it: --lora-rank"),
    ],
)
def test_fleets_know_what_other_trainers_call_an_option(refused, words, hint):
    assert hint in refused(2, *words)


def test_stages_share_no_other_options():
    """Those of one name would all get the same value."""
    names = [
        {parameter.opts[-1] for parameter in COMMANDS[name].params if parameter.param_type_name == "option"}
        for name in ("profile", "plan", "run")
    ]
    shared = {one for here in names for one in here if sum(one in there for there in names) > 1}
    assert shared == {"--output", "--json", "--debug", "--adapter", "--server", "--certificate", "--memory"}


def test_an_option_that_a_stage_gets_tomorrow(monkeypatch):
    def plan(
        *,
        optimizer: Annotated[str, typer.Option("--optimizer", metavar="NAME", help="Which one.")] = "adamw",
        secret: Annotated[str, typer.Option(hidden=True)] = "",
    ) -> None: ...

    def own(*, context: typer.Context, **options: object) -> None: ...

    monkeypatch.setattr(stages, "STAGES", (("Memory", plan),))
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(cls=stages.TrainCommand)(stages._with_options_of_stages(own))
    (option,) = typer.main.get_command(app).params
    assert (option.opts, option.default, option.help, option.metavar) == (
        ["--optimizer"],
        "adamw",
        "Which one.",
        "NAME",
    )


# --- files of options -------------------------------------------------------------------------------------------------

YAML = """
model: a/model
data: random
steps: 7
output: there
lora-rank: 4
lr: 2e-4
memory: 600MiB
rank_pattern: {q_proj: 16, v_proj: 2}
alpha-pattern: [q_proj=32]
eval: held-out.jsonl
dora: true
cgroup: false
lora_layers: 8
policy: null
"""
TOML = """
model = "a/model"
data = "random"
steps = 7
output = "there"
lora-rank = 4
lr = 2e-4
memory = "600MiB"
alpha-pattern = ["q_proj=32"]
eval = "held-out.jsonl"
dora = true
cgroup = false
lora_layers = "8"

[rank_pattern]
q_proj = 16
v_proj = 2
"""


@pytest.fixture(params=["yaml", "yml", "toml"])
def file(request, tmp_path):
    path = tmp_path / f"mine.{request.param}"
    path.write_text(TOML if request.param == "toml" else YAML)
    return path


def test_a_file_says_what_words_say(file):
    words = ["a/model", "--data", "random", "--steps", 7, "-o", "there", "--lora-rank", 4, "--lr", 2e-4]
    words += ["--memory", "600MiB", "--rank-pattern", "q_proj=16", "--rank-pattern", "v_proj=2"]
    words += ["--alpha-pattern", "q_proj=32", "--eval", "held-out.jsonl", "--dora", "--no-cgroup", "--lora-layers", 8]
    found, said = context("--config", file).params, context(*words).params
    assert found | {"config": None} == said


def test_the_command_line_goes_before_a_file(file):
    words = ("other", "--steps", 9, "--config", file, "--rank-pattern", "k_proj=3")
    found = context(*words, "--cgroup").params
    assert (found["model"], found["steps"], found["cgroup"]) == ("other", 9, True)
    assert [*found["rank_pattern"]] == ["k_proj=3"]
    assert (found["lora_rank"], found["dora"]) == (4, True)
    assert context(*words, "--no-dora").params["dora"] is False


def test_every_switch_in_a_file_can_be_turned_on_the_command_line(tmp_path):
    switches = {key_of(one): one for one in TRAIN.params if getattr(one, "is_flag", False)}
    switches = {key: one for key, one in switches.items() if key not in FOR_ONE_CALL}
    assert {"packing", "truncate", "keep_best", "rslora", "what_if", "cgroup"} <= switches.keys()
    path = tmp_path / "a.yaml"
    words = ("m", "--data", "random", "--steps", 1, "-o", "o", "--config", path)
    for on in (True, False):
        path.write_text("".join(f"{key}: {'true' if on else 'false'}\n" for key in switches))
        told = [(one.secondary_opts if on else one.opts)[0] for one in switches.values()]
        for given, expected in (((), on), (told, not on)):
            found = context(*words, *given).params
            assert {found[one.name] for one in switches.values()} == {expected}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_rnk: 4", "lora_rnk: no option of `train`; the nearest is lora_rank"),
        ("learning_rate: 1", "learning_rate: no option of `train`; it is lr here"),
        ("xyzzy: 1", "xyzzy: no option of `train`"),
        ("lora_rank: four", "lora_rank: 'four' is no value for it ("),
        ("steps: 2.5", "steps: 2.5 is no value for it ("),
        ("steps: true", "steps: True is no value for it; write a number or words"),
        ("dora: 1", "dora: 1 is no value for it; write true or false"),
        ("data: [a, b]", "data: one value is due; write several names as one, with commas between them"),
        ("rank_pattern: [[1]]", "rank_pattern: [1] is no value for it; write a number or words"),
        ("overwrite: true", "overwrite: this is said on the command line, not in a file; leave it out"),
        ("lora_rank: 4\nlora-rank: 5", "lora-rank: given twice"),
        ("- a", "no map of options; write a line such as 'batch: 4' for each"),
        ("", "no map of options; write a line such as 'batch: 4' for each"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, text, message):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        context("m", "--data", "random", "--steps", 1, "-o", "o", "--config", path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_files_that_cannot_be_read(tmp_path):
    for name, content, message in (
        ("a.yaml", b"a: [", "not YAML (while parsing"),
        ("a.toml", b"a = ", "not TOML (Invalid value"),
        ("b.toml", b"\xff", "not UTF-8 (byte 0); name a YAML or TOML file"),
        ("a.json", b"{}", "options are read from YAML or TOML; name the file .yaml, .yml or .toml"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError) as caught:
            read_file(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: {message}")
    with pytest.raises(InputError, match="No such file or directory; name a YAML or TOML file"):
        read_file(tmp_path / "none.yaml")


def test_the_home_folder_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/her")
    (tmp_path / "a.yaml").write_text("output: ~/out\ndata: ~/a.jsonl\n")
    found = context("~", "--steps", 1, "--config", tmp_path / "a.yaml").params
    assert (str(found["output"]), found["data"], found["model"]) == ("/home/her/out", "/home/her/a.jsonl", "~")


def test_without_a_reader_of_yaml_the_error_names_it(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "yaml", None)
    (tmp_path / "a.yaml").write_text(YAML)
    with pytest.raises(InputError, match=r"YAML needs PyYAML \(pip install pyyaml\); or write the options as TOML"):
        read_file(tmp_path / "a.yaml")


def test_what_is_written_down_says_the_same_again(file, tmp_path):
    used = options_of("--config", file, "--seed", 3, "--lora-targets", 'a "quoted"\\ pattern é')
    write_options(tmp_path / "config.toml", used, "for people")
    assert options_of("--config", tmp_path / "config.toml") == used
    known = {key_of(parameter) for parameter in TRAIN.params if parameter.default is not None}
    assert known - used.keys() == {"force", "resume", "overwrite", "json", "debug"}
    assert used["output"] == str(Path("there").absolute())


def test_a_persons_file_is_not_replaced(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("steps = 1\n")
    with pytest.raises(
        InputError, match="is not by tightfit, which writes the options that a run used under this name"
    ):
        write_options(path, {"steps": 2}, "")
    assert path.read_text() == "steps = 1\n"


# --- the stages -------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(monkeypatch, tmp_path):
    """`train` in this process, whose profile is made up and whose run is only noted."""
    from tightfit.profiles import api

    here = device(per_instruction=64).model_copy(
        update={"measured": True, "threads": 1, "torch_version": installed_version()}
    )
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))

    class Made:
        profiled, ran = [], []
        model = tmp_path / "config.json"
        out = tmp_path / "out"
        words = (model, "--data", "random", "--steps", 4, "-o", out, "--time-limit", 2, "--no-wait")
        measured = decoder_like(2, on=here)

    def profile(source, *, progress, **options):
        Made.profiled.append(options)
        return Made.measured

    @functools.wraps(stages.run)
    def run(context, **given):
        Made.ran.append(given)

    monkeypatch.setattr(api, "profile", profile)
    monkeypatch.setattr(stages, "run", run)
    return Made


def test_the_stages_are_called_with_their_options(made, tightfit):
    code, out, err = tightfit("train", *made.words, "--memory", "900MiB", "--batch", 3, "--lr", 0.5)
    assert (code, out) == (0, "")
    assert [(one["seq"], one["batch"], one["lora_rank"]) for one in made.profiled] == [(128, 3, None)]
    (ran,) = made.ran
    assert (ran["plan"], ran["output"]) == (made.out / "plan.json", made.out)
    assert (ran["data"], ran["steps"], ran["lr"], ran["resume"], ran["stages"]) == ("random", 4, 0.5, False, None)
    assert load_profile(made.out / "profile.json") == made.measured
    assert load_plan(made.out / "plan.json").budget_bytes == 900 << 20
    assert read_file(made.out / "config.toml")["memory"] == "900MiB"
    assert [line.partition(": ")[0] for line in err.splitlines() if ": " in line] == [
        "sequence",
        "profile",
        "not rehearsed",
        "plan",
        "plan",
        "plan",
    ]
    assert "next:" not in err


def test_auto_memory_is_said_and_written_down(made, tightfit, monkeypatch):
    from tightfit.runtime.supervision import spare_memory

    monkeypatch.setattr(spare_memory, "spare_memory", lambda **given: (700 << 20, "what there is"))
    _, _, err = tightfit("train", *made.words)
    assert "memory: 700.0 MiB; what there is\n" in err
    assert load_plan(made.out / "plan.json").budget_bytes == 700 << 20
    assert read_file(made.out / "config.toml")["memory"] == "700MiB"


def test_as_json_the_run_gets_what_the_stages_have_found(made, tightfit):
    assert tightfit("train", *made.words, "--memory", "900MiB", "--json")[0] == 0
    told = json.loads(made.ran[0]["stages"])
    assert told["profile"]["profile"] == str(made.out / "profile.json")
    assert told["plan"]["budget_bytes"] == 900 << 20


def test_what_fits_is_used_again_by_a_resumption(made, tightfit):
    assert tightfit("train", *made.words, "--memory", "900MiB")[0] == 0
    before = (made.out / "plan.json").stat()
    again = ("train", "--resume", "-o", made.out)
    assert tightfit(*again, "--steps", 9)[0] == 0
    assert (len(made.profiled), made.ran[1]["steps"]) == (1, 9)
    assert (made.out / "plan.json").stat() == before
    assert made.ran[1]["resume"] is False  # there is no checkpoint yet
    assert tightfit(*again, "--memory", "800MiB")[0] == 0
    assert (len(made.profiled), made.ran[2]["steps"]) == (1, 9)
    assert load_plan(made.out / "plan.json").budget_bytes == 800 << 20
    assert tightfit(*again, "--lora-rank", 3)[0] == 0
    assert [one["lora_rank"] for one in made.profiled] == [None, 3]
    (made.out / "plan.json").write_text("{")
    assert tightfit(*again)[0] == 0
    assert (len(made.profiled), load_plan(made.out / "plan.json").budget_bytes) == (2, 800 << 20)
    assert tightfit(*again, "--force")[0] == 0
    assert len(made.profiled) == 3


def test_a_resumption_goes_on_from_a_checkpoint_and_begins_again_without_one(made, tightfit):
    assert tightfit("train", *made.words, "--memory", "900MiB")[0] == 0
    (made.out / "metrics.jsonl").write_text('{"step": 1}\n')
    assert tightfit("train", "--resume", "-o", made.out)[0] == 0
    assert (made.ran[1]["resume"], made.ran[1]["overwrite"]) == (False, True)
    (made.out / "checkpoint-3").mkdir()
    assert tightfit("train", "--resume", "-o", made.out)[0] == 0
    assert (made.ran[2]["resume"], made.ran[2]["overwrite"]) == (True, False)


def test_an_earlier_run_is_not_touched_unasked(made, refused):
    (made.out / "adapter").mkdir(parents=True)
    said = refused(2, "train", *made.words, "--memory", "900MiB")
    assert said.startswith(f"{made.out} holds an earlier run (adapter); it has no checkpoint to go on from, replace it")
    assert made.profiled == []
    assert [path.name for path in made.out.iterdir()] == ["adapter"]


def test_resuming_what_train_did_not_begin(refused, tmp_path):
    said = refused(2, "train", "--resume", "-o", tmp_path)
    assert said == (
        f"{tmp_path}/config.toml: no such file, and it would say what the run was started with; name the folder that"
        " `tightfit train` has left, or give MODEL, --data and the other options again"
    )


def test_an_error_of_the_first_stage(made, refused, monkeypatch):
    from tightfit.profiles import api

    def fail(*_, **__):
        raise RunError("measuring failed")

    monkeypatch.setattr(api, "profile", fail)
    assert refused(4, "train", *made.words) == "measuring failed"


@pytest.mark.slow
def test_a_budget_that_is_too_small(made, tightfit):
    code, out, err = tightfit("train", *made.words, "--memory", "1MiB", "--json")
    assert "tightfit: no plan fits 1.0 MiB" in err
    told = json.loads(out)
    assert (code, told["plan"]["status"], told["plan"]["minimum_budget_bytes"] > 1 << 20) == (3, "infeasible", True)
    assert told["profile"]["profile"] == str(made.out / "profile.json")
    assert made.ran == []


def test_ctrl_c_while_measuring(made, refused, monkeypatch):
    from tightfit.profiles import api

    monkeypatch.setattr(api, "profile", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    again = "interrupted; go on with: tightfit train"
    assert refused(4, "train", *made.words) == f"{again} --resume -o {made.out}"
    (made.out / "checkpoint-3").mkdir()  # of the run that is to be replaced
    said = refused(4, "train", *made.words, "--overwrite")
    assert said == f"{again} --config {made.out / 'config.toml'} --overwrite"


def test_ctrl_c_while_planning_keeps_the_best_plan(made, tightfit, monkeypatch):
    from tightfit.planner.model_planner import ModelPlanner

    whole = ModelPlanner.plan

    def interrupted(self, *words, **options):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            return whole(self, *words, **options)

    monkeypatch.setattr(ModelPlanner, "plan", interrupted)
    path = made.out / "plan.json"
    code, out, said = tightfit("train", *made.words)
    again = f"tightfit train --resume -o {made.out}"
    assert (code, out) == (4, "")
    assert "interrupted: this is the best plan found so far, at most " in said
    assert said.endswith(f"plan written to {path}\ntightfit: interrupted; go on with: {again}\n")
    assert made.ran == []
    before = path.read_bytes()
    assert tightfit(*again.split()[1:])[0] == 0
    assert path.read_bytes() == before
    assert len(made.ran) == 1
