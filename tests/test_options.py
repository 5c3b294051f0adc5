"""Options are stated once: their fields check themselves, and signatures, help and the command line are made of them."""

import dataclasses
import inspect
import json
import os
from fractions import Fraction
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

import mini_tfm as mt
from mini_tfm.cli.options import options_of
from mini_tfm.cli.train import train
from mini_tfm.data import Corpus, Curriculum, Mixture, NextSegment, Pairs, SpanDenoising, TextStreams
from mini_tfm.data.batches import Batch
from mini_tfm.data.permutation import Permutation
from mini_tfm.errors import InvalidType, InvalidValue, MiniTfmError
from mini_tfm.generate.options import GenerationOptions
from mini_tfm.options import Options, about, kinds, option, takes
from mini_tfm.text import split_documents, train_bpe
from mini_tfm.text.tokenizers import ByteTokenizer
from mini_tfm.train.options import FitOptions, TrainerOptions

KINDS = [TrainerOptions, FitOptions, GenerationOptions]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Some(Options):
    owner: ClassVar[str] = "cook"

    heat: float = option(0.5, "How hot.", above=0, at_most=1)
    eggs: int | None = option(None, "How many.", at_least=1, below=9)
    pair: tuple[float, float] = option((0.1, 0.2), "Two of them.", at_least=0)
    dish: str = option("soup", "What.", choices=("soup", "cake"))
    hot: bool = option(False, "Whether.", hint="it burns")
    log: str | None = option(None, "Where.", path=True)


def test_all_faults_are_in_one_error():
    with pytest.raises(InvalidValue) as caught:
        Some(heat=0, eggs=9, pair=(1,), dish="tea", hot=1, log="")
    assert str(caught.value) == (
        "cook: heat: expected a number above 0 and at most 1, got 0; eggs: expected an integer of at least 1 and below 9 or None, got 9;"
        " pair: expected two numbers of at least 0, got (1,); dish: expected one of soup, cake, got 'tea';"
        " hot: expected True or False (it burns), got 1; log: expected a path or None, got ''"
    )


@pytest.mark.parametrize("value", [True, "1", float("nan"), float("inf"), None, [0.5], 1j])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(InvalidValue, match="heat: expected a number"):
        Some(heat=value)


@pytest.mark.parametrize("number", [np.float32, np.float64, np.float16])
def test_numbers_of_numpy_are_numbers(number):
    made = Some(heat=number(0.25), eggs=np.int64(3), pair=[np.float32(0.5), np.uint8(1)], log=Path("x"))
    assert made == Some(heat=0.25, eggs=3, pair=(0.5, 1), log=os.path.abspath("x"))
    assert [type(value) for value in (made.heat, made.eggs, *made.pair)] == [float, int, float, int]
    json.dumps(made.to_dict())  # a run is saved as JSON
    with pytest.raises(InvalidValue, match="eggs: expected an integer"):
        Some(eggs=number(3))


def test_an_unknown_option_is_named_with_a_close_one():
    for call in (lambda: Some.of({"egs": 1}), lambda: Some().replace(egs=1)):
        with pytest.raises(InvalidType, match=r"cook: unknown option 'egs' \(did you mean 'eggs'\?\); it takes heat, eggs, pair"):
            call()


