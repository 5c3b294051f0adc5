"""A run that is killed, anywhere, and resumed is the run that was not stopped, to the bit; what would spoil one is refused."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import mini_tfm as mt
from mini_tfm.config import Config
from mini_tfm.data.batches import fields
from mini_tfm.errors import FileProblem, InvalidType, InvalidValue, TrainingError
from mini_tfm.files import folders
from mini_tfm.train import Trainer, logs
from mini_tfm.transformer import Transformer, load_checkpoint

sys.path.insert(0, str(Path(__file__).parent))  # `import runs`, here and in the processes started below

from runs import FIT, STEPS, data, fit, log_lines, make_trainer, state

# Where a process kills itself. "write" is the n-th os.write of all: a save is some of them, each of best/, checkpoint-<step>/
# and the run itself.
CUTS = {
    "after a step": ("step", 4),
    "before the first save": ("step", 2),
    "at the end of an epoch": ("step", 5),
    "in mid-accumulation": ("part", 7 * 3 + 1),
    "before the optimizer": ("adamw", 9),
    "in a validation": ("evaluate", 2 * 3 + 1),
    "while the best is saved": ("write", 5),
    "while a checkpoint is saved": ("write", 33),
    "while the run is saved": ("rename", 6),
    "when it is saved and not yet told": ("fsync folder", 12),
    "in the middle of a log's line": ("line", 8),
    "at the last step": ("step", STEPS),
}

KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import runs
from mini_tfm.files import folders
from mini_tfm.train import logs, optimizer, trainer
place, n, folder = sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
count = 0

def killing(real, before=lambda *a: None):
    def call(*args, **options):
        global count
        count += 1
        if count == n:
            before(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)
    return call

def half_a_line(log, record):
    log._append('{"step": 8, "lo')

for name, (owner, attribute) in {"part": (trainer.Trainer, "_add_gradients"), "evaluate": (trainer.Trainer, "evaluate"),
                                 "adamw": (optimizer.AdamW, "step"), "write": (folders.os, "write"), "rename": (folders, "_put"),
                                 "fsync folder": (folders, "fsync_folder"), "line": (logs.JsonLines, "write")}.items():
    if place == name:
        setattr(owner, attribute, killing(getattr(owner, attribute), *([half_a_line] if name == "line" else [])))

def on_step(trainer, loss):
    if place == "step" and trainer.step_count == n:
        os.kill(os.getpid(), signal.SIGKILL)

runs.fit(runs.make_trainer(), folder, on_step=on_step)
"""


def killed(place, n, folder, threads):
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "error"}
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), place, str(n), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, (done.returncode, done.stderr)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    trainer = make_trainer()
    fit(trainer, folder)
    return state(trainer), log_lines(folder), {path.name for path in folder.iterdir()}, Path(folder)


@pytest.mark.parametrize("cut", CUTS)
def test_a_killed_run_goes_on_as_if_it_had_not_been(cut, whole, tmp_path):
    folder, threads = tmp_path / "run", mt.get_num_threads()
    number = list(CUTS).index(cut)
    killed(*CUTS[cut], folder, threads=1 + number % 2)
    try:
        mt.set_num_threads(2 - number % 2)
        began = (folder / "training.json").exists()
        trainer = Trainer.resume(folder) if began else make_trainer()
        if not began:  # nothing was acknowledged; a new run does not write over what there is of a log
            for log in ("run.jsonl", "run.csv"):
                (tmp_path / log).unlink(missing_ok=True)
        fit(trainer, folder)
    finally:
        mt.set_num_threads(threads)
    expected, lines, names, other = whole
    assert state(trainer) == expected == state(Trainer.resume(folder))
    assert log_lines(folder) == lines
    assert {path.name for path in folder.iterdir()} == names
    for inside in ("best", f"checkpoint-{STEPS}", f"checkpoint-{STEPS - 3}"):
        one, two = load_checkpoint(folder / inside).model.weights, load_checkpoint(other / inside).model.weights
        assert all(one[name].tobytes() == two[name].tobytes() for name in two)
    assert not [path.name for path in tmp_path.iterdir() if ".saving-" in path.name]


