r"""SimCLR, MoCo and VICReg: learn from images without labels, from two distorted views of each.

An encoder and a head turn a view into a vector, and an image's two vectors should be equal. One
vector for all images would do: a collapse. The methods differ in what prevents it. In SimCLR
[1] a view has to find its partner among all views of the batch, in MoCo [2, 3] among vectors of
earlier batches, made by a slow copy of the network. VICReg [4] has no negatives: each dimension
has to vary, and no two together. Then the head is thrown away: the features are what was learned.

    python simclr.py                                 # offline: shapes that it draws
    python simclr.py --loss moco --out out/moco      # or vicreg
    python simclr.py --data cifar10 --batch_size 128 --warmup 393 --epochs 11.219  # 30 min
    python resnet.py --init out/simclr/ckpt.pt --arch resnet18  # then learn with labels

What to expect (torch 2.13.0, one core of an AMD EPYC in bfloat16; assets/logs/simclr/):
- python simclr.py: kNN 73.4% on test images of shapes (random init 23.2%, pixels 36.5%), 5 passes
- the third, by an earlier version: 61.9% on CIFAR-10 as JPEG, three points below the original

Differs from the papers: all methods get the same views, without blur, and on CIFAR-10 crops of a
fifth of the image or more ([1, 4]: .08); a small ResNet-18; AdamW.

[1] SimCLR, arXiv 2002.05709v3  [2] MoCo, 1911.05722v3  [3] MoCo v2, 2003.04297v1
[4] VICReg, 2105.04906v3  [5] ResNet, 1512.03385v1
"""

import argparse
import copy
import dataclasses
import json
import math
import os
import shutil
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# Shapes: B batch, N images, C features, D numbers of a vector, K keys; images are (B, 3, H, W)

# ---- The losses: what keeps vectors apart?

def nt_xent(z1, z2, temperature):
    """SimCLR's: each of 2N views, as vectors z1, z2 (N, D), has to pick the other view of its image
    among the 2N - 1 others. Cross-entropy of cosines / temperature ([1] eq. 1)."""
    N = len(z1)
    with torch.autocast(z1.device.type, enabled=False):  # bfloat16 is too coarse for exponentials
        z = F.normalize(at_least_fp32(torch.cat((z1, z2))), dim=1)  # (2N, D)
        logits = z @ z.mT / temperature  # (2N, 2N)
        logits.fill_diagonal_(-math.inf)  # no view finds itself
        partner = torch.arange(2 * N, device=z.device).roll(N)  # N, ..., 2N - 1, 0, ..., N - 1
        return F.cross_entropy(logits, partner)


def moco_loss(q, k, queue, temperature):
    """MoCo's: each query q (N, D) has to pick its own key k (N, D) rather than the queue's (K, D)
    older ones ([2] eq. 1). All have length 1. Only queries get a gradient."""
    with torch.autocast(q.device.type, enabled=False):
        q, k = at_least_fp32(q), at_least_fp32(k).detach()
        positive = (q * k).sum(dim=1, keepdim=True)  # (N, 1)
        negative = q @ at_least_fp32(queue).mT  # (N, K)
        logits = torch.cat((positive, negative), dim=1) / temperature  # (N, 1 + K)
        return -logits.log_softmax(dim=1)[:, 0].mean()


def vicreg_loss(z1, z2, invariance=25.0, variance=25.0, covariance=1.0):
    """VICReg's, of vectors z1, z2 (N, D): views are near, each dimension's standard deviation is 1
    or more, no two dimensions covary ([4] eq. 6). As in the authors' code, whose weights these are,
    distances are averaged over D (eq. 5: summed), and hinges over the two views (eq. 6: summed)."""
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = at_least_fp32(z1), at_least_fp32(z2)
        distance = F.mse_loss(z1, z2)
        hinge, off_diagonal = 0, 0
        for z in (z1, z2):
            N, D = z.shape
            z = z - z.mean(dim=0)
            std = (z.var(dim=0) + 1e-4).sqrt()  # (D,); at 0 a root's slope is infinite
            hinge += F.relu(1 - std).mean() / 2  # eq. 1
            cov = z.mT @ z / (N - 1)  # (D, D), eq. 3
            off_diagonal += cov.fill_diagonal_(0).square().sum() / D  # eq. 4
        return invariance * distance + variance * hinge + covariance * off_diagonal


