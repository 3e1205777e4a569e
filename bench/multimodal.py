"""LLaMA-Adapter with images: a frozen language model learns to name what it sees, through gated prompts alone.

`python -m bench.multimodal` trains on small synthetic images of a coloured square and prints the accuracy on new ones.
Image features pass a visual projection and become every sample's own addition to the trained prompt (LLaMA-Adapter,
arXiv:2303.16199, section 3.3: P_l + projection(image)); the gates start at zero, so that training starts from the
unchanged language model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import peft_kernels as pk

COLOURS = ("red", "green", "blue", "yellow")
PAINT = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
VOCABULARY, WIDTH, HEADS, TOKENS = 32, 64, 4, 6
QUESTION = torch.tensor([9, 4, 7, 11])  # "what colour is it"; the answer's token is the colour's number


def images(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy 16 x 16 images (count, 3, 16, 16) of one square each, and the numbers of their colours."""
    colour = torch.randint(len(COLOURS), (count,), generator=generator)
    image = 0.3 * torch.randn(count, 3, 16, 16, generator=generator)
    for i, (row, column) in enumerate(torch.randint(0, 9, (count, 2), generator=generator).tolist()):
        image[i, :, row : row + 8, column : column + 8] += PAINT[colour[i], :, None, None]
    return image, colour


class Block(nn.Module):
    """A decoder block whose attention also sees a gated prompt: the trained one plus the image's tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.adapter = pk.nn.GatedPromptAttention(HEADS, TOKENS, WIDTH // HEADS)

    def forward(self, x: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
        """x (B, L, WIDTH), visual (B, 1, WIDTH)."""
        h = F.rms_norm(x, (WIDTH,))
        q, k, v = (_heads(project(h)) for project in (self.q, self.k, self.v))
        sample_k, sample_v = _heads(self.k(visual)), _heads(self.v(visual))
        attended = self.adapter(q, k, v, sample_k=sample_k, sample_v=sample_v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(F.rms_norm(x, (WIDTH,)))))


class Model(nn.Module):
    """A frozen language model with trained prompts, gates and visual projection."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.visual = nn.Linear(3 * 16, WIDTH)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(".adapter." in name or name.startswith("visual."))

    def forward(self, ids: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """ids (B, L), image (B, 3, 16, 16) -> logits of the next token (B, VOCABULARY)."""
        features = F.avg_pool2d(image, 4).flatten(1)
        visual = self.visual(features)[:, None]
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, visual)
        return self.head(x[:, -1])


def _heads(x: torch.Tensor) -> torch.Tensor:
    """(B, L, WIDTH) -> (B, HEADS, L, D)."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def train(steps: int = 150, batch: int = 32, seed: int = 0) -> tuple[list[float], float, Model]:
    """Train; the losses, the accuracy on new images, and the model."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Model()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(steps):
        image, colour = images(batch, generator)
        loss = F.cross_entropy(model(QUESTION.expand(batch, -1), image), colour)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        image, colour = images(200, generator)
        accuracy = (model(QUESTION.expand(200, -1), image).argmax(-1) == colour).float().mean().item()
    return losses, accuracy, model


def main() -> None:
    """Print the run."""
    losses, accuracy, model = train()
    gates = torch.cat([block.adapter.gate.detach().tanh() for block in model.blocks])
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}, accuracy on new images {accuracy:.0%}")
    print("gates:", " ".join(f"{gate:+.2f}" for gate in gates.tolist()))


if __name__ == "__main__":
    main()
