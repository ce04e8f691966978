r"""I-JEPA: from one part of an image, predict what another network makes of the rest.

The encoder, a Transformer, reads the context: one large block of an image's patches, from which a
few smaller blocks, the targets, are cut out. A narrower Transformer, the predictor, gets the
encoder's vectors and a target's place. It predicts what the target encoder, which has read the
whole image, outputs there [1]. Vectors, unlike pixels, can leave noise out. The target encoder is a
slow average of the encoder and gets no gradient. If the loss could also move the targets, its
easiest way down would be the same vector everywhere: features would collapse.

    python ijepa.py                                        # offline, on shapes that it draws
    python ijepa.py --no-stop_gradient --out out/collapse  # watch std and rankme fall
    python ijepa.py --data cifar10 --patch_size 4 --dim 192 --depth 6 --heads 3 --predictor_dim 96 \
        --predictor_depth 4 --batch_size 128 --warmup 140 --epochs 4
    python ijepa.py --compare out/ijepa/features.pt,out/resnet/features.pt  # run resnet.py first
    python vit.py --init out/ijepa/best.pt --lr 1e-3 --layer_decay 0.75     # fine-tune, with labels

What to expect (torch 2.13.0, one core of an AMD EPYC in bfloat16; assets/logs/ijepa/): by default a
linear probe is right on 33.3% of test shapes (random init 21.9%), and RankMe is 48 of 128.
Differs from [1]: images aren't cropped; two targets; blocks may touch the last row and column;
constant weight decay; Xavier initialisation. Features are the mean of the target encoder's vectors.

[1] I-JEPA, arXiv 2301.08243v3, and its code, github.com/facebookresearch/ijepa
[2] t-SNE, JMLR 9, 2579-2605 (2008)  [3] RankMe, 2210.02885v3  [4] SimSiam, 2011.10566v1
"""

import argparse
import copy
import dataclasses
import json
import math
import os
import shutil
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# B batch, N patches, K of them context, M in a target, C channels, D the predictor's, S image
# side. ids number patches row by row. In the evaluation N and M count images


class IJEPA(nn.Module):
    """Images (B, 3, S, S), context_ids (B, K), target_ids: a list of (B, M) -> loss. If not
    stop_gradient, the encoder makes the targets, too, and learns through them."""

    def __init__(self, image_size, patch_size, dim, depth, heads, predictor_dim, predictor_depth,
                 stop_gradient=True):
        super().__init__()
        self.encoder = Encoder(image_size, patch_size, dim, depth, heads)
        self.predictor = Predictor(self.encoder.grid**2, dim, predictor_dim, predictor_depth, heads)
        for name, w in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(w)
            elif w.dim() in (2, 4):  # at [1]'s std of .02 patches are tiny beside positions,
                nn.init.xavier_uniform_(w.data.flatten(1))  # and those are easy to predict
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.stop_gradient = stop_gradient

    def forward(self, images, context_ids, target_ids):
        targets = self.make_targets(images)  # (B, N, C)
        context = self.encoder(images, context_ids)  # (B, K, C)
        losses = []
        for ids in target_ids:  # a block at a time: none sees the others' places
            pred = self.predictor(context, context_ids, ids)  # (B, M, C)
            target = targets.take_along_dim(ids[:, :, None], dim=1)
            losses.append(F.smooth_l1_loss(pred, target))  # L2 in [1] 3, this in its code
        return sum(losses) / len(losses)

    def make_targets(self, images):
        """What is to be predicted, (B, N, C): each vector less its mean, over its std."""
        encoder = self.target_encoder if self.stop_gradient else self.encoder
        z = encoder(images)  # no gradient reaches the target encoder: it is frozen
        return F.layer_norm(z, z.shape[-1:])


