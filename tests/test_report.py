"""The report of a run: one page that needs nothing else, says what is wrong, and breaks on no prompt and no old run."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from kontext_min import report

EVIL = '</script><script>alert("1")</script> <!-- & \u2028 "quoted" é'
STEPS = (0, 50, 100, 150)


class Page(HTMLParser):
    """What a browser would make of the page: tags with attributes, the title, and every script's text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.scripts, self.title, self.inside = [], [], "", ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data
        if self.inside == "title":
            self.title += data

    @property
    def blob(self) -> dict:
        return json.loads(self.scripts[0])


def scene(size=(96, 80), seed=0, planted=0.0) -> Image.Image:
    """A smooth picture with an edge and noise; planted: steps at every 16th pixel, as tokens do."""
    r = np.random.default_rng(seed)
    y, x = np.mgrid[: size[1], : size[0]]
    picture = 120 + 60 * np.sin(x / 17 + seed) * np.cos(y / 11) + 40 * (x > 29) + r.normal(0, 3, x.shape)
    picture += planted * ((x // 16 + y // 16) % 2)
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).convert("RGB")


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.fixture
def run(tmp_path):
    """As a run of 150 steps leaves it: three pairs, one without a target, one unseen."""
    folder = tmp_path / "my <run>"
    validation = folder / "validation"
    items = []
    for i in range(3):
        items.append({"name": f"pair{i}", "prompt": EVIL if i == 0 else "make it night", "negative": "blur" * (i == 1),
                      "seed": 42, "size": "96x80", "unseen": (True, False, None)[i], "references": 1 + (i == 1),
                      "target": i != 2})  # fmt: skip
        pictures = [f"input-1/{i:02d}", *([f"input-2/{i:02d}"] if i == 1 else []), f"base/{i:02d}"]
        pictures += [f"target/{i:02d}"] * (i != 2) + [f"{step:06d}/{i:02d}" for step in STEPS]
        for k, name in enumerate(pictures):
            (validation / name).parent.mkdir(parents=True, exist_ok=True)
            scene(seed=10 * i + k).save(validation / f"{name}.png")
    (validation / "items.json").write_text(json.dumps(items))
    pair = {"base": 17.51, "lora": 20.0}
    write_lines(validation / "psnr.jsonl", [
        {"step": s, "base": 17.5, "lora": 20 + s / 100, "pairs": [pair, {"base": 10.0, "lora": 99.0}]}
        for s in STEPS
    ])  # fmt: skip
    write_lines(validation / "eval.jsonl", [
        {"step": s, "loss": 0.5 - s / 1000, "per_timestep": [[0.1, 0.9], [0.9, 0.2]],
         "probe": {"own": 0.5 - s / 1000, "shuffled": 0.8, "none": 0.9}} for s in STEPS
    ])  # fmt: skip
    write_lines(folder / "metrics.jsonl", [
        {"step": s, "loss": 1 / s, "grad_norm": 0.5, "lr": 1e-4, "seconds": 2.0, "memory": 20.5, "memory_limit": 24.0}
        for s in range(1, 151)
    ])  # fmt: skip
    config = {"max_train_steps": 150, "lora_rank": 16, "flux_lora_target": "all", "note": EVIL}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def page_of(run) -> Page:
    return Page(report.write(run).read_text(encoding="utf-8"))


def decoded(uri: str) -> Image.Image:
    kind, _, data = uri.partition(";base64,")
    assert kind in ("data:image/png", "data:image/jpeg")
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_the_page_holds_everything_and_asks_for_nothing(run):
    page = page_of(run)
    assert page.title == "my <run>"
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "img") and not {"src", "href", "srcset"} & set(attributes)
    assert len(page.scripts) == 2
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", page.scripts[1])


def test_no_string_of_a_run_can_break_the_page(run):
    page = page_of(run)
    assert page.blob["items"][0]["prompt"] == EVIL and page.blob["config"]["note"] == EVIL
    assert "innerHTML" not in page.scripts[1] and "insertAdjacentHTML" not in page.scripts[1]


def test_the_blob_has_the_runs_pictures_numbers_and_settings(run):
    blob = page_of(run).blob
    first, second, third = (item["pictures"] for item in blob["items"])
    assert blob["steps"] == ["000000", "000050", "000100", "000150"]
    assert list(first) == [*blob["steps"], "base", "input-1", "target"]
    assert {"input-1", "input-2"} < second.keys() and "target" not in third
    original = np.asarray(Image.open(run / "validation" / "000100" / "01.png"))
    assert (np.asarray(decoded(second["000100"])) == original).all()
    assert (np.asarray(decoded(first["base"])) == np.asarray(Image.open(run / "validation/base/00.png"))).all()
    assert blob["items"][1]["negative"] == "blur"
    assert [item["unseen"] for item in blob["items"]] == [True, False, None]
    first, second, third = (item["psnr"] for item in blob["items"])
    assert first["000150"] == {"base": 17.51, "lora": 20.0} and second["000000"]["lora"] == 99.0 and not third
    curves = blob["curves"]
    assert curves["loss"][9] == [10, 0.1] and len(curves["loss"]) == 150
    weights = [0.98**age for age in range(149, -1, -1)]
    mean = sum(w / s for w, s in zip(weights, range(1, 151), strict=True)) / sum(weights)
    assert curves["smooth"][-1] == [150, pytest.approx(mean)]
    assert curves["shuffled"] == [[s, 0.8] for s in STEPS] and [step for step, _ in curves["times"]] == [0, 150]
    assert ["memory at most", "20.5 GB of 24.0"] in blob["numbers"]
    assert ["training, without validation", "0:05:00"] in blob["numbers"]
    assert blob["findings"] == [] and blob["missing"] == []


