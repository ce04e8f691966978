# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "numpy"]
# ///
"""Tensor puzzles: build a tensor library from arange and where, then train a network with it, without autograd.

Each puzzle is one line. The first 21, Sasha Rush's Tensor Puzzles [1], are about broadcasting; the second
family is the indexing that the other scripts here are made of (masks, patches, heads, rotary positions); the third
works out backward passes, and "train" trains a network with them alone. Answers go into my_puzzles.py.

    python puzzles.py               the board: what is solved, what is next
    python puzzles.py start         write my_puzzles.py, with a stub for each puzzle (never over an old one)
    python puzzles.py show outer    statement, meaning in Python (from 37 on in torch) and an example; or: show 3
    python puzzles.py check outer   your answer against 500 cases, small ones first; without a name: all your answers
    python puzzles.py hint outer    the next of three hints; then: reveal outer
    python puzzles.py draw outer    the example as outer.svg: inputs, output, and where each output cell came from
    python puzzles.py selftest      our own answers against the rules and all cases
    python puzzles.py train         train on drawn shapes; with --mine your answers do the work, where they are right

A line may use arange(n), where(condition, a, b), + - * / // % ** @, comparisons, & | ~, indexing, .shape and the
puzzles before it; from rowsum on also exp, log, erf, rowmax (largest of each row, a column), pi and .mT (transpose).
It runs in a process of its own, limited in time and (on Linux) memory, where earlier puzzles are ours. A statement
begins with the answer's shape; (i, j) is i rows of j cells. Exit status: 0 right, 1 wrong or missing, 2 can't be read.

What to expect (torch 2.13.0, two cores of an AMD EPYC, seed 0, n = 1; log in assets/logs/puzzles/): train takes 20 s
and ends with a test accuracy of 0.92 (a linear classifier: 0.38); selftest 10 to 13 s, a check 0.1 to 1.5 s.
Differs from [1]: repeat's d is an int. [1] Rush 2022, Tensor Puzzles, github.com/srush/Tensor-Puzzles
"""

import argparse, ast, colorsys, contextlib, dataclasses, functools, inspect, itertools, json, math
import multiprocessing, os, random, re, signal, sys, textwrap, time, typing
from pathlib import Path

import torch
import torch.nn.functional as F

try:
    import resource
except ImportError:  # Windows: there only the parent's clock stops a learner's line
    resource = None

class UserError(ValueError):
    """Bad input (status 2) or a failed run (status 1): main prints the message on one line and returns the status."""
    def __init__(self, message, status=2):
        super().__init__(message)
        self.status = status

def gradients(f, d, *inputs):
    """Autograd's gradients of f(*inputs), weighted by d, with respect to each input: the judge of our own."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        found = torch.autograd.grad(f(*inputs), inputs, d)
    return found if len(found) > 1 else found[0]

# Puzzles become functions of this module, sum among them: below, sum is the puzzle, not Python's.
PUZZLES = {}  # by name, in order
GIVEN = dict(arange=lambda n: torch.arange(n), where=lambda condition, a, b: torch.where(condition, a, b))
GIVEN_LATER = dict(exp=torch.exp, log=torch.log, erf=torch.erf, pi=math.pi, rowmax=lambda x: x.amax(-1, keepdim=True))
PLAIN = dict(gradients=gradients, torch=torch, F=F, math=math)  # for specs, besides all of Python

class Puzzle:
    """solution is our line, spec a plain one that says what it has to equal; for inputs see parse_inputs."""
    def __init__(self, family, call, inputs, spec, solution, prose):
        self.name, *self.params = re.findall(r"\w+", call)
        self.family, self.inputs, self.spec, self.solution = family, inputs, spec, solution
        (self.statement, *self.hints), self.number = " ".join(prose.split()).split(" | "), len(PUZZLES) + 1
        earlier = {name: p.solve for name, p in PUZZLES.items()}
        self.scope = GIVEN | (GIVEN_LATER if family == 3 else {}) | earlier  # what a line may call by name
        self.meaning, self.solve = self.function(spec, dict(PLAIN)), self.function(solution)
        self.solve.__name__, self.solve.__qualname__, self.solve.__doc__ = self.name, self.name, self.statement
        PUZZLES[self.name] = self

    def function(self, line, names=None):
        """The line as a function of the puzzle's parameters; unless names are given, without Python's builtins."""
        code = compile(f"lambda {', '.join(self.params)}: ({line}\n)", self.name, "eval")
        return eval(code, names or {"__builtins__": {}, **self.scope})

# ---- one: the 21 tensor puzzles [1] --------------------------------------------------------------------------------
# name = one(signature, inputs, spec, solution, statement | three hints); specs read lists in the place of tensors
one, two, three = (functools.partial(lambda *about: Puzzle(*about).solve, family) for family in (1, 2, 3))
ones = one("ones(i)", "i", "[1 for k in range(i)]", "where(arange(i) > -1, 1, 0)", """
    (i,) ones. | arange(i) has the right length, only the wrong values. | Which question has the answer yes for each
    of its values? | where turns yes into 1: where(arange(i) > ..., 1, 0).""")
sum = one("sum(a)", "a(i)", "[sum(a)]", "ones(a.shape[0]) @ a[:, None]", """
    (1,): the sum of a (i,). | A product with @ multiplies and adds up; here nothing is to be multiplied. |
    Multiplying by one changes nothing: take ones as long as a. | The answer has an axis: (i,) @ (i, 1) is (1,).""")
outer = one("outer(a, b)", "a(i) b(j)", "[[x * y for y in b] for x in a]", "a[:, None] * b", """
    (i, j): each element of a (i,) times each of b (j,). | Lay a down the rows and b along the columns. | a[:, None]
    is a column, (i, 1). | A column times a row broadcasts to (i, j).""")
diag = one("diag(a)", "a(i,i)", "[a[k][k] for k in range(len(a))]", "a[arange(a.shape[0]), arange(a.shape[0])]", """
    (i,): the diagonal of a (i, i). | Indexing with a tensor per axis picks one cell per pair. | Cell k of the answer
    is in row k and column k. | Both tensors count from 0: arange(a.shape[0]).""")
eye = one("eye(j)", "j", "[[1 if r == c else 0 for c in range(j)] for r in range(j)]",
    "where(arange(j)[:, None] == arange(j), 1, 0)", """
    (j, j): ones on the diagonal, else zeros. | Ask each cell whether its row is its column. | The row numbers as a
    column: arange(j)[:, None]. | Comparing a column with a row gives all j × j answers.""")
triu = one("triu(j)", "j", "[[1 if r <= c else 0 for c in range(j)] for r in range(j)]",
    "where(arange(j)[:, None] <= arange(j), 1, 0)", """
    (j, j): ones on and above the diagonal, else zeros. | It is eye with another question. | On and above the diagonal
    the row is at most the column. | Row numbers are arange(j)[:, None], columns arange(j).""")
cumsum = one("cumsum(a)", "a(i)", "[sum(a[:k + 1]) for k in range(len(a))]", "a @ triu(a.shape[0])", """
    (i,): the sum of a (i,) up to each place. | Output c is a sum of some elements of a: which? | Those with r <= c: a
    times a matrix of zeros and ones. | Column c of that matrix has ones down to row c: triu.""")
diff = one("diff(a, i)", "a(i) i", "[a[k] - a[k - 1] if k > 0 else a[0] for k in range(i)]",
    "where(arange(i) > 0, a - a[arange(i) - 1], a)", """
    (i,): each element of a (i,) minus the one before it; the first stays as it is. | Build the left neighbours first.
    | a[arange(i) - 1] is that; at place 0 it wraps round to the last element. | Mend place 0 with where.""")
vstack = one("vstack(a, b)", "a(i) b(i)", "[[x for x in a], [x for x in b]]",
    "where(arange(2)[:, None] == 0, a, b)", """
    (2, i): a (i,) above b (i,). | where picks between two tensors, and it broadcasts. | Is it row 0? That is the
    question. | As a column, (2, 1), against rows of i: arange(2)[:, None] == 0.""")
roll = one("roll(a, i)", "a(i) i", "[a[(k + 1) % i] for k in range(i)]", "a[(arange(i) + 1) % i]", """
    (i,): a (i,) moved one place to the left; the first element comes in at the end. | Which place of a does output k
    come from? | From k + 1; the last has none. | % brings i back to 0.""")
flip = one("flip(a, i)", "a(i) i", "[a[i - 1 - k] for k in range(i)]", "a[i - 1 - arange(i)]", """
    (i,): a (i,) backwards. | Output 0: from place i - 1. | Output k: k places before. | i - 1 - arange(i).""")
compress = one("compress(g, v, i)", "g?(i) v(i) i", "[x for keep, x in zip(g, v) if keep] + [0] * (i - sum(g))",
    "where(g, v, 0) @ where(cumsum(1 * g)[:, None] == arange(i) + 1, 1, 0)", """
    (i,): the elements of v (i,) where g (i,) is true, in order from the left; then zeros. | A kept value's new
    place is the number of values kept before it. | cumsum(1 * g) counts the kept ones up to and with each place. | A
    matrix of zeros and ones sends row r to column c; those not kept count as 0.""")
pad_to = one("pad_to(a, i, j)", "a(i) i j", "[a[k] if k < i else 0 for k in range(j)]",
    "where(arange(j) < i, a[arange(j) % i], 0)", """
    (j,): a (i,) cut off or filled up with zeros. | Index a with something of length j. | arange(j) may be out of
    range where j > i: % i keeps it inside. | where puts a 0 from place i on.""")
sequence_mask = one("sequence_mask(values, length)", "values(n,m) length<m+1(n)",
    "[[x if c < k else 0 for c, x in enumerate(row)] for row, k in zip(values, length)]",
    "where(arange(values.shape[1]) < length[:, None], values, 0)", """
    (n, m): values (n, m), but zero from place length[r] on in each row r; length is (n,). | Compare each column's
    number with the row's length. | Lengths as a column: length[:, None]. | where(… < …, values, 0).""")
