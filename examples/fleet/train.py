"""Two devices fine-tune one model together, each within its own memory: the result is that of one process, to the bit.

    python examples/fleet/train.py [--updates 2]

Both devices are this machine, with one core each, and talk over its loopback; on several machines, every one of them
has a profile of its own, and runs `tightfit fleet run FOLDER --member NAME --at HOST:PORT`. Takes about five minutes on
two cores. Everything is left in examples/out/fleet/.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from examples.reviews import SEQ, fetch
from tightfit.runtime.common.interpreter import command, python_path

OUT = ROOT / "examples" / "out" / "fleet"
MICRO_BATCHES = 12
BATCH = 4


def main() -> int:
    parser = argparse.ArgumentParser(description="Fine-tune SmolLM2-135M-Instruct on two devices.")
    parser.add_argument("--updates", type=int, default=2, help="updates of the adapter (2)")
    given = parser.parse_args()
    reviews = fetch(OUT / "data")
    profile, plan = OUT / "profile.json", OUT / "plan"
    sizes = ["--batch", str(BATCH), "--seq", str(SEQ), "--threads", "1"]
    training = ["--data", str(reviews.train), "--steps", str(given.updates * MICRO_BATCHES), "--lr", "5e-4"]
    training += ["--checkpoint-every", "0", "--overwrite"]
    tightfit("profile", reviews.model, *sizes, "-o", profile)
    tightfit("fleet", "plan", HERE / "fleet.toml", "-o", plan, "--html", OUT / "plan.html")
    tightfit("fleet", "run", plan, *training, "-o", OUT / "run")
    print("\nThe same training in one process:", flush=True)
    alone = OUT / "alone.profile.json"
    tightfit("profile", reviews.model, *sizes, "--accumulate", MICRO_BATCHES, "-o", alone)
    tightfit("plan", alone, "--memory", "500MiB", "-o", OUT / "alone.json")
    tightfit("run", OUT / "alone.json", *training, "-o", OUT / "alone")
    found = {name: adapter_hash(OUT / name) for name in ("run/laptop", "run/board", "alone")}
    for name, digest in found.items():
        print(f"{name}: SHA-256 of the adapter {digest}")
    return 0 if len(set(found.values())) == 1 else 1


def tightfit(*words: object) -> None:
    """Run a command of tightfit, and show it."""
    text = [str(word) for word in words]
    print(f"\n$ tightfit {shlex.join(text)}", flush=True)
    environment = os.environ | {"PYTHONPATH": python_path()}
    subprocess.run(command("tightfit.runtime.cli.main", *text), env=environment, check=True)


def adapter_hash(run: Path) -> str:
    return hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
