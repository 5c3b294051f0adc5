"""The threads and the configuration of the NumPy twins: there is one thread of ours, whatever is asked for."""

from mini_tfm.reference import _checks

_n_threads = 1


def set_num_threads(n):
    """Remembers n; the twins compute in the calling thread."""
    global _n_threads
    _n_threads = _checks.thread_count(n)


def get_num_threads():
    """The n last set, 1 at first."""
    return _n_threads


def show_config():
    """What computes: a dict with the keys of the compiled layer's."""
    return {
        "isa": "reference",
        "isas": ["reference"],
        "isas_built": ["reference"],
        "emulated": [],
        "openmp": False,
        "num_threads": _n_threads,
        "compiler": None,
    }
