"""Stage 2: an EDM diffusion model of images, 35 evaluations a sample, becomes a one-step generator.

    python 02_edm_cifar.py --distance phuber                        six minutes on two cores: shapes
    python 02_edm_cifar.py --teacher uncond --batch-gpu 32          CIFAR-10 with the settings of Table 5
    torchrun --standalone --nproc_per_node=8 02_edm_cifar.py --teacher uncond
    python 02_edm_cifar.py --sample runs/shapes-sim-phuber-0 --n 64 --teacher-sample --out grid.png
    python 02_edm_cifar.py --bench --teacher uncond --batch 256 --batch-gpu 32

The lines of Algorithm 2 are those of 01_toy_2d.py; a network, a teacher and the shape of the data differ.
Expect shapes of the right class on varied backgrounds, and about the teacher's Frechet distance.
"""
import argparse
import copy
import importlib
import io
import math
import pickletools
from functools import partial
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch.nn import functional as F

from common import (SHAPES, Block, Log, Parser, Speed, UserError, accumulate, add_image_arguments,
                    add_method_arguments, add_run_arguments, adopt, annealed, atomic, batch_sum, bench, blame,
                    count_flops, draw_latents, draw_shapes, dsm_loss, edm_sampler, ema_beta, ema_update,
                    fetch, image_grid, lambda_edm, load_generator, make_distance, make_generator_loss,
                    make_times, make_unet, my_share, number, one_line_errors, open_run, pick_device, plot_log,
                    replicate, reporter, require, resume, save, save_generator, save_picture, seed_step,
                    settle, sha256, to_uint8, train_edm, train_only, world)
from eval_fid import frechet_distance, moments, teacher_features

# ---- Settings ----
PAPER = {  # Table 5, (B.5)-(B.10); what the paper leaves open (steps, EMA, dropout, eps) as in SiD's code
    "method": "sim", "sid_alpha": 1.0, "steps": 2_000_000, "batch": 256, "lr": 1e-5, "anneal": "none",
    "t_star": 2.5, "p_theta": "lognormal", "p_mean": -3.5, "p_std": 2.5, "psi_mean": -1.2, "psi_std": 1.2,
    "psi_updates": 1, "ema_half_life": 5e5, "dropout": 0.13, "adam_eps": 1e-8, "amp": "none",
    "save_every": 1000, "log_every": 50}
PRESETS = {"paper": PAPER,
           "sid": PAPER | {"method": "sid", "sid_alpha": 1.2, "p_theta": "karras"},  # SiD's code
           "shapes": PAPER | {  # measured (README): so small an image needs more of the large t
               "steps": 900, "batch": 32, "lr": 4e-4, "anneal": "linear", "t_star": 5.0, "p_mean": 0.0,
               "p_std": 1.6, "psi_mean": 0.0, "psi_std": 1.6, "ema_half_life": 2e3, "dropout": 0.0,
               "save_every": 100, "log_every": 10},
           "teacher": PAPER | {  # --train-teacher; the recipe of EDM, smaller
               "steps": 5000, "batch": 128, "lr": 2e-3, "anneal": "linear", "ema_half_life": 2e4,
               "dropout": 0.0, "save_every": 500, "log_every": 100}}
