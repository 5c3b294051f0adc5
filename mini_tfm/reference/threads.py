"""The threads and the configuration of the NumPy twins: there is one thread of ours, whatever is asked for."""

from mini_tfm.reference import _checks
from mini_tfm.reference.types import Config

__all__ = ["get_num_threads", "set_num_threads", "show_config"]

_n_threads = 1


def set_num_threads(n: int) -> None:
    """Remembers n; the twins compute in the calling thread."""
    global _n_threads
    _n_threads = _checks.thread_count(n)


def get_num_threads() -> int:
    """The n last set, 1 at first."""
    return _n_threads


def show_config() -> Config:
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
