"""Training: that it learns, that it can be repeated and resumed to the bit, and that its gradients are the gradients."""

import copy
import dataclasses
import json
import pickle
import re
import signal

import numpy as np
import pytest
from helpers import assert_same_bits
from variants import VARIANTS, assert_gradients, tiny_model, tokens

import mini_tfm as mt
from mini_tfm.autodiff import value_of
from mini_tfm.checkpoint.safetensors import read_safetensors
from mini_tfm.config import Config
from mini_tfm.context import NO_DROPOUT
from mini_tfm.data import TextStreams
from mini_tfm.data.batches import Batch, fields
from mini_tfm.errors import FileProblem, InvalidType, InvalidValue, PluginError, TrainingError
from mini_tfm.memory import RowMemory
from mini_tfm.stream import Stream
from mini_tfm.text.tokenizers import ByteTokenizer
from mini_tfm.train import Trainer
from mini_tfm.train import optimizer as optimizer_module
from mini_tfm.train.backpropagation import SegmentLoss
from mini_tfm.transformer import Transformer

MEMORIES = ["window:size=5", "window:size=4,sinks=2,site=all", "recurrent:tokens=2", "recurrent:tokens=2,residual=true", "store:top_k=3",
            "store:top_k=2,merge=gate", "window:size=3+store:top_k=2"]  # fmt: skip


def config(**changes):
    return Config(**{"vocab_size": 13, "d_model": 8, "n_heads": 2, "n_encoder_layers": 1, "n_decoder_layers": 1, "d_ff": 12, **changes})


def stream(step, *, n=3, size=2, length=4, vocab_size=13, has_encoder=True):
    """A batch of ragged streams, one of which pauses for a segment."""
    rng = np.random.default_rng(step)
    source, target = tokens(rng, size, n, length, vocab_size=vocab_size), tokens(rng, size, n, length, vocab_size=vocab_size)
    lengths = rng.integers(1, length + 1, (size, n))
    return Batch(source, target, lengths, lengths) if has_encoder else Batch(None, target, None, lengths)


def weights_of(trainer):
    return {name: w.copy() for name, w in trainer.model.weights.items()}


def assert_same_run(one, other):
    assert (one.step_count, one.tokens_seen, one.losses) == (other.step_count, other.tokens_seen, other.losses)
    assert one.model.weights.keys() == other.model.weights.keys()
    for name, weight in one.model.weights.items():
        assert_same_bits(other.model.weights[name], weight)
    assert_same_bits([one.optimizer.m, one.optimizer.v], [other.optimizer.m, other.optimizer.v])
    assert one.learning_rate == other.learning_rate


def trainer_of(memory=None, *, model=None, **options):
    options = {"learning_rate": 3e-3, "total_steps": 20, "warmup_steps": 3, "dropout": 0.1, "source_dropout": 0.2, "seed": 4, **options}
    made = mt.memory(memory) if isinstance(memory, str) else memory
    return Trainer(model or Transformer(config(), seed=1), made, **options)


# ------------------------------------------------------------------------------------------- it learns


@pytest.mark.parametrize("variant", ["pre norm", "paper", "decoder only"])
def test_the_loss_falls_on_a_tiny_task(variant):
    """Copy a source of four tokens; without an encoder, count upwards."""
    layers = {name: min(1, VARIANTS[variant].get(name, 1)) for name in ("n_encoder_layers", "n_decoder_layers")}
    model = tiny_model(variant, dtype=np.float32, **layers, d_model=32, n_heads=4, d_ff=64)
    rng = np.random.default_rng(0)

    def batch():
        if model.config.has_encoder:
            source = tokens(rng, 16, 4)
            return source, source
        return None, 3 + (rng.integers(0, 10, (16, 1)) + np.arange(6)) % 10

    trainer = Trainer(model, learning_rate=5e-3, schedule="cosine", total_steps=100, warmup_steps=10)
    losses = [trainer.step(*batch()) for _ in range(100)]
    assert np.mean(losses[:3]) > 2
    assert np.mean(losses[-5:]) < 1.5  # a guess among ten tokens costs 2.3
    assert trainer.losses == losses


