"""Every benchmark runs, on something tiny; what takes a time takes the right one, on a clock of its own; the page says what was got.

What asv would do with the suite is done here without asv, and without the processes in which the peers otherwise run.
"""

import importlib.util
import inspect
import itertools
import json
import math
import os
import re
import sys
import textwrap
import time
import types
from pathlib import Path

import numpy as np
import pytest
from helpers import in_a_process

import mini_tfm as mt

FOLDER = Path(__file__).parent.parent / "benchmarks"
HAS = {name: importlib.util.find_spec(name) is not None for name in ("torch", "faiss")}
KINDS = re.compile(r"(time|timeraw|track|peakmem)_")


def import_from(path, name, **options):
    spec = importlib.util.spec_from_file_location(name, path, **options)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def import_benchmarks():
    """The package benchmarks/benchmarks, whatever else that name may find, and its modules."""
    package = FOLDER / "benchmarks"
    import_from(package / "__init__.py", "benchmarks", submodule_search_locations=[str(package)])
    return {path.stem: importlib.import_module(f"benchmarks.{path.stem}") for path in package.glob("[!_]*.py")}


MODULES = import_benchmarks()
common, machine, kernels, attention = (MODULES[name] for name in ("common", "machine", "kernels", "attention"))
performance = sys.modules["performance"] = import_from(FOLDER / "performance.py", "performance_page")
inference, files, accuracy = (MODULES[name] for name in ("inference", "files", "accuracy"))
inference_page = import_from(FOLDER / "inference.py", "inference_page")

# Instead of a class's sizes; a class that is not here has small ones.
TINY = {
    "Forward": "2 x 2 x 3 x 5 x 4, causal, bias, lengths",
    "OneQuery": "2 x 2 x 1 x 9 x 4",
    "KeptKeys": "1 x 3 x 1 x 9 x 4",
    "RelativeBias": "1 x 2 x 3 x 5 x 4",
    "ForwardAndBackward": "2 x 2 x 5 x 5 x 4, causal",
    "ForwardAndBackwardTrainedBias": "2 x 2 x 5 x 5 x 4, causal",
    "ForwardAndBackwardDropout": "2 x 2 x 5 x 5 x 4",
    "Gemm": (2, 3, 4),
    "PackedLinear": (2, 16, 8, "float32", "gelu"),
    "Gemv": (1, 64, 16, "int8", "none"),
    "Int8": (2, 64, 16, "int8", "none"),
    "Cold": (2, 16, 8, "float32", 0.001),
    "LinearTopK": (2, 16, 8, "float32", 4),
    "Search": (2, 50, 16, "float32 and codes"),
    "Softmax": (3, 8),
    "LayerNorm": (3, 8, 2),
    "RmsNorm": (3, 8),
    "LayerNormForwardAndBackward": (3, 8),
    "CrossEntropy": (3, 5),
    "SinusoidalPositions": (3, 4),
    "AdamW": 10,
    "Step": "tiny, dropout",
    "Sgemm": 8,
    "Reading": 8192,
    "Copying": 8192,
    "WeakScaling": (2, 8),
    "Decoding": ("tiny T5", 2, 5, 1),
}


class InThisProcess:
    """A Worker that is none."""

    def __init__(self, n_threads):
        self.server, self.process = common._Server(), types.SimpleNamespace(pid=os.getpid())

    def ask(self, name, *arguments):
        return getattr(self.server, name)(*arguments)

    def close(self):
        self.server.drop()


@pytest.fixture
def tiny(monkeypatch, tmp_path_factory):
    """Everything in this process, two pairs, hardly a repetition, and small limits to compare with."""
    monkeypatch.setattr(common.Workers, "start", InThisProcess)
    monkeypatch.setattr(common, "PAIRS", 2)
    monkeypatch.setattr(common, "REPETITION", 1e-6)
    monkeypatch.setattr(common, "settle", lambda: None)
    monkeypatch.setattr(machine, "PEAK", 8)
    monkeypatch.setattr(machine, "BEYOND", 8192)
    monkeypatch.setattr(MODULES["model"].TrainingStepAgainstTorch, "pairs", 1)
    monkeypatch.setattr(MODULES["training"].StepAgainstTorch, "pairs", 1)
    monkeypatch.setattr(MODULES["training"], "COMPILE", False)
    monkeypatch.setattr(MODULES["characters"], "STEPS", 2)
    monkeypatch.setattr(accuracy, "TRAINED_FOR", 2)
    monkeypatch.setattr(files, "FOLDER", tmp_path_factory.getbasetemp() / "files")
    monkeypatch.setattr(MODULES["segments"].Recomputed, "pairs", 1)
    monkeypatch.setattr(inference.OutsideKernels, "rounds", 1)
    monkeypatch.setattr(inference.Lookup, "rounds", 1)
    monkeypatch.setattr(inference.Lookup, "tokens", 8)
    monkeypatch.setattr(MODULES["tape"], "REPEATS", 1)
    for module, sizes in {
        "segments": {"BATCH": 4, "SEGMENT": 8},  # enough for the peak of a process to move
        "characters": {"BATCH": 4, "BLOCK": 4},
        "memory": {"BATCH": 2, "SEGMENT": 16},
    }.items():
        for name, value in sizes.items():
            monkeypatch.setattr(MODULES[module], name, value)
    monkeypatch.setattr(MODULES["memory"].Contract, "PAIRS", 2)
    monkeypatch.setattr(MODULES["memory"].Contract, "SIZES", {"d_model": 16, "n_heads": 2})
    monkeypatch.setitem(MODULES["model"].TRAINED_ON, "1.0 M", (2, 16))
    monkeypatch.setattr(MODULES["parallel"].WeakScaling, "pairs", 1)
    monkeypatch.setattr(MODULES["parallel"].WeakScaling, "steps", 1)
    for kernel in kernels.StreamShare.of.values():
        monkeypatch.setattr(kernel, "params", ([TINY[kernel.__name__]], *kernel.params[1:]))


