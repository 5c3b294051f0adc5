"""An experiment that was made before: models that learned nothing, and figures that are written down."""

from pathlib import Path

from mini_tfm.checkpoint.models import save_model
from mini_tfm.compare.experiment import Experiment, Result, folder_name
from mini_tfm.compare.tasks.recall import DISTANCES
from mini_tfm.config import Config
from mini_tfm.text.tokenizers import ByteTokenizer
from mini_tfm.transformer import Transformer


def small_experiment(documents, memories, out, **options):
    """As run_experiment, with models that learned nothing."""
    rows = []
    for number, memory in enumerate(memories):
        name = memory or "none"
        folder = Path(out) / "models" / folder_name(name) if out else None
        if folder:
            model = Transformer(Config(vocab_size=259, d_model=16, n_heads=2, n_encoder_layers=1, n_decoder_layers=1, segment_length=16))
            save_model(folder, model, tokenizer=ByteTokenizer(), memory_text=memory)
        recall = {d: (float("nan") if number == 1 and d == 6 else 0.9 / (1 + d)) for d in DISTANCES}
        row = Result(
            memory=name,
            bits_per_byte=2.0 - number / 10,
            recall=recall,
            recall_far=recall[6],
            tokens_per_second=1234.5,
            state_bytes=1000 * number,
            peak_rss_bytes=98_765_432,
            folder=folder,
            train_seconds=3.2,
            steps=20,
            history=[(i, 5.0 - i / 10) for i in range(20)],
        )
        rows.append(row)
    options["report"]("memory: none")
    return Experiment(
        text_name=options.get("text_name", "text"),
        documents=len(documents),
        bytes_train=1000,
        bytes_held_out=100,
        held_out_names=list(documents)[:1],
        config=Config(vocab_size=259, d_model=16, n_heads=2, segment_length=16),
        tokenizer_vocab=259,
        seconds=60.0,
        steps=20,
        start_steps=50,
        planned_steps=options.get("steps", 20),
        machine={"processor": "<fast> & small", "cores": 2},
        distances=list(DISTANCES),
        chance=1 / 26,
        history={"start": [(i, 6.0) for i in range(50)], **{row.memory: row.history for row in rows}},
        rows=rows,
        seed=options["seed"],
        seeds=[options["seed"]],
    )
