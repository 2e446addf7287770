"""What every test shares: hypothesis profiles, the device tests, and a look at what a test left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import elsewhere
import pytest
import torch
from hypothesis import HealthCheck, settings

# The default: the same cases in every run, so that a change and not chance turns a run red. No deadlines: the first
# call of an operation initialises libraries, and machines are shared.
settings.register_profile(
    "ci",
    max_examples=500,
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
# pytest --hypothesis-profile=deep: other cases every time.
settings.register_profile(
    "deep",
    max_examples=20_000,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
# pytest --hypothesis-profile=few: where every new program is compiled.
settings.register_profile(
    "few",
    max_examples=3,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("ci")

# The models are tiny: handing them to more threads takes longer than computing, above all where cores are shared.
torch.set_num_threads(1)


# Scripts for the rewriter, which train where they are imported.
collect_ignore = ["legacy"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        help="make tensors there unless a test says where; on `xla`, without what elsewhere.py has a reason against",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Compute on the device that the command line names."""
    device = config.getoption("--device")
    if device == "xla":
        elsewhere.start_xla()
    elif device:
        torch.set_default_device(device)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Read no file that is not for the device: some need packages, or compute when they are imported."""
    return True if config.getoption("--device") == "xla" and elsewhere.is_left_out(collection_path) else None


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say what is left out."""
    return elsewhere.left_out() if config.getoption("--device") == "xla" else []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a device that is not there, or what is not for the one that is tested."""
    if config.getoption("--device") == "xla":
        elsewhere.skip_on_xla(items)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Skip what XLA cannot."""
    try:
        yield
    except Exception as error:
        reason = elsewhere.refused_by_xla(error) if item.config.getoption("--device") == "xla" else None
        if reason is None:
            raise
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _nothing_global_left() -> Iterator[None]:
    """Start from one seed, and fail the test that leaves a global setting behind, not the one after it."""
    torch.manual_seed(0)
    before = _globals()
    yield
    assert _globals() == before, "the test left a global setting of torch changed"


def _globals() -> dict[str, object]:
    return {
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast dtype": torch.get_autocast_dtype("cpu"),
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
    }
