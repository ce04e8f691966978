r"""FlashAttention: exact attention, forward and backward, that never stores the T x T scores.

A softmax needs a row's largest score and its sum of exponentials. Both can be corrected when more
keys come in [3]. So scores s = q k^T / sqrt(D) are made one tile (some queries x some keys) at a
time, used, and dropped [1, 2]. A tile stays in a CPU's cache or a GPU's SRAM, which saves trips to
main memory. The backward pass makes the tiles again: probabilities are e^(s - LSE), and of the
forward pass it needs, besides the output, one number per query, LSE = log(sum_j e^s_j).

    python flash_attn.py                             # a layer of attention learns to retrieve
    python flash_attn.py --tiles                     # which tiles a mask skips
    python flash_attn.py --bench --block_size 16384  # time and memory against T

What to expect (torch 2.13.0, one core of an AMD EPYC, fp32; assets/logs/flash_attn/): the test
accuracy is 1.0 after 46 s. Causal, T = 4,096: forward takes 1.12 of torch's time (naive attention
7.6), with backward 1.05 (4.5). With a window of 256, T = 16,384: 1/25 of it, forward and backward.

Differs from [1, 2]: in PyTorch always fp32; in Triton the backward pass makes P twice; no dropout.

[1] FlashAttention-2, arXiv 2307.08691v1  [2] FlashAttention, arXiv 2205.14135v2
[3] Online softmax, arXiv 1805.02867v2  [4] GQA, arXiv 2305.13245v3
[5] Mistral 7B, arXiv 2310.06825v1  [6] Induction heads, arXiv 2209.11895v1
"""

import argparse
import dataclasses
import json
import math
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

LOG2E = 1 / math.log(2)  # e^x = 2^(x log2(e)), and 2^x takes less time
TILE = 256  # scores of 8 heads x 256 x 256 are 2 MB: a CPU's cache holds them. For more heads less

# ---- The idea: softmax in pieces

def online_softmax(x):
    """softmax of x (..., n); its maximum and sum take one pass, not two ([3] Alg. 3). When a larger
    number comes, the sum so far is rescaled to it. x[..., 0] must be finite."""
    m = torch.full_like(x[..., 0], -math.inf)  # largest x so far
    l = torch.zeros_like(m)  # sum of e^(x - m) so far
    for x_j in x.unbind(dim=-1):
        m_new = torch.maximum(m, x_j)
        l = l * torch.exp(m - m_new) + torch.exp(x_j - m_new)
        m = m_new
    return torch.exp(x - m[..., None]) / l[..., None]


def merge(o1, lse1, o2, lse2):
    """Attention over two sets of keys together, from the o (..., D) and LSE (...) of each. LSE is
    the log of the sum of e^s, -inf for a set without keys."""
    lse = torch.logaddexp(lse1, lse2)
    finite = lse.clamp(min=-1e30)  # -inf - -inf would be NaN
    weight1 = torch.exp(lse1 - finite)[..., None]  # the set's share of the sum over both
    weight2 = torch.exp(lse2 - finite)[..., None]
    return o1 * weight1 + o2 * weight2, lse


def add_tile(o, m, l, s, v):
    """For N heads, add some keys' values v (N, columns, D) to the sum o (N, rows, D), with weights
    2^(s - m); l (N, rows, 1) sums the weights ([1] Alg. 1, lines 9, 10). Overwrites o and s."""
    m_new = torch.maximum(m, s.amax(dim=-1, keepdim=True))  # (N, rows, 1), largest score so far
    p = s.sub_(m_new).exp2_()  # P = 2^(S - m)
    rescale = torch.exp2(m - m_new)  # the weights so far were 2^(s - m)
    o.mul_(rescale).baddbmm_(p, v)  # O = rescale O + P V
    return m_new, l * rescale + p.sum(dim=-1, keepdim=True)


