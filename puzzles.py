r"""Tensor puzzles: build a tensor library from arange and where, then train a network with it.

Each puzzle is one line. The first 21 are Sasha Rush's Tensor Puzzles [1], about broadcasting. Then
come 15 of the indexing that transformers need (masks, patches, heads, rotary positions) and 28
forward and backward passes. "train" trains a network with those alone, without autograd.

    python puzzles.py start         write my_puzzles.py, in which each puzzle waits for its line:
                                        def outer(a, b):
                                            # 3: outer(a[i], b[j]) -> [i, j]
                                            # Each element of a times each of b.
                                            return ...
    python puzzles.py show outer    what is wanted, in Python or in torch, and an example
    python puzzles.py hint outer    a hint; hint outer 2: two of them; reveal outer: our line
    python puzzles.py check outer   after "return a[:, None] * b" it says "3. outer: right"
    python puzzles.py check         all that you have answered, and what comes next
    python puzzles.py selftest      all of our own lines
    python puzzles.py train         on drawn shapes; --mine: by your lines, where they are right

A line may use arange(n), where(condition, a, b), + - * / // % ** @, comparisons, & | ~, indexing,
.shape and the puzzles before it, in our version; from rowsum (37) on also exp, log, erf, pi,
.mT (transposed) and rowmax (the largest of each row, as a column).

What to expect (one core of an AMD EPYC, torch 2.13.0, seed 0): train takes 16 s and ends with a
test accuracy of 0.92; selftest takes 13 to 15 s, a check 0.1 to 0.8 s once torch is there.
Differs from [1]: d of repeat is an int. [1] Rush 2022, github.com/srush/Tensor-Puzzles
"""

import argparse
import ast
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import re
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

PUZZLES = {}  # by name, in order
# What a line may use by name. Each puzzle joins once it stands, so that those below can call it.
SCOPE = {"arange": lambda n: torch.arange(n), "where": lambda c, a, b: torch.where(c, a, b)}

class Puzzle:
    def __init__(self, signature, statement, spec, hints, solution):
        self.signature, self.statement, self.hints = signature, statement, hints
        self.spec, self.solution = spec, solution
        self.number = len(PUZZLES) + 1
        self.family = 1 + (self.number > 21) + (self.number > 36)
        self.name, arguments = re.match(r"(\w+)\((.*?)\)(?= ->|$)", signature).groups()
        self.inputs = re.findall(r"(\w+)(?:\[(.*?)\])?([^,]*)", arguments)  # (name, shape, kind)
        self.params = [name for name, _, _ in self.inputs]
        # The letters that a case chooses: those in shapes and kinds, and inputs that have neither.
        text = " ".join(shape + kind or name for name, shape, kind in self.inputs)
        words = dict.fromkeys(re.findall(r"(?<![.:\w])[A-Za-z]\w*", text))
        derived = [name for name, shape, kind in self.inputs if shape or kind]
        self.sizes = [word for word in words if word not in derived]
        self.scope = dict(SCOPE)
        self.solve = self.function(solution)
        self.solve.__doc__ = f"{signature}: {statement}"
        PUZZLES[self.name] = self
        SCOPE[self.name] = self.solve

    def function(self, line, names=None):
        """The line as a function of the parameters. It knows these names: by default the
        puzzles before this one, and none of Python's own functions."""
        names = names or {"__builtins__": {}, **self.scope}
        return eval(f"lambda {', '.join(self.params)}: ({line}\n)", names)

puzzle = lambda *parts, **named: Puzzle(*parts, **named).solve  # lists it, returns its function

# ---- one: the 21 tensor puzzles [1] -------------------------------------------------------------
# Signatures have shapes, and say what is in them: a[i]<j are integers below j, D=2*h follows from
# h. The spec says what the solution has to equal, in Python, where tensors are lists.
# From here on sum is the puzzle, not Python's.

ones = puzzle("ones(i) -> [i]", "Ones.",
    spec="[1 for k in range(i)]",
    hints=["arange(i) has the right length.", "where turns a yes into 1. What is true of all k?"],
    solution="where(arange(i) > -1, 1, 0)")
sum = puzzle("sum(a[i]) -> [1]", "The sum of a.",
    spec="[sum(a)]",
    hints=["@ multiplies and adds up. Which vector changes nothing?", "(i,) @ (i, 1) is (1,)."],
    solution="ones(a.shape[0]) @ a[:, None]")
outer = puzzle("outer(a[i], b[j]) -> [i, j]", "Each element of a times each of b.",
    spec="[[x * y for y in b] for x in a]",
    hints=["Lay a down the rows and b along the columns.", "A column is a[:, None], (i, 1)."],
    solution="a[:, None] * b")
diag = puzzle("diag(a[i,i]) -> [i]", "The diagonal of a.",
    spec="[a[k][k] for k in range(len(a))]",
    hints=["A tensor per axis picks one cell per pair.", "Cell k is in row k and column k."],
    solution="a[arange(a.shape[0]), arange(a.shape[0])]")
eye = puzzle("eye(j) -> [j, j]", "Ones on the diagonal, else zeros.",
    spec="[[1 if r == c else 0 for c in range(j)] for r in range(j)]",
    hints=["Ask each cell: is your row your column?", "Row numbers go in a column, (j, 1)."],
    solution="where(arange(j)[:, None] == arange(j), 1, 0)")
triu = puzzle("triu(j) -> [j, j]", "Ones on and above the diagonal, else zeros.",
    spec="[[1 if r <= c else 0 for c in range(j)] for r in range(j)]",
    hints=["It is eye with another question.", "There the row number is at most the column's."],
    solution="where(arange(j)[:, None] <= arange(j), 1, 0)")

cumsum = puzzle("cumsum(a[i]) -> [i]", "The sum of a up to and with each place.",
    spec="[sum(a[:k + 1]) for k in range(len(a))]",
    hints=["Output c sums the a_r with r <= c.", "Multiply a by a matrix of zeros and ones."],
    solution="a @ triu(a.shape[0])")
diff = puzzle("diff(a[i], i) -> [i]", "Each element minus the one before it; the first stays.",
    spec="[a[k] - a[k - 1] if k > 0 else a[0] for k in range(i)]",
    hints=["a[arange(i) - 1] are the left neighbours.", "Place 0 wraps round: mend it with where."],
    solution="where(arange(i) > 0, a - a[arange(i) - 1], a)")
