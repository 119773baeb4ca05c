"""How the embedded teachers, and the judge of images, were trained: EDM's recipe at a small size.

    python lab/teachers.py judge --data DIR           20 minutes on a busy core: stage 2's judge
    python lab/teachers.py fashion --data DIR --judge runs/fashion_judge/judge.pt       two hours
    python lab/teachers.py miniature --amp bf16       90 minutes on two cores: a teacher of stage 3
    torchrun --standalone --nproc_per_node=2 lab/teachers.py fashion --data DIR

DIR holds Fashion-MNIST or pictures of your own: lab/pictures.py lists the forms. Each command
writes RUN/teacher.pt or RUN/judge.pt, with weights in float16, and continues after a kill. Copied
to assets/, the file is the embedded one.
"""
import copy
import importlib
import sys
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import numpy as np
import pictures
import shapes
import torch
from torch import nn
from torch.nn import functional as F

from common import (Run, as_denoiser, at_least_0, count, draw_latents, draw_times, dsm_loss,
                    ema_beta, ema_update, frechet_distance, micro_batches, moments, one_line_errors,
                    pick_device, plain_parser, positive, progress, real, require, save, seed_step,
                    update)

edm = importlib.import_module("02_edm_cifar")

RECIPES = {  # EDM's (Karras et al. 2022, section 5), smaller; measured
    "fashion": {"steps": 6000, "batch": 64, "lr": 1e-3, "ema_half_life": 2e4, "psi_mean": -0.8,
                "psi_std": 1.4, "save_every": 250, "log_every": 50, "out": "runs/fashion_teacher"},
    "judge": {"steps": 5000, "batch": 128, "lr": 2e-3, "ema_half_life": 2e4,
              "save_every": 250, "log_every": 50, "out": "runs/fashion_judge"},
    "miniature": {"steps": 12_000, "batch": 64, "lr": 1e-3, "ema_half_life": 2e4, "psi_mean": -0.8,
                  "psi_std": 1.4, "save_every": 500, "log_every": 50,
                  "out": "runs/miniature_teacher"}}
WARM_UP = 200  # steps in which the lr rises from 0
DROPPED = 0.1  # the share of labels or captions dropped: the teacher serves without them too
TRUE = 5000  # true images in the moments that stage 3 compares with


def train(args, net, betas, draw, loss_of):
    """Adam on the mean of loss_of(*draw(random)). draw returns tensors with one row for each image,
    loss_of returns (B,). -> the run, and the average of net over the training, in eval mode"""
    ema, device = copy.deepcopy(net).eval().requires_grad_(False), next(net.parameters()).device
    optimiser = torch.optim.Adam(net.parameters(), betas=betas, fused=True)
    run = Run(args, args.out, {}, ema, {}, net=net, ema=ema, optimiser=optimiser)
    for step in run.steps():
        (rows,) = micro_batches(draw(seed_step(args.seed, step)))  # the rows of this rank
        loss = loss_of(*[v.to(device) for v in rows])
        run.add(loss=loss)
        (loss.sum() / args.batch).backward()
        update(optimiser, min(1, (step + 1) / WARM_UP) * (args.lr * (1 - step / args.steps)))
        ema_update(ema, net, ema_beta(step * args.batch, args.batch, args.ema_half_life))
        if run.due(args.log_every):
            run.write()
    return run, ema


def round_half(net):
    """-> a copy in float32 with the weights that a file in float16 has."""
    return copy.deepcopy(net).half().float()


def save_half(run, name, net, net_args, meta, **more):
    """RUN/NAME.pt, with the weights in float16 and what the file is, in meta."""
    args, state = run.args, {key: w.half() for key, w in net.state_dict().items()}
    meta = meta | {"steps": args.steps, "batch": args.batch, "seed": args.seed}
    save({"net_args": net_args, "state_dict": state, "meta": meta, **more},
         run.folder / f"{name}.pt")


# ---- Stage 2's teacher and its judge ----
def draw_pictures(args, images, labels, random):
    """-> pictures (B, C, H, W) uint8; classes (B,); 1 where a picture is flipped, else 0 (B, 1)"""
    k = torch.randint(len(images), (args.batch,), generator=random)
    flipped = torch.randint(2, (args.batch, 1), generator=random)
    x = torch.where(flipped[:, :, None, None] == 1, images[k].flip(3), images[k])
    return x, labels[k], flipped


