r"""ViT: cut an image into patches, and let a Transformer read them as it reads words.

Each patch becomes a vector, to which one for its position is added. Blocks of attention and MLP
let patches exchange what they hold. A linear layer reads the class from an extra vector, the class
token, or from the mean of all [1]. Nothing says that neighbours belong together: the network learns
it. With much data that is an advantage. With little it needs help: a stem of convolutions [6],
augmentation [3-5], weights from elsewhere (--init) or a teacher's answers [2, 8].

    python vit.py                                      # offline: shapes that it draws
    python vit.py --data cifar10 --dim 192 --depth 6 --heads 3 --patch_size 4 --lr 1e-3 \
        --batch_size 128 --epochs 10.108               # 0.5 PFLOP
    python vit.py --data cifar10 --init deit_tiny_patch16_224 --image_size 224 --lr 5e-4 \
        --layer_decay 0.75 --epochs 3                  # or --init a checkpoint of mae.py, ijepa.py
    python vit.py --data cifar10 --patch_size 4 --teacher logits.npy  # of resnet.py --save_logits

What to expect (torch 2.13.0; assets/logs/vit/): python vit.py, test accuracy 70.7% on shapes after
97 s on one core of an AMD EPYC in bfloat16; the second command, by an earlier version, 71.3% of a
JPEG copy's test images (three points below the original); assets/logs has one for GPUs. n = 1.

Differs from [1]: conv stem, fixed 2-D positions, mean of the patches, weight decay .05, smoothed
labels, no dropout. From [2]: TrivialAugment, no erasing; one head for labels and teacher.

[1] ViT, arXiv 2010.11929v2  [2] DeiT, 2012.12877v2  [3] TrivialAugment, 2103.10158v2
[4] mixup, 1710.09412v2  [5] CutMix, 1905.04899v2  [6] Early convolutions, 2106.14881v3
[7] Attention rollout, 2005.00928v2  [8] Distillation, 1503.02531v1  [9] BEiT, 2106.08254v2
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

# Shapes: B batch, N tokens, C channels, H heads (images: height), D = C / H, P patch side, W width


class ViT(nn.Module):
    """images (B, 3, S, S), normalised by .stats -> logits (B, num_classes). pool: the head reads
    cls, a learned token, or the mean of the patches. pos: learned, or sincos. Names are timm's."""

    def __init__(self, image_size, patch_size, dim, depth, heads, num_classes, pool="cls",
                 drop_path=0.0, pos="learned", conv_stem=False):
        super().__init__()
        self.config = dict(image_size=image_size, patch_size=patch_size, dim=dim, depth=depth,
                           heads=heads, num_classes=num_classes, pool=pool, pos=pos,
                           conv_stem=conv_stem)
        assert image_size % patch_size == 0 and dim % heads == 0, f"don't divide: {self.config}"
        self.image_size, self.pool, self.grid = image_size, pool, image_size // patch_size
        self.stats = IMAGENET_STATS if image_size > 64 else CIFAR10_STATS
        self.patch_embed = (ConvStem if conv_stem else PatchEmbed)(patch_size, dim)
        rates = np.linspace(0, drop_path, depth)  # the first block always stays
        self.blocks = nn.Sequential(*(Block(dim, heads, rate) for rate in rates))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        for name, w in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(w)
            elif w.dim() > 1:  # Xavier's; q, k and v as if they were three matrices
                nn.init.xavier_uniform_(w.data.flatten(1), gain=2**0.5 if "qkv" in name else 1.0)
        nn.init.zeros_(self.head.weight)  # [1] 3.2: at first, all classes are as likely
        learned = pos == "learned"
        positions = 0.02 * torch.randn(self.grid**2, dim) if learned else sincos_2d(dim, self.grid)
        if pool == "cls":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
            positions = torch.cat((torch.zeros(1, dim), positions))
        self.pos_embed = nn.Parameter(positions[None], requires_grad=learned)

    def tokens(self, x):
        """Patches with their positions, behind the class token if there is one: (B, N, C)."""
        assert x.shape[2:] == (self.image_size,) * 2, f"{tuple(x.shape)}: not {self.image_size}"
        x = self.patch_embed(x)
        if self.pool == "cls":
            x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        return x + self.pos_embed  # [1] eq. 1

    def features(self, x):
        """What the head reads, (B, C)."""
        x = self.norm(self.blocks(self.tokens(x)))
        return x[:, 0] if self.pool == "cls" else x.mean(dim=1)  # cls: [1] eq. 4

    def forward(self, x):
        return self.head(self.features(x))

    @classmethod
    def from_pretrained(cls, name_or_path, heads=0, data_dir="data", **changes):
        """A ViT with weights of OFFICIAL or of a file: timm's, torchvision's, MAE's, ours. heads 0:
        as the file says, else of 64 channels. changes: other arguments, such as image_size."""
        if name_or_path in OFFICIAL:
            host = DEIT if name_or_path.startswith("deit") else TORCHVISION
            saved = torch.hub.load_state_dict_from_url(
                f"{host}/{name_or_path}-{OFFICIAL[name_or_path]}.pth", data_dir,
                map_location="cpu", check_hash=True, weights_only=True)
            w, config = saved.get("model", saved), {}
        else:
            w, config = load_weights(name_or_path)
        for theirs, ours in TIMM_NAMES.items():
            w = {name.replace(theirs, ours): t for name, t in w.items()}
        w = {name: t for name, t in w.items() if not name.startswith(("decoder_", "mask_"))}  # MAE
        before = int("cls_token" in w)  # tokens before the patches
        table = w["pos_embed"]  # (1, before + n^2, C)
        n, dim = math.isqrt(table.size(1) - before), table.size(2)
        classes = len(w.get("head.bias", ()))  # 0: there is no head
        conv_stem = config.get("conv_stem", False)
        patch_size = config["patch_size"] if conv_stem else w["patch_embed.proj.weight"].size(3)
        heads = heads or config.get("heads") or (16 if dim == 1280 else dim // 64)  # ViT-H: 16
        sizes = dict(image_size=patch_size * n, patch_size=patch_size, dim=dim, heads=heads,
                     depth=sum("norm1.weight" in name for name in w), conv_stem=conv_stem,
                     num_classes=classes or 10, pool="cls" if before else "mean",
                     pos=config.get("pos", "learned"))
        model = cls(**sizes | changes)
        square = table[:, before:].float().unflatten(1, (n, n)).permute(0, 3, 1, 2)  # (1, C, n, n)
        square = F.interpolate(square, (model.grid, model.grid), mode="bicubic")  # [1] 3.2
        w["pos_embed"] = torch.cat((table[:, :before], square.flatten(2).mT), dim=1)
        if classes != model.head.out_features:
            w |= {f"head.{name}": fresh for name, fresh in model.head.state_dict().items()}
        model.load_state_dict(w)
        return model


class PatchEmbed(nn.Module):
    """Cut x (B, 3, H, W) into patches of P x P pixels, row by row, and project each: (B, N, C)."""

    def __init__(self, patch_size, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)

    def forward(self, x):  # self.proj(x), by a matrix product: in bfloat16 some CPUs convolve wrong
        x = F.unfold(x, self.proj.stride, stride=self.proj.stride).mT.contiguous()  # (B, N, 3 P^2)
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)  # (B, N, C)


