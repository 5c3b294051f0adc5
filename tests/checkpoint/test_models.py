"""Model folders: what is saved comes back to the bit, and a folder whose parts do not fit is refused by name."""

import json
import os
import shutil
import tracemalloc

import numpy as np
import pytest
from helpers import assert_same_bits, examples
from hypothesis import given
from hypothesis import strategies as st
from variants import SIZES, VARIANTS, tiny_model, tokens

import mini_tfm as mt
from mini_tfm.checkpoint import safetensors
from mini_tfm.checkpoint.folder import OpenFolder
from mini_tfm.checkpoint.models import read_model, save_model
from mini_tfm.checkpoint.safetensors import encode_safetensors, read_safetensors
from mini_tfm.config import Config
from mini_tfm.errors import FileProblem, InvalidValue
from mini_tfm.files.reading import read_bytes
from mini_tfm.memory import registry
from mini_tfm.text.tokenizers import ByteTokenizer, load_tokenizer, train_bpe
from mini_tfm.transformer import Transformer, load_checkpoint


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_model_comes_back_to_the_bit(variant, tmp_path):
    model = tiny_model(variant, dtype=np.float32)
    model.save(tmp_path / "model")
    loaded = mt.load(tmp_path / "model")
    assert loaded.config == model.config and loaded.dtype == np.float32
    assert_same_bits([loaded.weights[name] for name in model.weights], list(model.weights.values()))
    rng = np.random.default_rng(0)
    source, target = tokens(rng, 2, 5), tokens(rng, 2, 4)
    if not model.config.has_decoder:
        assert_same_bits(loaded.encode(source), model.encode(source))
    else:
        source = source if model.config.has_encoder else None
        assert_same_bits(loaded.logits(source, target), model.logits(source, target))


FIELDS = st.fixed_dictionaries(
    {
        "vocab_size": st.integers(3, 40),
        "d_model": st.sampled_from([4, 8, 12]),
        "n_heads": st.sampled_from([1, 2, 4]),
        "n_encoder_layers": st.integers(0, 2),
        "n_decoder_layers": st.integers(1, 2),
        "d_ff": st.integers(1, 9),
        "norm": st.sampled_from(["layer", "rms"]),
        "norm_position": st.sampled_from(["pre", "post"]),
        "norm_eps": st.floats(1e-12, 1.0),
        "activation": st.sampled_from(["relu", "gelu", "gelu_tanh", "silu"]),
        "positions": st.sampled_from(["sinusoidal", "learned", "relative", "none"]),
        "max_positions": st.integers(1, 9),
        "bias": st.booleans(),
        "tie_embeddings": st.booleans(),
        "segment_length": st.none() | st.integers(1, 99),
    }
)


@examples(2)
@given(FIELDS, st.integers(0, 100), st.sampled_from([None, "window:size=8", "recurrent:tokens=2"]), st.booleans())
def test_save_load_save_gives_the_same_bytes(tmp_path_factory, fields, seed, memory, with_tokenizer):
    folder = tmp_path_factory.mktemp("models")
    model = Transformer(Config(**fields).replace(vocab_size=fields["vocab_size"] + 300 * with_tokenizer), seed=seed)
    made = mt.memory(memory) if memory else None
    model.add_memory_weights(made)
    save_model(folder / "one", model, tokenizer=ByteTokenizer() if with_tokenizer else None, memory_text=made and made.text)
    saved = load_checkpoint(folder / "one")
    save_model(folder / "two", saved.model, tokenizer=saved.tokenizer, memory_text=saved.memory_text)
    assert contents(folder / "one") == contents(folder / "two")
    assert saved.memory_text == memory and (saved.tokenizer is not None) == with_tokenizer


