# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "numpy", "tiktoken", "requests"]
# ///
"""GPT-2: a Transformer decoder that learns to write by predicting the next token, from random weights or OpenAI's on.

All tokens pass through a stack of blocks at once; in each block a token looks at itself and at those before it, never
ahead (attention), and is then worked on alone (MLP). The one objective is the cross-entropy of the next token [1, 2].
Sampling feeds the model its own words; fine-tuning goes on with the same loss on other text, instructions with answers
for example.

    python gpt2.py                                      # offline, learns to write Python from the standard library
    python gpt2.py --sample_only --prompt "def add("    # from that run's best checkpoint
    python gpt2.py --resume --steps 3600                # train on from its last; the rate rises again at first
    python gpt2.py --data shakespeare --out out/shakespeare     # downloads 1.1 MB
    python gpt2.py --init gpt2 --sample_only --prompt "The meaning of life is"      # OpenAI's weights, 548 MB
    python gpt2.py --init gpt2 --eval_only --data my.txt
    python gpt2.py --init gpt2 --data my.jsonl --optimizer adamw --lr 3e-5 --block_size 512      # instructions
    torchrun --nproc_per_node=8 gpt2.py --data tokens/ --tokenizer gpt2 --pos learned --n_layer 12 --n_head 12 \\
        --n_embd 768 --block_size 1024 --batch_size 32 --grad_accum 2 --optimizer adamw --lr 6e-4 --beta2 0.95 \\
        --warmup 700 --steps 19000 --compile      # 124M on 10 billion tokens in *.bin of uint16 ids; not yet run

What to expect (torch 2.13.0, two cores of an AMD EPYC, fp32, no compile, seed 1337, n = 1; logs in assets/logs/gpt2/):
- python gpt2.py: val loss 1.313 (1.894 bits per byte) on Python 3.11's library, in 170 s of which 136 are training
- Shakespeare by bytes, context 128: val loss 1.565 after 127 s. A plain loop with the well-known small CPU setting
  (4 layers, width 128, 12 × 64, AdamW) is at 1.879 after 141 s: python tests.py BenchGPT2.shakespeare
- Tokens per second 1.04 times the plain loop's, at 124M 1.06 (BenchGPT2.speed); sampling at 124M, batch 1: 17 tokens/s
  in fp32, 35 in bf16 (.sampling); a 3-GB .bin is trained on in 260 MB (.memory): assets/logs/gpt2/benchmarks.txt
- 500 steps on Shakespeare, each learning rate swept on one seed, val loss of three others: Muon 1.779 ± .017, AdamW
  1.974 ± .012, Lion 2.044 ± .024, Sophia 2.090 ± .031, Adam 2.517 ± .096 (as L2 a decay of .1 is too much for it):
  BenchGPT2.optimizers
- GPU: not yet measured. Shakespeare: --n_layer 6 --n_head 6 --n_embd 384 --block_size 256 --batch_size 64 --steps 5000
  --dropout 0.2 --compile. Speed and memory at 124M: --tokenizer gpt2 --n_layer 12 --n_head 12 --n_embd 768 --block_size
  1024 --steps 100, with and without --compile and --grad_checkpoint.

Differs from the papers: rotary positions and Muon, the defaults, are younger; nearest to [1] §4.1 is --tokenizer gpt2
--pos learned --optimizer adamw --weight_decay 0.01 --dropout 0.1. Init is [1] §4.1's with [2] §2.3's scaling; OpenAI's
code has .01 for wpe. About --eval_tokens validation tokens are read at an evaluation, in windows that don't overlap, so
that a token has half a block of context on average.

Shapes: B batch, T tokens (the block), C width, H query heads (H_kv of keys), D = C / H, V vocabulary.

[1] Radford et al. 2018, Improving language understanding by generative pre-training (GPT)
[2] Radford et al. 2019, Language models are unsupervised multitask learners (GPT-2)
[3] Su et al. 2021, RoFormer, arXiv 2104.09864v5        [4] Ainslie et al. 2023, GQA, arXiv 2305.13245v3
[5] Kingma and Ba 2014, Adam, arXiv 1412.6980v9         [6] Loshchilov and Hutter 2017, AdamW, arXiv 1711.05101v3
[7] Chen et al. 2023, Lion, arXiv 2302.06675v4          [8] Liu et al. 2023, Sophia, arXiv 2305.14342v4
[9] Jordan et al. 2024, Muon, kellerjordan.github.io/posts/muon; decay and scale as in github.com/KellerJordan/Muon
"""

import argparse, codecs, contextlib, dataclasses, gc, hashlib, inspect, json, math, mmap, os, re, signal, sys, sysconfig
import time, types, typing
from pathlib import Path

import numpy as np
import requests
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint


class UserError(ValueError):
    """Bad input (status 2) or a failed run (status 1): main prints the message on one line and returns the status."""

    def __init__(self, message, status=2):
        super().__init__(message)
        self.status = status


# ---- config --------------------------------------------------------------------------------------------------------

# Peak learning rates for the default model, from random weights, each the best of a sweep of 500 steps on Shakespeare:
# python tests.py BenchGPT2.optimizers, logs in assets/logs/gpt2/
LEARNING_RATES = dict(adamw=8e-3, adam=1.6e-2, lion=1e-3, sophia=1e-3, muon=3e-2)