bincount = one("bincount(a, j)", "a<j(i) j", "[a.count(k) for k in range(j)]", "ones(a.shape[0]) @ eye(j)[a]", """
    (j,): how often each of 0 … j - 1 is in a (i,). | Write each number as a row with a single one at its place. |
    eye(j)[a] is those rows, (i, j). | Add the rows up: ones @ them.""")
scatter_add = one("scatter_add(values, link, j)", "values(i) link<j(i) j",
    "[sum(x for x, place in zip(values, link) if place == k) for k in range(j)]", "values @ eye(j)[link]", """
    (j,): each element of values (i,) added to the place that link (i,) names. | bincount adds ones; this adds values.
    | eye(j)[link] sends element r to column link[r]. | values @ that matrix multiplies and adds up.""")
flatten = one("flatten(a, i, j)", "a(i,j) i j", "[a[r][c] for r in range(i) for c in range(j)]",
    "a[arange(i * j) // j, arange(i * j) % j]", """
    (i * j,): a (i, j) row after row. | Number the cells row by row. | Cell k is in row k // j. | Column k % j.""")
linspace = one("linspace(i, j, n)", "i(1) j(1) n",
    "[float(i[0] + (j[0] - i[0]) * k / max(n - 1, 1)) for k in range(n)]",
    "i + (j - i) * arange(n) / (n - 1 + (n == 1))", """
    (n,) floats in equal steps from i (1,) to j (1,), both included; i if n is 1. | From i, how far is place k on the
    way to j? | It has gone k / (n - 1) of j - i. | For n = 1 that divides by 0: add n == 1, which counts as 1.""")
heaviside = one("heaviside(a, b)", "a(i) b(i)", "[y if x == 0 else int(x > 0) for x, y in zip(a, b)]",
    "where(a == 0, b, where(a > 0, 1, 0))", """
    (i,): 0 where a (i,) is negative, 1 where it is positive, and b (i,) where it is 0. | Three outcomes: one where
    inside another. | Ask first whether a is 0. | The other two: where(a > 0, 1, 0).""")
repeat = one("repeat(a, d)", "a(i) d", "[[x for x in a] for r in range(d)]", "ones(d)[:, None] * a", """
    (d, i): a (i,) in each of d rows. | Broadcasting repeats: what must the other tensor look like? | A column of d,
    which changes nothing when multiplied. | ones(d)[:, None] is (d, 1).""")
bucketize = one("bucketize(v, boundaries)", "v(i) boundaries^(j)",
    "[sum(edge <= x for edge in boundaries) for x in v]",
    "1 * (v[:, None] >= boundaries) @ ones(boundaries.shape[0])", """
    (i,): for each of v (i,), how many of the sorted boundaries (j,) are at most as large. | Compare each with each
    boundary: (i, j). | 1 * turns true into 1. | @ ones counts along a row.""")

# ---- two: indexing as the other scripts need it --------------------------------------------------------------------
causal_mask = two("causal_mask(i, j)", "i j", "[[c <= r + j - i for c in range(j)] for r in range(i)]",
    "arange(j) <= arange(i)[:, None] + j - i", """
    (i, j) booleans: may query r see key c? Only what is not after it; the last query is at the last key. | Compare
    keys in a row with queries in a column. | Query i - 1 sees up to key j - 1. | Query r: up to r + j - i.""")
window_mask = two("window_mask(i, w)", "i w", "[[r - w < c <= r for c in range(i)] for r in range(i)]",
    "causal_mask(i, i) & (arange(i) > arange(i)[:, None] - w)", """
    (i, i) booleans: may query r see key c? Only the w newest keys up to and with its own place. | Two masks: the
    past, not too far back. | Query r sees w keys, r among them: the oldest is r - w + 1. | Join masks with &.""")
embedding = two("embedding(table, ids)", "table(V,C) ids<V(B,T)", "[[table[k] for k in row] for row in ids]",
    "table[ids]", """
    (B, T, C): for each of ids (B, T), that row of table (V, C). | Indexing with a tensor gives a result of that
    tensor's shape, … | … with the axes that were not indexed behind it. | Two names are enough.""")
grid = two("grid(h, w)", "h w", "[[r * w + c for c in range(w)] for r in range(h)]",
    "arange(h)[:, None] * w + arange(w)", """
    (h, w): the cells' numbers, counted row by row from 0. | What does one step down add, what one step to the right?
    | A step down adds a row's length, w. | Rows as a column: arange(h)[:, None] * w.""")
tiles = two("tiles(x, h, w, P)", "x(h*P,w*P) h w P",
    "[[[x[a * P + p][b * P:b * P + P] for p in range(P)] for b in range(w)] for a in range(h)]",
    "x[grid(h, P)[:, None, :, None], grid(w, P)[:, None]]", """
    (h, w, P, P): the picture x (h * P, w * P) cut into h × w squares of side P. | Row p of tile (a, b) is row a * P +
    p of the picture: that is grid(h, P)[a, p]. | Both index tensors must broadcast to (h, w, P, P), of which the rows
    fill axes 0 and 2, the columns 1 and 3. | Rows: grid(h, P)[:, None, :, None]. Columns: (w, 1, P).""")
patchify = two("patchify(x, h, w, P)", "x(h*P,w*P) h w P",
    "[[x[n // w * P + k // P][n % w * P + k % P] for k in range(P * P)] for n in range(h * w)]",
    "flatten(tiles(x, h, w, P), h, w)[:, arange(P * P) // P, arange(P * P) % P]", """
    (h * w, P * P): the squares of side P of the picture x (h * P, w * P), row by row, each as a row of pixels. |
    First tiles, then join its first two axes, then its last two. | flatten(…, h, w) does the first two: (h * w, P,
    P). | For the last two do what flatten does, behind a colon: [:, k // P, k % P] with k = arange(P * P).""")
upsample = two("upsample(a, P)", "a(h,w) P", "[[x for x in row for q in range(P)] for row in a for p in range(P)]",
    "a[arange(a.shape[0] * P)[:, None] // P, arange(a.shape[1] * P) // P]", """
    (h * P, w * P): each cell of a (h, w) as a square of side P. | Row r of the large picture comes from row r // P. |
    Row numbers as a column, column numbers as a row: (h * P, w * P). | There are a.shape[0] * P rows.""")
unpatchify = two("unpatchify(p, h, w, P)", "p(h*w,P*P) h w P",
    "[[p[r // P * w + c // P][r % P * P + c % P] for c in range(w * P)] for r in range(h * P)]",
    "p[upsample(grid(h, w), P), arange(h * P)[:, None] % P * P + arange(w * P) % P]", """
    (h * P, w * P): patchify undone, from p (h * w, P * P). | Each pixel comes from a patch and a place in it: two
    index tensors (h * P, w * P). | The patch: upsample(grid(h, w), P). | The place: row % P * P + column % P.""")
split_heads = two("split_heads(x, H, D)", "x(B,T,H*D) H D",
    "[[[token[h * D:h * D + D] for token in tokens] for h in range(H)] for tokens in x]",
    "x[:, arange(x.shape[1])[:, None], grid(H, D)[:, None]]", """
    (B, H, T, D): the columns of x (B, T, H * D) cut into H heads. | Head h has the columns in row h of grid(H, D). |
    A colon keeps the batch; tokens (T, 1) and columns broadcast to (H, T, D). | Columns: grid(H, D)[:, None].""")
merge_heads = two("merge_heads(x, H, D)", "x(B,H,T,D) H D",
    "[[[heads[h][t][c] for h in range(H) for c in range(D)] for t in range(len(heads[0]))] for heads in x]",
    "x[:, arange(H * D) // D, arange(x.shape[2])[:, None], arange(H * D) % D]", """
    (B, T, H * D): split_heads undone, from x (B, H, T, D). | Column c of the answer is of head c // D. | In that head
    it is column c % D. | A colon for the batch, then three tensors that broadcast to (T, H * D).""")
expand_kv = two("expand_kv(k, H)", "k(G,T,D) H=G*r", "[k[h // (H // len(k))] for h in range(H)]",
    "k[arange(H) // (H // k.shape[0])]", """
    (H, T, D): the keys k (G, T, D) of grouped queries, each head repeated in place until there are H. | H // G query
    heads share a key head. | Query head h uses key head h // (H // G). | Index the first axis with that.""")
