"""Processes of an experiment: what happens to one of them is told, and the others go on."""

from endings import work

from mini_tfm.compare.processes import Failure, each_alone


def test_each_has_its_own_end(capfd):
    told = []
    found = each_alone(work, [("raise",), ("exit",), ("die",), ("live",)], workers=2, on_step=told.append)
    assert found[3] == "live" and {"raise", "exit", "live"} <= set(told)
    assert [type(each) for each in found[:3]] == [Failure] * 3
    assert found[0].why == "ValueError: no rows"
    assert "exit code 0" in found[1].why and "died" in found[2].why
    assert capfd.readouterr().out == "", "standard output is the command's"
