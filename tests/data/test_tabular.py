from pathlib import Path

import pytest

from fqsweep.data.tabular import nearest, plain_text, read_table
from fqsweep.errors import InputError


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (3, "3"),
        (3.0, "3"),
        ("3.0", "3"),
        (" a b ", "a b"),
        ("NaN", ""),
        ("Unknown", ""),
        ("", ""),
        (0.5, "0.5"),
        ("-1", "-1"),
        ("1e999", "1e999"),
        ("007", "7"),
        (True, "True"),
    ],
)
def test_one_value_has_one_spelling(given: str | int | float, expected: str) -> None:
    assert plain_text(given) == expected


def test_the_nearest_name_ignores_case_and_unlike_names_have_none() -> None:
    assert nearest("AGE_aprox", ["sex", "age_approx"]) == " (nearest: 'age_approx')"
    assert nearest("zzz", ["sex"]) == ""


def test_a_byte_order_mark_and_spaces_do_not_hide_a_column(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("\ufefffile, label\n a , b \n".encode())
    table = read_table(tmp_path / "t.csv", columns=["file", "label"])
    assert table.loc[0].tolist() == ["a", "b"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nor is its folder .*none"):
        read_table(tmp_path / "none" / "t.csv", columns=[])
