"""`python -m kontext_min.adapters`: what it writes, against diffusers, torch.linalg and definitions; refusals."""

import re
import runpy
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import CPU, FP32, error, run_flux

from kontext_min.adapters.__main__ import main
from kontext_min.adapters.inject import apply_updates
from kontext_min.adapters.layers import LoKr, LoRA
from kontext_min.adapters.merge import merge_into, reduced
from kontext_min.adapters.read import read_adapter
from kontext_min.adapters.write import write_adapter
from kontext_min.checkpoints.load import Checkpoint, Component, find, find_component, load_flux
from kontext_min.checkpoints.save import stream

Q, K, V = (f"transformer_blocks.0.attn.to_{part}" for part in "qkv")
QKV, LINEAR1 = "double_blocks.0.img_attn.qkv", "single_blocks.1.linear1"
MLP, TOP = "single_transformer_blocks.1.proj_mlp", "norm_out.linear"
SHAPES = {Q: (64, 64), K: (64, 64), V: (64, 64), QKV: (192, 64), MLP: (256, 64), TOP: (128, 64), LINEAR1: (448, 64)}


def lora(name: str, rank: int = 4, seed: int = 0, size: float = 0.1) -> LoRA:
    rows, inputs = SHAPES[name]
    return LoRA(name, tiny.random(rank, inputs, seed=seed), size * tiny.random(rows, rank, seed=seed + 1), 0.5)