ids_restore = two("ids_restore(ids)", "ids!(n)", "[ids.index(k) for k in range(len(ids))]",
    "scatter_add(arange(ids.shape[0]), ids, ids.shape[0])", """
    (n,): the order that undoes the shuffle ids (n,), a permutation: x[ids][ids_restore(ids)] is x. | If place k took
    the element of place ids[k], then ids[k] must take it back from k. | Write k to place ids[k]: nothing else lands
    there. | scatter_add writes values to places: the values are arange.""")
positives = two("positives(n)", "n", "[k + n if k < n else k - n for k in range(2 * n)]",
    "(arange(2 * n) + n) % (2 * n)", """
    (2 * n,): rows 0 … n - 1 are views of n pictures, the next n second views of them: where each row's other one is.
    | Picture k's other view is in row k + n. | And in the second half? | % (2 * n).""")
rotate_half = two("rotate_half(x, D)", "x.(T,2*h) D=2*h", "[[-y for y in row[D // 2:]] + row[:D // 2] for row in x]",
    "where(arange(D) < D // 2, -1, 1) * x[:, (arange(D) + D // 2) % D]", """
    (T, D): the halves of each row of x (T, D) exchanged, the new first one negated; D is even. | roll, but by half a
    row. | The columns come from (arange(D) + D // 2) % D. | A row of -1 and 1 sets the signs.""")
rope = two("rope(x, cos, sin, D)", "x.(T,2*h) c.(T,h) s.(T,h) cos=c.repeat(1,2) sin=s.repeat(1,2) D=2*h",
    "[[r[k] * c[k] + (r[k - D // 2] if k >= D // 2 else -r[k + D // 2]) * s[k] for k in range(D)] for "
    "r, c, s in zip(x, cos, sin)]", "x * cos + rotate_half(x, D) * sin", """
    (T, D): rotary positions: each pair x[t][k], x[t][k + D / 2] is turned by an angle, of which cos and sin (T, D)
    hold cosine and sine, the same in both halves of a row. | (a, b) turned is (a cos - b sin, b cos + a sin). | a and
    b stand half a row apart. | rotate_half brings -b to a's place and a to b's.""")

# ---- three: backward by hand ---------------------------------------------------------------------------------------
# d is always the gradient that arrives: the loss's, for what the forward pass gave; rows are samples, specs get doubles
rowsum = three("rowsum(x)", "x.(B,n)", "x.sum(1, keepdim=True)", "x @ (0 * x[0] + 1)[:, None]", """
    (B, 1): the sum of each row of x (B, n). | x @ a column of ones. | ones(n) is of integers, and @ wants one dtype:
    make floats, as x has. | 0 * x[0] + 1 is a row of ones of x's dtype.""")
colsum = three("colsum(x)", "x.(B,n)", "x.sum(0)", "(0 * x[:, 0] + 1) @ x", """
    (n,): the sum of each column of x (B, n). | A row of ones @ x. | It is as long as a column. | 0 * x[:, 0] + 1.""")
linear = three("linear(x, w, b)", "x.(B,n) w.(n,m) b.(m)", "F.linear(x, w.mT, b)", "x @ w + b", """
    (B, m): y = x w + b, from x (B, n), w (n, m), b (m,). | @ does all rows. | b broadcasts. | x @ w, plus b.""")
linear_backward = three("linear_backward(d, x, w)", "d.(B,m) x.(B,n) w.(n,m)",
    "gradients(lambda x, w, b: x @ w + b, d, x, w, torch.zeros_like(d[0]))", "d @ w.mT, x.mT @ d, colsum(d)", """
    The loss's gradients (B, n), (n, m), (m,) for linear's x, w, b; d (B, m) is that for its y. | y_rc = Σ_k x_rk w_kc
    + b_c. So x_rk gets w_kc d_rc from each column c: Σ_c d_rc w_kc. | A sum over the common letter c is a matrix
    product: d wᵀ. Likewise w_kc gets Σ_r x_rk d_rc. | That is xᵀ d; and b_c, which all rows share, gets Σ_r d_rc.""")
add_backward = three("add_backward(d)", "d.(B,m)",
    "gradients(lambda x, b: x + b, d, torch.zeros_like(d), torch.zeros_like(d[0]))", "d, colsum(d)", """
    Gradients (B, m), (m,) of x (B, m) and b (m,), where y = x + b; d is (B, m). | y_rc = x_rc + b_c: both have slope
    1. | x_rc is in one cell of y, b_c in B of them. | What broadcasts forward is summed backward.""")
relu_backward = three("relu_backward(d, x)", "d.(B,n) x.(B,n)", "gradients(F.relu, d, x)", "where(x > 0, d, 0)", """
    Gradient (B, n) of x, where y = relu(x) = max(x, 0). | Its slope is 1, or 0. | Slope times d. | d where x > 0.""")
gelu = three("gelu(x)", "x.(B,n)", "F.gelu(x)", "x * (1 + erf(x / 2 ** 0.5)) / 2", """
    (B, n): x Φ(x), where Φ(x) is the probability that a standard normal variable is below x. | Φ(x) =
    (1 + erf(x / √2)) / 2. | √2 is 2 ** 0.5. | x times Φ(x).""")
gelu_backward = three("gelu_backward(d, x)", "d.(B,n) x.(B,n)", "gradients(F.gelu, d, x)",
    "d * ((1 + erf(x / 2 ** 0.5)) / 2 + x * exp(-x * x / 2) / (2 * pi) ** 0.5)", """
    Gradient (B, n) of gelu's x. | (x Φ)' = Φ + x Φ'. | Φ' is φ(x) = exp(-x² / 2) / √(2π). | d * (Φ + x φ).""")
logsumexp = three("logsumexp(x)", "x~(B,n)", "x.logsumexp(1, keepdim=True)",
    "rowmax(x) + log(rowsum(exp(x - rowmax(x))))", """
    (B, 1): log of the sum of exp(x) of each row of x (B, n), of numbers like 1000 too. | exp(1000) is infinite. | For
    any m: log Σ exp(x) = m + log Σ exp(x - m). | m = rowmax(x).""")
logsumexp_backward = three("logsumexp_backward(d, x)", "d.(B,1) x~(B,n)",
    "gradients(lambda x: x.logsumexp(1, keepdim=True), d, x)", "d * exp(x - logsumexp(x))", """
    Gradient (B, n) of logsumexp's x; d is (B, 1). | (log s)' = s' / s, where s = Σ_k exp(x_k). | ∂s / ∂x_c =
    exp(x_c), so the slope is exp(x_c) / s. | exp(x) / s = exp(x - log s), which can't overflow.""")
softmax = three("softmax(x)", "x~(B,n)", "x.softmax(1)", "exp(x - logsumexp(x))", """
    (B, n): exp(x) over its sum, each row of x (B, n), large too. | Over Σ exp(x_k). | Less its log. | exp(x - …).""")
softmax_backward = three("softmax_backward(d, y)", "d.(B,n) y%(B,n)", "gradients(lambda x: x.softmax(1), d, y.log())",
    "y * (d - rowsum(d * y))", """
    Gradient (B, n) of softmax's x, given y = softmax(x), which the forward pass has kept; d is (B, n). | y_c =
    exp(x_c - l), l = logsumexp(x): ∂y_c / ∂x_k = y_c ([c = k] - y_k), [c = k] 1 if so, else 0. | Sum over c: x_k gets
    Σ_c d_c y_c ([c = k] - y_k) = d_k y_k - y_k Σ_c d_c y_c. | Take y out: y * (d - a sum of each row).""")
cross_entropy = three("cross_entropy(x, y)", "x~(B,n) y<n(B)", "F.cross_entropy(x, y).reshape(1)",
    "colsum(logsumexp(x) - x[arange(x.shape[0]), y][:, None]) / x.shape[0]", """
    (1,): mean over the rows of -log softmax(x)[y], from logits x (B, n) and classes y (B,). | -log of softmax(x)[y]
    is logsumexp(x) - x[y], for each row. | x[arange(B), y] picks from each row; it is (B,). | Make it a column to
    match logsumexp; then colsum and divide by B = x.shape[0].""")
cross_entropy_backward = three("cross_entropy_backward(d, x, y)", "d.(1) x~(B,n) y<n(B)",
    "gradients(lambda x: F.cross_entropy(x, y).reshape(1), d, x)",
    "d * (softmax(x) - eye(x.shape[1])[y]) / x.shape[0]", """
    Gradient (B, n) of cross_entropy's x; d is (1,). | A row's loss is logsumexp(x) - x_y: the slopes of the two parts
    are softmax(x) and -[c = y]. | [c = y] for all rows: rows of the identity, eye(n)[y]. | The mean divides by B.""")
rowmean = three("rowmean(x)", "x.(B,n)", "x.mean(1, keepdim=True)", "rowsum(x) / x.shape[1]", """
    (B, 1): the mean of each row of x (B, n). | Sum over count. | The sum: rowsum. | The count: x.shape[1].""")
centre = three("centre(x)", "x.(B,n)", "x - x.mean(1, keepdim=True)", "x - rowmean(x)", """
    (B, n): x (B, n), less the mean of each row. | A column broadcasts. | Which? | rowmean(x).""")
unit = three("unit(x)", "x.(B,n)", "F.rms_norm(x, x.shape[1:], eps=1e-5)", "x / (rowmean(x * x) + 1e-5) ** 0.5", """
    (B, n): x / √(mean of x² + 1e-5), each row of x (B, n): the heart of RMSNorm. | Divide each row by one number. |
    The mean square is rowmean(x * x). | Add 1e-5, and ** 0.5 is the root.""")
