"""Several processes under mpirun: the same run as one, whatever their number; none of them is ever waited for in vain."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mini_tfm.errors import InvalidType, InvalidValue
from mini_tfm.train import Trainer
from mini_tfm.train.parallel import Alone, Ranks, communicator_of, launched
from mini_tfm.transformer import load_checkpoint

sys.path.insert(0, str(Path(__file__).parent))  # `import runs`

from runs import make_trainer

HERE = str(Path(__file__).parent)
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "error",
    # Of Open MPI: what else would need an option that no other mpirun has. More ranks than processors, in a container.
    **dict.fromkeys(("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "OMPI_MCA_rmaps_base_oversubscribe"), "1"),
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",  # the same of Open MPI 5
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "OMPI_MCA_mpi_yield_when_idle": "1",
}


def mpirun(n, *words, timeout=60, **options):
    done = subprocess.run(
        ["mpirun", "-n", str(n), *map(str, words)], env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout, **options
    )
    return done.returncode, done.stdout, done.stderr


def program(n, code, *arguments, **options):
    """The code on n ranks, with `runs` at hand."""
    return mpirun(n, sys.executable, "-c", f"import sys; sys.path.insert(0, {HERE!r})\n" + code, *arguments, **options)


@pytest.fixture(scope="module", autouse=True)
def there_is_mpi():
    pytest.importorskip("mpi4py")
    if shutil.which("mpirun") is None:
        pytest.skip("there is no mpirun")
    code, out, err = program(2, "from mpi4py import MPI; print(MPI.COMM_WORLD.Get_size())")
    if code or sorted(out.replace("\n", "")) != ["2", "2"]:  # two writers: their lines may run into each other
        pytest.skip(f"mpirun is not that of mpi4py, or does not work here: {err[-300:]}")


FIT = """
import json
from pathlib import Path
from mpi4py import MPI
from mini_tfm.train import Trainer
from runs import fit, make_trainer, state
folder, parts, stops, dropout = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]), float(sys.argv[4])
ranks = MPI.COMM_WORLD
options = dict(dtype=sys.argv[5], gradient_accumulation_steps=parts, dropout=dropout)
options |= dict(early_stopping_patience=2, early_stopping_threshold=0.02)
if (folder / 'training.json').exists():
    trainer = Trainer.resume(folder, communicator=ranks)
else:
    trainer = make_trainer(communicator=ranks, **options)
fit(trainer, folder, **({'steps': stops} if stops else {}))
states = ranks.gather(state(trainer))
if ranks.rank == 0:
    assert all(each == states[0] for each in states), states
    print(json.dumps(states[0]))
"""


def trained(n, folder, parts=1, stops=None, dropout=0.0, dtype="float64"):
    code, out, err = program(n, FIT, folder, parts, json.dumps(stops), dropout, dtype)
    assert code == 0, err
    return json.loads(out), load_checkpoint(folder, dtype).model.weights


def assert_close_runs(one, other, tolerance):
    """Up to summation order: the same steps, validations and weights."""
    (first, weights), (second, others) = one, other
    assert first["random and cursor"] == second["random and cursor"]
    assert [step for step, _ in first["validations"]] == [step for step, _ in second["validations"]]
    np.testing.assert_allclose([v for _, v in first["validations"]], [v for _, v in second["validations"]], rtol=tolerance)
    for name in weights:
        if not name.endswith(".k.bias"):  # whose gradient is 0 but for rounding, of which Adam makes steps as of any other
            np.testing.assert_allclose(others[name], weights[name], rtol=0, atol=tolerance, err_msg=name)


def test_any_number_of_ranks_is_one_run(tmp_path):
    """3 ranks share 4 rows unevenly. All stop early at the same step, and rank 0 alone has written."""
    one = trained(1, tmp_path / "one")
    for n in (2, 3):
        several = trained(n, tmp_path / str(n))
        assert_close_runs(one, several, 1e-9)
        assert len((tmp_path / f"{n}.jsonl").read_text().splitlines()) == several[0]["random and cursor"][1]
    assert {path.name for path in (tmp_path / "3").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}


@pytest.mark.long
def test_two_ranks_drop_out_what_one_with_two_parts_does(tmp_path):
    two, one = trained(2, tmp_path / "two", dropout=0.2), trained(1, tmp_path / "one", parts=2, dropout=0.2)
    assert_close_runs(one, two, 1e-9)
    assert one[0]["losses"] != trained(1, tmp_path / "other", dropout=0.2)[0]["losses"]


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path):
    whole = trained(1, tmp_path / "whole", dtype="float32")
    trained(2, tmp_path / "cut", stops=4, dtype="float32")
    resumed = trained(3, tmp_path / "cut", dtype="float32")
    assert_close_runs(whole, resumed, 1e-4)
    lines = [json.loads(line)["step"] for line in (tmp_path / "cut.jsonl").read_text().splitlines()]
    assert lines == list(range(1, len(lines) + 1)) and len(lines) == resumed[0]["random and cursor"][1]
    in_this_process = Trainer.resume(tmp_path / "cut")
    assert in_this_process.communicator.size == 1 and in_this_process.step_count == len(lines)


FAILS = """
import os, signal, time
from pathlib import Path
from mpi4py import MPI
import runs
from mini_tfm.train import Trainer
where, rank = sys.argv[1], MPI.COMM_WORLD.rank
trainer = runs.make_trainer(communicator=MPI.COMM_WORLD)
batches, held_out = runs.data(), runs.data(seed=2)

