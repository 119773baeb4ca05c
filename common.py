"""What every stage shares: first the paper, then networks, then what a training run needs.

The notation is the paper's (arXiv 2410.16794v1, equation numbers in brackets): g is the one-step generator,
d_psi the online denoiser that follows it, d_q the frozen teacher, x_t = x_0 + t eps; `d` alone is a distance.
Shapes: data x is (B, ...) of any rank; a time t is (B, 1, ..., 1), to broadcast against x; a loss is (B,).
A denoiser is a callable (x_t, t) -> denoised, of x_t's shape, its conditions (class, prompt) closed over.
"""
import argparse
import functools
import inspect
import json
import math
import os
import pickle
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
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
    return Distance(lambda y: batch_sum(nn.functional.huber_loss(y, torch.zeros_like(y), "none", delta)),
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


# ---- Losses. Which weights are frozen is the caller's business (train_only); SIM detaches nothing ----
def diffuse(x_0, t, eps=None):
    """x_t; eps of x_0's shape, fresh noise unless given."""
    return x_0 + t * (torch.randn_like(x_0) if eps is None else eps)  # (B.12)


def dsm_loss(d_psi, x_0, t, eps=None, weight=lambda_edm):
    """Denoising score matching, (B.2): teaches d_psi the denoiser of whatever x_0 is drawn from. -> (B,)"""
    return batch_sum(weight(t) * (d_psi(diffuse(x_0, t, eps), t) - x_0)**2)


def sim_loss(d_psi, d_q, x_0, t, distance, eps=None):
    """Score Implicit Matching, (3.7) in denoiser form. -> (loss (B,), y_t (B, ...) detached)

    The gradient flows from x_0 through x_t into both networks. The value is about 0 at all times (the
    score-projection identity, A.1): what falls is E d(y_t), the estimate of (3.3)."""
    x_t = diffuse(x_0, t, eps)
    f = d_psi(x_t, t)
    y_t = f - d_q(x_t, t)
    return -batch_sum(distance.d_prime(y_t) * (f - x_0)), y_t.detach()  # (B.13)


def sid_loss(d_psi, d_q, x_0, t, alpha, eps=None):
    """SiD (Zhou et al. 2024), as its code has it: half of SIM's l2, plus (1 - alpha) |y|^2, over w, which is
    (B.11) for denoisers. -> (loss (B,), y_t detached)"""
    x_t = diffuse(x_0, t, eps)
    f, q = d_psi(x_t, t), d_q(x_t, t)
    y_t = f - q
    w = (batch_sum((x_0 - q).abs()) / x_0[0].numel()).detach().clamp(min=1e-5)  # 1e-5: SiD's code
    return (-batch_sum(y_t * (f - x_0)) + (1 - alpha) * batch_sum(y_t**2)) / w, y_t.detach()


def di_loss(d_psi, d_q, x_0, t, eps=None):
    """Diff-Instruct (Luo et al. 2023), the gradient of the KL divergence: nothing flows through the networks.
    -> (loss (B,), y_t detached)"""
    with torch.no_grad():
        x_t = diffuse(x_0, t, eps)
        y_t = d_psi(x_t, t) - d_q(x_t, t)
    return batch_sum(y_t * x_0), y_t


@torch.no_grad()
def edm_sampler(denoise, z, num_steps=18, sigma_min=0.002, sigma_max=80, rho=7):
    """Heun's method: Karras et al. 2022, Algorithm 2 without churn; 2 num_steps - 1 evaluations of denoise.
    z (B, ...) is standard normal. x is kept in float64 where the device has it; denoise sees z's dtype."""
    step = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    t = (sigma_max**(1 / rho) + step * (sigma_min**(1 / rho) - sigma_max**(1 / rho)))**rho  # their (5)
    t = [*t.tolist(), 0.0]

    def slope(x, t):  # dx/dt of the probability flow
        return (x - denoise(x.to(z.dtype), z.new_full((len(z), *[1] * (z.ndim - 1)), t))) / t

    x = t[0] * (z if z.device.type == "mps" else z.double())
    for t_cur, t_next in zip(t, t[1:]):
        d_cur = slope(x, t_cur)
        x_next = x + (t_next - t_cur) * d_cur
        if t_next > 0:  # the second order, which has no slope to look up at t = 0
            x_next = x + (t_next - t_cur) * (d_cur + slope(x_next, t_next)) / 2
        x = x_next
    return x.to(z.dtype)


# ---- Networks ----
class EDMPrecond(nn.Module):
    """EDM's preconditioning (Karras et al. 2022, Table 1) of model(x (B, ...), c_noise (B,) or (1,)).

    net(x, t), t a number, (B,) or (B, 1, ..., 1) -> denoised x. net(z, t_star) is the generator, (B.4)."""
    def __init__(self, model, sigma_data=0.5):
        super().__init__()
        self.model, self.sigma_data = model, sigma_data

    def forward(self, x, t):
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.ndim - 1))
        var = t**2 + self.sigma_data**2
        c_skip, c_out, c_in = self.sigma_data**2 / var, t * self.sigma_data / var.sqrt(), 1 / var.sqrt()
        return c_skip * x + c_out * self.model(c_in * x, t.flatten().log() / 4)


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


