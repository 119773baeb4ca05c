"""What every stage shares: the paper (first half), then what a training run needs.

Notation is the paper's (arXiv 2410.16794v1, equation numbers in brackets): g the one-step generator, d_psi the online
denoiser that follows it, d_q the frozen teacher, x_t = x_0 + t * eps. `d` alone is the distance between two scores.

Shapes: data x is (B, ...) of any rank; a time t is (B, 1, ..., 1), so that it broadcasts against x; a loss is (B,).
A denoiser is any callable (x_t, t) -> denoised, of x_t's shape, with its conditions (class, prompt) closed over.
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
from PIL import Image
from torch import nn
from tqdm import tqdm


# ---- Distances between scores: Table 4, with the derivatives that are right (README, "Where the paper ...") ----
@dataclass(frozen=True)
class Distance:
    """A proper distance of (3.3) and its gradient. y (B, ...) -> d(y) (B,) and d_prime(y) (B, ...)."""
    d: Callable
    d_prime: Callable


def batch_sum(v):
    """Sum over all dimensions but the first: (B, ...) -> (B,). Sum and not mean, as in Listing 1."""
    return v.reshape(len(v), -1).sum(1)


def expand_as(s, y):
    """One number per sample, (B,) -> (B, 1, ..., 1), to broadcast against y (B, ...)."""
    return s.reshape(-1, *[1] * (y.ndim - 1))


def require_positive(**values):
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive number, got {value}")


def require_even(alpha):
    if not (alpha >= 2 and alpha % 2 == 0):
        raise ValueError(f"alpha must be an even integer, 2 or more (section 3.3), got {alpha}")


def l2():
    """|y|^2, squared as in Table 4. With it SIM is SiD at alpha = 1, up to SiD's weight."""
    return Distance(lambda y: batch_sum(y**2), lambda y: 2 * y)


def power(alpha=4):
    """|y|_alpha^alpha. ValueError unless alpha is even and at least 2."""
    require_even(alpha)
    return Distance(lambda y: batch_sum(y**alpha), lambda y: alpha * y**(alpha - 1))


def exp(alpha=2, beta=0.1):
    """exp(beta |y|_alpha^alpha) - 1. ValueError unless alpha is even, at least 2, and beta > 0."""
    require_even(alpha)
    require_positive(beta=beta)
    return Distance(lambda y: torch.expm1(beta * batch_sum(y**alpha)),
                    lambda y: alpha * beta * expand_as(torch.exp(beta * batch_sum(y**alpha)), y) * y**(alpha - 1))


def l1():
    """|y|_1. The one row of Table 4 that autograd gets wrong: sign(y) jumps at 0, and its derivative says 0."""
    return Distance(lambda y: batch_sum(y.abs()), torch.sign)


def smoothl1(scale=0.5):
    """sum_i sqrt(y_i^2 + scale^2) - scale: l1 without the jump, so exact again. ValueError unless scale > 0."""
    require_positive(scale=scale)
    root = lambda y: (y**2 + scale**2).sqrt()
    return Distance(lambda y: batch_sum(y**2 / (root(y) + scale)), lambda y: y / root(y))


def huber(delta=1.0):
    """sum_i y_i^2 / 2 where |y_i| <= delta, else delta (|y_i| - delta / 2): A.3. ValueError unless delta > 0."""
    require_positive(delta=delta)
    return Distance(lambda y: batch_sum(torch.where(y.abs() <= delta, y**2 / 2, delta * (y.abs() - delta / 2))),
                    lambda y: y.clamp(-delta, delta))


def phuber(c=0.001):
    """Pseudo-Huber, sqrt(|y|^2 + c^2) - c, of the norm over the whole sample (3.8). ValueError unless c > 0.

    c = 0.001 is the authors' answer in issue 5 of maple-research-lab/SIM; the paper does not give it.
    d is written |y|^2 / (sqrt(|y|^2 + c^2) + c): the same number, without cancellation near y = 0.
    """
    require_positive(c=c)
    root = lambda y: (batch_sum(y**2) + c**2).sqrt()
    return Distance(lambda y: batch_sum(y**2) / (root(y) + c), lambda y: y / expand_as(root(y), y))


DISTANCES = {f.__name__: f for f in (l2, power, exp, l1, smoothl1, huber, phuber)}


