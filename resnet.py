r"""ResNet: networks a hundred layers deep that train, since each block learns only what to add.

From some depth on, a plain stack of convolutions gets worse when it gets deeper, on the training
images too. A shortcut around every two or three of them, y = f(x) + x, mends that [1]: a block with
nothing to add can leave f at 0. The family keeps the shortcut and changes f.

    BasicBlock     two 3x3 convolutions [1]
    Bottleneck     1x1, 3x3 on fewer channels, 1x1: more depth for the compute [1]; with the 3x3 in
                   groups, more channels for it (ResNeXt [3])
    PreActBlock    norm and ReLU first, so that nothing comes after the sum [4]; wide instead of
                   deep it trains faster (Wide ResNet [5])
    MBConv         wide inside, where each channel is convolved alone (EfficientNet [6])
    ConvNeXtBlock  7x7 on each channel, then an MLP: a Transformer's block in convolutions [7]

    python resnet.py                                         # offline: shapes that it draws
    python resnet.py --data cifar10 --arch plain56           # without shortcuts
    python resnet.py --data cifar10 --arch fast --val 0      # the most accuracy for the compute
    python resnet.py --data cifar10 --init resnet18 --image_size 128 --lr 0.01  # transfer

What to expect (CIFAR-10: a JPEG copy, three points below the original; assets/logs/resnet/):
- python resnet.py (shapes): test accuracy 95.1% after 65 s on one core of an AMD EPYC, bfloat16
- --arch fast: 89.9%, with six views 90.8%, as airbench94's code; 0.284 PFLOP; n = 10, H200
- four epochs, plain: 71.3% with 20 layers, 39.9% with 56; residual: 76.8%, 72.8% (n = 1)

Differs from [1]: Nesterov momentum, a cosine instead of steps, decay on weights only, one mean and
std per channel, reflected borders, the best epoch on validation images, torchvision's "v1.5".

[1] ResNet, arXiv 1512.03385v1  [2] Kaiming init, 1502.01852v1  [3] ResNeXt, 1611.05431v2
[4] Identity mappings, 1603.05027v3  [5] Wide ResNet, 1605.07146v4  [6] EfficientNet, 1905.11946v5
[7] ConvNeXt, 2201.03545v2  [8] airbench, 2404.00498v2
"""

import argparse
import dataclasses
import json
import math
import os
import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# Shapes: B batch, C channels, N images; images are (B, 3, H, W), uint8 until normalised


class ResNet(nn.Sequential):
    """images (B, 3, H, W) -> logits (B, num_classes), by layers in the order in which they are set.
    stages: (block, width, depth, stride) each. Names are torchvision's. stem, to C channels:
    imagenet (7x7, pool), cifar (3x3), preact (norm, ReLU come last), convnext (norm comes last)."""

    def __init__(self, stages, num_classes=10, stem="cifar", C=16, shortcut="B", norm="batch"):
        super().__init__()
        make_norm = NORMS[norm]
        self.stats = IMAGENET_STATS if stem == "imagenet" else CIFAR10_STATS
        self.conv1 = conv(3, C, 7, 2) if stem == "imagenet" else conv(3, C, 3)
        if stem != "preact":
            self.bn1 = make_norm(C)
        if stem in ("imagenet", "cifar"):
            self.relu = nn.ReLU()
        if stem == "imagenet":
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        for i, (block, width, depth, stride) in enumerate(stages, 1):
            layer = nn.Sequential()
            for _ in range(depth):
                around = make_shortcut(shortcut, C, width, stride, make_norm)
                layer.append(block(C, width, stride, make_norm, around))
                C, stride = width, 1
            self.add_module(f"layer{i}", layer)
        if stem in ("preact", "convnext"):
            self.bn_last = make_norm(C)
        if stem == "preact":
            self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(C, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # gradients keep their variance ([2] eq. 14)
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x):
        """What the last layer reads, (B, C)."""
        for layer in list(self)[:-1]:
            x = layer(x)
        return x


# ---- Blocks: x (B, C_in, H, W) -> (B, C, H / stride, W / stride)

