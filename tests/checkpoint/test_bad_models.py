"""Folders and files, GGUF and Marian's, that somebody else wrote, broken or hostile: one clear error each, before a weight is allocated."""

import json
import os
import random
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from broken_models import GGUF_FIELDS, GGUF_SHAPES, MARIAN_OPTIONS, gguf, hugging_face, marian, marian_yaml, mutated, mutated_json
from helpers import in_a_process
from published import GOLDENS, tensor

from mini_tfm.errors import FileProblem, InvalidValue, MiniTfmError
from mini_tfm.text.chat import chat_text
from mini_tfm.transformer import load_checkpoint

HUGE = struct.pack("<IIQ", 9, 8, 1 << 63)  # an array of 2^63 texts
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
LONG = "model.layers.0.self_attn.q_proj.weight"


def shards(*names, map_of=None, present=()):
    """A folder whose weights are said to be in these files; of them `present` are there."""

    def make(folder):
        whole = hugging_face(folder) / "model.safetensors"
        for name in present:
            (folder / name).write_bytes(whole.read_bytes())
        whole.unlink()
        index = {"weight_map": {f"t{number}": name for number, name in enumerate(names)} if map_of is None else map_of}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return make


def written(name, content):
    return lambda folder: (hugging_face(folder) / name).write_bytes(content)


def cut(length):
    def make(folder):
        path = hugging_face(folder) / "model.safetensors"
        path.write_bytes(path.read_bytes()[:length])

    return make


def only(name):
    return lambda folder: (hugging_face(folder) / "model.safetensors").rename(folder / name)


def tokenizer_of(size):
    def make(folder):
        from mini_tfm.text.tokenizers import train_bpe

        hugging_face(folder)
        for name, content in train_bpe(["a text of some words"] * size, 300).files().items():
            (folder / name).write_bytes(content)

    return make


def linked(folder):
    path = hugging_face(folder) / "model.safetensors"
    path.rename(folder.parent / "elsewhere.safetensors")
    path.symlink_to(folder.parent / "elsewhere.safetensors")


def folder(variant="llama-tied", tensors=None, **changes):
    return lambda path: hugging_face(path, variant, tensors, **changes)


def missing(*names):
    return folder(tensors=dict.fromkeys(names))


