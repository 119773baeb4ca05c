"""FID, Inception Score, KID, precision and recall: how near are images to those of a reference?

    python eval_fid.py runs/fashion-sim-phuber-0 --features judge --n 10000      a minute on a CPU
    python eval_fid.py runs/fashion-sim-phuber-0 --features judge --n 10000 --nfe 35     its teacher
    python eval_fid.py sid.pkl --t-star 2.5 --trials 3     FID-50k of a published one-step generator
    python eval_fid.py images/ others/          two folders of PNGs or JPEGs; .npz files do as well
    python eval_fid.py images/ --stats images.npz        mu and sigma of images, as a reference
    torchrun --standalone --nproc_per_node=8 -- eval_fid.py sid.pkl --n 10000

FID is a distance in the features of Inception, in NVIDIA's TorchScript translation. In other
features the distance has another name: FD-judge. A TorchScript file is a program: take it from
NVIDIA alone, or check it with --detector-sha256. Results are added to fid.json beside the source.
"""
import hashlib
import importlib
import json
import shlex
import sys
import time
import warnings
from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common import (UserError, at_least_0, atomic, checked, count, draw_latents, fetch, to_uint8,
                    frechet_distance, one_line_errors, pick_device, plain_parser, positive,
                    progress, rank_and_ranks, reading, require, save, sha256, sum_over_ranks)

edm = importlib.import_module("02_edm_cifar")

NVIDIA = "https://nvlabs-fi-cdn.nvidia.com"
DETECTOR = f"{NVIDIA}/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
CIFAR10 = f"{NVIDIA}/edm/fid-refs/cifar10-32x32.npz"  # mu and sigma of the 50,000 training images
STORED = 10_000  # features of each side, at most, for metrics that need more than mu and sigma
SPLITS = 10  # of the Inception Score, as in SiD's code
APART = 10**9  # --stats of a generator starts at this seed, so that no trial has the same images


# ---- Metrics besides the Frechet distance, which is in common.py ----
def kernel_distance(x, y, subsets=100, size=1000):
    """KID (Binkowski et al. 2018) of features (N, D) and (M, D): the unbiased squared MMD with the
    kernel (a^T b / D + 1)^3. -> its mean and standard deviation over random subsets"""
    random, values = torch.Generator().manual_seed(0), []
    size = min(size, len(x), len(y))
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1)**3
    for _ in progress(range(subsets), "KID"):
        a, b = [v[torch.randperm(len(v), generator=random)[:size]].double() for v in (x, y)]
        off_diagonal = sum(k.sum() - k.trace() for k in (kernel(a, a), kernel(b, b)))
        values.append(off_diagonal / (size * (size - 1)) - 2 * kernel(a, b).mean())
    values = torch.stack(values)
    return values.mean().item(), values.std(correction=0).item()


def share_in_balls(x, centres, k=3):
    """The share of points x (N, D) that lie in a ball around any of the centres (M, D). The radius
    of a centre's ball is the distance to its k-th nearest neighbour among the other centres."""
    radius = torch.cat([  # k + 1, since the nearest centre is the centre itself
        torch.cdist(c, centres).kthvalue(min(k + 1, len(centres))).values
        for c in progress(centres.split(1000), "precision and recall")])
    inside = [(torch.cdist(points, centres) <= radius).any(1) for points in x.split(1000)]
    return torch.cat(inside).double().mean().item()


def precision_recall(fake, real):
    """Improved precision and recall (Kynkaanniemi et al. 2019) of features (N, D) and (M, D): the
    share of fake images among the real ones, and the share of real images among the fake ones."""
    fake, real = fake.double(), real.double()
    return share_in_balls(fake, real), share_in_balls(real, fake)


def inception_score(p, p_log_p, counts):
    """exp of the mean KL(p(class | image) || p(class)) (Salimans et al. 2016), from sums of splits:
    p (S, classes), p_log_p (S,), counts (S,). -> mean and standard deviation over the splits"""
    score = (p_log_p / counts + torch.special.entr(p / counts[:, None]).sum(1)).exp()
    return score.mean().item(), score.std(correction=0).item()


