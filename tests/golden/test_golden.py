"""What a released version has saved loads for ever: `make.py` made each folder here with the version that it is named for."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import mini_tfm as mt
from mini_tfm.text.tokenizers import ByteTokenizer

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from make import READ, RUNS, computed  # noqa: E402

AS_THEN = {"decoder": "window:size=6,sinks=2,positions=true"}  # sinks stood where they had been in the stream
VERSIONS = sorted(path.name for path in HERE.iterdir() if (path / "stream").is_dir())


def test_no_version_is_lost():
    assert {"0.1.0", "2026-11"} <= set(VERSIONS)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_saved_run_computes_what_it_did(version, name):
    """Its logits, by the model that its folder holds, and the loss of the next step, by its memory."""
    folder, (kind, memory, fields) = HERE / version / name, RUNS[name]
    expected = json.loads((HERE / version / f"{name}.json").read_text())
    trainer = mt.Trainer.resume(folder)
    assert trainer.step_count == 3 and len(trainer.losses) == 3
    assert (trainer.memory.text if trainer.memory else None) == memory
    assert isinstance(trainer.tokenizer, ByteTokenizer) == (kind == "bytes")
    assert fields.items() <= trainer.model.config.to_dict().items()
    if name in AS_THEN:
        trainer.memory = mt.memory(AS_THEN[name])
    found = computed(trainer)
    np.testing.assert_allclose(found["logits"], expected["logits"], atol=2e-5)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert trainer.step_count == 4 and np.isfinite(trainer.optimizer.arena).all()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_saved_store_is_read_and_written(version, tmp_path):
    shutil.copy(HERE / version / "notes.store", tmp_path / "notes.store")
    model = mt.load(HERE / version / "stream")
    ram = mt.Pipeline(model, ByteTokenizer(), "store:top_k=3")
    ram.read(READ["other"])
    memory = mt.memory("store", path=str(tmp_path / "notes.store"), document="other", top_k=3)
    pipe = mt.Pipeline(model, ByteTokenizer(), memory)
    counts = {document: len(text.encode()) for document, text in READ.items()}
    assert memory.documents() == counts
    assert pipe.score("the mat")["bits"] == pytest.approx(ram.score("the mat")["bits"], rel=1e-5)
    assert pipe.score("the mat")["bits"] != pytest.approx(mt.Pipeline(model, ByteTokenizer()).score("the mat")["bits"], rel=1e-5)
    assert pipe.read("more") == 4
    assert memory.documents() == {**counts, "other": counts["other"] + 4}
