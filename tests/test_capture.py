"""A wrapped model given to what records graphs: right numbers and weights that are not baked in, or a CaptureError."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import InternalTorchDynamoError
from torch._functorch.aot_autograd import aot_module
from torch._functorch.compilers import nop
from torch.fx.experimental.proxy_tensor import make_fx

import wrapprec
from wrapprec import CaptureError

POLICIES = ["bf16-mixed", "16-mixed", "bf16-module", "16-module"]
PLAIN = ["bf16-mixed", "bf16-module"]
SCALED = ["16-mixed", "16-module"]
# A handful of roundings of 2**-9 (bf16) or 2**-12 (f16) in the norm of an output or a gradient.
TOLERANCE = {"bf": 0.03, "16": 0.004}

pytestmark = [
    # TorchScript and its exporter say that they are old.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    # torch's own, about its own code.
    pytest.mark.filterwarnings("ignore:.isinstance.treespec:FutureWarning"),
    # Strict export sees that a scope is open while it traces.
    pytest.mark.filterwarnings("ignore:While [a-z]+, we found certain side effects:UserWarning"),
]


class Gain(nn.Module):
    """Uses a parameter of its own, which is lent, besides those of a child."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)
        self.gain = nn.Parameter(torch.tensor([0.5, 1.0, 2.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.gain


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.norm = nn.LayerNorm(8)
        self.last = Gain()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))


def pair(policy: str) -> tuple[Any, Any]:
    torch.manual_seed(0)
    plain = Net()
    mine = copy.deepcopy(plain)
    wrapprec.wrap(mine, policy=policy)
    return mine, plain


def close(got: Tensor, want: Tensor, policy: str) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape
    assert (got - want).norm() <= TOLERANCE[policy[:2]] * want.norm()


def has_low_precision(graph: Any) -> bool:
    return any(name in str(graph) for name in ("bfloat16", "float16", "bf16", "BFloat16", "Half"))


def skip_what_torch_cannot(recorder: str) -> None:
    if recorder == "strict export" and torch.__version__.startswith("2.9."):
        pytest.skip("strict export of torch 2.9 asserts that forward is a function of a source file")


RECORDERS: dict[str, Callable[[Any], Any]] = {
    "export": lambda m: torch.export.export(m, (X,)).module(),
    "strict export": lambda m: torch.export.export(m, (X,), strict=True).module(),
    "jit.trace": lambda m: torch.jit.trace(m, (X,)),
    "make_fx": lambda m: make_fx(m)(X),
    "aot_module": lambda m: aot_module(m, nop),
}
by_recorder = pytest.mark.parametrize("recorder", RECORDERS)


@by_recorder
@pytest.mark.parametrize("policy", PLAIN)
def test_recorded_model_has_right_outputs_and_gradients_and_its_weights_are_not_baked_in(
    recorder: str, policy: str
) -> None:
    skip_what_torch_cannot(recorder)
    mine, plain = pair(policy)
    recorded = RECORDERS[recorder](mine)
    close(recorded(X), plain(X), policy)
    with torch.no_grad():
        for model in (mine, plain):
            for param in model.parameters():
                param.mul_(1.5)
    close(recorded(X), plain(X), policy)
    recorded(X).square().mean().backward()
    plain(X).square().mean().backward()
    # The wrapped model's own parameters have the gradients, whichever way the graph holds them.
    for param, true in zip(mine.parameters(), plain.parameters(), strict=True):
        close(param.grad, true.grad, policy)


@pytest.mark.parametrize("policy", PLAIN)
def test_exported_graph_computes_in_low_precision(policy: str) -> None:
    mine, _ = pair(policy)
    assert has_low_precision(torch.export.export(mine, (X,)).run_decompositions().graph_module.code)
    assert has_low_precision(torch.jit.trace(mine, (X,)).inlined_graph)


@by_recorder
@pytest.mark.parametrize("policy", SCALED)
def test_recording_gradients_under_a_loss_scale_is_refused_with_the_remedy(recorder: str, policy: str) -> None:
    mine, plain = pair(policy)
    # Dynamo of torch 2.9 puts a name of its own on every error, before the text.
    wrapped = (InternalTorchDynamoError,) if recorder == "strict export" else ()
    with pytest.raises((CaptureError, *wrapped)) as caught:
        RECORDERS[recorder](mine)(X)
    lines = str(caught.value).removeprefix("CaptureError: ").splitlines()
    assert lines[0] == "Expected a wrapped model to be recorded without gradients, where a loss scale is on."
    assert lines[1].startswith("Received: a call under ") and '""' in lines[2]
    assert "wrapprec.unwrap(model)" in lines[3] and "torch.no_grad()" in lines[3]
    # Nothing is left open or lent: the model trains on.
    mine(X).square().mean().backward()
    plain(X).square().mean().backward()
    for param, true in zip(mine.parameters(), plain.parameters(), strict=True):
        close(param.grad, true.grad, policy)


@pytest.mark.parametrize("recorder", ["export", "strict export", "jit.trace", "make_fx"])
@pytest.mark.parametrize("policy", SCALED)
def test_recorded_without_gradients_a_float16_model_has_right_outputs(recorder: str, policy: str) -> None:
    skip_what_torch_cannot(recorder)
    mine, plain = pair(policy)
    with torch.no_grad():
        recorded = RECORDERS[recorder](mine)
        for model in (mine, plain):
            for param in model.parameters():
                param.mul_(1.5)
        close(recorded(X), plain(X), policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_remedy_of_unwrapping_a_copy_exports_the_float32_model(policy: str) -> None:
    mine, plain = pair(policy)
    copied = copy.deepcopy(mine)
    wrapprec.unwrap(copied)
    exported = torch.export.export(copied, (X,))
    assert torch.allclose(exported.module()(X), plain(X), atol=1e-6) and not has_low_precision(exported)
    assert wrapprec.handle_of(mine) is not None, "the original stays wrapped"


@pytest.mark.parametrize("policy", POLICIES)
def test_script_is_refused_with_the_remedy(policy: str) -> None:
    mine, _ = pair(policy)
    with pytest.raises(CaptureError) as caught:
        torch.jit.script(mine)
    assert str(caught.value).startswith("Expected a plain model for torch.jit.script.\nReceived: a wrapped one")
    assert "wrapprec.unwrap(model)" in str(caught.value)


@pytest.mark.parametrize("policy", POLICIES)
def test_onnx_export_records_no_loss_scale_and_no_gradients_to_lose(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What both exporters say while they record; onnx itself need not be there.
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    mine, plain = pair(policy)
    traced, exported = torch.jit.trace(mine, (X,)), torch.export.export(mine, (X,)).module()
    close(traced(X), plain(X), policy)
    close(exported(X), plain(X), policy)
    constants = [value for value in exported.state_dict().values() if value.numel() == 1]
    assert not constants, "the scale"
    # onnxruntime has no norm that takes float32 weights and other activations.
    graphs = [module.graph for module in exported.modules() if isinstance(module, torch.fx.GraphModule)]
    norms = [node for graph in graphs for node in graph.nodes if "layer_norm" in str(node.target)]
    assert norms and all(arg.meta["val"].dtype == torch.float32 for node in norms for arg in node.all_input_nodes)


@pytest.mark.parametrize("exporter", ["torch.export", "TorchScript"])
@pytest.mark.parametrize("policy", POLICIES)
def test_onnx_runs_elsewhere(policy: str, exporter: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    if policy.endswith("mixed") and exporter == "torch.export" and torch.__version__.startswith("2.9."):
        pytest.skip("torch 2.9 cannot export a product of two dtypes to ONNX, of a plain model either")
    mine, plain = pair(policy)
    mine.eval()
    file = str(tmp_path / "model.onnx")
    torch.onnx.export(mine, (X,), file, dynamo=exporter == "torch.export", verbose=False)
    exported = onnx.load(file)
    onnx.checker.check_model(exported)
    low = onnx.TensorProto.BFLOAT16 if policy.startswith("bf") else onnx.TensorProto.FLOAT16
    casts = {attr.i for node in exported.graph.node if node.op_type == "Cast" for attr in node.attribute}
    assert low in casts | {value.data_type for value in exported.graph.initializer}, "computes in low precision"
    if policy.startswith("bf"):
        return  # onnxruntime has no bfloat16 kernels on a CPU
    session = runtime.InferenceSession(file)
    (out,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    close(torch.from_numpy(out), plain(X).detach(), policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_symbolic_trace_calls_the_wrapped_leaves_and_has_true_gradients(policy: str) -> None:
    mine, plain = pair(policy)
    traced = torch.fx.symbolic_trace(mine)
    assert not any("_tensor_constant" in str(node.target) for node in traced.graph.nodes)
    seen: list[torch.dtype] = []
    handle = mine.first.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.no_grad():
        for model in (mine, plain):
            for param in model.parameters():
                param.mul_(1.5)
    out = traced(X)
    close(out, plain(X), policy)
    # Small enough for the first scale of 2**16.
    (out.square().mean() / 16).backward()
    (plain(X).square().mean() / 16).backward()
    handle.remove()
    assert seen == [torch.float32], "each leaf is a scope of its own, with outputs in float32"
    for param, true in zip(mine.parameters(), plain.parameters(), strict=True):
        close(param.grad, true.grad, policy)


def test_signature_and_code_are_those_of_the_original() -> None:
    mine, plain = pair("bf16-mixed")
    assert mine.forward.__code__ is type(plain).forward.__code__
    assert not hasattr(mine.forward, "__globals__"), "an AttributeError, too"


@pytest.mark.parametrize("policy", POLICIES)
def test_saved_and_pickled_models_keep_their_precision_and_true_gradients(policy: str) -> None:
    mine, plain = pair(policy)
    file = io.BytesIO()
    torch.save(mine, file)
    file.seek(0)
    plain(X).square().mean().backward()
    for again in (torch.load(file, weights_only=False), pickle.loads(pickle.dumps(mine))):
        assert str(wrapprec.handle_of(again).policy) == policy
        out = again(X)
        assert torch.equal(out, mine(X))
        out.square().mean().backward()
        for param, true in zip(again.parameters(), plain.parameters(), strict=True):
            close(param.grad, true.grad, policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_shared_memory_keeps_the_model_wrapped_and_its_parameters(policy: str) -> None:
    mine, plain = pair(policy)
    before = list(mine.parameters())
    mine.share_memory()
    assert all(param.is_shared() for param in mine.parameters())
    assert all(a is b for a, b in zip(before, mine.parameters(), strict=True))
    mine(X).square().mean().backward()
    plain(X).square().mean().backward()
    for param, true in zip(mine.parameters(), plain.parameters(), strict=True):
        close(param.grad, true.grad, policy)
