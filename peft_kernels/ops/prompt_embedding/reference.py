"""`prompt_embedding` in pure torch: the oracle."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...checks import bad_value


def prompt_embedding(input_ids: torch.Tensor, embedding_weight: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """[prompt; E[ids]] of E's dtype; see `peft_kernels.functional.prompt_embedding`."""
    if input_ids.device.type == "cpu" and input_ids.numel() and not torch.compiler.is_compiling():
        check_ids(input_ids, embedding_weight.shape[0])
    shared = prompt.to(embedding_weight.dtype).expand(input_ids.shape[0], -1, -1)
    return torch.cat((shared, F.embedding(input_ids, embedding_weight)), dim=1)


def check_ids(input_ids: torch.Tensor, vocabulary: int) -> None:
    """Every id names a row of the embedding."""
    for worst in (int(input_ids.min()), int(input_ids.max())):
        if not 0 <= worst < vocabulary:
            remedy = "Tokenize with the vocabulary of this embedding."
            raise bad_value("input_ids", f"ids from 0 to {vocabulary - 1}", worst, remedy)