# ---- Features ----
def load_detector(args, x):
    """-> a function (uint8 (B, C, H, W)) -> features (B, D) and probabilities (B, classes); and its
    file's SHA-256. Inception, which is tried on the images x, sees grey as RGB."""
    if args.features == "judge":
        judge = edm.load_judge(args.judge or edm.JUDGE, x.shape[1:]).to(x.device)

        def ask(x):
            features, logits = judge(x)
            return features, logits.softmax(1)
        return ask, judge.sha256
    path = fetch(DETECTOR)
    digest = sha256(path)
    print(f"{path}, sha256 {digest}: a TorchScript file is a program")
    require((args.detector_sha256 or digest).lower() == digest,
            f"{path} has sha256 {digest}, --detector-sha256 expects another: download it again")
    with (reading(path, "NVIDIA's Inception in TorchScript: download it again"), torch.no_grad(),
          warnings.catch_warnings(action="ignore")):  # torch.jit.load is deprecated
        net, x = torch.jit.load(path, map_location=x.device).eval(), x.expand(-1, 3, -1, -1)
        features, p = net(x, return_features=True), net(x, no_output_bias=True)
        require(features.ndim == p.ndim == 2, "its features are no vectors")
        # One layer leads from the features to the probabilities. To apply the layer here, where it
        # is found, saves a second pass through the network.
        last = net.state_dict().get("output.weight")
        found = last is not None and torch.allclose((features @ last.T).softmax(1), p, rtol=1e-3)

    def detect(x):
        x = x.expand(-1, 3, -1, -1)
        features = net(x, return_features=True)
        return features, (features @ last.T).softmax(1) if found else net(x, no_output_bias=True)
    return detect, digest


# ---- Images ----
# read(numbers) -> the images with these numbers, uint8 (B, C, H, W). `size` is how many there are,
# or 0 for a network's images, which are drawn without end: image k from seed k.
Images = namedtuple("Images", "name read shape size sha256")


