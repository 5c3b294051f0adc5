"""Token caches: a corpus tokenized once into one file, which is then mapped into memory and read as needed.

    8 bytes    MAGIC
    tokens     the smallest unsigned integer that holds the vocabulary, little-endian; zeros fill up to 8 bytes
    offsets    int64, where each document begins, and where the last ends
    about      JSON: version, kind, counts, SHA-256 of the contents, of the tokenizer and of each source file
    8 bytes    its length
    8 bytes    END

The description stands at the end, because it is known only then: the file is written in one pass, in bounded RAM, beside the
final one as `.NAME.building`, flushed to the disk and renamed when it is complete. Its builder holds a lock on it: of several
at once one builds and the others wait. The next builder overwrites what a killed one left.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import struct
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import FileProblem, InvalidType, InvalidValue
from ..files.reading import NamedFile, as_path, open_regular
from ..files.strict_json import parse_json_strict
from ..files.writing import ThereAlready, building, write_all
from ..progress import progress_bar
from ..text.tokenizers import Tokenizer
from .corpus import KINDS, Corpus, TokenSource, token_dtype
from .sources import TextFiles

MAGIC, END = b"mtfmtok1", b"1kotmftm"
VERSION = 1
MAX_ABOUT_BYTES = 1 << 24
_CHUNK_BYTES = 1 << 20


def token_cache(
    path: str | os.PathLike,
    files: TextFiles,
    tokenizer: Tokenizer,
    *,
    end_id: int | None = None,
    verify: bool = True,
    progress: bool = True,
) -> Corpus:
    """The corpus of `files` in the cache `path`, which is built if it does not exist.

    An existing cache is opened as by `open_token_cache`: one that does not fit is an error, and is not overwritten. Several
    processes may call this at once: one builds, the others wait.
    """
    if not isinstance(files, TextFiles):
        raise InvalidType(
            f"files: expected TextFiles, got {type(files).__name__}; build a cache of other documents with build_token_cache, and open it"
            " with open_token_cache"
        )
    if not os.path.lexists(as_path(path)):
        with contextlib.suppress(ThereAlready):
            return build_token_cache(path, files, tokenizer, end_id=end_id, progress=progress)
    return open_token_cache(path, tokenizer, files, end_id=end_id, verify=verify)


def build_token_cache(
    path: str | os.PathLike,
    documents: Any,
    tokenizer: Tokenizer | None = None,
    *,
    end_id: int | None = None,
    vocab_size: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Corpus:
    """Tokenizes `documents` into the file `path`, and opens it. documents, tokenizer, end_id, vocab_size: as in `Corpus.of`.

    RAM is bounded whatever the size. A crash leaves no file, or the old one. vocab_size: required without a tokenizer.
    Raises FileProblem where the file exists (unless overwrite), cannot be written, or a source changes meanwhile; and
    what `Corpus.of` raises.
    """
    source = TokenSource(documents, tokenizer, end_id, vocab_size)
    if source.vocab_size is None:
        raise InvalidValue("vocab_size: expected the number of ids, as there is no tokenizer; got None")
    target = os.path.realpath(as_path(path))
    about: dict[str, Any] = {
        "format": "mini_tfm tokens",
        "version": VERSION,
        "vocab_size": source.vocab_size,
        "tokenizer": _tokenizer_name(tokenizer),
        "sources": None,  # filled in below
        "options": _options(documents, end_id),
    }
    files = documents if isinstance(documents, TextFiles) else None
    try:
        with building(target, overwrite) as staging:
            stamps = files.stamps() if files else None
            about["sources"] = files.fingerprints() if files else None
            with progress_bar("tokenizing", None, "tokens") if progress else contextlib.nullcontext(lambda n: None) as advance:
                _write(staging, os.path.dirname(target), source, about, advance)
            if files and files.stamps() != stamps:
                raise FileProblem(f"{path}: a source changed while it was read; nothing was written, build the cache again")
    except (FileProblem, InvalidValue):
        raise
    except OSError as error:
        raise FileProblem(
            f"{path}: cannot be written: {error.strerror or error}; nothing was changed. Check free space and permissions"
        ) from error
    return open_token_cache(path, verify=False)


def open_token_cache(
    path: str | os.PathLike,
    tokenizer: Tokenizer | None = None,
    files: TextFiles | None = None,
    *,
    end_id: int | None = None,
    verify: bool = True,
) -> Corpus:
    """The corpus in a cache, mapped into memory: only the parts being read take RAM.

    tokenizer, files (and end_id): if given, the cache must have been made with them. verify: read the whole cache and the
    source files once and compare SHA-256; otherwise compare sizes only. Raises FileProblem, and InvalidValue where the cache
    is truncated, damaged, made with another tokenizer, or a source has changed.
    """
    shown = as_path(path)
    with open_regular(shown) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            about = _read_about(file, size)
            if verify:
                _check_contents(file, about)
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except OSError as error:
            raise FileProblem(f"{shown}: cannot be read: {error.strerror or error}") from error
    dtype, start = token_dtype(about["vocab_size"]), _offsets_at(about)
    if hasattr(mmap, "MADV_RANDOM"):  # rows are read in any order: what lies behind one is not wanted next
        mapped.madvise(mmap.MADV_RANDOM)
    if tokenizer is not None and about["tokenizer"] != _tokenizer_name(tokenizer):
        raise InvalidValue(
            f"{shown}: was built with another tokenizer ({about['vocab_size']:,} ids; this one has {tokenizer.vocab_size:,}); give that"
            " one, or another path for a new cache"
        )
    if files is not None:
        _check_sources(shown, about, files, end_id, verify)
    tokens = np.frombuffer(mapped, dtype, about["n_tokens"], len(MAGIC))
    offsets = np.frombuffer(mapped, "<i8", about["n_documents"] + 1, start)
    if offsets[0] != 0 or offsets[-1] != about["n_tokens"]:
        raise InvalidValue(f"{shown}: is damaged: its documents do not hold {about['n_tokens']:,} tokens; delete it, and build it again")
    return Corpus(tokens, offsets, kind=about["kind"], vocab_size=about["vocab_size"], fingerprint=about["contents"])


# Writing


def _write(fd: int, folder: str, source: TokenSource, about: dict[str, Any], advance: Callable[[float], None]) -> None:
    """Writes the whole file and flushes it to the disk; completes `about`."""
    digest, dtype = hashlib.sha256(), token_dtype(source.vocab_size or 0)
    waiting, held = [MAGIC], len(MAGIC)
    n_tokens = n_documents = 0

    def put(data: bytes, flush: bool = False) -> None:
        nonlocal waiting, held
        waiting.append(data)
        held += len(data)
        if held >= _CHUNK_BYTES or flush:
            write_all(fd, b"".join(waiting))
            waiting, held = [], 0

    # Unnamed, so that a kill leaves nothing of it; beside the file, as it may be as large as memory.
    with tempfile.TemporaryFile(dir=folder) as spool:
        spool.write(struct.pack("<q", 0))
        for ids, ends in source:
            if len(ids):
                data = ids.astype(dtype).tobytes()
                digest.update(data)
                put(data)
                n_tokens += len(ids)
                advance(len(ids))
            if ends:
                n_documents += 1
                spool.write(struct.pack("<q", n_tokens))
        put(bytes(-(n_tokens * dtype.itemsize) % 8))
        spool.seek(0)
        while chunk := spool.read(_CHUNK_BYTES):
            digest.update(chunk)
            put(chunk)
    about |= {"kind": source.kind, "n_tokens": n_tokens, "n_documents": n_documents, "contents": digest.hexdigest()}
    description = json.dumps(about).encode()
    put(description + struct.pack("<Q", len(description)) + END, flush=True)


# Reading


def _read_about(file: NamedFile, size: int) -> dict[str, Any]:
    """The description at the end of a cache, with every number checked against the size of the file."""
    name = file.name
    tail = len(END) + 8
    cut = f"{name}: is no token cache, or was cut off"
    if size < len(MAGIC) + tail:
        raise InvalidValue(f"{cut}: it has {size} bytes")
    begin = file.read(len(MAGIC))
    file.seek(size - tail)
    length, end = struct.unpack("<Q8s", file.read(tail))
    if begin != MAGIC or end != END:
        raise InvalidValue(f"{cut}: expected it to begin with {MAGIC!r} and end with {END!r}, found {begin!r} and {end!r}")
    if length > min(MAX_ABOUT_BYTES, size - tail - len(MAGIC)):
        raise InvalidValue(f"{name}: is damaged: its description cannot have {length} bytes")
    file.seek(size - tail - length)
    about = parse_json_strict(file.read(length), name)
    if about.get("format") != "mini_tfm tokens" or about.get("version") != VERSION:
        raise InvalidValue(f"{name}: expected a token cache of version {VERSION}, got {about.get('version')!r}; build it again")
    wanted = {"vocab_size": int, "n_tokens": int, "n_documents": int, "kind": str, "contents": str, "tokenizer": str, "options": dict}
    faults = [f"{field!r}: expected {kind.__name__}" for field, kind in wanted.items() if type(about.get(field)) is not kind]
    faults += [f"{field!r}: expected at least 1" for field, kind in wanted.items() if kind is int and not faults and about[field] < 1]
    if not faults and about["kind"] not in KINDS:
        faults = [f"'kind': expected one of {', '.join(KINDS)}"]
    if about.get("sources") is not None and not isinstance(about["sources"], list):
        faults.append("'sources': expected a list or null")
    if faults:
        raise InvalidValue(f"{name}: its description is damaged: " + "; ".join(faults))
    expected = _offsets_at(about) + 8 * (about["n_documents"] + 1) + length + tail
    if expected != size:
        raise InvalidValue(f"{name}: was cut off or damaged: it should have {expected:,} bytes, it has {size:,}")
    return about


def _offsets_at(about: dict[str, Any]) -> int:
    """The byte at which the offsets begin."""
    return len(MAGIC) + -(-about["n_tokens"] * token_dtype(about["vocab_size"]).itemsize // 8) * 8


def _check_contents(file: NamedFile, about: dict[str, Any]) -> None:
    """Compares the SHA-256 of tokens and offsets, read a piece at a time."""
    digest = hashlib.sha256()
    n_bytes = about["n_tokens"] * token_dtype(about["vocab_size"]).itemsize
    for start, left in ((len(MAGIC), n_bytes), (_offsets_at(about), 8 * (about["n_documents"] + 1))):
        file.seek(start)
        while left:
            chunk = file.read(min(left, _CHUNK_BYTES))
            if not chunk:
                raise InvalidValue(f"{file.name}: was cut off while it was read")
            digest.update(chunk)
            left -= len(chunk)
    if digest.hexdigest() != about["contents"]:
        raise InvalidValue(f"{file.name}: is damaged: its contents have changed since it was written; delete it, and build it again")


def _check_sources(name: str, about: dict[str, Any], files: TextFiles, end_id: int | None, verify: bool) -> None:
    """Refuses a cache of other files, or of files read in another way."""
    if about["sources"] is None or about["options"] != _options(files, end_id):
        raise InvalidValue(
            f"{name}: was built from other sources or with other options ({about['options']}, now {_options(files, end_id)}); give another"
            " path for a new cache"
        )
    keys = ("name", "bytes", "sha256") if verify else ("name", "bytes")
    if verify:
        now = files.fingerprints()
    else:
        now = [{"name": os.path.basename(path), "bytes": stamp[1]} for path, stamp in zip(files.paths, files.stamps(), strict=True)]
    then = [{key: source.get(key) for key in keys} if isinstance(source, dict) else {} for source in about["sources"]]
    if now != then:
        changed = [each["name"] for each in now if each not in then] or [str(each.get("name")) for each in then if each not in now]
        raise InvalidValue(
            f"{name}: the text has changed since this cache was built ({', '.join(changed[:3]) or 'the files have another order'});"
            " delete the cache, or give another path, to build it again"
        )


def _tokenizer_name(tokenizer: Tokenizer | None) -> str:
    """SHA-256 of everything that makes a tokenizer what it is."""
    if tokenizer is None:
        return ""
    digest = hashlib.sha256(f"{type(tokenizer).__name__} {tokenizer.vocab_size}".encode())
    for name, content in sorted(tokenizer.files().items()):
        digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def _options(documents: Any, end_id: int | None) -> dict[str, Any]:
    return {**(documents.options if isinstance(documents, TextFiles) else {}), "end_id": end_id}