unit_backward = three("unit_backward(d, x)", "d.(B,n) x.(B,n)",
    "gradients(lambda x: F.rms_norm(x, x.shape[1:], eps=1e-5), d, x)",
    "(d - unit(x) * rowmean(d * unit(x))) / (rowmean(x * x) + 1e-5) ** 0.5", """
    Gradient (B, n) of unit's x; d is (B, n). | y = x / r with r = √(mean(x²) + 1e-5); ∂r / ∂x_k = x_k / (n r) = y_k /
    n. | y_c = x_c / r: ∂y_c / ∂x_k = ([c = k] - y_c y_k / n) / r. | Sum over c: (d_k - y_k mean(d y)) / r.""")
rmsnorm_backward = three("rmsnorm_backward(d, x, g)", "d.(B,n) x.(B,n) g.(n)",
    "gradients(lambda x, g: F.rms_norm(x, x.shape[1:], g, 1e-5), d, x, g)",
    "unit_backward(d * g, x), colsum(d * unit(x))", """
    Gradients (B, n), (n,) of x and g, where y = unit(x) * g; d is (B, n). | u = unit(x) gets d * g, by the product
    rule. | Then unit_backward. | g broadcasts, so its d * u is summed.""")
layernorm = three("layernorm(x, g, b)", "x.(B,n) g.(n) b.(n)", "F.layer_norm(x, x.shape[1:], g, b, 1e-5)",
    "unit(centre(x)) * g + b", """
    (B, n): (x - mean) / √(variance + 1e-5) of each row of x (B, n), times g (n,), plus b (n,). | LayerNorm is RMSNorm
    of what has mean 0. | The mean square is then the variance. | unit(centre(x)).""")
layernorm_backward = three("layernorm_backward(d, x, g)", "d.(B,n) x.(B,n) g.(n)",
    "gradients(lambda x, g, b: F.layer_norm(x, x.shape[1:], g, b, 1e-5), d, x, g, torch.zeros_like(g))",
    "centre(unit_backward(d * g, centre(x))), colsum(d * unit(centre(x))), colsum(d)", """
    Gradients (B, n), (n,), (n,) of layernorm's x, g and b; d is (B, n). | Back through b, g, unit, centre, of which
    centre is new: c_k = x_k - mean(x). | ∂c_c / ∂x_k = [c = k] - 1/n, so x_k gets d_k - mean(d): centre is its own
    backward. | x: centre(unit_backward(d * g, centre(x))); g and b: sums over rows.""")
embedding_backward = three("embedding_backward(d, ids, V)", "d.(n,C) ids<V(n) V",
    "gradients(lambda table: table[ids], d, d.new_zeros(V, d.shape[1]))", "(0 * d[:, :1] + eye(V)[ids]).mT @ d", """
    Gradient of the table (V, C), where y = table[ids], ids (n,); d is (n, C). | y_r = table[ids_r]: row k of the
    table gets the d of every r with ids_r = k, added up. | Looking up is a product with rows of the identity, y = E
    table; so the table gets Eᵀ d. | 0 * d[:, :1] + eye(V)[ids] is E in d's dtype.""")
conv1d = three("conv1d(x, w)", "x.(n+K-1) w.(K)", "F.conv1d(x[None], w[None, None])[0]",
    "x[arange(x.shape[0] - w.shape[0] + 1)[:, None] + arange(w.shape[0])] @ w", """
    (T - K + 1,): y_t = Σ_k x_{t+k} w_k, where all of the window is inside; x is (T,), w (K,). | Output t is the
    window x[t : t + K] times w. | All windows by one index tensor: t as a column plus k as a row. | x[…] @ w.""")
conv1d_backward = three("conv1d_backward(d, x, w, T, K)", "d.(n) x.(n+K-1) w.(K) T=n+K-1 K",
    "gradients(lambda x, w: F.conv1d(x[None], w[None, None])[0], d, x, w)",
    "pad_to(d, T - K + 1, T)[arange(T)[:, None] - arange(K)] @ w, conv1d(x, d)", """
    Gradients (T,), (K,) of conv1d's x and w; d is (T - K + 1,). | w_k is in every y_t, next to x_{t+k}: it gets Σ_t
    d_t x_{t+k}, a convolution of x with d. | x_s is in y_t for s = t + k, next to w_k: it gets Σ_k d_{s-k} w_k, where
    d is 0 outside. | Pad d to T: an index s - k below 0 then wraps round into the K - 1 zeros.""")
scores_backward = three("scores_backward(d, q, k)", "d.(T,S) q.(T,D) k.(S,D)",
    "gradients(lambda q, k: q @ k.mT / math.sqrt(q.shape[1]), d, q, k)",
    "d @ k / q.shape[1] ** 0.5, d.mT @ q / q.shape[1] ** 0.5", """
    Gradients (T, D), (S, D) of q and k, where y = q kᵀ / √D are attention's logits; d is (T, S). | As in
    linear_backward, w = kᵀ. | q gets d k / √D. | kᵀ gets qᵀ d / √D.""")
attention_backward = three("attention_backward(d, q, k, v, p)",
    "d.(T,C) q.(T,D) k.(S,D) v.(S,C) p=(q@k.mT/q.shape[1]**.5).softmax(1)",
    "gradients(lambda q, k, v: F.scaled_dot_product_attention(q[None], k[None], v[None])[0], d, q, k, v)",
    "*scores_backward(softmax_backward(d @ v.mT, p), q, k), p.mT @ d", """
    Gradients of q (T, D), k (S, D), v (S, C), where y = p v and p = softmax(q kᵀ / √D) was kept; d is (T, C). | y = p
    v is linear: p gets d vᵀ, v gets pᵀ d. | From p to the scores: softmax_backward(d @ v.mT, p). | From the scores to
    q and k: scores_backward, whose two results a star puts before v's: *…, …""")
newmax = three("newmax(m, s)", "m.(B,1) s.(B,n)", "torch.maximum(m, s.amax(1, keepdim=True))",
    "where(m > rowmax(s), m, rowmax(s))", """
    (B, 1): the larger of m (B, 1) and the rows' largest of s (B, n). | Two columns. | rowmax(s). | where.""")
online_softmax = three("online_softmax(m, o, s, v)", "m.(B,1) o.(B,C) s.(B,n) v.(n,C)",
    "(new := torch.cat((m, s), 1).amax(1, keepdim=True), (o * m.exp() + s.exp() @ v) / new.exp())",
    "newmax(m, s), o * exp(m - newmax(m, s)) + exp(s - newmax(m, s)) @ v", """
    Flash attention, one block: new m (B, 1) and o (B, C), when scores s (B, n) and values v (n, C) come in. m is the
    largest score so far, o the sum of exp(score - m) times value. | o = Σ exp(s - m) v over the keys so far. With a
    new maximum M each old term must become exp(s - M) v. | exp(s - M) = exp(s - m) exp(m - M): one factor for all old
    terms, exp(m - M), at most 1. | The new keys add exp(s - M) @ v. (Ones in v give softmax's denominator.)""")

# ---- cases: small ones first, so that the first failure is about the smallest --------------------------------------
CASES = 500  # at least so many for each puzzle, the same in each run
@functools.cache
def parse_inputs(p):
    """p.inputs as [(name, kind, expression)], and the letters of the sizes that vary. i: a size, an int. D=2*h: one
    that follows. a(i,j): integers of that shape; before it may stand ? (booleans), <n (below n), ^ (sorted), ! (a
    permutation), . (doubles), ~ (doubles, large ones too), % (rows that sum to 1)."""
    parts = [re.fullmatch(r"(\w+)(=|<[^(]+|[?^!.~%]?)(.*)", token).groups() for token in p.inputs.split()]
    names = re.findall(r"(?<![.\w])[A-Za-z_]\w*", " ".join(f"{kind} {text or name}" for name, kind, text in parts))
    return parts, sorted({*names} - {name for name, _, text in parts if text})

@functools.cache
def cases(p):
    """[(sizes, draw)]: all combinations of sizes up to some limit, small ones first; a few draws of each."""
    parts, letters = parse_inputs(p)
    bare = not any(text for _, _, text in parts)  # only sizes: one letter's 50 cases are repeated, unchanged
    limit = {1: 50, 2: 23}[len(letters)] if bare else {1: 10, 2: 6, 3: 4}.get(len(letters), 3)
    sizes = sorted(itertools.product(range(1, limit + 1), repeat=len(letters)), key=lambda s: (math.prod(s), s))
    return [(dict(zip(letters, s)), draw) for s in sizes for draw in range(math.ceil(CASES / len(sizes)))]

