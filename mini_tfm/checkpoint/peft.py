"""Folders of LoRA adapters as PEFT has them: `adapter_config.json` and `adapter_model.safetensors`.

A folder is read after all of it was compared with the model: PEFT's fields that change what an adapter computes are read or refused by
name, and the file's header must declare what `target_modules` ask for. `lora_dropout` belongs to training, and is not read.

GPT-2 has q, k and v in one layer, `c_attn`, and so one adapter, B A, beside it. Here each of the three has its own: A, and its part of B.
Trained, their A differ. Then the file has them one under the other, and B beside each other on its diagonal: a larger rank, the same sum.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..config import Config
from ..errors import FileProblem, InvalidValue, shown
from ..files.reading import as_path, open_regular, read_bytes
from ..files.strict_json import MAX_JSON_BYTES, encode_json, parse_json_strict
from ..files.writing import Buffers
from ..lora import ALL_LINEAR, MAX_RANK, adapted_layers, adapter_shapes, linear_layers
from ..weights import LORA, LORA_SCALE
from .families import family_for, sources
from .families.fields import Fields
from .safetensors import Entry, encode_safetensors, read_entries, read_tensors

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_READ = ("peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "bias", "fan_in_fan_out", "init_lora_weights")
# What says nothing of what an adapter computes, or says it only beside a field that is refused.
_IGNORED = (
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout"),
    *("megatron_core", "qalora_group_size", "runtime_config"),
)


def layer_names(config: Config) -> dict[str, str]:
    """What the model's family calls the layers that adapters are for, by our names; {} where it has none, or no such layers."""
    try:
        names = _Names(config)
    except InvalidValue:
        return {}
    return {layer: names.prefix + theirs for layer, theirs in names.layers.items()}


def places_of(config: Config, given: Iterable[str]) -> dict[str, str]:
    """Our names of adapters' weights, and those of `given` tensors that hold them; what is no adapter of such a model is left out."""
    return _Names(config).places(given)


def files_of(config: Config, weights: Mapping[str, np.ndarray]) -> dict[str, bytes | Buffers]:
    """The files of a model's adapters. Raises InvalidValue where it has none, or no published family has such a model."""
    names, layers = _Names(config), adapted_layers(weights)
    if not layers:
        raise InvalidValue("model: has no adapters to save; add_lora() or load_lora(folder) puts some beside its layers")
    tensors = names.fused({f"{layer}.{part}": np.asarray(weights[f"{LORA}{layer}.{part}"]) for layer in layers for part in "ab"})
    rank = max(len(tensor) for name, tensor in tensors.items() if ".lora_A." in name)
    alpha = float(weights[LORA_SCALE][0]) * rank
    about = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION" if not config.has_decoder else "SEQ_2_SEQ_LM" if config.has_encoder else "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-6) else alpha,  # the scale is rounded
        "lora_dropout": 0.0,
        "target_modules": names.targets(layers),
        "bias": "none",
        "fan_in_fan_out": names.is_conv,
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    tensors = {name: _of_rank(rank, tensor, ".lora_A." in name) for name, tensor in tensors.items()}
    return {CONFIG: encode_json(about), WEIGHTS: encode_safetensors(tensors, {"format": "pt"})}


def read_adapters(folder: str | os.PathLike, config: Config, dtype: Any) -> dict[str, np.ndarray]:
    """A folder's adapters by our names. Raises FileProblem or InvalidValue naming the file, and every field and tensor at fault."""
    path, names = as_path(folder), _Names(config)
    where = os.path.join(path, CONFIG)
    rank, scale, wanted = _read_config(parse_json_strict(read_bytes(path, MAX_JSON_BYTES, CONFIG), where), where, names)
    if not os.path.lexists(os.path.join(path, WEIGHTS)) and os.path.lexists(os.path.join(path, PICKLE)):
        raise FileProblem(
            f"{path}: has no {WEIGHTS}, only {PICKLE}, which can run code when it is read and is never opened here; save the adapter again"
            " as safetensors: peft's `save_pretrained` does"
        )
    with open_regular(path, WEIGHTS) as file:
        places = _checked_places(read_entries(file), file.name, names, rank, wanted)
        file.seek(0)
        tensors = read_tensors(file, mmap=False)
    found = {ours: names.part_of(ours, sources.Source(theirs).read(tensors[theirs])).astype(dtype) for ours, theirs in places.items()}
    return {LORA_SCALE: np.full(1, scale, dtype), **found}


