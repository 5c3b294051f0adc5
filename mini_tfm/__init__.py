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
    return getattr(import_module("." + _WHERE[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """`mt.attention` is the kernel, whatever imports the module of that name: a submodule becomes an attribute of its package."""

    @property
    def attention(self) -> Any:
        return import_module(".kernels", __name__).attention

    @attention.setter
    def attention(self, submodule: ModuleType) -> None:
        pass


sys.modules[__name__].__class__ = _Package
