r"""MAE: hide most of an image, and learn to see by painting in what is missing.

A masked autoencoder [1] removes most patches of an image at random. The encoder, a Transformer,
reads only those that are left, which makes it cheap. The decoder, a smaller one, gets what the
encoder made of them, with one learned token in each gap, and predicts the removed pixels. Then it
is thrown away: probes show what the encoder has learned, and vit.py --init trains it with labels.

    python mae.py                                     # offline: shapes that it draws
    python mae.py --data cifar10 --dim 192 --depth 6 --heads 3 --decoder_dim 128 --decoder_depth 2 \
        --decoder_heads 4 --norm_pix_loss --batch_size 256 --lr 1.5e-3 --warmup 137 --epochs 7.85
    python mae.py --reconstruct mae_visualize_vit_base --picture photo.jpg

What to expect (torch 2.13.0, one core of an AMD EPYC in bfloat16; assets/logs/mae/): after 179 s
a linear probe is right on 43.1% of test shapes (random init 26.2%). Differs from [1]: a decoder of
one block of 64 channels, not eight of 512; no crops or mirroring; block masks are squares.

[1] He et al. 2021, MAE, arXiv 2111.06377v3; parameter names: github.com/facebookresearch/mae
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
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# B batch, N patches, K of them kept, C channels, D the decoder's, P patch side, S image side


class MAE(nn.Module):
    """Normalised images (B, 3, S, S) -> loss, pixels (B, N, P^2 3), mask (B, N): 1 if removed."""

    def __init__(self, image_size, patch_size, dim, depth, heads, decoder_dim, decoder_depth,
                 decoder_heads, norm_pix_loss=False):
        super().__init__()
        assert image_size % patch_size == 0, f"{image_size} pixels, patches of {patch_size}"
        self.patch_size = patch_size
        self.grid = image_size // patch_size
        self.norm_pix_loss = norm_pix_loss
        self.patch_embed = nn.Sequential(OrderedDict(  # cut into patches, project each
            proj=nn.Conv2d(3, dim, patch_size, stride=patch_size)))
        positions = F.pad(sincos_2d(dim, self.grid), (0, 0, 1, 0))  # a row of 0 for the class token
        self.pos_embed = nn.Parameter(positions[None], requires_grad=False)  # (1, 1 + N, C)
        self.blocks = nn.ModuleList(PreNormBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        positions = F.pad(sincos_2d(decoder_dim, self.grid), (0, 0, 1, 0))
        self.decoder_pos_embed = nn.Parameter(positions[None], requires_grad=False)  # (1, 1 + N, D)
        self.decoder_blocks = nn.ModuleList(
            PreNormBlock(decoder_dim, decoder_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, 3 * patch_size**2)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))  # a view, as a matrix
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, decoder_dim))
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))

    def forward(self, images, mask_ratio=0.75, noise=None):
        """Keeps the K patches with the lowest noise (B, N), which is uniform by default."""
        B, N = len(images), self.grid**2
        K = int(N * (1 - mask_ratio))
        assert 0 < K < N, f"mask_ratio {mask_ratio} keeps {K} of {N} patches"
        if noise is None:
            noise = torch.rand(B, N, device=images.device)
        shuffle = noise.argsort(dim=1)  # (B, N)
        restore = shuffle.argsort(dim=1)  # its inverse: where each patch is in the shuffled order
        x = self.encode(images, shuffle[:, :K])  # (B, 1 + K, C)
        pred = self.decode(x, restore)  # (B, N, P^2 3)
        target = patchify(images, self.patch_size)
        if self.norm_pix_loss:
            var, mean = torch.var_mean(target, dim=2, keepdim=True)  # unbiased, as in [1]'s code
            target = (target - mean) / (var + 1e-6).sqrt()
        error = (pred - target).square().mean(dim=2)  # (B, N)
        mask = (restore >= K).to(error)
        loss = (error * mask).sum() / mask.sum()  # over removed patches alone ([1] 3)
        return loss, pred, mask

    def encode(self, images, kept=None):
        """Vectors of the class token and of the patches kept (B, K), or of all: (B, 1 + K, C)."""
        x = self.patch_embed(images).flatten(2).mT + self.pos_embed[:, 1:]  # (B, N, C)
        if kept is not None:
            x = x.take_along_dim(kept[:, :, None], dim=1)  # (B, K, C)
        cls_token = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat((cls_token.expand(len(x), -1, -1), x), dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def decode(self, x, restore):
        """Put x (B, 1 + K, C) in place by restore (B, N); predict all pixels, (B, N, P^2 3)."""
        x = self.decoder_embed(x)  # (B, 1 + K, D)
        B, N = restore.shape
        gaps = self.mask_token.expand(B, N + 1 - x.size(1), -1)  # (B, N - K, D)
        patches = torch.cat((x[:, 1:], gaps), dim=1)  # (B, N, D), still shuffled
        patches = patches.take_along_dim(restore[:, :, None], dim=1)  # each in its place
        x = torch.cat((x[:, :1], patches), dim=1) + self.decoder_pos_embed  # (B, 1 + N, D)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x[:, 1:]))

    def features(self, images):
        """The mean of all patches' vectors, (B, C)."""
        return self.encode(images)[:, 1:].mean(dim=1)

    @classmethod
    def from_pretrained(cls, name_or_path, data_dir="data", **changes):
        """Official mae_visualize_vit_base, _large, _large_ganloss, or a file that has a decoder."""
        if not Path(name_or_path).suffix:  # an official name
            url = f"https://dl.fbaipublicfiles.com/mae/visualize/{name_or_path}.pth"
            saved = torch.hub.load_state_dict_from_url(url, data_dir, "cpu", weights_only=True)
        else:
            saved = torch.load(name_or_path, map_location="cpu", weights_only=True)
        w = {name.removeprefix("module.").removeprefix("_orig_mod."): t
             for name, t in saved.get("model", saved).items()}
        blocks = [name.split(".")[0] for name in w if name.endswith("norm1.weight")]
        P = w["patch_embed.proj.weight"].size(3)
        dim = w["pos_embed"].size(2)
        decoder_dim = w["decoder_pos_embed"].size(2)
        sizes = dict(
            image_size=P * math.isqrt(w["pos_embed"].size(1) - 1), patch_size=P,
            dim=dim, depth=blocks.count("blocks"), heads=16 if dim == 1280 else max(1, dim // 64),
            decoder_dim=decoder_dim, decoder_depth=blocks.count("decoder_blocks"),
            decoder_heads=max(1, decoder_dim // 32))  # as in [1]
        flags = saved.get("config", {})  # of this script
        sizes.update((name, flags[name]) for name in SHAPE if name in flags)
        model = cls(**sizes | changes)
        if model.pos_embed.shape != w["pos_embed"].shape:  # another image_size: other positions
            w.update(pos_embed=model.pos_embed, decoder_pos_embed=model.decoder_pos_embed)
        model.load_state_dict(w)
        return model


def patchify(images, P):
    """Images (B, 3, S, S) as patches (B, N, P^2 3): row by row, in each its pixels row by row."""
    x = F.unfold(images, P, stride=P).mT  # (B, N, 3 P^2): all red, all green, all blue
    return x.unflatten(2, (3, -1)).mT.flatten(2)  # the official order: pixel by pixel


def unpatchify(patches, P):
    """The inverse: (B, N, P^2 3) -> (B, 3, S, S)."""
    x = patches.unflatten(2, (-1, 3)).mT.flatten(2).mT  # (B, 3 P^2, N)
    return F.fold(x, P * math.isqrt(x.size(2)), P, stride=P)


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


# ---- Masks, batches, schedule

def mask_noise(kind, rng, B, grid):
    """Noise (B, N): the noisiest patches are removed ([1] Figure 6). block: a square around any
    point, cut off by borders. grid: at ratio .75 the same corner of every 2 x 2 patches is kept."""
    noise = rng.random((B, grid, grid))
    rows, columns = np.mgrid[:grid, :grid]
    if kind == "block":
        y, x = rng.uniform(-0.5, grid - 0.5, (2, B, 1, 1))
        noise = 1e-3 * noise - np.maximum(abs(rows - y), abs(columns - x))
    if kind == "grid":
        order = rng.random((B, 4)).argsort(axis=1)  # of the four places in 2 x 2
        noise += order[:, 2 * (rows % 2) + columns % 2]
    return torch.from_numpy(noise.astype(np.float32)).flatten(1)


def masked_batch(c, images, grid, step):
    """Images (B, 3, 32, 32), moved, and noise (B, N) for masks, drawn from (seed, step) alone."""
    epoch, position = divmod(step, max(1, len(images) // c.batch_size))
    order = np.random.default_rng((c.seed, 1, epoch)).permutation(len(images))
    index = torch.from_numpy(order[position * c.batch_size:][:c.batch_size])
    rng = np.random.default_rng((c.seed, 2, step))
    dy, dx = torch.from_numpy(rng.integers(9, size=(2, len(index))))
    x = F.pad(standardise(images[index]), [4] * 4, mode="reflect")  # (B, 3, 40, 40)
    windows = x.unfold(2, 32, 1).unfold(3, 32, 1)  # (B, 3, 9, 9, 32, 32), a view
    x = windows[torch.arange(len(index)), :, dy, dx]  # (B, 3, 32, 32)
    return x, mask_noise(c.mask, rng, len(index), grid).to(x.device)


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


@torch.no_grad()
def draw_reconstructions(c, model, images, path):
    """A sheet of images (B, 3, H, W) in 0 to 255: whole, what is left, and rebuilt."""
    if not find_spec("matplotlib"):
        return print(f"for {path}: pip install matplotlib")
    import matplotlib.pyplot as plt
    S = model.grid * model.patch_size
    images = F.interpolate(images.float(), (S, S), mode="bilinear", antialias=True)
    stats = CIFAR10_STATS if S == 32 else IMAGENET_STATS
    mean, std = (torch.tensor(s, device=images.device)[:, None, None] for s in stats)
    x = (images / 255 - mean) / std
    noise = mask_noise(c.mask, np.random.default_rng(0), len(x), model.grid).to(x.device)
    _, pred, mask = model(x, c.mask_ratio, noise)
    if model.norm_pix_loss:  # give it the true mean and std, which it never saw
        patch_std, patch_mean = torch.std_mean(patchify(x, model.patch_size), 2, keepdim=True)
        pred = pred * patch_std + patch_mean
    removed = unpatchify(mask[:, :, None].expand_as(pred), model.patch_size) == 1
    rebuilt = torch.where(removed, unpatchify(pred, model.patch_size), x)
    sheet = torch.cat((x, x * ~removed, rebuilt), dim=2) * std + mean  # (B, 3, 3 S, S)
    sheet = sheet.permute(2, 0, 3, 1).flatten(1, 2).clamp(0, 1)  # (3 S, B S, 3)
    plt.imsave(path, sheet.cpu().numpy())
    print(f"{path}: images, what is left of them, and rebuilt")


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
    init: str = ""  # start from this checkpoint; model flags must match
    mask: str = "random"  # patches that are removed: random, block (a square), grid
    mask_ratio: float = 0.75  # share of them ([1] Figure 5)
    norm_pix_loss: bool = False  # predict normalised pixels ([1] Table 1d)
    patch_size: int = 4
    dim: int = 128  # C
    depth: int = 4  # blocks of the encoder
    heads: int = 4
    decoder_dim: int = 64  # D
    decoder_depth: int = 1  # fast; a linear probe likes more ([1] Table 1a)
    decoder_heads: int = 2
    lr: float = 1e-3  # peak; [1]: 1.5e-4 for each 256 images of a batch, for 800 epochs
    weight_decay: float = 0.05
    warmup: int = 40  # steps
    batch_size: int = 32
    epochs: float = 14.0
    reconstruct: str = ""  # paint in --picture with this network, an official name or a file
    picture: str = ""  # an image file
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
    """Pre-train as c says, keep the weights that the linear probe likes best, and test those."""
    device, autocast = choose_device(c.device, c.dtype)
    loaded = load_images(dataclasses.replace(c, val=c.val or 5000))  # for the probes
    splits = train_split, val, _ = [[t.to(device) for t in split] for split in loaded]
    images = train_split[0] if c.val else torch.cat((train_split[0], val[0]))
    torch.manual_seed(c.seed)
    fresh = MAE(32, **{name: getattr(c, name) for name in SHAPE}).to(device)
    raw = copy.deepcopy(fresh)  # is trained; fresh stays as it is, to compare with
    if c.init:
        raw.load_state_dict(torch.load(c.init, device, weights_only=True)["model"])
    optimizer = torch.optim.AdamW([  # biases and norms don't decay
        dict(params=[p for p in raw.parameters() if p.dim() > 1]),
        dict(params=[p for p in raw.parameters() if p.dim() == 1], weight_decay=0.0)],
        betas=(0.9, 0.95), weight_decay=c.weight_decay, fused=True)
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
            improved = scores["linear"] > best
            best = max(scores["linear"], best)
            weights = raw.state_dict()
            encoder = {k: w for k, w in weights.items() if "decoder" not in k and k != "mask_token"}
            shape = {name: getattr(c, name) for name in SHAPE[:4]}
            state = dict(model=weights, encoder=encoder, optimizer=optimizer.state_dict(),
                         encoder_config=dict(shape, image_size=32, pool="cls"), config=vars(c),
                         step=step, best=best, seconds=seconds)
            if improved and c.val:
                save(out / "best.pt", state)
            save(out / "ckpt.pt", state)  # last: if a run dies in between, best.pt is new enough
    if c.val:
        raw.load_state_dict(torch.load(out / "best.pt", device, weights_only=True)["model"])
    encoders = {"": raw.features, "_random_init": fresh.features, "_pixels": nn.Flatten()}
    test_encoders(c, encoders, splits, autocast, step=step, seconds=seconds)
    draw_reconstructions(c, raw, val[0][:10], out / "reconstructions.png")


def evaluate(c, model, train_split, val, autocast):
    """Loss on fixed masks, and probes. `linear` flatters: val picks its rate, too."""
    x, noise = masked_batch(dataclasses.replace(c, batch_size=1000), val[0], model.grid, 0)
    with torch.no_grad(), autocast:
        loss, _, _ = model(x, c.mask_ratio, noise)
    few = [t[:4000] for t in train_split]
    train, val = (extract(model.features, split, autocast) for split in (few, val))
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
    if not c.reconstruct:
        return train(c)
    import matplotlib.pyplot as plt  # pip install matplotlib
    pixels = torch.tensor(plt.imread(c.picture))[None, ..., :3].permute(0, 3, 1, 2)
    if pixels.is_floating_point():  # a PNG's are in 0 to 1
        pixels = 255 * pixels
    Path(c.out).mkdir(parents=True, exist_ok=True)
    model = MAE.from_pretrained(c.reconstruct, c.data_dir)
    draw_reconstructions(c, model, pixels, f"{c.out}/reconstruct.png")


if __name__ == "__main__":
    main()
