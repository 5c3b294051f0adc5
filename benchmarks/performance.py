"""Writes docs/performance.md: what was wanted, what was got, and every comparison behind it.

    python benchmarks/performance.py --out docs/performance.md        # a quarter of an hour, on an idle machine
    python benchmarks/performance.py --quick --only attention,gemm    # three pairs each, in one round, to the terminal
    python benchmarks/performance.py --only steps --out docs/performance-training.md    # half an hour

The tasks, and how they are timed, are those of the asv suite in benchmarks/benchmarks: see common.py there.
"""

import argparse
import collections
import datetime
import math
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).resolve().parent
if str(FOLDER) not in sys.path:
    sys.path.insert(0, str(FOLDER))

import numpy as np  # noqa: E402
from benchmarks.common import PAIRS, Ratio, Side, Workers, relative_error  # noqa: E402

from benchmarks import attention, kernels, machine, training  # noqa: E402

MIB = 2**20
ROUNDS = 3  # with new processes each: one that happens to be slow stays so
IDLE = 5  # percent of a processor that others may use, beyond which the page says so


# What there is to measure


class Case(NamedTuple):
    """`ours` against `theirs`; of a limit of the machine, a share is told instead of a ratio."""

    label: str
    ours: Side
    theirs: Side

    @property
    def is_share(self):
        return self.theirs.task in (machine.Sgemm, machine.Reading, machine.Copying)


class Row(NamedTuple):
    """What a Case gave at a number of threads. `value`: times as fast, percent, or whatever the section's unit is; None: left out."""

    label: str
    peer: str
    value: float | None
    ratio: Ratio | None = None
    ours: str = ""
    theirs: str = ""
    error: float | None = None
    their_error: float | None = None
    apart: float | None = None
    note: str = ""


def geometric_mean(values):
    return float(np.exp(np.mean(np.log(np.maximum(values, 1e-9)))))


class Figure(NamedTuple):
    """A figure that is wanted of a section: `of` its rows' values those whose label and peer `which` accepts."""

    what: str
    wanted: float
    unit: str = "x"
    of: Callable = min
    which: Callable = lambda row: True
    at_most: bool = False

    def got(self, rows):
        """None where nothing was measured."""
        values = [row.value for row in rows if row.value is not None and self.which(row)]
        return self.of(values) if values else None

    def met(self, got):
        return got < self.wanted if self.at_most else got >= self.wanted


class Section(NamedTuple):
    name: str
    title: str
    text: str
    cases: list
    figures: list
    columns: tuple = ("", "")  # what the label is; what else is noted
    measure: Callable | None = None  # where pairs are not the way


def against(task, peer, sizes=None, label=str):
    return [Case(label(size), Side(task, size, "mini_tfm"), Side(task, size, peer)) for size in sizes or task.params[0]]


def of_limit(task, limit, sizes, limit_size, label=str):
    return [Case(label(size), Side(task, size, "mini_tfm"), Side(limit, limit_size(size), "numpy")) for size in sizes]


def by(*words):
    """Accepts rows whose label or peer has all these words."""
    return lambda row: all(word in f"{row.label} {row.peer}" for word in words)


def times(size):
    return " x ".join(map(str, size))


def spelled(size):
    return f"{times(size[:3])}, {', '.join(str(each) for each in size[3:] if each != 'none')}"


def best_of(size):
    return f"top {size[4]} of {spelled(size[:4])}"


def of_weights(dtype, most):
    """Accepts products of at most so many rows with weights of a dtype."""
    return lambda row: dtype in row.label and "top" not in row.label and int(row.label.split()[0]) <= most


PEAK_RAM = "peak RAM"
STEPS_WANTED = dict(zip(training.ROWS, (1.35, 2.0, 2.0, 1.25, 2.2, 2.2, 1.2, 1.35, 1.3, 2.0), strict=True))
ROWS_IN_CACHE = kernels.Softmax.params[0][:-1]
ROWS_BEYOND = kernels.Softmax.params[0][-1:]
SHAPE = "B x H x T x S x D"