def test_a_run_remembers_what_fit_was_told(tmp_path):
    folder = tmp_path / "run"
    fit(make_trainer(), folder, steps=5)
    resumed = Trainer.resume(folder)
    assert {name: getattr(resumed.fit_options, name) for name in FIT} == FIT
    assert resumed.options.gradient_accumulation_steps == 3 and resumed.seconds > 0
    resumed.fit(data(), validation=data(seed=2), folder=folder, progress=False)
    assert [line["step"] for line in log_lines(folder)[0]] == list(range(1, STEPS + 1))
    assert (folder / f"checkpoint-{STEPS}").is_dir()


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (data(seed=3), "seed was 1, is 3"),
        (data(batch_size=3), "batch_size was 4, is 3"),
        (data(seed=3).batch, "batch 4 has changed"),  # a function has no state
    ],
    ids=["seed", "batch size", "function"],
)
def test_other_data_is_refused_and_nothing_lost(other, told, tmp_path):
    folder = tmp_path / "run"
    fit(make_trainer(), folder, steps=5)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InvalidValue, match=f"data: differs from the data this run was trained on: {told}; give the same.*other_data=True"):
        Trainer.resume(folder).fit(other, validation=data(seed=2), folder=folder, progress=False)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    trainer = Trainer.resume(folder)
    trainer.fit(other, 6, validation=data(seed=2), folder=folder, progress=False, other_data=True)
    assert trainer.step_count == 6


class Kept:
    """Data whose state does not name all that its batches depend on."""

    def __init__(self, seed, state):
        self.batch, self.state = data(seed=seed).batch, state


def test_a_batch_shows_what_no_state_names(tmp_path):
    trainer = make_trainer(early_stopping_patience=None)
    trainer.fit(Kept(1, {"corpus": "a"}), 3, folder=tmp_path / "run", progress=False)
    assert Trainer.resume(tmp_path / "run").data_state == {"corpus": "a"}
    for other, told in ((Kept(2, {"corpus": "a"}), "batch 2 has changed"), (Kept(1, {"corpus": "b"}), "corpus has changed")):
        with pytest.raises(InvalidValue, match=told):
            Trainer.resume(tmp_path / "run").fit(other, 4, progress=False)
    again = Trainer.resume(tmp_path / "run")
    again.fit(Kept(2, {"corpus": "b"}), seconds=1e-9, folder=tmp_path / "run", progress=False, other_data=True)
    assert again.step_count == 3, "no time for a step"
    Trainer.resume(tmp_path / "run").fit(Kept(2, {"corpus": "b"}), 4, progress=False)  # what was accepted is what it is now
    again.fit(Kept(1, None), 4, progress=False)  # in one process, whoever calls knows what is given
    assert again.data_state is None


@pytest.mark.parametrize(("state", "told"), [([1], "a mapping"), ({"a": {1}}, "plain data"), ({"a": float("nan")}, "plain data")])
def test_a_state_that_cannot_be_saved_is_refused(state, told):
    with pytest.raises(InvalidType, match=f"data: state: expected {told}"):
        make_trainer(early_stopping_patience=None).fit(Kept(1, state), 1, progress=False)


def test_another_memory_is_refused(tmp_path):
    fit(make_trainer(), tmp_path / "run", steps=2)
    with pytest.raises(InvalidValue, match=r"memory: .*trained with recurrent:tokens=2.*got window:size=4"):
        Trainer.resume(tmp_path / "run", mt.memory("window:size=4"))


def test_a_folder_of_version_0_1_0_is_resumed(tmp_path):
    """Its training.json has four fields, and options that know neither parts nor early stopping."""
    folder = tmp_path / "run"
    trainer = make_trainer(gradient_accumulation_steps=1, early_stopping_patience=None)
    trainer.fit(data(), 4, folder=folder, progress=False)
    about = json.loads((folder / "training.json").read_text())
    old = {name: about[name] for name in ("options", "step_count", "tokens_seen", "losses")}
    for name in ("gradient_accumulation_steps", "early_stopping_patience", "early_stopping_threshold"):
        del old["options"][name]
    (folder / "training.json").write_text(json.dumps(old))
    resumed = Trainer.resume(folder)
    assert state(resumed) == state(trainer)
    resumed.fit(data(), 6, progress=False)


