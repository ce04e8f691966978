# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "numpy", "requests"]
# ///
"""ResNet: networks a hundred layers deep that train: each block learns only what to add to its input.

A plain stack of convolutions gets worse, on the training set too, when it gets deeper; with a shortcut around every
two or three of them, y = F(x) + x, it gets better [1]. Wide ResNet, ResNeXt and RegNet keep the shortcut and differ in
the block F, its width, and how many of them stand in a stage: here they are settings of one class, and Wide ResNet has
a block of its own.

    python resnet.py                                    # offline, ten kinds of shapes that the script draws
    python resnet.py --data cifar10 --epochs 30 --batch_size 128        # downloads 170 MB
    python resnet.py --data cifar10 --figure6 --epochs 4 --lr 0.05     # plain and residual, 20 and 56 layers [1] Fig. 6
    python resnet.py --data cifar10 --landscape out/resnet/figure6/plain56/ckpt.pt,out/resnet/figure6/resnet56/ckpt.pt
    python resnet.py --data cifar10 --arch fast --optimizer muon --schedule linear --batch_size 2000 --epochs 12 \\
        --flip alternate --crop 3 --label_smoothing 0.2 --full_train        # high accuracy per FLOP
    python resnet.py --data cifar10 --init resnet18 --image_size 128 --lr 0.02 --backbone_lr 0.1 --epochs 3
    python resnet.py --resume --save_logits logits.npy  # of a finished run: its test again, logits for vit.py --teacher
    torchrun --nproc_per_node=8 resnet.py --data cifar10 --arch wrn28-10 --epochs 200 --weight_decay 5e-4 --compile

and in Python: model = from_pretrained("out/resnet/best.pt").eval(); logits = model(normalise(images, model.stats))

What to expect (torch 2.13.0, two cores of an AMD EPYC, seed 0, n = 1; logs in assets/logs/resnet/):
- python resnet.py, fp32: test accuracy 96.5% on shapes, in 118 s, 94 of them training (a linear probe of pixels: 17%)
- --arch fast, the command above, all 50,000 images of a JPEG copy of CIFAR-10 (which costs some accuracy): test
  accuracy 90.20%, 91.63% averaged over six views, for 0.578 PFLOP (10^15 operations: 6 × multiply-adds (MACs) ×
  images), 59 minutes on one of two cores in bfloat16. With 8 epochs and --crop 2: 89.45% and 90.50% for 0.386; an
  earlier version, two convolutions to a block, 16 epochs and --crop 4 on 45,000 images: 89.14% and 90.23% for 0.499
- A training step of resnet18 with a 3×3 first layer (CIFAR's stem), batch 64, bfloat16 by AVX-512: 2.08 times as fast
  as the same network in plain fp32 eager, compiled 2.20; augmentation is 0.3% of it: python tests.py
  BenchResNet.speed. On cores without bfloat16 units (fp32): 1.09 and 1.14
- Against torchvision, once, by hand: all eight official networks gave its outputs on the same random weights
- Figure 6 on the copy, four epochs (--epochs 4 --batch_size 64 --lr 0.05), test accuracy: plain 71.3% with 20 layers,
  39.9% with 56; residual 76.8% and 72.8%. The shortcut mends most of what depth breaks, on training images too; that
  the deeper residual network gets ahead of the shallower one takes more epochs: not yet measured
- The landscape of those two deep networks, 13 × 13 points, 3.2 minutes on one core (assets/resnet_landscape.svg): the
  median loss on its edge is 2,337 around the plain one, 37 around the residual one (batch norm's statistics stay those
  of the centre, see loss_surface)
- --norm, ResNet-20 on shapes, 15,360 images seen, test accuracy (chance .1): 60 steps of 256, the best of three rates
  on validation: batch .466, layer .145, none .111; 7,680 steps of 2, one rate for all: .240, .248, .287:
  BenchResNet.norms
- On a GPU: not yet measured

Differs from [1]: Nesterov momentum, cosine instead of steps (÷10 after 32,000 and 48,000 iterations), decay on weights
only, one mean per channel instead of per pixel, crops with reflected borders, stride in a bottleneck's 3×3 convolution
(torchvision's "v1.5"). The last, incomplete batch of an epoch is dropped. Stochastic depth draws a coin per image,
DropBlock works on a block's sum: see there.

Shapes: B batch, C channels, H and W height and width, N images; images are (B, 3, H, W), uint8 until augmented.

[1] He et al. 2015, Deep residual learning, arXiv 1512.03385v1
[2] He et al. 2015, Delving deep into rectifiers, arXiv 1502.01852v1
[3] Zagoruyko and Komodakis 2016, Wide ResNet, 1605.07146v4      [4] Xie et al. 2016, ResNeXt, arXiv 1611.05431v2
[5] Radosavovic et al. 2020, RegNet, arXiv 2003.13678v1          [6] Huang et al. 2016, Stochastic depth, 1603.09382v3
[7] Ghiasi et al. 2018, DropBlock, arXiv 1810.12890v1            [8] Li et al. 2017, Loss landscape, arXiv 1712.09913v3
[9] Jordan et al. 2024, Muon, kellerjordan.github.io/posts/muon  [10] Jordan 2024, airbench, arXiv 2404.00498v2
[11] airbench94_muon.py in [10]'s code, github.com/KellerJordan/cifar10-airbench
"""

import argparse, contextlib, copy, dataclasses, functools, gc, hashlib, html, inspect, io, itertools, json, math, os, re
import signal, sys, tarfile, time, typing
from pathlib import Path

