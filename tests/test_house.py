"""The rules of the house that are small enough to check: who imports whom, how long things are, and what nobody
writes.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(file for package in ("refengine", "verify") for file in (ROOT / package).rglob("*.py"))
EVERYTHING = sorted(
    file
    for folder in ("refengine", "verify", "tests", "fixtures", "benchmarks")
    for file in (ROOT / folder).rglob("*.py")
)
LONGEST_FILE, LONGEST_MODEL, LONGEST_FUNCTION = 300, 135, 60

CORE = {"numpy", "safetensors", "ml_dtypes"}
LATER_IN_REFENGINE = {"gguf", "huggingface_hub", "jinja2", "rich", "tokenizers", "transformers"}
RUNTIMES = {"llama_cpp", "onnxruntime", "onnxruntime_genai", "openvino", "torch"}
BESIDE_TORCH = {"huggingface_hub", "transformers"}
ONNX = {"onnx", "google"}
DRAWING = {"matplotlib"}
HTTP = {"urllib3"}
SUBJECTS = RUNTIMES | ONNX | DRAWING | HTTP | LATER_IN_REFENGINE

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef
of_sources = pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def module_of(file: Path) -> str:
    """The dotted name of a source file."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def inside(node: ast.AST) -> Iterator[ast.AST]:
    """What is run when the module is imported: neither the insides of functions nor what only a type checker sees."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.Lambda):
            continue
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        yield child
        yield from inside(child)


def typing_only(node: ast.AST) -> set[ast.AST]:
    """What only a type checker sees."""
    blocks = [
        child
        for child in ast.walk(node)
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"
    ]
    return {child for block in blocks for child in ast.walk(block)}


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    """Dotted names of what import statements name; this project has no relative ones."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names.add(node.module or "")
    return names


def packages(names: set[str]) -> set[str]:
    """The packages of others among them."""
    return {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)


def at_import(file: Path) -> set[str]:
    return imported(inside(tree(file)))


@cache
def ever(file: Path) -> set[str]:
    """Imported at some time, by a function perhaps; not what a type checker alone sees."""
    unseen = typing_only(tree(file))
    return imported(node for node in ast.walk(tree(file)) if node not in unseen)


@of_sources
def test_imports_follow_the_arrows(file):
    module, first, sometime = module_of(file), packages(at_import(file)), packages(ever(file))
    if module.startswith("refengine"):
        assert first <= CORE | {"refengine"}
        assert sometime <= CORE | {"refengine"} | LATER_IN_REFENGINE
    elif module.startswith("verify.candidates"):
        assert not first & (RUNTIMES | ONNX)
    elif module.startswith("verify.export"):
        assert not sometime & RUNTIMES
    else:
        assert not sometime & (RUNTIMES | ONNX)
    assert not first & DRAWING
    if not module.startswith("refengine"):
        drawing = DRAWING if module == "verify.bench.plot" else set()
        http = HTTP if module == "verify.candidates.openai" else set()
        beside = BESIDE_TORCH if module == "verify.candidates.transformers" else set()
        assert sometime <= CORE | {"refengine", "verify", "rich", "psutil"} | RUNTIMES | ONNX | drawing | http | beside


@of_sources
def test_a_runtime_is_imported_by_one_file(file):
    runtimes = packages(ever(file)) & RUNTIMES
    assert len(runtimes) <= 1
    others = [other for other in SOURCES if other != file and packages(ever(other)) & runtimes]
    assert not others


@of_sources
def test_a_report_sees_results_and_nothing_else_of_verify(file):
    if module_of(file).startswith("verify.report"):
        own = {name for name in ever(file) if name.partition(".")[0] in ("verify", "refengine")}
        assert all(name.startswith("verify.report") for name in own)


@pytest.mark.parametrize("module", ["refengine", "refengine.__main__", "verify", "verify.cli"])
def test_importing_a_package_imports_none_of_the_optional_ones(module):
    optional = SUBJECTS - ({"rich"} if module.startswith("verify") else set())
    program = f"import sys, {module}; print(*sorted({optional} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("file", EVERYTHING, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_are_short(file):
    lines = file.read_text(encoding="utf-8").count("\n")
    assert lines <= (LONGEST_MODEL if module_of(file) == "refengine.model" else LONGEST_FILE)


