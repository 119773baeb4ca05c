"""Stage 2: an EDM diffusion model of images, 35 evaluations an image, becomes a one-step generator.

    python 02_edm_cifar.py --distance phuber                ten minutes on two cores: Fashion-MNIST
    python 02_edm_cifar.py --teacher uncond --batch-gpu 32  CIFAR-10, the settings of Table 5
    torchrun --standalone --nproc_per_node=8 02_edm_cifar.py --teacher uncond --batch-gpu 32
    python 02_edm_cifar.py --sample runs/fashion-sim-phuber-0 --n 64 --teacher-sample

The lines of Algorithm 2 are those of 01_toy_2d.py; the network, the teacher and the shape of the
data differ. Expect pictures of the right kind of garment; a classifier, the judge, measures them.
"""
import importlib
import io
import math
import pickle
from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import nn
from torch.nn import functional as F

from common import (EDMPrecond, Run, as_denoiser, draw_batch, draw_latents, dsm_loss, edm_sampler,
                    ema_beta, ema_update, fetch, frechet_distance, image_grid, lambda_edm,
                    load_frozen, load_generator, load_saved, make_generator_loss, make_parser,
                    make_parts, moments, one_line_errors, pick_device, progress, reading, require,
                    sample_path, save, save_picture, seed_step, sha256, sliced_w2, to_uint8,
                    train_only, update, write_samples)

# ---- Settings ----
PAPER = {  # Table 5, (B.5)-(B.10); the paper leaves steps, EMA, dropout and eps open: SiD's code
    "method": "sim", "sid_alpha": 1.0, "steps": 2_000_000, "batch": 256, "lr": 1e-5,
    "anneal": "none", "t_star": 2.5, "p_theta": "lognormal", "p_mean": -3.5, "p_std": 2.5,
    "psi_mean": -1.2, "psi_std": 1.2, "t_min": 0.0, "t_max": 1e9, "psi_updates": 1,
    "ema_half_life": 5e5, "dropout": 0.13, "adam_eps": 1e-8, "amp": "none", "save_every": 1000,
    "log_every": 50, "n": 64}
PRESETS = {
    "paper": PAPER,
    "sid": PAPER | {"method": "sid", "sid_alpha": 1.2, "p_theta": "karras"},  # SiD's code
    "fashion": PAPER | {  # the best of a few tries (lab/RESULTS.md), not of a search
        "steps": 600, "batch": 16, "lr": 2e-4, "anneal": "linear", "t_star": 5.0, "p_mean": 0.0,
        "p_std": 1.6, "psi_mean": 0.0, "psi_std": 1.6, "ema_half_life": 2e3, "dropout": 0.0,
        "save_every": 100, "log_every": 10}}
FASHION, JUDGE = [Path(__file__).parent / "assets" / f"fashion_{name}.pt"
                  for name in ("teacher", "judge")]  # lab/teachers.py made both
LOOK, FINAL = 500, 10_000  # generated images that the judge sees at a look, and at the end
VP = {"img_resolution": 32, "augment_dim": 9, "dropout": 0.13}
VE = VP | {"embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "residual",
           "resample_filter": [1, 3, 3, 1]}
CIFAR = {"uncond": VP, "cond": VP | {"label_dim": 10},
         "uncond-ve": VE, "cond-ve": VE | {"label_dim": 10}}
URL = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-{}.pkl"  # NVIDIA's files


