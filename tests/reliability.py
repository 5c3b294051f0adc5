"""What is promised of loading, saving, kernels, threads and plugins, and how many cases stand behind each promise.

`python tests/reliability.py` writes docs/reliability.md: cases are counted by pytest, repetitions are read from the tests themselves.
"""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "reliability.md"


@dataclasses.dataclass(frozen=True)
class Repeated:
    """A number that a test has in its code: how often it tries. Raises ValueError where it is not there any more."""

    file: str
    pattern: str
    times: int = 1

    @property
    def number(self) -> int:
        found = re.findall(self.pattern, (ROOT / self.file).read_text(encoding="utf-8"))
        if len(set(found)) != 1:
            raise ValueError(f"{self.file}: expected one number for {self.pattern!r}, found {found}")
        return int(found[0].replace("_", "")) * self.times


@dataclasses.dataclass(frozen=True)
class Row:
    """A promise. aim: the number of cases that is wanted, 0 for "all there are". tests: whose cases are counted, "file::test".

    also, long: repetitions within a test that count as cases, each change and in `pytest -m long`. lacking: what of the promise no
    test shows; "" where it is kept. command: what runs it, where that is not pytest.
    """

    promise: str
    aim: int
    tests: tuple[str, ...] = ()
    also: tuple[Repeated, ...] = ()
    long: tuple[Repeated, ...] = ()
    lacking: str = ""
    command: str = ""
    cases_count: bool = True  # or the repetitions alone


EXAMPLES = Repeated("tests/conftest.py", r"int\((\d+) \* float")
MORE = "tests/test_more_examples.py"
STORE, FOLDERS, RESUME = "tests/plugins/test_store.py", "tests/files/test_folders.py", "tests/train/test_resume.py"
FOLDER, MODELS, TENSORS = (f"tests/checkpoint/test_{name}.py" for name in ("folder", "models", "safetensors"))
BAD = "tests/checkpoint/test_bad_models.py"
THREADS, KERNELS, PACKAGES = "tests/core/test_threads.py", "tests/core/test_every_kernel.py", "tests/test_plugin_packages.py"
SESSION, RUN, BEHAVIOUR = "tests/generate/test_session.py", "tests/memory/test_run.py", "tests/cli/test_behaviour.py"

