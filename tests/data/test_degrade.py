"""A degraded reference is worse in exactly the way that was asked for, and the same in any process."""

import io
import multiprocessing

import numpy as np
import pytest
from PIL import Image, ImageFilter

from kontext_min.data.degrade import ALIASES, DEFAULTS, MODELS, REFUSED, check, degrade

CHAIN = {
    "steps": [
        {"type": "blur", "blur_type": "both", "blur_radius": 1.5},
        {"type": "noise", "noise_level": 0.05},
        {"type": "downscale", "downscale_factor": 2},
        {"type": "jpeg", "quality_range": [20, 60], "subsampling": "4:4:4"},
        {"type": "jpeg", "quality": 30, "shift": True},
        {"type": "superresolution", "blur_radius": 0.5},
        {"type": "jpeg_artifacts", "quality_mode": "random", "compression_rounds": 2},
    ]
}
EVERY = [  # something of every generator
    ("superresolution", {}),
    ("superresolution", {"downscale_factor": 4, "blur_type": "box", "jpeg_quality": 30}),
    ("jpeg_artifacts", {}),
    ("jpeg_artifacts", {"quality_mode": "range", "compression_rounds": 3, "pre_blur": True, "add_noise": True}),
    ("jpeg_artifacts", {"quality_mode": "random", "enhance_blocks": True, "subsampling": "4:2:2"}),
    ("chain", CHAIN),
]