SHAPES_NET = {"img_resolution": 16, "label_dim": len(SHAPES), "model_channels": 24, "channel_mult": [1, 2, 2],
              "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.0}
VP = {"img_resolution": 32, "augment_dim": 9, "dropout": 0.13}
VE = VP | {"embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "residual",
           "resample_filter": [1, 3, 3, 1]}
CIFAR = {"uncond": VP, "cond": VP | {"label_dim": 10}, "uncond-ve": VE, "cond-ve": VE | {"label_dim": 10}}
URL = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-{}{}.pkl"
EMBEDDED = Path(__file__).parent / "assets" / "shapes_teacher.pt"


# ---- NVIDIA's pickles ----
# A pickle is a program, and unpickling runs it. Here pickletools only decodes its instructions; those that
# build dicts, lists and numbers are followed, and a call is looked up in CALLS: its functions are ours.
def rebuild_tensor(storage, offset, size, stride, *_):
    require(isinstance(storage, np.ndarray) and storage.strides == (4,), "a tensor of no storage")
    require(type(size) is type(stride) is tuple and len(size) == len(stride) < 8, "a tensor without shape")
    require(all(type(n) is int and 0 <= n < 2**40 for n in (offset, *size, *stride)), "an impossible shape")
    end = offset + sum((n - 1) * s for n, s in zip(size, stride)) + 1
    require(max(end, math.prod(size)) <= len(storage), "a tensor larger than its storage")
    return np.lib.stride_tricks.as_strided(storage[offset:], size, [4 * s for s in stride], writeable=False)


def read_storage(data):
    """A torch.save of torch < 1.6: five pickles, then the count and the numbers. -> float32 (count,)"""
    stream = io.BytesIO(data[:2000])  # the pickles have some 500 bytes
    magic, version, _, storage, _ = [read_pickle(stream, {"torch FloatStorage": None}, 50) for _ in range(5)]
    known = (magic, version, *storage[:2]) == (0x1950a86a20f9469cfc6c, 1001, "storage", "torch FloatStorage")
    count, values = stream.read(8), np.frombuffer(data, "<f4", offset=stream.tell())
    known = known and len(values) == storage[4] == int.from_bytes(count, "little")
    require(known, "a storage of another kind")
    return values


def read_number(dtype, data):
    require(dtype in ("f4", "f8", "i4", "i8", "b1"), "a number of another kind")
    return np.frombuffer(data, dtype)[0].item()


CALLS = {"torch_utils.persistence _reconstruct_persistent_obj": lambda meta: meta,  # its source is not read
         "torch.nn.modules.container ModuleDict": lambda: {}, "collections OrderedDict": lambda: {},
         "torch._utils _rebuild_parameter": lambda tensor, *_: tensor,
         "torch._utils _rebuild_tensor_v2": rebuild_tensor, "torch.storage _load_from_bytes": read_storage,
         "numpy.core.multiarray scalar": read_number, "numpy._core.multiarray scalar": read_number,
         "numpy dtype": lambda name, *_: name}
VALUES = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES",
          "SHORT_BINBYTES")


class Global(str):
    """The name of a function, once it has been found in CALLS."""


