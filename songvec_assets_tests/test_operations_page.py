"""docs/operations.md has a row for every failure message that the code can give, and none for one that it cannot.

Messages are read from the code without running it: the constant words, with … for what is filled in. A row has a
message so, or its beginning; `…` stands in it for just what is filled in. A new message fails here with the row to add.
The figures of its plan are those of docs/scale.md.
"""

import ast
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import pytest

from songvec_assets.checks import INDEX_CHECKS, TABLE_CHECKS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "operations.md"

HOLE = "…"
UNREADABLE = {
    ("cli/base.py", "str(error)"): "an error of the package, whose own words have a row",
    ("cli/run.py", "'\\n'.join(result.failures)"): "the failures of a run's steps, whose own words have rows",
    ("cli/run.py", "'\\n'.join([*result.failures, _describe_incomplete(result, pipeline, job)])"): (
        "the same, and what is missing after a run that went on without some ranges: see Partial runs"
    ),
    ("defs/steps.py", "str(error)"): "an error of the package, whose own words have a row",
    ("defs/steps.py", "'. '.join(sentences)"): "the same, and how to continue without what is incomplete",
    (
        "embedding/client.py",
        "_REFUSALS[action](f'{self.base_url} {words}')",
    ): "words of describe_answer: they have a row",
    ("embedding/client.py", "f'{self.base_url}: {outcome.words}'"): "of a time-out, which divides the request",
    ("embedding/client.py", "f'{self.base_url} {outcome.words}'"): "the reason of a rejection: see the songs set aside",
    ("vectors/load.py", "'; '.join(damaged)"): "errors of ranges, whose own words have rows",
}
"""Messages that cannot be read, by file and code, and why they need no row."""

_HEADER = ["Message", "Why", "What to do"]
_LEAST_LETTERS = 20
_TELLERS = {"Failure": "description", "BadParameter": "message", "fail": "message"}
_MOST_STEPS = 12


@pytest.fixture(scope="module")
def package() -> "Package":
    return Package.read(ROOT / "songvec_assets")


@pytest.fixture(scope="module")
def rows() -> "list[Row]":
    return read_rows(PAGE.read_text(encoding="utf-8"))


def test_each_message_of_the_code_has_a_row(package: "Package", rows: "list[Row]") -> None:
    missing = [
        f"{message.where}: no row of docs/operations.md begins it; add to the table of its group\n"
        f"    | {message.template.replace('|', chr(92) + '|')} | (why) | (what to do) |"
        for message in read_messages(package)
        if not any(begins(row.message, message.template) for row in rows)
    ]
    assert not missing, "\n" + "\n".join(missing)


def test_each_row_is_a_message_of_the_code(package: "Package", rows: "list[Row]") -> None:
    templates = [message.template for message in read_messages(package)]
    dead = [
        f"docs/operations.md:{row.line}: the code has no message that begins so: {row.message}"
        for row in rows
        if not any(begins(row.message, template) for template in templates)
    ]
    assert not dead, "\n" + "\n".join(dead)


def test_each_message_can_be_read_or_is_listed(package: "Package") -> None:
    unread = [site for site in find_sites(package) if not package.templates(site)]
    unlisted = [f"{site.where}: {site.code}" for site in unread if (site.file, site.code) not in UNREADABLE]
    assert not unlisted, "\n".join(["no words to be read; write them there, or list it in UNREADABLE:", *unlisted])
    assert UNREADABLE.keys() <= {(site.file, site.code) for site in unread}, "one is listed that is no more"


