"""Stage 3: a text-to-image transformer becomes a one-step generator.

    python 03_pixart_t2i.py                                           eight minutes on two cores: a miniature
    python 03_pixart_t2i.py --teacher pixart --prompts prompts.txt    PixArt-alpha with the settings of B.3
    python 03_pixart_t2i.py --sample RUN --prompt "a large red ring on a blue background" --out ring.png
    python 03_pixart_t2i.py --memory --teacher pixart --batch-gpu 8   what a GPU must have
    python 03_pixart_t2i.py --score images/                           PickScore, CLIP score, aesthetic score

The lines of Algorithm 2 are those of the other stages; the teacher is guided; conditions are captions. The
miniature is PixArt-alpha's transformer, small, with a small T5, on captioned shapes.
"""
import argparse
import copy
import csv
import functools
import hashlib
import io
import json
import math
import shlex
import tempfile
import textwrap
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from einops import rearrange
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch import distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import AutoProcessor, AutoTokenizer, ByT5Tokenizer, CLIPModel, T5Config, T5EncoderModel

from common import (SHAPES, EDMPrecond, Log, Parser, Speed, UserError, accumulate, add_image_arguments,
                    add_method_arguments, add_run_arguments, adopt, annealed, atomic, batch_sum, bench, blame,
                    count_flops, dpm_solver, draw_latents, draw_shape, dsm_loss, edm_sampler, ema_beta,
                    ema_update, image_grid, lambda_edm, load_generator, make_distance, make_generator_loss,
                    my_share, now, number, one_line_errors, open_run, p_edm, pick_device, plot_log, progress,
                    read_shapes, replicate, reporter, require, resume, save, save_generator, save_picture,
                    seed_step, settle, sha256, to_uint8, train_edm, train_only, world)
from eval_fid import frechet_distance, moments

transformers.logging.set_verbosity_error()  # what matters, missing tensors, is an error below
transformers.logging.disable_progress_bar()

# ---- Settings ----
PAPER = {  # B.3; guidance is PixArt's own, for the paper is silent; the rest as in stage 2
    "method": "sim", "sid_alpha": 1.0, "steps": 16_000, "batch": 1024, "lr": 5e-6, "anneal": "none",
    "t_star": 2.5, "p_mean": -2.0, "p_std": 2.0, "psi_mean": -2.0, "psi_std": 2.0, "t_min": 0.01,
    "t_max": 156.6155, "psi_updates": 1, "weight_psi": "one", "ema_half_life": 5e5, "adam_eps": 1e-8,
    "guidance": 4.5, "amp": "bf16", "checkpointing": True, "batch_gpu": 8, "save_every": 100, "log_every": 1}
PRESETS = {"paper": PAPER,
           "miniature": PAPER | {  # measured (README)
               "steps": 500, "batch": 32, "lr": 3e-4, "anneal": "linear", "p_mean": -0.8, "p_std": 1.4,
               "psi_mean": -0.8, "psi_std": 1.4, "t_min": 0.0, "t_max": 1e9, "weight_psi": "edm",
               "ema_half_life": 2e3, "guidance": 1.5, "amp": "none",
               "checkpointing": False, "batch_gpu": None, "log_every": 10},
           "teacher": PAPER | {  # --train-teacher
               "steps": 12_000, "batch": 64, "lr": 1e-3, "anneal": "linear", "ema_half_life": 2e4,
               "psi_mean": -0.8, "psi_std": 1.4, "amp": "none", "batch_gpu": None, "save_every": 500,
               "log_every": 50}}
EMBEDDED = Path(__file__).parent / "assets" / "miniature_teacher.pt"
PIXART, T5, VAE = [f"checkpoints/{name}" for name in (
    "PixArt-XL-2-512x512.pth", "t5-v1_1-xxl", "sd-vae-ft-ema")]


# ---- PixArt-alpha (Chen et al. 2023), with its own names for everything ----
def sinusoids(positions, dim, cosine_first=False):
    """positions (N,) -> (N, dim): waves of periods from 2 pi to 10000 * 2 pi, one half sines, one cosines."""
    omega = torch.exp(-math.log(10000) * torch.arange(dim // 2).to(positions) / (dim // 2))
    angles = positions[:, None] * omega
    waves = [angles.sin(), angles.cos()]
    return torch.cat(waves[::-1] if cosine_first else waves, dim=1)


@functools.cache
def position_embedding(height, width, dim, device="cpu", dtype=torch.float32):
    """-> (1, height * width, dim): the first half of the channels encodes the column, the second the row."""
    columns, rows = [sinusoids(torch.arange(n, dtype=torch.float64), dim // 2) for n in (width, height)]
    table = torch.cat([columns.repeat(height, 1), rows.repeat_interleave(width, dim=0)], dim=1)[None]
    return table.float().to(device, dtype)


class Mlp(nn.Module):
    """Two layers, GELU between: x (..., dim) -> (..., out)."""
    def __init__(self, dim, hidden, out):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, out)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Attention(nn.Module):
    """Self-attention of x (B, N, D) or, where y (B, L, D) is given, attention to y under its mask (B, L)."""
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
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v, mask), "b h l c -> b l (h c)"))


