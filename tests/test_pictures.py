"""What decoding promises: images and masks are what an image viewer shows, in any mode and from any encoder."""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from scipy.ndimage import binary_dilation, binary_erosion

from data.builders.pictures import NoPictureError, UnreadableError, covered, fitted, read_image, read_mask

SIDE = 64


def square() -> np.ndarray:
    covers = np.zeros((SIDE, SIDE), bool)
    covers[20:44, 20:44] = True
    return covers


def of(dtype: type, on: float, off: float = 0) -> Callable[[np.ndarray], Image.Image]:
    return lambda covers: Image.fromarray(np.where(covers, on, off).astype(dtype))


def palette(covers: np.ndarray, colours: list[tuple[int, int, int]], numbers: tuple[int, int]) -> Image.Image:
    image = Image.fromarray(np.where(covers, *numbers).astype(np.uint8)).convert("P")
    image.putpalette([channel for colour in colours for channel in colour])
    return image


def with_opacity(covers: np.ndarray, colours: np.ndarray) -> Image.Image:
    return Image.fromarray(np.dstack([colours, np.where(covers, 255, 0)]).astype(np.uint8))


def photograph(covers: np.ndarray) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*covers.shape, 3))


def three_labels(covers: np.ndarray) -> Image.Image:
    rows = np.arange(covers.shape[0])[:, None] // 4 % 3 + 1
    return Image.fromarray(np.where(covers, rows, 0).astype(np.uint8))


SHOWN: dict[str, Callable[[np.ndarray], Image.Image]] = {  # masks that a viewer shows as a bright object, by mode
    "1": of(bool, True),
    "L": of(np.uint8, 255),
    "L, grey on black": of(np.uint8, 200),
    "L, white on grey": of(np.uint8, 255, 60),
    "I;16": of(np.uint16, 65535),
    "I;16 of 8 bits": of(np.uint16, 255),
    "I": of(np.int32, 255),
    "I of 16 bits": of(np.int32, 65535),
    "F": of(np.float32, 1),
    "F of 8 bits": of(np.float32, 255),
    "RGB": lambda covers: of(np.uint8, 255)(covers).convert("RGB"),
    "RGB, red on black": lambda covers: Image.fromarray((covers[..., None] * np.array([255, 0, 0])).astype(np.uint8)),
    "RGBA, opaque": lambda covers: of(np.uint8, 255)(covers).convert("RGBA"),
    "RGBA, half transparent": lambda covers: Image.merge(
        "RGBA", [*of(np.uint8, 255)(covers).convert("RGB").split(), Image.new("L", covers.shape[::-1], 128)]
    ),
    "CMYK": lambda covers: of(np.uint8, 255)(covers).convert("RGB").convert("CMYK"),
    "P, white first": lambda covers: palette(covers, [(255, 255, 255), (0, 0, 0)], (0, 1)),
    "P, greys": lambda covers: palette(covers, [(200, 200, 200), (20, 20, 20)], (0, 1)),
    "P, Pillow's": lambda covers: of(np.uint8, 255)(covers).quantize(2),
    "P, red first": lambda covers: palette(covers, [(200, 0, 0), (0, 0, 0)], (0, 1)),
    "RGBA, white": lambda covers: with_opacity(covers, np.full((*covers.shape, 3), 255)),
    "RGBA, black": lambda covers: with_opacity(covers, np.zeros((*covers.shape, 3))),
    "RGBA, photograph": lambda covers: with_opacity(covers, photograph(covers)),
    "LA": lambda covers: with_opacity(covers, np.full((*covers.shape, 1), 255)),
}
LABELLED: dict[str, Callable[[np.ndarray], Image.Image]] = {  # masks whose numbers are labels, which viewers show dark
    "L of 0 and 1": of(np.uint8, 1),
    "L of 0 to 3": three_labels,
    "I;16 of 300 objects": lambda covers: Image.fromarray(_objects(covers)),
    "RGB, dark": lambda covers: Image.fromarray((covers[..., None] * np.array([0, 0, 64])).astype(np.uint8)),
    "P, numbers": lambda covers: palette(covers, [(128, 64, 128), (70, 70, 70)], (1, 0)),
}


