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


def child(*command, timeout=300, **environment):
    """A finished process of Python with one thread; its stdout, stderr and returncode."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), **environment}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


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
    def setUp(self):
        self.dir = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.dir, ignore_errors=True)
        torch.manual_seed(0)

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
            self.assertEqual(len(a), len(b), where)
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
        run(script, "--out", parts, "--resume", *flags)
        a, b = load(whole / "ckpt.pt"), load(parts / "ckpt.pt")
        for key in ("model", "optimizer", "step", "best"):
            self.same(a[key], b[key], key)
        timeless = [
            [
                {k: v for k, v in row.items() if k != "seconds" and not k.endswith("_per_s")}
                for row in rows(out)
            ]
            for out in (whole, parts)
        ]
        self.assertEqual(*timeless)


@contextlib.contextmanager
def small_shapes(script):
    """Fewer shapes than a vision script draws for itself: 200, 60 and 60."""
    module = importlib.import_module(script)
    draw = module.make_shapes

    def few(n, seed):
        return draw(200 if n == 10000 else min(n, 60), seed)

    few.original = draw
    with mock.patch.object(module, "make_shapes", few):
        yield


# --------------------------------------------------------------------------------------------------
# the house: what holds for every script

SCRIPTS = ["flash_attn", "gpt2", "ijepa", "mae", "puzzles", "resnet", "simclr", "vit"]
TRAIN = dict(puzzles=["train"])  # what comes before the flags of a run
SHORT = dict(  # flags that make an otherwise default run take seconds
    gpt2=["--steps", 3, "--sample_tokens", 8],
    puzzles=["--steps", 3],
    flash_attn=["--steps", 3, "--block_size", 64],
    resnet=["--epochs", 0.5, "--batch_size", 32],
    vit=["--epochs", 0.5, "--batch_size", 32],
    mae=["--epochs", 0.5, "--batch_size", 32],
    simclr=["--epochs", 0.5, "--batch_size", 32],
    ijepa=["--epochs", 0.5, "--batch_size", 32],
)
VISION = ["ijepa", "mae", "resnet", "simclr", "vit"]


class TestHouse(Case):
    def setUp(self):
        super().setUp()
        for script in VISION:
            patch = small_shapes(script)
            patch.__enter__()
            self.addCleanup(patch.__exit__, None, None, None)
            module = importlib.import_module(script)
            if hasattr(module, "linear_probe"):  # a few of its 1,000 steps will do
                quick = functools.partial(module.linear_probe, steps=2)
                patch = mock.patch.object(module, "linear_probe", quick)
                patch.start()
                self.addCleanup(patch.stop)

    def source(self, script):
        return (HERE / f"{script}.py").read_text(encoding="utf-8")

    def test_imports(self):
        """No script imports another; at module level only the four packages."""
        allowed = {*sys.stdlib_module_names, "torch", "numpy", "tiktoken", "requests"}
        for script in SCRIPTS:
            tree = ast.parse(self.source(script))
            kinds = (ast.FunctionDef, ast.Try)  # a function that needs it, or a try-import
            functions = [node for node in ast.walk(tree) if isinstance(node, kinds)]
            inside = {node for function in functions for node in ast.walk(function)}
            for node in ast.walk(tree):
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    names = [node.module or "."]
                else:
                    continue
                for name in (name.split(".")[0] for name in names):
                    self.assertFalse((HERE / f"{name}.py").exists(), f"{script} imports {name}")
                    self.assertTrue(node in inside or name in allowed, f"{script} imports {name}")

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
        code = (
            """if True:
            import numpy, random, signal, sys, torch
            def state():
                return [random.getstate(), numpy.random.get_state()[1].tolist(), sys.path[:],
                        torch.get_rng_state().tolist(), torch.get_num_threads(),
                        torch.get_default_dtype(), torch.get_float32_matmul_precision(),
                        torch.is_grad_enabled(), signal.getsignal(signal.SIGINT)]
            before = state()
            import """
            + ", ".join(SCRIPTS)
            + """
            assert state() == before"""
        )
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

    def test_bad_flags(self):
        """argparse's exit 2."""
        for script in SCRIPTS:
            for flags in (["--no_such_flag"], ["--lr", "much"], ["--device"], ["--dtype", "int3"]):
                with self.subTest(script=script, flags=flags), self.assertRaises(SystemExit) as end:
                    run(script, *TRAIN.get(script, []), *flags)
                self.assertEqual(end.exception.code, 2)

    def test_default_run(self):
        """A few steps with otherwise default flags leave the contract's files in --out alone."""
        for script in SCRIPTS:
            with self.subTest(script=script), folder(self.dir):
                run(script, *TRAIN.get(script, []), *SHORT[script], "--log_every", 1)
                out = Path("out") / script
                self.assertEqual([p.name for p in self.dir.iterdir()], ["out"])
                self.check_run(script, out)
                shutil.rmtree(self.dir / "out")

    def check_run(self, script, out):
        config, log = json.loads((out / "config.json").read_text()), rows(out)
        module = importlib.import_module(script)
        self.assertEqual(list(config), [f.name for f in dataclasses.fields(module.Config)])
        steps = [row for row in log if "loss" in row and "final" not in row]
        evaluations = [row for row in log if "val_loss" in row and "final" not in row]
        self.assertTrue(steps and evaluations)
        for row in steps:
            self.assertLessEqual({"step", "loss", "lr", "seconds"}, {*row})
            self.assertTrue({"tokens_per_s", "images_per_s"} & {*row})
        self.assertLessEqual({"step", "seconds"}, {*evaluations[0]})
        self.assertEqual([row for row in log if "final" in row], log[-1:])
        for name in ("ckpt.pt", "best.pt") if script != "flash_attn" else ():
            saved = load(out / name)
            self.assertLessEqual({"model", "optimizer", "config", "step", "best"}, {*saved})
            self.assertEqual(saved["config"], config)
            prefixes = [k for k in saved["model"] if k.startswith(("module.", "_orig_mod."))]
            self.assertEqual(prefixes, [])
        self.assertEqual([p for p in out.iterdir() if p.suffix == ".tmp"], [])

    def test_full_disk(self):
        """A checkpoint that can't be written whole leaves the old one."""
        for script in SCRIPTS:
            save = getattr(importlib.import_module(script), "save", None)
            if save:
                path = self.dir / "ckpt.pt"
                save(path, dict(step=1))

                def half(state, name):
                    Path(name).write_bytes(b"PK half a file")
                    raise OSError("No space left on device")

                with mock.patch("torch.save", half), self.assertRaisesRegex(OSError, "No space"):
                    save(path, dict(step=2))
                self.assertEqual(load(path), dict(step=1))

    def test_figures(self):
        """The README's figures of default runs are those of their logs."""
        text = (HERE / "README.md").read_text(encoding="utf-8")
        probes = ["knn", "linear", "linear_random_init", "linear_pixels"]
        keys = dict(resnet=["test_accuracy"], vit=["test_accuracy"], mae=probes[1:])
        for script in VISION:
            path = HERE / f"assets/logs/{script}/default_seed0.jsonl"
            final = json.loads(path.read_text().splitlines()[-1])
            for key in keys.get(script, probes):
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
        commands = [
            shlex.split(part, comments=True)
            for part in parts
            if part.startswith(("python ", "torchrun "))
        ]
        elsewhere = "shakespeare|cifar|^gpt2|^resnet|^deit|^my|^out/tuned|--bench|--compile"
        elsewhere = re.compile(elsewhere)
        done = set()
        with folder(self.dir):
            for words in commands:
                names = [w[:-3] for w in words if w.endswith(".py") and w[:-3] in SCRIPTS]
                if not names:
                    continue
                script, flags = names[0], words[words.index(f"{names[0]}.py") + 1 :]
                with self.subTest(command=" ".join(words)):
                    if words[0] == "torchrun" or any(elsewhere.search(flag) for flag in flags):
                        importlib.import_module(script).make_parser().parse_args(flags)
                        continue
                    trains = script != "puzzles" or flags[0] == "train"
                    try:
                        run(script, *flags, *(SHORT[script] if trains else []))
                    except SystemExit:
                        self.assertEqual(flags[0], "check")  # nothing is answered yet
                    done.add(script)
        self.assertEqual(done, {*SCRIPTS}, "scripts of which no command could be run")


# --------------------------------------------------------------------------------------------------
# gpt2.py

TEXT = " ".join(np.random.default_rng(0).choice("the cat sat on a mat in köln".split(), 800)) + "\n"


