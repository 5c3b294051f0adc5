"""What a memory is measured by: the figures of all tasks, on the same held-out text."""

import dataclasses
import time

import numpy as np
import pytest

import mini_tfm as mt
from mini_tfm.compare import training
from mini_tfm.compare.experiment import Result
from mini_tfm.compare.measure import measure_memory
from mini_tfm.compare.tasks import TASKS, HeldOut, Recall, Text
from mini_tfm.compare.tasks.recall import DISTANCES, FAR
from mini_tfm.compare.tasks.text import bits_of as measure
from mini_tfm.config import Config
from mini_tfm.data import TextStreams
from mini_tfm.errors import InvalidValue
from mini_tfm.memory import Memory, MemorySpec, View
from mini_tfm.text.tokenizers import ByteTokenizer
from mini_tfm.train import Trainer
from mini_tfm.transformer import Transformer

LENGTH = 40
TEXTS = ["The quick brown fox jumps over the lazy dog. " * n for n in (3, 9, 20)]


def model_of(**changes):
    sizes = {"d_model": 8, "n_heads": 2, "n_encoder_layers": 1, "n_decoder_layers": 1, "d_ff": 8, **changes}
    return Transformer(Config(vocab_size=ByteTokenizer.vocab_size, segment_length=LENGTH, **sizes))


def held_out(has_encoder=True, **changes):
    ids = [ByteTokenizer().encode(text) for text in TEXTS]
    cutter = TextStreams(ids, segment_length=LENGTH, n_segments=max(DISTANCES) + 1, batch_size=4, has_encoder=has_encoder)
    return HeldOut(ids, sum(map(len, TEXTS)), cutter, cutter.batch(0), **changes)


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_the_text_takes_the_bits_that_each_document_takes_alone(at_once):
    model, memory, text = model_of(), mt.memory("window:size=8"), held_out(documents_at_once=at_once)
    alone = [measure(model, memory, text.cutter.cut([(ids, 0)], -(-len(ids) // LENGTH))) for ids in text.documents]
    read = []
    found = Text(read.append).measure(model, memory, text)
    assert found["bits_per_byte"] == pytest.approx(sum(bits for bits, _ in alone) / text.n_bytes, rel=1e-6)
    assert found["state_bytes"] == max(state for _, state in alone) > 0 < found["tokens_per_second"]
    assert sum(read) == sum(map(len, text.documents)) and len(read) == -(-3 // at_once)


def test_recall_is_the_accuracy_at_each_distance():
    model, memory, text = model_of(), mt.memory("window:size=8"), held_out(seed=3)
    found = Recall(ByteTokenizer()).measure(model, memory, text)
    assert found["recall"] == {d: Recall(ByteTokenizer()).accuracy(model, memory, text.streams, d, seed=3) for d in DISTANCES}
    assert found["recall_far"] == np.mean([found["recall"][d] for d in FAR])


def test_the_figures_of_all_tasks_are_fields_of_a_row():
    figures = measure_memory(model_of(), None, ByteTokenizer(), held_out())
    row = Result(memory="none", folder=None, **figures)
    assert row.peak_rss_bytes > 10**7 and row.state_bytes == 0
    assert {field.name for field in dataclasses.fields(Result)} >= {name for task in TASKS for name in task.unmeasured()}


def test_what_a_model_cannot_do_is_reported_and_nan():
    lines = []
    model = model_of(n_encoder_layers=0)
    figures = measure_memory(model, None, ByteTokenizer(), held_out(has_encoder=False), report=lines.append)
    assert len(lines) == 1 and lines[0].startswith("recall cannot be measured: batch: expected segments of at least")
    assert all(np.isnan(share) for share in figures["recall"].values()) and np.isnan(figures["recall_far"])
    assert set(figures["recall"]) == set(DISTANCES) and figures["bits_per_byte"] > 0


class ShowsTheEnd(Memory):
    """Shows all queries the segment's last input token."""

    spec = MemorySpec(sites=frozenset({"decoder"}), needs=frozenset({"tokens"}))

    def __init__(self, when):
        self.when = when

    def view(self, state, site, layer, segment):
        if state.dims.training not in self.when:
            return None
        rows = np.cos(segment.tokens[:, -1:, None] * np.arange(1.0, state.dims.d_model + 1)).astype(state.dims.dtype)
        return View(("hidden", rows), np.ones(rows.shape[:2], bool))


@pytest.mark.parametrize("has_encoder", [True, False])
def test_a_memory_that_shows_what_comes_gains_nothing(has_encoder):
    model, text = model_of(n_encoder_layers=int(has_encoder)), held_out(has_encoder)
    without = measure_memory(model, None, ByteTokenizer(), text)
    in_training = measure_memory(model, ShowsTheEnd([True]), ByteTokenizer(), text)
    assert in_training["bits_per_byte"] == without["bits_per_byte"]
    with pytest.raises(InvalidValue, match="shows the decoder tokens that it is yet to predict"):
        measure_memory(model, ShowsTheEnd([False]), ByteTokenizer(), text)


def test_a_memory_with_a_file_is_refused_and_its_file_not_made(tmp_path):
    with pytest.raises(InvalidValue, match="a comparison begins with empty memories"):
        measure_memory(model_of(), mt.memory(f"window:size=4+store:path={tmp_path}/x.mdb"), ByteTokenizer(), held_out())
    assert not list(tmp_path.iterdir())


class Says(Memory):
    """Is nearly sure of one token, whatever the model says."""

    spec = MemorySpec(sites=frozenset({"decoder"}))

    def __init__(self, token):
        self.token = token

    def logits(self, state, hidden, log_probs):
        n = log_probs.shape[-1]
        return np.where(np.arange(n) == self.token, np.log(0.9), np.log(0.1 / (n - 1))).astype(log_probs.dtype) + 0 * log_probs


def test_recall_asks_a_memory_that_changes_the_distribution():
    model, task, streams = model_of(), Recall(ByteTokenizer()), held_out().streams
    answers = task.plant(streams, (0, 0), facts_at=0, asked_at=0)[1]
    letter = answers[answers >= 0][0]
    assert task.accuracy(model, Says(letter), streams, 0) == np.mean(answers[answers >= 0] == letter) > 0


def test_training_takes_its_steps_and_no_clock_is_read(monkeypatch):
    monkeypatch.setattr(time, "perf_counter", None)
    trainer, done, reported = Trainer(model_of(), total_steps=12), [], []
    data = held_out().cutter

    def batch_of(step, share):
        done.append(share)
        return data.batch(step, 1)

    history = training._train(trainer, batch_of, reported.append)
    assert [step for step, _ in history] == list(range(12)) and reported == [loss for _, loss in history]
    assert done == [step / 12 for step in range(12)]