def draw_inputs(p, sizes, draw):
    """Arguments for the puzzle: tensors and ints. Draw 1 has the least values and draw 2 the largest (all false, all
    true, full lengths), the others are random; the seed is the case itself."""
    r, values = random.Random(f"{p.name} {sizes} {draw}"), dict(sizes)
    for name, kind, text in parse_inputs(p)[0]:
        if kind == "=":
            values[name] = eval(text, {}, values)
        elif text:
            shape, low, high = eval(f"tuple([{text[1:-1]}])", {}, sizes), -4, 4
            n = math.prod(shape)
            if kind[:1] in ("?", "<"):
                low, high = 0, 1 if kind == "?" else eval(kind[1:], {}, sizes) - 1
            drawn = [{1: low, 2: high}.get(draw, r.randint(low, high)) for _ in range(n)]
            drawn = sorted(drawn) if kind == "^" else r.sample(range(n), n) if kind == "!" else drawn
            dtype = torch.bool if kind == "?" else torch.int64
            if kind in (".", "~", "%"):
                drawn, dtype = [r.gauss(0, 400 if kind == "~" and draw == 2 else 1) for _ in range(n)], torch.double
            t = torch.tensor(drawn, dtype=dtype).reshape(shape)
            values[name] = t.softmax(-1) if kind == "%" else t
    return [values[name] for name in p.params]

def wanted(p, args):
    """What the spec says, as a tuple of tensors."""
    if p.family == 3:
        return outputs_of(p.meaning, args)
    double = any(getattr(a, "dtype", None) == torch.double for a in args)
    found = p.meaning(*(a.tolist() if isinstance(a, torch.Tensor) else a for a in args))
    return torch.tensor(found, dtype=torch.double if double else None),

def wrong_cells(got, want):
    """Booleans where two tensors differ: doubles by more than 1e-8 of the largest, floats by 1e-5."""
    if not want.is_floating_point():
        return got != want
    return ~((got - want).abs() <= (1e-8 if want.dtype == torch.double else 1e-5) * want.abs().max().clamp(min=1e-3))

def outputs_of(function, args):
    """What the function gives, as a tuple."""
    found = function(*args)
    return found if isinstance(found, tuple) else (found,)

def compare(got, want):
    """What is wrong, and in which output, ("shape", 0) say: what is best mended first comes first. None: nothing."""
    if len(got) != len(want):
        return "type", 0
    for i, (g, w) in enumerate(zip(got, want)):
        what = ("type" if not isinstance(g, torch.Tensor) else "shape" if g.shape != w.shape else
                "dtype" if g.dtype != w.dtype else "value")
        if what != "value" or wrong_cells(g, w).any():
            return what, i

def examine(p, function):
    """None if the function passes all cases of the puzzle, else {case, error} or {case, got, what, output}."""
    for number, case in enumerate(cases(p)):
        args = draw_inputs(p, *case)
        want = wanted(p, args)
        try:
            got = outputs_of(function, args)
            if fault := compare(got, want):
                return dict(case=number, got=got[:9], what=fault[0], output=fault[1])
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            memory = isinstance(error, MemoryError) or "allocate memory" in text
            return dict(case=number, error=f"it asks for more than {MEMORY} MB of memory" if memory else text)

# ---- rules, and a learner's lines in a process of their own --------------------------------------------------------
MEMORY, SECONDS = 512, 3  # megabytes beyond torch's own, seconds of computing for one puzzle
ALLOWED = """Constant Name Load Call BinOp UnaryOp Compare Subscript Slice Tuple Starred Attribute Add Sub Mult Div
    Mod Pow FloorDiv MatMult BitAnd BitOr BitXor USub UAdd Invert Eq NotEq Lt LtE Gt GtE""".split()

def broken_rule(p, expression):
    """(node, message) for what the rules don't allow in the syntax tree of a line, or None."""
    attributes = ("shape", "mT") if p.family == 3 else ("shape",)
    queue = [(expression, expression, 0)]
    for node, place, depth in queue:  # no recursion, it may be deep; operators have no place of their own
        kind, message = type(node).__name__, None
        if depth > 40:
            message = "it is nested too deeply"
        elif kind not in ALLOWED:
            message = f"{kind} is not allowed, only arange, where, operators, indexing and the puzzles before"
        elif kind == "Constant" and not isinstance(node.value, (int, float, type(None), type(...))):
            message = f"{str(node.value)[:20]!r} is not allowed, only numbers"
        elif kind == "Name" and node.id not in p.params and node.id not in p.scope:
            message = f"{node.id} {'comes later' if node.id in PUZZLES else 'is not allowed'}"
        elif kind == "Attribute" and node.attr not in attributes:
            message = f".{node.attr} is not allowed, only .{' and .'.join(attributes)}"
        elif kind == "Call" and (not isinstance(node.func, ast.Name) or node.func.id in p.params):
            message = f"{ast.unparse(node.func)[:40]} can't be called, only arange, where and the puzzles before"
        elif kind == "Compare" and len(node.ops) > 1:
            message = "one comparison at a time: join two with &"
        if message:
            return place, message
        queue += [(child, child if hasattr(child, "lineno") else place, depth + 1)
                  for child in ast.iter_child_nodes(node)]

def read_answers(path="my_puzzles.py"):
    """{name: (line, None)}, or {name: (None, what rule it breaks)}; a puzzle that is still ... is left out."""
    if not Path(path).exists():
        raise UserError(f"no {path} here: python puzzles.py start writes it")
    with one_line(f"{path} can't be read"):
        if Path(path).stat().st_size > 1e6:
            raise UserError(f"{path} has over a megabyte: nothing in it was read")
        text = Path(path).read_bytes().decode("utf-8-sig")
        lines = re.split("\r\n?|\n", text)  # as Python counts them
        if long := [n for n, line in enumerate(lines, 1) if len(line) > 400]:
            raise UserError(f"{path}, line {long[0]}: longer than 400 characters, an answer takes 80")
        body, answers = ast.parse(text).body, {}
        if not body:
            raise UserError(f"{path} is empty: delete it, then python puzzles.py start writes a new one")
        for node in body:
            if not isinstance(node, ast.FunctionDef) or node.name not in PUZZLES:
                raise UserError(f"{path}, line {node.lineno}: want nothing but the puzzles' functions")
            p, last = PUZZLES[node.name], node.body[-1]
            plain = not node.decorator_list and ast.unparse(node.args) == ", ".join(p.params)
            if not plain or len(node.body) > 1 or not isinstance(last, ast.Return) or last.value is None:
                fault = node, f"want def {p.name}({', '.join(p.params)}): and one line, return and an expression"
            elif isinstance(last.value, ast.Constant) and last.value.value is ...:
                continue
            else:
                fault = broken_rule(p, last.value)
            answers[p.name] = None if fault else ast.unparse(last.value), None
            if fault:
                before = lines[fault[0].lineno - 1].encode()[:fault[0].col_offset].decode()  # Python counts bytes
                answers[p.name] = None, f"line {fault[0].lineno}, column {len(before) + 1}: {fault[1]}"
    return answers

