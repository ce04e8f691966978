# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "numpy", "requests"]
# ///
"""I-JEPA: from a part of an image, predict what another network makes of the rest, instead of its pixels.

The encoder, a vision transformer, sees one large block of an image's patches, the context, without some smaller
blocks, the targets. The predictor, a narrower transformer, gets the encoder's vectors and the targets' places, and
predicts for each target patch the vector that the target encoder, which sees the whole image, has there [1]. Vectors,
unlike pixels, may leave out what nobody can foretell, such as noise and exact texture. The target encoder is a slow
average of the encoder and gets no gradient: with one, the easiest way to a low loss would be one vector for everything.
Afterwards the target encoder is kept, and probes tell what its features are worth.

    python ijepa.py                                     # offline, ten kinds of shapes that the script draws
    python ijepa.py --resume --epochs 40                # on to a later end; the rate rises again at first
    python ijepa.py --no-stop_gradient                  # watch the features collapse; --no-ema: targets without average
    python ijepa.py --data cifar10 --dim 192 --depth 6 --predictor_dim 96 --predictor_depth 4 --targets 4 \\
        --batch_size 256 --lr 1e-3 --warmup 500 --ema_start 0.996 --epochs 50   # downloads 170 MB
    python ijepa.py --show_masks                        # masks.png: contexts and targets
    python ijepa.py --compare out/ijepa/ckpt.pt,out/mae/ckpt.pt --out out/compared  # also simclr.py's and vit.py's ViT
    python vit.py --init out/ijepa/ckpt.pt --lr 1e-3 --layer_decay 0.75         # fine-tune the encoder, with labels
    torchrun --nproc_per_node=8 ijepa.py --data cifar10 --dim 192 --depth 12 --predictor_dim 96 \\
        --predictor_depth 4 --targets 4 --ema_start 0.996 --warmup 500 --epochs 300

and in Python: encoder = Encoder.from_pretrained("IN1K-vit.h.14-300e"), which downloads [1]'s ViT-H (10 GB), then
encoder(images) -> (B, N, C), images being normalise(uint8, encoder.stats, 224).

What to expect (torch 2.13.0, two cores of an AMD EPYC, seed 0, n = 1; logs in assets/logs/ijepa/):
- python ijepa.py, test images of shapes, bfloat16, 174 s of training on one core: linear probe .357 (random init .221,
  pixels .173), with a tenth of the labels .288 (.165, .184), with 1% .182 (.115, .136); kNN .214 (.117, .334)
- Masks on 8 × 8 patches, four targets, which may overlap: of 10,000 images a patch is in the context of 16% (centre)
  to 74% (corner), and in .13 (corner) to 1.51 (centre) targets of one on average (python .ci/old_tests.py BenchIJEPA.coverage)
- A training step of 192 × 6, patch 4, predictor 96 × 4, batch 256, in bfloat16 by AVX-512: 204 images per second, 2.69
  times as fast as [1]'s design with torch's fused attention in fp32 eager, 1.79 times as that under autocast, at the
  same masks, which need no padding; with the script's own, padded contexts 132 images per second: BenchIJEPA.speed
- CIFAR-10 from a JPEG copy (about three points lower), an encoder of 192 × 6 after 20 to 23 minutes each on one core,
  the best of three rates, kNN and linear on test images: I-JEPA (817 steps of 128 images) .425 and .490, MAE (2,938)
  .472 and .591, SimCLR .478 and .528 (its colours unchanged .403 and .481), with labels .582 and .597, random init
  .336 and .462, pixels .451 and .412: BenchIJEPA.comparison
- On a GPU: not yet measured

The features are the target encoder's, the mean of its patches' vectors after the last norm; probes are mae.py's.
Differs from [1]: images are shifted and mirrored, not cropped at random sizes; masks fit small grids (sample_masks
says how); initial weights are Xavier's, as in mae.py (with [1]'s deviation of .02 a patch of 48
numbers of unit variance has .02 √48 = .14 beside positions of √½ = .71, and predicting positions is easy), and what
block l adds starts divided by √(2 l); defaults suit shapes and a CPU.

Shapes: B batch, N patches, K of them context, M in a target block, R blocks per image, T tokens, C channels, D the
predictor's (in attention: per head), H heads, P patch side, S image side; images are (B, 3, S, S), uint8 until
normalised.

[1] Assran et al. 2023, I-JEPA, arXiv 2301.08243v3, and its code, github.com/facebookresearch/ijepa
[2] van der Maaten and Hinton 2008, t-SNE, JMLR 9, 2579-2605
"""

import argparse, contextlib, copy, dataclasses, gc, hashlib, html, inspect, json, math, os, re, signal, struct, sys
import tarfile, time, typing, zlib
from pathlib import Path