at_least_fp32 = lambda z: z.to(torch.promote_types(z.dtype, torch.float32))  # double stays


class TwoViews(nn.Module):
    """Two views x1, x2 (B, 3, H, W) of each image -> the loss: simclr, moco or vicreg."""

    def __init__(self, loss, encoder, head_dim, temperature, queue, momentum):
        super().__init__()
        self.loss = loss
        self.temperature = temperature
        self.momentum = momentum
        self.network = nn.Sequential(encoder, make_head(loss, encoder.dim, head_dim))
        if loss == "moco":
            self.key_network = copy.deepcopy(self.network).requires_grad_(False)
            self.register_buffer("queue", F.normalize(torch.randn(queue, head_dim), dim=1))

    def forward(self, x1, x2):
        if self.loss == "simclr":
            z = self.network(torch.cat((x1, x2)))  # (2B, D): batch norm sees all views together
            z1, z2 = z.chunk(2)
            return nt_xent(z1, z2, self.temperature)
        if self.loss == "vicreg":
            return vicreg_loss(self.network(x1), self.network(x2))
        q = in_parts(self.network, x1)  # (B, D)
        k = self.make_keys(x2)
        loss = moco_loss(q, k, self.queue, self.temperature)
        self.queue = torch.cat((self.queue, k))[-len(self.queue):]  # the oldest keys leave
        return loss

    @torch.no_grad()
    def make_keys(self, x):
        """Keys (B, D) by a network that slowly follows the queries' ([2] eq. 2), shuffled."""
        weights = self.key_network.parameters(), self.network.parameters()
        for k, q in zip(*weights, strict=True):
            k.lerp_(q, 1 - self.momentum)  # k <- m k + (1 - m) q
        order = torch.randperm(len(x), device=x.device)
        return in_parts(self.key_network, x[order])[order.argsort()]  # back in x's order


def in_parts(network, x):
    """Vectors (B, D) of length 1. Batch norm sees a quarter of x at a time, as if each were on its
    own GPU. A query and a key that were normalised among the same images could be matched by that
    alone, whatever they show: so MoCo splits batches and shuffles keys ([2] 3.3)."""
    z = torch.cat([network(part) for part in x.chunk(4)])
    return F.normalize(at_least_fp32(z), dim=1)


def make_head(loss, C, D):  # each paper has its own
    if loss == "moco":  # [3] 3
        return nn.Sequential(nn.Linear(C, C), nn.ReLU(), nn.Linear(C, D))
    if loss == "simclr":  # [1] 2.1; the norms are its code's, the last without a shift
        head = nn.Sequential(nn.Linear(C, C, bias=False), nn.BatchNorm1d(C), nn.ReLU(),
                             nn.Linear(C, D, bias=False), nn.BatchNorm1d(D))
        head[-1].bias.requires_grad_(False)
        return head
    layers = []
    for width in (C, D):  # the expander, [4] 4.2
        layers += [nn.Linear(width, D), nn.BatchNorm1d(D), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(D, D, bias=False))


class ResidualBlock(nn.Module):
    """y = relu(f(x) + x), with f of two 3x3 convolutions ([5] Figure 5 left)."""

    def __init__(self, C_in, C, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(C_in, C, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(C)
        self.conv2 = nn.Conv2d(C, C, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(C)
        self.downsample = nn.Sequential()
        if C_in != C:
            projection = nn.Conv2d(C_in, C, 1, stride, bias=False)
            self.downsample.extend([projection, nn.BatchNorm2d(C)])

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))  # (B, C, H / stride, W / stride)
        y = self.bn2(self.conv2(y))
        return F.relu(self.downsample(x) + y)


class ResNet18(nn.Module):
    """images (B, 3, H, W) -> features (B, 8 width). torchvision's names, a 3x3 stem ([1] B.9)."""

    def __init__(self, width=64):
        super().__init__()
        self.dim = 8 * width
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        C = width
        for i in range(4):
            first = ResidualBlock(C, width * 2**i, stride=1 if i == 0 else 2)
            C = width * 2**i
            self.add_module(f"layer{i + 1}", nn.Sequential(first, ResidualBlock(C, C)))
        for w in self.parameters():
            if w.dim() == 4:  # filters
                nn.init.kaiming_normal_(w, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))  # (B, width, H, W)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (B, 8 width, H / 8, W / 8)
        return x.mean(dim=(2, 3))


