"""`mini-tfm train` on files of every kind: what is read, which objectives it makes, what a resumed run takes and refuses."""

import json

import pytest
from commands import TINY_OPTIONS

import mini_tfm as mt
from mini_tfm.cli.training_data import parse_curriculum, parse_objective, plan_streams
from mini_tfm.data import open_token_cache
from mini_tfm.errors import InvalidValue
from mini_tfm.transformer import load_checkpoint

at = TINY_OPTIONS.index("--n-segments")
OPTIONS = TINY_OPTIONS[:at] + TINY_OPTIONS[at + 2 :]  # it is a matter of --curriculum, too


@pytest.fixture
def data(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"This is line {i} of a text.\n" for i in range(80)))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"body": f"A story of {i} words. " * (1 + i % 5)}) + "\n" for i in range(40)))
    (tmp_path / "pairs.tsv").write_text("".join(f"how much is {i} and one\t{i + 1}\n" for i in range(60)))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({"source": f"q {i}", "target": f"a {i}"}) + "\n" for i in range(60)))
    return tmp_path


@pytest.fixture
def train(run, data):
    def train(*words, steps=4, out="m"):
        files = [word for name in words[0].split() for word in ("--text", data / name)]
        return run("train", *files, "--out", data / out, *OPTIONS, "--steps", steps, *words[1:])

    return train


def weights(folder):
    return {name: w.tobytes() for name, w in load_checkpoint(folder).model.weights.items()}


def about(data, out="m"):
    return json.loads((data / out / "training_data.json").read_text())


@pytest.mark.parametrize(
    ("words", "objective", "has_bits"),
    [
        (("text.txt",), {"next-segment": 1}, True),
        (("text.txt", "--n-encoder-layers", 0), {"lm": 1}, True),
        (("text.txt", "--documents", "line"), {"next-segment": 1}, True),
        (("text.jsonl", "--field", "body"), {"next-segment": 1}, True),
        (("pairs.tsv",), {"pairs": 1}, True),
        (("pairs.jsonl",), {"pairs": 1}, True),
        (("pairs.jsonl", "--field", "source"), {"next-segment": 1}, True),
        (("pairs.tsv", "--n-encoder-layers", 0), {"pairs": 1}, True),
        (("text.txt", "--objective", "denoise"), {"denoise": 1}, False),
        (("text.txt pairs.tsv pairs.jsonl",), {"next-segment": 1, "pairs": 1}, True),
        (("text.txt pairs.tsv", "--objective", "denoise=0.5+pairs=1.5"), {"denoise": 0.5, "pairs": 1.5}, False),
        (("text.txt", "--objective", "lm+denoise=3", "--n-encoder-layers", 0), {"lm": 1, "denoise": 3}, False),
        (("text.txt", "--objective", "denoise", "--tokenizer", "bpe", "--vocab-size", 300), {"denoise": 1}, False),
    ],
)
def test_every_kind_of_file_and_objective(train, run, data, words, objective, has_bits):
    said = train(*words, "--json")
    answer = said.json
    assert answer["steps"] == 4 and answer["held_out_loss"] > 0 and (answer["held_out_bits_per_byte"] is not None) == has_bits
    assert about(data)["objective"] == objective
    saved = load_checkpoint(data / "m")
    more = {"denoise": 2}.get("denoise" if "denoise" in objective else "", 0)  # of 16 tokens one span is left out
    assert saved.model.config.vocab_size == saved.tokenizer.vocab_size + more
    assert run("generate", data / "m", "This", "--max-new-tokens", 4).code == 0


def test_text_of_less_than_a_segment_is_warned_of(train, data):
    (data / "little.txt").write_text("a b\n\nc d\n\ne f\n")
    said = train("little.txt")
    assert said.code == 0 and "tokens are less than a segment of" in said.err
    assert "less than a segment" not in train("text.txt", out="enough").err


def test_with_a_cache_it_is_the_same_run(train, data, run):
    assert train("text.jsonl", "--field", "body", out="ram").code == 0
    for out in ("new", "again"):
        assert train("text.jsonl", "--field", "body", "--cache", data / "some" / "cache", out=out).code == 0
        assert weights(data / out) == weights(data / "ram")
    assert [path.name for path in (data / "some" / "cache").iterdir()] == ["texts.tokens"]
    assert len(open_token_cache(data / "some" / "cache" / "texts.tokens")) == 40
    assert train("text.txt", "--cache", data / "plain", out="plain").code == 0


