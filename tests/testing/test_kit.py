"""The kit passes honest strategies, and each broken one is caught by the check that is there for it."""

import dataclasses
import functools
import importlib
import itertools
import os
import threading
import time

import numpy as np
import pytest

import mini_tfm as mt
from mini_tfm.autodiff import value_of
from mini_tfm.errors import InvalidType, InvalidValue, PluginError
from mini_tfm.memory import Evicted, Memory, MemorySpec, Param, RowMemory, Rows, SideOutput, View, bank_key
from mini_tfm.testing import CHECKS, CheckFailed, check_memory
from mini_tfm.testing.trial import Trial

HONEST = [
    "window:size=7,sinks=2",
    "recurrent:tokens=2",
    "store:top_k=3,merge=gate",
]
OTHER_HONEST = [
    "window:size=7,site=all",
    "window:size=7,site=encoder",
    "recurrent:tokens=2,site=decoder,residual=true",
    "store:top_k=3",
    "store:top_k=3,layer=-1",
    "store:top_k=3,merge=replace",
    "store:top_k=3,site=encoder",
    "store:top_k=3,site=decoder",
    "window:size=4+store:top_k=3",
    "recurrent:tokens=2+window:size=4",
]


@pytest.mark.usefixtures("short_streams")
@pytest.mark.parametrize("text", HONEST + [pytest.param(text, marks=pytest.mark.long) for text in OTHER_HONEST])
def test_built_in_strategies_pass(text):
    check_memory(text)


@pytest.fixture
def only_decoders(monkeypatch):
    """One kind of model, where that is enough."""
    monkeypatch.setattr("mini_tfm.testing.checks.kinds_for", lambda memory: ["decoder-only"])


@pytest.mark.usefixtures("short_streams")
def test_a_store_on_disk_passes(tmp_path, only_decoders):
    numbers = itertools.count()
    check_memory(lambda: mt.memory("store", path=str(tmp_path / f"{next(numbers)}.mdb"), top_k=3))


# Broken strategies: each is a window of the last 8 rows of the decoder, but for one thing.


class Last(RowMemory):
    def __init__(self, size=8):
        super().__init__(size=size, site="decoder")
        self.spec = MemorySpec(sites=frozenset({"decoder"}), capacity=size)

    def keep(self, scores, positions):
        return positions


def changed(view, **changes):
    return None if view is None else View(**{**view.__dict__, **changes})


class Raises(Last):
    def view(self, state, site, layer, segment):
        raise KeyError("lost")


class GivesNaN(Last):
    def view(self, state, site, layer, segment):
        view = super().view(state, site, layer, segment)
        return changed(view, bank=("hidden", view.bank[1] * np.nan)) if view else None


class AlwaysSingle(Last):
    """float32 rows in any model pass the float32 trial and no other."""

    def start(self, batch, dims):
        return {name: x.astype(np.float64) if x.dtype.kind == "f" else x for name, x in super().start(batch, dims).items()}


class DoesNothing(Last):
    def view(self, state, site, layer, segment):
        return None


class Random(Last):
    def view(self, state, site, layer, segment):
        view = super().view(state, site, layer, segment)
        return changed(view, valid=view.valid & (np.random.default_rng().random(view.valid.shape) < 0.5)) if view else None


class ForgetsAnOption(Last):
    made = 0

    def __init__(self, *, size=8):
        type(self).made += 1
        super().__init__(size=size if type(self).made % 2 else 1)


class ZeroRowsAtTheStart(Last):
    def start(self, batch, dims):
        state = super().start(batch, dims)
        grow = lambda x: np.zeros((batch, 1, *x.shape[2:]), x.dtype) if x.ndim > 1 else x  # noqa: E731
        return {name: np.ones((batch, 1), bool) if name.endswith("valid") else grow(x) for name, x in state.items()}


class TakesPadding(Last):
    def write(self, state, site, layer, new):
        return super().write(state, site, layer, Evicted(site, layer, new.hidden, np.ones_like(new.valid), new.positions))


class SeesTheFuture(Last):
    def __init__(self):
        super().__init__()
        self.spec = MemorySpec(sites=frozenset({"decoder"}), needs=frozenset({"query"}))

    def read(self, state, site, layer, query):
        return SideOutput(
            np.broadcast_to(query.heads.mean(axis=2, keepdims=True), query.heads.shape)
            if state["decoder.0.valid"].size
            else query.heads * 0
        )


