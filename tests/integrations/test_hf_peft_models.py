"""A whole transformers model with replaced LoRA layers: training, generation, saving, checkpointing, compiling."""

import copy

import pytest
import torch
from tiny import KINDS, close, inputs, no_repacking, tiny_llama, tiny_llama_base, tokens

import peft_kernels as pk

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
pytest.importorskip("transformers")

BF16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("kind", ["dense", "4bit"])
def test_llama_trains_the_same(kind):
    model = tiny_llama(kind)
    stock = copy.deepcopy(model)
    assert pk.replace_layers(model).counts == {"replaced": 14, "base": 0 if kind == "dense" else 14} | {
        "left": 0,
        "excluded": 0,
    }
    losses = []
    for m in (model, stock):
        m.train()
        optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for _ in range(3):
            loss = m(tokens(), labels=tokens()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("kind", KINDS)
def test_generation(kind):
    model = tiny_llama(kind).eval()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    stock = no_repacking(copy.deepcopy(model))
    expected = stock.generate(input_ids=tokens(), **options)
    pk.replace_layers(model)
    assert torch.equal(model.generate(input_ids=tokens(), **options), expected)


@pytest.mark.parametrize("kind", ["dense", "4bit"])
def test_save_and_load_into_stock_peft(kind, tmp_path):
    model = tiny_llama(kind)
    pk.replace_layers(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.01
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_llama_base(kind), tmp_path)
    layer = loaded.base_model.model.model.layers[0].self_attn.q_proj
    assert type(layer).__module__.startswith("peft.")
    with torch.no_grad():
        close(model.eval()(tokens()).logits, no_repacking(loaded).eval()(tokens()).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_repeats_the_dropout(reentrant):
    grads = []
    for checkpointing in (False, True):
        model = tiny_llama(lora_dropout=0.3).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        pk.replace_layers(model)
        torch.manual_seed(4)
        model(tokens(), labels=tokens()).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name in grads[0]:
        close(grads[1][name], grads[0][name])


@pytest.mark.parametrize("first", ["prepare", "replace"])
def test_prepare_model_for_kbit_training(first):
    model = tiny_llama_base("4bit", BF16)
    if first == "replace":
        assert pk.replace_layers(model).counts["replaced"] == 14
    model = peft.prepare_model_for_kbit_training(model)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, config).train()
    stock = copy.deepcopy(model)
    pk.restore_layers(stock)
    report = pk.replace_layers(model)
    assert report.counts["left"] == 0 and report.counts["base"] == 4 and report.counts["replaced"] == 14
    losses = []
    for m in (model, stock):
        with torch.autocast("cpu", dtype=BF16):
            loss = m(tokens(), labels=tokens()).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind):
    """One graph, forward and backward, for a whole block of a replaced model."""
    model = tiny_llama(kind, lora_dropout=0.1).train()
    pk.replace_layers(model)
    mlp = model.base_model.model.model.layers[0].mlp
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    x = inputs(F32, (3, 64))
    results = []
    for call in (mlp, compiled):
        torch.manual_seed(6)
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        y.sum().backward()
        results.append((y.detach(), leaf.grad))
    for eager, traced in zip(*results, strict=True):
        close(traced, eager)
