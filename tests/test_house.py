"""The rules of the house: who may import whom, one stem everywhere, sizes, and nothing of anyone's machine."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from .sources import (
    HEADINGS,
    ROOT,
    Import,
    PassDoc,
    files,
    imports,
    modules,
    packages,
    pass_files,
    pass_table,
    sources,
)

API = ROOT / "normfuse/api.py"

ENGINE_LINES = 400
PASS_LINES = 150

PASSES_MAY = ("normfuse.algebra", "normfuse.analysis", "normfuse.graph", "normfuse.ops", "normfuse.rewrite", "torch")
PASSES_MAY_STDLIB = ("__future__", "collections", "dataclasses", "functools", "itertools", "math", "operator", "typing")
PUBLIC = ("normfuse.cli.main", "normfuse.functional", "normfuse.models", "normfuse.nn")
ONNX = ("onnx", "onnxruntime", "onnxscript", "onnx_ir")
HEAVY = (
    "matplotlib", "networkx", "normfuse.models", "normfuse.passes", "pandas", "rich", "timm", "torch._dynamo",
    "torch._inductor", "transformers", "triton", "typer", *ONNX,
)  # fmt: skip

EACH_PASS = pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in pass_files()])


def found(*folders: str) -> Iterator[Import]:
    return (each for folder in folders for path in sources(folder) for each in imports(path))


def forbid(imported: Iterable[Import], wrong: Callable[[Import], bool]) -> None:
    broken = [str(each) for each in imported if wrong(each)]
    assert not broken, "\n" + "\n".join(broken)


# --- who may import whom


ORDER = (
    ("errors", "progress"),
    ("ops",),
    ("files", "graph"),
    ("capture", "evaluate", "show"),
    ("analysis", "weights"),
    ("rewrite",),
    ("algebra", "recognise"),
    ("passes", "inventory", "lower"),
    ("functional", "verification"),
    ("nn", "pipeline"),
    ("inplace", "learn", "report"),
    ("optimized",),
    ("api", "named_model"),
    ("", "backend", "pytest_plugin"),
    ("benchmark",),
    ("cli", "__main__"),
    ("tools",),
)
"""Who may import whom: a room imports itself and rooms of earlier lines, lazily or for types no more than otherwise.
The empty name is `normfuse/__init__.py`."""
APART = ("models",)
"""Found by name alone."""
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}


def room_of(module: str) -> str:
    """`graph` for `normfuse.graph.node`, `tools` for what lies there."""
    top, *rest = module.split(".")
    return top if top == "tools" else rest[0] if rest else ""


@pytest.mark.parametrize("room", [room for room in RANK if room])
def test_a_room_imports_rooms_that_stand_before_it(room: str) -> None:
    def wrong(each: Import) -> bool:
        other = room_of(each.target)
        if not each.within("normfuse") or other in (room, *APART) or (room, other) == ("api", "passes"):
            return False
        return RANK[other] >= RANK[room] or (other == "" and each.target != "normfuse")

    forbid((each for name, path in modules().items() if room_of(name) == room for each in imports(path)), wrong)


def test_every_room_has_its_place() -> None:
    assert {room_of(name) for name in modules()} <= {*RANK, *APART}


def test_files_do_not_import_each_other_in_a_circle() -> None:
    paths = modules()
    arrows = {name: {e.target for e in imports(path) if e.target in paths} - {name} for name, path in paths.items()}
    for name, targets in arrows.items():
        targets -= {target for target in targets if is_own_package(name, target)}
    TopologicalSorter(arrows).prepare()  # raises CycleError with the circle


def is_own_package(name: str, target: str) -> bool:
    """A file names the package it stands in when it takes a neighbour from it."""
    return name.startswith(target + ".")


@EACH_PASS
def test_a_pass_knows_the_engine_and_no_other_pass(path: Path) -> None:
    forbid(imports(path), lambda each: not each.within(*PASSES_MAY, *PASSES_MAY_STDLIB))


def test_the_table_knows_the_passes_and_the_engine() -> None:
    table = imports(ROOT / "passes/__init__.py")
    forbid(table, lambda each: not each.within("normfuse.passes", *PASSES_MAY, *PASSES_MAY_STDLIB))


def test_analysis_does_not_know_rewriting() -> None:
    forbid(found("normfuse/analysis"), lambda each: each.within("normfuse.rewrite", "normfuse.passes", "normfuse.api"))


def test_rewriting_names_no_pass() -> None:
    stems = "|".join(re.escape(path.stem) for path in pass_files())
    for path in sources("normfuse/rewrite"):
        named = re.findall(rf"\b(?:{stems})\b", path.read_text(encoding="utf-8")) if stems else []
        assert not named, f"{path.name} knows {named}"


def test_only_api_reaches_the_passes_and_only_when_called() -> None:
    everyone = found("normfuse", "models", "tools")
    forbid(everyone, lambda each: each.within("normfuse.passes") and not (each.path == API and each.deep))


def test_the_specimens_are_reached_by_name_alone() -> None:
    finder = ROOT / "normfuse/named_model.py"
    forbid(found("normfuse"), lambda each: each.within("normfuse.models") and not (each.path == finder and each.deep))


def test_triton_is_imported_where_kernels_are_made() -> None:
    def away(each: Import) -> bool:
        return not (each.path.is_relative_to(ROOT / "normfuse/lower/triton") and each.deep)

    forbid(found("normfuse", "passes", "models", "tools"), lambda each: each.within("triton") and away(each))


def test_onnx_is_imported_where_onnx_is_written() -> None:
    def away(each: Import) -> bool:
        homes = (ROOT / "normfuse/lower/onnx", ROOT / "normfuse/benchmark")
        return not (any(each.path.is_relative_to(home) for home in homes) and each.deep)

    forbid(found("normfuse", "passes", "models"), lambda each: each.within(*ONNX) and away(each))


def test_rich_is_imported_where_people_read() -> None:
    homes = [ROOT / "normfuse" / room for room in ("show", "cli", "benchmark")]
    lazily = homes[:1]

    def away(each: Import) -> bool:
        home = next((h for h in homes if each.path.is_relative_to(h)), None)
        return home is None or (home in lazily and not each.deep)

    forbid(found("normfuse", "passes", "models"), lambda each: each.within("rich") and away(each))


def test_specimens_know_torch_alone() -> None:
    def standard(each: Import) -> bool:
        return each.target.split(".")[0] in sys.stdlib_module_names

    forbid(found("models"), lambda each: not each.within("torch", "normfuse.models") and not standard(each))


def test_what_is_installed_imports_nothing_that_is_not() -> None:
    forbid(found("normfuse", "passes", "models"), lambda each: each.within("tools", "tests", "passes", "models"))


def test_tools_use_public_names() -> None:
    import normfuse

    public = {*PUBLIC, *(f"normfuse.{name}" for name in normfuse.__all__)}
    for path in sources("tools"):
        used = set(public_uses(path))
        assert used <= public, f"{path.name} uses {', '.join(sorted(used - public))}"


def public_uses(path: Path) -> Iterator[str]:
    """What a file takes of normfuse: `import normfuse.x`, `from normfuse import x`, `normfuse.x`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names if alias.name.startswith("normfuse."))
            case ast.ImportFrom(module="normfuse", names=names):
                yield from (f"normfuse.{alias.name}" for alias in names)
            case ast.ImportFrom(module=str(module)) if module.startswith("normfuse."):
                yield module
            case ast.Attribute(value=ast.Name(id="normfuse"), attr=name):
                yield f"normfuse.{name}"