PROMISES: dict[str, list[Row]] = {
    "Loading": [
        Row(
            "A bad file is refused by the right error, which names the field",
            45,
            (
                f"{TENSORS}::test_a_bad_tensor_file_is_refused_by_name",
                f"{FOLDER}::test_a_bad_config_is_refused_by_name",
                f"{FOLDER}::test_bad_files_are_refused_without_asserts",
                f"{MODELS}::test_the_config_must_hold_together",
                f"{MODELS}::test_tensors_must_be_those_of_the_architecture",
                *(f"{BAD}::test_a_bad_{kind}_is_refused" for kind in ("folder", "gguf_file", "file_of_marian")),
                f"{BAD}::test_bad_models_are_refused_without_asserts",
            ),
        ),
        Row(
            "Mutations of valid folders load, or are an error of ours",
            20_000,
            ("tests/files/test_mutations.py",),
            also=(Repeated("tests/files/test_mutations.py", r"check\(tmp_path, 0, ([\d_]+)"),),
            long=(Repeated("tests/files/test_mutations.py", r"check\(tmp_path, 1000, ([\d_]+)"),),
            cases_count=False,
            lacking="each may take 1 s of CPU and 64 MB of RAM; 20,000 are tried in the long tests alone, not a million",
        ),
        Row(
            "Tiny files that ask for huge work are refused",
            40,
            ("tests/files/test_hostile.py::test_a_file_that_asks_for_too_much_is_refused",),
            lacking="each may take 1 s of CPU and 16 MB of RAM, and for each byte of its file, for some are not tiny, a microsecond and 20"
            " bytes; not 100 ms, which a busy machine would miss",
        ),
        Row(
            "Every prefix of a small file is refused",
            0,
            (
                f"{TENSORS}::test_every_prefix_of_a_file_is_refused",
                f"{STORE}::test_a_store_that_is_cut_off_is_refused",
            ),
        ),
        Row(
            "Nothing outside a folder is opened: links, paths, names, what is no file",
            30,
            (
                f"{MODELS}::test_any_other_link_is_refused",
                f"{MODELS}::test_nothing_that_a_file_names_is_opened_or_imported",
                f"{FOLDER}::test_an_entry_that_is_not_a_file_of_the_folder_is_refused",
                f"{FOLDER}::test_file_names_stay_inside_the_folder",
            ),
        ),
        Row(
            "Loading runs nothing and imports nothing, by Python's audit events",
            100,
            (f"{FOLDER}::test_loading_runs_nothing_and_stays_inside",),
            also=(Repeated(FOLDER, r"AUDITED = (\d+)"),),
            cases_count=False,
        ),
        Row(
            "Save, load, save gives the same bytes",
            1000,
            (
                f"{FOLDER}::test_save_load_save_gives_the_same_bytes",
                f"{MODELS}::test_save_load_save_gives_the_same_bytes",
            ),
            also=(Repeated(FOLDER, r"max_examples=(\d+)"), dataclasses.replace(EXAMPLES, times=2)),
            long=(Repeated(MORE, r"MODELS = (\d+)", 40),),
            cases_count=False,
        ),
        Row(
            "Files of released versions load, and compute what was recorded",
            0,
            ("tests/golden/test_golden.py",),
            lacking="a `window` with `sinks` that 0.1.0 trained counts places otherwise now; `positions=true` is what it did",
        ),
    ],
    "Saving, and the store": [
        Row(
            "Killed at any moment, what is on disk is whole, and nothing acknowledged is lost",
            1000,
            (
                f"{STORE}::test_killed_while_writing",
                f"{STORE}::test_killed_while_writing_a_thousand_times",
                f"{FOLDERS}::test_a_killed_save_leaves_the_old_folder_or_the_new_one",
            ),
            also=(Repeated(STORE, r'script\(KILLS, path, "(30)"\)'), Repeated(FOLDERS, r"for _ in range\((15)\):", 2)),
            long=(Repeated(STORE, r'script\(KILLS, path, "(1000)"\)'),),
            cases_count=False,
        ),
        Row(
            "Whichever call of a save fails or writes half, a folder is what it was, a store has all new rows or none",
            0,
            (
                f"{FOLDERS}::test_whichever_call_fails_the_old_folder_is_intact",
                "tests/plugins/test_failing_disk.py::test_whichever_call_fails_the_store_is_whole",
            ),
        ),
        Row(
            "A run that was killed goes on as if it had not been, bit for bit",
            10,
            (f"{RESUME}::test_a_killed_run_goes_on_as_if_it_had_not_been",),
        ),
        Row(
            "Writers and readers at once on one store: no read is partial",
            10_000,
            (f"{STORE}::test_writers_and_readers_at_once",),
            also=(Repeated(STORE, r'"reads_wanted", \[(\d+)'),),
            long=(Repeated(STORE, r"pytest\.param\(([\d_]+), marks=pytest\.mark\.long"),),
            cases_count=False,
        ),
        Row(
            "A full disk, a place without permission, a store of other rows: a clear error, nothing lost",
            0,
            (
                f"{STORE}::test_a_store_without_permission_to_write_is_read",
                f"{STORE}::test_a_place_that_cannot_be_written_is_told",
                f"{STORE}::test_a_store_of_other_rows_is_refused_and_left_as_it_is",
                f"{RESUME}::test_a_full_disk_is_told_and_the_last_save_stays",
                "tests/plugins/test_row_store.py::test_rows_of_another_width_or_other_weights_are_refused",
            ),
        ),
    ],
    "Kernels": [
        Row(
            "Each kernel is within its bound of float64, for generated shapes and values",
            200,
            also=(EXAMPLES,),
            long=(Repeated(MORE, r"PROPERTIES = (\d+)", 20),),
            cases_count=False,
            command="pytest -m hypothesis tests/core; pytest -m long tests/test_more_examples.py",
            lacking="so many for each property, and 200 in the long tests alone; MINI_TFM_TEST_EXAMPLES=250 tries 5,000",
        ),
        Row(
            "Gradients are those of finite differences, in float64: operations, models, memories",
            0,
            (
                "tests/test_ops.py::test_gradients_are_those_of_finite_differences",
                "tests/test_autodiff.py::test_gradients_are_those_of_finite_differences",
                "tests/train/test_backpropagation.py::test_gradients_through_three_segments_are_those_of_finite_differences",
            ),
        ),
        Row(
            "Every kernel has a twin in NumPy, with its signature",
            0,
            ("tests/core/test_door.py::test_a_kernel_has_its_twins_signature_and_a_docstring",),
        ),
        Row("At least twelve wrong arguments of each kernel are refused by name", 0, ("tests/core/test_refused.py::test_refused",)),
        Row(
            "Infinities, NaN, denormals, masked rows and empty arrays have defined results",
            60,
            (
                "tests/core/test_special_values.py::test_the_table",
                "tests/core/test_special_values.py::test_attention",
            ),
        ),
        Row(
            "The same bits at any number of threads: forward, backward, training",
            50,
            (
                f"{THREADS}::test_the_same_bits_for_any_number_of_threads",
                f"{THREADS}::test_attention_has_the_same_bits",
                f"{THREADS}::test_gemm_has_the_same_bits",
                f"{THREADS}::test_twenty_training_steps_have_the_same_bits",
            ),
        ),
        Row(
            "Each instruction set, a build without OpenMP, one with Cython's checks, and NumPy pass the tests",
            0,
            command="nox -s core; nox -s 'core(instruction-sets)' -- tests",
            lacking="at each change those of the core and of what calls it, the whole suite by the second command, but for NumPy and the"
            " builds; not counted here",
        ),
        Row(
            "AddressSanitizer and UndefinedBehaviorSanitizer report nothing",
            0,
            command="nox -s sanitize",
            lacking="the core's tests, not the whole suite; not counted here",
        ),
        Row(
            "Cached decoding is full decoding, pieces are the whole, a row is what it is alone",
            600,
            (
                SESSION,
                "tests/generate/test_many.py::test_a_text_among_many_is_what_it_is_alone",
                f"{KERNELS}::test_a_row_has_the_same_bits_in_any_company",
                "tests/test_pipeline.py::test_text_read_in_pieces_is_text_read_at_once",
                "tests/test_model.py::test_cached_decoding_is_full_decoding",
                "tests/test_model.py::test_a_stream_alone_is_the_stream_in_a_batch",
                "tests/test_pipeline.py::test_any_text_in_any_pieces_is_the_text",
            ),
            also=(
                Repeated("tests/test_model.py", r"@examples\((\d+)\)", 2 * 20),
                Repeated("tests/test_pipeline.py", r"@examples\((\d+)\)", 20),
            ),
        ),
    ],
    "Threads and processes": [
        Row(
            "Eight threads share a model, and get what one gets",
            1000,
            (
                "tests/generate/test_generate.py::test_threads_share_a_model",
                f"{THREADS}::test_python_threads_do_not_disturb_each_other",
            ),
            also=(Repeated("tests/generate/test_generate.py", r'"generations", \[(\d+)'),),
            long=(Repeated("tests/generate/test_generate.py", r"pytest\.param\((\d+), marks=pytest\.mark\.long"),),
            cases_count=False,
        ),
        Row(
            "A forked child computes",
            200,
            (f"{THREADS}::test_a_forked_child_computes_and_the_parent_goes_on", f"{THREADS}::test_two_hundred_forks"),
            also=(Repeated(THREADS, r"in_a_process\(FORK, (20),"),),
            long=(Repeated(THREADS, r"in_a_process\(FORK, (200),"),),
            cases_count=False,
        ),
        Row(
            "Ctrl-C stops what is running, and what was there stays",
            100,
            (
                f"{THREADS}::test_ctrl_c_does_not_wait_for_a_kernel",
                f"{BEHAVIOUR}::test_ctrl_c_ends_training_with_a_model",
                f"{BEHAVIOUR}::test_ctrl_c_ends_a_demo",
                f"{STORE}::test_rows_that_are_durable_when_an_interrupt_comes_are_there_once",
                f"{STORE}::test_an_interrupted_segment_is_not_remembered",
                "tests/test_interrupts.py::test_ctrl_c_at_any_moment",
            ),
            also=(Repeated("tests/test_interrupts.py", r"TIMES = (\d+)", 10),),
            lacking="no time is asserted",
        ),
        Row(
            "Whichever allocation fails is a MemoryError, and nothing leaks",
            0,
            ("tests/core/test_no_memory.py::test_every_allocation_that_fails_is_a_memory_error",),
            lacking="one test fails each allocation of every kernel in turn; NumPy's and Python's own are not made to fail",
        ),
        Row(
            "Ten thousand times loaded, used and let go, a model leaves no memory behind",
            10_000,
            ("tests/generate/test_generate.py::test_models_that_are_let_go_leave_nothing",),
            also=(Repeated("tests/generate/test_generate.py", r'"cycles", \[(\d+)'),),
            long=(Repeated("tests/generate/test_generate.py", r"pytest\.param\(([\d_]+), marks=\[pytest\.mark\.long"),),
            cases_count=False,
        ),
    ],
    "Plugins": [
        Row(
            "A broken package costs one warning that names it, and nothing else",
            10,
            (
                f"{PACKAGES}::test_a_broken_package_costs_one_warning_that_names_it",
                f"{PACKAGES}::test_a_package_whose_metadata_is_broken_costs_one_warning_that_names_it",
            ),
        ),
        Row(
            "An error from a plugin says which one, its version, the method, and where",
            0,
            (
                f"{PACKAGES}::test_what_goes_wrong_in_a_method_is_told_with_plugin_version_and_place",
                f"{RUN}::test_whatever_a_strategy_raises_is_told_with_its_place_and_kept",
            ),
        ),
        Row(
            "What a plugin returns is checked before C sees it",
            40,
            (
                f"{RUN}::test_nonsense_is_stopped_before_it_is_computed_with",
                f"{RUN}::test_nonsense_parameters_are_refused",
            ),
        ),
        Row(
            "The kit catches each strategy that is broken on purpose",
            25,
            ("tests/testing/test_kit.py::test_each_broken_strategy_is_caught_by_its_check",),
        ),
        Row(
            "Help and lists work with every plugin broken, and import none",
            0,
            (
                f"{PACKAGES}::test_the_command_line_lists_plugins_though_all_are_broken",
                f"{PACKAGES}::test_a_list_of_names_imports_nobody",
                f"{PACKAGES}::test_a_misspelt_name_imports_nobody",
                f"{BEHAVIOUR}::test_help_imports_next_to_nothing",
            ),
            lacking="what twenty installed plugins cost is not measured: no test asserts a time",
        ),
        Row("The template, installed, passes the kit", 0, (f"{PACKAGES}::test_the_template_passes_its_own_tests",)),
    ],
    "What is shipped": [
        Row(
            "The sdist alone builds a wheel that works in an empty environment",
            0,
            ("tests/test_build.py::test_the_sdist_alone_builds_a_wheel_that_works",),
        ),
        Row("The docs' code runs; no public name, method, command or option is left out", 0, ("tests/test_docs.py",)),
    ],
}
ROWS = [row for rows in PROMISES.values() for row in rows]


