"""info of models, from headers alone, and convert."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from mini_tfm.checkpoint import safetensors
from mini_tfm.checkpoint.models import save_hugging_face, save_model
from mini_tfm.config import Config
from mini_tfm.pipeline import Pipeline
from mini_tfm.pooling import Dense, Pooling
from mini_tfm.text.tokenizers import ByteTokenizer, train_bpe
from mini_tfm.transformer import Transformer, load, load_checkpoint

BERT = {"n_encoder_layers": 1, "n_decoder_layers": 0, "norm_position": "post", "positions": "learned", "max_positions": 32,
        "activation": "gelu", "embedding_norm": True, "token_types": 2, "embedding_scale": False, "framed_by_tokenizer": True}  # fmt: skip


@pytest.fixture
def bert(tmp_path):
    tokenizer = train_bpe(["some words"], 260)
    model = Transformer(Config(vocab_size=tokenizer.vocab_size, d_model=8, n_heads=2, **BERT))
    pooling = Pooling(("cls",), normalize=True, dense=(Dense(np.eye(8, dtype=np.float32)),))
    save_hugging_face(tmp_path / "bert", model, tokenizer=tokenizer, pooling=pooling)
    return tmp_path / "bert"


def test_a_folder_of_hugging_face(run, bert):
    told = run("info", bert, "--json").json["model"]
    assert (told["layout"], told["family"], told["context_tokens"], told["embeds"]) == ("Hugging Face", "bert", 32, "cls, length 1")
    assert told["parameters"] == load(bert).n_parameters == sum(told["stored_as"].values())
    assert told["ram_bytes"]["float32"] == load(bert).nbytes and told["problems"] == []
    assert told["size_bytes"] == sum(path.stat().st_size for path in bert.iterdir() if path.is_file())
    assert told["architecture"].startswith("1 encoder layers of 8 numbers, 2 heads, gelu of 32, layer norm (post), learned positions")
    assert "cls, length 1" in run("info", bert).out


def test_the_weights_of_a_memory_count(run, tmp_path):
    pipe = Pipeline(Transformer(Config(vocab_size=260, d_model=8, n_heads=2)), ByteTokenizer(), memory="recurrent:tokens=2")
    pipe.save(tmp_path / "model")
    told = run("info", tmp_path / "model", "--json").json["model"]
    assert told["memory"] == "recurrent:tokens=2" and told["parameters"] == pipe.model.n_parameters == sum(told["stored_as"].values())


def test_no_weight_is_read(run, bert, model, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("read a weight")

    monkeypatch.setattr(safetensors, "_copy_tensor", refuse)
    for folder in (model, bert):
        (bert / "modules.json").unlink(missing_ok=True)  # a dense layer is read
        assert run("info", folder, "--json").json["model"]["problems"] == []


def test_all_problems_are_told_at_once(run, bert):
    about = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps(about | {"hidden_act": "mish", "is_decoder": True}))
    (bert / "tokenizer.json").write_text("{}")
    (bert / "modules.json").write_text("[]")
    for words in (["info", bert], ["info", bert, "--json"]):
        said = run(*words)
        assert said.code == 2 and said.err.count("\n") == 1
        assert all(name in said.err for name in ("hidden_act", "is_decoder", "tokenizer.json", "modules.json"))
    told = json.loads(said.out)["model"]
    assert len(told["problems"]) == 3 and told["parameters"] is None and told["stored_as"]["float32"] > 0


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def test_a_gguf_file_of_another_family(run, tmp_path):
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 2)
    header += text("general.architecture") + struct.pack("<I", 8) + text("rwkv7")
    header += text("rwkv7.block_count") + struct.pack("<II", 4, 2)
    header += text("token_embd.weight") + struct.pack("<IQQIQ", 2, 4, 3, 0, 0)
    (tmp_path / "some.gguf").write_bytes(header + b"\0" * (-len(header) % 32) + b"\0" * 48)
    said = run("info", tmp_path / "some.gguf", "--json")
    told = json.loads(said.out)["model"]
    assert said.code == 2 and "rwkv7" in said.err
    assert (told["layout"], told["family"], told["stored_as"]) == ("GGUF", "rwkv7", {"F32": 12})


def test_convert_there_and_back(run, bert, tmp_path):
    assert run("convert", bert, tmp_path / "ours", "--json").json["layout"] == "mini-tfm"
    assert run("convert", tmp_path / "ours", tmp_path / "theirs", "--to", "hugging-face").code == 0
    expected = Pipeline.load(bert).embed(["some", "some words"])
    for folder in ("ours", "theirs"):
        np.testing.assert_array_equal(Pipeline.load(tmp_path / folder).embed(["some", "some words"]), expected)
    for name in (
        "config.json",
        "model.safetensors",
        "modules.json",
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
        "tokenizer.json",
    ):
        assert (tmp_path / "theirs" / name).read_bytes() == (bert / name).read_bytes()


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_a_quantized_folder_is_for_every_command_but_train(run, model, bert, tmp_path, dtype):
    """It answers as the model with --dtype does."""
    told = run("quantize", model, tmp_path / "q", "--dtype", dtype, "--json").json
    assert (told["dtype"], told["parameters"]) == (dtype, load(model).n_parameters)
    assert told["size_bytes"] < sum(file.stat().st_size for file in Path(model).iterdir() if file.is_file())
    about = run("info", tmp_path / "q", "--json").json["model"]
    assert about["stored_as"][dtype] and about["memory"] == "window:size=8" and [*about["ram_bytes"]] == [f"{dtype} (estimate)"]
    text = tmp_path / "text.txt"
    text.write_text("Some words of a text, and some more.")
    for words in (["generate", ..., "Some", "--max-new-tokens", 9], ["score", ..., text]):
        packed = run(*(tmp_path / "q" if word is ... else word for word in words))
        assert packed.code == 0, packed.err
        plain = run(*(model if word is ... else word for word in words), "--dtype", dtype)
        assert without_times(packed.out) == without_times(plain.out)
    assert run("read", tmp_path / "q", text, "--memory", f"store:path={tmp_path / 'notes.mdb'}").code == 0
    for words, says in (
        (["train", "--from", tmp_path / "q", "--text", text, "--out", tmp_path / "run", "--steps", 1], f"is packed in {dtype}"),
        (["quantize", tmp_path / "q", tmp_path / "again"], f"is packed in {dtype} already"),
        (["quantize", model, tmp_path / "q"], "exists already"),
        (["score", tmp_path / "q", text, "--dtype", "float32"], "packed from"),
    ):
        refused = run(*words)
        assert refused.code == 2 and says in refused.err, refused.err
    assert run("quantize", bert, tmp_path / "small", "--dtype", dtype).code == 0
    expected = Pipeline.load(bert, dtype=dtype).embed(["some", "some words"])
    np.testing.assert_array_equal(Pipeline.load(tmp_path / "small").embed(["some", "some words"]), expected)


def without_times(said):
    """What a command says, but for how long it took."""
    return [line for line in said.splitlines() if "second" not in line and "tokens/s" not in line]


def test_convert_keeps_what_is_there_and_tells_what_it_leaves_out(run, model, bert, tmp_path):
    refused = run("convert", model, bert)
    assert refused.code == 2 and "exists already" in refused.err
    assert load_checkpoint(model).memory_text == "window:size=8"
    assert run("convert", model, tmp_path / "copy").code == 0 and load_checkpoint(tmp_path / "copy").memory_text == "window:size=8"
    refused = run("convert", model, tmp_path / "theirs", "--to", "hugging-face")
    assert refused.code == 2 and "no published family" in refused.err and not (tmp_path / "theirs").exists()
    save_model(tmp_path / "with", load(bert), memory_text="window:size=8")
    said = run("convert", tmp_path / "with", tmp_path / "theirs", "--to", "hugging-face")
    assert said.code == 0 and "window:size=8 is left out" in said.err