def normal(x, shift, scale):
    """LayerNorm without weights of its own, then shift and scale (B, 1, D) from the time."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class PixArtBlock(nn.Module):
    """x (B, N, D), caption y (B, L, D) with its mask, times t (B, 6, D) -> x"""
    def __init__(self, dim, heads):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)
        self.attn, self.cross_attn = Attention(dim, heads, cross=False), Attention(dim, heads, cross=True)
        self.mlp = Mlp(dim, 4 * dim, dim)

    def forward(self, x, y, t, mask):
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (self.scale_shift_table + t).chunk(6, dim=1)
        x = x + gate * self.attn(normal(x, shift, scale))
        x = x + self.cross_attn(x, y, mask)
        return x + gate_mlp * self.mlp(normal(x, shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """x (B, N, D), t (B, D) -> (B, N, out)"""
    def __init__(self, dim, out):
        super().__init__()
        self.linear = nn.Linear(dim, out)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)

    def forward(self, x, t):
        shift, scale = (self.scale_shift_table + t[:, None]).chunk(2, dim=1)
        return self.linear(normal(x, shift, scale))


class TimeEmbedding(nn.Module):
    """timestep (B,) -> (B, dim); the waves are those of the original, in float32 whatever the weights are."""
    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, timestep):
        waves = sinusoids(timestep.float(), 256, cosine_first=True)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))


class CaptionEmbedding(nn.Module):
    """caption (B, L, C) -> (B, L, dim); y_embedding (L, C) is no caption's, which takes the place of a share
    `dropout` of the captions while training (0 unless set)."""
    def __init__(self, channels, dim, tokens):
        super().__init__()
        self.dropout, self.y_proj = 0.0, Mlp(channels, dim, dim)
        self.register_buffer("y_embedding", torch.randn(tokens, channels) / channels**0.5 if tokens else None)

    def forward(self, caption):
        caption = caption.to(self.y_proj.fc1.weight.dtype)
        if self.training and self.dropout:
            drop = torch.rand(len(caption), 1, 1, device=caption.device) < self.dropout
            caption = torch.where(drop, self.y_embedding, caption)
        return self.y_proj(caption)


XL_2 = {"in_channels": 4, "out_channels": 8, "hidden_size": 1152, "depth": 28, "num_heads": 16,
        "patch_size": 2, "input_size": 64, "caption_channels": 4096, "caption_tokens": 120,
        "time_scale": 1}  # PixArt-XL/2 at 512 x 512, latents of 64 x 64


def check_sizes(given, known):
    """ValueError for arguments, which may come from a file, that no such network has."""
    for name, value in given.items():
        require(name in known and isinstance(value, type(known[name])), f"the argument {str(name)[:20]}")
        require(not isinstance(value, int) or 0 <= value <= 8192, f"{name} is {value}")


class PixArt(nn.Module):
    """The transformer of PixArt-alpha, of the sizes XL_2 unless told otherwise: x (B, C, H, W), timestep
    (B,), caption (B, L, caption_channels), mask (B, L), 1 for valid tokens, or None for all -> (B,
    out_channels, H, W)

    time_scale spreads another noise condition (EDM's) over the range of timesteps."""
    def __init__(self, **net_args):
        super().__init__()
        check_sizes(net_args, XL_2)
        self.net_args = XL_2 | net_args
        n = SimpleNamespace(**self.net_args)
        dim, p = n.hidden_size, n.patch_size
        require(p and dim and n.num_heads and dim % n.num_heads == 0, f"{n.num_heads} heads of {dim}")
        self.time_scale, self.patch_size, self.checkpointing = n.time_scale, p, False
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(n.in_channels, dim, p, p)})
        self.t_embedder = TimeEmbedding(dim)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.y_embedder = CaptionEmbedding(n.caption_channels, dim, n.caption_tokens)
        self.blocks = nn.ModuleList([PixArtBlock(dim, n.num_heads) for _ in range(n.depth)])
        self.final_layer = FinalLayer(dim, p**2 * n.out_channels)
        self.initialise()

    def initialise(self):
        """As PixArt and DiT start: no text and no output at first."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2], self.t_block[1],
                      self.y_embedder.y_proj.fc1, self.y_embedder.y_proj.fc2):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (*[block.cross_attn.proj for block in self.blocks], self.final_layer.linear):
            nn.init.zeros_(layer.weight)

    def forward(self, x, timestep, caption, mask=None):
        x = self.x_embedder["proj"](x)
        _, dim, height, width = x.shape
        x = rearrange(x, "b d h w -> b (h w) d") + position_embedding(height, width, dim, x.device, x.dtype)
        t = self.t_embedder(self.time_scale * timestep).expand(len(x), -1)
        t6 = rearrange(self.t_block(t), "b (six d) -> b six d", six=6)
        y = self.y_embedder(caption)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, y, t6, mask, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, y, t6, mask)
        p = self.patch_size
        return rearrange(self.final_layer(x, t), "b (h w) (p q c) -> b c (h p) (w q)", h=height, p=p, q=p)


# ---- The preconditioning: (B.14), (B.15) ----
@functools.cache
def noise_table(device="cpu"):
    """u (1001,): the noise levels of the 1000 timesteps of iDDPM as EDM has them, falling, then 0."""
    u = torch.zeros(1001, dtype=torch.float64)
    for j in range(1000, 0, -1):
        beta = 0.02 + (1e-4 - 0.02) * j / 1000  # B.3
        u[j - 1] = ((u[j]**2 + 1) / max(1 - beta, 0.001) - 1).sqrt()  # 0.001: EDM's C_1
    return u.float().to(device)


class PixArtPrecond(nn.Module):
    """net(x (B, C, H, W), t, caption, mask) -> denoised x: x - t F(x / sqrt(t^2 + 1), timestep), (B.14), of
    the output channels those that are image. Only the table's index is rounded, t is not. net(z, t_star) is
    the generator (B.15). t stays in float32 whatever the weights are: bfloat16 rounds 999 to 1000."""
    span = {"sigma_min": 0.01, "sigma_max": 156.6155}  # of a sampler: the table's ends

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, t, caption, mask=None):
        t = torch.as_tensor(t, dtype=torch.float32, device=x.device).reshape(-1)
        timestep = 999 - (noise_table(x.device)[:1000] - t[:, None]).abs().argmin(1)
        t = t.to(x.dtype).reshape(-1, 1, 1, 1)
        noise = self.model(x / (t**2 + 1).sqrt(), timestep, caption, mask)[:, :x.shape[1]]
        return x - t * noise.to(x.dtype)


# ---- Files of others: read strictly, and never run ----
def read_weights(path):
    """A .safetensors, or a torch.save of plain tensors (.pth, .pt, .bin). UserError if it is neither."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist: expected a file of weights")
    damage = Exception  # of safetensors or of torch, whatever the file did to them
    with blame(f"{path} is cut short, damaged or holds more than tensors ({{}}): get it again", damage):
        if str(path).endswith(".safetensors"):
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)


def read_json(path):
    with blame(f"{path} cannot be read ({{}}): expected a config.json", OSError, ValueError):
        return dict(json.loads(Path(path).read_text()))


def find_weights(folder):
    """diffusion_pytorch_model in a diffusers folder, in either of its two formats."""
    names = [Path(folder) / f"diffusion_pytorch_model.{kind}" for kind in ("safetensors", "bin")]
    return next((name for name in names if name.exists()), names[0])


DIFFUSERS = {  # its names for PixArt's, in this order
    "pos_embed.proj": "x_embedder.proj", "adaln_single.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2", "adaln_single.linear": "t_block.1",
    "caption_projection.linear_": "y_embedder.y_proj.fc", "transformer_blocks": "blocks",
    "attn1.to_out.0": "attn.proj", "attn2.to_out.0": "cross_attn.proj", "attn2.to_q": "cross_attn.q_linear",
    "ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2", "proj_out": "final_layer.linear"}


def from_diffusers(state):
    """diffusers' names -> PixArt's; q, k and v become one matrix, as do k and v of the captions."""
    renamed = {}
    for name, w in state.items():
        for theirs, ours in DIFFUSERS.items():
            name = name.replace(theirs, ours)
        renamed["final_layer.scale_shift_table" if name == "scale_shift_table" else name] = w
    for name in [name for name in renamed if ".attn1.to_q." in name or ".attn2.to_k." in name]:
        parts = [name] + [name.replace("to_q", "to_k")] * ("to_q" in name)
        parts += [parts[-1].replace("to_k", "to_v")]
        target = name.replace("attn1.to_q", "attn.qkv").replace("attn2.to_k", "cross_attn.kv_linear")
        renamed[target] = torch.cat([renamed.pop(part) for part in parts])
    return renamed


def load_pixart(path, num_heads=16, prefer_ema=False):
    """PixArt-alpha, frozen, in float32: its original .pth ('state_dict', 'state_dict_ema' if preferred, or
    bare), the released SIM-DiT ('ema'), or a diffusers folder, whose config says the heads. -> PixArt

    UserError, with the tensors named, unless all are there, of the right shape and finite, and no others."""
    path = Path(path) / "transformer" if (Path(path) / "transformer").is_dir() else Path(path)
    config = read_json(path / "config.json") if path.is_dir() else {}
    saved = read_weights(find_weights(path) if path.is_dir() else path)
    with blame(f"{path} is refused ({{}}): expected PixArt-alpha at 256 or 512"):
        names = [name for name in ("ema", "state_dict_ema", "state_dict") if name in saved]
        names = [name for name in names if prefer_ema or name != "state_dict_ema"]
        require(not prefer_ema or names[:1] == ["state_dict_ema"], "it has no state_dict_ema")
        given = saved[names[0]] if names else saved
        state = {name.removeprefix("module.").removeprefix("model."): w for name, w in given.items()}
        require(len(state) == len(given), "the same tensor twice, with and without a prefix")
        if names[:1] == ["ema"]:
            state.pop("u", None)  # the release's noise table, which is noise_table()
        require(not any(word in name for name in state for word in ("csize_", "ar_emb", "resolution_emb"))
                and config.get("interpolation_scale") in (None, 1), "1024-MS or another scale of positions")
        sizes = {"num_heads": num_heads}
        if config:
            state, sizes = from_diffusers(state), {
                "num_heads": config["num_attention_heads"], "input_size": config["sample_size"],
                "depth": config["num_layers"], "caption_tokens": 0}
        return adopt(PixArt, net_args_of(state) | sizes, state)


def net_args_of(state):
    """PixArt's arguments, from the shapes of its weights; pos_embed is checked and dropped. ValueError,
    KeyError if it cannot be PixArt's."""
    missing = [name for name in ("x_embedder.proj.weight", "final_layer.linear.weight",
                                 "y_embedder.y_proj.fc1.weight") if name not in state]
    require(not missing, f"tensors are missing: {', '.join(missing)}")
    hidden, in_channels, patch, _ = state["x_embedder.proj.weight"].shape
    empty, table = state.get("y_embedder.y_embedding"), state.pop("pos_embed", None)
    side = XL_2["input_size"] // patch if table is None else math.isqrt(table.shape[1])
    expected = position_embedding(side, side, hidden)
    require(table is None or table.shape == expected.shape
            and torch.allclose(table.float(), expected, atol=1e-3), "another position embedding")
    return {"hidden_size": hidden, "in_channels": in_channels, "patch_size": patch,
            "input_size": side * patch,
            "out_channels": len(state["final_layer.linear.weight"]) // patch**2,
            "depth": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
            "caption_channels": state["y_embedder.y_proj.fc1.weight"].shape[1],
            "caption_tokens": XL_2["caption_tokens"] if empty is None else len(empty)}