vstack = puzzle("vstack(a[i], b[i]) -> [2, i]", "a above b.",
    spec="[a, b]",
    hints=["where picks between two, and it broadcasts.", "Ask a column (2, 1): is it row 0?"],
    solution="where(arange(2)[:, None] == 0, a, b)")
roll = puzzle("roll(a[i], i) -> [i]", "a moved one place to the left, a[0] to the end.",
    spec="[a[(k + 1) % i] for k in range(i)]",
    hints=["Output k comes from place k + 1.", "The last one has no such place: % brings i to 0."],
    solution="a[(arange(i) + 1) % i]")
flip = puzzle("flip(a[i], i) -> [i]", "a backwards.",
    spec="[a[i - 1 - k] for k in range(i)]",
    hints=["Output 0 comes from place i - 1.", "Output k comes from k places before that."],
    solution="a[i - 1 - arange(i)]")

compress = puzzle("compress(g[i]:bool, v[i], i) -> [i]", "Those of v where g is true, then zeros.",
    spec="[x for keep, x in zip(g, v) if keep] + [0] * (i - sum(g))",
    hints=["A kept value's new place: how many are kept before it. cumsum(1 * g) counts it too.",
           "v @ a matrix with a 1 at (r, new place of r). Values not kept count as 0."],
    solution="where(g, v, 0) @ where(cumsum(1 * g)[:, None] == arange(i) + 1, 1, 0)")
pad_to = puzzle("pad_to(a[i], i, j) -> [j]", "a cut off at j, or filled up with zeros.",
    spec="[a[k] if k < i else 0 for k in range(j)]",
    hints=["Index a with something of length j.", "% i keeps it in range, where puts zeros."],
    solution="where(arange(j) < i, a[arange(j) % i], 0)")
sequence_mask = puzzle("sequence_mask(values[n,m], length[n]<m+1) -> [n, m]",
    "values, but zero from place length[r] on in each row r.",
    spec="[[x if c < k else 0 for c, x in enumerate(row)] for row, k in zip(values, length)]",
    hints=["Compare each column's number with the row's length.", "Lengths go in a column."],
    solution="where(arange(values.shape[1]) < length[:, None], values, 0)")
bincount = puzzle("bincount(a[i]<j, j) -> [j]", "How often each of 0 ... j - 1 is in a.",
    spec="[a.count(k) for k in range(j)]",
    hints=["Each number as a row with a 1 at its place: eye(j)[a].", "Then add the rows up."],
    solution="ones(a.shape[0]) @ eye(j)[a]")
scatter_add = puzzle("scatter_add(values[i], link[i]<j, j) -> [j]", "values[k] added at link[k].",
    spec="[sum(x for x, place in zip(values, link) if place == k) for k in range(j)]",
    hints=["bincount adds ones, this adds values.", "values @ a matrix."],
    solution="values @ eye(j)[link]")
flatten = puzzle("flatten(a[i,j], i, j) -> [i * j]", "a row after row.",
    spec="[a[r][c] for r in range(i) for c in range(j)]",
    hints=["Number the cells row by row: where is cell k?", "In row k // j and column k % j."],
    solution="a[arange(i * j) // j, arange(i * j) % j]")
linspace = puzzle("linspace(i[1], j[1], n) -> [n]", "n evenly spaced floats, i first and j last.",
    spec="[float(i[0] + (j[0] - i[0]) * k / max(n - 1, 1)) for k in range(n)]",
    hints=["Place k has gone k / (n - 1) of the way.", "n - 1 may be 0: add (n == 1)."],
    solution="i + (j - i) * arange(n) / (n - 1 + (n == 1))")
heaviside = puzzle("heaviside(a[i], b[i]) -> [i]", "0 where a < 0, 1 where a > 0, b where a is 0.",
    spec="[y if x == 0 else int(x > 0) for x, y in zip(a, b)]",
    hints=["Three outcomes: one where inside another.", "Ask first whether a is 0."],
    solution="where(a == 0, b, where(a > 0, 1, 0))")
repeat = puzzle("repeat(a[i], d) -> [d, i]", "a in each of d rows.",
    spec="[a for r in range(d)]",
    hints=["Broadcasting repeats.", "Which column (d, 1) changes nothing when multiplied?"],
    solution="ones(d)[:, None] * a")
bucketize = puzzle("bucketize(v[i], boundaries[j]:sorted) -> [i]", "How many boundaries are <= v.",
    spec="[sum(edge <= x for edge in boundaries) for x in v]",
    hints=["Compare each with each: (i, j).", "1 * turns true into 1, and @ ones counts a row."],
    solution="1 * (v[:, None] >= boundaries) @ ones(boundaries.shape[0])")

# ---- two: indexing as transformers need it; from here on specs are in torch ---------------------

causal_mask = puzzle("causal_mask(i, j) -> [i, j]",
    "True where query r may see key c: none after it. The last query is level with the last key.",
    spec="torch.ones(i, j).tril(j - i).bool()",
    hints=["Keys in a row against queries in a column.", "Query i - 1 sees up to key j - 1."],
    solution="arange(j) <= arange(i)[:, None] + j - i")
window_mask = puzzle("window_mask(i, w) -> [i, i]", "causal_mask(i, i) of the w newest keys.",
    spec="(torch.ones(i, i).tril() - torch.ones(i, i).tril(-w)).bool()",
    hints=["Two masks joined with &: the past, and not too far back.", "The oldest is r - w + 1."],
    solution="causal_mask(i, i) & (arange(i) > arange(i)[:, None] - w)")
embedding = puzzle("embedding(table[V,C], ids[B,T]<V) -> [B, T, C]", "Each id's row of table.",
    spec="F.embedding(ids, table)",
    hints=["Indexing with a tensor gives its shape.", "Axes that were not indexed follow behind."],
    solution="table[ids]")
grid = puzzle("grid(h, w) -> [h, w]", "The numbers of the cells, counted row by row from 0.",
    spec="torch.arange(h * w).reshape(h, w)",
    hints=["What does one step to the right add?", "And one step down? A row's length, w."],
    solution="arange(h)[:, None] * w + arange(w)")

