"""What is written, read by its format's definition and the published files' table of names, not by our reader."""

import json
from copy import deepcopy

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import CPU, FP32, error, run_flux
from torch import Tensor

from kontext_min.adapters import write
from kontext_min.adapters.inject import apply_updates
from kontext_min.adapters.layers import LoKr, LoRA
from kontext_min.adapters.read import read_adapter
from kontext_min.adapters.write import WRITTEN, write_adapter
from kontext_min.checkpoints.load import load_flux

HIDDEN = 64
ROWS = {"proj_mlp": 256, "ff.net.0.proj": 256, "norm.linear": 192, "norm1.linear": 384, "norm_out.linear": 128}
INPUTS = {"ff.net.2": 256, "single_transformer_blocks.1.proj_out": 320}
SPLIT = [  # all parts of a fused linear, one of three, all but the last of four, and linears that are alike in both
    *(f"transformer_blocks.0.attn.{part}" for part in ("to_q", "to_k", "to_v")),
    "transformer_blocks.1.attn.add_k_proj",
    *(f"single_transformer_blocks.0.attn.{part}" for part in ("to_q", "to_k", "to_v")),
    "single_transformer_blocks.1.proj_mlp",
    "transformer_blocks.1.ff.net.2",
    "transformer_blocks.0.ff.net.0.proj",
    "transformer_blocks.0.norm1.linear",
    "single_transformer_blocks.1.proj_out",
    "single_transformer_blocks.1.norm.linear",
    "norm_out.linear",
    "proj_out",
]
FUSED = {"double_blocks.0.img_attn.qkv": 192, "single_blocks.1.linear1": 448}
PREFIX = {"diffusers": "transformer.", "kohya": "lora_unet_", "comfy": "diffusion_model.", "bfl": "base_model.model.",
          "lycoris": "lycoris_", "ai-toolkit": "transformer."}  # fmt: skip


def shape(name: str) -> tuple[int, int]:
    """(rows, in) of a module of the tiny model."""
    found = [next((v for k, v in table.items() if name.endswith(k)), HIDDEN) for table in (ROWS, INPUTS)]
    return FUSED.get(name, found[0]), found[1]


def lora(name: str, rank: int = 4, alpha: float = 4, seed: int = 0) -> LoRA:
    rows, inputs = shape(name)
    a, b = tiny.random(rank, inputs, seed=seed), tiny.random(rows, rank, seed=seed + 1)
    return LoRA(name, a, b, alpha / rank)


