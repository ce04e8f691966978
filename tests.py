"""Tests of every script, one class each, with the standard library's unittest alone.

    python tests.py                      all of them
    python tests.py TestGPT2             one script's
    python tests.py TestGPT2.test_cache  one test; pytest runs them too

Each test compares a script with something that shares no code with it: torch's own modules, a slow
loop in fp64 from the paper's equation, a closed form, a second run. Scripts run in this process
through main(argv). Tests that need GPT-2's vocabulary skip where tiktoken can't have it.
"""

import ast
import contextlib
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
import tarfile
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

# the others' tests are in .ci/old_tests.py
SCRIPTS = ["flash_attn", "gpt2", "puzzles", "resnet", "vit"]
TRAIN = dict(puzzles=["train"])  # what comes before the flags of a run
SHORT = dict(  # flags that make an otherwise default run take seconds
    gpt2=["--steps", 3, "--sample_tokens", 8],
    puzzles=["--steps", 3],
    flash_attn=["--steps", 3, "--block_size", 64],
    resnet=["--epochs", 0.5, "--batch_size", 32],
    vit=["--epochs", 0.5, "--batch_size", 32],
)
VISION = ["resnet", "vit"]


class TestHouse(Case):
    def setUp(self):
        super().setUp()
        for script in VISION:
            patch = small_shapes(script)
            patch.__enter__()
            self.addCleanup(patch.__exit__, None, None, None)

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
        elsewhere = "shakespeare|cifar|^gpt2|^resnet|^deit|^my|^out/(mae|tuned)|--bench|--compile"
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
        examples = [dict(prompt="Q", response="A"), dict(instruction="Q", output="A")] * 5
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