def read_pickle(stream, calls=CALLS, most=100_000):
    """One pickle from a binary stream, as plain data. ValueError, KeyError, IndexError or TypeError for a
    damaged one, for more instructions than `most`, and for any that the checkpoints do not use."""
    stack, marks, memo = [], [], {}

    def pop(n=None):  # the last n, or what came after the last mark
        start = marks.pop() if n is None else len(stack) - n
        stack[start:], taken = [], stack[start:]
        return taken

    def find(path):
        require(path in calls, f"it would call {path}")
        return Global(path)

    def call(function, args):
        require(type(function) is Global and type(args) is tuple, "it would call a value")
        return calls[function](*args)

    def set_items(items):
        require(all(type(key) in (str, int) for key in items[::2]), "a key that is no name")
        dict.update(stack[-1], zip(items[::2], items[1::2]))

    def build(state):  # the attributes of a ModuleDict; the byte order of a dtype is dropped
        if type(state) is dict:
            dict.update(stack[-1], state)

    pushes = {name: lambda arg: arg for name in VALUES} | {
        "NONE": lambda _: None, "NEWTRUE": lambda _: True, "NEWFALSE": lambda _: False,
        "EMPTY_TUPLE": lambda _: (), "EMPTY_LIST": lambda _: [], "EMPTY_DICT": lambda _: {},
        "EMPTY_SET": lambda _: set(), "TUPLE": lambda _: tuple(pop()), "TUPLE1": lambda _: tuple(pop(1)),
        "TUPLE2": lambda _: tuple(pop(2)), "TUPLE3": lambda _: tuple(pop(3)), "BINGET": lambda key: memo[key],
        "LONG_BINGET": lambda key: memo[key], "GLOBAL": find,
        "STACK_GLOBAL": lambda _: find(" ".join(pop(2))), "REDUCE": lambda _: call(*pop(2)),
        "NEWOBJ": lambda _: call(*pop(2)), "BINPERSID": lambda _: pop(1)[0]}
    acts = {"PROTO": lambda _: None, "FRAME": lambda _: None, "MARK": lambda _: marks.append(len(stack)),
            "MEMOIZE": lambda _: memo.update({len(memo): stack[-1]}),
            "BINPUT": lambda key: memo.update({key: stack[-1]}),
            "LONG_BINPUT": lambda key: memo.update({key: stack[-1]}),
            "APPEND": lambda _: list.extend(stack[-2], pop(1)), "BUILD": lambda _: build(*pop(1)),
            "APPENDS": lambda _: list.extend(stack[marks[-1] - 1], pop()),
            "SETITEM": lambda _: set_items(pop(2)), "SETITEMS": lambda _: set_items(pop())}
    for count, (instruction, arg, _) in enumerate(pickletools.genops(stream)):
        name = instruction.name
        require(count < most, "too many instructions")
        if name == "STOP":
            return stack.pop()
        require(name in pushes or name in acts, f"the instruction {name}")
        if name in pushes:
            stack.append(pushes[name](arg))
        else:
            acts[name](arg)


def collect(top):
    """-> {name: array}, the parameters and buffers of a pickled module and of all below it."""
    found, waiting, modules = {}, [("", top)], 0
    while waiting:
        prefix, module = waiting.pop()
        modules += 1
        require(modules < 10_000 and prefix.count(".") < 8, "modules without end")
        found |= {prefix + name: value for kind in ("_parameters", "_buffers")
                  for name, value in module[kind].items() if value is not None}
        waiting += [(f"{prefix}{name}.", below.get("state", below))
                    for name, below in module["_modules"].items() if below is not None]
    return found


def load_edm_pickle(path):
    """One of NVIDIA's EDM networks, or a SiD generator in their format, executing nothing in its .pkl.
    -> net(x, sigma, class_labels=None, augment_labels=None), frozen. UserError for anything else."""
    expected = "expected an EDM checkpoint of NVIDIA's (EDMPrecond with a SongUNet, .pkl)"
    if not Path(path).is_file() or Path(path).stat().st_size > 2**31:
        raise UserError(f"{path} is no file below 2 GiB: {expected}")
    with blame(f"{path} is refused ({{}}): {expected}"):
        stream = io.BytesIO(Path(path).read_bytes())
        top = read_pickle(stream)["ema"]
        require(not stream.read(1), "something follows its end")
        args, state = dict(top["state"]["_init_kwargs"]), top["state"]
        fixed = {"model_type": "SongUNet", "decoder_type": "standard", "sigma_min": 0, "sigma_max": math.inf,
                 "sigma_data": 0.5}
        same = [args.pop(name, value) == value for name, value in fixed.items()]
        require(top["class_name"] == "EDMPrecond" and all(same), "no EDMPrecond with a SongUNet")
        args.pop("use_fp16", None)  # how to compute, not what
        arrays = collect(state)
        require(sum(a.nbytes for a in arrays.values()) <= stream.tell(), "tensors that share their numbers")
        return adopt(make_unet, args, arrays)


# ---- Teachers ----
def load_denoiser(path, own=""):
    """A run's folder, a .pt of ours (of a network of the user's own, if named) or a .pkl of NVIDIA's.
    -> (net, t_star, meta)"""
    if str(path).endswith(".pkl") and not Path(path).is_dir():
        return load_edm_pickle(path), PAPER["t_star"], {"source": Path(path).name}  # t*: SiD's generators'
    if own:
        return load_generator(path, lambda **_: import_teacher(own), where="cpu")
    return load_generator(path, make_unet)


