"""What the three stages share: the paper first, then the run kit, which a first reading can skip.

The notation is the paper's (arXiv 2410.16794v1, equation numbers in brackets): g is the one-step
generator, d_q the frozen teacher, d_psi the online denoiser that follows g, x_t = x_0 + t eps and
y_t = d_psi(x_t, t) - d_q(x_t, t). The letter d alone is a distance. Shapes: data x is (B, ...) of
any rank; a time t is (B, 1, ..., 1), to broadcast against x; a loss is (B,). A denoiser is any
function (x_t, t) -> denoised of x_t's shape; a class or a caption is already bound to the denoiser.
"""
import argparse
import copy
import functools
import hashlib
import inspect
import json
import math
import os
import pickle
import signal
import sys
import time
import urllib.request
import zipfile
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from einops import rearrange
from PIL import Image
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm


class UserError(ValueError, argparse.ArgumentTypeError):
    """A mistake that the user can mend: what was wrong, what was expected, what to do. argparse
    prints the text of an ArgumentTypeError without a change."""


def require(condition, message):
    if not condition:
        raise UserError(message)


# ==== The paper ====

# ---- Distances between scores: Table 4 and A.3, with their misprints corrected (lab/PAPER.md) ----
@dataclass(frozen=True)
class Distance:
    """A distance d of (3.3) and its gradient d': y (B, ...) -> d(y) (B,) and d_prime(y) (B, ...).
    To add your own, write a function below that returns a Distance, and name the function in
    DISTANCES. Its arguments become parameters, which are positive numbers: --distance
    NAME,argument=value."""
    d: Callable
    d_prime: Callable


def batch_sum(v):
    """Sum over all but the batch, (B, ...) -> (B,). A sum and not a mean, as in Listing 1."""
    return v.reshape(len(v), -1).sum(1)


def expand_as(s, y):
    """One number for each sample, (B,) -> (B, 1, ..., 1), to broadcast against y (B, ...)."""
    return s.reshape(-1, *[1] * (y.ndim - 1))


def l2():
    """|y|^2. SIM with this distance is SiD at alpha = 1, apart from SiD's weight."""
    return Distance(lambda y: batch_sum(y**2), lambda y: 2 * y)


def power(alpha=4):
    """The sum of y_i^alpha. UserError unless alpha is even and at least 2 (section 3.3)."""
    require(alpha >= 2 and alpha % 2 == 0, f"alpha must be an even number >= 2, got {alpha}")
    return Distance(lambda y: batch_sum(y**alpha), lambda y: alpha * y**(alpha - 1))


def exp(alpha=2, beta=0.1):
    """exp(beta sum of y_i^alpha) - 1. UserError unless alpha is as in power."""
    inner = power(alpha)
    return Distance(lambda y: torch.expm1(beta * inner.d(y)),
                    lambda y: beta * expand_as(torch.exp(beta * inner.d(y)), y) * inner.d_prime(y))


def l1():
    """The sum of |y_i|, the row of Table 4 that is wrong under autograd: the theorem needs the jump
    of sign(y) at 0, and autograd takes the derivative of the jump to be 0 (stage 1, part A)."""
    return Distance(lambda y: batch_sum(y.abs()), torch.sign)


def smoothl1(scale=0.5):
    """The sum of sqrt(y_i^2 + scale^2) - scale: l1 without the jump, and exact. d is written as a
    quotient, which is the same number without cancellation near 0."""
    return Distance(lambda y: batch_sum(y**2 / ((y**2 + scale**2).sqrt() + scale)),
                    lambda y: y / (y**2 + scale**2).sqrt())


def huber(delta=1.0):
    """Sum of y_i^2 / 2, or delta (|y_i| - delta / 2) if |y_i| > delta."""
    return Distance(lambda y: batch_sum(F.huber_loss(y, torch.zeros_like(y), "none", delta)),
                    lambda y: y.clamp(-delta, delta))


def phuber(c=0.001):
    """Pseudo-Huber (3.8), sqrt(|y|^2 + c^2) - c, where |y| is the norm of the whole sample, written
    as a quotient as in smoothl1. The paper does not say what c is; 0.001 is "a common value", says
    an answer in issue 5 of maple-research-lab/SIM."""
    norm = lambda y: (batch_sum(y**2) + c**2).sqrt()
    return Distance(lambda y: batch_sum(y**2) / (norm(y) + c), lambda y: y / expand_as(norm(y), y))


DISTANCES = {f.__name__: f for f in (l2, power, exp, l1, smoothl1, huber, phuber)}


def parse_distance(text):
    """"phuber" or "phuber,c=0.01" -> the text with every parameter written out, and the Distance.
    UserError for an unknown name or parameter, or a value that the distance cannot take."""
    name, *pairs = text.split(",")
    require(name in DISTANCES, f"{name!r} is no distance: expected {', '.join(DISTANCES)}")
    takes = inspect.signature(DISTANCES[name]).parameters
    settings = {key: parameter.default for key, parameter in takes.items()}
    for key, _, value in (pair.partition("=") for pair in pairs):
        require(key in takes, f"{name} takes {', '.join(takes) or 'no parameter'}, no {key!r}")
        number = checked(float, lambda v: v > 0, f"positive number for {name}'s {key}")
        settings[key] = number(value)
    full = ",".join([name, *[f"{key}={value:.10g}" for key, value in settings.items()]])
    return full, DISTANCES[name](**settings)


# ---- Noise levels and weights: B.2 and B.3. `where` stands for device= and generator= ----
def p_edm(shape, mean=-1.2, std=1.2, t_min=0.0, t_max=math.inf, truncate="clamp", **where):
    """Log-normal noise levels t = exp(mean + std N(0, 1)). psi's are (B.5)-(B.6), of mean -1.2 and
    std 1.2; theta's are (B.9)-(B.10), of mean -3.5 and std 2.5.

    B.3 restricts t to [t_min, t_max] without saying how: "clamp" moves a t outside to the nearer
    end, "resample" draws a new one. UserError unless 0 <= t_min < t_max."""
    require(0 <= t_min < t_max, f"expected 0 <= t_min < t_max, got {t_min} and {t_max}")
    t, tries = torch.exp(mean + std * torch.randn(shape, **where)), 0
    while truncate == "resample" and (outside := (t < t_min) | (t > t_max)).any():
        require(tries < 10_000, f"hardly a noise level is in [{t_min}, {t_max}]: try clamp")
        t[outside] = torch.exp(mean + std * torch.randn(int(outside.sum()), **where))
        tries += 1
    return t.clamp(t_min, t_max)


