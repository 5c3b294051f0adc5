"""Generation: one token at a time, greedy or sampled, with a cache of keys and values.

Options keep Hugging Face's names and meanings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from . import _core
from .autodiff import value_of
from .errors import InvalidType, InvalidValue
from .memory.run import MemoryRun

Array: TypeAlias = Any  # an np.ndarray or a Var: NumPy's functions take both, its stubs know only the first

if TYPE_CHECKING:
    from .model import Encoded, Transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How tokens are chosen and when generation stops.

    max_new_tokens: at most so many. do_sample: draw instead of taking the likeliest. temperature: divides the
    scores. top_k: draw among the k likeliest, 0 for all. top_p: among the fewest whose probabilities add up to
    it (arXiv 1904.09751). seed: of the draws; None differs from call to call. stop_at_eos: end a row at eos_id,
    which is left out. num_beams: only 1 so far.
    """

    max_new_tokens: int = 64
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_at_eos: bool = True
    num_beams: int = 1

    def __post_init__(self) -> None:
        faults = []
        for name, low, high in (("max_new_tokens", 0, None), ("top_k", 0, None), ("num_beams", 1, 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
                wanted = f"{low}, the only one so far" if high is not None else f"an integer of at least {low}"
                faults.append(f"{name}: expected {wanted}, got {value!r}")
        for name in ("do_sample", "stop_at_eos"):
            if not isinstance(getattr(self, name), bool):
                faults.append(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if not isinstance(self.temperature, int | float) or not 0 < self.temperature < float("inf"):
            faults.append(f"temperature: expected a number above 0 (do_sample=False takes the likeliest), got {self.temperature!r}")
        if not isinstance(self.top_p, int | float) or not 0 < self.top_p <= 1:
            faults.append(f"top_p: expected a number above 0 and at most 1, got {self.top_p!r}")
        if self.seed is not None and (not isinstance(self.seed, int) or self.seed < 0):
            faults.append(f"seed: expected None or an integer of at least 0, got {self.seed!r}")
        if faults:
            raise InvalidValue("generate: " + "; ".join(faults))

    @classmethod
    def of(cls, options: dict[str, Any]) -> GenerationOptions:
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise InvalidType(f"generate: unknown option {unknown[0]!r}; it takes {', '.join(known)}")
        return cls(**options)


class KVCache:
    """Keys and values of the tokens decoded so far, a pair of arrays a layer, doubled when full."""

    def __init__(self) -> None:
        self.length = 0  # text tokens
        self._rows = 0  # memory rows in front of them
        self._valid: np.ndarray | None = None
        self._kept: dict[int, list[np.ndarray]] = {}
        self._filled: dict[int, int] = {}
        self._cross: dict[int, tuple[Any, Any]] = {}

    def extend(self, rows: int, valid: np.ndarray) -> tuple[int, np.ndarray]:
        """Announces new keys, `rows` of them memory rows; the rows in front and the (B, keys) mask of all keys."""
        self._valid = valid if self._valid is None else np.concatenate([self._valid, valid], axis=1)
        self._rows += rows
        self.length = self._valid.shape[1] - self._rows
        return self._rows, self._valid

    def append(self, layer: int, k: Array, v: Array) -> tuple[np.ndarray, np.ndarray]:
        """Adds k, v (B, H, T, D) to a layer; all keys and values so far."""
        news = [value_of(k), value_of(v)]
        start = self._filled.get(layer, 0)
        end = start + news[0].shape[2]
        kept = self._kept.get(layer)
        if kept is None or end > kept[0].shape[2]:
            b, h, _, d = news[0].shape
            grown = [np.zeros((b, h, max(2 * start, end, 32), d), news[0].dtype) for _ in news]
            for new, old in zip(grown, kept or (), strict=False):
                new[:, :, :start] = old[:, :, :start]
            self._kept[layer] = kept = grown
        for store, new in zip(kept, news, strict=True):
            store[:, :, start:end] = new
        self._filled[layer] = end
        return kept[0][:, :, :end], kept[1][:, :, :end]

    def cross(self, layer: int, project: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
        """The projected encoder outputs, computed once, and laid out head by head: every step reads them in that order."""
        if layer not in self._cross:
            k, v = project()
            self._cross[layer] = np.ascontiguousarray(k), np.ascontiguousarray(v)
        return self._cross[layer]


def generate(model: Transformer, source: Any, lengths: Any = None, **options: Any) -> list[list[int]]:
    """Token ids for each row of source (B, S), ragged by `lengths` (B,): B lists, without the eos.

    For an encoder-decoder the source is what the encoder reads, for a decoder-only model the prompt. Options:
    see `GenerationOptions`.
    """
    from .model import check_tokens

    chosen = GenerationOptions.of(options)
    model._needs("decoder")
    source, lengths = check_tokens("source", source, model.config.vocab_size, lengths)
    results: list[list[int]] = [[] for _ in range(len(source))]
    if model.config.has_encoder:
        groups = [np.arange(len(source))]
    else:  # the cache has no holes: prompts of one length at a time
        groups = [np.flatnonzero(lengths == n) for n in np.unique(lengths)]
    for rows in groups:
        if not len(rows):
            continue
        run = model.start_run(None, len(rows))
        run.open(lengths[rows])
        encoded, prompt = None, np.full((len(rows), 1), model.config.bos_id)
        if model.config.has_encoder:
            encoded = model.encode_segment(source[rows], lengths[rows], run)
        elif lengths[rows[0]]:
            prompt = source[rows, : lengths[rows[0]]]
        for step in token_steps(model, encoded, run, prompt, chosen, rows):
            for row, token in zip(rows, step, strict=True):
                if token >= 0:
                    results[row].append(int(token))
    return results


def token_steps(
    model: Transformer,
    encoded: Encoded | None,
    run: MemoryRun,
    prompt: np.ndarray,
    options: GenerationOptions,
    rows: np.ndarray | None = None,
    limit: int | None = None,
    done: np.ndarray | None = None,
    n_ids: int | None = None,
) -> Iterator[np.ndarray]:
    """Yields the next token (B,) of each row, -1 for rows that have ended, at most max_new_tokens (or `limit`) times.

    prompt: (B, n) the decoder's first inputs. rows: numbers of the rows, by which their draws differ. n_ids: only ids
    below it are chosen, where the model has more than its tokenizer can say.
    """
    cache = KVCache()
    size = len(prompt)
    rows = np.arange(size) if rows is None else rows
    draws = [np.random.default_rng(None if options.seed is None else [options.seed, int(row)]) for row in rows]
    done = np.zeros(size, bool) if done is None else done
    tokens = prompt.astype(np.int64)
    for _ in range(options.max_new_tokens if limit is None else limit):
        hidden = value_of(model.decode_segment(tokens, np.full(size, tokens.shape[1]), encoded, run, cache=cache))[:, -1]
        scores = value_of(model.output_logits(hidden))
        if run.members:
            scores = run.logits(hidden[:, None], _core.log_softmax(scores)[:, None])[:, 0]
        chosen = choose_tokens(scores[:, :n_ids], options, draws)
        if options.stop_at_eos:
            done = done | (chosen == model.config.eos_id)
        yield np.where(done, -1, chosen)
        if done.all():
            return
        tokens = np.where(done, model.config.pad_id, chosen)[:, None]


def choose_tokens(scores: np.ndarray, options: GenerationOptions, draws: list[np.random.Generator]) -> np.ndarray:
    """One token a row of scores (B, V)."""
    if not options.do_sample:
        return np.argmax(scores, axis=1)
    chosen = np.empty(len(scores), np.int64)
    for i, row in enumerate(scores.astype(np.float64) / options.temperature):
        order = np.argsort(-row, kind="stable")
        if options.top_k:
            order = order[: options.top_k]
        p = np.exp(row[order] - row[order[0]])
        p /= p.sum()
        if options.top_p < 1:
            keep = max(1, int(np.searchsorted(np.cumsum(p), options.top_p)) + 1)
            order, p = order[:keep], p[:keep] / p[:keep].sum()
        chosen[i] = order[min(int(np.searchsorted(np.cumsum(p), draws[i].random())), len(order) - 1)]
    return chosen
