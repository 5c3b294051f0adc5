"""An experiment as one HTML file: tables, plots drawn as SVG, how it was made. Nothing in it is loaded from elsewhere."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .plot import Axis, Series, line_chart

if TYPE_CHECKING:
    from .experiment import Experiment

# Distinct also for those who see no red or no green (Okabe and Ito).
COLOURS = ("#6b7280", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b")
POINTS_A_CURVE = 120

STYLE = """
:root { color-scheme: light dark; --ink: #1f2430; --dim: #667085; --line: #d9dde5; --paper: #fff; --good: 0, 158, 115; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ee; --dim: #98a1b3; --line: #3a4150; --paper: #171a21; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 72rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; } p, li { max-width: 50rem; }
.dim { color: var(--dim); } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .93rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .55rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { font-weight: 600; vertical-align: bottom; } th small { font-weight: 400; color: var(--dim); }
td i { display: inline-block; width: .75rem; height: .75rem; border-radius: 50%; margin-right: .5rem; vertical-align: -.05rem; }
svg { width: 100%; max-width: 60rem; height: auto; }
svg text { fill: var(--ink); font: 13px system-ui, sans-serif; } svg .dim { fill: var(--dim); }
svg .grid { stroke: var(--line); } code, pre { font: .9em/1.5 ui-monospace, monospace; }
pre { overflow-x: auto; padding: .7rem 1rem; border: 1px solid var(--line); border-radius: .4rem; }
dt { font-weight: 600; } dd { margin: 0 0 .5rem 0; } .warn { font-weight: 600; color: #b42318; }
.facts td { white-space: normal; overflow-wrap: anywhere; text-align: left; vertical-align: top; }
.facts td:first-child { min-width: 6rem; }
@media (max-width: 48rem) {
  body { margin: 1rem auto; padding: 0 .8rem; } svg { min-width: 40rem; } pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  .rows, .rows tbody, .rows tr, .rows td { display: block; } .rows tr:first-child { display: none; }
  .rows tr { padding: .6rem 0; border-bottom: 1px solid var(--line); }
  .rows td { display: flex; justify-content: space-between; white-space: normal; overflow-wrap: anywhere; border: 0; padding: .1rem .3rem; }
  .rows td:first-child { display: block; font-weight: 600; } .rows td[data-name]::before { content: attr(data-name); color: var(--dim); }
}
"""


def html_report(experiment: Experiment, command: str) -> str:
    """The page; `command` makes it again."""
    rows = experiment.rows
    colours = {row.memory: COLOURS[i % len(COLOURS)] for i, row in enumerate(rows)}
    recall = [(row.memory, colours[row.memory], [(float(d), 100 * row.recall[d]) for d in experiment.distances]) for row in rows]
    chance = 100 * experiment.chance
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>mini_tfm: memories compared</title><style>{STYLE}</style></head><body>
<h1>What does each memory remember?</h1>
{_warnings(experiment)}
<p class="dim">The same small Transformer, the same text, {experiment.steps} training steps each; only the memory differs.
{len(rows)} memories, {_seeds(experiment)}{experiment.seconds / 60:.1f} minutes on {_say(experiment.machine.get("processor", "?"))}.</p>
<div class="wide">{_table(experiment, colours)}</div>
<h2>Is a fact still recalled some segments later?</h2>
<p class="dim">Share of correct answers, by the number of segments between the fact and the question. 0: both are visible, no
memory needed. Dashed: guessing, {chance:.0f} %.</p>
<div class="wide">
{line_chart(recall, Axis("segments between fact and question", ticks=experiment.distances), Axis("% recalled", (0, 100)), level=chance)}
</div>
<h2>How they learned</h2>
<p class="dim">Training loss, in nats per token, smoothed. Grey, dashed: the common start, one model without a memory, on an easier
task of its own; then each memory on longer and longer streams, with parts of the text hidden.</p>
<div class="wide">
{line_chart(_curves(experiment, colours), Axis("optimizer step"), Axis("loss (nats/token)"), dashed=("common start",), marks=False)}
</div>
<h2>What the columns mean</h2>
<dl><dt>bits per byte</dt><dd>Bits the model needs per byte of held-out documents. Fewer is better; plain text takes 8. Compare the
memories with each other.</dd>
<dt>recall</dt><dd>&ldquo;The code word is Q.&rdquo; is inserted at a random position of a held-out document; some segments later the
model is asked for it. Guessing one of {round(1 / experiment.chance)} letters gives {chance:.0f} %.</dd>
<dt>tokens/s</dt><dd>Reading and predicting held-out text with this memory.</dd>
<dt>state</dt><dd>Size of one stream's memory after the longest held-out document.</dd>
<dt>peak RAM</dt><dd>Total, of the process that trained and measured only this memory.</dd></dl>
<h2>Set-up</h2>
<table class="facts">{_facts(experiment)}</table>
<h2>Repeat it</h2>
<pre>{_say(command)}</pre>
<p class="dim">The text, the split, the batches and the initial weights are functions of the seed, and the budget is a number of steps: a
slower or busier machine takes longer and finds the same bits per byte and recall. Times and RAM vary.</p>
</body></html>
"""


def _warnings(experiment: Experiment) -> str:
    """What the reader must know before any figure: fewer steps than planned, memories without figures."""
    lines = [experiment.cut_short] if experiment.cut_short else []
    lines += [f"{row.memory} failed: {row.error}" for row in experiment.failed]
    return "".join(f'<p class="warn">{_say(line)}</p>\n' for line in lines)


def _seeds(experiment: Experiment) -> str:
    return f"means over {len(experiment.seeds)} seeds, " if len(experiment.seeds) > 1 else ""


def _table(experiment: Experiment, colours: dict[str, str]) -> str:
    heads = ["memory", "bits per byte<br><small>held-out text</small>"]
    heads += [f"recall<br><small>{d} back</small>" for d in experiment.distances]
    heads += ["tokens/s", "state", "peak RAM", "training<br><small>seconds</small>"]
    names = [re.sub("<[^>]*>", " ", head).replace("  ", " ").strip() for head in heads]
    best = min((row.bits_per_byte for row in experiment.rows if row.error is None), default=0.0)
    lines = []
    for row in experiment.rows:
        cells = [(f'<i style="background:{colours[row.memory]}"></i>{_say(row.memory)}', "")]
        if row.error is not None:
            cells += [("-", "")] * (len(heads) - 1)
        else:
            bits = f"{row.bits_per_byte:.3f}" + (f" \u00b1 {row.spread['bits_per_byte']:.3f}" if row.spread else "")
            cells.append((f"<b>{bits}</b>" if row.bits_per_byte == best else bits, ""))
            cells += [_share(row.recall[distance]) for distance in experiment.distances]
            cells += [(f"{row.tokens_per_second:,.0f}", ""), (_size(row.state_bytes), ""), (_size(row.peak_rss_bytes), "")]
            cells.append((f"{row.train_seconds:.0f}", ""))
        shown = [f'<td data-name="{name}"{style}>{text}</td>' for name, (text, style) in zip(names, cells, strict=True)]
        shown[0] = f"<td>{cells[0][0]}</td>"
        lines.append("<tr>" + "".join(shown) + "</tr>")
    return '<table class="rows"><tr>' + "".join(f"<th>{head}</th>" for head in heads) + "</tr>" + "".join(lines) + "</table>"


def _share(share: float) -> tuple[str, str]:
    """A share of facts, and the style of its cell."""
    if math.isnan(share):
        return "-", ""
    return f"{100 * share:.0f} %", f' style="background:rgba(var(--good), {0.5 * share:.2f})"'


def _facts(experiment: Experiment) -> str:
    config = experiment.config
    facts = {
        "text": f"{experiment.text_name}: {experiment.documents} documents",
        "trained on": f"{experiment.bytes_train:,} bytes",
        "held out": f"{experiment.bytes_held_out:,} bytes: {', '.join(experiment.held_out_names)}",
        "model": f"{config.n_encoder_layers} encoder and {config.n_decoder_layers} decoder layers, d_model {config.d_model},"
        f" {config.n_heads} heads, d_ff {config.d_ff}, segments of {config.segment_length} tokens",
        "tokenizer": f"byte-level BPE, {experiment.tokenizer_vocab} tokens",
        "steps": f"{experiment.start_steps} for the common start, then {experiment.steps} with each memory"
        + (f" ({experiment.cut_short})" if experiment.cut_short else ""),
        "seed": ", ".join(map(str, experiment.seeds or [experiment.seed])),
        **{name: str(value) for name, value in experiment.machine.items()},
    }
    return "".join(f"<tr><td>{_say(name)}</td><td>{_say(text)}</td></tr>" for name, text in facts.items())


def _curves(experiment: Experiment, colours: dict[str, str]) -> list[Series]:
    start = experiment.history.get("start", [])
    curves: list[Series] = [("common start", "#9aa1ad", _smooth(start, 0))] if start else []
    return curves + [
        (row.memory, colours[row.memory], _smooth(experiment.history.get(row.memory, []), len(start))) for row in experiment.rows
    ]


def _smooth(points: Sequence[tuple[int, float]], shift: int) -> list[tuple[float, float]]:
    """Means of groups of neighbours, at most POINTS_A_CURVE of them."""
    n = max(1, math.ceil(len(points) / POINTS_A_CURVE), min(10, len(points) // 10))
    groups = [points[i : i + n] for i in range(0, len(points), n)]
    return [(shift + sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _say(text: object) -> str:
    return html.escape(str(text))


def _size(n_bytes: float) -> str:
    amount, unit = float(n_bytes), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            break
        amount /= 1000
    return f"{amount:.0f} {unit}" if unit == "B" or amount >= 99.95 else f"{amount:.1f} {unit}"
