"""The core on a CUDA device: skipped where there is none."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from wrapprec import CaptureError, LossScale, resolve, wrap
from wrapprec.backends.select import backend_for
from wrapprec.recipe import RECIPES

pytestmark = pytest.mark.cuda

POLICIES = ["16-mixed", "bf16-mixed", "16-module", "bf16-module"]


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 16)).cuda()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("form", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_five_lines_follow_float32_on_cuda(policy, form):
    x, y = torch.randn(32, 64, device="cuda"), torch.randint(0, 16, (32,), device="cuda")
    losses = []
    for wrapped in (False, True):
        model = make()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **form)
        if wrapped:
            wrap(model, optimizer, policy)
        for _ in range(20):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        losses.append(float(loss.detach()))
    # 20 steps of 2**-9 relative rounding each.
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


# What torch says itself when the mode is set.
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("policy", ["16-mixed", "16-module"])
def test_fused_step_never_waits_for_the_device(policy):
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    wrap(model, optimizer, policy, loss_scale=LossScale(init_scale=1024.0))
    x, y = torch.randn(32, 64, device="cuda"), torch.randint(0, 16, (32,), device="cuda")

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    for _ in range(4):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("policy", ["16-mixed", "16-module"])
@pytest.mark.parametrize("form", [{"foreach": True}, {"foreach": False}])
def test_any_other_step_waits_once(policy, form):
    model = make()
    # SGD itself reads nothing.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, **form)
    wrap(model, optimizer, policy, loss_scale=LossScale(init_scale=1024.0))
    x, y = torch.randn(32, 64, device="cuda"), torch.randint(0, 16, (32,), device="cuda")

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    for _ in range(4):
        step()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        always = torch.is_warn_always_enabled()
        torch.set_warn_always(True)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.set_warn_always(always)
    assert len([one for one in caught if "called a synchronizing" in str(one.message)]) == 1


def batches(number=6):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(32, 64, generator=generator).cuda(), torch.randint(0, 16, (32,), generator=generator).cuda())
        for _ in range(number)
    ]


@pytest.mark.parametrize("policy", ["bf16-mixed", "bf16-module", "32-true"])
def test_graphed_model_trains_as_without_graphs(policy):
    losses = []
    for graphed in (False, True):
        model = make()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        wrap(model, optimizer, policy)
        if graphed:
            model = torch.cuda.make_graphed_callables(model, (torch.zeros(32, 64, device="cuda"),))
        losses.append([])
        for x, y in batches():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    # The same kernels; cuBLAS may choose others in another stream's workspace.
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert losses[0][0] != losses[0][-1]


@pytest.mark.parametrize("policy", ["bf16-mixed", "bf16-module", "32-true"])
@pytest.mark.parametrize("form", [{"fused": True}, {"foreach": True}])
def test_whole_step_in_a_graph_trains_as_without(policy, form):
    losses = []
    for recorded in (False, True):
        model = make()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, capturable=True, **form)
        wrap(model, optimizer, policy)
        x, y = (t.clone() for t in batches(1)[0])

        def step(model=model, optimizer=optimizer, x=x, y=y):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            return loss.detach()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if recorded:
            optimizer.zero_grad()
            with torch.cuda.graph(graph):
                loss = step()
        losses.append([])
        for a, b in batches():
            x.copy_(a)
            y.copy_(b)
            if recorded:
                graph.replay()
            else:
                loss = step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert losses[0][0] != losses[0][-1]


# Nothing was recorded before the error, and torch says so when it leaves the context.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
@pytest.mark.parametrize("what", ["forward", "step"])
def test_graph_under_a_loss_scale_is_refused(what):
    model, x = make(), torch.randn(32, 64, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True, capturable=True)
    wrap(model, optimizer, "16-mixed")
    model(x).sum().backward()
    with pytest.raises(CaptureError, match="use a bf16 policy"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        model(x) if what == "forward" else optimizer.step()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("form", [{"fused": True}, {"foreach": True}])
def test_forward_and_backward_on_a_side_stream_train_as_on_the_usual_one(policy, form):
    losses = []
    for aside in (False, True):
        model = make()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **form)
        handle = wrap(model, optimizer, policy, **({"loss_scale": 2.0**10} if policy.startswith("16") else {}))
        usual = torch.cuda.current_stream()
        stream = torch.cuda.Stream() if aside else usual
        losses.append([])
        for turn, (x, y) in enumerate(batches()):
            optimizer.zero_grad()
            stream.wait_stream(usual)
            with torch.cuda.stream(stream):
                # One overflow of float16: the flag is written there, and read here.
                factor = 1e8 if turn == 2 and policy.startswith("16") else 1.0
                loss = nn.functional.cross_entropy(model(x), y) * factor
                loss.backward()
            usual.wait_stream(stream)
            optimizer.step()
            losses[-1].append(loss.item())
        assert handle.skipped_steps == policy.startswith("16")
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


@pytest.mark.parametrize("form", [{"fused": True}, {"foreach": True}])
def test_overflow_skips_and_lowers_the_scale_on_cuda(form):
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **form)
    handle = wrap(model, optimizer, "16-mixed", loss_scale=LossScale(init_scale=2.0**24))
    before = [p.detach().clone() for p in model.parameters()]
    (model(torch.randn(32, 64, device="cuda")).sum() * 1e4).backward()
    torch.nn.utils.clip_grad_value_(model.parameters(), 1.0)
    optimizer.step()
    assert handle.step_was_skipped and handle.scale == 2.0**23
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("form", [{"fused": True}, {"foreach": True}])
def test_bfloat16_weights_in_a_float16_model_have_true_gradients_and_skip(form):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 16)).cuda(), torch.randn(32, 64, device="cuda")
    model(x).square().mean().backward()
    true = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    optimizer = torch.optim.AdamW([{"params": layer.parameters()} for layer in model], lr=1e-3, **form)
    handle = wrap(model, optimizer, "16-mixed", rules=[("1", "bf16-true")], loss_scale=1000.0)
    model(x).square().mean().backward()
    for param, grad in zip(model.parameters(), true, strict=True):
        # Six roundings of bfloat16, of 2**-9 each.
        assert (param.grad.float() - grad).norm() <= 6 * 2**-9 * grad.norm()
    before = [p.detach().clone() for p in model.parameters()]
    (model(x) * torch.inf).sum().backward()
    optimizer.step()
    assert handle.step_was_skipped
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_host_waits_for_flags_and_scales_that_come_from_the_device():
    # An embedding too large for the device: the loss scale is where the first parameter is.
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.here, self.there = nn.Embedding(8, 16), nn.Linear(16, 4).cuda()

        def forward(self, x):
            return self.there(self.here(x).cuda())

    def slow(grad):
        # The device is half a second behind the host when the flag is asked for.
        torch.cuda._sleep(10**9)
        return grad * torch.inf

    torch.manual_seed(0)
    model, x = Split(), torch.arange(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wrap(model, optimizer, "16-mixed", loss_scale=2.0**10)
    for bad in (False, True):
        optimizer.zero_grad()
        out = model(x)
        if bad:
            out.register_hook(slow)
        out.sum().backward()
        for param in model.parameters():
            param.grad.nan_to_num_().clamp_(-1, 1)
        optimizer.step()
        assert handle.step_was_skipped is bad


def test_auto_takes_bfloat16_where_the_device_has_it():
    plan = resolve(make())
    has = torch.cuda.is_bf16_supported(including_emulation=False)
    assert str(plan.policy) == ("bf16-mixed" if has else "16-mixed") and plan.reason


def test_capability_is_the_devices_own():
    found = backend_for("cuda").capability(torch.device("cuda"))
    assert (torch.bfloat16 in found.fast_dtypes) == torch.cuda.is_bf16_supported(including_emulation=False)
    native = torch.version.hip or torch.cuda.get_device_capability() >= (8, 9)
    assert torch.version.hip or found.notes[1] == ("float8 is native" if native else "float8 is not native")


def test_model_moved_after_wrap_takes_its_scale_along():
    model = make().cpu()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wrap(model, optimizer, "16-mixed", loss_scale=LossScale(init_scale=2.0**7))
    model.cuda()
    model(torch.randn(8, 64, device="cuda")).sum().backward()
    optimizer.step()
    assert handle.scale == 2.0**7 and handle.plan.device.startswith("cuda")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("place", ["inside", "around"])
@pytest.mark.parametrize("number", [1, 2])
def test_data_parallel_gives_the_gradients_of_float32(policy, place, number):
    if torch.cuda.device_count() < number:
        pytest.skip(f"needs {number} devices")
    grads, x = [], torch.randn(32, 64, device="cuda")
    for wrapped in (False, True):
        net = make()
        model = nn.DataParallel(net, device_ids=list(range(number)))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        if wrapped:
            handle = wrap(net if place == "inside" else model, optimizer, policy)
        model(x).square().mean().backward()
        grads.append([p.grad for p in net.parameters()])
    for true, got in zip(*grads, strict=True):
        # Eight roundings of bfloat16, of 2**-9 each; TF32 is off for the reference by default.
        assert (got - true).norm() <= 8 * 2**-9 * true.norm()
    before = net[0].weight.detach().clone()
    optimizer.zero_grad()
    (model(x) * 1e30).sum().backward()
    for p in net.parameters():
        p.grad.nan_to_num_().clamp_(-1, 1)
    optimizer.step()
    # bfloat16 has float32's range: its loop takes the step, as float32's would.
    assert torch.equal(net[0].weight, before) is policy.startswith("16")
    assert handle.skipped_steps == policy.startswith("16")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("rows", [32, 5])
def test_gradients_of_fp8_layers_follow_float64_on_cuda(recipe, rows):
    pytest.importorskip("torchao")
    model, true = make(), make().double()
    # The rule overrides the thresholds below which nothing is gained.
    handle = wrap(model, policy="fp8-mixed", rules=[(nn.Linear, f"fp8,recipe={recipe}")])
    assert {p.precision.compute_dtype for p in handle.plan.placements if p.module_type == "Linear"} == {"fp8"}
    x = torch.randn(rows, 64, device="cuda")
    model(x).square().mean().backward()
    true(x.double()).square().mean().backward()
    for mine, other in zip(model.parameters(), true.parameters(), strict=True):
        # Three roundings to e4m3 or e5m2, 0.026 and 0.052 of the norm each.
        assert float((mine.grad - other.grad).norm() / other.grad.norm()) < 0.2
