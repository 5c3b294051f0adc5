"""Generation: one token at a time, greedy or sampled, with a cache of keys and values.

Options keep Hugging Face's names and meanings.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _core
from ..autodiff import value_of
from ..memory.run import MemoryRun
from .cache import KVCache
from .options import GenerationOptions
from .sampling import choose_tokens

if TYPE_CHECKING:
    from ..model import Encoded, Transformer


def generate(model: Transformer, source: Any, lengths: Any = None, **options: Any) -> list[list[int]]:
    """Token ids for each row of source (B, S), ragged by `lengths` (B,): B lists, without the eos.

    For an encoder-decoder the source is what the encoder reads, for a decoder-only model the prompt. Options:
    see `GenerationOptions`.
    """
    from ..model import check_tokens

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
