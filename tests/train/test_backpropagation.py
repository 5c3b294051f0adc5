"""Backpropagation through segments: kept, computed again or truncated, for every memory there is."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_same_bits
from variants import VARIANTS, assert_gradients, tiny_model, tokens

import mini_tfm as mt
from mini_tfm.autodiff import Var, backward, value_of
from mini_tfm.context import NO_DROPOUT, Dropout
from mini_tfm.data.batches import Batch, fields
from mini_tfm.errors import InvalidValue, PluginError
from mini_tfm.memory import Memory, MemorySpec, Rows
from mini_tfm.stream import Stream
from mini_tfm.train import Trainer
from mini_tfm.train.backpropagation import SegmentLoss, backpropagate

sys.path.insert(0, str(Path(__file__).parents[1] / "memory"))
from strategies import PUBLISHED

BUILT_IN = ["window:size=5", "window:size=4,sinks=2,site=all", "recurrent:tokens=2", "recurrent:tokens=2,residual=true", "store:top_k=3",
            "store:top_k=2,merge=gate", "store:top_k=2,merge=replace", "window:size=5,gradient=none", "h2o:size=5,sinks=1",
            "snapkv:size=5,recent=1,pool=3", "keydiff:size=5", "infini", "gated_delta", "titans:chunk=2", "knn:top_k=3",
            "window:size=3+store:top_k=2", "recurrent:tokens=2+window:size=3+store:top_k=2"]  # fmt: skip
MEMORIES = {"none": lambda: None, **{text: (lambda text=text: mt.memory(text)) for text in BUILT_IN}, **PUBLISHED}
DROPOUT = {"dropout": 0.1, "attention_dropout": 0.2, "ff_dropout": 0.15}


def ragged(has_encoder, *, n=4, size=3, length=4, seed=3, begins=False):
    """Streams of which one pauses twice, another ends early; weights of targets. begins: documents begin within two of them."""
    rng = np.random.default_rng(seed)
    source, target = tokens(rng, size, n, length), tokens(rng, size, n, length)
    lengths = rng.integers(1, length + 1, (size, n))
    lengths[1, ::2] = 0
    lengths[2, n - 1] = 0
    weights = rng.random(target.shape)
    starts = np.zeros((size, n), bool) if begins else None
    if starts is not None:
        starts[0, :2] = starts[1, 2] = True  # the latter while it pauses
    return Batch(source if has_encoder else None, target, lengths if has_encoder else None, lengths, weights, starts)


def fitting(name, variant):
    """The memory, if it works at a site that this kind of model has."""
    memory = MEMORIES[name]()
    sites = {"encoder", "decoder", "cross"} if "only" not in variant else {"decoder"}
    members = getattr(memory, "members", [memory] if memory is not None else [])
    if any(not member.spec.sites & sites for member in members):
        pytest.skip(f"{name} does not fit {variant}")
    return memory


def one_layer(variant, dtype=np.float32):
    layers = {name: min(1, VARIANTS[variant].get(name, 1)) for name in ("n_encoder_layers", "n_decoder_layers")}
    return tiny_model(variant, dtype=dtype, **layers)


def gradient(memory, variant, dtype=np.float32, batch=None, **options):
    """The loss and the gradients of one step's backward pass."""
    trainer = Trainer(one_layer(variant, dtype), memory, label_smoothing=0.1, source_dropout=0.3, seed=4, **{**DROPOUT, **options})
    disturb(trainer.model.weights)
    given = trainer._batch(*fields(batch or ragged(trainer.model.config.has_encoder)))
    value = trainer._backward(given, trainer._dropout(), trainer._hidden(given))
    return value, {name: g.copy() for name, g in trainer.optimizer.grads.items()}


def disturb(weights):
    for name, weight in weights.items():
        if name.startswith("memory."):
            weight += 0.3 * np.random.default_rng(0).standard_normal(weight.shape).astype(weight.dtype)


@pytest.mark.parametrize("variant", ["pre norm", "decoder only"])
@pytest.mark.parametrize("name", MEMORIES)
def test_computed_again_gives_the_same_bits(name, variant):
    """In full and truncated; with dropout, smoothing, hidden sources, weights, rows that pause, and documents that begin."""
    for k, begins in ((None, False), (None, True), (2, True)):
        batch = ragged("only" not in variant, begins=begins)
        kept, again = (
            gradient(fitting(name, variant), variant, batch=batch, bptt_segments=k, recompute=recompute) for recompute in (False, True)
        )
        assert_same_bits(again[0], kept[0])
        assert any(np.abs(g).max() > 1e-6 for g in kept[1].values())
        for weight, g in kept[1].items():
            assert_same_bits(again[1][weight], g)


