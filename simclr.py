# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "numpy", "requests"]
# ///
"""SimCLR, MoCo and VICReg: learn from images without labels: two distorted views of one should get similar vectors.

An encoder that gives every image the same vector does that too (a collapse), so something must keep vectors apart; that
is the main difference of the three. SimCLR [1] pushes each view away from the views of the batch's other images, and so
gains from a large batch; MoCo [2] [3] from a queue of older vectors, whose length has nothing to do with the batch;
VICReg [4] compares no two images: it asks each dimension to vary over the batch, and any two not to vary together.

Each image is distorted twice. The encoder turns a view into features, a small head turns features into a vector, and
only the loss sees vectors. Later the head is thrown away, and the features are judged by the labels of their nearest
neighbours (kNN) and by what a linear classifier can do with them (a linear probe). In MoCo the first view's vector is
the query. A copy of encoder and head, whose weights follow theirs slowly, turns the second view into its key, without a
gradient; the queue holds the keys of earlier steps.

    python simclr.py                                    # offline, ten kinds of shapes that the script draws
    python simclr.py --loss moco                        # or vicreg; --data cifar10 downloads 170 MB
    python simclr.py --data cifar10 --width 64 --batch_size 512 --optimizer sgd --temperature 0.5 --warmup 500 \\
        --epochs 100
    python simclr.py --data cifar10 --batch_size 1024 --chunk 256   # a large batch in a small one's memory
    python simclr.py --encoder vit                      # then: python vit.py --init out/simclr/ckpt.pt
    python simclr.py --show_augment                     # augment.png: pairs of views
    torchrun --nproc_per_node=8 simclr.py --data cifar10 --width 64 --optimizer lars --temperature 0.5 \\
        --warmup 870 --epochs 100

What to expect (torch 2.13.0, two cores of an AMD EPYC, seed 0, n = 1; logs in assets/logs/simclr/):
- python simclr.py, test images of shapes, bfloat16, 94 s of training: kNN .586 (random init .197, pixels .334), linear
  probe .624 (.197, .173), with a tenth of the labels .557 (.159, .184), with 1% .429 (.120, .136)
- A step of ResNet-18, batch 256, augmentation included, in bfloat16 by AVX-512: 50 pairs of images per second, 2.63
  times as many as with per-image PIL transforms in a DataLoader of two workers and fp32 eager; in fp32 1.17 times.
  Augmentation is 0.4% of a step: python .ci/old_tests.py BenchSimCLR.speed
- CIFAR-10 from a JPEG copy (about three points lower), batch 128, half an hour each on one core, the best of three
  rates (.004, .002, .001), kNN and linear on test images: SimCLR .619 and .637, VICReg .592 and .612, MoCo (temperature
  .1) .571 and .571, random init .319 and .332, pixels .451 and .412: BenchSimCLR.hours
- SimCLR there for ten minutes each, kNN on validation images: temperature .1 .474, .5 .447, 1 .427; at .2, batches of
  64 .470, 256 .457, 1,024 .437 (of 2,902, 545 and 134 steps): BenchSimCLR.temperatures, .batches
- On a GPU: not yet measured

Differs from the papers: all three see the same views, on CIFAR-10 [1] §B.9's colours, no blur, and crops of at least a
fifth of the image ([1] and [4] .08), on shapes more of each; VICReg's code also inverts bright pixels; encoders are
small, and AdamW trains them unless --optimizer says otherwise; the weights that are tested are those with
the best kNN on validation images; probes with a part of the labels choose their rate with all validation labels; what
is left of an epoch after its last whole batch is dropped.
--batch_size is per process: N processes do what one does with the joined batch. But MoCo's running statistics are the
first one's; and with --chunk batch norm sees a chunk at a time. In MoCo the gradient comes from one view of each image,
in the others from both.

Shapes: B batch of a process, N images in a loss, of two views each (n views at hand), C channels or features (D in
VICReg's loss), K keys in the queue; images are (B, 3, S, S), uint8 until augmented.

[1] Chen et al. 2020, SimCLR, arXiv 2002.05709v3        [2] He et al. 2019, MoCo, arXiv 1911.05722v3
[3] Chen et al. 2020, MoCo v2, arXiv 2003.04297v1       [4] Bardes et al. 2021, VICReg, arXiv 2105.04906v3
[5] You et al. 2017, LARS, arXiv 1708.03888v3           [6] Gao et al. 2021, Gradient cache, arXiv 2101.06983v2
[7] Wang and Isola 2020, arXiv 2005.10242v10            [8] He et al. 2015, Residual learning, 1512.03385v1
"""

