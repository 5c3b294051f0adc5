"""The memories of plugins/ that papers describe: each keeps the contract at every site where it makes sense, alone and in a stack."""

import pytest

import mini_tfm as mt
from mini_tfm.errors import InvalidValue
from mini_tfm.testing import CHECKS, check_memory
from mini_tfm.testing.trial import KINDS
from mini_tfm.text.tokenizers import ByteTokenizer

TRAINED = {"empty_is_nothing"}  # rows that are there before anything was read

# Text -> the checks that do not apply.
ALONE: dict[str, set[str]] = {
    "h2o:size=7,sinks=1": set(),
    "tova:size=7": set(),
    "snapkv:size=7,recent=2,pool=3": set(),
    "knorm:size=7": set(),
    "keydiff:size=7": set(),
    "infini": set(),
    "gated_delta": set(),
    "titans:chunk=2": set(),
    "titans:depth=2,chunk=3": set(),
    "knn:top_k=3": set(),
    "knn_lm:top_k=3": set(),
    "passages:size=5,top_k=2,query=5": set(),
    "compressive:size=4,rate=2": set(),
    "exchange:size=7,top_k=2,promote=2,half_life=9": set(),
    "armt:tokens=2,d_key=3": set(),
    "prefix:tokens=3": TRAINED,
    "product_keys:n=4,top_k=2": TRAINED,
}
ELSEWHERE = {
    "h2o:size=7,sinks=1,site=all": set(),
    "tova:size=7,site=all,gradient=none": set(),
    "snapkv:size=7,recent=2,site=encoder": set(),
    "knorm:size=7,site=decoder": set(),
    "keydiff:size=7,site=decoder,gradient=none": set(),
    "infini:rule=linear,site=decoder": set(),
    "gated_delta:site=decoder": set(),
    "titans:chunk=3,site=decoder": set(),
    "knn:top_k=3,size=8,layer=0,site=decoder,gradient=none": set(),
    "compressive:size=4,rate=3,how=max,site=all": set(),
    "exchange:size=9,top_k=3,promote=2,same=0.5,site=encoder": set(),
    "exchange:size=9,top_k=3,promote=2,site=decoder,gradient=none": set(),
    "compressive:size=4,rate=2,how=conv,site=decoder": set(),
    "armt:tokens=2,d_key=3,site=decoder": set(),
    "prefix:tokens=3,site=all": TRAINED,
    "product_keys:n=3,top_k=3,layer=0,site=decoder": TRAINED,
    "product_keys:n=3,top_k=3,site=encoder": TRAINED,
}
STACKS = [
    "window:size=4,site=decoder+h2o:size=6,site=decoder,sinks=1",
    "h2o:size=6,sinks=1+store:top_k=3",
    "window:size=4,site=decoder+infini:site=decoder",
    "window:size=4,site=decoder+titans:site=decoder",
    "window:size=4,site=decoder+gated_delta:site=decoder",
    "window:size=4,site=decoder+knn:top_k=3,site=decoder",
    "window:size=4+knn_lm:top_k=3",
    "window:size=4+compressive:size=4,rate=2,how=conv",
    "window:size=4+compressive:size=4,rate=2,how=conv,loss=attention",
    "window:size=4+exchange:size=6,top_k=2,promote=2+store:top_k=2",
    "prefix:tokens=2+window:size=4",
    "armt:tokens=2,d_key=3+recurrent:tokens=2",
]


# Of those that have their code in common, one at each change.
LONG = {"tova:size=7", "snapkv:size=7,recent=2,pool=3", "knorm:size=7", "gated_delta", "titans:depth=2,chunk=3", "product_keys:n=4,top_k=2"}


@pytest.mark.usefixtures("short_streams")
@pytest.mark.parametrize("text", [pytest.param(text, marks=[pytest.mark.long] * (text in LONG)) for text in ALONE])
def test_it_keeps_the_contract(text):
    check_memory(text, skip=ALONE[text])


@pytest.mark.long
@pytest.mark.parametrize("text", ALONE)
def test_long_streams_are_read_as_well_as_short_ones(text):
    check_memory(text, only=["long_streams"])


@pytest.mark.long
@pytest.mark.parametrize("text", ELSEWHERE)
def test_it_keeps_the_contract_at_other_sites(text):
    check_memory(text, skip=ELSEWHERE[text])


@pytest.mark.long
@pytest.mark.parametrize("text", {**ALONE, **ELSEWHERE})
def test_it_keeps_the_contract_where_heads_share_their_keys(text, monkeypatch):
    for fields in KINDS.values():
        monkeypatch.setitem(fields, "n_kv_heads", 1)
    checked = {"runs", "keeps_the_dtype", "padding_is_ignored", "generation_equals_reading", "rows_are_independent", "gradients_are_right"}
    check_memory(text, skip=set(CHECKS) - checked | {**ALONE, **ELSEWHERE}[text])


