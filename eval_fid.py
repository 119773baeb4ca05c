"""Frechet distances between sets of images."""
import torch

from common import UserError


def moments(features):
    """features (N, D) -> their mean (D,) and covariance (D, D), in float64."""
    features = features.double()
    return features.mean(0), torch.cov(features.T)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) of two Gaussians: mu (D,), sigma (D, D).

    The trace of the root is the sum of the roots of the eigenvalues of r sigma2 r, r = sigma1^(1/2)."""
    if not all(v.isfinite().all() for v in (mu1, sigma1, mu2, sigma2)):
        raise UserError("a Frechet distance of moments that are not finite: expected finite features")
    values, vectors = torch.linalg.eigh(sigma1)
    r = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    root = torch.linalg.eigvalsh(r @ sigma2 @ r).clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * root
    if not distance > -1e-4 * (sigma1.trace() + sigma2.trace()):
        raise UserError(f"the Frechet distance is {distance:.4g}: expected moments of like features")
    return max(distance.item(), 0.0)


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
