"""Mixtures and curricula, and that a resumed run sees what it would have seen."""

import json
import re
from functools import partial

import numpy as np
import pytest
from helpers import assert_same_bits, examples
from hypothesis import given
from hypothesis import strategies as st
from variants import tiny_model

import mini_tfm as mt
from mini_tfm.data import Curriculum, Mixture, NextSegment, Pairs, SpanDenoising, TextStreams
from mini_tfm.data.batches import fields
from mini_tfm.data.mixtures import BLOCK_STEPS
from mini_tfm.errors import InvalidType, InvalidValue
from mini_tfm.train import Trainer

TEXTS = [np.random.default_rng(0).integers(3, 13, n) for n in (90, 31, 7)]
PAIRS = [(np.arange(3, 4 + i % 7), np.arange(4, 6 + i % 3)) for i in range(30)]
SHAPE = {"segment_length": 5, "n_segments": 3, "batch_size": 2}


class Numbers:
    """Data whose batches say which they are."""

    def __init__(self, name):
        self.name = name
        self.state = {"name": name}

    def batch(self, step):
        return self.name, step


def mixture(seed=0, **weights):
    return Mixture({name: (Numbers(name), weight) for name, weight in weights.items()}, seed=seed)


def everything(seed=0):
    return Curriculum(
        Mixture(
            {
                "next": (NextSegment(TEXTS, seed=seed, **SHAPE), 2),
                "denoise": (SpanDenoising(TEXTS, vocab_size=20, seed=seed, **SHAPE), 1),
                "pairs": (Pairs(PAIRS, batch_size=2, seed=seed), 1),
            },
            seed=seed,
        ),
        [(0, 1), (3, 2), (6, 3)],
    )


# Mixtures


@examples(0.4)
@given(weights=st.lists(st.floats(0.02, 5), min_size=1, max_size=4), seed=st.integers(0, 9))
def test_each_part_has_its_share_and_none_of_its_batches_is_left_out(weights, seed):
    data = mixture(seed, **{f"p{i}": weight for i, weight in enumerate(weights)})
    seen = [data.batch(step) for step in range(BLOCK_STEPS)]
    for name in data.parts:
        own = [number for other, number in seen if other == name]
        assert own == list(range(len(own)))
        share = data.parts[name][1] / sum(weights)
        assert abs(len(own) - share * BLOCK_STEPS) <= 1


def test_a_turn_is_a_function_of_seed_and_step_through_all_blocks():
    data = mixture(3, a=0.7, b=0.2, c=0.1)
    steps = [0, 999, 1000, 1001, 2500, 123_456_789]
    alone = [mixture(3, a=0.7, b=0.2, c=0.1).batch(step) for step in reversed(steps)]
    assert [data.batch(step) for step in steps] == alone[::-1]
    counts = {"a": 0, "b": 0, "c": 0}
    for step in range(2 * BLOCK_STEPS + 10):
        name, number = data.batch(step)
        assert number == counts[name]
        counts[name] += 1
    order = [data.batch(step)[0] for step in range(1000)]
    assert order != [mixture(4, a=0.7, b=0.2, c=0.1).batch(step)[0] for step in range(1000)]
    assert order != [data.batch(step)[0] for step in range(1000, 2000)]
    assert 0 < order[:100].count("b") < 45, "spread over the block"


@pytest.mark.parametrize(
    ("parts", "options", "error", "told"),
    [
        ({}, {}, InvalidType, "parts: expected a mapping"),
        ([("a", 1)], {}, InvalidType, "parts: expected a mapping"),
        ({"a": Numbers("a")}, {}, InvalidType, r"parts\['a'\]: expected \(data, weight\)"),
        ({"a": (5, 1)}, {}, InvalidType, r"parts\['a'\]: expected \(data, weight\)"),
        ({"a": (Numbers("a"), 0)}, {}, InvalidValue, r"parts\['a'\]: expected a weight above 0"),
        ({"a": (Numbers("a"), float("inf"))}, {}, InvalidValue, "expected a weight above 0"),
        ({"a": (Numbers("a"), 1), "b": (Numbers("b"), 1e-5)}, {}, InvalidValue, "at least a thousandth"),
        ({"a": (Numbers("a"), 1)}, {"seed": -1}, InvalidValue, "seed: expected"),
    ],
)
def test_what_is_no_mixture_is_refused(parts, options, error, told):
    with pytest.raises(error, match=told):
        Mixture(parts, **options)


