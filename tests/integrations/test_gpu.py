"""What a user does on a GPU: replaced models train, generate, compile and are captured as on the CPU."""

import copy
import warnings

import pytest
import torch
from tiny import tiny_llama, tiny_llama_base, tokens

import peft_kernels as pk
from peft_kernels import functional

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BF16 = torch.bfloat16


def qlora():
    """A tiny QLoRA model on the device, adapters in float32 as PEFT makes them, and the batch."""
    pytest.importorskip("peft"), pytest.importorskip("bitsandbytes")
    return tiny_llama("undeclared-4bit", BF16, DEVICE), tokens().to(DEVICE)


def gradients(model, ids):
    """Loss and gradients."""
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def in_float64(model):
    """A copy in float64, 4-bit weights decoded."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "Linear4bit" and not hasattr(module, "base_layer"):
            layer = torch.nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            layer.weight = torch.nn.Parameter(pk.Weight4bit.from_bnb(module.weight).dequantize(BF16), False)
            model.set_submodule(name, layer)
    return model.double()


def error(actual, exact):
    """Root-mean-square error of all results together, each relative to its own size."""
    assert actual.keys() == exact.keys()
    differences = [(actual[name].double() - exact[name].double()).square().mean() for name in exact]
    sizes = [exact[name].double().square().mean() for name in exact]
    return (sum(d / s for d, s in zip(differences, sizes, strict=True)) / len(sizes)).sqrt().item()


@pytest.mark.parametrize("kind", ["dense", "4bit"])
def test_lora_model(kind):
    if kind == "4bit":
        model, ids = qlora()
    else:
        model, ids = tiny_llama(dtype=BF16, device=DEVICE), tokens().to(DEVICE)
    exact, theirs = gradients(in_float64(model), ids), gradients(copy.deepcopy(model), ids)
    report = pk.replace_layers(model)
    assert report.counts["replaced"] == 14 and not report.left, str(report)
    assert "triton" in pk.explain(model, input_ids=ids)
    assert error(gradients(model, ids), exact) <= 2 * error(theirs, exact)
    pk.restore_layers(model)
    assert error(gradients(model, ids), theirs) == 0


def test_generation():
    model, ids = qlora()
    model.eval()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    stock = copy.deepcopy(model)
    pk.replace_layers(model)
    with torch.no_grad():
        exact, theirs, ours = ({"logits": m(ids).logits} for m in (in_float64(stock), stock, model))
    assert error(ours, exact) <= 2 * error(theirs, exact)
    assert model.generate(input_ids=ids, **options).shape == (ids.shape[0], ids.shape[1] + 4)


def test_training_under_autocast_and_checkpointing():
    pytest.importorskip("peft")
    results = []
    for checkpointing in (False, True):
        model = tiny_llama(device=DEVICE, lora_dropout=0.2).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        pk.replace_layers(model)
        torch.manual_seed(4)
        with torch.autocast(DEVICE.type, BF16):
            results.append(gradients(model, tokens().to(DEVICE)))
    assert error(results[1], results[0]) < 1e-4


@pytest.mark.parametrize("m", [1, 16, 700])
def test_capture_and_replay(m):
    """A captured layer computes from what its input holds at the replay."""
    weight = pk.Weight4bit.quantize(torch.randn(256, 512, device=DEVICE, dtype=BF16))
    a, b = (torch.randn(*shape, device=DEVICE) * 0.1 for shape in ((8, 512), (256, 8)))
    x = torch.randn(m, 512, device=DEVICE, dtype=BF16)

    def layer():
        with torch.no_grad():
            return functional.lora_linear(x, weight, a, b, scaling=2.0)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer()
    x.normal_()
    graph.replay()
    assert torch.equal(captured, layer())


@pytest.mark.parametrize("m", [4, 700])
def test_compiled(m):
    weight = pk.Weight4bit.quantize(torch.randn(256, 512, device=DEVICE, dtype=BF16))
    leaves = {
        "x": torch.randn(m, 512, device=DEVICE, dtype=BF16),
        "A": torch.randn(8, 512, device=DEVICE) * 0.1,
        "B": torch.randn(256, 8, device=DEVICE) * 0.1,
    }

    def run(function):
        x, a, b = inputs = [t.detach().clone().requires_grad_() for t in leaves.values()]
        y = function(x, weight, a, b)
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), inputs)]

    def function(x, weight, a, b):
        return functional.lora_linear(x, weight, a, b, scaling=2.0) * 2

    for ours, eager in zip(run(torch.compile(function, fullgraph=True)), run(function), strict=True):
        assert error({"value": ours}, {"value": eager}) < 0.01  # one rounding to bfloat16 more or less


def test_a_second_stream_and_two_runs():
    """Scratch belongs to a stream, and results do not depend on what runs beside them."""
    weight = pk.Weight4bit.quantize(torch.randn(2048, 2048, device=DEVICE, dtype=BF16))
    x = torch.randn(1024, 2048, device=DEVICE, dtype=BF16)
    expected = functional.linear_4bit(x, weight)
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in range(2)], []
    for _ in range(4):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(functional.linear_4bit(x, weight))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for y in results)


@pytest.mark.parametrize("method", ["ia3", "prefix", "prompt", "adaption", "bitfit", "scale-bias"])
def test_other_methods(method):
    peft = pytest.importorskip("peft")
    configs = {
        "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        "adaption": lambda: peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=5, adapter_layers=2),
    }
    model, ids = tiny_llama_base(device=DEVICE), tokens().to(DEVICE)
    if method in configs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(model, configs[method]()).to(DEVICE)
    else:
        _ = pk.prepare_bitfit(model, add_missing=True) if method == "bitfit" else pk.prepare_scale_bias(model)
    for parameter in model.parameters():
        if parameter.requires_grad:  # not where a method begins, at zero or one
            parameter.data += 0.1 * torch.randn_like(parameter)
    exact, theirs = gradients(copy.deepcopy(model).double(), ids), gradients(copy.deepcopy(model), ids)
    report = pk.replace_layers(model)
    assert report.counts["replaced"], str(report)
    assert error(gradients(model, ids), exact) <= 2 * error(theirs, exact)
