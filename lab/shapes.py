"""Drawn shapes: true images without end for the embedded teachers, and a reader of their classes.

    python lab/shapes.py --draw 50000 --out shapes.npz         a minute: a reference for eval_fid.py
    python lab/shapes.py runs/shapes-sim-phuber-0 --teacher-too        class accuracy of stage 2
    python lab/shapes.py runs/miniature-sim-phuber-0            accuracy of stage 3, for captions

Accuracy is the share of images that show what was asked for. Image k is drawn from seed k. The
table goes to RUN/shapes.json too. Its row of true images says how often the reader is right.
"""
import functools
import importlib
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from common import (at_least_0, atomic, count, draw_latents, one_line_errors, pick_device,
                    plain_parser, reading, require, save, to_uint8)

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw

# ---- Shapes of ten classes ----
ROUND = [(math.cos(math.pi * i / 20), math.sin(math.pi * i / 20)) for i in range(40)]
SQUARE = [(0.8, 0.8), (-0.8, 0.8), (-0.8, -0.8), (0.8, -0.8)]
PLUS = [(0.35, 1), (0.35, 0.35), (1, 0.35), (1, -0.35), (0.35, -0.35), (0.35, -1),
        (-0.35, -1), (-0.35, -0.35), (-1, -0.35), (-1, 0.35), (-0.35, 0.35), (-0.35, 1)]
SHAPES = {  # corners in a square of side 2, y downwards; the size of the hole, in shapes
    "circle": (ROUND, 0), "ring": (ROUND, 0.55), "square": (SQUARE, 0), "frame": (SQUARE, 0.55),
    "triangle": ([(0, -1), (0.95, 0.75), (-0.95, 0.75)], 0),
    "diamond": ([(0, 1), (0.75, 0), (0, -1), (-0.75, 0)], 0),
    "plus": (PLUS, 0), "cross": ([(0.7 * (x - y), 0.7 * (x + y)) for x, y in PLUS], 0),
    "bar": ([(1, 0.35), (-1, 0.35), (-1, -0.35), (1, -0.35)], 0),
    "pillar": ([(0.35, 1), (-0.35, 1), (-0.35, -1), (0.35, -1)], 0)}
RADII = 0.24, 0.4  # the smallest and the largest radius, in images
APART = 10**9  # the first seed of --draw, which no training and no other evaluation has


def draw_shape(name, x, y, radius, colour, background, size, fine=8):
    """A shape centred at (x, y) pixels, in colours RGB in [0, 1]. -> float32 (size, size, 3) in
    [0, 1]. The shape is drawn `fine` times as large and reduced, so that its edges are smooth."""
    corners, hole = SHAPES[name]
    mask = Image.new("L", (size * fine, size * fine))
    for r, ink in ((radius, 255), (radius * hole, 0))[:2 if hole else 1]:
        outline = [(fine * (x + r * a), fine * (y + r * b)) for a, b in corners]
        ImageDraw.Draw(mask).polygon(outline, ink)
    mask = np.asarray(mask.reduce(fine), dtype=np.float32)[:, :, None] / 255
    return background + (colour - background) * mask


def draw_shapes(n, seed, size=16, labels=None):
    """n random shapes, of random classes unless labels (n,) says which; seed is an int or a list of
    ints. -> images (n, 3, size, size) in [-1, 1], labels (n,)"""
    random = np.random.default_rng(seed)
    labels = random.integers(len(SHAPES), size=n) if labels is None else np.asarray(labels)
    images = np.empty((n, size, size, 3), dtype=np.float32)
    for image, label in zip(images, labels):
        radius = size * random.uniform(*RADII)
        x, y = random.uniform(radius, size - radius, 2)
        colours = random.uniform(size=(2, 3))
        while np.linalg.norm(colours[0] - colours[1]) < 0.6:  # a shape that can hardly be seen
            colours = random.uniform(size=(2, 3))
        image[:] = draw_shape(list(SHAPES)[label], x, y, radius, *colours, size)
    images = rearrange(torch.from_numpy(images), "n h w c -> n c h w") * 2 - 1
    return images, torch.from_numpy(labels)