def karras_schedule(place, sigma_min=0.002, sigma_max=80, rho=7):
    """The noise level at a place from 0, sigma_max, to 1, sigma_min: Karras et al. 2022, (5)."""
    high, low = sigma_max**(1 / rho), sigma_min**(1 / rho)
    return (high + place * (low - high))**rho


def p_karras(shape, r_max=0.8, **where):
    """SiD's noise levels for theta: a sampler's schedule at a random place 1 - r, r ~ U[0, r_max].
    As in SiD's code, where t is in [0.002, 24.4]; (B.8) prints another range."""
    return karras_schedule(1 - r_max * torch.rand(shape, **where))


def draw_times(args, phase, shape, **where):
    """An update's noise levels, for phase "psi" or "theta", by the options of the stages. All are
    in [t_min, --t-max], since a teacher knows nothing about noise levels it was not trained on."""
    if phase == "theta" and args.p_theta == "karras":
        return p_karras(shape, **where).clamp(args.t_min, args.t_max)  # (B.8)
    mean, std = (args.psi_mean, args.psi_std) if phase == "psi" else (args.p_mean, args.p_std)
    return p_edm(shape, mean, std, args.t_min, args.t_max, args.truncate, **where)  # (B.6), (B.10)


def draw_batch(args, shape, kinds, phase, random):
    """An update's micro-batches on this rank [(z, t, eps, cond)], for phase "psi" or "theta": z
    (B, *shape) is t* times standard normal, t (B, 1, ..., 1), eps (B, *shape), and cond (B,) has
    numbers below `kinds`, of classes or captions, drawn uniformly: no data are needed."""
    where = {"device": random.device, "generator": random}
    z, eps = [torch.randn(args.batch, *shape, **where) for _ in range(2)]
    t = draw_times(args, phase, (args.batch, *[1] * len(shape)), **where)
    cond = torch.randint(kinds, (args.batch,), **where) if kinds else z.new_zeros(args.batch)
    return micro_batches((args.t_star * z, t, eps, cond), args.batch_gpu)


def lambda_edm(t, sigma_data=0.5):
    """EDM's weight of the denoising loss, (t^2 + sigma_data^2) / (t sigma_data)^2, (B.7)."""
    return (t**2 + sigma_data**2) / (t * sigma_data)**2


def nowgt(x_0, teacher):
    """SIM's weight of the generator's loss, 1 at every noise level (B.13). Figure 2 has this name.
    `teacher` is d_q(x_t, t)."""
    return 1.0


def sidwgt(x_0, teacher):
    """SiD's weight, (B.11) for denoisers: 1 over the mean of |x_0 - teacher|, without a gradient.
    -> (B,). The least mean, 1e-5, is that of SiD's code."""
    mean = batch_sum((x_0 - teacher).abs()) / x_0[0].numel()
    return 1 / mean.detach().clamp(min=1e-5)


WEIGHTS = {f.__name__: f for f in (nowgt, sidwgt)}


# ---- Losses ----
# In SIM's loss and in SiD's no gradient is stopped. train_only decides whose weights are frozen.
def diffuse(x_0, t, eps=None):
    """x_t of x_0's shape; eps is fresh standard normal noise unless given."""
    return x_0 + t * (torch.randn_like(x_0) if eps is None else eps)  # (B.12)


def dsm_loss(d_psi, x_0, t, eps=None, weight=lambda_edm):
    """Denoising score matching, (B.2): d_psi learns to denoise what x_0 is drawn from. -> (B,)"""
    return batch_sum(weight(t) * (d_psi(diffuse(x_0, t, eps), t) - x_0)**2)


def sim_loss(d_psi, d_q, x_0, t, distance, eps=None, weight=nowgt):
    """Score Implicit Matching, (3.7) for denoisers. -> loss (B,); y_t (B, ...) detached, to log

    The gradient flows from x_0 through x_t into both networks. The value of the loss is about 0 at
    all times (the score-projection identity, A.1); E d(y_t), the estimate of (3.3), falls."""
    x_t = diffuse(x_0, t, eps)
    student, teacher = d_psi(x_t, t), d_q(x_t, t)
    y_t = student - teacher
    loss = -batch_sum(distance.d_prime(y_t) * (student - x_0))  # (B.13)
    return weight(x_0, teacher) * loss, y_t.detach()


def sid_loss(d_psi, d_q, x_0, t, alpha, eps=None, weight=sidwgt):
    """SiD (Zhou et al. 2024) as its code has it: half of SIM's loss for l2, plus (1 - alpha) |y|^2,
    with the weight (B.11). -> loss (B,); y_t detached"""
    x_t = diffuse(x_0, t, eps)
    student, teacher = d_psi(x_t, t), d_q(x_t, t)
    y_t = student - teacher
    loss = -batch_sum(y_t * (student - x_0)) + (1 - alpha) * batch_sum(y_t**2)
    return weight(x_0, teacher) * loss, y_t.detach()


def di_loss(d_psi, d_q, x_0, t, eps=None, weight=nowgt):
    """Diff-Instruct (Luo et al. 2023), the gradient of the KL divergence: no gradient flows through
    the networks. -> loss (B,); y_t detached"""
    with torch.no_grad():
        x_t = diffuse(x_0, t, eps)
        teacher = d_q(x_t, t)
        y_t = d_psi(x_t, t) - teacher
    return weight(x_0, teacher) * batch_sum(y_t * x_0), y_t