@dataclasses.dataclass
class Config:
    # data
    data: str = "python"  # python (the standard library's sources), shakespeare, a text, .bin or .jsonl file, a folder
    data_dir: str = "data"  # where downloads land
    tokenizer: str = "bytes"  # bytes, or gpt2 (byte-pair encoding, [2] §2.2); loaded weights bring their own
    # model: the smallest GPT-2 is 12 layers, 12 heads, width 768, block 1024
    n_layer: int = 3  # blocks
    n_head: int = 3  # query heads
    n_kv_head: int | None = None  # key and value heads; fewer: grouped queries [4]; 1: multi-query; None: n_head
    n_embd: int = 96  # width C
    block_size: int = 128  # context T, in tokens
    pos: str = "rope"  # rope [3], or learned positions as in GPT-2
    dropout: float = 0.0  # GPT had 0.1 ([1] §4.1); a run that sees its data about once needs none
    init: str | None = None  # start from gpt2, gpt2-medium, gpt2-large, gpt2-xl, a .pt or .safetensors file, a folder
    # optimiser
    optimizer: str = "muon"  # adamw, adam (with L2 instead of decay), lion, sophia or muon
    lr: float | None = None  # peak; None: LEARNING_RATES, for small models from scratch; --init gpt2 wants adamw, 3e-5
    adam_lr: float = 6e-3  # peak rate of what muon leaves to AdamW: embeddings, biases, layer norms
    warmup: int = 100  # steps of linear warm-up
    weight_decay: float = 0.1  # on matrices only
    beta2: float = 0.99  # decay of Adam's average of squares: .95 for batches of half a million tokens, more for small
    grad_clip: float = 1.0  # largest norm of the whole gradient; 0: no clipping
    batch_size: int = 8  # sequences per micro-batch
    grad_accum: int = 1  # micro-batches per step and process
    # run
    steps: int = 1800  # updates of the parameters
    stop_at: int | None = None  # end at this step, the schedule unchanged; the evaluation there counts for --patience
    eval_every: int = 300  # steps between evaluations; each is followed by a checkpoint and a sample
    eval_tokens: int = 131072  # about this many validation tokens an evaluation, in whole windows evenly spread; 0: all
    patience: int = 0  # stop after this many evaluations without a new best; 0: never
    log_every: int = 10  # steps between log lines
    seed: int = 1337  # of initial weights, batches, dropout and samples
    out: str = "out/gpt2"  # the run's folder
    resume: bool = False  # go on from out/ckpt.pt, with that run's flags where none are given
    device: str = "auto"  # auto (cuda, then mps, then cpu), or a torch device
    dtype: str = "auto"  # float32, bfloat16 or float16; auto: bfloat16 where the hardware is fast in it
    compile: bool = False  # torch.compile: a wait at first (it needs a C++ compiler on a CPU), then faster steps
    grad_checkpoint: bool = False  # compute each block again in the backward pass: less memory, a third more work
    wandb: bool = False  # log to Weights & Biases too
    # use of a trained model, --init or else out/best.pt
    sample_only: bool = False  # continue the prompt, no training
    eval_only: bool = False  # loss, perplexity and bits per byte of all of --data, no training
    prompt: str = "\n"  # what a sample continues; with --instruct, the instruction that it answers
    instruct: bool = False  # put the prompt into the template of instructions; training on .jsonl sets it
    sample_tokens: int = 256  # length of a sample
    temperature: float = 0.8  # below 1 favours likely tokens; 0 takes the likeliest
    top_k: int | None = None  # sample among the k likeliest
    top_p: float | None = None  # sample among the likeliest that together have this probability
    given = ()  # no field: the names of the flags on the command line, with which loaded weights must agree

    def __post_init__(self):
        self.lr = LEARNING_RATES.get(self.optimizer) if self.lr is None else self.lr
        known = dict(tokenizer=("bytes", "gpt2"), pos=("learned", "rope"), optimizer=tuple(LEARNING_RATES),
                     dtype=("auto", "float32", "bfloat16", "float16"))
        may_be_0 = ("warmup", "weight_decay", "grad_clip", "eval_tokens", "patience", "seed", "temperature", "dropout")
        for name, value in vars(self).items():
            most = {"dropout": 1, "top_p": 1, "beta2": 1 - 1e-9}.get(name, sys.maxsize)
            if value == "" or name in known and value not in known[name]:
                raise UserError(f"--{name} {value!r}: want {' or '.join(known.get(name, ['some text']))}")
            if type(value) in (int, float) and not (0 < value <= most or value == 0 and name in may_be_0):
                up_to = ", below 1" if most == 1 - 1e-9 else f", at most {most}" if most < sys.maxsize else ""
                raise UserError(f"--{name} {value}: want a number {'from' if name in may_be_0 else 'above'} 0{up_to}")
        trains = not (self.sample_only or self.eval_only)
        if self.optimizer == "sophia" and self.dtype == "float16" and trains:
            raise UserError("--optimizer sophia squares small gradients, too small for --dtype float16")
        if any("\ud800" <= letter <= "\udfff" for letter in self.prompt):  # bytes of the command line that are no text
            raise UserError(f"--prompt {self.prompt!r}: want UTF-8")
        if self.resume and not trains:
            raise UserError("--resume trains on; --sample_only and --eval_only read --init, else best.pt: give one")
        if self.resume and self.init:
            raise UserError("--resume goes on from --out and --init starts anew: give one of them")


@dataclasses.dataclass
class GPTConfig:
    """A model's shape, by default that of the smallest GPT-2, 124,439,808 parameters. ValueError if it can't be."""

    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_kv_head: int | None = None
    pos: str = "learned"
    dropout: float = 0.0
    bias: bool = True
    pad_vocab: int = 1  # the embedding has rows up to a multiple of this: 64 suits a GPU's tiles
    grad_checkpoint: bool = False

    def __post_init__(self):
        self.n_kv_head = self.n_head if self.n_kv_head is None else self.n_kv_head
        if min(self.n_head, self.n_kv_head) < 1 or self.n_embd % self.n_head or self.n_head % self.n_kv_head:
            raise UserError(f"n_embd {self.n_embd} must be divisible by n_head {self.n_head}, n_head by n_kv_head "
                            f"{self.n_kv_head}")
        if self.pos not in ("learned", "rope") or (self.pos == "rope" and self.n_embd // self.n_head % 2):
            raise UserError(f"pos {self.pos}, head size {self.n_embd // self.n_head}: want learned, or rope and even")


# ---- model, in Hugging Face's names --------------------------------------------------------------------------------

def rotate(x, start=0, base=10000.0):
    """Rotary positions [3]: turn each pair (x_i, x_{i+D/2}) of x (B, H, T, D) by an angle proportional to the position.

    Positions enter q·k through their distance alone. [3] eq. 34 pairs neighbours, x_{2i} with x_{2i+1}; halves, as in
    GPT-NeoX and Hugging Face's Llama (Meta's own pairs neighbours), are the same up to a permutation of the weights.
    """
    T, D = x.shape[-2:]
    # always fp32: bf16 keeps 8 bits and could not tell position 256 from 257
    frequency = base ** (-torch.arange(0, D, 2, dtype=torch.float32, device=x.device) / D)  # (D/2,), θ_i of [3] eq. 15
    angle = torch.arange(start, start + T, dtype=torch.float32, device=x.device)[:, None] * frequency  # (T, D/2)
    cos, sin, (a, b) = angle.cos(), angle.sin(), x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


class CausalSelfAttention(nn.Module):
    """softmax(q kᵀ / √D) v over the past, in n_head subspaces at once; x (B, T, C) -> (B, T, C)."""

    def __init__(self, c):
        super().__init__()
        self.n_head, self.n_kv_head, self.dropout, self.rope = c.n_head, c.n_kv_head, c.dropout, c.pos == "rope"
        self.split = [c.n_embd, c.n_embd // c.n_head * c.n_kv_head, c.n_embd // c.n_head * c.n_kv_head]
        self.c_attn = nn.Linear(c.n_embd, sum(self.split), bias=c.bias)  # q, k and v in one multiplication
        self.c_proj = nn.Linear(c.n_embd, c.n_embd, bias=c.bias)

    def forward(self, x, cache=None, start=0):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, -1, C // self.n_head).transpose(1, 2)  # (B, H, T, D), and twice (B, H_kv, T, D)
                   for t in self.c_attn(x).split(self.split, dim=-1))
        if self.rope:
            q, k = rotate(q, start), rotate(k, start)
        if cache is not None:  # (2, B, H_kv, size, D): keys, already rotated, and values of the positions before start
            cache[:, :, :, start:start + T] = torch.stack((k, v))
            k, v = cache[:, :, :, :start + T]  # (B, H_kv, start + T, D) each
        if self.n_kv_head < self.n_head:  # one key head serves a group of query heads [4]
            k, v = (t.repeat_interleave(self.n_head // self.n_kv_head, dim=1) for t in (k, v))  # (B, H, start + T, D)
        # Torch aligns is_causal top-left: query 0 would see key 0 alone. A single query behind cached keys sees them
        # all, so it must not ask for it; several (start > 0 and T > 1) would come out wrong. The fused kernel never
        # writes the (T, T) matrix to memory.
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout * self.training, is_causal=T > 1)
        return F.dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)), self.dropout, self.training)


