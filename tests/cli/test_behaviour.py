"""What holds for every command: quick help, one line an error, Ctrl-C, closed pipes, plugins that are broken."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings

import pytest
from commands import ENVIRONMENT, TINY_OPTIONS, command, run_process, write_plugin

from mini_tfm import cli
from mini_tfm.cli.shared import prompt_from
from mini_tfm.pipeline import Pipeline
from mini_tfm.transformer import load_checkpoint

HELP = [[], *([name] for name in cli.COMMANDS), *(["plugins", name] for name in ("list", "check", "new"))]


@pytest.mark.parametrize("words", HELP, ids=lambda words: " ".join(words) or "mini-tfm")
def test_help_names_units(run, words):
    said = run(*words, "--help")
    assert said.code == 0 and said.err == "" and "\x1b" not in said.out
    if words and words != ["plugins"]:
        assert re.search(r"\b(tokens|rows|bytes|steps|segments|seconds|SECONDS|STEPS|TOKENS)\b", said.out)
    assert max(map(len, said.out.splitlines())) <= 110


def test_help_imports_next_to_nothing():
    program = (
        "import sys; sys.argv = ['mini-tfm', *sys.argv[1:]]\n"
        "from mini_tfm.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = ['numpy', 'rich', 'scipy', 'pluggy', 'lmdb', 'tokenizers', 'matplotlib', 'asyncio', 'multiprocessing']\n"
        "heavy += ['mini_tfm._core', 'mini_tfm.memory', 'mini_tfm_plugins']\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    for words in (["--help"], ["demo", "--help"], ["--version"], ["plugins", "--help"], ["train", "--help"], ["generate", "--help"]):
        done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
        assert done.stdout.splitlines()[-1] == "[]", words


def test_the_entry_point_and_the_module_are_one(run):
    assert run("--version").out.split() == ["mini-tfm", cli.__version__]
    assert run_process("--version").stdout.split() == ["mini-tfm", cli.__version__]


# Errors: (words, what the line must name). {folder} has the texts and the model, {tmp} is new.
TRAIN = ["train", "--out", "{tmp}/new", *TINY_OPTIONS]
ERRORS = [
    ("score {folder}/nothing {folder}/a.txt", "nothing"),
    ("score {folder} {folder}/a.txt", "config.json"),
    ("score {folder}/a.txt {folder}/a.txt", "a.txt"),
    ("score {folder}/model {folder}/missing.txt", "missing.txt"),
    ("score {folder}/model {folder}/a.txt {folder}/missing.txt", "missing.txt"),
    ("score {folder}/model {folder}", "{folder}"),
    ("score {folder}/model {folder}/empty.txt", "empty"),
    ("score {folder}/model {folder}/binary", "NUL"),
    ("score {folder}/model {folder}/model", "expected a regular file, found a folder"),
    ("score {folder}/model {folder}/latin1.txt", "UTF-8"),
    ("score {folder}/model {folder}/a.txt --memory windw", "did you mean 'window'"),
    ("score {folder}/model {folder}/a.txt --memory window:siz=3", "'siz'"),
    ("score {folder}/model {folder}/a.txt --memory window:size=0", "size"),
    ("score {folder}/model {folder}/a.txt --memory window:size", "option=value"),
    ("score {folder}/model {folder}/a.txt --memory store:path={folder}/binary", "binary"),
    ("score {folder}/model {folder}/a.txt --memory store:path={folder}", "folder"),
    ("generate {folder}/model x --top-p 3 --temperature 0", "top_p"),
    ("generate {folder}/model x --top-p 3 --temperature 0", "temperature"),
    ("generate {folder}/model x --max-new-tokens -1", "max_new_tokens"),
    ("generate {folder}/model x --seed -1 --do-sample", "seed"),
    ("generate {folder}/model x --memory none --read {folder}/a.txt", "memory"),
    ("generate {folder}/model --file {folder}/latin1.txt", "UTF-8"),
    ("generate {folder}/nothing x", "nothing"),
    ("embed {folder}/model {folder}/a.txt --out {folder}/missing/v.npy", "missing"),
    ("embed {folder}/model {folder}/a.txt --out {folder}", "folder"),
    ("read {folder}/model {folder}/a.txt", "keeps nothing"),
    ("read {folder}/model {folder}/a.txt --memory store:path={tmp}/s.mdb --reset gone", "gone"),
    ("read {folder}/model {folder}/a.txt --memory store:path=/dev/null/s.mdb", "/dev/null"),
    ("info {folder}/nothing", "nothing"),
    ("info --memory nothing", "nothing"),
    ("compare {folder}/model --memory none --memory none", "each memory once"),
    ("compare {folder}/nothing --memory none", "nothing"),
    ("compare {folder}/model --text {folder}/empty.txt --memory none", "empty.txt"),
    ("compare {folder}/model --text {folder}/short.txt --memory none", "segment"),
    ("compare --text {folder}/short.txt --memory none", "text"),
    ("compare --memory windw", "windw"),
    ("demo --text {folder}/short.txt --out {tmp}/d", "text"),
    ("demo --out {folder}/a.txt", "a.txt"),
    ("demo --out {folder}/a.txt/x", "a.txt"),
    ("plugins check windw", "windw"),
    ("plugins new {folder}", "empty folder"),
    ("plugins new {folder}/a.txt", "a.txt"),
    ("plugins new {tmp}/p --name My-Memory", "--name"),
    ("plugins new {tmp}/p --name class", "--name"),
    ("plugins new {tmp}/p --name window", "--name"),
    ("plugins new {tmp}/p --name numpy", "--name"),
    ("plugins new {tmp}/json", "--name"),
    ("plugins new {tmp}/2024-notes", "2024-notes"),
    ([*TRAIN, "--text", "{folder}/short.txt"], "segment"),
    ([*TRAIN, "--text", "{folder}/empty.txt"], "empty.txt"),
    ([*TRAIN, "--text", "{folder}/missing.txt"], "missing.txt"),
    ([*TRAIN, "--memory", "windw"], "windw"),
    ([*TRAIN, "--memory", "window:size=x"], "size"),
    ([*TRAIN, "--d-model", "17"], "d_model"),
    ([*TRAIN, "--learning-rate", "-1"], "learning_rate"),
    ([*TRAIN, "--text", "{folder}/missing.txt", "--dropout", "2", "--warmup-steps", "-1"], "warmup_steps"),  # before a file is opened
    ([*TRAIN, "--text", "{folder}/missing.txt", "--dropout", "2", "--warmup-steps", "-1"], "dropout"),
    ([*TRAIN, "--text", "{folder}/missing.txt", "--validate-every", "0"], "validate_every"),
    ("train --resume {folder}/nothing --save-every 0", "save_every"),
    ([*TRAIN, "--schedule", "lunar"], "schedule"),
    ([*TRAIN, "--positions", "lunar"], "positions"),
    ([*TRAIN, "--n-decoder-layers", "0"], "decoder"),
    ([*TRAIN, "--tokenizer", "bpe", "--vocab-size", "100"], "vocab_size"),
    ([*TRAIN, "--jsonl-log", "{tmp}/missing/log"], "log"),
    ("train --out {folder}/model", "holds config.json already"),
    ("train --out {folder}/a.txt", "a.txt"),
    ("train --out {folder}/a.txt/x", "a.txt"),
    ("train --out /proc/mini-tfm", "/proc"),
    ("train --resume {folder}/model", "training"),
    ("train --resume {folder}/nothing", "nothing"),
]
USAGE = ["", "nothing", "--nothing", "generate", "score x", "embed x", "embed {folder}/model {folder}/a.txt", "compare",
         "train --steps 0",
         "train --steps x", "train --batch-size 0", "train --n-segments 0", "demo --quick --steps 3", "demo --seconds 0",
         "generate {folder}/model x --file y",
         "generate {folder}/model x --seed 3",
         "train --resume x --d-model 3",
         "train --tokenizer words", "compare {folder}/model {folder}/model {folder} --memory none", "compare {folder}/a.txt --memory none",
         "compare {folder}/model --memory none --out x", "plugins nothing", "plugins check"]  # fmt: skip


def filled(words, folder, tmp):
    words = words.split() if isinstance(words, str) else words
    return [str(word).format(folder=folder, tmp=tmp) for word in words]


def contents(folder):
    files = [path for path in folder.rglob("*") if not path.name.endswith("-lock")]  # LMDB's, beside what it was asked to open
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in files}


@pytest.mark.parametrize("words, named", ERRORS, ids=lambda value: value if isinstance(value, str) else " ".join(value[-2:]))
def test_an_error_is_one_line_and_damages_nothing(run, shared, tmp_path, words, named):
    before = contents(shared)
    said = run(*filled(words, shared, tmp_path))
    assert said.code == 2
    assert said.out == ""
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said.err.endswith(errors[0] + "\n"), said.err
    assert named.format(folder=shared) in errors[0]
    assert "Traceback" not in said.err
    assert contents(shared) == before
    assert not [path for path in tmp_path.rglob("*") if path.name != "s.mdb" and not path.name.startswith("s.mdb")]


@pytest.mark.parametrize("words", USAGE)
def test_wrong_usage_is_told_with_code_2(run, shared, tmp_path, words):
    said = run(*filled(words, shared, tmp_path))
    assert said.code == 2 and ("Usage: " in said.err or (words == "" and "Usage: " in said.out + said.err))


@pytest.mark.parametrize(("words", "told"), [("scor model", "Did you mean 'score'?"), ("generate model a b", "put it in quotes")])
def test_wrong_usage_says_what_is_meant(run, words, told):
    said = run(*words.split())
    assert said.code == 2 and told in said.err


def test_debugging_shows_where_an_error_came_from(shared):
    done = run_process("info", shared / "nothing", env={**ENVIRONMENT, "MINI_TFM_DEBUG": "1"})
    assert done.returncode == 2 and "Traceback" in done.stderr and "FileProblem" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in run_process("info", shared / "nothing").stderr


# Ctrl-C


def interrupt(words, ready, whole_group):
    """Starts a command, waits for a line on standard error, and sends SIGINT: (exit code, seconds, output, errors)."""
    process = subprocess.Popen(
        command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        seen = ""
        for line in process.stderr:
            seen += line
            if re.search(ready, line):
                break
        time.sleep(0.3)
        began = time.monotonic()
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=30)
        return process.returncode, time.monotonic() - began, out, seen + err
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def test_ctrl_c_ends_training_with_a_model(shared, tmp_path):
    words = [
        "train",
        "--text",
        shared / "a.txt",
        shared / "b.txt",
        "--out",
        tmp_path / "m",
        *TINY_OPTIONS,
        "--steps",
        10**7,
        "--validate-every",
        5,
    ]
    code, seconds, out, err = interrupt(words, "^step 5:", whole_group=True)
    assert code == 130 and seconds < 2 and out == ""
    assert "Traceback" not in err
    step = int(re.search(r"stopped: step (\d+) is saved in ", err)[1])
    assert json.loads((tmp_path / "m" / "training.json").read_text())["step_count"] == step >= 5
    assert Pipeline.load(tmp_path / "m").generate("x", max_new_tokens=3) is not None
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("whole_group", [True, False], ids=["terminal", "kill"])
def test_ctrl_c_ends_a_demo(tmp_path, whole_group):
    """While its processes are at work."""
    code, seconds, out, err = interrupt(["demo", "--steps", 60, "--out", tmp_path / "d"], "^timing a few steps", whole_group)
    assert code == 130 and seconds < 10 and out == ""  # minutes of work were left; on a busy machine the end of processes takes seconds
    assert "Traceback" not in err and "stopped: no model was saved yet" in err


def test_ctrl_c_tells_the_models_of_a_demo_that_are_there(run, monkeypatch, model, tmp_path):
    import shutil

    from mini_tfm.compare import experiment

    def stopped(documents, memories, out, **options):
        shutil.copytree(model, out / "models" / "window-size=64")
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "run_experiment", stopped)
    for words in (["demo"], ["compare", "--memory", "none"]):
        out = tmp_path / words[0]
        said = run(*words, "--out", out)
        assert said.code == 130 and said.err.splitlines()[-1] == f"stopped: saved so far: {out / 'models' / 'window-size=64'}"
        assert load_checkpoint(out / "models" / "window-size=64").memory_text == "window:size=8"


def test_ctrl_c_before_anything_is_imported():
    hook = "class Stop:\n    def find_spec(self, name, *more):\n        if name == 'click': raise KeyboardInterrupt\n"
    program = f"import runpy, sys\n{hook}sys.meta_path.insert(0, Stop())\nrunpy.run_module('mini_tfm', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
    assert done.returncode == 130 and done.stderr == "stopped\n"


def test_ctrl_c_while_writing(run, monkeypatch, model):
    def pieces(*_, **__):
        yield "some"
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "generate", pieces)
    said = run("generate", model, "x")
    assert said.code == 130 and said.out == "some" and said.err == "stopped: nothing was left half done\n"


# What is not a terminal


def test_a_closed_pipe_ends_quietly(model):
    process = subprocess.Popen(
        command("generate", model, "x", "--max-new-tokens", 10**6), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    )
    assert process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=30) == 141 and err == b""


COMMANDS = {
    "help": ["--help"],
    "help of a command": ["train", "--help"],
    "info": ["info", "{folder}/model"],
    "list": ["plugins", "list", "--json"],
    "score": ["score", "{folder}/model", "{folder}/a.txt"],
    "generate": ["generate", "{folder}/model", "x", "--max-new-tokens", "3"],
    "embed": ["embed", "{folder}/model", "{folder}/a.txt", "--json"],
    "read": ["read", "{folder}/model", "{folder}/a.txt", "--memory", "store:path={tmp}/s.mdb"],
    "train": ["train", "--text", "{folder}/a.txt", "{folder}/b.txt", "--out", "{tmp}/m", *TINY_OPTIONS, "--steps", "2"],
}


def shell(words, redirection):
    script = shlex.join(command(*words)) + " " + redirection
    return subprocess.run(["bash", "-c", f"set -o pipefail; {script}"], capture_output=True, text=True, timeout=120, env=ENVIRONMENT)


REDIRECTIONS = {"> /dev/full": 2, ">&- 2>&- <&-": 0, "<&-": 0, ">&-": 0, "2>&-": 0}
AT_EACH_CHANGE = {*((name, "> /dev/full") for name in COMMANDS), ("help", ">&- 2>&- <&-"), ("train", ">&- 2>&- <&-")}
# Each is a process, and what is done about its streams is the same code for all: at each change a full device for every command, all
# streams closed for the help and for one that writes files, and every way for one.
REDIRECTED = [
    pytest.param(name, each, marks=[pytest.mark.long] * (name != "generate" and (name, each) not in AT_EACH_CHANGE))
    for name in COMMANDS
    for each in REDIRECTIONS
]


@pytest.mark.parametrize(("name", "redirection"), REDIRECTED)
def test_streams_that_are_closed_or_full(shared, tmp_path, name, redirection):
    """Closed ones are as the null device; a reader that is gone is 141; what cannot be written is an error of one line."""
    done = shell(filled(COMMANDS[name], shared, tmp_path), redirection)
    assert done.returncode == REDIRECTIONS[redirection], done
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done
    if redirection == "> /dev/full":
        assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] != []
    if name == "train":
        assert load_checkpoint(tmp_path / "m").tokenizer is not None


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name not in ("help", "score", "train"))) for name in COMMANDS]
)
def test_a_reader_that_is_gone_before_the_first_word(shared, tmp_path, name):
    reads, writes = os.pipe()
    os.close(reads)
    words = filled(COMMANDS[name], shared, tmp_path)
    done = subprocess.run(command(*words), stdout=writes, stderr=subprocess.PIPE, text=True, timeout=120, env=ENVIRONMENT)
    os.close(writes)
    assert done.returncode == 141 and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.parametrize("name", [name if name == "help" else pytest.param(name, marks=pytest.mark.long) for name in COMMANDS])
def test_readers_of_output_and_errors_that_are_gone(shared, tmp_path, name):
    reads, writes = os.pipe()
    os.close(reads)
    words = filled(COMMANDS[name], shared, tmp_path)
    assert subprocess.run(command(*words), stdout=writes, stderr=writes, timeout=120, env=ENVIRONMENT).returncode == 141
    os.close(writes)


def test_closed_standard_input_is_no_prompt_and_no_file(model):
    asked = shell(["generate", model], "<&-")
    assert asked.returncode == 2 and "no prompt" in asked.stderr
    read = shell(["score", model, "-"], "<&-")
    assert read.returncode == 2 and "standard input: expected text, it is closed" in read.stderr and "Traceback" not in read.stderr


def test_a_terminal_without_unicode_gets_an_answer(model, shared):
    done = run_process("score", model, shared / "b.txt", env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "bits/byte" in done.stdout and done.stdout.isascii()
    done = run_process("generate", model, "ß", "--json", env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"})
    assert json.loads(done.stdout)["prompt"] == "ß"


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE", "CLICOLOR_FORCE"])
def test_no_colours_in_a_file(run, monkeypatch, model, texts, variable):
    monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("COLUMNS", "40")
    said = run("score", model, *texts)
    assert "\x1b" not in said.out + said.err and max(map(len, said.out.splitlines())) > 60


# Plugins


def test_plugins_list(run):
    found = {each["name"]: each for each in run("plugins", "list", "--json").json}
    assert {"window", "recurrent", "store"} <= set(found)
    assert found["window"]["options"]["size"] == 512 and "mini-tfm" in found["window"]["plugin"] and found["window"]["broken"] is None
    table = run("plugins", "list")
    assert table.code == 0 and "window" in table.out and "size=512" in table.out


def test_a_broken_plugin_is_listed_and_stops_nothing(tmp_path, model, texts):
    write_plugin(tmp_path, "sick", "import no_such_module_here\n")
    write_plugin(
        tmp_path,
        "child",
        "from mini_tfm.memory import Memory, hookimpl\nclass Child(Memory):\n    'A child.'\n"
        "@hookimpl\ndef register_memories(register):\n    register('child', Child)\n",
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**ENVIRONMENT, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    write_plugin(tmp_path, "endless", "while True: pass\n")
    listed = run_process("plugins", "list", "--json", env=environment)
    assert listed.returncode == 0 and listed.stderr == ""
    found = {each["name"]: each for each in json.loads(listed.stdout)}
    for name in ("sick", "endless", "child"):
        assert found[name] == {"name": name, "plugin": f"{name} ({name} 1.5)", "about": "", "options": None, "broken": None}
    named = run_process("plugins", "list", "child", "sick", "--json", env=environment)
    child, sick = json.loads(named.stdout)
    assert child["about"] == "A child." and child["options"] == {} and child["broken"] is None
    assert "no_such_module_here" in sick["broken"] and sick["plugin"] == "sick (sick 1.5)" and named.stderr == ""
    table = run_process("plugins", "list", "sick", env=environment)
    assert table.returncode == 0 and "broken: " in table.stdout
    unknown = run_process("plugins", "list", "windw", env=environment)
    assert unknown.returncode == 2 and "did you mean 'window'?" in unknown.stderr
    scored = run_process("score", model, texts[0], "--json", env=environment)
    assert scored.returncode == 0 and scored.stderr == ""
    asked = run_process("score", model, texts[0], "--memory", "sick", env=environment)
    assert asked.returncode == 2 and "Traceback" not in asked.stderr
    assert [line.split(":")[0] for line in asked.stderr.splitlines()] == ["warning", "error"]


def test_a_warning_is_a_line(run, monkeypatch, model):
    def generate(*_, **__):
        warnings.warn("first\nsecond", UserWarning, stacklevel=1)
        return iter("x")

    monkeypatch.setattr(Pipeline, "generate", generate)
    said = run("generate", model, "x")
    assert said.code == 0 and said.err == "warning: first second\n"


def test_plugins_check(run):
    passed = run("plugins", "check", "window:size=8", "--json").json
    assert passed["passed"] and len(passed["checks"]) > 10 and all(check["about"] for check in passed["checks"])


def test_plugins_check_leaves_the_files_of_a_memory_alone(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.mdb").write_bytes(b"mine")
    for path in ("notes.mdb", tmp_path / "notes.mdb", "'new, and old.mdb'"):
        assert run("plugins", "check", f"store:top_k=4,path={path}", "--only", "runs", "--only", "is_deterministic").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["notes.mdb"] and (tmp_path / "notes.mdb").read_bytes() == b"mine"


def test_each_check_has_a_file_of_its_own(run):
    """Their models are of unequal widths, which one file cannot serve."""
    said = run("plugins", "check", "store:top_k=4,path=notes.mdb", "--only", "runs", "--only", "comes_back_from_disk", "--only", "helps")
    assert said.code == 0, said.out


def test_plugins_check_of_a_memory_that_never_writes_says_what_to_check(run, tmp_path):
    path = tmp_path / "notes.mdb"
    said = run("plugins", "check", f"window:size=8+store:path={path},read_only=true")
    assert said.code == 2 and "never writes" in said.err and f"without read_only: window:size=8+store:path={path}\n" in said.err
    assert run("plugins", "check", f"store:read_only=false,path={path}", "--only", "runs").code == 0
    assert not path.exists()


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("The import statement has two forms, and", "The import statement has"),
        ("* \n -- Internationalization of applications", "Internationalization of"),
        ("列出当前目录下的文件。如果没有指定排序选项，则按字母顺序排列条目。", "列出当前目录下的文件。如果没有指定排序选项，则按"),
        ("\n ... \n", "PROMPT"),
        ('<!DOCTYPE html>\n<div class="btn btn-primary">\n<p>The quick <b>brown fox jumps over</b>', "brown fox jumps over"),
        ('.TH LS 1 "March 2026"\n.SH NAME\n\\fBls\\fR \\- list directory contents', "list directory contents"),
        ("====\nUse\n====\n\n|---|----|\n| a | it |\n\n**Some** words `of` that text, at last", "that text, at last"),
        ("# Title\n\nSee https://example.com/a/long/page for short words", "for short words"),
        ("--a-long-option=3 4", "a-long-option=3 4"),
    ],
)
def test_a_prompt_is_in_the_language_of_the_text(text, prompt):
    assert prompt_from(text) == prompt


BAD = """
import numpy as np
from mini_tfm.memory import RowMemory, hookimpl

