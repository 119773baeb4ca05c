"""The numbers that people compare: FID, Inception Score, KID, precision and recall; and what was measured.

    python eval_fid.py runs/shapes-sim-phuber-0 --features teacher       two minutes on two cores
    python eval_fid.py runs/shapes-sim-phuber-0 --features teacher --nfe 35 --n 10000     its teacher
    python eval_fid.py sid.pt --t-star 2.5 --trials 3          FID-50k of a published one-step generator
    python eval_fid.py images/ others/                         two folders of PNGs; .npz files do as well
    python eval_fid.py images/ --stats images.npz              reference statistics, for later
    python eval_fid.py --study neighbours --jobs 2             many runs of a stage, as tables and pictures
    torchrun --standalone --nproc_per_node=8 -- eval_fid.py sid.pt --n 10000

FID is a distance in the features of one Inception network (NVIDIA's TorchScript translation). In any other
features it is another number, and is called so: FD-teacher, FD-pixels. Loading a TorchScript file is loading
a program: take it from NVIDIA alone, or check it with --detector-sha256. Results are added to fid.json.
"""
import argparse
import functools
import hashlib
import importlib
import json
import math
import os
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from matplotlib.figure import Figure
from PIL import Image
from torch.nn import functional as F

from common import (Parser, UserError, atomic, blame, draw_latents, draw_shapes, fetch, image_grid,
                    load_generator, number, one_line_errors, pick_device, progress, read_shapes, require,
                    save, save_picture, sha256, sum_over_ranks, to_uint8, world)

NVIDIA = "https://nvlabs-fi-cdn.nvidia.com"
DETECTOR = f"{NVIDIA}/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
CIFAR10 = f"{NVIDIA}/edm/fid-refs/cifar10-32x32.npz"  # mu and sigma of the 50,000 training images
DRAWN, APART = 50_000, 10**9  # shapes in a reference, as many as CIFAR-10 has; its seeds, which no trial has
KEPT = 10_000  # features of each side, at most, for what needs more than their moments
HERE = Path(__file__).parent
RUNS, RESULTS = HERE / "runs" / "studies", HERE / "assets" / "results"
SPLITS = 10  # of the Inception Score, as in SiD's code


# ---- Distances between two sets of features ----
def moments(features):
    """features (N, D) -> their mean (D,) and covariance (D, D), in float64."""
    features = features.double()
    return features.mean(0), torch.cov(features.T)


def frechet_distance(mu1, sigma1, mu2, sigma2, features1=None, features2=None):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), Heusel et al. 2017, (6), of mu (D,),
    sigma (D, D), in float64. UserError if they are not finite or do not belong together.

    With sigma1 = r r^T, the root's trace is the sum of the roots of the eigenvalues of r^T sigma2 r. Fewer
    features (N, D) than dimensions, where both are given, have it without roots of what should be 0: there it
    is the nuclear norm of the product of the centred features."""
    mu1, sigma1, mu2, sigma2 = [torch.as_tensor(v).double() for v in (mu1, sigma1, mu2, sigma2)]
    if not mu1.shape == mu2.shape == sigma1.shape[:1] == sigma1.shape[1:] == sigma2.shape[:1]:
        raise UserError(f"a Frechet distance of {len(mu1)} and {len(mu2)} features: expected as many")
    if not all(v.isfinite().all() for v in (mu1, sigma1, mu2, sigma2)):
        raise UserError("a Frechet distance of moments that are not finite: expected finite features")
    if features1 is not None and features2 is not None and min(len(features1), len(features2)) < len(mu1):
        a, b = [(f - f.mean(0)) / (len(f) - 1)**0.5 for f in (features1.double(), features2.double())]
        root = torch.linalg.svdvals(a @ b.T).sum()
    else:
        r, failed = torch.linalg.cholesky_ex(sigma1)
        if failed:  # some direction has no variance
            values, vectors = torch.linalg.eigh(sigma1)
            r = vectors * values.clamp(min=0).sqrt()
        root = torch.linalg.eigvalsh(r.T @ sigma2 @ r).clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * root
    if not distance >= -1e-4 * (sigma1.trace() + sigma2.trace()):
        raise UserError(f"the Frechet distance is {distance:.4g}: expected moments of like features")
    return max(distance.item(), 0.0)


def kernel_distance(x, y, subsets=100, size=1000):
    """KID (Binkowski et al. 2018): the unbiased squared MMD of features (N, D) and (M, D) in the kernel
    (a^T b / D + 1)^3. -> its mean and standard deviation over random subsets"""
    random, values = torch.Generator().manual_seed(0), []
    size = min(size, len(x), len(y))
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1)**3
    for _ in progress(range(subsets), "KID"):
        a, b = [v[torch.randperm(len(v), generator=random)[:size]].double() for v in (x, y)]
        within = sum(k.sum() - k.trace() for k in (kernel(a, a), kernel(b, b))) / (size * (size - 1))
        values.append(within - 2 * kernel(a, b).mean())
    return torch.stack(values).mean().item(), torch.stack(values).std(correction=0).item()


def precision_recall(fake, real, k=3):
    """Improved precision and recall (Kynkaanniemi et al. 2019) of features (N, D) and (M, D): the share of
    either side in the balls around the other's points that reach to their k-th neighbours there."""
    def covered(x, centres):
        near = [torch.cdist(c, centres).kthvalue(min(k + 1, len(centres))).values  # the first is c itself
                for c in progress(centres.split(1000), "precision and recall")]
        radius = torch.cat(near)
        return torch.cat([(torch.cdist(a, centres) <= radius).any(1) for a in x.split(1000)])
    fake, real = fake.double(), real.double()
    return [covered(*sides).double().mean().item() for sides in ((fake, real), (real, fake))]


