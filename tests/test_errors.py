"""Errors: one base, each child also a built-in kind, and every one of them raised by what says so."""

import numpy as np
import pytest

import mini_tfm as mt
from mini_tfm import errors

KINDS = {
    "InvalidValue": ValueError,
    "InvalidType": TypeError,
    "FileProblem": OSError,
    "TrainingError": ArithmeticError,
    "PluginError": RuntimeError,
}


def test_the_table_of_errors_is_whole():
    defined = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.MiniTfmError)}
    assert defined == {"MiniTfmError", *KINDS}


@pytest.mark.parametrize("name", KINDS)
def test_each_is_ours_and_a_built_in_kind(name):
    error = getattr(errors, name)
    assert issubclass(error, mt.MiniTfmError) and issubclass(error, KINDS[name])
    assert error.__doc__ and str(error("argument: expected 3, got 4")) == "argument: expected 3, got 4"
    others = [other for other in KINDS if other != name]
    assert not any(issubclass(error, getattr(errors, other)) for other in others)


def test_the_base_is_no_built_in_kind():
    assert errors.MiniTfmError.__bases__ == (Exception,) and mt.MiniTfmError is errors.MiniTfmError


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda: mt.Config(vocab_size=0), ValueError),
        (lambda: mt.Transformer(None), TypeError),
        (lambda: mt.load("there is no such folder"), OSError),
        (lambda: mt.memory("there is no such memory"), ValueError),
        (lambda: mt.softmax("text"), TypeError),
        (lambda: mt.set_num_threads(0), ValueError),
        (lambda: mt.attention(np.zeros(3), np.zeros(3), np.zeros(3)), ValueError),
        (lambda: mt.Pipeline("folder", None), TypeError),
        (lambda: mt.Trainer(None), TypeError),
    ],
)
def test_who_never_heard_of_us_catches_them_all_the_same(call, kind):
    with pytest.raises(kind) as caught:
        call()
    assert isinstance(caught.value, mt.MiniTfmError)
    assert ":" in str(caught.value), "it names what is wrong"


def test_public_names_are_those_listed_and_an_unknown_one_is_an_attribute_error():
    for name in mt.__all__:
        assert getattr(mt, name) is not None
    assert set(mt.__all__) <= set(dir(mt))
    with pytest.raises(AttributeError, match="transformers"):
        _ = mt.transformers


def test_attention_is_the_kernel_whatever_was_imported():
    import mini_tfm.attention
    from mini_tfm import attention
    from mini_tfm.attention import MultiHeadAttention

    assert attention is mt.attention is mini_tfm.kernels.attention and MultiHeadAttention


HUGE = "x" * 100_000


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: mt.memory(HUGE),
        lambda: mt.memory(f"window+{HUGE}"),
        lambda: mt.memory(f"window:{HUGE}"),
        lambda: mt.memory(f"window:{HUGE}=1"),
        lambda: mt.memory(f"window:size={HUGE}"),
        lambda: mt.memory("window", site=HUGE),
        lambda: mt.memory("window", size=list(range(100_000))),
        lambda: mt.memory("window", **{HUGE: 1}),
        lambda: mt.register_memory(f" {HUGE}", object),
        lambda: mt.Config(vocab_size=9, norm=HUGE),
        lambda: mt.Config(vocab_size=HUGE),
        lambda: mt.Trainer(mt.Transformer(mt.Config(vocab_size=9, d_model=4, n_heads=1)), schedule=HUGE),
        lambda: mt.Trainer(mt.Transformer(mt.Config(vocab_size=9, d_model=4, n_heads=1)), **{HUGE: 1}),
        lambda: mt.load(HUGE),
        lambda: mt.attention(*np.zeros((3, 1, 1, 1, 1), np.float32), scale=HUGE),
        lambda: mt.Pipeline.load(HUGE),
    ],
)
def test_no_message_repeats_a_value_that_is_long(wrong):
    with pytest.raises(mt.MiniTfmError) as caught:
        wrong()
    assert 20 < len(str(caught.value)) <= errors.LONGEST


def test_a_message_that_is_too_long_keeps_its_beginning_and_its_end():
    told = str(errors.FileProblem("size: expected " + "y" * 100_000 + "; make it smaller"))
    assert told.startswith("size: expected yyy") and told.endswith("yyy; make it smaller") and len(told) <= errors.LONGEST
    assert "characters] ..." in told
    assert errors.shown("z" * 61) == repr("z" * 60 + "...") and errors.shown("z" * 60) == repr("z" * 60) and errors.shown(7) == "7"
