"""The specification once more, literally: Python's and NumPy's integers, one line a formula, nothing of the package.

Only constants (weights, biases, dyadic numbers) are computed in floating point, as the specification has it.
"""

from __future__ import annotations

import math
from math import isqrt
from typing import Any

import numpy as np

Array = Any


def dy(s: float) -> tuple[int, int]:
    f, x = math.frexp(s)
    m, e = math.floor(f * 2**23 + 0.5), 23 - x
    if m == 2**23:
        m, e = 2**22, e - 1
    return (math.floor(s * 2.0**52 + 0.5), 52) if e > 52 else (m, e)


def rq(a: Array, me: tuple[Array, Array], lo: int, hi: int) -> Array:
    m, e = (np.asarray(part, dtype=np.int64) for part in me)
    return np.clip((a * m + (np.int64(1) << (e - 1))) >> e, lo, hi)


def rq_columns(a: Array, scales: Array, lo: int, hi: int) -> Array:
    pairs = [dy(float(s)) for s in scales]
    return rq(a, ([m for m, _ in pairs], [e for _, e in pairs]), lo, hi)


def rec(n: int) -> tuple[int, int]:
    shift = n.bit_length() + 22
    return 2**shift // n, shift


def read(x: Array, f: float) -> Array:
    """The stream (real values, exact in float64) at a dyadic factor."""
    m, e = dy(f)
    return np.floor(x * (m / 2**e) + 0.5).astype(np.int64)


def exp2(t: Array) -> Array:
    z, f = t >> 10, t & 1023
    h = ((-1316 * f) >> 10) + 7600
    h = ((h * f) >> 10) - 22670
    return (((h * f) >> 10) + 32768) >> z


def gelu(x: Array) -> Array:
    t = np.minimum(np.abs(x), 1792)
    u = 1792 - t
    h = ((-120919 * u) >> 11) + 236465
    h = ((h * u) >> 11) - 79331
    h = ((h * u) >> 11) + 13326
    h = (h * u) >> 11
    p = (h * u + 2**11) >> 12
    return np.maximum(x, 0) * 2**15 - t * p


def weight(w: Array) -> tuple[Array, Array]:
    scale = (np.maximum(np.abs(w).max(1), np.float32(2.0**-14)) / np.float32(127)).astype(np.float32)
    return np.floor(w / scale[:, None] + np.float32(0.5)).astype(np.int64), scale.astype(np.float64)


def linear(x: Array, scale: float, w: Array, b: Array) -> tuple[Array, Array]:
    """Accumulators with their bias, and their scales."""
    q, row = weight(w)
    s = row * scale
    bias = np.clip(np.floor(b.astype(np.float64) / s + 0.5), -(2**27 - 1), 2**27 - 1).astype(np.int64)
    return x @ q.T + bias, s


def layer_norm(x: Array, k: int, gain: Array, offset: Array, eps: float, s_out: float, bits: int, limit: int) -> Array:
    n = x.shape[1]
    g_bits = 8 if bits <= 8 else 3
    f = 12 + g_bits
    g = np.floor(gain.astype(np.float64) / s_out * 2**g_bits + 0.5).astype(np.int64)
    b = np.floor(offset.astype(np.float64) / s_out * 2**f + 0.5).astype(np.int64)
    out = []
    for row in x:
        s1, s2 = int(row.sum()), int((row * row).sum())
        v = n * s2 - s1 * s1 + math.floor(eps * n * n * 4.0**k + 0.5)
        m, e = rec(max(1, isqrt(v)))
        y = rq(n * row - s1, (m, e - 12), -(2**18 - 1), 2**18 - 1)
        out.append(np.clip((y * g + b + (1 << (f - 1))) >> f, -limit, limit))
    return np.array(out)


def attention(q: Array, k: Array, v: Array, s_qk: float, s_v: float, s_context: float) -> Array:
    """One head of one sequence; ``[S, D]`` each, all keys count."""
    me = dy(s_qk * 2**10 * math.log2(math.e) / math.sqrt(q.shape[1]))
    scores, out = q @ k.T, []
    for s in scores:
        p = (255 * exp2(rq(s.max() - s, me, 0, 31744)) + 2**14) >> 15
        m, e = rec(max(1, int(p.sum())))
        o = rq(p @ v, (m, e - 16), -(2**23), 2**23)
        out.append(rq(o, dy(s_v * 2.0**-16 / s_context), -127, 127))
    return np.array(out)


