"""Stage 1: Score Implicit Matching where everything can be checked: points in the plane, exact scores.

    python 01_toy_2d.py                                         both parts, about a minute on two cores
    python 01_toy_2d.py --mixture spiral --out runs/spiral
    python 01_toy_2d.py --sample runs/toy_2d-sim-phuber-0 --n 5000

A. Theorem 3.1 to machine precision: both sides of (3.6) by quadrature, as gradients of a small network's weights.
   Expect errors of 1e-11 and less, but for huber (1e-4: a kink) and l1 (0.3: a jump), and 0.2 to 1.3 for what is wrong.
B. Algorithm 2: a diffusion model of a Gaussian mixture, 35 evaluations a sample, becomes a generator that takes one.
   Expect 99 % of the samples on the modes, each with its share, and the pictures in runs/toy_2d-sim-phuber-0.
"""
import copy
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from tqdm import tqdm

from common import (DISTANCES, MLP, Distance, EDMPrecond, Log, Parser, add_method_arguments, add_run_arguments, atomic,
                    batch_sum, diffuse, dsm_loss, edm_sampler, ema_beta, ema_update, image_grid, lambda_edm,
                    load_generator, load_state, make_distance, make_generator_loss, number, one_line_errors, open_run,
                    p_edm, pick_device, plot_log, save, save_picture, save_state, sim_loss, train_only)


# ---- Gaussian mixtures: the teacher, and with std = 0 the student of the theorem ----
@dataclass
class Mixture:
    """Equal Gaussians of standard deviation std at means (K, D), diffused to x_t = a x_0 + s eps (VE: a = 1, s = t)."""
    means: torch.Tensor
    std: float

    def denoise(self, x, s, a=1.0):
        """E[x_0 | x_t = x], exactly: a posterior mean of each Gaussian, weighted by its posterior. (B, D) -> (B, D)"""
        var = (a * self.std)**2 + s**2
        logits = (a * x @ self.means.T - a**2 * (self.means**2).sum(1) / 2) / var  # |x|^2 cancels in the softmax
        return (s**2 * logits.softmax(1) @ self.means + a * self.std**2 * x) / var

    def score(self, x, s, a=1.0):
        """grad log p_t(x), from the denoiser: (B.3) for any a. (B, D) -> (B, D)"""
        return (a * self.denoise(x, s, a) - x) / s**2

    def sample(self, n, generator=None):
        """-> (n, D) exact samples of p_0."""
        where = {"device": self.means.device, "generator": generator}
        means = self.means[torch.randint(len(self.means), (n,), **where)]
        return means + self.std * torch.randn(means.shape, **where)


def polar(radius, angle):
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)


def make_mixture(name, device="cpu"):
    half_turn, arm = torch.linspace(0, math.pi, 24), torch.linspace(0.04, 1, 48).sqrt()
    moon = 0.8 * polar(torch.ones(24), half_turn) - torch.tensor([0.4, 0.2])
    means, std = {"ring": (polar(torch.ones(8), torch.arange(8) * math.pi / 4), 0.1),
                  "grid": (torch.cartesian_prod(*[torch.linspace(-1, 1, 4)] * 2), 0.07),
                  "spiral": (polar(1.2 * arm, 3 * math.pi * arm), 0.05),
                  "moons": (torch.cat([moon, -moon]), 0.06)}[name]
    return Mixture(means.to(device), std)


# ---- A. The theorem ----
# With N fixed latents the student's p_t is a mixture of N Gaussians around g(z_i): its score is exact, and both sides
# of (3.6) are means over i and integrals over eps.
PROCESSES = {"VE": lambda t: (1.0, t), "VP": lambda t: ((1 + t**2)**-0.5, t * (1 + t**2)**-0.5)}  # t -> (a, s)
THEOREM = [("l2", {}, 2), ("power", {"alpha": 4}, 2), ("exp", {"alpha": 2, "beta": 0.1}, 2),  # distance, ..., D
           ("smoothl1", {"scale": 0.5}, 2), ("phuber", {"c": 0.5}, 2), ("phuber", {"c": 0.001}, 1),
           ("huber", {"delta": 0.7}, 2), ("l1", {}, 2)]