class ConvStem(nn.Module):
    """3x3 convolutions that halve the image until a patch, of 2^n pixels a side, is one [6]."""

    def __init__(self, patch_size, dim):
        super().__init__()
        assert patch_size & (patch_size - 1) == 0, f"patch_size {patch_size} isn't a power of 2"
        self.proj, C = nn.Sequential(), 3
        while patch_size > 1:
            width = dim // patch_size  # doubles up to dim / 2
            self.proj.append(nn.Conv2d(C, width, 3, stride=2, padding=1, bias=False))
            self.proj.extend((nn.BatchNorm2d(width), nn.ReLU()))
            C, patch_size = width, patch_size // 2
        self.proj.append(nn.Conv2d(C, dim, 1))

    def forward(self, x):
        return self.proj(x).flatten(2).mT  # (B, C, rows, columns) -> (B, N, C)


def sincos_2d(dim, grid):
    """Fixed positions (grid^2, dim), row by row: sines and cosines of x / 10000^(4 i / dim), then
    those of y (arXiv 1706.03762v7 3.5, once for each coordinate, in MAE's order)."""
    assert dim % 4 == 0, f"{dim} channels can't hold sines and cosines of x and y"
    frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(grid)[:, None] * frequency  # (grid, dim / 4)
    waves = torch.cat((angle.sin(), angle.cos()), dim=1)  # (grid, dim / 2)
    x, y = waves.repeat(grid, 1), waves.repeat_interleave(grid, dim=0)
    return torch.cat((x, y), dim=1).float()