class MLP(nn.Module):
    """Four times wider and back, each token alone. GPT-2's GELU is the tanh form, up to 5e-4 from the exact one."""

    def __init__(self, c):
        super().__init__()
        self.dropout = c.dropout
        self.c_fc = nn.Linear(c.n_embd, 4 * c.n_embd, bias=c.bias)
        self.c_proj = nn.Linear(4 * c.n_embd, c.n_embd, bias=c.bias)

    def forward(self, x):
        return F.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")), self.dropout, self.training)


class TransformerBlock(nn.Module):
    """Attention, then MLP; each reads a normalised copy of the residual stream x and adds to x ([2] §2.3)."""

    def __init__(self, c):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(c.n_embd, eps=1e-5, bias=c.bias), CausalSelfAttention(c)
        self.ln_2, self.mlp = nn.LayerNorm(c.n_embd, eps=1e-5, bias=c.bias), MLP(c)

    def forward(self, x, cache=None, start=0):
        x = x + self.attn(self.ln_1(x), cache, start)
        return x + self.mlp(self.ln_2(x))


OFFICIAL = {name: f"https://huggingface.co/openai-community/{name}/resolve/main/model.safetensors"
            for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
# stored transposed by Hugging Face, whose Conv1D computes x w; and what a config.json there must not contradict
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
HF_SETTINGS = dict(activation_function="gelu_new", layer_norm_epsilon=1e-5, scale_attn_weights=True,
                   scale_attn_by_inverse_layer_idx=False, tie_word_embeddings=True)


class GPT(nn.Module):
    """model(idx (B, T)) -> (logits (B, 1, V) of the token after the last, None). With targets (B, T), in which -100 is
    ignored: (logits (B, T, V), mean cross-entropy in nats); V is rounded up to a multiple of pad_vocab."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        rows = math.ceil(c.vocab_size / c.pad_vocab) * c.pad_vocab
        self.transformer = nn.ModuleDict(dict(wte=nn.Embedding(rows, c.n_embd)))
        if c.pos == "learned":
            self.transformer["wpe"] = nn.Embedding(c.block_size, c.n_embd)
        self.transformer["h"] = nn.ModuleList(TransformerBlock(c) for _ in range(c.n_layer))
        self.transformer["ln_f"] = nn.LayerNorm(c.n_embd, eps=1e-5, bias=c.bias)
        self.lm_head = nn.Linear(c.n_embd, rows, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied: one matrix takes tokens in and out
        for name, p in self.named_parameters():
            if p.dim() == 2:  # 2L layers add to the residual stream: 1/√(2L) keeps its size at any depth ([2] §2.3)
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.n_layer) if name.endswith("c_proj.weight") else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx, targets=None, cache=None, start=0):
        (B, T), c = idx.shape, self.config
        if start + T > c.block_size:
            raise UserError(f"{start + T} tokens do not fit the block of {c.block_size}")
        x = self.transformer.wte(idx)  # (B, T, C)
        if c.pos == "learned":
            x = x + self.transformer.wpe(torch.arange(start, start + T, device=idx.device))
        x = F.dropout(x, c.dropout, self.training)
        for i, block in enumerate(self.transformer.h):
            if c.grad_checkpoint and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, None if cache is None else cache[i], start)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, -1:]), None  # (B, 1, V): the last position is all that sampling needs
        logits = self.lm_head(x)  # (B, T, V)
        return logits, F.cross_entropy(logits.view(B * T, -1), targets.reshape(B * T), ignore_index=-100)

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=None, generator=None):
        """Yield the next token (B, 1) of each sequence, again and again; arguments and errors as generate's."""
        k, p = 1 if top_k is None else top_k, 1 if top_p is None else top_p
        if not idx.size(1) or max_new_tokens < 0 or not temperature >= 0 or k < 1 or not 0 < p <= 1:  # nan fails too
            raise UserError(f"need a prompt, max_new_tokens and temperature >= 0, top_k >= 1, 0 < top_p <= 1, not "
                            f"{idx.size(1)} tokens, {max_new_tokens}, {temperature}, {top_k}, {top_p}")
        c, B, training, weight = self.config, idx.size(0), self.training, self.transformer.wte.weight
        size = min(c.block_size, idx.size(1) + max_new_tokens)
        cache = weight.new_zeros(c.n_layer, 2, B, c.n_kv_head, size, c.n_embd // c.n_head)  # every layer's keys, values
        start, done = 0, torch.zeros(B, 1, dtype=torch.bool, device=idx.device)  # start: positions in the cache
        self.eval()  # dropout off
        try:
            for _ in range(max_new_tokens):
                if 0 < start < c.block_size:
                    window = idx[:, -1:]
                else:  # the prompt; and, once the block is full, each time: as the window moves, every position changes
                    window, start = idx[:, -c.block_size:], 0
                logits = self(window, None, cache, start)[0][:, -1, :c.vocab_size].float()  # (B, V), without padded ids
                start += window.size(1)
                token = sample_token(logits, temperature, top_k, top_p, generator)  # (B, 1)
                if stop is not None:
                    token = token.masked_fill(done, stop)
                    done |= token == stop
                idx = torch.cat((idx, token), dim=1)
                yield token
                if done.all():
                    return
        finally:
            self.train(training)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=None, generator=None):
        """Continue idx (B, T) to (B, T + max_new_tokens), or until all have had the token stop, which fills up those
        that ended early. Temperature 0 takes the likeliest token. Raises ValueError on settings out of range."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, temperature, top_k, top_p, stop, generator)], dim=1)

    @classmethod
    def from_pretrained(cls, name_or_path, data_dir="data", **switches):
        """Official weights by name (OFFICIAL), or a folder with config.json and model.safetensors, a .safetensors file,
        a .pt checkpoint. switches change GPTConfig. Raises ValueError on what is broken or does not fit."""
        path, settings = Path(name_or_path), {}
        if name_or_path in OFFICIAL:
            path = download(OFFICIAL[name_or_path], Path(data_dir) / name_or_path / "model.safetensors")
        with one_line(f"can't load {path}"):
            if path.suffix == ".pt":
                saved = load_checkpoint(path)
                shape, state = saved["model_config"], saved["model"]
            else:
                if path.is_dir():
                    settings, path = json.loads((path / "config.json").read_text()), path / "model.safetensors"
                wrong = {k: settings[k] for k, v in HF_SETTINGS.items() if settings.get(k, v) != v}
                if wrong or switches.get("pos", "learned") != "learned" or switches.get("n_kv_head"):
                    raise UserError(f"{path}: GPT-2 has learned positions, a key head per query head and "
                                    f"{HF_SETTINGS}, not {wrong or switches}")
                shape, state = load_safetensors(path)
                shape["n_head"] = settings.get("n_head", max(1, shape["n_embd"] // 64))
            model = cls(GPTConfig(**{**shape, **switches}))
            model.load_state_dict(state, strict=True)
        return model

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors, which Hugging Face's GPT2LMHeadModel opens. Raises ValueError on
        what it does not know: rotary positions, grouped queries, no biases."""
        c, folder, header, offset = self.config, Path(folder), {"__metadata__": {"format": "pt"}}, 0
        if c.pos != "learned" or c.n_kv_head != c.n_head or not c.bias:
            raise UserError("Hugging Face's GPT-2 has learned positions, a key head per query head, and biases")
        weights = {name: w.t() if name.endswith(CONV1D) else w for name, w in self.state_dict().items()}
        weights["transformer.wte.weight"] = weights.pop("lm_head.weight")[:c.vocab_size]  # tied, and without padding
        for name, w in weights.items():
            header[name] = dict(dtype="F32", shape=list(w.shape), data_offsets=[offset, offset + 4 * w.numel()])
            offset += 4 * w.numel()
        head = json.dumps(header).encode()
        head += b" " * (-len(head) % 8)  # aligns the data
        data = (w.cpu().float().contiguous().numpy() for w in weights.values())
        settings = dict(HF_SETTINGS, model_type="gpt2", architectures=["GPT2LMHeadModel"], vocab_size=c.vocab_size,
                        n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
                        embd_pdrop=c.dropout, attn_pdrop=c.dropout, resid_pdrop=c.dropout, bos_token_id=None,
                        eos_token_id=None)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "model.safetensors", len(head).to_bytes(8, "little"), head, *data)
        write_atomic(folder / "config.json", json.dumps(settings, indent=2).encode())