def sim_loss_score(s_psi, s_q, x_0, a, s, distance, eps):
    """(3.7) as printed, in scores, for x_t = a x_0 + s eps. -> (loss (B,), y_t detached)"""
    x_t = a * x_0 + s * eps
    s_p = s_psi(x_t)
    y_t = s_p - s_q(x_t)
    return -batch_sum(distance.d_prime(y_t) * (s_p + eps / s)), y_t.detach()  # grad log q(x_t | x_0) = -eps / s


def detach_d_prime(d_psi, d_q, x_0, t, distance, eps=None):
    return sim_loss(d_psi, d_q, x_0, t, Distance(distance.d, lambda y: distance.d_prime(y.detach())), eps)


def detach_d_q(d_psi, d_q, x_0, t, distance, eps=None):
    return sim_loss(d_psi, lambda x_t, t: d_q(x_t, t).detach(), x_0, t, distance, eps)


def backpropagate_d(d_psi, d_q, x_0, t, distance, eps=None):
    x_t = diffuse(x_0, t, eps)
    y_t = d_psi(x_t, t) - d_q(x_t, t)
    return distance.d(y_t), y_t.detach()


WRONG = {"d' detached": detach_d_prime, "d_q detached": detach_d_q, "d(y) back-propagated": backpropagate_d}


def small_generator(dim):
    """-> g, a tanh network; its 4 latents; a teacher (D = dim). Nothing about them is special. All in float64."""
    random = partial(torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = random(4, 2)
    g = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, dim)).double()
    for weights in g.parameters():
        weights.data = 0.5 * random(weights.shape)
    means = torch.tensor([[1.0, 1.0], [-1.0, 0.7], [0.3, -1.2], [-0.8, -0.6]], dtype=torch.float64)
    return g, z, Mixture(means[:, :dim], 0.4)


def trapezoid(dim, nodes, reach=8.5):
    """-> eps (M, dim), weights (M,) of the mean over N(0, I): the error falls exponentially if all is smooth."""
    eps = torch.cartesian_prod(*[torch.linspace(-reach, reach, nodes, dtype=torch.float64)] * dim).reshape(-1, dim)
    return eps, torch.softmax(-(eps**2).sum(1) / 2, dim=0)


def theorem_error(t, process, space, distance, dim, nodes, loss=sim_loss):
    """|left - right| / |left| of (3.6), both as gradients with respect to all weights of g."""
    (g, z, teacher), (a, s), (eps, weights) = small_generator(dim), PROCESSES[process](t), trapezoid(dim, nodes)
    x = g(z)
    atoms = x.detach().requires_grad_()
    p, p_sg, q = [partial(mixture.denoise if space == "denoiser" else mixture.score, s=s, a=a)
                  for mixture in (Mixture(atoms, 0.0), Mixture(x.detach(), 0.0), teacher)]
    sides = torch.zeros(2, *x.shape, dtype=x.dtype)  # gradients with respect to the atoms: left, right
    for x_0 in atoms:
        x_t = (a * x_0 + s * eps).detach()  # pi_t = p_sg[theta]: on the left only the score depends on theta
        sides[0] += torch.autograd.grad(weights @ distance.d(p(x_t) - q(x_t)), atoms)[0]  # (3.5)
        x_0 = x_0.expand_as(eps)
        value, _ = (sim_loss_score(p_sg, q, x_0, a, s, distance, eps) if space == "score" else
                    loss(lambda x, t: p_sg(x), lambda x, t: q(x), x_0, t, distance, eps))
        sides[1] += torch.autograd.grad(weights @ value, atoms)[0]
    left, right = [torch.cat([w.flatten() for w in torch.autograd.grad(x, g.parameters(), side, retain_graph=True)])
                   for side in sides]
    return ((left - right).norm() / left.norm()).item()