def test_a_memory_learns_what_no_segment_alone_can_tell():
    """The target is the source of the segment before: chance without a memory, known with one."""
    rng = np.random.default_rng(0)

    def batch():
        source = rng.integers(3, 7, (16, 2, 1))
        return Batch(source, np.roll(source, 1, axis=1), weights=np.ones((16, 2, 1)) * [[[0], [1]]])

    last = {}
    for text in (None, "recurrent:tokens=1"):
        trainer = trainer_of(text, model=Transformer(config(d_model=32, d_ff=64, vocab_size=8), seed=1), learning_rate=1e-2,
                             total_steps=120, dropout=0.0, source_dropout=0.0)  # fmt: skip
        last[text] = np.mean([trainer.step(*fields(batch())) for _ in range(120)][-10:])
    assert last[None] > 1.2 > 0.5 > last["recurrent:tokens=1"], last  # four equally likely tokens: ln 4 = 1.386


# ------------------------------------------------------------------------------------------- the gradients


def held_still(memory, method):
    """Makes `memory` meet, in every later run, the rows that it met in the first: what a stop-gradient says they are.

    method: "write", for rows kept without a gradient; "begin", for states that a truncation cuts off.
    """
    member = getattr(memory, "members", [memory])[0]
    original, met, count = getattr(member, method), [], [0]

    def write(state, site, layer, new):
        if len(met) == count[0]:
            met.append(np.array(new.hidden))
        count[0] += 1
        return original(state, site, layer, dataclasses.replace(new, hidden=met[count[0] - 1]))

    def begin(state, segment):
        if segment.number > 0 and "tokens" in state and segment.site == "encoder":
            if len(met) == count[0]:
                met.append(np.array(value_of(state["tokens"])))
            count[0] += 1
            state["tokens"] = met[count[0] - 1]
        return original(state, segment)

    setattr(member, method, {"write": write, "begin": begin}[method])
    return lambda: count.__setitem__(0, 0)


def one_layer(variant):
    layers = {name: min(1, VARIANTS[variant].get(name, 1)) for name in ("n_encoder_layers", "n_decoder_layers")}
    return tiny_model(variant, **layers)


def taped(trainer, batch, **options):
    """The loss as a function of the weights, the weights and the gradients."""
    trainer.options = trainer.options.replace(**options)
    for name, weight in trainer.model.weights.items():
        if name.startswith("memory."):
            weight += 0.3 * np.random.default_rng(0).standard_normal(weight.shape)
    batch = trainer._batch(*fields(batch))
    trainer._backward(batch, NO_DROPOUT)
    gradients = {name: g.copy() for name, g in trainer.optimizer.grads.items()}
    return lambda w: training_loss(trainer, batch, w), weights_of(trainer), gradients


def training_loss(trainer, batch, w, dropout=NO_DROPOUT):
    smoothing = trainer.options.label_smoothing
    loss = SegmentLoss(trainer.model, batch, dropout=dropout, hide_source=trainer._hidden(batch), label_smoothing=smoothing)
    return loss.value(Stream(trainer.model, trainer.memory, len(batch.target), weights=w, training=True))


@pytest.mark.parametrize(
    ("variant", "text"),
    [(variant, text) for variant in ("pre norm", "decoder only") for text in MEMORIES]
    + [(variant, text) for variant in ("rotary", "relative", "grouped", "ssru") for text in (MEMORIES[1], "recurrent", MEMORIES[4])],
)
def test_gradients_through_three_segments_are_those_of_finite_differences(variant, text):
    model, memory = one_layer(variant), mt.memory(text)
    trainer = Trainer(model, memory, label_smoothing=0.1, seed=1)
    loss, weights, gradients = taped(trainer, stream(3, has_encoder=model.config.has_encoder))
    assert all(np.abs(g).max() > 1e-9 for name, g in gradients.items() if name.startswith("memory."))
    assert_gradients(loss, weights, gradients, tolerance=3e-6)


def test_gradients_stop_where_they_are_told_to():
    """With bptt_segments=1 they are those of a loss whose incoming states are given numbers, but for the first's."""
    memory = mt.memory("recurrent:tokens=2")
    again = held_still(memory, "begin")
    trainer = Trainer(one_layer("pre norm"), memory, bptt_segments=1)
    loss, weights, gradients = taped(trainer, stream(3))
    assert np.abs(gradients["memory.recurrent.tokens"]).max() > 1e-6, "the first state is learnt all the same"

    def repeated(w):
        again()
        return loss(w)

    assert_gradients(repeated, weights, gradients, tolerance=3e-6)