class LooksAtTheSegment(Last):
    """Shows one row less where a segment has more than one token: another memory when generating."""

    def __init__(self):
        super().__init__()
        self.spec = MemorySpec(sites=frozenset({"decoder"}), needs=frozenset({"query"}))

    def view(self, state, site, layer, segment):
        return None

    def read(self, state, site, layer, query):
        view = super().view(state, site, layer, None)
        return changed(view, valid=view.valid & (np.arange(view.valid.shape[1]) > query.heads.shape[2])) if view else None


class OneBankForAll(Last):
    def view(self, state, site, layer, segment):
        view = super().view(state, site, layer, segment)
        return changed(view, bank=("hidden", np.broadcast_to(view.bank[1][:1], view.bank[1].shape))) if view else None


class CountsSegments(Last):
    def view(self, state, site, layer, segment):
        view = super().view(state, site, layer, segment)
        return changed(view, positions=view.positions - segment.number) if view else None


class KeepsBetweenStreams(Last):
    """Its first state is what was last written: a reset brings it back."""

    kept = None

    def start(self, batch, dims):
        state = super().start(batch, dims)
        if self.kept is not None and self.kept["decoder.0.valid"].shape[0] == batch:
            return self.kept
        return state

    def write(self, state, site, layer, new):
        super().write(state, site, layer, new)
        self.kept = dict(state)


class HoldsItself(Last):
    """Rows in the object, not in the state."""

    def __init__(self):
        super().__init__()
        self.held = {}

    def view(self, state, site, layer, segment):
        return self.held.get((layer, len(segment.length)))

    def write(self, state, site, layer, new):
        super().write(state, site, layer, new)
        self.held[layer, len(new.valid)] = super().view(state, site, layer, None)


class WritesInPlace(Last):
    def start(self, batch, dims):
        return {**super().start(batch, dims), "count": np.zeros(batch)}

    def write(self, state, site, layer, new):
        state["count"] += 1
        return super().write(state, site, layer, new)


class MoreThanItSays(Last):
    def __init__(self):
        super().__init__(8)
        self.spec = MemorySpec(sites=frozenset({"decoder"}), capacity=4)


class DropsWhatItShows(Last):
    def write(self, state, site, layer, new):
        super().write(state, site, layer, new)
        return new


class DropsInventions(Last):
    def write(self, state, site, layer, new):
        dropped = super().write(state, site, layer, new)
        return dropped and Evicted(site, layer, dropped.hidden + 1, dropped.valid, dropped.positions)


class RaisesWhenStacked(Last):
    def absorb(self, state, evicted):
        raise RuntimeError("alone only")


class LeaksGradient(Last):
    """Says that no gradient flows, and carries a Var along."""

    def start(self, batch, dims):
        return {**super().start(batch, dims), "sum": np.zeros((batch, 1), dims.dtype)}

    def parameters(self, dims):
        return {"start": Param((dims.d_model,))}

    def begin(self, state, segment):
        if state["sum"].shape[1] == 1:
            return Rows(np.broadcast_to(state.params["start"], (len(segment.length), 1, state.dims.d_model)))
        return Rows(state["sum"][:, None])

    def end(self, state, rows):
        state["sum"] = rows[:, 0]


class StopsGradient(Last):
    def __init__(self):
        super().__init__()
        self.spec = MemorySpec(sites=frozenset({"decoder"}), capacity=8, gradient="rows")

    def write(self, state, site, layer, new):
        return super().write(state, site, layer, Evicted(site, layer, value_of(new.hidden), new.valid, new.positions))


class ForgetsToDifferentiate(Last):
    def __init__(self):
        super().__init__()
        self.spec = MemorySpec(sites=frozenset({"decoder"}), needs=frozenset({"query"}))

    def read(self, state, site, layer, query):
        return SideOutput(value_of(query.heads) ** 2)


class ParameterWithoutUse(Last):
    def parameters(self, dims):
        return {"gate": Param((dims.n_heads,))}


class StuckParameter(Last):
    def parameters(self, dims):
        return {"shift": Param((dims.d_model,), init=0.1, lr_factor=0.0)}

    def view(self, state, site, layer, segment):
        view = super().view(state, site, layer, segment)
        return changed(view, bank=("hidden", view.bank[1] + state.params["shift"])) if view else None


