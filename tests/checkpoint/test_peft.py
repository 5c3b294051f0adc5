"""Adapters as PEFT has them: what PEFT computed and trained we compute and train, what it saved we read, bad folders are refused.

The goldens need nothing installed; `test_peft_live.py` asks PEFT itself.
"""

import json
import random
import time
import tracemalloc

import numpy as np
import pytest
from adapters import ADAPTED, GOLDENS, VALUES, filled, summaries, trained, write_adapter
from broken_models import mutated, mutated_json
from helpers import assert_same_bits
from published import GOLDENS as MODELS
from published import VARIANTS, kept, outputs, relative_error, tensor, write_folder

import mini_tfm as mt
from mini_tfm import lora
from mini_tfm.checkpoint import peft
from mini_tfm.checkpoint.safetensors import BFLOAT16, read_safetensors
from mini_tfm.errors import FileProblem, InvalidValue, MiniTfmError
from mini_tfm.weights import LORA_SCALE

TOLD, MODELS_TOLD = json.loads(GOLDENS.read_text()), json.loads(MODELS.read_text())


@pytest.fixture(scope="module")
def values():
    return read_safetensors(VALUES)


def base(variant, path):
    told = MODELS_TOLD[variant]
    write_folder(path, told["config"], {name: tensor(name, tuple(shape)) for name, shape in told["tensors"].items()})
    return mt.load(path)


def adapter_of(variant, path, *, change=lambda tensors: None, **fields):
    """The folder that PEFT wrote; fields: of its configuration, None leaves one out."""
    told = TOLD[variant]
    tensors = {name: filled(name, tuple(shape)) for name, shape in told["tensors"].items()}
    change(tensors)
    about = {name: value for name, value in {**told["config"], **fields}.items() if name not in fields or value is not None}
    write_adapter(path, about, tensors)
    return path


def test_every_variant_has_a_golden():
    assert set(TOLD) - {"peft", "transformers"} == set(ADAPTED)


@pytest.mark.parametrize("variant", ADAPTED)
def test_adapters_compute_what_peft_computed(variant, tmp_path, values):
    """Encoder states and logits to 1e-5 of their range, the same tokens; and not what the model alone computes."""
    model = base(variant, tmp_path / "model")
    alone = kept(outputs(model, 12))
    model.load_lora(adapter_of(variant, tmp_path / "adapter"))
    found, expected = kept(outputs(model, 12)), {name: values[f"{variant}/{name}"] for name in alone}
    for name in expected.keys() & {"encoded", "logits"}:
        assert relative_error(found[name], expected[name]) < 1e-5, name
    moved = [relative_error(alone[name], expected[name]) for name in expected.keys() & {"encoded", "logits"}]
    assert max(moved) > 0.05
    np.testing.assert_array_equal(found.get("greedy", 0), expected.get("greedy", 0))


@pytest.mark.parametrize("variant", [name for name in ADAPTED if VARIANTS[name][1] != "encoder"])
def test_steps_of_training_are_pefts(variant, tmp_path, values):
    """Three steps of AdamW: losses, and what is added to every A and B as a part of its length.

    T5's scores are not scaled down, so rounding grows most there: the two differ by as much where both compute in float64, but for
    Transformers' norms and softmax, which are float32.
    """
    of_losses, of_changes = (1e-4, 1e-2) if VARIANTS[variant][0] == "t5" else (1e-6, 3e-4)
    model = base(variant, tmp_path / "model")
    model.load_lora(adapter_of(variant, tmp_path / "adapter"))
    losses, changes = trained(model)
    np.testing.assert_allclose(losses, values[f"{variant}/losses"], rtol=of_losses)
    expected = values[f"{variant}/changes"]
    assert len(changes) == len(expected)
    difference = np.abs(summaries(changes) - expected).max(axis=1)
    assert (difference < of_changes * expected[:, 0]).all(), difference / expected[:, 0]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("variant", ADAPTED)
