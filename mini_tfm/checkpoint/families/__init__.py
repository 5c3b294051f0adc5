"""Families of checkpoints, one file each: how a folder's `config.json` becomes a Config, and its tensors our weights.

    own.py                              our format
    t5.py bart.py bert.py gpt2.py llama.py   published models: `config_of`, a table of names, `about_of` for the way back
    marian_binary.py                    Marian's own files, which are read and not written
      -> fields.py                      reads their fields; all that is wrong or unsupported is told at once
      -> sources.py                     reads and writes tensors by such a table

A family is a module with the functions of `Family` or, where it is somebody else's, of `Published`. To add one, write it and
name it in PUBLISHED. Nothing else in the library knows that there is more than one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Protocol

from ...config import Config
from ...errors import InvalidValue
from . import bart, bert, gpt2, llama, sources, t5


class Published(sources.Table, Protocol):
    """What a module of a published family offers."""

    @property
    def TYPES(self) -> Collection[str]:
        """Values of `model_type`."""

    def recognises(self, about: Mapping[str, Any]) -> bool:
        """Whether a `config.json` is one of this family."""

    def config_of(self, about: Mapping[str, Any], where: str, names: Collection[str]) -> Config:
        """The architecture, of a file with tensors of these names. Raises InvalidValue naming the file and every field at fault."""

    def about_of(self, config: Config) -> dict[str, Any]:
        """The `config.json` of an architecture that this family has."""


PUBLISHED: tuple[Published, ...] = (t5, bart, bert, gpt2, llama)


def family_of(about: Mapping[str, Any], where: str) -> Published:
    """The published family of a `config.json`, whose path is `where`. Raises InvalidValue where there is none."""
    if isinstance(about.get("model_type"), str):
        for family in PUBLISHED:
            if family.recognises(about):
                return family
    known = ", ".join(sorted(name for family in PUBLISHED for name in family.TYPES))
    raise InvalidValue(f"{where}: field 'model_type': {about.get('model_type')!r:.80} is not supported; these are: {known}")


def family_for(config: Config) -> Published:
    """The published family that has such models. Raises InvalidValue where none has."""
    for family in PUBLISHED:
        about = _about_or_none(family, config)
        if about is not None:
            names = [] if config.tie_embeddings else ["lm_head.weight"]
            try:
                again = family.config_of(about, "", names)
            except InvalidValue:
                continue
            if _is_same(again, config.replace(segment_length=None, framed_by_tokenizer=True)):
                return family
    raise InvalidValue("model: no published family has models of this architecture; `model.save(folder)` keeps it in our own format")


def _is_same(read: Config, config: Config) -> bool:
    """Whether all fields are equal; the scale of attention, which some families compute from others, but for rounding."""
    assert read.attention_scale and config.attention_scale  # filled in by Config
    is_close = math.isclose(read.attention_scale, config.attention_scale, rel_tol=1e-12)
    return is_close and read.replace(attention_scale=config.attention_scale) == config


def _about_or_none(family: Published, config: Config) -> dict[str, Any] | None:
    try:
        return family.about_of(config)
    except (StopIteration, IndexError, KeyError, TypeError):
        return None