COLLECT = """
import sys, pytest
class Names:
    def pytest_collection_finish(self, session):
        for item in session.items:
            print("found", "long" if item.get_closest_marker("long") else "fast", item.nodeid)
options = ["--collect-only", "-q", "-m", "long or not long", "-p", "no:cacheprovider"]
sys.exit(pytest.main([*options, *sys.argv[1:]], plugins=[Names()]))
"""


def collected(tests: list[str]) -> dict[str, dict[str, int]]:
    """How many cases pytest finds of each "file::test" or file, of the fast and the long ones."""
    done = subprocess.run([sys.executable, "-c", COLLECT, *dict.fromkeys(tests)], cwd=ROOT, capture_output=True, text=True)
    found: dict[str, list[str]] = {"fast": [], "long": []}
    for word, *rest in (line.split(" ", 2) for line in done.stdout.splitlines()):
        if word == "found":
            found[rest[0]].append(rest[1].partition("[")[0])
    if done.returncode or not found["fast"]:
        raise ValueError(done.stdout + done.stderr)
    return {
        kind: {test: sum(name == test or name.startswith(f"{test}::") for name in names) for test in tests} for kind, names in found.items()
    }


def page() -> str:
    """docs/reliability.md. Raises ValueError for a test that is not there."""
    tests = [test for row in ROWS for test in row.tests]
    cases = collected(tests)
    fast, slow = cases["fast"], cases["long"]
    if lost := [test for test in tests if not fast[test] + slow[test]]:
        raise ValueError(f"expected tests of these names: {lost}")
    parts = [
        "# Reliability",
        "What is promised, the command that shows it, and how many cases it tries: at each change, and in all, with the long tests. The"
        " aim is what is wanted; \u201call\u201d is each one there is. Where a number is below it, or a part is not shown, the last column"
        " says so. `python tests/reliability.py` makes this page.",
    ]
    for heading, rows in PROMISES.items():
        lines = ["| promise | each change | in all | aim | not yet |", "|---|---|---|---|---|"]
        commands = []
        for row in rows:
            each = sum(fast[test] for test in row.tests) * row.cases_count + sum(part.number for part in row.also)
            whole = each + sum(slow[test] for test in row.tests) * row.cases_count + sum(part.number for part in row.long)
            below = f"below the aim by {row.aim - whole:,}" if whole < row.aim else ""
            shows = bool(row.tests or row.command)
            numbers = [f"{each:,}", f"{whole:,}"] if row.tests or row.also else ["\u2013", "\u2013"]
            missing = "; ".join(filter(None, [below, row.lacking])) if shows else f"not shown: {row.lacking}"
            lines.append("| " + " | ".join([row.promise, *numbers, f"{row.aim:,}" if row.aim else "all", missing]) + " |")
            if shows:
                commands.append(f"# {row.promise}\n" + (row.command or 'pytest -m "long or not long" ' + " ".join(row.tests)))
        parts += [f"## {heading}", "\n".join(lines), "```bash\n" + "\n".join(commands) + "\n```"]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