def make_generator_loss(args, more=()):
    """--method, --distance and --weight -> a function (d_psi, d_q, x_0, t, eps=None) -> loss (B,),
    y_t; and the Distance. `more` has other methods {name: loss}, with the arguments of sim_loss."""
    if args.distance == "l1" and args.method == "sim":
        print("warning: l1 is wrong under autograd (see 01_toy_2d.py, part A); smoothl1 is exact")
    _, distance = parse_distance(args.distance)
    losses = {name: functools.partial(loss, distance=distance) for name, loss in dict(more).items()}
    losses |= {"sim": functools.partial(sim_loss, distance=distance), "di": di_loss,
               "sid": functools.partial(sid_loss, alpha=args.sid_alpha)}
    loss = losses[args.method]
    if args.weight != "own":
        require(args.method not in more, f"--weight is for sim, sid and di, not for {args.method}")
        loss = functools.partial(loss, weight=WEIGHTS[args.weight])
    return loss, distance


# ---- Samplers ----
def sampling_times(num_steps, **span):
    """A sampler's falling noise levels, from sigma_max to sigma_min, and a last 0, as floats."""
    places = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    return [*karras_schedule(places, **span).tolist(), 0.0]


@torch.no_grad()
def heun(denoise, x, times):
    """Follow the probability flow from x (B, ...) along times, falling or rising, numbers or
    (B, 1, ..., 1): Karras et al. 2022, Algorithm 2 without churn. Two evaluations of denoise for a
    step, one for a step to 0. In float64 where the device has it; denoise sees x's dtype."""
    dtype, shape = x.dtype, (len(x), *[1] * (x.ndim - 1))

    def slope(x, t):  # dx/dt
        t_full = torch.as_tensor(t, dtype=dtype, device=x.device).expand(shape)
        return (x - denoise(x.to(dtype), t_full)) / t

    x = x if x.device.type == "mps" else x.double()
    for t_cur, t_next in zip(times, times[1:]):
        d_cur = slope(x, t_cur)
        x_next = x + (t_next - t_cur) * d_cur
        if torch.as_tensor(t_next).all():  # the second order; at t = 0 there is no slope
            x_next = x + (t_next - t_cur) * (d_cur + slope(x_next, t_next)) / 2
        x = x_next
    return x.to(dtype)


def edm_sampler(denoise, z, num_steps=18, **span):
    """Standard normal z (B, ...) -> samples, by 2 num_steps - 1 evaluations of denoise."""
    times = sampling_times(num_steps, **span)
    return heun(denoise, times[0] * z, times)


@torch.no_grad()
def dpm_solver(denoise, z, num_steps=14, **span):
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2) in EDM's form, where alpha = 1 and lambda =
    -log t. Standard normal z (B, ...) -> samples, by num_steps evaluations of denoise."""
    t = sampling_times(num_steps, **span)
    x, d_last = t[0] * z, None
    for i in range(num_steps):
        d = extrapolated = denoise(x, z.new_full((len(z), *[1] * (z.ndim - 1)), t[i]))
        if 0 < i < num_steps - 1:
            r = math.log(t[i - 1] / t[i]) / math.log(t[i] / t[i + 1])
            extrapolated = d + (d - d_last) / (2 * r)
        x, d_last = extrapolated + t[i + 1] / t[i] * (x - extrapolated), d
    return x


# ---- The denoiser, and the generator ----
class EDMPrecond(nn.Module):
    """EDM's preconditioning (Karras et al. 2022, Table 1) of model(x, c_noise, *conditions).

    net(x (B, ...), t) is a denoiser, t a number, (B,) or (B, 1, ..., 1); the same net(z, t_star) is
    the generator, (B.4). The model's c_noise is (B,), or (1,) where t is one number."""
    def __init__(self, model, sigma_data=0.5):
        super().__init__()
        self.model, self.sigma_data = model, sigma_data

    def forward(self, x, t, *cond, **named_cond):
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.ndim - 1))
        var = t**2 + self.sigma_data**2
        c_skip, c_in = self.sigma_data**2 / var, 1 / var.sqrt()
        c_out, c_noise = t * self.sigma_data / var.sqrt(), t.flatten().log() / 4
        return c_skip * x + c_out * self.model(c_in * x, c_noise, *cond, **named_cond)


def as_denoiser(net, amp, *cond, **named_cond):
    """A network of images with its conditions -> a denoiser (x_t, t) -> denoised of x_t's dtype.
    Under autocast to bfloat16 if amp is "bf16". denoiser.cond has the conditions without names."""
    def denoiser(x_t, t):  # t is a number or (B, 1, 1, 1)
        t = torch.as_tensor(t, device=x_t.device).expand(len(x_t), 1, 1, 1)
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=amp == "bf16"):
            return net(x_t, t, *cond, **named_cond).to(x_t.dtype)

    denoiser.cond = cond  # for a loss that depends on the conditions, as a reward does
    return denoiser