def inception_score(p, p_log_p, counts):
    """exp of the mean KL(p(class | image) || p(class)) (Salimans et al. 2016), from sums over each split's
    images: p (S, classes), p_log_p (S,), counts (S,). -> its mean and standard deviation over the splits"""
    score = (p_log_p / counts + torch.special.entr(p / counts[:, None]).sum(1)).exp()
    return score.mean().item(), score.std(correction=0).item()


# ---- Features ----
@torch.no_grad()
def teacher_features(net, images, t=0.2, batch=500):
    """What a SongUNet's encoder makes of images (N, C, H, W) in [-1, 1] at its deepest level, averaged over
    pixels: (N, D). t is a noise level at which it has learnt to look at details. No labels."""
    unet, features = net.model, []
    for x in images.split(batch):
        t_ = x.new_full((1,), t)
        emb = unet.embed(t_.log() / 4, None, None, len(x))
        features.append(unet.encode(x / (t**2 + net.sigma_data**2)**0.5, emb)[-1].mean((2, 3)))
    return torch.cat(features)


def stage_2():
    """Its loaders and samplers. Stage 2 imports this file, which is why it waits."""
    return importlib.import_module("02_edm_cifar")


def load_detector(args, x):
    """--features as (uint8 (B, 3, H, W) -> features (B, D) and probabilities (B, classes) or None), and the
    SHA-256 of its file. x: images to try it on. UserError if it cannot be had."""
    if args.features == "pixels":
        return lambda x: (x.flatten(1) / 255, None), None
    if args.features == "teacher":
        path = stage_2().EMBEDDED
        net = stage_2().load_denoiser(path)[0].to(x.device)
        return lambda x: (teacher_features(net, x / 127.5 - 1), None), sha256(path)
    path = fetch(DETECTOR)
    found = sha256(path)
    print(f"{path}, sha256 {found}: a TorchScript file is a program")
    if args.detector_sha256 and args.detector_sha256.lower() != found:
        raise UserError(f"{path} has sha256 {found}, --detector-sha256 expects another: download it again")
    with (blame(f"{path} is not NVIDIA's Inception in TorchScript ({{}}): download it again"),
          warnings.catch_warnings(), torch.no_grad()):
        warnings.simplefilter("ignore")  # torch.jit.load is deprecated; nothing else reads this file
        net = torch.jit.load(path, map_location=x.device).eval()
        features, p = net(x, return_features=True), net(x, no_output_bias=True)
        require(features.ndim == p.ndim == 2, "its features are no vectors")
        # The classes are one layer above the features; to run all for them again would double the cost.
        last = dict(net.named_parameters()).get("output.weight")
        short = last is not None and torch.allclose((features @ last.T).softmax(1), p, rtol=1e-3)

    def detect(x):
        features = net(x, return_features=True)
        return features, (features @ last.T).softmax(1) if short else net(x, no_output_bias=True)
    return detect, found


# ---- Images ----
@dataclass
class Images:
    """read(numbers) -> uint8 (B, 3, H, W), their classes (B,) or None. size: how many there are, or 0 if they
    are drawn without end, number k from seed k."""
    name: str
    read: Callable
    shape: tuple
    size: int = 0
    sha256: str | None = None


def drawn_shapes():
    def read(numbers):
        images, labels = zip(*[draw_shapes(1, [k, 1, 1]) for k in numbers])  # no seed of the teacher's
        return to_uint8(torch.cat(images)), torch.cat(labels)
    return Images("true shapes", read, (3, 16, 16))