def theorem(thorough=False):
    """(3.6) for every distance, process and time, and what is wrong beside it. -> the rows of theorem.json"""
    forms = (("VE", "denoiser"), ("VE", "score"), ("VP", "score"))
    cases = [(*case, *form, "theorem", sim_loss) for case in THEOREM for form in forms]
    cases += [(*case, *forms[0], *wrong) for case in (THEOREM[0], THEOREM[4]) for wrong in WRONG.items()]
    times, nodes = ((0.3, 0.5, 1.0, 2.5, 5.0), (0, 800_001, 601)) if thorough else ((0.5, 1.0, 2.5), (0, 80_001, 273))
    print("Theorem 3.1: |left - right| / |left| of (3.6)".ljust(67) + "".join(f"t = {t:<7}" for t in times))
    rows = []
    for name, params, dim, process, space, variant, loss in cases:
        for t in times:
            a, s = PROCESSES[process](t)
            unit = a / s**2 if space == "score" else 1.0  # y_score = (a / s^2) y_denoiser: so a scale in y's unit
            scaled = {key: value * unit if key in ("c", "scale", "delta") else value for key, value in params.items()}
            error = theorem_error(t, process, space, DISTANCES[name](**scaled), dim, nodes[dim], loss)
            rows.append({"process": process, "space": space, "distance": name, "params": scaled, "t": t, "dim": dim,
                         "variant": variant, "relative_error": error})
        text = f"{process} {space:9} {dim}-D  {name} {' '.join(f'{k}={v}' for k, v in params.items())}"
        errors = [f"{row['relative_error']:<11.1e}" for row in rows[-len(times):]]
        print(text.ljust(45), variant.ljust(21), *errors, sep="", flush=True)
    print("l1: (3.6) needs the jump of sign(y) where a y_i = 0, and autograd's derivative of sign is 0 there too.")
    return rows


# ---- B. Distillation ----
NET_ARGS = {"dim": 2, "width": 64, "depth": 4, "waves": 16}  # 15 k weights: as good here as 4 times as many


def make_denoiser(**net_args):
    return EDMPrecond(MLP(**net_args))


