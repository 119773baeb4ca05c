"""Stage 1: Score Implicit Matching where everything can be checked: points in the plane, exact scores.

    python 01_toy_2d.py                                         both parts, about a minute on two cores
    python 01_toy_2d.py --mixture spiral --out runs/spiral
    python 01_toy_2d.py --part distil --method dmd --out runs/dmd
    python 01_toy_2d.py --sample runs/toy_2d-sim-phuber-0 --n 5000

A. Theorem 3.1 to machine precision: both sides of (3.6), as gradients of a network's weights, by quadrature.
   Expect relative errors below 1e-10, but for huber (a kink: 1e-4) and l1 (a jump: 0.3); 0.1 to 1 if wrong.
B. Algorithm 2: a diffusion model of a Gaussian mixture, 35 evaluations a sample, becomes a one-step one.
   Expect 99 % of its samples on the modes, an equal share on each, and pictures of it in the run's folder.
C. The neighbours of SIM, ten lines each, in the same frame. Some of them need data; SIM does not.

The cells open as a notebook (VS Code, jupytext); the last one runs what the command line would.
"""
import copy
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from common import (DISTANCES, MLP, Distance, EDMPrecond, Log, Parser, Stop, accumulate, add_method_arguments,
                    add_run_arguments, annealed, atomic, batch_sum, blame, di_loss, diffuse, dsm_loss,
                    edm_sampler, ema_beta, ema_update, heun, image_grid, l2, lambda_edm, load_generator,
                    make_distance, make_generator_loss, make_times, nowgt, number, one_line_errors, open_run,
                    p_edm, phuber, pick_device, plot_log, resume, sampling_times, save, save_generator,
                    save_if_due, save_picture, seed_step, sid_loss, sidwgt, sim_loss, train_only)


# %% Gaussian mixtures: the teacher, and with std = 0 the student of the theorem
@dataclass
class Mixture:
    """Equal Gaussians of means (K, D) and one std, diffused to x_t = a x_0 + s eps (VE: a = 1, s = t)."""
    means: torch.Tensor
    std: float

    def denoiser(self, x, s, a=1.0):
        """E[x_0 | x_t = x] exactly: each Gaussian's posterior mean, by its posterior. (B, D) -> (B, D)"""
        var = (a * self.std)**2 + s**2
        logits = (a * x @ self.means.T - a**2 * (self.means**2).sum(1) / 2) / var  # |x|^2 cancels
        return (s**2 * logits.softmax(1) @ self.means + a * self.std**2 * x) / var

    def score(self, x, s, a=1.0):
        """grad log p_t(x), from the denoiser: (B.3) for any a. (B, D) -> (B, D)"""
        return (a * self.denoiser(x, s, a) - x) / s**2

    def sample(self, n, generator=None):
        """-> (n, D) exact samples of p_0."""
        where = {"device": self.means.device, "generator": generator}
        which = torch.randint(len(self.means), (n,), **where)
        return self.means[which] + self.std * torch.randn(n, self.means.shape[1], **where)


def polar(radius, angle):
    return torch.view_as_real(torch.polar(radius, angle))  # (K,), (K,) -> (K, 2)


def make_mixture(name, device="cpu"):
    half_turn, arm = torch.linspace(0, math.pi, 24), torch.linspace(0.04, 1, 48).sqrt()
    moon = 0.8 * polar(torch.ones(24), half_turn) - torch.tensor([0.4, 0.2])
    means, std = {"ring": (polar(torch.ones(8), torch.arange(8) * math.pi / 4), 0.1),
                  "grid": (torch.cartesian_prod(*[torch.linspace(-1, 1, 3)] * 2), 0.1),
                  "spiral": (polar(1.2 * arm, 3 * math.pi * arm), 0.05),
                  "moons": (torch.cat([moon, -moon]), 0.06)}[name]
    return Mixture(means.to(device), std)


# %% A. The theorem
# With N fixed latents the student's p_t is a mixture of N Gaussians around the g(z_i). So its score is exact,
# and both sides of (3.6) are means over i of integrals over eps.
PROCESSES = {"VE": lambda t: (1.0, t), "VP": lambda t: ((1 + t**2)**-0.5, t * (1 + t**2)**-0.5)}  # (a, s)
THEOREM = [("l2", {}, 2), ("power", {"alpha": 4}, 2), ("exp", {"alpha": 2, "beta": 0.1}, 2),  # ..., D
           ("smoothl1", {"scale": 0.5}, 2), ("phuber", {"c": 0.5}, 2), ("phuber", {"c": 0.001}, 1),
           ("huber", {"delta": 0.7}, 2), ("l1", {}, 2)]


