"""Sizes and the one geometric transform."""

import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from kontext_min.data.buckets import Geometry, Size, crop_box, fit, open_image, oriented_size, parse_size, share_cut


@pytest.mark.parametrize(
    "size, bucket", [((1024, 1024), (1024, 1024)), ((1500, 1000), (1280, 832)), ((4000, 3000), (1152, 896)),
                     ((1920, 1080), (1344, 768)), ((1080, 1920), (768, 1344))]
)  # fmt: skip
def test_buckets_at_1024_are_simpletuners(size, bucket):
    assert Geometry().bucket(Size(*size)) == bucket


def test_resolution_is_an_area_a_shorter_side_or_megapixels():
    assert Geometry(512, "pixel").bucket(Size(2000, 1000)) == (1024, 512)
    assert Geometry(0.25, "area").bucket(Size(500, 500)) == (512, 512)
    assert Geometry(96, step=16).bucket(Size(400, 300)) == (112, 80)
    assert Geometry(512, square=True).bucket(Size(2000, 1000)) == (512, 512)


@pytest.mark.parametrize("style", ["center", "corner", "random"])
@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("size", [(400, 300), (300, 400), (1920, 1080), (333, 1000), (97, 96)])
def test_a_transform_does_to_two_sizes_of_one_frame_the_same(style, square, size):
    """The box is one of shares: a reference of twice the pixels shows the same part of the frame."""
    transform = Geometry(64, step=16, square=square, style=style).transform(Size(*size), (0.3, 0.8))
    assert transform.size == Geometry(64, step=16, square=square).bucket(Size(*size))
    gradient = Image.linear_gradient("L").convert("RGB")
    one = np.asarray(transform(gradient.resize(size)), float)
    two = np.asarray(transform(gradient.resize((2 * size[0], 2 * size[1]))), float)
    assert one.shape == two.shape and abs(one - two).max() <= 3
    left, upper, right, lower = transform.box
    assert 0 <= left < right <= 1 and 0 <= upper < lower <= 1
    cut = (right - left) * size[0] / ((lower - upper) * size[1])
    assert cut == pytest.approx(transform.size.width / transform.size.height)


def test_large_pictures_are_brought_down_first():
    transform = Geometry(64, step=16, downsample=(100, 80)).transform(Size(400, 100), (0, 0))
    assert transform.first == (160, 40)
    assert Geometry(64, step=16, downsample=(100, 80)).transform(Size(90, 90), (0, 0)).first is None


@pytest.mark.parametrize("size", [(640, 480), (101, 333), (96, 96), (50, 49)])
def test_fit_gives_the_size_and_never_stretches(size):
    """A picture whose pixels say where they are: after fit, both axes have one and the same scale."""
    width, height = size
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    picture = Image.fromarray(np.stack([x / width * 255, y / height * 255, 0 * x], -1).astype(np.uint8))
    wanted = Size(96, 64)
    fitted = np.asarray(fit(picture, wanted)).astype(float)
    assert fitted.shape == (64, 96, 3)
    pixels_across = (fitted[:, -8, 0].mean() - fitted[:, 8, 0].mean()) / 255 * width
    pixels_down = (fitted[-8, :, 1].mean() - fitted[8, :, 1].mean()) / 255 * height
    assert abs(pixels_across / (96 - 16) / (pixels_down / (64 - 16)) - 1) < 0.06


def test_the_crop_is_centred_and_its_share_is_what_is_said():
    left, upper, right, lower = crop_box(Size(200, 100), Size(96, 96))
    assert (left, upper, right, lower) == (0.25, 0, 0.75, 1)
    assert share_cut(Size(200, 100), Size(96, 96)) == 0.5


