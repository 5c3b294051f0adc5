import numpy as np
from my_memory import MyMemory

from mini_tfm.testing import check_memory


def test_it_keeps_the_contract():
    check_memory("my_memory:size=8,every=3")


def test_old_rows_are_kept_sparsely():
    memory = MyMemory(size=6, every=4)
    priorities = memory.keep(None, np.arange(16)[None])[0]
    assert sorted(np.argsort(-priorities, kind="stable")[:6].tolist()) == [4, 8, 12, 13, 14, 15]