def pretrain(mixture, args):
    """A denoiser of the mixture by dsm_loss: g and d_psi start as copies of it, and d_q with --teacher learned."""
    net = make_denoiser(**NET_ARGS).to(mixture.means.device)
    optimiser = torch.optim.Adam(net.parameters())
    for step in tqdm(range(args.pretrain_steps), "pretraining", disable=None):
        optimiser.param_groups[0]["lr"] = 2e-3 * (1 - step / args.pretrain_steps)
        x_0 = mixture.sample(args.batch)
        loss = dsm_loss(net, x_0, p_edm((args.batch, 1), device=x_0.device)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return net


def distil(args, folder, device):
    """Algorithm 2, from the start or from ckpt.pt on. -> g_ema, d_q, log"""
    mixture, distance = make_mixture(args.mixture, device), make_distance(args)
    generator_loss = make_generator_loss(args, distance)
    torch.manual_seed(args.seed)
    resume = (folder / "ckpt.pt").exists()
    net = make_denoiser(**NET_ARGS).to(device) if resume else pretrain(mixture, args)
    g, d_psi, g_ema, d_q = [copy.deepcopy(net) for _ in range(4)]
    opt_psi, opt_theta = [torch.optim.Adam(net.parameters(), betas=(0.0, 0.999)) for net in (d_psi, g)]  # Table 5
    log = Log(folder / "log.jsonl", args.steps)
    parts = dict(d_psi=d_psi, g=g, g_ema=g_ema, d_q=d_q, opt_psi=opt_psi, opt_theta=opt_theta, log=log)
    if resume:
        load_state(folder / "ckpt.pt", **parts)
    d_q = mixture.denoise if args.teacher == "exact" else d_q.eval().requires_grad_(False)
    p_psi, weight_psi, p_theta = p_edm, lambda_edm, partial(p_edm, mean=args.p_mean, std=args.p_std)
    accumulate = 1  # micro-batches of an update

    def draw(p):  # (z, t, eps, cond) of each micro-batch; points have no condition
        normal = partial(torch.randn, args.batch, 2, device=device)
        yield args.t_star * normal(), p((args.batch, 1), device=device), normal(), None

    def generate(g, z, cond):
        return g(z, args.t_star)  # (B.4)

    def given(denoiser, cond):  # closes over the condition: -> (x_t, t) -> denoised
        return denoiser

    if not resume:
        report(log, g_ema, mixture, args, folder, parts)
    while log.step < args.steps:
        for optimiser in (opt_psi, opt_theta):
            optimiser.param_groups[0]["lr"] = args.lr * (1 - log.step / args.steps)
        # ---- Algorithm 2: begin ----
        for _ in range(args.psi_updates):
            train_only(d_psi, frozen=g)
            opt_psi.zero_grad()
            for z, t, eps, cond in draw(p_psi):
                with torch.no_grad():
                    x_0 = generate(g, z, cond)
                loss_psi = dsm_loss(given(d_psi, cond), x_0, t, eps, weight_psi)  # (B.2)
                log.add(loss_psi=loss_psi)
                (loss_psi.mean() / accumulate).backward()  # DistributedDataParallel averages over ranks here
            opt_psi.step()

        train_only(g, frozen=d_psi)
        opt_theta.zero_grad()
        for z, t, eps, cond in draw(p_theta):
            x_0 = generate(g, z, cond)
            loss_theta, y_t = generator_loss(given(d_psi, cond), given(d_q, cond), x_0, t, eps=eps)  # (B.13)
            log.add(loss_theta=loss_theta, divergence=distance.d(y_t), y_norm=batch_sum(y_t**2).sqrt())  # (3.3)
            (loss_theta.mean() / accumulate).backward()
        opt_theta.step()
        ema_update(g_ema, g, ema_beta(log.step * args.batch, args.batch, args.ema_half_life))
        # ---- Algorithm 2: end ----
        log.advance()
        report(log, g_ema, mixture, args, folder, parts)
    return g_ema, d_q, log


@torch.no_grad()
def report(log, g, mixture, args, folder, parts):
    """After a step: a log line and a picture where due (often at first, while the samples move), a checkpoint."""
    if log.step in {round(args.steps * (i / 60)**2) for i in range(61)}:
        random = torch.Generator(mixture.means.device).manual_seed(0)  # the same latents and data each time
        z = torch.randn(2000, 2, device=mixture.means.device, generator=random)
        x, data = g(args.t_star * z, args.t_star), mixture.sample(2000, random)
        log.write(sw2=sliced_w2(projections(x), projections(data)))
        (folder / "samples").mkdir(exist_ok=True)
        save_picture(image_grid(panel(mixture, x, f"step {log.step}")[None]), folder / f"samples/{log.step:06}.png")
    if log.step % args.save_every == 0 or log.step == args.steps:
        save_state(folder / "ckpt.pt", **parts)
        meta = {key: getattr(args, key) for key in ("mixture", "method", "distance", "seed")} | {"step": log.step}
        save({"net_args": NET_ARGS, "state_dict": g.state_dict(), "t_star": args.t_star, "meta": meta}, folder / "g_ema.pt")


# ---- Measures and pictures ----
def mode_shares(x, mixture):
    """-> the share of x (N, 2) within 4 standard deviations of a mode; the shares nearest to each mode, a list."""
    distance, nearest = torch.cdist(x, mixture.means).min(1)
    shares = torch.bincount(nearest, minlength=len(mixture.means)) / len(x)
    return (distance < 4 * mixture.std).float().mean().item(), shares.tolist()


def projections(x, directions=200):
    """x (N, 2) projected on directions all around, (N, directions), each projection sorted."""
    angle = math.pi * torch.arange(directions, device=x.device) / directions
    return (x @ polar(torch.ones_like(angle), angle).T).sort(dim=0)[0]


def sliced_w2(a, b):
    """The sliced Wasserstein-2 distance of two sets, from their projections."""
    return (a - b).square().mean().sqrt().item()


@torch.no_grad()
def evaluate(g, d_q, mixture, args, log, n=10_000, sets=8):
    """One step and the teacher beside exact samples; each sw2 is a mean over pairs of sets. -> metrics, one set each"""
    random = torch.Generator(mixture.means.device).manual_seed(1)
    normal = partial(torch.randn, n, 2, device=mixture.means.device, generator=random)
    draw = {"data": lambda: mixture.sample(n, random), "teacher": lambda: edm_sampler(d_q, normal()),
            "one_step": lambda: g(args.t_star * normal(), args.t_star)}
    points = {name: [draw_one() for _ in range(sets)] for name, draw_one in draw.items()}
    sorted_points = {name: [projections(x) for x in many] for name, many in points.items()}
    sw2 = {name: np.mean([sliced_w2(a, b) for i, a in enumerate(many) for j, b in enumerate(sorted_points["data"])
                          if i < j or name != "data"]).item() for name, many in sorted_points.items()}
    metrics = {key: getattr(args, key) for key in ("method", "distance", "mixture", "seed", "steps")}
    metrics |= {"seconds": round(log.elapsed(), 1), "sw2": sw2["one_step"], "sw2_exact": sw2["data"]}
    for name, prefix in (("one_step", ""), ("teacher", "teacher_")):
        on_modes, shares = mode_shares(torch.cat(points[name]), mixture)
        metrics |= {prefix + "share_on_modes": on_modes, prefix + "mode_shares": shares}
    return metrics | {"sw2_teacher": sw2["teacher"]}, {name: many[0] for name, many in points.items()}


def panel(mixture, x, title):
    """Up to 4000 of the samples x (N, 2) over the mixture's density, as uint8 (3, H, W)."""
    reach, points = mixture.means.abs().max().item() + 6 * mixture.std, x[:4000].cpu()
    axis = torch.linspace(-reach, reach, 160)
    plane = torch.cartesian_prod(axis, axis)
    density = torch.exp(-torch.cdist(plane, mixture.means.cpu())**2 / (2 * mixture.std**2)).sum(1).reshape(160, 160)
    figure = Figure(figsize=(3.6, 3.9), dpi=100)
    axes = figure.add_axes((0.02, 0.02, 0.96, 0.89))
    axes.imshow(density.T, extent=(-reach, reach) * 2, origin="lower", cmap="Blues", vmax=1.5 * density.max().item())
    axes.scatter(*points.T, s=3, c="#d1495b", alpha=0.4, linewidths=0)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), xticks=[], yticks=[])
    axes.set_title(title, fontsize=11)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return torch.from_numpy(np.array(canvas.buffer_rgba())[..., :3]).permute(2, 0, 1)