def test_pictures_of_every_mode_become_rgb(tmp_path):
    for mode, colour in [("L", 200), ("RGBA", (200, 200, 200, 255)), ("CMYK", (55, 55, 55, 0)), ("P", 0), ("1", 1)]:
        path = tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (5, 4), colour).save(path)
        assert open_image(path).mode == "RGB"
    Image.new("I;16", (5, 4), 200 * 256).save(tmp_path / "deep.png")
    assert open_image(tmp_path / "deep.png").getpixel((0, 0)) == (200, 200, 200)
    Image.new("RGBA", (5, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation_is_obeyed(tmp_path):
    picture = Image.new("RGB", (30, 20))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (20, 30)


def test_a_picture_whose_other_tags_are_broken_is_opened_and_turned(tmp_path):
    exif = Image.new("RGB", (30, 20)).getexif()
    exif[0x0112], exif[0x0100] = 6, 17  # turned; a width, which is then said to be a text
    raw = exif.tobytes()
    order = "little" if b"II" in raw[:10] else "big"
    at = raw.index((0x0100).to_bytes(2, order)) + 2
    broken = raw[:at] + (2).to_bytes(2, order) + raw[at + 2 :]
    Image.new("RGB", (30, 20)).save(tmp_path / "odd.jpg", exif=broken)
    with pytest.raises(struct.error):
        ImageOps.exif_transpose(Image.open(tmp_path / "odd.jpg"))  # as Pillow has it
    assert open_image(tmp_path / "odd.jpg").size == oriented_size(tmp_path / "odd.jpg") == (20, 30)


@pytest.mark.parametrize("text", ["1024", "1024x", "axb", "0x16", "-5x5", "²x16", "16x20000"])
def test_a_malformed_size_is_refused(text):
    with pytest.raises(ValueError, match="WIDTHxHEIGHT"):
        parse_size(text)


@pytest.mark.parametrize("kind", ["jpg", "tif", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_in_the_header_is_the_size_of_the_opened_picture(tmp_path, orientation, kind):
    picture, file = Image.new("RGB", (30, 20)), tmp_path / f"x.{kind}"
    exif = picture.getexif()
    exif[0x0112] = orientation
    picture.save(file, exif=exif)
    assert oriented_size(file) == open_image(file).size == ((20, 30) if orientation > 4 else (30, 20))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "I;16"])
def test_an_uncompressed_tiff_is_turned_with_its_pixels(tmp_path, mode):
    noise = Image.effect_noise((64, 32), 90)
    picture = Image.fromarray(np.asarray(noise, np.uint16) * 256) if mode == "I;16" else noise.convert(mode)
    for name, orientation in (("upright.tif", 1), ("turned.tif", 6)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture.save(tmp_path / name, exif=exif)
    upright = open_image(tmp_path / "upright.tif").transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "turned.tif")), np.asarray(upright))


def test_the_size_of_a_png_is_told_without_its_pixels_and_wherever_it_says_that_it_is_turned(tmp_path):
    file, picture, exif = tmp_path / "x.png", Image.effect_noise((30, 20), 50), Image.Exif()
    picture.save(file)
    file.write_bytes(file.read_bytes()[:100])
    assert oriented_size(file) == (30, 20)
    exif[0x0112] = 6
    picture.save(file, exif=exif)
    whole = file.read_bytes()
    start = whole.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(whole[start : start + 4], "big")
    assert b"IDAT" in whole[end:]
    file.write_bytes(whole[:start] + whole[end:-12] + whole[start:end] + whole[-12:])  # behind the pixels
    assert oriented_size(file) == open_image(file).size == (20, 30)


@pytest.mark.parametrize("mode, name", [("I;16", "x.png"), ("I;16", "x.tif"), ("I;16B", "x.tif")])
def test_pictures_of_16_bits_become_8_by_their_upper_halves(tmp_path, mode, name):
    values = np.arange(0, 65536, 13).astype("<u2" if mode == "I;16" else ">u2").reshape(2, 2521)
    Image.frombytes(mode, (2521, 2), values.tobytes()).save(tmp_path / name)
    assert Image.open(tmp_path / name).mode == mode
    assert np.array_equal(np.asarray(open_image(tmp_path / name))[..., 0], values >> 8)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pictures_of_32_bits_a_channel_are_refused_by_name(tmp_path, mode):
    Image.new(mode, (4, 4)).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match="deep.tif is not a readable picture .32 bits a channel; save it with 8 or 16"):
        open_image(tmp_path / "deep.tif")