def import_teacher(name):
    """package.module:function, called: a denoiser net(x, t) of the user's own, or with class_labels."""
    module, _, function = name.partition(":")
    with blame(f"--teacher {name}: {{}}", ImportError, AttributeError, ValueError, TypeError):
        net = getattr(importlib.import_module(module), function)()
    whole = isinstance(net, torch.nn.Module) and hasattr(net, "image_shape") and hasattr(net, "label_dim")
    if not whole or {w.dtype for w in net.parameters()} != {torch.float32}:
        raise UserError(f"--teacher {name} returned {type(net).__name__}: expected a torch module with "
                        "float32 weights, image_shape (C, H, W) and label_dim, called as net(x, t)")
    return net.eval().requires_grad_(False)


def published(name):
    return URL.format(name, "" if "-" in name else "-vp")


def choose_teacher(device):
    """--teacher auto: CIFAR-10 if there is a GPU and the checkpoint can be had, else the embedded one."""
    try:
        if device.type != "cuda":
            raise UserError("there is no GPU here")
        fetch(published("uncond"))
        return "uncond"
    except UserError as error:
        print(f"teacher: the embedded one, a model of 16x16 shapes\nwhy: {error}\n"
              "for CIFAR-10: python 02_edm_cifar.py --teacher uncond (223 MB to download, weeks on a GPU)")
        return "shapes"


def load_teacher(args):
    """args.teacher as a frozen network -> (net, meta). It never falls back. UserError if it cannot be had."""
    if ":" in args.teacher:
        return import_teacher(args.teacher), {}
    path = fetch(published(args.teacher)) if args.teacher in CIFAR else args.teacher
    path = Path(EMBEDDED if args.teacher == "shapes" else path)
    path = path / "g_ema.pt" if path.is_dir() else path
    if not path.exists():
        raise UserError(f"--teacher {args.teacher}: no such file, and none of {', '.join(CIFAR)}, shapes, "
                        "auto or package.module:function")
    net, _, meta = load_denoiser(path)
    args.teacher_sha256 = sha256(path)
    weights = sum(w.numel() for w in net.parameters())
    print(f"teacher: {args.teacher}, {weights:,} parameters, sha256 {args.teacher_sha256}")
    return net, meta


def train_teacher(args, folder, device):
    """A diffusion model of the shapes. A tenth of the labels is dropped, so that it serves without labels
    too. -> teacher.pt in the folder"""
    torch.manual_seed(args.seed)
    net = make_unet(**SHAPES_NET).to(device)
    net.model.label_dropout = 0.1

    def batch(step):
        images, labels = draw_shapes(args.batch, [args.seed, step])
        labels = F.one_hot(labels, len(SHAPES)).float().to(device)
        return given_labels(net, labels, args.amp), images

    ema = train_edm(args, folder, net, torch.optim.Adam(net.parameters(), fused=True), batch)
    meta = measure_teacher(args, ema.half().float())  # with the weights as they are stored
    save_generator(folder / "teacher.pt", ema.half(), SHAPES_NET, PAPER["t_star"], **meta)
    print(f"next: python 02_edm_cifar.py --teacher {folder}/teacher.pt --preset shapes")


def measure_teacher(args, net):
    """What a run compares with: features of true shapes, and the distances of others and of the teacher's."""
    device, shapes = next(net.parameters()).device, lambda n, key: draw_shapes(n, [key, args.seed])[0]
    meta = {"data": "shapes", "steps": args.steps, "batch": args.batch, "seed": args.seed}
    meta["mu"], meta["sigma"] = moments(teacher_features(net, shapes(10 * FD_IMAGES, 1).to(device)).cpu())
    z, labels = draw_latents(range(FD_IMAGES), net.image_shape, net.label_dim)
    meta["fd_teacher"] = shapes_fd(net, sample_teacher(net, z.to(device), labels.to(device)), meta)
    meta["fd_real"] = shapes_fd(net, shapes(FD_IMAGES, 2).to(device), meta)
    print(f"FD of {FD_IMAGES} true shapes {meta['fd_real']:.4f}, of the teacher's {meta['fd_teacher']:.4f}")
    return meta