def test_import_normfuse_loads_torch_and_nothing_heavier() -> None:
    heavy = loaded("import normfuse") & set(HEAVY)
    assert not heavy, f"import normfuse also loads {', '.join(sorted(heavy))}"


def test_the_public_names_load_no_backend_and_no_pass() -> None:
    allowed = {"networkx", "rich"}
    heavy = loaded("import normfuse; [getattr(normfuse, name) for name in normfuse.__all__]") & set(HEAVY) - allowed
    assert not heavy, f"the public names also load {', '.join(sorted(heavy))}"


def loaded(code: str) -> set[str]:
    """What a new Python has loaded after this, that `import torch` alone has not; a package for each of its modules."""
    code = f"import sys, torch; before = set(sys.modules); {code}; print(*set(sys.modules) - before)"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    new = [name.split(".") for name in said.split()]
    return {".".join(parts[:end]) for parts in new for end in range(1, len(parts) + 1)} & {*HEAVY, "normfuse"}


# --- one stem everywhere


def test_the_packages_listed_by_hand_are_those_on_disk() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert tuple(sorted(tool["packages"])) == packages()
    for name in packages():
        home = tool["package-dir"].get(name)
        top = tool["package-dir"]["normfuse"] + name.removeprefix("normfuse").replace(".", "/")
        assert modules()[name].parent == ROOT / (home or top)


def test_the_table_has_each_pass_once() -> None:
    table = pass_table()
    assert isinstance(table, tuple)
    names = [rule.name for rule in table]
    assert len(names) == len(set(names))
    assert set(names) == {path.stem for path in pass_files()}


def test_the_table_is_grouped_by_phase() -> None:
    phases = [rule.phase for rule in pass_table()]
    assert phases == sorted(phases)


@EACH_PASS
def test_a_pass_has_its_test(path: Path) -> None:
    assert (ROOT / "tests/passes" / f"test_{path.stem}.py").is_file()


def test_no_test_without_its_pass() -> None:
    stems = {path.stem for path in pass_files()}
    tested = {path.stem.removeprefix("test_") for path in sources("tests/passes") if path.stem.startswith("test_")}
    tables = {stem for stem in tested if stem.startswith("methods_")}
    assert tested <= stems | tables | {"spellings_of_views", "traps"}, f"tests of no pass: {sorted(tested - stems)}"


