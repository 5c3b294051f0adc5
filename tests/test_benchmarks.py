"""Every benchmark runs, at its smallest size; what asv would do with it is done here without asv."""

import importlib.util
import inspect
import itertools
import json
import math
import re
import sys
import textwrap
from pathlib import Path

import pytest
from helpers import in_a_process

import mini_tfm as mt

FOLDER = Path(__file__).parent.parent / "benchmarks"
HAS_TORCH = importlib.util.find_spec("torch") is not None
KINDS = re.compile(r"(time|timeraw|track|peakmem)_")


def import_benchmarks():
    """The package benchmarks/benchmarks, whatever else that name may find, and its modules."""
    package = FOLDER / "benchmarks"
    spec = importlib.util.spec_from_file_location("benchmarks", package / "__init__.py", submodule_search_locations=[str(package)])
    sys.modules["benchmarks"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {path.stem: importlib.import_module(f"benchmarks.{path.stem}") for path in package.glob("[!_]*.py")}


MODULES = import_benchmarks()


def params_of(cls):
    """A list of values for each parameter; asv takes a flat list, too, where there is one parameter."""
    params = list(getattr(cls, "params", []))
    return params if params and isinstance(params[0], list | tuple) and not isinstance(params, str) else [params] if params else []


def smallest(cls, method):
    """The first value of each parameter; every library, as each is code of its own, and once every memory."""
    if cls.__name__.endswith("AgainstTorch") and not HAS_TORCH:
        return []
    names = getattr(cls, "param_names", [])
    every = {"library"} | ({"memory"} if method.startswith("track_error") else set())
    chosen = [values if name in every else values[:1] for name, values in zip(names, params_of(cls), strict=True)]
    return [each for each in itertools.product(*chosen) if HAS_TORCH or "torch" not in each]


CASES = [
    pytest.param(cls, method, chosen, id="-".join([f"{name}.{cls.__name__}.{method}", *map(str, chosen)]))
    for name, module in sorted(MODULES.items())
    for cls in vars(module).values()
    if inspect.isclass(cls) and cls.__module__ == module.__name__ and not cls.__name__.startswith("_")
    for method in sorted(dir(cls))
    if KINDS.match(method)
    for chosen in smallest(cls, method)
]


@pytest.mark.parametrize("cls, method, chosen", CASES)
def test_it_runs(cls, method, chosen):
    benchmark = cls()
    if hasattr(benchmark, "setup"):
        benchmark.setup(*chosen)
    try:
        result = getattr(benchmark, method)(*chosen)
    finally:
        if hasattr(benchmark, "teardown"):
            benchmark.teardown(*chosen)
    kind = KINDS.match(method)[1]
    if kind == "timeraw":
        in_a_process(textwrap.dedent(result))
    elif kind == "track":
        assert isinstance(result, int | float) and math.isfinite(result) and result >= 0
        assert getattr(getattr(benchmark, method), "unit", None), "a number without its unit says nothing"
        if method.startswith("track_error"):
            assert result < 1e-3, "as far from float64 as this is wrong, not fast"
    else:
        assert result is None, "asv would drop what this returns"


def test_without_torch_what_needs_it_is_left_out(monkeypatch):
    """asv takes NotImplementedError in setup for a benchmark that does not apply."""
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(NotImplementedError, match="torch is not installed"):
        MODULES["kernels"].Softmax().setup((1, 1), "torch")
    with pytest.raises(NotImplementedError, match="torch is not installed"):
        MODULES["attention"].ForwardAgainstTorch().setup("1 x 8 x 128 x 64")
    with pytest.raises(NotImplementedError, match="torch is not installed"):
        MODULES["model"].TrainingStepAgainstTorch().setup("1.0 M")


def test_beside_each_time_stands_an_error():
    elsewhere = {"Asking": "Reading"}  # whose error is measured by another
    for module in ("kernels", "attention", "model", "memory"):
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
