"""Fetching whole data sets from a real server on this machine."""

import hashlib
import io
import shutil
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from fqsweep.config import Fitzpatrick17kConfig, Isic2019Config, SynthdermConfig
from fqsweep.data.download import DownloadError, Patience
from fqsweep.data.fetch import FetchOptions, fetch_dataset
from fqsweep.data.photos import Manners
from fqsweep.errors import InputError
from fqsweep.main import main
from tests.data.conftest import write_photo
from tests.data.faulty_server import UNSAID, Site, serving

ISIC = Isic2019Config(kind="isic2019")
FITZPATRICK = Fitzpatrick17kConfig(kind="fitzpatrick17k")
HASTY = Patience(connect_s=1, read_s=0.3, attempts=2, pause_s=0.01, longest_pause_s=0.02)
QUICK = Manners(threads=4, per_host=2, pause_s=0.0, strikes=2)
NUM_PHOTOS = 12


def quiet(_title: str, _unit: str) -> object:
    return lambda _done, _total: None


def options(**changes: object) -> FetchOptions:
    return FetchOptions(**{"patience": HASTY, "manners": QUICK, "meter": quiet} | changes)  # type: ignore[arg-type]


@pytest.fixture
def site() -> Iterator[Site]:
    with serving(Site()) as running:
        yield running