def sample_token(logits, temperature, top_k, top_p, generator):
    """A token id (B, 1) drawn from logits (B, V)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    ids = None
    if top_k or top_p:  # sorted, and exactly k: a comparison with the k-th value would let ties in
        logits, ids = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))
    probs = ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).softmax(dim=-1)  # no overflow near 0
    if top_p:  # out goes a token if those before it have top_p already; the one that crosses the line stays
        probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, 0.0)
    choice = torch.multinomial(probs, 1, generator=generator)  # it divides by the sum itself
    return choice if ids is None else ids.gather(-1, choice)


# ---- optimisers: θ the parameters, g their gradient, m the momentum, η the learning rate, λ the weight decay -------

def with_gradients(optimizer):
    """(parameter, its state, its group) for all that have a gradient."""
    every = ((p, group) for group in optimizer.param_groups for p in group["params"])
    return [(p, optimizer.state[p], group) for p, group in every if p.grad is not None]


def buffer(state, name, p):
    """The tensor of this name in an optimizer's state of the parameter p, zeros at first."""
    if name not in state:
        state[name] = torch.zeros_like(p)
    return state[name]


class Lion(torch.optim.Optimizer):
    """Lion [7]: every coordinate moves by η, against the sign of a momentum. One buffer where Adam has two."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for p, state, group in with_gradients(self):
            m, lr, (beta1, beta2) = buffer(state, "momentum", p), group["lr"], group["betas"]
            p.mul_(1 - lr * group["weight_decay"])
            p.sub_(torch.sign(m.lerp(p.grad, 1 - beta1)), alpha=lr)  # θ ← θ − η (sign(β₁ m + (1 − β₁) g) + λθ)
            m.lerp_(p.grad, 1 - beta2)  # m ← β₂ m + (1 − β₂) g, after the step, with a longer memory: [7] Alg. 2


class SophiaG(torch.optim.Optimizer):
    """Sophia-G [8]: momentum over an estimate h of the Hessian's diagonal, the quotient clipped to ±1.

    update_hessian comes before the first step and then every ten steps or so. It wants the gradient ĝ of the mean loss
    over B tokens (here B is not the batch) whose labels were drawn from the model's own prediction
    (Gauss-Newton-Bartlett): h ≈ E[B ĝ²].
    rho is [8]'s γ, so named and with this default in the authors' code, as are the betas.
    """

    def __init__(self, params, lr=1e-3, betas=(0.965, 0.99), rho=0.04, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, rho=rho, weight_decay=weight_decay))

    @torch.no_grad()
    def update_hessian(self, tokens):
        for p, state, group in with_gradients(self):
            h = buffer(state, "hessian", p)
            h.lerp_(tokens * p.grad.square(), 1 - group["betas"][1])  # h ← β₂ h + (1 − β₂) B ĝ², [8] Alg. 2 and 3

    @torch.no_grad()
    def step(self, closure=None):
        for p, state, group in with_gradients(self):
            m = buffer(state, "momentum", p).lerp_(p.grad, 1 - group["betas"][0])
            h = buffer(state, "hessian", p)
            p.mul_(1 - group["lr"] * group["weight_decay"])  # θ ← θ − η λ θ, then θ ← θ − η clip(m / max(ρh, ε), 1)
            p.sub_((m / (group["rho"] * h).clamp(min=1e-15)).clamp(-1, 1), alpha=group["lr"])  # [8] Alg. 3


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


class Muon(torch.optim.Optimizer):
    """Muon [9]: momentum, each matrix of it made orthogonal, so that rare directions move as far as common ones.

    For hidden matrices alone. split=[rows, ...] in a group cuts its matrices: a fused qkv is three of them.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0, split=None):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, split=split))

    @torch.no_grad()
    def step(self, closure=None):
        by_shape = {}  # matrices of one shape go through newton_schulz as a batch
        for p, state, group in with_gradients(self):
            mu, rows = group["momentum"], group["split"] or p.size(0)
            m = buffer(state, "momentum", p).lerp_(p.grad, 1 - mu)  # m ← μ m + (1 − μ) g
            ahead = p.grad.lerp(m, mu)  # Nesterov: μ m + (1 − μ) g once more
            p.mul_(1 - group["lr"] * group["weight_decay"])
            for part, o in zip(p.split(rows), ahead.split(rows)):
                by_shape.setdefault(part.shape, []).append((part, o, group["lr"]))
        for (rows, columns), items in by_shape.items():
            for (part, _, lr), o in zip(items, newton_schulz(torch.stack([o for _, o, _ in items]))):
                part.sub_(o, alpha=lr * max(1, rows / columns) ** 0.5)  # θ ← θ − η √max(1, rows / columns) U Vᵀ


