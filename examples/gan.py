"""A GAN on scikit-learn's digits: two models, two optimizers, one line.

    pip install "wrapprec[examples]"
    python examples/gan.py [--policy bf16-mixed] [--steps 3000] [--small]

Each model has a loss scale of its own: when the generator's gradients overflow on their way through the discriminator,
the discriminator's scale falls, although its optimizer has nothing to do with that step.
"""

from __future__ import annotations

import argparse
import itertools

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

import wrapprec

SHADES = " .:-=+*#%@"


def layers(*widths: int) -> list[nn.Module]:
    """Linear layers, with an activation between any two."""
    found: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        found += [nn.Linear(before, after), nn.LeakyReLU(0.2)]
    return found[:-1]


def draw(images: Tensor) -> str:
    """Images of 8x8 pixels in [0, 1], side by side, as text."""
    shades = (images.clamp(0, 1) * (len(SHADES) - 1)).round().long().view(-1, 8, 8)
    lines = ("   ".join("".join(2 * SHADES[int(s)] for s in image[row]) for image in shades) for row in range(8))
    return "\n".join(line.rstrip() for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--policy", default="bf16-mixed", help="bf16-mixed, bf16-module, 16-mixed, 16-module, auto ...")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--small", action="store_true", help="a few steps of narrow models, to see that it runs")
    args = parser.parse_args()
    if args.small:
        args.steps = 20
    width = 32 if args.small else 256

    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    real_images = torch.from_numpy(pixels).float() / 16
    generator = nn.Sequential(*layers(32, width, width, 64), nn.Sigmoid())
    discriminator = nn.Sequential(*layers(64, width, width, 1))
    optimizer_g = torch.optim.Adam(generator.parameters(), lr=5e-4, betas=(0.5, 0.999), fused=True)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=5e-4, betas=(0.5, 0.999), fused=True)

    handle = wrapprec.wrap([generator, discriminator], [optimizer_g, optimizer_d], args.policy)  # the one line

    ones, zeros = torch.ones(64, 1), torch.zeros(64, 1)
    for step in range(1, args.steps + 1):
        real = real_images[torch.randint(len(real_images), (64,))]
        fake = generator(torch.randn(64, 32))

        optimizer_d.zero_grad()
        loss_d = F.binary_cross_entropy_with_logits(discriminator(real), 0.9 * ones)
        loss_d = loss_d + F.binary_cross_entropy_with_logits(discriminator(fake.detach()), zeros)
        loss_d.backward()
        optimizer_d.step()

        optimizer_g.zero_grad()
        loss_g = F.binary_cross_entropy_with_logits(discriminator(fake), ones)
        loss_g.backward()
        optimizer_g.step()

        if step % max(1, args.steps // 10) == 0:
            scales = ", ".join(f"{scale:g}" for scale in handle.scales)
            print(f"step {step:5}  generator {loss_g:.3f}  discriminator {loss_d:.3f}  loss scales {scales}")

    with handle.frozen():
        images = generator(torch.randn(1000, 32))
    names = KNeighborsClassifier(3).fit(pixels, labels).predict(images.mul(16).numpy())
    seen = sorted({int(name) for name in names})
    print(f"\nskipped steps: {handle.skipped_steps}")
    print(f"digits that 1000 generated images look like to a nearest-neighbour classifier: {seen}\n")
    print(draw(images[:6]))


if __name__ == "__main__":
    main()
