"""Around a step: parts of a batch, early stopping, what is kept of a run, what is logged, the average of models."""

import csv
import dataclasses
import itertools
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_same_bits

import mini_tfm as mt
from mini_tfm.checkpoint.models import save_model
from mini_tfm.config import Config
from mini_tfm.data.batches import Batch, fields
from mini_tfm.errors import FileProblem, InvalidType, InvalidValue
from mini_tfm.text.tokenizers import ByteTokenizer
from mini_tfm.train import Trainer
from mini_tfm.train.average import average_models, last_checkpoints
from mini_tfm.train.logs import COLUMNS
from mini_tfm.train.parallel import shares
from mini_tfm.train.run_folder import digest
from mini_tfm.transformer import Transformer, load_checkpoint

sys.path.insert(0, str(Path(__file__).parent))  # `import runs`

from runs import data, fit, make_trainer


def small(dtype=np.float64, **changes):
    sizes = {"vocab_size": 13, "d_model": 8, "n_heads": 2, "n_encoder_layers": 1, "n_decoder_layers": 1, "d_ff": 12}
    return Transformer(Config(**{**sizes, **changes}), seed=1, dtype=dtype)


def ragged(seed=0, size=5, n=2, length=4):
    """A batch whose rows weigh differently: of other lengths, with weights, one of them empty; in some another document begins."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, length + 1, (size, n))
    lengths[1] = 0
    source, target = rng.integers(3, 13, (size, n, length)), rng.integers(3, 13, (size, n, length))
    begins = np.arange(size * n).reshape(size, n) % 3 == 0
    batch = Batch(source, target, np.maximum(lengths, 1), lengths, rng.random((size, n, length)), begins)
    return dataclasses.replace(batch, first=np.arange(batch.target_lengths.size).reshape(batch.target_lengths.shape))


# ------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("memory", [None, "recurrent:tokens=2", "window:size=3+store:top_k=2"])
@pytest.mark.parametrize("parts", [2, 3, 5, 8])
def test_a_batch_in_parts_is_the_batch_up_to_summation(memory, parts):
    """In float64, with hidden sources; 8 parts of 5 rows leave some empty."""
    runs = []
    for n in (1, parts):
        made = mt.memory(memory) if memory else None
        runs.append(Trainer(small(), made, gradient_accumulation_steps=n, source_dropout=0.4, label_smoothing=0.1, clip=0.05, seed=3))
        for step in range(3):
            runs[-1].step(*fields(ragged(step)))
    one, other = runs
    np.testing.assert_allclose(other.losses, one.losses, rtol=1e-12)
    assert other.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-9) and one.gradient_norm > 0.05
    np.testing.assert_allclose(other.optimizer.grad, one.optimizer.grad, rtol=1e-9, atol=1e-13)
    assert np.abs(other.optimizer.arena - one.optimizer.arena).max() < 1e-9  # Adam makes +-1e-13 of a gradient that is 0
    assert other.tokens_seen == one.tokens_seen


def test_each_part_draws_masks_of_its_own():
    """Two equal rows in two parts: the same loss without dropout, another with it."""
    row = np.full((1, 4), 5)
    for dropout in (0.0, 0.5):
        trainer = Trainer(small(), gradient_accumulation_steps=2, dropout=dropout)
        found, real = [], trainer._add_gradients
        trainer._add_gradients = lambda *a, real=real, found=found: found.append(real(*a)) or found[-1]
        trainer.step(np.repeat(row, 2, 0), np.repeat(row, 2, 0))
        assert (found[0] == found[1]) == (dropout == 0)


def test_rows_are_shared_out_evenly():
    for rows, parts in ((7, 3), (3, 7), (8, 4), (0, 2), (1, 1)):
        cut = shares(rows, parts)
        sizes = [part.stop - part.start for part in cut]
        assert np.concatenate([np.arange(rows)[part] for part in cut]).tolist() == list(range(rows))
        assert len(cut) == parts and max(sizes) - min(sizes) <= 1
    coarse, fine = shares(11, 2), shares(11, 6)  # three parts of each of two ranks
    assert [part.start for part in coarse] == [fine[0].start, fine[3].start]


# ------------------------------------------------------------------------------------------- early stopping


def scripted(losses, **options):
    """A trainer whose validations find these losses, one after the other."""
    trainer, left = make_trainer(total_steps=60, **options), iter(losses)
    trainer.evaluate = lambda batch: next(left)
    return trainer


@pytest.mark.parametrize(
    ("losses", "options", "stopped", "best"),
    [
        ([5, 4, 3, 3.5, 3.2, 9], {"early_stopping_patience": 2}, 5, [3, 3.0]),
        ([5, 4, 4, 4, 3, 9], {"early_stopping_patience": 3}, None, [5, 3.0]),
        ([5, 4.95, 4.91, 4.5, 4.4, 4.3], {"early_stopping_patience": 2, "early_stopping_threshold": 0.2}, 3, [1, 5.0]),
        ([5, 4.95, 4.7, 4.6, 4.55, 9], {"early_stopping_patience": 2, "early_stopping_threshold": 0.2}, 5, [3, 4.7]),
        ([5, 6, 7, 8, 9, 9], {"early_stopping_patience": None}, None, [1, 5.0]),
    ],
)
def test_a_run_stops_when_nothing_gets_better(losses, options, stopped, best):
    trainer = scripted(map(float, losses), **options)
    history = trainer.fit(data(), 6, validation=data(seed=2), validate_every=1, validation_batches=1, progress=False)
    assert trainer.step_count == (stopped or 6) and trainer.stopped_early == (stopped is not None)
    assert trainer.best == best
    assert [step for step, _ in history["validation"]] == list(range(1, trainer.step_count + 1))


def test_the_best_is_kept_and_the_last_stays(tmp_path):
    trainer = scripted([5.0, 3.0, 4.0, 4.0, 4.0], early_stopping_patience=3)
    seen = {}
    trainer.fit(data(), 20, validation=data(seed=2), validate_every=2, validation_batches=1, save_best=True, folder=tmp_path / "run",
                on_step=lambda t, loss: seen.update({t.step_count: t.optimizer.arena.copy()}), progress=False)  # fmt: skip
    assert trainer.step_count == 10 and trainer.best == [4, 3.0]
    best, last = load_checkpoint(tmp_path / "run" / "best"), load_checkpoint(tmp_path / "run")
    for step, saved in ((4, best), (10, last)):
        trainer.optimizer.arena[:] = seen[step]
        assert_same_bits([saved.model.weights[n] for n in trainer.model.weights], list(trainer.model.weights.values()))
    assert best.memory_text == "recurrent:tokens=2"
    stopped = Trainer.resume(tmp_path / "run")
    assert stopped.fit(data(), 20, validation=data(seed=2), progress=False, folder=tmp_path / "run")["loss"] == []
    stopped.options = stopped.options.replace(early_stopping_patience=4)  # more patience goes on
    stopped.evaluate = lambda batch: 9.0
    assert len(stopped.fit(data(), 20, validation=data(seed=2), progress=False, folder=tmp_path / "run")["loss"]) == 2


def test_what_nothing_can_judge_or_keep_is_refused(tmp_path):
    plain = {"early_stopping_patience": None}
    for options, given, told in (
        ({}, {}, "validation: expected data"),
        (plain, {"save_best": True, "folder": tmp_path / "run"}, "validation: expected data"),
        (plain, {"save_best": True, "validation": data(seed=2)}, "folder: expected a path"),
        (plain, {"save_total_limit": 2}, "folder: expected a path"),
        (plain, {"validate_every": 0}, "fit: validate_every: expected an integer of at least 1, got 0"),
        (plain, {"save_every": 1.5, "save_total_limit": -1}, "fit: save_every: .*; save_total_limit: "),
        (
            plain,
            {"save_best": "yes", "jsonl_log": 3},
            "fit: save_best: expected True or False.*; jsonl_log: expected a path or None, got 3",
        ),
    ):
        trainer = make_trainer(**options)
        with pytest.raises(InvalidValue, match=told):
            trainer.fit(data(), 2, progress=False, **given)
        assert trainer.step_count == 0
    assert not (tmp_path / "run").exists()
    for given, told in (({"data": [1, 2]}, "data: expected an object with batch"),
                        ({"validation": "text"}, "validation: expected an object with batch")):  # fmt: skip
        with pytest.raises(InvalidType, match=told):
            make_trainer(**plain).fit(**{"data": data(), "steps": 2, "progress": False, **given})


# ------------------------------------------------------------------------------------------- checkpoints


def test_the_last_saves_are_kept_as_models(tmp_path):
    trainer, seen = make_trainer(early_stopping_patience=None), {}
    trainer.fit(data(), 7, folder=tmp_path / "run", save_every=2, save_total_limit=2, progress=False,
                on_step=lambda t, loss: seen.update({t.step_count: t.optimizer.arena.copy()}))  # fmt: skip
    assert last_checkpoints(tmp_path / "run", 2) == [tmp_path / "run" / f"checkpoint-{step}" for step in (4, 6)]
    assert sorted(path.name for path in (tmp_path / "run").glob("*-*")) == ["checkpoint-4", "checkpoint-6"]
    trainer.optimizer.arena[:] = seen[4]
    saved = load_checkpoint(tmp_path / "run" / "checkpoint-4").model.weights
    assert_same_bits([saved[n] for n in trainer.model.weights], list(trainer.model.weights.values()))
    with pytest.raises(InvalidValue, match=r"expected at least 3 folders checkpoint-<step>, found 2; train with save_total_limit=3"):
        last_checkpoints(tmp_path / "run", 3)


def test_what_a_cut_off_run_left_of_later_steps_is_not_taken_for_newer(tmp_path):
    """A run was at step 99 and is resumed at 0: its saves at 2, 4 and 6 must not be pruned in favour of 99's."""
    trainer = make_trainer(early_stopping_patience=None)
    save_model(tmp_path / "run" / "checkpoint-99", trainer.model)
    trainer.fit(data(), 6, folder=tmp_path / "run", save_every=2, save_total_limit=2, progress=False)
    assert sorted(path.name for path in (tmp_path / "run").glob("*-*")) == ["checkpoint-4", "checkpoint-6", "checkpoint-99"]