# ---- From latents to pixels: the decoder of sd-vae-ft-ema, with diffusers' names ----
def vae_norm(channels, groups):
    return nn.GroupNorm(groups, channels, eps=1e-6)


class VAEResnet(nn.Module):
    """A residual block, x (B, c_in, H, W) -> (B, c_out, H, W)."""
    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1, self.conv1 = vae_norm(c_in, groups), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = vae_norm(c_out, groups), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class VAEAttention(nn.Module):
    """One head over all pixels, with a residual: x (B, C, H, W) -> the same shape."""
    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = vae_norm(channels, groups)
        self.to_q, self.to_k, self.to_v = [nn.Linear(channels, channels) for _ in range(3)]
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        h = rearrange(self.group_norm(x), "b c h w -> b (h w) c")
        q, k, v = [layer(h)[:, None] for layer in (self.to_q, self.to_k, self.to_v)]
        h = F.scaled_dot_product_attention(q, k, v)
        return x + rearrange(self.to_out[0](h[:, 0]), "b (h w) c -> b c h w", h=x.shape[2])


class VAEDecoder(nn.Module):
    """latents (B, 4, H, W), as sampled -> images (B, 3, 8H, 8W), about [-1, 1], not clamped."""
    def __init__(self, channels, layers, groups, latent_channels=4, scaling_factor=0.18215):
        super().__init__()
        self.scaling_factor, c = scaling_factor, channels[-1]
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        ups = []
        for i, c_out in enumerate(reversed(channels)):
            resnets = [VAEResnet(c if j == 0 else c_out, c_out, groups) for j in range(layers + 1)]
            up = {"resnets": nn.ModuleList(resnets)}
            if i < len(channels) - 1:
                conv = nn.ModuleDict({"conv": nn.Conv2d(c_out, c_out, 3, padding=1)})
                up["upsamplers"] = nn.ModuleList([conv])
            ups, c = [*ups, nn.ModuleDict(up)], c_out
        top = channels[-1]
        self.decoder = nn.ModuleDict({
            "conv_in": nn.Conv2d(latent_channels, top, 3, padding=1),
            "mid_block": nn.ModuleDict({
                "resnets": nn.ModuleList([VAEResnet(top, top, groups) for _ in range(2)]),
                "attentions": nn.ModuleList([VAEAttention(top, groups)])}),
            "up_blocks": nn.ModuleList(ups),
            "conv_norm_out": vae_norm(c, groups), "conv_out": nn.Conv2d(c, 3, 3, padding=1)})

    def forward(self, latents):
        d = self.decoder
        x = d["conv_in"](self.post_quant_conv(latents / self.scaling_factor))
        first, second = d["mid_block"]["resnets"]
        x = second(d["mid_block"]["attentions"][0](first(x)))
        for up in d["up_blocks"]:
            for resnet in up["resnets"]:
                x = resnet(x)
            if "upsamplers" in up:
                x = up["upsamplers"][0]["conv"](F.interpolate(x, scale_factor=2))
        return d["conv_out"](F.silu(d["conv_norm_out"](x)))


def load_vae_decoder(folder):
    """The decoder of a diffusers AutoencoderKL (its folder, or the one above its vae/), frozen, in float32;
    the mid attention has either spelling. UserError as in load_pixart."""
    folder = Path(folder) / "vae" if (Path(folder) / "vae").is_dir() else Path(folder)
    config, state = read_json(folder / "config.json"), {}
    older = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    for name, w in read_weights(find_weights(folder)).items():
        for theirs, ours in older.items():
            name = name.replace(f"attentions.0.{theirs}.", f"attentions.0.{ours}.")
        if not name.startswith(("encoder.", "quant_conv.")):
            state[name] = w
    with blame(f"{folder} is refused ({{}}): expected a diffusers AutoencoderKL"):
        args = {"channels": config["block_out_channels"], "layers": config["layers_per_block"],
                "groups": config["norm_num_groups"], "latent_channels": config["latent_channels"]}
        args["scaling_factor"] = config.get("scaling_factor", 0.18215)  # the published config lacks it
        return adopt(VAEDecoder, args, state)


# ---- Text: T5, once for all prompts ----
T5_FILES = "config.json, spiece.model, tokenizer_config.json, special_tokens_map.json and its weights"


def load_text_encoder(folder, dtype):
    """T5EncoderModel and its tokenizer from a folder in PixArt's layout, or of a diffusers pipeline.
    UserError if it cannot be read, or lacks a tensor: transformers would make one up."""
    model, words = [Path(folder) / name if (Path(folder) / name).is_dir() else Path(folder)
                    for name in ("text_encoder", "tokenizer")]
    if not model.is_dir():
        raise UserError(f"{folder} does not exist: expected the folder of T5, with {T5_FILES}")
    with blame(f"{folder} cannot be read as a T5 encoder ({{}}): expected {T5_FILES}", Exception):
        require((words / "spiece.model").exists(), "no spiece.model")  # else any text would be one token
        tokenizer = AutoTokenizer.from_pretrained(words, local_files_only=True)
        encoder, info = T5EncoderModel.from_pretrained(model, local_files_only=True, dtype=dtype,
                                                       output_loading_info=True)
        require(not info["missing_keys"], f"it lacks {sorted(info['missing_keys'])[:3]}")
    return encoder.to(dtype).eval().requires_grad_(False), tokenizer


def encode_in_batches(folder, prompts, dtype, tokens, batch=16, device="cpu"):
    """Yields what encode_prompts returns, on the CPU, a batch at a time."""
    encoder, tokenizer = load_text_encoder(folder, dtype)
    encoder, prompts = encoder.to(device), [prompt.strip() for prompt in prompts]
    if long := sum(len(ids) > tokens for ids in tokenizer(prompts, verbose=False).input_ids):
        print(f"{long} prompts have more than {tokens} tokens: what is beyond is cut off")
    for first in progress(range(0, len(prompts), batch), "T5"):
        text = tokenizer(prompts[first:first + batch], max_length=tokens, padding="max_length",
                         truncation=True, return_tensors="pt").to(device)
        with torch.no_grad():
            encoded = encoder(text.input_ids, text.attention_mask).last_hidden_state
        yield encoded.cpu(), text.attention_mask.cpu()


def encode_prompts(folder, prompts, dtype=torch.float32, tokens=120, **options):
    """prompts (N strings) -> T5's embeddings (N, tokens, C) in dtype, and masks (N, tokens) of what is text.
    Longer prompts are cut, which is said. UserError for a folder that is not T5's."""
    return tuple(map(torch.cat, zip(*encode_in_batches(folder, prompts, dtype, tokens, **options))))


@dataclass
class Captions:
    """N encoded prompts without their padding; captions[k], k (B,) -> (B, length, C), masks (B, length)."""
    tokens: torch.Tensor  # (those of all prompts, C)
    lengths: torch.Tensor  # (N,)
    length: int

    @classmethod
    def pack(cls, batches):
        """From an iterable of embeddings (B, length, C), masks (B, length)."""
        packed = [(embeddings[masks.bool()], masks.sum(1), masks.shape[1]) for embeddings, masks in batches]
        tokens, lengths, (length, *_) = zip(*packed)
        return cls(torch.cat(tokens), torch.cat(lengths), length)

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, k):
        k = torch.as_tensor(k, device="cpu")
        ends, lengths = self.lengths.cumsum(0)[k], self.lengths[k]
        masks = (torch.arange(self.length) < lengths[:, None]).long()
        captions = self.tokens.new_zeros(len(k), self.length, self.tokens.shape[1])
        captions[masks.bool()] = torch.cat([self.tokens[end - n:end] for end, n in zip(ends, lengths)])
        return captions, masks


