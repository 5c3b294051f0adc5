"""A decoding session: streams in, a token at a time, streams out, in any order.

A session has a segment open in its `Stream`, the decoder's cache, and weights packed for products of few rows. What is chosen
from its scores, and when it ends, is for search.py to say. Streams can be dropped, repeated, sorted and joined at any step, the
memory's states included: finished rows and beams need nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np

from .. import _core
from ..autodiff import value_of
from ..context import Pass
from ..errors import InvalidValue
from ..model import Model
from ..packing import with_packed
from ..stream import Stream
from ..weights import Weight, Weights
from .cache import KVCache


class Prompts(Protocol):
    """What was read of prompts before: see `mini_tfm.prompt_cache`."""

    def restore(self, cache: KVCache, tokens: np.ndarray) -> int:
        """Puts what is known of the beginning of tokens (T,) into an empty cache: how many of them, below T."""

    def keep(self, cache: KVCache, tokens: np.ndarray, n_restored: int) -> None:
        """Takes what the cache has of tokens (T,), of which so many were restored."""


class Session:
    """Goes on from the segment that is open in `stream`.

    n_ids: only ids below it are scored, where the model has more than its tokenizer can say. cache_dtype: of keys and values; None:
    bfloat16 for a packed model, else the model's. room: so many tokens are expected after the first ones. among: (n,) the ids, ascending,
    that may be said; None: all. Of the output layer these columns alone are computed, all other scores are -inf.
    prompts: where the first tokens of one stream may have been read before. weights: its `packed_weights`, if they are made already; not
    with `among`. names: (B,) numbers by which errors call the streams.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        n_ids: int | None = None,
        cache_dtype: str | None = None,
        room: int = 0,
        among: np.ndarray | None = None,
        prompts: Prompts | None = None,
        weights: Weights | None = None,
        names: np.ndarray | None = None,
    ):
        model = stream.model
        if cache_dtype is not None and model.dtype != np.float32:
            raise InvalidValue(f"generate: cache_dtype: expected None for a model of {model.dtype}, got {cache_dtype!r}")
        self.stream, self.among = stream, among
        self.cache = KVCache(stream.run.batch, cache_dtype or ("bfloat16" if model.precision is not None else None), room)
        self.n_ids = stream.model.config.vocab_size if n_ids is None else n_ids
        self._prompts = prompts
        self.numbers = np.arange(stream.run.batch)  # of the sources
        self.names = self.numbers if names is None else names
        self.n_steps = np.zeros(stream.run.batch, np.int64)  # that each has taken
        self.weights = packed_weights(stream.model, self.n_ids) if weights is None else weights
        if among is not None:
            stream.model.output.narrow(self.weights, among)
        self._pass = Pass(self.weights, stream.run, cache=self.cache)

    @property
    def batch(self) -> int:
        return self.stream.run.batch

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Feeds the decoder (B, T) tokens; its outputs (B, d) at the last of them."""
        return self.outputs(tokens, 1)[:, 0]

    def outputs(self, tokens: np.ndarray, n: int) -> np.ndarray:
        """Feeds the decoder (B, T) tokens; its outputs (B, n, d) at the last n of them."""
        decoder = self.stream.model.decoder
        assert decoder is not None
        if self.cache.lengths is not None and tokens.shape[1] != 1:
            raise InvalidValue(f"tokens: expected one of each stream, where they have come differently far, got {tokens.shape[1]}")
        self.n_steps += 1
        if self._prompts is None or self.n_steps[0] > 1:
            return value_of(decoder(tokens, _NO_LENGTHS, self.stream.encoded, self._pass))[:, -n:]
        n_restored = self._prompts.restore(self.cache, tokens[0, : tokens.shape[1] - n + 1])  # n are fed for their outputs
        hidden = value_of(decoder(tokens[:, n_restored:], _NO_LENGTHS, self.stream.encoded, self._pass))
        self._prompts.keep(self.cache, tokens[0], n_restored)
        return hidden[:, -n:]

    def forget(self, n: int) -> None:
        """Takes back the last n tokens that were fed, of every stream, as if they had never been."""
        self.cache.drop(n)

    def scores(self, hidden: np.ndarray) -> np.ndarray:
        """(B, n_ids) scores of the next token, log-probabilities where a memory has a say. Raises InvalidValue at NaN."""
        run, output = self.stream.run, self.stream.model.output
        if run.changes_output:
            logits = value_of(output(hidden, self.stream.weights))
            scores = run.logits(hidden[:, None], _core.log_softmax(logits)[:, None])[:, 0, : self.n_ids]
        else:
            scores = value_of(output(hidden, self.weights))[:, : self.n_ids]
        self._check(scores.max(axis=1))
        if self.among is None:
            return scores
        every = np.full((len(scores), self.n_ids), -np.inf, scores.dtype)
        every[:, self.among] = scores[:, self.among] if run.changes_output else scores
        return every

    def best(self, hidden: np.ndarray) -> np.ndarray:
        """(B,) the id of the best score; of equal ones the lowest. Raises InvalidValue at NaN."""
        if self.stream.run.changes_output:
            return np.argmax(self.scores(hidden), axis=1)
        scores, ids = self.stream.model.output.best(hidden, self.weights)
        self._check(scores)
        return ids if self.among is None else self.among[ids]

    def best_of_next(self, tokens: np.ndarray, n: int, ends: np.ndarray) -> np.ndarray:
        """(B, 1 to n) the best ids of so many steps, each fed the one before and the first `tokens` (B, 1), until one is in `ends` (m,)."""
        made, left = [tokens[:, :0]], n
        while left:
            run = self._without_python("run_greedily", len(tokens), left)
            if run is None:
                ids = self.best(self.step(tokens))[:, None]
            else:
                ids, scores = run((np.ascontiguousarray(tokens[:, 0]),), ends)
                self.n_steps += ids.shape[1]
                self._check(scores)
            made.append(ids)
            tokens, left = ids[:, -1:], left - ids.shape[1]
            if (tokens == ends).any():
                break
        return np.concatenate(made, axis=1)

    def beams_of_next(
        self, tokens: np.ndarray, n: int, ends: np.ndarray, scores: np.ndarray, width: int, k: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """At most n steps of beam search (see `Program.run_beams`): the last one's `likeliest` k, and parents, chosen (B, 0 to n - 1)."""
        run = self._without_python("run_beams", len(tokens), n)
        is_plain = not self.stream.run.members and self.stream.model.output.cap is None
        if run is None or not is_plain or not self.cache.moves_in_table or self.cache.rows_per_source != width:
            nothing = np.zeros((len(tokens), 0), np.int64)
            return *self.likeliest(self.step(tokens), k), nothing, nothing
        found: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] = run((np.ascontiguousarray(tokens[:, 0]), scores, width, k), ends)
        self.n_steps += found[2].shape[1] + 1
        self._check(found[0][:, 0])
        return found

    def _without_python(self, method: str, n_rows: int, n: int) -> Callable[..., Any] | None:
        """That method of the recorded step, for at most n steps in a row; None where the next one cannot be run so."""
        model, run = self.stream.model, self.stream.run
        if run.changes_output or run.answers:
            return None
        assert model.decoder is not None
        steps = self.cache.ahead(method, n_rows, n, partial(model.decoder.embedding.feed, self._pass))
        choice = model.output.choice(self.weights)._replace(ids=self.among)
        return None if steps is None else lambda given, ends: steps(given, ends, choice)

    def likeliest(self, hidden: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(B, k) the best log-probabilities and their ids, best first; of equal ones the lower id first.

        Where there are fewer, -inf and -1. Raises InvalidValue at NaN.
        """
        found = None if self.stream.run.changes_output else self.stream.model.output.likeliest(hidden, self.weights, k)
        if found is None:
            log_probs = _core.log_softmax(self.scores(hidden))
            ids = np.argsort(-log_probs, axis=1, kind="stable")[:, :k]
            return np.take_along_axis(log_probs, ids, 1), ids
        log_probs, ids = found
        self._check(log_probs[:, 0])
        return log_probs, ids if self.among is None else np.where(ids < 0, -1, self.among[ids])

    def _check(self, best: np.ndarray) -> None:
        if not np.isfinite(best).all():
            row = int(np.flatnonzero(~np.isfinite(best))[0])
            raise InvalidValue(
                f"generate: the scores of token {self.n_steps[row]} of sequence {self.names[row]} are not finite ({best[row]}); check that"
                " the model's weights and the memory's rows are finite"
            )

    @property
    def has_only_sources(self) -> bool:
        """Whether nothing is in it but what the encoder has read, so that it can join others before its first step."""
        return self.stream.encoded is not None and not self.stream.run.members and self.cache.is_empty and not self.n_steps.any()

    def _keep_sources(self) -> None:
        """Of the encoder's outputs nothing is asked but their keys and values from now on: they are made, if they are not yet."""
        encoded, decoder = self.stream.encoded, self.stream.model.decoder
        if encoded is None or decoder is None:
            return
        for layer in decoder.layers:
            cross = layer.cross.f
            self.cache.cross(cross.layer, partial(cross.keys_and_values, encoded.hidden, self._pass), encoded.valid)
        self.stream.encoded = dataclasses.replace(encoded, hidden=value_of(encoded.hidden)[:, :0], valid=encoded.valid[:, :0])

    # Streams of the batch

    def reorder(self, index: np.ndarray) -> None:
        """Row i becomes what row index[i] was: rows are dropped, repeated or sorted."""
        if np.array_equal(index, np.arange(self.batch)):
            return
        same_sources = np.array_equal(self.numbers[index], self.numbers)  # beams that have changed places
        self.stream.reorder(index, same_sources=same_sources)
        self.numbers, self.names, self.n_steps = self.numbers[index], self.names[index], self.n_steps[index]
        if self.stream.run.members:  # what they show is each row's own, and in other arrays now
            self.cache.reorder(index)
            self.cache.forget_step()
        else:
            self.cache.reorder(index, _side_by_side(self.numbers))

    def join(self, other: Session) -> None:
        """Takes in the rows of another session of the same model and memory, behind its own. The other is used up."""
        self._keep_sources()
        other._keep_sources()
        self.stream.join(other.stream)
        self.cache.join(other.cache)
        if self.stream.run.members:  # as in `reorder`
            self.cache.forget_step()
        self.numbers = np.concatenate([self.numbers, other.numbers + self.numbers.max(initial=-1) + 1])
        self.names, self.n_steps = np.concatenate([self.names, other.names]), np.concatenate([self.n_steps, other.n_steps])


def _side_by_side(numbers: np.ndarray) -> int:
    """How many rows of one number follow each other, where they do so everywhere; else 1."""
    if not len(numbers):
        return 1
    starts = np.flatnonzero(np.diff(numbers, prepend=numbers[0] - 1))
    lengths = np.diff(starts, append=len(numbers))
    return int(lengths[0]) if (lengths == lengths[0]).all() else 1


_NO_LENGTHS = np.zeros(0, np.int64)  # with a cache nothing is padding


_packed: WeakKeyDictionary[Model, tuple[Any, dict[str, Any]]] = WeakKeyDictionary()  # output layers of fewer columns


def packed_weights(model: Model, n_ids: int) -> Weights:
    """The model's weights, those of a decoding step packed too; of the output layer only `n_ids` columns.

    They are kept for the next session, see `with_packed`. Packing takes about as long as ten steps.
    """
    assert model.decoder is not None
    if model.precision is not None:
        return _of_packed_model(model, n_ids)
    name, is_tied = model.output.name, model.output.is_tied

    def output(weights: Weights) -> dict[str, Any]:
        array = weights[name].array
        if not np.isfinite(array[:n_ids] if is_tied else array[:, :n_ids]).all():  # the best of many would not show it
            raise InvalidValue(f"model.weights[{name!r}]: holds NaN or infinity, so no token can be scored; check the weights")
        return {model.output.PACKED: weights.pack([name], transposed=is_tied, columns=n_ids)}

    state = n_ids, Weights(model.weights)[name].checksum()
    return with_packed(model, "decoder", list(model.decoder.step_products()), output, state)


def _of_packed_model(model: Model, n_ids: int) -> Weights:
    """The weights of a model that is packed already, which do not change; an output layer of more than n_ids columns is packed again."""
    weights, name = Weights(model.weights), model.output.PACKED
    whole = weights[name].packed
    if whole.shape[1] != n_ids:
        kept, again = _packed.get(model, (None, {}))
        if kept != (n_ids, whole):
            columns = np.ascontiguousarray(whole.unpack()[:, :n_ids])
            again = {name: _core.pack(columns, dtype=whole.dtype)}
            _packed[model] = (n_ids, whole), again
        weights[name] = Weight(None, again[name])
    return weights