def slow_conv(x, w, stride=1, groups=1, bias=None):
    """A convolution that keeps the size, as a sum over its filters' positions, group by group."""
    k, parts = w.size(-1), []
    H, W = ((n - 1) // stride + 1 for n in x.shape[2:])
    x = F.pad(x, [k // 2] * 4)
    for x_g, w_g in zip(x.chunk(groups, 1), w.chunk(groups), strict=True):
        y = 0
        for i, j in itertools.product(range(k), range(k)):
            seen = x_g[:, :, i : i + stride * H : stride, j : j + stride * W : stride]
            y = y + torch.einsum("bchw,oc->bohw", seen[:, :, :H, :W], w_g[:, :, i, j])
        parts.append(y)
    return torch.cat(parts, 1) + (0 if bias is None else bias.view(-1, 1, 1))


def slow_norm(x, w, name, dims=(0, 2, 3), eps=1e-5):
    """Batch norm in training; over the channels alone, layer norm."""
    x = x - x.mean(dims, keepdim=True)
    x = x / (x.square().mean(dims, keepdim=True) + eps).sqrt()
    return x * w[f"{name}.weight"].view(-1, 1, 1) + w[f"{name}.bias"].view(-1, 1, 1)


def slow_block(kind, w, x, stride, groups, shortcut):
    """Any of the blocks, from its equations and its parameters w by name."""

    def conv(x, name, stride=1, groups=1):
        return slow_conv(x, w[f"{name}.weight"], stride, groups, w.get(f"{name}.bias"))

    def silu(x):
        return x / (1 + (-x).exp())

    around = y = slow_norm(x, w, "bn1").relu() if kind == "PreActBlock" else x
    if shortcut == "same":
        around = x
    elif shortcut in ("plain", "none"):
        around = 0
    elif shortcut == "A":
        around = F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 4, 4))
    elif kind != "ConvNeXtBlock":
        around = conv(around, "downsample.0", stride)
        around = slow_norm(around, w, "downsample.1") if shortcut == "B" else around
    if kind == "BasicBlock":
        y = slow_norm(conv(y, "conv1", stride), w, "bn1").relu()
        return (around + slow_norm(conv(y, "conv2"), w, "bn2")).relu()
    if kind == "Bottleneck":
        y = slow_norm(conv(y, "conv1"), w, "bn1").relu()
        y = slow_norm(conv(y, "conv2", stride, groups), w, "bn2").relu()
        return (around + slow_norm(conv(y, "conv3"), w, "bn3")).relu()
    if kind == "PreActBlock":
        return around + conv(slow_norm(conv(y, "conv1", stride), w, "bn2").relu(), "conv2")
    if kind == "MBConv":
        if "expand.0.weight" in w:
            y = silu(slow_norm(conv(x, "expand.0"), w, "expand.1"))
        y = silu(slow_norm(conv(y, "depthwise.0", stride, y.size(1)), w, "depthwise.1"))
        scale = conv(silu(conv(y.mean((2, 3), keepdim=True), "excite.1")), "excite.3")
        return around + slow_norm(conv(y / (1 + (-scale).exp()), "project.0"), w, "project.1")
    if "downsample.0.weight" in w:
        x = slow_norm(x, w, "downsample.0", 1, 1e-6)
        squares = x.unfold(2, stride, stride).unfold(3, stride, stride)  # (B, C, H, W, s, s)
        x = torch.einsum("bchwij,ocij->bohw", squares, w["downsample.1.weight"])
        x = x + w["downsample.1.bias"].view(-1, 1, 1)
    y = slow_norm(conv(x, "branch.0", 1, x.size(1)), w, "branch.1", 1, 1e-6)
    y = conv(y, "branch.2")
    return x + w["gamma"].view(-1, 1, 1) * conv(
        y / 2 * (1 + torch.erf(y / 2**0.5)), "branch.4"
    )


def torchvision_shapes(convs, expansion, depths):
    """Names and shapes of torchvision's state dicts; convs(C_in, width): a block's (C, C_in, k)."""
    shapes, norms, C = {"conv1.weight": (64, 3, 7, 7)}, [("bn1", 64)], 64
    for i, j in ((i, j) for i, depth in enumerate(depths) for j in range(depth)):
        name, out = f"layer{i + 1}.{j}", expansion * 64 * 2**i
        for k, (a, b, size) in enumerate(convs(C, 64 * 2**i), 1):
            shapes[f"{name}.conv{k}.weight"] = (a, b, size, size)
            norms.append((f"{name}.bn{k}", a))
        if j == 0 and (C != out or i > 0):
            shapes[f"{name}.downsample.0.weight"] = (out, C, 1, 1)
            norms.append((f"{name}.downsample.1", out))
        C = out
    for name, width in norms:
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{part}"] = (width,)
        shapes[f"{name}.num_batches_tracked"] = ()
    return {**shapes, "fc.weight": (1000, C), "fc.bias": (1000,)}


class TestResNet(Case):
    @classmethod
    def setUpClass(cls):
        import resnet

        cls.resnet = resnet

    def setUp(self):
        super().setUp()
        patch = small_shapes("resnet")
        patch.__enter__()
        self.addCleanup(patch.__exit__, None, None, None)
        self.out = self.dir / "out"
        self.tiny = ["--batch_size", 16, "--eval_every", 5, "--log_every", 3, "--warmup", 2]
        self.tiny += ["--epochs", 1, "--dtype", "float32", "--device", "cpu"]
        self.fast = ["--arch", "fast", "--batch_size", 32, "--epochs", 1, "--eval_every", 2]
        self.fast += ["--log_every", 1, "--dtype", "float32", "--device", "cpu"]

    def randomise(self, module):
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, p in module.named_parameters():
                p.copy_(torch.randn(p.shape, generator=g) * 0.3 + ("gamma" in name))
        return module.double()

    def test_blocks(self):
        """Output and gradients of every block with each kind of shortcut, against slow ones."""
        r, partial = self.resnet, functools.partial
        for make, kind, shortcuts, groups in (
            (r.BasicBlock, "BasicBlock", ("A", "B", "same", "plain"), 1),
            (r.Bottleneck, "Bottleneck", ("A", "B", "same"), 1),
            (partial(r.Bottleneck, ratio=0.5, groups=2), "Bottleneck", ("B", "same"), 2),
            (r.PreActBlock, "PreActBlock", ("conv", "same", "plain"), 1),
            (r.MBConv, "MBConv", ("none", "same"), 1),
            (partial(r.MBConv, ratio=1, size=5), "MBConv", ("none", "same"), 1),
            (r.ConvNeXtBlock, "ConvNeXtBlock", ("convnext", "same"), 1),
        ):
            for shortcut in shortcuts:
                C_in, stride = (16, 1) if shortcut == "same" else (8, 2)
                norm = r.NORMS["layer" if kind == "ConvNeXtBlock" else "batch"]
                around = r.make_shortcut(shortcut, C_in, 16, stride, norm)
                block = self.randomise(make(C_in, 16, stride, norm, around))
                w = {
                    k: p.detach().clone().requires_grad_()
                    for k, p in block.named_parameters()
                }
                x = torch.randn(3, C_in, 6, 6).double().requires_grad_()
                with self.subTest(kind=kind, shortcut=shortcut, groups=groups):
                    want, got = slow_block(kind, w, x, stride, groups, shortcut), block(x)
                    self.close(got, want, 1e-11)
                    seed = torch.randn(want.shape).double()
                    want = torch.autograd.grad((want * seed).sum(), [x, *w.values()])
                    got = torch.autograd.grad((got * seed).sum(), [x, *block.parameters()])
                    for name, a, b in zip(["x", *w], got, want, strict=True):
                        self.assertLess(
                            (a - b).abs().max(), 1e-10 * (1 + b.abs().max()), name
                        )

    def test_sizes(self):
        """Parameters as published, torchvision's names and shapes; ConvNeXt-T's and B0's blocks."""
        r = self.resnet
        sizes = dict(
            resnet18=11689512, resnet34=21797672, resnet50=25557032, resnet101=44549160
        )
        sizes |= dict(resnet152=60192808, resnext50_32x4d=25028904, wide_resnet50_2=68883240)
        self.assertEqual(list(sizes), list(r.OFFICIAL))
        sizes |= dict(resnet20=269722, resnet32=464154, resnet56=853018, resnet110=1727962)
        sizes |= {"wrn28-10": 36479194, "wrn16-8": 10961370}

        def count(*modules):
            return sum(p.numel() for module in modules for p in module.parameters())

        def basic(C, width):
            return (width, C, 3), (width, width, 3)

        def bottleneck(C, width, groups=1, wider=1):
            n = width * wider
            return (n, C, 1), (n, n // groups, 3), (4 * width, n, 1)

        grouped = functools.partial(bottleneck, groups=32, wider=2)
        with torch.device("meta"):
            for name, size in sizes.items():
                model = r.ARCHS[name](num_classes=1000 if name in r.OFFICIAL else 10)
                self.assertEqual(count(model), size, name)
            for model, shapes in (
                (r.resnet18(), torchvision_shapes(basic, 1, (2, 2, 2, 2))),
                (r.resnet152(), torchvision_shapes(bottleneck, 4, (3, 8, 36, 3))),
                (r.resnext50_32x4d(), torchvision_shapes(grouped, 4, (3, 4, 6, 3))),
            ):
                self.assertEqual({k: t.shape for k, t in model.state_dict().items()}, shapes)
            stages = zip(
                [r.ConvNeXtBlock] * 4,
                (96, 192, 384, 768),
                (3, 3, 9, 3),
                (1, 2, 2, 2),
                strict=True,
            )
            model = r.ResNet(
                [*stages], 1000, stem_width=96, shortcut="convnext", norm="layer"
            )
            blocks = count(model.layer1, model.layer2, model.layer3, model.layer4)
            self.assertEqual(
                blocks + 48 * 96 + 96 + 2 * 96 + 2 * 768 + count(model.fc), 28589128
            )
            model = r.efficientnet_b0()
            blocks = count(model) - count(model.conv1, model.bn1, model.fc)
            stem, head = 27 * 32 + 2 * 32, 320 * 1280 + 2 * 1280 + 1280 * 1000 + 1000
            self.assertEqual(blocks + stem + head, 5288548)

    def test_stems(self):
        """What stands before the blocks and after them, of each kind of network."""
        r, x = self.resnet, torch.randn(4, 3, 12, 12).double()
        for make in (r.cifar_resnet, r.wrn, r.convnext, r.imagenet_resnet):
            args = {"wrn": (10, 1), "cifar_resnet": (8,), "convnext": ()}.get(make.__name__)
            args = (
                (r.BasicBlock, 1, (1, 1, 1, 1), 10, "imagenet", 8) if args is None else args
            )
            model = make(*args)
            w = model.conv1.weight  # Kaiming: C_out times the filter's size
            self.assertAlmostEqual(
                w.std() * (len(w) * w[0, 0].numel() / 2) ** 0.5, 1, delta=0.1
            )
            self.randomise(model)
            kind, w = make.__name__, dict(model.named_parameters())
            y = slow_conv(x, w["conv1.weight"], 2 if kind == "imagenet_resnet" else 1)
            if kind == "convnext":
                y = slow_norm(y, w, "bn1", 1, 1e-6)
            elif kind != "wrn":
                y = slow_norm(y, w, "bn1").relu()
            if kind == "imagenet_resnet":  # after a ReLU 0 is as good as -inf
                y = F.pad(y, [1] * 4).unfold(2, 3, 2).unfold(3, 3, 2).amax((-1, -2))
            for name, layer in model.named_children():
                y = layer(y) if name.startswith("layer") else y
            if kind == "convnext":
                y = slow_norm(y, w, "bn_last", 1, 1e-6)
            elif kind == "wrn":
                y = slow_norm(y, w, "bn_last").relu()
            want = y.mean((2, 3)) @ w["fc.weight"].T + w["fc.bias"]
            self.close(model(x), want, 1e-10, kind)

    def test_fast(self):
        """A forward pass by hand; filters that whiten patches; who trains what."""
        r, model = self.resnet, self.resnet.FastNet()
        x = r.normalise(r.make_shapes.original(640, 0)[0], model.stats)
        model.whiten(x, eps=1e-12)
        with torch.no_grad():
            y = model.conv1(x) - model.conv1.bias.view(-1, 1, 1)
        y = y.transpose(0, 1).flatten(1).double()  # (24, n)
        self.assertLess((y[:12] @ y[:12].T / y.size(1) - torch.eye(12)).abs().max(), 2e-3)
        self.same(model.conv1.weight[12:], -model.conv1.weight[:12])
        self.assertEqual(model.groups[0].weight[5, 5, 1, 1].item(), 1)
        self.randomise(model)
        w, x = dict(model.named_parameters()), x[:4].double()
        patches = x.unfold(2, 2, 1).unfold(3, 2, 1)
        y = torch.einsum("bchwij,ocij->bohw", patches, w["conv1.weight"])
        y = F.gelu(y + w["conv1.bias"].view(-1, 1, 1))
        for k in (0, 7, 14):
            y = slow_conv(y, w[f"groups.{k}.weight"])
            y = y.unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2))
            y = F.gelu(slow_norm(y, w, f"groups.{k + 2}"))
            y = slow_conv(y, w[f"groups.{k + 4}.weight"])
            y = F.gelu(slow_norm(y, w, f"groups.{k + 5}"))
        self.close(model(x), y.amax((2, 3)) / 256 @ w["fc.weight"].T, 1e-10)
        muon, sgd = r.sgd_or_muon(model, r.Config(arch="fast", lr=0.2))
        names = {p: name for name, p in w.items()}
        filters, vectors, head = (
            {names[p] for p in group["params"]}
            for group in muon.param_groups + sgd.param_groups
        )
        self.assertEqual(filters, {f"groups.{k}.weight" for k in (0, 4, 7, 11, 14, 18)})
        biases = {f"groups.{k}.bias" for k in (2, 5, 9, 12, 16, 19)}
        self.assertEqual((vectors, head), (biases | {"conv1.bias"}, {"fc.weight"}))
        for group, rate in zip(sgd.param_groups, (0.053, 0.67), strict=True):  # [11]: a sum
            self.assertAlmostEqual(group["peak"], 2000 * rate)
            self.assertAlmostEqual(group["peak"] * group["weight_decay"], 2e-6 * 2000)

    def test_decay(self):
        """SGD decays weights alone, and every parameter is in one group."""
        model = self.resnet.convnext()
        [sgd] = self.resnet.sgd_or_muon(model, self.resnet.Config(lr=0.3, weight_decay=0.01))
        groups = {p: group for group in sgd.param_groups for p in group["params"]}
        self.assertEqual(len(groups), len([*model.parameters()]))
        for name, p in model.named_parameters():
            decays = name.endswith("weight") and p.dim() > 1
            self.assertEqual(groups[p]["weight_decay"], 0.01 if decays else 0, name)
            self.assertEqual((groups[p]["peak"], groups[p]["nesterov"]), (0.3, True))

    def test_muon(self):
        """Filters of mean length 1, then a step whose singular values met the polynomial."""
        w = nn.Parameter(torch.randn(8, 3, 3, 3))
        want, m = w.detach().double().view(8, 27), torch.zeros(8, 27).double()
        optimizer = self.resnet.FilterMuon([w], lr=0.3, momentum=0.6)
        for _ in range(3):
            w.grad = torch.randn(8, 3, 3, 3)
            g = w.grad.double().view(8, 27)
            m = 0.6 * m + g
            U, S, V = torch.linalg.svd(g + 0.6 * m, full_matrices=False)
            S = S / S.square().sum().sqrt()
            for _ in range(3):
                S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
            want = want / want.square().sum(1).mean().sqrt() - 0.3 * U @ torch.diag(S) @ V
            optimizer.step()
            self.close(w.view(8, 27), want, 1e-5)

    def test_weights(self):
        """Files of ours and others, under any wrapper; a fresh head where classes differ."""
        r, path = self.resnet, self.dir / "w.pt"
        model = r.resnet18(width=8)
        state, x = model.state_dict(), torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            want = model.eval()(x)
        for wrapped in (
            state,
            dict(state_dict={f"module.{k}": v for k, v in state.items()}),
            dict(model={f"module._orig_mod.{k}": v for k, v in state.items()}, epoch=3),
            dict(model=state, args=r.argparse.Namespace(lr=0.1)),
            dict(model={"projector.weight": x}, encoder=state, config=dict(loss="simclr")),
        ):
            torch.save(wrapped, path)
            with torch.no_grad():
                self.same(r.from_pretrained(path, arch="resnet18").eval()(x), want)
            fresh = r.from_pretrained(path, 10, arch="resnet18")
            self.assertEqual(fresh.fc.weight.shape, (10, 64))
            self.same(fresh.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])
        torch.save({k: v for k, v in state.items() if not k.startswith("fc.")}, path)
        self.assertEqual(r.from_pretrained(path, arch="resnet18").fc.out_features, 10)
        self.assertRaisesRegex(AssertionError, "arch", r.from_pretrained, path)
        torch.save({**state, "layer4.9.conv1.weight": x}, path)
        with self.assertRaisesRegex(RuntimeError, "layer4.9.conv1"):
            r.from_pretrained(path, arch="resnet18")
        state = r.resnet18().state_dict()
        with mock.patch("torch.hub.load_state_dict_from_url", return_value=state) as get:
            self.same(r.from_pretrained("resnet18").fc.bias, state["fc.bias"])
            self.assertEqual(r.from_pretrained("resnet18", 10).stats, r.IMAGENET_STATS)
        self.assertTrue(get.call_args.args[0].endswith("org/models/resnet18-f37072fd.pth"))
        self.assertTrue(get.call_args.kwargs["check_hash"])
        run("resnet", "--out", self.dir / "a", *self.tiny, "--plain")
        best = self.dir / "a" / "best.pt"
        run("resnet", "--out", self.dir / "b", *self.tiny, "--init", best, "--freeze")
        before, after = load(best)["model"], load(self.dir / "b" / "best.pt")
        for name, value in after["model"].items():  # statistics too
            self.assertEqual(
                torch.equal(value, before[name]), not name.startswith("fc."), name
            )
        found = r.from_pretrained(
            self.dir / "b" / "best.pt"
        )  # a checkpoint knows what it holds
        self.same([found.config["plain"], after["config"]["arch"]], [True, "resnet20"])
        run("resnet", "--out", self.out, *self.fast)
        self.assertIsInstance(r.from_pretrained(self.out / "best.pt"), r.FastNet)

    def test_cifar10(self):
        """Labels and pixels where the format has them, of the archive if its hash is right; what
        isn't CIFAR-10 is refused by name; the last training images validate."""
        r, data = self.resnet, self.dir / "data"
        records = np.random.default_rng(0).integers(0, 256, (60000, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        source = self.dir / "cifar-10-batches-bin"
        source.mkdir()
        names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
        for name, part in zip(names, np.split(records, 6), strict=True):
            (source / name).write_bytes(part.tobytes())
        archive = self.dir / "a.tar.gz"
        with tarfile.open(archive, "w:gz", compresslevel=0) as tar:
            tar.add(source, source.name)
        right = hashlib.sha256(archive.read_bytes()).hexdigest()
        with contextlib.redirect_stderr(io.StringIO()):
            with mock.patch.multiple(r, CIFAR10=archive.as_uri(), CIFAR10_SHA256="0" * 64):
                self.assertRaisesRegex(RuntimeError, "invalid hash", r.load_cifar10, data)
            self.assertEqual(list(data.iterdir()), [])
            with mock.patch.multiple(r, CIFAR10=archive.as_uri(), CIFAR10_SHA256=right):
                x, y, test_x, test_y = r.load_cifar10(data)
        self.assertEqual((x.shape, test_x.shape), ((50000, 3, 32, 32), (10000, 3, 32, 32)))
        self.assertEqual([*y, *test_y], records[:, 0].tolist())
        for n, channel, row, column in ((0, 0, 0, 0), (12345, 1, 5, 31), (49999, 2, 31, 7)):
            pixel = records[n, 1 + 1024 * channel + 32 * row + column]
            self.assertEqual(x[n, channel, row, column], pixel)
        self.assertEqual(test_x[7, 2, 3, 4], records[50007, 1 + 2048 + 96 + 4])
        for val in (5000, 0):
            train, held, _ = r.load_images(
                r.Config(data="cifar10", data_dir=str(data), val=val)
            )
            self.assertEqual((len(train[0]), len(held[0])), (50000 - val, val))
            self.same(torch.cat((train[1], held[1])), y)
        path, label = data / source.name / names[3], records[30000:40000].copy()
        label[7, 0] = 10
        for content in (path.read_bytes()[:-3073], label.tobytes()):
            path.write_bytes(content)
            flags = ["--data", "cifar10", "--data_dir", data, "--out", self.out]
            self.assertIn(names[3], refused("resnet", *flags))

    def test_shapes(self):
        """Drawn from the seed; a linear classifier can't tell the classes apart."""
        draw = self.resnet.make_shapes.original
        (x, y), (test_x, test_y) = draw(3000, 1), draw(1000, 3)
        self.assertEqual(
            (x.shape, x.dtype, y.dtype), ((3000, 3, 32, 32), torch.uint8, torch.int64)
        )
        self.assertGreater(torch.bincount(y, minlength=10).min(), 200)
        self.same(list(draw(50, 5)), list(draw(50, 5)))
        self.assertFalse(torch.equal(draw(50, 5)[0], draw(50, 6)[0]))
        a, b = (t.flatten(1) / 255 - 0.5 for t in (x, test_x))
        target = F.one_hot(y, 10).float() - 0.1
        weights = torch.linalg.solve(a.T @ a + 1000 * torch.eye(3072), a.T @ target)
        self.assertLess(((b @ weights).argmax(1) == test_y).float().mean(), 0.35)

    def test_augment(self):
        """Against np.pad, a crop and a flip, image by image, at every shift."""
        images = torch.randint(0, 256, (5, 3, 6, 5), dtype=torch.uint8)
        shifts = [*itertools.product(range(-4, 5), range(-4, 5), (False, True))]
        index = torch.arange(len(shifts)) * 3 % 5
        dy, dx, mirror = (torch.tensor(column) for column in zip(*shifts, strict=True))
        got = self.resnet.augment(images, index, dy, dx, mirror)
        for n, (down, right, flip) in enumerate(shifts):
            padded = np.pad(
                images[index[n]].numpy(), ((0, 0), (4, 4), (4, 4)), mode="reflect"
            )
            want = padded[:, 4 + down : 10 + down, 4 + right : 9 + right]
            self.assertTrue(
                np.array_equal(got[n].numpy(), want[:, :, ::-1] if flip else want)
            )

    def test_batches(self):
        """Functions of seed and step; an epoch has each image once; how far they go."""
        ramp = torch.arange(32)
        images = torch.stack(
            torch.broadcast_tensors(ramp, ramp[:, None], torch.zeros(48, 32, 32)), 1
        )

        def batch(step, **more):
            c = self.resnet.Config(**{"batch_size": 16, "crop": 3, **more})
            x, y = self.resnet.training_batch(c, images.byte(), torch.arange(48), step)
            x, mirror = x.int(), x[:, 0, 16, 16].int() > x[:, 0, 16, 17].int()
            dx = torch.where(mirror, 15 - x[:, 0, 16, 16], x[:, 0, 16, 16] - 16)
            return (
                y.tolist(),
                mirror.tolist(),
                dx.abs().tolist(),
                (x[:, 1, 16, 16] - 16).tolist(),
            )

        self.assertEqual(batch(7), batch(7))
        for other in (batch(8), batch(7, seed=1)):
            self.assertTrue(all(a != b for a, b in zip(batch(7), other, strict=True)))
        epochs = [sum((batch(3 * e + s)[0] for s in range(3)), []) for e in range(2)]
        self.assertEqual([sorted(epoch) for epoch in epochs], [list(range(48))] * 2)
        self.assertNotEqual(*epochs)
        _, mirrors, dx, dy = (
            sum(column, []) for column in zip(*map(batch, range(120)), strict=True)
        )
        self.assertEqual(({*dx}, {*dy}), ({*range(4)}, {*range(-3, 4)}))
        self.assertAlmostEqual(np.mean(mirrors), 0.5, delta=0.06)
        turns = {}
        for step in range(9):  # three epochs
            y, mirror, *_ = batch(step, flip="alternate")
            for image, flipped in zip(y, mirror, strict=True):
                turns.setdefault(image, []).append(flipped)
        turns = {tuple(t) for t in turns.values()}
        self.assertEqual(turns, {(True, False, True), (False, True, False)})

    def test_evaluation(self):
        """Six views by index, 500 images at a time; loss and accuracy image by image."""
        r, weight = self.resnet, torch.randn(75, 4)

        class Model(nn.Module):
            stats = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)

            def forward(self, x):
                return torch.tanh(x.flatten(1) @ weight / 8)

        images, model = torch.randint(0, 256, (501, 3, 5, 5), dtype=torch.uint8), Model()
        mean, std = (torch.tensor(s).view(3, 1, 1) for s in Model.stats)
        x, want = (images / 255 - mean) / std, 0
        for shift, share in ((0, 1 / 4), (1, 1 / 8), (-1, 1 / 8)):
            index = [4 - abs(4 - abs(i + shift)) for i in range(5)]
            view = x[:, :, index][:, :, :, index]
            want = want + share * (model(view) + model(view.flip(3)))
        c, autocast = r.Config(), torch.autocast("cpu", enabled=False)
        six = functools.partial(r.six_views, model)
        self.close(r.predict(model, images, c, autocast, six), want, 1e-5)
        logits, labels = r.predict(model, images, c, autocast), torch.arange(501) % 4
        self.close(logits, model(x), 1e-5)
        rows_ = [*zip(logits.double(), labels.tolist(), strict=True)]
        loss, accuracy = r.score(logits, labels)
        self.assertAlmostEqual(
            loss, np.mean([-z.softmax(0)[y].log().item() for z, y in rows_]), 5
        )
        self.assertAlmostEqual(
            accuracy, np.mean([z.argmax().item() == y for z, y in rows_]), 6
        )
        stripes = (
            torch.arange(672) % 3 == 0
        ).float() * 255  # mean 1/3; without antialias 0 or 1
        thin = r.normalise(stripes.expand(1, 3, 672, 672), ((0,) * 3, (1,) * 3), 224)
        self.assertLess((thin[..., 2:-2] - 1 / 3).abs().max(), 0.1)

    def test_run(self):
        """It learns; the schedule; what a run leaves behind is of the best weights."""
        flags = ["--save_logits", self.dir / "l.npy", "--epochs", 8, "--lr", 0.2]
        run("resnet", "--out", self.out, *self.tiny, *flags, "--eval_every", 16)
        log, best = rows(self.out), load(self.out / "best.pt")
        losses = [row["loss"] for row in log if "loss" in row]
        self.assertLess(np.mean(losses[-5:]), np.mean(losses[:5]) - 0.2)
        for row in (row for row in log if "lr" in row):
            cosine = 0.1 * (1 + math.cos(math.pi * (row["step"] - 3) / 94))  # 96 steps
            self.assertAlmostEqual(
                row["lr"], cosine if row["step"] > 2 else 0.2 * row["step"] / 3
            )
            self.assertAlmostEqual(row["pflop"], 6e-15 * 40551040 * 16 * row["step"])
        scores = [row["val_accuracy"] for row in log if "val_accuracy" in row]
        self.assertEqual(
            (best["best"], best["step"]), (max(scores), 16 * (1 + np.argmax(scores)))
        )
        model = self.resnet.from_pretrained(self.out / "best.pt").eval()
        (x, y), (val_x, _), (test_x, test_y) = self.resnet.load_images(self.resnet.Config())
        features = load(self.out / "features.pt")
        self.assertEqual(list(features), ["name", "train_z", "train_y", "test_z", "test_y"])
        self.same([features["train_y"], features["test_y"]], [y, test_y])
        with torch.no_grad():
            z = model.features(self.resnet.normalise(test_x, model.stats))
            images = self.resnet.normalise(torch.cat((x, val_x)), model.stats)
            pair = torch.stack((model(images), model(images.flip(3))), 1)
            self.close(torch.tensor(np.load(self.dir / "l.npy")), pair, 1e-4)
            self.close(features["test_z"], z, 1e-4)
            accuracy = (model.fc(z).argmax(1) == test_y).float().mean().item()
        self.assertAlmostEqual(log[-1]["test_accuracy"], accuracy, places=6)

    def test_resume(self):
        self.resumes("resnet", "training_batch", 8, *self.tiny, "--norm", "layer")
        shutil.rmtree(self.dir / "whole")
        shutil.rmtree(self.dir / "parts")
        self.resumes("resnet", "training_batch", 4, *self.fast)

    def test_fast_run(self):
        """--arch fast brings its own defaults, which flags override; the rate falls on a line. With
        --val 0 nothing is best."""
        with mock.patch.object(self.resnet, "train") as train:
            run("resnet", "--arch", "fast", "--crop", 3)
        c = train.call_args.args[0]
        self.assertEqual((c.lr, c.batch_size, c.crop, c.flip), (0.24, 2000, 3, "alternate"))
        self.out.mkdir()
        (self.out / "best.pt").write_text("an older run's")
        run("resnet", "--out", self.out, *self.fast, "--val", 0)
        log = rows(self.out)
        self.assertFalse((self.out / "best.pt").exists() or any("val_loss" in r for r in log))
        rates = [row["lr"] for row in log if "lr" in row]
        for rate, want in zip(rates, np.linspace(0.24, 0, len(rates) + 1)[:-1], strict=True):
            self.assertAlmostEqual(rate, want)

    def test_refused(self):
        run("resnet", "--out", self.out, *self.tiny, "--epochs", 0.2)
        again = ["--out", self.out, *self.tiny, "--resume"]
        split = self.resnet.make_shapes(60, 0)
        for flags, words in (
            (["--data", "cifar10"], "--data shapes"),
            (["--plain"], "--plain False"),
            (["--arch", "wrn22-1"], "--arch resnet20"),
            (["--epochs", 0.1], "is at step 3"),
        ):
            with mock.patch.object(self.resnet, "load_images", lambda c: [split] * 3):
                self.assertIn(words, refused("resnet", *again, *flags))
        flags = ["--out", self.out, *self.tiny]
        self.assertRegex(refused("resnet", *flags, "--lr", 1e30), "loss is .* at step")
        self.assertIn(
            "nowhere.pt", refused("resnet", *flags, "--init", self.dir / "nowhere.pt")
        )
        self.assertRaisesRegex(AssertionError, "21", self.resnet.cifar_resnet, 21)
        says = refused("resnet", *flags, "--arch", "convnext", "--plain")
        self.assertIn("--arch convnext has shortcuts", says)

    def test_pictures(self):
        """Figure 6 trains four networks; the landscape's centre is the checkpoint's own loss."""
        try:
            import matplotlib

            matplotlib.use("Agg")
        except ImportError:
            self.skipTest("no matplotlib")
        r, path = self.resnet, self.out / "best.pt"
        run("resnet", "--out", self.out, *self.tiny, "--epochs", 0.3)
        log = (self.out / "log.jsonl").read_text()
        trained = []

        def train(c):
            trained.append((c.arch, c.plain, c.out[-8:]))
            Path(c.out).mkdir()
            (Path(c.out) / "log.jsonl").write_text(log)

        with mock.patch.object(r, "train", train):
            run("resnet", "--figure6", "--out", self.out)
        self.assertEqual(
            trained[1:3], [("resnet56", True, "/plain56"), ("resnet20", False, "resnet20")]
        )
        x, y = (t[:256] for t in r.load_images(r.Config())[0])
        autocast = torch.autocast("cpu", enabled=False)
        loss, _ = r.score(r.predict(r.from_pretrained(path), x, r.Config(), autocast), y)
        with mock.patch.object(r.landscape.__wrapped__, "__defaults__", (3,)):
            printed = run("resnet", "--landscape", path, "--dtype", "float32")
        self.assertIn(f"loss {loss:.3g} in the centre", printed)
        for name in ("figure6.png", "landscape.png"):
            self.assertGreater((self.out / name).stat().st_size, 10000)


# --------------------------------------------------------------------------------------------------
# vit.py


def torch_vit(model):
    """The same network with torch's own Transformer, in fp64, and its parameters by our names."""
    twin = type(model)(**model.config).double().eval()
    twin.load_state_dict(model.state_dict())
    dim, depth, heads = (model.config[name] for name in ("dim", "depth", "heads"))
    layer = nn.TransformerEncoderLayer(
        dim, heads, 4 * dim, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True
    )
    theirs = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False).double()
    w = dict(twin.named_parameters())
    for ours in twin.blocks.state_dict():
        name = ours.replace("attn.proj", "self_attn.out_proj").replace("mlp.fc", "linear")
        name = name.replace("attn.qkv.", "self_attn.in_proj_")
        p = theirs.get_parameter(f"layers.{name}")
        p.data.copy_(w[f"blocks.{ours}"])
        w[f"blocks.{ours}"] = p

    def forward(x):
        x = twin.patch_embed.proj(x.double()).flatten(2).mT
        if "cls_token" in w:
            x = torch.cat((w["cls_token"].repeat(len(x), 1, 1), x), 1)
        x = F.layer_norm(theirs(x + w["pos_embed"]), [dim], w["norm.weight"], w["norm.bias"], 1e-6)
        return (x[:, 0] if "cls_token" in w else x.mean(1)) @ w["head.weight"].T + w["head.bias"]

    return forward, w


