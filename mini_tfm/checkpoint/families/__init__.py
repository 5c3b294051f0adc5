"""Families of checkpoints, one file each: how a folder's `config.json` becomes a Config, and its tensors our weights.

A family is a module with the three functions of `Family`; to add one, write it and name it in FAMILIES. Nothing else in the
library knows that there is more than one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from ...config import Config
from ...errors import InvalidValue, shown
from ..safetensors import Entry
from . import own


class Family(Protocol):
    """What a module of this package offers."""

    __name__: str

    def recognises(self, about: Mapping[str, Any]) -> bool:
        """Whether a `config.json` is one of this family."""

    def config_of(self, about: Mapping[str, Any], where: str) -> Config:
        """The architecture. Raises InvalidValue naming the file `where` and every field at fault."""

    def check_tensors(self, config: Config, entries: Mapping[str, Entry], where: str) -> None:
        """Before a tensor is read: raises InvalidValue naming the file `where` and what is missing, too much, or of another shape."""

    def weights_of(self, config: Config, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The tensors by our names and in our layout, all that `weight_shapes(config)` lists."""


FAMILIES: tuple[Family, ...] = (own,)


def family_of(about: Mapping[str, Any], where: str) -> Family:
    """The family of a `config.json`, whose path is `where`. Raises InvalidValue where there is none."""
    for family in FAMILIES:
        if family.recognises(about):
            return family
    raise InvalidValue(
        f"{where}: field 'format': expected {own.FORMAT!r}, got {shown(about.get('format'))}; only folders saved by mini_tfm can be loaded"
    )
