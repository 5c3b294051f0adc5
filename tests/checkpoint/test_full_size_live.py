"""Published architectures at their real size beside Transformers, where it is installed (extra `peers`). The weights are random."""

import numpy as np
import pytest
from published import relative_error

import mini_tfm as mt
from mini_tfm.autodiff import value_of
from mini_tfm.stream import Stream

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]  # Transformers' and PyTorch's own
N_INPUTS, BATCH, LENGTH, N_NEW = 200, 20, 40, 8
_BART = {"encoder_layers": 6, "decoder_layers": 6, "max_position_embeddings": 512}
SHAPES = {
    "T5-small": ("t5", {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "vocab_size": 32128, "decoder_start_token_id": 0}),
    "Marian": (
        "marian",
        _BART
        | {"vocab_size": 58101, "d_model": 512, "encoder_attention_heads": 8, "decoder_attention_heads": 8, "encoder_ffn_dim": 2048}
        | {"decoder_ffn_dim": 2048, "pad_token_id": 58100, "decoder_start_token_id": 58100, "scale_embedding": True}
        | {"activation_function": "swish", "eos_token_id": 0, "forced_eos_token_id": 0, "static_position_embeddings": True},
    ),
    "BART-base": (
        "bart",
        _BART
        | {"vocab_size": 50265, "d_model": 768, "encoder_attention_heads": 12, "decoder_attention_heads": 12, "encoder_ffn_dim": 3072}
        | {"decoder_ffn_dim": 3072, "max_position_embeddings": 1024},
    ),
    "MiniLM": ("bert", {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}),
    "Llama of 135 M": (
        "llama",
        {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}
        | {"vocab_size": 49152, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    ),
}


def made(kind, fields, folder):
    """A model of Transformers with random weights, saved, which must not be so even that all tokens are as good."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(kind, **fields)
    torch.manual_seed(0)
    auto = {"bert": transformers.AutoModel, "llama": transformers.AutoModelForCausalLM}.get(kind, transformers.AutoModelForSeq2SeqLM)
    model = auto.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if kind == "marian" and "embed_positions" in name:
                continue  # sinusoids, which no checkpoint changes
            if parameter.ndim > 1:
                parameter.mul_(2.0)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def batches(vocab_size):
    """(B, S) ids and lengths (B,): 200 inputs of 1 to LENGTH tokens."""
    rng = np.random.default_rng(0)
    for _ in range(N_INPUTS // BATCH):
        lengths = rng.integers(1, LENGTH + 1, BATCH)
        yield rng.integers(3, vocab_size - 1, (BATCH, lengths.max())), lengths


def after_each(model, ids):
    """(T, V) scores of a decoder after each of the ids."""
    stream = Stream(model, None, 1)
    stream.last = ids[:1].astype(np.int64)
    stream.open(None, np.array([len(ids)]))
    return value_of(stream.logits(stream.decode(np.roll(ids, -1)[None], np.array([len(ids)]))))[0]


def same_tokens(scores, ours, theirs, theirs_at):
    """Tokens (B, N) are equal but where the peer's own two best scores are nearly the same; behind that each goes its own way."""
    for row, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if parts := [i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]]:
            best = np.sort(scores[parts[0]][row][np.isfinite(scores[parts[0]][row])])
            assert best[-1] - best[-2] < 1e-3, (theirs_at, row, parts[0])


@pytest.mark.parametrize("name", SHAPES)
def test_two_hundred_inputs_give_what_transformers_gives(name, tmp_path):
    kind, fields = SHAPES[name]
    theirs = made(kind, fields, tmp_path)
    ours = mt.load(tmp_path)
    import torch

    for ids, lengths in batches(ours.config.vocab_size):
        given, mask = torch.from_numpy(ids), torch.from_numpy(np.arange(ids.shape[1]) < lengths[:, None]).long()
        with torch.no_grad():
            if ours.config.has_encoder:
                states = (theirs if kind == "bert" else theirs.get_encoder())(input_ids=given, attention_mask=mask).last_hidden_state
                whole = states.numpy() * mask.numpy()[..., None]
                assert relative_error(ours.encode(ids, lengths), whole) < 1e-4
            if kind == "bert":
                continue
            options = {"max_new_tokens": N_NEW, "do_sample": False, "num_beams": 1, "output_scores": True, "return_dict_in_generate": True}
            if kind == "llama":  # Transformers pads in front what it generates from
                for row, n in zip(ids[:4], lengths[:4], strict=True):
                    logits = theirs(torch.from_numpy(row[:n])[None]).logits[0].numpy()
                    assert relative_error(after_each(ours, row[:n]), logits) < 1e-4
                    out = theirs.generate(torch.from_numpy(row[:n])[None], eos_token_id=-1, pad_token_id=0, **options)
                    made_here = ours.generate(row[None, :n], max_new_tokens=N_NEW, stop_at_eos=False)
                    same_tokens([s.numpy() for s in out.scores], made_here, out.sequences[:, n:].numpy(), name)
                continue
            target = np.random.default_rng(1).integers(3, ours.config.vocab_size - 1, (BATCH, 6))
            start = np.full((BATCH, 1), theirs.config.decoder_start_token_id)
            inputs = torch.from_numpy(np.concatenate([start, target[:, :-1]], axis=1))
            logits = theirs(input_ids=given, attention_mask=mask, decoder_input_ids=inputs).logits.numpy()
            assert relative_error(ours.logits(ids, target, lengths), logits) < 1e-4
            out = theirs.generate(given, attention_mask=mask, **options)
            made_here = ours.generate(ids, lengths, max_new_tokens=N_NEW)
            same_tokens([s.numpy() for s in out.scores], made_here, out.sequences[:, 1:].numpy(), name)
