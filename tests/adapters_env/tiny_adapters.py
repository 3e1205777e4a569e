"""Small adapters and models of the `adapters` library, and the comparison of one call in every number it returns."""

import copy
import sys
import types

import torch
from torch import nn

import peft_kernels as pk
from peft_kernels.testing import assert_within_budget


class StochasticDepth(nn.Module):
    """torchvision's in its "row" mode, for environments whose torchvision does not fit torch."""

    def __init__(self, p, mode):
        super().__init__()
        assert mode == "row"
        self.p = p

    def forward(self, x):
        if not self.training:
            return x
        kept = torch.full([x.shape[0]] + [1] * (x.dim() - 1), 1 - self.p, dtype=torch.float64).bernoulli().to(x.dtype)
        return x * (kept / (1 - self.p))


def allow_stochastic_depth():
    """Let the library make adapters with `stochastic_depth`, which it takes from torchvision."""
    from adapters.methods import modeling

    modeling.is_torchvision_available = lambda: True
    module = types.ModuleType("torchvision.ops.stochastic_depth")
    module.StochasticDepth = StochasticDepth
    for name in ("torchvision", "torchvision.ops"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules[module.__name__] = module


def adapter(config, size=48, dtype=torch.float32, seed=0):
    """The library's adapter for a config, every parameter random (they start at zero and one)."""
    from adapters.methods import modeling

    torch.manual_seed(seed)
    cls = modeling.ParallelAdapter if config.is_parallel else modeling.Adapter
    layer = cls("a", size, int(size // config.reduction_factor), config)
    return randomize(layer).to(dtype)


def randomize(module):
    """The module with parameters of which none is zero, one, or the same as another."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            centre = 1.0 if ("norm" in name and name.endswith("weight")) or name.endswith("scaling") else 0.0
            p.copy_(centre + torch.randn_like(p) * (0.3 if p.dim() == 1 else p.shape[-1] ** -0.5))
    return module


def inputs(*shape, dtype=torch.float32, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(layer, x, residual, dy, **options):
    """Output, gate and every gradient of an adapter's call."""
    x, residual = (t.detach().clone().requires_grad_() for t in (x, residual))
    layer.zero_grad()
    torch.manual_seed(11)  # stochastic depth
    output, *_, last = layer(x, residual, **options)
    output.backward(dy.to(output.dtype))
    results = {"output": output.detach(), "x": x.grad, "residual": residual.grad}
    results |= {name: p.grad for name, p in layer.named_parameters()} | ({"gate": last.detach()} if options else {})
    return {name: t for name, t in results.items() if t is not None}


def check_adapter(layer, x, residual=None, autocast=None, draws=32, **options):
    """The adapter, replaced, is at most twice as far from float64 as the library's forward; then it is restored.

    Over many draws together, of the sizes and dtypes of x and residual: one scalar's error is a matter of luck.
    """
    residual = x if residual is None else residual

    def runs(layer, dtype=None):
        calls = []
        for seed in range(draws):
            tensors = [inputs(*like.shape, seed=3 * seed + i).to(like.dtype) for i, like in enumerate((x, residual, x))]
            calls.append(run(layer, *(t.to(dtype) for t in tensors), **options))
        return {name: torch.stack([call[name] for call in calls]) for name in calls[0]}

    truth = runs(copy.deepcopy(layer).double(), torch.float64)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        theirs = runs(copy.deepcopy(layer))
        report = pk.replace_layers(layer, strict=True)
        assert report.replaced[0].op == "bottleneck_adapter", str(report)
        ours = runs(layer)
    pk.restore_layers(layer)
    assert ours.keys() == theirs.keys() == truth.keys()
    for name in ours:
        assert_within_budget(ours[name], truth[name], theirs[name], name)


def bert(*configs, dtype=torch.float32):
    """A random two-layer BERT with adapters "a", "b", ... of these configs, the first active."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, vocab_size=64, **options
    )
    return _with_adapters(BertModel(config, add_pooling_layer=False), configs).to(dtype)


def llama(*configs, dtype=torch.float32):
    """A random two-layer Llama with adapters "a", "b", ... of these configs, the first active."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        vocab_size=64,
    )
    model = LlamaModel(config)
    for layer in model.layers:  # transformers' own RMSNorm rounds to float32 even in a float64 model
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(layer, name, nn.RMSNorm(48, config.rms_norm_eps))
    model.norm = nn.RMSNorm(48, config.rms_norm_eps)
    return _with_adapters(model, configs).to(dtype)


def _with_adapters(model, configs):
    import adapters

    adapters.init(model)
    for name, config in zip("abc", configs, strict=False):
        model.add_adapter(name, config=config)
    for name, module in model.named_modules():
        if type(module).__module__ == "adapters.methods.modeling":
            randomize(module)
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_("adapter" in name)
    model.set_active_adapters("a")
    return model.train()


def tokens(rows=4, length=6, seed=5):
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def run_model(model, seed=0, **options):
    """The last hidden state and the gradient of everything that is trained."""
    model.zero_grad()
    torch.manual_seed(seed)  # stochastic depth
    ids = tokens(seed=seed)
    y = model(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0]
    y.backward(inputs(*y.shape, seed=seed).to(y.dtype))
    results = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return {"hidden": y.detach()} | results


def check_model(model, replaced, draws=8):
    """The replaced model is at most twice as far from float64 as the library; it stays replaced."""

    def runs():
        calls = [run_model(model, seed) for seed in range(draws)]
        return {name: torch.stack([call[name] for call in calls]) for name in calls[0]}

    dtype = next(model.parameters()).dtype
    model.double()  # not a copy: the library's hooks hold on to modules of the original
    truth = runs()
    model.to(dtype)
    theirs = runs()
    report = pk.replace_layers(model)
    assert report.counts["replaced"] == replaced, str(report)
    ours = runs()
    assert [(name, t.dtype) for name, t in ours.items()] == [(name, t.dtype) for name, t in theirs.items()]
    assert ours.keys() == truth.keys()
    assert_within_budget(*(results.pop("hidden") for results in (ours, truth, theirs)), "hidden")

    def relative(results):
        """All gradients in one row, each over its largest value: many of them are too small to be judged alone."""
        return torch.cat(
            [(t.double() / truth[name].abs().max().clamp_min(1e-9)).ravel() for name, t in results.items()]
        )

    assert_within_budget(*map(relative, (ours, truth, theirs)), "gradients")
    return report
