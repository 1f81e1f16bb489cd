"""Bundles that a service makes for devices: the same as there, nothing of where the model lies, and whatever else is
sent refused in words.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from certificates import self_signed
from damage import CONFIG
from decoder_families import FAMILIES
from peft_adapters import save_model
from places import SOURCES
from served import Served, service
from synthetic import small_chain
from typer.testing import CliRunner

from tightfit.planner.service import client
from tightfit.planner.service.client import Client, connect
from tightfit.profiles.options import ProfileOptions
from tightfit.profiles.schema import PROFILE_VERSION
from tightfit.profiles.sources.bundle import MOST_STORED
from tightfit.profiles.sources.lookup import headers, resolve
from tightfit.profiles.steps.tracing_process import make_bundle, request_of
from tightfit.runtime.cli.main import app
from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.common.interpreter import python_path

TOKEN = "a-secret-of-some-length"
SECRET = "where-nobody-looks"


def requested(folder, config=CONFIG, **options):
    """What a device asks for whose model lies in a folder of that name."""
    model = folder / "tiny" / "config.json"
    model.parent.mkdir(parents=True, exist_ok=True)
    model.write_text(json.dumps(config | {"adapter_base": str(folder), "_name_or_path": str(folder)}))
    return request_of(headers(str(model)), ProfileOptions(**{"seq": 16} | options))


@pytest.fixture(scope="module")
def request_(tmp_path_factory):
    return requested(tmp_path_factory.mktemp(SECRET))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    running = Served(tmp_path_factory.mktemp("bundles") / "data").start()
    yield running
    assert running.stop() == 0
    assert not [line for line in running.lines() if line["level"] == "error"]


def traced_here(request):
    return make_bundle(request.without_places(), lambda stage, done, total: None)


def test_a_service_makes_the_bundle_that_is_made_here(served, request_, tmp_path):
    """The step and the answers, in one job."""
    stages = []
    with connect(served.url) as service_:
        bundle = service_.bundle(request_, progress=stages.append)
        assert bundle == traced_here(request_)
        assert bundle.answers.steps
        assert {stage["stage"] for stage in stages} & {"tracing, export", "tracing, programs"}
        # Another device with the same model elsewhere: answered at once by the same job.
        stages.clear()
        other = requested(tmp_path / "another")
        assert other != request_
        assert (service_.bundle(other, progress=stages.append), stages) == (bundle, [])
        jobs = service_.get("/v1/jobs?kind=bundle")["items"]
    assert [job["state"] for job in jobs] == ["succeeded"]
    assert jobs[0]["request"]["model"] == "tiny"
    assert SECRET not in json.dumps(jobs)
    for file in (served.data / "objects").glob("*/*"):
        assert SECRET.encode() not in gzip.decompress(file.read_bytes())


@pytest.mark.slow
def test_a_decoder_of_transformers_needs_none_on_the_device(served, tmp_path):
    """What its checkpoint calls its tensors is sent; what the decoder consists of comes back, and is enough to open the
    model.
    """
    pytest.importorskip("transformers")
    model = save_model(tmp_path / "model", FAMILIES["GPT-2"])
    request = request_of(headers(str(model)), ProfileOptions(seq=16, lora_targets="attention"))
    assert "transformer.wte.weight" in request.stored
    with connect(served.url) as service_:
        bundle = service_.bundle(request)
    assert bundle == traced_here(request)
    bundle.save(tmp_path / "bundle")
    script = (
        "import sys; from tightfit.profiles.sources.lookup import resolve_traced\n"
        f"print(resolve_traced({str(model)!r}, {str(tmp_path / 'bundle')!r})[0].fingerprint)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    opened = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": python_path()},
        check=True,
        capture_output=True,
        text=True,
    )
    assert opened.stdout.strip() == resolve(str(model)).fingerprint


@pytest.mark.slow
def test_what_only_tracing_shows_is_the_job_s_error(served, tmp_path):
    request = requested(tmp_path, lora_targets="nothing_is_called_so")
    with (
        connect(served.url) as service_,
        pytest.raises(InputError, match=r"lora_targets 'nothing_is_called_so': no linear layer"),
    ):
        service_.bundle(request)


@pytest.mark.slow
def test_a_pattern_of_nested_repeats_is_refused_while_another_plan_goes_through(served, tmp_path):
    """Without a bound its match takes years, and holds a solver as long."""
    request = requested(tmp_path, lora_targets=r"((\w|\.)+)+!")
    started = time.monotonic()
    with connect(served.url) as stranger, connect(served.url) as service_, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(stranger.bundle, request)
        assert service_.plan(small_chain(3, layers=3), 1 << 30).status == "optimal"
        with pytest.raises(InputError, match="write the pattern without repeats of repeats"):
            asked.result()
    assert time.monotonic() - started < 60


def post(http, body):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return http.post("/v1/uploads/description", content=content, headers={"Content-Type": "application/json"})


def sent(request, place, value):
    """The request with another value at a place."""
    body = request.model_dump(mode="json")
    inside = body
    for name in place[:-1]:
        inside = inside[name]
    inside[place[-1]] = value
    return body


WRONG = {
    "a name that is a number": (("name",), 5, "name", "valid string"),
    "a name that is a path": (("name",), "../etc/passwd", "name", "is no name of a model"),
    "a module": (("config",), {"factory": "os:system"}, "config", "no 'model_type'"),
    "code": (
        ("config",), {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "mine.Mine"}},
        "config", "model_type 'mine' is no",
    ),
    "huge layers": (("config", "num_hidden_layers"), 10**9, "config", "at most 4096 is supported"),
    "an unknown field": (("weights",), "x", "weights", "Extra inputs"),
    "an unknown option": (("options", "speed"), 1, "options.speed", "not an option of tracing; there are alpha_pattern,"),
    "an adapter there": (("options", "adapter"), "/etc", "options.adapter", "not an option of tracing"),
    "a bundle there": (("options", "bundle"), "/etc", "options.bundle", "not an option of tracing"),
    "an option's value": (("options", "seq"), "16", "options.seq", "seq '16'"),
    "settings that are none": (("lora",), {"speed": 1}, "lora.speed", "no setting of an adapter"),
    "a setting's type": (("lora",), {"rank": "x"}, "lora.rank", "valid integer"),
    "a rank": (("lora",), {"rank": 10**6}, "lora.rank", "at most 16384"),
    "a rank beyond floats": (("lora",), {"rank": 10**400}, "lora", "int too large"),
    "names of what is known": (("stored",), ["a.weight"], "stored", "a llama decoder is written by hand"),
    "a stored name that is none": (("stored",), ["a/b"], "stored", "'a/b' is no name of a tensor"),
    "half a character": (("config", "x"), "\ud800", "", "cannot be repeated as JSON"),
    "deep": (("config", "x"), json.loads("[" * 70 + "]" * 70), "", "more than 64 deep"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_field_is_named(served, request_, case):
    place, value, field, words = WRONG[case]
    answer = post(served.http, sent(request_, place, value))
    assert answer.status_code == 422, answer.text
    (fault,) = answer.json()["error"]["fields"]
    assert fault["field"] == (f"body.{field}" if field else "body")
    assert words in fault["message"]


@pytest.mark.slow
def test_what_has_too_many_tensors_is_refused(served, request_):
    many = request_.model_dump(mode="json")
    many["stored"] = [f"t{number}" for number in range(10**6)]
    answer = post(served.http, many)
    assert answer.status_code == 422, answer.text
    assert f"1000000 tensors; this service traces models of at most {MOST_STORED}" in answer.text


def test_a_service_whose_jobs_have_too_little_memory_says_so(tmp_path, request_):
    with service(tmp_path, solve_bytes=300 << 20) as http:
        description = post(http, request_.model_dump(mode="json")).json()["id"]
        answer = http.post("/v1/bundles", json={"description": description})
    assert answer.status_code == 422
    told = answer.json()["error"]["message"]
    assert told.startswith(
        "a job of this service may take 300.0 MiB, and tracing takes 512.0 MiB; start it with --memory 512MiB"
    )


def test_a_service_of_another_version_is_told_in_words(served, request_, monkeypatch):
    monkeypatch.setattr(client, "PROFILE_VERSION", PROFILE_VERSION + 1)
    with connect(served.url) as service_:
        with pytest.raises(InputError) as refusal:
            service_.bundle(request_)
        told = str(refusal.value)
        assert f"whose profile version is {PROFILE_VERSION}; that of tightfit" in told
        assert f"here is {PROFILE_VERSION + 1}. Install the same tightfit on both" in told
        monkeypatch.setattr(Client, "get", lambda self, path: {"status": "ok", "version": "0.0.9"})
        with pytest.raises(InputError, match=r"tightfit 0\.0\.9 answers there, .*another, and makes no bundles"):
            service_.bundle(request_)


def test_a_device_asks_without_a_solver_and_without_pytorch():
    """What a client loads, which a device has to hold."""
    code = (
        "import sys, tightfit.planner.service.client\n"
        "print([name for name in ('torch', 'transformers', 'ortools', 'numpy', 'matplotlib') if name in sys.modules])"
    )
    environment = {"PYTHONPATH": str(SOURCES)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# --- tokens and https -------------------------------------------------------------------------------------------------


def test_a_token_goes_in_the_clear_to_this_machine_alone(monkeypatch):
    for url in ("http://planner.local:8000", "http://10.0.0.7"):
        with pytest.raises(InputError, match=r"the token would pass in the clear.*--certificate.*ssh -L"):
            connect(url, token=TOKEN)
    monkeypatch.setenv("TIGHTFIT_TOKEN", TOKEN)
    with pytest.raises(InputError, match="the token would pass in the clear"):
        connect("http://planner.local:8000")
    for url in ("http://127.0.0.1:9", "http://localhost:9", "http://[::1]:9", "https://10.0.0.7"):
        Client(url, token=TOKEN, timeout=1.0)


@pytest.fixture(scope="module")
def secure(tmp_path_factory):
    folder = tmp_path_factory.mktemp("secure")
    running = Served(folder / "data", token=TOKEN, certificate=self_signed(folder / "planner.pem", "127.0.0.1")).start()
    yield running
    assert running.stop() == 0
    assert not [line for line in running.lines() if line["level"] == "error"]


@pytest.mark.slow
def test_https_with_a_certificate_of_one_s_own(secure, tmp_path, monkeypatch):
    assert secure.url.startswith("https://127.0.0.1:")
    with connect(secure.url, token=TOKEN, certificate=secure.certificate) as service_:
        assert service_.get("/v1/jobs") == {"items": [], "next": None, "set_aside": []}
    with (
        connect(secure.url, token="wrong", certificate=secure.certificate) as wrong,
        pytest.raises(InputError, match="set TIGHTFIT_TOKEN to the service's token"),
    ):
        wrong.get("/v1/jobs")
    monkeypatch.setenv("TIGHTFIT_CERTIFICATE", str(secure.certificate))
    with connect(secure.url, token=TOKEN) as service_:
        assert service_.get("/healthz")["status"] == "ok"
    monkeypatch.delenv("TIGHTFIT_CERTIFICATE")
    other = self_signed(tmp_path / "other.pem", "127.0.0.1")
    for certificate in (None, other):
        with pytest.raises(
            InputError, match=r"its certificate is not trusted \(self-signed certificate\).*name the file"
        ):
            connect(secure.url, token=TOKEN, certificate=certificate)
    with pytest.raises(
        InputError, match=r"its certificate is not trusted \(Hostname mismatch.*by a name that stands in it"
    ):
        connect(secure.url.replace("127.0.0.1", "localhost"), token=TOKEN, certificate=secure.certificate)


def test_certificates_that_are_none(secure, served, tmp_path):
    (tmp_path / "empty.pem").write_text("nothing")
    for file, words in (("empty.pem", "no certificate in PEM"), ("missing.pem", "No such file or directory")):
        with pytest.raises(InputError, match=f"{file}'?: {words}"):
            connect(secure.url, certificate=str(tmp_path / file))
    with pytest.raises(InputError, match=r"shows none; write https://"):
        connect(served.url, certificate=str(secure.certificate))
    with pytest.raises(InputError, match=r"no https is spoken there"):
        connect(served.url.replace("http:", "https:"), token=TOKEN)
    with pytest.raises(RunError, match=r"the connection broke off"):
        connect(secure.url.replace("https:", "http:"))
    key = self_signed(tmp_path / "key.pem", "127.0.0.1")
    for options, words in (
        (["--key", str(key)], "name the certificate that it belongs to with --certificate FILE"),
        (["--certificate", str(tmp_path / "missing.pem")], "missing.pem: no such file"),
        (["--certificate", str(tmp_path / "empty.pem")], "no certificate and key in PEM that belong together"),
        (["--certificate", str(secure.certificate), "--key", str(key)], "no certificate and key in PEM that belong"),
    ):
        refusal = CliRunner().invoke(app, ["serve", "--port", "0", "--data-dir", str(tmp_path / "data"), *options])
        assert words in str(refusal.exception), refusal.exception


# --- a service that goes away -----------------------------------------------------------------------------------------


def test_a_service_that_is_not_there_is_told_within_seconds(monkeypatch):
    """An address that takes no connection, as behind a firewall, and one that refuses it."""
    limits = []

    def silent(request):
        limits.append(request.extensions["timeout"])
        raise httpx.ConnectTimeout("timed out")

    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("asked again"))
    unanswered = Client("http://127.0.0.1:9", token=None, timeout=60.0)
    limit = unanswered._http.timeout
    unanswered._http = httpx.Client(base_url=unanswered.url, timeout=limit, transport=httpx.MockTransport(silent))
    with unanswered, pytest.raises(RunError, match=r"no answer \(timed out\); is `tightfit serve` running there\?"):
        unanswered.get("/healthz")
    assert [(one["connect"], one["read"]) for one in limits] == [(5.0, 60.0)]
    with pytest.raises(RunError, match=r"no answer .*is `tightfit serve` running there\?"):
        connect("http://127.0.0.1:9")


def test_a_service_that_has_answered_is_asked_again_for_a_minute(monkeypatch):
    now, answers, sentences = [0.0], [], []

    def answer(request):
        if not answers:
            raise httpx.ConnectError("refused")
        return answers.pop(0)

    monkeypatch.setattr(client.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(client.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    asking = Client("http://127.0.0.1:9", token=None, timeout=1.0, tell=sentences.append)
    asking._http = httpx.Client(base_url=asking.url, transport=httpx.MockTransport(answer))
    with asking:
        answers += [httpx.Response(200, json={"status": "ok"})]
        asking.get("/healthz")
        answers += [httpx.Response(502), httpx.Response(503), httpx.Response(200, json={"jobs": []})]
        assert asking.get("/v1/jobs") == {"jobs": []}
        with pytest.raises(RunError, match="no answer"):
            asking.get("/v1/jobs")
    assert 60 <= now[0] < 63
    assert sentences == ["http://127.0.0.1:9: no answer any more; it is asked again for 60 s"] * 2