class CountsItsCalls(Last):
    """Computed again, a segment leaves another state than before."""

    calls = 0

    def write(self, state, site, layer, new):
        self.calls += 1
        return super().write(state, site, layer, Evicted(site, layer, new.hidden * self.calls, new.valid, new.positions))


class ShowsByTurns(Last):
    """Computed again, the last layer sees other rows than before, which no state tells."""

    def __init__(self):
        super().__init__()
        self.spec = MemorySpec(sites=frozenset({"decoder"}), layers=(-1,), capacity=8)
        self.turns = 0

    def view(self, state, site, layer, segment):
        self.turns += 1
        view = super().view(state, site, layer, segment)
        return changed(view, bank=("hidden", view.bank[1] * self.turns)) if view else None


class Drifts(Last):
    """Depends on how many were made before it: what is resumed is another one."""

    made = 0

    def __init__(self):
        type(self).made += 1
        super().__init__(2 + type(self).made % 7)


class DeadAboveTheFirst(Last):
    def view(self, state, site, layer, segment):
        return super().view(state, site, layer, segment) if layer == 0 else None


class DeadAtCross(Last):
    """Says that it works at cross, too."""

    def __init__(self):
        RowMemory.__init__(self, size=8, site="all")
        self.spec = MemorySpec(capacity=8)

    def view(self, state, site, layer, segment):
        return super().view(state, site, layer, segment) if site != "cross" else None


class ShapedByHeads(Last):
    """Takes as many heads of keys as there are of queries."""

    def start(self, batch, dims):
        return {**super().start(batch, dims), "sum": np.zeros((batch, dims.n_heads, dims.d_head), dims.dtype)}

    def write(self, state, site, layer, new):
        keys, _ = new.project(new.hidden)
        state["sum"] = state["sum"] + value_of(keys).sum(axis=2)
        return super().write(state, site, layer, new)


class AsksByEights(Last):
    """Looks for rows with the mean of eight queries, some of which come later."""

    def __init__(self):
        super().__init__()
        self.spec = MemorySpec(sites=frozenset({"decoder"}), needs=frozenset({"query"}), capacity=8)

    def view(self, state, site, layer, segment):
        return None

    def read(self, state, site, layer, query):
        view = Last.view(self, state, site, layer, None)
        if view is None:
            return None
        asked = query.hidden().copy()
        for first in range(0, asked.shape[2] - 7, 8):
            asked[:, :, first : first + 8] = asked[:, :, first : first + 8].mean(axis=2, keepdims=True)
        scores = np.einsum("bhtd,bmd->bhtm", asked, view.bank[1]) * 3
        return changed(view, bias=scores)


class NaNAfterSixty(Last):
    def start(self, batch, dims):
        return {**super().start(batch, dims), "read": np.zeros(batch, np.int64)}

    def view(self, state, site, layer, segment):
        view = super().view(state, site, layer, segment)
        far = segment.start.max() > 300
        return changed(view, bias=np.full((1, 1, 1, 1), 1e300 if far else 0.0, state.dims.dtype)) if view else None


class SaysNothing(Last):
    """Shows rows that depend on where they stood alone: nothing of what was read comes back, before and after training."""

    def view(self, state, site, layer, segment):
        view = super().view(state, site, layer, segment)
        if view is None:
            return None
        rows = np.cos(view.positions[..., None] * np.arange(1, state.dims.d_model + 1)).astype(state.dims.dtype)
        return changed(view, bank=("hidden", rows))


class RarelyFlips(Last):
    """One time in a hundred it shows no row."""

    def view(self, state, site, layer, segment):
        return super().view(state, site, layer, segment) if np.random.default_rng().random() < 0.99 else None


class DropsWhatItIsOffered(Last):
    def absorb(self, state, evicted):
        return None


class KeepsAndDrops(Last):
    """Of the rows that it returns, one is still there."""

    def write(self, state, site, layer, new):
        held = {name: value for name, value in state.items() if name.startswith(f"{site}.{layer}.")}
        dropped = super().write(state, site, layer, new)
        if dropped is not None and held:
            state.update({name: np.concatenate([state[name][:, 1:], state[name][:, :1]], axis=1) for name in held})
            first = {name: state[f"{site}.{layer}.{name}"][:, :1] for name in ("hidden", "valid", "positions")}
            return Evicted(site, layer, **{name: np.concatenate([getattr(dropped, name), one], axis=1) for name, one in first.items()})
        return dropped


