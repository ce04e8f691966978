r"""GPT-2: a Transformer decoder that learns to write by predicting the next token.

All tokens pass through a stack of blocks at once. In each block a token looks at itself and at the
tokens before it, never ahead (attention), and is then processed on its own (MLP). The objective
is the cross-entropy of the next token [1, 2]. To write, the model appends each token that it
samples to its input. To fine-tune it, go on with the same loss on other text, such as answers to
instructions.

    python gpt2.py                                    # offline: Python's standard library
    python gpt2.py --sample_only --prompt "def add("  # from that run's best checkpoint
    python gpt2.py --data shakespeare --out out/shakespeare
    python gpt2.py --init gpt2 --sample_only --prompt "The meaning of life is"
    python gpt2.py --init gpt2 --data my.jsonl --instruct --block_size 512 --out out/tuned
    torchrun --nproc_per_node=8 gpt2.py --data tokens/ --tokenizer gpt2 --pos learned \
        --n_layer 12 --n_head 12 --n_embd 768 --block_size 1024 --batch_size 32 --grad_accum 2 \
        --optimizer adamw --lr 6e-4 --beta2 0.95 --warmup 700 --steps 19000 --compile  # untested

What to expect (torch 2.13.0, one core of an AMD EPYC, fp32, n = 1; logs in assets/logs/gpt2/):
- python gpt2.py: val loss 1.312 on Python 3.11's library after 118 s of training
- Shakespeare by bytes, --steps 2000: val loss 1.560 after 128 s. nanoGPT's setting for CPUs, 4
  layers of width 128 with AdamW, takes as long and ends at 1.902
- 500 steps on Shakespeare: Muon 1.776, AdamW 1.998, Lion 2.038, Sophia 2.092, Adam 2.467 (n = 3)
- sampling at 124M, batch 1, two cores: 25 tokens/s in fp32, .92 of reading the weights; 49 in bf16
- on a GPU: not yet measured

Rotary positions [3] and Muon [9] are the defaults, though newer than GPT-2. Closest to [1] is
--pos learned --tokenizer gpt2 --optimizer adamw --weight_decay 0.01 --dropout 0.1.

[1] Radford et al. 2018, GPT  [2] Radford et al. 2019, GPT-2  [3] RoFormer, arXiv 2104.09864v5
[4] GQA, arXiv 2305.13245v3  [5] Adam, arXiv 1412.6980v9  [6] AdamW, arXiv 1711.05101v3
[7] Lion, arXiv 2302.06675v4  [8] Sophia, arXiv 2305.14342v4  [9] kellerjordan.github.io/posts/muon
"""

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# Shapes: B batch, T tokens, C width, H query heads, H_kv key heads, D = C / H, V vocabulary