def test_a_folder_that_is_read_and_written_is_the_same_adapters(variant, tmp_path):
    """Every byte of the tensors; BERT's pooler, which we do without, is left out."""
    model = base(variant, tmp_path / "model")
    model.load_lora(adapter_of(variant, tmp_path / "theirs"))
    model.save_lora(tmp_path / "ours")
    written, read = (read_safetensors(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert written.keys() == {name for name in read if "pooler" not in name}
    for name in written:
        assert_same_bits(written[name], read[name])
    about = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    scale = ADAPTED[variant]["lora_alpha"] / ADAPTED[variant]["r"] ** (0.5 if ADAPTED[variant].get("use_rslora") else 1)
    assert about["r"] == ADAPTED[variant]["r"] and about["lora_alpha"] == pytest.approx(scale * about["r"], rel=1e-6)
    again = base(variant, tmp_path / "model")
    again.load_lora(tmp_path / "ours")
    assert again.weights.keys() == model.weights.keys()
    for name, weight in model.weights.items():
        assert_same_bits(np.ascontiguousarray(again.weights[name]), np.ascontiguousarray(weight))


@pytest.mark.parametrize("variant", [name for name, (kind, _, _) in VARIANTS.items() if kind != "gpt2"])
def test_adapters_of_every_family_are_written_and_read(variant, tmp_path):
    model = base(variant, tmp_path / "model")
    model.add_lora(3, 5, "all-linear")
    model.save_lora(tmp_path / "adapter")
    again = base(variant, tmp_path / "model")
    again.load_lora(tmp_path / "adapter")
    for name in model.weights:
        if name.startswith("lora."):
            assert_same_bits(again.weights[name], model.weights[name])
    assert again.weights.keys() == model.weights.keys()


@pytest.mark.parametrize(
    "variant, targets, written",
    [
        ("llama", None, ["self_attn.q_proj", "self_attn.v_proj"]),
        ("llama", ("q_proj", "gate_proj"), ["mlp.gate_proj", "self_attn.q_proj"]),
        ("llama", r"model\.layers\.1\..*", [f"layers.1.{name}" for name in ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj",
                                            "self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj")]),
        ("t5", ("EncDecAttention.v",), ["EncDecAttention.v"]),
        ("marian", ("fc1",), ["fc1"]),
        ("bart", r"model\.decoder\..*\.fc2", [f"decoder.layers.{i}.fc2" for i in range(3)]),
        ("bert", ("dense",), ["attention.output.dense", "intermediate.dense", "output.dense"]),
        ("bert", ("intermediate.dense",), ["intermediate.dense"]),
        ("distilbert", ("q_lin",), ["attention.q_lin"]),
    ],
)  # fmt: skip
def test_targets_may_be_a_familys_names_and_are_written_as_peft_reads_them(variant, targets, written, tmp_path):
    model = base(variant, tmp_path / "model")
    model.add_lora(2, targets=targets)
    model.save_lora(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"] == written


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16], ids=["float16", "bfloat16"])
def test_half_precision_adapters_are_their_values(dtype, tmp_path):
    def change(tensors):
        for name, array in tensors.items():
            bits = array.view(np.uint32) >> 16
            tensors[name] = bits.astype(np.uint16).view(BFLOAT16) if dtype is BFLOAT16 else array.astype(dtype)

    whole, half = base("llama", tmp_path / "model"), base("llama", tmp_path / "model")
    whole.load_lora(adapter_of("llama", tmp_path / "whole"))
    half.load_lora(adapter_of("llama", tmp_path / "half", change=change))
    for name, weight in whole.weights.items():
        assert half.weights[name].dtype == np.float32
        np.testing.assert_allclose(half.weights[name], weight, rtol=2**-7, atol=1e-7)


def test_a_model_in_float64_has_adapters_in_float64(tmp_path):
    base("llama", tmp_path / "model")
    model = mt.load(tmp_path / "model", "float64")
    model.load_lora(adapter_of("llama", tmp_path / "adapter"))
    assert {weight.dtype for weight in model.weights.values()} == {np.dtype(np.float64)}
    assert model.weights[LORA_SCALE][0] == 5 / 3


# ------------------------------------------------------------------------- what is refused

