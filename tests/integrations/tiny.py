"""Small models for the integration tests, and one call of a model in every tensor that it returns."""

import copy
import warnings

import torch
from torch import nn

import peft_kernels as pk
from peft_kernels.testing import assert_within_budget

KINDS = ("dense", "undeclared-4bit", "4bit")  # the last two: without and with model.is_loaded_in_4bit


class One(nn.Module):
    """A model of one linear layer."""

    def __init__(self, linear):
        super().__init__()
        self.proj = linear

    def forward(self, x, **kwargs):
        return self.proj(x)


def four_bit(linear, compute_dtype=None, quant_type="nf4", compress_statistics=True, device="cpu", **options):
    """A bitsandbytes Linear4bit with the weight of `linear`, quantized on the device."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=compute_dtype,
        quant_type=quant_type,
        compress_statistics=compress_statistics,
        **options,
    )
    layer.load_state_dict(linear.state_dict())
    layer.bias = linear.bias
    return layer.to(device)


def lora_model(kind, k=128, n=48, dtype=torch.bfloat16, bias=True, adapter_dtype=None, adapters=("default",), **config):
    """A PEFT model of one layer with LoRA adapters, and that layer."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(k + n)
    linear = nn.Linear(k, n, bias=bias).to(dtype)
    model = One(linear if kind == "dense" else four_bit(linear, dtype))
    model.is_loaded_in_4bit = kind == "4bit"
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["proj"], "init_lora_weights": False, **config}
    model = get_peft_model(model, LoraConfig(**options), adapter_name=adapters[0])
    for i, name in enumerate(adapters[1:]):
        model.add_adapter(name, LoraConfig(**{**options, "r": 3 + 5 * i}))
    layer = model.base_model.model.proj
    if len(adapters) > 1:
        model.base_model.set_adapter(list(adapters))
    if adapter_dtype is not None:
        layer.lora_A.to(adapter_dtype), layer.lora_B.to(adapter_dtype)
    return model, layer


def ia3_model(
    kind, k=128, n=48, dtype=torch.bfloat16, bias=True, feedforward=False, adapters=("default",), adapter_dtype=None
):
    """A PEFT model of one layer with IA³ adapters (random, some of their elements zero), and that layer."""
    from peft import IA3Config, get_peft_model

    torch.manual_seed(k + n)
    linear = nn.Linear(k, n, bias=bias).to(dtype)
    model = One(linear if kind == "dense" else four_bit(linear, dtype))
    model.is_loaded_in_4bit = kind == "4bit"
    config = IA3Config(target_modules=["proj"], feedforward_modules=["proj"] if feedforward else [])
    model = get_peft_model(model, config, adapter_name=adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, config)
    layer = model.base_model.model.proj
    if len(adapters) > 1:
        model.base_model.set_adapter(list(adapters))
    for vector in layer.ia3_l.values():
        vector.data = (1 + torch.randn(vector.shape) / 2).to(adapter_dtype or vector.dtype)
        vector.data.view(-1)[::7] = 0
    return model, layer


def tiny_llama(kind="dense", dtype=torch.float32, device="cpu", **config):
    """A random two-layer Llama with LoRA on all its projections."""
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    options = {"r": 4, "lora_alpha": 8, "target_modules": targets, "init_lora_weights": False, **config}
    model = tiny_llama_base(kind, dtype, device)
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(**options)).to(device)


