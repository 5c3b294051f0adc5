"""train, average, demo and compare: what they train, keep and print."""

import contextlib
import dataclasses
import glob
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from commands import ENVIRONMENT, TINY_OPTIONS, command, run_process, with_plugins, write_plugin
from experiments import small_experiment

from mini_tfm.cli import demo as demo_module
from mini_tfm.cli import training
from mini_tfm.cli.shared import interrupt_between_steps
from mini_tfm.cli.training import faster_threads
from mini_tfm.compare import experiment as experiment_module
from mini_tfm.compare.experiment import failed
from mini_tfm.config import Config
from mini_tfm.errors import FileProblem
from mini_tfm.text import split_documents
from mini_tfm.train import Trainer
from mini_tfm.transformer import Transformer, load_checkpoint


def weights(folder):
    return {name: w.tobytes() for name, w in load_checkpoint(folder).model.weights.items()}


@pytest.fixture
def train(run, texts):
    files = [word for path in texts for word in ("--text", path)]
    return lambda out, *words: run("train", *files, "--out", out, *TINY_OPTIONS, *words)


@pytest.mark.parametrize(
    ("name", "words", "continues"),
    [
        ("texts.jsonl", [], True),
        ("texts.jsonl", ["--objective", "next-segment+denoise"], True),
        ("texts.jsonl", ["--objective", "denoise"], False),
        ("texts.jsonl", ["--n-encoder-layers", 0], False),
        ("pairs.tsv", [], False),
    ],
)
def test_train_on_text_makes_a_model_that_continues_its_source(run, tmp_path, name, words, continues):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"the {n}th text, and what follows"}) + "\n" for n in range(20)))
    (tmp_path / "pairs.tsv").write_text("".join(f"source {n}\ttarget {n}\n" for n in range(20)))
    assert run("train", "--text", tmp_path / name, "--out", tmp_path / "m", *TINY_OPTIONS, *words, "--steps", 1).code == 0
    assert load_checkpoint(tmp_path / "m").model.config.continues_source == continues


def test_train_proposes_to_score_a_file_that_was_held_out(run, tmp_path):
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    files = [tmp_path / f"{word}.txt" for word in words]
    for number, path in enumerate(files):
        path.write_text(f"{words[number]} {' '.join(words)}\n" * 8)
    held_out = split_documents({str(path): path.read_text() for path in files}, 0.1, 0)[1]
    files.sort(key=lambda path: str(path) in held_out)
    said = run("train", "--text", *files, "--out", tmp_path / "m", *TINY_OPTIONS, "--steps", 1).err
    assert re.findall(r"mini-tfm score \S+ (\S+)", said)[0] in held_out


def test_train_saves_a_model_that_works(run, train, texts, tmp_path):
    answer = train(
        tmp_path / "m", "--memory", "window:size=8", "--steps", 6, "--validate-every", 3, "--json", "--jsonl-log", tmp_path / "log"
    ).json
    assert (answer["steps"], answer["memory"], answer["folder"]) == (6, "window:size=8", str(tmp_path / "m"))
    saved = load_checkpoint(tmp_path / "m")
    assert saved.memory_text == "window:size=8" and saved.model.config.segment_length == 16
    assert answer["parameters"] == saved.model.n_parameters
    log = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in log if "validation_loss" in line] == [3, 6]
    assert log[-1]["validation_loss"] == answer["held_out_loss"] == answer["best_held_out_loss"]
    # bytes: a token is a byte, so bits per byte are bits per token
    assert answer["held_out_bits_per_byte"] == pytest.approx(answer["held_out_loss"] / math.log(2))
    assert run("score", tmp_path / "m", texts[0], "--json").json["memory"] == "window:size=8"


def test_train_refuses_the_folder_of_a_plugin(run, train, tmp_path):
    """A model lay among its files (regression)."""
    folder = tmp_path / "plug-a"
    assert run("plugins", "new", folder).code == 0
    there = sorted(folder.rglob("*"))
    said = train(folder, "--steps", 1)
    assert (
        said.code == 2
        and f"--out: {folder} holds pyproject.toml, so it is the source" in said.err
        and f"such as {folder / 'model'}" in said.err
    )
    assert sorted(folder.rglob("*")) == there
    assert train(folder / "model", "--steps", 1).code == 0


