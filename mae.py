r"""MAE: hide most of an image, and learn to see by painting in what is missing.

A masked autoencoder [1] cuts an image into patches and removes most of them at random. The encoder,
a Transformer, reads only those that are left, which makes it cheap. A smaller one, the decoder,
gets what the encoder made of them, with the same learned token in each gap, and predicts the
removed pixels. No label is used. Then the decoder is thrown away. Probes show what the encoder has
learned, and vit.py --init trains it further, with labels.

    python mae.py                                     # offline: shapes that it draws
    python mae.py --data cifar10 --dim 192 --depth 6 --heads 3 --decoder_dim 128 \
        --decoder_depth 2 --decoder_heads 4 --batch_size 256 --warmup 500 --epochs 23
    python vit.py --init out/mae/ckpt.pt --lr 1e-3 --layer_decay 0.75    # go on with labels
    python mae.py --reconstruct mae_visualize_vit_base --picture photo.jpg

What to expect (torch 2.13.0, one core of an AMD EPYC in bfloat16; assets/logs/mae/): python mae.py,
test images of shapes, linear probe 40.0% (random init 26.2%, pixels 16.9%) after 199 s of training.

Differs from [1]: by default a decoder of one block of 64 channels, not eight of 512. Images are
moved and mirrored, not cropped at random sizes (Table 1e: that costs little). A block mask is one
rectangle. Tokens don't decay. Probes read the mean of the patches, not the class token; the linear
one is trained by SGD on features without augmentation, not by LARS with crops (A.1).

[1] He et al. 2021, MAE, arXiv 2111.06377v3, and its code, github.com/facebookresearch/mae
"""

import argparse
import copy
import dataclasses
import json
import math
import os
import tarfile
import time
from collections import OrderedDict
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# Shapes: B batch, N patches (or all images), K of them kept, C channels, D the decoder's (in
# SelfAttention: a head's), H heads, P patch side, S image side; images are (B, 3, S, S)


