"""Text to image with a reward: Diff-Instruct* (arXiv 2410.20898) in stage 3's miniature.

    python lab/reward_t2i.py --reward 6                  twelve minutes on one core
    python lab/shapes.py runs/miniature-reward-phuber-0  are shapes and colours still right?

The loss is SIM's, under stage 3's guided teacher, minus --reward times r(x_0, caption). The reward
r asks for more of the colour that a caption names for the shape: r is the share of the picture in
that colour. A reward moves the samples away from the teacher's: the table at the end has the price,
the Frechet distance, beside the mean reward.
"""
import importlib
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from common import nowgt, one_line_errors, pick_device, positive, reading, require, sim_loss

from lab.shapes import COLOURS

t2i = importlib.import_module("03_pixart_t2i")
NEAR = 0.5  # ours: a pixel at this distance from the colour counts 0.6; black is -1, white is 1


def share_in(x, colours):
    """Images (B, 3, H, W) and a colour for each, (B, 3), in [-1, 1] -> (B,), the share of pixels in
    the colour: 1 for a pixel that has the colour, less the farther a pixel is away."""
    squared = (x - colours[:, :, None, None]).square().sum(1)
    return torch.exp(-squared / (2 * NEAR**2)).mean((1, 2))


def colours_of(prompts, device):
    """The colours of the shapes in N prompts -> (N, 3) in [-1, 1]. UserError for other prompts."""
    with reading("--prompts", "captions such as 'a large red ring on a blue background'"):
        named = [COLOURS[prompt.split()[2]] for prompt in prompts]
    return 2 * torch.tensor(named, device=device) - 1


class Reward:
    """Diff-Instruct*'s loss. A reward must know what was asked for, and the denoisers only have the
    embedding of a caption: the reward finds the prompt by the embedding."""
    def __init__(self, scale):
        self.scale = scale

    def learn(self, prompts, captions, device):
        """The N prompts of the training, and their captions, N times (L, C)."""
        self.colours = colours_of(prompts, device)
        self.sums = torch.stack([caption.sum(0) for caption in captions]).to(device)

    def colours_asked(self, caption):
        """Padded captions (B, tokens, C) -> the colours (B, 3) of their prompts."""
        return self.colours[torch.cdist(caption.sum(1), self.sums).argmin(1)]

    def loss(self, d_psi, d_q, x_0, t, distance, eps=None, weight=nowgt):
        """sim_loss minus scale times the reward. The pixels are what is diffused: no decoder is
        needed. -> loss (B,); y_t detached"""
        loss, y_t = sim_loss(d_psi, d_q, x_0, t, distance, eps, weight)
        caption, _ = d_q.cond
        return loss - self.scale * share_in(x_0, self.colours_asked(caption)), y_t


class Test(t2i.Test):
    """Stage 3's test, and the mean reward of the images. UserError for latents, which have no
    colours."""
    def __init__(self, reward, pipeline, prompts, captions, meta):
        require(isinstance(pipeline, t2i.Miniature), "--teacher: expected a miniature")
        super().__init__(pipeline, prompts, captions, meta)
        reward.learn(prompts, captions, self.z.device)

    def __call__(self, solve):
        images, figures = super().__call__(solve)
        share = share_in(images, colours_of(self.prompts, images.device))
        return images, figures | {"reward": share.mean().item()}


@one_line_errors
def main(argv=None):
    parser = t2i.stage_parser(__doc__, ("reward",))
    parser.add_argument("--reward", type=positive, default=6.0, help="lambda, the reward's weight")
    parser.set_defaults(method="reward", teacher="miniature")
    args = parser.parse_args(argv)
    require(args.method == "reward" and not args.sample and not args.preset,
            "this script trains a miniature with --method reward: for all else, 03_pixart_t2i.py")
    reward = Reward(args.reward)
    t2i.distil_by_command(parser, argv, pick_device(args.device, args.tf32),
                          {"reward": reward.loss}, partial(Test, reward))


if __name__ == "__main__":
    main()
