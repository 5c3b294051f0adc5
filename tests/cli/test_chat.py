"""chat: questions from a pipe and from a terminal, what is remembered, and models without a template."""

import json
import os
import pty
import select
import subprocess
import sys
import time

import pytest
from commands import ENVIRONMENT, command

from mini_tfm.checkpoint.models import save_model
from mini_tfm.config import Config
from mini_tfm.pipeline import Pipeline
from mini_tfm.text.tokenizers import BPETokenizer, train_bpe
from mini_tfm.transformer import Transformer

pytest.importorskip("jinja2", reason="chat templates need jinja2")

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}assistant:"


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A folder with a chat template; the model says something for ever, which is not a word."""
    files = train_bpe(["some words, some other words"] * 4, 300).files()
    about = json.loads(files["tokenizer_config.json"]) | {"chat_template": TEMPLATE}
    tokenizer = BPETokenizer(files["tokenizer.json"], json.dumps(about).encode())
    sizes = {"d_model": 16, "n_heads": 2, "n_encoder_layers": 0, "n_decoder_layers": 1}
    config = Config(vocab_size=tokenizer.vocab_size, context_length=96, framed_by_tokenizer=True, **sizes)
    folder = tmp_path_factory.mktemp("chat") / "model"
    save_model(folder, Transformer(config, seed=3), tokenizer=tokenizer)
    return folder


def answers_of(folder, *questions, system=None, **options):
    pipe, said, answers = Pipeline.load(folder), [{"role": "system", "content": system}] if system else [], []
    for question in questions:
        said.append({"role": "user", "content": question})
        answers.append(pipe.chat(said, **options))
        said.append({"role": "assistant", "content": answers[-1]})
    return "".join(answer + "\n" for answer in answers)


def test_a_line_is_a_question_and_what_was_said_is_known(run, talker):
    options = {"do_sample": True, "seed": 1, "max_new_tokens": 16}
    words = ["--do-sample", "--seed", 1, "--max-new-tokens", 16]
    said = run("chat", talker, *words, stdin="one\n\n  two \n")
    assert (said.code, said.err) == (0, "")
    assert said.out == answers_of(talker, "one", "two", **options)
    assert said.out != answers_of(talker, "one", **options) + answers_of(talker, "two", **options)


def test_texts_are_read_first_and_a_reset_keeps_them(run, talker, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("some words, " * 40)
    pipe = Pipeline.load(talker, memory="window:size=16+blocks:block_size=8", segment_length=32)
    pipe.read(path.read_text())
    answer = pipe.chat([{"role": "user", "content": "words"}], max_new_tokens=6) + "\n"
    words = ["--max-new-tokens", 6, "--memory", "window:size=16+blocks:block_size=8", "--segment-length", 32]
    said = run("chat", talker, "--read", path, *words, stdin="words\n/reset\nwords\n")
    assert said.out == answer * 2
    assert said.out != answers_of(talker, "words", max_new_tokens=6) * 2
    assert "has none to read into" in run("chat", talker, "--read", path, stdin="words\n").err


def test_what_is_recalled_is_shown(run, talker, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("some words, " * 40)
    stack = f"window:size=16+blocks:block_size=8,margin=0,document=book,path={tmp_path / 'rows'}"
    words = ["--max-new-tokens", 6, "--memory", stack, "--segment-length", 32, "--show-recalled"]
    said = run("chat", talker, "--read", path, *words, stdin="words\n")
    pipe = Pipeline.load(talker, memory="window:size=16+blocks:block_size=8,margin=0", segment_length=32)
    pipe.read(path.read_text())
    (one,) = pipe.recall([{"role": "user", "content": "words"}])
    assert one.text in path.read_text() and one.rows == one.n_tokens == 8 and one.document is None
    first, where, text = said.err.splitlines()
    assert first.startswith("recalled: 1 passages, 8 rows, found in ") and first.endswith(" ms")
    assert where == f"  tokens {one.position} to {one.position + 7} of the document book:"
    assert text == "    | " + one.text
    assert said.out == run("chat", talker, *words[:-1], "--read", path, stdin="words\n").out


def test_commands_are_not_questions(run, talker):
    said = run("chat", talker, "--max-new-tokens", 6, stdin="one\n/reset\ntwo\n/exit\nthree\n")
    assert said.out == answers_of(talker, "one", max_new_tokens=6) + answers_of(talker, "two", max_new_tokens=6)


def test_options_reach_the_model(run, talker):
    words = ["--system", "Be short.", "--do-sample", "--seed", 3, "--temperature", 2.0, "--max-new-tokens", 8]
    options = {"do_sample": True, "seed": 3, "temperature": 2.0, "max_new_tokens": 8}
    assert run("chat", talker, *words, stdin="one\n").out == answers_of(talker, "one", system="Be short.", **options)
    assert run("chat", talker, *words[:-2], 0, stdin="one\n").code == 2


def test_the_oldest_is_forgotten_where_the_model_reads_no_more(run, talker):
    many = "".join(f"question number {i}\n" for i in range(6))
    said = run("chat", talker, "--system", "S", "--max-new-tokens", 8, stdin=many)
    assert said.code == 0 and said.out.count("\n") >= 6
    assert "the oldest 1 questions and answers are forgotten" in said.err
    too_long = run("chat", talker, stdin="word " * 100 + "\n")
    assert too_long.code == 2 and "at most 96" in too_long.err


def test_a_memory_reads_what_is_too_long(run, talker):
    said = run("chat", talker, "--memory", "window:size=32", "--max-new-tokens", 4, stdin="word " * 100 + "\n")
    assert (said.code, said.err) == (0, "")


def test_a_model_without_a_template_is_told_before_a_question(run, model):
    said = run("chat", model, stdin="")
    assert said.code == 2 and "no chat template" in said.err and said.err.count("\n") == 1


def test_input_that_is_not_text(talker):
    done = subprocess.run(command("chat", talker), input=b"one\n\xff\n", capture_output=True, timeout=60, env=ENVIRONMENT)
    assert done.returncode == 2 and b"line 2: expected UTF-8" in done.stderr


# Makes its standard input the terminal that sends Ctrl-C, and becomes the command.
AT_TERMINAL = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"


class Terminal:
    """A command at a terminal."""

    def __init__(self, *words):
        self.screen, inside = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", AT_TERMINAL, *command(*words)],
            **dict.fromkeys(("stdin", "stdout", "stderr"), inside),
            env=ENVIRONMENT,
            start_new_session=True,
        )
        os.close(inside)
        self.shown = ""

    def wait_for(self, condition, seconds=60):
        end = time.monotonic() + seconds
        while not condition(self.shown):
            assert time.monotonic() < end, self.shown
            if select.select([self.screen], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self.screen, 1 << 16).decode("utf-8", "replace")
                except OSError:  # the other end is closed
                    assert condition(self.shown), self.shown

    def type(self, data):
        os.write(self.screen, data)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        os.close(self.screen)


def test_ctrl_c_ends_the_answer_then_the_command(talker):
    with Terminal("chat", talker, "--memory", "window:size=8", "--max-new-tokens", 1_000_000) as terminal:
        terminal.wait_for(lambda shown: shown.endswith("> "))
        terminal.type(b"one\n")
        terminal.wait_for(lambda shown: len(shown.partition("> one\r\n")[2]) > 20)
        terminal.type(b"\x03")
        terminal.wait_for(lambda shown: shown.endswith("> "))
        time.sleep(0.5)  # a signal between readline's prompt and its waiting is seen with the next key
        terminal.type(b"\x03")
        terminal.wait_for(lambda shown: "stopped" in shown)
        assert terminal.process.wait(60) == 130


def test_a_terminal_that_is_closed_ends_it(talker):
    with Terminal("chat", talker) as terminal:
        terminal.wait_for(lambda shown: shown.endswith("> "))
        terminal.type(b"\x04")
        assert terminal.process.wait(60) == 0
