"""LmdbRows: a store of rows in one LMDB file. Named documents, each of named banks, each a growing (N, d) float32 array.

LMDB is crash-safe, has one writer and many readers, and is memory-mapped: readers get arrays that lie in the
file. Rows lie in chunks, one value each:

    meta                         {"format", "d_model", "model"}
    document/<name>              {"banks": {bank: rows}, "next_position"}
    rows/<name>/<bank>/<chunk>   up to CHUNK_ROWS rows: (n, d) float32, then (n,) int64 positions

Numbers are little-endian. A row counts only once its document says so, in the same transaction.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mini_tfm.errors import FileProblem, InvalidValue

FORMAT = 1
CHUNK_ROWS = 1024
MAGIC_AT, MAGIC = 16, (0xBEEFC0DE).to_bytes(4, sys.byteorder)  # behind the header of LMDB's first page
FIRST_MAP_BYTES = 1 << 28  # virtual, not disk: the map is doubled when full

_open: dict[str, tuple[Any, Any]] = {}  # path -> (process and inode, environment): LMDB allows one a process
_lock = threading.RLock()


class LmdbRows:
    """The RowStore in the LMDB file at `path`; made when it is first opened. Raises InvalidValue or FileProblem naming the path."""

    def __init__(self, path: str):
        self.path = os.path.realpath(path)  # LMDB must not open a file twice, under whatever name
        self.given = path

    def open(self, d_model: int, model: str) -> None:
        """Checks that the file, if there is one, holds rows of this width and model; else makes it."""
        if not os.path.exists(self.path):
            meta = {"format": FORMAT, "d_model": d_model, "model": model}
            with self._write() as txn:
                if txn.get(b"meta") is None:
                    txn.put(b"meta", json.dumps(meta).encode())
        meta = self._meta()
        if meta["d_model"] != d_model:
            raise InvalidValue(
                f"path: the store {self.given} holds rows of width {meta['d_model']}, this model needs {d_model}; give another path"
            )
        if meta["model"] != model:
            raise InvalidValue(
                f"path: the store {self.given} holds rows from other weights (model {meta['model']}, this is {model});"
                " another model cannot use them: read the text again into another path"
            )

    def documents(self) -> dict[str, int]:
        """Rows of each document."""
        if not os.path.exists(self.path):
            return {}
        self._meta()
        with self._read() as txn, txn.cursor() as cursor:
            found = {}
            more = cursor.set_range(b"document/")
            while more and cursor.key().startswith(b"document/"):
                found[bytes(cursor.key())[9:].decode()] = sum(self._parse(cursor.value())["banks"].values())
                more = cursor.next()
            return found

    def counts(self, document: str) -> dict[str, int]:
        return self._document(document)["banks"]

    def next_position(self, document: str) -> int:
        return self._document(document)["next_position"]

    def append(self, document: str, rows: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, int]:
        """Adds (hidden (n, d), positions (n,)) to each bank, in one durable transaction; the banks' new counts."""
        d_model = self._meta()["d_model"]
        while True:
            try:
                with self._write() as txn:
                    return self._append(txn, document, rows, d_model)
            except self._lmdb().MapFullError:
                self._grow()

    def _append(self, txn: Any, document: str, rows: Mapping[str, tuple[np.ndarray, np.ndarray]], d_model: int) -> dict[str, int]:
        about = self._parse(txn.get(_document_key(document))) if txn.get(_document_key(document)) else _nothing()
        for bank, (hidden, positions) in rows.items():
            count = about["banks"].get(bank, 0)
            number, used = divmod(count, CHUNK_ROWS)
            if used:
                old_hidden, old_positions = _unpack(txn.get(_rows_key(document, bank, number)), d_model)
                hidden = np.concatenate([old_hidden[:used], hidden])
                positions = np.concatenate([old_positions[:used], positions])
            for start in range(0, len(hidden), CHUNK_ROWS):
                part = slice(start, start + CHUNK_ROWS)
                value = hidden[part].astype("<f4").tobytes() + positions[part].astype("<i8").tobytes()
                txn.put(_rows_key(document, bank, number + start // CHUNK_ROWS), value)
            about["banks"][bank] = number * CHUNK_ROWS + len(hidden)
            about["next_position"] = max(about["next_position"], int(positions.max(initial=-1)) + 1)
        txn.put(_document_key(document), json.dumps(about).encode())
        return about["banks"]

    @contextlib.contextmanager
    def reading(self, document: str, bank: str, count: int) -> Iterator[Iterator[tuple[np.ndarray, np.ndarray]]]:
        """The first `count` rows, a chunk at a time: (n, d) float32 as it lies in the file, (n,) int64 positions.

        Valid inside the context only.
        """
        d_model = self._meta()["d_model"]
        with self._read(buffers=True) as txn:

            def chunks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
                for number in range(-(-count // CHUNK_ROWS)):
                    value = txn.get(_rows_key(document, bank, number))
                    if value is None:
                        return  # the document was deleted by someone else: nothing to remember
                    hidden, positions = _unpack(value, d_model)
                    n = min(len(hidden), count - number * CHUNK_ROWS)
                    yield hidden[:n], positions[:n]

            yield chunks()

    def delete(self, document: str) -> None:
        """Forgets a document; its space is used again by what is written next."""
        with self._write() as txn, txn.cursor() as cursor:
            prefix = _rows_prefix(document)
            more = cursor.set_range(prefix)
            while more and cursor.key().startswith(prefix):
                more = cursor.delete()
            txn.delete(_document_key(document))

    # Inside

    @staticmethod
    def _lmdb() -> Any:
        import lmdb

        return lmdb

    def _environment(self) -> Any:
        lmdb = self._lmdb()
        with _lock:
            opened, environment = _open.get(self.path, (None, None))
            # A forked child must open its own; and where the file was deleted, what is written to it would be lost.
            if environment is None or opened != self._identity():
                if environment is not None:
                    environment.close()
                    del _open[self.path]
                if os.path.isdir(self.path):
                    raise InvalidValue(f"path: expected a file, {self.given} is a folder")
                self._refuse_foreign()
                try:
                    size = max(FIRST_MAP_BYTES, 2 * os.path.getsize(self.path) if os.path.exists(self.path) else 0)
                    environment = lmdb.open(self.path, subdir=False, map_size=size, max_dbs=0, max_readers=512)
                except lmdb.Error as error:
                    raise FileProblem(
                        f"path: cannot open the store {self.given}: {error}; expected an LMDB file or a new path in a folder you can write"
                    ) from error
                _open[self.path] = (self._identity(), environment)
            return environment

    def _refuse_foreign(self) -> None:
        """LMDB would write into an empty file that is somebody else's, and leave a lock file beside any."""
        try:
            with open(self.path, "rb") as file:
                head = file.read(MAGIC_AT + len(MAGIC))
        except FileNotFoundError:
            return
        except OSError as error:
            raise FileProblem(f"path: cannot open the store {self.given}: {error}; expected a file you can read and write") from error
        # An empty file with a lock beside it is a store that another process is about to make.
        is_made_now = not head and os.path.exists(self.path + "-lock")
        if head[MAGIC_AT:] != MAGIC and not is_made_now:
            raise FileProblem(f"path: cannot open the store {self.given}: it is not a store; expected an LMDB file or a new path")

    def _identity(self) -> tuple[int, int, int] | None:
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        return os.getpid(), status.st_dev, status.st_ino

    @contextlib.contextmanager
    def _transaction(self, **options: Any) -> Iterator[Any]:
        lmdb = self._lmdb()
        try:
            try:
                txn = self._environment().begin(**options)
            except lmdb.MapResizedError:  # another process has grown the file
                self._environment().set_mapsize(0)
                txn = self._environment().begin(**options)
            with txn:
                yield txn
        except lmdb.MapFullError:
            raise
        except lmdb.Error as error:
            raise FileProblem(f"path: the store {self.given} cannot be used: {error}; its earlier contents are still there") from error

    def _read(self, buffers: bool = False) -> Any:
        return self._transaction(buffers=buffers)

    def _write(self) -> Any:
        return self._transaction(write=True)

    def _grow(self) -> None:
        with _lock:
            environment = self._environment()
            environment.set_mapsize(2 * environment.info()["map_size"])

    def _meta(self) -> dict[str, Any]:
        with self._read() as txn:
            value = txn.get(b"meta")
        meta = self._parse(value) if value is not None else {}
        if meta.get("format") != FORMAT or not isinstance(meta.get("d_model"), int):
            raise InvalidValue(f"path: {self.given} is not a store of format {FORMAT}; give another path")
        return meta

    def _document(self, name: str) -> dict[str, Any]:
        with self._read() as txn:
            value = txn.get(_document_key(name))
        return self._parse(value) if value is not None else _nothing()

    def _parse(self, value: Any) -> dict[str, Any]:
        try:
            return dict(json.loads(bytes(value)))
        except (ValueError, TypeError) as error:
            raise InvalidValue(f"path: the store {self.given} is damaged: {error}; give another path and read the text again") from error


def _nothing() -> dict[str, Any]:
    return {"banks": {}, "next_position": 0}


def _document_key(name: str) -> bytes:
    return b"document/" + name.encode()


def _rows_prefix(document: str) -> bytes:
    # A digest: a name may hold any byte, "/" too, and LMDB's keys end at 511 bytes.
    return b"rows/" + hashlib.sha256(document.encode()).digest()[:16] + b"/"


def _rows_key(document: str, bank: str, number: int) -> bytes:
    return _rows_prefix(document) + bank.encode() + b"/" + number.to_bytes(8, "big")


def _unpack(value: Any, d_model: int) -> tuple[np.ndarray, np.ndarray]:
    n = len(value) // (4 * d_model + 8)
    if n * (4 * d_model + 8) != len(value):
        raise InvalidValue("path: a chunk of the store is damaged; give another path and read the text again")
    hidden = np.frombuffer(value, "<f4", n * d_model).reshape(n, d_model)
    return hidden, np.frombuffer(value, "<i8", n, offset=4 * n * d_model)