def judge_lines(lines, pipe):
    """The child's work: examine {name: line} and send the results, one by one, under limits set by the system."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    torch.set_num_threads(1)  # threads don't survive a fork
    if resource and os.path.exists("/proc/self/statm"):
        limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for p, line in [(PUZZLES[name], line) for name, line in lines.items()]:
        if resource:
            limit = math.ceil(time.process_time()) + SECONDS
            resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        torch.set_default_dtype(torch.double if p.family == 3 else torch.float32)  # that of where(..., 1.0, 0.0)
        try:
            found = examine(p, p.function(line))
        except Exception as error:
            found = dict(case=0, error=" ".join(str(error).split())[:200])
        if found and "got" in found:  # lists travel better than tensors
            found["got"] = [repr(t)[:80] if not isinstance(t, torch.Tensor) else
                            f"a tensor of shape {tuple(t.shape)}" if t.numel() > 10000 or t.numel() == 0 else
                            (t.tolist(), t.dtype) for t in found["got"]]
        pipe.send((p.name, found))

def judge(answers):
    """{name: None or what is wrong with it} for the answers; a line that takes the child down costs only itself. The
    child is a fork, which has torch at hand; where a system has none, it starts anew."""
    found = {name: dict(rule=fault) for name, (line, fault) in answers.items() if fault}
    left = {name: line for name, (line, fault) in answers.items() if not fault}
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    while left:
        receive, send = context.Pipe(duplex=False)
        child = context.Process(target=judge_lines, args=(left, send), daemon=True)
        sys.stdout.flush(), sys.stderr.flush()  # else the child would print it again
        child.start()
        send.close()
        try:
            with contextlib.suppress(EOFError):  # the system has stopped it
                while left and receive.poll(20 * SECONDS):
                    name, found[name] = receive.recv()
                    del left[name]
        finally:
            child.kill()
            child.join()
        if left:
            name = next(iter(left))
            found[name] = dict(error=f"stopped: over {SECONDS} seconds, or more memory than there is")
            del left[name]
    return {name: found[name] for name in answers}

# ---- what to tell --------------------------------------------------------------------------------------------------
def paint(text, colour):
    """Red (31), green (32) or grey (90) on a terminal, unless NO_COLOR is set (no-color.org)."""
    return f"\033[{colour}m{text}\033[0m" if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else text

def table(values, form):
    """Nested lists as lines of cells, blocks of more than two axes parted by blank lines."""
    if not isinstance(values, list):
        return form(values)
    gap = " " if not isinstance(values[0], list) else "\n\n" if isinstance(values[0][0], list) else "\n"
    return gap.join(table(v, form) for v in values)

def show_value(name, value):
    """A tensor with its dtype and shape, its cells in columns; an int."""
    if not isinstance(value, torch.Tensor):
        return f"{name} = {value}"
    form = "{:.4g}".format if value.is_floating_point() else str
    width = max(len(form(x)) for x in value.flatten().tolist())
    cells = table(value.tolist(), lambda x: form(x).rjust(width))
    return f"{name}: {str(value.dtype)[6:]} {tuple(value.shape)}\n{textwrap.indent(cells, '    ')}"

def likely(got, want):
    """What kind of mistake it looks like, or an empty string."""
    integers, flipped = not want.is_floating_point(), "transposed: which should lie down the rows, with [:, None]?"
    if got.shape != want.shape:
        near = [abs(m - n) for m, n in zip(got.shape, want.shape)] if got.dim() == want.dim() else [2]
        looks = {flipped: got.dim() > 1 and got.shape == want.shape[::-1],
                 "an axis of length 1 is missing or too many: [:, None] and [None] make one":
                     [n for n in got.shape if n > 1] == [n for n in want.shape if n > 1],
                 "an axis is missing: [:, None] makes one, for broadcasting to stretch": got.dim() < want.dim(),
                 "a length is off by one": max(near) == 1}
    elif got.dtype != want.dtype:
        looks = {"a comparison gives true or false: where(…, 1, 0) or 1 * (…) makes numbers": got.dtype == torch.bool,
                 "the comparison itself is the answer": want.dtype == torch.bool,
                 "/ makes floats of integers, // does not": integers, "integers, where floats are due": True}
    else:
        a, b = got.double(), want.double()
        factor, first, last = (a * b).sum() / (b * b).sum(), (..., slice(1, None)), (..., slice(-1))
        looks = {"integer ~: ~0 is -1 and ~1 is -2; a comparison or 1 - x turns 0 and 1 round":
                     integers and b.min() >= 0 and ((a == -1) | (a == -2)).any(),
                 flipped: a.dim() > 1 and a.shape == a.mT.shape and not wrong_cells(a.mT, b).any(),
                 "each cell is the same": a.numel() > 1 and (a == a.flatten()[0]).all(),
                 "off by one: shifted by a place": b.shape[-1] > 1 and (torch.equal(a[first], b[last]) or
                                                                        torch.equal(a[last], b[first])),
                 f"a factor of {factor:.4g}": b.numel() > 1 and factor and not wrong_cells(a, b * factor).any(),
                 "off by one: < or <=, or a start at 1 instead of 0?": integers and (a - b).abs().max() <= 1,
                 "not a number: too large for exp, or 0 / 0?": a.isnan().any()}
    return next((text for text, true in looks.items() if true), "")

def explain(p, found):
    """Print what is wrong with an answer: the case, wanted, got, the wrong cells, and what it looks like."""
    title, args = paint(f"✗ {p.number}. {p.name}", 31), draw_inputs(p, *cases(p)[found.get("case", 0)])
    if "case" not in found:
        return print(f"{title}: {found.get('rule') or found['error']}")
    want, got, i = wanted(p, args), found.get("got"), found.get("output", 0)
    print(f"{title}: case {found['case'] + 1} of {len(cases(p))} " +
          (f"can't be computed: {found['error']}" if "error" in found else f"has a wrong {found['what']}"))
    print("\n".join(map(show_value, p.params, args)))
    print(show_value(f"wanted, output {i + 1} of {len(want)}" if len(want) > 1 else "wanted", want[i]))
    if got is not None and (len(got) != len(want) or isinstance(got[i], str)):
        print(f"got {len(got)} outputs" if len(got) != len(want) else f"got {got[i]}")
    elif got:
        got = torch.tensor(got[i][0], dtype=got[i][1])
        print(show_value("got", got))
        if found["what"] == "value":
            cells = table(wrong_cells(got, want[i]).tolist(), lambda x: paint("X", 31) if x else paint(".", 32))
            print("wrong cells:\n" + textwrap.indent(cells, "    "))
        if kind := likely(got, want[i]):
            print(f"It looks like this: {kind}")

def example(p):
    """The sizes and the draw of a small case, not square."""
    return dict(zip(parse_inputs(p)[1], (3, 4, 2, 2))), 3

def show(p):
    """Print the puzzle: signature, statement, meaning, example."""
    args = draw_inputs(p, *example(p))
    print(f"{p.number}. {p.name}({', '.join(p.params)})\n", textwrap.fill(p.statement, 100),
          f"\n  {p.name} = {p.spec}\n\nFor example:", *map(show_value, p.params, args),
          *(show_value("gives", value) for value in wanted(p, args)), sep="\n")

def draw(p):
    """Write the puzzle's example as an SVG: an input cell has a colour of its own, an output cell those it came from,
    which are the input cells that, changed, change it."""
    (sizes, draw), svg, lines, y, width = example(p), [], [], 20, 300
    args, others = draw_inputs(p, sizes, draw), [draw_inputs(p, sizes, k) for k in (1, 2, 4, 5, 6)]
    outputs, inputs = outputs_of(p.solve, args), [n for n, a in enumerate(args) if isinstance(a, torch.Tensor)]
    came_from, places = {}, []  # {(output, cell): numbers of input cells}; where those are drawn
    tensors = [(p.params[n], args[n]) for n in inputs] + [(f"output {o + 1}", t) for o, t in enumerate(outputs)]
    total = max(1, len([x for n in inputs for x in args[n].flatten()]))
    for index, (name, t) in enumerate(tensors):
        svg.append(f'<text x="10" y="{y}">{name} {tuple(t.shape)}</text>')
        for cell, value in enumerate(t.flatten().tolist()):
            row, column = divmod(cell, t.shape[-1])
            x, top = 10 + 42 * column, y + 8 + 26 * row + (8 * (row // t.shape[-2]) if t.dim() > 2 else 0)
            if index < len(inputs):
                n, origins = inputs[index], [len(places)]
                places.append((x + 20, top + 24))
                for other in others:  # the same cell in another draw
                    new = torch.where(torch.arange(t.numel()).reshape(t.shape) == cell, other[n], t)
                    for o, (a, b) in enumerate(zip(outputs, outputs_of(p.solve, args[:n] + [new] + args[n + 1:]))):
                        for k in (a != b).flatten().nonzero().flatten().tolist():
                            came_from.setdefault((o, k), {})[origins[0]] = True
            else:
                origins = list(came_from.get((index - len(inputs), cell), ()))
                lines += [f'<path d="M{places[s][0]} {places[s][1]}L{x + 20} {top}" stroke="#8888"/>'
                          for s in origins if total < 16 and len(origins) < 4]
            hues = ["#%02x%02x%02x" % tuple(int(255 * part) for part in colorsys.hls_to_rgb(s / total, 0.8, 0.7))
                    for s in origins] or ["#fff"]
            svg += [f'<rect x="{x + 40 * i / len(hues):.1f}" y="{top}" width="{40 / len(hues):.1f}" height="24" '
                    f'fill="{hue}"/>' for i, hue in enumerate(hues)]  # stripes, one for each origin
            text = f"{value:.3g}" if isinstance(value, float) else value
            svg.append(f'<text x="{x + 20}" y="{top + 16}" text-anchor="middle">{text}</text>')
            width, bottom = max(width, x + 60), top + 54
        y = bottom
    write_svg(f"{p.name}.svg", f"0 0 {width} {y}", [*lines, *svg])
    print(f"wrote {p.name}.svg")

# ---- flow: board, start, hints -------------------------------------------------------------------------------------
def find(text):
    """The puzzle of that name or number."""
    names = [name for number, name in enumerate(PUZZLES, 1) if text in (name, str(number))]
    if not names:
        raise UserError(f"no puzzle {text[:40]!r}: want a name or a number from 1 to {len(PUZZLES)}")
    return PUZZLES[names[0]]

def used_help(name=None, used=None):
    """{name: number of hints used, or "revealed"}, kept in my_puzzles.json; with a name, noted there first."""
    path, help = Path("my_puzzles.json"), {}
    with one_line(f"{path} can't be read: delete it, only the count of hints is lost"):
        if path.exists():
            help = {PUZZLES[k].name: v if v == "revealed" else int(v) for k, v in json.loads(path.read_bytes()).items()}
    if name and help.get(name) != "revealed":
        help[name] = used
        write_atomic(path, json.dumps(help).encode())
    return help

def board():
    """Print all puzzles with a mark each, and what is next. Progress is worked out from the answers, never stored."""
    started = Path("my_puzzles.py").exists()
    found, help = judge(read_answers()) if started else {}, used_help()
    for family, title in enumerate(("The 21", "Indexing", "Backward by hand"), 1):
        ours, cells = [p for p in PUZZLES.values() if p.family == family], []
        print(f"{title}: {len([p for p in ours if found.get(p.name, 1) is None])} of {len(ours)}")
        for p in ours:
            mark, colour = ("·", 90) if p.name not in found else ("✗", 31) if found[p.name] else ("✓", 32)
            note = "hints: " * isinstance(help.get(p.name), int) + str(help.get(p.name, ""))
            cells.append(paint(mark, colour) + f" {p.number:2} {p.name:23}" + paint(f"{note:9}", 90))
        print("\n".join("  " + "".join(cells[i:i + 3]).rstrip() for i in range(0, len(cells), 3)))
    left = [name for name in PUZZLES if found.get(name, 1)]
    print("Begin: python puzzles.py start" if not started else f"Next: python puzzles.py show {left[0]}" if left else
          "All solved: python puzzles.py train --mine")

def start():
    """Write my_puzzles.py with a stub for each puzzle, unless there is one."""
    text = "# Your answers: put one expression in the place of each ... and run: python puzzles.py check\n"
    for p in PUZZLES.values():
        comment = textwrap.fill(p.statement, 100, initial_indent="    # ", subsequent_indent="    # ")
        text += f"\n# {p.number}\ndef {p.name}({', '.join(p.params)}):\n{comment}\n    return ...\n"
    if Path("my_puzzles.py").exists():
        raise UserError("my_puzzles.py is here already: it was left alone")
    write_atomic("my_puzzles.py", text.encode())
    print("wrote my_puzzles.py; next: python puzzles.py show 1")

def check(p=None):
    """Judge one answer, or all that were given. Returns 0 if they are right, else 1."""
    answers = read_answers()
    if p and p.name not in answers:
        return print(f"{p.name} is not answered yet: replace its ... in my_puzzles.py") or 1
    found = judge({p.name: answers[p.name]} if p else answers)
    for name, fault in found.items():
        right = f"✓ {PUZZLES[name].number}. {name}: right in {len(cases(PUZZLES[name]))} cases"
        explain(PUZZLES[name], fault) if fault else print(paint(right, 32))
    if not p:
        print(f"{list(found.values()).count(None)} right, {len(PUZZLES) - len(found)} not answered yet")
    return int(any(found.values()) or not found)

def selftest():
    """Our own answers, against the rules and all cases."""
    started = time.perf_counter()
    faults = {p: broken_rule(p, ast.parse(f"({p.solution}\n)", mode="eval").body) for p in PUZZLES.values()}
    found = judge({p.name: (p.solution, fault) for p, fault in faults.items()})
    for name in [name for name in found if found[name]]:
        explain(PUZZLES[name], found[name])
    print(f"{list(found.values()).count(None)} of {len(found)} right, {math.fsum(len(cases(p)) for p in faults):.0f} "
          f"cases, {time.perf_counter() - started:.1f} s")
    return int(any(found.values()))

# ---- train: a network whose forward and backward passes are the puzzles' answers -----------------------------------
@dataclasses.dataclass
class Config:
    mine: bool = False  # use the answers in my_puzzles.py where they are right
    width: int = 256  # of the hidden layer
    lr: float = 0.2  # peak learning rate
    momentum: float = 0.9  # share of the last step that goes into the next
    batch_size: int = 128  # pictures per step
    steps: int = 6000  # updates of the weights
    stop_at: int | None = None  # end at this step, the schedule unchanged
    eval_every: int = 500  # steps between evaluations, each followed by a checkpoint
    log_every: int = 50  # steps between log lines
    seed: int = 0  # of initial weights and batches
    out: str = "out/puzzles"  # the run's folder
    resume: bool = False  # go on from out/ckpt.pt, with that run's flags where none are given

    def __post_init__(self):
        for name, value in vars(self).items():
            low, most = name in ("momentum", "seed"), dict(momentum=0.999, seed=2**40, lr=1e18).get(name, 2**20)
            if value == "" or type(value) in (int, float) and not (0 < value <= most or value == 0 and low):
                want = "some text" if value == "" else f"{'' if low else 'above '}0 to {most}"
                raise UserError(f"--{name} {value!r}: want {want}")

# Shapes of about unit size: distance of (u, v) to the edge, negative inside; r: to the centre, box: to a square.
SHAPES = dict(
    circle=lambda u, v, r, box: r - 0.9, square=lambda u, v, r, box: box,
    triangle=lambda u, v, r, box: torch.maximum(0.866 * u.abs() + 0.5 * v, -v) - 0.5,
    ring=lambda u, v, r, box: (r - 0.72).abs() - 0.2,
    cross=lambda u, v, r, box: torch.maximum(torch.minimum(u.abs(), v.abs()) - 0.28, box - 0.1),
    star=lambda u, v, r, box: r - 0.62 - 0.3 * (5 * torch.atan2(v, u)).cos(),
    heart=lambda u, v, r, box: (u**2 + (v - 0.7 * u.abs() + 0.15) ** 2).sqrt() - 0.75,
    stripes=lambda u, v, r, box: torch.maximum(box, ((u * 1.8) % 1 - 0.5).abs() / 1.8 - 0.14),
    checkerboard=lambda u, v, r, box: torch.maximum(box, (u * 6.5).sin() * (v * 6.5).sin() * 0.15),
    crescent=lambda u, v, r, box: torch.maximum(r - 0.9, 0.75 - ((u - 0.45) ** 2 + v**2).sqrt()))

def make_shapes(n, seed):
    """Draw x (n, 256), grey pictures of 16 × 16 pixels, moved, turned, scaled, shaded, noisy; classes y (n,)."""
    g = torch.Generator().manual_seed(seed)
    uniform = lambda low, high: low + (high - low) * torch.rand(n, 1, generator=g)
    y = torch.randint(10, (n,), generator=g)
    rows, columns = torch.arange(256) // 16 - 7.5, torch.arange(256) % 16 - 7.5  # (256,)
    size, angle = uniform(4, 6), uniform(0, 2 * math.pi)
    v, u = (rows - uniform(-2, 2)) / size, (columns - uniform(-2, 2)) / size  # (n, 256)
    u, v = u * angle.cos() + v * angle.sin(), v * angle.cos() - u * angle.sin()
    r, box, distance = (u**2 + v**2).sqrt(), torch.maximum(u.abs(), v.abs()) - 0.85, torch.empty(n, 256)
    for k, shape in enumerate(SHAPES.values()):
        distance[y == k] = shape(u, v, r, box)[y == k]
    x = (0.5 - distance * size).clamp(0, 1) * uniform(0.5, 1) + uniform(-0.03, 0.03) * rows  # edges a pixel soft
    return (x + uniform(-0.03, 0.03) * columns + 0.15 * torch.randn(n, 256, generator=g) - 0.4) / 0.5, y

def logits_of(f, w, x):
    """The network on x (B, 256), and what its backward pass needs; f are the puzzles, w the weights."""
    a = f["linear"](x, w["w1"], w["b1"])  # (B, width)
    z = f["gelu"](a)
    n = f["layernorm"](z, w["g"], w["b"])
    return f["linear"](n, w["w2"], w["b2"]), a, z, n  # (B, 10)

def loss_and_gradients(f, w, x, y):
    """The loss (1,) of pictures x (B, 256) of classes y (B,), and its gradient for each weight."""
    (logits, a, z, n), grad = logits_of(f, w, x), {}
    loss = f["cross_entropy"](logits, y)
    d = f["cross_entropy_backward"](torch.ones_like(loss), logits, y)  # (B, 10), and back the same way
    d, grad["w2"], grad["b2"] = f["linear_backward"](d, n, w["w2"])  # (B, width)
    d, grad["g"], grad["b"] = f["layernorm_backward"](d, z, w["g"])
    _, grad["w1"], grad["b1"] = f["linear_backward"](f["gelu_backward"](d, a), x, w["w1"])
    return loss, grad

def initial_weights(c):
    """Small random matrices, from c.seed; biases 0, gains 1."""
    g, z = torch.Generator().manual_seed(c.seed), torch.zeros(c.width)
    return dict(w1=torch.randn(256, c.width, generator=g) / 16, b1=z, g=z + 1, b=z.clone(),
                w2=torch.randn(c.width, 10, generator=g) * 0.02, b2=torch.zeros(10))

def training_batch(c, x, y, step):
    """Pictures (B, 256), turned or mirrored one of 8 ways, and classes (B,): a function of seed and step alone."""
    g = torch.Generator().manual_seed(c.seed * 2**20 + step)
    index, way = torch.randint(len(x), (c.batch_size,), generator=g), torch.randint(8, (c.batch_size,), generator=g)
    ways = torch.stack([p.rot90(k).flatten() for p in (grid(16, 16), grid(16, 16).mT) for k in range(4)])  # (8, 256)
    return x[index[:, None], ways[way]], y[index]

def evaluate(f, w, name, x, y):
    """{loss, accuracy} on all of x, and a line that says them."""
    logits = logits_of(f, w, x)[0]
    loss, accuracy = f["cross_entropy"](logits, y).item(), (logits.argmax(1) == y).double().mean().item()
    return {f"{name}_loss": loss, f"{name}_accuracy": accuracy}, f"{name} loss {loss:.4f} | accuracy {accuracy:.4f}"

def layers(mine):
    """The functions that training needs: ours, or the learner's that are right."""
    f = {name: PUZZLES[name].solve for layer in ("linear", "gelu", "layernorm", "cross_entropy")
         for name in (layer, f"{layer}_backward")}
    if mine:
        answers = {name: answer for name, answer in read_answers().items() if name in f}
        right = [name for name, fault in judge(answers).items() if fault is None]
        f |= {name: PUZZLES[name].function(answers[name][0]) for name in right}
        print(f"yours: {', '.join(right) or 'none'}; ours: {', '.join(n for n in f if n not in right) or 'none'}")
    return f

