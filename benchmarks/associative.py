"""What a model learns with each memory: associative retrieval of 1 to 4 pairs, two segments back. The table of docs/memories.md.

A stream is three segments of 4 tokens: 1 to 4 pairs, each one token that says a key of 8 and a value of 8, among tokens that say
nothing; 4 tokens that say nothing; and a key, whose value is to be said. Without a memory 1 in 8 is right. A decoder-only model reads
the stream; the encoder of an encoder-decoder does, and its decoder is asked by the key and says the value. A pair's key and value share
a token, so what is asked of a memory is to keep and to find, and nothing else.

Training ends when 99 % of 4 pairs are right in streams held out for that, or after --steps. What the table says is measured in other
streams. All memories have one recipe but for armt, which hardly keeps what a second segment says in models of one layer.

    python benchmarks/associative.py                 all of it, 3 seeds, on as many processes as there are cores
    python benchmarks/associative.py --layers 1 --width 32 --learning-rate 3e-3 --memory armt:tokens=4
    python benchmarks/associative.py --enough 2 --steps 2000    all steps
    python benchmarks/associative.py --seeds 1 --steps 400 --memory window:size=8 --kind decoder-only
"""

import argparse
import os
import time
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np

import mini_tfm as mt
from mini_tfm.autodiff import value_of
from mini_tfm.data.batches import Batch
from mini_tfm.stream import Stream
from mini_tfm.train.segments import read_batch

N, LENGTH, MOST = 8, 4, 4
KEY, VALUE, PAIR, NOISE = 3, 3 + N, 3 + 2 * N, 3 + 2 * N + N * N
KINDS = {"decoder-only": "rotary", "encoder-decoder": "relative"}  # and their positions
ENOUGH, STEPS_BETWEEN = 0.99, 100  # right of MOST pairs when training ends; how often that is looked at
HELD_OUT, TEST = 98, 99  # seeds of streams
MEMORIES = ["none", "window:size=8", "recurrent:tokens=4", "infini:rule=linear", "infini", "armt:tokens=4", "titans", "store:top_k=4"]


class Recipe(NamedTuple):
    layers: int = 1  # of the encoder, if there is one, and of the decoder
    width: int = 32  # of the model
    learning_rate: float = 3e-3  # which falls to 0
    steps: int = 8000  # at most


RECIPES = {"armt:tokens=4": Recipe(layers=2, width=64, learning_rate=1e-3, steps=4000)}


def config(kind, recipe):
    depths = {"n_encoder_layers": recipe.layers * (kind == "encoder-decoder"), "n_decoder_layers": recipe.layers}
    sizes = {"vocab_size": NOISE + N, "d_model": recipe.width, "n_heads": 2, "d_ff": 2 * recipe.width, "segment_length": LENGTH}
    return mt.Config(**sizes, **depths, positions=KINDS[kind])


def streams(rng, size, n_pairs):
    """What is said (B, 3, LENGTH), with n_pairs (B,) pairs in the first segment, and the key and value that are asked for, (B,) each."""
    keys, values = rng.permuted(np.tile(np.arange(N), (size, 1)), axis=1)[:, :LENGTH], rng.integers(N, size=(size, LENGTH))
    said = rng.integers(NOISE, NOISE + N, (size, 3, LENGTH))
    are_pairs = np.argsort(rng.random((size, LENGTH)), axis=1) < n_pairs[:, None]
    said[:, 0] = np.where(are_pairs, PAIR + keys * N + values, said[:, 0])
    asked = np.argmax(are_pairs * rng.random((size, LENGTH)), axis=1)
    row = np.arange(size)
    return said, KEY + keys[row, asked], VALUE + values[row, asked]