import numpy as np
import requests
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode


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
    full_train: bool = False  # train on the validation images too: for a last run, when all choices are made
    flip: str = "random"  # none, random, or alternate: each image in every second epoch, half of them in each [10]
    crop: int = 4  # pixels by which an image is shifted at most, its border reflected ([1] §4.2: padded)
    image_size: int = 0  # pixels to which images are resized on the device; 0: as they are
    # model
    arch: str = "resnet20"  # [1] §4.2: resnet20, 32, 44, 56, 110; ImageNet's: resnet18, 34, 50, 101, 152; see ARCHS
    init: str | None = None  # start from resnet50 or another of torchvision's, its .pth file, or this script's .pt
    plain: bool = False  # leave the shortcuts out
    norm: str = "batch"  # batch, layer (over channels and positions of an image) or none (then no biases either)
    weight_init: str = "kaiming"  # kaiming [2], or xavier, with which each ReLU halves the variance
    drop_path: float = 0.0  # probability that the last block's branch is left out, to which it rises with depth [6]
    drop_block: float = 0.0  # fraction dropped, in squares, from each block's output in the last two stages [7]
    freeze: bool = False  # train the last layer alone
    # optimiser
    optimizer: str = "sgd"  # sgd (Nesterov), or muon: orthogonal updates of normalised filters, for --arch fast
    lr: float | None = None  # peak learning rate; None: 0.1 with sgd ([1] §4.2), 0.24 with muon (filters alone) [11]
    backbone_lr: float = 1.0  # rate of all but the last layer, as a fraction of lr; try 0.1 with --init
    schedule: str = "cosine"  # cosine after a warm-up, or linear, to 0 from the first step on
    warmup: int = 20  # steps of linear warm-up (cosine alone)
    weight_decay: float = 1e-4  # as in [1] §4.2, but on weights alone, not on biases and norms; muon has its own
    label_smoothing: float = 0.0  # share of each target that is spread evenly over all classes
    ema: float = 0.0  # decay of an average of weights and batch-norm buffers that is evaluated instead; 0: none
    batch_size: int = 64  # images per micro-batch; [1] has 128
    grad_accum: int = 1  # micro-batches per step and process
    # run
    epochs: float = 3  # passes over the training images
    steps: int | None = None  # updates of the parameters, instead of epochs
    stop_at: int | None = None  # end at this step, the schedule unchanged
    eval_every: int | None = None  # steps between evaluations, each followed by a checkpoint; None: an epoch
    log_every: int = 10  # steps between log lines
    seed: int = 0  # of initial weights, batches and augmentation
    out: str = "out/resnet"  # the run's folder
    resume: bool = False  # go on from out/ckpt.pt, with that run's flags where none are given
    device: str = "auto"  # auto (cuda, then mps, then cpu), or a torch device
    dtype: str = "auto"  # float32 or bfloat16; auto: bfloat16 where the hardware multiplies matrices in it
    compile: bool = False  # torch.compile: a wait at first (it needs a C++ compiler on a CPU), then faster steps
    # other things to do
    save_logits: str | None = None  # .npy for the logits (N, 2, classes) of training images and mirrors: a --teacher
    figure6: bool = False  # train plain and residual networks of 20 and 56 layers and draw their errors
    landscape: str | None = None  # checkpoints, comma-separated: draw the loss around each, side by side
    grid: int = 17  # points along each axis of the landscape

    def __post_init__(self):
        self.lr = {"sgd": 0.1, "muon": 0.24}.get(self.optimizer) if self.lr is None else self.lr
        known = dict(flip=("none", "random", "alternate"), norm=("batch", "layer", "none"), arch=tuple(ARCHS),
                     weight_init=("kaiming", "xavier"), optimizer=("sgd", "muon"), schedule=("cosine", "linear"),
                     dtype=("auto", "float32", "bfloat16"))
        may_be_0 = ("crop", "image_size", "drop_path", "drop_block", "warmup", "weight_decay", "label_smoothing",
                    "ema", "seed")
        for name, value in vars(self).items():
            most = {"crop": 31, "image_size": 1024}.get(name, sys.maxsize)
            most = 1 if name in ("labels", "backbone_lr", "label_smoothing") else most
            most = 1 - 1e-9 if name in ("drop_path", "drop_block", "ema") else most
            if value == "" or name in known and value not in known[name]:
                raise UserError(f"--{name} {value!r}: want {' or '.join(known.get(name, ['some text']))}")
            if type(value) in (int, float) and not (0 < value <= most or value == 0 and name in may_be_0):
                up_to = ", below 1" if most == 1 - 1e-9 else f", at most {most}" if most < sys.maxsize else ""
                raise UserError(f"--{name} {value}: want a number {'from' if name in may_be_0 else 'above'} 0{up_to}")
        if self.data not in ("shapes", "cifar10") and not (Path(self.data) / "cifar-10-batches-bin").is_dir():
            raise UserError(f"--data {self.data}: want shapes, cifar10, or a folder that holds cifar-10-batches-bin/")
        muon, fast = self.optimizer == "muon", self.arch == "fast"
        logits = Path(self.save_logits or "x.npy").resolve()
        clashes = {
            "--resume goes on from --out and --init starts anew: give one of them": self.resume and self.init,
            f"--init {self.init}: no such file, nor one of {', '.join(OFFICIAL)}":
                self.init and self.init not in OFFICIAL and not Path(self.init).is_file(),
            "--optimizer muon is for --arch fast with batch norm, without --freeze or --backbone_lr":
                muon and (not fast or self.norm != "batch" or self.freeze or self.backbone_lr != 1),
            "--arch fast has initial weights of its own: no --weight_init": fast and self.weight_init != "kaiming",
            "--plain leaves no shortcut to take when --drop_path leaves out a branch": self.plain and self.drop_path,
            "--figure6 trains four fresh networks: not with --resume, --init, --full_train or --save_logits":
                self.figure6 and (self.resume or self.init or self.full_train or self.save_logits),
            "--figure6 chooses --arch and --plain itself": self.figure6 and (self.arch != Config.arch or self.plain),
            "--figure6 trains one network after another: run it without torchrun":
                self.figure6 and int(os.environ.get("WORLD_SIZE", 1)) > 1,
            "--batch_size 1 with batch norm: one image has no statistics; want 2 or more, or --norm layer":
                self.norm == "batch" and self.batch_size == 1,
            f"--image_size {self.image_size}: want 0 or 16 to 1024": 0 < self.image_size < 16,
            f"--grid {self.grid}: want an odd number from 3 (it has a centre)": self.grid < 3 or self.grid % 2 == 0,
            f"--save_logits {self.save_logits}: want a name that ends in .npy, in a folder that exists":
                logits.suffix != ".npy" or not logits.parent.is_dir()}
        for message, clash in clashes.items():
            if clash:
                raise UserError(message)


# ---- blocks: each computes a branch F(x), to which the shortcut is added -------------------------------------------