def cached(teacher, folder, prompts):
    """teacher.encode(prompts), kept in checkpoints/ for these prompts and these files of T5's, and read from
    the disk as it is used, by all ranks. The first rank encodes."""
    files = sorted((str(file.relative_to(folder)), file.stat().st_size)
                   for file in Path(folder).rglob("*") if file.is_file())
    key = json.dumps([prompts, teacher.length, str(Path(folder).resolve()), files])
    path = Path("checkpoints") / f"captions-{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
    if world()[0] == 0 and not path.exists():
        path.parent.mkdir(exist_ok=True)
        save(vars(teacher.encode(prompts)), path)
        print(f"the prompts are encoded in {path}, {path.stat().st_size / 1e9:.2f} GB")
    if dist.is_initialized():
        dist.barrier()
    with blame(f"{path} is damaged ({{}}): remove it", Exception):
        return Captions(**torch.load(path, mmap=True, weights_only=True))


def read_prompts(path, column="prompt"):
    """A text file's lines but for empty ones, or a column of a .csv or .jsonl. UserError if there are
    none."""
    path = Path(path)
    expected = f"expected text, one prompt a line, or .csv or .jsonl with a column {column} (--column)"
    with blame(f"{path} cannot be read as prompts ({{}}): {expected}", OSError, ValueError, LookupError,
               TypeError, AttributeError, csv.Error):
        text = path.read_text(encoding="utf-8-sig")
        lines, rows = text.split("\n"), []
        if path.suffix == ".csv":
            rows = list(csv.DictReader(io.StringIO(text)))
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in lines if line.strip()]
        require(all(column in row for row in rows), f"no column {column}")
        lines = [row[column] or "" for row in rows] if path.suffix in (".csv", ".jsonl") else lines
        prompts = [line.strip() for line in lines if line.strip()]
        require(prompts, "there are none in it")
    return prompts


# ---- The miniature: captioned shapes ----
COLOURS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.6, 0.15), "blue": (0.1, 0.2, 0.9),
           "yellow": (0.95, 0.9, 0.1), "purple": (0.6, 0.15, 0.75), "cyan": (0.2, 0.9, 0.95),
           "white": (1.0, 1.0, 1.0), "black": (0.0, 0.0, 0.0)}
SIZES = {"small": (0.24, 0.29), "large": (0.35, 0.4)}  # radii, in images
PROMPTS = [(size, colour, shape, background) for size in SIZES for colour in COLOURS for shape in SHAPES
           for background in COLOURS if background != colour]
TESTED, TRUE = 1000, 5000  # prompts of a test; true images that it compares with
TOKENS = 48  # bytes of the longest caption, and the end
MINI_NET = {"in_channels": 3, "out_channels": 3, "hidden_size": 128, "depth": 4, "num_heads": 4,
            "input_size": 16, "caption_channels": 64, "caption_tokens": TOKENS, "time_scale": 250}
MINI_TEXT = {"vocab_size": 384, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4,
             "dropout_rate": 0.0, "feed_forward_proj": "gated-gelu"}


def held_out(prompt):
    """A tenth of the combinations of shape and colours, which the teacher is never trained on."""
    _, colour, shape, background = prompt
    names = list(COLOURS)
    return (3 * list(SHAPES).index(shape) + names.index(colour) + 7 * names.index(background)) % 10 == 0


def write(prompt):
    return "a {} {} {} on a {} background".format(*prompt)


def draw(prompt, random, size=16):
    """A prompt's true image, about the centre -> (3, size, size) in [-1, 1]"""
    word, colour, shape, background = prompt
    radius = size * random.uniform(*SIZES[word])
    x, y = size / 2 + random.uniform(-1.5, 1.5, 2)
    colours = [np.array(COLOURS[name], dtype=np.float32) for name in (colour, background)]
    image = torch.from_numpy(draw_shape(shape, x, y, radius, *colours, size))
    return rearrange(image, "h w c -> c h w") * 2 - 1


def tested_prompts():
    """Always the same, those held out among them, as often as they occur."""
    return [PROMPTS[k] for k in np.random.default_rng(0).integers(len(PROMPTS), size=TESTED)]


def tokenize(texts, length=TOKENS):
    """-> ids and mask (N, length) of bytes."""
    if long := sum(len(text.encode()) >= length for text in texts):
        print(f"{long} prompts have more than {length - 1} bytes: what is beyond is cut off")
    made = ByT5Tokenizer()(texts, padding="max_length", max_length=length, truncation=True,
                           return_tensors="pt")
    return made.input_ids, made.attention_mask


class Miniature(nn.Module):
    """A small PixArt with EDM's preconditioning on pixels, and the text encoder that it learns with:
    net(x, t, ids, mask) -> denoised x."""
    def __init__(self, net, text):
        super().__init__()
        check_sizes(text, MINI_TEXT)
        self.text_args = text
        self.net, self.text = EDMPrecond(PixArt(**net)), T5EncoderModel(T5Config(**text))

    def forward(self, x, t, ids, mask):
        return self.net(x, t, self.text(ids, mask).last_hidden_state, mask)


def prompt_accuracy(images, prompts):
    """Shares of images (N, 3, 16, 16) in [-1, 1] whose shape, colour and background are those of the prompts
    (N), their mean, that of prompts held out, and the share with all three right; read off the image
    (common.read_shapes)."""
    table, names = torch.tensor(list(COLOURS.values())), list(COLOURS)
    shapes, *colours = read_shapes(to_uint8(images))
    read = torch.stack([shapes, *[torch.cdist(colour, table).argmin(1) for colour in colours]], dim=1)
    asked = [(list(SHAPES).index(shape), names.index(colour), names.index(background))
             for _, colour, shape, background in prompts]
    right = (read == torch.tensor(asked)).double()
    new = torch.tensor([held_out(prompt) for prompt in prompts])
    shares = dict(zip(("shape", "colour", "background"), right.mean(0).tolist()))
    return shares | {"mean": right.mean().item(), "all": right.prod(1).mean().item(),
                     "held_out": right[new].mean().item()}