class GPT(nn.Module):
    """The whole network. Its parameters are named as in Hugging Face's GPT2LMHeadModel."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        assert c.pos in ("learned", "rope"), c.pos
        self.transformer = nn.ModuleDict()
        self.transformer.wte = nn.Embedding(c.vocab_size, c.n_embd)
        if c.pos == "learned":
            self.transformer.wpe = nn.Embedding(c.block_size, c.n_embd)
        self.transformer.h = nn.ModuleList(TransformerBlock(c) for _ in range(c.n_layer))
        self.transformer.ln_f = nn.LayerNorm(c.n_embd, bias=c.bias)
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied: one matrix for tokens in and out
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):  # 2 a block write to the residual stream
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx, targets=None, cache=None, start=0):
        """idx (B, T) are the tokens at positions start, start + 1, ... With targets (B, T), the
        tokens after them (-100: none), returns logits (B, T, V) and the mean cross-entropy in nats;
        without, logits (B, 1, V) of the token after the last, and None."""
        c, end = self.config, start + idx.size(1)
        if end > c.block_size:
            raise ValueError(f"{end} tokens don't fit block_size {c.block_size}")
        x = self.transformer.wte(idx)  # (B, T, C)
        if c.pos == "learned":
            x = x + self.transformer.wpe(torch.arange(start, end, device=x.device))
        x = F.dropout(x, c.dropout, self.training)
        for i, block in enumerate(self.transformer.h):
            x = block(x, None if cache is None else cache[i], start)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        logits = self.lm_head(x)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        return logits, loss / (targets >= 0).sum().clamp(min=1)  # 0, not NaN, without any target

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=None,
                 generator=None):
        """Append up to max_new_tokens tokens to idx (B, T). A row that has drawn `stop` is filled
        up with it; generation ends early when all have. temperature 0 is greedy."""
        c, cached = self.config, 0
        done = torch.zeros_like(idx[:, :1], dtype=torch.bool)  # (B, 1)
        cache = self.lm_head.weight.new_zeros(  # keys and values of the tokens so far
            c.n_layer, 2, len(idx), c.n_kv_head or c.n_head, c.block_size, c.n_embd // c.n_head)
        for _ in range(max_new_tokens):
            if cached == c.block_size:  # the window slides, so that all positions change
                cached = 0
            window = idx[:, -1:] if cached else idx[:, -c.block_size:]
            logits, _ = self(window, cache=cache, start=cached)  # (B, 1, V)
            cached += window.size(1)
            token = sample_token(logits[:, -1].float(), temperature, top_k, top_p, generator)
            if stop is not None:
                token = token.masked_fill(done, stop)
                done |= token == stop
            idx = torch.cat((idx, token), dim=1)
            if done.all():
                break
        return idx

    @classmethod
    def from_pretrained(cls, name_or_path, data_dir="data"):
        """OpenAI's gpt2, gpt2-medium, -large or -xl; a folder or .safetensors file of Hugging
        Face's; or a .pt checkpoint of this script's or nanoGPT's."""
        path = Path(name_or_path)
        if name_or_path in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
            url = f"https://huggingface.co/openai-community/{path}/resolve/main/model.safetensors"
            path = download(url, Path(data_dir) / path / "model.safetensors")
        if path.suffix == ".pt":
            saved = torch.load(path, map_location="cpu", weights_only=True)
            shape, state = saved["model_args"], saved["model"]
        else:
            shape, state = load_safetensors(path / "model.safetensors" if path.is_dir() else path)
        model = cls(GPTConfig(**shape))
        # without the prefixes that torch.compile and DistributedDataParallel add
        model.load_state_dict({name.replace("_orig_mod.", "").replace("module.", ""): w
                               for name, w in state.items()})
        return model.eval()

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors, which Hugging Face's GPT2LMHeadModel reads."""
        c, folder = self.config, Path(folder)
        if c.pos == "rope" or c.n_kv_head not in (None, 0, c.n_head) or not c.bias:
            raise ValueError("Hugging Face's GPT-2 has learned positions, all key heads, biases")
        header, data, end = {"__metadata__": {"format": "pt"}}, [], 0
        for name, w in self.state_dict().items():
            if name != "lm_head.weight":  # tied to wte
                w = (w.t() if name.endswith(CONV1D) else w).cpu().float().numpy()
                begin, end = end, end + w.nbytes
                header[name] = dict(dtype="F32", shape=w.shape, data_offsets=[begin, end])
                data.append(w.tobytes())
        header = json.dumps(header).encode()
        folder.mkdir(parents=True, exist_ok=True)
        data = b"".join([len(header).to_bytes(8, "little"), header, *data])
        (folder / "model.safetensors").write_bytes(data)
        config = dict(n_positions=c.block_size, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd,
                      vocab_size=c.vocab_size, eos_token_id=c.vocab_size - 1, model_type="gpt2",
                      architectures=["GPT2LMHeadModel"])
        (folder / "config.json").write_text(json.dumps(config))


@dataclasses.dataclass
class GPTConfig:  # by default the smallest GPT-2, with 124,439,808 parameters
    block_size: int = 1024  # T, the longest context
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_kv_head: int = None  # key and value heads: None or 0 for n_head, fewer [4], 1 multi-query
    pos: str = "learned"  # or rope [3]
    dropout: float = 0.0
    bias: bool = True


class TransformerBlock(nn.Module):
    """Attention, then an MLP. Each reads a normalised copy of x and adds to x ([2] 2.3)."""

    def __init__(self, c):
        super().__init__()
        self.ln_1 = nn.LayerNorm(c.n_embd, bias=c.bias)
        self.attn = CausalSelfAttention(c)
        self.ln_2 = nn.LayerNorm(c.n_embd, bias=c.bias)
        self.mlp = MLP(c)

    def forward(self, x, cache=None, start=0):
        x = x + self.attn(self.ln_1(x), cache, start)
        return x + self.mlp(self.ln_2(x))


