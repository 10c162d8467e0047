"""Where tests are: each module has a file of its own in the same place; what crosses rooms is in `scenarios/`."""

from pathlib import Path

from songvec_assets_tests.conftest import BEGUN_FIRST

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "songvec_assets"
ELSEWHERE = {"scenarios", "browser", "benchmarks", "deploy", "docs", "examples", "tools"}
"""Folders of tests that are of no single module."""
WITHOUT_A_TEST: dict[str, str] = {
    "filling.py": "what it makes is tested in `cache/test_fill`, what it checks in `test_pipeline` and `scenarios/`",
    "samples/__main__.py": "prints what `test_samples` reads",
    "search/query.py": "`search/test_doors` asks with it by Python, command and SQL alike",
    "searches.py": "the same",
    "evaluations.py": "`search/test_evaluate` evaluates and swaps with it",
    "vectors/spec.py": "`vectors/test_table` reads and writes it",
}
"""Modules without a file of tests, and why."""
OF_NO_MODULE = {
    "test_layout.py": "this one",
    "test_provider.py": "of the tests' own provider",
    "test_samples.py": "of the package `samples`",
    "cli/test_refusals.py": "of `commands`, without a process of its own",
    "search/test_docs.py": "of docs/search.md, over the songs of `search/conftest`",
    "search/test_doors.py": "of a search by Python, command and SQL, over the same songs",
    "search/test_spelling.py": "of misspelt words in a search, through Python",
    "defs/test_surface.py": "of all names that users see, in `defs/` and `cli/`",
    "storage/test_contract.py": "of what `local` and `objects` have in common",
    "vectors/index/test_capacity.py": "of `sizing`, on servers with little memory or disk",
    "vectors/index/test_shared_memory.py": "of `build`, on a server with a small /dev/shm",
}
"""Files of tests that mirror no module, and what they test."""


def files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*.py") if path.name != "__init__.py"}


def test_each_module_has_a_file_of_tests_in_the_same_place() -> None:
    expected = {path.parent / f"test_{path.name}": str(path) for path in files(PACKAGE)}
    missing = {module for test, module in expected.items() if not (TESTS / test).exists()}
    assert missing == WITHOUT_A_TEST.keys(), "write tests, or say here why there are none"


def test_each_file_of_tests_is_of_a_module_or_says_what_of() -> None:
    modules = {path.parent / f"test_{path.name}" for path in files(PACKAGE)}
    tests = {path for path in files(TESTS) if path.name.startswith("test_") and path.parts[0] not in ELSEWHERE}
    assert {str(path) for path in tests - modules} == OF_NO_MODULE.keys(), (
        "move it to `scenarios/`, or say here why not"
    )


def test_the_files_that_begin_first_are_there() -> None:
    assert [name for name in BEGUN_FIRST if not (TESTS / name).is_file()] == []
