"""Other people's networks as denoisers, D(x, t) = E[x_0 | x_0 + t eps = x], which stage 2 distils.

A wrapper stands in a file of yours, beside 02_edm_cifar.py, in a function that returns it:

    from lab.wrappers import DDPM
    def my_teacher():
        return DDPM(my_net, alphas_bar, "eps", image_shape=(3, 32, 32))

Then `python 02_edm_cifar.py --teacher my_file:my_teacher`. A network is called as net(input, time)
or, if label_dim > 0, as net(input, time, one_hot), with time of shape (B,). Below, u is a noisy
image in the network's own units, u = u_0 + t eps with t (B, 1, 1, 1); tau is the network's time.
A folder of diffusers needs no class: `return diffusers_unet("google-ddpm-cifar10-32")`.
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import nn

from common import UserError, reading, require


class Wrapper(nn.Module):
    """What all wrappers share. The network knows data u_0 = scale x_0 + shift, where x_0 is what
    stage 2 sees, within about [-1, 1], and near 0 where there is nothing. In the
    units of x_0: image_range is shown as black and white; the sampler starts at the upper end of
    sigma_range, and its last step but one is the lower end."""
    def __init__(self, net, image_shape, label_dim=0, scale=1.0, shift=0.0, image_range=(-1, 1),
                 sigma_range=(0.002, 80)):
        super().__init__()
        self.net, self.image_shape, self.label_dim = net, tuple(image_shape), label_dim
        self.scale, self.shift = scale, shift
        self.image_range, self.sigma_range = image_range, sigma_range

    def forward(self, x, t, class_labels=None):
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.ndim - 1))
        labels = () if class_labels is None else (class_labels,)
        u_0 = self.denoise(self.scale * x + self.shift, self.scale * t, *labels)
        return (u_0 - self.shift) / self.scale


class DDPM(Wrapper):
    """A network of steps 0 ... n - 1, where step i has alphas_bar[i] (n,), falling: its input is
    y = sqrt(abar) u_0 + sqrt(1 - abar) eps, of the noise level t^2 = (1 - abar) / abar. The network
    predicts "eps", "x_0" or "v" = sqrt(abar) eps - sqrt(1 - abar) u_0 (Salimans and Ho 2022)."""
    def __init__(self, net, alphas_bar, predicts, image_shape, **options):
        super().__init__(net, image_shape, **options)
        require(predicts in ("eps", "v", "x_0"), f"{predicts!r}: expected eps, v or x_0")
        self.predicts, alphas_bar = predicts, torch.as_tensor(alphas_bar, dtype=torch.float64)
        levels = ((1 - alphas_bar) / alphas_bar.clamp(min=1e-8)).sqrt().float()
        self.register_buffer("levels", levels, persistent=False)
        if "sigma_range" not in options:  # alphas_bar may end in 0, which no sampler starts from
            ends = levels.min().item(), levels[levels < 1000].max().item()
            self.sigma_range = tuple(end / self.scale for end in ends)

    def denoise(self, u, t, *labels):
        step = (self.levels - t.reshape(-1, 1)).abs().argmin(1)
        y = u / (1 + t**2).sqrt()
        out = self.net(y, step, *labels)
        if self.predicts == "eps":
            return u - t * out
        if self.predicts == "v":
            return (y - t * out) / (1 + t**2).sqrt()  # sqrt(abar) y - sqrt(1 - abar) v
        return out


class VPScore(Wrapper):
    """The score of y = alpha u at a continuous time tau in [0, 1], variance preserving (Song et al.
    2021): -2 log alpha = beta_min tau + (beta_max - beta_min) tau^2 / 2."""
    def __init__(self, net, image_shape, beta_min=0.1, beta_max=20.0, **options):
        super().__init__(net, image_shape, **options)
        self.beta_min, self.slope = beta_min, beta_max - beta_min

    def denoise(self, u, t, *labels):
        integral = torch.log1p(t**2)  # -2 log alpha, since alpha^2 = 1 / (1 + t^2)
        tau = ((self.beta_min**2 + 2 * self.slope * integral).sqrt() - self.beta_min) / self.slope
        alpha = 1 / (1 + t**2).sqrt()
        return u + t**2 * alpha * self.net(alpha * u, tau.flatten(), *labels)  # (B.3)


class VEScore(Wrapper):
    """The score of u at noise level t (variance exploding): net(u, t)."""
    def denoise(self, u, t, *labels):
        return u + t**2 * self.net(u, t.flatten(), *labels)


class RectifiedFlow(Wrapper):
    """The velocity v(y, tau) = E[eps - u_0 | y] of y = (1 - tau) u_0 + tau eps, tau in [0, 1] (Liu
    et al. 2022, (1)). Since u_0 = y - tau (eps - u_0), the denoiser is y - tau v exactly, where
    u = y / (1 - tau) and t = tau / (1 - tau)."""
    def denoise(self, u, t, *labels):
        y, tau = u / (1 + t), t / (1 + t)
        return y - tau * self.net(y, tau.flatten(), *labels)


# ---- diffusers ----
class OneHot(nn.Module):
    """A UNet2DModel, called as the wrappers call a network. Its first channels are its prediction.
    Where it has more channels, they are a variance, which a denoiser does not need."""
    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, y, step, one_hot=None):
        labels = None if one_hot is None else one_hot.argmax(1)
        return self.unet(y, step, class_labels=labels).sample[:, :y.shape[1]]


def diffusers_unet(folder, **options):
    """A folder in the layout of diffusers, with a UNet2DModel and its scheduler, such as
    google/ddpm-cifar10-32 -> a denoiser. The scheduler's file says what the network predicts.
    `options` are those of Wrapper. UserError without diffusers, or for another folder."""
    try:
        from diffusers import DDPMScheduler, UNet2DModel
    except ImportError:
        raise UserError("this teacher needs diffusers: pip install diffusers") from None
    parts = [path if (path := Path(folder) / name).is_dir() else Path(folder)
             for name in ("unet", "scheduler")]
    with reading(folder, "a local folder of diffusers with a UNet2DModel and its scheduler"):
        for path, file in zip(parts, ("config.json", "scheduler_config.json")):
            require((path / file).exists(), f"no {path / file}")
        unet = UNet2DModel.from_pretrained(parts[0], local_files_only=True)
        name = json.loads((parts[1] / "scheduler_config.json").read_text())["_class_name"]
        require(name in ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler"),
                f"a {name}: expected a DDPM, DDIM or PNDM scheduler")
        schedule = DDPMScheduler.from_pretrained(parts[1], local_files_only=True)
        sides = unet.config.sample_size
        height, width = (sides, sides) if isinstance(sides, int) else sides
        classes = unet.config.num_class_embeds or 0
        kind = {"epsilon": "eps", "v_prediction": "v", "sample": "x_0"}
        return DDPM(OneHot(unet.float()), schedule.alphas_cumprod,
                    kind[schedule.config.prediction_type],
                    (unet.config.in_channels, height, width), label_dim=classes, **options)