def torchvision_names(state, fc1, fc2):
    """timm's names changed to torchvision's, in one of its two spellings."""
    pairs = (
        ("blocks.", "encoder.layers.encoder_layer_"),
        ("pos_embed", "encoder.pos_embedding"),
        ("cls_token", "class_token"),
        ("patch_embed.proj", "conv_proj"),
        (".norm", ".ln_"),
        ("head.", "heads.head."),
        ("attn.qkv.", "self_attention.in_proj_"),
        ("attn.proj", "self_attention.out_proj"),
        ("mlp.fc1", f"mlp.{fc1}"),
        ("mlp.fc2", f"mlp.{fc2}"),
        ("norm.", "encoder.ln."),
    )
    for ours, theirs in pairs:
        state = {k.replace(ours, theirs): t for k, t in state.items()}
    return state


def slow_warp(x, row, column):
    """What x (3, H, W) holds at a point, in -1 to 1, between pixels and reflected at its border."""
    weights = torch.ones(1)
    for p, n in ((row, x.size(1)), (column, x.size(2))):
        p = ((p + 1) * n / 2) % (2 * n)
        p = min(max(min(p, 2 * n - p) - 0.5, 0), n - 1)
        near = (1 - (torch.arange(n) - p).abs()).clamp(min=0)  # bilinear
        weights = weights[..., None] * near
    return (x * weights[0]).sum((1, 2))