def test_a_bpe_tokenizer_and_a_memory_come_back(tmp_path):
    tokenizer = train_bpe(["the cat sat on the mat " * 20], 280)
    model, memory = Transformer(Config(**{**SIZES, "vocab_size": 300})), mt.memory("recurrent:tokens=3+window:size=9,sinks=1")
    model.add_memory_weights(memory)
    save_model(tmp_path / "model", model, tokenizer=tokenizer, memory_text=memory.text)
    saved = load_checkpoint(tmp_path / "model")
    assert saved.tokenizer.encode("the mat").tolist() == tokenizer.encode("the mat").tolist()
    assert saved.memory().text == memory.text
    assert_same_bits(saved.model.weights["memory.recurrent.tokens"], model.weights["memory.recurrent.tokens"])


def test_float64_for_checks(tmp_path):
    model = tiny_model(dtype=np.float64)
    model.save(tmp_path / "model")
    double, single = mt.load(tmp_path / "model", dtype="float64"), mt.load(tmp_path / "model")
    assert_same_bits([double.weights[name] for name in model.weights], list(model.weights.values()))
    assert_same_bits(single.weights["embedding.weight"], model.weights["embedding.weight"].astype(np.float32))
    with pytest.raises(InvalidValue, match="dtype: expected 'float32'"):
        mt.load(tmp_path / "model", dtype="float16")


@pytest.fixture
def folder(tmp_path):
    model = tiny_model(dtype=np.float32, vocab_size=300)
    save_model(tmp_path / "model", model, tokenizer=ByteTokenizer())
    return tmp_path / "model"


def change_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = dict(read_safetensors(path))
    change(tensors)
    path.write_bytes(b"".join(bytes(part) for part in encode_safetensors(tensors)))


def change_config(folder, change):
    path = folder / "config.json"
    about = json.loads(path.read_text())
    change(about)
    path.write_text(json.dumps(about))