@pytest.mark.parametrize("cache", [False, True])
def test_a_run_stopped_and_resumed_is_the_run_that_was_not(train, run, data, cache):
    words = ("text.txt pairs.tsv", "--objective", "next-segment=2+pairs", "--curriculum", "0:1,3:2,5:3", "--memory", "recurrent:tokens=2")
    words += ("--schedule", "constant", "--warmup-steps", 0, *(("--cache", data / "cache") if cache else ()))
    assert train(*words, steps=8, out="whole").code == 0 and about(data, "whole")["n_segments"] == 3
    for first in (2, 4):
        out = f"cut{first}"
        assert train(*words, steps=first, out=out).code == 0
        assert run("train", "--resume", data / out, "--steps", 8).code == 0
        assert weights(data / out) == weights(data / "whole")


def test_changed_text_is_refused_unless_asked(train, run, data):
    for out, words in (("plain", ("text.txt",)), ("cached", ("text.jsonl", "--field", "body", "--cache", data / "cache"))):
        assert train(*words, out=out).code == 0
    (data / "text.txt").write_text("Another text.\n" * 80)
    (data / "text.jsonl").write_text('{"body": "Another text, quite another one."}\n' * 50)
    for out in ("plain", "cached"):
        before = weights(data / out)
        refused = run("train", "--resume", data / out, "--steps", 6)
        assert refused.code == 2 and "the text has changed" in refused.err and "--accept-changes" in refused.err
        assert refused.err.count("\n") == 1 and weights(data / out) == before
        assert run("train", "--resume", data / out, "--steps", 6, "--accept-changes", "--json").json["steps"] == 6
        assert run("train", "--resume", data / out, "--steps", 7).code == 0, "what was accepted is what it is now"
    assert len(open_token_cache(data / "cache" / "texts.tokens")) == 50


def test_other_batches_of_the_same_text_are_refused_unless_asked(train, run, data):
    """What the folder says of them has changed; a folder of version 0.1.0 is of streams from random places."""
    assert train("text.txt", "--n-encoder-layers", 0).code == 0
    path, now = data / "m" / "training_data.json", about(data)
    new = ("documents", "fields", "cache", "objective", "curriculum")
    old = {"has_encoder": False, **{name: value for name, value in now.items() if name not in new}}
    for given, told in ((now | {"batch_size": 3}, "batch_size was 2, is 3"), (old, "the way batches are made from the text has changed")):
        path.write_text(json.dumps(given))
        refused = run("train", "--resume", data / "m", "--steps", 6)
        assert refused.code == 2 and told in refused.err and "--accept-changes" in refused.err and refused.err.count("\n") <= 4
        assert load_checkpoint(data / "m") and json.loads((data / "m" / "training.json").read_text())["step_count"] == 4
    assert run("train", "--resume", data / "m", "--steps", 6, "--accept-changes", "--json").json["steps"] == 6
    assert about(data) == now
    assert run("train", "--resume", data / "m", "--steps", 7).code == 0


def planned(memory=None, new_model=True, **given):
    options = {"segment_length": 32, "n_segments": None, "batch_size": None, "curriculum": None, "steps": 300, **given}
    return tuple(plan_streams(options, memory and mt.memory(memory), new_model).values())


def test_streams_are_so_long_that_they_fill_the_memory(capsys):
    assert planned() == (1, 64, None)
    assert planned("window:size=128") == (6, 10, [[0, 1, 64], [100, 3, 21], [200, 6, 10]])
    assert planned("recurrent:tokens=4") == (3, 21, [[0, 1, 64], [100, 2, 32], [200, 3, 21]])
    assert planned("store") == (8, 8, [[0, 1, 64], [100, 4, 16], [200, 8, 8]])  # which is never full
    assert planned("window:size=128+store")[:2] == (12, 5)
    assert planned("window:size=128", new_model=False) == planned("window:size=128", n_segments=6) == (6, 10, None)
    assert planned("window:size=128", batch_size=5) == (6, 5, [[0, 1, 5], [100, 3, 5], [200, 6, 5]])
    assert planned("window:size=128", curriculum="0:2,9:6") == (6, 10, [[0, 2, 32], [9, 6, 10]])
    assert capsys.readouterr().err == ""


def test_streams_that_never_fill_the_memory_are_told(capsys):
    assert planned("window:size=4096")[0] == 16
    told = "streams of 16 segments, 512 tokens, never fill window:size=4096"
    assert told in capsys.readouterr().err
    assert planned("window:size=128", n_segments=5)[0] == 5
    assert "6 segments would fill it" in capsys.readouterr().err


def test_a_run_with_a_memory_grows_its_streams(run, data):
    words = ("--d-model", 8, "--n-heads", 2, "--tokenizer", "bytes", "--segment-length", 8, "--memory", "window:size=16", "--steps", 3)
    assert run("train", "--text", data / "text.txt", "--out", data / "m", *words).code == 0
    assert about(data)["curriculum"] == [[0, 1, 64], [1, 2, 32], [2, 4, 16]] and about(data)["n_segments"] == 4
    assert load_checkpoint(data / "m").model.config.positions == "rotary"
    assert run("train", "--resume", data / "m", "--steps", 4).code == 0
    said = run("train", "--text", data / "text.txt", "--out", data / "n", *words, "--positions", "sinusoidal")
    assert said.code == 0 and "nothing tells how far back the rows of a memory stand" in said.err