TRAINED = {
    "LoRA of rank 16 on all": {"lora_rank": 16, "flux_lora_target": "all"},
    "DoRA of rank 4 on modules of a preset": {"use_dora": True, "lora_rank": 4},
    "LoKr on modules of a preset": {"lora_type": "lycoris"},
    "all parameters": {"model_type": "full"},
}


@pytest.mark.parametrize("what", TRAINED)
def test_the_page_says_what_was_trained(run, what):
    (run / "config.json").write_text(json.dumps({"max_train_steps": 150, **TRAINED[what]}))
    assert page_of(run).blob["subtitle"] == f"step 150 of 150 · {what} · ?"


def test_large_pictures_and_long_runs_stay_small(run):
    validation = run / "validation"
    for i in range(3):
        for folder in ("base", "target", "000100", "000150"):
            scene((1024, 1024)).save(validation / folder / f"{i:02d}.png", compress_level=0)
    for step in range(200, 1000, 20):
        (validation / f"{step:06d}").mkdir()
        shutil.copy(validation / "base" / "00.png", validation / f"{step:06d}" / "00.png")
    lines = (run / "metrics.jsonl").read_text() * 40
    (run / "metrics.jsonl").write_text(lines)
    file = report.write(run)
    blob = Page(file.read_text(encoding="utf-8")).blob
    assert file.stat().st_size < 10e6
    assert len(blob["steps"]) == 12 and (blob["steps"][0], blob["steps"][-1]) == ("000000", "000980")
    assert decoded(blob["items"][0]["pictures"]["000980"]).width >= 256
    assert 500 < len(blob["curves"]["loss"]) <= 602


REMOVED = ["validation", "validation/items.json", "validation/base", "validation/000150", "validation/psnr.jsonl",
           "validation/eval.jsonl", "metrics.jsonl", "config.json"]  # fmt: skip


@pytest.mark.parametrize("name", REMOVED)
def test_what_a_run_has_not_written_is_said_and_the_rest_is_shown(run, name):
    path = run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    blob = page_of(run).blob
    gone = {"validation": 3, "validation/base": 0, "validation/000150": 0}.get(name, 1)
    assert len(blob["missing"]) == gone
    assert bool(blob["items"]) == (name not in ("validation", "validation/items.json"))


def test_a_line_that_was_cut_off_does_not_count_and_no_run_is_one_sentence(run, tmp_path):
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 151, "lo')
    assert page_of(run).blob["curves"]["loss"][-1][0] == 150
    with pytest.raises(FileNotFoundError, match="holds no run"):
        report.write(tmp_path)


def test_a_planted_grid_is_measured_and_edges_or_noise_are_not(tmp_path):
    def grid(picture):
        picture.save(tmp_path / "picture.png")
        return report.grid(tmp_path / "picture.png")

    for seed in range(6):
        plain = grid(scene((256, 192), seed))
        assert 0.8 < plain < 1.3
        assert grid(scene((256, 192), seed, planted=8.0)) > 2 * plain
    eight = np.asarray(scene((256, 192)), float) + 8.0 * ((np.arange(256) // 8) % 2)[None, :, None]
    assert grid(Image.fromarray(np.clip(eight, 0, 255).astype(np.uint8))) > 1.5
    assert 0.5 < grid(Image.new("RGB", (64, 64), "red")) < 1.5
    assert grid(Image.new("RGB", (8, 8))) == 1.0


def test_findings_name_the_troubleshooting_rows(run):
    validation = run / "validation"
    for i in range(3):
        scene(seed=i, planted=12.0).save(validation / "000150" / f"{i:02d}.png")
    (found,) = page_of(run).blob["findings"]
    assert found[0] == "Square grid artefacts" and "other than Lion" in found[1]
    for i in range(3):  # the base has the same grid: it is not the LoRA's
        scene(seed=i, planted=12.0).save(validation / "base" / f"{i:02d}.png")
    assert page_of(run).blob["findings"] == []
    warned = {"step": 150, "loss": 0.5, "probe": {"own": 0.5, "shuffled": 0.502, "none": 0.6}, "warning": "no use"}
    write_lines(validation / "eval.jsonl", [{"step": 100, "loss": 0.5}, warned])
    assert page_of(run).blob["findings"] == [["The reference is ignored", "no use"]]
    (validation / "eval.jsonl").unlink()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_lines(run / "metrics.jsonl", [{**line, "memory": 23.5} for line in lines])
    assert [title for title, _ in page_of(run).blob["findings"]] == ["Memory is near the limit"]


def test_a_step_that_was_skipped_has_no_loss_and_the_page_is_drawn(run):
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 151, "loss": null, "grad_norm": null, "lr": 0.0001, "skipped": true, "seconds": 1}\n')
    curves = page_of(run).blob["curves"]
    assert curves["loss"][-1][0] == curves["smooth"][-1][0] == 150 and curves["lr"][-1][0] == 151


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_draws_the_page_without_an_error(run, tmp_path, width):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium on PATH")
    file, shot = report.write(run), tmp_path / "page.png"
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--virtual-time-budget=3000",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},4000",
    ]
    done = subprocess.run(
        [*command, f"--screenshot={shot}", file.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    drawn = np.asarray(Image.open(shot).convert("RGB"), int)
    assert drawn.shape[1] == width and len(np.unique(drawn.reshape(-1, 3), axis=0)) > 500
    dumped = subprocess.run([*command, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=120).stdout
    tags = Page(dumped).tags
    assert sum(tag == "svg" for tag, _ in tags) == 5 and sum(tag == "article" for tag, _ in tags) == 3
    assert all(a.get("alt") for tag, a in tags if tag == "img") and all(
        a.get("aria-label") for t, a in tags if t == "svg"
    )