def sim_loss_score(s_psi, s_q, x_0, a, s, distance, eps):
    """(3.7) as printed, in scores, for x_t = a x_0 + s eps. -> (loss (B,), y_t detached)"""
    x_t = a * x_0 + s * eps
    s_p = s_psi(x_t, s, a)
    y_t = s_p - s_q(x_t, s, a)
    return -batch_sum(distance.d_prime(y_t) * (s_p + eps / s)), y_t.detach()  # grad log q = -eps / s


def backpropagate_d(d_psi, d_q, x_0, t, distance, eps):
    """What (3.3) seems to ask for: its value, differentiated. -> (loss (B,), y_t detached)"""
    x_t = diffuse(x_0, t, eps)
    y_t = d_psi(x_t, t) - d_q(x_t, t)
    return distance.d(y_t), y_t.detach()


WRONG = {  # sim_loss with one thing wrong: what the theorem's "nothing detached" is worth
    "d_prime_detached": lambda d_psi, d_q, x_0, t, distance, eps: sim_loss(
        d_psi, d_q, x_0, t, Distance(distance.d, lambda y: distance.d_prime(y.detach())), eps),
    "d_q_detached": lambda d_psi, d_q, x_0, t, distance, eps: sim_loss(
        d_psi, lambda x_t, t: d_q(x_t, t).detach(), x_0, t, distance, eps),
    "d_backpropagated": backpropagate_d}


def small_generator(dim):
    """-> g, a tanh network; 4 latents for it; a teacher (D = dim). Any would do. All in float64."""
    random = partial(torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = random(4, 2)
    g = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, dim)).double()
    for weights in g.parameters():
        weights.data = 0.5 * random(weights.shape)
    means = torch.tensor([[1.0, 1.0], [-1.0, 0.7], [0.3, -1.2], [-0.8, -0.6]], dtype=torch.float64)
    return g, z, Mixture(means[:, :dim], 0.4)


def trapezoid(dim, nodes, reach=8.5):
    """-> eps (M, dim), weights (M,) of E over N(0, I): exponentially accurate for smooth integrands."""
    axis = torch.linspace(-reach, reach, nodes, dtype=torch.float64)
    eps = torch.cartesian_prod(*[axis] * dim).reshape(-1, dim)
    return eps, torch.softmax(-(eps**2).sum(1) / 2, dim=0)


def theorem_error(t, process, space, distance, dim, nodes, loss=sim_loss):
    """|left - right| / |left| of (3.6), both as gradients with respect to all weights of g."""
    g, z, teacher = small_generator(dim)
    (a, s), (eps, weights) = PROCESSES[process](t), trapezoid(dim, nodes)
    x = g(z)
    atoms = x.detach().requires_grad_()
    p, p_sg, q = [getattr(m, space) for m in (Mixture(atoms, 0.0), Mixture(x.detach(), 0.0), teacher)]
    left, right = torch.zeros_like(x), torch.zeros_like(x)  # gradients with respect to the atoms
    for x_0 in atoms:
        x_t = (a * x_0 + s * eps).detach()  # pi_t = p_sg[theta],t: only the score depends on theta
        left += torch.autograd.grad(weights @ distance.d(p(x_t, s, a) - q(x_t, s, a)), atoms)[0]  # (3.5)
        x_0 = x_0.expand_as(eps)
        value, _ = (loss(p_sg, q, x_0, s, distance, eps) if space == "denoiser" else
                    sim_loss_score(p_sg, q, x_0, a, s, distance, eps))
        right += torch.autograd.grad(weights @ value, atoms)[0]
    gradient = lambda side: torch.autograd.grad(x, g.parameters(), side, retain_graph=True)
    left, right = [nn.utils.parameters_to_vector(gradient(side)) for side in (left, right)]
    return ((left - right).norm() / left.norm()).item()


