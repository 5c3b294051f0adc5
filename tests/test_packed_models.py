"""Models whose matrices are kept in bfloat16 or int8: `Transformer.pack`, `mt.load(folder, dtype=...)`, and their folders."""

import json

import numpy as np
import pytest
import variants
from helpers import assert_same_bits, in_a_process
from variants import VARIANTS

import mini_tfm as mt
from mini_tfm import _core, packing
from mini_tfm.checkpoint.header import read_header
from mini_tfm.checkpoint.safetensors import BFLOAT16, encode_safetensors, read_safetensors
from mini_tfm.errors import InvalidValue
from mini_tfm.fingerprint import Fingerprint
from mini_tfm.lora import adapter_shapes
from mini_tfm.model import PACKED
from mini_tfm.stream import Stream
from mini_tfm.train.average import average_models
from mini_tfm.weights import Part, Weight

RNG = np.random.default_rng(7)
SOURCE, TARGET = RNG.integers(3, 13, (3, 9)), RNG.integers(3, 13, (3, 8))
LENGTHS = np.array([9, 5, 7])


def tiny_model(variant, **options):
    return variants.tiny_model(variant, **{"dtype": np.float32} | options)


def packed(variant, dtype, seed=1):
    model = tiny_model(variant, seed=seed)
    model.pack(dtype)
    return model


def scores(model):
    if not model.config.has_decoder:
        return model.encode(SOURCE, LENGTHS)
    return model.logits(SOURCE if model.config.has_encoder else None, TARGET, *([LENGTHS] if model.config.has_encoder else []))


@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_packed_model_computes_what_its_rounded_weights_say(variant, dtype):
    model = packed(variant, dtype)
    found, exact = scores(model), scores(tiny_model(variant, seed=1))
    np.testing.assert_allclose(found, exact, rtol=0, atol={"bfloat16": 0.03, "int8": 0.06}[dtype] * np.abs(exact).max())
    assert not np.array_equal(found, exact)  # it is not the float32 model that answers


@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("variant", ["pre norm", "relative", "rotary", "decoder only", "ssru", "decoder only, llama", "marian"])
def test_a_step_of_a_packed_model_gives_its_scores(variant, dtype):
    """Rows are quantised one by one: those of a step are as those of a whole text."""
    from mini_tfm.generate import Session

    model = packed(variant, dtype)
    stream = Stream(model, None, 3)
    stream.open(SOURCE if model.config.has_encoder else None, np.full(3, 9))
    inputs, session = stream.shifted(TARGET), Session(stream)
    steps = np.stack([session.scores(session.step(inputs[:, i : i + 1])) for i in range(8)], axis=1)
    whole = model.logits(*((SOURCE, TARGET) if model.config.has_encoder else (None, TARGET)))
    np.testing.assert_allclose(steps, whole, rtol=0, atol=2e-2 * np.abs(whole).max())  # a value next to a half may fall either way


@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("memory", ["window:size=9,sinks=2", "recurrent:tokens=2", "store:top_k=3,site=decoder"])
def test_a_packed_model_reads_and_answers_with_a_memory(memory, dtype):
    found = []
    for pack in (False, True):
        model = tiny_model("decoder only", seed=2)
        made = mt.memory(memory)
        model.add_memory_weights(made, 1)
        if pack:
            model.pack(dtype)
        stream = Stream(model, made, 3)
        for t in range(2):
            stream.read(SOURCE[:, 4 * t : 4 * t + 4], np.full(3, 4))
        stream.open(None, np.full(3, 8))
        found.append(stream.logits(stream.decode(TARGET, np.full(3, 8))))
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=0.06 * np.abs(found[0]).max())


def test_what_a_packed_weight_is_to_others():
    model, plain = packed("pre norm", "int8"), tiny_model("pre norm", seed=1)
    assert model.precision == "int8" and plain.precision is None
    assert model.n_parameters == plain.n_parameters
    for name, value in plain.weights.items():
        kept = Weight(model.weights[name])
        assert kept.shape == value.shape
        np.testing.assert_allclose(kept.array, value, rtol=0, atol=np.abs(value).max() / 127)
    large = mt.Transformer(mt.Config(vocab_size=256, d_model=64, n_heads=2, n_encoder_layers=1, n_decoder_layers=1, d_ff=128))
    before = large.nbytes
    large.pack("int8")
    assert large.nbytes < 0.5 * before


class Counted:
    """A packed weight that counts how often it is unpacked."""

    def __init__(self, packed):
        self.packed, self.times = packed, 0

    def __getattr__(self, name):
        return getattr(self.packed, name)

    def unpack(self):
        self.times += 1
        return self.packed.unpack()