# What is wrong -> (the folder, what the error must say, each part of it).
FOLDERS = {
    "an unknown model_type": (folder(model_type="mamba"), ["config.json", "model_type", "mamba", "llama"]),
    "a model_type that is a list": (folder(model_type=["llama"]), ["config.json", "model_type"]),
    "a configuration that is not JSON": (written("config.json", b"{'model_type': 1}"), ["config.json", "JSON"]),
    "a configuration cut off": (written("config.json", b'{"model_type": "llama", "hidden'), ["config.json", "JSON"]),
    "a key twice": (written("config.json", b'{"model_type": "llama", "model_type": "gpt2"}'), ["config.json", "twice"]),
    "a field of another type": (folder(hidden_size="32"), ["config.json", "hidden_size", "integer", "'32'"]),
    "a boolean for a number": (folder(num_hidden_layers=True), ["num_hidden_layers", "integer", "True"]),
    "two fields missing or wrong": (folder(vocab_size=None, rms_norm_eps="small"), ["vocab_size", "missing", "rms_norm_eps"]),
    "no layers": (folder(num_hidden_layers=0), ["config.json", "layers"]),
    "2^40 layers": (folder("gemma2", num_hidden_layers=1 << 40, layer_types=None), ["num_hidden_layers", str(1 << 40)]),
    "a vocabulary of 2^62": (folder(vocab_size=1 << 62), ["vocab_size", str(1 << 62)]),
    "heads that do not divide": (folder(num_key_value_heads=3), ["n_kv_heads", "3"]),
    "no heads": (folder(num_attention_heads=0), ["num_attention_heads", "0"]),
    "a width of nothing": (folder("t5", d_model=0), ["d_model", "0"]),
    "an end outside the vocabulary": (folder(eos_token_id=79), ["eos_id", "78", "79"]),
    "activations that are not known": (folder(hidden_act="mish"), ["hidden_act", "mish", "silu"]),
    "several values not supported": (
        folder(hidden_act="mish", pretraining_tp=2, rope_parameters={"rope_type": "longrope"}), ["mish", "pretraining_tp", "longrope"],
    ),
    "kinds of layers that are not known": (
        folder(sliding_window=4, layer_types=["linear_attention"] * 2), ["layer_types", "linear_attention"],
    ),
    "too few kinds of layers": (folder("gemma3", layer_types=["full_attention"]), ["layer_types", "3 layers"]),
    "yarn of nothing": (folder("llama-yarn", rope_parameters={"rope_type": "yarn", "factor": 0}), ["rope_parameters", "factor", "0"]),
    "yarn of base 1": (
        folder("llama-yarn", rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0}), ["rotary_base", "yarn"],
    ),
    "rope_parameters that are text": (folder(rope_parameters="yarn"), ["rope_parameters", "mapping", "yarn"]),
    "a scale of nothing": (folder("gemma2", query_pre_attn_scalar=0), ["query_pre_attn_scalar", "0"]),
    "a pattern of 0 layers": (folder("gemma3", layer_types=None, sliding_window_pattern=0), ["sliding_window_pattern", "0"]),
    "positions that depend on keys": (folder("bert", position_embedding_type="relative_key"), ["position_embedding_type", "relative_key"]),
    "two vocabularies": (folder("marian", share_encoder_decoder_embeddings=False), ["share_encoder_decoder_embeddings", "False"]),
    "heads of the decoder that do not divide": (folder("bart", decoder_attention_heads=3), ["config.json", "decoder_n_heads = 3"]),
    "a feed-forward that is not known": (folder("t5", feed_forward_proj="gated-mish"), ["feed_forward_proj", "gated-mish"]),
    "tensors missing, all of them named": (
        missing(LONG, "model.norm.weight"), ["layers.0.self_attn.q_proj.weight", "norm.weight", "missing"],
    ),
    "tensors too many": (folder(tensors={"model.extra.a": np.zeros(1, "f4"), "b": np.zeros(1, "f4")}), ["extra.a", "'b'", "not one of"]),
    "a wrong shape": (folder(tensors={LONG: np.zeros((32, 31), "f4")}), ["q_proj.weight", "(32, 32)", "(32, 31)"]),
    "integers for weights": (folder(tensors={LONG: np.zeros((32, 32), "i4")}), ["q_proj.weight", "float32", "int32"]),
    "weights cut off": (cut(9000), ["model.safetensors", "bytes"]),
    "weights cut in their header": (cut(100), ["model.safetensors", "header"]),
    "weights of no bytes": (cut(0), ["model.safetensors", "8 bytes"]),
    "a pointer of Git LFS": (written("model.safetensors", LFS), ["model.safetensors", "Git LFS", "git lfs pull"]),
    "pickles alone": (only("pytorch_model.bin"), ["pytorch_model.bin", "safetensors", "never opened"]),
    "no weights": (lambda path: (hugging_face(path) / "model.safetensors").unlink(), ["model.safetensors", "download"]),
    "a link out of the folder": (linked, ["model.safetensors", "link"]),
    "a shard missing": (shards("a.safetensors", "b.safetensors", present=["a.safetensors"]), ["b.safetensors", "download"]),
    "a tensor in two shards": (shards("a.safetensors", "b.safetensors", present=["a.safetensors", "b.safetensors"]), ["another file"]),
    "a forced token that it cannot say": (
        written("generation_config.json", b'{"forced_bos_token_id": 79}'), ["generation_config.json", "forced_bos_token_id", "79"],
    ),
    "ends that are no ids": (written("generation_config.json", b'{"eos_token_id": "2"}'), ["eos_token_id", "ids", "'2'"]),
    "a shard outside the folder": (shards("../b.safetensors"), ["index.json", "weight_map"]),
    "a shard by its full path": (shards("/etc/passwd"), ["index.json", "weight_map"]),
    "an index of numbers": (shards(map_of={"a": 1}), ["index.json", "weight_map"]),
    "an index of nothing": (shards(map_of={}), ["index.json", "weight_map"]),
    "a tokenizer larger than the embedding": (tokenizer_of(50), ["tokenizer", "79"]),
    "a tokenizer that is none": (written("tokenizer.json", b'{"model": {"type": "BPE", "vocab": 3}}'), ["tokenizer.json"]),
}  # fmt: skip