def test_the_average_is_that_of_float64(tmp_path):
    """Numbers that float32 cannot add up: 1, and 2^-24 twice."""
    memory = mt.memory("recurrent:tokens=2")
    folders = []
    for i, value in enumerate((1.0, 2.0**-24, 2.0**-24)):
        model = small(np.float32)
        model.add_memory_weights(memory)
        for weight in model.weights.values():
            weight[...] = value
        folders.append(tmp_path / str(i))
        save_model(folders[-1], model, memory_text=memory and memory.text)
    assert average_models(folders, tmp_path / "out") == folders
    out = load_checkpoint(tmp_path / "out")
    assert out.memory_text == "recurrent:tokens=2" and "memory.recurrent.tokens" in out.model.weights
    expected = np.float32((1 + 2.0**-23) / 3)
    assert expected != np.float32(1 / 3) and all((weight == expected).all() for weight in out.model.weights.values())


def test_models_that_differ_are_not_averaged(tmp_path):
    save_model(tmp_path / "a", small(np.float32), tokenizer=None)
    others = {
        "width": (small(np.float32, d_ff=16), {}, "d_ff is 16, expected 12"),
        "layers": (small(np.float32, n_decoder_layers=2), {}, "n_decoder_layers is 2, expected 1"),
        "memory": (small(np.float32), {"memory_text": "window:size=4"}, "its memory is window:size=4, expected None"),
        "positions": (small(np.float32, activation="gelu"), {}, "activation is gelu, expected relu"),
    }
    for name, (model, more, told) in others.items():
        save_model(tmp_path / name, model, **more)
        with pytest.raises(InvalidValue, match=f"{name} differs from .*a: {told}"):
            average_models([tmp_path / "a", tmp_path / name], tmp_path / "out")
    wide = {"vocab_size": 300}
    save_model(tmp_path / "b", small(np.float32, **wide))
    save_model(tmp_path / "tokens", small(np.float32, **wide), tokenizer=ByteTokenizer())
    with pytest.raises(InvalidValue, match="tokenizer differs"):
        average_models([tmp_path / "b", tmp_path / "tokens"], tmp_path / "out")
    with pytest.raises(InvalidValue, match="expected at least one"):
        average_models([], tmp_path / "out")
    with pytest.raises(InvalidType, match="expected a list of folders"):
        average_models(tmp_path / "a", tmp_path / "out")
    with pytest.raises(FileProblem, match="nothing"):
        average_models([tmp_path / "a", tmp_path / "nothing"], tmp_path / "out")
    with pytest.raises(InvalidValue, match="holds a model already"):
        average_models([tmp_path / "a"], tmp_path / "a")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------- logs


