"""`mini-tfm convert`: writes a model in another layout."""

from __future__ import annotations

from pathlib import Path

import click

from .shared import check_new, count, json_option, lora_option, note, print_json

LAYOUTS = ("mini-tfm", "hugging-face", "peft")


@click.command(short_help="Write a model in another layout.")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--to", type=click.Choice(LAYOUTS), default=LAYOUTS[0], show_default=True, help="The layout of OUT; peft: its LoRA adapters alone."
)
@lora_option
@json_option
def convert(model: Path, out: Path, to: str, lora: Path | None, as_json: bool) -> None:
    """Writes MODEL, a folder, a file (GGUF or Marian's) or a name on the Hub, into the new folder OUT, as float32: 4 bytes a weight.
    In our layout a packed model (see `quantize`) stays packed.

    Its tokenizer, and what it says of generation and of embedding, go with it. A folder of ours keeps the memory that the model was
    trained with; one in Hugging Face's layout has no place for it, and LoRA adapters are merged into its weights.

    \b
    Examples:
      mini-tfm convert model.gguf my-model
      mini-tfm convert my-model for-transformers --to hugging-face
      mini-tfm convert tuned adapter --to peft
    """
    from ..checkpoint.models import save_adapters, save_hugging_face, save_model
    from ..transformer import load_checkpoint

    check_new(out)
    saved = load_checkpoint(model)
    if lora is not None:
        saved.model.load_lora(lora)
    if to == "peft":
        save_adapters(out, saved.model)
    elif to == "hugging-face":
        save_hugging_face(out, saved.model, tokenizer=saved.tokenizer, pooling=saved.pooling)
        if saved.memory_text:
            note(f"the memory {saved.memory_text} is left out: this layout has no place for it")
    else:
        save_model(out, saved.model, tokenizer=saved.tokenizer, memory_text=saved.memory_text, pooling=saved.pooling)
    if as_json:
        print_json({"model": str(model), "out": str(out), "layout": to, "parameters": saved.model.n_parameters})
    else:
        click.echo(f"{out}: {count(saved.model.n_parameters)} parameters, {to}")
