"""A tiny model folder and texts, and the command line in this process."""

import sys
from pathlib import Path

import pytest

from mini_tfm.checkpoint.models import save_model
from mini_tfm.config import Config
from mini_tfm.text.tokenizers import ByteTokenizer
from mini_tfm.transformer import Transformer

sys.path.insert(0, str(Path(__file__).parent))  # `import commands`

from commands import TINY, Run


@pytest.fixture
def run():
    return lambda *words, stdin=None: Run(words, stdin)


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    model = Transformer(Config(vocab_size=ByteTokenizer.vocab_size, segment_length=16, **TINY))
    save_model(folder / "model", model, tokenizer=ByteTokenizer(), memory_text="window:size=8")
    (folder / "a.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 4, encoding="utf-8")
    (folder / "b.txt").write_text("Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich.\n" * 3, encoding="utf-8")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "binary").write_bytes(b"\x7fELF\0\1\2\3" * 10)
    (folder / "latin1.txt").write_bytes("Müller".encode("latin-1"))
    (folder / "short.txt").write_text("short\n")
    return folder


@pytest.fixture
def model(shared) -> Path:
    return shared / "model"


@pytest.fixture
def texts(shared) -> list[Path]:
    return [shared / "a.txt", shared / "b.txt"]