def batch(kind, rng, size, n_pairs):
    """A batch, and where in the last target the value stands."""
    said, key, value = streams(rng, size, n_pairs)
    if kind == "decoder-only":
        said[:, 2, 2], said[:, 2, 3] = key, value
        weights = np.zeros(said.shape, np.float32)
        weights[:, 2, 3] = 1
        return Batch(None, said, None, np.full((size, 3), LENGTH), weights), 3
    said[:, 2, 3] = key
    target = np.zeros((size, 3, 2), np.int64)
    target[:, 2, 0], target[:, 2, 1] = key, value
    weights = np.zeros(target.shape, np.float32)
    weights[:, 2, 1] = 1
    return Batch(said, target, np.full((size, 3), LENGTH), np.tile([0, 0, 2], (size, 1)), weights), 1


def share_right(kind, model, memory, n_pairs, seed=TEST, size=512):
    asked, at = batch(kind, np.random.default_rng([seed, n_pairs]), size, np.full(size, n_pairs))
    stream = Stream(model, memory, size)
    for _, hidden in read_batch(stream, asked):
        scores = value_of(stream.logits(value_of(hidden)[:, at]))
    return float((scores.argmax(axis=-1) == asked.target[:, 2, at]).mean())


def learned(kind, text, recipe, seed, enough=ENOUGH):
    """The share that is right by number of pairs, after training, the steps of training, and the CPU seconds it took."""
    mt.set_num_threads(1)
    began, rng = time.process_time(), np.random.default_rng(seed)
    model = mt.Transformer(config(kind, recipe), seed=seed)
    memory = mt.memory(text) if text != "none" else None
    trainer = mt.Trainer(model, memory, learning_rate=recipe.learning_rate, warmup_steps=50, total_steps=recipe.steps)
    for step in range(1, recipe.steps + 1):
        each, _ = batch(kind, rng, 32, rng.integers(1, MOST + 1, 32))
        trainer.step(each.source, each.target, each.source_lengths, each.target_lengths, each.weights)
        if step % STEPS_BETWEEN == 0 and share_right(kind, model, memory, MOST, HELD_OUT) >= enough:
            break
    shares = [share_right(kind, model, memory, n) for n in range(1, MOST + 1)]
    return shares, trainer.step_count, time.process_time() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="at most")
    parser.add_argument("--layers", type=int, help="of the encoder, if there is one, and of the decoder")
    parser.add_argument("--width", type=int, help="of the model")
    parser.add_argument("--learning-rate", type=float, help="at its highest")
    parser.add_argument("--enough", type=float, default=ENOUGH, metavar="SHARE", help="of 4 pairs; above 1: all steps are taken")
    parser.add_argument("--memory", action="append", help=f"default: {', '.join(MEMORIES)}")
    parser.add_argument("--kind", action="append", choices=KINDS)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    began, texts, kinds = time.perf_counter(), given.memory or MEMORIES, given.kind or list(KINDS)
    print("| memory | model | " + " | ".join(f"{n} pair{'s' * (n > 1)}" for n in range(1, MOST + 1)) + " | steps | CPU s |")
    print("|---|---|" + "---|" * (MOST + 2), flush=True)
    with ProcessPoolExecutor(given.processes) as pool:
        cells = [(text, kind) for text in texts for kind in kinds]
        instead = {name: value for name in Recipe._fields if (value := getattr(given, name)) is not None}
        recipes = {text: RECIPES.get(text, Recipe())._replace(**instead) for text in texts}
        found = {
            (text, kind): [pool.submit(learned, kind, text, recipes[text], seed, given.enough) for seed in range(given.seeds)]
            for text, kind in cells
        }
        for (text, kind), futures in found.items():
            shares, steps, seconds = (np.array(of) for of in zip(*(future.result() for future in futures), strict=True))
            columns = (f"{100 * of.mean():.1f} % ({100 * of.min():.1f} to {100 * of.max():.1f})" for of in shares.T)
            spent = f"{steps.min():,} to {steps.max():,} | {seconds.mean():.0f}"
            print(f"| {text} | {kind} | {' | '.join(columns)} | {spent} |", flush=True)
    print(f"\n{given.seeds} seeds: {(time.perf_counter() - began) / 60:.1f} minutes on {given.processes} processes")


if __name__ == "__main__":
    main()