import argparse, contextlib, copy, dataclasses, functools, gc, hashlib, inspect, json, math, os, re, signal, struct
import sys, tarfile, time, typing, zlib
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
    full_train: bool = False  # learn from all validation images too, without their labels; probes stay as they are
    # augmentation: each view draws its own
    augment: str = "full"  # full, or crop_flip: colours stay, and give away which views belong together
    crop_min: float | None = None  # least share of the area that a view shows; None: 0.2, 0.4 for shapes
    jitter: float | None = None  # s: brightness, contrast, saturation × (1 ± .8 s), hue ± 72° s; None: 0.5, shapes 1
    grey: float | None = None  # probability that a view loses its colours; None: 0.2, 0.8 for shapes
    blur: float = 0.0  # probability that it is blurred; [1] §A has 0.5, its §B.9 none for CIFAR-10
    show_augment: bool = False  # write augment.png, a sheet of pairs of views, and train nothing
    # model
    encoder: str = "resnet18"  # resnet18 with CIFAR's stem, or vit, in patches of 4 × 4 pixels
    width: int | None = None  # channels of the first of four stages (None: 16; [8] has 64); of a vit (None: 192)
    depth: int = 6  # blocks of a vit
    head_dim: int | None = None  # numbers that the loss sees; None: 128, or 512 for vicreg, whose authors have 8192
    init: str | None = None  # a checkpoint to start from its encoder: this script's or, for --encoder vit, any other's
    # objective
    loss: str = "simclr"  # simclr, moco or vicreg
    temperature: float = 0.2  # cosines are divided by it: 0.2 in [3]; for CIFAR-10 0.5 in [1] §B.9, 0.1 in [3]'s code
    chunk: int = 0  # images encoded at once (simclr, vicreg): less memory, one more forward pass; 0: all of a batch
    queue: int = 4096  # moco's keys, a multiple of a step's images, well below all images; [2]: 65536 for ImageNet
    momentum: float = 0.99  # of moco's key encoder; [2] has 0.999 for ImageNet
    bn_splits: int = 4  # parts of moco's batch, each standardised on its own, as on so many GPUs; [3]'s code: 8 of 512
    invariance: float = 25.0  # vicreg: weight of the views' distance [4] §4.2
    variance: float = 25.0  # vicreg: weight of what standard deviations lack of 1; 0 lets features collapse
    covariance: float = 1.0  # vicreg: weight of covariances; 0 lets dimensions say the same
    # optimiser
    optimizer: str = "adamw"  # adamw, which is quick; sgd with momentum 0.9; lars, for large batches
    lr: float | None = None  # peak learning rate; None: .002 (adamw), images of a step / 256 × .06 (sgd) or .3 (lars)
    weight_decay: float | None = None  # on weights alone; None: .05 (adamw), 5e-4 (sgd), 1e-6 (lars)
    warmup: int = 50  # steps of linear warm-up
    batch_size: int = 64  # images, of two views each, per process
    # evaluation
    probe_images: int = 4000  # training images that kNN and the probe are fitted on during the run; at its end, all
    # run
    epochs: float = 5  # passes over the training images
    steps: int | None = None  # updates of the parameters, instead of epochs
    stop_at: int | None = None  # end at this step, the schedule unchanged
    eval_every: int | None = None  # steps between evaluations, each followed by a checkpoint; None: four in a run
    log_every: int = 10  # steps between log lines
    seed: int = 0  # of initial weights, batches and views
    out: str = "out/simclr"  # the run's folder
    resume: bool = False  # go on from out/ckpt.pt, with that run's flags where none are given
    device: str = "auto"  # auto (cuda, then mps, then cpu), or a torch device
    dtype: str = "auto"  # float32 or bfloat16; auto: bfloat16 where the hardware multiplies matrices in it
    compile: bool = False  # torch.compile: a wait at first (it needs a C++ compiler on a CPU), then faster steps

    def __post_init__(self):
        batch = self.batch_size * int(os.environ.get("WORLD_SIZE", 1))  # images of a step
        known = dict(augment=("full", "crop_flip"), encoder=("resnet18", "vit"), loss=("simclr", "moco", "vicreg"),
                     optimizer=("adamw", "sgd", "lars"), dtype=("auto", "float32", "bfloat16"))
        may_be_0 = ("jitter", "grey", "blur", "chunk", "momentum", "invariance", "variance", "covariance",
                    "weight_decay", "warmup", "seed")
        for name, value in vars(self).items():
            most = {"jitter": 1.25, "momentum": 1}.get(name, sys.maxsize)
            most = 1 if name in ("labels", "crop_min", "grey", "blur") else most
            if value == "" or name in known and value not in known[name]:
                raise UserError(f"--{name} {value!r}: want {' or '.join(known.get(name, ['some text']))}")
            if type(value) in (int, float) and not (0 < value <= most or value == 0 and name in may_be_0):
                up_to = f", at most {most}" if most < sys.maxsize else ""
                raise UserError(f"--{name} {value}: want a number {'from' if name in may_be_0 else 'above'} 0{up_to}")
        if self.data not in ("shapes", "cifar10") and not (Path(self.data) / "cifar-10-batches-bin").is_dir():
            raise UserError(f"--data {self.data}: want shapes, cifar10, or a folder that holds cifar-10-batches-bin/")
        self.width = self.width or WIDTHS[self.encoder]
        self.head_dim = self.head_dim or {"simclr": 128, "moco": 128, "vicreg": 512}[self.loss]
        # a shape's colours tell it from other images and say nothing of its class: the more they vary, the less an
        # encoder can get by on them ([1] Figure 6); [1] §A has .08, 1 and .2, §B.9 for CIFAR-10 s = .5
        strength = (0.4, 1.0, 0.8) if self.data == "shapes" else (0.2, 0.5, 0.2)
        for name, default in zip(("crop_min", "jitter", "grey"), strength):
            setattr(self, name, default if getattr(self, name) is None else getattr(self, name))
        rate, decay = {"adamw": (2e-3, 0.05), "sgd": (0.06 * batch / 256, 5e-4), "lars": (0.3 * batch / 256, 1e-6)}[
            self.optimizer]  # in proportion to the batch: twice the rate of [3]'s code for CIFAR-10; [1] §2.3
        self.lr = rate if self.lr is None else self.lr
        self.weight_decay = decay if self.weight_decay is None else self.weight_decay
        moco, world = self.loss == "moco", batch // self.batch_size
        clashes = {
            "--resume goes on from --out and --init starts anew: give one of them": self.resume and self.init,
            f"--init {self.init}: no such file": self.init and not Path(self.init).is_file(),
            f"--batch_size {self.batch_size}: an image alone has nothing to be unlike; want 2 or more":
                self.batch_size < 2,
            f"--width {self.width}: want a multiple of 8" + " and, from 64 on, of 64" * (self.encoder == "vit"):
                not self.resume and (  # then it is the checkpoint's, which may be ijepa.py's 96
                    self.width % 8 or self.encoder == "vit" and self.width > 64 and self.width % 64),
            f"--chunk {self.chunk} is for simclr and vicreg: moco's loss needs no large batch": moco and self.chunk,
            f"--chunk {self.chunk}: want 2 or more, and a divisor of --batch_size {self.batch_size}":
                self.chunk and (self.chunk < 2 or self.batch_size % self.chunk),
            f"--queue {self.queue} is no multiple of the {batch} images of a step": moco and self.queue % batch,
            f"--bn_splits {self.bn_splits}: want 1, or a multiple of the {world} processes that cuts the {batch} "
            "images of a step into equal parts, of 2 or more": moco and self.bn_splits > 1 and (
                self.bn_splits % world or batch % self.bn_splits or batch < 2 * self.bn_splits)}
        for message, clash in clashes.items():
            if clash:
                raise UserError(message)


# ---- two views: on the device, in batches, each view its own -------------------------------------------------------

def crop_boxes(rng, n, size, least):
    """Boxes (4, n) in a square image, in whole pixels: top, left, height, width. The area is least to 1 of all, width
    over height 3/4 to 4/3, log-uniform; of ten draws the first that fits, else the whole image: as in torchvision.
    """
    area, aspect = size**2 * rng.uniform(least, 1, (10, n)), (4 / 3) ** rng.uniform(-1, 1, (10, n))
    height, width = (np.maximum(1, np.sqrt(v).round()) for v in (area / aspect, area * aspect))  # (10, n)
    fits = (height <= size) & (width <= size)
    first = fits.argmax(axis=0), np.arange(n)
    height, width = (np.where(fits.any(axis=0), v[first], size) for v in (height, width))  # (n,)
    top, left = (np.floor(rng.random(n) * (size + 1 - v)) for v in (height, width))
    return np.stack((top, left, height, width)).astype(np.float32)


