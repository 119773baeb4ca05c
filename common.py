"""What every stage shares: first the paper, then networks, then what a training run needs.

The notation is the paper's (arXiv 2410.16794v1, equation numbers in brackets): g is the one-step generator,
d_psi the online denoiser that follows it, d_q the frozen teacher, x_t = x_0 + t eps; `d` alone is a distance.
Shapes: data x is (B, ...) of any rank; a time t is (B, 1, ..., 1), to broadcast against x; a loss is (B,).
A denoiser is a callable (x_t, t) -> denoised, of x_t's shape, its conditions (class, prompt) closed over.
"""
import argparse
import copy
import fcntl
import functools
import hashlib
import inspect
import json
import math
import os
import pickle
import resource
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from einops import rearrange
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm


# ---- Distances between scores: Table 4 and A.3, with their misprints mended (README) ----
@dataclass(frozen=True)
class Distance:
    """A proper distance of (3.3) and its gradient: y (B, ...) -> d(y) (B,) and d_prime(y) (B, ...)."""
    d: Callable
    d_prime: Callable


def batch_sum(v):
    """Sum over all but the batch, (B, ...) -> (B,). A sum and not a mean, as in Listing 1."""
    return v.reshape(len(v), -1).sum(1)


def expand_as(s, y):
    """One number per sample, (B,) -> (B, 1, ..., 1), to broadcast against y (B, ...)."""
    return s.reshape(-1, *[1] * (y.ndim - 1))


def require(condition, message):
    if not condition:
        raise ValueError(message)


def l2():
    """|y|^2, squared as in Table 4. With it SIM is SiD at alpha = 1, but for SiD's weight."""
    return Distance(lambda y: batch_sum(y**2), lambda y: 2 * y)


def power(alpha=4):
    """|y|_alpha^alpha. ValueError unless alpha is even and at least 2."""
    require(alpha >= 2 and alpha % 2 == 0, f"alpha must be an even integer >= 2 (section 3.3), got {alpha}")
    return Distance(lambda y: batch_sum(y**alpha), lambda y: alpha * y**(alpha - 1))


def exp(alpha=2, beta=0.1):
    """exp(beta |y|_alpha^alpha) - 1. ValueError unless beta > 0 and alpha is even and at least 2."""
    require(0 < beta < math.inf, f"beta must be a positive number, got {beta}")
    inner = power(alpha)
    return Distance(lambda y: torch.expm1(beta * inner.d(y)),
                    lambda y: beta * expand_as(torch.exp(beta * inner.d(y)), y) * inner.d_prime(y))


def l1():
    """|y|_1, the row of Table 4 that is wrong under autograd: the jump of sign(y) is lost (01, part A)."""
    return Distance(lambda y: batch_sum(y.abs()), torch.sign)


def smoothl1(scale=0.5):
    """sum_i sqrt(y_i^2 + scale^2) - scale: l1 without the jump, and exact. ValueError unless scale > 0."""
    require(0 < scale < math.inf, f"scale must be a positive number, got {scale}")
    return Distance(lambda y: batch_sum(y**2 / ((y**2 + scale**2).sqrt() + scale)),  # as in phuber
                    lambda y: y / (y**2 + scale**2).sqrt())


def huber(delta=1.0):
    """sum_i y_i^2 / 2 where |y_i| <= delta, else delta (|y_i| - delta / 2). ValueError unless delta > 0."""
    require(0 < delta < math.inf, f"delta must be a positive number, got {delta}")
    return Distance(lambda y: batch_sum(F.huber_loss(y, torch.zeros_like(y), "none", delta)),
                    lambda y: y.clamp(-delta, delta))


def phuber(c=0.001):
    """Pseudo-Huber, sqrt(|y|^2 + c^2) - c, |y| over the whole sample (3.8). ValueError unless c > 0.

    c is not in the paper; 0.001 is its authors' answer (maple-research-lab/SIM, issue 5). d is computed as
    |y|^2 / (sqrt(|y|^2 + c^2) + c), which is the same without cancellation near y = 0."""
    require(0 < c < math.inf, f"c must be a positive number, got {c}")
    norm = lambda y: (batch_sum(y**2) + c**2).sqrt()
    return Distance(lambda y: batch_sum(y**2) / (norm(y) + c), lambda y: y / expand_as(norm(y), y))


DISTANCES = {f.__name__: f for f in (l2, power, exp, l1, smoothl1, huber, phuber)}


# ---- Times and weight: B.2, B.3. shape is an int or a tuple; `where` is device= and generator= ----
def p_edm(shape, mean=-1.2, std=1.2, t_min=0.0, t_max=math.inf, truncate="clamp", **where):
    """Log-normal times t = exp(N(mean, std^2)), (B.5)-(B.6). B.3 truncates them without saying how: "clamp"
    moves what falls outside [t_min, t_max] to its ends, "resample" draws it again."""
    require(0 <= t_min < t_max, f"expected 0 <= t_min < t_max, got {t_min} and {t_max}")
    require(truncate in ("clamp", "resample"), f"truncate is clamp or resample, got {truncate}")
    t = torch.exp(mean + std * torch.randn(shape, **where))
    while truncate == "resample" and (outside := (t < t_min) | (t > t_max)).any():
        t[outside] = torch.exp(mean + std * torch.randn(int(outside.sum()), **where))
    return t.clamp(t_min, t_max)


def p_sim(shape, mean=-3.5, std=2.5, **options):
    """The paper's times for the generator, (B.9)-(B.10). A third of them lie below t = 0.01."""
    return p_edm(shape, mean, std, **options)


def p_karras(shape, sigma_min=0.002, sigma_max=80, rho=7, r_max=0.8, **where):
    """SiD's times for the generator, t in [0.002, 24.41]: the sampler's schedule at r ~ U[0, r_max], as SiD's
    code has it; (B.8) prints another range."""
    r = r_max * torch.rand(shape, **where)
    return (sigma_max**(1 / rho) + (1 - r) * (sigma_min**(1 / rho) - sigma_max**(1 / rho)))**rho


def lambda_edm(t, sigma_data=0.5):
    """EDM's weight (t^2 + sigma_data^2) / (t sigma_data)^2, (B.7)."""
    return (t**2 + sigma_data**2) / (t * sigma_data)**2


# ---- Weights of g's loss, at x_0 and q = d_q(x_t, t), by their names in Figure 2 ----
def nowgt(x_0, q):
    """SIM's: 1 at all times, (B.13)."""
    return 1.0


def sidwgt(x_0, q):
    """SiD's, (B.11) for denoisers: 1 over the mean of |x_0 - q|, without gradient. -> (B,)"""
    return 1 / (batch_sum((x_0 - q).abs()) / x_0[0].numel()).detach().clamp(min=1e-5)  # 1e-5: SiD's code


WEIGHTS = {f.__name__: f for f in (nowgt, sidwgt)}


# ---- Losses. Which weights are frozen is the caller's business (train_only); SIM detaches nothing ----
def diffuse(x_0, t, eps=None):
    """x_t; eps of x_0's shape, fresh noise unless given."""
    return x_0 + t * (torch.randn_like(x_0) if eps is None else eps)  # (B.12)


def dsm_loss(d_psi, x_0, t, eps=None, weight=lambda_edm):
    """Denoising score matching, (B.2): teaches d_psi the denoiser of whatever x_0 is drawn from. -> (B,)"""
    return batch_sum(weight(t) * (d_psi(diffuse(x_0, t, eps), t) - x_0)**2)


