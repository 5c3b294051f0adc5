"""What is promised to be durable has been synced: after a power cut there is what was fsynced before it, and nothing else.

A disk is simulated: of a file it has the bytes of its last fsync, of a folder the names of its last fsync. The other order that a
disk may choose, in which names are there at once and contents only when synced, is looked at behind each rename.
"""

import contextlib
import json
import os
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
from contents import load_folder, same

import mini_tfm as mt
from mini_tfm.checkpoint.folder import save_folder
from mini_tfm.data import Corpus, build_token_cache, open_token_cache
from mini_tfm.files import folders, writing
from mini_tfm.text.tokenizers import ByteTokenizer
from mini_tfm.train.logs import JsonLines
from mini_tfm_plugins import rows_lmdb
from mini_tfm_plugins.rows_lmdb import LmdbRows

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the path of a descriptor is asked of /proc")

OLD, NEW = {"w": np.zeros(2000, np.float32)}, {"w": np.ones(3000, np.float32)}


class Disk:
    """What a power cut leaves of a folder that is watched; what is there when watching begins is safe."""

    def __init__(self, root: Path):
        self.root, self.files, self.folders = root, {}, {}
        for folder, _, names in os.walk(root):
            self._take(folder)
            for name in names:
                self._take(os.path.join(folder, name))

    def _take(self, path):
        status = os.lstat(path)
        if stat.S_ISDIR(status.st_mode):
            self.folders[status.st_ino] = {entry.name: entry.inode() for entry in os.scandir(path)}
        else:
            self.files[status.st_ino] = Path(path).read_bytes()

    def fsync(self, fd):
        self._take(os.readlink(f"/proc/self/fd/{fd}"))

    def after_a_cut(self, into: Path, names_at_once: bool = False) -> Path:
        """A new folder with what has survived. names_at_once: all names, too, with the contents that were synced."""
        live = {os.lstat(folder).st_ino: {entry.name: entry.inode() for entry in os.scandir(folder)} for folder, *_ in os.walk(self.root)}
        known = {**self.folders, **live} if names_at_once else self.folders

        def make(inode, at):
            if inode in known:
                at.mkdir()
                for name, child in known[inode].items():
                    make(child, at / name)
            else:
                at.write_bytes(self.files.get(inode, b""))  # a name whose file was never synced

        make(os.stat(self.root).st_ino, into)
        return into


@contextlib.contextmanager
def watched(root, monkeypatch, renamed=lambda survivors: None):
    """A Disk that sees every fsync in the block; renamed: is told of what a cut leaves behind each rename."""
    disk, count = Disk(root), iter(range(1000))

    def telling(function):
        def call(*arguments, **options):
            done = function(*arguments, **options)
            renamed(disk.after_a_cut(root.parent / f"renamed {next(count)}", names_at_once=True))
            return done

        return call

    with monkeypatch.context() as patched:
        fsync = os.fsync
        patched.setattr(os, "fsync", lambda fd: (fsync(fd), disk.fsync(fd))[0])
        for owner, name in ((os, "replace"), (os, "rename"), (folders, "_exchange")):
            patched.setattr(owner, name, telling(getattr(owner, name)))
        yield disk


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture(params=["exchange", "renames"])
def way(request, monkeypatch):
    if request.param == "renames":
        monkeypatch.setattr(folders, "_exchange", lambda first, second: False)


def no_links(*arguments, **options):
    raise PermissionError("a file system without hard links")


