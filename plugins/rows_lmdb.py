"""LmdbRows: a store of rows in one LMDB file. Named documents, each of named banks, each a growing (N, d) float32 array.

LMDB is crash-safe, has one writer and many readers, and is memory-mapped: readers get arrays that lie in the
file. Rows lie in chunks, one value each:

    meta                         {"format", "d_model", "models": {bank: what its rows are made of}, "born"}
    document/<name>              {"banks": {bank: rows}, "next_position", "writers": {stream: its last write}}
    deleted/<name>               how often it was deleted
    rows/<name>/<bank>/<chunk>   rows from number chunk * CHUNK_ROWS on: (n, d) float32, (n,) int64 positions, a CRC-32 of both

Numbers are little-endian. A row counts only once its document says so, in the same transaction. Where rows are searched, full chunks
of CHUNK_ROWS are joined to larger ones, first MIDDLE_CHUNKS, then as many as LARGE_BYTES hold, so that a long document is searched in
few steps. Where they are looked up by number, small chunks mean that little is read and checked.

Formats 1 and 2 have "model", the name of all weights, instead of "models", and no larger chunks; format 1, of version 0.1.0, has no
CRCs. They are read and continued: see `open`.

The map is made once, much larger than any file (MAP_BYTES): it takes address space alone, and to enlarge it later would pull it from
under threads that read.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import stat
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from mini_tfm.errors import FileProblem, InvalidValue
from mini_tfm.memory import Claim, Written

FORMAT = 3
CHUNK_ROWS = 1024
MIDDLE_CHUNKS = 8
LOCK_SECONDS = 5.0
LARGE_BYTES = 32 << 20
ALL = ""  # the bank that stands for all, where one name is given
MOST_WRITERS = 64  # streams whose last write a document remembers
MAGIC_AT, MAGIC = 16, (0xBEEFC0DE).to_bytes(4, sys.byteorder)  # behind the header of LMDB's first page
MAP_BYTES = 1 << 40  # 1 TiB: the most that a store can hold
PAGE_BYTES = 4096
CRC_BYTES = 4
LEAST_MAP_BYTES = 1 << 28  # where the process may not have so much address space

# Of LMDB's meta page, behind its header: magic, page size, last page, transaction.
_META = struct.Struct("=I20xI92xQQ")
_FLOCK = struct.Struct("hhqqi0q")  # of <fcntl.h>: type, whence, start, length, process

_open: WeakValueDictionary[str, _Opened] = WeakValueDictionary()  # by path: LMDB allows one a process; gone with the last user
_checked: set[tuple[Any, int, bytes, int]] = set()  # chunks whose CRC was right: (file, deletions of the document, key, bytes)
_lock = threading.RLock()
_turns: set[int] = set()  # descriptors of files that a thread writes to, or waits to


def _renew_locks() -> None:
    """A thread that held one does not exist in a forked child, which would keep the turn of a killed parent."""
    global _lock
    _lock = threading.RLock()
    while _turns:
        os.close(_turns.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


class _Opened:
    """An environment, the process and file that it was opened in and for, and how many transactions are at work."""

    def __init__(self, file: tuple[int, int, int] | None, environment: Any):
        self.file, self.environment, self.active = file, environment, 0
        self.panics = False  # LMDB refuses everything after a page that says what counts could not be written
        self.locked = bool(environment.flags()["lock"])
        self.lock = _inode(environment.path() + "-lock") if self.locked else None

    def is_current(self, file: tuple[int, int, int] | None) -> bool:
        """Whether it works, and the path still leads to what was opened, and to the lock file by which its users know of each other."""
        return not self.panics and self.file == file and (not self.locked or self.lock == _inode(self.environment.path() + "-lock"))


class _Replaced(Exception):
    """Another file has the name now."""


class LmdbRows:
    """The RowStore in the LMDB file at `path`; made when it is first opened. Raises InvalidValue or FileProblem naming the path.

    read_only: nothing is made or written. A file without permission to write can be read, too. join: what is written is joined to
    larger chunks, for those who search it.
    """

    def __init__(self, path: str, read_only: bool = False, join: bool = True):
        self.read_only, self.join = read_only, join
        self.path = os.path.realpath(path)  # LMDB must not open a file twice, under whatever name
        self.given = path
        self._opened: _Opened | None = None

    def open(self, d_model: int, model: str | Mapping[str, str], former: Callable[[], str] | None = None) -> None:
        """Checks that the file, if there is one, holds rows of this width and model; else makes it."""
        models = {ALL: model} if isinstance(model, str) else dict(model)
        if self.read_only and not os.path.exists(self.path):
            raise FileProblem(f"path: there is no store at {self.given}, and with read_only=true none is made; give the path of one")
        if not os.path.exists(self.path) or self._is_empty():
            # born: tells this file from one that was here before it.
            meta: dict[str, Any] = {"format": FORMAT, "d_model": d_model, "models": models, "born": time.time_ns()}
            with self._write(create=True) as txn:
                try:
                    _sync_folder(os.path.dirname(self.path))  # before it is a store, so that who tries again does this again
                except OSError as error:
                    raise FileProblem(f"path: the name of the new store {self.given} cannot be made durable: {error}; try again") from error
                if not txn.stat()["entries"]:
                    txn.put(b"meta", json.dumps(meta).encode())
        with self._read() as txn:
            new = self._settled(txn, d_model, models, former)
        if new is not None and self._may_write():
            with self._write() as txn:  # by now another process may have written
                if (new := self._settled(txn, d_model, models, former)) is not None:
                    txn.put(b"meta", json.dumps(new).encode())

    def _settled(self, txn: Any, d_model: int, models: dict[str, str], former: Callable[[], str] | None) -> dict[str, Any] | None:
        """The meta with the names of these banks, None if it has them; raises InvalidValue if it holds rows of something else."""
        meta = self._meta_of(txn)
        if meta["d_model"] != d_model:
            raise InvalidValue(
                f"path: the store {self.given} holds rows of width {meta['d_model']}, this model needs {d_model}; give another path"
            )
        known = dict(meta["models"])
        for bank, name in models.items():
            there = known.get(bank, known.get(ALL))
            # A bank of an earlier version has the name of all weights. It gets its own when these are the ones.
            same = there == name or (bank not in known and there is not None and former is not None and former() == there)
            if not same and self._has_rows(txn, bank):
                raise self._of_other_weights(there, name)
            known[bank] = name
        return {**meta, "format": max(meta["format"], FORMAT), "models": known} if known != meta["models"] else None

    def _of_other_weights(self, there: str | None, name: str) -> InvalidValue:
        return InvalidValue(
            f"path: the store {self.given} holds rows from other weights (model {there}, this is {name});"
            " another model cannot use them: read the text again into another path"
        )

    def _has_rows(self, txn: Any, bank: str) -> bool:
        return any(sum(banks.values()) if bank == ALL else banks.get(bank) for _, banks in self._documents(txn))

    def _documents(self, txn: Any) -> Iterator[tuple[str, dict[str, int]]]:
        with txn.cursor() as cursor:
            more = cursor.set_range(b"document/")
            while more and cursor.key().startswith(b"document/"):
                yield bytes(cursor.key())[9:].decode(), self._parse(cursor.value())["banks"]
                more = cursor.next()

    def documents(self) -> dict[str, int]:
        """Rows of each document."""
        if not os.path.exists(self.path):
            return {}
        self._meta()
        with self._read() as txn:
            return {name: sum(banks.values()) for name, banks in self._documents(txn)}

    def counts(self, document: str) -> dict[str, int]:
        return self._document(document)["banks"]

    def next_position(self, document: str) -> int:
        return self._document(document)["next_position"]

    def append(self, document: str, rows: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, int]:
        """Adds (hidden (n, d), positions (n,)) to each bank, in one durable transaction; the banks' new counts."""
        with self._write() as txn:
            meta, about = self._meta_of(txn), self._about(txn, document)
            self._append(txn, document, rows, meta, about)
            txn.put(_document_key(document), json.dumps(about).encode())
            return about["banks"]

    def write(
        self, document: str, rows: Mapping[str, tuple[np.ndarray, np.ndarray]], claim: Claim, writer: int, number: int, end: int
    ) -> Written | None:
        with self._write() as txn:
            meta, about = self._meta_of(txn), self._about(txn, document)
            if not self._holds(txn, meta, document, claim, rows):
                return None
            writers = about.setdefault("writers", {})
            if (last := writers.get(str(writer))) and last["number"] >= number:
                return Written(True, last["counts"], last["first"], last["moved"], last["end"])
            first, moved = {bank: about["banks"].get(bank, 0) for bank in rows}, about["next_position"] - end
            self._append(txn, document, rows, meta, about, moved)
            done = {"counts": about["banks"], "first": first, "moved": moved, "end": about["next_position"]}
            writers.pop(str(writer), None)
            writers[str(writer)] = {"number": number, **done}
            about["writers"] = dict([*writers.items()][-MOST_WRITERS:])
            txn.put(_document_key(document), json.dumps(about).encode())
        return Written(False, **done)

    def _holds(self, txn: Any, meta: dict[str, Any], document: str, claim: Claim, banks: Collection[str]) -> bool:
        """Whether the document is still the one that the claim is of."""
        if (meta.get("born", 0), self._deletions(txn, document)) != (claim.identity, claim.deletions):
            return False
        for bank in banks:
            if (there := meta["models"].get(bank)) is not None and claim.models.get(bank, there) != there:
                raise self._of_other_weights(there, claim.models[bank])
        return True

    def _append(
        self,
        txn: Any,
        document: str,
        rows: Mapping[str, tuple[np.ndarray, np.ndarray]],
        meta: dict[str, Any],
        about: dict[str, Any],
        moved: int = 0,
    ) -> None:
        """Puts the rows, `moved` by so many positions, behind those that there are, and notes them in `about`."""
        d_model, checked = meta["d_model"], meta["format"] > 1
        sizes = self._sizes(d_model) if meta["format"] > 2 else [1]
        for bank, (hidden, positions) in rows.items():  # a bank at a time: there may be more than fits into RAM twice
            positions = positions + moved
            number, used = divmod(about["banks"].get(bank, 0), CHUNK_ROWS)
            about["next_position"] = max(about["next_position"], int(positions.max(initial=-1)) + 1)
            about["banks"][bank] = number * CHUNK_ROWS + used + len(hidden)
            if used:
                old_hidden, old_positions = self._unpack(txn.get(_rows_key(document, bank, number)), d_model)
                hidden = np.concatenate([old_hidden[:used], hidden])
                positions = np.concatenate([old_positions[:used], positions])
            start = 0
            while start < len(hidden):
                many = max(size for size in sizes if size == 1 or (number % size == 0 and start + size * CHUNK_ROWS <= len(hidden)))
                part = slice(start, start + many * CHUNK_ROWS)
                txn.put(_rows_key(document, bank, number), _packed(hidden[part], positions[part], checked))
                start, number = part.stop, number + many
                if start <= len(hidden):
                    self._join(txn, document, bank, number, sizes, d_model)

    def _sizes(self, d_model: int) -> list[int]:
        """How many chunks of CHUNK_ROWS may be one, the smaller first."""
        large = large_chunks(d_model)
        return sorted({1, min(MIDDLE_CHUNKS, large), large}) if self.join else [1]

    def _join(self, txn: Any, document: str, bank: str, behind: int, sizes: list[int], d_model: int) -> None:
        """Makes one chunk of the last ones before chunk `behind`, where as many have come as make a larger one."""
        for many in sizes[1:]:
            if behind % many:
                return
            number, parts = behind - many, []
            while number < behind and (value := txn.get(key := _rows_key(document, bank, number))) is not None:
                parts.append((key, *self._unpack(value, d_model)))
                number += len(parts[-1][1]) // CHUNK_ROWS
            if number != behind:
                return  # joined by a version with other limits
            if len(parts) > 1:
                for key, _, _ in parts:
                    txn.delete(key)
                hidden, positions = np.concatenate([part[1] for part in parts]), np.concatenate([part[2] for part in parts])
                txn.put(parts[0][0], _packed(hidden, positions, True))

    @contextlib.contextmanager
    def reading(
        self, document: str, bank: str, count: int, claim: Claim | None = None
    ) -> Iterator[Iterator[tuple[np.ndarray, np.ndarray]]]:
        """The first `count` rows, a chunk at a time: (n, d) float32 as it lies in the file, (n,) int64 positions.

        Valid inside the context only. Raises InvalidValue for a damaged chunk, when this process first reads it.
        """
        with self._read(buffers=True) as txn:
            meta = self._meta_of(txn)
            there = claim is None or self._holds(txn, meta, document, claim, [bank])

            def chunks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
                seen = 0
                while seen < count and there:
                    value = txn.get(key := _rows_key(document, bank, seen // CHUNK_ROWS))
                    if value is None and self._about(txn, document)["banks"].get(bank, 0) <= seen:
                        return  # the document was deleted by someone else: nothing to remember
                    hidden, positions = self._once_checked(txn, document, key, value, meta["d_model"])
                    n = min(len(hidden), count - seen)
                    yield hidden[:n], positions[:n]
                    seen += n

            yield chunks()

    def gather(self, document: str, bank: str, numbers: np.ndarray, claim: Claim | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Copies of the rows with these numbers (n,), in ascending order: (n, d) float32, (n,) int64 positions.

        Only the chunks that they lie in are read and checked. Raises InvalidValue for a damaged one.
        """
        with self._read(buffers=True) as txn, txn.cursor() as cursor:
            meta = self._meta_of(txn)
            numbers = numbers[numbers < self._about(txn, document)["banks"].get(bank, 0)]
            if claim is not None and not self._holds(txn, meta, document, claim, [bank]):
                numbers = numbers[:0]
            hidden, positions = np.empty((len(numbers), meta["d_model"]), np.float32), np.empty(len(numbers), np.int64)
            at = 0
            while at < len(numbers):
                key = _rows_key(document, bank, int(numbers[at]) // CHUNK_ROWS)
                if not (cursor.set_range(key) and cursor.key() == key):  # the row is in a larger chunk, which begins before it
                    cursor.prev()
                found = bytes(cursor.key())
                if found[:-8] != key[:-8]:
                    raise self._damaged()
                chunk = self._once_checked(txn, document, found, cursor.value(), meta["d_model"])
                first = int.from_bytes(found[-8:], "big") * CHUNK_ROWS
                behind = at + int(np.searchsorted(numbers[at:], first + len(chunk[0])))
                if behind == at:
                    raise self._damaged()
                for into, rows in zip((hidden, positions), chunk, strict=True):
                    into[at:behind] = rows[numbers[at:behind] - first]
                at = behind
            return hidden, positions

    def _once_checked(self, txn: Any, document: str, key: bytes, value: Any, d_model: int) -> tuple[np.ndarray, np.ndarray]:
        """A chunk as it lies in the file, checked when this process first reads it."""
        known = (self._identity(), self._deletions(txn, document), key, len(value or b""))
        chunk = self._unpack(value, d_model, check=known not in _checked)
        _checked.add(known)
        return chunk

    def delete(self, document: str) -> None:
        """Forgets a document; its space is used again by what is written next."""
        if not os.path.exists(self.path) or self._is_empty():
            return
        self._meta()  # nothing is written into a file of something else
        with self._write() as txn, txn.cursor() as cursor:
            prefix = _rows_prefix(document)
            more = cursor.set_range(prefix)
            while more and cursor.key().startswith(prefix):
                more = cursor.delete()
            txn.delete(_document_key(document))
            txn.put(_deleted_key(document), str(self._deletions(txn, document) + 1).encode())

    def deletions(self, document: str) -> int:
        if not os.path.exists(self.path):
            return 0
        with self._read() as txn:
            return self._deletions(txn, document)

    def identity(self) -> int:
        return int(self._meta().get("born", 0)) if os.path.exists(self.path) else -1

    def compact(self) -> tuple[int, int]:
        """Writes the file anew, in large chunks and without the space of what was deleted: its bytes before and after.

        Others may read and write meanwhile: writers wait, readers see what they see. Whenever it is cut short the old file is
        there, whole; what it has left beside it, `.NAME.compacting`, is removed by the next one. Takes room for a second file. Processes
        of versions before format 3 must not be at work: they would not notice that the file was replaced.
        """
        if self.identity() == -1:
            raise FileProblem(f"path: there is no store at {self.given}; give the path of one")
        folder, name = os.path.split(self.path)
        staging = os.path.join(folder, f".{name}.compacting")
        with self._write() as txn:
            before = os.path.getsize(self.path)
            try:
                _remove(staging)
                self._copy(txn, staging)
                os.chmod(staging, stat.S_IMODE(os.stat(self.path).st_mode))
                after = os.path.getsize(staging)
                with _folder_lock(self.path, fcntl.LOCK_EX):
                    # The lock file counts transactions of the old one. Who has either open looks for both names before it goes on.
                    _remove(self.path + "-lock")
                    os.replace(staging, self.path)
                    _sync_folder(folder)
            except OSError as error:
                raise FileProblem(f"path: the store {self.given} cannot be compacted: {error}; it is what it was") from error
            finally:
                _remove(staging)
            with _lock:
                _open.pop(self.path, None)
        return before, after

    def _copy(self, txn: Any, path: str) -> None:
        """All that the store holds, synced, in a new file."""
        meta = {**self._meta_of(txn), "format": FORMAT}
        environment = self._lmdb().open(
            path, subdir=False, map_size=self._environment().environment.info()["map_size"], lock=False, sync=False
        )
        with contextlib.closing(environment):
            with environment.begin(write=True) as new, txn.cursor() as cursor:
                for key, value in cursor:
                    if not key.startswith((b"rows/", b"document/")):
                        new.put(key, value)
                new.put(b"meta", json.dumps(meta).encode())
            for document, _ in list(self._documents(txn)):
                about = self._about(txn, document)
                there: dict[str, Any] = {"banks": {}, "next_position": 0}
                for bank, count in about["banks"].items():
                    for chunk in self._chunks(txn, document, bank, count, meta["d_model"]):
                        with environment.begin(write=True) as new:
                            self._append(new, document, {bank: chunk}, meta, there)
                with environment.begin(write=True) as new:
                    new.put(_document_key(document), json.dumps(about).encode())
            environment.sync(True)

    def _chunks(self, txn: Any, document: str, bank: str, count: int, d_model: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        seen = 0
        while seen < count:
            hidden, positions = self._unpack(txn.get(_rows_key(document, bank, seen // CHUNK_ROWS)), d_model)
            n = min(len(hidden), count - seen)
            yield hidden[:n], positions[:n]
            seen += n

    # Inside

    @staticmethod
    def _lmdb() -> Any:
        import lmdb

        return lmdb

    def _is_empty(self) -> bool:
        """Whether the file is one that was being made when its maker ended, or is just being made."""
        with self._read() as txn:
            return not txn.stat()["entries"]

    def _environment(self, create: bool = False) -> _Opened:
        lmdb = self._lmdb()
        with _lock:
            opened = _open.get(self.path)
            # A forked child must open its own; and where the file was deleted, what is written to it would be lost.
            if opened is None or not opened.is_current(self._identity()):
                if opened is not None:
                    if opened.active and opened.file == self._identity():
                        why = "a write failed" if opened.panics else "its lock file was removed"
                        raise FileProblem(f"path: the store {self.given} must be opened anew, for {why}, and is in use; try again")
                    if not opened.active or (opened.file is not None and opened.file[0] != os.getpid()):
                        opened.environment.close()  # else its last user does
                    del _open[self.path]
                self._refuse_foreign()
                try:
                    with _folder_lock(self.path, fcntl.LOCK_SH):  # not while a compacted file takes the name
                        environment = self._map(create)
                        _open[self.path] = opened = _Opened(self._identity(), environment)
                    environment.reader_check()  # frees the slots of processes that died
                except (lmdb.Error, OSError) as error:
                    raise FileProblem(
                        f"path: cannot open the store {self.given}: {error}; expected an LMDB file or a new path in a folder you can write"
                    ) from error
            self._opened = opened
            self._refuse_truncated(opened.environment.info()["last_pgno"], opened.environment.stat()["psize"])
            return opened

    def _map(self, create: bool) -> Any:
        """The file mapped, with as much address space as the process may have."""
        lmdb, size, lock = self._lmdb(), MAP_BYTES, self.path + "-lock"
        # Readers write, too: into the lock file. Without one they look whether what they read was replaced meanwhile.
        locks = os.access(lock if os.path.exists(lock) else os.path.dirname(self.path), os.W_OK)
        readonly = os.path.exists(self.path) and (not os.access(self.path, os.W_OK) or (self.read_only and not locks))
        access = {"readonly": True, "lock": locks} if readonly else {}
        while True:
            try:
                return lmdb.open(self.path, subdir=False, map_size=size, max_dbs=0, max_readers=512, create=create, **access)
            except lmdb.MemoryError:
                size //= 2
                if size < max(LEAST_MAP_BYTES, os.path.getsize(self.path) if os.path.exists(self.path) else 0):
                    raise
            except (lmdb.Error, OSError):
                # Of a file that was to be made there is less than its first two pages: nobody can open that, or has it open.
                if create and 0 < (os.path.getsize(self.path) if os.path.exists(self.path) else 0) < 2 * PAGE_BYTES:
                    _remove(self.path)
                raise

    def _refuse_foreign(self) -> None:
        """LMDB would write into an empty file that is somebody else's, leave a lock file beside any, and map what is not there."""
        try:
            if not stat.S_ISREG(os.stat(self.path).st_mode):
                raise InvalidValue(f"path: expected a file, {self.given} is a folder or a device")
            with open(self.path, "rb") as file:
                first = file.read(MAGIC_AT + _META.size)
                whole = len(first) == MAGIC_AT + _META.size
                page_bytes = _META.unpack_from(first, MAGIC_AT)[1] if whole else 0
                file.seek(page_bytes)
                second = file.read(MAGIC_AT + _META.size)
        except FileNotFoundError:
            return
        except OSError as error:
            raise FileProblem(f"path: cannot open the store {self.given}: {error}; expected a file you can read and write") from error
        if not first and os.path.exists(self.path + "-lock"):
            return  # an empty file with a lock beside it is a store that another process is about to make
        if first[MAGIC_AT : MAGIC_AT + len(MAGIC)] != MAGIC:
            raise FileProblem(f"path: cannot open the store {self.given}: it is not a store; expected an LMDB file or a new path")
        # Each of the first two pages says where the file ends; the one of the later transaction counts.
        metas = [_META.unpack_from(page, MAGIC_AT) for page in (first, second) if len(page) == MAGIC_AT + _META.size]
        last_page = max(metas, key=lambda meta: meta[3])[2] if metas else 1
        self._refuse_truncated(last_page, page_bytes)

    def _refuse_truncated(self, last_page: int, page_bytes: int) -> None:
        """A file shorter than it says it is would end the process where the missing part is read."""
        wanted, size = (last_page + 1) * (page_bytes or PAGE_BYTES), os.path.getsize(self.path) if os.path.exists(self.path) else 0
        if size < wanted:
            raise FileProblem(
                f"path: the store {self.given} is cut off: it should have {wanted} bytes and has {size}; restore it from a copy, or give"
                " another path and read the text again"
            )

    def _identity(self) -> tuple[int, int, int] | None:
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        return os.getpid(), status.st_dev, status.st_ino

    @contextlib.contextmanager
    def _transaction(self, create: bool = False, **options: Any) -> Iterator[Any]:
        lmdb = self._lmdb()
        with _lock:
            opened = self._environment(create)
            opened.active += 1
        try:
            if options.get("write"):
                with _turn(self.path), opened.environment.begin(write=True) as txn:
                    if opened.is_current(self._identity()):
                        yield txn
                        return
                    txn.abort()
                raise _Replaced
            begun = None if opened.locked else opened.environment.info()["last_txnid"]
            with opened.environment.begin(**options) as txn:
                yield txn
            if begun is not None and opened.environment.info()["last_txnid"] != begun:
                raise FileProblem(
                    f"path: the store {self.given} was written to while it was read, and its lock file cannot be used to prevent that;"
                    " try again"
                )
        except (lmdb.MapFullError, lmdb.MapResizedError) as error:
            size = opened.environment.info()["map_size"]
            raise FileProblem(
                f"path: the store {self.given} does not fit into the {size >> 20} MB of address space that this process has for it; what"
                " it held before is still there"
            ) from error
        except lmdb.Error as error:
            try:
                opened.environment.begin().abort()
            except lmdb.PanicError:
                opened.panics = True
            raise FileProblem(f"path: the store {self.given} cannot be used: {error}; its earlier contents are still there") from error
        finally:
            with _lock:
                opened.active -= 1

    def _read(self, buffers: bool = False) -> Any:
        return self._transaction(buffers=buffers)

    def _may_write(self) -> bool:
        return not self.read_only and (os.access(self.path, os.W_OK) or not os.path.exists(self.path))

    def _write(self, create: bool = False) -> Any:
        if not self._may_write():
            why = "it was opened with read_only=true" if self.read_only else "this process has no permission to write to the file"
            raise FileProblem(f"path: nothing was written to the store {self.given}: {why}; it can be read alone")
        return self._writing(create)

    @contextlib.contextmanager
    def _writing(self, create: bool) -> Iterator[Any]:
        while True:
            with contextlib.ExitStack() as stack:
                try:
                    txn = stack.enter_context(self._transaction(create=create, write=True))
                except _Replaced:
                    continue  # by a compacted one, while this waited for its turn to write
                yield txn
                return

    def _meta(self) -> dict[str, Any]:
        with self._read() as txn:
            return self._meta_of(txn)

    def _meta_of(self, txn: Any) -> dict[str, Any]:
        value = txn.get(b"meta")
        meta = self._parse(value) if value is not None else {}
        if meta.get("format") in (1, 2) and "models" not in meta:
            meta["models"] = {ALL: meta.pop("model", None)}
        if meta.get("format") not in range(1, FORMAT + 1) or not isinstance(meta.get("d_model"), int) or meta["d_model"] < 1:
            raise InvalidValue(f"path: {self.given} is not a store of format 1 to {FORMAT}; give another path")
        return meta

    def _document(self, name: str) -> dict[str, Any]:
        with self._read() as txn:
            return self._about(txn, name)

    def _about(self, txn: Any, name: str) -> dict[str, Any]:
        value = txn.get(_document_key(name))
        return self._parse(value) if value is not None else {"banks": {}, "next_position": 0}

    @staticmethod
    def _deletions(txn: Any, document: str) -> int:
        return int(bytes(txn.get(_deleted_key(document)) or b"0"))

    def _unpack(self, value: Any, d_model: int, check: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Rows and positions of a chunk, as they lie in `value`."""
        n, rest = divmod(len(value or b""), 4 * d_model + 8)
        if not n or rest not in (0, CRC_BYTES) or (rest and check and _crc(value[:-CRC_BYTES]) != bytes(value[-CRC_BYTES:])):
            raise self._damaged()
        hidden = np.frombuffer(value, "<f4", n * d_model).reshape(n, d_model)
        return hidden, np.frombuffer(value, "<i8", n, offset=4 * n * d_model)

    def _damaged(self) -> InvalidValue:
        return InvalidValue(
            f"path: rows of the store {self.given} are damaged; restore it from a copy, or give another path and read the text again"
        )

    def _parse(self, value: Any) -> dict[str, Any]:
        try:
            return dict(json.loads(bytes(value)))
        except (ValueError, TypeError) as error:
            raise InvalidValue(f"path: the store {self.given} is damaged: {error}; give another path and read the text again") from error


def _inode(path: str) -> int | None:
    try:
        return os.stat(path).st_ino
    except OSError:
        return None


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


@contextlib.contextmanager
def _turn(path: str) -> Iterator[None]:
    """Held by the one that writes to the file. The others wait here, and not for LMDB's own lock.

    That is a futex. Where one that waits for it is woken, and killed before it has the lock, while a writer that did not wait takes it,
    nobody wakes the next one. It would sleep until others wait, too, and for ever if a compaction has replaced the lock file.
    """
    if sys.platform != "linux":  # no locks of an open file, and LMDB's own is none that outlives who holds it
        yield
        return
    try:
        _turns.add(fd := os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError:  # it was deleted: the one who waits for its turn will see
        fd = -1
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            # Of the open file: threads have one each, and `flock` on the file, under which someone may have started us, is another.
            fcntl.fcntl(fd, fcntl.F_OFD_SETLKW, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        yield
    finally:
        if fd in _turns:  # not in a child that was forked meanwhile
            _turns.remove(fd)
            with contextlib.suppress(OSError):  # by name, not by closing alone: a child that is just being made has it open, too
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))
            os.close(fd)


@contextlib.contextmanager
def _folder_lock(path: str, kind: int) -> Iterator[None]:
    """Held by those who open a store in the folder, and alone by the one that replaces it.

    Gives up waiting after LOCK_SECONDS: whoever started us under `flock` on the folder would wait for ever.
    """
    fd = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while time.monotonic() < deadline:
            try:
                fcntl.flock(fd, kind | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.001)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(fd)


def _sync_folder(path: str) -> None:
    """LMDB syncs a file, but not its name in the folder, without which a new file is lost in a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def large_chunks(d_model: int) -> int:
    """How many chunks of CHUNK_ROWS make a large one."""
    return 1 << max(0, (LARGE_BYTES // (CHUNK_ROWS * (4 * d_model + 8))).bit_length() - 1)


def _packed(hidden: np.ndarray, positions: np.ndarray, checked: bool) -> bytes:
    """A chunk as it lies in the file; checked: with a CRC."""
    parts: list[Any] = [np.ascontiguousarray(hidden, "<f4").reshape(-1), np.ascontiguousarray(positions, "<i8")]
    if checked:
        parts.append(zlib.crc32(parts[1], zlib.crc32(parts[0])).to_bytes(CRC_BYTES, "little"))
    return b"".join(parts)


def _document_key(name: str) -> bytes:
    return b"document/" + name.encode()


def _deleted_key(name: str) -> bytes:
    return b"deleted/" + name.encode()


def _rows_prefix(document: str) -> bytes:
    # A digest: a name may hold any byte, "/" too, and LMDB's keys end at 511 bytes.
    return b"rows/" + hashlib.sha256(document.encode()).digest()[:16] + b"/"


def _rows_key(document: str, bank: str, number: int) -> bytes:
    return _rows_prefix(document) + bank.encode() + b"/" + number.to_bytes(8, "big")


def _crc(value: Any) -> bytes:
    return zlib.crc32(value).to_bytes(CRC_BYTES, "little")