def test_another_truncation_gives_other_gradients():
    found = {}
    for depth in (None, 1, 2, 3, 4):
        trainer = Trainer(one_layer("pre norm"), mt.memory("recurrent:tokens=2"), bptt_segments=depth)
        _, _, gradients = taped(trainer, stream(3, n=4))
        found[depth] = np.concatenate([g.ravel() for _, g in sorted(gradients.items())])
    assert_same_bits(found[4], found[None])
    for one, other in ((None, 1), (None, 2), (None, 3), (1, 2), (2, 3)):
        assert np.abs(found[one] - found[other]).max() > 1e-6, (one, other)


# ------------------------------------------------------------------------------------------- the loss


def test_the_loss_is_the_mean_over_all_target_tokens_of_all_segments():
    model = tiny_model("pre norm")
    batch = stream(0)
    batch = dataclasses.replace(batch, weights=np.random.default_rng(0).random(batch.target.shape))
    found = Trainer(model).evaluate(batch)
    total = counted = 0.0
    for t in range(3):  # without a memory each segment stands alone
        scores = model.logits(batch.source[:, t], batch.target[:, t], batch.source_lengths[:, t])
        log_probs = scores - np.log(np.exp(scores).sum(axis=2, keepdims=True))
        for b, n in enumerate(batch.target_lengths[:, t]):
            for i in range(n):
                total -= batch.weights[b, t, i] * log_probs[b, i, batch.target[b, t, i]]
                counted += batch.weights[b, t, i]
    assert found == pytest.approx(total / counted, rel=1e-12)


def test_a_step_gives_the_loss_before_it():
    trainer = trainer_of(dropout=0.0, source_dropout=0.0)
    batch = stream(0)
    before = trainer.evaluate(batch)
    assert trainer.step(*fields(batch)) == pytest.approx(before, rel=1e-6)
    assert trainer.evaluate(batch) < before


def test_what_is_no_batch_is_named():
    trainer, batch = trainer_of(), stream(0)
    pair = (batch.source, batch.target)
    for call in (trainer.evaluate, trainer.weight_of, lambda pair: trainer.fit(lambda step: pair, 1, progress=False)):
        with pytest.raises(InvalidType, match=r"batch: expected a mini_tfm.train.Batch\(source, target\).*, got tuple"):
            call(pair)


def test_label_smoothing_is_for_training_alone():
    model = tiny_model("pre norm")
    batch = stream(0)
    plain, smooth = (Trainer(tiny_model("pre norm"), label_smoothing=e) for e in (0.0, 0.3))
    assert plain.evaluate(batch) == smooth.evaluate(batch)
    given = plain._batch(*fields(batch))
    sharp, soft = (training_loss(t, given, t.model.weights) for t in (plain, smooth))
    # The mean over all classes takes part with its share: worked out from the logits.
    total = counted = 0.0
    for t in range(3):
        scores = model.logits(batch.source[:, t], batch.target[:, t], batch.source_lengths[:, t])
        log_probs = scores - np.log(np.exp(scores).sum(axis=2, keepdims=True))
        mask = np.arange(4) < batch.target_lengths[:, t, None]
        total -= log_probs.mean(axis=2)[mask].sum()
        counted += mask.sum()
    assert soft == pytest.approx(0.7 * sharp + 0.3 * total / counted, rel=1e-12)


def test_evaluation_changes_nothing_and_drops_nothing():
    trainer = trainer_of("recurrent:tokens=2", dropout=0.5, source_dropout=0.5)
    batch, before = stream(0), weights_of(trainer)
    assert trainer.evaluate(batch) == trainer.evaluate(batch)
    assert_same_bits(list(weights_of(trainer).values()), list(before.values()))
    assert trainer.step_count == 0 and trainer.losses == []


def test_dropout_and_source_dropout_change_with_the_step():
    for options in ({"dropout": 0.3, "source_dropout": 0.0}, {"dropout": 0.0, "source_dropout": 0.5}):
        trainer = trainer_of("recurrent:tokens=2", learning_rate=0.0, weight_decay=0.0, **options)
        assert len({trainer.step(*fields(stream(0, size=8))) for _ in range(4)}) > 1