def learning_rate(step, peak, warmup, steps):
    """Linear warm-up to peak, then half a cosine down to 0 (arXiv 1608.03983 eq. 5)."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = min(1, (step - warmup) / max(1, steps - warmup))
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


# ---- Views: images x (n, 3, S, S) in 0 to 255, on the device; rng draws for each separately

def draw_views(c, images, step):
    """Two views (B, 3, S, S), standardised, of each image of a batch: by (seed, step) alone."""
    n = len(images)
    epoch, position = divmod(step, max(1, n // c.batch_size))
    order = np.random.default_rng((c.seed, 1, epoch)).permutation(n)
    index = order[position * c.batch_size:][:c.batch_size]
    rng = np.random.default_rng((c.seed, 2, step))  # 1 is for orders, 2 for views
    x = images[np.tile(index, 2)].float()  # (2B, 3, S, S)
    x = random_crop(x, rng, c.crop_min)
    x = colour_jitter(x, rng, c.jitter)
    greyed = rng.random(len(x)) < c.grey
    x[greyed] = saturation(x[greyed], 0.0)
    return standardise(x).chunk(2)


def random_crop(x, rng, least):
    """Cut a box out of each image, resize it to S x S, mirror half of them. A box has least to 1
    of the area, width / height 3/4 to 4/3: of ten draws the first that fits, as in torchvision."""
    n, _, S, _ = x.shape
    area = S**2 * rng.uniform(least, 1, (10, n))
    aspect = (4 / 3) ** rng.uniform(-1, 1, (10, n))
    sides = np.sqrt((area / aspect, area * aspect)).round().clip(1)  # (2, 10, n): height, width
    fits = (sides <= S).all(axis=0)  # (10, n)
    sides = sides[:, fits.argmax(axis=0), np.arange(n)]  # (2, n)
    sides = np.where(fits.any(axis=0), sides, S)  # all of the image if none fits
    corners = np.floor(rng.random((2, n)) * (S + 1 - sides))  # top, left
    mirrored = rng.random((n, 1)) < 0.5
    centres = (np.arange(S)[:, None, None] + 0.5) / S  # of pixels, as shares of a side
    pixels = centres * sides - 0.5  # (S, 2, n), counted from the corner
    pixels = corners + pixels.clip(0, sides - 1)  # nothing from outside the box
    rows, columns = pixels.transpose(1, 2, 0)  # (n, S)
    columns = np.where(mirrored, columns[:, ::-1], columns)
    grid = np.stack(np.broadcast_arrays(columns[:, None], rows[:, :, None]), axis=3)
    grid = (2 * grid + 1) / S - 1  # (n, S, S, 2): from -1 to 1, from edge to edge
    return F.grid_sample(x, x.new_tensor(grid), align_corners=False)


def colour_jitter(x, rng, strength):
    """With probability .8 change an image's colours in four ways, in random order. In place."""
    n = len(x)
    most = strength * np.array((0.8, 0.8, 0.8, 0.2))
    amounts = x.new_tensor((1, 1, 1, 0) + most * rng.uniform(-1, 1, (n, 4)))
    order = np.tile(np.arange(4), (n, 1))
    order = rng.permuted(order, axis=1)  # (n, 4)
    order[rng.random(n) >= 0.8] = -1  # none of them
    for turn in range(4):
        for number, function in enumerate((brightness, contrast, saturation, hue)):
            rows = order[:, turn] == number
            amount = amounts[rows, number, None, None, None]
            x[rows] = function(x[rows], amount).clamp(0, 255)
    return x


