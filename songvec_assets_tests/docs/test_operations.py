"""docs/operations.md has a row for every code that an error of the package can carry, and none for another.

Codes are read from the code without running it: those of the error classes, and those given where an error is made.
The figures of its plan are those of docs/scale.md.
"""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from songvec_assets.checks import INDEX_CHECKS, TABLE_CHECKS
from songvec_assets.defs.steps import failing_clearly
from songvec_assets.errors import SettingsError, SongvecError, describe

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "operations.md"
CODE = re.compile(r"[a-z]+\.[a-z]+(-[a-z]+)*")
_HEADER = ["Code", "Why", "What to do"]
ERRORS = """class SongvecError(Exception):
 code: str
class StoreError(SongvecError):
 code = 'store.mismatch'
class LostError(StoreError): ...
"""


def test_each_code_has_one_row_and_each_row_is_a_code() -> None:
    rows = [code for code, *_ in read_rows(PAGE.read_text(encoding="utf-8"))]
    codes = read_codes(ROOT / "songvec_assets")
    lines = [f"{codes[code]}: add a row of `{code}` to docs/operations.md" for code in codes.keys() - {*rows}]
    lines += [f"docs/operations.md: no error of the package has the code `{code}`" for code in {*rows} - codes.keys()]
    assert not lines, "\n" + "\n".join(sorted(lines))
    assert len(set(rows)) == len(rows)


def test_each_code_has_a_reason_and_a_cure() -> None:
    for row in read_rows(PAGE.read_text(encoding="utf-8")):
        assert len(row) == len(_HEADER) and all(row), row
        assert CODE.fullmatch(row[0]), row


def test_an_error_has_the_code_of_its_class_or_the_one_that_it_was_given() -> None:
    assert SettingsError("no").code == "settings.invalid"
    assert SettingsError("no", "settings.ranges").code == "settings.ranges"
    assert describe(SettingsError("no")) == "no [settings.invalid]"
    assert describe(ValueError("no")) == "no"
    classes = [each for each in _subclasses(SongvecError) if each.__module__.startswith("songvec_assets.")]
    assert all(CODE.fullmatch(each.code) for each in classes)


def test_a_failed_command_ends_with_the_code() -> None:
    command = [str(Path(sys.executable).with_name("songvec")), "settings"]
    ended = subprocess.run(
        command, env={**os.environ, "SONGVEC_CONCURRENCY": "many"}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert ended.stderr.rstrip().endswith("[settings.invalid]"), ended.stderr


def test_a_failed_step_ends_with_the_code() -> None:
    with pytest.raises(dg.Failure) as raised, failing_clearly():
        raise SettingsError("no")
    assert raised.value.description == "no [settings.invalid]"


def test_the_plan_has_the_figures_of_the_scale_page() -> None:
    plan = _cells(PAGE.read_text(encoding="utf-8").partition("### Plan")[2].partition("###")[0])
    scale = {row[0]: row[2:4] for row in _cells((PAGE.parent / "scale.md").read_text(encoding="utf-8")) if len(row) > 5}
    figures = {name: cells for name, *cells in plan[2:]}
    assert len(figures) > 5
    assert figures == {name: scale[name] for name in figures}


def test_each_check_has_a_row() -> None:
    page = PAGE.read_text(encoding="utf-8").partition("### Checks that do not pass")[2].partition("###")[0]
    named = [match[1] for name, *_ in _cells(page) if (match := re.match(r"`(\w+)`", name))]
    assert named == [check.name for check in (*TABLE_CHECKS, *INDEX_CHECKS)]


class TestReading:
    @pytest.mark.parametrize(
        ("code", "codes"),
        [
            ("raise LostError('gone')", []),
            ("raise LostError('see a.b', 'store.lost')", ["store.lost"]),
            ("raise errors.LostError(f'{n} lost', code='store.lost')", ["store.lost"]),
            ("fails = LostError('gone', 'store.lost' if n else 'store.late')", ["store.late", "store.lost"]),
            ("raise LostError('gone', CODES[n])", ["store.early", "store.torn"]),
            ("raise ValueError('gone', 'store.lost')", []),
        ],
    )
    def test_codes_are_those_given_to_an_error(self, tmp_path: Path, code: str, codes: list[str]) -> None:
        (tmp_path / "errors.py").write_text(ERRORS)
        tables = "CODES = {1: 'store.torn', 2: ('store.early', 'see b.c!')}"
        (tmp_path / "sample.py").write_text(f"{tables}\ndef work(n):\n {code}\n")
        assert sorted(read_codes(tmp_path).keys() - {"store.mismatch"}) == codes

    def test_codes_are_those_of_the_classes(self, tmp_path: Path) -> None:
        (tmp_path / "errors.py").write_text(ERRORS)
        assert read_codes(tmp_path) == {"store.mismatch": "errors.py:4"}

    def test_what_cannot_be_read_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "errors.py").write_text(ERRORS)
        (tmp_path / "sample.py").write_text("def work(code):\n raise LostError('gone', code)\n")
        with pytest.raises(AssertionError, match=r"sample\.py:2"):
            read_codes(tmp_path)


def read_codes(folder: Path) -> dict[str, str]:
    """Every code that an error of a package can carry, with a place where it is given."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.py"))}
    classes = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    errors = {"SongvecError"}
    for _ in classes:  # as deep as the tree can be
        errors |= {each.name for each in classes if {ast.unparse(base).split(".")[-1] for base in each.bases} & errors}
    found: dict[str, str] = {}
    for path, tree in trees.items():
        for code, line in _codes_of(path, tree, errors):
            found.setdefault(code, f"{path.relative_to(folder)}:{line}")
    return found


def _codes_of(path: Path, tree: ast.Module, errors: set[str]) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name in errors:
            for each in node.body:
                if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == "code":
                    yield str(ast.literal_eval(each.value)), each.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in errors:
            for given in [*node.args[1:2], *(each.value for each in node.keywords if each.arg == "code")]:
                # where it is worked out, any that the module has
                codes = _constants(given) or _constants(tree)
                assert codes, f"{path}:{node.lineno}: expected a code, or one somewhere in its module"
                yield from ((code, node.lineno) for code in codes)


def _constants(node: ast.AST) -> list[str]:
    values = [each.value for each in ast.walk(node) if isinstance(each, ast.Constant)]
    return [value for value in values if isinstance(value, str) and CODE.fullmatch(value)]


def _subclasses(of: type[SongvecError]) -> Iterator[type[SongvecError]]:
    for each in of.__subclasses__():
        yield each
        yield from _subclasses(each)


def read_rows(page: str) -> list[list[str]]:
    """The rows of all tables of codes."""
    rows: list[list[str]] = []
    in_table = False
    for line in page.splitlines():
        [cells] = _cells(line) or [[]]
        if not cells or cells == _HEADER:
            in_table = cells == _HEADER
        elif in_table and set("".join(cells)) != {"-"}:
            rows.append([cells[0].strip("`"), *cells[1:]])
    return rows


def _cells(page: str) -> list[list[str]]:
    """The cells of all lines of tables."""
    lines = [re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in page.splitlines() if line.startswith("|")]
    return [[" ".join(cell.replace("\\|", "|").split()) for cell in line] for line in lines]