@torch.no_grad()
def token_features(net, images, t=0.2):
    """What the teacher's middle block makes of images (N, C, H, W) at t and no prompt, averaged over tokens:
    (N, D)."""
    found, model = [], net.model
    middle = model.blocks[len(model.blocks) // 2]
    hook = middle.register_forward_hook(lambda block, inputs, x: found.append(x.mean(1)))
    for x in images.split(250):
        net(x, t, model.y_embedder.y_embedding.expand(len(x), -1, -1))
    hook.remove()
    return torch.cat(found).cpu()


# ---- Teachers ----
@dataclass
class Teacher:
    """A denoiser net(x, t, caption, mask), frozen, and what surrounds it: encode(prompts) -> Captions, each
    of this length; decode(x) -> images (B, 3, H, W) in about [-1, 1]; whole, the Miniature that it is a part
    of, if it is."""
    net: nn.Module
    length: int
    encode: Callable
    decode: Callable
    whole: Miniature | None = None


def image_shape(net):
    """(C, H, W) of a denoiser's x"""
    sizes = net.model.net_args
    return sizes["in_channels"], sizes["input_size"], sizes["input_size"]


def miniature(whole):
    """A Miniature as a Teacher: pixels are its latents."""
    @torch.no_grad()
    def encode(prompts):
        device = next(whole.parameters()).device
        pairs = zip(*[v.split(500) for v in tokenize(prompts)])
        return Captions.pack((whole.text(ids.to(device), masks.to(device)).last_hidden_state.cpu(), masks)
                             for ids, masks in pairs)
    return Teacher(whole.net, TOKENS, encode, lambda x: x, whole)


def pixart(net, args, device):
    """A PixArtPrecond as a Teacher, with T5 and the VAE of --t5 and --vae. UserError if one is not there."""
    args.t5, args.vae = args.t5 or T5, args.vae or VAE
    for path, flag in ((args.t5, "--t5"), (args.vae, "--vae")):
        if not Path(path).is_dir():
            raise UserError(f"{flag}: the folder {path} does not exist (README.md: what to put there)")
    length = net.model.net_args["caption_tokens"] or XL_2["caption_tokens"]
    encode = partial(encode_in_batches, args.t5, dtype=torch.bfloat16, tokens=length, device=device)
    vae = load_vae_decoder(args.vae).to(device)

    @torch.no_grad()
    def decode(x):
        return torch.cat([vae(latents.float()) for latents in x.split(4)])
    return Teacher(net, length, lambda prompts: Captions.pack(encode(prompts)), decode)


def surround(net, args, device):
    return miniature(net) if isinstance(net, Miniature) else pixart(net, args, device)


def encode_all(encode, prompts):
    """-> the Captions of prompts; caption and mask of the empty text, for Guided"""
    captions = encode([*prompts, ""])
    blank = [v[0] for v in captions[[len(prompts)]]]
    captions.lengths = captions.lengths[:-1]
    return captions, blank


def build(**net_args):
    """What save_generator stored: a Miniature or a PixArtPrecond."""
    return Miniature(**net_args) if "text" in net_args else PixArtPrecond(PixArt(**net_args))


def load_network(path, prefer_ema=False):
    """A run's folder, a file of ours, or PixArt's in any of load_pixart's forms. -> (Miniature or
    PixArtPrecond, t_star, meta)"""
    ours = (Path(path) / "args.json").exists()
    with suppress(Exception):  # what cannot be read, load_pixart has words for
        ours = ours or "net_args" in torch.load(path, map_location="meta", weights_only=True)
    if ours:
        return load_generator(path, build)
    folder = Path(path)
    if folder.is_dir() and not ((folder / "transformer").exists() or (folder / "config.json").exists()):
        raise UserError(f"{path} is the folder of no run and of no diffusers model")
    return PixArtPrecond(load_pixart(path, prefer_ema=prefer_ema)), PAPER["t_star"], {}


def load_teacher(args, device):
    """args.teacher, frozen, as a Teacher; auto is PixArt-alpha if its files are here. UserError if it cannot
    be had."""
    missing = [path for path in (PIXART, args.t5 or T5, args.vae or VAE) if not Path(path).exists()]
    if args.teacher == "auto":
        args.teacher = "miniature" if missing else "pixart"
        print(f"teacher: the embedded miniature; for PixArt-alpha, {missing[0]} is missing" if missing else
              "teacher: PixArt-alpha")
    path = Path({"miniature": EMBEDDED, "pixart": PIXART}.get(args.teacher, args.teacher))
    if not path.exists():
        raise UserError(f"--teacher {args.teacher}: there is no {path} (README.md: which); the names "
                        "are auto, miniature and pixart")
    net = load_network(path, args.prefer_ema)[0].to(device)
    inside = (path / "g_ema.pt", find_weights(path / "transformer"), find_weights(path))
    file = path if path.is_file() else next(file for file in inside if file.exists())
    args.teacher_sha256 = sha256(file)
    weights = sum(w.numel() for w in net.parameters())
    print(f"{file}: {weights:,} parameters, sha256 {args.teacher_sha256}")
    return surround(net, args, device)


def train_teacher(args, folder, device):
    """The miniature, the text encoder with it; a tenth of the captions is dropped. -> teacher.pt in the
    folder"""
    torch.manual_seed(args.seed)
    net = Miniature(MINI_NET, MINI_TEXT).to(device)
    net.net.model.y_embedder.dropout = 0.1
    seen = [prompt for prompt in PROMPTS if not held_out(prompt)]
    texts = [v.to(device) for v in tokenize([write(prompt) for prompt in seen])]

    def batch(step):
        random = np.random.default_rng([args.seed, step])
        chosen = random.integers(len(seen), size=args.batch)
        return (given_caption(net, [v[chosen] for v in texts], args.amp),
                torch.stack([draw(seen[k], random) for k in chosen]))

    optimiser = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99), fused=True)
    ema = train_edm(args, folder, net, optimiser, batch).half()
    meta = {"data": "captioned shapes", "steps": args.steps, "batch": args.batch, "seed": args.seed}
    save_generator(folder / "teacher.pt", ema, {"net": MINI_NET, "text": MINI_TEXT}, PAPER["t_star"], **meta)
    print(f"next: python 03_pixart_t2i.py --teacher {folder}/teacher.pt")


# ---- Distillation ----
class Guided(nn.Module):
    """The teacher under classifier-free guidance, D('') + w (D(caption) - D('')), all channels (PixArt's own
    sampler guides the first three of four). D('') has the teacher's own embedding of no caption under the
    caption's mask, or, where its file has none (diffusers), the encoded empty caption."""
    def __init__(self, net, guidance, empty=None, empty_mask=None):
        super().__init__()
        self.net, self.guidance, own = net, guidance, net.model.y_embedder.y_embedding
        self.register_buffer("empty", empty if own is None else own)
        self.register_buffer("empty_mask", empty_mask if own is None else None)

    def forward(self, x, t, caption, mask):
        if self.guidance == 1:
            return self.net(x, t, caption, mask)
        empty_mask = mask if self.empty_mask is None else self.empty_mask.expand_as(mask)
        both = torch.cat([caption, self.empty.expand_as(caption)]), torch.cat([mask, empty_mask])
        guided, free = self.net(torch.cat([x, x]), torch.cat([t, t]), *both).chunk(2)
        return free + self.guidance * (guided - free)


def given_caption(net, cond, amp="none"):
    """(x_t, t) -> denoised, with the caption and its mask closed over, under autocast if amp is bf16;
    float32, as are y and its norm."""
    def denoiser(x_t, t):
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=amp == "bf16"):
            return net(x_t, t.expand(len(x_t), 1, 1, 1), *cond).to(x_t.dtype)
    return denoiser


def prepare(args, folder, guided):
    """The parts of a run: new, or as ckpt.pt has them. The teacher is guided, what starts from it is not."""
    d_psi, g, g_ema = [copy.deepcopy(guided.net) for _ in range(3)]
    for net in (d_psi, g, guided.net):
        net.model.checkpointing = args.checkpointing
    optimiser = partial(torch.optim.Adam, betas=(0.0, 0.999), eps=args.adam_eps, fused=True)  # B.3
    parts = {"d_psi": d_psi, "g": g, "g_ema": g_ema, "opt_psi": optimiser(d_psi.parameters()),
             "opt_theta": optimiser(g.parameters()), "log": Log(folder / "log.jsonl", args.steps)}
    resume(folder, parts)
    return parts


def train(args, d_q, captions, parts, report):
    """Algorithm 2, up to args.steps updates of g, for these Captions; report() is called after each."""
    d_psi, g, g_ema, opt_psi, opt_theta, log = parts.values()
    device, shape = next(d_q.parameters()).device, (args.batch, *image_shape(d_q.net))
    for net in (d_psi, g, d_q) if args.compile else ():
        net.compile()
    d_psi, g = replicate(d_psi.requires_grad_(True)), replicate(g.requires_grad_(True))
    distance = make_distance(args)
    generator_loss = make_generator_loss(args, distance)
    weight_psi, rows = lambda_edm if args.weight_psi == "edm" else torch.ones_like, args.batch // world()[1]
    span = {"t_min": args.t_min, "t_max": args.t_max, "truncate": args.truncate}
    times = {"psi": partial(p_edm, mean=args.psi_mean, std=args.psi_std, **span),
             "theta": partial(p_edm, mean=args.p_mean, std=args.p_std, **span)}
    t_star = torch.full((1, 1, 1, 1), args.t_star, device=device)

    @functools.lru_cache(maxsize=1)  # a micro-batch's, when its turn comes; its tensor cond is the key
    def look_up(cond):
        return [v.to(device) for v in captions[cond]]

    def given(net, cond):  # cond (B,): which captions
        return given_caption(net, look_up(cond), args.amp)

    def draw(phase):  # -> [(z, t, eps, cond)], this rank's micro-batches of the global draw
        where = {"device": device, "generator": random}
        z, eps = args.t_star * torch.randn(shape, **where), torch.randn(shape, **where)
        t = times[phase]((args.batch, 1, 1, 1), **where)
        chosen = torch.randint(len(captions), (args.batch,), **where)  # prompts alone: data-free
        return my_share((z, t, eps, chosen), args.batch_gpu)

    def generate(g, z, cond):
        return given(g, cond)(z, t_star)  # (B.15)

    while log.step < args.steps:
        for optimiser in (opt_psi, opt_theta):
            optimiser.param_groups[0]["lr"] = annealed(args, log.step)
        random = seed_step(args.seed, log.step, device)
        # ---- Algorithm 2: begin ----
        train_only(d_psi, frozen=g)
        for _ in range(args.psi_updates):
            opt_psi.zero_grad()
            for z, t, eps, cond in accumulate(d_psi, draw("psi")):
                with torch.no_grad():
                    x_0 = generate(g, z, cond)
                loss_psi = dsm_loss(given(d_psi, cond), x_0, t, eps, weight_psi)  # (B.2)
                log.add(loss_psi=loss_psi)
                (loss_psi.sum() / rows).backward()
            opt_psi.step()

        train_only(g, frozen=d_psi)
        opt_theta.zero_grad()
        for z, t, eps, cond in accumulate(g, draw("theta")):
            x_0 = generate(g, z, cond)
            loss_theta, y_t = generator_loss(given(d_psi, cond), given(d_q, cond), x_0, t, eps=eps)  # (B.13)
            log.add(loss_theta=loss_theta, divergence=distance.d(y_t), y_norm=batch_sum(y_t**2).sqrt())
            (loss_theta.sum() / rows).backward()
        opt_theta.step()
        ema_update(g_ema, g, ema_beta(log.step * args.batch, args.batch, args.ema_half_life))
        # ---- Algorithm 2: end ----
        log.advance()
        report()


