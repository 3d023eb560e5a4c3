import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from fqsweep.data.folder import ImageFolder, MissingImages, decode_square, first_folder
from fqsweep.errors import InputError
from tests.data.conftest import write_photo


def test_the_centre_is_kept_and_the_sides_are_cut(tmp_path: Path) -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = (10, 200, 30)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (decode_square(tmp_path / "wide.png", size=20) == (10, 200, 30)).all()


def test_scaling_down_averages_over_the_area(tmp_path: Path) -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 200
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    assert np.abs(decode_square(tmp_path / "stripes.png", size=8).astype(int) - 100).max() <= 13


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned 90 degrees clockwise for display
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    decoded = decode_square(tmp_path / "turned.jpg", size=32)
    assert decoded[:, -6:].mean() > 240
    assert decoded[:, :22].mean() < 15


@pytest.mark.parametrize("suffix", [".tif", ".png", ".webp", ".jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_format_is_turned_upright_once(tmp_path: Path, suffix: str, orientation: int) -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:32, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / f"turned{suffix}", exif=exif)
    wanted = ImageOps.exif_transpose(Image.open(tmp_path / f"turned{suffix}"))
    found = decode_square(tmp_path / f"turned{suffix}", size=64)
    assert np.abs(found.astype(int) - np.asarray(wanted.convert("RGB"))).max() <= 2


def test_a_damaged_png_is_refused(tmp_path: Path) -> None:
    """Pillow alone decodes it to other pixels without a word."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.png cannot be decoded"):
        decode_square(tmp_path / "a.png", size=32)


@pytest.mark.parametrize("tag", [0x0100, 0x011A, 0x0128, 0x0213])
def test_tags_of_a_wrong_type_beside_the_orientation_do_no_harm(tmp_path: Path, tag: int) -> None:
    text_tag = struct.pack("<HHI4s", tag, 2, 2, b"x")  # numbers belong there
    turned = struct.pack("<HHIHH", 0x0112, 3, 1, 8, 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + b"".join(sorted([text_tag, turned])) + bytes(4)
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:8] = 255
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    assert decode_square(tmp_path / "turned.jpg", size=32)[:, :6].mean() > 240


@pytest.mark.parametrize(
    ("mode", "value", "suffix", "expected"),
    [
        ("L", 90, "png", (90, 90, 90)),
        ("I;16", 0x5A5A, "png", (90, 90, 90)),
        ("I;16", 4095, "png", (255, 255, 255)),
        ("I;16", 2048, "png", (128, 128, 128)),
        ("CMYK", (255, 0, 0, 0), "jpg", (0, 255, 255)),
        ("RGBA", (0, 0, 0, 0), "png", (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), "png", (10, 20, 30)),
        ("LA", (40, 255), "png", (40, 40, 40)),
        ("1", 1, "png", (255, 255, 255)),
        ("F", 0.5, "tif", (128, 128, 128)),
        ("F", 90.0, "tif", (90, 90, 90)),
        ("I", 1, "tif", (1, 1, 1)),
    ],
)
def test_every_mode_becomes_the_same_rgb(
    tmp_path: Path, mode: str, value: object, suffix: str, expected: tuple[int, int, int]
) -> None:
    path = tmp_path / f"image.{suffix}"
    if mode == "I;16":
        Image.fromarray(np.full((16, 16), value, np.uint16)).save(path)
    else:
        Image.new(mode, (16, 16), value).save(path)  # type: ignore[arg-type]
    decoded = decode_square(path, size=16)
    assert decoded.shape == (16, 16, 3)
    assert decoded.dtype == np.uint8
    assert np.abs(decoded.astype(int) - expected).max() <= 2


@pytest.mark.parametrize("kept_bytes", [0, 10, 300])
def test_a_truncated_or_empty_jpeg_is_refused_by_name(tmp_path: Path, kept_bytes: int) -> None:
    path = tmp_path / "short.jpg"
    write_photo(path, side=64)
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(InputError, match=r"short\.jpg cannot be decoded .*; fetch it again"):
        decode_square(path, size=32)


def test_a_text_file_with_an_image_suffix_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.png").write_text("<html>not found</html>")
    with pytest.raises(InputError, match=r"page\.png cannot be decoded"):
        decode_square(tmp_path / "page.png", size=32)


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.jpg is not there any more"):
        decode_square(tmp_path / "gone.jpg", size=32)


def test_a_missing_suffix_is_looked_up_and_subfolders_are_seen(tmp_path: Path) -> None:
    write_photo(tmp_path / "a" / "one.JPG")
    folder = ImageFolder(tmp_path)
    assert folder.find("a/one") == "a/one.JPG"
    assert folder.find("./a/one.JPG") == "a/one.JPG"
    assert folder.find("two") is None


def test_a_name_without_its_folders_or_with_another_suffix_is_found_where_one_file_alone_ends_like_it(
    tmp_path: Path,
) -> None:
    for name in ("part_1/one.jpg", "part_1/both.jpg", "part_2/both.jpg", "part_2/deep/two.PNG"):
        write_photo(tmp_path / name)
    folder = ImageFolder(tmp_path)
    assert folder.find("one") == folder.find("one.png") == folder.find("part_1\\one.jpg") == "part_1/one.jpg"
    assert folder.find(str(tmp_path / "part_2" / "both.jpg")) == "part_2/both.jpg"
    assert folder.find("deep/two.jpg") == "part_2/deep/two.PNG"
    assert folder.find("part_2/one.jpg") is None, "a folder that is named is meant"
    assert folder.find("both") is None
    with pytest.raises(
        InputError, match=r"called so are part_1/both\.jpg, part_2/both\.jpg: name one in the table"
    ):
        folder.open(["one", "both"])


def test_a_link_that_leads_nowhere_is_a_missing_image(tmp_path: Path) -> None:
    write_photo(tmp_path / "there.jpg")
    (tmp_path / "dead.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    assert ImageFolder(tmp_path).path_of.keys() == {"there.jpg"}
    with pytest.raises(InputError, match=r"1 of 2 images .*first: .*dead"):
        ImageFolder(tmp_path).open(["there", "dead"])


def test_missing_images_are_counted_and_the_first_three_named(tmp_path: Path) -> None:
    write_photo(tmp_path / "there.jpg")
    with pytest.raises(InputError, match=r"4 of 5 images .*first: .*m0, .*m1, .*m2; complete the folder"):
        ImageFolder(tmp_path).open(["there", "m0", "m1", "m2", "m3"])


@pytest.mark.parametrize("suffix", [".bmp", ".TIF", ".png"])
def test_the_content_changes_with_the_pixels_though_the_size_stays(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a{suffix}"
    plain = {"compress_level": 0} if suffix == ".png" else {}
    Image.new("RGB", (24, 24), "white").save(file, **plain)
    num_bytes, (_, before) = file.stat().st_size, ImageFolder(tmp_path).open(["a"])
    assert ImageFolder(tmp_path).open(["a"])[1] == before
    Image.new("RGB", (24, 24), "black").save(file, **plain)
    assert file.stat().st_size == num_bytes
    assert ImageFolder(tmp_path).open(["a"])[1] != before


def test_numbers_that_lost_their_zeros_are_told(tmp_path: Path) -> None:
    write_photo(tmp_path / "007.jpg", seed=0)
    with pytest.raises(
        MissingImages, match=r"first: .*/7; 007\.jpg is: the column lost the zeros before its numbers"
    ):
        ImageFolder(tmp_path).open(["7"])


def test_one_file_under_two_names_is_refused(tmp_path: Path) -> None:
    write_photo(tmp_path / "000.jpg", seed=0)
    with pytest.raises(InputError, match=r"images '000' and '\./000\.jpg' of the table are one file, 000\.jpg"):
        ImageFolder(tmp_path).open(["000", "./000.jpg"])


def test_a_folder_nested_in_its_twin_is_found(tmp_path: Path) -> None:
    write_photo(tmp_path / "X" / "X" / "a.jpg")
    assert first_folder(tmp_path, ["X"]) == tmp_path / "X" / "X"
    with pytest.raises(InputError, match="no folder with images; looked for: Y, the folder itself"):
        first_folder(tmp_path, ["Y", "."])