def tiny_llama_base(kind="dense", dtype=torch.float32, device="cpu"):
    """The same without LoRA."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=128,
        )
    ).to(dtype)
    if kind != "dense":
        for name, module in list(model.model.named_modules()):
            if isinstance(module, nn.Linear):
                model.model.set_submodule(name, four_bit(module, dtype, device=device))
        model.is_loaded_in_4bit = kind == "4bit"
    return model.to(device)


def tokens(rows=2, length=7):
    """Token ids for `tiny_llama`."""
    return torch.randint(0, 128, (rows, length), generator=torch.Generator().manual_seed(5))


def run(model, x, dy=None):
    """y and the gradients of x and of all that is trained, by name."""
    leaf = x.detach().clone().requires_grad_()
    model.zero_grad()
    y = model(leaf)
    y.backward(torch.ones_like(y) if dy is None else dy)
    results = {"y": y.detach(), "x": leaf.grad}
    results |= {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return results


def oracle(layer, x, dy):
    """`run` for a LoRA or an IA³ layer (or a bare 4-bit one) in float64, named alike."""
    base = getattr(layer, "base_layer", layer)
    w = base.weight
    w = (
        pk.Weight4bit.from_bnb(w).dequantize(torch.float32).double()
        if hasattr(w, "quant_state")
        else w.detach().double()
    )
    params = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters() if p.requires_grad}
    leaf = x.detach().double().requires_grad_()
    bias = None if base.bias is None else params.get("bias", base.bias.detach().double())
    scales = {True: 1.0, False: 1.0}  # of the input, of the output
    for name in layer.active_adapters if hasattr(layer, "ia3_l") else ():
        scales[layer.is_feedforward] = scales[layer.is_feedforward] * params[f"ia3_l.{name}"].flatten()
    y = nn.functional.linear(leaf * scales[True], w, bias) * scales[False]
    for name in layer.active_adapters if hasattr(layer, "lora_A") else ():
        s = nn.functional.linear(leaf, params[f"lora_A.{name}.weight"])
        delta = nn.functional.linear(s, params[f"lora_B.{name}.weight"], params.get(f"lora_B.{name}.bias"))
        y = y + layer.scaling[name] * delta
    y.backward(dy.double())
    return {"y": y.detach(), "x": leaf.grad} | {name: p.grad for name, p in params.items()}


def check_layer(layer, x, dtype=None, draws=1):
    """The layer, replaced, is at most twice as far from float64 as it was before.

    draws: upstream gradients and rows, x and others like it, over which the error is taken together. In one row at
    rank 1 all of a gradient shares the error of a single number, which is luck.
    """
    stock = copy.deepcopy(layer)
    report = pk.replace_layers(layer)
    assert report.counts["replaced"] == 1 and not report.left, str(report)
    assert report.replaced[0].reason is None, str(report)
    torch.manual_seed(9)
    dtype, results = dtype or x.dtype, []
    for draw in range(draws):
        row = x if draw == 0 else torch.randn(x.shape).to(x.dtype)
        dy = torch.randn(*x.shape[:-1], layer.out_features).to(dtype)
        results.append((run(layer, row, dy), run(stock, row, dy), oracle(layer, row, dy)))
    ours, theirs, truth = results[0]
    assert ours.keys() == theirs.keys() == truth.keys()
    for name in ours:
        actual, eager, exact = (
            torch.stack([result[name] for result in column]) for column in zip(*results, strict=True)
        )
        assert_within_budget(actual, exact, eager, name)
    return ours, theirs


def no_repacking(model):
    """Keep bitsandbytes from its own CPU layout: that one rounds the scales, and refuses N % 32 != 0."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def quiet(call, *args, **kwargs):
    """The call without PEFT's warnings about merging 4-bit weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **kwargs)


def close(a, b, dtype=torch.float32):
    """Equal up to the rounding of a few operations in `dtype`."""
    tolerance = 40 * torch.finfo(dtype).eps
    torch.testing.assert_close(a.float(), b.float(), rtol=tolerance, atol=tolerance * b.float().abs().max().item())


def replaced(kind, **options):
    """A replaced model of one layer, its layer, and a stock copy."""
    model, layer = lora_model(kind, **options)
    stock = no_repacking(copy.deepcopy(model))
    report = pk.replace_layers(model)
    assert report.counts["replaced"] == 1 and not report.left, str(report)
    return model, layer, stock


def inputs(dtype=torch.bfloat16, shape=(5, 128)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
