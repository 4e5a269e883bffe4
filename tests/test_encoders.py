"""Pictures through the VAE in tiles."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import CPU, FP32

from kontext_min import presets
from kontext_min.checkpoints import load
from kontext_min.encoders import encode_image, in_tiles, tile

PHOTOS = sorted(Path("configs/photos/reference").glob("*.jpg"))[:6]


def nano():
    return load.load_vae(load.find(presets.locate("nano")), CPU, FP32)


def photo(file: Path) -> Image.Image:
    image = Image.open(file).convert("RGB")
    return image.crop((0, 0, image.width // 16 * 16, image.height // 16 * 16))


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(10 * torch.log10(4 / ((a.clamp(-1, 1) - b.clamp(-1, 1)) ** 2).mean()))


@torch.no_grad()
def test_tiles_show_what_the_whole_shows_with_the_stated_error():
    whole, tiled, decoded, both = nano(), tile(nano(), 12), [], []
    for image in map(photo, PHOTOS):
        latents = encode_image(whole, image)
        decoded.append(psnr(whole.decode(latents), tiled.decode(latents)))
        both.append(psnr(whole.decode(latents), tiled.decode(encode_image(tiled, image))))
    assert sum(decoded) / 6 == pytest.approx(31.5, abs=1) and sum(both) / 6 == pytest.approx(37.5, abs=1)


@torch.no_grad()
def test_what_fits_one_tile_is_the_same_to_the_last_bit():
    whole, tiled = nano(), tile(nano())
    latents = encode_image(whole, photo(PHOTOS[0]))
    assert torch.equal(latents, encode_image(tiled, photo(PHOTOS[0])))
    assert torch.equal(whole.decode(latents), tiled.decode(latents))


@pytest.mark.parametrize("shape", [(64, 64), (65, 40), (200, 66), (72, 130)])
def test_tiles_cover_everything_and_blend_without_a_seam(shape):
    """A function of each place alone is the same by tiles; one that differs by tile changes gently."""
    x = torch.randn(1, 3, *shape)
    larger = in_tiles(lambda t: t.repeat_interleave(8, 2).repeat_interleave(8, 3), 64, 8, x)
    torch.testing.assert_close(larger, x.repeat_interleave(8, 2).repeat_interleave(8, 3))
    levels = iter(range(100))
    steps = in_tiles(lambda t: torch.full_like(t, next(levels)), 64, 1, x)[0, 0]
    if max(shape) > 100:
        assert float(steps.diff(dim=0 if shape[0] > 100 else 1).abs().max()) < 0.35


def test_the_cache_of_tiles_is_another(kontext, tmp_path):
    from kontext_min.data.cache import Cache
    from kontext_min.data.examples import Examples

    checkpoint, texts = load.find(kontext), Cache(tmp_path)
    made = [Examples([], checkpoint, texts, FP32, tiled=tiled) for tiled in (False, True)]
    view = type("View", (), {"mask": False, "key": lambda self: "k"})()
    assert made[0]._latent_key(view) != made[1]._latent_key(view)