def test_a_cache_of_other_text_is_not_written_over(train, data):
    assert train("text.jsonl", "--field", "body", "--cache", data / "cache").code == 0
    before = (data / "cache" / "texts.tokens").read_bytes()
    refused = train("text.txt", "--cache", data / "cache", out="n")
    assert refused.code == 2 and "texts.tokens: was built from other sources" in refused.err
    assert (data / "cache" / "texts.tokens").read_bytes() == before and not (data / "n" / "config.json").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("text.txt", "--objective", "nonsense"), "--objective: expected some of next-segment, lm, denoise, pairs"),
        (("text.txt", "--objective", "denoise+denoise"), "each once"),
        (("text.txt", "--objective", "denoise=0"), "expected a share above 0"),
        (("text.txt", "--objective", "denoise=x"), "expected a share above 0"),
        (("text.txt", "--objective", "lm"), "lm does not fit a model with an encoder; use next-segment"),
        (("text.txt", "--objective", "next-segment", "--n-encoder-layers", 0), "use lm"),
        (("text.txt", "--objective", "pairs"), "needs pairs, but --text has only texts"),
        (("pairs.tsv", "--objective", "denoise"), "needs texts, but --text has only pairs"),
        (("text.txt pairs.tsv", "--objective", "pairs"), "no objective uses the texts"),
        (("text.txt", "--curriculum", "1:2"), "--curriculum: expected STEP:SEGMENTS"),
        (("text.txt", "--curriculum", "0:1,0:2"), "--curriculum: expected STEP:SEGMENTS"),
        (("text.txt", "--curriculum", "0:0"), "--curriculum: expected STEP:SEGMENTS"),
        (("text.txt", "--curriculum", "0:1:2"), "--curriculum: expected STEP:SEGMENTS"),
        (("text.txt", "--curriculum", ""), "--curriculum: expected STEP:SEGMENTS"),
        (("text.txt", "--curriculum", "0:1", "--n-segments", 3), "give --n-segments or --curriculum, not both"),
        (("text.txt", "--accept-changes"), "--accept-changes needs --resume"),
        (("text.jsonl",), "text.jsonl, line 1: expected field 'text'"),
        (("text.jsonl", "--field", "a,b,c"), "fields: expected"),
        (("", "--cache", "cache"), "--cache: expected text files"),
        (("text.txt", "--cache", "text.txt"), "text.txt"),
        (("missing.tsv",), "no such file"),
        (("bad.tsv",), "bad.tsv, line 2: expected source, one tab and target"),
    ],
)
def test_what_does_not_fit_is_told_in_a_line(train, data, monkeypatch, words, told):
    (data / "bad.tsv").write_text("a\tb\nc\n")
    monkeypatch.chdir(data)
    refused = train(*words)
    assert refused.code == 2 and told in refused.err and refused.out == ""
    assert not (data / "m" / "config.json").exists()


def test_resume_takes_its_data_from_the_folder(train, run, data):
    assert train("text.txt").code == 0
    for words in (("--objective", "denoise"), ("--curriculum", "0:1"), ("--cache", "x"), ("--field", "x"), ("--documents", "line")):
        refused = run("train", "--resume", data / "m", "--steps", 9, *words)
        assert refused.code == 2 and f"{words[0]} comes from the folder" in refused.err


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"objective": None}, "'objective' is missing or of the wrong type"),
        ({"objective": {}}, "'objective': expected some of"),
        ({"objective": {"x": 1}}, "'objective': expected some of"),
        ({"curriculum": 5}, "'curriculum' is missing or of the wrong type"),
        ({"curriculum": [5]}, "stages: expected"),
        ({"files": [5]}, "'files': expected paths"),
        ({"documents": "page"}, "documents: expected"),
        ({"n_segments": 0}, "n_segments: expected"),
    ],
)
def test_a_damaged_description_is_refused(train, run, data, change, told):
    assert train("text.txt").code == 0
    path = data / "m" / "training_data.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused = run("train", "--resume", data / "m", "--steps", 9)
    assert refused.code == 2 and told in refused.err


def test_what_is_written_is_what_is_read():
    assert parse_objective("next-segment=0.7+denoise") == {"next-segment": 0.7, "denoise": 1.0} and parse_objective(None) is None
    assert parse_curriculum("0:1,500:2") == [[0, 1], [500, 2]] and parse_curriculum(None) is None
    with pytest.raises(InvalidValue):
        parse_objective("")
