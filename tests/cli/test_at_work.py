"""generate, score, embed, read, info: a saved model at work."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

from mini_tfm import progress
from mini_tfm.cli import shared as module
from mini_tfm.pipeline import Pipeline
from mini_tfm.stream import Stream
from mini_tfm.text.tokenizers import ByteTokenizer


def digest(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_generate_streams_what_the_pipeline_gives(run, model):
    expected = Pipeline.load(model).generate("The quick", max_new_tokens=12)
    streamed = run("generate", model, "The quick", "--max-new-tokens", 12)
    assert streamed.code == 0 and streamed.err == ""
    assert streamed.out.rstrip("\n") == expected.rstrip("\n")
    assert run("generate", model, "The quick", "--max-new-tokens", 12, "--no-stream").out == streamed.out


def test_generate_takes_its_prompt_from_three_places(run, model, texts):
    prompt = texts[0].read_text()
    answers = [
        run("generate", model, prompt, "--json", "--max-new-tokens", 5).json,
        run("generate", model, "--file", texts[0], "--json", "--max-new-tokens", 5).json,
        run("generate", model, "--json", "--max-new-tokens", 5, stdin=prompt).json,
        run("generate", model, "-", "--json", "--max-new-tokens", 5, stdin=prompt).json,
    ]
    assert all(answer["prompt"] == prompt for answer in answers)
    assert len({answer["text"] for answer in answers}) == 1
    assert answers[0]["memory"] == "window:size=8"


def test_generate_passes_every_option_on(run, model):
    words = ["--do-sample", "--top-k", 5, "--top-p", 0.9, "--temperature", 1.5, "--seed", 3, "--max-new-tokens", 20]
    expected = Pipeline.load(model, memory="window:size=4").generate(
        "The", do_sample=True, top_k=5, top_p=0.9, temperature=1.5, seed=3, max_new_tokens=20
    )
    assert run("generate", model, "The", "--memory", "window:size=4", "--json", *words).json["text"] == expected
    assert run("generate", model, "The", "--json", *words[:-3], 4, *words[-2:]).json["text"] != expected


def test_generate_reads_files_into_the_memory_first(run, model, texts):
    pipe = Pipeline.load(model, memory="window:size=32")
    tokens = sum(pipe.read(path.read_text(encoding="utf-8")) for path in texts)
    answer = run("generate", model, "x", "--memory", "window:size=32", "--read", texts[0], "--read", texts[1], "--json").json
    assert (answer["tokens_read"], answer["text"]) == (tokens, pipe.generate("x"))


def test_score_adds_up(run, model, texts):
    answer = run("score", model, *texts, "--json").json
    for told, path in zip(answer["files"], texts, strict=True):
        expected = Pipeline.load(model).score(path.read_text(encoding="utf-8"))
        assert told["file"] == str(path)
        assert told["bytes"] == path.stat().st_size == expected["bytes"]
        assert told["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-6)
    everything = answer["all"]
    assert everything["tokens"] == sum(told["tokens"] for told in answer["files"])
    assert everything["bits_per_byte"] == pytest.approx(sum(told["bits"] for told in answer["files"]) / everything["bytes"])


def test_score_of_standard_input_and_the_table(run, model, texts):
    from_file = run("score", model, texts[1], "--json").json["all"]
    assert run("score", model, "-", "--json", stdin=texts[1].read_text(encoding="utf-8")).json["all"] == pytest.approx(from_file)
    table = run("score", model, *texts)
    assert table.err == "" and "\x1b" not in table.out
    assert all(word in table.out for word in ("bits/token", "bits/byte", "a.txt", "b.txt", "all", f"{from_file['bits_per_byte']:.3f}"))


@pytest.mark.parametrize("command", ["score", "read"])
def test_progress_moves_with_each_segment(run, model, monkeypatch, tmp_path, command):
    """A file is one piece of text, or a few: told at its end alone, minutes pass in silence."""
    monkeypatch.setattr(progress, "SECONDS_A_LINE", 0.0)
    (tmp_path / "long.txt").write_text("ä" * 20)
    said = run(command, model, tmp_path / "long.txt", "--memory", f"store:path={tmp_path}/s.mdb", "--json")
    moved = [int(found) for found in re.findall(r"ing: (\d+) of 40 bytes", said.err)]
    assert moved == [16, 32, 40, 40] and said.json["files" if command == "read" else "all"], "segments of 16 tokens, here bytes"


def test_score_without_a_memory_is_another_score(run, model, texts):
    assert run("score", model, texts[0], "--memory", "none", "--json").json["memory"] == "none"
    scores = {run("score", model, texts[0], "--memory", spec, "--json").json["all"]["bits"] for spec in ("none", "window:size=8")}
    assert len(scores) == 2


def test_score_of_several_memories_side_by_side(run, model, texts):
    both = run("score", model, *texts, "--memory", "none", "--memory", "saved", "--json").json["memories"]
    for spec, found in zip(("none", "saved"), both, strict=True):
        alone = run("score", model, *texts, "--memory", spec, "--json").json
        assert found["memory"] == alone["memory"] and found["all"] == alone["all"]
    table = run("score", model, *texts, "--memory", "none", "--memory", "saved")
    assert table.code == 0 and "window:size=8" in table.out
    (total,) = [line for line in table.out.splitlines() if line.strip().startswith("all")]
    assert total.split()[-2:] == [f"{each['all']['bits_per_byte']:.3f}" for each in both]
    assert run("score", model, "-", "--memory", "none", "--memory", "saved", stdin="x").code == 2


@pytest.mark.parametrize("words", [["score", "{model}", "{text}"], ["generate", "{model}", "x"], ["read", "{model}", "{text}"]])
def test_a_memory_that_the_model_never_met_is_told(run, model, texts, tmp_path, words):
    words = [word.format(model=model, text=texts[0]) for word in words]
    store = f"store:path={tmp_path}/s.mdb"
    said = run(*words, "--memory", store)
    (warning,) = [line for line in said.err.splitlines() if line.startswith("warning: ")]
    assert said.code == 0 and "was trained with window:size=8, and it has not learned to use store" in warning
    assert f"mini-tfm train --text YOUR.txt --memory {store} --out NEW" in warning
    if words[0] != "read":
        random = run(*words, "--memory", "recurrent:tokens=2")
        assert random.code == 0 and "are random here; mini-tfm train --text YOUR.txt --memory recurrent:tokens=2 --out NEW" in random.err
        for known in ("none", "saved", "window:size=4", "knn_lm"):  # the last changes the output alone, which nobody has to learn
            assert "warning" not in run(*words, "--memory", known).err
        larger = run(*words, "--memory", "window:size=9")
        assert "it has never met rows as far back as window:size=9 shows" in larger.err
        assert "mini-tfm train --text YOUR.txt --memory window:size=9" in larger.err


def test_a_store_that_is_only_read_is_not_read_into(run, model, texts, tmp_path):
    store = f"store:path={tmp_path}/s.mdb"
    assert run("read", model, texts[0], "--memory", store).code == 0
    said = run("read", model, texts[0], "--memory", store + ",read_only=true")
    assert said.code == 2 and "is only read; leave out read_only=true to write into it" in said.err
    said = run("score", model, texts[0], "--memory", store + ",read_only=true")
    assert said.code == 0 and f"--memory {store},read_only=false --out NEW" in said.err


def test_embed_gives_a_row_a_line(run, model, tmp_path):
    lines = "one\n\nthree äöü\r\nfour\x0bstill four"
    answer = run("embed", model, "-", "--json", stdin=lines)
    vectors = np.array(answer.json["vectors"], np.float32)
    expected = Pipeline.load(model, memory=None).embed(["one", "", "three äöü", "four\x0bstill four"])
    np.testing.assert_array_equal(vectors, expected)
    assert "1 of 4 lines are empty" in answer.err
    (tmp_path / "lines.txt").write_text("one\n\nthree\n")
    said = run("embed", model, tmp_path / "lines.txt", "--out", tmp_path / "vectors.npy")
    assert said.code == 0 and "3 vectors of 16 numbers" in said.out
    np.testing.assert_array_equal(np.load(tmp_path / "vectors.npy")[0], expected[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lines.txt", "vectors.npy"]


def test_embed_of_folders_gives_lines_of_json_in_order(run, model, tmp_path):
    (tmp_path / "notes" / "deep").mkdir(parents=True)
    for name, text in [("a.txt", "one\ntwo\n"), ("deep/b.md", "three\n"), ("c.bin", "\0"), ("z.txt", "four")]:
        (tmp_path / "notes" / name).write_text(text)
    expected = Pipeline.load(model, memory=None).embed(["one", "two", "three", "four"], dimensions=5, normalize=True)
    options = ["--dimensions", 5, "--normalize"]
    said = run("embed", model, tmp_path / "notes", "--out", "-", *options)
    assert (said.code, said.err) == (0, "")
    rows = [json.loads(line) for line in said.out.splitlines()]
    assert [(row["file"].rpartition("/")[2], row["line"]) for row in rows] == [("a.txt", 1), ("a.txt", 2), ("b.md", 1), ("z.txt", 1)]
    np.testing.assert_array_equal(np.array([row["vector"] for row in rows], np.float32), expected)
    assert run("embed", model, tmp_path / "notes", "--out", tmp_path / "v.jsonl", *options).code == 0
    assert (tmp_path / "v.jsonl").read_text() == said.out
    assert run("embed", model, tmp_path / "notes", "--out", tmp_path / "v.npy", *options, "--json").json["d_model"] == 5
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), expected)
    whole = run("embed", model, tmp_path / "notes", "--no-normalize", "--json").json["vectors"]
    np.testing.assert_array_equal(np.array(whole, np.float32), Pipeline.load(model).embed(["one", "two", "three", "four"]))


def test_embed_of_more_lines_than_it_reads_at_once(run, model, tmp_path, monkeypatch):
    monkeypatch.setattr("mini_tfm.cli.embed.TEXTS_AT_ONCE", 3)
    lines = [f"line {i}" * (i % 4) for i in range(11)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    assert run("embed", model, tmp_path / "a.txt", "--out", tmp_path / "v.npy").code == 0
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), Pipeline.load(model).embed(lines))


@pytest.mark.parametrize(
    "words, named",
    [(["--out", "v.txt"], ".jsonl"), (["--dimensions", 17, "--json"], "1 to 16"), (["--prompt", "query", "--json"], "prompt")],
)
def test_embed_refuses(run, model, texts, words, named):
    refused = run("embed", model, texts[0], *words)
    assert refused.code == 2 and named in refused.err and refused.err.count("\n") == 1 and refused.out == ""


def test_embed_keeps_a_file_that_is_there(run, model, texts, tmp_path):
    (tmp_path / "vectors.npy").write_bytes(b"mine")
    refused = run("embed", model, texts[0], "--out", tmp_path / "vectors.npy")
    assert refused.code == 2 and "--overwrite" in refused.err and (tmp_path / "vectors.npy").read_bytes() == b"mine"
    assert run("embed", model, texts[0], "--out", tmp_path / "vectors.npy", "--overwrite", "--json").json["texts"] == 4
    assert np.load(tmp_path / "vectors.npy").shape == (4, 16)


def test_read_outlives_the_process(run, model, texts, tmp_path):
    spec = f"store:path={tmp_path / 'notes.mdb'}"
    answer = run("read", model, *texts, "--memory", spec, "--json").json
    sizes = [len(ByteTokenizer().encode(path.read_text(encoding="utf-8"))) for path in texts]
    assert [told["tokens"] for told in answer["files"]] == sizes
    assert [told["bytes"] for told in answer["files"]] == [path.stat().st_size for path in texts]
    assert answer["documents"] == {"default": answer["new_rows"]} and answer["new_rows"] == sum(sizes)
    assert run("info", "--memory", spec, "--json").json["memory"]["documents"] == answer["documents"]
    with_it, without = (run("score", model, texts[0], "--memory", text, "--json").json["all"]["bits"] for text in (spec, "store"))
    assert with_it != without
    (tmp_path / "copy.txt").write_bytes(texts[0].read_bytes())
    again = run("read", model, tmp_path / "copy.txt", "--memory", spec, "--json")
    assert again.json["documents"] == answer["documents"] and again.json["new_rows"] == 0, "the same text, known by its content"
    assert again.json["files"][0]["bytes"] == texts[0].stat().st_size
    assert again.json["files"][0]["tokens_read_before"] == sizes[0] and "was read into this memory before" in again.err
    piped = run("read", model, "-", "--memory", spec, "--json", stdin=texts[1].read_text(encoding="utf-8")).json
    assert piped["new_rows"] == 0
    other = run("read", model, texts[0], "--memory", f"{spec},document=other", "--json").json
    assert other["documents"] == {**answer["documents"], "other": sizes[0]}
    fresh = run("read", model, texts[0], "--memory", spec, "--reset", "default", "--json").json
    assert fresh["documents"]["default"] == sizes[0]
    smaller = run("read", model, "--memory", spec, "--compact", "--json").json
    assert smaller["documents"] == fresh["documents"] and smaller["files"] == [] and smaller["bytes_after"] <= smaller["bytes_before"]
    assert "compacted from" in run("read", model, texts[0], "--memory", spec, "--compact").out
    assert run("read", model, "--memory", spec).code == 2


def test_generate_reads_a_file_into_a_memory_on_disk_once(run, model, texts, tmp_path):
    words = ["generate", model, "x", "--max-new-tokens", 2, "--memory", f"store:path={tmp_path}/s.mdb", "--read", texts[0], "--json"]
    first, again = run(*words).json, run(*words).json
    assert first["tokens_read"] > 0 == again["tokens_read"]


@pytest.mark.parametrize(("overlap", "rows"), [(0, 16), (0.5, 8)])
@pytest.mark.parametrize("spec", ["store", "window:size=8+store"])
def test_a_reading_that_was_interrupted_goes_on(run, model, monkeypatch, tmp_path, spec, overlap, rows):
    """The second command reads what the first did not, and the memory holds what one reading gives."""
    text = tmp_path / "long.txt"
    text.write_text("".join(f"{i} quick brown foxes jump over the lazy dog. " for i in range(16)))
    size, read, left = text.stat().st_size, Stream.read, [40]

    def stopped(stream, tokens, lengths, kept):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return read(stream, tokens, lengths, kept)

    whole, parts = (f"{spec}:path={tmp_path / name}.mdb" for name in ("whole", "parts"))
    assert run("read", model, text, "--memory", whole, "--overlap", overlap).code == 0
    monkeypatch.setattr(Stream, "read", stopped)
    said = run("read", model, text, "--memory", parts, "--overlap", overlap)
    assert said.code == 130 and "the same command goes on from there" in said.err
    monkeypatch.undo()
    on = run("read", model, text, "--memory", parts, "--overlap", overlap, "--json").json
    before = 32 * rows + (4 if overlap else 0)  # the first chunk keeps its head as well
    assert on["files"][0]["tokens_read_before"] == before and on["files"][0]["tokens"] == size - before
    assert on["files"][0]["bytes"] == size
    assert on["documents"] == {"default": size}
    scores = [run("score", model, text, "--memory", memory, "--json").json["all"]["bits"] for memory in (whole, parts)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)


def test_the_table_says_how_much_was_read_before(run, model, monkeypatch, tmp_path):
    """And how much now: the size is that of the whole file."""
    monkeypatch.chdir(tmp_path)
    text, words = Path("long.txt"), ("--memory", "store:path=s.mdb")
    text.write_text("a" * 400)
    calls, read = iter(range(20)), Stream.read

    def stopped(*given):
        if next(calls) == 19:
            raise KeyboardInterrupt
        return read(*given)

    with monkeypatch.context() as interrupted:
        interrupted.setattr(Stream, "read", stopped)
        assert run("read", model, text, *words).code == 130
    on, again = (run("read", model, text, *words).out for _ in range(2))
    assert re.search(r"tokens +tokens *\n.*read before +read now", on) and re.search(r"long.txt +400 B +256 +144 ", on)
    assert re.search(r"long.txt +400 B +400 +0 ", again)


@pytest.mark.parametrize("spec", ["window:size=8", "none", "saved", "store", "window:size=8+store"])
def test_read_refuses_a_memory_that_keeps_nothing(run, model, texts, spec):
    refused = run("read", model, texts[0], "--memory", spec)
    assert refused.code == 2 and refused.out == ""
    assert refused.err.startswith("error: --memory: ") and "store:path=" in refused.err and refused.err.count("\n") == 1


def test_read_tells_at_an_error_what_was_read(run, model, texts, shared, tmp_path):
    late = tmp_path / "late.txt"
    late.write_bytes(b"good so far " * 20 + b"\0")
    stopped = run("read", model, texts[0], late, "--memory", f"store:path={tmp_path / 'notes.mdb'}")
    assert stopped.code == 2 and "a.txt" in stopped.err and "rows of document 'default'" in stopped.err
    assert stopped.err.splitlines()[-1].startswith("error: ") and "late.txt" in stopped.err.splitlines()[-1]


def test_what_a_window_holds_at_the_end_reaches_the_store(run, model, texts, tmp_path):
    size = len(ByteTokenizer().encode(texts[0].read_text(encoding="utf-8")))
    answer = run("read", model, texts[0], "--memory", f"window:size=8+store:path={tmp_path / 'notes.mdb'}", "--json").json
    assert answer["documents"] == {"default": size}


def test_info(run, model):
    answer = run("info", model, "--memory", "window:size=8+store", "--json").json
    assert answer["library"]["num_threads"] >= 1 and answer["library"]["packages"]["numpy"] == np.__version__
    assert answer["model"]["memory"] == "window:size=8" and answer["model"]["config"]["d_model"] == 16
    assert answer["model"]["parameters"] == Pipeline.load(model).model.n_parameters
    assert [member["name"] for member in answer["memory"]["strategies"]] == ["window", "store"]
    table = run("info", model)
    assert table.code == 0 and "\x1b" not in table.out and "d_model 16" in table.out
    assert max(map(len, table.out.splitlines())) <= 110
    assert run("info").code == 0


def test_nothing_at_work_changes_the_model(run, model, texts, tmp_path):
    before = digest(model)
    for words in (
        ["generate", model, "x", "--read", texts[0]],
        ["score", model, texts[0]],
        ["embed", model, texts[0], "--json"],
        ["info", model],
    ):
        assert run(*words).code == 0
    assert run("read", model, texts[0], "--memory", f"store:path={tmp_path / 'notes.mdb'}").code == 0
    assert digest(model) == before


def test_the_json_of_one_number_that_is_none(capsys):
    from mini_tfm.cli.shared import print_json

    print_json({"recall": {1: float("nan"), 2: np.float32(0.5)}, "sites": frozenset({"b", "a"})})
    assert json.loads(capsys.readouterr().out) == {"recall": {"1": None, "2": 0.5}, "sites": ["a", "b"]}


@pytest.mark.parametrize("columns", [110, 60, 40])
def test_a_table_breaks_no_word(columns, monkeypatch, capsys):
    monkeypatch.setattr(module, "WIDTH", columns)
    names = ["window:size=64+store:top_k=16", "recurrent:tokens=4"]
    module.print_table(
        [("memory", "left"), ("bits per byte,\nheld-out text", "right"), ("tokens/s", "right"), ("peak RAM", "right")],
        [(name, "1.826", "12,345", "98.8 MB") for name in names],
    )
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    for word in (*names, "1.826", "12,345", "98.8 MB", "tokens/s", "peak RAM"):
        assert any(word in line for line in lines), word
