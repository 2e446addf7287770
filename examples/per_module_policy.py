"""Give parts of a model another precision, by name, by class and by function, and see what each rule buys.

    pip install wrapprec
    python examples/per_module_policy.py [--policy bf16-module] [--small]

No training: the outputs of one batch are compared with FP32's under growing lists of rules.
"""

from __future__ import annotations

import argparse
import copy
import textwrap

import torch
from torch import Tensor, nn

import wrapprec
from wrapprec import Policy, Rule


class Pooling(nn.Module):
    """Sums rows into groups. The sums run over many rows, so they are made in FP32 whatever is around."""

    def forward(self, x: Tensor, group: Tensor) -> Tensor:
        with wrapprec.float32():
            return torch.zeros(int(group.max()) + 1, x.shape[-1]).index_add_(0, group, x)


class Model(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width))
        self.pooling = Pooling()
        self.decoder = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor, group: Tensor) -> Tensor:
        return self.head(self.decoder(self.pooling(self.encoder(x), group)))


def is_square(name: str, module: nn.Module) -> bool:
    """A function may select by anything that a module tells."""
    return isinstance(module, nn.Linear) and module.in_features == module.out_features


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--policy", default="bf16-module", help="bf16-module, bf16-mixed, 16-module, 16-mixed ...")
    parser.add_argument("--small", action="store_true", help="a narrow model, to see that it runs")
    args = parser.parse_args()

    torch.manual_seed(0)
    width, rows = (16, 64) if args.small else (256, 4096)
    model = Model(width)
    x, group = torch.randn(rows, 16), torch.randint(0, 8, (rows,))
    with torch.no_grad():
        exact = model(x, group)

    choices: dict[str, list[Rule]] = {
        "no rules": [],
        "the head in float32 (by name)": [Rule("head", "float32")],
        "and all below the decoder (glob)": [Rule("head", "float32"), Rule("decoder.*", "float32")],
        "square layers (by function)": [Rule(is_square, "float32")],
        "every Linear (by class)": [Rule(nn.Linear, "float32")],
    }
    print(f"{args.policy}: largest error of the outputs, relative to float32's largest output\n")
    for title, rules in choices.items():
        candidate = copy.deepcopy(model)
        with wrapprec.wrap(candidate, policy=args.policy, rules=rules), torch.no_grad():
            error = (candidate(x, group) - exact).abs().max() / exact.abs().max()
        print(f"  {title:34} {error:.1e}")

    policy = Policy.parse(f"{args.policy}; decoder.2 = float32; head = float32")
    print("\nRules are part of a policy, which is text:\n")
    print(f"  {policy}")
    print("\nor a file:\n")
    print(textwrap.indent(policy.to_toml(), "  "))
    assert Policy.parse(str(policy)) == policy == Policy.from_toml(policy.to_toml())
    print("The plan says what every module gets, and which rule decided:\n")
    print(wrapprec.resolve(model, policy))


if __name__ == "__main__":
    main()