class _Names:
    """What a model's family calls the layers that adapters are for. Raises InvalidValue where no published family has such a model.

    layers: their names, without the prefix, by ours. parts: of layers that are a part of theirs, which of its outputs they have. is_conv:
    whether theirs lie the other way round, as Transformers' Conv1D.
    """

    def __init__(self, config: Config):
        self.config, self.family = config, family_for(config)
        self.prefix, table = self.family.PREFIXES[0], self.family.sources(config)
        found = {layer: table[layer + ".weight"] for layer in linear_layers(config)}
        self.layers = {layer: source.name.removesuffix(".weight") for layer, source in found.items()}
        self.parts = {layer: source.part for layer, source in found.items() if source.part is not None}
        self.is_conv = not all(source.transposed for source in found.values())
        self.beside: dict[str, list[str]] = {}  # ours, in their order, by theirs
        for layer, theirs in self.layers.items():
            self.beside.setdefault(theirs, []).append(layer)
        # Weights of their models that an encoder does without, such as BERT's pooler: adapters beside these may be there. A decoder's
        # tables call its output layer unused where it is tied; an adapter beside that one would count.
        unused = "|".join(f"(?:{pattern})" for pattern in self.family.UNUSED) if not config.has_decoder else r"(?!)"
        self._unused = re.compile(unused)

    def tensor(self, layer: str, part: str) -> str:
        """The tensor of a layer's "a" or "b"."""
        return f"base_model.model.{self.prefix}{self.layers[layer]}.lora_{part.upper()}.weight"

    def part_of(self, name: str, tensor: np.ndarray) -> np.ndarray:
        """Of a tensor of theirs, the adapter's weight of ours with this name."""
        part = self.parts.get(name.removeprefix(LORA)[:-2])
        return tensor if part is None or name.endswith(".a") else tensor[slice(*part)]

    def whole(self, layer: str, d_out: int) -> int:
        """d_out of the layer of theirs that has ours."""
        return max((self.parts[one][1] for one in self.beside[self.layers[layer]] if one in self.parts), default=d_out)

    def fused(self, adapters: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Their tensors of our adapters' weights, `<layer>.a` and `<layer>.b`."""
        found: dict[str, np.ndarray] = {}
        for layers in self.beside.values():
            there = [layer for layer in layers if f"{layer}.a" in adapters]
            if not there:
                continue
            a, b = ([adapters[f"{layer}.{part}"] for layer in there] for part in "ab")
            if len(layers) > 1:
                is_shared = all(np.array_equal(a[0], one) for one in a)
                rank, whole = len(a[0]), np.zeros((self.whole(there[0], 0), len(a[0]) * (1 if is_shared else len(a))), b[0].dtype)
                for n, (layer, one) in enumerate(zip(there, b, strict=True)):
                    first = 0 if is_shared else n * rank
                    whole[slice(*self.parts[layer]), first : first + rank] = one
                a, b = [a[0] if is_shared else np.concatenate(a)], [whole]
            found |= {self.tensor(there[0], "a"): a[0], self.tensor(there[0], "b"): b[0]}
        return found

    def places(self, given: Iterable[str]) -> dict[str, str]:
        """See `places_of`."""
        matches = {name: match for name in given if (match := _TENSOR.fullmatch(name))}
        short = sources.prefixed(self.family, [match[1] for match in matches.values()])
        return {
            f"{LORA}{layer}.{match[2].lower()}": name for name, match in matches.items() for layer in self.beside.get(short[match[1]], ())
        }

    def is_unused(self, name: str) -> bool:
        """Whether a tensor is of an adapter beside a weight that the model does without."""
        match = _TENSOR.fullmatch(name)
        return match is not None and any(
            self._unused.fullmatch(match[1].removeprefix(prefix) + ".weight") is not None for prefix in self.family.PREFIXES
        )

    def meant(self, target: str) -> set[str] | None:
        """Our names of the layers that one of `target_modules` means; None where it means nothing in this model."""
        fitting = {layer for layer, name in self.layers.items() if _ends_with(self.prefix + name, target)}
        return fitting if fitting or self._unused.fullmatch(target + ".weight") else None

    def targets(self, layers: Iterable[str]) -> list[str]:
        """What `target_modules` have to say to mean these layers: the ends of names behind the layer's number or, where these would
        mean others, too, whole names.

        The last part alone may mean layers that we do not have: `dense` is BERT's pooler as well.
        """
        layers = {one for layer in layers for one in self.beside[self.layers[layer]]}
        ends = sorted({re.sub(r".*\.\d+\.", "", self.layers[layer]) for layer in layers})
        meant = {layer for layer, name in self.layers.items() if any(_ends_with(name, end) for end in ends)}
        return ends if meant == layers else sorted({self.layers[layer] for layer in layers})


def _of_rank(rank: int, tensor: np.ndarray, is_a: bool) -> np.ndarray:
    """An adapter's A (r, d_in) or B (d_out, r), with zeros up to a larger rank: PEFT has one for all."""
    missing = rank - tensor.shape[0 if is_a else 1]
    return np.pad(tensor, [(0, missing), (0, 0)] if is_a else [(0, 0), (0, missing)]) if missing else tensor


def _ends_with(name: str, target: str) -> bool:
    """Whether PEFT takes a layer of this name for one of `target`."""
    return f".{name}".endswith(f".{target}")


def _read_config(about: Mapping[str, Any], where: str, names: _Names) -> tuple[int, float, set[str]]:
    """Rank, scale, and the layers that there must be: all that `target_modules` name, none where it is a regular expression.

    Such an expression is a stranger's, and is not run: the tensors there are say the same.
    """
    f = Fields(about, where)
    if about.get("peft_type") != "LORA":
        f.faults.append(f"field 'peft_type': {shown(about.get('peft_type'))} is not supported, only 'LORA'")
    if "lora_alpha" not in f:
        f.faults.append("field 'lora_alpha' is missing")
    rank, alpha = f.integer("r", least=1, most=MAX_RANK), f.positive("lora_alpha", 1.0)
    scale = alpha / (math.sqrt(rank) if f.flag("use_rslora", False) else rank)  # arXiv 2312.03732
    f.only("bias", "none")
    f.only("fan_in_fan_out", False, names.is_conv, why="layers like PyTorch's Linear")
    f.only("init_lora_weights", True, False, "gaussian", "orthogonal", why="others may change the weights beside the adapter")
    for name, value in about.items():
        if name not in (*_READ, *_IGNORED) and value not in (None, False, 0, "", [], {}):
            f.faults.append(f"field {shown(name)}: {shown(value)} is not supported")
    wanted, targets = set(), about.get("target_modules")
    if isinstance(targets, list) and targets and all(isinstance(one, str) and one for one in targets):
        for target in dict.fromkeys(targets):
            if (meant := names.meant(target)) is None:
                f.faults.append(f"field 'target_modules': {shown(target)} fits no layer of this model that an adapter can be beside")
            wanted |= meant or set()
    elif targets == ALL_LINEAR:
        wanted = set(names.layers)
    elif not isinstance(targets, str) or not targets:
        f.faults.append(f"field 'target_modules': expected names or a regular expression, got {shown(targets)}")
    if f.faults:
        more = f"; and {len(f.faults) - 20} more" if len(f.faults) > 20 else ""
        raise InvalidValue(f"{where}: " + "; ".join(f.faults[:20]) + more)
    return rank, scale, wanted


def _checked_places(entries: Mapping[str, Entry], where: str, names: _Names, rank: int, wanted: set[str]) -> dict[str, str]:
    """The names of a file's tensors by ours. Raises InvalidValue naming every tensor missing, too much or of another shape."""
    places = names.places(entries)
    needless = entries.keys() - places.values()
    faults = [f"tensor {name!r} is no adapter of a layer of this model" for name in sorted(needless) if not names.is_unused(name)]
    layers = linear_layers(names.config)
    present = {name.removeprefix(LORA)[:-2] for name in places} | wanted
    expected = adapter_shapes({layer: shape for layer, shape in layers.items() if layer in present}, rank)
    del expected[LORA_SCALE]
    for ours, shape in expected.items():
        if ours.endswith(".b"):
            shape = (names.whole(ours.removeprefix(LORA)[:-2], shape[0]), rank)
        entry = entries.get(places.get(ours, ""))
        if entry is None:
            faults.append(f"tensor {names.tensor(ours.removeprefix(LORA)[:-2], ours[-1])!r} is missing")
        elif entry.shape != shape:
            faults.append(f"tensor {entry.name!r}: expected shape {shape}, got {entry.shape}")
        elif entry.dtype not in sources.READABLE:
            faults.append(f"tensor {entry.name!r}: expected float32, float16 or bfloat16, got {entry.dtype}")
    if not expected and not faults:
        faults.append("holds no adapter of a layer of this model")
    if faults:
        more = f"; and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise InvalidValue(f"{where}: " + "; ".join(faults[:20]) + more)
    return places