class CausalSelfAttention(nn.Module):
    """softmax(q k^T / sqrt(D)) v over a token and those before it, in each of H heads."""

    def __init__(self, c):
        super().__init__()
        self.config, self.D = c, c.n_embd // c.n_head
        kv_heads = c.n_kv_head or c.n_head
        assert c.n_embd % c.n_head == 0 and c.n_head % kv_heads == 0, f"doesn't divide: {c}"
        assert c.pos == "learned" or self.D % 2 == 0, f"rope turns pairs, but D is {self.D}"
        self.sizes = [c.n_embd, kv_heads * self.D, kv_heads * self.D]  # of q, k and v
        self.c_attn = nn.Linear(c.n_embd, sum(self.sizes), bias=c.bias)  # q, k and v in one product
        self.c_proj = nn.Linear(c.n_embd, c.n_embd, bias=c.bias)

    def forward(self, x, cache=None, start=0):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(self.sizes, dim=2)
        q = q.view(B, T, -1, self.D).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, -1, self.D).transpose(1, 2)  # (B, H_kv, T, D)
        v = v.view(B, T, -1, self.D).transpose(1, 2)
        if self.config.pos == "rope":
            q, k = rotate(q, start), rotate(k, start)
        if cache is not None:  # (2, B, H_kv, block_size, D)
            assert start == 0 or T == 1, "behind a cache that isn't empty, one token at a time"
            cache[:, :, :, start:start + T] = torch.stack((k, v))
            k, v = cache[:, :, :, :start + T].unbind(0)  # (B, H_kv, start + T, D)
        # The fused kernel never writes the T x T matrix to memory. is_causal hides key j from query
        # i < j, so it wants as many queries as keys. A single new token may see the whole cache.
        # enable_gqa lets a group of query heads share a key head [4].
        dropout = self.config.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1,
                                           enable_gqa=k.size(1) < q.size(1))  # (B, H, T, D)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.config.dropout, self.training)


def rotate(x, start):
    """Rotary positions [3]: turn each pair (x_i, x_{i + D/2}) of x (B, H, T, D) by an angle
    proportional to the position, so that q . k depends on positions through their difference only.
    [3] pairs neighbours; halves, as in Hugging Face's Llama, are the same up to the order."""
    T, D = x.shape[-2:]
    frequency = 10000.0 ** (-torch.arange(0, D, 2, device=x.device) / D)  # (D / 2,), [3] eq. 15
    angle = torch.arange(start, start + T, device=x.device)[:, None] * frequency  # (T, D / 2)
    cos, sin = angle.cos(), angle.sin()
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


class MLP(nn.Module):
    """Each token alone: expand to 4 C, GELU (in GPT-2 its tanh approximation), project back."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.c_fc = nn.Linear(c.n_embd, 4 * c.n_embd, bias=c.bias)
        self.c_proj = nn.Linear(4 * c.n_embd, c.n_embd, bias=c.bias)

    def forward(self, x):
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return F.dropout(x, self.config.dropout, self.training)


def sample_token(logits, temperature, top_k, top_p, generator):
    """A token id for each row (B, 1), drawn from logits (B, V)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    probs, ids = (logits / temperature).softmax(dim=-1), None
    if top_p:  # drop tokens once the ones before them already sum to top_p
        probs, ids = probs.sort(dim=-1, descending=True)
        probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, 0.0)
    choice = torch.multinomial(probs, 1, generator=generator)  # normalises probs itself
    return choice if ids is None else ids.gather(-1, choice)


# ---- Official weights. Hugging Face stores these four of each block transposed, for x w, not x w^T
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
SKIPPED = (".attn.bias", ".attn.masked_bias", "lm_head.weight", "__metadata__")  # masks; it's tied
DTYPES = dict(F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16)


def load_safetensors(path):
    """GPTConfig's arguments and the state dict. The file: 8 bytes with the length of a header, the
    header, JSON with each tensor's dtype, shape and place, and the data."""
    raw, state = np.memmap(path, np.uint8, mode="c"), {}  # c: read from disk as needed
    start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
    for name, entry in json.loads(raw[8:start].tobytes()).items():
        if not name.endswith(SKIPPED):
            begin, end = entry["data_offsets"]
            assert start + end <= len(raw), f"{path} is cut short: delete it and download it again"
            w = torch.from_numpy(raw[start + begin:start + end]).view(DTYPES[entry["dtype"]])
            w = w.view(entry["shape"])
            name = "transformer." + name.split("transformer.")[-1]  # some files leave it out
            state[name] = w.t() if name.endswith(CONV1D) else w
    wte, wpe = state["transformer.wte.weight"], state["transformer.wpe.weight"]
    state["lm_head.weight"] = wte
    n_head, config = wte.size(1) // 64, path.with_name("config.json")  # 64 in all official sizes
    if config.exists():
        n_head = json.loads(config.read_text()).get("n_head", n_head)
    return dict(block_size=len(wpe), vocab_size=len(wte), n_embd=wte.size(1), n_head=n_head,
                n_layer=sum(name.endswith("ln_1.weight") for name in state)), state


