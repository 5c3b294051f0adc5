"""Trainer: one optimizer step at a time, through as many segments as the batch has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .. import ops
from ..autodiff import Var
from ..context import Dropout
from ..data.batches import Batch, fields
from ..data.checks import large, number
from ..data.mixtures import Data, batches_of
from ..errors import InvalidType, InvalidValue, PluginError, TrainingError, shown
from ..lora import check_not_packed
from ..memory.base import Memory
from ..memory.run import has_losses, members_of, memory_parameters
from ..memory.stack import Stack
from ..memory.validate import owner
from ..options import takes
from ..stream import Stream
from ..text.tokenizers import Tokenizer
from ..transformer import Transformer
from ..weights import LORA_SCALE, Weights
from .arguments import checked_batch, trained_names
from .backpropagation import Part, SegmentLoss, backpropagate, counts_of, read_in
from .interrupts import uninterrupted
from .loop import Loop, check_data
from .optimizer import AdamW, schedule_factor
from .options import FitOptions, TrainerOptions
from .parallel import communicator_of, shares
from .run_folder import load_run, save_run


class Trainer:
    """Trains `model`, and the parameters of `memory`, in place.

    tokenizer: saved with the model. communicator: an mpi4py communicator whose processes train together: each is given the
    same batches, computes on rows of its own, and takes the same steps as all others (docs/training.md).
    The options are keywords (see `__init__`); `trainer.options` holds them, frozen:
    `trainer.options = trainer.options.replace(total_steps=2000)` changes one for the steps to come.
    Raises InvalidType for an unknown option, InvalidValue that lists every option at fault.
    """

    @takes(TrainerOptions)
    def __init__(
        self,
        model: Transformer,
        memory: Memory | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        communicator: Any = None,
        **options: Any,
    ):
        """The options, with their defaults:"""
        if not isinstance(model, Transformer):
            raise InvalidType(f"model: expected a Transformer, got {type(model).__name__}")
        if memory is not None and not isinstance(memory, Memory):
            raise InvalidType(f"memory: expected a Memory (mt.memory(...)) or None, got {type(memory).__name__}")
        if not model.config.has_decoder:
            raise InvalidValue("model: expected a decoder, because training predicts text; n_decoder_layers is 0")
        check_not_packed(model)
        self.options = o = TrainerOptions.of(options)
        if o.bfloat16 and model.dtype != np.float32:
            raise InvalidValue(f"bfloat16: expected False, or a model in float32, got True and a model in {model.dtype}")
        self.fit_options = FitOptions()
        self.model, self.memory, self.tokenizer = model, memory, tokenizer
        self.communicator = communicator_of(communicator)
        model.add_memory_weights(memory, o.seed)
        params = memory_parameters(memory, model.config, model.dtype)
        self._trainable, self._adapted = o.trainable, LORA_SCALE in model.weights
        trained = trained_names(o.trainable, model.weights)
        self.optimizer = AdamW(
            {name: model.weights[name] for name in trained}, params, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay
        )
        self.optimizer.take(model.weights)  # views of the arena: the model sees every step
        self.step_count = 0
        self.losses: list[float] = []
        self.tokens_seen = 0
        self.seconds = 0.0  # in `fit`, over all its calls
        self.gradient_norm = 0.0  # of the last step, before clipping
        self.memory_loss: float | None = None  # what the memory added to the loss of the last step; None: it has none of its own
        self.validations: list[list[Any]] = []  # [step, mean loss]
        self.best: list[Any] | None = None  # [step, loss] that early stopping compares with
        self.data_state: dict[str, Any] | None = None  # of the data of the last `fit`, if it has one
        self.batch_digest: str | None = None  # of the last step's batch, if `fit` took that step
        self.resumed = False
        self.saved: tuple[int, Path] | None = None  # by `fit`: the last step, and the folder that holds it

    @property
    def learning_rate(self) -> float:
        """At the next step."""
        o = self.options
        return o.learning_rate * schedule_factor(o.schedule, self.step_count, o.warmup_steps, o.total_steps)

    @property
    def stopped_early(self) -> bool:
        """Whether the last `early_stopping_patience` validations were no better than the best."""
        patience = self.options.early_stopping_patience
        if patience is None or self.best is None:
            return False
        return sum(step > self.best[0] for step, _ in self.validations) >= patience

    def step(
        self,
        source: Any,
        target: Any,
        source_lengths: Any = None,
        target_lengths: Any = None,
        weights: np.ndarray | None = None,
        begins: Any = None,
    ) -> float:
        """Takes one optimizer step; returns the loss before it, in nats per target token.

        What a memory adds to the loss that is trained on (`Memory.loss`) is not in it, but in `memory_loss`.

        source: (B, S) token ids, or (B, n, S) for a stream of n segments; None for a decoder-only model.
        target: (B, T) or (B, n, T), predicted token by token. lengths: (B,) or (B, n). weights: of each target
        token in the loss. begins: (B, n) bool, where a new document begins (see `Batch`). Raises TrainingError, and changes nothing,
        when the loss or the gradient is not finite.
        """
        ranks = self.communicator
        if self.options.trainable != self._trainable:
            raise InvalidValue(
                f"trainable: expected {self._trainable}, as when this Trainer was made, got {self.options.trainable}; make a new Trainer"
            )
        if (LORA_SCALE in self.model.weights) != self._adapted:
            raise InvalidValue("model: its adapters came, or were merged, after this Trainer was made; make a new Trainer")
        with ranks.together():
            self.optimizer.take(self.model.weights)
            batch = self._batch(source, target, source_lengths, target_lengths, weights, begins)
            n_parts = min(self.options.gradient_accumulation_steps, max(1, len(batch.target)))  # the rest would be empty
            parts = shares(len(batch.target), n_parts * ranks.size)
            total = float(counts_of(batch, self.model.dtype).sum(dtype=np.float64)) or 1.0
            losses = np.zeros((2, len(parts)))  # each part's share of the loss, and of what the memory adds; a rank fills in its own
            self.optimizer.zero_grad()
            for i in range(ranks.rank * n_parts, (ranks.rank + 1) * n_parts):
                losses[:, i] = self._add_gradients(batch, parts[i], total)
        ranks.sum(losses)
        ranks.sum(self.optimizer.grad)
        value, norm = float(losses[0].sum()), self.optimizer.grad_norm()
        if not np.isfinite(losses).all() or not np.isfinite(norm):
            raise TrainingError(self._diagnosis(batch, value, [parts[i] for i in np.flatnonzero(~np.isfinite(losses).all(axis=0))]))
        with uninterrupted():
            self.optimizer.step(self.learning_rate, self.options.clip, norm)
            self.step_count += 1
            self.tokens_seen += batch.n_tokens
            self.losses.append(value)
            self.gradient_norm, self.batch_digest = norm, None
            self.memory_loss = float(losses[1].sum()) if has_losses(self.memory) else None
        return value

    def evaluate(self, batch: Batch) -> float:
        """The loss of a batch, in nats per target token; changes nothing."""
        return self._loss(self._batch(*fields(batch)))

    def weight_of(self, batch: Batch) -> float:
        """Total weight of the target tokens of a batch: their number, where they have no weights."""
        return float(counts_of(self._batch(*fields(batch)), self.model.dtype).sum(dtype=np.float64))

    @takes(FitOptions, keeps=True)
    def fit(
        self,
        data: Data | Callable[[int], Batch],
        steps: int | None = None,
        *,
        validation: Data | Callable[[int], Batch] | None = None,
        folder: str | Path | None = None,
        seconds: float | None = None,
        on_step: Callable[[Trainer, float], None] | None = None,
        progress: bool = True,
        other_data: bool = False,
        **options: Any,
    ) -> dict[str, Any]:
        """Trains until step `steps` (default: total_steps), for `seconds`, or until early stopping; returns the losses by step.

        data: gives the batch of a step number, a pure function of it, so that a resumed run sees the same: anything with
        `batch(step)` (`NextSegment`, `SpanDenoising`, `Pairs`, `Mixture`, `Curriculum`, `TextStreams`), or a function.
        validation: data whose loss, over all target tokens, is measured every `validate_every` steps.
        folder: where the run is saved, every `save_every` steps and at the end; `Trainer.resume(folder)` continues it.
        on_step: called after each step with the trainer and the loss.
        other_data: after a resume, accept data that differs from that of the run.
        Ctrl-C saves (with a folder) and raises KeyboardInterrupt. Raises TrainingError as `step` does, or when a
        validation loss or the weights to save are not finite: the last save stays as it was.

        The options below keep their value from the last `fit`, also in a resumed run, unless given. Initial values in brackets:
        """

        steps = steps if steps is not None else self.options.total_steps
        if steps is None and seconds is None:
            raise InvalidValue("steps: expected a number of steps (or total_steps of the trainer, or seconds), got None")
        if steps is not None:
            [steps] = large(steps=steps)
        if seconds is not None and not number(seconds) >= 0:
            raise InvalidValue(f"seconds: expected a number of at least 0, got {shown(seconds)}")
        FitOptions.check_names(options)
        self.fit_options = self.fit_options.replace(**{name: value for name, value in options.items() if value is not None})
        batch_of = batches_of("data", data)
        with self.communicator.together():
            loop = Loop(self, batch_of, None if validation is None else batches_of("validation", validation), folder)
            check_data(self, data, other_data)
            loop.run(steps, seconds, on_step, progress)
        return loop.history

    def save(self, folder: str | Path) -> None:
        """Writes the model, the optimizer and the state of training into `folder`: the old files or the new ones.

        Raises TrainingError, and writes nothing, when a weight is not finite. With a communicator, call it on rank 0
        alone, as `fit` does.
        """

        save_run(self, folder)

    @classmethod
    def resume(cls, folder: str | Path, memory: Memory | None = None, *, communicator: Any = None) -> Trainer:
        """The trainer saved in `folder`: its next steps are, bit for bit, those of a run that was not stopped.

        memory: the one it was trained with. It may be left out if it is built in and opens no file: a folder's file may name no
        other. communicator: as for a new Trainer; the number of processes may differ.
        """

        return load_run(cls, folder, memory, communicator)

    # Inside

    def _batch(self, *given: Any) -> Batch:
        """The arguments of `step` as checked (B, n, L) arrays."""
        return checked_batch(self.model, *given)

    def _add_gradients(self, batch: Batch, rows: slice, total: float) -> Part:
        """Adds the gradient of some rows' share of the batch's loss to the arena; returns that share, of the text and of the memory.

        total: weight of all target tokens of the batch, so that the shares of all rows add up to its mean loss. Each part
        has its own dropout masks, and hides the sources that are hidden in the whole batch.
        """
        if rows.start == rows.stop:
            return Part(0.0, 0.0)
        part = batch if rows == slice(0, len(batch.target)) else _rows_of(batch, rows)
        try:
            return self._backward(part, self._dropout(rows.start), self._hidden(batch, rows), total, read_in(batch))
        except PluginError:
            # NaN in a state is the strategy's fault, unless the model alone gives NaN.
            value = self._loss(part, with_memory=False)
            if np.isfinite(value):
                raise
            return Part(value, 0.0)

    def _backward(
        self, batch: Batch, dropout: Dropout, hidden: np.ndarray | None = None, total: float | None = None, n_read: int | None = None
    ) -> Part:
        """The training loss through all segments of the batch; adds its gradient to the arena."""
        o, w = self.options, Weights({**self.model.weights, **self.optimizer.leaves})
        options: dict[str, Any] = {"dropout": dropout, "hide_source": hidden, "label_smoothing": o.label_smoothing}
        options |= {"total": total, "n_read": n_read}
        stream = Stream(self.model, self.memory, len(batch.target), weights=w, training=True)
        with ops.bfloat16_products(o.bfloat16):
            return backpropagate(SegmentLoss(self.model, batch, **options), stream, truncate=o.bptt_segments, recompute=o.recompute)

    def _dropout(self, first_row: int = 0) -> Dropout:
        """The dropout of the next step, for a part of the batch that begins at `first_row`."""
        o = self.options
        attention, hidden = (o.dropout if rate is None else rate for rate in (o.attention_dropout, o.ff_dropout))
        return Dropout(o.dropout, o.seed, attention, hidden, o.lora_dropout, self.step_count, first_row)

    def _hidden(self, batch: Batch, rows: slice = slice(None)) -> np.ndarray | None:
        """(rows, n) bool: segments whose source is hidden from the decoder at the next step, drawn for the whole batch."""
        if not self.options.source_dropout:
            return None
        draws = np.random.default_rng([self.options.seed, self.step_count]).random(batch.target.shape[:2])
        return draws[rows] < self.options.source_dropout

    def _loss(self, batch: Batch, *, with_memory: bool = True) -> float:
        """Mean negative log-likelihood of all target tokens, through all segments of the batch, without dropout or smoothing."""
        stream = Stream(self.model, self.memory if with_memory else None, len(batch.target), training=True)
        with ops.bfloat16_products(self.options.bfloat16):
            return SegmentLoss(self.model, batch).value(stream)

    def _diagnosis(self, batch: Batch, loss: float, parts: list[slice]) -> str:
        """An error message: the streams whose loss is not finite, and the largest gradients by name."""
        place = ""
        if parts:
            suspects = [row for part in parts for row in range(part.start, part.stop)]
            rows = [row for row in suspects if not self._is_finite(_rows_of(batch, slice(row, row + 1)))]
            which = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
            shown = which or f"{suspects[0]} to {suspects[-1]} together"
            place = f" at stream{'s' * (len(rows) != 1)} {shown} of batch {self.step_count}"
        sizes = {name: float(np.max(np.abs(g))) if g.size else 0.0 for name, g in self.optimizer.grads.items()}
        worst = sorted(sizes, key=lambda name: (np.isfinite(sizes[name]), -np.nan_to_num(sizes[name], posinf=0)))[:3]
        largest = ", ".join(f"{name} {sizes[name]:.3g}" for name in worst)
        return (
            f"step {self.step_count}: the loss is {loss}{place} or its gradient is not finite (largest gradients:"
            f" {largest}){self._blame(batch)}; the weights are those of the step before: lower learning_rate, add warmup_steps, or check"
            " the data"
        )

    def _blame(self, batch: Batch) -> str:
        """In words, the members of the memory without any of which all would be finite."""
        members = members_of(self.memory)
        blamed = [
            member for member in members if self._has_finite_gradient(batch, Stack([other for other in members if other is not member]))
        ]
        return "".join(f"; without memory {member.name!r} ({owner(member)}) both are finite" for member in blamed)

    def _has_finite_gradient(self, batch: Batch, memory: Memory) -> bool:
        """Whether the loss with another memory, and its gradient, are finite; changes nothing."""
        leaves = {name: Var(weight) for name, weight in self.model.weights.items()}
        stream = Stream(self.model, memory, len(batch.target), weights=leaves, training=True)
        loss = SegmentLoss(self.model, batch, dropout=self._dropout(), hide_source=self._hidden(batch))
        try:
            found = backpropagate(loss, stream, truncate=self.options.bptt_segments, recompute=self.options.recompute)
        except PluginError:
            return False
        return bool(np.isfinite(found).all()) and all(np.isfinite(leaf.grad).all() for leaf in leaves.values() if leaf.grad is not None)

    def _is_finite(self, batch: Batch) -> bool:
        """Whether the model, without dropout, gives a number for these rows."""
        try:
            return bool(np.isfinite(self._loss(batch)))
        except PluginError:
            return False


def _rows_of(batch: Batch, rows: slice) -> Batch:
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return dataclasses.replace(batch, **{name: value[rows] for name, value in values.items() if isinstance(value, np.ndarray)})