def passes(args):
    """psi's and theta's updates, in forwards: a backward is two, or one where weights are frozen, and one
    more with checkpointing; guidance runs the teacher twice."""
    again, q = int(args.checkpointing), 1 if args.guidance == 1 else 2
    theta = 3 + again + (1 + q if args.method == "di" else (2 + again) * (1 + q))
    return args.psi_updates * (1 + 3 + again), theta


def forward_flops(net, length):
    """FLOPs of the network for one image and a caption of this length."""
    device = next(net.parameters()).device
    x = torch.zeros(1, *image_shape(net), device=device)
    cond = torch.zeros(1, length, net.model.net_args["caption_channels"], device=device), None
    return count_flops(lambda: given_caption(net, cond)(x, torch.ones_like(x[:, :1, :1, :1])))


# ---- Samples, with their captions, and how good they are ----
def in_batches(solve, net, z, captions, masks, batch=100):
    """solve(denoiser, z) for z (N, C, H, W), captions (N, L, C), masks (N, L), some at once -> (N, C, H,
    W)"""
    pieces = zip(z.split(batch), captions.split(batch), masks.split(batch))
    return torch.cat([solve(given_caption(net, cond), v) for v, *cond in pieces])


@torch.no_grad()
def sample_one_step(g, t_star, z, captions, masks):
    """z (N, C, H, W) standard normal, captions (N, L, C), masks (N, L) -> latents (N, C, H, W): (B.15)"""
    t = torch.full((1, 1, 1, 1), t_star, device=z.device)
    return in_batches(lambda denoiser, v: denoiser(t * v, t), g, z, captions, masks)


def sample_teacher(guided, z, captions, masks, num_steps=14, solver="dpm"):
    """The same by DPM-Solver++ of second order (num_steps evaluations of the guided teacher), or Heun's
    method (2 num_steps - 1)."""
    solve, span = dpm_solver if solver == "dpm" else edm_sampler, getattr(guided.net, "span", {})
    return in_batches(partial(solve, num_steps=num_steps, **span), guided, z, captions, masks)


