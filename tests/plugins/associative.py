"""Associative retrieval: is a memory learned with? `python tests/plugins/associative.py MEMORY...` prints a table, the mean of 3 seeds.

A stream is three segments of 4 tokens: 4 pairs, each one token that says a key of 8 and a value of 8; 4 tokens that say nothing; a
question, which is one of the keys, and its value, the only token that counts. Without a memory 1 in 8 is right.
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


def learned(text, marks, seed=0):
    """The share that is right after so many steps of training with the memory, for each of `marks`."""
    made, memory = model(seed), mt.memory(text) if text != "none" else None
    trainer = mt.Trainer(made, memory, learning_rate=3e-3, schedule="constant")
    rng, shares = np.random.default_rng(seed), []
    for step in range(1, max(marks) + 1):
        each = batch(rng, 32)
        trainer.step(None, each.target, target_lengths=each.target_lengths, weights=each.weights)
        if step in marks:
            shares.append(share_right(made, memory))
    return shares


if __name__ == "__main__":
    marks, seeds = (100, 300, 1000), 3
    print("| memory | " + " | ".join(f"{mark} steps" for mark in marks) + " |\n|---|" + "---|" * len(marks))
    for text in sys.argv[1:]:
        mean = np.mean([learned(text, marks, seed) for seed in range(seeds)], axis=0)
        print(f"| `{text}` | " + " | ".join(f"{share:.0%}" for share in mean) + " |", flush=True)