@EACH_PASS
def test_a_pass_says_what_it_does_under_the_fixed_headings(path: Path) -> None:
    doc = PassDoc.of(path)
    assert doc.stem == path.stem
    assert "->" in doc.formula, "the first line says before  ->  after"
    assert tuple(doc.sections) == HEADINGS
    assert all(doc.sections.values()), "a heading without a text"


@EACH_PASS
def test_a_pass_says_the_exactness_it_has(path: Path) -> None:
    [rule] = [rule for rule in pass_table() if rule.name == path.stem]
    assert PassDoc.of(path).sections["Exactness"].lower().startswith(rule.exactness.name.lower())


# --- one vocabulary


def of_one_class(source: str) -> Iterator[str]:
    """Collections of three or more operators of one class (a view, a norm, a projection): they belong in the traits."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Tuple(elts=items) | ast.List(elts=items) | ast.Set(elts=items) | ast.Call(args=items):
                named = items
            case ast.Dict(keys=items):
                named = [key for key in items if key is not None]
            case _:
                continue
        for members in CLASSES:
            found = [text for item in named if (text := ast.unparse(item)) in members]
            if len(found) >= 3:
                yield f"line {named[0].lineno}: {', '.join(found)}"


def classes() -> tuple[set[str], ...]:
    """What each class of operators may be called in a source, those that canonical graphs spell otherwise included."""
    from normfuse.graph.spelling import SPELLINGS
    from normfuse.ops.traits import TRAITS, Trait

    views = {packet for packet, row in TRAITS.items() if row.traits & Trait.VIEW}
    views |= {target.overloadpacket for target in SPELLINGS}
    norms = {packet for packet, row in TRAITS.items() if row.traits & Trait.NORM}
    projections = {packet for packet, row in TRAITS.items() if row.traits & Trait.PROJECTION}
    ours = {"RMS_NORM", "CRMS_NORM", "STANDARDIZE"}
    return tuple({*map(spelt, packets), *extra} for packets, extra in ((views, ()), (norms, ours), (projections, ())))


def spelt(packet: object) -> str:
    """`aten.view`, `torch.ops.normfuse.rms_norm`"""
    return text if (text := str(packet)).startswith("aten.") else f"torch.ops.{text}"


CLASSES = classes()


def test_no_file_keeps_a_list_of_views_norms_or_projections() -> None:
    homes = {ROOT / "normfuse/ops/traits.py", ROOT / "normfuse/graph/spelling.py"}
    paths = [path for folder in ("normfuse", "passes") for path in sources(folder) if path not in homes]
    lists = [f"{path.relative_to(ROOT)} {each}" for path in paths for each in of_one_class(path.read_text(encoding="utf-8"))]
    assert not lists, "ask ops/traits.py instead:\n" + "\n".join(lists)


@pytest.mark.parametrize(
    "source",
    [
        "VIEWS = (aten.view, aten.permute, aten.slice)",
        "NORMS = {aten.layer_norm, RMS_NORM, aten.batch_norm}",
        "is_op(node, aten.conv1d, aten.conv2d, aten.conv3d)",
        "RULES = {aten.movedim: a, aten.swapaxes: b, aten.mT: c}",
    ],
)
def test_such_a_list_is_found(source: str) -> None:
    assert list(of_one_class(source))


# --- sizes


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_engine_files_are_short() -> None:
    long = {str(path.relative_to(ROOT)): lines(path) for path in sources("normfuse") if lines(path) >= ENGINE_LINES}
    assert not long


def test_passes_are_shorter() -> None:
    long = {path.name: lines(path) for path in pass_files() if lines(path) > PASS_LINES}
    assert not long


# --- nothing that does not belong

UNWANTED = {
    "a path of one machine": r"(?<![\w.:*])/(?:work|root|tmp|home|opt|mnt|Users)/",
    "a package registry's host": r"\b(?:pypi|pythonhosted|npmjs|anaconda|debian)\.(?:org|com)\b|download\.pytorch\.org",
    "an unfinished mark": r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b",
    "a merge conflict": r"^(?:<{7} |>{7} )",
}


@pytest.mark.parametrize("what", UNWANTED)
def test_no_file_holds(what: str) -> None:
    pattern = re.compile(UNWANTED[what], re.MULTILINE)
    broken = [
        f"{path.relative_to(ROOT)}: {hit.group()}"
        for path in files()
        if (text := readable(path)) is not None and (hit := pattern.search(text))
    ]
    assert not broken, f"{what} in\n" + "\n".join(broken)


def readable(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def test_no_file_is_named_for_no_purpose() -> None:
    vague = {"utils", "util", "helpers", "helper", "misc", "common"}
    assert not [str(path.relative_to(ROOT)) for path in files() if path.stem in vague]


def test_no_large_file_is_tracked() -> None:
    large = [str(path.relative_to(ROOT)) for path in files() if path.stat().st_size > 1_000_000]
    assert not large