def conv(C_in, C, size, stride=1, groups=1):
    """A convolution that keeps height and width, or divides them by the stride."""
    return nn.Conv2d(C_in, C, size, stride, padding=size // 2, groups=groups, bias=False)


class LayerNorm2d(nn.LayerNorm):
    """Normalise the channels of each pixel of x (B, C, H, W), independently of other images."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


# batch norm is trained with a batch's mean and variance, evaluated with their running averages
NORMS = dict(batch=nn.BatchNorm2d, layer=partial(LayerNorm2d, eps=1e-6), none=nn.Identity)


def make_shortcut(kind, C_in, C, stride, make_norm):
    """x if it fits the output, else by kind: A, B ([1] 3.3), conv, convnext, none. plain: never."""
    fits = stride == 1 and C_in == C
    if kind == "plain" or (kind == "none" and not fits):
        return lambda x: 0.0
    if fits:
        return nn.Identity()
    if kind == "A":  # every stride-th pixel; channels of zeros before and behind
        new = (C - C_in) // 2
        return nn.Sequential(nn.AvgPool2d(1, stride), nn.ZeroPad3d((0, 0, 0, 0, new, new)))
    if kind == "convnext":  # the block, too, reads what this makes of x [7]
        return nn.Sequential(make_norm(C_in), nn.Conv2d(C_in, C, stride, stride))
    projection = nn.Sequential(conv(C_in, C, 1, stride))
    if kind == "B":  # else "conv"
        projection.append(make_norm(C))
    return projection


class BasicBlock(nn.Module):
    """y = relu(f(x) + x), with f of two 3x3 convolutions ([1] Figure 5 left)."""

    def __init__(self, C_in, C, stride, make_norm, shortcut):
        super().__init__()
        self.conv1, self.bn1 = conv(C_in, C, 3, stride), make_norm(C)
        self.conv2, self.bn2 = conv(C, C, 3), make_norm(C)
        self.downsample = shortcut

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(self.downsample(x) + y)


class Bottleneck(nn.Module):
    """1x1 to `ratio` C channels, 3x3 (in groups: [3]), 1x1 back ([1] Figure 5 right)."""

    def __init__(self, C_in, C, stride, make_norm, shortcut, ratio=0.25, groups=1):
        super().__init__()
        inner = int(C * ratio)
        self.conv1, self.bn1 = conv(C_in, inner, 1), make_norm(inner)
        self.conv2, self.bn2 = conv(inner, inner, 3, stride, groups), make_norm(inner)
        self.conv3, self.bn3 = conv(inner, C, 1), make_norm(C)
        self.downsample = shortcut

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))  # (B, inner, H, W)
        y = F.relu(self.bn2(self.conv2(y)))  # (B, inner, H / stride, W / stride)
        y = self.bn3(self.conv3(y))
        return F.relu(self.downsample(x) + y)


class PreActBlock(nn.Module):
    """Nothing after the sum: x passes from block to block [4]. A projection reads relu(norm(x))."""

    def __init__(self, C_in, C, stride, make_norm, shortcut):
        super().__init__()
        self.bn1, self.conv1 = make_norm(C_in), conv(C_in, C, 3, stride)
        self.bn2, self.conv2 = make_norm(C), conv(C, C, 3)
        self.downsample = shortcut

    def forward(self, x):
        y = F.relu(self.bn1(x))
        shortcut = x if isinstance(self.downsample, nn.Identity) else self.downsample(y)
        y = F.relu(self.bn2(self.conv1(y)))
        return shortcut + self.conv2(y)


class MBConv(nn.Module):
    """1x1 to ratio * C_in channels, each convolved alone and weighted, then 1x1 to C [6]."""

    def __init__(self, C_in, C, stride, make_norm, shortcut, ratio=6, size=3):
        super().__init__()
        inner, squeezed = ratio * C_in, C_in // 4
        self.expand = nn.Sequential(conv(C_in, inner, 1), make_norm(inner), nn.SiLU())
        if ratio == 1:
            self.expand = nn.Identity()
        self.depthwise = nn.Sequential(conv(inner, inner, size, stride, groups=inner),
                                       make_norm(inner), nn.SiLU())
        self.excite = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(inner, squeezed, 1),
                                    nn.SiLU(), nn.Conv2d(squeezed, inner, 1), nn.Sigmoid())
        self.project = nn.Sequential(conv(inner, C, 1), make_norm(C))
        self.downsample = shortcut

    def forward(self, x):
        y = self.depthwise(self.expand(x))  # (B, inner, H / stride, W / stride)
        y = y * self.excite(y)  # (B, inner, 1, 1): a weight for each channel, from its mean
        return self.downsample(x) + self.project(y)


class ConvNeXtBlock(nn.Module):
    """x + gamma f(x), gamma small at first [7]: here .1, for short runs; 1e-6 in the paper."""

    def __init__(self, C_in, C, stride, make_norm, shortcut):
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(C, C, 7, padding=3, groups=C), make_norm(C),
            nn.Conv2d(C, 4 * C, 1), nn.GELU(), nn.Conv2d(4 * C, C, 1))
        self.gamma = nn.Parameter(torch.full((C,), 0.1))
        self.downsample = shortcut

    def forward(self, x):
        x = self.downsample(x)  # (B, C, H / stride, W / stride)
        return x + self.gamma[:, None, None] * self.branch(x)


# ---- Networks

def stack(block, times, depths, num_classes=1000, stem="imagenet", width=64, **more):
    """Stage i has times * width * 2^i channels. All but the first halve height and width."""
    stages = [(block, times * width * 2**i, depth, 1 if i == 0 else 2)
              for i, depth in enumerate(depths)]
    return ResNet(stages, num_classes, stem, width, **more)


resnet18 = partial(stack, BasicBlock, 1, (2, 2, 2, 2))
resnet34 = partial(stack, BasicBlock, 1, (3, 4, 6, 3))
resnet50 = partial(stack, Bottleneck, 4, (3, 4, 6, 3))
resnet101 = partial(stack, Bottleneck, 4, (3, 4, 23, 3))
resnet152 = partial(stack, Bottleneck, 4, (3, 8, 36, 3))
resnext50_32x4d = partial(stack, partial(Bottleneck, ratio=0.5, groups=32), 4, (3, 4, 6, 3))
wide_resnet50_2 = partial(stack, partial(Bottleneck, ratio=0.5), 4, (3, 4, 6, 3))
resnext29 = partial(stack, partial(Bottleneck, ratio=0.5, groups=8), 3, (3, 3, 3), num_classes=10,
                    stem="cifar", width=16)
convnext = partial(stack, ConvNeXtBlock, 1, (1, 1, 3), num_classes=10, stem="convnext", width=32,
                   shortcut="convnext", norm="layer")


def cifar_resnet(depth, num_classes=10, shortcut="A", **more):
    """[1] 4.2: stages of 16, 32 and 64 channels, of n blocks each if the depth is 6 n + 2."""
    assert depth % 6 == 2, f"depth {depth}: want 6 n + 2"
    depths = [depth // 6] * 3
    return stack(BasicBlock, 1, depths, num_classes, "cifar", 16, shortcut=shortcut, **more)


def wrn(depth, width, num_classes=10, **more):
    """Wide ResNet [5]: depth 6 n + 4, `width` times as wide."""
    assert depth % 6 == 4, f"depth {depth}: want 6 n + 4"
    depths = [depth // 6] * 3
    return stack(PreActBlock, width, depths, num_classes, "preact", 16, shortcut="conv", **more)


def efficientnet_b0(num_classes=10):
    """EfficientNet-B0's blocks [6] with this file's stem and head: 32x32 pixels shrink to 2x2."""
    stages = [(partial(MBConv, ratio=1), 16, 1, 1)]
    for size, *stage in ((3, 24, 2, 2), (5, 40, 2, 2), (3, 80, 3, 2),
                         (5, 112, 3, 1), (5, 192, 4, 2), (3, 320, 1, 1)):
        stages.append((partial(MBConv, size=size), *stage))
    return ResNet(stages, num_classes, C=32, shortcut="none")


class FastNet(nn.Module):
    """airbench94 [8]: a layer that whitens 2x2 patches, then six convolutions. Of norms only biases
    are learned. No shortcuts: so shallow a network is better without them."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.stats = CIFAR10_STATS
        self.conv1 = nn.Conv2d(3, 24, 2)
        self.conv1.weight.requires_grad_(False)
        self.groups = nn.Sequential()
        for C_in, C in ((24, 64), (64, 256), (256, 256)):
            self.groups.extend([
                conv(C_in, C, 3), nn.MaxPool2d(2), nn.BatchNorm2d(C, momentum=0.4), nn.GELU(),
                conv(C, C, 3), nn.BatchNorm2d(C, momentum=0.4), nn.GELU()])
        for layer in self.groups:
            if isinstance(layer, nn.Conv2d):
                nn.init.dirac_(layer.weight[:layer.in_channels].data)  # these copy their input
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.requires_grad_(False)
        self.fc = nn.Linear(256, num_classes, bias=False)
        self.fc.weight.data /= self.fc.weight.std()

    @torch.no_grad()
    def whiten(self, images):
        """Let the first filters, and their negatives, whiten 2x2 patches of images (B, 3, H, W)."""
        patches = F.unfold(images, 2).transpose(1, 2).reshape(-1, 12).double()
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))  # in columns
        filters = (vectors / (values + 5e-4).sqrt()).T.reshape(12, 3, 2, 2)
        self.conv1.weight.copy_(torch.cat((filters, -filters)))

    def features(self, x):
        x = self.groups(F.gelu(self.conv1(x)))  # (B, 256, 3, 3)
        return x.amax(dim=(2, 3)) / x.size(1)  # small, so that the first logits are

    def forward(self, x):
        return self.fc(self.features(x))