def download(url, path, sha256=None):
    """Fetch url to path unless it is there. The file lands whole or not at all."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), sha256)
    return path


# ---- Optimisers: w a parameter, g its gradient, m the momentum, lr the rate, wd the weight decay

def each_parameter(optimizer, *buffers):
    """Yield (w, g, group, *buffers) for each w that has a gradient; buffers begin as zeros."""
    for group in optimizer.param_groups:
        for w in (w for w in group["params"] if w.grad is not None):
            state = optimizer.state[w]
            for name in buffers:
                if name not in state:
                    state[name] = torch.zeros_like(w)
            yield w, w.grad, group, *(state[name] for name in buffers)


class Lion(torch.optim.Optimizer):
    """Lion [7]: each weight moves by lr, against the sign of a mix of momentum and gradient."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for w, g, group, m in each_parameter(self, "momentum"):
            beta1, beta2 = group["betas"]
            w.mul_(1 - group["lr"] * group["weight_decay"])
            # w <- w - lr sign(beta1 m + (1 - beta1) g), [7] Alg. 2
            w.sub_(m.lerp(g, 1 - beta1).sign(), alpha=group["lr"])
            m.lerp_(g, 1 - beta2)  # m <- beta2 m + (1 - beta2) g


class SophiaG(torch.optim.Optimizer):
    """Sophia-G [8]: momentum over an estimate h of the Hessian's diagonal, clipped to [-1, 1]. Call
    update_hessian before the first step and then every ten steps or so. rho is [8]'s gamma."""

    def __init__(self, params, lr=1e-3, betas=(0.965, 0.99), rho=0.04, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, rho=rho, weight_decay=weight_decay))

    def update_hessian(self, logits):
        """h <- beta2 h + (1 - beta2) N g^2 ([8] Alg. 2, 3). g is the gradient of the mean loss of
        logits (N, V) on labels that are sampled from the logits themselves."""
        labels = torch.multinomial(logits.detach().softmax(dim=-1), 1).squeeze(1)  # (N,)
        F.cross_entropy(logits, labels).backward()
        for _, g, group, h in each_parameter(self, "hessian"):
            h.lerp_(WORLD * len(logits) * g.square(), 1 - group["betas"][1])
        self.zero_grad()

    @torch.no_grad()
    def step(self):
        for w, g, group, m, h in each_parameter(self, "momentum", "hessian"):
            m.lerp_(g, 1 - group["betas"][0])
            w.mul_(1 - group["lr"] * group["weight_decay"])
            # w <- w - lr clip(m / max(rho h, eps), 1), [8] Alg. 3
            w.sub_((m / (group["rho"] * h).clamp(min=1e-15)).clamp(-1, 1), alpha=group["lr"])


class Muon(torch.optim.Optimizer):
    """Muon [9]: momentum, made orthogonal, so that rare directions move as far as common ones. For
    the matrices of hidden layers. A group's split=[rows, ...] makes three of a fused qkv."""

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0, split=None):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay,
                                      split=split))
        for w in (w for group in self.param_groups for w in group["params"]):
            if w.dim() != 2:
                raise ValueError(f"Muon wants matrices, not a parameter of shape {tuple(w.shape)}")

    @torch.no_grad()
    def step(self):
        for w, g, group, m in each_parameter(self, "momentum"):
            m.lerp_(g, 1 - group["momentum"])  # m <- mu m + (1 - mu) g
            update = g.lerp(m, group["momentum"])  # Nesterov: the same average once again
            w.mul_(1 - group["lr"] * group["weight_decay"])
            rows = group["split"] or len(w)
            for part, u in zip(w.split(rows), update.split(rows), strict=True):
                scale = max(1, u.size(0) / u.size(1)) ** 0.5
                part.sub_(newton_schulz(u), alpha=group["lr"] * scale)