# ---- Times and weight: B.2 and B.3. `shape` is an int or a tuple; `where` is device= and generator= ----
def p_edm(shape, mean=-1.2, std=1.2, t_min=0.0, t_max=math.inf, truncate="clamp", **where):
    """Log-normal times t = exp(N(mean, std^2)), (B.5)-(B.6), truncated to [t_min, t_max]: truncate="clamp" moves
    what falls outside to the ends, "resample" draws it again (B.3 of the paper does not say which)."""
    if not 0 <= t_min < t_max or truncate not in ("clamp", "resample"):
        raise ValueError(f"expected 0 <= t_min < t_max and clamp or resample, got {t_min}, {t_max}, {truncate}")
    t = torch.exp(mean + std * torch.randn(shape, **where))
    while truncate == "resample" and (outside := (t < t_min) | (t > t_max)).any():
        t[outside] = torch.exp(mean + std * torch.randn(int(outside.sum()), **where))
    return t.clamp(t_min, t_max)


def p_sim(shape, mean=-3.5, std=2.5, **options):
    """The generator's times, (B.9)-(B.10). A third of them lie below t = 0.01."""
    return p_edm(shape, mean, std, **options)


def p_karras(shape, sigma_min=0.002, sigma_max=80, rho=7, r_max=0.8, **where):
    """SiD's times for the generator: Karras's sampling schedule at r ~ U[0, r_max], in the form of SiD's code,
    t in [0.002, 24.41]; (B.8) prints a misread of it."""
    r = r_max * torch.rand(shape, **where)
    return (sigma_max**(1 / rho) + (1 - r) * (sigma_min**(1 / rho) - sigma_max**(1 / rho)))**rho


def lambda_edm(t, sigma_data=0.5):
    """EDM's weight (t^2 + sigma_data^2) / (t sigma_data)^2, (B.7)."""
    return (t**2 + sigma_data**2) / (t * sigma_data)**2


# ---- Losses. Freezing weights is the caller's (train_only); nothing is detached here unless the method says so ----
def diffuse(x_0, t, eps=None):
    """x_t of the forward process; eps (default: fresh noise) has x_0's shape."""
    return x_0 + t * (torch.randn_like(x_0) if eps is None else eps)  # (B.12)


def dsm_loss(d_psi, x_0, t, eps=None, weight=lambda_edm):
    """Denoising score matching, (B.2): teaches d_psi the denoiser of the distribution x_0 comes from. -> (B,)"""
    return batch_sum(weight(t) * (d_psi(diffuse(x_0, t, eps), t) - x_0)**2)


def sim_loss(d_psi, d_q, x_0, t, distance, eps=None):
    """Score Implicit Matching, (3.7) as (B.13). -> (loss (B,), y_t detached).

    The gradient flows from x_0 through x_t into both networks. The loss itself is about 0 at all times
    (score projection, A.1): watch E d(y_t), the estimate of (3.3)."""
    x_t = diffuse(x_0, t, eps)
    f = d_psi(x_t, t)
    y_t = f - d_q(x_t, t)
    return -batch_sum(distance.d_prime(y_t) * (f - x_0)), y_t.detach()  # (B.13)


def sid_loss(d_psi, d_q, x_0, t, alpha, eps=None):
    """SiD (Zhou et al. 2024, as its code computes it): squared l2, minus alpha of the naive loss |y|^2, over (B.11)
    in denoiser form. -> (loss (B,), y_t detached)."""
    x_t = diffuse(x_0, t, eps)
    f, q = d_psi(x_t, t), d_q(x_t, t)
    y_t = f - q
    w = (batch_sum((x_0 - q).abs()) / x_0[0].numel()).clamp(min=1e-5).detach()  # 1e-5: SiD's code
    return (-batch_sum(y_t * (f - x_0)) + (1 - alpha) * batch_sum(y_t**2)) / w, y_t.detach()


def di_loss(d_psi, d_q, x_0, t, eps=None):
    """Diff-Instruct (Luo et al. 2023): the gradient of the KL divergence, no gradient through either network.
    -> (loss (B,), y_t)."""
    with torch.no_grad():
        x_t = diffuse(x_0, t, eps)
        y_t = d_psi(x_t, t) - d_q(x_t, t)
    return batch_sum(y_t * x_0), y_t