class DrainNeverThere(Last):
    def drain(self, state):
        raise RuntimeError("not yet")


class FlushRaises(Last):
    def flush(self, state):
        raise RuntimeError("not yet")


class DocumentsAreText(Last):
    def documents(self):
        return "notes, letters"


class ResetRaises(Last):
    def reset(self, document):
        raise KeyError(document)


class RemembersATrainedMean(Last):
    """An average of rows seen in training, held in the object, is taken from those it shows in use."""

    def __init__(self):
        super().__init__()
        self.mean = 0.0

    def write(self, state, site, layer, new):
        if state.dims.training:
            self.mean = 0.9 * self.mean + 0.1 * float(value_of(new.hidden).mean())
        return super().write(state, site, layer, new)

    def view(self, state, site, layer, segment):
        view = super().view(state, site, layer, segment)
        shift = 0.0 if state.dims.training else self.mean
        return changed(view, bank=("hidden", view.bank[1] - np.asarray(shift, view.bank[1].dtype))) if view else None


class HoldsTapes(Last):
    def __init__(self):
        super().__init__()
        self.tapes = []
        self.spec = MemorySpec(sites=frozenset({"decoder"}), capacity=8, gradient="rows")

    def write(self, state, site, layer, new):
        self.tapes.append(new.hidden)
        return super().write(state, site, layer, new)


class ForgetsAThirdOfASmallGradient(Last):
    """A parameter that counts for little has a gradient that is a third too small."""

    def parameters(self, dims):
        return {"shift": Param((dims.d_model,), init=0.1)}

    def view(self, state, site, layer, segment):
        view = super().view(state, site, layer, segment)
        shift = state.params["shift"]
        partly = shift * (2 / 3) + value_of(shift) * (1 / 3)
        return changed(view, bank=("hidden", view.bank[1] + partly * 1e-5)) if view else None


class PullsRowsTogether(Last):
    """Adds to the loss: its rows are to be alike, once moved by a trained vector."""

    def __init__(self):
        super().__init__()
        self.spec = MemorySpec(sites=frozenset({"decoder"}), capacity=8, gradient="rows")

    def parameters(self, dims):
        return {"shift": Param((dims.d_model,), init=0.1)}

    def view(self, state, site, layer, segment):
        view = super().view(state, site, layer, segment)
        return changed(view, bank=("hidden", view.bank[1] + state.params["shift"])) if view else None

    def loss(self, state):
        shifted = state["decoder.0.hidden"] * state["decoder.0.valid"][..., None] + state.params["shift"]
        return np.sum(shifted * shifted, axis=(1, 2))


class PullsWrongly(PullsRowsTogether):
    def loss(self, state):
        added = super().loss(state)
        return None if added is None else added * 1.01 - value_of(added) * 0.01


class InitialValuesOfItsOwn(Last):
    """Drawn anew in every process."""

    def parameters(self, dims):
        seed = hash("shift") % 1000
        return {"shift": Param((dims.d_model,), np.random.default_rng(seed).standard_normal(dims.d_model))}

    def view(self, state, site, layer, segment):
        view = super().view(state, site, layer, segment)
        return changed(view, bank=("hidden", view.bank[1] + state.params["shift"])) if view else None


class DrawsInitialValues(InitialValuesOfItsOwn):
    def parameters(self, dims):
        return {"shift": Param((dims.d_model,), np.random.default_rng().standard_normal(dims.d_model))}


class EmptiesItsArguments(Last):
    def write(self, state, site, layer, new):
        dropped = super().write(state, site, layer, dataclasses.replace(new, hidden=new.hidden.copy()))
        value_of(new.hidden)[...] = 0
        return dropped


class ClearsHidden(Last):
    def logits(self, state, hidden, log_probs):
        hidden[...] = 0


class AddsToTheFirstAlone(Last):
    """Takes part at every layer, and has a say at one."""

    def enter(self, state, site, layer, inputs):
        return inputs * (0.1 if layer == 0 else 0.0)


class ClearsInputs(Last):
    def enter(self, state, site, layer, inputs):
        inputs[:, :1] = 0


class SeedsNumPy(Last):
    def keep(self, scores, positions):
        np.random.seed(1)  # noqa: NPY002
        return positions


class SetsThreads(Last):
    def keep(self, scores, positions):
        mt.set_num_threads(mt.get_num_threads() + 1)
        return positions