tiles = puzzle("tiles(x[h*P,w*P], h, w, P) -> [h, w, P, P]", "The picture x cut into squares.",
    spec="x.reshape(h, P, w, P).transpose(1, 2)",
    hints=["Row p of tile (a, b) is row a * P + p of the picture: grid(h, P)[a, p].",
           "Rows go to axes 0 and 2, grid(h, P)[:, None, :, None], columns to 1 and 3."],
    solution="x[grid(h, P)[:, None, :, None], grid(w, P)[:, None]]")
patchify = puzzle("patchify(x[h*P,w*P], h, w, P) -> [h * w, P * P]", "Each square as a row.",
    spec="x.reshape(h, P, w, P).transpose(1, 2).reshape(h * w, P * P)",
    hints=["flatten(tiles(...), h, w) joins two axes.", "Join the last two behind [:, ...]."],
    solution="flatten(tiles(x, h, w, P), h, w)[:, arange(P * P) // P, arange(P * P) % P]")
upsample = puzzle("upsample(a[h,w], P) -> [h * P, w * P]", "Each cell of a as a square of side P.",
    spec="a.repeat_interleave(P, 0).repeat_interleave(P, 1)",
    hints=["Row r comes from row r // P.", "Row numbers as a column, column numbers as a row."],
    solution="a[arange(a.shape[0] * P)[:, None] // P, arange(a.shape[1] * P) // P]")
unpatchify = puzzle("unpatchify(p[h*w,P*P], h, w, P) -> [h * P, w * P]", "patchify undone.",
    spec="p.reshape(h, w, P, P).transpose(1, 2).reshape(h * P, w * P)",
    hints=["The patch is upsample(grid(h, w), P).", "The place in it: row % P * P + column % P."],
    solution="p[upsample(grid(h, w), P), arange(h * P)[:, None] % P * P + arange(w * P) % P]")

split_heads = puzzle("split_heads(x[B,T,H*D], H, D) -> [B, H, T, D]", "The columns cut into heads.",
    spec="x.unflatten(2, (H, D)).transpose(1, 2)",
    hints=["Row h of grid(H, D) has head h's columns.", "As (H, 1, D) they meet tokens (T, 1)."],
    solution="x[:, arange(x.shape[1])[:, None], grid(H, D)[:, None]]")
merge_heads = puzzle("merge_heads(x[B,H,T,D], H, D) -> [B, T, H * D]", "split_heads undone.",
    spec="x.transpose(1, 2).flatten(2)",
    hints=["Column c is column c % D of head c // D.", "Three tensors broadcast to (T, H * D)."],
    solution="x[:, arange(H * D) // D, arange(x.shape[2])[:, None], arange(H * D) % D]")
expand_kv = puzzle("expand_kv(k[G,T,D], H=G*n) -> [H, T, D]", "Each key head H // G times.",
    spec="k.repeat_interleave(H // k.shape[0], 0)",
    hints=["H // G query heads share a key head.", "So head h uses key head h // (H // G)."],
    solution="k[arange(H) // (H // k.shape[0])]")
ids_restore = puzzle("ids_restore(ids[n]:permutation) -> [n]", "What undoes the shuffle x[ids].",
    spec="ids.argsort()",
    hints=["Element k came from place ids[k]: send k there.", "scatter_add sends to places."],
    solution="scatter_add(arange(ids.shape[0]), ids, ids.shape[0])")
positives = puzzle("positives(n) -> [2 * n]", "Rows k and n + k are a pair: each row's partner.",
    spec="torch.arange(2 * n).roll(n)",
    hints=["In row k + n.", "And in the second half? % (2 * n)."],
    solution="(arange(2 * n) + n) % (2 * n)")

rotate_half = puzzle("rotate_half(x[T,2*h], D=2*h) -> [T, D]", "Halves (a, b) of rows as (-b, a).",
    spec="torch.cat((-x[:, D // 2:], x[:, :D // 2]), 1)",
    hints=["roll, but by half a row: columns (arange(D) + D // 2) % D.", "where makes the signs."],
    solution="where(arange(D) < D // 2, -1, 1) * x[:, (arange(D) + D // 2) % D]")
rope = puzzle("rope(x[T,2*h], cos[T,h]:twice, sin[T,h]:twice, D=2*h) -> [T, D]",
    "Rotary positions: each x[t, k], x[t, k + D / 2] turned by the angle of that cos and sin.",
    spec="x * cos + torch.cat((-x[:, D // 2:], x[:, :D // 2]), 1) * sin",
    hints=["(a, b) turned is (a cos - b sin, b cos + a sin).", "rotate_half has -b where a is."],
    solution="x * cos + rotate_half(x, D) * sin")

# ---- three: backward by hand --------------------------------------------------------------------
# d is the gradient of the loss with respect to y, the forward pass's output. The answer is the
# gradient of each input that is named, in its shape. Rows are samples. All is float64, but ones(n)
# is int64, and @ doesn't mix them. In the hints [c = k] is 1 if c is k, else 0.

SCOPE |= {"exp": torch.exp, "log": torch.log, "erf": torch.erf, "pi": math.pi}
SCOPE |= {"rowmax": lambda x: x.amax(-1, keepdim=True)}

rowsum = puzzle("rowsum(x[B,n]) -> [B, 1]", "The sum of each row.",
    spec="x.sum(1, keepdim=True)",
    hints=["x @ a column of ones, in x's dtype.", "0 * x[0] + 1 is a row of such ones."],
    solution="x @ (0 * x[0] + 1)[:, None]")
colsum = puzzle("colsum(x[B,n]) -> [n]", "The sum of each column.",
    spec="x.sum(0)",
    hints=["A row of ones @ x.", "It is as long as a column: 0 * x[:, 0] + 1."],
    solution="(0 * x[:, 0] + 1) @ x")

linear = puzzle("linear(x[B,n], w[n,m], b[m]) -> [B, m]", "y = x w + b.",
    spec="F.linear(x, w.mT, b)",
    hints=["@ does all rows at once.", "b broadcasts."],
    solution="x @ w + b")
