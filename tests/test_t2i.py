"""03_pixart_t2i.py and lab/scores.py: PixArt-alpha against its own code, its files, Algorithm 2 by
hand, runs, samples, scores, and mistakes."""
import copy
import importlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, difference, norm, trained, vector
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import common
from common import UserError, draw_latents, lambda_edm, seed_step

t2i = importlib.import_module("03_pixart_t2i")
scores, shapes, reward = [importlib.import_module(f"lab.{name}")
                          for name in ("scores", "shapes", "reward_t2i")]
FIXTURES = ROOT / "tests" / "fixtures"
PIXART, CASE = FIXTURES / "pixart", np.load(FIXTURES / "io-t2i.npz")
RELEASE = PIXART / "original-plain-release.pth"
IO = {name: torch.from_numpy(array) for name, array in np.load(PIXART / "io.npz").items()}
X, COND = IO["x"][:, :4], (IO["y"], IO["mask"])
BIAS = "blocks.1.mlp.fc1.bias"


def close(a, b, tolerance):
    assert a.shape == b.shape
    assert ((a.double() - b.double()).norm() / b.double().norm()).item() <= tolerance


@pytest.fixture(scope="module")
def release():
    return t2i.load_pixart(RELEASE, num_heads=4)


# ---- the transformer ----
@pytest.mark.parametrize("case", ["original", "nomask", "null"])
@torch.no_grad()
def test_pixart_equals_the_original(release, case, monkeypatch):
    x, t, y, mask = [IO[name] for name in ("x", "t", "y", "mask")]
    y = release.y_embedder.y_embedding.expand_as(y) if case == "null" else y
    mask = None if case == "nomask" else mask
    close(release(x, t, y, mask), IO[f"out_{case}_f32"], 1e-5)
    double, sinusoids = t2i.load_pixart(RELEASE, num_heads=4).double(), t2i.sinusoids
    assert (sinusoids(t.float(), 256, cosine_first=True) - IO["time_proj"]).abs().max() < 1e-4
    monkeypatch.setattr(t2i, "sinusoids", lambda v, dim, cosine_first=False: (
        IO["time_proj"] if cosine_first else sinusoids(v, dim)))  # float32's exp: 3 of 128 differ
    close(double(x.double(), t, y.double(), mask), IO[f"out_{case}_f64"], 1e-10)


@torch.no_grad()
def test_heads_and_masks_matter(release):
    x, t, y, mask = [IO[name] for name in ("x", "t", "y", "mask")]
    noise = torch.where(mask[..., None].bool(), y, torch.randn_like(y))
    close(release(x, t, noise, mask), IO["out_original_f32"], 1e-5)  # padding is not seen
    two_heads = t2i.load_pixart(RELEASE, num_heads=2)(x, t, y, mask)
    assert (two_heads - IO["out_original_f32"]).norm() > 0.01 * two_heads.norm()


def test_full_size_has_the_published_names_and_shapes():
    published = json.loads((PIXART / "shapes.json").read_text())
    wanted = published["PixArt-XL-2-512x512"]
    from diffusers import AutoencoderKL
    with torch.device("meta"):
        net, decoder = t2i.PixArt(), t2i.VAEDecoder(AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2,
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4))
        theirs = {name: torch.zeros(shape) for name, shape in wanted["shapes"].items()}
    ours = net.state_dict()
    if any(name.startswith("transformer_blocks") for name in theirs):
        theirs = t2i.from_diffusers(theirs)
        ours.pop("y_embedder.y_embedding")
    theirs.pop("pos_embed", None)
    assert {name: w.shape for name, w in ours.items()} == {k: w.shape for k, w in theirs.items()}
    assert sum(w.numel() for w in net.parameters()) == wanted["params"]
    assert (sum(w.numel() for w in decoder.parameters()) == 49_490_199
            == published["sd-vae-ft-ema"]["decoder_params"])


# ---- the preconditioning ----
def test_the_noise_table_is_the_release_s():
    u = t2i.noise_table()
    close(u, IO["sim_u"].float(), 1e-6)
    assert u[[0, 999, 1000]].tolist() == pytest.approx([156.6155, 0.0100008, 0], rel=1e-4)
    index = (u - IO["sim_sigma"].float()[:, None]).abs().argmin(1)
    assert torch.equal(index, IO["sim_index"].long())
    assert torch.equal(999 - index, IO["sim_c_noise"].long())