# ---- Samples and their distance ----
FD_IMAGES = 2000


def given_labels(net, labels, amp="none"):
    """(x_t, t) -> denoised, with the labels (B, label_dim) closed over, under autocast if amp is bf16."""
    cond = {"class_labels": labels} if labels.shape[1] else {}

    def denoiser(x_t, t):
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=amp == "bf16"):
            return net(x_t, t.expand(len(x_t), 1, 1, 1), **cond)
    return denoiser


@torch.no_grad()
def sample_one_step(g, t_star, z, labels, batch=500):
    """z (N, C, H, W) standard normal, labels (N, label_dim) -> images (N, C, H, W)"""
    pairs = zip(z.split(batch), labels.split(batch))
    t = torch.full((1, 1, 1, 1), t_star, device=z.device)
    return torch.cat([given_labels(g, c)(t * z, t) for z, c in pairs])


def sample_teacher(net, z, labels, num_steps=18, batch=500):
    """The same by Heun's method: 2 num_steps - 1 evaluations of the teacher, 35 unless told otherwise."""
    pairs = zip(z.split(batch), labels.split(batch))
    return torch.cat([edm_sampler(given_labels(net, c), z, num_steps) for z, c in pairs])


def shapes_fd(teacher, images, meta):
    """The Frechet distance to 20,000 true shapes in the teacher's own features (not FID: no Inception)."""
    mu, sigma = moments(teacher_features(teacher, images.clamp(-1, 1)).cpu())
    return frechet_distance(mu, sigma, meta["mu"], meta["sigma"])


# ---- Distillation ----
def prepare(args, folder, d_q):
    """The parts of a run: new, or as ckpt.pt has them."""
    d_psi, g, g_ema = [copy.deepcopy(d_q) for _ in range(3)]
    for layer in [*d_psi.modules(), *g.modules()]:
        if isinstance(layer, Block):
            layer.dropout = args.dropout
    optimiser = partial(torch.optim.Adam, betas=(0.0, 0.999), eps=args.adam_eps, fused=True)  # Table 5
    parts = {"d_psi": d_psi, "g": g, "g_ema": g_ema, "opt_psi": optimiser(d_psi.parameters()),
             "opt_theta": optimiser(g.parameters()), "log": Log(folder / "log.jsonl", args.steps)}
    resume(folder, parts)
    return parts


def train(args, d_q, parts, report):
    """Algorithm 2, up to args.steps updates of g; report() is called after each."""
    d_psi, g, g_ema, opt_psi, opt_theta, log = parts.values()
    device, shape = next(d_q.parameters()).device, (args.batch, *d_q.image_shape)
    for net in (d_psi, g, d_q) if args.compile else ():
        net.compile()
    d_psi, g = replicate(d_psi.requires_grad_(True)), replicate(g.requires_grad_(True))
    distance = make_distance(args)
    generator_loss = make_generator_loss(args, distance)
    weight_psi, rows = lambda_edm, args.batch // world()[1]  # samples of this rank in an update
    times = make_times(args)
    t_star = torch.full((1, 1, 1, 1), args.t_star, device=device)
    given = partial(given_labels, amp=args.amp)

    def draw(phase):  # -> [(z, t, eps, cond)], this rank's micro-batches of the global draw
        where = {"device": device, "generator": random}
        z, eps = args.t_star * torch.randn(shape, **where), torch.randn(shape, **where)
        t, labels = times[phase]((args.batch, 1, 1, 1), **where), z.new_zeros(args.batch, d_q.label_dim)
        if d_q.label_dim:  # uniform: data-free
            labels.scatter_(1, torch.randint(d_q.label_dim, (args.batch, 1), **where), 1)
        return my_share((z, t, eps, labels), args.batch_gpu)

    def generate(g, z, cond):
        return given(g, cond)(z, t_star)  # (B.4)

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