@pytest.mark.parametrize("variant", ["rotary", "relative", "grouped", "paper"])
@pytest.mark.parametrize("name", ["recurrent:tokens=2", "window:size=3+store:top_k=2", "h2o:size=5,sinks=1"])
def test_computed_again_gives_the_same_bits_in_other_architectures(name, variant):
    kept, again = (gradient(MEMORIES[name](), variant, recompute=recompute) for recompute in (False, True))
    assert_same_bits([again[0], *again[1].values()], [kept[0], *kept[1].values()])


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("variant", ["pre norm", "decoder only"])
@pytest.mark.parametrize("name", MEMORIES)
def test_cut_between_segments_it_is_the_gradient_of_one_tape(name, variant, begins):
    """Against the loss of all segments on one tape, which sums in another order."""
    memory = fitting(name, variant)
    model = one_layer(variant, np.float64)
    model.add_memory_weights(memory, 4)
    disturb(model.weights)
    batch = ragged(model.config.has_encoder, begins=begins)
    found = []
    for way in ("cut", "one tape"):
        leaves = {weight: Var(value, np.zeros_like(value)) for weight, value in model.weights.items()}
        loss = SegmentLoss(model, batch, dropout=Dropout(0.1, 4, 0.2, 0.15), label_smoothing=0.1)
        run = Stream(model, memory, len(batch.target), weights=leaves, training=True)
        if way == "cut":
            backpropagate(loss, run)
        else:
            backward(sum(value for part in [loss.segment(run, t) for t in range(4)] for value in part if value is not None))
        found.append({weight: leaf.grad for weight, leaf in leaves.items()})
    for weight, g in found[1].items():
        np.testing.assert_allclose(found[0][weight], g, rtol=1e-9, atol=1e-12 * max(1, np.abs(g).max()), err_msg=weight)