import numpy as np
import requests
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
    data: str = "shapes"  # shapes (drawn by this script), cifar10, or a folder that holds cifar-10-batches-bin/
    data_dir: str = "data"  # where downloads land
    labels: float = 1.0  # fraction of each class's training images to use; the rest are ignored
    full_train: bool = False  # pre-train on the validation images too, without their labels; probes stay as they are
    crop: int = 4  # pixels by which an image is shifted at most, its border reflected
    flip: bool = True  # mirror half of the images; [1]'s configs don't
    # masks, as shares of the image's area
    targets: int = 2  # blocks to predict, each alone; [1] has 4, which leave a smaller context
    target_min: float = 0.15  # least share of a target block
    target_max: float = 0.2  # largest share of a target block; its height is 0.75 to 1.5 times its width
    context_min: float = 0.85  # least share of the square that the targets are cut out of; the largest is 1
    # model
    patch_size: int = 4  # side of a patch in pixels
    dim: int = 96  # numbers per token in the encoder
    depth: int = 4  # blocks of the encoder
    heads: int = 3  # attention heads of each
    predictor_dim: int = 48  # numbers per token in the predictor, which is narrow [1] §3: 384 beside ViT-H's 1,280
    predictor_depth: int = 1  # blocks of the predictor; [1] has 12 beside ViT-H, which has 32
    predictor_heads: int = 3  # [1]'s code has as many as the encoder
    init: str | None = None  # a checkpoint of this script to start from; sizes left at their defaults become its sizes
    # objective
    ema: bool = True  # targets from an average of the encoder's weights; else from the encoder as it is
    ema_start: float = 0.95  # momentum of the average at step 0, from where it rises linearly; [1]: .996
    ema_end: float = 1.0  # momentum after the last step
    stop_gradient: bool = True  # else the encoder makes the targets, and gets their gradient; --ema is then idle
    # optimiser
    lr: float = 2e-3  # peak, whatever the batch
    weight_decay: float = 0.04  # at first, on weights and the mask token, not on biases and norms, as in [1]'s code
    weight_decay_end: float = 0.4  # after the last step; a cosine leads there, as in [1]'s code
    warmup: int = 100  # steps of linear warm-up
    batch_size: int = 64  # images per micro-batch
    grad_accum: int = 1  # micro-batches per step and process
    # evaluation and pictures
    probe_images: int = 4000  # training images that kNN and the probe are fitted on during the run; at its end, all
    show_masks: bool = False  # draw contexts and targets into masks.png, and train nothing
    compare: str | None = None  # checkpoints, comma-separated: probe their encoders, train nothing; give an --out, too
    tsne_images: int = 2000  # test images, 3,000 at most, in --compare's pictures
    # run
    epochs: float = 8  # passes over the training images
    steps: int | None = None  # updates of the parameters, instead of epochs
    stop_at: int | None = None  # end at this step, the schedule unchanged
    eval_every: int | None = None  # steps between evaluations, each followed by a checkpoint; None: a third of all
    log_every: int = 10  # steps between log lines
    seed: int = 0  # of initial weights, batches, augmentation and masks
    out: str = "out/ijepa"  # the run's folder
    resume: bool = False  # go on from out/ckpt.pt, with that run's flags where none are given
    device: str = "auto"  # auto (cuda, then mps, then cpu), or a torch device
    dtype: str = "auto"  # float32 or bfloat16; auto: bfloat16 where the hardware multiplies matrices in it
    compile: bool = False  # torch.compile: a wait at first (it needs a C++ compiler on a CPU), then faster steps

    def __post_init__(self):
        known = dict(dtype=("auto", "float32", "bfloat16"))
        may_be_0 = ("crop", "weight_decay", "weight_decay_end", "warmup", "seed", "ema_start", "ema_end")
        limits = dict(crop=31, labels=1, target_min=1, target_max=1, context_min=1, ema_start=1, ema_end=1,
                      tsne_images=3000)
        for name, value in vars(self).items():
            most = limits.get(name, sys.maxsize)
            if value == "" or name in known and value not in known[name]:
                raise UserError(f"--{name} {value!r}: want {' or '.join(known.get(name, ['some text']))}")
            if type(value) in (int, float) and not (0 < value <= most or value == 0 and name in may_be_0):
                up_to = f", at most {most}" if most < sys.maxsize else ""
                raise UserError(f"--{name} {value}: want a number {'from' if name in may_be_0 else 'above'} 0{up_to}")
        if self.data not in ("shapes", "cifar10") and not (Path(self.data) / "cifar-10-batches-bin").is_dir():
            raise UserError(f"--data {self.data}: want shapes, cifar10, or a folder that holds cifar-10-batches-bin/")
        clashes = {
            "--resume goes on from --out and --init starts anew: give one of them": self.resume and self.init,
            "--show_masks and --compare: give one of them": self.show_masks and self.compare,
            f"--init {self.init}: no such file": self.init and not Path(self.init).is_file(),
            f"--target_min {self.target_min} is above --target_max {self.target_max}":
                self.target_min > self.target_max,
            f"--tsne_images {self.tsne_images}: want 100 at least": self.tsne_images < 100,
            f"--patch_size {self.patch_size} does not divide images of 32 pixels, into 3 × 3 patches at least":
                32 % self.patch_size or 32 // self.patch_size < 3,
            f"--dim {self.dim} is no multiple of 4 and of --heads {self.heads}":
                self.dim % 4 or self.dim % self.heads,
            f"--predictor_dim {self.predictor_dim} is no multiple of 4 and of --predictor_heads "
            f"{self.predictor_heads}": self.predictor_dim % 4 or self.predictor_dim % self.predictor_heads}
        for path in self.compare.split(",") if self.compare else ():
            clashes[f"--compare {path}: no such file, nor one of {', '.join(OFFICIAL)}"] = (
                path not in OFFICIAL and not Path(path).is_file())
        grid = 32 // self.patch_size
        square = block_size(self.context_min * grid**2, 1.0, grid)[0] ** 2  # patches of the smallest
        block = max(math.prod(block_size(self.target_max * grid**2, 0.75 + i / 400, grid)) for i in range(301))
        clashes |= {f"--target_max {self.target_max} leaves too little of contexts of --context_min {self.context_min}":
                    square - block < 4}
        for message, clash in clashes.items():
            if clash:
                raise UserError(message)


# ---- model: patches, attention, blocks, as in vit.py ---------------------------------------------------------------

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


# ---- model: encoder, predictor, and the two together ---------------------------------------------------------------

def init_xavier(module):
    """Weights as in arXiv 2111.06377v3 §A.1 and its code, for nn.Module.apply: Xavier, q, k and v as one matrix, the
    patch projection as a linear layer. Its bias stays as torch draws it; other biases are 0, norms 1 and 0."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.data.flatten(1))  # a view: (C, 3 P²)


def rescale_by_depth(blocks):
    """Divide what each half of the l-th block adds to its input by √(2 l), so that the sum hardly grows with depth.

    [1]'s classes do this too, but its helper then sets all linear layers anew, which undoes it."""
    for i, block in enumerate(blocks):
        for layer in (block.attn.proj, block.mlp.fc2):
            layer.weight.data /= (2 * (i + 1)) ** 0.5


def take(x, ids):
    """Tokens ids (B, K) of each of x (B, N, C), or of one table (1, N, C) for all: (B, K, C)."""
    return x.expand(len(ids), -1, -1).gather(1, ids[:, :, None].expand(-1, -1, x.size(2)))


