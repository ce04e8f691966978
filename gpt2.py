r"""GPT-2: a Transformer decoder that learns to write by predicting the next token.

In each block a token looks at itself and at those before it, never ahead (attention), and is then
processed on its own (MLP). The loss is the cross-entropy of the next token [1, 2]. To write, the
model appends each token that it samples. To fine-tune it, go on with the same loss on other text.

    python gpt2.py                                    # offline: Python's standard library
    python gpt2.py --sample_only --prompt "def add("  # from the model just trained
    python gpt2.py --data shakespeare --out out/shakespeare
    python gpt2.py --init gpt2 --sample_only --prompt "The meaning of life is"
    python gpt2.py --init gpt2 --data my.jsonl --block_size 512 --out out/tuned

What to expect (torch 2.13.0, one core of an AMD EPYC, fp32, n = 1; logs in assets/logs/gpt2/):
- python gpt2.py: val loss 1.312 on Python 3.11's library after 118 s of training
- Shakespeare by bytes, --steps 2000: 1.560 after 128 s. nanoGPT's setting for CPUs ends at 1.902
Rotary positions [3] and Muon [9] are newer. Closest to GPT-2, trained as [1] ([2] says little), are
--pos learned --tokenizer gpt2 --optimizer adamw --weight_decay 0.01 --dropout 0.1 --lr 2.5e-4.

[1] Radford et al. 2018, GPT  [2] Radford et al. 2019, GPT-2  [3] RoFormer, arXiv 2104.09864v5
[4] GQA, arXiv 2305.13245v3  [5] Adam, arXiv 1412.6980v9  [6] AdamW, arXiv 1711.05101v3
[7] Lion, arXiv 2302.06675v4  [8] Sophia, arXiv 2305.14342v4  [9] kellerjordan.github.io/posts/muon
"""

import argparse
import dataclasses
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import nn

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # by torchrun
# Shapes: B batch, T tokens, C width, H query heads, H_kv key heads, D = C / H, V vocabulary


