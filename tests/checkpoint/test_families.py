"""Published models: what Transformers computed with them we compute, and what we save it reads.

The goldens need nothing installed; `test_families_live.py` asks Transformers itself. Weights are random, norms and biases too,
stacks differ in their layers, and vocabularies are odd: nothing agrees by accident.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # where this file is run as a program
from helpers import assert_same_bits
from published import GOLDENS, VALUES, VARIANTS, kept, outputs, relative_error, tensor, worst_gradient, write_folder

import mini_tfm as mt
from mini_tfm.checkpoint.safetensors import BFLOAT16, encode_safetensors, read_safetensors
from mini_tfm.errors import FileProblem, InvalidValue

TOLD = json.loads(GOLDENS.read_text())


@pytest.fixture(scope="module")
def values():
    return read_safetensors(VALUES)


def folder_of(variant, path, dtype=np.float32, rename=lambda name: name, **changes):
    """The folder that Transformers wrote; changes: of its configuration, None leaves a field out."""
    about = {name: value for name, value in {**TOLD[variant]["config"], **changes}.items() if name not in changes or value is not None}
    tensors = {rename(name): cast(tensor(name, tuple(shape)), dtype) for name, shape in TOLD[variant]["tensors"].items()}
    write_folder(path, about, tensors)
    return path


def cast(array, dtype):
    if dtype is BFLOAT16:  # to the nearest, halves to even
        bits = array.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).view(BFLOAT16)
    return array.astype(dtype)


def test_every_variant_has_a_golden():
    assert set(TOLD) - {"transformers"} == set(VARIANTS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_computes_what_transformers_computed(variant, tmp_path, values):
    """Encoder states and logits to 1e-5 of their range, the same tokens, and every weight's gradient to 1e-3."""
    model = mt.load(folder_of(variant, tmp_path / "model"))
    expected = {name.partition("/")[2]: value for name, value in values.items() if name.partition("/")[0] == variant}
    gradients = dict(zip(TOLD[variant]["gradients"], expected.pop("gradients").tolist(), strict=True))
    found = kept(outputs(model, len(expected.get("greedy", ()))))
    assert found.keys() == expected.keys()
    for name in expected.keys() & {"encoded", "logits"}:
        assert relative_error(found[name], expected[name]) < 1e-5, name
    np.testing.assert_array_equal(found.get("greedy", 0), expected.get("greedy", 0))
    assert worst_gradient(model, gradients) < 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_saved_as_hugging_face_has_it_keeps_every_byte(variant, tmp_path):
    model = mt.load(folder_of(variant, tmp_path / "theirs"))
    model.save_hugging_face(tmp_path / "ours")
    again = mt.load(tmp_path / "ours")
    assert again.config == model.config.replace(attention_scale=again.config.attention_scale)
    assert_same_bits([again.weights[name] for name in model.weights], list(model.weights.values()))
    written, read = (read_safetensors(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert written.keys() <= read.keys() | {"lm_head.weight"}
    added_one = {name for name in written if VARIANTS[variant][0].startswith("gemma") and "norm" in name}  # w + 1 - 1 is w but for rounding
    for name in written.keys() & read.keys():
        if name in added_one:
            np.testing.assert_allclose(written[name], read[name], atol=1e-7)
        else:
            assert_same_bits(written[name], read[name])


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("variant", ["t5-v1.1", "marian", "bert", "gpt2", "llama", "gemma3"])
def test_half_precision_files_are_their_values(variant, dtype, tmp_path):
    model = mt.load(folder_of(variant, tmp_path / "half", dtype))
    whole = mt.load(folder_of(variant, tmp_path / "whole"))
    eps = 2.0**-8 if dtype is BFLOAT16 else 2.0**-11
    for name, weight in whole.weights.items():
        assert model.weights[name].dtype == np.float32
        np.testing.assert_allclose(model.weights[name], weight, rtol=2 * eps, atol=2 * eps)  # a norm's w + 1 has w's rounding

    assert model.weights.keys() == whole.weights.keys()


@pytest.mark.parametrize("variant", ["t5", "bart", "bert", "gpt2", "qwen2"])
def test_shards_are_one_model(variant, tmp_path):
    whole = mt.load(folder_of(variant, tmp_path / "whole"))
    folder = folder_of(variant, tmp_path / "shards")
    tensors = read_safetensors(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-{part + 1:05}-of-00003.safetensors" for part in range(3)]
    index = {name: names[number % 3] for number, name in enumerate(tensors)}
    for file in names:
        part = {name: tensors[name] for name in tensors if index[name] == file}
        (folder / file).write_bytes(b"".join(bytes(each) for each in encode_safetensors(part)))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": index}))
    loaded = mt.load(folder)
    assert_same_bits([loaded.weights[name] for name in whole.weights], list(whole.weights.values()))
    (folder / names[1]).unlink()
    with pytest.raises(FileProblem, match=names[1]):
        mt.load(folder)


def earlier(about):
    """A configuration as Transformers 4 wrote it: positions at the top, `torch_dtype`, the scaling's kind called `type`."""
    about = dict(about)
    about["torch_dtype"] = about.pop("dtype")
    rope = about.pop("rope_parameters", None)
    if rope is not None and "full_attention" in rope:
        about["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if rope is not None:
        about["rope_theta"] = rope["rope_theta"]
        scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "rope_type")}
        about["rope_scaling"] = {"type": rope["rope_type"], **scaling} if rope["rope_type"] != "default" else None
    return about


@pytest.mark.parametrize("variant", VARIANTS)
def test_configurations_of_earlier_releases_mean_the_same(variant, tmp_path):
    folder = folder_of(variant, tmp_path / "model")
    config = mt.load(folder).config
    (folder / "config.json").write_text(json.dumps(earlier(TOLD[variant]["config"])))
    assert mt.load(folder).config == config


def test_berts_first_names_of_norms_are_read(tmp_path):
    def first(name):
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        return "bert." + next((name.replace(new, old[new]) for new in old if name.endswith(new)), name)

    expected = mt.load(folder_of("bert", tmp_path / "new"))
    found = mt.load(folder_of("bert", tmp_path / "old", rename=first))
    assert_same_bits([found.weights[name] for name in expected.weights], list(expected.weights.values()))


def test_a_scale_of_attention_that_no_family_has_is_not_saved(tmp_path):
    model = mt.load(folder_of("llama", tmp_path / "model"))
    other = mt.Transformer(model.config.replace(attention_scale=0.7), weights=model.weights)
    with pytest.raises(InvalidValue, match="no published family"):
        other.save_hugging_face(tmp_path / "other")


# docs/checkpoints.md has a table of what was measured: `python tests/checkpoint/test_families.py` writes it again

PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"
MARKS = "<!-- families -->\n", "<!-- /families -->"


def row_of(variant, folder, values):
    """A line of the table: what is largest of all differences."""
    kind = TOLD[variant]["config"]["model_type"]
    expected = {name.partition("/")[2]: value for name, value in values.items() if name.partition("/")[0] == variant}
    gradients = dict(zip(TOLD[variant]["gradients"], expected.pop("gradients").tolist(), strict=True))
    try:
        model = mt.load(folder_of(variant, folder))
    except InvalidValue:
        return f"| {variant} | `{kind}` | refused | | |"
    found = kept(outputs(model, len(expected.get("greedy", ()))))
    error = max(relative_error(found[name], expected[name]) for name in found.keys() & {"encoded", "logits"})
    tokens = "" if "greedy" not in found else "the same" if (found["greedy"] == expected["greedy"]).all() else "others"
    return f"| {variant} | `{kind}` | {error:.0e} | {tokens} | {worst_gradient(model, gradients):.0e} |"


def parts_of_page():
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    table, _, after = rest.partition(MARKS[1])
    return before, table, after


def test_the_page_lists_every_variant():
    rows = [line.split(" | ")[0].removeprefix("| ") for line in parts_of_page()[1].splitlines()[2:]]
    assert rows == list(VARIANTS)


def write_page():
    values = read_safetensors(VALUES)
    lines = ["| variant | `model_type` | states and logits | greedy tokens | gradients |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        lines += [row_of(variant, Path(folder) / variant, values) for variant in VARIANTS]
    before, _, after = parts_of_page()
    PAGE.write_text(before + MARKS[0] + "\n".join(lines) + "\n" + MARKS[1] + after, encoding="utf-8")


if __name__ == "__main__":
    write_page()


LIMITED = [name for name in VARIANTS if VARIANTS[name][1] != "encoder" and VARIANTS[name][0] not in ("t5", "mt5")]


@pytest.mark.parametrize("variant", LIMITED)
def test_a_text_that_is_longer_than_a_model_reads_is_refused(variant, tmp_path):
    """By every family but T5's, whose distances have no limit; the error says how to go on."""
    model = mt.load(folder_of(variant, tmp_path / "model"))
    limit = model.config.max_positions if model.config.positions == "learned" else model.config.context_length
    told = rf"text: has \d+ tokens, and the model reads at most {limit} at once; shorten it, or give a memory.*--memory window"
    with pytest.raises(InvalidValue, match=told):
        model.generate(np.full((1, limit + 2), 7), max_new_tokens=1)
    model.generate(np.full((1, limit if model.config.has_encoder else limit - 1), 7), max_new_tokens=1)
    fits, longer = np.full((1, limit), 7), np.full((1, limit + 1), 7)
    other = fits if model.config.has_encoder else None
    calls = [(lambda: model.logits(other, longer), "target"), (lambda: model.score_targets(other, longer), "target"),
             (lambda: model.look_inside(other, longer), "inputs")]  # fmt: skip
    if model.config.has_encoder:
        calls += [(lambda: model.logits(longer, fits), "source"), (lambda: model.encode(longer), "tokens")]
    for call, name in calls:
        with pytest.raises(InvalidValue, match=told.replace("text", name, 1)):
            call()
    assert model.logits(other, fits).shape[1] == limit


EMBEDDERS = [name for name in VARIANTS if VARIANTS[name][1] == "encoder"]


@pytest.mark.parametrize("variant", EMBEDDERS)
def test_an_encoder_refuses_what_its_table_does_not_hold(variant, tmp_path):
    model = mt.load(folder_of(variant, tmp_path / "model"))
    with pytest.raises(
        InvalidValue, match=rf"the model reads at most {model.config.max_positions} at once; shorten it, or cut it into parts"
    ):
        model.encode(np.full((1, model.config.max_positions + 1), 7))
