"""Every configuration of the `adapters` library's bottleneck: fused and right, or left alone with the reason."""

import copy
import re

import pytest
import torch
from torch import nn

import peft_kernels as pk

NEEDS = "needs the adapters library and its transformers, which `make test-adapters` installs apart"
adapters = pytest.importorskip("adapters", reason=NEEDS)
from tiny_adapters import adapter, allow_stochastic_depth, check_adapter, inputs, run  # noqa: E402

from peft_kernels.integrations.on_demand import OnDemand  # noqa: E402

F32, BF16 = torch.float32, torch.bfloat16
allow_stochastic_depth()


def seq_bn(**options):
    return adapters.SeqBnConfig(**{"reduction_factor": 4} | options)


CONFIGS = {
    "seq_bn": seq_bn(),
    "double_seq_bn": adapters.DoubleSeqBnConfig(reduction_factor=4),
    "par_bn": adapters.ParBnConfig(),
    "scaled_par_bn": adapters.ParBnConfig(scaling="learned"),
    "adapter_plus": adapters.AdapterPlusConfig(reduction_factor=6, stochastic_depth=0.5),
    "expanding": seq_bn(reduction_factor=0.5),
    "ln_before": seq_bn(ln_before=True),
    "ln_after": seq_bn(ln_after=True),
    "ln_after-residual_first": seq_bn(ln_after=True, adapter_residual_before_ln=True),
    "ln_before-ln_after-par": adapters.ParBnConfig(ln_before=True, ln_after=True, reduction_factor=7),
    "residual_first": seq_bn(adapter_residual_before_ln=True),
    "gating": seq_bn(use_gating=True),
    "gating-par": adapters.ParBnConfig(use_gating=True, scaling=0.7),
    "gating-channel": seq_bn(use_gating=True, scaling="channel", ln_before=True),
    "all": seq_bn(
        non_linearity="gelu",
        use_gating=True,
        scaling="learned",
        stochastic_depth=0.3,
        ln_before=True,
        ln_after=True,
        adapter_residual_before_ln=True,
    ),
}
ACTIVATIONS = (
    *("gelu", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python", "gelu_pytorch_tanh", "leakyrelu", "leaky_relu"),
    *("linear", "mish", "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu", "swish", "tanh"),
)


@pytest.mark.parametrize("dtype, autocast", [(F32, None), (BF16, None), (F32, BF16)], ids=["f32", "bf16", "autocast"])
@pytest.mark.parametrize("name", CONFIGS)
def test_config(name, dtype, autocast):
    config = CONFIGS[name]
    if BF16 in (dtype, autocast):
        config = config.replace(non_linearity="gelu")  # relu's derivative jumps where roundings differ
    check_adapter(adapter(config, dtype=dtype), inputs(4, 7, 48, dtype=dtype), autocast=autocast)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation(activation):
    check_adapter(adapter(seq_bn(non_linearity=activation)), inputs(3, 5, 48))


@pytest.mark.parametrize("name", ["seq_bn", "par_bn", "all"])
def test_eval(name):
    check_adapter(adapter(CONFIGS[name]).eval(), inputs(2, 5, 48))


@pytest.mark.parametrize("shape", [(1, 1, 48), (0, 5, 48), (6, 48)], ids=str)
def test_shapes(shape):
    check_adapter(adapter(seq_bn()), inputs(*shape))


def test_bert_base_size():
    check_adapter(
        adapter(seq_bn(reduction_factor=16, non_linearity="gelu"), 768, BF16), inputs(4, 32, 768, dtype=BF16), draws=4
    )


def test_slices_and_other_residual_dtypes():
    x = inputs(4, 9, 48)[:, 2:7]
    check_adapter(adapter(seq_bn()), x)
    check_adapter(adapter(seq_bn(non_linearity="gelu"), dtype=BF16), x.to(BF16), residual=inputs(4, 5, 48))
    check_adapter(adapter(seq_bn()), x, residual=inputs(1, 5, 48))


@pytest.mark.parametrize("name", ["gating", "gating-par", "all"])
def test_gating_scores(name):
    check_adapter(adapter(CONFIGS[name]), inputs(4, 7, 48), output_gating=True)


@pytest.mark.parametrize("name", ["seq_bn", "par_bn", "gating", "adapter_plus"])
def test_hidden_and_update_are_computed_on_demand(name):
    """The second and third result are those of the library, gradients included, but only once something uses them."""
    layer, x = adapter(CONFIGS[name]), inputs(4, 7, 48)
    stock = copy.deepcopy(layer)
    pk.replace_layers(layer)
    results = []
    for each in (layer, stock):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(11)
        output, down, up = each(leaf, x)
        (down.sin().sum() + (up[1:] * 2).sum() + output.sum()).backward()
        results.append([output, down + 0, up + 0, leaf.grad, *(p.grad for p in each.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
    _, down, up = layer(x, x)
    moved = torch.cat([up.repeat(2, 1, 1)[:3], up])
    assert type(down) is type(moved) is OnDemand and up._value is down._value is None
    assert isinstance(moved, torch.Tensor) and moved.shape == (7, 7, 48) and up._value is not None


def test_dropout():
    layer, x = adapter(seq_bn(dropout=0.4)), inputs(4, 16, 48)
    residual = torch.zeros_like(x)
    update = copy.deepcopy(layer).eval()(x, residual)[0]
    pk.replace_layers(layer)

    def drawn(seed):
        torch.manual_seed(seed)
        return layer(x, residual)[0]

    y = drawn(1)
    kept = y != 0
    assert torch.equal(y, drawn(1)) and not torch.equal(y, drawn(2))
    assert abs(kept.float().mean().item() - 0.6) < 0.05
    torch.testing.assert_close(y[kept], update[kept] / 0.6)
    torch.testing.assert_close(layer.eval()(x, residual)[0], update)


def test_stochastic_depth_skips_whole_samples():
    layer = adapter(CONFIGS["adapter_plus"])
    x = inputs(64, 2, 48)
    pk.replace_layers(layer)
    kept = (layer(x, torch.zeros_like(x))[0] != 0).flatten(1)
    assert torch.equal(kept.all(1), kept.any(1)) and 16 < kept.all(1).sum() < 48


def test_runs_are_equal_bit_for_bit():
    layer, x = adapter(CONFIGS["all"], dtype=BF16), inputs(4, 33, 48, dtype=BF16)
    pk.replace_layers(layer)
    first, second = (run(layer, x, x, x) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_compiles_whole():
    for name in ("seq_bn", "par_bn"):
        layer, x = adapter(CONFIGS[name]), inputs(2, 5, 48)
        pk.replace_layers(layer)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for ours, theirs in zip(compiled(x, x), layer(x, x), strict=True):
            torch.testing.assert_close(ours, theirs + 0)


class MyAdapter(adapters.methods.modeling.Adapter):
    """A user's subclass: it may compute anything."""


def _subclass():
    layer = adapter(seq_bn())
    layer.__class__ = MyAdapter
    return layer


def _replaced_forward():
    layer = adapter(seq_bn())
    layer.forward = lambda x, residual_input, output_gating=False: (x, x, x)
    return layer


def _changed(**modules):
    layer = adapter(seq_bn(ln_before=True))
    for name, module in modules.items():
        setattr(layer, name, module)
    layer.adapter_down[0] = layer.adapter_norm_before
    return layer


def _hooked(name):
    layer = adapter(seq_bn())
    layer.get_submodule(name).register_forward_hook(lambda module, args, output: output * 2)
    return layer


def _frozen_quantized():
    layer = adapter(seq_bn())
    layer.adapter_up.weight = type("QuantizedParameter", (nn.Parameter,), {})(layer.adapter_up.weight)
    return layer


LEFT_ALONE = {
    "compacter": (
        lambda: adapter(adapters.CompacterConfig(reduction_factor=6, shared_phm_rule=False)),
        "Kronecker products",
    ),
    "prelu": (lambda: adapter(seq_bn(non_linearity="prelu")), "no kernel for its activation PReLU"),
    "gelu_10": (lambda: adapter(seq_bn(non_linearity="gelu_10")), "no kernel for its activation ClippedGELU"),
    "laplace": (lambda: adapter(seq_bn(non_linearity="laplace")), "no kernel for its activation Laplace"),
    "subclass": (_subclass, "a subclass of adapters.methods.modeling.Adapter"),
    "forward": (_replaced_forward, "its forward is replaced on the instance"),
    "linear": (lambda: _changed(adapter_up=nn.Bilinear(12, 12, 48)), "made of Linear, Bilinear, Dropout"),
    "norm": (lambda: _changed(adapter_norm_before=nn.RMSNorm(48)), "its LayerNorm is a RMSNorm"),
    "modules": (lambda: _changed(non_linearity=nn.ReLU()), "its modules are not those that the library makes"),
    "hook-down": (lambda: _hooked("adapter_down.0"), "one of its modules has hooks"),
    "hook-activation": (lambda: _hooked("non_linearity.f"), "one of its modules has hooks"),
    "parameter": (_frozen_quantized, "a parameter is a QuantizedParameter"),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone(case):
    make, reason = LEFT_ALONE[case]
    layer = make()
    before = type(layer)
    report = pk.replace_layers(layer)
    assert not report.replaced and len(report.left) == 1 and type(layer) is before
    assert re.search(reason, report.left[0].reason), report.left[0].reason
    with pytest.raises(RuntimeError, match=f"strict: 1 layers must be left alone(.|\n)*{reason}"):
        pk.replace_layers(layer, strict=True)


@pytest.mark.parametrize(
    "x, residual, reason",
    [
        (inputs(2, 3, 48).double(), inputs(2, 3, 48), "x is torch.float64, a weight torch.float32"),
        (inputs(2, 3, 48), None, "residual_input is a NoneType"),
        (inputs(6, 48), inputs(6, 48), "needs x of 3 dimensions, not 2"),
    ],
    ids=["dtype", "no-residual", "2d-gate"],
)
def test_calls_left_to_the_library(x, residual, reason):
    """Its results, and its errors."""
    layer = adapter(CONFIGS["gating"])
    stock = copy.deepcopy(layer)
    pk.replace_layers(layer)
    try:
        expected = stock(x, residual)[0]
    except Exception as error:
        with pytest.raises(type(error), match=re.escape(str(error))):
            layer(x, residual)
    else:
        assert torch.equal(layer(x, residual)[0], expected)
        assert reason in pk.explain(layer, x, residual)


def test_hooks_added_later_still_run():
    layer, x = adapter(seq_bn()), inputs(2, 3, 48)
    pk.replace_layers(layer)
    layer.adapter_up.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    assert torch.equal(layer(x, x)[0], x)
    assert "one of its modules has hooks" in pk.explain(layer, x, x)


def test_explaining_draws_no_random_numbers():
    layer = adapter(CONFIGS["all"])
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert "bottleneck_adapter" in str(pk.replace_layers(layer))
    assert torch.equal(before, torch.get_rng_state())
