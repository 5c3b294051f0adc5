"""What keys and values in fewer bits cost and save: the table of docs/generation.md.

    python benchmarks/caches.py                      two minutes
    python benchmarks/caches.py --model characters --tokens 200 --keys 256 --pairs 3

A model in float32 is fed a text, with each cache, as if token by token: how many of the likeliest tokens are those of a float32 cache, and
how many more bits a token takes. Then the attention of one token alone (9 heads, of which 3 share keys, as SmolLM2-135M has them), over
keys that come from memory and not from a cache of the processor, in pairs A B A B with float32: processor time of one thread.
"""

import argparse
import time
from functools import partial

from benchmarks.accuracy import CACHES, compared_caches
from benchmarks.attention import KeptKeys
from benchmarks.common import interleaved

import mini_tfm as mt

HEADS, D = 3, 64
BYTES = {"float32": 4 * D, "bfloat16": 2 * D, "int8": D + 4}


def processor_seconds(call, number):
    """A call."""
    began = time.process_time()
    for _ in range(number):
        call()
    return (time.process_time() - began) / number


def times(keys, pairs):
    """Of each cache: microseconds a token, and how many times as fast as float32 it is."""
    size, number = f"1 x {3 * HEADS} x 1 x {keys} x {D}", max(1, 200_000 // keys)
    calls = {dtype: partial(processor_seconds, KeptKeys().ways(size, dtype)[""], number) for dtype in CACHES}
    found = {}
    for dtype in CACHES[1:]:
        ratio = interleaved(calls[dtype], calls["float32"], pairs)
        found["float32"] = found.get("float32", (1e6 * ratio.theirs, 1.0))
        found[dtype] = 1e6 * ratio.ours, ratio.median
    return found


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SmolLM2-135M", choices=["SmolLM2-135M", "characters"])
    parser.add_argument("--tokens", type=int, default=700, help="that the model is fed")
    parser.add_argument("--keys", type=int, nargs="+", default=[1024, 8192], help="that a token attends to")
    parser.add_argument("--pairs", type=int, default=15)
    given = parser.parse_args(arguments)
    mt.set_num_threads(1)
    measured = [times(keys, given.pairs) for keys in given.keys]
    head = ["cache", "bytes a row of 64", "likeliest tokens equal", "bits a token", *(f"{keys:,} keys" for keys in given.keys)]
    print("| " + " | ".join(head) + " |\n|---" + "|---:" * (len(head) - 1) + "|")
    for dtype in CACHES:
        told = compared_caches(given.model, given.tokens, dtype)
        row = [dtype, f"{BYTES[dtype]}", f"{100 * told['equal']:.1f} %", f"{100 * told['more']:+.3f} %"]
        row += [f"{each[dtype][0]:.0f} µs, {each[dtype][1]:.2f} times as fast" for each in measured]
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
