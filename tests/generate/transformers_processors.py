"""Processors, each with its counterpart of Transformers, and logits to try them on."""

import numpy as np

from mini_tfm.generate import penalties, sampling

N_IDS, N_PROMPT, MAX_LENGTH, EOS = 30, 4, 10, [2, 5]
SOURCE = np.random.default_rng(8).integers(0, 6, 40)
BIASES = {(3,): 1.5, (4, 7): -2.0, (1, 2, 3): 3.0, (0, 1): float("-inf"), (2, 3): 0.25}
BAD_WORDS = [[7], [1, 2], [2], [3, 3, 3]]


def allowed(number, ids):
    return [(7 * int(ids[-1]) + i) % N_IDS for i in range(3)]


# name -> (ours, theirs: a function of Transformers' module logits_process)
PROCESSORS = {
    "temperature": (sampling.Temperature(0.7), lambda lp: lp.TemperatureLogitsWarper(0.7)),
    "top_k": (sampling.TopK(5), lambda lp: lp.TopKLogitsWarper(5)),
    "top_k, keep": (sampling.TopK(1, 3), lambda lp: lp.TopKLogitsWarper(1, min_tokens_to_keep=3)),
    "top_k of all": (sampling.TopK(99), lambda lp: lp.TopKLogitsWarper(99)),
    "top_p": (sampling.TopP(0.7), lambda lp: lp.TopPLogitsWarper(0.7)),
    "top_p, small": (sampling.TopP(0.01), lambda lp: lp.TopPLogitsWarper(0.01)),
    "top_p, keep": (sampling.TopP(0.2, 3), lambda lp: lp.TopPLogitsWarper(0.2, min_tokens_to_keep=3)),
    "min_p": (sampling.MinP(0.2), lambda lp: lp.MinPLogitsWarper(0.2)),
    "min_p, keep": (sampling.MinP(0.9, 3), lambda lp: lp.MinPLogitsWarper(0.9, min_tokens_to_keep=3)),
    "typical_p": (sampling.Typical(0.6), lambda lp: lp.TypicalLogitsWarper(0.6)),
    "typical_p, keep": (sampling.Typical(0.1, 3), lambda lp: lp.TypicalLogitsWarper(0.1, min_tokens_to_keep=3)),
    "epsilon_cutoff": (sampling.EpsilonCutoff(0.03), lambda lp: lp.EpsilonLogitsWarper(0.03)),
    "epsilon_cutoff, keep": (sampling.EpsilonCutoff(0.5, 3), lambda lp: lp.EpsilonLogitsWarper(0.5, min_tokens_to_keep=3)),
    "eta_cutoff": (sampling.EtaCutoff(0.05), lambda lp: lp.EtaLogitsWarper(0.05)),
    "eta_cutoff, keep": (sampling.EtaCutoff(0.9, 3), lambda lp: lp.EtaLogitsWarper(0.9, min_tokens_to_keep=3)),
    "repetition_penalty": (penalties.RepetitionPenalty(1.7), lambda lp: lp.RepetitionPenaltyLogitsProcessor(1.7)),
    "no_repeat_ngram_size 1": (penalties.NoRepeatNGram(1), lambda lp: lp.NoRepeatNGramLogitsProcessor(1)),
    "no_repeat_ngram_size 2": (penalties.NoRepeatNGram(2), lambda lp: lp.NoRepeatNGramLogitsProcessor(2)),
    "no_repeat_ngram_size 3": (penalties.NoRepeatNGram(3), lambda lp: lp.NoRepeatNGramLogitsProcessor(3)),
    "no_repeat_ngram_size 20": (penalties.NoRepeatNGram(20), lambda lp: lp.NoRepeatNGramLogitsProcessor(20)),
    **{
        f"encoder_no_repeat_ngram_size {n}": (
            penalties.EncoderNoRepeatNGram(n, [SOURCE] * 200),
            lambda lp, n=n: lp.EncoderNoRepeatNGramLogitsProcessor(n, _tensor(SOURCE)),
        )
        for n in (1, 2, 3, 12)
    },
    "sequence_bias": (
        penalties.SequenceBias(list(BIASES.items())),
        lambda lp: lp.SequenceBiasLogitsProcessor([[list(ids), bias] for ids, bias in BIASES.items()]),
    ),
    "bad_words_ids": (
        penalties.SequenceBias([(tuple(ids), -np.inf) for ids in BAD_WORDS if ids != [2]]),
        lambda lp: lp.NoBadWordsLogitsProcessor(BAD_WORDS, EOS),
    ),
    "min_length": (penalties.Suppressed(EOS, range(6)), lambda lp: lp.MinLengthLogitsProcessor(6, EOS)),
    "min_new_tokens": (
        penalties.Suppressed(EOS, range(N_PROMPT + 2)),
        lambda lp: lp.MinNewTokensLengthLogitsProcessor(N_PROMPT, 2, EOS),
    ),
    "prefix_allowed_tokens_fn": (penalties.Allowed(allowed, "allowed"), lambda lp: lp.PrefixConstrainedLogitsProcessor(allowed, 1)),
    "forced_bos_token_id": (penalties.Forced([6], 1), lambda lp: lp.ForcedBOSTokenLogitsProcessor(6)),
    "forced_eos_token_id": (penalties.Forced(EOS, MAX_LENGTH - 1), lambda lp: lp.ForcedEOSTokenLogitsProcessor(MAX_LENGTH, EOS)),
    "suppress_tokens": (penalties.Suppressed([3, 29]), lambda lp: lp.SuppressTokensLogitsProcessor([3, 29])),
    "begin_suppress_tokens": (
        penalties.Suppressed([3, 29], range(N_PROMPT, N_PROMPT + 1)),
        lambda lp: lp.SuppressTokensAtBeginLogitsProcessor([3, 29], N_PROMPT),
    ),
}
# These cut between equal scores: ours take the lower id first, Transformers' whichever an unstable sort puts first.
CUT_EQUALS = [name for name in PROCESSORS if name.startswith("top_p") or name in ("min_p, keep", "typical_p, keep")]


def _tensor(array):
    import torch

    return torch.from_numpy(np.asarray(array)[None])


def trials(n):
    """(ids (n, length), logits (n, N_IDS)) of several lengths; of a third the logits are equal to each other here and there, and of
    another third most are far below the rest."""
    rng = np.random.default_rng(n)
    for length in (1, 2, N_PROMPT, 6, MAX_LENGTH - 1, MAX_LENGTH, 16):
        logits = rng.normal(0, 2, (n, N_IDS)).astype(np.float32)
        logits[::3] = np.round(logits[::3])
        logits[1::3] = np.where(rng.random((len(logits[1::3]), N_IDS)) < 0.8, logits[1::3] - 30, logits[1::3])
        yield rng.integers(0, 6, (n, length)), logits


def ours(name, ids, logits):
    return PROCESSORS[name][0](ids, logits, np.arange(len(ids)))


def theirs(name, ids, logits):
    import torch
    from transformers.generation import logits_process

    return PROCESSORS[name][1](logits_process)(torch.from_numpy(ids), torch.from_numpy(logits.copy())).numpy()
