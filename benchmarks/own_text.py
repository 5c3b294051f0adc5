"""Does a memory pay on a text of one's own? The table of docs/own-text.md.

For each text, kind of model and seed: `mini-tfm train` without a memory and with one, for the same number of steps of the same
number of tokens, and `mini-tfm score` on files that training has not seen. The model without a memory is scored with one that needs no
training, too. No fact is planted, nothing is hidden: plain text.

    python benchmarks/own_text.py                                 three texts that come with Python: an hour of one core
    python benchmarks/own_text.py --text novels novels/*.txt      a text of your own
    python benchmarks/own_text.py --seeds 1 --steps 20 --kinds decoder-only

What is done is kept in --work, and not done again.
"""

import argparse
import ast
import json
import statistics
import subprocess
import sys
import sysconfig
from pathlib import Path

from mini_tfm.text import python_topics, split_documents

UNTRAINED = "knn_lm:share=0.25,temperature=6,top_k=64"  # temperature: a tenth of the model's width
HELD_OUT = 0.1  # of the bytes, in whole documents
MODEL = ["--d-model", "64", "--segment-length", "32", "--learning-rate", "4e-3"]
KINDS = {
    "decoder-only": (["--n-encoder-layers", "0", "--n-decoder-layers", "2"], "window:size=128"),
    "encoder-decoder": (["--n-encoder-layers", "2", "--n-decoder-layers", "2"], "window:size=128,site=decoder"),
}
STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"])
PACKAGES = ("asyncio", "email", "importlib", "json", "logging", "unittest")  # of the standard library: 1.6 MB of source
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def python_source():
    paths = [path for name in PACKAGES for path in sorted((STANDARD_LIBRARY / name).glob("*.py"))]
    return {path.relative_to(STANDARD_LIBRARY).as_posix(): path.read_text() for path in paths}


def python_docstrings(least=2000):
    """Of the standard library's modules, those with `least` characters of them; the packages above are left to the source code."""
    found = {}
    for path in sorted(STANDARD_LIBRARY.glob("*.py")):
        nodes = [node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, DOCUMENTED)]
        in_order = sorted(nodes, key=lambda node: getattr(node, "lineno", 0))
        text = "\n\n".join(filter(None, map(ast.get_docstring, in_order))) + "\n"
        if len(text) >= least:
            found[path.name] = text
    return found


def files_of(documents, folder):
    """(files to train on, files held out), written once."""
    parts = []
    for part, texts in zip(("train", "held-out"), split_documents(documents, HELD_OUT, 0), strict=True):
        (folder / part).mkdir(parents=True, exist_ok=True)
        parts.append([folder / part / f"{number:04}.txt" for number in range(len(texts))])
        for path, text in zip(parts[-1], texts.values(), strict=True):
            path.write_text(text, encoding="utf-8")
    return parts


def mini_tfm(*words):
    done = subprocess.run([sys.executable, "-m", "mini_tfm", *map(str, words), "--json"], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def measured(parts, folder, kind, memory, seed, steps):
    """Bits per byte of the held-out files, after training in `folder`; of the same model without its memory, or with UNTRAINED where it
    has none; and seconds."""
    train, held_out = parts
    more = ["--memory", memory, "--seed", seed, "--steps", steps, "--out", folder]
    trained = mini_tfm("train", "--text", *train, *KINDS[kind][0], *MODEL, *more)
    other = "none" if memory != "none" else UNTRAINED
    scores = mini_tfm("score", folder, *held_out, "--memory", "saved", "--memory", other)["memories"]
    bits, of_other = (each["all"]["bits_per_byte"] for each in scores)
    return {"bits_per_byte": bits, "untrained" if memory == "none" else "left_out": of_other, "seconds": trained["seconds"]}


def runs(texts, given):
    """(text, kind, memory) -> a result of each seed; what is known already is not measured again."""
    found = {}
    for name, documents in texts.items():
        parts = files_of(documents, given.work / name)
        for kind in given.kinds:
            for seed in range(given.seeds):
                for memory in ("none", given.memory or KINDS[kind][1]):
                    folder = given.work / name / kind / f"{memory}-{given.steps}-{seed}".replace(":", "-")
                    result = folder.with_suffix(".json")
                    if not result.exists():
                        result.parent.mkdir(parents=True, exist_ok=True)
                        result.write_text(json.dumps(measured(parts, folder, kind, memory, seed, given.steps)))
                    found.setdefault((name, kind, memory), []).append(json.loads(result.read_text()))
                    print(name, kind, memory, "seed", seed, found[name, kind, memory][-1], file=sys.stderr, flush=True)
    return found


def print_table(found):
    print("| text | model | memory | bits/byte with it, each seed | without any | less | the memory left out at the end |")
    print("|---|---|---|---|---|---|---|")
    for (name, kind, memory), results in found.items():
        bits = [each["bits_per_byte"] for each in results]
        if memory == "none":
            plain = bits
            print_row(name, kind, UNTRAINED, [each["untrained"] for each in results], plain, [])
        else:
            print_row(name, kind, memory, bits, plain, [each["left_out"] for each in results])


def print_row(name, kind, memory, *bits):
    less = [100 * (1 - one / other) for one, other in zip(*bits[:2], strict=True)]
    gain = f"{statistics.mean(less):.1f} % ({min(less):.1f} to {max(less):.1f})"
    with_it, without, left_out = [" / ".join(f"{each:.3f}" for each in some) for some in bits]
    print(f"| {name} | {kind} | `{memory}` | {with_it} | {without} | {gain} | {left_out} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", action="append", metavar=("NAME", "FILE"), help="instead of Python's; can be repeated")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--memory", help="to train with, instead of the window of each kind")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--work", type=Path, default=Path("own-text"), help="the folder for models and results")
    given = parser.parse_args()
    own = {name: {Path(file).name: Path(file).read_text(encoding="utf-8") for file in files} for name, *files in given.text or []}
    print_table(runs(own or {"documentation": python_topics(), "source code": python_source(), "docstrings": python_docstrings()}, given))


if __name__ == "__main__":
    main()
