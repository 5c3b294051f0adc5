"""Trainer: one optimizer step at a time, through as many segments as the batch has."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .. import ops
from ..autodiff import Var, backward, value_of
from ..errors import InvalidType, InvalidValue, PluginError, TrainingError
from ..memory.base import Memory
from ..memory.run import memory_parameters
from ..model import NO_DROPOUT, Dropout, Transformer, check_tokens
from ..progress import training_progress
from ..tokenizer import Tokenizer
from .data import Batch, fields
from .optimizer import SCHEDULES, AdamW, schedule_factor
from .plan import Data, batches_of, checked_state
from .walk import walk

TRAINING_FILE = "training.json"
OPTIMIZER_FILE = "training.safetensors"


class Trainer:
    """Trains `model`, and the parameters of `memory`, in place.

    learning_rate: the peak, after `warmup_steps`; schedule "cosine" decays to 0 at `total_steps`, "constant"
    does not. weight_decay: decoupled, of matrices only. clip: largest norm of the gradient, None for no limit.
    dropout: on the embeddings and each sublayer's output (arXiv 1706.03762, section 5.4).
    label_smoothing: section 5.4. source_dropout: the chance that the decoder does not see a segment's own
    encoder outputs but the memory alone, which teaches a memory to carry what will be asked for.
    bptt_segments: gradients stop after so many segments; None: full backpropagation through all of a batch.
    seed: of dropout. tokenizer: saved with the model.
    """

    def __init__(
        self,
        model: Transformer,
        memory: Memory | None = None,
        *,
        learning_rate: float = 1e-3,
        schedule: str = "cosine",
        warmup_steps: int = 0,
        total_steps: int | None = None,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-9,
        clip: float | None = 1.0,
        dropout: float = 0.0,
        label_smoothing: float = 0.0,
        source_dropout: float = 0.0,
        bptt_segments: int | None = None,
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
    ):
        if not isinstance(model, Transformer):
            raise InvalidType(f"model: expected a Transformer, got {type(model).__name__}")
        if memory is not None and not isinstance(memory, Memory):
            raise InvalidType(f"memory: expected a Memory (mt.memory(...)) or None, got {type(memory).__name__}")
        if not model.config.has_decoder:
            raise InvalidValue("model: expected one with a decoder, as training predicts text; n_decoder_layers is 0")
        self.options: dict[str, Any] = {
            "learning_rate": learning_rate,
            "schedule": schedule,
            "warmup_steps": warmup_steps,
            "total_steps": total_steps,
            "weight_decay": weight_decay,
            "betas": list(betas) if isinstance(betas, tuple | list) else betas,
            "eps": eps,
            "clip": clip,
            "dropout": dropout,
            "label_smoothing": label_smoothing,
            "source_dropout": source_dropout,
            "bptt_segments": bptt_segments,
            "seed": seed,
        }
        _check_options(self.options)
        self.model, self.memory, self.tokenizer = model, memory, tokenizer
        model.add_memory_weights(memory, seed)
        params = memory_parameters(memory, model.config, model.dtype)
        self.optimizer = AdamW(model.weights, params, betas=betas, eps=eps, weight_decay=weight_decay)
        model.weights.update(self.optimizer.weights)  # views of the arena: the model sees every step
        self.step_count = 0
        self.losses: list[float] = []
        self.tokens_seen = 0
        self.data_state: dict[str, Any] | None = None  # what `fit` trained on last

    @property
    def learning_rate(self) -> float:
        """At the next step."""
        o = self.options
        return o["learning_rate"] * schedule_factor(o["schedule"], self.step_count, o["warmup_steps"], o["total_steps"])

    def step(
        self,
        source: Any,
        target: Any,
        source_lengths: Any = None,
        target_lengths: Any = None,
        weights: np.ndarray | None = None,
        begins: Any = None,
    ) -> float:
        """One optimizer step; the loss before it, in nats per target token.

        source: (B, S) token ids, or (B, n, S) for a stream of n segments; None for a decoder-only model.
        target: (B, T) or (B, n, T), predicted token by token. lengths: (B,) or (B, n). weights: of each target
        token. begins: (B, n) bool, where a new document begins (see `Batch`). Raises TrainingError, and changes nothing,
        when the loss or the gradient is not finite.
        """
        batch = self._batch(source, target, source_lengths, target_lengths, weights, begins)
        self.optimizer.zero_grad()
        dropout = Dropout(self.options["dropout"], self.options["seed"] * 1_000_003 + self.step_count)
        try:
            loss = self._loss(batch, self.optimizer.leaves(), dropout, training=True)
        except PluginError:
            # A strategy is blamed for the NaN it holds; where the model alone gives them, the fault is not its own.
            loss = self._loss(batch, self.model.weights, NO_DROPOUT, training=False, with_memory=False)
            if np.isfinite(loss):
                raise
        value = float(value_of(loss))
        if np.isfinite(value):
            backward(loss)
        norm = self.optimizer.grad_norm()
        if not np.isfinite(value) or not np.isfinite(norm):
            raise TrainingError(self._diagnosis(value))
        with _uninterrupted():
            self.optimizer.step(self.learning_rate, self.options["clip"])
            self.step_count += 1
            self.tokens_seen += batch.n_tokens
            self.losses.append(value)
        return value

    def evaluate(self, batch: Batch) -> float:
        """The loss of a batch, in nats per target token; changes nothing."""
        return float(value_of(self._loss(self._batch(*fields(batch)), self.model.weights, NO_DROPOUT, training=False)))

    def fit(
        self,
        data: Data | Callable[[int], Batch],
        steps: int | None = None,
        *,
        validation: Data | Callable[[int], Batch] | None = None,
        validate_every: int = 100,
        validation_batches: int = 4,
        folder: str | Path | None = None,
        save_every: int | None = None,
        seconds: float | None = None,
        on_step: Callable[[Trainer, float], None] | None = None,
        progress: bool = True,
        other_data: bool = False,
    ) -> dict[str, Any]:
        """Trains until step `steps` (default: total_steps) or for `seconds`; returns losses by step.

        data: gives the batch of a step number, a pure function of it, so that a resumed run sees the same: anything
        with `batch(step)` (`NextSegment`, `SpanDenoising`, `Pairs`, `Mixture`, `Curriculum`, `TextStreams`), or a function.
        Its `state`, where it has one, is saved; on a resumed run, data of another state is refused unless other_data.
        validation: its loss is measured every `validate_every` steps on its first batches. folder: where the
        run is saved every `save_every` steps and at the end; `Trainer.resume(folder)` goes on from there.
        Ctrl-C saves (with a folder) and raises KeyboardInterrupt.
        """
        steps = steps if steps is not None else self.options["total_steps"]
        if steps is None and seconds is None:
            raise InvalidValue("steps: expected a number of steps (or total_steps of the trainer, or seconds), got None")
        batch_of = batches_of(data)
        validation_of = batches_of(validation) if validation is not None else None
        self.data_state = checked_state(data, None if other_data else self.data_state)
        history: dict[str, Any] = {"loss": [], "validation": []}
        began = time.perf_counter()
        try:
            with training_progress(progress, steps, self.step_count) as tell:
                while (steps is None or self.step_count < steps) and (seconds is None or time.perf_counter() - began < seconds):
                    loss = self.step(*fields(batch_of(self.step_count)))
                    history["loss"].append(loss)
                    if validation_of is not None and self.step_count % validate_every == 0:
                        measured = float(np.mean([self.evaluate(validation_of(i)) for i in range(validation_batches)]))
                        history["validation"].append((self.step_count, measured))
                    if folder is not None and save_every and self.step_count % save_every == 0:
                        self.save(folder)
                    tell(loss, history["validation"][-1][1] if history["validation"] else None)
                    if on_step is not None:
                        on_step(self, loss)
        except KeyboardInterrupt:
            if folder is not None:
                self.save(folder)
            raise
        if folder is not None:
            self.save(folder)
        return history

    def save(self, folder: str | Path) -> None:
        """Writes the model, the optimizer and where training stands into `folder`: old or new, never half."""
        from ..checkpoint import encode_safetensors
        from ..checkpoint.models import save_model

        about = {
            "options": self.options,
            "step_count": self.step_count,
            "tokens_seen": self.tokens_seen,
            "losses": self.losses,
            "data": self.data_state,
        }
        extra = {
            TRAINING_FILE: json.dumps(about).encode(),
            OPTIMIZER_FILE: b"".join(bytes(part) for part in encode_safetensors(self.optimizer.state())),
        }
        save_model(folder, self.model, tokenizer=self.tokenizer, memory=self.memory, extra_files=extra)

    @classmethod
    def resume(cls, folder: str | Path, memory: Memory | None = None) -> Trainer:
        """The trainer saved in `folder`: its next steps are, bit for bit, those of a run that was not stopped.

        memory: needed only if it was not made from text by `mt.memory`.
        """
        from ..checkpoint import read_json_strict, read_safetensors
        from ..checkpoint.models import load_saved

        saved = load_saved(folder)
        about = read_json_strict(Path(folder) / TRAINING_FILE, 1 << 28)
        _check_about(about)
        options = about["options"]
        trainer = cls(saved.model, memory if memory is not None else saved.memory(), tokenizer=saved.tokenizer, **options)
        trainer.optimizer.load_state(read_safetensors(Path(folder) / OPTIMIZER_FILE), about["step_count"])
        trainer.step_count, trainer.tokens_seen, trainer.losses = about["step_count"], about["tokens_seen"], about["losses"]
        trainer.data_state = about.get("data")
        return trainer

    # Inside

    def _batch(self, source: Any, target: Any, source_lengths: Any, target_lengths: Any, weights: Any, begins: Any = None) -> Batch:
        """The arguments of `step` as checked (B, n, L) arrays."""
        config = self.model.config
        target, target_lengths = _segments("target", target, target_lengths, config.vocab_size)
        if not config.has_encoder:
            if source is not None:
                raise InvalidValue("source: expected None, as this model has no encoder")
        else:
            source, source_lengths = _segments("source", source, source_lengths, config.vocab_size)
            if source.shape[:2] != target.shape[:2]:
                raise InvalidValue(f"target: expected (batch, segments) {source.shape[:2]} as source has, got {target.shape[:2]}")
        if weights is not None:
            weights = _weights(weights, target.shape, self.model.dtype)
        if begins is not None:
            begins = np.asarray(begins)
            if begins.dtype != bool or begins.shape not in (target.shape[:2], (target.shape[0] * target.shape[1],)):
                raise InvalidValue(f"begins: expected bool of shape {target.shape[:2]}, got {begins.dtype} of shape {begins.shape}")
            begins = begins.reshape(target.shape[:2])
        return Batch(source, target, source_lengths, target_lengths, weights, begins)

    def _loss(self, batch: Batch, w: dict[str, Any], dropout: Dropout, training: bool, with_memory: bool = True) -> Any:
        """Mean negative log-likelihood of all target tokens, through all segments of the batch."""
        model, o = self.model, self.options
        size, n_segments, length = batch.target.shape
        run = model.start_run(self.memory if with_memory else None, size, w, training=True)
        counts = (np.arange(length) < batch.target_lengths[..., None]).astype(model.dtype)
        counts = counts if batch.weights is None else counts * batch.weights
        total = counts.sum(dtype=np.float64) or 1.0
        hide = None
        if training and o["source_dropout"]:
            hide = np.random.default_rng([o["seed"], self.step_count]).random((size, n_segments)) < o["source_dropout"]
        smoothing = o["label_smoothing"] if training else 0.0
        loss: Any = np.zeros((), model.dtype)
        for t, hidden in walk(model, run, batch, w, dropout=dropout, hide_source=hide, detach_every=o["bptt_segments"]):
            share = counts[:, t].sum(dtype=np.float64) / total
            if share > 0:
                logits = np.reshape(model.output_logits(hidden, w), (-1, model.config.vocab_size))
                part = ops.cross_entropy(logits, batch.target[:, t].ravel(), counts[:, t].ravel(), smoothing)
                loss = loss + part * model.dtype.type(share)
        return loss if isinstance(loss, Var) or not training else Var(loss)

    def _diagnosis(self, loss: float) -> str:
        sizes = {name: float(np.max(np.abs(g))) if g.size else 0.0 for name, g in self.optimizer.grads.items()}
        worst = sorted(sizes, key=lambda name: (np.isfinite(sizes[name]), -np.nan_to_num(sizes[name], posinf=0)))[:3]
        told = ", ".join(f"{name} {sizes[name]:.3g}" for name in worst)
        return (
            f"step {self.step_count}: the loss is {loss} or its gradient is not finite (largest gradients: {told}); the weights are those"
            " of the step before: lower learning_rate, add warmup_steps, or check the data"
        )


def _segments(name: str, tokens: Any, lengths: Any, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(B, T) or (B, n, T) ids -> (B, n, T) and lengths (B, n)."""
    if tokens is None:
        raise InvalidType(f"{name}: expected token ids, got None")
    try:
        array = np.asarray(tokens)
    except ValueError as error:
        raise InvalidValue(f"{name}: expected rows of one length; fill short ones with pad_id and give their lengths") from error
    if array.ndim not in (2, 3):
        raise InvalidValue(f"{name}: expected shape (batch, tokens) or (batch, segments, tokens), got {array.shape}")
    array = array[:, None] if array.ndim == 2 else array
    size, n, length = array.shape
    if lengths is not None:
        lengths = np.asarray(lengths)
        if lengths.shape not in ((size, n), (size * n,)):
            raise InvalidValue(f"{name} lengths: expected shape {(size, n) if n > 1 else (size,)}, got {lengths.shape}")
        lengths = lengths.reshape(-1)
    ids, lengths = check_tokens(name, array.reshape(size * n, length), vocab_size, lengths)
    return ids.reshape(size, n, length), lengths.reshape(size, n)


