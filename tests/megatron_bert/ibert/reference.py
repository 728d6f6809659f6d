# SPDX-License-Identifier: Apache-2.0
"""The specification once more, literally: Python's and NumPy's integers, one line a formula, nothing of the package.

Only constants (weights, biases, dyadic numbers) are computed in floating point, as the specification has it.
"""

from __future__ import annotations

import math
from math import isqrt
from typing import Any

import numpy as np

Array = Any


def sat16(a: Array) -> Array:
    return np.clip(a, -(2**15), 2**15 - 1)


def rs(a: Array, s: Array) -> Array:
    s = np.asarray(s, dtype=np.int64)
    right, left = np.maximum(s, 1), np.minimum(np.maximum(-s, 0), 15)
    return np.where(s > 0, (a + (np.int64(1) << (right - 1))) >> right, a << left)


def mul(n: Array, m: Array) -> Array:
    return (n * m + 2**14) >> 15


def rq(a: Array, sm: tuple[Array, Array]) -> Array:
    s, m = (np.asarray(part, dtype=np.int64) for part in sm)
    return mul(sat16(rs(a, s)), m)


def fx(r: float, g: int) -> tuple[int, int]:
    x = math.frexp(r)[1]
    s = min(30, -x - g if -x - g >= 0 else min(0, -x))
    return s, min(32767, math.floor(r * 2.0 ** (15 + s) + 0.5))


def rq_columns(a: Array, scales: Array, g: int) -> Array:
    pairs = [fx(float(s), g) for s in scales]
    return rq(a, ([s for s, _ in pairs], [m for _, m in pairs]))


def read(x: Array, k: int) -> Array:
    """Real values of the stream at a scale of 2^-k."""
    return np.clip(np.floor(x * 2.0**k + 0.5).astype(np.int64), -32767, 32767)


def read8(x: Array, scale: float) -> Array:
    exponent = math.frexp(1 / scale)[1]
    s = -exponent - 4
    m = math.floor(1 / scale * 2.0 ** (15 + s) + 0.5)
    return np.clip(mul(sat16(np.floor(x * 2.0**-s + 0.5).astype(np.int64)), m), -127, 127)


def gelu(x: Array, j: int) -> Array:
    c = 7 * 2 ** (j - 1)
    t = np.minimum(np.abs(x), c)
    u = (c - t) * 2 ** (13 - j)
    h = mul(u, -15097) + 29496
    h = mul(h, u) - 9868
    h = mul(h, u) + 1655
    p = mul(mul(h, u), u)
    return np.maximum(x, 0) - mul(t, 4 * p)


def numerators(s: Array, r: float) -> Array:
    """Of one row of scores."""
    f, x = math.frexp(r)
    m, y = min(65535, math.floor(f * 2**16 + 0.5)), min(max(-x, -16), 31)
    d = s.max() - s
    n = np.minimum(65535, d >> y if y >= 0 else d << -y)
    t = (n * m) >> 16
    z, f = t >> 11, (t & 2047) * 2**4
    h = mul(f, -1305) + 7562
    h = mul(h, f) - 22579
    return mul(mul(h, f) + 32640, np.int64(256) >> z)


