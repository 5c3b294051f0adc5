"""A memory from a line of text, and from what is registered."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import mini_tfm as mt
from mini_tfm.errors import InvalidType, InvalidValue, PluginError
from mini_tfm.memory import Memory, MemorySpec, Stack, describe_memory
from mini_tfm.stream import Stream


class Anything(Memory):
    def __init__(self, **options):
        self.options = options


class Three(Memory):
    """Takes three options."""

    def __init__(self, size, *, rate=0.5, path=None):
        self.options = {"size": size, "rate": rate, "path": path}


mt.register_memory("anything", Anything)
mt.register_memory("three", Three)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("anything", {}),
        ("anything:", {}),
        (" anything : a=1 ", {"a": 1}),
        ("anything:a=1,b=-2.5,c=0.001", {"a": 1, "b": -2.5, "c": 1e-3}),
        ("anything:a=1e-3,b=1.10,c=0x1F,d=61e9540", {"a": "1e-3", "b": "1.10", "c": "0x1F", "d": "61e9540"}),
        ("anything:a=true,b=False,c=none", {"a": True, "b": False, "c": None}),
        ("anything:a=text,b='1',c=\"none\"", {"a": "text", "b": "1", "c": "none"}),
        ("anything:path=/a b/c-d_e.mdb", {"path": "/a b/c-d_e.mdb"}),
        ("anything:path=a:b:c", {"path": "a:b:c"}),
        ("anything:path=a=b", {"path": "a=b"}),
        ("anything:path=C++ notes.mdb", {"path": "C++ notes.mdb"}),
        ("anything:path=a+b.mdb", {"path": "a+b.mdb"}),
        ("anything:path='a,b+window:c=d'", {"path": "a,b+window:c=d"}),
        ("anything:path='it\\'s, here',b=2", {"path": "it's, here", "b": 2}),
        ("anything:path=it's", {"path": "it's"}),
        ("anything:path=ünï/日本.mdb", {"path": "ünï/日本.mdb"}),
        ("anything:a=", {"a": ""}),
        ("anything:a=[1]", {"a": "[1]"}),
        ("anything:a=__import__('os')", {"a": "__import__('os')"}),
    ],
)
def test_options_are_read_from_text(text, options):
    made = mt.memory(text)
    assert made.options == options and {name: type(v) for name, v in made.options.items()} == {n: type(v) for n, v in options.items()}
    assert mt.memory(made.text).options == options


class Typed(Memory):
    def __init__(
        self, *, name: str = "x", path: str | None = None, size: int | None = 4, rate: float = 0.5, on: bool = False, either: int | str = 0
    ):
        self.options = {"name": name, "path": path, "size": size, "rate": rate, "on": on, "either": either}


mt.register_memory("typed", Typed)


@pytest.mark.parametrize(
    ("given", "value"),
    [
        *(
            ("name", text)
            for text in ("61e9540", "12e45678", "1.10", "1.1", "2026_01", "202601", "0x1F", "31", "none", "None", "true", "+5", " a", "")
        ),
        *(("path", text) for text in ("1e2", "100.0", "none", "007")),
        ("size", 12),
        ("rate", 1.0),
        ("rate", 1e-3),
        ("on", True),
        ("either", 5),
        ("either", "+5"),
        ("either", "05"),
    ],
)
def test_a_value_has_the_type_that_its_parameter_declares(given, value):
    made = mt.memory(f"typed:{given}={value},size=3" if given != "size" else f"typed:size={value}")
    assert made.options[given] == value and type(made.options[given]) is type(value)
    assert mt.memory(made.text).options == made.options


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("size=3.0", "size: expected a whole number or none, got '3.0'"),
        ("size=true", "size: expected a whole number or none, got 'true'"),
        ("size=" + "9" * 5000, "size: expected a whole number or none, got '9999"),
        ("rate=nan", "rate: expected a number, got 'nan'"),
        ("rate=1e999", "rate: expected a number, got '1e999'"),
        ("on=1", "on: expected true or false, got '1'"),
    ],
)
def test_a_value_of_another_type_is_named(text, told):
    with pytest.raises(InvalidValue, match=re.escape("memory 'typed': " + told)) as caught:
        mt.memory("typed:" + text)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("option", ["size", "rate"])
def test_true_is_no_number(option):
    with pytest.raises(InvalidValue, match=f"memory 'typed': {option}: expected a .*number.*, got True"):
        mt.memory("typed", **{option: True})
    assert mt.memory("typed", on=True).options["on"] is True


@pytest.mark.parametrize("value", [r"'\x'", r"'\N{nothing}'", "'a\nb'"])
def test_quotes_that_hold_no_python_string_are_named(value):
    with pytest.raises(InvalidValue, match="memory 'typed': name: expected a Python string in the quotes, got"):
        mt.memory(f"typed:name={value}")


def test_options_whose_texts_would_run_together_have_no_text():
    made = mt.memory("anything", a="/tmp/a='b", c="c'd", d="x'y,a=1")
    assert made.text is None or mt.memory(made.text).options == made.options


def test_none_is_said_of_an_option_that_may_be_none():
    assert mt.memory("typed:size=none").options["size"] is None
    assert mt.memory("typed:path=None").options["path"] is None
    again = mt.memory(mt.memory("typed", path=None, size=None).text).options
    assert again["path"] is None and again["size"] is None


values = st.one_of(st.text(max_size=12), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.none())


@given(values)
@example("'")
@example("a,b='c'")
@example("window+store:path=x")
@example("both \" and '")
@example("0x10")
@example(" leading")
@example("back\\slash")
@example("None")
def test_the_text_of_a_memory_makes_it_again(value):
    made = mt.memory("anything", first=value, second=3)
    again = mt.memory(made.text).options
    assert again == {"first": value, "second": 3} and type(again["first"]) is type(value)
    stack = mt.memory(f"window:size=4+{made.text}+three:size=1")
    assert [member.name for member in stack.members] == ["window", "anything", "three"] and stack.members[1].options == again


def test_what_text_cannot_say_has_no_text():
    assert mt.memory("anything", path=[1, 2]).text is None
    assert mt.memory("anything", rate=float("nan")).text is None
    assert Stack([mt.memory("window"), mt.memory("anything", f=print)]).text is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("windw:size=3", "memory: expected an installed strategy (.*window.*), got 'windw'; did you mean 'window'?"),
        ("qqqq", "got 'qqqq'; `mini-tfm plugins list` shows what is installed"),
        ("", "memory: expected an installed strategy (.*), got ''"),
        (":size=3", "got ''"),
        ("window+", "got 'window+'"),
        ("+window", "got ''"),
        ("window size=3", "got 'window size=3'"),
        ("window:siz=3", "memory 'window': unknown option 'siz'; it takes size, sinks, site, positions, gradient; did you mean 'size'?"),
        ("window:zzz=3", "memory 'window': unknown option 'zzz'; it takes size, sinks, site, positions, gradient$"),
        ("window:size=3,size=4", "memory 'window': option 'size' is given twice"),
        ("window:3", "memory 'window': expected option=value, got '3'"),
        ("window:=3", "memory 'window': expected option=value, got '=3'"),
        ("window:size=3,,sinks", "memory 'window': expected option=value, got 'sinks'"),
        ("window:size=0", "memory 'window': size: expected a number of rows of at least 1, got 0"),
        ("window:size=big", "memory 'window': size: expected a whole number, got 'big'"),
        ("window:size=4,sinks=4", "memory 'window': sinks: expected 0 to size - 1 = 3, got 4"),
        ("window:positions=slot", "memory 'window': positions: expected cache or true, got 'slot'"),
        ("window:gradient=some", "memory 'window': gradient: expected none or rows, got 'some'"),
        ("store:gradient=some", "memory 'store': gradient: expected none or rows, got 'some'"),
        ("window:site=top", "memory 'window': site: expected encoder, decoder, cross or all, got 'top'"),
        ("recurrent:tokens=0", "memory 'recurrent': tokens: expected a number of rows of at least 1, got 0"),
        ("store:top_k=none", "memory 'store': top_k: expected a whole number, got 'none'"),
        ("store:merge=add", "memory 'store': merge: expected joint, gate or replace, got 'add'"),
        ("store:document=" + "x" * 201, "memory 'store': document: expected a name of 1 to 200 bytes"),
        ("three", "memory 'three': option 'size' is required, as in 'three:size=...'"),
        ("window+three", "memory 'three': option 'size' is required"),
        ("window:size=2+store:topk=3", "memory 'store': unknown option 'topk'; .*; did you mean 'top_k'?"),
    ],
)
def test_a_faulty_text_is_told_what_is_wrong(text, told):
    pattern = re.escape(told).replace(r"\.\*", ".*").replace(r"\$", "$")
    with pytest.raises(InvalidValue, match=pattern):
        mt.memory(text)


def test_options_are_given_once():
    with pytest.raises(InvalidValue, match="memory 'window': option 'size' is given twice"):
        mt.memory("window:size=3", size=3)
    with pytest.raises(InvalidValue, match=r"expected the options of a stack inside its text, got 'window\+store'"):
        mt.memory("window+store", top_k=3)
    with pytest.raises(InvalidType, match="memory: expected the name of a strategy, got int"):
        mt.memory(3)


def test_stacks_are_made_flat():
    made = mt.memory("window:size=3+store:top_k=2+recurrent")
    assert [member.name for member in made.members] == ["window", "store", "recurrent"]
    assert made.text == "window:size=3+store:top_k=2+recurrent" and made.name == "window+store+recurrent"
    assert len(Stack([made, mt.memory("window")]).members) == 4
    with pytest.raises(InvalidType, match="members: expected Memory objects, got str"):
        Stack(["window"])


def test_the_module_is_the_function():
    import mini_tfm.memory

    assert mt.memory is mini_tfm.memory and mini_tfm.memory("window", size=3).size == 3


# Registering


@pytest.mark.parametrize("name", ["", "a b", "a:b", "a+b", "1st", None, 7])
def test_a_name_that_no_text_could_say_is_refused(name):
    with pytest.raises(InvalidValue, match="name: expected letters, digits"):
        mt.register_memory(name, Anything)


def test_a_factory_must_be_callable():
    with pytest.raises(InvalidType, match="factory: expected a Memory class"):
        mt.register_memory("mine", Anything())


@pytest.mark.parametrize(
    ("factory", "told"),
    [
        (lambda: 7, "expected a Memory, its factory returned int"),
        (lambda: Memory, "expected a Memory, its factory returned type"),
        (lambda: 1 / 0, "failed in __init__: ZeroDivisionError: division by zero"),
        (lambda: exit(3), "failed in __init__: SystemExit: 3"),
        (dict.fromkeys, "the options of its factory cannot be read|failed in __init__|option 'iterable' is required"),
    ],
)
def test_a_factory_that_fails_is_named(factory, told):
    mt.register_memory("failing", factory)
    with pytest.raises((PluginError, InvalidValue), match=told) as caught:
        mt.memory("failing")
    assert "memory 'failing'" in str(caught.value)


def with_spec(**changes):
    made = Memory()
    made.spec = MemorySpec(**changes)
    return made


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sites": frozenset({"middle"})}, "spec.sites: expected a set of encoder, decoder, cross, got"),
        ({"sites": "encoder"}, "spec.sites: expected a set of encoder, decoder, cross, got 'encoder'"),
        ({"sites": None}, "spec.sites: expected a set"),
        ({"sites": frozenset()}, "spec.sites: expected at least one of encoder, decoder, cross, got none"),
        ({"needs": frozenset({"everything"})}, "spec.needs: expected a set of query, hidden, mass, surprise, tokens, text, got"),
        ({"merge": "mixed"}, "spec.merge: expected one of joint, gate, add, replace, got 'mixed'"),
        ({"merge": ["gate"]}, "spec.merge: expected one of"),
        ({"gradient": True}, "spec.gradient: expected one of none, rows, state, got True"),
        ({"layers": 3}, "spec.layers: expected None or a tuple of layer numbers, got 3"),
        ({"layers": ("top",)}, "spec.layers: expected None or a tuple of layer numbers"),
        ({"version": 99}, "written for contract 99, this library has 3: upgrade mini-tfm"),
        ({"version": None}, "written for contract None"),
    ],
)
def test_a_spec_that_the_contract_does_not_know_is_refused(changes, told):
    mt.register_memory("special", lambda: with_spec(**changes))
    with pytest.raises(PluginError, match=re.escape(told)):
        mt.memory("special")
    model = mt.Transformer(mt.Config(vocab_size=8, d_model=8, n_heads=2))
    with pytest.raises(PluginError, match=re.escape(told)):
        Stream(model, with_spec(**changes), 1)


def test_a_spec_must_be_one():
    made = Memory()
    made.spec = {"sites": "all"}
    mt.register_memory("special", lambda: made)
    with pytest.raises(PluginError, match="spec: expected a MemorySpec, got dict"):
        mt.memory("special")


def test_a_strategy_describes_itself():
    about = describe_memory("three")
    assert about == {
        "name": "three",
        "plugin": "registered in this process",
        "about": "Takes three options.",
        "options": {"size": "required", "rate": 0.5, "path": None},
    }
    window = describe_memory("window")
    assert window["plugin"].startswith("window (mini-tfm ") and window["options"] == {
        "size": 512,
        "sinks": 0,
        "site": None,
        "positions": "cache",
        "gradient": "rows",
    }


def test_the_built_in_ones_are_listed():
    assert {"window", "recurrent", "store", "three"} <= set(mt.list_memories())
