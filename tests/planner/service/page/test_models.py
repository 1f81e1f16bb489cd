"""The list of models, and how one comes in: files, what lies under the roots, published shapes; in a real browser."""

from __future__ import annotations

import json
import re

import pytest
from damage import CONFIG, SEQ
from places import ROOT
from places_of_the_page import at, nothing_hinders, rows, serving, tab
from playwright.sync_api import expect
from reference import CONFIGS
from safetensors import safe_open
from served import Served
from synthetic import decoder_like
from tiny_models import byte_level_tokenizer, random_weights, write_directory, write_gguf

from tightfit.planner.plan import plan
from tightfit.profiles.sources.gguf_metadata import read_header

ASK_HEADERS = """async (url) => {
  const { ggufHeader, safetensorsHeader, parametersOf, precisionOf } = await import("/page/headers.js");
  const buffer = await (await fetch(url)).arrayBuffer(), header = (url.endsWith(".gguf") ? ggufHeader : safetensorsHeader)(buffer);
  return { ...header, parameters: parametersOf(header), precision: precisionOf(header) };
}"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a GGUF file, as if somebody had downloaded it."""
    folder = tmp_path_factory.mktemp("models")
    config = CONFIGS["llama"]
    write_gguf(folder / "tiny.gguf", config, random_weights(config), tokenizer=byte_level_tokenizer())
    return folder


@pytest.fixture(scope="module")
def service(tmp_path_factory, root):
    with serving(tmp_path_factory.mktemp("service"), root) as started:
        yield started


@pytest.fixture
def page(browser, service):
    with tab(browser, at(service, "models"), expected=["422"]) as page:
        expect(page.locator("h1")).to_have_text("Models")
        yield page


def drop(page, *files):
    page.set_input_files(".drop input", list(files))


@pytest.mark.slow
def test_a_profile_or_graph_that_is_dropped_is_opened(page, tmp_path):
    profile = tmp_path / "profile.json"
    profile.write_text(decoder_like(2).model_dump_json())
    drop(page, profile)
    expect(page).to_have_url(re.compile("#/models/[0-9a-f]{64}"))
    expect(page.locator("h1")).to_contain_text("synthetic")
    page.click("#places [data-place=models]")
    drop(page, ROOT / "examples" / "bare-graph.json")
    expect(page.locator("#about")).to_contain_text("a graph of operators")


@pytest.mark.slow
def test_a_plan_leads_to_what_it_was_made_of(page, service, tmp_path):
    profile = decoder_like(2)
    identity = service.upload(profile)
    made = plan(profile, 60 << 20, time_limit=5)
    file = tmp_path / "plan.json"
    file.write_text(made.model_dump_json())
    drop(page, file)
    expect(page).to_have_url(re.compile(rf"#/models/{identity}\?budget={60 << 20}"))
    page.click("#places [data-place=models]")
    unknown = decoder_like(5).model_copy(update={"fingerprint": "e" * 64})
    file.write_text(plan(unknown, 100 << 20, time_limit=5).model_dump_json())
    drop(page, file)
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("What it was made of is not here")
    expect(dialog).to_contain_text("100.0 MiB")
    dialog.get_by_role("button", name="Close").last.click()


def test_what_is_none_of_these_is_refused_in_words(page, tmp_path):
    for name, content, told in (
        ("notes.txt", "hello", "is neither JSON"),
        ("list.json", "[1, 2]", "is JSON, but no profile, plan, graph or config.json"),
        ("other.json", '{"a": 1, "b": 2}', "its fields are called a, b"),
        ("adapter_config.json", '{"peft_type": "LORA", "r": 8}', "describes an adapter, not a model"),
        ("cut.gguf", b"GGUF\x03\0\0\0\x05\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\0", "ends within its header"),
        ("wrong.gguf", b"PK\x03\x04" + bytes(40), "does not begin as a GGUF file does"),
        ("wrong.safetensors", b"\xff" * 64, "does not begin as a safetensors file does"),
    ):
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        drop(page, file)
        expect(page.locator("#problem")).to_contain_text(told)


