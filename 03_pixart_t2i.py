"""Stage 3: text to image, 14 guided evaluations an image, becomes a one-step generator.

    python 03_pixart_t2i.py                              eight minutes on two cores: a miniature
    python 03_pixart_t2i.py --teacher pixart --prompts prompts.txt      PixArt-alpha, as in B.3
    python 03_pixart_t2i.py --sample RUN --prompt "a large red ring on a blue background"

Algorithm 2 has the lines of 01_toy_2d.py; the teacher is guided. The miniature is a small PixArt
with a small T5. Expect the shapes that captions name, at 3 times the teacher's Frechet distance.
"""
import argparse
import hashlib
import json
import math
import re
import shlex
import textwrap
import time
from collections import OrderedDict
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from einops import rearrange
from PIL import ImageDraw
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from common import (EDMPrecond, Run, as_denoiser, checked, count, dpm_solver, draw_batch,
                    draw_latents, dsm_loss, edm_sampler, ema_beta, ema_update, frechet_distance,
                    image_grid, lambda_edm, load_frozen, load_generator, load_saved,
                    make_generator_loss, make_parser, make_parts, moments, one_line_errors,
                    pick_device, progress, reading, require, sample_path, save_once, save_picture,
                    seed_step, sha256, train_only, update, write_samples)

# ---- Settings ----
PAPER = {  # B.3; the paper leaves open guidance (PixArt's own is 4.5), EMA and eps (SiD's)
    "sid_alpha": 1.0, "steps": 16_000, "batch": 1024, "lr": 5e-6,
    "anneal": "none", "t_star": 2.5, "p_mean": -2.0, "p_std": 2.0, "psi_mean": -2.0,
    "psi_std": 2.0, "t_min": 0.01, "t_max": 156.6155, "psi_updates": 1, "weight_psi": "one",
    "ema_half_life": 5e5, "adam_eps": 1e-8, "guidance": 4.5, "amp": "bf16",
    "checkpointing": True, "batch_gpu": 8, "save_every": 100, "log_every": 1, "n": 1}
PRESETS = {
    "paper": PAPER,
    "miniature": PAPER | {  # measured; the noise levels are those of the miniature's own training
        "steps": 500, "batch": 32, "lr": 3e-4, "anneal": "linear", "p_mean": -0.8, "p_std": 1.4,
        "psi_mean": -0.8, "psi_std": 1.4, "t_min": 0.0, "t_max": 1e9, "weight_psi": "edm",
        "ema_half_life": 2e3, "guidance": 1.5, "amp": "none", "checkpointing": False,
        "batch_gpu": None, "log_every": 10}}
EMBEDDED = Path(__file__).parent / "assets" / "miniature_teacher.pt"  # lab/teachers.py made it
PIXART, T5, VAE = [f"checkpoints/{name}" for name in (  # lab/PIXART.md says where they are from
    "PixArt-XL-2-512x512.pth", "t5-v1_1-xxl", "sd-vae-ft-ema")]