def conv(C_in, C_out, size, stride=1, groups=1):
    """A convolution that keeps height and width (divided by stride). No bias: the norm behind it has one."""
    return nn.Conv2d(C_in, C_out, size, stride, padding=size // 2, groups=groups, bias=False)


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


class DropBlock(nn.Module):
    """Zero squares of x (B, C, H, W), about a fraction p of it, each channel on its own [7]: neighbouring pixels say
    nearly the same, so that dropping single ones takes no information away."""

    def __init__(self, p, size):
        super().__init__()
        self.p, self.size = p, size

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        B, C, H, W = x.shape
        s = min(self.size, H, W)
        # [7] eq. 1: a seed per square, drawn where the whole square fits in
        gamma = self.p / s**2 * H * W / ((H - s + 1) * (W - s + 1))
        seeds = (torch.rand(B, C, H - s + 1, W - s + 1, device=x.device) < gamma).float()
        keep = 1 - F.max_pool2d(F.pad(seeds, [s - 1] * 4), s, stride=1)  # (B, C, H, W): 0 in each seed's s × s square
        return (x * (keep * (keep.numel() / keep.sum().clamp(min=1)))).type_as(x)  # [7] Alg. 1, steps 7 and 8


class PadShortcut(nn.Module):
    """Option A of [1] §3.3: every stride-th pixel, new channels zero. It has no parameters."""

    def __init__(self, C_in, C, stride):
        super().__init__()
        self.new, self.stride = C - C_in, stride

    def forward(self, x):
        return F.pad(x[:, :, ::self.stride, ::self.stride], (0, 0, 0, 0, self.new // 2, self.new - self.new // 2))


class ResidualBlock(nn.Module):
    """y = relu(F(x) + x), where F is the subclass's branch; PreActBlock and FastBlock have a forward of their own.

    downsample is the shortcut: nn.Identity() where shapes agree; None for a plain network, relu(F(x)). Subclasses pass
    their last three arguments on, as *addition.
    """

    def __init__(self, downsample, drop_path, drop_block):
        super().__init__()
        self.downsample, self.drop_path, self.drop_block = downsample, drop_path, drop_block

    def add(self, x, y):
        """shortcut(x) + F(x), where y is F(x) ([1] eq. 1 and 2)."""
        if self.downsample is not None:
            y = self.downsample(x) + self.drop_path(y)
        return self.drop_block(y)

    def forward(self, x):
        return F.relu(self.add(x, self.branch(x)))


class BasicBlock(ResidualBlock):
    """Two 3×3 convolutions ([1] Figure 5 left)."""

    def __init__(self, C_in, C, stride, norm, *addition):
        super().__init__(*addition)
        self.conv1, self.bn1 = conv(C_in, C, 3, stride), norm(C)
        self.conv2, self.bn2 = conv(C, C, 3), norm(C)

    def branch(self, x):
        x = F.relu(self.bn1(self.conv1(x)))  # (B, C, H / stride, W / stride)
        return self.bn2(self.conv2(x))


class Bottleneck(ResidualBlock):
    """1×1 to fewer channels, 3×3 among them, 1×1 back ([1] Figure 5 right).

    ResNet's inner width is a quarter of C, Wide ResNet-50-2's half; ResNeXt [4] cuts the 3×3 into groups that do not
    see one another; RegNetX [5] has no bottleneck (ratio 1) and groups of a fixed width.
    """

    def __init__(self, C_in, C, stride, norm, *addition, ratio=0.25, groups=1, group_width=None):
        super().__init__(*addition)
        inner = int(C * ratio)
        groups = inner // group_width if group_width else groups
        self.conv1, self.bn1 = conv(C_in, inner, 1), norm(inner)
        self.conv2, self.bn2 = conv(inner, inner, 3, stride, groups), norm(inner)  # [1] strides in conv1: v1.5 here
        self.conv3, self.bn3 = conv(inner, C, 1), norm(C)

    def branch(self, x):
        x = F.relu(self.bn1(self.conv1(x)))  # (B, inner, H, W)
        x = F.relu(self.bn2(self.conv2(x)))  # (B, inner, H / stride, W / stride)
        return self.bn3(self.conv3(x))  # (B, C, H / stride, W / stride)


class PreActBlock(ResidualBlock):
    """Norm and ReLU before each convolution, nothing after the sum, so that x itself passes on wherever shapes agree
    (He et al. 2016, arXiv 1603.05027); Wide ResNet [3] widens it."""

    def __init__(self, C_in, C, stride, norm, *addition):
        super().__init__(*addition)
        self.bn1, self.conv1 = norm(C_in), conv(C_in, C, 3, stride)
        self.bn2, self.conv2 = norm(C), conv(C, C, 3)

    def forward(self, x):
        a = F.relu(self.bn1(x))
        y = self.conv2(F.relu(self.bn2(self.conv1(a))))  # (B, C, H / stride, W / stride)
        return self.add(x if isinstance(self.downsample, nn.Identity) else a, y)


class FastBlock(ResidualBlock):
    """A convolution, max-pooling that halves height and width, then a residual pair: the group of airbench96.py since
    June 2024, in [11]'s repository ([10] has the last GELU before the sum)."""

    def __init__(self, C_in, C, stride, norm, *addition):
        super().__init__(*addition)
        self.conv1, self.bn1, self.stride = conv(C_in, C, 3), norm(C), stride
        self.conv2, self.bn2 = conv(C, C, 3), norm(C)
        self.conv3, self.bn3 = conv(C, C, 3), norm(C)

    def forward(self, x):
        x = F.gelu(self.bn1(F.max_pool2d(self.conv1(x), self.stride)))  # (B, C, H / stride, W / stride)
        y = self.bn3(self.conv3(F.gelu(self.bn2(self.conv2(x)))))
        return F.gelu(self.add(x, y))


# ---- network: stages of blocks, in torchvision's names -------------------------------------------------------------

def make_norm(kind, C, momentum=0.1):
    """Batch norm standardises each channel over batch and positions, in evaluation by running statistics.

    Its trap: the statistics of a small batch are noisy, and not those of evaluation (BenchResNet.norms). Besides, a
    batch is divided by the root of its biased variance, Σ(x - μ)² / n, while running_var averages the unbiased one,
    Σ(x - μ)² / (n - 1), n = B H W.
    Layer norm, over an image's channels and positions, is the same in training and evaluation, whatever the batch.
    """
    if kind == "batch":
        return nn.BatchNorm2d(C, momentum=momentum)
    return nn.GroupNorm(1, C) if kind == "layer" else nn.Identity()


class ResNet(nn.Module):
    """images (B, 3, H, W) -> logits (B, num_classes). stages: (block, width, depth, stride) each.

    stem: imagenet (7×7, stride 2, then max-pool), regnet (3×3, stride 2), cifar (3×3), wide (cifar's, its norm
    moved behind the last block) or whiten (2×2, see whiten_stem). shortcut: what stands where the shape changes:
    A (PadShortcut), B (1×1 convolution and norm) or conv (without norm).
    """

    def __init__(self, stages, num_classes=10, stem="cifar", stem_width=16, shortcut="B", norm="batch", plain=False,
                 weight_init="kaiming", drop_path=0.0, drop_block=0.0):
        super().__init__()
        self.stem, fast = stem, stem == "whiten"
        large = stem in ("imagenet", "regnet")
        self.stats = IMAGENET_STATS if large else CIFAR10_STATS  # mean and std by which its images are normalised
        normed = functools.partial(make_norm, norm, momentum=0.4 if fast else 0.1)  # short run, short memory [10]
        size, stride = {"imagenet": (7, 2), "regnet": (3, 2)}.get(stem, (3, 1))
        self.conv1 = nn.Conv2d(3, stem_width, 2) if fast else conv(3, stem_width, size, stride)
        if not fast and stem != "wide":
            self.bn1 = normed(stem_width)
        C, total, done = stem_width, sum(depth for _, _, depth, _ in stages), 0
        for i, (block, width, depth, stride) in enumerate(stages, 1):
            blocks = []
            for j in range(depth):
                s, done = stride if j == 0 else 1, done + 1
                if plain:
                    downsample = None
                elif fast or (s == 1 and C == width):
                    downsample = nn.Identity()
                elif shortcut == "A":
                    downsample = PadShortcut(C, width, s)
                else:
                    norm_or_not = normed(width) if shortcut == "B" else nn.Identity()
                    downsample = nn.Sequential(conv(C, width, 1, s), norm_or_not)
                path = DropPath(drop_path * done / total)  # [6] eq. 4: the l-th of L blocks with probability p l / L
                # differs from [7] §4.1: on blocks' sums alone, p from the first step on, in both stages the same
                squares = DropBlock(drop_block if i > len(stages) - 2 else 0.0, size=7 if large else 3)
                blocks.append(block(C, width, s, normed, downsample, path, squares))
                C = width
            setattr(self, f"layer{i}", nn.Sequential(*blocks))
        self.num_stages = len(stages)
        self.bn_last = normed(C) if stem == "wide" else nn.Identity()
        self.fc = nn.Linear(C, num_classes, bias=not fast)
        self.init_weights(weight_init)

    def init_weights(self, kind):
        """Random filters with kaiming's or xavier's variance; the whiten stem's network begins as [11] has it."""
        fast = self.stem == "whiten"
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and not fast:
                # [2] eq. 14: var 2 / fan_out (C_out × filter size) keeps the gradient's variance, which ReLU halves
                if kind == "kaiming":
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                else:
                    nn.init.xavier_normal_(module.weight)  # var 2 / (fan_in + fan_out): for an activation like tanh
            elif isinstance(module, nn.Conv2d) and module is not self.conv1:  # the first filters copy the input
                nn.init.dirac_(module.weight[:module.in_channels].data)
            elif isinstance(module, nn.BatchNorm2d) and fast:
                module.weight.requires_grad_(False)  # biases alone are learned
        if fast:
            self.conv1.weight.requires_grad_(False)
            self.fc.weight.data /= self.fc.weight.std()

    def features(self, x):
        """What the last layer reads: (B, 3, H, W) -> (B, C)."""
        x = self.conv1(x)
        if self.stem == "whiten":
            x = F.gelu(x)
        elif self.stem != "wide":
            x = F.relu(self.bn1(x))
        if self.stem == "imagenet":
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        for i in range(self.num_stages):
            x = getattr(self, f"layer{i + 1}")(x)  # (B, width, H / stride, W / stride)
        if self.stem == "whiten":
            return x.amax(dim=(2, 3)) / x.size(1)  # max-pool, and a small scale for the head to begin with [11]
        if self.stem == "wide":
            x = F.relu(self.bn_last(x))
        return x.mean(dim=(2, 3))

    def forward(self, x):
        return self.fc(self.features(x))

    @torch.no_grad()
    def whiten_stem(self, images, eps=5e-4):
        """Set the 2×2 filters, for good, to the eigenvectors of the covariance of patches of normalised images
        (B, 3, H, W), scaled to unit variance, and to their negatives [10]."""
        patches = F.unfold(images, 2).transpose(1, 2).reshape(-1, 12).double()  # (B (H - 1) (W - 1), 12)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))  # columns are eigenvectors
        filters = (vectors / (values + eps).sqrt()).T.reshape(12, 3, 2, 2)
        self.conv1.weight.copy_(torch.cat((filters, -filters)))


def imagenet_resnet(block, widths, depths, num_classes=1000, stem="imagenet", stem_width=64, first=1, **more):
    """Four stages of widths output channels and depths blocks; each halves height and width, the first by its stride,
    first."""
    return ResNet(list(zip([block] * 4, widths, depths, (first, 2, 2, 2))), num_classes, stem, stem_width, **more)


def cifar_resnet(depth, num_classes=10, **more):
    """[1] §4.2: three stages of n blocks, depth 6 n + 2, option A shortcuts: 20, 32, 44, 56, 110. Else ValueError."""
    if depth % 6 != 2:
        raise UserError(f"depth {depth}: want 6 n + 2")
    stages = [(BasicBlock, 16, depth // 6, 1), (BasicBlock, 32, depth // 6, 2), (BasicBlock, 64, depth // 6, 2)]
    return ResNet(stages, num_classes, shortcut="A", **more)


def wrn(depth, width, num_classes=10, **more):
    """Wide ResNet [3]: three stages of n blocks, depth 6 n + 4 (else ValueError), width times as wide."""
    if depth % 6 != 4:
        raise UserError(f"depth {depth}: want 6 n + 4")
    stages = [(PreActBlock, C * width, depth // 6, stride) for C, stride in ((16, 1), (32, 2), (64, 2))]
    return ResNet(stages, num_classes, "wide", shortcut="conv", **more)


def fast(num_classes=10, **more):
    """A whitening stem and three blocks, 161 million MACs: airbench94's widths [10], airbench96.py's blocks."""
    stages = [(FastBlock, 64, 1, 2), (FastBlock, 256, 1, 2), (FastBlock, 256, 1, 2)]
    return ResNet(stages, num_classes, "whiten", 24, **more)


BASIC, BOTTLENECK = (64, 128, 256, 512), (256, 512, 1024, 2048)  # widths of the four stages
resnet18 = functools.partial(imagenet_resnet, BasicBlock, BASIC, (2, 2, 2, 2))
resnet34 = functools.partial(imagenet_resnet, BasicBlock, BASIC, (3, 4, 6, 3))
resnet50 = functools.partial(imagenet_resnet, Bottleneck, BOTTLENECK, (3, 4, 6, 3))
resnet101 = functools.partial(imagenet_resnet, Bottleneck, BOTTLENECK, (3, 4, 23, 3))
resnet152 = functools.partial(imagenet_resnet, Bottleneck, BOTTLENECK, (3, 8, 36, 3))
resnext50_32x4d = functools.partial(imagenet_resnet, functools.partial(Bottleneck, ratio=0.5, groups=32), BOTTLENECK,
                                    (3, 4, 6, 3))
wide_resnet50_2 = functools.partial(imagenet_resnet, functools.partial(Bottleneck, ratio=0.5), BOTTLENECK, (3, 4, 6, 3))


def regnet_x_400mf(num_classes=1000, stem="regnet", **more):
    """RegNetX at 400 million MACs: block j's width is 24 + 24.48 j ([5] eq. 2), rounded to one value per stage, 32, 64,
    160 and 384; torchvision, and so this too, has 400 for the last."""
    block = functools.partial(Bottleneck, ratio=1, group_width=16)
    return imagenet_resnet(block, (32, 64, 160, 400), (1, 2, 7, 12), num_classes, stem, 32, first=2, **more)


# torchvision's networks, and the first digits of their files' SHA-256
OFFICIAL = dict(resnet18="f37072fd", resnet34="b627a593", resnet50="11ad3fa6", resnet101="cd907fc2",
                resnet152="f82ba261", resnext50_32x4d="1a0047aa", wide_resnet50_2="9ba9bcbe",
                regnet_x_400mf="62229a5f")
ARCHS = {**{f"resnet{depth}": functools.partial(cifar_resnet, depth) for depth in (20, 32, 44, 56, 110)},
         **{name: globals()[name] for name in OFFICIAL}, "fast": fast,
         "wrn16-8": functools.partial(wrn, 16, 8), "wrn28-10": functools.partial(wrn, 28, 10)}


def count_macs(model, size):
    """Multiply-adds of one image (3, size, size) in convolutions and matrix products. Leaves it in evaluation mode."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size, device=next(model.parameters()).device))
    return counter.get_total_flops() // 2  # a multiply-add is two


# ---- official weights ----------------------------------------------------------------------------------------------

def make_model(arch, **settings):
    """A network of ARCHS that remembers what it was made with, for checkpoints."""
    model = ARCHS[arch](**settings)
    model.settings = dict(arch=arch, **settings)
    return model


def from_pretrained(name_or_path, data_dir="data", **changes):
    """A ResNet with torchvision's published weights (1,000 ImageNet classes), or from a checkpoint of this script.

    An official name is downloaded, 22 to 276 MB; a path to torchvision's .pth file needs its published name. changes
    are arguments of ResNet. Raises ValueError if the file can't be read or doesn't fit.
    """
    path, name = Path(name_or_path), Path(name_or_path).name.split("-")[0]
    if name_or_path in OFFICIAL:
        digits = OFFICIAL[name]
        path = Path(data_dir) / f"{name}-{digits}.pth"
        download(f"https://download.pytorch.org/models/{path.name}", path, f"sha256:{digits}")
    elif path.suffix == ".pt":
        with one_line(f"{path} is not a checkpoint of this script"):
            saved = load_checkpoint(path)
            model = make_model(**{**saved["model_config"], **changes})
            model.load_state_dict(saved.get("ema") or saved["model"])
        return model
    elif name not in OFFICIAL or not path.exists():
        raise UserError(f"{name_or_path}: want a checkpoint (.pt), one of {', '.join(OFFICIAL)}, or a file of "
                        "torchvision's under its published name")
    with one_line(f"{path} does not hold torchvision's {name}"):
        weights = torch.load(path, map_location="cpu", weights_only=True)
        for ours, theirs in ((r"conv1.", r"^stem\.0\."), (r"bn1.", r"^stem\.1\."), (r"downsample.", r"proj\."),
                             (r"layer\1.\2.", r"^trunk_output\.block(\d)\.block\d-(\d+)\."),
                             *((f"{kind}{i}.", rf"\bf\.{letter}\.{j}\.") for i, letter in enumerate("abc", 1)
                               for j, kind in enumerate(("conv", "bn")))):  # RegNet's names to ResNet's
            weights = {re.sub(theirs, ours, key): value for key, value in weights.items()}
        stem = "regnet" if name.startswith("regnet") else "imagenet"
        model = make_model(name, **{"num_classes": 1000, "stem": stem, **changes})
        model.load_state_dict(weights)
    return model


# ---- optimiser -----------------------------------------------------------------------------------------------------

def newton_schulz(g, steps=5):
    """U Vᵀ of g = U S Vᵀ (..., n, m), roughly: singular values above .002 of g's Frobenius norm end in .68 to 1.21 [9].

    The polynomial a σ + b σ³ + c σ⁵ works on every singular value σ through matrix products alone.
    """
    x = (g.bfloat16() if g.is_cuda else g.float()).reshape(-1, *g.shape[-2:])  # (N, n, m)
    x = x.mT if g.size(-2) > g.size(-1) else x  # x xᵀ is then the smaller square
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # no singular value above 1
    for _ in range(steps):  # x ← a x + (b x xᵀ + c (x xᵀ)²) x
        gram = x @ x.mT  # (N, n, n)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.mT if g.size(-2) > g.size(-1) else x).reshape(g.shape).type_as(g)


class FilterMuon(torch.optim.Optimizer):
    """Muon [9] for convolutions in front of a norm [11]. There a filter's length changes no output, only how far a step
    turns the filter. So before each step a tensor is scaled until its filters' lengths have a root mean square of 1;
    weight decay would get there slowly."""

    def __init__(self, params, lr=0.24, momentum=0.6):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:  # (C_out, C_in, 3, 3), each with a gradient
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                m = self.state[p]["momentum"]
                m.mul_(group["momentum"]).add_(p.grad)  # m ← μ m + g
                ahead = p.grad.add(m, alpha=group["momentum"])  # Nesterov: g + μ m
                p.mul_(len(p) ** 0.5 / p.norm())
                # three steps: singular values above .018 of the norm end in .68 to 1.21
                p.sub_(newton_schulz(ahead.flatten(1), steps=3).view(p.shape), alpha=group["lr"])


def sgd_or_muon(model, c):
    """Optimizers (a list) for what is to be trained. A group's peak: its highest rate; until: the fraction of the run
    at which its rate is 0 (--schedule linear)."""
    head = {id(p) for p in model.fc.parameters()}
    for p in model.parameters():
        p.requires_grad_(p.requires_grad and (id(p) in head or not c.freeze))
    params = [p for p in model.parameters() if p.requires_grad]
    if c.optimizer == "sgd":
        groups = [dict(params=[p for p in params if (id(p) in head, p.dim() > 1) == (is_head, is_weight)],
                       peak=c.lr * (1 if is_head else c.backbone_lr), weight_decay=c.weight_decay * is_weight)
                  for is_head, is_weight in itertools.product((True, False), repeat=2)]
        return [torch.optim.SGD([g for g in groups if g["params"]], momentum=0.9, nesterov=True)]
    # [11] sums the loss over 2,000 images, ours is their mean: its rates .053 and .67 are 2,000 times larger here. A
    # decay of 4e-3 / peak takes the same share of each parameter away, whatever its peak.
    groups = [dict(params=[model.conv1.bias], peak=106.0, until=3 / 8), dict(params=[model.fc.weight], peak=1340.0),
              dict(params=[p for p in params if p.dim() == 1 and p is not model.conv1.bias], peak=106.0)]
    sgd = torch.optim.SGD([dict(g, weight_decay=4e-3 / g["peak"]) for g in groups], momentum=0.85, nesterov=True)
    return [FilterMuon([dict(params=[p for p in params if p.dim() == 4], peak=c.lr)]), sgd]


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


def training_batch(c, images, labels, step, slot, slots):
    """The slot-th of the slots micro-batches of a step, augmented: uint8 (B, 3, H, W) and labels (B,)."""
    index, epoch = batch_index(len(images), c.batch_size, c.seed, step, slot, slots)
    rng = np.random.default_rng((c.seed, 2, step, slot))
    dy, dx = rng.integers(-c.crop, c.crop, (2, c.batch_size), endpoint=True)
    coins = rng.integers(2, size=c.batch_size)
    if c.flip == "alternate":  # [10] §3.6: a coin per image, turned over each epoch
        coins = (np.random.default_rng((c.seed, 3)).integers(2, size=len(images))[index] + epoch) % 2
    mirror = (coins == 1) & (c.flip != "none")
    index, dy, dx, mirror = (torch.from_numpy(a).to(images.device) for a in (index, dy, dx, mirror))
    return augment(images, index, dy, dx, mirror), labels[index]


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


# ---- evaluate, train -----------------------------------------------------------------------------------------------

@torch.no_grad()
def predict(model, images, c, autocast, views=1):
    """Logits (views, N, classes) of images (N, 3, H, W) uint8: as they are; of their mirrors; of both, moved by a pixel
    up-left, and down-right, with reflected borders ([10] §3.5)."""
    model.eval()
    parts = []
    for x in images.split(500 if c.image_size <= 64 else c.batch_size):
        x = normalise(x, model.stats, c.image_size)
        moved, (H, W) = [x], x.shape[2:]
        if views > 2:
            padded = F.pad(x, [1] * 4, mode="reflect")
            moved += [padded[..., 2:, 2:], padded[..., :H, :W]]
        with autocast:
            logits = [model(v) for m in moved for v in (m, m.flip(-1))[:views]]
        parts.append(torch.stack(logits).float())  # (views, B, classes)
    return torch.cat(parts, dim=1)


def evaluate(model, images, labels, c, autocast):
    """Mean loss and accuracy on images (N, 3, H, W) uint8."""
    logits = predict(model, images, c, autocast)[0]  # (N, classes)
    return dict(val_loss=F.cross_entropy(logits, labels).item(),
                val_accuracy=(logits.argmax(dim=1) == labels).sum().item() / len(labels))


def test_scores(model, images, labels, classes, c, autocast):
    """Print and return the accuracy on the test images: plain, of each class, and with logits averaged over views."""
    logits = predict(model, images, c, autocast, views=6)
    unmoved = logits[:2].mean(dim=0)  # these two count as much as the four moved ones
    sums = logits[0], unmoved, unmoved + logits[2:].mean(dim=0)  # each (N, classes)
    right = [s.argmax(dim=1) == labels for s in sums]
    each = {name: round(right[0][labels == k].float().mean().item(), 4) for k, name in enumerate(classes)}
    one, two, six = (r.sum().item() / len(r) for r in right)
    print(" | ".join(f"{name} {value:.3f}" for name, value in each.items()))
    print(f"test accuracy {one:.4f} | averaged with the mirror's logits {two:.4f} | over six views {six:.4f}")
    return dict(test_accuracy=one, test_accuracy_mirror=two, test_accuracy_six_views=six, classes=each)


def load_network(c, classes):
    """The network that the flags ask for: fresh, that of --resume, or --init's with a new last layer."""
    settings, source = dict(drop_path=c.drop_path, drop_block=c.drop_block), f"{c.out}/ckpt.pt" if c.resume else c.init
    if not source:
        stem = {} if c.arch.startswith("wrn") or c.arch == "fast" else dict(stem="cifar")
        return make_model(c.arch, num_classes=classes, norm=c.norm, plain=c.plain, weight_init=c.weight_init, **stem,
                          **settings)
    model = from_pretrained(source, c.data_dir, **settings)
    for name in ("arch", "norm", "plain", "weight_init"):  # c then says what the model is
        value, default = getattr(c, name), getattr(Config, name)
        has = model.settings.get(name, default)
        if value != has and (c.resume or value != default):
            raise UserError(f"--{name} {value}, but {source} has {has}")
        setattr(c, name, has)
    c.__post_init__()  # do the flags go with what the file holds?
    if c.init:
        model.settings["num_classes"] = classes
        model.fc = make_model(**model.settings).fc
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


@torch.no_grad()
def update_average(average, model, decay):
    """average ← decay · average + (1 - decay) · model, buffers too: batch norm's statistics must fit the weights."""
    for a, b in zip(average.state_dict().values(), model.state_dict().values()):
        a.lerp_(b, 1 - decay) if a.is_floating_point() else a.copy_(b)


def train_step(model, raw, ema, optimizers, autocast, train, c, step, steps, rank, world):
    """One update of the parameters and their average; returns the batch's loss and accuracy (2,), on the device.

    N ranks do what one rank does with N times the accumulation, but for batch norm's statistics and what DropPath and
    DropBlock draw.
    """
    torch.manual_seed(int(np.random.SeedSequence((c.seed, step, rank)).generate_state(1)[0]))  # DropPath, DropBlock
    model.train(not c.freeze)  # a frozen network's batch norm keeps its statistics
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            left = max(0.0, 1 - step / (steps * group.get("until", 1)))
            cosine = learning_rate(step, 1.0, c.warmup, steps)
            group["lr"] = group["peak"] * (left if c.schedule == "linear" else cosine)
    total = torch.zeros(2, device=train[0].device)
    for micro in range(c.grad_accum):
        x, y = training_batch(c, *train, step, micro * world + rank, c.grad_accum * world)  # (B, 3, H, W), (B,)
        if world > 1:  # ranks exchange gradients at the last micro-batch; DDP wants to know before the forward pass
            model.require_backward_grad_sync = micro == c.grad_accum - 1
        with autocast:
            logits = model(normalise(x, raw.stats, c.image_size)).float()  # (B, classes)
            loss = F.cross_entropy(logits, y, label_smoothing=c.label_smoothing) / c.grad_accum
        loss.backward()
        total += torch.stack((loss.detach(), (logits.argmax(dim=1) == y).float().mean() / c.grad_accum))
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    if ema is not None:  # an average of few steps at first, so that the random start is soon forgotten
        update_average(ema, raw, min(c.ema, (step + 1) / (step + 10)))
    return total


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
    raw, saved = load_network(c, len(classes)), load_checkpoint(f"{c.out}/ckpt.pt") if c.resume else None
    if local == 0 and world > 1:
        torch.distributed.barrier()
    train_split, val, test = [[t.to(device) for t in split] for split in splits]  # uint8, all on the device
    if raw.stem == "whiten" and not saved and not c.init:
        raw.whiten_stem(normalise(train_split[0][:5000].cpu(), raw.stats, c.image_size))
    raw.to(device, memory_format=torch.channels_last)  # a pixel's channels side by side, as convolutions like them
    ema = copy.deepcopy(raw).requires_grad_(False) if c.ema else None
    optimizers = sgd_or_muon(raw, c)
    if saved:
        with one_line(f"{c.out}/ckpt.pt can't be resumed"):
            raw.load_state_dict(saved["model"])
            load_optimizers(optimizers, saved["optimizer"])
            if ema is not None:
                ema.load_state_dict(saved["ema"])
    model = torch.compile(raw) if c.compile else raw  # raw, not compiled, is what is evaluated and saved
    if world > 1:
        model = nn.parallel.DistributedDataParallel(model)
    batch, macs = c.batch_size * c.grad_accum * world, count_macs(raw, c.image_size or 32)
    per_epoch = max(1, len(train_split[0]) // batch)
    steps = c.steps or math.ceil(c.epochs * per_epoch)
    run = RunFolder(c, saved, writes=rank == 0)
    if rank == 0:
        print(" ".join(f"{name}={value!r}" for name, value in dataclasses.asdict(c).items()))
        print(f"{sum(p.numel() for p in raw.parameters()):,} parameters | {macs / 1e6:.1f}M MACs | "
              f"{len(train_split[0]):,} images to train on | {steps} steps of {batch} | {device} {dtype}")

    def save(name):
        averaged = {"ema": ema.state_dict()} if ema is not None else {}
        run.save(name, raw, model_config=raw.settings, optimizer=[o.state_dict() for o in optimizers], **averaged)

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
            ms, lr = 1e3 * (run.seconds - logged) / len(pending), optimizers[0].param_groups[0]["lr"]
            rate, pflop, logged, pending = 1e3 * batch / ms, 6e-15 * macs * batch * run.step, run.seconds, []
            run.log(f"step {run.step}/{steps} | loss {loss:.4f} | accuracy {accuracy:.3f} | lr {lr:.1e} | "
                    f"{ms:.1f} ms | {rate:.0f} images/s | {pflop:.3g} PFLOP", loss=loss, train_accuracy=accuracy,
                    lr=lr, ms=ms, seconds=run.seconds, images_per_s=rate, pflop=pflop)
        if due:
            scores = [{} if c.full_train else evaluate(ema or raw, *val, c, autocast)]
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
        if due or stop:
            save("ckpt.pt")
            clock = time.perf_counter()
        if run.step >= end or stop:
            break
        pending.append(train_step(model, raw, ema, optimizers, autocast, train_split, c, run.step, steps, rank, world))
        run.step += 1
    if world > 1:  # a gloo group that ends while DDP still holds it may abort
        del model
        gc.collect()
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if rank == 0 and stop:
        print(f"stopped after step {run.step}; to go on: python resnet.py --resume --out {c.out}")
    elif rank == 0:
        finish(run, raw, test, classes, c, autocast, device)
    return 130 if stop else 0


def finish(run, model, test, classes, c, autocast, device):
    """Read the test set, once, with the best weights; write the log's last row, and --save_logits."""
    best = load_checkpoint(run.out / "best.pt")
    model.load_state_dict(best.get("ema") or best["model"])
    scores = test_scores(model, *test, classes, c, autocast)
    memory = peak_mb(device)
    run.log(f"{run.seconds:.0f} s of training | peak {memory:.0f} MB", seconds=run.seconds, **scores, final=True,
            peak_mb=memory)
    if c.save_logits:
        images = load_images(dataclasses.replace(c, full_train=True, labels=1.0))[0][0].to(device)
        buffer = io.BytesIO()
        np.save(buffer, predict(model, images, c, autocast, views=2).transpose(0, 1).cpu().numpy())
        write_atomic(c.save_logits, buffer.getvalue())


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


# ---- what the shortcut does: Figure 6 and the loss landscape -------------------------------------------------------

def figure6(c, interrupts):
    """Train plain and residual networks of 20 and 56 layers, each in a folder of its own, and draw their errors:
    on augmented batches while they train, and on validation images ([1]: test).

    The same command again goes on where it was interrupted.
    """
    runs = {name: dataclasses.replace(c, arch=f"resnet{name[-2:]}", plain=name.startswith("plain"), figure6=False,
                                      out=str(Path(c.out) / "figure6" / name), resume=False)
            for name in ("plain20", "plain56", "resnet20", "resnet56")}
    for run in runs.values():
        path = Path(run.out) / "ckpt.pt"
        may_differ = ("resume", "stop_at", "out", "data_dir", "device", "compile", "log_every")
        for name, value in (load_checkpoint(path)["config"] if path.exists() else {}).items():
            if value != getattr(run, name, value) and name not in may_differ:
                raise UserError(f"{path} is of a run with --{name} {value}: give that too, or another --out")
        run.resume = path.exists()
        if status := train(run, interrupts):
            return status
    logs = {name: [json.loads(line) for line in (Path(run.out) / "log.jsonl").read_text().splitlines()]
            for name, run in runs.items()}
    for kind, label in (("train", "training error, %"), ("val", "validation error, %")):
        errors = {name: [(row["step"], 100 - 100 * row[f"{kind}_accuracy"]) for row in rows
                         if f"{kind}_accuracy" in row] for name, rows in logs.items()}
        curves_svg(Path(c.out) / f"figure6_{kind}.svg", errors, "step", label)
    print(f"wrote {c.out}/figure6_train.svg and figure6_val.svg")
    return 0


@torch.no_grad()
def loss_surface(model, images, labels, n, seed, c, autocast):
    """Losses (n, n) at θ + a δ + b η, a and b from -1 to 1, for two random directions δ, η ([8] eq. 1).

    Filter-normalised ([8] §4): each filter of a direction is as long as the model's, so that networks with long and
    short filters can be compared. Biases and norms stay, batch norm's running statistics too, as in [8]'s code: far
    out, filters have grown by √(1 + a² + b²), and in a plain network that multiplies layer upon layer.
    """
    generator = torch.Generator().manual_seed(seed)

    def direction(p):
        d = torch.randn(p.shape, generator=generator).to(p)
        if p.dim() == 1:
            return torch.zeros_like(p)
        length = functools.partial(torch.linalg.vector_norm, dim=tuple(range(1, p.dim())), keepdim=True)
        return d * length(p) / length(d)

    lines = [(p, p.clone(), direction(p), direction(p)) for p in model.parameters()]
    surface = torch.zeros(n, n)
    for i, b in enumerate(torch.linspace(1, -1, n).tolist()):
        for j, a in enumerate(torch.linspace(-1, 1, n).tolist()):
            for p, centre, delta, eta in lines:
                p.copy_(centre + a * delta + b * eta)
            surface[i, j] = evaluate(model, images, labels, c, autocast)["val_loss"]
    for p, centre, *_ in lines:
        p.copy_(centre)
    return surface


def contour_svg(path, panels, levels):
    """Contour lines of {title: surface (n, n)}, side by side, by marching squares: a line enters and leaves a cell of
    four neighbouring points where the level lies between two of them."""
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {340 * len(panels) + 60} 360" '
           'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>']
    shares = np.linspace(0, 230, len(levels)).astype(int)
    colours = [f"#{share:02x}40{230 - share:02x}" for share in shares]  # low losses blue, high ones red
    for number, (title, surface) in enumerate(panels.items()):
        z, n = surface.double().nan_to_num(nan=1e9, posinf=1e9).tolist(), len(surface)
        x0, y0, side = 20 + 340 * number, 30, 310 / (n - 1)
        svg.append(f'<text x="{x0 + 155}" y="20" text-anchor="middle">{html.escape(title)}</text>'
                   f'<rect x="{x0}" y="{y0}" width="310" height="310" fill="none" stroke="#999"/>')
        for level, colour in zip(levels, colours):
            d = ""
            for i, j in itertools.product(range(n - 1), repeat=2):
                corners, points = ((i, j), (i, j + 1), (i + 1, j + 1), (i + 1, j), (i, j)), []
                for (i0, j0), (i1, j1) in itertools.pairwise(corners):
                    p, q = z[i0][j0], z[i1][j1]
                    if (p < level) != (q < level):
                        t = (level - p) / (q - p)
                        x, y = x0 + side * (j0 + t * (j1 - j0)), y0 + side * (i0 + t * (i1 - i0))
                        points.append(f"{x:.1f} {y:.1f}")
                d += "".join(f"M{a}L{b}" for a, b in zip(points[::2], points[1::2]))
            svg.append(f'<path d="{d}" stroke="{colour}" fill="none"/>')
    svg.append(f'<text x="{340 * len(panels) + 10}" y="20">loss</text>')
    for k, (level, colour) in enumerate(zip(levels, colours)):
        text = f"{float(format(level, '.2g')):g}"  # 100, not 1e+02
        svg.append(f'<text x="{340 * len(panels) + 10}" y="{40 + 16 * k}" fill="{colour}">{text}</text>')
    write_atomic(path, "\n".join([*svg, "</svg>"]).encode())


def landscape(c):
    """Draw the training loss around each of the checkpoints in --landscape."""
    device, _, autocast = pick_device(c.device, c.dtype, "avx512_bf16")
    paths, panels = [path for path in c.landscape.split(",") if path], {}
    titles = [Path(path).parent.name for path in paths]
    for path in paths:
        held = load_checkpoint(path)["config"]
        for name in ("data", "image_size"):
            if held.get(name) != getattr(c, name):
                raise UserError(f"{path} was trained with --{name} {held.get(name)}: say so here too")
    models = [from_pretrained(path).to(device, memory_format=torch.channels_last) for path in paths]
    with one_line(f"can't make the folder {c.out}", status=1):
        Path(c.out).mkdir(parents=True, exist_ok=True)
    images, labels = (t[:256].to(device) for t in load_images(c)[0])  # differs from [8]: few, for a CPU's sake
    for title, path, model in zip(titles if len({*titles}) == len(paths) else paths, paths, models):
        started = time.perf_counter()
        panels[title] = surface = loss_surface(model, images, labels, c.grid, c.seed, c, autocast)
        print(f"{path}: loss {surface[c.grid // 2, c.grid // 2]:.3f} at the centre, {surface.min():.3f} to "
              f"{surface.max():.4g} around it, {time.perf_counter() - started:.0f} s", flush=True)
    write_atomic(Path(c.out) / "landscape.json", json.dumps({k: v.tolist() for k, v in panels.items()}).encode())
    contour_svg(Path(c.out) / "landscape.svg", panels, [0.1 * 10 ** (k / 6) for k in range(19)])  # .1 to 100
    print(f"wrote {c.out}/landscape.svg")


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
        if c.landscape:
            landscape(c)
            return 0
        pressed, old = [], signal.getsignal(signal.SIGINT)  # a first Ctrl-C stops between steps, a second at once
        signal.signal(signal.SIGINT, lambda *_: (pressed.append(True), signal.signal(signal.SIGINT, old)))
        try:
            return figure6(c, pressed) if c.figure6 else train(c, pressed)
        finally:
            signal.signal(signal.SIGINT, old)
    except UserError as error:
        print(f"resnet.py: {error}", file=sys.stderr)
        return error.status
    except (MemoryError, RuntimeError) as error:  # torch's out of memory is one, a plain one on a CPU
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            print(f"resnet.py: --compile failed, leave it out: {' '.join(str(error).split())[:200]}", file=sys.stderr)
            return 1
        if isinstance(error, RuntimeError) and not re.search("(out of|allocate|enough) memory", str(error)):
            raise
        print(f"resnet.py: out of memory ({' '.join(str(error).split())[:200]}): lower --batch_size", file=sys.stderr)
        return 1
    except SystemExit as error:  # --help
        return error.code or 0
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
