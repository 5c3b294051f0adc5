"""Transformer: the model as its user holds it. What it is made of is in model.py."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import _core, lora
from .autodiff import value_of
from .checkpoint import peft
from .checkpoint.folder import TENSORS_FILE
from .checkpoint.models import check_place, read_model, save_adapters, save_hugging_face, save_model
from .config import Config
from .errors import InvalidType, InvalidValue, shown
from .generate import GenerationOptions, generate
from .generate.limits import segment_limit, too_long
from .inside import Inside, inside
from .memory.base import Memory
from .memory.registry import memory_of_file
from .memory.run import memory_parameters
from .model import PACKED, Model, initial_weights
from .options import LARGEST, takes
from .pooling import Pooling
from .stream import Stream
from .text.tokenizers import Tokenizer
from .tokens import check_tokens


class Transformer(Model):
    """An encoder-decoder (or encoder-only, decoder-only) Transformer.

    config: the architecture. seed: of the initial weights, normal with standard deviation d_in ** -0.5.
    dtype: float32, or float64 where a test asks for it. weights: arrays by name, in place of initial ones. generation: options of
    `generate` that the model is made for, several `eos_token_id` say.
    """

    def __init__(
        self,
        config: Config,
        seed: int = 0,
        dtype: Any = np.float32,
        weights: dict[str, np.ndarray] | None = None,
        generation: Mapping[str, Any] | None = None,
    ):
        if not isinstance(config, Config):
            raise InvalidType(f"config: expected a Config, got {type(config).__name__}")
        if dtype not in (np.float32, np.float64, "float32", "float64"):
            raise InvalidType(f"dtype: expected float32 or float64, got {dtype}")
        _check_seed(seed)
        weights = initial_weights(config, seed, np.dtype(dtype)) if weights is None else weights
        super().__init__(config, weights, np.dtype(dtype), generation)

    def encode(self, tokens: Any, lengths: Any = None) -> np.ndarray:
        """(B, S) token ids, the first `lengths` (B,) of each row -> the encoder's outputs (B, S, d); 0 past the length."""
        self.needs("encoder")
        tokens, lengths = self._checked("tokens", tokens, lengths)
        stream = Stream(self, None, len(tokens))
        stream.open(tokens, lengths)
        assert stream.encoded is not None
        return np.where((np.arange(tokens.shape[1]) < lengths[:, None])[..., None], value_of(stream.encoded.hidden), 0)

    def logits(self, source: Any, target: Any, source_lengths: Any = None, target_lengths: Any = None) -> np.ndarray:
        """Teacher-forced scores (B, T, V): row t scores target[:, t], given the source and target[:, :t].

        The target is shifted inside: the decoder is fed `bos_id`, or the source's last token (`Config.continues_source`), and
        target[:, :-1]. source: (B, S) ids, or None for a decoder-only model. Such a model, if it was trained on segments, begins a
        new one every `Config.segment_length` tokens, as `Pipeline.score` and `generate` do: from the last token of the one before,
        and its positions anew.
        """
        self.needs("decoder")
        target, target_lengths = self._checked("target", target, target_lengths)
        lengths = target_lengths
        if self.config.has_encoder:
            source, lengths = self._checked("source", source, source_lengths)
            if len(source) != len(target):
                raise InvalidValue(f"target: expected {len(source)} sequences, as source has, got {len(target)}")
        elif source is not None:
            raise InvalidValue("source: expected None, because this model has no encoder")
        stream, found = Stream(self, None, len(target)), []
        whole = max(1, target.shape[1])
        length = (None if self.config.has_encoder else self.config.segment_length) or whole
        for start in range(0, whole, length):
            segment, here = target[:, start : start + length], np.clip(target_lengths - start, 0, length)
            stream.open(source, lengths if self.config.has_encoder else here)
            found.append(value_of(stream.logits(stream.decode(segment, here))))
            stream.finish()
        return np.concatenate(found, axis=1)

    def _checked(self, name: str, tokens: Any, lengths: Any) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and their lengths. Raises InvalidValue, InvalidType for what is none, and for more than the model reads at once."""
        array, lengths = check_tokens(name, tokens, self.config.vocab_size, lengths)
        limit = segment_limit(self.config, None)
        if limit is not None and array.shape[1] > limit:
            raise too_long(name, array.shape[1], limit, self.config)
        return array, lengths

    def score_targets(self, source: Any, target: Any, source_lengths: Any = None, target_lengths: Any = None) -> np.ndarray:
        """Log-probabilities (B, T) of given targets (B, T), each token given the source and those before it; 0 past the length.

        Their sum over a row is the log-probability of its target. Arguments: as of `logits`. An eos counts where the target has it.
        """
        logits = self.logits(source, target, source_lengths, target_lengths)
        target, lengths = check_tokens("target", target, self.config.vocab_size, target_lengths)
        found = np.take_along_axis(_core.log_softmax(logits), target[..., None], 2)[..., 0]
        return np.where(np.arange(target.shape[1]) < lengths[:, None], found, found.dtype.type(0))

    def look_inside(self, source: Any = None, inputs: Any = None, source_lengths: Any = None, input_lengths: Any = None) -> Inside:
        """The attention weights and the states between the layers of one pass, see `Inside`, to look at small examples.

        source: (B, S) ids that the encoder reads; inputs: (B, T) ids that the decoder is fed, bos included, each row from its
        beginning. None where the model has no such stack; of an encoder-decoder inputs may be left out.
        """
        config, encoder, decoder = self.config, self.config.has_encoder, self.config.has_decoder
        if (source is None) == encoder or (inputs is not None and not decoder) or (inputs is None and not encoder):
            wanted = " and ".join(name for name, has in (("source", encoder), ("inputs", decoder)) if has)
            got = " and ".join(name for name, given in (("source", source), ("inputs", inputs)) if given is not None)
            raise InvalidValue(f"source, inputs: expected {wanted} for this model, got {got or 'neither'}")
        if source is not None:
            source, source_lengths = self._checked("source", source, source_lengths)
        if inputs is not None:
            inputs, input_lengths = self._checked("inputs", inputs, input_lengths)
            if source is not None and len(source) != len(inputs):
                raise InvalidValue(f"inputs: expected {len(source)} sequences, as source has, got {len(inputs)}")
            if config.segment_length is not None and inputs.shape[1] > config.segment_length:
                raise InvalidValue(
                    f"inputs: expected at most segment_length = {config.segment_length} tokens, for positions begin anew behind them, got"
                    f" {inputs.shape[1]}"
                )
        return inside(self, source, source_lengths, inputs, input_lengths)

    @takes(GenerationOptions)
    def generate(
        self, source: Any = None, lengths: Any = None, *, encoder_outputs: Any = None, batch_tokens: int | None = None, **options: Any
    ) -> Any:
        """Token ids (B lists) for source (B, S): see `mini_tfm.generate.generate` for the arguments and options."""
        return generate(self, source, lengths, encoder_outputs=encoder_outputs, batch_tokens=batch_tokens, **options)

    def save(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors into `folder`; what it held before stays until all is written.

        A model that was saved there before is replaced. Raises FileProblem for a folder of something else.
        A packed model is written as it is kept, whatever the instruction set: smaller, and loaded sooner.
        """
        check_place(folder)
        save_model(folder, self)

    def save_hugging_face(self, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
        """Writes the model as a folder that Transformers reads, the tokenizer's files beside it, adapters merged into the weights.

        Raises InvalidValue where no published family has such models, or a memory has trained parameters in it.
        """
        save_hugging_face(folder, self, tokenizer=tokenizer)

    def add_lora(self, rank: int = 8, alpha: float = 16, targets: Any = None, seed: int = 0) -> None:
        """Puts new LoRA adapters (arXiv 2106.09685) beside linear layers. They add nothing yet; a `Trainer` made now trains them.

        rank: r, the rows of A (r, d_in) and columns of B (d_out, r). alpha: what B A counts for is alpha / r. targets: ends of layers'
        names, ours (`list(model.weights)`) or those of the model's family, such as ("q_proj", "v_proj"); a regular expression that
        whole names match; "all-linear"; None: q and v of every attention. seed: of A, uniform from -1 to 1 over the root of d_in.
        A trained adapter may have dropout: `Trainer(lora_dropout=...)`. Raises InvalidValue, InvalidType naming the argument at fault.
        """
        lora.check_none(self)
        rank, scale = lora.checked_scale(rank, alpha)
        _check_seed(seed)
        names = peft.layer_names(self.config)
        lora.add_adapters(self, lora.chosen_layers(self.config, targets, names), rank, scale, int(seed))

    def load_lora(self, folder: str | os.PathLike) -> None:
        """Puts the adapters of a folder that PEFT or `save_lora` wrote beside the model's layers.

        Raises FileProblem or InvalidValue naming the file, and every field and tensor at fault; the model is as it was then.
        """
        lora.check_none(self)
        self.weights.update(peft.read_adapters(folder, self.config, self.dtype))

    def save_lora(self, folder: str | os.PathLike) -> None:
        """Writes the adapters, and nothing else of the model, as a folder that PEFT reads.

        Raises InvalidValue where there are none, no published family has such models, or a memory has trained parameters in it.
        """
        save_adapters(folder, self)

    def merge_lora(self) -> None:
        """Adds the adapters to the weights beside them: W + alpha / r (B A)^T. The model computes what it did, bit for bit.

        A model without adapters stays as it is, packed or not. Adapters are never beside packed weights: merge them, then pack.
        """
        lora.merge(self)


def _check_seed(seed: Any) -> None:
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or not 0 <= seed <= LARGEST:
        raise InvalidValue(f"seed: expected an integer of at least 0 and at most 128 bits, got {shown(seed)}")


@dataclass(frozen=True)
class Checkpoint:
    """A loaded folder: the model, its tokenizer if it has one, the text of the memory it was trained with, how it embeds texts."""

    model: Transformer
    tokenizer: Tokenizer | None
    memory_text: str | None
    folder: str = ""
    pooling: Pooling | None = None

    def memory(self) -> Memory | None:
        """That memory, made again. Raises InvalidValue for one that would import a plugin or open a file (see `memory_of_file`), or
        whose trained parameters are not in the folder."""
        if not self.memory_text:
            return None
        made = memory_of_file(self.memory_text, self.folder)
        for name in memory_parameters(made, self.model.config, self.model.dtype):
            if name not in self.model.weights:
                raise InvalidValue(
                    f"{self.folder}: names the memory {self.memory_text!r}, whose parameter {name!r} is not in it; to go on with one that"
                    f" is not trained, ask for it: memory={self.memory_text!r}"
                )
        return made


def load_checkpoint(folder: str | os.PathLike, dtype: str | None = None) -> Checkpoint:
    """All that a model folder holds. dtype: None is what the folder has, packed or float32.

    Raises FileProblem or InvalidValue naming the file, field or tensor at fault.
    """
    if dtype not in (None, "float32", "float64", *PACKED):
        raise InvalidValue(f"dtype: expected 'float32', {', '.join(map(repr, PACKED))}, or 'float64' for checks, got {shown(dtype)}")
    kept_in = "float64" if dtype == "float64" else "float32"
    contents = read_model(folder, kept_in)
    if contents.packed is not None and dtype not in (None, contents.packed):
        raise InvalidValue(
            f"dtype: expected {contents.packed!r} or None, for {os.fspath(folder)} is packed in it and what was rounded is gone, got"
            f" {dtype!r}; load the model that it was packed from"
        )
    model = Transformer(contents.config, dtype=kept_in, weights=contents.weights, generation=contents.generation)
    if contents.packed is not None:
        try:
            model.restore(contents.kept)
        except InvalidValue as error:
            raise InvalidValue(f"{os.path.join(folder, TENSORS_FILE)}: {error}; the file is damaged") from error
    elif dtype in PACKED:
        model.pack(dtype)
    return Checkpoint(model, contents.tokenizer, contents.memory_text, os.fspath(folder), contents.pooling)


def load(folder: str | os.PathLike, dtype: str | None = None) -> Transformer:
    """The model of a folder, ours (see `Transformer.save`), Hugging Face's or Marian's, of a GGUF file, or of a name on the Hub.

    dtype: "float32"; "bfloat16" or "int8", to answer in less RAM and time, see `Transformer.pack`; None: float32, or what a folder
    that a packed model was saved in has, which has no other.
    """
    return load_checkpoint(folder, dtype).model