# ---- The distance of two sets of features ----
def moments(features):
    """features (N, D) -> their mean (D,) and covariance (D, D) over N - 1, in float64."""
    return features.double().mean(0), torch.cov(features.double().T)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), Heusel et al. 2017, (6), of
    means (D,) and covariances (D, D), in float64. UserError for moments that do not fit together.

    With sigma1 = r r^T the trace of the root is the sum of the roots of the eigenvalues of
    r^T sigma2 r, which is symmetric: no square root of a matrix is needed."""
    given = [torch.as_tensor(v) for v in (mu1, sigma1, mu2, sigma2)]
    size, shapes = given[0].shape, [tuple(v.shape) for v in given]  # size is (D,)
    require(shapes == [size, size + size, size, size + size] and
            all(v.isreal().all() and v.isfinite().all() for v in given), "a Frechet distance of "
            f"moments {shapes}: expected as many features, (D,) and (D, D), finite and real")
    mu1, sigma1, mu2, sigma2 = [v.double() for v in given]
    values, vectors = torch.linalg.eigh(sigma1)
    r = vectors * values.clamp(min=0).sqrt()
    trace_of_root = torch.linalg.eigvalsh(r.T @ sigma2 @ r).clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace_of_root
    require(distance >= -1e-4 * (sigma1.trace() + sigma2.trace()),
            f"the Frechet distance is {distance:.4g}: expected covariances of features")
    return max(distance.item(), 0.0)


def sliced_w2(a, b):
    """The sliced Wasserstein-2 distance of two sets of equal size. a and b are (N, K): the data
    projected on K directions of length 1, the same for both sets, and each column sorted."""
    return (a - b).square().mean().sqrt().item()


# ==== The run kit: what any training run needs. Nothing below is about the paper ====

# ---- Training ----
def train_only(net, frozen):
    """For a phase of Algorithm 2: net learns; frozen gets no gradient for its weights, but passes
    gradients on to its input, as (B.13) needs. The only place that freezes or thaws g and d_psi."""
    net.train().requires_grad_(True)
    frozen.eval().requires_grad_(False)


def make_parts(denoiser, adam_eps=1e-8):
    """What Algorithm 2 trains and a Run saves: d_psi, g and g's average g_ema, copies of the
    denoiser, and an Adam each for d_psi and g, with the betas of Table 5."""
    d_psi, g, g_ema = [copy.deepcopy(denoiser) for _ in range(3)]
    g_ema.eval().requires_grad_(False)
    adam = functools.partial(torch.optim.Adam, betas=(0.0, 0.999), eps=adam_eps, fused=True)
    return {"d_psi": d_psi, "g": g, "g_ema": g_ema, "opt_psi": adam(d_psi.parameters()),
            "opt_theta": adam(g.parameters())}


def update(optimiser, lr):
    """Under torchrun the gradients are summed over all ranks. Then the optimiser takes one step."""
    optimiser.param_groups[0]["lr"] = lr
    if dist.is_initialized():  # one message for all weights: many short messages take longer
        grads = [w.grad for w in optimiser.param_groups[0]["params"] if w.grad is not None]
        summed = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(summed)
        for grad, part in zip(grads, summed.split([grad.numel() for grad in grads])):
            grad.copy_(part.view_as(grad))
    optimiser.step()
    optimiser.zero_grad()


def load_moments(adam, state):
    """Give an Adam the moments that a file has, and none of the file's settings. UserError unless
    the moments have the shapes of their weights: torch does not compare the shapes, and a fused
    Adam would write beyond the end of a smaller tensor."""
    adam.load_state_dict(adam.state_dict() | {"state": state["state"]})
    for w, held in adam.state.items():
        shapes = [held[name].shape for name in ("step", "exp_avg", "exp_avg_sq")]
        require(shapes == [(), w.shape, w.shape], f"Adam's moments are of another shape: {shapes}")


def ema_beta(images, batch, half_life=5e5, ramp_up=0.05):
    """The decay of g's average for a batch that follows `images` images. half_life counts images,
    fewer at the start. The form is EDM's, the constants are SiD's; the paper is silent."""
    return 0.5**(batch / max(min(half_life, ramp_up * images), 1e-8))


@torch.no_grad()
def ema_update(ema, net, beta):
    """ema <- beta ema + (1 - beta) net for all parameters; the buffers are constants here."""
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - beta)


def seed_step(seed, step, device="cpu"):
    """Random numbers depend on (seed, step) alone: a resumed run is exact with no state to store.
    -> a Generator that draws alike on all ranks; torch's own, for dropout, differs by rank."""
    number = lambda *key: int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    torch.manual_seed(number(seed, step, rank_and_ranks()[0] + 1))
    return torch.Generator(device).manual_seed(number(seed, step, 0))


def draw_latents(seeds, shape, classes=0, labels=None, device="cpu"):
    """One seed for each image, so that no image depends on the size of a batch. -> standard normal
    z (n, *shape) and one-hot labels (n, classes): random, or those of the list `labels` in turn."""
    randoms = [torch.Generator().manual_seed(seed) for seed in seeds]
    z = torch.stack([torch.randn(shape, generator=random) for random in randoms]).to(device)
    if not classes:
        return z, z.new_zeros(len(z), 0)
    labels = labels or [int(torch.randint(classes, (), generator=random)) for random in randoms]
    labels = torch.tensor([labels[i % len(labels)] for i in range(len(z))], device=device)
    return z, F.one_hot(labels, classes).float()


# ---- Processes and devices ----
def rank_and_ranks():
    """-> the number of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_ranks(v):
    """A tensor on the CPU -> the sum of all ranks' tensors, there."""
    if dist.is_initialized():
        v = v.to("cuda") if dist.get_backend() == "nccl" else v
        dist.all_reduce(v)
    return v.cpu()


def barrier():  # all ranks wait for each other
    if dist.is_initialized():
        dist.barrier()


def micro_batches(draws, size=None):
    """This rank's rows of `draws`, tensors (B, ...), as a list of tuples of at most `size` rows."""
    rank, ranks = rank_and_ranks()
    rows = [draw.chunk(ranks)[rank] for draw in draws]
    return list(zip(*[row.split(size or len(row)) for row in rows]))


def check_batch(args):
    """UserError unless --batch can be shared among the ranks and cut into --batch-gpu."""
    ranks = rank_and_ranks()[1]
    require(args.batch % ranks == 0, f"--batch {args.batch}: expected a multiple of {ranks} ranks")
    require((args.batch_gpu or 1) <= args.batch // ranks, f"--batch-gpu {args.batch_gpu}: expected "
            f"at most a rank's share of --batch, {args.batch // ranks}")


def pick_device(name="auto", tf32=False):
    """auto is cuda, else mps, else cpu. Under torchrun each rank joins the others, on a GPU of its
    own, and only the first one prints. UserError for a device that is not there."""
    # torch has TensorFloat-32 on for the convolutions of a GPU, unless one turns it off.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    if name == "auto":
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    ranked = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if ranked and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    with reading(f"--device {name}", "a device of this machine: try cpu"):
        device = torch.empty(0, device=name).device
        torch.zeros(1, device=device).item()  # an error for "meta", which computes nothing
    if ranked and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=6))  # the first rank may download
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w", errors="ignore")  # noqa: SIM115
    return device


