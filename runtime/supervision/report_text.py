"""Formats the report of a run as tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tightfit.runtime.common.units import format_seconds, format_size, padding_text

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def report_text(report: dict[str, Any]) -> RenderableType:
    """Tables with predicted and measured figures, and where the adapter (of a module: the model) was saved."""
    from rich.console import Group

    table = _memory_table(report)
    step = report["step_seconds"]
    measured = step["measured"]  # None where the metrics of a resumed run are lost
    ratio = f"{measured / step['predicted']:.3f}" if measured and step["predicted"] else "–"
    table.add_row(
        f"step, by the {step['predicted_by']}",
        f"{step['predicted']:.3f} s",
        f"{measured:.3f} s" if measured else "–",
        ratio,
    )
    if tokens := report.get("tokens"):
        rate = f"{tokens['per_second']:,.0f}"
        table.add_row(f"tokens/s ({padding_text(tokens['padding_share'])})", "–", rate, "–")
        if tokens.get("samples_per_second"):
            table.add_row("samples/s", "–", f"{tokens['samples_per_second']:,.2f}", "–")
    rows = [
        *_cap_rows(report, "training"),
        (
            "loss",
            (
                f"{report['loss'][0]:.4f} → {report['loss'][-1]:.4f} in {len(report['loss'])} steps"
                + (f", {report['epochs']:.4g} epochs" if report.get("epochs") else "")
                if report["loss"]
                else "–"
            ),
        ),
    ]
    if contention := report.get("contention"):
        during = f"used {contention['others_cores']:.1f} of the cores during {contention['steps']} steps"
        waited = (
            f"took {contention['step_seconds']:.3f} s each and waited {contention['waited_seconds']:.3f} s of it for a"
            " core"
        )
        rows.append(("other programs", f"{during}, which {waited}"))
    if norms := report.get("grad_norm"):
        limit = report["max_grad_norm"]
        over = sum(norm > limit for norm in norms)
        rows.append(
            (
                "gradients",
                f"norm {norms[0]:.3g} → {norms[-1]:.3g}, clipped to {limit:g} in {over} of {len(norms)} updates",
            )
        )
    if names := report.get("ignored_state"):
        rows.append(("let through", f"{', '.join(names)}, which forward changes in Python and no step did"))
    rows += _packing_rows(report)
    if report["adapter"]:
        rows.append((Path(report["adapter"]).name, str(report["adapter"])))
    if referred := report.get("references"):
        seconds = referred["seconds"]
        measured, expected = format_seconds(seconds["measured"]), format_seconds(seconds["predicted"])
        reference_text = f"log-probabilities of {referred['pairs']} pairs in {measured}, predicted {expected}"
        rows.append(("adapter off", reference_text))
    if result := report.get("fleet", {}).get("result"):
        rows.append(("result", result))
    for when, evaluation in report.get("evaluation", {}).items():
        accuracy = (
            f", accuracy {evaluation['accuracy']:.3f} on {evaluation['questions']} questions"
            if evaluation.get("accuracy") is not None
            else _pairs_text(evaluation)
        )
        rows.append((f"evaluated {when}", f"loss {evaluation['loss']:.4f}{accuracy}"))
    if best := report.get("best"):
        accuracy = f", accuracy {best['accuracy']:.3f}" if best["accuracy"] is not None else ""
        place = f", kept in {best['path']}" if best["path"] else ""
        rows.append(("best evaluation", f"after step {best['step']}: loss {best['loss']:.4f}{accuracy}{place}"))
    if early := report.get("stopped_early"):
        rows.append(("ended early", f"after step {early}: later evaluations were no better than the best"))
    return Group(table, facts_table(rows))


def evaluation_text(report: dict[str, Any]) -> RenderableType:
    """What an evaluation found, and its memory."""
    from rich.console import Group

    rows = [("loss", f"{report['loss']:.4f}")]
    if report["perplexity"] is not None:
        rows.append(("perplexity", f"{report['perplexity']:.3f}"))
    if report["accuracy"] is not None:
        rows.append(("accuracy", f"{report['accuracy']:.3f} on {report['questions']} questions"))
    if report.get("pairs"):
        rows.append(("chosen answer wins", f"in {report['reward_accuracy']:.1%} of {report['pairs']} pairs"))
        rows.append(("margin", f"{report['reward_margin']:.4f}, mean difference of the rewards"))
    rows += [("evaluated", f"in {report['seconds']:.1f} s"), *_packing_rows(report), *_cap_rows(report, "it")]
    return Group(_memory_table(report), facts_table(rows))


def _pairs_text(evaluation: Mapping[str, Any]) -> str:
    """The end of a sentence about an evaluation: how often the chosen answers of its pairs win; "" without pairs."""
    if "reward_accuracy" not in evaluation:
        return ""
    return f", chosen answer wins in {evaluation['reward_accuracy']:.1%}, margin {evaluation['reward_margin']:.4f}"


def _memory_table(report: dict[str, Any]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("", "predicted", "measured", "measured / predicted"):
        table.add_column(heading, justify="left" if not heading else "right")
    processes = report["processes"]
    several = len(processes) > 1
    figures = [("peak of its processes" if several else "peak of the process", report["peak_bytes"])]
    figures += [(f"– {name}", figure) for name, figure in processes.items() if several]
    if saved := report.get("phases", {}).get("checkpoint", {}).get("peak_bytes"):  # an evaluation has no phases
        figures.append(("– training, until a checkpoint was saved", saved))
    figures = [*(report.get("stage_bytes") or {}).items(), *figures]
    for name, figure in figures:
        predicted = figure["predicted"]
        ratio = f"{figure['measured'] / predicted:.4f}" if predicted else "–"
        table.add_row(name, format_size(predicted) if predicted else "–", format_size(figure["measured"]), ratio)
    return table


def _packing_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """A row that says why samples do not share rows, if the model does not allow it."""
    refused = (report.get("packing") or {}).get("refused")
    return [("rows", f"one sample each, padded to the length of the plan: {refused}")] if refused else []


def _cap_rows(report: dict[str, Any], what: str) -> list[tuple[str, str]]:
    """Rows about the cap, who enforced it, and the memory of preparing, before `what` began."""
    cap = "the kernel (memory cgroup)" if report["enforced_by"] == "cgroup" else "the process's own meter"
    charged = report.get("cgroup_peak_bytes")
    also = f", which counted {format_size(charged)} with page cache and its own tables" if charged else ""
    rows = [("cap", f"{format_size(report['budget_bytes'])}, enforced by {cap}{also}")]
    if prepared := report.get("preparation_bytes"):
        rows.append(("prepared in", f"{format_size(prepared)}: plan and data, before {what} began"))
    return rows


def facts_table(rows: Sequence[tuple[str, str]]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, fact in rows:
        table.add_row(Text(name, style="bold"), Text(fact))
    return table
