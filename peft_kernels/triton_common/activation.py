"""Activations and their derivatives in a kernel, by their place in `ops/bottleneck_adapter/activations.py`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh(z):
    """Near zero a polynomial in z^2, since the difference of two numbers near one would lose the small ones."""
    s = z * z
    near = -0.00560768872 * s + 0.0205449054
    near = near * s - 0.0537070676
    near = near * s + 0.133309573
    near = near * s - 0.333332535
    e = tl.exp(-2.0 * tl.abs(z))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(z) < 0.63, near * s * z + z, tl.where(z < 0, -far, far))


@triton.jit
def activate(z, KIND: tl.constexpr):
    """(act(z), act'(z)) for float32 z; NaN in, NaN out."""
    if KIND == 1:  # relu
        return tl.where(z < 0, 0.0, z), tl.where(z <= 0, 0.0, 1.0)
    elif KIND == 2:  # relu2
        positive = tl.where(z < 0, 0.0, z)
        return positive * positive, 2.0 * positive
    elif KIND == 3:  # relu6
        return tl.where(z < 0, 0.0, tl.where(z > 6.0, 6.0, z)), tl.where((z <= 0) | (z >= 6.0), 0.0, 1.0)
    elif KIND == 4:  # leaky_relu
        return tl.where(z > 0, z, 0.01 * z), tl.where(z > 0, 1.0, 0.01)
    elif KIND == 5:  # gelu
        cdf = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
        return z * cdf, cdf + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif KIND == 6:  # gelu_tanh
        t = _tanh(0.7978845608028654 * (z + 0.044715 * z * z * z))
        slope = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * z * z)
        # far out z^2 overflows where 1 - t^2 is zero
        tail = tl.where(t * t < 1.0, 0.5 * z * (1.0 - t * t) * slope, 0.0)
        return 0.5 * z * (1.0 + t), 0.5 * (1.0 + t) + tail
    elif KIND == 7:  # quick_gelu
        s = tl.sigmoid(1.702 * z)
        return z * s, s + 1.702 * z * s * (1.0 - s)
    elif KIND == 8:  # silu
        s = tl.sigmoid(z)
        return z * s, s + z * s * (1.0 - s)
    elif KIND == 9:  # mish: tanh(log(1 + e)) = n / (n + 2)
        e = tl.exp(tl.where(z > 20.0, 20.0, z))
        n = e * (e + 2.0)
        t = tl.where(z > 20.0, 1.0, n / (n + 2.0))
        rest = tl.where(z > 20.0, 0.0, 2.0 / (n + 2.0))
        return z * t, t + z * rest * (1.0 + t) * (e / (1.0 + e))
    elif KIND == 10:  # tanh
        t = _tanh(z)
        return t, 1.0 - t * t
    elif KIND == 11:  # sigmoid
        s = tl.sigmoid(z)
        return s, s * (1.0 - s)
    else:
        return z, z * 0.0 + 1.0
