# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "numpy", "requests"]
# ///
"""ViT: an image is worth 16×16 words. Cut it into patches, make each a vector, and let a transformer read them.

Each patch's vector gets its position's added, blocks of attention and MLP mix them, and a linear layer reads the class
from their mean, or from one more vector, the class token [1]. No convolution says that neighbours belong together: the
network has to learn it. On large data that is an advantage; on small data it needs help, or time: a small stem of
convolutions, augmentation and mixed images, another network's pre-training (--init) or its answers (--teacher).

    python vit.py                                       # offline, ten kinds of shapes that the script draws
    python vit.py --data cifar10 --arch cifar --patch_size 4 --batch_size 128 --lr 1e-3 --steps 3548    # fetches 170 MB
    python vit.py --data cifar10 --arch small6 --patch_size 4 --trivial --cutmix 1 --epochs 100
    python vit.py --data cifar10 --init deit_tiny_patch16_224 --lr 5e-4 --layer_decay 0.75 --epochs 3
    python vit.py --data cifar10 --init out/mae/ckpt.pt --lr 1e-3 --layer_decay 0.75       # or ijepa's, simclr's ViT
    python vit.py --data cifar10 --patch_size 4 --teacher logits.npy   # what resnet.py --save_logits wrote
    python vit.py --show_augment --trivial --cutmix 1   # augment.png: what the network gets to see
    torchrun --nproc_per_node=8 vit.py --data cifar10 --arch small6 --patch_size 4 --epochs 300 --compile

and in Python: model = ViT.from_pretrained("vit_b_16").eval(); logits = model(normalise(images, model.stats))

What to expect (torch 2.13.0, two cores of an AMD EPYC, seed 0, n = 1; logs in assets/logs/vit/):
- python vit.py: test accuracy 71.9% on shapes (a linear probe of pixels: 17%), 94 s of training in bfloat16 on one
  core
- A training step of 192 × 6, patch 4, no conv stem, batch 256, in bfloat16 by AVX-512: 2.15 times as fast as the same
  model in plain fp32 eager, 1.41 times as under autocast with torch's attention; trivial, cutmix and erase are 1.6% of
  it: BenchViT.speed
- CIFAR-10, JPEG copy, the second command: test accuracy 71.27% for 0.5 PFLOP (6 × multiply-adds × images), 58 minutes
  on one core: BenchViT.recipe; [1]'s network, labels not smoothed, 62.97%: BenchViT.plain. For a quarter of that
  compute, 2.5 epochs, 59.52%; in so short a run augmentation costs: with TrivialAugment 57.56%, cutmix 48.51%; without
  the conv stem 56.04%, with a class token 60.17%; [1]'s network, labels not smoothed, 51.30%: BenchViT.ablation
- ResNet-56 and a ViT of its size, conv stem, patch 4, .125 PFLOP each, labels not smoothed, the best of four rates on
  validation images: ResNet 64.28%, ViT 60.78% on a tenth of the images; 68.95% and 70.36% on all: BenchViT.cnn
- On a GPU: not yet measured

Differs from [1]: by default a stem of convolutions, fixed 2-D positions and the mean of the patches (--no-conv_stem
--pos learned --pool cls is the paper's network, but for the hidden layer in its head); AdamW, decay .05 on weights
alone, smoothed labels, no dropout. From [2]: no repeated augmentation, no distillation token, one head learns from
labels and teacher, and the teacher's answers are stored, for unmixed images; TrivialAugment [3] where it has
RandAugment. Changes from [3] to [6] are noted where they are.

Shapes: B batch, N patches (with the class token where there is one), C channels, H heads, D head dim, P patch side;
images are (B, 3, height, width), uint8 until normalised; of the augmentations, H and W are height and width.

[1] Dosovitskiy et al. 2020, ViT, arXiv 2010.11929v2             [2] Touvron et al. 2020, DeiT, arXiv 2012.12877v2
[3] Müller and Hutter 2021, TrivialAugment, arXiv 2103.10158v2   [4] Zhang et al. 2017, mixup, arXiv 1710.09412v2
[5] Yun et al. 2019, CutMix, arXiv 1905.04899v2                  [6] Zhong et al. 2017, Random erasing, 1708.04896v2
[7] Xiao et al. 2021, Early convolutions, arXiv 2106.14881v3     [8] Abnar and Zuidema 2020, Rollout, 2005.00928v2
[9] Hinton et al. 2015, Distilling, arXiv 1503.02531v1           [10] Bao et al. 2021, BEiT, arXiv 2106.08254v2
"""

import argparse, contextlib, copy, dataclasses, gc, hashlib, inspect, json, math, os, re, signal, struct, sys, tarfile
import time, typing, zlib
from pathlib import Path

import numpy as np
import requests
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode


class UserError(ValueError):
    """Bad input (status 2) or a failed run (status 1): main prints the message on one line and returns the status."""

    def __init__(self, message, status=2):
        super().__init__(message)
        self.status = status


# ---- config --------------------------------------------------------------------------------------------------------

FRESH = dict(patch_size=8, pool="mean", pos="sincos", conv_stem=True)  # of a new network, unless flags say otherwise
# names of --arch: width, depth, heads
SIZES = dict(mini=(128, 4, 4), cifar=(192, 6, 3), cifar9=(192, 9, 3), small6=(256, 6, 4), tiny=(192, 12, 3),
             small=(384, 12, 6), base=(768, 12, 12), large=(1024, 24, 16))
META, TORCH = "https://dl.fbaipublicfiles.com/deit/", "https://download.pytorch.org/models/"
OFFICIAL = {  # address, in whose name is the start of the file's SHA-256, and heads
    "deit_tiny_patch16_224": (META + "deit_tiny_patch16_224-a1311bcf.pth", 3),
    "deit_small_patch16_224": (META + "deit_small_patch16_224-cd65a155.pth", 6),
    "deit_base_patch16_224": (META + "deit_base_patch16_224-b5f2ef4d.pth", 12),
    "vit_b_16": (TORCH + "vit_b_16-c867db91.pth", 12), "vit_b_32": (TORCH + "vit_b_32-d86f8d99.pth", 12),
    "vit_l_16": (TORCH + "vit_l_16-852ce7e3.pth", 16), "vit_l_32": (TORCH + "vit_l_32-c7638314.pth", 16)}


