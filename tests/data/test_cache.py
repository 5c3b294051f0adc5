"""Token caches: what is written is what was tokenized; nothing half, damaged or stale is ever opened; RAM stays bounded."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_same_bits, in_a_process

from mini_tfm.data import Corpus, TextFiles, build_token_cache, open_token_cache, token_cache
from mini_tfm.data import cache as cache_module
from mini_tfm.errors import FileProblem, InvalidType, InvalidValue
from mini_tfm.files import writing
from mini_tfm.text.tokenizers import ByteTokenizer, train_bpe

BYTES = ByteTokenizer()
TEXTS = ["eins", "zwei drei", "vier" * 50]


@pytest.fixture
def files(tmp_path):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text)
    return TextFiles([tmp_path / f"{i}.txt" for i in range(len(TEXTS))])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "some" / "x.tokens"


@pytest.fixture(autouse=True)
def folder(path):
    path.parent.mkdir()
    return path.parent


def assert_same_corpus(one, other):
    assert (len(one), one.kind, one.vocab_size, one.n_tokens) == (len(other), other.kind, other.vocab_size, other.n_tokens)
    assert_same_bits(np.array(one.tokens), np.array(other.tokens))
    np.testing.assert_array_equal(one.offsets, other.offsets)


@pytest.mark.parametrize("verify", [True, False])
def test_a_cache_is_the_corpus(files, path, verify):
    built = token_cache(path, files, BYTES)
    opened = token_cache(path, files, BYTES, verify=verify)
    for corpus in (built, opened, open_token_cache(path)):
        assert_same_corpus(corpus, Corpus.of(files, BYTES))
        assert corpus.fingerprint == built.fingerprint
    assert os.listdir(path.parent) == ["x.tokens"]
    assert not opened.tokens.flags.writeable and not opened.tokens.flags.owndata, "mapped, not read"


@pytest.mark.parametrize("vocab_size", [200, 300, 70_000])
def test_ids_of_every_size_and_pairs(path, vocab_size):
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(0, vocab_size, 1 + i % 5), rng.integers(0, vocab_size, 1 + i % 3)) for i in range(30)]
    corpus = build_token_cache(path, pairs, vocab_size=vocab_size)
    assert_same_corpus(corpus, Corpus.of(pairs, vocab_size=vocab_size))
    assert corpus.tokens.dtype.itemsize == {200: 1, 300: 2, 70_000: 4}[vocab_size]


def test_the_same_sources_give_the_same_bytes(files, path):
    token_cache(path, files, BYTES)
    token_cache(path.with_name("y"), files, BYTES)
    assert path.read_bytes() == path.with_name("y").read_bytes()


def test_an_iterable_is_written_as_it_comes(path):
    def documents():
        for i in range(50):
            assert not path.exists()
            yield f"document {i}"

    assert_same_corpus(build_token_cache(path, documents(), BYTES, end_id=2), Corpus.of(documents_again(), BYTES, end_id=2))
    assert_same_corpus(open_token_cache(path, BYTES), Corpus.of(documents_again(), BYTES, end_id=2))


def documents_again():
    return [f"document {i}" for i in range(50)]


# What does not fit


def test_another_tokenizer_is_told(files, path):
    token_cache(path, files, BYTES)
    before = path.read_bytes()
    other = train_bpe(TEXTS, 270)
    with pytest.raises(InvalidValue, match="another tokenizer"):
        token_cache(path, files, other)
    with pytest.raises(InvalidValue, match="another tokenizer"):
        open_token_cache(path, other, verify=False)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "verify", "told"),
    [
        (lambda folder: (folder / "1.txt").write_text("zwei vier"), True, r"changed .*\(1.txt\)"),  # of the same length
        (lambda folder: (folder / "1.txt").write_text("zwei"), False, r"changed .*\(1.txt\)"),
        (lambda folder: (folder / "1.txt").unlink(), False, "no such file"),
    ],
)
def test_a_changed_source_is_told(files, path, tmp_path, change, verify, told):
    token_cache(path, files, BYTES)
    before = path.read_bytes()
    change(tmp_path)
    with pytest.raises((InvalidValue, FileProblem), match=told if "changed" in told else "1.txt"):
        token_cache(path, files, BYTES, verify=verify)
    assert path.read_bytes() == before


def test_other_sources_or_options_are_told(files, path, tmp_path):
    token_cache(path, files, BYTES)
    for other, options, told in (
        (TextFiles(files.paths[:2]), {}, "changed"),
        (TextFiles(files.paths[::-1]), {}, "another order"),
        (TextFiles(files.paths, documents="line"), {}, "with other options"),
        (files, {"end_id": 2}, "with other options"),
    ):
        with pytest.raises(InvalidValue, match=told):
            token_cache(path, other, BYTES, **options)
    build_token_cache(path.with_name("y"), TEXTS, BYTES)
    with pytest.raises(InvalidValue, match="built from other sources"):
        token_cache(path.with_name("y"), files, BYTES)


def test_a_file_that_is_cut_off_anywhere_is_refused(files, path):
    token_cache(path, files, BYTES)
    whole = path.read_bytes()
    for size in {*range(0, len(whole), 5), *range(len(whole) - 40, len(whole))}:
        path.write_bytes(whole[:size])
        with pytest.raises(InvalidValue, match=r"x\.tokens: "):
            open_token_cache(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(InvalidValue, match="cut off"):
        open_token_cache(path)


def test_flipped_bits_are_found(files, path):
    expected = token_cache(path, files, BYTES)
    expected = [document.tolist() for document in expected], expected.vocab_size
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    survived = 0
    for at in range(0, len(whole), 3):
        bad = bytearray(whole)
        bad[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        try:
            found = open_token_cache(path)
        except InvalidValue as error:
            assert "x.tokens" in str(error)
            continue
        assert ([document.tolist() for document in found], found.vocab_size) == expected
        survived += 1  # padding, or what is told of sources and tokenizer, which is compared where they are given
    assert survived < 200


def changed(path, **changes):
    """The cache with other things told of it."""
    data = path.read_bytes()
    length = int.from_bytes(data[-16:-8], "little")
    about = json.loads(data[-16 - length : -16]) | changes
    told = json.dumps(about).encode()
    path.write_bytes(data[: -16 - length] + told + len(told).to_bytes(8, "little") + data[-8:])


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"format": "other"},
        {"n_tokens": 0},
        {"n_tokens": -5},
        {"n_tokens": 1 << 70},
        {"n_tokens": 5.0},
        {"n_tokens": True},
        {"n_documents": 1 << 40},
        {"n_documents": None},
        {"vocab_size": 0},
        {"vocab_size": 200},
        {"n_tokens": 214},
        {"n_documents": 2},
        {"kind": "songs"},
        {"kind": 3},
        {"contents": "00"},
        {"sources": 5},
        {"options": []},
        {"tokenizer": None},
    ],
)
def test_what_is_told_of_a_cache_is_checked(files, path, changes):
    token_cache(path, files, BYTES)
    changed(path, **changes)
    for verify in (True, False)[: 1 if "contents" in changes else 2]:
        with pytest.raises(InvalidValue, match=r"x\.tokens: "):
            open_token_cache(path, verify=verify)


def test_damaged_offsets_are_found_without_verifying_too(files, path):
    token_cache(path, files, BYTES)
    data = bytearray(path.read_bytes())
    at = data.index((4).to_bytes(8, "little") + (13).to_bytes(8, "little"))
    data[at : at + 8] = (1 << 40).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(InvalidValue, match="damaged"):
        open_token_cache(path)[0]
    with pytest.raises(InvalidValue, match="damaged"):
        open_token_cache(path, verify=False)[0]


def test_what_is_no_file_is_refused(path, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for other in (path, tmp_path, tmp_path / "fifo", "a\0b"):
        with pytest.raises(FileProblem):
            open_token_cache(other)
    (tmp_path / "text").write_text("It was the best of times, it was the worst of times.")
    with pytest.raises(InvalidValue, match="is no token cache"):
        open_token_cache(tmp_path / "text")


def test_wrong_arguments(path, files):
    with pytest.raises(InvalidType, match="build_token_cache"):
        token_cache(path, TEXTS, BYTES)
    with pytest.raises(InvalidType, match="tokenizer: expected a Tokenizer"):
        build_token_cache(path, files)
    with pytest.raises(InvalidValue, match="vocab_size: expected the number of ids"):
        build_token_cache(path, [[1]])
    assert os.listdir(path.parent) == []


# Writing


def test_what_is_there_is_not_written_over_unless_asked(files, path):
    token_cache(path, files, BYTES)
    before = path.read_bytes()
    held = open_token_cache(path)
    with pytest.raises(FileProblem, match="is there already"):
        build_token_cache(path, ["other"], BYTES)
    assert path.read_bytes() == before
    path.with_name("note").write_text("mine")
    with pytest.raises(FileProblem, match="is there already"):
        build_token_cache(path.with_name("note"), ["other"], BYTES)
    assert build_token_cache(path, ["other"], BYTES, overwrite=True).n_tokens == 5
    assert held.n_tokens == 213, "who has the old one open keeps it"
    assert bytes(np.asarray(held.document(0), np.uint8) - 3) == b"eins"
    assert sorted(os.listdir(path.parent)) == ["note", "x.tokens"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_bad_document_leaves_what_was_there(path, overwrite):
    if overwrite:
        build_token_cache(path, ["old"], BYTES)
    before = {name: (path.parent / name).read_bytes() for name in os.listdir(path.parent)}
    with pytest.raises(InvalidValue, match=r"documents\[2\]: no tokens"):
        build_token_cache(path, ["a" * 3_000_000, "b", ""], BYTES, overwrite=overwrite)
    assert {name: (path.parent / name).read_bytes() for name in os.listdir(path.parent)} == before


def test_every_failing_write_leaves_what_was_there(path, monkeypatch):
    """The k-th call that writes fails for every k, with a full disk or after a part: a clear error and no litter."""
    build_token_cache(path, ["old"], BYTES)
    before = path.read_bytes()
    documents = ["x" * 800_000, "y" * 800_000]
    done = False
    for k in range(100):
        left = k
        with monkeypatch.context() as patched:

            def failing(original):
                def call(*arguments):
                    nonlocal left
                    left -= 1
                    if left == -1:
                        if original is os.write:
                            original(arguments[0], arguments[1][: len(arguments[1]) // 2])
                        raise OSError(errno.ENOSPC, "No space left on device")
                    return original(*arguments)

                return call

            patched.setattr(cache_module.os, "write", failing(os.write))
            patched.setattr(cache_module.os, "replace", failing(os.replace))
            patched.setattr(writing, "fsync", failing(writing.fsync))
            try:
                build_token_cache(path, documents, BYTES, overwrite=True)
                done = True
            except FileProblem as error:
                assert "No space left" in str(error) and "nothing was changed" in str(error)
        if done:
            break
        assert path.read_bytes() == before and os.listdir(path.parent) == ["x.tokens"], k
    assert 4 <= k < 100 and open_token_cache(path).n_tokens == 1_600_000


def test_a_short_write_goes_on(files, path, monkeypatch):
    original = os.write
    with monkeypatch.context() as patched:
        patched.setattr(cache_module.os, "write", lambda fd, data: original(fd, data[: max(1, len(data) // 3)]))
        token_cache(path, files, BYTES)
    assert_same_corpus(open_token_cache(path), Corpus.of(files, BYTES))


def test_a_limit_of_the_file_size_is_an_error_of_ours(path):
    """The kernel itself refuses to write on."""
    program = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from mini_tfm.errors import FileProblem
from mini_tfm.text import ByteTokenizer
from mini_tfm.train import build_token_cache
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 21, 1 << 21))
try:
    build_token_cache(sys.argv[1], ["x" * 4_000_000], ByteTokenizer())
except FileProblem as error:
    print(error)
"""
    assert "cannot be written: File too large" in in_a_process(program, path).stdout
    assert os.listdir(path.parent) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(files, path):
    path.parent.chmod(0o500)
    with pytest.raises(FileProblem, match="cannot be written: Permission denied"):
        token_cache(path, files, BYTES)