# Curricula


def test_the_number_of_segments_grows_at_its_steps():
    data = Curriculum(NextSegment(TEXTS, **SHAPE), [(0, 1), (4, 2), (9, 7)])
    assert [data.batch(step).target.shape[1] for step in (0, 3, 4, 8, 9, 500)] == [1, 1, 2, 2, 7, 7]
    plain = NextSegment(TEXTS, **SHAPE).with_segments(2)
    assert_same_bits(fields(data.batch(6)), fields(plain.batch(2)))
    streams = Curriculum(TextStreams(TEXTS, **SHAPE), [(0, 1), (4, 2)])
    assert [streams.batch(step).target.shape[1] for step in (3, 4)] == [1, 2]


def test_a_stage_may_have_its_own_number_of_rows():
    stages = [(0, 1, 6), (2, 3, 2)]
    for data in (NextSegment(TEXTS, **SHAPE), TextStreams(TEXTS, **SHAPE), Mixture({"a": (NextSegment(TEXTS, **SHAPE), 1)})):
        shapes = [Curriculum(data, stages).batch(step).target.shape[:2] for step in (0, 1, 2, 9)]
        assert shapes == [(6, 1), (6, 1), (2, 3), (2, 3)]
    with pytest.raises(InvalidValue, match="stages: expected"):
        Curriculum(NextSegment(TEXTS, **SHAPE), [(0, 1, 0)])


def test_a_curriculum_holds_for_every_part_of_a_mixture():
    data = everything()
    shapes = {step: data.batch(step).target.shape[1] for step in range(100)}
    assert max(n for step, n in shapes.items() if step < 3) == 1 and max(n for step, n in shapes.items() if 3 <= step < 6) <= 2
    assert max(shapes.values()) == 3


@pytest.mark.parametrize(
    "stages", [[], None, "0:1", [(1, 1)], [(0, 1), (0, 2)], [(0, 1), (5, 2), (4, 3)], [(0, 0)], [(0, 1.5)], [(0,)], [5], [(0, True)]]
)
def test_what_is_no_curriculum_is_refused(stages):
    with pytest.raises(InvalidValue, match="stages: expected"):
        Curriculum(NextSegment(TEXTS, **SHAPE), stages)


def test_a_curriculum_needs_data_that_has_segments():
    with pytest.raises(InvalidType, match="with_segments"):
        Curriculum(Numbers("a"), [(0, 1)])
    with pytest.raises(InvalidType, match=r"parts\['a'\]: .*with_segments"):
        Curriculum(mixture(a=1), [(0, 1)])


@pytest.mark.parametrize("make", [lambda: everything().batch(-1), lambda: mixture(a=1).batch(0.5), lambda: everything().batch("1")])
def test_what_is_no_step_is_refused(make):
    with pytest.raises((InvalidValue, TypeError)):
        make()


# Training


def trainer_of(memory="recurrent:tokens=2", **options):
    model = tiny_model("pre norm", dtype=np.float32, vocab_size=20)
    return Trainer(model, mt.memory(memory), total_steps=12, dropout=0.1, source_dropout=0.2, seed=1, **options)


@pytest.mark.parametrize("stopped_at", [1, 2, 3, 5, 6, 9])  # within stages, at their ends, in mid-epoch
def test_a_resumed_run_sees_what_it_would_have_seen(stopped_at, tmp_path):
    whole, part = trainer_of(), trainer_of()
    losses = whole.fit(everything(), progress=False)["loss"]
    first = part.fit(everything(), stopped_at, folder=tmp_path / "run", progress=False)["loss"]
    resumed = Trainer.resume(tmp_path / "run")
    assert resumed.data_state == json.loads(json.dumps(everything().state))
    assert first + resumed.fit(everything(), progress=False)["loss"] == losses
    for name, weight in whole.model.weights.items():
        assert_same_bits(resumed.model.weights[name], weight)


