"""The loop around a step, `Trainer.fit`: batches, validation, early stopping, logs, checkpoints, progress."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.folder import TENSORS_FILE
from ..checkpoint.models import check_place
from ..data.batches import Batch, fields
from ..data.mixtures import batches_of, differences, state_of
from ..errors import FileProblem, InvalidValue, MiniTfmError, TrainingError
from ..progress import training_progress
from .arguments import checked_batch
from .interrupts import uninterrupted
from .logs import KINDS, Logs
from .parallel import StoppedTogether
from .run import Run
from .run_folder import BEST, check_finite, digest, keep_checkpoint, save_weights


class Loop:
    """One call of `Trainer.fit`."""

    def __init__(self, trainer: Run, batch_of: Callable[[int], Batch], validation_of: Callable[[int], Batch] | None, folder: Any):
        self.trainer, self.batch_of, self.validation_of = trainer, batch_of, validation_of
        self.folder = Path(folder) if folder is not None else None
        self.options = trainer.fit_options
        self.saved_at: int | None = None
        if self.folder is not None and trainer.communicator.rank == 0:
            check_place(self.folder)
        self.stamp = _stamp(self.folder)
        self.recorded = trainer.step_count
        self.batches: dict[int, Batch] = {}  # by step, the last two
        self.rate = 0.0  # learning rate of the last step
        self.history: dict[str, Any] = {"loss": [], "validation": []}
        if self.folder is None and (self.options.save_best or self.options.save_total_limit):
            raise InvalidValue("folder: expected a path, because save_best and save_total_limit keep models there, got None")
        if validation_of is None and (self.options.save_best or trainer.options.early_stopping_patience is not None):
            raise InvalidValue("validation: expected data, because save_best and early_stopping_patience need its loss, got None")

    def run(self, steps: int | None, seconds: float | None, on_step: Callable[[Any, float], None] | None, progress: bool) -> None:
        trainer, ranks = self.trainer, self.trainer.communicator
        before, began = trainer.seconds, time.perf_counter()
        chief, first = ranks.rank == 0, trainer.step_count
        with (
            Logs(self.options if chief else self.options.replace(**_NO_LOGS), trainer.losses) as self.logs,
            training_progress(progress and chief, steps, trainer.step_count) as report,
        ):
            try:
                while (steps is None or trainer.step_count < steps) and not trainer.stopped_early:
                    if seconds is not None and ranks.any(time.perf_counter() - began >= seconds):
                        break
                    self.rate, step, tokens = trainer.learning_rate, trainer.step_count, trainer.tokens_seen
                    self.batches = {step: self.batch_of(step), **{n: b for n, b in self.batches.items() if n == step - 1}}
                    loss = trainer.step(*fields(self.batches[step]))
                    trainer.seconds = before + time.perf_counter() - began
                    self.record()
                    if self.options.save_every and trainer.step_count % self.options.save_every == 0:
                        self.save_on_the_way()
                    report(loss, trainer.validations[-1][1] if trainer.validations else None, self.rate, trainer.tokens_seen - tokens)
                    if on_step is not None:
                        on_step(trainer, loss)
            except KeyboardInterrupt as stop:
                if ranks.size == 1 or isinstance(stop, StoppedTogether):
                    self.record()
                    self.save(keep=False)
                raise
            except TrainingError:
                raise  # the last save stays as it was
            except Exception:  # a memory's, or of on_step: the steps before it are as good as any
                if ranks.size == 1 and trainer.step_count > first:
                    with contextlib.suppress(MiniTfmError):
                        self.save(keep=False)
                raise
            self.save(keep=False)

    def record(self) -> None:
        """Validates if the last step is due for it, and logs that step; once, however often it is called."""
        trainer = self.trainer
        if trainer.step_count == self.recorded:
            return
        due = self.validation_of is not None and trainer.step_count % self.options.validate_every == 0
        if due and not (trainer.validations and trainer.validations[-1][0] == trainer.step_count):
            self.validate()
        figures = {
            "step": trainer.step_count,
            "loss": trainer.losses[-1],
            "learning_rate": self.rate,
            "gradient_norm": trainer.gradient_norm,
            "tokens": trainer.tokens_seen,
            "seconds": trainer.seconds,
            **({} if trainer.memory_loss is None else {"memory_loss": trainer.memory_loss}),
        }
        with uninterrupted():
            self.logs.write({**figures, "validation_loss": trainer.validations[-1][1]} if due else figures)
            self.history["loss"].append(trainer.losses[-1])
            self.recorded = trainer.step_count

    def validate(self) -> None:
        """Measures the loss over all target tokens of the validation batches, which ranks share out; keeps the best model."""
        assert self.validation_of is not None
        trainer, ranks = self.trainer, self.trainer.communicator
        check_finite(trainer)  # or the error would name a memory for NaN that it was given
        losses, weights = sums = np.zeros((2, self.options.validation_batches))
        for i in range(ranks.rank, len(losses), ranks.size):
            batch = self.validation_of(i)
            losses[i], weights[i] = trainer.evaluate(batch), trainer.weight_of(batch)
        ranks.sum(sums)
        loss = float(losses @ weights / (weights.sum() or 1.0))
        if not np.isfinite(loss):
            bad = np.flatnonzero(~np.isfinite(losses))[0]
            raise TrainingError(
                f"step {trainer.step_count}: the loss of validation batch {bad} is {losses[bad]}; the last save stays as it was: lower"
                " learning_rate, or check the data"
            )
        with uninterrupted():
            if trainer.best is None or loss < trainer.best[1] - trainer.options.early_stopping_threshold:
                if self.options.save_best:
                    self.write(lambda folder: self._beside(lambda: save_weights(trainer, folder / BEST)))
                trainer.best = [trainer.step_count, loss]
            self.history["validation"].append((trainer.step_count, loss))
            trainer.validations.append([trainer.step_count, loss])

    def save(self, keep: bool = True) -> None:
        """Saves the run, unless this step is saved; with `keep`, first its model as one of the last few."""
        trainer, limit = self.trainer, self.options.save_total_limit
        if self.saved_at == trainer.step_count:
            return
        if (last := self.batches.get(trainer.step_count - 1)) is not None:
            trainer.batch_digest = digest(checked_batch(trainer.model, *fields(last)))

        def write(folder: Path) -> None:
            self.logs.sync()  # a log that ends before the checkpoint could not be continued
            folder = self._own(folder)
            if keep and limit:
                self._beside(lambda: keep_checkpoint(trainer, folder, limit))
            trainer.save(folder)
            self.stamp = _stamp(folder)

        self.write(write)
        self.saved_at = trainer.step_count
        if self.folder is not None:
            trainer.saved = trainer.step_count, self.folder

    def _own(self, folder: Path) -> Path:
        """The folder, unless its model came from elsewhere while this run trained: then a new one beside it."""
        number, found = 2, folder
        while (found == folder and _stamp(folder) != self.stamp) or (found != folder and found.exists()):
            number, found = number + 1, folder.with_name(f"{folder.name}-{number}")
        if found != folder:
            warnings.warn(f"{folder}: holds a model now that is not of this run, which is saved in {found}", UserWarning, stacklevel=2)
            self.folder, self.stamp = found, None
        return found

    def save_on_the_way(self) -> None:
        """As `save`, but a disk that is full now may have room at the next save: the steps that are not saved are not lost."""
        if self.trainer.communicator.size > 1:
            self.save()  # all ranks stop together, or none
            return
        self._beside(self.save)

    def _beside(self, write: Callable[[], None]) -> None:
        """What can be done without: where it cannot be written, training goes on with a warning."""
        try:
            write()
        except FileProblem as error:
            warnings.warn(f"step {self.trainer.step_count}: {error}; training goes on", UserWarning, stacklevel=2)

    def write(self, write: Callable[[Path], None]) -> None:
        """Calls `write` with the folder, if there is one, on rank 0 alone; the others wait until it is done."""
        if self.folder is None:
            return
        check_finite(self.trainer)  # by all ranks, so that all of them stop
        if self.trainer.communicator.rank == 0:
            write(self.folder)
        self.trainer.communicator.wait()


def _stamp(folder: Path | None) -> tuple[int, int] | None:
    """What changes when another model is saved in the folder; None where there is none."""
    try:
        about = os.stat(folder / TENSORS_FILE) if folder is not None else None
    except OSError:
        return None
    return (about.st_size, about.st_mtime_ns) if about is not None else None


_NO_LOGS = dict.fromkeys(KINDS)


def check_data(trainer: Run, data: Any, other_data: bool) -> None:
    """Before the first step: refuses data that is not the resumed run's, and ranks that do not have the same of everything.

    Weights, frozen ones too, and moments become those of rank 0. Raises InvalidValue.
    """
    ranks, step, batch_of, state = trainer.communicator, trainer.step_count, batches_of("data", data), state_of(data)
    if not trainer.resumed or other_data:
        trainer.batch_digest = None
    elif changed := _changed(trainer, batch_of, state):
        raise InvalidValue(
            f"data: differs from the data this run was trained on: {changed}; give the same data, or other_data=True (on the command line"
            " --accept-changes) to continue with other data"
        )
    trainer.resumed, trainer.data_state = False, state
    if ranks.size == 1:
        return
    own = np.frombuffer(bytes.fromhex(digest(checked_batch(trainer.model, *fields(batch_of(step))))), np.uint8).astype(np.int64)
    first = np.concatenate([[step], own])
    ranks.share(first)
    if first[0] != step:
        raise InvalidValue(f"step: rank 0 is at step {first[0]}, rank {ranks.rank} at {step}; resume all from the same folder")
    if not np.array_equal(first[1:], own):
        raise InvalidValue(f"data: batch {step} of rank {ranks.rank} differs from that of rank 0; give all ranks the same data and seed")
    for array in (trainer.optimizer.arena, *trainer.optimizer.state().values()):
        ranks.share(array)
    weights = trainer.model.weights
    for name in sorted(weights.keys() - trainer.optimizer.weights.keys()):
        ranks.share(array := np.array(weights[name], order="C"))  # not into it: it may be a file, mapped
        if not np.array_equal(array, weights[name]):
            weights[name] = array


def _changed(trainer: Run, batch_of: Callable[[int], Batch], state: dict[str, Any] | None) -> str:
    """How the data differs from that of the saved run, in words; "" if no difference is found.

    Two checks: the states, which also cover batches still to come; and the batch of the last step, for data without a state
    and for what no state names.
    """
    if state is not None and trainer.data_state is not None and (found := list(differences(trainer.data_state, state))):
        return "; ".join(found[:4])
    last = trainer.step_count - 1
    if trainer.batch_digest is not None and digest(checked_batch(trainer.model, *fields(batch_of(last)))) != trainer.batch_digest:
        return f"batch {last} has changed"
    return ""