def _objects(covers: np.ndarray) -> np.ndarray:
    """Cells of 4 × 4 pixels, each with a number of its own."""
    rows, columns = np.indices(covers.shape) // 4
    return np.where(covers, rows * 97 + columns * 7 + 1, 0).astype(np.uint16)


LOSSLESS: dict[str, dict[str, Any]] = {
    "png": {}, "bmp": {}, "gif": {}, "ppm": {}, "tif": {}, "tiff": {"compression": "tiff_lzw"},
    "webp": {"lossless": True, "exact": True}, "jp2": {"irreversible": False},
}  # fmt: skip
LOSSY: dict[str, dict[str, Any]] = {
    "jpg": {"quality": 75}, "jpeg": {"quality": 95}, "webp": {"quality": 80}, "avif": {"quality": 75},
    "jp2": {"irreversible": True, "quality_mode": "rates", "quality_layers": [6]}, "tif": {"compression": "jpeg"},
}  # fmt: skip
if ".avif" not in Image.registered_extensions():  # Pillow has it since 11.3
    del LOSSY["avif"]


def saved(image: Image.Image, folder: Path, suffix: str, options: dict[str, Any]) -> Path | None:
    """The file, or None if this encoder does not take the mode, or makes another one of it."""
    path = folder / f"mask.{suffix}"
    try:
        image.save(path, **options)
    except (OSError, ValueError, KeyError):
        return None
    with Image.open(path) as back:
        opacity = back.has_transparency_data >= image.has_transparency_data
        bits = back.mode.startswith(("I", "F")) >= image.mode.startswith(("I", "F"))
        numbers = back.mode == "P" or image.mode != "P"
        return path if opacity and bits and numbers else None


rectangles = st.tuples(*(st.integers(0, 39) for _ in range(2)), *(st.integers(12, 24) for _ in range(2)))


@settings(max_examples=6, deadline=None)
@given(rectangle=rectangles)
@pytest.mark.parametrize("suffix", LOSSLESS)
@pytest.mark.parametrize("mode", [*SHOWN, *LABELLED])
def test_a_mask_of_any_mode_and_lossless_encoder_has_its_object_where_a_viewer_shows_it(
    tmp_path_factory, mode, suffix, rectangle
):
    top, left, height, width = rectangle
    covers = np.zeros((SIDE, SIDE), bool)
    covers[top : top + height, left : left + width] = True
    image = (SHOWN | LABELLED)[mode](covers)
    path = saved(image, tmp_path_factory.mktemp("m"), suffix, LOSSLESS[suffix])
    if path is not None and (suffix != "jp2" or mode in SHOWN):  # what may be lossy is read by brightness
        assert np.array_equal(read_mask(path).covers, covers)


@settings(max_examples=6, deadline=None)
@given(rectangle=rectangles)
@pytest.mark.parametrize("suffix", LOSSY)
@pytest.mark.parametrize("mode", [mode for mode in SHOWN if not mode.endswith("of 8 bits")])
def test_a_lossy_mask_has_its_object_within_a_pixel_or_two(tmp_path_factory, mode, suffix, rectangle):
    top, left, height, width = rectangle
    covers = np.zeros((SIDE, SIDE), bool)
    covers[top : top + height, left : left + width] = True
    path = saved(SHOWN[mode](covers), tmp_path_factory.mktemp("m"), suffix, LOSSY[suffix])
    if path is not None:
        found = read_mask(path).covers
        assert not (found & ~binary_dilation(covers, iterations=2)).any()
        assert not (~found & binary_erosion(covers, iterations=2)).any()


@pytest.mark.parametrize("mode", [*SHOWN, *LABELLED])
def test_every_mode_has_an_encoder_in_these_tests(tmp_path, mode):
    image = (SHOWN | LABELLED)[mode](square())
    assert sum(saved(image, tmp_path, suffix, options) is not None for suffix, options in LOSSLESS.items()) >= 1