def make_optimizers(model, c):
    """Optimizers (a list) that together have every parameter once, and decay matrices only."""
    blocks, muon = model.transformer.h, c.optimizer == "muon"
    taken = {id(p) for p in blocks.parameters() if p.dim() == 2 and muon}
    rest = [p for p in model.parameters() if id(p) not in taken]
    groups = [dict(params=[p for p in rest if p.dim() >= 2], weight_decay=c.weight_decay),
              dict(params=[p for p in rest if p.dim() < 2], weight_decay=0.0)]
    adam = dict(betas=(0.9, c.beta2), fused=rest[0].device.type in ("cpu", "cuda"))  # fused: one kernel for all
    if c.optimizer == "adamw":  # θ ← θ − η (m̂ / (√v̂ + ε) + λθ); in [6] Alg. 2 the peak rate is on m̂ alone
        optimizers = [torch.optim.AdamW(groups, lr=c.lr, **adam)]
    elif c.optimizer == "adam":  # [5] with L2, g ← g + λθ: the decay is divided by √v̂ as well, the point of [6]
        optimizers = [torch.optim.Adam(groups, lr=c.lr, **adam)]
    elif muon:
        others = [w for b in blocks for w in (b.attn.c_proj.weight, b.mlp.c_fc.weight, b.mlp.c_proj.weight)]
        hidden = [dict(params=[b.attn.c_attn.weight for b in blocks], split=blocks[0].attn.split), dict(params=others)]
        optimizers = [Muon(hidden, lr=c.lr, weight_decay=c.weight_decay),
                      torch.optim.AdamW(groups, lr=c.adam_lr, **adam)]
    else:
        optimizers = [dict(lion=Lion, sophia=SophiaG)[c.optimizer](groups, lr=c.lr)]
    return optimizers


def learning_rate(step, peak, warmup, steps, floor=0.0):
    """Linear warm-up to peak, then half a cosine down to floor · peak after the last step (arXiv 1608.03983 eq. 5)."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


# ---- official weights ----------------------------------------------------------------------------------------------

def load_safetensors(path):
    """(GPTConfig's arguments but n_head, state dict) from Hugging Face's model.safetensors. The file: 8 bytes, the
    header's length n; n bytes of JSON with each tensor's dtype, shape and place; data."""
    dtypes = dict(F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, U8=torch.uint8, BOOL=torch.bool)
    with open(path, "rb") as file:
        raw = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # read page by page, as needed
    n, state = int.from_bytes(raw[:8], "little"), {}
    header = json.loads(raw[8:8 + n])
    header.pop("__metadata__", None)
    for name, entry in header.items():
        dtype, shape, (begin, end) = dtypes[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:  # frombuffer raises if it ends past the file
            raise ValueError(f"{name} {shape} can't lie at bytes {begin} to {end}")
        w = torch.frombuffer(raw, dtype=dtype, count=math.prod(shape), offset=8 + n + begin).view(shape)
        if not name.endswith((".attn.bias", ".attn.masked_bias")):  # causal masks, kept as buffers once
            # They have Conv1D, x w, where we have Linear, x wᵀ. attn.c_proj is square: untransposed it would load, too.
            state["transformer." + name.removeprefix("transformer.")] = w.t() if name.endswith(CONV1D) else w
    wte = state["transformer.wte.weight"]
    if not torch.equal(state.setdefault("lm_head.weight", state.pop("transformer.lm_head.weight", wte)), wte):
        raise ValueError("its lm_head is not tied to wte")
    return dict(vocab_size=wte.size(0), n_embd=wte.size(1), block_size=state["transformer.wpe.weight"].size(0),
                n_layer=1 + max(int(name.split(".")[2]) for name in state if ".h." in name)), state


# ---- data ----------------------------------------------------------------------------------------------------------

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_CHECKSUM = "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def make_tokenizer(name):
    """vocab_size, stop (the id that ends a text), encode(text) -> uint16 ids, decode(id) -> bytes.

    bytes: a token is a byte of UTF-8, and byte 0, which no text has, ends one. gpt2: [2] §2.2, by tiktoken.
    """
    if name == "bytes":
        return types.SimpleNamespace(vocab_size=256, stop=0, decode=lambda i: bytes([i]),
                                     encode=lambda text: np.frombuffer(text.encode(), np.uint8).astype(np.uint16))
    with one_line("GPT-2's vocabulary can't be had: use --tokenizer bytes, or set TIKTOKEN_CACHE_DIR to where it is"):
        import tiktoken
        bpe = tiktoken.get_encoding("gpt2")
    return types.SimpleNamespace(vocab_size=50257, stop=50256, decode=bpe.decode_single_token_bytes,
                                 encode=lambda text: np.array(bpe.encode_ordinary(text), np.uint16))


class Tokens:
    """Arrays of token ids, perhaps on disk, read in windows of T + 1 that never cross from one array into the next: x
    (B, T) and y (B, T), the tokens after x. The prompts of .jsonl rows are stored as ~id = -1 - id, which is negative:
    the model reads such a token but doesn't learn to predict it: y has -100 there."""

    def __init__(self, arrays, T, vocab_size):
        self.arrays, self.T, self.vocab_size, self.size = arrays, T, vocab_size, sum(map(len, arrays))
        self.refuse(max((int(a[:10**6].max(initial=0)) for a in arrays), default=0))  # early, on what is quick to read
        # running sums from 0 over the arrays: places where a window can start, and windows side by side
        self.draws = np.cumsum([0, *(max(0, len(a) - T) for a in arrays)])
        self.tiles = np.cumsum([0, *(math.ceil(max(0, len(a) - 1) / T) for a in arrays)])

    def batch(self, seed, batch_size):
        """Windows drawn from all that there are, as seed (a tuple) says."""
        return self.read(self.draws, np.random.default_rng(seed).integers(self.draws[-1], size=batch_size), 1)

    def batches(self, batch_size, limit=None):
        """Every token but an array's first as a target once; limit: at most this many windows, evenly spread."""
        n = int(self.tiles[-1])
        numbers = np.arange(n) if not limit or n <= limit else np.arange(limit) * n // limit
        for i in range(0, len(numbers), batch_size):
            yield self.read(self.tiles, numbers[i:i + batch_size], self.T)

    def read(self, sums, numbers, stride):
        rows = np.full((len(numbers), self.T + 1), -1)  # ~0: padding, on the right, where causal attention never looks
        for row, number in zip(rows, numbers):
            k = np.searchsorted(sums, number, side="right") - 1
            start = (number - sums[k]) * stride
            window = self.arrays[k][start:start + self.T + 1]
            row[:len(window)] = window
        y, rows = rows[:, 1:], np.where(rows < 0, ~rows, rows)
        self.refuse(rows.max())
        used = np.flatnonzero((y >= 0).any(axis=0))[-1] + 1  # columns of padding alone are left out
        return torch.from_numpy(rows[:, :used]), torch.from_numpy(np.where(y < 0, -100, y)[:, :used])

    def refuse(self, largest):
        if largest >= self.vocab_size:
            raise UserError(f"--data holds token id {largest}, the tokenizer has {self.vocab_size}")


def template(instruction, text=""):
    """What stands before an answer, in training and in sampling alike."""
    text = "### Input:\n" + text + "\n\n" if text else ""
    return "### Instruction:\n" + instruction + "\n\n" + text + "### Response:\n"


def load_rows(path, tokenizer, T):
    """.jsonl rows {"instruction", "input", "output"} or {"prompt", "response"} as arrays of T + 1. The loss is on the
    answer and the stop token behind it. Raises ValueError with the line of a bad row."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip().split("\n"), 1):  # JSON may hold U+2028
        with one_line(f"{path} line {number}: want an object with instruction, input, output or with prompt, response"):
            row = json.loads(line)
            texts = (template(row["prompt"]), row["response"]) if "prompt" in row else (
                template(row["instruction"], row.get("input", "")), row["output"])
            prompt, answer = (tokenizer.encode(text).astype(np.int32) for text in texts)
        if len(prompt) + len(answer) > T:
            raise UserError(f"{path} line {number}: {len(prompt)} + {len(answer)} tokens, --block_size is {T}")
        rows.append(np.concatenate([~prompt, answer, [tokenizer.stop], np.full(T - len(prompt) - len(answer), -1)]))
    return rows


def load_data(data, data_dir, tokenizer, T, fraction=0.9):
    """--data as two Tokens: the first fraction to train on, the rest to validate. Raises ValueError on what is missing,
    not text, or shorter than a block."""
    path, parts = Path(data), ([], [])
    with one_line(f"--data {data} can't be read"):
        if data == "python":
            root, skip = Path(sysconfig.get_paths()["stdlib"]), {"test", "tests", "site-packages", "dist-packages"}
            files = sorted(f for f in root.rglob("*.py") if not skip & set(f.relative_to(root).parts))
        elif data == "shakespeare":
            files = [download(SHAKESPEARE, Path(data_dir) / "tinyshakespeare.txt", SHAKESPEARE_CHECKSUM)]
        else:
            files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file() and not any(
                part.startswith(".") for part in f.relative_to(path).parts))
        if not files:
            raise UserError(f"--data {data}: no such file, nor a folder with files, nor python or shakespeare")
        kinds = {f.suffix for f in files}
        if ".jsonl" in kinds:
            rows = [row for f in files for row in load_rows(f, tokenizer, T)]
            parts = rows[:int(len(rows) * fraction)], rows[int(len(rows) * fraction):]
        else:
            if ".bin" in kinds:  # uint16 ids that stay on disk, split by place: a name like val.bin says nothing
                arrays = [np.memmap(f, np.uint16, mode="r") for f in files if f.suffix == ".bin"]
            else:  # texts, with a stop token between two
                stop, texts = np.array([tokenizer.stop], np.uint16), []
                for f in files:
                    with one_line(f"{f} can't be read as text"):
                        texts += [stop, tokenizer.encode(f.read_text(encoding="utf-8"))]
                arrays = [np.concatenate(texts)[1:]]
            left = int(sum(map(len, arrays)) * fraction)
            for a in arrays:
                parts[0].append(a[:left])
                parts[1].append(a[left:])
                left = max(0, left - len(a))
    train, val = both = [Tokens([a for a in part if len(a)], T, tokenizer.vocab_size) for part in parts]
    if (fraction and not train.draws[-1]) or not val.tiles[-1]:
        raise UserError(f"--data {data}: {train.size} tokens to train on and {val.size} to validate are too few for "
                        f"--block_size {T}")
    return both


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


# ---- evaluate, sample, train ---------------------------------------------------------------------------------------

PEAK_FLOPS = {"A100": 312e12, "H100 80GB HBM3": 989e12, "H200": 989e12, "4090": 165e12}  # dense bf16, data sheets


@torch.no_grad()
def evaluate(model, data, tokenizer, autocast, batch_size, limit=None):
    """Loss (mean nats per token), perplexity and bits per byte of data, over windows that don't overlap."""
    device = next(model.parameters()).device
    lengths = torch.tensor([len(tokenizer.decode(i)) for i in range(tokenizer.vocab_size)])  # bytes of each token,
    lengths[tokenizer.stop] = 0  # but what ends a text is no part of it
    nats = tokens = size = 0
    model.eval()
    for x, y in data.batches(batch_size, limit):
        with autocast:
            loss = model(x.to(device), y.to(device))[1].item()
        wanted = y[y >= 0]
        nats, tokens, size = nats + loss * len(wanted), tokens + len(wanted), size + lengths[wanted].sum().item()
    model.train()
    loss = nats / tokens
    bits = nats / size / math.log(2) if size else math.nan  # answers may all be empty
    return dict(val_loss=loss, perplexity=math.exp(min(700, loss)), bits_per_byte=bits)


def show(scores):
    """The scores of evaluate on one line."""
    return "val loss {val_loss:.4f} | perplexity {perplexity:.2f} | {bits_per_byte:.4f} bits per byte".format(**scores)


def sample(model, tokenizer, c):
    """Print the prompt and its continuation, token by token."""
    device = next(model.parameters()).device
    text = template(c.prompt) if c.instruct else c.prompt
    idx = torch.from_numpy(tokenizer.encode(text).astype(np.int64))[None].to(device)  # (1, T)
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # a character may need several tokens
    print(text, end="", flush=True)
    for token in model.stream(idx, c.sample_tokens, c.temperature, c.top_k, c.top_p, tokenizer.stop,
                              torch.Generator(device).manual_seed(c.seed)):
        if token.item() != tokenizer.stop:
            text = utf8.decode(tokenizer.decode(token.item()))
            print(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text), end="", flush=True)  # no commands
    print(utf8.decode(b"", final=True))


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