# ---- PixArt-alpha (Chen et al. 2023): the original's names for everything ----
def sinusoids(positions, dim, cosine_first=False):
    """positions (N,) -> (N, dim): sines and cosines of periods from 2 pi to 10000 * 2 pi."""
    omega = torch.exp(-math.log(10000) * torch.arange(dim // 2).to(positions) / (dim // 2))
    angles = positions[:, None] * omega
    waves = [angles.sin(), angles.cos()]
    return torch.cat(waves[::-1] if cosine_first else waves, dim=1)


@cache
def position_embedding(height, width, dim, device="cpu", dtype=torch.float32):
    """-> (1, height * width, dim): half of the channels is for the column, half for the row."""
    row, column = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double().T
    table = torch.cat([sinusoids(place, dim // 2) for place in (column, row)], dim=1)
    return table[None].float().to(device, dtype)


def mlp(dim, hidden, out):
    """Two layers, GELU between: x (..., dim) -> (..., out)."""
    return nn.Sequential(OrderedDict(fc1=nn.Linear(dim, hidden), gelu=nn.GELU("tanh"),
                                     fc2=nn.Linear(hidden, out)))


class Attention(nn.Module):
    """Self-attention of x (B, N, D), or cross-attention to y (B, L, D) under its mask (B, L)."""
    def __init__(self, dim, heads, cross):
        super().__init__()
        self.heads = heads
        if cross:
            self.q_linear, self.kv_linear = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        else:
            self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, y=None, mask=None):
        split = lambda v, n: rearrange(v, "b l (n h c) -> n b h l c", n=n, h=self.heads)
        q, k, v = split(self.qkv(x), 3) if y is None else (*split(self.q_linear(x), 1),
                                                           *split(self.kv_linear(y), 2))
        mask = None if mask is None else mask[:, None, None, :].bool()
        out = F.scaled_dot_product_attention(q, k, v, mask)
        return self.proj(rearrange(out, "b h l c -> b l (h c)"))


def modulate(x, shift, scale):
    """LayerNorm of x without weights, then shift and scale (B, 1, D), which depend on the time."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class PixArtBlock(nn.Module):
    """x (B, N, D), caption y (B, L, D) with its mask (B, L), time t (B, 6, D) -> (B, N, D)"""
    def __init__(self, dim, heads):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)
        self.attn = Attention(dim, heads, cross=False)
        self.cross_attn = Attention(dim, heads, cross=True)
        self.mlp = mlp(dim, 4 * dim, dim)

    def forward(self, x, y, t, mask):
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (
            self.scale_shift_table + t).chunk(6, dim=1)
        x = x + gate * self.attn(modulate(x, shift, scale))
        x = x + self.cross_attn(x, y, mask)
        return x + gate_mlp * self.mlp(modulate(x, shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """x (B, N, D), t (B, D) -> (B, N, out)"""
    def __init__(self, dim, out):
        super().__init__()
        self.linear = nn.Linear(dim, out)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)

    def forward(self, x, t):
        shift, scale = (self.scale_shift_table + t[:, None]).chunk(2, dim=1)
        return self.linear(modulate(x, shift, scale))


XL_2 = {"in_channels": 4, "out_channels": 8, "hidden_size": 1152, "depth": 28, "num_heads": 16,
        "patch_size": 2, "input_size": 64, "caption_channels": 4096, "caption_tokens": 120,
        "time_scale": 1}  # PixArt-XL/2 at 512 x 512, where latents are 64 x 64


def check_sizes(sizes, example):
    """UserError, before anything is built, for arguments from a file that no such network has."""
    for name, value in sizes.items():
        most = 100 if name in ("depth", "num_layers") else 8192
        require(name in example and isinstance(value, type(example[name]))
                and (not isinstance(value, int) or 0 <= value <= most), f"{name} is {value!r:.20}")


class PixArt(nn.Module):
    """Of XL_2's sizes by default: x (B, C, H, W), timestep (B,), caption (B, L, D), mask (B, L), 1
    for valid tokens, or None for all -> (B, out_channels, H, W). y_embedding (L, D) means no
    caption; diffusers has none: caption_tokens is 0. time_scale spreads c_noise over timesteps."""
    def __init__(self, **net_args):
        super().__init__()
        check_sizes(net_args, XL_2)
        self.net_args = XL_2 | net_args
        n = SimpleNamespace(**self.net_args)
        dim, p = n.hidden_size, n.patch_size
        require(p and n.num_heads and dim % n.num_heads == 0, f"{n.num_heads} heads of {dim}")
        self.time_scale, self.patch_size, self.checkpointing = n.time_scale, p, False
        self.image_shape = (n.in_channels, n.input_size, n.input_size)
        self.tokens = n.caption_tokens or XL_2["caption_tokens"]  # of a padded caption
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(n.in_channels, dim, p, p)})
        time_mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.t_embedder = nn.ModuleDict({"mlp": time_mlp})
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.y_embedder = nn.ModuleDict({"y_proj": mlp(n.caption_channels, dim, dim)})
        empty = torch.randn(n.caption_tokens, n.caption_channels) / n.caption_channels**0.5
        self.y_embedder.register_buffer("y_embedding", empty if n.caption_tokens else None)
        self.blocks = nn.ModuleList([PixArtBlock(dim, n.num_heads) for _ in range(n.depth)])
        self.final_layer = FinalLayer(dim, p**2 * n.out_channels)

    def forward(self, x, timestep, caption, mask=None):
        dtype = self.t_block[1].weight.dtype
        x = self.x_embedder["proj"](x)
        _, dim, height, width = x.shape
        place = position_embedding(height, width, dim, x.device, x.dtype)
        x = rearrange(x, "b d h w -> b (h w) d") + place
        waves = sinusoids((self.time_scale * timestep).float(), 256, cosine_first=True)
        t = self.t_embedder["mlp"](waves.to(dtype)).expand(len(x), -1)
        t6 = rearrange(self.t_block(t), "b (six d) -> b six d", six=6)
        y = self.y_embedder["y_proj"](caption.to(dtype))
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                block = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
            x = block(x, y, t6, mask)
        return rearrange(self.final_layer(x, t), "b (h w) (p q c) -> b c (h p) (w q)", h=height,
                         p=self.patch_size, q=self.patch_size)


# ---- The preconditioning: (B.14), (B.15) ----
@cache
def noise_table(device="cpu"):
    """u (1001,): the noise levels of iDDPM's 1000 timesteps, falling, and a last 0, as in EDM."""
    beta = torch.linspace(1e-4, 0.02, 1001, dtype=torch.float64)[:-1]  # B.3, for 1000 timesteps
    alpha_bar = (1 - beta).cumprod(0)  # iDDPM: the signal has this variance, the noise 1 minus this
    u = (1 / alpha_bar - 1).sqrt()  # the noise level after the signal is scaled to variance 1
    return F.pad(u.flip(0), (0, 1)).float().to(device)


class PixArtPrecond(nn.Module):
    """(B.14): net(x (B, C, H, W), t, caption, mask) -> x - t F(x / sqrt(t^2 + 1), timestep), with F
    the first C output channels. The timestep is that of the noise level nearest to t, found in
    float32: bfloat16 rounds 999 to 1000. net(z, t_star, caption, mask) is the generator, (B.15)."""
    span = {"sigma_min": 0.01, "sigma_max": 156.6155}  # of a sampler: the ends of the table

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, t, caption, mask=None):
        t = torch.as_tensor(t, dtype=torch.float32, device=x.device).reshape(-1)
        timestep = 999 - (noise_table(x.device)[:1000] - t[:, None]).abs().argmin(1)
        t = t.to(x.dtype).reshape(-1, 1, 1, 1)
        noise = self.model(x / (t**2 + 1).sqrt(), timestep, caption, mask)[:, :x.shape[1]]
        return x - t * noise.to(x.dtype)


# ---- PixArt's files: all tensors must fit, and nothing in a file is executed ----
WEIGHT_FILES = ("g_ema.pt", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def inside(folder, *names):
    """-> the path of the first of these names that is in the folder, or else the folder itself."""
    paths = [Path(folder) / name for name in names]
    return next((path for path in paths if path.exists()), Path(folder))


def read_config(folder, name="config.json"):
    """A file of JSON -> a dict. UserError if the file asks for 100 layers or more, for 1000 extra
    tokens or more, or for an implementation of attention, which transformers would download."""
    with reading(Path(folder) / name, "a file of JSON"):
        config = dict(json.loads((Path(folder) / name).read_text()))
        asks = r'attn_implementation": "|layers\w*": (\d{3,}|-)|extra_ids": (\d{4,}|-)'
        require(not (found := re.search(asks, json.dumps(config))), f"it says {found and found[0]}")
        return config


def read_weights(path):
    """A .safetensors, or a torch.save of tensors (.pth, .pt, .bin) -> what it holds, on the CPU."""
    path = inside(path, *WEIGHT_FILES)
    return load_file(path) if path.suffix == ".safetensors" else load_saved(path)


DIFFUSERS = {  # a part of a name in diffusers: PixArt's part. Replaced in this order
    "pos_embed.proj": "x_embedder.proj",
    "adaln_single.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "adaln_single.linear": "t_block.1", "caption_projection.linear_": "y_embedder.y_proj.fc",
    "transformer_blocks": "blocks", "attn1.to_out.0": "attn.proj",
    "attn2.to_out.0": "cross_attn.proj", "attn2.to_q": "cross_attn.q_linear",
    "ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2", "proj_out": "final_layer.linear"}


def from_diffusers(state):
    """{name in diffusers: tensor} -> {PixArt's name: tensor}, with q, k and v in one matrix."""
    renamed = {}
    for name, w in state.items():
        for theirs, ours in DIFFUSERS.items():
            name = name.replace(theirs, ours)
        renamed["final_layer.scale_shift_table" if name == "scale_shift_table" else name] = w
    for joined, parts in (("attn.qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
                          ("cross_attn.kv_linear", ("attn2.to_k", "attn2.to_v"))):
        for name in [name for name in renamed if parts[0] in name]:
            pieces = [renamed.pop(name.replace(parts[0], part)) for part in parts]
            renamed[name.replace(parts[0], joined)] = torch.cat(pieces)
    return renamed


def load_pixart(path, num_heads=16, prefer_ema=False):
    """PixArt-alpha at 256 or 512 -> PixArt, frozen, in float32. path: a .pth (bare, 'state_dict'
    or, if preferred, 'state_dict_ema'), the released SIM-DiT ('ema'), or a diffusers folder, which
    says num_heads. UserError, with tensors named, unless names and shapes fit and all is finite."""
    path = inside(path, "transformer")
    config = read_config(path) if path.is_dir() else {}
    with reading(path, "PixArt-alpha at 256 or 512: a .pth, or a diffusers folder"):
        saved, sizes = read_weights(path), {"num_heads": num_heads}
        tensors = (saved["state_dict_ema"] if prefer_ema else
                   saved.get("ema", saved.get("state_dict", saved)))
        state = {k.removeprefix("module.").removeprefix("model."): w for k, w in tensors.items()}
        require(len(state) == len(tensors), "the same tensor twice, with and without a prefix")
        state.pop("u", None)  # the noise table, which the release has in its file
        if path.is_dir():
            require(config.get("interpolation_scale") in (None, 1), "a model of 1024-MS")
            state = from_diffusers(state)
            sizes = {"num_heads": config["num_attention_heads"], "caption_tokens": 0,
                     "input_size": config["sample_size"], "depth": config["num_layers"]}
        return load_frozen(PixArt, net_args_of(state) | sizes, state)


def net_args_of(state):
    """The arguments of the PixArt of these weights. pos_embed is checked and leaves `state`."""
    hidden, in_channels, patch, _ = state["x_embedder.proj.weight"].shape
    side, table = XL_2["input_size"] // patch, state.pop("pos_embed", None)
    if table is not None:
        side = math.isqrt(table.shape[1])
        difference = table.float() - position_embedding(side, side, hidden)
        require(difference.abs().max() < 1e-3, "another position embedding")
    empty = state.get("y_embedder.y_embedding")
    blocks = [int(name.split(".")[1]) for name in state if name.startswith("blocks.")]
    return {"hidden_size": hidden, "in_channels": in_channels, "patch_size": patch,
            "input_size": side * patch, "depth": 1 + max(blocks),
            "out_channels": len(state["final_layer.linear.weight"]) // patch**2,
            "caption_channels": state["y_embedder.y_proj.fc1.weight"].shape[1],
            "caption_tokens": XL_2["caption_tokens"] if empty is None else len(empty)}


# ---- From latents to pixels: the decoder of sd-vae-ft-ema, which diffusers has ----
class VAEDecoder(nn.Module):
    """The decoder of a diffusers AutoencoderKL: latents (B, 4, H, W), as sampled -> images
    (B, 3, 8H, 8W), in about [-1, 1], not clamped."""
    def __init__(self, vae):
        super().__init__()
        self.scaling_factor = vae.config.scaling_factor
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

    def forward(self, latents):
        return self.decoder(self.post_quant_conv(latents / self.scaling_factor))


def load_vae_decoder(folder):
    """A diffusers AutoencoderKL -> its decoder, frozen, in float32. UserError as in load_pixart."""
    # load_frozen builds on the meta device. diffusers must not be imported there: the constants
    # that diffusers makes during its import would have no values.
    from diffusers import AutoencoderKL
    folder = inside(folder, "vae")
    config, state = read_config(folder), {}
    older = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    with reading(folder, "a diffusers AutoencoderKL"):
        for name, w in read_weights(folder).items():
            for theirs, ours in older.items():
                name = name.replace(f"attentions.0.{theirs}.", f"attentions.0.{ours}.")
            if not name.startswith(("encoder.", "quant_conv.")):
                state[name] = w
        require(len(config["block_out_channels"]) <= 10, "a VAE of more than ten blocks")
        build = lambda **config: VAEDecoder(AutoencoderKL.from_config(config))
        net = load_frozen(build, config, state)
        # A wrong scaling_factor or norm_num_groups changes no shape, and shows in an image alone.
        require(net(torch.zeros(1, 4, 2, 2)).isfinite().all(), "its images are not finite")
    return net


# ---- Text: T5, once for all prompts ----
LOCAL = {"local_files_only": True, "trust_remote_code": False}
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def load_network(kind, folder, **options):
    """A network of transformers from a folder. UserError if the folder's files are too small for
    it, before anything is allocated, or lack a tensor, which transformers would make up."""
    held = sum(file.stat().st_size for file in Path(folder).iterdir())
    with torch.device("meta"):
        weights = kind(kind.config_class(**read_config(folder))).parameters()
    require(sum(w.numel() for w in weights) <= held, "its files are too small")
    net, info = kind.from_pretrained(folder, output_loading_info=True, **LOCAL, **options)
    require(not info["missing_keys"], f"it lacks {sorted(info['missing_keys'])[:3]}")
    return net


def load_text_encoder(folder, dtype, device="cpu"):
    """-> T5, tokenizer. UserError for another folder."""
    model, words = inside(folder, "text_encoder"), inside(folder, "tokenizer")
    with reading(folder, "a T5 encoder: config.json, spiece.model, tokenizer_config.json, "
                 "special_tokens_map.json and the weights"):
        require((words / "spiece.model").exists(), "no spiece.model")  # else a text is one token
        read_config(words, "tokenizer_config.json")
        tokenizer = transformers.AutoTokenizer.from_pretrained(words, **LOCAL)
        tokenizer(["a"])  # model_max_length may be of another type
        encoder = load_network(transformers.T5EncoderModel, model, dtype=dtype)
    return encoder.to(device, dtype).eval().requires_grad_(False), tokenizer


@torch.no_grad()
def encode_each(encoder, tokenizer, prompts, tokens, batch=16):
    """Yields the embedding (tokens, C) of each prompt and its mask (tokens,), 1 for valid tokens,
    on the CPU. A longer prompt is cut, which is said."""
    with reading("a prompt", "text of at most 10,000 bytes"):
        require(all(len(prompt.encode()) <= 10_000 for prompt in prompts), "it is longer")
    prompts = [prompt.strip() for prompt in prompts]
    if long := sum(len(ids) > tokens for ids in tokenizer(prompts, verbose=False).input_ids):
        print(f"{long} prompts have more than {tokens} tokens: what is beyond is cut off")
    for first in progress(range(0, len(prompts), batch), "captions"):
        text = tokenizer(prompts[first:first + batch], max_length=tokens, padding="max_length",
                         truncation=True, return_tensors="pt").to(encoder.device)
        encoded = encoder(text.input_ids, text.attention_mask).last_hidden_state
        yield from zip(encoded.cpu(), text.attention_mask.cpu())


def encode_prompts(folder, prompts, dtype=torch.float32, tokens=120, batch=16):
    """N prompts -> embeddings (N, tokens, C), masks (N, tokens). UserError if there is no T5."""
    each = encode_each(*load_text_encoder(folder, dtype), prompts, tokens, batch)
    return tuple(torch.stack(v) for v in zip(*each))


def encode_captions(*arguments):
    """The arguments of encode_each -> a list of captions (L, C), each of its valid tokens alone."""
    return [embedding[mask.bool()] for embedding, mask in encode_each(*arguments)]


def pad(captions, tokens, device="cpu"):
    """A list of B captions (L, C) -> caption (B, tokens, C), with zeros, and mask (B, tokens)."""
    caption = torch.stack([F.pad(v, (0, 0, 0, tokens - len(v))) for v in captions])
    mask = torch.stack([(torch.arange(tokens) < len(v)).long() for v in captions])
    return caption.to(device), mask.to(device)


def encode_once(pipeline, prompts):
    """pipeline.encode(prompts), by the first rank, kept in checkpoints/ for these prompts and these
    files of T5. All ranks read a caption from the disk when the caption is used."""
    folder = pipeline.folders["t5"]
    files = sorted((str(file), file.stat().st_size) for file in Path(folder).rglob("*.*"))
    key = json.dumps([prompts, pipeline.net.model.tokens, files])
    path = Path(f"checkpoints/captions-{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt")

    def make():
        captions = pipeline.encode(prompts)
        return {"tokens": torch.cat(captions), "lengths": [len(caption) for caption in captions]}

    save_once(path, make)
    with reading(path, "encoded prompts: remove this file"):
        saved = torch.load(path, mmap=True, weights_only=True)
        return saved["tokens"].split(saved["lengths"])


def read_prompts(path):
    """A text file -> its lines that are not empty. UserError if there are none."""
    with reading(path, "text, one prompt a line"):
        require(Path(path).suffix not in (".csv", ".jsonl"), "a table")
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
        prompts = [line.strip() for line in lines if line.strip()]
        require(prompts, "no prompt in it")
    return prompts


# ---- The miniature ----
MINI_NET = {"in_channels": 3, "out_channels": 3, "hidden_size": 128, "depth": 4, "num_heads": 4,
            "input_size": 16, "caption_channels": 64, "caption_tokens": 48, "time_scale": 250}
MINI_TEXT = {"vocab_size": 384, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2,
             "num_heads": 4, "dropout_rate": 0.0, "feed_forward_proj": "gated-gelu"}


class Miniature(nn.Module):
    """A small PixArt on pixels, preconditioned as EDM, and its T5. The parts are Pipeline's."""
    def __init__(self, net, text):
        super().__init__()
        check_sizes(text, MINI_TEXT)
        self.net_args = {"net": net, "text": text}
        self.net = EDMPrecond(PixArt(**net))
        self.text = transformers.T5EncoderModel(transformers.T5Config(**text))

    def encode(self, prompts):
        tokenizer = transformers.ByT5Tokenizer()  # a token is a byte: no file is needed
        return encode_captions(self.text, tokenizer, prompts, self.net.model.tokens, 500)

    def decode(self, x):
        return x


@torch.no_grad()
def token_features(net, images, t=0.2):
    """The output of a denoiser's middle block for images (N, C, H, W) at noise level t, with no
    caption, averaged over tokens: (N, D), on the CPU."""
    features, model = [], net.model
    middle = model.blocks[len(model.blocks) // 2]
    hook = middle.register_forward_hook(lambda block, inputs, x: features.append(x.mean(1)))
    for x in images.to(next(net.parameters()).device).split(250):
        net(x, t, model.y_embedder.y_embedding.expand(len(x), -1, -1))
    hook.remove()
    return torch.cat(features).cpu()


# ---- Teachers and generators ----
class Pipeline:
    """T5, PixArt's denoiser and the VAE, as functions that a Miniature has too: encode(prompts) ->
    captions (L, C), a list; net(x, t, caption, mask) -> denoised; decode(x) -> (B, 3, H, W)."""
    def __init__(self, net, t5, vae):
        self.net, self.device = net, next(net.parameters()).device
        self.folders = {"t5": str(Path(t5).resolve()), "vae": str(Path(vae).resolve())}
        for flag, folder in self.folders.items():
            require(Path(folder).is_dir(), f"--{flag}: there is no {folder} (lab/PIXART.md)")
        self.vae = load_vae_decoder(vae).to(self.device)

    def encode(self, prompts):
        text = load_text_encoder(self.folders["t5"], torch.bfloat16, self.device)
        return encode_captions(*text, prompts, self.net.model.tokens)

    @torch.no_grad()
    def decode(self, latents):
        return torch.cat([self.vae(some.float()) for some in latents.split(4)])


def build(**net_args):
    """What a g_ema.pt of this stage holds: a Miniature or a PixArtPrecond."""
    return Miniature(**net_args) if "text" in net_args else PixArtPrecond(PixArt(**net_args))


def load_pipeline(path, device="cpu", t5=None, vae=None, prefer_ema=False):
    """A run, a .pt of ours or load_pixart's path -> Miniature or Pipeline, frozen; t_star; meta."""
    if Path(path).suffix == ".pt" or (Path(path) / "args.json").exists():
        net, t_star, meta = load_generator(path, build)
    else:
        net, t_star, meta = PixArtPrecond(load_pixart(path, 16, prefer_ema)), PAPER["t_star"], {}
    if isinstance(net, Miniature):
        return net.to(device), t_star, meta
    t5, vae = t5 or meta.get("t5", T5), vae or meta.get("vae", VAE)
    return Pipeline(net.to(device), t5, vae), t_star, meta


def load_teacher(name, device="cpu", t5=None, vae=None, prefer_ema=False):
    """A name or a file -> its Miniature or Pipeline, frozen; the file's meta; facts for args.json.
    auto is PixArt-alpha if all of its files are here, else the embedded miniature."""
    if name == "auto":
        missing = [path for path in (PIXART, t5 or T5, vae or VAE) if not Path(path).exists()]
        name = "miniature" if missing else "pixart"
        print(f"teacher: {name}", f"(for PixArt-alpha, {missing[0]} is missing)" if missing else "")
    path = Path({"miniature": EMBEDDED, "pixart": PIXART}.get(name, name))
    require(path.exists(), f"--teacher {name}: no {path}; names are auto, miniature, pixart")
    pipeline, _, meta = load_pipeline(path, device, t5, vae, prefer_ema)
    file = inside(inside(path, "transformer"), *WEIGHT_FILES)
    facts = {"teacher": name if name in ("miniature", "pixart") else str(path.resolve()),
             "teacher_sha256": sha256(file), **getattr(pipeline, "folders", {})}
    weights = sum(w.numel() for w in pipeline.net.parameters())
    print(f"{file}: a denoiser of {weights:,} parameters, sha256 {facts['teacher_sha256']}")
    return pipeline, meta, facts


class Guided(nn.Module):
    """The teacher under classifier-free guidance w: D('') + w (D(caption) - D('')), in all channels
    (PixArt's own sampler guides three of four). D('') sees y_embedding under the caption's mask or,
    of a file without y_embedding (diffusers), `blank`: the caption (L, C) of ''."""
    def __init__(self, net, guidance, blank=None):
        super().__init__()
        self.net, self.guidance = net, guidance
        self.image_shape, self.tokens = net.model.image_shape, net.model.tokens
        self.empty, self.empty_mask = net.model.y_embedder.y_embedding, None
        if self.empty is None:
            self.empty, self.empty_mask = pad([blank], self.tokens, next(net.parameters()).device)

    def forward(self, x, t, caption, mask):
        if self.guidance == 1:
            return self.net(x, t, caption, mask)
        empty_mask = mask if self.empty_mask is None else self.empty_mask.expand_as(mask)
        captions = torch.cat([caption, self.empty.expand_as(caption)])
        masks = torch.cat([mask, empty_mask])
        guided, free = self.net(torch.cat([x, x]), torch.cat([t, t]), captions, masks).chunk(2)
        return free + self.guidance * (guided - free)


# ---- Samples, and how good they are ----
def in_batches(solve, net, z, caption, mask, batch=100):
    """solve(denoiser, z) for some of z (N, C, H, W) at once -> (N, C, H, W)"""
    pieces = zip(z.split(batch), caption.split(batch), mask.split(batch))
    return torch.cat([solve(as_denoiser(net, "none", *cond), some) for some, *cond in pieces])


@torch.no_grad()
def sample_one_step(g, t_star, z, caption, mask):
    """(B.15): z (N, C, H, W) standard normal, caption (N, L, C), mask (N, L) -> (N, C, H, W)"""
    return in_batches(lambda denoiser, z: denoiser(t_star * z, t_star), g, z, caption, mask)


def sample_teacher(guided, z, caption, mask, num_steps=14, solver="dpm"):
    """The same by DPM-Solver++, with num_steps evaluations, or by Heun, with 2 num_steps - 1."""
    solve, span = {"dpm": dpm_solver, "heun": edm_sampler}[solver], getattr(guided.net, "span", {})
    return in_batches(partial(solve, num_steps=num_steps, **span), guided, z, caption, mask)


class Test:
    """test(solve), with solve(z, caption, mask) -> x, returns images (N, 3, H, W) of the first 8
    prompts or those in a miniature's file; the time of an image; a miniature's fd, the Frechet
    distance to true images in the teacher's own features, which is not FID."""
    def __init__(self, pipeline, prompts, captions, meta):
        self.pipeline, self.meta = pipeline, meta
        self.prompts = meta.get("tested", prompts[:8])
        captions = pipeline.encode(self.prompts) if "tested" in meta else captions[:8]
        model, device = pipeline.net.model, next(pipeline.net.parameters()).device
        self.cond = pad(captions, model.tokens, device)
        self.z, _ = draw_latents(range(len(captions)), model.image_shape, device=device)

    def __call__(self, solve):
        begun, figures = time.perf_counter(), {}
        images = self.pipeline.decode(solve(self.z, *self.cond)).cpu()
        milliseconds = 1e3 * (time.perf_counter() - begun) / len(images)
        if "mu" in self.meta:
            features = token_features(self.pipeline.net, images.clamp(-1, 1))
            truth = self.meta["mu"], self.meta["sigma"]
            figures["fd"] = frechet_distance(*moments(features), *truth)
        return images, figures | {"ms_image": milliseconds}


def enlarged(images):
    """Images (N, 3, H, W), small ones enlarged to about 110 pixels."""
    return F.interpolate(images, scale_factor=max(1, 110 // images.shape[-1]))


def captioned(sets, texts):
    """Sets of images (N, 3, H, W) above each other, with the first texts below, ten beside each
    other. -> a Pillow image"""
    cells = [F.pad(enlarged(x[:len(texts)]), (0, 8, 0, 8), value=1.0) for x in sets]
    cells = F.pad(torch.cat(cells, dim=2), (0, 0, 0, 64), value=1.0)  # white, for the text
    picture, (tall, wide) = image_grid(cells, min(10, len(texts))), cells.shape[2:]
    for k, text in enumerate(texts):
        lines = "\n".join(textwrap.wrap(text, wide // 6)[:4])  # a letter has 6 pixels
        place = (k % 10 * wide, (k // 10 + 1) * tall - 64)
        ImageDraw.Draw(picture).text(place, lines, "black")
    return picture


# ---- Distillation ----
def draw_captioned(args, d_q, captions, phase, random):
    """Yields draw_batch's (z, t, eps, cond), where cond is captions and masks."""
    for z, t, eps, numbers in draw_batch(args, d_q.image_shape, len(captions), phase, random):
        yield z, t, eps, pad([captions[k] for k in numbers.cpu()], d_q.tokens, random.device)


def train(args, d_q, captions, run, evaluate, more=()):
    """Algorithm 2. d_q is guided and frozen (load_frozen); d_psi and g started without guidance.
    `more` are methods of a script of lab/."""
    d_psi, g, g_ema = run.d_psi, run.g, run.g_ema
    generator_loss, distance = make_generator_loss(args, more)
    weight_psi = lambda_edm if args.weight_psi == "edm" else torch.ones_like
    draw = partial(draw_captioned, args, d_q, captions)
    bind = lambda net, cond: as_denoiser(net, args.amp, *cond)  # -> (x_t, t) -> denoised
    t_star, device = args.t_star, next(g.parameters()).device

    for step in run.steps():
        random = seed_step(args.seed, step, device)
        fall = 1 - step / args.steps if args.anneal == "linear" else 1
        # ---- Algorithm 2: begin ----
        train_only(d_psi, frozen=g)
        for _ in range(args.psi_updates):
            for z, t, eps, cond in draw("psi", random):
                with torch.no_grad():
                    x_0 = bind(g, cond)(z, t_star)
                loss_psi = dsm_loss(bind(d_psi, cond), x_0, t, eps, weight_psi)  # (B.2)
                run.add(loss_psi=loss_psi)
                (loss_psi.sum() / args.batch).backward()
            update(run.opt_psi, (args.lr_psi or args.lr) * fall)

        train_only(g, frozen=d_psi)
        for z, t, eps, cond in draw("theta", random):
            x_0 = bind(g, cond)(z, t_star)  # (B.4), (B.15)
            loss_theta, y_t = generator_loss(bind(d_psi, cond), bind(d_q, cond), x_0, t, eps=eps)
            run.add(loss_theta=loss_theta, divergence=distance.d(y_t),
                    y_norm=y_t.flatten(1).norm(dim=1))
            (loss_theta.sum() / args.batch).backward()  # (B.13)
        update(run.opt_theta, args.lr * fall)
        ema_update(g_ema, g, ema_beta(step * args.batch, args.batch, args.ema_half_life))
        # ---- Algorithm 2: end ----
        if run.due(args.log_every):
            run.write(**(evaluate() if run.due() else {}))


def prepare(args, folder, pipeline, facts):
    """-> the run. g and d_psi start as the teacher, unguided. A miniature's g_ema.pt has its T5."""
    parts = make_parts(pipeline.net, args.adam_eps)
    generator, net_args = parts["g_ema"], pipeline.net.model.net_args
    if isinstance(pipeline, Miniature):
        generator = nn.ModuleDict({"net": generator, "text": pipeline.text})
        net_args = pipeline.net_args
    return Run(args, folder, facts, generator, net_args, **parts)


def distil(args, run, d_q, captions, test, more=()):
    """Train, with looks at the generator; then teacher and one step side by side."""
    for net in (run.d_psi, run.g, d_q.net):
        net.model.checkpointing = args.checkpointing
    for net in (run.d_psi, run.g, d_q) if args.compile else ():
        net.compile()

    def evaluate():
        images, figures = test(partial(sample_one_step, run.g_ema, args.t_star))
        picture = image_grid(enlarged(images[:80]), 10)
        save_picture(picture, run.folder / "samples" / f"{run.step:07}.png")
        return figures

    if run.step == 0 and run.is_first:
        run.write(**evaluate())
    train(args, d_q, captions, run, evaluate, more)
    if run.is_first:
        summarise(args, run, d_q, test)


def summarise(args, run, d_q, test):
    """samples.png, metrics.json, and what they say: the paper's Table 3 in miniature."""
    above, figures = test(partial(sample_teacher, d_q, num_steps=14))
    below, figures_of_g = test(partial(sample_one_step, run.g_ema, args.t_star))
    rows = {"teacher, 14 steps": figures, "one step": figures_of_g}
    if "fd_real" in test.meta:
        rows = {"true images": {"fd": test.meta["fd_real"]}} | rows
    save_picture(captioned([above, below], test.prompts[:20]), run.folder / "samples.png")
    seconds = run.finish(**rows)["seconds"]
    for name, row in rows.items():
        print(f"{name:18}", "  ".join(f"{key} {value:<8.4g}" for key, value in row.items()))
    prompt = shlex.quote(test.prompts[0])
    print(f"{seconds:.0f} s; {run.folder}/samples.png: the teacher above one step\n"
          f"next: python 03_pixart_t2i.py --sample {run.folder} --prompt {prompt}")
    if "fd_real" in test.meta:
        print(f"next: python lab/shapes.py {run.folder}     are shapes and colours right?")


# ---- Without training ----
def sample(args, device):
    """--sample: --n images for each prompt, from seed, seed + 1, ...; the teacher's where asked."""
    prompts = (args.prompt or []) + (read_prompts(args.prompt_file) if args.prompt_file else [])
    texts = [prompt for prompt in prompts if prompt.strip() for _ in range(args.n)]
    require(texts, "--sample needs a text: --prompt 'a large red ring on a blue "
            "background', or --prompt-file FILE")
    options = {"t5": args.t5, "vae": args.vae, "prefer_ema": args.prefer_ema}
    pipeline, t_star, meta = load_pipeline(args.sample, device, **options)
    g, sets = pipeline.net, {}
    z, _ = draw_latents(range(args.seed, args.seed + len(texts)), g.model.image_shape)
    if args.latents:
        with reading(args.latents, f"a torch.save of {tuple(z.shape)}, standard normal"):
            latents = read_weights(args.latents)
            require(latents.shape == z.shape, f"its shape is {tuple(latents.shape)}")
            z = latents.float()
    if args.teacher_steps:
        name = meta.get("teacher") if args.teacher == "auto" else args.teacher
        require(name, f"--teacher-steps: name the teacher of {args.sample} by --teacher")
        d_q = load_teacher(name, device, **options | getattr(pipeline, "folders", {}))[0].net
        require(d_q.model.image_shape == g.model.image_shape,
                f"--teacher {name} makes other images than {args.sample}")
    out = sample_path(args, args.sample, re.sub(r"\W+", "-", texts[0])[:50] + "-")
    *captions, blank = pipeline.encode([*texts, ""])
    z, cond = z.to(device), pad(captions, g.model.tokens, device)
    if args.teacher_steps:
        guidance = meta.get("guidance", PAPER["guidance"])
        guided = Guided(d_q, guidance if args.guidance is None else args.guidance, blank)
        sets["teacher"] = sample_teacher(guided, z, *cond, args.teacher_steps, args.solver)
    sets["one_step"] = sample_one_step(g, args.t_star or t_star, z, *cond)
    sets = {name: pipeline.decode(x).cpu() for name, x in sets.items()}
    draw = partial(captioned, [*sets.values()], texts)
    if len(texts) == len(sets) == 1:  # a single image needs no caption
        draw = partial(image_grid, enlarged(sets["one_step"]))
    write_samples(out, sets, draw, args.seed, texts)
    print(f"{len(texts)} images ({' above '.join(sets)}): {out}")


# ---- The command line ----
def stage_parser(doc=__doc__, methods=()):
    parser = make_parser(doc, methods, images=True, method="sim", **PRESETS["miniature"])
    add = parser.add_argument_group("stage 3").add_argument
    add("--teacher", default="auto", help="auto, miniature (embedded), pixart (in checkpoints/), a "
        "run, a .pt of ours, a .pth, or a folder of diffusers")
    add("--preset", choices=PRESETS, help="other defaults; else a miniature's, or paper (B.3)")
    add("--guidance", type=checked(float, lambda w: w >= 0, "number >= 0"), help="w; 1 is none")
    add("--checkpointing", action=argparse.BooleanOptionalAction, help="less memory, more time")
    add("--prefer-ema", action="store_true", help="the state_dict_ema of a .pth")
    add("--prompts", metavar="FILE", help="to train on: text, one prompt a line")
    add("--t5", metavar="DIR", help=f"T5's encoder ({T5})")
    add("--vae", metavar="DIR", help=f"the decoder of latents ({VAE})")
    add = parser.add_argument_group("samples").add_argument
    add("--prompt", action="append", help="of --sample; may be given more than once")
    add("--prompt-file", metavar="FILE", help="more of them, one a line")
    add("--teacher-steps", type=count, help="the teacher's images beside, in so many steps (14)")
    add("--solver", choices=("dpm", "heun"), default="dpm", help="of the teacher")
    add("--latents", metavar="FILE", help="z, before t* multiplies it, in place of a seed's: .pt")
    return parser


def distil_by_command(parser, argv, device, more=(), make_test=Test):
    """What main does without --sample. A script of lab/ brings `more` methods and another test."""
    args = parser.parse_args(argv)
    require(not (args.prompt or args.prompt_file or args.latents or args.teacher_steps),
            "--prompt, --prompt-file, --latents and --teacher-steps belong to --sample RUN")
    pipeline, meta, facts = load_teacher(args.teacher, device, args.t5, args.vae, args.prefer_ema)
    small = isinstance(pipeline, Miniature)
    preset = args.preset or ("miniature" if small else "paper")
    parser.set_defaults(**PRESETS[preset], preset=preset)
    args = parser.parse_args(argv)  # again, now that the defaults are known
    prompts = read_prompts(args.prompts) if args.prompts else meta.get("prompts")
    require(prompts, "this teacher needs texts to train on: --prompts FILE, one prompt a line")
    texts = [*prompts, ""]
    *captions, blank = pipeline.encode(texts) if small else encode_once(pipeline, texts)
    facts |= {"prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
              "guidance": args.guidance}
    test = make_test(pipeline, prompts, captions, meta)  # before the folder, since it may refuse
    run = prepare(args, Run.default_folder(args, Path(facts["teacher"]).stem), pipeline, facts)
    if not run.finished():
        distil(args, run, Guided(pipeline.net, args.guidance, blank), captions, test, more)


@one_line_errors
def main(argv=None):
    parser = stage_parser()
    args = parser.parse_args(argv)
    device = pick_device(args.device, args.tf32)
    if args.sample:
        parser.set_defaults(t_star=None, guidance=None)  # those in the file
        return sample(parser.parse_args(argv), device)
    distil_by_command(parser, argv, device)


if __name__ == "__main__":
    main()