def test_logs_tell_what_there_was(tmp_path):
    trainer, rates, norms, tokens = make_trainer(), [], [], []

    def on_step(trainer, loss):
        norms.append(trainer.gradient_norm)
        rates.append(trainer.learning_rate)
        tokens.append(trainer.tokens_seen)

    fit(trainer, tmp_path / "run", steps=5, on_step=on_step)
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    with open(tmp_path / "run.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5] and list(rows[0]) == list(COLUMNS)
    assert [line["loss"] for line in lines] == trainer.losses
    assert [line["learning_rate"] for line in lines] == [make_trainer().learning_rate, *rates[:-1]]
    assert [line["gradient_norm"] for line in lines] == norms and [line["tokens"] for line in lines] == tokens
    assert [[line["step"], line["validation_loss"]] for line in lines if "validation_loss" in line] == trainer.validations
    assert all(0 < a["seconds"] < b["seconds"] for a, b in itertools.pairwise(lines))
    for line, row in zip(lines, rows, strict=True):
        assert {name: float(value) for name, value in row.items() if value} == line


def test_a_log_that_an_older_version_began_keeps_its_columns(tmp_path):
    fit(make_trainer(), tmp_path / "run", steps=3)
    path = tmp_path / "run.csv"
    lines = path.read_text().splitlines()
    path.write_text("".join(line.rpartition(",")[0] + "\n" for line in lines))  # as it was without memory_loss
    fit(Trainer.resume(tmp_path / "run"), tmp_path / "run", steps=5)
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert list(rows[0]) == list(COLUMNS[:-1]) and [row["step"] for row in rows] == ["1", "2", "3", "4", "5"]
    assert all(row["seconds"] and None not in row for row in rows)


@pytest.mark.parametrize("name", ["run.jsonl", "run.csv"])
def test_a_log_that_is_not_this_runs_is_left_alone(name, tmp_path):
    other = tmp_path / "other"
    fit(make_trainer(seed=9), other, steps=5)
    fit(make_trainer(), tmp_path / "run", steps=3)
    path = tmp_path / name
    strange = {"of another run": path.with_stem("other").read_text(), "no log": "step by step\n", "binary": "\x00\x01\n"}
    for kind, text in strange.items():
        path.write_text(text)
        for trainer in (Trainer.resume(tmp_path / "run"), make_trainer()):
            with pytest.raises(InvalidValue, match=r"run\.(jsonl|csv): (holds the log of another run|is not the log of a run)"):
                fit(trainer, tmp_path / "run", steps=6)
            assert path.read_text() == text, kind
    path.unlink()
    path.mkdir()
    with pytest.raises(FileProblem, match=path.name):
        fit(Trainer.resume(tmp_path / "run"), tmp_path / "run", steps=6)


def events(folder):
    """(step, tag, value) of all scalars in a folder of event files, and the steps at which a later part begins."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found, starts = [], []
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        rest = path.read_bytes()
        while rest:
            (length,) = struct.unpack("<Q", rest[:8])
            event = Event.FromString(rest[12 : 12 + length])
            rest = rest[16 + length :]
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            starts += [event.step] if event.session_log.status == SessionLog.START else []
    return found, starts


def test_event_files_hold_the_same(tmp_path):
    pytest.importorskip("tensorboardX")
    folder, board = tmp_path / "run", tmp_path / "board"
    fit(make_trainer(), folder, steps=3, tensorboard_log=board)
    trainer = Trainer.resume(folder)
    fit(trainer, folder, steps=5)
    found, starts = events(board)
    assert starts == [4]  # TensorBoard forgets what a killed run wrote of this step and later ones
    losses = [(step, value) for step, tag, value in found if tag == "loss/train"]
    assert losses == [(i + 1, np.float32(loss)) for i, loss in enumerate(trainer.losses)]
    validations = [(step, value) for step, tag, value in found if tag == "loss/validation"]
    assert validations == [(step, np.float32(loss)) for step, loss in trainer.validations]
    assert {tag for _, tag, _ in found} >= {"train/learning_rate", "train/gradient_norm", "train/tokens", "train/seconds"}


def test_without_tensorboardx_it_is_told_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(InvalidValue, match=r"tensorboard_log: needs tensorboardX .*pip install 'mini-tfm\[tensorboard\]'"):
        fit(make_trainer(), tmp_path / "run", tensorboard_log=tmp_path / "board")


class Terminal:
    def __init__(self, is_one=True):
        self.text, self.is_one = "", is_one

    def write(self, text):
        self.text += text
        return len(text)

    def flush(self):
        pass

    def isatty(self):
        return self.is_one


@pytest.mark.parametrize("columns", [200, 80, 60, 40])
def test_progress_tells_the_step_at_any_width_and_speed_and_rate_where_there_is_room(columns, monkeypatch):
    from mini_tfm import progress

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    with progress.training_progress(True, 1000, 998) as tell:
        tell(2.5, 3.25, 1.5e-3, 640)
        tell(2.25, 3.25, 1e-3, 640)
    more = {200: ("validation 3.250", "rate 0.001", "tokens/s", "loss 2.250"), 60: ("loss 2.250",)}
    for word in ("1000/1000", "left", *more.get(columns, ())):
        assert word in terminal.text, word
    assert "\u2026" not in terminal.text, "a word was cut"


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_off_a_terminal_progress_is_a_line_now_and_then(seconds, monkeypatch):
    from mini_tfm import progress

    file = Terminal(is_one=False)
    monkeypatch.setattr(progress.sys, "stderr", file)
    monkeypatch.setattr(progress, "SECONDS_A_LINE", seconds)
    with progress.training_progress(True, 3, 1) as tell:
        tell(2.5, None)
        tell(2.25, 3.25, 1e-3, 640)
    with progress.progress_bar("reading", 4000, "bytes") as advance:
        advance(1000)
    lines = file.text.splitlines()
    if seconds:
        assert not lines
        return
    assert len(lines) == 3 and lines[0].startswith("training: 2 of 3 steps, loss 2.500, ") and lines[0].endswith(" s left")
    assert "loss 2.250, validation 3.250, rate 0.001" in lines[1] and lines[2].startswith("reading: 1,000 of 4,000 bytes, ")


def test_the_time_left_is_told_from_the_pace_of_late(monkeypatch):
    """Work that becomes slower, as reading into a store does: of 30 units ten take 10 s and ten more 100 s, so ten are 100 s away."""
    from mini_tfm import progress

    file, now = Terminal(is_one=False), [0.0]
    monkeypatch.setattr(progress.sys, "stderr", file)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.progress_bar("reading", 30, "rows") as advance:
        for seconds in (10, 100):
            now[0] += seconds
            advance(10)
    assert [line.split(", ")[-1] for line in file.text.splitlines()] == ["20 s left", "100 s left"]


def test_rows_that_are_cut_keep_all_their_fields():
    """What a batch has besides token ids is cut with it."""
    from mini_tfm.train.trainer import _rows_of

    batch = ragged()
    part = _rows_of(batch, slice(1, 3))
    for field in dataclasses.fields(batch):
        assert_same_bits(getattr(part, field.name), getattr(batch, field.name)[1:3])


def test_a_digest_is_of_all_fields():
    """By which a resumed run knows its data again."""
    batch = ragged()
    found = {digest(batch)}
    for field in dataclasses.fields(batch):
        changed = getattr(batch, field.name).copy()
        changed.flat[-1] = 1 - changed.flat[-1]
        found.add(digest(dataclasses.replace(batch, **{field.name: changed})))
    assert len(found) == 1 + len(dataclasses.fields(batch)) and digest(ragged()) in found