class GPT(nn.Module):
    """The whole network. Its parameters are named as in Hugging Face's GPT2LMHeadModel."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.transformer = nn.ModuleDict()
        self.transformer.wte = nn.Embedding(c.vocab_size, c.n_embd)
        if c.pos == "learned":
            self.transformer.wpe = nn.Embedding(c.block_size, c.n_embd)
        self.transformer.drop = nn.Dropout(c.dropout)
        self.transformer.h = nn.ModuleList(TransformerBlock(c) for _ in range(c.n_layer))
        self.transformer.ln_f = nn.LayerNorm(c.n_embd, bias=c.bias)
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied: one matrix for tokens in and out
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.n_layer if "c_proj" in name else 1))
            elif "bias" in name:
                nn.init.zeros_(p)

    def forward(self, idx, targets=None, cache=None, start=0):
        """idx, targets (B, T) -> logits (B, T, V), mean loss where targets aren't -100. Without
        targets -> logits (B, 1, V) of the last token, None. start is the first token's position."""
        x = self.transformer.wte(idx)  # (B, T, C)
        if self.config.pos == "learned":
            x = x + self.transformer.wpe.weight[start:start + idx.size(1)]
        x = self.transformer.drop(x)
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
        """Append up to max_new_tokens to idx (B, T). A row that has sampled stop repeats it."""
        c, cached = self.config, 0
        done = torch.zeros_like(idx[:, :1], dtype=torch.bool)  # (B, 1)
        cache = self.lm_head.weight.new_zeros(  # keys and values of the tokens so far
            c.n_layer, 2, len(idx), c.n_kv_head or c.n_head, c.block_size, c.n_embd // c.n_head)
        for _ in range(max_new_tokens):
            window = idx[:, -1:] if cached else idx[:, -c.block_size:]
            logits, _ = self(window, cache=cache, start=cached)  # (B, 1, V)
            cached = (cached + window.size(1)) % c.block_size  # 0 when full: the window then slides
            logits = logits[:, -1].float() / max(temperature, 1e-9)  # (B, V); 0: the likeliest wins
            if top_k:
                logits[logits < logits.topk(min(top_k, c.vocab_size)).values[:, -1:]] = -math.inf
            probs, ids = logits.softmax(dim=-1), None
            if top_p:  # drop tokens once the ones before them already sum to top_p
                probs, ids = probs.sort(dim=-1, descending=True)
                probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, 0.0)
            token = torch.multinomial(probs, 1, generator=generator)  # (B, 1)
            token = token if ids is None else ids.gather(-1, token)
            token = token if stop is None else token.masked_fill(done, stop)
            done |= token == stop
            idx = torch.cat((idx, token), dim=1)
            if done.all():
                break
        return idx

    @classmethod
    def from_pretrained(cls, name_or_path, data_dir="data", dropout=0.0):
        """gpt2, gpt2-medium, -large or -xl; Hugging Face's folder or .safetensors; our .pt."""
        path = Path(name_or_path)
        if name_or_path in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
            url = f"https://huggingface.co/openai-community/{path}/resolve/main/model.safetensors"
            path = download(url, Path(data_dir) / path / "model.safetensors")
        if path.suffix == ".pt":
            saved = torch.load(path, map_location="cpu", weights_only=True)
            shape, state = saved["model_args"], saved["model"]
        else:
            shape, state = load_safetensors(path / "model.safetensors" if path.is_dir() else path)
        model = cls(GPTConfig(**{**shape, "dropout": dropout}))
        model.transformer.load_state_dict({name.split("transformer.")[-1]: w for name, w
                                           in state.items() if "lm_head" not in name})  # it's tied
        return model.eval()

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors, which Hugging Face's GPT2LMHeadModel reads."""
        c, folder = self.config, Path(folder)
        assert c.pos == "learned" and c.bias and c.n_kv_head in (None, 0, c.n_head), "not GPT-2"
        header, data = {"__metadata__": {"format": "pt"}}, bytearray()
        for name, w in self.transformer.state_dict(prefix="transformer.").items():
            w, begin = w.t() if name.endswith(CONV1D) else w, len(data)
            data += w.cpu().float().numpy().tobytes()
            header[name] = dict(dtype="F32", shape=w.shape, data_offsets=[begin, len(data)])
        head = json.dumps(header).encode()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + data)
        config = dict(vars(c), n_positions=c.block_size, eos_token_id=c.vocab_size - 1,
                      model_type="gpt2", architectures=["GPT2LMHeadModel"])
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
        self.mlp = nn.Sequential()  # each token alone
        self.mlp.c_fc = nn.Linear(c.n_embd, 4 * c.n_embd, bias=c.bias)
        self.mlp.gelu = nn.GELU(approximate="tanh")
        self.mlp.c_proj = nn.Linear(4 * c.n_embd, c.n_embd, bias=c.bias)
        self.mlp.dropout = nn.Dropout(c.dropout)

    def forward(self, x, cache=None, start=0):
        x = x + self.attn(self.ln_1(x), cache, start)
        return x + self.mlp(self.ln_2(x))