def test_rows_are_whole(rows: "list[Row]") -> None:
    assert rows
    for row in rows:
        assert row.why and row.cure, f"docs/operations.md:{row.line}: expected a reason and a cure"
    messages = [row.message for row in rows]
    assert len(set(messages)) == len(messages), f"twice: {sorted({m for m in messages if messages.count(m) > 1})}"


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
        ("code", "templates"),
        [
            ("raise StoreError('it is  full')", ["it is full"]),
            ("raise StoreError(f'{path} is full: ' 'make room')", ["… is full: make room"]),
            ("raise StoreError(f'{a}{b:,} of {c!r}')", ["… of …"]),
            ("raise StoreError('none' if a else f'{a} left')", ["none", "… left"]),
            ("raise StoreError('lost' + ('' if a else ' and gone') + '!')", ["lost!", "lost and gone!"]),
            ("told = f'{n} lists'\nraise StoreError(f'{told} need room')", ["… lists need room"]),
            ("n, told = (1, 'one') if a else (2, f'{b}')\nraise StoreError(f'{told} left')", ["one left", "… left"]),
            ("told, n = ask()\nraise StoreError(f'{told} need room')", ["… need room"]),
            ("if a:\n told = 'one'\nelse:\n told = 'two'\nraise StoreError(told)", ["one", "two"]),
            ("told = 'one'\nif a:\n told = 'two'\n raise StoreError(told)", ["two"]),
            ("raise StoreError(f'table {TABLE} is full')", ["table songs is full"]),
            ("raise StoreError(describe(error))", ["the server says …", "the server says …, so wait"]),
            ("raise StoreError(f'full: {describe(error)}')", ["full: …"]),
            ("report(error=errors.LostError(f'{n} lost'))", ["… lost"]),
            ("fail('nothing to do')", ["nothing to do"]),
            ("raise dg.Failure(description='half done')", ["half done"]),
            (
                "raise AnError(a)\nclass AnError(LostError):\n def __init__(self, n):\n  super().__init__(f'no {n}')",
                ["no …"],
            ),
            ("raise ValueError('a mistake of our own')", []),
        ],
    )
    def test_a_message_is_its_words_with_holes(self, tmp_path: Path, code: str, templates: list[str]) -> None:
        assert [message.template for message in read_messages(_sample(tmp_path, code))] == templates

    @pytest.mark.parametrize(
        "code",
        ["raise StoreError(str(error))", "raise StoreError", "raise StoreError()", "raise KINDS[kind]('full')"],
    )
    def test_what_it_cannot_read_is_told(self, tmp_path: Path, code: str) -> None:
        package = _sample(tmp_path, code)
        [site] = find_sites(package)
        assert package.templates(site) == []
        assert site.where.startswith("package/sample.py:")

    def test_words_of_advice_are_messages(self, tmp_path: Path) -> None:
        module = "_ADVICE = {1: 'wait', 2: f'wait, then {AGAIN}'}\nAGAIN = 'go on'\n_ADVICE_TOO = (('x', _ADVICE[1]),)"
        package = _sample(tmp_path, "pass", module)
        assert [message.template for message in read_messages(package)] == ["wait", "wait, then go on"]

    @pytest.mark.parametrize(
        ("row", "template", "expected"),
        [
            ("… is full", "… is full", True),
            ("… is full", "… is full: make room", False),
            ("the disk of … is full", "the disk of … is full: make room", True),
            ("the disk of … is full: ma", "the disk of … is full: make room", False),
            ("the disk of … is full: make room, or wait", "the disk of … is full: make room", False),
            ("the disk of the server is full", "the disk of … is full: make room", False),
        ],
    )
    def test_a_row_is_a_beginning(self, row: str, template: str, expected: bool) -> None:
        assert begins(row, template) == expected

    def test_rows_are_those_of_its_tables(self) -> None:
        page = (
            "| Message | Why | What to do |\n| --- | --- | --- |\n| one \\| two | a | b |\n| short | a |\n\n"
            "| Other | Table |\n| --- | --- |\n| x | y |\n"
        )
        assert read_rows(page) == [Row(3, "one | two", "a", "b"), Row(4, "short", "a", "")]


def _sample(folder: Path, code: str, module: str = "") -> "Package":
    """A package whose function `work` is the code."""
    lines = "\n".join(f" {line}" for line in code.splitlines())
    files = {
        "errors.py": "class SongvecError(Exception): ...\nclass StoreError(SongvecError): ...\n"
        "class LostError(StoreError): ...\n",
        "names.py": "SCHEMA, TABLE = 'public', 'songs'\n",
        "sample.py": "from package.errors import StoreError\nfrom package.names import TABLE\n"
        "def describe(error):\n words = str(error)\n return f'the server says {words}' + ('' if a else ', so wait')\n"
        f"{module}\ndef work(a, b, c, n, path):\n{lines}\n",
    }
    (folder / "package").mkdir()
    for name, content in files.items():
        (folder / "package" / name).write_text(content, encoding="utf-8")
    return Package.read(folder / "package")


class Row(NamedTuple):
    """A row of a table of messages, and its line."""

    line: int
    message: str
    why: str
    cure: str


def read_rows(page: str) -> list[Row]:
    """The rows of all tables of messages."""
    rows, in_table = [], False
    for number, line in enumerate(page.splitlines(), 1):
        [cells] = _cells(line) or [[]]
        if not cells or cells == _HEADER:
            in_table = cells == _HEADER
        elif in_table and set("".join(cells)) != {"-"}:
            rows.append(Row(number, *[*cells, "", ""][:3]))
    return rows


def _cells(page: str) -> list[list[str]]:
    """The cells of all lines of tables."""
    lines = [re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in page.splitlines() if line.startswith("|")]
    return [[_normalise(cell.replace("\\|", "|")) for cell in line] for line in lines]