def test_headers_are_read_in_the_browser(page, root, tmp_path):
    """What the page reads of a file's header is what the code that opens models reads."""
    page.route("**/tiny.gguf", lambda route: route.fulfill(path=root / "tiny.gguf"))
    read, known = page.evaluate(ASK_HEADERS, f"{page.url.split('/page')[0]}/tiny.gguf"), read_header(root / "tiny.gguf")
    assert read["tensors"] == {
        one.name: {"shape": list(reversed(one.shape)), "format": one.kind} for one in known.tensors
    }
    scalars = {name: value for name, value in known.metadata.items() if isinstance(value, str | int | float | bool)}
    assert read["metadata"] == pytest.approx(scalars)
    write_directory(tmp_path, CONFIG, random_weights(CONFIG))
    weights = tmp_path / "model.safetensors"
    page.route("**/model.safetensors", lambda route: route.fulfill(path=weights))
    tensors = page.evaluate(ASK_HEADERS, f"{page.url.split('/page')[0]}/model.safetensors")["tensors"]
    with safe_open(weights, "pt") as opened:
        assert set(tensors) == set(opened.keys())
        for name, one in tensors.items():
            assert one["shape"] == list(opened.get_slice(name).get_shape())


def test_of_a_models_file_the_header_alone_leaves_the_machine(page, service, root):
    """A GGUF file that lies on the service's machine too is offered with its weights; nothing of its content is
    sent.
    """
    sent = []
    page.on("request", lambda request: sent.append(request.post_data_buffer or b""))
    drop(page, root / "tiny.gguf")
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("llama, ")
    expect(dialog).to_contain_text("Only its header was read, in this browser")
    sources = dialog.get_by_label("What to measure").locator("option").all_text_contents()
    assert sources[0] == "with its weights: tiny.gguf on the service's machine"
    assert sources[1].startswith("with random weights of this shape")
    assert sum(map(len, sent)) == 0
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)


def test_a_model_is_chosen_without_a_typed_path(page, pictures):
    page.get_by_role("button", name="Choose a model").first.click()
    dialog = page.get_by_role("dialog")
    expect(dialog.locator(".picks").first).to_contain_text("tiny")
    expect(dialog.locator(".picks").first).to_contain_text("llama")
    shapes = dialog.locator(".picks").last.locator("li")
    assert shapes.count() >= 10
    nothing_hinders(page, pictures, "choose")
    dialog.get_by_label("Search models").fill("qwen3")
    names = dialog.locator(".picks strong").all_text_contents()
    assert names
    assert all("Qwen3" in name for name in names)
    dialog.locator(".pick").first.click()
    expect(dialog).to_contain_text("random ones stand for them")
    dialog.get_by_role("button", name="Back").click()
    expect(dialog.get_by_label("Search models")).to_have_value("qwen3")
    dialog.get_by_role("button", name="Close").click()


