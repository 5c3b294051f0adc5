"""What the tests of the command line share: tiny options, and two ways to run a command."""

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from mini_tfm.cli import main

TINY = {"d_model": 16, "n_heads": 2, "n_encoder_layers": 1, "n_decoder_layers": 1}
TINY_OPTIONS = [word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", str(value))]
TINY_OPTIONS += ["--tokenizer", "bytes", "--segment-length", "16", "--n-segments", "2", "--batch-size", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}


def command(*words):
    """The command as a process of its own, as one would type it."""
    return [sys.executable, "-m", "mini_tfm", *map(str, words)]


def with_plugins(folder):
    """The environment in which a process finds the plugins in `folder` beside what this process finds."""
    found = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return {**ENVIRONMENT, "PYTHONPATH": found, "PYTHONDONTWRITEBYTECODE": "1"}


def run_process(*words, **options):
    options = {"capture_output": True, "text": True, "timeout": 300, "env": ENVIRONMENT, **options}
    return subprocess.run(command(*words), **options)


class Run:
    """The command in this process: exit code, standard output and standard error."""

    def __init__(self, words, stdin=None):
        result = CliRunner().invoke(main, [str(word) for word in words], input=stdin)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        self.code, self.out, self.err = result.exit_code, result.stdout, result.stderr

    @property
    def json(self):
        """The one document of standard output, which must be there without a progress bar or a colour around it."""
        assert self.code == 0, self.err
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def write_plugin(folder, name, body):
    """A distribution with one entry point, as pip would leave it in `folder`."""
    (folder / f"{name}_plugin.py").write_text(body)
    about = folder / f"{name}-1.5.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
    (about / "entry_points.txt").write_text(f"[mini_tfm]\n{name} = {name}_plugin\n")