def begins(row: str, template: str) -> bool:
    """Whether a row has a message; or its beginning up to the end of a word, where that is enough to be found by."""
    if len(row.replace(HOLE, "")) < _LEAST_LETTERS:
        return row == template
    return template.startswith(row) and not template[len(row) : len(row) + 1].isalnum()


class Message(NamedTuple):
    """Words that the code can give: `where` is file:line."""

    where: str
    template: str


def read_messages(package: "Package") -> list[Message]:
    """All messages that can be read, in the order of the files."""
    sites = sorted(find_sites(package), key=lambda site: (site.file, site.expression.lineno))
    return [Message(site.where, template) for site in sites for template in package.templates(site)]


@dataclass(frozen=True)
class Site:
    """A place that gives a message.

    Attributes:
        module: where it is.
        expression: the message; or, where that is not known, what raises it.
        known: whether it is.
    """

    module: "Module"
    expression: ast.expr
    known: bool = True

    @property
    def file(self) -> str:
        return self.module.name

    @property
    def code(self) -> str:
        return ast.unparse(self.expression)

    @property
    def where(self) -> str:
        return f"{self.module.folder.name}/{self.file}:{self.expression.lineno}"


def find_sites(package: "Package") -> Iterator[Site]:
    """Every place that makes an error of the package or of Dagster, ends the command line, or holds words of advice."""
    for module in package.modules.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call):
                yield from _site_of_call(package, module, node)
            elif isinstance(node, ast.Raise) and node.exc is not None:
                called = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
                if isinstance(node.exc, ast.Call) and _name(called) is None:
                    yield Site(module, node.exc, known=False)
                elif called is node.exc and _name(called) in package.errors:
                    yield Site(module, node.exc, known=False)  # a class without words
        for name, [value] in module.constants.items():
            if name.startswith("_ADVICE"):
                yield from (Site(module, words) for words in _advice(value))


def _site_of_call(package: "Package", module: "Module", call: ast.Call) -> Iterator[Site]:
    name = _name(call.func)
    if name == "__init__" and _name(module.class_of(call)) in package.errors:
        yield Site(module, call.args[0])
    elif name in package.errors and not package.errors[name]:
        yield Site(module, call.args[0]) if call.args else Site(module, call, known=False)
    elif name in _TELLERS:
        given = [*call.args[:1], *(each.value for each in call.keywords if each.arg == _TELLERS[name])]
        yield Site(module, given[0]) if given else Site(module, call, known=False)


def _advice(value: ast.expr) -> list[ast.expr]:
    rows = value.values if isinstance(value, ast.Dict) else value.elts if isinstance(value, ast.Tuple) else []
    words = [row.elts[-1] if isinstance(row, ast.Tuple) else row for row in rows]
    return [each for each in words if not isinstance(each, ast.Subscript)]  # those are another row's


def _name(node: ast.AST | None) -> str | None:
    """The last name of a dotted one."""
    if isinstance(node, (ast.Attribute, ast.Name, ast.ClassDef)):
        return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else node.name
    return None