def test_a_soft_mask_is_cut_at_half_of_its_range(tmp_path):
    ramp = np.tile(np.linspace(0, 1, SIDE), (SIDE, 1))
    for name, values in {
        "a.png": (ramp * 255).astype(np.uint8), "b.png": (ramp * 65535).astype(np.uint16),
        "c.tif": ramp.astype(np.float32), "d.tif": (ramp * 255).astype(np.float32),
    }.items():  # fmt: skip
        Image.fromarray(values).save(tmp_path / name)
        assert np.array_equal(read_mask(tmp_path / name).covers, ramp > 0.5), name
    blurred = Image.fromarray(square().astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(3))
    blurred.save(tmp_path / "e.png")
    assert np.array_equal(read_mask(tmp_path / "e.png").covers, np.asarray(blurred) > 127)


def test_an_antialiased_edge_is_cut_at_half(tmp_path):
    small = Image.fromarray(square().astype(np.uint8) * 255).resize((50, 50), Image.Resampling.BILINEAR)
    small.save(tmp_path / "a.png")
    assert np.array_equal(read_mask(tmp_path / "a.png").covers, np.asarray(small) > 127)


def test_an_empty_and_a_full_mask_are_that_in_every_encoder(tmp_path):
    for suffix, options in [*LOSSLESS.items(), *LOSSY.items()]:
        for value in (0, 255):
            Image.new("L", (SIDE, SIDE), value).save(tmp_path / f"a.{suffix}", **options)
            assert (read_mask(tmp_path / f"a.{suffix}").covers == bool(value)).all(), (suffix, value)


def test_the_rule_that_a_mask_was_read_by_is_told(tmp_path):
    told = {}
    for mode in ("L", "P, white first", "P, numbers", "RGBA, white"):
        (SHOWN | LABELLED)[mode](square()).save(tmp_path / "a.png")
        told[mode] = read_mask(tmp_path / "a.png").read_by
    assert told == {
        "L": "brightness",
        "P, white first": "the colours of its palette",
        "P, numbers": "the numbers of its palette",
        "RGBA, white": "opacity",
    }


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.full((8, 8), 200, np.int32), 200),
        (np.full((8, 8), 200, np.uint16), 200),
        (np.full((8, 8), 200 * 257, np.int32), 200),
        (np.full((8, 8), 200 * 257, np.uint16), 200),
        (np.full((8, 8), 200, np.float32), 200),
        (np.full((8, 8), 200 / 255, np.float32), 200),
        (np.full((8, 8), -5, np.int32), 0),
        (np.where(np.eye(8, dtype=bool), 1_000_000, 500_000).astype(np.int32), 127),
    ],
)
def test_grey_values_of_many_bits_are_scaled_by_what_the_file_holds(tmp_path, values, expected):
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert abs(int(np.asarray(read_image(tmp_path / "a.tif").image)[0, 1, 0]) - expected) <= 1


def test_values_that_are_not_finite_are_refused(tmp_path):
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path / "a.tif")
    for read in (read_image, read_mask):
        with pytest.raises(UnreadableError, match=r"a\.tif has values that are not finite"):
            read(tmp_path / "a.tif")


def exif(*tags: tuple[int, int, int, bytes]) -> bytes:
    """A block of EXIF with tags of any type and value, written as damaged programs do."""
    tail, body, at = b"", b"", 8 + 2 + 12 * len(tags) + 4
    for tag, kind, count, value in tags:
        body += struct.pack("<HHI", tag, kind, count)
        body += value.ljust(4, b"\0") if len(value) <= 4 else struct.pack("<I", at + len(tail))
        tail += value if len(value) > 4 else b""
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + body + bytes(4) + tail


TURNED = (0x112, 3, 1, struct.pack("<HH", 6, 0))


