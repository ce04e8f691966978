# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "numpy"]
# ///
"""FlashAttention: exact attention, forward and backward, that never holds the T × T matrix of scores.

softmax(q kᵀ) v needs a row's largest score and its sum of exponentials; both can be corrected as more keys come in, so
scores are made a tile (some queries × some keys) at a time, used, and dropped [1, 2, 3]. A tile stays in fast memory (a
CPU's cache, a GPU's SRAM), and what the T × T matrix costs, its ways to main memory and back, is gone: that is why it
is faster although the backward pass computes more [2]. One number a row is kept, LSE = log Σ e^score; with q and k it
gives the backward pass any tile of probabilities again. All else is which tiles to leave out: every mask here (causal,
window, packed documents) gives each query one span of keys [lo, hi) that only moves forward.

    python flash_attn.py                                # offline: a Transformer learns to find what followed a key
    python flash_attn.py --backend naive --out out/naive        # the same run with all T × T scores
    python flash_attn.py --bench                        # time, memory and FLOP/s over T, beside torch's own kernel
    python flash_attn.py --tiles --window 600           # which tiles a mask skips
    python flash_attn.py --resume                       # goes on with the run in --out

and in Python: flash_attention(q, k, v, causal=True), where q is (B, H, T_q, D), k and v (B, H_kv, T_k, D); H_kv may
divide H (grouped queries [4]). On a CUDA GPU (a card, below) it runs the Triton kernels, else plain PyTorch.

What to expect (torch 2.13.0, two AMD EPYC cores, fp32 unless said, seed 0, n = 1; logs in assets/logs/flash_attn/):
- python flash_attn.py: test accuracy 1.0000 after 38 s of training; a sequence keeps 17.9 MB for the backward pass,
  with naive attention 153.8 MB, losses and gradients agree. --backend torch, then naive: the same losses to four
  digits in every log line; 42 s and 451 MB at most, naive 137 s and 1,113 MB: BenchFlashAttn.curves
- T = 4,096, causal, 8 heads, D = 64, against torch's scaled_dot_product_attention: forward 1.18 of its time (138 ms),
  forward and backward 1.00 (427 ms); naive 9.5 and 5.7: python .ci/old_tests.py BenchFlashAttn.speed
- --bench, 4 minutes: over T = 512 to 16,384 forward takes 1.11 to 1.19 of the time of torch's kernel, forward and
  backward .85 to .99; naive attention at T = 8,192 takes 13 and 7.4 times as long as torch's
- A window of 256 at T = 16,384, forward: 158 ms; torch's kernel, which wants the mask as a matrix, takes 26 times as
  long: BenchFlashAttn.window
- T = 16,384: peak above inputs and outputs 45 MB (the scores of its 8 heads: 8,192): BenchFlashAttn.memory
- Triton: checked in its interpreter, compiled for sm_90 at D = 64 in bfloat16; its time and its bfloat16 on a card: not
  yet measured

Differs from the papers: in plain PyTorch tiles are 256 × 256 and half precision is computed in fp32 tile by tile (on a
card, where the script is run, in TF32; the Triton kernels multiply fp32 exactly); inputs whose heads don't lie one
after another are copied; Triton's backward pass is two kernels that compute P twice, instead of atomic additions to dQ.

The task: keys, each with its value; then all keys again in another order, and the model names the value. To make this
quick to learn, a token's attention key is the token before it (the extreme of [6]'s smeared keys), under the queries'
own projection [7]: from the start, what followed tokens like it has the highest scores, and training makes it stand
out. A plain Transformer must learn this in two layers, an induction head [6].

Shapes: B batch, T tokens (T_q queries, T_k keys), H heads (H_kv of keys), G = H / H_kv, D head dim, C width.

[1] Dao 2023, FlashAttention-2, arXiv 2307.08691v1      [2] Dao et al. 2022, FlashAttention, arXiv 2205.14135v2
[3] Milakov and Gimelshein 2018, Online normalizer calculation for softmax, arXiv 1805.02867v2
[4] Ainslie et al. 2023, GQA, arXiv 2305.13245v3        [5] Jiang et al. 2023, Mistral 7B, arXiv 2310.06825v1
[6] Olsson et al. 2022, Induction heads, 2209.11895v1   [7] Kitaev et al. 2020, Reformer, arXiv 2001.04451v2
"""

import argparse, concurrent.futures, contextlib, dataclasses, functools, inspect, json, math, multiprocessing, os, re
import signal, statistics, sys, time, types, typing
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


class UserError(ValueError):
    """Bad input (status 2) or a failed run (status 1): main prints the message on one line and returns the status."""

    def __init__(self, message, status=2):
        super().__init__(message)
        self.status = status


# ---- config --------------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Config:
    # data
    block_size: int = 2048  # T, tokens of a sequence: T / 4 keys with their values, then the same again, asked
    n_values: int = 64  # values to tell apart
    # model
    n_layer: int = 2  # blocks
    n_head: int = 2  # heads
    n_embd: int = 64  # width C
    backend: str = "auto"  # torch, triton, naive (all T × T scores), or auto: triton where it can run, else torch
    window: int | None = None  # keys that a query sees, the newest ones; None: all
    # optimiser
    lr: float = 3e-3  # peak learning rate of AdamW
    warmup: int = 20  # steps of linear warm-up
    batch_size: int = 4  # sequences per step
    # run
    steps: int = 200  # updates of the parameters
    stop_at: int | None = None  # end at this step, the schedule unchanged
    eval_every: int = 50  # steps between evaluations, each followed by a checkpoint
    log_every: int = 10  # steps between log lines
    seed: int = 0  # of initial weights and sequences
    out: str = "out/flash_attn"  # the run's folder
    resume: bool = False  # go on from out/ckpt.pt, with that run's flags where none are given
    device: str = "auto"  # auto (cuda, then mps, then cpu), or a torch device
    dtype: str = "auto"  # float32 or bfloat16; auto: bfloat16 where the hardware multiplies matrices in it
    compile: bool = False  # torch.compile all but attention: a wait at first (it needs a C++ compiler on a CPU)
    # other things to do
    bench: bool = False  # time and memory of each backend, forward and backward, over lengths
    tiles: bool = False  # print which tiles the mask skips, cuts and leaves whole, at block_size
    lengths: str = "512,1024,2048,4096,8192,16384"  # T of the bench
    heads: int = 8  # heads of the bench
    head_dim: int = 64  # D of the bench
    causal: bool = True  # of bench and tiles: a query sees no later key (training always has it so)

    def __post_init__(self):
        known = dict(backend=("auto", "torch", "triton", "naive"), dtype=("auto", "float32", "bfloat16"))
        for name, value in vars(self).items():
            may_be_0 = name in ("warmup", "seed")
            if value == "" or name in known and value not in known[name]:
                raise UserError(f"--{name} {value!r}: want {' or '.join(known.get(name, ['some text']))}")
            if type(value) in (int, float) and not (0 < value <= sys.maxsize or value == 0 and may_be_0):
                raise UserError(f"--{name} {value}: want a number {'from' if may_be_0 else 'above'} 0")
        if self.block_size % 4 or self.n_embd % self.n_head:
            raise UserError(f"--block_size {self.block_size} --n_embd {self.n_embd} --n_head {self.n_head}: want a "
                            "multiple of 4, and a width that the heads divide")
        if not all(T.isdecimal() and int(T) > 0 for T in self.lengths.split(",")):
            raise UserError(f"--lengths {self.lengths}: want numbers like 512,1024")


# ---- one: attention, and which keys a query sees ------------------------------------------------------------------

LOG2E = 1 / math.log(2)  # e^x = 2^(x log2 e)


