"""How the two embedded teachers were trained: diffusion models, by EDM's recipe at a small size.

    python lab/teachers.py shapes --amp bf16         26 minutes on two cores: a teacher of stage 2
    python lab/teachers.py miniature --amp bf16      90 minutes on two cores: a teacher of stage 3

Either command writes RUN/teacher.pt and continues after a kill. Copied to assets/, the file is the
embedded teacher. The file holds the weights in float16 and what a run compares with: the moments of
true images in the teacher's own features. The miniature's file holds its captions too.
"""
import copy
import importlib
import sys
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from common import (Run, at_least_0, count, draw_latents, dsm_loss, ema_beta, ema_update,
                    frechet_distance, moments, one_line_errors, p_edm, pick_device, plain_parser,
                    positive, real, save, seed_step, update)

import numpy as np
import shapes
import torch
from torch import nn
from torch.nn import functional as F

RECIPES = {  # EDM's (Karras et al. 2022, section 5), smaller; measured
    "shapes": {"steps": 5000, "batch": 128, "lr": 2e-3, "ema_half_life": 2e4, "psi_mean": -1.2,
               "psi_std": 1.2, "save_every": 500, "log_every": 100, "out": "runs/shapes_teacher"},
    "miniature": {"steps": 12_000, "batch": 64, "lr": 1e-3, "ema_half_life": 2e4, "psi_mean": -0.8,
                  "psi_std": 1.4, "save_every": 500, "log_every": 50,
                  "out": "runs/miniature_teacher"}}