linear_backward = puzzle("linear_backward(d[B,m], x[B,n], w[n,m])", "Gradients of x, w and b.",
    spec="gradients(lambda x, w, b: x @ w + b, d, x, w, torch.zeros_like(d[0]))",
    hints=["y_rc = sum_k x_rk w_kc + b_c, so x_rk gets sum_c d_rc w_kc. That is d @ w.mT.",
           "w_kc gets sum_r x_rk d_rc: x.mT @ d. b_c, which all rows share, gets sum_r d_rc."],
    solution="d @ w.mT, x.mT @ d, colsum(d)")
add_backward = puzzle("add_backward(d[B,m])", "Gradients of x [B, m] and b [m], where y = x + b.",
    spec="gradients(lambda x, b: x + b, d, torch.zeros_like(d), torch.zeros_like(d[0]))",
    hints=["Slopes are 1, but b_c is added in B rows.", "What broadcasts is summed going back."],
    solution="d, colsum(d)")

relu_backward = puzzle("relu_backward(d[B,n], x[B,n])", "Gradient of x, where y = max(x, 0).",
    spec="gradients(F.relu, d, x)",
    hints=["The slope is 1 where x > 0, else 0.", "Slope times d."],
    solution="where(x > 0, d, 0)")
gelu = puzzle("gelu(x[B,n]) -> [B, n]", "x times Phi(x): how likely a normal number is below x.",
    spec="F.gelu(x)",
    hints=["Phi(x) = (1 + erf(x / sqrt(2))) / 2.", "sqrt(2) is 2 ** 0.5."],
    solution="x * (1 + erf(x / 2 ** 0.5)) / 2")
gelu_backward = puzzle("gelu_backward(d[B,n], x[B,n])", "Gradient of gelu's x.",
    spec="gradients(F.gelu, d, x)",
    hints=["The slope of x Phi is Phi + x phi.", "phi(x) = exp(-x * x / 2) / sqrt(2 pi)."],
    solution="d * ((1 + erf(x / 2 ** 0.5)) / 2 + x * exp(-x * x / 2) / (2 * pi) ** 0.5)")

logsumexp = puzzle("logsumexp(x[B,n]:large) -> [B, 1]", "The log of a row's sum of exp(x).",
    spec="x.logsumexp(1, keepdim=True)",
    hints=["exp(1000) is infinite. But log sum exp(x) = m + log sum exp(x - m).", "m = rowmax(x)."],
    solution="rowmax(x) + log(rowsum(exp(x - rowmax(x))))")
logsumexp_backward = puzzle("logsumexp_backward(d[B,1], x[B,n]:large)", "Gradient of x.",
    spec="gradients(lambda x: x.logsumexp(1, keepdim=True), d, x)",
    hints=["The slope of log s, s = sum_k exp(x_k), is exp(x_c) / s.", "That is exp(x - log s)."],
    solution="d * exp(x - logsumexp(x))")
softmax = puzzle("softmax(x[B,n]:large) -> [B, n]", "exp(x) over its sum, each row.",
    spec="x.softmax(1)",
    hints=["exp(x) may be infinite.", "Dividing by a sum is subtracting its log: exp(x - ...)."],
    solution="exp(x - logsumexp(x))")
softmax_backward = puzzle("softmax_backward(d[B,n], y[B,n]:softmax)",
    "Gradient of x, given y = softmax(x), which the forward pass kept.",
    spec="gradients(lambda x: x.softmax(1), d, y.log())",
    hints=["y_c = exp(x_c - logsumexp(x)), so its slope in x_k is y_c ([c = k] - y_k).",
           "x_k gets sum_c d_c y_c ([c = k] - y_k) = y_k (d_k - sum_c d_c y_c)."],
    solution="y * (d - rowsum(d * y))")

cross_entropy = puzzle("cross_entropy(x[B,n]:large, y[B]<n) -> [1]",
    "The mean over rows of -log softmax(x)[y], from logits x and classes y.",
    spec="F.cross_entropy(x, y).reshape(1)",
    hints=["For a row it is logsumexp(x) - x[y].", "x[arange(B), y] picks: make it a column."],
    solution="colsum(logsumexp(x) - x[arange(x.shape[0]), y][:, None]) / x.shape[0]")
cross_entropy_backward = puzzle("cross_entropy_backward(d[1], x[B,n]:large, y[B]<n)",
    "Gradient of the logits x.",
    spec="gradients(lambda x: F.cross_entropy(x, y).reshape(1), d, x)",
    hints=["logsumexp(x) - x_y has the slope softmax(x) - [c = y].", "[c = y] is eye(n)[y]."],
    solution="d * (softmax(x) - eye(x.shape[1])[y]) / x.shape[0]")

rowmean = puzzle("rowmean(x[B,n]) -> [B, 1]", "The mean of each row.",
    spec="x.mean(1, keepdim=True)",
    hints=["Sum over count.", "The count is x.shape[1]."],
    solution="rowsum(x) / x.shape[1]")
centre = puzzle("centre(x[B,n]) -> [B, n]", "x less the mean of each row.",
    spec="x - x.mean(1, keepdim=True)",
    hints=["A column broadcasts."],
    solution="x - rowmean(x)")
unit = puzzle("unit(x[B,n]) -> [B, n]", "x / sqrt(mean of x^2 + 1e-5), each row: RMSNorm's heart.",
    spec="F.rms_norm(x, x.shape[1:], eps=1e-5)",
    hints=["The mean square is rowmean(x * x).", "** 0.5 is the root."],
    solution="x / (rowmean(x * x) + 1e-5) ** 0.5")
unit_backward = puzzle("unit_backward(d[B,n], x[B,n])", "Gradient of unit's x.",
    spec="gradients(lambda x: F.rms_norm(x, x.shape[1:], eps=1e-5), d, x)",
    hints=["y = x / s with s = sqrt(mean(x^2) + 1e-5). The slope of s in x_k is y_k / n.",
           "So that of y_c is ([c = k] - y_c y_k / n) / s: x_k gets (d_k - y_k mean(d y)) / s."],
    solution="(d - unit(x) * rowmean(d * unit(x))) / (rowmean(x * x) + 1e-5) ** 0.5")
rmsnorm_backward = puzzle("rmsnorm_backward(d[B,n], x[B,n], g[n])",
    "Gradients of x and g, where y = unit(x) * g.",
    spec="gradients(lambda x, g: F.rms_norm(x, x.shape[1:], g, 1e-5), d, x, g)",
    hints=["By the product rule unit(x) gets d * g.", "g broadcasts, so d * unit(x) is summed."],
    solution="unit_backward(d * g, x), colsum(d * unit(x))")

