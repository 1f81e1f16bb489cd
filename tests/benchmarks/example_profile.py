"""Writes the example that an empty service shows: the profile of the demo's model, measured on this machine.

    make example                                      # measures, on a machine that does nothing else
    make example ARGS='--profile FILE.json'           # takes what `tightfit profile` has measured

The profile goes into the package without paths of this machine. It is made anew when `PROFILE_VERSION` moves, or the
demo changes.
"""

from __future__ import annotations

import argparse
import gzip
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.demo import BATCH
from examples.reviews import SEQ, fetch
from tightfit.planner.service.wire.redaction import Redaction
from tightfit.profiles.api import profile
from tightfit.profiles.io import canonical_json, load_profile

EXAMPLE = ROOT / "planner" / "service" / "wire" / "example.json.gz"
MOST_BUSY = 0.1
"""cores that other programs may have taken while it was measured"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=Path, help="a profile of the demo's model that was measured already")
    given = parser.parse_args().profile
    made = profile(str(fetch().model), batch=BATCH, seq=SEQ) if given is None else load_profile(given)
    if made.device.busy_cores > MOST_BUSY:
        print(f"{made.device.busy_cores:.1f} cores were busy while it was measured: measure where nothing else runs")
        return 1
    folders = [Path(path).parent for path in (made.model.source, made.model.store) if path is not None]
    model, _ = Redaction(folders).model(made.model)
    content = canonical_json(made.model_copy(update={"model": model})).encode()
    EXAMPLE.write_bytes(gzip.compress(content, 9, mtime=0))
    print(f"{EXAMPLE}: {EXAMPLE.stat().st_size} bytes; model {model.name}, measured on {made.device.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
