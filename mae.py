# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "numpy", "requests"]
# ///
"""MAE: hide most of an image, and learn to see by painting in what is missing.

A masked autoencoder [1] cuts an image into patches and removes most of them at random. A transformer, the encoder,
reads the few that are left, which makes it cheap; a small second one, the decoder, gets what the encoder made of
them, with one and the same learned token in each gap, and predicts the removed pixels. No label is used. Afterwards
the decoder is thrown away, and what the encoder has learned is probed here, or trained on by vit.py.

    python mae.py                                       # offline, ten kinds of shapes that the script draws
    python mae.py --data cifar10 --dim 192 --depth 6 --heads 3 --decoder_dim 128 --decoder_depth 2 --decoder_heads 4 \\
        --mask_ratio 0.75 --norm_pix_loss --batch_size 256 --lr 1.5e-3 --warmup 500 --epochs 50   # downloads 170 MB
    python mae.py --resume --epochs 40                  # on to a later end; the rate rises again at first
    python vit.py --init out/mae/ckpt.pt --lr 1e-3 --layer_decay 0.75           # fine-tune the encoder, with labels
    python mae.py --reconstruct mae_visualize_vit_base --mask_ratio 0.75 --picture photo.jpg    # 450 MB; needs pillow
    torchrun --nproc_per_node=8 mae.py --data cifar10 --dim 192 --depth 12 --heads 3 --decoder_dim 128 \\
        --decoder_depth 2 --decoder_heads 4 --mask_ratio 0.75 --norm_pix_loss --lr 1e-3 --warmup 1700 --epochs 400

and in Python: model = MAE.from_pretrained("mae_pretrain_vit_base_full"), then loss, pred, mask = model(images), or
model.features(images) -> (B, C), images being normalise(uint8, model.stats, 224).

What to expect (torch 2.13.0, two cores of an AMD EPYC, seed 0, n = 1; logs in assets/logs/mae/):
- python mae.py, test images of shapes, bfloat16, 119 s of training: linear probe .474 (random init .249, pixels .173),
  with a tenth of the labels .392 (.190, .184), with 1% .199 (.114, .136); kNN .159 (.118, .334): a linear classifier
  can read off what was learned, but images of a class do not lie close together
- A training step of 192 numbers per token × 12 blocks, patch 4, decoder 128 × 2, batch 256, ratio .75, in bfloat16 by
  AVX-512: 323 images per second, 1.79 times as fast as [1]'s design with torch's fused attention and plain AdamW
  in fp32 eager, 1.57 times as that under autocast; an encoder step takes .27 of the time of an unmasked one:
  BenchMAE.speed
- CIFAR-10 from a JPEG copy (about three points lower), 192 × 6, decoder 128 × 2, ratio .75, --norm_pix_loss,
  --no-class_token, 4,127 steps of 256 images, an hour on one core, --lr 1.5e-3, the best of three, test images: linear
  .609 (random init .457, pixels .412), 1% of the labels .459 (.308, .275), kNN .524 (.327, .451). Then vit.py, 250
  steps of 128 images: .635, a tenth of the labels .619; from scratch .418 and .430: BenchMAE.hour
- There, ten minutes each, linear probe on validation images: ratio .5 .473, .75 .503, .9 .520; a decoder of 1
  block instead of 2 .510, of 4 .493: BenchMAE.ablation
- On a GPU: not yet measured

The features are the mean of the patches' vectors after the last norm; --pool cls takes the class token's instead, as
[1] does, and as vit.py --init does where there is one. Random init is the same encoder before it learned, pixels are
the image itself as features. The linear probe is trained on features that are cached without augmentation, by SGD;
[1] §A.1 has LARS and crops.
Differs from [1]: by default half of the patches are removed, not three quarters, and the decoder is one block of 64
channels, not eight of 512; images are shifted and mirrored instead of cropped at random sizes (Table 1e: crops of one
size do nearly as well); no decay on tokens, which [1]'s code decays; a block mask is one rectangle.

Shapes: B batch, N patches, K of them kept, C channels, D the decoder's (in Attention: per head), H heads, P patch side,
S image side; images are (B, 3, S, S), uint8 until normalised. The class token, if there is one, comes first: then
first is 1, else 0.

[1] He et al. 2021, MAE, arXiv 2111.06377v3, and its code, github.com/facebookresearch/mae
"""