def test_a_hidden_source_is_not_seen_and_the_first_never_hidden():
    """With source_dropout near 1 and no memory, no segment's source but the first counts."""
    losses = []
    for change in (None, 0, 1):
        trainer = trainer_of(None, dropout=0.0, source_dropout=0.999999)
        batch = stream(0)
        if change is not None:
            batch.source[:, change] = 3 + (batch.source[:, change] - 2) % 10
        losses.append(trainer.step(*fields(batch)))
    assert losses[2] == losses[0] != losses[1]


@pytest.mark.parametrize("has_encoder", [True, False])
def test_a_stream_of_one_segment_may_leave_the_axis_out(has_encoder):
    changes = {} if has_encoder else {"n_encoder_layers": 0}
    batch = stream(0, n=1, has_encoder=has_encoder)
    flat = [None if x is None else x[:, 0] for x in fields(batch)]
    assert Trainer(Transformer(config(**changes))).step(*flat) == Trainer(Transformer(config(**changes))).step(*fields(batch))


def test_a_decoder_only_stream_goes_on_with_the_token_before():
    """Segments of a stream are one text: the first input of a segment is the last token of the one before."""
    model = tiny_model("decoder only")
    batch = stream(0, has_encoder=False)
    found = Trainer(model).evaluate(batch)
    changed = dataclasses.replace(batch, target=batch.target.copy())
    changed.target[0, 0, batch.target_lengths[0, 0] - 1] = 3 + (changed.target[0, 0, batch.target_lengths[0, 0] - 1] - 2) % 10
    counted = np.zeros(batch.target.shape)
    counted[:, 1] = 1
    one, other = (Trainer(model).evaluate(dataclasses.replace(b, weights=counted)) for b in (batch, changed))
    assert abs(one - other) > 1e-6 and np.isfinite(found)


def test_a_stream_that_pauses_goes_on_where_it_was():
    model = tiny_model("decoder only")
    batch = stream(0, n=2, has_encoder=False)
    longer = [np.insert(x, 1, 0, axis=1) for x in (batch.target, batch.target_lengths)]
    paused = Batch(None, longer[0], None, longer[1])
    for text in ("recurrent:tokens=2", "window:size=5", "store:top_k=2"):
        one, other = (Trainer(tiny_model("decoder only"), mt.memory(text)).evaluate(b) for b in (batch, paused))
        assert one == pytest.approx(other, rel=1e-12), text
    assert Trainer(model).evaluate(batch) == pytest.approx(Trainer(model).evaluate(paused), rel=1e-12)


# ------------------------------------------------------------------------------------------- the same bits again


@pytest.mark.parametrize("memory", [None, *MEMORIES])
def test_the_same_seed_gives_the_same_bits(memory):
    runs = [trainer_of(memory) for _ in range(2)]
    for trainer in runs:
        for step in range(4):
            trainer.step(*fields(stream(step)))
    assert_same_run(*runs)
    other = trainer_of(memory, seed=5)
    for step in range(4):
        other.step(*fields(stream(step)))
    assert other.losses != runs[0].losses


@pytest.mark.parametrize("memory", ["recurrent:tokens=4", "window:size=24+store:top_k=4"])
def test_one_thread_and_two_give_the_same_bits(memory):
    """At sizes where the kernels do share out their work."""
    threads = mt.get_num_threads()
    runs = []
    try:
        for n in (1, 2):
            mt.set_num_threads(n)
            model = Transformer(config(vocab_size=200, d_model=64, n_heads=4, d_ff=96), seed=1)
            runs.append(trainer_of(memory, model=model))
            for step in range(10):
                runs[-1].step(*fields(stream(step, size=5, length=16, n=2, vocab_size=200)))
    finally:
        mt.set_num_threads(threads)
    assert_same_run(*runs)


