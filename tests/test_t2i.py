"""Stage 3: PixArt-alpha against its own code, its files, the miniature, runs, samples, scores, mistakes."""

import importlib
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import common

t2i = importlib.import_module("03_pixart_t2i")
ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
PIXART = FIXTURES / "pixart"
RELEASE = PIXART / "original-plain-release.pth"
IO = {name: torch.from_numpy(array) for name, array in np.load(PIXART / "io.npz").items()}


def close(a, b, tolerance):
    assert a.shape == b.shape
    assert ((a.double() - b.double()).norm() / b.double().norm()).item() <= tolerance


@pytest.fixture(scope="module")
def release():
    return t2i.load_pixart(RELEASE, num_heads=4)


def original_waves(monkeypatch):
    """The original takes exp in float32 of a GPU's or another library's kind: three of 128 frequencies differ
    in the last digit. With its own waves, float64 must agree to float64."""
    sinusoids = t2i.sinusoids

    def waves(positions, dim, cosine_first=False):
        return IO["time_proj"] if cosine_first else sinusoids(positions, dim)

    monkeypatch.setattr(t2i, "sinusoids", waves)


# ---- The transformer ----
@pytest.mark.parametrize("case", ["original", "nomask", "null"])
def test_pixart_equals_the_original(release, case, monkeypatch):
    x, t, y, mask = (IO[name] for name in ("x", "t", "y", "mask"))
    if case == "null":
        y = release.y_embedder.y_embedding.expand_as(y)
    mask = None if case == "nomask" else mask
    with torch.no_grad():
        close(release(x, t, y, mask), IO[f"out_{case}_f32"], 1e-5)
        double = t2i.load_pixart(RELEASE, num_heads=4).double()
        original_waves(monkeypatch)
        close(double(x.double(), t, y.double(), mask), IO[f"out_{case}_f64"], 1e-10)


def test_float64_differs_from_the_original_by_its_float32_waves_alone(release):
    ours = t2i.sinusoids(IO["t"].float(), 256, cosine_first=True)
    assert (ours - IO["time_proj"]).abs().max() < 1e-4


def test_heads_matter():
    net = t2i.load_pixart(RELEASE, num_heads=2)
    x, t, y, mask = (IO[name] for name in ("x", "t", "y", "mask"))
    with pytest.raises(AssertionError):
        close(net(x, t, y, mask), IO["out_original_f32"], 1e-2)


def test_padding_does_not_matter_under_a_mask(release):
    x, t, y, mask = (IO[name] for name in ("x", "t", "y", "mask"))
    noise = torch.where(mask[..., None].bool(), y, torch.randn_like(y))
    close(release(x, t, noise, mask), release(x, t, y, mask), 1e-6)


def test_full_size_has_the_published_names_and_shapes():
    known = json.loads((PIXART / "shapes.json").read_text())
    with torch.device("meta"):
        net = t2i.PixArt()
    wanted = known["PixArt-XL-2-512x512"]
    ours = {name: list(w.shape) for name, w in net.state_dict().items()}
    theirs = {name: list(shape) for name, shape in wanted["shapes"].items()}
    theirs.pop("pos_embed", None)
    assert sum(w.numel() for w in net.parameters()) == wanted["params"]
    if any(name.startswith("transformer_blocks") for name in theirs):
        meta = {name: torch.zeros(shape, device="meta") for name, shape in theirs.items()}
        theirs = {name: list(w.shape) for name, w in t2i.from_diffusers(meta).items()}
        theirs.pop("pos_embed", None)
        ours.pop("y_embedder.y_embedding")
    assert ours == theirs


# ---- The preconditioning ----
def test_the_noise_table_is_the_release_s():
    u = t2i.noise_table()
    close(u, IO["sim_u"].float(), 1e-6)
    assert u[0].item() == pytest.approx(156.6155, rel=1e-5) and u[999].item() == pytest.approx(
        0.0100008, rel=1e-4
    )
    index = (u - IO["sim_sigma"].float()[:, None]).abs().argmin(1)
    assert torch.equal(index, IO["sim_index"].long())
    assert torch.equal(999 - index, IO["sim_c_noise"].long())


