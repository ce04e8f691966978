"""Tests of every script, one class each, with the standard library's unittest alone.

    python tests.py                      all of them
    python tests.py TestGPT2             one script's
    python tests.py TestGPT2.test_cache  one test; pytest runs them too

Each test compares a script with something that shares no code with it: torch's own modules, a slow
loop in fp64 from the paper's equation, a closed form, a second run. Scripts run in this process
through main(argv). Tests that need GPT-2's vocabulary skip where tiktoken can't have it.
"""

import ast
import colorsys
import contextlib
import copy
import dataclasses
import difflib
import functools
import hashlib
import importlib
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import unittest
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
torch.set_num_threads(1)  # the tests' models are small: faster so, and sums don't depend on cores


def run(script, *argv):
    """What main(argv) of a script prints. Its exceptions, SystemExit among them, come through."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        importlib.import_module(script).main([str(word) for word in argv])
    return out.getvalue()


def refused(script, *argv):
    """The last line that a script leaves behind when it ends with an error, as a shell shows it."""
    err = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            importlib.import_module(script).main([str(word) for word in argv])
    except SystemExit as end:
        assert end.code, "it ended with status 0"
        if isinstance(end.code, str):  # Python prints it and ends with status 1
            return end.code
        return err.getvalue().splitlines()[-1]
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError(f"{script} {argv} ended without an error")


def child(*command, **environment):
    """A finished process of Python with one thread; its stdout, stderr and returncode."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), **environment}
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=300)


def rows(out):
    """The rows of a run's log.jsonl."""
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


@contextlib.contextmanager
def folder(path):
    """Work in a folder (contextlib.chdir is younger than Python 3.10)."""
    old = os.getcwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(old)


class Case(unittest.TestCase):
    script = None  # whose tests these are: its module is self.gpt2, for instance

    def setUp(self):
        self.dir = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.dir, ignore_errors=True)
        self.out = self.dir / "out"
        torch.manual_seed(0)
        if self.script:
            setattr(self, self.script, self.use(self.script))

    def patch(self, owner, name, value):
        """owner.name is value until the test ends."""
        patch = mock.patch.object(owner, name, value)
        self.addCleanup(patch.stop)
        return patch.start()

    def use(self, script):
        """Its module. Until the test ends it draws fewer shapes, and its linear probes take fewer
        steps. self.draw and self.probe are the functions as they were."""
        module = importlib.import_module(script)
        if hasattr(module, "load_images"):
            self.draw = draw = module.make_shapes
            few = lambda n, seed: draw(200 if n == 10000 else min(n, 60), seed)
            self.patch(module, "make_shapes", few)
        if hasattr(module, "linear_probe"):
            self.probe = module.linear_probe
            self.patch(module, "linear_probe", functools.partial(self.probe, steps=20))
        return module

    def close(self, a, b, tolerance, message=None):
        """|a - b| is at most tolerance times the largest value in b."""
        a, b = (torch.as_tensor(t).detach().double() for t in (a, b))
        self.assertEqual(a.shape, b.shape, message)
        self.assertTrue(a.isfinite().all(), message)
        self.assertLessEqual((a - b).abs().max().item(), tolerance * b.abs().max().item(), message)

    def same(self, a, b, where="it"):
        """Equal bit for bit: tensors, and lists and dicts of them."""
        if isinstance(a, torch.Tensor):
            self.assertTrue(a.dtype == b.dtype and torch.equal(a, b), f"{where} differs")
        elif isinstance(a, dict):
            self.assertEqual(list(a), list(b), where)
            for key in a:
                self.same(a[key], b[key], f"{where}[{key!r}]")
        elif isinstance(a, (list, tuple)):
            for i, pair in enumerate(zip(a, b, strict=True)):
                self.same(*pair, f"{where}[{i}]")
        else:
            self.assertEqual(a, b, where)

    def resumes(self, script, batch, stop, *flags):
        """A run that an exception from its batch function ends at the call `stop`, then resumed,
        equals an unbroken run bit for bit: weights, optimizer, best metric, log."""
        module, calls = importlib.import_module(script), itertools.count(1)
        original = getattr(module, batch)

        def interrupted(*args, **kwargs):
            if next(calls) == stop:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        whole, parts = self.dir / "whole", self.dir / "parts"
        run(script, "--out", whole, *flags)
        with mock.patch.object(module, batch, interrupted):
            self.assertRaises(KeyboardInterrupt, run, script, "--out", parts, *flags)
        self.assertNotIn("final", rows(parts)[-1])
        for _ in range(1 if script == "gpt2" else 2):  # the second time it only tests again
            run(script, "--out", parts, "--resume", *flags)
        a, b = load(whole / "ckpt.pt"), load(parts / "ckpt.pt")
        for key in ("model", "optimizer", "step", "best"):
            self.same(a[key], b[key], key)
        for row in (logs := [rows(whole), rows(parts)])[0] + logs[1]:
            for key in ("seconds", "tokens_per_s", "images_per_s"):
                row.pop(key, None)
        self.assertEqual(*logs)


# --------------------------------------------------------------------------------------------------
# the house: what holds for every script

SCRIPTS = ["flash_attn", "gpt2", "ijepa", "mae", "puzzles", "resnet", "simclr", "vit"]
TRAIN = dict(puzzles=["train"])  # what comes before the flags of a run
SHORT = dict.fromkeys(SCRIPTS, ["--epochs", 0.5, "--batch_size", 32])
SHORT |= dict(  # flags that make an otherwise default run take seconds
    gpt2=["--steps", 3, "--sample_tokens", 8],
    puzzles=["--steps", 3],
    flash_attn=["--steps", 3, "--block_size", 64],
)


class TestHouse(Case):
    def setUp(self):
        super().setUp()
        for script in SCRIPTS:
            self.use(script)

    def source(self, script):
        return (HERE / f"{script}.py").read_text(encoding="utf-8")

    def test_imports(self):
        """No script imports another; at module level only the four packages."""
        allowed = {*sys.stdlib_module_names, "torch", "numpy", "tiktoken", "requests"}
        for script in SCRIPTS:
            for node in ast.walk(ast.parse(self.source(script))):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                if isinstance(node, ast.ImportFrom):
                    names = [node.module or "."]
                for name in (name.split(".")[0] for name in names):
                    inside = node.col_offset > 0  # in the function that needs it, or in try
                    self.assertFalse((HERE / f"{name}.py").exists(), f"{script} imports {name}")
                    self.assertTrue(inside or name in allowed, f"{script} imports {name}")

    def test_copies(self):
        """A top-level name has the same source, to the letter, in every script that has it."""
        seen = {}
        for script in SCRIPTS:
            text = self.source(script)
            for node in ast.parse(text).body if script != "puzzles" else ():
                if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    continue
                if node.name in ("Config", "train", "evaluate", "main"):
                    continue
                start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                lines = text.splitlines()[start - 1 : node.end_lineno]
                other, first = seen.setdefault(node.name, (script, lines))
                difference = difflib.unified_diff(first, lines, other, script, lineterm="")
                self.assertEqual(first, lines, "\n".join(difference))

    def test_import_does_nothing(self):
        """Importing prints and writes nothing, leaves random state, threads and signals alone."""
        code = f"""if True:
            import random, signal, torch
            state = lambda: [random.getstate(), torch.get_rng_state().tolist(),
                torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
                signal.getsignal(signal.SIGINT)]
            before = state()
            import {", ".join(SCRIPTS)}
            assert state() == before"""
        with folder(self.dir):
            done = child("-c", code)
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""))
        self.assertEqual(list(self.dir.iterdir()), [])

    def test_help(self):
        """--help names every flag with its default, on a console that isn't UTF-8 too."""
        for script in SCRIPTS:
            words = [HERE / f"{script}.py", *TRAIN.get(script, []), "--help"]
            done = child(*words, PYTHONIOENCODING="cp1252", COLUMNS="200")
            self.assertEqual((done.returncode, done.stderr), (0, ""), script)
            for field in dataclasses.fields(importlib.import_module(script).Config):
                self.assertIn(f"--{field.name}", done.stdout)

    def test_default_run(self):
        """A few steps with otherwise default flags leave the contract's files in --out alone."""
        for script in SCRIPTS:
            flags = [*TRAIN.get(script, []), *SHORT[script], "--log_every", 1]
            with self.subTest(script=script), folder(self.dir):
                run(script, *flags)
                self.assertEqual([p.name for p in self.dir.iterdir()], ["out"])
                self.check_run(script, Path("out") / script)
                if script == "gpt2":  # others test again, in case that they were stopped in it
                    self.assertIn("the run is at step", refused(script, *flags, "--resume"))
                says = refused(script, *flags, "--lr", 1e30, "--eval_every", 9)
                self.assertRegex(says, r"loss is (nan|inf) at step \d")

    def check_run(self, script, out):
        config, log = json.loads((out / "config.json").read_text()), rows(out)
        module = importlib.import_module(script)
        self.assertEqual(list(config), [f.name for f in dataclasses.fields(module.Config)])
        steps = [row for row in log if "loss" in row and "final" not in row]
        evaluations = [row for row in log if "val_loss" in row and "final" not in row]
        self.assertLessEqual({"step", "seconds"}, {*evaluations[0]})
        self.assertLessEqual({"step", "loss", "lr", "seconds"}, {*steps[0]})
        self.assertTrue({"tokens_per_s", "images_per_s"} & {*steps[0]})
        self.assertEqual([row for row in log if "final" in row], log[-1:])
        for name in ("ckpt.pt", "best.pt") if script != "flash_attn" else ():
            saved = load(out / name)
            self.assertLessEqual({"model", "optimizer", "config", "step", "best"}, {*saved})
            self.assertEqual(saved["config"], config)

    def test_full_disk(self):
        """A checkpoint that can't be written whole leaves the old one."""
        def half(state, name):
            Path(name).write_bytes(b"PK half a file")
            raise OSError("No space left on device")

        path = self.dir / "ckpt.pt"
        for script in SCRIPTS:
            save = getattr(importlib.import_module(script), "save", None)
            if save:
                save(path, dict(step=1))
                with mock.patch("torch.save", half):
                    self.assertRaises(OSError, save, path, dict(step=2))
                self.assertEqual(load(path), dict(step=1))

    def test_figures(self):
        text = (HERE / "README.md").read_text(encoding="utf-8")
        keys = dict.fromkeys(("mae", "simclr", "ijepa"), ["linear", "linear_random_init"])
        for script in ("resnet", "vit", *keys):
            log = (HERE / f"assets/logs/{script}/default_seed0.jsonl").read_text()
            final = json.loads(log.splitlines()[-1])
            for key in keys.get(script, ["test_accuracy"]):
                self.assertIn(f"{100 * final[key]:.1f}%", text, f"{script} {key}")

    def test_readme(self):
        """The README's commands run, in their order and in one folder, with fewer steps. Of those
        that need the network, a GPU or hours the flags are known."""
        text = (HERE / "README.md").read_text(encoding="utf-8")
        blocks = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
        lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
        text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        lines += re.findall(r"`(python [^`]+)`", text)
        parts = [part.strip() for line in lines for part in line.split("&&")]
        elsewhere = "shakespeare|cifar|^gpt2|^resnet|^deit|^my|^out/tuned|--bench|--compile"
        done = set()
        with folder(self.dir):
            for part in parts:
                if not part.startswith(("python ", "torchrun ")):
                    continue
                words = shlex.split(part, comments=True)
                names = [w[:-3] for w in words if w.endswith(".py") and w[:-3] in SCRIPTS]
                if not names:
                    continue
                script, flags = names[0], words[words.index(f"{names[0]}.py") + 1 :]
                with self.subTest(command=part):
                    if words[0] == "torchrun" or any(re.search(elsewhere, f) for f in flags):
                        importlib.import_module(script).make_parser().parse_args(flags)
                        continue
                    trains = script != "puzzles" or flags[0] == "train"
                    try:
                        run(script, *flags, *(SHORT[script] if trains else []))
                    except SystemExit:
                        self.assertEqual(flags[0], "check")  # nothing is answered yet
                    except ModuleNotFoundError as error:
                        self.assertEqual(error.name, "matplotlib")
                    done.add(script)
        self.assertEqual(done, {*SCRIPTS}, "scripts of which no command could be run")


# --------------------------------------------------------------------------------------------------
# gpt2.py

TEXT = " ".join(np.random.default_rng(0).choice("the cat sat on a mat in köln".split(), 800)) + "\n"


