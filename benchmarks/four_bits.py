"""What weights in four bits would cost: the table of docs/decisions/eight-bits.md.

    python benchmarks/four_bits.py                  five minutes
    python benchmarks/four_bits.py --model characters

32 weights in a row of a column share a scale, and in some formats a least number; each is rounded to one of 16 values. The rounded model
and the one in float32 are given the same text: how many of the likeliest tokens are equal, and how many more bits a token takes.
int8 stands beside it. No product is computed in four bits, so nothing is said about speed.
"""

import argparse

import numpy as np
from benchmarks.accuracy import KEYS, MODELS, between, compared

import mini_tfm as mt
from benchmarks import inference

GROUP = 32
TABLES = ("embedding", "positions", "relative")  # weights that are no matrix of a product


def one_scale(groups):
    """groups (..., GROUP), each rounded to -8 to 7 times a scale, which makes its largest number exact: llama.cpp's Q4_0."""
    largest = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)
    scale = np.where(largest == 0, 1, largest / -8)
    return np.clip(np.rint(groups / scale), -8, 7) * scale


def best_scale(groups):
    """The same with the scale of 34 that has the least sum of squared errors."""
    largest = np.abs(groups).max(-1, keepdims=True)
    best, least = groups * 0, np.full(largest.shape, np.inf)
    for scale in (sign * largest * part / 8 for part in np.linspace(0.75, 1.15, 17) for sign in (1, -1)):
        scale = np.where(scale == 0, 1, scale)
        rounded = np.clip(np.rint(groups / scale), -8, 7) * scale
        error = np.sum((rounded - groups) ** 2, -1, keepdims=True)
        best, least = np.where(error < least, rounded, best), np.minimum(error, least)
    return best


def scale_and_least(groups):
    """Each rounded to its least number and 0 to 15 times a scale: Q4_1, and the inner groups of Q4_K."""
    least = groups.min(-1, keepdims=True)
    scale = (groups.max(-1, keepdims=True) - least) / 15
    scale = np.where(scale == 0, 1, scale)
    return np.rint((groups - least) / scale) * scale + least


FORMATS = {"one scale": one_scale, "the best scale": best_scale, "scale and least": scale_and_least}


def rounded(model, to, output):
    """The model with all its matrices rounded; output: its output layer, too, where that is the table of tokens."""
    weights = {name: np.array(value) for name, value in model.weights.items()}
    for name, value in weights.items():
        is_output = name == model.output.name
        if value.ndim != 2 or (is_output and not output) or (not is_output and any(part in name for part in TABLES)):
            continue
        columns = value if is_output and model.output.is_tied else value.T
        if columns.shape[1] % GROUP == 0:
            groups = to(columns.reshape(len(columns), -1, GROUP).astype(np.float64)).reshape(columns.shape).astype(np.float32)
            weights[name] = groups if columns is value else np.ascontiguousarray(groups.T)
    return mt.Transformer(model.config, weights=weights)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=MODELS[:3])
    given = parser.parse_args(arguments)
    print("| model | weights | likeliest tokens equal | bits |\n|---|---|---:|---:|")
    for name in given.model or MODELS[:3]:
        wide = inference.ours(KEYS.get(name, name), "float32")
        found = {"int8": compared(name, "int8")}
        for words, to in FORMATS.items():
            for output in (False, True):
                key = f"4 bits, {words}, {'all' if output else 'all but the output layer'}"
                found[key] = between(name, wide, rounded(wide, to, output))
        for words, told in found.items():
            print(f"| {name} | {words} | {100 * told['equal']:.1f} % | {100 * (told['narrow'] / told['bits'] - 1):+.2f} % |", flush=True)


if __name__ == "__main__":
    main()