def sections():
    """The page, in its order."""
    row_kernels = (kernels.Softmax, kernels.LayerNorm, kernels.RmsNorm)

    def named(task):
        return lambda size: f"{task.__name__} {times(size)}"

    return [
        Section(
            "attention",
            "Attention, forward",
            "Against torch's `scaled_dot_product_attention`, each library through its public function. torch has the quickest of: called"
            " plainly or inside `inference_mode`; with `is_causal`, or a mask of booleans, or of numbers, made before.",
            against(attention.Forward, "torch"),
            [
                Figure("Attention forward against torch, geometric mean", 1.3, "x", geometric_mean),
                Figure("Attention forward against torch, each shape", 1.0, "x"),
            ],
            (SHAPE, "torch's way"),
        ),
        Section(
            "share",
            "Attention, forward: the share of the sgemm peak",
            "Of the multiplications that are left to do, causal ones not counted in full.",
            of_limit(attention.Forward, machine.Sgemm, attention.SQUARE, lambda size: machine.PEAK),
            [
                Figure("Share of the sgemm peak at 1 x 8 x 2048 x 2048 x 64", 88, "%", which=lambda row: "causal" not in row.label),
                Figure("The same, causal", 85, "%", which=by("causal")),
            ],
            (SHAPE, ""),
        ),
        Section(
            "relative",
            "Attention, forward: a bias by distance",
            "A bias that depends on key - query alone (as in T5), read from its table of T + S - 1 numbers a head. torch is given the dense"
            " (1, H, T, S) bias, made before.",
            against(attention.RelativeBias, "torch"),
            [Figure("Bias by distance against torch with a dense bias, geometric mean", 1.5, "x", geometric_mean)],
            (SHAPE, "torch's way"),
        ),
        Section(
            "decode",
            "Attention, forward: one query",
            "Rates are of reading the keys and values.",
            against(attention.OneQuery, "torch"),
            [Figure("One query over 512 to 8192 keys against torch, geometric mean", 1.3, "x", geometric_mean)],
            (SHAPE, "torch's way"),
        ),
        Section(
            "backward",
            "Attention, forward and backward",
            "dq, dk and dv, from a given gradient of the output. Rates count seven products; torch's tape is part of its time, as there"
            " is no other way to its backward.",
            against(attention.ForwardAndBackward, "torch"),
            [Figure("Attention forward and backward against torch, geometric mean", 1.5, "x", geometric_mean)],
            (SHAPE, "torch's way"),
        ),
        Section(
            "training",
            "Attention, forward and backward: a trained bias; dropout of the weights",
            "With either torch leaves its fused kernel. The two libraries draw different numbers for dropout: ours is compared with its"
            " float64 twin, which draws the same.",
            against(attention.ForwardAndBackwardTrainedBias, "torch", label=lambda size: f"{size}, trained bias")
            + against(attention.ForwardAndBackwardDropout, "torch", label=lambda size: f"{size}, dropout {attention.P}"),
            [
                Figure("The same with a trained bias, geometric mean", 2.5, "x", geometric_mean, by("trained bias")),
                Figure("The same with dropout 0.1, geometric mean", 2.5, "x", geometric_mean, by("dropout")),
            ],
            (SHAPE, "torch's way"),
        ),
        Section(
            "gemm",
            "Matrix product, float32",
            "Against OpenBLAS: `np.matmul(a, b, out=out)` and `gemm(a, b, out=out)`.",
            against(kernels.Gemm, "numpy", label=times),
            [
                Figure("Matrix product against OpenBLAS, geometric mean", 0.97, "x", geometric_mean),
                Figure("Matrix product against OpenBLAS, each shape", 0.97, "x"),
            ],
            ("m x k x n", ""),
        ),
        Section(
            "linear",
            "Matrix product with its epilogue, packed weights",
            "Bias and activation, or bias and residual, in the product's own pass. NumPy: OpenBLAS into an array that is there, then the"
            " passes in place. torch: `linear` and the function after it, in place or not, whichever is quicker.",
            against(kernels.PackedLinear, "numpy", label=spelled) + against(kernels.PackedLinear, "torch", label=spelled),
            [
                Figure("Product with epilogue against OpenBLAS and NumPy, geometric mean", 1.1, "x", geometric_mean, by("numpy")),
                Figure("Product with epilogue against torch, geometric mean", 1.1, "x", geometric_mean, by("torch")),
            ],
            ("rows x in x out", "its way"),
        ),
        Section(
            "gemv",
            "Few rows: reading the weights",
            "The share of the best bandwidth with which NumPy or OpenBLAS reads as many bytes as the weights have. With more rows it is"
            " arithmetic that bounds and not memory: a float32 weight takes 2 FLOP a row, so that at 90 GFLOP/s no more than 22 GB/s of"
            " them can be used by 8 rows, however quickly they are read; that is why one row has a line of its own.",
            of_limit(kernels.Gemv, machine.Reading, kernels.Gemv.params[0], kernels.Gemv().work, spelled)
            + of_limit(kernels.LinearTopK, machine.Reading, kernels.LinearTopK.params[0], kernels.LinearTopK().work, best_of),
            [
                Figure(f"{rows}, {dtype} weights: share of the read bandwidth, each", 80, "%", which=of_weights(dtype, most))
                for rows, most in (("1 row", 1), ("1 to 8 rows", 8))
                for dtype in ("float32", "bfloat16", "int8")
            ],
            ("rows x in x out", "arithmetic, the limit"),
        ),
        Section(
            "int8",
            "Weights of eight bits against our float32",
            "",
            [
                Case(spelled(size), Side(kernels.Int8, size, "mini_tfm"), Side(kernels.Int8, (*size[:3], "float32", size[4]), "mini_tfm"))
                for size in kernels.Int8.params[0]
            ],
            [Figure("int8 against our float32 at 32 and 256 rows, geometric mean", 2.0, "x", geometric_mean)],
            ("rows x in x out", ""),
        ),
        Section(
            "rows",
            "Softmax and norms",
            "Within the caches against torch; beyond them, several inputs in turn, as a share of the bandwidth of the best copy there.",
            [case for task in row_kernels for case in against(task, "torch", ROWS_IN_CACHE, named(task))]
            + [
                case
                for task in row_kernels
                for case in of_limit(task, machine.Copying, ROWS_BEYOND, lambda size: machine.BEYOND, named(task))
            ],
            [
                Figure("Softmax and norms within the caches against torch, geometric mean", 1.5, "x", geometric_mean, by("torch")),
                Figure("Softmax and norms beyond the caches: share of the bandwidth of a copy, each", 80, "%", which=by("Copying")),
            ],
            ("rows x width", "its way"),
        ),
        Section(
            "search",
            "Exact search: the best 32 of 200,000 x 512",
            "Against faiss (flat, or its scalar quantizer of as many bits) and NumPy (a product, then argpartition; in float32 whatever the"
            " bank is). Rates are of reading the bank once. A single query waits for memory on either side. With codes of the rows, made"
            " once and a byte a number (`encode_rows`), it reads those and few of the rows, and finds the same to the bit; what making"
            " them takes is not counted.",
            [
                case
                for size in kernels.Search.params[0]
                for peer in ("faiss", "numpy")
                for case in against(kernels.Search, peer, [size], searched)
            ],
            [
                Figure("Top 32 in float32 against the better of faiss flat and NumPy, each", 1.5, "x", which=searching("float32")),
                Figure(
                    "Top 32 in float16 and int8 against the better of faiss and NumPy, each", 1.5, "x", which=searching("float16", "int8")
                ),
                Figure("Top 32 in float32 with codes against the better, one query", 1.5, "x", which=searching("float32 and codes")),
                Figure("Top 32 in float16 with codes against the better, one query", 1.5, "x", which=searching("float16 and codes")),
            ],
            ("bank", ""),
        ),
        Section(
            "others",
            "Other kernels against torch",
            "No figure is set for these.",
            [
                case
                for task in (kernels.LayerNormForwardAndBackward, kernels.CrossEntropy, kernels.AdamW)
                for case in against(
                    task, "torch", label=lambda size, task=task: f"{task.__name__} {times(size) if isinstance(size, tuple) else size}"
                )
            ],
            [],
            ("", ""),
        ),
        Section(
            "steps",
            "A step of training",
            "The same model from the same weights on the same batches, with AdamW, in PyTorch: eager with its fused AdamW, or the loss"
            " compiled, whichever is quicker; in bfloat16, under its autocast. That both have the same losses is"
            " tests/train/test_peers.py. Of the last rows the peak of the whole process, torch's eager, after three steps.",
            [],
            [
                *(
                    Figure(f"A step, {name}", wanted, which=lambda row, name=name: row.label == name)
                    for name, wanted in STEPS_WANTED.items()
                ),
                Figure("Peak RAM of the process at d 256: torch's over ours, each", 1.0, which=by(PEAK_RAM)),
            ],
            ("model, batch", "torch's way"),
            step_rows,
        ),
        Section(
            "memory",
            "Peak memory of attention at 16,384 tokens",
            "What a process grows by at its largest beyond inputs and outputs, for 1 x 1 x 16384 x 16384 x 64, a thread.",
            [],
            [Figure("Peak memory at T = S = 16,384 beyond inputs and outputs, a thread", 16, "MB", max, at_most=True)],
            ("", ""),
            memory_rows,
        ),
    ]


