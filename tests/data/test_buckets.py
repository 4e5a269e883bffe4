"""Sizes and the one geometric transform."""

import numpy as np
import pytest
from PIL import Image

from kontext_min.data.buckets import Size, bucket_size, crop_box, fit, open_image, oriented_size, parse_size, share_cut


@pytest.mark.parametrize(
    "size, bucket", [((1024, 1024), (1024, 1024)), ((1500, 1000), (1280, 832)), ((4000, 3000), (1152, 896)),
                     ((1920, 1080), (1344, 768)), ((1080, 1920), (768, 1344))]
)  # fmt: skip
def test_buckets_at_1024_are_simpletuners(size, bucket):
    assert bucket_size(Size(*size), 1024, 64) == bucket


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
    assert (left, upper, right, lower) == (50, 0, 150, 100)
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


@pytest.mark.parametrize("text", ["1024", "1024x", "axb", "0x16", "-5x5"])
def test_a_malformed_size_is_refused(text):
    with pytest.raises(ValueError, match="WIDTHxHEIGHT"):
        parse_size(text)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_in_the_header_is_the_size_of_the_opened_picture(tmp_path, orientation):
    picture = Image.new("RGB", (30, 20))
    exif = picture.getexif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "x.jpg", exif=exif)
    assert oriented_size(tmp_path / "x.jpg") == open_image(tmp_path / "x.jpg").size