class CausalSelfAttention(nn.Module):
    """softmax(q k^T / sqrt(D)) v over a token and those before it, in each of H heads."""

    def __init__(self, c):
        super().__init__()
        self.rope = dict(learned=False, rope=True)[c.pos]
        self.D, kv_heads = c.n_embd // c.n_head, c.n_kv_head or c.n_head
        assert c.n_embd % c.n_head == 0 and c.n_head % kv_heads == 0, f"doesn't divide: {c}"
        self.heads = [c.n_head, kv_heads, kv_heads]  # of q, k and v, all from one product
        self.c_attn = nn.Linear(c.n_embd, sum(self.heads) * self.D, bias=c.bias)
        self.c_proj = nn.Linear(c.n_embd, c.n_embd, bias=c.bias)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x, cache=None, start=0):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, -1, self.D).transpose(1, 2)  # (B, H + 2 H_kv, T, D)
        q, k, v = qkv.split(self.heads, dim=1)  # (B, H, T, D) and twice (B, H_kv, T, D)
        if self.rope:
            q, k = rotate(q, start), rotate(k, start)
        if cache is not None:  # (2, B, H_kv, block_size, D)
            assert start == 0 or T == 1, "after the prompt, pass one token at a time"
            cache[:, :, :, start:start + T] = torch.stack((k, v))
            k, v = cache[:, :, :, :start + T].unbind(0)  # (B, H_kv, start + T, D)
        # is_causal hides key j from query i < j; enable_gqa lets query heads share a key head [4]
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout.p * self.training,
                                           is_causal=T > 1, enable_gqa=k.size(1) < q.size(1))
        return self.dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


def rotate(x, start):
    """Rotary positions [3]: turn pairs of x (B, H, T, D) by angles that grow with the position, so
    that q . k depends on the distance alone. [3] pairs neighbours, this and Llama halves."""
    T, D = x.shape[-2:]
    frequency = 10000.0 ** (-torch.arange(0, D, 2, device=x.device) / D)  # (D / 2,), [3] eq. 15
    angle = torch.arange(start, start + T, device=x.device)[:, None] * frequency  # (T, D / 2)
    cos, sin = angle.cos(), angle.sin()
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


# ---- Official weights. Hugging Face stores these four of each block transposed, for x w, not x w^T
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def load_safetensors(path):
    """GPTConfig's arguments and the weights. Layout: length of header, JSON header, data."""
    raw, state = np.memmap(path, np.uint8, mode="c"), {}  # c: copy-on-write
    start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
    for name, entry in json.loads(raw[8:start].tobytes()).items():
        if not name.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight", "__metadata__")):
            w = raw[start:][slice(*entry["data_offsets"])].view(np.float32).reshape(entry["shape"])
            w = torch.from_numpy(w.T if name.endswith(CONV1D) else w)
            state[name.split("transformer.")[-1]] = w  # some files lack this prefix
    (V, C), config = state["wte.weight"].shape, path.with_name("config.json")
    shape = dict(vocab_size=V, n_embd=C, n_head=C // 64, block_size=len(state["wpe.weight"]),
                 n_layer=sum(name.endswith("ln_1.weight") for name in state))
    if config.exists():  # else 64 channels a head, as in official sizes
        shape["n_head"] = json.loads(config.read_text())["n_head"]
    return shape, state


def download(url, path, sha256=None):
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), sha256)
    return path


# ---- Optimisers: w a parameter, g its gradient, m the momentum, lr the rate, wd the weight decay
class DecayingOptimizer(torch.optim.Optimizer):
    """w <- w - lr (wd w + u), where u is what a subclass's update makes of g and its state."""

    def __init__(self, params, lr, weight_decay=0.0, **settings):
        super().__init__(params, dict(self.settings, lr=lr, weight_decay=weight_decay, **settings))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in filter(lambda w: w.grad is not None, group["params"]):
                self.state[w].setdefault("m", torch.zeros_like(w))
                u = self.update(w.grad, group, **self.state[w])
                w.mul_(1 - group["lr"] * group["weight_decay"])
                w.sub_(u, alpha=group["lr"])


class Lion(DecayingOptimizer):
    """Lion [7]: each weight moves by lr, against the sign of a mix of momentum and gradient."""
    settings = dict(betas=(0.9, 0.99))

    def update(self, g, group, m):
        u = m.lerp(g, 1 - group["betas"][0]).sign()  # sign(beta1 m + (1 - beta1) g), [7] Alg. 2
        m.lerp_(g, 1 - group["betas"][1])  # m <- beta2 m + (1 - beta2) g
        return u