def sim_loss(d_psi, d_q, x_0, t, distance, eps=None, weight=nowgt):
    """Score Implicit Matching, (3.7) in denoiser form. -> (loss (B,), y_t (B, ...) detached)

    The gradient flows from x_0 through x_t into both networks. The value is about 0 at all times (the
    score-projection identity, A.1): what falls is E d(y_t), the estimate of (3.3)."""
    x_t = diffuse(x_0, t, eps)
    f, q = d_psi(x_t, t), d_q(x_t, t)
    y_t = f - q
    return -weight(x_0, q) * batch_sum(distance.d_prime(y_t) * (f - x_0)), y_t.detach()  # (B.13)


def sid_loss(d_psi, d_q, x_0, t, alpha, eps=None, weight=sidwgt):
    """SiD (Zhou et al. 2024), as its code has it: half of SIM's l2, plus (1 - alpha) |y|^2, with the weight
    (B.11). -> (loss (B,), y_t detached)"""
    x_t = diffuse(x_0, t, eps)
    f, q = d_psi(x_t, t), d_q(x_t, t)
    y_t = f - q
    loss = -batch_sum(y_t * (f - x_0)) + (1 - alpha) * batch_sum(y_t**2)
    return weight(x_0, q) * loss, y_t.detach()


def di_loss(d_psi, d_q, x_0, t, eps=None, weight=nowgt):
    """Diff-Instruct (Luo et al. 2023), the gradient of the KL divergence: nothing flows through the networks.
    -> (loss (B,), y_t detached)"""
    with torch.no_grad():
        x_t = diffuse(x_0, t, eps)
        q = d_q(x_t, t)
        y_t = d_psi(x_t, t) - q
    return weight(x_0, q) * batch_sum(y_t * x_0), y_t


def sampling_times(num_steps, sigma_min=0.002, sigma_max=80, rho=7):
    """A sampler's falling times and a last 0, as floats: Karras et al. 2022, (5)."""
    step = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    t = (sigma_max**(1 / rho) + step * (sigma_min**(1 / rho) - sigma_max**(1 / rho)))**rho
    return [*t.tolist(), 0.0]


@torch.no_grad()
def heun(denoise, x, times):
    """Follow the probability flow from x (B, ...) along times, falling or rising, numbers or (B, 1, ..., 1):
    Karras et al. 2022, Algorithm 2 without churn, two evaluations of denoise a step, one for a step to 0.
    In float64 where the device has it; denoise sees x's dtype."""
    dtype, shape = x.dtype, (len(x), *[1] * (x.ndim - 1))

    def slope(x, t):  # dx/dt
        return (x - denoise(x.to(dtype), torch.as_tensor(t, dtype=dtype, device=x.device).expand(shape))) / t

    x = x if x.device.type == "mps" else x.double()
    for t_cur, t_next in zip(times, times[1:]):
        d_cur = slope(x, t_cur)
        x_next = x + (t_next - t_cur) * d_cur
        if torch.as_tensor(t_next).all():  # the second order, which has no slope to look up at t = 0
            x_next = x + (t_next - t_cur) * (d_cur + slope(x_next, t_next)) / 2
        x = x_next
    return x.to(dtype)


def edm_sampler(denoise, z, num_steps=18, **span):
    """z (B, ...), standard normal, to samples by Heun's method: 2 num_steps - 1 evaluations of denoise."""
    times = sampling_times(num_steps, **span)
    return heun(denoise, times[0] * z, times)