# ---- Training ----
def train_only(net, frozen):
    """For a phase of Algorithm 2: net learns, in train mode; frozen gets no weight gradients, in eval mode.
    Its output is still differentiated with respect to its input, as (B.13) needs."""
    net.train().requires_grad_(True)
    frozen.eval().requires_grad_(False)


def ema_beta(images, batch, half_life=5e5, ramp_up=0.05):
    """The EMA's decay for a batch that follows `images` images: half_life counts images, fewer at the start.
    The form is EDM's; 5e5 and 0.05 are SiD's code's, the paper is silent."""
    return 0.5**(batch / max(min(half_life, ramp_up * images), 1e-8))


@torch.no_grad()
def ema_update(ema, net, beta):
    """ema <- beta ema + (1 - beta) net, for every parameter; buffers are constants here."""
    for a, b in zip(ema.parameters(), net.parameters()):
        a.lerp_(b, 1 - beta)


def pick_device(name="auto"):
    """"auto" is cuda, else mps, else cpu. UserError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"no device {name!r} here ({first_line(error)}): try --device cpu") from None


# ---- Errors and the command line ----
class UserError(Exception):
    """What the user can mend, in one line: what was wrong, what was expected, what to do."""


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def one_line_errors(main):
    """Decorates a script's main(argv=None): a user's mistake is one line on stderr and exit status 2."""
    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            return main(argv)
        except (UserError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("stopped: the same command goes on from the last checkpoint", file=sys.stderr)
            sys.exit(130)
    return wrapped


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the module docstring as it is."""


class Parser(argparse.ArgumentParser):
    """argparse with whole option names only, and errors of one line."""
    def __init__(self, doc):
        super().__init__(description=doc, allow_abbrev=False, formatter_class=Formatter)

    def error(self, message):
        self.exit(2, f"error: {message} (--help lists the options)\n")


def number(kind, zero=False):
    """An argparse type: a finite int or float above zero, or zero too."""
    def parse(text):
        try:
            value = kind(text)
            require(0 < value < math.inf or (zero and value == 0), "out of range")
            return value
        except ValueError:
            what = f"{kind.__name__} {'>=' if zero else '>'} 0"
            raise argparse.ArgumentTypeError(f"expected a finite {what}, got {text!r}") from None
    return parse


def add_method_arguments(parser):
    """--method, --distance and their parameters: the same in every stage."""
    group = parser.add_argument_group("method")
    group.add_argument("--method", choices=("sim", "sid", "di"), default="sim", help="or a neighbour")
    group.add_argument("--distance", choices=DISTANCES, default="phuber", help="d of (3.3), Table 4")
    for flag, kind, meaning in (
            ("--c", float, "phuber's c (0.001)"), ("--alpha", int, "power's (4) or exp's (2) exponent, even"),
            ("--beta", float, "exp's factor (0.1)"), ("--delta", float, "huber's kink (1)"),
            ("--scale", float, "smoothl1's rounding (0.5)")):
        group.add_argument(flag, type=number(kind), help=meaning)
    group.add_argument("--sid-alpha", type=float, default=1.0, help="SiD's alpha; its CIFAR-10 runs have 1.2")