@pytest.mark.parametrize("stopped_at", [1, 4, 7])  # in the warm-up, in the cosine
@pytest.mark.parametrize("memory", [None, "recurrent:tokens=2", "window:size=5", "store:top_k=2,merge=gate"])
def test_resuming_is_not_having_stopped(memory, stopped_at, tmp_path):
    whole, part = trainer_of(memory, total_steps=9), trainer_of(memory, total_steps=9)
    for step in range(9):
        whole.step(*fields(stream(step)))
    for step in range(stopped_at):
        part.step(*fields(stream(step)))
    part.save(tmp_path / "run")
    resumed = Trainer.resume(tmp_path / "run")
    assert_same_run(part, resumed)
    assert resumed.options == part.options
    assert (resumed.memory and resumed.memory.text) == memory
    for step in range(stopped_at, 9):
        resumed.step(*fields(stream(step)))
    assert_same_run(whole, resumed)


def test_resuming_a_fit_of_text_streams_is_not_having_stopped(tmp_path):
    data = TextStreams([np.random.default_rng(0).integers(3, 13, 90)], segment_length=4, n_segments=2, batch_size=3, seed=1)
    whole, part = trainer_of("recurrent:tokens=2", total_steps=8), trainer_of("recurrent:tokens=2", total_steps=8)
    losses = whole.fit(data, progress=False)["loss"]
    first = part.fit(data, 3, folder=tmp_path / "run", progress=False)["loss"]
    resumed = Trainer.resume(tmp_path / "run")
    assert first + resumed.fit(data, progress=False)["loss"] == losses == whole.losses
    assert_same_run(whole, resumed)


def test_a_saved_run_saved_again_is_the_same_bytes(tmp_path):
    trainer = trainer_of("recurrent:tokens=2", model=Transformer(config(vocab_size=300)))
    trainer.tokenizer = ByteTokenizer()
    trainer.step(*fields(stream(0)))
    trainer.save(tmp_path / "one")
    Trainer.resume(tmp_path / "one").save(tmp_path / "two")
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    assert set(one) == {"config.json", "model.safetensors", "training.json", "training.safetensors", "tokenizer_config.json"}


def test_a_strategy_of_this_process_is_handed_to_resume(tmp_path):
    class Last(RowMemory):
        def keep(self, scores, positions):
            return positions.astype(float)

    trainer = trainer_of(Last(size=3))
    trainer.step(*fields(stream(0)))
    trainer.save(tmp_path / "run")
    resumed = Trainer.resume(tmp_path / "run", memory=Last(size=3))
    for run in (trainer, resumed):
        run.step(*fields(stream(1)))
    assert_same_run(trainer, resumed)


# ------------------------------------------------------------------------------------------- fit


def test_fit_counts_validates_saves_and_tells(tmp_path):
    trainer, told = trainer_of(), []
    history = trainer.fit(
        stream,
        6,
        validation=lambda i: stream(100 + i),
        validate_every=2,
        validation_batches=2,
        folder=tmp_path / "run",
        save_every=4,
        on_step=lambda t, loss: told.append((t.step_count, loss)),
        progress=False,
    )
    assert [step for step, _ in told] == [1, 2, 3, 4, 5, 6]
    assert history["loss"] == trainer.losses == [loss for _, loss in told]
    assert [step for step, _ in history["validation"]] == [2, 4, 6]
    expected = np.average([trainer.evaluate(stream(100 + i)) for i in range(2)], weights=[stream(100 + i).n_tokens for i in range(2)])
    assert history["validation"][-1][1] == pytest.approx(expected, rel=1e-12)
    assert_same_run(trainer, Trainer.resume(tmp_path / "run"))


def test_fit_stops_after_its_seconds():
    trainer = trainer_of()
    assert trainer.fit(stream, seconds=0.0, progress=False)["loss"] == []
    assert 1 <= len(trainer.fit(stream, 10_000, seconds=0.05, progress=False)["loss"]) < 10_000


@pytest.mark.parametrize("place", ["between steps", "in a step", "in the data"])
def test_an_interrupt_saves_and_goes_on_to_the_caller(place, tmp_path, monkeypatch):
    trainer = trainer_of("recurrent:tokens=2")

    def interrupted(step):
        if place == "in the data" and step == 3:
            raise KeyboardInterrupt
        return stream(step)

    def on_step(trainer, loss):
        if place == "between steps" and trainer.step_count == 3:
            raise KeyboardInterrupt

    if place == "in a step":
        real = trainer._backward
        monkeypatch.setattr(
            trainer, "_backward", lambda *a, **k: real(*a, **k) if trainer.step_count < 3 else exec("raise KeyboardInterrupt")
        )
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(interrupted, 9, folder=tmp_path / "run", on_step=on_step, progress=False)
    resumed = Trainer.resume(tmp_path / "run")
    resumed.fit(stream, 9, progress=False)
    whole = trainer_of("recurrent:tokens=2")
    whole.fit(stream, 9, progress=False)
    assert_same_run(whole, resumed)