@dataclasses.dataclass
class Config:
    # data
    data: str = "shapes"  # shapes (drawn by this script), cifar10, or a folder that holds cifar-10-batches-bin/
    data_dir: str = "data"  # where downloads land
    labels: float = 1.0  # fraction of each class's training images to use; the rest are ignored
    full_train: bool = False  # train on the validation images too: for a last run, when all choices are made
    image_size: int = 0  # images are resized to this many pixels a side; 0: as they are, or as --init was trained
    # augmentation: each image draws its own
    crop: int = 4  # pixels by which an image is shifted at most, its border reflected
    flip: bool = True  # mirror half of the images
    trivial: bool = False  # one of 14 distortions, of random strength [3]
    erase: float = 0.0  # probability that a rectangle is replaced by noise [6]; [2] has 0.25
    mixup: float = 0.0  # α of the Beta distribution of shares [4]; [2]'s code has 0.8
    cutmix: float = 0.0  # α of the Beta distribution of areas [5]; [2]'s code: 1. With both, a coin per batch
    show_augment: bool = False  # write augment.png, a sheet of augmented images, and train nothing
    # model
    arch: str = "mini"  # mini, cifar, cifar9, small6 (for small images), tiny, small, base or large: see SIZES
    patch_size: int | None = None  # side of a patch in pixels; None: 8 (photos of 32 pixels want 4), or --init's
    pool: str | None = None  # what the head reads: cls, a token [1], or mean, of all patches; None: mean, or --init's
    pos: str | None = None  # positions: learned [1], or sincos, fixed and 2-D; None: sincos, or what --init has
    conv_stem: bool | None = None  # 3×3 convolutions in place of the patch projection [7]; None: true, or --init's
    drop_path: float = 0.0  # probability that an image skips a branch of the last block; 0 in the first, linear between
    init: str | None = None  # start from deit_tiny_patch16_224 or another official name, a .pth, or a script's .pt
    freeze: bool = False  # train the last layer alone: a linear probe
    # objective
    label_smoothing: float = 0.1  # probability that the targets spread over all classes
    teacher: str | None = None  # .npy file of logits (N, 2, classes) of all training images and their mirrors
    distill: float = 0.5  # share of the teacher's term in the loss
    temperature: float = 2.0  # both networks' logits are divided by it in the teacher's term [9]
    hard: bool = False  # learn the teacher's choice, as a label, instead [2]
    # optimiser
    lr: float = 2e-3  # peak learning rate of AdamW
    layer_decay: float = 1.0  # each layer's rate is that of the layer above times this; try 0.75 with --init [10]
    weight_decay: float = 0.05  # on weights alone, not on biases, norms, positions and tokens
    warmup: int = 100  # steps of linear warm-up
    clip: float = 1.0  # largest norm of the gradient, as in [1] Table 3; 0: none
    ema: float = 0.0  # decay of an average of the weights that is evaluated instead; 0: none
    batch_size: int = 64  # images per micro-batch
    grad_accum: int = 1  # micro-batches per step and process
    # run
    epochs: float = 12  # passes over the training images
    steps: int | None = None  # updates of the parameters, instead of epochs
    stop_at: int | None = None  # end at this step, the schedule unchanged
    eval_every: int | None = None  # steps between evaluations, each followed by a checkpoint; None: an epoch
    log_every: int = 10  # steps between log lines
    seed: int = 0  # of initial weights, batches and augmentation
    out: str = "out/vit"  # the run's folder
    resume: bool = False  # go on from out/ckpt.pt, with that run's flags where none are given
    device: str = "auto"  # auto (cuda, then mps, then cpu), or a torch device
    dtype: str = "auto"  # float32 or bfloat16; auto: bfloat16 where the hardware multiplies matrices in it
    compile: bool = False  # torch.compile: a wait at first (it needs a C++ compiler on a CPU), then faster steps
    grad_checkpoint: bool = False  # compute each block again in the backward pass: less memory, a third more work

    def __post_init__(self):
        known = dict(arch=tuple(SIZES), pool=("cls", "mean"), pos=("learned", "sincos"),
                     dtype=("auto", "float32", "bfloat16"))
        may_be_0 = ("crop", "image_size", "erase", "mixup", "cutmix", "drop_path", "label_smoothing", "distill",
                    "weight_decay", "warmup", "clip", "ema", "seed")
        for name, value in vars(self).items():
            most = {"crop": 31, "image_size": 1024}.get(name, sys.maxsize)
            most = 1 if name in ("labels", "erase", "label_smoothing", "distill", "layer_decay") else most
            most = 1 - 1e-9 if name in ("drop_path", "ema") else most
            if value == "" or name in known and value not in (*known[name], getattr(Config, name)):
                raise UserError(f"--{name} {value!r}: want {' or '.join(known.get(name, ['some text']))}")
            if type(value) in (int, float) and not (0 < value <= most or value == 0 and name in may_be_0):
                up_to = ", below 1" if most == 1 - 1e-9 else f", at most {most}" if most < sys.maxsize else ""
                raise UserError(f"--{name} {value}: want a number {'from' if name in may_be_0 else 'above'} 0{up_to}")
        if self.data not in ("shapes", "cifar10") and not (Path(self.data) / "cifar-10-batches-bin").is_dir():
            raise UserError(f"--data {self.data}: want shapes, cifar10, or a folder that holds cifar-10-batches-bin/")
        size, patch = self.image_size or 32, self.patch_size or FRESH["patch_size"]
        stem = not self.init and (FRESH["conv_stem"] if self.conv_stem is None else self.conv_stem)
        clashes = {
            "--resume goes on from --out and --init starts anew: give one of them": self.resume and self.init,
            f"--init {self.init}: no such file, nor one of {', '.join(OFFICIAL)}":
                self.init and self.init not in OFFICIAL and not Path(self.init).is_file(),
            f"--teacher {self.teacher}: no such file": self.teacher and not Path(self.teacher).is_file(),
            "--hard has no teacher: give --teacher": self.hard and not self.teacher,
            f"--image_size {self.image_size}: want 0 or 16 to 1024": 0 < self.image_size < 16,
            f"--patch_size {patch} does not divide images of {size} pixels": not self.init and size % patch,
            f"--conv_stem halves with each convolution: --patch_size {patch} is none of 2, 4, 8, 16, 32":
                stem and patch not in (2, 4, 8, 16, 32),
            "--batch_size 1: with one patch the conv stem's batch norm has nothing to average":
                stem and self.batch_size == 1 and size == patch}
        for message, clash in clashes.items():
            if clash:
                raise UserError(message)


# ---- model: patches, attention, blocks -----------------------------------------------------------------------------

def sincos_2d(dim, grid):
    """Fixed positions (grid², dim) of a square of patches, row by row: the first half of a row encodes the patch's
    column x, the second its row y, each half the sines and then the cosines of x / 10000^(2i / (dim / 2)), as MAE's
    code lays out arXiv 1706.03762v7 §3.5. Raises ValueError unless dim is a multiple of 4."""
    if dim % 4:
        raise UserError(f"positions of {dim} numbers: want a multiple of 4")
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))  # (dim / 4,)
    y, x = torch.meshgrid(torch.arange(grid).double(), torch.arange(grid).double(), indexing="ij")
    angles = [p.reshape(-1, 1) * omega for p in (x, y)]  # each (grid², dim / 4)
    return torch.cat([part for a in angles for part in (a.sin(), a.cos())], dim=1).float()


class PatchEmbed(nn.Module):
    """Cut images (B, 3, height, width) into P × P patches and project each, which is one convolution: (B, N, C)."""

    def __init__(self, patch_size, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, C, rows, columns) -> (B, N, C), row by row