def attention_in_tiles(q, k, v, lo, hi, scale):
    """o and LSE, base 2: P = 2^(scale Q K^T - LSE). Query i sees the keys lo[i] to hi[i] - 1."""
    o = torch.empty_like(q)  # (N, T_q, D)
    lse = torch.empty_like(q[..., :1])  # (N, T_q, 1)
    memory = q.new_empty(0)  # for all tiles' scores: resize_(0) frees nothing, new memory is slow
    for rows, tiles in tile_map(lo, hi):  # all tiles that the mask doesn't skip
        q_i = q[:, rows] * scale  # (N, rows, D); scale has log2(e) in it
        o_i = torch.zeros_like(q_i)
        l = torch.zeros_like(q_i[..., :1])  # (N, rows, 1)
        m = torch.full_like(l, torch.finfo(q.dtype).min)  # finite: -inf - -inf is NaN
        for columns, hidden in tiles:
            k_j, v_j = k[:, columns], v[:, columns]  # (N, columns, D)
            s = torch.bmm(q_i, k_j.mT, out=memory.resize_(0))  # S = Q K^T
            if hidden is not None:  # the mask cuts this tile
                s.masked_fill_(hidden, -math.inf)
            m, l = add_tile(o_i, m, l, s, v_j)
        o[:, rows] = o_i / l.masked_fill(l == 0, 1)  # l is 0 in a row without keys
        lse[:, rows] = m + l.log2()  # -inf in a row without keys
    return o, lse


# ---- The reference, and which keys a query sees. B batch, H heads, T tokens, D head size

def attention(q, k, v, causal=False, window=None, scale=None):
    """softmax(scale q k^T) v with all scores at once, (B, H, T_q, D). q is (B, H, T_q, D), k and v
    are (B, H_kv, T_k, D). The scale is 1 / sqrt(D) by default. A query without keys gets 0."""
    q, k, v, scale = prepare(q, k, v, window, scale)
    s = (q * scale) @ k.mT  # (B, H, T_q, T_k); in float16 q k^T could overflow before the scale
    # without a mask the rest is: return s.softmax(dim=-1) @ v
    lo, hi = spans(q, k, causal, window)
    hidden = hidden_keys(lo, hi, 0, k.size(2))  # (T_q, T_k)
    p = s.masked_fill(hidden, -math.inf).softmax(dim=-1)
    return p.masked_fill(hidden, 0) @ v  # a row without keys was NaN


def spans(q, k, causal, window):
    """The mask, as the keys [lo, hi) that each query sees: two tensors (T_q,) that never decrease.
    Query i is at position T_k - T_q + i: the last query goes with the last key (torch's is_causal
    aligns the first ones). A window w [5] leaves |position - j| < w: if causal, the w newest."""
    T_q, T_k = q.size(2), k.size(2)
    p = torch.arange(T_k - T_q, T_k, device=q.device, dtype=torch.int32)  # (T_q,), positions
    lo, hi = torch.zeros_like(p), torch.full_like(p, T_k)
    if window is not None:
        lo, hi = p - window + 1, p + window
    if causal:
        hi = p + 1
    return lo.clamp(min=0), hi.clamp(min=0, max=T_k)


def hidden_keys(lo, hi, j0, j1):
    """True where a query doesn't see a key of j0 .. j1 - 1: (queries, j1 - j0)."""
    j = torch.arange(j0, j1, device=lo.device)
    return (j < lo[:, None]) | (j >= hi[:, None])