import argparse, contextlib, dataclasses, gc, hashlib, inspect, json, math, os, re, signal, struct, sys, tarfile, time
import typing, zlib
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
    flip: bool = True  # mirror half of the images
    # masks and targets
    mask: str = "random"  # which patches are removed: random, block (one rectangle), or grid (regular) [1] Figure 6
    mask_ratio: float = 0.5  # share of the patches that is removed, up to 0.95; photos want 0.75 [1] Figure 5
    norm_pix_loss: bool = False  # predict a patch's pixels less their mean, over their deviation [1] §3, Table 1d
    # model
    patch_size: int = 4  # side of a patch in pixels
    dim: int = 128  # numbers per token in the encoder
    depth: int = 4  # blocks of the encoder
    heads: int = 4  # attention heads of each
    decoder_dim: int = 64  # numbers per token in the decoder: few do for fine-tuning, probes want more [1] Table 1b
    decoder_depth: int = 1  # one block is enough for fine-tuning; a linear probe wants more [1] Table 1a
    decoder_heads: int = 2  # 32 numbers per head, as in [1]
    class_token: bool = True  # one more learned token before the patches; the decoder reads it too [1] §A.1
    init: str | None = None  # a checkpoint of this script to start from: its weights and sizes, not its --norm_pix_loss
    # optimiser
    lr: float = 6e-3  # base rate: the peak is this times images per step / 256; [1] §A.1: 1.5e-4, with 4,096 of them
    weight_decay: float = 0.05  # on weights alone, not on biases, norms and tokens
    warmup: int = 40  # steps of linear warm-up
    batch_size: int = 64  # images per micro-batch
    grad_accum: int = 1  # micro-batches per step and process
    # evaluation and pictures
    pool: str = "mean"  # the features: mean, of the patches' vectors after the norm, or cls, the class token's
    probe_images: int = 4000  # training images that kNN and the probe are fitted on during the run; at its end, all
    reconstruct: str | None = None  # draw what a trained network rebuilds, no training: an official name, .pth or .pt
    picture: str | None = None  # a picture to --reconstruct instead of the data's (needs pillow)
    # run
    epochs: float = 10  # passes over the training images
    steps: int | None = None  # updates of the parameters, instead of epochs
    stop_at: int | None = None  # end at this step, the schedule unchanged
    eval_every: int | None = None  # steps between evaluations, each followed by a checkpoint; None: a third of all
    log_every: int = 10  # steps between log lines
    seed: int = 0  # of initial weights, batches, augmentation and masks
    out: str = "out/mae"  # the run's folder
    resume: bool = False  # go on from out/ckpt.pt, with that run's flags where none are given
    device: str = "auto"  # auto (cuda, then mps, then cpu), or a torch device
    dtype: str = "auto"  # float32 or bfloat16; auto: bfloat16 where the hardware multiplies matrices in it
    compile: bool = False  # torch.compile: a wait at first (it needs a C++ compiler on a CPU), then faster steps

    def __post_init__(self):
        known = dict(mask=("random", "block", "grid"), pool=("mean", "cls"), dtype=("auto", "float32", "bfloat16"))
        may_be_0 = ("crop", "weight_decay", "warmup", "seed")
        for name, value in vars(self).items():
            most = {"crop": 31, "labels": 1, "mask_ratio": 0.95}.get(name, sys.maxsize)
            if value == "" or name in known and value not in known[name]:
                raise UserError(f"--{name} {value!r}: want {' or '.join(known.get(name, ['some text']))}")
            if type(value) in (int, float) and not (0 < value <= most or value == 0 and name in may_be_0):
                up_to = f", at most {most}" if most < sys.maxsize else ""
                raise UserError(f"--{name} {value}: want a number {'from' if name in may_be_0 else 'above'} 0{up_to}")
        if self.data not in ("shapes", "cifar10") and not (Path(self.data) / "cifar-10-batches-bin").is_dir():
            raise UserError(f"--data {self.data}: want shapes, cifar10, or a folder that holds cifar-10-batches-bin/")
        clashes = {
            "--resume goes on from --out and --init starts anew: give one of them": self.resume and self.init,
            f"--init {self.init}: no such file": self.init and not Path(self.init).is_file(),
            f"--reconstruct {self.reconstruct}: no such file, nor one of {', '.join(OFFICIAL)}":
                self.reconstruct and self.reconstruct not in OFFICIAL and not Path(self.reconstruct).is_file(),
            f"--picture {self.picture}: give --reconstruct with it": self.picture and not self.reconstruct,
            f"--picture {self.picture}: no such file": self.picture and not Path(self.picture).is_file(),
            "--pool cls has no token to read with --no-class_token": self.pool == "cls" and not self.class_token,
            f"--patch_size {self.patch_size} does not divide images of 32 pixels": 32 % self.patch_size,
            f"--dim {self.dim} is no multiple of 4 and of --heads {self.heads}":
                self.dim % 4 or self.dim % self.heads,
            f"--decoder_dim {self.decoder_dim} is no multiple of 4 and of --decoder_heads {self.decoder_heads}":
                self.decoder_dim % 4 or self.decoder_dim % self.decoder_heads}
        for message, clash in clashes.items():
            if clash:
                raise UserError(message)
        kept_patches((32 // self.patch_size) ** 2, self.mask_ratio)  # raises if the ratio leaves none, or all


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


# ---- model: the masked autoencoder ---------------------------------------------------------------------------------

def patchify(images, P):
    """Images (B, 3, S, S) as patches (B, N, 3 P²), row by row; in each, pixel by pixel, its red, green and blue."""
    B, grid = len(images), images.size(2) // P
    x = images.reshape(B, 3, grid, P, grid, P).permute(0, 2, 4, 3, 5, 1)  # (B, grid, grid, P, P, 3)
    return x.reshape(B, grid**2, 3 * P**2)


def unpatchify(patches, P):
    """The inverse: (B, N, 3 P²) -> (B, 3, S, S)."""
    B, N, _ = patches.shape
    grid = math.isqrt(N)
    x = patches.reshape(B, grid, grid, P, P, 3).permute(0, 5, 1, 3, 2, 4)  # (B, 3, grid, P, grid, P)
    return x.reshape(B, 3, grid * P, grid * P)


def kept_patches(N, mask_ratio):
    """How many of N patches a ratio leaves, rounded down as in [1]'s code. Raises ValueError if that is 0 or N."""
    K = int(N * (1 - mask_ratio))
    if not 0 < K < N:
        raise UserError(f"--mask_ratio {mask_ratio} of {N} patches removes {'none' if K > 0 else 'all'} of them")
    return K


def init_xavier(module):
    """Weights as in arXiv 2111.06377v3 §A.1 and its code, for nn.Module.apply: Xavier, q, k and v as one matrix, the
    patch projection as a linear layer. Its bias stays as torch draws it; other biases are 0, norms 1 and 0."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.data.flatten(1))  # a view: (C, 3 P²)


class MAE(nn.Module):
    """Normalised images (B, 3, S, S) -> the loss, predictions (B, N, 3 P²), and the mask (B, N), 1 where removed."""

    def __init__(self, image_size, patch_size, dim, depth, heads, decoder_dim, decoder_depth, decoder_heads,
                 norm_pix_loss=True, class_token=True):
        super().__init__()
        if image_size % patch_size or dim % heads or decoder_dim % decoder_heads:
            raise UserError(f"patches of {patch_size} pixels must divide images of {image_size}, {heads} heads {dim} "
                            f"channels, and the decoder's {decoder_heads} heads {decoder_dim}")
        self.settings = dict(image_size=image_size, patch_size=patch_size, dim=dim, depth=depth, heads=heads,
                             decoder_dim=decoder_dim, decoder_depth=decoder_depth, decoder_heads=decoder_heads,
                             norm_pix_loss=norm_pix_loss, class_token=class_token)
        self.stats = IMAGENET_STATS if image_size > 64 else CIFAR10_STATS  # mean and std; see data below
        self.patch_size, self.norm_pix_loss, self.first = patch_size, norm_pix_loss, int(class_token)
        self.grid = image_size // patch_size

        def positions(dim):  # fixed; the class token's row is 0
            table = F.pad(sincos_2d(dim, self.grid), (0, 0, self.first, 0))  # (first + N, dim)
            return nn.Parameter(table[None], requires_grad=False)

        self.patch_embed, self.pos_embed = PatchEmbed(patch_size, dim), positions(dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_embed, self.decoder_pos_embed = nn.Linear(dim, decoder_dim), positions(decoder_dim)
        self.decoder_blocks = nn.ModuleList(Block(decoder_dim, decoder_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, 3 * patch_size**2)
        self.apply(init_xavier)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, decoder_dim))
        if class_token:
            self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))

    def tokens(self, images):
        """Each patch projected, with its position: (B, 3, S, S) -> (B, N, C)."""
        if images.shape[2:] != (self.settings["image_size"],) * 2:
            raise UserError(f"images of {images.size(3)} × {images.size(2)} pixels, want "
                            f"{self.settings['image_size']} × {self.settings['image_size']}")
        return self.patch_embed(images) + self.pos_embed[:, self.first:]

    def encoder(self, x):
        """The blocks, over the class token and tokens that have their positions: (B, K, C) -> (B, first + K, C)."""
        if self.first:
            x = torch.cat(((self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x), dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def features(self, images, pool="mean"):
        """A vector for each whole image: the mean over its patches, or with "cls" its class token. (B, C)."""
        if pool == "cls" and not self.first:
            raise UserError("--pool cls: this encoder has no class token")
        x = self.encoder(self.tokens(images))  # (B, first + N, C)
        return x[:, 0] if pool == "cls" else x[:, self.first:].mean(dim=1)

    def encode(self, images, mask_ratio, noise):
        """Keep the K patches with the least noise (B, N) and encode them: (B, first + K, C). Also the mask (B, N), and
        restore (B, N): each patch's place in the shuffled order, in which the kept ones come first."""
        x = self.tokens(images)
        B, N, C = x.shape
        K = kept_patches(N, mask_ratio)
        shuffle = noise.argsort(dim=1)  # (B, N)
        restore = shuffle.argsort(dim=1)  # argsort of a permutation is its inverse
        x = x.gather(1, shuffle[:, :K, None].expand(B, K, C))  # (B, K, C): from here on there are no others
        return self.encoder(x), (restore >= K).to(images.dtype), restore

    def decode(self, x, restore):
        """A prediction for each patch, removed or not, from the encoder's (B, first + K, C): (B, N, 3 P²)."""
        x = self.decoder_embed(x)  # (B, first + K, D)
        B, N = restore.shape
        class_token, kept = x[:, :self.first], x[:, self.first:]
        gaps = self.mask_token.expand(B, N - kept.size(1), -1)
        x = torch.cat((kept, gaps), dim=1)  # (B, N, D), shuffled
        x = x.gather(1, restore[:, :, None].expand(B, N, x.size(2)))  # each at its place
        x = torch.cat((class_token, x), dim=1) + self.decoder_pos_embed  # all gaps are alike but for this
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x[:, self.first:]))

    def targets(self, images):
        """What is to be predicted, (B, N, 3 P²), and what undoes it, (B, N, 1): each patch's mean and
        deviation, or 0 and 1 for plain pixels."""
        x = patchify(images, self.patch_size)
        if not self.norm_pix_loss:
            return x, torch.zeros_like(x[..., :1]), torch.ones_like(x[..., :1])
        mean, std = x.mean(dim=2, keepdim=True), (x.var(dim=2, keepdim=True) + 1e-6).sqrt()  # unbiased, as [1]'s code
        return (x - mean) / std, mean, std

    def forward(self, images, mask_ratio=0.75, noise=None):
        """noise (B, N): patches with the least are kept; by default uniform. Raises ValueError if all are, or none."""
        if noise is None:
            noise = torch.rand(len(images), self.grid**2, device=images.device)
        x, mask, restore = self.encode(images, mask_ratio, noise)
        pred = self.decode(x, restore)  # (B, N, 3 P²)
        error = ((pred - self.targets(images)[0]) ** 2).mean(dim=2)  # (B, N); float32 though pred may be bfloat16
        return (error * mask).sum() / mask.sum(), pred, mask  # over removed patches alone [1] §3

    @classmethod
    def from_pretrained(cls, name_or_path, data_dir="data", **changes):
        """An MAE with official weights, or from a checkpoint of this script. Its fresh_decoder is True if the file
        has the encoder alone.

        name_or_path: one of OFFICIAL (downloaded, 340 MB to 1.3 GB), a .pth file with their names inside, or a .pt.
        changes are arguments of MAE. Unless said, official encoders have 64 channels per head (ViT-Huge 80), decoders
        32, and files with "visualize" in their names predict pixels, others normalised ones. Raises ValueError if it
        is no MAE's.
        """
        path = Path(name_or_path)
        if name_or_path in OFFICIAL:
            address, checksum = OFFICIAL[name_or_path]
            path = download(address, Path(data_dir) / address.split("/")[-1], checksum)
        with one_line(f"{path} holds no masked autoencoder that this script knows"):
            if path.suffix == ".pt":
                saved = load_checkpoint(path)
                w, settings = saved["model"], saved["model_config"]
            else:
                w = torch.load(path, map_location="cpu", weights_only=True)
                w = w.get("model", w)
                P, first, dim = w["patch_embed.proj.weight"].size(3), int("cls_token" in w), w["pos_embed"].size(2)
                decoder_dim = w["mask_token"].size(2) if "mask_token" in w else 512

                def depth(of):
                    return len({name.split(".")[1] for name in w if name.startswith(of)})

                settings = dict(
                    image_size=P * math.isqrt(w["pos_embed"].size(1) - first), patch_size=P, dim=dim,
                    depth=depth("blocks."), heads=16 if dim == 1280 else max(1, dim // 64), decoder_dim=decoder_dim,
                    decoder_depth=depth("decoder_blocks.") or 8, decoder_heads=max(1, decoder_dim // 32),
                    norm_pix_loss="visualize" not in path.name, class_token=bool(first))
            model = cls(**{**settings, **changes})
            model.fresh_decoder = "mask_token" not in w
            decoder = [name for name in model.state_dict() if name.startswith(("decoder_", "mask_token"))]
            missing, unexpected = model.load_state_dict(w, strict=False)  # raises if a shape differs
            wrong = {*missing} ^ set(decoder if model.fresh_decoder else ()) | {*unexpected}
            if wrong:
                raise UserError(f"{path} is of another model: it or an MAE lacks {', '.join(sorted(wrong)[:3])}")
        return model


META = "https://dl.fbaipublicfiles.com/mae/"
OFFICIAL = {  # address, and the start of the file's MD5 where [1]'s code gives it; else its size is checked
    "mae_pretrain_vit_base": (META + "pretrain/mae_pretrain_vit_base.pth", "md5:8cad7c"),  # the encoder alone
    "mae_pretrain_vit_large": (META + "pretrain/mae_pretrain_vit_large.pth", "md5:b8b06e"),
    "mae_pretrain_vit_base_full": (META + "pretrain/mae_pretrain_vit_base_full.pth", None),
    "mae_visualize_vit_base": (META + "visualize/mae_visualize_vit_base.pth", None),  # predicts pixels
    "mae_visualize_vit_large": (META + "visualize/mae_visualize_vit_large.pth", None),
    "mae_visualize_vit_large_ganloss": (META + "visualize/mae_visualize_vit_large_ganloss.pth", None)}


# ---- masks, batches, optimiser -------------------------------------------------------------------------------------

def mask_noise(kind, rng, B, grid):
    """Noise (B, grid²), float32: the patches with the most are removed, as many as the ratio says ([1] Figure 6).

    random: any patches. block: a rectangle around a random point, its last row or column perhaps not whole, up to 3.3
    times as long as wide before the border cuts it; differs from [1], which takes BEiT's several blocks. grid: every
    2 × 2 square loses its patches in the same order, so that at .75 the same one of its four is kept everywhere.
    """
    noise = rng.random((B, grid, grid), np.float32)
    rows, columns = np.mgrid[:grid, :grid]
    if kind == "block":
        (y, x), stretch = rng.uniform(-0.5, grid - 0.5, (2, B, 1, 1)), 0.55 * 3.3 ** rng.random((B, 1, 1))
        noise = 1e-3 * noise - np.maximum(abs(rows - y) / stretch, abs(columns - x) * stretch)  # most in the middle
    if kind == "grid":
        order = rng.permuted(np.tile(np.arange(4), (B, 1)), axis=1)  # (B, 4)
        noise += order[:, 2 * (rows % 2) + columns % 2]
    return noise.reshape(B, grid**2).astype(np.float32)


def masked_batch(c, images, stats, grid, step, slot, slots):
    """The slot-th of the slots micro-batches of a step: normalised images (B, 3, S, S), each shifted and mirrored,
    and the noise of their masks (B, N). All depends on (seed, step, slot, slots) alone."""
    index, _ = batch_index(len(images), c.batch_size, c.seed, step, slot, slots)
    rng, B = np.random.default_rng((c.seed, 2, step, slot)), c.batch_size
    dy, dx = rng.integers(-c.crop, c.crop, (2, B), endpoint=True)
    mirror = (rng.integers(2, size=B) == 1) & c.flip
    index, dy, dx, mirror, noise = (torch.from_numpy(a).to(images.device)
                                    for a in (index, dy, dx, mirror, mask_noise(c.mask, rng, B, grid)))
    return normalise(augment(images, index, dy, dx, mirror), stats), noise


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


def decay_weights(model, weight_decay):
    """AdamW with the betas of [1] §A.1: decay on weights of layers, not on biases, norms and tokens."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in trained if p.dim() > 1 and not name.endswith("_token")]
    others = [p for name, p in trained if p.dim() == 1 or name.endswith("_token")]
    groups = [dict(params=decayed, weight_decay=weight_decay), dict(params=others, weight_decay=0.0)]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)  # one pass over memory per parameter


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


def mae_step(model, raw, optimizer, autocast, images, c, step, steps, rank, world):
    """One update of the parameters; returns the batch's loss, on the device. N ranks do what one rank does with N
    times the accumulation: every image loses equally many patches, so that the mean of means is the mean. raw is the
    model without DistributedDataParallel and torch.compile around it."""
    slots, total = c.grad_accum * world, 0
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, c.lr * c.batch_size * slots / 256, c.warmup, steps)
    for micro in range(c.grad_accum):
        x, noise = masked_batch(c, images, raw.stats, raw.grid, step, micro * world + rank, slots)
        if world > 1:  # ranks exchange gradients at the last micro-batch; DDP wants to know before the forward pass
            model.require_backward_grad_sync = micro == c.grad_accum - 1
        with autocast:
            loss = model(x, c.mask_ratio, noise)[0] / c.grad_accum
        loss.backward()
        total = total + loss.detach()
    optimizer.step()
    optimizer.zero_grad()
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

@torch.no_grad()
def draw_reconstructions(model, images, path, mask, mask_ratio):
    """A sheet of triples, two in a row: images (B, 3, H, W), uint8, what is left of them, and that with the removed
    patches as predicted; returns the loss. Masks are the same every time.

    With norm_pix_loss, the predictions have neither brightness nor contrast: each patch is given the mean and the
    deviation of the true one, which the network never saw, so that such pictures look better than they should.
    """
    model.eval()
    P, (mean, std) = model.patch_size, (torch.tensor(s, device=images.device)[:, None, None] for s in model.stats)
    x = normalise(images, model.stats, model.settings["image_size"])
    noise = torch.from_numpy(mask_noise(mask, np.random.default_rng(0), len(x), model.grid)).to(x.device)
    loss, pred, removed = model(x, mask_ratio, noise)
    _, patch_mean, patch_std = model.targets(x)
    removed = unpatchify(removed[:, :, None].expand(-1, -1, 3 * P**2), P)  # (B, 3, S, S)
    rebuilt = torch.where(removed == 1, unpatchify(pred.float() * patch_std + patch_mean, P), x)
    x, rebuilt = (255 * (t * std + mean) for t in (x, rebuilt))
    triples = list(zip(x, torch.where(removed == 1, 128.0, x), rebuilt))
    write_sheet(path, [sum(triples[i:i + 2], ()) for i in range(0, len(triples), 2)], max(96, x.size(2)))
    return loss.item()


def about_pictures(model):
    """What the sheet shows, for people to read."""
    return "original, what is left, rebuilt" + model.norm_pix_loss * " (with each true patch's mean and contrast)"


def reconstruct(c):
    """--reconstruct, on the CPU in fp32: a picture, or an image of each class, as a trained network rebuilds it from a
    part."""
    if c.picture:
        with one_line("--picture needs pillow: pip install pillow"):
            from PIL import Image, ImageOps
    model = MAE.from_pretrained(c.reconstruct, c.data_dir)
    if model.fresh_decoder:
        raise UserError(f"--reconstruct {c.reconstruct}: an encoder without its decoder; try mae_visualize_vit_base")
    if c.picture:
        size = model.settings["image_size"]
        with one_line(f"--picture {c.picture} can't be read"):
            image = ImageOps.exif_transpose(Image.open(c.picture)).convert("RGB")  # a photo may lie on its side
            image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
        images = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # (1, 3, S, S)
    else:
        _, (images, labels), _, _ = load_images(c)
        images = images[first_of_each(labels)]
    with one_line(f"can't make the folder {c.out}", status=1):
        Path(c.out).mkdir(parents=True, exist_ok=True)
    loss = draw_reconstructions(model, images, Path(c.out) / "reconstruct.png", c.mask, c.mask_ratio)
    print(f"loss {loss:.4f} at --mask {c.mask} --mask_ratio {c.mask_ratio} | {c.out}/reconstruct.png: "
          f"{about_pictures(model)}")


def first_of_each(labels):
    """The index of the first image of each class."""
    return [(labels == k).nonzero()[0].item() for k in labels.unique()]


# ---- evaluate, train -----------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, train, val, c, autocast):
    """Loss on validation images, under the same masks every time, and what probes make of their features. The probe's
    rate is chosen on these images too: a look during the run, no more."""
    model.eval()
    rng, total = np.random.default_rng(0), 0.0
    for x in val[0].split(500):
        noise = torch.from_numpy(mask_noise(c.mask, rng, len(x), model.grid)).to(x.device)
        with autocast:
            total += model(normalise(x, model.stats), c.mask_ratio, noise)[0].item() * len(x)
    few = [t[:c.probe_images] for t in train]
    encoders = {"mae": lambda x: model.features(x, c.pool)}
    scores = probe_encoders(encoders, model.stats, few, val, val, (1.0,), autocast)
    return dict(val_loss=total / len(val[0]), **scores["mae"])


def load_mae(c):
    """The network that the flags ask for, or --init's, whose sizes c then has."""
    names = ("patch_size", "dim", "depth", "heads", "decoder_dim", "decoder_depth", "decoder_heads", "class_token")
    if not c.init:
        return MAE(32, norm_pix_loss=c.norm_pix_loss, **{name: getattr(c, name) for name in names})
    model = MAE.from_pretrained(c.init, norm_pix_loss=c.norm_pix_loss)
    if model.fresh_decoder:
        raise UserError(f"--init {c.init}: an encoder without its decoder; want a checkpoint of this script")
    for name in names:
        value, default, has = getattr(c, name), getattr(Config, name), model.settings[name]
        if value not in (default, has):
            raise UserError(f"--{name} {value}, but {c.init} has {has}")
        setattr(c, name, has)
    if model.settings["image_size"] != 32:
        raise UserError(f"{c.init} is for images of {model.settings['image_size']} pixels, want 32")
    if c.pool == "cls" and not model.first:
        raise UserError(f"--pool cls, but {c.init} has no class token")
    kept_patches(model.grid**2, c.mask_ratio)  # Config knew only the flags' own patch_size
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
    raw = load_mae(c).to(device)
    torch.manual_seed(c.seed)
    fresh = MAE(**raw.settings).to(device)  # as the network was before it had learned anything
    if local == 0 and world > 1:
        torch.distributed.barrier()
    train_split, val, test = [[t.to(device) for t in split] for split in splits]  # uint8, all on the device
    images = torch.cat((train_split[0], val[0])) if c.full_train else train_split[0]
    optimizer = decay_weights(raw, c.weight_decay)
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
              f"{steps} steps of {batch} | {device} {dtype}\nfeatures: "
              f"{'the class token' if c.pool == 'cls' else 'mean of the patches'} | sheet: {about_pictures(raw)}",
              flush=True)
    yardsticks = dict(random_init=lambda x: fresh.features(x, c.pool), pixels=lambda x: x.flatten(1))
    few = [t[:c.probe_images] for t in train_split]
    beside = probe_encoders(yardsticks, raw.stats, few, val, val, (1.0,), autocast, dimensions=False)
    beside = {f"{key}_{name}": scores[key] for name, scores in beside.items() for key in ("knn", "linear")}

    def save(name):
        settings, weights = raw.settings, raw.state_dict()
        encoder = {k: v for k, v in weights.items() if not k.startswith(("decoder_", "mask_token"))}
        sizes = {k: settings[k] for k in ("image_size", "patch_size", "dim", "depth", "heads")}
        run.save(name, raw, model_config=settings, optimizer=[optimizer.state_dict()], encoder=encoder,
                 encoder_config=dict(sizes, pool="cls" if raw.first else "mean"))  # ViT's arguments

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
            look(run, raw, train_split, val, beside, steps, c, autocast, world, save)
        if due or stop:
            save("ckpt.pt")
            clock = time.perf_counter()
        if run.step >= end or stop:
            break
        model.train()
        pending.append(mae_step(model, raw, optimizer, autocast, images, c, run.step, steps, rank, world))
        run.step += 1
    if world > 1:  # a gloo group that ends while DDP still holds it may abort
        del model
        gc.collect()
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if rank == 0 and stop:
        print(f"stopped after step {run.step}; to go on: python mae.py --resume --out {c.out}")
    elif rank == 0:
        finish_mae(run, raw, yardsticks, train_split, val, test, c, autocast, device)
    return 130 if stop else 0


def look(run, model, train_split, val, beside, steps, c, autocast, world, save):
    """Evaluate during the run: a log line and row, best.pt if the linear probe is best, curves and a sheet."""
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
    run.draw("loss, accuracy", loss="loss", val_loss="val_loss", knn="knn", linear="linear",
             linear_random_init="linear_random_init")
    if run.writes:
        draw_reconstructions(model, val[0][first_of_each(val[1])], run.out / "reconstructions.png", c.mask,
                             c.mask_ratio)


def finish_mae(run, model, yardsticks, train_split, val, test, c, autocast, device):
    """Read the test set, once, with the best weights: the table of probes, and the log's last row."""
    best = load_checkpoint(run.out / "best.pt")
    model.load_state_dict(best["model"])
    encoders = {"mae": lambda x: model.features(x, c.pool), **yardsticks}
    results = probe_encoders(encoders, model.stats, train_split, val, test, (1.0, 0.1, 0.01), autocast)
    flat = {f"test_{key}{'' if name == 'mae' else '_' + name}": value
            for name, scores in results.items() for key, value in scores.items()}
    memory = peak_mb(device)
    run.log(f"on test images, with {len(train_split[0]):,} labels, 10% or 1% of them:\n{probe_table(results)}\n"
            f"test linear {flat['test_linear']:.4f}, of random init {flat['test_linear_random_init']:.4f}, weights "
            f"of step {best['step']} | {run.seconds:.0f} s of training | peak {memory:.0f} MB | pictures in {run.out}",
            seconds=run.seconds, **flat, final=True, peak_mb=memory)


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
        if c.reconstruct:
            reconstruct(c)
            return 0
        pressed, old = [], signal.getsignal(signal.SIGINT)  # a first Ctrl-C stops between steps, a second at once
        signal.signal(signal.SIGINT, lambda *_: (pressed.append(True), signal.signal(signal.SIGINT, old)))
        try:
            return train(c, pressed)
        finally:
            signal.signal(signal.SIGINT, old)
    except UserError as error:
        print(f"mae.py: {error}", file=sys.stderr)
        return error.status
    except (MemoryError, RuntimeError) as error:  # torch's out of memory is one, a plain one on a CPU
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            print(f"mae.py: --compile failed, leave it out: {' '.join(str(error).split())[:200]}", file=sys.stderr)
            return 1
        if isinstance(error, RuntimeError) and not re.search("(out of|allocate|enough) memory", str(error)):
            raise
        print(f"mae.py: out of memory ({' '.join(str(error).split())[:200]}): lower --batch_size", file=sys.stderr)
        return 1
    except SystemExit as error:  # --help
        return error.code or 0
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