@pytest.mark.parametrize("variant", ["t5", "decoder only, llama"])
def test_weights_are_named_in_one_reading(variant):
    """q, k and v have one pack, and so have the two products of a gate."""
    model = packed(variant, "int8")
    name, rows = model.fingerprint(), Fingerprint(model.config, model.weights)
    names = [rows("decoder", layer) for layer in (0, 1)]
    counted = {pack: Counted(pack.packed) for pack in {part.pack for part in model.weights.values() if isinstance(part, Part)}}
    for pack, packed_weight in counted.items():
        object.__setattr__(pack, "packed", packed_weight)
    assert model.fingerprint() == name
    expected = {pack: int(any(part.pack is pack and part.table is None for part in model.weights.values() if isinstance(part, Part)))
                for pack in counted}  # fmt: skip
    assert {pack: one.times for pack, one in counted.items()} == expected and len(expected) < len(model.weights)
    rows = Fingerprint(model.config, model.weights)
    assert [rows("decoder", layer) for layer in (0, 1)] == names
    assert all(one.times <= 2 for one in counted.values()) and sum(one.times for one in counted.values()) > len(counted)


@pytest.mark.parametrize("dtype", PACKED)
def test_merging_nothing_leaves_a_model_packed(dtype):
    model = packed("decoder only, llama", dtype)
    before = dict(model.weights)
    model.merge_lora()
    assert model.precision == dtype and all(model.weights[name] is kept for name, kept in before.items())
    beside = adapter_shapes({"decoder.0.attention.q": (model.config.d_model, model.config.d_model)}, 2)
    model.weights.update({name: np.ones(shape, np.float32) for name, shape in beside.items()})
    with pytest.raises(InvalidValue, match=f"model: is packed in {dtype}; load what it was packed from in float32, merge"):
        model.merge_lora()
    assert model.precision == dtype and set(model.weights) == {*before, *beside}


@pytest.mark.parametrize("dtype", PACKED)
def test_only_ids_of_the_tokenizer_are_scored(dtype):
    from mini_tfm.generate import Session

    model = packed("decoder only", dtype)
    stream = Stream(model, None, 2)
    stream.open(None, np.full(2, 3))
    session = Session(stream, n_ids=7)
    hidden = session.step(TARGET[:2, :1] % 7)
    assert session.scores(hidden).shape == (2, 7)
    whole = Session(stream).scores(hidden)
    np.testing.assert_array_equal(session.scores(hidden), whole[:, :7])


def test_what_cannot_be_packed_is_refused_and_stays_as_it_was():
    model = tiny_model("pre norm", seed=1)
    with pytest.raises(InvalidValue, match="dtype: expected 'bfloat16' or 'int8', got 'int4'"):
        model.pack("int4")
    before = dict(model.weights)
    name = "decoder.0.feed_forward.out.weight"
    model.weights[name] = np.where(np.eye(*before[name].shape) > 0, np.nan, before[name]).astype(np.float32)
    with pytest.raises(InvalidValue, match=r"model.weights\['decoder.0.feed_forward.out.weight'\]: holds NaN"):
        model.pack("int8")
    assert model.precision is None
    model.weights[name] = before[name]
    model.add_lora(2)
    with pytest.raises(InvalidValue, match="merge_lora"):
        model.pack("int8")
    model.merge_lora()
    model.pack("int8")
    with pytest.raises(InvalidValue, match="packed in int8 already"):
        model.pack("bfloat16")
    with pytest.raises(InvalidValue, match="is packed in int8"):
        model.add_lora(2)
    with pytest.raises(InvalidValue, match="is packed in int8"):
        mt.Trainer(model)
    with pytest.raises(InvalidValue, match="float32"):
        tiny_model("pre norm", seed=1, dtype=np.float64).pack("int8")


def test_a_folder_is_loaded_packed(tmp_path):
    tiny_model("rotary", seed=1).save(tmp_path / "model")
    assert mt.load(tmp_path / "model", dtype="bfloat16").precision == "bfloat16"
    with pytest.raises(InvalidValue, match="dtype: expected 'float32', 'bfloat16', 'int8'"):
        mt.load(tmp_path / "model", dtype="int3")


# Folders of packed models