def theorem(thorough=False):
    """(3.6) for every distance, process and time; beside it, what is wrong. -> the rows of theorem.json"""
    forms = (("VE", "denoiser"), ("VE", "score"), ("VP", "score"))
    cases = [(*case, *form, "theorem", sim_loss) for case in THEOREM for form in forms]
    cases += [(*case, *forms[0], *wrong) for case in (THEOREM[0], THEOREM[4]) for wrong in WRONG.items()]
    times = (0.3, 0.5, 1.0, 2.5, 5.0) if thorough else (0.5, 1.0, 2.5)
    nodes = {1: 800_001, 2: 601} if thorough else {1: 80_001, 2: 289}
    print("Theorem 3.1: |left - right| / |left| of (3.6)".ljust(66), *[f"t = {t:<7}" for t in times], sep="")
    rows = []
    for name, params, dim, process, space, variant, loss in cases:
        for t in times:
            a, s = PROCESSES[process](t)
            unit = a / s**2 if space == "score" else 1.0  # y_score = (a / s^2) y_denoiser: scales go with y
            scaled = {k: v * unit if k in ("c", "scale", "delta") else v for k, v in params.items()}
            error = theorem_error(t, process, space, DISTANCES[name](**scaled), dim, nodes[dim], loss)
            rows.append({"process": process, "space": space, "distance": name, "params": scaled, "t": t,
                         "dim": dim, "variant": variant, "relative_error": error})
        label = f"{process} {space:9}{dim}-D {name} {' '.join(f'{k}={v}' for k, v in params.items())}"
        errors = [f"{row['relative_error']:<11.1e}" for row in rows[-len(times):]]
        print(label.ljust(43), variant.ljust(23), *errors, sep="", flush=True)
    print("l1 fails since sign(y_i) jumps at 0: (3.6) needs the jump, and autograd has 0 for its derivative.")
    return rows


# %% One Gaussian: 5.3.1 of the notes "Distilled Diffusion Models" (README), with closed forms for everything
LOSSES = {"SIM, l2": partial(sim_loss, distance=l2()), "Diff-Instruct, DMD": di_loss,
          "SiD, alpha = 1.2, no weight": partial(sid_loss, alpha=1.2, weight=nowgt),
          "d(y) back-propagated": partial(backpropagate_d, distance=l2())}


def gaussian_gradient(loss, mean, std, psi_mean, psi_std, t=2.0):
    """The gradient by (mean, std) of g(z) = mean + std z, where the data are N(0, 1) and d_psi, frozen, is
    the denoiser of N(psi_mean, psi_std^2): the mean over z and eps by quadrature. -> (2,) float64"""
    theta = torch.tensor([mean, std], dtype=torch.float64, requires_grad=True)
    denoiser = lambda mean, std: lambda x_t, t: (std**2 * x_t + t**2 * mean) / (std**2 + t**2)
    points, weights = trapezoid(2, 61)
    z, eps = points[:, :1], points[:, 1:]
    value, _ = loss(denoiser(psi_mean, psi_std), denoiser(0.0, 1.0), theta[0] + theta[1] * z, t, eps=eps)
    return torch.autograd.grad(weights @ value, theta)[0]


def gaussian_figure(path):
    """Every loss's gradient: by the mean and by the std where d_psi is right, and by the std where it lags.
    By the mean, all but the last depend on d_psi's mean and not on g's, so that the first panel shows a lag
    too."""
    panels = (("by the mean; $d_\\psi$ right", "mean of both", lambda v: (v, 1, v, 1), 0),
              ("by the std; $d_\\psi$ right", "std of both", lambda v: (0, 1 + v / 2, 0, 1 + v / 2), 1),
              ("by the std; g has 0.5", "std of $d_\\psi$", lambda v: (0, 0.5, 0, 1 + v / 2), 1))
    figure = Figure(figsize=(9.6, 3.4), dpi=100, layout="constrained")
    places = torch.linspace(-1.5, 1.5, 25).tolist()
    for axes, (title, label, where, i) in zip(figure.subplots(1, 3), panels):
        for (name, loss), style in zip(LOSSES.items(), ("-", "--", "-.", ":")):
            y = [gaussian_gradient(loss, *where(v))[i].item() for v in places]
            axes.plot([where(v)[2 + i] for v in places], y, style, label=name)
        axes.set(title=title, xlabel=label)
        axes.axhline(0, color="0.8", zorder=0)
    figure.axes[0].set(ylabel="gradient")
    figure.axes[0].legend(frameon=False, fontsize=8)
    with atomic(path) as temporary:
        figure.savefig(temporary)


# %% B. Distillation
class FlowPrecond(nn.Module):
    """A rectified flow as a denoiser: net(x_t, t) as EDMPrecond's, of a velocity model(x (B, D), tau (B,)).

    At x = (1 - tau) x_0 + tau eps the flow learns v = E[eps - x_0 | x] (Liu et al. 2022, (1)). Since x_0 =
    x - tau (eps - x_0), the denoiser is x - tau v, exactly; x_t = x / (1 - tau), t = tau / (1 - tau)."""
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x_t, t):
        t = torch.as_tensor(t, dtype=x_t.dtype, device=x_t.device).reshape(-1, 1)
        x, tau = x_t / (1 + t), t / (1 + t)
        return x - tau * self.model(x, tau.flatten())


