"""PromptEmbedding, PromptEncoder, PrefixEncoder: Hugging Face PEFT's values under PEFT's names, and folding."""

import pytest
import torch

import peft_kernels as pk

OP = "prompt_embedding"


def test_initialized_from_tokens():
    table = torch.randn(20, 8, dtype=torch.bfloat16)
    module = pk.nn.PromptEmbedding.from_text("any", lambda text: {"input_ids": [3, 4, 5]}, table, 7)
    assert torch.equal(module.prompt(), table.float()[[3, 4, 5, 3, 4, 5, 3]])
    assert torch.equal(pk.nn.PromptEmbedding.from_token_ids([3, 4, 5], table, 2).prompt(), table.float()[[3, 4]])
    drawn = pk.nn.PromptEmbedding.from_vocabulary(table, 6, torch.Generator().manual_seed(0)).prompt()
    assert all((row == table.float()).all(1).any() for row in drawn) and len(drawn.unique(dim=0)) > 1
    assert drawn.requires_grad and drawn.dtype == torch.float32


def test_forward(backend):
    ids, weight = torch.randint(0, 9, (2, 5)), torch.randn(9, 40)
    module = pk.nn.PromptEmbedding(3, 40)
    y = module(ids, weight)
    y.sum().backward()
    assert torch.equal(y, pk.reference.prompt_embedding(ids, weight, module.prompt()))
    assert torch.equal(module.embedding.weight.grad, torch.full((3, 40), 2.0))


@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
def test_prompt_encoder_has_the_state_and_the_values_of_peft(kind):
    peft = pytest.importorskip("peft")
    sizes = {"num_virtual_tokens": 5, "token_dim": 24, "encoder_hidden_size": 16}
    config = peft.PromptEncoderConfig(
        **sizes, num_transformer_submodules=1, encoder_reparameterization_type=kind, encoder_dropout=0.0
    )
    theirs = peft.PromptEncoder(config)
    ours = pk.nn.PromptEncoder(5, 24, encoder_hidden_size=16, reparameterization=kind)
    ours.load_state_dict(theirs.state_dict())
    expected = theirs(torch.arange(5)[None])[0]
    torch.testing.assert_close(ours.prompt(), expected)
    folded = ours.fold()
    assert list(folded.state_dict()) == ["embedding.weight"] and folded.embedding.weight.requires_grad
    torch.testing.assert_close(folded.prompt(), expected)


def test_fold_runs_without_dropout():
    encoder = pk.nn.PromptEncoder(5, 24, reparameterization="LSTM", dropout=0.9)
    expected = encoder.eval().prompt()
    torch.testing.assert_close(encoder.train().fold().prompt(), expected)
    assert encoder.training


@pytest.mark.parametrize("projected", [False, True], ids=["plain", "projected"])
def test_prefix_encoder_has_the_state_and_the_values_of_peft(projected):
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(
        num_virtual_tokens=5,
        token_dim=2 * 8,
        num_layers=3,
        num_attention_heads=2,
        encoder_hidden_size=11,
        prefix_projection=projected,
    )
    theirs = peft.PrefixEncoder(config)
    ours = pk.nn.PrefixEncoder(5, 3, 2, 8, encoder_hidden_size=11 if projected else None)
    ours.load_state_dict(theirs.state_dict())
    flat = theirs(torch.arange(5)[None])
    expected = flat.view(1, 5, 6, 2, 8).permute(2, 0, 3, 1, 4).split(2)
    for module in (ours, ours.fold()):
        for layer, (k, v) in zip(expected, module(), strict=True):
            torch.testing.assert_close(k, layer[0, 0])
            torch.testing.assert_close(v, layer[1, 0])
    assert list(ours.state_dict()) == ["embedding.weight"]
    saved = pk.nn.PrefixEncoder(5, 3, 2, 8, encoder_hidden_size=4)
    saved.load_prompt_embeddings(flat[0])
    assert torch.equal(saved.prompt(), flat[0])


def test_gradients_reach_the_encoder():
    encoder = pk.nn.PrefixEncoder(5, 3, 2, 8, encoder_hidden_size=4)
    sum(k.square().sum() + v.sum() for k, v in encoder()).backward()
    assert all(p.grad is not None and p.grad.any() for p in encoder.parameters())


def test_errors():
    with pytest.raises(ValueError, match=r'reparameterization: expected "MLP" or "LSTM", got \'GRU\''):
        pk.nn.PromptEncoder(5, 24, reparameterization="GRU")
    with pytest.raises(ValueError, match=r"num_virtual_tokens: expected at least 1, got 0"):
        pk.nn.PromptEmbedding(0, 24)
    with pytest.raises(ValueError, match=r"token_ids: expected at least one id"):
        pk.nn.PromptEmbedding.from_token_ids([], torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"prompt_embeddings: expected shape \(5, 24\), got \(4, 24\)"):
        pk.nn.PromptEmbedding(5, 24).load_prompt_embeddings(torch.randn(4, 24))