def test_a_folder_that_is_none(files, path, tmp_path):
    for bad in (tmp_path / "0.txt" / "x", tmp_path / "nowhere" / "x", Path("/proc/x.tokens")):
        with pytest.raises(FileProblem, match="cannot be written"):
            token_cache(bad, files, BYTES)


def test_a_source_that_is_written_to_meanwhile(files, path, tmp_path, monkeypatch):
    original = TextFiles.pieces

    def pieces(self):
        yield from original(self)
        with open(tmp_path / "0.txt", "a") as file:
            file.write("more")

    monkeypatch.setattr(TextFiles, "pieces", pieces)
    with pytest.raises(FileProblem, match="changed while it was read"):
        token_cache(path, files, BYTES)
    assert os.listdir(path.parent) == []


# Processes

BUILD = """
import sys
from mini_tfm.text import ByteTokenizer
from mini_tfm.train import TextFiles, token_cache
print("ready", flush=True)
sys.stdin.readline()
corpus = token_cache(sys.argv[1], TextFiles(sys.argv[2]), ByteTokenizer())
print(corpus.n_tokens, corpus.fingerprint)
"""


def started(path, source):
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD, str(path), str(source)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_of_several_that_build_at_once_all_get_the_whole(path, tmp_path):
    source = tmp_path / "a.txt"
    source.write_text("some text\n" * 300_000)
    processes = [started(path, source) for _ in range(3)]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    told = {process.communicate(timeout=60)[0] for process in processes}
    assert len(told) == 1 and told.pop().startswith("3000000 ")
    assert all(process.returncode == 0 for process in processes) and os.listdir(path.parent) == ["x.tokens"]


