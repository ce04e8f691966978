r"""FlashAttention: exact attention, forward and backward, that never stores the T x T scores.

A softmax needs a row's largest score and its sum of exponentials. Both can be corrected when more
keys come in [3]. So scores are made one tile (some queries x some keys) at a time, used, and
dropped [1, 2]. A tile stays in fast memory, a CPU's cache or a GPU's SRAM, which saves round trips
to main memory. For the backward pass one number per query is kept, LSE = log(sum_j e^s_j). With it,
any tile of probabilities can be made again: they are e^(s - LSE).

    python flash_attn.py                                  # a small Transformer learns to retrieve
    python flash_attn.py --backend naive --out out/naive  # the same with T x T scores
    python flash_attn.py --bench --block_size 16384       # time and memory against T
    python flash_attn.py --bench --block_size 16384 --window 256

What to expect (torch 2.13.0, two cores of an AMD EPYC, fp32; assets/logs/flash_attn/):
- python flash_attn.py: test accuracy 1.0 after 26 s of training
- T = 4,096, causal: forward 1.17 of the time of torch's kernel, forward and backward 1.03; naive
  takes 7.1 and 5.5 times as long. Window 256, T = 16,384: 25 times as fast as torch's dense mask

On a GPU the forward pass is a Triton kernel (tested in Triton's interpreter, not yet measured), the
backward pass PyTorch. Differs from [1, 2]: PyTorch computes half precision in fp32, grouped keys
are repeated, and packed documents are a call each. There is no dropout.

[1] FlashAttention-2, arXiv 2307.08691v1  [2] FlashAttention, arXiv 2205.14135v2
[3] Online softmax, arXiv 1805.02867v2  [4] GQA, arXiv 2305.13245v3
[5] Mistral 7B, arXiv 2310.06825v1  [6] Induction heads, arXiv 2209.11895v1
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import sys
import time
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
HEADS, TILE = 8, 256  # a tile of 8 x 256 x 256 scores is 2 MB in fp32, which a CPU's cache holds

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
    """Attention over two sets of keys, from that over each: o (..., D) and LSE (...), the log of
    the sum of e^s. A set without keys has LSE = -inf."""
    lse = torch.logaddexp(lse1, lse2)
    finite = lse.clamp(min=-1e30)  # -inf - -inf would be NaN
    weight1 = torch.exp(lse1 - finite)[..., None]  # the set's share of the sum over both
    weight2 = torch.exp(lse2 - finite)[..., None]
    return o1 * weight1 + o2 * weight2, lse


def add_tile(o, m, l, s, v):
    """Take in the scores s (N, rows, columns) and the values v (N, columns, D) of some keys of N
    heads. o (N, rows, D) is a sum with weights 2^(s - m), and l (N, rows, 1) is the sum of the
    weights ([1] Alg. 1, lines 9 and 10). o and s are overwritten."""
    m_new = torch.maximum(m, s.amax(dim=-1, keepdim=True))  # (N, rows, 1)
    p = s.sub_(m_new).exp2_()  # P = 2^(S - m)
    rescale = torch.exp2(m - m_new)  # the weights so far were 2^(s - m)
    o.mul_(rescale).baddbmm_(p, v)  # O = rescale O + P V
    return m_new, l * rescale + p.sum(dim=-1, keepdim=True)


def attention_in_tiles(q, k, v, plan, scale):
    """o and LSE of q (B H, T_q, D), k and v (B H, T_k, D). The plan, of tile_map, lists the tiles:
    for some rows, which columns (keys) they see, and which scores are hidden, if any are."""
    exact = torch.promote_types(q.dtype, torch.float32)  # the type of scores and sums
    o, lse = torch.empty_like(q), torch.empty_like(q[..., 0], dtype=exact)
    memory = q.new_empty(0, dtype=exact)
    for first in range(0, len(q), HEADS):
        n = slice(first, first + HEADS)  # N heads
        for rows, tiles in plan:
            q_i = q[n, rows].to(exact) * (scale * LOG2E)  # (N, rows, D)
            o_i = torch.zeros_like(q_i)
            l = torch.zeros_like(q_i[..., :1])  # (N, rows, 1)
            m = torch.full_like(l, torch.finfo(exact).min)  # finite: -inf - -inf is NaN
            for columns, hidden in tiles:
                k_j, v_j = k[n, columns].to(exact), v[n, columns].to(exact)  # (N, columns, D)
                # resize_(0) keeps the memory: fresh pages for each tile would take time
                s = torch.bmm(q_i, k_j.mT, out=memory.resize_(0))  # S = Q K^T
                if hidden is not None:
                    zero_hidden(s, hidden)  # -inf + inf or NaN would be NaN
                    s.add_(torch.where(hidden, -math.inf, 0.0))
                m, l = add_tile(o_i, m, l, s, v_j)
            o[n, rows] = o_i / l.masked_fill(l == 0, 1)  # l is 0 in a row without keys
            lse[n, rows] = (m + l.log2()).squeeze(2) / LOG2E  # -inf in a row without keys
    return o, lse


# ---- The reference, and which keys a query sees. B batch, H heads, T tokens, D head size

def attention(q, k, v, causal=False, window=None, scale=None):
    """softmax(scale q k^T) v with all scores at once, (B, H, T_q, D). q is (B, H, T_q, D), k and v
    are (B, H_kv, T_k, D). The scale is 1 / sqrt(D) by default. A query without keys gets 0."""
    q, k, v, scale = prepare(q, k, v, window, scale)
    s = (q * scale) @ k.mT  # (B, H, T_q, T_k); in float16 q k^T could overflow before the scale
    # without a mask the rest is: return s.softmax(dim=-1) @ v
    lo, hi = spans(q.size(2), k.size(2), causal, window)
    hidden = hidden_keys(lo, hi, 0, k.size(2)).to(q.device)  # (T_q, T_k)
    p = s.masked_fill(hidden, -math.inf).softmax(dim=-1)
    p = p.masked_fill(hidden, 0)  # a row without keys was NaN
    return p @ v


def spans(T_q, T_k, causal=False, window=None):
    """The mask, as the keys [lo, hi) that each query sees: two tensors (T_q,) that never decrease.
    Query i stands at position T_k - T_q + i: the last query is aligned with the last key, so that
    new tokens can be asked about with a cache of keys. (torch's is_causal aligns the first ones.)
    A window w [5] leaves the w newest keys if causal, else those less than w positions away."""
    p = torch.arange(T_k - T_q, T_k, device="cpu")  # (T_q,), positions of the queries
    lo, hi = torch.zeros_like(p), torch.full_like(p, T_k)
    if window is not None:
        lo, hi = p - window + 1, p + window
    if causal:
        hi = p + 1
    return lo.clamp(min=0), hi.clamp(min=0, max=T_k)


def hidden_keys(lo, hi, j0, j1):
    """True where a query doesn't see a key of j0 .. j1 - 1: (queries, j1 - j0)."""
    j = torch.arange(j0, j1, device="cpu")
    return (j < lo[:, None]) | (j >= hi[:, None])


def prepare(q, k, v, window, scale):
    """q, k and v as they are computed with, and the scale. ValueError if they don't fit."""
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:  # as torch's own does
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    B, H, _, D = q.shape
    if k.size(1) < H:  # query heads share a key head [4]
        k = k.repeat_interleave(H // k.size(1), dim=1)  # (B, H, T_k, D)
        v = v.repeat_interleave(H // v.size(1), dim=1)
    if not k.shape == v.shape == (B, H, k.size(2), D) or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)} {k.dtype}, "
                         f"v {tuple(v.shape)} {v.dtype}, heads repeated: want the same but T")
    if window is not None and window < 1:
        raise ValueError(f"window {window}: want None, or 1 or more")
    if scale is not None and not isinstance(scale, (int, float)):  # a tensor would get no gradient
        raise ValueError(f"scale {scale}: want a number; a tensor can be multiplied into q")
    return q, k, v, D ** -0.5 if scale is None else scale


