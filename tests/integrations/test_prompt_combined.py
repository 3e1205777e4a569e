"""Prefix-tuning together with LoRA, and with parallel adapters, trained at once."""

import copy

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
import peft
from prompt_models import base_model, batch, check, run
from torch import nn

import peft_kernels as pk

PREFIX = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
LORA = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)


class ParallelAdapter(nn.Module):
    """mlp(x) + s * up(relu(down(x))), arXiv:2110.04366, by `bottleneck_adapter` where that is on."""

    def __init__(self, mlp, width=64, rank=8, scaling=4.0):
        super().__init__()
        self.mlp, self.scaling, self.fused = mlp, scaling, False
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)

    def forward(self, x):
        y = self.mlp(x)
        if self.fused:
            weights = self.down.weight, self.down.bias, self.up.weight, self.up.bias
            return pk.functional.bottleneck_adapter(x, *weights, scaling=self.scaling, residual=y)
        return y + self.scaling * self.up(torch.relu(self.down(x)))


def with_lora(base):
    peft.inject_adapter_in_model(LORA, base)
    return "lora_"


def with_parallel_adapters(base):
    for layer in base.model.layers:
        layer.mlp = ParallelAdapter(layer.mlp)
    return "mlp.down.", "mlp.up."


def combined(add, dtype=torch.float32):
    """A model with a prefix and with what `add` adds, both trained."""
    torch.manual_seed(6)
    base = base_model("llama", dtype)
    names = add(base)
    model = peft.get_peft_model(base.to(dtype), PREFIX)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ([names] if isinstance(names, str) else names)):
            parameter.requires_grad_()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prefix_and_lora(dtype):
    theirs = combined(with_lora, dtype)
    ours = copy.deepcopy(theirs)
    report = pk.replace_layers(ours)
    assert {entry.op for entry in report.replaced} == {"prefix_attention", "lora_linear"} and not report.left
    assert len(run(ours, batch())) == 2 + 2 * 3 * 2  # logits, the prefix, A and B of three layers in each of two blocks
    check(ours, theirs)


@pytest.mark.skipif(not hasattr(pk.functional, "bottleneck_adapter"), reason="no bottleneck_adapter")
def test_prefix_and_parallel_adapter():
    theirs = combined(with_parallel_adapters)
    ours = copy.deepcopy(theirs)
    assert pk.replace_layers(ours).counts["replaced"] == 1
    for module in ours.modules():
        if isinstance(module, ParallelAdapter):
            module.fused = True
    check(ours, theirs)


def test_trained_together():
    """A few steps move prefix and LoRA as they do in PEFT."""
    theirs = combined(with_lora)
    ours = copy.deepcopy(theirs)
    pk.replace_layers(ours)
    losses = []
    for model in (ours, theirs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        inputs = batch()
        losses.append([])
        for _ in range(5):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0] - 0.1
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-4)
