"""Stage 3: PixArt-alpha against its own code, its files, the miniature, runs, samples, scores, mistakes."""

import importlib
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import common

t2i = importlib.import_module("03_pixart_t2i")
FIXTURES = Path(__file__).parent / "fixtures"
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
    config = {"num_attention_heads": 4, "attention_head_dim": 12, "sample_size": 16} | config
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
            state[f"{place}{old}.{kind}"] = state.pop(
                f"{place}{new}.{kind}", state.get(f"{place}{old}.{kind}")
            )
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
    bank = t2i.Captions.pack(embeddings, masks)
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