def spans(T_q, T_k, causal=False, window=None, cu_seqlens=None):
    """The mask, as the keys [lo, hi) that each query attends to: two int64 tensors (T_q,) that never decrease.

    Queries are aligned with the last keys: query i stands at key T_k - T_q + i, so that new tokens can be asked about
    with all of a cache as keys. (is_causal of torch's scaled_dot_product_attention aligns the first ones.)
    causal: keys up to its own position p. window w [5]: of these the w newest; if not causal, those with |p - j| < w.
    cu_seqlens (n + 1,): packed documents, the i-th from token cu_seqlens[i] to cu_seqlens[i + 1]; each sees itself.
    """
    p = torch.arange(T_q) + (T_k - T_q)  # (T_q,): each query's place among the keys
    lo, hi = torch.zeros_like(p), torch.full_like(p, T_k)
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.long().cpu()
        document = torch.searchsorted(cu_seqlens, p, right=True)
        lo, hi = cu_seqlens[document - 1], cu_seqlens[document]
    if window is not None:
        lo, hi = torch.maximum(lo, p - window + 1), torch.minimum(hi, p + window)
    if causal:
        hi = torch.minimum(hi, p + 1)
    return lo.clamp(min=0), hi.clamp(min=0)


def attention(q, k, v, causal=False, window=None, scale=None, cu_seqlens=None):
    """The reference: softmax(q kᵀ · scale) v, scale 1 / √D. q (B, H, T_q, D), k and v (B, H_kv, T_k, D).

    Its matrices of B · H · T_q · T_k numbers are what this file is about: two are kept for the backward pass, and at
    most three are there at once, in either pass. A query that sees no key gets 0.
    """
    lo, hi = check(q, k, v, causal, window, cu_seqlens)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))  # (B, H, T_k, D)
    s = q @ k.mT * (q.shape[3] ** -0.5 if scale is None else scale)  # (B, H, T_q, T_k)
    j = torch.arange(k.shape[2], device=q.device)
    hidden = (j < lo.to(q.device)[:, None]) | (j >= hi.to(q.device)[:, None])  # (T_q, T_k)
    p = s.masked_fill(hidden, -math.inf).softmax(dim=-1).masked_fill(hidden, 0)  # a row without keys would be NaN
    return p @ v  # (B, H, T_q, D)


def check(q, k, v, causal, window, cu_seqlens, backend="torch"):
    """The mask's spans, on the CPU; UserError, a ValueError, if the inputs don't fit together."""
    shapes = " ".join(f"{name} {tuple(t.shape)}" for name, t in (("q", q), ("k", k), ("v", v)))
    if not q.dim() == k.dim() == v.dim() == 4 or k.shape != v.shape or q.shape[::3] != k.shape[::3]:  # B, D
        raise UserError(f"{shapes}: want (B, H, T_q, D), and (B, H_kv, T_k, D) twice")
    if 0 in (q.shape[1], k.shape[1], q.shape[3]) or q.shape[1] % k.shape[1]:
        raise UserError(f"{q.shape[1]} query heads are no multiple of {k.shape[1]} key heads ({shapes})")
    if len({(t.dtype, t.device) for t in (q, k, v)}) > 1 or not q.is_floating_point():
        raise UserError(f"q {q.dtype} on {q.device}, k {k.dtype} on {k.device}, v {v.dtype} on {v.device}: want one "
                         "floating type and one device")
    if window is not None and (type(window) is not int or window < 1):
        raise UserError(f"window {window!r}: want a whole number from 1, or None")
    if cu_seqlens is not None:
        ends, T = cu_seqlens, q.shape[2]
        if T != k.shape[2] or ends.dim() != 1 or ends.is_floating_point() or len(ends) < 2 or (
                ends[0] != 0 or ends[-1] != T or (ends.diff() < 0).any()):
            raise UserError(f"cu_seqlens {ends.tolist()}: want whole numbers that rise from 0 to T ({shapes})")
    if backend not in ("auto", "torch", "triton"):
        raise UserError(f"backend {backend!r}: want auto, torch or triton")
    return spans(q.shape[2], k.shape[2], causal, window, cu_seqlens)


# ---- two: softmax of a row that comes in pieces --------------------------------------------------------------------

def safe_softmax(x):
    """e^(x_j - m) / Σ e^(x_i - m) over the last axis, m = max x, so none is above 1. Max, sum, quotient: 3 passes."""
    e = torch.exp(x - x.amax(dim=-1, keepdim=True))
    return e / e.sum(dim=-1, keepdim=True)


def online_softmax(x):
    """The same with m and the sum l in one pass ([3] Algorithm 3; x[..., 0] must be finite): when a larger number
    comes, the sum so far, relative to the old maximum, is rescaled: m' = max(m, x_j), l' = l e^(m - m') + e^(x_j - m').
    """
    m, l = torch.full_like(x[..., 0], -math.inf), torch.zeros_like(x[..., 0])
    for x_j in x.unbind(dim=-1):
        m_new = torch.maximum(m, x_j)
        l = l * torch.exp(m - m_new) + torch.exp(x_j - m_new)
        m = m_new
    return torch.exp(x - m[..., None]) / l[..., None]


def merge(o1, lse1, o2, lse2):
    """Attention over two sets of keys from that over each: o (..., D), and lse (...), log of the sum of exponentials.

    Each output is the average under its own keys' weights; they count as their sums do: lse = log(e^lse1 + e^lse2),
    o = o1 e^(lse1 - lse) + o2 e^(lse2 - lse). A side without keys has lse = -inf.
    """
    none = (lse1 == -math.inf) & (lse2 == -math.inf)  # -inf - -inf would be NaN, here and in logaddexp's gradient
    lse = torch.logaddexp(lse1.masked_fill(none, 0), lse2.masked_fill(none, 0))
    o = o1 * torch.exp(lse1 - lse)[..., None] + o2 * torch.exp(lse2 - lse)[..., None]
    return o, lse.masked_fill(none, -math.inf)


def add_tile(o, m, l, s, v):
    """[1] Algorithm 1, lines 9 and 10: take in scores s (rows, columns) of a tile's keys and their values v
    (columns, D).

    o (rows, D) is a sum with weights e^(s - m) that add up to l (rows, 1); it is divided once, after the last tile.
    (Line 10 as printed divides by the rescale e^(m - m_new), a slip.) In the first tile each row needs a finite score,
    else -inf - -inf is NaN.
    """
    m_new = torch.maximum(m, s.amax(dim=-1, keepdim=True))
    p, old = torch.exp(s - m_new), torch.exp(m - m_new)  # (rows, columns), (rows, 1)
    return o * old + p @ v, m_new, l * old + p.sum(dim=-1, keepdim=True)


def attention_in_tiles(q, k, v, columns):
    """softmax(q kᵀ / √D) v of a head, q (T_q, D), k and v (T_k, D), and LSE (T_q,), T_q × columns scores at once."""
    o, m, l = torch.zeros_like(q), torch.full_like(q[:, :1], -math.inf), torch.zeros_like(q[:, :1])
    for k_j, v_j in zip(k.split(columns), v.split(columns)):
        o, m, l = add_tile(o, m, l, q @ k_j.T / math.sqrt(q.shape[1]), v_j)
    return o / l, (m + l.log()).squeeze(1)


# ---- three: tiles, and attention with them in plain PyTorch --------------------------------------------------------

# A tile of scores is HEADS × ROWS × COLUMNS (a group of queries is never cut): 2 MB in fp32, so that all passes over it
# find it in the cache.
HEADS, ROWS, COLUMNS = 8, 256, 256
NOTHING = -1e30  # a row's maximum before any key; finite, since -inf - -inf is NaN


