"""The mutants of ``tests.mutants`` still fit the code that they are made from; whether they are caught it says itself."""

from __future__ import annotations

import pytest

from tests.mutants import MUTANTS, PROJECT, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.old}")
def test_a_mutant_is_made_from_code_that_is_there_once(mutant: Mutant) -> None:
    assert (PROJECT / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1
    assert mutant.new != mutant.old
    assert all((PROJECT / path).is_file() for path in mutant.tests)