def residual(x: Array, acc: Array, s: Array, k: int, limit: int) -> Array:
    part = rq_columns(acc, s * 2.0**k, -(2**62), 2**62)
    return np.clip(np.floor(x * 2.0**k + 0.5).astype(np.int64) + part, -limit, limit)


class Layer:
    """One layer on one sequence, from float parameters and ranges by their names in the model."""

    def __init__(self, parameters: dict[str, Array], ranges: dict[str, float], heads: int, eps: float, post: bool):
        self.p, self.ranges, self.heads, self.eps, self.post = parameters, ranges, heads, eps, post

    def s8(self, name: str) -> float:
        return self.ranges[name] / 127

    def k(self, name: str) -> int:
        return math.floor(math.log2(32767 / self.ranges[name]))

    def norm(self, which: str, x: Array, source: str, result: str, stream: bool) -> Array:
        gain, offset = self.p[f"{which}.weight"], self.p[f"{which}.bias"]
        s_out = 2.0 ** -self.k(result) if stream else self.s8(result)
        limit, bits = (32767, 16) if stream else (127, 8)
        return layer_norm(x, self.k(source), gain, offset, self.eps, s_out, bits, limit)

    def entry(self, which: str, x: Array, source: str, result: str) -> Array:
        if self.post:
            return np.clip(read(x, 1 / self.s8(result)), -127, 127)
        integers = np.clip(read(x, 2.0 ** self.k(source)), -32767, 32767)
        return self.norm(which, integers, source, result, stream=False)

    def exit(self, which: str, x: Array, acc: Array, s: Array, total: str, after: str, found: dict) -> Array:
        found[total] = residual(x, acc, s, self.k(total), 32767)
        if not self.post:
            return found[total] * 2.0 ** -self.k(total)
        found[after] = self.norm(which, found[total], total, after, stream=True)
        return found[after] * 2.0 ** -self.k(after)

    def run(self, x: Array) -> tuple[Array, dict[str, Array]]:
        """Real values of the stream ``[S, H]`` to the same, with the integers of every quantiser."""
        p, found = self.p, {}
        h = found["attention_input"] = self.entry("attention_norm", x, "input", "attention_input")
        at = "attention.query_key_value"
        acc, s = linear(h, self.s8("attention_input"), p[f"{at}.weight"], p[f"{at}.bias"])
        dim = x.shape[1] // self.heads
        names = ("query", "key", "value")
        onward = np.tile(np.repeat([self.s8(name) for name in names], dim), self.heads)
        qkv = rq_columns(acc, s / onward, -127, 127).reshape(len(x), self.heads, 3, dim)
        for place, name in enumerate(names):
            found[name] = qkv[:, :, place]
        s_qk = self.s8("query") * self.s8("key")
        heads = [
            attention(*qkv[:, head].transpose(1, 0, 2), s_qk, self.s8("value"), self.s8("context"))
            for head in range(self.heads)
        ]
        c = found["context"] = np.stack(heads, axis=1)
        at = "attention.output"
        acc, s = linear(c.reshape(len(x), -1), self.s8("context"), p[f"{at}.weight"], p[f"{at}.bias"])
        total = "attention_sum" if self.post else "middle"
        x = self.exit("attention_norm", x, acc, s, total, "middle", found)
        h = found["mlp_input"] = self.entry("mlp_norm", x, "middle", "mlp_input")
        acc, s = linear(h, self.s8("mlp_input"), p["mlp.intermediate.weight"], p["mlp.intermediate.bias"])
        w = rq_columns(acc, s * 2**9, -32767, 32767)
        s_gelu = (self.ranges["gelu"] + 0.17) / 255
        z = math.floor(0.17 / s_gelu + 0.5)
        g = found["gelu"] = rq(gelu(w), dy(2.0**-24 / s_gelu), -z, 255 - z)
        acc, s = linear(g, s_gelu, p["mlp.output.weight"], p["mlp.output.bias"])
        total = "mlp_sum" if self.post else "output"
        return self.exit("mlp_norm", x, acc, s, total, "output", found), found