def slow_distort(x, kind, s):
    """One image (3, H, W), fp64."""
    _, H, W = x.shape
    grey, a = x[0] * 0.299 + x[1] * 0.587 + x[2] * 0.114, abs(s)
    sin, cos = math.sin(0.5 * s), math.cos(0.5 * s)
    flat, padded = x.flatten(1), F.pad(x[None], [1] * 4, mode="replicate")[0]
    near = sum(padded[:, i : i + H, j : j + W] for i in range(3) for j in range(3))
    low, high = flat.amin(1)[:, None, None], flat.amax(1)[:, None, None]
    darker = (flat[:, None] < flat[:, :, None]).sum(2).view_as(x)
    bases = dict(
        brightness=0 * x,
        saturation=grey.expand(3, H, W),
        sharpness=(near + 4 * x) / 13,
        contrast=grey.mean().expand(3, H, W),
    )
    full = dict(
        equalize=darker / darker.amax((1, 2), True).clamp(min=1),
        autocontrast=(x - low) / (high - low).clamp(min=1),
    )
    if kind in bases:
        x = x + (0.9 * s) * (x - bases[kind])
    elif kind in full:
        x = torch.where(high > low, x + a * (255 * full[kind] - x), x)
    elif kind == "solarize":
        x = torch.where(x >= 256 * (1 - a), 255 - x, x)
    elif kind == "posterize":
        x = x - x % 2 ** round(4 * a)
    else:
        old, x = x, x.clone()
        for i, j in itertools.product(range(H), range(W)):
            v, u = (2 * i + 1) / H - 1, (2 * j + 1) / W - 1
            points = dict(
                shear_x=(v, u + 0.3 * s * v),
                shear_y=(v + 0.3 * s * u, u),
                move_x=(v, u + 0.6 * s),
                move_y=(v + 0.6 * s, u),
                rotate=(sin * u + cos * v, cos * u - sin * v),
            )
            x[:, i, j] = slow_warp(old, *points[kind])
    return x.clamp(0, 255)