def hue(x, turns):
    """Turn the colour circle, in which red, green and blue are a third of a turn apart."""
    value = x.amax(dim=1, keepdim=True)  # (n, 1, S, S)
    chroma = value - x.amin(dim=1, keepdim=True)
    r, g, b = (x / chroma.clamp(min=1e-6)).split(1, dim=1)
    angles = torch.cat((g - b, b - r + 2, r - g + 4), dim=1)  # in sixths of a turn
    angle = angles.gather(1, x.argmax(dim=1, keepdim=True)) + 6 * turns
    k = (angle + x.new_tensor([5, 3, 1])[:, None, None]) % 6  # (n, 3, S, S)
    fall = torch.minimum(k, 4 - k).clamp(0, 1)  # 0 within a sixth of a channel's own angle
    return value - chroma * fall


luma = lambda x: 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]  # (n, 1, S, S)
brightness = lambda x, factor: factor * x
contrast = lambda x, factor: torch.lerp(luma(x).mean(dim=(2, 3), keepdim=True), x, factor)
saturation = lambda x, factor: torch.lerp(luma(x), x, factor)


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


def evaluate(c, model, train_split, val, autocast):
    """The loss of a batch of validation images, and what probes make of the encoder's features."""
    model = copy.deepcopy(model).eval()  # forward moves MoCo's key network and queue
    with torch.no_grad(), autocast:
        loss = model(*draw_views(c, val[0], step=0))
    few = [t[:4000] for t in train_split]
    train, val = (extract(model.network[0], split, autocast) for split in (few, val))
    return dict(val_loss=loss.item(), knn=knn_accuracy(*train, *val),
                linear=linear_probe(*train, *val, *val))


def draw_sheet(c, images):
    """views.png: pairs of views, one above the other, of images (n, 3, H, W)."""
    if not find_spec("matplotlib"):
        return print("for views.png: pip install matplotlib")
    import matplotlib.pyplot as plt
    sheet = torch.cat(draw_views(c, images, step=0), dim=2)  # (n, 3, 2 H, W)
    sheet = sheet.permute(2, 0, 3, 1).flatten(1, 2)  # (2 H, n W, 3)
    sheet = (64 * sheet + 121).clamp(0, 255)  # about what standardise has taken away
    plt.imsave(f"{c.out}/views.png", sheet.byte().cpu().numpy())


# ---- Training

CHOICES = dict(data=("shapes", "cifar10"), loss=("simclr", "moco", "vicreg"),
               dtype=("auto", "float32", "bfloat16"))
DEFAULTS = dict(  # by loss and by data
    simclr=dict(lr=4e-3, temperature=0.2, head_dim=128),
    moco=dict(lr=2e-3, temperature=0.1, head_dim=128),
    vicreg=dict(lr=2e-3, head_dim=512),  # [4]: 8192
    cifar10=dict(crop_min=0.2, jitter=0.5, grey=0.2))  # jitter: [1] B.9