class Spy(nn.Module):
    def forward(self, x, timestep, caption, mask):
        self.seen = x, timestep
        return torch.zeros(len(x), 8, *x.shape[2:], dtype=x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_t_2_5_is_timestep_440(dtype):
    net, t = t2i.PixArtPrecond(Spy()), torch.tensor([2.5, 156.6155, 0.01])
    x = torch.ones(3, 4, 2, 2, dtype=dtype)
    assert torch.equal(net(x, t, None), x)
    assert net.model.seen[1].tolist() == [440, 999, 0]
    expected = (1 / (t**2 + 1).sqrt())[:, None, None, None].expand(3, 4, 2, 2)
    assert torch.allclose(net.model.seen[0].float(), expected, rtol=1e-2)


@torch.no_grad()
def test_the_denoiser_is_the_release_s(release):
    t = IO["sim_D_sigma"].float()
    close(t2i.PixArtPrecond(release)(X * t[:, None, None, None], t, *COND), IO["sim_D_x"], 1e-5)


# ---- files ----
def write_pth(path, change=dict, wrap=lambda state: {"state_dict": state}):
    state = torch.load(RELEASE, weights_only=True)
    torch.save(wrap(change(dict(state.get("state_dict", state)))), path)
    return path


def half(state):
    return {name: w.half() if w.is_floating_point() else w for name, w in state.items()}


def drop(*names):
    return lambda state: {name: w for name, w in state.items() if name not in names}


def add(**tensors):
    return lambda state: state | {name.replace("__", "."): w for name, w in tensors.items()}


FORMS = {
    "bare": (dict, lambda state: state), "half": (half,), "no table": (drop("pos_embed"),),
    "training": (dict, lambda state: {"state_dict": state, "state_dict_ema": half(state),
                                      "epoch": 3, "optimizer": {}}),
    "SIM-DiT": (drop("pos_embed"), lambda state: {"ema": {
        f"module.model.{name}": w for name, w in state.items()} | {
        "module.u": torch.zeros(1001)}})}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_pth_is_read(tmp_path, release, form):
    net = t2i.load_pixart(write_pth(tmp_path / "a.pth", *FORMS[form]), num_heads=4)
    for (name, a), b in zip(release.state_dict().items(), net.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4) and b.dtype == torch.float32, name
    assert not any(w.requires_grad for w in net.parameters()) and not net.training


def test_the_ema_is_preferred_on_request(tmp_path):
    wrap = lambda state: {"state_dict": state, "state_dict_ema": {
        name: w + 1 for name, w in state.items() if name != "pos_embed"}}
    path = write_pth(tmp_path / "a.pth", wrap=wrap)
    with pytest.raises(UserError, match="cannot be used .'state_dict_ema'"):
        t2i.load_pixart(RELEASE, 4, prefer_ema=True)
    plain, ema = [t2i.load_pixart(path, 4, prefer_ema=prefer) for prefer in (False, True)]
    assert torch.equal(plain.state_dict()[BIAS] + 1, ema.state_dict()[BIAS])


THEIRS = {  # the other direction of the stage's table of names, written on its own
    "x_embedder.proj": "pos_embed.proj", "t_block.1": "adaln_single.linear",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "y_embedder.y_proj.fc": "caption_projection.linear_", "blocks.": "transformer_blocks.",
    ".cross_attn.proj": ".attn2.to_out.0", ".attn.proj": ".attn1.to_out.0",
    ".cross_attn.q_linear": ".attn2.to_q", ".mlp.fc1": ".ff.net.0.proj", ".mlp.fc2": ".ff.net.2",
    "final_layer.linear": "proj_out", "final_layer.scale_shift_table": "scale_shift_table"}


def to_diffusers(state):
    out = {}
    for name, w in drop("pos_embed", "y_embedder.y_embedding")(state).items():
        for ours, theirs in THEIRS.items():
            name = name.replace(ours, theirs)
        parts = {".attn.qkv": ("attn1", "qkv"), ".cross_attn.kv_linear": ("attn2", "kv")}
        joined = [part for part in parts if part in name]
        if not joined:
            out[name] = w
        for attention, letters in [parts[part] for part in joined]:
            for letter, piece in zip(letters, w.chunk(len(letters))):
                out[name.replace(*joined, f".{attention}.to_{letter}")] = piece.clone()
    return out


def diffusers_folder(path, old=True, kind="safetensors", change=dict, **config):
    (path / "transformer").mkdir(parents=True)
    config = {"num_attention_heads": 4, "num_layers": 2, "sample_size": 16} | config
    if not old:
        config |= {"_class_name": "PixArtTransformer2DModel", "interpolation_scale": 1}
    (path / "transformer" / "config.json").write_text(json.dumps(config))
    state = change(to_diffusers(torch.load(RELEASE, weights_only=True)["state_dict"]))
    file = path / "transformer" / f"diffusion_pytorch_model.{kind}"
    save_file(state, file) if kind == "safetensors" else torch.save(state, file)
    return path


@pytest.mark.parametrize("old, kind", [(True, "safetensors"), (False, "bin")])
@torch.no_grad()
def test_a_diffusers_folder_is_read(tmp_path, old, kind):
    net = t2i.load_pixart(diffusers_folder(tmp_path / "a", old, kind))
    close(net(IO["x"], IO["t"], *COND), IO["out_diffusers_f32"], 1e-5)
    assert net.y_embedder.y_embedding is None and net.net_args["input_size"] == 16


WRONG = {  # how a .pth is changed, and what the line says
    "missing": (drop(BIAS), f"Missing.*{BIAS}"),
    "superfluous": (add(blocks__1__more=torch.ones(2)), "Unexpected.*blocks.1.more"),
    "shape": (add(blocks__1__mlp__fc1__bias=torch.ones(7)), f"size mismatch for {BIAS}"),
    "1024-MS": (add(csize_embedder__mlp__0__weight=torch.ones(2)), "csize_embedder.*256 or 512"),
    "no empty caption": (drop("y_embedder.y_embedding"), "y_embedder.y_embedding"),
    "twice": (lambda state: state | {f"module.{BIAS}": state[BIAS]}, "twice"),
    "no first layer": (drop("x_embedder.proj.weight"), "x_embedder.proj.weight"),
    "not finite": (lambda s: s | {BIAS: torch.full_like(s[BIAS], math.nan)}, "not finite"),
    "a table": (lambda s: s | {"pos_embed": torch.zeros_like(s["pos_embed"])}, "position embed"),
    "a million blocks": (lambda s: s | {f"blocks.{10**6}.w": torch.ones(1)}, "depth is 1000001"),
    "another file": (lambda state: {"weight": torch.ones(3)}, "x_embedder")}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_pth_is_refused_by_name(tmp_path, case):
    change, words = WRONG[case]
    with pytest.raises(UserError, match=words) as error:
        t2i.load_pixart(write_pth(tmp_path / "a.pth", change), num_heads=4)
    assert "\n" not in str(error.value)


def test_damaged_and_dangerous_files_are_refused(tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    (tmp_path / "cut.pth").write_bytes(RELEASE.read_bytes()[:200_000])
    torch.save({"state_dict": {"a": Harm()}}, tmp_path / "code.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10" * 100)
    for name in ("cut.pth", "code.pth", "list.pth", "cut.safetensors", "nothing.pth"):
        for read in (t2i.load_pixart, t2i.load_pipeline):
            with pytest.raises(UserError) as error:
                read(tmp_path / name)
            assert name in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "harm").exists()


def test_a_wrong_diffusers_folder_is_refused(tmp_path):
    name = "transformer_blocks.1.attn1.to_k.bias"
    cases = [({"change": drop(name)}, "to_k"), ({"num_layers": 3}, "Missing.*blocks.2"),
             ({"interpolation_scale": 2}, "1024-MS"), ({"num_attention_heads": 0}, "0 heads")]
    for k, (options, words) in enumerate(cases):
        with pytest.raises(UserError, match=words):
            t2i.load_pixart(diffusers_folder(tmp_path / str(k), **options))
    (tmp_path / "0" / "transformer" / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json"):
        t2i.load_pixart(tmp_path / "0")


def test_a_file_that_declares_a_million_layers_is_refused_at_once(tmp_path):
    """Before anything of that size is built: T5's, the VAE's, PixArt's and a miniature's."""
    for name, key in (("t5", "num_layers"), ("pixart/vae", "layers_per_block")):
        shutil.copytree(FIXTURES / name, tmp_path / name)
        config = json.loads((FIXTURES / name / "config.json").read_text()) | {key: 10**6}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    net, text = [sizes | {key: 10**6} for sizes, key in ((t2i.MINI_NET, "depth"),
                                                         (t2i.MINI_TEXT, "num_layers"))]
    for name, net_args in (("net", {"net": net, "text": t2i.MINI_TEXT}), ("pixart", net),
                           ("text", {"net": t2i.MINI_NET, "text": text})):
        common.save({"net_args": net_args, "state_dict": {}, "t_star": 1.0, "meta": {}},
                    tmp_path / f"{name}.pt")
    begun = time.time()
    for read in (lambda: t2i.encode_prompts(tmp_path / "t5", ["a"]),
                 lambda: t2i.load_vae_decoder(tmp_path / "pixart/vae"),
                 lambda: t2i.load_pixart(diffusers_folder(tmp_path / "d", num_layers=10**6)),
                 *[lambda name=name: t2i.load_pipeline(tmp_path / f"{name}.pt")
                   for name in ("net", "pixart", "text")]):
        with pytest.raises(UserError, match="1000000"):
            read()
    assert time.time() - begun < 10


# ---- the decoder ----
@torch.no_grad()
def test_the_decoder_equals_diffusers():
    net = t2i.load_vae_decoder(PIXART / "vae")
    outputs = {name: torch.from_numpy(v) for name, v in np.load(PIXART / "io-vae.npz").items()}
    for kind, dtype, limit in (("f32", torch.float32, 1e-5), ("f64", torch.float64, 1e-10)):
        for case in ("", "_nonsquare"):
            ours = net.to(dtype)(outputs[f"latents{case}"].to(dtype))
            close(ours, outputs[f"decoded{case}_{kind}"], limit)


def test_the_older_spelling_and_bin_files_are_read(tmp_path):
    state = load_file(PIXART / "vae" / "diffusion_pytorch_model.safetensors")
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"),
                     ("to_out.0", "proj_attn")):
        for kind in ("weight", "bias"):
            place = "decoder.mid_block.attentions.0"
            state[f"{place}.{old}.{kind}"] = state.pop(f"{place}.{new}.{kind}")
    state |= {"encoder.conv_in.bias": torch.zeros(3), "quant_conv.bias": torch.zeros(8)}
    config = json.loads((PIXART / "vae" / "config.json").read_text())
    config.pop("scaling_factor")  # as published
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    torch.save(state, tmp_path / "vae" / "diffusion_pytorch_model.bin")
    old, new = [t2i.load_vae_decoder(folder) for folder in (tmp_path, PIXART / "vae")]
    assert torch.equal(vector(old.parameters()), vector(new.parameters()))
    assert old.scaling_factor == new.scaling_factor
    torch.save(state | {"more": torch.ones(1)}, tmp_path / "vae" / "diffusion_pytorch_model.bin")
    for folder, words in ((tmp_path, "more"), (tmp_path / "nothing", "nothing")):
        with pytest.raises(UserError, match=words):
            t2i.load_vae_decoder(folder)


# ---- text ----
def test_t5_equals_transformers_reference(capsys):
    case = np.load(FIXTURES / "io-t5.npz")
    prompts = json.loads(str(case["prompts"]))
    for dtype, kind, limit in ((torch.float32, "f32", 1e-5), (torch.float64, "f64", 1e-10)):
        embeddings, masks = t2i.encode_prompts(FIXTURES / "t5", prompts, dtype, batch=2)
        assert embeddings.dtype == dtype and np.array_equal(masks, case["mask"])
        close(embeddings, torch.from_numpy(case[f"emb_{kind}"]), limit)
    assert "more than 120 tokens" in capsys.readouterr().out
    assert masks[prompts.index("")].sum() == 1
    captions = [embedding[mask.bool()] for embedding, mask in zip(embeddings, masks)]
    padded, again = t2i.pad([captions[k] for k in (2, 0, 2)], 120)
    assert [len(caption) for caption in captions] == masks.sum(1).tolist()
    assert torch.equal(again, masks[[2, 0, 2]])
    assert torch.equal(padded, embeddings[[2, 0, 2]] * again[..., None])


def test_a_t5_folder_that_lacks_something_is_refused(tmp_path):
    def remove_tensor(folder):
        file = folder / "pytorch_model-00002-of-00002.bin"
        state = torch.load(file, weights_only=True)
        torch.save(drop(sorted(state)[0])(state), file)

    changes = {"lacks": remove_tensor, "spiece": lambda f: (f / "spiece.model").unlink(),
               "weights": lambda f: (f / "pytorch_model-00001-of-00002.bin").unlink(),
               "config": lambda f: (f / "config.json").write_text("{"), "nothing": shutil.rmtree}
    for name, change in changes.items():
        change(shutil.copytree(FIXTURES / "t5", tmp_path / name))
        with pytest.raises(UserError, match=name) as error:
            t2i.encode_prompts(tmp_path / name, ["a"])
        assert "\n" not in str(error.value)


def test_prompt_files(tmp_path):
    files = {"a.txt": "\ufeffa cat\r\n\n  a dog \n", "empty.txt": " \n\n", "b.csv": "prompt\na\n",
             "c.jsonl": "{}\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert t2i.read_prompts(tmp_path / "a.txt") == ["a cat", "a dog"]
    for name in ("empty.txt", "nothing.txt", "b.csv", "c.jsonl"):
        with pytest.raises(UserError, match=f"{name} cannot be used .*one prompt a line") as error:
            t2i.read_prompts(tmp_path / name)
        assert "\n" not in str(error.value)


# ---- guidance and samplers ----
@torch.no_grad()
def test_guidance(release, tmp_path):
    """All four channels; a network of diffusers has no y_embedding and takes the caption of ''."""
    t, blank = torch.full((3, 1, 1, 1), 2.5), torch.randn(5, 32)
    theirs = t2i.load_pixart(diffusers_folder(tmp_path / "a"))
    for net, empty in ((release, release.y_embedder.y_embedding),
                       (theirs, F.pad(blank, (0, 0, 0, 115)))):
        net = t2i.PixArtPrecond(net)
        caption, mask = [F.pad(v, [0, 0] * (v.ndim - 2) + [0, len(empty) - v.shape[1]])
                         for v in COND]
        empty_mask = (torch.arange(120) < 5).long().expand_as(mask) if len(empty) == 120 else mask
        plain, free = net(X, t, caption, mask), net(X, t, empty.expand_as(caption), empty_mask)
        assert torch.equal(t2i.Guided(net, 1.0, blank)(X, t, caption, mask), plain)
        guided = t2i.Guided(net, 4.5, blank)(X, t, caption, mask)
        close(guided, free + 4.5 * (plain - free), 1e-5)
        assert not torch.allclose(free, plain, atol=1e-3)


@pytest.mark.parametrize("solver, calls", [("dpm", 5), ("heun", 9)])
def test_the_teacher_is_sampled_at_its_own_times(release, solver, calls):
    seen = []
    hook = release.register_forward_hook(lambda net, inputs, out: seen.append(inputs[1][0].item()))
    guided = t2i.Guided(t2i.PixArtPrecond(release), 1.0)
    t2i.sample_teacher(guided, torch.randn(3, 4, 16, 16), *COND, num_steps=5, solver=solver)
    hook.remove()
    assert len(seen) == calls and seen[0] == 999 and seen[-1] == 0  # 156.6155 and 0.01
    assert t2i.PixArtPrecond.span == {"sigma_min": 0.01, "sigma_max": 156.6155}


@torch.no_grad()
def test_bf16_agrees_with_float32(release):
    net, t = t2i.PixArtPrecond(release), torch.full((1, 1, 1, 1), 2.5)
    exact, rounded = [common.as_denoiser(net, amp, *COND)(X, t) for amp in ("none", "bf16")]
    assert rounded.dtype == torch.float32 and not torch.equal(exact, rounded)
    close(rounded - X, exact - X, 0.02)


# ---- Algorithm 2 ----
@pytest.mark.parametrize("truncate", ["clamp", "resample"])
def test_what_an_update_draws(truncate):
    """z is t* times standard normal; t comes from the phase's own options; all prompts come."""
    args = SimpleNamespace(batch=20_000, t_star=2.5, psi_mean=-2.0, psi_std=2.0, p_mean=0.0,
                           p_std=0.5, t_min=0.01, t_max=156.6155, truncate=truncate,
                           batch_gpu=15_000, p_theta="lognormal")
    d_q = SimpleNamespace(image_shape=(1, 1, 2), tokens=3)
    captions = [torch.full((1 + k % 3, 1), float(k)) for k in range(5)]
    for phase, mean, std in (("psi", -1.97, 1.95), ("theta", 0.0, 0.5)):
        random = torch.Generator().manual_seed(0)
        parts = list(t2i.draw_captioned(args, d_q, captions, phase, random))
        assert [len(z) for z, *_ in parts] == [15_000, 5000]
        z, t, eps = [torch.cat(v) for v in list(zip(*parts))[:3]]
        assert [z.std().item(), eps.std().item()] == pytest.approx([2.5, 1], rel=0.02)
        assert (z * eps).mean().abs() < 0.05 and t.shape == (20_000, 1, 1, 1)
        assert t.min() >= 0.01 and t.max() <= 156.6156
        at_end = (t <= 0.010001).float().mean().item()
        expected = 0.0964 if phase == "psi" and truncate == "clamp" else 0  # N(0, 1) below -1.30
        assert at_end == pytest.approx(expected, abs=0.01)
        if truncate == "clamp":
            assert [t.log().mean(), t.log().std()] == pytest.approx([mean, std], abs=0.15)
        which = torch.cat([cond[0].amax((1, 2)) for *_, cond in parts])
        assert all((which == k).float().mean() == pytest.approx(0.2, abs=0.02) for k in range(5))
        lengths = torch.cat([cond[1].sum(1) for *_, cond in parts])
        assert torch.equal(lengths, 1 + which.long() % 3)


PROMPTS = ["a red ring", "a large blue bar", "no", "a small white cross on a black background"]


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """A miniature, random but always the same, smaller than the embedded one, as a file."""
    torch.manual_seed(0)
    sizes = {"net": t2i.MINI_NET | {"hidden_size": 32, "depth": 2, "num_heads": 2},
             "text": t2i.MINI_TEXT}
    state = t2i.Miniature(**sizes).state_dict()
    meta = {"prompts": PROMPTS, "tested": PROMPTS[::-1] * 2, "mu": torch.zeros(32),
            "sigma": torch.eye(32), "fd_real": 0.5}
    path = tmp_path_factory.mktemp("mini") / "tiny.pt"
    common.save({"net_args": sizes, "state_dict": state, "t_star": 5.0, "meta": meta}, path)
    return path


TYPED = """--steps 4 --batch 4 --batch-gpu 4 --lr 1e-3 --anneal linear --adam-eps 1e-2 --seed 3
    --guidance 3 --t-star 2 --p-mean -4 --p-std 1.5 --psi-mean 0.5 --psi-std 0.4 --amp none
    --no-checkpointing --device cpu""".split()


def mini_run(mini, folder, *options):
    t2i.main(["--teacher", str(mini), *TYPED, "--out", str(folder), *options])
    return folder


def train_alone(args, run, d_q, captions, judge, more):
    t2i.train(args, d_q, captions, run, dict, more)


def by_hand(file, guidance, weight_psi, low=0.0, high=math.inf, resample=False):
    """-> what `trained` returns of a run of TYPED from this file, in plain torch."""
    pipeline, _, meta = t2i.load_pipeline(file)
    captions, d_q = pipeline.encode(meta["prompts"]), pipeline.net
    empty, gradients = d_q.model.y_embedder.y_embedding, {}
    d_psi, g, g_ema = [copy.deepcopy(d_q) for _ in range(3)]
    adams = {net: torch.optim.Adam(net.parameters(), 1e-3, (0.0, 0.999), 1e-2)
             for net in (d_psi, g)}
    for step in range(4):
        random = seed_step(3, step)
        draw = lambda *size, random=random: torch.randn(size, generator=random)
        for learns, still, mean, std in ((d_psi, g, 0.5, 0.4), (g, d_psi, -4, 1.5)):
            z, eps, t = [draw(4, 3, 16, 16), draw(4, 3, 16, 16), (mean + std * draw(4)).exp()]
            while resample and (outside := (t < low) | (t > high)).any():
                t[outside] = (mean + std * draw(outside.sum())).exp()
            t = t.clamp(low, high).reshape(4, 1, 1, 1)
            chosen = [captions[k] for k in torch.randint(4, (4,), generator=random)]
            caption = torch.stack([F.pad(c, (0, 0, 0, 48 - len(c))) for c in chosen])
            mask = torch.tensor([[k < len(c) for k in range(48)] for c in chosen])
            learns.requires_grad_(True)
            still.requires_grad_(False)
            x_0 = g(2 * z, 2.0, caption, mask)
            x_t = x_0 + t * eps
            f = d_psi(x_t, t, caption, mask)
            loss = weight_psi(t) * (f - x_0)**2
            if learns is g:
                free = d_q(x_t, t, empty.expand_as(caption), mask)
                y = f - (free + guidance * (d_q(x_t, t, caption, mask) - free))
                loss = -y / norm(y, 0.001) * (f - x_0)
            adams[learns].param_groups[0]["lr"] = 1e-3 * (1 - step / 4)
            adams[learns].zero_grad()
            (loss.sum() / 4).backward()
            gradients[learns] = vector(w.grad for w in learns.parameters())
            adams[learns].step()
        beta = 0.5**(4 / (0.05 * 4 * step)) if step else 0
        for a, b in zip(g_ema.parameters(), g.parameters()):
            a.data = beta * a.data + (1 - beta) * b.data
    start = vector(d_q.state_dict().values())
    nets = [vector(net.state_dict().values()) - start for net in (d_psi, g, g_ema)]
    return nets + [gradients[d_psi], gradients[g]], start


@pytest.mark.parametrize("options, settings", [
    ("", {"weight_psi": lambda_edm}),
    ("--preset paper --truncate resample --batch-gpu 3",  # 3 + 1
     {"weight_psi": torch.ones_like, "low": 0.01, "high": 156.6155, "resample": True})])
def test_train_is_algorithm_2_with_guidance(options, settings, mini, tmp_path, monkeypatch):
    monkeypatch.setattr(t2i, "distil", train_alone)
    expected, start = by_hand(mini, 3, **settings)
    run = trained(mini_run(mini, tmp_path / "run", *options.split()), start)
    assert difference(run, expected) < 1e-3
    if not options:  # the teacher is guided, and the run would show it if it were not
        assert difference(run, by_hand(mini, 1, **settings)[0]) > 0.05


# ---- runs of PixArt's own files ----
TEXTS = ["a cat", "two dogs on a sofa", "", "a red house", "the sea at night"]
FILES = ["--t5", str(FIXTURES / "t5"), "--vae", str(PIXART / "vae"), "--device", "cpu"]
OPTIONS = ("--steps 3 --batch 8 --batch-gpu 8 --lr 1e-2 --adam-eps 1 --amp none "
           "--no-checkpointing").split()  # eps: else rounding is the sign of a gradient near 0


def pixart_run(place, name, *options, teacher=RELEASE):
    """-> the run's folder. Only the run "whole" looks at pictures, which takes long."""
    prompts = place / "prompts.txt"
    prompts.write_text("\n".join(TEXTS))
    with pytest.MonkeyPatch.context() as patch:
        if name != "whole":
            patch.setattr(t2i.Test, "__call__", lambda *_: (torch.zeros(4, 3, 8, 8), {}))
        t2i.main(["--teacher", str(teacher), "--prompts", str(prompts), *FILES, *OPTIONS,
                  "--out", str(place / name), *options])
    return place / name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    place = tmp_path_factory.mktemp("pixart")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)  # checkpoints/ is where a run is started
        yield pixart_run(place, "whole")


def test_a_run_leaves_what_it_should(whole):
    assert {path.name for path in whole.glob("[!.]*")} == {
        "args.json", "ckpt.pt", "g_ema.pt", "log.jsonl", "metrics.json", "samples", "samples.png"}
    args, metrics = [json.loads((whole / f"{name}.json").read_text())
                     for name in ("args", "metrics")]
    wanted = {"guidance": 4.5, "t_star": 2.5, "t_min": 0.01, "t_max": 156.6155, "psi_mean": -2.0,
              "p_std": 2.0, "truncate": "clamp", "weight_psi": "one", "preset": "paper"}
    assert wanted.items() <= args.items() and args["teacher_sha256"] == common.sha256(RELEASE)
    assert len(args["prompts_sha256"]) == 64 and args["vae"] == str(PIXART / "vae")
    assert metrics.keys() == {"method", "distance", "guidance", "seed", "steps", "batch", "seconds",
                              "images_s", "teacher", "teacher, 14 steps", "one step", "t5", "vae",
                              "teacher_sha256", "prompts_sha256"}
    assert metrics["teacher"] == args["teacher"]
    assert metrics["one step"].keys() == {"ms_image"} == metrics["teacher, 14 steps"].keys()
    line = json.loads((whole / "log.jsonl").read_text().splitlines()[-1])
    assert line["step"] == 3 and line["divergence"] > 0 and line["images_s"] > 0
    start = t2i.load_pixart(RELEASE).state_dict()
    end = torch.load(whole / "ckpt.pt", weights_only=True)["g"]
    still = {name for name, w in end.items() if torch.equal(w, start[name.removeprefix("model.")])}
    assert still == {"model.y_embedder.y_embedding"}


def test_b15_in_training(whole, monkeypatch):
    """(B.15): x_0 = z - t* F(z / sqrt(t*^2 + 1)), where z = t* N(0, 1) and F is at timestep 440."""
    seen, prompts = [], [text for text in TEXTS if text]
    monkeypatch.setattr(t2i, "dsm_loss", lambda d_psi, x_0, *rest: seen.append(x_0) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pixart_run(whole.parent, "b15")
    F_theta, random = t2i.load_pixart(RELEASE), seed_step(0, 0)
    z, _, _ = [torch.randn(8, *shape, generator=random) for shape in ((4, 16, 16),) * 2 + ((1,),)]
    chosen = torch.randint(len(prompts), (8,), generator=random)
    captions, masks = t2i.encode_prompts(FIXTURES / "t5", prompts, torch.bfloat16,
                                         F_theta.tokens)
    z, cond = 2.5 * z, ((captions * masks[..., None])[chosen].float(), masks[chosen])
    eps = F_theta(z / 7.25**0.5, torch.tensor([440]), *cond)[:, :4]
    close(seen[0], z - 2.5 * eps, 1e-5)


def test_prompts_are_encoded_once(whole, monkeypatch, refused):
    assert len(list((whole.parent / "checkpoints").glob("captions-*.pt"))) == 1
    monkeypatch.setattr(t2i, "load_text_encoder", lambda *_: 1 / 0)
    again = pixart_run(whole.parent, "again")
    assert all(map(torch.equal, trained(again), trained(whole)))


def test_other_prompts_are_another_run(whole, tmp_path, refused):
    (tmp_path / "other.txt").write_text("a horse\n")
    line = refused(t2i.main, ["--teacher", RELEASE, "--prompts", tmp_path / "other.txt", *FILES,
                              *OPTIONS, "--out", whole])
    assert "prompts_sha256" in line and "--fresh" in line


@pytest.mark.parametrize("options, limit", [("--checkpointing", 0), ("--batch-gpu 3", 1e-5)])
def test_checkpointing_and_micro_batches_change_nothing(whole, options, limit):
    start = vector(t2i.PixArtPrecond(t2i.load_pixart(RELEASE)).state_dict().values())
    other = pixart_run(whole.parent, options[2:], *options.split())  # 3 + 3 + 2
    assert difference(trained(other, start), trained(whole, start)) <= limit


@pytest.mark.slow
def test_two_ranks_give_one_process_s_weights(whole):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    typed = ["--teacher", str(RELEASE), "--prompts", "prompts.txt", *FILES, *OPTIONS,
             "--batch-gpu", "2", "--out", "ranks"]
    (whole.parent / "ranks.py").write_text(f"""if True:
        import importlib, sys
        sys.path.insert(0, {str(ROOT)!r})
        t2i = importlib.import_module("03_pixart_t2i")
        t2i.summarise = t2i.Test.__call__ = lambda *_: ([], {{}})
        t2i.enlarged = t2i.image_grid = t2i.save_picture = lambda *_: None
        t2i.main({typed})""")
    done = subprocess.run([*torchrun, "ranks.py"], cwd=whole.parent, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0 and done.stdout.count("step 3/3") == 1, done.stderr
    ranks, one = trained(whole.parent / "ranks"), trained(whole)
    assert difference(ranks[:3], one[:3]) < 1e-6 and difference(ranks[3:], one[3:]) < 1e-3


@pytest.mark.parametrize("stop, status", [(lambda: signal.raise_signal(signal.SIGTERM), 130),
                                          (lambda: 1 / 0, 1)])
def test_a_stopped_run_goes_on_bit_for_bit(stop, status, whole, tmp_path, monkeypatch, capsys):
    """SIGTERM lets the update end, which is saved; an error in an update loses that update."""
    ema_beta = t2i.ema_beta
    with monkeypatch.context() as patch, pytest.raises((SystemExit, ZeroDivisionError)) as stopped:
        patch.setattr(t2i, "ema_beta",
                      lambda images, *rest: images == 8 and stop() or ema_beta(images, *rest))
        pixart_run(whole.parent, f"stopped-{status}", "--save-every", "1")
    folder = whole.parent / f"stopped-{status}"
    assert status == 1 or stopped.value.code == 130 and "goes on" in capsys.readouterr().err
    state = torch.load(folder / "ckpt.pt", weights_only=True)
    assert state["step"] == (2 if status == 130 else 1) and not (folder / "metrics.json").exists()
    pixart_run(whole.parent, folder.name, "--save-every", "1")
    assert "goes on from step" in capsys.readouterr().out
    assert all(map(torch.equal, trained(folder), trained(whole)))


@pytest.mark.parametrize("options", ["--amp bf16 --checkpointing --method sid --compile",
                                     "--distance l2 --method di --psi-updates 2 --guidance 1"])
def test_settings(options, whole, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda net: compiled.append(net))
    folder = pixart_run(whole.parent, options, *options.split(), "--steps", "1")
    line = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    assert math.isfinite(line["loss_theta"]) and line["y_norm"] > 0
    assert len(compiled) == 3 * ("--compile" in options)


def test_a_diffusers_folder_as_the_teacher(whole, tmp_path, monkeypatch):
    """Its empty caption is T5's of the empty text; the length differs, and so does the cache."""
    seen, cached = [], lambda: len([*(whole.parent / "checkpoints").glob("captions-*.pt")])
    before = cached()
    monkeypatch.setattr(t2i, "distil", lambda args, run, d_q, *rest: seen.append(d_q))
    pixart_run(whole.parent, "from-diffusers", teacher=diffusers_folder(tmp_path / "pipeline"))
    empty, mask = t2i.encode_prompts(FIXTURES / "t5", [""], torch.bfloat16)
    assert torch.equal(seen[0].empty_mask, mask) and cached() == before + 1
    assert torch.equal(seen[0].empty, empty * mask[..., None])


# ---- samples ----
def image(path):
    with Image.open(path) as opened:
        return np.asarray(opened).astype(int)


def test_sampling(whole, tmp_path, capsys, refused):
    place = lambda name: str(tmp_path / name)
    both = ["--sample", str(whole), *FILES, "--prompt", "a cat", "--prompt", "a red house"]
    t2i.main([*both, "--out", place("folder"), "--seed", "3"])
    names = sorted(path.name for path in (tmp_path / "folder").iterdir())
    assert names == ["000003.png", "000004.png", "prompts.txt"]
    assert (tmp_path / "folder/prompts.txt").read_text() == "a cat\na red house\n"
    assert "exists" in refused(t2i.main, [*both, "--out", place("folder")])
    one = ["--sample", str(whole), "--device", "cpu", "--prompt", "a red house"]  # the run's T5
    t2i.main([*one, "--seed", "4"])
    single = image(whole / "samples-a-red-house-1-seed-4.png")  # the default place
    assert single.shape == (128, 128, 3)
    assert np.abs(single - image(tmp_path / "folder/000004.png")).max() <= 1
    torch.save(draw_latents([4], (4, 16, 16))[0], tmp_path / "z.pt")
    t2i.main([*one, "--latents", place("z.pt"), "--seed", "9", "--out", place("again.png")])
    assert np.array_equal(image(tmp_path / "again.png"), single)
    for solver in ("dpm", "heun"):  # the teacher's above
        t2i.main([*one, "--seed", "4", "--teacher-steps", "2", "--solver", solver, "--out",
                  place(f"{solver}.png")])
    dpm, heun = [image(tmp_path / f"{solver}.png") for solver in ("dpm", "heun")]
    assert np.array_equal(dpm[136:264, :128], single) and np.array_equal(dpm[136:], heun[136:])
    assert not np.array_equal(dpm[:128], heun[:128])
    t2i.main([*both, "--out", place("both"), "--teacher-steps", "2", "--n", "2"])
    pictures = [(tmp_path / name).glob("*.png") for name in ("both/one_step", "both/teacher")]
    assert [len(list(some)) for some in pictures] == [4, 4]
    t2i.main([*both, "--out", place("x.npz"), "--teacher-steps", "2"])
    arrays = np.load(tmp_path / "x.npz")
    assert arrays["teacher"].shape == arrays["one_step"].shape == (2, 128, 128, 3)
    assert "teacher above one_step" in capsys.readouterr().out


@torch.no_grad()
def test_the_generator_is_one_forward_and_one_decode(whole, tmp_path):
    """(B.15), by hand."""
    t2i.main(["--sample", str(whole / "g_ema.pt"), *FILES, "--prompt", "a cat", "--seed", "2",
              "--out", str(tmp_path / "x.png")])
    model = t2i.load_pixart(RELEASE)
    state = torch.load(whole / "g_ema.pt", weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix("model."): w for name, w in state.items()})
    caption, mask = t2i.encode_prompts(FIXTURES / "t5", ["a cat"], torch.bfloat16, tokens=12)
    z = 2.5 * draw_latents([2], (4, 16, 16))[0]
    eps = model(z / (2.5**2 + 1)**0.5, torch.tensor([440]), caption.float(), mask)[:, :4]
    pixels = common.to_uint8(t2i.load_vae_decoder(PIXART / "vae")(z - 2.5 * eps))[0]
    assert np.abs(pixels.permute(1, 2, 0).numpy() - image(tmp_path / "x.png")).max() <= 1


def test_the_released_generator_is_sampled(tmp_path):
    file = write_pth(tmp_path / "SIM-DiT.pth", wrap=FORMS["SIM-DiT"][1])
    t2i.main(["--sample", str(file), *FILES, "--prompt", "a cat"])
    assert image(tmp_path / "samples-a-cat-1-seed-0.png").shape == (128, 128, 3)


# ---- the miniature ----
@pytest.mark.slow
def test_the_embedded_teacher_draws_what_it_is_told():
    assert t2i.EMBEDDED.stat().st_size < 6e6
    teacher, _, meta = t2i.load_pipeline(t2i.EMBEDDED)
    assert sum(w.numel() for w in teacher.parameters()) <= 3e6
    assert len(meta["prompts"]) == 1120 and len(meta["tested"]) == 1000
    asked = shapes.tested_prompts()[:20]
    z, captions = draw_latents(range(20), teacher.net.model.image_shape)[0], meta["tested"][:20]
    cond = t2i.pad(teacher.encode(captions), 48)
    images = t2i.sample_teacher(t2i.Guided(teacher.net, 3.0), z, *cond)
    assert shapes.prompt_accuracy(images, asked)["mean"] >= 0.9


@torch.no_grad()
def test_the_text_encoder_of_a_miniature(mini):
    """A token is a byte, and the last one is the end."""
    teacher = t2i.load_pipeline(mini)[0]
    short, _ = teacher.encode(["a red bar", "a much longer caption"])
    ids = torch.tensor([[ord(c) + 3 for c in "a red bar"] + [1]])
    close(short, teacher.text(ids).last_hidden_state[0], 1e-5)


def test_a_run_of_a_miniature(mini, tmp_path, monkeypatch, capsys):
    run = mini_run(mini, tmp_path / "run", "--steps", "2", "--batch-gpu", "3")
    out, metrics = capsys.readouterr().out, json.loads((run / "metrics.json").read_text())
    assert "one step" in out and f"--sample {run} --prompt 'a small" in out
    assert metrics["true images"] == {"fd": 0.5} and metrics["guidance"] == 3
    assert metrics["one step"].keys() == {"fd", "ms_image"} == metrics["teacher, 14 steps"].keys()
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2] and all("fd" in line for line in lines)
    assert len(list((run / "samples").glob("*.png"))) == 3
    file = torch.load(run / "g_ema.pt", weights_only=True)
    assert {name.split(".")[0] for name in file["state_dict"]} == {"net", "text"}
    assert file["t_star"] == 2 and file["meta"]["step"] == 2
    text = [name for name in file["state_dict"] if name.startswith("text.")]
    start = torch.load(mini, weights_only=True)["state_dict"]
    assert all(torch.equal(file["state_dict"][name], start[name]) for name in text)
    t2i.main(["--sample", str(run), "--prompt", "a red ring", "--device", "cpu", "--n", "2",
              "--teacher-steps", "2", "--out", str(tmp_path / "x.png")])
    assert image(tmp_path / "x.png").shape == (2 * 104 + 64, 2 * 104, 3)
    teachers = []
    monkeypatch.setattr(t2i, "sample_teacher", lambda d_q, z, *_: teachers.append(d_q) or z)
    for k, more in enumerate(([], ["--guidance", "7"], ["--t-star", "0.5"])):
        t2i.main(["--sample", str(run), "--prompt", "a red ring", "--device", "cpu",
                  "--teacher-steps", "2", "--out", str(tmp_path / f"{k}.npz"), *more])
    one, same, other = [np.load(tmp_path / f"{k}.npz")["one_step"] for k in range(3)]
    assert [d_q.guidance for d_q in teachers] == [3, 7, 3]  # the run's own, unless another is asked
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    mini_run(mini, run, "--steps", "2", "--batch-gpu", "3")
    assert "is finished" in capsys.readouterr().out
    generator = t2i.load_pipeline(run)[0]
    images = 0.3 * torch.randn(40, 3, 16, 16)
    mu, sigma = common.moments(t2i.token_features(generator.net, images))
    judge = t2i.Test(generator, [], [], {"tested": PROMPTS * 10, "mu": mu, "sigma": sigma})
    assert abs(judge(lambda z, *cond: images)[1]["fd"]) < 1e-4 < judge(lambda z, *c: z)[1]["fd"]


# ---- scores ----
def head_file(path):
    """The public head is a product of five matrices: the case's product, in that form."""
    product, state = torch.from_numpy(CASE["head"]), {}
    sizes = (768, 1024, 128, 64, 16, 1)
    for k, a, b in zip((0, 2, 4, 6, 7), sizes, sizes[1:]):
        weight, bias = torch.zeros(b, a), torch.zeros(b)
        weight[0, 0] = 1
        if k == 0:
            weight[0], bias[0] = product[:-1].float(), product[-1]
        state |= {f"layers.{k}.weight": weight, f"layers.{k}.bias": bias}
    torch.save(state, path)
    return path


def test_scores_equal_the_case(tmp_path, capsys, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    folder, clip = shutil.copytree(FIXTURES / "scored", tmp_path / "images"), FIXTURES / "clip"
    typed = [folder, "--device", "cpu", "--clip", clip]
    scores.main([*map(str, typed), "--pickscore", str(clip), "--aesthetic",
                 str(head_file(tmp_path / "head.pth"))])
    report = json.loads((folder / "scores.json").read_text())
    for name in ("pickscore", "clipscore", "aesthetic"):
        ours = [row[name] for row in report["each"]]
        assert np.allclose(ours, CASE[name], rtol=1e-4, atol=1e-4), name
        assert report["means"][name] == pytest.approx(CASE[name].mean(), abs=1e-4)
    files = {str(clip / "model.safetensors"), str(tmp_path / "head.pth")}
    assert report["models"] == {file: common.sha256(file) for file in files}
    scores.main([str(word) for word in typed])
    report = json.loads((folder / "scores.json").read_text())
    assert report["means"].keys() == {"clipscore"} and report["images"] == 3
    assert "not measured" in capsys.readouterr().out
    cases = {"--clip": (FIXTURES / "t5", "expected a CLIP"), "--prompt-file": ("no", "one prompt"),
             "--aesthetic": (RELEASE, "aesthetic head"), "--pickscore": (folder, "a CLIP")}
    for flag, (value, words) in cases.items():
        assert words in refused(scores.main, [*typed, flag, value])
    assert "no model" in refused(scores.main, typed[:-2])
    assert "expected a folder" in refused(scores.main, ["none"])
    (folder / "im3.png").write_bytes(b"")
    assert "4 images" in refused(scores.main, typed)


# ---- mistakes: one line, status 2 ----
MISTAKES = [
    ("--teacher nothing.pth", "no nothing.pth"), ("--teacher cut.pt", "cut.pt cannot be used"),
    ("--teacher pixart", "checkpoints"), ("--teacher images", "images"),
    ("REAL --t5 T5 --vae v", "--vae"), ("REAL --t5 t --vae VAE", "--t5"),
    ("REAL FILES", "--prompts FILE"), ("REAL FILES --prompts empty.txt", "empty.txt"),
    ("REAL FILES --prompts x.csv", "one prompt a line"), ("--sample no --prompt a", "no cannot"),
    ("--sample RELEASE --prompt a", "--t5"), ("MINI", "--prompt"), ("MINI --prompt ''", "--prompt"),
    ("MINI --prompt-file empty.txt", "empty.txt"), ("MINI --prompt a --n 0", "--n"),
    ("MINI --prompt a --latents z.pt", "(1, 3, 8, 8)"),
    ("MINI --prompt a --latents two.pt", "(2, 3, 16, 16)"),
    ("MINI --prompt a --latents no.pt", "no.pt"), ("MINI --prompt a --out x.gif", ".png"),
    ("MINI --prompt a --out images", "exists"),
    ("MINI --prompt a --teacher-steps 2 --teacher RELEASE FILES", "other images"),
    ("MINI --prompt a --teacher-steps 2", "name the teacher"), ("--prompt a", "belong to --sample"),
    ("--guidance -1", "--guidance"), ("--guid 2", "unrecognized"), ("--solver euler", "--solver"),
    ("--distance l2,c=1", "no parameter"), ("--device tpu", "device"), ("--batch 0", "--batch"),
    ("--preset x", "--preset"), ("--t-star nan", "--t-star"), ("--batch-gpu 33", "--batch-gpu")]


@pytest.mark.parametrize("typed, words", MISTAKES)
def test_a_mistake_is_one_line(typed, words, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    for name, text in (("empty.txt", "\n"), ("x.csv", "text\na\n"), ("images/prompts.txt", "a\n")):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    torch.save(torch.zeros(1, 3, 8, 8), "z.pt")
    torch.save(torch.zeros(2, 3, 16, 16), "two.pt")
    Path("cut.pt").write_bytes(t2i.EMBEDDED.read_bytes()[:100_000])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for name, value in (("REAL", f"--teacher {RELEASE}"), ("MINI", f"--sample {t2i.EMBEDDED}"),
                        ("RELEASE", RELEASE), ("FILES", " ".join(FILES)), ("VAE", PIXART / "vae"),
                        ("T5", FIXTURES / "t5")):
        typed = typed.replace(name, str(value))
    assert words in refused(t2i.main, [word.strip("'") for word in typed.split()])
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_help(capsys):
    for main in (t2i.main, scores.main):
        with pytest.raises(SystemExit) as stop:
            main(["--help"])
        assert stop.value.code == 0 and "--device" in capsys.readouterr().out


def test_nothing_asks_the_network(tmp_path, monkeypatch):
    """Neither T5 nor CLIP: a folder that is not there is not looked for elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "socket", lambda *_, **__: 1 / 0)
    t2i.encode_prompts(FIXTURES / "t5", ["a cat"])
    t2i.load_pipeline(t2i.EMBEDDED)[0].encode(["a cat"])
    for folder in ("google/t5-v1_1-xxl", FIXTURES / "scored"):
        with pytest.raises(UserError):
            t2i.encode_prompts(folder, ["a cat"])
    with pytest.raises(UserError, match="CLIP"):
        scores.load_clip("openai/clip-vit-base-patch32")


def test_a_reward_in_a_miniature(mini, tmp_path, monkeypatch, refused):
    """The loss is SIM's minus lambda times the reward, which knows each caption's colour, and a
    large lambda makes more of that colour."""
    red, white = torch.tensor([1.0, -1, -1]), torch.ones(3)
    half = torch.cat([red[:, None].expand(3, 8), -red[:, None].expand(3, 8)], dim=1)
    share = reward.share_in(half.reshape(1, 3, 4, 4).expand(2, 3, 4, 4), torch.stack([red, white]))
    torch.testing.assert_close(share, torch.tensor([0.5, math.exp(-8) / 2 + math.exp(-16) / 2]))
    prompts, lengths = [f"a large {name} ring" for name in ("red", "black", "cyan")], (2, 3, 1)
    captions, lambda_r = [torch.randn(n, 5) for n in lengths], reward.Reward(7.0)
    lambda_r.learn(prompts, captions, "cpu")
    cond = t2i.pad([captions[k] for k in (2, 0)], 4)
    x_0, t, eps = torch.randn(2, 3, 4, 4), torch.ones(2, 1, 1, 1), torch.randn(2, 3, 4, 4)
    nets = [common.as_denoiser(lambda x, t, *cond, k=k: k * x, "none", *cond) for k in (0.8, 0.5)]
    rest = *nets, x_0, t, common.l2(), eps
    change = common.sim_loss(*rest)[0] - lambda_r.loss(*rest)[0]
    colours = 2 * torch.tensor([shapes.COLOURS["cyan"], shapes.COLOURS["red"]]) - 1
    torch.testing.assert_close(change, 7 * reward.share_in(x_0, colours))
    found, saved = [], common.load_saved(mini)
    saved["meta"] |= {"prompts": prompts, "tested": prompts[::-1]}
    common.save(saved, tmp_path / "mini.pt")
    for scale in ("0.001", "1e6"):
        folder = tmp_path / scale
        reward.main(["--teacher", f"{tmp_path}/mini.pt", *TYPED, "--reward", scale,
                     "--out", str(folder)])
        found.append(json.loads((folder / "metrics.json").read_text())["one step"]["reward"])
    assert found[1] > 1.1 * found[0] > 0
    (tmp_path / "prompts.txt").write_text("a cat\n")
    monkeypatch.chdir(tmp_path)  # checkpoints/ is where a run is started
    for argv, message in ((["--method", "sid"], "03_pixart_t2i.py"),
                          (["--preset", "paper"], "03_pixart_t2i.py"),
                          (["--prompts", "/nowhere"], "/nowhere"),
                          (["--teacher", str(mini)], "expected captions such as"),
                          (["--teacher", str(tmp_path / "1e6")], "--prompts FILE")):
        assert message in refused(reward.main, [*argv, "--out", str(tmp_path / "none")])
    argv = ["--teacher", str(RELEASE), *FILES, "--prompts", "prompts.txt", "--batch-gpu", "8"]
    assert "expected a miniature" in refused(reward.main, [*argv, "--out", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()
