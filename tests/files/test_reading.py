"""Files that are read, or mapped, in place."""

import numpy as np

from mini_tfm.files.reading import forget_pages, mapped


def test_pages_that_are_given_back_are_read_again(tmp_path):
    (tmp_path / "numbers").write_bytes(np.arange(5000, dtype=np.int64).tobytes())
    _, content = mapped(tmp_path / "numbers")
    array = np.frombuffer(content, np.int64)[10:].reshape(2, -1).T
    forget_pages(array)
    np.testing.assert_array_equal(array.T.ravel(), np.arange(10, 5000))
    alone = np.arange(5)
    forget_pages(alone)
    assert alone.tolist() == [0, 1, 2, 3, 4]