def mean(o: Array, n: int, r: float) -> Array:
    f, x = math.frexp(r)
    c = min(32767, math.floor(f * 2**15 + 0.5))
    length = n.bit_length()
    return rq(o, (length - 5 - x, (2 ** (length + 15) // n * c) >> 20))


def weight(w: Array) -> tuple[Array, Array]:
    scale = (np.maximum(np.abs(w).max(1), np.float32(2.0**-14)) / np.float32(127)).astype(np.float32)
    return np.floor(w / scale[:, None] + np.float32(0.5)).astype(np.int64), scale.astype(np.float64)


def words(rows: Array, k: int, limit: int) -> Array:
    """Rows of the word table in the stream's integers."""
    q, scale = weight(rows)
    return np.array([np.clip(rq(row, fx(s * 2.0**k, 0)), -limit, limit) for row, s in zip(q, scale, strict=True)])


def linear(x: Array, scale: float, w: Array, b: Array) -> tuple[Array, Array]:
    """Accumulators with their bias, and their scales."""
    q, row = weight(w)
    s = row * scale
    bias = np.clip(np.floor(b.astype(np.float64) / s + 0.5), -(2**27 - 1), 2**27 - 1).astype(np.int64)
    return x @ q.T + bias, s


def layer_norm(x: Array, k: int, gain: Array, offset: Array, eps: float, s_out: float, limit: int) -> Array:
    n = x.shape[1]
    f = 14 - math.ceil((n - 1).bit_length() / 2)
    gain, offset = gain.astype(np.float64) / s_out, offset.astype(np.float64) / s_out
    x_g, x_b = (math.frexp(np.abs(t).max())[1] for t in (gain, offset))
    shift = min(max(min(15 - x_g + f, 30 - x_b), 1), 24)
    g = np.clip(np.floor(gain * 2.0 ** (shift - f) + 0.5).astype(np.int64), -32767, 32767)
    b = np.clip(np.floor(offset * 2.0**shift + 0.5).astype(np.int64), -(2**30) + 2**24, 2**30 - 2**24)
    out = []
    for row in x:
        s1, s2 = int(row.sum()), int((row * row).sum())
        v = n * s2 - s1 * s1 + math.floor(eps * n * n * 4.0**k + 0.5)
        sd = max(1, isqrt(v))
        length = sd.bit_length()
        y = rq(n * row - s1, (length - 1 - f, min(32767, 2 ** (length + 14) // sd)))
        out.append(np.clip((y * g + b + (1 << (shift - 1))) >> shift, -limit, limit))
    return np.array(out)


def attention(q: Array, k: Array, v: Array, s_qk: float, s_v: float, s_context: float) -> Array:
    """One head of one sequence; ``[S, D]`` each, all keys count."""
    r = s_qk * (2**11 * math.log2(math.e) / math.sqrt(q.shape[1]))
    out = []
    for s in q @ k.T:
        p = numerators(s, r)
        out.append(np.clip(mean(p @ v, int(p.sum()), s_v / s_context), -127, 127))
    return np.array(out)


def residual(x: Array, acc: Array, s: Array, k: int, limit: int) -> Array:
    return np.clip(read(x, k) + rq_columns(acc, s * 2.0**k, 0), -limit, limit)


class Layer:
    """One layer on one sequence, from float parameters and ranges by their names in the model."""

    def __init__(self, parameters: dict[str, Array], ranges: dict[str, float], heads: int, eps: float, post: bool):
        self.p, self.ranges, self.heads, self.eps, self.post = parameters, ranges, heads, eps, post

    def s8(self, name: str) -> float:
        return self.ranges[name] / 127

    def k(self, name: str) -> int:
        return math.floor(math.log2(16383 / self.ranges[name]))

    def norm(self, which: str, x: Array, source: str, result: str, stream: bool) -> Array:
        gain, offset = self.p[f"{which}.weight"], self.p[f"{which}.bias"]
        s_out = 2.0 ** -self.k(result) if stream else self.s8(result)
        return layer_norm(x, self.k(source), gain, offset, self.eps, s_out, 32767 if stream else 127)

    def entry(self, which: str, x: Array, source: str, result: str) -> Array:
        if self.post:
            return read8(x, self.s8(result))
        return self.norm(which, read(x, self.k(source)), source, result, stream=False)

    def exit(self, which: str, x: Array, acc: Array, s: Array, total: str, after: str, found: dict) -> Array:
        found[total] = residual(x, acc, s, self.k(total), 32767)
        if not self.post:
            return found[total] * 2.0 ** -self.k(total)
        found[after] = self.norm(which, found[total], total, after, stream=True)
        return found[after] * 2.0 ** -self.k(after)

    def run(self, x: Array) -> tuple[Array, dict[str, Array]]:
        """Real values of the stream ``[S, H]`` to the same, with the integers of every quantizer."""
        p, found = self.p, {}
        h = found["attention_input"] = self.entry("attention_norm", x, "input", "attention_input")
        at = "attention.query_key_value"
        acc, s = linear(h, self.s8("attention_input"), p[f"{at}.weight"], p[f"{at}.bias"])
        dim = x.shape[1] // self.heads
        names = ("query", "key", "value")
        onward = np.tile(np.repeat([self.s8(name) for name in names], dim), self.heads)
        qkv = np.clip(rq_columns(acc, s / onward, 4), -127, 127).reshape(len(x), self.heads, 3, dim)
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
        s_gelu = (self.ranges["gelu"] + 0.17) / 255
        j = min(max(math.frexp(16 / s_gelu)[1], 1), 13)
        w = rq_columns(acc, s * 2.0**j, 0)
        z = math.floor(0.17 / s_gelu + 0.5)
        m = min(32767, math.floor(2.0**-j / s_gelu * 2**15 + 0.5))
        g = found["gelu"] = np.clip(mul(gelu(w, j), m), -z, 255 - z)
        acc, s = linear(g, s_gelu, p["mlp.output.weight"], p["mlp.output.bias"])
        total = "mlp_sum" if self.post else "output"
        return self.exit("mlp_norm", x, acc, s, total, "output", found), found