class Forks(Last):
    def keep(self, scores, positions):
        if (child := os.fork()) == 0:
            os._exit(0)
        os.waitpid(child, 0)
        return positions


class Sleeps(Last):
    def keep(self, scores, positions):
        time.sleep(0.001)
        return positions


class WorksInTheBackground(Last):
    def keep(self, scores, positions):
        threading.Thread(target=threading.Event().wait, args=(1,), daemon=True).start()
        return positions


MUTANTS = {
    DeadAboveTheFirst: "every_place_counts",
    ShapedByHeads: "other_models",
    AsksByEights: "other_models",
    NaNAfterSixty: "long_streams",
    RarelyFlips: "long_streams",
    SaysNothing: "helps",
    DropsWhatItIsOffered: "takes_what_is_dropped",
    KeepsAndDrops: "dropped_rows_were_held",
    DrainNeverThere: "streams_end",
    FlushRaises: "streams_end",
    DocumentsAreText: "streams_end",
    ResetRaises: "streams_end",
    RemembersATrainedMean: "training_leaves_nothing_else",
    HoldsTapes: "tapes_are_let_go",
    ForgetsAThirdOfASmallGradient: "gradients_are_right",
    PullsWrongly: "gradients_are_right",
    DrawsInitialValues: "parameters_are_the_same_everywhere",
    EmptiesItsArguments: "arguments_stay_as_they_are",
    ClearsHidden: "arguments_stay_as_they_are",
    AddsToTheFirstAlone: "every_place_counts",
    ClearsInputs: "arguments_stay_as_they_are",
    SeedsNumPy: "leaves_the_process_alone",
    SetsThreads: "leaves_the_process_alone",
    Forks: "leaves_the_process_alone",
    Sleeps: "leaves_the_process_alone",
    WorksInTheBackground: "leaves_the_process_alone",
    Raises: "runs",
    GivesNaN: "runs",
    AlwaysSingle: "keeps_the_dtype",
    DoesNothing: "has_effect",
    Random: "is_deterministic",
    ForgetsAnOption: "text_makes_it_again",
    ZeroRowsAtTheStart: "empty_is_nothing",
    TakesPadding: "padding_is_ignored",
    SeesTheFuture: "future_is_not_seen",
    LooksAtTheSegment: "generation_equals_reading",
    OneBankForAll: "rows_are_independent",
    CountsSegments: "rows_pause",
    KeepsBetweenStreams: "reset_forgets",
    HoldsItself: "rows_reorder",
    WritesInPlace: "state_is_not_written_into",
    MoreThanItSays: "capacity_holds",
    DropsWhatItShows: "dropped_rows_were_held",
    DropsInventions: "dropped_rows_were_held",
    RaisesWhenStacked: "stacks",
    LeaksGradient: "gradient_is_as_declared",
    StopsGradient: "gradient_is_as_declared",
    ForgetsToDifferentiate: "gradients_are_right",
    ParameterWithoutUse: "parameters_learn",
    StuckParameter: "parameters_learn",
    CountsItsCalls: "recomputing_gives_the_same",
    ShowsByTurns: "recomputing_gives_the_same",
    Drifts: "training_resumes",
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_each_broken_strategy_is_caught_by_its_check(mutant, only_decoders, request):
    request.addfinalizer(functools.partial(mt.set_num_threads, mt.get_num_threads()))
    mt.register_memory("mutant", mutant)
    with pytest.raises(CheckFailed, match=rf"fails 1 check:\n  {MUTANTS[mutant]} \(decoder-only\): .*expected "):
        check_memory("mutant" if mutant is ForgetsAnOption else mutant, only=[MUTANTS[mutant]])


def test_the_mutants_differ_from_an_honest_strategy(only_decoders):
    check_memory(Last)


def test_every_check_but_state_ones_has_a_mutant_of_its_own():
    assert set(CHECKS) - set(MUTANTS.values()) == {"dump_and_load_go_on", "comes_back_from_disk"}  # they have tests of their own
    assert len(CHECKS) >= 30 and len(MUTANTS) >= 40


class ShowsTheEnd(Memory):
    """Shows all queries the segment's last input token, in training or in use."""

    spec = MemorySpec(sites=frozenset({"decoder"}), needs=frozenset({"tokens"}))

    def __init__(self, training):
        self.training = training

    def view(self, state, site, layer, segment):
        if state.dims.training is not self.training:
            return None
        rows = np.cos(segment.tokens[:, -1:, None] * np.arange(1.0, state.dims.d_model + 1))
        return View(("hidden", rows), np.ones(rows.shape[:2], bool))


@pytest.mark.parametrize("kind", ["decoder-only", "encoder-decoder"])
@pytest.mark.parametrize("training", [True, False])
def test_showing_the_future_is_caught_in_every_mode(training, kind):
    with pytest.raises(CheckFailed, match="in training" if training else "in use"):
        CHECKS["future_is_not_seen"](Trial(lambda: ShowsTheEnd(training), kind))


def test_dumping_what_is_not_in_the_state_is_caught(only_decoders):
    told = r"dump_and_load_go_on .*: after dump and load: expected the same numbers, got a difference of"
    with pytest.raises(CheckFailed, match=told):
        check_memory(HoldsItself, only=["dump_and_load_go_on"])


def test_a_strategy_that_is_dead_at_cross_is_caught():
    with pytest.raises(CheckFailed, match=r"every_place_counts \(encoder-decoder\): cross, layer 0: expected other outputs"):
        check_memory(DeadAtCross, only=["every_place_counts"])


def test_initial_values_of_another_process_are_compared(tmp_path, monkeypatch, only_decoders):
    code = "from mini_tfm_plugins.window import Window\nfrom mini_tfm.memory import Param\nimport numpy as np\n"
    code += "class Own(Window):\n def parameters(self, dims):\n  at = np.random.default_rng(hash('x') % 99991)\n"
    code += "  return {'shift': Param((dims.d_model,), at.standard_normal(dims.d_model))}\n"
    (tmp_path / "own_values.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("mini_tfm.testing.habits.make_memory", lambda text: importlib.import_module("own_values").Own(size=4))
    made = importlib.import_module("own_values").Own(size=4)
    made.text = "own"
    program = "import mini_tfm.testing.habits as h, own_values; h.make_memory = lambda text: own_values.Own(size=4)"
    monkeypatch.setattr("mini_tfm.testing.habits.__name__", "sitecustomized_habits")
    (tmp_path / "sitecustomized_habits.py").write_text(f"{program}\n_print_digests = h._print_digests\n")
    with pytest.raises(CheckFailed, match="expected the same initial values in another process, got others"):
        check_memory(lambda: made, only=["parameters_are_the_same_everywhere"])


class LosesItsDocument(type(mt.memory("store"))):
    """Opens another file each time that it is made."""

    made = 0

    def __init__(self, *, path):
        type(self).made += 1
        super().__init__(path=f"{path}.{type(self).made}", top_k=3)


def test_rows_that_do_not_come_back_are_caught(tmp_path, only_decoders):
    mt.register_memory("loses", LosesItsDocument)
    with pytest.raises(CheckFailed, match=r"comes_back_from_disk .*: made again from .*: expected the documents \{'default': \d+\}"):
        check_memory(f"loses:path={tmp_path}/rows.mdb", only=["comes_back_from_disk"])


class Renumbers(Last):
    """Says that its rows stand side by side right before the segment, as StreamingLLM does (arXiv 2309.17453)."""

    def keep(self, scores, positions):
        return np.where(positions < 2, np.inf, positions)

    def view(self, state, site, layer, segment):
        view = super().view(state, site, layer, segment)
        return changed(view, positions=segment.start[:, None] - np.cumsum(view.valid[:, ::-1], 1)[:, ::-1]) if view else None


class Curves(Last):
    """Its loss bends within a step of finite differences."""

    def parameters(self, dims):
        return {"angle": Param((1,), np.ones(1))}

    def view(self, state, site, layer, segment):
        view = super().view(state, site, layer, segment)
        return changed(view, bank=("hidden", view.bank[1] * np.sin(1000 * state.params["angle"]))) if view else None


class CurvesWrongly(Curves):
    """The same, with a gradient that is a thousandth too large."""

    def view(self, state, site, layer, segment):
        view = Last.view(self, state, site, layer, segment)
        if view is None:
            return None
        angle = state.params["angle"]
        wrong = np.sin(1000 * angle) * 1.001 - np.sin(1000 * value_of(angle)) * 0.001
        return changed(view, bank=("hidden", view.bank[1] * wrong))


class MeanOfAll(Memory):
    """The mean of all rows, with a state that has the places alone where it takes part."""

    spec = MemorySpec(sites=frozenset({"encoder", "decoder", "cross"}), gradient="state")

    def sites(self, dims):
        return {dims.reading_site}

    def start(self, batch, dims):
        (site,) = self.sites(dims)
        keys = {bank_key(site, layer) for layer in range(dims.layers[site])}
        sums = {key + "sum": np.zeros((batch, 1, dims.d_model), dims.dtype) for key in keys}
        return sums | {key + "count": np.zeros((batch, 1), np.int64) for key in keys}

    def write(self, state, site, layer, new):
        key = bank_key(site, layer)
        valid = new.valid[..., None].astype(state.dims.dtype)
        state[key + "sum"] = state[key + "sum"] + np.sum(new.hidden * valid, axis=1, keepdims=True)
        state[key + "count"] = state[key + "count"] + new.valid.sum(axis=1, keepdims=True)

    def view(self, state, site, layer, segment):
        key = bank_key(site, layer)
        count = state[key + "count"]
        mean = state[key + "sum"] / np.maximum(count, 1)[..., None].astype(state.dims.dtype)
        return View(("hidden", mean), count > 0, positions=count // 2)


@pytest.mark.usefixtures("short_streams")
def test_a_strategy_is_asked_only_where_it_takes_part():
    check_memory(MeanOfAll, only=["dropped_rows_were_held", "stacks", "runs", "takes_what_is_dropped"])


@pytest.mark.usefixtures("short_streams")
@pytest.mark.parametrize("strategy", [Renumbers, Curves, PullsRowsTogether])
def test_an_odd_but_honest_strategy_passes(strategy, only_decoders):
    check_memory(strategy)


def test_a_gradient_that_is_a_little_wrong_is_caught(only_decoders):
    with pytest.raises(CheckFailed, match=r"fails 1 check:\n  gradients_are_right .*, along all weights: expected .* by finite"):
        check_memory(CurvesWrongly)


def test_a_failure_names_the_check_what_was_expected_and_what_came(only_decoders):
    with pytest.raises(CheckFailed) as caught:
        check_memory(MoreThanItSays)
    assert str(caught.value) == (
        "memory 'MoreThanItSays' fails 1 check:\n"
        "  capacity_holds (decoder-only): state['decoder.0.hidden']: expected at most capacity = 4 rows, got 8\n"
        "one check alone: check_memory(..., only=['capacity_holds'])"
    )


def test_the_cause_of_a_failure_is_kept(only_decoders):
    with pytest.raises(CheckFailed) as caught:
        check_memory(Raises)
    assert isinstance(caught.value.__cause__, PluginError)
    assert isinstance(caught.value.__cause__.__cause__, KeyError)


def test_checks_can_be_skipped_by_name(only_decoders):
    check_memory(DoesNothing, skip=["has_effect", "every_place_counts", "takes_what_is_dropped"])
    with pytest.raises(InvalidValue, match=r"skip: unknown check 'effect'; the checks are runs,"):
        check_memory(DoesNothing, skip=["effect"])
    check_memory(DoesNothing, only=["runs"])
    with pytest.raises(InvalidValue, match=r"only: unknown check 'effect'; the checks are runs,"):
        check_memory(DoesNothing, only=["effect"])


def test_what_is_no_memory_is_refused():
    with pytest.raises(InvalidType, match="expected text, a Memory or a function"):
        check_memory(7)
    with pytest.raises(InvalidType, match="expected a Memory, got int"):
        check_memory(int)
    with pytest.raises(InvalidValue, match="did you mean 'window'"):
        check_memory("windw")


def test_an_object_can_be_checked(only_decoders):
    check_memory(Last())
    assert issubclass(CheckFailed, AssertionError)
    assert isinstance(Last(), Memory)


@pytest.mark.parametrize("error", [SystemExit, GeneratorExit, BaseException])
def test_what_ends_programs_fails_a_check(error, only_decoders):
    class Ends(Last):
        def keep(self, scores, positions):
            raise error("enough")

    with pytest.raises(CheckFailed, match=rf"fails 1 check:\n  runs \(decoder-only\): .*{error.__name__}: enough"):
        check_memory(Ends)

    def factory():
        raise error("enough")

    with pytest.raises(CheckFailed, match=f"making one raised {error.__name__}: enough"):
        check_memory(factory)


def test_an_interrupt_ends_the_checks(only_decoders):
    class Interrupted(Last):
        def keep(self, scores, positions):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_memory(Interrupted)