def tile_map(lo, hi, rows, columns):
    """[(i0, i1, [(j0, j1, full), ...]), ...]: tiles that hold something, by rows; in a full one nothing is masked.

    Spans only move forward, so a tile's first and last row say all about it. What isn't listed costs nothing: half of
    the work if causal ([1] §3.1.1), nearly all of it under a window.
    """
    lo, hi, found = lo.tolist(), hi.tolist(), []
    for i0 in range(0, len(lo), rows):
        i1 = min(i0 + rows, len(lo))
        tiles = [(j0, min(j0 + columns, hi[-1])) for j0 in range(lo[i0] // columns * columns, hi[i1 - 1], columns)]
        found.append((i0, i1, [(j0, j1, lo[i1 - 1] <= j0 and j1 <= hi[i0]) for j0, j1 in tiles]))
    return found


def transpose(lo, hi, T_k):
    """The queries [lo, hi) that attend to each key, from the keys that each query attends to."""
    j = torch.arange(T_k)
    return torch.searchsorted(hi, j, right=True), torch.searchsorted(lo, j, right=True)


def hide(s, lo, hi, i0, i1, j0, j1):
    """Add -inf to the scores s (N, G · rows, columns) outside the spans."""
    j = torch.arange(j0, j1, device=s.device)
    seen = (lo[i0:i1, None] <= j) & (j < hi[i0:i1, None])  # (rows, columns)
    s.view(len(s), -1, *seen.shape).add_(torch.where(seen, 0.0, -math.inf))


def fold(t, G):
    """(B, H, T, ...) to (B · H_kv, G, T, ...): the G heads that share keys become rows of one product."""
    return t.reshape(t.shape[0] * t.shape[1] // G, G, *t.shape[2:])


def tiled_forward(q, k, v, lo, hi, scale):
    """Output and LSE: add_tile, for some heads at once and in place. 2^x is cheaper than e^x, so that
    log2 e goes into q once a tile, together with the scale."""
    G, exact = q.shape[1] // k.shape[1], torch.promote_types(q.dtype, torch.float32)
    o, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=exact)
    Q, O, LSE, K, V = fold(q, G), fold(o, G), fold(lse, G), k.flatten(0, 1), v.flatten(0, 1)
    plan, lo, hi = tile_map(lo, hi, ROWS, COLUMNS), lo.to(q.device), hi.to(q.device)
    heads = max(1, HEADS // G)
    buffer = q.new_empty(min(heads, len(K)) * G * min(ROWS, Q.shape[2]) * min(COLUMNS, K.shape[1]), dtype=exact)
    for n in (slice(start, start + heads) for start in range(0, len(K), heads)):
        for i0, i1, tiles in plan:
            q_i = (Q[n, :, i0:i1].to(exact) * (scale * LOG2E)).flatten(1, 2)  # (N, G · rows, D)
            o_i, l = torch.zeros_like(q_i), torch.zeros_like(q_i[..., :1])
            m = torch.full_like(l, NOTHING)  # (N, G · rows, 1)
            for j0, j1, full in tiles:
                k_j, v_j = K[n, j0:j1].to(exact), V[n, j0:j1].to(exact)  # (N, columns, D)
                shape = (*q_i.shape[:2], j1 - j0)
                s = torch.bmm(q_i, k_j.mT, out=buffer[:math.prod(shape)].view(shape))
                if not full:
                    hide(s, lo, hi, i0, i1, j0, j1)
                m_new = torch.maximum(m, s.amax(dim=-1, keepdim=True))
                p, old = s.sub_(m_new).exp2_(), torch.exp2(m - m_new)  # [1] Algorithm 1, line 9
                m, l = m_new, l * old + p.sum(dim=-1, keepdim=True)
                o_i.mul_(old).baddbmm_(p, v_j)  # line 10
            O[n, :, i0:i1] = (o_i / l.masked_fill(l == 0, 1)).view(O[n, :, i0:i1].shape)  # line 12; no keys: 0
            LSE[n, :, i0:i1] = ((m + l.log2()) / LOG2E).view(LSE[n, :, i0:i1].shape)  # line 13; no keys: -inf
    return o, lse


def tiled_backward(q, k, v, o, lse, do, dlse, lo, hi, scale):
    """Gradients dq, dk, dv ([1] Algorithm 2). P = e^(S - LSE) is computed again from LSE; softmax's gradient
    dS = P ∘ (dP - D) needs D = rowsum(P ∘ dP), which is rowsum(dO ∘ O): so a tile needs these two numbers of a row.

    -LSE and -D come in as what baddbmm adds to. A gradient dlse of LSE itself adds P · dlse to dS.
    """
    G, exact = q.shape[1] // k.shape[1], torch.promote_types(q.dtype, torch.float32)
    D = torch.cat([(a.to(exact) * b.to(exact)).sum(dim=-1)  # line 4: (B, H, T_q); at once it would take O's memory
                   for a, b in zip(do.split(ROWS, dim=2), o.split(ROWS, dim=2))], dim=2)
    minus_D = fold(dlse - D, G)[..., None]  # (B · H_kv, G, T_q, 1)
    minus_lse = fold(lse * -LOG2E, G)[..., None]
    minus_lse = minus_lse.masked_fill(minus_lse == math.inf, 0)  # no keys: all of the row's scores are -inf
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    Q, DO, DQ = fold(q, G), fold(do.contiguous(), G), fold(dq, G)
    K, V, DK, DV = (t.flatten(0, 1) for t in (k, v, dk, dv))
    plan, lo, hi = tile_map(*transpose(lo, hi, k.shape[2]), COLUMNS, ROWS), lo.to(q.device), hi.to(q.device)
    heads = max(1, HEADS // G)
    buffers = [q.new_empty(min(heads, len(K)) * G * min(ROWS, Q.shape[2]) * min(COLUMNS, K.shape[1]), dtype=exact)
               for _ in range(2)]
    for n in (slice(start, start + heads) for start in range(0, len(K), heads)):
        # accumulators are contiguous, else baddbmm_ would go head by head
        dq_tiles = [t.new_zeros(t.shape, dtype=exact).flatten(1, 2) for t in Q[n].split(ROWS, dim=2)]
        for j0, j1, tiles in plan:
            k_j, v_j = K[n, j0:j1].to(exact) * (scale * LOG2E), V[n, j0:j1].to(exact)  # (N, columns, D)
            dk_j, dv_j = k_j.new_zeros(k_j.shape), k_j.new_zeros(k_j.shape)
            for i0, i1, full in tiles:
                q_i, do_i, minus_lse_i, minus_D_i = (  # (N, G · rows, D), the last two (N, G · rows, 1)
                    t[n, :, i0:i1].to(exact).flatten(1, 2) for t in (Q, DO, minus_lse, minus_D))
                shape = (*q_i.shape[:2], j1 - j0)
                p, ds = (buffer[:math.prod(shape)].view(shape) for buffer in buffers)
                torch.baddbmm(minus_lse_i, q_i, k_j.mT, out=p)
                if not full:
                    hide(p, lo, hi, i0, i1, j0, j1)
                p.exp2_()  # line 11
                dv_j.baddbmm_(p.mT, do_i)  # line 12
                torch.baddbmm(minus_D_i, do_i, v_j.mT, out=ds).mul_(p)  # lines 13 and 14
                dq_tiles[i0 // ROWS].baddbmm_(ds, k_j)  # line 15
                dk_j.baddbmm_(ds.mT, q_i)  # line 16
            DK[n, j0:j1], DV[n, j0:j1] = dk_j * scale, dv_j
        for dq_i, target in zip(dq_tiles, DQ[n].split(ROWS, dim=2)):
            target.copy_((dq_i / LOG2E).view(target.shape))  # the scale came with k_j
    return dq, dk, dv


class FlashAttention(torch.autograd.Function):
    """Attention that keeps its inputs, its output and LSE (B, H, T_q) for the backward pass."""

    @staticmethod
    def forward(ctx, q, k, v, lo, hi, scale, backend):
        compute = triton_forward if backend == "triton" else tiled_forward
        with torch.autocast(q.device.type, enabled=False):  # it would turn fp32 tiles into bfloat16
            o, lse = compute(q, k, v, lo, hi, scale)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.mask, ctx.scale, ctx.backend = (lo, hi), scale, backend
        return o, lse

    @staticmethod
    def backward(ctx, do, dlse):
        if torch.is_grad_enabled():  # once_differentiable would let pass what do doesn't depend on, as a constant
            raise RuntimeError("flash_attention has no second derivative: take attention, or no create_graph")
        compute = triton_backward if ctx.backend == "triton" else tiled_backward
        with torch.autocast(do.device.type, enabled=False):
            return *compute(*ctx.saved_tensors, do, dlse, *ctx.mask, ctx.scale), None, None, None, None


def flash_attention(q, k, v, causal=False, window=None, scale=None, backend="auto", cu_seqlens=None,
                    return_lse=False):
    """What attention() computes, without its T × T matrices: (B, H, T_q, D); with return_lse also LSE (B, H, T_q).

    For causal, window and cu_seqlens see spans(); scale None: 1 / √D. backend torch: any device, float64 to float16.
    triton: a card, float32, bfloat16, float16, D from 16 to 128; auto: triton where that holds, else torch.
    """
    lo, hi = check(q, k, v, causal, window, cu_seqlens, backend)
    if backend == "auto":
        backend = "triton" if q.is_cuda and not triton_lacks(q) else "torch"
    elif backend == "triton" and triton_lacks(q):
        raise UserError(f"backend triton: {triton_lacks(q)}")
    o, lse = FlashAttention.apply(q, k, v, lo, hi, q.shape[3] ** -0.5 if scale is None else scale, backend)
    return (o, lse) if return_lse else o


# ---- four: the same as Triton kernels ------------------------------------------------------------------------------

# A kernel runs once for each cell of a grid, as a "program" told its place by tl.program_id. Capitals (Q, LO) are
# pointers, tl.constexpr arguments are fixed when it is compiled, which is at its first launch. Until load_triton has
# wrapped them, these are plain functions and tl is a stand-in. Kernels can't read a plain number among Python's
# globals: 0.6931471805599453 is ln 2, 1 / LOG2E.
tl = types.SimpleNamespace(constexpr="constexpr")


def load_tile(X, h, t, T, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows t of head h of X (heads, T, D), zeros outside: (len(t), BLOCK_D)."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(X + h.to(tl.int64) * T * D + t[:, None] * D + d, mask=(t[:, None] < T) & (d < D), other=0.0)


def store_tile(X, x, h, t, T, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write x (len(t), BLOCK_D) to rows t of head h of X (heads, T, D)."""
    d = tl.arange(0, BLOCK_D)
    at = X + h.to(tl.int64) * T * D + t[:, None] * D + d
    tl.store(at, x.to(X.dtype.element_ty), mask=(t[:, None] < T) & (d < D))


def parts(LO, HI, first, last, SIZE: tl.constexpr):
    """For rows first to last, four places along the keys: tiles of SIZE from start to full are cut by the mask's start,
    from full to cut they are whole, from cut to stop cut by its end; tile_map in other words."""
    start, stop = tl.load(LO + first) // SIZE * SIZE, tl.load(HI + last)
    full = tl.cdiv(tl.load(LO + last), SIZE) * SIZE
    cut = tl.maximum(tl.load(HI + first) // SIZE * SIZE, full)
    return start, full, cut, stop


def forward_kernel(Q, K, V, O, LSE, LO, HI, scale, T_q, T_k, G, D: tl.constexpr, BLOCK_D: tl.constexpr,
                   ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[1] Algorithm 1: a program makes the output of ROWS queries of a head. The scale has log2 e in it."""
    h, first = tl.program_id(0), tl.program_id(1) * ROWS
    i = first + tl.arange(0, ROWS)
    lo, hi = tl.load(LO + i, mask=i < T_q, other=0), tl.load(HI + i, mask=i < T_q, other=0)
    start, full, cut, stop = parts(LO, HI, first, tl.minimum(first + ROWS, T_q) - 1, COLUMNS)
    q = load_tile(Q, h, i, T_q, D, BLOCK_D)
    m = tl.full([ROWS], -1e30, tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    o = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for part in tl.static_range(3):  # only the first and the last part have to look at the mask
        begin, end = (start, tl.minimum(full, stop)) if part == 0 else (full, cut) if part == 1 else (cut, stop)
        for j0 in range(begin, end, COLUMNS):
            j = j0 + tl.arange(0, COLUMNS)
            k, v = load_tile(K, h // G, j, T_k, D, BLOCK_D), load_tile(V, h // G, j, T_k, D, BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # (ROWS, COLUMNS)
            if part != 1:
                s = tl.where((lo[:, None] <= j) & (j < hi[:, None]), s, -float("inf"))
            m_new = tl.maximum(m, tl.max(s, axis=1))
            p, old = tl.exp2(s - m_new[:, None]), tl.exp2(m - m_new)
            l, m = l * old + tl.sum(p, axis=1), m_new
            o = o * old[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    some = l > 0
    store_tile(O, o / tl.where(some, l, 1.0)[:, None], h, i, T_q, D, BLOCK_D)
    lse = tl.where(some, (m + tl.log2(tl.where(some, l, 1.0))) * 0.6931471805599453, -float("inf"))
    tl.store(LSE + h.to(tl.int64) * T_q + i, lse, mask=i < T_q)


def backward_tile(q, k, v, do, lse, delta, lo, hi, j, scale, MASKED: tl.constexpr):
    """P and dS = P ∘ (dP - D) of a tile ([1] Algorithm 2, lines 11, 13, 14): (rows of q, rows of k)."""
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale - lse[:, None])
    if MASKED:
        p = tl.where((lo[:, None] <= j) & (j < hi[:, None]), p, 0.0)
    return p, p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])


def dq_kernel(Q, K, V, DO, LSE, DELTA, DQ, LO, HI, scale, T_q, T_k, G, D: tl.constexpr, BLOCK_D: tl.constexpr,
              ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A program makes dQ of ROWS queries of a head."""
    h, first = tl.program_id(0), tl.program_id(1) * ROWS
    i = first + tl.arange(0, ROWS)
    lo, hi = tl.load(LO + i, mask=i < T_q, other=0), tl.load(HI + i, mask=i < T_q, other=0)
    start, full, cut, stop = parts(LO, HI, first, tl.minimum(first + ROWS, T_q) - 1, COLUMNS)
    q, do = load_tile(Q, h, i, T_q, D, BLOCK_D), load_tile(DO, h, i, T_q, D, BLOCK_D)
    at = h.to(tl.int64) * T_q + i
    lse, delta = tl.load(LSE + at, mask=i < T_q, other=0), tl.load(DELTA + at, mask=i < T_q, other=0)
    dq = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for part in tl.static_range(3):
        begin, end = (start, tl.minimum(full, stop)) if part == 0 else (full, cut) if part == 1 else (cut, stop)
        for j0 in range(begin, end, COLUMNS):
            j = j0 + tl.arange(0, COLUMNS)
            k, v = load_tile(K, h // G, j, T_k, D, BLOCK_D), load_tile(V, h // G, j, T_k, D, BLOCK_D)
            p, ds = backward_tile(q, k, v, do, lse, delta, lo, hi, j, scale, part != 1)
            dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")  # line 15
    store_tile(DQ, dq * (scale * 0.6931471805599453), h, i, T_q, D, BLOCK_D)


def dkdv_kernel(Q, K, V, DO, LSE, DELTA, DK, DV, LO, HI, ROW_LO, ROW_HI, scale, T_q, T_k, G, D: tl.constexpr,
                BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A program makes dK and dV of COLUMNS keys, from all query heads that share them; no two write to one place."""
    h, first = tl.program_id(0), tl.program_id(1) * COLUMNS
    j = first + tl.arange(0, COLUMNS)
    start, full, cut, stop = parts(ROW_LO, ROW_HI, first, tl.minimum(first + COLUMNS, T_k) - 1, ROWS)
    k, v = load_tile(K, h, j, T_k, D, BLOCK_D), load_tile(V, h, j, T_k, D, BLOCK_D)
    dk, dv = tl.zeros([COLUMNS, BLOCK_D], tl.float32), tl.zeros([COLUMNS, BLOCK_D], tl.float32)
    for shared in range(G):
        g = h * G + shared
        for part in tl.static_range(3):
            begin, end = (start, tl.minimum(full, stop)) if part == 0 else (full, cut) if part == 1 else (cut, stop)
            for i0 in range(begin, end, ROWS):
                i = i0 + tl.arange(0, ROWS)
                q, do = load_tile(Q, g, i, T_q, D, BLOCK_D), load_tile(DO, g, i, T_q, D, BLOCK_D)
                lo, hi = tl.load(LO + i, mask=i < T_q, other=0), tl.load(HI + i, mask=i < T_q, other=0)
                at = g.to(tl.int64) * T_q + i
                lse, delta = tl.load(LSE + at, mask=i < T_q, other=0), tl.load(DELTA + at, mask=i < T_q, other=0)
                p, ds = backward_tile(q, k, v, do, lse, delta, lo, hi, j, scale, part != 1)
                dv += tl.dot(tl.trans(p.to(do.dtype)), do, input_precision="ieee")  # line 12
                dk += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision="ieee")  # line 16
    store_tile(DK, dk * (scale * 0.6931471805599453), h, j, T_k, D, BLOCK_D)
    store_tile(DV, dv, h, j, T_k, D, BLOCK_D)


def triton_lacks(q):
    """Why the Triton backend can't take q, in words; None if it can."""
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not 16 <= q.shape[3] <= 128:
        return f"{q.dtype} with D {q.shape[3]}: want float32, bfloat16 or float16, and D from 16 to 128"
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"{q.device} is no card: want backend torch (or TRITON_INTERPRET=1 to try the kernels out, slowly)"
    try:
        load_triton()
    except ImportError as error:
        return f"{error}: pip install triton"


def load_triton():
    """Import Triton and wrap the kernels, once."""
    global tl
    if isinstance(tl, types.SimpleNamespace):
        import triton
        import triton.language
        tl = triton.language
        for f in (load_tile, store_tile, parts, forward_kernel, backward_tile, dq_kernel, dkdv_kernel):
            globals()[f.__name__] = triton.jit(f)


def triton_settings(q, k):
    """What all three kernels take: T_q, T_k, G, D, and D as a power of two; and the sizes of tiles, not yet tuned."""
    D = q.shape[3]
    side = 64 if q.element_size() == 2 else 32
    sizes = dict(ROWS=side, COLUMNS=side, num_warps=4)
    return (q.shape[2], k.shape[2], q.shape[1] // k.shape[1], D, max(16, 1 << (D - 1).bit_length())), sizes


def on_device(t):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def triton_forward(q, k, v, lo, hi, scale):
    """Output and LSE, as tiled_forward."""
    if not q.is_cuda and q.dtype == torch.bfloat16:  # the interpreter's dot of bfloat16 is garbage
        o, lse = triton_forward(q.float(), k.float(), v.float(), lo, hi, scale)
        return o.to(q.dtype), lse
    (q, k, v), (numbers, sizes) = (t.contiguous() for t in (q, k, v)), triton_settings(q, k)
    o, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    lo, hi = (t.to(q.device, torch.int32) for t in (lo, hi))
    if o.numel():
        grid = q.shape[0] * q.shape[1], -(-q.shape[2] // sizes["ROWS"])  # the second may be 65,535 at most
        with on_device(q):
            forward_kernel[grid](q, k, v, o, lse, lo, hi, scale * LOG2E, *numbers, **sizes)
    return o, lse


def triton_backward(q, k, v, o, lse, do, dlse, lo, hi, scale):
    """Gradients dq, dk, dv, as tiled_backward."""
    if not q.is_cuda and q.dtype == torch.bfloat16:
        grads = triton_backward(*(t.float() for t in (q, k, v, o, lse, do, dlse)), lo, hi, scale)
        return [t.to(q.dtype) for t in grads]
    (q, k, v, do), (numbers, sizes) = (t.contiguous() for t in (q, k, v, do)), triton_settings(q, k)
    dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
    delta = (do.float() * o).sum(dim=-1) - dlse  # (B, H, T_q): [1]'s D, less a gradient of LSE, as in tiled_backward
    lse = lse.masked_fill(lse == -math.inf, 0) * LOG2E
    lo, hi, row_lo, row_hi = (t.to(q.device, torch.int32) for t in (lo, hi, *transpose(lo, hi, k.shape[2])))
    inputs = q, k, v, do, lse, delta
    if q.numel():
        grid = q.shape[0] * q.shape[1], -(-q.shape[2] // sizes["ROWS"])
        with on_device(q):
            dq_kernel[grid](*inputs, dq, lo, hi, scale * LOG2E, *numbers, **sizes)
    if k.numel():
        grid = k.shape[0] * k.shape[1], -(-k.shape[2] // sizes["COLUMNS"])
        with on_device(q):
            dkdv_kernel[grid](*inputs, dk, dv, lo, hi, row_lo, row_hi, scale * LOG2E, *numbers, **sizes)
    return dq, dk, dv


# ---- five: a Transformer with it, and a task that needs to look far back -------------------------------------------

class RetrievalBlock(nn.Module):
    """x + attention, then + MLP. Queries and keys share a projection, and a key is the previous token's, so that a
    token attends to what followed its like; no positions are needed."""

    def __init__(self, C, n_head, attend):
        super().__init__()
        self.n_head, self.attend = n_head, attend
        self.norm1, self.qv, self.proj = nn.LayerNorm(C), nn.Linear(C, 2 * C, bias=False), nn.Linear(C, C, bias=False)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(C), nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x):
        B, T, C = x.shape
        q, v = self.qv(self.norm1(x)).view(B, T, 2, self.n_head, -1).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        k = F.pad(q, (0, 0, 1, 0))[:, :, :-1]  # (B, H, T, D): one token later, the first is 0
        x = x + self.proj(self.attend(q, k, v).transpose(1, 2).reshape(B, T, C))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class RetrievalModel(nn.Module):
    """Tokens (B, T) to logits (B, T / 4, n_values) of what follows each key asked. attend(q, k, v) is attention."""

    def __init__(self, attend, n_keys, n_values, n_layer, n_head, n_embd):
        super().__init__()
        self.embed = nn.Embedding(n_keys + n_values, n_embd)
        self.blocks = nn.ModuleList(RetrievalBlock(n_embd, n_head, attend) for _ in range(n_layer))
        self.norm, self.head = nn.LayerNorm(n_embd), nn.Linear(n_embd, n_values)

    def forward(self, idx):
        x = self.embed(idx)  # (B, T, C)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, idx.shape[1] // 2::2]))  # of the second half every other token: the keys asked


def retrieval_batch(seed, B, T, n_values):
    """Tokens idx (B, T) and answers (B, T / 4), a function of the seed: T / 4 keys, out of T / 2, with a random value
    each, then the same pairs in another order. An answer is T / 2 tokens back on average. Keys are numbered first."""
    rng, n = np.random.default_rng(seed), T // 4
    keys = rng.permuted(np.tile(np.arange(2 * n), (B, 1)), axis=1)[:, :n]  # (B, n)
    pairs = np.stack((keys, 2 * n + rng.integers(n_values, size=(B, n))), axis=2)  # (B, n, 2)
    asked = rng.permuted(np.tile(np.arange(n), (B, 1)), axis=1)  # (B, n)
    again = np.take_along_axis(pairs, asked[:, :, None], axis=1)  # (B, n, 2)
    idx = np.concatenate((pairs, again), axis=1).reshape(B, T)
    return torch.from_numpy(idx), torch.from_numpy(again[:, :, 1] - 2 * n)


def choose_attention(c):
    """Causal attention (q, k, v) -> (B, H, T, D) as --backend and --window say."""
    f = attention if c.backend == "naive" else functools.partial(flash_attention, backend=c.backend)
    return functools.partial(f, causal=True, window=c.window)


def step_with(attend, model, x, y, autocast):
    """Loss, gradients, and the MB that the forward pass keeps for the backward pass, with attend as its attention."""
    kept, weights = {}, {p.data_ptr() for p in model.parameters()}

    def keep(t):
        if t.untyped_storage().data_ptr() not in weights:  # they are there anyhow
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    for block in model.blocks:
        block.attend = attend
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), autocast:
        loss = F.cross_entropy(model(x).float().flatten(0, 1), y.flatten())
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return loss.item(), grads, sum(kept.values()) / 2**20


# ---- schedule, files and errors ------------------------------------------------------------------------------------

def learning_rate(step, peak, warmup, steps, floor=0.0):
    """Linear warm-up to peak, then half a cosine down to floor · peak after the last step (arXiv 1608.03983 eq. 5)."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


@contextlib.contextmanager
def one_line(message, status=2):
    """Turn whatever a broken file, disk or network raises inside into one line for the user."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{message} ({type(error).__name__}: {' '.join(str(error).split())[:300]})", status) from error


def write_atomic(path, *content):
    """Write bytes, or a checkpoint's dict, under another name, then rename: path holds the old content or the new."""
    temporary = Path(f"{path}.tmp")
    try:
        with one_line(f"can't write {path}, what was there is kept", status=1):
            with open(temporary, "wb") as file:
                torch.save(content[0], file) if isinstance(content[0], dict) else file.writelines(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # a disk that can't be written has its own message above
            temporary.unlink()


def load_checkpoint(path):
    """The dict that a run saved. weights_only: nothing is unpickled but tensors and plain values."""
    with one_line(f"{path} is not a checkpoint of this script"):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        saved["model"], saved["model_config"], {**saved["config"]}, saved["step"]  # KeyError, TypeError: not ours
    return saved


def round_ticks(low, high):
    """Some round numbers from low or just below to high or just above, 1, 2 or 5 · 10^n apart, two to eight."""
    least = (high - low if high - low > 1e-9 * abs(high) else abs(high) or 1) / 5  # less is rounding
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= least)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [step * i for i in range(first, max(last, first + 1) + 1)]


def curves_svg(path, series, x_label, y_label):
    """A chart of {name: [(x, y), ...]}; the names stand beside it in their lines' colours."""
    xs, ys = (round_ticks(min(v), max(v)) for v in zip(*(p for line in series.values() for p in line)))

    def at(x, y):
        return 550 * (x - xs[0]) / (xs[-1] - xs[0]), 320 * (ys[-1] - y) / (ys[-1] - ys[0])

    svg = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="-70 -30 790 400" font-family="sans-serif" font-size="12">'
           '<rect x="-70" y="-30" width="790" height="400" fill="white"/>'
           f'<text x="275" y="362" text-anchor="middle">{x_label}</text><text x="-62" y="-14">{y_label}</text>']
    for y in ys:
        svg.append(f'<path d="M0 {at(0, y)[1]:.1f}h550" stroke="#ddd"/>'
                   f'<text x="-8" y="{at(0, y)[1] + 4:.1f}" text-anchor="end">{y:.6g}</text>')
    svg += [f'<text x="{at(x, 0)[0]:.1f}" y="340" text-anchor="middle">{x:.6g}</text>' for x in xs]
    for i, (name, line) in enumerate(series.items()):
        colour = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")[i % 6]
        points = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in line)
        svg.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
                   f'<text x="560" y="{20 + 16 * i}" fill="{colour}">{name}</text>')
    write_atomic(path, "\n".join([*svg, "</svg>"]).encode())


class RunFolder:
    """A run's rows, step, best accuracy and seconds, and the folder that keeps them; only one process writes."""

    def __init__(self, c, saved, writes):
        self.c, self.writes, self.out = c, writes, Path(c.out)
        self.step, self.best, self.seconds, self.rows = 0, -math.inf, 0.0, []
        if saved:
            vars(self).update({name: saved[name] for name in ("step", "best", "seconds", "rows")})
        if writes:
            with one_line(f"can't make the folder {self.out}", status=1):
                self.out.mkdir(parents=True, exist_ok=True)
            lines = "".join(json.dumps(row) + "\n" for row in self.rows)  # without what came after the checkpoint
            for name, text in (("config.json", json.dumps(dataclasses.asdict(c), indent=2)), ("log.jsonl", lines)):
                write_atomic(self.out / name, text.encode())

    def check(self, name, value, step):
        if not math.isfinite(value):
            raise UserError(f"{name} is {value} at step {step}: lower --lr; {self.out} keeps the last checkpoint", 1)

    def log(self, line, **row):
        """A line for people, and a row for log.jsonl and the curves."""
        self.rows.append({"step": self.step, **row})
        if self.writes:
            print(line, flush=True)
            with one_line(f"can't write {self.out}/log.jsonl", status=1), open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")

    def draw(self, y_label, **keys):
        """curves.svg: for each name=key of which rows have the key, a line called name."""
        lines = {name: [(row["step"], row[key]) for row in self.rows if key in row] for name, key in keys.items()}
        if self.writes and any(lines.values()):
            curves_svg(self.out / "curves.svg", {k: v for k, v in lines.items() if v}, "step", y_label)

    def save(self, name, model, **more):
        """A checkpoint of the model and what else is to be kept; its random state is config's seed and the step."""
        if self.writes:
            self.check("a parameter", sum(p.detach().sum() for p in model.parameters()).item(), self.step)
            write_atomic(self.out / name, dict(model=model.state_dict(), config=dataclasses.asdict(self.c), **more,
                                               step=self.step, best=self.best, seconds=self.seconds, rows=self.rows))


def pick_device(name, dtype, units="amx_bf16"):
    """The device and the type to compute in, "auto" resolved. Raises ValueError if it is not here.

    units: what a CPU needs for bfloat16 to be the faster: with avx512_bf16 only large products gain, small ones lose.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    with one_line(f"--device {name} is not here"):
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.zeros(1, device=device).item()
    if device.type == "mps" and int(os.environ.get("WORLD_SIZE", 1)) > 1:  # gloo can't move its tensors
        raise UserError("several processes can't share work on mps: add --device cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where fp32 is left
    if dtype == "auto":  # a CPU without such units is many times slower in bfloat16
        fast = (device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
                or device.type == "cpu" and getattr(torch.cpu, "get_capabilities", dict)().get(units, False))
        dtype = "bfloat16" if fast else "float32"
    dtype = getattr(torch, dtype)
    return device, dtype, torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def peak_mb(device):
    """The most memory that was in use: the card's, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(ImportError):  # Windows has no such module
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return math.nan


# ---- evaluate, train -----------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, c, split, autocast, device, batches=4):
    """Mean loss and accuracy on sequences of their own: split 1 for validation, 2 for the test."""
    loss = right = 0.0
    for i in range(batches):
        x, y = (t.to(device) for t in retrieval_batch((c.seed, split, i), 2, c.block_size, c.n_values))
        with autocast:
            logits = model(x).float()  # (B, T / 4, n_values)
        loss += F.cross_entropy(logits.flatten(0, 1), y.flatten()).item() / batches
        right += (logits.argmax(dim=2) == y).sum().item() / y.numel() / batches
    return loss, right


def train(c, interrupts=()):
    """Train as the Config c says, into the folder c.out, until interrupts has something in it; returns the status."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("flash_attn.py trains in one process: start it with python, not torchrun")
    device, dtype, autocast = pick_device(c.device, c.dtype)
    lack = triton_lacks(torch.empty(1, 1, 1, c.n_embd // c.n_head, device=device, dtype=dtype))
    if c.backend == "triton" and lack:
        raise UserError(f"--backend triton: {lack}")
    torch.manual_seed(c.seed)
    settings = dict(n_keys=c.block_size // 2) | {
        name: getattr(c, name) for name in ("n_values", "n_layer", "n_head", "n_embd")}
    attend = choose_attention(c)
    model = RetrievalModel(torch.compiler.disable(attend) if c.compile else attend, **settings).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), c.lr, betas=(0.9, 0.98), weight_decay=0.0)
    saved = load_checkpoint(f"{c.out}/ckpt.pt") if c.resume else None
    if saved:
        with one_line(f"{c.out}/ckpt.pt can't be resumed"):
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
    run, compiled = RunFolder(c, saved, writes=True), torch.compile(model) if c.compile else model
    print(" ".join(f"{name}={value!r}" for name, value in dataclasses.asdict(c).items()))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters | {c.steps} steps of {c.batch_size} sequences "
          f"of {c.block_size} tokens | {device} {dtype}")
    if c.backend == "auto" and device.type == "cuda" and lack:
        print(f"attention in plain PyTorch: {lack}")

    def save(name):
        run.save(name, model, model_config=settings, optimizer=optimizer.state_dict())

    resumed_at, end = run.step if saved else None, min(c.steps, c.stop_at or c.steps)
    clock, logged, pending = time.perf_counter(), run.seconds, []
    while True:
        due, stop = (run.step % c.eval_every == 0 or run.step == end) and run.step != resumed_at, len(interrupts) > 0
        if pending and (due or stop or run.step % c.log_every == 0):
            losses = torch.stack(pending).tolist()  # this waits for the device
            run.seconds, clock = run.seconds + time.perf_counter() - clock, time.perf_counter()
            for i, loss in enumerate(losses):
                run.check("loss", loss, run.step - len(losses) + i)
            loss, ms = sum(losses) / len(losses), 1e3 * (run.seconds - logged) / len(losses)
            lr = optimizer.param_groups[0]["lr"]
            rate, logged, pending = 1e3 * c.batch_size * c.block_size / ms, run.seconds, []
            run.log(f"step {run.step}/{c.steps} | loss {loss:.4f} | lr {lr:.1e} | {ms:.1f} ms | {rate:.0f} tokens/s",
                    loss=loss, lr=lr, ms=ms, seconds=run.seconds, tokens_per_s=rate)
        if due:
            loss, accuracy = evaluate(compiled, c, 1, autocast, device)
            run.check("val_loss", loss, run.step)
            run.log(f"step {run.step}/{c.steps} | val loss {loss:.4f} | val accuracy {accuracy:.4f}",
                    seconds=run.seconds, val_loss=loss, val_accuracy=accuracy)
            if accuracy > run.best:
                run.best = accuracy
                save("best.pt")
            run.draw("loss", train="loss", val="val_loss")
        if due or stop:
            save("ckpt.pt")
            clock = time.perf_counter()
        if run.step >= end or stop:
            break
        x, y = (t.to(device) for t in retrieval_batch((c.seed, 0, run.step), c.batch_size, c.block_size, c.n_values))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.step, c.lr, c.warmup, c.steps)
        with autocast:
            logits = compiled(x)  # (B, T / 4, n_values)
        loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pending.append(loss.detach())
        run.step += 1
    if stop:
        print(f"stopped after step {run.step}; to go on: python flash_attn.py --resume --out {c.out}")
        return 130
    test_and_compare(run, model, c, autocast, device)
    return 0


def test_and_compare(run, model, c, autocast, device):
    """Test the best weights, once; set a step with flash_attention beside one with attention, where its matrices fit
    into half of free memory; write the last row."""
    memory = peak_mb(device)  # before attention adds to it
    model.load_state_dict(load_checkpoint(run.out / "best.pt")["model"])
    loss, accuracy = evaluate(model, c, 2, autocast, device)
    beside, matrices = {}, (2 * c.n_layer + 3) * 4 * c.n_head * c.block_size**2  # two of each layer are kept
    if matrices > free_bytes(device) / 2:
        print(f"no step with attention beside one with flash_attention: it takes {matrices / 2**30:.0f} GB")
    else:
        x, y = (t.to(device) for t in retrieval_batch((c.seed, 2, 0), 1, c.block_size, c.n_values))
        flash, naive = (step_with(choose_attention(dataclasses.replace(c, backend=b)), model, x, y, autocast)
                        for b in ("auto" if c.backend == "naive" else c.backend, "naive"))
        apart = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(flash[1], naive[1]))
        beside = dict(kept_mb=flash[2], kept_naive_mb=naive[2], gradients_apart=apart)
        print(f"a sequence with flash_attention, and with attention: loss {flash[0]:.6f}, {naive[0]:.6f} | gradients "
              f"{apart:.1e} of their largest apart | kept for the backward pass {flash[2]:.1f} MB, {naive[2]:.1f} MB")
    run.log(f"test loss {loss:.4f} | test accuracy {accuracy:.4f} | {run.seconds:.0f} s of training | "
            f"peak {memory:.0f} MB", seconds=run.seconds, test_loss=loss, test_accuracy=accuracy, **beside, final=True,
            peak_mb=memory)


# ---- bench and tile map --------------------------------------------------------------------------------------------

def flops(lo, hi, H, D, backward=False):
    """Floating-point operations: two products of 2 D for each pair that is attended to; the backward pass has five
    ([1] §4.1: 4 · T² · D · H, half if causal, and 2.5 times that backward)."""
    return 4 * D * H * (hi - lo).clamp(min=0).sum().item() * (2.5 if backward else 1)


def io_bytes(lo, hi, T_k, H, D, itemsize, rows=ROWS, columns=COLUMNS, naive=False):
    """Bytes that a forward pass moves to and from memory. Tiles: Q and O once, K and V again for each tile of rows,
    so the fewer the larger a tile may be ([2] Theorem 2). Naive: S and P are written and read ([2] Algorithm 0)."""
    if naive:
        return itemsize * H * (2 * (len(lo) + T_k) * D + 4 * len(lo) * T_k)
    again = sum(j1 - j0 for _, _, tiles in tile_map(lo, hi, rows, columns) for j0, j1, _ in tiles)
    return itemsize * H * (2 * len(lo) * D + 2 * again * D)


def free_bytes(device):
    """Memory that is free: the card's, else the machine's where it tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError):
        return 1024 * int(re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1])
    with contextlib.suppress(AttributeError, ValueError, OSError):  # macOS tells only how much there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return math.inf


def memory_now(device, peak):
    """MB in use now, or at most since the last call with peak=False (of a process: on Linux only)."""
    if device.type == "cuda":
        if not peak:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError):
        if not peak:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is in use
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**10
    return math.nan


def bench_case(c, kind, T):
    """[ms forward, ms forward and backward, peak MB above inputs and outputs] in a fresh process; what first runs pay
    for (pages, kernels) is left out of the times, and is in the peak as far as it is memory."""
    device, dtype, _ = pick_device(c.device, c.dtype)
    torch.manual_seed(0)

    def inputs(T):
        return [torch.randn(1, c.heads, T, c.head_dim, device=device, dtype=dtype, requires_grad=wants)
                for wants in (True, True, True, False)]

    def forward(q, k, v):
        if kind == "naive":
            return attention(q, k, v, c.causal, c.window)
        if kind == "sdpa":
            mask = None
            if c.window:  # it wants it as a matrix, whose making is timed too
                lo, hi = (t.to(device)[:, None] for t in spans(len(q[0, 0]), len(q[0, 0]), c.causal, c.window))
                j = torch.arange(len(q[0, 0]), device=device)
                mask = (lo <= j) & (j < hi)
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=c.causal and not c.window)
        return flash_attention(q, k, v, c.causal, c.window, backend=kind)

    def seconds(q, k, v, do, backward):
        begin = time.perf_counter()
        with torch.set_grad_enabled(backward):
            o = forward(q, k, v)
        if backward:
            torch.autograd.grad(o, (q, k, v), do)
        getattr(torch, device.type).synchronize()  # on a CPU nothing
        return time.perf_counter() - begin

    seconds(*inputs(16), True)  # libraries wake up
    at_T = inputs(T)
    before = memory_now(device, peak=False)
    first = seconds(*at_T, True)
    peak = memory_now(device, peak=True) - before - 4 * at_T[0].nbytes / 2**20  # o, dq, dk, dv
    rounds = max(3, min(30, int(1 / first)))
    times = [statistics.median(seconds(*at_T, backward) for _ in range(rounds)) for backward in (False, True)]
    return [1e3 * times[0], 1e3 * times[1], peak]


def bench(c):
    """A table, bench.json and bench.svg of all backends over --lengths, each case in a process of its own."""
    device, dtype, _ = pick_device(c.device, c.dtype)
    lack = triton_lacks(torch.empty(1, 1, 1, c.head_dim, device=device, dtype=dtype))
    kinds = ["naive", "sdpa", "torch"] + ["triton"] * (device.type == "cuda" and not lack)
    with one_line(f"can't make the folder {c.out}", status=1):
        Path(c.out).mkdir(parents=True, exist_ok=True)
    side = 8192 if device.type == "cuda" else 2048  # large enough to keep a card busy
    a = torch.randn(side, side, device=device, dtype=dtype)
    times = []
    for _ in range(8):
        begin = time.perf_counter()
        (a @ a)[0, 0].item()
        times.append(time.perf_counter() - begin)
    most, rows = 2 * side**3 / min(times), []
    print(f"{device} {dtype}, {torch.get_num_threads()} threads | {c.heads} heads, D {c.head_dim}, causal {c.causal} "
          f"window {c.window}\ntorch and triton are this file's, sdpa is torch's own kernel\n"
          f"a matrix product of {side:,}: {most / 1e9:.0f} GFLOP/s; 'of FLOP/s' are shares of it, forward and "
          "forward with backward; 'moved' is calculated\n"
          f"{'T':>6} {'backend':>8} {'forward':>12} {'and backward':>14} {'peak':>10} {'of FLOP/s':>16} {'moved':>10}")
    if device.type == "cuda" and lack:
        print(f"triton is left out: {lack}")
    for T, kind in ((int(T), kind) for T in c.lengths.split(",") for kind in kinds):
        lo, hi = spans(T, T, c.causal, c.window)
        matrix, free = T * T * c.heads * a.element_size(), free_bytes(device)
        if kind == "naive" and 3 * matrix > free / 2:
            print(f"{T:6} {kind:>8} skipped: 3 matrices of {matrix / 2**30:.1f} GB, {free / 2**30:.1f} GB are free")
            continue
        spawn = multiprocessing.get_context("spawn")  # if the process is killed this pool says so, Pool would wait
        with one_line(f"{kind} at T = {T}", 1), concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
            forward, both, peak = pool.submit(bench_case, c, kind, T).result()
        work = flops(lo, hi, c.heads, c.head_dim)
        tiles = triton_settings(a[None, None, :, :c.head_dim], a[None, None])[1] if kind == "triton" else {}
        moved = None if kind == "sdpa" else io_bytes(  # its tiles are not known
            lo, hi, T, c.heads, c.head_dim, a.element_size(), tiles.get("ROWS", ROWS), tiles.get("COLUMNS", COLUMNS),
            kind == "naive") / 2**20
        rows.append(dict(T=T, backend=kind, forward_ms=forward, both_ms=both, peak_mb=peak, io_mb=moved))
        print(f"{T:6} {kind:>8} {forward:9.2f} ms {both:11.2f} ms {peak:7.0f} MB {1e3 * work / forward / most:8.0%} "
              f"{3.5e3 * work / both / most:7.0%} " + ("" if moved is None else f"{moved:7.0f} MB"), flush=True)
        write_atomic(Path(c.out) / "bench.json", json.dumps(rows, indent=1).encode())
    panels = dict(both_ms="ms, forward and backward", peak_mb="peak MB above inputs and outputs")
    names = dict(naive="naive", sdpa="torch's kernel", torch="flash_attn.py", triton="flash_attn.py, Triton")
    loglog_svg(Path(c.out) / "bench.svg", {label: {
        names[kind]: [(row["T"], row[key]) for row in rows if row["backend"] == kind] for kind in kinds}
        for key, label in panels.items()})
    print(f"wrote {c.out}/bench.json and {c.out}/bench.svg")
    return 0


def loglog_svg(path, panels):
    """Charts of {label: {name: [(x, y), ...]}} side by side, x in powers of two, y in powers of ten."""
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {400 * len(panels)} 370" font-family="sans-serif" '
           'font-size="12"><rect width="100%" height="100%" fill="white"/>']
    for panel, (label, series) in enumerate(panels.items()):
        lines = {name: [(math.log2(x), math.log10(max(y, 1))) for x, y in line if y == y]  # without NaN
                 for name, line in series.items()}
        xs, ys = [[v[i] for line in lines.values() for v in line] or [0] for i in (0, 1)]
        x0, x1, y1 = math.floor(min(xs)), math.ceil(max(xs)) + (max(xs) == min(xs)), math.ceil(max(max(ys), 1))
        svg.append(f'<g transform="translate({400 * panel + 60} 30)"><text x="-50" y="-10">{label}</text>'
                   '<text x="150" y="330" text-anchor="middle">T</text>')
        for y in range(y1 + 1):
            svg.append(f'<path d="M0 {290 - 290 * y / y1:.1f}h300" stroke="#ddd"/>'
                       f'<text x="-8" y="{294 - 290 * y / y1:.1f}" text-anchor="end">{10**y}</text>')
        svg += [f'<text x="{300 * (x - x0) / (x1 - x0):.1f}" y="310" text-anchor="middle">{2**x}</text>'
                for x in range(x0, x1 + 1)]
        for i, (name, line) in enumerate(lines.items()):
            colour = ("#4477aa", "#ee6677", "#228833", "#ccbb44")[i % 4]
            points = " ".join(f"{300 * (x - x0) / (x1 - x0):.1f},{290 - 290 * y / y1:.1f}" for x, y in line)
            svg.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
                       f'<text x="10" y="{14 + 16 * i}" fill="{colour}">{name}</text>')
        svg.append("</g>")
    write_atomic(path, "\n".join([*svg, "</svg>"]).encode())