def crop_resize(x, boxes, mirror):
    """What boxes (4, n) hold of images x (n, C, S, S), resized to S × S, and mirrored where mirror (n,) is True."""
    S = x.size(3)
    at = (torch.arange(S, device=x.device) + 0.5) / S  # (S,): a pixel's centre, as a share of the box
    top, left, height, width = boxes[:, :, None]  # (n, 1) each
    rows = (top + at * height - 0.5).clamp(top, top + height - 1)  # (n, S): nothing from outside the box
    columns = (left + at * width - 0.5).clamp(left, left + width - 1)
    columns = torch.where(mirror[:, None], columns.flip(1), columns)
    grid = torch.stack((columns[:, None, :].expand(-1, S, S), rows[:, :, None].expand(-1, S, S)), dim=3)
    grid = (2 * grid + 1) / S - 1  # (n, S, S, 2); grid_sample counts from -1 to 1, from edge to edge
    return F.grid_sample(x, grid, align_corners=False)


def grey(x):
    """(n, 3, H, W) -> (n, 1, H, W): luma of ITU-R BT.601."""
    return (x * torch.tensor([0.299, 0.587, 0.114], device=x.device)[:, None, None]).sum(dim=1, keepdim=True)


def rgb_to_hsv(x):
    """(n, 3, H, W), 0 to 1: red, green, blue -> hue in turns from red through green to blue, saturation, value."""
    r, g, b = x.unbind(1)
    value = x.amax(dim=1)
    chroma = value - x.amin(dim=1)
    c = torch.where(chroma > 0, chroma, 1)  # of a grey pixel the hue is 0
    hue = torch.where(value == r, (g - b) / c % 6, torch.where(value == g, (b - r) / c + 2, (r - g) / c + 4)) / 6
    return torch.stack((hue, chroma / torch.where(value > 0, value, 1), value), dim=1)


def hsv_to_rgb(x):
    """The way back. A channel is value where the hue is within a sixth of a turn of the channel's own, falls over the
    next sixth, and is (1 - saturation) · value beyond."""
    hue, saturation, value = (v[:, None] for v in x.unbind(1))  # (n, 1, H, W) each
    k = (6 * hue + torch.tensor([5, 3, 1], device=x.device)[:, None, None]) % 6  # (n, 3, H, W)
    return value * (1 - saturation * torch.minimum(k, 4 - k).clamp(0, 1))


def turn_hue(x, turns):
    """Images x (n, 3, H, W) with hues turned by turns (n, 1, 1, 1): 1/3 makes red green."""
    hue, saturation, value = rgb_to_hsv(x).unbind(1)
    return hsv_to_rgb(torch.stack(((hue + turns[:, 0]) % 1, saturation, value), dim=1))


JITTER = (  # functions of x (n, 3, H, W), 0 to 1, and f (n, 1, 1, 1): a factor, of which 1 changes nothing, or turns
    lambda x, f: x * f,  # brightness
    lambda x, f: grey(x).mean(dim=(2, 3), keepdim=True) * (1 - f) + x * f,  # contrast
    lambda x, f: grey(x) * (1 - f) + x * f,  # saturation
    turn_hue)


def colour_jitter(x, factors, order):
    """JITTER's four changes of images x (n, 3, H, W), 0 to 1, with factors (n, 4), one after the other in the order
    (n, 4) of each image, a NumPy array that counts in JITTER; -1 changes nothing. In place; returns x."""
    for place in order.T:
        for kind in set(place.tolist()) - {-1}:
            rows = torch.from_numpy(np.flatnonzero(place == kind)).to(x.device)
            x[rows] = JITTER[kind](x[rows], factors[rows, kind, None, None, None]).clamp(0, 1)
    return x


