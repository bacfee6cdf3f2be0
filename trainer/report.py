"""A cycle's report: one HTML file beside its snapshot, which says what was learnt, how far to trust it, and why it ended.

Made of what the cycle's row holds, so that it can be made again at any time. The replies shown are to guard prompts, which are
the operator's own: nothing that a user wrote is in it.
"""

import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")  # draws into a file, and needs no screen
from matplotlib import pyplot
from matplotlib.axes import Axes

REPORT = "report.html"
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #ccc;padding:.3rem .6rem;text-align:left}"
    "figure{margin:1rem 0}svg{max-width:100%;height:auto}.failed{color:#a00;font-weight:600}"
)
WIDTH, HEIGHT = 6.4, 3.6
"""Of a plot, in inches."""


def write(path: Path, cycle_id: int, stage: str, reason: str, metrics: Mapping[str, Any]) -> None:
    """Writes the report of a cycle that has ended. metrics: as in its row; what is missing is left out."""
    parts = [
        f"<h1>Cycle {cycle_id}: {escape(stage)}</h1><p>{escape(reason)}</p>",
        _snapshot(metrics.get("snapshot") or {}),
        _reward_model(metrics.get("reward_model") or {}),
        _training(metrics.get("training") or {}),
        _gate(metrics.get("gate") or {}),
        _duel(metrics.get("duel") or {}),
        _samples(metrics.get("samples") or []),
    ]
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Cycle {cycle_id}</title><style>{STYLE}</style>'
    partial = path.with_suffix(".partial")
    partial.write_text(f"{head}<body>{''.join(parts)}</body></html>\n")
    partial.rename(path)


def _snapshot(snapshot: Mapping[str, Any]) -> str:
    if not snapshot:
        return ""
    counts = ", ".join(f"{snapshot[kind]} {kind}" for kind in ("votes", "rankings", "demonstrations"))
    unjudged = f"; {snapshot['prompts']} prompts that nobody judged" if snapshot.get("prompts") else ""
    return f"<h2>Learnt from</h2><p>{counts}{unjudged}; snapshot {escape(snapshot['sha256'][:16])}</p>"


def _reward_model(found: Mapping[str, Any]) -> str:
    if not found:
        return ""
    rows = [("all", found["accuracy"])]
    rows += [*found["by_policy"].items(), *found["by_cohort"].items()]
    accuracy = _table(
        ("on held-out pairs", "right [95 %]", "pairs"),
        [
            (name, f"{a['share']:.2f} [{a['low']:.2f}, {a['high']:.2f}]", str(a["num_pairs"]))
            for name, a in rows
        ],
    )
    text = (
        f"<p>Held out by {escape(found['held_out_by'])}: {found['held_out_pairs']} pairs; fit on {found['train_pairs']}. "
        f"Log loss {found['log_loss']:.3f} (a coin's: 0.693); expected calibration error {found['calibration_error']:.3f}; "
        f"correlation of score and length {found['length_correlation']:+.2f}.</p>"
    )
    return f"<h2>Reward model</h2>{text}{accuracy}{_plot(_draw_reliability, found['reliability'])}"


def _draw_reliability(axes: Axes, bins: Sequence[Mapping[str, float]]) -> None:
    axes.plot([0.5, 1], [0.5, 1], color="#bbb", linestyle="--", label="calibrated")
    axes.plot(
        [b["confidence"] for b in bins], [b["accuracy"] for b in bins], marker="o", label="reward model"
    )
    axes.set(xlabel="how sure it was", ylabel="share that was right", title="Calibration on held-out pairs")
    axes.legend()


def _training(found: Mapping[str, Any]) -> str:
    iterations = found.get("iterations")
    if epochs := found.get("epochs"):
        why = f"Kept epoch {found['kept']} of {len(epochs) - 1}: {escape(found['why'])}."
        return f"<h2>Training ({escape(found['method'])})</h2><p>{why}</p>{_plot(_draw_epochs, epochs)}"
    if not iterations:
        return ""
    kept = (
        f"Kept iteration {found['kept']} of {len(iterations)}: {escape(found['why'])}."
        if "kept" in found
        else ""
    )
    gap = max(iteration.get("gap", 0.0) for iteration in iterations)
    kept += f" Sampler and trainer differed by at most {gap:.4f} nats a token."
    draws = [_draw_reward_against_kl, _draw_judge, _draw_length]
    if iterations[0].get("guard"):
        draws.append(_draw_guard)
    plots = [_plot(draw, iterations) for draw in draws]
    return f"<h2>Training ({escape(found['method'])})</h2><p>{kept}</p>{''.join(plots)}"


