"""Associative retrieval: is a memory learned with? `python tests/plugins/associative.py MEMORY...` prints a table.

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


def trained(text, steps, seed=0):
    """A model that was trained with the memory for so many steps, and the memory."""
    made, memory = model(seed), mt.memory(text) if text != "none" else None
    trainer = mt.Trainer(made, memory, learning_rate=3e-3, schedule="constant")
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        each = batch(rng, 32)
        trainer.step(None, each.target, target_lengths=each.target_lengths, weights=each.weights)
    return made, memory


if __name__ == "__main__":
    for text in sys.argv[1:]:
        for steps in (300, 600, 1200):
            print(f"{text} {steps} {share_right(*trained(text, steps)):.3f}", flush=True)