A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")
FAULTS = {
    "no rank": ({"r": None}, "field 'r' is missing"),
    "rank 0": ({"r": 0}, "field 'r': expected an integer from 1 to 65536, got 0"),
    "rank in words": ({"r": "eight"}, "field 'r': expected an integer from 1 to 65536, got 'eight'"),
    "another rank": ({"r": 4}, r"q_proj.lora_A.weight': expected shape \(4, 32\), got \(3, 32\)"),
    "a rank of petabytes": ({"r": 1 << 50}, "field 'r': expected an integer from 1 to 65536"),
    "no alpha": ({"lora_alpha": None}, "field 'lora_alpha' is missing"),
    "alpha 0": ({"lora_alpha": 0}, "field 'lora_alpha': expected a number from 1e-6 to 1e12, got 0"),
    "another method": ({"peft_type": "IA3"}, "field 'peft_type': 'IA3' is not supported, only 'LORA'"),
    "no method": ({"peft_type": None}, "field 'peft_type': None is not supported"),
    "dora": ({"use_dora": True}, "field 'use_dora': True is not supported"),
    "ranks by layer": ({"rank_pattern": {"q_proj": 4}}, "field 'rank_pattern': {'q_proj': 4} is not supported"),
    "alphas by layer": ({"alpha_pattern": {"q_proj": 4}}, "field 'alpha_pattern': {'q_proj': 4} is not supported"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, r"field 'modules_to_save': \['lm_head'\] is not supported"),
    "biases": ({"bias": "all"}, "field 'bias': 'all' is not supported, only 'none'"),
    "biases of adapters": ({"lora_bias": True}, "field 'lora_bias': True is not supported"),
    "turned layers": ({"fan_in_fan_out": True}, "field 'fan_in_fan_out': True is not supported"),
    "changed weights": ({"init_lora_weights": "pissa"}, "field 'init_lora_weights': 'pissa' is not supported"),
    "some layers": ({"layers_to_transform": [0]}, r"field 'layers_to_transform': \[0\] is not supported"),
    "repeated layers": ({"layer_replication": [[0, 2]]}, "field 'layer_replication'"),
    "tokens": ({"trainable_token_indices": [3]}, "field 'trainable_token_indices'"),
    "what is to come": ({"use_everything": "yes"}, "field 'use_everything': 'yes' is not supported"),
    "rslora in words": ({"use_rslora": "yes"}, "field 'use_rslora': expected true or false"),
    "no target": ({"target_modules": []}, r"field 'target_modules': expected names or a regular expression, got \[\]"),
    "targets that are none": ({"target_modules": {"q_proj": 1}}, "field 'target_modules': expected names"),
    "unknown target": ({"target_modules": ["q_proj", "v_proj", "c_attn"]}, "field 'target_modules': 'c_attn' fits no layer of this model"),
    "the output layer": ({"target_modules": ["q_proj", "v_proj", "lm_head"]}, "'target_modules': 'lm_head' fits no layer"),
    "more targets": ({"target_modules": ["q_proj", "v_proj", "up_proj"]}, "layers.0.mlp.up_proj.lora_A.weight' is missing; .*lora_B"),
    "all targets": ({"target_modules": "all-linear"}, "layers.1.mlp.down_proj.lora_B.weight' is missing"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_configuration_that_cannot_be_kept_is_refused_by_name(fault, tmp_path):
    fields, message = FAULTS[fault]
    refused(base("llama", tmp_path / "model"), adapter_of("llama", tmp_path / "adapter", **fields), message)


TENSORS = {
    "no A": (lambda t: t.pop(A), f"adapter_model.safetensors: tensor '{A}' is missing"),
    "no B": (lambda t: t.pop(B), f"tensor '{B}' is missing"),
    "no layer": (lambda t: [t.pop(A), t.pop(B)], f"tensor '{A}' is missing; tensor '{B}' is missing"),
    "none": (lambda t: t.clear(), f"tensor '{A}' is missing"),
    "turned": (lambda t: t.update({A: t[A].T.copy()}), r"lora_A.weight': expected shape \(3, 32\), got \(32, 3\)"),
    "integers": (lambda t: t.update({A: t[A].astype(np.int32)}), "lora_A.weight': expected float32, float16 or bfloat16, got int32"),
    "a layer too many": (lambda t: t.update({A.replace("0", "2"): t[A]}), "layers.2.self_attn.q_proj.lora_A.weight' is no adapter"),
    "dora's": (lambda t: t.update({A.replace("lora_A", "lora_magnitude_vector"): t[A][0]}), "lora_magnitude_vector.weight' is no adapter"),
    "an embedding's": (lambda t: t.update({"base_model.model.embed_tokens.lora_embedding_A": t[A]}), "lora_embedding_A' is no adapter"),
    "the output layer's": (lambda t: t.update({"base_model.model.lm_head.lora_A.weight": t[A]}), "lm_head.lora_A.weight' is no adapter"),
    "a whole module": (lambda t: t.update({"base_model.model.lm_head.weight": t[A]}), "lm_head.weight' is no adapter"),
}  # fmt: skip


@pytest.mark.parametrize("fault", TENSORS)
def test_tensors_that_do_not_fit_are_refused_by_name(fault, tmp_path):
    change, message = TENSORS[fault]
    refused(base("llama", tmp_path / "model"), adapter_of("llama", tmp_path / "adapter", change=change), message)


def refused(model, folder, message, error=InvalidValue):
    """At once, before a tensor is read; the model is as it was."""
    names, read = set(model.weights), []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(error, match=message) as caught:
        patch.setattr(peft, "read_tensors", lambda *given, **options: read.append(given))
        model.load_lora(folder)
    assert not read and set(model.weights) == names
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_all_that_is_wrong_is_told_at_once(tmp_path):
    fields = {"use_dora": True, "rank_pattern": {"q_proj": 4}, "r": 0, "target_modules": ["c_attn"]}
    folder = adapter_of("llama", tmp_path / "adapter", **fields)
    refused(base("llama", tmp_path / "model"), folder, "'r': .*'rank_pattern': .*'use_dora': .*'target_modules': ")
    many = adapter_of("llama", tmp_path / "many", **{f"use_{n}": True for n in range(100)})
    refused(base("llama", tmp_path / "model"), many, "; and 80 more$")
    wide = adapter_of("llama", tmp_path / "wide", change=lambda t: t.update({f"{n}.{A}": t[A] for n in range(100)}))
    refused(base("llama", tmp_path / "model"), wide, "; and 80 more$")


@pytest.mark.parametrize("theirs, ours", [("bart", "llama"), ("llama", "t5"), ("qwen2", "gemma3"), ("t5", "marian"), ("bert", "t5-v1.1")])
def test_adapters_of_another_model_are_refused(theirs, ours, tmp_path):
    refused(
        base(ours, tmp_path / "model"), adapter_of(theirs, tmp_path / "adapter"), "fits no layer|is no adapter|expected shape|is missing"
    )


def test_a_pattern_that_a_file_names_is_not_run(tmp_path):
    """One that would take longer than the universe is old, if it were."""
    model = base("llama", tmp_path / "model")
    model.load_lora(adapter_of("llama", tmp_path / "adapter", target_modules="(.+)+[.](.+)+[.](.+)+!"))
    assert len(lora.adapted_layers(model.weights)) == 4
    empty = adapter_of("llama", tmp_path / "empty", change=lambda t: t.clear(), target_modules=".*")
    refused(base("llama", tmp_path / "model"), empty, "adapter_model.safetensors: holds no adapter of a layer of this model")


def test_files_that_are_missing_or_spoilt_are_named(tmp_path):
    model = base("llama", tmp_path / "model")
    folder = adapter_of("llama", tmp_path / "adapter")
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    refused(model, folder, "adapter_model.safetensors: .*is damaged or is not safetensors")
    weights.unlink()
    refused(model, folder, "adapter_model.safetensors: there is no such file", FileProblem)
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    refused(model, folder, "only adapter_model.bin, which can run code .* peft's `save_pretrained`", FileProblem)
    (folder / "adapter_config.json").write_text("[]")
    refused(model, folder, "adapter_config.json: ")
    (folder / "adapter_config.json").unlink()
    refused(model, folder, "adapter_config.json: there is no such file", FileProblem)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_folders_with_random_changes_load_or_are_refused(file, tmp_path):
    """No other error, no hang, no more memory than the folder takes; and what loads, computes."""
    base("llama", tmp_path / "model")
    path = adapter_of("llama", tmp_path / "adapter") / file
    content, outcomes = path.read_bytes(), {"loaded": 0, "refused": 0}
    tracemalloc.start()
    for seed in range(150):
        draw = random.Random(seed)
        is_json = file.endswith(".json") and draw.random() < 0.8
        path.write_bytes(json.dumps(mutated_json(json.loads(content), draw)).encode() if is_json else mutated(content, draw))
        model = mt.load(tmp_path / "model")
        tracemalloc.reset_peak()
        began = time.process_time()
        try:
            model.load_lora(path.parent)
            outcomes["loaded"] += 1
            with np.errstate(all="ignore"):  # a bit of an exponent makes a number of 1e38
                assert model.logits(None, np.array([[3, 4]])).shape == (1, 2, 79)
        except MiniTfmError:
            outcomes["refused"] += 1
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        assert tracemalloc.get_traced_memory()[1] < 20e6 and time.process_time() - began < 20, f"seed {seed}"
    tracemalloc.stop()
    assert min(outcomes.values()) > 10, outcomes


def test_what_this_layout_has_no_place_for_is_not_saved(tmp_path):
    model = base("llama", tmp_path / "model")
    with pytest.raises(InvalidValue, match=r"model: has no adapters to save; add_lora\(\)"):
        model.save_lora(tmp_path / "adapter")
    model.add_lora()
    model.add_memory_weights(mt.memory("recurrent:tokens=2"))
    with pytest.raises(InvalidValue, match=r"model: has a memory's parameters \(memory.recurrent.tokens\)"):
        model.save_lora(tmp_path / "adapter")
    own = mt.Transformer(mt.Config(vocab_size=13, d_model=8, n_heads=2, positions="none"))
    own.add_lora()
    with pytest.raises(InvalidValue, match="no published family has models of this architecture"):
        own.save_lora(tmp_path / "adapter")
    with pytest.raises(InvalidValue, match="no published family"):
        mt.Transformer(own.config).load_lora(adapter_of("llama", tmp_path / "theirs"))
    assert not (tmp_path / "adapter").exists()


def gpt2_adapter(folder):
    """As PEFT has one of GPT-2: one B A beside q, k and v together, and one beside `mlp.c_proj`; what they add to Transformers' weights."""
    tensors, added = {}, {}
    for layer, d_in, d_out in (("h.0.attn.c_attn", 36, 108), ("h.1.attn.c_attn", 36, 108), ("h.1.mlp.c_proj", 144, 36)):
        a, b = (tensor(f"{layer}.lora_{part}.weight", shape) for part, shape in (("A", (2, d_in)), ("B", (d_out, 2))))
        tensors |= {f"base_model.model.transformer.{layer}.lora_{part}.weight": x for part, x in (("A", a), ("B", b))}
        added[f"transformer.{layer}.weight"] = 1.5 * (b @ a).T
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["c_attn", "h.1.mlp.c_proj"], "fan_in_fan_out": True}
    write_adapter(folder, about, tensors)
    return tensors, added


def test_gpt2s_adapter_is_one_for_q_k_and_v(tmp_path):
    model = base("gpt2", tmp_path / "model")
    written, added = gpt2_adapter(tmp_path / "adapter")
    whole = read_safetensors(tmp_path / "model" / "model.safetensors")
    added = {name: whole[name] + more for name, more in added.items()}
    write_folder(tmp_path / "sums", json.loads((tmp_path / "model" / "config.json").read_text()), {**whole, **added})
    model.load_lora(tmp_path / "adapter")
    expected = outputs(mt.load(tmp_path / "sums"), 4)["logits"]
    assert relative_error(outputs(model, 4)["logits"], expected) < 1e-5
    model.save_lora(tmp_path / "ours")
    again = read_safetensors(tmp_path / "ours" / "adapter_model.safetensors")
    assert again.keys() == written.keys()
    assert_same_bits([again[name] for name in sorted(again)], [written[name] for name in sorted(written)])
    about = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (about["r"], about["lora_alpha"], about["fan_in_fan_out"]) == (2, 3, True)
    model.save_hugging_face(tmp_path / "merged")
    assert relative_error(outputs(mt.load(tmp_path / "merged"), 4)["logits"], expected) < 1e-5


@pytest.mark.parametrize("targets, rank", [("all-linear", 6), (("attention.q",), 2), (("c_attn",), 6), (("c_fc",), 2)])
def test_gpt2s_adapters_that_differ_are_written_as_one_of_a_larger_rank(targets, rank, tmp_path):
    model = base("gpt2", tmp_path / "model")
    model.add_lora(2, 3, targets)
    for name in model.weights:
        if name.startswith("lora.") and name.endswith(".b"):
            model.weights[name] = tensor(name, model.weights[name].shape)
    model.save_lora(tmp_path / "adapter")
    about = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (about["r"], about["lora_alpha"]) == (rank, 1.5 * rank)
    again = base("gpt2", tmp_path / "again")
    again.load_lora(tmp_path / "adapter")
    assert relative_error(outputs(again, 4)["logits"], outputs(model, 4)["logits"]) < 1e-5
    assert relative_error(outputs(base("gpt2", tmp_path / "plain"), 4)["logits"], outputs(model, 4)["logits"]) > 1e-3


def test_a_gpt2_adapter_of_other_shapes_is_refused(tmp_path):
    model = base("gpt2", tmp_path / "model")
    tensors, _ = gpt2_adapter(tmp_path / "adapter")
    name = "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"
    about = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    write_adapter(tmp_path / "adapter", about, {**tensors, name: tensors[name][:36]})
    with pytest.raises(InvalidValue, match=r"h.0.attn.c_attn.lora_B.weight': expected shape \(108, 2\), got \(36, 2\)"):
        model.load_lora(tmp_path / "adapter")
