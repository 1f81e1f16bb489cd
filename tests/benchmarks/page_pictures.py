"""`make page-pictures`: takes the pictures of the page that the README and the documentation show,
``examples/page-*.png``.

A service begins with its example, measures the demo's model and fine-tunes it as the demo does.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

from chromium import find_chromium
from playwright.sync_api import Page, sync_playwright
from served import Served

from examples.demo import BATCH
from examples.reviews import SEQ, Reviews, fetch

WIDTH, HEIGHT = 1280, 800
BUDGET = "350MiB"
STEPS = 48
PATIENCE = 1800
"""seconds"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "examples")
    output = parser.parse_args().output
    reviews = fetch()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        root.mkdir()
        for path in (reviews.model, reviews.train, reviews.held_out):
            shutil.copy(path, root)
        service = Served(Path(folder) / "data", "--example", "--root", str(root)).start()
        try:
            run = _fine_tuned(service, reviews)
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
                page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
                page.set_default_timeout(1000 * PATIENCE)
                _pictures(page, service, run, output)
        finally:
            service.stop()


def _fine_tuned(service: Served, reviews: Reviews) -> str:
    """The job of a run like the demo's that has ended."""
    profile = service.result("/v1/profiles", path=reviews.model.name, seq=SEQ, batch=BATCH)["profile"]
    plan = service.result("/v1/plans", profile=profile, memory=BUDGET)["plan"]
    run: str = service.ask(
        "/v1/runs",
        plan=plan,
        data=reviews.train.name,
        eval_data=reviews.held_out.name,
        eval_every=24,
        steps=STEPS,
        lr=5e-4,
    )["id"]
    service.wait(service.http.get(f"/v1/jobs/{run}").json(), patience=PATIENCE)
    return run


def _pictures(page: Page, service: Served, run: str, output: Path) -> None:
    (example,) = [one for one in service.http.get("/v1/profiles").json()["items"] if one["origin"] == "example"]
    plans = service.http.get(f"/v1/plans?profile={example['id']}").json()["items"]
    fitting = sorted(
        (plan for plan in plans if plan["summary"]["minimum_budget_bytes"] is None),
        key=lambda plan: int(plan["summary"]["budget_bytes"]),
    )
    middle: dict[str, Any] = next(plan for plan in fitting if plan["summary"]["budget_bytes"] == 350 << 20)

    def take(name: str, place: str, ready: str) -> None:
        page.goto(f"{service.url}/page/#/{place}")
        page.locator(ready).first.wait_for()
        page.wait_for_load_state("networkidle")
        page.screenshot(path=output / f"page-{name}.png")

    take("fit", f"models/{example['id']}?budget={350 << 20}", "#curve svg")
    take("plan", f"plans/{middle['id']}", "canvas")
    take("compare", f"compare?plans={','.join(plan['id'] for plan in (fitting[1], middle, fitting[-1]))}", "canvas")
    take("run", f"runs/{run}", "[data-chart=Loss] svg")


if __name__ == "__main__":
    main()