def add_run_arguments(parser, **defaults):
    """What a run needs besides its science: the same in every stage, but for the defaults."""
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=number(int), help="updates of the generator")
    group.add_argument("--batch", type=number(int), help="samples in an update")
    group.add_argument("--lr", type=number(float), help="of both Adams")
    group.add_argument("--t-star", type=number(float), default=2.5, help="t* of (B.4), Table 5")
    group.add_argument("--p-mean", type=float, help="mean of g's log t; (B.10): -3.5")
    group.add_argument("--p-std", type=number(float), help="standard deviation of g's log t; (B.10): 2.5")
    group.add_argument("--psi-updates", type=number(int), default=1, help="per update of g; Listing 1 has 2")
    group.add_argument("--ema-half-life", type=number(float), help="of the generator's average, in samples")
    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=number(int, zero=True), default=0, help="of everything random")
    group.add_argument("--device", default="auto", help="auto (the best one here), cpu, cuda, mps")
    group.add_argument("--out", metavar="DIR", help="the run's folder; named after the run unless given")
    group.add_argument("--fresh", action="store_true", help="start anew: an older run in DIR is moved aside")
    group.add_argument("--save-every", type=number(int), help="steps between checkpoints")
    group.add_argument("--sample", metavar="CKPT", help="only draw from a run: its folder, or its g_ema.pt")
    group.add_argument("--n", type=number(int), help="how many samples --sample draws")
    parser.set_defaults(**defaults)


def make_distance(args):
    """The Distance that the flags describe. UserError for a parameter that it does not take or cannot use."""
    flags = {name: getattr(args, name) for name in ("c", "alpha", "beta", "delta", "scale")}
    given = {name: value for name, value in flags.items() if value is not None}
    takes = inspect.signature(DISTANCES[args.distance]).parameters
    if extra := [f"--{name}" for name in given if name not in takes]:
        raise UserError(f"--distance {args.distance} does not take {', '.join(extra)}")
    try:
        return DISTANCES[args.distance](**given)
    except ValueError as error:
        raise UserError(f"--distance {args.distance}: {error}") from None


def make_generator_loss(args, distance):
    """--method as a callable (d_psi, d_q, x_0, t, eps=None) -> (loss (B,), y_t detached)."""
    return {"sim": functools.partial(sim_loss, distance=distance),
            "sid": functools.partial(sid_loss, alpha=args.sid_alpha), "di": di_loss}[args.method]


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
    with atomic(path) as temporary:
        if temporary.suffix == ".json":
            return temporary.write_text(json.dumps(value, indent=1) + "\n")
        try:
            torch.save(value, temporary)
        except RuntimeError as error:  # torch's way to say that the disk is full
            raise UserError(f"could not write {path} ({first_line(error)}): is the disk full?") from None


def load(path, keys):
    """The dict that save() wrote, on the CPU. UserError if it is missing, damaged or lacks a key."""
    expected = f"expected a file of this project with {', '.join(keys)}"
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {expected}") from None
    except (RuntimeError, EOFError, pickle.UnpicklingError, LookupError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is cut short, damaged or of another format: {expected}") from error
    if not isinstance(value, dict) or any(key not in value for key in keys):
        raise UserError(f"{path} holds something else: {expected}")
    return value


def save_state(path, **parts):
    """Everything to resume from: the state_dict() of each part, and the state of every random generator."""
    rng = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state_all()
    save({"rng": rng, **{name: part.state_dict() for name, part in parts.items()}}, path)


def load_state(path, **parts):
    """Give the same parts back what save_state() stored. UserError if they do not fit."""
    state = load(path, ("rng", *parts))
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["rng"]["cpu"])
        if torch.cuda.is_available() and "cuda" in state["rng"]:
            torch.cuda.set_rng_state_all(state["rng"]["cuda"])
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not of this run ({first_line(error)}): start anew with --fresh") from None


def load_generator(path, build):
    """A run's folder, or its g_ema.pt {net_args, state_dict, t_star, meta} -> (g in eval mode, t_star, meta).
    build(**net_args) makes the network. UserError if the file is not one of build's."""
    path = Path(path) / "g_ema.pt" if Path(path).is_dir() else Path(path)
    saved = load(path, ("net_args", "state_dict", "t_star", "meta"))
    try:
        g = build(**saved["net_args"])
        g.load_state_dict(saved["state_dict"])
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no generator of this stage ({first_line(error)})") from None
    return g.eval().requires_grad_(False), saved["t_star"], saved["meta"]