def gaussian_blur(x, sigma):
    """Images x (n, C, S, S) convolved with a Gaussian of sigma (n,) pixels, cut off at a tenth of the side in all
    ([1] §A): 3 × 3 pixels of 32."""
    n, C, S, _ = x.shape
    reach = max(1, S // 20)
    t = torch.arange(-reach, reach + 1, device=x.device)
    kernel = (-(t**2) / (2 * sigma[:, None] ** 2).clamp(min=1e-6)).softmax(dim=1)  # (n, taps)
    kernel = kernel.repeat_interleave(C, 0)
    x = F.pad(x.reshape(1, n * C, S, S), [reach] * 4, mode="reflect")  # each image's channel a group of its own
    x = F.conv2d(F.conv2d(x, kernel[:, None, :, None], groups=n * C), kernel[:, None, None, :], groups=n * C)
    return x.view(n, C, S, S)


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


def views(c, images, step, batch, at):
    """The views numbered at (n,) of the 2 · batch of a step, normalised: (n, 3, S, S). View i shows image i % batch.

    images (N, 3, S, S) are uint8. A view depends on (seed, step, batch, i) alone: any process can make any of them.
    """
    n, rng = 2 * batch, np.random.default_rng((c.seed, 2, step))
    boxes, mirror = crop_boxes(rng, n, images.size(3), c.crop_min)[:, at], rng.random(n)[at] < 0.5
    most = c.jitter * np.array((0.8, 0.8, 0.8, 0.2))  # [1] §A; s = 0.5 for CIFAR-10, §B.9: .4, .4, .4, .1
    factors = ((1, 1, 1, 0) + most * rng.uniform(-1, 1, (n, 4)))[at].astype(np.float32)
    order = rng.permuted(np.tile(np.arange(4), (n, 1)), axis=1)[at]
    jittered, greyed, blurred = (rng.random((3, n)) < [[0.8], [c.grey], [c.blur]])[:, at]
    sigma = rng.uniform(0.1, 2, n)[at].astype(np.float32)
    order[~jittered] = -1
    index = batch_index(len(images), batch, c.seed, step, 0, 1)[0][at % batch]
    index, boxes, mirror, factors, greyed, sigma = (torch.from_numpy(a).to(images.device)
                                                    for a in (index, boxes, mirror, factors, greyed, sigma))
    x = crop_resize(images[index] / 255, boxes, mirror)
    if c.augment == "full":
        x = colour_jitter(x, factors, order)
        x = torch.where(greyed[:, None, None, None], grey(x), x)
        rows = torch.from_numpy(np.flatnonzero(blurred)).to(x.device)
        if len(rows):
            x[rows] = gaussian_blur(x[rows], sigma[rows])
    return normalise(255 * x, CIFAR10_STATS).contiguous(memory_format=torch.channels_last)


# ---- objectives: what keeps vectors apart --------------------------------------------------------------------------

class Gather(torch.autograd.Function):
    """The rows of all processes, (N, C) -> (world · N, C), with a gradient: backward sums, over processes, what each
    one's loss asks of our rows. DistributedDataParallel then averages, and that is the joined loss's gradient. With
    torch.distributed.all_gather, which has none, a view would learn as a query, never as another's candidate."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # all_reduce writes into it
        torch.distributed.all_reduce(gradient)
        return gradient.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]


def process():
    """(rank, number of processes): (0, 1) unless a group was started."""
    started = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if started else (0, 1)


def gather(x):
    """The rows of all processes, where there are several."""
    return Gather.apply(x) if process()[1] > 1 else x


def at_least_fp32(v):
    """A half-precision tensor in fp32; anything else as it is."""
    return v.float() if isinstance(v, torch.Tensor) and v.dtype in (torch.bfloat16, torch.float16) else v


def in_fp32(loss):
    """A loss that computes in fp32 or double, whatever it is given and autocast says: dividing by a small temperature
    before the exponential magnifies what rounding has lost, and bfloat16 keeps 7 bits of a fraction. On CUDA factors
    of matrix products are rounded to TF32's 10, but their sums are in fp32: see pick_device."""
    @functools.wraps(loss)
    def wrapped(*args, **more):
        args, more = [at_least_fp32(v) for v in args], {k: at_least_fp32(v) for k, v in more.items()}
        device = next(v.device for v in (*args, *more.values()) if isinstance(v, torch.Tensor))
        with torch.autocast(device.type, enabled=False):
            return loss(*args, **more)
    return wrapped


@in_fp32
def nt_xent(z1, z2, temperature):
    """SimCLR's loss of vectors z1, z2 (N, C) of N images' two views: each of the 2N has to find its image's other view
    among the 2N - 1 others, by cosine.

    [1] eq. 1 and Algorithm 1, the mean over both directions. In several processes candidates come from all, and the
    mean of their losses is the joined batch's. Returns the loss and accuracy, the share of views that found theirs.
    """
    z, (rank, _) = F.normalize(torch.cat((z1, z2)), dim=1), process()
    n = len(z)  # 2N
    logits = z @ gather(z).T / temperature  # (2N, 2N · world)
    own = rank * n + torch.arange(n, device=z.device)  # the column of each row's view itself, which is no candidate
    logits = logits.scatter(1, own[:, None], -math.inf)
    target = rank * n + (torch.arange(n, device=z.device) + n // 2) % n  # the column of the image's other view
    return F.cross_entropy(logits, target), dict(accuracy=(logits.argmax(1) == target).float().mean())


@in_fp32
def moco_loss(q, k, queue, temperature):
    """MoCo's: each query q[i] has to find its key k[i] among that and the K keys of the queue. Rows of q and k (N, C)
    and queue (K, C) have length 1.

    [2] eq. 1; its temperature is 0.07, [3]'s 0.2. No gradient reaches the keys. Returns as nt_xent does.
    """
    positive = (q * k.detach()).sum(dim=1, keepdim=True)  # (N, 1)
    logits = torch.cat((positive, q @ queue.detach().T), dim=1) / temperature  # (N, 1 + K)
    target = torch.zeros(len(q), dtype=torch.long, device=q.device)
    found = logits[:, 0] > logits[:, 1:].amax(dim=1)  # not where all are equal, after a collapse
    return F.cross_entropy(logits, target), dict(accuracy=found.float().mean())


@in_fp32
def vicreg_loss(z1, z2, invariance=25.0, variance=25.0, covariance=1.0):
    """VICReg's: the squared distance of z1 and z2 (N, D), how far each dimension's standard deviation is below 1
    (a hinge), and the squared covariances of any two dimensions. No two images are compared. Returns the loss and its
    three terms.

    As the authors' code, github.com/facebookresearch/vicreg: the distance is the mean over all elements, where
    [4] eq. 5 sums over D; the hinge is the views' mean, where eq. 6 sums the two. The weights belong to this form.
    """
    distance, hinge, off_diagonal = F.mse_loss(z1, z2), 0, 0
    for z in (gather(z1), gather(z2)):  # statistics of the joined batch
        N, D = z.shape
        z = z - z.mean(dim=0)
        # 1e-4 inside the root: where a dimension has collapsed, the root's slope would be infinite ([4] eq. 2)
        hinge = hinge + F.relu(1 - (z.var(dim=0) + 1e-4).sqrt()).mean() / 2  # eq. 1
        cov = z.T @ z / (N - 1)  # (D, D), eq. 3
        off_diagonal = off_diagonal + (cov - cov.diagonal().diag()).square().sum() / D  # eq. 4
    loss = invariance * distance + variance * hinge + covariance * off_diagonal
    return loss, dict(invariance=distance.detach(), variance=hinge.detach(), covariance=off_diagonal.detach())


# ---- batch norm: whose statistics? ---------------------------------------------------------------------------------

class BatchNorm(nn.BatchNorm2d):
    """Batch norm of (B, C) and (B, C, H, W): in SimCLR and VICReg with statistics of all processes' images, as one
    with the joined batch has ([1] §2.2), in MoCo with those of each of splits parts of the batch.

    It makes a vector depend on the images that were standardised with it. Where a query shares these with its key, and
    with no key of the queue, it can find its key by that instead of by what they show, and the loss falls while
    features get worse ([2] §3.3). So MoCo's keys are shuffled: query and key are standardised among different images,
    in parts that stand for [2]'s GPUs. SimCLR's candidates all share one set of statistics; --chunk's parts have one
    each, but hold any views, so that a view's partner is in its part no oftener than others. VICReg compares no images.

    Running statistics, for evaluation, move only where a gradient will follow: not in --chunk's first pass, nor in
    MoCo's key network, which is never evaluated.
    """

    splits = 1  # parts of a process's batch; 0: statistics over all processes' images

    def forward(self, x):
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        running = (self.running_mean, self.running_var) if torch.is_grad_enabled() else (None, None)
        if self.splits or process()[1] == 1:
            momentum = self.momentum / max(1, self.splits)  # all parts move them about as far as a whole batch would
            parts = [F.batch_norm(part, *running, self.weight, self.bias, True, momentum, self.eps)
                     for part in (x.chunk(self.splits) if self.splits > 1 else [x])]
            return torch.cat(parts) if len(parts) > 1 else parts[0]
        dims, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
        y = at_least_fp32(x)
        mean = gather(y.mean(dims)[None]).mean(0)  # (C,)
        centred = y - mean.view(shape)
        var = gather(centred.square().mean(dims)[None]).mean(0)
        if running[0] is not None:
            n = x.numel() // x.size(1) * process()[1]
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_var.lerp_(var.detach() * n / (n - 1), self.momentum)
        return (centred * ((var + self.eps).rsqrt() * self.weight).view(shape) + self.bias.view(shape)).type_as(x)


# ---- encoders ------------------------------------------------------------------------------------------------------

def conv(C_in, C_out, size, stride=1, groups=1):
    """A convolution that keeps height and width (divided by stride). No bias: the norm behind it has one."""
    return nn.Conv2d(C_in, C_out, size, stride, padding=size // 2, groups=groups, bias=False)


class ShortcutBlock(nn.Module):
    """relu(x + F(x)), F two 3×3 convolutions with batch norm ([8] Figure 5 left)."""

    def __init__(self, C_in, C, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(C_in, C, 3, stride), BatchNorm(C)
        self.conv2, self.bn2 = conv(C, C, 3), BatchNorm(C)
        self.downsample = nn.Sequential(conv(C_in, C, 1, stride), BatchNorm(C)) if C_in != C else nn.Identity()

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))  # (B, C, H / stride, W / stride)
        return F.relu(self.downsample(x) + self.bn2(self.conv2(y)))


class ConvEncoder(nn.Module):
    """ResNet-18 without its last layer, in torchvision's names: (B, 3, H, W) -> (B, 8 · width).

    CIFAR's stem is one 3×3 convolution ([1] §B.9): ImageNet's 7×7 with stride 2 and a max-pool would leave 8 × 8
    pixels of 32 × 32 before the first block.
    """

    def __init__(self, width=64):
        super().__init__()
        self.settings, self.dim = dict(width=width), 8 * width
        self.conv1, self.bn1, C = conv(3, width, 3), BatchNorm(width), width
        for i in range(4):
            blocks = [ShortcutBlock(C, width << i, 1 if i == 0 else 2), ShortcutBlock(width << i, width << i, 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            C = width << i
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # keeps the gradient's variance through a ReLU (arXiv 1502.01852v1)
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))  # (B, width, H, W)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (B, 8 · width, H / 8, W / 8)
        return x.mean(dim=(2, 3))


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


class PatchEncoder(nn.Module):
    """A vision transformer without its last layer, in timm's names: (B, 3, image_size, image_size) -> (B, dim), the
    mean of the patches after the last norm, or with pool="cls" the class token's vector. Positions are fixed."""

    def __init__(self, image_size, patch_size, dim, depth, heads, pool="mean"):
        super().__init__()
        self.settings = dict(image_size=image_size, patch_size=patch_size, dim=dim, depth=depth, heads=heads,
                             pool=pool)
        self.dim, self.first = dim, int(pool == "cls")
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(init_transformer)
        if self.first:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        table = F.pad(sincos_2d(dim, image_size // patch_size), (0, 0, self.first, 0))
        self.pos_embed = nn.Parameter(table[None], requires_grad=False)  # (1, N, C)

    def forward(self, x):
        x = self.patch_embed(x)  # (B, N, C)
        if self.first:
            x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x[:, 0] if self.first else x.mean(dim=1)


# ---- encoder, head, and moco's second pair of them -----------------------------------------------------------------

def make_head(loss, C, dim):
    """The head: of features (N, C) it makes the vectors (N, dim) that the loss compares; each paper has its own."""
    if loss == "moco":  # [3] §3
        return nn.Sequential(nn.Linear(C, C), nn.ReLU(), nn.Linear(C, dim))
    if loss == "simclr":  # [1] §2.1; its code adds the batch norms, the last without a shift
        head = nn.Sequential(nn.Linear(C, C, bias=False), BatchNorm(C), nn.ReLU(), nn.Linear(C, dim, bias=False),
                             BatchNorm(dim))
        head[-1].bias.requires_grad_(False)
        return head
    layers = []  # VICReg's expander [4] §4.2
    for width in (C, dim):
        layers += [nn.Linear(width, dim), BatchNorm(dim), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(dim, dim, bias=False))


class Contrastive(nn.Module):
    """Images (B, 3, H, W) -> vectors for the loss (B, head_dim). The features are the encoder's, never the head's.

    For moco also key_encoder and key_head, which follow slowly, and the queue (K, head_dim) of keys that they made.
    """

    def __init__(self, encoder, loss, head_dim, queue):
        super().__init__()
        self.settings = dict(encoder=encoder.settings, loss=loss, head_dim=head_dim, queue=queue)
        self.encoder, self.head = encoder, make_head(loss, encoder.dim, head_dim)
        if loss == "moco":
            self.key_encoder, self.key_head = (copy.deepcopy(m).requires_grad_(False) for m in (encoder, self.head))
            self.register_buffer("queue", F.normalize(torch.randn(queue, head_dim), dim=1))

    def forward(self, x, passes=1):
        """passes: parts of the batch that are encoded one after the other, each with statistics of its own."""
        z = [self.head(self.encoder(part)) for part in x.chunk(passes)]
        return torch.cat(z) if passes > 1 else z[0]

    @torch.no_grad()
    def keys(self, x):
        """Keys (B, head_dim) of length 1."""
        return F.normalize(at_least_fp32(self.key_head(self.key_encoder(x))), dim=1)

    @torch.no_grad()
    def follow(self, momentum):
        """The key network's weights move a little towards the others ([2] eq. 2)."""
        for ours, other in ((self.key_encoder, self.encoder), (self.key_head, self.head)):
            for k, q in zip(ours.parameters(), other.parameters()):
                k.mul_(momentum).add_(q * (1 - momentum))

    @torch.no_grad()
    def enqueue(self, keys, step):
        """Put a step's keys, of all processes (batch, head_dim), in place of the oldest: the queue is a ring, and
        batch divides its length."""
        start = step * len(keys) % len(self.queue)
        self.queue[start:start + len(keys)] = keys


WIDTHS = dict(resnet18=16, vit=192)  # unless --width says otherwise


def make_encoder(settings):
    """An encoder with fresh weights from its own settings, or from those of vit.py's, mae.py's or ijepa.py's."""
    known = {k: v for k, v in settings.items() if k in inspect.signature(PatchEncoder).parameters}
    return ConvEncoder(settings["width"]) if "width" in settings else PatchEncoder(**known)


def load_encoder(c):
    """The encoder that the flags ask for, or that of the checkpoint of --resume or --init; c then says what it is."""
    path = f"{c.out}/ckpt.pt" if c.resume else c.init
    if not path:
        return make_encoder(dict(width=c.width) if c.encoder == "resnet18" else dict(
            image_size=32, patch_size=4, dim=c.width, depth=c.depth, heads=max(1, c.width // 64)))
    saved = load_checkpoint(path)
    if "encoder" not in saved:
        raise UserError(f"{path} holds no encoder: want a checkpoint of this script, vit.py, mae.py or ijepa.py")
    with one_line(f"{path} holds an encoder that this script can't go on with"):
        encoder = make_encoder(saved["encoder_config"])
        encoder.load_state_dict(saved["encoder"])
    kind, has = "resnet18" if isinstance(encoder, ConvEncoder) else "vit", encoder.settings
    if has.get("image_size", 32) != 32:
        raise UserError(f"{path} is for images of {has['image_size']} pixels, want 32")
    for name, default, value in (("encoder", None, kind), ("width", WIDTHS[kind], has.get("width", encoder.dim)),
                                 ("depth", Config.depth, has.get("depth", c.depth))):
        if getattr(c, name) != value and (c.resume or getattr(c, name) != default):
            raise UserError(f"--{name} {getattr(c, name)}, but {path} has {value}")
        setattr(c, name, value)
    return encoder


# ---- optimisers, and a step ----------------------------------------------------------------------------------------

class LARS(torch.optim.Optimizer):
    """SGD with momentum, each tensor's gradient rescaled to the same fraction of the weights' own length: large batches
    want high rates, at which layers of small weights and large gradients would diverge ([5] §4, as [1]'s code has it).

    Each tensor's gradient, with decay, is scaled by trust · |weights| / |gradient|; that of 1-D tensors is not. [5]
    divides by the sum of the gradient's and the decay's norms instead of by the norm of their sum.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, trust=1e-3):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                g = p.grad.add(p, alpha=group["weight_decay"])
                if p.dim() > 1:
                    ratio = group["trust"] * p.norm() / g.norm()
                    g = g * torch.where((ratio > 0) & ratio.isfinite(), ratio, 1.0)  # either norm may be 0
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                v = self.state[p]["momentum_buffer"]
                p.sub_(v.mul_(group["momentum"]).add_(g * group["lr"]))


def make_optimizer(model, c):
    """--optimizer for what is to be trained: weights of layers, which decay, and biases, norms and tokens."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in trained if p.dim() > 1 and not name.endswith("_token")]
    others = [p for name, p in trained if p.dim() == 1 or name.endswith("_token")]
    groups = [dict(params=decayed, weight_decay=c.weight_decay), dict(params=others, weight_decay=0.0)]
    if c.optimizer == "adamw":
        return torch.optim.AdamW(groups, c.lr, fused=True)  # one pass over memory per parameter
    return LARS(groups, c.lr) if c.optimizer == "lars" else torch.optim.SGD(groups, c.lr, momentum=0.9)


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


def loss_backward(encode, x, c, last=lambda: None):
    """Loss and scores of a batch's views x (2B, 3, S, S), the first of all images, then the second, and its gradient.

    encode(views) -> (n, C) has the parameters. With --chunk the loss is still that of all B images, but activations
    are kept for a chunk of them at a time ([6] §3): encode all without a gradient; take the loss's gradient with
    regard to the vectors; encode each chunk again and pass its share of that on. last is called before the last passes.
    """
    def loss_of(z):
        z1, z2 = z.chunk(2)
        return (nt_xent(z1, z2, c.temperature) if c.loss == "simclr" else
                vicreg_loss(z1, z2, c.invariance, c.variance, c.covariance))

    if not c.chunk:
        last()
        loss, scores = loss_of(encode(x))
        loss.backward()
        return loss, scores
    # batch norm sees a chunk at a time. SimCLR's are of any views, else it could tell a pair by its chunk's statistics
    order = (torch.randperm(len(x), generator=torch.Generator().manual_seed(0)) if c.loss == "simclr" else
             torch.arange(len(x)).view(2, -1, c.chunk).transpose(0, 1).flatten())  # VICReg's: both views of some images
    chunks = order.split(2 * c.chunk)
    with torch.no_grad():
        z = at_least_fp32(torch.cat([encode(x[rows]) for rows in chunks]))
    z = z[order.argsort()].requires_grad_()  # (2B, C), in x's order
    loss, scores = loss_of(z)
    loss.backward()
    for rows in chunks:
        if rows is chunks[-1]:
            last()
        (at_least_fp32(encode(x[rows])) * z.grad[rows]).sum().backward()  # passes dL/dz, held fixed, on to parameters
    return loss, scores


def contrastive_step(model, raw, optimizer, autocast, images, c, step, steps, rank, world):
    """One update of the parameters; returns {name: value} of the batch's loss and scores, on the device.

    model is raw, compiled or wrapped for several processes where that is asked for: gradients go through model, MoCo's
    keys and queue through raw. N processes do what one does with the joined batch.
    """
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, c.lr, c.warmup, steps)
    batch, own = c.batch_size * world, rank * c.batch_size + np.arange(c.batch_size)
    if c.loss == "moco":
        raw.follow(c.momentum)  # before the keys are made
        # any process can make any view: so the shuffle of [2] §3.3 needs no exchange of images
        order = np.random.default_rng((c.seed, 3, step)).permutation(batch)
        x1, x2 = (views(c, images, step, batch, at) for at in (own, batch + order[own]))
        with autocast:
            keys, q = raw.keys(x2), model(x1)  # (B, C) each
        keys = gather(keys)[torch.from_numpy(order.argsort()).to(keys.device)]  # (batch, C), back in order
        loss, scores = moco_loss(F.normalize(at_least_fp32(q), dim=1), keys[own], raw.queue, c.temperature)
        loss.backward()
        raw.enqueue(keys, step)  # now: a key is no negative of its own query
    else:
        def encode(x):
            with autocast:  # [1]'s code encodes both views in one batch, VICReg's one after the other
                return model(x, passes=1 if c.loss == "simclr" else 2)

        def synchronise(on):  # DistributedDataParallel exchanges gradients in the last backward pass alone
            if world > 1:
                model.require_backward_grad_sync = on

        synchronise(False)
        x = views(c, images, step, batch, np.concatenate((own, batch + own)))
        loss, scores = loss_backward(encode, x, c, lambda: synchronise(True))
    optimizer.step()
    optimizer.zero_grad()
    return {"loss": loss.detach(), **scores}


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


def alignment_and_uniformity(z1, z2):
    """How far apart two views' vectors (N, C) are, squared, and how evenly all lie on the sphere: the log of the mean
    of exp(-2 · squared distance) over pairs of images ([7] §4.1). Less is better; collapse gives 0 and 0."""
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    uniformity = [F.pdist(z.cpu()).square().mul(-2).exp().mean().log().item() for z in (z1, z2)]
    return (z1 - z2).square().sum(dim=1).mean().item(), sum(uniformity) / 2


@torch.no_grad()
def evaluate(model, train, val, c, autocast):
    """What probes make of the encoder's features, the probe's rate chosen on val too: a look during the run, no more.
    And of the head's vectors, which the loss sees, for views of validation images: alignment, uniformity, spread."""
    model.eval()
    few, n = [t[:c.probe_images] for t in train], min(500, len(val[0]))
    encoders = {"ours": as_encode(model.encoder)}
    scores = probe_encoders(encoders, CIFAR10_STATS, few, val, val, (1.0,), autocast)["ours"]
    x = views(c, val[0], 0, n, np.arange(2 * n))
    with autocast:
        z1, z2 = model(x).float().chunk(2)
    alignment, uniformity = alignment_and_uniformity(z1, z2)
    return scores | dict(alignment=alignment, uniformity=uniformity, head_std=spread(z1))


def as_encode(encoder):
    """The encoder as probes want it: a function of normalised images."""
    return lambda x: encoder(x.contiguous(memory_format=torch.channels_last))


# ---- data ----------------------------------------------------------------------------------------------------------

CIFAR10 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "md5:c32a1d4ab5d03f1284b67883e8d87530"
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
CIFAR10_STATS = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # mean and std of a channel over all pixels

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


# ---- train ---------------------------------------------------------------------------------------------------------

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


def load_pair(c):
    """The network that the flags ask for, and its encoder as it was before it had learned anything."""
    torch.manual_seed(c.seed)  # the same initial weights on every rank
    model = Contrastive(load_encoder(c), c.loss, c.head_dim, c.queue)
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.splits = c.bn_splits // process()[1] if c.loss == "moco" and c.bn_splits > 1 else 0
    torch.manual_seed(c.seed)
    return model, make_encoder(model.encoder.settings).eval()


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
    raw, fresh = (m.to(device, memory_format=torch.channels_last) for m in load_pair(c))
    if local == 0 and world > 1:
        torch.distributed.barrier()
    train_split, val, test = [[t.to(device) for t in split] for split in splits]  # uint8, all on the device
    images = torch.cat((train_split[0], val[0])) if c.full_train else train_split[0]
    optimizer = make_optimizer(raw, c)
    if saved:
        with one_line(f"{c.out}/ckpt.pt can't be resumed"):
            if saved["config"]["optimizer"] != c.optimizer:
                raise UserError(f"--optimizer {c.optimizer}, but {c.out}/ckpt.pt has {saved['config']['optimizer']}")
            raw.load_state_dict(saved["model"])
            load_optimizers([optimizer], saved["optimizer"])
    model = torch.compile(raw) if c.compile else raw  # raw, not compiled, is what is evaluated and saved
    if world > 1:
        model = nn.parallel.DistributedDataParallel(model)
    batch = c.batch_size * world
    if batch > len(images):  # else an image would stand in its own batch twice, as its own negative
        raise UserError(f"--batch_size {c.batch_size}: {batch} images in a step, but only {len(images)} to train on")
    per_epoch = len(images) // batch
    steps = c.steps or math.ceil(c.epochs * per_epoch)
    run = RunFolder(c, saved, writes=rank == 0)
    if rank == 0:
        print(" ".join(f"{name}={value!r}" for name, value in dataclasses.asdict(c).items()))
        print(f"{sum(p.numel() for p in raw.encoder.parameters()):,} parameters in the encoder, "
              f"{sum(p.numel() for p in raw.head.parameters()):,} in the head | {len(images):,} images to train on | "
              f"{steps} steps of {batch} | {device} {dtype}", flush=True)
        if c.loss == "moco" and c.queue + batch > len(images):
            print(f"--queue {c.queue}: of {len(images):,} images, so a query's own image is among its negatives")
    yardsticks, few = dict(random_init=as_encode(fresh), pixels=lambda x: x.flatten(1)), c.probe_images
    beside = {f"{key}_{name}": scores[key] for name, scores in probe_encoders(
        yardsticks, CIFAR10_STATS, [t[:few] for t in train_split], val, val, (1.0,), autocast, dimensions=False).items()
        for key in ("knn", "linear")}

    def save(name):
        run.save(name, raw, model_config=raw.settings, optimizer=[optimizer.state_dict()],
                 encoder=raw.encoder.state_dict(), encoder_config=raw.encoder.settings)

    resumed_at, end = run.step if saved else None, min(steps, c.stop_at or steps)
    every = c.eval_every or math.ceil(steps / 4)
    clock, logged, pending, stop = time.perf_counter(), run.seconds, [], False
    while True:
        due = (run.step % every == 0 or run.step == end) and run.step != resumed_at
        stop = stop or (world == 1 and len(interrupts) > 0)
        if pending and (due or stop or run.step % c.log_every == 0):
            sums = torch.stack([torch.stack([*row.values()]) for row in pending])  # (steps, 1 + scores)
            sums = torch.cat((sums, sums.new_full((1, sums.size(1)), len(interrupts))))
            if world > 1:  # the sum over ranks; a Ctrl-C may reach one of them first, all must stop at the same step
                torch.distributed.all_reduce(sums)
            *values, (stop, *_) = sums.tolist()  # this waits for the device
            run.seconds, clock = run.seconds + time.perf_counter() - clock, time.perf_counter()
            for i, row in enumerate(values):
                run.check("loss", row[0], run.step - len(pending) + i)
            means = {name: sum(v) / len(v) / world for name, v in zip(pending[0], zip(*values))}
            ms, lr = 1e3 * (run.seconds - logged) / len(pending), optimizer.param_groups[0]["lr"]
            rate, logged, pending = 1e3 * batch / ms, run.seconds, []
            run.log(f"step {run.step}/{steps} | " + " | ".join(f"{k} {v:.4f}" for k, v in means.items()) +
                    f" | lr {lr:.1e} | {ms:.1f} ms | {rate:.0f} images/s", **means, lr=lr, ms=ms, seconds=run.seconds,
                    images_per_s=rate)
        if due:
            look_at(run, raw, train_split, val, beside, steps, c, autocast, world, save)
        if due or stop:
            save("ckpt.pt")
            clock = time.perf_counter()
        if run.step >= end or stop:
            break
        pending.append(contrastive_step(model, raw, optimizer, autocast, images, c, run.step, steps, rank, world))
        run.step += 1
    if world > 1:  # a gloo group that ends while DDP still holds it may abort
        del model
        gc.collect()
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if rank == 0 and stop:
        print(f"stopped after step {run.step}; to go on: python simclr.py --resume --out {c.out}")
    elif rank == 0:
        finish_simclr(run, raw, yardsticks, train_split, val, test, c, autocast, device)
    return 130 if stop else 0


def look_at(run, model, train_split, val, beside, steps, c, autocast, world, save):
    """Evaluate during the run: a log line and row, best.pt if kNN is best, and curves."""
    try:
        scores = [evaluate(model, train_split, val, c, autocast)]
    except UserError as error:
        raise UserError(f"{error} (at step {run.step}; {run.out} keeps the last checkpoint)", 1) from error
    if world > 1:  # the first rank's for all
        torch.distributed.broadcast_object_list(scores)
    [scores] = scores
    text = [f"{key} {value:.4f}" + (f" (random init {beside[f'{key}_random_init']:.4f}, pixels "
                                    f"{beside[f'{key}_pixels']:.4f})" if key in ("knn", "linear") else "")
            for key, value in scores.items()]
    run.log(f"step {run.step}/{steps} | " + " | ".join(text), seconds=run.seconds, **scores, **beside)
    if scores["knn"] > run.best:
        run.best = scores["knn"]
        save("best.pt")
    run.draw("accuracy on validation images", kNN="knn", **{"linear probe": "linear", "kNN of random init":
             "knn_random_init", "kNN of pixels": "knn_pixels", "linear probe of random init": "linear_random_init",
             "linear probe of pixels": "linear_pixels"})


@torch.no_grad()
def draw_neighbours(encode, train, test, path, autocast):
    """A row for the first test image of each class: itself, and the eight training images of nearest features."""
    queries = test[0][first_of_each(test[1])]
    z, train_z = (F.normalize(cached_features(encode, x, CIFAR10_STATS, autocast), dim=1)
                  for x in (queries, train[0]))
    nearest = (z @ train_z.T).topk(min(8, len(train_z)), dim=1).indices  # (classes, 8)
    write_sheet(path, [[image, *train[0][row]] for image, row in zip(queries, nearest)])


def finish_simclr(run, model, yardsticks, train_split, val, test, c, autocast, device):
    """Read the test set, once, with the best weights: the table of probes, and the log's last row."""
    best = load_checkpoint(run.out / "best.pt")
    model.load_state_dict(best["model"])
    encode = as_encode(model.eval().encoder)
    results = probe_encoders({c.loss: encode, **yardsticks}, CIFAR10_STATS, train_split, val, test, (1.0, 0.1, 0.01),
                             autocast)
    print(f"on the test images, with the labels of {len(train_split[0]):,} training images, or 10% or 1% of them:")
    print(probe_table(results))
    flat = {f"test_{key}{'' if name == c.loss else '_' + name}": value
            for name, scores in results.items() for key, value in scores.items()}
    ours, fresh, memory = results[c.loss], results["random_init"], peak_mb(device)
    run.log(f"test kNN {ours['knn']:.4f}, linear {ours['linear']:.4f} (random init {fresh['knn']:.4f}, "
            f"{fresh['linear']:.4f}), weights of step {best['step']} | {run.seconds:.0f} s of training | "
            f"peak {memory:.0f} MB | pictures in {run.out}", seconds=run.seconds, **flat, final=True, peak_mb=memory)
    draw_neighbours(encode, train_split, test, run.out / "neighbours.png", autocast)


def draw_pairs(c):
    """augment.png: a row for each of eight training images, itself and four pairs of views, of as many steps."""
    images = load_images(c)[0][0][:8]
    mean, std = (torch.tensor(s)[:, None, None] for s in CIFAR10_STATS)
    rows = [[image] for image in images]
    for step in range(4):
        x = views(c, images, step, len(images), np.arange(2 * len(images))) * std + mean  # (2 · 8, 3, H, W)
        for i, of in enumerate(batch_index(len(images), len(images), c.seed, step, 0, 1)[0]):
            rows[of] += [255 * x[i], 255 * x[len(images) + i]]
    with one_line(f"can't make the folder {c.out}", status=1):
        Path(c.out).mkdir(parents=True, exist_ok=True)
    write_sheet(Path(c.out) / "augment.png", rows)
    print(f"wrote {c.out}/augment.png: the original, then pairs of views")


def first_of_each(labels):
    """The index of the first image of each class."""
    return [(labels == k).nonzero()[0].item() for k in labels.unique()]


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
            draw_pairs(c)
            return 0
        pressed, old = [], signal.getsignal(signal.SIGINT)  # a first Ctrl-C stops between steps, a second at once
        signal.signal(signal.SIGINT, lambda *_: (pressed.append(True), signal.signal(signal.SIGINT, old)))
        try:
            return train(c, pressed)
        finally:
            signal.signal(signal.SIGINT, old)
    except UserError as error:
        print(f"simclr.py: {error}", file=sys.stderr)
        return error.status
    except (MemoryError, RuntimeError) as error:  # torch's out of memory is one, a plain one on a CPU
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            print(f"simclr.py: --compile failed, leave it out: {' '.join(str(error).split())[:200]}", file=sys.stderr)
            return 1
        if isinstance(error, RuntimeError) and not re.search("(out of|allocate|enough) memory", str(error)):
            raise
        print(f"simclr.py: out of memory ({' '.join(str(error).split())[:200]}): lower --batch_size, or give "
              "--chunk (simclr, vicreg)", file=sys.stderr)
        return 1
    except SystemExit as error:  # --help
        return error.code or 0
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