def searched(size):
    return f"{size[3]}, {size[0]} {'query' if size[0] == 1 else 'queries'}"


def searching(*banks):
    """Accepts rows of these banks."""
    return lambda row: row.label.split(",")[0] in banks


def step_rows(n_threads, pairs=5):
    rows = []
    for name in training.ROWS:
        with Workers() as workers:  # new processes each time: a peer's caches of memory are not to count for another model
            sides = [Side(training.Step, name, library) for library in ("mini_tfm", "torch")]
            try:
                ratio, hows, _ = workers.compare(*sides, n_threads, pairs)
            except NotImplementedError as error:
                rows.append(Row(name, "torch", None, note=f"left out: {error}"))
                continue
            spent = [f"{1e3 * seconds:.4g} ms" for seconds in (ratio.ours, ratio.theirs)]
            rows.append(Row(name, "torch", ratio.median, ratio, *spent, note=hows[1]))
    for name in training.ROWS:
        if not name.startswith("d 256"):
            continue
        try:
            ours, theirs = (training.peak_in_a_process(name, library, n_threads) for library in ("mini_tfm", "torch"))
        except NotImplementedError:
            continue
        ratio = Ratio(theirs / ours, theirs / ours, theirs / ours, ours, theirs, 1)
        spent = [f"{peak / 1e6:.0f} MB" for peak in (ours, theirs)]
        rows.append(Row(f"{PEAK_RAM}: {name}", "torch", theirs / ours, ratio, *spent, note="eager"))
    return rows


