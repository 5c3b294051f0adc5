"""Tiny files and texts that ask for huge work, one named kind each. `python tests/hostile.py` tries them all, each in a process of
its own with limits of memory and time, and prints a line of JSON for each: its name and how it ended.

The limits are far above what a mend needs, and far below what a fault takes: they tell a hang, not a slow machine.
"""

import base64
import json
import os
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import mini_tfm as mt
from mini_tfm.checkpoint.models import save_model
from mini_tfm.errors import MiniTfmError
from mini_tfm.text.tokenizers import BPETokenizer, ByteTokenizer, load_tokenizer
from mini_tfm.transformer import load_checkpoint

SECONDS = 60
MOST_BYTES, MOST_BYTES_A_BYTE = 16 << 20, 20  # that a process may grow by: at all, and for each byte of the file
CPU_SECONDS, CPU_SECONDS_A_BYTE = 1.0, 1e-6  # that it may take: most take a hundredth of that
BYTES = 3 << 30  # of address space, of which a fresh process with NumPy takes some 0.5 GB

LETTERS = {chr(97 + i): i for i in range(26)} | {"<unk>": 26}
MODEL = {"type": "BPE", "vocab": LETTERS, "merges": [], "unk_token": "<unk>"}


def rules(**changes: object) -> dict:
    return {"version": "1.0", "added_tokens": [], "model": MODEL, **changes}


def sequence(place: str, *members: object) -> dict:
    return {
        "type": "Sequence",
        {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}[place]: list(members),
    }


def replace(pattern: str | dict, content: str) -> dict:
    return {"type": "Replace", "pattern": {"String": pattern} if isinstance(pattern, str) else pattern, "content": content}


def split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def precompiled(data: bytes) -> dict:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def nested(place: str, inner: object, depth: int) -> object:
    for _ in range(depth):
        inner = sequence(place, inner, inner)
    return inner


def normalizers(*members: object) -> dict:
    return rules(normalizer=sequence("normalizer", *members))


def model(**changes: object) -> dict:
    return rules(model={**MODEL, **changes})


def wordpiece(**changes: object) -> dict:
    return rules(model={"type": "WordPiece", "vocab": {"[UNK]": 0, "a": 1, "##a": 2}, "unk_token": "[UNK]", **changes})