@pytest.mark.parametrize("at", ["config.json", "model.safetensors", "training.json", "training.safetensors"])
def test_a_save_during_a_resume_mixes_nothing(at, tmp_path, monkeypatch):
    """A save replaces the folder just before one of its files is opened, by whatever name."""
    folder, trainer = tmp_path / "run", make_trainer()
    fit(trainer, folder, steps=3)
    saved, real = [state(trainer)], os.open

    def opened(path, *args, **options):
        if os.fspath(path).endswith(at) and len(saved) == 1:
            saved.append(None)  # the save opens files, too
            trainer.step(*fields(data().batch(3)))
            trainer.save(folder)
            saved[1] = state(trainer)
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", opened)
    resumed = state(Trainer.resume(folder))
    assert len(saved) == 2 and saved[0] != saved[1] and resumed in saved


def test_resumes_while_a_run_is_saved_are_whole(tmp_path):
    folder, trainer, steps = tmp_path / "run", make_trainer(total_steps=20), 15
    states, begun = {}, threading.Event()

    def save_them():
        for step in range(steps):
            trainer.step(*fields(data().batch(step)))
            states[step + 1] = state(trainer)
            trainer.save(folder)
            begun.set()

    saver = threading.Thread(target=save_them)
    saver.start()
    begun.wait(30)
    seen = []
    while saver.is_alive():
        seen.append(Trainer.resume(folder))
    saver.join()
    assert seen
    for resumed in seen:
        assert state(resumed) == states[resumed.step_count]


# The disk


@pytest.mark.filterwarnings("ignore:step 6. .*training goes on")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_is_told_and_the_last_save_stays(code, tmp_path, monkeypatch):
    """All writes from the k-th on of the save at step 6 fail: of its checkpoint's files, and of its own."""
    folder, real = tmp_path / "run", os.write
    fit(make_trainer(), folder, steps=3, save_best=False)
    saved = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for k in (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377):
        trainer, count = Trainer.resume(folder), [0]

        def write(fd, buffer, k=k, count=count):
            count[0] += 1
            if count[0] >= k:
                raise OSError(code, os.strerror(code))
            return real(fd, buffer)

        monkeypatch.setattr(folders.os, "write", write)
        try:
            fit(trainer, folder, steps=6, save_best=False)
            break  # fewer writes than k: it was saved
        except FileProblem as error:
            assert os.strerror(code) in str(error) and "nothing was changed" in str(error)
        finally:
            monkeypatch.undo()
        kept = {name: (folder / name).read_bytes() for name in saved}
        assert kept == saved and Trainer.resume(folder).step_count == 3
    assert 34 < k < 377 and Trainer.resume(folder).step_count == 6
    assert not [path for path in tmp_path.rglob("*") if ".saving-" in path.name]


def test_a_disk_that_is_full_for_a_while_costs_no_step(tmp_path, monkeypatch):
    folder, real, is_full = tmp_path / "run", os.write, [True]

    def write(fd, buffer):
        if is_full[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, buffer)

    def make_room(trainer, loss):
        is_full[0] = trainer.step_count < 7

    monkeypatch.setattr(folders.os, "write", write)
    with pytest.warns(UserWarning, match="No space left.*training goes on") as told:
        trainer = make_trainer()
        fit(trainer, folder, on_step=make_room)
    assert {"step 3", "step 6"} <= {str(each.message).split(":")[0] for each in told}
    assert Trainer.resume(folder).step_count == 12 and trainer.saved == (12, folder)