class FilterMuon(torch.optim.SGD):
    """SGD that turns the gradients of its first group, filters before a norm, into Muon's updates.
    The norm undoes a filter's length, which only scales how far a step turns it; so it's reset."""

    @torch.no_grad()
    def step(self):
        mu = 0.6
        a, b, c = 3.4445, -4.7750, 2.0315  # bring any s in (0, 1] near 1 in a few steps
        for w in self.param_groups[0]["params"]:  # (C_out, C_in, 3, 3)
            m = self.state[w].setdefault("muon", torch.zeros_like(w))
            m.mul_(mu).add_(w.grad)  # m <- mu m + g
            g = w.grad.add(m, alpha=mu).flatten(1)  # Nesterov: g + mu m
            x = g.bfloat16() if g.is_cuda else g
            x = x / (x.norm() + 1e-7)  # no singular value above 1
            for _ in range(3):  # U S V^T -> about U V^T: s <- a s + b s^3 + c s^5
                gram = x @ x.mT
                x = a * x + (b * gram + c * gram @ gram) @ x
            w.grad = x.view_as(w).type_as(w)
            w.mul_(len(w) ** 0.5 / w.norm())  # mean square of the filters' lengths: 1
        super().step()


def make_sgd(model, c):
    """SGD, with decay on weights alone; a FastNet's groups are [8]'s. peak: the highest rate."""
    if c.freeze:
        model.requires_grad_(False)
        model.fc.requires_grad_(True)
    params = [p for p in model.parameters() if p.requires_grad]
    vectors = [p for p in params if p.dim() == 1]
    weights = [p for p in params if p.dim() > 1]
    if isinstance(model, FastNet):
        # [8]'s loss is a sum over 2,000 images, ours a mean: rates are 2,000 times .053 and .67
        groups = [dict(params=weights[:-1], peak=c.lr, momentum=0),
                  dict(params=vectors, peak=106.0, weight_decay=0.004 / 106),
                  dict(params=weights[-1:], peak=1340.0, weight_decay=0.004 / 1340)]
        return FilterMuon(groups, momentum=0.85, nesterov=True)
    groups = [dict(params=weights, peak=c.lr, weight_decay=c.weight_decay),
              dict(params=vectors, peak=c.lr)]
    return torch.optim.SGD(groups, momentum=0.9, nesterov=True)