@pytest.mark.parametrize("text", [*ALONE, "window:size=4+compressive:size=4,rate=2,how=conv"])
def test_it_comes_back_with_the_model(text, tmp_path):
    """From its folder, to the same answers; beams take it along."""
    config = mt.Config(
        vocab_size=259, d_model=16, n_heads=2, n_encoder_layers=0, n_decoder_layers=1, d_ff=32, segment_length=12, positions="rotary"
    )
    pipe = mt.Pipeline(mt.Transformer(config, seed=0), ByteTokenizer(), mt.memory(text))
    pipe.model.add_memory_weights(pipe.memory)
    pipe.save(tmp_path / "model")
    answers = []
    for each in (pipe, mt.Pipeline.load(tmp_path / "model")):
        each.read("What was read is asked for later, a few segments on.")
        answers.append([each.generate("asked", max_new_tokens=8, num_beams=beams) for beams in (1, 3)])
    assert answers[0] == answers[1]


@pytest.mark.usefixtures("short_streams")
@pytest.mark.parametrize("text", [STACKS[0], *(pytest.param(text, marks=pytest.mark.long) for text in STACKS[1:])])
def test_it_stands_in_a_stack(text):
    stopped = {"gradients_are_right"} if "loss=attention" in text else set()  # by the paper's loss, on purpose
    check_memory(text, skip=stopped | (TRAINED if "prefix" in text else set()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h2o:size=8,recent=4,sinks=4", r"size: expected more than recent \+ sinks = 8 rows, or there is no choice, got 8"),
        ("tova:recent=-1", "recent: expected a number of rows of at least 0, got -1"),
        ("keydiff:sinks=-1", "sinks: expected a number of rows of at least 0, got -1"),
        ("snapkv:pool=4", "pool: expected an odd number of rows, got 4"),
        ("knorm:site=cross", "site: expected encoder or decoder"),
        ("keydiff:site=all", "site: expected encoder or decoder"),
        ("h2o:size=0", "size: expected a number of rows of at least 1, got 0"),
        ("compressive:size=4,rate=5", "rate: expected a number of rows from 1 to size = 4, got 5"),
        ("compressive:rate=0", "rate: expected a number of rows from 1 to size = 512, got 0"),
        ("compressive:how=most", "how: expected mean, max or conv, got 'most'"),
        ("knn:top_k=0", "top_k: expected a number of rows of at least 1, got 0"),
        ("knn:size=0", "size: expected a number of rows of at least 1, got 0"),
        ("knn:site=cross", "site: expected encoder or decoder"),
        ("knn:gradient=all", "gradient: expected none or rows, got 'all'"),
        ("knn_lm:top_k=0", "top_k: expected a number of rows of at least 1, got 0"),
        ("knn_lm:share=1.0", "share: expected a number between 0 and 1, got 1.0"),
        ("knn_lm:temperature=0.0", "temperature: expected a number above 0, got 0.0"),
        ("exchange:size=0", "size: expected a number of rows of at least 1, got 0"),
        ("exchange:promote=-1", "promote: expected a number of rows of at least 0, got -1"),
        ("exchange:same=0.0", "same: expected a number above 0, got 0.0"),
        ("exchange:half_life=-1.0", "half_life: expected a number above 0, got -1.0"),
        ("exchange:site=all", "site: expected one of encoder, decoder, cross, got 'all'"),
        ("exchange:gradient=all", "gradient: expected none or rows, got 'all'"),
        ("infini:rule=sum", "rule: expected linear or delta, got 'sum'"),
        ("infini:site=cross", "site: expected encoder or decoder"),
        ("gated_delta:site=all", "site: expected encoder or decoder"),
        ("titans:depth=3", "depth: expected 1 or 2, got 3"),
        ("titans:chunk=0", "chunk: expected a number of tokens of at least 1, got 0"),
        ("prefix:tokens=0", "tokens: expected a number of rows of at least 1, got 0"),
        ("prefix:site=top", "site: expected encoder, decoder, cross or all, got 'top'"),
        ("product_keys:n=0", "n: expected a number of at least 1, got 0"),
        ("product_keys:n=4,top_k=5", "top_k: expected at most n = 4, got 5"),
        ("product_keys:site=all", "site: expected one of encoder, decoder, cross, got 'all'"),
    ],
)
def test_what_makes_no_sense_is_refused(text, message):
    with pytest.raises(InvalidValue, match=message):
        mt.memory(text)