def passes(args):
    """psi's and theta's updates, in forwards: a backward is two, or one where weights are frozen."""
    return args.psi_updates * (1 + 3), (3 + 2 + 2 if args.method != "di" else 3 + 1 + 1)


def forward_flops(net):
    """FLOPs of the network for one image, as torch counts them."""
    x = torch.zeros(1, *net.image_shape, device=next(net.parameters()).device)
    denoiser = given_labels(net, x.new_zeros(1, net.label_dim))
    return count_flops(lambda: denoiser(x, torch.ones_like(x[:, :1, :1, :1])))


def picture(columns, rows=10, zoom=3):
    """Sets of images (N, C, H, W), N = rows x some, beside each other. -> a Pillow image"""
    rgb = [x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x[:, :3] for x in columns]
    blocks = [image_grid(to_uint8(x), len(x) // rows) for x in rgb]
    wide = Image.new("RGB", (sum(b.width + 4 for b in blocks) - 4, blocks[0].height), "white")
    for i, b in enumerate(blocks):
        wide.paste(b, (i * (b.width + 4), 0))
    return wide.resize((wide.width * zoom, wide.height * zoom), Image.Resampling.NEAREST)


def distil(args, folder, d_q, teacher_meta):
    """Train, with a log, pictures and checkpoints as it goes; then teacher and one step side by side."""
    (folder / "samples").mkdir(exist_ok=True)
    parts, device = prepare(args, folder, d_q), next(d_q.parameters()).device
    g, log = parts["g_ema"], parts["log"]
    dtype = torch.bfloat16 if args.amp == "bf16" else torch.float32
    speed = Speed(log.step, args.batch, sum(passes(args)) * forward_flops(d_q), device, dtype)
    by_rows = [row % d_q.label_dim for row in range(10) for _ in range(8)] if d_q.label_dim else None
    shown = [v.to(device) for v in draw_latents(range(80), d_q.image_shape, d_q.label_dim, by_rows)]
    tested = [v.to(device) for v in draw_latents(range(FD_IMAGES), d_q.image_shape, d_q.label_dim)]

    def keep(name):
        net_args = getattr(d_q, "net_args", {})  # a user's own network is built by --teacher alone
        save_generator(folder / name, g, net_args, args.t_star, teacher=args.teacher, step=log.step)

    def look():  # what can be seen of the generator so far
        image = picture([sample_one_step(g, args.t_star, *shown)])
        save_picture(image, folder / "samples" / f"{log.step:07}.png")
        if "mu" not in teacher_meta:
            return {}
        fd = shapes_fd(d_q, sample_one_step(g, args.t_star, *tested), teacher_meta)
        if fd < min([line["fd"] for line in log.read() if "fd" in line], default=math.inf):
            keep("g_best.pt")
        return {"fd": fd}

    train(args, d_q, parts, reporter(args, folder, parts, speed, look, keep))
    if world()[0] == 0:
        summarise(args, folder, d_q, teacher_meta, g, log, shown)


def summarise(args, folder, d_q, teacher_meta, g, log, shown):
    """samples.png, curve.png, metrics.json, and what they say."""
    teacher, one_step = sample_teacher(d_q, *shown), sample_one_step(g, args.t_star, *shown)
    save_picture(picture([teacher, one_step]), folder / "samples.png")
    curves = {"fd": "Frechet distance, teacher's features", "divergence": "E d(y), the estimate of (3.3)"}
    lines = log.read()
    plot_log(folder / "curve.png", lines, {key: label for key, label in curves.items() if key in lines[-1]})
    metrics = {key: getattr(args, key) for key in ("teacher", "method", "distance", "seed", "steps", "batch")}
    metrics |= {"seconds": round(log.elapsed(), 1), "images_s": lines[-1]["images_s"]}
    if "fd" in lines[-1]:
        metrics |= {"fd": lines[-1]["fd"], "fd_best": min(line["fd"] for line in lines if "fd" in line)}
        metrics |= {key: teacher_meta[key] for key in ("fd_teacher", "fd_real")}
        print(f"Frechet distance in the teacher's features, {FD_IMAGES} images (it is not FID):\n"
              f"  true shapes              {metrics['fd_real']:.4f}\n"
              f"  teacher, 35 evaluations  {metrics['fd_teacher']:.4f}\n"
              f"  one step                 {metrics['fd']:.4f}, "
              f"{metrics['fd'] / metrics['fd_teacher']:.2f} times the teacher's")
    save(metrics, folder / "metrics.json")
    print(f"{log.elapsed():.0f} s; pictures: {folder}/samples.png (teacher | one step), curve.png, samples/")
    own = f" --teacher {args.teacher}" if ":" in args.teacher else ""
    print(f"next: python 02_edm_cifar.py --sample {folder}{own} --n 64 --teacher-sample --out grid.png")


# ---- Without training ----
def sample(args, device):
    """--sample: image k from seed + k, to a grid (.png), an array (.npz) or a folder of PNGs."""
    g, t_star, meta = load_denoiser(args.sample, args.teacher if ":" in args.teacher else "")
    g, t_star, columns = g.to(device), args.t_star or t_star, {}
    if args.classes and not (g.label_dim and max(args.classes) < g.label_dim):
        raise UserError(f"--classes {args.classes}: {args.sample} has {g.label_dim} classes")
    z, labels = draw_latents(range(args.seed, args.seed + args.n), g.image_shape, g.label_dim, args.classes)
    z, labels = z.to(device), labels.to(device)
    if args.teacher_sample:
        if args.teacher == "auto":
            args.teacher = str(meta.get("teacher", ""))
            if ":" in args.teacher or not args.teacher:  # a file does not say what to import
                raise UserError(f"--teacher-sample: name the teacher of {args.sample} by --teacher")
        d_q = load_teacher(args)[0].to(device)
        if (d_q.image_shape, d_q.label_dim) != (g.image_shape, g.label_dim):
            raise UserError(f"--teacher {args.teacher} has other images or classes than {args.sample}")
        columns["teacher"] = sample_teacher(d_q, z, labels)
    columns["one_step"] = sample_one_step(g, t_star, z, labels)
    out = Path(args.out or f"samples-{args.n}-seed-{args.seed}.png")
    if out.suffix == ".npz":
        arrays = {name: rearrange(to_uint8(x), "n c h w -> n h w c").cpu() for name, x in columns.items()}
        with atomic(out) as temporary:
            np.savez(temporary, **arrays, labels=labels.argmax(1).cpu() if g.label_dim else [])
    elif out.suffix == ".png":
        rows = math.ceil(args.n**0.5)
        filled = [F.pad(x, (0,) * 7 + (-args.n % rows,), value=1) for x in columns.values()]
        save_picture(picture(filled, rows), out)
    elif out.suffix:
        raise UserError(f"--out {out}: expected .png (a grid), .npz (an array) or a folder (of PNGs)")
    else:
        for name, x in columns.items():
            folder = out / name if args.teacher_sample else out
            folder.mkdir(parents=True, exist_ok=True)
            for k, image in enumerate(to_uint8(x)):
                save_picture(image_grid(image[None]), folder / f"{args.seed + k:06}.png")
    print(f"{args.n} images ({' | '.join(columns)}): {out}")


def time_updates(args, d_q):
    """--bench: the teacher's forward and both updates as `train` does them, and their use of the machine."""
    device = next(d_q.parameters()).device
    x = torch.randn(args.batch_gpu, *d_q.image_shape, device=device)
    denoiser = given_labels(d_q, x.new_zeros(args.batch_gpu, d_q.label_dim), args.amp)
    bench(args, device, lambda: denoiser(x, torch.ones_like(x[:, :1, :1, :1])), forward_flops(d_q),
          passes(args), partial(prepare, d_q=d_q), partial(train, args, d_q))


# ---- The command line ----
IGNORE = ("out", "fresh", "device", "save_every", "log_every", "batch_gpu", "sample", "n", "classes",
          "convert", "teacher_sample", "bench")  # not a part of what a run is


def classes(text):
    try:
        return [number(int, strict=False)(word) for word in text.split(",")]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected numbers as 0,3,7, got {text!r}") from None


def parse(argv):
    parser = Parser(__doc__)
    parser.add_argument("--teacher", default="auto", help="auto, uncond, cond, uncond-ve, cond-ve (NVIDIA's "
                        "CIFAR-10), shapes (embedded), a .pkl or .pt file, or package.module:function")
    parser.add_argument("--preset", choices=("paper", "sid", "shapes"), help="for the options left out; "
                        "shapes with the embedded teacher, else paper (Table 5)")
    add_method_arguments(parser)
    add_run_arguments(parser, n=64)
    parser.add_argument("--p-theta", choices=("lognormal", "karras"), help="g's times: (B.10) or (B.8)")
    parser.add_argument("--dropout", type=number(float, strict=False), help="while learning (SiD: 0.13)")
    add_image_arguments(parser)
    parser.add_argument("--classes", type=classes, help="of --sample, as 0,3,7, in turn; random unless given")
    parser.add_argument("--teacher-sample", action="store_true", help="--sample: the teacher's beside")
    parser.add_argument("--convert", nargs=2, metavar=("PKL", "PT"), help="write NVIDIA's .pkl in plain form")
    return parser.parse_args(argv)


def convert(source, target):
    """--convert: NVIDIA's .pkl to the plain form that load_generator reads."""
    net = load_edm_pickle(source)
    known = {"source": Path(source).name, "sha256": sha256(source)}
    save_generator(target, net, net.net_args, PAPER["t_star"], **known)
    print(f"{target}: {sum(w.numel() for w in net.parameters()):,} parameters, sha256 {known['sha256']}")


@one_line_errors
def main(argv=None):
    args = parse(argv)
    if args.convert:
        return convert(*args.convert)
    device, _ = pick_device(args.device), make_distance(args)  # mistakes stop here
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32  # torch: on in cuDNN
    if args.sample is not None:
        return sample(args, device)
    if args.train_teacher:
        settle(args, PRESETS["teacher"])
        args.out = args.out or "runs/shapes_teacher"
        return train_teacher(args, open_run(args, IGNORE), device)
    args.teacher = choose_teacher(device) if args.teacher == "auto" else args.teacher
    if args.bench and args.teacher in CIFAR:  # the time does not depend on the weights
        d_q, meta = make_unet(**CIFAR[args.teacher]).eval().requires_grad_(False), {}
    else:
        d_q, meta = load_teacher(args)
    d_q = d_q.to(device)
    if args.amp == "bf16":
        d_q = d_q.to(memory_format=torch.channels_last)  # the layout of the fastest bfloat16 convolutions
    args.preset = args.preset or ("shapes" if args.teacher == "shapes" else "paper")
    settle(args, PRESETS[args.preset] | ({"steps": 3} if args.bench else {}))
    if args.dropout >= 1:
        raise UserError(f"--dropout {args.dropout}: expected a number below 1")
    if args.bench:
        return time_updates(args, d_q)
    name = args.teacher.replace(":", ".") if ":" in args.teacher else Path(args.teacher).stem
    args.out = args.out or f"runs/{name}-{args.method}-{args.distance}-{args.seed}"
    distil(args, open_run(args, IGNORE), d_q, meta)


if __name__ == "__main__":
    main()