# ---- Errors and the command line ----
def one_line_errors(main):
    """Decorates main(argv=None): a user's mistake is one line on stderr and exit status 2. Every
    other exception is a mistake of ours and keeps its traceback."""
    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            main(argv)
            if dist.is_initialized():
                dist.destroy_process_group()
            return
        except (UserError, OSError, UnicodeError) as error:
            message, status = f"error: {error}", 2
        except (RuntimeError, MemoryError) as error:
            short = "out of memory" in str(error) or "can't allocate memory" in str(error)
            if not (short or isinstance(error, MemoryError)):
                raise
            message, status = "error: out of memory: try a smaller --batch-gpu, --batch or --n", 2
        except KeyboardInterrupt as stop:
            message, status = f"stopped: {str(stop) or 'what was saved is kept'}", 130
        if os.environ.get("RANK", "0") != "0":  # torchrun ends this rank if the first one fails too
            time.sleep(5)
        print(message, file=sys.stderr)
        sys.exit(status)
    return wrapped


@contextmanager
def reading(path, expected):
    """An error while a file is read becomes a UserError, since the file is damaged or foreign. Only
    code that reads and checks a file stands in such a block: other errors keep their traceback."""
    try:
        yield
    except Exception as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:240]
        raise UserError(f"{path} cannot be used ({reason}): expected {expected}") from error


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows a default where there is one, and the module's docstring as it stands."""
    def _get_help_string(self, action):
        shown = action.default not in (None, "", False)
        return super()._get_help_string(action) if shown else action.help


def checked(kind, fits, name):
    """An argparse type: an int or a float that fits; `name` is what the error says was expected."""
    def parse(text):
        with suppress(ValueError):
            value = kind(text)
            if abs(value) < 2**63 and fits(value):  # false for inf and nan
                return value
        raise UserError(f"expected a {name}, got {text[:40]!r}")
    return parse


count = checked(int, lambda n: 0 < n < 10**9, "whole number > 0 and below 10^9")
at_least_0 = checked(int, lambda n: n >= 0, "whole number >= 0")
positive = checked(float, lambda v: v > 0, "number > 0")
real = checked(float, lambda v: True, "finite number")


def plain_parser(doc):
    """A parser without options, whose errors are one line and whose --help shows all defaults."""
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                     formatter_class=HelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message} (--help lists the options)\n")
    return parser


def make_parser(doc, methods=(), images=False, **defaults):
    """plain_parser with the options that all stages, or those of images, share."""
    parser = plain_parser(doc)
    add = parser.add_argument_group("method").add_argument
    add("--method", choices=("sim", "sid", "di", *methods), help="or another, to compare")
    add("--distance", type=lambda text: parse_distance(text)[0], default="phuber",
        help=f"d of (3.3): {', '.join(DISTANCES)}; with parameters as in phuber,c=0.01")
    add("--weight", choices=("own", *WEIGHTS), default="own",
        help="of g's loss; own is sidwgt (B.11) with --method sid, and else nowgt")
    add("--sid-alpha", type=real, help="SiD's alpha; 1.2 on CIFAR-10")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=count, help="updates of the generator")
    add("--batch", type=count, help="samples in an update, over all ranks")
    add("--batch-gpu", type=count, help="samples at once: the gradients of the batch accumulate")
    add("--lr", type=positive, help="of both Adams (Table 5: 1e-5; B.3: 5e-6)")
    add("--lr-psi", type=positive, help="of d_psi's Adam; --lr unless given")
    add("--anneal", choices=("none", "linear"), help="of the lr, to 0 at the last step")
    add("--t-star", type=positive, help="t* of (B.4) (Table 5: 2.5)")
    add("--p-mean", type=real, help="mean of g's log t (B.10: -3.5; B.3: -2)")
    add("--p-std", type=positive, help="std of g's log t (B.10: 2.5; B.3: 2)")
    add("--p-theta", choices=("lognormal", "karras"), default="lognormal",
        help="g's noise levels: (B.10) or (B.8)")
    add("--psi-mean", type=real, help="mean of d_psi's log t (B.6: -1.2; B.3: -2)")
    add("--psi-std", type=positive, help="std of d_psi's log t (B.6: 1.2; B.3: 2)")
    add("--t-max", type=positive, help="largest noise level of both (B.3: 156.6)")
    add("--truncate", choices=("clamp", "resample"), default="clamp", help="of a log-normal t")
    add("--psi-updates", type=count, help="for each update of g (Algorithm 2: 1; Listing 1: 2)")
    add("--ema-half-life", type=positive, help="of g's average, in samples (SiD: 5e5)")
    if images:
        add("--adam-eps", type=positive, help="of both Adams")
        add("--amp", choices=("none", "bf16"), help="bf16: autocast of the networks to bfloat16")
        add("--tf32", action="store_true", help="TensorFloat-32 on GPUs, convolutions included")
        add("--compile", action="store_true", help="torch.compile of the networks")
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=at_least_0, default=0, help="of everything random")
    add("--device", default="auto", help="auto (the best one here), cpu, cuda or mps")
    add("--out", help="the run's folder, or --sample's file; named after the run unless given")
    add("--fresh", action="store_true", help="start anew; an older run is moved aside")
    add("--save-every", type=count, help="updates between checkpoints")
    add("--log-every", type=count, help="updates between log lines")
    add("--sample", metavar="RUN", help="only draw from a run: its folder, or its g_ema.pt")
    add("--n", type=count, help="samples that --sample draws; in stage 3, of each prompt")
    parser.set_defaults(**defaults)
    return parser