def memory_rows(n_threads):
    peaks = attention.peak_in_a_process(16384, n_threads)
    return [Row(way, "", max(0.0, peak) / 1e6) for way, peak in zip(("forward", "backward"), peaks, strict=True)]


# Measuring


def peer_of(case):
    return case.theirs.task.__name__ if case.is_share else "our float32" if case.theirs.library == "mini_tfm" else case.theirs.library


def measured(case, n_threads, workers, pairs, exact, times, last=True):
    """Adds a round's pairs to `times`; in the last round the Row of a case. `exact` keeps what was computed in float64 for the next."""
    task, limit = case.ours.task(), case.is_share
    try:
        ratio, hows, at_work = workers.compare(case.ours, case.theirs, n_threads, pairs)
    except NotImplementedError as error:
        return Row(case.label, peer_of(case), None, note=f"left out: {error}")
    times += ratio.times
    if not last:
        return None
    ratio = Ratio.of(times)
    key = case.ours[:2]
    if key not in exact:
        exact.clear()
        exact[key] = task.exact(*task.make(case.ours.size))
    ours = task.value(at_work[0].ask("result"))
    error, their_error, apart = relative_error(task.sample(ours), exact[key]), None, None
    if not limit and case.theirs.library in task.params[1]:
        theirs = task.value(at_work[1].ask("result"))
        their_error, apart = relative_error(task.sample(theirs), exact[key]), relative_error(ours, theirs)
    amounts = [side.task().work(side.size) for side in case[1:]]
    value = 100 * ratio.median * amounts[0] / amounts[1] if limit else ratio.median
    if not error < task.tolerance:
        value = 0.0
    return Row(
        case.label,
        peer_of(case),
        value,
        ratio,
        told(ratio.ours, amounts[0], task.unit),
        told(ratio.theirs, amounts[1], case.theirs.task.unit),
        error,
        their_error,
        apart,
        ", ".join(filter(None, (task.note(case.ours.size, ratio.ours), hows[1]))),
    )


