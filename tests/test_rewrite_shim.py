"""What scripts import of Apex beside its amp: afterwards they run where Apex is not installed."""

from __future__ import annotations

import sys
import textwrap

import pytest
import torch
from rewriting import becomes, losses, rewritten, stays

import wrapprec

IMAGENET = """
import torch
try:
    from apex.parallel import DistributedDataParallel as DDP  # gradients averaged
    from apex.fp16_utils import *
    from apex import amp, optimizers
    from apex.multi_tensor_apply import multi_tensor_applier
except ImportError:
    raise ImportError("Please install apex from https://www.github.com/nvidia/apex to run this example.")
import apex

torch.manual_seed(0)
model = apex.parallel.convert_syncbn_model(torch.nn.Linear(2, 1))
optimizer = optimizers.FusedAdam(model.parameters(), lr=0.125)
model, optimizer = amp.initialize(model, optimizer, opt_level="O1", loss_scale=128.0)
if torch.cuda.device_count() > 99:
    model = DDP(model, delay_allreduce=True)
for step in range(4):
    loss = model(torch.ones(4, 2)).square().mean()
    optimizer.zero_grad()
    with amp.scale_loss(loss, optimizer) as scaled_loss:
        scaled_loss.backward()
    optimizer.step()
    print("loss", to_python_float(loss.detach()))
"""
HEAD = """
import torch
{imports}
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model, optimizer = amp.initialize(model, optimizer)
with amp.scale_loss(model(x).sum(), optimizer) as scaled_loss:
    scaled_loss.backward()
optimizer.step()
"""


def test_every_import_of_apex_becomes_the_same_name_of_the_shim() -> None:
    result = becomes(
        IMAGENET,
        """
        import torch
        import wrapprec
        try:
            from wrapprec.migrate.apex.parallel import DistributedDataParallel as DDP  # gradients averaged
            from wrapprec.migrate.apex.fp16_utils import *
            from wrapprec.migrate.apex import optimizers
            from wrapprec.migrate.apex.multi_tensor_apply import multi_tensor_applier
        except ImportError:
            raise ImportError("Please install apex from https://www.github.com/nvidia/apex to run this example.")
        from wrapprec.migrate import apex

        torch.manual_seed(0)
        model = apex.parallel.convert_syncbn_model(torch.nn.Linear(2, 1))
        optimizer = optimizers.FusedAdam(model.parameters(), lr=0.125)
        wrapprec.wrap(model, optimizer, "O1", loss_scale=128.0)
        if torch.cuda.device_count() > 99:
            model = DDP(model, delay_allreduce=True)
        for step in range(4):
            loss = model(torch.ones(4, 2)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print("loss", to_python_float(loss.detach()))
        """,
    )
    assert result.changed


def test_the_rewritten_script_runs_without_apex_and_trains_as_torch_does_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, _ = rewritten(IMAGENET)
    monkeypatch.setitem(sys.modules, "apex", None)  # `import apex` raises
    got = losses(code, [], {}, monkeypatch)
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.125)
    want = []
    for _ in range(4):
        loss = model(torch.ones(4, 2)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        want.append(float(loss.detach()))
    # float16 keeps 11 bits of the weights and outputs, and the loss is a square; Adam's steps are of the sign.
    assert got == pytest.approx(want, rel=0.01, abs=1e-4) and want[0] != pytest.approx(want[-1], rel=0.1)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("import apex, os", "import wrapprec.migrate.apex as apex, os"),
        ("import apex.parallel as P", "import wrapprec.migrate.apex.parallel as P"),
        ("import apex.parallel", "from wrapprec.migrate import apex"),
        ("import apex as A; y = A.optimizers", "import wrapprec.migrate.apex as A; y = A.optimizers"),
        (
            "from apex.optimizers import (\n    FusedAdam,  # fast\n    FusedSGD as S,\n)",
            "from wrapprec.migrate.apex.optimizers import (\n    FusedAdam,  # fast\n    FusedSGD as S,\n)",
        ),
        (
            "from apex.normalization.fused_layer_norm import FusedLayerNorm",
            "from wrapprec.migrate.apex.normalization import FusedLayerNorm",
        ),
        (  # it is imported and not used: the shim has the name
            "from apex.fp16_utils import FP16_Optimizer",
            "from wrapprec.migrate.apex.fp16_utils import FP16_Optimizer",
        ),
    ],
)
def test_every_form_of_an_import_keeps_its_names_and_layout(before: str, after: str) -> None:
    uses = "apex.parallel.DistributedDataParallel(1)\n" if "apex" in before.replace("apex.", "") else ""
    becomes(before + "\n" + uses, after + "\n" + uses)
    exec(compile(after, "script.py", "exec"), {})


def test_an_import_of_apex_that_only_its_amp_needed_goes() -> None:
    code, result = rewritten(HEAD.format(imports="import apex").replace("amp.", "apex.amp."))
    assert "apex" not in code and "amp" not in code and not result.left


@pytest.mark.parametrize(
    ("imports", "use", "where", "reason"),
    [
        ("from apex.contrib.xentropy import SoftmaxCrossEntropyLoss", "", 1, "`apex.contrib.xentropy` stays"),
        (
            "from apex.optimizers import FusedNovoGrad",
            "optimizer = FusedNovoGrad(p)",
            2,
            "has no counterpart: use torch",
        ),
        ("import apex", "apex.optimizers.FusedNovoGrad(p)", 2, "`apex.optimizers.FusedNovoGrad` stays"),
        ("import apex", "apex.mlp.MLP(3)", 2, "`apex.mlp.MLP` stays"),
        ("from apex.optimizers import FusedAdagradX", "", 1, "`apex.optimizers.FusedAdagradX` stays"),
        ("from apex.multi_tensor_apply import multi_tensor_applier as m", "m(op, flag)", 2, "torch._foreach_"),
    ],
)
def test_what_the_shim_lacks_or_refuses_keeps_its_import(imports: str, use: str, where: int, reason: str) -> None:
    stays(f"{imports}\n{use}\n", (where, reason))
    good = "from apex.optimizers import FusedAdam\n"
    code, result = rewritten(f"{imports}\n{good}{use}\n")
    assert code == f"{imports}\n{good}{use}\n".replace(good, good.replace("apex", "wrapprec.migrate.apex"))
    assert len(result.left) == 1


