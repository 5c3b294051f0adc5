"""`mini-tfm quantize`: writes a model packed in int8 or bfloat16."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import InvalidValue
from .shared import check_new, count, json_option, lora_option, print_json, size


@click.command(short_help="Write a model packed in int8 or bfloat16.")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--dtype", type=click.Choice(["int8", "bfloat16"]), default="int8", show_default=True, help="What the model's matrices are kept in."
)
@lora_option
@json_option
def quantize(model: Path, out: Path, dtype: str, lora: Path | None, as_json: bool) -> None:
    """Writes MODEL, a folder, a file (GGUF or Marian's) or a name on the Hub, packed into the new folder OUT.

    A matrix takes 1 byte a number in int8, 2 bytes in bfloat16, and the table of tokens 4. OUT loads sooner, and answers with the
    bits that MODEL has with the same --dtype. Every command takes it, but it cannot be trained. LoRA adapters are merged into the
    weights first. Tokenizer, memory and what MODEL says of generation and of embedding go with it.

    \b
    Examples:
      mini-tfm quantize my-model my-model-int8
      mini-tfm quantize smollm2 smollm2-int8
    """
    from ..checkpoint.models import save_model
    from ..transformer import load_checkpoint

    check_new(out)
    saved = load_checkpoint(model)
    if saved.model.precision is not None:
        raise InvalidValue(f"MODEL: {model} is packed in {saved.model.precision} already; give the model that it was packed from")
    if lora is not None:
        saved.model.load_lora(lora)
    saved.model.merge_lora()
    saved.model.pack(dtype)
    save_model(out, saved.model, tokenizer=saved.tokenizer, memory_text=saved.memory_text, pooling=saved.pooling)
    n_bytes = sum(file.stat().st_size for file in out.iterdir())
    if as_json:
        print_json({"model": str(model), "out": str(out), "dtype": dtype, "parameters": saved.model.n_parameters, "size_bytes": n_bytes})
    else:
        click.echo(f"{out}: {count(saved.model.n_parameters)} parameters, {dtype}, {size(n_bytes)}")