@functools.cache
def templates(size):
    """Every shape at six radii, in steps of half a pixel -> classes (T,); means (T, 1) and norms
    (T, 1) of their masks; and the masks themselves (T, size^2), with mean 0 and norm 1."""
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
    """uint8 (N, 3, H, W) -> classes (N,), and colours and backgrounds (N, 3) in about [0, 1]: those
    of the template that leaves the least squared error in the two colours that suit it best."""
    (labels, mean, norm, masks), found = templates(images.shape[-1]), []
    for x in images.flatten(2).float().div(255).split(100):
        along = x @ masks.T  # (B, 3, T)
        best = along.square().sum(1).argmax(1)  # it explains most of the variance of the pixels
        contrast = along[torch.arange(len(x)), :, best] / norm[best]
        background = x.mean(2) - contrast * mean[best]
        found.append((labels[best], background + contrast, background))
    return [torch.cat(column) for column in zip(*found)]


# ---- Captioned shapes ----
COLOURS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.6, 0.15), "blue": (0.1, 0.2, 0.9),
           "yellow": (0.95, 0.9, 0.1), "purple": (0.6, 0.15, 0.75), "cyan": (0.2, 0.9, 0.95),
           "white": (1.0, 1.0, 1.0), "black": (0.0, 0.0, 0.0)}
SIZES = {"small": (0.24, 0.29), "large": (0.35, 0.4)}  # radii, in images
PROMPTS = [(size, colour, shape, background) for size in SIZES for colour in COLOURS
           for shape in SHAPES for background in COLOURS if background != colour]
TESTED = 1000  # prompts of a test


def caption_of(prompt):
    return "a {} {} {} on a {} background".format(*prompt)


def held_out(prompt):
    """Is it in the tenth of the combinations on which the teacher is never trained?"""
    _, colour, shape, background = prompt
    names = list(COLOURS)
    number = 3 * list(SHAPES).index(shape) + names.index(colour) + 7 * names.index(background)
    return number % 10 == 0


def tested_prompts():
    """Always the same prompts, with those that are held out among them."""
    chosen = np.random.default_rng(0).integers(len(PROMPTS), size=TESTED)
    return [PROMPTS[k] for k in chosen]


def draw_captioned(prompt, random, size=16):
    """A true image of a prompt, with the shape near the centre -> (3, size, size) in [-1, 1]"""
    word, colour, shape, background = prompt
    radius = size * random.uniform(*SIZES[word])
    x, y = size / 2 + random.uniform(-1.5, 1.5, 2)
    colours = [np.array(COLOURS[name], dtype=np.float32) for name in (colour, background)]
    image = torch.from_numpy(draw_shape(shape, x, y, radius, *colours, size))
    return rearrange(image, "h w c -> c h w") * 2 - 1


def draw_tested(n, seed):
    """n true images of the tested prompts in turn -> (n, 3, 16, 16) in [-1, 1]"""
    random, prompts = np.random.default_rng([seed, APART]), tested_prompts()
    return torch.stack([draw_captioned(prompts[k % TESTED], random) for k in range(n)])


def prompt_accuracy(images, prompts):
    """Images (N, 3, 16, 16) in [-1, 1] of N prompts -> the shares with the right shape, colour and
    background; their mean, also over prompts held out; and the share with all three right."""
    colours, names = torch.tensor(list(COLOURS.values())), list(COLOURS)
    classes, *read = read_shapes(to_uint8(images))
    read = torch.stack([classes, *[torch.cdist(v, colours).argmin(1) for v in read]], dim=1)
    asked = [(list(SHAPES).index(shape), names.index(colour), names.index(background))
             for _, colour, shape, background in prompts]
    right = (read == torch.tensor(asked)).double()
    new = torch.tensor([held_out(prompt) for prompt in prompts])
    shares = dict(zip(("shape", "colour", "background"), right.mean(0).tolist()))
    return shares | {"mean": right.mean().item(), "all": right.prod(1).mean().item(),
                     "held_out": right[new].mean().item()}


