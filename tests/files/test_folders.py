"""A folder written whole or not at all: saves that are cut, refused, killed or raced."""

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from contents import load_folder, same, snapshot

from mini_tfm.checkpoint.folder import save_folder
from mini_tfm.errors import FileProblem, InvalidValue
from mini_tfm.files import folders, writing

OLD, NEW = {"w": np.zeros(2000, np.float32)}, {"w": np.ones(3000, np.float32)}


@pytest.fixture(params=["exchange", "renames"])
def way(request, monkeypatch):
    """Both ways to swap two folders: the system call, and the renames that stand in for it."""
    if request.param == "renames":
        monkeypatch.setattr(folders, "_exchange", lambda first, second: False)
    return request.param


def with_notes(folder: Path) -> None:
    """Things of a user: a note, a folder with a file, a link out, an executable."""
    (folder / "notes.txt").write_text("mine")
    (folder / "sub" / "deep").mkdir(parents=True)
    (folder / "sub" / "deep" / ".hidden").write_text("also mine")
    (folder / "sub").chmod(0o500)
    (folder / "link").symlink_to("/nowhere")
    (folder / "run.sh").touch()
    (folder / "run.sh").chmod(0o750)


def assert_notes(folder: Path) -> None:
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "sub" / "deep" / ".hidden").read_text() == "also mine"
    assert (folder / "sub").stat().st_mode & 0o777 == 0o500
    assert os.readlink(folder / "link") == "/nowhere"
    assert (folder / "run.sh").stat().st_mode & 0o777 == 0o750


def test_what_is_not_ours_is_kept(way, tmp_path):
    folder = tmp_path / "m"
    save_folder(folder, {"v": 1}, OLD, {"tokenizer.json": b"{}"})
    with_notes(folder)
    folder.chmod(0o710)
    note = (folder / "notes.txt").stat()
    for _ in range(3):
        save_folder(folder, {"v": 2}, NEW)
        assert_notes(folder)
    assert (folder / "notes.txt").stat().st_ino == note.st_ino and folder.stat().st_mode & 0o777 == 0o710
    assert (folder / "tokenizer.json").read_bytes() == b"{}"
    assert load_folder(folder)[0] == {"v": 2} and os.listdir(tmp_path) == ["m"]


def test_without_hard_links_what_is_not_ours_is_copied(tmp_path, monkeypatch):
    def no_links(*_, **__):
        raise OSError(errno.EPERM, "no hard links here")

    save_folder(tmp_path / "m", {}, OLD)
    with_notes(tmp_path / "m")
    monkeypatch.setattr(os, "link", no_links)
    save_folder(tmp_path / "m", {}, NEW)
    assert_notes(tmp_path / "m")


def test_a_note_written_while_saving_is_kept(way, tmp_path, monkeypatch):
    folder, commit = tmp_path / "m", folders._commit
    save_folder(folder, {}, OLD)

    def note_then_commit(*arguments):
        (folder / "late.txt").write_text("late")
        commit(*arguments)

    monkeypatch.setattr(folders, "_commit", note_then_commit)
    save_folder(folder, {}, NEW)
    assert (folder / "late.txt").read_text() == "late" and same(load_folder(folder)[1], NEW)


def test_parents_are_made_links_followed_and_the_working_folder_stays_valid(way, tmp_path, monkeypatch):
    folder = tmp_path / "a" / "b" / "m"
    save_folder(folder, {"v": 1}, OLD)
    (tmp_path / "alias").symlink_to(folder)
    save_folder(tmp_path / "alias", {"v": 2}, NEW)
    assert (tmp_path / "alias").is_symlink() and load_folder(folder)[0] == {"v": 2}
    monkeypatch.chdir(folder)
    for version in (3, 4):
        save_folder(".", {"v": version}, NEW)
        assert load_folder(".")[0] == {"v": version}
    assert os.getcwd() == str(folder) and os.listdir(folder.parent) == ["m"]