def print_tiles(c):
    """The tile map of --block_size, --causal and --window: skipped, cut by the mask, full."""
    T = c.block_size
    plan = tile_map(*spans(T, T, c.causal, c.window), ROWS, COLUMNS)
    for i0, _, tiles in plan:
        marks = {j0: "█" if full else "▒" for j0, _, full in tiles}
        print(f"{i0:6} " + "".join(marks.get(j0, "·") for j0 in range(0, T, COLUMNS)))
    whole = [full for *_, tiles in plan for *_, full in tiles]
    full, some, everything = sum(whole), len(whole), len(plan) * -(-T // COLUMNS)
    print(f"tiles of {ROWS} queries × {COLUMNS} keys: {everything - some} skipped (·), {some - full} masked (▒), "
          f"{full} full (█)")
    return 0


# ---- command line --------------------------------------------------------------------------------------------------

def parse_flags(config, doc, argv):
    """A config from flags, one for each of its fields, the field's comment as help. --resume starts from the flags of
    the run that it goes on with."""
    def fail(message):
        raise UserError(f"{message}; see --help")

    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(config), re.M))
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = fail
    for field in dataclasses.fields(config):
        kind = (typing.get_args(field.type) or [field.type])[0]  # int of int | None
        how = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=kind, metavar=kind.__name__)
        text = f"{comments[field.name]} [{field.default}]".replace("%", "%%")
        parser.add_argument(f"--{field.name}", help=text, **how)
    flags = vars(parser.parse_args(argv))
    if flags.get("resume"):
        saved = load_checkpoint(f"{flags.get('out', config.out)}/ckpt.pt")["config"]
        once = ("resume", "init", "stop_at", "out") + ("steps",) * ("epochs" in flags)  # steps win over epochs
        flags = {name: value for name, value in saved.items() if hasattr(config, name) and name not in once} | flags
    return config(**flags)