class Encoder(nn.Module):
    """Images (B, 3, S, S) -> a vector for each patch, (B, N, C). Given ids (B, K) it sees no other
    patches: (B, K, C). Parameters are named as in timm; there is no class token."""

    def __init__(self, image_size, patch_size, dim, depth, heads):
        super().__init__()
        assert image_size % patch_size == 0, f"{image_size} pixels, patches of {patch_size}"
        self.grid = image_size // patch_size
        self.patch_embed = nn.Sequential(OrderedDict(  # cut into patches, project each
            proj=nn.Conv2d(3, dim, patch_size, stride=patch_size)))
        self.pos_embed = nn.Parameter(sincos_2d(dim, self.grid)[None], requires_grad=False)
        self.blocks = nn.ModuleList(PreNormBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, images, ids=None):
        x = self.patch_embed(images).flatten(2).mT + self.pos_embed  # (B, N, C)
        if ids is not None:
            x = x.take_along_dim(ids[:, :, None], dim=1)  # (B, K, C)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def features(self, images):
        """The mean of all patches' vectors, (B, C)."""
        return self(images).mean(dim=1)


class Predictor(nn.Module):
    """From the encoder's vectors (B, K, C) at context_ids (B, K), guess the target encoder's at
    target_ids (B, M): (B, M, C)."""

    def __init__(self, num_patches, dim, predictor_dim, depth, heads):
        super().__init__()
        positions = sincos_2d(predictor_dim, math.isqrt(num_patches))
        self.predictor_pos_embed = nn.Parameter(positions[None], requires_grad=False)
        self.predictor_embed = nn.Linear(dim, predictor_dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, predictor_dim))
        self.predictor_blocks = nn.ModuleList(
            PreNormBlock(predictor_dim, heads) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(predictor_dim, eps=1e-6)
        self.predictor_proj = nn.Linear(predictor_dim, dim)

    def forward(self, context, context_ids, target_ids):
        x = self.predictor_embed(context)  # (B, K, D)
        x = x + self.predictor_pos_embed[0, context_ids]
        gaps = self.mask_token + self.predictor_pos_embed[0, target_ids]  # (B, M, D)
        x = torch.cat((x, gaps), dim=1)  # (B, K + M, D)
        for block in self.predictor_blocks:
            x = block(x)
        x = self.predictor_norm(x[:, context_ids.size(1):])  # (B, M, D)
        return self.predictor_proj(x)


# ---- The Transformer's parts: x (B, N, C) -> (B, N, C)

class PreNormBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): arXiv 2010.11929v2 eq. 2 and 3."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SelfAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(  # each token alone: expand, GELU, project back
            fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SelfAttention(nn.Module):
    """softmax(q k^T / sqrt(D)) v over all tokens, in each of H heads (arXiv 1706.03762v7 eq. 1)."""

    def __init__(self, dim, heads):
        super().__init__()
        assert dim % heads == 0, f"{heads} heads don't divide {dim} channels"
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)  # q, k and v in one product
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, N, D)
        weights = (q @ k.mT / q.size(-1) ** 0.5).softmax(dim=-1)  # (B, H, N, N)
        y = weights @ v  # (B, H, N, D); for long sequences use F.scaled_dot_product_attention
        return self.proj(y.transpose(1, 2).reshape(B, N, C))


def sincos_2d(dim, grid):
    """Fixed positions (grid^2, dim), row by row: sines and cosines of x / 10000^(4 i / dim), then
    those of y (arXiv 1706.03762v7 3.5, once for each coordinate, in MAE's order)."""
    assert dim % 4 == 0, f"{dim} channels can't hold sines and cosines of x and y"
    frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(grid)[:, None] * frequency  # (grid, dim / 4)
    waves = torch.cat((angle.sin(), angle.cos()), dim=1)  # (grid, dim / 2)
    x, y = waves.repeat(grid, 1), waves.repeat_interleave(grid, dim=0)
    return torch.cat((x, y), dim=1).float()


# ---- Masks, and a step of training

