"""A tiny model that the command line has profiled and planned, once for all tests of bad input."""

from __future__ import annotations

# ruff: noqa: E402
from pathlib import Path
from sysconfig import get_path

from tightfit.runtime.engine.start.page_cache import forget_libraries

# Libraries that were just installed are mapped megabytes at a time, and then stay so for the processes that tests start.
for package in Path(get_path("platlib")).iterdir():
    if package.is_dir() and package.name != "nvidia":
        forget_libraries(package)

import contextlib
import fcntl
import json
import os
import shutil
import signal
import tempfile

import pytest
import torch
from chromium import PATIENCE, find_chromium
from damage import CONFIG, MEASURED, ROWS, SEQ, lines
from hypothesis import HealthCheck, settings
from reference import CONFIGS
from served import Served
from spilling_plans import with_small_start
from tiny_models import byte_level_tokenizer, random_weights, write_directory

from tightfit.planner.io import load_plan
from tightfit.planner.model_planner import ModelPlanner
from tightfit.profiles.api import load_profile, profile, save_profile
from tightfit.profiles.measuring import cpu_load
from tightfit.runtime.cli import main
from tightfit.runtime.common.files import cache_directory
from tightfit.runtime.supervision.cgroup import MemoryCgroup

# A shell that starts the suite in the background has SIGINT ignored, and children inherit that: Ctrl-C is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Properties hold however long an example takes: a machine that runs tests may stand still for seconds in any of them.
settings.register_profile("tightfit", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tightfit")

# Operators of tiny models spend their time waiting for a second thread, and two files of tests share two cores. Runs
# have the threads of their plans, in processes of their own.
torch.set_num_threads(1)

cpu_load.WAIT_SECONDS = 0.0  # the file that is tested beside this one would be waited for

MEASURED_OF_MACHINE = "TIGHTFIT_TESTS_MACHINE"
"""variable with the folder of what the processes of this run have measured of the machine"""
LONGEST = (
    "whole/test_demo_model",
    "whole/test_end_to_end",
    "whole/test_tiles",
    "whole/test_small_device",
    "whole/test_preference",
    "whole/test_train",
    "whole/test_bad_input",
    "profiles/tracing/test_tiles",
    "whole/test_federated",
    "runtime/session/test_rehearsal",
    "runtime/engine/fleet/test_transport",
    "runtime/session/test_session",
    "runtime/session/test_launch",
    "whole/test_split_federated",
    "whole/test_bad_runs",
    "planner/service/test_bundles",
    "planner/service/page/test_model",
    "whole/test_optimizers",
    "whole/test_accumulate",
    "runtime/engine/test_process",
    "planner/service/test_kill",
    "profiles/tracing/test_trace",
    "whole/test_any_decoder",
    "whole/test_adafactor",
    "planner/service/page/test_models",
    "whole/test_dora",
    "planner/service/test_limits",
    "runtime/engine/generation/test_traced_decoder",
    "runtime/engine/test_device",
    "planner/test_planner",
    "runtime/session/test_fleet",
    "runtime/session/test_pipeline",
    "planner/solve/test_reuse",
)
"""files, by about how long they take"""
assert all((Path(__file__).parent / f"{name}.py").exists() for name in LONGEST)


def pytest_configure(config):
    """The process that starts the others makes the folder for all of them."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="tightfit-tests-")
        os.environ[MEASURED_OF_MACHINE] = folder.name
        config.add_cleanup(folder.cleanup)


@pytest.hookimpl(tryfirst=True)  # before those that were not asked for by -m are left out
def pytest_collection_modifyitems(items):
    """The longest files first: one that starts last would keep a core of two idle. Cases that `slow_but_for` does not
    name are slow.
    """
    unknown = set()
    for item in items:
        if quick := item.get_closest_marker("slow_but_for"):
            unknown |= {(item.function, case) for case in quick.args}
    for item in items:
        if quick := item.get_closest_marker("slow_but_for"):
            unknown.discard((item.function, item.callspec.id))
            if item.callspec.id not in quick.args:
                item.add_marker(pytest.mark.slow)
    if unknown and not any("::" in words for words in items[0].config.args):
        raise pytest.UsageError(
            "; ".join(f"{test.__name__} has no case {case!r}, which slow_but_for names" for test, case in unknown)
        )
    place = {name: number for number, name in enumerate(LONGEST)}
    here = Path(__file__).parent
    items.sort(key=lambda item: place.get(item.path.relative_to(here).with_suffix("").as_posix(), len(LONGEST)))


@pytest.fixture(scope="module")
def browser():
    """Chromium; what needs it is skipped where there is none."""
    from playwright.sync_api import expect, sync_playwright

    try:
        path = find_chromium()
    except LookupError as error:
        pytest.skip(str(error))
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def tightfit(capfd):
    """Run a command in this process: (exit code, stdout, stderr)."""

    def call(*words):
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main.main([str(word) for word in words])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return caught.value.code, out, err

    return call


@pytest.fixture
def refused(tightfit):
    """Run a command that must fail with `code`, as a person and again with --json sees it: its message."""

    def call(code, *words):
        found, out, err = tightfit(*words, "--json")
        assert found == code, err
        told = json.loads(out)["error"]
        assert told["exit_code"] == code
        assert err.endswith(f"tightfit: {told['message']}\n")
        return told["message"]

    return call


@pytest.fixture(params=[True, False], ids=["cgroup", "meter"])
def cgroup(request):
    """Whether the kernel is to enforce a cap, where it can, or the meter alone."""
    if request.param:
        group = MemoryCgroup.create(64 << 20)
        if group is None:
            pytest.skip("no memory cgroup can be made here")
        group.remove()
    return request.param


@contextlib.contextmanager
def caching_in(path):
    """Nothing goes into the cache of the person who runs the tests, but for what is compiled, which takes ten seconds.
    What is measured of the machine is measured once for all caches of a run.
    """
    compiled = cache_directory() / "native"
    compiled.mkdir(parents=True, exist_ok=True)
    path.mkdir(exist_ok=True)
    for name, shared in (("native", compiled.resolve()), ("machine", os.environ[MEASURED_OF_MACHINE])):
        with contextlib.suppress(FileExistsError):
            (path / name).symlink_to(shared)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIGHTFIT_CACHE", str(path))
        yield path


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    with caching_in(tmp_path_factory.mktemp("cache")) as path:
        yield path


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(name, make): a folder that `make(folder)` has filled, in the first of the processes that need it. Nobody
    changes it later.
    """
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(name, make):
        folder, whole = root / name, root / f"{name}.whole"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not whole.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                whole.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def work(once, cache):
    """model/, profile.json and plan.json (an absurdly large budget), data.jsonl: made as a user makes them, with a
    cache.
    """

    def make(path):
        write_directory(path / "model", CONFIG, random_weights(CONFIG), tokenizer=byte_level_tokenizer())
        (path / "data.jsonl").write_text(lines(ROWS))
        for words in (
            ["profile", path / "model", "--seq", SEQ, "--batch", 2, "--lora-rank", 4, "-o", path / "profile.json"],
            ["plan", path / "profile.json", "--memory", (1 << 63) - 1, "--no-wait", "-o", path / "plan.json"],
        ):
            with caching_in(path / "cache"), pytest.raises(SystemExit) as caught:
                main.main([str(word) for word in words])
            assert caught.value.code == 0

    return once("work", make)


@pytest.fixture(scope="session")
def measured(once, work):
    """Data folder of a service that has measured the tiny model, once for all tests that run it through a service.

    What `work` has measured lies in the service's own cache already: to measure takes long.
    """

    def make(folder):
        shutil.copytree(work / "cache", folder / "data" / "cache")
        service = Served(folder / "data", "--root", str(work)).start()
        try:
            service.result("/v1/profiles", **MEASURED)
        finally:
            service.stop()

    return once("measured", make) / "data"


@pytest.fixture(scope="session")
def llama_of_one(once, cache):
    """A llama of three layers with a tokenizer, measured for steps of one sample of 29 tokens in float32."""

    def make(path):
        config = CONFIGS["llama"]
        write_directory(path / "model", config, random_weights(config), tokenizer=byte_level_tokenizer())
        options = {"batch": 1, "seq": 29, "lora_rank": 4, "lora_alpha": 8.0, "dtype": "float32"}
        with caching_in(path / "cache"):
            save_profile(profile(str(path / "model"), **options), path / "profile.json")

    return load_profile(once("llama_of_one", make) / "profile.json")


@pytest.fixture(scope="session")
def planned(work):
    return load_plan(work / "plan.json")


@pytest.fixture(scope="session")
def lean(work):
    """The profile as a machine would give it whose imports need no more than what stays resident."""
    return with_small_start(load_profile(work / "profile.json"))


@pytest.fixture(scope="session")
def smallest(lean):
    """The schedule of the smallest budget, which spills. The search for it comes to its own end, so that another finds
    the same.
    """
    planner = ModelPlanner(lean)
    return planner.plan(planner.minimum_bytes(time_limit=600), time_limit=600)