def unet_args(side, channels, classes):
    """A small U-Net of three levels, with attention at the lowest one. The one augmentation that
    the network is told of is a flip."""
    return {"img_resolution": side, "img_channels": channels, "label_dim": classes,
            "augment_dim": 1, "model_channels": 16, "channel_mult": [1, 2, 4], "num_blocks": 1,
            "attn_resolutions": [side // 4], "dropout": 0.0}


def train_unet(args, device):
    """A class-conditional teacher. The network is told which pictures are flipped, as EDM does, so
    that its samples are not flipped: the shoes of Fashion-MNIST point to the left."""
    images, labels = pictures.load_pictures(args.data)
    classes = int(labels.max()) + 1
    net_args = unet_args(images.shape[2], images.shape[1], classes)
    torch.manual_seed(args.seed)
    net = edm.make_unet(**net_args).to(device)
    judge = edm.load_judge(args.judge, net.image_shape).to(device) if args.judge else None
    net.model.label_dropout = DROPPED

    def draw(random):
        x, label, flipped = draw_pictures(args, images, labels, random)
        t = draw_times(args, "psi", (args.batch, 1, 1, 1), generator=random)
        return x.float() / 127.5 - 1, t, F.one_hot(label, classes).float(), flipped.float()

    def loss_of(x_0, t, *cond):
        return dsm_loss(as_denoiser(net, args.amp, *cond), x_0, t)

    run, ema = train(args, net, (0.9, 0.999), draw, loss_of)
    if run.is_first:
        meta = judge_teacher(round_half(ema), judge) if judge else {}
        save_half(run, "teacher", ema, net_args, meta, t_star=args.t_star)
        print(f"next: python 02_edm_cifar.py --teacher {args.out}/teacher.pt --preset fashion",
              f"--judge {args.judge}" if judge else "")


def judge_teacher(net, judge):
    """-> what stage 2 shows beside a run: the judge's figures of the teacher with 35 evaluations"""
    device = next(net.parameters()).device
    z, labels = draw_latents(range(edm.FINAL), net.image_shape, net.label_dim, device=device)
    pieces = list(zip(z.split(250), labels.split(250)))
    x = torch.cat([edm.sample_teacher(net, *piece) for piece in progress(pieces, "35 evaluations")])
    judged = {f"{key}_teacher": v for key, v in edm.grade(judge, x, labels).items()}
    print(f"{edm.FINAL} images of the teacher: {judged}")
    return {"judged": judged, "judge_sha256": judge.sha256}


def train_judge(args, device):
    """A classifier of pictures, half of which are flipped."""
    images, labels = pictures.load_pictures(args.data)
    tested = pictures.load_pictures(args.data, "test")
    net_args = {"channels": images.shape[1], "side": images.shape[2],
                "classes": int(labels.max()) + 1}
    require(tested[0].shape[1:] == images.shape[1:] and tested[1].max() < net_args["classes"],
            f"{args.data}: the pictures of the test have another shape or other classes")
    torch.manual_seed(args.seed)
    judge = edm.Judge(**net_args).to(device)

    def draw(random):
        return draw_pictures(args, images, labels, random)[:2]

    def loss_of(x, label):
        return F.cross_entropy(judge(x)[1], label, reduction="none")

    run, ema = train(args, judge, (0.9, 0.999), draw, loss_of)
    if run.is_first:
        some = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))
        some = some[:len(tested[0])]
        meta = describe_truth(round_half(ema), tested, (images[some], labels[some]))
        save_half(run, "judge", ema, net_args, meta)
        print(f"{len(tested[0])} test pictures: {meta['floor']}")


@torch.no_grad()
def describe_truth(judge, tested, others):
    """Pictures and labels of the test, and as many others, which the judge has learned from -> the
    meta of the judge's file: the moments of the test, the distance of the others to these moments,
    and the share of the test that the judge has right."""
    device, classes = next(judge.parameters()).device, judge.head.out_features
    mu, sigma = moments(torch.cat([judge(x.to(device))[0].cpu() for x in tested[0].split(500)]))
    judge.meta = {"mu": mu, "sigma": sigma}
    of_test, of_others = [edm.grade(judge, x.to(device) / 127.5 - 1, F.one_hot(labels, classes))
                          for x, labels in (tested, others)]
    judge.meta["floor"] = {"fd_floor": of_others["fd"], "n_floor": len(others[0]),
                           "class_accuracy_floor": of_test["class_accuracy"]}
    return judge.meta


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
    tokens = t2i.transformers.ByT5Tokenizer()(
        [shapes.caption_of(prompt) for prompt in seen], padding="max_length",
        max_length=t2i.MINI_NET["caption_tokens"], return_tensors="pt").to(device)

    def draw(random):
        numpy_random = np.random.default_rng(random.initial_seed())
        chosen = numpy_random.integers(len(seen), size=args.batch)
        images = torch.stack([shapes.draw_captioned(seen[k], numpy_random) for k in chosen])
        t = draw_times(args, "psi", (args.batch, 1, 1, 1), generator=random)
        return images, t, tokens.input_ids[chosen], tokens.attention_mask[chosen]

    def loss_of(x_0, t, *cond):
        return dsm_loss(as_denoiser(partial(drop_captions, net), args.amp, *cond), x_0, t)

    run, ema = train(args, net, (0.9, 0.99), draw, loss_of)
    if run.is_first:
        meta = describe_captions(t2i, round_half(ema).net)
        save_half(run, "teacher", ema, net.net_args, meta, t_star=args.t_star)
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
    parser = plain_parser(__doc__)
    add = parser.add_argument
    add("net", choices=RECIPES, help="judge and fashion are of stage 2, miniature of stage 3")
    add("--data", metavar="DIR", help="pictures, of judge and fashion")
    add("--judge", metavar="FILE", help="a judge's file, to measure the samples of fashion")
    add("--amp", choices=("none", "bf16"), default="none", help="bf16 where the CPU has it")
    for flag, kind in (("--steps", count), ("--batch", count), ("--lr", positive),
                       ("--psi-mean", real), ("--psi-std", positive), ("--ema-half-life", positive),
                       ("--save-every", count), ("--log-every", count), ("--seed", at_least_0)):
        add(flag, type=kind, help="as in the stages")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--out", help="the run's folder")
    add("--fresh", action="store_true", help="start anew; an older run is moved aside")
    args = parser.parse_args(argv)
    parser.set_defaults(seed=0, batch_gpu=None, t_star=2.5, t_min=0.0, t_max=1e9, truncate="clamp",
                        **RECIPES[args.net])
    if args.net == "judge":
        require(args.psi_mean is args.psi_std is None and args.amp == "none",
                "--psi-mean, --psi-std and --amp are not for judge")
    require(args.net == "fashion" or not args.judge, "--judge is for fashion")
    require(bool(args.data) == (args.net != "miniature"),
            "judge and fashion learn from pictures, miniature does not: expected --data DIR")
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    args = parse(argv)
    train_net = {"fashion": train_unet, "judge": train_judge,
                 "miniature": train_miniature}[args.net]
    train_net(args, pick_device(args.device))


if __name__ == "__main__":
    main()
