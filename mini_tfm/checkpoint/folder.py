"""A model folder of our own: `config.json` and `model.safetensors`, read as one and written as one."""

import contextlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from mini_tfm.errors import FileProblem, InvalidValue
from mini_tfm.files.folders import alone_in, recover, write_folder
from mini_tfm.files.reading import as_path, open_regular, read_all, reason
from mini_tfm.files.strict_json import MAX_JSON_BYTES, encode_json, parse_json_strict
from mini_tfm.files.writing import Buffers

from .safetensors import encode_safetensors, read_tensors

CONFIG_FILE = "config.json"
TENSORS_FILE = "model.safetensors"


def save_folder(
    folder: str | os.PathLike,
    config: dict[str, Any],
    tensors: Mapping[str, np.ndarray],
    extra_files: Mapping[str, bytes | Buffers] | None = None,
) -> None:
    """Write a model folder: `config.json`, `model.safetensors` and `extra_files` (plain name -> content).

    The same arguments give the same bytes. Whatever else the folder held is kept. Raises what `write_folder` and
    `encode_safetensors` raise, and InvalidValue when `config` is not plain, finite JSON with text keys.
    """
    files = dict(extra_files or {})
    for name in (CONFIG_FILE, TENSORS_FILE):
        if name in files:
            raise InvalidValue(f"extra_files: {name!r} is written from the other arguments; choose another name")
    write_folder(folder, files | {CONFIG_FILE: encode_json(config), TENSORS_FILE: encode_safetensors(tensors)})


def load_folder(folder: str | os.PathLike, *, mmap: bool = False) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read a folder written by `save_folder` -> (config, tensors by name).

    Tensors are fresh arrays, or with `mmap` read-only views of the mapped file (those that the file does not align
    are copied). A save that replaces the folder meanwhile does not disturb either: the answer is all old or all new.
    Raises FileProblem when something is missing, unreadable or a link, InvalidValue when a content is refused.
    """
    folder = as_path(folder)
    while True:
        try:
            folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError as error:
            with contextlib.suppress(OSError), alone_in(os.path.dirname(os.path.realpath(folder))):
                if recover(folder):
                    continue
            raise FileProblem(f"{folder}: there is no such folder; check the path") from error
        except (OSError, ValueError) as error:
            raise FileProblem(f"{folder}: expected a model folder that can be read: {reason(error)}") from error
        # Both files are opened through one descriptor: by path, a save in between would pair an old
        # configuration with new tensors.
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, folder_fd)
            try:
                config_file = stack.enter_context(open_regular(folder, CONFIG_FILE, folder_fd))
                tensors_file = stack.enter_context(open_regular(folder, TENSORS_FILE, folder_fd))
            except FileProblem:
                if _was_replaced(folder, folder_fd):
                    continue
                raise
            config = parse_json_strict(read_all(config_file, MAX_JSON_BYTES), config_file.name)
            return config, read_tensors(tensors_file, mmap)


def _was_replaced(folder: str, folder_fd: int) -> bool:
    try:
        return not os.path.samestat(os.stat(folder), os.fstat(folder_fd))
    except FileNotFoundError:
        return True
    except OSError:
        return False
