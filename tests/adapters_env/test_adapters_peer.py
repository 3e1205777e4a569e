"""The benchmarks' peer is the library's adapter with the weights it is given."""

import pytest
import torch

import peft_kernels as pk

pytest.importorskip("adapters", reason="needs the adapters library, which `make test-adapters` installs apart")
from bench.case import Options
from bench.cases import bottleneck_adapter
from bench.peers import adapters_lib


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("parallel", [False, True], ids=["sequential", "parallel"])
def test_peer_computes_the_reference(parallel, norm):
    torch.manual_seed(0)
    x, residual = torch.randn(2, 4, 24), torch.randn(2, 4, 24)
    weights = [torch.randn(5, 24), torch.randn(5), torch.randn(24, 5), torch.randn(24)]
    options = {"ln_weight": torch.randn(24), "ln_bias": torch.randn(24)} if norm else {}
    layer = adapters_lib.adapter(*weights, **options, is_parallel=parallel, scaling=0.5, non_linearity="gelu")
    assert adapters_lib.why_not() is None and layer.training
    added = None if parallel else residual
    truth = pk.reference.bottleneck_adapter(x, *weights, activation="gelu", scaling=0.5, residual=added, **options)
    torch.testing.assert_close(layer(x, residual)[0], truth)


@pytest.mark.parametrize("case", bottleneck_adapter.cases(Options(quick=True)), ids=lambda case: case.name)
def test_the_library_competes(case):
    work = case.build()
    for name in (adapters_lib.NAME, bottleneck_adapter.REPLACED):
        work.check(name)
