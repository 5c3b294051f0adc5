"""Many sequences through one model, in T5-small's shape: joined or group by group, and shared by threads.

    python benchmarks/batching.py                      # both questions, on an idle machine
    python benchmarks/batching.py --only joined --pairs 5
    python benchmarks/batching.py --only workers

joined: 200 sources of mixed lengths, whose outputs end at lengths drawn once. What takes the places of ended rows at once
(`batch_tokens`) beside groups of like length that each run to their end, in turns; tokens of both are compared. workers: the same
calls from 1 or 2 Python threads on one model, with 2, 1 or 1 threads of the library each.
"""

import argparse
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

import mini_tfm as mt
from mini_tfm.generate.rules import Rules

SHAPE = {
    "vocab_size": 32128, "d_model": 512, "n_heads": 8, "n_encoder_layers": 6, "n_decoder_layers": 6, "d_ff": 2048, "positions": "relative",
    "norm": "rms", "bias": False, "embedding_scale": False, "attention_scale": 1.0,
}  # fmt: skip
MOST = 96  # new tokens


def sources(n, alike, rng):
    """(sources, their lengths, the lengths of outputs), which follow those of the sources more or less: translations, or answers."""
    lengths = np.clip(rng.lognormal(3.0, 0.6, n), 4, 80).astype(int)
    spread = rng.lognormal(0.0, 0.2, n)
    outputs = lengths * spread if alike else np.clip(rng.lognormal(3.0, 0.7, n), 3, MOST)
    return rng.integers(3, 32000, (n, lengths.max())), lengths, np.clip(outputs, 3, MOST).astype(int)


class Ends:
    """Random weights end nowhere: while this is entered, sequences of one call end as long as `outputs` says of each."""

    made = Rules.of.__func__

    def __init__(self, outputs):
        self.outputs = outputs

    def __enter__(self):
        def of(cls, options, config, n_prompt, numbers, **more):
            rules = Ends.made(cls, options, config, n_prompt, numbers, **more)
            rules.stops.append(lambda ids, rows: ids.shape[1] - n_prompt >= self.outputs[numbers[rows]])
            return rules

        Rules.of = classmethod(of)

    def __exit__(self, *_):
        Rules.of = classmethod(Ends.made)


def generated(model, source, lengths, outputs, **options):
    with Ends(outputs):
        return model.generate(source[:, : lengths.max()], lengths, max_new_tokens=MOST, **options)


def grouped(model, source, lengths, outputs, batch_tokens):
    """Like lengths together, each group to its end."""
    found = [None] * len(source)
    order = sorted(range(len(source)), key=lambda row: -lengths[row])
    while order:
        n = max(1, batch_tokens // (int(lengths[order[0]]) + MOST))
        rows, order = np.array(order[:n]), order[n:]
        for row, ids in zip(rows, generated(model, source[rows], lengths[rows], outputs[rows]), strict=True):
            found[row] = ids
    return found


def timed(call):
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def joined(model, pairs, batch_tokens, n):
    for kind, alike in (("outputs as long as sources", True), ("outputs of any length", False)):
        given = sources(n, alike, np.random.default_rng(1))
        ways = {
            "grouped": partial(grouped, model, *given, batch_tokens),
            "joined": partial(generated, model, *given, batch_tokens=batch_tokens),
        }
        times = {name: [] for name in ways}
        for _ in range(pairs):
            found = {}
            for name, way in ways.items():
                found[name], *seconds = timed(way)
                times[name].append(seconds)
            assert found["grouped"] == found["joined"]
        ratios = [[a / b for a, b in zip(*pair, strict=True)] for pair in zip(times["grouped"], times["joined"], strict=True)]
        wall, cpu = (statistics.median(column) for column in zip(*ratios, strict=True))
        rate = given[2].sum() / statistics.median(seconds for seconds, _ in times["joined"])
        print(f"{kind}: joined {wall:.2f} times as fast (CPU time {cpu:.2f}), {rate:.0f} tokens/s, {pairs} pairs", flush=True)


def workers(model, pairs, n):
    source, lengths, outputs = sources(n, True, np.random.default_rng(2))
    parts = [list(range(i, n, 8)) for i in range(8)]
    most = int(np.median(outputs))

    def run(n_workers, n_threads):
        mt.set_num_threads(n_threads)
        part = lambda rows: model.generate(source[rows], lengths[rows], max_new_tokens=most, batch_tokens=1024)  # noqa: E731
        with ThreadPoolExecutor(n_workers) as pool:
            return list(pool.map(part, parts))

    ways = [(1, 1), (1, 2), (2, 1), (2, 2)]
    times = {way: [] for way in ways}
    for _ in range(pairs):
        found = []
        for way in ways:
            result, wall, _ = timed(lambda way=way: run(*way))
            times[way].append(wall)
            found.append(result)
        assert all(each == found[0] for each in found)
    for way in ways:
        ratio = statistics.median(a / b for a, b in zip(times[1, 1], times[way], strict=True))
        print(f"{way[0]} workers x {way[1]} threads: {ratio:.2f} times as fast as 1 x 1, {pairs} rounds", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=["joined", "workers"])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--sequences", type=int, default=200)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    model = mt.Transformer(mt.Config(**SHAPE))
    if options.dtype != "float32":
        model.pack(options.dtype)
    if options.only != "workers":
        joined(model, options.pairs, options.batch_tokens, options.sequences)
    if options.only != "joined":
        workers(model, options.pairs, options.sequences)
    print(f"load {os.getloadavg()[0]:.1f}", file=sys.stderr)


if __name__ == "__main__":
    main()