@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_packed_model_is_saved_packed_and_loaded_with_its_bits(tmp_path, variant, dtype):
    model = packed(variant, dtype)
    model.save(tmp_path / "model")
    for wanted in (None, dtype):
        again = mt.load(tmp_path / "model", dtype=wanted)
        assert again.precision == dtype and again.n_parameters == model.n_parameters
        assert_same_bits(scores(again), scores(model))
    again.save(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("dtype", PACKED)
def test_a_packed_folder_is_small_and_is_told_from_its_header(tmp_path, dtype):
    model = mt.Transformer(mt.Config(vocab_size=300, d_model=64, n_heads=2, n_encoder_layers=1, n_decoder_layers=1, d_ff=128))
    model.save(tmp_path / "whole")
    model.pack(dtype)
    model.save(tmp_path / "packed")
    whole, small = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "packed"))
    assert small < {"bfloat16": 0.8, "int8": 0.65}[dtype] * whole  # the table of tokens is there in float32, too
    header = read_header(tmp_path / "packed")
    assert header.packed == dtype and header.faults == [] and header.stored[dtype] > 0.3 * model.n_parameters


@pytest.mark.parametrize("dtype", PACKED)
def test_a_packed_folder_is_for_every_instruction_set(tmp_path, dtype):
    model = packed("decoder only, llama", dtype)
    model.save(tmp_path / "model")
    program = "import sys, mini_tfm as mt; print(mt.load(sys.argv[1]).fingerprint())"
    for isa in ["reference", *_core.show_config()["isas"]]:
        assert in_a_process(program, str(tmp_path / "model"), MINI_TFM_ISA=isa).stdout.strip() == model.fingerprint(), isa


def test_a_packed_folder_is_mapped_and_read_only(tmp_path):
    """Nothing of it is copied but what is packed."""
    packed("pre norm", "int8").save(tmp_path / "model")
    table = mt.load(tmp_path / "model").weights["embedding.weight"].table
    assert not table.flags.writeable and not table.flags.owndata


MATRIX = "decoder.0.attention.q.weight"
SCALES = MATRIX + ".scales"


def said(**fields):
    return lambda about, tensors: about.update(fields)


def without(name):
    return lambda about, tensors: tensors.pop(name)


def changed(name, make):
    return lambda about, tensors: tensors.update({name: make(tensors[name])})


def not_said(about, tensors):
    del about["packed"]
    about["format_version"] = 1


def infinite(matrix):
    return np.full(matrix.shape, 0x7F80, np.uint16).view(BFLOAT16)


BAD = {
    "packed in what is not known": ("int8", said(packed="int4"), "config.json: field 'packed': expected 'bfloat16' or 'int8', got 'int4'"),
    "packed in null": ("int8", said(packed=None), "field 'packed'"),
    "of another version": ("int8", said(format_version=1), "field 'format_version': expected 2, got 1"),
    "said to be in another kind": ("int8", said(packed="bfloat16"), "scales' is not one of this architecture"),
    "not said to be packed": ("int8", not_said, "scales' is not one of this architecture"),
    "without scales": ("int8", without(SCALES), f"tensor '{SCALES}' is missing"),
    "without a matrix": ("int8", without(MATRIX), f"tensor '{MATRIX}' is missing"),
    "a matrix of float32": ("int8", changed(MATRIX, lambda x: x.astype("f4")), f"tensor '{MATRIX}': expected int8, got float32"),
    "a matrix of another shape": ("int8", changed(MATRIX, lambda x: x[1:]), f"tensor '{MATRIX}': expected shape"),
    "a scale that is not a number": ("int8", changed(SCALES, lambda x: x * np.nan), f"{MATRIX}.*scales: expected finite.*damaged"),
    "a scale below 0": ("int8", changed(SCALES, lambda x: -x), f"{MATRIX}.*scales: expected finite values"),
    "a number that int8 never is": ("int8", changed(MATRIX, lambda x: np.full_like(x, -128)), f"{MATRIX}.*expected -127 to 127"),
    "infinity": ("bfloat16", changed(MATRIX, infinite), f"{MATRIX}.*NaN or infinity.*damaged"),
    "adapters": ("int8", lambda _, tensors: tensors.update({"lora.scale": np.ones(1, "f4")}), "a packed model has no adapters"),
}