# ---- The Transformer's parts: x (B, N, C) -> (B, N, C)

class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): [1] eq. 2 and 3."""

    def __init__(self, dim, heads, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(  # each token alone: expand, GELU, project back
            fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))
        self.drop_path = nn.Dropout2d(drop_path)  # stochastic depth (arXiv 1603.09382v3)

    def forward(self, x):  # [None]: images take the place of the channels that Dropout2d drops
        x = x + self.drop_path(self.attn(self.norm1(x))[None])[0]
        return x + self.drop_path(self.mlp(self.norm2(x))[None])[0]


class Attention(nn.Module):
    """softmax(q k^T / sqrt(D)) v in each of H heads ([1] eq. 5 to 8); q, k, v are (B, H, N, D)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)  # q, k and v in one product
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / q.size(-1) ** 0.5).softmax(dim=-1)  # (B, H, N, N)
        y = weights @ v  # (B, H, N, D); for long sequences use F.scaled_dot_product_attention
        return self.proj(y.transpose(1, 2).flatten(2))  # (B, N, C)


# ---- Weights from files

DEIT, TORCHVISION = "https://dl.fbaipublicfiles.com/deit", "https://download.pytorch.org/models"
OFFICIAL = dict(deit_tiny_patch16_224="a1311bcf", deit_small_patch16_224="cd65a155",
                deit_base_patch16_224="b5f2ef4d", vit_b_16="c867db91", vit_b_32="d86f8d99",
                vit_l_16="852ce7e3", vit_l_32="c7638314")  # the first digits of files' SHA-256
TIMM_NAMES = {  # of torchvision's names, in both of its spellings
    "encoder.layers.encoder_layer_": "blocks.", "encoder.pos_embedding": "pos_embed",
    "encoder.ln.": "norm.", "class_token": "cls_token", "conv_proj": "patch_embed.proj",
    "heads.head.": "head.", ".ln_": ".norm", ".self_attention.in_proj_": ".attn.qkv.",
    ".self_attention.out_proj": ".attn.proj", ".mlp.linear_": ".mlp.fc",
    ".mlp.0.": ".mlp.fc1.", ".mlp.3.": ".mlp.fc2."}


def load_weights(path):
    """The state dict in a checkpoint of ours or others', and our config if it has one."""
    with torch.serialization.safe_globals([argparse.Namespace]):  # official files may hold one
        saved = torch.load(path, map_location="cpu", weights_only=True)
    weights = saved
    for name in ("model", "state_dict", "encoder", "target_encoder", "ema"):
        weights = saved.get(name, weights)  # the last one found wins
    for wrapper in ("module.", "_orig_mod.", "backbone."):
        weights = {name.replace(wrapper, ""): w for name, w in weights.items()}
    return weights, saved.get("config", {})


def objective(logits, targets, hints=None, T=1.0, label_smoothing=0.1):
    """Cross-entropy of logits (B, classes) with targets (B, classes). Half of it is with hints, a
    teacher's softmax at temperature T, if given; times T^2, since gradients shrink so ([8] 2)."""
    loss = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    if hints is None:
        return loss
    return loss / 2 + T**2 / 2 * F.cross_entropy(logits / T, hints)


