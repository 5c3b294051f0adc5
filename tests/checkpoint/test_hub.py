"""Models by their name on the Hub, asked for by huggingface_hub itself: of a server on this machine."""

import json
import os
import socket
import subprocess
import sys

import pytest
from helpers import assert_same_bits
from hub import Hub

import mini_tfm as mt
from mini_tfm.checkpoint.models import save_model
from mini_tfm.errors import FileProblem
from mini_tfm.text.tokenizers import ByteTokenizer

constants = pytest.importorskip("huggingface_hub.constants")


def model_of(seed):
    config = mt.Config(vocab_size=ByteTokenizer.vocab_size, d_model=8, n_heads=1, n_encoder_layers=1, n_decoder_layers=1)
    return mt.Transformer(config, seed=seed)


def points_to(monkeypatch, url, cache):
    """What HF_ENDPOINT and HF_HOME say, to a library that is imported already."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setenv("HF_TOKEN", "")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub with owner/name, and of it a tag."""
    monkeypatch.chdir(tmp_path)
    hub = Hub()
    for seed, revision in enumerate(("main", "v1.0")):
        save_model(tmp_path / revision, model_of(seed), tokenizer=ByteTokenizer())
        (tmp_path / revision / "pytorch_model.bin").write_bytes(b"never asked for")
        hub.add("owner/name", tmp_path / revision, revision)
    points_to(monkeypatch, hub.url, tmp_path / "cache")
    with hub.running():
        yield hub


def no_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def weights(model):
    return [model.weights[name] for name in sorted(model.weights)]


def refused(name):
    with pytest.raises(FileProblem) as caught:
        mt.load(name)
    told = str(caught.value)
    assert told.startswith(f"{name}: there is no such file or folder here, and ") and "\n" not in told
    return told.partition("here, and ")[2]


def test_a_model_is_downloaded_once_and_then_needs_no_hub(hub, tmp_path, monkeypatch):
    assert_same_bits(weights(mt.load("owner/name")), weights(model_of(0)))
    assert any("GET" in line and line.endswith("model.safetensors") for line in hub.asked)
    assert not any(line.endswith(".bin") for line in hub.asked)
    hub.asked.clear()
    pipe = mt.Pipeline.load("owner/name")
    assert pipe.tokenizer.vocab_size == ByteTokenizer.vocab_size
    assert not any("resolve" in line for line in hub.asked), "it asks whether there is a newer one, and no more"
    points_to(monkeypatch, f"http://127.0.0.1:{no_port()}", tmp_path / "cache")
    assert_same_bits(weights(mt.load("owner/name")), weights(model_of(0)))
    assert "the Hub cannot be reached: check the network" in (told := refused("owner/other")) and "refused" in told


def test_a_revision_is_a_model_of_its_own(hub):
    assert_same_bits(weights(mt.load("owner/name@v1.0")), weights(model_of(1)))
    assert_same_bits(weights(mt.load("owner/name")), weights(model_of(0)))
    commit = hub.commit("owner/name", "v1.0")
    assert_same_bits(weights(mt.load(f"owner/name@{commit}")), weights(model_of(1)))
    assert refused("owner/name@v2.0").startswith("the Hub has no such revision of it: check what is behind the @")


def test_what_the_hub_does_not_give_is_one_line_that_says_what_to_do(hub):
    assert refused("owner/nobody").startswith("the Hub has no such model, or it is private: check the name, or run `hf auth login` (")
    hub.gated.add("owner/name")
    assert refused("owner/name").startswith("the Hub gives it to those alone who accepted its terms: do so on its page, then run `hf auth")
    hub.gated.clear()
    assert refused("owner/name/no.gguf").startswith("the model on the Hub has no such file: check the file's name")
    assert refused("owner/name@v1.0/no.gguf").startswith("the model on the Hub has no such file")


def test_a_download_that_breaks_off_goes_on(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    hub.broken["model.safetensors"] = 1  # of five attempts
    assert_same_bits(weights(mt.load("owner/name@v1.0")), weights(model_of(1)))
    hub.broken["model.safetensors"] = 100
    assert refused("owner/name").startswith("the download broke off: run this again, it goes on where it stopped")
    address = hub.url
    points_to(monkeypatch, f"http://127.0.0.1:{no_port()}", tmp_path / "cache")
    assert refused("owner/name").startswith("the Hub cannot be reached to complete what is here of it: check the network")
    points_to(monkeypatch, address, tmp_path / "cache")
    hub.broken.clear()
    assert_same_bits(weights(mt.load("owner/name")), weights(model_of(0)))


def test_the_command_line_asks_the_hub_that_the_environment_names(hub, tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": ""}

    def info(*words):
        command = [sys.executable, "-m", "mini_tfm", "info", *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    done = info("owner/name@v1.0", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"]["parameters"] == model_of(1).n_parameters
    done = info("owner/nobody")
    assert done.returncode != 0 and "the Hub has no such model" in done.stderr and "Traceback" not in done.stderr