def generated(path, args, device):
    """The images of a checkpoint: those of the generator or, with --nfe, those of its teacher. A
    file that names no teacher is taken for a teacher itself."""
    try:
        net, t_star, meta = edm.load_denoiser(path, args.teacher)
    except UserError as error:
        raise UserError(f"{error}. eval_fid.py reads runs of stage 2, 02_edm_cifar.py") from error
    t_star, named, digest = args.t_star or t_star, args.teacher or meta.get("teacher"), sha256(path)
    name = f"{args.source}, one step from t* = {t_star:g}"
    sample = partial(edm.sample_one_step, net, t_star)
    if args.nfe > 1:
        name = f"{args.nfe} evaluations of {args.source}"
        if named:
            require(":" not in named or named == args.teacher,  # a file names nothing to import
                    f"--nfe {args.nfe}: name the teacher of {args.source} by --teacher")
            net, _, facts = edm.load_teacher(named)
            name = f"{args.nfe} evaluations of {named}, teacher of {args.source}"
            digest = facts.get("teacher_sha256")
        sample = partial(edm.sample_teacher, net, num_steps=(args.nfe + 1) // 2)
    require(net.image_shape[0] in (1, 3), f"{path}: expected images of one channel or three")
    net.to(device)

    def read(numbers):
        x = sample(*draw_latents(numbers, net.image_shape, net.label_dim, device=device))
        require(x.isfinite().all(), f"{name}: images are not finite, expected a trained network")
        return to_uint8(edm.on_screen(net, x))
    return Images(name, read, tuple(net.image_shape), 0, digest)


def open_images(path):
    """A folder, or the one array of images in an .npz file. UserError for anything else."""
    if path.is_dir():
        return folder_of_images(path)
    state = "holds no images" if path.exists() else "is not there"
    require(path.suffix == ".npz", f"{path} {state}: expected a folder of images or an .npz; to "
            "evaluate, a run of stage 2 or a checkpoint (.pt, .pkl) as well")
    arrays = read_npz(path)
    found = [v for v in arrays.values() if v.dtype == np.uint8 and
             (v.ndim == 3 or v.ndim == 4 and v.shape[-1] in (1, 3))]
    holds = ", ".join(f"{name} {v.dtype} {v.shape}" for name, v in arrays.items())
    require(len(found) == 1 and found[0].size, f"{path} holds {holds}: expected one array of "
            "images, uint8 (N, H, W), or (N, H, W, C) of one channel or three")
    pixels = found[0].reshape(*found[0].shape[:3], -1)
    read = lambda numbers: channels_first(pixels[numbers])
    return Images(str(path), read, tuple(read([0]).shape[1:]), len(pixels), sha256(path))


def folder_of_images(path):
    """The PNGs and JPEGs in a folder, in the order of their names, without hidden files."""
    files = sorted(f for f in path.glob("[!.]*") if f.suffix.lower() in (".png", ".jpg", ".jpeg"))
    require(files, f"{path} has no .png or .jpg in it")

    def read_one(file, shape=None):
        with (reading(file, f"a PNG or JPEG, grey or RGB, of shape {shape or '(H, W, C)'}"),
              Image.open(file, formats=("PNG", "JPEG")) as image):
            require(image.mode in ("L", "RGB") and image.width * image.height <= 2**24,
                    f"its mode is {image.mode}, its size {image.size}")
            pixels = np.array(image).reshape(image.height, image.width, -1)
            require(shape in (None, pixels.shape), f"its shape is {pixels.shape}")
            return pixels

    first = read_one(files[0])
    read = lambda numbers: channels_first([read_one(files[k], first.shape) for k in numbers])
    digest = hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()
    return Images(str(path), read, tuple(channels_first([first]).shape[1:]), len(files), digest)


def read_npz(path):
    with reading(path, "an .npz file of arrays"), np.load(path) as file:
        size = sum(item.file_size for item in file.zip.infolist())
        require(size < max(2**30, 4 * path.stat().st_size), f"{size / 1e9:.0f} GB, compressed")
        return {name: np.asarray(v) for name, v in file.items()}  # a text is bytes


def channels_first(pixels):
    return torch.from_numpy(np.asarray(pixels)).movedim(-1, 1)  # (N, H, W, C) -> (N, C, H, W)


# ---- One pass ----
@torch.no_grad()
def one_pass(images, numbers, detect, batch, device):
    """The images with these numbers -> mu (D,), sigma (D, D), n, at most STORED features and sums
    for the Inception Score. Sums in float64 depend neither on the batch size nor on the ranks."""
    n, (rank, ranks) = len(numbers), rank_and_ranks()
    require(n >= max(2, ranks), f"{images.name}: {n} images, expected at least {max(2, ranks)}")
    every = -(-n // STORED)  # one in so many features is stored: files may be sorted by class
    sums, stored = {}, None
    batch = min(batch, n // ranks, int(2**28 // np.prod(images.shape)))  # 256 MB
    batches = torch.arange(n).split(batch)[rank::ranks]
    for index in progress(batches, f"{images.name}, batch"):
        x = images.read([numbers[i] for i in index]).to(device)
        features, p = [v.cpu().double() for v in detect(x)]
        split = torch.nn.functional.one_hot(((index + 1) * SPLITS - 1) // n, SPLITS).double().T
        new = {"x": features.sum(0), "xx": features.T @ features, "p": split @ p,
               "counts": split.sum(1), "p_log_p": split @ p.xlogy(p).sum(1)}
        sums = {name: sums.get(name, 0) + value for name, value in new.items()}
        stored = torch.zeros(-(-n // every), features.shape[1]) if stored is None else stored
        chosen = index % every == 0
        stored[index[chosen] // every] = features[chosen].float()
    sums = {name: sum_over_ranks(v) for name, v in (sums | {"stored": stored}).items()}
    mu = sums["x"] / n
    return sums | {"n": n, "mu": mu, "sigma": (sums["xx"] - n * torch.outer(mu, mu)) / (n - 1)}


def load_reference(args, images, dim, digest, measure):
    """-> what one_pass returns of the reference, or its mu and sigma alone; and what fid.json says
    of it. UserError for a reference that is not there, or does not fit the images or features."""
    usual = "judge" if args.features == "judge" else {(3, 32, 32): "cifar10"}.get(images.shape)
    reference = args.reference or usual
    require(reference, f"{args.source}: name a reference as well, for images of {images.shape}")
    path = fetch(CIFAR10) if reference == "cifar10" else Path(reference)
    name, arrays = str(path), read_npz(path) if path.suffix == ".npz" else {}
    if reference == "judge":  # whose file has the moments of the true images of the test
        path = Path(args.judge or edm.JUDGE)
        name = f"true images, by {path}"
        arrays = edm.load_judge(path, images.shape).meta | {"features": "judge"}
    if "mu" in arrays:
        with reading(name, f"mu ({dim},) and sigma ({dim}, {dim}) of {args.features} features, as "
                     "--stats writes them with this detector"):
            of = str(arrays.get("features", "inception"))
            require(of == args.features, f"it has {of} features")
            require(str(arrays.get("detector_sha256", digest)) == digest, "by another detector")
            # A distance to these moments is tried now: an error comes before the work.
            frechet_distance(np.zeros(dim), np.eye(dim), arrays["mu"], arrays["sigma"])
        return arrays, {"reference": name, "reference_sha256": sha256(path)}
    real = open_images(path)
    require(args.features == "inception" or real.shape == images.shape,  # Inception resizes images
            f"{real.name} has shape {real.shape}, {images.name} {images.shape}: expected one shape")
    facts = {"reference": name, "reference_n": real.size, "reference_sha256": real.sha256}
    return measure(real, range(real.size)), facts


def metrics(fake, real, features):
    """{full name: value} of a pass against a reference; each name says the features and n."""
    thousands = lambda n: f"{n // 1000}k" if n % 1000 == 0 else str(n)
    of, n = "" if features == "inception" else f"-{features}", thousands(fake["n"])
    distance = frechet_distance(fake["mu"], fake["sigma"], real["mu"], real["sigma"])
    got = {f"{'FD' if of else 'FID'}{of}-{n}": distance}
    if fake["n"] >= SPLITS:
        score, std = inception_score(fake["p"], fake["p_log_p"], fake["counts"])
        got |= {f"IS{of}-{n}": score, f"IS{of}-{n} (std of splits)": std}
    if "stored" in real:
        both, k = (fake["stored"], real["stored"]), thousands(len(fake["stored"]))
        got[f"KID{of}-{k}"], got[f"KID{of}-{k} (std of subsets)"] = kernel_distance(*both)
        got[f"precision-{features}-{k}"], got[f"recall-{features}-{k}"] = precision_recall(*both)
    return got


# ---- The command line ----
def parse(argv):
    parser = plain_parser(__doc__)
    add = parser.add_argument
    add("source", help="a run of stage 2, a checkpoint (.pt, .pkl), a folder of images or an .npz")
    add("reference", nargs="?", help="a folder of images, an .npz (of images, or of mu and sigma), "
        "judge (--features judge, and its default) or cifar10 (the default for 32 x 32)")
    add("--features", choices=("inception", "judge"), default="inception",
        help="only the first gives FID; judge is a classifier of lab/teachers.py")
    add("--judge", metavar="FILE", help="another judge than Fashion-MNIST's")
    add("--n", type=count, help="images; 50,000, or all of a folder or a file, unless given")
    add("--trials", type=count, default=1, help="each with n fresh seeds (EDM: 3, SiD: 10)")
    add("--seed", type=at_least_0, default=0, help="of the first image")
    add("--nfe", type=checked(int, lambda n: n > 0 and n % 2, "odd number > 0"), default=1,
        help="evaluations: 1 is the generator; more, Heun's method with its teacher (EDM: 35)")
    add("--t-star", type=positive, help="unless it is the checkpoint's own (SiD: 2.5)")
    add("--teacher", help="of a run whose file does not name one, as in stage 2")
    add("--batch", type=count, default=250, help="images at once; changes no result")
    add("--stats", metavar="NPZ", help="only write mu and sigma of the source's features")
    add("--detector-sha256", help="what the Inception file must have")
    add("--device", default="auto", help="auto (the best one here), cpu, cuda or mps")
    add("--out", metavar="JSON", help="fid.json beside the source unless given")
    return parser.parse_intermixed_args(argv)  # flags may stand between source and reference


def check_flags(args, images):
    """UserError for flags that would be ignored, or would measure something else in silence."""
    size = images.size
    of_runs = args.nfe > 1 or args.t_star or args.teacher or args.seed or args.trials > 1
    require(not (size and of_runs), f"{args.source} holds images: --nfe, --t-star, --teacher, "
            "--seed and --trials are for runs and checkpoints")
    require(not size or (args.n or 0) <= size, f"--n {args.n}: {args.source} holds {size} images")
    require(args.nfe == 1 or not args.t_star, "--t-star is for one step, --nfe for more")
    require(args.features == "judge" or not args.judge, "--judge is for --features judge")
    require(args.features == "inception" or not args.detector_sha256,
            "--detector-sha256 is for --features inception")


def write_statistics(args, images, n, digest, measure):
    path, start = Path(args.stats), args.seed + (0 if images.size else APART)
    require(not args.reference and args.trials == 1, "--stats takes no reference and no --trials")
    require(path.suffix == ".npz" and path.parent.is_dir() and not path.exists(),
            f"--stats {path}: expected a new .npz file, in a folder that is there")
    got = measure(images, range(start, start + n))
    if rank_and_ranks()[0] == 0:
        with atomic(path) as temporary:
            np.savez(temporary, mu=got["mu"], sigma=got["sigma"], features=args.features, n=n,
                     detector_sha256=digest)
    print(f"{path}: mu and sigma of {images.name}, {n} images")


def read_results(path):
    """The list in fid.json, to which a result will be added. UserError if nothing can be added."""
    require(path.suffix == ".json" and path.parent.is_dir(),
            f"--out {path}: expected a .json file, in a folder that is there")
    with reading(path, "a list of results: move the file away, or name another --out"):
        results = json.loads(path.read_text()) if path.exists() else []
        require(isinstance(results, list), f"it holds a {type(results).__name__}")
    return results


def add_result(path, result, before):
    """Add to the list in fid.json, in place of what this command added `before`, under a lock."""
    with path.with_name(f".{path.name}.lock").open("a") as file:
        if sys.platform != "win32":  # which has no such locks
            import fcntl
            fcntl.lockf(file, fcntl.LOCK_EX)
        save([*(other for other in read_results(path) if other != before), result], path)


def summarise(values):
    """A metric's values -> {"mean", and of more than one trial "std" and "trials"}"""
    summary = {"mean": float(np.mean(values))}
    if len(values) > 1:
        summary |= {"std": float(np.std(values, ddof=1)), "trials": values}
    return summary


def report(args, facts, out):
    note = "" if args.features == "inception" else "; in the judge's features, which is not FID"
    against = f"{facts['reference']} ({facts.get('reference_n', 'mu and sigma')})"
    print(f"{facts['source']}: {facts['n']} images against {against}{note}")
    for name, value in facts.get("metrics", {}).items():
        spread = f" +- {value['std']:.2g}: {value['trials']}" if "std" in value else ""
        print(f"  {name:34}{value['mean']:.4g}{spread}")
    print(f"  {facts['images_s']:.0f} images/s; added to {out}")


@one_line_errors
def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    args = parse(words)
    device, path = pick_device(args.device), Path(args.source)
    if (path / "g_ema.pt").exists():  # a run
        path = path / "g_ema.pt"
    images = generated(path, args, device) if path.suffix in (".pt", ".pkl") else open_images(path)
    check_flags(args, images)
    n, out = args.n or images.size or 50_000, Path(args.out or path.parent / "fid.json")
    read_results(out)  # an error there comes before the work
    x = images.read([0]).to(device)
    detect, digest = load_detector(args, x)
    measure = partial(one_pass, detect=detect, batch=args.batch, device=device)
    if args.stats:
        return write_statistics(args, images, n, digest, measure)
    reference, facts = load_reference(args, images, detect(x)[0].shape[1], digest, measure)
    facts |= {"source": images.name, "source_sha256": images.sha256, "n": n, "seeds": [],
              "features": args.features, "detector_sha256": digest,
              "command": f"python eval_fid.py {shlex.join(words)}", "date": time.strftime("%F")}
    trials, before = [], None
    for first in range(args.seed, args.seed + args.trials * n, n):
        begun = time.monotonic()
        fake = measure(images, range(first, first + n))
        facts["images_s"] = n / (time.monotonic() - begun)  # with the time of the features
        facts["seeds"].append([first, first + n - 1])
        if rank_and_ranks()[0] == 0:
            trials.append(metrics(fake, reference, args.features))
            facts["metrics"] = {name: summarise([t[name] for t in trials]) for name in trials[0]}
            add_result(out, facts, before)  # each trial, so that an interruption loses only one
            before = json.loads(json.dumps(facts))
    report(args, facts, out)


if __name__ == "__main__":
    main()
