"""Text to image with a reward: Diff-Instruct* (arXiv 2410.20898) in stage 3's miniature.

    python lab/reward_t2i.py --reward 1                  twelve minutes on one core
    python lab/shapes.py runs/miniature-reward-phuber-0  are shapes and colours still right?

The loss is SIM's, under stage 3's guided teacher, minus --reward times r(x_0). The reward r is how
vivid a picture is, whatever its caption says. A reward moves the samples away from the teacher's:
the table at the end has the price, the Frechet distance, beside the mean reward.
"""
import importlib
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from common import nowgt, one_line_errors, pick_device, positive, require, sim_loss

t2i = importlib.import_module("03_pixart_t2i")


def vividness(x):
    """Images (B, 3, H, W) in [-1, 1] -> (B,): the largest minus the smallest of a pixel's red,
    green and blue, as a mean over pixels. Grey has 0, and pure colours have 2. What is outside of
    [-1, 1] is clamped, as in a picture, so that g cannot earn a reward for what nobody sees."""
    x = x.clamp(-1, 1)
    return (x.amax(1) - x.amin(1)).mean((1, 2))


def reward_loss(d_psi, d_q, x_0, t, distance, eps=None, weight=nowgt, scale=1.0):
    """sim_loss minus scale times the reward. The pixels are what is diffused: no decoder is needed.
    -> loss (B,); y_t detached"""
    loss, y_t = sim_loss(d_psi, d_q, x_0, t, distance, eps, weight)
    return loss - scale * vividness(x_0), y_t


class Test(t2i.Test):
    """Stage 3's test, and the mean reward of the images. UserError for latents, which have no
    colours."""
    def __init__(self, pipeline, *arguments):
        require(isinstance(pipeline, t2i.Miniature), "--teacher: expected a miniature")
        super().__init__(pipeline, *arguments)

    def __call__(self, solve):
        images, figures = super().__call__(solve)
        return images, figures | {"reward": vividness(images).mean().item()}


@one_line_errors
def main(argv=None):
    parser = t2i.stage_parser(__doc__, ("reward",))
    parser.add_argument("--reward", type=positive, default=1.0, help="lambda, the reward's weight")
    parser.set_defaults(method="reward", teacher="miniature")
    args = parser.parse_args(argv)
    require(args.method == "reward" and not args.sample and not args.preset,
            "this script trains a miniature with --method reward: for all else, 03_pixart_t2i.py")
    more = {"reward": partial(reward_loss, scale=args.reward)}
    t2i.distil_by_command(parser, argv, pick_device(args.device, args.tf32), more, Test)


if __name__ == "__main__":
    main()