@pytest.mark.parametrize("there, links", [(False, True), (True, True), (True, False)])
def test_a_saved_folder_outlives_a_power_cut(way, root, tmp_path, monkeypatch, there, links):
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    folder = root / "runs" / "m"
    if there:
        save_folder(folder, {"v": 1}, OLD, {})
        (folder / "sub" / "deep").mkdir(parents=True)
        for at in (folder, folder / "sub", folder / "sub" / "deep"):
            (at / "notes.txt").write_text("mine")

    def old_or_new(survivors):
        at = survivors / "runs" / "m"
        if there or at.exists():
            if at.exists():  # else the old one stands beside it, and the next load puts it back
                about, tensors = load_folder(at)
                assert same(tensors, OLD if about["v"] == 1 else NEW)
            assert sum(path.read_text() == "mine" for path in survivors.rglob("notes.txt")) >= 3 or not there

    with watched(root, monkeypatch, old_or_new) as disk:
        save_folder(folder, {"v": 2}, NEW, {})
        survivors = disk.after_a_cut(tmp_path / "cut")
    about, tensors = load_folder(survivors / "runs" / "m")
    assert about["v"] == 2 and same(tensors, NEW)
    kept = [path.read_text() for path in (survivors / "runs" / "m").rglob("notes.txt")]
    assert kept == ["mine"] * (3 if there else 0)


def test_a_saved_run_outlives_a_power_cut(root, tmp_path, monkeypatch):
    model = mt.Transformer(mt.Config(vocab_size=13, d_model=8, n_heads=2, n_encoder_layers=1, n_decoder_layers=1), seed=1)
    trainer = mt.Trainer(model, total_steps=10)
    tokens = np.random.default_rng(0).integers(3, 13, (2, 6))
    trainer.step(tokens, tokens)
    trainer.save(root / "run")
    trainer.step(tokens, tokens)
    with watched(root, monkeypatch) as disk:
        trainer.save(root / "run")
        survivors = disk.after_a_cut(tmp_path / "cut")
    again = mt.Trainer.resume(survivors / "run")
    assert again.step_count == 2
    assert {name: w.tobytes() for name, w in again.model.weights.items()} == {name: w.tobytes() for name, w in model.weights.items()}


@pytest.mark.parametrize("there", [False, True])
def test_a_written_file_outlives_a_power_cut(root, tmp_path, monkeypatch, there):
    if there:
        (root / "report.html").write_text("old")
    whole = lambda survivors: (survivors / "report.html").read_text() == "new" or pytest.fail("half a file")  # noqa: E731
    with watched(root, monkeypatch, whole) as disk:
        writing.write_file(root / "report.html", "new")
        survivors = disk.after_a_cut(tmp_path / "cut")
    assert (survivors / "report.html").read_text() == "new"


def test_a_token_cache_outlives_a_power_cut(root, tmp_path, monkeypatch):
    with watched(root, monkeypatch) as disk:
        build_token_cache(root / "x.tokens", ["eins", "zwei drei"], ByteTokenizer())
        survivors = disk.after_a_cut(tmp_path / "cut")
    assert open_token_cache(survivors / "x.tokens").tokens.tolist() == Corpus.of(["eins", "zwei drei"], ByteTokenizer()).tokens.tolist()


def test_a_store_is_opened_for_durable_transactions(root, monkeypatch):
    """LMDB syncs the file itself, in C: here is seen that it was asked to, and that the name of a new file is synced, too."""
    with watched(root, monkeypatch) as disk:
        store = LmdbRows(str(root / "notes.mdb"))
        store.open(8, "weights")
        store.append("d", {"bank": (np.ones((5, 8), np.float32), np.arange(5))})
    flags = rows_lmdb._open[store.path].environment.flags()
    assert flags["sync"] and flags["metasync"] and not flags["writemap"] and not flags["map_async"]
    assert disk.folders[os.stat(root).st_ino]["notes.mdb"] == os.stat(root / "notes.mdb").st_ino


def test_the_lines_of_a_log_are_synced_when_asked(root, tmp_path, monkeypatch):
    (root / "log.jsonl").touch()
    with watched(root, monkeypatch) as disk:
        log = JsonLines(root / "log.jsonl", [])
        log.write({"step": 1, "loss": 2.5})
        log.sync()
        survivors = disk.after_a_cut(tmp_path / "cut")
        log.close()
    assert json.loads((survivors / "log.jsonl").read_text()) == {"step": 1, "loss": 2.5}
