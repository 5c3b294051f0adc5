"""What the tests of folders and of tensor files share: a config, tensors of several types, comparisons."""

from pathlib import Path

import numpy as np

from mini_tfm.checkpoint.folder import CONFIG_FILE, TENSORS_FILE, OpenFolder

CONFIG = {"d_model": 8, "name": "é", "nested": {"list": [1, 2.5, None, True]}}
TENSORS = {
    "w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array([True, False, True]),
    "scalar": np.array(3.0),
    "empty": np.zeros((0, 4), np.int64),
}


def load_folder(folder, *, mmap=False):
    """(config, tensors by name) of a folder, of one save."""
    with OpenFolder(folder) as opened:
        return opened.read_json(CONFIG_FILE), opened.read_tensors(TENSORS_FILE, mmap=mmap)


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return found.keys() == expected.keys() and all(
        (found[name].dtype, found[name].shape) == (expected[name].dtype, expected[name].shape)
        and found[name].tobytes() == expected[name].tobytes()
        for name in expected
    )


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