def kill_builders(path, source, count):
    """Kills builders at random moments; what is there in the end, and how many were killed while they wrote."""
    rng = np.random.default_rng(0)
    while_writing = 0
    for _ in range(count):
        process = started(path, source)
        process.stdin.write("go\n")
        process.stdin.flush()
        time.sleep(float(rng.random()) * 0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        while_writing += (path.parent / ".x.tokens.building").exists()
        assert set(os.listdir(path.parent)) <= {"x.tokens", ".x.tokens.building"}
        if path.exists():
            assert open_token_cache(path).n_tokens == 4_000_000
            path.unlink()
    return while_writing


@pytest.mark.parametrize("count", [6, pytest.param(100, marks=pytest.mark.long)])
def test_a_builder_that_is_killed_leaves_no_half_cache(path, tmp_path, count):
    source = tmp_path / "a.txt"
    source.write_text("some text\n" * 400_000)
    assert kill_builders(path, source, count) > 0
    assert token_cache(path, TextFiles(source), BYTES).n_tokens == 4_000_000
    assert os.listdir(path.parent) == ["x.tokens"], "what the dead one left is gone"


# RAM

BOUNDED = """
import resource, sys
from pathlib import Path
import numpy as np
import mini_tfm as mt
from mini_tfm.text import ByteTokenizer
from mini_tfm.train import NextSegment, TextFiles, token_cache

def status(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024

source, path, steps, allowed = *sys.argv[1:3], int(sys.argv[3]), int(sys.argv[4])
mt.set_num_threads(1)
config = mt.Config(vocab_size=259, d_model=16, n_heads=2, n_encoder_layers=1, n_decoder_layers=1, segment_length=32)
trainer = mt.Trainer(mt.Transformer(config), mt.memory("window", size=8), total_steps=10**6)
warm = NextSegment([np.arange(3, 200)], segment_length=32, n_segments=2, batch_size=4)
for i in range(2):
    trainer.step(*[getattr(warm.batch(i), n) for n in ("source", "target", "source_lengths", "target_lengths")])
begin = status("VmData")
resource.setrlimit(resource.RLIMIT_DATA, (begin + allowed, begin + allowed))  # all memory that is not a mapped file
corpus = token_cache(path, TextFiles(source), ByteTokenizer())
data = NextSegment(corpus, segment_length=32, n_segments=2, batch_size=4)
trainer.fit(data, trainer.step_count + steps, progress=False)
print(corpus.n_tokens, corpus.tokens.nbytes, status("RssAnon"), status("VmData") - begin, len(trainer.losses))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit of anonymous memory is Linux's")
@pytest.mark.parametrize("megabytes", [64, pytest.param(1000, marks=pytest.mark.long)])
def test_a_corpus_larger_than_the_limit_of_ram(path, tmp_path, megabytes):
    """32 MB more than the bare program may be used, by the kernel's own limit; text and tokens are 64 MB and 128 MB (1 and 2 GB)."""
    source, allowed = tmp_path / "a.txt", 32 << 20
    line = "the quick brown fox jumps over the lazy dog, and so on and so on\n"
    with open(source, "w") as file:
        for _ in range(megabytes):
            file.write((line * (1_000_000 // len(line) + 1))[:1_000_000])
    done = in_a_process(BOUNDED, source, path, 20, allowed, timeout=600)
    n_tokens, n_bytes, anonymous, more, steps = map(int, done.stdout.split())
    assert n_tokens == megabytes * 1_000_000 and n_bytes == 2 * n_tokens > 3 * allowed and steps == 22
    assert more <= allowed and anonymous < 150e6
    refused = in_a_process(BOUNDED.replace("corpus = token_cache(path, TextFiles(source), ByteTokenizer())",
                                           "corpus = __import__('mini_tfm').train.Corpus.of(TextFiles(source), ByteTokenizer())"),
                           source, path, 1, allowed, check=False, timeout=600)  # fmt: skip
    assert "MemoryError" in refused.stderr, "in RAM it does not fit, so the limit is one"