# ---- The accuracy of a run ----
def judge_classes(args, device, n):
    """A run of stage 2 -> {set of images: {"class": share}}"""
    edm = importlib.import_module("02_edm_cifar")
    g, t_star, meta = edm.load_denoiser(args.run)
    require((g.image_shape, g.label_dim) == ((3, 16, 16), len(SHAPES)),
            f"{args.run} makes images {g.image_shape} of {g.label_dim} classes: expected shapes")
    z, labels = [v.to(device) for v in draw_latents(range(n), g.image_shape, g.label_dim)]
    sets = {"true images": draw_shapes(n, [APART, 1], labels=labels.argmax(1).cpu())[0],
            "one step": edm.sample_one_step(g.to(device), t_star, z, labels)}
    if args.teacher_too:
        named = meta.get("teacher", "shapes")
        require(":" not in named, f"{args.run}: its teacher {named} is no teacher of shapes")
        d_q = edm.load_teacher(named)[0].to(device)
        sets["teacher, 35 evaluations"] = edm.sample_teacher(d_q, z, labels)
    right = {name: read_shapes(to_uint8(x).cpu())[0] == labels.argmax(1).cpu()
             for name, x in sets.items()}
    return {name: {"class": v.double().mean().item()} for name, v in right.items()}


def judge_captions(args, device, n):
    """A run of stage 3's miniature -> {set of images: prompt_accuracy}"""
    t2i = importlib.import_module("03_pixart_t2i")
    miniature, t_star, meta = t2i.load_pipeline(args.run, device)
    g, prompts = miniature.net, tested_prompts()[:n]
    captions = miniature.encode([caption_of(prompt) for prompt in prompts])
    cond = t2i.pad(captions, g.model.tokens, device)
    z = draw_latents(range(len(prompts)), g.model.image_shape)[0].to(device)
    sets = {"true images": draw_tested(len(prompts), 2),
            "one step": t2i.sample_one_step(g, t_star, z, *cond)}
    if args.teacher_too:
        d_q = t2i.load_teacher(meta["teacher"], device)[0].net
        guided = t2i.Guided(d_q, meta["guidance"]).to(device)
        sets["teacher, 14 steps"] = t2i.sample_teacher(guided, z, *cond)
    return {name: prompt_accuracy(x.cpu(), prompts) for name, x in sets.items()}


def judge(args):
    """The table of a run, on the screen and in RUN/shapes.json."""
    folder, device = Path(args.run), pick_device(args.device)
    with reading(folder / "g_ema.pt", "a run of stage 2 or of stage 3's miniature"):
        saved = torch.load(folder / "g_ema.pt", map_location="meta", weights_only=True)
        of_captions = "text" in saved["net_args"]
    n = args.n or (TESTED if of_captions else 10_000)
    rows = (judge_captions if of_captions else judge_classes)(args, device, n)
    print(f"{n} images".ljust(25), *[f"{key:>10}" for key in rows["one step"]])
    for name, row in rows.items():
        print(f"{name:25}", *[f"{value:10.1%}" for value in row.values()])
    save({"n": n, **rows}, folder / "shapes.json")


def draw(args):
    """--draw: an .npz of uint8 images (N, 16, 16, 3) and their labels (N,)."""
    seeds = range(APART + args.seed, APART + args.seed + args.draw)
    images, labels = zip(*[draw_shapes(1, [k, 1, 1]) for k in seeds])  # no seed of the teacher's
    pixels = rearrange(to_uint8(torch.cat(images)), "n c h w -> n h w c")
    with atomic(args.out) as temporary:
        np.savez(temporary, images=pixels, labels=torch.cat(labels))
    print(f"{args.draw} shapes: {args.out}")


@one_line_errors
def main(argv=None):
    parser = plain_parser(__doc__)
    add = parser.add_argument
    add("run", nargs="?", help="the folder of a run of stage 2, or of stage 3's miniature")
    add("--n", type=count, help="images; 10,000 or, of stage 3, 1000 unless given")
    add("--teacher-too", action="store_true", help="the run's teacher as well, which takes minutes")
    add("--device", default="auto", help="auto (the best one here), cpu, cuda or mps")
    add("--draw", type=count, metavar="N", help="draw N true shapes and write them to --out")
    add("--seed", type=at_least_0, default=0, help="of the first shape of --draw")
    add("--out", default="shapes.npz", help="the file of --draw")
    args = parser.parse_args(argv)
    require((args.run is None) != (args.draw is None), "expected a run or --draw N, and not both")
    require(args.out.endswith(".npz"), f"--out {args.out}: expected an .npz file")
    return judge(args) if args.run else draw(args)


if __name__ == "__main__":
    main()