GGUFS = {
    "another format": (b"GGML" + gguf()[4:], ["begins with 'GGUF'"]),
    "nothing": (b"", ["GGUF"]),
    "big-endian": (gguf(version=3 << 24), ["version", "big-endian"]),
    "version 1": (gguf(version=1), ["version", "2 or 3"]),
    "2^63 tensors": (gguf(counts=(1 << 63, 1)), ["tensors", str(1 << 63)]),
    "2^63 fields": (gguf(counts=(1, 1 << 63)), ["fields", str(1 << 63)]),
    "an array of 2^63 texts": (gguf({"general.tags": HUGE}), ["an array", str(1 << 63)]),
    "an array of arrays": (gguf({"general.tags": struct.pack("<IIQ", 9, 9, 1)}), ["type 9"]),
    "a field of an unknown type": (gguf({"general.x": struct.pack("<I", 77)}), ["type 77"]),
    "a text of 2^62 bytes": (gguf({"general.x": struct.pack("<IQ", 8, 1 << 62)}), ["text", str(1 << 62)]),
    "a text that is not UTF-8": (gguf({"general.x": struct.pack("<IQ", 8, 1) + b"\xff"}), ["utf-8"]),
    "cut off in its header": (gguf()[:500], ["ends within its header"]),
    "cut off in its tensors": (gguf()[:-200], ["not within the file"]),
    "an alignment of 0": (gguf({"general.alignment": 0}), ["general.alignment", "0"]),
    "another architecture": (gguf({"general.architecture": "mamba"}), ["architecture", "mamba", "qwen2"]),
    "an architecture that is a number": (gguf({"general.architecture": 3}), ["architecture", "3"]),
    "fields that are not supported, all of them named": (
        gguf({"llama.expert_count": 8, "llama.logit_scale": 1.0}), ["llama.expert_count", "llama.logit_scale"],
    ),
    "a width that is text": (gguf({"llama.embedding_length": "8"}), ["hidden_size", "integer"]),
    "heads that are a list": (gguf({"llama.attention.head_count": [2, 2]}), ["num_attention_heads", "integer"]),
    "no number of layers": (gguf({"llama.block_count": None}), ["'blk.0"[1:4].replace("blk", "layers")]),
    "2^31 layers": (gguf({"llama.block_count": (1 << 31) - 1}), ["num_hidden_layers"]),
    "a dimension of 2^63": (gguf(shapes={"output_norm.weight": (1 << 63,)}), ["output_norm.weight", "not within"]),
    "five dimensions": (gguf(shapes={"output_norm.weight": (1, 1, 1, 1, 8)}), ["output_norm.weight", "4 dimensions"]),
    "a tensor of an unknown type": (gguf(kinds={"output_norm.weight": 99}), ["output_norm.weight"]),
    "tensors that lie on each other": (gguf(offsets={"output_norm.weight": 0}), ["lies on another"]),
    "a tensor between two places": (gguf(offsets={"output_norm.weight": 3}), ["output_norm.weight"]),
    "tensors missing": (gguf(drop=["output_norm.weight", "blk.0.attn_q.weight"]), ["norm.weight", "q_proj", "missing"]),
    "tensors too many": (gguf(shapes={"blk.9.attn_q.weight": (8, 8), "x": (4,)}), ["layers.9", "'x'", "not one of"]),
    "a wrong shape": (gguf(shapes={"blk.0.ffn_up.weight": (12, 7)}), ["up_proj", "(12, 8)", "(12, 7)"]),
    "frequencies of its own": (gguf(shapes={"rope_freqs.weight": (2,)}), ["rope_freqs"]),
    "a tokenizer of another kind": (gguf({"tokenizer.ggml.model": "rwkv"}), ["tokenizer.ggml.model", "rwkv"]),
    "as many types as there are no tokens": (gguf({"tokenizer.ggml.token_type": [1, 1]}), ["token_type"]),
    "an end outside the vocabulary": (gguf({"tokenizer.ggml.eos_token_id": 59}), ["59"]),
    "merges that are no pairs": (gguf({"tokenizer.ggml.merges": ["AB"]}), ["merges", "pairs"]),
    "merges of tokens that are not there": (gguf({"tokenizer.ggml.merges": ["A zz"]}), ["tokenizer"]),
    "words cut in an unknown way": (gguf({"tokenizer.ggml.pre": "falcon9"}), ["tokenizer.ggml.pre", "falcon9"]),
    "a tokenizer larger than the embedding": (
        gguf({"tokenizer.ggml.tokens": [*GGUF_FIELDS["tokenizer.ggml.tokens"], "CD"], "tokenizer.ggml.token_type": [3, *[1] * 59]}),
        ["tokenizer", "60", "59"],
    ),
}  # fmt: skip