def _weights(weights: Any, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """(B, T) or (B, n, T) weights of target tokens -> (B, n, T)."""
    try:
        array = np.asarray(weights, dtype)
    except (ValueError, TypeError) as error:
        raise InvalidValue(f"weights: expected numbers of shape {shape}: {error}") from error
    if array.shape not in (shape, (shape[0], shape[2])) or array.size != np.prod(shape):
        raise InvalidValue(f"weights: expected shape {shape}, as target has, got {array.shape}")
    if not (np.isfinite(array).all() and (array >= 0).all()):
        raise InvalidValue("weights: expected finite numbers of at least 0")
    return array.reshape(shape)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the block is done: what a half-written step leaves must not be saved."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    waiting: list[Any] = []
    signal.signal(signal.SIGINT, lambda *what: waiting.append(what))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if waiting:
            before(*waiting[0])


def _check_about(about: dict[str, Any]) -> None:
    """Refuses a training file that `save` did not write."""
    faults = [f"field {name!r} is missing" for name in ("options", "step_count", "tokens_seen", "losses") if name not in about]
    for name in ("step_count", "tokens_seen"):
        value = about.get(name, 0)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            faults.append(f"{name}: expected an integer of at least 0, got {value!r}")
    losses = about.get("losses", [])
    if not isinstance(losses, list) or not all(isinstance(loss, float) for loss in losses):
        faults.append("losses: expected a list of numbers")
    if not isinstance(about.get("data", {}), dict | None):
        faults.append("data: expected a mapping or null")
    options = about.get("options", {})
    if not isinstance(options, dict):
        faults.append(f"options: expected a mapping, got {type(options).__name__}")
    elif "options" in about:
        known = inspect.signature(Trainer).parameters
        faults += [f"unknown option {name!r}" for name in options if name not in known or name in ("model", "memory", "tokenizer")]
    if faults:
        raise InvalidValue(f"{TRAINING_FILE}: " + "; ".join(faults))
    _check_options(options)


def _check_options(options: dict[str, Any]) -> None:
    faults = []
    limits: tuple[tuple[str, int, int | None], ...] = (
        ("learning_rate", 0, None),
        ("warmup_steps", 0, None),
        ("weight_decay", 0, None),
        ("eps", 0, None),
        ("dropout", 0, 1),
        ("label_smoothing", 0, 1),
        ("source_dropout", 0, 1),
        ("seed", 0, None),
        ("clip", 0, None),
        ("total_steps", 1, None),
        ("bptt_segments", 1, None),
    )
    for name, low, high in limits:
        value: Any = options.get(name)
        if value is None and name in ("clip", "total_steps", "bptt_segments"):
            continue
        whole = name in ("warmup_steps", "seed", "total_steps", "bptt_segments")
        number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not number or not low <= value < (high or math.inf):
            kind = "an integer" if whole else "a number"
            faults.append(f"{name}: expected {kind} of at least {low}{f' and below {high}' if high else ''}, got {value!r}")
    betas = options.get("betas")
    if not isinstance(betas, list) or len(betas) != 2 or not all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in betas):
        faults.append(f"betas: expected two numbers of at least 0 and below 1, got {betas!r}")
    if options.get("schedule") not in SCHEDULES:
        faults.append(f"schedule: expected one of {', '.join(SCHEDULES)}, got {options.get('schedule')!r}")
    if faults:
        raise InvalidValue("Trainer: " + "; ".join(faults))
