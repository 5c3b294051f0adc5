"""Logs of a run: one line per step as JSON or CSV, and TensorBoard's event files.

A log that cannot be written, on a full disk above all, ends with a warning: training goes on, and its model is saved.

Logs are appended to. A resumed run first removes the lines after its step, as it takes those steps again: no step is there
twice, and the log is that of a run that was not stopped.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import socket
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import FileProblem, InvalidValue
from ..files.reading import open_regular
from .options import FitOptions

# step; loss and validation_loss in nats a target token; learning_rate of the step; gradient_norm before clipping;
# tokens seen and seconds trained, both since the run began; memory_loss, what the memory added to the loss, if it adds any.
COLUMNS = ("step", "loss", "validation_loss", "learning_rate", "gradient_norm", "tokens", "seconds", "memory_loss")
OLD_COLUMNS = COLUMNS[:-1]  # of logs that 0.1.0 began


class Logs:
    """The logs that the options ask for, as a context. Only rank 0 opens any."""

    def __init__(self, options: FitOptions, losses: Sequence[float]):
        """options: of `fit`. losses: of the steps so far; a log whose lines have others belongs to another run."""
        self._losses = losses
        self._kinds = [(kind, path) for name, kind in KINDS.items() if (path := getattr(options, name)) is not None]
        self._open: list[Any] = []

    def __enter__(self) -> Logs:
        try:
            self._open.extend(kind(path, self._losses) for kind, path in self._kinds)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._each(lambda log: log.close())
        self._open.clear()

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes a step's figures, by names of COLUMNS; a figure that was not measured is left out."""
        self._each(lambda log: log.write(record))

    def sync(self) -> None:
        """Flushes to the disk: a checkpoint counts on the lines before it."""
        self._each(lambda log: log.sync())

    def _each(self, act: Callable[[Any], None]) -> None:
        """What fails once is told, and left out from then on: no log is worth the steps that were not saved yet."""
        for log in list(self._open):
            try:
                act(log)
            except OSError as error:
                self._open.remove(log)
                with contextlib.suppress(OSError):
                    log.close()  # tries once more to write what it holds, and frees its file
                warnings.warn(f"{_problem(log.path, error)}; training goes on without this log", UserWarning, stacklevel=2)


class _Lines:
    """A text file of one line a step."""

    header = ""

    def __init__(self, path: str, losses: Sequence[float]):
        self.path = Path(path)
        try:
            self._cut(losses)
            self._file = open(self.path, "a", encoding="utf-8", newline="")  # noqa: SIM115  # closed by `close`
            if self.header and self._file.tell() == 0:
                self._append(self.header)
        except OSError as error:
            raise _problem(self.path, error) from error

    def _cut(self, losses: Sequence[float]) -> None:
        """Removes lines of later steps than there are losses, and the half line of a killed process."""
        if not self.path.exists():
            return
        with open_regular(self.path) as file:
            data = file.read()
        begins = self.header.encode()
        if not data.startswith(begins[: len(data)]):
            raise InvalidValue(f"{self.path}: is not the log of a run (it does not begin with {self.header.strip()!r}); give another path")
        kept, known = len(begins) if len(data) >= len(begins) else 0, False
        for line in data[kept:].splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            try:
                step, loss = self.read(line.decode())
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise InvalidValue(f"{self.path}: is not the log of a run (line {line[:60]!r}); give another path") from error
            later = step > len(losses)
            if (later and not known) or (not later and losses[step - 1] != loss):
                raise InvalidValue(f"{self.path}: holds the log of another run; give another path, or move it away")
            if later:
                break
            kept, known = kept + len(line), True
        if kept < len(data):
            os.truncate(self.path, kept)

    def read(self, line: str) -> tuple[int, float]:
        """(step, loss) of a line."""
        raise NotImplementedError

    def _append(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class JsonLines(_Lines):
    """One object per line; a figure that was not measured is left out."""

    def read(self, line: str) -> tuple[int, float]:
        record = json.loads(line)
        return int(record["step"]), float(record["loss"])

    def write(self, record: Mapping[str, Any]) -> None:
        self._append(json.dumps({name: record[name] for name in COLUMNS if name in record}) + "\n")


class Csv(_Lines):
    """COLUMNS, separated by commas; a figure that was not measured is empty. A log that has the old ones keeps them."""

    def __init__(self, path: str, losses: Sequence[float]):
        self.columns: Sequence[str] = COLUMNS
        if os.path.exists(path):
            old = ",".join(OLD_COLUMNS) + "\n"
            with open_regular(path) as file:
                self.columns = OLD_COLUMNS if file.read(len(old)) == old.encode() else COLUMNS
        self.header = ",".join(self.columns) + "\n"
        super().__init__(path, losses)

    def read(self, line: str) -> tuple[int, float]:
        (row,) = csv.DictReader(io.StringIO(self.header + line))
        return int(row["step"]), float(row["loss"])

    def write(self, record: Mapping[str, Any]) -> None:
        self._append(",".join(repr(record[name]) if name in record else "" for name in self.columns) + "\n")


class TensorBoard:
    """Event files in a folder. Those of a killed run stay; a new session makes TensorBoard drop their later steps.

    Written in this thread: tensorboardX's `SummaryWriter` has one of its own, which dies on a full disk, and then whoever fills
    its queue waits for ever.
    """

    FLUSH_SECONDS = 30.0  # how far behind TensorBoard may be

    def __init__(self, path: str, losses: Sequence[float]):
        try:
            from tensorboardX import RecordWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog
            from tensorboardX.summary import scalar
        except ImportError as error:
            raise InvalidValue(f"tensorboard_log: needs tensorboardX ({error}): pip install 'mini-tfm[tensorboard]'") from error
        self.path, self._event, self._scalar = Path(path), Event, scalar
        try:
            # Files are named by the second they are made in: the step keeps those of a run resumed at once apart.
            step = len(losses)
            self.path.mkdir(parents=True, exist_ok=True)
            self._writer = RecordWriter(str(self.path / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{step}"))
            self._write(file_version="brain.Event:2")
            if step:
                self._write(step=step + 1, session_log=SessionLog(status=SessionLog.START))
            self.sync()
        except OSError as error:
            raise _problem(self.path, error) from error

    def write(self, record: Mapping[str, Any]) -> None:
        for name in COLUMNS[1:]:
            if name in record:
                self._write(step=record["step"], summary=self._scalar(TAGS[name], record[name]))
        if time.monotonic() - self._flushed > self.FLUSH_SECONDS:
            self.sync()

    def _write(self, **event: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **event).SerializeToString())

    def sync(self) -> None:
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()


# Grouped as TensorBoard groups them: by what stands before the slash.
TAGS = {
    "loss": "loss/train",
    "validation_loss": "loss/validation",
    "learning_rate": "train/learning_rate",
    "gradient_norm": "train/gradient_norm",
    "tokens": "train/tokens",
    "seconds": "train/seconds",
    "memory_loss": "loss/memory",
}
KINDS: dict[str, Any] = {"jsonl_log": JsonLines, "csv_log": Csv, "tensorboard_log": TensorBoard}


def _problem(path: Path, error: OSError) -> FileProblem:
    return FileProblem(f"{path}: the log cannot be written: {error.strerror or error}; check free space and permissions")