@pytest.mark.slow
def test_a_measurement_moves_is_found_again_and_can_be_cancelled(browser, page, service):
    page.get_by_role("button", name="Choose a model").first.click()
    dialog = page.get_by_role("dialog")
    dialog.locator(".pick", has_text="tiny").first.click()
    dialog.get_by_label("Length, tokens").fill(str(SEQ))
    dialog.get_by_label("Batch").fill("2")
    # What the form asks for besides is folded away; what is wrong with a field is told beside it.
    dialog.locator(".more > summary").click()
    dialog.locator("[name=lora_layers]").fill("none")
    dialog.get_by_role("button", name="Measure", exact=True).click()
    wrong = dialog.locator(".wrong:visible")
    expect(wrong).to_contain_text("String should match pattern")
    dialog.locator("[name=lora_layers]").fill("0")
    dialog.get_by_role("button", name="Measure", exact=True).click()
    expect(page).to_have_url(re.compile("#/models/job-"))
    expect(page.locator("h1")).to_contain_text(f"tiny.gguf, 2 × {SEQ} tokens")
    expect(page.locator(".progress")).to_contain_text("Measuring")
    measuring = page.url
    # Tomorrow, or in another window, it is among the models, with its progress.
    with tab(browser, at(service, "models")) as again:
        again.locator("a", has_text="tiny.gguf").first.click()
        expect(again).to_have_url(re.compile("#/models/(job-|[0-9a-f]{64})"))
    expect(page).to_have_url(re.compile("#/models/[0-9a-f]{64}"))
    identity = re.search("models/([0-9a-f]{64})", page.url)[1]
    model = service.http.get(f"/v1/profiles/{identity}/file").json()["model"]
    assert model["lora"]["rank"] == 8
    kept = service.http.get(f"/v1/profiles/{identity}").json()["summary"]["request"]
    assert (kept["source"], kept["seq"], kept["batch"], kept["lora_layers"]) == ("tiny.gguf", SEQ, 2, "0")
    # Its old address leads to what came of it.
    page.goto(measuring)
    expect(page).to_have_url(re.compile(f"#/models/{identity}"))
    # Where nothing fits, a smaller step is one click away; it is cancelled here.
    expect(page.locator("#smallest")).to_contain_text("The smallest budget is")
    page.fill("#budget", "20")
    page.press("#budget", "Enter")
    remedies = page.locator("#help li")
    expect(remedies.first).to_contain_text("frees up to")
    expect(remedies.first).to_contain_text("not enough alone")
    # What can never suffice is not offered as if it did.
    expect(page.locator("#never")).to_contain_text("that cannot suffice. It takes more memory, or a smaller model.")
    assert all(re.search(r"Try .* instead of \d+", one) for one in remedies.all_inner_texts())
    remedies.first.get_by_role("button").click()
    expect(page).to_have_url(re.compile(r"#/models/job-[0-9a-f]+\?budget=20971520"))
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("main")).to_contain_text("This measurement was cancelled.")
    expect(page.get_by_role("button", name="Try again")).to_be_visible()


@pytest.mark.slow
def test_a_shape_is_estimated_for_another_device(page):
    """From a published shape to a curve for a card, without its weights: four clicks."""
    page.get_by_role("button", name="Choose a model").first.click()
    dialog = page.get_by_role("dialog")
    dialog.locator(".pick", has_text="SmolLM2-135M").first.click()
    dialog.get_by_label("Length, tokens").fill("32")
    dialog.get_by_label("For").select_option("rtx-4060")
    dialog.get_by_role("button", name="Estimate", exact=True).click()
    expect(page).to_have_url(re.compile("#/models/[0-9a-f]{64}"))
    expect(page.locator("#about")).to_contain_text("estimated")
    expect(page.locator("#verdict")).to_contain_text("fits")


