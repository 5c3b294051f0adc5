"""What a memory adds to the loss in training: its mean over the segments that streams have, logged beside the text's."""

import json

import numpy as np
import pytest

import mini_tfm as mt
from mini_tfm.data.batches import Batch
from mini_tfm.errors import PluginError, TrainingError
from mini_tfm.memory import Memory, MemorySpec, Param, SideOutput, Stack
from mini_tfm.testing.trial import Reader, small_model

TOKENS = np.random.default_rng(0).integers(3, 24, (3, 4, 5))
LENGTHS = np.array([[5, 5, 5, 5], [5, 5, 2, 0], [5, 0, 0, 0]])


class Adds(Memory):
    """What `of` makes of its parameter, to each stream."""

    spec = MemorySpec(sites=frozenset({"decoder"}))

    def __init__(self, of):
        self.name, self.of = "adds", of

    def parameters(self, dims):
        return {"p": Param((2,), np.array([0.5, -1.5]))}

    def view(self, state, site, layer, segment):
        return None

    def loss(self, state):
        return self.of(state.params["p"], state)


def squares(p, state):
    """The sum of squares, for each of three streams."""
    return np.broadcast_to(np.sum(p * p), (3,))


def trainer_of(of, **options):
    return mt.Trainer(small_model("decoder-only"), Adds(of), learning_rate=0.0, **options)


def test_it_is_a_mean_over_the_segments_that_are_there():
    trainer = trainer_of(squares)
    alone = mt.Trainer(small_model("decoder-only"), learning_rate=0.0)
    assert trainer.step(None, TOKENS, target_lengths=LENGTHS) == alone.step(None, TOKENS, target_lengths=LENGTHS)
    assert trainer.memory_loss == pytest.approx(2.5, rel=1e-12) and alone.memory_loss is None
    np.testing.assert_allclose(trainer.optimizer.grads["memory.adds.p"], [1.0, -3.0], rtol=1e-12)


@pytest.mark.parametrize("options", [{"gradient_accumulation_steps": 2}, {"bptt_segments": 1}, {"recompute": True}, {"bfloat16": False}])
def test_it_does_not_depend_on_how_the_gradient_is_computed(options):
    def of(p, state):
        return np.broadcast_to(np.sum(p * p), (len(state["n"]),))

    class Counts(Adds):
        def start(self, batch, dims):
            return {"n": np.zeros(batch)}

    trainer = mt.Trainer(small_model("decoder-only"), Counts(of), learning_rate=0.0, **options)
    trainer.step(None, TOKENS, target_lengths=LENGTHS)
    assert trainer.memory_loss == pytest.approx(2.5, rel=1e-12)
    np.testing.assert_allclose(trainer.optimizer.grads["memory.adds.p"], [1.0, -3.0], rtol=1e-12)


def test_it_is_no_part_of_validation_and_not_asked_for_in_use():
    def of(p, state):
        assert state.dims.training
        return squares(p, state)

    trainer = trainer_of(of)
    plain = mt.Trainer(small_model("decoder-only"))
    batch = Batch(None, TOKENS, None, LENGTHS)
    assert trainer.evaluate(batch) == plain.evaluate(batch)
    Reader(trainer.model, trainer.memory, 3).read(TOKENS[:, 0])


def test_it_is_logged(tmp_path):
    trainer = mt.Trainer(small_model("decoder-only"), Adds(squares), learning_rate=1e-2, schedule="constant")
    trainer.fit(lambda step: Batch(None, TOKENS, None, LENGTHS), 3, progress=False, jsonl_log=str(tmp_path / "log.jsonl"))
    logged = [json.loads(line)["memory_loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert logged[0] == pytest.approx(2.5) and logged[0] > logged[1] > logged[2] == trainer.memory_loss


@pytest.mark.parametrize(
    ("of", "message"),
    [
        (lambda p, state: np.sum(p), r"expected shape \(3,\), got \(\)"),
        (lambda p, state: squares(p, state) * np.nan, "holds NaN or infinity"),
        (lambda p, state: 3.0, "expected an array, got float"),
        (lambda p, state: {}["lost"], "KeyError: 'lost'"),
    ],
)
def test_what_is_wrong_names_the_memory(of, message):
    with pytest.raises(PluginError, match=f"memory 'adds' .* failed in loss, segment 0: .*{message}"):
        trainer_of(of).step(None, TOKENS)


def test_a_gradient_that_is_no_number_ends_the_step():
    with np.errstate(invalid="ignore", divide="ignore"), pytest.raises(TrainingError, match=r"largest gradients: memory\.adds\.p nan"):
        trainer_of(lambda p, state: np.sqrt(squares(p - np.array([0.5, -1.5]), state))).step(None, TOKENS)


class RootOfNothing(Memory):
    """Its side output is right, and the gradient of it, of a root at 0, is not a number."""

    name = "root"
    spec = MemorySpec(sites=frozenset({"decoder"}), needs=frozenset({"query"}))

    def read(self, state, site, layer, query):
        return SideOutput(np.sqrt(query.heads * query.heads * 0.0))


@pytest.mark.parametrize("others", [[], ["window:size=4"]])
def test_a_gradient_that_is_no_number_names_the_memory_that_makes_it(others):
    memory = Stack([RootOfNothing(), *map(mt.memory, others)])
    trainer = mt.Trainer(small_model("decoder-only"), memory)
    with np.errstate(invalid="ignore", divide="ignore"), pytest.raises(TrainingError) as caught:
        trainer.step(None, TOKENS)
    assert "without memory 'root' (" in str(caught.value) and "window" not in str(caught.value)


def test_a_model_that_gives_no_number_blames_no_memory():
    trainer = mt.Trainer(model := small_model("decoder-only"), mt.memory("window:size=4"))
    model.weights["decoder.0.feed_forward.in.weight"][0, 0] = np.nan
    with np.errstate(invalid="ignore"), pytest.raises(TrainingError) as caught:
        trainer.step(None, TOKENS)
    assert "without memory" not in str(caught.value)