def main(argv=None):
    """Run the command line. Returns the exit status: 0, 1 for a failed run, 2 for bad input, 130 after Ctrl-C."""
    try:
        c = parse_flags(Config, __doc__, argv)
        if c.bench or c.tiles:
            return bench(c) if c.bench else print_tiles(c)
        pressed, old = [], signal.getsignal(signal.SIGINT)  # a first Ctrl-C stops between steps, a second at once
        signal.signal(signal.SIGINT, lambda *_: (pressed.append(True), signal.signal(signal.SIGINT, old)))
        try:
            return train(c, pressed)
        finally:
            signal.signal(signal.SIGINT, old)
    except UserError as error:
        print(f"flash_attn.py: {error}", file=sys.stderr)
        return error.status
    except (MemoryError, RuntimeError) as error:  # torch's out of memory is one, a plain one on a CPU
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            print(f"flash_attn.py: --compile failed, leave it out: {' '.join(str(error).split())[:200]}",
                  file=sys.stderr)
            return 1
        if isinstance(error, RuntimeError) and not re.search("(out of|allocate|enough) memory", str(error)):
            raise
        print(f"flash_attn.py: out of memory ({' '.join(str(error).split())[:200]}): lower --batch_size or "
              "--block_size", file=sys.stderr)
        return 1
    except SystemExit as error:  # --help
        return error.code or 0
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
