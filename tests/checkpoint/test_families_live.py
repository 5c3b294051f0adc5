"""Published families beside Transformers itself, where it is installed (extra `peers`): it reads what we save, and we what it saves."""

import numpy as np
import pytest
from published import VARIANTS, outputs, relative_error, samples

import mini_tfm as mt
from mini_tfm.stream import Stream

pytestmark = pytest.mark.filterwarnings("ignore")  # Transformers' and PyTorch's own


@pytest.fixture(scope="module")
def peers():
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    import peer_models

    return peer_models


@pytest.mark.parametrize("variant", VARIANTS)
def test_either_reads_what_the_other_saves(peers, variant, tmp_path):
    theirs = peers.make(variant, tmp_path / "theirs")
    expected = peers.outputs(variant, theirs)
    model = mt.load(tmp_path / "theirs")
    found = outputs(model, peers.N_NEW)
    assert found.keys() == expected.keys()
    for name in found.keys() - {"greedy"}:
        assert relative_error(found[name], expected[name]) < 1e-5, name
    np.testing.assert_array_equal(found.get("greedy", 0), expected.get("greedy", 0))

    model.save_hugging_face(tmp_path / "ours")
    again = peers.outputs(variant, peers.read(variant, tmp_path / "ours"))
    for name in expected:  # the same numbers; but gemma's norms went through w + 1, and some scales through a root
        if name == "greedy":
            np.testing.assert_array_equal(again[name], expected[name])
        else:
            assert relative_error(again[name], expected[name]) < 1e-6, name


@pytest.mark.parametrize("memory", ["window:size=100,site=cross", "store:top_k=100,site=cross"])
@pytest.mark.parametrize("variant", ["bart-heads", "m2m100-heads", "t5"])
def test_a_memory_of_the_encoders_outputs_is_as_more_of_them(peers, variant, memory, tmp_path):
    """A decoder that sees a segment and remembers another is Transformers' decoder beside the encoder's outputs of both."""
    import torch

    theirs = peers.make(variant, tmp_path / "theirs")
    source, _, target = samples(theirs.config.vocab_size)
    parts = [source[:, :5], source[:, 5:]]
    start = torch.full((len(target), 1), theirs.config.decoder_start_token_id)
    with torch.no_grad():
        states = torch.cat([theirs.get_encoder()(input_ids=torch.from_numpy(part)).last_hidden_state for part in parts], 1)
        inputs = torch.cat([start, torch.from_numpy(target[:, :-1])], 1)
        expected = theirs(encoder_outputs=(states,), decoder_input_ids=inputs).logits.numpy()
    stream = Stream(mt.load(tmp_path / "theirs"), mt.memory(memory), len(target))
    stream.read(parts[0], np.full(len(target), parts[0].shape[1]))
    stream.open(parts[1], np.full(len(target), parts[1].shape[1]), target)
    found = stream.logits(stream.decode(target, np.full(len(target), target.shape[1])))
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("variant", ["t5-v1.1", "bart", "roberta", "gpt2", "llama-llama3"])
def test_what_transformers_saves_in_halves_and_shards(peers, variant, dtype, tmp_path):
    """Computed in float32 by both, from the rounded weights."""
    import torch

    theirs = peers.make(variant, tmp_path / "whole").to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "halves", max_shard_size="20KB")
    assert (tmp_path / "halves" / "model.safetensors.index.json").exists()
    expected = peers.outputs(variant, peers.read(variant, tmp_path / "halves", dtype=torch.float32))
    found = outputs(mt.load(tmp_path / "halves"), peers.N_NEW)
    for name in found.keys() - {"greedy"}:
        assert relative_error(found[name], expected[name]) < 1e-5, name
    np.testing.assert_array_equal(found.get("greedy", 0), expected.get("greedy", 0))


@pytest.mark.parametrize("variant", ["t5", "t5-v1.1", "bart", "marian", "bert", "gpt2", "llama", "qwen3", "gemma2-capped", "gemma3"])
def test_the_same_attention_and_states_on_the_way(peers, variant, tmp_path):
    import torch
    from published import samples

    theirs, kind = peers.make(variant, tmp_path / "theirs"), VARIANTS[variant][1]
    model = mt.load(tmp_path / "theirs")
    source, lengths, inputs = samples(model.config.vocab_size)
    mask = torch.from_numpy((np.arange(source.shape[1]) < lengths[:, None]).astype(np.int64))
    asked = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        if kind == "decoder":
            expected = theirs(input_ids=torch.from_numpy(inputs), **asked)
            pairs = {"decoder_attentions": expected.attentions, "decoder_hidden_states": expected.hidden_states}
        elif kind == "encoder":
            expected = theirs(input_ids=torch.from_numpy(source), attention_mask=mask, **asked)
            pairs = {"encoder_attentions": expected.attentions, "encoder_hidden_states": expected.hidden_states}
        else:
            expected = theirs(input_ids=torch.from_numpy(source), attention_mask=mask, decoder_input_ids=torch.from_numpy(inputs), **asked)
            names = ("encoder_attentions", "encoder_hidden_states", "decoder_attentions", "decoder_hidden_states", "cross_attentions")
            pairs = {name: getattr(expected, name) for name in names}
    found = model.look_inside(None if kind == "decoder" else source, None if kind == "encoder" else inputs, lengths)
    for name, layers in pairs.items():
        ours = getattr(found, name)
        assert len(ours) == len(layers)
        for a, e in zip(ours, layers, strict=True):
            keep = (slice(None), slice(None), slice(0, lengths[1])) if name == "encoder_attentions" else (slice(None), slice(0, lengths[1]))
            if not name.startswith("encoder"):
                keep = ()
            assert relative_error(a[keep], e.numpy()[keep]) < 1e-5, name


@pytest.mark.parametrize("variant", ["t5", "llama"])
def test_the_same_attention_and_states_of_what_is_generated(peers, variant, tmp_path):
    import torch
    from published import samples

    theirs = peers.make(variant, tmp_path / "theirs")
    model, (source, *_) = mt.load(tmp_path / "theirs"), samples(79)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "output_attentions": True, "output_hidden_states": True}
    more = {"do_sample": False, "use_cache": False, "return_dict_in_generate": True, "pad_token_id": 0}
    expected = theirs.generate(torch.from_numpy(source[:1]), **more, **options)
    found = model.generate(source[:1], output_scores=True, **options)
    assert found.sequences[0] == expected.sequences[0].tolist()[-6:]
    if variant == "t5":
        steps = {"cross_attentions": expected.cross_attentions, "decoder_attentions": expected.decoder_attentions,
                 "decoder_hidden_states": expected.decoder_hidden_states}  # fmt: skip
        for name in ("encoder_attentions", "encoder_hidden_states"):
            for a, e in zip(getattr(found, name)[0], getattr(expected, name), strict=True):
                assert relative_error(a, e[0].numpy()) < 1e-5
    else:
        steps = {"decoder_attentions": expected.attentions, "decoder_hidden_states": expected.hidden_states}
    for name, each in steps.items():
        assert len(each) == 6
        for layer, ours in enumerate(getattr(found, name)[0]):
            for step in each:  # without a cache each has all queries so far
                e = step[layer][0].numpy()
                keys = e.shape[-1]
                assert relative_error(ours[..., : e.shape[-2], :keys], e) < 1e-5, name
            assert ours.shape == e.shape