Q = "encoder.0.attention.q.weight"
TENSORS = {
    "one missing": (lambda t: t.pop(Q), f"tensor '{Q}' is missing"),
    "all missing": (dict.clear, r"and \d+ more"),
    "one too many": (lambda t: t.update(extra=np.zeros(2, np.float32)), "tensor 'extra' is not one of this architecture"),
    "another name": (lambda t: t.update({"encoder.9.attention.q.weight": t.pop(Q)}), "'encoder.9.attention.q.weight' is not one of"),
    "turned": (lambda t: t.update({Q[:-8] + "_norm.x": t.pop(Q)}), "is missing"),
    "another shape": (lambda t: t.update({Q: np.zeros((8, 9), np.float32)}), rf"tensor '{Q}': expected shape \(8, 8\), got \(8, 9\)"),
    "another rank": (lambda t: t.update({Q: np.zeros(64, np.float32)}), r"expected shape \(8, 8\), got \(64,\)"),
    "transposed embedding": (lambda t: t.update({"embedding.weight": t["embedding.weight"].T.copy()}), r"expected shape \(300, 8\)"),
    "integers": (lambda t: t.update({Q: np.zeros((8, 8), np.int32)}), f"tensor '{Q}': expected float32, got int32"),
    "half": (lambda t: t.update({Q: np.zeros((8, 8), np.float16)}), f"tensor '{Q}': expected float32, got float16"),
    "an integer memory": (lambda t: t.update({"memory.x.y": np.zeros(2, np.int64)}), "tensor 'memory.x.y': expected float32, got int64"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_must_be_those_of_the_architecture(kind, folder):
    change, told = TENSORS[kind]
    change_tensors(folder, change)
    with pytest.raises(InvalidValue, match=told) as caught:
        mt.load(folder)
    assert "model.safetensors" in str(caught.value)


def model_field(**fields):
    return lambda about: about["model"].update(fields)


CONFIGS = {
    "another format": (lambda about: about.update(format="t5"), "field 'format': expected 'mini_tfm', got 't5'"),
    "no format": (lambda about: about.pop("format"), "field 'format': expected 'mini_tfm', got None"),
    "a later version": (lambda about: about.update(format_version=2), "field 'format_version': expected 1, got 2"),
    "a version that is text": (lambda about: about.update(format_version="1"), "field 'format_version'"),
    "an unknown field": (lambda about: about.update(colour="red"), "unknown field 'colour'"),
    "a memory that is no text": (lambda about: about.update(memory=["window"]), "field 'memory': expected text or null"),
    "no model": (lambda about: about.pop("model"), "vocab_size' is missing"),
    "a model that is a list": (lambda about: about.update(model=[1]), "expected a mapping"),
    "an unknown model field": (model_field(d_modle=8), "unknown field 'd_modle'.*did you mean 'd_model'"),
    "text for a number": (model_field(d_model="8"), "d_model: expected int, got '8'"),
    "a real for an integer": (model_field(n_heads=2.0), "n_heads: expected int, got 2.0"),
    "true for a number": (model_field(n_heads=True), "n_heads: expected int, got True"),
    "one for true": (model_field(bias=1), r"bias: expected bool \| tuple\[str, ...\], got 1"),
    "negative": (model_field(n_encoder_layers=-1), "n_encoder_layers: expected 0 to"),
    "nothing at all": (model_field(n_encoder_layers=0, n_decoder_layers=0), "at least one of them above 0"),
    "heads that do not divide": (model_field(n_kv_heads=3), "n_kv_heads: expected a divisor of n_heads"),
    "an id out of range": (model_field(eos_id=300), "eos_id: expected 0 to vocab_size - 1 = 299"),
    "an unknown kind": (model_field(activation="tanh"), "activation: expected one of relu"),
    "too large": (model_field(d_model=1 << 16, d_ff=1 << 20, n_encoder_layers=1024), "at most .* weights"),
    "too many positions": (model_field(positions="learned", max_positions=1 << 24, d_model=1 << 16), "at most .* weights"),
    "a number no float can hold": (model_field(attention_scale=10**400), "attention_scale: expected float"),
    "another size than the tensors'": (model_field(d_ff=13), r"expected shape \(8, 13\), got \(8, 12\)"),
    "more layers than the tensors": (model_field(n_decoder_layers=3), "tensor 'decoder.2.attention.q.weight' is missing"),
    "fewer layers than the tensors": (model_field(n_decoder_layers=1), "'decoder.1.attention.k.bias' is not one of this architecture"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_config_must_hold_together(kind, folder):
    change, told = CONFIGS[kind]
    change_config(folder, change)
    with pytest.raises(InvalidValue, match=told):
        mt.load(folder)


def test_the_vocabulary_must_fit_the_model(folder):
    tokenizer = train_bpe(["a text with some words " * 20, *map(str, range(1000))], 320)
    assert tokenizer.vocab_size > 300
    (folder / "tokenizer_config.json").unlink()
    tokenizer.save(folder)
    with pytest.raises(InvalidValue, match=f"the tokenizer has {tokenizer.vocab_size} tokens, the model only 300"):
        load_checkpoint(folder)


def test_a_memory_with_other_options_than_the_weights_is_refused(tmp_path):
    model, memory = tiny_model(dtype=np.float32), mt.memory("recurrent:tokens=3")
    model.add_memory_weights(memory)
    save_model(tmp_path / "model", model, memory_text=memory.text)
    loaded = mt.load(tmp_path / "model")
    with pytest.raises(InvalidValue, match=r"memory.recurrent.tokens has shape \(3, 8\) in this model, and \(4, 8\)"):
        loaded.add_memory_weights(mt.memory("recurrent:tokens=4"))


def test_a_memory_that_is_not_installed_is_named_when_it_is_asked_for(folder):
    change_config(folder, lambda about: about.update(memory="windwo:size=3"))
    saved = load_checkpoint(folder)
    with pytest.raises(InvalidValue, match=r"names the memory 'windwo:size=3', .* ask for it: memory='windwo:size=3'"):
        saved.memory()


@pytest.mark.parametrize(
    "text", ["store:path={}", "window:size=4+store:path={}", "store:top_k=2,path='{}'", "stranger:path={}", "window+stranger"]
)
def test_nothing_that_a_file_names_is_opened_or_imported(text, folder, tmp_path, monkeypatch):
    target = tmp_path / "elsewhere" / "x.mdb"
    target.parent.mkdir()
    text = text.format(target)
    change_config(folder, lambda about: about.update(memory=text))
    load = registry._registry.load
    monkeypatch.setattr(registry._registry, "load", lambda name: pytest.fail(f"{name} was imported") if name == "stranger" else load(name))
    for ask in (lambda: mt.Pipeline.load(folder), load_checkpoint(folder).memory):
        with pytest.raises(InvalidValue, match=r"names the memory .* a file may only name a built-in memory that opens no file"):
            ask()
    assert mt.Pipeline.load(folder, memory=None).memory is None
    assert not list(target.parent.iterdir())


def test_a_built_in_memory_that_opens_nothing_is_made(folder):
    change_config(folder, lambda about: about.update(memory="window:size=4+store:top_k=2"))
    assert mt.Pipeline.load(folder).memory.name == "window+store"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(name, folder):
    (folder / name).unlink()
    with pytest.raises(FileProblem, match=name):
        mt.load(folder)


def test_a_broken_tokenizer_is_named(folder):
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidValue, match=r"tokenizer\.json"):
        mt.load(folder)


def test_saving_over_a_model_that_is_in_use_does_not_disturb_it(tmp_path):
    one, two = tiny_model(dtype=np.float32, seed=1), tiny_model(dtype=np.float32, seed=2)
    one.save(tmp_path / "model")
    loaded = mt.load(tmp_path / "model")
    two.save(tmp_path / "model")
    assert_same_bits(loaded.weights[Q], one.weights[Q])
    assert_same_bits(mt.load(tmp_path / "model").weights[Q], two.weights[Q])


def test_loaded_weights_can_be_trained(tmp_path):
    tiny_model(dtype=np.float32).save(tmp_path / "model")
    loaded = mt.load(tmp_path / "model")
    assert all(w.flags.writeable for w in loaded.weights.values())
    assert np.isfinite(mt.Trainer(loaded).step(np.full((1, 2), 4), np.full((1, 2), 5)))


def sparse(path, header, n_bytes):
    """A tensor file that claims much data and takes no room on the disk."""
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + n_bytes)


@pytest.mark.parametrize("rows", [1 << 27, 1 << 37])
@pytest.mark.parametrize("name", ["embedding.weight", "memory.recurrent.tokens", "stranger"])
def test_tensors_are_compared_with_the_configuration_before_they_are_read(name, rows, folder, monkeypatch):
    """The header of a sparse file of a few KB, which claims 4 GB or 4 TB."""
    monkeypatch.setattr(safetensors, "ram_bytes", lambda: 1 << 31)
    entry = {"dtype": "F32", "shape": [rows, 8], "data_offsets": [0, 32 * rows]}
    weights, header, begin = read_safetensors(folder / "model.safetensors"), {name: entry}, 32 * rows
    for each, array in weights.items():
        if each != name:
            header[each] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [begin, begin := begin + array.nbytes]}
    sparse(folder / "model.safetensors", header, begin)
    tracemalloc.start()
    with pytest.raises((InvalidValue, FileProblem), match=rf"model\.safetensors: (.*tensor '{name}'|its tensors take)"):
        mt.load(folder)
    assert tracemalloc.get_traced_memory()[1] < 1 << 26
    tracemalloc.stop()


def test_a_memory_larger_than_the_machine_is_refused_before_it_is_made(folder):
    with pytest.raises(InvalidValue, match=r"memory: memory.recurrent.tokens has 80000000000 numbers"):
        mt.load(folder).add_memory_weights(mt.memory("recurrent:tokens=10000000000"))


def test_a_save_meanwhile_does_not_change_the_tokenizer_that_is_read(tmp_path):
    """The tokenizer was once read by path, after the folder's files had been closed."""
    model = Transformer(Config(vocab_size=300, d_model=8, n_heads=2, n_encoder_layers=1, n_decoder_layers=1))
    save_model(tmp_path / "m", model, tokenizer=train_bpe(["the cat"] * 3, 262))
    with OpenFolder(tmp_path / "m") as opened:
        save_model(tmp_path / "m", model, tokenizer=ByteTokenizer())
        assert read_model(opened).tokenizer.vocab_size == 262
    assert isinstance(read_model(tmp_path / "m").tokenizer, ByteTokenizer)


def in_cache(folder, name="models--org--name"):
    """A model saved as Hugging Face's cache holds it: the snapshot."""
    model = Transformer(Config(vocab_size=300, d_model=8, n_heads=2, n_encoder_layers=1, n_decoder_layers=1))
    snapshot, blobs = folder / name / "snapshots" / ("ab" * 20), folder / name / "blobs"
    save_model(folder / "plain", model, tokenizer=train_bpe(["the cat"] * 3, 262))
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted((folder / "plain").iterdir())):
        path.rename(blobs / (f"{number:02d}" * 20))
        (snapshot / path.name).symlink_to(f"../../blobs/{f'{number:02d}' * 20}")
    return snapshot