# ---- A run's folder and its log ----
def open_run(args, ignore):
    """Make or continue the folder args.out; args.json keeps the arguments, but for those to ignore. -> Path

    UserError, with nothing touched, if the folder holds another run (it names what differs) or no run."""
    folder, known = Path(args.out), Path(args.out) / "args.json"
    now = {name: value for name, value in vars(args).items() if name not in ignore}
    if folder.exists() and not known.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"--out {folder} exists and is no run's folder: name another")
    if args.fresh and known.exists():
        names = (folder.with_name(f"{folder.name}.old-{i}") for i in range(1, 10**6))
        print(f"moved the older run to {folder.rename(next(name for name in names if not name.exists()))}")
    if known.exists():
        try:
            then = dict(json.loads(known.read_text()))
        except (ValueError, TypeError):
            raise UserError(f"{known} is damaged: name another --out, or start anew with --fresh") from None
        differs = [f"{name} is {then.get(name)} there and {now.get(name)} here"
                   for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name)]
        if differs:
            raise UserError(f"{folder} holds another run ({'; '.join(differs)}): "
                            "name another --out, or start anew with --fresh")
    folder.mkdir(parents=True, exist_ok=True)
    save(now, known)
    return folder


class Log:
    """Means over the steps between two lines, to log.jsonl and to the screen (a bar on a terminal, else plain
    lines). Its state is part of the checkpoint, so that the log of a resumed run has no seam."""
    def __init__(self, path, steps):
        self.path, self.steps, self.step, self.saved = Path(path), steps, 0, 0
        self.sums, self.counts, self.seconds, self.begun = {}, {}, 0.0, time.time()
        self.bar = tqdm(total=steps, disable=None)  # None: silent unless stderr is a terminal

    def elapsed(self):
        """Seconds of this run, those before an interruption included."""
        return self.seconds + time.time() - self.begun

    def read(self):
        """log.jsonl as a list of dicts, without a last line cut short by a kill."""
        lines = self.path.read_text().split("\n")[:-1] if self.path.exists() else []
        return [json.loads(line) for line in lines]

    def state_dict(self):
        self.saved = self.step
        return {"step": self.step, "sums": self.sums, "counts": self.counts, "seconds": self.elapsed()}

    def load_state_dict(self, state):
        """Go on after the state's step; lines that a killed run wrote past it are dropped."""
        self.step, self.sums, self.counts = state["step"], dict(state["sums"]), dict(state["counts"])
        self.saved = self.bar.initial = self.bar.n = self.step
        self.seconds, self.begun = state["seconds"], time.time()
        lines = [json.dumps(line) + "\n" for line in self.read() if line["step"] <= self.step]
        with atomic(self.path) as temporary:
            temporary.write_text("".join(lines))

    def add(self, **values):
        """Count tensors in, by their mean. UserError, before any weight is touched by it, if not finite."""
        for name, value in values.items():
            mean = value.detach().float().mean().item()
            if not math.isfinite(mean):
                raise UserError(f"step {self.step + 1}: {name} is {mean}; the last good checkpoint is step "
                                f"{self.saved} in {self.path.parent}. Try --fresh with a smaller --lr")
            self.sums[name] = self.sums.get(name, 0.0) + mean
            self.counts[name] = self.counts.get(name, 0) + 1

    def write(self, **values):
        """A line: the means since the last one, and values as they are."""
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        line = {"step": self.step, **means, **values, "seconds": round(self.elapsed(), 2)}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        text = "  ".join(f"{name} {value:.4g}" for name, value in (means | values).items())
        self.bar.set_postfix_str(text, refresh=False)
        if self.bar.disable:
            now = self.elapsed()
            eta = now / max(self.step, 1) * (self.steps - self.step)
            print(f"step {self.step}/{self.steps}  {text}  {now:.0f} s, {eta:.0f} s to go", flush=True)

    def advance(self):
        """The step is done."""
        self.step += 1
        self.bar.update()
        if self.step == self.steps:
            self.bar.close()


# ---- Pictures ----
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