def lokr(name: str, step: int, factored: bool, scale: float = 1.0) -> LoKr:
    """w2 has `step` rows."""
    rows, inputs = shape(name)
    w2 = (tiny.random(step, 2), tiny.random(2, 8, seed=2)) if factored else (tiny.random(step, 8),)
    return LoKr(name, (tiny.random(rows // step, inputs // 8, seed=3),), w2, scale)


# ------------------------------------------------------------------------------------------------ by definition


def bfl_rows(name: str) -> tuple[str, int, bool]:
    """diffusers' name -> BFL's, its first row there, and whether its halves change places."""
    for row in tiny.table("transformer_map"):
        if row["diffusers_name"] == f"{name}.weight":
            first = int(row["op"][5:].split(":")[0]) * HIDDEN // 3072 if row["op"].startswith("rows") else 0
            return row["bfl_name"].removesuffix(".weight"), first, row["op"].startswith("cat")
    raise KeyError(name)


def add(total: dict[str, Tensor], name: str, delta: Tensor, ours: bool):
    """Put a module's delta-W where it belongs in BFL's weights; `ours`: its rows are in BFL's order already."""
    first, swapped = 0, False
    if "transformer_blocks." in name or name in ("norm_out.linear", "proj_out", "x_embedder"):
        name, first, swapped = bfl_rows(name)
    whole = {"qkv": 192, "linear1": 448}.get(name.rpartition(".")[2], len(delta))
    delta = torch.cat(delta.chunk(2)[::-1]) if swapped and not ours else delta
    total.setdefault(name, torch.zeros(whole, *delta.shape[1:]))[first : first + len(delta)] += delta


def expected(updates) -> dict[str, Tensor]:
    total = {}
    for update in updates:
        if isinstance(update, LoRA):
            delta = update.scale * update.B.detach() @ update.A.detach()
        else:
            sides = [
                torch.linalg.multi_dot(list(side)) if len(side) > 1 else side[0] for side in (update.w1, update.w2)
            ]
            delta = update.scale * torch.kron(*sides).detach()
        add(total, update.name, delta, ours=True)
    return total


def by_definition(path, form: str) -> dict[str, Tensor]:
    """delta-W = strength * B A or strength * kron(w1, w2), as the formats have it: alpha / rank; 1 without alpha."""
    tensors, names = load_file(path), {}
    for row in tiny.table("transformer_map"):
        for name in (row["diffusers_name"], row["bfl_name"]):
            module = name.removesuffix(".weight")
            names[PREFIX[form] + (module.replace(".", "_") if PREFIX[form].endswith("_") else module)] = module
    total, stems = {}, {stem: {} for stem in names}
    for key, tensor in tensors.items():
        stem = next(s for s in sorted(names, key=len, reverse=True) if key.startswith(f"{s}."))
        stems[stem][key.removeprefix(f"{stem}.")] = tensor.float()
    for stem, parts in stems.items():
        if not parts:
            continue
        if "lokr_w1" in parts:
            w2 = parts["lokr_w2"] if "lokr_w2" in parts else parts["lokr_w2_a"] @ parts["lokr_w2_b"]
            scale = 1.0 if "lokr_w2" in parts else parts["alpha"].item() / len(parts["lokr_w2_b"])
            delta = scale * torch.kron(parts["lokr_w1"], w2)
        else:
            a, b = ("lora_A", "lora_B") if "lora_A.weight" in parts else ("lora_down", "lora_up")
            a, b = parts[f"{a}.weight"], parts[f"{b}.weight"]
            delta = (parts["alpha"].item() / len(a) if "alpha" in parts else 1.0) * (b @ a)
        add(total, names[stem], delta, ours=False)
    return total


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-6):
    for name in ours.keys() | theirs.keys():
        assert error(theirs[name], ours[name]) < tolerance, name


# ------------------------------------------------------------------------------------------------ every format

SETS = {
    "split": [lora(name, rank=2 + i % 3, alpha=4, seed=2 * i) for i, name in enumerate(SPLIT)],
    "fused": [lora(name, rank=3, alpha=1.5, seed=i) for i, name in enumerate(FUSED)],
}


@pytest.mark.parametrize("given", SETS)
@pytest.mark.parametrize("form", WRITTEN)
def test_file_holds_the_same_change_of_every_weight(form, given, tmp_path):
    path = tmp_path / "lora.safetensors"
    worst = write_adapter(path, SETS[given], {}, FP32, form)
    assert_same(by_definition(path, form), expected(SETS[given]))
    assert worst < 1e-6
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("form", WRITTEN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_its_rounding(dtype, form, tmp_path):
    path = tmp_path / "lora.safetensors"
    worst = write_adapter(path, SETS["split"], {}, dtype, form)
    assert_same(by_definition(path, form), expected(SETS["split"]), 2 * worst)
    assert 1e-5 < worst < {torch.bfloat16: 5e-3, torch.float16: 6e-4}[dtype]


def test_there_and_back_keeps_ranks(tmp_path):
    """Stacked A and block-diagonal B come apart again; a shared A is stored once."""
    split = [update for update in SETS["split"] if update.name.startswith("transformer_blocks.0.attn")]
    for form, back in (("kohya", "diffusers"), ("diffusers", "comfy")):
        given = split if form == "kohya" else SETS["fused"][:1]
        write_adapter(tmp_path / "there.safetensors", given, {}, FP32, form)
        there = read_adapter(tmp_path / "there.safetensors").updates
        write_adapter(tmp_path / "back.safetensors", there, {}, FP32, back)
        returned = read_adapter(tmp_path / "back.safetensors").updates
        assert {u.name: u.A.shape for u in returned} == {u.name: u.A.shape for u in given}
        assert_same(expected(returned), expected(given))


def test_several_updates_of_one_module_become_one(tmp_path):
    """Of the same rows, and of a fused linear beside one of its parts."""
    name, (fused, _) = SPLIT[0], FUSED
    given = [lora(name, 2), lora(name, 3, 6, seed=5), lora(fused, 2, seed=7)]
    for form in ("diffusers", "kohya"):
        write_adapter(tmp_path / "lora.safetensors", given, {}, FP32, form)
        assert_same(by_definition(tmp_path / "lora.safetensors", form), expected(given))


def test_strength_is_baked_in_so_that_alpha_equals_rank(tmp_path):
    for form in ("kohya", "comfy", "lycoris"):
        write_adapter(tmp_path / "lora.safetensors", SETS["split"], {}, torch.bfloat16, form)
        tensors = load_file(tmp_path / "lora.safetensors")
        alphas = [key for key in tensors if key.endswith(".alpha")]
        assert alphas and 3 * len(alphas) == len(tensors)
        for key in alphas:
            assert tensors[key].item() == len(tensors[key.replace("alpha", "lora_down.weight")])


def test_header_tells_other_programs_what_they_look_for(tmp_path):
    heads = {}
    for form in WRITTEN:
        worst = write_adapter(tmp_path / form, [lora(SPLIT[0], 8)], {"prompt": ["x"], "title": "mine"}, FP32, form)
        with safe_open(tmp_path / form, framework="pt") as file:
            heads[form] = file.metadata()
        assert float(heads[form]["kontext_min_error"]) == pytest.approx(worst, rel=0.1)
        assert json.loads(heads[form]["kontext_min"])["prompt"] == ["x"]
        assert heads[form]["modelspec.sai_model_spec"] == "1.0.0" and heads[form]["modelspec.title"] == "mine"
    assert {form for form, head in heads.items() if "lora_adapter_metadata" in head} == {"diffusers"}
    ours = {form for form, head in heads.items() if "black-forest-labs/flux" in head["modelspec.implementation"]}
    assert ours == {"kohya", "comfy", "bfl"}


# ------------------------------------------------------------------------------------------------ LoKr

Q, QKV = "transformer_blocks.0.attn.to_q", "double_blocks.0.img_attn.qkv"
LOKRS = {
    "full": lokr(Q, 8, factored=False),
    "factored": lokr(Q, 8, factored=True, scale=0.25),
    "plain": lokr("transformer_blocks.0.ff.net.0.proj", 16, factored=True, scale=2.0),
    "swapped": lokr("norm_out.linear", 16, factored=True, scale=3.0),
    "fused": lokr(QKV, 16, factored=True, scale=0.5),
}


@pytest.mark.parametrize("given", LOKRS)
@pytest.mark.parametrize("form", ["lycoris", "ai-toolkit", "kohya", "comfy"])
def test_lokr_is_written_where_it_stays_one(form, given, tmp_path):
    path, update = tmp_path / "lokr.safetensors", LOKRS[given]
    if form in ("kohya", "comfy") and update.name == Q:
        with pytest.raises(ValueError, match=f"only a part of {QKV}.*--rank"):
            write_adapter(path, [update], {}, FP32, form)
        return
    write_adapter(path, [update], {}, FP32, form)
    assert_same(by_definition(path, form), expected([update]))
    assert all("lokr" in key or "alpha" in key for key in load_file(path))


@pytest.mark.parametrize("form", ["diffusers", "bfl"])
def test_lokr_is_refused_where_there_is_none_with_the_remedy(form, tmp_path):
    with pytest.raises(ValueError, match=f"{form} files cannot hold a LoKr; --rank"):
        write_adapter(tmp_path / "lokr.safetensors", [LOKRS["plain"]], {}, FP32, form)
    with pytest.raises(ValueError, match="blocks of 48 rows, which cannot be cut for .*to_q.*--rank"):
        write_adapter(tmp_path / "lokr.safetensors", [lokr(QKV, 48, factored=False)], {}, FP32, "lycoris")
    assert not list(tmp_path.iterdir())


def assert_same_velocity(kontext, given, theirs):
    """These updates change our model, and to what diffusers' adapted one gives."""
    flux = load_flux(tiny.part(kontext, "transformer"), CPU, FP32)
    inputs = tiny.flux_inputs(flux.config)
    base = flux(**inputs)
    apply_updates(flux, given, 1.0, FP32)
    assert error(flux(**inputs), run_flux(theirs, **inputs)) < 1e-5
    assert error(flux(**inputs), base) > 0.05


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("merged", [True, False])
@torch.no_grad()
def test_lycoris_does_with_our_file_what_we_do(merged, kontext, tmp_path):
    library, diffusers = pytest.importorskip("lycoris"), pytest.importorskip("diffusers")
    given = deepcopy([LOKRS["plain"], LOKRS["factored"], lora("proj_out", alpha=2), LOKRS["swapped"], SETS["fused"][1]])
    for update in given:
        update.scale *= 0.05
    write_adapter(tmp_path / "lora.safetensors", given, {}, FP32, "lycoris")
    theirs = diffusers.FluxTransformer2DModel.from_pretrained(kontext / "transformer", dtype=FP32)
    library.LycorisNetwork.apply_preset({"lora_prefix": "lycoris"})  # of the class: other tests change it
    network, _ = library.create_lycoris_from_weights(1.0, str(tmp_path / "lora.safetensors"), theirs)
    (network.merge_to if merged else network.apply_to)()
    assert_same_velocity(kontext, given, theirs)


# ------------------------------------------------------------------------------------------------ DoRA


def with_magnitude(update, seed: int = 9):
    update.magnitude = torch.nn.Parameter(1 + tiny.random(update.shape[0], seed=seed).abs())
    return update


def test_magnitudes_are_joined_cut_and_swapped_like_rows(tmp_path):
    path = tmp_path / "dora.safetensors"
    q, k, v, top = (with_magnitude(lora(name), seed) for seed, name in enumerate([*SPLIT[:3], "norm_out.linear"]))
    m = [update.magnitude.detach() for update in (q, k, v, top)]
    write_adapter(path, [q, k, v, top], {}, torch.bfloat16, "kohya")
    tensors = load_file(path)
    assert torch.equal(tensors["lora_unet_double_blocks_0_img_attn_qkv.dora_scale"], torch.cat(m[:3])[:, None])
    assert torch.equal(tensors["lora_unet_final_layer_adaLN_modulation_1.dora_scale"], m[3][:, None])
    fused = read_adapter(path).updates
    write_adapter(path, fused, {}, torch.bfloat16, "diffusers")
    tensors = load_file(path)
    for update, values in zip((q, k, v), m, strict=False):
        assert torch.equal(tensors[f"transformer.{update.name}.lora_magnitude_vector"], values)
    assert torch.equal(tensors["transformer.norm_out.linear.lora_magnitude_vector"], torch.cat(m[3].chunk(2)[::-1]))
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["transformer.use_dora"] is True


@torch.no_grad()
def test_dora_does_in_diffusers_what_it_does_here(kontext, tmp_path):
    """Of parts of a fused linear, of a whole one, and of the one whose halves change places."""
    diffusers = pytest.importorskip("diffusers")
    given = [with_magnitude(lora(SPLIT[i], alpha=2, seed=i), seed=i) for i in (0, 2, 9, 13)]
    write_adapter(tmp_path / "pytorch_lora_weights.safetensors", given, {}, FP32)
    theirs = diffusers.FluxTransformer2DModel.from_pretrained(kontext / "transformer", dtype=FP32)
    theirs.load_lora_adapter(tmp_path, prefix="transformer", weight_name="pytorch_lora_weights.safetensors")
    assert_same_velocity(kontext, given, theirs)


def test_dora_is_refused_where_it_cannot_be_said(tmp_path):
    path = tmp_path / "dora.safetensors"
    with pytest.raises(ValueError, match="bfl files cannot hold DoRA"):
        write_adapter(path, [with_magnitude(lora("proj_out"))], {}, FP32, "bfl")
    with pytest.raises(ValueError, match="qkv has DoRA on some of its rows only; a lycoris file"):
        write_adapter(path, [with_magnitude(lora(SPLIT[0])), lora(SPLIT[1])], {}, FP32, "kohya")
    with pytest.raises(ValueError, match="some modules have DoRA and some do not, .* lycoris can"):
        write_adapter(path, [with_magnitude(lora(SPLIT[0])), lora(SPLIT[1])], {}, FP32, "diffusers")
    assert not list(tmp_path.iterdir())
    write_adapter(path, [with_magnitude(lora(SPLIT[0])), lora(SPLIT[1])], {}, FP32, "lycoris")
    assert [update.magnitude is None for update in read_adapter(path).updates] == [True, False]


# ------------------------------------------------------------------------------------------------ verified

FAULTS = {
    "a value": lambda tensors: {**tensors, (key := max(tensors)): tensors[key].flip(0)},
    "halves": lambda tensors: {key: torch.roll(t, 1, 0) if "lora_up" in key else t for key, t in tensors.items()},
    "zero": lambda tensors: {key: t * 0 if "lora_up" in key else t for key, t in tensors.items()},
    "alpha": lambda tensors: {key: t * 1.001 if "alpha" in key else t for key, t in tensors.items()},
    "NaN": lambda tensors: {**tensors, (key := min(tensors)): tensors[key] * float("nan")},
    "a module": lambda tensors: {key: t for key, t in tensors.items() if "linear2" not in key},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_writer_that_corrupts_is_found_out_and_replaces_nothing(fault, tmp_path, monkeypatch):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(b"an earlier file")
    save = write.save_file
    monkeypatch.setattr(write, "save_file", lambda tensors, *rest: save(FAULTS[fault](tensors), *rest))
    with pytest.raises(ValueError, match="lora.safetensors is not written|holds NaN|has an alpha"):
        write_adapter(path, SETS["split"], {}, FP32, "kohya")
    assert path.read_bytes() == b"an earlier file" and len(list(tmp_path.iterdir())) == 1


def test_dtype_that_cannot_hold_the_change_is_found_out(tmp_path):
    small = lora(SPLIT[0])
    small.B.data *= 1e-8
    with pytest.raises(ValueError, match=f"the change of {QKV} is off by .*; use --dtype bf16$"):
        write_adapter(tmp_path / "lora.safetensors", [small], {}, torch.float16)
    write_adapter(tmp_path / "lora.safetensors", [small], {}, torch.bfloat16)


def test_writing_leaves_a_training_run_as_it_was(tmp_path):
    update = lora(SPLIT[0], alpha=2)
    kept = update.A.detach().clone(), update.B.detach().clone(), update.scale
    write_adapter(tmp_path / "lora.safetensors", [update], {}, torch.bfloat16)
    assert update.A.requires_grad and update.B.requires_grad and update.A.grad_fn is None
    assert torch.equal(update.A, kept[0]) and torch.equal(update.B, kept[1]) and update.scale == kept[2]