def flow_loss(v, x_0, tau, eps):
    """Flow matching: v(x, tau) learns the velocity. tau (B, 1) in [0, 1]. -> (B,)"""
    return batch_sum((v((1 - tau) * x_0 + tau * eps, tau.flatten()) - (eps - x_0))**2)


def make_denoiser(flow=False, **net_args):
    return (FlowPrecond if flow else EDMPrecond)(MLP(**net_args))


def net_arguments(args):
    return {"dim": 2, "width": 64, "depth": 4, "waves": 16, "flow": args.teacher == "flow"}


def pretrain(net, mixture, args):
    """A denoiser of the mixture by dsm_loss, or a flow: what g and d_psi start from, and the learned d_q."""
    optimiser = torch.optim.Adam(net.parameters(), fused=True)
    print(f"pretraining a denoiser of the {args.mixture}: {args.pretrain_steps} steps", flush=True)
    for step in tqdm(range(args.pretrain_steps), disable=None):
        optimiser.param_groups[0]["lr"] = 2e-3 * (1 - step / args.pretrain_steps)
        x_0 = mixture.sample(args.batch)
        if args.teacher == "flow":
            loss = flow_loss(net.model, x_0, torch.rand_like(x_0[:, :1]), torch.randn_like(x_0)).mean()
        else:
            loss = dsm_loss(net, x_0, p_edm((args.batch, 1), device=x_0.device)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def prepare(args, folder, mixture):
    """The parts of a run: new, or as ckpt.pt has them."""
    torch.manual_seed(args.seed)
    checkpoint, device = folder / "ckpt.pt", mixture.means.device
    net = make_denoiser(**net_arguments(args)).to(device)
    if not checkpoint.exists() and args.method != "ct":  # which has no teacher to start from
        pretrain(net, mixture, args)
    d_psi, g, g_ema, d_q = [copy.deepcopy(net) for _ in range(4)]
    for frozen in (g_ema, d_q):
        frozen.eval().requires_grad_(False)
    opt_psi, opt_theta = [torch.optim.Adam(net.parameters(), betas=(0.0, 0.999), fused=True)  # Table 5
                          for net in (d_psi, g)]
    parts = {"d_psi": d_psi, "g": g, "g_ema": g_ema, "opt_psi": opt_psi, "opt_theta": opt_theta,
             "log": Log(folder / "log.jsonl", args.steps), "d_q": d_q}
    resume(folder, parts)
    return parts


def train(args, d_q, parts, report):
    """Algorithm 2, up to args.steps updates of g; report() is called after each."""
    d_psi, g, g_ema, opt_psi, opt_theta, log, _ = parts.values()
    device = next(g.parameters()).device
    distance = make_distance(args)
    generator_loss = (partial(WRONG[args.method], distance=distance) if args.method in WRONG else
                      make_generator_loss(args, distance))
    weight_psi, rows = lambda_edm, args.batch  # samples in an update
    times = make_times(args)

    def draw(phase):  # -> [(z, t, eps, cond)], the micro-batches; points come without a condition
        where = {"device": device, "generator": random}
        z, eps = args.t_star * torch.randn(args.batch, 2, **where), torch.randn(args.batch, 2, **where)
        return [(z, times[phase]((args.batch, 1), **where), eps, None)]

    def generate(g, z, cond):
        return g(z, args.t_star)  # (B.4)

    def given(denoiser, cond):  # -> (x_t, t) -> denoised, the condition closed over
        return denoiser

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


# %% C. The neighbours: other ways to few steps, with the same networks and as many updates. Those that match
# scores take SIM's t* and times, the others start from t* = 80. Plain distances stand for the papers' LPIPS.
# Numbers in [] are those of the notes "Distilled Diffusion Models" (July 2024), misprints mended (README).
STEPS = 18  # of a teacher's flow, or of a segment of it: about CIFAR-10's N in Song et al. (2023), Table 3


def jump(denoise, x, t, b):
    """[51]: from time t to b on the straight line to the denoised x. b = 0 is denoise itself."""
    x_0 = denoise(x, t)
    return x_0 + b / t * (x - x_0)


def few_steps(g, z, t_star, segments=1):
    """z (B, 2), standard normal, to samples by `segments` evaluations of g; one is (B.4)."""
    x, starts = t_star * z, sampling_times(STEPS * segments + 1, sigma_max=t_star)[::STEPS][:segments]
    for t, b in zip(starts, [*starts[1:], 0.0]):
        x = jump(g, x, t, b)
    return x


class Neighbour:
    """A method of the notes: theta() is the loss (B,) of g, psi() that of a second network, if it has one. In
    each phase the other network is frozen."""
    t_star, psi = 2.5, None

    def __init__(self, args, mixture, d_q, parts):
        self.args, self.mixture, self.d_q, self.times = args, mixture, d_q, make_times(args)
        self.d_psi, self.g, self.where = parts["d_psi"], parts["g"], {"device": mixture.means.device}
        self.begin(args.steps)  # for what is drawn once: random numbers of no step, the same after a kill

    def begin(self, step):
        self.progress = step / self.args.steps
        self.where["generator"] = seed_step(self.args.seed, step, self.where["device"])

    def normal(self):
        return torch.randn(self.args.batch, 2, **self.where)

    def data(self, n=1):
        return self.mixture.sample(n * self.args.batch, self.where["generator"])

    def time(self, phase):
        return self.times[phase]((self.args.batch, 1), **self.where)

    def generate(self, z):
        return self.g(self.args.t_star * z, self.args.t_star)  # (B.4)

    def pick(self):  # from what was drawn once
        return torch.randint(len(self.z), (self.args.batch,), **self.where)

    def grid(self, steps):
        """-> (steps + 1,) falling times of the flow, from t* to 0.002."""
        times = sampling_times(steps + 1, sigma_max=self.args.t_star)[:-1]
        return torch.tensor(times, device=self.where["device"])

    def logit(self, x):  # of the discriminator: the second perceptron's first output
        return self.d_psi.model(x, x.new_zeros(1))[:, 0]


class CD(Neighbour):
    """Consistency distillation (Song et al. 2023): |f(x_t, t) - f(x_s, s)|^2 [12], where x_s is x_t a step of
    the teacher's flow later, and the second f is g as it is, detached. f(x, t) = jump(g, x, t, b) to the end
    b of time, so that f(x, b) = x [8]. Multistep, mcm (Heek et al. 2024) [52]: to that of t's segment."""
    t_star = 80.0

    def theta(self):
        steps = STEPS * self.args.segments
        grid, i = self.grid(steps), torch.randint(steps, (self.args.batch, 1), **self.where)
        t, s, b = grid[i], grid[i + 1], grid[(i // STEPS + 1) * STEPS]
        x_t = diffuse(self.data(), t, self.normal())
        with torch.no_grad():
            target = jump(self.g, heun(self.d_q, x_t, [t, s]), s, b)
        return batch_sum((jump(self.g, x_t, t, b) - target)**2)


class CT(Neighbour):
    """Consistency training, improved (iCT, Song and Dhariwal 2024), from scratch: d(f(x_0 + t eps, t) -
    f(x_0 + s eps, s)) / (t - s) [27], no EMA in the second f [42], d Pseudo-Huber [43]; t and s are ends of
    one of ten steps, which double seven times, drawn log-normally."""
    t_star = 80.0

    def theta(self):
        grid = self.grid(10 * 2**int(8 * self.progress))
        share = torch.special.ndtr((grid.log() + 1.1) / 2).diff().abs()  # of N(-1.1, 2^2), in each step
        i = torch.multinomial(share, self.args.batch, True, generator=self.where["generator"])[:, None]
        t, s, x_0, eps = grid[i], grid[i + 1], self.data(), self.normal()
        with torch.no_grad():
            target = jump(self.g, diffuse(x_0, s, eps), s, grid[-1])  # the same eps: an Euler step [20]
        apart = jump(self.g, diffuse(x_0, t, eps), t, grid[-1]) - target
        return phuber(0.00054 * x_0.shape[1]**0.5).d(apart) / (t - s).flatten()


class DMD(Neighbour):
    """Distribution matching distillation (Yin et al. 2024): the gradient of the KL divergence [63], weighted,
    and 0.25 |g(z) - x|^2, x where the teacher's flow leads z. d_psi learns as SIM's does [66]."""
    def __init__(self, *given):
        super().__init__(*given)
        self.z = torch.cat([self.normal() for _ in range(10)])
        self.x = edm_sampler(self.d_q, self.z)

    def psi(self):
        return dsm_loss(self.d_psi, self.generate(self.normal()), self.time("psi"), self.normal())

    def theta(self):
        x_0 = self.generate(self.normal())
        loss, _ = di_loss(self.d_psi, self.d_q, x_0, self.time("theta"), self.normal(), sidwgt)
        i = self.pick()
        return loss + 0.25 * batch_sum((self.generate(self.z[i]) - self.x[i])**2)


class ADD(Neighbour):
    """Adversarial diffusion distillation (Sauer et al. 2023): 2.5 |g(z) - d_q(x_t, t)|^2 [67], d_q(x_t, t)
    detached [68], and a hinge GAN. From noise alone, without the penalty R1 and a weight of t."""
    def psi(self):
        x, x_0 = self.data(), self.generate(self.normal())
        return F.relu(1 - self.logit(x)) + F.relu(1 + self.logit(x_0))

    def theta(self):
        x_0, t = self.generate(self.normal()), self.time("theta")
        with torch.no_grad():
            target = self.d_q(diffuse(x_0, t, self.normal()), t)
        return 2.5 * batch_sum((x_0 - target)**2) - self.logit(x_0)


class PaGoDA(Neighbour):
    """PaGoDA (Kim et al. 2024), without its growing resolution: |x - g(E(x))|, where E(x) is the noise to
    which the teacher's flow leads data x, and a GAN [55], whose generator minimises -log D(g(z))."""
    t_star = 80.0

    def __init__(self, *given):
        super().__init__(*given)
        self.x = self.data(10)
        self.z = heun(self.d_q, self.x, self.grid(STEPS).flip(0)) / self.args.t_star

    def psi(self):
        x, x_0 = self.data(), self.generate(self.normal())
        return F.softplus(-self.logit(x)) + F.softplus(self.logit(x_0))  # -log D(x) - log(1 - D(g(z)))

    def theta(self):
        i, x_0 = self.pick(), self.generate(self.normal())
        return (self.generate(self.z[i]) - self.x[i]).norm(dim=1) + F.softplus(-self.logit(x_0))


NEIGHBOURS = {"dmd": DMD, "add": ADD, "cd": CD, "ct": CT, "mcm": CD, "pagoda": PaGoDA}


def train_neighbour(args, neighbour, parts, report):
    """In the place of train: an update of the second network, if there is one, and one of g."""
    d_psi, g, g_ema, opt_psi, opt_theta, log, _ = parts.values()
    phases = {"psi": (d_psi, g, opt_psi), "theta": (g, d_psi, opt_theta)}
    while log.step < args.steps:
        neighbour.begin(log.step)
        for phase, (net, frozen, optimiser) in phases.items():
            if not (loss_of := getattr(neighbour, phase)):
                continue
            optimiser.param_groups[0]["lr"] = annealed(args, log.step)
            train_only(net, frozen=frozen)
            loss = loss_of()
            log.add(**{f"loss_{phase}": loss})
            optimiser.zero_grad()
            loss.mean().backward()
            optimiser.step()
        ema_update(g_ema, g, ema_beta(log.step * args.batch, args.batch, args.ema_half_life))
        log.advance()
        report()


@torch.no_grad()
def look(args, folder, mixture, g, log):
    """A log line and a picture of the generator so far."""
    random = torch.Generator(mixture.means.device).manual_seed(0)  # the same latents and data each time
    z = torch.randn(10_000, 2, device=mixture.means.device, generator=random)
    x, data = few_steps(g, z, args.t_star, args.segments), mixture.sample(10_000, random)
    log.write(sw2=sliced_w2(projections(x, 20), projections(data, 20)))
    picture = image_grid(panel(mixture, x, f"step {log.step}")[None])
    save_picture(picture, folder / "samples" / f"{log.step:06}.png")


# %% Measures and pictures
def mode_shares(x, mixture):
    """-> the share of x (N, 2) within 4 std of a mode; a list of the shares nearest to each mode."""
    distance, nearest = torch.cdist(x, mixture.means).min(1)
    shares = torch.bincount(nearest, minlength=len(mixture.means)) / len(x)
    return (distance < 4 * mixture.std).float().mean().item(), shares.tolist()


def projections(x, directions=200):
    """x (N, 2) projected on directions all around, (N, directions), each projection sorted."""
    around = polar(torch.ones(directions), math.pi * torch.arange(directions) / directions)
    return (x @ around.T.to(x)).sort(dim=0)[0]


def sliced_w2(a, b):
    """The sliced Wasserstein-2 distance of two sets, from their projections."""
    return (a - b).square().mean().sqrt().item()


@torch.no_grad()
def evaluate(args, mixture, g, d_q, seconds, n=10_000, sets=8):
    """Exact, the teacher's and one-step samples, against exact ones in pairs of sets. -> metrics, samples"""
    random = torch.Generator(mixture.means.device).manual_seed(1)
    normal = partial(torch.randn, n, 2, device=mixture.means.device, generator=random)
    points = {"_exact": [mixture.sample(n, random) for _ in range(sets)],
              "_teacher": [edm_sampler(d_q, normal()) for _ in range(sets)],
              "": [few_steps(g, normal(), args.t_star, args.segments) for _ in range(sets)]}
    lines = {end: [projections(x) for x in many] for end, many in points.items()}
    metrics = {key: getattr(args, key) for key in ("method", "distance", "mixture", "seed", "steps")}
    metrics |= {"evaluations": args.segments, "seconds": round(seconds, 1)}
    for end, many in points.items():
        w2 = [sliced_w2(lines[end][i], lines["_exact"][j]) for i in range(sets) for j in range(i)]
        metrics[f"share_on_modes{end}"], metrics[f"mode_shares{end}"] = mode_shares(torch.cat(many), mixture)
        metrics[f"sw2{end}"] = sum(w2) / len(w2)
    return metrics, [many[0] for many in points.values()]


def panel(mixture, x, title):
    """Up to 4000 of the samples x (N, 2) over the mixture's density. -> uint8 (3, H, W)"""
    reach = mixture.means.abs().max().item() + 6 * mixture.std
    axis = torch.linspace(-reach, reach, 160)
    square = torch.cdist(torch.cartesian_prod(axis, axis), mixture.means.cpu())**2
    density = torch.exp(-square / (2 * mixture.std**2)).sum(1).reshape(160, 160).T.numpy()
    figure = Figure(figsize=(3.6, 3.9), dpi=100)
    axes = figure.add_axes((0.02, 0.02, 0.96, 0.89))
    axes.imshow(density, extent=(-reach, reach) * 2, origin="lower", cmap="Blues", vmax=1.5 * density.max())
    axes.scatter(*x[:4000].cpu().numpy().T, s=3, c="#d1495b", alpha=0.4, linewidths=0)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), xticks=[], yticks=[])
    axes.set_title(title, fontsize=11)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return torch.from_numpy(np.array(canvas.buffer_rgba())[..., :3]).permute(2, 0, 1)


def distil(args, folder, mixture):
    """B as a whole: train, measure, draw."""
    (folder / "samples").mkdir(exist_ok=True)
    parts, stop = prepare(args, folder, mixture), Stop()
    g, log, d_q = parts["g_ema"], parts["log"], mixture.denoiser if args.teacher == "exact" else parts["d_q"]
    few = "one step" if args.segments == 1 else f"{args.segments} evaluations"

    def keep(name):
        meta = {"mixture": args.mixture, "segments": args.segments, "step": log.step}
        save_generator(folder / name, g, net_arguments(args), args.t_star, **meta)

    def report():
        if log.step in {round(args.steps * (i / 60)**2) for i in range(61)}:  # often at first
            look(args, folder, mixture, g, log)
        save_if_due(args, folder, parts, stop, keep)

    if log.new:
        report()
    if args.method in NEIGHBOURS:
        train_neighbour(args, NEIGHBOURS[args.method](args, mixture, d_q, parts), parts, report)
    else:
        train(args, d_q, parts, report)
    keep("g_ema.pt")  # again, should it have been lost
    m, samples = evaluate(args, mixture, g, d_q, log.elapsed())
    save(m, folder / "metrics.json")
    titles = {"_exact": "data", "_teacher": "teacher, 35 evaluations", "": few}
    panels = torch.stack([panel(mixture, x, title) for x, title in zip(samples, titles.values())])
    save_picture(image_grid(panels, columns=3), folder / "samples.png")
    frames = [Image.open(path) for path in sorted((folder / "samples").glob("[0-9]*.png"))]
    save_picture(frames[0], folder / "animation.gif", frames[1:])
    curves, lines = {"divergence": "E d(y), the estimate of (3.3)", "sw2": "sliced Wasserstein-2"}, log.read()
    curves = {key: label for key, label in curves.items() if any(key in line for line in lines)}
    plot_log(folder / "divergence.png", lines, curves)
    print(f"{m['seconds']:.0f} s".ljust(25) + "on modes  share of each mode  sliced W2")
    for end, title in titles.items():
        shares, on_modes, sw2 = [m[key + end] for key in ("mode_shares", "share_on_modes", "sw2")]
        print(f"{title:25}{on_modes:8.1%}  {min(shares):6.1%} to {max(shares):.1%}     {sw2:.4f}")
    print(f"pictures: {folder}/samples.png, animation.gif, divergence.png")
    print(f"next: python 01_toy_2d.py --sample {folder} --n 5000")


def sample(args):
    """--sample: n points of a trained generator as array and picture, beside the checkpoint or in --out."""
    g, t_star, meta = load_generator(args.sample, make_denoiser)
    with blame(f"{args.sample} is no generator of this stage ({{}})"):
        mixture, segments = make_mixture(meta["mixture"]), int(meta.get("segments", 1))
    path = Path(args.sample)
    z = torch.randn(args.n, 2, generator=torch.Generator().manual_seed(args.seed))
    with torch.no_grad():
        x = few_steps(g, z, t_star, segments)
    folder = Path(args.out or (path if path.is_dir() else path.parent))
    folder.mkdir(parents=True, exist_ok=True)
    name = folder / f"drawn-{args.n}-seed-{args.seed}"
    with atomic(f"{name}.npy") as temporary:
        np.save(temporary, x.numpy())
    save_picture(image_grid(panel(mixture, x, f"{args.n} samples")[None]), f"{name}.png")
    print(f"{mode_shares(x, mixture)[0]:.1%} of {args.n} samples lie on a mode: {name}.npy, {name}.png")


# %% The command line
def refuse_unused(parser, args):
    """An error for a flag that --method does not read, so that nobody compares what it did not change."""
    weighted, others = ("sim", "sid", "di"), [method for method in NEIGHBOURS if method != "ct"]
    algorithm_2 = (*weighted, *WRONG)
    alike = ("distance", "c", "alpha", "beta", "delta", "scale", "psi_updates")
    readers = {"segments": ["mcm"], "sid_alpha": ["sid"], "weight": weighted,
               "teacher": (*algorithm_2, *others), **dict.fromkeys(alike, algorithm_2),
               **dict.fromkeys(("psi_mean", "psi_std"), (*algorithm_2, "dmd")),
               **dict.fromkeys(("p_theta", "p_mean", "p_std"), (*algorithm_2, "dmd", "add"))}
    for name, methods in readers.items():
        if getattr(args, name) != parser.get_default(name) and args.method not in methods:
            flag = name.replace("_", "-")
            parser.error(f"--{flag} is not for --method {args.method}, but for {', '.join(methods)}")


def parse(argv):
    parser = Parser(__doc__)
    parser.add_argument("--part", choices=("both", "theorem", "distil"), default="both", help="A, B or both")
    parser.add_argument("--thorough", action="store_true", help="A at more times, on finer grids: minutes")
    parser.add_argument("--mixture", choices=("ring", "grid", "spiral", "moons"), default="ring", help="data")
    parser.add_argument("--teacher", choices=("exact", "learned", "flow"), default="exact",
                        help="or an MLP: a diffusion model, or a rectified flow")
    parser.add_argument("--p-theta", choices=("lognormal", "karras"), default="lognormal",
                        help="g's times: (B.10) or (B.8)")
    parser.add_argument("--pretrain-steps", type=number(int), default=3000, help="of the first denoiser")
    add_method_arguments(parser, (*NEIGHBOURS, *WRONG))
    parser.add_argument("--segments", type=number(int), help="of mcm: evaluations a sample (4)")
    add_run_arguments(parser, method="sim", sid_alpha=1.0, steps=4000, batch=1024, lr=2e-3, anneal="linear",
                      p_mean=-1.5, p_std=1.5, psi_mean=-1.2, psi_std=1.2, psi_updates=1,
                      ema_half_life=7e4, save_every=500, n=10_000)  # measured on the ring
    args = parser.parse_args(argv)
    refuse_unused(parser, args)
    args.segments = args.segments or (4 if args.method == "mcm" else 1)
    args.t_star = args.t_star or NEIGHBOURS.get(args.method, Neighbour).t_star
    return args


@one_line_errors
def main(argv=None):
    args = parse(argv)
    torch.set_num_threads(min(2, torch.get_num_threads()))  # more only slow networks this small down
    if args.sample is not None:
        return sample(args)
    device, _ = pick_device(args.device), make_distance(args)  # mistakes stop here
    args.out = args.out or f"runs/toy_2d-{args.method}-{args.distance}-{args.seed}"
    ignore = ("out", "fresh", "device", "save_every", "part", "thorough", "sample", "n")
    folder = open_run(args, ignore)
    if args.part == "theorem" or args.part == "both" and not (folder / "theorem.json").exists():
        gaussian_figure(folder / "gaussian.png")
        save(theorem(args.thorough), folder / "theorem.json")
    if args.part != "theorem":
        distil(args, folder, make_mixture(args.mixture, device))


# %% In a notebook: main(["--mixture", "moons"]), as on the command line
if __name__ == "__main__":
    main([] if "ipykernel" in sys.modules else None)