def adamw(model, c):
    """AdamW. A layer's rate is that of the next one times layer_decay [9]."""
    last, groups = len(model.blocks) + 1, {}  # of norm and head; patches and positions are layer 0
    for name, p in model.named_parameters():
        layer = last if name.startswith(("norm.", "head.")) else 0
        if name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        decays = p.dim() in (2, 4)  # not vectors; tokens and positions have 3 axes
        groups.setdefault((layer, decays), []).append(p)
    return torch.optim.AdamW([
        dict(params=params, peak=c.lr * c.layer_decay ** (last - layer),
             weight_decay=c.weight_decay * decays)
        for (layer, decays), params in groups.items()], fused=True)


def learning_rate(step, peak, warmup, steps):
    """Linear warm-up to peak, then half a cosine down to 0 (arXiv 1608.03983 eq. 5)."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = min(1, (step - warmup) / max(1, steps - warmup))
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


# ---- Augmentation: x (B, 3, H, W) in 0 to 255; rng is NumPy's

WARPS = dict(  # row and column in distort's matrix A, and the largest value there
    shear_x=(0, 1, 0.3), shear_y=(1, 0, 0.3), move_x=(0, 2, 0.6), move_y=(1, 2, 0.6), rotate=None)
DISTORTIONS = (*WARPS, "brightness", "saturation", "contrast", "sharpness", "solarize",
               "posterize", "autocontrast", "equalize")


def trivial_augment(x, rng):
    """TrivialAugment [3]: for each image one of 13 distortions, or none, of a random strength."""
    out = x.clone()
    kind = rng.integers(len(DISTORTIONS) + 1, size=len(x))  # the last number: none
    s = torch.from_numpy(rng.uniform(-1, 1, (len(x), 1, 1, 1))).float().to(x.device)  # strengths
    for number, name in enumerate(DISTORTIONS):
        rows = torch.from_numpy(np.flatnonzero(kind == number)).to(x.device)
        if len(rows):
            out[rows] = distort(x[rows], name, s[rows]).clamp(0, 255)
    return out


def distort(x, kind, s):
    """Distort x by strengths s (B, 1, 1, 1), from -1 to 1. At 1 it's about RandAugment's most."""
    if kind in WARPS:
        A = torch.eye(2, 3, device=x.device).repeat(len(x), 1, 1)
        if kind == "rotate":
            cos, sin = (0.5 * s).cos(), (0.5 * s).sin()
            A[:, :, :2] = torch.cat((cos, -sin, sin, cos), dim=1).view(-1, 2, 2)
        else:
            row, column, most = WARPS[kind]
            A[:, row, column] = most * s.flatten()
        grid = F.affine_grid(A, x.shape, align_corners=False)  # A (u, v, 1) for all pixels (u, v)
        return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    if kind == "solarize":  # invert what is bright
        return torch.where(x < 256 * (1 - s.abs()), x, 255 - x)
    if kind == "posterize":  # keep 8 bits at strength 0, 4 at 1
        return x - x % 2 ** (4 * s.abs()).round()
    if kind in ("autocontrast", "equalize"):  # spread each channel over 0 to 255
        pixels = y = x.flatten(2).contiguous()  # (B, 3, H W)
        if kind == "equalize":  # how many pixels of the channel are darker
            y = torch.searchsorted(y.sort(dim=2).values, y)
        low, high = y.aminmax(dim=2, keepdim=True)
        y = (y - low) * 255 / (high - low).clamp(min=1)
        y = torch.where(high > low, pixels.lerp(y, s[..., 0].abs()), pixels)  # 1: all the way
        return y.view_as(x)
    red, green, blue = x.split(1, dim=1)
    grey = 0.299 * red + 0.587 * green + 0.114 * blue  # (B, 1, H, W)
    around = F.avg_pool2d(F.pad(x, [1] * 4, mode="replicate"), 3, stride=1)
    base = dict(brightness=0, saturation=grey, contrast=grey.mean(dim=(2, 3), keepdim=True),
                sharpness=(9 * around + 4 * x) / 13)[kind]
    return base + (x - base) * (1 + 0.9 * s)  # away from the base, or towards it


def mix(x, kind, alpha, rng):
    """Mix image i with image B - 1 - i. Returns images, and the share (B, 1) that is their own."""
    own = rng.beta(alpha, alpha, (len(x), 1, 1, 1))  # mixup [4]: blend both
    if kind == "cutmix":  # [5]: put a square of one, anywhere, into the other
        pixels = (np.arange(x.size(3)) + 0.5) / x.size(3)
        near = np.abs(pixels - rng.random((len(x), 2, 1))) < np.sqrt(1 - own[..., 0]) / 2
        own = ~(near[:, :1, :, None] & near[:, 1:, None])  # (B, 1, H, W)
    own = torch.from_numpy(own).float().to(x.device)
    return own * x + (1 - own) * x.flip(0), own.mean(dim=(2, 3))


# ---- Data

CIFAR10 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
CIFAR10_STATS = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # mean and std of each channel
IMAGENET_STATS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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


def normalise(images, stats, size=0):
    """uint8 (B, 3, H, W) to floats of about zero mean, unit variance; resized if size isn't 0."""
    mean, std = (torch.tensor(s, device=images.device)[:, None, None] for s in stats)
    x = (images / 255 - mean) / std
    return F.interpolate(x, (size, size), mode="bilinear", antialias=True) if size else x


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