def batch_of(step):
    if step == 3 and rank == 1 and where == 'data':
        raise RuntimeError('the disk of this machine is gone')
    return runs.data(seed=2).batch(step) if where == 'other data' and rank == 1 else batches.batch(step)

def on_step(trainer, loss):
    if trainer.step_count == 3 and rank == 1:
        if where == 'killed':
            os.kill(os.getpid(), signal.SIGKILL)
        if where == 'leaves':
            sys.exit(0)
        if where == 'nan':
            trainer.model.weights['decoder.0.feed_forward.out.weight'][0, 0] = float('nan')

if where == 'another step' and rank == 1:
    trainer.step_count = 1
if where == 'a full disk':
    trainer.save = lambda folder: (_ for _ in ()).throw(OSError('no space left'))
trainer.fit(batch_of, validation=held_out, folder=Path(sys.argv[2]), save_every=2, on_step=on_step, progress=False)
print('went on')
"""


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("data", "rank 1 of 3: .*the disk of this machine is gone"),
        ("killed", "signal 9"),
        pytest.param("leaves", "rank 1 of 3: .*SystemExit", marks=pytest.mark.long),
        ("nan", "TrainingError: step 3: the loss is nan at row"),
        ("a full disk", "rank 0 of 3: .*no space left"),
        ("other data", "data: batch 0 of rank 1 differs from that of rank 0"),
        pytest.param("another step", "rank 0 is at step 0, rank 1 at 1", marks=pytest.mark.long),
    ],
)
def test_a_rank_that_fails_ends_all(where, told, tmp_path):
    began = time.perf_counter()
    code, out, err = program(3, FAILS, where, tmp_path / "run", timeout=30)
    assert code != 0 and "went on" not in out and time.perf_counter() - began < 25
    assert re.search(told, " ".join(err.split())), err
    if where in ("data", "killed", "leaves", "nan"):
        assert Trainer.resume(tmp_path / "run").step_count == 2


# The command line


def command(*words):
    return [sys.executable, "-m", "mini_tfm", *map(str, words)]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, and back again.\n" * 30)
    return path


TINY = ["--d-model", 16, "--n-heads", 2, "--n-encoder-layers", 1, "--n-decoder-layers", 1, "--tokenizer", "bytes",
        "--segment-length", 16, "--n-segments", 2, "--batch-size", 5]  # fmt: skip


def test_the_command_trains_on_all_ranks_and_speaks_once(text, tmp_path):
    words = ["train", "--text", text, *TINY, "--steps", 6, "--validate-every", 3, "--json"]
    code, out, err = mpirun(2, *command(*words, "--out", tmp_path / "two"), cwd=tmp_path)
    assert code == 0, err
    assert json.loads(out)["steps"] == 6 and err.count("step 3:") == 1 and "2 processes" in err
    alone = json.loads(subprocess.run(command(*words, "--out", tmp_path / "one"), env=ENVIRONMENT, capture_output=True, check=True).stdout)
    assert json.loads(out)["held_out_loss"] == pytest.approx(alone["held_out_loss"], rel=1e-5)
    code, out, err = mpirun(3, *command("train", "--resume", tmp_path / "two", "--steps", 8, "--json"))
    assert code == 0 and json.loads(out)["steps"] == 8, err


def test_an_error_of_the_command_is_told_once(text, tmp_path):
    code, out, err = mpirun(2, *command("train", "--text", text, "--out", tmp_path / "m", *TINY, "--memory", "windw"), timeout=30)
    assert code == 2 and out == ""
    assert err.count("did you mean 'window'") == 1 and "rank 0 of 2: error: memory:" in err and "Traceback" not in err


def test_a_signal_stops_all_ranks_after_the_same_step(text, tmp_path):
    """SIGTERM to one rank, as a scheduler or `kill` sends it."""
    words = command("train", "--text", text, "--out", tmp_path / "m", *TINY, "--steps", 1_000_000, "--validate-every", 5)
    process = subprocess.Popen(["mpirun", "-n", "2", *words], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    try:
        while "step 5:" not in (line := process.stderr.readline()):
            assert line, "it ended before it began"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        if not children.exists():
            pytest.skip("there is no /proc here")
        ranks = children.read_text().split()
        assert len(ranks) == 2
        os.kill(int(ranks[1]), signal.SIGTERM)
        err = process.communicate(timeout=30)[1]
    finally:
        process.kill()
    assert process.returncode == 130 and err.count("stopped: step") == 1, err
    assert f"step {Trainer.resume(tmp_path / 'm').step_count} is saved" in err


# In one process


def test_what_is_no_communicator_is_refused():
    assert communicator_of(None).size == 1 and communicator_of(alone := Alone()) is alone
    with pytest.raises(InvalidType, match="communicator: expected an mpi4py intracommunicator"):
        make_trainer(communicator="MPI.COMM_WORLD")
    assert not launched({}) and launched({"OMPI_COMM_WORLD_SIZE": "2"}) and launched({"PMI_SIZE": "1"})


def test_without_mpi4py_it_is_told_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(InvalidValue, match=r"needs mpi4py .*pip install 'mini-tfm\[mpi\]'"):
        Ranks()
