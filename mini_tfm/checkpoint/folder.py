"""A model folder of our own: `config.json` and `model.safetensors`, read as one and written as one.

A save replaces the folder as a whole. So a reader opens all the files it needs through one descriptor (`OpenFolder`): by
path, a save in between would pair an old configuration with new tensors.
"""

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mini_tfm.errors import FileProblem, InvalidValue
from mini_tfm.files.folders import alone_in, recover, write_folder
from mini_tfm.files.reading import NamedFile, as_path, open_regular, read_all, reason
from mini_tfm.files.strict_json import MAX_JSON_BYTES, encode_json, parse_json_strict
from mini_tfm.files.writing import Buffers

from ..text import tokenizers
from .safetensors import Entry, encode_safetensors, read_entries, read_tensors

CONFIG_FILE = "config.json"
TENSORS_FILE = "model.safetensors"
TOKENIZER_FILES = (tokenizers.CONFIG_FILE, tokenizers.TOKENIZER_FILE)


def save_folder(
    folder: str | os.PathLike,
    config: dict[str, Any],
    tensors: Mapping[str, np.ndarray],
    extra_files: Mapping[str, bytes | Buffers] | None = None,
    *,
    new: bool = False,
) -> None:
    """Write a model folder: `config.json`, `model.safetensors` and `extra_files` (plain name -> content).

    The same arguments give the same bytes. new: never over a model that is there. Whatever else the folder held is kept.
    Raises what `write_folder` and `encode_safetensors` raise, and InvalidValue when `config` is not plain, finite JSON with text keys.
    """
    files = dict(extra_files or {})
    for name in (CONFIG_FILE, TENSORS_FILE):
        if name in files:
            raise InvalidValue(f"extra_files: {name!r} is a file of the model itself; choose another name")
    write_folder(folder, files | {CONFIG_FILE: encode_json(config), TENSORS_FILE: encode_safetensors(tensors)}, new=new)


class OpenFolder(contextlib.AbstractContextManager["OpenFolder"], os.PathLike):
    """A model folder whose `config.json`, `model.safetensors`, `more` files, and the tokenizer's if it has one, are open, all of
    one save.

    `load_checkpoint` takes it in place of a path. Raises FileProblem when something is missing,
    unreadable or a link.
    """

    def __init__(self, folder: str | os.PathLike, more: Sequence[str] = ()) -> None:
        self.path = as_path(folder)
        self._files: dict[str, NamedFile] = {}
        while not self._open((CONFIG_FILE, TENSORS_FILE, *more)):
            pass  # a save replaced the folder meanwhile

    def __exit__(self, *exception: object) -> None:
        self._close()

    def __fspath__(self) -> str:
        return self.path

    def read_bytes(self, name: str, max_bytes: int) -> bytes | None:
        """The content of an open file of at most `max_bytes` bytes, None if there is no such file. Raises what `read_bytes` does."""
        if (file := self._files.get(name)) is None:
            return None
        file.seek(0)
        return read_all(file, max_bytes)

    def read_json(self, name: str, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
        """The JSON object in an open file. Raises what `read_json_strict` does."""
        file = self._files[name]
        file.seek(0)
        return parse_json_strict(read_all(file, max_bytes), file.name)

    def read_entries(self, name: str) -> dict[str, Entry]:
        """What the header of an open tensor file declares, by name. Raises what `read_safetensors` does."""
        self._files[name].seek(0)
        return read_entries(self._files[name])

    def read_tensors(self, name: str, *, mmap: bool = False) -> dict[str, np.ndarray]:
        """Tensors by name from an open file. Raises what `read_safetensors` does."""
        self._files[name].seek(0)
        return read_tensors(self._files[name], mmap)

    def _open(self, names: Sequence[str]) -> bool:
        """Opens all files through one descriptor; False if the folder was replaced before they were open."""
        try:
            folder_fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError as error:
            with contextlib.suppress(OSError), alone_in(os.path.dirname(os.path.realpath(self.path))):
                if recover(self.path):
                    return False
            raise FileProblem(f"{self.path}: there is no such folder; check the path") from error
        except (OSError, ValueError) as error:
            raise FileProblem(f"{self.path}: expected a model folder that can be read: {reason(error)}") from error
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, folder_fd)
            try:
                with contextlib.ExitStack() as opening:
                    found = [name for name in TOKENIZER_FILES if _is_there(name, folder_fd)]
                    self._files = {name: opening.enter_context(open_regular(self.path, name, folder_fd)) for name in (*names, *found)}
                    self._close = opening.pop_all().close
            except FileProblem:
                if _was_replaced(self.path, folder_fd):
                    return False
                raise
        return True


def _is_there(name: str, folder_fd: int) -> bool:
    try:
        os.stat(name, dir_fd=folder_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _was_replaced(folder: str, folder_fd: int) -> bool:
    try:
        return not os.path.samestat(os.stat(folder), os.fstat(folder_fd))
    except FileNotFoundError:
        return True
    except OSError:
        return False