def test_places_that_cannot_be_saved_to(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("keep")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", "/", "/proc/x/y", tmp_path / ("x" * 300), "a\0b"):
        with pytest.raises(FileProblem):
            save_folder(folder, {}, OLD)
    with pytest.raises(InvalidValue, match="folder"):
        save_folder("", {}, OLD)
    with pytest.raises(FileProblem):
        save_folder(tmp_path / "new" / "parents" / ("x" * 300), {}, OLD)
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "keep"

    save_folder(tmp_path / "m", {}, OLD)
    (tmp_path / "m" / "model.safetensors").unlink()
    (tmp_path / "m" / "model.safetensors").mkdir()
    with pytest.raises(FileProblem, match="is a folder"):
        save_folder(tmp_path / "m", {}, NEW)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(FileProblem, match="not writable"):
        save_folder(tmp_path / "m", {}, NEW)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_parent_is_a_file_problem(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(FileProblem, match="permission"):
        save_folder(tmp_path / "m", {}, OLD)


class FailingOs:
    """The `os` module, whose k-th call of those that change the disk fails."""

    COUNTED = ("open", "write", "fsync", "rename", "mkdir", "chmod")

    def __init__(self, k: int, code: int) -> None:
        self.calls, self.k, self.code = 0, k, code

    def __getattr__(self, name: str):
        real = getattr(os, name)
        return real if name not in self.COUNTED else lambda *a, **kw: self.count(real, name, *a, **kw)

    def count(self, real, name, *arguments, **options):
        self.calls += 1
        if self.calls == self.k:
            raise OSError(self.code, os.strerror(self.code))
        if name == "write":  # and every write is short
            arguments = (arguments[0], arguments[1][: max(1, len(arguments[1]) // 2)])
        return real(*arguments, **options)

    def exchange(self, real, *arguments):
        return self.count(real, "exchange", *arguments)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
@pytest.mark.parametrize("first_time", [False, True], ids=["over-an-old-one", "first-time"])
def test_whichever_call_fails_the_old_folder_is_intact(way, first_time, code, tmp_path, monkeypatch):
    folder = tmp_path / "parent" / "m"
    if not first_time:
        save_folder(folder, {"v": 1}, OLD)
        with_notes(folder)
    before, exchange = snapshot(folder), folders._exchange
    failures = 0
    for k in range(1, 1000):
        failing = FailingOs(k, code)
        with monkeypatch.context() as patch:
            for module in (folders, writing):
                patch.setattr(module, "os", failing)
            patch.setattr(folders, "_exchange", lambda *a, failing=failing: failing.exchange(exchange, *a))
            try:
                save_folder(folder, {"v": 2}, NEW)
            except FileProblem as error:
                failures += 1
                assert "nothing was changed" in str(error) and os.strerror(code) in str(error)
                assert snapshot(folder) == before
                assert [path.name for path in tmp_path.rglob(".m.*")] == []
                assert os.path.exists(tmp_path / "parent") != first_time
                continue
        assert load_folder(folder)[0] == {"v": 2}
        if failing.calls < k:
            break
        # The call that failed was one the save can do without (a lock): start over from the old folder.
        shutil.rmtree(folder.parent)
        if not first_time:
            save_folder(folder, {"v": 1}, OLD)
            with_notes(folder)
    assert failures > 20 and failing.calls < k
    if not first_time:
        assert_notes(folder)


SAVERS = """
import os, sys, numpy as np
from mini_tfm.checkpoint.folder import save_folder
from mini_tfm.files import folders, writing
folder, swap = sys.argv[1:]
if swap == "renames":
    folders._exchange = lambda first, second: False
for line in sys.stdin:
    pid = os.fork()  # cheaper than a new interpreter for each kill
    if pid == 0:
        for version in range(int(line), 10**9):
            tensors = {"w": np.full(20_000, version, np.int64)}
            save_folder(folder, {"v": version}, tensors, {"v.txt": str(version).encode()})
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("dead", flush=True)
"""


@contextlib.contextmanager
def savers(folder: Path, swap: str):
    """A process that starts endless savers, one for each version number written to its stdin."""
    root = str(Path(__file__).resolve().parents[2])
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SAVERS, str(folder), swap],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        env=os.environ | {"PYTHONPATH": root, "OPENBLAS_NUM_THREADS": "1"},
    ) as process:
        yield process
        process.stdin.close()


def whole_version(folder: Path) -> int:
    config, tensors = load_folder(folder)
    assert (tensors["w"] == config["v"]).all()
    assert int((folder / "v.txt").read_text()) == config["v"]
    return config["v"]


@pytest.mark.parametrize("swap", ["exchange", "renames"])
def test_a_killed_save_leaves_the_old_folder_or_the_new_one(swap, tmp_path):
    folder, rng, version = tmp_path / "m", random.Random(time.time_ns()), 0
    save_folder(folder, {"v": 0}, {"w": np.zeros(20_000, np.int64)}, {"v.txt": b"0"})
    (folder / "notes.txt").write_text("mine")
    with savers(folder, swap) as process:
        for _ in range(15):
            process.stdin.write(f"{version + 1}\n")
            pid = int(process.stdout.readline())
            time.sleep(rng.random() * 0.15)
            os.kill(pid, signal.SIGKILL)
            assert process.stdout.readline() == "dead\n"
            found = whole_version(folder)
            assert found >= version and (folder / "notes.txt").read_text() == "mine"
            version = found
    assert version > 0
    save_folder(folder, {"v": 0}, {})
    assert os.listdir(tmp_path) == ["m"]  # what the killed ones left is gone


def test_a_crash_between_the_two_renames_is_repaired_by_load_and_by_save(tmp_path):
    folder, aside = tmp_path / "m", tmp_path / ".m.old-0123456789abcdef"
    for repair in (load_folder, lambda path: save_folder(path, {"v": 2}, NEW)):
        save_folder(folder, {"v": 1}, OLD)
        with_notes(folder)
        folder.rename(aside)
        assert not folder.exists()
        repair(folder)
        assert_notes(folder)
        assert os.listdir(tmp_path) == ["m"]
        (folder / "sub").chmod(0o700)
        shutil.rmtree(folder)


def test_the_staging_of_a_live_save_and_foreign_names_are_left_alone(tmp_path):
    live, dead, foreign = (tmp_path / f".m.saving-{end}" for end in ("0" * 16, "1" * 16, "mine"))
    for path in (live, dead, foreign):
        path.mkdir()
    fd = folders._lock(str(live))
    try:
        save_folder(tmp_path / "m", {}, OLD)
    finally:
        os.close(fd)
    assert sorted(os.listdir(tmp_path)) == sorted([live.name, foreign.name, "m"])


def test_a_lock_that_someone_else_holds_for_ever_does_not_stop_a_save(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "LOCK_SECONDS", 0.02)
    with folders.alone_in(str(tmp_path)):
        for version in (1, 2):
            save_folder(tmp_path / "m", {"v": version}, OLD)
    assert load_folder(tmp_path / "m")[0] == {"v": 2} and os.listdir(tmp_path) == ["m"]


def test_two_savers_and_readers_at_once(way, tmp_path):
    folder, problems = tmp_path / "m", []
    stop = threading.Event()

    def save(start: int) -> None:
        for version in range(start, 1000, 2):
            if stop.is_set():
                return
            save_folder(folder, {"v": version}, {"w": np.full(5000, version, np.int64)})

    def read() -> None:
        while not stop.is_set():
            config, tensors = load_folder(folder)
            if not (tensors["w"] == config["v"]).all():
                problems.append("a reader saw two versions")

    def guarded(work, *arguments) -> None:
        try:
            work(*arguments)
        except Exception as error:  # reported by the main thread
            problems.append(error)
            stop.set()

    save(999)
    (folder / "notes.txt").write_text("mine")
    threads = [threading.Thread(target=guarded, args=job) for job in ((save, 0), (save, 1), (read,), (read,))]
    for thread in threads:
        thread.start()
    stop.wait(1.5)
    stop.set()
    for thread in threads:
        thread.join()
    assert problems == []
    assert (folder / "notes.txt").read_text() == "mine"
    save_folder(folder, {"v": 0}, {})
    assert os.listdir(tmp_path) == ["m"]


def test_an_interrupt_leaves_no_litter(way, tmp_path, monkeypatch):
    save_folder(tmp_path / "m", {"v": 1}, OLD)
    for name in ("write_new", "_commit", "fsync_folder"):
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(folders, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            save_folder(tmp_path / "m", {"v": 2}, NEW)
        assert load_folder(tmp_path / "m")[0] == {"v": 1} and os.listdir(tmp_path) == ["m"]