def params_of(cls):
    """A list of values for each parameter; asv takes a flat list, too, where there is one parameter."""
    params = list(getattr(cls, "params", []))
    return params if params and isinstance(params[0], list | tuple) and not isinstance(params, str) else [params] if params else []


def smallest(cls, method):
    """Something tiny or else the first value of each parameter; every library, as each is code of its own, and once every memory."""
    names = getattr(cls, "param_names", [])
    every = {"library"} | ({"memory"} if method.startswith("track_error") else set())
    chosen = [values if name in every else values[:1] for name, values in zip(names, params_of(cls), strict=True)]
    of = getattr(cls, "kernel", cls).__name__.removesuffix("AgainstFloat32").removesuffix("Share")
    if "size" in names and of in TINY:
        chosen[names.index("size")] = [TINY[of]]
    return list(itertools.product(*chosen))


CASES = [
    pytest.param(cls, method, chosen, id="-".join([f"{name}.{cls.__name__}.{method}", *map(str, chosen)]))
    for name, module in sorted(MODULES.items())
    for cls in vars(module).values()
    if inspect.isclass(cls) and cls.__module__ == module.__name__ and not cls.__name__.startswith("_")
    for method in sorted(dir(cls))
    if KINDS.match(method)
    for chosen in smallest(cls, method)
]


@pytest.mark.filterwarnings("ignore::UserWarning:torch.*")
@pytest.mark.parametrize("cls, method, chosen", CASES)
def test_it_runs(cls, method, chosen, tiny):
    benchmark = cls()
    try:
        if hasattr(benchmark, "setup"):
            benchmark.setup(*chosen)
        result = getattr(benchmark, method)(*chosen)
    except NotImplementedError as error:
        pytest.skip(str(error))
    finally:
        if hasattr(benchmark, "teardown"):
            benchmark.teardown(*chosen)
    kind = KINDS.match(method)[1]
    if kind == "timeraw":
        in_a_process(textwrap.dedent(result))
    elif kind == "track":
        assert isinstance(result, int | float) and math.isfinite(result)
        # Beyond what was there before a process may have become smaller; and of two times either may be the longer.
        assert result >= 0 or "beyond" in method or "overhead" in method
        assert getattr(getattr(benchmark, method), "unit", None), "a number without its unit says nothing"
        if method.startswith("track_error"):
            assert result < getattr(benchmark, "tolerance", 1e-3), "as far from float64 as this is wrong, not fast"
    else:
        assert result is None, "asv would drop what this returns"


@pytest.mark.parametrize("peer", ["torch", "faiss"])
def test_without_a_peer_what_needs_it_is_left_out(monkeypatch, peer):
    """asv takes NotImplementedError in setup for a benchmark that does not apply."""
    monkeypatch.setitem(sys.modules, peer, None)
    needing = [cls for module in MODULES.values() for cls in vars(module).values() if getattr(cls, "peer", None) == peer]
    assert needing
    for cls in needing:
        with pytest.raises(NotImplementedError, match=f"{peer} is not installed"):
            cls().setup("any size")
    with pytest.raises(NotImplementedError, match=f"{peer} is not installed"):
        kernels.Search().setup(TINY["Search"], peer)


def test_a_peer_is_a_parameter_and_has_a_ratio():
    """Of each kernel that a peer computes, too: ("Softmax", "torch") and so on."""
    parameters, ratios = set(), set()
    for module in MODULES.values():
        for cls in vars(module).values():
            if inspect.isclass(cls) and issubclass(cls, common._Task) and not cls.__name__.startswith("_"):
                parameters |= {(cls.__name__, peer) for peer in cls.params[1] if peer in ("torch", "faiss")}
            if inspect.isclass(cls) and issubclass(cls, common._Against) and cls.kernel is not common._Task:
                assert hasattr(cls, f"track_ratio_{cls.peer}") and hasattr(cls.kernel, cls.peer)
                ratios.add((cls.kernel.__name__, cls.peer))
    assert parameters and not parameters - ratios


def test_beside_each_time_stands_an_error():
    elsewhere = {"Asking": "Reading"}  # whose error is measured by another
    for module in ("kernels", "attention", "model", "memory", "inference"):
        for cls in vars(MODULES[module]).values():
            if inspect.isclass(cls) and cls.__module__ == f"benchmarks.{module}" and not cls.__name__.startswith("_"):
                timed = any(name.startswith("time_") for name in dir(cls))
                checked = vars(MODULES[module]).get(elsewhere.get(cls.__name__), cls)
                assert not timed or any(name.startswith("track_error_") for name in dir(checked)), cls


def test_every_built_in_memory_is_measured():
    built_in = {"window", "recurrent", "store"}
    assert built_in <= set(mt.list_memories())
    measured = {part.partition(":")[0] for spec in MODULES["memory"].MEMORIES for part in spec.split("+")}
    assert measured == {"none", *built_in}


def test_the_configuration_is_what_asv_reads():
    lines = (FOLDER / "asv.conf.json").read_text().splitlines()
    configuration = json.loads("\n".join(line for line in lines if not line.strip().startswith("//")))
    assert configuration["project"] == "mini_tfm" and (FOLDER / configuration["repo"] / "pyproject.toml").exists()


# How a time is taken, on a clock that only what is called here moves