def draw_batch(c, images, labels, teacher, step):
    """Augmented images (B, 3, H, W) in 0 to 255, targets (B, classes), and the teacher's, if there
    are its logits (N, 2, classes) for images and their mirrors. All chance is by (seed, step)."""
    epoch, position = divmod(step, max(1, len(images) // c.batch_size))
    order = np.random.default_rng((c.seed, 1, epoch)).permutation(len(images))
    index = order[position * c.batch_size:][:c.batch_size]
    rng = np.random.default_rng((c.seed, 2, step))
    torch.manual_seed(c.seed * 1_000_003 + step)  # for drop_path
    dy, dx = rng.integers(-c.crop, c.crop, (2, len(index)), endpoint=True)
    mirror = rng.integers(2, size=len(index))
    index, dy, dx, mirror = (torch.from_numpy(a).to(images.device) for a in (index, dy, dx, mirror))
    x = augment(images, index, dy, dx, mirror == 1).float()
    targets = [F.one_hot(labels[index], 10).float()]
    if teacher is not None:
        targets.append((teacher[index, mirror] / c.temperature).softmax(dim=1))
    if c.trivial:
        x = trivial_augment(x, rng)
    kinds = [kind for kind in ("mixup", "cutmix") if getattr(c, kind)]
    if kinds:
        kind = rng.choice(kinds)  # with both, a coin for each batch
        x, own = mix(x, kind, getattr(c, kind), rng)
        targets = [own * t + (1 - own) * t.flip(0) for t in targets]
    return x, *targets


# ---- Evaluation and pictures

@torch.no_grad()
def predict(model, images, c, autocast, function=None):
    """Logits (N, classes) of images (N, 3, H, W) uint8, or what another function makes of them."""
    model.eval()
    function = function or model
    with autocast:
        return torch.cat([function(normalise(x, model.stats, c.image_size)).float()
                          for x in images.split(500)])


def score(logits, labels):
    """Mean loss and accuracy of logits (N, classes)."""
    accuracy = (logits.argmax(dim=1) == labels).float().mean().item()
    return F.cross_entropy(logits, labels).item(), accuracy


@torch.no_grad()
def rollout(model, x):
    """What each token of images x (B, 3, H, W) is made of, (B, N, N), if attention were all that
    mixes them: the product over blocks of (A + I) / 2, A the mean of heads ([7] eq. 1)."""
    x = model.tokens(x)
    total = identity = torch.eye(x.size(1), device=x.device)
    for block in model.blocks:
        qkv = block.attn.qkv(block.norm1(x)).unflatten(2, (3, block.attn.heads, -1))
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)  # (B, H, N, D)
        A = (q @ k.mT / q.size(-1) ** 0.5).softmax(dim=-1).mean(dim=1)  # (B, N, N)
        total = (A + identity) / 2 @ total
        x = block(x)
    return total


def draw_attention(c, model, images):
    """attention.png: images (B, 3, H, W), and which of their patches the class is read from."""
    if not find_spec("matplotlib"):
        return print("for attention.png: pip install matplotlib")
    import matplotlib.pyplot as plt  # pip install matplotlib
    read = rollout(model.eval(), normalise(images, model.stats, c.image_size))  # (B, N, N)
    read = read[:, 0, 1:] if model.pool == "cls" else read.mean(dim=1)  # (B, grid^2)
    light = (read / read.amax(dim=1, keepdim=True)).unflatten(1, (1, model.grid, -1))
    light = F.interpolate(light, images.shape[2:], mode="bilinear")  # (B, 1, H, W)
    sheet = torch.cat((images, images * light), dim=2).permute(2, 0, 3, 1).flatten(1, 2)
    plt.imsave(f"{c.out}/attention.png", sheet.byte().cpu().numpy())


# ---- Training

CHOICES = dict(data=("shapes", "cifar10"), pool=("cls", "mean"), pos=("learned", "sincos"),
               dtype=("auto", "float32", "bfloat16"))
SHAPE = ("dim", "depth", "heads", "patch_size", "pool", "pos", "conv_stem")


@dataclasses.dataclass
class Config:
    data: str = "shapes"  # drawn by this script; or cifar10
    data_dir: str = "data"  # where downloads land
    val: int = 5000  # images of cifar10, the last, to validate on; 0: train on all
    out: str = "out/vit"
    init: str = ""  # deit_tiny_patch16_224, ... or a file: its weights; its shape overrides flags
    freeze: bool = False  # train the head alone
    dim: int = 128  # C
    depth: int = 4  # blocks
    heads: int = 0  # 0: of 32 channels each; with --init as many as it had, else of 64
    patch_size: int = 8
    pool: str = "mean"
    pos: str = "sincos"
    conv_stem: bool = True
    drop_path: float = 0.0  # share of images that skip the last block's branches; less in others
    image_size: int = 0  # pixels a side to which images are resized; 0: as they are
    crop: int = 4  # pixels by which images are moved at most
    trivial: bool = False  # TrivialAugment [3]
    mixup: float = 0.0  # alpha of Beta(alpha, alpha) [4]; .8 in [2]'s code
    cutmix: float = 0.0  # the same [5]; 1 in [2]'s code, which has both
    label_smoothing: float = 0.1  # share of a target that is spread over all classes
    teacher: str = ""  # .npy: its logits for all training images and their mirrors
    temperature: float = 1.0  # of the teacher's probabilities
    lr: float = 2e-3  # peak
    layer_decay: float = 1.0  # a layer's rate over that of the next; .75 with --init
    warmup: int = 100  # steps
    weight_decay: float = 0.05
    ema: float = 0.0  # decay of the averaged weights that are evaluated; 0: the last ones are
    batch_size: int = 64
    epochs: float = 12.0
    eval_every: int = 0  # steps between evaluations, each with a checkpoint; 0: an epoch
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


def make_vit(c):
    """A new network, or --init's. c then says what it is."""
    more = dict(image_size=c.image_size or 32, num_classes=10, drop_path=c.drop_path)
    if c.init:
        model = ViT.from_pretrained(c.init, c.heads, c.data_dir, **more)
    else:
        c.heads = c.heads or c.dim // 32
        model = ViT(**{name: getattr(c, name) for name in SHAPE}, **more)
    vars(c).update({name: model.config[name] for name in SHAPE})
    if c.freeze:
        model.requires_grad_(False).head.requires_grad_(True)
    return model


def train(c):
    """Train as c says, keep the best on validation images, and test that."""
    device, autocast = choose_device(c.device, c.dtype)
    torch.manual_seed(c.seed)
    train_split, val, test = [[t.to(device) for t in split] for split in load_images(c)]
    teacher = torch.from_numpy(np.load(c.teacher)).to(device) if c.teacher else None
    model = make_vit(c).to(device)
    averaged = copy.deepcopy(model) if c.ema else model  # the weights that are evaluated
    optimizer = adamw(model, c)
    per_epoch = max(1, len(train_split[0]) // c.batch_size)
    steps = math.ceil(c.epochs * per_epoch)
    out, step, best, seconds = Path(c.out), 0, -1.0, 0.0
    if c.resume:
        saved = torch.load(out / "ckpt.pt", map_location=device, weights_only=True)
        for name in ("data", "val", "teacher"):
            assert saved["config"][name] == getattr(c, name), f"ckpt.pt was made with other {name}"
        model.load_state_dict(saved["model"])
        averaged.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        step, best, seconds = saved["step"], saved["best"], saved["seconds"]
    start_log(c, step)
    if step == 0:
        for name in ("best.pt", "ckpt.pt"):  # an older run's
            (out / name).unlink(missing_ok=True)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {steps} steps on {device}")
    compiled = torch.compile(model) if c.compile else model
    weights = averaged.state_dict()  # shares memory with averaged
    while step < steps:
        started = time.perf_counter()
        x, *targets = draw_batch(c, *train_split, teacher, step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, group["peak"], c.warmup, steps)
        model.train(not c.freeze)  # a frozen stem's batch norm keeps its statistics
        with autocast:
            logits = compiled(normalise(x, model.stats, c.image_size)).float()  # (B, classes)
        loss = objective(logits, *targets, T=c.temperature, label_smoothing=c.label_smoothing)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # [1] Table 3
        optimizer.step()
        optimizer.zero_grad()
        if c.ema:  # few steps at first, so that the random start is soon forgotten
            decay = min(c.ema, (step + 1) / (step + 10))
            for name, w in model.state_dict().items():
                if w.is_floating_point():  # batch norm's count isn't
                    weights[name].lerp_(w, 1 - decay)  # a <- decay a + (1 - decay) w
        loss = loss.item()
        assert math.isfinite(loss), f"loss is {loss} at step {step}"
        step += 1
        duration = time.perf_counter() - started
        seconds += duration
        if step % c.log_every == 0:
            log_row(c, step=step, loss=loss, lr=group["lr"], seconds=seconds,
                    images_per_s=len(x) / duration)
        if step % (c.eval_every or per_epoch) == 0 or step == steps:
            accuracy = -1.0
            if c.val:
                val_loss, accuracy = score(predict(averaged, val[0], c, autocast), val[1])
                log_row(c, step=step, seconds=seconds, val_loss=val_loss, val_accuracy=accuracy)
            improved, best = accuracy > best, max(accuracy, best)
            encoder = {name: w for name, w in weights.items() if not name.startswith("head.")}
            state = dict(model=model.state_dict(), ema=weights, encoder=encoder,
                         encoder_config=model.config, optimizer=optimizer.state_dict(),
                         config=vars(c), step=step, best=best, seconds=seconds)
            if improved:
                save(out / "best.pt", state)
            save(out / "ckpt.pt", state)  # last: if a run dies in between, best.pt is new enough
    test_once(c, averaged, train_split, test, autocast, step=step, seconds=seconds)


def test_once(c, model, train_split, test, autocast, **row):
    """Test the best weights once, and leave their features.pt and attention.png behind."""
    if c.val:
        model.load_state_dict(torch.load(f"{c.out}/best.pt", weights_only=True)["ema"])
    test_loss, accuracy = score(predict(model, test[0], c, autocast), test[1])
    log_row(c, **row, test_loss=test_loss, test_accuracy=accuracy, final=True)
    state = dict(name=Path(c.out).name)
    for split, (x, y) in dict(train=train_split, test=test).items():
        state[f"{split}_z"] = predict(model, x[:10000], c, autocast, model.features).cpu()
        state[f"{split}_y"] = y[:10000].cpu()
    save(f"{c.out}/features.pt", state)
    draw_attention(c, model, test[0][:10])


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
    train(Config(**vars(make_parser().parse_args(argv))))


if __name__ == "__main__":
    main()