@pytest.mark.parametrize("stopped_at", [2, 5, 9])  # an epoch is three steps and a bit; each is cut at other places
@pytest.mark.parametrize("kind", [NextSegment, partial(SpanDenoising, vocab_size=20)])
def test_a_run_that_is_resumed_in_mid_epoch_sees_the_cuts_it_would_have_seen(kind, stopped_at, tmp_path):
    def data():
        return kind(TEXTS, segment_length=5, n_segments=1, batch_size=9, seed=2)

    whole, part = trainer_of(), trainer_of()
    losses = whole.fit(data(), progress=False)["loss"]
    first = part.fit(data(), stopped_at, folder=tmp_path / "run", progress=False)["loss"]
    assert first + Trainer.resume(tmp_path / "run").fit(data(), progress=False)["loss"] == losses


@pytest.mark.parametrize("make", [lambda: NextSegment(TEXTS, **SHAPE), everything])
def test_a_run_that_was_cut_at_the_same_places_in_each_epoch_is_refused(make, tmp_path):
    """As versions did that put nothing about cuts into the state."""
    trainer_of().fit(make(), 2, folder=tmp_path / "run", progress=False)
    path = tmp_path / "run" / "training.json"
    text = path.read_text()
    path.write_text(re.sub(r'"cuts": "[^"]*",?', "", text))
    assert path.read_text() != text
    resumed = Trainer.resume(tmp_path / "run")
    with pytest.raises(InvalidValue, match=r"data: differs .*cuts was None, is 'other in each epoch'.*other_data=True"):
        resumed.fit(make(), 4, progress=False)
    assert len(resumed.fit(make(), 4, progress=False, other_data=True)["loss"]) == 2


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (lambda: everything(seed=1), "data.parts.*seed was 0, is 1"),
        (lambda: Curriculum(everything().data, [(0, 1), (3, 2)]), "curriculum was"),
        (lambda: NextSegment(TEXTS, **SHAPE), "curriculum was"),
        (lambda: NextSegment([*TEXTS[:2], TEXTS[2] + 1], **SHAPE), "curriculum"),
    ],
)
def test_other_data_is_refused_on_resume_unless_asked(other, told, tmp_path):
    trainer_of().fit(everything(), 2, folder=tmp_path / "run", progress=False)
    resumed = Trainer.resume(tmp_path / "run")
    with pytest.raises(InvalidValue, match=f"data: differs from the data this run was trained on: .*{told}.*other_data=True"):
        resumed.fit(other(), 4, progress=False)
    assert resumed.step_count == 2
    assert len(resumed.fit(other(), 4, progress=False, other_data=True)["loss"]) == 2
    assert resumed.data_state == json.loads(json.dumps(other().state))


def test_a_changed_corpus_is_told_as_such(tmp_path):
    trainer_of().fit(NextSegment(TEXTS, **SHAPE), 1, folder=tmp_path / "run", progress=False)
    with pytest.raises(InvalidValue, match="corpus has changed"):
        Trainer.resume(tmp_path / "run").fit(NextSegment([*TEXTS[:2], TEXTS[2] + 1], **SHAPE), 2, progress=False)


def test_functions_and_data_without_a_state_train_as_before(tmp_path):
    data = NextSegment(TEXTS, **SHAPE)
    trainer = trainer_of()
    assert len(trainer.fit(data.batch, 2, progress=False, validation=data, validate_every=1, folder=tmp_path / "run")["validation"]) == 2
    assert trainer.data_state is None and Trainer.resume(tmp_path / "run").data_state is None
    with pytest.raises(InvalidType, match=r"data: expected an object with batch\(step\)"):
        trainer.fit(5, 3, progress=False)


def test_a_damaged_state_is_refused(tmp_path):
    trainer_of().fit(NextSegment(TEXTS, **SHAPE), 1, folder=tmp_path / "run", progress=False)
    path = tmp_path / "run" / "training.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data_state": [1]}))
    with pytest.raises(InvalidValue, match="data_state: expected a mapping or null"):
        Trainer.resume(tmp_path / "run")