@pytest.mark.parametrize(("recompute", "begins"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("name", ["recurrent:tokens=2", "recurrent:tokens=2,residual=true", "h2o:size=5,sinks=1", "infini"])
@pytest.mark.parametrize("variant", ["pre norm", "decoder only"])
def test_gradients_through_three_segments_are_those_of_finite_differences(variant, name, recompute, begins):
    """Of memories through whose state the gradient flows, dropout and hidden sources included; also where a document begins
    at the second segment, and with it a memory from its trained start."""
    trainer = Trainer(one_layer(variant, np.float64), fitting(name, variant), label_smoothing=0.1, source_dropout=0.4, seed=4,
                      recompute=recompute, **DROPOUT)  # fmt: skip
    disturb(trainer.model.weights)
    batch = trainer._batch(*fields(ragged(trainer.model.config.has_encoder, n=3, begins=begins)))
    trainer._backward(batch, trainer._dropout(), trainer._hidden(batch))
    gradients = {weight: g.copy() for weight, g in trainer.optimizer.grads.items()}
    assert all(np.abs(g).max() > 1e-9 for weight, g in gradients.items() if weight.startswith("memory."))

    def loss(w):
        options = {"dropout": trainer._dropout(), "hide_source": trainer._hidden(batch), "label_smoothing": 0.1}
        return SegmentLoss(trainer.model, batch, **options).value(Stream(trainer.model, trainer.memory, 3, weights=w, training=True))

    weights = {weight: value.copy() for weight, value in trainer.model.weights.items()}
    assert_gradients(loss, weights, gradients, tolerance=3e-6)


@pytest.mark.parametrize("variant", ["pre norm", "decoder only"])
@pytest.mark.parametrize("name", MEMORIES)
def test_no_gradient_crosses_to_another_document(name, variant):
    """Other tokens before a document begins, nothing kept of them, a truncation there: its gradient is the same."""
    batch = ragged("only" not in variant, begins=True)
    batch.begins[:, 2], batch.weights[:, :2] = True, 0
    other = dataclasses.replace(batch, target=batch.target.copy(), source=None if batch.source is None else batch.source.copy())
    for array in (other.target, other.source):
        if array is not None:
            array[:, :2] = 3 + (array[:, :2] + 1) % 10
    expected = gradient(fitting(name, variant), variant, batch=batch)
    assert np.abs(np.concatenate([g.ravel() for g in expected[1].values()])).max() > 1e-3
    for given, options in ((other, {}), (other, {"recompute": True}), (batch, {"bptt_segments": 2})):
        loss, gradients = gradient(fitting(name, variant), variant, batch=given, **options)
        assert loss == expected[0]
        for weight, g in expected[1].items():
            np.testing.assert_array_equal(gradients[weight], g, err_msg=weight)


@pytest.mark.parametrize("recompute", [False, True])
def test_another_truncation_gives_other_gradients(recompute):
    batch = ragged(True)
    found = {k: gradient(mt.memory("recurrent:tokens=2"), "pre norm", np.float64, batch, bptt_segments=k, recompute=recompute)
             for k in (None, 1, 2, 3, 4, 9)}  # fmt: skip
    flat = {k: np.concatenate([g.ravel() for g in gradients.values()]) for k, (_, gradients) in found.items()}
    assert len({loss for loss, _ in found.values()}) == 1
    assert_same_bits(flat[4], flat[None])
    assert_same_bits(flat[9], flat[None])
    for one, other in ((None, 1), (None, 2), (None, 3), (1, 2), (2, 3), (1, 3)):
        assert np.abs(flat[one] - flat[other]).max() > 1e-6, (one, other)


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_a_run_computed_again_is_the_run(n_threads):
    """Steps of the optimizer, at any number of threads, and saved and resumed with the option."""
    before = mt.get_num_threads()
    try:
        runs = []
        for recompute, threads in ((False, 1), (True, n_threads)):
            mt.set_num_threads(threads)
            trainer = Trainer(one_layer("pre norm"), mt.memory("recurrent:tokens=2"), seed=2, recompute=recompute, **DROPOUT)
            losses = [trainer.step(*fields(ragged(True, seed=step))) for step in range(4)]
            runs.append([losses, trainer.optimizer.arena, trainer.optimizer.m, trainer.optimizer.v])
    finally:
        mt.set_num_threads(before)
    assert_same_bits(runs[1], runs[0])


def test_a_resumed_run_goes_on_computing_again(tmp_path):
    trainer = Trainer(one_layer("pre norm"), mt.memory("recurrent:tokens=2"), recompute=True, bptt_segments=3, **DROPOUT)
    trainer.step(*fields(ragged(True)))
    trainer.save(tmp_path / "run")
    again = Trainer.resume(tmp_path / "run")
    assert again.options == trainer.options
    assert_same_bits(again.step(*fields(ragged(True, seed=5))), trainer.step(*fields(ragged(True, seed=5))))


# ------------------------------------------------------------------------------------------- what a memory does wrong


class Elsewhere(Memory):
    """Keeps what it must not: a count of its calls beside the state, or rows that it writes into."""

    spec = MemorySpec(sites=frozenset({"decoder"}), gradient="state")

    def __init__(self, fault):
        self.fault, self.count = fault, 0

    def start(self, batch, dims):
        return {"rows": np.zeros((batch, 1, dims.d_model), dims.dtype)}

    def begin(self, state, segment):
        return Rows(state["rows"])

    def end(self, state, rows):
        self.count += 1
        if self.fault == "count":
            state["rows"] = rows + self.count
        elif self.fault == "in place":
            value_of(state["rows"])[...] += value_of(rows)
        elif self.fault == "names" and self.count > 3:
            state["more"] = rows
        else:
            state["rows"] = rows


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("count", r"computed again from the same state, leaves another state\['rows'\]"),
        ("names", r"computed again from the same state, leaves \['more', 'rows'\]"),
        ("in place", "failed in end, site decoder, segment 0: ValueError: .*read-only"),
    ],
)
def test_a_memory_that_keeps_anything_outside_its_state_is_told(fault, told):
    make = lambda **options: Trainer(one_layer("decoder only"), Elsewhere(fault), **options)  # noqa: E731
    with pytest.raises(PluginError, match=rf"Elsewhere.*{told}"):
        make(recompute=True).step(*fields(ragged(False)))
    honest = Trainer(one_layer("decoder only"), Elsewhere("none"), recompute=True)
    assert np.isfinite(honest.step(*fields(ragged(False))))