def test_an_interrupt_does_not_halve_a_step(tmp_path, monkeypatch):
    """The signal comes while the weights are being written: the step is finished first."""
    trainer = trainer_of("recurrent:tokens=2")
    real, calls = optimizer_module._core.adamw, []

    def interrupted(*args, **options):
        calls.append(1)
        real(*args, **options)
        if len(calls) == 3 * len(trainer.optimizer.groups) + 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(optimizer_module._core, "adamw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(stream, 9, folder=tmp_path / "run", progress=False)
    assert len(trainer.optimizer.groups) > 1 and trainer.step_count == 4
    monkeypatch.undo()
    resumed = Trainer.resume(tmp_path / "run")
    whole = trainer_of("recurrent:tokens=2")
    for run in (resumed, whole):
        run.fit(stream, 9, progress=False)
    assert_same_run(whole, resumed)


# ------------------------------------------------------------------------------------------- when it goes wrong


@pytest.mark.parametrize("memory", [None, "recurrent:tokens=2", "window:size=5"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_stops_and_changes_nothing(memory, value):
    trainer = trainer_of(memory)
    trainer.step(*fields(stream(0)))
    trainer.model.weights["decoder.0.feed_forward.out.weight"][0, 0] = value
    trainer.model.weights["encoder.0.feed_forward.out.weight"][0, 0] = value
    before = weights_of(trainer), trainer.optimizer.m.copy(), list(trainer.losses), trainer.optimizer.step_count
    with pytest.raises(TrainingError, match=r"^step 1: the loss is .*not finite \(largest gradients: \S+ .*\); the weights are those"):
        trainer.step(*fields(stream(1)))
    assert_same_bits(list(weights_of(trainer).values()), list(before[0].values()))
    assert_same_bits(trainer.optimizer.m, before[1])
    assert (trainer.losses, trainer.optimizer.step_count, trainer.step_count) == (before[2], before[3], 1)


def test_a_memory_that_makes_the_nan_is_blamed_for_it():
    class Broken(RowMemory):
        def view(self, state, site, layer, segment):
            view = super().view(state, site, layer, segment)
            return view and dataclasses.replace(view, bank=("hidden", np.full_like(view.bank[1], np.nan)))

        def keep(self, scores, positions):
            return positions.astype(float)

    with pytest.raises(PluginError, match=r"failed in view.*NaN"):
        trainer_of(Broken(size=3)).step(*fields(stream(0)))


def test_a_gradient_that_is_not_finite_is_named(monkeypatch):
    trainer = trainer_of()
    before = weights_of(trainer)
    real = trainer.optimizer.grad_norm

    def poisoned():
        trainer.optimizer.grads["encoder.0.attention.q.weight"][0, 0] = np.nan
        trainer.optimizer.grads["decoder.0.attention.k.bias"][0] = np.inf
        return real()

    monkeypatch.setattr(trainer.optimizer, "grad_norm", poisoned)
    with pytest.raises(TrainingError, match="step 0") as caught:
        trainer.step(*fields(stream(0)))
    named = re.search(r"largest gradients: (.*)\);", str(caught.value)).group(1)
    assert "encoder.0.attention.q.weight nan" in named and "decoder.0.attention.k.bias inf" in named
    assert_same_bits(list(weights_of(trainer).values()), list(before.values()))


def test_training_goes_on_after_a_refused_step():
    one, other = trainer_of(), trainer_of()
    for trainer, broken in ((one, True), (other, False)):
        for step in range(4):
            if broken and step == 2:
                kept = trainer.model.weights["embedding.weight"][5].copy()
                trainer.model.weights["embedding.weight"][5] = np.nan
                with pytest.raises(TrainingError):
                    trainer.step(*fields(stream(step)))
                trainer.model.weights["embedding.weight"][5] = kept
            trainer.step(*fields(stream(step)))
    assert_same_run(one, other)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda trainer: pickle.loads(pickle.dumps(trainer))], ids=["deepcopy", "pickle"])
def test_a_copied_trainer_goes_on_with_the_same_bits(copied):
    original = trainer_of("recurrent:tokens=2")
    batch = stream(1)
    original.step(*fields(batch))
    twin = copied(original)
    for _ in range(3):
        assert original.step(*fields(batch)) == twin.step(*fields(batch))
    for name, weight in original.model.weights.items():
        assert_same_bits(twin.model.weights[name], weight)
        assert not np.shares_memory(twin.model.weights[name], weight)


def test_two_trainers_of_one_model_take_turns():
    first = trainer_of()
    second = trainer_of(model=first.model)
    batch = stream(1)
    for trainer in (first, second, first, second):
        before = weights_of(trainer)
        assert np.isfinite(trainer.step(*fields(batch)))
        assert any((trainer.model.weights[name] != before[name]).any() for name in before)
    assert_same_bits(weights_of(first)["embedding.weight"], weights_of(second)["embedding.weight"])


def test_a_replaced_weight_is_trained():
    trainer, fresh = trainer_of(), trainer_of()
    name, value = "embedding.weight", np.full_like(trainer.model.weights["embedding.weight"], 0.5)
    trainer.model.weights[name] = value.copy()
    fresh.model.weights[name][...] = value
    batch = stream(1)
    assert trainer.step(*fields(batch)) == fresh.step(*fields(batch))
    assert_same_bits(trainer.model.weights[name], fresh.model.weights[name])
    assert (trainer.model.weights[name] != value).any()


@pytest.mark.parametrize("value, got", [(np.zeros((3, 3), np.float32), r"shape \(3, 3\)"), (None, "none")])
def test_a_replaced_weight_of_another_shape_is_named(value, got):
    trainer = trainer_of()
    trainer.model.weights["embedding.weight"] = value
    with pytest.raises(InvalidValue, match=rf"model.weights\['embedding.weight'\]: expected shape .* got {got}"):
        trainer.step(*fields(stream(1)))


def test_clipping_limits_the_norm():
    """Adam does not see a constant factor: the step's gradient is looked at through its first moment."""
    trainer = trainer_of(clip=0.01, dropout=0.0, source_dropout=0.0)
    trainer.step(*fields(stream(0)))
    assert np.linalg.norm(trainer.optimizer.grad) > 0.01
    assert np.linalg.norm(trainer.optimizer.m) / 0.1 == pytest.approx(0.01, rel=1e-3)


BAD_OPTIONS = {
    "learning_rate": [-1.0, None, "1e-3", float("nan"), True],
    "schedule": ["quadratic", None],
    "gradient_accumulation_steps": [0, None, 1.5, True],
    "early_stopping_patience": [0, -1, 1.5],
    "early_stopping_threshold": [-0.1, None],
    "warmup_steps": [-1, None],
    "total_steps": [0, -5, "many"],
    "weight_decay": [-0.1, None],
    "betas": [None, (0.9,), (0.9, 1.0), (-0.1, 0.9), ("a", "b"), 0.9],
    "eps": [-1e-9, 0, 1e-46, None],
    "clip": [-1.0, "no"],
    "dropout": [1.0, -0.1, None],
    "label_smoothing": [1.0, -0.1],
    "source_dropout": [1.0, -0.5],
    "bptt_segments": [0, -1, "all"],
    "seed": [-1, None, "a"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD_OPTIONS.items() for value in values], ids=str)
def test_options_are_checked(name, value):
    with pytest.raises(InvalidValue, match=f"Trainer: {name}: expected"):
        Trainer(tiny_model(), **{name: value})


ONES = np.full((2, 3, 4), 4)
BAD_BATCHES = {
    "no target": ((ONES, None), InvalidType, "target: expected token ids, got None"),
    "no source": ((None, ONES), InvalidType, "source: expected token ids, got None"),
    "rank 1": ((ONES[0, 0], ONES), InvalidValue, "source: expected shape"),
    "ragged": (([[4, 5], [4]], ONES), InvalidValue, "source: expected sequences of one length"),
    "ids out of range": ((ONES * 9, ONES), InvalidValue, "source: expected ids from 0"),
    "real numbers": ((ONES, ONES * 1.0), InvalidType, "target: expected integer"),
    "other batch": ((ONES, ONES[:1]), InvalidValue, r"target: expected \(batch, segments\) \(2, 3\)"),
    "other segments": ((ONES, ONES[:, :2]), InvalidValue, "target: expected"),
    "lengths too long": ((ONES, ONES, np.full((2, 3), 5)), InvalidValue, "source lengths: expected 0 to 4"),
    "lengths of rows alone": ((ONES, ONES, None, [4, 4]), InvalidValue, "target lengths: expected"),
    "lengths turned": ((ONES, ONES, None, np.full((3, 2), 4)), InvalidValue, "target lengths: expected"),
    "weights of another shape": ((ONES, ONES, None, None, np.ones((2, 4))), InvalidValue, "weights: expected shape"),
    "weights turned": ((ONES, ONES, None, None, np.ones((4, 3, 2))), InvalidValue, "weights: expected shape"),
    "weights that are text": ((ONES, ONES, None, None, "abc"), InvalidValue, "weights: expected"),
    "negative weights": ((ONES, ONES, None, None, -np.ones((2, 3, 4))), InvalidValue, "weights: expected"),
    "NaN weights": ((ONES, ONES, None, None, np.full((2, 3, 4), np.nan)), InvalidValue, "weights: expected"),
}


@pytest.mark.parametrize("kind", BAD_BATCHES)
def test_a_bad_batch_is_refused_before_anything_changes(kind):
    given, error, told = BAD_BATCHES[kind]
    trainer = trainer_of()
    before = weights_of(trainer)
    with pytest.raises(error, match=told):
        trainer.step(*given)
    assert trainer.step_count == 0
    assert_same_bits(list(weights_of(trainer).values()), list(before.values()))


def test_what_cannot_be_trained_is_refused():
    for call, error, told in (
        (lambda: Trainer("model"), InvalidType, "model: expected a Transformer, got str"),
        (lambda: Trainer(tiny_model(), "window"), InvalidType, "memory: expected a Memory"),
        (lambda: Trainer(tiny_model("encoder only")), InvalidValue, "model: expected a decoder"),
        (lambda: trainer_of(model=tiny_model("decoder only")).step(ONES, ONES), InvalidValue, "source: expected None"),
        (lambda: Trainer(tiny_model()).fit(stream), InvalidValue, "steps: expected"),
    ):
        with pytest.raises(error, match=told):
            call()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda about: about.pop("step_count"), "field 'step_count' is missing"),
        (lambda about: about["options"].update(learning_rate=-1), "learning_rate: expected"),
        (lambda about: about["options"].update(momentum=1), "unknown option 'momentum'"),
        (lambda about: about["options"].pop("seed"), "option 'seed' is missing"),
        (lambda about: about["options"].update(betas=[1, 2, 3]), "betas: expected"),
        (lambda about: about.update(options=[]), "options"),
        (lambda about: about.update(step_count="three"), "step_count"),
        (lambda about: about.update(step_count=-1), "step_count"),
        (lambda about: about.update(losses={}), "losses"),
        (lambda about: about.update(losses=["a"]), "losses"),
        (lambda about: about.update(tokens_seen=1.5), "tokens_seen"),
    ],
)
def test_a_spoilt_training_file_is_refused_by_field(change, told, tmp_path):
    trainer_of().save(tmp_path / "run")
    path = tmp_path / "run" / "training.json"
    about = json.loads(path.read_text())
    change(about)
    path.write_text(json.dumps(about))
    with pytest.raises(InvalidValue, match=told):
        Trainer.resume(tmp_path / "run")


def test_a_folder_without_a_run_is_refused(tmp_path):
    tiny_model().save(tmp_path / "model")
    with pytest.raises(FileProblem, match=r"training\.json"):
        Trainer.resume(tmp_path / "model")
    trainer_of().save(tmp_path / "run")
    assert set(read_safetensors(tmp_path / "run" / "training.safetensors")) == {"m", "v"}
    (tmp_path / "run" / "training.safetensors").unlink()
    with pytest.raises(FileProblem, match=r"training\.safetensors"):
        Trainer.resume(tmp_path / "run")