def slow_gpt(w, idx, heads, kv_heads=None):
    """GPT-2's logits (B, T, V) from its equations, in fp64, head by head with an explicit mask. w
    has Hugging Face's names and layout. Without wpe positions are rotary: complex numbers turn."""
    w = {name.removeprefix("transformer."): value.double() for name, value in w.items()}
    kv_heads = kv_heads or heads
    T = idx.size(1)
    C = w["wte.weight"].size(1)
    D = C // heads
    angle = torch.arange(T)[:, None] * 10000 ** (-2 * torch.arange(D // 2).double() / D)
    turn = torch.polar(torch.ones_like(angle), angle)

    def norm(x, name):
        return F.layer_norm(x, (C,), w[f"{name}.weight"], w[f"{name}.bias"])

    def linear(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    def rotated(x):
        if "wpe.weight" in w:
            return x
        z = torch.complex(x[..., :D // 2], x[..., D // 2:]) * turn
        return torch.cat((z.real, z.imag), -1)

    x = w["wte.weight"][idx]
    if "wpe.weight" in w:
        x = x + w["wpe.weight"][:T]
    for n in range(sum(name.endswith("ln_1.weight") for name in w)):
        qkv = linear(norm(x, f"h.{n}.ln_1"), f"h.{n}.attn.c_attn")
        ys = []
        for h in range(heads):
            group = C + h // (heads // kv_heads) * D  # where this head's keys begin
            begins = h * D, group, group + kv_heads * D
            q, k, v = (qkv[..., i:i + D] for i in begins)
            scores = rotated(q) @ rotated(k).mT / D ** 0.5
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
            ys.append(scores.softmax(-1) @ v)
        x = x + linear(torch.cat(ys, -1), f"h.{n}.attn.c_proj")
        a = linear(norm(x, f"h.{n}.ln_2"), f"h.{n}.mlp.c_fc")
        a = 0.5 * a * (1 + torch.tanh((2 / math.pi) ** 0.5 * (a + 0.044715 * a ** 3)))
        x = x + linear(a, f"h.{n}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


def hugging_face(state):
    """Our state dict in Hugging Face's layout."""
    state = {k: w for k, w in state.items() if "lm_head" not in k}
    return {k: w.t() if ".h." in k and w.dim() == 2 else w for k, w in state.items()}


def write_safetensors(path, tensors):
    """The format from its description, with struct and numpy."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, w in tensors.items():
        values = w.numpy().astype("<f4").tobytes()
        places = [len(data), len(data) + len(values)]
        header[name] = dict(dtype="F32", shape=list(w.shape), data_offsets=places)
        data += values
    text = json.dumps(header).encode()
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + data)


class TestGPT2(Case):
    script = "gpt2"

    def setUp(self):
        super().setUp()
        (self.dir / "text.txt").write_text(TEXT, encoding="utf-8")
        self.tiny = f"""--data {self.dir}/text.txt --n_layer 2 --n_head 2 --n_embd 32 --warmup 2
            --block_size 16 --batch_size 4 --sample_tokens 4 --steps 20 --eval_every 10
            --log_every 5 --dtype float32 --device cpu""".split()

    def model(self, **config):
        """A small model whose weights are large enough for every term to matter."""
        shape = dict(block_size=16, vocab_size=50, n_layer=2, n_head=4, n_embd=32)
        model = self.gpt2.GPT(self.gpt2.GPTConfig(**{**shape, **config}))
        for name, p in model.named_parameters():
            std = 0.01 if "transformer.w" in name else 0.2
            nn.init.normal_(p, float("ln_" in name and "weight" in name), std)
        return model.eval()

    def test_init(self):
        GPT, GPTConfig = self.gpt2.GPT, self.gpt2.GPTConfig
        with torch.device("meta"):
            size = sum(p.numel() for p in GPT(GPTConfig()).parameters())
        self.assertEqual(size, 124439808)
        for name, p in GPT(GPTConfig(64, 256, n_layer=2)).named_parameters():
            std = 0.01 if "c_proj" in name else 0.02
            if p.dim() == 2:
                self.assertAlmostEqual(p.std().item() / std, 1, delta=0.03, msg=name)
            elif "bias" in name:
                self.assertEqual(p.abs().max().item(), 0)

    def test_equations(self):
        """Logits, loss and gradients are slow_gpt's; -100 is left out of the loss."""
        for pos, kv in itertools.product(("learned", "rope"), (None, 2, 1)):
            model = self.model(pos=pos, n_kv_head=kv)
            idx, targets = torch.randint(50, (2, 3, 15))
            targets[:, ::3] = -100
            state = hugging_face(model.state_dict())
            w = {k: v.double().requires_grad_() for k, v in state.items()}
            slow = slow_gpt(w, idx, 4, kv)
            slow_loss = F.nll_loss(slow.log_softmax(-1)[targets >= 0], targets[targets >= 0])
            logits, loss = model(idx, targets)
            self.close(logits, slow, 5e-5)
            self.close(model(idx)[0], slow[:, -1:], 5e-5)
            self.close(loss, slow_loss, 5e-6)
            slow_loss.backward()
            loss.backward()
            grads = {k: p.grad for k, p in model.named_parameters()}
            for name, g in hugging_face(grads).items():
                self.close(g, w[name].grad, 5e-5, name)
        for wrong in (dict(n_embd=30), dict(n_kv_head=3)):
            self.assertRaises(AssertionError, self.model, **wrong)

    def test_cache(self):
        """With the cache, greedy ids are those without it, past the block's end too."""
        for pos, kv in itertools.product(("learned", "rope"), (None, 2, 1)):
            model = self.model(pos=pos, n_kv_head=kv)
            prompt = torch.randint(50, (3, 5))
            with mock.patch.object(model, "forward", side_effect=model.forward) as forward:
                ids = model.generate(prompt, 20, temperature=0)
            widths = [call.args[0].size(1) for call in forward.call_args_list]
            self.assertEqual(widths, [5] + [1] * 11 + [16] * 8)
            for end in range(5, 25):
                slow, _ = model(ids[:, :end][:, -16:])
                self.same(slow[:, 0].argmax(-1), ids[:, end])
        with self.assertRaisesRegex(AssertionError, "one token at a time"):
            model(prompt[:, :2], cache=torch.zeros(2, 2, 3, 1, 16, 8), start=3)

    def test_sampling(self):
        """Frequencies of 20,000 draws are within five standard deviations of the true ones."""
        p = [0.05, 0.5, 0.15, 0.3]
        n = 20000
        model = self.model(vocab_size=4)
        cases = [
            (p, {}),
            ([0, 1, 0, 0], dict(temperature=0)),
            ([0, 0.5, 0, 0.3], dict(top_k=3, top_p=0.83)),  # .5 + .3 are .84 of the three
            ([0, 0.25, 0, 0.09], dict(temperature=0.5, top_p=0.9)),  # .25 + .09: .93 of squares
        ]
        logits = torch.tensor(p).log().expand(n, 1, 4)
        idx = torch.zeros(n, 1, dtype=torch.long)
        with mock.patch.object(self.gpt2.GPT, "forward", lambda *a, **k: (logits, None)):
            for expected, settings in cases:
                expected = torch.tensor(expected, dtype=torch.double) / sum(expected)
                drawn = model.generate(idx, 1, generator=torch.Generator(), **settings)
                difference = drawn[:, 1].bincount(minlength=4) / n - expected
                within = 5 * (expected * (1 - expected) / n).sqrt()
                self.assertTrue((difference.abs() <= within + 1e-9).all(), settings)

    def test_stop(self):
        """After its stop token a row holds nothing else, and all rows' stop ends generation."""
        idx = torch.zeros(8, 1, dtype=torch.long)
        out = self.model(vocab_size=3).generate(idx, 200, temperature=9.0, stop=2)
        stopped = (out == 2).cumsum(1) > 0
        self.assertTrue((out[stopped] == 2).all())
        self.assertEqual(stopped.all(0).sum().item(), 1)

    def test_from_pretrained(self):
        """Hugging Face's tensors, with and without prefix, masks, lm_head, config.json; .pt."""
        model = self.model(n_embd=128)
        idx = torch.randint(50, (2, 16))
        full = hugging_face(model.state_dict())
        bare = {k.removeprefix("transformer."): w for k, w in full.items()}
        bare["h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
        tied = {**full, "lm_head.weight": full["transformer.wte.weight"]}
        config, file = self.dir / "config.json", self.dir / "model.safetensors"
        from_pretrained = self.gpt2.GPT.from_pretrained
        for tensors in (tied, bare):
            write_safetensors(file, tensors)
            logits, _ = from_pretrained(file)(idx, idx)
            self.close(logits, slow_gpt(full, idx, 2), 5e-5)  # 128 / 64 heads
        config.write_text('{"n_head": 4}')
        logits, _ = from_pretrained(str(self.dir))(idx, idx)
        self.close(logits, slow_gpt(full, idx, 4), 5e-5)
        state = {"module._orig_mod." + k: w for k, w in model.state_dict().items()}
        torch.save(dict(model=state, model_args=vars(model.config)), self.dir / "x.pt")
        self.same(from_pretrained(self.dir / "x.pt")(idx)[0], model(idx)[0])

    def test_save_pretrained(self):
        """The bytes of another writer of the format; Hugging Face's settings."""
        self.model().save_pretrained(self.dir)
        torch.manual_seed(0)
        write_safetensors(self.dir / "expected", hugging_face(self.model().state_dict()))
        saved, expected = (self.dir / name for name in ("model.safetensors", "expected"))
        self.assertEqual(saved.read_bytes(), expected.read_bytes())
        config = json.loads((self.dir / "config.json").read_text())
        self.assertEqual(config, config | dict(model_type="gpt2", n_positions=16, n_head=4))
        self.assertRaises(AssertionError, self.model(pos="rope").save_pretrained, self.dir)

    def test_optimizers(self):
        """Five steps of Lion, Sophia-G and Muon against their equations in numpy, one by one."""
        g = np.random.default_rng(0).normal(size=(5, 6, 4))
        h = 0.01 * np.random.default_rng(1).normal(size=(6, 4)) ** 2

        def lion(m, g):
            return np.sign(0.9 * m + 0.1 * g), 0.99 * m + 0.01 * g

        def sophia(m, g):
            m = 0.965 * m + 0.035 * g
            return np.clip(m / np.maximum(0.04 * h, 1e-15), -1, 1), m

        def muon(m, g):
            m = 0.95 * m + 0.05 * g
            u, parts = 0.95 * m + 0.05 * g, []
            for part in (u[:5], u[5:]):  # (5, 4), taller than wide, and (1, 4)
                U, S, V = np.linalg.svd(part / (np.linalg.norm(part) + 1e-7), full_matrices=False)
                for _ in range(5):
                    S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
                parts.append(max(1, len(part) / 4) ** 0.5 * U * S @ V)
            return np.concatenate(parts), m

        for name, rule, tolerance, more in (
            ("Lion", lion, 1e-12, {}),
            ("SophiaG", sophia, 1e-12, {}),
            ("Muon", muon, 1e-5, dict(split=[5, 1])),
        ):
            w = torch.ones(6, 4, dtype=torch.double, requires_grad=True)
            frozen = torch.ones(2, 2)
            params = [dict(params=[w, frozen], **more)]
            optimizer = getattr(self.gpt2, name)(params, lr=0.1, weight_decay=0.2)
            if name == "SophiaG":
                optimizer.state[w]["h"] = torch.from_numpy(h)
            slow = np.ones((6, 4))
            m = np.zeros((6, 4))
            for t in range(5):
                w.grad = torch.from_numpy(g[t].copy())
                optimizer.step()
                update, m = rule(m, g[t])
                slow = slow * (1 - 0.1 * 0.2) - 0.1 * update
            self.close(w, slow, tolerance, name)
        with self.assertRaisesRegex(ValueError, r"not shapes of \[\(8,\)\]"):
            self.gpt2.Muon([torch.zeros(8)], 0.1)

    def test_hessian(self):
        """Sophia's estimate, B g^2, is on average the Gauss-Newton diagonal sum_k p_k (1 - p_k)."""
        b = torch.tensor([0.3, -0.2, 0.9], requires_grad=True)  # logits are a bias alone
        sophia = self.gpt2.SophiaG([b], lr=1.0, betas=(0.9, 0.25))
        mean = 0
        for _ in range(4000):
            sophia.update_hessian(b.expand(7, 3))
            mean += sophia.state[b]["h"] / 4000
        p = b.softmax(0)
        self.close(mean, p * (1 - p), 0.06)
        sophia.state[b]["h"].fill_(1.0)
        sophia.update_hessian(0 * b.expand(7, 3))  # its gradient is 0: h <- beta2 h
        self.close(sophia.state[b]["h"], torch.full((3,), 0.25), 1e-6)

    def test_groups(self):
        """Every parameter once; matrices decay; Muon has the blocks' matrices, qkv in three."""
        model = self.model(n_kv_head=2)
        for name in self.gpt2.LEARNING_RATES:
            optimizers = self.gpt2.make_optimizers(model, self.gpt2.Config(optimizer=name))
            groups = [group for o in optimizers for group in o.param_groups]
            pairs = [(p, group["weight_decay"]) for group in groups for p in group["params"]]
            self.assertEqual({p for p, _ in pairs}, {*model.parameters()})
            self.assertEqual(len(pairs), len({*model.parameters()}))
            self.assertTrue(all(decay == 0.1 * (p.dim() == 2) for p, decay in pairs))
            if name == "muon":
                splits = [group["split"] for group in groups[:8]]
                self.assertEqual(splits, [[32, 16, 16], None, None, None] * 2)

    def test_data(self):
        """Text with NUL bytes; uint16 ids; .jsonl with a mark, blank lines and capitals."""
        def load_all(name):  # (ids and labels), Config
            c = self.gpt2.Config(data=str(self.dir / name), block_size=5, device="cpu")
            train, val = self.gpt2.load_data(c, self.gpt2.make_tokenizer(257))
            data = [[*a, *b] for a, b in zip(train, val, strict=True)]
            self.assertEqual(len(train[0]), round(0.9 * len(data[0])))
            return data, c

        (self.dir / "nul.txt").write_text("a\0ü" * 500, encoding="utf-8")
        self.assertEqual(load_all("nul.txt")[0][0], [*"a\0ü".encode()] * 500 + [256])
        np.arange(100, dtype=np.uint16).tofile(self.dir / "ids.bin")
        data, c = load_all("ids.bin")
        x, y = self.gpt2.get_batch(data, [7, 30], c)
        self.assertEqual(x.tolist(), [[*range(7, 12)], [*range(30, 35)]])
        self.same(y, x + 1)
        lines = "\n\n".join(['{"prompt": "Q", "response": "A"}'] * 10)
        (self.dir / "rows.JSONL").write_text("\ufeff" + lines, encoding="utf-8")
        prompt = [*b"### Instruction:\nQ\n\n### Response:\n"]
        answer = [*b"A", 256]
        (ids, labels), _ = load_all("rows.JSONL")
        self.assertEqual(ids, (prompt + answer) * 10)
        self.assertEqual(labels, ([-100] * len(prompt) + answer) * 10)

    def test_learns_and_resumes(self):
        """A run learns words; broken off and resumed it is the unbroken run, bit for bit."""
        flags = [*self.tiny, "--dropout", 0.1, "--optimizer", "sophia"]
        self.resumes("gpt2", "get_batch", 19, *flags)
        path = self.dir / "whole/ckpt.pt"
        model = self.gpt2.GPT.from_pretrained(path)
        c = self.gpt2.Config(**load(path)["config"])
        _, val = self.gpt2.load_data(c, self.gpt2.make_tokenizer(257))
        starts = range(0, len(val[0]) - 16, 16)
        losses = [model(*self.gpt2.get_batch(val, [i], c))[1].item() for i in starts]
        self.assertAlmostEqual(np.mean(losses), rows(self.dir / "whole")[-1]["val_loss"], places=5)
        flags = [*self.tiny, "--out", self.out]
        run("gpt2", *flags, "--steps", 150, "--eval_every", 50)
        loss = rows(self.out)[-1]["val_loss"]
        self.assertLess(loss, 1.2)  # a word and a space are 2.1 nats, 3.5 letters on average
        text = run("gpt2", *flags, "--sample_only", "--prompt", "the cat")
        self.assertIn("the cat", text)

    def test_checkpoints(self):
        """best.pt is the best; more steps stretch the schedule; --init."""
        flags = [*self.tiny, "--out", self.out]
        with mock.patch.object(self.gpt2, "evaluate", side_effect=(3.0, 1.0, 2.0)):
            run("gpt2", *flags, "--steps", 30)
        self.assertEqual(load(self.out / "best.pt")["step"], 20)
        self.assertIn("has --data", refused("gpt2", *flags, "--resume", "--data", HERE / "vit.py"))
        run("gpt2", *flags, "--resume", "--steps", 40)
        lr = next(row["lr"] for row in rows(self.out) if row["step"] == 35)
        self.assertAlmostEqual(lr, 0.03 * (1 + math.cos(math.pi * 32 / 38)) / 2)
        run("gpt2", *flags, "--init", self.out / "best.pt", "--n_embd", 8)
        saved = load(self.out / "ckpt.pt")
        self.assertEqual((saved["model_args"]["n_embd"], saved["config"]["lr"]), (32, 3e-5))

    def test_answers_weigh_the_same(self):
        """One step on rows whose answers differ in length: 4 x 1 and 1 x 4 have one gradient."""
        data = np.random.default_rng(0).integers(50, size=(2, 400))
        data[1, :350] = np.where(np.arange(350) % 50 < 45, -100, data[1, :350])
        c = self.gpt2.Config(block_size=16, device="cpu")
        off = contextlib.nullcontext()
        model, results = self.model(), []
        for c.batch_size, c.grad_accum in ((4, 1), (1, 4)):
            model.zero_grad()
            with mock.patch("torch.nn.utils.clip_grad_norm_"):
                loss = self.gpt2.training_step(model, [], data, c, 0, off)
            results.append([torch.tensor(loss), *(p.grad for p in model.parameters())])
        for a, b in zip(*results, strict=True):
            self.close(a, b, 1e-5)
        self.gpt2.training_step(model, [], data, c, 1, off)
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        self.assertAlmostEqual(norm.item(), 1, places=4)  # clipped

    def test_torchrun(self):
        """Two ranks are one rank with twice the accumulation. (L2 notices the gradient's scale.)"""
        flags = [*self.tiny, "--optimizer", "adam", "--lr", 1e-3, "--weight_decay", 5, "--steps", 6]
        code = "import gpt2, torch; torch.nn.utils.clip_grad_norm_ = lambda *a: 0; gpt2.main()"
        (self.dir / "unclipped.py").write_text(code)
        words = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2
        done = child(*words, self.dir / "unclipped.py", *flags, "--out", self.dir / "two")
        self.assertEqual(done.returncode, 0, done.stderr[-2000:])
        with mock.patch("torch.nn.utils.clip_grad_norm_"):
            run("gpt2", *flags, "--grad_accum", 2, "--out", self.out)
        two = load(self.dir / "two/ckpt.pt")["model"]
        for name, w in load(self.out / "ckpt.pt")["model"].items():
            self.close(two[name], w, 1e-4, name)


# --------------------------------------------------------------------------------------------------
# puzzles.py

class TestPuzzles(Case):
    script = "puzzles"
    all = importlib.import_module("puzzles").PUZZLES

    def answer(self, **lines):
        """Write my_puzzles.py with these answers, each the text behind return."""
        text = ""
        for name, line in lines.items():
            text += f"def {name}({', '.join(self.all[name].params)}):\n    return {line}\n"
        (self.dir / "my_puzzles.py").write_text(text, encoding="utf-8")

    def do(self, *argv):
        """(exit status, stdout and stderr) of a command in the test's folder."""
        out, status = io.StringIO(), 0
        with folder(self.dir), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                self.puzzles.main([str(word) for word in argv])
            except SystemExit as end:
                status = end.code
        return status, out.getvalue()

    def verdict(self, name, line):
        """None if the line is right, else what the checker says; in this process."""
        p = self.all[name]
        torch.set_default_dtype(torch.double if p.family == 3 else torch.float32)
        try:
            fault = self.puzzles.broken_rule(p, line)
            return fault or self.puzzles.examine(p, p.function(line))
        finally:
            torch.set_default_dtype(torch.float32)

    def test_signatures(self):
        wanted = """ones sum outer diag eye triu cumsum diff vstack roll flip compress pad_to
            sequence_mask bincount scatter_add flatten linspace heaviside repeat bucketize"""
        got = [p.name for p in self.all.values() if p.family == 1]
        self.assertEqual(got, wanted.split())
        self.assertEqual(len(self.all), 64)

    def test_solutions(self):
        by_torch = dict(
            cumsum=lambda a: a.cumsum(0),
            compress=lambda g, v, i: F.pad(v[g], (0, i - len(v[g]))),
            scatter_add=lambda v, link, j: torch.zeros(j).long().index_add(0, link, v),
            linspace=lambda i, j, n: torch.linspace(i.item(), j.item(), n),
            bucketize=lambda v, b: torch.bucketize(v, b, right=True),
            window_mask=lambda i, w: torch.ones(i, i).tril().triu(1 - w) == 1,
            patchify=lambda x, h, w, P: x.unfold(0, P, P).unfold(1, P, P).reshape(h * w, P * P),
            split_heads=lambda x, H, D: torch.stack(x.split(D, 2), 1),
        )
        for name, definition in by_torch.items():
            p = self.all[name]
            for case in self.puzzles.cases(p)[::7]:
                args = self.puzzles.draw_inputs(p, *case)
                got, want = p.solve(*args), definition(*args)
                self.assertEqual((got.shape, got.dtype), (want.shape, want.dtype), name)
                self.close(got.double() + 9, want.double() + 9, 1e-6, name)
        x = torch.randn(2, 6, 12)
        angle = torch.rand(6, 6)
        self.same(self.puzzles.merge_heads(self.puzzles.split_heads(x, 3, 4), 3, 4), x)
        self.same(self.puzzles.unpatchify(self.puzzles.patchify(x[0], 3, 6, 2), 3, 6, 2), x[0])
        z = torch.complex(x[0, :, :6], x[0, :, 6:]) * torch.polar(torch.ones(6, 6), angle)
        got = self.puzzles.rope(x[0], angle.cos().repeat(1, 2), angle.sin().repeat(1, 2), 12)
        self.close(got, torch.cat((z.real, z.imag), 1), 1e-6)

    def test_network(self):
        w = {k: t.double() for k, t in self.puzzles.initial_weights(0).items()}
        w = {k: (t + 0.1 * torch.randn_like(t)).requires_grad_() for k, t in w.items()}
        x, y = self.puzzles.make_shapes(32, seed=5)
        with torch.no_grad():
            logits, kept = self.puzzles.forward(w, x.double())
            grad = self.puzzles.backward(w, kept, logits, y)
        z = F.gelu(x.double() @ w["w1"] + w["b1"])
        n = F.layer_norm(z, (256,), w["gain"], w["bias"])
        loss = F.cross_entropy(n @ w["w2"] + w["b2"], y)
        self.close(self.puzzles.cross_entropy(logits, y), loss[None], 1e-12)
        for name, want in zip(w, torch.autograd.grad(loss, list(w.values())), strict=True):
            self.close(grad[name], want, 1e-9, name)

    def test_selftest(self):
        for p in self.all.values():
            self.assertGreaterEqual(len({*self.puzzles.cases(p)}), 50, p.name)
        status, out = self.do("selftest")
        self.assertEqual((status, out.count(": right\n")), (0, 64), out)
        self.patch(self.all["roll"], "solution", "a[(arange(i) + 2) % i]")
        self.patch(self.puzzles, "PUZZLES", {"roll": self.all["roll"]})
        status, out = self.do("selftest")
        self.assertEqual(status, 1)
        self.assertRegex(out, r"\A10\. roll: case \d+ of 500\n")

    def test_mutants(self):
        """Of every puzzle's answer none that is changed passes."""
        def sizes(args):
            return [n for a in args for n in (a.shape if torch.is_tensor(a) else [a])]

        def off(t):
            return ~t if t.dtype == torch.bool else t + 1

        mutants = dict(
            transposed=lambda t, args: t.mT if t.dim() > 1 else t[:, None],
            shifted=lambda t, args: t.flatten().roll(1).reshape(t.shape),
            off_by_one=lambda t, args: off(t),
            cut=lambda t, args: t[..., 1:],
            dtype=lambda t, args: t.double() if t.dtype == torch.float32 else t.float(),
            constant=lambda t, args: t * 0,
            square=lambda t, args: t if len({*sizes(args)}) == 1 else off(t))
        same = ["ones shifted", "sum shifted", "cross_entropy shifted", "eye transposed"]
        for p in self.all.values():
            for name, change in mutants.items():
                if f"{p.name} {name}" in same or name == "square" and len(p.sizes) == 1:
                    continue

                def mutant(*args, p=p, change=change):
                    found = tuple(change(t, args) for t in self.puzzles.outputs(p.solve(*args)))
                    return found if len(found) > 1 else found[0]

                with self.subTest(puzzle=p.name, mutant=name):
                    self.assertIn(" wrong ", self.puzzles.examine(p, mutant) or "it passes")

    def test_answers(self):
        """Typical mistakes are wrong, and called what they are; right lines need not be ours."""
        for name, line, says in (
            ("outer", "a * b[:, None]", "transposed"),
            ("triu", "where(arange(j)[:, None] < arange(j), 1, 0)", "off by one"),
            ("triu", "arange(j)[:, None] <= arange(j)", "a comparison: where"),
            ("sum", "(ones(a.shape[0]) @ a[:, None])[0]", "an axis"),
            ("roll", "a", "shifted to the right"),
            ("ones", "i", "no tensor but int"),
            ("softmax", "exp(x) / rowsum(exp(x))", "not a number"),
            ("linear_backward", "d @ w.mT, x.mT @ d", "2 outputs instead of 3"),
            ("flatten", "a[arange(i * j) // i, arange(i * j) % i]", "can't be computed"),
            ("online_softmax", "newmax(m, s), o + exp(s - newmax(m, s)) @ v", "case"),
        ):
            self.assertIn(says, self.verdict(name, line) or "it passes", line)
        for name, line in (
            ("eye", "1 * (arange(j)[:, None] == arange(j))"),
            ("flip", "a[-1 - arange(i)]"),
            ("rope", "x * cos + rotate_half(x * sin, D)"),
        ):
            self.assertIsNone(self.verdict(name, line), line)

    def test_cheats(self):
        """What the rules don't allow is named, and never run."""
        self.patch(self.puzzles, "judge", mock.Mock(side_effect=AssertionError("it ran")))
        for line, says in {
            "torch.ones(i)": "called",
            "arange(i).sum()": "called",
            "where.__globals__": "__globals__ is",
            "'a' * i": "'a'",
            "[1 for k in arange(i)]": "ListComp",
            "__builtins__": "__builtins__ is",
            "arange(n=i)": "keyword",
            "0 < arange(i) < 1": "one comparison",
            "eye(i)[0]": "eye comes later",
            "ones(i)": "ones calls itself",
        }.items():
            self.answer(ones=line)
            status, out = self.do("check", "ones")
            self.assertEqual(status, 1, line)
            self.assertRegex(out, rf"\A\d+\. ones: line 1: .*({says})")
        function = self.all["sum"].function("print(a)")  # should the rules have a hole
        self.assertRaises(NameError, function, 1)

    def test_form(self):
        """One line, return and an expression, under the puzzle's own signature, once."""
        good = "def ones(i):\n    return arange(i) * 0 + 1\n"
        twice = "ones is defined twice, in lines [1, 3]"
        for text, says in (
            ("def ones(i):\n    i = 2\n    return i\n", "line 1: want def ones(i):"),
            ("def ones(*i):\n    return i\n", "want"),
            ("@ones\ndef ones(i):\n    return i\n", "want"),
            (good + "def ones(i):\n    return ...\n", twice),
            ("def summ(a):\n    return a\n", "my_puzzles.py, line 1: nothing but"),
        ):
            (self.dir / "my_puzzles.py").write_text(text)
            status, out = self.do("check")
            self.assertIn(says, out if status == 1 else status)

    def test_limits(self):
        """What eats time or memory is stopped; others are judged all the same, with our puzzles."""
        lines = dict(ones="arange(10 ** 12)", outer="10 ** 10 ** 9 % 7", triu="arange(j)")
        self.answer(**lines, cumsum="a @ triu(a.shape[0])")
        self.patch(self.puzzles, "SECONDS", 1)
        self.patch(self.puzzles, "MEMORY", 300)
        status, out = self.do("check")
        found = dict(re.findall(r"(?ms)^\d+\. (\w+): (.*?)(?=^\d+\. |^\d of)", out))
        self.assertRegex(found["ones"], "can't allocate memory|MemoryError")
        self.assertRegex(found["outer"], "^stopped: over 1 seconds")
        self.assertEqual([name for name in found if found[name] == "right\n"], ["cumsum"])
        self.assertEqual(status, 1)

    def test_commands(self):
        """start, show and reveal; check in a new process, on a console that isn't UTF-8."""
        self.do("start")
        stubs = (self.dir / "my_puzzles.py").read_text()
        self.assertEqual([node.name for node in ast.parse(stubs).body], list(self.all))
        self.assertIn("left alone", self.do("start")[0])
        for p in self.all.values():
            out = self.do("show", p.name)[1]
            self.assertTrue(p.statement in out and p.spec in out and "gives =" in out, out)
        self.assertEqual(self.do("reveal", "outer"), (0, "a[:, None] * b\n"))
        self.answer(outer="a[:, None] * b", flip="\u03bb")
        with folder(self.dir):
            done = child(HERE / "puzzles.py", "check", PYTHONIOENCODING="cp1252")
        self.assertEqual((done.returncode, done.stderr), (1, ""))
        self.assertTrue(done.stdout.startswith("3. outer: right\n"))

    def test_train(self):
        """A short run learns, and repeats itself bit for bit with the learner's right lines; the
        best weights are kept."""
        flags = "train --steps 600 --eval_every 250 --log_every 100 --lr 0.05 --out".split()
        self.do(*flags, "a")
        log = rows(self.dir / "a")
        self.assertEqual([row["step"] for row in log if "val_loss" in row], [0, 250, 500, 600])
        self.assertGreater(log[-1]["test_accuracy"], 0.5)
        self.answer(linear="b + x @ w", gelu="x")
        with mock.patch.dict(vars(self.puzzles)):
            out = self.do(*flags, "b", "--mine")[1]
        self.assertIn("linear is yours: b + x @ w", out)
        self.same(*(load(self.dir / run / "ckpt.pt")["model"] for run in "ab"))
        scores = [(1.0, 0.1), (1.0, 0.3), (1.0, 0.2), (1.0, 0.0)]  # the last is the test's
        self.patch(self.puzzles, "evaluate", mock.Mock(side_effect=scores))
        self.do("train", "--steps=2", "--eval_every=1", "--out", "e")
        self.assertEqual(load(self.dir / "e" / "best.pt")["step"], 1)


# --------------------------------------------------------------------------------------------------
# flash_attn.py

class TestFlashAttn(Case):
    # T_q, T_k, query heads per key head, causal, window, cu_seqlens; a tile is 16 in these tests
    masks = {
        "full": (40, 61, 1, False, None, None),
        "more keys": (37, 70, 2, True, None, None),
        "more queries": (70, 45, 2, True, None, None),
        "window": (60, 70, 2, True, 13, None),
        "window of 1": (40, 40, 1, True, 1, None),
        "no keys": (70, 40, 4, False, 9, None),
        "whole tiles": (64, 64, 1, True, 32, None),
        "documents": (70, 70, 2, True, None, [0, 5, 5, 40, 70]),
    }

    def setUp(self):
        super().setUp()
        self.fa = self.use("flash_attn")
        self.patch(self.fa, "TILE", 16)

    def inputs(self, T_q, T_k, G=1, dtype=torch.double, D=16, H=4, B=2):
        """Random q, k, v, and a gradient of the output."""
        draw = lambda heads, T: torch.randn(B, T, heads, D).to(dtype).transpose(1, 2)
        kv = H // G, T_k
        shapes = (H, T_q), kv, kv, (H, T_q)
        return [draw(*shape).requires_grad_() for shape in shapes]

    def slow(self, q, k, v, causal=False, window=None, ends=None, scale=None):
        """o and LSE, a query at a time from the definition, in fp64."""
        T_k = k.size(2)
        scale = scale or q.size(3) ** -0.5
        heads = torch.arange(q.size(1)) * k.size(1) // q.size(1)
        k, v = k[:, heads].double(), v[:, heads].double()
        document = functools.partial(np.searchsorted, ends, side="right")
        o, lse = [], []
        for p in range(T_k - q.size(2), T_k):  # the queries' positions
            keys = [j for j in range(T_k) if not causal or j <= p]
            keys = [j for j in keys if not window or abs(p - j) < window]
            keys = [j for j in keys if not ends or document(j) == document(p)]
            s = scale * k[:, :, keys] @ q[:, :, p - T_k, :, None].double()  # (B, H, keys, 1)
            lse.append(torch.logsumexp(s, 2))
            o.append(torch.softmax(s, 2).mT @ v[:, :, keys])  # 0 without keys
        return torch.cat(o, 2), torch.cat(lse, 2)

    def all_close(self, found, expected, tolerance, message=None):
        for a, b in zip(found, expected, strict=True):
            self.close(a, b, tolerance, message)

    def test_online_softmax(self):
        x = torch.randn(5, 9, dtype=torch.double) * 300  # e^900 would overflow
        x[2] = x[2].sort().values  # the maximum grows at each step
        self.close(self.fa.online_softmax(x), torch.softmax(x, dim=-1), 1e-14)
        q, k, v, _ = self.inputs(40, 40)
        q = -40 * q.abs()  # all scores far below zero
        k = 1e4 * k.abs()
        self.close(self.fa.flash_attention(q, k, v, True), self.slow(q, k, v, True)[0], 1e-11)

    def test_merge(self):
        q, k, v, do = self.inputs(9, 20)
        whole = self.slow(q, k, v)
        parts = zip(k.split((7, 13), 2), v.split((7, 13), 2), strict=True)
        a, b = (self.fa.flash_attention(q, *part, return_lse=True) for part in parts)
        expected = self.loss_grads(*whole, (q, k, v), do, do[..., 0])
        found = self.loss_grads(*self.fa.merge(*a, *b), (q, k, v), do, do[..., 0])
        self.all_close(found, expected, 1e-12)
        none = torch.zeros_like(q), torch.full_like(whole[1], -math.inf)
        self.all_close(self.fa.merge(*none, *whole), whole, 1e-15)
        self.assertTrue((self.fa.merge(*none, *none)[0] == 0).all())

    def loss_grads(self, o, lse, inputs, do, dlse):
        """Output, LSE, and the gradients of a loss of both, where queries have keys."""
        some = lse > -math.inf
        loss = (o * do).sum() + (lse * dlse)[some].sum()
        return [o, lse[some], *torch.autograd.grad(loss, inputs, retain_graph=True)]

    def test_masks(self):
        """Output, LSE and gradients under every mask, against the slow loop."""
        for name, (T_q, T_k, G, causal, window, ends) in self.masks.items():
            *inputs, do = self.inputs(T_q, T_k, G)
            o, lse = self.slow(*inputs, causal, window, ends, 0.3)
            dlse = torch.randn_like(lse)
            expected = self.loss_grads(o, lse, inputs, do, dlse)
            ours = self.fa.flash_attention(
                *inputs, causal, window, 0.3, cu_seqlens=ends, return_lse=True)
            found = self.loss_grads(*ours, inputs, do, dlse)
            self.all_close(found, expected, 1e-13, name)
            self.assertTrue((found[2][lse == -math.inf] == 0).all(), name)
            if not ends:
                ours = self.fa.attention(*inputs, causal, window, 0.3)
                found = self.loss_grads(ours, lse, inputs, do, dlse)
                self.all_close(found, expected, 1e-13, name)

    def test_half(self):
        """At most twice the error of torch's own; q k^T may overflow before it is scaled."""
        q, k, v, do = self.inputs(70, 70, dtype=torch.bfloat16)
        errors = []
        o, _ = self.slow(q, k, v)
        exact = (o, *torch.autograd.grad(o, (q, k, v), do.double()))
        for f in (self.fa.flash_attention, F.scaled_dot_product_attention):
            o = f(q, k, v)
            found = (o, *torch.autograd.grad(o, (q, k, v), do))
            pairs = zip(found, exact, strict=True)
            errors.append(torch.stack([(a - b).abs().max() for a, b in pairs]))
        self.assertTrue((errors[0] <= 2 * errors[1]).all(), errors)
        v = v.half()
        q = torch.full_like(v, 100)
        mean = v.mean(2, keepdim=True).expand_as(v)
        for f in (self.fa.attention, self.fa.flash_attention):
            self.close(f(q, q, v, scale=0.01), mean, 2e-3)

    def test_no_matrix(self):
        """No tensor of T x T numbers is made; q, k, v, o, LSE and spans are kept for backward."""
        sizes = []
        T = 600

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, f, types, args=(), kwargs=None):
                sizes.extend(t.numel() for t in args if isinstance(t, torch.Tensor))
                return f(*args, **(kwargs or {}))

        q, k, v, do = self.inputs(T, T, B=1)
        for f, small in ((self.fa.attention, False), (self.fa.flash_attention, True)):
            sizes.clear()
            with Watch():
                torch.autograd.grad(f(q, k, v, True, 500), (q, k, v), do)
            self.assertEqual(max(sizes) < T * T, small, max(sizes))
        kept = self.fa.measure(self.fa.flash_attention, (q, k, v), do)[2] * 2**20
        self.assertEqual(kept, 8 * (4 * q.numel() + 4 * T) + 4 * 2 * T)

    def test_hidden(self, backend="torch", device="cpu"):
        """What is NaN or inf in a key or query reaches who sees it and no other."""
        seen = torch.ones(20, 20).bool().tril().triu(-8)
        for which, value in itertools.product((0, 1), (math.nan, math.inf)):
            tensors = self.inputs(20, 20, dtype=torch.float32, H=2, B=1)
            found = []
            for number in (0, value):
                tensors[which].detach()[0, 0, 7] += number  # shares the memory
                q, k, v, do = (t.detach().to(device).requires_grad_() for t in tensors)
                o = self.fa.flash_attention(q, k, v, True, 9, backend=backend)
                grads = torch.autograd.grad(o, (q, k, v), do)
                found.append([t.detach().cpu() for t in (o, *grads)])
            rows = seen[:, 7] if which else torch.arange(20) == 7  # queries that see it
            self.assertFalse(found[1][0][0, 0, rows].isfinite().any())
            keys = seen[rows].any(0)  # keys that one of those queries sees
            for a, b, reached in zip(*found, (rows, rows, keys, keys), strict=True):
                a[0, 0, reached] = b[0, 0, reached] = 0
                self.close(b, a, 1e-4)

    def test_refused(self):
        q, k, v, do = self.inputs(8, 8)
        f = self.fa.flash_attention
        raises = self.assertRaisesRegex
        raises(AssertionError, "7, 16", f, q, k[:, :, :7], v)
        raises(AssertionError, "2, 3, 8, 16", f, q, k[:, :3], v[:, :3])
        raises(AssertionError, "window 0", f, q, k, v, window=0)
        self.assertRaises(RuntimeError, f, q, k, v, cu_seqlens=[0, 5])
        o = f(q, k, v)
        with self.assertRaisesRegex(RuntimeError, r"second derivative: use attention\(\)"):
            torch.autograd.grad(o, q, do, create_graph=True)

    def test_triton(self):
        """The kernels, on a GPU or in Triton's interpreter, which has to be on at import."""
        if not self.fa.triton:
            self.skipTest("no triton")
        interpreter = {} if torch.cuda.is_available() else dict(TRITON_INTERPRET="1")
        done = child("-W", "ignore", HERE / "tests.py", "TestFlashAttn.kernels", **interpreter)
        self.assertEqual(done.returncode, 0, (done.stdout + done.stderr)[-3000:])

    def kernels(self):
        gpu = torch.cuda.is_available()
        device = "cuda" if gpu else "cpu"
        times, D = (7, 64) if gpu else (1, 16)  # longer sequences for the tiles as they are
        dtypes = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
        if not gpu:
            del dtypes[torch.bfloat16]  # the interpreter gets it wrong
            self.fa.FORWARD_TILE = self.fa.FP32_TILE = (16, 32, 4, 2)
            self.fa.BACKWARD_TILE = (32, 16, 4, 2)
        for dtype, (name, mask) in itertools.product(dtypes, self.masks.items()):
            T_q, T_k, G, causal, window, ends = mask
            tensors = self.inputs(T_q * times, T_k * times, G, dtype, D, H=G, B=1)
            *qkv, do = (t.detach().to(device).requires_grad_() for t in tensors)
            exact = [t.detach().double().requires_grad_() for t in qkv]
            window = window and window * times
            ends = ends and [end * times for end in ends]
            f = functools.partial(self.fa.flash_attention, cu_seqlens=ends, return_lse=True)
            dlse = torch.randn(1, G, T_q * times, device=device)
            found = []
            for inputs, backend in ((qkv, "triton"), (exact, "torch")):
                o, lse = f(*inputs, causal, window, 0.3, backend)
                found.append(self.loss_grads(o, lse, inputs, do, dlse))
            self.all_close(*found, dtypes[dtype], f"{name} {dtype}")
        self.test_hidden("triton", device)

    def test_learns(self):
        flags = "--block_size 64 --n_embd 32 --batch_size 16 --steps 120 --eval_every 60".split()
        run("flash_attn", *flags, "--out", self.out)
        self.assertEqual(rows(self.out)[-1]["test_accuracy"], 1)

    def test_tiles(self):
        """--tiles, against the share of keys that the queries of a tile see."""
        text = run("flash_attn", "--tiles", "--block_size", 160)
        seen = np.concatenate((np.tri(160), np.tri(160) - np.tri(160, k=-40)))
        shares = seen.reshape(20, 16, 10, 16).mean((1, 3))
        letters = np.select([shares == 0, shares == 1], [".", "#"], "/")
        self.assertEqual(re.sub("causal.*", "", text).split(), letters.ravel().tolist())

    def test_bench(self):
        """The attention of each row, against the loop; its ratio to sdpa under that mask."""
        calls = []
        flags = "--bench --block_size 512 --dtype float32 --out".split()
        note = lambda f, inputs, do: (calls.append((f, inputs)) or len(calls), 1, 1)
        self.patch(self.fa, "measure", note)
        text = run("flash_attn", *flags, self.out)
        for mask, (f, inputs) in zip(re.findall(r"512 (\w+)", text), calls[:5], strict=True):
            qkv = [t[:, :1] for t in inputs]  # one of the heads
            window = 256 if mask == "window" else None
            self.close(f(*qkv), self.slow(*qkv, True, window)[0], 1e-5, mask)
        self.assertIn("window flash forward 24.0000 s (1.04 of", text)  # the median of 7 rounds
        drawn = (self.out / "bench.png").exists()
        self.assertEqual(drawn, find_spec("matplotlib") is not None)


# --------------------------------------------------------------------------------------------------
# resnet.py

def conv_of(w, name, x, stride=1, groups=1):
    """A convolution by weights of that name. It keeps the size, or divides it by the stride."""
    weight, bias = w[f"{name}.weight"], w.get(f"{name}.bias")
    return F.conv2d(x, weight, bias, stride, weight.size(-1) // 2, groups=groups)


def norm_of(w, name, x):
    """Batch norm in training, or ConvNeXt's layer norm where there is a gamma."""
    weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
    if "gamma" in w or "layer1.0.gamma" in w:
        return F.layer_norm(x.movedim(1, 3), (x.size(1),), weight, bias, 1e-6).movedim(3, 1)
    return F.batch_norm(x, None, None, weight, bias, True)


def slow_block(kind, w, x, stride, groups, shortcut):
    """Any of the blocks, from its equations and its parameters w by name."""
    conv = functools.partial(conv_of, w)
    norm = functools.partial(norm_of, w)
    around = x if shortcut == "same" else 0
    y = norm("bn1", x).relu() if kind == "PreActBlock" else x
    if shortcut == "A":
        around = F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 4, 4))
    if shortcut in ("B", "conv"):
        around = conv("downsample.0", y, stride)
    if shortcut == "B":
        around = norm("downsample.1", around)
    if kind == "BasicBlock":
        y = norm("bn1", conv("conv1", y, stride)).relu()
        return (around + norm("bn2", conv("conv2", y))).relu()
    if kind == "Bottleneck":
        y = norm("bn1", conv("conv1", y)).relu()
        y = norm("bn2", conv("conv2", y, stride, groups)).relu()
        return (around + norm("bn3", conv("conv3", y))).relu()
    if kind == "PreActBlock":
        y = norm("bn2", conv("conv1", y, stride)).relu()
        return around + conv("conv2", y)
    if kind == "MBConv":
        if "expand.0.weight" in w:
            y = F.silu(norm("expand.1", conv("expand.0", x)))
        y = conv("depthwise.0", y, stride, y.size(1))
        y = F.silu(norm("depthwise.1", y))
        scale = F.silu(conv("excite.1", y.mean((2, 3), keepdim=True)))
        y = y * conv("excite.3", scale).sigmoid()
        return around + norm("project.1", conv("project.0", y))
    if shortcut == "convnext":
        x = norm("downsample.0", x)
        x = F.conv2d(x, w["downsample.1.weight"], w["downsample.1.bias"], stride)
    y = norm("branch.1", conv("branch.0", x, 1, x.size(1)))
    y = conv("branch.4", F.gelu(conv("branch.2", y)))
    return x + w["gamma"].view(-1, 1, 1) * y


class TestResNet(Case):
    script = "resnet"
    tiny = """--batch_size 16 --eval_every 5 --log_every 3 --warmup 2 --epochs 1 --dtype float32
        --device cpu""".split()
    fast = [*tiny, "--arch", "fast", "--batch_size", 32, "--log_every", 1]

    def randomise(self, module):
        """Its parameters by name, in double precision."""
        w = dict(module.double().named_parameters())
        for name, p in w.items():
            p.data = torch.randn(p.shape).double() * 0.3 + ("gamma" in name)
        return w

    def test_blocks(self):
        """Output and gradients of every block with each kind of shortcut, against slow ones."""
        r, partial = self.resnet, functools.partial
        for make, shortcuts, groups in (
            (r.BasicBlock, "A B same plain", 1),
            (partial(r.Bottleneck, ratio=0.5, groups=2), "B same", 2),
            (r.Bottleneck, "A", 1),
            (r.PreActBlock, "conv same", 1),
            (r.MBConv, "none same", 1),
            (partial(r.MBConv, ratio=1, size=5), "none", 1),
            (r.ConvNeXtBlock, "convnext same", 1),
        ):
            for shortcut in shortcuts.split():
                C, stride = (16, 1) if shortcut == "same" else (8, 2)
                norm = r.NORMS["layer" if make is r.ConvNeXtBlock else "batch"]
                around = r.make_shortcut(shortcut, C, 16, stride, norm)
                block = make(C, 16, stride, norm, around)
                w, kind = self.randomise(block), type(block).__name__
                x = torch.randn(3, C, 6, 6).double().requires_grad_()
                want = slow_block(kind, w, x, stride, groups, shortcut)
                a, b = (
                    [y, *torch.autograd.grad(y.sin().sum(), [x, *w.values()])]
                    for y in (block(x), want)
                )
                for got, want in zip(a, b, strict=True):
                    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        self.assertEqual(r.make_shortcut("plain", 8, 8, 1, None)(x), 0)

    def test_sizes(self):
        r = self.resnet
        official = dict(resnet18="0622374c", resnet34="380ae486", resnet50="be46530b")
        official |= dict(resnext50_32x4d="4398173c", wide_resnet50_2="1629c2f5")

        def count(model):
            return sum(p.numel() for p in model.parameters())

        with torch.device("meta"):
            for name, digest in official.items():
                state = getattr(r, name)().state_dict()
                shapes = repr(sorted((k, tuple(w.shape)) for k, w in state.items()))
                found = hashlib.sha256(shapes.encode()).hexdigest()
                self.assertTrue(found.startswith(digest), name)
            self.assertEqual(count(r.cifar_resnet(110)), 1727962)
            self.assertEqual(count(r.wrn(28, 10)), 36479194)
            blocks = nn.Sequential(*[*r.efficientnet_b0()][3:10])
            self.assertEqual(count(blocks), 5288548 - 1694088)  # without the ends
            self.assertEqual(blocks(torch.empty(2, 32, 32, 32)).shape, (2, 320, 2, 2))

    def test_stems(self):
        r = self.resnet
        x = torch.randn(4, 3, 12, 12).double()
        models = dict(cifar=r.cifar_resnet(8), preact=r.wrn(10, 1), convnext=r.convnext())
        models["imagenet"] = r.stack(r.BasicBlock, 1, (1, 1, 1, 1), 10, width=8)
        w = models["imagenet"].layer4[0].conv1.weight  # Kaiming: C_out times the filter's size
        self.assertAlmostEqual(w.std() * (w[:, 0].numel() / 2) ** 0.5, 1, delta=0.1)
        for stem, model in models.items():
            w = self.randomise(model)
            y = conv_of(w, "conv1", x, 2 if stem == "imagenet" else 1)
            y = y if stem == "preact" else norm_of(w, "bn1", y)
            if stem in ("cifar", "imagenet"):
                y = y.relu()
            if stem == "imagenet":
                y = F.max_pool2d(y, 3, 2, 1)
            for name, layer in model.named_children():
                y = layer(y) if name.startswith("layer") else y
            if stem in ("convnext", "preact"):
                y = norm_of(w, "bn_last", y)
            y = y.relu() if stem == "preact" else y
            want = F.linear(y.mean((2, 3)), w["fc.weight"], w["fc.bias"])
            self.close(model(x), want, 1e-10, stem)

    def test_fast(self):
        r, model = self.resnet, self.resnet.FastNet()
        x = r.normalise(self.draw(640, 0)[0], model.stats)
        model.whiten(x)
        patches = F.unfold(x, 2).transpose(1, 2).reshape(-1, 12).double()
        moments = patches.T @ patches / len(patches)
        values = torch.linalg.eigvalsh(moments)
        first, negative = model.conv1.weight.flatten(1).double().chunk(2)
        self.close(first @ moments @ first.T, torch.diag(values / (values + 5e-4)), 1e-3)
        self.same(first, -negative)
        self.assertEqual(model.groups[0].weight[5, 5, 1, 1], 1)
        w, x = self.randomise(model), x[:4].double()
        y = F.gelu(F.conv2d(x, w["conv1.weight"], w["conv1.bias"]))
        for k in (0, 7, 14):
            y = F.max_pool2d(conv_of(w, f"groups.{k}", y), 2)
            y = F.gelu(norm_of(w, f"groups.{k + 2}", y))
            y = conv_of(w, f"groups.{k + 4}", y)
            y = F.gelu(norm_of(w, f"groups.{k + 5}", y))
        want = y.amax((2, 3)) / 256 @ w["fc.weight"].T
        self.close(model(x), want, 1e-10)

    def test_groups(self):
        """What is trained, at which rate, and what decays."""
        r, model = self.resnet, self.resnet.FastNet()
        groups = r.make_sgd(model, r.Config(lr=0.2)).param_groups
        self.assertEqual([len(group["params"]) for group in groups], [6, 7, 1])
        self.assertEqual({p.dim() for p in groups[0]["params"]}, {4})
        self.assertFalse(model.conv1.weight.requires_grad)
        self.assertEqual([group["peak"] for group in groups[1:]], [106, 1340])
        weights, vectors = r.make_sgd(r.convnext(), r.Config(weight_decay=0.01)).param_groups
        self.assertEqual((weights["weight_decay"], vectors["weight_decay"]), (0.01, 0))
        self.assertEqual({p.dim() for p in vectors["params"]}, {1})

    def test_muon(self):
        """Filters of mean length 1, then a step whose singular values met the polynomial."""
        w = nn.Parameter(torch.randn(8, 3, 3, 3))
        want, m = w.detach().double().view(8, 27), 0
        sgd = self.resnet.FilterMuon([dict(params=[w], momentum=0)], lr=0.3)
        for _ in range(3):
            w.grad = torch.randn(8, 3, 3, 3)
            g = w.grad.double().view(8, 27)
            m = 0.6 * m + g
            U, S, V = torch.linalg.svd(g + 0.6 * m, full_matrices=False)
            S = S / S.norm()
            for _ in range(3):
                S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
            want = want / want.square().sum(1).mean().sqrt()
            want = want - 0.3 * U @ torch.diag(S) @ V
            sgd.step()
            self.close(w.view(8, 27), want, 1e-5)

    def test_weights(self):
        """Files of ours and others, under any wrapper; a fresh head where classes differ."""
        r, path = self.resnet, self.dir / "w.pt"
        model = r.resnet18(width=8).eval()
        x = torch.randn(2, 3, 64, 64)
        state = model.state_dict()
        modules = {f"module._orig_mod.{k}": v for k, v in state.items()}
        for wrapped in (
            dict(state_dict=modules, args=r.argparse.Namespace(lr=0.1)),
            dict(model={"head.weight": x}, encoder=state, epoch=3),
            state,
        ):
            torch.save(wrapped, path)
            found = r.from_pretrained(path, arch="resnet18").eval()
            with torch.no_grad():
                self.same(found(x), model(x))
        self.assertEqual(len(r.from_pretrained(path, 10, arch="resnet18").fc.weight), 10)
        state = r.resnet18().state_dict()
        with mock.patch("torch.hub.load_state_dict_from_url", return_value=state) as get:
            found = r.from_pretrained("resnet18", data_dir="here")
        self.assertEqual(found.stats, r.IMAGENET_STATS)
        url = "https://download.pytorch.org/models/resnet18-f37072fd.pth"
        get.assert_called_with(url, "here", check_hash=True, weights_only=True)

    def test_cifar10(self):
        """Labels and pixels are where the format has them; the last training images validate;
        what isn't CIFAR-10 is refused."""
        r, source = self.resnet, self.dir / "cifar-10-batches-bin"
        records = np.random.default_rng(0).integers(0, 256, (60000, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        source.mkdir()
        names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
        for name, part in zip(names, np.split(records, 6), strict=True):
            part.tofile(source / name)
        x, y, test_x, test_y = r.load_cifar10(self.dir)
        self.assertEqual(torch.cat((y, test_y)).tolist(), records[:, 0].tolist())
        self.assertEqual(test_x[7, 2, 3, 4], records[50007, 1 + 2048 + 32 * 3 + 4])
        train, held, _ = r.load_images(r.Config(data="cifar10", data_dir=str(self.dir)))
        self.same([train[1], held[1]], [y[:45000], y[45000:]])
        records[:9999].tofile(source / names[3])
        self.assertRaisesRegex(ValueError, str(source), r.load_cifar10, self.dir)

    def test_augment(self):
        images = torch.randint(0, 256, (5, 3, 6, 6), dtype=torch.uint8)
        padded = F.pad(images.flip(0).float(), [4] * 4, mode="reflect").byte()
        index = torch.arange(5).flip(0)
        for dy, dx, mirror in itertools.product(range(-4, 5), (-4, -1, 3), (False, True)):
            want = padded[:, :, 4 + dy :, 4 + dx :][..., :6, :6]
            moves = (torch.full((5,), value) for value in (dy, dx, mirror))
            got = self.resnet.augment(images, index, *moves)
            self.same(got, want.flip(3) if mirror else want)

    def test_batches(self):
        """An epoch has each image once; fast mirrors an image in every other epoch."""
        r = self.resnet

        def batch(step, **more):  # (4, 16): which images, moved down and sideways, mirrored
            c = r.Config(**{"batch_size": 16, "crop": 3, **more})
            with mock.patch.object(r, "augment", lambda images, *moves: torch.stack(moves)):
                moves, labels = r.training_batch(c, torch.zeros(48), torch.arange(48), step)
            self.same(moves[0], labels)
            return moves

        self.assertTrue((batch(7, seed=1) != batch(7)).any(1).all())
        batches = [batch(step) for step in range(120)]
        order, dy, dx, mirror = torch.stack(batches, dim=1).view(4, 40, 48)
        self.assertTrue((order.sort()[0] == torch.arange(48)).all())
        self.assertFalse(torch.equal(order[0], order[1]))
        self.assertEqual(dy.unique().tolist(), [*range(-3, 4)])
        self.assertFalse(torch.equal(dy, dx))
        self.assertAlmostEqual(mirror.float().mean(), 0.5, delta=0.06)
        batches = [batch(step, arch="fast") for step in range(9)]
        order, *_, mirror = torch.stack(batches, dim=1).view(4, 3, 48)
        turns = mirror.gather(1, order.argsort()).T.tolist()  # by image
        self.assertEqual({*map(tuple, turns)}, {(0, 1, 0), (1, 0, 1)})

    def test_views(self):
        weight = torch.randn(75, 4)

        def model(x):
            return torch.tanh(x.flatten(1) @ weight / 8)

        x, want = torch.randn(9, 3, 5, 5), 0
        for shift, share in ((0, 1 / 4), (1, 1 / 8), (-1, 1 / 8)):
            index = [4 - abs(4 - abs(i + shift)) for i in range(5)]
            view = x[:, :, index][..., index]
            want = want + share * (model(view) + model(view.flip(3)))
        self.close(self.resnet.six_views(model, x), want, 1e-5)

    def test_run(self):
        """The schedule; what a run leaves behind is of the best weights."""
        r = self.resnet
        flags = [*self.tiny, "--epochs", 4, "--lr", 0.2, "--eval_every", 16]
        run("resnet", "--out", self.out, *flags, "--save_logits", self.dir / "l.npy")
        log, best = rows(self.out), load(self.out / "best.pt")
        rates = {row["step"]: row["lr"] for row in log if "lr" in row}
        self.assertAlmostEqual(rates[24], 0.1 * (1 + math.cos(math.pi * 21 / 46)))  # of 48 steps
        scores = [row["val_accuracy"] for row in log if "val_accuracy" in row]
        self.assertEqual(best["best"], max(scores))
        self.assertEqual(best["step"], 16 * (1 + np.argmax(scores)))
        model = r.from_pretrained(self.out / "best.pt").eval()
        train, val, (x, y) = r.load_images(r.Config())
        images = torch.cat((train[0], val[0], x))
        images = r.normalise(images, model.stats)
        with torch.no_grad():
            pair = torch.stack((model(images), model(images.flip(3))), dim=1)
        self.close(np.load(self.dir / "l.npy"), pair[:260], 1e-4)
        z = load(self.out / "features.pt")["test_z"]
        self.close(model.fc(z), pair[260:, 0], 1e-4)
        self.close(log[-1]["test_loss"], F.cross_entropy(pair[260:, 0], y), 1e-4)

    def test_resume(self):
        self.resumes("resnet", "training_batch", 6, *self.fast)
        again = "--out", self.dir / "parts", *self.fast, "--resume", "--arch", "plain20"
        self.assertIn("another --arch", refused("resnet", *again))

    def test_fast_run(self):
        """--arch fast brings defaults, which flags override; the rate falls on a line."""
        with mock.patch.object(self.resnet, "train") as train:
            run("resnet", "--arch", "fast", "--crop", 3)
        [c] = train.call_args.args
        self.assertEqual((c.lr, c.batch_size, c.label_smoothing, c.crop), (0.24, 2000, 0.2, 3))
        run("resnet", "--out", self.out, *self.fast, "--lr", 0.6, "--val", 0)
        rates = [row["lr"] for row in rows(self.out) if "lr" in row]
        self.close(rates, [0.6, 0.5, 0.4, 0.3, 0.2, 0.1], 1e-6)
        found = self.resnet.from_pretrained(self.out / "ckpt.pt")
        self.assertIsInstance(found, self.resnet.FastNet)


# --------------------------------------------------------------------------------------------------
# vit.py

def torch_blocks(blocks, dim, heads):
    """torch's own Transformer with the weights of our blocks, in fp64."""
    layer = nn.TransformerEncoderLayer(
        dim, heads, 4 * dim, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True
    )
    theirs = nn.TransformerEncoder(layer, len(blocks), enable_nested_tensor=False).double()
    for name, w in blocks.state_dict().items():
        name = name.replace("attn.proj", "self_attn.out_proj").replace("mlp.fc", "linear")
        name = name.replace("attn.qkv.", "self_attn.in_proj_")
        theirs.get_parameter(f"layers.{name}").data.copy_(w)
    return theirs


def torch_vit(model, x):
    """The logits of x (fp64) if torch's own Transformer had the model's weights."""
    twin = copy.deepcopy(model).double()
    dim, heads, pool = map(model.config.get, ("dim", "heads", "pool"))
    x = twin.patch_embed.proj(x).flatten(2).mT
    if pool == "cls":
        x = torch.cat((twin.cls_token.repeat(len(x), 1, 1), x), 1)
    x = torch_blocks(model.blocks, dim, heads)(x + twin.pos_embed)
    x = F.layer_norm(x, [dim], twin.norm.weight, twin.norm.bias, 1e-6)
    return twin.head(x[:, 0] if pool == "cls" else x.mean(1))


def torchvision_names(state, fc1, fc2):
    """timm's names changed to torchvision's, in one of its two spellings."""
    pairs = f"""blocks. encoder.layers.encoder_layer_ pos_embed encoder.pos_embedding
        cls_token class_token patch_embed.proj conv_proj .norm .ln_ head. heads.head.
        attn.qkv. self_attention.in_proj_ attn.proj self_attention.out_proj
        mlp.fc1 mlp.{fc1} mlp.fc2 mlp.{fc2} norm. encoder.ln.""".split()
    for ours, theirs in zip(pairs[::2], pairs[1::2], strict=True):
        state = {k.replace(ours, theirs): t for k, t in state.items()}
    return state


def slow_distort(x, kind, s):
    """One image (3, n, n), fp64. If it's to be warped, it must be a ramp, with slopes dy and dx."""
    n, a = x.size(1), abs(s)
    sin, cos = math.sin(s / 2), math.cos(s / 2)
    grey = 0.299 * x[:1] + 0.587 * x[1:2] + 0.114 * x[2:]
    padded = F.pad(x[None], [1] * 4, mode="replicate")
    near = F.conv2d(padded, torch.ones(3, 1, 3, 3).double(), groups=3)[0]
    low = x.amin((1, 2), True)
    high = x.amax((1, 2), True)
    darker = (x[:, None, None] < x[..., None, None]).sum((3, 4))
    u = (2 * torch.arange(n) + 1) / n - 1
    v = u[:, None]
    bases = dict(brightness=0, saturation=grey, contrast=grey.mean(), sharpness=(near + 4 * x) / 13)
    full = dict(equalize=darker / darker.amax((1, 2), True).clamp(min=1))
    full["autocontrast"] = (x - low) / (high - low).clamp(min=1)
    points = dict(shear_x=(v, u + 0.3 * s * v), shear_y=(v + 0.3 * s * u, u))
    points |= dict(move_x=(v, u + 0.6 * s), move_y=(v + 0.6 * s, u))
    points["rotate"] = sin * u + cos * v, cos * u - sin * v
    if kind in bases:
        x = x + 0.9 * s * (x - bases[kind])
    elif kind in full:
        x = torch.where(high > low, x + a * (255 * full[kind] - x), x)
    elif kind == "solarize":
        x = torch.where(x >= 256 * (1 - a), 255 - x, x)
    elif kind == "posterize":
        x = x - x % 2 ** round(4 * a)
    else:
        slopes = x[:, 1:2, :1] - x[:, :1, :1], x[:, :1, 1:2] - x[:, :1, :1]
        x = x[:, :1, :1]
        for p, slope in zip(points[kind], slopes, strict=True):
            p = ((p + 1) * n / 2) % (2 * n)
            p = torch.minimum(p, 2 * n - p) - 0.5  # reflected
            x = x + slope * p.clamp(0, n - 1)
    return x.clamp(0, 255)


class TestViT(Case):
    script = "vit"
    tiny = """--dim 16 --depth 2 --heads 2 --batch_size 32 --epochs 1.5 --eval_every 3
        --log_every 2 --warmup 2 --dtype float32 --device cpu""".split()

    def model(self, size=12, patch=4, dim=24, depth=2, heads=3, **more):
        """A small model whose weights are large enough for every term to matter."""
        model = self.vit.ViT(size, patch, dim, depth, heads, 5, **more).eval()
        for w in [*model.parameters(), *model.buffers()]:
            if w.is_floating_point() and (w.requires_grad or w.dim() == 1):
                w.data += 0.6 * torch.rand(w.shape) - 0.3
        return model

    def test_equations(self):
        """Logits and their gradients are torch's: pools, positions, stem, numbers of heads."""
        stem = dict(conv_stem=True, pos="sincos", patch=2)
        for how in (dict(heads=1), dict(pool="mean", pos="sincos", size=20), stem):
            model = self.model(**how)
            x = torch.randn(3, 3, model.image_size, model.image_size, requires_grad=True)
            ours, theirs = model(x), torch_vit(model, x.double())
            self.close(ours, theirs, 2e-5, how)
            pair = [torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, theirs)]
            self.close(*pair, 2e-4, how)
            self.assertEqual(model.pos_embed.requires_grad, "pos" not in how)

    def test_rollout(self):
        model, x = self.model(), torch.randn(2, 3, 12, 12)
        got, y, total = self.vit.rollout(model, x), model.tokens(x), torch.eye(10)
        for block in model.blocks:
            theirs = nn.MultiheadAttention(24, 3, batch_first=True)  # torch's own weights
            theirs.in_proj_weight, theirs.in_proj_bias = block.attn.qkv.parameters()
            weights = theirs(*[block.norm1(y)] * 3)[1]  # (B, N, N), the mean over heads
            total, y = 0.5 * (weights + torch.eye(10)) @ total, block(y)
        self.close(got, total, 1e-5)

    def test_sizes(self):
        stem = self.vit.ConvStem(4, 64).proj
        layers = [getattr(m, "stride", type(m).__name__) for m in stem]
        self.assertEqual(layers, [(2, 2), "BatchNorm2d", "ReLU"] * 2 + [(1, 1)])
        model = self.vit.ViT(32, 4, 192, 1, 3, 10)
        part = model.blocks[0].attn.qkv.weight[:192]  # Xavier's
        self.assertAlmostEqual(part.abs().max().item(), (6 / 384) ** 0.5, delta=0.001)
        self.assertRaisesRegex(AssertionError, "32", model, torch.zeros(1, 3, 30, 32))

    def test_from_pretrained(self):
        """One network in many wrappings: torchvision's, MAE's with its decoder, a checkpoint's."""
        full, path = self.model(dim=128, heads=2), self.dir / "x.pt"
        bare = dict(full.state_dict())
        headless = {k: t for k, t in bare.items() if "head" not in k}
        square = bare["pos_embed"][:, 1:].mT.reshape(1, 128, 3, 3)
        square = F.interpolate(square, (5, 5), mode="bicubic").flatten(2).mT
        mae = headless | {"mask_token": square, "decoder_blocks.0.norm1.weight": square}
        for saved, heads, classes in (
            (torchvision_names(bare, "linear_1", "linear_2"), 2, 5),
            (torchvision_names(bare, "0", "3"), 2, 5),
            (dict(model=mae, config=dict(heads=4)), 4, 10),
        ):
            torch.save(saved, path)
            model = self.vit.ViT.from_pretrained(path)
            self.assertEqual(model.config, full.config | dict(heads=heads, num_classes=classes))
            self.same({k: model.state_dict()[k] for k in headless}, headless)
        self.same(model.head.weight.data, torch.zeros(10, 128))
        other = self.vit.ViT.from_pretrained(path, image_size=20)
        self.close(other.pos_embed[:, 1:], square, 1e-6)
        with mock.patch("torch.hub.load_state_dict_from_url", return_value=bare) as fetch:
            self.same(dict(self.vit.ViT.from_pretrained("vit_b_16").state_dict()), bare)
        url = "https://download.pytorch.org/models/vit_b_16-c867db91.pth"
        self.assertEqual(fetch.call_args.args[0], url)

    def test_trivial_augment(self):
        """All 13 against slow_distort, each image in its own way; one in 14 stays."""
        kinds = np.arange(14).repeat(6)
        s = np.tile([-1.0, -0.6, -0.1, 0.3, 0.65, 1.0], 14)
        x = torch.randint(0, 256, (84, 3, 6, 6)).float()
        x[::2, 2], x[::2, 1] = 77, 80 + x[::2, 1] % 2  # channels of one and of two values
        x[:30] = 30 * torch.arange(6)[:, None] + 20 * torch.arange(6)  # a ramp, to be warped
        x[:, 0, 0, 0] = 0
        rng = mock.Mock(integers=lambda n, size: kinds if n == 14 else None)
        rng.uniform = lambda low, high, n: np.reshape(s * -low, n)
        y = self.vit.trivial_augment(x, rng)
        self.same(y[78:], x[78:])
        for n in range(78):
            name = self.vit.DISTORTIONS[kinds[n]]
            self.close(y[n], slow_distort(x[n].double(), name, s[n]), 1e-5, name)

    def test_mix(self):
        x = torch.arange(1.0, 7)[:, None, None, None].expand(6, 3, 16, 16)
        rng = mock.Mock(beta=lambda a, b, n: np.full(n, 0.75))
        rng.random = lambda n: np.full(n, [[[0.5], [0.125]]])
        y, own = self.vit.mix(x, "cutmix", 1.0, rng)
        square = torch.zeros(16, 16)  # half as wide as the image, around row 8 and column 2
        square[4:12, :6] = 1
        self.same(y, torch.where(square == 1, x.flip(0), x))
        self.close(own, torch.full((6, 1), 1 - 48 / 256), 1e-6)

    def batch(self, step=0, **more):
        """Images (40, 3, 8, 8) that hold their number, a teacher's logits, and a batch of them."""
        images = torch.arange(7680).view(40, 3, 8, 8).remainder(251).byte()
        images[:, 0] = torch.arange(40)[:, None, None]
        logits = torch.arange(800).view(40, 2, 10).sin()
        c = self.vit.Config(batch_size=8, crop=0, temperature=0.3, **more)
        labels = torch.arange(40) % 10
        return images, logits, *self.vit.draw_batch(c, images, labels, logits, step)

    def test_batches(self):
        """An epoch has each image once, with its label and teacher's answer, mixed as it is."""
        seen = []
        for step in range(5):
            images, logits, x, targets, hints = self.batch(step)
            index = x[:, 0, 0, 0].long()
            plain = images[index].float()
            mirrored = (x != plain).flatten(1).any(1)
            self.same(x[mirrored], plain[mirrored].flip(3))
            self.same(targets.argmax(1), index % 10)
            self.close(hints, (logits[index, mirrored.long()] / 0.3).softmax(1), 1e-6)
            seen += index.tolist()
        self.assertEqual(sorted(seen), [*range(40)])
        _, _, y, *mixed = self.batch(step, cutmix=0.8)
        own = ((y - x.flip(0)) / (x - x.flip(0)))[:, 0].mean((1, 2))[:, None]
        for a, b in zip(mixed, (targets, hints), strict=True):
            self.close(a, own * b + (1 - own) * b.flip(0), 1e-5)

    def test_adamw(self):
        model = self.model(conv_stem=True)
        optimizer = self.vit.adamw(model, self.vit.Config(lr=1.0, layer_decay=0.5))
        found = {p: group for group in optimizer.param_groups for p in group["params"]}
        for name, p in model.named_parameters():
            layer = dict(norm=3, head=3, blocks=1 + ("s.1" in name)).get(name.split(".")[0], 0)
            weight = p.dim() > 1 and name not in ("cls_token", "pos_embed")
            want = 0.5 ** (3 - layer), 0.05 * weight
            self.assertEqual((found[p]["peak"], found[p]["weight_decay"]), want, name)

    def test_objective(self):
        logits, y, hints = torch.randn(3, 6, 10).double()
        y, hints = y.softmax(1), hints.softmax(1)
        loss = -((0.9 * y + 0.01) * logits.log_softmax(1)).sum(1).mean()
        soft = -16 * (hints * (logits / 4).log_softmax(1)).sum(1).mean()
        self.close(self.vit.objective(logits, y), loss, 1e-12)
        self.close(self.vit.objective(logits, y, hints, T=4.0), (loss + soft) / 2, 1e-12)

    def test_train(self):
        """The weights and their average after a run are those of a loop written here."""
        np.save(self.dir / "logits.npy", np.random.default_rng(0).integers(99, size=(260, 2, 10)))
        flags = f"""--lr 0.1 --ema 0.4 --mixup 0.8 --temperature 30 --layer_decay 0.9 --epochs 2
            --teacher {self.dir}/logits.npy --patch_size 4 --out {self.dir}""".split()
        c = self.vit.Config(**vars(self.vit.make_parser().parse_args(self.tiny + flags)))
        torch.manual_seed(c.seed)
        model = self.vit.make_vit(c).train()
        average = {k: t.clone() for k, t in model.state_dict().items()}
        optimizer = self.vit.adamw(model, c)
        draw = self.vit.draw_batch
        with mock.patch.object(self.vit, "draw_batch", side_effect=draw) as drawn:
            run("vit", *self.tiny, *flags)
        for step, call in enumerate(drawn.call_args_list):
            x, *targets = draw(*call.args)
            logits = model(self.vit.normalise(x, model.stats))
            self.vit.objective(logits, *targets, T=30.0).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            rate = (step + 1) / 3 if step < 2 else 0.5 + 0.5 * math.cos(math.pi * (step - 2) / 10)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            optimizer.step()
            optimizer.zero_grad()
            decay = min(0.4, (step + 1) / (step + 10))
            for k, w in model.state_dict().items():
                average[k] = decay * average[k] + (1 - decay) * w
        saved = load(self.dir / "ckpt.pt")
        for k, w in model.named_parameters():
            self.close(saved["model"][k], w, 1e-5, k)
        for k in ("head.weight", "patch_embed.proj.1.running_mean"):
            self.close(saved["ema"][k], average[k], 1e-5)

    def test_drop_path(self):
        block = self.vit.Block(24, 3, 0.5)
        x = torch.randn(400, 2, 24)
        skipped = (block(x) == x).flatten(1)
        self.same(skipped.all(1), skipped.any(1))
        self.assertAlmostEqual(skipped.float().mean().item(), 0.25, delta=0.1)
        blocks = self.vit.make_vit(self.vit.Config(depth=5, drop_path=0.4)).blocks
        self.close([b.drop_path.p for b in blocks], [0, 0.1, 0.2, 0.3, 0.4], 1e-6)

    def test_resume(self):
        flags = "--trivial --mixup 0.8 --cutmix 1 --ema 0.9 --drop_path 0.5 --layer_decay 0.8"
        self.resumes("vit", "draw_batch", 6, *self.tiny, *flags.split())
        self.same(*(load(self.dir / out / "ckpt.pt")["ema"] for out in ("whole", "parts")))

    def test_run(self):
        """What a run leaves behind, and what starts from it; val 0."""
        out = self.dir / "out"
        flags = f"--lr 0.01 --epochs 4 --pool cls --ema 0.5 --out {out}"
        run("vit", *self.tiny, *flags.split())
        log, best = rows(out), load(out / "best.pt")
        self.assertEqual(best["best"], max(row.get("val_accuracy", 0) for row in log))
        self.same(best["encoder"], {k: t for k, t in best["ema"].items() if "head" not in k})
        model = self.vit.ViT(**best["encoder_config"]).eval()
        model.load_state_dict(best["ema"])
        x, y = self.vit.make_shapes(2000, 3)
        z = model.features(self.vit.normalise(x, model.stats))
        self.close(log[-1]["test_loss"], F.cross_entropy(model.head(z), y), 1e-5)
        self.close(load(out / "features.pt")["test_z"], z, 1e-5)
        flags = f"--init {out}/best.pt --val 0 --image_size 40 --epochs 0.2 --out {out} --freeze"
        run("vit", *self.tiny, *flags.split())
        w = load(out / "ckpt.pt")["model"]
        for name in {*w} - {"pos_embed", "head.weight", "head.bias"}:
            self.same(w[name], best["ema"][name], name)
        self.assertEqual(load(out / "ckpt.pt")["config"]["pos"], "sincos")
        self.assertFalse(torch.equal(w["head.weight"], best["ema"]["head.weight"]))
        self.assertFalse((out / "best.pt").exists())


# --------------------------------------------------------------------------------------------------
# mae.py, and the evaluation that simclr.py and ijepa.py share with it

def slow_patches(image, P):
    """(3, S, S) as rows of numbers, a pixel after the other."""
    S = range(0, image.size(1), P)
    cells = [image[:, i : i + P, j : j + P] for i in S for j in S]
    return torch.stack([cell.permute(1, 2, 0).flatten() for cell in cells])


def slow_embedding(m, image):
    """The patches (N, C) of an image (3, S, S) in fp64, before positions."""
    w = m.patch_embed.proj.weight
    kernel = w.permute(2, 3, 1, 0).flatten(0, 2)
    return slow_patches(image, w.size(3)) @ kernel + m.patch_embed.proj.bias


def slow_mae(m, images, noise, ratio):
    """Loss and predictions of an fp64 model: an image at a time, a gap at a time."""
    encoder = torch_blocks(m.blocks, 24, 3)
    decoder = torch_blocks(m.decoder_blocks, 16, 2)
    losses, preds = [], []
    for image, z in zip(images, noise.tolist(), strict=True):
        order = sorted(range(len(z)), key=z.__getitem__)
        kept = order[: int(len(z) * (1 - ratio))]
        x = slow_embedding(m, image) + m.pos_embed[0, 1:]
        x = torch.cat((m.cls_token[0] + m.pos_embed[0, :1], x[kept]))
        x = m.decoder_embed(m.norm(encoder(x[None])[0]))
        y = [m.mask_token[0, 0]] * len(z)
        for i, patch in enumerate(kept):
            y[patch] = x[1 + i]
        y = torch.stack([x[0], *y]) + m.decoder_pos_embed[0]
        y = m.decoder_pred(m.decoder_norm(decoder(y[None])[0, 1:]))
        pixels = slow_patches(image, m.patch_size)
        if m.norm_pix_loss:
            pixels = pixels - pixels.mean(1, keepdim=True)
            pixels = pixels / (pixels.square().sum(1, keepdim=True) / 47 + 1e-6) ** 0.5
        losses += [(y[i] - pixels[i]).square().mean() for i in order[len(kept) :]]
        preds.append(y)
    return sum(losses) / len(losses), torch.stack(preds)


class TestMAE(Case):
    script = "mae"
    tiny = """--patch_size 8 --dim 32 --depth 2 --heads 2 --decoder_dim 16 --batch_size 16
        --epochs 0.5 --warmup 2 --eval_every 3 --log_every 2 --dtype float32
        --device cpu""".split()

    def model(self, **more):
        sizes = dict(image_size=16, patch_size=4, dim=24, depth=2, heads=3)
        sizes |= dict(decoder_dim=16, decoder_depth=2, decoder_heads=2)
        model = self.mae.MAE(**sizes | more)
        for p in model.parameters():
            p.data.add_(0.1 * torch.randn_like(p))
        return model

    def test_equations(self):
        """Loss, predictions, mask and gradients, against a slow loop over images and gaps."""
        x = 2 * torch.randn(3, 3, 16, 16) + 1
        noise = torch.rand(3, 16)
        for ratio, norm_pix_loss in ((0.75, False), (0.4, True)):
            model = self.model(norm_pix_loss=norm_pix_loss)
            slow = copy.deepcopy(model).double()
            theirs = slow_mae(slow, x.double(), noise, ratio)
            ours = model(x, ratio, noise)
            theirs[0].backward()
            ours[0].backward()
            for a, b in zip(ours[:2], theirs, strict=True):
                self.close(a, b, 5e-6)
            kept = noise.argsort(1)[:, : int(16 * (1 - ratio))]
            self.same(ours[2], torch.ones(3, 16).scatter(1, kept, 0))
            for name, p in slow.named_parameters():
                if p.grad is not None and "blocks" not in name:
                    self.close(model.get_parameter(name).grad, p.grad, 2e-5, name)
            tokens = torch.stack([slow_embedding(slow, image) for image in x.double()])
        tokens = torch.cat((slow.cls_token.expand(3, -1, -1), tokens), 1) + slow.pos_embed
        y = slow.norm(torch_blocks(slow.blocks, 24, 3)(tokens))
        self.close(model.features(x), y[:, 1:].mean(1), 5e-6)
        self.assertRaisesRegex(AssertionError, "keeps 0 of 16", model, x, 0.99)

    @unittest.skipUnless(find_spec("matplotlib"), "pictures need matplotlib")
    def test_reconstruct(self):
        """Kept patches are shown as they are, removed ones about as bright as they were."""
        import matplotlib.pyplot as plt
        model = self.model(norm_pix_loss=True)
        for p in model.decoder_pred.parameters():
            p.data.zero_()  # contrast 0: each patch's mean
        images, path = torch.randint(0, 256, (3, 3, 16, 16)), self.dir / "a.png"
        self.mae.draw_reconstructions(self.mae.Config(), model, images, path)
        sheet = 255 * torch.tensor(plt.imread(path))[..., :3].view(3, 16, 3, 16, 3)
        whole, left, rebuilt = sheet.permute(0, 2, 4, 1, 3).round()
        self.assertLessEqual((whole - images).abs().max(), 1)
        kept = (left == whole).all(1, keepdim=True).expand_as(images)
        self.assertEqual(kept.sum(), images.numel() / 4)
        self.same(rebuilt[kept], whole[kept])
        mean, std = (torch.tensor(s).view(3, 1, 1) for s in self.mae.IMAGENET_STATS)
        x = F.avg_pool2d((images / 255 - mean) / std, 4).mean(1, keepdim=True)  # of a patch
        error = rebuilt - 255 * (F.interpolate(x, (16, 16)) * std + mean).clamp(0, 1)
        self.assertLess(error[~kept].abs().max(), 8)

    def test_start(self):
        """What a new network begins with ([1] A.1 and its code); unpatchify."""
        x = torch.randn(2, 3, 12, 12)
        self.same(self.mae.unpatchify(self.mae.patchify(x, 3), 3), x)
        model = self.mae.MAE(32, 4, 128, 1, 4, 64, 1, 2)
        table = torch.zeros(65, 128)
        for y, x, n in itertools.product(range(8), range(8), range(32)):
            w = 10000 ** (-n / 32)
            waves = [math.sin(x * w), math.cos(x * w), math.sin(y * w), math.cos(y * w)]
            table[1 + 8 * y + x, n::32] = torch.tensor(waves)
        self.close(model.pos_embed[0], table, 1e-6)
        self.assertFalse(model.decoder_pos_embed.requires_grad)
        bound = model.patch_embed.proj.weight.abs().max().item()
        self.assertAlmostEqual(bound, (6 / 176) ** 0.5, delta=0.002)  # Xavier's

    def test_from_pretrained(self):
        """Files in the official layout, under wrappers."""
        from_pretrained, path = self.mae.MAE.from_pretrained, str(self.dir / "w.pth")
        x = torch.randn(2, 3, 16, 16)
        noise = torch.rand(2, 16)
        for dim, heads in ((1280, 16), (128, 2)):
            model = self.model(dim=dim, heads=heads, depth=1, decoder_dim=64)
            wrapped = {"module." + name: w for name, w in model.state_dict().items()}
            torch.save(dict(model=wrapped), path)
            self.same(from_pretrained(path)(x, 0.75, noise), model(x, 0.75, noise))
        big = from_pretrained(path, image_size=32, norm_pix_loss=True)
        self.assertTrue(big.norm_pix_loss)
        self.same(big.pos_embed, self.mae.MAE(32, 4, 128, 1, 2, 64, 1, 2).pos_embed)

    def test_masks(self):
        """random: all alike. block: a square but for one side. grid: one of each 2 x 2."""

        def removed(kind, ratio):
            noise = self.mae.mask_noise(kind, np.random.default_rng(0), 500, 8)
            rank = noise.argsort(1).argsort(1)
            return (rank >= int(64 * (1 - ratio))).view(500, 8, 8)

        share = removed("random", 0.75).float().mean(0)
        self.assertLess((share - 0.75).abs().max(), 0.1)
        blocks = removed("block", 0.5)
        height = blocks.any(2).sum(1)
        width = blocks.any(1).sum(1)
        gaps = height * width - 32  # the noise, 1e-3, may let a second side begin
        self.assertLess((gaps >= torch.maximum(height, width)).sum(), 5)
        blocks = removed("block", 0.2)
        inside = blocks[blocks[:, 1:-1, 1:-1].sum((1, 2)) == 13]  # no border cuts it
        longer = inside.any(2).sum(1) - inside.any(1).sum(1)
        self.assertGreater(len(inside), 50)
        self.assertLessEqual(longer.abs().max(), 1)
        kept = ~removed("grid", 0.75)
        corners = kept[:, :2, :2]
        self.same(kept, corners.repeat(1, 4, 4))
        self.assertEqual(corners.sum((1, 2)).unique().tolist(), [1])
        self.assertGreater(corners.float().mean(0).min(), 0.15)

    def test_batches(self):
        """Batches depend on (seed, step) alone; an epoch has every image once, moved."""
        images = torch.randint(0, 256, (60, 3, 32, 32), dtype=torch.uint8)
        images[:, 0] = torch.arange(60).view(60, 1, 1)
        padded = F.pad(self.mae.standardise(images), [4] * 4, mode="reflect")

        config = functools.partial(self.mae.Config, batch_size=10)
        batch = lambda step, **more: self.mae.masked_batch(config(**more), images, 8, step)
        self.same(batch(3), batch(3))
        for other in (batch(4), batch(3, seed=1)):
            self.assertFalse(torch.equal(other[1], batch(3)[1]))
        seen = torch.cat([batch(step)[0] for step in range(6, 12)])
        index = (255 * (0.247 * seen[:, 0, 0, 0] + 0.4914)).round().long()
        self.assertEqual(sorted(index.tolist()), [*range(60)])
        moves = torch.zeros(9, 9)
        for x, n in zip(seen, index, strict=True):
            for y, z in np.ndindex(9, 9):
                moves[y, z] += torch.equal(x, padded[n, :, y : y + 32, z : z + 32])
        self.assertEqual((moves.sum(), moves.any(0).sum(), moves.any(1).sum()), (60, 9, 9))

    def test_knn(self):
        train_y, test_y = torch.randint(10, (2, 200))
        means = 0.7 * torch.randn(10, 6) + 1
        train_z, test_z = (means[y] + torch.randn(200, 6) for y in (train_y, test_y))
        for k, t in ((5, 0.07), (20, 0.5), (20, 0.001)):
            right = 0
            for query, label in zip(test_z.double(), test_y, strict=True):
                s = F.cosine_similarity(query, train_z.double())
                votes = torch.zeros(10).double()
                for i in s.argsort(descending=True)[:k]:
                    votes[train_y[i]] += ((s[i] - 1) / t).exp()
                right += (votes.argmax() == label).item() / 200
            found = self.mae.knn_accuracy(train_z, train_y, test_z, test_y, k, t)
            self.assertAlmostEqual(found, right, 5)

    def test_linear_probe(self):
        """Against classifiers trained one after the other; validation chooses between them."""
        y = torch.randint(10, (400,))
        rates = (1e-4, 0.1, 30.0)
        answers = []
        z = 0.7 * torch.randn(10, 6)[y] + torch.randn(400, 6) + 1
        train = (z[:200], y[:200])
        val_z = z[200:300]
        test = (z[300:], y[300:])
        z = (z - z[:200].mean(0)) / (z[:200].var(0) + 1e-6).sqrt()
        for rate in rates:
            layer, generator = nn.Linear(6, 10), torch.Generator().manual_seed(0)
            for p in layer.parameters():
                nn.init.zeros_(p)
            sgd = torch.optim.SGD(layer.parameters(), momentum=0.9)
            for step in range(50):
                sgd.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / 50))
                index = torch.randint(200, (256,), generator=generator)
                loss = F.cross_entropy(layer(z[index]), y[index])
                sgd.zero_grad()
                loss.backward()
                sgd.step()
            answers.append(layer(z).argmax(1))
        for answer in answers:
            labels = answer[200:300]  # all of them are right
            found = self.probe(*train, val_z, labels, *test, steps=50, rates=rates)
            self.assertAlmostEqual(found, (answer[300:] == y[300:]).float().mean().item(), 5)

    def test_run(self):
        """Resume, log, checkpoints, features.pt; the encoder goes on in vit.py; --init; val 0."""
        self.resumes("mae", "masked_batch", 5, *self.tiny)
        out = self.dir / "whole"
        log, best, ckpt = rows(out), load(out / "best.pt"), load(out / "ckpt.pt")
        scores = {row["step"]: row["linear"] for row in log if "val_loss" in row}
        self.assertEqual((scores[best["step"]], max(scores.values())), (best["best"],) * 2)
        x = self.mae.standardise(self.mae.make_shapes(2000, 3)[0])
        model = self.mae.MAE.from_pretrained(str(out / "best.pt"))
        self.close(load(out / "features.pt")["test_z"], model.features(x), 1e-5)
        twin = importlib.import_module("vit").ViT.from_pretrained(out / "best.pt")
        self.close(twin.features(x), model.encode(x)[:, 0], 1e-5)
        decays = [group["weight_decay"] for group in ckpt["optimizer"]["param_groups"]]
        self.assertEqual(decays, [0.05, 0.0])
        init = "--init", out / "best.pt", "--lr", 0, "--val", 0, "--out", self.dir / "b"
        run("mae", *self.tiny, *init)
        last = rows(self.dir / "b")[-1]
        self.assertEqual(last["knn_random_init"], log[-1]["knn_random_init"])
        moved = load(self.dir / "b/ckpt.pt")["model"]
        self.same(moved["mask_token"], best["model"]["mask_token"])
        self.assertFalse((self.dir / "b/best.pt").exists())


# --------------------------------------------------------------------------------------------------
# simclr.py

def slow_nt_xent(z1, z2, t):
    """SimCLR's eq. 1, a pair at a time: views 2k and 2k + 1 are of one image."""
    views = torch.stack((z1, z2), dim=1).flatten(0, 1)
    views = views / views.square().sum(1, keepdim=True).sqrt()
    total = 0
    for i, a in enumerate(views):
        others = sum((a @ b / t).exp() for k, b in enumerate(views) if k != i)
        total = total - a @ views[i ^ 1] / t + others.log()
    return total / len(views)


def slow_moco(q, k, queue, t):
    total = 0
    for a, b in zip(q, k, strict=True):
        cosines = torch.cat((b[None], queue)) @ a
        total = total - cosines[0] / t + (cosines / t).exp().sum().log()
    return total / len(q)


def slow_vicreg(z1, z2, *weights):
    """VICReg's eq. 1 to 5, as its authors' code weighs them."""
    s = (z1 - z2).square().mean()
    v = 0
    c = 0
    for z in (z1, z2):
        cov, D = torch.cov(z.T), z.size(1)
        variances = cov.diagonal()
        v = v + (1 - (variances + 1e-4).sqrt()).clamp(min=0).sum() / D / 2
        c = c + (cov.square().sum() - variances.square().sum()) / D
    return weights[0] * s + weights[1] * v + weights[2] * c


def slow_jitter(x, amounts, order):
    """A picture (3, H, W), 0 to 1: brightness, contrast, saturation, and hue by colorsys."""
    for kind in order:
        f, (r, g, b) = amounts[kind], x
        grey = 0.299 * r + 0.587 * g + 0.114 * b
        y = f * x + (1 - f) * (0, grey.mean(), grey, 0)[kind]
        if kind == 3:
            for i, j in np.ndindex(*grey.shape):
                h, s, v = colorsys.rgb_to_hsv(*x[:, i, j].tolist())
                y[:, i, j] = torch.tensor(colorsys.hsv_to_rgb((h + f) % 1, s, v))
        x = y.clamp(0, 1)
    return x


class TestSimCLR(Case):
    script = "simclr"
    tiny = """--batch_size 16 --width 8 --head_dim 12 --queue 40 --warmup 2 --epochs 1
        --log_every 1 --dtype float32 --device cpu""".split()

    def test_losses(self):
        """Values and gradients against slow ones; none for keys; in bfloat16."""
        s, (z1, z2, queue) = self.simclr, torch.randn(3, 5, 4).double() * 0.7
        unit = [F.normalize(z, dim=1) for z in (z1, z2, queue)]
        for fast, slow, tensors, rest in (
            (s.nt_xent, slow_nt_xent, [z1, z2], [0.3]),
            (s.moco_loss, slow_moco, unit, [0.3]),
            (s.vicreg_loss, slow_vicreg, [z1, z2], [3, 5, 7]),
        ):
            a, b = ([t.clone().requires_grad_() for t in tensors] for _ in "ab")
            got, want = fast(*a, *rest), slow(*b, *rest)
            self.close(got, want, 1e-12)
            got.backward()
            want.backward()
            self.close(a[0].grad, b[0].grad, 1e-10)
            if fast is s.moco_loss:
                self.assertIsNone(a[1].grad)
            else:
                self.close(a[1].grad, b[1].grad, 1e-10)
            halves = [t.bfloat16() for t in tensors]
            with torch.autocast("cpu", torch.bfloat16):
                half = fast(*halves, *rest)
            self.close(half, fast(*[t.double() for t in halves], *rest), 1e-5)
        self.close(s.vicreg_loss(z1, z2), slow_vicreg(z1, z2, 25, 25, 1), 1e-12)

    def test_sizes(self):
        w = self.simclr.ResNet18(8).layer4[0].conv1.weight
        self.assertAlmostEqual(w.std().item(), 288**-0.5, delta=0.002)
        for loss, size in dict(moco=850, simclr=874, vicreg=500).items():
            head = self.simclr.make_head(loss, 24, 10)
            trained = [p.numel() for p in head.parameters() if p.requires_grad]
            self.assertEqual(sum(trained), size)

    def model(self, loss):
        encoder = self.simclr.ResNet18(8)
        return self.simclr.TwoViews(loss, encoder, 12, 0.2, queue=20, momentum=0.9).double()

    def test_normalised(self):
        """SimCLR's batch norms see all views together, VICReg's a view at a time."""
        x1, x2 = torch.randn(2, 8, 3, 8, 8).double()
        model = self.model("simclr")
        z = model.network(torch.cat((x1, x2)))
        self.close(model(x1, x2), slow_nt_xent(z[:8], z[8:], 0.2), 1e-10)
        model = self.model("vicreg")
        z = [model.network(x) for x in (x1, x2)]
        self.close(model(x1, x2), slow_vicreg(*z, 25, 25, 1), 1e-10)

    def test_moco(self):
        """Three steps by hand: the key network's average, shuffled quarters, a queue of 20."""
        x1, x2 = torch.randn(2, 8, 3, 8, 8).double()
        model, seen = self.model("moco"), []
        for p in model.key_network.parameters():
            p.add_(0.05 * torch.randn_like(p))
        slow, queue = copy.deepcopy(model.key_network), model.queue.clone()
        self.close(queue.norm(dim=1), torch.ones(20), 1e-6)
        model.key_network.register_forward_hook(lambda _, args, z: seen.append(args[0]))
        for _ in range(3):
            seen.clear()
            loss = model(x1, x2)
            for k, q in zip(slow.parameters(), model.network.parameters(), strict=True):
                k.copy_((0.9 * k + 0.1 * q).detach())
            order = [(x2 == x).flatten(1).all(1).nonzero().item() for x in torch.cat(seen)]
            self.assertEqual(sorted(order), [*range(8)])
            self.assertNotEqual(order, [*range(8)])
            k = torch.cat([slow(x2[order[i : i + 2]]) for i in (0, 2, 4, 6)])
            k = F.normalize(k, dim=1)[np.argsort(order)]
            q = torch.cat([model.network(x) for x in x1.split(2)])
            want = slow_moco(F.normalize(q, dim=1), k, queue, 0.2)
            self.close(loss, want, 1e-9)
            queue = torch.cat((queue, k))[8:]
            self.close(model.queue, queue, 1e-9)

    def test_crop(self):
        """Against slices of the same boxes, resized by torch; the whole if none fits."""
        x, n = torch.rand(200, 3, 16, 16) * 255, 200
        crop = self.simclr.random_crop
        got = crop(x, np.random.default_rng(0), 0.2)
        rng = np.random.default_rng(0)
        areas = 256 * rng.uniform(0.2, 1, (10, n))
        aspects = (4 / 3) ** rng.uniform(-1, 1, (10, n))
        tops, lefts, mirrored = rng.random((3, n))
        for i in range(n):
            for area, aspect in zip(areas[:, i], aspects[:, i], strict=True):
                h = round((area / aspect) ** 0.5)
                w = round((area * aspect) ** 0.5)
                if max(h, w) <= 16:
                    break
            top = int(tops[i] * (17 - h))
            left = int(lefts[i] * (17 - w))
            box = x[i, None, :, top:, left:][..., :h, :w]
            want = F.interpolate(box, (16, 16), mode="bilinear")[0]
            want = want.flip(2) if mirrored[i] < 0.5 else want
            self.close(got[i], want, 1e-4, i)
        got = crop(x, np.random.default_rng(1), 1.0)
        errors = [(got - want).abs().flatten(1).amax(1) for want in (x, x.flip(3))]
        self.assertLess(torch.minimum(*errors).max(), 0.01)

    def test_jitter(self):
        """Against colorsys; greys and pure colours too. A fifth of the images stay."""
        x = torch.rand(40, 3, 3, 3)
        rng = np.random.default_rng(3)
        x[:, :, 0, 0] = 0.5
        x[:, :, 1] = x[:, :, 1].round()
        got = self.simclr.colour_jitter(x * 255, np.random.default_rng(3), 1.0) / 255
        amounts = rng.uniform(-1, 1, (40, 4)) * (0.8, 0.8, 0.8, 0.2)
        amounts += (1, 1, 1, 0)
        orders = rng.permuted(np.tile(np.arange(4), (40, 1)), axis=1)
        for i, coin in enumerate(rng.random(40)):
            want = slow_jitter(x[i], amounts[i], orders[i]) if coin < 0.8 else x[i]
            self.close(got[i], want, 1e-4, i)

    def views(self, step, images, batch_size=16, **more):
        """Two views of a batch, in 0 to 1."""
        c = self.simclr.Config(batch_size=batch_size, **more)
        mean, std = torch.tensor(self.simclr.CIFAR10_STATS).view(2, 3, 1, 1)
        return [x * std + mean for x in self.simclr.draw_views(c, images, step)]

    def test_views(self):
        images = torch.arange(48).view(48, 1, 1, 1).repeat(1, 3, 8, 8).byte()
        seen = []
        for step in range(6):
            a, b = self.views(step, images, jitter=0.0)
            self.close(a, b, 1e-4)
            seen += (a[:, 0, 0, 0] * 255).round().int().tolist()
        for epoch in (seen[:48], seen[48:]):
            self.assertEqual(sorted(epoch), [*range(48)])
        self.assertNotEqual(seen[:48], seen[48:])
        images = torch.randint(0, 256, (480, 3, 8, 8), dtype=torch.uint8)
        x, other = self.views(0, images, grey=0.3, batch_size=480)
        self.assertGreater((x - other).flatten(1).abs().amax(1).min(), 0.01)
        greys = (x[:, 0] - x[:, 2]).abs().amax((1, 2)) < 1e-4
        self.assertAlmostEqual(greys.float().mean().item(), 0.3, delta=0.06)

    def test_run(self):
        """Resume, and what a run leaves. Evaluation changes nothing."""
        flags = [*self.tiny, "--loss", "moco", "--lr", 0.05]
        self.resumes("simclr", "draw_views", 9, *flags)
        out = self.dir / "whole"
        log, best, last = rows(out), load(out / "best.pt"), load(out / "ckpt.pt")
        knn = {row["step"]: row["knn"] for row in log if "val_loss" in row}
        self.assertEqual((best["step"], best["best"]), max(knn.items(), key=lambda i: i[1]))
        decays = [group["weight_decay"] for group in last["optimizer"]["param_groups"]]
        self.assertEqual(decays, [0.05, 0.0])
        encoder = self.simclr.ResNet18(8).eval()
        encoder.load_state_dict(best["encoder"])
        x = self.simclr.standardise(self.simclr.make_shapes(2000, 3)[0])
        self.close(load(out / "features.pt")["test_z"], encoder(x), 1e-5)
        run("simclr", "--out", self.dir / "b", *flags, "--eval_every", 12)
        self.same(last["model"], load(self.dir / "b/ckpt.pt")["model"])

    def test_init_and_flags(self):
        """An encoder starts another loss and resnet.py; defaults by loss and data."""
        run("simclr", "--out", self.dir, *self.tiny, "--val", 0, "--epochs", 0.2)
        path, x = self.dir / "ckpt.pt", torch.randn(2, 3, 32, 32)
        self.assertFalse((self.dir / "best.pt").exists())
        ours = self.simclr.ResNet18(8).eval()
        ours.load_state_dict(load(path)["encoder"])
        flags = ["--out", self.dir / "b", *self.tiny, "--loss", "moco", "--epochs", 0.2]
        run("simclr", *flags, "--init", path, "--lr", 0)
        found = load(self.dir / "b/ckpt.pt")["model"]["key_network.0.conv1.weight"]
        self.close(found, ours.conv1.weight, 1e-6)
        theirs = importlib.import_module("resnet").from_pretrained(path, arch="resnet18").eval()
        self.close(theirs.features(x), ours(x), 1e-5)
        train = self.patch(self.simclr, "train", mock.Mock())
        run("simclr", "--loss", "vicreg", "--data", "cifar10", "--grey", 0.7)
        c = train.call_args.args[0]
        self.assertEqual((c.head_dim, c.crop_min, c.jitter, c.grey), (512, 0.2, 0.5, 0.7))


# --------------------------------------------------------------------------------------------------
# ijepa.py

def slow_jepa(m, images, context_ids, target_ids):
    """The loss of an fp64 model, an image and a target at a time."""

    def encode(net, image, ids):  # (3, 16, 16) -> (K, C)
        x = slow_embedding(net, image) + net.pos_embed[0]
        return net.norm(torch_blocks(net.blocks, 24, 2)(x[None, ids])[0])

    teacher = m.target_encoder if m.stop_gradient else m.encoder
    p, errors = m.predictor, []
    places = p.predictor_pos_embed[0]
    for i, image in enumerate(images):
        z = encode(teacher, image, range(16))
        z = z - z.mean(1, True)
        z = z / (z.square().mean(1, True) + 1e-5).sqrt()
        context = encode(m.encoder, image, context_ids[i])
        context = p.predictor_embed(context) + places[context_ids[i]]
        for target in target_ids:
            ids = target[i]
            x = torch.cat((p.mask_token[0] + places[ids], context))
            x = torch_blocks(p.predictor_blocks, 16, 2)(x[None])[0, : len(ids)]
            e = (p.predictor_proj(p.predictor_norm(x)) - z[ids]).abs()
            errors.append(torch.where(e < 1, e**2 / 2, e - 0.5))
    return torch.stack(errors).mean()


def slow_masks(rng, batch, grid, targets):
    """Contexts before they are cut, and targets, as sets of places, in loops."""

    def block(area, aspect):
        sides = [min(grid, max(1, round((area * a) ** 0.5))) for a in (aspect, 1 / aspect)]
        top, left = (rng.integers(grid - side + 1) for side in sides)
        rows = range(top, top + sides[0])
        columns = range(left, left + sides[1])
        return {*itertools.product(rows, columns)}

    side, area = rng.uniform((0.85, 0.15), (1, 0.2)) * grid**2
    aspect = rng.uniform(0.75, 1.5)
    for _ in range(batch):
        square, context = block(side, 1.0), ()
        for _ in range(11):
            if len(context) < grid**2 / 4:
                blocks = [block(area, aspect) for _ in range(targets)]
                context = square.difference(*blocks)
        yield context, blocks


class TestIJEPA(Case):
    script = "ijepa"
    off = contextlib.nullcontext()
    tiny = """--dim 16 --depth 1 --heads 2 --predictor_dim 8 --predictor_depth 1
        --warmup 2 --batch_size 32 --epochs 2 --eval_every 3 --log_every 3 --device cpu
        --dtype float32""".split()

    def model(self, size=16, patch=4, heads=2, predictor_dim=16, **more):
        """A small network whose weights are large enough for every term to matter."""
        model = self.ijepa.IJEPA(size, patch, 24, 2, heads, predictor_dim, 2, **more)
        for name, p in model.state_dict().items():
            if "pos_embed" not in name:
                p.copy_(("norm" in name and "weight" in name) + 0.3 * torch.randn(p.shape))
        return model

    def masks(self, batch, grid, seed=0, **more):
        generator = torch.Generator().manual_seed(seed)
        return self.ijepa.sample_masks(batch, grid, generator, **more)

    def test_objective(self):
        x = torch.randn(3, 3, 16, 16)
        masks = self.masks(3, 4)
        for stop in (True, False):
            model = self.model(stop_gradient=stop)
            slow = copy.deepcopy(model).double()
            loss = model(x, *masks)
            want = slow_jepa(slow, x.double(), *masks)
            self.close(loss, want, 1e-5)
            loss.backward()
            want.backward()
            for name, p in model.named_parameters():
                trained = "target" not in name and "pos" not in name
                self.assertEqual(p.requires_grad, trained, name)
                if trained and "blocks" not in name:
                    self.close(p.grad, slow.get_parameter(name).grad, 2e-4, name)

    def test_dtype(self):
        """In the dtype that auto picks: all patches by ids; what ids leave out stays unseen."""
        _, autocast = self.ijepa.choose_device("cpu", "auto")
        encoder, x, other = self.model(size=32).encoder, *torch.randn(2, 4, 3, 32, 32)
        ids = torch.rand(4, 64).argsort(1)
        hidden = torch.ones(4, 64).scatter(1, ids[:, :20], 0).view(4, 1, 8, 8)
        other = torch.where(F.interpolate(hidden, (32, 32)) == 1, other, x)
        with torch.no_grad(), autocast:
            self.close(encoder(x, ids), encoder(x)[torch.arange(4)[:, None], ids], 0.03)
            self.same(encoder(other, ids[:, :20]), encoder(x, ids[:, :20]))

    def test_names(self):
        with torch.device("meta"):
            encoder = self.ijepa.Encoder(224, 14, 1280, 32, 16)
        self.assertEqual(sum(p.numel() for p in encoder.parameters()), 630762240)
        model = self.ijepa.IJEPA(32, 4, 192, 1, 3, 96, 1)
        self.same(model.encoder.state_dict(), model.target_encoder.state_dict())
        names = {name.split(".")[0] for name in model.predictor.state_dict()}
        parts = "pos_embed embed blocks norm proj".split()
        self.assertEqual(names, {"mask_token", *(f"predictor_{part}" for part in parts)})
        w = model.predictor.predictor_proj.weight
        self.assertAlmostEqual(w.abs().max().item(), (6 / 288) ** 0.5, delta=0.002)  # Xavier's
        for wrong in (dict(patch=5), dict(heads=5), dict(predictor_dim=9)):
            self.assertRaises(AssertionError, self.model, **wrong)

    def test_masks(self):
        """Rectangles of one size, contexts of one length without them; the generator alone
        decides; targets that leave nothing."""
        for grid, targets in itertools.product((4, 8, 13), (1, 4)):
            context, blocks = self.masks(40, grid, targets=targets)
            self.same((context, blocks), self.masks(40, grid, targets=targets))
            self.assertEqual((len(context), len(blocks)), (40, targets))
            self.assertGreaterEqual(context.size(1), grid**2 // 4)
            sizes = set()
            for n, seen in enumerate(context.tolist()):
                removed = [ids[n].tolist() for ids in blocks]
                self.assertEqual(len({*seen}.difference(*removed)), context.size(1))
                for ids in removed:
                    top, left = divmod(ids[0], grid)
                    bottom, right = divmod(ids[-1], grid)
                    rows, columns = range(top, bottom + 1), range(left, right + 1)
                    self.assertEqual(ids, [grid * i + j for i in rows for j in columns])
                    sizes.add((bottom - top, right - left))
            self.assertEqual(len(sizes), 1)
        with self.assertRaisesRegex(ValueError, "nothing of a context"):
            self.masks(64, 8, target_scale=(0.5, 0.5), context_scale=(0.2, 0.3))

    def test_frequencies(self):
        """Where contexts and targets lie, and how long contexts are, against slow_masks: which
        patches are cut doesn't depend on their place."""
        rng = np.random.default_rng(0)
        counts = torch.zeros(2, 2, 8, 8)
        lengths = [[], []]
        for seed in range(300):
            images = [*slow_masks(rng, 8, 8, 4)]
            K = min(len(context) for context, _ in images)
            lengths[0].append(K)
            for context, blocks in images:
                for i, j in context:
                    counts[0, 0, i, j] += K / len(context)
                for i, j in itertools.chain(*blocks):
                    counts[0, 1, i, j] += 1
            context, blocks = self.masks(8, 8, seed)
            lengths[1].append(context.size(1))
            for kind, ids in enumerate((context, torch.cat(blocks, dim=1))):
                counts[1, kind] += ids.flatten().bincount(minlength=64).view(8, 8)
        self.assertAlmostEqual(*np.mean(lengths, axis=1), delta=0.4)
        for slow, fast in zip(*counts, strict=True):
            self.close(fast, slow, 0.1)

    def test_step(self):
        """The batches, and a run's steps: rate, update, then the target encoder's average."""
        x = torch.arange(20).view(20, 1, 1, 1).expand(20, 3, 16, 16).byte()
        c = self.ijepa.Config(batch_size=4)
        seen = torch.cat([self.ijepa.jepa_batch(c, x, step)[0][:, 2, 0, 0] for step in range(8)])
        seen = 255 * (0.2616 * seen + 0.4465)
        self.assertEqual(sorted(seen[:20].round().tolist()), [*range(20)])
        self.assertFalse(torch.equal(seen[:12], seen[20:]))
        save, states = self.ijepa.save, []

        def spy(path, state):
            save(path, state)
            if "ckpt" in str(path):
                states.append(copy.deepcopy(state))

        self.patch(self.ijepa, "save", spy)
        flags = "--ema_start", 0.6, "--eval_every", 1, "--epochs", 1, "--out", self.out
        run("ijepa", *self.tiny, *flags)
        c = self.ijepa.Config(**states[0]["config"])
        x, _ = self.ijepa.make_shapes(10000, 1)
        self.assertEqual(len(states), 6)
        for step, share in enumerate((2 / 3, 1, 0.853553, 0.5, 0.146447), 1):
            model = self.ijepa.IJEPA(32, *[getattr(c, name) for name in self.ijepa.SHAPE])
            model.load_state_dict(states[step - 1]["model"])
            matrices, vectors = ([p for p in model.parameters() if (p.dim() == 1) == flat]
                                 for flat in (False, True))
            adamw = torch.optim.AdamW([dict(params=matrices), dict(params=vectors)])
            adamw.load_state_dict(states[step - 1]["optimizer"])  # decay, averages
            for group in adamw.param_groups:
                group["lr"] = c.lr * share
            model(*self.ijepa.jepa_batch(c, x, step)).backward()
            adamw.step()
            momentum = 0.6 + 0.4 * step / 6
            for k, want in model.named_parameters():
                if k.startswith("target"):
                    new = model.get_parameter(k.removeprefix("target_"))
                    want = momentum * want + (1 - momentum) * new
                self.close(states[step]["model"][k], want, 1e-5, k)

    def test_collapse_watch(self):
        """RankMe in closed form; std, and the loss over that of each place's mean, by hand."""
        rankme, c = self.ijepa.rankme, self.ijepa.Config(dim=24)
        d = torch.diag(torch.tensor([3.0, 1.0]))
        self.assertAlmostEqual(rankme(d), 4 / 27**0.25, 3)
        model = self.model(size=32, patch=8)
        val = self.ijepa.make_shapes(60, 2)
        got = self.ijepa.evaluate(c, model, val, val, self.off)
        c.batch_size = 60
        x, context_ids, target_ids = self.ijepa.jepa_batch(c, val[0], 0)
        z = model.target_encoder(x).detach()
        t = F.layer_norm(z, (24,))
        t -= t.mean(0)
        errors = [t[n, ids[n]] for ids in target_ids for n in range(60)]
        errors = torch.cat(errors)
        of_mean = F.smooth_l1_loss(errors, torch.zeros_like(errors))
        loss = model(x, context_ids, target_ids).detach()
        self.close([got["val_loss"], got["over_mean"]], [loss, loss / of_mean], 1e-4)
        z = z.mean(1)
        unit = z / z.square().sum(1, True).sqrt()
        variance = (unit - unit.mean(0)).square().sum(0) / 59
        std = variance.sqrt().mean() * 24**0.5
        self.close([got["std"], got["rankme"]], [std, rankme(z)], 1e-3)

    def test_tsne(self):
        """A step against autograd of KL(P || Q), with P by a scan of its own."""
        x, P = torch.randn(40, 4), torch.zeros(40, 40)
        betas = torch.logspace(-2, 1, 9000)[:, None]
        for i in range(40):
            p = (-betas * (x - x[i]).square().sum(1)).exp()
            p[:, i] = 0
            p /= p.sum(1, True)
            entropy = torch.special.entr(p).sum(1)
            P[i] = p[(entropy - math.log(8)).abs().argmin()]
        start, moved = (torch.manual_seed(3) and self.ijepa.tsne(x, 8.0, n) for n in (0, 1))
        y = start.double().requires_grad_()
        kernel = 1 / (1 + (y[:, None] - y).square().sum(2))
        kl = -(12 / 80 * (P + P.T) * kernel.log()).sum() + (kernel.sum() - 40).log()
        kl.backward()
        self.close((start - moved) / (50 * 1.2), y.grad - y.grad.mean(0), 0.01)

    def test_run(self):
        """Resume; the target encoder that is kept, best by kNN, for vit.py; --init; val 0."""
        flags = [*self.tiny, "--lr", 0.01]
        self.resumes("ijepa", "jepa_batch", 8, *flags)
        out, last = self.dir / "whole", load(self.dir / "parts/ckpt.pt")
        log, best = rows(out), load(out / "best.pt")
        scores = {row["step"]: row["knn"] for row in log if "rankme" in row}
        self.assertEqual((scores[best["step"]], max(scores.values())), (best["best"],) * 2)
        encoder = self.ijepa.Encoder(**last["encoder_config"])
        encoder.load_state_dict(best["encoder"])
        self.same(best["encoder"]["norm.bias"], best["model"]["target_encoder.norm.bias"])
        x = self.ijepa.standardise(self.ijepa.make_shapes(2000, 3)[0])
        z = encoder(x).mean(1)
        vit = importlib.import_module("vit").ViT.from_pretrained(out / "best.pt")
        self.close(vit.features(x), z, 1e-5)
        self.close(load(out / "features.pt")["test_z"], z, 1e-5)
        decays = [group["weight_decay"] for group in last["optimizer"]["param_groups"]]
        self.assertEqual(decays, [0.04, 0.0])
        init = "--init", out / "ckpt.pt", "--val", 0, "--lr", 0, "--out", self.dir / "b"
        run("ijepa", *flags, *init)
        found = load(self.dir / "b/ckpt.pt")["model"]["predictor.mask_token"]
        self.same(found, last["model"]["predictor.mask_token"])
        self.assertFalse((self.dir / "b/best.pt").exists())
        self.assertEqual(rows(self.dir / "b")[-1]["step"], 16)  # of all images

    def test_collapse(self):
        """With the gradient in the targets, features collapse, and the loss is lower."""
        flags, last = [*self.tiny, "--epochs", 10, "--lr", 0.02, "--ema_start", 0.5], []
        for name in ("--stop_gradient", "--no-stop_gradient"):
            run("ijepa", *flags, "--eval_every", 60, "--out", self.dir / name, name)
            last.append(rows(self.dir / name)[-2])
        for metric, share in dict(std=0.6, rankme=0.8, val_loss=0.5).items():
            self.assertLess(last[1][metric], share * last[0][metric], metric)


def main():
    started = time.perf_counter()
    result = unittest.main(testRunner=unittest.TextTestRunner(sys.stdout), exit=False).result
    bad = len(result.failures) + len(result.errors)
    passed = result.testsRun - bad - len(result.skipped)
    print(f"{time.perf_counter() - started:.0f} s")
    print(f"{passed} passed, {bad} failed, {len(result.skipped)} skipped")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