TEMPLATE = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}
TEXT_A = {"Sequence": {"id": "A", "type_id": 0}}
TOKENIZERS: dict[str, dict] = {
    "a trie of 4 GB in 8 bytes": rules(normalizer=precompiled(b"\xff" * 8)),
    "a trie longer than its file": rules(normalizer=precompiled(struct.pack("<I", 4096) + b"\0" * 64)),
    "a trie that is not there": rules(normalizer=precompiled(b"\1")),
    "a trie of half units": rules(normalizer=precompiled(struct.pack("<I", 6) + b"\0" * 64)),
    "a map whose texts are no UTF-8": rules(normalizer=precompiled(struct.pack("<I", 4) + b"\0" * 4 + b"\xff\0")),
    "a map of a character to a book": rules(normalizer=precompiled(struct.pack("<I", 4) + b"\0" * 4 + b"x" * 100_000 + b"\0")),
    "a map that is not closed": rules(normalizer=precompiled(struct.pack("<I", 4) + b"\0" * 4 + b"x")),
    "two maps": normalizers(*[precompiled(struct.pack("<I", 4) + b"\0" * 4 + b"x\0")] * 2),
    "ten for one, nine times": normalizers(*[replace(chr(97 + i), chr(98 + i) * 10) for i in range(9)]),
    "two for one, 22 times": normalizers(*[replace("a", "aa")] * 22),
    "a regular expression for one, 22 times": normalizers(*[replace({"Regex": "[a-z]"}, "aa")] * 22),
    "pairs that breed": normalizers(*[replace("ab", "abab")] * 22),
    "pairs across what is put in": normalizers(*[replace("ba", "baab")] * 40),
    "letters in turn": normalizers(*[replace("ab"[i % 2], "ba"[i % 2] * 3) for i in range(30)]),
    "behind a Prepend": normalizers({"type": "Prepend", "prepend": "a"}, *[replace("a", "aa")] * 22),
    "a Prepend of a book": rules(normalizer={"type": "Prepend", "prepend": "a" * 100_000}),
    "a Replace by a book": rules(normalizer=replace("a", "b" * 100_000)),
    "a Replace of nothing": rules(normalizer=replace("", "bb")),
    "ligatures that breed": normalizers(*[step for _ in range(8) for step in (replace("\u0635", "\ufdfa"), {"type": "NFKD"})]),
    "sequences in sequences": rules(normalizer=nested("normalizer", {"type": "NFC"}, 16)),
    "pre-tokenizers in sequences": rules(pre_tokenizer=nested("pre_tokenizer", {"type": "Whitespace"}, 16)),
    "bytes of bytes of bytes": rules(
        pre_tokenizer=sequence(
            "pre_tokenizer", *[{"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False}] * 30
        )
    ),
    "decoders in sequences": rules(decoder=nested("decoder", {"type": "Fuse"}, 16)),
    "a decoder that breeds": rules(decoder=sequence("decoder", *[replace("a", "aa")] * 30)),
    "a decoder that strips what is not there": rules(decoder={"type": "Strip", "content": "a", "start": 0, "stop": 1 << 60}),
    "nested repetition": rules(pre_tokenizer=split("(a+)+b")),
    "repeated alternatives": rules(pre_tokenizer=split("(?:a|a)*b")),
    "three repetitions": rules(pre_tokenizer=split("a*a*a*b")),
    "repetitions with limits": rules(pre_tokenizer=split("a{1,200}a{1,200}a{1,200}b")),
    "repetitions of repetitions with limits": rules(pre_tokenizer=split("((a{1,200}){1,200}){1,200}b")),
    "a reference back": rules(pre_tokenizer=split(r"(a*)\1b")),
    "recursion": rules(pre_tokenizer=split(r"(?<x>a\g<x>?b?)")),
    "a slow regular expression in a normalizer": rules(normalizer=replace({"Regex": "(a|aa)+$"}, "b")),
    "a slow regular expression in a decoder": rules(decoder=replace({"Regex": "(.*)*x"}, "b")),
    "brackets without end": rules(pre_tokenizer=split("(" * 10_000)),
    "pieces of length 0": rules(pre_tokenizer={"type": "FixedLength", "length": 0}),
    "a component of no kind": rules(pre_tokenizer={"type": "Nope"}),
    "words without limit": wordpiece(max_input_chars_per_word=10**9),
    "a number that is no number of characters": wordpiece(max_input_chars_per_word=10**30),
    "a prefix like a book": model(continuing_subword_prefix="#" * 100_000),
    "a suffix like a book": model(end_of_word_suffix="#" * 100_000),
    "a token like a book": rules(model={"type": "Unigram", "vocab": [["<unk>", 0.0], ["a" * 100_000, -1.0]], "unk_id": 0}),
    "a template that repeats": rules(post_processor={**TEMPLATE, "single": [TEXT_A] * 60, "pair": [TEXT_A]}),
    "a template without end": rules(post_processor={**TEMPLATE, "single": [TEXT_A] * 2000, "pair": [TEXT_A]}),
    "an id of 4 billion": rules(model={**MODEL, "vocab": {"a": (1 << 32) - 1}}),
    "merges of what is not there": model(merges=["x y z"] * 3),
}


def opens_tokenizer(content: dict) -> Callable[[Path], object]:
    def opens(folder: Path) -> object:
        (folder / "tokenizer.json").write_text(json.dumps(content))
        tokenizer = load_tokenizer(folder)
        return tokenizer.decode(tokenizer.encode("aaaaaaaaaa ab" * 10))

    return opens


def saved(folder: Path) -> Path:
    config = mt.Config(vocab_size=259, d_model=8, n_heads=2, n_encoder_layers=1, n_decoder_layers=1, segment_length=8)
    save_model(folder / "m", mt.Transformer(config), tokenizer=ByteTokenizer())
    return folder / "m"


def changes_config(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def opens(folder: Path) -> object:
        path = saved(folder) / "config.json"
        about = json.loads(path.read_text())
        changed = change(about)
        path.write_text(changed if isinstance(changed, str) else json.dumps(about))
        return load_checkpoint(path.parent).memory()

    return opens


def field(name: str, value: object) -> Callable[[Path], object]:
    return changes_config(lambda about: about["model"].__setitem__(name, value))


def number(name: str, digits: int) -> Callable[[Path], object]:
    """A field with a number of so many digits, as text: Python itself would not write it."""
    return changes_config(
        lambda about: json.dumps(about).replace(f'"{name}": {json.dumps(about["model"][name])}', f'"{name}": ' + "7" * digits)
    )


def memory(text: str) -> Callable[[Path], object]:
    return changes_config(lambda about: about.__setitem__("memory", text))


def tensors(header: object, data: bytes = b"") -> Callable[[Path], object]:
    def opens(folder: Path) -> object:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        (saved(folder) / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
        return mt.load(folder / "m")

    return opens


def entry(shape: list[int], size: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}


def config_of_tokenizer(content: str) -> Callable[[Path], object]:
    def opens(folder: Path) -> object:
        (folder / "tokenizer.json").write_text(json.dumps(rules()))
        (folder / "tokenizer_config.json").write_text(content)
        return load_tokenizer(folder)

    return opens


CASES: dict[str, Callable[[Path], object]] = {
    **{f"tokenizer: {name}": opens_tokenizer(content) for name, content in TOKENIZERS.items()},
    "config: 60,000 unknown fields": changes_config(lambda about: about["model"].update({f"v{i}": 0 for i in range(60_000)})),
    "config: an unknown field like a book": changes_config(lambda about: about["model"].update({"x" * 500_000: 1})),
    "config: 10 million layers": field("n_encoder_layers", 10**7),
    "config: more weights than any machine": changes_config(lambda about: about["model"].update(d_model=65536, n_encoder_layers=1024)),
    "config: a table of positions for ever": changes_config(
        lambda about: about["model"].update(positions="learned", max_positions=1 << 40)
    ),
    "config: segments of 0 tokens": field("segment_length", 0),
    "config: segments of 400 digits": number("segment_length", 400),
    "config: segments of 4,300 digits": number("segment_length", 4300),
    "config: segments of 4,301 digits": number("segment_length", 4301),
    "config: a width of 400 digits": number("d_model", 400),
    "config: an eps of 400 digits": number("norm_eps", 400),
    "config: an eps of 4,301 digits": number("norm_eps", 4301),
    "config: an id of 4,300 digits": number("bos_id", 4300),
    "config: a number as a text like a book": field("d_model", "7" * 500_000),
    "config: lists in lists": changes_config(lambda about: '{"format":' + "[" * 400_000),
    "memory: a stack of 20,000": memory("+".join(["window:size=4"] * 20_000)),
    "memory: a stack of 65": memory("+".join(["window:size=4"] * 65)),
    "memory: a name like a book": memory("w" * 500_000),
    "memory: quotes without end": memory("window:size='" + "\\'" * 100_000),
    "memory: 10,000 options": memory("window:" + ",".join(f"size{i}=1" for i in range(5_000))),
    "memory: a size of 400 digits": memory("window:size=" + "7" * 400),
    "memory: a size of 4,301 digits": memory("window:size=" + "7" * 4301),
    "memory: brackets": memory("window:size=" + "(" * 50_000),
    "tensors: a header of 2 ** 63 bytes": lambda folder: (
        (saved(folder) / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 63) + b"{}"),
        mt.load(folder / "m"),
    ),
    "tensors: a shape of 2 ** 120": tensors({"x": entry([1 << 60, 1 << 60], 8)}, b"\0" * 8),
    "tensors: a shape of 4,300 digits": tensors(b'{"x":{"dtype":"F32","shape":[' + b"7" * 4300 + b'],"data_offsets":[0,8]}}', b"\0" * 8),
    "tensors: no end of dimensions": tensors({"x": entry([1] * 100_000, 4)}, b"\0" * 4),
    "tensors: nothing, very wide": tensors({"x": entry([0, 1 << 62], 0)}),
    "tensors: 90,000 that nobody knows": tensors({f"x{i}": entry([0], 0) for i in range(90_000)}),
    "tensors: lists in lists": tensors(b'{"x":' + b"[" * 1_000_000),
    "tokenizer_config: lists in lists": config_of_tokenizer('{"x":' + "[" * 1_000_000),
    "tokenizer_config: a token like a book": config_of_tokenizer(json.dumps({"eos_token": "x" * 1_000_000})),
    "option: 4,301 digits": lambda folder: mt.load(saved(folder)).generate(np.zeros((1, 2), int), temperature=10**4301),
    "option: a segment of 4,301 digits": lambda folder: mt.Pipeline(mt.load(saved(folder)), ByteTokenizer(), segment_length=10**4301),
    "config: another format like a book": changes_config(lambda about: about.__setitem__("format", "x" * 500_000)),
    "config: a version of 4,300 digits": changes_config(
        lambda about: json.dumps(about).replace('"format_version": 1', '"format_version": ' + "7" * 4300)
    ),
    "option: a vocabulary of 4,301 digits": lambda folder: mt.text.train_bpe(["a"], 10**4301),
}


def _ending_of(name: str, folder: Path) -> str:
    try:
        CASES[name](folder)
    except MiniTfmError as error:
        return f"{type(error).__name__}: {error}"
    except BaseException as error:
        return f"not ours, {type(error).__name__}: {error}"
    return "no error"


def main(folder: str) -> None:
    """Each case in a child that has its own limits, so that whatever it does to itself is one line: its name, how it ended, how many

    seconds of CPU it took, by how many bytes the child grew, and how many it had to read.
    """
    BPETokenizer(json.dumps(rules()).encode()).encode("abc")  # imported once
    for number, name in enumerate(CASES):
        place = Path(folder, str(number))
        place.mkdir()
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            signal.alarm(SECONDS)
            resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
            before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
            ending = _ending_of(name, place)
            seconds, grown = time.process_time() - begun, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
            os.write(writer, f"{seconds:.3f} {grown} {ending}".encode("utf-8", "backslashreplace")[:60_000])
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            seconds, grown, ending = (pipe.read().decode() or "0 0 ").split(" ", 2)
        _, status = os.waitpid(pid, 0)
        if status:
            ending = f"the process ended with {os.waitstatus_to_exitcode(status)}"
        size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        print(json.dumps([name, ending, float(seconds), int(grown), size]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
