"""What `test_prepared` checks, in two processes: Accelerators, and transformers' Trainer, which builds its own."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ddp_checks import data, launched, marking, mine, same_everywhere, tolerance
from fsdp_checks import raises
from torch import Tensor, nn

import wrapprec
from wrapprec import LossScale

CHECKS: dict[str, Callable[[str], None]] = {}
"""By name; each takes a policy, and raises where it fails. All processes run them in the same order."""

check_with = marking(CHECKS)


def folder() -> str:
    """The same on all ranks."""
    made = [tempfile.mkdtemp()]
    dist.broadcast_object_list(made)
    return made[0]


def net(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


@check_with("bf16-true", "16-mixed", "bf16-mixed", "32-true")
def saved_state_resumes_to_the_bit(policy: str) -> None:
    """The handle is saved and loaded under every policy: with `bf16-true` it has the weights' remainders."""

    def prepare(accelerator: Any, seed: int) -> tuple[Any, Any, Any]:
        model = net(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        handle = wrapprec.wrap(model, optimizer, policy)
        assert not accelerator._custom_objects
        model, optimizer = accelerator.prepare(model, optimizer)
        handle.attach(optimizer)  # once more: it is registered once all the same
        assert accelerator._custom_objects == [handle]
        return model, optimizer, handle

    def train(accelerator: Any, model: Any, optimizer: Any, steps: range) -> list[Tensor]:
        for step in steps:
            x, y = data(step)
            optimizer.zero_grad()
            accelerator.backward(F.mse_loss(model(mine(x)).float(), mine(y)))
            optimizer.step()
        return [param.detach().clone() for param in model.parameters()]

    warnings.filterwarnings("ignore", "Expected unwrap after the DistributedDataParallel")  # as it should, of bf16-true
    where = folder()
    with launched() as accelerate:
        accelerator = accelerate.Accelerator(cpu=True)
        model, optimizer, handle = prepare(accelerator, 1)
        train(accelerator, model, optimizer, range(3))
        accelerator.save_state(where)
        accelerator.wait_for_everyone()
        wanted = train(accelerator, model, optimizer, range(3, 6))
        accelerator.load_state(where)
        assert all(map(torch.equal, train(accelerator, model, optimizer, range(3, 6)), wanted))
        handle.unwrap()
    with launched() as accelerate:
        accelerator = accelerate.Accelerator(cpu=True)
        model, optimizer, handle = prepare(accelerator, 2)
        accelerator.load_state(where)
        got = train(accelerator, model, optimizer, range(3, 6))
        assert all(map(torch.equal, got, wanted))
        same_everywhere(*got)
        handle.unwrap()
        assert not {"step", "zero_grad"} & optimizer.optimizer.__dict__.keys()
        assert not optimizer.optimizer._optimizer_load_state_dict_post_hooks
        assert not optimizer.optimizer._optimizer_state_dict_pre_hooks
        assert not accelerator._custom_objects


@check_with("16-mixed")
def handle_is_saved_without_device_placement_and_once_however_often_it_is_wrapped(policy: str) -> None:
    """Without device placement preparing leaves the optimizer alone: its state, saved or loaded, is what tells."""
    where, scales = folder(), []
    for scale in (64.0, 8.0):
        with launched() as accelerate:
            accelerator = accelerate.Accelerator(cpu=True, device_placement=False)
            model = net()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            wrapprec.wrap(model, optimizer, policy, loss_scale=LossScale(init_scale=scale)).unwrap()
            handle = wrapprec.wrap(model, optimizer, policy, loss_scale=LossScale(init_scale=scale))
            model, optimizer = accelerator.prepare(model, optimizer)
            if not scales:
                accelerator.save_state(where)
                accelerator.wait_for_everyone()
            else:
                accelerator.load_state(where)
            assert accelerator._custom_objects == [handle]
            scales.append(handle.scale)
            handle.unwrap()
            assert not accelerator._custom_objects
            handle = wrapprec.wrap(model, optimizer, policy)
            assert accelerator._custom_objects == [handle]  # which it has prepared by now
            handle.unwrap()
    assert scales == [64.0, 64.0]


@check_with("bf16-mixed", "bf16-module", "32-true", "16-mixed")
def accelerator_built_later_is_refused_when_it_prepares(policy: str) -> None:
    """Neither bfloat16 nor float32 has a loss scale that would tell; the optimizer tells that it is prepared."""
    with launched() as accelerate:
        model = net()
        optimizer = torch.optim.AdamW(model.parameters())
        handle = wrapprec.wrap(model, optimizer, policy)
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
        received = "Received: Accelerator(mixed_precision='bf16')"
        with raises(wrapprec.WrapprecError, received, 'build Accelerator(mixed_precision="no")'):
            accelerator.prepare(model, optimizer)
        handle.unwrap()


@check_with("bf16-mixed", "32-true", "16-module")
def model_that_is_prepared_alone_keeps_its_plan(policy: str) -> None:
    """Nothing tells of it; autocast around a wrapped model changes nothing, and where it would, there is a warning."""
    with launched() as accelerate:
        model = net()
        handle = wrapprec.wrap(model, None, policy)
        x = mine(data()[0])
        before = model(x)
        prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert torch.equal(prepared(x), before)
        texts = [str(one.message) for one in caught]
        warned = any("to be called without torch.autocast around it" in text for text in texts)
        assert warned is not policy.startswith("bf16")
        handle.unwrap()


@check_with("bf16-module", "16-mixed")
def trainer_of_transformers_trains_a_wrapped_model(policy: str) -> None:
    """Clipping, accumulation and a scheduler are the Trainer's; the weights move as without wrapprec."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

        def make() -> Any:
            torch.manual_seed(1)
            no = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
            return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2, **no))

        generator = torch.Generator().manual_seed(1)
        rows = [torch.randint(0, 64, (12,), generator=generator) for _ in range(32)]
        texts = [{"input_ids": row, "labels": row} for row in rows]

        def train(wrapped: bool, **options: Any) -> tuple[Any, Any]:
            with launched():
                model = make()
                optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
                handle = wrapprec.wrap(model, optimizer, policy) if wrapped else None
                told: dict[str, Any] = {
                    "max_steps": 4,
                    "per_device_train_batch_size": 2,
                    "max_grad_norm": 0.5,
                    "seed": 0,
                }
                told |= {"gradient_accumulation_steps": 2, "use_cpu": True, "report_to": [], "save_strategy": "no"}
                told |= {"disable_tqdm": True, "logging_strategy": "no", "lr_scheduler_type": "constant"}
                arguments = TrainingArguments(output_dir=folder(), **told, **options)
                Trainer(model, arguments, train_dataset=texts, optimizers=(optimizer, None)).train()
                return model, handle

        plain, _ = train(False)
        model, handle = train(True)
        same_everywhere(*model.parameters())
        assert handle.skipped_steps == 0
        for got, want, start in zip(model.parameters(), plain.parameters(), make().parameters(), strict=True):
            # Some gradients (of the keys' biases) are 0 but for rounding: nothing to be relative to.
            assert (got - want).norm() < 4 * tolerance(policy) * (want - start).norm() + 1e-4
        handle.unwrap()
        with raises(wrapprec.WrapprecError, "Accelerator(mixed_precision='bf16')"):
            train(True, bf16=True)
