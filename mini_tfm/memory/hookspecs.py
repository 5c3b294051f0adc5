"""The hook. A plugin is a module with one function marked by `hookimpl`, named by an entry point:

    [project.entry-points.mini_tfm]
    my_memory = "my_package.my_module"

    from mini_tfm.memory import Memory, hookimpl

    class MyMemory(Memory): ...

    @hookimpl
    def register_memories(register):
        register("my_memory", MyMemory)

Name the entry point after the strategy: it is found by that name, without importing anyone else's plugin. A module with several
strategies has an entry point for each.
"""

from collections.abc import Callable

import pluggy

ENTRY_POINT_GROUP = "mini_tfm"

hookspec = pluggy.HookspecMarker("mini_tfm")
hookimpl = pluggy.HookimplMarker("mini_tfm")


@hookspec
def register_memories(register: Callable) -> None:
    """Call `register(name, factory)` once for each strategy; `factory(**options)` makes a `Memory`."""