class Found(NamedTuple):
    """Of a section at a number of threads. `others`: percent of a processor that something else used meanwhile."""

    rows: list
    others: float | None = None


def measure(chosen, threads, pairs, progress=lambda text: None, rounds=ROUNDS):
    """{(section's name, threads): Found}. A round has processes of its own, and its share of the pairs."""
    found, exact = {}, {}
    with Workers() as workers:
        for section in chosen:
            began = time.monotonic()
            others = {n: machine.Others(workers.processes) for n in threads}
            rows = {n: section.measure(n) if section.measure else [] for n in threads}
            times = collections.defaultdict(list)
            for left in reversed(range(rounds)):
                workers.renew()
                for case in section.cases:
                    for n in threads:
                        workers.ready(case.ours, case.theirs, n)
                        others[n].begin()
                        row = measured(case, n, workers, math.ceil(pairs / rounds), exact, times[case, n], last=not left)
                        others[n].end()
                        if not left:
                            rows[n].append(row)
            found.update({(section.name, n): Found(rows[n], others[n].share()) for n in threads})
            disturbed = [f"{n}: {others[n].share():.0f} %" for n in threads if (others[n].share() or 0) > IDLE]
            told = f", NOT IDLE, others used of a processor at threads {', '.join(disturbed)}" if disturbed else ""
            progress(f"{section.name}: {len(section.cases)} cases, {time.monotonic() - began:.0f} s{told}")
    return found


def limits(threads, tries=7):
    """{threads: (sgemm peak in GFLOP/s, [(bytes, read GB/s, by, copy GB/s, by)])}, and what each library says of itself."""
    found = {}
    with Workers() as workers:
        for n in threads:
            worker = workers.get(0, "numpy", n)

            def best(task, size, worker=worker):
                how, _ = worker.ask("prepare", task, size, "numpy")
                return task().work(size) / worker.ask("burst", tries) / 1e9, how

            peak = max(best(machine.Sgemm, side)[0] for side in machine.Sgemm.params[0])
            found[n] = peak, [(size, *best(machine.Reading, size), *best(machine.Copying, size)) for size in machine.SIZES]
    return found


def libraries(threads):
    """What each library says of itself, in a process with the most threads."""
    told = []
    with Workers() as workers:
        for name in ("mini_tfm", "numpy", "torch", "faiss"):
            try:
                told.append(workers.get(0, name, max(threads)).ask("run", machine.describe, name))
            except NotImplementedError as error:
                told.append(str(error))
    return told


# Writing


