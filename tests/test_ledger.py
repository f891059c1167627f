"""Every file, class and function in the tables and in section 4 of docs/paper.md, and every test in docs/reliability.md,
must exist.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE, TESTS = ROOT / "src" / "agra", ROOT / "tests"
LEDGER = (ROOT / "docs" / "paper.md").read_text()
AMBIGUITIES = set(range(1, 47))


def defined(path: Path) -> set[str]:
    """Names at a module's top level, and `Class.name` for the attributes of its classes."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        names.update(_names(node))
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{name}" for child in ast.walk(node) for name in _names(child)}
    return names


def _names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    for target in targets:
        yield ast.unparse(target).removeprefix("self.")


EVERYWHERE = {
    path.relative_to(SOURCE).with_suffix("").as_posix().replace("/", "."): defined(path)
    for path in SOURCE.rglob("*.py")
}


def problem(reference: str) -> str | None:
    """Return the reason why a backticked reference of the ledger does not exist, or None."""
    if match := re.fullmatch(r"([\w/]+\.py)(?:: (.+))?", reference):
        path, names = match[1], (match[2] or "").split(", ") if match[2] else []
        if (TESTS / path).is_file() and not names:
            return None
        if not (SOURCE / path).is_file():
            return f"no file {path}"
        missing = [name for name in names if name not in defined(SOURCE / path)]
        return f"{path} does not define {missing}" if missing else None
    if reference.endswith("/"):
        return None if (SOURCE / reference).is_dir() else f"no folder {reference}"
    owner, _, name = reference.partition(".")
    for module, names in EVERYWHERE.items():
        if reference in names or (owner in module.split(".")[-2:] and name in names):
            return None
    return f"nothing in src/agra is called {reference}"


def references() -> list[str]:
    tables, additions = LEDGER.split("## 4.")
    rows = [line for line in tables.splitlines() if line.startswith("|")] + additions.splitlines()
    quoted = [quote for row in rows for quote in re.findall(r"`([^`]+)`", row)]
    return [
        quote
        for quote in quoted
        if re.fullmatch(r"[\w/]+\.py(: [\w., ]+)?|[A-Za-z_]\w*(\.\w+)+|[A-Z]\w+|[\w/]+/", quote)
    ]


def test_every_reference_exists():
    listed = references()
    assert len(listed) > 60
    problems = {reference: reason for reference in listed if (reason := problem(reference))}
    assert not problems


def test_every_equation_and_ambiguity_has_a_row():
    equations = {int(n) for n in re.findall(r"\d+", " ".join(re.findall(r"^\| Eqs?\. ([\d, ]+) \|", LEDGER, re.M)))}
    assert equations == set(range(1, 21))
    ambiguities: set[int] = set()
    for first, last in re.findall(r"^\| (\d+)(?:-(\d+))? \|", LEDGER, re.M):
        ambiguities |= set(range(int(first), int(last or first) + 1))
    assert ambiguities == AMBIGUITIES


def test_what_the_code_cites_is_there():
    cited = {int(n) for path in SOURCE.rglob("*.py") for n in re.findall(r"docs/paper\.md #(\d+)", path.read_text())}
    assert cited
    assert cited <= AMBIGUITIES


def test_the_tests_of_the_fault_tables_exist():
    functions = {name for path in TESTS.rglob("test_*.py") for name in defined(path)}
    text = (ROOT / "docs" / "reliability.md").read_text()
    named = re.findall(r"`(test_\w+)`", text)
    assert len(named) >= 26
    assert not set(named) - functions
    paths = re.findall(r"`(tests/[\w/.]+)`", text)
    assert paths
    assert not [path for path in paths if not (ROOT / path).exists()]