class MAE(nn.Module):
    """Normalised images (B, 3, S, S) -> loss, predictions (B, N, 3 P^2), mask (B, N), 1: removed.

    norm_pix_loss: predict a patch's pixels less their mean, over their standard deviation ([1] 3).
    Parameters have the names of [1]'s code."""

    def __init__(self, image_size, patch_size, dim, depth, heads, decoder_dim, decoder_depth,
                 decoder_heads, norm_pix_loss=False):
        super().__init__()
        self.config = dict(image_size=image_size, patch_size=patch_size, dim=dim, depth=depth,
                           heads=heads, pool="cls")  # for vit.py, which reads the class token
        fits = image_size % patch_size == dim % heads == decoder_dim % decoder_heads == 0
        assert fits, f"sizes don't divide: {self.config}, {decoder_dim} and {decoder_heads}"
        self.patch_size = patch_size
        self.grid = image_size // patch_size
        self.norm_pix_loss = norm_pix_loss
        # the encoder
        self.patch_embed = nn.Sequential(OrderedDict(  # one matrix for all patches
            proj=nn.Conv2d(3, dim, patch_size, stride=patch_size)))
        self.pos_embed = fixed_positions(dim, self.grid)  # (1, 1 + N, C)
        self.blocks = nn.ModuleList(PreNormBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        # the decoder
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.decoder_pos_embed = fixed_positions(decoder_dim, self.grid)  # (1, 1 + N, D)
        self.decoder_blocks = nn.ModuleList(
            PreNormBlock(decoder_dim, decoder_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, 3 * patch_size**2)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))  # seen as a matrix
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, decoder_dim))
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))

    def forward(self, images, mask_ratio=0.75, noise=None):
        """noise (B, N) ranks patches: the K lowest are kept. By default it is uniform."""
        B, N = len(images), self.grid**2
        K = int(N * (1 - mask_ratio))
        assert 0 < K < N, f"mask_ratio {mask_ratio} keeps {K} of {N} patches"
        if noise is None:
            noise = torch.rand(B, N, device=images.device)
        shuffle = noise.argsort(dim=1)  # (B, N)
        restore = shuffle.argsort(dim=1)  # its inverse: where each patch is in the shuffled order
        x = self.encode(images, shuffle[:, :K])  # (B, 1 + K, C)
        pred = self.decode(x, restore)  # (B, N, 3 P^2)
        target, _, _ = self.target(images)
        error = (pred - target).square().mean(dim=2)  # (B, N)
        mask = (restore >= K).to(error)
        loss = (error * mask).sum() / mask.sum()  # over removed patches alone ([1] 3)
        return loss, pred, mask

    def encode(self, images, kept=None):
        """The class token and those patches whose numbers are in kept (B, K), or all of them, after
        all blocks: (B, 1 + K, C)."""
        x = self.patch_embed(images).flatten(2).mT  # (B, N, C)
        x = x + self.pos_embed[:, 1:]
        if kept is not None:
            x = x.gather(1, kept[:, :, None].expand(-1, -1, x.size(2)))  # (B, K, C)
        cls_token = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat((cls_token.expand(len(x), -1, -1), x), dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def decode(self, x, restore):
        """Predict the pixels of every patch, (B, N, 3 P^2), from x (B, 1 + K, C)."""
        x = self.decoder_embed(x)  # (B, 1 + K, D)
        B, N = restore.shape
        gaps = self.mask_token.expand(B, N + 1 - x.size(1), -1)  # (B, N - K, D)
        patches = torch.cat((x[:, 1:], gaps), dim=1)  # (B, N, D), still shuffled
        patches = patches.gather(1, restore[:, :, None].expand_as(patches))  # each in its place
        x = torch.cat((x[:, :1], patches), dim=1)  # (B, 1 + N, D)
        x = x + self.decoder_pos_embed  # all that tells one gap from another
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x[:, 1:]))

    def target(self, images):
        """What to predict, (B, N, 3 P^2), and each patch's mean and std, to get pixels back."""
        x = patchify(images, self.patch_size)
        if not self.norm_pix_loss:
            return x, 0.0, 1.0
        mean = x.mean(dim=2, keepdim=True)
        std = (x.var(dim=2, keepdim=True) + 1e-6).sqrt()  # unbiased, as in [1]'s code
        return (x - mean) / std, mean, std

    def features(self, images):
        """The mean of all patches' vectors, (B, C)."""
        return self.encode(images)[:, 1:].mean(dim=1)

    @classmethod
    def from_pretrained(cls, name_or_path, data_dir="data", **changes):
        """An MAE with weights that [1]'s authors published as mae_visualize_vit_base, _large, or
        _large_ganloss (450 MB to 1.3 GB), or from a file of their code or this script. Sizes are
        read from the tensors; official encoders have heads of 64 channels (of 80 if there are
        1280), decoders of 32. changes are other arguments of MAE: image_size, norm_pix_loss."""
        if name_or_path.startswith("mae_visualize"):
            url = f"https://dl.fbaipublicfiles.com/mae/visualize/{name_or_path}.pth"
            saved = torch.hub.load_state_dict_from_url(url, data_dir, "cpu", weights_only=True)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # their flags
                saved = torch.load(name_or_path, map_location="cpu", weights_only=True)
        flags = saved.get("config", {})  # of this script
        w = {name.removeprefix("module.").removeprefix("_orig_mod."): t
             for name, t in saved.get("model", saved).items()}
        blocks = [name.split(".")[0] for name in w if name.endswith("norm1.weight")]
        P, dim = w["patch_embed.proj.weight"].size(3), w["pos_embed"].size(2)
        decoder_dim = w["decoder_pos_embed"].size(2)
        sizes = dict(
            image_size=P * math.isqrt(w["pos_embed"].size(1) - 1), patch_size=P,
            dim=dim, depth=blocks.count("blocks"),
            heads=flags.get("heads", 16 if dim == 1280 else max(1, dim // 64)),
            decoder_dim=decoder_dim, decoder_depth=blocks.count("decoder_blocks"),
            decoder_heads=flags.get("decoder_heads", max(1, decoder_dim // 32)),
            norm_pix_loss=flags.get("norm_pix_loss", False))
        model = cls(**{**sizes, **changes})
        if model.pos_embed.shape != w["pos_embed"].shape:  # another image_size: other positions
            w.update(pos_embed=model.pos_embed, decoder_pos_embed=model.decoder_pos_embed)
        model.load_state_dict(w)
        return model


def patchify(images, P):
    """Images (B, 3, S, S) as patches (B, N, 3 P^2), row by row, and so the pixels of each patch."""
    B, _, S, _ = images.shape
    x = images.reshape(B, 3, S // P, P, S // P, P)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, 3 * P**2)


def unpatchify(patches, P):
    """The inverse: (B, N, 3 P^2) -> (B, 3, S, S)."""
    B, N, _ = patches.shape
    grid = math.isqrt(N)
    x = patches.reshape(B, grid, grid, P, P, 3)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, 3, grid * P, grid * P)


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
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)  # q, k and v in one product
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, N, D)
        weights = (q @ k.mT / q.size(-1) ** 0.5).softmax(dim=-1)  # (B, H, N, N)
        y = weights @ v  # (B, H, N, D). For long sequences F.scaled_dot_product_attention is faster
        return self.proj(y.transpose(1, 2).reshape(B, N, C))


def sincos_2d(dim, grid):
    """Fixed positions (grid^2, dim), row by row: sines, then cosines, of x / 10000^(4 i / dim), and
    behind them those of y. As in arXiv 1706.03762 3.5, for either coordinate, in MAE's order."""
    assert dim % 4 == 0, f"{dim} channels can't hold sines and cosines of x and y"
    frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(grid)[:, None] * frequency  # (grid, dim / 4)
    waves = torch.cat((angle.sin(), angle.cos()), dim=1)  # (grid, dim / 2)
    x, y = waves.repeat(grid, 1), waves.repeat_interleave(grid, dim=0)
    return torch.cat((x, y), dim=1).float()


def fixed_positions(dim, grid):
    """(1, 1 + grid^2, dim), not trained. The first row, the class token's, is 0."""
    table = F.pad(sincos_2d(dim, grid), (0, 0, 1, 0))
    return nn.Parameter(table[None], requires_grad=False)


# ---- Masks, batches, schedule

def mask_noise(kind, rng, B, grid):
    """Noise (B, grid^2): the patches with the most are removed ([1] Figure 6). rng is NumPy's.

    random: any. block: a rectangle around a random point, at most 3.3 times as long as wide, cut
    off by borders. grid: the same places in all 2 x 2 patches, so that ratio .75 leaves one."""
    noise = rng.random((B, grid, grid), np.float32)
    rows, columns = np.mgrid[:grid, :grid]
    if kind == "block":
        y, x = rng.uniform(-0.5, grid - 0.5, (2, B, 1, 1))
        stretch = 3.3 ** (rng.random((B, 1, 1)) - 0.5)  # sqrt(height / width)
        distance = np.maximum(abs(rows - y) / stretch, abs(columns - x) * stretch)
        noise = 1e-3 * noise - distance
    if kind == "grid":
        order = rng.permuted(np.tile(np.arange(4), (B, 1)), axis=1)  # (B, 4)
        noise += order[:, 2 * (rows % 2) + columns % 2]
    return torch.from_numpy(noise.reshape(B, grid**2).astype(np.float32))


def masked_batch(c, images, grid, step):
    """Images (B, 3, S, S), moved, mirrored and standardised, and the noise (B, N) of their masks: a
    function of (seed, step) alone."""
    n = len(images)
    epoch, position = divmod(step, max(1, n // c.batch_size))
    order = np.random.default_rng((c.seed, 1, epoch)).permutation(n)
    index = order[position * c.batch_size:][:c.batch_size]
    rng = np.random.default_rng((c.seed, 2, step))
    dy, dx = rng.integers(-c.crop, c.crop, (2, len(index)), endpoint=True)
    mirror = rng.integers(2, size=len(index)) == 1
    noise = mask_noise(c.mask, rng, len(index), grid).to(images.device)
    index, dy, dx, mirror = (torch.from_numpy(a).to(images.device) for a in (index, dy, dx, mirror))
    return standardise(augment(images, index, dy, dx, mirror)), noise


def augment(images, index, dy, dx, mirror):
    """images (N, C, S, S) at index (B,), moved by dy, dx (B,) pixels with reflected borders, and
    mirrored where mirror (B,). One gather: index every pixel of the output."""
    S = images.size(2)
    pixels = torch.arange(S, device=images.device)
    rows = pixels + dy[:, None]  # (B, S)
    columns = torch.where(mirror[:, None], S - 1 - pixels, pixels) + dx[:, None]
    rows, columns = (  # -1 becomes 1, S becomes S - 2
        S - 1 - (S - 1 - i.abs()).abs() for i in (rows, columns))
    # the axes of the indices on both sides of the slice come first: (B, S, S, C)
    x = images[index[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return x.permute(0, 3, 1, 2)  # (B, C, S, S)


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
IMAGENET_STATS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of official weights


def load_cifar10(root):
    """train_x (50000, 3, 32, 32) uint8, train_y (50000,) int64, test_x, test_y, from the official
    binary files in root/cifar-10-batches-bin. If they aren't there, they are downloaded: 170 MB."""
    root, parts = Path(root), []
    if not (root / "cifar-10-batches-bin").exists():
        root.mkdir(parents=True, exist_ok=True)
        archive = root / "cifar-10-binary.tar.gz"
        torch.hub.download_url_to_file(CIFAR10, str(archive), CIFAR10_SHA256)
        with tarfile.open(archive) as tar:
            tar.extractall(root, filter="data")
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        path = root / "cifar-10-batches-bin" / name
        records = np.fromfile(path, np.uint8)  # of a label and 3,072 bytes: red, green, blue
        if len(records) != 10000 * 3073 or records[::3073].max() > 9:
            raise ValueError(f"{path} is not CIFAR-10's: delete its folder and try again")
        parts.append(torch.from_numpy(records.reshape(10000, 3073)))
    data = torch.cat(parts)
    x, y = data[:, 1:].reshape(-1, 3, 32, 32), data[:, 0].long()
    return x[:50000], y[:50000], x[50000:], y[50000:]


def make_shapes(n, seed):
    """Draw x (n, 3, 32, 32) uint8 and y (n,) int64: outlines r = .65 + .3 cos(lobes angle) of 0, 2,
    3, 4 or 5 lobes, filled (classes 0 to 4) or hollow (5 to 9), anywhere, at any angle, in any
    colours. Clutter and noise hide them from a linear classifier."""
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


# ---- Evaluation and pictures

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


@torch.no_grad()
def knn_accuracy(train_z, train_y, test_z, test_y, k=20, temperature=0.07):
    """Share of test features (M, C) for whose label the k nearest training features (N, C) vote.
    At cosine s a vote weighs exp(s / temperature) (arXiv 1805.01978v1 3.4). Nothing is fitted."""
    train_z = F.normalize(train_z, dim=1)
    test_z = F.normalize(test_z, dim=1)
    s, nearest = (test_z @ train_z.mT).topk(min(k, len(train_z)))  # (M, k), the largest first
    weights = ((s - s[:, :1]) / temperature).exp()  # none overflows if the largest is 1
    votes = F.one_hot(train_y)[nearest] * weights[:, :, None]  # (M, k, classes)
    return (votes.sum(dim=1).argmax(dim=1) == test_y).float().mean().item()


def linear_probe(train_z, train_y, val_z, val_y, test_z, test_y, steps=1000,
                 rates=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)):
    """Accuracy on test features (M, C) of a linear classifier of training features (N, C), which
    are standardised, as in arXiv 2111.06377v3 A.1. SGD trains one for each of R rates; the best on
    validation counts."""
    mean = train_z.mean(dim=0)
    std = (train_z.var(dim=0) + 1e-6).sqrt()
    train_z, val_z, test_z = ((z - mean) / std for z in (train_z, val_z, test_z))
    classifiers = nn.Linear(train_z.size(1), len(rates) * 10).to(train_z)  # side by side
    for p in classifiers.parameters():
        nn.init.zeros_(p)
    optimizer = torch.optim.SGD(classifiers.parameters(), lr=1.0, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        index = torch.randint(len(train_z), (256,), generator=generator).to(train_z.device)
        logits = classifiers(train_z[index]).split(10, dim=1)  # for each rate (256, classes)
        losses = [F.cross_entropy(x, train_y[index]) for x in logits]
        loss = sum(rate * loss for rate, loss in zip(rates, losses, strict=True))
        optimizer.zero_grad()
        loss.backward()  # so that each classifier has a rate of its own
        optimizer.step()
        schedule.step()
    val_right, test_right = (
        classifiers(z).unflatten(1, (-1, 10)).argmax(dim=2) == y[:, None]  # (M, R)
        for z, y in ((val_z, val_y), (test_z, test_y)))
    best = val_right.sum(dim=0).argmax()
    return test_right[:, best].float().mean().item()


def test_encoders(c, encoders, splits, autocast, **row):
    """Read the test set, once: probe encoders, a dict of functions of images (B, 3, H, W). Names
    end the scores'. The trained one's is "": its features are kept, for ijepa.py --compare."""
    for name, encoder in encoders.items():
        train, val, test = (extract(encoder, split, autocast) for split in splits)
        row["knn" + name] = knn_accuracy(*train, *test)
        row["linear" + name] = linear_probe(*train, *val, *test)
        if name == "":
            train_z, train_y, test_z, test_y = (t[:10000].cpu().clone() for t in (*train, *test))
            save(f"{c.out}/features.pt", dict(name=Path(c.out).name, train_z=train_z,
                                              train_y=train_y, test_z=test_z, test_y=test_y))
    log_row(c, **row, final=True)


@torch.no_grad()
def draw_reconstructions(c, model, images, stats, path):
    """A sheet of images (B, 3, S, S) in 0 to 255: whole, what is left, and with removed patches as
    predicted. With norm_pix_loss these get the true mean and std, which the network never saw."""
    if not find_spec("matplotlib"):
        return print(f"for {path}: pip install matplotlib")
    import matplotlib.pyplot as plt
    mean, std = (torch.tensor(s, device=images.device)[:, None, None] for s in stats)
    x = (images / 255 - mean) / std
    noise = mask_noise(c.mask, np.random.default_rng(0), len(x), model.grid).to(x.device)
    loss, pred, mask = model(x, c.mask_ratio, noise)
    target, patch_mean, patch_std = model.target(x)
    pred = unpatchify(pred * patch_std + patch_mean, model.patch_size) * std + mean
    removed = unpatchify(mask[:, :, None].expand_as(target), model.patch_size) == 1
    left = torch.where(removed, 128, images)
    rebuilt = torch.where(removed, 255 * pred, images)
    sheet = torch.cat((images, left, rebuilt), dim=2).permute(2, 0, 3, 1).flatten(1, 2)
    plt.imsave(path, sheet.clamp(0, 255).byte().cpu().numpy())  # (3 S, B S, 3)
    print(f"loss {loss.item():.4f} | {path}: images, what is left of them, rebuilt")


def reconstruct(c):
    """--reconstruct: what a trained network makes of a picture, or of ten of the data's images."""
    import matplotlib.pyplot as plt  # pip install matplotlib
    model = MAE.from_pretrained(c.reconstruct, c.data_dir)
    images = load_images(c)[2][0][:10]
    if c.picture:
        pixels = plt.imread(c.picture)[..., :3]  # (height, width, 3), 0 to 1 if it is a PNG
        pixels = 255 * pixels if pixels.dtype == np.float32 else pixels
        images = torch.tensor(pixels).permute(2, 0, 1)[None]
    S = model.config["image_size"]
    images = F.interpolate(images.float(), (S, S), mode="bilinear", antialias=True)
    Path(c.out).mkdir(parents=True, exist_ok=True)
    stats = CIFAR10_STATS if S == 32 else IMAGENET_STATS
    draw_reconstructions(c, model, images, stats, f"{c.out}/reconstruct.png")


# ---- Training

CHOICES = dict(data=("shapes", "cifar10"), mask=("random", "block", "grid"),
               dtype=("auto", "float32", "bfloat16"))
SHAPE = ("patch_size", "dim", "depth", "heads", "decoder_dim", "decoder_depth", "decoder_heads",
         "norm_pix_loss")


@dataclasses.dataclass
class Config:
    data: str = "shapes"  # drawn by this script; or cifar10
    data_dir: str = "data"  # where downloads land
    val: int = 5000  # images of cifar10, the last, to validate on; 0: pre-train on all
    out: str = "out/mae"
    init: str = ""  # a checkpoint of this script, of the shape that the flags say
    mask: str = "random"  # patches that are removed: random, block (one rectangle), grid
    mask_ratio: float = 0.75  # share of them ([1] Figure 5)
    norm_pix_loss: bool = False  # predict normalised pixels ([1] Table 1d)
    patch_size: int = 4
    dim: int = 128  # C
    depth: int = 4  # blocks of the encoder
    heads: int = 4
    decoder_dim: int = 64  # D
    decoder_depth: int = 1  # enough to fine-tune; a linear probe wants more ([1] Table 1a)
    decoder_heads: int = 2
    crop: int = 4  # pixels by which images are moved at most
    lr: float = 1e-3  # peak; [1] has 1.5e-4 for each 256 images of a batch
    weight_decay: float = 0.05
    warmup: int = 40  # steps
    batch_size: int = 32
    epochs: float = 10.0
    probe_images: int = 4000  # training images for the probes during the run; at its end all
    reconstruct: str = ""  # draw what this network rebuilds, and stop: an official name or a file
    picture: str = ""  # an image file for --reconstruct, instead of the data's
    eval_every: int = 0  # steps between evaluations, each with a checkpoint; 0: a quarter of all
    log_every: int = 10
    seed: int = 0
    resume: bool = False  # go on from ckpt.pt in --out; repeat the run's other flags
    device: str = "auto"
    dtype: str = "auto"
    compile: bool = False


def choose_device(name, dtype):
    """The device, and autocast to bfloat16 where the hardware has products in it."""
    if name == "auto":
        found = torch.accelerator.is_available()  # cuda or mps
        name = torch.accelerator.current_accelerator().type if found else "cpu"
    if dtype == "auto":
        fast = name == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        if name == "cpu":
            can = torch.cpu.get_capabilities()
            fast = can.get("avx512_bf16") or can.get("amx_bf16")
        dtype = "bfloat16" if fast else "float32"
    device = torch.device(name)
    return device, torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def start_log(c, step):
    """Write config.json, and leave in log.jsonl what came before the step."""
    path = Path(c.out) / "log.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if step else []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name("config.json").write_text(json.dumps(dataclasses.asdict(c), indent=2))
    rows = [row for row in rows if row["step"] <= step and "final" not in row]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


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
    """Pre-train as c says, keep the weights that the linear probe likes best, and test those."""
    device, autocast = choose_device(c.device, c.dtype)
    splits = load_images(dataclasses.replace(c, val=c.val or 5000))  # the probe always wants some
    splits = train_split, val, _ = [[t.to(device) for t in split] for split in splits]
    images = train_split[0] if c.val else torch.cat((train_split[0], val[0]))
    torch.manual_seed(c.seed)
    fresh = MAE(32, **{name: getattr(c, name) for name in SHAPE}).to(device)
    raw = copy.deepcopy(fresh)  # trained, and not compiled; fresh stays as it began
    if c.init:
        raw.load_state_dict(torch.load(c.init, device, weights_only=True)["model"])
    optimizer = torch.optim.AdamW([  # biases, norms ([1] A.1) and, here, tokens don't decay
        dict(params=[p for p in raw.parameters() if p.dim() in (2, 4)]),
        dict(params=[p for p in raw.parameters() if p.dim() in (1, 3)], weight_decay=0.0)],
        betas=(0.9, 0.95), weight_decay=c.weight_decay, fused=True)
    steps = math.ceil(c.epochs * max(1, len(images) // c.batch_size))
    out, step, best, seconds = Path(c.out), 0, -1.0, 0.0
    if c.resume:
        saved = torch.load(out / "ckpt.pt", map_location=device, weights_only=True)
        for name in ("data", "val", *SHAPE):
            assert saved["config"][name] == getattr(c, name), f"{out} has another --{name}"
        raw.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, best, seconds = saved["step"], saved["best"], saved["seconds"]
    assert step < steps, f"--epochs {c.epochs} means {steps} steps, but the run is at step {step}"
    start_log(c, step)
    if step == 0:
        (out / "best.pt").unlink(missing_ok=True)  # an older run's
    print(f"{sum(p.numel() for p in raw.parameters()):,} parameters, {steps} steps on {device}")
    model = torch.compile(raw) if c.compile else raw
    while step < steps:
        started = time.perf_counter()
        x, noise = masked_batch(c, images, raw.grid, step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, c.lr, c.warmup, steps)
        with autocast:
            loss, _, _ = model(x, c.mask_ratio, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.item()
        duration = time.perf_counter() - started
        assert math.isfinite(loss), f"loss is {loss} at step {step}"
        step += 1
        seconds += duration
        if step % c.log_every == 0:
            log_row(c, step=step, loss=loss, lr=group["lr"], seconds=seconds,
                    images_per_s=len(x) / duration)
        if step % (c.eval_every or math.ceil(steps / 4)) == 0 or step == steps:
            scores = evaluate(c, raw, train_split, val, autocast)
            log_row(c, step=step, seconds=seconds, **scores)
            improved, best = scores["linear"] > best, max(scores["linear"], best)
            weights = raw.state_dict()
            encoder = {name: w for name, w in weights.items()
                       if not name.startswith(("decoder_", "mask_token"))}
            state = dict(model=weights, encoder=encoder, encoder_config=raw.config,
                         optimizer=optimizer.state_dict(), config=vars(c), step=step, best=best,
                         seconds=seconds)
            if improved and c.val:
                save(out / "best.pt", state)
            save(out / "ckpt.pt", state)  # the last: what it says of best.pt is true
    if c.val:
        raw.load_state_dict(torch.load(out / "best.pt", device, weights_only=True)["model"])
    encoders = {"": raw.features, "_random_init": fresh.features, "_pixels": nn.Flatten()}
    test_encoders(c, encoders, splits, autocast, step=step, seconds=seconds)
    draw_reconstructions(c, raw, val[0][:10], CIFAR10_STATS, out / "reconstructions.png")


def evaluate(c, model, train_split, val, autocast):
    """The loss on validation images, always with the same masks, and what probes make of their
    features. Here the linear one's rate is chosen on the images that it is scored on."""
    x = standardise(val[0][:1000])
    noise = mask_noise(c.mask, np.random.default_rng(0), len(x), model.grid).to(x.device)
    with torch.no_grad(), autocast:
        loss, _, _ = model(x, c.mask_ratio, noise)
    train_split = [t[:c.probe_images] for t in train_split]
    train, val = (extract(model.features, split, autocast) for split in (train_split, val))
    return dict(val_loss=loss.item(), knn=knn_accuracy(*train, *val),
                linear=linear_probe(*train, *val, *val))


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
    if c.reconstruct:
        reconstruct(c)
    else:
        train(c)


if __name__ == "__main__":
    main()