@dataclass(frozen=True, eq=False)
class Module:
    """A file's code."""

    folder: Path
    name: str
    tree: ast.Module

    @cached_property
    def parents(self) -> dict[ast.AST, ast.AST]:
        return {child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}

    @cached_property
    def constants(self) -> dict[str, list[ast.expr]]:
        """What is assigned to names of the module."""
        found: dict[str, list[ast.expr]] = {}
        for node in self.tree.body:
            if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
                continue
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                several = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                pairs = zip(target.elts, node.value.elts, strict=True) if several else [(target, node.value)]
                found |= {each.id: [value] for each, value in pairs if isinstance(each, ast.Name)}
        return found

    def returned(self, function: str) -> list[ast.expr]:
        """What a function of the module returns."""
        defined = [node for node in self.tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
        nodes = [node for each in defined for node in ast.walk(each) if isinstance(node, ast.Return)]
        return [node.value for node in nodes if node.value is not None]

    @cached_property
    def imports(self) -> dict[str, str]:
        """Names from other modules, with the module's dotted name."""
        nodes = [node for node in ast.walk(self.tree) if isinstance(node, ast.ImportFrom)]
        return {alias.asname or alias.name: node.module or "" for node in nodes for alias in node.names}

    def class_of(self, node: ast.AST) -> ast.ClassDef | None:
        return next((each for each in self.ancestors(node) if isinstance(each, ast.ClassDef)), None)

    def function_of(self, node: ast.AST) -> ast.AST | None:
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
        return next((each for each in self.ancestors(node) if isinstance(each, kinds)), None)

    def ancestors(self, node: ast.AST) -> Iterator[ast.AST]:
        while node in self.parents:
            node = self.parents[node]
            yield node

    def find_assigned(self, use: ast.Name) -> list[ast.expr] | None:
        """What a local variable may be where it is used; None where it is none, or is not simply assigned.

        Its last assignment before that; where this is one of an `if` or `try` that is over, all of that one's.
        """
        function = self.function_of(use)
        bound = [
            node
            for node in (ast.walk(function) if function else ())
            if isinstance(node, ast.Name) and node.id == use.id and isinstance(node.ctx, ast.Store)
        ]
        before = sorted((each for each in bound if each.lineno < use.lineno), key=lambda each: each.lineno)
        if not before:
            return None
        around = set(self.ancestors(use))
        outermost: ast.AST = before[-1]
        while self.parents[outermost] not in around:
            outermost = self.parents[outermost]
        values = [self._value_of(each) for each in before if outermost in (each, *self.ancestors(each))]
        return None if None in values else [each for each in values if each is not None]

    def _value_of(self, target: ast.Name) -> ast.expr | None:
        """What is assigned to a name, alone or among others; None where that is not written there."""
        statement, place = self.parents[target], None
        if isinstance(statement, ast.Tuple):
            statement, place = self.parents[statement], statement.elts.index(target)
        if not isinstance(statement, ast.Assign) or len(statement.targets) > 1:
            return None
        return statement.value if place is None else _element(statement.value, place)


@dataclass(frozen=True, eq=False)
class Package:
    """All modules of a package, by their dotted names; its errors, and whether each words its message itself."""

    modules: dict[str, Module]
    errors: dict[str, bool] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "Package":
        modules = {}
        for path in sorted(folder.rglob("*.py")):
            name = path.relative_to(folder)
            dotted = ".".join((folder.name, *name.with_suffix("").parts))
            modules[dotted] = Module(folder, name.as_posix(), ast.parse(path.read_text(encoding="utf-8")))
        classes = [node for each in modules.values() for node in ast.walk(each.tree) if isinstance(node, ast.ClassDef)]
        errors = {"SongvecError": False}
        for _ in classes:  # as deep as the tree can be
            for node in classes:
                bases = [name for base in node.bases if (name := _name(base)) in errors]
                if bases:
                    own = any(isinstance(each, ast.FunctionDef) and each.name == "__init__" for each in node.body)
                    errors[node.name] = own or any(errors[name] for name in bases if name)
        return cls(modules, errors)

    def templates(self, site: Site) -> list[str]:
        """The message of a site, each of its forms, with HOLE for what is filled in; none where it has no words."""
        if not site.known:
            return []
        for follow in (False, True):
            forms = list(dict.fromkeys(map(_normalise, self._read(site.module, site.expression, follow))))
            if all(re.search(r"[^\W\d_]{2}", form) for form in forms):
                return forms
        return []

    def _read(self, module: Module, node: ast.expr, follow: bool, steps: int = _MOST_STEPS) -> list[str]:
        """The forms of an expression. `follow`: into functions whose words are the message."""
        if steps == 0:
            return [HOLE]

        def read(each: ast.expr, home: Module = module) -> list[str]:
            return self._read(home, each, follow, steps - 1)

        match node:
            case ast.Constant(value=str(words)):
                forms = [words]
            case ast.JoinedStr(values=parts):
                forms = _join(*map(read, parts))
            case ast.FormattedValue(value=value, conversion=-1, format_spec=None):
                forms = read(value)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                forms = _join(read(left), read(right))
            case ast.IfExp(body=body, orelse=orelse):
                forms = read(body) + read(orelse)
            case ast.Name(id=name):
                assigned = module.find_assigned(node)
                home = module if assigned else self._home(module, name)
                forms = [form for each in assigned or home.constants.get(name, []) for form in read(each, home)]
            case ast.Call(func=ast.Name(id=name)) if follow:
                home = self._home(module, name)
                forms = [form for each in home.returned(name) for form in read(each, home)]
            case _:
                forms = []
        return forms or [HOLE]

    def _home(self, module: Module, name: str) -> Module:
        """The module that a global name of another one is of."""
        return self.modules.get(module.imports.get(name, ""), module)


def _element(value: ast.expr, place: int) -> ast.expr | None:
    """One of a tuple's elements, where it is one, or one of two."""
    if isinstance(value, ast.IfExp):
        body, orelse = _element(value.body, place), _element(value.orelse, place)
        return ast.IfExp(value.test, body, orelse) if body and orelse else None
    return value.elts[place] if isinstance(value, ast.Tuple) else None


def _join(*parts: list[str]) -> list[str]:
    return ["".join(forms) for forms in itertools.product(*parts)]


def _normalise(words: str) -> str:
    return re.sub(f"{HOLE}+", HOLE, " ".join(words.split()))
