"""How a folder embeds texts: the modules of Sentence Transformers, and the same in a folder of our own.

    modules.json                          [{"path": "", "type": "...Transformer"}, {"path": "1_Pooling", "type": "...Pooling"}, ...]
    1_Pooling/config.json                 which outputs make the vector
    2_Dense/config.json, model.safetensors    a layer behind it
    sentence_bert_config.json             the most tokens of a text
    config_sentence_transformers.json     what is put before a text

In our `config.json` the field `pooling` says the same, and the tensors `pooling.N.weight` and `pooling.N.bias` are its layers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import pooling as ours
from ..errors import InvalidValue
from ..files.reading import open_regular, read_bytes
from ..files.strict_json import MAX_JSON_BYTES, encode_json, parse_json_strict
from ..files.writing import Buffers
from ..pooling import Dense, Pooling
from ..text.tokenizers import MAX_FILE_BYTES
from .safetensors import BFLOAT16, encode_safetensors, read_tensors, widen_bfloat16

MODULES = "modules.json"
TEXT_CONFIG, PROMPTS, TOKENIZER = "sentence_bert_config.json", "config_sentence_transformers.json", "tokenizer_config.json"
MOST_TOKENS = 1 << 20  # more than this means no limit
_MODES = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}
_FLAGS = {  # as files had it before `pooling_mode`, in the order in which several are put side by side
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS = {"Tanh": "tanh", "Identity": "identity", "ReLU": "relu"}


def read_pooling(folder: str) -> Pooling | None:
    """What a folder says of embedding; None where it says nothing. Raises FileProblem, InvalidValue with every fault of a file."""
    if not os.path.lexists(os.path.join(folder, MODULES)):
        return None
    where = os.path.join(folder, MODULES)
    modules = parse_json_strict(b'{"modules": ' + read_bytes(folder, MAX_JSON_BYTES, MODULES) + b"}", where)["modules"]
    if not isinstance(modules, list) or not all(
        isinstance(each, dict) and isinstance(each.get("type"), str) and _is_plain(each.get("path")) for each in modules
    ):
        raise InvalidValue(f"{where}: expected a list of modules, each with 'type' and 'path', a folder in this one")
    kinds = [each["type"].rpartition(".")[2] for each in modules]
    inner = kinds[2:-1] if kinds[-1:] == ["Normalize"] else kinds[2:]
    if kinds[:2] != ["Transformer", "Pooling"] or modules[0]["path"] or set(inner) - {"Dense"}:
        raise InvalidValue(
            f"{where}: expected Transformer in the folder itself, Pooling, Dense layers and Normalize, got {', '.join(kinds)}"
        )
    told = _json(folder, PROMPTS)
    prompts = told.get("prompts") or {}
    default = told.get("default_prompt_name")
    text = _json(folder, TEXT_CONFIG)
    most: Any = text.get("max_seq_length") or _json(folder, TOKENIZER).get("model_max_length")
    return Pooling(
        modes=_modes(folder, modules[1]["path"]),
        normalize=kinds[-1] == "Normalize",
        max_tokens=int(most) if type(most) in (int, float) and 1 <= most <= MOST_TOKENS else None,
        lowercase=text.get("do_lower_case") is True,
        prompts=prompts,
        default_prompt=default,
        dense=tuple(_dense(folder, each["path"]) for each, kind in zip(modules, kinds, strict=True) if kind == "Dense"),
    )


def files_of(pooling: Pooling, d_model: int) -> dict[str, dict[str, bytes | Buffers]]:
    """The files of Sentence Transformers by folder; "" is the model's own."""
    modes = [theirs for mode in pooling.modes for theirs, name in _MODES.items() if name == mode]
    flags: dict[str, Any] = {flag: name in modes for flag, name in _FLAGS.items()}
    if modes != [name for flag, name in _FLAGS.items() if flags[flag]]:  # an order that flags cannot tell
        flags = {"pooling_mode": modes}
    pool = {"word_embedding_dimension": d_model, **flags, "include_prompt": True}
    folders: dict[str, dict[str, bytes | Buffers]] = {"1_Pooling": {"config.json": encode_json(pool)}}
    kinds = ["Transformer", "Pooling"]
    for layer in pooling.dense:
        name = next(theirs for theirs, activation in _ACTIVATIONS.items() if activation == layer.activation)
        about = {"in_features": layer.weight.shape[0], "out_features": layer.weight.shape[1], "bias": layer.bias is not None}
        about["activation_function"] = f"torch.nn.modules.{'linear' if name == 'Identity' else 'activation'}.{name}"
        tensors = {"linear.weight": np.ascontiguousarray(layer.weight.T)}
        tensors |= {} if layer.bias is None else {"linear.bias": layer.bias}
        folder = folders[f"{len(kinds)}_Dense"] = {"config.json": encode_json(about)}
        folder["model.safetensors"] = encode_safetensors(tensors, {"format": "pt"})
        kinds.append("Dense")
    kinds += ["Normalize"] if pooling.normalize else []
    paths = ["", *(f"{i}_{kind}" for i, kind in enumerate(kinds) if i)]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(zip(paths, kinds, strict=True))
    ]
    folders[""] = {
        MODULES: json.dumps(modules, indent=2).encode() + b"\n",
        TEXT_CONFIG: encode_json({"max_seq_length": pooling.max_tokens, "do_lower_case": pooling.lowercase}),
        PROMPTS: encode_json({"prompts": dict(pooling.prompts), "default_prompt_name": pooling.default_prompt}),
    }
    return folders