def told(seconds, amount, unit):
    """A time, and the rate of so many FLOP or bytes."""
    scale, name = next((s, n) for s, n in ((1, "s"), (1e3, "ms"), (1e6, "us")) if seconds * s >= 1 or n == "us")
    return f"{seconds * scale:.3g} {name}, {amount / seconds / 1e9:.3g} {'GFLOP/s' if unit == 'FLOP' else 'GB/s'}"


def number(value, unit="x"):
    """Cut, not rounded: 0.996 is not 1.00. Of bytes, of which less is better, rounded up."""
    if unit == "x":
        return f"{math.floor(100 * value + 1e-6) / 100:.2f}"
    if unit == "%":
        return f"{math.floor(value + 1e-6)} %"
    return f"{math.ceil(10 * value - 1e-6) / 10:.1f} {unit}"


def power(value):
    return "-" if value is None else "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-")


def table(head, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows])


def verdict(figure, rows):
    got = figure.got(rows)
    if got is None:
        return "not measured"
    return number(got, figure.unit) + ("" if figure.met(got) else " **missed**")


def wanted_and_got(chosen, threads, found):
    head = ["", "wanted", *(f"{n} thread{'s' * (n > 1)}" for n in threads)]
    rows = [
        [
            figure.what,
            f"{'<' if figure.at_most else '>='} {number(figure.wanted, figure.unit)}",
            *(verdict(figure, found[section.name, n].rows) for n in threads),
        ]
        for section in chosen
        for figure in section.figures
    ]
    return table(head, rows)


def section_rows(section, rows):
    """The table of a section at one number of threads."""
    shares = any(row.peer in ("Sgemm", "Reading", "Copying") for row in rows)
    of_peers = {row.peer for row in rows} - {""}
    if not of_peers:
        (unit,) = {figure.unit for figure in section.figures}
        return table([section.columns[0], unit], [[row.label, number(row.value, unit)] for row in rows])
    head = [
        section.columns[0],
        "peer",
        "ours",
        "peer's",
        "times as fast" + (" or share" if shares else ""),
        "quartiles",
        "error",
        "peer's error",
        "apart",
    ]
    noted, usual = section.columns[1], max([row.ratio.pairs for row in rows if row.ratio], default=0)
    lines = []
    for row in rows:
        if row.value is None:
            lines.append([row.label, row.peer, *["-"] * 7, *([row.note] if noted else [])])
            continue
        in_percent = row.peer in ("Sgemm", "Reading", "Copying")
        factor = row.value / row.ratio.median
        value = number(row.value, "%" if in_percent else "x") if row.value else "**wrong**"
        spread = " to ".join(number(x * factor, "%" if in_percent else "x") for x in (row.ratio.low, row.ratio.high))
        spread = "measured once" if row.ratio.pairs == 1 < usual else spread + f" ({row.ratio.pairs} pairs)" * (row.ratio.pairs != usual)
        errors = map(power, (row.error, row.their_error, row.apart))
        lines.append([row.label, row.peer, row.ours, row.theirs, value, spread, *errors, *([row.note] if noted else [])])
    return table(head + [noted] * bool(noted), lines)


def disturbance(others):
    return f", not idle: other processes used {others:.0f} % of a processor" if others is not None and others > IDLE else ""