def test_train_tells_what_to_try_and_it_works(run, train, tmp_path):
    said = train(tmp_path / "m", "--steps", 2)
    assert said.code == 0 and "bits/byte" in said.out and "\x1b" not in said.out + said.err
    tried = [line.strip() for line in said.err.splitlines() if line.startswith("  mini-tfm ")]
    assert len(tried) == 3
    for line in tried:
        assert run(*shlex.split(line, comments=True)[1:]).code == 0, line


def test_a_run_stopped_and_resumed_is_the_run_that_was_not(run, train, tmp_path, monkeypatch):
    options = ["--steps", 6, "--memory", "recurrent:tokens=2", "--dropout", 0.1]
    assert train(tmp_path / "whole", *options).code == 0
    with monkeypatch.context() as patched:
        patched.setattr("mini_tfm.cli.training.interrupt_between_steps", lambda: interrupt_at(3))
        stopped = train(tmp_path / "cut", *options)
    assert stopped.code == 130 and stopped.out == ""
    assert f"stopped: step 3 is saved in {tmp_path / 'cut'}" in stopped.err
    (tmp_path / "cut" / "notes.txt").write_text("mine")
    assert run(*stopped.err.splitlines()[-1].split()[1:], "--json").json["steps"] == 6
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert (tmp_path / "cut" / "notes.txt").read_text() == "mine"


@contextlib.contextmanager
def interrupt_at(step):
    checks = iter(range(1, step))
    yield lambda: next(checks, None) is None