layernorm = puzzle("layernorm(x[B,n], g[n], b[n]) -> [B, n]",
    "(x - mean) / sqrt(variance + 1e-5) of each row, times g, plus b.",
    spec="F.layer_norm(x, x.shape[1:], g, b, 1e-5)",
    hints=["What has mean 0 has its mean square as its variance.", "unit(centre(x))."],
    solution="unit(centre(x)) * g + b")
layernorm_backward = puzzle("layernorm_backward(d[B,n], x[B,n], g[n])", "Gradients of x, g and b.",
    spec="gradients(lambda x, g, b: F.layer_norm(x, x.shape[1:], g, b), d, x, g, 0 * g)",
    hints=["As rmsnorm_backward, then back through centre.", "Then centre(d) once more."],
    solution="centre(unit_backward(d * g, centre(x))), colsum(d * unit(centre(x))), colsum(d)")

embedding_backward = puzzle("embedding_backward(d[n,C], ids[n]<V, V)",
    "Gradient of table [V, C], where y = table[ids].",
    spec="gradients(lambda table: table[ids], d, d.new_zeros(V, d.shape[1]))",
    hints=["Looking up is y = E @ table, E being eye(V)[ids].", "0 * d[:, :1] + E has d's dtype."],
    solution="(0 * d[:, :1] + eye(V)[ids]).mT @ d")
conv1d = puzzle("conv1d(x[n+K-1], w[K]) -> [n]", "y_t = sum_k x_{t+k} w_k, for windows inside x.",
    spec="F.conv1d(x[None], w[None, None])[0]",
    hints=["All windows by one index tensor: t as a column plus k as a row.", "Then @ w."],
    solution="x[arange(x.shape[0] - w.shape[0] + 1)[:, None] + arange(w.shape[0])] @ w")
conv1d_backward = puzzle("conv1d_backward(d[n], x[n+K-1], w[K], T=n+K-1, K)",
    "Gradients of x and w; T is the length of x.",
    spec="gradients(lambda x, w: F.conv1d(x[None], w[None, None])[0], d, x, w)",
    hints=["w_k gets sum_t d_t x_{t+k}: conv1d(x, d). x_s gets sum_k d_{s-k} w_k, d 0 outside.",
           "Pad d to T: an index s - k below 0 wraps round into its K - 1 zeros."],
    solution="pad_to(d, T - K + 1, T)[arange(T)[:, None] - arange(K)] @ w, conv1d(x, d)")

scores_backward = puzzle("scores_backward(d[T,S], q[T,D], k[S,D])",
    "Gradients of q and k, where y = q @ k.mT / sqrt(D).",
    spec="gradients(lambda q, k: q @ k.mT / q.shape[1] ** 0.5, d, q, k)",
    hints=["As in linear_backward, with w = k.mT.", "k.mT gets q.mT @ d, so k gets d.mT @ q."],
    solution="d @ k / q.shape[1] ** 0.5, d.mT @ q / q.shape[1] ** 0.5")
attention_backward = puzzle(
    "attention_backward(d[T,C], q[T,D], k[S,D], v[S,C], p=(q@k.mT/D**.5).softmax(1))",
    "Gradients of q, k and v, where y = p @ v and p [T, S], the softmax of the scores, was kept.",
    spec="gradients(lambda *qkv: F.scaled_dot_product_attention(*qkv), d, q, k, v)",
    hints=["p gets d @ v.mT, v gets p.mT @ d.", "Then softmax_backward, *scores_backward(...)."],
    solution="*scores_backward(softmax_backward(d @ v.mT, p), q, k), p.mT @ d")
newmax = puzzle("newmax(m[B,1], s[B,n]) -> [B, 1]", "The larger of m and the row's largest s.",
    spec="torch.maximum(m, s.amax(1, keepdim=True))",
    hints=["Two columns: m and rowmax(s).", "Then where."],
    solution="where(m > rowmax(s), m, rowmax(s))")
online_softmax = puzzle("online_softmax(m[B,1], o[B,C], s[B,n]:large, v[n,C]) -> [B, 1], [B, C]",
    "Flash attention: block s, v updates m, the largest score, and o, the sum of exp(score - m) v.",
    spec="(M := torch.maximum(m, s.amax(1, True)), o * (m - M).exp() + (s - M).exp() @ v)",
    hints=["With a new maximum M each old term exp(score - m) must become exp(score - M).",
           "One factor does it for all: exp(m - M). The new keys add exp(s - M) @ v."],
    solution="newmax(m, s), o * exp(m - newmax(m, s)) + exp(s - newmax(m, s)) @ v")

# ---- the checker: cases, small ones first, so that the first failure is about the smallest -------

KINDS = {
    ":bool": lambda x: x > 0,
    ":sorted": lambda x: x.sort().values,
    ":permutation": lambda x: x.argsort(),
    ":twice": lambda x: x.repeat(1, 2),
    ":softmax": lambda x: x.softmax(1),
    ":large": lambda x: 400 * x if x[0, 0] > 1 else x,  # one case in six
}

def draw_inputs(p, sizes, draw):
    """The arguments of a case, the same in every run. Draw 1 has the least integers and draw 2 the
    largest (all false, all true, full lengths); the others are random."""
    g = torch.Generator().manual_seed(hash((p.number, draw, *sizes)))
    values = dict(zip(p.sizes, sizes, strict=True))
    for name, shape, kind in p.inputs:
        if kind.startswith("="):
            values[name] = eval(kind[1:], {}, values)
        elif shape:
            shape = eval(f"[{shape}]", {}, values)
            low, high = -4, 4
            if kind.startswith("<"):
                low, high = 0, eval(kind[1:], {}, values) - 1
            least = high if draw == 2 else low
            most = low if draw == 1 else high
            x = torch.randint(least, most + 1, shape, generator=g)
            if p.family == 3 and not kind.startswith("<"):
                x = torch.randn(shape, generator=g, dtype=torch.double)
            values[name] = KINDS.get(kind, lambda x: x)(x)
    return [values[name] for name in p.params]