def test_ids_that_a_model_cannot_say_are_left_out(tmp_path):
    """The others stay: it still ends where it should."""
    made = {"eos_token_id": [5, 79, 7], "bad_words_ids": [[3, 200], [3, 4]], "suppress_tokens": [-1]}
    (hugging_face(tmp_path / "m") / "generation_config.json").write_text(json.dumps(made))
    assert load_checkpoint(tmp_path / "m").model.generation == {"eos_token_id": [5, 7], "bad_words_ids": [[3, 4]]}


WF, YML, LARGEST = "decoder_l1_rnn_Wf", "special:model.yml", (1 << 31) - 1


def said_in_yaml(**changes):
    """A file without tensors, whose options are these."""
    return marian(yaml=marian_yaml({**MARIAN_OPTIONS, **{key.replace("_", "-"): value for key, value in changes.items()}}))


def scaled(scale):
    """A file whose matrix WF has this scale."""
    good = np.float32(127 / np.abs(tensor(WF, (8, 8))).max())
    return marian(quantized=True).replace(struct.pack("<f", good), struct.pack("<f", scale))


MARIANS = {
    "nothing behind the version": (marian()[:8], ["ends too early"]),
    "2^63 items": (marian(count=1 << 63), ["at most", str(1 << 63)]),
    "fewer items than there are": (marian(count=3), ["model.bin", "damaged"]),
    "more items than there are": (marian(count=60), ["model.bin", "damaged"]),
    "a type that is not known": (marian(kinds={WF: 0x1801}), [WF, "0x1801", "float32"]),
    "a matrix of int8 without a scale": (marian(quantized=True, kinds={WF: 0x101}), [WF, "float32", "int8"]),
    "half the numbers": (marian(kinds={WF: 0x408}), [WF, "0x408"]),
    "data shorter than the shape": (marian(lengths={WF: 255}), [WF, "(8, 8)", "256", "255"]),
    "data longer than the shape and all padding": (marian(lengths={WF: 256 + 257}), [WF, "256", "513"]),
    "data of 2^64 - 1 bytes": (marian(lengths={WF: (1 << 64) - 1}), [WF, str((1 << 64) - 1)]),
    "a shape of more bytes than there are": (
        marian(tensors={"decoder_l1_rnn_W": np.broadcast_to(np.float32(0), (1 << 14, 0))}), ["decoder_l1_rnn_W", "above 0"],
    ),
    "a dimension below 0": (marian().replace(struct.pack("<2i", 24, 8), struct.pack("<2i", -24, 8)), ["Wemb", "-24"]),
    "dimensions whose product is beyond 2^64": (
        marian().replace(struct.pack("<2i", 24, 8), struct.pack("<2i", LARGEST, LARGEST)), ["Wemb", str(LARGEST**2 * 4)],
    ),
    "five dimensions": (marian(tensors={"x": np.zeros((1, 1, 1, 1, 1), "f4")}), ["'x'", "4 dimensions", "5"]),
    "no dimensions": (marian(tensors={"x": np.zeros((), "f4")}), ["'x'", "4 dimensions", "0"]),
    "a name without an end": (marian(names={WF: b"decoder_l1_rnn_Wf!"}), ["NUL"]),
    "a name with a NUL in it": (marian(names={WF: b"decoder\0_rnn_Wf\0"}), ["NUL"]),
    "a name of nothing": (marian(names={WF: b"\0"}), ["names"]),
    "a name that is not UTF-8": (marian(names={WF: b"\xff\xfe\0"}), ["utf-8"]),
    "a name of 2,000 bytes": (marian(names={WF: b"a" * 2000 + b"\0"}), ["1 to 1023 bytes", "2000"]),
    "a name twice": (marian(names={WF: b"decoder_l1_rnn_W\0"}), ["decoder_l1_rnn_W", "twice"]),
    "more bytes than its items": (marian(end=b"more"), ["items end"]),
    "a scale of nothing": (scaled(0.0), [WF, "positive scale", "0.0"]),
    "a scale that is not a number": (scaled(float("nan")), [WF, "positive scale", "nan"]),
    "no options": (marian(names={YML: b"special:model.yaml\0"}), [YML]),
    "options that are numbers": (marian(kinds={YML: 0x404}), [YML]),
    "options of 100,000 bytes": (marian(yaml="# no\n" * 20_000), [YML, "65536", "100001"]),
    "options that are not UTF-8": (marian().replace(b"v1.9.0", b"v1.9.\xff"), ["utf-8"]),
    "options that are nested": (marian(yaml="a:\n  b: 1"), [YML, "line 2", "key: value"]),
    "an option twice": (marian(yaml="a: 1\na: 2"), [YML, "line 2", "once"]),
    "another kind of model": (said_in_yaml(type="s2s"), ["type", "s2s", "transformer"]),
    "another cell": (said_in_yaml(dec_cell="gru"), ["dec-cell", "gru", "ssru"]),
    "an average in the place of attention": (
        said_in_yaml(transformer_decoder_autoreg="average-attention"), ["transformer-decoder-autoreg", "average-attention"],
    ),
    "several options that are not supported": (
        said_in_yaml(transformer_preprocess="n", transformer_postprocess="da", transformer_ffn_activation="gelu"),
        ["transformer-preprocess", "transformer-postprocess", "'da'", "gelu"],
    ),
    "tied layers": (said_in_yaml(transformer_tied_layers=[1, 1]), ["transformer-tied-layers", "[1, 1]"]),
    "two vocabularies": (said_in_yaml(dim_vocabs=[24, 25]), ["dim-vocabs", "[24, 25]"]),
    "no vocabularies": (said_in_yaml(dim_vocabs="many"), ["dim-vocabs", "many"]),
    "a vocabulary of 2^40": (said_in_yaml(dim_vocabs=[1 << 40, 1 << 40]), ["vocab_size", str((1 << 40) + 1)]),
    "2^40 layers": (said_in_yaml(enc_depth=1 << 40), ["enc-depth", str(1 << 40)]),
    "a width that is text": (said_in_yaml(dim_emb="wide"), ["dim-emb", "integer", "'wide'"]),
    "a width that heads do not divide": (said_in_yaml(transformer_heads=3), ["n_heads = 3", "8"]),
    "tensors missing, all of them named": (marian(tensors={WF: None, "Wemb": None}), [WF, "Wemb", "missing"]),
    "tensors too many": (marian(tensors={"x": np.zeros((1, 1), "f4"), "y": np.zeros(1, "f4")}), ["'x'", "'y'", "not one of"]),
    "a wrong shape": (marian(tensors={WF: np.zeros((8, 7), "f4")}), [WF, "(8, 8)", "(8, 7)"]),
}  # fmt: skip