# ---- Files: written under a temporary name, then renamed; read without executing anything ----
@contextmanager
def writing(path):
    """An error while path is written becomes a UserError that names the file."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        raise UserError(f"{path} could not be written ({str(error).splitlines()[0]}): expected "
                        "room on the disk and a folder that can be written to") from error


@contextmanager
def atomic(path):
    """Yields a temporary path beside `path`, with its extension, and makes the folder. The file
    gets its own name only if the block succeeds, so that the file is never half written."""
    temporary = Path(path).with_name(f".tmp-{os.urandom(6).hex()}-{Path(path).name}")
    with writing(path):
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)  # a file of our own: no other process's, and no link
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def save(value, path):
    """Plain dicts and lists: as JSON if path ends so, else for torch.load(weights_only=True)."""
    with atomic(path) as temporary:
        if temporary.suffix == ".json":
            temporary.write_text(json.dumps(value, indent=1) + "\n")
        else:
            torch.save(value, temporary)
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())  # on the disk before the old file is gone


def sha256(path):
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_once(path, make):
    """A file in checkpoints/ that all ranks read: the first rank saves make() if there is none."""
    if rank_and_ranks()[0] == 0 and not path.exists():
        save(make(), path)
        print(f"{path}: {path.stat().st_size / 1e9:.2f} GB")
    barrier()


def fetch(url):
    """A published file -> its path in checkpoints/, downloaded once. UserError without network."""
    path = Path("checkpoints") / url.rpartition("/")[2]
    if rank_and_ranks()[0] == 0 and not path.exists():
        expected = f"a network, or this file saved by other means as {path}"
        with (atomic(path) as part, reading(url, expected), urllib.request.urlopen(url) as answer):
            torch.hub.download_url_to_file(url, str(part), progress=sys.stderr.isatty())
            require(answer.length in (None, part.stat().st_size), "the download ended early")
        print(f"downloaded {path}, sha256 {sha256(path)}")
    barrier()
    return path


def load_saved(path):
    """What torch.save wrote, on the CPU. Nothing in the file is executed. UserError unless the file
    is as it was written, by the sums that torch.save stores and torch.load ignores, and holds what
    it declares: no record is compressed, and no tensor repeats its numbers."""
    require(Path(path).is_file(), "there is no such file")
    size = Path(path).stat().st_size
    if zipfile.is_zipfile(path):  # torch's older format is none
        with zipfile.ZipFile(path) as file:
            require(sum(item.file_size for item in file.infolist()) <= size, "it is compressed")
            require((damaged := file.testzip()) is None, f"{damaged} is damaged")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's own text advises to execute the file
        raise UserError("it is damaged, or holds more than tensors and plain values") from None
    parts = saved.values() if isinstance(saved, dict) else [saved]
    tensors = [w for part in parts for w in (part.values() if isinstance(part, dict) else [part])]
    require(sum(getattr(w, "nbytes", 0) for w in tensors) <= 2 * size, "tensors repeat numbers")
    return saved


META = {"teacher": str, "t5": str, "vae": str, "judged": dict, "prompts": list, "tested": list,
        "mu": torch.Tensor, "sigma": torch.Tensor, "guidance": float, "fd_real": float,
        "fd_teacher": float, "class_accuracy_teacher": float}  # what the stages read in a file


def load_generator(path, build):
    """A run's folder, or a g_ema.pt -> the generator (frozen, on the CPU), t_star and meta.
    build(**net_args) makes the network. UserError for another file."""
    path = Path(path) / "g_ema.pt" if Path(path).is_dir() else Path(path)
    with reading(path, "a generator of this stage, {net_args, state_dict, t_star, meta}"):
        saved = load_saved(path)
        t_star, meta = float(saved["t_star"]), dict(saved["meta"])
        require(0 < t_star < math.inf, f"t_star is {t_star}")
        for name, value in (meta | dict(meta.get("judged", {}))).items():
            require(isinstance(value, META.get(name, object)), f"{name} is {value!r:.40}")
        net = load_frozen(build, saved["net_args"], saved["state_dict"])
    return net, t_star, meta


def load_frozen(build, net_args, state):
    """build(**net_args) with the tensors of `state` as its weights, in float32, in eval mode and
    FROZEN: a teacher from a file comes from here, so that none of its weights gets a gradient.
    To be called in a block of `reading`: an error unless names and shapes fit and all is finite."""
    with torch.device("meta"):  # allocates nothing for a file that declares more than it holds
        net = build(**net_args)
    state = {name: w.to(torch.float32, copy=True) for name, w in state.items()}
    require(all(w.isfinite().all() for w in state.values()), "weights that are not finite")
    net.load_state_dict(state, assign=True)
    return net.eval().requires_grad_(False)


# ---- A run ----
class Run:
    """A training run and its folder: args.json says what the run is, log.jsonl how it went. ckpt.pt
    holds the parts (networks and optimisers), to continue from; g_ema.pt holds the generator, built
    by net_args. The same command continues a killed run, bit for bit on a CPU. Each part is an
    attribute: Run(..., g=g).g is g. facts are what the run is besides its arguments, such as the
    teacher's SHA-256. UserError, with nothing touched, if the folder is another run's or in use."""
    MAY_CHANGE = {"out", "fresh", "device", "save_every", "log_every", "batch_gpu", "sample", "n",
                  "part", "thorough", "classes", "teacher_sample", "checkpointing", "prompt",
                  "prompt_file", "teacher_steps", "solver", "latents"}  # when a run goes on

    def __init__(self, args, folder, facts, generator, net_args, **parts):
        check_batch(args)
        self.args, self.folder, self.facts, self.parts = args, Path(folder), facts, parts
        self.generator, self.net_args = generator, net_args
        self.log, self.checkpoint = self.folder / "log.jsonl", self.folder / "ckpt.pt"
        vars(self).update(parts)
        self.step, self.seconds, self.signal, self.values = 0, 0.0, 0, {}
        self.is_first = rank_and_ranks()[0] == 0
        if self.is_first:
            self.open_folder()
        barrier()
        if self.checkpoint.exists():
            self.load()
        if self.is_first:  # a killed run may have written lines past its checkpoint
            lines = [json.dumps(line) + "\n" for line in self.lines()] if self.step else []
            with atomic(self.log) as temporary:
                temporary.write_text("".join(lines))
        self.written_step = self.saved_step = self.step
        self.begun = self.written = self.paused = time.monotonic()

    @staticmethod
    def default_folder(args, name):
        """--out or, unless given, runs/NAME-METHOD-DISTANCE-SEED. NAME says what the teacher is."""
        short = args.distance.split(",")[0]
        if args.distance != parse_distance(short)[0]:  # with a parameter that is not the default
            short = args.distance.replace(",", "-")
        return Path(args.out or f"runs/{name}-{args.method}-{short}-{args.seed}")

    def open_folder(self):
        """Lock the folder, and check that it holds this run or write args.json."""
        record, facts = self.folder / "args.json", vars(self.args) | self.facts
        here = {name: value for name, value in facts.items() if name not in self.MAY_CHANGE}
        others = {path.name for path in self.folder.glob("[!.]*")} - {"theorem.json"}
        require(record.exists() or not others,
                f"{self.folder} exists and is no run's folder: name another --out")
        for path in self.folder.glob("*"):  # links would lead elsewhere, and a pipe would wait
            require((path.is_file() or path.is_dir()) and not path.is_symlink(),
                    f"{path} is a link or no file: remove it, or name another --out")
        self.lock()
        if record.exists() and self.args.fresh:
            names = (self.folder.with_name(f"{self.folder.name}.old-{i}") for i in range(1, 10**6))
            old = self.folder.rename(next(name for name in names if not name.exists()))
            print(f"moved the older run to {old}")
            self.lock()
        if record.exists():
            with reading(record, "the arguments of a run: start anew with --fresh"):
                there = dict(json.loads(record.read_text()))
            differs = [f"{name} is {there.get(name)} there and {here.get(name)} here"
                       for name in sorted(there | here) if there.get(name) != here.get(name)]
            require(not differs, f"{self.folder} holds another run ({'; '.join(differs)}): "
                    "name another --out, or start anew with --fresh")
        else:
            save(here, record)
        for path in self.folder.rglob(".tmp-*"):  # what a kill has left
            path.unlink()

    def lock(self):
        """Make the folder, and keep other processes out until this process ends."""
        require(os.name == "posix", "training needs Linux or macOS: on Windows, use WSL")
        import fcntl  # Windows has none, and can still sample and evaluate
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock_file = (self.folder / ".lock").open("a")
        try:
            fcntl.lockf(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.folder} is in use by another process: wait for the end of that "
                            "process, or name another --out") from None

    def load(self):
        """Set all parts to their state in ckpt.pt."""
        with reading(self.checkpoint, "the checkpoint of this run: start anew with --fresh"):
            state = load_saved(self.checkpoint)
            self.step, self.seconds = int(state["step"]), float(state["seconds"])
            require(0 <= self.step <= self.args.steps, f"it is of step {self.step}")
            for name, part in self.parts.items():
                if isinstance(part, nn.Module):
                    part.load_state_dict(state[name])
                else:
                    load_moments(part, state[name])
        if self.step < self.args.steps:
            print(f"{self.folder} goes on from step {self.step} of {self.args.steps}")

    def finish(self, **figures):
        """Write metrics.json, as the last file: a run that has this file is finished. -> what
        metrics.json says: which run it was, how long it took, and its figures."""
        names, last = ("method", "distance", "teacher", "seed", "steps", "batch"), self.lines()[-1]
        metrics = {name: vars(self.args)[name] for name in names} | self.facts
        metrics |= {name: last[name] for name in ("seconds", "images_s")} | figures
        save(metrics, self.folder / "metrics.json")
        return metrics

    def finished(self):
        """True, and said, if nothing of the run is left to do."""
        done = self.step == self.args.steps and (self.folder / "metrics.json").exists()
        if done:
            print(f"{self.folder} is finished, and its result is in metrics.json. For a new run: "
                  "--fresh, another --seed or another --out")
        return done

    def steps(self):
        """Yields the number of each update that is left to do. Between two of them: the checkpoint,
        if one is due, and the end of the run, if SIGINT or SIGTERM asked for it."""
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, self.ask_to_stop)
        self.begun = self.written = time.monotonic()
        silent = None if self.is_first else True  # tqdm's None: off a terminal
        for step in tqdm(range(self.step, self.args.steps), initial=self.step,
                         total=self.args.steps, disable=silent):
            self.step = step + 1  # from here on run.step counts the update that is under way
            yield step
            stop = sum_over_ranks(torch.tensor(self.signal)).item()  # all ranks stop, or none
            if stop or self.step % self.args.save_every == 0 or self.step == self.args.steps:
                self.save()
            if stop:
                raise KeyboardInterrupt(f"step {self.step} is saved in {self.folder}; "
                                        "the same command goes on from there")
        print("all updates are done: what follows measures the result", flush=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # for what follows the training
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def ask_to_stop(self, kind, frame):
        """The first signal lets the update end; a second one, of either kind, kills."""
        self.signal = 1
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, signal.SIG_DFL)

    def add(self, **tensors):
        """Collect values for the next log line, each by its mean. UserError, before the weights
        change, if a mean is not finite."""
        means = torch.stack([v.detach().float().mean() for v in tensors.values()]).tolist()
        for name, mean in zip(tensors, means):
            self.require_finite(math.isfinite(mean), f"{name} is {mean}")
            self.values.setdefault(name, []).append(mean)

    def require_finite(self, finite, what):
        require(finite, f"step {self.step}: {what}; the last good checkpoint is step "
                f"{self.saved_step} in {self.folder}. Try --fresh with a smaller --lr")

    def due(self, every=math.inf, looks=12):
        """True after some `looks` updates of the run, where the generator is looked at, denser at
        the start; and after each `every` updates. False on all ranks but the first one."""
        self.paused = time.monotonic()  # what comes now does not count in images_s
        at = {round(self.args.steps * (i / looks)**2) for i in range(looks + 1)}
        return self.is_first and (self.step in at or self.step % every == 0)

    def write(self, **values):
        """A line of log.jsonl and of the screen: the means of what was collected, then `values`."""
        figures = {name: sum(v) / len(v) for name, v in self.values.items()} | values
        rate = (self.step - self.written_step) / max(self.paused - self.written, 1e-9)
        line = {"step": self.step, **figures, "images": self.step * self.args.batch,
                "images_s": round(rate * self.args.batch, 1), "seconds": round(self.elapsed(), 1)}
        if self.step:  # the first line has no update to judge by
            line["eta"] = round(self.elapsed() / self.step * (self.args.steps - self.step))
        with writing(self.log), self.log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        text = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
        to_go = f"  {line['eta']} s to go" if self.step else ""
        tqdm.write(f"step {self.step}/{self.args.steps}  {text}{to_go}")
        sys.stdout.flush()
        self.values, self.written_step, self.written = {}, self.step, time.monotonic()

    def lines(self):
        """log.jsonl up to this step, as dicts, without a last line that a kill cut short."""
        with reading(self.log, "lines of JSON: start anew with --fresh"):
            lines = [json.loads(line) for line in self.log.read_text().split("\n")[:-1]]
            return [line for line in lines if line["step"] <= self.step]

    def elapsed(self):
        """Seconds of this run, those before an interruption included."""
        return self.seconds + time.monotonic() - self.begun

    def save(self):
        """g_ema.pt, then ckpt.pt. UserError, with the old files kept, if a weight is not finite."""
        if self.is_first:
            nets = [part for part in self.parts.values() if isinstance(part, nn.Module)]
            finite = all(w.isfinite().all() for net in nets for w in net.parameters())
            self.require_finite(finite, "weights are not finite")
            self.save_generator()
            state = {name: part.state_dict() for name, part in self.parts.items()}
            save({"step": self.step, "seconds": self.elapsed()} | state, self.checkpoint)
        self.saved_step = self.step

    def save_generator(self, name="g_ema.pt"):
        """What load_generator reads: how to build the network, its weights, t*, and its origin."""
        save({"net_args": self.net_args, "state_dict": self.generator.state_dict(),
              "t_star": self.args.t_star, "meta": self.facts | {"step": self.step}},
             self.folder / name)


def progress(items, name, total=None):
    """Yields the items, with a bar on a terminal and elsewhere a line with the ETA every 20 s."""
    begun = shown = time.monotonic()
    total = total or len(items)
    bar = tqdm(items, desc=name, total=total, disable=None if rank_and_ranks()[0] == 0 else True)
    for done, item in enumerate(bar, 1):
        yield item
        if bar.disable and time.monotonic() - shown > 20:
            shown = time.monotonic()
            eta = (shown - begun) / done * (total - done)
            print(f"{name}: {done}/{total}, {eta:.0f} s to go", flush=True)


# ---- Pictures ----
def to_uint8(x):
    """Images in [-1, 1] to bytes, as EDM does it."""
    return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def image_grid(images, columns=1):
    """Images (N, C, H, W), uint8 or in [-1, 1] -> a Pillow image, row by row. What is left of the
    last row is white. The first three channels are shown as RGB, or the first one as grey."""
    images = to_uint8(images) if images.is_floating_point() else images
    channels = 3 if images.shape[1] >= 3 else 1
    images = images[:, :channels]
    white = images.new_full((-len(images) % columns, *images.shape[1:]), 255)
    images = torch.cat([images, white])
    grid = rearrange(images, "(r c) ch h w -> (r h) (c w) ch", c=columns)
    return Image.fromarray(grid.squeeze(2).cpu().numpy())


def save_picture(image, path, frames=()):
    """A Pillow image to path; with the frames that follow, a GIF (ms) that holds its last one."""
    gif = dict(save_all=True, append_images=frames, duration=[120] * len(frames) + [2500], loop=0)
    with atomic(path) as temporary:
        image.save(temporary, **gif if frames else {})


def sample_path(args, run, what=""):
    """Where --sample writes: --out or, unless given, RUN/samples-WHAT-N-seed-SEED.png. UserError
    for an --out that is in use, so that nothing is lost and two sets of samples never mix."""
    run = Path(run) if Path(run).is_dir() else Path(run).parent
    out = Path(args.out or run / f"samples-{what}{args.n}-seed-{args.seed}.png")
    require(out.suffix in (".png", ".npz", ""),
            f"--out {out}: expected .png (a picture), .npz (an array) or a folder (of PNGs)")
    in_use = any(out.iterdir()) if out.is_dir() else args.out and out.exists()
    require(not in_use, f"--out {out} exists: name another, or remove this one first")
    with writing(out):  # before the images are drawn: a place that is no use is refused early
        (out.parent if out.suffix else out).mkdir(parents=True, exist_ok=True)
    return out


def write_samples(out, sets, picture, seed, texts=(), **more):
    """Write sets {name: images (N, C, H, W)} to `out`, which sample_path chose: to a .png what
    picture() draws, to an .npz the sets and `more` as arrays, to a folder PNGs, each named by the
    seed of its image, and the texts in prompts.txt. Several sets have a folder each."""
    if out.suffix == ".png":
        return save_picture(picture(), out)
    pixels = {name: to_uint8(images).cpu() for name, images in sets.items()}
    if out.suffix == ".npz":
        arrays = {name: rearrange(x, "n c h w -> n h w c") for name, x in pixels.items()}
        with atomic(out) as temporary:
            np.savez(temporary, **arrays, **more)
    else:
        for name, x in pixels.items():
            folder = out / name if len(sets) > 1 else out
            for k, image in enumerate(x):
                save_picture(image_grid(image[None]), folder / f"{seed + k:06}.png")
            if texts:  # lab/scores.py reads them
                lines = "".join(" ".join(text.split()) + "\n" for text in texts)
                with atomic(folder / "prompts.txt") as temporary:
                    temporary.write_text(lines, encoding="utf-8")
