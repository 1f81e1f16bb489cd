"""`make bench-page`: how soon the page is there and how much it sends, and how fluid it is with large plans, in a real browser.

A plan of 30,000 instructions and a graph of 10,000 operators: seconds until the step is there, then milliseconds from frame to frame while it
is enlarged, moved and pointed at, and of the drawing alone. Target: a frame within 50 ms (median) on two cores beside nothing else.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "helpers"), str(Path(__file__).parent)]

import tables
from chromium import find_chromium
from layered_graph import layered
from playwright.sync_api import Browser, sync_playwright
from served import Served
from synthetic import decoder_like

from tightfit.planner.plan import plan as solve
from tightfit.planner.service.http.routes_page import _files
from tightfit.profiles.graph_input import graph_profile

SCREENS = {"phone": (390, 844, 3), "desk": (1400, 900, 1), "desk, dense": (1400, 900, 2), "4k": (3840, 2000, 1)}
"""width, height, device pixels per pixel"""
COUNT = """() => {
  window.drawing = [];
  const ask = window.requestAnimationFrame.bind(window);
  window.requestAnimationFrame = (draw) => ask((now) => {
    const begun = performance.now();
    draw(now);
    window.drawing.push(performance.now() - begun);
  });
}"""
"""notes how long each drawing takes"""
MOVE = """async (way) => {
  const frame = document.querySelector(".step-frame"), box = frame.getBoundingClientRect(), gaps = [], y = box.top + 80;
  let last = performance.now();
  window.drawing.length = 0;
  for (let i = 0; i < 60; i++) {
    const x = box.left + box.width * (0.5 + 0.3 * Math.sin(i)), all = { clientX: x, clientY: y, bubbles: true, cancelable: true };
    if (way === "enlarge") frame.dispatchEvent(new WheelEvent("wheel", { ...all, deltaY: i % 20 < 10 ? -60 : 60, ctrlKey: true }));
    else if (way === "move") frame.dispatchEvent(new WheelEvent("wheel", { ...all, deltaX: i < 30 ? 60 : -60 }));
    else frame.dispatchEvent(new PointerEvent("pointermove", { ...all, pointerId: 1 }));
    await new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));
    const now = performance.now();
    gaps.push(now - last);
    last = now;
  }
  const middle = (list) => list.sort((a, b) => a - b)[list.length >> 1] ?? 0;
  return { frame: middle(gaps), slow: gaps[Math.floor(gaps.length * 0.95)], drawing: middle(window.drawing.filter((ms) => ms > 0.3)) };
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=90, help="of the decoder; 90 make about 29,000 instructions")
    parser.add_argument("--operators", type=int, default=10_000, help="of the graph")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        service = Served(Path(folder) / "data", "--root", folder).start()
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        asked = {
            f"{options.layers} layers": (decoder_like(options.layers), "mebp"),
            f"{options.operators} operators": (graph_profile(layered(options.operators, training=True)), "keep-all"),
        }
        for name, (profile, rule) in asked.items():
            made = solve(profile, 1 << 50, policy=rule)
            assert made.train is not None
            request = {"profile": service.upload(profile), "memory": int(made.peak_bytes * 1.02), "policy": rule}
            job = service.wait(service.http.post("/v1/plans", json=request).json(), patience=600)
            what = f"{name}, {len(made.train.instructions)} instructions"
            for screen, (width, height, dense) in SCREENS.items():
                context = browser.new_context(viewport={"width": width, "height": height}, device_scale_factor=dense)
                page = context.new_page()
                page.add_init_script(f"({COUNT})()")
                begun = time.monotonic()
                page.goto(f"{service.url}/page/#/plans/{job['result']['plan']}")
                page.wait_for_selector(".step-frame", timeout=120_000)
                ready = time.monotonic() - begun
                page.locator(".step-frame").scroll_into_view_if_needed()
                for way in ("enlarge", "move", "point"):
                    found = page.evaluate(MOVE, way)
                    figures = [f"{found[key]:.1f}" for key in ("frame", "slow", "drawing")]
                    rows.append([what, screen, f"{ready:.1f}", way, *figures])
                context.close()
        first = _first(browser, service.url)
        service.stop()
    headings = ["what", "screen", "ready, s", "way", "frame, ms", "95 %, ms", "drawing, ms"]
    print(tables.machine(), tables.markdown(headings, rows), first, sep="\n\n")


def _first(browser: Browser, url: str) -> str:
    """What the start takes until something is seen, and all that the page ever sends of its own."""
    page = browser.new_page()
    page.goto(url)
    page.wait_for_selector("h1")
    painted = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    files = _files()
    return f"first paint after {painted:.0f} ms; {len(files)} files of {sum(map(len, files.values())) / 1000:.0f} kB, packed"


if __name__ == "__main__":
    main()