# ---- Which tiles there are: a causal mask with a window of 5 skips (.), cuts (/) or fills (#) one
#
#     queries 0, 1   / . . .    the first column is keys 0 and 1
#     queries 2, 3   # / . .
#     queries 4, 5   / # / .    query 5 doesn't see key 0
#     queries 6, 7   . / # /

def tile_map(lo, hi, device="cpu"):
    """The tiles that aren't skipped: [(rows, [(columns, hidden), ...]), ...], where hidden (rows,
    columns) is True where a query doesn't see a key, or None if the tile is full."""
    plan = []
    for i0 in range(0, len(lo), TILE):
        tiles = []
        i1 = min(i0 + TILE, len(lo))
        for j0 in range(lo[i0] // TILE * TILE, hi[i1 - 1], TILE):
            j1 = min(j0 + TILE, int(hi[-1]))
            hidden = None
            if j0 < lo[i1 - 1] or j1 > hi[i0]:  # spans only move forward
                hidden = hidden_keys(lo[i0:i1], hi[i0:i1], j0, j1).to(device)
            tiles.append((slice(j0, j1), hidden))
        plan.append((slice(i0, i1), tiles))
    return plan


def zero_hidden(x, hidden):
    """x.masked_fill_(hidden, 0), but on a CPU several times as fast: it clears the bits."""
    bits = x.view(torch.int32 if x.element_size() == 4 else torch.int64)
    bits.bitwise_and_(hidden.contiguous().to(bits.dtype) - 1)  # -1, where it is seen, is all bits


def gradients_in_tiles(q, k, v, o, lse, do, dlse, plan, scale):
    """dq, dk, dv ([1] Alg. 2), with a plan by columns. Softmax's gradient is dS = P * (dP - delta),
    delta = rowsum(P * dP). This is rowsum(dO * O) too, so that a tile needs no other tile."""
    exact = lse.dtype
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta = (do.to(exact) * o).sum(dim=-1) - dlse  # line 4; dLSE / dS = P, so dlse adds P * dlse
    minus_delta, minus_lse = -delta[..., None], lse[..., None] * -LOG2E  # (B H, T_q, 1)
    p, ds = q.new_empty(0, dtype=exact), q.new_empty(0, dtype=exact)
    for first in range(0, len(q), HEADS):
        n = slice(first, first + HEADS)
        dq_tiles = [torch.zeros_like(q_i, dtype=exact) for q_i in q[n].split(TILE, dim=1)]
        for columns, tiles in plan:
            k_j = k[n, columns].to(exact) * (scale * LOG2E)  # (N, columns, D)
            k_seen = k_j.nan_to_num(0, 0, 0)
            v_j = v[n, columns].to(exact)
            dk_j, dv_j = torch.zeros_like(k_j), torch.zeros_like(v_j)
            for rows, hidden in tiles:
                q_i, do_i = q[n, rows].to(exact), do[n, rows].to(exact)  # (N, rows, D)
                torch.baddbmm(minus_lse[n, rows], q_i, k_j.mT, out=p.resize_(0))
                p.exp2_()  # P = e^(S - LSE), line 11
                torch.baddbmm(minus_delta[n, rows], do_i, v_j.mT, out=ds.resize_(0))  # dP = dO V^T
                ds.mul_(p)  # dS = P * (dP - delta), lines 13 and 14
                if hidden is not None:
                    zero_hidden(p, hidden.T)
                    zero_hidden(ds, hidden.T)
                    q_i = q_i.nan_to_num(0, 0, 0)  # 0 * NaN is NaN; who sees a NaN has it in ds
                dv_j.baddbmm_(p.mT, do_i)  # dV += P^T dO, line 12
                dq_tiles[rows.start // TILE].baddbmm_(ds, k_seen)  # dQ += dS K, line 15
                dk_j.baddbmm_(ds.mT, q_i)  # dK += dS^T Q, line 16
            dk[n, columns] = dk_j * scale
            dv[n, columns] = dv_j
        dq[n] = torch.cat(dq_tiles, dim=1) / LOG2E  # the scale came with k_j
    return dq, dk, dv


class FlashAttention(torch.autograd.Function):
    """o (B, H, T_q, D) and LSE (B, H, T_q), which with q, k, v are all the backward pass needs."""

    @staticmethod
    def forward(q, k, v, lo, hi, scale, backend):
        if backend == "triton":
            return triton_forward(q, k, v, lo, hi, scale)
        plan = tile_map(lo, hi, q.device)
        heads = [x.flatten(0, 1) for x in (q, k, v)]  # (B H, T, D)
        o, lse = attention_in_tiles(*heads, plan, scale)
        return o.view_as(q), lse.view(q.shape[:3])

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.scale, _ = inputs
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx, do, dlse):
        if torch.is_grad_enabled():  # create_graph, or torch.func.grad
            raise RuntimeError("flash_attention has no second derivative: use attention()")
        q, k, v, lo, hi, o, lse = ctx.saved_tensors
        j = torch.arange(k.size(2), device="cpu")
        row_lo = torch.searchsorted(hi, j, right=True)  # the first query with hi > j
        row_hi = torch.searchsorted(lo, j, right=True)  # the first query with lo > j
        plan = tile_map(row_lo, row_hi, q.device)
        heads = [x.flatten(0, 1) for x in (q, k, v, o, lse, do, dlse)]
        dq, dk, dv = gradients_in_tiles(*heads, plan, ctx.scale)
        return dq.view_as(q), dk.view_as(k), dv.view_as(v), None, None, None, None


def flash_attention(q, k, v, causal=False, window=None, scale=None, backend="auto",
                    cu_seqlens=None, return_lse=False):
    """What attention() computes, without T x T matrices; with return_lse also LSE (B, H, T_q), for
    merge(). backend: torch; triton (a CUDA GPU or, except for bfloat16, Triton's interpreter; T_q
    and T_k multiples of 64, D 16, 32, 64 or 128); auto, triton where it can run. cu_seqlens
    [0, ..., T]: documents packed along T. Each is a call of its own, so that none sees another."""
    if cu_seqlens is not None:
        lengths = torch.as_tensor(cu_seqlens, device="cpu").diff().tolist()
        documents = zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), strict=True)
        parts = [flash_attention(*qkv, causal, window, scale, backend, return_lse=True)
                 for qkv in documents]
        o, lse = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
    else:
        q, k, v, scale = prepare(q, k, v, window, scale)
        runs = q.is_cuda or os.environ.get("TRITON_INTERPRET") == "1" and q.dtype != torch.bfloat16
        fits = q.size(3) in (16, 32, 64, 128) and q.size(2) % 64 == k.size(2) % 64 == 0
        fits = triton and runs and fits and q.dtype != torch.float64
        if backend == "auto":
            backend = "triton" if fits else "torch"
        if backend != "torch" and not (backend == "triton" and fits):
            raise ValueError(f"backend {backend}: want auto, torch, or triton where that can run")
        lo, hi = spans(q.size(2), k.size(2), causal, window)
        o, lse = FlashAttention.apply(q, k, v, lo, hi, scale, backend)
    return (o, lse) if return_lse else o