def load_model(c):
    """The model and tokenizer that the flags ask for. Loaded weights bring theirs, and c then says so."""
    names = ("n_layer", "n_head", "n_kv_head", "n_embd", "pos")
    switches = dict(dropout=c.dropout, grad_checkpoint=c.grad_checkpoint)
    source = f"{c.out}/ckpt.pt" if c.resume else c.init
    if source is None:
        tokenizer = make_tokenizer(c.tokenizer)
        shape = {name: getattr(c, name) for name in names}
        return GPT(GPTConfig(c.block_size, tokenizer.vocab_size, **shape, **switches, pad_vocab=64)), tokenizer
    model = GPT.from_pretrained(source, c.data_dir, **switches)
    has = vars(model.config) | {"tokenizer": {256: "bytes", 50257: "gpt2"}.get(model.config.vocab_size)}
    for name in (*names, "tokenizer"):
        if name in c.given and getattr(c, name) != has[name]:
            raise UserError(f"--{name} {getattr(c, name)}, but {source} has {has[name]}")
        setattr(c, name, has[name])
    if c.tokenizer is None:
        raise UserError(f"{source} has {has['vocab_size']} token ids: neither bytes, 256, nor GPT-2's, 50257")
    if "block_size" not in c.given:
        c.block_size = has["block_size"] if c.eval_only else min(c.block_size, has["block_size"])
    if c.block_size > has["block_size"]:
        raise UserError(f"--block_size {c.block_size}, but {source} has {has['block_size']}")
    return model, make_tokenizer(c.tokenizer)