def page(chosen, threads, found, of_machine, command, began, took, pairs):
    counts = " and ".join(map(str, threads))
    pairs = max([row.ratio.pairs for each in found.values() for row in each.rows if row.ratio], default=pairs)
    parts = [
        "# Performance",
        "What was wanted, what was measured, and every comparison behind it: one command writes this page, and the"
        " [asv suite](../benchmarks/README.md) measures the same tasks with the same code by commit.",
        f"```bash\n{command}\n```",
        f"{began:%Y-%m-%d %H:%M} UTC, {took / 60:.1f} minutes, {pairs} pairs each, {counts} threads. Figures are of this machine alone; on"
        " another, run the command again.",
        "## Wanted and got",
        "Times as fast as the peer: the peer's time / ours, above 1 is faster than the peer. A figure that was not reached is marked"
        " as missed.",
        wanted_and_got(chosen, threads, found),
        "## The machine and the libraries",
        table(["", ""], of_machine["about"].items()),
        "\n".join(f"- {line}" for line in of_machine["libraries"]),
        "The best of several tries: OpenBLAS's sgemm on square matrices of 512 to 2048; reading, by the quickest of OpenBLAS's sdot"
        " and sgemv and NumPy's maximum; reading and writing, by the quickest of NumPy's copy and negative, where the bytes read and"
        " those written both count.",
    ]
    for n, (peak, bandwidths) in of_machine["limits"].items():
        parts.append(f"**{n} thread{'s' * (n > 1)}**: sgemm {peak:.1f} GFLOP/s")
        rows = [
            [f"{size / MIB:g} MiB", f"{read:.1f} ({how_read})", f"{copied:.1f} ({how_copied})"]
            for size, read, how_read, copied, how_copied in bandwidths
        ]
        parts.append(table(["working set", "reading, GB/s", "reading and writing, GB/s"], rows))
    parts += [
        "## How it is measured",
        "Two libraries run in a process of their own each, with their default settings and the same number of threads: nothing in the"
        " environment holds OpenBLAS to the kernels of an older processor, while MKL, of which torch's float32 products are, takes those of"
        " AVX2 on AMD's processors by itself. They are timed in turn, A B A B ...; a side gives its answer when its threads have stopped"
        " spinning, and starts with calls that do not count. Of a few repetitions the quickest is taken; the figure is the median of the"
        " pairs' ratios, beside it are their quartiles. The pairs are divided among three rounds with new processes: one that happens to be"
        " slower by a fifth, as some are with the same code, stays so for many pairs. Each process begins by giving back an array of"
        " 31 MB, so that malloc keeps what smaller ones leave, as it does in a process that has had large arrays. An error is max |error| /"
        " max |value| against a computation in float64, apart is the same between the two results, before rounding to one digit. More:"
        " [common.py](../benchmarks/benchmarks/common.py).",
    ]
    for section in chosen:
        parts += [f"## {section.title}"] + [section.text] * bool(section.text)
        for n in threads:
            rows, others = found[section.name, n]
            parts += [f"**{n} thread{'s' * (n > 1)}**{disturbance(others)}", section_rows(section, rows)]
    return "\n\n".join(parts) + "\n"


def commit():
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=FOLDER, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [section.name for section in sections()]
    parser.add_argument("--out", type=Path, help="the page; default: standard output")
    parser.add_argument("--quick", action="store_true", help="three pairs each: to see that it runs, not to be believed")
    usual = ",".join(name for name in names if name != "steps")  # which takes twice as long as all others together
    parser.add_argument("--only", default=usual, help=f"sections, with commas between: {','.join(names)}; default: all but steps")
    parser.add_argument("--threads", default="1,2", help="numbers of threads, with commas between")
    options = parser.parse_args(arguments)
    unknown = set(options.only.split(",")) - set(names)
    if unknown:
        parser.error(f"--only: expected some of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    chosen = [section for section in sections() if section.name in options.only.split(",")]
    threads = [int(n) for n in options.threads.split(",")]
    pairs = 3 if options.quick else PAIRS
    began, clock = datetime.datetime.now(datetime.UTC), time.monotonic()

    def progress(text):
        print(text, file=sys.stderr, flush=True)

    of_machine: dict[str, Any] = {"about": machine.processor() | {"commit": commit()}, "libraries": libraries(threads)}
    of_machine["limits"] = limits(threads, 3 if options.quick else 7)
    progress(f"the machine: {time.monotonic() - clock:.0f} s")
    found = measure(chosen, threads, pairs, progress, 1 if options.quick else ROUNDS)
    command = shlex.join(["python", "benchmarks/performance.py", *(sys.argv[1:] if arguments is None else arguments)])
    text = page(chosen, threads, found, of_machine, command, began, time.monotonic() - clock, pairs)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