def cases(p):
    """[(sizes, draw)]: all sizes up to a limit, small ones first, each with a few draws."""
    letters = len(p.sizes)
    limit = {1: 10, 2: 6, 3: 4, 4: 3}[letters]
    draws = math.ceil(500 / limit**letters)
    if not any(shape for _, shape, _ in p.inputs):  # sizes are all it gets: nothing to draw
        limit, draws = {1: 50, 2: 23}[letters], 1
    sizes = itertools.product(range(1, limit + 1), repeat=letters)
    return list(itertools.product(sorted(sizes, key=math.prod), range(draws)))

def gradients(f, d, *inputs):
    """Autograd's gradients of f(*inputs), weighted by d: the judge of our own."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        return torch.autograd.grad(f(*inputs), inputs, d)

def wanted(p, args):
    """The outputs that the spec asks for."""
    spec = p.function(p.spec, {"torch": torch, "F": F, "gradients": gradients})
    if p.family > 1:
        return outputs(spec(*args))
    lists = [a.tolist() if torch.is_tensor(a) else a for a in args]
    return (torch.tensor(spec(*lists)),)

def outputs(value):
    return value if isinstance(value, tuple) else (value,)

def wrong_cells(got, want):
    """Booleans: doubles may differ by 1e-8 of the largest, floats by 1e-5, integers not at all."""
    if not want.is_floating_point():
        return got != want
    tolerance = 1e-8 if want.dtype == torch.double else 1e-5
    return ~((got - want).abs() <= tolerance * want.abs().max().clamp(min=1e-3))

def examine(p, function):
    """None if the function passes all cases, else a text about the first that it fails."""
    for number, (sizes, draw) in enumerate(cases(p), 1):
        args = draw_inputs(p, sizes, draw)
        want = wanted(p, args)
        try:
            fault = compare(outputs(function(*args)), want)
        except Exception as error:
            fault = f"can't be computed: {type(error).__name__}: {str(error)[:200]}"
        if fault:
            return f"case {number} of {len(cases(p))}\n{describe(p.params, args)}{fault}"
    return None

def compare(got, want):
    """What is wrong with the first wrong output, or None."""
    if len(got) != len(want):
        return f"it gives {len(got)} outputs instead of {len(want)}"
    for g, w in zip(got, want, strict=True):
        if not torch.is_tensor(g):
            return f"it gives no tensor but {type(g).__name__}"
        if g.shape == w.shape and g.dtype == w.dtype and not wrong_cells(g, w).any():
            continue
        what, mistakes = likely(g, w)
        mistake = next((message for test, message in mistakes if test), "nothing typical")
        tensors = describe(["wanted", "got"], [w, g])
        return f"{tensors}a wrong {what}. It looks like this: {mistake}"
    return None

def describe(names, values):
    return "".join(f"{name} =\n{value}\n" for name, value in zip(names, values, strict=True))

def likely(got, want):
    """What is wrong, and [(test, message)]: the first test that holds says what it looks like."""
    transposed = "transposed: which should lie down the rows, with [:, None]?"
    integers = not want.is_floating_point()
    if got.shape != want.shape:
        return f"shape, {tuple(got.shape)} and not {tuple(want.shape)}", [
            (got.shape == want.shape[::-1] and got.dim() > 1, transposed),
            (got.squeeze().shape == want.squeeze().shape, "an axis of 1: [:, None] makes one"),
            (got.dim() < want.dim(), "an axis is missing: [:, None] makes one, to broadcast"),
            (abs(got.numel() - want.numel()) == 1, "a length is off by one"),
        ]
    if got.dtype != want.dtype:
        return f"dtype, {got.dtype} and not {want.dtype}", [
            (got.dtype == torch.bool, "a comparison: where(..., 1, 0) or 1 * (...) makes numbers"),
            (want.dtype == torch.bool, "the comparison itself is the answer"),
            (integers, "/ makes floats of integers, // does not"),
            (not got.is_floating_point(), "integers, where floats are wanted"),
        ]
    a, b = got.double(), want.double()
    factor = (a * b).sum() / (b * b).sum()
    return "value", [
        (integers and b.min() >= 0 and a.min() in (-1, -2), "~ of an integer: ~0 is -1, ~1 is -2"),
        (a.dim() > 1 and torch.equal(a.mT, b), transposed),
        (a.numel() > 1 and (a == a.flatten()[0]).all(), "each cell is the same"),
        (a.shape[-1] > 1 and torch.equal(a[..., 1:], b[..., :-1]), "shifted to the right"),
        (a.shape[-1] > 3 and torch.equal(a[..., :-1], b[..., 1:]), "shifted to the left"),
        (a.numel() > 1 and not wrong_cells(a, b * factor).any(), f"a factor of {factor:.4g}"),
        (integers and (a - b).abs().max() <= 1, "off by one: < or <=, from 0 or from 1?"),
        (a.isnan().any(), "not a number: too large for exp, or 0 / 0?"),
    ]

# ---- the checker: rules, and a process of its own for each line ---------------------------------

ANSWERS = Path("my_puzzles.py")
MEMORY = 512  # megabytes that a line may take, on Linux
SECONDS = 3  # of computing
ALLOWED = """Constant Name Load Call BinOp UnaryOp Compare Subscript Slice Tuple Starred Attribute
    Add Sub Mult Div Mod Pow FloorDiv MatMult BitAnd BitOr BitXor USub UAdd Invert
    Eq NotEq Lt LtE Gt GtE""".split()

def broken_rule(p, line):
    """What the rules don't allow in a line, or None."""
    attributes = ("shape", "mT") if p.family == 3 else ("shape",)
    for node in ast.walk(ast.parse(f"({line}\n)", mode="eval").body):
        kind = type(node).__name__
        if kind not in ALLOWED:
            return f"{kind} is not allowed"
        if kind == "Constant" and not isinstance(node.value, (int, float, type(None), type(...))):
            return f"{node.value!r:.20} is not allowed, only numbers"
        if kind == "Attribute" and node.attr not in attributes:
            return f".{node.attr} is not allowed"
        if kind == "Call" and (not isinstance(node.func, ast.Name) or node.func.id in p.params):
            return "only arange, where and the puzzles before can be called"
        if kind == "Name" and node.id == p.name:
            return f"{p.name} calls itself: only the puzzles before it are there"
        if kind == "Name" and node.id not in [*p.params, *p.scope]:
            return f"{node.id} comes later" if node.id in SCOPE else f"{node.id} is not allowed"
        if kind == "Compare" and len(node.ops) > 1:
            return "one comparison at a time: join two with &"
    return None

