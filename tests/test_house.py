# SPDX-License-Identifier: Apache-2.0
"""The house: arrows go down, no circle, few floors, few lines, one name one thing.

An import counts wherever it stands in the source, and so does a module named in a string.
"""

import ast
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From below: a file imports from its own row or from one below it.
ROWS = (
    ("fastlora_kernels",),
    ("fastlora.files",),  # whole files, for whoever writes any
    ("fastlora.operator",),
    ("fastlora.functional", "fastlora.flops"),
    ("fastlora.layers",),
    ("fastlora.peft",),
    ("fastlora.explain",),  # asks layers of every kind what runs
    ("fastlora",),  # __init__.py: what people import
    ("fastlora.commands", "fastlora.__main__"),
)
# Lines are what they are: they may shrink.
FLOORS, LINES, TEST_LINES = 9, 10_473, 21_406

MODULES = {
    ".".join(path.relative_to(above).with_suffix("").parts).removesuffix(".__init__"): path
    for above in (ROOT, ROOT / "kernels")
    for path in above.glob("fastlora*/**/*.py")
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
PACKAGES = [name for name, path in MODULES.items() if path.stem == "__init__"]


def imported(name: str, nodes) -> set[str]:
    """Return the modules of the house that ``nodes`` of the module ``name`` name."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} imports from {'.' * node.level}: write the whole name"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names  # those that are modules
            # Others are of the module itself; anyone may ask the package for its version.
            if not names <= MODULES.keys() | {"fastlora.__version__"}:
                found.add(node.module)
        elif isinstance(node, ast.Constant) and "." in str(node.value):
            found.add(node.value)
    return found & MODULES.keys() - {name}


ALL = {name: imported(name, ast.walk(tree)) for name, tree in TREES.items()}
AT_ONCE = {name: imported(name, tree.body) for name, tree in TREES.items()}


def row(name: str) -> int:
    """Return the row of a module: of its file, or else of its folder."""
    of = {n: i for i, names in enumerate(ROWS) for n in names}
    folder = name if name in of else name.rpartition(".")[0]
    assert folder in of and (folder != "fastlora" or name == folder), f"{name} is in no row"
    return of[folder]


def test_arrows_go_down():
    assert not [f"{a} -> {b}" for a in ALL for b in ALL[a] if row(b) > row(a)]


def test_no_circle():
    TopologicalSorter(ALL).prepare()  # an error names the circle


def test_floors():
    """Of files with code of their own: an ``__init__.py`` only hands on what it imports."""
    tallest: dict[str, list[str]] = {}
    for name in TopologicalSorter(AT_ONCE).static_order():
        own = [name] * (name not in PACKAGES)
        tallest[name] = own + max((tallest[n] for n in AT_ONCE[name]), key=len, default=[])
    most = max(tallest.values(), key=len)
    assert len(most) <= FLOORS, f"{len(most)} floors: {' -> '.join(most)}"


@pytest.mark.parametrize(
    ("most", "folders"), [(LINES, ("fastlora", "kernels")), (TEST_LINES, ("tests",))]
)
def test_size(most, folders):
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    total = sum(len(path.read_text("utf-8").splitlines()) for path in paths)
    assert total <= most, f"{total - most} lines too many of {total}"


def test_a_public_name_is_exported_from_one_place():
    """By one ``__init__.py``, which takes it from the file that defines it."""
    exports, detours = Counter(), []
    for package in PACKAGES:
        for node in TREES[package].body:
            if isinstance(node, ast.ImportFrom) and node.module in MODULES:
                names = {a.name for a in node.names if f"{node.module}.{a.name}" not in MODULES}
                exports.update(f"{package.partition('.')[0]}: {name}" for name in names)
                body = [t for n in TREES[node.module].body for t in getattr(n, "targets", [n])]
                defined = {getattr(n, "name", getattr(n, "id", "")) for n in body}
                detours += [f"{package} takes {name}" for name in names - defined]
    assert not detours and not [name for name in exports if exports[name] > 1]


def test_a_class_has_a_name_of_its_own():
    count = Counter(n.name for t in TREES.values() for n in t.body if isinstance(n, ast.ClassDef))
    assert not [name for name in count if count[name] > 1]