class Clock:
    """Of seconds. `spinning`: until then the process's threads use a processor whatever happens."""

    def __init__(self):
        self.now = self.slept = self.spinning = 0.0

    def perf_counter(self):
        return self.now

    monotonic = perf_counter

    def process_time(self):
        return min(self.now, self.spinning)

    def sleep(self, seconds):
        self.now += seconds
        self.slept += seconds

    def taking(self, *durations, calls=None, name=None):
        """A function that takes these times in turn, the last one from then on, and notes that it was called."""
        left = list(durations)

        def call():
            self.now += left.pop(0) if len(left) > 1 else left[0]
            if calls is not None:
                calls.append(name)

        return call


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(common, "time", clock)
    monkeypatch.setattr(common, "thread_count", lambda: 2)
    return clock


@pytest.mark.parametrize("duration", [2e-7, 3e-6, 1e-4, 9e-4, 2e-3, 8e-3])
def test_of_short_calls_milliseconds_are_timed(clock, duration):
    warm, number, repeats = common.plan(clock.taking(duration))
    assert number * duration >= 0.99 * common.REPETITION and repeats == 3
    assert number * repeats * duration >= 2e-3 and warm * duration >= 0.99 * common.REPETITION


def test_of_long_calls_few_are_made(clock):
    assert common.plan(clock.taking(0.03)) == (1, 1, 2)
    assert common.plan(clock.taking(0.5)) == (0, 1, 1)


def test_the_first_call_does_not_decide_how_many(clock):
    assert common.plan(clock.taking(2.0, 0.002)).repeats == 3


def test_a_burst_is_its_quickest_repetition(clock):
    #                                  warm  |  two calls a repetition
    call = clock.taking(9.0, 9.0, 3.0, 3.0, 1.0, 2.0, 5.0, 5.0)
    assert common.burst(call, warm=2, number=2, repeats=3) == pytest.approx(1.5)


def test_pairs_alternate_and_those_that_warm_do_not_count(clock):
    calls = []

    def side(name, *durations):
        call = clock.taking(*durations, calls=calls, name=name)
        return lambda: common.seconds(call)

    got = common.interleaved(side("A", 100, 1, 1, 1, 1, 1), side("B", 1, 2, 3, 4, 5, 6), pairs=5, warm=1)
    assert calls == ["A", "B"] * 6
    assert got[:-1] == pytest.approx((4, 3, 5, 1, 4, 5)), "median and quartiles of theirs over ours, the median times, the pairs"


def test_of_what_takes_very_long_there_are_few_pairs(clock):
    def compared(*durations):
        calls = [clock.taking(duration) for duration in durations]
        return common.interleaved(*(lambda call=call: common.seconds(call) for call in calls), pairs=15, warm=0)

    got = compared(1.0, 4.0)
    assert (got.theirs, got.pairs) == (4.0, common.ENOUGH)
    assert compared(0.2, 0.4).pairs == 15


def test_a_side_answers_when_its_threads_are_quiet(clock):
    clock.spinning = clock.now + 0.1
    common.settle()
    assert 0.1 <= clock.now < 0.1 + 2 * common.QUIET


def test_threads_that_never_rest_are_not_waited_for_forever(clock):
    clock.spinning = math.inf
    common.settle(limit=0.5)
    assert 0.5 <= clock.now < 0.6


def test_one_thread_leaves_nothing_to_wait_for(clock, monkeypatch):
    monkeypatch.setattr(common, "thread_count", lambda: 1)
    clock.spinning = math.inf
    common.settle()
    assert clock.slept == 0


def fake_task(clock, amount, wrong=0.0, **durations):
    """Computes 1.0, `wrong` beside it, in so many seconds by each library: {"": 0.1} or {way: seconds}."""

    class Fake(common._Task):
        params = ([1], list(durations))

        def make(self, size):
            return ()

        def work(self, size):
            return amount

        def ways(self, size, name):
            ways = durations[name] if isinstance(durations[name], dict) else {"": durations[name]}
            answer = np.array([1.0 + (wrong if name == "mini_tfm" else 0.0)])

            def way(seconds):
                call = clock.taking(seconds)
                return lambda: (call(), answer)[1]

            return {how: way(seconds) for how, seconds in ways.items()}

        def exact(self):
            return np.array([1.0])

    return Fake


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(common.Workers, "start", InThisProcess)


def test_above_one_is_faster_than_the_peer(clock, here):
    task = fake_task(clock, 1, mini_tfm=0.002, numpy=0.003)
    assert common.ratio(common.Side(task, 1, "mini_tfm"), common.Side(task, 1, "numpy")) == pytest.approx(1.5)


def test_the_quickest_way_of_a_peer_counts(clock, here):
    task = fake_task(clock, 1, mini_tfm=0.002, numpy={"slow": 0.1, "quick": 0.001, "other": 0.2})
    with common.Workers() as workers:
        got, hows, _ = workers.compare(common.Side(task, 1, "mini_tfm"), common.Side(task, 1, "numpy"))
    assert got.median == pytest.approx(0.5) and hows == ("", "quick")
    assert got.pairs == common.PAIRS >= 15


def test_a_share_counts_the_work(clock, here):
    ours, limit = fake_task(clock, 30, mini_tfm=0.002), fake_task(clock, 100, numpy=0.004)
    share = common.share(common.Side(ours, 1, "mini_tfm"), common.Side(limit, 1, "numpy"))
    assert share == pytest.approx(100 * (30 / 0.002) / (100 / 0.004))


def test_an_error_is_of_the_largest_value():
    assert common.relative_error(np.array([1.0, 2.5]), np.array([1.0, 2.0])) == 0.25
    assert common.relative_error((np.zeros(2), 3.0), (np.zeros(2), 4.0)) == 0.25
    with pytest.raises(ValueError, match=r"shape \(1,\), expected \(2,\)"):
        common.relative_error(np.zeros(1), np.zeros(2))