def _draw_epochs(axes: Axes, epochs: Sequence[Mapping[str, float]]) -> None:
    axes.plot([e["number"] for e in epochs], [e["held_out_loss"] for e in epochs], marker="o")
    axes.set(xlabel="epoch", ylabel="nats per token", title="Loss on held-out demonstrations")


def _draw_reward_against_kl(axes: Axes, iterations: Sequence[Mapping[str, float]]) -> None:
    axes.plot(
        [i["kl"] for i in iterations], [i["score"] for i in iterations], marker=".", label="reward (ensemble)"
    )
    axes.plot(
        [i["kl"] for i in iterations], [i["judge"] for i in iterations], marker=".", label="held-out judge"
    )
    axes.set(xlabel="KL to the anchor, nats per reply", ylabel="score", title="Reward against KL")
    axes.legend()


def _draw_judge(axes: Axes, iterations: Sequence[Mapping[str, float]]) -> None:
    numbers = [i["number"] for i in iterations]
    errors = [2 * i["judge_error"] for i in iterations]
    axes.errorbar(numbers, [i["judge"] for i in iterations], yerr=errors, label="held-out judge ± 2 errors")
    axes.plot(numbers, [i["disagreement"] for i in iterations], label="disagreement in the ensemble")
    axes.set(xlabel="iteration", ylabel="standard deviations", title="Held-out reward")
    axes.legend()


def _draw_length(axes: Axes, iterations: Sequence[Mapping[str, float]]) -> None:
    axes.plot([i["number"] for i in iterations], [i["length"] for i in iterations])
    axes.set(xlabel="iteration", ylabel="tokens", title="Mean length of a reply")
    axes.set_ylim(bottom=0)


def _draw_guard(axes: Axes, iterations: Sequence[Mapping[str, Any]]) -> None:
    asked = [i["guard"] for i in iterations]
    shares = [guard["num_right"] / guard["num_asked"] for guard in asked]
    axes.plot([i["number"] for i in iterations], shares, marker=".", linestyle="", label="while training")
    axes.axhline(asked[0]["live"], color="#bbb", linestyle="--", label="live policy")
    axes.set(xlabel="iteration", ylabel="share", title="Right answers to some of the guard set")
    axes.legend()


def _gate(found: Mapping[str, Any]) -> str:
    rows = []
    for check in found.get("checks", []):
        verdict = "passed" if check["passed"] else "FAILED"
        rows.append((check["meaning"], f"{check['value']:.3f}", f"{check['threshold']:.3f}", verdict))
    return "<h2>Gate</h2>" + _table(("check", "value", "threshold", "verdict"), rows) if rows else ""


def _duel(found: Mapping[str, Any]) -> str:
    if "interval" not in found:
        return ""
    rows = [
        (
            str(found["wins"]),
            str(found["losses"]),
            str(found["ties"]),
            f"{found['interval']['low']:.2f} to {found['interval']['high']:.2f}",
            f"{found['evidence_better']:.3g}",
            f"{found['evidence_worse']:.3g}",
        )
    ]
    head = ("votes for it", "for live", "for neither", "its chance of a decided vote (95 %)")
    return "<h2>Duel</h2>" + _table((*head, "evidence that it is better", "that it is worse"), rows)


def _samples(samples: Sequence[Mapping[str, str]]) -> str:
    if not samples:
        return ""
    rows = [(sample["prompt"], sample["before"], sample["after"]) for sample in samples]
    return "<h2>Samples</h2>" + _table(("prompt (of the guard set)", "live before", "candidate"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def cell(text: str) -> str:
        return f'<td class="failed">{text}</td>' if text == "FAILED" else f"<td>{escape(text)}</td>"

    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(map(cell, row)) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def _plot(draw: Any, values: Sequence[Mapping[str, float]]) -> str:
    """An SVG inside the page. draw: (axes, values) -> None."""
    figure, axes = pyplot.subplots(figsize=(WIDTH, HEIGHT), layout="constrained")
    try:
        draw(axes, values)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    finally:
        pyplot.close(figure)
    svg = file.getvalue()
    return f"<figure>{svg[svg.index('<svg') :]}</figure>"
