"""Seeded mutations of valid folders, opened as a user would. `python tests/mutations.py FOLDER SEED COUNT` ends with 0 where each was
loaded or was one of our errors; the process has limits of memory, and of time for each.
"""

import base64
import contextlib
import copy
import json
import os
import random
import resource
import shutil
import signal
import sys
import traceback
from pathlib import Path

import numpy as np

import mini_tfm as mt
from mini_tfm.errors import MiniTfmError
from mini_tfm.text.tokenizers import ByteTokenizer, train_bpe
from mini_tfm.transformer import load_checkpoint

SECONDS, BYTES = 60, 3 << 30  # for each, and of address space: they tell a hang, not a slow machine
CPU_SECONDS = 1.0  # for each; most take a hundredth of that
MOST_BYTES = 64 << 20  # that the process may grow by for one, where Linux tells
NASTY = [
    *(0, -1, 1, 2**31, 2**32 - 1, 2**63, -(2**63), 10**399, 1e308, 5e-324, 0.5, True, None, "", "x", "\0", "é" * 300, [], {}, [[]]),
    *([0] * 1000, {"type": "Sequence"}, {"Regex": "(a*)*b"}, {"String": ""}, "recurrent:tokens=99999999", "store:path=/"),
]  # fmt: skip


def make(folder: Path) -> list[Path]:
    """Runs with tokenizers of several kinds, and a packed model."""
    made = []
    text = "the cat sat on the mat, naïve café ☕ "
    for name, tokenizer, memory, fields in (
        ("bytes", ByteTokenizer(), "window:size=4+recurrent:tokens=2", {"segment_length": 8}),
        ("bpe", train_bpe([text] * 3, 262), None, {"n_encoder_layers": 0, "positions": "rotary"}),
        ("words", train_bpe([text] * 3, 300), "window:size=3", {"positions": "relative", "relative_buckets": 4}),
    ):
        sizes = {"d_model": 4, "n_heads": 2, "n_encoder_layers": 1, "n_decoder_layers": 1, "d_ff": 4}
        model = mt.Transformer(mt.Config(vocab_size=300, **{**sizes, **fields}))
        trainer = mt.Trainer(model, None if memory is None else mt.memory(memory), tokenizer=tokenizer)
        rows = tokenizer.encode(text * 3)[:16].reshape(1, 2, 8)
        trainer.step(rows if model.config.has_encoder else None, rows)
        trainer.save(folder / name)
        made.append(folder / name)
    checkpoint = load_checkpoint(made[0], "int8")
    mt.Pipeline(checkpoint.model, checkpoint.tokenizer, checkpoint.memory()).save(folder / "packed")
    made.append(folder / "packed")
    rules = json.loads((made[2] / "tokenizer.json").read_text())
    charsmap = base64.b64encode((2048).to_bytes(4, "little") + bytes(2048) + b"a\0").decode()
    steps = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}, {"type": "NFKC"}]
    rules["normalizer"] = {"type": "Sequence", "normalizers": [*steps, {"type": "Precompiled", "precompiled_charsmap": charsmap}]}
    rules["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": r"\s+(?!\S)|[^\s]+"}, "behavior": "Isolated", "invert": False}
    (made[2] / "tokenizer.json").write_text(json.dumps(rules))
    return made


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Bytes changed, removed, put in, repeated, or the end cut off; and in JSON, a value exchanged for a nasty one."""
    if data[:1] == b"{" and rng.random() < 0.6:
        value = json.loads(data)
        for _ in range(rng.randint(1, 3)):
            _exchange(value, rng)
        return json.dumps(value).encode()
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        kind = rng.randrange(6)
        if kind == 0:
            changed[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del changed[at : at + rng.choice([1, 1, 2, 8, 64])]
        elif kind == 2:
            changed[at:at] = rng.choice([b"0", b'"', b"9" * 30, b"{", b"[" * 100, b"\xff", b"\0" * 8, b"-", b"null,"])
        elif kind == 3:
            changed[at:at] = changed[at : at + rng.choice([1, 16, 256])] * rng.choice([1, 3])
        elif kind == 4 and rng.random() < 0.3:
            del changed[at:]
        elif len(changed) > 8:  # the length of a header
            changed[rng.randrange(8)] = rng.randrange(256)
    return bytes(changed)


def _exchange(value: object, rng: random.Random) -> None:
    """A value somewhere in JSON, at any depth, becomes a nasty one, is left out, or stands under another key."""
    while True:
        keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(value[key], dict | list) and value[key] and rng.random() < 0.8:
            value = value[key]
        elif isinstance(value, dict) and rng.random() < 0.2:
            value[rng.choice(["x", "type", "pattern", "model"])] = value.pop(key)
            return
        else:
            value[key] = copy.deepcopy(rng.choice(NASTY))
            return


def use(folder: Path) -> None:
    """What a user does with a folder."""
    checkpoint = load_checkpoint(folder)
    memory = checkpoint.memory()
    if checkpoint.tokenizer is not None:
        ids = checkpoint.tokenizer.encode("the cat naïve ☕  ")
        checkpoint.tokenizer.decode(ids)
        pipe = mt.Pipeline(checkpoint.model, checkpoint.tokenizer, memory)
        if pipe.segment_length < 1000:
            pipe.generate("the cat", max_new_tokens=2)
    if checkpoint.model.precision is None:
        mt.Trainer.resume(folder)


def resident(name: str) -> int:
    """Bytes of RAM that this process has, VmRSS, or has had since `forget_peak`, VmHWM; 0 where Linux does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":")), 0)


def forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def main(place: str, seed: int, count: int) -> int:
    folders = make(Path(place))
    for folder in folders:
        use(folder)  # valid before it is changed
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    np.seterr(all="ignore")  # weights are mutated, too
    for number in range(seed, seed + count):
        rng = random.Random(number)
        folder = rng.choice(folders)
        work = Path(place, "work")
        shutil.copytree(folder, work)
        path = rng.choice(sorted(work.iterdir()))
        path.write_bytes(mutated(path.read_bytes(), rng))
        signal.alarm(SECONDS)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        print(number, path.name, flush=True)
        forget_peak()
        before = resident("VmRSS")
        try:
            use(work)
        except MiniTfmError as error:
            if len(str(error)) > 5000:
                print(f"an error of {len(str(error))} characters", file=sys.stderr)
                return 1
        except BaseException:
            print(f"mutation {number} of {folder.name}/{path.name}:", file=sys.stderr)
            traceback.print_exc()
            return 1
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        if (grown := resident("VmHWM") - before) > MOST_BYTES:
            print(f"mutation {number} of {folder.name}/{path.name} took {grown >> 20} MB", file=sys.stderr)
            return 1
        shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    sys.stderr.flush()
    os._exit(code)