# ---- The forward pass as a Triton kernel. It runs as many programs; program_id says which one it
# is. Capitals are pointers to (heads, T, D). tl.constexpr: known when the kernel is compiled.
if triton:
    @triton.jit
    def forward_kernel(Q, K, V, O, LSE, LO, HI, scale, T_q, T_k, D: tl.constexpr,
                       SIDE: tl.constexpr):
        """[1] Alg. 1: a program makes the output of SIDE queries of one head."""
        head = tl.program_id(0).to(tl.int64)
        i0 = tl.program_id(1) * SIDE
        i = i0 + tl.arange(0, SIDE)
        d = tl.arange(0, D)
        lo = tl.load(LO + i)[:, None]  # (SIDE, 1)
        hi = tl.load(HI + i)[:, None]
        rows = (head * T_q + i)[:, None] * D + d  # their places in Q and O
        q = tl.load(Q + rows)  # (SIDE, D)
        o = tl.zeros([SIDE, D], tl.float32)
        m = tl.full([SIDE], -3e38, tl.float32)  # finite: -inf - -inf is NaN
        l = tl.zeros([SIDE], tl.float32)
        start = tl.load(LO + i0) // SIDE * SIDE  # tiles before it and from stop on are skipped
        stop = tl.load(HI + i0 + SIDE - 1)
        for j0 in range(start, stop, SIDE):
            j = j0 + tl.arange(0, SIDE)
            columns = (head * T_k + j)[:, None] * D + d
            k = tl.load(K + columns)
            v = tl.load(V + columns)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # S = Q K^T
            s = tl.where((lo <= j) & (j < hi), s, -float("inf"))
            m_new = tl.maximum(m, tl.max(s, axis=1))  # add_tile
            p = tl.exp2(s - m_new[:, None])
            rescale = tl.exp2(m - m_new)
            o = o * rescale[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
            l = l * rescale + tl.sum(p, axis=1)
            m = m_new
        tl.store(O + rows, o / tl.where(l == 0, 1.0, l)[:, None])
        tl.store(LSE + head * T_q + i, m + tl.log2(l))  # times log2(e), as scale is


def triton_forward(q, k, v, lo, hi, scale):
    """o and LSE, as FlashAttention.forward."""
    B, H, T, D = q.shape
    q, k, v = (x.contiguous() for x in (q, k, v))
    o, lse = torch.empty_like(q), q.new_empty(B, H, T, dtype=torch.float32)
    lo, hi = lo.to(q.device, torch.int32), hi.to(q.device, torch.int32)
    side = 64 if q.element_size() == 2 else 32  # not tuned
    with torch.cuda.device_of(q):  # Triton launches on the current GPU
        forward_kernel[B * H, T // side](
            q, k, v, o, lse, lo, hi, scale * LOG2E, T, k.size(2), D, side)
    return o, lse / LOG2E


# ---- A task that needs attention far back, and a Transformer of one layer that learns it
#
#     k7 v3 k2 v9 k5 v1 | k2 ? k5 ? k7 ?    keys with values, then the keys in another order;
#                          v9   v1   v3     where it reads a key, the model names its value
VALUES = 64


def retrieval_batch(seed, B, T, device):
    """Tokens (B, T) and answers (B, T / 4), a function of the seed. Ids below T / 2 are keys."""
    rng = np.random.default_rng(seed)
    keys = rng.random((B, T // 2)).argsort(axis=1)[:, :T // 4]  # (B, T / 4), no two alike
    values = T // 2 + rng.integers(VALUES, size=keys.shape)
    pairs = np.stack((keys, values), axis=2)  # (B, T / 4, 2)
    tokens = np.hstack((pairs, rng.permutation(pairs, axis=1))).reshape(B, T)
    tokens = torch.from_numpy(tokens).to(device)
    return tokens, tokens[:, T // 2 + 1::2] - T // 2


class RetrievalModel(nn.Module):
    """Tokens (B, T) to logits (B, T / 4, VALUES). A token's attention key is the query of the token
    before it, so that it attends to what followed its like: [6]'s smeared keys at the extreme."""

    def __init__(self, c):
        super().__init__()
        flash, C = functools.partial(flash_attention, backend=c.backend), c.n_embd
        self.attend = attention if c.backend == "naive" else flash
        self.embed = nn.Embedding(c.block_size // 2 + VALUES, C)
        self.norm = nn.LayerNorm(C)
        self.qv = nn.Linear(C, 2 * C, bias=False)
        widen, narrow = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)
        self.mlp = nn.Sequential(nn.LayerNorm(C), widen, nn.GELU(), narrow)
        self.head = nn.Sequential(nn.LayerNorm(C), nn.Linear(C, VALUES))

    def forward(self, tokens):
        x = self.embed(tokens)  # (B, T, C)
        q, v = self.qv(self.norm(x))[:, None].chunk(2, dim=3)  # (B, 1, T, C), one head
        k = F.pad(q, (0, 0, 1, 0))[:, :, :-1]  # one token later
        x = x + self.attend(q, k, v, causal=True).squeeze(1)
        x = x[:, tokens.size(1) // 2::2]  # (B, T / 4, C), the keys of the second half
        return self.head(x + self.mlp(x))


@torch.no_grad()
def evaluate(model, c, split, device, autocast):
    """Loss and accuracy on eight sequences of their own: split 1 validates, split 2 tests."""
    x, y = retrieval_batch((c.seed, split), 8, c.block_size, device)
    with autocast:
        logits = model(x).float()  # (8, T / 4, VALUES)
    accuracy = (logits.argmax(dim=2) == y).float().mean().item()
    return F.cross_entropy(logits.flatten(0, 1), y.flatten()).item(), accuracy


# ---- Bench and training

def measure(f, q, k, v, do):
    """Seconds forward, seconds forward and backward, MB kept for the backward pass."""
    kept = []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x)
    started = time.perf_counter()
    with torch.no_grad():
        f(q, k, v).sum().item()  # item() waits for a GPU
    middle = time.perf_counter()
    with keep:
        o = f(q, k, v)
    dq, *_ = torch.autograd.grad(o, (q, k, v), do)
    dq.sum().item()
    kept = sum(x.nbytes for x in kept) / 2**20
    return middle - started, time.perf_counter() - middle, kept


def bench(c):
    """Time and memory against T up to --block_size: causal, B = 1, H = 8, D = 64."""
    device, dtype = pick_device(c.device, c.dtype)
    for T in (2**n for n in range(9, c.block_size.bit_length())):
        mask = ~hidden_keys(*spans(T, T, True, c.window), 0, T).to(device) if c.window else None
        sdpa = functools.partial(F.scaled_dot_product_attention, attn_mask=mask)
        kinds = dict(sdpa=functools.partial(sdpa, is_causal=mask is None),
                     flash=functools.partial(flash_attention, causal=True, window=c.window or None))
        if T <= 4096:  # at 8,192 its matrices are 2 GB each
            kinds["naive"] = functools.partial(attention, causal=True, window=c.window or None)
        q, k, v, do = torch.randn(4, 1, 8, T, 64, device=device, dtype=dtype)
        inputs = [x.requires_grad_() for x in (q, k, v)]
        found = []
        for _ in range(8):  # the kinds in turn, so that other work slows all alike
            found.append([measure(f, *inputs, do) for f in kinds.values()])
        medians = np.median(found[1:], axis=0)  # (kinds, 3); the first round warms up
        for name, row in zip(kinds, medians, strict=True):
            ratio = row / medians[0]
            print(f"T {T:5} {name:5} forward {row[0]:.4f} s ({ratio[0]:.2f} of sdpa's), and back "
                  f"{row[1]:.4f} s ({ratio[1]:.2f}), keeps {row[2]:.1f} MB", flush=True)


CHOICES = dict(backend=("auto", "torch", "triton", "naive"), dtype=("auto", "float32", "bfloat16"))


@dataclasses.dataclass
class Config:
    block_size: int = 4096  # T
    n_embd: int = 64
    backend: str = "auto"  # naive: attention()
    lr: float = 0.003
    batch_size: int = 4
    steps: int = 100
    eval_every: int = 50  # steps between evaluations, each with a checkpoint
    log_every: int = 10
    seed: int = 0
    out: str = "out/flash_attn"
    device: str = "auto"
    dtype: str = "auto"
    compile: bool = False
    bench: bool = False
    window: int = 0  # of --bench; 0: none


def pick_device(name, dtype):
    """The device, and the type to compute in."""
    if name == "auto":
        found = torch.accelerator.is_available()  # cuda or mps
        name = torch.accelerator.current_accelerator().type if found else "cpu"
    if dtype == "auto":
        fast = name == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if fast else "float32"
    return torch.device(name), getattr(torch, dtype)


def save(path, state):
    """Write a checkpoint whole or not at all."""
    torch.save(state, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def log_row(c, **row):
    """Print a row and append it to log.jsonl."""
    print(" | ".join(f"{name} {value:.5g}" for name, value in row.items()), flush=True)
    with open(f"{c.out}/log.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


def train(c):
    """Train the model, keep the best on validation sequences, and test it."""
    device, dtype = pick_device(c.device, c.dtype)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    torch.manual_seed(c.seed)
    model = RetrievalModel(c).to(device)
    if c.compile:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), c.lr, betas=(0.9, 0.98), weight_decay=0.0)
    out, best, seconds = Path(c.out), -1.0, 0.0
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(vars(c), indent=2))
    (out / "log.jsonl").write_text("")
    for step in range(1, c.steps + 1):
        started = time.perf_counter()
        x, y = retrieval_batch((c.seed, 0, step), c.batch_size, c.block_size, device)
        with autocast:
            logits = model(x)  # (B, T / 4, VALUES)
        loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
        if not math.isfinite(loss.item()):
            sys.exit(f"loss is {loss.item()} at step {step}")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        duration = time.perf_counter() - started
        seconds += duration
        if step % c.log_every == 0:
            log_row(c, step=step, loss=loss.item(), lr=c.lr, seconds=seconds,
                    tokens_per_s=x.numel() / duration)
        if step % c.eval_every == 0 or step == c.steps:
            val_loss, accuracy = evaluate(model, c, 1, device, autocast)
            log_row(c, step=step, seconds=seconds, val_loss=val_loss, val_accuracy=accuracy)
            improved, best = accuracy > best, max(accuracy, best)
            state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(),
                         config=vars(c), step=step, best=best)
            save(out / "ckpt.pt", state)
            if improved:
                save(out / "best.pt", state)
    model.load_state_dict(torch.load(out / "best.pt", weights_only=True)["model"])
    loss, accuracy = evaluate(model, c, 2, device, autocast)
    log_row(c, step=step, seconds=seconds, test_loss=loss, test_accuracy=accuracy, final=True)
    print("solved" if accuracy > 0.99 else "not solved")


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
    if c.bench:
        return bench(c)
    train(c)


if __name__ == "__main__":
    main()
