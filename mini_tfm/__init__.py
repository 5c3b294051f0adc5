"""mini_tfm: the minimal Transformer whose memory is a plugin.

    import mini_tfm as mt

The names below are imported when first used, so that `import mini_tfm` costs next to nothing.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "attention": "kernels",
    "softmax": "kernels",
    "sinusoidal_positions": "kernels",
    "set_num_threads": "kernels",
    "get_num_threads": "kernels",
    "show_config": "kernels",
    "Config": "config",
    "Transformer": "transformer",
    "load": "transformer",
    "memory": "memory.registry",
    "list_memories": "memory.registry",
    "register_memory": "memory.registry",
    "Pipeline": "pipeline",
    "Trainer": "train",
    "MiniTfmError": "errors",
}

__all__ = [
    "Config",
    "MiniTfmError",
    "Pipeline",
    "Trainer",
    "Transformer",
    "__version__",
    "attention",
    "get_num_threads",
    "list_memories",
    "load",
    "memory",
    "register_memory",
    "set_num_threads",
    "show_config",
    "sinusoidal_positions",
    "softmax",
]

if TYPE_CHECKING:
    from .config import Config
    from .errors import MiniTfmError
    from .kernels import attention, get_num_threads, set_num_threads, show_config, sinusoidal_positions, softmax
    from .memory.registry import list_memories, memory, register_memory
    from .pipeline import Pipeline
    from .train import Trainer
    from .transformer import Transformer, load


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'mini_tfm' has no attribute {name!r}")
    if name == "memory":  # the package itself, which can be called: see memory/__init__.py
        return import_module(".memory", __name__)
    found = globals()[name] = getattr(import_module("." + _WHERE[name], __name__), name)
    return found


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Where a public name is a module's as well (`mt.attention`, attention.py), it stays what it is when that is imported.

    Python makes a submodule an attribute of its package.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "attention" or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