@torch.no_grad()
def dpm_solver(denoise, z, num_steps=14, **span):
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2) in EDM's form, where alpha = 1 and lambda = -log t:
    num_steps evaluations of denoise, each step led by the last two. z (B, ...) is standard normal."""
    t = sampling_times(num_steps, **span)
    x, d_last = t[0] * z, None
    for i in range(num_steps):
        d = ahead = denoise(x, z.new_full((len(z), *[1] * (z.ndim - 1)), t[i]))
        if 0 < i < num_steps - 1:
            r = math.log(t[i - 1] / t[i]) / math.log(t[i] / t[i + 1])
            ahead = d + (d - d_last) / (2 * r)
        x, d_last = ahead + t[i + 1] / t[i] * (x - ahead), d
    return x


# ---- Networks ----
class EDMPrecond(nn.Module):
    """EDM's preconditioning (Karras et al. 2022, Table 1) of model(x (B, ...), c_noise (B,) or (1,), **cond).

    net(x, t), t a number, (B,) or (B, 1, ..., 1) -> denoised x. net(z, t_star) is the generator, (B.4)."""
    def __init__(self, model, sigma_data=0.5):
        super().__init__()
        self.model, self.sigma_data = model, sigma_data

    def forward(self, x, t, *cond, **named_cond):
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.ndim - 1))
        var = t**2 + self.sigma_data**2
        c_skip, c_out, c_in = self.sigma_data**2 / var, t * self.sigma_data / var.sqrt(), 1 / var.sqrt()
        return c_skip * x + c_out * self.model(c_in * x, t.flatten().log() / 4, *cond, **named_cond)


class MLP(nn.Module):
    """A perceptron on x, c_noise and cosines and sines of both: x (B, dim), c_noise (B,) or (1,) -> (B, dim).
    Without the waves of x it is too smooth to see the fine structure of its own samples."""
    def __init__(self, dim=2, width=64, depth=4, waves=16):
        super().__init__()
        sizes = [dim + 2 * waves * (dim + 1)] + [width] * depth
        layers = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(width, dim))
        self.register_buffer("frequencies", math.pi * torch.linspace(0.25, 4, waves))

    def forward(self, x, c_noise):
        inputs = torch.cat([x, c_noise[:, None].expand(len(x), 1)], dim=1)  # (B, dim + 1)
        angles = (inputs[:, :, None] * self.frequencies).flatten(1)  # (B, (dim + 1) waves)
        return self.layers(torch.cat([x, angles.cos(), angles.sin()], dim=1))


class Waves(nn.Module):
    """c_noise (B,) -> (B, channels): sines, then cosines. Fixed frequencies (DDPM's positional embedding), or
    random ones in a buffer (NCSN++'s Fourier features, of scale 16)."""
    def __init__(self, channels, fourier):
        super().__init__()
        self.half = channels // 2
        self.register_buffer("freqs", 16 * torch.randn(self.half) if fourier else None)

    def forward(self, c_noise):
        steps = torch.arange(self.half, dtype=c_noise.dtype, device=c_noise.device) / (self.half - 1)
        freqs = 1e-4**steps if self.freqs is None else 2 * math.pi * self.freqs
        angles = torch.outer(c_noise, freqs)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class Conv(nn.Conv2d):
    """A convolution of x (B, C, H, W) that may halve ("down") or double ("up") the resolution with the
    separable filter `taps`: before it or, fused, in one with it, so that nothing is padded between."""
    def __init__(self, c_in, c_out, kernel, gain=1.0, resample=None, taps=(1, 1), fused=False):
        super().__init__(c_in, c_out, kernel, padding=kernel // 2)
        nn.init.xavier_uniform_(self.weight, gain)
        nn.init.zeros_(self.bias)
        self.resample, self.fused = resample, fused
        if resample:
            taps = torch.tensor(taps, dtype=torch.float32)
            self.register_buffer("resample_filter", (torch.outer(taps, taps) / taps.sum()**2)[None, None])

    def change_resolution(self, x, padded=True):
        k, c = self.resample_filter.shape[-1], x.shape[1]
        if k == 2:  # a box: the same, several times faster
            return F.avg_pool2d(x, 2) if self.resample == "down" else F.interpolate(x, scale_factor=2)
        taps, options = self.resample_filter.expand(c, 1, k, k), {"stride": 2, "groups": c}
        if self.resample == "up":
            return F.conv_transpose2d(x, 4 * taps, padding=k // 2 - 1, **options)
        return F.conv2d(x, taps, padding=k // 2 - 1 if padded else 0, **options)

    def forward(self, x):
        if self.fused:
            wide = self.padding[0] + self.resample_filter.shape[-1] // 2 - 1
            x = self.change_resolution(F.conv2d(x, self.weight, padding=wide), padded=False)
            return x + self.bias[:, None, None]
        return super().forward(self.change_resolution(x) if self.resample else x)


def group_norm(channels):
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class Block(nn.Module):
    """A residual block and, where asked, one head of self-attention: x (B, c_in, H, W), emb (B, c_emb)."""
    def __init__(self, c_in, c_out, c_emb, dropout, attention=False, resample=None, taps=(1, 1)):
        super().__init__()
        self.dropout, self.attention = dropout, attention
        self.norm0, self.conv0 = group_norm(c_in), Conv(c_in, c_out, 3, 1, resample, taps)
        self.affine = nn.Linear(c_emb, c_out)
        self.norm1, self.conv1 = group_norm(c_out), Conv(c_out, c_out, 3, 1e-5)  # at first nearly identity
        self.skip = Conv(c_in, c_out, 1, 1, resample, taps) if resample or c_in != c_out else nn.Identity()
        if attention:
            self.norm2 = group_norm(c_out)
            self.qkv, self.proj = Conv(c_out, 3 * c_out, 1, 0.2**0.5), Conv(c_out, c_out, 1, 1e-5)

    def forward(self, x, emb):
        h = self.conv0(F.silu(self.norm0(x)))
        h = F.silu(self.norm1(h + self.affine(emb)[:, :, None, None]))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = (self.skip(x) + h) * 0.5**0.5  # keeps the variance, as does the next line
        return (x + self.attend(x)) * 0.5**0.5 if self.attention else x

    def attend(self, x):
        q, k, v = rearrange(self.qkv(self.norm2(x)), "b (c three) h w -> three b 1 (h w) c", three=3)
        a = F.scaled_dot_product_attention(q, k, v)  # scale 1 / sqrt(c)
        return self.proj(rearrange(a, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class SongUNet(nn.Module):
    """The U-Net of Song et al. (2021): DDPM++ as EDM has it by default, NCSN++ with embedding_type "fourier",
    encoder_type "residual", resample_filter (1, 3, 3, 1), channel_mult_noise 2. EDM's names for everything.

    x (B, C, H, W), c_noise (B,) or (1,), labels (B, label_dim) one-hot, (B, augment_dim) or None for none."""
    def __init__(self, img_resolution, img_channels=3, label_dim=0, augment_dim=0, model_channels=128,
                 channel_mult=(2, 2, 2), channel_mult_emb=4, num_blocks=4, attn_resolutions=(16,),
                 dropout=0.1, label_dropout=0.0, embedding_type="positional", channel_mult_noise=1,
                 encoder_type="standard", resample_filter=(1, 1)):
        super().__init__()
        self.label_dropout = label_dropout
        c, c_noise, c_emb = [model_channels * m for m in (1, channel_mult_noise, channel_mult_emb)]
        self.map_noise = Waves(c_noise, fourier=embedding_type == "fourier")
        self.map_label = nn.Linear(label_dim, c_noise) if label_dim else None
        self.map_augment = nn.Linear(augment_dim, c_noise, bias=False) if augment_dim else None
        self.map_layer0, self.map_layer1 = nn.Linear(c_noise, c_emb), nn.Linear(c_emb, c_emb)

        block = functools.partial(Block, c_emb=c_emb, dropout=dropout, taps=resample_filter)
        levels = [(img_resolution >> i, model_channels * m) for i, m in enumerate(channel_mult)]
        layers = {f"{img_resolution}x{img_resolution}_conv": Conv(img_channels, c, 3)}
        skips, c_aux = [c], img_channels
        for size, c_out in levels:
            if size < img_resolution:
                layers[f"{size}x{size}_down"] = block(c, c, resample="down")
                skips.append(c)
                if encoder_type == "residual":
                    aux, c_aux = Conv(c_aux, c, 3, 1, "down", resample_filter, fused=True), c
                    layers[f"{size}x{size}_aux_residual"] = aux
            for i in range(num_blocks):
                layers[f"{size}x{size}_block{i}"] = block(c, c_out, attention=size in attn_resolutions)
                skips.append(c := c_out)
        self.enc = nn.ModuleDict(layers)

        layers = {f"{size}x{size}_in{i}": block(c, c, attention=i == 0) for i in range(2)}
        for size, c_out in reversed(levels):
            if size < levels[-1][0] or len(layers) > 2:
                layers[f"{size}x{size}_up"] = block(c, c, resample="up")
            for i in range(num_blocks + 1):
                attention = i == num_blocks and size in attn_resolutions
                layers[f"{size}x{size}_block{i}"] = block(c + skips.pop(), c_out, attention=attention)
                c = c_out
        layers[f"{size}x{size}_aux_norm"] = group_norm(c)
        layers[f"{size}x{size}_aux_conv"] = Conv(c, img_channels, 3, 1e-5)
        self.dec = nn.ModuleDict(layers)

    def embed(self, c_noise, class_labels, augment_labels, batch):
        """-> (B, c_emb). None is zeros and not left out, so that every weight has a gradient under DDP."""
        emb = self.map_noise(c_noise).expand(batch, -1)
        given = lambda labels, layer: emb.new_zeros(batch, layer.in_features) if labels is None else labels
        if self.map_label:
            labels = given(class_labels, self.map_label)
            if self.training and self.label_dropout:
                labels = labels * (torch.rand_like(labels[:, :1]) >= self.label_dropout)
            emb = emb + self.map_label(labels * labels.shape[1]**0.5)
        if self.map_augment:
            emb = emb + self.map_augment(given(augment_labels, self.map_augment))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def encode(self, x, emb):
        """-> the features that the decoder takes up, (B, C', H', W') each; the last are the deepest."""
        skips, aux = [], x
        for name, layer in self.enc.items():
            if name.endswith("aux_residual"):
                skips[-1] = aux = (skips[-1] + layer(aux)) * 0.5**0.5
            else:
                skips.append(layer(skips[-1], emb) if skips else layer(x))
        return skips

    def forward(self, x, c_noise, class_labels=None, augment_labels=None):
        emb = self.embed(c_noise, class_labels, augment_labels, len(x))
        skips = self.encode(x, emb)
        x = skips[-1]
        *blocks, (_, last_norm), (_, last_conv) = self.dec.items()
        for name, layer in blocks:
            x = layer(torch.cat([x, skips.pop()], dim=1) if "block" in name else x, emb)
        return last_conv(F.silu(last_norm(x)))


def make_unet(**net_args):
    """The denoiser of stage 2 from SongUNet's arguments, which may come from a file. ValueError, before
    anything is built, for those that no such network has."""
    words = {"embedding_type": ("positional", "fourier"), "encoder_type": ("standard", "residual")}
    defaults = {name: p.default for name, p in inspect.signature(SongUNet).parameters.items()}
    defaults["img_resolution"] = 32
    for name, value in net_args.items():
        default, values = defaults.get(name), value if isinstance(value, (list, tuple)) else [value]
        kinds = (int, float) if isinstance(default, float) else int
        most = {"num_blocks": 32, "dropout": 0.999, "label_dropout": 0.999}.get(name, 2048)
        fits = [n in words[name] if name in words else isinstance(n, kinds) and 0 <= n <= most
                for n in values]
        require(default is not None and (values is value) == isinstance(default, tuple) and len(values) <= 8
                and all(fits), f"the argument {str(name)[:20]} is not one of such a network")
    args = defaults | net_args
    levels, channels, taps = [args[name] for name in ("channel_mult", "model_channels", "resample_filter")]
    require(levels and min(levels) > 0 and args["img_resolution"] % 2**(len(levels) - 1) == 0
            and channels % 4 == 0 and channels > 0 and taps and len(taps) % 2 == 0 and sum(taps) > 0,
            "sizes that do not fit together")
    net = EDMPrecond(SongUNet(**net_args))
    net.net_args, net.label_dim = net_args, net_args.get("label_dim", 0)
    net.image_shape = (net_args.get("img_channels", 3), *[net_args["img_resolution"]] * 2)
    return net


# ---- Drawn shapes: true samples without end ----
ROUND = [(math.cos(math.pi * i / 20), math.sin(math.pi * i / 20)) for i in range(40)]
SQUARE = [(0.8, 0.8), (-0.8, 0.8), (-0.8, -0.8), (0.8, -0.8)]
PLUS = [(0.35, 1), (0.35, 0.35), (1, 0.35), (1, -0.35), (0.35, -0.35), (0.35, -1),
        (-0.35, -1), (-0.35, -0.35), (-1, -0.35), (-1, 0.35), (-0.35, 0.35), (-0.35, 1)]
SHAPES = {  # corners in a square of side 2 (y downwards), and the hole's size
    "circle": (ROUND, 0), "ring": (ROUND, 0.55), "square": (SQUARE, 0), "frame": (SQUARE, 0.55),
    "triangle": ([(0, -1), (0.95, 0.75), (-0.95, 0.75)], 0),
    "diamond": ([(0, 1), (0.75, 0), (0, -1), (-0.75, 0)], 0),
    "plus": (PLUS, 0), "cross": ([(0.7 * (x - y), 0.7 * (x + y)) for x, y in PLUS], 0),
    "bar": ([(1, 0.35), (-1, 0.35), (-1, -0.35), (1, -0.35)], 0),
    "pillar": ([(0.35, 1), (-0.35, 1), (-0.35, -1), (0.35, -1)], 0)}


RADII = 0.24, 0.4  # of drawn shapes, in images


def draw_shape(name, x, y, radius, colour, background, size, fine=8):
    """A shape centred at (x, y) pixels, colours RGB in [0, 1], drawn `fine` times as large and reduced.
    -> float32 (size, size, 3) in [0, 1]"""
    corners, hole = SHAPES[name]
    mask = Image.new("L", (size * fine, size * fine))
    for r, ink in ((radius, 255), (radius * hole, 0))[:2 if hole else 1]:
        ImageDraw.Draw(mask).polygon([(fine * (x + r * a), fine * (y + r * b)) for a, b in corners], ink)
    mask = np.asarray(mask.reduce(fine), dtype=np.float32)[:, :, None] / 255
    return background + (colour - background) * mask


def draw_shapes(n, seed, size=16, labels=None):
    """n random shapes, of random classes unless labels (n,) says which; seed is an int or a list of ints.
    -> images (n, 3, size, size) in [-1, 1], labels (n,)"""
    random = np.random.default_rng(seed)
    labels = random.integers(len(SHAPES), size=n) if labels is None else np.asarray(labels)
    images = np.empty((n, size, size, 3), dtype=np.float32)
    for image, label in zip(images, labels):
        radius = size * random.uniform(*RADII)
        x, y = random.uniform(radius, size - radius, 2)
        colours = random.uniform(size=(2, 3))
        while np.linalg.norm(colours[0] - colours[1]) < 0.6:  # else one cannot see it
            colours = random.uniform(size=(2, 3))
        image[:] = draw_shape(list(SHAPES)[label], x, y, radius, *colours, size)
    return rearrange(torch.from_numpy(images), "n h w c -> n c h w") * 2 - 1, torch.from_numpy(labels)


@functools.cache
def templates(size):
    """Every shape at six radii and half-pixel steps -> classes (T,); means and norms (T, 1) of their
    masks; and those masks (T, size^2) with mean 0 and norm 1."""
    masks, labels = [], []
    for label, name in enumerate(SHAPES):
        for radius in np.linspace(*RADII, 6) * size:
            steps = np.linspace(radius, size - radius, round(2 * size - 4 * radius) + 1)
            masks += [draw_shape(name, x, y, radius, 1, 0, size) for x in steps for y in steps]
            labels += [label] * len(steps)**2
    masks = torch.from_numpy(np.stack(masks)).flatten(1)
    mean = masks.mean(1, keepdim=True)
    norm = (masks - mean).norm(dim=1, keepdim=True)
    return torch.tensor(labels), mean, norm, (masks - mean) / norm


def read_shapes(images):
    """uint8 (N, 3, H, W) -> classes (N,), colours and backgrounds (N, 3), about [0, 1], of the template that
    leaves the least squared error in the two colours that suit it best: it explains most of the variance."""
    (labels, mean, norm, masks), found = templates(images.shape[-1]), []
    for x in images.flatten(2).float().div(255).split(100):
        along = x @ masks.T  # (B, 3, T)
        best = along.square().sum(1).argmax(1)
        contrast = along[torch.arange(len(x)), :, best] / norm[best]
        background = x.mean(2) - contrast * mean[best]
        found.append((labels[best], background + contrast, background))
    return [torch.cat(column) for column in zip(*found)]


# ---- Training ----
def annealed(args, step):
    """The learning rate of a step, from --lr and --anneal."""
    return args.lr * (1 - step / args.steps if args.anneal == "linear" else 1)


def train_edm(args, folder, net, optimiser, batch):
    """A diffusion model by EDM's recipe (Karras et al. 2022, section 5): dsm_loss, p_edm, EMA, resumable.
    batch(step) -> net with the step's conditions closed over, and x_0. -> the average of net, in eval mode"""
    ema, device = copy.deepcopy(net).eval().requires_grad_(False), next(net.parameters()).device
    log, stop = Log(folder / "log.jsonl", args.steps), Stop()
    parts = {"net": net, "ema": ema, "optimiser": optimiser, "log": log}
    resume(folder, parts)
    while log.step < args.steps:
        optimiser.param_groups[0]["lr"] = min(1, (log.step + 1) / 200) * annealed(args, log.step)
        seed_step(args.seed, log.step)
        denoiser, x_0 = batch(log.step)
        t = p_edm((args.batch, *[1] * (x_0.ndim - 1)), args.psi_mean, args.psi_std, device=device)
        loss = dsm_loss(denoiser, x_0.to(device), t)
        log.add(loss=loss)
        optimiser.zero_grad()
        loss.mean().backward()
        optimiser.step()
        ema_update(ema, net, ema_beta(log.step * args.batch, args.batch, args.ema_half_life))
        log.advance()
        if log.step % args.log_every == 0:
            log.write()
        save_if_due(args, folder, parts, stop)
    return ema


def train_only(net, frozen):
    """For a phase of Algorithm 2: net learns, in train mode; frozen gets no weight gradients, in eval mode.
    Its output is still differentiated with respect to its input, as (B.13) needs."""
    net.train().requires_grad_(True)
    frozen.eval().requires_grad_(False)


def accumulate(net, batches):
    """Yields the micro-batches of an update; ranks average the gradients of net once, after the last."""
    for batch in batches[:-1]:
        with net.no_sync() if isinstance(net, DistributedDataParallel) else nullcontext():
            yield batch
    yield batches[-1]


def ema_beta(images, batch, half_life=5e5, ramp_up=0.05):
    """The EMA's decay for a batch that follows `images` images: half_life counts images, fewer at the start.
    The form is EDM's; 5e5 and 0.05 are SiD's code's, the paper is silent."""
    return 0.5**(batch / max(min(half_life, ramp_up * images), 1e-8))


@torch.no_grad()
def ema_update(ema, net, beta):
    """ema <- beta ema + (1 - beta) net, for every parameter; buffers are constants here."""
    for a, b in zip(ema.parameters(), net.parameters()):
        a.lerp_(b, 1 - beta)


def seed_step(seed, step, device="cpu"):
    """The random numbers of a step depend on (seed, step) alone: a killed run continues bit for bit with
    nothing to store. -> a Generator for what all ranks draw alike; torch's own is for each rank's dropout."""
    number = lambda *key: int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    torch.manual_seed(number(seed, step, world()[0] + 1))
    return torch.Generator(device).manual_seed(number(seed, step, 0))


def draw_latents(seeds, shape, classes=0, fixed=None):
    """One generator per seed, so that an image depends on its seed and on no batch size. -> standard normal
    z (n, *shape); one-hot labels (n, classes), of random classes, or of those in the list fixed, in turn."""
    randoms = [torch.Generator().manual_seed(seed) for seed in seeds]
    z = torch.stack([torch.randn(shape, generator=random) for random in randoms])
    if classes and not fixed:
        fixed = [int(torch.randint(classes, (), generator=random)) for random in randoms]
    labels = torch.tensor([fixed[i % len(fixed)] for i in range(len(z))] if classes else [])
    return z, F.one_hot(labels, classes).float() if classes else z.new_zeros(len(z), 0)


# ---- Several processes, as torchrun starts them ----
def world():
    """-> (rank, number of ranks)"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_ranks(v):
    """A tensor on the CPU -> the sum of all ranks' tensors, there too; v itself in a process on its own."""
    if dist.is_initialized():
        v = v.to("cuda") if dist.get_backend() == "nccl" else v
        dist.all_reduce(v)
    return v.cpu()


def mean_over_ranks(numbers):
    """A list of floats -> their means over all ranks."""
    return (sum_over_ranks(torch.tensor(numbers)) / world()[1]).tolist()


class Replicated(DistributedDataParallel):
    """DistributedDataParallel that steps aside where its weights are frozen: there is nothing to average."""
    def forward(self, *args, **kwargs):
        learns = torch.is_grad_enabled() and next(self.parameters()).requires_grad
        return super().forward(*args, **kwargs) if learns else self.module(*args, **kwargs)


def replicate(net):
    """net as it is in a process on its own, else with its gradients averaged over the ranks."""
    return Replicated(net) if dist.is_initialized() else net


def my_share(draws, micro_batch):
    """This rank's rows of the global draws, a tuple of (B, ...), as a list of micro-batches."""
    rank, ranks = world()
    return list(zip(*[draw.chunk(ranks)[rank].split(micro_batch) for draw in draws]))


def pick_device(name="auto"):
    """"auto" is cuda, else mps, else cpu. Under torchrun each rank joins the others, on a GPU of its own, and
    all but the first fall silent. UserError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    ranked = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    try:
        require(name.split(":")[0] in ("cpu", "cuda", "mps"), "expected auto, cpu, cuda or mps")
        name = f"cuda:{os.environ['LOCAL_RANK']}" if ranked and name == "cuda" else name
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"no device {name!r} here ({first_line(error)}): try --device cpu") from None
    if ranked and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        patience = timedelta(hours=6)  # the first rank may have much to download or to encode
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return device


# ---- Speed ----
def count_flops(forward):
    """FLOPs of forward(), as torch counts them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        forward()
    return counter.get_total_flops()


def matmul_peak(device, dtype, tries=5):
    """FLOP/s of the best of some square matrix products: what this machine can do at most."""
    size = 8192 if device.type == "cuda" else 1536
    a, seconds = torch.randn(size, size, device=device).to(dtype), math.inf
    for _ in range(tries + 1):
        begun = now(device)
        a @ a
        seconds = min(seconds, now(device) - begun)
    return 2 * size**3 / seconds


def now(device):
    """Seconds, with nothing under way on the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def memory(device):
    """Peak memory in GiB, of the GPU where there is one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


class Speed:
    """read(step) -> images, and since the last call images/s and the share of the matrix-multiply peak."""
    def __init__(self, step, batch, flops, device, dtype):
        self.step, self.batch, self.flops, self.device = step, batch, flops, device
        self.peak, self.begun = matmul_peak(device, dtype) * world()[1], now(device)

    def restart(self):
        self.begun = now(self.device)

    def read(self, step):
        images, seconds = (step - self.step) * self.batch, now(self.device) - self.begun
        self.step = step
        self.restart()
        return {"images": step * self.batch, "images_s": images / seconds,
                "peak_share": images * self.flops / seconds / self.peak, "memory_gib": memory(self.device)}


def bench(args, device, forward, flops, costs, prepare, train):
    """--bench: a teacher's forward() of a micro-batch, which takes so many flops an image, and both updates,
    as prepare(args, folder) -> parts and train(parts, report) do them, with their costs in forwards."""
    once, times, steps = [], [], args.steps
    for _ in range(steps + 2):
        begun = now(device)
        with torch.no_grad():
            forward()
        once.append((now(device) - begun) / args.batch_gpu)
    args.steps = steps + 1  # the first is a warm-up
    with tempfile.TemporaryDirectory() as folder:
        parts = prepare(args, Path(folder))
        for optimiser in (parts["opt_psi"], parts["opt_theta"]):
            optimiser.register_step_post_hook(lambda *_: times.append(now(device)))
        train(parts, lambda: None)
    ends = np.array(times).reshape(-1, args.psi_updates + 1) / args.batch  # of psi's updates, and of theta's
    psi, theta = np.median(ends[1:, -2] - ends[:-1, -1]), np.median(ends[1:, -1] - ends[1:, -2])
    dtype = torch.bfloat16 if args.amp == "bf16" else torch.float32
    peak, once = matmul_peak(device, dtype), np.median(once[2:])
    print(f"{'':24}ms/image  images/s   GFLOP/s  of the peak  forwards")
    for name, seconds, cost in (("teacher's forward", once, 1), ("psi update", psi, costs[0]),
                                ("theta update", theta, costs[1]), ("both", psi + theta, sum(costs))):
        rate = flops * cost / seconds
        print(f"{name:22}{1e3 * seconds:10.3f}{1 / seconds:10.1f}{rate / 1e9:10.1f}{rate / peak:12.1%}"
              f"{seconds / once:8.2f} ({cost})")
    print(f"peak {peak / 1e9:.0f} GFLOP/s in {dtype}; {flops / 1e9:.2f} GFLOP an image; "
          f"{memory(device):.2f} GiB; batch {args.batch} in micro-batches of {args.batch_gpu}")


# ---- Errors and the command line ----
class UserError(Exception):
    """What the user can mend, in one line: what was wrong, what was expected, what to do."""


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


@contextmanager
def blame(message, *kinds):
    """An error of these kinds (or any likely one) in the block is the user's to mend: UserError, with its
    reason put into message's {}."""
    likely = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
    try:
        yield
    except kinds or likely as error:  # noqa: B030
        raise UserError(message.replace("{}", first_line(error))) from error


def one_line_errors(main):
    """Decorates a script's main(argv=None): a user's mistake is one line on stderr and exit status 2."""
    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            main(argv)
            if dist.is_initialized():
                dist.destroy_process_group()
            return
        except (UserError, OSError, MemoryError) as error:
            message, status = f"error: {error or type(error).__name__}", 2
        except RuntimeError as error:  # torch's way to say that memory is short
            if not any(words in str(error) for words in ("out of memory", "can't allocate memory")):
                raise
            message, status = f"error: {first_line(error)}: try a smaller --batch, --batch-gpu or --n", 2
        except KeyboardInterrupt as stop:
            message, status = f"stopped: {str(stop) or 'what was saved is kept'}", 130
        print(message, file=sys.stderr)
        sys.exit(status)
    return wrapped


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults where there are some, and the module docstring as it is."""
    def _get_help_string(self, action):
        return super()._get_help_string(action) if action.default not in (None, "", False) else action.help


class Parser(argparse.ArgumentParser):
    """argparse with whole option names only, and errors of one line."""
    def __init__(self, doc):
        super().__init__(description=doc, allow_abbrev=False, formatter_class=Formatter)

    def error(self, message):
        self.exit(2, f"error: {message} (--help lists the options)\n")


def number(kind, low=0, strict=True):
    """An argparse type: a finite int or float above low, or from low on."""
    def parse(text):
        try:
            value = kind(text)
            require(low < value < 2**63 or (not strict and value == low), "out of range")
            return value
        except ValueError:
            limit = "" if low == -math.inf else f" {'>' if strict else '>='} {low}"
            expected = f"expected a finite {kind.__name__}{limit}, got {text[:40]!r}"
            raise argparse.ArgumentTypeError(expected) from None
    return parse


def add_method_arguments(parser, others=()):
    """--method, --distance and their parameters: the same in every stage, but for other methods."""
    group = parser.add_argument_group("method")
    group.add_argument("--method", choices=("sim", "sid", "di", *others), help="or another, to compare")
    group.add_argument("--distance", choices=DISTANCES, default="phuber", help="d of (3.3), Table 4")
    for flag, kind, meaning in (
            ("--c", float, "phuber's c (0.001)"), ("--alpha", int, "power's (4) or exp's (2) exponent, even"),
            ("--beta", float, "exp's factor (0.1)"), ("--delta", float, "huber's kink (1)"),
            ("--scale", float, "smoothl1's rounding (0.5)")):
        group.add_argument(flag, type=number(kind), help=meaning)
    group.add_argument("--weight", choices=WEIGHTS, help="of g's loss: sidwgt is (B.11), and SiD's own; "
                       "nowgt is 1, and the others'")
    group.add_argument("--sid-alpha", type=number(float, -math.inf), help="SiD's alpha; 1.2 on CIFAR-10")


def add_run_arguments(parser, **defaults):
    """What a run needs besides its science: the same in every stage, but for the defaults."""
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=number(int), help="updates of the generator")
    group.add_argument("--batch", type=number(int), help="samples in an update")
    group.add_argument("--lr", type=number(float), help="of both Adams (Table 5: 1e-5; B.3: 5e-6)")
    group.add_argument("--anneal", choices=("none", "linear"), help="of the lr, to 0 at the last step")
    group.add_argument("--t-star", type=number(float), help="t* of (B.4) (Table 5: 2.5)")
    group.add_argument("--p-mean", type=number(float, -math.inf),
                       help="mean of g's log t; (B.10): -3.5; B.3: -2")
    group.add_argument("--p-std", type=number(float), help="std of g's log t; (B.10): 2.5; B.3: 2")
    group.add_argument("--psi-mean", type=number(float, -math.inf),
                       help="mean of d_psi's log t; (B.6): -1.2; B.3: -2")
    group.add_argument("--psi-std", type=number(float), help="std of d_psi's log t; (B.6): 1.2; B.3: 2")
    group.add_argument("--psi-updates", type=number(int), help="per update of g; Listing 1 has 2")
    group.add_argument("--ema-half-life", type=number(float), help="of g's average, in samples (SiD: 5e5)")
    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=number(int, strict=False), default=0, help="of everything random")
    group.add_argument("--device", default="auto", help="auto (the best one here), cpu, cuda, mps")
    group.add_argument("--out", metavar="DIR", help="the run's folder; named after the run unless given")
    group.add_argument("--fresh", action="store_true", help="start anew: an older run in DIR is moved aside")
    group.add_argument("--save-every", type=number(int), help="steps between checkpoints")
    group.add_argument("--sample", metavar="CKPT", help="only draw from a run: its folder, or its g_ema.pt")
    group.add_argument("--n", type=number(int), help="how many samples --sample draws")
    parser.set_defaults(**defaults)


def add_image_arguments(parser):
    """What a run on images needs besides: the same in stages 2 and 3."""
    parser.add_argument("--adam-eps", type=number(float), help="of both Adams")
    parser.add_argument("--batch-gpu", type=number(int), help="samples at once; gradients accumulate")
    parser.add_argument("--amp", choices=("none", "bf16"), help="autocast of the networks")
    parser.add_argument("--tf32", action="store_true", help="TensorFloat-32 on GPUs, convolutions included")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the networks")
    parser.add_argument("--log-every", type=number(int), help="steps between log lines")
    parser.add_argument("--train-teacher", action="store_true", help="make the embedded teacher anew")
    parser.add_argument("--bench", action="store_true", help="only time the updates, at these sizes")


def settle(args, preset):
    """Fill what the command line left open from the preset. UserError for sizes that do not divide."""
    for name, value in preset.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    ranks = world()[1]
    if args.batch % ranks:
        raise UserError(f"--batch {args.batch} for {ranks} processes: expected a multiple of {ranks}")
    if args.train_teacher and ranks > 1:
        raise UserError("--train-teacher is for one process: start it without torchrun")
    args.batch_gpu = min(args.batch_gpu or args.batch, args.batch // ranks)


def make_distance(args):
    """The Distance that the flags describe. UserError for a parameter that it does not take or cannot use."""
    flags = {name: getattr(args, name) for name in ("c", "alpha", "beta", "delta", "scale")}
    given = {name: value for name, value in flags.items() if value is not None}
    takes = inspect.signature(DISTANCES[args.distance]).parameters
    if extra := [f"--{name}" for name in given if name not in takes]:
        raise UserError(f"--distance {args.distance} does not take {', '.join(extra)}")
    with blame(f"--distance {args.distance}: {{}}", ValueError):
        return DISTANCES[args.distance](**given)


def make_generator_loss(args, distance):
    """--method and --weight as a callable (d_psi, d_q, x_0, t, eps=None) -> (loss (B,), y_t detached)."""
    loss = {"sim": functools.partial(sim_loss, distance=distance),
            "sid": functools.partial(sid_loss, alpha=args.sid_alpha), "di": di_loss}[args.method]
    return functools.partial(loss, weight=WEIGHTS[args.weight]) if args.weight else loss


def make_times(args):
    """The flags' times for the updates of psi and theta, {phase: (shape, **where) -> t}."""
    return {"psi": functools.partial(p_edm, mean=args.psi_mean, std=args.psi_std),
            "theta": p_karras if args.p_theta == "karras" else
            functools.partial(p_edm, mean=args.p_mean, std=args.p_std)}


# ---- Files: written under a temporary name and renamed; read without executing anything in them ----
@contextmanager
def atomic(path):
    """Yields a temporary path beside `path`, with its extension; renamed to `path` if the block succeeds."""
    path = Path(path)
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(value, path):
    """Plain dicts and lists: .json as JSON, else for torch.load(weights_only=True). UserError if it fails."""
    with atomic(path) as temporary, blame(f"could not write {path} ({{}}): is the disk full?", RuntimeError):
        if temporary.suffix == ".json":
            temporary.write_text(json.dumps(value, indent=1) + "\n")
        else:
            torch.save(value, temporary)


def load(path, keys):
    """The dict that save() wrote, on the CPU. UserError if it is missing, damaged or lacks a key."""
    expected = f"expected a file of this project with {', '.join(keys)}"
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist: {expected}")
    damage = EOFError, RuntimeError, LookupError, ValueError, AttributeError, TypeError, pickle.PickleError
    with blame(f"{path} is cut short, damaged or of another format: {expected}", *damage):
        value = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(value, dict) or any(key not in value for key in keys):
        raise UserError(f"{path} holds something else: {expected}")
    return value


def sha256(path):
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(url, path):
    """url to path, with a progress bar; path appears when it is complete. UserError without a network."""
    path.parent.mkdir(parents=True, exist_ok=True)
    advice = "connect to the network, or save it by other means as"
    with (blame(f"could not download {url} ({{}}): {advice} {path}", OSError, ValueError, HTTPException),
          urllib.request.urlopen(url, timeout=20) as source, atomic(path) as temporary,
          temporary.open("wb") as file):
        size = int(source.headers.get("Content-Length", 0))
        with tqdm(total=size, unit="B", unit_scale=True, disable=None) as bar:
            while block := source.read(2**20):
                bar.update(file.write(block))
        require(file.tell() == (size or file.tell()), f"it ended after {file.tell()} of {size} bytes")
    print(f"downloaded {path}, sha256 {sha256(path)}")


def fetch(url):
    """A published file in checkpoints/, downloaded by the first rank if it is not there yet. -> its path"""
    path, error = Path("checkpoints") / url.rpartition("/")[2], None
    if world()[0] == 0 and not path.exists():
        try:
            download(url, path)
        except UserError as failed:
            error = failed
    if dist.is_initialized():
        dist.barrier()
    if not path.exists():
        raise error or UserError(f"{path} is not there: the first rank could not download it")
    return path


def save_state(path, **parts):
    """Everything to resume from: the state_dict() of each part. UserError, the old file kept, if a weight is
    not finite."""
    for name, part in parts.items():
        if isinstance(part, nn.Module) and not all(w.isfinite().all() for w in part.parameters()):
            raise UserError(f"{name} has weights that are not finite; the last good checkpoint stays: {path}")
    save({name: part.state_dict() for name, part in parts.items()}, path)


def load_state(path, **parts):
    """Give the same parts back what save_state() stored. UserError if they do not fit."""
    state = load(path, parts)
    with blame(f"{path} is not of this run ({{}}): start anew with --fresh"):
        for name, part in parts.items():
            part.load_state_dict(state[name])


def resume(folder, parts):
    """Set the parts of a run to its checkpoint; where there is none yet, the log starts anew."""
    if (folder / "ckpt.pt").exists():
        load_state(folder / "ckpt.pt", **parts)
    elif world()[0] == 0:
        (folder / "log.jsonl").unlink(missing_ok=True)
    if dist.is_initialized():
        steps = mean_over_ranks([float(parts["log"].step)])[0]
        if steps != parts["log"].step:
            raise UserError(f"not all ranks see {folder}: expected a file system that they share")


def save_generator(path, net, net_args, t_star, **meta):
    """What load_generator reads: tensors, numbers and strings."""
    save({"net_args": net_args, "state_dict": net.state_dict(), "t_star": t_star, "meta": meta}, path)


def load_generator(path, build, where="meta"):
    """A run's folder, or its g_ema.pt {net_args, state_dict, t_star, meta} -> (g in eval mode, t_star, meta).
    build(**net_args) makes the network, at first `where`. UserError if the file is not one of build's."""
    path = Path(path) / "g_ema.pt" if Path(path).is_dir() else Path(path)
    saved = load(path, ("net_args", "state_dict", "t_star", "meta"))
    with blame(f"{path} is no generator of this stage ({{}})"):
        t_star, meta = float(saved["t_star"]), dict(saved["meta"])
        require(0 < t_star < math.inf, f"t_star is {t_star}")
        return adopt(build, saved["net_args"], saved["state_dict"], where), t_star, meta


def adopt(build, net_args, state_dict, where="meta"):
    """build(**net_args) with these arrays as its weights, in float32, frozen, in eval mode. ValueError, with
    nothing large allocated on meta, unless all names and shapes fit; or if a weight is not finite."""
    with torch.device(where):
        net = build(**net_args)
    ours = net.state_dict()
    for fault, names in (("missing", ours.keys() - state_dict), ("superfluous", state_dict.keys() - ours)):
        require(not names, f"{len(names)} tensors are {fault}: {', '.join(map(str, sorted(names)[:3]))}")
    for name, array in state_dict.items():
        shape = tuple(ours[name].shape)
        require(tuple(array.shape) == shape, f"{name} is {tuple(array.shape)}, expected {shape}")
    arrays = {name: torch.asarray(w, dtype=torch.float32, copy=True) for name, w in state_dict.items()}
    require(all(w.isfinite().all() for w in arrays.values()), "weights that are not finite")
    net.load_state_dict(arrays, assign=True)
    return net.eval().requires_grad_(False)


# ---- A run's folder and its log ----
def lock(folder):
    """Keep other processes out of a run's folder until this one ends. UserError if one is in it."""
    with blame(f"{folder} is in use by another process: wait for it, or name another --out", OSError):
        fcntl.lockf(os.open(folder / ".lock", os.O_CREAT | os.O_WRONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)


def open_run(args, ignore):
    """Make or continue the folder args.out, for this process alone; args.json keeps the arguments, but for
    those to ignore. -> Path

    UserError, with nothing touched, if the folder holds another run (it names what differs) or no run."""
    folder, known = Path(args.out).resolve(), Path(args.out) / "args.json"
    if world()[0] > 0:
        dist.barrier()  # the first rank makes it
        return folder
    now = {name: value for name, value in vars(args).items() if name not in ignore}
    if folder.exists() and not known.exists() and not (
            folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir())):
        raise UserError(f"--out {args.out} exists and is no run's folder: name another")
    if known.exists():
        lock(folder)  # before it is moved from under a run
    if args.fresh and known.exists():
        names = (folder.with_name(f"{folder.name}.old-{i}") for i in range(1, 10**6))
        print(f"moved the older run to {folder.rename(next(name for name in names if not name.exists()))}")
    if known.exists():
        with blame(f"{known} is damaged: name another --out, or start anew with --fresh"):
            then = dict(json.loads(known.read_text()))
        differs = [f"{name} is {then.get(name)} there and {now.get(name)} here"
                   for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name)]
        if differs:
            raise UserError(f"{args.out} holds another run ({'; '.join(differs)}): "
                            "name another --out, or start anew with --fresh")
    folder.mkdir(parents=True, exist_ok=True)
    lock(folder)
    save(now, known)
    if dist.is_initialized():
        dist.barrier()
    return Path(args.out)


class Stop:
    """SIGINT and SIGTERM, asked for after each step: the first asks the run to save and stop, a second kills
    it. All ranks hear of it after the same step."""
    def __init__(self):
        self.signal = 0
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, self.note)

    def note(self, kind, frame):
        self.signal = kind
        signal.signal(kind, signal.SIG_DFL)

    def asked(self):
        if dist.is_initialized():
            self.signal = mean_over_ranks([float(self.signal)])[0]  # above 0 if any rank has one
        return self.signal > 0


def save_if_due(args, folder, parts, stop, keep=lambda name: None):
    """After a step: the checkpoint, if it is due or a signal asks for it; then the run stops."""
    log, stopping = parts["log"], stop.asked()
    if world()[0] == 0 and (log.step % args.save_every == 0 or log.step == args.steps or stopping):
        keep("g_ema.pt")
        save_state(folder / "ckpt.pt", **parts)  # last: what it says is done, is done
    if stopping and log.step < args.steps:
        raise KeyboardInterrupt(f"step {log.step} is saved in {folder}; the same command goes on from there")


class Log:
    """Means over the steps between two lines, to log.jsonl and to the screen (a bar on a terminal, else plain
    lines). Its state is part of the checkpoint, so that the log of a resumed run has no seam."""
    def __init__(self, path, steps):
        self.path, self.steps, self.step, self.saved, self.first = Path(path), steps, 0, 0, 0
        self.sums, self.counts, self.seconds, self.begun, self.new = {}, {}, 0.0, time.time(), True
        self.bar = tqdm(total=steps, disable=None if world()[0] == 0 else True)  # None: silent off a terminal

    def elapsed(self):
        """Seconds of this run, those before an interruption included."""
        return self.seconds + time.time() - self.begun

    def read(self):
        """log.jsonl as a list of dicts, without a last line cut short by a kill."""
        with blame(f"{self.path} is damaged: start anew with --fresh", ValueError):
            lines = self.path.read_text().split("\n")[:-1] if self.path.exists() else []
            return [json.loads(line) for line in lines]

    def state_dict(self):
        self.saved = self.step
        return {"step": self.step, "sums": self.sums, "counts": self.counts, "seconds": self.elapsed()}

    def load_state_dict(self, state):
        """Go on after the state's step; lines that a killed run wrote past it are dropped."""
        self.step, self.sums, self.counts = state["step"], dict(state["sums"]), dict(state["counts"])
        self.new = False
        require(0 <= self.step <= self.steps, f"step {self.step} of {self.steps}")
        self.saved = self.first = self.bar.initial = self.bar.n = self.step
        self.seconds, self.begun = state["seconds"], time.time()
        lines = [json.dumps(line) + "\n" for line in self.read() if line["step"] <= self.step]
        if world()[0] == 0:
            with atomic(self.path) as temporary:
                temporary.write_text("".join(lines))

    def add(self, **values):
        """Count tensors in, by their mean. UserError, before any weight is touched by it, if not finite."""
        means = torch.stack([value.detach().float().mean() for value in values.values()]).tolist()
        for name, mean in zip(values, means):
            if not math.isfinite(mean):
                advice = "with a smaller --lr" if self.step else "with other settings"
                raise UserError(f"step {self.step + 1}: {name} is {mean}; the last good checkpoint is step "
                                f"{self.saved} in {self.path.parent}. Try --fresh {advice}")
            self.sums[name] = self.sums.get(name, 0.0) + mean
            self.counts[name] = self.counts.get(name, 0) + 1

    def write(self, **values):
        """A line: the means since the last one, and values as they are."""
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        if dist.is_initialized():
            means = dict(zip(means, mean_over_ranks(list(means.values()))))
        self.sums, self.counts = {}, {}
        if world()[0] > 0:
            return
        done = self.step - self.first
        eta = (time.time() - self.begun) / max(done, 1) * (self.steps - self.step)
        line = {"step": self.step, **means, **values, "seconds": round(self.elapsed(), 2), "eta": round(eta)}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        text = "  ".join(f"{name} {value:.4g}" for name, value in (means | values).items())
        self.bar.set_postfix_str(text, refresh=False)
        if self.bar.disable:
            to_go = f", {eta:.0f} s to go" if done else ""
            print(f"step {self.step}/{self.steps}  {text}  {self.elapsed():.0f} s{to_go}", flush=True)

    def advance(self):
        """The step is done."""
        self.step += 1
        self.bar.update()
        if self.step == self.steps:
            self.bar.close()


def reporter(args, folder, parts, speed, look, keep):
    """What train() calls after each step: a log line where one is due, thirteen of them over the run with
    look()'s figures, and the checkpoint, with keep(name) for the generator."""
    log, stop = parts["log"], Stop()

    def report():
        due = log.step in {round(args.steps * (i / 12)**2) for i in range(13)}
        if due or log.step % args.log_every == 0:
            values = speed.read(log.step)
            log.write(**values, **(look() if due and world()[0] == 0 else {}))
            speed.restart()
        save_if_due(args, folder, parts, stop, keep)

    if log.new:
        report()
    return report


def progress(items, name, total=None):
    """Yields them, `total` or len(items), with a bar and its ETA on a terminal, else a line every 20 s."""
    begun = shown = time.time()
    total = total or len(items)
    bar = tqdm(items, desc=name, total=total, disable=None if world()[0] == 0 else True)
    for done, item in enumerate(bar, 1):
        yield item
        if bar.disable and time.time() - shown > 20:
            shown = time.time()
            eta = (shown - begun) / done * (total - done)
            print(f"{name}: {done}/{total}, {eta:.0f} s to go", flush=True)


# ---- Pictures ----
def to_uint8(x):
    """Images in [-1, 1] to bytes, as the papers do it."""
    return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def image_grid(images, columns=1):
    """uint8 (N, 3, H, W) -> a Pillow image, row by row, what is left of the last row black."""
    images = torch.cat([images, images.new_zeros(-len(images) % columns, *images.shape[1:])])
    return Image.fromarray(rearrange(images, "(r c) ch h w -> (r h) (c w) ch", c=columns).cpu().numpy())


def save_picture(image, path, frames=(), milliseconds=120, hold=2500):
    """A Pillow image to path; with the frames that follow it, a looping GIF that holds the last one."""
    gif = {"append_images": frames, "duration": [milliseconds] * len(frames) + [hold], "loop": 0}
    with atomic(path) as temporary:
        image.save(temporary, save_all=True, **gif) if frames else image.save(temporary)


def plot_log(path, lines, curves):
    """curves {key of log.jsonl's lines: label} over the steps, both axes logarithmic."""
    figure = Figure(figsize=(6.4, 3.6), dpi=100, layout="constrained")
    axes = figure.subplots()
    for key, label in curves.items():
        axes.plot(*zip(*[(line["step"], line[key]) for line in lines if key in line]), label=label)
    axes.set(xlabel="step", xscale="symlog", yscale="log")
    axes.legend(frameon=False)
    with atomic(path) as temporary:
        figure.savefig(temporary)