class TestViT(Case):
    def setUp(self):
        super().setUp()
        self.vit = importlib.import_module("vit")
        draw = self.vit.make_shapes  # fewer: 200 images to train on, 20 to validate, 40 to test
        self.vit.make_shapes = lambda n, seed: draw(n // 50, seed)
        self.addCleanup(setattr, self.vit, "make_shapes", draw)
        self.tiny = [
            "--dim",
            16,
            "--depth",
            2,
            "--heads",
            2,
            "--batch_size",
            32,
            "--epochs",
            1.5,
            "--eval_every",
            3,
            "--log_every",
            2,
            "--warmup",
            2,
            "--dtype",
            "float32",
            "--device",
            "cpu",
        ]

    def model(self, size=12, patch=4, dim=24, depth=2, heads=3, **more):
        """A small model whose weights are large enough for every term to matter."""
        model = self.vit.ViT(size, patch, dim, depth, heads, 5, **more).eval()
        for name, p in model.state_dict().items():
            if p.is_floating_point() and (name != "pos_embed" or more.get("pos") != "sincos"):
                positive = "norm" in name and "weight" in name or "running_var" in name
                p.copy_(positive + 0.2 * torch.randn(p.shape).clamp(-3, 3))
        return model

    def test_equations(self):
        """Logits and gradients are torch's: pools, positions, stem, both ways of attention."""
        for how in (
            dict(),
            dict(pool="mean"),
            dict(pool="mean", pos="sincos"),
            dict(pos="sincos"),
            dict(conv_stem=True),
            dict(conv_stem=True, pool="mean", patch=2),
            dict(heads=1),
            dict(size=34, patch=2, dim=8, heads=2),
        ):
            with self.subTest(**how):
                model, y = self.model(**how), torch.tensor([0, 4, 2])
                theirs, w = torch_vit(model)
                x = torch.randn(3, 3, model.image_size, model.image_size)
                logits, slow = model(x), theirs(x)
                self.close(logits, slow, 2e-5)
                F.cross_entropy(logits, y).backward()
                F.cross_entropy(slow, y).backward()
                for k, p in model.named_parameters():
                    if p.requires_grad:
                        self.close(p.grad, w[k].grad, 2e-4, k)
                self.assertEqual(model.pos_embed.requires_grad, how.get("pos") != "sincos")

    def test_embeddings(self):
        """A thin image's patches; the stem; sincos; positions resized channel by channel."""
        embed, x = self.vit.PatchEmbed(4, 10), torch.randn(2, 3, 4, 20)
        self.close(embed(x), embed.proj(x).flatten(2).mT, 1e-5)
        stem = self.vit.ConvStem(8, 64).proj
        shapes = [(*m.weight.shape[::2], *m.stride) for m in stem[::3]]
        self.assertEqual(shapes, [(8, 3, 2, 2), (16, 3, 2, 2), (32, 3, 2, 2), (64, 1, 1, 1)])
        self.assertEqual([type(m) for m in stem[1:3]], [nn.BatchNorm2d, nn.ReLU])
        table = self.vit.sincos_2d(24, 5)
        for y, x, i in itertools.product(range(5), range(5), range(6)):
            angles = [p * 10000 ** (-i / 6) for p in (x, x, y, y)]
            want = [f(a) for f, a in zip([math.sin, math.cos] * 2, angles, strict=True)]
            self.close(table[5 * y + x, i::6], want, 1e-6)
        for prefix, grid in itertools.product((0, 1), (3, 6, 9)):
            table = torch.randn(1, prefix + 36, 3)
            got = self.vit.resize_positions(table, grid, prefix)
            square = table[:, prefix:].mT.reshape(1, 3, 6, 6)
            want = F.interpolate(square, (grid, grid), mode="bicubic", align_corners=False)
            self.close(got, torch.cat((table[:, :prefix], want.flatten(2).mT), 1), 1e-6)

    def test_sizes(self):
        """Published numbers of parameters; timm's names; initial weights; sizes that don't fit."""
        for dim, depth, patch, size, heads in (
            (192, 12, 16, 5717416, 3),
            (768, 12, 16, 86567656, 12),
            (1024, 24, 32, 306535400, 16),
            (1280, 32, 14, 632045800, 16),
        ):
            with torch.device("meta"):
                model = self.vit.ViT(224, patch, dim, depth, 0, 1000)
            self.assertEqual(sum(p.numel() for p in model.parameters()), size)
            self.assertEqual({b.attn.heads for b in model.blocks}, {heads})
        block = {"norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
        self.assertEqual({k.rpartition(".")[0] for k in model.blocks[7].state_dict()}, block)
        self.assertEqual(model.stats, self.vit.IMAGENET_STATS)
        model = self.vit.ViT(32, 4, 192, 1, 0, 10)
        x = torch.arange(333).expand(1, 3, 333, 333) % 2 * 255  # stripes: grey, when they are small
        self.assertLess(self.vit.normalise(x, ([0.5] * 3, [1] * 3), 32).std().item(), 0.05)
        for part in model.blocks[0].attn.qkv.weight.chunk(3):  # Xavier's
            self.assertAlmostEqual(part.abs().max().item(), (6 / 384) ** 0.5, delta=0.001)
        self.assertEqual(model(torch.randn(2, 3, 32, 32)).abs().max().item(), 0)
        for wrong in (dict(heads=5), dict(dim=18, pos="sincos"), dict(patch=6, conv_stem=True)):
            self.assertRaises(AssertionError, self.model, **wrong)
        self.assertRaisesRegex(AssertionError, "16", self.model(), torch.zeros(1, 3, 9, 16))

    def test_from_pretrained(self):
        """One network in many wrappings: torchvision's, DDP's, MAE's with its decoder, I-JEPA's."""
        x, full, path = torch.randn(2, 3, 12, 12), self.model(dim=128, heads=2), self.dir / "x.pt"
        bare = dict(full.state_dict())
        headless = {k: t for k, t in bare.items() if "head" not in k}
        decoder = "mask_token", "decoder_pos_embed", "decoder_blocks.0.norm1.weight"
        mae = headless | dict.fromkeys(decoder, torch.ones(8))
        ddp, jepa = ({f"module.{k}": t for k, t in w.items()} for w in (bare, headless))
        for saved in (
            bare,
            dict(model=bare),
            dict(state_dict=ddp, epoch=3),
            dict(model=mae),
            torchvision_names(bare, "linear_1", "linear_2"),
            torchvision_names(bare, "0", "3"),
            dict(target_encoder=jepa, predictor={}),
            dict(model=mae, encoder=headless, config=dict(heads=4), encoder_config={}),
        ):
            torch.save(saved, path)
            model = self.vit.ViT.from_pretrained(path).eval()
            if len(model.head.bias) == 10:  # a new one, since the file has none
                model.head = full.head
            for block in full.blocks:
                block.attn.heads = 4 if "config" in saved else 2  # a checkpoint's own, or 128 / 64
            self.close(model(x), full(x), 1e-5)
            other = self.vit.ViT.from_pretrained(path, heads=8, num_classes=3, image_size=20)
            self.assertEqual((other.blocks[1].attn.heads, other.head.out_features), (8, 3))
            self.same(other.pos_embed.data, self.vit.resize_positions(bare["pos_embed"], 5, 1))
        urls = [
            "https://dl.fbaipublicfiles.com/deit/deit_tiny_patch16_224-a1311bcf.pth",
            "https://download.pytorch.org/models/vit_b_16-c867db91.pth",
        ]
        saved = dict(model=bare)
        with mock.patch.object(torch.hub, "load_state_dict_from_url", return_value=saved) as fetch:
            for name in ("deit_tiny_patch16_224", "vit_b_16"):
                self.same(dict(self.vit.ViT.from_pretrained(name).state_dict()), bare)
        self.assertEqual([call.args[0] for call in fetch.call_args_list], urls)
        self.assertTrue(fetch.call_args.kwargs["check_hash"])

    def test_trivial_augment(self):
        """All 13 against slow_distort, each image in its own way; one in 14 stays."""
        kinds, s = np.arange(14).repeat(6), np.tile([-1.0, -0.6, -0.1, 0.3, 0.65, 1.0], 14)
        x = torch.randint(0, 256, (84, 3, 5, 6)).float()
        x[::2, 2], x[::2, 1] = 77, 80 + x[::2, 1] % 2  # channels of one and of two values
        before = x.clone()
        rng = mock.Mock(uniform=lambda *_: s, integers=lambda n, size: kinds if n == 14 else None)
        y = self.vit.trivial_augment(x, rng)
        self.same(x, before)
        self.same(y[78:], x[78:])
        for n in range(78):
            name = self.vit.DISTORTIONS[kinds[n]]
            want = slow_distort(x[n].double(), name, s[n].item())
            self.close(y[n], want, 1e-5, f"{name} {s[n]}")

    def test_mix(self):
        """Image i with B - 1 - i: mixup's share of each, cutmix's square; what is own is exact."""
        x = torch.arange(1.0, 7)[:, None, None, None].expand(6, 3, 16, 16)
        rng, many = np.random.default_rng(0), torch.zeros(4000, 3, 16, 16)
        y, own = self.vit.mix(x, "mixup", 0.8, rng)
        self.close(y[:, 2, 5, 7], own * x[:, 0, 0, 0] + (1 - own) * x.flip(0)[:, 0, 0, 0], 1e-6)
        y, own = self.vit.mix(x, "cutmix", 1.0, rng)
        cut = y[:, 0] == x.flip(0)[:, 0]
        self.assertTrue((cut | (y == x)[:, 0]).all())
        self.close(1 - cut.float().mean((1, 2)), own, 1e-6)
        self.same(cut, cut.any(2)[:, :, None] & cut.any(1)[:, None])  # rectangles
        centred = mock.Mock(beta=rng.beta, random=mock.Mock(side_effect=lambda n: np.full(n, 0.5)))
        self.assertAlmostEqual(self.vit.mix(many, "cutmix", 1.0, centred)[1].mean().item(), 0.5, 1)
        centred.random.assert_called_once_with((4000, 2, 1))

    def batch(self, step=0, teacher=None, **more):
        x = torch.arange(7680).view(40, 3, 8, 8).remainder(251).byte()
        x[:, 0] = torch.arange(40)[:, None, None]  # an image's number
        c = self.vit.Config(**{"batch_size": 8, "crop": 0, **more})
        return x, *self.vit.draw_batch(c, x, torch.arange(40) % 10, teacher, step)

    def test_batches(self):
        """An epoch has each image once, with its label and teacher's answer, mixed as it is."""
        seen, teacher = [], torch.arange(80.0).view(40, 2, 1).repeat(1, 1, 10)
        for step in range(6):
            x, y, targets, hints = self.batch(step, teacher)
            index, mirrored = y[:, 0, 0, 0].long(), hints[:, 0] % 2 == 1
            seen += index.tolist()
            self.same(targets, F.one_hot(index % 10, 10).float())
            self.same(hints[:, 0] // 2, index.float())
            want = torch.where(mirrored[:, None, None, None], x[index].flip(3), x[index])
            self.same(y, want.float())
        self.assertEqual(sorted(seen[:40]), [*range(40)])
        self.assertNotEqual(seen[:8], seen[40:])
        teacher = torch.rand(40, 1, 10).repeat(1, 2, 1)
        _, x, labels, plain = self.batch(teacher=teacher)
        for how in (dict(mixup=0.8), dict(cutmix=0.8), dict(mixup=0.8, cutmix=0.8)):
            _, y, targets, hints = self.batch(teacher=teacher, **how)
            own = ((y - x.flip(0)) / (x - x.flip(0)))[:, 0].mean((1, 2))[:, None]
            self.close(targets, own * labels + (1 - own) * labels.flip(0), 1e-5)
            self.close(hints, own * plain + (1 - own) * plain.flip(0), 1e-5)

    def test_objective(self):
        """Smoothed labels; half a teacher's cross-entropy, times T^2; a teacher's answers."""
        logits, hints = torch.randn(2, 6, 10).double()
        y, hints = F.one_hot(torch.arange(6), 10).double(), hints.softmax(1)
        log_p = logits.log_softmax(1)
        loss = -((0.9 * y + 0.01) * log_p).sum(1).mean()
        self.close(self.vit.objective(logits, y), loss, 1e-12)
        soft = 16 * -(hints * (logits / 4).log_softmax(1)).sum(1).mean()
        self.close(self.vit.objective(logits, y, hints, T=4.0), (loss + soft) / 2, 1e-12)
        hard = -(hints * log_p).sum(1).mean()
        self.close(self.vit.objective(logits, y, hints, T=0.0), (loss + hard) / 2, 1e-12)

    def test_adamw(self):
        """Every parameter once, with its layer's rate; only weights decay."""
        model = self.model()
        optimizer = self.vit.adamw(model, self.vit.Config(lr=1.0, layer_decay=0.5))
        found = {p: group for group in optimizer.param_groups for p in group["params"]}
        for name, p in model.named_parameters():
            layer = dict(norm=3, head=3, blocks=1 + ("s.1" in name)).get(name.split(".")[0], 0)
            vector = p.dim() == 1 or name in ("cls_token", "pos_embed")
            self.assertEqual(
                (found[p]["peak"], found[p]["weight_decay"]),
                (0.5 ** (3 - layer), 0.0 if vector else 0.05),
                name,
            )

    def test_update(self):
        """The gradient is clipped and applied once; the average follows, norm's statistics too."""
        c = self.vit.Config(warmup=0, ema=0.5, label_smoothing=0.0)
        model = self.model(size=32, patch=8, conv_stem=True, pool="mean")
        average, clone = (type(model)(**model.config) for _ in range(2))
        before = {k: t.clone() for k, t in model.state_dict().items()}
        average.load_state_dict(before)
        clone.load_state_dict(before)
        x, labels = torch.randint(0, 256, (8, 3, 32, 32)), torch.arange(8) % 5
        optimizer = torch.optim.SGD([dict(params=model.parameters(), peak=0.1)])
        batch = x, F.one_hot(labels, 5).float()
        got, _ = self.vit.update(
            c, model, model, average, optimizer, batch, 4, 10, contextlib.nullcontext()
        )
        loss = F.cross_entropy(clone.train()(self.vit.normalise(x, clone.stats)), labels)
        loss.backward()
        self.close(got, loss, 1e-5)
        self.assertGreater(nn.utils.clip_grad_norm_(clone.parameters(), 1.0).item(), 1.0)
        rate, decay = 0.05 * (1 + math.cos(math.pi * 0.4)), (4 + 1) / (4 + 10)
        for k, p in clone.named_parameters():
            self.close(model.state_dict()[k], before[k] - rate * p.grad, 1e-5, k)
            self.assertIsNone(model.get_parameter(k).grad)
        for k, t in model.state_dict().items():
            if t.is_floating_point():
                self.close(average.state_dict()[k], decay * before[k] + (1 - decay) * t, 1e-5, k)

    def test_drop_path(self):
        """Whole images lose a branch, others are scaled up; 1 gives zeros; deeper loses more."""
        block, x = self.vit.Block(24, 3, 0.3).train(), torch.randn(20000, 2, 3)
        y = block.drop_path(x)
        kept = (y != 0).all(2).all(1)
        self.assertAlmostEqual(kept.float().mean().item(), 0.7, delta=0.02)
        self.close(y, kept[:, None, None] * x / 0.7, 1e-6)
        self.same(block.eval().drop_path(x), x)
        block.train().rate = 1.0
        self.same(block.drop_path(x), torch.zeros_like(x))
        blocks = self.model(depth=5, drop_path=0.4).blocks
        self.close([b.rate for b in blocks], [0, 0.1, 0.2, 0.3, 0.4], 1e-6)

    def test_rollout(self):
        """Against torch's own attention weights; rows sum to 1."""
        model, x = self.model(), torch.randn(2, 3, 12, 12)
        got, y, identity = self.vit.rollout(model, x), model.tokens(x), torch.eye(10)
        total = identity
        for block in model.blocks:
            theirs = nn.MultiheadAttention(24, 3, batch_first=True)
            theirs.in_proj_weight, theirs.in_proj_bias = block.attn.qkv.parameters()
            weights = theirs(*[block.norm1(y)] * 3)[1]  # (B, N, N), the mean over heads
            total, y = 0.5 * (weights + identity) @ total, block(y)
        self.close(got, total, 1e-5)
        self.close(got.sum(2), torch.ones(2, 10), 1e-5)

    def test_resume(self):
        logits = np.random.default_rng(0).random((220, 2, 10), np.float32)
        np.save(self.dir / "logits.npy", logits)
        flags = [*self.tiny, "--teacher", self.dir / "logits.npy", "--temperature", 0]
        self.resumes(
            "vit",
            "draw_batch",
            6,
            *flags,
            "--trivial",
            "--mixup",
            0.8,
            "--cutmix",
            1,
            "--ema",
            0.9,
            "--drop_path",
            0.5,
            "--layer_decay",
            0.8,
        )
        a, b = (load(self.dir / out / "ckpt.pt") for out in ("whole", "parts"))
        self.same(a["ema"], b["ema"])
        with mock.patch.object(self.vit, "draw_batch", side_effect=KeyboardInterrupt) as draw:
            self.assertRaises(KeyboardInterrupt, run, "vit", *flags, "--out", self.dir / "x")
        self.same(draw.call_args.args[3], F.one_hot(torch.tensor(logits).argmax(2), 10).float())

    def test_run(self):
        """What a run leaves behind, and what starts from it; val 0."""
        out = self.dir / "out"
        run(
            "vit",
            *self.tiny,
            "--out",
            out,
            "--lr",
            0.01,
            "--epochs",
            4,
            "--pool",
            "cls",
            "--ema",
            0.5,
        )
        log, best, last = rows(out), load(out / "best.pt"), load(out / "ckpt.pt")
        scores = [row["val_accuracy"] for row in log if "val_accuracy" in row]
        self.assertEqual((len(scores), best["best"]), (8, max(scores)))
        self.assertTrue({"loss", "lr", "seconds", "images_per_s", "pflop"} <= {*log[0]})
        self.same(best["encoder"], {k: t for k, t in best["ema"].items() if "head" not in k})
        model = self.vit.ViT(**last["encoder_config"]).eval()
        for saved, n, seed, loss in (
            (last, 1000, 2, log[-2]["val_loss"]),
            (best, 2000, 3, log[-1]["test_loss"]),
        ):
            model.load_state_dict(saved["ema"])
            x, y = self.vit.make_shapes(n, seed)
            z = model.features(self.vit.normalise(x, model.stats))
            self.assertAlmostEqual(loss, F.cross_entropy(model.head(z), y).item(), 5)
        self.close(load(out / "features.pt")["test_z"], z, 1e-5)
        again = self.vit.ViT.from_pretrained(out / "best.pt")
        self.same(dict(again.state_dict()), dict(best["ema"]))
        run(
            "vit",
            *self.tiny,
            "--init",
            out / "best.pt",
            "--out",
            self.dir / "b",
            "--val",
            0,
            "--lr",
            0,
            "--image_size",
            40,
            "--epochs",
            0.2,
        )
        after = load(self.dir / "b/ckpt.pt")
        self.assertEqual([after["config"][k] for k in ("pool", "heads")], ["cls", 2])
        self.assertEqual(after["model"]["pos_embed"].shape, (1, 26, 16))
        self.assertFalse((self.dir / "b/best.pt").exists())

    def test_refusals(self):
        flags = [*self.tiny, "--out", self.dir / "out"]
        run("vit", *flags, "--epochs", 0.5)
        for name, value in dict(depth=3, pool="cls", lr=0.1, ema=0.9, image_size=40).items():
            line = refused("vit", *flags, "--resume", f"--{name}", value)
            self.assertRegex(line, f"made with --{name} ")
        self.assertRegex(refused("vit", *flags, "--resume", "--epochs", 0.1), "is at step 3")
        np.save(self.dir / "few.npy", np.zeros((3, 2, 10)))
        for wrong, says in (
            (["--patch_size", 5], "divide"),
            (["--init", "no.pt"], "no.pt"),
            (["--teacher", self.dir / "few.npy"], r"few.npy: .*3, 2, 10"),
            (["--resume", "--out", self.dir / "none"], "none/ckpt.pt"),
        ):
            self.assertRegex(refused("vit", *flags, *wrong), says)
        self.assertRegex(refused("vit", *flags, "--lr", 1e30), "loss is .* at step")

    def test_learns(self):
        run(
            "vit",
            *self.tiny,
            "--dim",
            64,
            "--epochs",
            30,
            "--lr",
            2e-3,
            "--eval_every",
            999,
            "--log_every",
            20,
            "--batch_size",
            20,
            "--crop",
            0,
            "--out",
            self.dir / "out",
        )
        last = [row["train_accuracy"] for row in rows(self.dir / "out")[-8:-2]]
        self.assertGreater(np.mean(last), 0.5)


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