@pytest.fixture
def isic_site(site: Site, isic_root: Path) -> Site:
    """A server that holds the four-image set of ``isic_root`` as it is published."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for path in sorted((isic_root / "ISIC_2019_Training_Input").iterdir()):
            archive.write(path, f"ISIC_2019_Training_Input/{path.name}")
    site.files["2019/ISIC_2019_Training_Input.zip"] = stream.getvalue()
    for path in isic_root.glob("*.csv"):
        site.files[f"2019/{path.name}"] = path.read_bytes()
    return site


@pytest.fixture
def photo_table(tmp_path: Path, site: Site) -> Path:
    """A table of twelve images at the server, the last without an address; returns the data folder."""
    rows = []
    for number in range(NUM_PHOTOS):
        write_photo(tmp_path / "made.jpg", seed=number)
        content = (tmp_path / "made.jpg").read_bytes()
        site.files[f"pic/{number}.jpg"] = content
        rows.append(
            {
                "md5hash": hashlib.md5(content).hexdigest(),
                "fitzpatrick_scale": number % 6 + 1,
                "label": "acne",
                "url": f"{site.url}/pic/{number}.jpg" if number < NUM_PHOTOS - 1 else "",
            }
        )
    folder = tmp_path / "data" / "fitzpatrick17k"
    folder.mkdir(parents=True)
    pd.DataFrame(rows).to_csv(folder / "fitzpatrick17k.csv", index=False)
    return tmp_path / "data"


def outcomes(data_dir: Path) -> dict[str, int]:
    report = pd.read_csv(data_dir / "fitzpatrick17k" / "fetch_report.csv")
    return report["outcome"].value_counts().to_dict()


def test_isic_is_fetched_unpacked_and_not_fetched_again(isic_site: Site, tmp_path: Path) -> None:
    isic_site.faults["2019/ISIC_2019_Training_Input.zip"] = ["cut", 500]
    mirror = options(mirror=f"{isic_site.url}/2019/", patience=replace(HASTY, attempts=4))
    text, complete = fetch_dataset(ISIC, tmp_path / "new", mirror)
    assert complete and text.endswith("4 rows, 4 of their images in ISIC_2019_Training_Input")
    root = tmp_path / "new" / "isic2019"
    assert len(list((root / "ISIC_2019_Training_Input").glob("*.jpg"))) == 4
    assert not list(root.glob("*.zip*"))
    asked = len(isic_site.asked)
    fetch_dataset(ISIC, tmp_path / "new", mirror)
    assert len(isic_site.asked) == asked


def test_other_pictures_do_not_pass_for_those_of_the_table_and_what_is_missing_can_be_fetched(
    isic_site: Site, tmp_path: Path
) -> None:
    mirror = options(mirror=f"{isic_site.url}/2019")
    root = tmp_path / "new" / "isic2019"
    write_photo(root / "overview.png")
    write_photo(root / "ISIC_2019_Training_Input" / "ATTRIBUTION.png")
    with pytest.raises(InputError, match=r"ISIC_2019_Training_Input is there, and none .* move it away first"):
        fetch_dataset(ISIC, tmp_path / "new", mirror)
    assert not list(root.glob("*.zip*")), "nothing was fetched that could not be unpacked"
    shutil.rmtree(root / "ISIC_2019_Training_Input")
    assert fetch_dataset(ISIC, tmp_path / "new", mirror)[1]
    next((root / "ISIC_2019_Training_Input").glob("*.jpg")).unlink()
    text, complete = fetch_dataset(ISIC, tmp_path / "new", mirror)
    assert not complete and "4 rows, 3 of their images" in text and "ISIC_2019_Training_Input away and" in text
    shutil.move(root / "ISIC_2019_Training_Input", tmp_path / "away")
    assert fetch_dataset(ISIC, tmp_path / "new", mirror)[1]


def test_a_damaged_archive_is_named_and_can_be_replaced(isic_site: Site, tmp_path: Path) -> None:
    name = "2019/ISIC_2019_Training_Input.zip"
    good = isic_site.files[name]
    isic_site.files[name] = good[:100] + bytes([good[100] ^ 1]) + good[101:]
    mirror = options(mirror=f"{isic_site.url}/2019")
    with pytest.raises(DownloadError, match="is damaged .*; delete it and fetch it again"):
        fetch_dataset(ISIC, tmp_path / "new", mirror)
    (tmp_path / "new" / "isic2019" / "ISIC_2019_Training_Input.zip").unlink()
    isic_site.files[name] = good
    assert fetch_dataset(ISIC, tmp_path / "new", mirror)[1]


def test_the_command_fetches_from_a_mirror_and_its_exit_code_tells_success(
    isic_site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["data", "fetch", "isic2019", "--data-dir", str(tmp_path / "new"), "--mirror"]
    assert main([*command, f"{isic_site.url}/2019"]) == 0
    assert "4 rows, 4 of their images" in capsys.readouterr().out
    assert (
        main(["data", "fetch", "isic2019", "--data-dir", str(tmp_path / "none"), "--mirror", isic_site.url])
        == 1
    )
    assert "the server answers 404" in capsys.readouterr().err
    assert main(["data", "fetch", "synthderm", "--data-dir", str(tmp_path)]) == 2
    assert "is not published anywhere" in capsys.readouterr().err
    assert main(["data", "fetch", "isic2019"]) == 2
    assert "pass --data-dir" in capsys.readouterr().err


def test_a_web_page_in_place_of_a_table_is_refused(isic_site: Site, tmp_path: Path) -> None:
    isic_site.files["2019/ISIC_2019_Training_GroundTruth.csv"] = b"<!DOCTYPE html><html>log in</html>"
    with pytest.raises(InputError, match="a web page came in place of the table; look at the proxy"):
        fetch_dataset(ISIC, tmp_path / "new", options(mirror=f"{isic_site.url}/2019"))
    assert not list((tmp_path / "new").rglob("*.csv*"))


def test_photographs_are_fetched_one_by_one_and_what_is_gone_is_reported(site: Site, photo_table: Path) -> None:
    site.faults |= {"pic/1.jpg": [404], "pic/2.jpg": [500], "pic/3.jpg": ["cut"], "pic/4.jpg": [503, 503]}
    site.files["pic/5.jpg"] = b"<html>this picture has moved</html>"
    text, complete = fetch_dataset(FITZPATRICK, photo_table, options())
    assert not complete and "8 images fetched, 4 missing" in text
    assert outcomes(photo_table) == {"gone": 1, "changed": 1, "failed": 1, "no address": 1}
    images = list((photo_table / "fitzpatrick17k" / "images").iterdir())
    assert {hashlib.md5(path.read_bytes()).hexdigest() for path in images} == {path.stem for path in images}


def test_a_second_call_tries_only_what_is_worthwhile(site: Site, photo_table: Path) -> None:
    site.faults |= {"pic/1.jpg": [404], "pic/4.jpg": [503, 503]}
    fetch_dataset(FITZPATRICK, photo_table, options())
    before = len(site.asked)
    text, _ = fetch_dataset(FITZPATRICK, photo_table, options())
    assert [path for path, _ in site.asked[before:]] == ["pic/4.jpg"]
    assert "1 images fetched, 2 missing" in text
    fetch_dataset(FITZPATRICK, photo_table, options(retry_gone=True))
    assert outcomes(photo_table) == {"no address": 1}


def test_changed_images_are_kept_where_that_is_asked_for_but_web_pages_are_not(
    site: Site, photo_table: Path
) -> None:
    site.files["pic/1.jpg"], site.files["pic/2.jpg"] = site.files["pic/0.jpg"], b"<html>moved</html>"
    fetch_dataset(FITZPATRICK, photo_table, options(accept_changed=True))
    assert outcomes(photo_table) == {"changed": 1, "no address": 1}


def test_changed_images_are_fetched_again_once_they_are_accepted(site: Site, photo_table: Path) -> None:
    site.files["pic/1.jpg"], site.faults["pic/2.jpg"] = site.files["pic/0.jpg"], [404]
    text, _ = fetch_dataset(FITZPATRICK, photo_table, options())
    assert outcomes(photo_table) == {"changed": 1, "gone": 1, "no address": 1}
    before = len(site.asked)
    text, _ = fetch_dataset(FITZPATRICK, photo_table, options(accept_changed=True))
    assert [path for path, _ in site.asked[before:]] == ["pic/1.jpg"]
    assert "1 images fetched, 2 missing" in text and "tries 0 of them again" in text


def test_a_mirror_is_asked_for_what_the_publisher_did_not_have(site: Site, photo_table: Path) -> None:
    site.faults["pic/1.jpg"] = [404]
    fetch_dataset(FITZPATRICK, photo_table, options())
    for number in (1, NUM_PHOTOS - 1):
        content = site.files[f"pic/{number}.jpg"]
        site.files[f"images/{hashlib.md5(content).hexdigest()}.jpg"] = content
    assert fetch_dataset(FITZPATRICK, photo_table, options(mirror=site.url))[1]


def edit_table(data_dir: Path, row: int, column: str, value: str) -> None:
    path = data_dir / "fitzpatrick17k" / "fitzpatrick17k.csv"
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    table.loc[row, column] = value
    table.to_csv(path, index=False)


@pytest.mark.parametrize("address", ["http://[foo/x.jpg", "example.org/x.jpg", f"http://{'a' * 70}.org/x.jpg"])
def test_a_cell_that_is_no_address_costs_its_image_alone(site: Site, photo_table: Path, address: str) -> None:
    edit_table(photo_table, 1, "url", address)
    text, _ = fetch_dataset(FITZPATRICK, photo_table, options())
    assert "10 images fetched, 2 missing" in text
    assert outcomes(photo_table) == {"gone": 1, "no address": 1}


@pytest.mark.parametrize("name", ["../../evil", "", "a" * 31])
def test_a_name_that_is_no_hash_is_refused(site: Site, photo_table: Path, name: str) -> None:
    edit_table(photo_table, 2, "md5hash", name)
    with pytest.raises(InputError, match=r"fitzpatrick17k\.csv, line 4: md5hash must have 32 hex.*'; delete"):
        fetch_dataset(FITZPATRICK, photo_table, options())
    assert site.asked == []


@pytest.mark.parametrize(
    "mirror", ["example.org/x", "ftp://example.org", "http://", "http://[foo", "http://a:x"]
)
def test_a_mirror_that_is_no_address_is_refused_first(tmp_path: Path, mirror: str) -> None:
    with pytest.raises(InputError, match="--mirror must be an address such as https"):
        fetch_dataset(ISIC, tmp_path / "new", options(mirror=mirror))
    assert not (tmp_path / "new").exists()


def test_a_server_is_asked_by_few_threads_and_left_alone_when_it_does_not_answer(
    site: Site, photo_table: Path
) -> None:
    path = photo_table / "fitzpatrick17k" / "fitzpatrick17k.csv"
    table = pd.read_csv(path, keep_default_na=False)
    away = table["url"].str.contains(r"/(?:[6-9]|10)\.jpg$", regex=True)
    table.loc[away, "url"] = [f"http://127.0.0.1:9/{number}.jpg" for number in range(away.sum())]
    table.to_csv(path, index=False)
    site.pause_s = 0.05
    fetch_dataset(FITZPATRICK, photo_table, options())
    assert site.most_at_once == QUICK.per_host
    assert outcomes(photo_table) == {"unreachable": 5, "no address": 1}
    report = pd.read_csv(photo_table / "fitzpatrick17k" / "fetch_report.csv")
    assert report["detail"].str.contains("did not answer before").sum() == 1


def test_a_mirror_holds_the_images_by_their_hash(site: Site, photo_table: Path, tmp_path: Path) -> None:
    table = (photo_table / "fitzpatrick17k" / "fitzpatrick17k.csv").read_bytes()
    site.files = {
        f"images/{hashlib.md5(content).hexdigest()}.jpg": content for content in site.files.values()
    } | {"fitzpatrick17k.csv": table}
    _, complete = fetch_dataset(FITZPATRICK, tmp_path / "new", options(mirror=site.url))
    assert complete
    assert not (tmp_path / "new" / "fitzpatrick17k" / "fetch_report.csv").exists()


def test_two_calls_at_once_fetch_every_image_once(site: Site, photo_table: Path) -> None:
    site.pause_s = 0.01
    calls = [
        threading.Thread(target=fetch_dataset, args=(FITZPATRICK, photo_table, options())) for _ in range(2)
    ]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    assert len(site.asked) == NUM_PHOTOS - 1


def test_a_generated_set_cannot_be_fetched(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'synthderm' .* is not published anywhere"):
        fetch_dataset(SynthdermConfig(kind="synthderm"), tmp_path, options())


@pytest.mark.parametrize("content", [b"Not Found (proxy)", b"", b"<html>sign in</html>"])
def test_what_is_no_table_does_not_stay_as_one(isic_site: Site, tmp_path: Path, content: bytes) -> None:
    path = "2019/ISIC_2019_Training_GroundTruth.csv"
    whole, isic_site.files[path] = isic_site.files[path], content
    mirror = options(mirror=f"{isic_site.url}/2019/")
    with pytest.raises(InputError, match=r"in place of the table|what came is not the table"):
        fetch_dataset(ISIC, tmp_path / "new", mirror)
    isic_site.files[path] = whole
    assert fetch_dataset(ISIC, tmp_path / "new", mirror)[1]


def test_a_table_that_ends_early_is_told_from_the_other(isic_site: Site, tmp_path: Path) -> None:
    path = "2019/ISIC_2019_Training_GroundTruth.csv"
    whole = isic_site.files[path]
    isic_site.files[path] = b"".join(whole.splitlines(keepends=True)[:3])
    mirror = options(mirror=f"{isic_site.url}/2019/")
    text, complete = fetch_dataset(ISIC, tmp_path / "new", mirror)
    assert not complete and "lists 2 images and ISIC_2019_Training_Metadata.csv 4" in text
    isic_site.files[path] = whole
    (tmp_path / "new" / "isic2019" / Path(path).name).unlink()
    assert fetch_dataset(ISIC, tmp_path / "new", mirror)[1]


def test_a_body_without_a_length_is_taken_where_the_connection_ends(isic_site: Site, tmp_path: Path) -> None:
    isic_site.announced["2019/ISIC_2019_Training_GroundTruth.csv"] = UNSAID
    assert fetch_dataset(ISIC, tmp_path / "new", options(mirror=f"{isic_site.url}/2019/"))[1]


def test_rows_that_stand_twice_are_fetched_once(site: Site, photo_table: Path) -> None:
    table = photo_table / "fitzpatrick17k" / "fitzpatrick17k.csv"
    rows = pd.read_csv(table)
    pd.concat([rows, rows]).to_csv(table, index=False)
    fetch_dataset(FITZPATRICK, photo_table, options())
    assert len(list((table.parent / "images").glob("*.jpg"))) == NUM_PHOTOS - 1
    assert len(site.asked) == NUM_PHOTOS - 1


def test_a_data_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        InputError, match=r"data folder .*file.* cannot be written: .*; give another --data-dir"
    ):
        fetch_dataset(ISIC, tmp_path / "file", options(mirror="http://127.0.0.1:1"))