def block_of_last(block, x, M, key_mask=None):
    """block(x, key_mask)[:, -M:] of x (B, T, C), without the work on what nobody will read: the first tokens are keys
    and values for the last M, no more. In the predictor they are three quarters."""
    attn, (B, T, C), queries = block.attn, x.shape, x[:, -M:]
    H, W, bias, z = attn.heads, attn.qkv.weight, attn.qkv.bias, block.norm1(x)
    q = F.linear(z[:, -M:], W[:C], bias[:C]).view(B, M, H, C // H).transpose(1, 2)  # (B, H, M, D)
    k, v = F.linear(z, W[C:], bias[C:]).view(B, T, 2, H, C // H).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
    scores = q @ k.mT / q.size(-1) ** 0.5  # (B, H, M, T)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], -math.inf)
    y = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, M, C)
    queries = queries + attn.proj(y)  # (B, M, C)
    return queries + block.mlp(block.norm2(queries))


class Encoder(nn.Module):
    """Normalised images (B, 3, S, S) -> a vector for each patch (B, N, C), or for some, (B, K, C). No class token."""

    def __init__(self, image_size, patch_size, dim, depth, heads):
        super().__init__()
        if image_size % patch_size or dim % heads:
            raise UserError(f"patches of {patch_size} pixels must divide images of {image_size}, and {heads} heads "
                            f"{dim} channels")
        self.settings = dict(image_size=image_size, patch_size=patch_size, dim=dim, depth=depth, heads=heads)
        self.stats = IMAGENET_STATS if image_size > 64 else CIFAR10_STATS  # mean and deviation to normalise with
        self.grid = image_size // patch_size
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.pos_embed = nn.Parameter(sincos_2d(dim, self.grid)[None], requires_grad=False)  # (1, N, C), fixed
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(init_xavier)
        rescale_by_depth(self.blocks)

    def forward(self, images, ids=None, key_mask=None):
        """ids (B, K): the patches to look at, all others stay unseen. key_mask (B, K), bool: False where an id is
        padding, which nothing reads. Raises ValueError for images of another size."""
        S, P, pos = self.settings["image_size"], self.settings["patch_size"], self.pos_embed
        if images.shape[2:] != (S, S):
            raise UserError(f"images of {images.size(3)} × {images.size(2)} pixels, want {S} × {S}")
        if ids is not None:  # stack the patches, one below the other, as a thin picture: the rest is gone
            (B, K), columns = ids.shape, torch.arange(P, device=ids.device)
            y = (ids // self.grid * P)[:, :, None] + columns  # (B, K, P)
            x = (ids % self.grid * P)[:, :, None] + columns
            at = torch.arange(B, device=ids.device)[:, None, None, None]
            images = images[at, :, y[:, :, :, None], x[:, :, None, :]]  # (B, K, P, P, 3)
            images = images.reshape(B, K * P, P, 3).permute(0, 3, 1, 2)  # (B, 3, K P, P)
            pos = take(pos, ids)
        x = self.patch_embed(images)  # (B, K, C)
        x = x + pos.to(x.dtype)  # pos as x: under autocast a sum with float32 would be float32, here and in every block
        for block in self.blocks:
            x = block(x, key_mask)
        return self.norm(x)

    def features(self, images):
        """What the whole image means to the encoder: the mean of its patches (B, C)."""
        return self(images).mean(dim=1)

    @classmethod
    def from_pretrained(cls, name_or_path, data_dir="data"):
        """An Encoder with official weights, or the target encoder of a checkpoint of this script.

        name_or_path: one of OFFICIAL (downloaded), a file with [1]'s names, of which target_encoder is taken, or a .pt.
        64 channels per head, but 80 in ViT-H. Raises ValueError if the file can't be read or doesn't fit, strictly.
        """
        path = Path(name_or_path)
        if name_or_path in OFFICIAL:
            address = OFFICIAL[name_or_path]
            path = download(address, Path(data_dir) / address.split("/")[-1])
        with one_line(f"{path} holds no I-JEPA encoder that this script knows"):
            if path.suffix == ".pt":
                saved = load_checkpoint(path)
                w, settings = saved["encoder"], {k: v for k, v in saved["encoder_config"].items() if k != "pool"}
            else:  # mapped, not read: beside the target encoder lie another, the predictor, and Adam's moments
                w = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["target_encoder"]
                w = {name.removeprefix("module."): value for name, value in w.items()}  # of DDP
                P, dim = w["patch_embed.proj.weight"].size(3), w["pos_embed"].size(2)
                settings = dict(image_size=P * math.isqrt(w["pos_embed"].size(1)), patch_size=P, dim=dim,
                                depth=len({name.split(".")[1] for name in w if name.startswith("blocks.")}),
                                heads=16 if dim == 1280 else max(1, dim // 64))
            model = cls(**settings)
            model.load_state_dict(w)
        return model


OFFICIAL = {  # [1]'s ViT-H; its code's README names two more, which load by path, and a ViT-g, which doesn't
    "IN1K-vit.h.14-300e": "https://dl.fbaipublicfiles.com/ijepa/IN1K-vit.h.14-300e.pth.tar"}


class Predictor(nn.Module):
    """From the encoder's vectors of the context, those that the target encoder has at other places: (B, M, C)."""

    def __init__(self, num_patches, dim, predictor_dim, depth, heads):
        super().__init__()
        grid = math.isqrt(num_patches)
        if grid**2 != num_patches or predictor_dim % heads:
            raise UserError(f"{num_patches} patches must be a square, {heads} heads divide {predictor_dim} channels")
        self.predictor_embed = nn.Linear(dim, predictor_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, predictor_dim))
        self.predictor_pos_embed = nn.Parameter(sincos_2d(predictor_dim, grid)[None], requires_grad=False)
        self.predictor_blocks = nn.ModuleList(Block(predictor_dim, heads) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(predictor_dim, eps=1e-6)
        self.predictor_proj = nn.Linear(predictor_dim, dim)
        self.apply(init_xavier)
        rescale_by_depth(self.predictor_blocks)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, context, context_ids, target_ids, context_real=None):
        """context (B, K, C) of the patches context_ids (B, K); context_real (B, K), bool: False where an id is padding.

        target_ids (R B, M): R blocks of each image, all images' first ones, then all second ones. Each is a sequence
        of its own, with the context, so that no block's mask tokens see another's. Returns (R B, M, C).
        """
        M, R = target_ids.size(1), len(target_ids) // len(context)
        x = self.predictor_embed(context)  # (B, K, D), once for all blocks
        x = x + take(self.predictor_pos_embed, context_ids).to(x.dtype)
        gaps = self.mask_token + take(self.predictor_pos_embed, target_ids)  # (R B, M, D): alike but for the place
        x = torch.cat((x.repeat(R, 1, 1), gaps.to(x.dtype)), dim=1)  # (R B, K + M, D)
        key_mask = None if context_real is None else F.pad(context_real, (0, M), value=True).repeat(R, 1)
        *blocks, last = self.predictor_blocks
        for block in blocks:
            x = block(x, key_mask)
        x = block_of_last(last, x, M, key_mask)  # (R B, M, D)
        return self.predictor_proj(self.predictor_norm(x))


class IJEPA(nn.Module):
    """Encoder, predictor, and the target encoder, a copy of the encoder that no gradient reaches."""

    def __init__(self, image_size, patch_size, dim, depth, heads, predictor_dim, predictor_depth, predictor_heads,
                 stop_gradient=True):
        super().__init__()
        self.settings = dict(image_size=image_size, patch_size=patch_size, dim=dim, depth=depth, heads=heads,
                             predictor_dim=predictor_dim, predictor_depth=predictor_depth,
                             predictor_heads=predictor_heads, stop_gradient=stop_gradient)
        self.stop_gradient = stop_gradient
        self.encoder = Encoder(image_size, patch_size, dim, depth, heads)
        self.stats, self.grid = self.encoder.stats, self.encoder.grid
        self.predictor = Predictor(self.grid**2, dim, predictor_dim, predictor_depth, predictor_heads)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)

    def targets(self, images, target_ids):
        """What is to be predicted (R B, M, C): the target encoder's vectors for the full images, each minus its mean
        and divided by its deviation, so that no vector counts by its length. target_ids (R B, M) as for the predictor.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.stop_gradient):
            z = (self.target_encoder if self.stop_gradient else self.encoder)(images)  # (B, N, C)
            z = F.layer_norm(z.float(), z.shape[-1:])  # eps 1e-5, no parameters
            return torch.cat([take(z, ids) for ids in target_ids.split(len(z))])  # (R B, M, C)

    def forward(self, images, context_ids, target_ids, context_real=None):
        """Normalised images (B, 3, S, S) -> the loss, predictions and targets (R B, M, C): [1] §3 and its code, which
        has smooth L1 (β = 1) where the paper has L2."""
        target = self.targets(images, target_ids)
        context = self.encoder(images, context_ids, context_real)  # (B, K, C)
        pred = self.predictor(context, context_ids, target_ids, context_real).float()
        return F.smooth_l1_loss(pred, target), pred, target

    def features(self, images):
        """The target encoder's (B, C), which is what [1] evaluates."""
        return self.target_encoder.features(images)


# ---- masks, batches, optimiser -------------------------------------------------------------------------------------

def block_size(area, aspect, grid):
    """(height, width) in patches of a block of about this area, aspect times as high as wide, that fits the grid."""
    return [min(grid, max(1, round(side))) for side in ((area * aspect) ** 0.5, (area / aspect) ** 0.5)]


def sample_masks(batch, grid, generator, targets=4, target_scale=(0.15, 0.2), context_scale=(0.85, 1.0),
                 aspect=(0.75, 1.5), least=4):
    """Multi-block masks [1] §3 of a batch of images of grid × grid patches, from a torch.Generator alone.

    Returns context_ids (B, K), context_real (B, K), bool, False where a short context is padded, and a list of targets
    tensors (B, M) of ids. A batch has one size of target blocks, of a scale (share of the patches) and an aspect
    (height over width), and one of context squares; positions are drawn for each image, uniform over all that fit,
    and what lies in a target leaves the context. An image left with fewer than least patches draws its targets anew.

    Differs from [1]'s code, which never ends on 8 × 8 with its own min_keep of 10: a 3 × 3 target has 9 patches. There
    randint(0, grid - h) never draws the last position, so that 15 of 64 patches are neither context nor target, and no
    block spans the grid; one draw gives both scale and aspect, so that flat blocks are always small; a context may in
    the end overlap targets; all contexts of a batch are cut to the shortest, in raster order, from the bottom.
    """
    def uniform(low, high):
        return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()

    def blocks(n, h, w):  # n at random places: (n, grid, grid), True inside
        places = torch.tensor([grid - h + 1, grid - w + 1])[:, None, None]
        top, left = (torch.rand(2, n, 1, generator=generator) * places).long()  # (n, 1) each
        i = torch.arange(grid)
        rows, columns = ((i >= start) & (i < start + side) for start, side in ((top, h), (left, w)))  # (n, grid)
        return rows[:, :, None] & columns[:, None, :]

    h, w = block_size(uniform(*target_scale) * grid**2, uniform(*aspect), grid)  # two draws
    square = blocks(batch, *block_size(uniform(*context_scale) * grid**2, 1.0, grid))  # (B, grid, grid)
    target = blocks(batch * targets, h, w).view(batch, targets, grid, grid)
    for attempt in range(11):  # at the last, all of an image's targets lie in one place, so that this ends
        context = (square & ~target.any(dim=1)).flatten(1)  # (B, N)
        few = (context.sum(dim=1) < least).nonzero().flatten()
        if not len(few) or attempt == 10:
            break
        anew = blocks(len(few) * targets, h, w).view(len(few), targets, grid, grid)
        target[few] = anew if attempt < 9 else anew[:, :1].expand_as(anew)
    context_real, context_ids = context.sort(dim=1, descending=True, stable=True)  # in raster order, the others behind
    K = int(context.sum(dim=1).max())
    ids = target.flatten(2).nonzero()[:, 2].view(batch, targets, -1)  # (B, R, M): all blocks are of one size
    return context_ids[:, :K], context_real[:, :K], list(ids.unbind(dim=1))


def jepa_batch(c, images, stats, grid, step, slot, slots):
    """The slot-th of the slots micro-batches of a step: normalised images (B, 3, S, S), each shifted and mirrored, and
    their masks, as sample_masks gives them. They depend on (seed, step, slot, slots) alone; slots counts those of all
    processes."""
    index, _ = batch_index(len(images), c.batch_size, c.seed, step, slot, slots)
    rng, B, device = np.random.default_rng((c.seed, 2, step, slot)), c.batch_size, images.device
    dy, dx = rng.integers(-c.crop, c.crop, (2, B), endpoint=True)
    mirror = (rng.integers(2, size=B) == 1) & c.flip
    index, dy, dx, mirror = (torch.from_numpy(a).to(device) for a in (index, dy, dx, mirror))
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    return normalise(augment(images, index, dy, dx, mirror), stats), draw_masks(c, B, grid, generator, device)


def draw_masks(c, batch, grid, generator, device):
    """sample_masks with the flags of c, as IJEPA.forward takes them: context_ids, target_ids (R B, M), context_real.
    The last is None where no context is padded: attention without a mask is faster."""
    context_ids, real, targets = sample_masks(batch, grid, generator, c.targets, (c.target_min, c.target_max),
                                              (c.context_min, 1.0))
    return [None if t is None else t.to(device) for t in (context_ids, torch.cat(targets),
                                                          None if real.all() else real)]


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


def batch_index(n, batch_size, seed, step, slot, slots):
    """Which of n images make the slot-th of the slots micro-batches of a step: indices (batch_size,), and the epoch.
    Each epoch has an order of its own; all depends on (seed, step, slot, slots) alone."""
    size = batch_size * slots
    epoch, position = divmod(step, max(1, n // size))
    order = np.random.default_rng((seed, 1, epoch)).permutation(n)
    start = position * size + slot * batch_size
    return np.take(order, range(start, start + batch_size), mode="wrap"), epoch  # n may be below size


def adamw_groups(model, weight_decay):
    """AdamW as [1]'s code has it: decay on weights of layers and on the mask token, not on biases and norms."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in trained if p.dim() > 1], weight_decay=weight_decay),
              dict(params=[p for p in trained if p.dim() == 1], weight_decay=0.0)]
    return torch.optim.AdamW(groups, fused=True)  # one pass over memory per parameter


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


def ramp(step, first, last, steps):
    """From first at step 0 by half a cosine to last after the last step."""
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


@torch.no_grad()
def update_average(average, model, decay):
    """average ← decay · average + (1 - decay) · model, buffers too: batch norm's statistics must fit the weights."""
    for a, b in zip(average.state_dict().values(), model.state_dict().values()):
        a.lerp_(b, 1 - decay) if a.is_floating_point() else a.copy_(b)


def ijepa_step(model, raw, optimizer, autocast, images, c, step, steps, rank, world):
    """One update of the parameters, then of the target encoder; returns the batch's loss, on the device. N ranks do
    what one rank does with N times the accumulation: every micro-batch predicts as many blocks of as many images."""
    slots, total = c.grad_accum * world, 0
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, c.lr, c.warmup, steps)
    optimizer.param_groups[0]["weight_decay"] = ramp(step, c.weight_decay, c.weight_decay_end, steps)
    for micro in range(c.grad_accum):
        x, masks = jepa_batch(c, images, raw.stats, raw.grid, step, micro * world + rank, slots)
        if world > 1:  # ranks exchange gradients at the last micro-batch; DDP wants to know before the forward pass
            model.require_backward_grad_sync = micro == c.grad_accum - 1
        with autocast:
            loss = model(x, *masks)[0] / c.grad_accum
        loss.backward()
        total = total + loss.detach()
    optimizer.step()
    optimizer.zero_grad()
    momentum = c.ema_start + (c.ema_end - c.ema_start) * min(1.0, step / steps)
    update_average(raw.target_encoder, raw.encoder, momentum if c.ema and c.stop_gradient else 0.0)
    return total


# ---- evaluation: what are the features worth? ----------------------------------------------------------------------

@torch.no_grad()
def cached_features(encode, images, stats, autocast):
    """encode(normalised images) of images (N, 3, H, W), uint8, 500 at a time: (N, C), float32."""
    parts = []
    for x in images.split(500):
        with autocast:
            parts.append(encode(normalise(x, stats)).float())
    if not all(z.isfinite().all() for z in parts):
        raise UserError("features are not finite, there is nothing to probe: lower --lr", 1)
    return torch.cat(parts)


@torch.no_grad()
def knn_accuracy(train_z, train_y, test_z, test_y, k=20, temperature=0.07):
    """The share of test features (M, C) whose label the k training features (N, C) at the least angle vote for, each
    with the weight exp(cosine / temperature) (1805.01978v1 §3.4, there k = 200). Nothing is fitted: classes must lie
    apart already."""
    train_z, test_z = F.normalize(train_z, dim=1), F.normalize(test_z, dim=1)
    labels, right = F.one_hot(train_y).to(train_z.dtype), 0  # (N, classes)
    for z, y in zip(test_z.split(1000), test_y.split(1000)):
        cosine, nearest = (z @ train_z.T).topk(min(k, len(train_z)), dim=1)  # (b, k)
        votes = ((cosine / temperature).exp()[:, :, None] * labels[nearest]).sum(dim=1)  # (b, classes)
        right += (votes.argmax(dim=1) == y).sum().item()
    return right / len(test_z)


@torch.no_grad()
def linear_probe(train_z, train_y, val_z, val_y, test_z, test_y, rates=(1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0),
                 epochs=20, at_least=300, batch_size=500, seed=0):
    """Accuracy on test features (M, C) of a linear classifier: one per rate is trained, the best on validation counts.

    As in arXiv 2111.06377v3 §A.1: in front batch norm without an affine map, here with the statistics of all training
    features; no decay; a cosine. SGD with momentum .9 for epochs, but at least at_least steps; all R rates at once.
    """
    mean, std = train_z.mean(dim=0), (train_z.var(dim=0, unbiased=False) + 1e-6).sqrt()
    train_z, val_z, test_z = (F.pad((z - mean) / std, (0, 1), value=1.0) for z in (train_z, val_z, test_z))  # a bias
    (N, C), batch_size = train_z.shape, min(batch_size, len(train_z))  # C counts the bias
    labels = F.one_hot(train_y).to(train_z.dtype)  # (N, classes)
    steps, generator = max(at_least, epochs * N // batch_size), torch.Generator().manual_seed(seed)
    W = train_z.new_zeros(C, len(rates), labels.size(1))  # (C, R, classes)
    momentum, rate = torch.zeros_like(W), train_z.new_tensor(rates)[:, None]

    def logits(z):  # (b, R, classes), in one product
        return (z @ W.flatten(1)).unflatten(1, W.shape[1:])

    for step in range(steps):
        at = step % (N // batch_size)
        if at == 0:
            order = torch.randperm(N, generator=generator).to(train_z.device)
        index = order[at * batch_size:(at + 1) * batch_size]
        error = logits(train_z[index]).softmax(dim=2) - labels[index, None]  # cross-entropy's gradient
        momentum.mul_(0.9).add_((train_z[index].T @ error.flatten(1)).view_as(W) / batch_size)
        W -= learning_rate(step, 1.0, 0, steps) * rate * momentum
    right = (logits(val_z).argmax(dim=2) == val_y[:, None]).sum(dim=0)  # (R,)
    return (logits(test_z)[:, right.argmax()].argmax(dim=1) == test_y).sum().item() / len(test_y)


def rankme(z):
    """In effect how many dimensions features (N, C) fill: exp of the entropy of p = σ / Σσ + 1e-7, σ their singular
    values (arXiv 2210.02885v3). At most about the smaller of N and C; 1 if all lie on a line through the origin."""
    p = torch.linalg.svdvals(z.cpu().double())
    p = p / p.sum() + 1e-7
    return (-(p * p.log()).sum()).exp().item()


def spread(z):
    """√C times the standard deviation of z / |z| (N, C) over the N, mean over dimensions (arXiv 2011.10566v1 §4.1):
    about 1 if features point everywhere, 0 if they have collapsed to one direction."""
    return F.normalize(z, dim=1).std(dim=0).mean().item() * z.size(1) ** 0.5


def probe_encoders(encoders, stats, train, val, test, fractions, autocast, dimensions=True):
    """{name: scores} of encoders, a dict of functions of normalised images: what probes make of their features.

    train, val, test: (images (N, 3, H, W) uint8, labels (N,)). kNN and linear probes are fitted on train, the latter
    on fractions of its labels, and scored on test; for a look during a run, val may be given as test.
    dimensions: also how many the features fill, and how far they spread.
    """
    results = {}
    for name, encode in encoders.items():
        train_z, val_z = (cached_features(encode, x, stats, autocast) for x, _ in (train, val))
        test_z = val_z if test is val else cached_features(encode, test[0], stats, autocast)
        scores = results[name] = dict(knn=knn_accuracy(train_z, train[1], test_z, test[1]))
        for fraction in fractions:
            some = balanced_subset(train[1], fraction)
            scores[f"linear_{fraction:.0%}" if fraction < 1 else "linear"] = linear_probe(
                train_z[some], train[1][some], val_z, val[1], test_z, test[1])
        if dimensions:
            scores |= dict(rankme=rankme(test_z), std=spread(test_z))
    return results


def probe_table(results):
    """What probe_encoders returns as lines of text, an encoder in each."""
    rows = [("", *next(iter(results.values())))]
    rows += [(name, *(f"{value:.4f}" for value in scores.values())) for name, scores in results.items()]
    return "\n".join("".join(f"{cell:>12}" for cell in row) for row in rows)


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

def show_masks(c):
    """--show_masks: masks.png, six training images with masks of six batches: itself, its context, its targets."""
    (images, _), generator = load_images(c)[0], torch.Generator().manual_seed(c.seed)
    grid, rows = 32 // c.patch_size, []
    for image in images[:6]:
        context_ids, target_ids, _ = draw_masks(c, 1, grid, generator, image.device)
        row = [image]
        for ids in (context_ids[0], *target_ids):
            seen = torch.zeros(grid**2, dtype=torch.bool).index_fill(0, ids, True).view(grid, grid)
            seen = seen.repeat_interleave(c.patch_size, 0).repeat_interleave(c.patch_size, 1)  # (32, 32)
            row.append(torch.where(seen, image, 128))
        rows.append(row)
    with one_line(f"can't make the folder {c.out}", status=1):
        Path(c.out).mkdir(parents=True, exist_ok=True)
    write_sheet(Path(c.out) / "masks.png", rows)
    print(f"{c.out}/masks.png: an image, its context, its targets")


def first_of_each(labels):
    """The index of the first image of each class."""
    return [(labels == k).nonzero()[0].item() for k in labels.unique()]


def neighbours_png(encoders, train, test, path, autocast):
    """A row for the first test image of each class: itself, and for each of the encoders the five training images
    with the nearest features."""
    queries = first_of_each(test[1])
    rows = [[image] for image in test[0][queries]]
    for encode in encoders.values():
        z, train_z = (F.normalize(cached_features(encode, x, CIFAR10_STATS, autocast), dim=1)
                      for x in (test[0][queries], train[0]))
        nearest = (z @ train_z.T).topk(min(5, len(train_z)), dim=1).indices  # (classes, 5)
        for row, found in zip(rows, nearest):
            row += [torch.full_like(row[0], 255), *train[0][found]]  # a gap, and what was found
    write_sheet(path, rows, 64)


# ---- t-SNE ---------------------------------------------------------------------------------------------------------

def pca(x, k):
    """x (N, C) less its mean, along the at most k directions in which it varies most: (N, k)."""
    x = x - x.mean(dim=0)
    U, sigma, _ = torch.linalg.svd(x, full_matrices=False)
    return U[:, :k] * sigma[:k]


def affinities(x, perplexity=30.0):
    """P (N, N) of points x (N, C): how likely i and j are neighbours; it is symmetric, and its sum is 1 [2] §2, §3.

    p_{j|i} ~ exp(-β_i |x_i - x_j|²); bisection finds the β_i with which row i is as spread out as perplexity equal p's.
    """
    N, distances = len(x), torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").double() ** 2
    distances.fill_diagonal_(math.inf)  # nobody is his own neighbour
    distances -= distances.min(dim=1, keepdim=True).values  # changes no p, and no row underflows
    distances.fill_diagonal_(0)
    low, high, beta = torch.zeros(N, 1).double(), torch.full((N, 1), math.inf).double(), torch.ones(N, 1).double()
    for _ in range(64):
        p = (-beta * distances).exp().fill_diagonal_(0)  # (N, N)
        total = p.sum(dim=1, keepdim=True)
        p /= total
        entropy = total.log() + beta * (p * distances).sum(dim=1, keepdim=True)
        wide = entropy > math.log(perplexity)  # too many: narrower, so a larger β
        low, high = torch.where(wide, beta, low), torch.where(wide, high, beta)
        beta = torch.where(high.isinf(), 2 * beta, (low + high) / 2)
    return (p + p.T) / (2 * N)


def tsne_gradient(P, Y):
    """The gradient (N, 2) of KL(P || Q) by the map Y (N, 2), in which q_ij ~ 1 / (1 + |y_i - y_j|²) [2] eq. 4, 5."""
    square = (Y**2).sum(dim=1)
    kernel = 1 / (1 + (square[:, None] + square - 2 * Y @ Y.T).clamp(min=0))  # (N, N), Student's t
    kernel.fill_diagonal_(0)
    pull = (P - kernel / kernel.sum()) * kernel  # below 0 where they are too near
    return 4 * (pull.sum(dim=1, keepdim=True) * Y - pull @ Y)


def tsne(x, perplexity=30.0, iterations=1000, exaggerated=250):
    """A map (N, 2) of points x (N, C) that keeps neighbours together [2] Algorithm 1; distances far off mean little.

    From 50 principal components. At first P is 12 times too large, so that clusters gather while there is room; then
    momentum rises from .5 to .8. Differs from [2], where P is 4 times too large, for 50 steps (§3.4), components are 30
    (§4.2) and the rate is 100 at first: here the map starts at two components, so that nothing is random, and the rate
    is N / 12 / 4, at least 50, as in scikit-learn.
    """
    x = pca(x.detach().cpu().double(), 50)
    P = affinities(x, min(perplexity, (len(x) - 1) / 3)).float()
    Y = (x[:, :2] / x[:, 0].std().clamp(min=1e-30) * 1e-4).float()  # (N, 2)
    velocity, gain, rate = torch.zeros_like(Y), torch.ones_like(Y), max(50.0, len(x) / 12 / 4)
    for step in range(iterations):
        early = step < exaggerated
        gradient = tsne_gradient(12 * P if early else P, Y)
        same = (gradient > 0) == (velocity > 0)  # uphill: that coordinate's own rate shrinks, else it grows [2] §3.4
        gain = torch.where(same, gain * 0.8, gain + 0.2).clamp(min=0.01)
        velocity = (0.5 if early else 0.8) * velocity - rate * gain * gradient
        Y = Y + velocity
        Y = Y - Y.mean(dim=0)
    return Y


def maps_svg(path, maps, labels, classes):
    """Maps {name: (N, 2)}, four to a row, each scaled to its square, points coloured by their labels (N,)."""
    colours = "#4477aa #ee6677 #228833 #ccbb44 #66ccee #aa3377 #bb5522 #000000 #999999 #88cc66".split()
    width, height = 320 * min(4, len(maps)) + 110, 340 * math.ceil(len(maps) / 4)
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
           f'font-size="12"><rect width="{width}" height="{height}" fill="white"/>']
    for i, (name, Y) in enumerate(maps.items()):
        low, high = Y.min(dim=0).values, Y.max(dim=0).values
        x0, y0 = 320 * (i % 4) + 160, 340 * (i // 4) + 180  # its middle
        at = (Y - (low + high) / 2) / (high - low).max().clamp(min=1e-9) * 300 + torch.tensor([x0, y0])
        svg.append(f'<text x="{x0}" y="{y0 - 162}" text-anchor="middle">{html.escape(name)}</text>')
        for k in range(len(classes)):  # a class is one path of dots, each a line of no length with round ends
            dots = "".join(f"M{x:.0f} {y:.0f}h0" for x, y in at[labels == k].tolist())
            svg.append(f'<path d="{dots}" stroke="{colours[k % 10]}" stroke-width="3.5" stroke-linecap="round"/>')
    for k, name in enumerate(classes):
        svg.append(f'<text x="{width - 100}" y="{40 + 20 * k}" fill="{colours[k % 10]}">{name}</text>')
    write_atomic(path, "\n".join([*svg, "</svg>"]).encode())


# ---- compare -------------------------------------------------------------------------------------------------------

def read_encoder(path, data_dir):
    """The encoder in a checkpoint of this script, mae.py, simclr.py or vit.py, or an official one: a function of CIFAR-
    normalised images (B, 3, 32, 32) that returns features (B, C), and the model. Features are what its script takes:
    the mean of the patches, or the class token's vector. Raises ValueError if it is no ViT with timm's names."""
    if path in OFFICIAL or not path.endswith(".pt"):
        model, first, pool = Encoder.from_pretrained(path, data_dir), 0, "mean"
    else:
        with one_line(f"--compare {path} holds no encoder that this script knows"):
            saved = torch.load(path, map_location="cpu", weights_only=True)
            w, made_with = saved["encoder"], saved["encoder_config"]
            if "patch_embed.proj.weight" not in w:
                raise UserError(f"--compare {path}: a network of convolutions, or a ViT behind some; want one of "
                                "mae.py, ijepa.py, simclr.py --encoder vit, or vit.py --no-conv_stem")
            first, pool = int("cls_token" in w), saved["config"].get("pool") or made_with.get("pool", "mean")
            model = Encoder(**{k: made_with[k] for k in ("image_size", "patch_size", "dim", "depth", "heads")})
            if first:  # its row of the positions comes first too
                model.cls_token = nn.Parameter(w["cls_token"])
                model.pos_embed = nn.Parameter(w["pos_embed"], requires_grad=False)
            model.load_state_dict(w)  # strict; learned positions replace the fixed ones
    model.eval().requires_grad_(False)
    size = model.settings["image_size"]

    def encode(images):
        if size != 32:  # enlarge, and normalise as it was trained
            mean, std, mean2, std2 = (torch.tensor(s, device=images.device)[:, None, None]
                                      for s in (*CIFAR10_STATS, *model.stats))
            images = F.interpolate((images * std + mean - mean2) / std2, (size, size), mode="bilinear")
        x = model.patch_embed(images)  # (B, N, C)
        if first:
            x = torch.cat((model.cls_token.expand(len(x), -1, -1), x), dim=1)
        x = x + model.pos_embed
        for block in model.blocks:
            x = block(x)
        x = model.norm(x)  # (B, first + N, C)
        return x[:, 0] if pool == "cls" else x[:, first:].mean(dim=1)

    return encode, model


def compare_encoders(c):
    """--compare: one table of probes, one picture of maps, and one sheet of neighbours, for several encoders. They see
    the same images, and the linear probes have the same rates to choose from, on the validation images."""
    device, _, autocast = pick_device(c.device, c.dtype, "avx512_bf16")
    paths = c.compare.split(",")
    names = [(Path(path).parent.name if path.endswith(".pt") else "") or Path(path).stem for path in paths]
    names = [name[:11] for name in names]  # as wide as the table's columns
    if len({*names, "random_init", "pixels"}) < len(paths) + 2:  # alike: numbers
        names = [str(i) for i, _ in enumerate(paths)]
    models = {name: read_encoder(path, c.data_dir) for name, path in zip(names, paths)}
    torch.manual_seed(c.seed)
    settings = next(iter(models.values()))[1].settings
    if settings["image_size"] == 32:
        fresh = Encoder(**settings).eval()  # of the first one's sizes
        models["random_init"] = fresh.features, fresh
    for _, model in models.values():
        model.to(device)
    encoders = {name: encode for name, (encode, _) in models.items()} | {"pixels": lambda x: x.flatten(1)}
    *splits, classes = load_images(dataclasses.replace(c, full_train=False))
    train, val, test = ([t.to(device) for t in split] for split in splits)
    with one_line(f"can't make the folder {c.out}", status=1):
        Path(c.out).mkdir(parents=True, exist_ok=True)
    results = probe_encoders(encoders, CIFAR10_STATS, train, val, test, (1.0, 0.1, 0.01), autocast)
    print(*(f"{name}: {path}" for name, path in zip(names, paths)), sep="\n")
    print(f"on test images, with {len(train[0]):,} labels, 10% or 1% of them:\n{probe_table(results)}", flush=True)
    write_atomic(Path(c.out) / "compare.json", json.dumps(results, indent=2).encode())
    few = [t[:c.tsne_images] for t in test]
    maps = {name: tsne(cached_features(encode, few[0], CIFAR10_STATS, autocast)) for name, encode in encoders.items()}
    maps_svg(Path(c.out) / "tsne.svg", maps, few[1].cpu(), classes)
    neighbours_png(encoders, train, test, Path(c.out) / "neighbours.png", autocast)
    print(f"wrote tsne.svg, neighbours.png and compare.json into {c.out}; in the sheet, from left to right: a test "
          f"image, and five neighbours each by {', '.join(encoders)}")


# ---- evaluate, train -----------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, train, val, c, autocast):
    """What a look during the run shows: the loss on validation images, under the same masks every time, what probes
    make of the features (the probe's rate is chosen on these images too), and whether the features collapse.

    Read them beside the first look, at step 0. In a collapse std, of normalised features times √C, falls towards 0, and
    rankme, the dimensions in use, towards 1. over_mean is the loss over that of a guess which knows the place but not
    the image, the mean of 500 images' targets there: from 1 up nothing of the image is predicted, as before training.
    A falling loss alone is no progress: it falls fastest where all targets become alike.
    """
    model.eval()
    generator, total, of_mean = torch.Generator().manual_seed(0), 0.0, 0.0
    for x in val[0].split(500):
        masks = draw_masks(c, len(x), model.grid, generator, x.device)
        with autocast:
            loss, _, target = model(normalise(x, model.stats), *masks)
        ids, z = masks[1].flatten(), target.flatten(0, 1)  # (R B M,), (R B M, C)
        sums = z.new_zeros(model.grid**2, z.size(1)).index_add_(0, ids, z)  # (N, C)
        mean = (sums / ids.bincount(minlength=len(sums))[:, None])[ids]
        total, of_mean = total + loss.item() * len(x), of_mean + F.smooth_l1_loss(mean, z).item() * len(x)
    few = [t[:c.probe_images] for t in train]
    scores = probe_encoders({"ijepa": model.features}, model.stats, few, val, val, (1.0,), autocast)
    return dict(val_loss=total / len(val[0]), over_mean=total / max(of_mean, 1e-12), **scores["ijepa"])


def load_ijepa(c):
    """The network that the flags ask for, or --init's."""
    names = ("patch_size", "dim", "depth", "heads", "predictor_dim", "predictor_depth", "predictor_heads")
    if not c.init:
        return IJEPA(32, stop_gradient=c.stop_gradient, **{name: getattr(c, name) for name in names})
    with one_line(f"{c.init} can't be started from"):
        saved = load_checkpoint(c.init)
        model = IJEPA(**{**saved["model_config"], "stop_gradient": c.stop_gradient})
        model.load_state_dict(saved["model"])
    if model.settings["image_size"] != 32:
        raise UserError(f"{c.init} is for images of {model.settings['image_size']} pixels, want 32")
    for name in names:  # c then says what the model is
        value, default, has = getattr(c, name), getattr(Config, name), model.settings[name]
        if value not in (default, has):
            raise UserError(f"--{name} {value}, but {c.init} has {has}")
        setattr(c, name, has)
    c.__post_init__()  # do the masks fit its patches?
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
    splits = load_images(dataclasses.replace(c, full_train=False))[:3]
    saved = load_checkpoint(f"{c.out}/ckpt.pt") if c.resume else None
    torch.manual_seed(c.seed)  # the same initial weights on every rank
    raw = load_ijepa(c).to(device)
    torch.manual_seed(c.seed)
    fresh = Encoder(**raw.encoder.settings).to(device)  # as the network was before it had learned anything
    if local == 0 and world > 1:
        torch.distributed.barrier()
    train_split, val, test = [[t.to(device) for t in split] for split in splits]  # uint8, all on the device
    images = torch.cat((train_split[0], val[0])) if c.full_train else train_split[0]
    optimizer = adamw_groups(raw, c.weight_decay)
    if saved:
        with one_line(f"{c.out}/ckpt.pt can't be resumed"):
            raw.load_state_dict(saved["model"])
            load_optimizers([optimizer], saved["optimizer"])
    model = torch.compile(raw) if c.compile else raw  # raw, not compiled, is what is evaluated and saved
    if world > 1:
        model = nn.parallel.DistributedDataParallel(model)
    batch = c.batch_size * c.grad_accum * world
    per_epoch = max(1, len(images) // batch)
    steps = c.steps or math.ceil(c.epochs * per_epoch)
    run = RunFolder(c, saved, writes=rank == 0)
    if rank == 0:
        print(" ".join(f"{name}={value!r}" for name, value in dataclasses.asdict(c).items()))
        print(f"{sum(p.numel() for p in raw.parameters()):,} parameters | {len(images):,} images to train on | "
              f"{steps} steps of {batch} | {device} {dtype}", flush=True)
    yardsticks = dict(random_init=fresh.features, pixels=lambda x: x.flatten(1))
    few = [t[:c.probe_images] for t in train_split]
    beside = probe_encoders(yardsticks, raw.stats, few, val, val, (1.0,), autocast, dimensions=False)
    beside = {f"{key}_{name}": scores[key] for name, scores in beside.items() for key in ("knn", "linear")}

    def save(name):
        sizes = raw.encoder.settings
        run.save(name, raw, model_config=raw.settings, optimizer=[optimizer.state_dict()],
                 encoder=raw.target_encoder.state_dict(), encoder_config=dict(sizes, pool="mean"))  # ViT's arguments

    resumed_at, end = run.step if saved else None, min(steps, c.stop_at or steps)
    every = c.eval_every or math.ceil(steps / 3)
    clock, logged, pending, stop = time.perf_counter(), run.seconds, [], False
    while True:
        due = (run.step % every == 0 or run.step == end) and run.step != resumed_at
        stop = stop or (world == 1 and len(interrupts) > 0)
        if pending and (due or stop or run.step % c.log_every == 0):
            sums = torch.stack([*pending, pending[0].new_tensor(float(len(interrupts)))])  # (steps + 1,)
            if world > 1:  # the sum over ranks; a Ctrl-C may reach one of them first, all must stop at the same step
                torch.distributed.all_reduce(sums)
            *losses, stop = sums.tolist()  # this waits for the device
            run.seconds, clock = run.seconds + time.perf_counter() - clock, time.perf_counter()
            for i, loss in enumerate(losses):
                run.check("loss", loss, run.step - len(pending) + i)
            loss, lr = sum(losses) / len(losses) / world, optimizer.param_groups[0]["lr"]
            ms = 1e3 * (run.seconds - logged) / len(pending)
            rate, logged, pending = 1e3 * batch / ms, run.seconds, []
            run.log(f"step {run.step}/{steps} | loss {loss:.4f} | lr {lr:.1e} | {ms:.1f} ms | {rate:.0f} images/s",
                    loss=loss, lr=lr, ms=ms, seconds=run.seconds, images_per_s=rate)
        if due:
            look_ijepa(run, raw, train_split, val, beside, steps, c, autocast, world, save)
        if due or stop:
            save("ckpt.pt")
            clock = time.perf_counter()
        if run.step >= end or stop:
            break
        model.train()
        pending.append(ijepa_step(model, raw, optimizer, autocast, images, c, run.step, steps, rank, world))
        run.step += 1
    if world > 1:  # a gloo group that ends while DDP still holds it may abort
        del model
        gc.collect()
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if rank == 0 and stop:
        print(f"stopped after step {run.step}; to go on: python ijepa.py --resume --out {c.out}")
    elif rank == 0:
        finish_ijepa(run, raw, yardsticks, train_split, val, test, c, autocast, device)
    return 130 if stop else 0


def look_ijepa(run, model, train_split, val, beside, steps, c, autocast, world, save):
    """Evaluate during the run: a log line and row, best.pt if the linear probe is best, and curves."""
    try:
        scores = [evaluate(model, train_split, val, c, autocast) | beside]
    except UserError as error:
        raise UserError(f"{error} (at step {run.step}; {run.out} keeps the last checkpoint)", 1) from error
    if world > 1:  # the first rank's for all
        torch.distributed.broadcast_object_list(scores)
    run.check("val_loss", scores[0]["val_loss"], run.step)
    run.log(f"step {run.step}/{steps} | " + " | ".join(f"{name} {value:.4f}" for name, value in scores[0].items()),
            seconds=run.seconds, **scores[0])
    if scores[0]["linear"] > run.best:
        run.best = scores[0]["linear"]
        save("best.pt")
    run.draw("loss, accuracy, std", loss="loss", val_loss="val_loss", knn="knn", linear="linear",
             linear_random_init="linear_random_init", std="std")


def finish_ijepa(run, model, yardsticks, train_split, val, test, c, autocast, device):
    """Read the test set, once, with the best weights: the table of probes, the sheet, and the log's last row."""
    best = load_checkpoint(run.out / "best.pt")
    model.load_state_dict(best["model"])
    encoders = {"ijepa": model.eval().features, **yardsticks}
    results = probe_encoders(encoders, model.stats, train_split, val, test, (1.0, 0.1, 0.01), autocast)
    flat = {f"test_{key}{'' if name == 'ijepa' else '_' + name}": value
            for name, scores in results.items() for key, value in scores.items()}
    memory = peak_mb(device)
    run.log(f"on test images, with {len(train_split[0]):,} labels, 10% or 1% of them:\n{probe_table(results)}\n"
            f"test linear {flat['test_linear']:.4f}, of random init {flat['test_linear_random_init']:.4f}, weights of "
            f"step {best['step']} | {run.seconds:.0f} s of training | peak {memory:.0f} MB | nearest training images, "
            f"by ours, random init and pixels, in {run.out}/neighbours.png", seconds=run.seconds, **flat, final=True,
            peak_mb=memory)
    neighbours_png(encoders, train_split, test, run.out / "neighbours.png", autocast)


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
        if c.show_masks or c.compare:
            show_masks(c) if c.show_masks else compare_encoders(c)
            return 0
        pressed, old = [], signal.getsignal(signal.SIGINT)  # a first Ctrl-C stops between steps, a second at once
        signal.signal(signal.SIGINT, lambda *_: (pressed.append(True), signal.signal(signal.SIGINT, old)))
        try:
            return train(c, pressed)
        finally:
            signal.signal(signal.SIGINT, old)
    except UserError as error:
        print(f"ijepa.py: {error}", file=sys.stderr)
        return error.status
    except (MemoryError, RuntimeError) as error:  # torch's out of memory is one, a plain one on a CPU
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            print(f"ijepa.py: --compile failed, leave it out: {' '.join(str(error).split())[:200]}", file=sys.stderr)
            return 1
        if isinstance(error, RuntimeError) and not re.search("(out of|allocate|enough) memory", str(error)):
            raise
        print(f"ijepa.py: out of memory ({' '.join(str(error).split())[:200]}): lower --batch_size", file=sys.stderr)
        return 1
    except SystemExit as error:  # --help
        return error.code or 0
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