class SophiaG(DecayingOptimizer):
    """Sophia-G [8]: u = clip(m / max(rho h, eps), 1), h an estimate of the Hessian's diagonal. Call
    update_hessian before the first step, then every ten or so steps. rho is [8]'s gamma."""
    settings = dict(betas=(0.965, 0.99), rho=0.04)

    def update_hessian(self, logits):
        """h <- beta2 h + (1 - beta2) N g^2 ([8] Alg. 2), g of labels sampled from logits (N, V)."""
        labels = torch.multinomial(logits.detach().softmax(dim=-1), 1).squeeze(1)  # (N,)
        F.cross_entropy(logits, labels).backward()
        for group in self.param_groups:
            for w in group["params"]:
                h = self.state[w].setdefault("h", torch.zeros_like(w))
                h.lerp_(WORLD * len(logits) * w.grad.square(), 1 - group["betas"][1])
        self.zero_grad()

    def update(self, g, group, m, h):
        m.lerp_(g, 1 - group["betas"][0])  # m <- beta1 m + (1 - beta1) g
        return (m / (group["rho"] * h).clamp(min=1e-15)).clamp(-1, 1)


class Muon(DecayingOptimizer):
    """Muon [9]: momentum, made orthogonal, so that rare directions move as far as common ones. For
    the matrices of hidden layers. split=[rows, ...] treats a fused qkv as three matrices."""
    settings = dict(momentum=0.95, split=None)

    def add_param_group(self, group):
        super().add_param_group(group)
        if wrong := [tuple(w.shape) for w in group["params"] if w.dim() != 2]:
            raise ValueError(f"Muon wants matrices, not shapes of {wrong}")

    def update(self, g, group, m):
        m.lerp_(g, 1 - group["momentum"])  # m <- mu m + (1 - mu) g
        u = g.lerp(m, group["momentum"])  # Nesterov: the same average once again
        parts = [newton_schulz(part) for part in u.split(group["split"] or len(u))]
        return torch.cat([max(1, p.size(0) / p.size(1)) ** 0.5 * p for p in parts])


def newton_schulz(g, steps=5):
    """About U V^T of g = U S V^T: a step does s <- a s + b s^3 + c s^5 to each singular value s."""
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
    attn = model.transformer.h[0].attn
    for name, p in model.named_parameters():
        if c.optimizer == "muon" and ".h." in name and p.dim() == 2:
            split = [n * attn.D for n in attn.heads] if "c_attn" in name else None
            hidden.append(dict(params=[p], split=split))
        else:
            (matrices if p.dim() == 2 else vectors).append(p)
    groups = [dict(params=matrices, weight_decay=c.weight_decay), dict(params=vectors)]
    if c.optimizer in ("lion", "sophia"):
        return [(Lion if c.optimizer == "lion" else SophiaG)(groups, c.lr)]
    # AdamW [6]: u = m / (sqrt(v) + eps). Adam with L2 adds wd w to g: sqrt(v) then divides it too
    kind = torch.optim.Adam if c.optimizer == "adam" else torch.optim.AdamW
    adam = kind(groups, c.lr / 5 if hidden else c.lr, (0.9, c.beta2), weight_decay=0.0, fused=True)
    return [Muon(hidden, c.lr, weight_decay=c.weight_decay), adam] if hidden else [adam]