def test_a_snapshot_of_hugging_faces_cache_loads(tmp_path):
    snapshot = in_cache(tmp_path)
    loaded = read_model(snapshot)
    assert loaded.config.d_model == 8 and loaded.tokenizer.vocab_size == load_tokenizer(snapshot).vocab_size == 262
    (tmp_path / "link").symlink_to(snapshot)
    assert read_model(tmp_path / "link").config == loaded.config
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(snapshot.parents[1] / "blobs" / ("00" * 20))  # absolute, where the cache was on another disk
    assert read_model(snapshot).config == loaded.config
    (snapshot / "1_Pooling").mkdir()
    (snapshot.parents[1] / "blobs" / ("ee" * 20)).write_bytes(b"{}")
    (snapshot / "1_Pooling" / "config.json").symlink_to(f"../../../blobs/{'ee' * 20}")  # a file in a folder of the snapshot
    assert read_bytes(snapshot, 100, "1_Pooling/config.json") == b"{}"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize(
    "kind", ["outside", "deeper", "other model", "a link", "blobs a link", "the folder", "a FIFO", "gone", "not a cache", "itself"]
)
def test_any_other_link_is_refused(kind, name, tmp_path):
    snapshot = in_cache(tmp_path, "models--org--name" if kind != "not a cache" else "model")
    blobs, link = snapshot.parents[1] / "blobs", snapshot / name
    blob = os.readlink(link).rpartition("/")[2]
    secret = tmp_path / "secret"
    (blobs / blob).replace(secret)
    shutil.copy(secret, blobs / blob)
    link.unlink()
    if kind == "deeper":
        (blobs / "x").mkdir()
        shutil.copy(secret, blobs / "x" / blob)
    elif kind == "other model":
        other = tmp_path / "models--org--other" / "blobs"
        other.mkdir(parents=True)
        shutil.copy(secret, other / blob)
    elif kind in ("a link", "a FIFO", "gone"):
        (blobs / blob).unlink()
        if kind == "a link":
            (blobs / blob).symlink_to(secret)
        elif kind == "a FIFO":
            os.mkfifo(blobs / blob)
    elif kind == "blobs a link":
        blobs.rename(tmp_path / "elsewhere")
        blobs.symlink_to(tmp_path / "elsewhere")
    target = {"outside": secret, "deeper": f"../../blobs/x/{blob}", "other model": f"../../../models--org--other/blobs/{blob}"}
    link.symlink_to(target.get(kind, {"the folder": "../../blobs", "itself": name}.get(kind, f"../../blobs/{blob}")))
    with pytest.raises(FileProblem, match="config.json" if kind in ("not a cache", "blobs a link") else name):  # then none is followed
        read_model(snapshot)


def test_a_memory_whose_parameters_are_not_in_the_folder_is_refused(tmp_path):
    """A config.json could ask for any number of untrained ones."""
    model = Transformer(Config(vocab_size=300, d_model=8, n_heads=2, n_encoder_layers=1, n_decoder_layers=1))
    save_model(tmp_path / "m", model, memory_text="recurrent:tokens=99999999")
    with pytest.raises(InvalidValue, match=r"m: names the memory 'recurrent:tokens=99999999', whose parameter '.*tokens.*' is not in it"):
        load_checkpoint(tmp_path / "m").memory()
