"""One layer of attention to earlier segments, in plain NumPy and float64: what the published memories are held against.

A decoder of one layer without positions. What it remembers, its inputs x, depends on nothing before; so a memory can be followed by
hand from x and the layer's own weights, token by token, as its paper writes it.
"""

import numpy as np

import mini_tfm as mt
from mini_tfm.memory import Stack
from mini_tfm.testing.trial import Reader, Tap

D, HEADS, KV_HEADS, HEAD = 16, 4, 2, 4
CONFIG = mt.Config(
    vocab_size=24, d_model=D, n_heads=HEADS, n_kv_heads=KV_HEADS, n_encoder_layers=0, n_decoder_layers=1, d_ff=32, positions="none"
)  # fmt: skip
GROUP = np.arange(HEADS) // (HEADS // KV_HEADS)  # the key head of each query head
TOKENS = np.random.default_rng(7).integers(3, 24, (1, 24))


def model(seed=3):
    """With weights large enough that attention has preferences."""
    made = mt.Transformer(CONFIG, seed=seed, dtype=np.float64)
    for name in ("decoder.0.attention.q.weight", "decoder.0.attention.k.weight"):
        made.weights[name][...] *= 4
    return made


def read(made, memory, length, tokens=TOKENS):
    """A reader that has read the tokens in segments of this length, with `memory`."""
    made.add_memory_weights(memory, seed=1)
    reader = Reader(made, memory, len(tokens))
    for i in range(0, tokens.shape[1], length):
        reader.read(tokens[:, i : i + length])
    return reader


def inputs(made, tokens=TOKENS):
    """x (N, d) of the layer."""
    tap = Tap(passes=False)
    Reader(made, Stack([tap]), len(tokens)).read(tokens)
    ((_, _, hidden, _, _),) = tap.seen
    return hidden[0]


def heads(made, x, part):
    """Rows (N, d) as queries, keys or values (heads, N, D)."""
    name = f"decoder.0.attention.{part}."
    y = x @ made.weights[name + "weight"] + made.weights.get(name + "bias", 0)
    return y.reshape(len(x), -1, HEAD).transpose(1, 0, 2)


def softmax(scores):
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def causal(made, x):
    """The layer's attention within one segment of rows x (T, d), before its output projection: (H, T, D)."""
    q, k, v = (heads(made, x, part) for part in "qkv")
    scores = np.einsum("htd,hsd->hts", q, k[GROUP]) / np.sqrt(HEAD)
    return softmax(np.where(np.tri(len(x), dtype=bool), scores, -np.inf)) @ v[GROUP]


def outputs(made, memory, length, tokens=TOKENS):
    """What the layer's heads give in each segment, (H, length, D), as the library computes it: caught before the output projection."""
    attention, caught = made.decoder.layers[0].attention.f, []
    plain = attention._with_memory
    attention._with_memory = lambda *arguments: caught.append(plain(*arguments)) or caught[-1]
    try:
        read(made, memory, length, tokens)
    finally:
        del attention._with_memory
    return [out[0] for out in caught]