def learning_rate(step, peak, warmup, steps):
    """Linear warm-up to peak, then half a cosine down to 0 (arXiv 1608.03983 eq. 5)."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = min(1, (step - warmup) / max(1, steps - warmup))
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


# ---- Names, and weights from files. OFFICIAL: torchvision's, and how each file's SHA-256 starts

OFFICIAL = dict(resnet18="f37072fd", resnet34="b627a593", resnet50="11ad3fa6", resnet101="cd907fc2",
                resnet152="f82ba261", resnext50_32x4d="1a0047aa", wide_resnet50_2="9ba9bcbe")
ARCHS = {name: partial(globals()[name], stem="cifar") for name in OFFICIAL}
ARCHS |= {f"resnet{n}": partial(cifar_resnet, n) for n in (20, 32, 44, 56, 110)}
ARCHS |= {f"plain{n}": partial(cifar_resnet, n, shortcut="plain") for n in (20, 56)}
ARCHS |= {f"resnet20-norm-{n}": partial(cifar_resnet, 20, norm=n) for n in ("layer", "none")}
ARCHS |= {"wrn22-1": partial(wrn, 22, 1), "wrn28-10": partial(wrn, 28, 10)}
ARCHS |= dict(resnext29=resnext29, efficientnet_b0=efficientnet_b0, convnext=convnext, fast=FastNet)


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


def from_pretrained(name_or_path, num_classes=None, data_dir="data", arch="resnet20"):
    """torchvision's resnet18, ..., or the network in a file, of this arch unless it names its own.
    If the file has other than num_classes, or no last layer, that layer is a fresh one."""
    if name_or_path in OFFICIAL:
        url = f"https://download.pytorch.org/models/{name_or_path}-{OFFICIAL[name_or_path]}.pth"
        weights = torch.hub.load_state_dict_from_url(
            url, data_dir, check_hash=True, weights_only=True)
        config = dict(arch=name_or_path)
    else:
        weights, config = load_weights(name_or_path)
    arch, more = config.get("arch", arch), {}
    if arch in OFFICIAL:
        more["width"], _, size, _ = weights["conv1.weight"].shape
        if size == 7:
            more["stem"] = "imagenet"
    found = len(weights.get("fc.weight", ()))
    model = ARCHS[arch](num_classes=num_classes or found or 10, **more)
    if found != model.fc.out_features:
        weights |= {f"fc.{name}": w for name, w in model.fc.state_dict().items()}
    model.load_state_dict(weights)
    model.arch = arch
    return model


# ---- Data and evaluation

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


def training_batch(c, images, labels, step):
    """Augmented images (B, 3, H, W) and labels (B,): a function of (seed, step) alone."""
    n = len(images)
    epoch, position = divmod(step, max(1, n // c.batch_size))
    order = np.random.default_rng((c.seed, 1, epoch)).permutation(n)
    index = order[position * c.batch_size:][:c.batch_size]
    rng = np.random.default_rng((c.seed, 2, step))
    dy, dx = rng.integers(-c.crop, c.crop, (2, len(index)), endpoint=True)
    mirror = rng.integers(2, size=len(index))
    if c.arch == "fast":  # a coin in the first epoch, then every other one ([8] 3.6)
        mirror = (np.random.default_rng((c.seed, 3)).integers(2, size=n)[index] + epoch) % 2
    index, dy, dx, mirror = torch.from_numpy(np.stack((index, dy, dx, mirror))).to(images.device)
    return augment(images, index, dy, dx, mirror == 1), labels[index]


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


@torch.no_grad()
def predict(model, images, c, autocast, function=None):
    """Logits (N, classes) of images (N, 3, H, W) uint8, or what another function makes of them."""
    model.eval()
    function = function or model
    with autocast:
        return torch.cat([function(normalise(x, model.stats, c.image_size)).float()
                          for x in images.split(500)])


def six_views(model, x):
    """Logits averaged over x (B, 3, H, W) and its mirror, weight 1/2, and over both moved by a
    pixel up and left, 1/4, and down and right, 1/4 ([8] 3.5)."""
    padded = F.pad(x, [1] * 4, mode="reflect")
    views = (x, 2), (padded[..., 2:, 2:], 1), (padded[..., :-2, :-2], 1)
    return sum(weight / 8 * (model(view) + model(view.flip(3))) for view, weight in views)


def score(logits, labels):
    """Mean loss and accuracy of logits (N, classes)."""
    accuracy = (logits.argmax(dim=1) == labels).float().mean().item()
    return F.cross_entropy(logits, labels).item(), accuracy


# ---- Training

CHOICES = dict(data=("shapes", "cifar10"), arch=[*ARCHS], dtype=("auto", "float32", "bfloat16"))


@dataclasses.dataclass
class Config:
    data: str = "shapes"  # drawn by this script; or cifar10
    data_dir: str = "data"  # where downloads land
    val: int = 5000  # images of cifar10, the last, to validate on; 0: train on all
    out: str = "out/resnet"
    arch: str = "resnet20"  # fast: with defaults of its own
    init: str = ""  # torchvision's resnet18, ... or a checkpoint: start from its weights
    freeze: bool = False  # train the last layer alone
    image_size: int = 0  # pixels a side to which images are resized; 0: as they are
    crop: int = 4  # pixels by which images are moved at most
    lr: float = 0.1  # peak
    warmup: int = 20  # steps
    weight_decay: float = 1e-4
    label_smoothing: float = 0.0  # share of a target that is spread over all classes
    batch_size: int = 64
    epochs: float = 3.0
    eval_every: int = 0  # steps between evaluations, each with a checkpoint; 0: an epoch
    log_every: int = 10
    seed: int = 0
    resume: bool = False  # go on from ckpt.pt in --out; repeat the run's other flags
    device: str = "auto"
    dtype: str = "auto"
    compile: bool = False
    save_logits: str = ""  # .npy: logits of all training images and mirrors, for vit.py --teacher


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
    """Train as c says, keep the best on validation images, and test that."""
    device, autocast = choose_device(c.device, c.dtype)
    torch.manual_seed(c.seed)
    splits = [[t.to(device) for t in split] for split in load_images(c)]
    (images, labels), val, test = splits
    if c.init:
        raw = from_pretrained(c.init, 10, c.data_dir, c.arch)
        c.arch = raw.arch  # so that checkpoints say what they hold
    else:
        raw = ARCHS[c.arch](num_classes=10)
    if c.arch == "fast" and not c.init:
        raw.whiten(normalise(images[:5000].cpu(), raw.stats))
    raw.to(device, memory_format=torch.channels_last)
    optimizer = make_sgd(raw, c)
    per_epoch = max(1, len(images) // c.batch_size)
    steps = math.ceil(c.epochs * per_epoch)
    out, step, best, seconds = Path(c.out), 0, -1.0, 0.0
    if c.resume:
        saved = torch.load(out / "ckpt.pt", map_location=device, weights_only=True)
        for name in ("data", "val", "arch", "image_size"):
            assert saved["config"][name] == getattr(c, name), f"{out} has another --{name}"
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
        x, y = training_batch(c, images, labels, step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, group["peak"], c.warmup, steps)
            if c.arch == "fast":
                group["lr"] = group["peak"] * (1 - step / steps)
        model.train(not c.freeze)  # a frozen network's batch norm keeps its statistics
        with autocast:
            logits = model(normalise(x, raw.stats, c.image_size)).float()
        loss = F.cross_entropy(logits, y, label_smoothing=c.label_smoothing)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.item()
        if not math.isfinite(loss):
            raise SystemExit(f"loss is {loss} at step {step}")
        step += 1
        seconds += time.perf_counter() - started
        if step % c.log_every == 0:
            log_row(c, step=step, loss=loss, train_accuracy=score(logits, y)[1],
                    lr=optimizer.param_groups[0]["lr"], seconds=seconds,
                    images_per_s=c.batch_size * step / seconds)
        if step % (c.eval_every or per_epoch) == 0 or step == steps:
            accuracy = -1.0
            if c.val:
                val_loss, accuracy = score(predict(raw, val[0], c, autocast), val[1])
                log_row(c, step=step, seconds=seconds, val_loss=val_loss, val_accuracy=accuracy)
            improved, best = accuracy > best, max(accuracy, best)
            state = dict(model=raw.state_dict(), optimizer=optimizer.state_dict(), config=vars(c),
                         step=step, best=best, seconds=seconds)
            if improved:
                save(out / "best.pt", state)
            save(out / "ckpt.pt", state)  # last: if a run dies in between, best.pt is new enough
    if c.val:
        raw.load_state_dict(torch.load(out / "best.pt", device, weights_only=True)["model"])
    finish(c, raw, splits, autocast, step=step, seconds=seconds)


def finish(c, model, splits, autocast, **row):
    """Test once, and leave features.pt, for ijepa.py --compare, and --save_logits behind."""
    train_split, val, test = splits
    test_loss, accuracy = score(predict(model, test[0], c, autocast), test[1])
    logits = predict(model, test[0], c, autocast, partial(six_views, model))
    log_row(c, **row, test_loss=test_loss, test_accuracy=accuracy,
            test_accuracy_six_views=score(logits, test[1])[1], final=True)
    state = dict(name=Path(c.out).name)
    for split, (x, y) in dict(train=train_split, test=test).items():
        state[f"{split}_z"] = predict(model, x[:10000], c, autocast, model.features).cpu()
        state[f"{split}_y"] = y[:10000].cpu()
    save(f"{c.out}/features.pt", state)
    if c.save_logits:
        images = torch.cat((train_split[0], val[0]))
        pair = [predict(model, x, c, autocast) for x in (images, images.flip(3))]
        np.save(c.save_logits, torch.stack(pair, dim=1).cpu().numpy())


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
    if parser.parse_args(argv).arch == "fast":
        parser.set_defaults(lr=0.24, batch_size=2000, epochs=8.0, crop=2, label_smoothing=0.2)
    train(Config(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    main()
