"""What a decoder has read of prompts, in files, so that a long one is read once: by this process or another.

A folder has a file for each prompt, its tokens with the keys and values of every layer. They depend on the tokens up to their own and on
nothing behind them, so what two prompts begin with alike is of use to both; and they have the same bits whatever parts a prompt is read
in, so an answer is the one without a cache. A file is of one model, one dtype of keys and one instruction set: other ones find other bits.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Hashable
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from . import _core
from .checkpoint.safetensors import BFLOAT16, encode_safetensors, read_safetensors
from .errors import FileProblem, InvalidValue, MiniTfmError
from .files.reading import as_path, reason
from .files.writing import building, write_all
from .generate.cache import KVCache
from .model import Model
from .stream import Stream
from .weights import Weights

ENDING = ".safetensors"


class PromptCache:
    """The files in `folder`, which is made where it is missing, for a stream of a decoder-only model without a memory.

    Raises InvalidValue for another stream, FileProblem for a folder that cannot be made.
    """

    def __init__(self, folder: str | os.PathLike, stream: Stream):
        self.folder = as_path(folder)
        if stream.model.config.has_encoder or stream.model.config.decoder_mixer != "attention":
            raise InvalidValue("prompt_cache: expected None for this model; a cache is for decoder-only models with attention")
        if stream.run.members:
            raise InvalidValue("prompt_cache: expected None beside a memory, which changes what a prompt is read as; give memory=None")
        try:
            os.makedirs(self.folder, exist_ok=True)
        except (OSError, ValueError) as error:
            raise FileProblem(f"prompt_cache: {self.folder} cannot be made: {reason(error)}") from error
        self._model = stream.model

    def restore(self, cache: KVCache, tokens: np.ndarray) -> int:
        """Puts into an empty cache what is here of the beginning of tokens (T,): so many that need not be read, below T.

        Warns of a file that is damaged, and goes without it.
        """
        name = self._name(cache)
        best: tuple[int, dict[str, np.ndarray]] = 0, {}
        try:
            paths = sorted(each.path for each in os.scandir(self.folder) if each.name.startswith(name) and each.name.endswith(ENDING))
        except OSError as error:
            raise FileProblem(f"prompt_cache: {self.folder} cannot be read: {reason(error)}") from error
        for path in paths:
            try:
                found = read_safetensors(path, mmap=True)
                n = _alike(found["tokens"], tokens[:-1])
                if n <= best[0]:
                    continue
                if found.pop("digest").tobytes() != _digest(name, found):
                    raise InvalidValue(f"{path}: does not hold what was written")
                best = n, found
            except FileNotFoundError:  # deleted meanwhile
                continue
            except (MiniTfmError, KeyError, AttributeError, TypeError, ValueError) as error:
                warnings.warn(f"prompt_cache: {path} is damaged and is not used; delete it ({error})", stacklevel=2)
        n, found = best
        if n:
            cache.begin_with([tuple(_plain(found[f"{what}.{i}"])[:, :n] for what in ("keys", "values")) for i in range(self._n_layers)])
        return n

    def keep(self, cache: KVCache, tokens: np.ndarray, n_restored: int) -> None:
        """Writes what the cache has of tokens (T,), if less than a half of them was restored. Raises FileProblem."""
        if len(tokens) < 2 * n_restored or len(tokens) < 2:
            return
        name = self._name(cache)
        tensors: dict[str, np.ndarray] = {"tokens": tokens.astype(np.int64)}
        for i, pair in enumerate(cache.first_rows()):
            tensors |= {f"{what}.{i}": _typed(x) for what, x in zip(("keys", "values"), pair, strict=True)}
        digest = _digest(name, tensors)
        path = os.path.join(self.folder, f"{name}-{hashlib.blake2b(tensors['tokens'].tobytes(), digest_size=8).hexdigest()}{ENDING}")
        try:
            with building(path, overwrite=True) as fd:
                for buffer in encode_safetensors(tensors | {"digest": np.frombuffer(digest, np.uint8)}):
                    write_all(fd, buffer)
        except OSError as error:
            raise FileProblem(f"prompt_cache: {path} cannot be written: {reason(error)}") from error

    @property
    def _n_layers(self) -> int:
        return self._model.config.n_decoder_layers

    def _name(self, cache: KVCache) -> str:
        """Of all but the tokens that keys and values are made of, 16 hexadecimal digits."""
        made_of = _fingerprint(self._model), self._model.precision, str(self._model.dtype), cache.dtype, _core.show_config()["isa"]
        return hashlib.blake2b(repr(made_of).encode(), digest_size=8).hexdigest()


_named: WeakKeyDictionary[Model, tuple[list[Hashable], str]] = WeakKeyDictionary()


def _fingerprint(model: Model) -> str:
    """`Model.fingerprint`, made once as long as the weights are what they were."""
    weights = Weights(model.weights)
    state: list[Hashable] = [(name, weights[name].checksum()) for name in sorted(model.weights)]
    kept, name = _named.get(model, ([], ""))
    if not name or kept != state:
        name = model.fingerprint()
        _named[model] = state, name
    return name


def _alike(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two texts begin with alike."""
    n = min(len(one), len(other))
    differ = np.flatnonzero(one[:n] != other[:n])
    return int(differ[0]) if len(differ) else n


def _digest(name: str, tensors: dict[str, np.ndarray]) -> bytes:
    digest = hashlib.blake2b(name.encode(), digest_size=32)
    for key in sorted(tensors):
        array = tensors[key]
        digest.update(repr((key, str(array.dtype), array.shape)).encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.digest()


def _typed(x: np.ndarray) -> Any:
    """As a file has it: bits of bfloat16 with their name."""
    x = np.ascontiguousarray(x)
    return x.view(BFLOAT16) if x.dtype == np.uint16 else x


def _plain(x: np.ndarray) -> np.ndarray:
    return x["bfloat16"] if x.dtype == BFLOAT16 else x
