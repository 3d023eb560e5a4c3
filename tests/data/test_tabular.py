from pathlib import Path

import pytest

from fqsweep.data.tabular import label_text, nearest, plain_text, read_table
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
        ("0_4", "0_4"),
        ("1e5", "1e5"),
        ("infinity", "infinity"),
        (".50", "0.5"),
        ("-0.0", "0"),
        (0.00001, "1e-05"),
        ("0.00001", "1e-05"),
    ],
)
def test_one_value_has_one_spelling(given: str | int | float, expected: str) -> None:
    assert plain_text(given) == expected


def test_numbers_too_long_for_a_float_stay_apart() -> None:
    names = ["9007199254740992", "9007199254740993", "9007199254740993.5", "0.12345678901234567891", "1" * 5000]
    assert [plain_text(name) for name in names] == names


@pytest.mark.parametrize(
    ("given", "expected"),
    [("none", "none"), ("Unknown", "Unknown"), ("NA", "NA"), ("null", "null"), ("2.0", "2")]
    + [(text, "") for text in ("", " ", "nan", "N/A")],
)
def test_a_class_may_be_called_none(given: str, expected: str) -> None:
    assert label_text(given) == expected


def test_the_nearest_name_ignores_case_and_unlike_names_have_none() -> None:
    assert nearest("AGE_aprox", ["sex", "age_approx"]) == " (nearest: 'age_approx')"
    assert nearest("zzz", ["sex"]) == ""


def test_a_byte_order_mark_and_spaces_do_not_hide_a_column(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("\ufefffile, label\n a , b \n".encode())
    table = read_table(tmp_path / "t.csv", columns=["file", "label"])
    assert table.loc[0].tolist() == ["a", "b"]


@pytest.mark.parametrize("rows", ["1,2,3\n4,5,6", "1,2,\n4,5,", "1,2,3,4\n5,6", "1,2,3\n4,5"])
def test_rows_longer_than_the_header_are_refused(tmp_path: Path, rows: str) -> None:
    (tmp_path / "t.csv").write_text(f"file,label\n{rows}\n")
    with pytest.raises(
        InputError, match=r"t\.csv: its rows have more cells than its header .*\(2\); name every"
    ):
        read_table(tmp_path / "t.csv", columns=["file", "label"])


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nor is its folder .*none"):
        read_table(tmp_path / "none" / "t.csv", columns=[])