def read_answers():
    """{name: (line, None or what is wrong with its form)} of my_puzzles.py, without those open."""
    if not ANSWERS.exists():
        sys.exit(f"no {ANSWERS} here: python puzzles.py start writes it")
    text = ANSWERS.read_text(encoding="utf-8-sig")
    answers, places = {}, {}
    for node in ast.parse(text, ANSWERS.name).body:
        if not isinstance(node, ast.FunctionDef) or node.name not in PUZZLES:
            sys.exit(f"{ANSWERS}, line {node.lineno}: nothing but the puzzles' functions goes here")
        p = PUZZLES[node.name]
        places.setdefault(p.name, []).append(node.lineno)
        value = getattr(node.body[0], "value", None)
        line = ast.get_source_segment(text, value) if value else ""
        same_head = ast.unparse(node.args) == ", ".join(p.params) and not node.decorator_list
        if len(places[p.name]) > 1:
            fault = f"{p.name} is defined twice, in lines {places[p.name]}: keep one"
        elif not same_head or [type(part) for part in node.body] != [ast.Return] or not line:
            fault = f"want def {p.name}({', '.join(p.params)}): and one line, return ..."
        elif line == "...":  # not answered yet
            continue
        else:
            fault = broken_rule(p, line)
        answers[p.name] = (line, fault and f"line {node.lineno}: {fault}")
    return answers

def judge(p, line):
    """None if the line is right, else what is wrong. It runs in a process of its own."""
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=judge_here, args=(p.name, line, send))
    sys.stdout.flush()  # else the child would print it again
    child.start()
    send.close()
    try:
        return receive.recv() if receive.poll(20 * SECONDS) else "stopped: it does not end"
    except EOFError:
        return f"stopped: over {SECONDS} seconds of computing, or more memory than there is"
    finally:
        child.kill()
        child.join()

def judge_here(name, line, pipe):
    """The child's work. The system ends it when it passes the limits."""
    p = PUZZLES[name]
    torch.set_num_threads(1)  # threads don't survive a fork
    torch.set_default_dtype(torch.double if p.family == 3 else torch.float)  # of where(c, 1.0, 0.0)
    if os.name == "posix":  # elsewhere there is only judge's clock
        import resource
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        pipe.send(examine(p, p.function(line)))
    except Exception as error:
        pipe.send(f"can't be judged: {type(error).__name__}: {str(error)[:200]}")

def start():
    """Write my_puzzles.py with a stub for each puzzle, unless it is there."""
    if ANSWERS.exists():
        sys.exit(f"{ANSWERS} is here already: it is left alone")
    text = "# Put one expression in the place of each ..., then run: python puzzles.py check\n"
    for p in PUZZLES.values():
        text += f"\ndef {p.name}({', '.join(p.params)}):\n    # {p.number}: {p.signature}\n"
        text += f"    # {p.statement}\n    return ...\n"
    ANSWERS.write_text(text, encoding="utf-8")
    print(f"wrote {ANSWERS}; next: python puzzles.py show ones")

def show(p):
    """Print the statement, the spec and an example."""
    print(f"{p.number}. {p.signature}\n\n{p.statement}\n\n    {p.name} = {p.spec}\n\nFor example:")
    args = draw_inputs(p, (3, 4, 2, 2)[:len(p.sizes)], draw=3)
    want = wanted(p, args)
    print(describe(p.params, args) + describe(["gives"] * len(want), want), end="")

def check(answers):
    """Judge {name: (line, fault)} and print what is wrong; the exit status is 1 if anything is."""
    right = []
    for name, (line, fault) in answers.items():
        fault = fault or judge(PUZZLES[name], line)
        print(f"{PUZZLES[name].number}. {name}: {fault or 'right'}", flush=True)
        if not fault:
            right.append(name)
    todo = [name for name in PUZZLES if name not in right]
    if len(answers) > 1:
        print(f"{len(right)} of {len(answers)} right; next: {todo[0] if todo else 'train --mine'}")
    if len(right) < len(answers):
        sys.exit(1)

# ---- a network whose forward and backward passes are the puzzles --------------------------------

def initial_weights(seed, width=256):
    g = torch.Generator().manual_seed(seed)
    return {
        "w1": torch.randn(256, width, generator=g) / 16, "b1": torch.zeros(width),
        "gain": torch.ones(width), "bias": torch.zeros(width),
        "w2": torch.randn(width, 10, generator=g) * 0.02, "b2": torch.zeros(10),
    }

def forward(w, x):
    """Logits (B, 10) of pictures x (B, 256), and what the backward pass needs."""
    a = linear(x, w["w1"], w["b1"])  # (B, width)
    z = gelu(a)  # (B, width)
    n = layernorm(z, w["gain"], w["bias"])  # (B, width)
    logits = linear(n, w["w2"], w["b2"])  # (B, 10)
    return logits, (x, a, z, n)

def backward(w, kept, logits, y):
    """The gradient of cross_entropy(logits, y) for each weight: forward's lines, last one first."""
    x, a, z, n = kept
    grad = {}
    d = cross_entropy_backward(torch.ones(1), logits, y)  # (B, 10); the loss's own gradient is 1
    d, grad["w2"], grad["b2"] = linear_backward(d, n, w["w2"])  # d (B, width)
    d, grad["gain"], grad["bias"] = layernorm_backward(d, z, w["gain"])  # d (B, width)
    d = gelu_backward(d, a)  # (B, width)
    _, grad["w1"], grad["b1"] = linear_backward(d, x, w["w1"])
    return grad