def generated(path, args, device):
    """A stage-2 checkpoint: one step or, with --nfe, the teacher that it names, itself if it names none."""
    edm, own = stage_2(), args.teacher if ":" in args.teacher else ""
    net, t_star, meta = edm.load_denoiser(path, own)
    named, t_star = args.teacher or meta.get("teacher"), args.t_star or t_star
    digest = sha256(path / "g_ema.pt" if path.is_dir() else path)
    if args.nfe == 1:
        name = f"{path}, one step from t* = {t_star:g}"
        draw = functools.partial(edm.sample_one_step, net, t_star)
    else:
        name, teacher = f"{args.nfe} evaluations of {path}", argparse.Namespace(teacher=named)
        if named:
            name = f"{args.nfe} evaluations of {named}, teacher of {path}"
            net, digest = edm.load_teacher(teacher)[0], getattr(teacher, "teacher_sha256", None)
        draw = functools.partial(edm.sample_teacher, net, num_steps=(args.nfe + 1) // 2)
    if net.image_shape[0] != 3:
        raise UserError(f"{path} makes images of shape {net.image_shape}: expected three colours")
    net.to(device)

    def read(numbers):
        z, labels = draw_latents(numbers, net.image_shape, net.label_dim)
        x = draw(z.to(device), labels.to(device))
        if not x.isfinite().all():
            raise UserError(f"{name} made images that are not finite: expected a trained generator")
        return to_uint8(x), labels.argmax(1) if net.label_dim else None
    return Images(name, read, tuple(net.image_shape), sha256=digest)


def folder_of_images(path):
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in (".png", ".jpg", ".jpeg")
                   and not file.name.startswith("."))
    if not files:
        raise UserError(f"{path} has no .png or .jpg in it, nor a g_ema.pt: expected images, or a run")
    damage = OSError, SyntaxError, ValueError, Image.DecompressionBombError

    def read_one(file, size=None):
        expected = f"{file} cannot be read ({{}}): expected an RGB image"
        with blame(expected, *damage), Image.open(file) as image:
            if image.mode != "RGB" or size not in (None, image.size):
                raise UserError(f"{file} is {image.mode}, {image.size}: expected RGB, {size or 'one size'}")
            return np.array(image)

    height, width, _ = read_one(files[0]).shape
    read = lambda numbers: (channels_first([read_one(files[k], (width, height)) for k in numbers]), None)
    digest = hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()  # of the files', in order
    return Images(str(path), read, (3, height, width), len(files), digest)


def read_npz(path):
    with blame(f"{path} cannot be read: expected an .npz of arrays", Exception), np.load(path) as file:
        return {name: file[name] for name in file.files}


def array_of_images(path):
    arrays = read_npz(path)
    found = [v for v in arrays.values() if v.dtype == np.uint8 and v.ndim == 4 and v.shape[-1] == 3]
    if len(found) != 1 or not len(found[0]):
        holds = ", ".join(f"{name} {v.dtype} {v.shape}" for name, v in arrays.items())
        raise UserError(f"{path} holds {holds}: expected one array of images, uint8 (N, H, W, 3)")
    read = lambda numbers: (channels_first(found[0][numbers]), None)
    return Images(str(path), read, (3, *found[0].shape[1:3]), len(found[0]), sha256(path))


def channels_first(pixels):
    return torch.from_numpy(rearrange(pixels, "n h w c -> n c h w"))


def open_images(name):
    """Images that are there, or are drawn. UserError if the name is nothing of the kind."""
    path = Path(name)
    if name == "shapes":
        return drawn_shapes()
    if path.is_dir():
        return folder_of_images(path)
    if path.suffix == ".npz":
        return array_of_images(path)
    what = "holds no images" if path.exists() else "is not there"
    raise UserError(f"{name} {what}: expected a folder of images, an .npz or shapes; to evaluate, a run's "
                    "folder or a checkpoint (.pt, .pkl) too")