class Bad(RowMemory):
    "Keeps what it likes."

    def __init__(self):
        super().__init__(size=4)

    def keep(self, scores, positions):
        {keep}

@hookimpl
def register_memories(register):
    register("{name}", Bad)
"""


def test_plugins_check_tells_what_fails(run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    write_plugin(tmp_path, "random_test", BAD.format(name="random_test", keep="return np.random.default_rng().random(positions.shape)"))
    some = [word for name in ("runs", "is_deterministic", "rows_reorder", "capacity_holds") for word in ("--only", name)]
    said = run("plugins", "check", "random_test", *some)
    assert said.code == 1 and "FAILS" in said.out and "passes" in said.out and "is_deterministic" in said.out
    assert "checks fail" in said.out and "skipped" not in said.out
    skip = "--skip", "rows_reorder", "--skip", "is_deterministic"
    skipped = json.loads(run("plugins", "check", "random_test", *some, *skip, "--json").out)
    assert skipped["skipped"] == ["is_deterministic", "rows_reorder"] and skipped["passed"]
    assert [check["check"] for check in skipped["checks"]] == ["runs", "capacity_holds"]
    unknown = run("plugins", "check", "random_test", "--skip", "runz")
    assert unknown.code == 2 and "--skip: expected one of runs, " in unknown.err
    assert "one check alone: mini-tfm plugins check random_test --only is_deterministic" in said.out


@pytest.mark.parametrize(
    ("keep", "failure"),
    [
        ("import os; os._exit(3)", "expected the process to go on, it ended with exit code 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "expected the process to go on, it ended with signal 9"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("raise GeneratorExit", "GeneratorExit"),
        ("raise KeyboardInterrupt", "expected no error, got KeyboardInterrupt"),
        ("print('here I am'); return positions", "expected nothing on standard output, got 'here I am"),
        ("import os; os.write(1, b'here'); return positions", "expected nothing on standard output, got 'here"),
        ("np.ones(1 << 33)", "MemoryError"),
        ("while True: pass", "expected it to end within 3 s, it was still at work"),
    ],
)
def test_a_memory_that_ends_stops_or_prints_fails_a_check_and_does_nothing_worse(run, tmp_path, monkeypatch, keep, failure):
    monkeypatch.syspath_prepend(str(tmp_path))
    write_plugin(tmp_path, "bad_test", BAD.format(name="bad_test", keep=keep))
    limit = 3 if "while" in keep else 60
    said = run("plugins", "check", "bad_test", "--json", "--limit", limit, "--only", "runs")
    assert said.code == 1
    (check,) = json.loads(said.out)["checks"]
    assert check["check"] == "runs" and not check["passed"] and failure in check["failures"][0]


def test_the_checks_after_one_that_ended_the_process_are_made(run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    keep = "import os; (os._exit(4) if positions.dtype == np.int64 and len(positions) == 3 else 0); return positions"
    write_plugin(tmp_path, "bad_test", BAD.format(name="bad_test", keep=keep))
    names = ["runs", "other_models", "empty_is_nothing", "rows_are_independent", "rows_pause", "rows_reorder", "stacks"]
    said = run("plugins", "check", "bad_test", "--json", *(word for name in names for word in ("--only", name)))
    checks = {each["check"]: each["passed"] for each in json.loads(said.out)["checks"]}
    assert list(checks) == names
    assert [name for name, passed in checks.items() if not passed] == ["other_models", "rows_are_independent", "rows_reorder"]


def test_plugins_new_writes_a_plugin_of_that_name(run, tmp_path):
    said = run("plugins", "new", tmp_path / "mine", "--name", "bees_wax")
    assert said.code == 0, said.err
    written = [path for path in (tmp_path / "mine").rglob("*") if path.is_file()]
    assert sorted(map(str, written)) == said.out.split() and any(path.name == "pyproject.toml" for path in written)
    for path in written:
        text = path.read_text(encoding="utf-8") + str(path)
        assert not re.search("my_memory|my-memory|MyMemory", text)
    assert any("bees_wax" in path.read_text(encoding="utf-8") for path in written)
    (tmp_path / "bees-dance").mkdir()
    assert run("plugins", "new", tmp_path / "bees-dance").code == 0  # an empty folder, which Python would take for a package
    assert any("bees_dance" in path.read_text(encoding="utf-8") for path in (tmp_path / "bees-dance").rglob("*.py"))
    again = run("plugins", "new", tmp_path / "mine")
    assert again.code == 2 and "empty folder" in again.err