def make_shapes(n, seed):
    """Draw x (n, 256), noisy pictures of 16 x 16 pixels, and classes y (n,): flowers of 0, 2, 3, 4
    or 5 petals, filled (y even) or as outlines, moved, turned and scaled."""
    g = torch.Generator().manual_seed(seed)
    uniform = lambda low, high: low + (high - low) * torch.rand(n, 1, generator=g)
    y = torch.randint(10, (n,), generator=g)
    size = uniform(4, 6)  # (n, 1), in pixels
    v = (torch.arange(256) // 16 - 7.5 - uniform(-2, 2)) / size  # (n, 256), down from the middle
    u = (torch.arange(256) % 16 - 7.5 - uniform(-2, 2)) / size  # (n, 256), to the right
    theta = torch.atan2(v, u) + uniform(0, 2 * math.pi)
    petals = torch.tensor([0, 2, 3, 4, 5])[y // 2, None]  # (n, 1)
    distance = torch.hypot(u, v) - 0.7 - 0.3 * (petals * theta).cos()  # negative inside
    distance = torch.where(y[:, None] % 2 == 0, distance, distance.abs() - 0.15)
    x = (0.5 - distance * size).clamp(0, 1) * uniform(0.5, 1)  # an edge is a pixel soft
    return 2 * x - 1 + 0.3 * torch.randn(n, 256, generator=g), y

def evaluate(w, x, y):
    logits, _ = forward(w, x)
    accuracy = (logits.argmax(1) == y).float().mean()
    return cross_entropy(logits, y).item(), accuracy.item()

def use_mine():
    """Put the learner's lines that are right in the place of ours, not inside other puzzles."""
    for name, (line, fault) in read_answers().items():
        p = PUZZLES[name]
        if fault is None and judge(p, line) is None:
            globals()[name] = p.function(line)  # forward and backward call it by this name
            print(f"{name} is yours: {line}")

@dataclasses.dataclass
class Config:
    mine: bool = False  # use the lines in my_puzzles.py that are right
    steps: int = 6000
    batch_size: int = 128
    lr: float = 0.1  # the peak
    momentum: float = 0.9
    eval_every: int = 500  # steps between evaluations, each with a checkpoint
    log_every: int = 50  # steps between log lines
    seed: int = 0  # of weights and batches
    out: str = "out/puzzles"

def log(out, **row):
    print(" | ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
    with open(f"{out}/log.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")

def save(path, state):
    torch.save(state, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)  # so that path is never half a file

def stop_if_infinite(loss, step):
    if not math.isfinite(loss):
        sys.exit(f"loss is {loss} at step {step}: try a lower --lr")

@torch.no_grad()
def train(c):
    torch.set_num_threads(1)  # for layers this small two are hardly faster, and wait on busy cores
    if c.mine:
        use_mine()
    os.makedirs(c.out, exist_ok=True)
    Path(c.out, "config.json").write_text(json.dumps(dataclasses.asdict(c), indent=2))
    Path(c.out, "log.jsonl").write_text("")
    val_x, val_y = make_shapes(1000, seed=1)
    w = initial_weights(c.seed)
    velocity = {name: torch.zeros_like(p) for name, p in w.items()}
    state = {"model": w, "optimizer": velocity, "config": dataclasses.asdict(c), "best": -1.0}
    seconds, logged, losses = 0.0, 0.0, []
    for step in range(c.steps + 1):
        if step % c.eval_every == 0 or step == c.steps:
            loss, accuracy = evaluate(w, val_x, val_y)
            stop_if_infinite(loss, step)
            log(c.out, step=step, seconds=seconds, val_loss=loss, val_accuracy=accuracy)
            state["step"] = step
            if accuracy > state["best"]:
                state["best"] = accuracy
                save(f"{c.out}/best.pt", state)
            save(f"{c.out}/ckpt.pt", state)
        if step == c.steps:
            break

        began = time.perf_counter()
        lr = c.lr * min(1, (step + 1) / 50) * (1 - step / c.steps)  # warm up, then down to 0
        x, y = make_shapes(c.batch_size, seed=(c.seed + 1) * 2**20 + step)
        logits, kept = forward(w, x)
        loss = cross_entropy(logits, y).item()
        stop_if_infinite(loss, step)
        grad = backward(w, kept, logits, y)
        for name in w:  # SGD with momentum
            velocity[name].mul_(c.momentum).add_(grad[name])
            w[name].sub_(velocity[name], alpha=lr)
        losses.append(loss)
        seconds += time.perf_counter() - began
        if (step + 1) % c.log_every == 0:
            rate = c.batch_size * len(losses) / (seconds - logged)
            mean = torch.tensor(losses).mean().item()
            log(c.out, step=step + 1, loss=mean, lr=lr, seconds=seconds, images_per_s=rate)
            losses, logged = [], seconds
    w = torch.load(f"{c.out}/best.pt", weights_only=True)["model"]
    loss, accuracy = evaluate(w, *make_shapes(2000, seed=2))  # test pictures, drawn once
    log(c.out, step=step, seconds=seconds, test_loss=loss, test_accuracy=accuracy, final=True)

def main(argv=None):
    if hasattr(sys.stdout, "reconfigure"):  # a console that isn't UTF-8 shows escapes
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(
        "puzzles.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices="start show hint reveal check selftest train".split())
    parser.add_argument("puzzle", nargs="?", choices=PUZZLES, metavar="puzzle")
    parser.add_argument("count", nargs="?", type=int, default=1, help="how many hints")
    for field in dataclasses.fields(Config):  # the flags of train
        kind = {"type": type(field.default)}
        if isinstance(field.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(f"--{field.name}", default=field.default, **kind)
    flags = parser.parse_args(argv)
    p = PUZZLES.get(flags.puzzle)
    c = Config(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(Config)})
    if flags.command in ("show", "hint", "reveal") and not p:
        parser.error(f"{flags.command} needs the name of a puzzle")
    if min(c.steps, c.batch_size, c.eval_every, c.log_every) < 1:
        parser.error("--steps, --batch_size, --eval_every and --log_every are at least 1")
    if flags.command == "start":
        start()
    elif flags.command == "show":
        show(p)
    elif flags.command == "hint":
        print("\n".join(p.hints[:flags.count]))
    elif flags.command == "reveal":
        print(p.solution)
    elif flags.command == "check":
        answers = read_answers()
        check({p.name: answers.get(p.name, ("", "not answered yet"))} if p else answers)
    elif flags.command == "selftest":
        check({p.name: (p.solution, broken_rule(p, p.solution)) for p in PUZZLES.values()})
    else:
        train(c)

if __name__ == "__main__":
    main()