@torch.no_grad()
def edm_sampler(denoise, z, num_steps=18, sigma_min=0.002, sigma_max=80, rho=7):
    """Heun's method, Algorithm 2 of Karras et al. 2022 without churn: 2 num_steps - 1 evaluations of denoise.
    z (B, ...) is standard normal. Runs in float64 where the device has it; denoise sees z's dtype."""
    step = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    t = (sigma_max**(1 / rho) + step * (sigma_min**(1 / rho) - sigma_max**(1 / rho)))**rho  # their (5)
    t = [*t.tolist(), 0.0]

    def slope(x, t):  # dx/dt of the probability flow ODE
        return (x - denoise(x.to(z.dtype), z.new_full((len(z), *[1] * (z.ndim - 1)), t))) / t

    x = t[0] * (z if z.device.type == "mps" else z.double())  # MPS has no float64
    for t_cur, t_next in zip(t[:-1], t[1:]):
        d_cur = slope(x, t_cur)
        x_next = x + (t_next - t_cur) * d_cur
        if t_next > 0:  # Heun's correction, impossible at t = 0
            x_next = x + (t_next - t_cur) * (d_cur + slope(x_next, t_next)) / 2
        x = x_next
    return x.to(z.dtype)


# ---- Networks ----
class EDMPrecond(nn.Module):
    """EDM's preconditioning (Karras et al. 2022, Table 1) around a network model(x, c_noise (B,)).

    net(x (B, ...), t a number, (B,) or (B, 1, ..., 1)) -> the denoised x. net(z, t_star) is the generator, (B.4)."""
    def __init__(self, model, sigma_data=0.5):
        super().__init__()
        self.model, self.sigma_data = model, sigma_data

    def forward(self, x, t):
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.ndim - 1))
        total = t**2 + self.sigma_data**2
        c_skip, c_out, c_in = self.sigma_data**2 / total, t * self.sigma_data / total.sqrt(), 1 / total.sqrt()
        return c_skip * x + c_out * self.model(c_in * x, t.flatten().log() / 4)


class MLP(nn.Module):
    """x (B, dim), c_noise (B,) or (1,) -> (B, dim): a perceptron on x and `waves` cosines and sines of c_noise."""
    def __init__(self, dim=2, width=128, depth=3, waves=16):
        super().__init__()
        sizes = [dim + 2 * waves] + [width] * depth
        self.layers = nn.Sequential(*[layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.SiLU())],
                                    nn.Linear(width, dim))
        self.register_buffer("frequencies", math.pi * torch.linspace(0.25, 4, waves))

    def forward(self, x, c_noise):
        angles = (c_noise[:, None] * self.frequencies).expand(len(x), -1)  # (B, waves)
        return self.layers(torch.cat([x, angles.cos(), angles.sin()], dim=1))


# ---- Training ----
def train_only(net, frozen):
    """Switch the phases of Algorithm 2: net learns, in train mode; frozen's weights get no gradient, in eval mode.
    What flows through frozen is still differentiated, as (B.13) needs."""
    net.train().requires_grad_(True)
    frozen.eval().requires_grad_(False)


def ema_beta(images, batch, half_life=5e5, ramp_up=0.05):
    """EMA decay for one step of `batch` images after `images` of them: half_life in images, shorter at the start
    (EDM; 5e5 and 0.05 are SiD's, the paper is silent)."""
    return 0.5**(batch / max(min(half_life, ramp_up * images), 1e-8))


@torch.no_grad()
def ema_update(ema, net, beta):
    """ema <- beta ema + (1 - beta) net, parameter by parameter; buffers are copied."""
    for a, b in zip(ema.parameters(), net.parameters()):
        a.lerp_(b, 1 - beta)
    for a, b in zip(ema.buffers(), net.buffers()):
        a.copy_(b)


def pick_device(name="auto"):
    """"auto" takes cuda, then mps, then cpu; a device named and not there is a UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} is not there ({first_line(error)}): try --device cpu") from None


# ---- Errors and the command line ----
class UserError(Exception):
    """Something the user can mend, in one line: what was wrong, what was expected, what to do."""


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line_errors(main):
    """Decorates a script's main(argv=None): user errors end in one line on stderr and exit status 2."""
    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            return main(argv)
        except (UserError, OSError) as error:
            print(f"error: {first_line(error)}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted: the same command continues from the last checkpoint", file=sys.stderr)
            sys.exit(130)
    return wrapped