def refused(path, said):
    tracemalloc.start()
    begin = time.process_time()
    try:
        with pytest.raises((FileProblem, InvalidValue)) as caught:
            load_checkpoint(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert os.fspath(path) in message and "\n" not in message and len(message) < 4000
    for part in said:
        assert part in message, message
    assert peak < 16 << 20 and time.process_time() - begin < 60


@pytest.mark.parametrize("name", FOLDERS)
def test_a_bad_folder_is_refused(name, tmp_path):
    make, said = FOLDERS[name]
    make(tmp_path / "model")
    refused(tmp_path / "model", said)


@pytest.mark.parametrize("name", GGUFS)
def test_a_bad_gguf_file_is_refused(name, tmp_path):
    data, said = GGUFS[name]
    (tmp_path / "model.gguf").write_bytes(data)
    refused(tmp_path / "model.gguf", said)


@pytest.mark.parametrize("name", MARIANS)
def test_a_bad_file_of_marian_is_refused(name, tmp_path):
    data, said = MARIANS[name]
    (tmp_path / "model.bin").write_bytes(data)
    refused(tmp_path / "model.bin", said)


WITHOUT_ASSERTS = """
import sys
from pathlib import Path

work, *places = map(Path, sys.argv[1:])
sys.path[:0] = map(str, places)
import numpy as np
import test_bad_models as bad
import test_models as ours
from variants import tiny_model
from mini_tfm.checkpoint.models import save_model
from mini_tfm.errors import FileProblem, InvalidValue
from mini_tfm.text import ByteTokenizer
from mini_tfm.transformer import load_checkpoint

if __debug__:
    raise SystemExit("asserts are on")
seen = 0


def refused(path, kind):
    global seen
    seen += 1
    try:
        load_checkpoint(path)
    except (FileProblem, InvalidValue):
        return
    raise SystemExit(f"{kind} was taken")


for kind, (make, _) in bad.FOLDERS.items():
    (work / str(seen)).mkdir()
    make(work / str(seen) / "model")
    refused(work / str(seen) / "model", kind)
for name, table in (("model.gguf", bad.GGUFS), ("model.bin", bad.MARIANS)):
    for kind, (data, _) in table.items():
        (work / str(seen)).mkdir()
        (work / str(seen) / name).write_bytes(data)
        refused(work / str(seen) / name, kind)
for table, change in ((ours.CONFIGS, ours.change_config), (ours.TENSORS, ours.change_tensors)):
    for kind, (what, _) in table.items():
        folder = work / str(seen)
        save_model(folder, tiny_model(dtype=np.float32, vocab_size=300), tokenizer=ByteTokenizer())
        change(folder, what)
        refused(folder, kind)
print(seen)
"""


def test_bad_models_are_refused_without_asserts(tmp_path):
    """Under `python -O`: no check of a file is an assert."""
    places = Path(__file__).parent, Path(__file__).parents[1]
    seen = in_a_process(WITHOUT_ASSERTS, tmp_path, *places, PYTHONOPTIMIZE="1", PYTHONWARNINGS="ignore").stdout.split()
    assert int(seen[0]) > len(FOLDERS) + len(GGUFS) + len(MARIANS)


def test_the_files_that_the_bad_ones_are_made_of_are_good(tmp_path):
    (tmp_path / "model.gguf").write_bytes(gguf())
    assert load_checkpoint(tmp_path / "model.gguf").model.config.vocab_size == GGUF_SHAPES["token_embd.weight"][0]
    (tmp_path / "model.bin").write_bytes(marian(quantized=True))
    assert load_checkpoint(tmp_path / "model.bin").model.config.vocab_size == 25
    assert load_checkpoint(hugging_face(tmp_path / "model")).model.config.vocab_size == 79


@pytest.mark.parametrize("data", [gguf(), marian(), marian(quantized=True)], ids=["gguf", "marian", "marian, int8"])
def test_no_prefix_of_a_file_is_a_model(tmp_path, data):
    for length in range(0, len(data), 7):
        (tmp_path / "model").write_bytes(data[:length])
        with pytest.raises(InvalidValue):
            load_checkpoint(tmp_path / "model")


TEMPLATES = {
    "ends in the middle": "{% for m in messages %}",
    "reaches for attributes": "{{ messages.__class__.__mro__ }}",
    "reaches for what makes objects": "{{ ''.__class__.__base__.__subclasses__() }}",
    "reaches through a filter": "{{ (messages | attr('__class__')).mro() }}",
    "reaches through a format": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "changes the messages": "{{ messages.append(1) }}",
    "divides by 0": "{{ 1 / 0 }}",
    "calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "counts to 2^60": "{% for i in range(1152921504606846976) %}a{% endfor %}",
    "multiplies a text": "{{ 'a' * 10 ** 12 }}",
    "adds texts without end": "{% set n = namespace(t='a') %}{% for i in range(60) %}{% set n.t = n.t + n.t %}{% endfor %}{{ n.t }}",
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "joins texts without end": "{% set n = namespace(t='a') %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t }}",
    "keeps what it writes without end": (
        "{% set n = namespace(t='a') %}{% for i in range(60) %}{% set t %}{{ n.t }}{{ n.t }}{% endset %}{% set n.t = t %}{% endfor %}"
    ),
    "calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "fills a text": "{{ 'a'.ljust(10 ** 11) }}",
    "fills a text by a format": "{{ '%99999999999d' % 1 }}",
    "fills a text by a method of formats": "{{ '{:99999999999d}'.format(1) }}",
    "makes a power of powers": "{{ 9 ** 9 ** 9 ** 9 }}",
    "refuses": "{{ raise_exception('roles must alternate') }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_hostile_chat_template_is_refused(name):
    """Where it would go on for ever, or take all memory, too."""
    pytest.importorskip("jinja2")
    begin = time.process_time()
    with pytest.raises(InvalidValue, match="some/folder: chat_template: "):
        chat_text(TEMPLATES[name], [{"role": "user", "content": "Hi"}], {"eos_token": "</s>"}, source="some/folder")
    assert time.process_time() - begin < 60


@pytest.mark.parametrize("count", [300, pytest.param(20_000, marks=pytest.mark.long)])
def test_mutated_files_are_refused_or_are_models(count, tmp_path):
    """No error but ours, whatever bytes and fields change."""
    told = json.loads(GOLDENS.read_text())
    variants, whole = [name for name in told if name != "transformers"], (gguf(), marian(), marian(quantized=True))
    outcomes = {"refused": 0, "loaded": 0}
    for seed in range(count):
        draw = random.Random(seed)
        if seed % 2:
            path = tmp_path / "model.gguf"
            path.write_bytes(mutated(draw.choice(whole), draw))
        else:
            variant = draw.choice(variants)
            path = hugging_face(tmp_path / "model", variant)
            if draw.random() < 0.7:
                (path / "config.json").write_text(json.dumps(mutated_json(told[variant]["config"], draw)))
            else:
                weights = path / "model.safetensors"
                weights.write_bytes(mutated(weights.read_bytes(), draw))
        try:
            load_checkpoint(path)
            outcomes["loaded"] += 1
        except MiniTfmError:
            outcomes["refused"] += 1
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
    assert min(outcomes.values()) > count // 20, outcomes
