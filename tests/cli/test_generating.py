"""`mini-tfm generate --out`: a line for each line, in order, whatever stops it in between."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from commands import ENVIRONMENT, TINY, command, run_process

from mini_tfm.cli import generating
from mini_tfm.config import Config
from mini_tfm.pipeline import Pipeline
from mini_tfm.text.tokenizers import ByteTokenizer
from mini_tfm.transformer import Transformer

PROMPTS = ["The fox", "", "a", "jumps over the lazy dog, and back again, and over", "naïve", *(f"prompt {i}" for i in range(30))]
WORDS = ["--max-new-tokens", 9, "--batch-tokens", 60, "--do-sample", "--seed", 3, "--temperature", 2]
OPTIONS = {"max_new_tokens": 9, "do_sample": True, "seed": 3, "temperature": 2.0}


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    return file


def expected(model):
    return [" ".join(text.splitlines()) for text in Pipeline.load(model).generate_many(PROMPTS, **OPTIONS)]


def test_a_line_for_each_line(run, model, prompts, tmp_path):
    out = tmp_path / "out.txt"
    said = run("generate", model, "--file", prompts, "--out", out, *WORDS)
    assert said.code == 0 and "35 lines in" in said.err
    assert out.read_text().split("\n") == [*expected(model), ""]
    assert sorted(os.listdir(tmp_path)) == ["out.txt", "prompts.txt"]


def test_json_lines_in_and_out(run, model, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(p if i % 2 else {"prompt": p, "id": i}) + "\n" for i, p in enumerate(PROMPTS)))
    said = run("generate", model, "--file", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl", *WORDS, "--json")
    assert said.json["lines"] == 35 and said.json["options"]["seed"] == 3
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    texts = Pipeline.load(model).generate_many(PROMPTS, **OPTIONS)
    assert records == [{"prompt": prompt, "text": text} for prompt, text in zip(PROMPTS, texts, strict=True)]
    words = ["--num-beams", 2, "--num-return-sequences", 2, "--max-new-tokens", 5]
    assert run("generate", model, "--file", tmp_path / "in.jsonl", "--out", tmp_path / "two.jsonl", *words).code == 0
    first = json.loads((tmp_path / "two.jsonl").read_text().splitlines()[0])
    assert first["texts"] == Pipeline.load(model).generate(PROMPTS[0], num_beams=2, num_return_sequences=2, max_new_tokens=5)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_it_goes_on_behind_the_last_whole_line(run, model, prompts, tmp_path, monkeypatch, error):
    """Stopped again and again in the middle of a write."""
    monkeypatch.setattr(generating, "BATCHES_AT_ONCE", 1)
    out, calls = tmp_path / "out.txt", 0
    whole = generating._append

    def torn(fd, path, lines):
        nonlocal calls
        calls += 1
        if calls % 2 == 0:
            os.write(fd, lines[: len(lines) // 2])
            raise error
        whole(fd, path, lines)

    monkeypatch.setattr(generating, "_append", torn)
    runs = 0
    while True:
        runs += 1
        said = run("generate", model, "--file", prompts, "--out", out, *WORDS)
        if said.code == 0:
            break
        assert runs < 30
    assert runs > 3 and "lines already" in said.err
    assert out.read_text().split("\n") == [*expected(model), ""]


def test_a_killed_process_loses_and_repeats_nothing(model, prompts, tmp_path):
    out = tmp_path / "out.txt"
    words = ["generate", model, "--file", prompts, "--out", out, *WORDS]
    killed = 0
    for pause in (0.0, 0.05, 0.1):
        with subprocess.Popen(command(*words), env=ENVIRONMENT, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and not out.exists():
                time.sleep(0.01)
            time.sleep(pause)
            process.send_signal(signal.SIGKILL)
        killed += process.returncode == -signal.SIGKILL
        if process.returncode == 0:
            break
    assert killed
    if (tmp_path / ".out.txt.state").exists():
        assert run_process(*words).returncode == 0
    assert out.read_text().split("\n") == [*expected(model), ""]


def test_what_would_mix_two_runs_is_refused(run, model, prompts, tmp_path):
    out = tmp_path / "out.txt"
    words = ["generate", model, "--file", prompts, "--out", out]
    out.write_text("mine\n")
    said = run(*words)
    assert said.code == 2 and out.read_text() == "mine\n"
    assert said.err.count("--out") == 2 and "is there already, complete or of another command" in said.err
    out.unlink()
    pipe = Pipeline.load(model)
    (tmp_path / ".out.txt.state").write_text("{}")
    said = run(*words)
    assert said.code == 2 and "was begun from another file, model or options" in said.err and not out.exists()
    assert pipe.memory is not None
    (tmp_path / ".out.txt.state").unlink()
    held = []
    real = generating.fcntl.flock

    class Held:
        LOCK_EX, LOCK_NB = fcntl.LOCK_EX, fcntl.LOCK_NB

        @staticmethod
        def flock(fd, how):
            other = os.open(out, os.O_RDWR)
            held.append(other)
            real(other, how)
            real(fd, how)

    generating.fcntl, before = Held, generating.fcntl
    try:
        said = run(*words)
    finally:
        generating.fcntl = before
        for fd in held:
            os.close(fd)
    assert said.code == 2 and "is being written by another process" in said.err


@pytest.mark.parametrize(
    ("line", "told"),
    [("3", "line 2: expected a string, or an object"), ('{"text": "a"}', "line 2: expected a string"), ('"a', "in.jsonl, line 2")],
)
def test_a_line_that_is_no_prompt_is_named_before_anything_is_made(run, model, tmp_path, line, told):
    (tmp_path / "in.jsonl").write_text('"fine"\n' + line + "\n")
    said = run("generate", model, "--file", tmp_path / "in.jsonl", "--out", tmp_path / "out.txt")
    assert said.code == 2 and told in said.err
    assert os.listdir(tmp_path) == ["in.jsonl"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["x", "--out", "o"], "--out needs --file"),
        (["x", "--temperature", "0.5"], "temperature: 0.5 needs do_sample=True (--do-sample)"),
        (["x", "--length-penalty", "2"], "length_penalty: 2.0 needs num_beams (--num-beams) above 1"),
        (["x", "--early-stopping", "always"], "--early-stopping"),
        (["x", "--bad-words-ids", "[["], "expected JSON, such as"),
        (["x", "--bad-words-ids", "3"], "bad_words_ids: expected lists of token ids"),
    ],
    ids=str,
)
def test_wrong_words_are_named(run, model, words, told):
    said = run("generate", model, *words)
    assert said.code == 2 and told in " ".join(said.err.split())


def test_every_kind_of_option_has_its_words(run, model):
    words = ["--num-beams", 3, "--early-stopping", "never", "--eos-token-id", 70, "--eos-token-id", 80, "--max-new-tokens", 6]
    words += ["--bad-words-ids", "[[65], [66, 67]]", "--stop-strings", "a b", "--suppress-tokens", 90, "--num-return-sequences", 2]
    said = run("generate", model, "The", *words, "--json")
    options = {"num_beams": 3, "early_stopping": "never", "eos_token_id": [70, 80], "max_new_tokens": 6, "stop_strings": "a b"}
    options |= {"bad_words_ids": [[65], [66, 67]], "suppress_tokens": [90], "num_return_sequences": 2}
    texts = Pipeline.load(model).generate("The", **options)
    assert said.json["texts"] == texts
    plain = run("generate", model, "The", *words)
    assert plain.out == "".join(text if text.endswith("\n") else text + "\n" for text in texts)
    chosen = run("generate", model, "The", "--choices", "yes", "--choices", "no", "--no-stream")
    assert chosen.out in ("yes\n", "no\n")


class Rank:
    """One of some threads that act as MPI's processes do."""

    def __init__(self, rank, size, barrier, arrays):
        self.rank, self.size, self.wait, self._arrays = rank, size, barrier.wait, arrays

    def sum(self, array):
        self._arrays[self.rank] = array.copy()
        self.wait()
        array[:] = sum(self._arrays)
        self.wait()

    def share(self, array):
        self._arrays[self.rank] = array.copy()
        self.wait()
        array[:] = self._arrays[0]
        self.wait()