class Parser(argparse.ArgumentParser):
    """argparse with defaults in the help, whole option names only, and errors of one line."""
    def __init__(self, doc):
        super().__init__(description=doc, allow_abbrev=False, formatter_class=type(
            "Formatter", (argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter), {}))

    def error(self, message):
        self.exit(2, f"error: {message} (--help lists the options)\n")


def number(kind, zero=False):
    """An argparse type: a finite number of this kind (int or float) above zero, or zero too."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (0 < value < math.inf or (zero and value == 0)):
            what = f"{'non-negative' if zero else 'positive'} {'integer' if kind is int else 'number'}"
            raise argparse.ArgumentTypeError(f"expected a {what}, got {text!r}")
        return value
    return parse


def add_method_arguments(parser):
    """--method, --distance and their parameters, the same in every stage."""
    group = parser.add_argument_group("method")
    group.add_argument("--method", choices=("sim", "sid", "di"), default="sim", help="sim_loss or a neighbour")
    group.add_argument("--distance", choices=DISTANCES, default="phuber", help="d(.), Table 4; also what is logged")
    group.add_argument("--c", type=number(float), help="phuber's c; 0.001 unless given")
    group.add_argument("--alpha", type=number(int), help="power's (4 unless given) and exp's (2) exponent, even")
    group.add_argument("--beta", type=number(float), help="exp's factor; 0.1 unless given")
    group.add_argument("--delta", type=number(float), help="huber's kink; 1 unless given")
    group.add_argument("--scale", type=number(float), help="smoothl1's rounding; 0.5 unless given")
    group.add_argument("--sid-alpha", type=float, default=1.0, help="SiD's alpha; its CIFAR runs take 1.2")


def make_distance(args):
    """The Distance of --distance and its parameters; UserError for one that it does not take or cannot use."""
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


# ---- Files: written under a temporary name and renamed; read without executing code ----
@contextmanager
def atomic(path):
    """A temporary name (same folder, same extension) to write to; renamed to path only if the block succeeds."""
    path = Path(path)
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(value, path):
    """A plain dict of tensors, numbers and strings for torch.load(weights_only=True); .json as JSON."""
    with atomic(path) as temporary:
        if temporary.suffix == ".json":
            temporary.write_text(json.dumps(value, indent=1) + "\n")
            return
        try:
            torch.save(value, temporary)
        except RuntimeError as error:  # torch's name for a full disk
            raise UserError(f"could not write {path}: {first_line(error)}") from None


def load(path, keys=()):
    """What save() wrote to a .pt file, on the CPU. UserError if it is missing, damaged or lacks one of the keys."""
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: expected a checkpoint written by this project") from None
    except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is no readable checkpoint: damaged, cut short or of another format "
                        f"({first_line(error)[:80]})") from None
    if not isinstance(value, dict) or (missing := [key for key in keys if key not in value]):
        what = f"lacks {', '.join(missing)}" if isinstance(value, dict) else f"holds a {type(value).__name__}"
        raise UserError(f"{path} {what}: expected a dict with {', '.join(keys)}, written by this project")
    return value


def save_state(path, **parts):
    """Everything to resume from: the state_dict() of each part, and the state of every random generator."""
    rng = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state_all()
    save({"rng": rng, **{name: part.state_dict() for name, part in parts.items()}}, path)


def load_state(path, **parts):
    """Restore what save_state() stored into the same parts. UserError if they do not fit."""
    state = load(path, ("rng", *parts))
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{path} does not fit these networks ({first_line(error)})") from None
    torch.set_rng_state(state["rng"]["cpu"])
    if torch.cuda.is_available() and "cuda" in state["rng"]:
        torch.cuda.set_rng_state_all(state["rng"]["cuda"])


# ---- A run's folder and its log ----
def open_run(args, ignore=("out", "fresh", "device")):
    """Create or continue the folder args.out. UserError if it holds another run (naming the arguments that differ)
    or something else. --fresh moves an older run aside first. -> Path"""
    folder, now = Path(args.out), {k: v for k, v in vars(args).items() if k not in ignore}
    known = folder / "args.json"
    if folder.exists() and not (folder.is_dir() and (known.exists() or not any(folder.iterdir()))):
        raise UserError(f"--out {folder} is in use and is no run's folder: name another one")
    if args.fresh and known.exists():
        aside = next(p for i in range(1, 10**6) if not (p := folder.with_name(f"{folder.name}.old-{i}")).exists())
        folder.rename(aside)
        print(f"moved the older run to {aside}")
    folder.mkdir(parents=True, exist_ok=True)
    if known.exists():
        try:
            then = json.loads(known.read_text())
        except ValueError:
            raise UserError(f"{known} is damaged: name another --out, or start anew with --fresh") from None
        differs = [f"--{k.replace('_', '-')} {then.get(k)} there, {now.get(k)} here"
                   for k in sorted(then.keys() | now.keys()) if then.get(k) != now.get(k)]
        if differs:
            raise UserError(f"{folder} holds a run with other arguments ({'; '.join(differs)}): "
                            "name another --out, or start anew with --fresh")
    save(now, known)
    return folder


class Log:
    """Means over the steps between two lines, to log.jsonl and to the screen: a progress bar with ETA on a terminal,
    plain lines elsewhere. Its sums are part of the checkpoint, so that a resumed log has no seam."""
    def __init__(self, path, steps):
        self.path, self.steps, self.step, self.saved = Path(path), steps, 0, 0
        self.sums, self.counts, self.seconds, self.begun = {}, {}, 0.0, time.time()
        self.bar = tqdm(total=steps, disable=None)  # None: silent unless stderr is a terminal

    def state_dict(self):
        self.saved = self.step
        return {"step": self.step, "sums": self.sums, "counts": self.counts, "seconds": self.elapsed()}

    def load_state_dict(self, state):
        """Go on after the state's step, dropping the lines that a killed run wrote past its checkpoint."""
        self.sums, self.counts, self.seconds = dict(state["sums"]), dict(state["counts"]), state["seconds"]
        self.begun, self.step, self.saved, self.bar.n = time.time(), *[state["step"]] * 3
        lines = [json.dumps(line) + "\n" for line in self.read() if line["step"] <= self.step]
        with atomic(self.path) as temporary:
            temporary.write_text("".join(lines))

    def read(self):
        """The log as a list of dicts; a last line cut short by a kill is dropped."""
        lines = self.path.read_text().split("\n")[:-1] if self.path.exists() else []
        return [json.loads(line) for line in lines]

    def elapsed(self):
        return self.seconds + time.time() - self.begun

    def add(self, **values):
        """Count in tensors of any shape by their mean. UserError, before the weights are touched, if not finite."""
        for name, value in values.items():
            mean = value.detach().float().mean().item()
            if not math.isfinite(mean):
                raise UserError(f"step {self.step + 1}: {name} is {mean}; the last good checkpoint is that of step "
                                f"{self.saved} beside {self.path}: start anew with a smaller --lr (--fresh)")
            self.sums[name] = self.sums.get(name, 0.0) + mean
            self.counts[name] = self.counts.get(name, 0) + 1

    def write(self, **extra):
        """One line: the means since the last one, and `extra` as it is."""
        line = {"step": self.step, **{k: v / self.counts[k] for k, v in self.sums.items()}, **extra,
                "seconds": round(self.elapsed(), 2)}
        self.sums, self.counts = {}, {}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        numbers = "  ".join(f"{k} {v:.4g}" for k, v in line.items() if k not in ("step", "seconds"))
        self.bar.set_postfix_str(numbers, refresh=False)
        if self.bar.disable:
            eta = self.elapsed() / self.step * (self.steps - self.step) if self.step else math.nan
            print(f"step {self.step}/{self.steps}  {numbers}  {self.elapsed():.0f} s, {eta:.0f} s to go", flush=True)

    def advance(self):
        self.step += 1
        self.bar.update()


# ---- Pictures ----
def image_grid(images, columns):
    """uint8 (N, 3, H, W) -> one Pillow image, row by row; the last row is filled up with black."""
    images = torch.cat([images, images.new_zeros(-len(images) % columns, *images.shape[1:])])
    return Image.fromarray(rearrange(images, "(r c) ch h w -> (r h) (c w) ch", c=columns).numpy())


def save_gif(frames, path, milliseconds=100, hold=2000):
    """A looping GIF of Pillow images, its last frame held. """
    times = [milliseconds] * (len(frames) - 1) + [hold]
    with atomic(path) as temporary:
        frames[0].save(temporary, save_all=True, append_images=frames[1:], duration=times, loop=0)