def learning_rate(step, peak, warmup, steps):
    """Linear warm-up to peak, then half a cosine down to 0 (arXiv 1608.03983 eq. 5)."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = min(1, (step - warmup) / max(1, steps - warmup))
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


# ---- Data: lists of token ids and of labels. Labels are the ids, but -100 for prompts: no loss
SHAKESPEARE = "https://github.com/karpathy/char-rnn/raw/master/data/tinyshakespeare/input.txt"
LEARNING_RATES = dict(muon=0.03, adamw=0.008, adam=0.016, lion=0.002, sophia=0.001)  # see README
CHOICES = dict(tokenizer=("bytes", "gpt2"), pos=("learned", "rope"), optimizer=LEARNING_RATES,
               dtype=("auto", "float32", "bfloat16"))
TEMPLATE = "### Instruction:\n{}\n\n### Response:\n"


def make_tokenizer(vocab_size):
    """gpt2's byte pairs ([2] 2.2), or 256 bytes. One more id, eot_token, ends a text."""
    if vocab_size == 50257:
        return tiktoken.get_encoding("gpt2")
    return tiktoken.Encoding("bytes", pat_str=r"[\s\S]", special_tokens={"<|endoftext|>": 256},
                             mergeable_ranks={bytes([i]): i for i in range(256)})


def load_data(c, tokenizer):
    """(ids, labels) to train on, and the last tenth of them to validate on."""
    path, encode, stop = Path(c.data), tokenizer.encode_ordinary, [tokenizer.eot_token]
    ids, labels, files = [], [], [path]
    if path.suffix == ".bin":
        ids = labels = np.memmap(path, np.uint16, mode="r")  # read as needed
        assert ids[1:10**6:2].any() and ids[:10**6].max() < tokenizer.n_vocab, f"{path}: wrong ids"
    elif path.suffix.lower() == ".jsonl":
        for line in filter(str.strip, path.read_text(encoding="utf-8-sig").split("\n")):
            row = json.loads(line)
            prompt = row.get("prompt") or f"{row['instruction']}\n\n{row.get('input') or ''}"
            answer = row["response"] if "response" in row else row["output"]
            prompt, answer = encode(TEMPLATE.format(prompt.strip())), encode(answer) + stop
            ids += prompt + answer
            labels += [-100] * len(prompt) + answer
    else:
        if c.data == "python":
            files = sorted(Path(os.__file__).parent.glob("*.py"))
        elif c.data == "shakespeare":
            files = [download(SHAKESPEARE, Path(c.data_dir) / "tinyshakespeare.txt", "86c4e6aa")]
        for file in files:
            ids += encode(file.read_text(encoding="utf-8")) + stop
        labels = ids
    cut = round(0.9 * len(ids))
    assert len(ids) - cut > c.block_size, f"--data {path}: too few tokens for this --block_size"
    return (ids[:cut], labels[:cut]), (ids[cut:], labels[cut:])


def get_batch(data, starts, c):
    """Inputs x (B, T) from each start, and targets y (B, T): the labels one place further on."""
    (ids, labels), T = data, c.block_size
    x = np.stack([ids[i:i + T] for i in starts]).astype(np.int64)
    y = np.stack([labels[i + 1:i + 1 + T] for i in starts]).astype(np.int64)
    return torch.from_numpy(x).to(c.device), torch.from_numpy(y).to(c.device)


