"""The job that adds a run's adapter to its model (`tightfit merge`): a GGUF file, or a tar file of a Hugging Face
folder.
"""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

from tightfit.planner.service.jobs.orders import MERGED, EventWriter, JobOrder
from tightfit.planner.service.jobs.store import Row, folder_row
from tightfit.planner.service.jobs.work.commands import carry_out
from tightfit.planner.service.jobs.work.inputs import adapter_of, profile_of
from tightfit.planner.service.jobs.work.run import device
from tightfit.planner.service.wire.errors import failing_disk
from tightfit.planner.service.wire.redaction import with_paths


def do(order: JobOrder, events: EventWriter) -> Row:
    """Leave the merged model in the job's folder, beside which nothing else stays."""
    folder, request = Path(order.folder), order.request
    with device(order, events) as lock:
        events.progress(always=True, stage="merging")
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir(parents=True)
            profile = profile_of(order)
            base = with_paths(profile.model, order.paths).source
            out = folder / (MERGED["gguf"] if request["format"] == "gguf" else "merged")
            words = [*order.command, "merge", str(adapter_of(order, folder)), f"--output={out}", f"--base={base}"]
            words += [f"--format={request['format']}", "--json"]
            merged = carry_out(words, "merging", lock)
            shutil.rmtree(folder / "adapter")
            if out.is_dir():
                events.progress(always=True, stage="packing")
                _pack(out, folder / MERGED["safetensors"])
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    size = (folder / MERGED[request["format"]]).stat().st_size
    result = {name: merged.get(name) for name in ("format", "adapted", "seconds", "note")} | {"bytes": size}
    return {"result": {"merged": result}, "files": [folder_row(folder.name, size)]}


def _pack(folder: Path, archive: Path) -> None:
    """The folder as a tar file, in its place: each file goes as soon as it is packed."""
    with failing_disk(archive), tarfile.open(archive, "w") as packed:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                packed.add(path, arcname=f"merged/{path.relative_to(folder)}")
                path.unlink()
    shutil.rmtree(folder)