def test_nothing_is_written_twice():
    """A segment is offered to a memory's state twice; from each state it goes on once."""
    trainer = Trainer(one_layer("pre norm"), mt.memory("store:top_k=2"), recompute=True)
    batch = trainer._batch(*fields(ragged(True)))
    seen = []
    loss = SegmentLoss(trainer.model, batch)
    trained = Stream(trainer.model, trainer.memory, 3, weights=trainer.optimizer.leaves, training=True)
    plain = Stream(trainer.model, trainer.memory, 3, training=True)
    backpropagate(loss, trained, recompute=True)
    loss.value(plain)
    for key, value in plain.run.dump().items():
        seen.append(key)
        assert_same_bits(trained.run.dump()[key], value)
    assert any("valid" in key for key in seen)


def test_recompute_is_true_or_false():
    with pytest.raises(InvalidValue, match="recompute: expected True or False, got 'yes'"):
        Trainer(one_layer("pre norm"), recompute="yes")


# ------------------------------------------------------------------------------------------- dropout


def masks(monkeypatch, batch, **options):
    """(place in the call order, what was drawn) of every mask of a step's backward pass."""
    from mini_tfm import _core

    drawn = []
    for name in ("dropout", "attention"):
        real = getattr(_core, name)

        def spied(*args, real=real, name=name, **kwargs):
            if name == "dropout" or kwargs.get("dropout"):
                drawn.append((name, args[1:] if name == "dropout" else (kwargs["dropout"], kwargs["seed"])))
            return real(*args, **kwargs)

        monkeypatch.setattr(_core, name, spied)
    trainer = Trainer(one_layer("pre norm"), mt.memory("recurrent:tokens=2"), **options)
    loss = SegmentLoss(trainer.model, trainer._batch(*fields(batch)), dropout=trainer._dropout())
    loss.value(Stream(trainer.model, trainer.memory, len(batch.target), training=True))
    monkeypatch.undo()
    return drawn


def test_every_place_and_segment_draws_a_mask_of_its_own(monkeypatch):
    drawn = masks(monkeypatch, ragged(True, n=3), dropout=0.1, attention_dropout=0.2, ff_dropout=0.3)
    seeds = [seed for _, (_, seed) in drawn]
    assert len(set(seeds)) == len(seeds)
    # A segment: 2 embeddings, 2 + 3 sublayers; 3 attentions; 2 feed-forwards.
    rates = [(name, p) for name, (p, _) in drawn]
    assert {rate: rates.count(rate) for rate in set(rates)} == {("dropout", 0.1): 21, ("dropout", 0.3): 6, ("attention", 0.2): 9}
    assert drawn == masks(monkeypatch, ragged(True, n=3), dropout=0.1, attention_dropout=0.2, ff_dropout=0.3)
    other = masks(monkeypatch, ragged(True, n=3), dropout=0.1, attention_dropout=0.2, ff_dropout=0.3, seed=1)
    assert not set(seeds) & {seed for _, (_, seed) in other}


def test_the_other_rates_are_those_of_dropout_unless_given(monkeypatch):
    for options, expected in (({"dropout": 0.1}, {0.1}), ({"dropout": 0.1, "attention_dropout": 0.0, "ff_dropout": 0.0}, {0.1}),
                              ({"attention_dropout": 0.2}, {0.2}), ({"ff_dropout": 0.3}, {0.3}), ({}, set())):  # fmt: skip
        drawn = masks(monkeypatch, ragged(True, n=1), **options)
        assert {p for _, (p, _) in drawn} == expected
        names = {name for name, _ in drawn}
        assert ("attention" in names) == (options.get("attention_dropout", options.get("dropout", 0)) > 0), options


def test_the_masks_of_a_step_are_its_own():
    trainer = Trainer(one_layer("pre norm"), dropout=0.5)
    batch = trainer._batch(*fields(ragged(True)))
    first = trainer._backward(batch, trainer._dropout(), trainer._hidden(batch))
    assert trainer._backward(batch, trainer._dropout(), trainer._hidden(batch)) == first
    trainer.step_count += 1
    assert trainer._backward(batch, trainer._dropout(), trainer._hidden(batch)) != first
    assert trainer._backward(batch, NO_DROPOUT, trainer._hidden(batch)) == (pytest.approx(trainer.evaluate(batch), rel=1e-6), 0)


@pytest.mark.parametrize("option", ["attention_dropout", "ff_dropout"])
@pytest.mark.parametrize("value", [1.0, -0.1, "half", True])
def test_rates_are_checked(option, value):
    with pytest.raises(InvalidValue, match=f"{option}: expected a number of at least 0 and below 1"):
        Trainer(one_layer("pre norm"), **{option: value})