def sample_masks(batch, grid, generator, targets=4, target_scale=(0.15, 0.2),
                 context_scale=(0.85, 1.0), aspect=(0.75, 1.5), device="cpu"):
    """Multi-block masks ([1] 3) of grid x grid patches: context_ids (B, K), and a list of
    target_ids (B, M). Scales are shares of the image, the aspect is height over width; sides are
    rounded, and a batch has one size of context and one of targets. A context is a square less all
    targets; an image left with less than a quarter of its patches draws new targets, up to ten
    times. Then contexts are cut at random to the shortest's length. ValueError if that is 0."""
    def uniform(low, high):
        return low + (high - low) * torch.rand((), generator=generator).item()

    def place(n, area, ratio):  # n blocks: (n, grid, grid), True inside
        sides = (area * ratio) ** 0.5, (area / ratio) ** 0.5
        height, width = (min(grid, max(1, round(side))) for side in sides)
        top = torch.randint(grid - height + 1, (n, 1), generator=generator)
        left = torch.randint(grid - width + 1, (n, 1), generator=generator)
        i = torch.arange(grid)
        rows = (i >= top) & (i < top + height)  # (n, grid)
        columns = (i >= left) & (i < left + width)
        return rows[:, :, None] & columns[:, None, :]

    N = grid**2
    square = place(batch, N * uniform(*context_scale), 1.0).flatten(1)  # (B, N)
    area = N * uniform(*target_scale)
    ratio = uniform(*aspect)
    target = torch.zeros(batch, targets, N, dtype=torch.bool)
    context = torch.zeros(batch, N)
    for _ in range(11):  # at first all are short, then those with too little left
        short = context.sum(dim=1) < N / 4  # (B,)
        target[short] = place(batch * targets, area, ratio).view(batch, targets, N)[short]
        context = square & ~target.any(dim=1)  # (B, N)
    K = int(context.sum(dim=1).min())
    if K == 0:
        raise ValueError(f"{targets} targets of {target_scale} leave nothing of a context")
    noise = torch.rand(batch, N, generator=generator)
    context_ids = (noise + context).topk(K).indices  # True adds 1: K random ids of the context
    target_ids = target.nonzero()[:, 2].view(batch, targets, -1)  # (B, targets, M)
    return context_ids.to(device), list(target_ids.to(device).unbind(dim=1))