def newton_schulz(g, steps=5):
    """About U V^T of g = U S V^T. A step does s <- a s + b s^3 + c s^5 to every singular value s.
    Five steps take those above .002 of g's norm to between .68 and 1.21, smaller ones to less."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16() if g.is_cuda else g.float()
    if g.size(0) > g.size(1):
        x = x.mT  # so that x x^T is the smaller square
    x = x / (x.norm() + 1e-7)  # no singular value above 1
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if g.size(0) > g.size(1) else x).type_as(g)


def make_optimizers(model, c):
    """One or two optimizers that have every parameter once. Matrices decay, vectors don't."""
    hidden, matrices, vectors = [], [], []
    for name, p in model.named_parameters():
        if c.optimizer == "muon" and ".h." in name and p.dim() == 2:
            split = model.transformer.h[0].attn.sizes if "c_attn" in name else None
            hidden.append(dict(params=[p], split=split))
        else:
            (matrices if p.dim() == 2 else vectors).append(p)
    groups = [dict(params=matrices, weight_decay=c.weight_decay), dict(params=vectors)]
    if c.optimizer in ("lion", "sophia"):
        return [(Lion if c.optimizer == "lion" else SophiaG)(groups, lr=c.lr)]
    # AdamW [6]: w <- w - lr (m / (sqrt(v) + eps) + wd w), m and v rid of their bias. In Adam [5]
    # decay is L2, g <- g + wd w, which sqrt(v) divides like any gradient.
    kind = torch.optim.Adam if c.optimizer == "adam" else torch.optim.AdamW
    lr = c.adam_lr if c.optimizer == "muon" else c.lr
    adam = kind(groups, lr, (0.9, c.beta2), weight_decay=0.0, fused=True)
    return [Muon(hidden, c.lr, weight_decay=c.weight_decay), adam] if hidden else [adam]