def prepare(q, k, v, window, scale):
    """q, k, v of one dtype and number of heads, and the scale. AssertionError if they don't fit."""
    k, v = k.to(q.dtype), v.to(q.dtype)  # under autocast they can differ
    B, H, _, D = q.shape
    if k.size(1) < H:  # query heads share a key head [4]
        k, v = (x.repeat_interleave(H // x.size(1), dim=1) for x in (k, v))  # (B, H, T_k, D)
    assert k.shape == v.shape == (B, H, k.size(2), D), f"q {q.shape}, k {k.shape}, v {v.shape}"
    assert window is None or window >= 1, f"window {window}: want None, or 1 or more"
    scale = D ** -0.5 if scale is None else scale
    assert isinstance(scale, (int, float)), f"scale {scale}: want a number, as it gets no gradient"
    return q, k, v, scale


# ---- Which tiles there are (--tiles draws them), and the gradients, tile by tile

def tile_map(lo, hi):
    """The tiles that aren't skipped: [(rows, [(columns, hidden), ...]), ...], where hidden (rows,
    columns) is True where a query doesn't see a key, or None if the tile is full."""
    plan = []
    for i0 in range(0, len(lo), TILE):
        lo_i, hi_i = lo[i0:i0 + TILE], hi[i0:i0 + TILE]
        tiles = []
        for j0 in range(lo_i[0] // TILE * TILE, hi_i[-1], TILE):
            j1 = min(j0 + TILE, int(hi[-1]))
            cut = j0 < lo_i[-1] or j1 > hi_i[0]  # spans only move forward
            hidden = hidden_keys(lo_i, hi_i, j0, j1) if cut else None
            tiles.append((slice(j0, j1), hidden))
        plan.append((slice(i0, i0 + TILE), tiles))
    return plan


def gradients_in_tiles(q, k, v, do, lse, delta, lo, hi, scale):
    """dq, dk, dv ([1] Alg. 2, with the loops swapped)."""
    dq = torch.zeros_like(q)
    dk = torch.zeros_like(k)
    dv = torch.zeros_like(v)
    p, ds = q.new_empty(0), q.new_empty(0)
    for rows, tiles in tile_map(lo, hi):
        q_i, do_i = q[:, rows], do[:, rows]  # (N, rows, D)
        q_seen = q_i.nan_to_num(0, 0, 0)  # ds is 0 there, but 0 * NaN is NaN; a seen NaN is in ds
        lse_i, delta_i = lse[:, rows], delta[:, rows]  # (N, rows, 1)
        for columns, hidden in tiles:
            k_j, v_j = k[:, columns], v[:, columns]  # (N, columns, D)
            torch.baddbmm(lse_i, q_i, k_j.mT, beta=-1, alpha=scale, out=p.resize_(0))
            p.exp2_()  # P = 2^(S - LSE), line 11
            torch.baddbmm(delta_i, do_i, v_j.mT, beta=-1, out=ds.resize_(0))  # dO V^T - delta
            ds.mul_(p)  # dS = P * (dP - delta), lines 13 and 14
            if hidden is not None:
                p.masked_fill_(hidden, 0)
                ds.masked_fill_(hidden, 0)
                k_j = k_j.nan_to_num(0, 0, 0)
            dv[:, columns].baddbmm_(p.mT, do_i)  # dV += P^T dO, line 12
            dq[:, rows].baddbmm_(ds, k_j)  # dQ += dS K, line 15
            dk[:, columns].baddbmm_(ds.mT, q_seen)  # dK += dS^T Q, line 16
    return dq.mul_(scale / LOG2E), dk.mul_(scale / LOG2E), dv  # scale has log2(e) in it


class FlashAttention(torch.autograd.Function):
    """o (N, T_q, D) and LSE (N, T_q, 1), base 2: with q, k, v these are all that backward needs."""

    @staticmethod
    def forward(q, k, v, lo, hi, scale, backend):
        if backend == "torch":
            return attention_in_tiles(q, k, v, lo, hi, scale)
        o, lse = torch.empty_like(q), torch.empty_like(q[..., :1], dtype=torch.float32)
        launch(forward_kernel, FORWARD_TILE, q, k, v, o, lse, lo, hi, scale)
        return o, lse

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.scale, ctx.backend = inputs
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx, do, dlse):
        """Softmax's gradient is dS = P * (dP - delta), delta = rowsum(P * dP). This is
        rowsum(dO * O) too, so that a tile needs no other tile."""
        if torch.is_grad_enabled():  # create_graph, or torch.func.grad
            raise RuntimeError("flash_attention has no second derivative: use attention()")
        q, k, v, lo, hi, o, lse = ctx.saved_tensors
        delta = (do.to(lse.dtype) * o).sum(dim=-1, keepdim=True)  # (N, T_q, 1), Alg. 2, line 4
        delta = delta - dlse * LOG2E  # LSE in base 2, S in base e: dLSE/dS = P log2(e)
        f = gradients_in_tiles if ctx.backend == "torch" else triton_gradients
        grads = f(q, k, v, do.contiguous(), lse, delta, lo, hi, ctx.scale)
        return *grads, None, None, None, None


def flash_attention(q, k, v, causal=False, window=None, scale=None, backend="auto",
                    cu_seqlens=None, return_lse=False):
    """What attention() computes, without T x T matrices; with return_lse also LSE (B, H, T_q), for
    merge(). backend: torch, triton (D 16, 32, 64 or 128) or auto: triton if it can. cu_seqlens
    [0, ..., T]: documents packed along T. Each is a call of its own, so that none sees another."""
    if cu_seqlens is not None:
        lengths = torch.as_tensor(cu_seqlens, device="cpu").diff().tolist()
        documents = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
        parts = [flash_attention(*qkv, causal, window, scale, backend, return_lse=True)
                 for qkv in documents]
        o, lse = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
    else:
        q, k, v, scale = prepare(q, k, v, window, scale)
        if backend == "auto":
            fits = q.is_cuda and q.size(3) in (16, 32, 64, 128) and q.dtype != torch.float64
            backend = "triton" if triton and fits else "torch"
        assert backend in ("torch", "triton"), f"backend {backend}"
        dtype = q.dtype if backend == "triton" else torch.promote_types(q.dtype, torch.float32)
        lo, hi = spans(q, k, causal, window)
        heads = [x.flatten(0, 1).to(dtype).contiguous() for x in (q, k, v)]  # (B H, T, D)
        o, lse = FlashAttention.apply(*heads, lo, hi, scale * LOG2E, backend)
        o = o.view_as(q).to(q.dtype)
        lse = lse.view(q.shape[:3]) / LOG2E  # base e
    return (o, lse) if return_lse else o


# ---- The same as Triton kernels. A kernel runs as many programs; program_id says which one it is.
# Q, K, ... are pointers, most of them to (heads, T, D). tl.constexpr: known when it is compiled.
if triton:
    @triton.jit
    def find_rows(first, T, N: tl.constexpr, D: tl.constexpr):
        """N rows: indices, places in (heads, T), and (N, D) in (heads, T, D). Past T, the last."""
        i = tl.minimum(first + tl.arange(0, N), T - 1)
        at = tl.program_id(1).to(tl.int64) * T + i  # program_id(1) is the head
        return i, at, at[:, None] * D + tl.arange(0, D)

    @triton.jit
    def forward_kernel(Q, K, V, O, LSE, LO, HI, scale, T_q, T_k, D: tl.constexpr,
                       ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """[1] Alg. 1: a program makes ROWS rows of the output of one head."""
        i, at, rows = find_rows(tl.program_id(0) * ROWS, T_q, ROWS, D)
        lo = tl.load(LO + i)[:, None]  # (ROWS, 1)
        hi = tl.load(HI + i)[:, None]
        q = tl.load(Q + rows)  # (ROWS, D)
        o = tl.zeros([ROWS, D], tl.float32)
        m = tl.full([ROWS, 1], -3e38, tl.float32)  # finite: -inf - -inf is NaN
        l = tl.zeros([ROWS, 1], tl.float32)
        for j0 in range(tl.min(lo) // COLUMNS * COLUMNS, tl.max(hi), COLUMNS):
            j = j0 + tl.arange(0, COLUMNS)
            _, _, columns = find_rows(j0, T_k, COLUMNS, D)
            k = tl.load(K + columns)  # (COLUMNS, D)
            v = tl.load(V + columns)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # S = Q K^T
            if (j0 < tl.max(lo)) | (j0 + COLUMNS > tl.min(hi)):  # a cut tile
                s = tl.where((lo <= j) & (j < hi), s, -float("inf"))
            m_new = tl.maximum(m, tl.max(s, axis=1, keep_dims=True))  # as add_tile does
            p = tl.exp2(s - m_new)
            rescale = tl.exp2(m - m_new)
            o = tl.dot(p.to(v.dtype), v, o * rescale, input_precision="ieee")
            l = l * rescale + tl.sum(p, axis=1, keep_dims=True)
            m = m_new
        tl.store(O + rows, o / tl.where(l == 0, 1.0, l))
        tl.store(LSE + at[:, None], m + tl.log2(l))

    @triton.jit
    def backward_kernel(X, Y, X2, Y2, DX, DX2, LO, HI, LSE, DELTA, scale, dx_scale, T_x, T_y,
                        D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                        OF_KEYS: tl.constexpr):
        """[1] Alg. 2, launched twice with queries and keys changing places:
                                           rows X, X2   columns Y, Y2
        dQ = dS K                          Q, dO        K, V           S = Q K^T, dP = dO V^T
        dK = dS^T Q and dV = P^T dO        K, V         Q, dO          the transposes of these"""
        i, at, rows = find_rows(tl.program_id(0) * ROWS, T_x, ROWS, D)
        lo = tl.load(LO + i)[:, None]
        hi = tl.load(HI + i)[:, None]
        x = tl.load(X + rows)  # (ROWS, D)
        x2 = tl.load(X2 + rows)
        if not OF_KEYS:
            lse = tl.load(LSE + at)[:, None]  # (ROWS, 1)
            delta = tl.load(DELTA + at)[:, None]
        dx = tl.zeros([ROWS, D], tl.float32)
        dx2 = tl.zeros([ROWS, D], tl.float32)
        # three loops, over cut, full, cut tiles: an `if` in a single one took a quarter more time
        start = tl.min(lo) // COLUMNS * COLUMNS
        stop = tl.max(hi)
        full = tl.minimum(tl.cdiv(tl.max(lo), COLUMNS) * COLUMNS, stop)
        full_stop = tl.maximum(tl.min(hi) // COLUMNS * COLUMNS, full)
        limits = (start, full, full_stop, stop)
        for part in tl.static_range(3):  # unrolled
            for j0 in range(limits[part], limits[part + 1], COLUMNS):
                j = j0 + tl.arange(0, COLUMNS)
                _, at_j, columns = find_rows(j0, T_y, COLUMNS, D)
                y = tl.load(Y + columns)  # (COLUMNS, D)
                y2 = tl.load(Y2 + columns)
                if OF_KEYS:
                    lse = tl.load(LSE + at_j)  # (COLUMNS,)
                    delta = tl.load(DELTA + at_j)
                s = tl.dot(x, tl.trans(y), input_precision="ieee") * scale
                p = tl.exp2(s - lse)  # P = 2^(S - LSE)
                dp = tl.dot(x2, tl.trans(y2), input_precision="ieee")
                ds = p * (dp - delta)  # dS = P * (dP - delta)
                if part != 1:  # a cut tile
                    seen = (lo <= j) & (j < hi)
                    p = tl.where(seen, p, 0.0)
                    ds = tl.where(seen, ds, 0.0)
                    y = tl.where(tl.abs(y) < float("inf"), y, 0.0)  # 0 * NaN is NaN
                dx = tl.dot(ds.to(y.dtype), y, dx, input_precision="ieee")
                if OF_KEYS:
                    dx2 = tl.dot(p.to(y.dtype), y2, dx2, input_precision="ieee")
        tl.store(DX + rows, dx * dx_scale)
        if OF_KEYS:
            tl.store(DX2 + rows, dx2)


# rows and columns of a tile, warps, tiles loaded ahead: the fastest of those tried on an H200
FORWARD_TILE = (64, 64, 4, 3)
BACKWARD_TILE = (64, 32, 4, 3)
FP32_TILE = (32, 32, 4, 2)


def launch(kernel, tile, x, y, *rest, **flags):
    """Run a kernel: a program for each tile's rows of each head of x (B H, T_x, D)."""
    heads, T_x, D = x.shape
    rows, columns, warps, stages = FP32_TILE if x.dtype == torch.float32 else tile
    with torch.cuda.device_of(x):  # Triton launches on the current GPU
        kernel[triton.cdiv(T_x, rows), heads](
            x, y, *rest, T_x, y.size(1), D, rows, columns,
            num_warps=warps, num_stages=stages, **flags)


def triton_gradients(q, k, v, do, lse, delta, lo, hi, scale):
    """dq, dk, dv, as gradients_in_tiles."""
    dq = torch.empty_like(q)
    dk = torch.empty_like(k)
    dv = torch.empty_like(v)
    j = torch.arange(k.size(1), device=lo.device, dtype=lo.dtype)
    row_lo = torch.searchsorted(hi, j, right=True, out_int32=True)  # the first query with hi > j
    row_hi = torch.searchsorted(lo, j, right=True, out_int32=True)
    rest = lse, delta, scale, scale / LOG2E  # scale has log2(e) in it
    launch(backward_kernel, BACKWARD_TILE, q, k, do, v, dq, None, lo, hi, *rest, OF_KEYS=False)
    launch(backward_kernel, BACKWARD_TILE, k, q, v, do, dk, dv, row_lo, row_hi, *rest, OF_KEYS=True)
    return dq, dk, dv


# ---- A task that needs attention far back. Keys with values, then the keys in another order:
#     k7 v3 k2 v9 k5 v1 | k2 ? k5 ? k7 ?    where the model reads a key, it names the value
VALUES = 64


def retrieval_batch(seed, B, T, device):
    """Tokens (B, T), a function of the seed. Ids below VALUES are values, the others keys."""
    rng = np.random.default_rng(seed)
    keys = VALUES + rng.random((B, T // 4)).argsort(axis=1)  # (B, T / 4), each key once
    pairs = np.stack((keys, rng.integers(VALUES, size=keys.shape)), axis=2)  # (B, T / 4, 2)
    tokens = np.hstack((pairs, rng.permutation(pairs, axis=1)))  # (B, T / 2, 2)
    return torch.from_numpy(tokens).view(B, T).to(device)


def retrieval_loss(model, tokens, dtype):
    """Loss and accuracy in the second half of tokens (B, T). A token's attention key is the query
    of the token before it, so a token finds what followed the same token earlier, as in [6]."""
    v = model.embed(tokens)[:, None]  # (B, 1, T, C), one head
    q = model.query(v).to(dtype)
    k = F.pad(q, (0, 0, 1, -1))  # one token later
    o = flash_attention(q, k, v, causal=True).squeeze(1).float()  # (B, T, C)
    logits = model.head(o[:, tokens.size(1) // 2::2])  # (B, T / 4, VALUES)
    answers = tokens[:, tokens.size(1) // 2 + 1::2]  # (B, T / 4)
    accuracy = (logits.argmax(dim=2) == answers).float().mean()
    return F.cross_entropy(logits.mT, answers), accuracy


# ---- Bench and training

def measure(f, inputs, do):
    """Seconds forward, seconds forward and backward, MB kept for the backward pass."""
    kept = []
    started = time.perf_counter()
    with torch.no_grad():
        f(*inputs).sum().item()  # item() waits for a GPU
    middle = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        o = f(*inputs)
    torch.autograd.grad(o, inputs, do)[0].sum().item()
    return middle - started, time.perf_counter() - middle, sum(x.nbytes for x in kept) / 2**20


def bench(c):
    """--bench: time and memory against T; 8 heads, D = 64. A window of 256 is a mask for sdpa."""
    dtype = getattr(torch, c.dtype)
    curves = {}
    for T in (2**n for n in range(9, c.block_size.bit_length())):
        *inputs, do = torch.randn(4, 1, 8, T, 64, device=c.device, dtype=dtype, requires_grad=True)
        seen = ~hidden_keys(*spans(do, do, True, 256), 0, T)  # (T, T), the mask
        kinds = {
            ("causal", "sdpa"): partial(F.scaled_dot_product_attention, is_causal=True),
            ("causal", "flash"): partial(flash_attention, causal=True),
            ("window", "sdpa"): partial(F.scaled_dot_product_attention, attn_mask=seen),
            ("window", "flash"): partial(flash_attention, causal=True, window=256)}
        if T <= 4096:  # at 8,192 each of its matrices takes 2 GB
            kinds["causal", "naive"] = partial(attention, causal=True)
        rounds = []  # the first one warms up
        for _ in range(8 if T <= 4096 else 3):  # the kinds in turn: other work slows all alike
            rounds.append([measure(f, inputs, do) for f in kinds.values()])
        medians = dict(zip(kinds, np.median(rounds[1:], axis=0), strict=True))
        for (mask, kind), row in medians.items():
            ratio = row / medians[mask, "sdpa"]
            print(f"T {T:5} {mask} {kind:5} forward {row[0]:.4f} s ({ratio[0]:.2f} of sdpa's), and "
                  f"back {row[1]:.4f} s ({ratio[1]:.2f}), keeps {row[2]:.1f} MB", flush=True)
            curves.setdefault(f"{mask} {kind}", []).append((T, row[1]))
    if not find_spec("matplotlib"):
        return print(f"for {c.out}/bench.png: pip install matplotlib")
    import matplotlib.pyplot as plt
    for name, points in curves.items():
        plt.loglog(*np.transpose(points), "o-", label=name)
    plt.legend(title="seconds forward and backward, against T", loc="lower right")
    plt.savefig(f"{c.out}/bench.png")


def show_tiles(c):
    """--tiles: which tiles of T x T scores the mask skips (.), cuts (/) and leaves full (#)."""
    q = torch.empty(1, 1, c.block_size, 1)
    for window in (None, c.block_size // 4):
        print(f"causal, window {window}")
        for _, tiles in tile_map(*spans(q, q, True, window)):
            row = ["."] * math.ceil(c.block_size / TILE)
            for columns, hidden in tiles:
                row[columns.start // TILE] = "#" if hidden is None else "/"
            print(*row)


CHOICES = dict(dtype=("auto", "float32", "bfloat16"))


@dataclasses.dataclass
class Config:
    block_size: int = 4096  # T
    n_embd: int = 64
    lr: float = 0.003
    batch_size: int = 4
    steps: int = 100
    eval_every: int = 50  # steps between evaluations
    log_every: int = 10
    seed: int = 0
    out: str = "out/flash_attn"
    device: str = "auto"
    dtype: str = "auto"
    compile: bool = False
    tiles: bool = False
    bench: bool = False


def log_row(c, **row):
    """Print a row and append it to log.jsonl."""
    print(" | ".join(f"{name} {value:.5g}" for name, value in row.items()), flush=True)
    with open(f"{c.out}/log.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


def train(c):
    torch.manual_seed(c.seed)
    model = nn.ModuleDict(dict(
        embed=nn.Embedding(VALUES + c.block_size // 4, c.n_embd),
        query=nn.Linear(c.n_embd, c.n_embd, bias=False),
        head=nn.Linear(c.n_embd, VALUES))).to(c.device)
    loss_of = partial(retrieval_loss, model, dtype=getattr(torch, c.dtype))
    loss_of = torch.compile(loss_of) if c.compile else loss_of
    evaluate = torch.no_grad()(loss_of)  # the same without gradients
    optimizer = torch.optim.Adam(model.parameters(), c.lr, betas=(0.9, 0.98))
    Path(c.out, "config.json").write_text(json.dumps(vars(c), indent=2))
    Path(c.out, "log.jsonl").write_text("")
    seconds = 0.0
    for step in range(1, c.steps + 1):
        started = time.perf_counter()
        tokens = retrieval_batch((c.seed, 0, step), c.batch_size, c.block_size, c.device)
        loss, _ = loss_of(tokens)
        if not loss.isfinite():
            raise SystemExit(f"loss is {loss.item()} at step {step}")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - started
        if step % c.log_every == 0:
            log_row(c, step=step, loss=loss.item(), lr=c.lr, seconds=seconds,
                    tokens_per_s=step * tokens.numel() / seconds)
        if step % c.eval_every == 0 or step == c.steps:
            loss, right = evaluate(retrieval_batch((c.seed, 1), 8, c.block_size, c.device))
            log_row(c, step=step, seconds=seconds, val_loss=loss.item(), val_accuracy=right.item())
    loss, right = evaluate(retrieval_batch((c.seed, 2), 8, c.block_size, c.device))
    log_row(c, step=step, test_loss=loss.item(), test_accuracy=right.item(), final=True)


def make_parser():
    """A flag for each field of Config."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Config):
        kind = dict(type=field.type, choices=CHOICES.get(field.name))
        if field.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        parser.add_argument("--" + field.name, default=field.default, help="[%(default)s]", **kind)
    return parser


def main(argv=None):
    c = Config(**vars(make_parser().parse_args(argv)))
    if c.device == "auto":  # cuda, mps or cpu
        c.device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if c.dtype == "auto":
        fast = "cuda" in c.device and torch.cuda.is_bf16_supported(including_emulation=False)
        c.dtype = "bfloat16" if fast else "float32"
    if c.tiles:
        return show_tiles(c)
    Path(c.out).mkdir(parents=True, exist_ok=True)
    (bench if c.bench else train)(c)


if __name__ == "__main__":
    main()