def jepa_batch(c, images, step):
    """Images (B, 3, S, S) and their masks, drawn from (seed, step) alone."""
    epoch, position = divmod(step, max(1, len(images) // c.batch_size))
    order = np.random.default_rng((c.seed, 1, epoch)).permutation(len(images))
    index = torch.from_numpy(order[position * c.batch_size:][:c.batch_size])
    generator = torch.Generator().manual_seed(c.seed * 1_000_003 + step)
    masks = sample_masks(len(index), 32 // c.patch_size, generator, c.targets, device=images.device)
    return standardise(images[index]), *masks


def learning_rate(step, peak, warmup, steps):
    """Linear warm-up to peak, then half a cosine down to 0 (arXiv 1608.03983 eq. 5)."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = min(1, (step - warmup) / max(1, steps - warmup))
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


# ---- Data

CIFAR10 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
CIFAR10_STATS = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # mean and std of each channel


def load_cifar10(root):
    """train_x (50000, 3, 32, 32) uint8, train_y (50000,) int64, test_x, test_y, from the official
    binary files in root/cifar-10-batches-bin. If they aren't there, they are downloaded: 170 MB."""
    folder = Path(root) / "cifar-10-batches-bin"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        archive = folder.with_name("cifar-10-binary.tar.gz")
        torch.hub.download_url_to_file(CIFAR10, str(archive), CIFAR10_SHA256)
        shutil.unpack_archive(archive, root)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    data = np.concatenate([np.fromfile(folder / name, np.uint8) for name in names])
    if len(data) != 60000 * 3073 or data[::3073].max() > 9:
        raise ValueError(f"{folder} is not CIFAR-10's: delete it and try again")
    data = torch.from_numpy(data.reshape(60000, 3073))  # a label and 3,072 bytes: red, green, blue
    x, y = data[:, 1:].reshape(-1, 3, 32, 32), data[:, 0].long()
    return x[:50000], y[:50000], x[50000:], y[50000:]


def make_shapes(n, seed):
    """Draw x (n, 3, 32, 32) uint8 and y (n,) int64: outlines r = .65 + .3 cos(lobes angle) with 0,
    2, 3, 4 or 5 lobes, filled (classes 0 to 4) or hollow (5 to 9), among clutter and noise."""
    g = torch.Generator().manual_seed(seed)

    def uniform(low, high, channels=1):
        return low + (high - low) * torch.rand(n, channels, 1, 1, generator=g)

    y = torch.randint(10, (n,), generator=g)
    lobes = torch.tensor([0, 2, 3, 4, 5])[y % 5].view(n, 1, 1, 1)
    hollow = (y >= 5).view(n, 1, 1, 1)
    row, column = torch.arange(32)[:, None] - 15.5, torch.arange(32) - 15.5
    v = row - uniform(-4, 4)  # (n, 1, 32, 1)
    u = column - uniform(-4, 4)  # (n, 1, 1, 32)
    angle = torch.atan2(v, u) + uniform(0, 2 * math.pi)  # (n, 1, 32, 32)
    size = uniform(8, 12)
    outside = torch.hypot(u, v) / size - 0.65 - 0.3 * (lobes * angle).cos()  # negative inside
    outside = torch.where(hollow, (outside + 0.15).abs() - 0.15, outside)
    paper = uniform(0, 1, 3)
    ink = (paper + uniform(0.3, 0.7, 3)) % 1
    x = paper + (ink - paper) * (0.5 - outside * size).clamp(0, 1)  # (n, 3, 32, 32), soft edges
    for _ in range(3):  # clutter: small discs
        distance = torch.hypot(row - uniform(-16, 16), column - uniform(-16, 16))
        x = x + (uniform(0, 1, 3) - x) * (uniform(1, 2.5) - distance).clamp(0, 1)
    x = x + 0.05 * torch.randn(n, 3, 32, 32, generator=g)
    return (x * 255).round().clamp(0, 255).to(torch.uint8), y


def load_images(c):
    """(images, labels) to train, validate and test on."""
    if c.data == "shapes":
        return make_shapes(10000, 1), make_shapes(1000, 2), make_shapes(2000, 3)
    x, y, *test = load_cifar10(c.data_dir)
    cut = len(x) - c.val
    return (x[:cut], y[:cut]), (x[cut:], y[cut:]), test


# ---- Evaluation: what are the features worth?

def standardise(images):
    """uint8 (B, 3, H, W) to floats of about zero mean and unit variance."""
    mean, std = (torch.tensor(s, device=images.device)[:, None, None] for s in CIFAR10_STATS)
    return (images / 255 - mean) / std


@torch.no_grad()
def extract(encoder, split, autocast):
    """Features (N, C) that encoder makes of a split's images (N, 3, H, W) uint8, and the labels."""
    images, labels = split
    with autocast:
        return torch.cat([encoder(standardise(x)).float() for x in images.split(500)]), labels


def knn_accuracy(train_z, train_y, test_z, test_y, k=20, temperature=0.07):
    """Share of test features (M, C) whose label wins a vote of the k nearest training features
    (N, C). At cosine s a vote weighs exp(s / temperature) (arXiv 1805.01978v1 3.4)."""
    s = F.normalize(test_z, dim=1) @ F.normalize(train_z, dim=1).mT  # (M, N)
    s, nearest = s.topk(min(k, len(train_z)))  # (M, k), the largest first
    weights = ((s - s[:, :1]) / temperature).exp()  # s - max: exp can't overflow
    votes = F.one_hot(train_y)[nearest] * weights[:, :, None]  # (M, k, classes)
    return (votes.sum(dim=1).argmax(dim=1) == test_y).float().mean().item()


def linear_probe(train_z, train_y, val_z, val_y, test_z, test_y, steps=1000,
                 rates=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)):
    """Accuracy on test features (M, C) of a linear classifier of standardised training features
    (N, C): arXiv 2111.06377v3 A.1. SGD trains one for each rate; the best on validation counts."""
    var, mean = torch.var_mean(train_z, dim=0)
    train_z, val_z, test_z = ((z - mean) / (var + 1e-6).sqrt() for z in (train_z, val_z, test_z))
    classifiers = nn.Linear(train_z.size(1), len(rates) * 10).to(train_z)  # side by side
    for p in classifiers.parameters():
        nn.init.zeros_(p)
    optimizer = torch.optim.SGD(classifiers.parameters(), lr=1.0, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        index = torch.randint(len(train_z), (256,), generator=generator)
        logits = classifiers(train_z[index]).split(10, dim=1)  # for each rate (256, classes)
        loss = sum(rate * F.cross_entropy(x, train_y[index])  # lr is 1: rate acts as its lr
                   for rate, x in zip(rates, logits, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    val_right, test_right = (
        classifiers(z).unflatten(1, (-1, 10)).argmax(dim=2) == y[:, None]  # (M, rates)
        for z, y in ((val_z, val_y), (test_z, test_y)))
    best = val_right.sum(dim=0).argmax()
    return test_right[:, best].float().mean().item()


def test_encoders(c, encoders, splits, autocast, **row):
    """Test encoders: {suffix of the columns in the log: function of images (B, 3, H, W)}."""
    for name, encoder in encoders.items():
        train, val, test = (extract(encoder, split, autocast) for split in splits)
        row["knn" + name] = knn_accuracy(*train, *test)
        row["linear" + name] = linear_probe(*train, *val, *test)
        if name == "":  # the trained one: its features are kept, for ijepa.py --compare
            names = "train_z", "train_y", "test_z", "test_y"
            kept = (t[:10000].cpu().clone() for t in (*train, *test))
            save(f"{c.out}/features.pt", dict(zip(names, kept, strict=True), name=Path(c.out).name))
    log_row(c, **row, final=True)


def rankme(z):
    """How many dimensions features (N, C) fill: exp of the entropy of their singular values' shares
    ([3] eq. 1). 1: all lie on one line through 0."""
    sigma = torch.linalg.svdvals(z.cpu().double())
    p = sigma / sigma.sum().clamp(min=1e-12) + 1e-7
    return (-p * p.log()).sum().exp().item()


def evaluate(c, model, train_split, val, autocast):
    """A falling loss alone is no progress: targets may have become alike. over_mean is the loss
    over that of predicting each place's mean target: at 1 only the place is known. In a collapse
    the std of features of length sqrt(C) [4] falls towards 0, and rankme towards 1."""
    x, context_ids, target_ids = jepa_batch(dataclasses.replace(c, batch_size=1000), val[0], 0)
    with torch.no_grad(), autocast:
        loss = model(x, context_ids, target_ids)
        targets = model.make_targets(x)  # (B, N, C)
    ids = torch.cat(target_ids, dim=1)
    error = (targets - targets.mean(dim=0)).take_along_dim(ids[:, :, None], dim=1)
    of_mean = F.smooth_l1_loss(error, torch.zeros_like(error))
    few = [t[:4000] for t in train_split]
    train, val = (extract(model.target_encoder.features, split, autocast) for split in (few, val))
    std = F.normalize(val[0]).std(dim=0).mean() * c.dim**0.5
    return dict(
        val_loss=loss.item(), over_mean=(loss / of_mean).item(), std=std.item(),
        rankme=rankme(val[0]), knn=knn_accuracy(*train, *val),
        linear=linear_probe(*train, *val, *val))  # flatters: val picks its rate, too


def tsne(x, perplexity=30.0, steps=1000):
    """A map (N, 2) of points x (N, C) that keeps neighbours together ([2] Algorithm 1)."""
    U, sigma, _ = torch.pca_lowrank(x.double(), min(50, *x.shape))
    x = U * sigma  # (N, 50)
    D = torch.cdist(x, x).square()
    D = D / (D.mean() + 1e-30)
    D.fill_diagonal_(math.inf)  # no point is its own neighbour
    log_beta = torch.zeros_like(D[:, :1])
    for halving in range(40):  # bisect, until p_j|i ~ exp(-beta D_ij) is as wide as asked for
        p = (-log_beta.exp() * D).softmax(dim=1)
        wide = torch.special.entr(p).sum(dim=1, keepdim=True) > math.log(perplexity)
        log_beta = log_beta + torch.where(wide, 15.0, -15.0) / 2**halving
    P = (p + p.T).float() / (2 * len(x))
    y = 0.01 * torch.randn(len(x), 2)
    velocity = torch.zeros_like(y)
    gain = torch.ones_like(y)
    rate = max(50, len(x) / 48)  # as scikit-learn has it
    for step in range(steps):
        early = step < 250  # then P is 12 times too large: clusters gather while there is room
        kernel = 1 / (1 + torch.cdist(y, y).square())  # (N, N); q_ij is its share of the sum
        kernel.fill_diagonal_(0)
        pull = (12 * P if early else P) - kernel / kernel.sum()
        pull = pull * kernel
        gradient = 4 * (pull.sum(dim=1, keepdim=True) * y - pull @ y)  # of KL(P || Q): [2] eq. 5
        uphill = gradient * velocity > 0
        gain = torch.where(uphill, 0.8 * gain, gain + 0.2).clamp(min=0.01)
        velocity = (0.5 if early else 0.8) * velocity - rate * gain * gradient
        y = y + velocity
    return y


def compare(c):
    """--compare: probe features files, an untrained encoder and pixels, and draw t-SNE maps of
    2,000 test images. A tenth of the training features chooses the linear probe's rate."""
    import matplotlib.pyplot as plt  # pip install matplotlib
    device, autocast = choose_device(c.device, c.dtype)
    train, _, test = [[t[:10000].to(device) for t in split] for split in load_images(c)]
    torch.manual_seed(c.seed)
    fresh = IJEPA(32, *[getattr(c, name) for name in SHAPE]).to(device)
    rows = []
    for path in c.compare.split(","):
        f = torch.load(path, device, weights_only=True)
        rows.append([f[key] for key in ("name", "train_z", "train_y", "test_z", "test_y")])
    encoders = dict(random_init=fresh.encoder.features, pixels=nn.Flatten())
    for name, encoder in encoders.items():
        rows.append([name, *extract(encoder, train, autocast), *extract(encoder, test, autocast)])
    _, axes = plt.subplots(1, len(rows), figsize=(4 * len(rows), 4), layout="tight")
    for ax, (name, z, y, test_z, test_y) in zip(axes, rows, strict=True):
        assert torch.equal(test_y, test[1]), f"{name} isn't of --data {c.data}"
        cut = len(z) * 9 // 10
        fitted = z[:cut], y[:cut]
        knn = knn_accuracy(*fitted, test_z, test_y)
        linear = linear_probe(*fitted, z[cut:], y[cut:], test_z, test_y)
        print(f"{name:>12}  knn {knn:.4f}  linear {linear:.4f}", flush=True)
        points = tsne(test_z[:2000].cpu())  # (2000, 2)
        ax.scatter(points[:, 0], points[:, 1], s=3, c=test_y[:2000].cpu(), cmap="tab10")
        ax.set(title=name, xticks=[], yticks=[])
    plt.savefig(f"{c.out}/compare.png")


def show_masks(c):
    """--show_masks: masks.png. Each row is an image of a batch, its context and its targets."""
    import matplotlib.pyplot as plt  # pip install matplotlib
    x, context_ids, target_ids = jepa_batch(c, load_images(c)[0][0], 0)
    grid = 32 // c.patch_size
    columns = [x]
    for ids in (context_ids, *target_ids):
        seen = torch.zeros(len(x), grid**2).scatter(1, ids, 1.0).view(-1, 1, grid, grid)
        columns.append(x * F.interpolate(seen, (32, 32)))  # 0 is grey
    sheet = torch.cat(columns, dim=3)[:6].transpose(0, 1).flatten(1, 2)  # (3, 6 * 32, columns * 32)
    sheet = (sheet / 4 + 0.5).clamp(0, 1)
    plt.imsave(f"{c.out}/masks.png", sheet.permute(1, 2, 0).numpy())


# ---- Training

CHOICES = dict(data=("shapes", "cifar10"), dtype=("auto", "float32", "bfloat16"))
SHAPE = ("patch_size", "dim", "depth", "heads", "predictor_dim", "predictor_depth", "stop_gradient")


@dataclasses.dataclass
class Config:
    data: str = "shapes"  # drawn by this script; or cifar10
    data_dir: str = "data"  # where downloads land
    val: int = 5000  # images of cifar10, the last, to validate on; 0: pre-train on all
    out: str = "out/ijepa"
    init: str = ""  # start from this checkpoint; model flags must match
    compare: str = ""  # features.pt of any scripts, comma-separated: probe and draw them, and stop
    show_masks: bool = False  # draw masks.png, and stop
    targets: int = 2  # blocks to predict; [1] has 4, which leave less of the context
    patch_size: int = 8
    dim: int = 128  # C
    depth: int = 4  # blocks of the encoder
    heads: int = 4  # of encoder and predictor
    predictor_dim: int = 64  # D: narrow; [1] has 384 beside ViT-H's 1280
    predictor_depth: int = 2  # [1] has 12 blocks beside ViT-H's 32
    stop_gradient: bool = True  # no: the encoder makes the targets, and learns through them
    ema_start: float = 0.95  # the target encoder's momentum at first; it rises to 1. [1] has .996
    lr: float = 1e-3  # peak
    weight_decay: float = 0.04  # [1] ends with .4
    warmup: int = 100  # steps
    batch_size: int = 64
    epochs: float = 18.0
    eval_every: int = 0  # steps between evaluations, each with a checkpoint; 0: a quarter of a run
    log_every: int = 10
    seed: int = 0
    resume: bool = False  # go on from ckpt.pt in --out; repeat the run's other flags
    device: str = "auto"
    dtype: str = "auto"
    compile: bool = False


def choose_device(name, dtype):
    """The device, and autocast to bfloat16 where the hardware multiplies in it."""
    if name == "auto":
        name = torch.accelerator.current_accelerator(check_available=True) or "cpu"  # cuda or mps
    device = torch.device(name)
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        can = torch.cpu.get_capabilities()
        fast = can.get("avx512_bf16", False) or can.get("amx_bf16", False)
    enabled = fast if dtype == "auto" else dtype == "bfloat16"
    return device, torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def start_log(c, step):
    """Write config.json, and cut log.jsonl back to the step: to nothing if it is 0."""
    path = Path(c.out) / "log.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name("config.json").write_text(json.dumps(vars(c), indent=2))
    lines = path.read_text().splitlines(keepends=True) if step else []
    lines = [line for line in lines if json.loads(line)["step"] <= step and "final" not in line]
    path.write_text("".join(lines))


def log_row(c, **row):
    """Print a row and append it to log.jsonl."""
    print(" | ".join(f"{name} {value:.5g}" for name, value in row.items()), flush=True)
    with open(f"{c.out}/log.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


def save(path, state):
    """Write a checkpoint whole or not at all."""
    torch.save(state, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def train(c):
    """Pre-train as c says, keep the weights with the best kNN, and test those."""
    device, autocast = choose_device(c.device, c.dtype)
    loaded = load_images(dataclasses.replace(c, val=c.val or 5000))  # for the probes
    splits = train_split, val, _ = [[t.to(device) for t in split] for split in loaded]
    images = train_split[0] if c.val else torch.cat((train_split[0], val[0]))
    torch.manual_seed(c.seed)
    fresh = IJEPA(32, *[getattr(c, name) for name in SHAPE]).to(device)
    raw = copy.deepcopy(fresh)  # is trained; fresh stays as it is, to compare with
    if c.init:
        raw.load_state_dict(torch.load(c.init, device, weights_only=True)["model"])
    optimizer = torch.optim.AdamW([  # biases and norms don't decay; the frozen get no gradient
        dict(params=[p for p in raw.parameters() if p.dim() > 1], weight_decay=c.weight_decay),
        dict(params=[p for p in raw.parameters() if p.dim() == 1], weight_decay=0.0)], fused=True)
    steps = math.ceil(c.epochs * max(1, len(images) // c.batch_size))
    out = Path(c.out)
    step, best, seconds = 0, -1.0, 0.0
    if c.resume:
        saved = torch.load(out / "ckpt.pt", device, weights_only=True)
        assert saved["config"]["data"] == c.data, f"{out} has another --data"
        raw.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, best, seconds = saved["step"], saved["best"], saved["seconds"]
    assert step <= steps, f"--epochs {c.epochs} means {steps} steps, but the run is at step {step}"
    start_log(c, step)
    if step == 0:
        for name in ("best.pt", "ckpt.pt"):  # an older run's
            (out / name).unlink(missing_ok=True)
    print(f"{sum(p.numel() for p in raw.parameters()):,} parameters, {steps} steps on {device}")
    model = torch.compile(raw) if c.compile else raw
    while step < steps:
        started = time.perf_counter()
        batch = jepa_batch(c, images, step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, c.lr, c.warmup, steps)
        with autocast:
            loss = model(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        momentum = c.ema_start + (1 - c.ema_start) * step / steps
        with torch.no_grad():
            pairs = zip(raw.target_encoder.parameters(), raw.encoder.parameters(), strict=True)
            for slow, w in pairs:
                slow.lerp_(w, 1 - momentum)  # slow <- momentum slow + (1 - momentum) w
        loss = loss.item()
        duration = time.perf_counter() - started
        assert math.isfinite(loss), f"loss is {loss} at step {step}"
        step += 1
        seconds += duration
        if step % c.log_every == 0:
            log_row(c, step=step, loss=loss, lr=group["lr"], seconds=seconds,
                    images_per_s=len(batch[0]) / duration)
        if step % (c.eval_every or math.ceil(steps / 4)) == 0 or step == steps:
            scores = evaluate(c, raw, train_split, val, autocast)
            log_row(c, step=step, seconds=seconds, **scores)
            improved = scores["knn"] > best
            best = max(scores["knn"], best)
            state = dict(model=raw.state_dict(), encoder=raw.target_encoder.state_dict(),
                         encoder_config={n: getattr(c, n) for n in SHAPE[:4]} | dict(image_size=32),
                         optimizer=optimizer.state_dict(), config=vars(c), step=step, best=best,
                         seconds=seconds)
            if improved and c.val:
                save(out / "best.pt", state)
            save(out / "ckpt.pt", state)  # last: if a run dies in between, best.pt is new enough
    if c.val:
        raw.load_state_dict(torch.load(out / "best.pt", device, weights_only=True)["model"])
    encoders = {"": raw.target_encoder.features, "_random_init": fresh.encoder.features,
                "_pixels": nn.Flatten()}
    test_encoders(c, encoders, splits, autocast, step=step, seconds=seconds)


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
    Path(c.out).mkdir(parents=True, exist_ok=True)
    if c.compare:
        compare(c)
    elif c.show_masks:
        show_masks(c)
    else:
        train(c)


if __name__ == "__main__":
    main()