def lokr(name: str) -> LoKr:
    rows, inputs = SHAPES[name]
    w2 = (tiny.random(16, 3, seed=1), tiny.random(3, 8, seed=2))
    return LoKr(name, (0.1 * tiny.random(rows // 16, inputs // 8, seed=3),), w2, 0.5)


def write(path: Path, *updates, form: str = "diffusers") -> Path:
    write_adapter(path, updates, {"prompt": ["x"]}, FP32, form)
    return path


def run(*words):
    main([str(word) for word in words])


def change(path: Path, name: str) -> torch.Tensor:
    """delta-W of a module as a diffusers file has it, by hand."""
    tensors = load_file(path)
    return tensors[f"transformer.{name}.lora_B.weight"] @ tensors[f"transformer.{name}.lora_A.weight"]


# ------------------------------------------------------------------------------------------------ convert, inspect


def test_convert_says_what_it_did_and_keeps_the_recipe(tmp_path, capsys):
    source = write(tmp_path / "in.safetensors", lora(Q), lora(V, seed=3), lora(TOP, seed=5))
    run("convert", source, tmp_path / "out.safetensors", "--to", "kohya", "--dtype", "fp32")
    said = capsys.readouterr().out
    assert re.search(
        r"in.safetensors: diffusers LoRA, 3 modules, at strength 1\n.*out.safetensors: kohya; .* same to 0.0e", said
    )
    assert "note: diffusers silently leaves out DoRA's magnitudes and linears that are outside" in said
    tensors = load_file(tmp_path / "out.safetensors")
    up, down = (tensors[f"lora_unet_double_blocks_0_img_attn_qkv.lora_{half}.weight"] for half in ("up", "down"))
    expected = torch.cat([change(source, Q), torch.zeros(64, 64), change(source, V)])
    assert error(up @ down, expected) < 1e-6
    assert read_adapter(tmp_path / "out.safetensors").recipe == {"prompt": ["x"]}


@torch.no_grad()
def test_inspect_shows_a_page_of_80_columns(tmp_path, capsys):
    run(
        "inspect",
        write(
            tmp_path / "in.safetensors",
            lora(Q),
            lora(V, rank=6, seed=3, size=0.2),
            lora(MLP),
            lokr(TOP),
            form="lycoris",
        ),
    )
    said = capsys.readouterr().out
    assert "lycoris LoKr and LoRA, 4 modules" in said and "rank: 3, 4, 6\nalpha: 3, 4, 6\nalpha / rank: 1\n" in said
    norms = dict(re.findall(r"^  (\S+) +([\d.]+) #+$", said, flags=re.M))
    q, v = (update.delta() for update in (lora(Q), lora(V, rank=6, seed=3, size=0.2)))
    assert float(norms["double_blocks.0"]) == pytest.approx(float(torch.cat([q, v]).norm()), abs=1e-4)
    assert float(norms["outside"]) == pytest.approx(float(lokr(TOP).delta().norm()), abs=1e-4)
    assert "kontext_min:\n" in said and "    prompt: ['x']" in said
    assert max(map(len, said.splitlines()[2:])) <= 80


# ------------------------------------------------------------------------------------------------ rank


@pytest.mark.parametrize("update", [lokr(QKV), lora(LINEAR1, rank=9), lokr(TOP)], ids=["lokr", "lora", "other lokr"])
@pytest.mark.parametrize("rank", [1, 4, 64])
@torch.no_grad()
def test_lower_rank_loses_what_torch_says_it_must(update, rank):
    """Eckart-Young: the error is the tail of the singular values, and no other matrix of that rank is closer."""
    (made,), lost = reduced([update], rank, fused=True)
    values = torch.linalg.svdvals(update.delta().double())
    assert made.A.shape[0] <= rank
    assert lost == pytest.approx(float(values[rank:].norm() / values.norm()), abs=1e-6)
    assert error(made.delta(), update.delta()) == pytest.approx(lost, abs=2e-6)


def test_lokr_becomes_a_lora_on_request_only(tmp_path, capsys):
    source, out = write(tmp_path / "lokr.safetensors", lokr(Q), form="lycoris"), tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match="diffusers files cannot hold a LoKr; --rank"):
        run("convert", source, out, "--to", "diffusers")
    run("convert", source, out, "--to", "diffusers", "--rank", 24, "--dtype", "fp32")
    assert "rank 24 at most, by SVD: 0.000% of the change is lost" in capsys.readouterr().out
    assert error(change(out, Q), lokr(Q).delta()) < 1e-6
    run("convert", source, out, "--to", "diffusers", "--rank", 2, "--force")
    values = torch.linalg.svdvals(lokr(Q).delta().detach())
    assert f"{float(values[2:].norm() / values.norm()):.3%} of the change is lost" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["kohya", "comfy", "bfl"])
@torch.no_grad()
def test_rank_is_that_of_the_file_also_where_its_modules_are_fused(form, tmp_path, capsys):
    given = [lora(name, 4, seed=seed) for seed, name in enumerate((Q, K, V, LINEAR1))]
    source, out = write(tmp_path / "in.safetensors", *given), tmp_path / "out.safetensors"
    run("convert", source, out, "--to", form, "--rank", 5, "--dtype", "fp32")
    made = {update.name: update for update in read_adapter(out).updates}
    assert {name: update.rank for name, update in made.items()} == {QKV: 5, LINEAR1: 4}
    whole = torch.cat([update.delta() for update in given[:3]])
    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    assert error(made[QKV].delta(), u[:, :5] * s[:5] @ v[:5]) < 1e-5
    lost = float(s[5:].norm() / torch.cat([whole.flatten(), given[3].delta().flatten()]).norm())
    assert f"{lost:.3%} of the change is lost" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ several into one


def test_several_loras_become_one_whose_ranks_add(tmp_path, capsys):
    first = write(tmp_path / "a.safetensors", lora(Q, 4), lora(MLP, 2))
    second = write(tmp_path / "b.safetensors", lora(QKV, 3, seed=7), form="kohya")
    run("merge", first, f"{second}:-0.5", tmp_path / "out.safetensors", "--dtype", "fp32")
    fused = -0.5 * lora(QKV, 3, seed=7).delta()
    assert error(change(tmp_path / "out.safetensors", Q), lora(Q, 4).delta() + fused[:64]) < 1e-6
    assert error(change(tmp_path / "out.safetensors", V), fused[128:]) < 1e-6
    assert error(change(tmp_path / "out.safetensors", MLP), lora(MLP, 2).delta()) < 1e-6
    ranks = {u.name: len(u.A) for u in read_adapter(tmp_path / "out.safetensors").updates}
    assert ranks[Q] == 7 and ranks[V] == 3 and ranks[MLP] == 2
    run("merge", first, f"{second}:-0.5", tmp_path / "small.safetensors", "--rank", 3, "--dtype", "fp32")
    total = lora(Q, 4).delta() + fused[:64]
    u, s, v = torch.linalg.svd(total)
    assert error(change(tmp_path / "small.safetensors", Q), u[:, :3] * s[:3] @ v[:3]) < 1e-5
    assert "rank 3 at most, by SVD" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
@torch.no_grad()
def test_with_a_rank_a_lokr_is_added_to_a_lora(form, tmp_path, capsys):
    files = [write(tmp_path / f"{i}.safetensors", u, form="lycoris") for i, u in enumerate((lokr(Q), lora(Q, 4)))]
    run("merge", *files, tmp_path / "out.safetensors", "--to", form, "--rank", 16, "--dtype", "fp32")  # 4 * 3 + 4
    (made,) = read_adapter(tmp_path / "out.safetensors").updates
    assert error(made.delta()[:64], lokr(Q).delta() + lora(Q, 4).delta()) < 1e-5 and made.rank == 16
    assert "0.000% of the change is lost" in capsys.readouterr().out


@torch.no_grad()
def test_a_lokr_of_a_fused_module_is_weakened_without_being_cut(tmp_path):
    update = LoKr(QKV, (tiny.random(4, 8),), (tiny.random(48, 8),), 1.0)  # 48 rows are no part of 64
    file = write(tmp_path / "in.safetensors", update, form="kohya")
    run("merge", f"{file}:0.5", tmp_path / "out.safetensors", "--to", "kohya", "--dtype", "fp32")
    (made,) = read_adapter(tmp_path / "out.safetensors").updates
    assert isinstance(made, LoKr) and error(made.delta(), 0.5 * update.delta()) < 1e-6


def test_a_dora_of_diffusers_becomes_one_that_comfyui_reads(tmp_path, capsys):  # as the card says
    update = lora(Q)
    update.magnitude = torch.nn.Parameter(1 + tiny.random(64, seed=5).abs())
    source, out = write(tmp_path / "in.safetensors", update), tmp_path / "out.safetensors"
    run("convert", source, tmp_path / "same.safetensors", "--to", "diffusers")
    assert "note: ComfyUI and others read it, but not DoRA" in capsys.readouterr().out
    run("convert", source, out, "--to", "lycoris")
    assert torch.equal(load_file(out)[f"lycoris_{Q.replace('.', '_')}.dora_scale"], update.magnitude[:, None])


def test_the_transformers_part_of_a_file_is_written_on_request(tmp_path, capsys):
    source, out = write(tmp_path / "in.safetensors", lora(Q), form="kohya"), tmp_path / "out.safetensors"
    te = {f"lora_te1_text_model.{name}": torch.ones(4, 4) for name in ("lora_down.weight", "lora_up.weight")}
    save_file(load_file(source) | te | {"lora_te1_text_model.alpha": torch.tensor(4.0)}, source)
    with pytest.raises(ValueError, match="3 tensors change a text encoder.*convert --transformer-only leaves them out"):
        run("convert", source, out, "--to", "diffusers")
    run("convert", source, out, "--to", "diffusers", "--dtype", "fp32", "--transformer-only")
    assert "in.safetensors: 3 tensors of a text encoder are left out\n" in capsys.readouterr().out
    assert error(change(out, Q), lora(Q).delta()) < 1e-6


# ------------------------------------------------------------------------------------------------ into the base


def adapters(folder: Path) -> tuple[list[Path], list]:
    """Two files, of split and fused modules, one of them a LoKr, and of a DoRA; and their updates."""
    dora = lora("single_blocks.1.linear1", seed=11)
    dora.magnitude = torch.nn.Parameter(0.5 + tiny.random(448, seed=13).abs())
    updates = [lora(Q), lora(MLP, seed=2), lora(TOP, seed=4)], [lokr(QKV), dora]
    files = [write(folder / f"{i}.safetensors", *some, form="kohya") for i, some in enumerate(updates)]
    return files, updates


@pytest.mark.parametrize("layout", ["diffusers", "bfl"])
@torch.no_grad()
def test_merged_model_is_the_model_with_the_adapters(layout, kontext, single_files, tmp_path):
    """Every weight is W + delta-W by hand (DoRA's rows have its lengths), and the output is that of the adapters."""
    (first, second), (plain, other) = adapters(tmp_path)
    base = kontext if layout == "diffusers" else single_files / "flux1-kontext-dev.safetensors"
    out = tmp_path / ("transformer" if layout == "diffusers" else "merged.safetensors")
    run("merge", "--base", base, first, f"{second}:0.5", out, "--dtype", "fp32")

    before = tiny.read_part(single_files) if layout == "bfl" else tiny.read_part(kontext / "transformer")
    after = tiny.read_part(out) if out.is_dir() else load_file(out)
    original = {name: before[name].float() for name in after}
    if layout == "bfl":
        w = original[f"{LINEAR1}.weight"]
        expected = w.clone()
        expected[192:] += plain[1].delta()
    else:  # the same rows of the four parts, one after the other
        names = [
            f"single_transformer_blocks.1.{part}.weight" for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        ]
        w = torch.cat([original[name] for name in names])
        expected = w.clone()
        expected[192:] += plain[1].delta()
        after[f"{LINEAR1}.weight"] = torch.cat([after[name] for name in names])
    turned = w + other[1].delta()
    expected += 0.5 * (other[1].magnitude[:, None] * turned / turned.norm(dim=1, keepdim=True) - w)
    assert error(after[f"{LINEAR1}.weight"], expected) < 1e-6

    name = f"{QKV}.weight" if layout == "bfl" else f"{Q}.weight"
    assert error(after[name][:64] - original[name][:64], plain[0].delta() + 0.5 * other[0].delta()[:64]) < 1e-5
    top, delta = ("final_layer.adaLN_modulation.1", plain[2].delta())
    if layout == "diffusers":
        top, delta = TOP, torch.cat(delta.chunk(2)[::-1])
    assert error(after[f"{top}.weight"] - original[f"{top}.weight"], delta) < 1e-5

    flux = load_flux(tiny.part(kontext, "transformer"), CPU, FP32)
    for file, strength in ((first, 1.0), (second, 0.5)):
        apply_updates(flux, read_adapter(file).updates, strength, FP32)
    given = tiny.flux_inputs(flux.config)
    component = find_component(out.parent, "transformer") if out.is_dir() else Component((out,), {})
    merged = load_flux(Checkpoint(tmp_path, {"transformer": component}, None), CPU, FP32)
    assert error(merged(**given), flux(**given)) < 1e-5
    if layout == "diffusers":
        diffusers = pytest.importorskip("diffusers")
        theirs = diffusers.FluxTransformer2DModel.from_pretrained(out, dtype=FP32)
        assert error(run_flux(theirs, **given), flux(**given)) < 1e-5
        assert len(list(out.iterdir())) == 2 and len(list((kontext / "transformer").glob("*.safetensors"))) > 1


def contents(folder):
    """Each file's bytes and when it was last written; when it was last read does not count."""
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("layout", ["diffusers", "single files"])
@pytest.mark.parametrize("again", [False, True])
@torch.no_grad()
def test_a_merged_folder_is_a_whole_model(again, layout, kontext, single_files, tmp_path):
    base, out = kontext if layout == "diffusers" else single_files, tmp_path / "merged"
    file, before = write(tmp_path / "a.safetensors", lora(Q)), contents(base)
    for _ in range(1 + again):
        run("merge", "--base", base, file, out, "--dtype", "fp32", "--force")
    assert contents(base) == before
    given, merged = find(base), find(out)
    assert merged.components["transformer"].files[0].parent == out / "transformer"
    for part in ("vae", "text_encoder", "text_encoder_2"):
        theirs, ours = (found.components[part].files for found in (given, merged))
        assert [path.resolve() for path in ours] == [path.resolve() for path in theirs]
    flux, inputs = load_flux(given, CPU, FP32), tiny.flux_inputs(load_flux(given, CPU, FP32).config)
    apply_updates(flux, [lora(Q)], 1.0, FP32)
    assert error(load_flux(merged, CPU, FP32)(**inputs), flux(**inputs)) < 1e-5


def test_merge_leaves_all_else_to_the_last_bit_and_says_what_rounding_lost(kontext, tmp_path, capsys):
    file, out = write(tmp_path / "a.safetensors", lora(Q)), tmp_path / "transformer"
    run("merge", "--base", kontext, file, out)
    before, after = tiny.read_part(kontext / "transformer"), tiny.read_part(out)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == [f"{Q}.weight"]
    w, merged = before[f"{Q}.weight"].float(), before[f"{Q}.weight"].float() + lora(Q).delta()
    lost = float((merged.bfloat16().float() - merged).norm() / (merged - w).norm())
    assert f"rounded to bf16: {lost:.2%} of it is lost" in capsys.readouterr().out
    assert not list(out.glob("*.tmp"))


def test_names_with_a_prefix_are_kept(single_files, tmp_path):
    base = load_file(single_files / "flux1-kontext-dev.safetensors")
    save_file({f"model.diffusion_model.{name}": t for name, t in base.items()}, tmp_path / "base.safetensors")
    run(
        "merge",
        "--base",
        tmp_path / "base.safetensors",
        write(tmp_path / "a.safetensors", lora(Q)),
        tmp_path / "o.safetensors",
    )
    assert load_file(tmp_path / "o.safetensors").keys() == load_file(tmp_path / "base.safetensors").keys()


def test_merging_takes_the_memory_of_one_tensor_not_of_the_model(tmp_path):
    """206 MB in bf16, of which the largest is 3.7 MB, 7.3 MB in fp32; 100 MB are allowed, for a few
    of these, for what the allocator keeps of them, and for what the first product of matrices sets up."""
    hidden, blocks = 512, 26
    shapes = {"img_in.weight": (hidden, 64), "txt_in.weight": (hidden, 64), "vector_in.in_layer.weight": (hidden, 64)}
    shapes |= {
        "double_blocks.0.img_attn.norm.query_norm.scale": (64,),
        "double_blocks.0.img_mlp.0.weight": (2048, hidden),
    }
    for i in range(blocks):
        shapes |= {
            f"single_blocks.{i}.linear1.weight": (3584, hidden),
            f"single_blocks.{i}.linear2.weight": (hidden, 2560),
        }
        shapes |= {f"single_blocks.{i}.modulation.lin.weight": (1536, hidden)}
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    stream(base, ((name, torch.ones(shape, dtype=torch.bfloat16)) for name, shape in shapes.items()))
    updates = [
        LoRA(f"single_blocks.{i}.linear1", torch.ones(1, hidden), torch.ones(3584, 1), 1.0) for i in range(blocks)
    ]
    peak, done = [0], threading.Event()

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.002)

    watcher, before = threading.Thread(target=watch), anonymous()
    watcher.start()
    with torch.no_grad():
        merge_into(base, updates, out, torch.bfloat16)
    done.set()
    watcher.join()
    assert base.stat().st_size > 2e8
    assert peak[0] - before < 1e8
    merged = load_file(out)
    assert (merged["single_blocks.7.linear1.weight"] == 2).all() and (
        merged["single_blocks.7.linear2.weight"] == 1
    ).all()