class Run:
    """All that a checkpoint holds, and the folder that keeps it; only the first of several processes writes."""

    def __init__(self, c, model, optimizers, scaler, writes):
        self.c, self.model, self.optimizers, self.scaler, self.writes = c, model, optimizers, scaler, writes
        self.step, self.best, self.worse, self.seconds = 0, math.inf, 0, 0.0  # worse: evaluations since the best
        self.out, self.rows, self.wandb = Path(c.out), [], None
        if c.resume:
            with one_line(f"{c.out}/ckpt.pt can't be resumed"):
                saved = load_checkpoint(self.out / "ckpt.pt")
                if saved["config"]["optimizer"] != c.optimizer:
                    raise UserError(f"--optimizer {c.optimizer}, but it has {saved['config']['optimizer']}'s state")
                for optimizer, state in zip(optimizers, saved["optimizer"]):  # rates and decay as the flags say now
                    optimizer.load_state_dict({**state, "param_groups": optimizer.state_dict()["param_groups"]})
                if saved["scaler"]:
                    scaler.load_state_dict(saved["scaler"])
                vars(self).update({name: saved[name] for name in ("step", "best", "worse", "seconds", "rows")})
        if writes and c.wandb:
            with one_line("--wandb needs: pip install wandb, and wandb login"):
                import wandb
                self.wandb = wandb.init(project="gpt2", config=dataclasses.asdict(c))
        if writes:
            with one_line(f"can't make the folder {self.out}", status=1):
                self.out.mkdir(parents=True, exist_ok=True)
            lines = "".join(json.dumps(row) + "\n" for row in self.rows)  # without what came after the checkpoint
            for name, text in (("config.json", json.dumps(dataclasses.asdict(c), indent=2)), ("log.jsonl", lines)):
                write_atomic(self.out / name, text.encode())

    def check(self, name, value, step):
        if not math.isfinite(value):
            raise UserError(f"{name} is {value} at step {step}: lower --lr (muon: --adam_lr too); {self.out} keeps the "
                            "last checkpoint", 1)

    def log(self, line, **row):
        """A line for people, and a row for log.jsonl and the curves."""
        self.rows.append({"step": self.step, **row})
        if self.writes:
            print(line, flush=True)
            with one_line(f"can't write {self.out}/log.jsonl", status=1), open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")
        if self.wandb:
            self.wandb.log(row, step=self.step)

    def save(self, name):
        if self.writes:
            self.check("a parameter", sum(p.detach().sum() for p in self.model.parameters()).item(), self.step)
            state = dict(model=self.model.state_dict(), model_config=vars(self.model.config), step=self.step,
                         optimizer=[o.state_dict() for o in self.optimizers], scaler=self.scaler.state_dict(),
                         config=dataclasses.asdict(self.c), best=self.best, worse=self.worse, seconds=self.seconds,
                         rows=self.rows)  # and no random state: config's seed and step are all there is to it
            write_atomic(self.out / name, state)


def estimate_hessian(model, sophia, autocast, x, y, world):
    """Sophia's estimate from tokens x (B, T) and their next ones y (B, T), in place of which labels are drawn."""
    with autocast:
        logits = model(x, y)[0].float().flatten(0, 1)  # (B * T, V)
    labels = torch.multinomial(logits.detach().softmax(dim=-1), 1).flatten()  # (B * T,), the model's own
    F.cross_entropy(logits, labels.masked_fill(y.flatten() < 0, -100)).backward()
    tokens = (y >= 0).sum()
    if world > 1:  # ranks have other numbers of answers, and must all arrive at the same estimate
        torch.distributed.all_reduce(tokens)
    sophia.update_hessian(tokens)
    sophia.zero_grad()


def training_step(model, optimizers, scaler, autocast, data, c, step, device, rank, world):
    """One update of the parameters; returns the mean loss, which the device may still be working on.

    Batches and dropout depend on (seed, step) alone: a resumed run goes on as if it had never stopped, on a CPU bit for
    bit. N ranks read the batches that one rank reads with N times the accumulation; their random numbers for dropout
    and Sophia differ.
    """
    torch.manual_seed(int(np.random.SeedSequence((c.seed, step, rank)).generate_state(1)[0]))  # dropout, Sophia
    for optimizer in optimizers:
        for group in optimizer.param_groups:  # peak: the rate that the optimizer was made with
            group["lr"] = learning_rate(step, optimizer.defaults["lr"], c.warmup, c.steps)
    if c.optimizer == "sophia" and step % 10 == 0:
        x, y = (t.to(device) for t in data.batch((c.seed, step, rank), c.batch_size))  # (B, T) each
        estimate_hessian(model, optimizers[0], autocast, x, y, world)
    total = 0.0
    for micro in range(c.grad_accum):
        x, y = (t.to(device) for t in data.batch((c.seed, step, micro * world + rank), c.batch_size))
        if world > 1:  # ranks exchange gradients at the last micro-batch; DDP wants to know before the forward pass
            model.require_backward_grad_sync = micro == c.grad_accum - 1
        with autocast:
            loss = model(x, y)[1] / c.grad_accum  # a mean of means: where answers are few they weigh more
        scaler.scale(loss).backward()
        total += loss.detach()
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip or math.inf)
    for optimizer in optimizers:
        if not scaler.is_enabled() or norm.isfinite():  # fp16 overflowed: no optimizer steps, not only the one it hit
            scaler.step(optimizer)
        optimizer.zero_grad()
    scaler.update()
    return total


