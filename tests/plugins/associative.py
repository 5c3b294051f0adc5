"""Associative retrieval: is a memory learned with, or good for a model that was trained with a window?

    python tests/plugins/associative.py trained MEMORY...      the share that is right after some steps of training with it
    python tests/plugins/associative.py untrained MEMORY...    that of a model that was trained with a window of all rows

A stream is three segments of 4 tokens: 4 pairs, each one token that says a key of 8 and a value of 8; 4 tokens that say nothing; a
question, which is one of the keys, and its value, the only token that counts. Without a memory 1 in 8 is right. A decoder reads each
token a place later, so the rows of the second segment have the last of the pairs.
"""

import sys

import numpy as np

import mini_tfm as mt
from mini_tfm.autodiff import value_of
from mini_tfm.data.batches import Batch
from mini_tfm.stream import Stream
from mini_tfm.train.segments import read_batch

N, LENGTH = 8, 4
KEY, VALUE, PAIR, NOISE = 3, 3 + N, 3 + 2 * N, 3 + 2 * N + N * N
SIZES = {"vocab_size": NOISE + N, "d_model": 32, "n_heads": 2, "d_ff": 64, "n_encoder_layers": 0, "n_decoder_layers": 1}
CHANCE = 1 / N
MARKS, SEEDS = (100, 300, 1000), 3


def batch(rng, size):
    keys, values = rng.permuted(np.tile(np.arange(N), (size, 1)), axis=1)[:, :LENGTH], rng.integers(N, size=(size, LENGTH))
    target = rng.integers(NOISE, NOISE + N, (size, 3, LENGTH))
    target[:, 0] = PAIR + keys * N + values
    asked = rng.integers(LENGTH, size=size)
    target[:, 2, 2], target[:, 2, 3] = KEY + keys[np.arange(size), asked], VALUE + values[np.arange(size), asked]
    weights = np.zeros(target.shape, np.float32)
    weights[:, 2, 3] = 1
    return Batch(None, target, None, np.full((size, 3), LENGTH), weights)


def model(seed=0):
    return mt.Transformer(mt.Config(**SIZES, segment_length=LENGTH, positions="rotary"), seed=seed)


def share_right(made, memory, seed=99, size=256):
    asked = batch(np.random.default_rng(seed), size)
    stream = Stream(made, memory, size)
    for _, hidden in read_batch(stream, asked):
        scores = value_of(stream.logits(value_of(hidden)[:, 3]))
    return float((scores.argmax(axis=-1) == asked.target[:, 2, 3]).mean())


def training(text, marks, seed=0):
    """The model and its memory after so many steps of training, for each of `marks`."""
    made, memory = model(seed), mt.memory(text) if text != "none" else None
    trainer = mt.Trainer(made, memory, learning_rate=3e-3, schedule="constant")
    rng = np.random.default_rng(seed)
    for step in range(1, max(marks) + 1):
        each = batch(rng, 32)
        trainer.step(None, each.target, target_lengths=each.target_lengths, weights=each.weights)
        if step in marks:
            yield made, memory


def learned(text, marks, seed=0):
    """The share that is right after so many steps of training with the memory, for each of `marks`."""
    return [share_right(*each) for each in training(text, marks, seed)]


def untrained(texts, seed=0):
    """The share that is right with each memory, of a model that was trained with a window of all rows."""
    ((made, _),) = training("window:size=8", [600], seed)
    return [share_right(made, mt.memory(text)) for text in texts]


def table(heading, rows):
    print(f"| memory | {' | '.join(heading)} |\n|---|" + "---|" * len(heading))
    for text, shares in rows:
        print(f"| `{text}` | " + " | ".join(f"{share:.0%}" for share in shares) + " |", flush=True)


if __name__ == "__main__":
    how, *texts = sys.argv[1:]
    if how == "untrained":
        means = np.mean([untrained(texts, seed) for seed in range(SEEDS)], axis=0)
        table(["right"], zip(texts, means[:, None], strict=True))
    else:
        means = (np.mean([learned(text, MARKS, seed) for seed in range(SEEDS)], axis=0) for text in texts)
        table([f"{mark} steps" for mark in MARKS], zip(texts, means, strict=True))
