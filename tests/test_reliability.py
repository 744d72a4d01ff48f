# SPDX-License-Identifier: Apache-2.0
"""docs/reliability.md names tests that exist, every broken copy of the code is of today's, and
a test has one name in every process: the suite's two collect the same tests only then."""

import re

import pytest
from broken_copies import ROOT, mutants

TEXT = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
ROWS = [
    line.split("|")[1:-1]
    for line in TEXT.splitlines()
    if (line.startswith("| ") and "`test_" in line) or line.endswith("| CPU |")
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip())
def test_a_failure_has_tests_that_exist(row):
    """In a cell ``::test`` is of the file before."""
    _, _, noticed_by, where = (cell.strip() for cell in row)
    names, file = re.findall(r"`(test_\w+)?(?:::(test_\w+))?`", noticed_by), ""
    assert names or "`make " in noticed_by
    for of, test in names:
        file = of or file
        texts = [path.read_text("utf-8") for path in (ROOT / "tests").rglob(f"{file}.py") if file]
        assert len(texts) == bool(file), f"there are {len(texts)} {file}.py in tests"
        assert not test or f"def {test}(" in texts[0], f"{file}::{test}"
    assert re.fullmatch(r"(CPU|GPU)(, (in part )?(CPU|GPU))?", where)


def test_the_table_is_read():
    assert len(ROWS) > 25


def test_no_name_holds_an_address_or_a_set(request):
    """Both are written differently from one process to the next."""
    varying = re.compile(r"0x[0-9a-f]{4}|\{'[^':]*', '")
    assert not [item.name for item in request.session.items if varying.search(item.name)]


@pytest.mark.parametrize("mutant", mutants(), ids=lambda mutant: mutant.what)
def test_a_mutant_changes_the_code_of_today(mutant):
    """That the tests notice it is for `make mutants`, which runs them on it."""
    assert (ROOT / mutant.file).read_text("utf-8").count(mutant.right) == 1
    assert mutant.wrong != mutant.right
    for test in mutant.tests.split():
        file, _, name = test.partition("::")
        assert f"def {name}" in (ROOT / "tests" / file).read_text(encoding="utf-8")