def train(c, interrupts=()):
    """Train as the Config c says, into the folder c.out, until interrupts has something in it; returns the status."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, dtype, autocast = pick_device(c.device, c.dtype)
    if world > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if (local := int(os.environ.get("LOCAL_RANK", rank))) > 0:  # a machine's first rank may have to download
        torch.distributed.barrier()
    torch.manual_seed(c.seed)  # the same initial weights on every rank
    raw, tokenizer = load_model(c)
    data, val = load_data(c.data, c.data_dir, tokenizer, c.block_size)
    if local == 0 and world > 1:
        torch.distributed.barrier()
    c.instruct = c.instruct or data.arrays[0].dtype != np.uint16  # signed: rows of .jsonl
    raw.to(device)
    optimizers = make_optimizers(raw, c)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # small gradients would be 0 in fp16
    run = Run(c, raw, optimizers, scaler, writes=rank == 0)
    model = torch.compile(raw) if c.compile else raw  # raw, not compiled, is what samples and is saved
    if world > 1:
        model = nn.parallel.DistributedDataParallel(model)
    size, batch = sum(p.numel() for p in raw.parameters()), c.batch_size * c.grad_accum * world * c.block_size
    flops = 6 * size + 12 * c.n_layer * c.n_embd * c.block_size  # per token, as in PaLM, arXiv 2204.02311, App. B
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    slower = re.search("Laptop|NVL|4090 D", card)  # cards of the same name
    peak = max((value for name, value in PEAK_FLOPS.items() if name in card and not slower), default=None)
    if rank == 0:
        print(" ".join(f"{name}={value!r}" for name, value in dataclasses.asdict(c).items()))
        if c.init in OFFICIAL and c.lr >= 1e-3:
            print(f"--lr {c.lr} is for small models from scratch, spoils {c.init}: --optimizer adamw --lr 3e-5 won't")
        print(f"{size:,} parameters | {data.size:,} tokens to train on, {val.size:,} to validate | {device} {dtype}")

    resumed_at, end = run.step if c.resume else None, min(c.steps, c.stop_at or c.steps)
    clock, logged, pending, stop = time.perf_counter(), run.seconds, [], False
    while True:
        due = (run.step % c.eval_every == 0 or run.step == end) and run.step != resumed_at
        stop = stop or (world == 1 and len(interrupts) > 0)
        if pending and (due or stop or run.step % c.log_every == 0):
            losses = torch.stack([*pending, pending[0].new_tensor(len(interrupts))])
            if world > 1:  # the sum over ranks; a Ctrl-C may reach one of them first, all must stop at the same step
                torch.distributed.all_reduce(losses)
            *losses, stop = losses.tolist()  # this waits for the device
            run.seconds, clock = run.seconds + time.perf_counter() - clock, time.perf_counter()
            for i, loss in enumerate(losses):
                run.check("loss", loss, run.step - len(losses) + i)
            loss, lr = sum(losses) / len(losses) / world, optimizers[0].param_groups[0]["lr"]
            ms = 1e3 * (run.seconds - logged) / len(losses)
            rate, logged, pending = 1e3 * batch / ms, run.seconds, []
            line = f"step {run.step}/{c.steps} | loss {loss:.4f} | lr {lr:.1e} | {ms:.1f} ms | {rate / 1e3:.1f}k tok/s"
            if peak:  # model-FLOP utilisation
                line += f" | {rate * flops / peak / world:.1%} of bf16 peak"
            run.log(line, loss=loss, lr=lr, ms=ms, seconds=run.seconds, tokens_per_s=rate)
        if due:
            limit = math.ceil(c.eval_tokens / c.block_size)  # windows; 0: all
            scores = [evaluate(raw, val, tokenizer, autocast, c.batch_size, limit)]
            if world > 1:  # the first rank's for all: a bit of difference would part their ways
                torch.distributed.broadcast_object_list(scores)
            scores = scores[0]
            run.check("val loss", scores["val_loss"], run.step)
            run.log(f"step {run.step}/{c.steps} | {show(scores)}", seconds=run.seconds, **scores)
            run.worse = 0 if scores["val_loss"] < run.best else run.worse + 1
            if run.worse == 0:
                run.best = scores["val_loss"]
                run.save("best.pt")
            if rank == 0:
                curves = {name: [(row["step"], row[key]) for row in run.rows if key in row]
                          for name, key in (("train", "loss"), ("val", "val_loss"))}
                curves_svg(run.out / "curves.svg", curves, "step", "nats per token")
                sample(raw, tokenizer, c)
        if due or stop:
            run.save("ckpt.pt")
            clock = time.perf_counter()
        if run.step >= end or stop or (c.patience and run.worse >= c.patience):
            break
        pending.append(training_step(model, optimizers, scaler, autocast, data, c, run.step, device, rank, world))
        run.step += 1
    if not stop:
        scores, peak_memory = [row for row in run.rows if "val_loss" in row][-1], peak_mb(device)
        run.log(f"{show(scores)} | best {run.best:.4f} | {run.seconds:.0f} s of training | peak {peak_memory:.0f} MB",
                **{**scores, "final": True, "best_val_loss": run.best, "peak_mb": peak_memory})
    if world > 1:  # a gloo group that ends while DDP still holds it may abort
        del model
        gc.collect()
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if stop and rank == 0:
        print(f"stopped after step {run.step}; to go on: python gpt2.py --resume --out {c.out}")
    return 130 if stop else 0


def peak_mb(device):
    """The most memory that was in use: the card's, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(ImportError):  # Windows has no such module
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return math.nan


# ---- command line --------------------------------------------------------------------------------------------------

def parse_config(argv):
    """A Config from flags, one for each field, its comment as help. --resume, and a look at a checkpoint by
    --sample_only or --eval_only, start from that run's flags."""
    def fail(message):
        raise UserError(f"{message}; see --help")

    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.M))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = fail
    for field in dataclasses.fields(Config):
        kind = (typing.get_args(field.type) or [field.type])[0]  # int of int | None
        how = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=kind, metavar=kind.__name__)
        text = f"{comments[field.name]} [{field.default}]".replace("%", "%%")
        parser.add_argument(f"--{field.name}", help=text, **how)
    flags = vars(parser.parse_args(argv))
    c = Config(**flags)  # checks them before any file is read
    if (c.sample_only or c.eval_only) and not c.init:
        flags["init"] = c.init = f"{c.out}/best.pt"
    source, given = f"{c.out}/ckpt.pt" if c.resume else c.init if c.sample_only or c.eval_only else None, set(flags)
    if source and source.endswith(".pt"):
        once = ("resume", "init", "stop_at", "out", "sample_only", "eval_only")
        saved = load_checkpoint(source)["config"]
        flags = {name: value for name, value in saved.items() if name in vars(c) and name not in once} | flags
    c = Config(**flags)
    c.given = given
    return c


def main(argv=None):
    """Run the command line. Returns the exit status: 0, 1 for a failed run, 2 for bad input, 130 after Ctrl-C."""
    try:
        c = parse_config(argv)
        if not (c.sample_only or c.eval_only):
            pressed, old = [], signal.getsignal(signal.SIGINT)  # a first Ctrl-C stops between steps, a second at once
            signal.signal(signal.SIGINT, lambda *_: (pressed.append(True), signal.signal(signal.SIGINT, old)))
            try:
                return train(c, pressed)
            finally:
                signal.signal(signal.SIGINT, old)
        device, dtype, autocast = pick_device(c.device, c.dtype)
        model, tokenizer = load_model(c)
        if c.sample_only:
            sample(model.to(device, dtype), tokenizer, c)
        else:
            model.to(device)
            _, data = load_data(c.data, c.data_dir, tokenizer, c.block_size, fraction=0)
            print(f"{data.size:,} tokens | {show(evaluate(model, data, tokenizer, autocast, c.batch_size))}")
        return 0
    except UserError as error:
        print(f"gpt2.py: {error}", file=sys.stderr)
        return error.status
    except (MemoryError, RuntimeError) as error:  # torch's out of memory is one, a plain one on a CPU
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            print(f"gpt2.py: --compile failed, leave it out: {' '.join(str(error).split())[:200]}", file=sys.stderr)
            return 1
        if isinstance(error, RuntimeError) and not re.search("(out of|allocate|enough) memory", str(error)):
            raise
        print(f"gpt2.py: out of memory ({' '.join(str(error).split())[:200]}): lower --batch_size or --block_size",
              file=sys.stderr)
        return 1
    except SystemExit as error:  # --help
        return error.code or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # | head has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a sample may hold what the terminal can't show
    sys.exit(main())