@pytest.mark.parametrize("at", [4, 11])
def test_a_model_that_came_meanwhile_stays_and_so_does_the_run(at, tmp_path):
    folder, other = tmp_path / "run", tmp_path / "other"
    fit(make_trainer(seed=9), other, steps=1)

    def meddle(trainer, loss):
        if trainer.step_count == at:
            shutil.rmtree(folder)
            shutil.copytree(other, folder)

    with pytest.warns(UserWarning, match="holds a model now that is not of this run, which is saved in .*run-2"):
        trainer = make_trainer()
        fit(trainer, folder, on_step=meddle)
    assert Trainer.resume(folder).step_count == 1
    assert trainer.saved == (12, tmp_path / "run-2") and Trainer.resume(tmp_path / "run-2").step_count == 12


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("kind", ["jsonl_log", "csv_log", "tensorboard_log"])
def test_a_log_on_a_full_disk_ends_and_training_does_not(kind, tmp_path, monkeypatch):
    """Once is enough to tell it, and no step is lost."""
    folder, opened = tmp_path / "run", []
    if kind == "tensorboard_log":
        pytest.importorskip("tensorboardX")
    kind_of, started = logs.KINDS[kind], logs.Logs.__enter__

    def enter(self):
        entered = started(self)
        opened.extend(log for log in self._open if isinstance(log, kind_of))
        return entered

    def fill(trainer, loss):
        if trainer.step_count == 2:
            (log,) = opened
            if kind == "tensorboard_log":
                log._writer._writer.close()
                log._writer._writer = open("/dev/full", "wb")  # noqa: SIM115
                log.FLUSH_SECONDS = 0.0
            else:
                log._file.close()
                log._file = open("/dev/full", "w")  # noqa: SIM115

    monkeypatch.setattr(logs.Logs, "__enter__", enter)
    with pytest.warns(UserWarning, match="the log cannot be written: No space left.*training goes on without this log") as told:
        trainer = make_trainer()
        fit(trainer, folder, on_step=fill, **{kind: tmp_path / "log"})
    assert len(told) == 1 and str(tmp_path / "log") in str(told[0].message)
    assert Trainer.resume(folder).step_count == 12 == trainer.step_count
    other = "csv" if kind != "csv_log" else "jsonl"
    assert len((tmp_path / f"run.{other}").read_text().splitlines()) == 12 + (other == "csv")


def test_a_log_that_cannot_be_begun_is_an_error(tmp_path):
    (tmp_path / "log").mkdir()
    with pytest.raises(FileProblem, match="log: "):
        make_trainer().fit(data(), 3, validation=data(seed=2), progress=False, csv_log=tmp_path / "log")


def test_an_error_of_someone_else_loses_no_step(tmp_path):
    def fails(trainer, loss):
        if trainer.step_count == 4:
            raise BrokenPipeError("nobody listens")

    with pytest.raises(BrokenPipeError, match="nobody listens"):
        fit(make_trainer(), tmp_path / "run", on_step=fails)
    assert Trainer.resume(tmp_path / "run").step_count == 4


# What is not finite


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    folder = tmp_path / "run"
    trainer = make_trainer()
    fit(trainer, folder, steps=3)

    def spoil(trainer, loss):
        if trainer.step_count == 5:
            trainer.optimizer.m[-1] = np.inf  # the loss and the gradient of step 6 are finite all the same

    with pytest.raises(TrainingError, match=r"step 6: weights are not finite .* and not saved"):
        fit(trainer, folder, on_step=spoil)
    resumed = Trainer.resume(folder)
    assert resumed.step_count == 3 and np.isfinite(resumed.optimizer.arena).all()
    with pytest.raises(TrainingError, match="not finite"):
        trainer.save(folder)


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(tmp_path):
    folder = tmp_path / "run"
    trainer = make_trainer()

    def spoil(trainer, loss):
        if trainer.step_count == 4:
            trainer.model.weights["decoder.0.feed_forward.out.weight"][0, 0] = np.nan

    with pytest.raises(TrainingError, match=r"step 4: the loss is nan at streams 0, 1, 2, 3 of batch 4 .*largest gradients: \S+"):
        fit(trainer, folder, on_step=spoil)
    assert Trainer.resume(folder).step_count == 3


@pytest.mark.parametrize("parts", [1, 3])
def test_the_row_that_is_not_finite_is_named(parts):
    config = Config(vocab_size=13, d_model=8, n_heads=2, n_encoder_layers=1, n_decoder_layers=1, d_ff=12, tie_embeddings=False)
    trainer = Trainer(Transformer(config), gradient_accumulation_steps=parts)
    trainer.model.weights["embedding.weight"][12] = np.nan
    source = np.full((6, 4), 5)
    trainer.step(source, source)
    source[4, 1] = 12
    with pytest.raises(TrainingError, match=r"^step 1: the loss is nan at stream 4 of batch 1 .*largest gradients: \S+ "):
        trainer.step(source, source)


def test_a_validation_that_is_not_finite_stops(tmp_path):
    trainer = make_trainer()
    trainer.evaluate = lambda batch: float("nan")
    with pytest.raises(TrainingError, match="step 2: the loss of validation batch 0 is nan; the last save stays as it was"):
        fit(trainer, tmp_path / "run")
    assert not (tmp_path / "run").exists()