def draw_pictures(folder, mixture, points, lines, metrics):
    """samples.png, animation.gif from the pictures of samples/, divergence.png from the lines of log.jsonl."""
    titles = {"data": "data", "teacher": "teacher, 35 evaluations", "one_step": "one step"}
    panels = torch.stack([panel(mixture, points[name], title) for name, title in titles.items()])
    save_picture(image_grid(panels, columns=3), folder / "samples.png")
    frames = [Image.open(path) for path in sorted((folder / "samples").glob("[0-9]*.png"))]
    save_picture(frames[0], folder / "animation.gif", frames[1:])
    plot_log(folder / "divergence.png", lines, {"divergence": "E d(y), the estimate of (3.3)",
                                                "sw2": "sliced Wasserstein-2 of 2,000 samples"})


@torch.no_grad()
def sample(args):
    """--sample: n points of a trained generator as an array and a picture, beside the checkpoint or in --out."""
    g, t_star, meta = load_generator(args.sample, make_denoiser)
    mixture = make_mixture(meta["mixture"])
    x = g(t_star * torch.randn(args.n, 2, generator=torch.Generator().manual_seed(args.seed)), t_star)
    place = Path(args.sample)
    folder = Path(args.out or (place if place.is_dir() else place.parent))
    folder.mkdir(parents=True, exist_ok=True)
    name = folder / f"drawn-{args.n}-seed-{args.seed}"
    with atomic(f"{name}.npy") as temporary:
        np.save(temporary, x.numpy())
    save_picture(image_grid(panel(mixture, x, f"{args.n} samples, one step each")[None]), f"{name}.png")
    print(f"{mode_shares(x, mixture)[0]:.1%} of {args.n} samples lie on a mode: {name}.npy, {name}.png")