def test_what_a_run_was_told_is_remembered(run, train, tmp_path):
    """Logs, rhythm and patience go on as they were, but for what is told anew."""
    told = ["--validate-every", 2, "--save-every", 3, "--save-total-limit", 2, "--save-best", "--schedule", "linear", "--weight-decay", 0.1]
    told += ["--gradient-accumulation-steps", 2, "--early-stopping-patience", 50, "--early-stopping-threshold", 0.01, "--max-grad-norm", 0]
    told += ["--label-smoothing", 0.1, "--bptt-segments", 1, "--jsonl-log", tmp_path / "l.jsonl", "--csv-log", tmp_path / "l.csv"]
    assert train(tmp_path / "m", "--steps", 4, *told).code == 0
    resumed = run("train", "--resume", tmp_path / "m", "--steps", 9, "--validate-every", 3, "--json")
    assert resumed.json["steps"] == 9 and resumed.json["best_step"] and not resumed.json["stopped_early"]
    log = [json.loads(line) for line in (tmp_path / "l.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, 10)) and len((tmp_path / "l.csv").read_text().splitlines()) == 10
    assert [line["step"] for line in log if "validation_loss" in line] == [2, 4, 6, 9]
    assert sorted(path.name for path in (tmp_path / "m").glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-9"]
    assert (tmp_path / "m" / "best").is_dir()
    about = json.loads((tmp_path / "m" / "training.json").read_text())
    for name, value in (("gradient_accumulation_steps", 2), ("early_stopping_patience", 50), ("clip", None), ("schedule", "linear"),
                        ("weight_decay", 0.1), ("label_smoothing", 0.1), ("bptt_segments", 1)):  # fmt: skip
        assert about["options"][name] == value, name
    refused = run("train", "--resume", tmp_path / "m", "--steps", 12, "--gradient-accumulation-steps", 3)
    assert refused.code == 2 and "--gradient-accumulation-steps comes from the folder" in refused.err


def test_train_stops_early_and_says_where_the_best_is(run, train, tmp_path):
    said = train(
        tmp_path / "m", "--steps", 40, "--learning-rate", 0.5, "--validate-every", 1, "--early-stopping-patience", 2, "--save-best"
    )
    assert said.code == 0 and re.search(
        r"stopped early at step \d+: 2 validations in a row .* at step \d+; that model is in .*best", said.err
    )
    answer = run("train", "--resume", tmp_path / "m", "--steps", 41, "--json").json
    assert answer["stopped_early"] and answer["steps"] < 40 and answer["best_step"] == answer["steps"] - 2
    assert run("generate", tmp_path / "m" / "best", "The", "--max-new-tokens", 2).code == 0


def test_average_is_a_model_that_works(run, train, tmp_path):
    assert train(tmp_path / "m", "--steps", 6, "--save-every", 2, "--save-total-limit", 3).code == 0
    answer = run("average", tmp_path / "m", "--last", 2, "--out", tmp_path / "a", "--json").json
    assert answer["models"] == [str(tmp_path / "m" / f"checkpoint-{step}") for step in (4, 6)]
    one, other, mean = (load_checkpoint(path).model.weights for path in (*answer["models"], tmp_path / "a"))
    assert all(((one[n].astype(float) + other[n]) / 2).astype("f4").tobytes() == mean[n].tobytes() for n in mean)
    said = run("average", *answer["models"], "--out", tmp_path / "b")
    assert said.code == 0 and "mean of 2 models" in said.out and weights(tmp_path / "b") == weights(tmp_path / "a")
    for words, told in (
        ([tmp_path / "m", tmp_path / "m", "--last", 2, "--out", tmp_path / "c"], "--last: expected one FOLDER"),
        ([tmp_path / "m", "--last", 4, "--out", tmp_path / "c"], "found 3"),
        ([tmp_path / "m", "--out", tmp_path / "a"], "holds a model already"),
        ([tmp_path / "nothing", "--out", tmp_path / "c"], "nothing"),
    ):
        refused = run("average", *words)
        assert refused.code == 2 and told in refused.err and not (tmp_path / "c").exists()


@pytest.mark.parametrize("kind", ["train", "compare", "average"])
def test_of_two_at_once_one_gets_the_folder(kind, train, texts, tmp_path):
    """Real processes, begun together: one is done, the other told, and nothing of it is in the folder."""
    files = [word for path in texts for word in ("--text", path)]
    words = {
        "train": [*files, *TINY_OPTIONS, "--steps", 30, "--seed"],
        "compare": ["--memory", "none", "--steps", 1, "--seed"],
        "average": [tmp_path / "m", "--last"],
    }[kind]
    if kind == "average":
        assert train(tmp_path / "m", "--steps", 4, "--save-every", 2, "--save-total-limit", 2).code == 0
    out = tmp_path / "out"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT}
    both = [subprocess.Popen(command(kind, *words, number, "--out", out, "--json"), **pipes) for number in (1, 2)]
    ends = [(process, *process.communicate(timeout=300)) for process in both]
    codes = sorted(process.returncode for process, _, _ in ends)
    assert codes == [0, 2], [err for _, _, err in ends]
    (number,) = [number for number, (process, said, _) in enumerate(ends, 1) if process.returncode == 0 and json.loads(said)]
    (told,) = [err for process, _, err in ends if process.returncode == 2]
    assert str(out) in told and "give another folder" in told.lower() and "Traceback" not in told
    if kind == "train":
        assert json.loads((out / "training.json").read_text())["options"]["seed"] == number
    elif kind == "compare":
        assert json.loads((out / "results.json").read_text())["seed"] == number
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(("one", "four", "best"), [(1.0, 2.0, 1), (1.0, 1.0, 4), (0.95, 1.0, 4), (2.0, 1.0, 4)])
def test_one_thread_is_used_where_it_is_clearly_faster(one, four, best):
    noise = itertools.cycle([3.0, 0.0, 0.5])
    assert faster_threads(lambda n: {1: one, 4: four}[n] + next(noise), 4) == best


def test_threads_are_settled_again_when_the_machine_has_become_busy_or_idle(monkeypatch, capsys):
    """The processor's time is played: two threads are slower in the middle."""
    now, is_busy, n_threads = [0.0], [False], [2]

    def evaluate(_):
        now[0] += {1: 1.0, 2: 3.0 if is_busy[0] else 0.5}[n_threads[0]]

    monkeypatch.setattr("mini_tfm.kernels.get_num_threads", lambda: n_threads[0])
    monkeypatch.setattr("mini_tfm.kernels.set_num_threads", lambda n: n_threads.__setitem__(0, n))
    monkeypatch.setattr("mini_tfm.cli.shared.time.perf_counter", lambda: now[0])
    trainer = types.SimpleNamespace(evaluate=evaluate, communicator=types.SimpleNamespace(size=1))
    threads = training._Threads(trainer, types.SimpleNamespace(held_out=[None]))
    threads.settle()
    assert n_threads == [2] and not capsys.readouterr().err
    is_busy[0] = True
    threads.settle_now_and_then()
    assert n_threads == [2], "it has just been settled"
    now[0] += training.SETTLED_FOR + 1
    threads.settle_now_and_then()
    assert n_threads == [1] and "threads: 1, because 2 are slower now" in capsys.readouterr().err
    is_busy[0] = False
    now[0] += training.SETTLED_FOR + 1
    threads.settle_now_and_then()
    assert n_threads == [2] and "threads: 2 again" in capsys.readouterr().err


def test_a_claim_ends_with_its_process(tmp_path):
    from mini_tfm.files.folders import claimed

    (tmp_path / ".m.claimed").write_bytes(b"")  # a killed process left it
    with claimed(tmp_path / "m"):
        with pytest.raises(FileProblem, match="another process is working on it"), claimed(tmp_path / "m"):
            pass
        assert (tmp_path / ".m.claimed").exists()
    with claimed(tmp_path / "new" / "m"):
        pass
    with pytest.raises(FileProblem, match="nothing"), claimed(tmp_path / "m"):
        raise FileProblem("nothing")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_signal_waits_to_be_asked_for_and_the_second_does_not():
    for number in (signal.SIGTERM, signal.SIGINT):
        before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
        with interrupt_between_steps() as asked:
            assert not asked()
            signal.raise_signal(number)
            assert asked()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
        assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before


def test_no_time_for_a_step_is_a_model_all_the_same(train, tmp_path):
    answer = train(tmp_path / "m", "--seconds", 1e-9, "--json").json
    assert answer["steps"] == 0 and answer["loss"] is None and load_checkpoint(tmp_path / "m").tokenizer is not None


def test_resume_refuses_what_would_be_another_run(run, train, texts, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(texts[0].read_text() * 3)
    assert run("train", "--text", text, "--out", tmp_path / "m", *TINY_OPTIONS, "--steps", 2).code == 0
    before = weights(tmp_path / "m")
    done = run("train", "--resume", tmp_path / "m")
    assert done.code == 2 and "2 steps already" in done.err
    other = run("train", "--resume", tmp_path / "m", "--d-model", 32)
    assert other.code == 2 and "--d-model" in other.err
    text.write_text("another text\n" * 30)
    changed = run("train", "--resume", tmp_path / "m", "--steps", 4)
    assert changed.code == 2 and "the text has changed" in changed.err
    assert weights(tmp_path / "m") == before


def test_text_takes_several_files_as_a_shell_gives_them(run, texts, tmp_path):
    said = run("train", "--text", *texts, "--out", tmp_path / "m", *TINY_OPTIONS, "--steps", 1)
    assert said.code == 0 and "2 files" in said.err


def test_text_from_a_pipe_is_kept_with_the_run(run, texts, tmp_path):
    text = "The quick brown fox jumps over the lazy dog.\n" * 60
    (tmp_path / "file.txt").write_text(text)
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text(text))
    writer.start()
    said = run("train", "--text", tmp_path / "pipe", "--out", tmp_path / "a", *TINY_OPTIONS, "--steps", 2)
    writer.join()
    assert said.code == 0, said.err
    said = run("train", "--text", "-", "--out", tmp_path / "b", *TINY_OPTIONS, "--steps", 2, stdin=text)
    assert said.code == 0, said.err
    for name in ("a", "b"):
        assert (tmp_path / name / "text-1.txt").read_text() == text
        again = run("train", "--resume", tmp_path / name, "--steps", 4)
        assert again.code == 0, again.err
    for words, told in ((["--cache", tmp_path / "c"], "is read as one document"), (["--documents", "line"], "is read as one document")):
        refused = run("train", "--text", "-", "--out", tmp_path / "d", *words, stdin=text)
        assert refused.code == 2 and told in refused.err and not (tmp_path / "d").exists()
    empty = run("train", "--text", "-", "--out", tmp_path / "d", stdin="")
    assert empty.code == 2 and "standard input: expected text, it is empty" in empty.err


def test_a_single_file_is_enough(run, texts, tmp_path):
    assert run("train", "--text", texts[0], "--out", tmp_path / "m", *TINY_OPTIONS, "--steps", 1).code == 0


# compare and demo, with an experiment that was made before


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(experiment_module, "run_experiment", small_experiment)


def test_demo_prints_one_table_and_commands_that_work(run, quick, texts, tmp_path):
    out = tmp_path / "my demo"
    said = run("demo", "--quick", "--text", *texts, "--out", out)
    assert said.code == 0, said.err
    assert "\x1b" not in said.out + said.err
    for name in demo_module.MEMORIES:
        assert name in said.out
    for word in ("bits per byte", "segments back", "tokens/s", "state", "peak RAM", "98.8 MB", "4 %"):
        assert word in said.out
    assert sorted(path.name for path in out.iterdir()) == ["held-out", "models", "report.html", "results.json"]
    held_out = (out / "held-out" / "001.txt").read_text(encoding="utf-8")
    assert held_out and held_out in texts[0].read_text(encoding="utf-8")
    tried = [line.strip() for line in said.err.splitlines() if line.startswith("  mini-tfm ")]
    assert [line.split()[1] for line in tried] == ["generate", "score", "read", "generate"]
    for line in tried:
        words = [found for word in shlex.split(line)[1:] for found in (sorted(glob.glob(word)) if "*" in word else [word])]
        answer = run(*words)
        assert answer.code == 0, (line, answer.err)


def test_demo_as_json_and_on_disk(run, quick, tmp_path):
    answer = run("demo", "--steps", 5, "--seed", 7, "--out", tmp_path / "d", "--json").json
    results = json.loads((tmp_path / "d" / "results.json").read_text())
    assert answer["rows"] == results["rows"] and results["made_by"] == "mini-tfm"
    assert results["command"] == "mini-tfm demo --steps 20 --seed 7"
    assert results["rows"][1]["recall"]["6"] is None  # nothing was measured
    assert len(results["held_out_names"]) == 1 and "Python" in results["text_name"]


@pytest.mark.parametrize("words", [["demo"], ["compare", "--memory", "none"]])
def test_results_are_replaced_where_that_is_asked_for_and_only_their_own(run, quick, texts, tmp_path, words):
    again = [*words, "--text", *texts, "--out", tmp_path / "d"]
    assert run(*again).code == 0
    (tmp_path / "d" / "notes.mdb").write_text("mine")
    before = (tmp_path / "d" / "results.json").read_bytes()
    refused = run(*again)
    assert refused.code == 2 and "--overwrite" in refused.err and (tmp_path / "d" / "results.json").read_bytes() == before
    said = run(*again, "--overwrite", "--seed", 9)
    assert said.code == 0 and (tmp_path / "d" / "notes.mdb").read_text() == "mine"
    assert "notes.mdb" not in said.err and json.loads((tmp_path / "d" / "results.json").read_text())["seed"] == 9
    for name in ("report.html", "results.json", "models"):
        folder = tmp_path / f"with {name}"
        folder.mkdir()
        (folder / name).write_text('{"mine": true}')
        refused = run(*words, "--out", folder, "--overwrite")
        assert refused.code == 2 and name in refused.err
        assert [path.name for path in folder.iterdir()] == [name] and (folder / name).read_text() == '{"mine": true}'


def test_compare_trains_or_measures(run, quick, model, texts, tmp_path):
    specs = ["--memory", "none", "--memory", "window:size=8"]
    trained = run("compare", "--text", *texts, *specs, "--out", tmp_path / "c", "--json").json
    assert [row["memory"] for row in trained["rows"]] == ["none", "window:size=8"]
    assert (tmp_path / "c" / "report.html").exists() and (tmp_path / "c" / "results.json").exists()
    table = run("compare", "--text", *texts, *specs)
    assert table.code == 0 and "6 back" in table.out and "guessing gives 4 %" in table.out
    assert max(map(len, table.out.splitlines())) <= 110


def test_compare_tells_first_what_it_could_not_do(run, monkeypatch, texts, tmp_path):
    def worse(*what, **options):
        made = small_experiment(*what, **options)
        return dataclasses.replace(made, planned_steps=80, rows=[made.rows[0], failed("window:size=8", "no rows")])

    monkeypatch.setattr(experiment_module, "run_experiment", worse)
    words = ["compare", "--text", *texts, "--memory", "none", "--memory", "window:size=8"]
    said = run(*words, "--out", tmp_path / "c")
    assert said.code == 1 and "cut short: 20 of 80 steps" in said.out and "window:size=8 failed: no rows" in said.out
    page = (tmp_path / "c" / "report.html").read_text()
    after_title = page.split("</h1>")[1].lstrip()
    assert after_title.startswith('<p class="warn">cut short: 20 of 80 steps') and "window:size=8 failed: no rows" in after_title
    results = json.loads((tmp_path / "c" / "results.json").read_text())
    assert results["rows"][1]["error"] == "no rows" and results["rows"][0]["error"] is None
    assert results["command"].endswith("--steps 20 --seed 0")
    answer = run(*words, "--json")
    assert answer.code == 1 and json.loads(answer.out)["rows"][1]["bits_per_byte"] is None


def test_compare_over_seeds_and_with_a_config(run, quick, texts, tmp_path):
    (tmp_path / "shape.json").write_text('{"d_model": 16}')
    words = ["--memory", "none", "--seeds", 2, "--seed", 5, "--config", tmp_path / "shape.json", "--out", tmp_path / "c"]
    answer = run("compare", "--text", *texts, *words, "--json").json
    assert answer["seeds"] == [5, 6] and [each["seed"] for each in answer["runs"]] == [5, 6]
    assert answer["rows"][0]["spread"] == {"bits_per_byte": 0.0, "recall_far": 0.0}
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["report.html", "results.json", "seed-5", "seed-6"]
    command = json.loads((tmp_path / "c" / "results.json").read_text())["command"]
    assert command.endswith(f"--seed 5 --seeds 2 --config {tmp_path / 'shape.json'}")
    table = run("compare", "--text", *texts, *words[:-2])
    assert table.code == 0 and "2.000 \u00b1 0.000" in table.out


PLUGIN = """
import os, sys
from mini_tfm.memory import Memory, hookimpl
class Loud(Memory):
    "Prints, and fails as it is told."
    def __init__(self, how: str = "not"):
        print("made by a plugin")
        self.how = how
    def write(self, state, site, layer, new):
        print("written to")
        if self.how == "raise":
            raise ValueError("no rows today")
        if self.how == "exit":
            sys.exit(0)
        if self.how == "die":
            os._exit(0)
@hookimpl
def register_memories(register):
    register("loud", Loud)
"""


def test_a_memory_that_fails_is_a_row(tmp_path, model, texts):
    write_plugin(tmp_path, "loud", PLUGIN)
    (tmp_path / "t.txt").write_text("It was the best of times, it was the worst of times. " * 6)
    specs = [word for how in ("raise", "exit", "die", "not") for word in ("--memory", f"loud:how={how}")]
    words = ["compare", model, "--text", tmp_path / "t.txt", *specs, "--memory", "none", "--json"]
    done = run_process(*words, env=with_plugins(tmp_path), timeout=300)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [bool(row["error"]) for row in rows] == [True, True, True, False, False]
    assert "no rows today" in rows[0]["error"] and "SystemExit" in rows[1]["error"] and "died" in rows[2]["error"]
    assert rows[3]["bits_per_byte"] == rows[4]["bits_per_byte"] > 0


@pytest.mark.parametrize(("share", "is_told"), [(0.0, True), (0.25, False)])
def test_compare_of_a_saved_model_says_why_it_recalls_nothing(run, model, texts, monkeypatch, share, is_told):
    row = {"memory": "none", "error": None, "bits_per_byte": 2.0, "tokens_per_second": 9.0, "state_bytes": 0, "peak_rss_bytes": 9}
    row |= {"recall": {"1": 0.0, "2": share}, "recall_far": share}
    monkeypatch.setattr("mini_tfm.cli.compare._measured", lambda *given: [row])
    said = run("compare", model, "--text", texts[0], "--memory", "none")
    assert said.code == 0 and ("No fact is recalled: only a model that was trained" in said.out) == is_told


def test_compare_of_a_saved_model_is_its_score(run, model, tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 6)
    answer = run("compare", model, "--text", text, "--memory", "none", "--memory", "window:size=8", "--json").json
    rows = {row["memory"]: row for row in answer["rows"]}
    assert rows["none"]["state_bytes"] == 0 < rows["window:size=8"]["state_bytes"]
    assert all(row["peak_rss_bytes"] > 10**7 and set(row["recall"]) == {"0", "1", "2", "4", "6"} for row in rows.values())
    assert rows["none"]["bits_per_byte"] == pytest.approx(
        run("score", model, text, "--memory", "none", "--json").json["all"]["bits_per_byte"]
    )
    assert rows["none"]["bits_per_byte"] != rows["window:size=8"]["bits_per_byte"]
    table = run("compare", model, "--text", text, "--memory", "none")
    assert table.code == 0 and "0 back" in table.out
    assert load_checkpoint(model).memory_text == "window:size=8"


@pytest.mark.parametrize("memory", ["none", "window:size=64"])
def test_nothing_is_on_disk_without_a_path(memory):
    assert demo_module.on_disk(memory, Path("x.mdb")) is None


def test_a_path_is_added_where_a_strategy_takes_one(tmp_path):
    from mini_tfm.memory import memory as make_memory

    assert demo_module.on_disk("window:size=64+store:top_k=16", Path("x.mdb")) == "window:size=64+store:top_k=16,path=x.mdb"
    assert demo_module.on_disk("store", Path("a b.mdb")) == "store:path=a b.mdb"
    for name in ("a,b", "a+store:b", "it's", 'say "x"'):
        path = tmp_path / name / "x.mdb"
        made = make_memory(demo_module.on_disk("store", path))
        assert made.disk.given == str(path)


@pytest.mark.long
def test_the_demo_for_real(run, tmp_path):
    answer = run("demo", "--steps", 60, "--out", tmp_path / "d", "--json").json
    assert len(answer["rows"]) == len(demo_module.MEMORIES)
    assert all(0 < row["bits_per_byte"] < 8 for row in answer["rows"])


# ------------------------------------------------------------------------- from a model that is there


def published(folder, **changes):
    """A folder of Hugging Face's layout whose tokenizer puts tokens around a text."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4, "c": 5}, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    config = Config(**{"vocab_size": 8, "d_model": 8, "n_heads": 2, "n_encoder_layers": 1, "n_decoder_layers": 1, "attention_scale": 1.0,
                       "norm": "rms", "norm_eps": 1e-6, "bias": False, "positions": "relative", "embedding_scale": False,
                       "output_scale": 8**-0.5, "bos_id": 0, "eos_id": 1, **changes})  # fmt: skip
    Transformer(config).save_hugging_face(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_train_from_a_published_model(run, tmp_path):
    """A memory alone is trained beside it; the folder stays as it was, and the run goes on as any."""
    base, pairs = published(tmp_path / "base"), tmp_path / "pairs.tsv"
    pairs.write_text("".join(f"{'a b c '[: 2 * (i % 3 + 1)].strip()}\tb c\n" for i in range(30)))
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    words = ("--batch-size", 2, "--memory", "recurrent:tokens=2", "--trainable", "memory.*", "--segment-length", 3, "--json")
    answer = run("train", "--from", base, "--text", pairs, "--out", tmp_path / "m", "--steps", 3, *words).json
    assert (answer["steps"], answer["memory"]) == (3, "recurrent:tokens=2")
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    told = run("train", "--resume", tmp_path / "m", "--steps", 5, "--json").json
    assert told["steps"] == 5
    trained, first = load_checkpoint(tmp_path / "m"), load_checkpoint(base)
    for name, weight in first.model.weights.items():
        assert trained.model.weights[name].tobytes() == np.ascontiguousarray(weight).tobytes()
    assert trained.model.config == first.model.config.replace(segment_length=3)
    assert np.array_equal(trained.tokenizer.encode_alone("a b", 9), [3, 4, 1])
    run("train", "--from", tmp_path / "m", "--text", pairs, "--out", tmp_path / "n", "--steps", 1, "--batch-size", 2)
    assert load_checkpoint(tmp_path / "n").memory_text == "recurrent:tokens=2", "the model's own, where no other is asked for"


def test_train_from_frames_sources_as_the_tokenizer_does(run, tmp_path, monkeypatch):
    seen, step = [], Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, source, *given: seen.append(source) or step(self, source, *given))
    base, pairs = published(tmp_path / "base"), tmp_path / "pairs.tsv"
    pairs.write_text("a b\tc\n" * 20)
    assert run("train", "--from", base, "--text", pairs, "--out", tmp_path / "m", "--steps", 1).code == 0
    assert (seen[0] == [3, 4, 1]).all()


def test_train_from_refuses_what_the_model_decides(run, tmp_path, texts):
    base = published(tmp_path / "base")
    for words in (("--d-model", 16), ("--tokenizer", "bytes"), ("--vocab-size", 300)):
        failed = run("train", "--from", base, "--out", tmp_path / "m", *words)
        assert failed.code == 2 and f"{words[0]} comes from the model with --from" in failed.err
    wrong = run("train", "--from", base, "--text", texts[0], "--out", tmp_path / "m", "--trainable", "memory.*", "--steps", 1)
    assert wrong.code != 0 and "trainable: expected patterns" in wrong.err
    wrong = run("train", "--from", base, "--text", texts[0], "--objective", "denoise", "--out", tmp_path / "m")
    assert wrong.code != 0 and "denoise needs a vocabulary" in wrong.err
    (base / "tokenizer.json").unlink()
    wrong = run("train", "--from", base, "--text", texts[0], "--out", tmp_path / "m")
    assert wrong.code != 0 and "has no tokenizer" in wrong.err and not (tmp_path / "m" / "config.json").exists()


# ------------------------------------------------------------------------- adapters beside a model that is there


def test_adapters_are_trained_written_and_used(run, tmp_path):
    """train --lora-rank, resume, convert to PEFT's layout; then --lora of every command that reads a model gives what the run has."""
    base, pairs, text = published(tmp_path / "base"), tmp_path / "pairs.tsv", tmp_path / "text.txt"
    pairs.write_text("a b\tb c\nb a\tc c\n" * 15)
    text.write_text("a b c a b c b a\n")
    words = ("--lora-rank", 2, "--lora-alpha", 4, "--lora-targets", "q", "--lora-targets", "DenseReluDense.wi", "--lora-dropout", 0.1)
    words += ("--batch-size", 2, "--learning-rate", 0.3)
    assert run("train", "--from", base, "--text", pairs, "--out", tmp_path / "m", "--steps", 3, *words).code == 0
    assert run("train", "--resume", tmp_path / "m", "--steps", 5).code == 0
    trained, first = load_checkpoint(tmp_path / "m").model, load_checkpoint(base).model
    parts = {name.rpartition(".")[0].rpartition(".")[2] for name in trained.weights if name.startswith("lora.") and name != "lora.scale"}
    assert parts == {"q", "in"} and trained.weights["lora.scale"] == 2
    for name, weight in first.weights.items():
        assert trained.weights[name].tobytes() == np.ascontiguousarray(weight).tobytes()
    assert run("info", tmp_path / "m", "--json").json["model"]["adapters"] == "LoRA of rank 2 beside 5 layers"

    assert run("convert", tmp_path / "m", tmp_path / "adapter", "--to", "peft").code == 0
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert run("convert", base, tmp_path / "merged", "--lora", tmp_path / "adapter", "--to", "hugging-face").code == 0
    for name, *rest in (
        ("generate", "a b", "--max-new-tokens", 5, "--json"),
        ("score", text, "--json"),
        ("embed", text, "--json"),
        ("chat", "--system", "a"),
    ):
        own, added, whole, without = (
            run(name, *words, *rest, stdin="")
            for words in ((tmp_path / "m",), (base, "--lora", tmp_path / "adapter"), (tmp_path / "merged",), (base,))
        )
        if name == "chat":
            assert "chat template" in added.err  # it came as far as that
            continue
        told = [_numbers(answer.json) for answer in (own, added, whole)]
        assert told[0] == told[1] == told[2], name
        assert name == "generate" or told[0] != _numbers(without.json)


def _numbers(answer):
    """What a command found: no paths, no times."""
    if "files" in answer:
        return answer["all"]["bits"]
    return answer.get("vectors", answer.get("text"))


def test_reading_with_adapters_fills_the_memory_of_the_adapted_model(run, tmp_path):
    base, text = published(tmp_path / "base"), tmp_path / "text.txt"
    text.write_text("a b c a b c b a\n")
    model = load_checkpoint(base).model
    model.add_lora(2, targets="all-linear")
    for name in [name for name in model.weights if name.endswith(".b")]:
        model.weights[name] = model.weights[name] + np.float32(0.1)
    model.save_lora(tmp_path / "adapter")
    words = ("--memory", f"store:path={tmp_path / 'notes.mdb'}", "--segment-length", 3)
    done = run("read", base, text, *words, "--lora", tmp_path / "adapter")
    assert done.code == 0 and f"--lora {tmp_path / 'adapter'}" in done.err
    assert run("score", base, text, *words, "--lora", tmp_path / "adapter").code == 0
    assert run("score", base, text, *words).code != 0, "rows of other weights"


def test_adapters_that_cannot_be_are_told_before_any_work(run, tmp_path, texts):
    base, out = published(tmp_path / "base"), tmp_path / "m"
    for words, fault in (
        (("--lora-rank", 2), "--lora-rank needs --from"),
        (("--from", base, "--lora-alpha", 2), "--lora-alpha needs --lora-rank"),
        (("--from", base, "--lora-targets", "q"), "--lora-targets needs --lora-rank"),
        (("--from", base, "--lora-rank", 2, "--lora-targets", "q_proj"), "targets: 'q_proj' fits no layer"),
        (("--from", base, "--lora-rank", 0), "--lora-rank"),
        (("--from", base, "--lora-rank", 2, "--lora-alpha", 0), "--lora-alpha"),
        (("--resume", base, "--lora-rank", 2), "--lora-rank comes from the folder"),
    ):
        failed = run("train", *words, *([] if "--resume" in words else ["--text", texts[0], "--out", out]))
        assert failed.code == 2 and fault in failed.err, words
    assert not (out / "config.json").exists()
    failed = run("generate", base, "a", "--lora", tmp_path / "none")
    assert failed.code == 2 and "none/adapter_config.json: there is no such file" in failed.err
    failed = run("convert", base, tmp_path / "adapter", "--to", "peft")
    assert failed.code == 2 and "has no adapters to save" in failed.err