def slow_gpt(w, idx, heads, kv_heads=None):
    """GPT-2's logits (B, T, V) from its equations, in fp64, head by head with an explicit mask. w
    has Hugging Face's names and layout (matrices act as x w). Without wpe, positions are rotary:
    complex numbers that turn."""
    w = {name.removeprefix("transformer."): value.double() for name, value in w.items()}
    kv_heads, T, C = kv_heads or heads, idx.size(1), w["wte.weight"].size(1)
    D = C // heads
    angle = torch.arange(T)[:, None] * 10000 ** (-2 * torch.arange(D // 2).double() / D)
    turn = torch.polar(torch.ones_like(angle), angle)

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    def rotated(x):
        if "wpe.weight" in w:
            return x
        z = torch.complex(x[..., :D // 2], x[..., D // 2:]) * turn
        return torch.cat((z.real, z.imag), -1)

    x = w["wte.weight"][idx] + (w["wpe.weight"][:T] if "wpe.weight" in w else 0)
    for n in range(sum(name.endswith("ln_1.weight") for name in w)):
        qkv, ys = linear(norm(x, f"h.{n}.ln_1"), f"h.{n}.attn.c_attn"), []
        for h in range(heads):
            group = C + h // (heads // kv_heads) * D  # where this head's keys begin
            q, k, v = (qkv[..., i:i + D] for i in (h * D, group, group + kv_heads * D))
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
    return {k: w.t() if ".h." in k and w.dim() == 2 else w for k, w in state.items()
            if "lm_head" not in k}


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
    @classmethod
    def setUpClass(cls):
        import gpt2
        cls.gpt2 = gpt2

    def setUp(self):
        super().setUp()
        self.out = self.dir / "out"
        (self.dir / "text.txt").write_text(TEXT, encoding="utf-8")
        self.tiny = ["--data", self.dir / "text.txt", "--n_layer", 2, "--n_head", 2, "--n_embd", 32,
                     "--block_size", 16, "--batch_size", 4, "--warmup", 2, "--sample_tokens", 4,
                     "--steps", 20, "--eval_every", 10, "--log_every", 5,
                     "--dtype", "float32", "--device", "cpu"]

    def model(self, **config):
        """A small model whose weights are large enough for every term to matter."""
        shape = dict(block_size=16, vocab_size=50, n_layer=2, n_head=4, n_embd=32)
        model = self.gpt2.GPT(self.gpt2.GPTConfig(**{**shape, **config}))
        for name, p in model.named_parameters():
            std = 0.01 if "transformer.w" in name else 0.2
            nn.init.normal_(p, float("ln_" in name and "weight" in name), std)
        return model.eval()

    def test_init(self):
        """As many parameters as published; standard deviations."""
        GPT, GPTConfig = self.gpt2.GPT, self.gpt2.GPTConfig
        with torch.device("meta"):
            size = sum(p.numel() for p in GPT(GPTConfig()).parameters())
        self.assertEqual(size, 124439808)
        for name, p in GPT(GPTConfig(64, 256, n_layer=2)).named_parameters():
            if p.dim() == 2:
                std = 0.01 if "c_proj" in name else 0.02
                self.assertAlmostEqual(p.std().item() / std, 1, delta=0.03, msg=name)
            else:
                self.assertTrue((p == ("ln_" in name and "weight" in name)).all(), name)

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
        for wrong in (dict(n_embd=30), dict(n_kv_head=3), dict(pos="none")):
            self.assertRaises((AssertionError, KeyError), self.model, **wrong)

    def test_cache(self):
        """With the cache, logits and greedy ids are those without, past the block's end too."""
        for pos, kv in itertools.product(("learned", "rope"), (None, 2, 1)):
            model, results = self.model(pos=pos, n_kv_head=kv), []
            prompt = torch.randint(50, (3, 5))
            hook = model.register_forward_hook(
                lambda m, args, out, results=results: results.append((args[0].size(1), out[0])))
            ids = model.generate(prompt, 20, temperature=0)
            hook.remove()
            self.assertEqual([width for width, _ in results], [5] + [1] * 11 + [16] * 8)
            for end, (_, cached) in enumerate(results, 5):
                slow, _ = model(ids[:, :end][:, -16:])
                self.assertLess((cached - slow).abs().max().item(), 1e-4)
                self.assertTrue(torch.equal(slow[:, 0].argmax(-1), ids[:, end]))
        with self.assertRaisesRegex(AssertionError, "one token at a time"):
            model(prompt[:, :2], cache=torch.zeros(2, 2, 3, 1, 16, 8), start=3)

    def test_sampling(self):
        """Frequencies of 20,000 draws are within five standard deviations of the true ones."""
        p, n, model = [0.05, 0.5, 0.15, 0.3], 20000, self.model(vocab_size=4)
        cases = [
            (p, {}),
            ([0, 1, 0, 0], dict(temperature=0)),
            ([0, 0.5, 0, 0.3], dict(top_k=2)),
            (p, dict(top_k=100)),
            ([0, 0.5, 0, 0.3], dict(top_p=0.6)),  # .5 is less than .6: the next token stays
            ([0, 1, 0, 0], dict(top_p=1e-6)),
            ([0, 0.5, 0, 0.3], dict(top_k=3, top_p=0.83)),  # .5 + .3 are .84 of the three
            ([0, 0.25, 0, 0.09], dict(temperature=0.5, top_p=0.9)),  # .25 + .09: .93 of squares
        ]
        logits, idx = torch.tensor(p).log().expand(n, 1, 4), torch.zeros(n, 1, dtype=torch.long)
        with mock.patch.object(self.gpt2.GPT, "forward", lambda *a, **k: (logits, None)):
            for expected, settings in cases:
                expected = torch.tensor(expected, dtype=torch.double) / sum(expected)
                drawn = model.generate(idx, 1, generator=torch.Generator(), **settings)
                again = model.generate(idx, 1, generator=torch.Generator(), **settings)
                self.assertTrue(torch.equal(drawn, again))
                difference = (drawn[:, 1].bincount(minlength=4) / n - expected).abs()
                within = 5 * (expected * (1 - expected) / n).sqrt() + (expected > 0) * 1e-12
                self.assertTrue((difference <= within).all(), settings)

    def test_stop(self):
        """After its stop token a row holds nothing else, and all rows' stop ends generation."""
        model, idx = self.model(vocab_size=3), torch.zeros(8, 1, dtype=torch.long)
        out = model.generate(idx, 200, temperature=9.0, stop=2)
        ends = [row.tolist().index(2) for row in out]
        for row, end in zip(out, ends, strict=True):
            self.assertTrue((row[end:] == 2).all())
        self.assertEqual(out.size(1), max(ends) + 1)

    def test_from_pretrained(self):
        """Hugging Face's tensors, with and without prefix, masks, lm_head, config.json; .pt."""
        model, idx = self.model(n_embd=128), torch.randint(50, (2, 16))
        full = hugging_face(model.state_dict())
        bare = {k.removeprefix("transformer."): w for k, w in full.items()}
        bare["h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
        tied = {**full, "lm_head.weight": full["transformer.wte.weight"]}
        config, file = self.dir / "config.json", self.dir / "model.safetensors"
        from_pretrained = self.gpt2.GPT.from_pretrained
        for tensors in (full, bare, tied):
            write_safetensors(file, tensors)
            logits, _ = from_pretrained(file)(idx, idx)
            self.close(logits, slow_gpt(full, idx, 2), 5e-5)  # 128 / 64 heads
            config.write_text('{"n_head": 4}')
            for source in (file, str(self.dir)):
                self.close(from_pretrained(source)(idx, idx)[0], slow_gpt(full, idx, 4), 5e-5)
            config.unlink()
        for prefix in ("", "_orig_mod.", "module.", "module._orig_mod."):
            state = {prefix + k: w for k, w in model.state_dict().items()}
            torch.save(dict(model=state, model_args=vars(model.config)), self.dir / "x.pt")
            self.same(from_pretrained(self.dir / "x.pt")(idx)[0], model(idx)[0])

    def test_save_pretrained(self):
        """The bytes of another writer of the format; Hugging Face's settings."""
        model = self.model()
        model.save_pretrained(self.dir)
        write_safetensors(self.dir / "expected", hugging_face(model.state_dict()))
        saved = (self.dir / "model.safetensors").read_bytes()
        self.assertEqual(saved, (self.dir / "expected").read_bytes())
        config = json.loads((self.dir / "config.json").read_text())
        wanted = dict(model_type="gpt2", vocab_size=50, n_positions=16, n_embd=32, n_layer=2,
                      n_head=4, eos_token_id=49, architectures=["GPT2LMHeadModel"])
        self.assertEqual({**config, **wanted}, config)
        for other in (dict(pos="rope"), dict(n_kv_head=2), dict(bias=False)):
            self.assertRaises(AssertionError, self.model(**other).save_pretrained, self.dir)

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

        for name, rule, more in (("Lion", lion, {}), ("SophiaG", sophia, {}),
                                 ("Muon", muon, dict(split=[5, 1]))):
            w = torch.ones(6, 4, dtype=torch.double, requires_grad=True)
            frozen = torch.ones(2, 2)
            params = [dict(params=[w, frozen], **more)]
            optimizer = getattr(self.gpt2, name)(params, lr=0.1, weight_decay=0.2)
            optimizer.state[w].update(dict(h=torch.from_numpy(h)) if name == "SophiaG" else {})
            slow, m = np.ones((6, 4)), np.zeros((6, 4))
            for t in range(5):
                w.grad = torch.from_numpy(g[t].copy())
                optimizer.step()
                update, m = rule(m, g[t])
                slow = slow * (1 - 0.1 * 0.2) - 0.1 * update
            self.close(w, slow, 1e-5 if name == "Muon" else 1e-12, name)
        with self.assertRaisesRegex(ValueError, r"not shapes of \[\(8,\)\]"):
            self.gpt2.Muon([torch.zeros(8), torch.zeros(8, 4)], 0.1)

    def test_hessian(self):
        """Sophia's estimate, B g^2, is on average the Gauss-Newton diagonal sum_k p_k (1 - p_k)."""
        b = torch.tensor([0.3, -0.2, 0.9], requires_grad=True)  # logits are a bias alone
        sophia, mean = self.gpt2.SophiaG([b], lr=1.0, betas=(0.9, 0.25)), 0
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
        for name, lr in self.gpt2.LEARNING_RATES.items():
            c = self.gpt2.Config(optimizer=name, lr=lr)
            optimizers = self.gpt2.make_optimizers(model, c)
            groups = [group for o in optimizers for group in o.param_groups]
            pairs = [(p, group["weight_decay"]) for group in groups for p in group["params"]]
            self.assertEqual({p for p, _ in pairs}, {*model.parameters()})
            self.assertEqual(len(pairs), len({*model.parameters()}))
            self.assertTrue(all(decay == 0.1 * (p.dim() == 2) for p, decay in pairs))
            self.assertEqual(optimizers[0].param_groups[0]["lr"], lr)
            if name == "muon":
                splits = [group["split"] for group in groups[:8]]
                self.assertEqual(splits, [[32, 16, 16], None, None, None] * 2)

    def test_data(self):
        """Text with NUL bytes; uint16 ids; .jsonl with a mark, blank lines and capitals."""
        def load_all(name):
            c = self.gpt2.Config(data=str(self.dir / name), block_size=5, device="cpu")
            train, val = self.gpt2.load_data(c, self.gpt2.make_tokenizer(257))
            data = [[*a, *b] for a, b in zip(train, val, strict=True)]
            self.assertEqual(len(train[0]), round(0.9 * len(data[0])))
            return data, c

        (self.dir / "nul.txt").write_text("a\0ü" * 500, encoding="utf-8")
        self.assertEqual(load_all("nul.txt")[0], [[*"a\0ü".encode()] * 500 + [256]] * 2)
        np.arange(100, dtype=np.uint16).tofile(self.dir / "ids.bin")
        data, c = load_all("ids.bin")
        x, y = self.gpt2.get_batch(data, [7, 30], c)
        self.assertEqual(x.tolist(), [[*range(7, 12)], [*range(30, 35)]])
        self.assertTrue(torch.equal(y, x + 1))
        for wrong in (np.arange(200, 300, dtype=np.uint16), np.arange(100, dtype=np.uint32)):
            wrong.tofile(self.dir / "ids.bin")
            self.assertRaisesRegex(AssertionError, "ids.bin: not uint16", load_all, "ids.bin")
        examples = [dict(prompt="Q", response="A"), dict(instruction="Q", input="", output="A")] * 5
        lines = "\n\n".join(map(json.dumps, examples))
        (self.dir / "rows.JSONL").write_text("\ufeff" + lines, encoding="utf-8")
        prompt = [*b"### Instruction:\nQ\n\n### Response:\n"]
        (ids, labels), _ = load_all("rows.JSONL")
        self.assertEqual(ids, (prompt + [*b"A", 256]) * 10)
        self.assertEqual(labels, ([-100] * len(prompt) + [*b"A", 256]) * 10)

    def test_learns_and_resumes(self):
        """A run learns words; broken off and resumed it is the unbroken run, bit for bit."""
        for optimizer in ("muon", "sophia"):
            flags = [*self.tiny, "--dropout", 0.1, "--optimizer", optimizer]
            self.resumes("gpt2", "get_batch", 19, *flags)
            shutil.rmtree(self.dir / "parts")
        model = self.gpt2.GPT.from_pretrained(self.dir / "whole/ckpt.pt")  # without dropout
        c = self.gpt2.Config(**load(self.dir / "whole/ckpt.pt")["config"])
        _, val = self.gpt2.load_data(c, self.gpt2.make_tokenizer(257))
        windows = [self.gpt2.get_batch(val, [i], c) for i in range(0, len(val[0]) - 16, 16)]
        losses = [model(x, y)[1].item() for x, y in windows]
        self.assertAlmostEqual(np.mean(losses), rows(self.dir / "whole")[-1]["val_loss"], places=5)
        flags = [*self.tiny, "--out", self.out]
        with mock.patch("torch.manual_seed", wraps=torch.manual_seed) as seed:
            run("gpt2", *flags, "--steps", 150, "--eval_every", 50)
        self.assertEqual(len({call.args for call in seed.call_args_list}), 150 + 1)
        loss = rows(self.out)[-1]["val_loss"]
        self.assertLess(loss, 1.2)  # a word and a space are 2.1 nats, 3.5 letters on average
        text = run("gpt2", *flags, "--sample_only", "--prompt", "the cat")
        self.assertTrue(text.startswith("the cat"))

    def test_checkpoints(self):
        """best.pt is the best; more steps stretch the schedule; no step left is said; --init."""
        flags, losses = [*self.tiny, "--out", self.out], iter((3.0, 1.0, 2.0))
        with mock.patch.object(self.gpt2, "evaluate", lambda *a: next(losses)):
            run("gpt2", *flags, "--steps", 30)
        self.assertEqual(load(self.out / "best.pt")["step"], 20)
        said = refused("gpt2", *flags, "--resume", "--steps", 30)
        self.assertIn("--steps 30, but the run is at step 30", said)
        run("gpt2", *flags, "--resume", "--steps", 40)
        self.assertEqual([row["step"] for row in rows(self.out) if "final" in row], [40])
        lr = {row["step"]: row["lr"] for row in rows(self.out) if "lr" in row}
        self.assertAlmostEqual(lr[35], 0.03 * (1 + math.cos(math.pi * 32 / 38)) / 2)
        run("gpt2", *flags, "--init", self.out / "best.pt", "--n_embd", 8)
        saved = load(self.out / "ckpt.pt")
        self.assertEqual(saved["model_args"]["n_embd"], 32)
        self.assertEqual((saved["config"]["optimizer"], saved["config"]["lr"]), ("adamw", 3e-5))

    def test_answers_weigh_the_same(self):
        """One step on rows whose answers differ in length: 4 x 1 and 1 x 4 have one gradient."""
        data = np.random.default_rng(0).integers(50, size=(2, 400))
        data[1, :350] = np.where(np.arange(350) % 50 < 45, -100, data[1, :350])
        c, results = self.gpt2.Config(block_size=16, device="cpu"), []
        for c.batch_size, c.grad_accum in ((4, 1), (1, 4), (2, 2)):
            model = self.model()
            model.load_state_dict(results[0][0] if results else model.state_dict())
            with mock.patch("torch.nn.utils.clip_grad_norm_"):
                loss = self.gpt2.training_step(model, [], data, c, 0, contextlib.nullcontext())
            results.append((model.state_dict(), loss, [p.grad for p in model.parameters()]))
        for _, loss, grads in results[1:]:
            self.close(loss, results[0][1], 1e-5)
            for a, b in zip(grads, results[0][2], strict=True):
                self.close(a, b, 1e-5)
        self.gpt2.training_step(model, [], data, c, 1, contextlib.nullcontext())
        norms = torch.stack([p.grad.norm() for p in model.parameters()])
        self.assertAlmostEqual(norms.norm().item(), 1, places=4)  # clipped
        nothing = torch.full((1, 4), -100)
        self.assertEqual(model(nothing.abs() % 50, nothing)[1].item(), 0)

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
        self.assertEqual(len(rows(self.dir / "two")), len(rows(self.out)))

    def test_numbers(self):
        """bfloat16 and a compiled model lose as fp32 does; a loss that is not finite ends a run."""
        flags, losses = [*self.tiny, "--out", self.out, "--steps", 10], []
        for more in ([], ["--dtype", "bfloat16"], ["--compile"]):
            run("gpt2", *flags, *more)
            losses.append(rows(self.out)[-1]["val_loss"])
            self.assertIn("transformer.wte.weight", load(self.out / "ckpt.pt")["model"])
        self.assertLess(max(losses) - min(losses), 0.02)
        said = refused("gpt2", *flags, "--optimizer", "adamw", "--lr", 1e30, "--warmup", 0)
        self.assertRegex(said, r"loss is (nan|inf) at step \d+$")


# --------------------------------------------------------------------------------------------------
# puzzles.py

class TestPuzzles(Case):
    @classmethod
    def setUpClass(cls):
        cls.puzzles = importlib.import_module("puzzles")
        cls.all = cls.puzzles.PUZZLES

    def answer(self, **lines):
        """Write my_puzzles.py with these answers, each the text behind return."""
        text = [f"def {name}({', '.join(self.all[name].params)}):\n    return {line}\n"
                for name, line in lines.items()]
        (self.dir / "my_puzzles.py").write_text("".join(text), encoding="utf-8")

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
        """The contract's 21 names, in their order and with their arguments."""
        wanted = """ones(i) sum(a) outer(a, b) diag(a) eye(j) triu(j) cumsum(a) diff(a, i)
            vstack(a, b) roll(a, i) flip(a, i) compress(g, v, i) pad_to(a, i, j)
            sequence_mask(values, length) bincount(a, j) scatter_add(values, link, j)
            flatten(a, i, j) linspace(i, j, n) heaviside(a, b) repeat(a, d)
            bucketize(v, boundaries)"""
        got = [f"{p.name}({', '.join(p.params)})" for p in self.all.values() if p.family == 1]
        self.assertEqual(" ".join(got), " ".join(wanted.split()))
        self.assertEqual(len(self.all), 64)
        for p in self.all.values():
            self.assertIs(getattr(self.puzzles, p.name), p.solve)
            self.assertIn(p.statement, p.solve.__doc__)

    def test_solutions(self):
        """The first two families against torch, and against loops where the spec is in torch."""
        by_torch = dict(
            cumsum=lambda a: a.cumsum(0), roll=lambda a, i: a.roll(-1), heaviside=torch.heaviside,
            diff=lambda a, i: torch.diff(a, prepend=torch.zeros(1).long()),
            compress=lambda g, v, i: F.pad(v[g], (0, i - len(v[g]))),
            pad_to=lambda a, i, j: F.pad(a, (0, j - i)),
            scatter_add=lambda v, link, j: torch.zeros(j).long().index_add(0, link, v),
            linspace=lambda i, j, n: torch.linspace(i.item(), j.item(), n),
            bucketize=lambda v, b: torch.bucketize(v, b, right=True))
        by_loop = dict(
            causal_mask=lambda i, j: [[c - (j - i) <= r for c in range(j)] for r in range(i)],
            window_mask=lambda i, w: [[0 <= r - c < w for c in range(i)] for r in range(i)],
            tiles=lambda x, h, w, P: [[[row[b * P:b * P + P] for row in x.tolist()[a * P:a * P + P]]
                                       for b in range(w)] for a in range(h)],
            patchify=lambda x, h, w, P: [x[a:a + P, b:b + P].flatten().tolist()
                                         for a in range(0, h * P, P) for b in range(0, w * P, P)],
            upsample=lambda a, P: np.kron(a.numpy(), np.ones((P, P), int)).tolist(),
            split_heads=lambda x, H, D: [[[token[h * D:h * D + D] for token in tokens]
                                          for h in range(H)] for tokens in x.tolist()],
            expand_kv=lambda k, H: [head for head in k.tolist() for _ in range(H // len(k))],
            ids_restore=lambda ids: [ids.tolist().index(k) for k in range(len(ids))],
            rotate_half=lambda x, D: [[-n for n in row[D // 2:]] + row[:D // 2]
                                      for row in x.tolist()])
        by_loop = {name: lambda *args, loop=loop: torch.tensor(loop(*args))
                   for name, loop in by_loop.items()}
        for name, definition in {**by_torch, **by_loop}.items():
            p = self.all[name]
            for case in self.puzzles.cases(p)[::7]:
                args = self.puzzles.draw_inputs(p, *case)
                got, want = p.solve(*args), definition(*args)
                self.assertEqual((got.shape, got.dtype), (want.shape, want.dtype), name)
                self.close(got.double() + 9, want.double() + 9, 1e-6, name)
        x, angle = torch.randn(2, 6, 12), torch.rand(6, 6)
        self.same(self.puzzles.merge_heads(self.puzzles.split_heads(x, 3, 4), 3, 4), x)
        self.same(self.puzzles.unpatchify(self.puzzles.patchify(x[0], 3, 6, 2), 3, 6, 2), x[0])
        z = torch.complex(x[0, :, :6], x[0, :, 6:]) * torch.polar(torch.ones(6, 6), angle)
        got = self.puzzles.rope(x[0], angle.cos().repeat(1, 2), angle.sin().repeat(1, 2), 12)
        self.close(got, torch.cat((z.real, z.imag), 1), 1e-6)

    def test_online_softmax(self):
        """Block by block it gives attention, with scores near 1000 too."""
        s, v = torch.randn(5, 12).double() * 300, torch.randn(12, 4).double()
        v1 = torch.cat((v, torch.ones(12, 1)), 1)  # the last column sums up the denominator
        m, o = torch.full((5, 1), -1e9).double(), torch.zeros(5, 5).double()
        for i in range(0, 12, 3):
            m, o = self.puzzles.online_softmax(m, o, s[:, i:i + 3], v1[i:i + 3])
        self.close(o[:, :4] / o[:, 4:], s.softmax(1) @ v, 1e-12)

    def test_network(self):
        """Loss and gradients of the trained network against autograd in fp64."""
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
        """All solutions keep the rules and pass, in under 20 seconds; a wrong one is named."""
        for p in self.all.values():
            cases = self.puzzles.cases(p)
            at_least = 50 if re.fullmatch(r"\w+\(\w\) .*", p.signature) else 500  # one size alone
            self.assertGreaterEqual(len(set(cases)), at_least, p.name)
        self.assertEqual(self.puzzles.draw_inputs(self.all["sum"], [2], 2)[0].tolist(), [4, 4])
        began = os.times()[:4]  # of computing, the children's too
        status, out = self.do("selftest")
        self.assertLess(sum(os.times()[:4]) - sum(began), 20)
        self.assertEqual((status, out.count(": right\n")), (0, 64), out)
        p = self.all["roll"]
        with mock.patch.object(p, "solution", "a[(arange(i) + 2) % i]"), \
                mock.patch.object(self.puzzles, "PUZZLES", {"roll": p}):
            status, out = self.do("selftest")
        self.assertEqual(status, 1)
        self.assertRegex(out, r"\A10\. roll: case \d+ of 500\n")

    def test_mutants(self):
        """Of every puzzle: transposed, shifted, off by one, of another dtype, constant, right for
        squares only. None passes."""
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
                ("eye", "~where(arange(j)[:, None] == arange(j), 1, 0)", "~ of an integer"),
                ("sum", "(ones(a.shape[0]) @ a[:, None])[0]", "an axis"),
                ("sum", "a", "a length is off by one"), ("roll", "a", "shifted to the right"),
                ("ones", "i", "no tensor but int"), ("positives", "0 * arange(2 * n)", "same"),
                ("linspace", "i + (j - i) * arange(n) // (n - 1 + (n == 1))", "integers, where"),
                ("causal_mask", "1 * (arange(j) <= arange(i)[:, None] + j - i)", "itself"),
                ("softmax", "exp(x) / rowsum(exp(x))", "not a number"),
                ("centre", "2 * (x - rowmean(x))", "a factor of 2"),
                ("linear_backward", "d @ w.mT, x.mT @ d", "2 outputs instead of 3"),
                ("flatten", "a[arange(i * j) // i, arange(i * j) % i]", "can't be computed"),
                ("rope", "x * cos - rotate_half(x, D) * sin", "case"),
                ("online_softmax", "newmax(m, s), o + exp(s - newmax(m, s)) @ v", "case")):
            self.assertIn(says, self.verdict(name, line) or "it passes", line)
        for name, line in (
                ("eye", "1 * (arange(j)[:, None] == arange(j))"), ("flip", "a[-1 - arange(i)]"),
                ("rowsum", "x @ where(x[0] == x[0], 1.0, 0.0)[:, None]"),
                ("rope", "x * cos + rotate_half(x * sin, D)"), ("relu_backward", "d * (x > 0)")):
            self.assertIsNone(self.verdict(name, line), line)

    def test_cheats(self):
        """What the rules don't allow is named, and never run."""
        for name, cheats in dict(
                ones={"torch.ones(i)": "called", "arange(i).sum()": "called", "i(i)": "called",
                      "(lambda: i)()": "called", "where.__globals__": "__globals__ is",
                      "f'{i}'": "JoinedStr", "'a' * i": "'a'", "1j * i": "1j", "[1] * i": "List",
                      "[1 for k in arange(i)]": "ListComp", "i if i else i": "IfExp",
                      "i and i": "BoolOp", "not i": "Not", "(k := i)": "NamedExpr",
                      "0 * len(arange(i))": "len is not", "open": "open is not",
                      "__builtins__": "__builtins__ is", "arange(n=i)": "keyword",
                      "0 < arange(i) < 1": "one comparison", "i in arange(i)": "In",
                      "arange(i) << 1": "LShift", "eye(i)[0]": "eye comes later",
                      "exp(arange(i))": "exp comes later", "ones(i)": "ones calls itself"},
                diag={"a.T": ".T is", "a.mT": ".mT is", "a.data": ".data is"},
                rowsum={"x.sum(1)": "called", "rowsum(x)": "rowsum calls itself"}).items():
            for line, says in cheats.items():
                self.answer(**{name: line})
                with mock.patch.object(self.puzzles, "judge", side_effect=AssertionError("it ran")):
                    status, out = self.do("check", name)
                self.assertEqual(status, 1, line)
                self.assertRegex(out, rf"\A\d+\. {name}: line 1: .*({says})")
        function = self.all["sum"].function("print(a)")  # should the rules have a hole
        self.assertRaises(NameError, function, 1)
        self.assertEqual(set(function.__globals__), {"__builtins__", "arange", "where", "ones"})
        self.assertEqual(function.__globals__["__builtins__"], {})

    def test_form(self):
        """One line, return and an expression, under the puzzle's own signature, once."""
        good = "def ones(i):\n    return arange(i) * 0 + 1\n"
        twice = "ones is defined twice, in lines [1, 3]"
        for text, says in (
                ("def ones(i):\n    i = 2\n    return i\n", "line 1: want def ones(i):"),
                ("def ones(n):\n    return n\n", "want"), ("def ones(*i):\n    return i\n", "want"),
                ("@ones\ndef ones(i):\n    return i\n", "want"), ("def ones(i): i\n", "want"),
                ("def ones(i): return\n", "want"), ("def ones(i): yield i\n", "want"),
                (good + good, twice), (good + "def ones(i):\n    return ...\n", twice),
                ("def ones(i):\n    return ...\n" + good, twice),
                (good + "def sum(a:\n", "(my_puzzles.py, line 3)"),
                ("def summ(a):\n    return a\n", "my_puzzles.py, line 1: nothing but")):
            (self.dir / "my_puzzles.py").write_text(text)
            try:
                status, out = self.do("check")
                self.assertIn(says, out if status == 1 else status)
            except SyntaxError as error:
                self.assertIn(says, str(error))

    def test_limits(self):
        """What eats time or memory is stopped; others are judged all the same, with our puzzles."""
        lines = dict(ones="arange(10 ** 12)", sum="arange(10 ** 8)", outer="10 ** 10 ** 9 % 7",
                     diag="arange(10 ** 7)[:, None] + arange(10 ** 7)", flip="--" * 999 + "a",
                     triu="arange(j)", cumsum="a @ triu(a.shape[0])")
        self.answer(**lines)
        started = time.perf_counter()
        with mock.patch.object(self.puzzles, "SECONDS", 1), \
                mock.patch.object(self.puzzles, "MEMORY", 300):
            status, out = self.do("check")
        self.assertLess(time.perf_counter() - started, 10)
        found = dict(re.findall(r"(?ms)^\d+\. (\w+): (.*?)(?=^\d+\. |^\d of)", out))
        self.assertEqual(list(found), list(lines))
        for name in ("ones", "sum", "diag"):
            self.assertRegex(found[name], "can't allocate memory|MemoryError")
        self.assertRegex(found["outer"], "^stopped: over 1 seconds")
        self.assertEqual([name for name in lines if found[name] == "right\n"], ["cumsum"])
        self.assertEqual((status, torch.get_default_dtype()), (1, torch.float32))

    def test_commands(self):
        """start, show, hint, reveal and check in a new process, on a console that isn't UTF-8."""
        def console(*argv):
            with folder(self.dir):
                done = child(HERE / "puzzles.py", *argv, PYTHONIOENCODING="cp1252")
            self.assertEqual(done.stderr, "")
            return done.returncode, done.stdout

        self.assertTrue((HERE / "puzzles.py").read_text(encoding="utf-8").isascii())
        console("start")
        stubs = (self.dir / "my_puzzles.py").read_text()
        self.assertEqual([node.name for node in ast.parse(stubs).body], list(self.all))
        self.assertIn("left alone", self.do("start")[0])
        for p in self.all.values():
            out = self.do("show", p.name)[1]
            self.assertTrue(p.statement in out and p.spec in out and "gives =" in out, out)
        self.assertEqual(self.do("hint", "outer", 2)[1].splitlines(), self.all["outer"].hints)
        self.assertEqual(self.do("reveal", "outer"), (0, "a[:, None] * b\n"))
        self.answer(outer="a[:, None] * b", flip="\u03bb")
        self.assertEqual(console("check", "outer")[1].splitlines()[0], "3. outer: right")
        self.assertEqual(console("check", "flip")[0], 1)
        for words in ("", "show", "show nothing", "train --stp 1", "train --steps 0"):
            self.assertEqual(self.do(*words.split())[0], 2, words)

    def test_train(self):
        """A short run learns, writes the contract's files, and repeats itself bit for bit; --mine
        trains with the learner's right lines, and a loss that isn't finite ends it."""
        flags = ["train", "--steps", 600, "--eval_every", 250, "--log_every", 100, "--lr", 0.05]
        status, out = self.do(*flags, "--out", "a")
        log = rows(self.dir / "a")
        self.assertEqual([row["step"] for row in log if "val_loss" in row], [0, 250, 500, 600])
        self.assertEqual([row["step"] for row in log if "loss" in row], [*range(100, 601, 100)])
        self.assertEqual([*log[-1]], ["step", "seconds", "test_loss", "test_accuracy", "final"])
        self.assertEqual([*log[1]], ["step", "loss", "lr", "seconds", "images_per_s"])
        self.assertGreater(log[-1]["test_accuracy"], 0.5)
        last = load(self.dir / "a" / "ckpt.pt")
        self.assertEqual({*last}, {"model", "optimizer", "config", "step", "best"})
        config = json.loads((self.dir / "a" / "config.json").read_text())
        self.assertEqual((last["step"], last["config"], config["lr"]), (600, config, 0.05))
        self.answer(linear="b + x @ w", gelu="x")
        with mock.patch.dict(vars(self.puzzles)):
            out = self.do(*flags, "--out", "b", "--mine")[1]
        self.assertIn("linear is yours: b + x @ w", out)
        self.same(load(self.dir / "b" / "ckpt.pt")["model"], last["model"])
        out = self.do("train", "--steps=2", "--lr=1e30", "--out", "c")[0]
        self.assertRegex(out, r"\Aloss is (nan|inf) at step [12]: [^\n]+\Z")
        with mock.patch.dict(os.environ, WORLD_SIZE="2"):
            self.assertIn("not torchrun", self.do("train", "--out", "d")[0])
        scores = [(1.0, 0.1), (1.0, 0.3), (1.0, 0.2), (1.0, 0.0)]  # the last is the test's
        with mock.patch.object(self.puzzles, "evaluate", side_effect=scores):
            self.do("train", "--steps=2", "--eval_every=1", "--out", "e")
        self.assertEqual(load(self.dir / "e" / "best.pt")["step"], 1)


# --------------------------------------------------------------------------------------------------
# flash_attn.py

class TestFlashAttn(Case):
    # T_q, T_k, query heads per key head, causal, window, cu_seqlens; a tile is 16 in these tests
    masks = {
        "full": (40, 61, 1, False, None, None),
        "causal": (70, 70, 1, True, None, None),
        "more keys": (37, 70, 2, True, None, None),
        "more queries": (70, 45, 2, True, None, None),
        "window": (60, 70, 2, True, 13, None),
        "window of 1": (40, 40, 1, True, 1, None),
        "both sides": (50, 70, 1, False, 17, None),
        "no keys": (70, 40, 4, False, 9, None),
        "whole tiles": (64, 64, 1, True, 32, None),
        "documents": (70, 70, 2, True, None, [0, 5, 5, 40, 70]),
    }
    tiny = "--block_size 32 --steps 8 --eval_every 4 --log_every 2 --dtype float32".split()

    def setUp(self):
        super().setUp()
        self.fa = importlib.import_module("flash_attn")
        self.addCleanup(setattr, self.fa, "TILE", self.fa.TILE)
        self.fa.TILE = 16

    @staticmethod
    def inputs(T_q, T_k, G=1, dtype=torch.double, D=16, H=4, B=2):
        shapes = (B, T_q, H, D), (B, T_k, H // G, D), (B, T_k, H // G, D), (B, T_q, H, D)
        q, k, v, do = (torch.randn(s, dtype=torch.double).to(dtype).transpose(1, 2) for s in shapes)
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), do

    @staticmethod
    def slow(q, k, v, causal=False, window=None, ends=None, scale=None):
        """o and LSE, a query at a time from the definition, in fp64."""
        (B, H, T_q, D), (H_kv, T_k) = q.shape, k.shape[1:3]
        o, lse = [], []
        for b, h, i in itertools.product(range(B), range(H), range(T_q)):
            p, kv = i + T_k - T_q, h // (H // H_kv)
            keys = [j for j in range(T_k) if not causal or j <= p]
            keys = [j for j in keys if window is None or abs(p - j) < window]
            if ends:
                a, z = [(a, z) for a, z in itertools.pairwise(ends) if a <= p < z][0]
                keys = [j for j in keys if a <= j < z]
            s = k[b, kv, keys].double() @ q[b, h, i].double() * (scale or D**-0.5)
            lse.append(torch.logsumexp(s, 0))
            o.append(torch.softmax(s, 0) @ v[b, kv, keys].double())  # 0 without keys
        return torch.stack(o).view(B, H, T_q, D), torch.stack(lse).view(B, H, T_q)

    def all_close(self, found, expected, tolerance, message=None):
        for a, b in zip(found, expected, strict=True):
            self.close(a, b, tolerance, message)

    def test_online_softmax(self):
        x = torch.randn(5, 9, dtype=torch.double) * 300  # e^900 would overflow
        x[2] = x[2].sort().values  # the maximum grows at each step
        self.close(self.fa.online_softmax(x), torch.softmax(x, dim=-1), 1e-14)
        q, k, v, _ = self.inputs(40, 40)
        q, k = -40 * q.abs(), 1e4 * k.abs()  # all scores far below zero
        self.close(self.fa.flash_attention(q, k, v, True), self.slow(q, k, v, True)[0], 1e-11)

    def test_merge(self):
        q, k, v, do = self.inputs(9, 20)
        whole = self.slow(q, k, v)
        exact = torch.autograd.grad(whole[0], (q, k, v), do, retain_graph=True)
        for n in (1, 19):
            halves = ((k[:, :, at], v[:, :, at]) for at in (slice(n), slice(n, None)))
            a, b = (self.fa.flash_attention(q, *half, return_lse=True) for half in halves)
            merged = self.fa.merge(*a, *b)
            self.all_close(merged, whole, 1e-13)
            self.all_close(torch.autograd.grad(merged[0], (q, k, v), do), exact, 1e-12)
        none = torch.zeros_like(q), torch.full(q.shape[:3], -math.inf, dtype=torch.double)
        self.all_close(self.fa.merge(*none, *whole), whole, 1e-15)
        o, lse = self.fa.merge(*none, *none)
        self.assertTrue((o == 0).all() and (lse == -math.inf).all())

    def test_tile_map(self):
        with mock.patch.multiple(self.fa, TILE=2):
            q = torch.zeros(1, 1, 8, 1)
            plan = self.fa.tile_map(*self.fa.spans(q, q, True, 5))
        for (_, tiles), picture in zip(plan, ("/...", "#/..", "/#/.", "./#/"), strict=True):
            marks = {at.start // 2: "#" if hidden is None else "/" for at, hidden in tiles}
            self.assertEqual("".join(marks.get(i, ".") for i in range(4)), picture)

    def test_masks(self):
        dtypes = {torch.double: 1e-13, torch.float32: 3e-6}
        for dtype, (name, mask) in itertools.product(dtypes, self.masks.items()):
            T_q, T_k, G, causal, window, ends = mask
            q, k, v, do = self.inputs(T_q, T_k, G, dtype)
            exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
            o, lse = self.slow(*exact, causal, window, ends, 0.3)
            some, dlse = lse > -math.inf, torch.randn_like(lse)
            loss = (o * do).sum() + (lse * dlse)[some].sum()
            expected = [o, *torch.autograd.grad(loss, exact, retain_graph=True), lse[some]]
            f = functools.partial(self.fa.flash_attention, q, k, v, causal, window, 0.3)
            o, lse = f(cu_seqlens=ends, return_lse=True)
            loss = (o * do).sum() + (lse * dlse)[some].sum()
            found = [o, *torch.autograd.grad(loss, (q, k, v)), lse[some]]
            self.all_close(found, expected, dtypes[dtype], name)
            self.same(lse > -math.inf, some, name)
            self.assertTrue((o[~some] == 0).all() and (found[1][~some] == 0).all(), name)
            if not ends:
                o = self.fa.attention(q, k, v, causal, window, 0.3)
                found = [o, *torch.autograd.grad(o, (q, k, v), do)]
                expected[1:4] = torch.autograd.grad(expected[0], exact, do)
                self.all_close(found, expected[:4], dtypes[dtype], name)

    def test_half(self):
        sdpa = F.scaled_dot_product_attention
        for dtype in (torch.bfloat16, torch.float16):
            inputs, found = self.inputs(70, 70, dtype=dtype), []
            for f, cast in ((sdpa, torch.float32), (self.fa.flash_attention, dtype), (sdpa, dtype)):
                q, k, v, do = (t.detach().to(cast).requires_grad_() for t in inputs)
                o = f(q, k, v)
                found.append([o, *torch.autograd.grad(o, (q, k, v), do)])
            for exact, ours, theirs in zip(*found, strict=True):
                self.assertLessEqual((ours - exact).abs().max(), 2 * (theirs - exact).abs().max())
        q = torch.full_like(v, 100)  # q k^T overflows
        for f in (self.fa.attention, self.fa.flash_attention):
            self.close(f(q, q, v, scale=0.01), v.mean(2, keepdim=True).expand_as(v), 2e-3)

    def test_no_matrix(self):
        largest, kept, T = [], [], 600

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, f, types, args=(), kwargs=None):
                out = f(*args, **(kwargs or {}))
                leaves = torch.utils._pytree.tree_leaves(out)
                largest.extend(t.numel() for t in leaves if isinstance(t, torch.Tensor))
                return out

        q, k, v, do = self.inputs(T, T, B=1)
        for f, small in ((self.fa.attention, False), (self.fa.flash_attention, True)):
            largest.clear()
            with Watch():
                torch.autograd.grad(f(q, k, v, True, 500), (q, k, v), do)
            self.assertEqual(max(largest) < T * T, small, max(largest))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            self.fa.flash_attention(q, k, v)
        self.assertEqual(sum(t.numel() for t in kept), 4 * q.numel() + 6 * T)  # LSE, spans

    def hidden(self, backend, device="cpu"):
        """What is NaN, inf or overflows of a key or query reaches who sees it and no other."""
        i, j = torch.arange(20)[:, None], torch.arange(20)
        masks = (True, None), (False, 3)
        cases = itertools.product((0, 1), (math.nan, math.inf, 3e38), masks)
        for which, value, (causal, window) in cases:
            tensors, found = self.inputs(20, 20, dtype=torch.float32, H=2, B=1), []
            for broken in (False, True):
                if broken:
                    tensors[which].detach()[0, 0, 7] = value  # shares the memory
                q, k, v, do = (t.detach().to(device).requires_grad_() for t in tensors)
                o = self.fa.flash_attention(q, k, v, causal, window, backend=backend)
                found.append([t.cpu() for t in (o, *torch.autograd.grad(o, (q, k, v), do))])
            seen = j <= i if causal else (i - j).abs() < 3
            rows = seen[:, 7] if which else i[:, 0] == 7  # queries that see it
            keys = seen[rows].any(0)  # keys that one of those queries sees
            for a, b, reached in zip(*found[::-1], (rows, rows, keys, keys), strict=True):
                for row in (~reached).nonzero():
                    self.close(a[0, 0, row], b[0, 0, row], 1e-4)
                self.close(a[0, 1:], b[0, 1:], 1e-5)
            if value != 3e38:
                self.assertFalse(any(t[0, 0, rows].isfinite().any() for t in found[1][:2]))

    def test_documents_apart(self):
        ends, tensors, found = [0, 5, 23, 40], self.inputs(40, 40), []
        for value in (0, math.nan):
            q, k, v, do = tensors
            for t in tensors:
                t.detach()[:, :, 5:23] += value
            o = self.fa.flash_attention(q, k, v, True, cu_seqlens=ends)
            found.append([o.detach(), *torch.autograd.grad(o, (q, k, v), do)])
        for a, b in zip(*found, strict=True):
            self.same(a[:, :, :5], b[:, :, :5])
            self.same(a[:, :, 23:], b[:, :, 23:])
            self.assertTrue(b[:, :, 5:23].isnan().all())

    def test_refused(self):
        q, k, v, _ = self.inputs(8, 8)
        for change, says in (
            (dict(k=k[:, :, :7]), "7, 16"),
            (dict(k=k[:, :3], v=v[:, :3]), "2, 3, 8, 16"),
            (dict(window=0), "window 0"),
            (dict(scale=torch.tensor(0.1)), "scale"),
            (dict(backend="cuda"), "backend cuda"),
        ):
            with self.assertRaisesRegex(AssertionError, says):
                self.fa.flash_attention(**{**dict(q=q, k=k, v=v), **change})
        for ends in ([0, 9], [0, 5], [0, 9, 8], [1, 8]):
            self.assertRaises(RuntimeError, self.fa.flash_attention, q, k, v, cu_seqlens=ends)
        self.assertTrue((self.fa.flash_attention(q, k[:, :, :0], v[:, :, :0]) == 0).all())
        expected = self.slow(q, k, v, ends=[0, 3, 8])[0]
        for ends in ((0, 3, 8), np.array([0, 3, 8]), torch.tensor([0, 3, 8], dtype=torch.int32)):
            self.close(self.fa.flash_attention(q, k, v, cu_seqlens=ends), expected, 1e-13)

    def default_device(self, backend, device="cpu"):
        tensors = [t.detach().to(device) for t in self.inputs(20, 20, dtype=torch.float32)]
        q, k, v, do = (t.requires_grad_() for t in tensors)
        torch.set_default_device("meta")  # nothing computes on it
        self.addCleanup(torch.set_default_device, None)
        for f in (self.fa.attention, self.fa.flash_attention):
            grads = torch.autograd.grad(f(q, k, v, True, 7), (q, k, v), do)
            self.assertTrue(all(g.isfinite().all() for g in grads))
        # backward directly: autograd.grad runs it without the default device
        saved = [t.detach().flatten(0, 1) for t in (q, k, v)] + [*self.fa.spans(q, k, True, 7)]
        o, lse = saved[0], saved[0][..., :1]
        ctx = mock.Mock(saved_tensors=[*saved, o, lse], scale=1, backend=backend)
        with torch.no_grad():
            grads = self.fa.FlashAttention.backward(ctx, o, lse)
        self.assertEqual([g.device.type for g in grads[:3]], [device] * 3)

    def test_torch(self):
        self.hidden("torch")
        self.default_device("torch")

    def test_autocast(self):
        q, k, v, do = self.inputs(40, 40, dtype=torch.float32)
        half = [t.detach().bfloat16().requires_grad_() for t in (q, k, v, do)]
        plain = self.fa.flash_attention(*half[:3])
        expected = torch.autograd.grad(plain, half[:3], half[3])
        with torch.autocast("cpu", torch.bfloat16):
            o = self.fa.flash_attention(half[0], k, v)  # torch casts such a mix, too
            grads = torch.autograd.grad(o, (half[0], k, v), half[3])
        self.same([o.detach(), *(g.bfloat16() for g in grads)], [plain.detach(), *expected])

    def test_transforms(self):
        (q, k, v, do), f = self.inputs(20, 20), self.fa.flash_attention
        says = r"second derivative: use attention\(\)"
        with self.assertRaisesRegex(RuntimeError, says):
            torch.autograd.grad(f(q, k, v), q, do, create_graph=True)
        with self.assertRaisesRegex(RuntimeError, says):
            torch.func.grad(lambda q: f(q, k.detach(), v.detach()).sum())(q.detach())

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
        times = 7 if gpu else 1  # longer sequences for the tiles as they are
        dtypes = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
        if not gpu:
            del dtypes[torch.bfloat16]  # the interpreter gets it wrong
            self.fa.FORWARD_TILE = self.fa.FP32_TILE = (16, 32, 4, 2)
            self.fa.BACKWARD_TILE = (32, 16, 4, 2)
        for dtype, (name, mask) in itertools.product(dtypes, self.masks.items()):
            T_q, T_k, G, causal, window, ends = mask
            tensors = self.inputs(T_q * times, T_k * times, G, dtype, H=G, B=1, D=64 if gpu else 16)
            *qkv, do = (t.detach().to(device).requires_grad_() for t in tensors)
            exact = [t.detach().double().requires_grad_() for t in qkv]
            window, ends = window and window * times, ends and [end * times for end in ends]
            f = functools.partial(self.fa.flash_attention, cu_seqlens=ends, return_lse=True)
            dlse, found = torch.randn(1, G, T_q * times, device=device), []
            for inputs, backend in ((qkv, "triton"), (exact, "torch")):
                o, lse = f(*inputs, causal, window, 0.3, backend)
                some = lse > -math.inf
                loss = (o * do).sum() + (lse * dlse)[some].sum()
                found.append([o, lse[some], *torch.autograd.grad(loss, inputs)])
            self.all_close(*found, dtypes[dtype], f"{name} {dtype}")
        self.hidden("triton", device)
        self.default_device("triton", device)

    def test_batches(self):
        tokens, answers = self.fa.retrieval_batch((1, 2), 4, 64, "cpu")
        for row, right in zip(tokens.tolist(), answers.tolist(), strict=True):
            pairs = dict(zip(row[:32:2], row[1:32:2], strict=True))
            self.assertEqual((len(pairs), sorted(pairs)), (16, sorted(row[32::2])))
            self.assertTrue(max(pairs) < 32 <= min(pairs.values()))
            self.assertEqual([pairs[key] - 32 for key in row[32::2]], right)
        self.same(self.fa.retrieval_batch((1, 2), 4, 64, "cpu")[0], tokens)

    def test_learns(self):
        flags = "--block_size 64 --n_embd 32 --batch_size 16 --steps 120 --eval_every 60".split()
        text = run("flash_attn", *flags, "--out", self.dir / "a")
        self.assertTrue(text.endswith("\nsolved\n"), text)
        eager = functools.partial(torch.compile, backend="eager")
        self.addCleanup(setattr, self.fa, "flash_attention", self.fa.flash_attention)
        self.fa.flash_attention = self.fa.attention
        with mock.patch.object(torch, "compile", eager):
            run("flash_attn", *flags, "--out", self.dir / "b", "--compile")
        for a, b in zip(rows(self.dir / "a"), rows(self.dir / "b"), strict=True):
            if "loss" in a:
                self.assertAlmostEqual(a["loss"], b["loss"], delta=2e-3 * a["loss"])

    def test_files(self):
        run("flash_attn", *self.tiny, "--out", self.dir)
        log = rows(self.dir)
        self.assertEqual([row["step"] for row in log], [2, 4, 4, 6, 8, 8, 8])
        self.assertEqual(" ".join(log[0]), "step loss lr seconds tokens_per_s")
        self.assertEqual(" ".join(log[2]), "step seconds val_loss val_accuracy")
        self.assertEqual(" ".join(log[-1]), "step test_loss test_accuracy final")
        self.assertNotEqual(log[-1]["test_loss"], log[-2]["val_loss"])
        says = refused("flash_attn", *self.tiny, "--out", self.dir, "--lr", 9e18, "--steps", 50)
        self.assertRegex(says, r"^loss is (nan|inf) at step \d+$")

    def test_bench(self):
        text = run("flash_attn", "--bench", "--block_size", 512)
        found = re.findall(r"512 (\w+) +forw.*keeps [\d.]+ MB", text)
        self.assertEqual(found, ["sdpa", "flash", "naive"])


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
    conv, norm = functools.partial(conv_of, w), functools.partial(norm_of, w)
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
    def setUp(self):
        super().setUp()
        self.resnet = importlib.import_module("resnet")
        patch = small_shapes("resnet")
        patch.__enter__()
        self.addCleanup(patch.__exit__, None, None, None)
        self.out = self.dir / "out"
        self.tiny = ["--batch_size", 16, "--eval_every", 5, "--log_every", 3, "--warmup", 2]
        self.tiny += ["--epochs", 1, "--dtype", "float32", "--device", "cpu"]
        self.fast = [*self.tiny, "--arch", "fast", "--batch_size", 32, "--log_every", 1]

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
        """Parameters as published, a digest of torchvision's names and shapes; the blocks of
        ConvNeXt-T and EfficientNet-B0."""
        r = self.resnet
        official = dict(resnet18="0622374c", resnet34="380ae486", resnet50="be46530b")
        official |= dict(resnet101="b33c2798", resnet152="82a88cc6")
        official |= dict(resnext50_32x4d="4398173c", wide_resnet50_2="1629c2f5")

        def count(*modules):
            return sum(p.numel() for module in modules for p in module.parameters())

        with torch.device("meta"):
            for name, digest in official.items():
                state = getattr(r, name)().state_dict()
                shapes = repr(sorted((k, tuple(w.shape)) for k, w in state.items()))
                found = hashlib.sha256(shapes.encode()).hexdigest()
                self.assertTrue(found.startswith(digest), name)
            self.assertEqual(count(r.cifar_resnet(110)), 1727962)
            self.assertEqual(count(r.wrn(28, 10)), 36479194)
            args = {**r.convnext.keywords, "num_classes": 1000, "width": 96}
            model = r.stack(r.ConvNeXtBlock, 1, (3, 3, 9, 3), **args)
            others = 48 * 96 + 96 + 2 * 96 + 2 * 768
            self.assertEqual(count(*[*model][2:6], model.fc) + others, 28589128)
            model = r.efficientnet_b0()
            others = 27 * 32 + 2 * 32 + 320 * 1280 + 2 * 1280 + 1280 * 1000 + 1000
            self.assertEqual(count(*[*model][3:10]) + others, 5288548)
            y = nn.Sequential(*[*model][:10])(torch.empty(2, 3, 32, 32))
            self.assertEqual(y.shape, (2, 320, 2, 2))

    def test_stems(self):
        """What stands before the blocks and after them, of each kind of network."""
        r, x = self.resnet, torch.randn(4, 3, 12, 12).double()
        models = dict(cifar=r.cifar_resnet(8), preact=r.wrn(10, 1), convnext=r.convnext())
        models["imagenet"] = r.stack(r.BasicBlock, 1, (1, 1, 1, 1), 10, width=8)
        for stem, model in models.items():
            w = model.conv1.weight  # Kaiming: C_out times the filter's size
            self.assertAlmostEqual(w.std() * (w[:, 0].numel() / 2) ** 0.5, 1, delta=0.1)
            w = self.randomise(model)
            y = conv_of(w, "conv1", x, 2 if stem == "imagenet" else 1)
            y = y if stem == "preact" else norm_of(w, "bn1", y)
            if stem in ("cifar", "imagenet"):
                y = y.relu()
            if stem == "imagenet":
                y = F.max_pool2d(y, 3, 2, 1)
            for name, layer in model.named_children():
                y = layer(y) if name.startswith("layer") else y
            self.assertEqual(y.size(2), 1 if stem == "imagenet" else 3)
            if stem in ("convnext", "preact"):
                y = norm_of(w, "bn_last", y)
            y = y.relu() if stem == "preact" else y
            want = F.linear(y.mean((2, 3)), w["fc.weight"], w["fc.bias"])
            self.close(model(x), want, 1e-10, stem)

    def test_fast(self):
        """A first layer that whitens; a forward pass by hand."""
        r, model = self.resnet, self.resnet.FastNet()
        x = r.normalise(r.make_shapes.original(640, 0)[0], model.stats)
        model.whiten(x)
        patches = F.unfold(x, 2).transpose(1, 2).reshape(-1, 12).double()
        moments = patches.T @ patches / len(patches)
        values = torch.linalg.eigvalsh(moments)
        first, negative = model.conv1.weight.flatten(1).double().chunk(2)
        self.close(first @ moments @ first.T, torch.diag(values / (values + 5e-4)), 1e-3)
        self.same(first, -negative)
        self.assertEqual(model.groups[0].weight[5, 5, 1, 1], 1)
        self.assertAlmostEqual(model.fc.weight.std().item(), 1, places=5)
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
        found = [[g[key] for key in ("peak", "weight_decay", "momentum")] for g in groups[1:]]
        self.close(found, [[106, 0.004 / 106, 0.85], [1340, 0.004 / 1340, 0.85]], 1e-6)
        groups = r.make_sgd(r.convnext(), r.Config(lr=0.3, weight_decay=0.01)).param_groups
        for group, decay in zip(groups, (0.01, 0), strict=True):
            self.assertEqual({p.dim() > 1 for p in group["params"]}, {decay > 0})
            found = group["peak"], group["weight_decay"], group["momentum"], group["nesterov"]
            self.assertEqual(found, (0.3, decay, 0.9, True))

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
        model, x = r.resnet18(width=8).eval(), torch.randn(2, 3, 64, 64)
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
        torch.save({**state, "more": x}, path)
        with self.assertRaisesRegex(RuntimeError, "more"):
            r.from_pretrained(path, arch="resnet18")
        state = r.resnet18().state_dict()
        with mock.patch("torch.hub.load_state_dict_from_url", return_value=state) as get:
            found = r.from_pretrained("resnet18", data_dir="here")
        self.same([found.fc.bias, found.stats], [state["fc.bias"], r.IMAGENET_STATS])
        url = "https://download.pytorch.org/models/resnet18-f37072fd.pth"
        get.assert_called_with(url, "here", check_hash=True, weights_only=True)

    def test_transfer(self):
        """--init with --freeze changes the head alone, and says which network it is."""
        run("resnet", "--out", self.dir, *self.tiny, "--arch", "plain20")
        before = load(self.dir / "best.pt")["model"]
        flags = ["--init", self.dir / "best.pt", "--freeze"]
        run("resnet", "--out", self.out, *self.tiny, *flags)
        after = load(self.out / "best.pt")
        self.assertEqual(after["config"]["arch"], "plain20")
        changed = [k for k, w in after["model"].items() if not torch.equal(w, before[k])]
        self.assertEqual(changed, ["fc.weight", "fc.bias"])  # no statistics

    def test_cifar10(self):
        """The archive is fetched by its hash; labels and pixels where the format has them; what
        isn't CIFAR-10 is refused by name; the last training images validate."""
        r, source = self.resnet, self.dir / "cifar-10-batches-bin"
        with mock.patch("torch.hub.download_url_to_file") as get:
            self.assertRaises(FileNotFoundError, r.load_cifar10, self.dir)
        get.assert_called_with(r.CIFAR10, mock.ANY, r.CIFAR10_SHA256)
        records = np.random.default_rng(0).integers(0, 256, (60000, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        source.mkdir()
        names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
        for name, part in zip(names, np.split(records, 6), strict=True):
            part.tofile(source / name)
        x, y, test_x, test_y = r.load_cifar10(self.dir)
        self.assertEqual(torch.cat((y, test_y)).tolist(), records[:, 0].tolist())
        self.assertEqual(x[12345, 1, 5, 31], records[12345, 1 + 1024 + 32 * 5 + 31])
        self.assertEqual(test_x[7, 2, 3, 4], records[50007, 1 + 2048 + 32 * 3 + 4])
        train, held, _ = r.load_images(r.Config(data="cifar10", data_dir=str(self.dir)))
        self.same([train[1], held[1]], [y[:45000], y[45000:]])
        records[30007, 0] = 10
        for content in (records[30000:39999], records[30000:40000]):
            content.tofile(source / names[3])
            self.assertRaisesRegex(ValueError, names[3], r.load_cifar10, self.dir)

    def test_shapes(self):
        """Drawn from the seed; a linear classifier can't tell the classes apart."""
        draw = self.resnet.make_shapes.original
        self.same(draw(50, 5), draw(50, 5))
        (x, y), (test_x, test_y) = draw(3000, 1), draw(1000, 3)
        x, test_x = (t.flatten(1) / 255 - 0.5 for t in (x, test_x))
        squares = x.T @ x + 1000 * torch.eye(3072)
        weights = torch.linalg.solve(squares, x.T @ (F.one_hot(y) - 0.1))
        _, accuracy = self.resnet.score(test_x @ weights, test_y)
        self.assertLess(accuracy, 0.35)

    def test_augment(self):
        """Against a padded image, a crop and a flip, at every shift."""
        images = torch.randint(0, 256, (5, 3, 6, 6), dtype=torch.uint8)
        padded = F.pad(images.flip(0).float(), [4] * 4, mode="reflect").byte()
        for dy, dx in itertools.product(range(-4, 5), range(-4, 5)):
            want = padded[:, :, 4 + dy : 10 + dy, 4 + dx : 10 + dx]
            for mirror in (False, True):
                moves = (torch.full((5,), value) for value in (dy, dx, mirror))
                got = self.resnet.augment(images, torch.arange(5).flip(0), *moves)
                self.same(got, want.flip(3) if mirror else want)

    def test_batches(self):
        """Functions of seed and step; an epoch has each image once; how far they go; fast mirrors
        an image in every other epoch."""
        r = self.resnet

        def batch(step, **more):  # (4, 16): which images, moved down and sideways, mirrored
            c = r.Config(**{"batch_size": 16, "crop": 3, **more})
            with mock.patch.object(r, "augment", lambda images, *moves: torch.stack(moves)):
                moves, labels = r.training_batch(c, torch.zeros(48), torch.arange(48), step)
            self.same(moves[0], labels)
            return moves

        self.same(batch(7), batch(7))
        for other in (batch(8), batch(7, seed=1)):
            self.assertTrue((other != batch(7)).any(1).all())
        batches = [batch(step) for step in range(120)]
        order, dy, dx, mirror = torch.stack(batches, dim=1).view(4, 40, 48)
        self.assertTrue((order.sort()[0] == torch.arange(48)).all())
        self.assertFalse(torch.equal(order[0], order[1]))
        for move in (dy, dx):
            self.assertEqual(move.unique().tolist(), [*range(-3, 4)])
        self.assertAlmostEqual(mirror.float().mean(), 0.5, delta=0.06)
        batches = [batch(step, arch="fast") for step in range(9)]
        order, *_, mirror = torch.stack(batches, dim=1).view(4, 3, 48)
        turns = mirror.gather(1, order.argsort()).T.tolist()  # by image
        self.assertEqual({*map(tuple, turns)}, {(0, 1, 0), (1, 0, 1)})

    def test_views(self):
        """Six views by index; a resize with antialias."""
        r, weight = self.resnet, torch.randn(75, 4)

        def model(x):
            return torch.tanh(x.flatten(1) @ weight / 8)

        x, want = torch.randn(9, 3, 5, 5), 0
        for shift, share in ((0, 1 / 4), (1, 1 / 8), (-1, 1 / 8)):
            index = [4 - abs(4 - abs(i + shift)) for i in range(5)]
            view = x[:, :, index][..., index]
            want = want + share * (model(view) + model(view.flip(3)))
        self.close(r.six_views(model, x), want, 1e-5)
        stripes = (torch.arange(672) % 3 == 0) * 255.0  # mean 1/3; without antialias 0 or 1
        thin = r.normalise(stripes.expand(1, 3, 672, 672), ((0,), (1,)), 224)
        self.assertLess((thin[..., 2:-2] - 1 / 3).abs().max(), 0.1)

    def test_run(self):
        """It learns; the schedule; what a run leaves behind is of the best weights."""
        r, flags = self.resnet, [*self.tiny, "--epochs", 8, "--lr", 0.2, "--eval_every", 16]
        run("resnet", "--out", self.out, *flags, "--save_logits", self.dir / "l.npy")
        log, best = rows(self.out), load(self.out / "best.pt")
        losses = [row["loss"] for row in log if "loss" in row]
        self.assertLess(np.mean(losses[-5:]), np.mean(losses[:5]) - 0.2)
        for row in (row for row in log if "lr" in row):
            step = row["step"]
            want = 0.1 * (1 + math.cos(math.pi * (step - 3) / 94))  # 96 steps
            self.assertAlmostEqual(row["lr"], want if step > 2 else 0.2 * step / 3)
        scores = [row["val_accuracy"] for row in log if "val_accuracy" in row]
        self.assertEqual(best["best"], max(scores))
        self.assertEqual(best["step"], 16 * (1 + np.argmax(scores)))
        model = r.from_pretrained(self.out / "best.pt").eval()
        train, val, (x, y) = r.load_images(r.Config())
        images = r.normalise(torch.cat((train[0], val[0], x)), model.stats)
        with torch.no_grad():
            z = model.features(images)
            pair = torch.stack((model(images), model(images.flip(3))), dim=1)
        self.close(np.load(self.dir / "l.npy"), pair[:260], 1e-4)
        features = load(self.out / "features.pt")
        self.same([features["train_y"], features["test_y"]], [train[1], y])
        self.close(features["train_z"], z[:200], 1e-4)
        self.close(features["test_z"], z[260:], 1e-4)
        logits = pair[260:, 0]
        want = [(logits.argmax(1) == y).float().mean(), nn.CrossEntropyLoss()(logits, y)]
        self.close([log[-1]["test_accuracy"], log[-1]["test_loss"]], want, 1e-4)

    def test_resume(self):
        self.resumes("resnet", "training_batch", 8, *self.tiny, "--arch", "resnet20-norm-layer")
        for name in ("whole", "parts"):
            shutil.rmtree(self.dir / name)
        self.resumes("resnet", "training_batch", 6, *self.fast)

    def test_fast_run(self):
        """--arch fast brings defaults, which flags override; the rate falls on a line. With --val 0
        nothing is best. Its checkpoint is read again."""
        with mock.patch.object(self.resnet, "train") as train:
            run("resnet", "--arch", "fast", "--crop", 3)
        [c] = train.call_args.args
        self.assertEqual((c.lr, c.batch_size, c.label_smoothing, c.crop), (0.24, 2000, 0.2, 3))
        self.out.mkdir()
        (self.out / "best.pt").write_text("an older run's")
        run("resnet", "--out", self.out, *self.fast, "--lr", 0.6, "--val", 0)
        self.assertFalse((self.out / "best.pt").exists())
        rates = [row["lr"] for row in rows(self.out) if "lr" in row]
        self.close(rates, [0.6, 0.5, 0.4, 0.3, 0.2, 0.1], 1e-6)
        found = self.resnet.from_pretrained(self.out / "ckpt.pt")
        self.assertIsInstance(found, self.resnet.FastNet)

    def test_refused(self):
        flags = ["--out", self.out, *self.tiny]
        run("resnet", *flags, "--epochs", 0.2)
        split = self.resnet.make_shapes(60, 0)
        for more, words in (
            (["--resume", "--data", "cifar10"], "another --data"),
            (["--resume", "--arch", "plain20"], "another --arch"),
            (["--resume", "--epochs", 0.1], "is at step 3"),
            (["--lr", 1e30], "loss is .* at step"),
        ):
            with mock.patch.object(self.resnet, "load_images", lambda c: [split] * 3):
                self.assertRegex(refused("resnet", *flags, *more), words)
        self.assertRaisesRegex(AssertionError, "21", self.resnet.cifar_resnet, 21)


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
    low, high = x.amin((1, 2), True), x.amax((1, 2), True)
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
    def setUp(self):
        super().setUp()
        self.vit = importlib.import_module("vit")
        draw = self.vit.make_shapes  # fewer: 200 images to train on, 20 to validate, 40 to test
        self.vit.make_shapes = lambda n, seed: draw(n // 50, seed)
        self.addCleanup(setattr, self.vit, "make_shapes", draw)
        self.tiny = """--dim 16 --depth 2 --heads 2 --batch_size 32 --epochs 1.5 --eval_every 3
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

    def test_sizes(self):
        """The stem's layers; initial weights; sizes that don't fit."""
        stem = self.vit.ConvStem(4, 64).proj
        layers = [getattr(m, "stride", type(m).__name__) for m in stem]
        self.assertEqual(layers, [(2, 2), "BatchNorm2d", "ReLU"] * 2 + [(1, 1)])
        self.assertEqual([m.out_channels for m in stem[::3]], [16, 32, 64])
        model = self.vit.ViT(32, 4, 192, 1, 3, 10)
        for part in model.blocks[0].attn.qkv.weight.chunk(3):  # Xavier's
            self.assertAlmostEqual(part.abs().max().item(), (6 / 384) ** 0.5, delta=0.001)
        self.assertRaises(AssertionError, self.model, heads=5)
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
        torch.save(bare, path)
        other = self.vit.ViT.from_pretrained(path, heads=8, num_classes=3, image_size=20)
        self.assertEqual((other.config["heads"], other.config["num_classes"]), (8, 3))
        self.close(other.pos_embed[:, 1:], square, 1e-6)
        self.same(other.pos_embed[:, :1].data, bare["pos_embed"][:, :1])
        huge = self.vit.ViT(4, 4, 1280, 0, 16, 2, pool="mean")
        torch.save(huge.state_dict(), path)
        self.assertEqual(self.vit.ViT.from_pretrained(path).config, huge.config)
        with mock.patch("torch.hub.load_state_dict_from_url", return_value=bare) as fetch:
            self.same(dict(self.vit.ViT.from_pretrained("vit_b_16").state_dict()), bare)
            self.vit.ViT.from_pretrained("deit_tiny_patch16_224")
        urls = """https://download.pytorch.org/models/vit_b_16-c867db91.pth
            https://dl.fbaipublicfiles.com/deit/deit_tiny_patch16_224-a1311bcf.pth"""
        self.assertEqual([call.args[0] for call in fetch.call_args_list], urls.split())

    def test_trivial_augment(self):
        """All 13 against slow_distort, each image in its own way; one in 14 stays."""
        kinds, s = np.arange(14).repeat(6), np.tile([-1.0, -0.6, -0.1, 0.3, 0.65, 1.0], 14)
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
            self.close(y[n], slow_distort(x[n].double(), name, s[n]), 1e-5, f"{name} {s[n]}")

    def test_mix(self):
        """Cutmix puts the right square of image B - 1 - i into image i."""
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
        for kind in ("mixup", "cutmix"):
            _, _, y, *mixed = self.batch(step, **{kind: 0.8})
            own = ((y - x.flip(0)) / (x - x.flip(0)))[:, 0].mean((1, 2))[:, None]
            for a, b in zip(mixed, (targets, hints), strict=True):
                self.close(a, own * b + (1 - own) * b.flip(0), 1e-5)

    def test_adamw(self):
        """Every parameter once, with its layer's rate; only weights decay."""
        model = self.model(conv_stem=True)
        optimizer = self.vit.adamw(model, self.vit.Config(lr=1.0, layer_decay=0.5))
        found = {p: group for group in optimizer.param_groups for p in group["params"]}
        for name, p in model.named_parameters():
            layer = dict(norm=3, head=3, blocks=1 + ("s.1" in name)).get(name.split(".")[0], 0)
            weight = p.dim() > 1 and name not in ("cls_token", "pos_embed")
            want = 0.5 ** (3 - layer), 0.05 * weight
            self.assertEqual((found[p]["peak"], found[p]["weight_decay"]), want, name)

    def test_objective(self):
        """Smoothed labels; half a teacher's cross-entropy, times T^2."""
        logits, y, hints = torch.randn(3, 6, 10).double()
        y, hints = y.softmax(1), hints.softmax(1)
        loss = -((0.9 * y + 0.01) * logits.log_softmax(1)).sum(1).mean()
        soft = -16 * (hints * (logits / 4).log_softmax(1)).sum(1).mean()
        self.close(self.vit.objective(logits, y), loss, 1e-12)
        self.close(self.vit.objective(logits, y, hints, T=4.0), (loss + soft) / 2, 1e-12)

    def test_train(self):
        """The weights and their average after a run are those of a loop written here."""
        np.save(self.dir / "logits.npy", np.random.default_rng(0).integers(99, size=(220, 2, 10)))
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
        """Both branches lose whole images; deeper blocks lose more."""
        block, x = self.vit.Block(24, 3, 0.5), torch.randn(400, 2, 24)
        skipped = (block(x) == x).flatten(1)
        self.same(skipped.all(1), skipped.any(1))
        self.assertAlmostEqual(skipped.float().mean().item(), 0.25, delta=0.1)
        self.assertFalse((block.eval()(x) == x).any())
        blocks = self.vit.make_vit(self.vit.Config(depth=5, drop_path=0.4)).blocks
        self.close([b.drop_path.p for b in blocks], [0, 0.1, 0.2, 0.3, 0.4], 1e-6)

    def test_rollout(self):
        """Against torch's own attention weights."""
        model, x = self.model(), torch.randn(2, 3, 12, 12)
        got, y, total = self.vit.rollout(model, x), model.tokens(x), torch.eye(10)
        for block in model.blocks:
            theirs = nn.MultiheadAttention(24, 3, batch_first=True)
            theirs.in_proj_weight, theirs.in_proj_bias = block.attn.qkv.parameters()
            weights = theirs(*[block.norm1(y)] * 3)[1]  # (B, N, N), the mean over heads
            total, y = 0.5 * (weights + torch.eye(10)) @ total, block(y)
        self.close(got, total, 1e-5)

    def test_resume(self):
        flags = "--trivial --mixup 0.8 --cutmix 1 --ema 0.9 --drop_path 0.5 --layer_decay 0.8"
        self.resumes("vit", "draw_batch", 6, *self.tiny, *flags.split())
        self.same(*(load(self.dir / out / "ckpt.pt")["ema"] for out in ("whole", "parts")))
        again = ["--out", self.dir / "whole", *self.tiny, "--resume", "--val", 7]
        self.assertIn("made with other val", refused("vit", *again))
        run("vit", *self.tiny, "--out", self.dir)
        counted = load(self.dir / "ckpt.pt")["model"]["patch_embed.proj.1.num_batches_tracked"]
        self.assertEqual(counted, 9)

    def test_run(self):
        """What a run leaves behind, and what starts from it; val 0; a loss that isn't finite."""
        out = self.dir / "out"
        flags = f"--lr 0.01 --epochs 4 --pool cls --ema 0.5 --out {out}"
        run("vit", *self.tiny, *flags.split())
        log, best = rows(out), load(out / "best.pt")
        self.assertEqual(best["best"], max(row.get("val_accuracy", 0) for row in log))
        self.same(best["encoder"], {k: t for k, t in best["ema"].items() if "head" not in k})
        model = self.vit.ViT(**best["encoder_config"]).eval()
        model.load_state_dict(best["ema"])
        losses = {row["step"]: row["val_loss"] for row in log if "val_loss" in row}
        for loss, n, seed in ((losses[best["step"]], 1000, 2), (log[-1]["test_loss"], 2000, 3)):
            x, y = self.vit.make_shapes(n, seed)
            z = model.features(self.vit.normalise(x, model.stats))
            self.close(loss, F.cross_entropy(model.head(z), y), 1e-5)
        self.close(load(out / "features.pt")["test_z"], z, 1e-5)
        flags = f"--init {out}/best.pt --val 0 --image_size 40 --epochs 0.2 --out {out}"
        run("vit", *self.tiny, *flags.split())
        after = load(out / "ckpt.pt")
        self.assertEqual(after["config"] | dict(pool="cls", heads=2), after["config"])
        self.assertEqual(after["model"]["pos_embed"].shape, (1, 26, 16))
        self.assertFalse((out / "best.pt").exists())
        self.assertRegex(refused("vit", *self.tiny, "--out", out, "--lr", 1e30), "loss is .* at ")


# --------------------------------------------------------------------------------------------------
# mae.py, and the evaluation that simclr.py and ijepa.py share with it


def slow_patches(image, P):
    """(3, S, S) as rows of numbers, a pixel after the other."""
    S = range(0, image.size(1), P)
    cells = [image[:, i : i + P, j : j + P] for i in S for j in S]
    return torch.stack([cell.permute(1, 2, 0).flatten() for cell in cells])


def slow_mae(m, images, noise, ratio, heads, decoder_heads):
    """Loss, predictions and mask of an fp64 model: an image at a time, a gap at a time."""
    dim, D = m.norm.weight.numel(), m.decoder_norm.weight.numel()
    encoder, decoder = (
        torch_blocks(*args)
        for args in ((m.blocks, dim, heads), (m.decoder_blocks, D, decoder_heads))
    )
    losses, preds, masks = [], [], []
    kernel = m.patch_embed.proj.weight.permute(2, 3, 1, 0).flatten(0, 2)
    for image, z in zip(images, noise.tolist(), strict=True):
        order = sorted(range(len(z)), key=z.__getitem__)
        kept = order[: int(len(z) * (1 - ratio))]
        pixels = slow_patches(image, m.patch_size)
        x = pixels @ kernel + m.patch_embed.proj.bias + m.pos_embed[0, 1:]
        x = torch.stack([m.cls_token[0, 0] + m.pos_embed[0, 0], *(x[i] for i in kept)])
        x = m.decoder_embed(m.norm(encoder(x[None])[0]))
        y = [m.mask_token[0, 0]] * len(z)
        for i, patch in enumerate(kept):
            y[patch] = x[1 + i]
        y = torch.stack([x[0], *y]) + m.decoder_pos_embed[0]
        preds.append(m.decoder_pred(m.decoder_norm(decoder(y[None])[0, 1:])))
        if m.norm_pix_loss:
            pixels = pixels - pixels.mean(1, keepdim=True)
            variance = pixels.square().sum(1, keepdim=True) / (pixels.size(1) - 1)
            pixels = pixels / (variance + 1e-6) ** 0.5
        losses += [(preds[-1][i] - pixels[i]).square().mean() for i in order[len(kept) :]]
        masks.append([float(i not in kept) for i in range(len(z))])
    return sum(losses) / len(losses), torch.stack(preds), torch.tensor(masks)


class TestMAE(Case):
    def setUp(self):
        super().setUp()
        import mae

        self.mae = mae
        patch = small_shapes("mae")
        patch.__enter__()
        self.addCleanup(patch.__exit__, None, None, None)
        probe = functools.partial(mae.linear_probe, steps=10)
        patch = mock.patch.object(mae, "linear_probe", probe)
        self.probe = mae.linear_probe
        patch.start()
        self.addCleanup(patch.stop)
        flags = """--patch_size 8 --dim 32 --depth 2 --heads 2 --decoder_dim 16
            --decoder_heads 2 --batch_size 16 --epochs 0.5 --warmup 2 --log_every 2 --eval_every 3
            --probe_images 50"""
        self.tiny = [*flags.split(), "--dtype", "float32", "--device", "cpu"]

    def model(self, **more):
        sizes = dict(image_size=16, patch_size=4, dim=24, depth=2, heads=3, decoder_dim=16)
        sizes.update(decoder_depth=2, decoder_heads=2)
        model = self.mae.MAE(**{**sizes, **more})
        for p in model.parameters():
            p.data.add_(0.1 * torch.randn_like(p))
        return model

    def test_equations(self):
        """Loss, predictions, mask and gradients, against a slow loop over images and gaps."""
        x, noise = 2 * torch.randn(3, 3, 16, 16) + 1, torch.rand(3, 16)
        for ratio, norm_pix_loss in ((0.75, False), (0.4, True)):
            model = self.model(norm_pix_loss=norm_pix_loss)
            slow = copy.deepcopy(model).double()
            theirs = slow_mae(slow, x.double(), noise, ratio, 3, 2)
            ours = model(x, ratio, noise)
            theirs[0].backward()
            ours[0].backward()
            for a, b in zip(ours, theirs, strict=True):
                self.close(a, b, 5e-6)
            for name, p in slow.named_parameters():
                if p.grad is not None and "blocks" not in name:
                    self.close(model.get_parameter(name).grad, p.grad, 2e-5, name)
            self.assertIsNone(model.pos_embed.grad)
            y = slow.encode(x.double())
            z = torch_blocks(slow.blocks, 24, 3)
            tokens = slow.patch_embed(x.double()).flatten(2).mT
            tokens = torch.cat((slow.cls_token.expand(3, -1, -1), tokens), 1) + slow.pos_embed
            self.close(y, slow.norm(z(tokens)), 1e-9)
            self.close(model.features(x), y[:, 1:].mean(1), 5e-6)
        loss, pred, mask = model(x)  # its own noise
        self.assertEqual(mask.sum(1).tolist(), [12.0] * 3)
        with self.assertRaisesRegex(AssertionError, "keeps 0 of 16"):
            model(x, 0.99)
        with self.assertRaisesRegex(AssertionError, "divide"):
            self.model(heads=5)

    def test_patches_and_start(self):
        """patchify, and what a new network begins with ([1] A.1 and its code)."""
        mae, x = self.mae, torch.randn(2, 3, 12, 12)
        self.same(mae.patchify(x, 4), torch.stack([slow_patches(image, 4) for image in x]))
        self.same(mae.unpatchify(mae.patchify(x, 3), 3), x)
        model = mae.MAE(32, 4, 128, 1, 4, 64, 1, 2)
        table = torch.zeros(65, 128)
        for i, j, n in itertools.product(range(8), range(8), range(32)):
            w = 10000 ** (-n / 32)
            table[1 + 8 * i + j, n::32] = torch.tensor(
                [math.sin(j * w), math.cos(j * w), math.sin(i * w), math.cos(i * w)]
            )
        self.close(model.pos_embed[0], table, 1e-6)
        self.assertFalse(model.decoder_pos_embed.requires_grad)
        for name, fans in (("patch_embed.proj", 48 + 128), ("blocks.0.attn.qkv", 4 * 128)):
            w = model.get_submodule(name).weight
            self.assertLess(abs(w.abs().max().item() / (6 / fans) ** 0.5 - 1), 0.01)  # Xavier's
        self.assertEqual(model.blocks[0].mlp.fc1.bias.abs().max().item(), 0)
        self.assertLess(abs(model.cls_token.std().item() - 0.02), 0.006)

    def test_from_pretrained(self):
        """Files in the official layout, under wrappers, and official names."""
        model, path = self.model(dim=128, heads=2, decoder_dim=64), self.dir / "w.pth"
        x, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
        wrapped = {"module." + name: w for name, w in model.state_dict().items()}
        torch.save(dict(model=wrapped, epoch=1), path)
        same = self.mae.MAE.from_pretrained(str(path))
        self.same(same(x, 0.75, noise), model(x, 0.75, noise))
        self.assertFalse(same.norm_pix_loss)
        big = self.mae.MAE.from_pretrained(str(path), image_size=32, norm_pix_loss=True)
        self.assertEqual((big.grid, big.norm_pix_loss), (8, True))
        self.same(big.pos_embed, self.mae.MAE(32, 4, 128, 1, 2, 64, 1, 2).pos_embed)
        huge = self.model(dim=1280, heads=16, depth=1)
        torch.save(huge.state_dict(), path)
        same = self.mae.MAE.from_pretrained(str(path))
        self.close(same.features(x), huge.features(x), 1e-6)
        with mock.patch("torch.hub.load_state_dict_from_url") as load:
            load.return_value = dict(model=model.state_dict())
            self.mae.MAE.from_pretrained("mae_visualize_vit_base", "there")
        url, folder, _ = load.call_args.args
        self.assertTrue(url.endswith("/mae/visualize/mae_visualize_vit_base.pth"))
        self.assertEqual(folder, "there")
        torch.save({k: w for k, w in model.state_dict().items() if "norm2" not in k}, path)
        with self.assertRaisesRegex(RuntimeError, "norm2"):
            self.mae.MAE.from_pretrained(str(path))

    def test_masks(self):
        """random: all alike. block: a rectangle but for one side. grid: one of each 2 x 2."""
        def removed(kind, ratio, grid=8, B=500):
            noise = self.mae.mask_noise(kind, np.random.default_rng(0), B, grid)
            self.assertEqual((noise.shape, noise.dtype), ((B, grid**2), torch.float32))
            order = noise.argsort(1).argsort(1)
            return (order >= int(grid**2 * (1 - ratio))).view(B, grid, grid)

        share = removed("random", 0.75, B=4000).float().mean(0)
        self.assertLess((share - 0.75).abs().max().item(), 0.035)
        blocks = removed("block", 0.5)
        rows, columns = blocks.any(2).sum(1), blocks.any(1).sum(1)
        gaps = rows * columns - 32  # the noise, 1e-3, may let a second side begin
        self.assertLess((gaps >= torch.maximum(rows, columns)).sum().item(), 5)
        blocks = removed("block", 0.2)
        inside = blocks.sum((1, 2)) == blocks[:, 1:-1, 1:-1].sum((1, 2))  # no border cuts it
        longer = (blocks.any(2).sum(1) - blocks.any(1).sum(1)).abs() > 1
        self.assertGreater((inside & longer).sum().item(), 20)
        kept = ~removed("grid", 0.75)
        corners = kept[:, :2, :2]
        self.assertTrue(torch.equal(kept, corners.repeat(1, 4, 4)))
        self.assertEqual(corners.sum((1, 2)).unique().tolist(), [1])
        self.assertEqual(corners.float().mean(0).gt(0.15).sum().item(), 4)

    def test_batches(self):
        """Batches depend on (seed, step) alone; an epoch has every image once, maybe mirrored."""
        c = self.mae.Config(batch_size=10, crop=0)
        images = self.mae.make_shapes(60, 1)[0]
        x, noise = self.mae.masked_batch(c, images, 8, 3)
        self.same(self.mae.masked_batch(c, images, 8, 3), (x, noise))
        self.assertFalse(torch.equal(self.mae.masked_batch(c, images, 8, 4)[1], noise))
        mean, std = (torch.tensor(s)[:, None, None] for s in self.mae.CIFAR10_STATS)
        plain = (images.float() / 255 - mean) / std
        seen, mirrored = [], 0
        for step in range(6, 12):
            x, noise = self.mae.masked_batch(c, images, 8, step)
            self.assertEqual(noise.shape, (10, 64))
            for image in x:
                straight = (plain - image).abs().flatten(1).amax(1)
                flipped = (plain - image.flip(2)).abs().flatten(1).amax(1)
                mirrored += (flipped.min() < straight.min()).item()
                seen.append(torch.minimum(straight, flipped).argmin().item())
        self.assertEqual(sorted(seen), list(range(60)))
        self.assertTrue(15 < mirrored < 45)
        moved, _ = self.mae.masked_batch(dataclasses.replace(c, crop=4), images, 8, 3)
        self.assertFalse(torch.equal(moved, self.mae.masked_batch(c, images, 8, 3)[0]))

    def test_probes(self):
        """kNN against a loop; the linear probe against torch's layers, one at a time."""
        y = torch.randint(10, (400,))
        z = 0.7 * torch.randn(10, 6)[y] + torch.randn(400, 6) + 1
        train, val, test = ((z[a:b], y[a:b]) for a, b in ((0, 200), (200, 300), (300, 400)))
        for k, t in ((5, 0.07), (20, 0.5), (20, 0.001)):
            right = 0
            for query, label in zip(*test, strict=True):
                s = F.cosine_similarity(query.double(), train[0].double())
                votes = torch.zeros(10).double()
                for i in s.argsort(descending=True)[:k]:
                    votes[train[1][i]] += ((s[i] - 1) / t).exp()
                right += (votes.argmax() == label).item() / 100
            self.assertAlmostEqual(self.mae.knn_accuracy(*train, *test, k, t), right, 5)
        self.assertEqual(self.mae.knn_accuracy(*train, *train, temperature=0.01), 1)

        rates, found = (1e-4, 0.1, 30.0), []
        mean, std = train[0].mean(0), (train[0].var(0) + 1e-6).sqrt()
        for rate in rates:
            layer = nn.Linear(6, 10)
            layer.weight.data.zero_()
            layer.bias.data.zero_()
            velocity, generator = [0, 0], torch.Generator().manual_seed(0)
            for step in range(50):
                index = torch.randint(200, (256,), generator=generator)
                loss = F.cross_entropy(layer((train[0][index] - mean) / std), train[1][index])
                grads = torch.autograd.grad(loss, [*layer.parameters()])
                velocity = [0.9 * v + g for v, g in zip(velocity, grads, strict=True)]
                for p, v in zip(layer.parameters(), velocity, strict=True):
                    p.data -= rate * 0.5 * (1 + math.cos(math.pi * step / 50)) * v
            answers = [layer((z - mean) / std).argmax(1) == y for z, y in (val, test)]
            found.append([a.float().mean().item() for a in answers])
        self.assertEqual(max(found), found[1])
        ours = self.probe(*train, *val, *test, steps=50, rates=rates)
        self.assertAlmostEqual(ours, max(found)[1], 5)
        answers = layer((val[0] - mean) / std).argmax(1)  # so that the last rate is right on these
        ours = self.probe(*train, val[0], answers, *test, steps=50, rates=rates)
        self.assertAlmostEqual(ours, found[2][1], 5)

    def test_run(self):
        """Log, checkpoints, features.pt and pictures; the encoder goes on in vit.py."""
        out = self.dir / "out"
        run("mae", *self.tiny, "--out", out)
        *_, last = rows(out)
        for of in ("", "_random_init", "_pixels"):
            self.assertLessEqual({f"knn{of}", f"linear{of}"}, {*last})
        evaluations = [row for row in rows(out) if "val_loss" in row]
        self.assertEqual([row["step"] for row in evaluations], [3, 6])
        best, ckpt = load(out / "best.pt"), load(out / "ckpt.pt")
        self.assertEqual(best["best"], max(row["linear"] for row in evaluations))
        model = self.mae.MAE.from_pretrained(str(out / "best.pt"))
        features = load(out / "features.pt")
        x = self.mae.standardise(self.mae.make_shapes(2000, 3)[0])
        self.close(model.features(x), features["test_z"], 1e-5)
        self.assertEqual([len(t) for t in list(features.values())[1:]], [200, 200, 60, 60])
        import vit

        twin = vit.ViT.from_pretrained(str(out / "best.pt"))
        self.close(twin.features(x), model.encode(x)[:, 0], 1e-5)
        tables = [k for k in ckpt["encoder"] if k.startswith(("decoder", "mask"))]
        self.assertEqual((tables, ckpt["encoder_config"]["heads"]), ([], 2))
        decays = [(len(g["params"]), g["weight_decay"]) for g in ckpt["optimizer"]["param_groups"]]
        matrices = sum(w.dim() in (2, 4) for w in ckpt["model"].values())
        self.assertEqual(decays, [(matrices, 0.05), (len(ckpt["model"]) - matrices, 0.0)])
        run("mae", *self.tiny, "--out", self.dir / "b", "--init", out / "best.pt", "--lr", 1e-9)
        self.assertEqual(rows(self.dir / "b")[-1]["knn_random_init"], last["knn_random_init"])
        moved = load(self.dir / "b" / "ckpt.pt")["model"]
        self.close(moved["mask_token"], best["model"]["mask_token"], 1e-3)
        images = self.mae.make_shapes.original(5040, 0)
        with mock.patch.object(self.mae, "load_cifar10", lambda _: (*images, *images)):
            flags = ["--data", "cifar10", "--val", 0, "--epochs", 0.01, "--eval_every", 1]
            run("mae", *self.tiny, "--out", out, *flags)
        self.assertFalse((out / "best.pt").exists())  # but probes have images to choose by
        self.assertEqual(len(load(out / "features.pt")["train_z"]), 40)
        self.assertTrue(all(math.isfinite(row.get("val_loss", 0)) for row in rows(out)))

    def test_reconstruct(self):
        """Patches that are kept are shown as they are, removed ones as predicted; photos shrink
        with antialias, so that noise is averaged."""
        plt = __import__("matplotlib.pyplot").pyplot
        model, c = self.model(norm_pix_loss=True), self.mae.Config(mask_ratio=0.5)
        images, path = torch.randint(0, 256, (3, 3, 16, 16)).float(), self.dir / "a.png"
        stats = self.mae.IMAGENET_STATS
        self.mae.draw_reconstructions(c, model, images, stats, path)
        sheet = 255 * torch.tensor(plt.imread(path))[..., :3].view(3, 16, 3, 16, 3)
        whole, left, rebuilt = sheet.permute(0, 2, 4, 1, 3).round()  # (3 images, 3, S, S) each
        self.same(whole, images)
        self.assertEqual((left != images).any(1).sum().item(), (left == 128).all(1).sum().item())
        kept = (left == images).all(1, keepdim=True).expand_as(images)
        self.same(rebuilt[kept], images[kept])
        for image, shown in zip(images, rebuilt, strict=True):  # true means, so nearly true colours
            a, b = slow_patches(image, 4), slow_patches(shown, 4)
            self.assertLess((a.mean(1) - b.mean(1)).abs().max().item(), 90)
        torch.save(model.state_dict(), self.dir / "w.pth")
        plt.imsave(self.dir / "photo.png", np.random.default_rng(0).random((400, 320, 3)))
        with mock.patch.object(self.mae, "draw_reconstructions") as draw:
            run("mae", "--reconstruct", self.dir / "w.pth", "--picture", self.dir / "photo.png",
                "--out", self.dir)
        images = draw.call_args.args[2]
        self.assertEqual(images.shape, (1, 3, 16, 16))
        self.assertLess(images.std().item(), 6)  # 74 before

    def test_resume(self):
        self.resumes("mae", "masked_batch", 5, *self.tiny)

    def test_refused(self):
        out = self.dir / "out"
        run("mae", *self.tiny, "--out", out)
        again = [*self.tiny, "--out", out, "--resume"]
        self.assertIn("another --depth", refused("mae", *again, "--depth", 1))
        self.assertIn("is at step 6", refused("mae", *again))
        self.assertIn("keeps 0 of 16", refused("mae", *self.tiny, "--mask_ratio", 1))
        with mock.patch.object(self.mae, "standardise", lambda x: x * math.nan):
            self.assertIn("loss is nan at step 0", refused("mae", *self.tiny, "--out", out))


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
        total = total - (cosines[0] / t - (cosines / t).exp().sum().log())
    return total / len(q)


def slow_vicreg(z1, z2, *weights):
    """VICReg's eq. 1 to 5, as its authors' code weighs them."""
    s, v, c = (z1 - z2).square().mean(), 0, 0
    for z in (z1, z2):
        cov, D = torch.cov(z.T), z.size(1)
        v = v + (1 - (cov.diagonal() + 1e-4).sqrt()).clamp(min=0).sum() / D / 2
        c = c + (cov.square().sum() - cov.diagonal().square().sum()) / D
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
    def setUp(self):
        super().setUp()
        import simclr

        self.simclr, self.out = simclr, self.dir / "out"
        probe = functools.partial(simclr.linear_probe, steps=2)
        probe = mock.patch.object(simclr, "linear_probe", probe)
        for patch in (small_shapes("simclr"), probe):
            patch.__enter__()
            self.addCleanup(patch.__exit__, None, None, None)
        self.tiny = ["--batch_size", 16, "--width", 8, "--head_dim", 12, "--queue", 40]
        self.tiny += ["--warmup", 2, "--epochs", 1, "--log_every", 1, "--dtype", "float32"]

    def test_losses(self):
        """Values and gradients against slow ones; none for keys; bfloat16; a collapse."""
        s, (z1, z2, queue) = self.simclr, torch.randn(3, 5, 4).double() * 0.7
        unit = [F.normalize(z, dim=1) for z in (z1, z2, queue)]
        for fast, slow, tensors, rest in (
            (s.nt_xent, slow_nt_xent, [z1, z2], [0.3]),
            (s.moco_loss, slow_moco, unit, [0.3]),
            (s.vicreg_loss, slow_vicreg, [z1, z2], [3, 5, 7]),
            (s.vicreg_loss, slow_vicreg, [z1, z2], [25, 25, 1]),
        ):
            a, b = ([t.clone().requires_grad_() for t in tensors] for _ in "ab")
            got, want = fast(*a, *rest), slow(*b, *rest)
            self.close(got, want, 1e-12)
            got.backward()
            want.backward()
            self.close(a[0].grad, b[0].grad, 1e-10)
            if fast is not s.moco_loss:
                self.close(a[1].grad, b[1].grad, 1e-10)
            self.assertEqual(a[1].grad is None, fast is s.moco_loss)
            halves = [t.bfloat16() for t in tensors]
            with torch.autocast("cpu", torch.bfloat16):
                half = fast(*halves, *rest)
            self.close(half, fast(*[t.double() for t in halves], *rest), 1e-5)
        self.close(s.vicreg_loss(z1, z2), got, 1e-12)
        same = torch.ones(4, 3, requires_grad=True)
        self.assertAlmostEqual(s.nt_xent(same, same, 0.5).item(), math.log(7), 5)
        s.vicreg_loss(same, same).backward()
        self.assertTrue(same.grad.isfinite().all())

    def test_sizes(self):
        """Kaiming's weights; the heads' parameters."""
        w = self.simclr.ResNet18(8).layer4[0].conv1.weight
        self.assertAlmostEqual(w.std().item(), 288**-0.5, delta=0.002)
        for loss, size in dict(moco=850, simclr=874, vicreg=500).items():
            head = self.simclr.make_head(loss, 24, 10)
            trained = [p.numel() for p in head.parameters() if p.requires_grad]
            self.assertEqual(sum(trained), size)

    def test_methods(self):
        """Who is normalised with whom; three steps of MoCo by hand, with a queue of 20."""
        x1, x2 = torch.randn(2, 8, 3, 8, 8).double()
        args = self.simclr.ResNet18(8), 12, 0.2, 20, 0.9
        model = self.simclr.TwoViews("simclr", *args).double()
        z = model.network(torch.cat((x1, x2)))
        self.close(model(x1, x2), slow_nt_xent(z[:8], z[8:], 0.2), 1e-10)
        model = self.simclr.TwoViews("vicreg", *args).double()
        z = [model.network(x) for x in (x1, x2)]
        self.close(model(x1, x2), slow_vicreg(*z, 25, 25, 1), 1e-10)
        model, parts = self.simclr.TwoViews("moco", *args).double(), []
        for p in model.key_network.parameters():
            p.add_(torch.randn_like(p) * 0.05)
        slow, queue = copy.deepcopy(model.key_network), model.queue.clone()
        self.close(queue.norm(dim=1), torch.ones(20), 1e-6)
        model.key_network.register_forward_hook(lambda _, x, z: parts.append(x[0]))
        for _ in range(3):
            parts.clear()
            loss = model(x1, x2)
            for k, q in zip(slow.parameters(), model.network.parameters(), strict=True):
                k.copy_((0.9 * k + 0.1 * q).detach())
            order = [(x2 == x).all(3).all(2).all(1).nonzero().item() for x in torch.cat(parts)]
            self.assertEqual(sorted(order), [*range(8)])
            self.assertNotEqual(order, [*range(8)])
            k = F.normalize(torch.cat([slow(part) for part in x2[order].split(2)]), dim=1)
            k = k[np.argsort(order)]
            q = F.normalize(torch.cat([model.network(x) for x in x1.split(2)]), dim=1)
            self.close(loss, slow_moco(q, k, queue, 0.2), 1e-9)
            queue = torch.cat((queue, k))[8:]
            self.close(model.queue, queue, 1e-9)

    def test_crop(self):
        """Against slices of the same boxes, resized by torch; the whole if none fits."""
        x, crop, n = torch.rand(300, 3, 16, 16) * 255, self.simclr.random_crop, 300
        got, rng = crop(x, np.random.default_rng(0), 0.2), np.random.default_rng(0)
        areas, aspects = 256 * rng.uniform(0.2, 1, (10, n)), rng.uniform(-1, 1, (10, n))
        tops, lefts, mirrored = rng.random((3, n))
        for i in range(n):
            for area, aspect in zip(areas[:, i], (4 / 3) ** aspects[:, i], strict=True):
                h, w = round((area / aspect) ** 0.5), round((area * aspect) ** 0.5)
                if max(h, w) <= 16:
                    break
            top, left = int(tops[i] * (17 - h)), int(lefts[i] * (17 - w))
            box = x[i : i + 1, :, top : top + h, left : left + w]
            want = F.interpolate(box, (16, 16), mode="bilinear")[0]
            self.close(got[i], want.flip(2) if mirrored[i] < 0.5 else want, 1e-4, i)
        for a, b in zip(crop(x, np.random.default_rng(1), 1.0), x, strict=True):
            self.assertLess(min((a - b).abs().max(), (a.flip(2) - b).abs().max()), 0.01)

    def test_jitter(self):
        """Against colorsys; greys and pure colours too. A fifth of the images stay."""
        x, rng = torch.rand(40, 3, 3, 3), np.random.default_rng(3)
        x[:, :, 0, 0] = x[:, :1, 0, 0]
        x[:, :, 1] = x[:, :, 1].round()
        got = self.simclr.colour_jitter(x * 255, np.random.default_rng(3), 1.0) / 255
        amounts = rng.uniform(-1, 1, (40, 4)) * (0.8, 0.8, 0.8, 0.2) + (1, 1, 1, 0)
        orders = rng.permuted(np.tile(np.arange(4), (40, 1)), axis=1)
        for i, coin in enumerate(rng.random(40)):
            want = slow_jitter(x[i], amounts[i], orders[i]) if coin < 0.8 else x[i]
            self.close(got[i], want, 1e-4, i)

    def test_views(self):
        """Of (seed, step) alone; an epoch has each image once, in two views; shares of grey."""

        def views(step, images, **more):
            c = self.simclr.Config(batch_size=16, **more)
            mean, std = (torch.tensor(s).view(3, 1, 1) for s in self.simclr.CIFAR10_STATS)
            return [x * std + mean for x in self.simclr.draw_views(c, images, step)]

        images, seen = torch.arange(48).view(48, 1, 1, 1).repeat(1, 3, 8, 8).byte(), []
        for step in range(6):
            a, b = views(step, images, jitter=0.0)
            self.close(a, b, 1e-4)
            seen += (a[:, 0, 0, 0] * 255).round().int().tolist()
        self.assertEqual([sorted(seen[:48]), sorted(seen[48:])], [[*range(48)]] * 2)
        self.assertNotEqual(seen[:48], seen[48:])
        images = torch.randint(0, 256, (48, 3, 8, 8), dtype=torch.uint8)
        a, b = views(3, images)
        self.same([a, b], views(3, images))
        for other in (b, views(4, images)[0], views(3, images, seed=1)[0]):
            self.assertGreater((a - other).flatten(1).abs().amax(1).min(), 0.01)
        x = torch.cat([v for step in range(30) for v in views(step, images, grey=0.3)])
        greys = (x[:, 0] - x[:, 2]).abs().amax((1, 2)) < 1e-4
        self.assertAlmostEqual(greys.float().mean().item(), 0.3, delta=0.05)

    def test_resume(self):
        self.resumes("simclr", "draw_views", 9, *self.tiny, "--loss", "moco")

    def test_run(self):
        """A run's schedule and files. Evaluation reads few images, and changes nothing."""
        s, sizes, extract = self.simclr, [], self.simclr.extract

        def counted(encoder, split, autocast):
            sizes.append(len(split[0]))
            return extract(encoder, split, autocast)

        flags = [*self.tiny, "--loss", "moco", "--lr", 0.05, "--probe_images", 50]
        with mock.patch.object(s, "extract", counted):
            run("simclr", "--out", self.out, *flags)
        self.assertEqual(sizes, [50, 60] * 4 + [200, 60, 60] * 3)
        log, best, last = rows(self.out), load(self.out / "best.pt"), load(self.out / "ckpt.pt")
        knn = {row["step"]: row["knn"] for row in log if "val_loss" in row}
        self.assertEqual((best["step"], best["best"]), max(knn.items(), key=lambda i: i[1]))
        rates = [row["lr"] for row in log if "lr" in row]
        last_rate = 0.025 * (1 + math.cos(0.9 * math.pi))
        self.close([rates[0], rates[1], rates[-1]], [0.05 / 3, 0.1 / 3, last_rate], 1e-9)
        decays, none = last["optimizer"]["param_groups"]
        self.assertEqual((decays["weight_decay"], none["weight_decay"]), (0.05, 0.0))
        self.assertEqual((len(decays["params"]), len(none["params"])), (44, 84))
        autocast = torch.autocast("cpu", enabled=False)
        torch.manual_seed(0)
        for name in ("_random_init", ""):
            encoder = s.ResNet18(8).eval()
            if name == "":
                encoder.load_state_dict(best["encoder"])
            train = extract(encoder, s.make_shapes(10000, 1), autocast)
            test = extract(encoder, s.make_shapes(2000, 3), autocast)
            self.assertAlmostEqual(log[-1]["knn" + name], s.knn_accuracy(*train, *test), 6)
        self.close(load(self.out / "features.pt")["test_z"], test[0], 1e-5)
        run("simclr", "--out", self.dir / "b", *flags, "--eval_every", 12)
        self.same(dict(last["model"]), dict(load(self.dir / "b/ckpt.pt")["model"]))

    def test_init_and_flags(self):
        """An encoder starts another loss and resnet.py; defaults by loss and data; refusals."""
        import resnet

        run("simclr", "--out", self.out, *self.tiny, "--val", 0, "--epochs", 0.2)
        path, x = self.out / "ckpt.pt", torch.randn(2, 3, 32, 32)
        self.assertFalse((self.out / "best.pt").exists())
        encoder = load(path)["encoder"]
        flags = ["--out", self.dir / "b", *self.tiny, "--loss", "moco", "--epochs", 0.2]
        run("simclr", *flags, "--init", path, "--lr", 0)
        model = load(self.dir / "b/ckpt.pt")["model"]
        for network in ("network", "key_network"):
            self.close(model[network + ".0.conv1.weight"], encoder["conv1.weight"], 1e-6)
        ours = self.simclr.ResNet18(8).eval()
        ours.load_state_dict(encoder)
        theirs = resnet.from_pretrained(path, arch="resnet18").eval()
        self.close(theirs.features(x), ours(x), 1e-5)
        for more in (["--loss", "simclr"], ["--queue", 64], ["--head_dim", 16], ["--width", 16]):
            line = refused("simclr", *flags, "--resume", *more)
            self.assertRegex(line, f"ckpt.pt was made with {more[0]} ")
        self.assertRegex(refused("simclr", *flags, "--lr", 1e30), "loss is nan at step")
        with mock.patch.object(self.simclr, "train") as train:
            run("simclr", "--loss", "vicreg", "--data", "cifar10", "--grey", 0.7)
            c = train.call_args.args[0]
            self.assertEqual((c.head_dim, c.crop_min, c.jitter, c.grey), (512, 0.2, 0.5, 0.7))
            run("simclr")
        self.assertEqual(train.call_args.args[0], self.simclr.Config())


# --------------------------------------------------------------------------------------------------
# ijepa.py


def slow_jepa(w, images, context_ids, target_ids, targets_by, heads=2):
    """The loss from a state dict in fp64, an image and a target at a time."""

    def linear(x, name):
        return x @ w[f"{name}.weight"].flatten(1).T + w[f"{name}.bias"]

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def blocks(x, name):  # x (N, C)
        for b in (f"{name}.0", f"{name}.1"):
            qkv = linear(norm(x, f"{b}.norm1"), f"{b}.attn.qkv").chunk(3, 1)
            q, k, v = (t.unflatten(1, (heads, -1)).transpose(0, 1) for t in qkv)  # (H, N, D)
            y = (q @ k.mT / q.size(2) ** 0.5).softmax(2) @ v
            x = x + linear(y.transpose(0, 1).flatten(1), f"{b}.attn.proj")
            x = x + linear(F.gelu(linear(norm(x, f"{b}.norm2"), f"{b}.mlp.fc1")), f"{b}.mlp.fc2")
        return x

    def encode(image, ids, name):  # (3, 16, 16) -> (K, C)
        x = torch.stack([image[:, i // 4 * 4 :, i % 4 * 4 :][:, :4, :4].flatten() for i in ids])
        x = linear(x, f"{name}.patch_embed.proj") + w[f"{name}.pos_embed"][0, ids]
        return norm(blocks(x, f"{name}.blocks"), f"{name}.norm")

    errors, table, p = [], w["predictor.predictor_pos_embed"][0], "predictor.predictor_"
    for i, image in enumerate(images.double()):
        z = encode(image, [*range(16)], targets_by)
        z = (z - z.mean(1, True)) / (z.var(1, False, keepdim=True) + 1e-5).sqrt()
        x = linear(encode(image, context_ids[i], "encoder"), f"{p}embed") + table[context_ids[i]]
        for ids in (t[i] for t in target_ids):
            y = torch.cat((w["predictor.mask_token"][0] + table[ids], x))
            y = linear(norm(blocks(y, f"{p}blocks"), f"{p}norm"), f"{p}proj")
            e = (y[: len(ids)] - z[ids]).abs()
            errors.append(torch.where(e < 1, e**2 / 2, e - 0.5))
    return torch.stack(errors).mean()


def slow_masks(rng, batch, grid, targets):
    """Contexts before they are cut, and targets, as sets of places, in loops."""

    def block(area, aspect):
        sides = [min(grid, max(1, round((area * a) ** 0.5))) for a in (aspect, 1 / aspect)]
        (top, h), (left, w) = ((rng.integers(grid - side + 1), side) for side in sides)
        return {(i, j) for i in range(top, top + h) for j in range(left, left + w)}

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
    def setUp(self):
        super().setUp()
        self.ijepa, self.off = importlib.import_module("ijepa"), contextlib.nullcontext()
        probe = functools.partial(self.ijepa.linear_probe, steps=20)
        probe = mock.patch.object(self.ijepa, "linear_probe", mock.Mock(wraps=probe))
        for patch in (small_shapes("ijepa"), probe):
            patch.__enter__()
            self.addCleanup(patch.__exit__, None, None, None)
        self.tiny = """--dim 16 --depth 1 --heads 2 --predictor_dim 8 --predictor_depth 1 --warmup 2
            --batch_size 32 --epochs 2 --eval_every 3 --log_every 3 --device cpu
            --dtype float32 --patch_size 8""".split()

    def model(self, size=16, patch=4, heads=2, predictor_dim=16, **more):
        """A small network whose weights are large enough for every term to matter."""
        model = self.ijepa.IJEPA(size, patch, 24, 2, heads, predictor_dim, 2, **more)
        for name, p in model.state_dict().items():
            if "pos_embed" not in name:
                p.copy_(("norm" in name and "weight" in name) + 0.3 * torch.randn(p.shape))
        return model

    def masks(self, batch, grid, seed=0, **more):
        return self.ijepa.sample_masks(batch, grid, torch.Generator().manual_seed(seed), **more)

    def test_objective(self):
        """Loss and gradients; which network makes the targets. Its own get none."""
        x, masks = torch.randn(3, 3, 16, 16), self.masks(3, 4)
        for stop, targets_by in ((True, "target_encoder"), (False, "encoder")):
            model = self.model(stop_gradient=stop)
            w = {k: t.double() for k, t in model.state_dict().items()}
            for k, t in w.items():
                t.requires_grad_("pos" not in k)
            loss, want = model(x, *masks), slow_jepa(w, x, *masks, targets_by)
            self.close(loss, want, 1e-5)
            loss.backward()
            want.backward()
            for name, p in model.named_parameters():
                self.assertEqual(p.requires_grad, "target" not in name and "pos" not in name)
                if p.requires_grad:
                    self.close(p.grad, w[name].grad, 2e-4, name)

    def test_names(self):
        """timm's and the official code's names; ViT-H's size; initial weights; wrong sizes."""
        with torch.device("meta"):
            encoder = self.ijepa.Encoder(224, 14, 1280, 32, 16)
        self.assertEqual(sum(p.numel() for p in encoder.parameters()), 630762240)
        model = self.ijepa.IJEPA(32, 4, 192, 1, 3, 96, 1)
        self.same(dict(model.encoder.state_dict()), dict(model.target_encoder.state_dict()))
        names = {k[10:].rpartition(".")[0] for k in model.predictor.state_dict() if k[0] == "p"}
        block = "norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"
        block = {f"blocks.0.{k}" for k in block}
        self.assertEqual(names, block | {"", "embed", "norm", "proj"})
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                self.assertEqual(p.abs().max().item(), 0)
            elif p.dim() in (2, 4):
                bound = (6 / sum(p.flatten(1).shape)) ** 0.5
                self.assertAlmostEqual(p.abs().max().item(), bound, delta=0.01 * bound)
        self.assertAlmostEqual(model.predictor.mask_token.std().item(), 0.02, delta=0.005)
        for wrong in (dict(patch=5), dict(heads=5), dict(predictor_dim=9)):
            self.assertRaises(AssertionError, self.model, **wrong)

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
            self.assertFalse(torch.equal(encoder(other, ids[:, :21]), encoder(x, ids[:, :21])))

    def test_masks(self):
        """Rectangles of one size, contexts of one length without them; the generator alone decides;
        targets that leave nothing."""
        for grid, targets in itertools.product(range(4, 17), (1, 2, 4)):
            state = torch.get_rng_state()
            context, blocks = self.masks(40, grid, grid, targets=targets)
            self.same((context, blocks), self.masks(40, grid, grid, targets=targets))
            self.same(torch.get_rng_state(), state)
            self.assertEqual((len(context), len(blocks)), (40, targets))
            self.assertGreaterEqual(context.size(1), grid**2 // 4)
            sizes = set()
            for seen, *gone in zip(context.tolist(), *(t.tolist() for t in blocks), strict=True):
                self.assertEqual(len({*seen}.difference(*gone)), context.size(1))
                for ids in gone:
                    (top, left), (bottom, right) = (divmod(n, grid) for n in (ids[0], ids[-1]))
                    box = itertools.product(range(top, bottom + 1), range(left, right + 1))
                    self.assertEqual(ids, [grid * i + j for i, j in box])
                    sizes.add((bottom - top, right - left))
            self.assertEqual(len(sizes), 1)
        with self.assertRaisesRegex(ValueError, "nothing of a context"):
            self.masks(64, 8, target_scale=(0.5, 0.5), context_scale=(0.2, 0.3))

    def test_frequencies(self):
        """Where contexts and targets lie, and how long contexts are, against slow_masks: which
        patches are cut doesn't depend on their place."""
        for grid, targets in ((8, 4), (5, 2)):
            rng, counts, lengths = np.random.default_rng(0), torch.zeros(2, 2, grid, grid), [[], []]
            for seed in range(400):
                images = [*slow_masks(rng, 8, grid, targets)]
                K = min(len(context) for context, _ in images)
                for context, blocks in images:
                    for kind, places, weight in ((0, [context], K / len(context)), (1, blocks, 1)):
                        for i, j in itertools.chain(*places):
                            counts[0, kind, i, j] += weight
                context, blocks = self.masks(8, grid, seed, targets=targets)
                for kind, ids in enumerate((context, torch.cat(blocks, dim=1))):
                    counts[1, kind] += ids.flatten().bincount(minlength=grid**2).view(grid, grid)
                lengths[0].append(K)
                lengths[1].append(context.size(1))
            self.assertAlmostEqual(*np.mean(lengths, axis=1), delta=0.4)
            for slow, fast in zip(*counts / 3200, strict=True):
                self.close(fast, slow, 0.09)

    def test_step(self):
        """The batch, the rate, one update by the gradient, then the target encoder's average."""
        x = torch.arange(20).view(20, 1, 1, 1).expand(20, 3, 16, 16).byte()
        c = self.ijepa.Config(batch_size=4, warmup=2, lr=0.1, ema_start=0.6, targets=3)
        batches = [self.ijepa.jepa_batch(c, x, step) for step in range(8)]
        seen = torch.cat([batch[0][:, 2, 0, 0] * 0.2616 * 255 + 0.4465 * 255 for batch in batches])
        self.assertEqual(sorted(seen[:20].round().long().tolist()), [*range(20)])
        self.assertFalse(torch.equal(seen[:12], seen[20:]))
        self.assertEqual((len(batches[0][2]), len({str(b[1:]) for b in batches})), (3, 8))
        model, twin, momentum = self.model(), self.model(), 0.6
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
        for step, rate in enumerate((0.1 / 3, 0.2 / 3, 0.1, 0.075, 0.025)):
            batch = batches[step][0], *self.masks(4, 4, step)
            old = {k: t.clone() for k, t in model.state_dict().items()}
            twin.load_state_dict(old)
            twin.zero_grad()
            loss = twin(*batch)
            loss.backward()
            got = self.ijepa.jepa_step(c, model, model, optimizer, batch, step, 5, self.off)
            self.close(got, loss, 1e-5)
            for k, p in twin.named_parameters():
                w = model.get_parameter(k)
                if p.requires_grad:
                    self.close(w, old[k] - rate * p.grad, 1e-5, k)
                elif k.startswith("target"):
                    new = model.get_parameter(k.removeprefix("target_"))
                    self.close(w, momentum * old[k] + (1 - momentum) * new, 1e-5, k)
            momentum += 0.08

    def test_collapse_watch(self):
        """RankMe in closed form; std, and the loss over that of each place's mean, by hand."""
        rankme, c = self.ijepa.rankme, self.ijepa.Config(patch_size=8, dim=24, targets=2)
        d = torch.diag(torch.tensor([3.0, 1.0]))
        for z, rank in ((0 * d, 1), (torch.ones(9, 4), 1), (d, 4 / 27**0.25), (torch.eye(7), 7)):
            self.assertAlmostEqual(rankme(z), rank, 3)
        model, val = self.model(size=32, patch=8), self.ijepa.make_shapes(60, 2)
        got = self.ijepa.evaluate(c, model, self.ijepa.make_shapes(90, 1), val, self.off)
        c.batch_size = 60
        x, context_ids, target_ids = self.ijepa.jepa_batch(c, val[0], 0)
        z = model.target_encoder(x).detach()
        t = F.layer_norm(z, (24,))
        t -= t.mean(0)
        errors = [t[n, i] for ids in target_ids for n in range(60) for i in ids[n]]
        of_mean = F.smooth_l1_loss(torch.stack(errors), torch.zeros(len(errors), 24))
        loss = model(x, context_ids, target_ids).detach()
        self.close([got["val_loss"], got["over_mean"]], [loss, loss / of_mean], 1e-4)
        unit = z.mean(1) / z.mean(1).square().sum(1, True).sqrt()
        std = ((unit - unit.mean(0)).square().sum(0) / 59).sqrt().mean() * 24**0.5
        self.close([got["std"], got["rankme"]], [std, rankme(z.mean(1))], 1e-3)

    def test_tsne(self):
        """A step against autograd of KL(P || Q), with P by a scan of its own; blobs lie apart."""
        x, P, betas = torch.randn(40, 4), torch.zeros(40, 40), torch.logspace(-2, 1, 9000)[:, None]
        for i in range(40):
            p = (-betas * (x - x[i]).square().sum(1)).exp()
            p[:, i] = 0
            p /= p.sum(1, True)
            P[i] = p[(torch.special.entr(p).sum(1) - math.log(8)).abs().argmin()]
        start, moved = (torch.manual_seed(3) and self.ijepa.tsne(x, 8.0, n) for n in (0, 1))
        y = start.double().requires_grad_()
        kernel = 1 / (1 + (y[:, None] - y).square().sum(2))
        kl = -(12 / 80 * (P + P.T) * kernel.log()).sum() + (kernel.sum() - 40).log()
        kl.backward()
        self.close((start - moved) / (50 * 1.2), y.grad - y.grad.mean(0), 0.01)
        group = torch.arange(200) % 4
        y = self.ijepa.tsne(torch.randn(200, 5) + 9 * torch.eye(5)[group], 15.0, 600)
        nearest = torch.cdist(y, y).fill_diagonal_(math.inf).argmin(1) % 4
        self.assertGreater((nearest == group).float().mean().item(), 0.95)
        self.assertGreater(torch.cdist(y, y).max().item(), 10)
        self.assertTrue(self.ijepa.tsne(torch.ones(50, 3), 8.0, 20).isfinite().all())

    def test_pictures(self):
        """--compare: nine tenths are fitted, the last chooses; other data is refused. --show_masks:
        of each image the context and the targets, the rest is grey."""
        (_, y), (test_x, test_y) = self.ijepa.make_shapes(10000, 1), self.ijepa.make_shapes(2000, 3)
        z = F.one_hot(y, 10) + 0.01 * torch.randn(200, 10)
        file = dict(name="ours", train_z=z, train_y=y, test_z=torch.eye(10)[test_y], test_y=test_y)
        torch.save(file, self.dir / "a.pt")
        torch.save(file | dict(test_y=test_y.roll(1)), self.dir / "b.pt")
        flags = *self.tiny, "--out", self.dir, "--compare", self.dir / "a.pt"
        found = re.findall(r"(\w+)  knn (\S+)", run("ijepa", *flags))
        self.assertEqual([name for name, _ in found], ["ours", "random_init", "pixels"])
        self.assertTrue(float(found[0][1]) == 1 > 2 * float(found[1][1]))
        ours, _, pixels = (call.args for call in self.ijepa.linear_probe.call_args_list)
        self.assertEqual([len(t) for t in ours], [180, 180, 20, 20, 60, 60])
        self.same(torch.cat(ours[:3:2]), z)
        self.same(pixels[4], self.ijepa.standardise(test_x).flatten(1))
        self.assertGreater((self.dir / "compare.png").stat().st_size, 5000)
        self.assertRegex(refused("ijepa", *flags[:-1], self.dir / "b.pt"), "isn't of --data shapes")
        run("ijepa", "--show_masks", "--out", self.dir, "--targets", 3, "--patch_size", 4)
        sheet = importlib.import_module("matplotlib.pyplot").imread(self.dir / "masks.png")[..., :3]
        parts = torch.tensor(sheet).view(6, 8, 4, 5, 8, 4, 3).permute(0, 3, 1, 4, 2, 5, 6)
        parts, c = parts.flatten(4).flatten(2, 3), self.ijepa.Config(targets=3, patch_size=4)
        _, context, targets = self.ijepa.jepa_batch(c, self.ijepa.make_shapes(10000, 1)[0], 0)
        for n, (k, ids) in itertools.product(range(6), enumerate((context, *targets), 1)):
            self.same(parts[n, k, ids[n]], parts[n, 0, ids[n]])
            colours = (parts[n, k] - 0.5).abs().amax(1) > 0.003
            self.assertLessEqual({*colours.nonzero()[:, 0].tolist()}, {*ids[n].tolist()})

    def test_run(self):
        """Resume; the target encoder that is kept, best by kNN, for vit.py; --init; val 0."""
        flags = [*self.tiny, "--lr", 0.01]
        self.resumes("ijepa", "jepa_batch", 8, *flags)
        out, last = self.dir / "whole", load(self.dir / "parts/ckpt.pt")
        log, best = rows(out), load(out / "best.pt")
        self.same(last["encoder"], load(out / "ckpt.pt")["encoder"])
        scores = {row["step"]: row["knn"] for row in log if "rankme" in row}
        self.assertEqual((scores[best["step"]], max(scores.values())), (best["best"],) * 2)
        encoder = self.ijepa.Encoder(**last["encoder_config"])
        encoder.load_state_dict({k[15:]: t for k, t in best["model"].items() if k[0] == "t"})
        x = self.ijepa.standardise(self.ijepa.make_shapes(2000, 3)[0])
        z = encoder(x).mean(1)
        vit = importlib.import_module("vit").ViT.from_pretrained(out / "best.pt")
        self.close(vit.features(x), z, 1e-5)
        self.close(load(out / "features.pt")["test_z"], z, 1e-5)
        self.assertLessEqual({"knn", "linear_random_init", "knn_pixels"}, {*log[-1]})
        decays = [g["weight_decay"] for g in last["optimizer"]["param_groups"]]
        self.assertEqual(decays, [0.04, 0.0])
        init = "--init", out / "ckpt.pt", "--val", 0, "--lr", 0, "--out", self.dir / "b"
        run("ijepa", *flags, *init)
        model = load(self.dir / "b/ckpt.pt")["model"]
        self.same(*({k: w for k, w in m.items() if k[0] != "t"} for m in (model, last["model"])))
        self.assertFalse((self.dir / "b/best.pt").exists())
        self.assertEqual([rows(d)[-1]["step"] for d in (out, self.dir / "b")], [12, 16])

    def test_refusals(self):
        flags = [*self.tiny, "--out", self.dir / "out", "--epochs", 0.5]
        run("ijepa", *flags)
        self.assertRegex(refused("ijepa", *flags, "--resume", "--depth", 2), "another --depth")
        self.assertRegex(refused("ijepa", *flags, "--resume"), "is at step 3")
        self.assertRegex(refused("ijepa", *flags, "--lr", 1e30), r"loss is (nan|inf) at step [12]$")

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