# ---- One pass ----
@torch.no_grad()
def one_pass(images, numbers, detect, batch, device, count_shapes=False):
    """What is measured of the images with these numbers: sums over them in float64, so that neither the size
    of a batch nor the number of ranks, which share the batches, matters. UserError for fewer than two."""
    n, (rank, ranks) = len(numbers), world()
    if n < max(2, ranks):
        raise UserError(f"{images.name}: {n} images, expected at least {max(2, ranks)}")
    sums, kept, every = {}, None, -(-n // KEPT)  # keep one in so many: files may be sorted by class
    batches = torch.arange(n).split(min(batch, n // ranks))[rank::ranks]
    for index in progress(batches, f"{images.name}, batch"):
        x, labels = images.read([numbers[i] for i in index])
        features, p = [v if v is None else v.cpu().double() for v in detect(x.to(device))]
        new = {"x": features.sum(0), "xx": features.T @ features}
        if p is not None:
            split = F.one_hot(((index + 1) * SPLITS - 1) // n, SPLITS).double().T
            new |= {"p": split @ p, "p_log_p": split @ torch.xlogy(p, p).sum(1), "counts": split.sum(1)}
        if count_shapes and labels is not None:
            new["right"] = (read_shapes(x)[0] == labels).sum()
        sums = {name: sums.get(name, 0) + value for name, value in new.items()}
        kept = torch.zeros(-(-n // every), features.shape[1]) if kept is None else kept
        mine = index % every == 0
        kept[index[mine] // every] = features[mine].float()
    sums = {name: sum_over_ranks(value) for name, value in (sums | {"kept": kept}).items()}
    mu = sums["x"] / n
    return sums | {"n": n, "mu": mu, "sigma": (sums["xx"] - n * torch.outer(mu, mu)) / (n - 1)}


def load_reference(args, images, dim, digest, measure):
    """-> what one_pass returns, or the mu and sigma of a file; and what fid.json says of it. UserError if it
    is not there or does not compare with these images and this detector."""
    path = fetch(CIFAR10) if args.reference == "cifar10" else Path(args.reference)
    if path.suffix == ".npz" and "mu" in (arrays := read_npz(path)):
        shapes = {key: arrays[key].shape for key in ("mu", "sigma") if key in arrays}
        of = str(arrays.get("features", "inception"))
        if shapes != {"mu": (dim,), "sigma": (dim, dim)} or of != args.features:
            raise UserError(f"{path} has {shapes} of {of} features: expected mu ({dim},) and sigma "
                            f"({dim}, {dim}) of {args.features} features")
        if str(arrays.get("detector_sha256", digest)) != str(digest):
            raise UserError(f"{path} was made with another detector: write it anew with --stats")
        if not all(v.dtype.kind == "f" and np.isfinite(v).all() for v in (arrays["mu"], arrays["sigma"])):
            raise UserError(f"{path} has values that are not finite numbers: get it again")
        return arrays, {"reference": str(path), "reference_sha256": sha256(path)}
    real = open_images(args.reference)
    if args.features != "inception" and real.shape != images.shape:  # Inception resizes what it sees
        raise UserError(f"{real.name} has shape {real.shape}, {images.name} {images.shape}: expected one")
    numbers = range(real.size) if real.size else range(APART, APART + DRAWN)
    facts = {"reference": real.name, "reference_n": len(numbers), "reference_sha256": real.sha256}
    return measure(real, numbers), facts


def metrics(a, b, features):
    """{full name: value} of a pass against a reference; each name has the features and n in it."""
    count = lambda n: f"{n // 1000}k" if n % 1000 == 0 else str(n)
    of, n = "" if features == "inception" else f"-{features}", count(a["n"])
    both = [side["kept"] for side in (a, b) if "kept" in side]
    whole = both if all(len(side.get("kept", ())) == side.get("n") for side in (a, b)) else []
    distance = frechet_distance(a["mu"], a["sigma"], b["mu"], b["sigma"], *whole)
    values = {f"{'FD' if of else 'FID'}{of}-{n}": distance}
    if "p" in a and a["n"] >= SPLITS:
        score = inception_score(a["p"], a["p_log_p"], a["counts"])
        values |= dict(zip((f"IS-{n}", f"IS-{n} (std of splits)"), score))
    if len(both) == 2:
        k = count(len(a["kept"]))
        values |= dict(zip((f"KID{of}-{k}", f"KID{of}-{k} (std of subsets)"), kernel_distance(*both)))
        values |= dict(zip((f"precision-{features}-{k}", f"recall-{features}-{k}"), precision_recall(*both)))
    if "right" in a:
        values[f"class accuracy-{n}"] = a["right"].item() / a["n"]
    return values


# ---- Studies: runs of the other stages by their own commands, what came out, and pictures of it ----
@dataclass
class Study:
    """Runs of a stage: panels {title: {label: flags}}. They are judged by a key of log.jsonl, called `name`,
    and drawn as its curves or, with `samples`, as what they generate."""
    stage: str
    key: str
    name: str
    panels: dict
    samples: bool = False


TOY = ("01_toy_2d.py --part distil", "sw2", "sliced Wasserstein-2")
IMAGES = ("02_edm_cifar.py --teacher shapes --preset shapes", "fd", "FD-teacher")
METHODS = {"SIM, Pseudo-Huber": "", "SIM, l2": "--distance l2", "SiD, alpha 1": "--method sid",
           "SiD, its own settings": "--method sid --sid-alpha 1.2 --p-theta karras",
           "Diff-Instruct": "--method di"}
SETTINGS = {"nowgt, log-normal": "", "nowgt, Karras": "--p-theta karras",
            "sidwgt, log-normal": "--weight sidwgt", "sidwgt, Karras": "--weight sidwgt --p-theta karras"}
CONSTANTS = {f"c = {c}": "" if c == 0.001 else f"--c {c}" for c in (1, 0.01, 0.001, 0.0001)}
NEIGHBOURS = METHODS | {
    "DMD": "--method dmd", "ADD": "--method add", "CD": "--method cd", "iCT": "--method ct",
    "MCM, 4 evaluations": "--method mcm", "PaGoDA": "--method pagoda"}
WRONG = {"SIM": "", "d' detached": "--method d_prime_detached", "d_q detached": "--method d_q_detached",
         "d(y) back-propagated": "--method d_backpropagated"}
T_STARS = {f"t* = {t}": "" if t == 2.5 else f"--t-star {t}" for t in (0.05, 0.5, 2.5, 20)}
TEACHERS = {"exact scores": "", "diffusion model": "--teacher learned", "rectified flow": "--teacher flow"}
COLUMNS = {"fd": ("FD-teacher", ".2f"), "sw2": ("sliced W2", ".3g"), "share_on_modes": ("on modes", ".1%"),
           "poorest": ("poorest mode", ".1%"), "richest": ("richest", ".1%"),
           "evaluations": ("evaluations", "d"), "seconds": ("seconds", ".0f")}  # of a table: name, format


def figure_2(**rates):
    """The paper's Figure 2: METHODS with the flags of each rate, SIM's settings with those of the first."""
    usual = next(iter(rates.values()))
    panels = {rate.replace("_", " "): (METHODS, flags) for rate, flags in rates.items()}
    panels |= {"SIM: weight and times": (SETTINGS, usual), "SIM: Pseudo-Huber's c": (CONSTANTS, usual)}
    return {title: {label: f"{more} {flags}".strip() for label, more in runs.items()}
            for title, (runs, flags) in panels.items()}


STUDIES = {
    "neighbours": Study(*TOY, {"neighbours": NEIGHBOURS}, samples=True),
    "stop-gradients": Study(*TOY, {"stop-gradients": WRONG}, samples=True),
    "teachers": Study(*TOY, {"teachers": TEACHERS}, samples=True),
    "t-star": Study(*TOY, {"t*": T_STARS}, samples=True),
    "figure-2-toy": Study(*TOY, figure_2(
        preset_lr="--anneal none --steps 1500", three_times_that="--anneal none --lr 0.006 --steps 1500",
        ten_times_that="--anneal none --lr 0.02 --steps 1500")),
    "figure-2-shapes": Study(*IMAGES, figure_2(
        preset_lr="--anneal none --steps 200", ten_times_that="--anneal none --lr 0.004 --steps 100"))}


def run_folder(study, flags, seed):
    words = f"{flags} --seed {seed}".replace("--", "").split()
    return RUNS / study.stage.split(".")[0] / "_".join(words)


def run_once(study, flags, seed, jobs):
    """A run by its own command, or what is missing of it. -> why it stopped, or None. UserError if that was
    anything else than a loss that is not finite, which is a result."""
    folder, command = run_folder(study, flags, seed), f"{study.stage} {flags} --seed {seed}".split()
    if (folder / "metrics.json").exists():
        return None
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    done = subprocess.run([sys.executable, *command, "--out", folder], cwd=HERE, env=os.environ | threads,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    why = done.stderr.strip().split("\n")[-1]
    if done.returncode and "the last good checkpoint" not in why:
        raise UserError(f"python {shlex.join([*command, '--out', str(folder)])} stopped: {why}")
    return why if done.returncode else None


def summarise_run(study, flags, seed, stopped):
    """A run's row in assets/results: its figures, and its curve [(samples seen, value), ...]"""
    folder = run_folder(study, flags, seed)
    args, lines = read_json(folder / "args.json"), read_json(folder / "log.jsonl")
    shown = {round(args["steps"] * (i / 12)**2) for i in range(13)}  # places that every stage looks at
    curve = [[line["step"] * args["batch"], float(f"{line[study.key]:.3g}")]
             for line in lines if study.key in line and line["step"] in shown]
    found = {} if stopped else read_json(folder / "metrics.json")
    if "mode_shares" in found:
        found |= {"poorest": min(found["mode_shares"]), "richest": max(found["mode_shares"])}
    return {"flags": flags, "seed": seed, "stopped": stopped,
            **{key: round(found[key], 5) for key in COLUMNS if key in found}, "curve": curve}


def run_study(name, seeds, jobs):
    """All runs of a study, `jobs` at once, to assets/results/NAME.json, a line for each."""
    study = STUDIES[name]
    flags = dict.fromkeys(flags for panel in study.panels.values() for flags in panel.values())
    runs = [(study, f, seed) for seed in range(seeds) for f in flags]
    with ThreadPoolExecutor(jobs) as pool:
        stops = list(progress(pool.map(lambda run: run_once(*run, jobs), runs), name, len(runs)))
    rows = [json.dumps(summarise_run(*run, stopped)) for run, stopped in zip(runs, stops)]
    RESULTS.mkdir(exist_ok=True)
    with atomic(RESULTS / f"{name}.json") as temporary:
        temporary.write_text("[" + ",\n ".join(rows) + "]\n")
    if study.samples:
        draw_samples(study, RESULTS.parent / f"{name}.png")


def draw_samples(study, path):
    """Samples of every run of the toy with seed 0, after exact ones."""
    toy, random = importlib.import_module("01_toy_2d"), torch.Generator().manual_seed(0)
    mixture, z = toy.make_mixture("ring"), torch.randn(4000, 2, generator=random)
    panels = [toy.panel(mixture, mixture.sample(4000, random), "data")]
    for label, flags in [run for panel in study.panels.values() for run in panel.items()]:
        folder = run_folder(study, flags, 0)
        if not (folder / "g_ema.pt").exists():  # stopped before the first checkpoint
            continue
        g, t_star, meta = load_generator(folder, toy.make_denoiser)
        stopped = "" if (folder / "metrics.json").exists() else f" (stopped at {meta['step']})"
        panels.append(toy.panel(mixture, toy.few_steps(g, z, t_star, meta["segments"]), label + stopped))
    columns = max(n for n in range(1, 7) if len(panels) % n == 0)
    save_picture(image_grid(torch.stack(panels), columns), path)


def report_study(name):
    """assets/results/NAME.json as tables, one a panel, from the least to the greatest of the seeds; and as
    curves, unless there is a picture of samples. UserError if it lacks a run."""
    study, path = STUDIES[name], RESULTS / f"{name}.json"
    if not path.exists():
        raise UserError(f"{path} does not exist: --study {name} without --draw makes it")
    rows = read_json(path)
    runs = {flags: [row for row in rows if row["flags"] == flags] for flags in {row["flags"] for row in rows}}
    if missing := {flags for panel in study.panels.values() for flags in panel.values()} - runs.keys():
        raise UserError(f"{path} has no run of {min(missing)!r}: --study {name} makes it anew")
    costs = () if study.samples else ("evaluations", "seconds")  # curves compare quality alone
    keys = [key for key in COLUMNS if key not in costs and any(key in row for row in rows)]
    for title, panel in study.panels.items():
        print("", " | ".join([f"| {title}", *[COLUMNS[key][0] for key in keys]]) + " |", sep="\n")
        print("|---" * (len(keys) + 1) + "|")
        for label, flags in panel.items():
            print(" | ".join([f"| {label}", *[extremes(runs[flags], key) for key in keys]]) + " |")
    if not study.samples:
        draw_study(study, runs, RESULTS.parent / f"{name}.png")


def draw_study(study, runs, path):
    """The curves of runs {flags: rows}, a panel of the study in each axes."""
    across = math.ceil(len(study.panels) / 2)
    figure = Figure(figsize=(5 * across, 8.8), dpi=80, layout="constrained")
    for i, (title, panel) in enumerate(study.panels.items(), 1):
        axes = figure.add_subplot(2, across, i, title=title, xlabel="samples seen", ylabel=study.name)
        for label, flags in panel.items():
            draw_curves(axes, label, [np.array(run["curve"]) for run in runs[flags]])
        axes.set_xscale("symlog", linthresh=runs[flags][0]["curve"][1][0])  # 0 samples, too, have their place
        axes.set_yscale("log")
        axes.legend(frameon=False, fontsize=8)
    with atomic(path) as temporary:
        figure.savefig(temporary)


def extremes(runs, key):
    """The least and the greatest of what runs have, as text, and how many stopped without."""
    values = sorted(run[key] for run in runs if key in run)
    text = " to ".join(dict.fromkeys(format(v, COLUMNS[key][1]) for v in values[:1] + values[-1:]))
    stopped = f"{len(runs) - len(values)} stopped" if len(values) < len(runs) else ""
    return ", ".join(filter(None, (text, stopped)))


def draw_curves(axes, label, curves):
    """Curves [(samples seen, value), ...] of a run with several seeds: their median, in a band from the least
    to the greatest of those that went so far."""
    places = max(curves, key=len)[:, 0]
    values = [[curve[i, 1] for curve in curves if i < len(curve)] for i in range(len(places))]
    low, middle, high = zip(*[np.quantile(v, (0, 0.5, 1)) for v in values])
    axes.plot(places, middle, label=label)
    axes.fill_between(places, low, high, alpha=0.15, linewidth=0)


# ---- The command line ----
def parse(argv):
    parser = Parser(__doc__)
    parser.add_argument("source", nargs="?", help="a run's folder, a checkpoint (.pt, .pkl), a folder of "
                        "images, an .npz file, or shapes (drawn ones)")
    parser.add_argument("reference", nargs="?", help="a folder, an .npz (of images, or of mu and sigma), "
                        "shapes or cifar10; unless given, shapes for 16x16 and cifar10 for 32x32 images")
    parser.add_argument("--features", choices=("inception", "teacher", "pixels"), default="inception",
                        help="only the first gives FID; teacher is the embedded shapes teacher's encoder")
    parser.add_argument("--n", type=number(int, 1), help="images; 50,000 or all of a folder or file")
    parser.add_argument("--trials", type=number(int), default=1, help="with n fresh seeds each (EDM, SiD: 3)")
    parser.add_argument("--seed", type=number(int, strict=False), default=0, help="of the first image")
    parser.add_argument("--nfe", type=number(int), default=1, help="network evaluations: 1 is the generator; "
                        "more, an odd number, Heun's method with its teacher (EDM: 35)")
    parser.add_argument("--t-star", type=number(float), help="unless the checkpoint's own (SiD: 2.5)")
    parser.add_argument("--teacher", default="", help="of a run that does not name it, as in stage 2")
    parser.add_argument("--batch", type=number(int), default=250, help="images at once; changes no result")
    parser.add_argument("--stats", metavar="NPZ", help="only write mu and sigma of the source's features")
    parser.add_argument("--detector-sha256", help="what the Inception file must have")
    parser.add_argument("--device", default="auto", help="auto (the best one here), cpu, cuda, mps")
    parser.add_argument("--out", metavar="JSON", help="fid.json beside the source unless given")
    group = parser.add_argument_group("studies, in the place of a source")
    group.add_argument("--study", choices=STUDIES, help="its runs, in runs/studies, as far as they are not "
                       "there (remove them after a change of the code); then its tables, its picture in "
                       "assets and its numbers in assets/results")
    group.add_argument("--seeds", type=number(int), default=3, help="of every run")
    group.add_argument("--jobs", type=number(int), default=1, help="runs at once, which share the cores")
    group.add_argument("--draw", action="store_true", help="no runs: tables and curves from assets/results")
    args = parser.parse_args(argv)
    if (args.source is None) == (args.study is None):
        parser.error("expected a source or --study, and not both")
    return args


def settle(args, images, checkpoint):
    """Fill in --n, the reference and --out. UserError for what does not go together."""
    here, size = Path(args.source), " x ".join(map(str, images.shape))
    args.out = Path(args.out or (here if (here / "g_ema.pt").exists() else here.parent) / "fid.json")
    written = Path(args.stats or args.out)
    usual = {(3, 16, 16): "shapes", (3, 32, 32): "cifar10" if args.features == "inception" else None}
    for wrong, message in (
            (images.size and (args.seed or args.trials > 1), "--seed and --trials are for what draws images"),
            (not checkpoint and (args.nfe > 1 or args.t_star or args.teacher),
             "--nfe, --t-star and --teacher are for checkpoints"),
            (args.nfe > 1 and args.t_star, "--t-star is for one step, --nfe for more"),
            (args.nfe % 2 == 0, f"--nfe {args.nfe}: Heun's method takes an odd number of evaluations"),
            (images.size and images.size < (args.n or 0), f"--n {args.n}: it holds {images.size} images"),
            (args.features == "teacher" and images.shape != (3, 16, 16),
             f"images of {size}: --features teacher expects 3 x 16 x 16"),
            (args.features == "pixels" and math.prod(images.shape) > 4096,
             f"images of {size}: --features pixels expects at most 4096 numbers in an image"),
            (args.reference == "cifar10" and args.features != "inception",
             "cifar10 is statistics of Inception's features"),
            (args.stats and (args.reference or args.trials > 1), "--stats takes no reference or --trials"),
            (args.stats and written.exists(), f"{written} is there: name another --stats"),
            (written.suffix != (".npz" if args.stats else ".json") or not written.parent.is_dir(),
             f"{written}: expected an .npz for --stats, a .json for --out, in a folder that is there"),
            (not (args.stats or args.reference or usual.get(images.shape)), "name a reference as well")):
        if wrong:
            raise UserError(f"{args.source}: {message}")
    args.n, args.reference = args.n or images.size or 50_000, args.reference or usual.get(images.shape)


def write_statistics(args, images, digest, measure):
    start = args.seed + (0 if images.size else APART)
    got = measure(images, range(start, start + args.n))
    if world()[0] == 0:
        with atomic(args.stats) as temporary:
            np.savez(temporary, mu=got["mu"], sigma=got["sigma"], features=args.features, n=args.n,
                     detector_sha256=str(digest))
    print(f"{args.stats}: mu and sigma of {images.name}, {args.n} images")


def read_json(path):
    """A file of JSON, or of lines of JSON. UserError if it is missing or damaged."""
    with blame(f"{path} is missing or damaged ({{}}): make it anew", ValueError, OSError):
        text = path.read_text()
        return list(map(json.loads, text.splitlines())) if path.suffix == ".jsonl" else json.loads(text)


def read_results(path):
    with blame(f"{path} is no list of results ({{}}): move it away, or name another --out"):
        found = json.loads(path.read_text()) if path.exists() else []
        require(isinstance(found, list), f"it holds a {type(found).__name__}")
        return found


def summarise(trials):
    """{name: {"mean", and of more than one trial "std" and "trials"}}"""
    columns = {name: [trial[name] for trial in trials] for name in trials[0]}
    spread = lambda v: {"std": float(np.std(v, ddof=1)), "trials": v} if len(v) > 1 else {}
    return {name: {"mean": float(np.mean(v))} | spread(v) for name, v in columns.items()}


@one_line_errors
def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    args = parse(words)
    if args.study:
        if not args.draw:
            run_study(args.study, args.seeds, args.jobs)
        return report_study(args.study)
    device, path = pick_device(args.device), Path(args.source)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    checkpoint = path.suffix in (".pt", ".pkl") or (path / "g_ema.pt").exists()
    images = generated(path, args, device) if checkpoint else open_images(args.source)
    settle(args, images, checkpoint)
    earlier = read_results(args.out)
    detect, digest = load_detector(args, x := images.read([0])[0].to(device))
    measure = functools.partial(one_pass, detect=detect, batch=args.batch, device=device)
    if args.stats:
        return write_statistics(args, images, digest, measure)
    reference, facts = load_reference(args, images, detect(x)[0].shape[1], digest, measure)
    facts |= {"source": images.name, "source_sha256": images.sha256, "n": args.n, "features": args.features,
              "detector_sha256": digest, "command": f"python eval_fid.py {shlex.join(words)}",
              "date": str(date.today()), "seeds": []}
    evaluate(args, images, reference, facts, earlier, measure)


def evaluate(args, images, reference, facts, earlier, measure):
    """Every trial; after each, the entry in fid.json is that of the trials so far."""
    trials, shapes = [], args.reference == "shapes" and images.shape == (3, 16, 16)
    for trial in range(args.trials):
        begun, numbers = time.time(), range(args.seed + trial * args.n, args.seed + (trial + 1) * args.n)
        got = measure(images, numbers, count_shapes=shapes)
        facts["images_s"] = args.n / (time.time() - begun)  # the features and the check of classes included
        facts["seeds"].append([numbers[0], numbers[-1]])
        if world()[0] == 0:  # the others have their next samples to draw
            trials.append(metrics(got, reference, args.features))
            facts["metrics"] = summarise(trials)
            save([*earlier, facts], args.out)
    note = "" if args.features == "inception" else f"; in {args.features} features, which is not FID"
    count = facts.get("reference_n", "mu and sigma")
    print(f"{images.name}: {args.n} images against {facts['reference']} ({count}){note}")
    for name, v in facts.get("metrics", {}).items():
        spread = f" +- {v['std']:.2g}: {v['trials']}" if len(trials) > 1 else ""
        print(f"  {name:34}{v['mean']:.4g}{spread}")
    print(f"  {facts['images_s']:.0f} images/s; added to {args.out}")


if __name__ == "__main__":
    main()