class Spy(nn.Module):
    def forward(self, x, timestep, caption, mask):
        self.seen = x, timestep
        return torch.zeros(len(x), 8, *x.shape[2:], dtype=x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_t_2_5_is_timestep_440(dtype):
    net = t2i.PixArtPrecond(Spy())
    x = torch.ones(3, 4, 2, 2, dtype=dtype)
    t = torch.tensor([2.5, 156.6155, 0.01])
    assert torch.equal(net(x, t, None), x)
    assert net.model.seen[1].tolist() == [440, 999, 0]
    expected = (1 / (t**2 + 1).sqrt())[:, None, None, None].expand(3, 4, 2, 2)
    assert torch.allclose(net.model.seen[0].float(), expected, rtol=1e-2)


def test_the_denoiser_is_the_release_s(release):
    t = IO["sim_D_sigma"].float()
    x = IO["x"][:, :4] * t[:, None, None, None]
    out = t2i.PixArtPrecond(release)(x, t, IO["y"], IO["mask"])
    close(out, IO["sim_D_x"], 1e-5)


# ---- Files ----
def write_pth(path, change=lambda state: state, wrap=lambda state: {"state_dict": state}):
    state = torch.load(RELEASE, weights_only=True)
    state = change(dict(state.get("state_dict", state)))
    torch.save(wrap(state), path)
    return path


def half(state):
    return {name: w.half() if w.is_floating_point() else w for name, w in state.items()}


def without_table(state):
    return {name: w for name, w in state.items() if name != "pos_embed"}


FORMS = {
    "bare": (dict, lambda state: state),
    "half": (half, lambda state: {"state_dict": state}),
    "without pos_embed": (without_table, lambda state: {"state_dict": state}),
    "training": (
        dict,
        lambda state: {"state_dict": state, "state_dict_ema": half(state), "epoch": 3, "optimizer": {}},
    ),
    "SIM-DiT": (
        without_table,
        lambda state: {
            "ema": {f"module.model.{name}": w for name, w in state.items()} | {"module.u": torch.zeros(1001)}
        },
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_pth_is_read(tmp_path, release, form):
    net = t2i.load_pixart(write_pth(tmp_path / "a.pth", *FORMS[form]), num_heads=4)
    for (name, a), b in zip(release.state_dict().items(), net.state_dict().values()):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4), name
    assert not any(w.requires_grad for w in net.parameters()) and not net.training


def test_the_ema_is_preferred_on_request(tmp_path, release):
    both = {"state_dict_ema": lambda state: {name: w + 1 for name, w in state.items() if name != "pos_embed"}}
    path = write_pth(
        tmp_path / "a.pth", wrap=lambda s: {"state_dict": s, "state_dict_ema": both["state_dict_ema"](s)}
    )
    with pytest.raises(common.UserError, match="no state_dict_ema"):
        t2i.load_pixart(RELEASE, 4, prefer_ema=True)
    bias = "final_layer.linear.bias"
    plain, ema = (t2i.load_pixart(path, 4, prefer_ema=prefer) for prefer in (False, True))
    assert torch.equal(plain.state_dict()[bias] + 1, ema.state_dict()[bias])


def to_diffusers(state):
    """The other direction of the table of names, written on its own."""
    out = {}
    for name, w in without_table(state).items():
        if name == "y_embedder.y_embedding":
            continue
        for ours, theirs in (
            ("x_embedder.proj", "pos_embed.proj"),
            ("t_embedder.mlp.0", "adaln_single.emb.timestep_embedder.linear_1"),
            ("t_embedder.mlp.2", "adaln_single.emb.timestep_embedder.linear_2"),
            ("t_block.1", "adaln_single.linear"),
            ("y_embedder.y_proj.fc", "caption_projection.linear_"),
            ("blocks.", "transformer_blocks."),
            (".cross_attn.proj", ".attn2.to_out.0"),
            (".attn.proj", ".attn1.to_out.0"),
            (".cross_attn.q_linear", ".attn2.to_q"),
            (".mlp.fc1", ".ff.net.0.proj"),
            (".mlp.fc2", ".ff.net.2"),
            ("final_layer.linear", "proj_out"),
            ("final_layer.scale_shift_table", "scale_shift_table"),
        ):
            name = name.replace(ours, theirs) if not (ours[0] == "." and "t_embedder" in name) else name
        parts = {".attn.qkv": ("attn1", "qkv"), ".cross_attn.kv_linear": ("attn2", "kv")}
        match = next((part for part in parts if part in name), None)
        if match:
            attention, letters = parts[match]
            for letter, piece in zip(letters, w.chunk(len(letters))):
                out[name.replace(match, f".{attention}.to_{letter}")] = piece.clone()
        else:
            out[name] = w
    return out


def diffusers_folder(path, old=True, kind="safetensors", change=lambda state: state, **config):
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
def test_a_diffusers_folder_is_read(tmp_path, old, kind):
    net = t2i.load_pixart(diffusers_folder(tmp_path / "a", old, kind))
    x, t, y, mask = (IO[name] for name in ("x", "t", "y", "mask"))
    close(net(x, t, y, mask), IO["out_diffusers_f32"], 1e-5)
    assert net.y_embedder.y_embedding is None and net.net_args["input_size"] == 16


def drop(name):
    return lambda state: {key: w for key, w in state.items() if key != name}


def with_nan(state):
    return state | {"final_layer.linear.bias": torch.full_like(state["final_layer.linear.bias"], math.nan)}


BIAS = "blocks.1.mlp.fc1.bias"
BAD = {
    "missing": (drop(BIAS), BIAS),
    "superfluous": (lambda s: s | {"blocks.1.more": torch.ones(2)}, "blocks.1.more"),
    "shape": (lambda s: s | {BIAS: torch.ones(7)}, BIAS),
    "1024-MS": (lambda s: s | {"csize_embedder.mlp.0.weight": torch.ones(2)}, "1024-MS"),
    "1024-MS, the rest": (lambda s: s | {"ar_embedder.mlp.0.weight": torch.ones(2)}, "1024-MS"),
    "no empty caption": (drop("y_embedder.y_embedding"), "y_embedder.y_embedding"),
    "a tensor twice": (lambda s: s | {f"module.{BIAS}": s[BIAS]}, "twice"),
    "a noise table": (lambda s: s | {"u": torch.ones(1001)}, "superfluous: u"),
    "no first layer": (drop("x_embedder.proj.weight"), "missing: x_embedder.proj.weight"),
    "NaN": (with_nan, "not finite"),
    "another table": (lambda s: s | {"pos_embed": torch.zeros_like(s["pos_embed"])}, "position"),
    "another file": (lambda s: {"weight": torch.ones(3)}, "x_embedder"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_pth_is_refused_by_name(tmp_path, case):
    change, words = BAD[case]
    with pytest.raises(common.UserError, match=words) as error:
        t2i.load_pixart(write_pth(tmp_path / "a.pth", change), num_heads=4)
    assert "\n" not in str(error.value)


def test_damaged_and_dangerous_files_are_refused(tmp_path):
    cut = tmp_path / "cut.pth"
    cut.write_bytes(RELEASE.read_bytes()[:200_000])

    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"state_dict": {"a": Harm()}}, tmp_path / "code.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10" * 100)
    for name in ("cut.pth", "code.pth", "list.pth", "cut.safetensors", "nothing.pth"):
        with pytest.raises(common.UserError) as error:
            t2i.load_pixart(tmp_path / name)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "harm").exists()


def test_a_wrong_diffusers_folder_is_refused(tmp_path):
    name = "transformer_blocks.1.attn1.to_k.bias"
    with pytest.raises(common.UserError, match="to_k"):
        t2i.load_pixart(diffusers_folder(tmp_path / "a", change=drop(name)))
    with pytest.raises(common.UserError, match="missing: blocks.2"):
        t2i.load_pixart(diffusers_folder(tmp_path / "c", num_layers=3))
    with pytest.raises(common.UserError, match="1024-MS"):
        t2i.load_pixart(diffusers_folder(tmp_path / "b", interpolation_scale=2))
    (tmp_path / "b" / "transformer" / "config.json").write_text("{")
    with pytest.raises(common.UserError, match="config.json"):
        t2i.load_pixart(tmp_path / "b")


# ---- The decoder ----
def test_the_decoder_equals_diffusers():
    net = t2i.load_vae_decoder(PIXART / "vae")
    known = {name: torch.from_numpy(array) for name, array in np.load(PIXART / "io-vae.npz").items()}
    with torch.no_grad():
        for kind, tolerance in (("f32", 1e-5), ("f64", 1e-10)):
            net = net.double() if kind == "f64" else net
            dtype = torch.float64 if kind == "f64" else torch.float32
            for case in ("", "_nonsquare"):
                close(net(known[f"latents{case}"].to(dtype)), known[f"decoded{case}_{kind}"], tolerance)


def test_the_decoder_has_the_published_size():
    with torch.device("meta"):
        net = t2i.VAEDecoder((128, 256, 512, 512), 2, 32)
    known = json.loads((PIXART / "shapes.json").read_text())["sd-vae-ft-ema"]
    assert sum(w.numel() for w in net.parameters()) == known["decoder_params"] == 49_490_199


def test_the_older_spelling_and_bin_files_are_read(tmp_path):
    state = load_file(PIXART / "vae" / "diffusion_pytorch_model.safetensors")
    place = "decoder.mid_block.attentions.0."
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        for kind in ("weight", "bias"):
            state[f"{place}{old}.{kind}"] = state.pop(f"{place}{new}.{kind}")
    state |= {"encoder.conv_in.bias": torch.zeros(3), "quant_conv.bias": torch.zeros(8)}
    folder = tmp_path / "vae"
    folder.mkdir()
    torch.save(state, folder / "diffusion_pytorch_model.bin")
    config = json.loads((PIXART / "vae" / "config.json").read_text())
    config.pop("scaling_factor")  # as published
    (folder / "config.json").write_text(json.dumps(config))
    a, b = t2i.load_vae_decoder(tmp_path), t2i.load_vae_decoder(PIXART / "vae")
    assert all(torch.equal(v, w) for v, w in zip(a.state_dict().values(), b.state_dict().values()))
    torch.save(state | {"more": torch.ones(1)}, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(common.UserError, match="more"):
        t2i.load_vae_decoder(tmp_path)
    with pytest.raises(common.UserError, match="nothing"):
        t2i.load_vae_decoder(tmp_path / "nothing")


# ---- Text ----
def test_t5_equals_transformers_reference(capsys):
    known = np.load(FIXTURES / "io-t5.npz")
    prompts = json.loads(str(known["prompts"]))
    for dtype, kind, tolerance in ((torch.float32, "f32", 1e-5), (torch.float64, "f64", 1e-10)):
        embeddings, masks = t2i.encode_prompts(FIXTURES / "t5", prompts, dtype, batch=2)
        assert embeddings.dtype == dtype and np.array_equal(masks, known["mask"])
        close(embeddings, torch.from_numpy(known[f"emb_{kind}"]), tolerance)
    assert "more than 120 tokens" in capsys.readouterr().out
    assert masks[prompts.index("")].sum() == 1


def test_a_t5_folder_that_lacks_something_is_refused(tmp_path):
    def broken(name, change):
        folder = tmp_path / name
        shutil.copytree(FIXTURES / "t5", folder)
        change(folder)
        with pytest.raises(common.UserError) as error:
            t2i.encode_prompts(folder, ["a"])
        assert "\n" not in str(error.value)
        return str(error.value)

    def remove_tensor(folder):
        file = folder / "pytorch_model-00002-of-00002.bin"
        state = torch.load(file, weights_only=True)
        name = sorted(state)[0]
        torch.save({key: w for key, w in state.items() if key != name}, file)

    assert "lacks" in broken("tensor", remove_tensor)
    broken("words", lambda folder: (folder / "spiece.model").unlink())
    broken("weights", lambda folder: (folder / "pytorch_model-00001-of-00002.bin").unlink())
    broken("config", lambda folder: (folder / "config.json").write_text("{"))
    with pytest.raises(common.UserError, match="does not exist"):
        t2i.encode_prompts(tmp_path / "nothing", ["a"])


def test_captions_lose_their_padding_and_get_it_back():
    embeddings, masks = t2i.encode_prompts(FIXTURES / "t5", ["a dog", "", "two dogs and a cat"])
    bank = t2i.Captions.pack(zip(embeddings.split(2), masks.split(2)))
    assert len(bank) == 3 and len(bank.tokens) == masks.sum()
    captions, again = bank[torch.tensor([2, 0, 2])]
    assert torch.equal(again, masks[[2, 0, 2]])
    assert torch.equal(captions, embeddings[[2, 0, 2]] * again[..., None])


def test_prompt_files(tmp_path):
    files = {
        "a.txt": "a cat\n\n  a dog \n",
        "b.csv": 'id,prompt\n1,"a cat"\n2,\n3,a dog\n',
        "c.jsonl": '{"prompt": "a cat"}\n\n{"prompt": "a dog"}\n',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        assert t2i.read_prompts(tmp_path / name) == ["a cat", "a dog"]
    bad = {
        "empty.txt": " \n\n",
        "other.csv": "text\na\n",
        "bad.jsonl": "{\n",
        "number.jsonl": '{"prompt": 3}\n',
    }
    for name, text in bad.items():
        (tmp_path / name).write_text(text)
    for name in (*bad, "nothing.txt"):
        with pytest.raises(common.UserError, match=name) as error:
            t2i.read_prompts(tmp_path / name)
        assert "\n" not in str(error.value)
    assert t2i.read_prompts(tmp_path / "other.csv", "text") == ["a"]


# ---- Guidance, the sampler, memory ----
def test_guidance(release):
    net = t2i.PixArtPrecond(release)
    x, y, mask = IO["x"][:, :4], IO["y"], IO["mask"]
    t = torch.full((3, 1, 1, 1), 2.5)
    empty = release.y_embedder.y_embedding.expand_as(y)
    with torch.no_grad():
        plain, free = net(x, t, y, mask), net(x, t, empty, mask)
        assert torch.equal(t2i.Guided(net, 1.0)(x, t, y, mask), plain)
        close(t2i.Guided(net, 4.5)(x, t, y, mask), free + 4.5 * (plain - free), 1e-5)  # all four channels
        assert not torch.allclose(free, plain)


def test_guidance_without_an_embedding_of_its_own(tmp_path):
    """A diffusers folder has none: the empty caption and its own mask take its place."""
    net = t2i.PixArtPrecond(t2i.load_pixart(diffusers_folder(tmp_path / "a")))
    x, y, mask = IO["x"][:, :4], IO["y"], IO["mask"]
    t, blank, blank_mask = torch.full((3, 1, 1, 1), 2.5), torch.randn(12, 32), torch.tensor([1] + [0] * 11)
    with torch.no_grad():
        plain, free = net(x, t, y, mask), net(x, t, blank.expand_as(y), blank_mask.expand_as(mask))
        close(t2i.Guided(net, 3.0, blank, blank_mask)(x, t, y, mask), free + 3 * (plain - free), 1e-5)


@pytest.mark.parametrize("solver", [common.dpm_solver, common.edm_sampler])
def test_samplers_are_of_second_order(solver):
    """A Gaussian's denoiser, where the flow is x(t) ~ sqrt(s^2 + t^2)."""
    s, z = 0.7, torch.randn(200, 3, dtype=torch.float64)
    denoise = lambda x, t: x * s**2 / (s**2 + t**2)
    exact = 80 * z * s / (s**2 + 80**2) ** 0.5
    errors = [(solver(denoise, z, num_steps=n) - exact).norm() / exact.norm() for n in (20, 40, 80)]
    assert errors[0] < 0.05 and all(b < a / 3 for a, b in zip(errors, errors[1:]))


def test_live_counts_bytes():
    with t2i.Live() as live:
        a = torch.zeros(1000)
        b = a.view(10, 100) + 1
        assert live.bytes == 8000
        del b
        c = a.double()
        assert live.bytes == 12000 and live.peak == 12000 and c.shape == a.shape


def test_checkpointing_saves_memory(monkeypatch):
    peaks, sizes = [], t2i.MINI_NET | {"depth": 3, "hidden_size": 64, "num_heads": 2, "input_size": 32}
    monkeypatch.setattr(t2i, "MINI_NET", sizes)
    for checkpointing in (True, False):
        args = t2i.parse(["--batch", "4", "--batch-gpu", "4", "--preset", "miniature", "--guidance", "3"])
        args.checkpointing = checkpointing
        common.settle(args, t2i.PRESETS["miniature"])
        weights, kept, peak = t2i.peak_memory(args)
        assert weights * 1.9 < kept < peak
        peaks.append(peak - kept)
    assert peaks[0] < 0.6 * peaks[1]
    assert type(t2i.noise_table()) is torch.Tensor  # nothing of it is kept


@pytest.mark.slow
def test_the_full_size_fits_into_40_gb():
    args = t2i.parse(["--batch-gpu", "8", "--preset", "paper"])
    common.settle(args, t2i.PRESETS["paper"])
    assert t2i.peak_memory(args)[2] * 2**30 < 40e9


def test_bench(capsys):
    t2i.main(["--bench", "--teacher", "miniature", "--batch", "4", "--steps", "2", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "theta update" in out and "of the peak" in out


# ---- Runs of PixArt's own files ----
TEXTS = ["a cat", "two dogs on a sofa", "", "a red house", "the sea at night"]
FILES = ["--t5", str(FIXTURES / "t5"), "--vae", str(PIXART / "vae"), "--device", "cpu"]
OPTIONS = [
    "--steps",
    "3",
    "--batch",
    "8",
    "--batch-gpu",
    "8",
    "--lr",
    "1e-2",
    "--adam-eps",  # else the sign of a gradient near 0, which is rounding, moves a weight by lr
    "1",
    "--amp",
    "none",
    "--no-checkpointing",
]


def pixart_run(tmp_path, name, *options, teacher=RELEASE):
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    command = [
        "--teacher",
        str(teacher),
        "--prompts",
        str(tmp_path / "prompts.txt"),
        *FILES,
        *OPTIONS,
        *options,
    ]
    command += ["--out", str(tmp_path / name)]
    t2i.main(command)
    return tmp_path / name


def killed_at(step, advance=common.Log.advance):
    """In place of Log.advance: the run dies in its step, after the weights have moved."""

    def dies(log):
        if log.step == step:
            raise KeyboardInterrupt
        advance(log)

    return dies


def weights(folder):
    state = torch.load(folder / "ckpt.pt", weights_only=True)
    return torch.cat([w.flatten() for part in ("d_psi", "g", "g_ema") for w in state[part].values()])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    place = tmp_path_factory.mktemp("pixart")
    here = os.getcwd()
    os.chdir(place)  # checkpoints/ is where a run is started
    yield pixart_run(place, "whole")
    os.chdir(here)


def test_a_run_leaves_what_it_should(whole):
    assert {"ckpt.pt", "g_ema.pt", "samples.png", "metrics.json", "log.jsonl"} <= {
        f.name for f in whole.iterdir()
    }
    args = json.loads((whole / "args.json").read_text())
    assert (args["guidance"], args["t_star"], args["t_min"], args["psi_mean"]) == (4.5, 2.5, 0.01, -2.0)
    assert args["truncate"] == "clamp" and args["weight_psi"] == "one" and len(args["teacher_sha256"]) == 64
    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 3 and lines[-1]["divergence"] > 0 and lines[-1]["images_s"] > 0
    start, end = t2i.load_pixart(RELEASE), torch.load(whole / "ckpt.pt", weights_only=True)
    moved = {name: not torch.equal(w, start.state_dict()[name[6:]]) for name, w in end["g"].items()}
    assert moved.pop("model.y_embedder.y_embedding") is False
    assert all(moved.values()), [name for name, m in moved.items() if not m]


def test_prompts_are_encoded_once(whole, monkeypatch):
    files = list((whole.parent / "checkpoints").glob("captions-*.pt"))
    assert len(files) == 1
    monkeypatch.setattr(t2i, "load_text_encoder", lambda *_: 1 / 0)
    again = pixart_run(whole.parent, "again")
    assert torch.equal(weights(again), weights(whole))


@pytest.mark.parametrize("option", ["--checkpointing", "--batch-gpu"])
def test_checkpointing_and_accumulation_change_nothing(whole, option):
    other = pixart_run(whole.parent, option[2:], option, *["2"][: option == "--batch-gpu"])
    difference = (weights(other) - weights(whole)).norm() / weights(whole).norm()
    assert difference == 0 if option == "--checkpointing" else difference < 1e-6


@pytest.mark.slow
def test_two_ranks_give_one_process_s_weights(whole):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [
        "--",
        ROOT / "03_pixart_t2i.py",
        "--teacher",
        RELEASE,
        "--prompts",
        whole.parent / "prompts.txt",
    ]
    command += [*FILES, *OPTIONS, "--batch-gpu", "2", "--out", whole.parent / "ranks"]
    done = subprocess.run(command, cwd=whole.parent, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (weights(whole.parent / "ranks") - weights(whole)).norm() / weights(whole).norm() < 1e-6


def test_a_killed_run_continues_bit_for_bit(whole, monkeypatch):
    options = ["--save-every", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(common.Log, "advance", killed_at(1))
        with pytest.raises(SystemExit):
            pixart_run(whole.parent, "killed", *options)
    assert torch.load(whole.parent / "killed" / "ckpt.pt", weights_only=True)["log"]["step"] == 1
    assert torch.equal(weights(pixart_run(whole.parent, "killed", *options)), weights(whole))


@pytest.mark.parametrize(
    "options",
    [
        ["--truncate", "resample", "--guidance", "1"],
        ["--amp", "bf16", "--checkpointing", "--method", "sid"],
        ["--distance", "l2", "--method", "di", "--psi-updates", "2"],
    ],
)
def test_settings(whole, options):
    folder = pixart_run(whole.parent, "-".join(options), *options, "--steps", "1")
    line = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    assert math.isfinite(line["loss_theta"]) and line["y_norm"] > 0


def test_a_diffusers_folder_as_the_teacher(whole, monkeypatch):
    """Its empty caption is T5's of the empty text, and captions cached for another length do not serve."""
    seen = []
    guided = t2i.Guided
    monkeypatch.setattr(t2i, "Guided", lambda *options: seen.append(guided(*options)) or seen[-1])
    pixart_run(
        whole.parent, "from-diffusers", "--steps", "1", teacher=diffusers_folder(whole.parent / "pipeline")
    )
    empty, mask = t2i.encode_prompts(FIXTURES / "t5", [""], torch.bfloat16)
    assert seen[0].empty.shape == (120, 32) and torch.equal(seen[0].empty_mask, mask[0])
    assert torch.equal(seen[0].empty[:1], empty[0, :1])


def test_other_prompts_are_another_run(whole, capsys):
    folder = pixart_run(whole.parent, "prompts", "--steps", "1")
    other = whole.parent / "other.txt"
    other.write_text("a horse\n")
    command = ["--teacher", RELEASE, "--prompts", other, *FILES, *OPTIONS, "--steps", "1", "--out", folder]
    with pytest.raises(SystemExit):
        t2i.main([str(word) for word in command])
    assert "prompts_sha256" in capsys.readouterr().err


def test_a_mistake_leaves_no_folder(whole, capsys):
    with pytest.raises(SystemExit):
        pixart_run(whole.parent, "mistaken", "--t5", "nowhere")
    assert not (whole.parent / "mistaken").exists()


def test_bf16_agrees_with_float32(release):
    net, x, cond = t2i.PixArtPrecond(release), IO["x"][:, :4], (IO["y"], IO["mask"])
    t = torch.full((3, 1, 1, 1), 2.5)
    with torch.no_grad():
        exact, rounded = (t2i.given_caption(net, cond, amp)(x, t) for amp in ("none", "bf16"))
    assert rounded.dtype == torch.float32 and not torch.equal(exact, rounded)
    close(rounded - x, exact - x, 0.02)


@pytest.mark.parametrize("solver, calls", [("dpm", 5), ("heun", 9)])
def test_the_teacher_is_sampled_at_its_own_times(release, solver, calls):
    seen = []
    hook = release.register_forward_hook(lambda net, inputs, out: seen.append(inputs[1][0].item()))
    guided = t2i.Guided(t2i.PixArtPrecond(release), 1.0)
    t2i.sample_teacher(guided, torch.randn(3, 4, 16, 16), IO["y"], IO["mask"], num_steps=5, solver=solver)
    hook.remove()
    assert len(seen) == calls and seen[0] == 999 and seen[-1] == 0


def test_the_times_of_training(whole, monkeypatch):
    seen = []
    diffuse = common.diffuse
    monkeypatch.setattr(common, "diffuse", lambda x, t, eps=None: seen.append(t) or diffuse(x, t, eps))
    pixart_run(whole.parent, "times", "--batch", "64", "--batch-gpu", "64", "--guidance", "1", "--steps", "2")
    t = torch.cat(seen).flatten()
    assert t.min() == pytest.approx(0.01) and t.max() <= 156.6156
    assert t.log().mean() == pytest.approx(-1.97, abs=0.3)  # of exp(-2 + 2 N), clamped at 0.01
    assert 0.05 < (t <= 0.0101).float().mean() < 0.15  # 9.6 %


# ---- Samples ----
def image(path):
    with Image.open(path) as opened:
        return np.asarray(opened).copy()


def test_sampling(whole, capsys):
    place = whole.parent
    base = ["--sample", str(whole), *FILES, "--prompt", "a cat", "--prompt", "a red house"]
    t2i.main([*base, "--out", "folder", "--seed", "3"])
    assert sorted(f.name for f in (place / "folder").iterdir()) == ["000000.png", "000001.png", "prompts.txt"]
    assert (place / "folder/prompts.txt").read_text() == "a cat\na red house\n"
    single = [
        "--sample",
        str(whole),
        "--prompt",
        "a red house",
        "--seed",
        "4",
        "--out",
    ]  # T5 and VAE: the run's
    t2i.main([*single, "one.png"])
    assert image("one.png").shape == (128, 128, 3)
    assert np.abs(image("one.png").astype(int) - image("folder/000001.png")).max() <= 1
    z = common.draw_latents([4], (4, 16, 16))[0]
    np.save("z.npy", z)
    torch.save(z, "z.pt")
    for file in ("z.npy", "z.pt"):
        t2i.main([*single, "again.png", "--latents", file, "--seed", "9"])
        assert np.array_equal(image("again.png"), image("one.png"))
    for solver in ("dpm", "heun"):
        t2i.main([*base, "--out", f"{solver}.png", "--teacher-steps", "3", "--solver", solver])
    t2i.main([*base, "--out", "both", "--teacher-steps", "2", "--n", "2"])
    assert len(list(Path("both/teacher").glob("*.png"))) == len(list(Path("both").glob("*.png"))) == 4


def test_the_generator_is_one_forward_and_one_decode(whole):
    """(B.15), by hand."""
    t2i.main(["--sample", str(whole), *FILES, "--prompt", "a cat", "--out", "hand.png", "--seed", "2"])
    model = t2i.load_pixart(RELEASE)
    state = torch.load(whole / "g_ema.pt", weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix("model."): w for name, w in state.items()})
    caption, mask = t2i.encode_prompts(FIXTURES / "t5", ["a cat"], torch.bfloat16, tokens=12)
    z = 2.5 * common.draw_latents([2], (4, 16, 16))[0]
    with torch.no_grad():
        eps = model(z / (2.5**2 + 1) ** 0.5, torch.tensor([440]), caption.float(), mask)[:, :4]
        pixels = t2i.load_vae_decoder(PIXART / "vae")(z - 2.5 * eps)
    assert (
        np.abs(common.to_uint8(pixels)[0].permute(1, 2, 0).numpy().astype(int) - image("hand.png")).max() <= 1
    )


def test_the_released_generator_is_sampled(whole):
    change, wrap = FORMS["SIM-DiT"]
    keep = lambda state: state | {}
    write_pth(whole.parent / "SIM-DiT.pth", keep, wrap)
    t2i.main(["--sample", "SIM-DiT.pth", *FILES, "--prompt", "a cat", "--out", "dit.png"])
    assert image("dit.png").shape == (128, 128, 3)


# ---- The miniature ----
def test_captions_and_their_images():
    texts = [t2i.write(prompt) for prompt in t2i.PROMPTS]
    assert len(set(texts)) == len(texts) == 1120 and max(len(text) for text in texts) < t2i.TOKENS
    assert texts[0] == "a small red circle on a green background"
    assert np.mean([t2i.held_out(prompt) for prompt in t2i.PROMPTS]) == pytest.approx(0.1, abs=0.02)
    assert any(t2i.held_out(prompt) for prompt in t2i.tested_prompts())
    random = np.random.default_rng(0)
    images = torch.stack([t2i.draw(prompt, random) for prompt in t2i.PROMPTS])
    assert images.shape == (1120, 3, 16, 16) and images.abs().max() <= 1
    right = t2i.prompt_accuracy(images, t2i.PROMPTS)
    assert min(right.values()) >= 0.99
    wrong = t2i.prompt_accuracy(images, t2i.PROMPTS[::-1])
    assert wrong["mean"] < 0.3


def test_byt5_needs_no_file():
    ids, masks = t2i.tokenize(["a red bar"])
    assert ids[0, :10].tolist() == [ord(c) + 3 for c in "a red bar"] + [1] and masks.sum() == 10


def test_the_embedded_teacher_draws_what_it_is_told():
    assert t2i.EMBEDDED.stat().st_size < 6e6
    assert all(
        w.dtype == torch.float16 for w in torch.load(t2i.EMBEDDED, weights_only=True)["state_dict"].values()
    )
    whole, _, _ = t2i.load_network(t2i.EMBEDDED)
    assert sum(w.numel() for w in whole.parameters()) <= 3e6
    teacher, asked = t2i.miniature(whole), t2i.tested_prompts()[:24]
    captions = teacher.encode([t2i.write(prompt) for prompt in asked])[range(24)]
    z = common.draw_latents(range(24), t2i.image_shape(teacher.net))[0]
    guided = t2i.sample_teacher(t2i.Guided(teacher.net, 3.0), z, *captions)
    assert t2i.prompt_accuracy(guided, asked)["mean"] >= 0.9


def tiny_miniature(path):
    net = t2i.MINI_NET | {"hidden_size": 32, "depth": 2, "num_heads": 2}
    torch.manual_seed(0)
    common.save_generator(
        path, t2i.Miniature(net, t2i.MINI_TEXT).half(), {"net": net, "text": t2i.MINI_TEXT}, 5.0
    )
    return path


def test_a_run_of_a_miniature(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(t2i, "TESTED", 20)
    monkeypatch.setattr(t2i, "TRUE", 60)
    teacher = tiny_miniature(tmp_path / "tiny.pt")
    t2i.main(
        [
            "--teacher",
            str(teacher),
            "--steps",
            "2",
            "--batch",
            "4",
            "--out",
            str(tmp_path / "run"),
            "--device",
            "cpu",
        ]
    )
    out = capsys.readouterr().out
    assert "one step" in out and "teacher" in out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["true images"]["mean"] >= 0.9 and metrics["one step"].keys() >= {
        "shape",
        "all",
        "fd",
        "ms_image",
    }
    command = [
        "--sample",
        str(tmp_path / "run"),
        "--prompt",
        "a large red ring on a blue background",
        "--device",
        "cpu",
    ]
    t2i.main([*command, "--out", str(tmp_path / "x.png"), "--teacher-steps", "2"])
    assert image(tmp_path / "x.png").shape[2] == 3


def test_train_teacher_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(t2i, "MINI_NET", t2i.MINI_NET | {"hidden_size": 32, "depth": 1, "num_heads": 2})
    base = [
        "--train-teacher",
        "--batch",
        "4",
        "--steps",
        "4",
        "--save-every",
        "1",
        "--device",
        "cpu",
        "--out",
    ]
    t2i.main([*base, str(tmp_path / "whole")])
    with monkeypatch.context() as patch:
        patch.setattr(common.Log, "advance", killed_at(2))
        with pytest.raises(SystemExit):
            t2i.main([*base, str(tmp_path / "killed")])
    t2i.main([*base, str(tmp_path / "killed")])
    a, b = (torch.load(tmp_path / name / "teacher.pt", weights_only=True) for name in ("whole", "killed"))
    assert all(torch.equal(v, w) for v, w in zip(a["state_dict"].values(), b["state_dict"].values()))


# ---- Scores ----
def head_file(path):
    """The public head is a product of five matrices, nothing between: the case's product, in its form."""
    product = torch.from_numpy(np.load(FIXTURES / "io-t2i.npz")["head"])
    sizes, state = (768, 1024, 128, 64, 16, 1), {}
    for k, a, b in zip((0, 2, 4, 6, 7), sizes, sizes[1:]):
        weight, bias = torch.zeros(b, a), torch.zeros(b)
        weight[0, 0] = 1
        if k == 0:
            weight[0] = product[:-1].float()
            bias[0] = product[-1]
        state |= {f"layers.{k}.weight": weight, f"layers.{k}.bias": bias}
    torch.save(state, path)
    return path


def score(folder, *options):
    t2i.main(["--score", str(folder), "--device", "cpu", *map(str, options)])
    return json.loads((folder / "scores.json").read_text())


def test_scores_equal_the_case(tmp_path, capsys):
    known = np.load(FIXTURES / "io-t2i.npz")
    folder = tmp_path / "images"
    shutil.copytree(FIXTURES / "scored", folder)
    clip = FIXTURES / "clip"
    report = score(
        folder, "--clip", clip, "--pickscore", clip, "--aesthetic", head_file(tmp_path / "head.pth")
    )
    for name in ("pickscore", "clipscore", "aesthetic"):
        ours = [row[name] for row in report["each"]]
        assert np.allclose(ours, known[name], rtol=1e-4, atol=1e-4), name
        assert report["means"][name] == pytest.approx(known[name].mean(), abs=1e-4)
    assert any(str(path).endswith("model.safetensors") for path in report["models"])
    assert all(len(value) == 64 for value in report["models"].values()) and len(report["models"]) == 2
    report = score(folder, "--clip", clip)
    assert report["means"].keys() == {"clipscore"} and "not measured" in capsys.readouterr().out


# ---- Mistakes: one line, status 2 ----
def mistakes(tmp_path):
    prompts, empty = tmp_path / "p.txt", tmp_path / "empty.txt"
    mini = ["--sample", t2i.EMBEDDED]
    real = ["--teacher", RELEASE, "--prompts", prompts]
    return {
        "no such teacher": (["--teacher", tmp_path / "nothing.pth"], "there is no"),
        "cut teacher": (["--teacher", tmp_path / "cut.pt"], "cut short"),
        "no PixArt": (["--teacher", "pixart"], "checkpoints"),
        "no VAE": ([*real, "--t5", FIXTURES / "t5", "--vae", tmp_path / "v"], "--vae"),
        "no T5": ([*real, "--t5", tmp_path / "t", "--vae", PIXART / "vae"], "does not exist"),
        "no prompts": (["--teacher", RELEASE, *FILES], "--prompts FILE"),
        "empty prompts": (["--teacher", RELEASE, *FILES, "--prompts", empty], "empty.txt"),
        "sample without prompt": (mini, "--prompt"),
        "empty prompt": ([*mini, "--prompt", " "], "--prompt"),
        "empty prompt file": ([*mini, "--prompt-file", empty], "empty.txt"),
        "latents' shape": ([*mini, "--prompt", "a", "--latents", tmp_path / "z.npy"], "(1, 3, 8, 8)"),
        "latents' number": ([*mini, "--prompt", "a", "--latents", tmp_path / "two.npy"], "(2, 3, 16, 16)"),
        "latents missing": ([*mini, "--prompt", "a", "--latents", tmp_path / "no.npy"], "no.npy"),
        "out": ([*mini, "--prompt", "a", "--out", tmp_path / "x.gif"], "a .png in a folder"),
        "out in no folder": (
            [*mini, "--prompt", "a", "--out", tmp_path / "no" / "x.png"],
            "a .png in a folder",
        ),
        "out is not empty": ([*mini, "--prompt", "a", "--out", tmp_path / "images"], "a new folder"),
        "a folder of nothing": (["--teacher", tmp_path / "images"], "no run"),
        "bench of a file": (["--bench", "--teacher", RELEASE], "miniature or pixart"),
        "teacher of another kind": (
            [*mini, "--prompt", "a", "--teacher-steps", "2", "--teacher", RELEASE, *FILES],
            "other images",
        ),
        "no teacher known": ([*mini, "--prompt", "a", "--teacher-steps", "2"], "name the teacher"),
        "score nothing": (["--score", tmp_path / "images"], "0 images"),
        "score folder": (["--score", tmp_path / "none"], "expected a folder"),
        "a prompt alone": (["--prompt", "a cat"], "belong to --sample"),
        "no such column": (
            ["--teacher", RELEASE, *FILES, "--prompts", tmp_path / "x.csv"],
            "no column prompt",
        ),
        "flag": (["--guidance", "-1"], "--guidance"),
        "half a flag": (["--guid", "2"], "unrecognized"),
        "solver": (["--solver", "euler"], "--solver"),
        "distance": (["--distance", "l2", "--c", "1"], "does not take"),
        "device": (["--device", "tpu"], "no device"),
    }


@pytest.mark.parametrize("case", mistakes(Path()))
def test_a_mistake_is_one_line(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a cat\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "x.csv").write_text("text\na\n")
    np.save(tmp_path / "z.npy", np.zeros((1, 3, 8, 8), np.float32))
    np.save(tmp_path / "two.npy", np.zeros((2, 3, 16, 16), np.float32))
    (tmp_path / "cut.pt").write_bytes(t2i.EMBEDDED.read_bytes()[:100_000])
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "prompts.txt").write_text("a\n")
    command, words = mistakes(tmp_path)[case]
    with pytest.raises(SystemExit) as stop:
        t2i.main([str(word) for word in command])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and words in error and error.startswith("error:") and "\n" not in error


def test_nothing_asks_the_network(tmp_path, monkeypatch):
    """Neither T5 nor CLIP nor the miniature: a folder that is not there is not looked for elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "socket", lambda *_, **__: 1 / 0)
    t2i.encode_prompts(FIXTURES / "t5", ["a cat"])
    t2i.tokenize(["a cat"])
    for folder in ("google/t5-v1_1-xxl", FIXTURES / "scored"):
        with pytest.raises(common.UserError):
            t2i.encode_prompts(folder, ["a cat"])
    with pytest.raises(common.UserError, match="CLIP"):
        t2i.clip_embeddings("openai/clip-vit-base-patch32", [], [], "cpu")