# ---- The network: EDM's names for everything, so that its checkpoints fit ----
class Waves(nn.Module):
    """c_noise (B,) -> (B, channels): sines, then cosines. The frequencies are fixed (DDPM's
    positional embedding), or random ones in a buffer (NCSN++'s Fourier features, of scale 16)."""
    def __init__(self, channels, fourier):
        super().__init__()
        self.half = channels // 2
        self.register_buffer("freqs", 16 * torch.randn(self.half) if fourier else None)

    def forward(self, c_noise):
        steps = torch.arange(self.half).to(c_noise) / (self.half - 1)
        freqs = 1e-4**steps if self.freqs is None else 2 * math.pi * self.freqs
        angles = torch.outer(c_noise, freqs)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class Conv(nn.Conv2d):
    """A convolution of x (B, C, H, W) that may halve ("down") or double ("up") the resolution with
    the separable filter `taps`, first. If fused, the filter is last, and nothing is padded then."""
    def __init__(self, c_in, c_out, kernel, gain=1.0, resample=None, taps=(1, 1), fused=False):
        super().__init__(c_in, c_out, kernel, padding=kernel // 2 + fused * (len(taps) // 2 - 1))
        nn.init.xavier_uniform_(self.weight, gain)
        nn.init.zeros_(self.bias)
        self.resample, self.fused = resample, fused
        if resample:
            taps = torch.tensor(taps, dtype=torch.float32)
            taps = torch.outer(taps, taps) / taps.sum()**2
            self.register_buffer("resample_filter", taps[None, None])

    def change_resolution(self, x):
        k, c = self.resample_filter.shape[-1], x.shape[1]
        if k == 2:  # a box filter: pooling is several times faster
            return (F.avg_pool2d(x, 2) if self.resample == "down" else
                    F.interpolate(x, scale_factor=2))
        taps, padding = self.resample_filter.expand(c, 1, k, k), 0 if self.fused else k // 2 - 1
        if self.resample == "up":
            return F.conv_transpose2d(x, 4 * taps, stride=2, padding=padding, groups=c)
        return F.conv2d(x, taps, stride=2, padding=padding, groups=c)

    def forward(self, x):
        if self.fused:
            # The taps sum to 1, so that the filter does not change the bias.
            return self.change_resolution(super().forward(x))
        return super().forward(self.change_resolution(x) if self.resample else x)


def group_norm(channels):
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class Block(nn.Module):
    """A residual block: x (B, c_in, H, W), emb (B, c_emb) -> (B, c_out, H', W'). With `attention`
    one head of self-attention follows."""
    def __init__(self, c_in, c_out, c_emb, dropout, attention=False, resample=None, taps=(1, 1)):
        super().__init__()
        self.dropout, self.attention = nn.Dropout(dropout), attention
        self.norm0, self.conv0 = group_norm(c_in), Conv(c_in, c_out, 3, 1, resample, taps)
        self.affine = nn.Linear(c_emb, c_out)
        self.norm1, self.conv1 = group_norm(c_out), Conv(c_out, c_out, 3, 1e-5)  # starts near 0
        same = not resample and c_in == c_out
        self.skip = nn.Identity() if same else Conv(c_in, c_out, 1, 1, resample, taps)
        if attention:
            self.norm2 = group_norm(c_out)
            self.qkv, self.proj = Conv(c_out, 3 * c_out, 1, 0.2**0.5), Conv(c_out, c_out, 1, 1e-5)

    def forward(self, x, emb):
        h = self.conv0(F.silu(self.norm0(x)))
        h = F.silu(self.norm1(h + self.affine(emb)[:, :, None, None]))
        h = self.conv1(self.dropout(h))
        x = (self.skip(x) + h) * 0.5**0.5  # keeps the variance, as does the next line
        return (x + self.attend(x)) * 0.5**0.5 if self.attention else x

    def attend(self, x):
        qkv = self.qkv(self.norm2(x))
        q, k, v = rearrange(qkv, "b (c three) h w -> three b 1 (h w) c", three=3)
        a = F.scaled_dot_product_attention(q, k, v)  # scale 1 / sqrt(c)
        return self.proj(rearrange(a, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class SongUNet(nn.Module):
    """The U-Net of Song et al. (2021): EDM's DDPM++ by default, NCSN++ with the settings VE.

    x (B, C, H, W), c_noise (B,) or (1,), one-hot class_labels (B, label_dim) and augment_labels
    (B, augment_dim), or None for zeros -> (B, C, H, W)"""
    def __init__(self, img_resolution, img_channels=3, label_dim=0, augment_dim=0,
                 model_channels=128, channel_mult=(2, 2, 2), channel_mult_emb=4, num_blocks=4,
                 attn_resolutions=(16,), dropout=0.1, label_dropout=0.0,
                 embedding_type="positional", channel_mult_noise=1, encoder_type="standard",
                 resample_filter=(1, 1)):
        super().__init__()
        self.label_dropout = label_dropout
        c, c_noise, c_emb = [model_channels * m for m in (1, channel_mult_noise, channel_mult_emb)]
        self.map_noise = Waves(c_noise, fourier=embedding_type == "fourier")
        self.map_label = nn.Linear(label_dim, c_noise) if label_dim else None
        self.map_augment = nn.Linear(augment_dim, c_noise, bias=False) if augment_dim else None
        self.map_layer0, self.map_layer1 = nn.Linear(c_noise, c_emb), nn.Linear(c_emb, c_emb)

        block = partial(Block, c_emb=c_emb, dropout=dropout, taps=resample_filter)
        levels = [(img_resolution >> i, model_channels * m) for i, m in enumerate(channel_mult)]
        attends = lambda size: size in attn_resolutions
        layers = {f"{img_resolution}x{img_resolution}_conv": Conv(img_channels, c, 3)}
        skips, c_aux = [c], img_channels
        for size, c_out in levels:
            if size < img_resolution:
                layers[f"{size}x{size}_down"] = block(c, c, resample="down")
                skips.append(c)
                if encoder_type == "residual":
                    layers[f"{size}x{size}_aux_residual"] = Conv(
                        c_aux, c, 3, 1, "down", resample_filter, fused=True)
                    c_aux = c
            for i in range(num_blocks):
                layers[f"{size}x{size}_block{i}"] = block(c, c_out, attention=attends(size))
                skips.append(c := c_out)
        self.enc = nn.ModuleDict(layers)

        layers = {f"{size}x{size}_in{i}": block(c, c, attention=i == 0) for i in range(2)}
        for size, c_out in reversed(levels):
            if len(layers) > 2:
                layers[f"{size}x{size}_up"] = block(c, c, resample="up")
            for i in range(num_blocks + 1):
                last, c_in, c = i == num_blocks, c + skips.pop(), c_out
                layers[f"{size}x{size}_block{i}"] = block(c_in, c, attention=last and attends(size))
        layers[f"{size}x{size}_aux_norm"] = group_norm(c)
        layers[f"{size}x{size}_aux_conv"] = Conv(c, img_channels, 3, 1e-5)
        self.dec = nn.ModuleDict(layers)

    def embed(self, c_noise, class_labels, augment_labels, batch):
        """-> (B, c_emb), from the noise level, the class and the augmentation."""
        emb = self.map_noise(c_noise).expand(batch, -1)
        if self.map_label:
            zeros = emb.new_zeros(batch, self.map_label.in_features)
            labels = zeros if class_labels is None else class_labels
            if self.training and self.label_dropout:
                labels = labels * (torch.rand_like(labels[:, :1]) >= self.label_dropout)
            emb = emb + self.map_label(labels * labels.shape[1]**0.5)
        if self.map_augment and augment_labels is not None:  # this layer has no bias: zeros add 0
            emb = emb + self.map_augment(augment_labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def forward(self, x, c_noise, class_labels=None, augment_labels=None):
        emb = self.embed(c_noise, class_labels, augment_labels, len(x))
        skips, aux = [], x  # skips: the features for the decoder, (B, C', H', W') each
        for name, layer in self.enc.items():
            if name.endswith("aux_residual"):
                skips[-1] = aux = (skips[-1] + layer(aux)) * 0.5**0.5
            else:
                skips.append(layer(skips[-1], emb) if skips else layer(x))
        x = skips[-1]
        *blocks, (_, last_norm), (_, last_conv) = self.dec.items()
        for name, layer in blocks:
            x = layer(torch.cat([x, skips.pop()], dim=1) if "block" in name else x, emb)
        return last_conv(F.silu(last_norm(x)))


def make_unet(**net_args):
    """SongUNet's arguments, which may come from a file -> net(x, t, class_labels=None), a denoiser
    that knows its image_shape (C, H, W) and label_dim. UserError for too many layers."""
    require(net_args.get("num_blocks", 4) <= 32 and len(net_args.get("channel_mult", ())) <= 8 and
            0 <= net_args.get("label_dropout", 0) < 1, "its blocks, levels or label_dropout")
    net = EDMPrecond(SongUNet(**net_args))
    net.net_args, net.label_dim = net_args, int(net_args.get("label_dim", 0))
    net.image_shape = (net_args.get("img_channels", 3), *[net_args["img_resolution"]] * 2)
    return net


# ---- NVIDIA's pickles ----
class Module(dict):
    """Stands for a pickled torch module: its attributes, as a dict."""
    __setstate__ = dict.update


class Dtype(str):
    """Stands for a numpy dtype: its name, such as f4. The byte order that follows is dropped."""
    __setstate__ = lambda self, state: None


def rebuild_tensor(storage, offset, size, stride, *_):
    """A view of the storage. RuntimeError for a view that is larger than its storage."""
    return torch.empty(0).set_(storage).as_strided(size, stride, offset)


def load_storage(data):
    """Numbers in torch's old format. The newer format is a zip, which may inflate to any size."""
    require(not data.startswith(b"PK"), "a zip in place of numbers")
    return torch.load(io.BytesIO(data), weights_only=True)


CALLS = {  # the nine names that a checkpoint may call, and what is called in their place
    "torch_utils.persistence._reconstruct_persistent_obj": Module,  # its source code is never run
    "torch.nn.modules.container.ModuleDict": Module,
    "collections.OrderedDict": dict,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch.storage._load_from_bytes": load_storage,
    "numpy.dtype": lambda name, *_: Dtype(name),
    "numpy.core.multiarray.scalar": lambda dtype, data: np.frombuffer(data, dtype)[0].item(),
    "numpy._core.multiarray.scalar": lambda dtype, data: np.frombuffer(data, dtype)[0].item()}


class Unpickler(pickle._Unpickler):
    """A pickle is a program, and a name in it is a function that the program calls: here only
    CALLS. This is the unpickler in Python: the one in C allocates whatever memory a file asks, and
    so does the instruction that makes a bytearray, which is left out."""
    dispatch = {k: do for k, do in pickle._Unpickler.dispatch.items() if k != pickle.BYTEARRAY8[0]}

    def find_class(self, module, name):
        require(f"{module}.{name}" in CALLS, f"it would call {module}.{name}")
        function = CALLS[f"{module}.{name}"]
        if isinstance(function, type):
            return function
        return lambda *args: function(*args)  # a new one each time: a pickle can set its attributes


def collect_weights(module, prefix=""):
    """A pickled module -> {name: tensor}, the parameters and buffers of all modules in it, each of
    which is taken apart: KeyError for one that occurs twice, or that contains itself."""
    state = module.get("state", module)
    weights = state["_parameters"] | state["_buffers"]
    found = {prefix + name: w for name, w in weights.items() if w is not None}
    for name, inner in state.pop("_modules").items():
        found |= collect_weights(inner, f"{prefix}{name}.")
    return found


def load_edm_pickle(path):
    """NVIDIA's EDM network or SiD's generator -> net(x, sigma, class_labels=None,
    augment_labels=None), frozen. Nothing in the file is executed; UserError for other files."""
    with (reading(path, "an EDM checkpoint of NVIDIA's (EDMPrecond with a SongUNet, .pkl)"),
          open(path, "rb") as file):
        size = Path(path).stat().st_size
        top = Unpickler(file).load()["ema"]
        require(not file.read(1), "something follows its end")
        args = dict(top["state"]["_init_kwargs"])
        fixed = {"model_type": "SongUNet", "decoder_type": "standard", "sigma_min": 0,
                 "sigma_max": math.inf, "sigma_data": 0.5}
        same = [args.pop(name, value) == value for name, value in fixed.items()]
        require(top["class_name"] == "EDMPrecond" and all(same), "no EDMPrecond with a SongUNet")
        args.pop("use_fp16", None)  # how to compute, not what
        weights = collect_weights(top)
        require(sum(w.nbytes for w in weights.values()) <= size, "weights that share their numbers")
        return load_frozen(make_unet, args, weights)


# ---- The judge: a classifier, which no teacher and no generator has learned from ----
class Judge(nn.Module):
    """Images, uint8 (B, channels, side, side) -> features (B, 4 width), logits (B, classes). The
    network is ours, and its sizes were chosen for 0.5 MB and 92.5 % (lab/RESULTS.md)."""
    def __init__(self, channels, side, classes, width=24):
        super().__init__()
        self.image_shape = (channels, side, side)

        def layer(c_in, c_out, pool):
            conv = nn.Conv2d(c_in, c_out, 3, padding=1)
            return conv, nn.MaxPool2d(pool), group_norm(c_out), nn.SiLU()

        self.body = nn.Sequential(
            *layer(channels, width, 2), *layer(width, 2 * width, 2),
            *layer(2 * width, 4 * width, 1), *layer(4 * width, 16, 1), nn.Flatten(),
            nn.Dropout(0.3), nn.Linear(16 * (side // 4)**2, 4 * width), nn.SiLU())
        self.head = nn.Linear(4 * width, classes)

    def forward(self, images):
        features = self.body(images / 127.5 - 1)
        return features, self.head(features)


def load_judge(path, image_shape):
    """-> a Judge, frozen. judge.meta has the moments mu and sigma of the features of true images,
    and judge.meta["floor"] the figures of other true images. UserError for another file, or for a
    judge of images that are not (C, H, W) = image_shape."""
    with reading(path, f"a judge of images {tuple(image_shape)}, made by lab/teachers.py"):
        saved = load_saved(path)
        judge = load_frozen(Judge, saved["net_args"], saved["state_dict"])
        judge.meta, judge.sha256 = dict(saved["meta"]), sha256(path)
        require(judge.image_shape == tuple(image_shape), f"a judge of images {judge.image_shape}")
        features = torch.eye(judge.head.in_features)  # tried now: an error comes before the work
        frechet_distance(*moments(features), judge.meta["mu"], judge.meta["sigma"])
        require(all(isinstance(v, int | float) for v in judge.meta["floor"].values()),
                "figures that are no numbers")
    return judge


@torch.no_grad()
def grade(judge, images, labels, batch=500):
    """Images (N, C, H, W) and the classes that were asked for, one-hot labels (N, classes) -> "fd",
    the Frechet distance to true images in the judge's features, which is not FID, and
    "class_accuracy", the share of images in which the judge sees that class."""
    seen = [judge(x) for x in to_uint8(images).split(batch)]
    features, logits = [torch.cat(v).cpu() for v in zip(*seen)]
    figures = {"fd": frechet_distance(*moments(features), judge.meta["mu"], judge.meta["sigma"])}
    if labels.shape[1] == logits.shape[1]:
        right = logits.argmax(1) == labels.argmax(1).cpu()
        figures["class_accuracy"] = right.double().mean().item()
    return figures


# ask(images (N, C, H, W), labels) -> figures, of which the first is a distance: the best generator
# has the smallest. `look` and `final` images are asked about. `known` has the figures of others.
Examiner = namedtuple("Examiner", "ask look final known")


def find_judge(args, d_q, meta):
    """-> the Examiner of a run whose judge is a classifier, or None. It knows the figures of true
    images from the judge's file, and of the teacher from its own if they are of this judge."""
    if args.judge == "none" or not (args.judge or args.teacher == "fashion"):
        return None
    judge = load_judge(args.judge or JUDGE, d_q.image_shape).to(next(d_q.parameters()).device)
    classes = judge.head.out_features
    require(d_q.label_dim in (0, classes),
            f"the judge knows {classes} classes, the teacher {d_q.label_dim}")
    known = judge.meta["floor"] | {"n": FINAL, "judge_sha256": judge.sha256}
    if meta.get("judge_sha256") == judge.sha256:
        known |= meta.get("judged", {})
    return Examiner(lambda x, labels: grade(judge, on_screen(d_q, x), labels), LOOK, FINAL, known)


def compare_with_teacher(d_q, path, n=1000):
    """The Examiner for any teacher: "sw2", the sliced Wasserstein-2 distance of n images from n of
    the teacher's samples, in pixels; "sw2_teacher", of n other samples, is the least to expect. The
    samples are drawn once and kept in the file `path`. UserError if they are not finite."""
    if not path.exists():
        seeds = range(10**6, 10**6 + 2 * n)  # not those of the generator's images
        device = next(d_q.parameters()).device
        latents = draw_latents(seeds, d_q.image_shape, d_q.label_dim, device=device)
        batches = list(zip(*[v.split(100) for v in latents]))
        x = [sample_teacher(d_q, *batch).cpu() for batch in progress(batches, "teacher's samples")]
        require(all(v.isfinite().all() for v in x),
                "samples of the teacher are not finite: look at it with lab/check_teacher.py")
        save({"images": torch.cat(x)}, path)
    with reading(path, "samples of this teacher: remove the file, to draw them again"):
        images = load_saved(path)["images"].reshape(2 * n, *d_q.image_shape)
    random = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(images[0].numel(), 500, generator=random), dim=0)
    project = lambda x: (x.cpu().flatten(1) @ directions).sort(dim=0)[0]
    theirs, others = [project(x) for x in images.split(n)]
    known = {"sw2_teacher": sliced_w2(others, theirs), "n": n}
    print(f"the floor of sw2, of other samples of the teacher: {known['sw2_teacher']:.4g}")
    return Examiner(lambda x, labels: {"sw2": sliced_w2(project(x), theirs)}, n, n, known)


# ---- Teachers ----
def load_denoiser(path, teacher=None, several=False):
    """NVIDIA's .pkl, a .pt of ours, or a run's folder -> net (frozen, on the CPU), t_star, meta.
    The network of a run whose teacher is the user's own is built by `teacher`, module:function.
    A generator of several evaluations is refused, unless `several` says that they will be made."""
    if str(path).endswith(".pkl") and Path(path).is_file():
        return load_edm_pickle(path), PAPER["t_star"], {}  # t*: that of SiD's generators

    function = teacher if teacher and ":" in teacher else None

    def build(own=None, **net_args):
        require(not own or function, f"the network is that of --teacher {own}: add this option")
        return import_teacher(function) if own else make_unet(**net_args)

    net, t_star, meta = load_generator(path, build)
    require(several or meta.get("segments", 1) == 1,
            f"{path} takes several evaluations: lab/neighbours_images.py draws its samples")
    return net, t_star, meta


def import_teacher(name):
    """package.module:function, imported and called -> the user's own denoiser net(x, t), frozen.
    UserError unless it is a float32 torch module with image_shape (C, H, W) and label_dim."""
    module, _, function = name.partition(":")
    with (reading(f"--teacher {name}", "a function that returns a denoiser (README.md)"),
          torch.device("cpu")):  # and not on the meta device, where load_frozen builds a network
        net = getattr(importlib.import_module(module), function)()
        require({w.dtype for w in net.parameters()} == {torch.float32}, "weights not in float32")
        require(len(net.image_shape) == 3 and net.label_dim >= 0, "its image_shape or label_dim")
        x = torch.zeros(2, *net.image_shape, requires_grad=True)
        t = torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1)  # two, for a batch has many noise levels
        y = bind_labels(net.eval(), torch.zeros(2, net.label_dim))(x, t)
        require(y.shape == x.shape, f"x {tuple(x.shape)} becomes {tuple(y.shape)}")
        require(y.isfinite().all(), "its output is not finite")
        slope = torch.autograd.grad(y.sum(), x, allow_unused=True)[0] if y.requires_grad else None
        require(slope is not None and slope.any(), "no gradient flows from its output to its input")
    return net.requires_grad_(False)


def load_teacher(name):
    """The teacher of this name or file, frozen -> net, its file's meta, and facts for args.json.
    UserError if the teacher cannot be had; no other one takes its place."""
    if ":" in name:
        return import_teacher(name), {}, {"teacher": name}
    path = Path(FASHION if name == "fashion" else name)
    if name in CIFAR:
        path = fetch(URL.format(name if "-" in name else f"{name}-vp"))
    path = path / "g_ema.pt" if path.is_dir() else path
    require(path.exists(), f"--teacher {name}: no such file, and none of fashion, "
            f"{', '.join(CIFAR)} or package.module:function")
    net, _, meta = load_denoiser(path)
    weights, digest = sum(w.numel() for w in net.parameters()), sha256(path)
    print(f"teacher: {path}, {weights:,} parameters, sha256 {digest}")
    return net, meta, {"teacher": name, "teacher_sha256": digest}


# ---- Samples ----
def bind_labels(net, labels, amp="none"):
    """(x_t, t) -> denoised, for one-hot labels (B, label_dim); under autocast if amp is bf16."""
    return as_denoiser(net, amp, **{"class_labels": labels} if labels.shape[1] else {})


@torch.no_grad()
def sample_one_step(g, t_star, z, labels, batch=200):
    """(B.4): z (N, C, H, W) standard normal, labels (N, label_dim) -> images (N, C, H, W)"""
    pairs = zip(z.split(batch), labels.split(batch))
    return torch.cat([bind_labels(g, c)(t_star * z, t_star) for z, c in pairs])


def sample_teacher(net, z, labels, num_steps=18, batch=200):
    """The same by Heun's method: 2 num_steps - 1 evaluations of the teacher, 35 unless given. A
    teacher may have another span of noise levels than EDM's, as its attribute sigma_range."""
    span = dict(zip(("sigma_min", "sigma_max"), getattr(net, "sigma_range", ())))
    pairs = zip(z.split(batch), labels.split(batch))
    return torch.cat([edm_sampler(bind_labels(net, c), z, num_steps, **span) for z, c in pairs])


def on_screen(net, x):
    """Images in the network's units -> in [-1, 1], where pictures are. A teacher whose data have
    another range says so by its attribute image_range, the values shown as black and as white."""
    low, high = getattr(net, "image_range", (-1, 1))
    return (x - low) * (2 / (high - low)) - 1


def picture(net, *sets, rows=10):
    """Sets of the network's images (N, C, H, W) beside each other, each in at most `rows` rows,
    enlarged to about 600 pixels in height. -> a Pillow image"""
    blocks = [image_grid(on_screen(net, x), math.ceil(len(x) / rows)) for x in sets]
    gap, zoom = 4, max(1, 600 // blocks[0].height)
    wide = Image.new("RGB", (sum(b.width + gap for b in blocks) - gap, blocks[0].height), "white")
    for i, block in enumerate(blocks):
        wide.paste(block, (i * (block.width + gap), 0))
    return wide.resize((wide.width * zoom, wide.height * zoom), Image.Resampling.NEAREST)


# ---- Distillation ----
def train(args, d_q, run, evaluate):
    """Algorithm 2. d_q is frozen (load_frozen); d_psi and g started as copies of d_q."""
    d_psi, g, g_ema = run.d_psi, run.g, run.g_ema
    generator_loss, distance = make_generator_loss(args)
    weight_psi, t_star, device = lambda_edm, args.t_star, next(g.parameters()).device
    draw = partial(draw_batch, args, d_q.image_shape, d_q.label_dim)
    classes = torch.arange(d_q.label_dim, device=device)
    bind = lambda net, cond: bind_labels(net, (cond[:, None] == classes).float(), args.amp)

    for step in run.steps():
        random = seed_step(args.seed, step, device)
        fall = 1 - step / args.steps if args.anneal == "linear" else 1
        # ---- Algorithm 2: begin ----
        train_only(d_psi, frozen=g)
        for _ in range(args.psi_updates):
            for z, t, eps, cond in draw("psi", random):
                with torch.no_grad():
                    x_0 = bind(g, cond)(z, t_star)
                loss_psi = dsm_loss(bind(d_psi, cond), x_0, t, eps, weight_psi)  # (B.2)
                run.add(loss_psi=loss_psi)
                (loss_psi.sum() / args.batch).backward()
            update(run.opt_psi, (args.lr_psi or args.lr) * fall)

        train_only(g, frozen=d_psi)
        for z, t, eps, cond in draw("theta", random):
            x_0 = bind(g, cond)(z, t_star)  # (B.4), (B.15)
            loss_theta, y_t = generator_loss(bind(d_psi, cond), bind(d_q, cond), x_0, t, eps=eps)
            run.add(loss_theta=loss_theta, divergence=distance.d(y_t),
                    y_norm=y_t.flatten(1).norm(dim=1))
            (loss_theta.sum() / args.batch).backward()  # (B.13)
        update(run.opt_theta, args.lr * fall)
        ema_update(g_ema, g, ema_beta(step * args.batch, args.batch, args.ema_half_life))
        # ---- Algorithm 2: end ----
        if run.due(args.log_every):
            run.write(**(evaluate() if run.due() else {}))


def prepare(args, folder, d_q, facts):
    """-> the run, new or as ckpt.pt has it. g and d_psi start as copies of the teacher."""
    parts = make_parts(d_q, args.adam_eps)
    for layer in [*parts["d_psi"].modules(), *parts["g"].modules()]:
        if isinstance(layer, Block):
            layer.dropout.p = args.dropout
    net_args = getattr(d_q, "net_args", {"own": facts["teacher"]})
    return Run(args, folder, facts, parts["g_ema"], net_args, **parts)


def distil(args, run, d_q, examiner, train=train, sample=sample_one_step):
    """Train, with looks at the generator; then teacher and one step side by side. A script of lab/
    brings other functions."""
    if not examiner and args.judge != "none" and run.is_first:
        examiner = compare_with_teacher(d_q, run.folder / "teacher_samples.pt")
    for net in (run.d_psi, run.g, d_q) if args.compile else ():
        net.compile()
    classes, shape, device = d_q.label_dim, d_q.image_shape, next(d_q.parameters()).device
    by_rows = [row % classes for row in range(10) for _ in range(8)] if classes else None
    shown = draw_latents(range(80), shape, classes, by_rows, device)
    one_step = partial(sample, run.g_ema, args.t_star)

    def examine(n):
        z, labels = draw_latents(range(n), shape, classes, device=device)
        return examiner.ask(one_step(z, labels), labels)

    def evaluate():
        """Draws a picture, and saves the best generator so far. -> figures"""
        save_picture(picture(d_q, one_step(*shown)), run.folder / "samples" / f"{run.step:07}.png")
        if not examiner:
            return {}
        figures = examine(examiner.look)
        name = next(iter(figures))
        if figures[name] < min((line[name] for line in run.lines() if name in line), default=1e99):
            run.save_generator("g_best.pt")
        return figures

    if run.step == 0 and run.is_first:
        run.write(**evaluate())
    train(args, d_q, run, evaluate)
    if run.is_first:
        both = picture(d_q, sample_teacher(d_q, *shown), one_step(*shown))
        save_picture(both, run.folder / "samples.png")
        summarise(run, **examine(examiner.final) | examiner.known if examiner else {})


def summarise(run, **figures):
    """Write metrics.json, and print what the file says."""
    metrics = run.finish(**figures)
    titles = {"fd": "FD-judge {:8.2f}", "class_accuracy": "right class {:6.1%}",
              "sw2": "sliced W2 {:8.4f}", "n": "{:6} images"}
    for name, of in {"true images": "_floor", "teacher": "_teacher", "one step": ""}.items():
        cells = [title.format(figures[key + of]) for key, title in titles.items()
                 if key + of in figures]
        if cells:
            print(f"{name:13}", *cells, sep="  ")
    own = f" --teacher {metrics['teacher']}" if ":" in metrics["teacher"] else ""
    print(f"{metrics['seconds']:.0f} s; pictures: {run.folder}/samples.png (teacher | one step)\n"
          f"next: python 02_edm_cifar.py --sample {run.folder}{own} --n 64 --teacher-sample")


# ---- Without training ----
def sample(args, device, several=None):
    """--sample: image k from seed + k, as a picture (.png), an array (.npz) or a folder of PNGs. A
    script of lab/ brings `several`, which samples like sample_one_step by several evaluations."""
    g, t_star, meta = load_denoiser(args.sample, args.teacher, several is not None)
    makers = {"one_step": partial(several or sample_one_step, g.to(device), args.t_star or t_star)}
    require(all(0 <= label < g.label_dim for label in args.classes or ()),
            f"--classes {args.classes}: {args.sample} has {g.label_dim} classes, the first is 0")
    seeds = range(args.seed, args.seed + args.n)
    z, labels = draw_latents(seeds, g.image_shape, g.label_dim, args.classes, device)
    if args.teacher_sample:
        name = args.teacher or meta.get("teacher", "")
        # A file may name a function of the user's, but only the command line has it imported.
        require(name and (":" not in name or args.teacher == name),
                f"--teacher-sample: name the teacher of {args.sample} by --teacher")
        d_q = load_teacher(name)[0].to(device)
        require((d_q.image_shape, d_q.label_dim) == (g.image_shape, g.label_dim),
                f"--teacher {name} has other images or classes than {args.sample}")
        makers = {"teacher": partial(sample_teacher, d_q)} | makers
    out = sample_path(args, args.sample)
    sets = {name: make(z, labels) for name, make in makers.items()}
    values = {f"{name}_values": x.cpu() for name, x in sets.items()}  # (N, C, H, W), as drawn
    draw = partial(picture, g, *sets.values(), rows=math.ceil(args.n**0.5))
    sets = {name: on_screen(g, x) for name, x in sets.items()}
    numbers = labels.argmax(1).cpu() if g.label_dim else []
    write_samples(out, sets, draw, args.seed, labels=numbers, **values)
    print(f"{args.n} images ({' | '.join(sets)}): {out}")


# ---- The command line ----
def stage_parser(doc=__doc__, methods=()):
    parser = make_parser(doc, methods, images=True, **PRESETS["fashion"])
    add = parser.add_argument_group("stage 2").add_argument
    add("--teacher", default="fashion", help=f"fashion (embedded), {', '.join(CIFAR)} (NVIDIA's "
        "CIFAR-10, 223 MB to download), a .pkl or .pt file, a run, or package.module:function")
    add("--judge", metavar="FILE", help="a classifier of lab/teachers.py, which says how good "
        "samples are; fashion has its own; else sliced W2 to the teacher's samples; or none")
    add("--preset", choices=PRESETS, help="the defaults of all other options: fashion with that "
        "teacher, else paper (Table 5)")
    add("--dropout", type=float, help="in the network that learns (SiD: 0.13)")
    add("--classes", type=int, nargs="+", help="of --sample, in turn; random unless given")
    add("--teacher-sample", action="store_true", help="--sample: the teacher's images beside")
    return parser


@one_line_errors
def main(argv=None):
    parser = stage_parser()
    args = parser.parse_args(argv)
    device = pick_device(args.device, args.tf32)
    if args.sample:
        parser.set_defaults(t_star=None, teacher=None)  # the file's own
        return sample(parser.parse_args(argv), device)
    preset = args.preset or ("fashion" if args.teacher == "fashion" else "paper")
    parser.set_defaults(**PRESETS[preset], preset=preset)
    args = parser.parse_args(argv)  # again, now that the defaults are known
    require(0 <= args.dropout < 1, f"--dropout {args.dropout}: expected from 0 to below 1")
    d_q, meta, facts = load_teacher(args.teacher)
    layout = torch.channels_last if args.amp == "bf16" else torch.preserve_format
    d_q = d_q.to(device, memory_format=layout)  # channels_last: the fastest bfloat16 convolutions
    examiner = find_judge(args, d_q, meta)
    own = ":" in args.teacher  # module:function, and not the path of a file
    name = args.teacher.replace(":", ".") if own else Path(args.teacher).stem
    run = prepare(args, Run.default_folder(args, name), d_q, facts)
    if not run.finished():
        distil(args, run, d_q, examiner)


if __name__ == "__main__":
    main()