@torch.no_grad()
def train(c, interrupts=()):
    """Train as the Config c says, into the folder c.out, until interrupts has something in it; returns the status."""
    print(" ".join(f"{name}={value!r}" for name, value in dataclasses.asdict(c).items()))
    f, out, w, lr = layers(c.mine), Path(c.out), initial_weights(c), 0.0
    state = dict(model=w, optimizer={k: 0 * p for k, p in w.items()}, step=0, best=-1.0, seconds=0.0, rows=[])
    if c.resume:
        with one_line(f"{out}/ckpt.pt can't be resumed"):
            saved = load_checkpoint(out / "ckpt.pt")
            if any(saved[part][name].shape != p.shape for name, p in w.items() for part in ("model", "optimizer")):
                raise UserError(f"{out}/ckpt.pt has another --width")
            state = {name: saved[name] for name in state}
    w, v, rows = state["model"], state["optimizer"], state["rows"]
    with one_line(f"can't make the folder {out}", status=1):
        out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "config.json", json.dumps(dataclasses.asdict(c), indent=2).encode())
    write_atomic(out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())

    def log(line, **row):
        rows.append({"step": state["step"], "seconds": state["seconds"], **row})
        print(line, flush=True)
        with one_line(f"can't write {out}/log.jsonl", status=1), open(out / "log.jsonl", "a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    def save(name):
        if not all(p.isfinite().all() for p in w.values()):
            raise UserError(f"infinite weight at step {state['step']}: lower --lr; {out} keeps the last checkpoint", 1)
        write_atomic(out / name, dict(state, config=dataclasses.asdict(c)))
    (x, y), val, test = make_shapes(20000, 1), make_shapes(1000, 2), make_shapes(2000, 3)
    end, first, losses, clock = min(c.steps, c.stop_at or c.steps), state["step"], [], time.perf_counter()
    while True:
        step, stop = state["step"], len(interrupts) > 0
        due = (step % c.eval_every == 0 or step >= end) and (step > first or not c.resume)
        if losses and (due or stop or step % c.log_every == 0):
            loss, ms = math.fsum(losses) / len(losses), 1e3 * (time.perf_counter() - clock) / len(losses)
            state["seconds"], rate = state["seconds"] + ms * len(losses) / 1e3, 1e3 * c.batch_size / ms
            log(f"step {step}/{c.steps} | loss {loss:.4f} | lr {lr:.1e} | {ms:.2f} ms | {rate:.0f} images/s",
                loss=loss, lr=lr, ms=ms, images_per_s=rate)
            clock, losses = time.perf_counter(), []
        if due:
            scores, text = evaluate(f, w, "val", *val)
            log(f"step {step}/{c.steps} | {text}", **scores)
            if scores["val_accuracy"] > state["best"]:
                state["best"] = scores["val_accuracy"]
                save("best.pt")
            curves = {name: [(row["step"], row[key]) for row in rows if key in row]
                      for name, key in (("val", "val_loss"), ("train", "loss"))}
            curves_svg(out / "curves.svg", curves, "step", "loss")
        if due or stop:
            save("ckpt.pt")
            clock = time.perf_counter()
        if step >= end or stop:
            break
        lr = c.lr * min(1, (step + 1) / 50) * (1 - step / c.steps)
        loss, grad = loss_and_gradients(f, w, *training_batch(c, x, y, step))
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise UserError(f"loss is {losses[-1]} at step {step}: lower --lr; {out} keeps the last checkpoint", 1)
        for name in w:
            v[name].mul_(c.momentum).add_(grad[name])
            w[name].sub_(v[name], alpha=lr)
        state["step"] += 1
    if stop:
        return print(f"stopped after step {step}; to go on: python puzzles.py train --resume --out {c.out}") or 130
    scores, text = evaluate(f, load_checkpoint(out / "best.pt")["model"], "test", *test)
    size = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / size if resource else math.nan
    log(f"{text} | {state['seconds']:.0f} s of training | peak {peak:.0f} MB", **scores, final=True, peak_mb=peak)
    return 0

# ---- files, command line -------------------------------------------------------------------------------------------
@contextlib.contextmanager
def one_line(message, status=2):
    """Turn whatever a broken file, disk or network raises inside into one line for the user."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(" ".join(f"{message} ({type(error).__name__}: {error})".split())[:400], status) from error

def write_atomic(path, content):
    """Write bytes, or a checkpoint's dict, under another name, then rename: path holds the old content or the new."""
    temporary = Path(f"{path}.tmp")
    try:
        with one_line(f"can't write {path}, what was there is kept", status=1):
            with open(temporary, "wb") as file:
                torch.save(content, file) if isinstance(content, dict) else file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError): temporary.unlink()  # a disk that can't be written has its message above

