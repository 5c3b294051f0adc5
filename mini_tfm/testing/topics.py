"""Does it help? Random weights cannot tell: here are small trained models, and a text of which the past says something.

Each stream has four tokens of its own, of twenty, and its text is drawn from these. A model that knows which they are needs ln 4 = 1.39
nats a token; one that sees no further than a segment has to find out again in each. An encoder's source has one of them in every
segment, among tokens that say nothing. The models, one a kind, in models/, were trained to use what windows show them:

    python -m mini_tfm.testing.topics       trains them again, in a minute or two
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import numpy as np

from .._core import set_num_threads
from ..autodiff import value_of
from ..config import Config
from ..data.batches import Batch, fields
from ..memory.base import Memory
from ..memory.registry import memory as make_memory
from ..memory.run import members_of
from ..stream import Stream
from ..train import Trainer
from ..train.segments import read_batch
from ..transformer import Transformer, load
from .trial import KINDS, LENGTH, VOCAB, CheckFailed, Trial

FIRST, OWN, NOTHING = 3, 4, VOCAB - 1  # the first of the twenty, how many a stream has, the token that says nothing
SEGMENTS, LATE = 6, 2  # of a stream, and from which one on the loss is measured
FOLDER = Path(__file__).parent / "models"
STEPS, LOOK_EVERY = 200, 20  # of training, at most, for what has to be trained first; after how many a loss is measured
GAIN = 0.03  # nats a token: least that a memory must save. What another draw of 64 streams makes of a loss is about a third of it


def batch(kind: str, rng: np.random.Generator, size: int) -> Batch:
    """`size` streams."""
    own = rng.permuted(np.tile(np.arange(FIRST, NOTHING), (size, 1)), axis=1)[:, :OWN]
    row, shape = np.arange(size)[:, None, None], (size, SEGMENTS, LENGTH)
    target, lengths = own[row, rng.integers(OWN, size=shape)], np.full(shape[:2], LENGTH)
    if kind == "decoder-only":
        return Batch(None, target, None, lengths)
    said = rng.integers(LENGTH, size=shape[:2])[..., None] == np.arange(LENGTH)
    return Batch(np.where(said, own[row, rng.integers(OWN, size=shape)], NOTHING), target, lengths, lengths)


def loss_of(model: Transformer, memory: Memory | None, streams: Batch) -> float:
    """Nats a token, from segment LATE on."""
    stream, found = Stream(model, memory, len(streams.target)), []
    for t, hidden in read_batch(stream, streams):
        if t >= LATE:
            scores = stream.log_probs(value_of(hidden))
            found.append(-np.take_along_axis(scores, streams.target[:, t, :, None], 2).mean())
    return float(np.mean(found))


def helps(trial: Trial) -> None:
    """A small trained model needs fewer nats a token with it than without, at once or after some training with it.

    Not asked of a strategy that takes nothing of what is read, such as trained rows.
    """
    memory = trial.make()
    takes = any(
        getattr(type(member), method) is not getattr(Memory, method)
        for member in members_of(memory)
        for method in ("write", "absorb", "end", "leave")
    )
    if not (takes and trial.model.config.has_decoder):
        return
    model, streams = trained(trial.kind), batch(trial.kind, np.random.default_rng(1), 64)
    without = loss_of(model, None, streams)
    model.add_memory_weights(memory, seed=1)
    at_once = loss_of(model, memory, streams)
    if at_once < without - GAIN:
        return
    trainer, rng = Trainer(model, memory, learning_rate=3e-3, warmup_steps=20, total_steps=STEPS), np.random.default_rng(2)
    for _ in range(STEPS // LOOK_EVERY):
        for _ in range(LOOK_EVERY):
            trainer.step(*fields(batch(trial.kind, rng, 16)))
        after = loss_of(model, trial.make(), streams)
        if after < without - GAIN:
            return
    raise CheckFailed(
        f"expected a loss of a trained model below {without - GAIN:.3f} nats a token, got {at_once:.3f}, and {after:.3f} after {STEPS}"
        f" steps with it; without a memory it is {without:.3f}"
    )


def trained(kind: str) -> Transformer:
    """The model of a kind, which the caller may train further."""
    model = _loaded(kind)
    return Transformer(model.config, weights={name: weight.copy() for name, weight in model.weights.items()})


@cache
def _loaded(kind: str) -> Transformer:
    return load(FOLDER / kind)


# How they were made


def train(kind: str, steps: int = 1000) -> Transformer:
    """By turns without a memory, with a window at each site, and at all of them: what one shows is used, and not waited for."""
    sizes = {"vocab_size": VOCAB, "d_model": 16, "n_heads": 2, "d_ff": 32, "activation": "gelu", "segment_length": LENGTH}
    model = Transformer(Config(**{**sizes, "relative_buckets": 8, "relative_max_distance": 16, **KINDS[kind]}), seed=0)
    sites = ("decoder",) if kind == "decoder-only" else ("all", "encoder", "decoder", "cross")
    memories = [None, *(make_memory(f"window:size=20,site={site}") for site in sites)]
    turns = steps // len(memories)
    trainers = [Trainer(model, memory, learning_rate=5e-3, warmup_steps=50, total_steps=turns) for memory in memories]
    rng = np.random.default_rng(0)
    for _ in range(turns):
        for trainer in trainers:
            trainer.step(*fields(batch(kind, rng, 32)))
    return model


def main() -> None:
    set_num_threads(1)
    for kind in ("decoder-only", "encoder-decoder"):
        model, streams = train(kind), batch(kind, np.random.default_rng(1), 64)
        model.save(FOLDER / kind)
        print(f"{kind}: {loss_of(model, None, streams):.3f} nats a token", end="", file=sys.stderr)
        for text in ("window:size=20,site=all", "window:size=8", "store:top_k=4"):
            print(f", with {text} {loss_of(model, make_memory(text), streams):.3f}", end="", file=sys.stderr)
        print(file=sys.stderr)


if __name__ == "__main__":
    main()