@dataclasses.dataclass
class Config:
    data: str = "shapes"  # drawn by this script; or cifar10
    data_dir: str = "data"  # where downloads land
    val: int = 5000  # images of cifar10, the last, to validate on; 0: train on all
    out: str = "out/simclr"
    init: str = ""  # a checkpoint of this script: start from its encoder
    loss: str = "simclr"  # this and data change other flags' defaults: see DEFAULTS
    width: int = 16  # channels of the first of four stages; [5]: 64
    head_dim: int = 128  # numbers of a vector, D
    temperature: float = 0.2  # of simclr and moco
    queue: int = 4096  # moco's keys; [2]: 65536 for ImageNet
    momentum: float = 0.99  # of moco's key network; [2]: .999 for ImageNet
    crop_min: float = 0.4  # least share of an image that a view shows
    jitter: float = 1.0  # brightness, contrast, saturation x (1 +- .8 jitter), hue +- .2 jitter
    grey: float = 0.8  # share of views without colours
    lr: float = 4e-3  # peak
    warmup: int = 50  # steps
    weight_decay: float = 0.05
    batch_size: int = 64  # images, of two views each
    epochs: float = 5.0
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
    """Train as c says, keep the weights with the best kNN on validation images, and test them."""
    device, autocast = choose_device(c.device, c.dtype)
    splits = load_images(dataclasses.replace(c, val=c.val or 5000))  # for the probes
    train_split, val, _ = splits = [[t.to(device) for t in split] for split in splits]
    images = train_split[0] if c.val else torch.cat((train_split[0], val[0]))
    torch.manual_seed(c.seed)
    encoder = ResNet18(c.width)
    fresh = copy.deepcopy(encoder).to(device).eval()
    if c.init:
        encoder.load_state_dict(torch.load(c.init, "cpu", weights_only=True)["encoder"])
    raw = TwoViews(c.loss, encoder, c.head_dim, c.temperature, c.queue, c.momentum)
    raw.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW([  # biases and norms don't decay; MoCo's keys get no gradient
        dict(params=[p for p in raw.parameters() if p.dim() > 1]),
        dict(params=[p for p in raw.parameters() if p.dim() == 1], weight_decay=0.0)],
        weight_decay=c.weight_decay, fused=True)
    steps = math.ceil(c.epochs * max(1, len(images) // c.batch_size))
    out = Path(c.out)
    step, best, seconds = 0, -1.0, 0.0
    if c.resume:
        saved = torch.load(out / "ckpt.pt", device, weights_only=True)
        for name in ("data", "val", "loss", "width", "head_dim", "queue"):
            if saved["config"][name] != getattr(c, name):
                sys.exit(f"{out}/ckpt.pt was made with --{name} {saved['config'][name]}")
        raw.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, best, seconds = saved["step"], saved["best"], saved["seconds"]
    if step > steps:
        sys.exit(f"--epochs {c.epochs} means {steps} steps, but the run is at step {step}")
    start_log(c, step)
    if step == 0:
        for name in ("best.pt", "ckpt.pt"):  # an older run's
            (out / name).unlink(missing_ok=True)
    model = torch.compile(raw) if c.compile else raw
    while step < steps:
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, c.lr, c.warmup, steps)
        torch.manual_seed(c.seed * 1_000_003 + step)  # for MoCo's shuffle
        with autocast:
            loss = model(*draw_views(c, images, step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.item()
        duration = time.perf_counter() - started
        if not math.isfinite(loss):
            sys.exit(f"loss is {loss} at step {step}")
        step += 1
        seconds += duration
        if step % c.log_every == 0:
            log_row(c, step=step, loss=loss, lr=group["lr"], seconds=seconds,
                    images_per_s=c.batch_size / duration)
        if step % (c.eval_every or math.ceil(steps / 4)) == 0 or step == steps:
            scores = evaluate(c, raw, train_split, val, autocast)
            log_row(c, step=step, seconds=seconds, **scores)
            improved = scores["knn"] > best
            best = max(scores["knn"], best)
            state = dict(model=raw.state_dict(), encoder=encoder.state_dict(), config=vars(c),
                         optimizer=optimizer.state_dict(), step=step, best=best, seconds=seconds)
            if improved and c.val:
                save(out / "best.pt", state)
            save(out / "ckpt.pt", state)  # last: if a run dies in between, best.pt is new enough
    if c.val:
        raw.load_state_dict(torch.load(out / "best.pt", device, weights_only=True)["model"])
    encoders = {"": encoder.eval(), "_random_init": fresh, "_pixels": nn.Flatten()}
    test_encoders(c, encoders, splits, autocast, step=step, seconds=seconds)
    draw_sheet(c, val[0][:16])


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
    parser = make_parser()
    c = parser.parse_args(argv)
    for name in (c.loss, c.data):
        parser.set_defaults(**DEFAULTS.get(name, {}))
    train(Config(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    main()