def own_about(pooling: Pooling) -> dict[str, Any]:
    """The field `pooling` of our `config.json`."""
    return ours.to_dict(pooling)


def own_tensors(pooling: Pooling | None) -> dict[str, np.ndarray]:
    found = {}
    for number, layer in enumerate(pooling.dense if pooling is not None else ()):
        found[f"pooling.{number}.weight"] = layer.weight
        if layer.bias is not None:
            found[f"pooling.{number}.bias"] = layer.bias
    return found


def own_pooling(about: Any, tensors: Mapping[str, np.ndarray], where: str) -> Pooling | None:
    """What our `config.json` and tensors say. Raises InvalidValue naming the file `where`."""
    if about is None:
        return None
    try:
        given = dict(about)
        activations = given.pop("dense", [])
        dense = tuple(
            Dense(tensors[f"pooling.{i}.weight"], tensors.get(f"pooling.{i}.bias"), activation) for i, activation in enumerate(activations)
        )
        return Pooling(**{**given, "modes": tuple(given.get("modes", ())), "dense": dense})
    except (TypeError, ValueError, KeyError) as error:
        raise InvalidValue(f"{where}: field 'pooling': {error}") from error


def _modes(folder: str, module: str) -> tuple[str, ...]:
    name = os.path.join(module, "config.json")
    about, where = _json(folder, name), os.path.join(folder, name)
    given = about.get("pooling_mode")
    given = [given] if isinstance(given, str) else given
    if given is None:
        given = [name for flag, name in _FLAGS.items() if about.get(flag)] or ["mean"]
    if not isinstance(given, list) or not given or not all(isinstance(name, str) and name in _MODES for name in given):
        raise InvalidValue(f"{where}: field 'pooling_mode': {given!r:.80} is not supported, only {', '.join(_MODES)}")
    if about.get("include_prompt") is False:
        raise InvalidValue(f"{where}: field 'include_prompt': False is not supported, only True")
    return tuple(_MODES[name] for name in given)


def _dense(folder: str, module: str) -> Dense:
    name = os.path.join(module, "config.json")
    about, where = _json(folder, name), os.path.join(folder, name)
    kind = str(about.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
    faults = [] if kind in _ACTIVATIONS else [f"field 'activation_function': {kind!r:.80} is not supported, only {', '.join(_ACTIVATIONS)}"]
    if about.get("use_residual"):
        faults.append("field 'use_residual': True is not supported, only False")
    for field in ("module_input_name", "module_output_name"):
        if about.get(field) not in (None, "sentence_embedding"):
            faults.append(f"field {field!r}: {about[field]!r:.80} is not supported, only 'sentence_embedding'")
    if faults:
        raise InvalidValue(f"{where}: " + "; ".join(faults))
    with open_regular(folder, os.path.join(module, "model.safetensors")) as file:
        tensors = {name: _float32(array) for name, array in read_tensors(file, mmap=False).items()}
        if set(tensors) - {"linear.bias"} != {"linear.weight"} or tensors["linear.weight"].ndim != 2:
            raise InvalidValue(
                f"{file.name}: expected the tensors linear.weight (d_out, d_in) and linear.bias, found {sorted(tensors)[:5]}"
            )
    return Dense(np.ascontiguousarray(tensors["linear.weight"].T), tensors.get("linear.bias"), _ACTIVATIONS[kind])


def _float32(array: np.ndarray) -> np.ndarray:
    return widen_bfloat16(array) if array.dtype == BFLOAT16 else array.astype(np.float32, copy=False)


def _json(folder: str, name: str) -> dict[str, Any]:
    """A file's content, {} where there is no such file."""
    path = os.path.join(folder, name)
    return parse_json_strict(read_bytes(folder, MAX_FILE_BYTES, name), path) if os.path.lexists(path) else {}


def _is_plain(path: Any) -> bool:
    return isinstance(path, str) and (path == "" or (os.path.basename(path) == path and not path.startswith(".")))