def test_options_are_frozen_and_replaced():
    made = Some(eggs=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.eggs = 3
    assert made.replace(heat=1).to_dict() == {**made.to_dict(), "heat": 1} and made.heat == 0.5
    with pytest.raises(InvalidValue):
        made.replace(heat=2)


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_has_help_and_a_default_that_is_allowed(kind):
    kind()
    for field in dataclasses.fields(kind):
        help = about(field).help
        assert help and help[0].isupper() and help.endswith("."), field.name


@pytest.mark.parametrize(("function", "kind"), [(mt.Trainer, TrainerOptions), (mt.Trainer.fit, FitOptions)])
def test_a_signature_and_its_help_name_every_option(function, kind):
    shown = inspect.signature(function).parameters
    described = (function.__init__ if function is mt.Trainer else function).__doc__
    for field in dataclasses.fields(kind):
        assert shown[field.name].kind is inspect.Parameter.KEYWORD_ONLY
        assert shown[field.name].default == (field.default if kind is TrainerOptions else None)
        assert f"\n{field.name} (" in described and about(field).help.split()[0] in described
    assert not [each for each in shown.values() if each.kind is inspect.Parameter.VAR_KEYWORD]


def test_a_decorated_function_still_takes_its_own():
    @takes(Some)
    def cook(pan, *, lid=True, **options):
        """Cooks."""
        return pan, lid, Some.of(options)

    assert cook("iron", lid=False, eggs=2) == ("iron", False, Some(eggs=2))
    assert str(inspect.signature(cook)).startswith("(pan, *, lid=True, heat: float = 0.5, eggs: int | None = None,")
    assert cook.__doc__.startswith("Cooks.\n\nheat (0.5): How hot.\n")


def test_the_command_line_has_every_option_with_its_default():
    on_command_line = {each.name: each for each in train.params}
    for kind in (TrainerOptions, FitOptions):
        for field in dataclasses.fields(kind):
            if about(field).cli:
                assert field.name in on_command_line
                if kind is FitOptions:
                    assert on_command_line[field.name].default is None, "what is not given keeps its value"
    same = {"schedule", "weight_decay", "clip", "dropout", "label_smoothing", "gradient_accumulation_steps", "early_stopping_threshold"}
    for name in same:
        assert on_command_line[name].default == getattr(TrainerOptions(), name)
    assert on_command_line["clip"].opts == ["--max-grad-norm"] and on_command_line["learning_rate"].default == 2e-3


def test_options_of_a_command_keep_the_order_of_the_fields():
    import click

    @click.command()
    @options_of(Some, eggs={"flag": "--number-of-eggs", "default": 4})
    def command(**options):
        pass

    assert [each.opts[0] for each in command.params] == ["--heat", "--number-of-eggs", "--pair", "--dish", "--hot", "--log"]
    assert command.params[1].name == "eggs" and command.params[1].default == 4


def takers():
    """Every door of text, memories and models that takes a whole number, with one that it takes."""
    model = mt.Transformer(mt.Config(**SMALL))
    tokenizer = ByteTokenizer()
    return {
        "Config d_model": (lambda n: mt.Config(**{**SMALL, "d_model": n}), 8),
        "Config segment_length": (lambda n: mt.Config(**{**SMALL, "segment_length": n}), 8),
        "Pipeline segment_length": (lambda n: mt.Pipeline(model, tokenizer, segment_length=n), 8),
        "generate top_p": (lambda n: GenerationOptions(top_p=n, do_sample=True), 1),
        "generate temperature": (lambda n: GenerationOptions(temperature=n, do_sample=True), 8),
        "train_bpe vocab_size": (lambda n: train_bpe(["a"], n), 259),
        "split_documents seed": (lambda n: split_documents({"a": "x", "b": "y"}, 0.5, n), 8),
        "bytes_of": (tokenizer.bytes_of, 8),
        "window size": (lambda n: mt.memory("window", size=n), 8),
        "window sinks": (lambda n: mt.memory("window", size=9, sinks=n), 8),
        "recurrent tokens": (lambda n: mt.memory("recurrent", tokens=n), 8),
        "store top_k": (lambda n: mt.memory("store", top_k=n), 8),
        "store layer": (lambda n: mt.memory("store", layer=n), 0),
        "sinusoidal_positions n": (lambda n: mt.sinusoidal_positions(n, 4), 3),
        "sinusoidal_positions d_model": (lambda n: mt.sinusoidal_positions(4, n), 3),
        "set_num_threads": (_threads, 2),
        "attention window": (lambda n: mt.attention(HEADS, HEADS, HEADS, window=n), 2),
        "attention scale": (lambda n: mt.attention(HEADS, HEADS, HEADS, scale=n), 2),
        "attention cap": (lambda n: mt.attention(HEADS, HEADS, HEADS, cap=n), 2),
        "Transformer seed": (lambda n: mt.Transformer(mt.Config(**SMALL), seed=n), 8),
        "generate_many batch_tokens": (lambda n: mt.Pipeline(model, tokenizer).generate_many([], batch_tokens=n), 8),
        "read skip": (lambda n: mt.Pipeline(model, tokenizer, "window").read("", skip=n), 3),
        **dict(_of_data()),
        **dict(_of_training()),
    }


def _threads(n):
    before = mt.get_num_threads()
    mt.set_num_threads(n)
    mt.set_num_threads(before)


def _of_data():
    """The doors of training data; each makes a batch."""
    ids, streams = [np.arange(3, 40)], {"segment_length": 4, "n_segments": 2, "batch_size": 2}
    fields = {"segment_length": 4, "n_segments": 2, "batch_size": 2, "seed": 3, "bos_id": 1, "pad_id": 0}
    for name, good in fields.items():
        for kind in (TextStreams, NextSegment):
            yield f"{kind.__name__} {name}", (lambda n, kind=kind, name=name: kind(ids, **{**streams, name: n}).batch(0), good)
    data = NextSegment(ids, **streams)
    denoising = {**streams, "vocab_size": 60}
    for name, good in {"vocab_size": 60, "mean_span": 3}.items():
        yield f"SpanDenoising {name}", (lambda n, name=name: SpanDenoising(ids, **{**denoising, name: n}).batch(0), good)
    yield "SpanDenoising.sentinels segment_length", (SpanDenoising.sentinels, 8)
    yield "SpanDenoising.sentinels mean_span", (lambda n: SpanDenoising.sentinels(8, 0.2, n), 2)
    pairs = {"batch_size": 2, "segment_length": 4, "max_source_length": 5, "pool_batches": 2, "seed": 3, "eos_id": 2, "pad_id": 0}
    for name, good in pairs.items():
        yield f"Pairs {name}", (lambda n, name=name: Pairs([(ids[0], ids[0])], **{"batch_size": 2, "cut": True, name: n}).batch(0), good)
    yield "Mixture weight", (lambda n: Mixture({"a": (data, n), "b": (data, 1)}).batch(0), 2)
    yield "Mixture seed", (lambda n: Mixture({"a": (data, 1)}, seed=n).batch(0), 2)
    yield "Curriculum step", (lambda n: Curriculum(data, [(0, 1), (n, 2)]).batch(0), 2)
    yield "Curriculum segments", (lambda n: Curriculum(data, [(0, n)]).batch(0), 2)
    for kind, made in (("NextSegment", data), ("TextStreams", TextStreams(ids, **streams)), ("Mixture", Mixture({"a": (data, 1)}))):
        yield f"{kind}.batch step", (made.batch, 2)
    yield "TextStreams.batch n_segments", (lambda n: TextStreams(ids, **streams).batch(0, n), 2)
    yield "NextSegment.with_segments", (data.with_segments, 2)
    yield "Corpus.of end_id", (lambda n: Corpus.of(ids, end_id=n), 2)
    yield "Corpus.of vocab_size", (lambda n: Corpus.of(ids, vocab_size=n), 60)
    yield "Permutation n", (lambda n: Permutation(n, 0), 2)


def _of_training():
    """The doors of training: each takes a step, or none."""
    model = mt.Transformer(mt.Config(**{**SMALL, "n_encoder_layers": 0}))
    text = np.full((3, 4), 5)
    for field in dataclasses.fields(TrainerOptions):
        good = {"int": 2, "float": 0 if about(field).below else 1}.get(kinds(field)[0])
        if good is not None:
            yield f"Trainer {field.name}", (lambda n, name=field.name: mt.Trainer(model, **{name: n}).step(None, text), good)
    for field in dataclasses.fields(FitOptions):
        if kinds(field)[0] == "int":
            yield f"fit {field.name}", (lambda n, name=field.name: FitOptions(**{name: n}), 2)
    batch = Batch(None, text[:, None])
    fit = lambda **given: mt.Trainer(model).fit(lambda step: batch, progress=False, **given)  # noqa: E731
    yield "fit steps", (lambda n: fit(steps=n), 1)
    yield "step weights", (lambda n: mt.Trainer(model).step(None, text, weights=[[n] * 4] * 3), 1)


HEADS = np.ones((1, 1, 3, 4), np.float32)
TAKES_SHARES = {"generate top_p", "generate temperature", "attention scale", "attention cap", "Mixture weight", "step weights"}
TAKES_SHARES |= {"SpanDenoising mean_span", "SpanDenoising.sentinels mean_span"}
TAKES_SHARES |= {f"Trainer {field.name}" for field in dataclasses.fields(TrainerOptions) if kinds(field)[0] == "float"}
WRONG = [-1, True, float("nan"), float("inf"), -(10**400), Fraction(10**400, 3), "1", [1]]
TAKEN_THERE = {  # what one door takes of them
    "attention scale": [-1], "step weights": [True, "1"], "bytes_of": [True], "split_documents seed": [-1], "store layer": [-1],
}  # fmt: skip


SMALL = {"vocab_size": 259, "d_model": 8, "n_heads": 2, "n_encoder_layers": 1, "n_decoder_layers": 1}


@pytest.mark.parametrize("name", takers())
def test_a_wrong_number_is_an_error_of_ours(name):
    call, _ = takers()[name]
    for value in WRONG if name in TAKES_SHARES else [*WRONG, 1.5]:
        if value in TAKEN_THERE.get(name, []):
            continue
        with pytest.raises(MiniTfmError) as caught:
            call(value)
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", takers())
def test_a_whole_number_is_pythons_or_numpys_and_no_number_is_too_long_for_an_error(name):
    call, good = takers()[name]
    for kind in (int, np.int32, np.int64, np.uint8 if good < 256 else np.uint16):
        call(kind(good))
    for digits in (400, 4300, 4301):
        with pytest.raises(MiniTfmError) as caught:
            call(10**digits)
        assert len(str(caught.value)) < 500
