"""Drawn shapes with captions: true images for stage 3's miniature, and a reader of what they show.

    python lab/shapes.py runs/miniature-sim-phuber-0 --teacher-too     how often are captions right?

Accuracy is the share of images that show what was asked for. The table is written to
RUN/shapes.json too. The table's row of true images says how often the reader is right.
"""
import functools
import importlib
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw

from common import (count, draw_latents, one_line_errors, pick_device, plain_parser, reading,
                    require, save, to_uint8)

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
APART = 10**9  # a seed that no training has


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
def check_run(args):
    """The table of a run of stage 3's miniature, on the screen and in RUN/shapes.json."""
    t2i = importlib.import_module("03_pixart_t2i")
    folder, device = Path(args.run), pick_device(args.device)
    with reading(folder / "g_ema.pt", "a run of stage 3's miniature"):
        miniature, t_star, meta = t2i.load_pipeline(folder, device)
        require(isinstance(miniature, t2i.Miniature), "no miniature")
    g, prompts = miniature.net, tested_prompts()[:args.n]
    captions = miniature.encode([caption_of(prompt) for prompt in prompts])
    cond = t2i.pad(captions, g.model.tokens, device)
    z, _ = draw_latents(range(len(prompts)), g.model.image_shape, device=device)
    sets = {"true images": draw_tested(len(prompts), 2),
            "one step": t2i.sample_one_step(g, t_star, z, *cond)}
    if args.teacher_too:
        d_q = t2i.load_teacher(meta["teacher"], device)[0].net
        guided = t2i.Guided(d_q, meta["guidance"])
        sets["teacher, 14 steps"] = t2i.sample_teacher(guided, z, *cond)
    rows = {name: prompt_accuracy(x.cpu(), prompts) for name, x in sets.items()}
    print(f"{len(prompts)} images".ljust(25), *[f"{key:>10}" for key in rows["one step"]])
    for name, row in rows.items():
        print(f"{name:25}", *[f"{value:10.1%}" for value in row.values()])
    save({"n": len(prompts), **rows}, folder / "shapes.json")


@one_line_errors
def main(argv=None):
    parser = plain_parser(__doc__)
    add = parser.add_argument
    add("run", help="the folder of a run of stage 3's miniature")
    add("--n", type=count, default=TESTED, help="images")
    add("--teacher-too", action="store_true", help="the run's teacher as well, which takes longer")
    add("--device", default="auto", help="auto (the best one here), cpu, cuda or mps")
    check_run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