@of_sources
def test_functions_are_short(file):
    for function in (node for node in ast.walk(tree(file)) if isinstance(node, Function)):
        assert function.end_lineno - function.lineno < LONGEST_FUNCTION, function.name


def public(node: ast.Module | ast.ClassDef) -> Iterator[Definition]:
    """Definitions that others may use: no leading underscore, and not inside a function."""
    for child in node.body:
        if isinstance(child, Function | ast.ClassDef) and not child.name.startswith("_"):
            yield child
            if isinstance(child, ast.ClassDef):
                yield from public(child)


@of_sources
def test_what_is_public_has_a_docstring(file):
    module = tree(file)
    assert ast.get_docstring(module) or not module.body
    assert [node.name for node in public(module) if not ast.get_docstring(node)] == []


@of_sources
def test_no_error_is_caught_by_the_name_of_all(file):
    for handler in (node for node in ast.walk(tree(file)) if isinstance(node, ast.ExceptHandler)):
        assert handler.type is not None, f"line {handler.lineno}: bare except"
        caught = {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)}
        assert not caught & {"Exception", "BaseException"}, f"line {handler.lineno}"


MUTABLE_CALLS = {"list", "dict", "set", "defaultdict", "Counter", "deque", "OrderedDict", "bytearray"}
READ_ONLY = {"Mapping", "Sequence", "Collection", "Set", "Final", "Iterable"}


@of_sources
def test_no_module_keeps_state_that_can_change(file):
    """A literal that is declared as a Mapping or Sequence counts as constant: the type checker refuses to change it."""
    for node in inside(tree(file)):
        assert not isinstance(node, ast.Global), f"line {node.lineno}: global"
    for node in tree(file).body:
        value = getattr(node, "value", None)
        if not isinstance(node, ast.Assign | ast.AnnAssign) or not _is_mutable(value):
            continue
        names = {target.id for target in ast.walk(node) if isinstance(target, ast.Name)}
        declared = (
            {part.id for part in ast.walk(node.annotation) if isinstance(part, ast.Name)}
            if isinstance(node, ast.AnnAssign)
            else set()
        )
        assert "__all__" in names or declared & READ_ONLY, f"line {node.lineno}: declare it as a Mapping or a Sequence"


def _is_mutable(value: ast.expr | None) -> bool:
    called = value.func.id if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) else ""
    literals = ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp
    return isinstance(value, literals) or called in MUTABLE_CALLS


@of_sources
def test_no_function_has_a_default_that_can_change(file):
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.arguments):
            assert not any(_is_mutable(default) for default in (*node.defaults, *node.kw_defaults))


@of_sources
def test_nothing_asks_an_object_what_it_has(file):
    called = {node.id for node in ast.walk(tree(file)) if isinstance(node, ast.Name)}
    assert not called & {"hasattr", "setattr", "eval", "exec", "globals"}


@of_sources
def test_nothing_is_left_for_later_and_no_check_is_switched_off_without_a_reason(file):
    text = file.read_text(encoding="utf-8")
    assert not re.search(r"\b(TODO|FIXME|XXX)\b|raise NotImplementedError|type: ignore", text)
    for line in text.splitlines():
        assert "noqa" not in line or re.search(r"noqa: [A-Z]+\d+ -- \w", line), line


def test_no_file_speaks_of_the_machine_that_it_was_written_on():
    texts = [*EVERYTHING, *ROOT.glob("*.md"), ROOT / "pyproject.toml"]
    places = re.compile(r"/(?:work|home|root|Users)/[a-z]|/tmp/w/")
    assert [
        str(file) for file in texts if file != Path(__file__) and places.search(file.read_text(encoding="utf-8"))
    ] == []


def test_the_rules_are_checked_on_every_source_of_both_packages():
    names = {module_of(file) for file in SOURCES}
    assert {"refengine", "refengine.model", "verify.cli", "verify.report.console", "verify.candidates.ort"} <= names
    assert len(names) == len(SOURCES) > 40