class Attention(nn.Module):
    """Multi-head self-attention: each token reads all tokens, weighted by softmax(q kᵀ / √D): 1706.03762v7 eq. 1."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, key_mask=None):
        """(B, N, C) -> (B, N, C). key_mask (B, N), bool: True for tokens that may be read; padding is False."""
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # (B, H, N, D) each
        mask = None if key_mask is None else key_mask[:, None, None, :]  # (B, 1, 1, N)
        if x.device.type == "cpu" and N <= 256:  # at N = 64 faster than torch's in bfloat16: BenchViT.speed
            scores = q @ k.mT / q.size(-1) ** 0.5  # (B, H, N, N)
            scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
            y = scores.softmax(dim=-1) @ v  # (B, H, N, D)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # the same in one kernel
        return self.proj(y.transpose(1, 2).reshape(B, N, C))


class FeedForward(nn.Module):
    """Two layers on each token alone: C -> hidden -> C, with the exact GELU."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class DropPath(nn.Module):
    """Stochastic depth: leave out the branch x (B, ...) of some images, scale the others' up to make up for it.

    Differs from arXiv 1603.09382v3: a coin per image, not per mini-batch; its eq. 5 scales by 1 - p instead, in tests.
    """

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        keep = torch.rand([len(x)] + [1] * (x.dim() - 1), device=x.device) >= self.p  # (B, 1, ...)
        return x * keep / (1 - self.p)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): arXiv 2010.11929v2 eq. 2 and 3."""

    def __init__(self, dim, heads, mlp_ratio=4.0, drop_path=None):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), FeedForward(dim, round(dim * mlp_ratio))
        self.drop_path = drop_path or nn.Identity()  # DropPath in vit.py

    def forward(self, x, key_mask=None):
        x = x + self.drop_path(self.attn(self.norm1(x), key_mask))  # (B, N, C)
        return x + self.drop_path(self.mlp(self.norm2(x)))


def init_transformer(module):
    """Weights as in ViT's code: Xavier for linear layers, q, k and v each on its own; LeCun for a patch projection.

    For nn.Module.apply. Biases 0; norms stay at 1 and 0.
    """
    if isinstance(module, nn.Linear):
        C_out, C_in = module.weight.shape
        C_out = C_out // 3 if C_out == 3 * C_in else C_out  # q, k and v in one: so give no MLP a ratio of 3
        nn.init.uniform_(module.weight, -((6 / (C_in + C_out)) ** 0.5), (6 / (C_in + C_out)) ** 0.5)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class ConvStem(nn.Module):
    """A patch embedding of 3×3 convolutions that halve height and width until a patch is one pixel, then 1×1 [7]:
    patches overlap, and a network with little data is given the neighbourhood that it would have to learn. [7]'s is
    wider at its end, for which it leaves out a block."""

    def __init__(self, patch_size, dim):
        super().__init__()
        layers, C, halvings = [], 3, int(math.log2(patch_size))
        for i in range(halvings):
            width = dim >> (halvings - i)  # doubles up to dim / 2
            layers += [nn.Conv2d(C, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            C = width
        self.proj = nn.Sequential(*layers, nn.Conv2d(C, dim, 1))

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, N, C)


class ViT(nn.Module):
    """images (B, 3, image_size, image_size), normalised -> logits (B, num_classes).

    pool: cls, a learned token that is put before the patches, or mean, the mean of the patches after the last norm.
    stats: whose mean and deviation images are normalised by, cifar10 or imagenet; None: imagenet above 64 pixels,
    whatever the data.
    """

    def __init__(self, image_size, patch_size, dim, depth, heads, num_classes, mlp_ratio=4.0, pool="cls",
                 drop_path=0.0, pos="learned", conv_stem=False, grad_checkpoint=False, stats=None):
        super().__init__()
        if image_size % patch_size or dim % heads:
            raise UserError(f"patches of {patch_size} pixels must divide images of {image_size}, and {heads} heads "
                            f"{dim} channels")
        self.settings = dict(image_size=image_size, patch_size=patch_size, dim=dim, depth=depth, heads=heads,
                             num_classes=num_classes, mlp_ratio=mlp_ratio, pool=pool, pos=pos, conv_stem=conv_stem,
                             stats=stats or ("imagenet" if image_size > 64 else "cifar10"))
        self.stats = dict(imagenet=IMAGENET_STATS, cifar10=CIFAR10_STATS)[self.settings["stats"]]
        self.pool, self.grid, self.grad_checkpoint = pool, image_size // patch_size, grad_checkpoint
        self.patch_embed = (ConvStem if conv_stem else PatchEmbed)(patch_size, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio, DropPath(drop_path * i / max(1, depth - 1)))
                                    for i in range(depth))
        self.norm, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, num_classes)
        self.apply(init_transformer)
        nn.init.zeros_(self.head.weight)  # [1] §3.2, when it fine-tunes: every class is as likely at first
        first = int(pool == "cls")  # tokens before the patches
        table = torch.zeros(1, first + self.grid**2, dim)
        if first:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        if pos == "sincos":
            table[:, first:] = sincos_2d(dim, self.grid)
        else:
            table.normal_(std=0.02)
        self.pos_embed = nn.Parameter(table, requires_grad=pos == "learned")

    def tokens(self, x):
        """(B, 3, height, width) -> (B, N, C): patches with their positions, behind the class token if there is one."""
        if x.shape[2:] != (self.settings["image_size"],) * 2:
            raise UserError(f"images of {x.size(3)} × {x.size(2)} pixels, want {self.settings['image_size']} × "
                            f"{self.settings['image_size']}")
        x = self.patch_embed(x)
        if self.pool == "cls":
            x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        return x + self.pos_embed  # [1] eq. 1

    def features(self, x):
        """What the head reads: (B, 3, height, width) -> (B, C)."""
        x = self.tokens(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpoint and self.training else block(x)
        x = self.norm(x)
        return x[:, 0] if self.pool == "cls" else x.mean(dim=1)  # cls: [1] eq. 4

    def forward(self, x):
        return self.head(self.features(x))

    @classmethod
    def from_pretrained(cls, name_or_path, heads=None, data_dir="data", **changes):
        """A ViT with official weights, or from a checkpoint of this script or of one whose encoder has timm's names.

        name_or_path: one of OFFICIAL (downloaded, 23 MB to 1.2 GB), a .pth file with timm's or torchvision's names,
        trained on images normalised with ImageNet's mean and deviation, or a .pt. heads: dim // 64 unless the name or
        the checkpoint says otherwise. changes are arguments of ViT: another image_size resizes the positions; another
        num_classes, or none in the file, gives a fresh head; pool="mean" drops the class token; mae.py's, ijepa.py's
        and simclr.py's fixed positions are learned from here on. Raises ValueError if the file can't be read or doesn't
        fit.
        """
        path, made_with = Path(name_or_path), {}
        if name_or_path in OFFICIAL:
            address, heads_of_name = OFFICIAL[name_or_path]
            path, heads = Path(data_dir) / address.split("/")[-1], heads or heads_of_name
            download(address, path, f"sha256:{path.stem.rsplit('-', 1)[1]}")
        with one_line(f"no ViT that this script knows can be made of {path}"):
            if path.suffix == ".pt":
                saved = load_checkpoint(path)
                made_with, w = saved.get("encoder_config", saved["model_config"]), saved.get("ema") or saved["model"]
                w = w if "head.weight" in w else saved.get("encoder", w)  # this script's own: with its head
            else:
                w = torch.load(path, map_location="cpu", weights_only=True)
                w = timm_names(w.get("model", w))
            if "patch_embed.proj.weight" not in w and not made_with.get("conv_stem"):
                raise UserError(f"{path} has no patch embedding: not a ViT (a ResNet's checkpoint is resnet.py's)")
            first, conv_stem = int("cls_token" in w), made_with.get("conv_stem", False)
            patch_size = made_with["patch_size"] if conv_stem else w["patch_embed.proj.weight"].size(-1)
            grid, dim = math.isqrt(w["pos_embed"].size(1) - first), w["pos_embed"].size(2)
            settings = dict(
                image_size=grid * patch_size, patch_size=patch_size, dim=dim, conv_stem=conv_stem,
                depth=1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks.")),
                heads=heads or made_with.get("heads") or max(1, dim // 64), pool="cls" if first else "mean",
                pos=made_with.get("pos", "learned"), mlp_ratio=w["blocks.0.mlp.fc1.weight"].size(0) / dim,
                stats=made_with.get("stats", "cifar10" if made_with and grid * patch_size <= 64 else "imagenet"),
                num_classes=len(w["head.weight"]) if "head.weight" in w else 10)
            model = cls(**{**settings, **changes})
            if model.pool == "cls" and not first:
                raise UserError(f"{path} has no class token, which --pool cls needs")
            if model.pool == "mean" and first:
                w = {**{k: v for k, v in w.items() if k != "cls_token"}, "pos_embed": w["pos_embed"][:, 1:]}
            w["pos_embed"] = resize_positions(w["pos_embed"], model.grid, int(model.pool == "cls"))
            if len(w.get("head.weight", ())) != len(model.head.weight):  # for other classes: a fresh one
                w = {**w, "head.weight": model.head.weight, "head.bias": model.head.bias}
            model.load_state_dict(w)
        return model


def resize_positions(table, grid, first):
    """Positions (1, first + n², C) for grid × grid patches, the first ones stay ([1] §3.2); bicubic as in [2]."""
    old = math.isqrt(table.size(1) - first)
    if old == grid:
        return table
    square = table[:, first:].reshape(1, old, old, -1).permute(0, 3, 1, 2)  # (1, C, n, n)
    square = F.interpolate(square.float(), (grid, grid), mode="bicubic", align_corners=False)
    return torch.cat((table[:, :first], square.flatten(2).transpose(1, 2)), dim=1)


def timm_names(weights):
    """A state dict with torchvision's names, of which there are two spellings, under timm's; others stay."""
    for theirs, ours in (("class_token", "cls_token"), ("conv_proj", "patch_embed.proj"), ("encoder.ln", "norm"),
                         ("encoder.pos_embedding", "pos_embed"), ("heads.head", "head"), (".ln_", ".norm"),
                         ("encoder.layers.encoder_layer_", "blocks."), (".self_attention.in_proj_", ".attn.qkv."),
                         (".self_attention.out_", ".attn."), (".mlp.linear_", ".mlp.fc"), (".mlp.0.", ".mlp.fc1."),
                         (".mlp.3.", ".mlp.fc2.")):
        weights = {name.replace(theirs, ours): value for name, value in weights.items()}
    return weights


def count_macs(model, size):
    """Multiply-adds of one image (3, size, size) in convolutions and matrix products. Leaves it in evaluation mode."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size, device=next(model.parameters()).device))
    return counter.get_total_flops() // 2  # a multiply-add is two