@pytest.mark.slow
def test_a_config_that_is_dropped_is_estimated(page, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    drop(page, config)
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text(f"{CONFIG['num_hidden_layers']} layers")
    dialog.get_by_label("Length, tokens").fill(str(SEQ))
    dialog.get_by_label("For").select_option("phone")
    dialog.get_by_role("button", name="Estimate", exact=True).click()
    expect(page).to_have_url(re.compile("#/models/[0-9a-f]{64}"))
    expect(page.locator("#about")).to_contain_text("estimated")


def test_progress_is_told_in_words_and_units(page):
    """Nothing is counted in bytes, and what a search only estimates is not told as found: it may turn out slower."""
    ask = """async ([stage, done, total]) => (await import("/page/models.js")).measuring({request: {}, state: "running", progress: {stage, done, total}}).textContent"""
    assert page.evaluate(ask, ["pack", 94705920, 96576768]) == "Measuring: packing its weights, 90.3 MiB of 92.1 MiB"
    assert page.evaluate(ask, ["measure", 3, 9]) == "Measuring: measuring operators, 3 of 9"
    assert page.evaluate(ask, ["running", None, None]) == "Measuring: reading the model"
    search = """async (told) => { const bar = (await import("/page/model.js")).solving("Planning", 15); told.forEach((one) => bar.hear(one)); return bar.textContent; }"""
    priced = {"stage": "pricing", "incumbent": 1.505, "bound": 1.4}
    assert "about 1.505 s a step in sight" in page.evaluate(search, [priced])
    carried_out = [priced | {"stage": "carried out", "incumbent": seconds} for seconds in (1.508, 1.511)]
    assert "1.508 s a step so far" in page.evaluate(search, [*carried_out, priced])


def test_what_would_help_goes_as_far_as_it_has_to(page):
    """The service tells of half the rank: where that is not enough, a smaller one that may be is offered, if there is
    one. What two measurements differ by, 2 MiB, has to be freed on top.
    """
    mib = 1 << 20
    half = {"change": "a LoRA rank of 4 instead of 8", "field": "lora_rank", "value": 4, "saves_bytes": 40 * mib}
    ask = """async ([remedy, missing]) => (await import("/page/model.js")).reaching(remedy, missing)"""
    assert page.evaluate(ask, [half, 38 * mib]) == half | {"most": 80 * mib}
    fewer = {"change": "a LoRA rank of 3 instead of 8", "value": 3, "saves_bytes": 50 * mib}
    for missing in (39, 48):
        assert page.evaluate(ask, [half, missing * mib]) == half | fewer | {"most": 80 * mib}
    assert page.evaluate(ask, [half, 75 * mib]) == half | {"most": 80 * mib}


@pytest.mark.slow
def test_the_list_is_searched_sorted_and_cleared(browser, served, pictures):
    names = {served.upload(decoder_like(layers)): name for layers, name in ((2, "alder"), (3, "birch"), (4, "cedar"))}
    for identity, title in names.items():
        served.http.patch(f"/v1/profiles/{identity}", json={"title": title})
    with tab(browser, at(served, "models"), expected=["409"]) as page:
        expect(page.locator(".listing tbody tr")).to_have_count(3)
        page.get_by_role("button", name="Model", exact=True).click()
        assert [row[1] for row in rows(page, ".listing")] == ["alder", "birch", "cedar"]
        page.get_by_role("button", name="Model", exact=True).click()
        assert [row[1] for row in rows(page, ".listing")] == ["cedar", "birch", "alder"]
        nothing_hinders(page, pictures, "models")
        page.get_by_label("Search models").fill("birch")
        expect(page.locator(".listing tbody tr")).to_have_count(1)
        page.get_by_label("Search models").fill("")
        expect(page.locator(".listing tbody tr")).to_have_count(3)
        # One of which plans are made is deleted with them, after asking.
        identity = next(iter(names))
        served.result("/v1/plans", profile=identity, memory=60 << 20)
        page.get_by_label("Choose alder").check()
        page.get_by_role("button", name="Delete", exact=True).click()
        page.get_by_role("dialog").get_by_role("button", name="Delete", exact=True).click()
        page.get_by_role("dialog").get_by_role("button", name="Delete all of it").click()
        expect(page.locator(".listing tbody tr")).to_have_count(2)
    assert served.http.get(f"/v1/profiles/{identity}").status_code == 404


@pytest.mark.slow
def test_a_token_is_asked_for(browser, tmp_path):
    service = Served(tmp_path / "data", token="a-secret-of-some-length").start()
    try:
        service.upload(decoder_like(2))
        with tab(browser, at(service, "models"), expected=["401"]) as page:
            expect(page.locator("#token")).to_be_focused()
            page.keyboard.type("something-else-of-some-length")
            page.keyboard.press("Enter")
            expect(page.locator("main")).to_contain_text("This token is not the service's")
            expect(page.locator("#token")).to_be_focused()
            page.keyboard.type("a-secret-of-some-length")
            page.keyboard.press("Enter")
            expect(page.locator("#token-form")).to_have_count(0)
            expect(page.locator(".listing tbody tr")).to_have_count(1)
    finally:
        service.stop()