def test_where_amp_stays_the_rest_of_apex_stays_with_it() -> None:
    source = HEAD.format(imports="from apex import amp\nfrom apex.parallel import DistributedDataParallel as DDP")
    stays(
        source + "amp.init()\n",
        (3, "`apex.parallel` stays with Apex's amp"),
        (10, "wrapprec.migrate.apex has it"),
    )


def test_what_a_script_itself_calls_apex_is_not_apex() -> None:
    stays("apex = Peak()\napex.climb()\n")
    becomes(
        "import apex.optimizers as optimizers\n\ndef f(apex):\n    return apex.top\n",
        "import wrapprec.migrate.apex.optimizers as optimizers\n\ndef f(apex):\n    return apex.top\n",
    )


def test_a_name_of_the_script_is_not_taken_for_one_that_a_star_brings() -> None:
    source = textwrap.dedent(
        """
        from apex.fp16_utils import *
        def network_to_half(model):
            return model
        network_to_half(1)
        """
    )
    code, result = rewritten(source)
    assert code == source.replace("apex", "wrapprec.migrate.apex", 1) and not result.left


@pytest.mark.parametrize("imports", ["from apex import amp", "from apex import amp, optimizers", "import apex"])
def test_apex_without_its_amp_manages_no_precision(imports: str) -> None:
    make = "torch.optim.SGD" if "optimizers" not in imports else "optimizers.FusedSGD"
    script = (
        f"import torch\n{imports}\nmodel = torch.nn.Linear(2, 1)\noptimizer = {make}(model.parameters(), lr=0.1)\n"
        "for x in loader:\n    optimizer.zero_grad()\n    model(x).sum().backward()\n    optimizer.step()\n"
    )
    code, result = rewritten(script)
    assert 'wrapprec.wrap(model, optimizer, "auto")' in code and "import amp" not in code and not result.left
    assert "from apex" not in code and "import apex\n" not in code.replace("from wrapprec.migrate import apex\n", "")


def test_a_plain_loop_beside_a_part_of_apex_that_stays_is_left() -> None:
    _, result = rewritten(
        "import torch\nfrom apex import amp\nfrom apex.contrib import sparsity\nmodel = torch.nn.Linear(2, 1)\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\nmodel(x).sum().backward()\noptimizer.step()\n"
    )
    assert [one.line for one in result.left] == [2, 3]
    assert "apex may manage precision here" in result.left[0].words


@pytest.mark.parametrize(
    "made",
    [
        "model = network_to_half(model)\noptimizer = torch.optim.SGD(model.parameters(), lr=0.1)",
        "optimizer = torch.optim.SGD(model.half().parameters(), lr=0.1)\noptimizer = FP16_Optimizer(optimizer)",
        "copies = prep_param_lists(model)\noptimizer = torch.optim.SGD(model.parameters(), lr=0.1)",
    ],
)
def test_loop_with_the_older_tools_gets_their_new_home_and_no_line(made: str) -> None:
    source = f"""
import torch
from apex.fp16_utils import *
model = torch.nn.Linear(2, 1)
{made}
for step in range(3):
    model(torch.ones(4, 2)).square().mean().backward()
    optimizer.step()
"""
    code, result = rewritten(source)
    assert code == source.replace("from apex", "from wrapprec.migrate.apex")
    assert any("sets a precision itself" in remark.words for remark in result.left)


HALF = """
import torch

def main(args, batches):
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if args.fp16:
        try:
            import apex

            apex.amp.register_half_function({registered})
        except ImportError:
            raise ImportError("Please install apex.")
    if args.fp16:
        from apex import amp
        model, optimizer = amp.initialize(model, optimizer, opt_level=args.level)
    for x in batches:
        loss = model(x).sum()
        if args.fp16:
            with amp.scale_loss(loss, optimizer) as scaled:
                scaled.backward()
        else:
            loss.backward()
        optimizer.step()
"""


def test_a_product_registered_for_float16_goes_as_the_policy_rounds_it_anyway() -> None:
    becomes(
        HALF.format(registered='torch, "einsum"'),
        """
        import torch
        import wrapprec

        def main(args, batches):
            model = torch.nn.Linear(4, 2)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            if args.fp16:
                wrapprec.wrap(model, optimizer, args.level)
            for x in batches:
                loss = model(x).sum()
                loss.backward()
                optimizer.step()
        """,
    )


@pytest.mark.parametrize("registered", ['torch, "exp"', 'torch.nn.functional, "einsum"', "torch, args.name"])
def test_another_function_registered_for_float16_is_left_with_all_of_amp(registered: str) -> None:
    code, result = rewritten(HALF.format(registered=registered))
    assert code == HALF.format(registered=registered)
    assert any("has no counterpart here" in one.words for one in result.left)


def test_einsum_in_a_wrapped_model_computes_in_float16() -> None:
    class Product(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            product = torch.einsum("bi,oi->bo", x, self.weight)
            seen.append(product.dtype)
            return product

    seen: list[torch.dtype] = []
    model = torch.nn.Sequential(Product(4, 2))
    wrapprec.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), "O1")
    model(torch.ones(3, 4))
    assert seen == [torch.float16]