# ---- augmentation: on the device, in batches, each image its own ---------------------------------------------------

def augment(images, index, dy, dx, mirror):
    """The images (N, C, H, W) at index (B,), each moved by dy, dx (B,) pixels with reflected borders, and mirrored
    where mirror (B,) says so. One gather: each output pixel knows its row and column. The output is channels-last."""
    H, W = images.shape[2:]

    def reflect(i, size):  # -1 -> 1, size -> size - 2
        return (size - 1) - ((size - 1) - i.abs()).abs()

    columns = torch.arange(W, device=images.device).expand(len(index), W)  # (B, W)
    columns = torch.where(mirror[:, None], W - 1 - columns, columns)
    columns = reflect(columns + dx[:, None], W)
    rows = reflect(torch.arange(H, device=images.device) + dy[:, None], H)  # (B, H)
    # indices on both sides of a slice put their own axes first: (B, H, W, C)
    return images[index[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)  # (B, C, H, W)


def normalise(images, stats, size=0):
    """Pixels (B, 3, H, W), 0 to 255, to floats of about zero mean, unit variance, resized to size × size unless 0."""
    mean, std = (torch.tensor(s, device=images.device)[:, None, None] for s in stats)
    x = (images / 255 - mean) / std
    return F.interpolate(x, (size, size), mode="bilinear") if size else x


AFFINE = (0.3, 0.3, 0.6, 0.6, 0.5)  # shear x, shear y, move x, move y (1 is half an image), turn (radians), at most


def affine(x, kind, strength):
    """Images x (n, 3, H, W) sheared, moved or turned: kind (n,) is an index of AFFINE, strength (n,) -1 to 1."""
    shear_x, shear_y, move_x, move_y, turn = (strength * most * (kind == k) for k, most in enumerate(AFFINE))
    matrix = torch.stack((turn.cos(), shear_x - turn.sin(), move_x, turn.sin() + shear_y, turn.cos(), move_y), dim=1)
    grid = F.affine_grid(matrix.view(-1, 2, 3), x.shape, align_corners=False)  # (n, H, W, 2): where a pixel comes from
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def grey(x):
    """(n, 3, H, W) -> (n, 1, H, W): luma of ITU-R BT.601."""
    return (x * torch.tensor([0.299, 0.587, 0.114], device=x.device)[:, None, None]).sum(dim=1, keepdim=True)


def smooth(x):
    """Each pixel's 3 × 3 neighbourhood averaged, the middle five times: what sharpness is measured against."""
    weight = torch.ones(3, 1, 3, 3, device=x.device)
    weight[..., 1, 1] = 5
    return F.conv2d(F.pad(x, [1] * 4, mode="replicate"), weight / 13, groups=3)


def posterize(x, s):
    """Keep the upper bits of each value: 8 at strength 0, 4 at 1."""
    step = 2 ** (4 * s.abs()).round()
    return (x / step).floor() * step


def autocontrast(x, s):
    """Stretch each channel from its darkest and brightest value to 0 and 255."""
    low, high = x.amin(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)  # (n, 3, 1, 1)
    return x + s.abs() * torch.where(high > low, (x - low) * 255 / (high - low).clamp(min=1) - x, 0)


def equalize(x, s):
    """Move each channel's values so that all occur about equally often: each to its rank, the darkest to 0."""
    levels = x.round().long().clamp(0, 255).flatten(2)  # (n, 3, H W)
    counts = torch.zeros(*x.shape[:2], 256, device=x.device).scatter_add_(2, levels, torch.ones_like(x).flatten(2))
    rank = (counts.cumsum(dim=2) - counts).gather(2, levels).view_as(x)  # how many pixels are darker
    most = rank.amax(dim=(2, 3), keepdim=True)  # 0 if all pixels are alike: they stay as they are
    return x + s.abs() * torch.where(most > 0, 255 * rank / most.clamp(min=1) - x, 0)


COLOUR = (  # functions of x (n, 3, H, W), 0 to 255, and strength s (n, 1, 1, 1), -1 to 1; the first is no change
    lambda x, s: x,
    lambda x, s: x * (1 + 0.9 * s),  # brightness
    lambda x, s: grey(x) + (x - grey(x)) * (1 + 0.9 * s),  # saturation
    lambda x, s: grey(x).mean(dim=(2, 3), keepdim=True) * -0.9 * s + x * (1 + 0.9 * s),  # contrast
    lambda x, s: smooth(x) + (x - smooth(x)) * (1 + 0.9 * s),  # sharpness
    lambda x, s: torch.where(x < 256 * (1 - s.abs()), x, 255 - x),  # solarize: the bright is inverted
    posterize, autocontrast, equalize)


def trivial_augment(x, kind, strength):
    """TrivialAugment [3]: one distortion per image, of random strength, and nothing to tune.

    x (B, 3, H, W), 0 to 255; kind (B,): 0 to 4 are AFFINE's, from 5 on COLOUR's; strength (B,) from -1 to 1; both
    NumPy arrays. Differs from [3]: the strength is continuous, also for autocontrast and equalize, which fade in;
    ranges are about those of its RA space, borders reflected.
    """
    x, strength = x.float(), strength.astype(np.float32)

    def change(rows, function):  # rows from NumPy: to find them on the device would stall it
        if len(rows):
            i, k, s = (torch.from_numpy(a).to(x.device) for a in (rows, kind[rows], strength[rows]))
            x[i] = function(x[i], k, s).clamp(0, 255)

    change(np.flatnonzero(kind < len(AFFINE)), affine)  # all five in one go
    for number, colour in enumerate(COLOUR, start=len(AFFINE)):
        change(np.flatnonzero(kind == number), lambda x, k, s: colour(x, s[:, None, None, None]))
    return x


def boxes(size, share, aspect, centre):
    """(B, size, size) bool: a rectangle per image that covers a share (B,) of it, aspect (B,) times as high as wide,
    around centre (2, B), 0 to 1; what lies outside the image is cut off, where [6] would draw another."""
    half = torch.stack(((share * aspect).sqrt(), (share / aspect).sqrt())) / 2  # (2, B): of height and width
    at = (torch.arange(size, device=share.device) + 0.5) / size  # (size,)
    rows, columns = ((at - m[:, None]).abs() < h[:, None] for m, h in zip(centre, half))  # (B, size) each
    return rows[:, :, None] & columns[:, None, :]


def mix(x, share, box=None):
    """Mix image i of x (B, 3, H, W) with image B - 1 - i: the images, and the share (B,) of each that is its own.

    mixup [4] blends the two, cutmix [5] puts the other's box (B, H, W) into it. Differs from both: a share per image
    instead of one per batch, and the batch in reverse instead of shuffled, for batches are shuffled anyway.
    """
    if box is None:
        w = share[:, None, None, None]
        return w * x + (1 - w) * x.flip(0), share
    return torch.where(box[:, None], x.flip(0), x), 1 - box.float().mean(dim=(1, 2))  # left of x: a box may be cut off


def batch_index(n, batch_size, seed, step, slot, slots):
    """Which of n images make the slot-th of the slots micro-batches of a step: indices (batch_size,), and the epoch.
    Each epoch has an order of its own; all depends on (seed, step, slot, slots) alone."""
    size = batch_size * slots
    epoch, position = divmod(step, max(1, n // size))
    order = np.random.default_rng((seed, 1, epoch)).permutation(n)
    start = position * size + slot * batch_size
    return np.take(order, range(start, start + batch_size), mode="wrap"), epoch  # n may be below size


def augmented_batch(c, images, labels, teacher, classes, stats, step, slot, slots):
    """The slot-th of the slots micro-batches of a step: normalised images (B, 3, H, W), target probabilities
    (B, classes), and the teacher's (None without one). All depends on (seed, step, slot, slots) alone."""
    index, _ = batch_index(len(images), c.batch_size, c.seed, step, slot, slots)
    rng, B = np.random.default_rng((c.seed, 2, step, slot)), c.batch_size
    dy, dx = rng.integers(-c.crop, c.crop, (2, B), endpoint=True)
    mirror = (rng.integers(2, size=B) == 1) & c.flip
    kind, strength = rng.integers(len(AFFINE) + len(COLOUR), size=B), rng.uniform(-1, 1, B)
    draws = rng.random((7, B)).astype(np.float32)  # for erasing: whether, share, aspect, centre; for cutmix: centre
    cut = c.cutmix > 0 and (c.mixup == 0 or rng.random() < 0.5)
    alpha = c.cutmix if cut else c.mixup
    share = rng.beta(alpha, alpha, B).astype(np.float32) if alpha else np.ones(B, np.float32)
    index, dy, dx, mirror, draws, share = (torch.from_numpy(a).to(images.device)
                                           for a in (index, dy, dx, mirror, draws, share))
    x = augment(images, index, dy, dx, mirror)  # (B, 3, H, W)
    x = normalise(trivial_augment(x, kind, strength) if c.trivial else x, stats, c.image_size)
    if c.erase:  # [6] Alg. 1, but as in [2]'s code: up to a third, not 40%; aspect's logarithm uniform; normal noise
        whether, size, aspect, *centre = draws[:5]
        box = boxes(x.size(2), 0.02 + 0.31 * size, 0.3 * 11 ** aspect, torch.stack(centre))
        noise = torch.from_numpy(rng.standard_normal(x.shape, np.float32)).to(x.device)
        x = torch.where((box & (whether < c.erase)[:, None, None])[:, None], noise, x)
    if alpha:
        box = boxes(x.size(2), 1 - share, torch.ones_like(share), draws[5:]) if cut else None
        x, share = mix(x, share, box)

    def mixed(targets):  # (B, classes), as the images are mixed
        return share[:, None] * targets + (1 - share[:, None]) * targets.flip(0)

    hints = None
    if teacher is not None:  # it saw the image or its mirror, whichever this is, but not cropped, distorted or mixed
        hints = teacher[index, mirror.long()]  # (B, classes)
        hints = F.one_hot(hints.argmax(1), classes).float() if c.hard else (hints / c.temperature).softmax(dim=1)
        hints = mixed(hints)
    return x, mixed(F.one_hot(labels[index], classes).float()), hints


# ---- objective and optimiser ---------------------------------------------------------------------------------------

def objective(logits, targets, hints, c):
    """Cross-entropy of logits (B, classes) with target probabilities; a share --distill of it with the teacher's.

    Soft: the teacher's probabilities at a temperature T, times T² since gradients shrink by it ([9] §2; the divergence
    in [2] eq. 2 differs by the teacher's entropy, a constant). Hard: the teacher's choice ([2] eq. 3).
    """
    loss = F.cross_entropy(logits, targets, label_smoothing=c.label_smoothing)
    if hints is None:
        return loss
    T = 1.0 if c.hard else c.temperature
    return (1 - c.distill) * loss + c.distill * T**2 * F.cross_entropy(logits / T, hints)


def adamw(model, c):
    """AdamW. Layers, from 0: patches and positions; each block; norm and head. A layer's peak rate is layer_decay times
    that of the one above, as [10] fine-tunes. Weights decay; biases, norms, positions and tokens don't. With --freeze
    all but the head stops to require gradients."""
    groups, top = {}, len(model.blocks) + 1
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and (name.startswith("head.") or not c.freeze))
        part = name.split(".")
        layer = int(part[1]) + 1 if part[0] == "blocks" else top if part[0] in ("norm", "head") else 0
        decay = c.weight_decay * (p.dim() > 1 and name not in ("cls_token", "pos_embed"))
        if p.requires_grad:
            peak = c.lr * c.layer_decay ** (top - layer)
            groups.setdefault((peak, decay), dict(params=[], peak=peak, weight_decay=decay))["params"].append(p)
    return torch.optim.AdamW(list(groups.values()), fused=True)  # one pass over memory per parameter


def load_optimizers(optimizers, states):
    """Momenta from a checkpoint; rates and decay stay as the flags say now. Raises ValueError if groups differ."""
    for optimizer, state in zip(optimizers, states, strict=True):
        now = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        optimizer.load_state_dict(state)
        for group, flags in zip(optimizer.param_groups, now):
            group.update(flags)


def learning_rate(step, peak, warmup, steps, floor=0.0):
    """Linear warm-up to peak, then half a cosine down to floor · peak after the last step (arXiv 1608.03983 eq. 5)."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def update_average(average, model, decay):
    """average ← decay · average + (1 - decay) · model, buffers too: batch norm's statistics must fit the weights."""
    for a, b in zip(average.state_dict().values(), model.state_dict().values()):
        a.lerp_(b, 1 - decay) if a.is_floating_point() else a.copy_(b)


def vit_step(model, raw, ema, optimizer, autocast, train, teacher, c, step, steps, rank, world):
    """One update of the parameters and their average; returns the batch's loss and accuracy (2,), on the device. With
    mixed images, accuracy is of the larger share's label.

    model is raw, the ViT, or that compiled or in DistributedDataParallel; train is images and labels. N ranks (world)
    do what one does with N times the accumulation, but for the conv stem's batch statistics and DropPath's coins.
    """
    torch.manual_seed(int(np.random.SeedSequence((c.seed, step, rank)).generate_state(1)[0]))  # DropPath
    model.train(not c.freeze)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, group["peak"], c.warmup, steps)
    total = torch.zeros(2, device=train[0].device)
    for micro in range(c.grad_accum):
        x, targets, hints = augmented_batch(c, *train, teacher, raw.head.out_features, raw.stats, step,
                                            micro * world + rank, c.grad_accum * world)
        if world > 1:  # ranks exchange gradients at the last micro-batch; DDP wants to know before the forward pass
            model.require_backward_grad_sync = micro == c.grad_accum - 1
        with autocast:
            logits = model(x).float()  # (B, classes)
        loss = objective(logits, targets, hints, c) / c.grad_accum
        loss.backward()
        right = (logits.argmax(dim=1) == targets.argmax(dim=1)).float().mean()
        total += torch.stack((loss.detach(), right / c.grad_accum))
    if c.clip:
        nn.utils.clip_grad_norm_([p for p in raw.parameters() if p.requires_grad], c.clip)
    optimizer.step()
    optimizer.zero_grad()
    if ema is not None:  # an average of few steps at first, so that the random start is soon forgotten
        update_average(ema, raw, min(c.ema, (step + 1) / (step + 10)))
    return total


# ---- data ----------------------------------------------------------------------------------------------------------

CIFAR10 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "md5:c32a1d4ab5d03f1284b67883e8d87530"
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
CIFAR10_STATS = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # mean and std of a channel over all pixels
IMAGENET_STATS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # those that weights from ImageNet want

# Ten shapes of about unit size: the distance of points (u, v), v downwards, to the edge, negative inside. r is their
# distance to the centre, box that to a square.
SHAPES = dict(
    circle=lambda u, v, r, box: r - 0.9,
    square=lambda u, v, r, box: box,
    triangle=lambda u, v, r, box: torch.maximum(0.866 * u.abs() - 0.5 * v, v) - 0.5,
    ring=lambda u, v, r, box: (r - 0.72).abs() - 0.2,
    cross=lambda u, v, r, box: torch.maximum(torch.minimum(u.abs(), v.abs()) - 0.28, box - 0.1),
    star=lambda u, v, r, box: r - 0.62 - 0.33 * (5 * torch.atan2(u, -v)).cos(),
    heart=lambda u, v, r, box: (u**2 + (v + 0.8 * u.abs() - 0.2) ** 2).sqrt() - 0.75,
    stripes=lambda u, v, r, box: torch.maximum(box, ((u * 1.8) % 1 - 0.5).abs() / 1.8 - 0.14),
    checkerboard=lambda u, v, r, box: torch.maximum(box, (u * 6.5).sin() * (v * 6.5).sin() * 0.15),
    crescent=lambda u, v, r, box: torch.maximum(r - 0.9, 0.75 - ((u - 0.45) ** 2 + v**2).sqrt()))


def fetch_cifar10(root):
    """Download the official binary archive and unpack it to root/cifar-10-batches-bin, unless that is there."""
    target = Path(root) / "cifar-10-batches-bin"
    names = ["batches.meta.txt", "test_batch.bin", *(f"data_batch_{i}.bin" for i in range(1, 6))]
    if not all((target / name).exists() for name in names):
        archive = download(CIFAR10, Path(root) / "cifar-10-binary.tar.gz", CIFAR10_MD5)
        with one_line(f"{archive} can't be unpacked: delete it and try again"), tarfile.open(archive) as tar:
            target.mkdir(exist_ok=True)
            for name in names:  # by name, so that nothing can land elsewhere
                write_atomic(target / name, tar.extractfile(f"cifar-10-batches-bin/{name}").read())


def load_cifar10(root):
    """train_x (50000, 3, 32, 32) uint8, train_y (50000,) int64, test_x, test_y from root/cifar-10-batches-bin.

    A record is a label and 3,072 bytes, red, green, blue, row by row. Raises ValueError on a file of anything else.
    """
    parts = []
    for name in ("test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        path = Path(root) / "cifar-10-batches-bin" / f"{name}.bin"
        with one_line(f"{path} can't be read"):
            raw = np.fromfile(path, np.uint8)
        if len(raw) == 0 or len(raw) % 3073 or raw[::3073].max() > 9:
            raise UserError(f"{path} does not consist of CIFAR-10's records of 3,073 bytes: delete it and try again")
        parts.append(torch.from_numpy(raw.reshape(-1, 3073)))  # (10000, 3073)
    test, train = parts[0], torch.cat(parts[1:])
    return *(t for p in (train, test) for t in (p[:, 1:].reshape(-1, 3, 32, 32), p[:, 0].long())),


def make_shapes(n, seed):
    """Draw x (n, 3, 32, 32) uint8 and y (n,) int64: the ten shapes, equally often, in random order.

    Each is moved, turned and scaled; colours, shading, clutter and noise hide it from a linear classifier.
    """
    g = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=g)

    y = (torch.arange(n) % 10)[torch.randperm(n, generator=g)]
    rows, columns = torch.meshgrid(torch.arange(32) - 15.5, torch.arange(32) - 15.5, indexing="ij")  # (32, 32)
    size, angle = uniform(7, 11, 1, 1), uniform(-0.6, 0.6, 1, 1)
    v, u = (rows - uniform(-3, 3, 1, 1)) / size, (columns - uniform(-3, 3, 1, 1)) / size  # (n, 32, 32)
    u, v = u * angle.cos() + v * angle.sin(), v * angle.cos() - u * angle.sin()
    distance = torch.empty(n, 32, 32)
    for k, shape in enumerate(SHAPES.values()):
        a, b = u[y == k], v[y == k]  # (n_k, 32, 32)
        distance[y == k] = shape(a, b, (a**2 + b**2).sqrt(), torch.maximum(a.abs(), b.abs()) - 0.85)
    alpha = (0.5 - distance * size).clamp(0, 1)[:, None]  # (n, 1, 32, 32), edges one pixel soft
    ink, paper = uniform(0, 1, 3, 1, 1), uniform(0, 1, 3, 1, 1)
    paper = torch.where((ink - paper).abs().amax(dim=1, keepdim=True) < 0.5, (ink + 0.5) % 1, paper)  # never the same
    shade = uniform(-0.012, 0.012, 1, 1, 1) * rows + uniform(-0.012, 0.012, 1, 1, 1) * columns
    x = paper + (ink - paper) * alpha + shade  # (n, 3, 32, 32)
    for _ in range(3):  # clutter: small discs
        dy, dx, radius = rows - uniform(-16, 16, 1, 1), columns - uniform(-16, 16, 1, 1), uniform(0.8, 2.2, 1, 1)
        disc = (radius + 0.5 - (dy**2 + dx**2).sqrt()).clamp(0, 1)[:, None]
        x = x + (uniform(0, 1, 3, 1, 1) - x) * disc
    x = x + 0.05 * torch.randn(n, 3, 32, 32, generator=g)
    return (x * 255).round().clamp(0, 255).to(torch.uint8), y


def balanced_subset(labels, fraction):
    """Indices, ascending, of the first images of each class, a fraction of the class: the data is in random order."""
    classes = [(labels == k).nonzero().flatten() for k in labels.unique()]
    return torch.cat([k[:max(1, round(fraction * len(k)))] for k in classes]).sort().values


def load_images(c):
    """(x, y) of the training, validation and test images, and the names of the classes."""
    if c.data == "shapes":
        train, val, test = [make_shapes(n, seed) for n, seed in ((10000, 1), (1000, 2), (2000, 3))]
        classes = list(SHAPES)
    else:
        if c.data == "cifar10":
            fetch_cifar10(c.data_dir)
        x, y, *test = load_cifar10(c.data_dir if c.data == "cifar10" else c.data)
        if len(x) <= 5000:
            raise UserError(f"--data {c.data}: {len(x)} training images, want more than the 5,000 to validate on")
        train, val, classes = (x[:-5000], y[:-5000]), (x[-5000:], y[-5000:]), CIFAR10_CLASSES
    if c.full_train:
        train = [torch.cat(both) for both in zip(train, val)]
    if c.labels < 1:
        keep = balanced_subset(train[1], c.labels)
        train = [t[keep] for t in train]
    return train, val, test, classes


def load_teacher(path, c, classes, held_out):
    """The teacher's logits (N, 2, classes) of the images that load_images gives for training, from a .npy file of all
    training images, the last held_out of which are validated on without --full_train."""
    with one_line(f"{path} is no array of numbers"):
        logits = torch.from_numpy(np.load(path, allow_pickle=False)).float()
    labels = load_images(dataclasses.replace(c, full_train=True, labels=1.0))[0][1]
    if logits.shape != (len(labels), 2, classes) or not logits.isfinite().all():
        raise UserError(f"{path} holds {tuple(logits.shape)} numbers: want {(len(labels), 2, classes)}, all finite")
    labels = labels if c.full_train else labels[:-held_out]
    return logits[:len(labels)][balanced_subset(labels, c.labels)]


# ---- files and errors ----------------------------------------------------------------------------------------------

@contextlib.contextmanager
def one_line(message, status=2):
    """Turn whatever a broken file, disk or network raises inside into one line for the user."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{message} ({type(error).__name__}: {' '.join(str(error).split())[:300]})", status) from error


def download(url, path, checksum=None):
    """Fetch url to path unless it is there. A broken download stays as path.part, and the next try goes on with it.

    checksum: "sha256:" or "md5:" and the hash, or its first digits.
    """
    kind, _, digits = (checksum or "sha256:").partition(":")
    part = path.with_name(path.name + ".part")
    with one_line(f"can't download {url}: run again to go on, or bring the file to {path} by hand"):
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        have = part.stat().st_size if part.exists() else 0
        # identity: Content-Length would count the bytes of a compressed body
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        with requests.get(url, headers=headers, stream=True, timeout=30) as reply:
            if reply.status_code != 416:  # 416: nothing is missing, if the size agrees
                reply.raise_for_status()
            total = int(reply.headers.get("Content-Range", "/" + reply.headers["Content-Length"]).split("/")[1])
            have = 0 if reply.status_code == 200 else have  # 200: it comes from the start, not from where we are
            with open(part, "ab" if have else "wb") as file:
                for chunk in reply.iter_content(1 << 20) if reply.ok else ():
                    have += file.write(chunk)
                    print(f"\r{path.name}: {have / 1e6:.1f} of {total / 1e6:.1f} MB", end="", file=sys.stderr)
            print(file=sys.stderr)
            if have > total:  # not a part of this file: from the start next time
                part.unlink()
            if have != total:
                raise OSError(f"it ended after {have} of {total} bytes")
        if digits and not hashlib.new(kind, part.read_bytes()).hexdigest().startswith(digits):
            part.unlink()
            raise UserError(f"{url} is not the published file, its {kind} differs: deleted, try again")
        os.replace(part, path)
    return path


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


def write_png(path, image):
    """Write a picture (H, W, 3), a NumPy array of uint8: PNG is a header and the rows, compressed, a 0 before each."""
    H, W, _ = image.shape
    rows = np.concatenate((np.zeros((H, 1), np.uint8), image.reshape(H, 3 * W)), axis=1)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    write_atomic(path, b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", struct.pack(">IIBBBBB", W, H, 8, 2, 0, 0, 0)),
                 chunk(b"IDAT", zlib.compress(rows.tobytes())), chunk(b"IEND", b""))


def write_sheet(path, rows, side=96):
    """A PNG of rows of square images (3, s, s), 0 to 255, each shown with side × side pixels, 4 between them."""
    sheet = torch.full((3, len(rows) * (side + 4) + 4, max(map(len, rows)) * (side + 4) + 4), 255.0)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            y, x = 4 + i * (side + 4), 4 + j * (side + 4)
            sheet[:, y:y + side, x:x + side] = F.interpolate(image[None].float().cpu(), (side, side))[0]
    write_png(path, sheet.round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


# ---- pictures ------------------------------------------------------------------------------------------------------

@torch.no_grad()
def attention_maps(model, x):
    """Attention weights of normalised images x (B, 3, height, width): for each block (B, H, N, N), queries by keys."""
    x, maps = model.tokens(x), []
    for block in model.blocks:
        B, N, C = x.shape
        q, k, _ = block.attn.qkv(block.norm1(x)).view(B, N, 3, block.attn.heads, -1).permute(2, 0, 3, 1, 4)
        maps.append((q @ k.mT / q.size(-1) ** 0.5).softmax(dim=-1))
        x = block(x)
    return maps


def rollout(maps):
    """How much of each token's vector came from each patch, if attention were all that mixes them: the product of
    (W + I) / 2 over blocks, W averaged over heads ([8] eq. 1). (B, N, N), rows sum to 1."""
    total = same = torch.eye(maps[0].size(-1)).to(maps[0])
    for weights in maps:
        total = (weights.mean(dim=1) + same) / 2 @ total
    return total


def draw_attention(model, images, path):
    """A row per image (B, 3, H, W), uint8: itself, its rollout, and each head's map in the last block, from the class
    token or the mean of all patches; bright patches are read most."""
    model.eval()
    first, grid = int(model.pool == "cls"), model.grid
    x = normalise(images, model.stats, model.settings["image_size"])
    maps, rows = attention_maps(model, x), []
    looks = torch.cat((rollout(maps)[:, None], maps[-1]), dim=1)  # (B, 1 + H, N, N)
    looks = (looks[:, :, 0] if first else looks.mean(dim=2))[..., first:]  # (B, 1 + H, grid²)
    for image, look in zip(images, looks):
        light = (look / look.amax(dim=1, keepdim=True)).view(-1, 1, grid, grid)
        light = F.interpolate(light, images.shape[2:], mode="bilinear")
        rows.append([image, *(image * (0.15 + 0.85 * light))])
    write_sheet(path, rows)


def draw_positions(model, path):
    """For each patch, the cosine similarity of its position embedding with all others ([1] Figure 7 middle)."""
    table = F.normalize(model.pos_embed[0, int(model.pool == "cls"):].detach().float(), dim=1)  # (N, C)
    similarity = (table @ table.T).view(model.grid, model.grid, 1, model.grid, model.grid).cpu()
    write_sheet(path, [[255 * (1 + tile.expand(3, -1, -1)) / 2 for tile in row] for row in similarity],
                side=max(16, 512 // model.grid))


# ---- evaluate, train -----------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, images, labels, c, autocast):
    """Mean loss and accuracy on images (N, 3, H, W) uint8."""
    model.eval()
    logits = []
    for x in images.split(max(1, 500 * 64**2 // max(64, model.grid**2) ** 2)):  # attention's memory grows as N²
        with autocast:
            logits.append(model(normalise(x, model.stats, c.image_size)).float())
    logits = torch.cat(logits)  # (N, classes)
    return dict(val_loss=F.cross_entropy(logits, labels).item(),
                val_accuracy=(logits.argmax(dim=1) == labels).sum().item() / len(labels))


def load_vit(c, classes):
    """The network that the flags ask for: fresh, that of --resume, or --init's with a new last layer. Writes into c
    what the network is, where the flags left that open."""
    switches, source = dict(drop_path=c.drop_path, grad_checkpoint=c.grad_checkpoint), c.init
    if c.resume:
        source = f"{c.out}/ckpt.pt"
    if not source:
        dim, depth, heads = SIZES[c.arch]
        for name, value in FRESH.items():
            setattr(c, name, value if getattr(c, name) is None else getattr(c, name))
        return ViT(c.image_size or 32, c.patch_size, dim, depth, heads, classes, pool=c.pool, pos=c.pos,
                   conv_stem=c.conv_stem, **switches)
    changes = {name: getattr(c, name) for name in ("image_size", "pool") if getattr(c, name) and c.init}
    model = ViT.from_pretrained(source, data_dir=c.data_dir, num_classes=classes, **changes, **switches)
    if c.init:  # the old head's classes are others
        nn.init.zeros_(model.head.weight)
        nn.init.zeros_(model.head.bias)
    has = tuple(model.settings[name] for name in ("dim", "depth", "heads"))
    if c.arch != Config.arch and SIZES[c.arch] != has:
        raise UserError(f"--arch {c.arch} is {SIZES[c.arch]}, but {source} has width, depth and heads {has}")
    c.arch = next((name for name, size in SIZES.items() if size == has), c.arch)
    for name in (*FRESH, "image_size"):  # c then says what the model is
        value, has = getattr(c, name), model.settings[name]
        if value not in (None, has) and (value or name != "image_size"):
            raise UserError(f"--{name} {value}, but {source} has {has}")
        setattr(c, name, has)
    c.image_size = 0 if c.image_size == 32 else c.image_size  # 0: images are as they are
    return model


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


def train(c, interrupts=()):
    """Train as the Config c says, into the folder c.out, until interrupts has something in it; returns the status."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, dtype, autocast = pick_device(c.device, c.dtype, "avx512_bf16")
    if world > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if (local := int(os.environ.get("LOCAL_RANK", rank))) > 0:  # a machine's first rank may have to download
        torch.distributed.barrier()
    torch.manual_seed(c.seed)  # the same initial weights on every rank
    *splits, classes = load_images(c)
    raw, saved = load_vit(c, len(classes)), load_checkpoint(f"{c.out}/ckpt.pt") if c.resume else None
    teacher = load_teacher(c.teacher, c, len(classes), len(splits[1][1])).to(device) if c.teacher else None
    if local == 0 and world > 1:
        torch.distributed.barrier()
    train_split, val, test = [[t.to(device) for t in split] for split in splits]  # uint8, all on the device
    macs = count_macs(raw, raw.settings["image_size"])  # on the CPU: MPS' attention would go uncounted
    raw.to(device)
    ema = copy.deepcopy(raw).requires_grad_(False) if c.ema else None
    optimizer = adamw(raw, c)
    if saved:
        with one_line(f"{c.out}/ckpt.pt can't be resumed"):
            raw.load_state_dict(saved["model"])
            load_optimizers([optimizer], saved["optimizer"])
            if ema is not None:
                ema.load_state_dict(saved["ema"])
    model = torch.compile(raw) if c.compile else raw  # raw, not compiled, is what is evaluated and saved
    if world > 1:
        model = nn.parallel.DistributedDataParallel(model)
    batch = c.batch_size * c.grad_accum * world
    per_epoch = max(1, len(train_split[0]) // batch)
    steps = c.steps or math.ceil(c.epochs * per_epoch)
    run = RunFolder(c, saved, writes=rank == 0)
    if rank == 0:
        print(" ".join(f"{name}={value!r}" for name, value in dataclasses.asdict(c).items()))
        print(f"{sum(p.numel() for p in raw.parameters()):,} parameters | {macs / 1e6:.1f}M MACs | "
              f"{len(train_split[0]):,} images to train on | {steps} steps of {batch} | {device} {dtype}")

    def save(name):
        averaged, model_or_ema = {"ema": ema.state_dict()} if ema is not None else {}, ema or raw
        encoder = {k: v for k, v in model_or_ema.state_dict().items() if not k.startswith("head.")}
        run.save(name, raw, model_config=raw.settings, optimizer=[optimizer.state_dict()], encoder=encoder,
                 encoder_config=raw.settings, **averaged)

    resumed_at, end, every = run.step if saved else None, min(steps, c.stop_at or steps), c.eval_every or per_epoch
    clock, logged, pending, stop = time.perf_counter(), run.seconds, [], False
    while True:
        due = (run.step % every == 0 or run.step == end) and run.step != resumed_at
        stop = stop or (world == 1 and len(interrupts) > 0)
        if pending and (due or stop or run.step % c.log_every == 0):
            sums = torch.stack([*pending, pending[0].new_full((2,), len(interrupts))])  # (steps + 1, 2)
            if world > 1:  # the sum over ranks; a Ctrl-C may reach one of them first, all must stop at the same step
                torch.distributed.all_reduce(sums)
            *values, (stop, _) = sums.tolist()  # this waits for the device
            run.seconds, clock = run.seconds + time.perf_counter() - clock, time.perf_counter()
            losses, accuracies = zip(*values)  # of each step
            for i, loss in enumerate(losses):
                run.check("loss", loss, run.step - len(pending) + i)
            loss, accuracy = (sum(v) / len(v) / world for v in (losses, accuracies))
            ms, lr = 1e3 * (run.seconds - logged) / len(pending), max(g["lr"] for g in optimizer.param_groups)
            rate, pflop, logged, pending = 1e3 * batch / ms, 6e-15 * macs * batch * run.step, run.seconds, []
            run.log(f"step {run.step}/{steps} | loss {loss:.4f} | accuracy {accuracy:.3f} | lr {lr:.1e} | "
                    f"{ms:.1f} ms | {rate:.0f} images/s | {pflop:.3g} PFLOP", loss=loss, train_accuracy=accuracy,
                    lr=lr, ms=ms, seconds=run.seconds, images_per_s=rate, pflop=pflop)
        if due:
            validate(run, ema or raw, val, steps, c, autocast, world, save)
        if due or stop:
            save("ckpt.pt")
            clock = time.perf_counter()
        if run.step >= end or stop:
            break
        more = c, run.step, steps, rank, world
        pending.append(vit_step(model, raw, ema, optimizer, autocast, train_split, teacher, *more))
        run.step += 1
    if world > 1:  # a gloo group that ends while DDP still holds it may abort
        del model
        gc.collect()
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if rank == 0 and stop:
        print(f"stopped after step {run.step}; to go on: python vit.py --resume --out {c.out}")
    elif rank == 0:
        finish_run(run, raw, test, classes, c, autocast, device)
    return 130 if stop else 0


def validate(run, model, val, steps, c, autocast, world, save):
    """Evaluate during the run: a log line and row, best.pt if the accuracy is best, and curves."""
    scores = [{} if c.full_train else evaluate(model, *val, c, autocast)]
    if world > 1:  # the first rank's for all
        torch.distributed.broadcast_object_list(scores)
    if not c.full_train:  # else there are no images that it has not seen
        run.check("val_loss", scores[0]["val_loss"], run.step)
        run.log(f"step {run.step}/{steps} | " + " | ".join(f"{k} {v:.4f}" for k, v in scores[0].items()),
                seconds=run.seconds, **scores[0])
    if c.full_train or scores[0]["val_accuracy"] > run.best:
        run.best = scores[0].get("val_accuracy", -math.inf)
        save("best.pt")
    run.draw("accuracy", train="train_accuracy", val="val_accuracy")


def finish_run(run, model, test, classes, c, autocast, device):
    """Read the test set, once, with the best weights; write the log's last row; draw what they look at."""
    best = load_checkpoint(run.out / "best.pt")
    model.load_state_dict(best.get("ema") or best["model"])
    scores = evaluate(model, *test, c, autocast)
    memory = peak_mb(device)
    run.log(f"test accuracy {scores['val_accuracy']:.4f} | {run.seconds:.0f} s of training | peak {memory:.0f} MB | "
            f"pictures in {run.out}", seconds=run.seconds, test_accuracy=scores["val_accuracy"],
            test_loss=scores["val_loss"], final=True, peak_mb=memory)
    first_of_each = [(test[1] == k).nonzero()[0].item() for k in range(len(classes)) if (test[1] == k).any()]
    draw_attention(model, test[0][first_of_each], run.out / "attention.png")
    if model.settings["pos"] == "learned":  # fixed ones are the same in every run
        draw_positions(model, run.out / "positions.png")


def draw_augmentations(c):
    """augment.png: a row for each of eight training images, as eight steps would see it."""
    images, labels = load_images(c)[0]
    few = dataclasses.replace(c, batch_size=8)
    columns, orders = zip(*((augmented_batch(few, images[:8], labels[:8], None, 10, CIFAR10_STATS, step, 0, 1)[0],
                             np.argsort(batch_index(8, 8, c.seed, step, 0, 1)[0])) for step in range(8)))
    mean, std = (torch.tensor(s)[:, None, None] for s in CIFAR10_STATS)
    with one_line(f"can't make the folder {c.out}", status=1):
        Path(c.out).mkdir(parents=True, exist_ok=True)
    write_sheet(Path(c.out) / "augment.png", [[images[i], *(255 * (x[order[i]] * std + mean)
                                                             for x, order in zip(columns, orders))] for i in range(8)])
    print(f"wrote {c.out}/augment.png: the original, then what eight steps see")


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
        if c.show_augment:
            draw_augmentations(c)
            return 0
        pressed, old = [], signal.getsignal(signal.SIGINT)  # a first Ctrl-C stops between steps, a second at once
        signal.signal(signal.SIGINT, lambda *_: (pressed.append(True), signal.signal(signal.SIGINT, old)))
        try:
            return train(c, pressed)
        finally:
            signal.signal(signal.SIGINT, old)
    except UserError as error:
        print(f"vit.py: {error}", file=sys.stderr)
        return error.status
    except (MemoryError, RuntimeError) as error:  # torch's out of memory is one, a plain one on a CPU
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            print(f"vit.py: --compile failed, leave it out: {' '.join(str(error).split())[:200]}", file=sys.stderr)
            return 1
        if isinstance(error, RuntimeError) and not re.search("(out of|allocate|enough) memory", str(error)):
            raise
        print(f"vit.py: out of memory ({' '.join(str(error).split())[:200]}): lower --batch_size", file=sys.stderr)
        return 1
    except SystemExit as error:  # --help
        return error.code or 0
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