def test_work_that_is_hidden_does_not_count():
    scores = {"1 x 1 x 4 x 4 x 8": 16, "2 x 3 x 4 x 4 x 8, causal": 60, "1 x 1 x 2 x 4 x 8, causal": 7, "1 x 1 x 4 x 2 x 8, causal": 3}
    assert {text: attention.Problem.of(text).scores() for text in scores} == scores
    problem = attention.Problem.of("3 x 1 x 4 x 9 x 8, lengths")
    assert problem.scores() == 4 * problem.lengths().sum() and (problem.lengths() >= 5).all()


# The processes


def test_a_worker_has_the_threads_it_was_given_and_no_settings_of_others(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    worker = common.Worker(1)
    try:
        assert worker.ask("run", common.thread_count) == 1
        assert worker.ask("run", mt.get_num_threads) == 1
        assert worker.ask("run", os.getenv, "OMP_WAIT_POLICY") is None
        assert worker.ask("run", machine.describe, "mini_tfm").startswith("mini_tfm ")
        assert worker.ask("prepare", machine.Reading, 8192, "numpy")[0] in (
            "sdot",
            "maximum",
            "maximum, in pieces",
            "sgemv",
            "sgemv, transposed",
        )
        assert 0 < worker.ask("burst") < 1
        with pytest.raises(NotImplementedError, match="nothing of this name is not installed"):
            worker.ask("run", common.library, "nothing of this name")
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            worker.ask("run", divmod, 1, 0)
        with pytest.raises(RuntimeError, match="exit code 3"):
            worker.ask("run", sys.exit, 3)
    finally:
        worker.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_others_use_is_told_apart_from_ours():
    """A busy process that is not ours is others' time; ours is not."""
    worker = common.Worker(1)
    try:
        outer, inner = machine.Others(list), machine.Others(lambda: [worker.process.pid])
        worker.ask("run", time.process_time)  # it is there
        outer.begin(), inner.begin()
        worker.ask("run", sum, range(20_000_000))
        outer.end(), inner.end()
        assert outer.other - inner.other > 0.05
    finally:
        worker.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_that_is_given_back_was_used():
    grown, (out,) = attention.grown_by(lambda: (np.ones(50 * 2**20, np.uint8)[:: 2**20].copy(),))
    assert 49 * 2**20 < grown < 60 * 2**20 and out.nbytes == 50


# The page


def rows(*values, label="a", peer="torch"):
    return [
        performance.Row(f"{label} {i}", peer, value, common.Ratio(value, value, value, 1.0, value, 15)) for i, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    "figure, values, said",
    [
        (performance.Figure("f", 1.3, "x", performance.geometric_mean), [1.0, 4.0], "2.00"),
        (performance.Figure("f", 1.3, "x", performance.geometric_mean), [1.0, 1.5], "1.22 **missed**"),
        (performance.Figure("f", 1.0, "x"), [1.0, 1.7], "1.00"),
        (performance.Figure("f", 1.0, "x"), [0.99, 7.0], "0.99 **missed**"),
        (performance.Figure("f", 1.0, "x"), [0.996, 7.0], "0.99 **missed**"),  # not rounded up to what was wanted
        (performance.Figure("f", 80, "%"), [79.9, 95.0], "79 % **missed**"),
        (performance.Figure("f", 80, "%"), [81.2, 95.0], "81 %"),
        (performance.Figure("f", 16, "MB", max, at_most=True), [3.0, 15.94], "16.0 MB"),
        (performance.Figure("f", 16, "MB", max, at_most=True), [3.0, 16.0], "16.0 MB **missed**"),
        (performance.Figure("f", 1.0, "x", which=lambda row: "a 1" in row.label), [0.5, 1.25], "1.25"),
        (performance.Figure("f", 1.0, "x"), [], "not measured"),
    ],
)
def test_a_figure_says_what_was_got_and_whether_that_is_missed(figure, values, said):
    assert performance.verdict(figure, rows(*values)) == said


def test_a_page_of_sections(clock, here, monkeypatch, tmp_path):
    """Faster, slower, wrong, and left out, from the comparison to the page."""
    quick = fake_task(clock, 1e6, mini_tfm=0.001, numpy={"way": 0.0015})
    slow = fake_task(clock, 1e6, mini_tfm=0.004, numpy=0.002)
    wrong = fake_task(clock, 1e6, wrong=0.5, mini_tfm=0.001, numpy=0.1)
    absent = fake_task(clock, 1e6, mini_tfm=0.001)
    absent.ways = lambda self, size, name: common.needs(None, "kernel")
    sections = [
        performance.Section(
            "one", "First", "About it.", performance.against(quick, "numpy"), [performance.Figure("Figure one", 1.3, "x")], ("size", "way")
        ),
        performance.Section("two", "Second", "", performance.against(slow, "numpy"), [performance.Figure("Figure two", 0.7, "x")]),
        performance.Section("three", "Third", "", performance.against(wrong, "numpy"), [performance.Figure("Figure three", 1, "x")]),
        performance.Section("four", "Fourth", "", performance.against(absent, "numpy"), [performance.Figure("Figure four", 1, "x")]),
    ]
    monkeypatch.setattr(performance, "sections", lambda: sections)
    monkeypatch.setattr(performance, "libraries", lambda threads: ["numpy 2"])
    monkeypatch.setattr(performance, "limits", lambda threads, tries: {n: (99.5, [(2**20, 40.0, "sdot", 30.0, "copy")]) for n in threads})
    performance.main(["--threads", "1,2", "--out", str(tmp_path / "page.md")])
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "| Figure one | >= 1.30 | 1.50 | 1.50 |" in page
    assert "| Figure two | >= 0.70 | 0.50 **missed** | 0.50 **missed** |" in page
    assert "| Figure three | >= 1.00 | 0.00 **missed** | 0.00 **missed** |" in page
    assert "| Figure four | >= 1.00 | not measured | not measured |" in page
    assert "| 1 | numpy | 1 ms, 1 GFLOP/s | 1.5 ms, 0.667 GFLOP/s | 1.50 | 1.50 to 1.50 | 0 | 0 | 0 | way |" in page
    assert "**wrong**" in page and "5e-1" in page
    assert "**2 threads**: sgemm 99.5 GFLOP/s" in page and "| 1 MiB | 40.0 (sdot) | 30.0 (copy) |" in page
    assert "15 pairs each" in page and "About it." in page
    performance.main(["--only", "two", "--quick", "--threads", "1", "--out", str(tmp_path / "page.md")])
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "Figure two" in page and "Figure one" not in page and "3 pairs each" in page


def test_pairs_are_divided_among_rounds_with_new_processes(clock, monkeypatch):
    """Of three processes one is slow, which the median of all pairs does not show."""
    started = []

    def start(n_threads):
        started.append(n_threads)
        return InThisProcess(n_threads)

    monkeypatch.setattr(common.Workers, "start", staticmethod(start))
    task = fake_task(clock, 1e6, mini_tfm=0.001, numpy=0.001)

    def ways(self, size, name):
        take = clock.taking(0.02 if len(started) == 4 and name == "mini_tfm" else 0.001)
        return {"": lambda: (take(), np.array([1.0]))[1]}

    task.ways = ways
    case = performance.Case("c", common.Side(task, 1, "mini_tfm"), common.Side(task, 1, "numpy"))
    (row,) = performance.measure([performance.Section("s", "S", "", [case], [])], [1], 15, rounds=3)["s", 1].rows
    assert started == [1] * 6
    assert len(row.ratio.times) == row.ratio.pairs == 15
    assert row.ratio.median == pytest.approx(1.0) and min(theirs / ours for ours, theirs in row.ratio.times) == pytest.approx(0.05)


def test_an_unknown_section_is_refused(capsys):
    with pytest.raises(SystemExit):
        performance.main(["--only", "attention,speed"])
    assert "got speed" in capsys.readouterr().err


def test_every_figure_is_of_something_that_is_measured():
    sections = performance.sections()
    assert len({section.name for section in sections}) == len(sections)
    for section in sections:
        if section.measure:
            continue
        made = [performance.Row(case.label, performance.peer_of(case), 1.0) for case in section.cases]
        assert made and all(figure.got(made) == pytest.approx(1.0) for figure in section.figures), section.name
    by_name = {section.name: section for section in sections}
    assert len(by_name["attention"].cases) >= 28
    peers = {case.theirs.library for section in sections for case in section.cases}
    assert peers == {"torch", "numpy", "faiss", "mini_tfm"}
    for case in itertools.chain.from_iterable(section.cases for section in sections):
        assert (
            case.ours.library == "mini_tfm" and case.ours.task().work(case.ours.size) > 0 and case.theirs.task().work(case.theirs.size) > 0
        )


def test_a_process_whose_memory_is_measured_may_not_fail_unseen(monkeypatch):
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read from /proc")
    monkeypatch.setattr(MODULES["segments"], "PROGRAM", "raise SystemExit('broken on purpose')")
    with pytest.raises(RuntimeError, match="broken on purpose") as raised:
        MODULES["segments"].peak("recurrent:tokens=8", 2, True)
    assert raised.type is RuntimeError  # NotImplementedError, at which a benchmark is left out, is one of its kinds


def test_pages_name_the_packages_that_they_lack(monkeypatch, tmp_path):
    pages = import_from(FOLDER / "pages.py", "pages")
    monkeypatch.setattr(pages.importlib.util, "find_spec", lambda name: None if name in ("scipy", "asv") else name)
    with pytest.raises(SystemExit, match=r"scipy is not installed: .*pip install scipy asv$"):
        pages.main(["--quick", "--out", str(tmp_path / "pages")])
    assert not (tmp_path / "pages").exists()


def test_pages_of_results_open_without_a_network(monkeypatch, tmp_path):
    pages = import_from(FOLDER / "pages.py", "pages")
    columns = ["result", "params", "version"]
    for number, figure in enumerate((0.5, 0.25)):
        told = {
            "commit_hash": f"{number}" * 40,
            "date": 1_700_000_000_000 + number,
            "result_columns": columns,
            "results": {"a.B.time_c": [[figure, None], [["'<x>'", "2"]], "v"], "a.B.track_d": [[7], [], "v"], "e.track_f": [None, [], "v"]},
        }
        (tmp_path / "host").mkdir(exist_ok=True)
        (tmp_path / "host" / f"{number}.json").write_text(json.dumps(told))
    (tmp_path / "benchmarks.json").write_text(json.dumps({"a.B.time_c": {"unit": "seconds"}, "version": 2}))
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    out = tmp_path / "pages"
    pages.main(["--only", "by-commit", "--measured", "--out", str(out)])
    text = (out / "by-commit.html").read_text()
    assert re.findall(r"<td[^>]*>([^<]*)</td>", text)[1:4] == ["seconds", "0.5", "0.25"] and "&lt;x&gt;" in text and "<x>" not in text
    for page in out.glob("*.html"):
        assert not re.search(r"https?://|src=|url\(|<script", page.read_text()), page.name
    assert 'href="by-commit.html"' in (out / "index.html").read_text()


def test_the_quick_suite_names_benchmarks_that_there_are():
    pages = import_from(FOLDER / "pages.py", "pages")
    names = [f"{module}.{name}." for module, found in MODULES.items() for name in vars(found)]
    for part in re.findall(r"[a-z]+\\.\w*", pages.QUICK):
        assert [name for name in names if name.startswith(part.replace("\\", ""))], part


def test_a_memory_is_compared_with_none_on_ones_own_text(capsys, monkeypatch, tmp_path):
    script = import_from(FOLDER / "own_text.py", "own_text")
    texts = [tmp_path / f"{number}.txt" for number in range(4)]
    for path in texts:
        path.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    called, run = [], script.subprocess.run
    monkeypatch.setattr(script.subprocess, "run", lambda words, **more: called.append(words) or run(words, **more))
    words = ["--text", "foxes", *texts, "--steps", 3, "--seeds", 1, "--kinds", "decoder-only", "--memory", "window:size=32"]
    monkeypatch.setattr(sys, "argv", ["own_text.py", *map(str, words), "--work", str(tmp_path / "work")])
    script.main()
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 4 and {line.count("|") for line in table} == {table[0].count("|")}
    assert f"| foxes | decoder-only | `{script.UNTRAINED}` | " in table[2] and "| foxes | decoder-only | `window:size=32` | " in table[3]
    trained = [words for words in called if "train" in words]
    assert len(called) == 4 and [words[words.index("--memory") + 1] for words in trained] == ["none", "window:size=32"]
    assert not {word for words in trained for word in words if "held-out" in word}
    script.main()  # what is known is not measured again
    assert capsys.readouterr().out.splitlines() == table and len(called) == 4


def test_there_are_three_texts_without_a_file(monkeypatch):
    """Enough to train on, and the docstrings are words, in the order of their module."""
    script = import_from(FOLDER / "own_text.py", "own_text")
    found = []
    monkeypatch.setattr(script, "runs", lambda texts, given: found.append(texts) or {})
    monkeypatch.setattr(sys, "argv", ["own_text.py"])
    script.main()
    assert list(found[0]) == ["documentation", "source code", "docstrings"]
    assert all(len(texts) > 50 and sum(map(len, texts.values())) > 400_000 for texts in found[0].values())
    heap = found[0]["docstrings"]["heapq.py"]
    assert heap.startswith("Heap queue algorithm") and heap.index("Push item onto heap") < heap.index("Merge multiple sorted inputs")


def test_long_inputs_are_asked_about(capsys, monkeypatch):
    script = import_from(FOLDER / "long_input.py", "long_input")
    options = "--seeds 1 --steps 2 --more-steps 2 --inputs 2 --lengths 32 70"
    monkeypatch.setattr(sys, "argv", ["long_input.py", *options.split()])
    script.main()
    table = capsys.readouterr().out.splitlines()[2:]
    assert table[0].count("|") == table[2].count("|") == 2 + len(script.WAYS) and len(table) == 4
    text, answer = script.puzzle(np.random.default_rng(0), 70)
    assert text.partition("@")[2][: script.ANSWER] == answer and len(answer) == script.ANSWER


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_kept_keys_have_the_error_of_their_bits(dtype):
    task, size = attention.KeptKeys(), TINY["KeptKeys"]
    error = task.error(task.first(size, dtype), task.make(size))
    low, high = {"float32": (0, 1e-6), "bfloat16": (1e-4, 1e-2), "int8": (1e-4, 2e-2)}[dtype]
    assert low <= error < high


def test_caches_are_compared(capsys, tiny, same_threads, monkeypatch):
    script = import_from(FOLDER / "caches.py", "caches")
    script.main(["--model", "characters", "--tokens", "20", "--keys", "9", "--pairs", "1"])
    table = capsys.readouterr().out.splitlines()
    assert len({row.count("|") for row in table}) == 1 and [row.split("|")[1].strip() for row in table[2:]] == accuracy.CACHES
    assert table[2].split("|")[3:5] == [" 100.0 % ", " +0.000 % "] and "1.00 times as fast" in table[2]
    assert len({accuracy.compared_caches("characters", 20, dtype)["more"] for dtype in accuracy.CACHES}) == 3


def test_weights_are_rounded_to_sixteen_values_of_a_group(capsys, tiny, same_threads):
    script = import_from(FOLDER / "four_bits.py", "four_bits")
    groups = np.random.default_rng(0).standard_normal((5, 3, script.GROUP))
    groups[0, 0] = 0
    errors = {}
    for words, to in script.FORMATS.items():
        rounded = to(groups)
        assert max(len(np.unique(group)) for group in rounded.reshape(-1, script.GROUP)) <= 16
        assert not rounded[0, 0].any()
        errors[words] = np.sum((rounded - groups) ** 2)
    assert errors["the best scale"] <= errors["one scale"] and errors["scale and least"] < errors["one scale"]
    again = script.scale_and_least(script.scale_and_least(groups))
    np.testing.assert_allclose(again, script.scale_and_least(groups), atol=1e-12)
    script.main(["--model", "characters"])
    table = [[cell.strip() for cell in row.split("|")[1:-1]] for row in capsys.readouterr().out.splitlines()]
    assert len(table) == 2 + 1 + 2 * len(script.FORMATS) and {len(row) for row in table} == {4}
    assert all(0 < float(row[2].removesuffix(" %")) <= 100 for row in table[2:])


@pytest.fixture
def same_threads():
    """As many threads as before, after a script that sets them."""
    threads = mt.get_num_threads()
    yield
    mt.set_num_threads(threads)


def test_pairs_are_asked_about_as_they_were_said(same_threads):
    """The answer is the value that stands with the key, in one of the given number of pairs."""
    script = import_from(FOLDER / "associative.py", "associative")
    n_pairs = np.array([1, 2, 3, 4] * 8)
    said, key, value = script.streams(np.random.default_rng(0), 32, n_pairs)
    pairs = (said[:, 0] >= script.PAIR) & (said[:, 0] < script.NOISE)
    assert (pairs.sum(axis=1) == n_pairs).all()
    wanted = script.PAIR + (key - script.KEY) * script.N + value - script.VALUE
    assert (said[:, 0] == wanted[:, None]).any(axis=1).all()
    for kind in script.KINDS:
        shares, steps, _ = script.learned(kind, "window:size=8", script.Recipe(steps=2), 0)
        assert steps == 2 and len(shares) == 4 and all(0 <= share < 0.5 for share in shares)


def test_training_ends_when_enough_is_learned(monkeypatch, same_threads):
    script = import_from(FOLDER / "associative.py", "associative")
    seen = iter([0.5, 0.989, 0.99])
    real = script.share_right

    def share_right(*args):
        return next(seen) if script.HELD_OUT in args else real(*args)

    monkeypatch.setattr(script, "share_right", share_right)
    monkeypatch.setattr(script, "STEPS_BETWEEN", 2)
    assert script.learned("decoder-only", "none", script.Recipe(steps=20), 0)[1] == 6


def test_a_stream_is_measured_by_tenths(same_threads):
    script = import_from(FOLDER / "endless.py", "endless")
    rows, n_bytes = script.measured("window:size=8,sinks=2", 1, 2560)
    bits, times, sizes = zip(*rows, strict=True)
    assert len(rows) == 10 and n_bytes > 0 and min(times) > 0 and min(sizes) > 1
    np.testing.assert_allclose(bits[1:], bits[-1], rtol=0.05)


# The page of whole models


def sided(clock, results=None, **durations):
    """A task of sides: {"mini_tfm_float32": seconds or an error}; each result is 1.0 unless `results` has another."""

    class Sided(inference._Sided):
        params = ([1], [name.replace("_f", " f").replace("_i", " i") for name in durations])

        def work(self, size):
            return 12

        def ways(self, size, side):
            taken = durations[side.replace(" ", "_")]
            if isinstance(taken, Exception):
                raise taken
            call, answer = clock.taking(taken), np.array([(results or {}).get(side, 1.0)])
            return {"": lambda: (call(), answer)[1]}

    return Sided


@pytest.fixture
def no_files(monkeypatch):
    monkeypatch.setattr(inference, "make_files", lambda *_: None)


def page_case(task, wanted, section="t5", label="a"):
    pairs = tuple((f"mini_tfm {side.split()[1]}", side) for side in task.params[1] if not side.startswith("mini_tfm"))
    return inference_page.Case(section, label, task, 1, pairs, wanted)


SIDES = {"mini_tfm_float32": 0.2, "mini_tfm_int8": 0.1, "ctranslate2_float32": 0.3, "transformers_float32": 0.5, "ctranslate2_int8": 0.19}


def test_of_several_peers_the_best_counts(clock, here, no_files):
    case = page_case(sided(clock, **SIDES), {"mini_tfm float32": 1.4, "mini_tfm int8": 2.0})
    with common.Workers() as workers:
        result = inference_page.measured(case, 1, workers, "native", **inference_page.QUICK)
    assert {len(times) for times in result["times"].values()} == {3}
    ratio, peer = inference_page.best(inference_page.ratios(result, case.pairs), "mini_tfm float32")
    assert peer == "ctranslate2 float32" and ratio.median == pytest.approx(1.5)
    assert inference_page.got(case, "mini_tfm float32", result, "native") == "1.50"
    assert inference_page.got(case, "mini_tfm int8", result, "native") == "1.90 **missed**"


def test_a_peer_that_is_faster_with_one_thread_has_one(clock, here, no_files, monkeypatch):
    case, asked = page_case(sided(clock, **SIDES), {"mini_tfm float32": 1.4}), []
    get = common.Workers.get
    monkeypatch.setattr(common.Workers, "get", lambda self, role, name, n: asked.append((name, n)) or get(self, role, name, n))
    with common.Workers() as workers:
        result = inference_page.measured(case, 2, workers, "native", **inference_page.QUICK)
    assert {("mini_tfm float32", 2), ("ctranslate2 float32", 2), ("ctranslate2 float32", 1)} <= set(asked)
    assert ("mini_tfm float32", 1) not in asked
    assert not [row for row in inference_page.case_rows(case, result, "native") if "1 thread" in row[2]], "as fast is not faster"
    result["times"]["ctranslate2 float32, 1 thread"] = [0.25] * 3
    assert inference_page.got(case, "mini_tfm float32", result, "native") == "1.25 **missed**"
    assert [row[2] for row in inference_page.case_rows(case, result, "native") if "1 thread" in row[2]] == ["ctranslate2 float32, 1 thread"]


def test_a_peer_that_is_not_there_is_told(clock, here, no_files):
    task = sided(clock, **SIDES | {"ctranslate2_int8": NotImplementedError("ctranslate2 is not installed")})
    case = page_case(task, {"mini_tfm int8": 2.0})
    with common.Workers() as workers:
        result = inference_page.measured(case, 1, workers, "native", **inference_page.QUICK)
    assert result["left_out"] == {"ctranslate2 int8": "ctranslate2 is not installed"}
    assert inference_page.got(case, "mini_tfm int8", result, "native") == "-"
    assert any("left out" in line and "ctranslate2 is not installed" in line for line in inference_page.case_rows(case, result, "native"))


def test_a_peer_that_computes_another_model_is_marked():
    (case,) = [case for case in inference_page.cases() if case.section == "minilm"][:1]
    same = {"onnxruntime float32": 0.98, "sentence_transformers float32": 0.9999, "onnxruntime int8": 0.93}
    found = [inference_page.alike(case, {"same": same}, side) for side in same]
    assert found == ["0.9800 **another model**", "0.9999", "0.9300"]


def test_what_cannot_be_held_to_avx2_is_left_out():
    for case in inference_page.cases():
        peers = {pair[1] for pair in inference_page.kept(case, "avx2")}
        assert not [peer for peer in peers if "AVX512" in peer or peer.startswith(("onnxruntime", "llama_cpp"))]
        assert inference_page.kept(case, "native")[: len(case.pairs)] == list(case.pairs)


def test_the_page_of_models_keeps_what_was_measured(clock, here, no_files, monkeypatch, tmp_path):
    task = sided(clock, {"ctranslate2 int8": 2.0, "transformers float32": 3.0}, **SIDES)
    cases = [page_case(task, {"mini_tfm float32": 1.4, "mini_tfm int8": 2.0}, "encoder")]
    monkeypatch.setattr(inference_page, "cases", lambda: cases)
    monkeypatch.setattr(inference_page, "about", lambda n: {"machine": {"processor": "one"}, "libraries": ["ours 1"]})
    arguments = ["--quick", "--threads", "1", "--only", "encoder", "--json", str(tmp_path / "all.json"), "--out", str(tmp_path / "page.md")]
    inference_page.main(arguments)
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "| An encoder of long texts | a | float32 | >= 1.40 | 1.50 |" in page
    assert "| An encoder of long texts | a | int8 | >= 2.00 | 1.90 **missed** |" in page
    assert "| a | float32 | ctranslate2 float32 | 60.0 | 40.0 | 1.50 | 1.50 to 1.50 (3) | 100 % |" in page
    assert "| a | float32 | transformers float32 | 60.0 | 24.0 | 2.50 | 2.50 to 2.50 (3) | 0 % |" in page
    assert "| processor | one |" in page and "- ours 1" in page

    monkeypatch.setattr(inference_page, "measured", lambda *_, **__: pytest.fail("it is in the JSON"))
    inference_page.main(arguments)
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == page
    with pytest.raises(pytest.fail.Exception, match="it is in the JSON"):
        inference_page.main([*arguments, "--again"])


def test_every_figure_of_the_page_of_models_has_a_peer():
    cases = list(inference_page.cases())
    assert len({(case.section, case.label) for case in cases}) == len(cases)
    assert {case.section for case in cases} == set(inference_page.SECTIONS)
    for case in cases:
        peers = {ours: {peer for side, peer in case.pairs if side == ours and not peer.startswith("mini_tfm")} for ours in case.wanted}
        assert case.wanted and all(peers.values()), case.label
        assert case.task().work(case.size) > 0


def test_an_unknown_section_of_models_is_refused(capsys):
    with pytest.raises(SystemExit):
        inference_page.main(["--only", "t5,speed"])
    assert "got speed" in capsys.readouterr().err


def test_a_step_reads_the_decoders_weights_and_the_caches():
    def of(source, dtype):
        return inference_page.step_bytes(("T5-small", 1, source, 1), dtype)

    assert (of(32, "float32") - of(32, "int8")) / 3 == 6 * 512 * (6 * 512 + 2 * 2048) + 32128 * 512  # cross keys and values are made once
    assert of(512, "int8") - of(32, "int8") == 6 * 2 * 480 * 512 * 4
    reading = {"1": 1.0, str(2**40): 40.0}
    share = inference_page.share_of_floor(("T5-small", 1, 32, 1), "int8", 64 * 2e-3, reading)
    assert share == pytest.approx(100 * of(32, "int8") / 40e9 / 2e-3)


def test_the_surprise_of_a_token_is_its_negative_log_probability():
    scores = np.random.default_rng(0).standard_normal((2, 3, 5)).astype(np.float32)
    target = np.array([[0, 1, 2], [4, 3, 2]])
    probabilities = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(
        accuracy.surprise(scores, target), -np.log(np.take_along_axis(probabilities, target[..., None], -1)[..., 0]), rtol=1e-5
    )


def test_a_file_that_another_process_made_first_stays(tmp_path):
    path = tmp_path / "made"
    with files.made(path) as part:
        part.mkdir()
        path.mkdir()
        (path / "theirs").touch()
    assert [each.name for each in tmp_path.iterdir()] == ["made"] and (path / "theirs").exists()


@pytest.mark.filterwarnings("ignore")
def test_an_encoder_that_is_exported_reads_its_ids_and_its_mask(tmp_path, monkeypatch):
    for peer in ("onnxscript", "onnxruntime", "transformers"):
        pytest.importorskip(peer)
    monkeypatch.setattr(files, "FOLDER", tmp_path)
    session, model = inference.onnx_session("tiny BERT", "float32"), inference.torch_model("AutoModel", "tiny BERT")
    ids, mask = np.random.default_rng(0).integers(3, 64, (3, 9)), (np.arange(9) < np.array([[9], [4], [7]])).astype(np.int64)
    (found,) = session.run(None, {"input_ids": ids, "attention_mask": mask})
    torch = common.library("torch")
    expected = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).last_hidden_state.detach().numpy()
    np.testing.assert_allclose(found[mask > 0], expected[mask > 0], rtol=0, atol=1e-5)


def test_least_cosine():
    assert inference.least_cosine(np.array([[1.0, 0], [0, 2]]), np.array([[3.0, 0], [1, 1]])) == pytest.approx(0.5**0.5)