# ---- The command line ----
def parse(argv):
    parser = Parser(__doc__)
    parser.add_argument("--part", choices=("both", "theorem", "distil"), default="both", help="A, B or both")
    parser.add_argument("--thorough", action="store_true", help="A at more times, on finer grids: minutes")
    parser.add_argument("--mixture", choices=("ring", "grid", "spiral", "moons"), default="ring", help="the data")
    parser.add_argument("--teacher", choices=("exact", "learned"), default="exact", help="d_q: closed form, or an MLP")
    add_method_arguments(parser)
    group = parser.add_argument_group("training (defaults measured on the ring)")
    for flag, kind, default, meaning in (
            ("--steps", number(int), 4000, "updates of the generator"),
            ("--batch", number(int), 1024, "samples of an update"),
            ("--lr", number(float), 2e-3, "of both Adams, annealed linearly to zero"),
            ("--t-star", number(float), 2.5, "t* of (B.4), from Table 5"),
            ("--p-mean", float, -1.5, "mean of the generator's log t; (B.10): -3.5, small for points"),
            ("--p-std", number(float), 1.5, "its standard deviation; (B.10): 2.5"),
            ("--psi-updates", number(int), 1, "of d_psi for each of g; Algorithm 2: 1, Listing 1: 2"),
            ("--ema-half-life", number(float), 7e4, "of the generator's moving average, in samples"),
            ("--pretrain-steps", number(int), 3000, "updates of the denoiser that all start from")):
        group.add_argument(flag, type=kind, default=default, help=meaning)
    add_run_arguments(parser)
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    args = parse(argv)
    torch.set_num_threads(min(2, torch.get_num_threads()))  # more threads only slow networks this small down
    if args.sample:
        return sample(args)
    device, _ = pick_device(args.device), make_distance(args)  # mistakes end the run before it writes anything
    args.out = args.out or f"runs/toy_2d-{args.method}-{args.distance}-{args.seed}"
    folder = open_run(args, ignore=("out", "fresh", "device", "part", "sample", "n"))
    if args.part != "distil" and not (folder / "theorem.json").exists():
        save(theorem(args.thorough), folder / "theorem.json")
    if args.part == "theorem":
        return
    g, d_q, log = distil(args, folder, device)
    mixture = make_mixture(args.mixture, device)
    m, points = evaluate(g, d_q, mixture, args, log)
    draw_pictures(folder, mixture, points, log.read(), m)
    save(m, folder / "metrics.json")
    print(f"{m['seconds']:.0f} s. 10,000 samples:  on modes  share of each mode  sliced W2 (exact: {m['sw2_exact']:.4f})")
    for name, prefix, sw2 in (("one step", "", m["sw2"]), ("teacher, 35 evaluations", "teacher_", m["sw2_teacher"])):
        shares = m[prefix + "mode_shares"]
        print(f"{name:24} {m[prefix + 'share_on_modes']:8.1%}  {min(shares):.1%} to {max(shares):.1%}     {sw2:.4f}")
    print(f"see {folder}/samples.png, animation.gif, divergence.png; "
          f"next: python 01_toy_2d.py --sample {folder} --n 5000")


if __name__ == "__main__":
    main()