def captioned(sets, texts, across=10):
    """Sets of images (N, 3, H, W) above each other, with their texts below. -> a Pillow image"""
    gap = max(1, sets[0].shape[-1] // 16)
    framed = [to_uint8(F.pad(images, (0, gap, 0, gap), value=1)) for images in sets]
    zoom = max(1, 110 // framed[0].shape[-1])
    size, blocks = framed[0].shape[-1] * zoom, []
    for first in range(0, len(texts), across):
        some = slice(first, first + across)
        grid = image_grid(torch.cat([images[some] for images in framed]), len(texts[some]))
        block = Image.new("RGB", (size * min(across, len(texts)), grid.height * zoom + 64), "white")
        block.paste(grid.resize((grid.width * zoom, grid.height * zoom), Image.Resampling.NEAREST))
        for i, text in enumerate(texts[some]):
            lines = "\n".join(textwrap.wrap(text, size // 6)[:4])
            ImageDraw.Draw(block).text((i * size, grid.height * zoom), lines, "black")
        blocks.append(np.asarray(block))
    return Image.fromarray(np.concatenate(blocks))


def distil(args, folder, teacher, prompts, captions, blank):
    """Train, with a log, pictures and checkpoints as it goes; then teacher and one step side by side."""
    (folder / "samples").mkdir(exist_ok=True)
    device = next(teacher.net.parameters()).device
    guided = Guided(teacher.net, args.guidance, *blank).to(device)
    parts, test = prepare(args, folder, guided), Test(teacher, prompts, captions)
    g, log, dtype = parts["g_ema"], parts["log"], torch.bfloat16 if args.amp == "bf16" else torch.float32

    def keep(file):
        net, net_args = g, g.model.net_args
        if teacher.whole:
            net = nn.ModuleDict({"net": g, "text": teacher.whole.text})
            net_args = {"net": net_args, "text": teacher.whole.text_args}
        known = {name: place if place in (None, "miniature", "pixart") else str(Path(place).resolve())
                 for name, place in (("teacher", args.teacher), ("t5", args.t5), ("vae", args.vae))}
        save_generator(folder / file, net, net_args, args.t_star, guidance=args.guidance, step=log.step,
                       **known)

    def look():
        images, figures = test(partial(sample_one_step, g, args.t_star))
        save_picture(image_grid(to_uint8(images[:80]), 10), folder / "samples" / f"{log.step:07}.png")
        return figures

    flops = sum(passes(args)) * forward_flops(teacher.net, captions.length)
    speed = Speed(log.step, args.batch, flops, device, dtype)
    times = math.ceil(args.batch / world()[1] / args.batch_gpu)
    print(f"batch {args.batch}: {world()[1]} ranks x {times} micro-batches of at most {args.batch_gpu}")
    train(args, guided, captions, parts, reporter(args, folder, parts, speed, look, keep))
    if world()[0] == 0:
        summarise(args, folder, test, guided, g, log)


class Test:
    """What a run is judged by, the same at all times. test(solve), solve(z, captions, masks) -> latents,
    gives the images of its prompts, and figures: the time of an image and, of a miniature, prompt_accuracy
    and the Frechet distance in the teacher's features of TESTED images to TRUE ones (it compares with nothing
    else)."""
    def __init__(self, teacher, prompts, captions):
        self.teacher, self.prompts = teacher, prompts[:8]
        self.asked = tested_prompts() if teacher.whole else None
        if self.asked:
            self.prompts = [write(prompt) for prompt in self.asked]
            captions = teacher.encode(self.prompts)
            self.truth = moments(token_features(teacher.net, self.draw_true(TRUE, 1)))
        device, n = next(teacher.net.parameters()).device, len(self.prompts)
        self.cond = [v.to(device) for v in captions[range(n)]]
        self.z = draw_latents(range(n), image_shape(teacher.net))[0].to(device)

    def draw_true(self, n, seed):
        random = np.random.default_rng([seed, 10**9])  # no seed of a training has it
        images = torch.stack([draw(self.asked[k % TESTED], random) for k in range(n)])
        return images.to(next(self.teacher.net.parameters()).device)

    def __call__(self, solve):
        begun = now(self.z.device)
        images = self.teacher.decode(solve(self.z, *self.cond))
        milliseconds = 1e3 * (now(self.z.device) - begun) / len(images)
        return images.cpu(), (self.judge(images) if self.asked else {}) | {"ms_image": milliseconds}

    def judge(self, images):
        fd = frechet_distance(*moments(token_features(self.teacher.net, images.clamp(-1, 1))), *self.truth)
        return prompt_accuracy(images.cpu(), self.asked) | {"fd": fd}


def summarise(args, folder, test, guided, g, log):
    """samples.png, curve.png, metrics.json, and what they say: the paper's Table 3 in miniature."""
    ways = {"teacher": (14, partial(sample_teacher, guided)),
            "one step": (1, partial(sample_one_step, g, args.t_star))}
    rows, shown = {"true images": test.judge(test.draw_true(TESTED, 2))} if test.asked else {}, []
    for name, (steps, way) in ways.items():
        images, figures = test(way)
        rows[name], shown = figures | {"steps": steps}, [*shown, images[:20]]
    save_picture(captioned(shown, test.prompts[:20]), folder / "samples.png")
    curves = {"mean": "attributes right", "fd": "Frechet distance, teacher's features",
              "divergence": "E d(y), the estimate of (3.3)"}
    lines = log.read()
    plot_log(folder / "curve.png", lines, {key: label for key, label in curves.items() if key in lines[-1]})
    known = ("teacher", "method", "distance", "guidance", "seed", "steps", "batch")
    save({key: getattr(args, key) for key in known} | {"seconds": round(log.elapsed(), 1)} | rows,
         folder / "metrics.json")
    print(f"{'':12}" + "".join(f"{name:>12}" for name in rows["teacher"]))
    for name, row in rows.items():
        print(f"{name:12}" + "".join(f"{row[key]:12.4g}" for key in rows["teacher"] if key in row))
    print(f"{log.elapsed():.0f} s; pictures: {folder}/samples.png (teacher above one step), curve.png")
    print(f"next: python 03_pixart_t2i.py --sample {folder} --prompt {shlex.quote(test.prompts[0])}")


# ---- Without training ----
def read_latents(path, shape):
    """--latents: z of this shape (N, C, H, W), standard normal, of a .npy or a torch.save. UserError if
    not."""
    expected = f"expected {tuple(shape)}, standard normal, finite, .npy or .pt"
    with blame(f"{path} is refused ({{}}): {expected}", Exception):
        npy = str(path).endswith(".npy")
        z = np.load(path) if npy else torch.load(path, map_location="cpu", weights_only=True)
        z = torch.as_tensor(z, dtype=torch.float32)
        require(z.shape == shape, f"its shape is {tuple(z.shape)}")
        require(z.isfinite().all(), "not finite")
    return z


def sample(args, device):
    """--sample: one forward and one decode an image, from seed, seed + 1, ...; n images a prompt."""
    out = check_out(args.out or "sample.png")
    prompts = [*args.prompt, *(read_prompts(args.prompt_file, args.column) if args.prompt_file else [])]
    texts = [prompt for prompt in prompts if prompt.strip() for _ in range(args.n)]
    if not texts:
        raise UserError("--sample needs a text, as --prompt 'a large red ring on a blue background'")
    net, t_star, meta = load_network(args.sample, args.prefer_ema)
    args.t5, args.vae = args.t5 or meta.get("t5"), args.vae or meta.get("vae")  # the run's, unless given
    g = surround(net.to(device), args, device)
    z = draw_latents(range(args.seed, args.seed + len(texts)), image_shape(g.net))[0]
    z = (read_latents(args.latents, z.shape) if args.latents else z).to(device)
    d_q = teacher_of(args, g, meta, device) if args.teacher_steps else None
    captions, blank = encode_all(g.encode, texts)
    cond, sets = [v.to(device) for v in captions[range(len(texts))]], {}
    if d_q:
        guidance = meta.get("guidance", PAPER["guidance"]) if args.guidance is None else args.guidance
        guided = Guided(d_q.net, guidance, *blank).to(device)
        sets["teacher"] = g.decode(sample_teacher(guided, z, *cond, args.teacher_steps, args.solver)).cpu()
    sets["one_step"] = g.decode(sample_one_step(g.net, args.t_star or t_star, z, *cond)).cpu()
    write_images(out, sets, texts)


def teacher_of(args, g, meta, device):
    """The teacher that --teacher names or the generator's file knows. UserError if it makes other images."""
    args.teacher = str(meta.get("teacher", "")) if args.teacher == "auto" else args.teacher
    if not args.teacher:
        raise UserError(f"--teacher-steps: name the teacher of {args.sample} by --teacher")
    d_q = load_teacher(args, device)
    if image_shape(d_q.net) != image_shape(g.net) or bool(d_q.whole) != bool(g.whole):
        raise UserError(f"--teacher {args.teacher} makes other images than {args.sample}")
    return d_q


def check_out(out):
    """UserError, before anything is drawn, unless it is a .png in a folder that exists, or an empty
    folder."""
    out = Path(out)
    if out.suffix == ".png" and out.parent.is_dir() and not out.is_dir():
        return out
    if not out.suffix and (not out.exists() or out.is_dir() and not any(out.iterdir())):
        return out
    raise UserError(f"--out {out}: expected a .png in a folder that exists, or a new folder")


def write_images(out, sets, texts):
    """A .png of one image, or of all with their prompts; or a folder of PNGs and prompts.txt, as --score
    reads."""
    if out.suffix == ".png":
        alone = len(texts) == len(sets) == 1
        picture = image_grid(to_uint8(sets["one_step"])) if alone else captioned(list(sets.values()), texts)
        save_picture(picture, out)
    else:
        for name, images in sets.items():
            folder = out if name == "one_step" else out / name
            folder.mkdir(parents=True, exist_ok=True)
            for k, image in enumerate(to_uint8(images)):
                save_picture(image_grid(image[None]), folder / f"{k:06}.png")
            with atomic(folder / "prompts.txt") as temporary:
                temporary.write_text("".join(" ".join(text.split()) + "\n" for text in texts))
    print(f"{len(texts)} images ({', '.join(sets)}): {out}")


@torch.no_grad()
def clip_embeddings(folder, files, texts, device, batch=32):
    """Image files and texts -> CLIP's embeddings of both (N, D), of length 1, and its scale (100, mostly)."""
    expected = "expected config.json, model.safetensors, and the files of its tokenizer and preprocessor"
    with blame(f"{folder} cannot be read as a CLIP ({{}}): {expected}", Exception):
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        model, info = CLIPModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
        require(not info["missing_keys"], f"it lacks {sorted(info['missing_keys'])[:3]}")
    model, images, words = model.to(device).eval(), [], []
    for first in progress(range(0, len(files), batch), Path(folder).name):
        opened = []
        for file in files[first:first + batch]:
            with blame(f"{file} cannot be read ({{}}): expected an image", OSError, SyntaxError, ValueError):
                opened.append(Image.open(file).convert("RGB"))
        made = processor(images=opened, text=texts[first:first + batch], padding=True, truncation=True,
                         max_length=77, return_tensors="pt").to(device)
        images.append(model.get_image_features(made.pixel_values).pooler_output)
        words.append(model.get_text_features(made.input_ids, made.attention_mask).pooler_output)
    return F.normalize(torch.cat(images)), F.normalize(torch.cat(words)), model.logit_scale.exp().item()


def score(args, device):
    """--score: PickScore (Kirstain et al. 2023), CLIP score and LAION's aesthetic score of the images in a
    folder, by name, for the lines of its prompts.txt; those whose models are here. -> scores.json there"""
    folder, scores, models = Path(args.score), {}, set()
    if not folder.is_dir():
        raise UserError(f"--score {folder}: expected a folder of images with their prompts.txt")
    files = sorted(path for path in folder.glob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
    texts = read_prompts(args.prompt_file or folder / "prompts.txt", args.column)
    if len(files) != len(texts):
        raise UserError(f"{folder}: {len(files)} images (.png, .jpg), {len(texts)} prompts: expected as many")
    heads = {"aesthetic": load_aesthetic(args.aesthetic)} if Path(args.aesthetic).exists() else {}
    embed = functools.cache(lambda clip: clip_embeddings(clip, files, texts, device))
    for name, clip, *head in (("pickscore", args.pickscore), ("clipscore", args.clip),
                              ("aesthetic", args.clip, args.aesthetic)):
        if missing := [path for path in (clip, *head) if not Path(path).exists()]:
            print(f"{name}: not measured, for there is no {missing[0]}")
            continue
        images, words, scale = embed(clip)
        cosine = (images * words).sum(1)
        if name == "aesthetic":
            values = heads[name].to(device)(images)[:, 0]
        else:  # CLIP score: Hessel et al. 2021, times 100 as is usual
            values = scale * cosine if name == "pickscore" else (100 * cosine).clamp(min=0)
        scores[name] = values.tolist()
        models |= {*(list(Path(clip).glob("*.safetensors")) or Path(clip).glob("*.bin")), *map(Path, head)}
        print(f"{name} {values.mean():.4f}, standard deviation {values.std(correction=0):.4f}, by {clip}")
    if not scores:
        raise UserError("--score needs the folder of a CLIP, --clip or --pickscore (README.md: which)")
    columns = {"file": [file.name for file in files], "prompt": texts} | scores
    means = {name: sum(values) / len(values) for name, values in scores.items()}
    save({"images": len(files), "means": means,
          "models": {str(path): sha256(path) for path in sorted(models)},
          "each": [dict(zip(columns, row)) for row in zip(*columns.values())]}, folder / "scores.json")
    print(f"{folder}/scores.json has each image's, and the models' SHA-256")


def load_aesthetic(path):
    """LAION's sac+logos+ava1-l14-linearMSE.pth: of CLIP's embeddings of images, of length 1, (N, 768) -> (N,
    1). UserError for another."""
    def head():  # there are dropouts in between, which are nothing here
        sizes = {0: (768, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
        layers = [nn.Linear(*sizes[k]) if k in sizes else nn.Identity() for k in range(8)]
        return nn.Sequential(OrderedDict(layers=nn.Sequential(*layers)))
    with blame(f"{path} is refused ({{}}): expected LAION's aesthetic head for CLIP ViT-L/14"):
        return adopt(head, {}, read_weights(path))


class AnyCaption:
    """Captions of noise, full length, for --bench and --memory: time and memory do not depend on the
    words."""
    def __init__(self, length, channels):
        self.length, self.channels = length, channels

    def __len__(self):
        return 1

    def __getitem__(self, k):
        masks = torch.ones(len(k), self.length, dtype=torch.long)
        return torch.randn(len(k), self.length, self.channels), masks


def any_teacher(args):
    """A network of random weights in place of the teacher, guided, and captions for it."""
    net = EDMPrecond(PixArt(**MINI_NET)) if args.preset == "miniature" else PixArtPrecond(PixArt())
    sizes = net.model.net_args
    return (Guided(net.eval().requires_grad_(False), args.guidance),
            AnyCaption(sizes["caption_tokens"], sizes["caption_channels"]))


def time_updates(args, device):
    """--bench: the teacher's forward, without guidance, and both updates as `train` does them."""
    guided, captions = any_teacher(args)
    net = guided.to(device).net
    x = torch.randn(args.batch_gpu, *image_shape(net), device=device)
    denoiser = given_caption(net, [v.to(device) for v in captions[range(args.batch_gpu)]], args.amp)
    bench(args, device, lambda: denoiser(x, torch.ones_like(x[:, :1, :1, :1])),
          forward_flops(net, captions.length), passes(args), partial(prepare, guided=guided),
          partial(train, args, guided, captions))


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors made inside: those alive, and the most there were."""
    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self.known = weakref.WeakSet()

    def gone(self, size):
        self.bytes -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self.gone, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return out


def peak_memory(args):
    """--memory: GiB of weights, after an update (with gradients and Adam) and at the peak, of the same
    updates on tensors without contents. What the device's own libraries take comes on top."""
    args.steps, args.compile, args.truncate, kept = 2, False, "clamp", []
    args.batch = min(args.batch, 2 * args.batch_gpu)  # more of them take no more
    try:
        with (FakeTensorMode(allow_non_fake_inputs=True), Live() as live, warnings.catch_warnings(),
              tempfile.TemporaryDirectory() as folder):
            warnings.simplefilter("ignore")  # of copying what has no contents
            guided, captions = any_teacher(args)
            parts, weights = prepare(args, Path(folder), guided), live.bytes
            parts["log"].add = lambda **_: None  # which would look at their contents
            train(args, guided, captions, parts, lambda: kept.append(live.bytes))
    finally:  # these would keep some of it
        position_embedding.cache_clear()
        noise_table.cache_clear()
    gib = [size / 2**30 for size in (weights, kept[-1], live.peak)]
    print(f"{args.preset}: micro-batch {args.batch_gpu}, --amp {args.amp}, checkpointing {args.checkpointing}"
          ", weights {:.1f} GiB, between updates {:.1f}, peak {:.1f}".format(*gib))
    return gib


def measure_machine(args, device):
    """--bench and --memory, of random weights: the answers do not depend on them."""
    if args.teacher not in ("auto", "miniature", "pixart"):
        raise UserError("--bench and --memory take --teacher miniature or pixart: they read no file")
    args.preset = "paper" if args.teacher == "pixart" else "miniature"
    settle(args, PRESETS[args.preset] | {"steps": 3})
    return peak_memory(args) if args.memory else time_updates(args, device)


# ---- The command line ----
IGNORE = ("out", "fresh", "device", "save_every", "log_every", "batch_gpu", "checkpointing", "sample", "n",
          "bench", "memory", "prompt", "prompt_file", "teacher_steps", "solver", "latents", "score", "clip",
          "pickscore", "aesthetic")  # not a part of what a run is


def parse(argv):
    parser = Parser(__doc__)
    parser.add_argument("--teacher", default="auto", help="auto, miniature (embedded), pixart (in "
                        "checkpoints/), or a .pth, a diffusers folder, a run, a .pt of ours")
    parser.add_argument("--preset", choices=("paper", "miniature"), help="for the options left out "
                        "(PRESETS in this file); miniature with one, else paper (B.3)")
    add_method_arguments(parser)
    add_run_arguments(parser, n=1)
    add_image_arguments(parser)
    parser.add_argument("--guidance", type=number(float, strict=False), help="of the teacher; 1: none")
    parser.add_argument("--truncate", choices=("clamp", "resample"), default="clamp", help="of t, to B.3's")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, help="saves memory")
    group = parser.add_argument_group("text")
    group.add_argument("--prompts", metavar="FILE", help="to train on: text, one a line, or .csv, .jsonl")
    group.add_argument("--column", default="prompt", help="of a .csv or .jsonl")
    group.add_argument("--t5", metavar="DIR", help=f"T5's encoder ({T5})")
    group.add_argument("--vae", metavar="DIR", help=f"latents' decoder ({VAE})")
    parser.add_argument("--prefer-ema", action="store_true", help="a .pth's state_dict_ema")
    group = parser.add_argument_group("samples")
    group.add_argument("--prompt", action="append", default=[], help="of --sample; may be given again")
    group.add_argument("--prompt-file", metavar="FILE", help="the same, as --prompts")
    group.add_argument("--teacher-steps", type=number(int), help="14: the teacher's beside, in so many")
    group.add_argument("--solver", choices=("dpm", "heun"), default="dpm", help="of the teacher")
    group.add_argument("--latents", metavar="FILE", help="z, standard normal, before t*: .npy, .pt")
    group = parser.add_argument_group("scores")
    group.add_argument("--score", metavar="DIR", help="only measure images with their prompts.txt")
    for flag, name in (("--clip", "clip-vit-large-patch14"), ("--pickscore", "PickScore_v1"),
                       ("--aesthetic", "sac+logos+ava1-l14-linearMSE.pth")):
        group.add_argument(flag, metavar="PATH", default=f"checkpoints/{name}", help="of this score")
    parser.add_argument("--memory", action="store_true", help="only compute the peak memory at these sizes")
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    args = parse(argv)
    device, _ = pick_device(args.device), make_distance(args)  # mistakes stop here
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    if args.score is not None:
        return score(args, device)
    if args.sample is not None:
        return sample(args, device)
    if args.prompt or args.prompt_file or args.latents or args.teacher_steps:
        raise UserError("--prompt, --prompt-file, --latents and --teacher-steps belong to --sample RUN")
    if args.train_teacher:
        settle(args, PRESETS["teacher"])
        args.out = args.out or "runs/miniature_teacher"
        return train_teacher(args, open_run(args, IGNORE), device)
    if args.bench or args.memory:
        return measure_machine(args, device)
    teacher = load_teacher(args, device)
    args.preset = args.preset or ("miniature" if teacher.whole else "paper")
    settle(args, PRESETS[args.preset])
    if not teacher.whole and not args.prompts:
        raise UserError("PixArt-alpha needs texts to train on: --prompts FILE, one a line")
    prompts = read_prompts(args.prompts, args.column) if args.prompts else [write(p) for p in PROMPTS]
    encode = teacher.encode if teacher.whole else partial(cached, teacher, args.t5)
    texts = encode_all(encode, prompts)
    args.prompts_sha256 = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    args.out = args.out or f"runs/{Path(args.teacher).stem}-{args.method}-{args.distance}-{args.seed}"
    distil(args, open_run(args, IGNORE), teacher, prompts, *texts)


if __name__ == "__main__":
    main()
