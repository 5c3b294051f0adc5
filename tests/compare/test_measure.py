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
    assert len(lines) == 1 and lines[0].startswith("recall cannot be measured: batch: facts are planted in sources")
    assert all(np.isnan(share) for share in figures["recall"].values()) and np.isnan(figures["recall_far"])
    assert set(figures["recall"]) == set(DISTANCES) and figures["bits_per_byte"] > 0


@pytest.mark.parametrize(("seconds", "steps", "planned"), [(1e9, 40, 40), (0.0, 11, 10)])
def test_a_machine_too_slow_for_all_steps_takes_fewer_and_shortens_the_schedule(seconds, steps, planned, monkeypatch):
    """The clock is read before every tenth step: without time, that step is the last."""
    clock = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    trainer, done, reported = Trainer(model_of(), total_steps=40), [], []
    data = held_out().cutter

    def batch_of(step, share):
        done.append(share)
        return data.batch(step, 1)

    history = training._train(trainer, batch_of, seconds, reported.append)
    assert [step for step, _ in history] == list(range(steps)) and reported == [loss for _, loss in history]
    assert done[:10] == [step / 40 for step in range(10)] and trainer.options.total_steps == planned
