"""The example bench/multimodal.py: image features in a frozen language model, through gated prompts."""

import torch

from bench import multimodal


def test_learns_what_the_images_show():
    losses, accuracy, model = multimodal.train(steps=80)
    assert losses[0] > 2 and losses[-1] < 0.2 and accuracy > 0.95
    assert all(block.adapter.gate.abs().max() > 0.1 for block in model.blocks)
    before = multimodal.Model().state_dict().keys()
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.grad is None} == {"embedding", "head", "blocks"}
    assert model.state_dict().keys() == before


def test_every_image_reaches_its_own_sample_alone():
    torch.manual_seed(0)
    model = multimodal.Model()
    for block in model.blocks:
        torch.nn.init.normal_(block.adapter.gate)
    image, _ = multimodal.images(3, torch.Generator().manual_seed(0))
    image.requires_grad_()
    logits = model(multimodal.QUESTION.expand(3, -1), image)
    (grad,) = torch.autograd.grad(logits[1].square().sum(), image)
    assert grad[1].any() and not grad[0].any() and not grad[2].any()


def test_starts_as_the_language_model():
    model = multimodal.Model()
    ids = multimodal.QUESTION.expand(2, -1)
    image, _ = multimodal.images(2, torch.Generator().manual_seed(0))
    assert torch.equal(model(ids, image), model(ids, torch.zeros_like(image)))