WARM_UP = 200  # steps in which the lr rises from 0
DROPPED = 0.1  # the share of labels or captions dropped: the teacher serves without them too
SHAPES_NET = {"img_resolution": 16, "label_dim": 10, "model_channels": 24,
              "channel_mult": [1, 2, 2], "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.0}
TRUE = 5000  # true images in the moments that stage 3 compares with


def train_edm(args, net, betas, draw):
    """A diffusion model by (B.2). draw(step) -> a denoiser, which is net with the conditions of the
    step bound to it, and x_0. -> the run, and the average of net over the training, in eval mode"""
    ema, device = copy.deepcopy(net).eval().requires_grad_(False), next(net.parameters()).device
    optimiser = torch.optim.Adam(net.parameters(), betas=betas, fused=True)
    run = Run(args, args.out, {}, ema, {}, net=net, ema=ema, optimiser=optimiser)
    for step in run.steps():
        seed_step(args.seed, step)
        denoiser, x_0 = draw(step)
        t = p_edm((args.batch, *[1] * (x_0.ndim - 1)), args.psi_mean, args.psi_std, device=device)
        loss = dsm_loss(denoiser, x_0.to(device), t)
        run.add(loss=loss)
        loss.mean().backward()
        update(optimiser, min(1, (step + 1) / WARM_UP) * (args.lr * (1 - step / args.steps)))
        ema_update(ema, net, ema_beta(step * args.batch, args.batch, args.ema_half_life))
        if run.due(args.log_every):
            run.write()
    return run, ema


def save_teacher(run, ema, net_args, meta):
    """RUN/teacher.pt, in the form of a g_ema.pt, with the weights in float16."""
    args = run.args
    meta = meta | {"steps": args.steps, "batch": args.batch, "seed": args.seed}
    save({"net_args": net_args, "state_dict": ema.half().state_dict(), "t_star": args.t_star,
          "meta": meta}, run.folder / "teacher.pt")


# ---- Stage 2's teacher ----
def train_shapes(args, device):
    """A class-conditional model of drawn shapes, 16x16 pixels in ten classes."""
    edm = importlib.import_module("02_edm_cifar")
    torch.manual_seed(args.seed)
    net = edm.make_unet(**SHAPES_NET).to(device)
    net.model.label_dropout = DROPPED

    def draw(step):
        images, labels = shapes.draw_shapes(args.batch, [args.seed, step])
        labels = F.one_hot(labels, len(shapes.SHAPES)).float().to(device)
        return edm.bind_labels(net, labels, args.amp), images

    run, ema = train_edm(args, net, (0.9, 0.999), draw)
    stored = copy.deepcopy(ema).half().float()  # the weights as the file has them
    save_teacher(run, ema, SHAPES_NET, measure_shapes(args, edm, stored))
    print(f"next: python 02_edm_cifar.py --teacher {args.out}/teacher.pt --preset shapes")


def measure_shapes(args, edm, net):
    """-> what a run compares with: the moments of true shapes in the features of net, and the
    Frechet distances of other true shapes and of the teacher's own samples to these moments."""
    device, n = next(net.parameters()).device, edm.FD_IMAGES
    draw_true = lambda n, key: shapes.draw_shapes(n, [key, args.seed])[0].to(device)
    mu, sigma = moments(edm.teacher_features(net, draw_true(10 * n, 1)).cpu())
    meta = {"data": "shapes", "mu": mu, "sigma": sigma}
    z, labels = [v.to(device) for v in draw_latents(range(n), net.image_shape, net.label_dim)]
    meta["fd_teacher"] = edm.truth_distance(net, edm.sample_teacher(net, z, labels), meta)
    meta["fd_real"] = edm.truth_distance(net, draw_true(n, 2), meta)
    print(f"Frechet distance of {n} true shapes {meta['fd_real']:.4f}, "
          f"of the teacher's {meta['fd_teacher']:.4f}")
    return meta


# ---- Stage 3's teacher ----
def initialise(pixart):
    """The weights that PixArt and DiT start from: at first there is no text and no output."""
    for layer in pixart.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    for layer in (pixart.t_embedder.mlp[0], pixart.t_embedder.mlp[2], pixart.t_block[1],
                  pixart.y_embedder.y_proj.fc1, pixart.y_embedder.y_proj.fc2):
        nn.init.normal_(layer.weight, std=0.02)
    for layer in (*[block.cross_attn.proj for block in pixart.blocks], pixart.final_layer.linear):
        nn.init.zeros_(layer.weight)


def drop_captions(net, x, t, ids, mask):
    """A Miniature's denoiser, where y_embedding takes the place of a share of the captions."""
    caption = net.text(ids, mask).last_hidden_state
    dropped = torch.rand(len(x), 1, 1, device=x.device) < DROPPED
    caption = torch.where(dropped, net.net.model.y_embedder.y_embedding, caption)
    return net.net(x, t, caption, mask)


def train_miniature(args, device):
    """PixArt's transformer with a T5, small, both trained on captioned shapes. A tenth of the
    combinations of shape and colours is held out; the test prompts contain some of them."""
    t2i = importlib.import_module("03_pixart_t2i")
    torch.manual_seed(args.seed)
    net = t2i.Miniature(t2i.MINI_NET, t2i.MINI_TEXT)
    initialise(net.net.model)
    net = net.to(device)
    seen = [prompt for prompt in shapes.PROMPTS if not shapes.held_out(prompt)]
    tokens = t2i.load_transformers().ByT5Tokenizer()(
        [shapes.caption_of(prompt) for prompt in seen], padding="max_length",
        max_length=t2i.MINI_NET["caption_tokens"], return_tensors="pt").to(device)

    def draw(step):
        random = np.random.default_rng([args.seed, step])
        chosen = random.integers(len(seen), size=args.batch)
        cond = tokens.input_ids[chosen], tokens.attention_mask[chosen]
        images = torch.stack([shapes.draw_captioned(seen[k], random) for k in chosen])
        return t2i.bind_caption(partial(drop_captions, net), cond, args.amp), images

    run, ema = train_edm(args, net, (0.9, 0.99), draw)
    stored = copy.deepcopy(ema).half().float()
    save_teacher(run, ema, net.net_args, describe_captions(t2i, stored.net))
    print(f"next: python 03_pixart_t2i.py --teacher {args.out}/teacher.pt")


def describe_captions(t2i, net):
    """-> what stage 3 reads in the file: the captions, those of the test, and the moments of TRUE
    images of the tested captions in the features of net; the Frechet distance of other ones."""
    mu, sigma = moments(t2i.token_features(net, shapes.draw_tested(TRUE, 1)))
    others = moments(t2i.token_features(net, shapes.draw_tested(shapes.TESTED, 2)))
    return {"data": "captioned shapes", "mu": mu, "sigma": sigma,
            "fd_real": frechet_distance(*others, mu, sigma),
            "prompts": [shapes.caption_of(prompt) for prompt in shapes.PROMPTS],
            "tested": [shapes.caption_of(prompt) for prompt in shapes.tested_prompts()]}


# ---- The command line ----
def parse(argv):
    words = sys.argv[1:] if argv is None else argv
    parser = plain_parser(__doc__)
    add = parser.add_argument
    add("teacher", choices=RECIPES, help="of which stage: shapes (2) or miniature (3)")
    add("--amp", choices=("none", "bf16"), default="none", help="bf16 where the CPU has it")
    for flag, kind in (("--steps", count), ("--batch", count), ("--lr", positive),
                       ("--psi-mean", real), ("--psi-std", positive), ("--ema-half-life", positive),
                       ("--save-every", count), ("--log-every", count), ("--seed", at_least_0)):
        add(flag, type=kind, help="as in the stages")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--out", help="the run's folder")
    add("--fresh", action="store_true", help="start anew; an older run is moved aside")
    recipe = RECIPES.get(words[0] if words else "", {})
    parser.set_defaults(seed=0, batch_gpu=None, t_star=2.5, **recipe)  # t*: Table 5
    return parser.parse_args(words)


@one_line_errors
def main(argv=None):
    args = parse(argv)
    train = {"shapes": train_shapes, "miniature": train_miniature}[args.teacher]
    train(args, pick_device(args.device))


if __name__ == "__main__":
    main()