def load_checkpoint(path):
    """The dict that a run saved. weights_only: nothing is unpickled but tensors and plain values."""
    with one_line(f"{path} is not a checkpoint of this script"):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return {**saved, "model": {**saved["model"]}, "config": {**saved["config"]}}  # KeyError, TypeError: not ours

def write_svg(path, box, parts):
    """A picture of SVG elements; box: left, top, width and height."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" font-family="sans-serif" font-size="12">'
    paper = '<rect x="-100" y="-100" width="9999" height="9999" fill="white"/>'
    write_atomic(path, "\n".join([head, paper, *parts, "</svg>"]).encode())

def curves_svg(path, series, x_label, y_label):
    """A chart of {name: [(x, y), ...]}; the names stand in the corner in their lines' colours."""
    (x0, x1), (y0, y1) = [(min(v), max(v)) for v in zip(*(p for line in series.values() for p in line))]
    svg = [f'<text x="275" y="362" text-anchor="middle">{x_label}</text><text x="-62" y="-12">{y_label}</text>']
    for i in range(6):
        svg.append(f'<path d="M0 {320 - 64 * i}h550" stroke="#ddd"/>'
                   f'<text x="-8" y="{320 - 64 * i}" text-anchor="end">{y0 + (y1 - y0) * i / 5:.3g}</text>'
                   f'<text x="{110 * i}" y="340" text-anchor="middle">{x0 + (x1 - x0) * i / 5:.4g}</text>')
    for i, ((name, line), colour) in enumerate(zip(series.items(), ("#4477aa", "#ee6677"))):
        at = [(550 * (x - x0) / (x1 - x0 or 1), 320 * (y1 - y) / (y1 - y0 or 1)) for x, y in line]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        svg.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
                   f'<text x="540" y="{20 + 16 * i}" text-anchor="end" fill="{colour}">{name}</text>')
    write_svg(path, "-70 -30 640 400", svg)

def parse_flags(argv):
    """A Config from flags, one for each field, its comment as help. --resume starts from that run's flags."""
    def fail(message):
        raise UserError(f"{message}; see --help")
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.M))
    parser = argparse.ArgumentParser("puzzles.py train", description=__doc__, allow_abbrev=False, argument_default=
                                     argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    for field in dataclasses.fields(Config):
        kind = (typing.get_args(field.type) or [field.type])[0]  # int of int | None
        how = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=kind, metavar=kind.__name__)
        parser.add_argument(f"--{field.name}", help=f"{comments[field.name]} [{field.default}]", **how)
    flags = vars(parser.parse_args(argv))
    if flags.get("resume"):
        saved = load_checkpoint(f"{flags.get('out', Config.out)}/ckpt.pt")["config"]
        flags = {name: value for name, value in saved.items() if hasattr(Config, name) and name != "stop_at"} | flags
    return Config(**flags)

def command(word, *rest):
    """Do what the command line says; returns the exit status."""
    if word == "train":
        c, pressed = parse_flags(rest), []  # a first Ctrl-C stops between steps, a second at once
        old = signal.signal(signal.SIGINT, lambda *_: (pressed.append(True), signal.signal(signal.SIGINT, old)))
        try:
            return train(c, pressed)
        finally:
            signal.signal(signal.SIGINT, old)
    if word in ("start", "selftest") and not rest or word == "check" and len(rest) < 2:
        return dict(start=start, selftest=selftest, check=check)[word](*map(find, rest)) or 0
    if word not in ("show", "hint", "reveal", "draw") or len(rest) != 1:
        raise UserError(f"{' '.join([word, *rest])[:60]}: want start, show N, check [N], hint N, reveal N, draw N, "
                        "selftest or train; see --help")
    if word in ("show", "draw"):
        return dict(show=show, draw=draw)[word](find(rest[0])) or 0
    p, used = find(rest[0]), used_help()
    number = 3 if used.get(p.name) == "revealed" else min(used.get(p.name, 0) + 1, 3)
    used_help(p.name, number if word == "hint" else "revealed")
    print(f"Hint {number} of 3: {p.hints[number - 1]}" if word == "hint" else p.solution)
    return 0

def main(argv=None):
    """Run the command line. Returns the exit status: 0, 1 for what is wrong, 2 for bad input, 130 after Ctrl-C."""
    try:
        argv = sys.argv[1:] if argv is None else argv
        return board() or 0 if not argv else command(*argv) if not {"-h", "--help"} & {*argv} else parse_flags(["-h"])
    except UserError as error:
        print(f"puzzles.py: {error}", file=sys.stderr)
        return error.status
    except SystemExit as error:  # --help
        return error.code or 0
    except KeyboardInterrupt:
        return 130

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # not every terminal has a ✓
    sys.exit(main())