def learning_rate(step, peak, warmup, steps):
    """Linear warm-up to peak, then half a cosine down to 0 (arXiv 1608.03983 eq. 5)."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = min(1, (step - warmup) / max(1, steps - warmup))
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


# ---- Data: an array (2, n), token ids and their labels. A label is the id again, or -100 where
# there is no loss, as in prompts. get_batch shifts them: a token's target is the label behind it.
TEMPLATE = "### Instruction:\n{}\n\n### Response:\n"


def make_tokenizer(name):
    """bytes of UTF-8, or gpt2's byte pairs ([2] 2.2): stop (the id that ends a text), encode(text)
    -> list of ids, decode(ids) -> bytes."""
    if name == "bytes":
        return SimpleNamespace(stop=256, encode=lambda text: list(text.encode()),
                               decode=lambda ids: bytes(i for i in ids if i < 256))
    bpe = tiktoken.get_encoding("gpt2")
    return SimpleNamespace(stop=50256, encode=bpe.encode_ordinary,
                           decode=lambda ids: bpe.decode_bytes([i for i in ids if i < 50256]))


def load_data(c, tokenizer):
    """What to train on and what to validate on: files named val*, else the last tenth."""
    path = Path(c.data)
    if c.data == "python":
        files = [*Path(os.__file__).parent.glob("*.py")]
    elif c.data == "shakespeare":
        url = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
        path = Path(c.data_dir) / "tinyshakespeare.txt"
        files = [download(url + "input.txt", path, "86c4e6aa9db7c042")]
    else:
        files = [f for f in [path, *path.rglob("*")] if f.is_file()]
    for suffix in (".bin", ".jsonl"):  # a folder that has some: only those
        files = [f for f in files if f.suffix.lower() == suffix] or files
    val_files = [f for f in files if f.name.startswith("val") and f != path]
    parts = [load_file(f, tokenizer) for f in sorted({*files} - {*val_files})]
    if not parts:
        raise FileNotFoundError(f"--data {c.data}: there is nothing to train on")
    data = np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]  # a single .bin: on disk
    cut = 0 if c.eval_only else round(0.9 * data.shape[1])
    train, val = data[:, :cut], data[:, cut:]
    if val_files:
        train, val = data, np.concatenate([load_file(f, tokenizer) for f in val_files], axis=1)
    if min(val.shape[1], train.shape[1] if cut else math.inf) <= c.block_size:
        raise ValueError(f"--data {c.data} has too few tokens for --block_size {c.block_size}")
    return train, val


def load_file(path, tokenizer):
    """A .jsonl of instructions, a .bin of uint16 ids, or a text."""
    if path.suffix.lower() == ".jsonl":
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        rows = [load_row(json.loads(line), tokenizer) for line in lines if line.strip()]
        return np.concatenate(rows, axis=1)
    if path.suffix.lower() == ".bin":
        ids = np.memmap(path, np.uint16, mode="r")
        if not ids[1:10**6:2].any() or ids[:10**6].max() > tokenizer.stop:
            raise ValueError(f"{path} doesn't hold ids of 16 bits, at most {tokenizer.stop}")
    else:
        ids = [*tokenizer.encode(path.read_text(encoding="utf-8")), tokenizer.stop]
    return np.broadcast_to(np.asarray(ids, np.uint16), (2, len(ids)))  # labels are ids: no copy


def load_row(row, tokenizer):
    """Encode a row, with the loss on the answer alone: {"messages": [{"role", "content"}, ...]},
    {"prompt", "response"} or {"instruction", "input", "output"}."""
    if "messages" in row:  # a chat: its last answer, and what it answers
        turns = row["messages"]
        last = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
        row = dict(prompt=turns[last - 1]["content"], response=turns[last]["content"])
    prompt = row["prompt"] if "prompt" in row else row["instruction"]
    if row.get("input"):
        prompt += "\n\n### Input:\n" + row["input"]
    prompt = tokenizer.encode(TEMPLATE.format(prompt))
    answer = tokenizer.encode(row["response"] if "response" in row else row["output"])
    answer.append(tokenizer.stop)
    return np.array([prompt + answer, [-100] * len(prompt) + answer])


def get_batch(data, starts, T, device):
    """Inputs x (B, T) and targets y (B, T) in windows that begin at starts."""
    batch = np.stack([data[:, i:i + T + 1] for i in starts]).astype(np.int64)  # (B, 2, T + 1)
    batch = torch.from_numpy(batch).to(device)
    return batch[:, 0, :-1], batch[:, 1, 1:]


# ---- Evaluation, samples, training

@torch.no_grad()
def evaluate(model, data, tokenizer, c, autocast):
    """Mean loss in nats per token, and bits per byte, over windows that don't overlap."""
    T, device = c.block_size, model.lm_head.weight.device
    starts = range(0, data.shape[1] - T, T)
    if not c.eval_only:  # every k-th window, about eval_tokens in all
        starts = starts[::max(1, len(starts) * T // c.eval_tokens)]
    nats, targets = 0.0, []
    for i in range(0, len(starts), c.batch_size):
        x, y = get_batch(data, starts[i:i + c.batch_size], T, device)
        with autocast:
            loss = model(x, y)[1].item()
        nats += loss * (y >= 0).sum().item()
        targets += y[y >= 0].tolist()
    num_bytes = max(1, len(tokenizer.decode(targets)))
    return dict(val_loss=nats / max(1, len(targets)), bits_per_byte=nats / math.log(2) / num_bytes)


def sample(model, tokenizer, c):
    """The prompt and its continuation, as text."""
    device = model.lm_head.weight.device
    ids = tokenizer.encode(TEMPLATE.format(c.prompt) if c.instruct else c.prompt)
    idx = torch.tensor([ids or [tokenizer.stop]], device=device)  # (1, T)
    idx = model.generate(idx, c.sample_tokens, c.temperature, c.top_k, c.top_p, stop=tokenizer.stop,
                         generator=torch.Generator(device).manual_seed(c.seed))
    return tokenizer.decode(idx[0].tolist()).decode("utf-8", "replace")


# Peak rates, each the best of a sweep of 500 steps on Shakespeare: README.md
LEARNING_RATES = dict(muon=0.03, adamw=0.008, adam=0.016, lion=0.002, sophia=0.001)
CHOICES = dict(tokenizer=("bytes", "gpt2"), pos=("learned", "rope"), optimizer=[*LEARNING_RATES],
               dtype=("auto", "float32", "bfloat16"))
SHAPE = ("n_layer", "n_head", "n_kv_head", "n_embd", "pos")
# set by torchrun
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@dataclasses.dataclass
class Config:
    data: str = "python"  # modules of its standard library; shakespeare; a file or folder
    data_dir: str = "data"  # where downloads land
    out: str = "out/gpt2"
    tokenizer: str = "bytes"
    init: str = ""  # gpt2, ..., gpt2-xl or a path: its shape and tokenizer override the flags
    n_layer: int = 3
    n_head: int = 3
    n_kv_head: int = 0  # 0: n_head
    n_embd: int = 96
    block_size: int = 128
    pos: str = "rope"
    dropout: float = 0.0
    optimizer: str = "muon"
    lr: float = 0.03  # peak; LEARNING_RATES has the default of each optimizer; with --init 3e-5
    adam_lr: float = 0.006  # with muon: AdamW's rate for embeddings, biases and norms
    warmup: int = 100  # steps
    weight_decay: float = 0.1
    beta2: float = 0.99  # of Adam; 0.95 for batches of half a million tokens
    grad_clip: float = 1.0  # largest norm of the gradient
    batch_size: int = 8  # sequences in a micro-batch
    grad_accum: int = 1  # micro-batches in a step, on each rank
    steps: int = 1800
    eval_every: int = 300  # steps between evaluations, each with a checkpoint and a sample
    eval_tokens: int = 131072  # validation tokens in an evaluation, roughly
    log_every: int = 10
    seed: int = 1337
    resume: bool = False  # go on from ckpt.pt in --out; repeat the run's other flags
    device: str = "auto"
    dtype: str = "auto"
    compile: bool = False
    wandb: bool = False
    eval_only: bool = False  # the loss on all of --data, of --init or else of best.pt in --out
    sample_only: bool = False  # likewise
    prompt: str = "\n"
    instruct: bool = False  # the prompt is an instruction, as in .jsonl
    sample_tokens: int = 256
    temperature: float = 0.8
    top_k: int = 0  # 0: off
    top_p: float = 0.0  # 0: off


def pick_device(name, dtype):
    """The device, and the type to compute in."""
    if name == "auto":
        found = torch.accelerator.is_available()  # cuda or mps
        name = torch.accelerator.current_accelerator().type if found else "cpu"
    if dtype == "auto":
        fast = name == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if fast else "float32"
    return torch.device(name), getattr(torch, dtype)


def load_model(c):
    """A new model, or --init's, which brings its own shape and tokenizer; and the tokenizer."""
    if c.init:
        model = GPT.from_pretrained(c.init, c.data_dir)
        model.config.dropout = c.dropout
        vars(c).update({k: v for k, v in vars(model.config).items() if k in SHAPE})
        c.block_size = min(c.block_size, model.config.block_size)
    else:
        vocab_size = 257 if c.tokenizer == "bytes" else 50257
        model = GPT(GPTConfig(c.block_size, vocab_size, c.n_layer, c.n_head, c.n_embd, c.n_kv_head,
                              c.pos, c.dropout))
    return model, make_tokenizer("bytes" if model.config.vocab_size == 257 else "gpt2")


def start_log(c, step):
    """Write config.json, and leave in log.jsonl what came before the step."""
    path = Path(c.out) / "log.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if step else []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name("config.json").write_text(json.dumps(dataclasses.asdict(c), indent=2))
    rows = [row for row in rows if row["step"] <= step and "final" not in row]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def log(c, **row):
    """Print a row and append it to log.jsonl."""
    if RANK == 0:
        print(" | ".join(f"{name} {value:.6g}" for name, value in row.items()), flush=True)
        with open(f"{c.out}/log.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        if c.wandb:
            import wandb  # pip install wandb
            if wandb.run is None:
                wandb.init(project="gpt2", config=vars(c))
            wandb.log(row)


def save(path, state):
    """Write a checkpoint whole or not at all."""
    torch.save(state, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def training_step(model, optimizers, data, c, step, device, autocast):
    """One update of the parameters; returns the mean loss of this rank. Batches and dropout are
    functions of (seed, step). N ranks read what one rank would with N times the accumulation."""
    torch.manual_seed(c.seed * 1_000_003 + step * WORLD + RANK)  # dropout, Sophia
    starts = np.random.default_rng((c.seed, step)).integers(
        data.shape[1] - c.block_size, size=(c.grad_accum, WORLD, c.batch_size))[:, RANK]
    batches = [get_batch(data, row, c.block_size, device) for row in starts]
    if c.optimizer == "sophia" and step % 10 == 0:
        x, y = batches[0]
        with autocast:
            logits, _ = model(x, y)
        optimizers[0].update_hessian(logits[y >= 0].float())
    tokens = sum((y >= 0).sum() for _, y in batches)
    if WORLD > 1:
        dist.all_reduce(tokens)
    total = 0.0
    for i, (x, y) in enumerate(batches):
        if WORLD > 1:  # exchange gradients at the last micro-batch only
            model.require_backward_grad_sync = i == c.grad_accum - 1
        # Each target of the whole step counts the same. Times WORLD: DDP takes the mean over ranks.
        weight = (y >= 0).sum() / tokens.clamp(min=1) * WORLD
        with autocast:
            loss = model(x, y)[1] * weight
        loss.backward()
        total += loss.item()
    nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, optimizer.defaults["lr"], c.warmup, c.steps)
        optimizer.step()
        optimizer.zero_grad()
    return total


def train(c):
    """Train as c says, or sample or evaluate only. Of several ranks the first writes files."""
    device, dtype = pick_device(c.device, c.dtype)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(c.seed)
    raw, tokenizer = load_model(c)  # raw: what is sampled and saved, neither compiled nor wrapped
    if c.sample_only:
        print(sample(raw.to(device, dtype), tokenizer, c))
        return
    data, val_data = load_data(c, tokenizer)
    optimizers = make_optimizers(raw.to(device), c)
    if c.eval_only:
        print(evaluate(raw, val_data, tokenizer, c, autocast))
        return
    out, step, best, seconds = Path(c.out), 0, math.inf, 0.0
    if c.resume:
        saved = torch.load(out / "ckpt.pt", map_location=device, weights_only=True)
        for name in ("data", "tokenizer", "optimizer", "block_size", *SHAPE):
            if saved["config"][name] != getattr(c, name):
                sys.exit(f"{out}/ckpt.pt was made with --{name} {saved['config'][name]}")
        raw.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizer"], strict=True):
            optimizer.load_state_dict(state)
        step, best, seconds = saved["step"], saved["best"], saved["seconds"]
    if step >= c.steps:
        sys.exit(f"--steps {c.steps}, but the run is at step {step}")
    if RANK == 0:
        start_log(c, step)
        print(f"{sum(p.numel() for p in raw.parameters()):,} parameters on {device} in {dtype}")
    model = torch.compile(raw) if c.compile else raw
    if WORLD > 1:
        model = nn.parallel.DistributedDataParallel(model)

    model.train()
    while step < c.steps:
        started = time.perf_counter()
        loss = training_step(model, optimizers, data, c, step, device, autocast)
        duration = time.perf_counter() - started
        if not math.isfinite(loss):
            sys.exit(f"loss is {loss} at step {step}")
        step += 1
        seconds += duration
        if step % c.log_every == 0:
            tokens = c.grad_accum * WORLD * c.batch_size * c.block_size
            log(c, step=step, loss=loss, lr=optimizers[0].param_groups[0]["lr"], seconds=seconds,
                tokens_per_s=tokens / duration)
        if step % c.eval_every == 0 or step == c.steps:
            model.eval()
            scores = evaluate(raw, val_data, tokenizer, c, autocast)
            log(c, step=step, seconds=seconds, **scores)
            if not math.isfinite(scores["val_loss"]):
                sys.exit(f"val_loss is {scores['val_loss']} at step {step}")
            improved = scores["val_loss"] < best
            best = min(scores["val_loss"], best)
            if RANK == 0:
                print(sample(raw, tokenizer, c))
                state = dict(model=raw.state_dict(), model_args=vars(raw.config), config=vars(c),
                             optimizer=[optimizer.state_dict() for optimizer in optimizers],
                             step=step, best=best, seconds=seconds)
                save(out / "ckpt.pt", state)
                if improved:
                    save(out / "best.pt", state)
            model.train()
    log(c, step=step, seconds=seconds, **scores, best_val_loss=best, final=True)
    if WORLD > 1:
        dist.destroy_process_group()


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
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # samples hold what some consoles can't show
    parser = make_parser()
    given = parser.parse_args(argv)
    parser.set_defaults(lr=LEARNING_RATES[given.optimizer])
    if given.init:
        parser.set_defaults(optimizer="adamw", lr=3e-5)  # gentle on trained weights
    c = Config(**vars(parser.parse_args(argv)))
    if c.sample_only or c.eval_only:
        c.init = c.init or f"{c.out}/best.pt"
    train(c)


if __name__ == "__main__":
    main()
