import doctest
from types import ModuleType

import pytest

from fqsweep.data import tabular


@pytest.mark.parametrize("module", [tabular])
def test_the_examples_in_docstrings_run(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