def anonymous() -> int:
    """Bytes of memory that are not pages of a file."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


# ------------------------------------------------------------------------------------------------ quantised bases


@pytest.mark.parametrize("kept", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_a_base_whose_weights_to_change_are_quantised_is_refused(kept, single_files, tmp_path):
    tensors = load_file(single_files / "flux1-kontext-dev.safetensors")
    tensors[f"{QKV}.weight"] = tensors[f"{QKV}.weight"].to(kept)
    save_file(tensors, tmp_path / "base.safetensors")
    file, other = (write(tmp_path / f"{name}.safetensors", lora(name)) for name in (Q, MLP))
    with pytest.raises(ValueError, match=f"1 weights are quantised; merge into the bf16 model, .*: {QKV}.weight$"):
        run("merge", "--base", tmp_path / "base.safetensors", file, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    if kept is torch.float8_e4m3fn:  # one that is not to be changed may be
        run("merge", "--base", tmp_path / "base.safetensors", other, tmp_path / "out.safetensors")


# ------------------------------------------------------------------------------------------------ refused

REFUSED = {
    "out is there": (["convert", "a", "a", "--to", "kohya"], "a.safetensors is there already.*--force"),
    "no such file": (["inspect", "gone"], "gone.safetensors does not exist"),
    "rank 0": (["convert", "a", "new", "--to", "kohya", "--rank", "0"], "--rank 0"),
    "rank with base": (["merge", "--base", "base", "a", "new", "--rank", "2"], "--rank and --to are of adapters"),
    "another model's": (["merge", "--base", "base", "wide", "new"], "made for another model"),
    "no base": (["merge", "--base", "gone", "a", "new"], "gone.safetensors"),
    "not a base": (["merge", "--base", "a", "a", "new"], "img_in"),
    "two doras": (["merge", "dora", "a", "new"], "DoRA cannot be added"),
    "weaker dora": (["merge", "dora:0.5", "new"], "DoRA cannot be added to others or weakened"),
    "lokr and lora": (["merge", "lokr", "a", "new"], "Kronecker product.*--rank"),
    "file into folder": (["merge", "--base", "base", "a", "folder"], "folder must be a .safetensors file, as .*base"),
    "file into a folder there": (["merge", "--base", "base", "a", ".", "--force"], "must be a .safetensors file, as"),
    "folder into file": (["merge", "--base", "model", "a", "new"], "must be a folder, as .*kontext.* is"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_one_sentence_and_exit_code_1(
    case, kontext, single_files, tmp_path, monkeypatch, capsys
):
    shutil.copy(single_files / "flux1-kontext-dev.safetensors", tmp_path / "base.safetensors")
    write(tmp_path / "a.safetensors", lora(Q))
    write(tmp_path / "wide.safetensors", LoRA(Q, torch.ones(2, 96), torch.ones(96, 2), 1.0))
    write(tmp_path / "lokr.safetensors", lokr(Q), form="lycoris")
    dora = lora(Q)
    dora.magnitude = torch.nn.Parameter(torch.ones(64))
    write(tmp_path / "dora.safetensors", dora)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    words, sentence = REFUSED[case]
    names = {"a", "new", "gone", "base", "wide", "lokr", "dora"}
    words = [f"{tmp_path / word}.safetensors" if word in names else word for word in words]
    words = [
        {"model": str(kontext), "folder": f"{tmp_path}/folder", ".": str(tmp_path)}.get(word, word) for word in words
    ]
    words = [word.replace("dora:", f"{tmp_path / 'dora'}.safetensors:") for word in words]
    monkeypatch.setattr(sys, "argv", ["adapters", *words])
    monkeypatch.delitem(sys.modules, "kontext_min.adapters.__main__")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("kontext_min.adapters", run_name="__main__")
    assert re.search(sentence, ended.value.code) and "\n" not in ended.value.code
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_merge_that_fails_half_way_leaves_what_was_there(kontext, tmp_path, monkeypatch):
    file, out = write(tmp_path / "a.safetensors", lora(TOP)), tmp_path / "transformer"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    monkeypatch.setattr(
        "kontext_min.adapters.merge.with_updates", lambda *_: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        run("merge", "--base", kontext, file, out, "--force")
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_a_merge_beside_other_weights_that_would_be_read_with_it_is_refused(kontext, tmp_path):
    file, out = write(tmp_path / "a.safetensors", lora(TOP)), tmp_path / "transformer"
    out.mkdir()
    (out / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds diffusion_pytorch_model.safetensors.index.json, too, .* a new folder"):
        run("merge", "--base", kontext, file, out, "--force")
    assert len([*out.iterdir()]) == 1


def test_the_program_runs_by_its_name(tmp_path):
    file = write(tmp_path / "a.safetensors", lora(Q))
    program = [sys.executable, "-m", "kontext_min.adapters", "inspect", str(file)]
    shown = subprocess.run(program, capture_output=True, text=True, check=True).stdout
    assert "diffusers LoRA, 1 modules" in shown