def test_ranks_share_the_lines_and_the_first_writes_them(model, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(generating, "BATCHES_AT_ONCE", 1)
    out, barrier, arrays = tmp_path / "out.txt", threading.Barrier(3), [None] * 3
    options = {**OPTIONS, "num_beams": 1, "num_return_sequences": 1}
    made = []

    def work(rank):
        pipe = Pipeline.load(model)
        real = pipe.generate_many
        pipe.generate_many = lambda texts, **options: made.extend(options["numbers"]) or real(texts, **options)
        generating.generate_file(pipe, prompts, out, 60, options, {}, Rank(rank, 3, barrier, arrays))

    threads = [threading.Thread(target=work, args=[rank]) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == list(range(35)), "each line was made once"
    assert out.read_text().split("\n") == [*expected(model), ""]


def test_several_processes_write_what_one_does(model, prompts, tmp_path):
    pytest.importorskip("mpi4py")
    if shutil.which("mpirun") is None:
        pytest.skip("there is no mpirun")
    names = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "OMPI_MCA_rmaps_base_oversubscribe")
    environment = {**ENVIRONMENT, **dict.fromkeys(names, "1"), "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
    out = tmp_path / "out.txt"

    def mpirun(*words):
        return subprocess.run(["mpirun", "-n", "3", *words], env=environment, capture_output=True, text=True, timeout=120)

    trial = mpirun(sys.executable, "-c", "from mpi4py import MPI; assert MPI.COMM_WORLD.Get_size() == 3")
    if trial.returncode:
        pytest.skip(f"mpirun does not work here: {trial.stderr[-300:]}")
    done = mpirun(*command("generate", model, "--file", prompts, "--out", out, *WORDS))
    assert done.returncode == 0, done.stderr
    assert out.read_text().split("\n") == [*expected(model), ""]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_every_command_that_answers_takes_a_dtype(run, model, tmp_path, dtype):
    """What it says is what the pipeline of that dtype says, and not what float32 does."""
    words, text = ["--dtype", dtype], tmp_path / "text.txt"
    text.write_text(PROMPTS[3])
    pipe, exact = Pipeline.load(model, dtype=dtype), Pipeline.load(model)
    said = run("generate", model, "The fox", "--max-new-tokens", 9, *words)
    assert said.out.removesuffix("\n").endswith(pipe.generate("The fox", max_new_tokens=9))
    scored = json.loads(run("score", model, text, "--json", *words).out)
    assert pipe.score(PROMPTS[3])["bits_per_byte"] in _numbers(scored)
    assert exact.score(PROMPTS[3])["bits_per_byte"] not in _numbers(scored)
    out = tmp_path / "out.txt"
    assert run("generate", model, "--file", text, "--out", out, "--max-new-tokens", 5, *words).code == 0
    assert out.read_text() == " ".join(pipe.generate(PROMPTS[3], max_new_tokens=5).splitlines()) + "\n"


def test_a_prompt_cache_changes_no_answer(run, tmp_path):
    model = Transformer(Config(vocab_size=ByteTokenizer().vocab_size, **TINY | {"n_encoder_layers": 0, "positions": "rotary"}))
    Pipeline(model, ByteTokenizer()).save(tmp_path / "m")
    words = ["generate", tmp_path / "m", "A long prompt", "--max-new-tokens", 9]
    expected = run(*words)
    for _ in range(2):
        said = run(*words, "--prompt-cache", tmp_path / "cache")
        assert (said.code, said.out) == (0, expected.out), said.err
    assert len(list((tmp_path / "cache").iterdir())) == 1
    refused = run(*words, "--prompt-cache", tmp_path / "cache", "--memory", "window:size=8")
    assert refused.code == 2 and "prompt_cache: expected None beside a memory" in refused.err


def _numbers(value):
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _numbers(each)
    elif isinstance(value, float):
        yield value