# ---- Evaluation, samples, training
@torch.no_grad()
def evaluate(model, data, c, autocast):
    """Mean loss in nats per target, over disjoint windows with 262,144 tokens in all at most."""
    model.eval()
    starts = range(0, len(data[0]) - c.block_size, c.block_size)
    starts = starts[::max(1, len(starts) * c.block_size // 2**17)]
    nats, targets = 0.0, 0
    for i in range(0, len(starts), c.batch_size):
        x, y = get_batch(data, starts[i:i + c.batch_size], c)
        with autocast:
            _, loss = model(x, y)
        nats += loss.item() * (y >= 0).sum().item()
        targets += (y >= 0).sum().item()
    return nats / targets


def sample(model, tokenizer, c):
    torch.manual_seed(c.seed)
    ids = tokenizer.encode_ordinary(TEMPLATE.format(c.prompt) if c.instruct else c.prompt)
    idx = torch.tensor([ids or [tokenizer.eot_token]], device=c.device)  # (1, T)
    idx = model.generate(idx, c.sample_tokens, c.temperature, c.top_k, c.top_p, tokenizer.eot_token)
    return tokenizer.decode(idx[0].tolist(), errors="backslashreplace")


@dataclasses.dataclass
class Config:
    data: str = "python"  # its standard library; shakespeare; a text, .jsonl or .bin (uint16 ids)
    data_dir: str = "data"  # where downloads land
    out: str = "out/gpt2"
    tokenizer: str = "bytes"
    init: str = ""  # gpt2, ..., gpt2-xl or a path: overrides the shape, except for block_size
    n_layer: int = 3
    n_head: int = 3
    n_kv_head: int = 0  # 0: n_head
    n_embd: int = 96
    block_size: int = 128
    pos: str = "rope"
    dropout: float = 0.0
    optimizer: str = "muon"
    lr: float = 0.03  # peak; each optimizer has its own in LEARNING_RATES, --init 3e-5
    warmup: int = 100  # steps
    weight_decay: float = 0.1
    beta2: float = 0.99  # of Adam; 0.95 for batches of half a million tokens
    batch_size: int = 8  # sequences in a micro-batch
    grad_accum: int = 1  # micro-batches in a step, on each rank
    steps: int = 1800
    eval_every: int = 300  # steps between evaluations, each with a checkpoint and a sample
    log_every: int = 10
    seed: int = 1337
    resume: bool = False  # go on from ckpt.pt in --out; repeat the run's other flags
    device: str = "auto"
    dtype: str = "auto"
    compile: bool = False
    wandb: bool = False
    sample_only: bool = False  # from --init, else from ckpt.pt in --out
    prompt: str = "\n"
    instruct: bool = False  # the prompt is an instruction, as in .jsonl
    sample_tokens: int = 256
    temperature: float = 0.8
    top_k: int = 0  # 0: off
    top_p: float = 0.0  # 0: off


def start_log(c, step):
    """Write config.json, and cut log.jsonl back to the step: to nothing if it is 0."""
    path = Path(c.out) / "log.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name("config.json").write_text(json.dumps(vars(c), indent=2))
    lines = path.read_text().splitlines(keepends=True) if step else []
    lines = [line for line in lines if json.loads(line)["step"] <= step and "final" not in line]
    path.write_text("".join(lines))


def log(c, **row):
    if RANK == 0:
        print(" | ".join(f"{name} {value:.6g}" for name, value in row.items()), flush=True)
        with open(f"{c.out}/log.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        if c.wandb:
            import wandb  # pip install wandb
            (wandb.run or wandb.init(project="gpt2", config=vars(c))).log(row)


def save(path, state):
    """Write a checkpoint whole or not at all."""
    torch.save(state, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def training_step(model, optimizers, data, c, step, autocast):
    """One update; returns this rank's loss. Two ranks read what one would at twice grad_accum."""
    model.train()
    torch.manual_seed(c.seed * 1_000_003 + step * WORLD + RANK)  # for dropout and Sophia's labels
    rng = np.random.default_rng((c.seed, step))
    starts = rng.integers(len(data[0]) - c.block_size, size=(c.grad_accum, WORLD, c.batch_size))
    batches = [get_batch(data, row, c) for row in starts[:, RANK]]
    if c.optimizer == "sophia" and step % 10 == 0:
        with autocast:
            logits, _ = model(*batches[0])
        optimizers[0].update_hessian(logits.flatten(0, 1).float())  # all tokens: ranks agree
    tokens = sum((y >= 0).sum() for _, y in batches)
    if WORLD > 1:
        torch.distributed.all_reduce(tokens)
    total = 0.0
    for x, y in batches:
        with autocast:  # weighted by its share of the step's targets; DDP divides by WORLD
            loss = model(x, y)[1] * ((y >= 0).sum() / tokens.clamp(min=1) * WORLD)
        loss.backward()
        total += loss.item()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, optimizer.defaults["lr"], c.warmup, c.steps)
        optimizer.step()
        optimizer.zero_grad()
    return total


def train(c):
    if c.device == "auto":  # cuda or mps
        c.device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    kind = torch.device(c.device).type
    bf16 = c.dtype == "bfloat16" or (c.dtype == "auto" and kind == "cuda" and
                                     torch.cuda.is_bf16_supported(including_emulation=False))
    autocast = torch.autocast(kind, torch.bfloat16, enabled=bf16)
    if kind == "cuda":
        torch.cuda.set_device(RANK % torch.cuda.device_count())
    if WORLD > 1:
        torch.distributed.init_process_group()  # NCCL, and gloo on a CPU
    torch.manual_seed(c.seed)
    if c.init:
        raw = GPT.from_pretrained(c.init, c.data_dir, c.dropout)  # before compile and DDP
    else:
        raw = GPT(GPTConfig(c.block_size, dict(bytes=257, gpt2=50257)[c.tokenizer], c.n_layer,
                            c.n_head, c.n_embd, c.n_kv_head, c.pos, c.dropout))
    tokenizer = make_tokenizer(raw.config.vocab_size)
    if c.sample_only:
        return print(sample(raw.to(c.device, torch.bfloat16 if bf16 else None), tokenizer, c))
    data, val_data = load_data(c, tokenizer)
    optimizers = make_optimizers(raw.to(c.device), c)
    step, best, seconds = 0, math.inf, 0.0
    if c.resume:
        saved = torch.load(f"{c.out}/ckpt.pt", c.device, weights_only=True)
        assert saved["config"]["data"] == c.data, f"ckpt.pt has --data {saved['config']['data']}"
        for optimizer, state in zip(optimizers, saved["optimizer"], strict=True):
            optimizer.load_state_dict(state)
        step, best, seconds = saved["step"], saved["best"], saved["seconds"]
    assert step < c.steps, f"--steps {c.steps}, but the run is at step {step}"
    if RANK == 0:
        start_log(c, step)
    model = torch.compile(raw) if c.compile else raw
    model = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    while step < c.steps:
        started = time.perf_counter()
        loss = training_step(model, optimizers, data, c, step, autocast)
        duration = time.perf_counter() - started
        assert math.isfinite(loss), f"loss is {loss} at step {step}"
        step, seconds = step + 1, seconds + duration
        if step % c.log_every == 0:
            log(c, step=step, loss=loss, lr=optimizers[0].param_groups[0]["lr"], seconds=seconds,
                tokens_per_s=c.grad_accum * WORLD * c.batch_size * c.block_size / duration)
        if step % c.eval_every == 0 or step == c.steps:
            val_loss = evaluate(raw, val_data, c, autocast)
            log(c, step=step, seconds=seconds, val_loss=val_loss)
            best = min(val_loss, best)
            if RANK == 0:
                print(sample(raw, tokenizer, c))
                state = dict(model=raw.state_dict(), model_args=vars(raw.config), config=vars(c),
                             optimizer=[optimizer.state_dict() for optimizer in optimizers],
                             step=step, best=best, seconds=seconds)
                if val_loss == best:
                    save(f"{c.out}/best.pt", state)
                save(f"{c.out}/ckpt.pt", state)
    log(c, step=step, seconds=seconds, val_loss=val_loss, best_val_loss=best, final=True)
    if WORLD > 1:
        torch.distributed.destroy_process_group()


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
    parser.set_defaults(lr=LEARNING_RATES[parser.parse_args(argv).optimizer])
    if parser.parse_args(argv).init:
        parser.set_defaults(optimizer="adamw", lr=3e-5)  # gentle on trained weights
    c = Config(**vars(parser.parse_args(argv)))
    if c.resume or (c.sample_only and not c.init):
        c.init = f"{c.out}/ckpt.pt"
    train(c)


if __name__ == "__main__":
    main()