def picture(width=64, height=48) -> Image.Image:
    """Detail at every scale in all three channels, away from black and white."""
    rng = np.random.default_rng(7)
    coarse = Image.fromarray(rng.integers(60, 196, (6, 8, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    detail = rng.integers(-25, 26, (height, width, 3))
    return Image.fromarray((np.asarray(coarse).astype(int) + detail).clip(30, 225).astype(np.uint8))


def made(name: str, seed=0, image: Image.Image | None = None, **parameters) -> np.ndarray:
    """A degraded picture as (height, width, 3) float64."""
    return values(degrade(image or picture(), name, parameters, np.random.default_rng(seed)))


def step(image: Image.Image | None = None, seed=0, **parameters) -> np.ndarray:
    """A chain of one step."""
    return made("chain", seed, image, steps=[parameters])


def values(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(float)


def through_jpeg(image: Image.Image, quality: int, **options) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, **options)
    return Image.open(buffer).convert("RGB")


def sharpness(pixels: np.ndarray) -> float:
    """Variance of the Laplacian."""
    p = pixels.mean(2)
    return (4 * p[1:-1, 1:-1] - p[:-2, 1:-1] - p[2:, 1:-1] - p[1:-1, :-2] - p[1:-1, 2:]).var()


def convolved(pixels: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Rows and columns with one kernel, edges repeated."""
    margin = len(kernel) // 2
    padded = np.pad(pixels, ((margin, margin), (margin, margin), (0, 0)), mode="edge")
    rows = sum(k * padded[i : i + pixels.shape[0]] for i, k in enumerate(kernel))
    return sum(k * rows[:, i : i + pixels.shape[1]] for i, k in enumerate(kernel))


@pytest.mark.parametrize(
    "name, parameters",
    [("superresolution", {}), ("superresolution", {"downscale_factor": 3}), ("superresolution", {"blur_type": "box"})],
)
def test_the_degraded_picture_is_blurrier(name, parameters):
    assert sharpness(made(name, **parameters)) < 0.2 * sharpness(values(picture()))


def test_defaults_of_superresolution_without_noise_are_a_gaussian_of_two_pixels():
    kernel = np.exp(-(np.arange(-8, 9) ** 2) / 8)
    difference = made("superresolution", add_noise=False) - convolved(values(picture()), kernel / kernel.sum())
    assert np.abs(difference).mean() < 0.8 and abs(difference.mean()) < 0.2  # Pillow's Gaussian is three boxes
    assert np.array_equal(
        made("superresolution", add_noise=False), values(picture().filter(ImageFilter.GaussianBlur(2)))
    )


def test_a_box_blur_of_radius_two_is_the_mean_of_five_by_five():
    got = made("superresolution", add_noise=False, blur_type="box")
    assert np.abs(got - convolved(values(picture()), np.full(5, 1 / 5))).max() <= 1.01  # rounded after rows and columns


def test_both_is_a_box_and_then_a_gaussian_of_seven_tenths():
    expected = picture().filter(ImageFilter.BoxBlur(0.7 * 3)).filter(ImageFilter.GaussianBlur(0.7 * 3))
    assert np.array_equal(made("superresolution", add_noise=False, blur_type="both", blur_radius=3.0), values(expected))


def test_superresolution_downscales_then_blurs_then_compresses():
    small = picture().resize((64 * 2 // 5, 48 * 2 // 5), Image.BILINEAR).resize((64, 48), Image.BILINEAR)
    expected = through_jpeg(small.filter(ImageFilter.GaussianBlur(1)), 20)
    got = made("superresolution", downscale_factor=2.5, blur_radius=1, add_noise=False, jpeg_quality=20)
    assert np.array_equal(got, values(expected))


@pytest.mark.parametrize("level", [0.002, 0.01, 0.02, 0.1])
def test_noise_keeps_the_mean_and_has_the_deviation_asked_for(level):
    grey = Image.new("RGB", (256, 256), (128, 100, 150))
    difference = step(grey, type="noise", noise_level=level) - values(grey)
    assert abs(difference.mean()) < 0.1
    expected = ((255 * level) ** 2 + 1 / 12) ** 0.5  # the second term is rounding's
    assert difference.std() == pytest.approx(expected, rel=0.02)
    assert np.abs(np.corrcoef(difference.reshape(-1, 3).T) - np.eye(3)).max() < 0.02  # channels are independent


def test_noise_is_cut_at_black_and_white_and_never_wraps():
    assert step(Image.new("RGB", (64, 64), "white"), type="noise", noise_level=0.02).min() > 200
    assert step(Image.new("RGB", (64, 64), "black"), type="noise", noise_level=0.02).max() < 55


def test_the_same_generator_gives_the_same_bytes_in_one_process_or_three():
    jobs = [
        (picture(), name, parameters, np.random.default_rng([1, i]))
        for i, (name, parameters) in enumerate(EVERY + EVERY)
    ]
    with multiprocessing.get_context("spawn").Pool(1) as one, multiprocessing.get_context("spawn").Pool(3) as three:
        in_one = [image.tobytes() for image in one.starmap(degrade, jobs, chunksize=1)]
        in_three = [image.tobytes() for image in three.starmap(degrade, jobs, chunksize=1)]
    here = [degrade(*job).tobytes() for job in jobs]
    assert in_one == in_three == here


@pytest.mark.parametrize("name, parameters", [job for i, job in enumerate(EVERY) if i != 2])
def test_another_seed_gives_other_bytes(name, parameters):
    if parameters.get("quality_mode") == "range":
        parameters = parameters | {"add_noise": False}  # so that only the quality is drawn
    assert len({made(name, seed, **parameters).tobytes() for seed in range(8)}) > 1


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("jpeg_artifacts", {"quality_mode": "range", "quality_range": (10, 14)}),
        ("jpeg_artifacts", {"quality_mode": "random", "quality_list": [10, 11, 12, 13, 14]}),
        ("chain", {"steps": [{"type": "jpeg", "quality_range": [10, 14]}]}),
    ],
)
def test_drawn_qualities_include_both_ends_and_nothing_beyond(name, parameters):
    image = picture(24, 24)
    encoded = {through_jpeg(image, quality).tobytes(): quality for quality in range(8, 17)}
    assert len(encoded) == 9
    got = [degrade(image, name, parameters, np.random.default_rng(seed)).tobytes() for seed in range(60)]
    assert {encoded[pixels] for pixels in got} == {10, 11, 12, 13, 14}


def test_the_default_quality_is_25_and_quality_sets_it():
    assert np.array_equal(made("jpeg_artifacts"), values(through_jpeg(picture(), 25)))
    assert np.array_equal(made("jpeg_artifacts", quality=60), values(through_jpeg(picture(), 60)))
    assert np.array_equal(step(type="jpeg"), values(through_jpeg(picture(), 25)))


def test_quality_decays_with_every_round_but_never_below_one():
    expected = through_jpeg(through_jpeg(through_jpeg(picture(), 50), 37), 28)  # 50, 37.5, 28.1
    got = made("jpeg_artifacts", quality=50, compression_rounds=3, round_quality_decay=0.75)
    assert np.array_equal(got, values(expected))
    expected = through_jpeg(through_jpeg(picture(), 10), 1)
    got = made("jpeg_artifacts", quality=10, compression_rounds=2, round_quality_decay=0.01)
    assert np.array_equal(got, values(expected))


def test_jpeg_artifacts_blurs_then_adds_noise_then_compresses():
    blurred = picture().filter(ImageFilter.GaussianBlur(0.5))
    noisy = Image.fromarray(step(blurred, type="noise", noise_level=0.01).astype(np.uint8))
    got = made("jpeg_artifacts", pre_blur=True, add_noise=True)
    assert np.array_equal(got, values(through_jpeg(noisy, 25)))


def test_subsampling_is_what_was_asked_for_and_4_2_0_when_nothing_was():
    got = {s: made("jpeg_artifacts", quality=80, subsampling=s) for s in ("4:4:4", "4:2:2", "4:2:0", None)}
    for name, code in (("4:4:4", 0), ("4:2:2", 1), ("4:2:0", 2)):
        assert np.array_equal(got[name], values(through_jpeg(picture(), 80, subsampling=code)))
    assert not np.array_equal(got["4:4:4"], got["4:2:0"]) and not np.array_equal(got["4:4:4"], got["4:2:2"])
    assert np.array_equal(got[None], got["4:2:0"])


@pytest.mark.parametrize("option", ["optimize", "progressive"])
def test_optimize_and_progressive_leave_the_pixels_as_they_are(option):
    assert np.array_equal(values(through_jpeg(picture(), 25, **{option: True})), made("jpeg_artifacts"))
    assert np.array_equal(made("jpeg_artifacts", **{option: True}), made("jpeg_artifacts"))


def test_enhanced_blocks_differ_only_on_rows_and_columns_that_are_multiples_of_eight():
    image = picture(37, 29)
    changed = (made("jpeg_artifacts", image=image, enhance_blocks=True) != made("jpeg_artifacts", image=image)).any(2)
    rows, columns = np.mgrid[:29, :37]
    edge = (rows % 8 == 0) | (columns % 8 == 0)
    assert not changed[~edge].any() and changed[edge].mean() > 0.9


def test_a_second_compression_changes_little_unless_its_grid_is_shifted():
    once = {"type": "jpeg", "quality": 20}
    first = made("chain", steps=[once])
    changes = {
        shift: np.abs(made("chain", steps=[once, once | {"shift": shift}]) - first).mean()
        for shift in (False, 0, 3, True)
    }
    assert changes[0] == changes[False]
    assert min(changes[3], changes[True]) > 2 * changes[False], changes


def test_a_shift_moves_the_grid_right_and_down():
    image = picture(40, 32)
    padded = Image.fromarray(np.pad(np.asarray(image), ((3, 0), (3, 0), (0, 0)), mode="edge"))
    expected = values(through_jpeg(padded, 15))[3:, 3:]
    assert np.array_equal(step(image, type="jpeg", quality=15, shift=3), expected)


def test_a_random_shift_is_one_to_seven_in_each_direction():
    image = picture(24, 24)
    offsets = {}
    for across in range(8):
        for down in range(8):
            padded = Image.fromarray(np.pad(np.asarray(image), ((down, 0), (across, 0), (0, 0)), mode="edge"))
            offsets[values(through_jpeg(padded, 15))[down:, across:].tobytes()] = across, down
    drawn = [offsets[step(image, seed, type="jpeg", quality=15, shift=True).tobytes()] for seed in range(100)]
    assert {a for a, _ in drawn} == {d for _, d in drawn} == set(range(1, 8)) and len(set(drawn)) > 30


def test_a_chain_goes_through_its_steps_in_order():
    blurred = picture().filter(ImageFilter.GaussianBlur(2))
    one, other = {"type": "blur"}, {"type": "jpeg", "quality": 20}
    assert np.array_equal(made("chain", steps=[one, other]), values(through_jpeg(blurred, 20)))
    assert not np.array_equal(made("chain", steps=[one, other]), made("chain", steps=[other, one]))


@pytest.mark.parametrize("size", [(17, 23), (1, 1), (64, 8)])
@pytest.mark.parametrize("name, parameters", EVERY)
def test_size_and_mode_stay_and_the_input_is_not_changed(name, parameters, size):
    image = picture(*size)
    before = image.tobytes()
    result = degrade(image, name, parameters, np.random.default_rng(0))
    assert (result.size, result.mode) == (size, "RGB") and result is not image
    assert image.tobytes() == before


def test_factors_and_radii_larger_than_the_picture_leave_one_colour():
    got = made("superresolution", image=picture(17, 23), downscale_factor=1000, blur_radius=100, add_noise=False)
    assert np.ptp(got, axis=(0, 1)).max() <= 1


@pytest.mark.parametrize("alias, name", ALIASES.items())
def test_an_alias_is_its_generator(alias, name):
    check(alias, {})
    assert np.array_equal(made(alias), made(name))


@pytest.mark.parametrize("kind", MODELS)
def test_every_default_passes_its_own_check(kind):
    given = DEFAULTS.get(kind, {"steps": [{"type": "blur"}]})
    stated = {key: value for key, value in given.items() if value is not None}
    assert MODELS[kind](**stated) == MODELS[kind](**{"steps": [{"type": "blur"}]} if kind == "chain" else {})


NAMES = "known are superresolution, jpeg_artifacts, chain, super_resolution, lowres, jpeg, compression"
BAD = [  # generator, parameters, the whole sentence
    ("superesolution", {}, f"type is 'superesolution'; {NAMES}; did you mean superresolution?"),
    ("superresolution", {"blur_radios": 2},
     "superresolution.blur_radios is 2; extra inputs are not permitted; did you mean blur_radius?"),
    ("lowres", {"params": {}}, "lowres.params is {}; extra inputs are not permitted"),
    ("superresolution", {"blur_type": "gausian"},
     "superresolution.blur_type is 'gausian'; input should be 'gaussian', 'box' or 'both'"),
    ("superresolution", {"blur_type": None},
     "superresolution.blur_type is None; input should be 'gaussian', 'box' or 'both'"),
    ("superresolution", {"blur_radius": -1},
     "superresolution.blur_radius is -1; input should be greater than or equal to 0"),
    ("superresolution", {"blur_radius": float("nan")},
     "superresolution.blur_radius is nan; input should be a finite number"),
    ("superresolution", {"blur_radius": float("inf")},
     "superresolution.blur_radius is inf; input should be a finite number"),
    ("superresolution", {"noise_level": 5},
     "superresolution.noise_level is 5; input should be less than or equal to 1"),
    ("superresolution", {"noise_level": -0.1},
     "superresolution.noise_level is -0.1; input should be greater than or equal to 0"),
    ("superresolution", {"downscale_factor": 0.5},
     "superresolution.downscale_factor is 0.5; input should be greater than or equal to 1"),
    ("superresolution", {"jpeg_quality": 0},
     "superresolution.jpeg_quality is 0; input should be greater than or equal to 1"),
    ("jpeg", {"quality": 101}, "jpeg.quality is 101; input should be less than or equal to 100"),
    ("jpeg_artifacts", {"quality_mode": "ranged"},
     "jpeg_artifacts.quality_mode is 'ranged'; input should be 'fixed', 'range' or 'random'"),
    ("jpeg_artifacts", {"quality_range": [50, 10]},
     "jpeg_artifacts.quality_range is [50, 10]; it should be [lowest, highest]"),
    ("jpeg_artifacts", {"quality_range": [10]}, "jpeg_artifacts.quality_range.1 is [10]; field required"),
    ("jpeg_artifacts", {"quality_range": 10}, "jpeg_artifacts.quality_range is 10; input should be a valid tuple"),
    ("jpeg_artifacts", {"quality_range": [0, 10]},
     "jpeg_artifacts.quality_range.0 is 0; input should be greater than or equal to 1"),
    ("jpeg_artifacts", {"quality_list": []},
     "jpeg_artifacts.quality_list is []; list should have at least 1 item after validation, not 0"),
    ("jpeg_artifacts", {"compression_rounds": 0},
     "jpeg_artifacts.compression_rounds is 0; input should be greater than or equal to 1"),
    ("jpeg_artifacts", {"round_quality_decay": 1.1},
     "jpeg_artifacts.round_quality_decay is 1.1; input should be less than or equal to 1"),
    ("jpeg_artifacts", {"subsampling": "420"},
     "jpeg_artifacts.subsampling is '420'; input should be '4:4:4', '4:2:2' or '4:2:0'"),
    ("chain", {}, "chain.steps is {}; field required"),
    ("chain", {"steps": []}, "chain.steps is []; list should have at least 1 item after validation, not 0"),
    ("chain", {"steps": [{"type": "blur"}, {"type": "blurr"}]},
     "chain.steps.1 is {'type': 'blurr'}; input tag 'blurr' found using 'type' does not match any of the expected "
     "tags: 'blur', 'noise', 'block_noise', 'downscale', 'jpeg', 'superresolution', 'jpeg_artifacts'"),
    ("chain", {"steps": [{"blur_radius": 1}]},
     "chain.steps.0 is {'blur_radius': 1}; unable to extract tag using discriminator 'type'"),
    ("chain", {"steps": [{"type": "blur", "blur_radius": -2}]},
     "chain.steps.0.blur.blur_radius is -2; input should be greater than or equal to 0"),
    ("chain", {"steps": [{"type": "jpeg", "shift": 8}]},
     "chain.steps.0.jpeg.shift.constrained-int is 8; input should be less than 8"),
    ("edges", {}, "type 'edges' is not generated here: finding edges needs OpenCV; make those pictures yourself and "
     "name their dataset in conditioning_data"),
]  # fmt: skip


@pytest.mark.parametrize("name, parameters, sentence", BAD)
def test_a_mistake_is_refused_in_one_sentence(name, parameters, sentence):
    with pytest.raises(ValueError) as raised:
        check(name, parameters)
    assert str(raised.value) == sentence


def test_a_mistake_is_refused_before_a_picture_is_made():
    with pytest.raises(ValueError, match="'gaussian', 'box' or 'both'"):
        made("superresolution", blur_type="motion")


def test_every_other_type_of_simpletuner_is_refused_by_name_with_its_reason():
    names = """random_masks masks inpainting canny edges depth depth_map depth_midas segmentation semantic_segmentation
    optical_flow flow sdr sdr_downsample logc3_sdr hdr_to_sdr i2v_first_frame wan_i2v_first_frame"""
    assert names.split() == list(REFUSED)
    for name, reason in REFUSED.items():
        with pytest.raises(ValueError) as raised:
            check(name, {"whatever": 1})
        assert repr(name) in str(raised.value) and reason in str(raised.value)
