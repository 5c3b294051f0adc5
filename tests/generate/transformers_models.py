"""Small random models that mini_tfm and Transformers both have: the same weights under other names."""

import itertools

import numpy as np
from variants import tiny_model

SIZES = {"vocab_size": 40, "d_model": 64, "n_heads": 4, "d_ff": 96, "n_decoder_layers": 2}
KINDS = ("t5", "gpt2")
ENDS = [2, 5, 9, 11, 17]  # several tokens end a sequence, so that many do

GRID = itertools.product((2, 4, 5), (1.0, 0.0, -1.0, 2.0), (False, True, "never"), (1, 2))
NAMES = ("num_beams", "length_penalty", "early_stopping", "num_return_sequences")
BEAMS = [{"max_new_tokens": 12, **dict(zip(NAMES, given, strict=True))} for given in GRID] + [{"max_new_tokens": 12}]


def ours(kind):
    if kind == "t5":
        fields = {**SIZES, "relative_buckets": 8, "relative_max_distance": 20, "tie_embeddings": True, "norm_eps": 1e-6}
        return tiny_model("t5", seed=4, dtype=np.float32, **fields)
    fields = {"positions": "learned", "max_positions": 64, "activation": "gelu_tanh", "embedding_scale": False}
    return tiny_model("decoder only", seed=4, dtype=np.float32, **SIZES, **fields)


def theirs(kind):
    """The same model, made of `ours`."""
    model = ours(kind)
    return (_t5 if kind == "t5" else _gpt2)(model.config, model.weights)


def inputs(kind, seed=0):
    """Token ids (5, 7) and their lengths."""
    rng = np.random.default_rng(seed)
    return rng.integers(20, SIZES["vocab_size"], (5, 7)), np.array([7, 3, 1, 5, 7])


def _tensors(names, weights):
    import torch

    return {name: torch.from_numpy(np.ascontiguousarray(value(weights))) for name, value in names.items()}


def _loaded(model, state):
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert not [name for name in missing if "embed_tokens" not in name and ".attn.bias" not in name and "lm_head" not in name], missing
    return model.eval()


def _of(name, transposed=False):
    return lambda weights: weights[name].T if transposed else weights[name]


def _t5(config, weights):
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=config.vocab_size,
            d_model=config.d_model,
            d_kv=config.d_head,
            d_ff=config.d_ff,
            num_layers=config.n_encoder_layers,
            num_decoder_layers=config.n_decoder_layers,
            num_heads=config.n_heads,
            relative_attention_num_buckets=config.relative_buckets,
            relative_attention_max_distance=config.relative_max_distance,
            dropout_rate=0.0,
            layer_norm_epsilon=config.norm_eps,
            feed_forward_proj="relu",
            tie_word_embeddings=False,  # they are tied all the same; without it, the output is scaled
            pad_token_id=config.pad_id,
            eos_token_id=config.eos_id,
            decoder_start_token_id=config.bos_id,
        )
    )
    names = {name: _of("embedding.weight") for name in ("shared.weight", "lm_head.weight")}
    for stack, layers in (("encoder", config.n_encoder_layers), ("decoder", config.n_decoder_layers)):
        names[f"{stack}.embed_tokens.weight"] = _of("embedding.weight")
        names[f"{stack}.final_layer_norm.weight"] = _of(f"{stack}.norm.weight")
        names[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = _of(f"{stack}.relative_bias.weight")
        for i in range(layers):
            parts = [("attention", "SelfAttention")] + ([("cross", "EncDecAttention")] if stack == "decoder" else [])
            for at, (part, name) in enumerate(parts):
                layer = f"{stack}.block.{i}.layer.{at}."
                names[layer + "layer_norm.weight"] = _of(f"{stack}.{i}.{part}_norm.weight")
                for one in "qkvo":
                    names[f"{layer}{name}.{one}.weight"] = _of(f"{stack}.{i}.{part}.{one}.weight", True)
            layer = f"{stack}.block.{i}.layer.{len(parts)}."
            names[layer + "layer_norm.weight"] = _of(f"{stack}.{i}.feed_forward_norm.weight")
            names[layer + "DenseReluDense.wi.weight"] = _of(f"{stack}.{i}.feed_forward.in.weight", True)
            names[layer + "DenseReluDense.wo.weight"] = _of(f"{stack}.{i}.feed_forward.out.weight", True)
    return _loaded(model, _tensors(names, weights))


def _gpt2(config, weights):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.max_positions,
            n_embd=config.d_model,
            n_layer=config.n_decoder_layers,
            n_head=config.n_heads,
            n_inner=config.d_ff,
            activation_function="gelu_new",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            layer_norm_epsilon=config.norm_eps,
            pad_token_id=config.pad_id,
            bos_token_id=config.bos_id,
            eos_token_id=config.eos_id,
        )
    )

    def joined(name, kind):
        return lambda weights: np.concatenate([weights[f"{name}.{part}.{kind}"] for part in "qkv"], axis=-1)

    names = {
        "transformer.wte.weight": _of("embedding.weight"),
        "lm_head.weight": _of("embedding.weight"),
        "transformer.wpe.weight": _of("decoder.positions.weight"),
    }
    for kind in ("weight", "bias"):
        names[f"transformer.ln_f.{kind}"] = _of(f"decoder.norm.{kind}")
        for i in range(config.n_decoder_layers):
            layer, mine = f"transformer.h.{i}.", f"decoder.{i}."
            names[f"{layer}ln_1.{kind}"] = _of(f"{mine}attention_norm.{kind}")
            names[f"{layer}ln_2.{kind}"] = _of(f"{mine}feed_forward_norm.{kind}")
            names[f"{layer}attn.c_attn.{kind}"] = joined(mine + "attention", kind)
            names[f"{layer}attn.c_proj.{kind}"] = _of(f"{mine}attention.o.{kind}")
            names[f"{layer}mlp.c_fc.{kind}"] = _of(f"{mine}feed_forward.in.{kind}")
            names[f"{layer}mlp.c_proj.{kind}"] = _of(f"{mine}feed_forward.out.{kind}")
    return _loaded(model, _tensors(names, weights))


def generated(model, kind, source, lengths, **options):
    """What Transformers generates: (sequences without eos and what follows it, the scores of beams or None), B lists of lists."""
    import torch

    config = model.config
    n = options.get("num_return_sequences", 1)
    ends = options.setdefault("eos_token_id", ENDS)
    if kind == "t5":
        ids, mask = source.copy(), np.arange(source.shape[1]) < lengths[:, None]
    else:  # bos, the prompt, all at the right end
        ids = np.full((len(source), source.shape[1] + 1), config.pad_token_id)
        mask = np.zeros(ids.shape, bool)
        for row, new, length in zip(range(len(ids)), source, lengths, strict=True):
            ids[row, -length - 1 :] = [config.bos_token_id, *new[:length]]
            mask[row, -length - 1 :] = True
    found = model.generate(
        torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask.astype(np.int64)),
        pad_token_id=config.pad_token_id,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    start = 1 if kind == "t5" else ids.shape[1]
    rows = [row[start:].tolist() for row in found.sequences]
    rows = [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in rows]
    scores = getattr(found, "sequences_scores", None)
    grouped = [rows[i : i + n] for i in range(0, len(rows), n)]
    return grouped, None if scores is None else scores.reshape(-1, n).tolist()
