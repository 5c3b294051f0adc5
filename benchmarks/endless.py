"""A stream of a million tokens through memories of constant size: RAM, time a token and bits per byte stay as they are.

A small decoder is trained with each memory, from the same start, on segments of bytes of Python's own documentation. Then one stream
reads 100,000 bytes of held-out text ten times over, without a break: each tenth of the stream is the same text, so its bits per byte,
CPU time a token and resident memory may be compared. Each memory has a process and one thread of its own.

    python benchmarks/endless.py                                   about 2 minutes on two cores
    python benchmarks/endless.py --steps 20 --tokens 20000 --memory window:size=32,sinks=4
"""

import argparse
import itertools
import os
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np

import mini_tfm as mt
from mini_tfm.autodiff import value_of
from mini_tfm.data.batches import fields
from mini_tfm.data.streams import TextStreams
from mini_tfm.stream import Stream
from mini_tfm.text import ByteTokenizer
from mini_tfm.text.documents import python_topics

LENGTH, TENTHS = 64, 10
MEMORIES = ["window:size=64,sinks=4", "infini", "recurrent:tokens=8"]
CONFIG = {"vocab_size": 259, "d_model": 64, "n_heads": 4, "n_encoder_layers": 0, "n_decoder_layers": 2, "d_ff": 128, "positions": "rotary"}


def texts(n_held_out):
    """Token ids (tokens,): what is trained on, and n_held_out tokens that are not."""
    topics = python_topics()
    names = sorted(topics)
    np.random.default_rng(0).shuffle(names)
    ids = ByteTokenizer().encode("\n".join(topics[name] for name in names))
    return ids[n_held_out:], ids[:n_held_out]


def trained(text, steps, ids):
    model, memory = mt.Transformer(mt.Config(**CONFIG, segment_length=LENGTH), seed=0), mt.memory(text)
    trainer = mt.Trainer(model, memory, learning_rate=3e-3, warmup_steps=min(100, steps), total_steps=steps)
    data = {n: TextStreams([ids], segment_length=LENGTH, n_segments=n, batch_size=64 // n, has_encoder=False) for n in (2, 4, 8)}
    for step in range(steps):  # longer and longer streams, a third of the steps each (arXiv 2207.06881, section 4)
        trainer.step(*fields(data[(2, 4, 8)[3 * step // steps]].batch(step)))
    return model, memory


def resident():
    """Bytes of this process in RAM."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measured(text, steps, n_tokens):
    """Of each tenth of the stream: bits per byte, CPU microseconds a token (the median of its segments), MB resident at its end.

    And the bytes of state.
    """
    mt.set_num_threads(1)
    train, held_out = texts(n_tokens // TENTHS)
    model, memory = trained(text, steps, train)
    stream, rows = Stream(model, memory, 1), []
    for _ in range(TENTHS):
        bits, times = 0.0, []
        for i in range(0, len(held_out), LENGTH):
            tokens, began = held_out[None, i : i + LENGTH], time.process_time()
            stream.open(None, lengths := np.array([tokens.shape[1]]), tokens)
            scores = stream.log_probs(value_of(stream.decode(tokens, lengths)))
            bits -= float(np.take_along_axis(scores[0], tokens[0, :, None], 1).sum()) / np.log(2)
            stream.finish()
            times.append((time.process_time() - began) / len(tokens[0]))
        rows.append((bits / len(held_out), float(np.median(times)) * 1e6, resident() / 1e6))
    return rows, stream.run.nbytes()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--memory", action="append", help=f"default: {', '.join(MEMORIES)}")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    memories = given.memory or MEMORIES
    print("| memory | state, bytes | bits per byte, tenths | CPU us a token, first and last | MB resident, first and last |")
    print("|---|---|---|---|---|", flush=True)
    with ProcessPoolExecutor(given.processes, max_tasks_per_child=1) as pool:
        results = pool.map(measured, memories, itertools.repeat(given.steps), itertools.repeat(given.tokens))
        for text, (rows, n_bytes) in zip(memories, results, strict=True):
            bits, cpu, ram = zip(*rows, strict=True)
            times, sizes = (f"{x[0]:.1f}, {x[-1]:.1f} ({x[-1] / x[0] - 1:+.1%})" for x in (cpu, ram))
            print(f"| {text} | {n_bytes:,} | {' '.join(f'{x:.3f}' for x in bits)} | {times} | {sizes} |", flush=True)


if __name__ == "__main__":
    main()