@pytest.mark.parametrize(
    ("suffix", "block", "turned"),
    [
        ("png", b"\0\x08\0\x02", False),
        ("jpg", b"Exif\0\0" + exif(TURNED, (0x11A, 10, 1, struct.pack("<ii", -1, 0))), True),
        ("jpg", b"Exif\0\0" + exif(TURNED, (0x11A, 2, 4, b"72\0\0")), True),
        ("jpg", b"Exif\0\0" + exif((0x9000, 11, 1, struct.pack("<f", 2.3))), False),
        ("jpg", b"Exif\0\0" + exif((0x112, 2, 4, b"top\0")), False),
        ("jpg", b"Exif\0\0II*\0\xff\xff\xff\xff", False),
    ],
)
def test_odd_metadata_does_not_stop_an_image_whose_pixels_decode(tmp_path, suffix, block, turned):
    left = np.zeros((SIDE, SIDE, 3), np.uint8)
    left[:, :32] = 255
    Image.fromarray(left).save(tmp_path / f"a.{suffix}", exif=block)
    pixels = np.asarray(read_image(tmp_path / f"a.{suffix}").image)
    bright = pixels[:30].min() if turned else pixels[:, :30].min()
    assert bright > 200
    assert read_mask(tmp_path / f"a.{suffix}").covers.mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("content", [b"", b"<html>", b"version https://git-lfs.github.com/spec/v1\n", b"%PDF-1.4"])
def test_what_is_not_an_image_is_called_that(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(NoPictureError, match=r"a\.jpg cannot be read"):
        read_image(tmp_path / "a.jpg")


def test_a_cut_off_file_of_any_format_is_unreadable_or_decoded_but_never_a_traceback(tmp_path):
    pixels = photograph(square()).astype(np.uint8)
    for suffix, options in [*LOSSLESS.items(), *LOSSY.items()]:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(
            buffer, {"tif": "TIFF", "jp2": "JPEG2000", "jpg": "JPEG"}.get(suffix, suffix), **options
        )
        for share in (0.02, 0.3, 0.9):
            (tmp_path / f"a.{suffix}").write_bytes(buffer.getvalue()[: int(share * len(buffer.getvalue()))])
            for read in (read_image, read_mask):
                with contextlib.suppress(UnreadableError):
                    read(tmp_path / f"a.{suffix}")


# --- size -------------------------------------------------------------------------------------------------------------


def test_crop_cuts_out_the_middle_pad_adds_black_and_stretch_keeps_all():
    wide = np.full((32, 64), 255, np.uint8)
    wide[:, :8] = wide[:, -8:] = 100
    image = Image.fromarray(wide)
    assert (fitted(image, (16, 16), "crop") == 255).all()
    padded = fitted(image, (16, 16), "pad")
    assert not padded[:4].any()
    assert not padded[-4:].any()
    assert padded[4:-4].all()
    assert padded[8, 0] == 100
    stretched = fitted(image, (16, 16), "stretch")
    assert stretched.all()
    assert stretched[8, 0] == 100
    assert (fitted(image, (16, 32), "crop") == fitted(image, (16, 32), "stretch")).all()
    assert not covered(np.ones((32, 64), bool), (16, 16), "pad")[:4].any()


@pytest.mark.parametrize("mistake", [AttributeError, ValueError, OSError, FileNotFoundError, IndexError])
def test_a_mistake_of_our_own_is_not_blamed_on_the_file(tmp_path, monkeypatch, mistake):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")

    def mistaken(image: Image.Image) -> None:
        raise mistake("'NoneType' object has no attribute 'shape'")

    for name, read in (("_as_shown", read_image), ("_object", read_mask)):
        monkeypatch.setattr(f"data.builders.pictures.{name}", lambda image, *rest: mistaken(image))
        with pytest.raises(mistake, match="has no attribute 'shape'") as raised:
            read(tmp_path / "a.png")
        assert type(raised.value) is mistake


def test_an_image_that_pillow_does_not_convert_is_one_that_cannot_be_read():
    image = Image.new("P", (8, 8))
    image.putpalette([0, 0, 0, 9, 9, 9])
    image.info["transparency"] = "of no known kind"
    for read in (read_image, read_mask):
        with pytest.raises(UnreadableError, match="the image cannot be read: Transparency for P mode"):
            read(image)