@pytest.mark.parametrize("dtype, change, says", BAD.values(), ids=BAD.keys())
def test_a_bad_packed_folder_is_refused(tmp_path, dtype, change, says):
    packed("pre norm", dtype).save(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    about, tensors = json.loads((tmp_path / "model" / "config.json").read_text()), read_safetensors(path)
    change(about, tensors)
    (tmp_path / "model" / "config.json").write_text(json.dumps(about))
    path.write_bytes(b"".join(encode_safetensors(tensors)))
    with pytest.raises(InvalidValue, match=says) as error:
        mt.load(tmp_path / "model")
    assert str(tmp_path / "model") in str(error.value)


def test_what_a_packed_folder_is_not_for_is_refused(tmp_path):
    packed("pre norm", "int8").save(tmp_path / "model")
    for dtype in ("float32", "bfloat16", "float64"):
        with pytest.raises(InvalidValue, match=f"dtype: expected 'int8' or None, .* got '{dtype}'; load the model that it was packed from"):
            mt.load(tmp_path / "model", dtype=dtype)
    model = mt.load(tmp_path / "model")
    for refused in (lambda: mt.Trainer(model), lambda: model.add_lora(2), lambda: model.pack("int8")):
        with pytest.raises(InvalidValue, match="is packed in int8"):
            refused()
    with pytest.raises(InvalidValue, match="is packed in int8"):
        average_models([tmp_path / "model"], tmp_path / "mean")


def test_a_packed_model_becomes_one_for_transformers_with_the_values_that_it_has(tmp_path):
    model = packed("t5", "int8") if "t5" in VARIANTS else packed("decoder only, llama", "int8")
    model.save_hugging_face(tmp_path / "theirs")
    for name, weight in mt.load(tmp_path / "theirs").weights.items():
        np.testing.assert_array_equal(weight, Weight(model.weights[name]).array)


# Mapped files

T5 = {"norm": "rms", "norm_eps": 1e-6, "positions": "relative", "bias": False, "attention_scale": 1.0, "embedding_scale": False}
T5 |= {"n_encoder_layers": 1, "n_decoder_layers": 3, "pad_id": 0, "bos_id": 0, "eos_id": 1, "framed_by_tokenizer": True}


def test_weights_of_a_mapped_file_are_not_read_to_know_them(tmp_path, monkeypatch):
    from mini_tfm.generate import session

    mt.Transformer(mt.Config(vocab_size=13, d_model=16, n_heads=2, d_ff=32, **T5)).save_hugging_face(tmp_path / "model")
    model = mt.load(tmp_path / "model")
    first = session.packed_weights(model, 13)["output.packed"].packed
    with monkeypatch.context() as no_reading:
        no_reading.setattr(_core, "checksum", lambda x: pytest.fail("a weight was read"))
        assert session.packed_weights(model, 13)["output.packed"].packed is first
    model.weights["embedding.weight"] = model.weights["embedding.weight"] + 1  # another array is another weight
    assert session.packed_weights(model, 13)["output.packed"].packed is not first


def test_a_mapped_file_is_given_back_once_it_is_packed(tmp_path):
    sizes = {"d_model": 256, "n_heads": 4, "d_ff": 1024}
    mt.Transformer(mt.Config(vocab_size=2000, **sizes, **T5)).save_hugging_face(tmp_path / "model")
    program = """
import sys
import mini_tfm as mt
model = mt.load(sys.argv[1])
model.generate([[5, 6, 7]], max_new_tokens=2)
model.generate([[5, 6, 7]], max_new_tokens=2)
kilobytes, inside = 0, False
for line in open("/proc/self/smaps"):
    if "-" in line.split()[0]:
        inside = "model.safetensors" in line
    elif inside and line.startswith("Rss:"):
        kilobytes += int(line.split()[1])
print(kilobytes)
"""
    try:
        open("/proc/self/smaps").close()
    except OSError:
        pytest.skip("the system does not tell which pages are in RAM")
    resident = int(in_a_process(program, str(tmp_path / "model")).stdout)
    whole = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert 0 < 1024 * resident < 0.4 * whole  # the encoder, and some rows of the table


@pytest.mark.parametrize("variant", [name for name in VARIANTS if variants.tiny_model(name).encoder is not None])
def test_a_long_source_is_read_by_packed_weights_with_the_same_bits(variant, monkeypatch):
    model, products = tiny_model(variant), []
    many = np.random.default_rng(3).integers(3, 13, (packing.WORTH_PACKING // 9 + 1, 9))
    lengths = np.full(len(many), 9)
    alone = [model.encode(many[i : i + 1], lengths[:1]) for i in range(len(many))]
    with monkeypatch.context() as seen:
        seen.setattr(_core, "packed_linear", lambda *given, real=_core.packed_linear, **more: products.append(1) or real(*given, **more))
        assert_same_bits(model.encode(many, lengths), np.concatenate(alone))
        assert products
    name = next(iter(model.encoder.products())).linears[0].weight
    model.weights[name] *= 2  # in place, too: what was packed is of weights that are no more
    assert_same_bits(model.encode(many, lengths)[:1], model.encode(many[:1], lengths[:1]))
    assert not np.array_equal(model.encode(many[:1], lengths[:1]), alone[0])
