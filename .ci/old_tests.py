"""Tests of the scripts that are not rewritten yet: python .ci/old_tests.py [TestViT ...]"""

import ast
import collections
import colorsys
import contextlib
import copy
import dataclasses
import difflib
import errno
import functools
import hashlib
import http.server
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import pty
import re
import select
import shlex
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import unittest
import xml.etree.ElementTree
import zlib
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

HERE = Path(__file__).resolve().parent.parent
ALL = ("ijepa", "mae", "simclr")
SCRIPTS = [name for name in ALL if (HERE / f"{name}.py").exists()]
SHORT = {"mae": ["--labels", 0.02, "--batch_size", 16, "--patch_size", 8, "--dim", 32, "--probe_images", 100],
         "ijepa": ["--labels", 0.02, "--batch_size", 16, "--patch_size", 8, "--dim", 48, "--probe_images", 100,
                   "--tsne_images", 100],
         "simclr": ["--labels", 0.01, "--batch_size", 16, "--width", 8, "--head_dim", 16, "--probe_images", 100,
                    "--eval_every", 3]}
sys.path.insert(0, str(HERE))


source = functools.cache(inspect.getsource)  # parsers ask for Config's, 80 ms each time, in a hundred runs


def run(script, *argv):
    """(status, stdout, stderr) of a script's main(argv) in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch("inspect.getsource", source):
        status = importlib.import_module(script).main([str(a) for a in argv])
    return status, out.getvalue(), err.getvalue()


def child(*command, timeout=300, **more):
    """A command's CompletedProcess, with one thread as in this process, so that results agree bit for bit."""
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=f"{HERE}{os.pathsep}{HERE / '.ci'}",
               PYTHONDONTWRITEBYTECODE="1")
    with tempfile.TemporaryDirectory() as env["TMPDIR"]:  # torchrun leaves folders behind
        return subprocess.run([sys.executable, *map(str, command)], env=env, capture_output=True, text=True,
                              timeout=timeout, **more)


@contextlib.contextmanager
def folder(path):
    """Work in a folder; contextlib.chdir is younger than Python 3.10."""
    old = os.getcwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(old)


def snapshot(path):
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in sorted(Path(path).rglob("*"))}


class Case(unittest.TestCase):
    def setUp(self):
        self.dir = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.dir, ignore_errors=True)

    def close(self, a, b, tolerance, message=None):
        """|a - b| is at most tolerance times b's largest value."""
        a, b = (torch.as_tensor(t).detach().double() for t in (a, b))
        self.assertEqual(a.shape, b.shape, message)
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
            for i, pair in enumerate(zip(a, b)):
                self.same(*pair, f"{where}[{i}]")
        else:
            self.assertEqual(a, b, where)


# --------------------------------------------------------------------------------------------------------------------
# the house: what holds for every script


class TestHouse(Case):
    def test_imports(self):
        """No script imports another; at module level only the standard library and the four packages."""
        allowed = {*sys.stdlib_module_names, "torch", "numpy", "tiktoken", "requests"}

        def imports(node, inside=False):
            for part in ast.iter_child_nodes(node):
                if isinstance(part, ast.Import):
                    yield from ((alias.name, inside) for alias in part.names)
                elif isinstance(part, ast.ImportFrom):
                    yield "." * part.level + (part.module or ""), inside
                else:
                    yield from imports(part, inside or isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)))

        for script in SCRIPTS:
            for name, inside in imports(ast.parse((HERE / f"{script}.py").read_text())):
                with self.subTest(script=script, name=name):
                    self.assertNotIn(name.split(".")[0], (*ALL, "tests", ""), "imports another script")
                    self.assertTrue(inside or name.split(".")[0] in allowed, "not one of the four packages")

    def test_copies(self):
        """The same top-level name has the same source, to the letter, in every script that has it."""
        seen = {}
        for script in SCRIPTS:
            lines = (HERE / f"{script}.py").read_text().splitlines()
            for node in ast.parse("\n".join(lines)).body if script != "puzzles" else ():
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in (
                        "Config", "train", "evaluate", "main"):
                    start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                    source = lines[start - 1:node.end_lineno]
                    other, first = seen.setdefault(node.name, (script, source))
                    with self.subTest(name=node.name):
                        self.assertTrue(source == first, "\n".join(["", *difflib.unified_diff(
                            first, source, f"{other}.py", f"{script}.py", lineterm="")]))

    def test_metadata(self):
        """Each script begins with inline metadata (PEP 723), so that uv runs it with nothing installed."""
        for script in SCRIPTS:
            with self.subTest(script=script):
                block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n\"\"\"", (HERE / f"{script}.py").read_text())
                self.assertTrue(block, "no '# /// script' block before the docstring")
                wanted = re.search(r"# dependencies = (\[.*\])", block[1])[1]
                self.assertLessEqual(set(json.loads(wanted)), {"torch", "numpy", "tiktoken", "requests"})

    def test_help(self):
        """--help: status 0, every field of Config with its comment and its default."""
        for script in SCRIPTS:
            with self.subTest(script=script):
                status, out, err = run(script, "--help")
                self.assertEqual((status, err), (0, ""))
                text, config = "".join(out.split()), getattr(importlib.import_module(script), "Config", None)
                self.assertTrue(config or script in ("flash_attn"))
                for field in dataclasses.fields(config) if config else ():
                    line = re.search(rf"^    {field.name}: .*?  # (.*)$", inspect.getsource(config), re.M)
                    self.assertTrue(line, f"{field.name} has no comment")
                    for part in (f"--{field.name}", line[1], str(field.default)):
                        self.assertTrue("".join(part.split()) in text, f"--help lacks {field.name}'s {part!r}")

    def test_default_run(self):
        """A few steps with otherwise default flags leave the contract's files, in the run's folder alone."""
        for script in SCRIPTS:
            with self.subTest(script=script), folder(self.dir):
                flags = ["--steps", 3, "--out", f"run/{script}", *SHORT.get(script, ())]
                status, out, err = run(script, *["train"] * (script == "puzzles"), *flags)
                self.assertEqual(status, 0, err)
                self.assertLessEqual({p.name for p in self.dir.iterdir()}, {"run", "data"})
                at = self.dir / "run" / script
                config = json.loads((at / "config.json").read_text())
                self.assertEqual(config["steps"], 3)
                rows = [json.loads(line) for line in (at / "log.jsonl").read_text().splitlines()]
                steps = [row for row in rows if "loss" in row and "final" not in row]
                self.assertTrue(steps)
                for row in steps:
                    self.assertLessEqual({"step", "loss", "lr", "ms", "seconds"}, set(row))
                    self.assertTrue({"tokens_per_s", "images_per_s"} & set(row))
                self.assertTrue([row for row in rows if "loss" not in row and "seconds" in row],
                                "no line of an evaluation")
                self.assertTrue(rows[-1]["final"] and rows[-1]["peak_mb"] > 0)
                self.assertEqual(sum("final" in row for row in rows), 1)
                xml.etree.ElementTree.parse(at / "curves.svg")
                for name in ("ckpt.pt", "best.pt"):
                    saved = torch.load(at / name, weights_only=True)
                    self.assertLessEqual({"model", "config", "step"}, set(saved))
                    self.assertEqual(type(saved["config"]), dict)
                    self.assertFalse([k for k in saved["model"] if k.startswith(("module.", "_orig_mod."))])
                last = torch.load(at / "ckpt.pt", weights_only=True)
                self.assertIn("optimizer", last)
                self.assertEqual((last["step"], last["config"]), (3, config))

    def test_last_row(self):
        """A disk that fills up, or memory that ends, while a run's last pictures are made does not lose its result."""
        for script, flags, what in (("ijepa", [], "neighbours_png"),
                                    ("simclr", [], "draw_neighbours")):
            with self.subTest(script=script), folder(self.dir):
                module = importlib.import_module(script)
                real = getattr(module, what)

                def fails(*args, **more):
                    if what == "predict" and more.get("views") != 2:  # the test's six come first
                        return real(*args, **more)
                    raise module.UserError("the disk is full", 1)

                flags = ["--steps", 2, "--out", script, *SHORT[script], *flags]
                with mock.patch.object(module, what, fails), mock.patch.object(module, "rankme", len, create=True):
                    status, _, err = run(script, *flags)  # rankme of pixels takes long
                self.assertEqual((status, err), (1, f"{script}.py: the disk is full\n"))
                rows = [json.loads(line) for line in (Path(script) / "log.jsonl").read_text().splitlines()]
                self.assertTrue(rows[-1].get("final") and any(key.startswith("test_") for key in rows[-1]), rows[-1])

    def test_out_of_memory(self):
        """One line and status 1; a compiler that fails too; other errors of torch are not hidden."""
        said = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried\nto"
        no_compiler = torch._dynamo.exc.TorchDynamoException("No working C++ compiler found\nin PATH")
        for script in SCRIPTS:
            if script != "puzzles":
                module = importlib.import_module(script)
                for error, says in ((RuntimeError(said), "out of memory"), (MemoryError(), "out of memory"),
                                    (no_compiler, "--compile failed")):
                    with self.subTest(script=script, error=error), mock.patch.object(module, "train",
                                                                                     side_effect=error):
                        status, _, err = run(script, *["--compile"] * (says[0] == "-"), "--out", self.dir)
                        self.assertEqual(status, 1)
                        self.assertRegex(err, rf"\A{script}\.py: {says}[^\n]+\n\Z")
                with mock.patch.object(module, "train", side_effect=RuntimeError("a bug")):
                    self.assertRaisesRegex(RuntimeError, "a bug", run, script, "--out", self.dir)

    def test_disk_gone(self):
        """On a disk that has become read-only, not even the temporary file can be removed: still one line."""
        gone = OSError(errno.EROFS, "Read-only file system")
        for script in SCRIPTS:
            module = importlib.import_module(script)
            with self.subTest(script=script), mock.patch("os.replace", side_effect=gone), mock.patch.object(
                    Path, "unlink", side_effect=gone):
                with self.assertRaisesRegex(module.UserError, "can't write .*Read-only"):
                    module.write_atomic(self.dir / "x", b"text")

    def test_round_ticks(self):
        """Round numbers, equally far apart, around what they are for, however near to one another that is."""
        import mae
        rng = np.random.default_rng(0)
        pairs = [(0, 0), (5, 5), (-3, -3), (0, 1800), (0.2672, 0.4031), (0, 1e-30), (1e20, np.nextafter(1e20, 1e21))]
        pairs += [sorted(rng.normal(size=2) * 10.0 ** rng.uniform(-9, 9)) for _ in range(500)]
        for low, high in pairs:
            ticks = mae.round_ticks(float(low), float(high))
            step = ticks[1] - ticks[0]
            self.assertTrue(2 <= len(ticks) <= 8 and step > 0, (low, high, ticks))
            self.assertTrue(np.allclose(np.diff(ticks), step, rtol=1e-6), ticks)
            self.assertTrue(ticks[0] <= low + 1e-9 * step and ticks[-1] >= high - 1e-9 * step, (low, high, ticks))
            self.assertIn(round(step / 10.0 ** math.floor(math.log10(step) + 1e-9), 6), (1, 2, 5), ticks)

    def test_import_does_nothing(self):
        """Importing prints nothing, writes nothing, and leaves random states, threads and signal handlers alone."""
        code = """if True:
            import random, signal, sys, warnings, numpy, requests, tiktoken, torch
            def state():
                return [random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),
                        sys.path, torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
                        signal.getsignal(signal.SIGINT), torch.get_float32_matmul_precision(), warnings.filters]
            before = [list(x) if isinstance(x, list) else x for x in state()]
            import """ + ", ".join(SCRIPTS) + """
            assert state() == before"""
        done = child("-c", code, cwd=self.dir)
        self.assertEqual((done.returncode, done.stdout, done.stderr, snapshot(self.dir)), (0, "", "", {}))

    def test_outside(self):
        """A fresh clone stands alone: nothing names a folder beside it, but .ci/run."""
        for path in [*(HERE / f"{s}.py" for s in SCRIPTS), HERE / "tests.py", HERE / "README.md"]:
            self.assertNotIn(".." + "/shared", path.read_text() if path.exists() else "", path.name)

    def test_readme_comparison(self):
        """The table of what five ways of learning made of an encoder is that of compare.json."""
        readme = (HERE / "README.md").read_text()
        for line in BenchIJEPA().table():
            self.assertIn(line, readme)

    def test_readme_tables(self):
        """The tables about CIFAR-10 are what the logs say."""
        readme = (HERE / "README.md").read_text()
        for line in BenchSimCLR().table() + BenchMAE().table():
            self.assertIn(line, readme)

    def test_readme_files(self):
        """Pictures, logs and scripts that the README links to are there."""
        for path in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", (HERE / "README.md").read_text()):
            self.assertTrue((HERE / path).exists(), path)


class Server:
    """An HTTP server on 127.0.0.1. replies, one for each request and the last for all others: status, body, cut
    (bytes sent before it hangs up), ranges (whether it knows Range). asked: the requests' Range headers."""

    def __init__(self, test, *replies):
        self.asked = asked = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                reply = dict(dict(status=200, cut=None, ranges=True), **replies[min(len(asked), len(replies) - 1)])
                asked.append(self.headers.get("Range"))
                body, start, status = reply["body"], 0, reply["status"]
                if asked[-1] and reply["ranges"] and status == 200:
                    start = int(re.fullmatch(r"bytes=(\d+)-", asked[-1])[1])
                    status = 206 if start < len(body) else 416
                self.send_response(status)
                if status == 206:
                    self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
                if status == 416:
                    self.send_header("Content-Range", f"bytes */{len(body)}")
                    body, start = b"", 0
                self.send_header("Content-Length", str(len(body) - start))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(body[start:reply["cut"]])

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{server.server_port}/file"
        threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()
        test.addCleanup(server.server_close)
        test.addCleanup(server.shutdown)


# --------------------------------------------------------------------------------------------------------------------
# resnet.py


def slow_gelu(x):
    return x / 2 * (1 + torch.erf(x / 2**0.5))


def random_weights(shapes, seed=0):
    """Weights that keep the variance, norms' scales about 1, running variances from .5 to 1.5."""
    g, w = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        w[name] = torch.randn(shape, generator=g)
        if len(shape) > 1:
            w[name] *= (2 / math.prod(shape[1:])) ** 0.5
        elif name.endswith("running_var"):
            w[name] = torch.rand(shape, generator=g) + 0.5
        elif name.endswith("tracked"):
            w[name] = torch.tensor(0)
        else:
            w[name] = 0.2 * w[name] + name.endswith("weight")
    return w


@functools.cache
def drawn(draw, n, seed):
    return draw(n, seed)


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


# --------------------------------------------------------------------------------------------------------------------
# vit.py


def slow_patches(x, weight, bias):
    """A patch at a time, row by row: its pixels, red, green, blue, times each filter's. (B, N, C)."""
    P = weight.size(-1)
    corners = itertools.product(range(0, x.size(2), P), range(0, x.size(3), P))
    return torch.stack([x[:, :, i:i + P, j:j + P].flatten(1) @ weight.flatten(1).T + bias for i, j in corners], 1)


def slow_layer_norm(x, weight, bias):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias


def slow_encoder_block(x, heads, norm1, qkv, proj, norm2, fc1, fc2):
    """[1] eq. 2 and 3, a head at a time; each argument but x and heads is a weight and a bias."""
    D, ys = x.size(-1) // heads, []
    q, k, v = (slow_layer_norm(x, *norm1) @ qkv[0].T + qkv[1]).chunk(3, -1)
    for h in range(heads):
        at = slice(h * D, (h + 1) * D)
        scores = q[..., at] @ k[..., at].mT / D**0.5
        e = (scores - scores.amax(-1, keepdim=True)).exp()
        ys.append(e / e.sum(-1, keepdim=True) @ v[..., at])
    x = x + torch.cat(ys, -1) @ proj[0].T + proj[1]
    return x + slow_gelu(slow_layer_norm(x, *norm2) @ fc1[0].T + fc1[1]) @ fc2[0].T + fc2[1]


def random_vit(shapes, seed=0):
    """random_weights, with positions that matter."""
    w = random_weights(shapes, seed)
    return {k: t * (0.2 * t[0].numel()) ** 0.5 if "pos_embed" in k else t for k, t in w.items()}


def slow_png(path):
    """The pixels (H, W, 3) of a PNG, from the format's description; checksums are checked."""
    raw, data, at = Path(path).read_bytes(), b"", 8
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    kinds = []
    while at < len(raw):
        [size], kind = struct.unpack(">I", raw[at:at + 4]), raw[at + 4:at + 8]
        body, [check] = raw[at + 8:at + 8 + size], struct.unpack(">I", raw[at + 8 + size:at + 12 + size])
        assert zlib.crc32(kind + body) == check
        kinds.append(kind)
        if kind == b"IHDR":
            W, H, *rest = struct.unpack(">IIBBBBB", body)
            assert rest == [8, 2, 0, 0, 0]  # 8 bits, red, green, blue, no interlacing
        data += body if kind == b"IDAT" else b""
        at += 12 + size
    assert (kinds[0], kinds[-1]) == (b"IHDR", b"IEND")
    rows = np.frombuffer(zlib.decompress(data), np.uint8).reshape(H, 1 + 3 * W)
    assert (rows[:, 0] == 0).all()  # no filter
    return rows[:, 1:].reshape(H, W, 3)


def slow_patchify(x, P):
    """An image (3, S, S) as rows of numbers, a pixel after the other."""
    S = x.size(1)
    return torch.stack([torch.stack([x[c, i + p, j + q] for p in range(P) for q in range(P) for c in range(3)])
                        for i in range(0, S, P) for j in range(0, S, P)])


def slow_targets(x, P, normalised):
    """The same, each row less its mean, over its unbiased deviation, 1e-6 added to the variance."""
    rows = slow_patchify(x, P)
    if not normalised:
        return rows
    n = rows.size(1)
    means = [sum(row) / n for row in rows]
    return torch.stack([(row - m) / (sum((v - m) ** 2 for v in row) / (n - 1) + 1e-6) ** 0.5
                        for row, m in zip(rows, means)])


def slow_positions(dim, grid):
    """A patch at a time: sines and cosines of its column, then of its row."""
    table = []
    for y, x in itertools.product(range(grid), range(grid)):
        angles = [[p / 10000 ** (4 * i / dim) for i in range(dim // 4)] for p in (x, y)]
        table.append([f(a) for part in angles for f in (math.sin, math.cos) for a in part])
    return torch.tensor(table, dtype=torch.double)


def slow_mae(w, images, noise, ratio, heads, decoder_heads, normalised):
    """Loss, predictions and mask of a state dict in the official names: an image at a time, a gap at a time."""
    def pair(name):
        return w[f"{name}.weight"], w[f"{name}.bias"]

    def blocks(x, name, heads):
        n = 0
        while f"{name}.{n}.norm1.weight" in w:
            x = slow_encoder_block(x, heads, *(pair(f"{name}.{n}.{part}") for part in (
                "norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")))
            n += 1
        return x

    P, first, losses, preds, masks = w["patch_embed.proj.weight"].size(2), int("cls_token" in w), [], [], []
    for image, z in zip(images, noise.tolist()):
        order = sorted(range(len(z)), key=z.__getitem__)
        kept, removed = order[:int(len(z) * (1 - ratio))], order[int(len(z) * (1 - ratio)):]
        x = slow_patches(image[None], *pair("patch_embed.proj"))[0] + w["pos_embed"][0, first:]
        x = x[kept]
        if first:
            x = torch.cat((w["cls_token"][0] + w["pos_embed"][0, :1], x))
        x = slow_layer_norm(blocks(x[None], "blocks", heads)[0], *pair("norm"))
        x = x @ w["decoder_embed.weight"].T + w["decoder_embed.bias"]
        y = [w["mask_token"][0, 0]] * len(z)
        for i, patch in enumerate(kept):
            y[patch] = x[first + i]
        y = torch.stack([*x[:first], *y]) + w["decoder_pos_embed"][0]
        y = slow_layer_norm(blocks(y[None], "decoder_blocks", decoder_heads)[0], *pair("decoder_norm"))
        preds.append(y[first:] @ w["decoder_pred.weight"].T + w["decoder_pred.bias"])
        error = (preds[-1] - slow_targets(image, P, normalised)) ** 2
        losses += [error[i].sum() / error.size(1) for i in removed]
        masks.append([float(i in removed) for i in range(len(z))])
    return sum(losses) / len(losses), torch.stack(preds), torch.tensor(masks)


def official_mae_shapes(dim, depth, patch, image, decoder_dim=None, decoder_depth=0):
    """Names and shapes of the published state dicts; without decoder_dim those of the encoder alone."""
    tokens = 1 + (image // patch) ** 2
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, tokens, dim), "patch_embed.proj.bias": (dim,),
              "patch_embed.proj.weight": (dim, 3, patch, patch), "norm.weight": (dim,), "norm.bias": (dim,)}

    def blocks(name, C, n):
        for i, (part, *shape) in itertools.product(range(n), (("norm1", C), ("attn.qkv", 3 * C, C), ("norm2", C),
                                                              ("attn.proj", C, C), ("mlp.fc1", 4 * C, C),
                                                              ("mlp.fc2", C, 4 * C))):
            shapes.update({f"{name}.{i}.{part}.weight": tuple(shape), f"{name}.{i}.{part}.bias": (shape[0],)})

    blocks("blocks", dim, depth)
    if decoder_dim:
        D, out = decoder_dim, 3 * patch**2
        shapes |= {"mask_token": (1, 1, D), "decoder_pos_embed": (1, tokens, D), "decoder_embed.weight": (D, dim),
                   "decoder_embed.bias": (D,), "decoder_norm.weight": (D,), "decoder_norm.bias": (D,),
                   "decoder_pred.weight": (out, D), "decoder_pred.bias": (out,)}
        blocks("decoder_blocks", D, decoder_depth)
    return shapes


def slow_knn(train_z, train_y, test_z, test_y, k, temperature):
    right = 0
    for z, y in zip(test_z.tolist(), test_y.tolist()):
        scores, votes = [], collections.Counter()
        for other, label in zip(train_z.tolist(), train_y.tolist()):
            lengths = math.hypot(*z) * math.hypot(*other)
            scores.append((sum(a * b for a, b in zip(z, other)) / lengths, label))
        for cosine, label in sorted(scores, reverse=True)[:k]:
            votes[label] += math.exp(cosine / temperature)
        right += votes.most_common(1)[0][0] == y
    return right / len(test_y)


def slow_probe(train_z, train_y, val_z, val_y, test_z, test_y, rates, steps):
    """By torch's own modules, all training features in a batch; (validation, test) accuracy for each rate."""
    accuracies = []
    for rate in rates:
        norm = nn.BatchNorm1d(train_z.size(1), eps=1e-6, momentum=None, affine=False).double()
        layer = nn.Linear(train_z.size(1), int(train_y.max()) + 1).double()
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        optimizer = torch.optim.SGD(layer.parameters(), rate, momentum=0.9)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            F.cross_entropy(layer(norm(train_z)), train_y).backward()
            optimizer.step()
            optimizer.zero_grad()
        z = (train_z.mean(0), train_z.var(0, unbiased=False))
        accuracies.append([(layer((x - z[0]) / (z[1] + 1e-6).sqrt()).argmax(1) == y).double().mean().item()
                           for x, y in ((val_z, val_y), (test_z, test_y))])
    return accuracies


def small_mae():
    """A patch of mae.py for runs that take half a second: few images, and short probes."""
    import mae
    draw, few = mae.make_shapes, {10000: 240, 1000: 60, 2000: 60}
    return mock.patch.multiple(mae, make_shapes=lambda n, seed: drawn(draw, few.get(n, n), seed),
                               linear_probe=functools.partial(mae.linear_probe, epochs=1, at_least=4, rates=(0.1, 1)))


class TestMAE(Case):
    @classmethod
    def setUpClass(cls):
        import mae
        cls.mae, cls.draw, cls.probe = mae, staticmethod(mae.make_shapes), staticmethod(mae.linear_probe)
        cls.threads = torch.get_num_threads()
        torch.set_num_threads(1)

    @classmethod
    def tearDownClass(cls):
        torch.set_num_threads(cls.threads)
        drawn.cache_clear()

    def setUp(self):
        super().setUp()
        torch.manual_seed(0)
        patch = small_mae()
        patch.start()
        self.addCleanup(patch.stop)
        self.tiny = """--batch_size 16 --steps 12 --eval_every 6 --log_every 3 --warmup 2 --dtype float32 --dim 32
            --patch_size 8 --depth 2 --heads 2 --decoder_dim 16 --decoder_heads 2 --probe_images 80""".split()

    # helpers

    def train(self, name, *flags, tiny=True, status=0):
        """A small run into the folder name: its out, rows of the log, text, checkpoint."""
        out = self.dir / name
        got, text, err = run("mae", *(self.tiny if tiny else ()), "--out", out, *flags)
        self.assertEqual(got, status, err)
        return self.look(out, text, err)

    def look(self, out, text="", err=""):
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        return SimpleNamespace(out=out, rows=rows, text=text, err=err,
                               ckpt=torch.load(out / "ckpt.pt", weights_only=True),
                               losses={r["step"]: r["loss"] for r in rows if "loss" in r},
                               val={r["step"]: r["val_loss"] for r in rows if "val_loss" in r})

    def same_run(self, a, b):
        """The same parameters, optimiser, best probe, and rows of the log but for times, bit for bit."""
        for key in ("model", "optimizer", "step", "best", "encoder"):
            self.same(a.ckpt[key], b.ckpt[key], key)
        times = ("ms", "seconds", "images_per_s", "peak_mb")
        self.assertEqual(*([{k: v for k, v in row.items() if k not in times} for row in run.rows] for run in (a, b)))

    def bad(self, *flags, says=(), status=2):
        """Bad input: the status, one line on stderr that begins with the script's name, nothing on disk changes."""
        before = snapshot(self.dir)
        with self.subTest(flags=" ".join(map(str, flags))[-90:]), folder(self.dir):
            got, out, err = run("mae", *flags)
            self.assertEqual(got, status, err)
            self.assertRegex(err, r"\Amae\.py: [^\n]+\n\Z")
            for word in [says] if isinstance(says, str) else says:
                self.assertIn(str(word), err)
            self.assertNotIn("Traceback", out)
            self.assertEqual(sorted(snapshot(self.dir)), sorted(before), "files came or went")
            self.assertTrue(snapshot(self.dir) == before, "a file changed")

    def model(self, image_size=16, patch_size=4, dim=24, depth=2, heads=3, decoder_dim=16, decoder_depth=1,
              decoder_heads=2, seed=0, scale=1.0, **more):
        """A small MAE in fp64 with random weights, positions as they are; and copies of them, with gradients."""
        model = self.mae.MAE(image_size, patch_size, dim, depth, heads, decoder_dim, decoder_depth, decoder_heads,
                             **more).double()
        w = random_vit({k: tuple(t.shape) for k, t in model.state_dict().items()}, seed)
        w = {k: t if "pos_embed" in k else scale * w[k].double() for k, t in model.state_dict().items()}
        model.load_state_dict(w)
        return model, {k: t.clone().requires_grad_("pos_embed" not in k) for k, t in w.items()}

    def images(self, n, size=32, seed=0):
        g = torch.Generator().manual_seed(seed)
        return torch.randint(0, 256, (n, 3, size, size), generator=g, dtype=torch.uint8)

    def config(self, **more):
        return self.mae.Config(**{"batch_size": 8, "steps": 20, "warmup": 3, **more})

    # model

    def test_patchify(self):
        for S, P in ((12, 4), (6, 3), (5, 1), (8, 8)):
            x = torch.randn(2, 3, S, S).double()
            patches = self.mae.patchify(x, P)
            self.same(patches, torch.stack([slow_patchify(image, P) for image in x]))
            self.same(self.mae.unpatchify(patches, P), x)
            self.same(self.mae.patchify(x.contiguous(memory_format=torch.channels_last), P), patches)

    def test_positions(self):
        """Both tables are the loop's, the class token's row is 0, and they are kept but not trained."""
        for first in (0, 1):
            model = self.mae.MAE(20, 4, 24, 1, 3, 16, 1, 2, class_token=bool(first))
            for name, dim in (("pos_embed", 24), ("decoder_pos_embed", 16)):
                table = model.state_dict()[name]
                self.assertEqual(tuple(table.shape), (1, first + 25, dim))
                self.assertEqual(table[0, :first].abs().sum().item(), 0)
                self.close(table[0, first:], slow_positions(dim, 5), 1e-6)
                self.assertFalse(getattr(model, name).requires_grad)
        self.assertEqual("cls_token" in model.state_dict(), True)

    def test_masks(self):
        """Kept and removed patches partition each image at exactly the ratio; restoring undoes the shuffle."""
        for size, patch, ratio, kept in ((16, 4, 0.75, 4), (32, 4, 0.5, 32), (32, 4, 0.9, 6), (20, 4, 0.3, 17),
                                         (32, 4, 0.95, 3), (16, 4, 0.01, 15), (224, 16, 0.75, 49)):
            model = self.mae.MAE(size, patch, 8, 1, 2, 8, 1, 2, class_token=False)
            N, x = (size // patch) ** 2, torch.randn(3, 3, size, size)
            noise, tokens = torch.rand(3, N), model.tokens(x)
            with mock.patch.object(model, "encoder", lambda x: x):
                seen, mask, restore = model.encode(x, ratio, noise)
            self.assertEqual(seen.size(1), kept)
            self.assertEqual(mask.sum(dim=1).tolist(), [N - kept] * 3)
            self.assertEqual(set(mask.flatten().tolist()), {0.0, 1.0})
            for n in range(3):
                order = sorted(range(N), key=noise[n].tolist().__getitem__)
                self.same(seen[n], tokens[n, order[:kept]])  # these, in this order, with their positions
                self.assertEqual([i for i in range(N) if mask[n, i] == 0], sorted(order[:kept]))
                self.assertEqual([order[i] for i in restore[n]], list(range(N)))
            self.assertGreater(len({tuple(row) for row in mask.tolist()}), 1)  # each image has its own
            self.same(model(x, ratio, noise)[2], mask)
        with self.assertRaisesRegex(ValueError, "class token"):
            model.features(x, "cls")

    def test_equations(self):
        """Loss, predictions, mask and all gradients against a loop over images and patches in fp64."""
        kinds = itertools.product((True, False), (True, False), ((0.75, 1.0), (0.4, 3.0)))
        for normalised, class_token, (ratio, scale) in kinds:
            model, w = self.model(norm_pix_loss=normalised, class_token=class_token, scale=scale)
            x, noise = torch.randn(2, 3, 16, 16).double(), torch.rand(2, 16)
            loss, pred, mask = model(x, ratio, noise)
            want = slow_mae(w, x, noise, ratio, 3, 2, normalised)
            for got, wanted in zip((loss, pred, mask), want):
                self.close(got, wanted, 1e-9)
            loss.backward()
            want[0].backward()
            for name, p in model.named_parameters():
                if "pos_embed" not in name:
                    self.close(p.grad, w[name].grad, 1e-8, name)
            features = model.features(x, "cls") if class_token else model.features(x)
            z = slow_patches(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"]) + w["pos_embed"][
                :, int(class_token):]
            z = torch.cat((w["cls_token"].expand(2, -1, -1), z), 1) if class_token else z
            for n in range(2):
                z = slow_encoder_block(z, 3, *((w[f"blocks.{n}.{part}.weight"], w[f"blocks.{n}.{part}.bias"])
                                               for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1",
                                                            "mlp.fc2")))
            z = slow_layer_norm(z, w["norm.weight"], w["norm.bias"])
            self.close(features, z[:, 0] if class_token else sum(z.unbind(1)) / 16, 1e-9)
            if class_token:
                self.close(model.features(x, "mean"), sum(z[:, 1:].unbind(1)) / 16, 1e-9)

    def test_hidden(self):
        """The encoder cannot see removed patches: with other pixels there, its output is the same bit for bit."""
        for dtype in (torch.float32, torch.bfloat16):
            model = self.mae.MAE(32, 4, 32, 2, 2, 16, 1, 2)
            x, noise = torch.randn(4, 3, 32, 32), torch.rand(4, 64)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                seen, mask, _ = model.encode(x, 0.75, noise)
                hole = self.mae.unpatchify(mask[:, :, None].expand(-1, -1, 48).contiguous(), 4) == 1
                other = torch.where(hole, 9 * torch.randn(x.shape), x)
                self.same(model.encode(other, 0.75, noise)[0], seen)
                self.same(model(other, 0.75, noise)[1], model(x, 0.75, noise)[1])  # nor the decoder
                self.assertNotEqual(model(other, 0.75, noise)[0].item(), model(x, 0.75, noise)[0].item())
                other = torch.where(hole, x, x + 0.5)
                self.assertTrue(((model.encode(other, 0.75, noise)[0] - seen).abs().amax((1, 2)) > 0.01).all())

    def test_visible_ignored(self):
        """The loss is the removed patches' alone: whatever is predicted for the others."""
        model, _ = self.model()
        x, noise = torch.randn(2, 3, 16, 16).double(), torch.rand(2, 16)
        pred = torch.randn(2, 16, 48).double().requires_grad_()
        with mock.patch.object(model, "decode", lambda *_: pred):
            loss, _, mask = model(x, 0.75, noise)
            grad = torch.autograd.grad(loss, pred)[0]
            self.assertTrue((grad[mask == 0] == 0).all() and (grad[mask == 1] != 0).all())
            with torch.no_grad():
                pred[mask == 0] += 5
            self.same(model(x, 0.75, noise)[0], loss)

    def test_targets(self):
        """Normalised patches against a loop, one of a single value too; mean and deviation undo it."""
        x = torch.randn(2, 3, 16, 16).double()
        x[0, :, :4, :4] = 0.7
        for normalised in (True, False):
            model, _ = self.model(norm_pix_loss=normalised)
            target, mean, std = model.targets(x)
            self.close(target, torch.stack([slow_targets(image, 4, normalised) for image in x]), 1e-9)
            self.close(target * std + mean, self.mae.patchify(x, 4), 1e-12)

    def test_random_noise(self):
        """Without noise every patch is as likely to be removed, and each call's masks are new."""
        model = self.mae.MAE(16, 8, 8, 1, 2, 8, 1, 2)
        masks = model(torch.zeros(2000, 3, 16, 16), 0.5)[2]
        self.assertEqual(masks.sum(1).unique().tolist(), [2])
        self.assertLess((masks.mean(0) - 0.5).abs().max().item(), 0.05)
        self.assertEqual(len({tuple(m) for m in masks.tolist()}), 6)  # 2 of 4
        self.assertFalse(torch.equal(model(torch.zeros(2000, 3, 16, 16), 0.5)[2], masks))

    def test_mask_kinds(self):
        rng, grid, B = np.random.default_rng(0), 8, 200
        rows, columns = np.mgrid[:grid, :grid].reshape(2, -1)

        def removed(kind, ratio):
            noise = self.mae.mask_noise(kind, rng, B, grid)
            self.assertEqual((noise.shape, noise.dtype), ((B, 64), np.float32))
            return np.argsort(noise, axis=1)[:, int(64 * (1 - ratio)):]

        kept = np.zeros(64)
        for gone in removed("random", 0.75):
            kept[np.setdiff1d(np.arange(64), gone)] += 1
        self.assertLess(abs(kept / B - 0.25).max(), 0.15)
        first = collections.Counter()
        for gone in removed("grid", 0.75):  # of each 2 × 2 patches the same one stays
            left = np.setdiff1d(np.arange(64), gone)
            [kind] = {(r % 2, c % 2) for r, c in zip(rows[left], columns[left])}
            self.assertEqual(len({(r // 2, c // 2) for r, c in zip(rows[left], columns[left])}), 16)
            first[kind] += 1
        self.assertTrue(len(first) == 4 and min(first.values()) > B / 8, first)
        for gone in removed("grid", 0.5):
            self.assertEqual(len({(r % 2, c % 2) for r, c in zip(rows[gone], columns[gone])}), 2)
        tall, centres = 0, set()
        for gone in removed("block", 0.4):  # a rectangle without holes, its last row or column begun
            r, c = rows[gone], columns[gone]
            box = (np.ptp(r) + 1) * (np.ptp(c) + 1)
            self.assertLess(box - len(gone), max(np.ptp(r), np.ptp(c)) + 1)
            tall += np.ptp(r) > np.ptp(c)
            centres.add((int(r.mean()), int(c.mean())))
        self.assertTrue(B / 4 < tall < 3 * B / 4 and len(centres) > 8, (tall, centres))
        long = [0, 0]
        for gone in removed("block", 0.2):  # away from the borders: from square to three times as long as wide
            sides = sorted((np.ptp(rows[gone]) + 1, np.ptp(columns[gone]) + 1))
            if all(0 < t.min() and t.max() < 7 for t in (rows[gone], columns[gone])):
                long[0] += sides[1] >= 2 * sides[0]
                long[1] += sides[1] <= 1.5 * sides[0]
        self.assertGreater(min(long), 1)

    def test_wrong_sizes(self):
        for sizes in ((30, 4, 24, 1, 3, 16, 1, 2), (32, 4, 24, 1, 5, 16, 1, 2), (32, 4, 24, 1, 3, 16, 1, 3),
                      (32, 4, 18, 1, 3, 16, 1, 2)):
            with self.assertRaises(ValueError):
                self.mae.MAE(*sizes)
        model, x = self.mae.MAE(16, 8, 8, 1, 2, 8, 1, 2), torch.zeros(1, 3, 16, 16)
        for images, ratio in ((x, 0.9), (x, 0), (x, 1e-17), (x, -1), (torch.zeros(1, 3, 24, 24), 0.5)):
            with self.assertRaises(ValueError):
                model(images, ratio)

    def test_initial_weights(self):
        """Xavier's bound, q, k and v as one matrix and the patch projection flat; tokens of deviation .02."""
        model = self.mae.MAE(32, 4, 192, 1, 3, 128, 1, 4)
        w = model.state_dict()
        self.assertEqual(len(w), 38)
        for name, t in w.items():
            if name.endswith("_token"):
                self.assertTrue(0.015 < t.std().item() < 0.025, name)
            elif t.dim() > 1 and "pos_embed" not in name:
                rows, columns = t.flatten(1).shape
                bound = (6 / (rows + columns)) ** 0.5
                self.assertLessEqual(t.abs().max().item(), bound, name)
                self.assertGreater(t.abs().max().item(), 0.98 * bound, name)
                self.assertLess(abs(t.std().item() / bound * 3**0.5 - 1), 0.03, name)
            elif t.dim() == 1 and name != "patch_embed.proj.bias":
                self.assertEqual(t.unique().tolist(), [1.0 if "norm" in name and "weight" in name else 0.0], name)

    # official weights

    def pth(self, name, w, **more):
        torch.save({"model": w, **more}, self.dir / name)
        return self.dir / name

    def test_official_shapes(self):
        """A state dict of the published names and shapes loads strictly, and gives what a loop makes of it."""
        with torch.device("meta"):
            model = self.mae.MAE(224, 16, 768, 12, 12, 512, 8, 16)
        want = official_mae_shapes(768, 12, 16, 224, 512, 8)
        self.assertEqual({k: tuple(t.shape) for k, t in model.state_dict().items()}, want)
        w = random_vit(official_mae_shapes(128, 2, 8, 24, 64, 1))
        x, noise = torch.randn(2, 3, 24, 24), torch.rand(2, 9)
        for name, normalised in (("mae_visualize_small.pth", False), ("full.pth", True)):
            model = self.mae.MAE.from_pretrained(self.pth(name, w, epoch=3))
            self.assertEqual((model.fresh_decoder, model.norm_pix_loss), (False, normalised))
            got = model(x, 0.5, noise)
            want = slow_mae({k: t.double() for k, t in w.items()}, x.double(), noise, 0.5, 2, 2, normalised)
            for a, b in zip(got, want):
                self.close(a, b, 1e-5)
            self.same({k: model.state_dict()[k] for k in w}, w)
        encoder = {k: t for k, t in w.items() if not k.startswith(("decoder", "mask_token"))}
        model = self.mae.MAE.from_pretrained(self.pth("encoder.pth", encoder), decoder_dim=32, decoder_depth=2,
                                             decoder_heads=4)
        self.assertTrue(model.fresh_decoder)
        self.same({k: model.state_dict()[k] for k in encoder}, encoder)
        self.assertEqual(len(model.decoder_blocks), 2)

    def test_official_refused(self):
        """Anything missing but a whole decoder, or more, or of another shape; what is no state dict; code."""
        w, name = random_vit(official_mae_shapes(64, 1, 8, 24, 32, 1)), "mae_visualize.pth"
        for change in (lambda w: w.pop("norm.weight"), lambda w: w.pop("decoder_norm.bias"),
                       lambda w: w.pop("mask_token"), lambda w: w.pop("decoder_blocks.0.attn.qkv.bias"),
                       lambda w: w.update(more=torch.ones(1)), lambda w: w.update(pos_embed=torch.ones(1, 9, 64)),
                       lambda w: w.update({"norm.bias": torch.ones(65)}), lambda w: w.pop("cls_token")):
            wrong = dict(w)
            change(wrong)
            self.bad("--reconstruct", self.pth(name, wrong), "--out", self.dir / "o", says=name)
        marker = self.dir / "marker"
        for content in ({**w, "norm.bias": Evil(marker)}, [1, 2], {"a": 1}, {k: 1 for k in w},
                        random_weights({"conv1.weight": (4, 3, 3, 3)})):
            self.bad("--reconstruct", self.pth(name, content), "--out", self.dir / "o", says=name)
        (self.dir / name).write_bytes(self.pth("x", w).read_bytes()[:5000])
        self.bad("--reconstruct", self.dir / name, says=name)
        self.assertFalse(marker.exists())
        encoder = {k: t for k, t in w.items() if not k.startswith(("decoder", "mask_token"))}
        self.bad("--reconstruct", self.pth("e.pth", encoder), says=("e.pth", "decoder"))

    def test_official_download(self):
        """A name downloads the file from its publisher, unless its hash differs."""
        w, asked, get = random_vit(official_mae_shapes(64, 1, 16, 32)), [], self.mae.requests.get
        body = self.pth("x", w).read_bytes()
        server = Server(self, dict(body=body))

        def redirected(url, **how):
            asked.append(url)
            return get(server.url, **how)

        name, data = "mae_pretrain_vit_base", self.dir / "data"
        published = "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_base.pth"
        with mock.patch.object(self.mae.requests, "get", redirected), \
                contextlib.redirect_stderr(io.StringIO()) as err:
            with self.assertRaisesRegex(ValueError, "md5"):
                self.mae.MAE.from_pretrained(name, data)
            self.assertEqual([*data.iterdir()], [])
            mine = f"md5:{hashlib.md5(body).hexdigest()[:6]}"
            for checksum in (mine, None):
                with mock.patch.dict(self.mae.OFFICIAL, {name: (published, checksum)}):
                    model = self.mae.MAE.from_pretrained(name, data)
                    (data / f"{name}.pth").unlink()
        self.assertIn(f"of {len(body) / 1e6:.1f} MB", err.getvalue())
        self.assertEqual(asked, [published] * 3)
        self.assertTrue(model.fresh_decoder and model.norm_pix_loss)
        for name, (address, checksum) in self.mae.OFFICIAL.items():
            self.assertEqual(address.split("/")[-2:], [name.split("_")[1], f"{name}.pth"])
            self.assertRegex(checksum or "md5:0", r"\Amd5:[0-9a-f]+\Z")

    def test_reconstruct(self):
        """The sheet: each image, what is left of it, and that with the gaps as predicted; the rest is untouched."""
        w = random_vit(official_mae_shapes(64, 1, 8, 32, 32, 1))
        w["decoder_pred.weight"].zero_()
        w["decoder_pred.bias"].zero_()  # predicts the mean: of all images, or with normalised pixels of the patch
        images, labels = self.draw(60, 2)
        first = [labels.tolist().index(k) for k in range(10)]
        for name, normalised in (("mae_visualize.pth", False), ("full.pth", True)):
            status, out, err = run("mae", "--reconstruct", self.pth(name, w), "--out", self.dir, "--mask_ratio", 0.5)
            self.assertEqual((status, err), (0, ""))
            self.assertIn("original, what is left, rebuilt" + " (with each true patch's" * normalised, out)
            sheet = slow_png(self.dir / "reconstruct.png")
            self.assertEqual(sheet.shape, (4 + 5 * 100, 4 + 6 * 100, 3))
            for n, index in enumerate(first):
                row = sheet[4 + n // 2 * 100:][:96:3].astype(int)
                true, left, rebuilt = (row[:, 4 + 100 * (3 * (n % 2) + k):][:, :96:3] for k in range(3))
                image = images[index].permute(1, 2, 0).numpy().astype(int)
                self.assertLessEqual(abs(true - image).max(), 1)
                gaps = 0
                for i, j in itertools.product(range(0, 32, 8), range(0, 32, 8)):
                    part = image[i:i + 8, j:j + 8]
                    if (left[i:i + 8, j:j + 8] == 128).all():
                        gaps += 1
                        m, s = map(np.array, self.mae.CIFAR10_STATS)
                        mean = 255 * (m + s * ((part / 255 - m) / s).mean() * normalised)
                        self.assertLessEqual(abs(rebuilt[i:i + 8, j:j + 8] - mean.clip(0, 255)).max(), 1)
                    else:
                        self.assertLessEqual(abs(left[i:i + 8, j:j + 8] - part).max(), 1)
                        self.assertLessEqual(abs(rebuilt[i:i + 8, j:j + 8] - part).max(), 1)
                self.assertEqual(gaps, 8)

    def test_picture(self):
        path = self.pth("mae_visualize.pth", random_vit(official_mae_shapes(64, 1, 8, 32, 32, 1)))
        red, green = bytes([255, 0, 0]), bytes([0, 200, 0])
        (self.dir / "x.ppm").write_bytes(b"P6 40 60 255\n" + 400 * red + 1600 * green + 400 * red)
        flags = ["--reconstruct", path, "--picture", self.dir / "x.ppm", "--out", self.dir]
        with mock.patch.dict(sys.modules, PIL=None):
            self.bad(*flags, says="pip install pillow")
        self.bad(*flags[:2], "--picture", self.dir / "none.jpg", says="none.jpg")
        self.bad(*flags[2:], says="--reconstruct")
        try:
            import PIL.Image
        except ImportError:
            self.skipTest("no pillow")
        self.assertEqual(run("mae", *flags)[0], 0)
        sheet = slow_png(self.dir / "reconstruct.png")
        self.assertEqual((sheet.shape, sheet[20:80, 20:80].reshape(-1, 3).tolist()),  # the middle of the picture
                         ((104, 304, 3), [[0, 200, 0]] * 3600))
        self.bad(*flags[:2], "--picture", path, says="mae_visualize.pth")

    # evaluation

    def clusters(self, n, C=6, classes=4, noise=0.8, seed=0):
        """Features around a centre for each class, and labels."""
        g = torch.Generator().manual_seed(seed)
        centres = torch.randn(classes, C, generator=torch.Generator().manual_seed(99)).double()
        y = torch.arange(n) % classes
        return centres[y] + noise * torch.randn(n, C, generator=g).double() + 0.3, y

    def test_knn(self):
        """Against a loop; on features that lie apart all are right; k may be more than there are."""
        train, test = self.clusters(50), self.clusters(37, seed=1)
        scores = set()
        for k, t in ((1, 0.07), (5, 0.07), (20, 0.07), (20, 1.0), (50, 0.02), (80, 0.07)):
            got = self.mae.knn_accuracy(*train, *test, k=k, temperature=t)
            self.assertEqual(got, slow_knn(*train, *test, k, t))
            scores.add(got)
        self.assertGreater(len(scores), 2)
        self.assertEqual(self.mae.knn_accuracy(*train, *test), slow_knn(*train, *test, 20, 0.07))
        longer = 10 ** torch.randn(50, 1).double() * train[0]  # lengths are of no account
        self.assertEqual(self.mae.knn_accuracy(longer, train[1], *test), slow_knn(*train, *test, 20, 0.07))
        self.assertEqual(self.mae.knn_accuracy(*self.clusters(50, noise=0.05), *self.clusters(1500, noise=0.05)), 1.0)
        swapped = train[0][:1].repeat(3, 1) + torch.tensor([[0.0], [0.1], [0.2]])
        self.assertEqual(self.mae.knn_accuracy(swapped, torch.tensor([2, 1, 1]), swapped[:1], torch.tensor([2]), k=3,
                                               temperature=100.0), 0.0)  # all but equal weights: the most

    def test_probe(self):
        """Against torch's modules, one rate and several; the rate is chosen on validation features, not on test."""
        scale = torch.tensor([1, 1e-2, 100, 1, 1, 0.0]).double()  # of no account; the last is the same for all
        parts = [(z * scale, y) for z, y in (self.clusters(n, seed=n) for n in (60, 40, 400))]
        flat, rates = sum(parts, ()), (1e-4, 1e-3, 0.01, 0.1, 3.0)
        want = slow_probe(*flat, rates, 30)
        got = [self.probe(*flat, rates=(rate,), at_least=30) for rate in rates]
        self.assertEqual(got, [test for _, test in want])
        self.assertGreater(len(set(got)), 3)
        best = max(range(5), key=lambda i: want[i][0])
        self.assertEqual(self.probe(*flat, rates=rates, at_least=30), want[best][1])
        wrong = (flat[0], flat[1], flat[2], (flat[3] + 1) % 4, *flat[4:])  # validation says otherwise
        want = slow_probe(*wrong, rates, 30)
        self.assertEqual(self.probe(*wrong, rates=rates, at_least=30), max(want, key=lambda a: a[0])[1])
        easy = [self.clusters(900, noise=0.05, seed=s) for s in range(3)]
        self.assertEqual(self.probe(*sum(easy, ())), 1.0)
        self.assertEqual(*(self.probe(*flat, batch_size=7, rates=(1e-3,), at_least=9) for _ in range(2)))

    def test_probe_batches(self):
        """Small batches pass over all features in each epoch, and epochs count when they are more than at_least."""
        z, y = self.clusters(103)
        seen, permute = [], torch.randperm

        def counted(n, generator):
            seen.append(permute(n, generator=generator))
            return seen[-1]

        with mock.patch.object(torch, "randperm", counted):
            self.probe(z, y, z, y, z, y, batch_size=10, epochs=3, at_least=5)
        self.assertEqual(len(seen), 3)  # 30 steps, 10 in an epoch
        self.assertEqual(len({tuple(order.tolist()) for order in seen}), 3)

    def test_rankme(self):
        """Of known spectra; features are neither centred nor scaled."""
        q = torch.linalg.qr(torch.randn(200, 12).double())[0]
        self.assertAlmostEqual(self.mae.rankme(q), 12, delta=1e-3)
        self.assertAlmostEqual(self.mae.rankme(5 * q[:, :4] @ torch.linalg.qr(torch.randn(9, 4).double())[0].T), 4,
                               delta=1e-3)  # 4 directions in 9 dimensions
        self.assertAlmostEqual(self.mae.rankme(torch.ones(50, 7)), 1, delta=1e-3)
        s = 0.5 ** torch.arange(12).double()
        p = [v / sum(s.tolist()) + 1e-7 for v in s.tolist()]
        self.assertAlmostEqual(self.mae.rankme(q * s), math.exp(-sum(v * math.log(v) for v in p)), delta=1e-6)
        z = torch.randn(40, 5).double() + 3
        self.assertLess(self.mae.rankme(z) + 0.5, self.mae.rankme(z - z.mean(0)))

    def test_spread(self):
        z = torch.randn(30, 5).double()
        unit = [[v / math.hypot(*row) for v in row] for row in z.tolist()]
        self.assertAlmostEqual(self.mae.spread(z),
                               sum(statistics.stdev(column) for column in zip(*unit)) / 5 * 5**0.5, 12)
        self.assertAlmostEqual(self.mae.spread(torch.randn(9000, 40)), 1, delta=0.02)
        self.assertLess(self.mae.spread(torch.ones(30, 5) * torch.rand(30, 1)), 1e-6)

    def test_probe_encoders(self):
        """What the table says is what its parts say of the features, in the encoder's dtype and not its batches."""
        splits = [(self.images(n, 8, seed=n), 3 * torch.arange(n) // n) for n in (90, 40, 50)]
        layer = nn.Linear(192, 5)

        def encode(x):
            self.assertLessEqual(len(x), 500)
            return layer(x.flatten(1))

        stats, off = self.mae.CIFAR10_STATS, torch.autocast("cpu", enabled=False)
        with mock.patch.object(self.mae, "linear_probe", self.probe):
            got = self.mae.probe_encoders({"a": encode, "pixels": lambda x: x.flatten(1)}, stats, *splits,
                                          (1.0, 0.1), off)
        self.assertEqual([*got], ["a", "pixels"])
        for name, scores in got.items():
            z = [self.mae.normalise(x, stats).flatten(1) for x, _ in splits]
            z = [layer(t).detach() for t in z] if name == "a" else z
            y = [y for _, y in splits]
            few = torch.cat([(y[0] == k).nonzero().flatten()[:3] for k in range(3)]).sort().values
            self.assertEqual(scores, dict(
                knn=self.mae.knn_accuracy(z[0], y[0], z[2], y[2]),
                linear=self.probe(z[0], y[0], z[1], y[1], z[2], y[2]),
                **{"linear_10%": self.probe(z[0][few], y[0][few], z[1], y[1], z[2], y[2])},
                rankme=self.mae.rankme(z[2]), std=self.mae.spread(z[2])))
        table = [line.split() for line in self.mae.probe_table(got).splitlines()]
        self.assertEqual(table[0], ["knn", "linear", "linear_10%", "rankme", "std"])
        self.assertEqual(table[2], ["pixels", *(f"{v:.4f}" for v in got["pixels"].values())])
        z = self.mae.cached_features(encode, self.images(1203, 8), stats, torch.autocast("cpu", torch.bfloat16))
        self.assertEqual((z.shape, z.dtype), ((1203, 5), torch.float32))
        self.close(z, layer(self.mae.normalise(self.images(1203, 8), stats).flatten(1)), 0.05)

    # training

    def test_batches(self):
        """A batch depends on (seed, step, slot) alone; its images are shifted, mirrored ones; masks are its own."""
        images, c = self.images(40, 32), self.config(crop=2)
        stats = self.mae.CIFAR10_STATS

        def batch(c, *where):
            torch.manual_seed(int(torch.randint(99, (1,))))
            return self.mae.masked_batch(c, images, stats, 4, *where)

        a = batch(c, 3, 0, 1)
        self.same(a, batch(c, 3, 0, 1))
        self.assertEqual((a[0].shape, a[1].shape, a[1].dtype), ((8, 3, 32, 32), (8, 16), torch.float32))
        others = [batch(c, 4, 0, 1), batch(c, 3, 1, 2), batch(dataclasses.replace(c, seed=1), 3, 0, 1)]
        for other in others:
            self.assertFalse(torch.equal(a[1], other[1]) or torch.equal(a[0], other[0]))
        padded = F.pad(self.mae.normalise(images, stats), [2] * 4, mode="reflect")
        windows = {}
        for n, dy, dx in itertools.product(range(40), range(5), range(5)):
            view = padded[n, :, dy:dy + 32, dx:dx + 32]
            for mirror in (False, True):
                windows[(view.flip(2) if mirror else view)[0, :4, :4].numpy().tobytes()] = (n, mirror)
        drawn_ = [windows[x[0, :4, :4].contiguous().numpy().tobytes()] for step in range(5)
                  for x in batch(c, step, 0, 1)[0]]
        self.assertEqual(sorted(n for n, _ in drawn_), list(range(40)))  # an epoch
        self.assertTrue(5 < sum(mirror for _, mirror in drawn_) < 35)
        plain = batch(dataclasses.replace(c, crop=0, flip=False), 0, 0, 1)[0]
        self.assertTrue(all(any(torch.equal(x, y) for y in self.mae.normalise(images, stats)) for x in plain))

    def test_groups(self):
        """Decay on weights of layers alone; AdamW's betas; the rate is base · batch / 256, of all ranks together."""
        model = self.mae.MAE(32, 8, 16, 1, 2, 8, 1, 2)
        optimizer = self.mae.decay_weights(model, 0.3)
        names = {id(p): name for name, p in model.named_parameters()}
        decayed, others = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
        self.assertEqual([g["weight_decay"] for g in optimizer.param_groups], [0.3, 0])
        self.assertEqual([g["betas"] for g in optimizer.param_groups], [(0.9, 0.95)] * 2)
        self.assertEqual(decayed | others | {"pos_embed", "decoder_pos_embed"}, set(names.values()))
        self.assertEqual(others, {n for n in names.values() if n.endswith("_token") or n.endswith("bias")
                                  or "norm" in n})
        c = self.config(batch_size=4, grad_accum=2, lr=0.64, warmup=0, steps=10)
        self.mae.mae_step(model, model, optimizer, contextlib.nullcontext(), self.images(9), c, 5, 10, 0, 1)
        self.assertAlmostEqual(optimizer.param_groups[1]["lr"], 0.64 * 8 / 256 / 2)  # half-way down the cosine

    def test_overfits(self):
        """One batch, one mask: random colours are learned by heart."""
        c = self.config(batch_size=8, crop=0, flip=False, lr=0.16, warmup=10, weight_decay=1e-9, mask="block")
        model = self.mae.MAE(32, 8, 64, 1, 4, 64, 1, 4, norm_pix_loss=False)
        optimizer, batch = self.mae.decay_weights(model, 0.0), self.mae.masked_batch
        images = self.images(8, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)  # a colour for each patch
        with mock.patch.object(self.mae, "masked_batch", lambda c, *a: batch(c, *a[:3], 0, 0, 1)):
            losses = [self.mae.mae_step(model, model, optimizer, contextlib.nullcontext(), images, c, step, 180, 0, 1)
                      for step in range(180)]
        self.assertLess(losses[-1].item(), losses[0].item() / 40)

    def test_run(self):
        """What a run leaves: val loss under fixed masks, best.pt by the probe, random init and pixels beside it."""
        a = self.train("a", "--eval_every", 3, "--lr", 0.05)
        looks = [row for row in a.rows if "val_loss" in row]
        self.assertEqual([row["step"] for row in looks], [0, 3, 6, 9, 12])
        for row in looks:
            self.assertLessEqual({"knn", "linear", "rankme", "std", "knn_random_init", "linear_random_init",
                                  "knn_pixels", "linear_pixels", "seconds"}, set(row))
        for key in ("knn", "linear"):  # before the first step it is at random init
            self.assertEqual({row[f"{key}_random_init"] for row in looks}, {looks[0][key]})
        best = torch.load(a.out / "best.pt", weights_only=True)
        self.assertEqual(best["best"], max(row["linear"] for row in looks))
        self.assertEqual([row["linear"] for row in looks if row["step"] == best["step"]], [best["best"]])
        found = iter((0.1, 0.3, 0.2))
        with mock.patch.object(self.mae, "evaluate", lambda *_: dict(val_loss=1.0, knn=0.1, linear=next(found))):
            self.assertEqual(torch.load(self.train("best").out / "best.pt", weights_only=True)["step"], 6)
        last = a.rows[-1]
        for name in ("", "_random_init", "_pixels"):
            for key in ("knn", "linear", "linear_10%", "linear_1%", "rankme", "std"):
                self.assertIn(f"test_{key}{name}", last)
        model = self.mae.MAE(**a.ckpt["model_config"])
        model.load_state_dict(a.ckpt["model"])
        (x, y), c = self.draw(60, 2), self.mae.Config(**a.ckpt["config"])
        scores = self.mae.evaluate(model, self.draw(240, 1), (x, y), c, contextlib.nullcontext())
        self.assertEqual({k: looks[-1][k] for k in scores}, scores)
        noise = torch.from_numpy(self.mae.mask_noise("random", np.random.default_rng(0), 60, 4))
        with torch.no_grad():
            self.assertAlmostEqual(scores["val_loss"], model(self.mae.normalise(x, model.stats), c.mask_ratio,
                                                             noise)[0].item(), 5)
        self.assertEqual(slow_png(a.out / "reconstructions.png").shape, (504, 604, 3))
        self.assertIn("features: mean of the patches", a.text)
        b = self.train("b", "--norm_pix_loss", "--pool", "cls", "--steps", 1)
        self.assertIn("true patch's mean", b.text)
        self.assertIn("features: the class token", b.text)

    def test_resume(self):
        """12 steps are 6, stop, resume, 6 more: bit for bit, with every kind of mask."""
        for kind in (["--mask", "block", "--norm_pix_loss", "--pool", "cls"],
                     ["--mask", "grid", "--grad_accum", 2, "--no-class_token"]):
            a = self.train("a", *kind)
            b = self.train("b", *kind, "--stop_at", 6)
            self.assertEqual((b.ckpt["step"], b.rows[-1]["step"]), (6, 6))
            self.assertFalse(torch.equal(*(r.ckpt["model"]["mask_token"] for r in (a, b))))
            with open(b.out / "log.jsonl", "a") as file:  # what a killed run may have left
                file.write('{"step": 8, "loss": 9.0}\n{"step": 9, "lo')
            b = self.train("b", "--resume", tiny=False)
            self.same_run(a, self.look(b.out))
            self.assertEqual(sum("final" in row for row in b.rows), 1)
            self.assertEqual(*({k: v for k, v in r.ckpt["config"].items() if k not in ("out", "resume")}
                               for r in (a, b)))
            shutil.rmtree(a.out)
            shutil.rmtree(b.out)

    def test_evaluation_changes_nothing(self):
        runs = [self.train(f"e{every}", "--eval_every", every, "--log_every", log)
                for every, log in ((3, 2), (12, 5))]
        for key in ("model", "optimizer"):
            self.same(*(run_.ckpt[key] for run_ in runs))
        self.assertNotEqual(self.train("s", "--seed", 7).losses, self.train("t").losses)

    def test_full_train(self):
        """Pre-training sees the validation images too; probes are as they were."""
        a, b = self.train("a", "--steps", 1), self.train("b", "--steps", 1, "--full_train")
        self.assertIn("240 images", a.text)
        self.assertIn("300 images", b.text)
        self.assertEqual(*({k: v for k, v in r.rows[0].items() if k != "seconds"} for r in (a, b)))
        self.assertIn("| 20 images", self.train("c", "--steps", 1, "--labels", 0.1).text)  # 2 of each class

    def test_torchrun(self):
        """Two processes update as one does with twice the accumulation; the checkpoint's names are plain."""
        (self.dir / "two.py").write_text("import sys\nimport old_tests\nwith old_tests.small_mae():\n"
                                         "    import mae\n    sys.exit(mae.main(sys.argv[1:]))\n")
        flags = [*self.tiny, "--steps", 6]
        done = child("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", self.dir / "two.py", *flags,
                     "--out", self.dir / "two", cwd=self.dir)
        self.assertEqual(done.returncode, 0, done.stderr[-2000:])
        one, two = self.train("one", *flags, "--grad_accum", 2), self.look(self.dir / "two")
        self.assertEqual(list(one.ckpt["model"]), list(two.ckpt["model"]))
        for name, p in one.ckpt["model"].items():
            self.assertLess((p - two.ckpt["model"][name]).abs().max().item(), 2e-6, name)
        for step, loss in one.losses.items():
            self.assertAlmostEqual(loss, two.losses[step], delta=1e-5)
        self.assertEqual([r["lr"] for r in one.rows if "lr" in r], [r["lr"] for r in two.rows if "lr" in r])
        self.assertEqual(done.stdout.count("step 6/6 | loss"), 1)  # one process speaks

    def test_ctrl_c(self):
        """Between two steps: a checkpoint, how to go on, status 130; and the run goes on bit for bit."""
        a, batch, calls = self.train("a"), self.mae.masked_batch, []

        def interrupted(*args):
            calls.append(1)
            if len(calls) == 4:
                signal.raise_signal(signal.SIGINT)
            return batch(*args)

        handler = signal.getsignal(signal.SIGINT)
        with mock.patch.object(self.mae, "masked_batch", interrupted):
            b = self.train("b", status=130)
        self.assertIs(signal.getsignal(signal.SIGINT), handler)
        self.assertEqual((b.ckpt["step"], len(calls)), (4, 4))
        command = re.search(r"python mae\.py (.*--resume.*)", b.text)[1]
        self.assertEqual(run("mae", *shlex.split(command))[0], 0)
        b = self.look(b.out)
        for key in ("model", "optimizer", "best"):
            self.same(a.ckpt[key], b.ckpt[key], key)
        self.assertEqual(a.val, b.val)

    def test_not_finite(self):
        """The run stops with status 1, names the step, and keeps the last good checkpoint."""
        out = self.dir / "o"
        status, _, err = run("mae", *self.tiny, "--out", out, "--lr", 9e18, "--warmup", 0, "--log_every", 1)
        self.assertEqual(status, 1, err)
        self.assertRegex(err, r"\Amae\.py: [^\n]*(nan|inf)[^\n]* step 1\b[^\n]*\n\Z")
        saved = torch.load(out / "ckpt.pt", weights_only=True)
        self.assertEqual(saved["step"], 0)
        self.assertTrue(all(p.isfinite().all() for p in saved["model"].values()))

    def test_low_precision(self):
        a, b = (self.train(dtype, "--dtype", dtype, "--lr", 0.02) for dtype in ("float32", "bfloat16"))
        for step, loss in a.losses.items():
            self.assertAlmostEqual(loss, b.losses[step], delta=0.02 * loss)
        self.assertNotEqual(a.losses, b.losses)
        self.assertEqual({p.dtype for p in b.ckpt["model"].values()}, {torch.float32})

    def test_bad_flags(self):
        for flags in """--mask_ratio 0, --mask_ratio 1, --mask_ratio 0.96, --mask_ratio -0.5, --mask_ratio nan,
                --mask_ratio 1e-18, --mask_ratio half, --patch_size 5, --patch_size 0, --patch_size 64,
                --patch_size 16 --mask_ratio 0.9, --mask hexagon, --mask=, --dim 30, --dim 36 --heads 5, --heads 3,
                --decoder_dim 18, --decoder_heads 3, --depth 0, --decoder_depth 0, --pool max,
                --pool cls --no-class_token, --lr nan,
                --lr 0, --lr -1, --lr inf, --weight_decay -1, --warmup -1, --batch_size 0, --grad_accum 0,
                --epochs 0, --epochs nan, --steps 0, --steps 1.5, --stop_at 0, --eval_every 0, --log_every 0,
                --probe_images 0, --seed -1, --labels 0, --labels 2, --crop 32, --crop -1, --dtype int8,
                --device nowhere, --data nowhere, --data=, --out=, --no_such_flag 1, --step 5, --steps, stray,
                --resume, --resume --init x.pt, --init nowhere.pt, --init=, --init mae_pretrain_vit_base,
                --reconstruct nowhere.pth, --reconstruct=, --picture x.jpg""".split(","):
            self.bad(*self.tiny, *flags.split())
        self.bad("--mask_ratio", 0.97, says=("--mask_ratio", "0.97", "0.95"))
        self.bad("--patch_size", 5, says=("--patch_size", "5", "32"))
        self.bad("--resume", "--out", self.dir / "none", says="ckpt.pt")
        (self.dir / "text.txt").write_text("hello")
        self.bad(*self.tiny, "--out", self.dir / "text.txt", says="text.txt", status=1)
        self.bad("--data", self.dir / "nowhere", "--lr", "nan", says="--lr")  # flags come before data

    def test_bad_checkpoints(self):
        a = self.train("a", "--steps", 2)
        good, saved = (a.out / "best.pt").read_bytes(), torch.load(a.out / "best.pt", weights_only=True)

        def checkpoint(name, content):
            torch.save(content, self.dir / name)
            return self.dir / name

        foreign = [checkpoint("list.pt", [1, 2]), checkpoint("object.pt", Evil(self.dir / "marker")),
                   checkpoint("arch.pt", saved | dict(model_config=dict(arch="resnet18"))),
                   checkpoint("vit.pt", saved | dict(model_config=dict(image_size=32, num_classes=10))),
                   checkpoint("names.pt", saved | dict(model=saved["encoder"] | {"head.bias": torch.ones(1)})),
                   checkpoint("shape.pt", saved | dict(model=saved["model"] | {"norm.bias": torch.ones(31)}))]
        foreign += [checkpoint(f"no_{key}.pt", {k: v for k, v in saved.items() if k != key})
                    for key in ("model", "config", "step", "model_config")]
        for name, content in (("cut.pt", good[:len(good) // 2]), ("noise.pt", os.urandom(5000)), ("none.pt", b"")):
            (self.dir / name).write_bytes(content)
            foreign.append(self.dir / name)
        for path in foreign:
            self.bad(*self.tiny, "--init", path, says=path.name)
        self.assertFalse((self.dir / "marker").exists())
        self.bad(*self.tiny, "--init", self.pth("w.pth", random_vit(official_mae_shapes(32, 1, 8, 24, 32, 1))),
                 "--depth", 1, "--decoder_dim", 32, "--decoder_heads", 1, "--heads", 1, says="24")
        self.bad("--resume", "--out", a.out, "--dim", 64, says="ckpt.pt")
        (a.out / "ckpt.pt").write_bytes((a.out / "ckpt.pt").read_bytes()[:-999])
        self.bad("--resume", "--out", a.out, says="ckpt.pt")

    def test_command_line(self):
        """As a program: the exit status, and one line on stderr."""
        done = child(HERE / "mae.py", "--mask_ratio", 2, cwd=self.dir)
        self.assertEqual((done.returncode, done.stdout, snapshot(self.dir)), (2, "", {}))
        self.assertRegex(done.stderr, r"\Amae\.py: [^\n]+\n\Z")


# --------------------------------------------------------------------------------------------------------------------
# simclr.py


def slow_nt_xent(z1, z2, t):
    """[5] eq. 1 and Algorithm 1, a pair at a time: views 2k and 2k + 1 are of one image."""
    views = [v / v.square().sum().sqrt() for pair in zip(z1, z2) for v in pair]
    total = 0
    for i, j in ((i, i + 1 if i % 2 == 0 else i - 1) for i in range(len(views))):
        others = sum(((views[i] * views[k]).sum() / t).exp() for k in range(len(views)) if k != i)
        total = total - ((views[i] * views[j]).sum() / t - others.log())
    return total / len(views)


def slow_moco(q, k, queue, t):
    """[6] eq. 1, a query at a time."""
    total = 0
    for a, b in zip(q, k):
        positive = ((a * b).sum() / t).exp()
        total = total - (positive / (positive + sum(((a * c).sum() / t).exp() for c in queue))).log()
    return total / len(q)


def slow_vicreg(z1, z2, invariance, variance, covariance):
    """[8] eq. 1 to 5, an element at a time, weighed as the authors' code does."""
    N, D = z1.shape
    s = sum((z1[n, d] - z2[n, d]) ** 2 for n in range(N) for d in range(D)) / (N * D)
    v = c = 0
    for z in (z1, z2):
        means = [sum(z[n, d] for n in range(N)) / N for d in range(D)]
        cov = [[sum((z[n, a] - means[a]) * (z[n, b] - means[b]) for n in range(N)) / (N - 1) for b in range(D)]
               for a in range(D)]
        v = v + sum((1 - (cov[d][d] + 1e-4).sqrt()).clamp(min=0) for d in range(D)) / D / 2
        c = c + sum(cov[a][b] ** 2 for a in range(D) for b in range(D) if a != b) / D
    return invariance * s + variance * v + covariance * c, (s, v, c)


def slow_jitter(x, factors, order):
    """An image's pixels (3, H, W), changed in the order: brightness, contrast, saturation, hue by colorsys."""
    x = x.clone()
    grey = lambda p: 0.299 * p[0] + 0.587 * p[1] + 0.114 * p[2]
    for kind in order:
        f, mean = factors[kind], sum(grey(x[:, i, j]) for i, j in itertools.product(*map(range, x.shape[1:])))
        mean = mean / x[0].numel()
        for i, j in itertools.product(*map(range, x.shape[1:])):
            p = x[:, i, j].clone()
            if kind < 3:
                base = (0, mean, grey(p))[kind]
                p = f * p + (1 - f) * base
            else:
                h, s, v = colorsys.rgb_to_hsv(*p.tolist())
                p = torch.tensor(colorsys.hsv_to_rgb((h + f) % 1, s, v))
            x[:, i, j] = p.clamp(0, 1)
    return x


def slow_blur(x, sigma, reach):
    """A channel (H, W) convolved with a Gaussian, a pixel at a time, its border reflected."""
    H, W = x.shape
    around = range(-reach, reach + 1)
    g = [math.exp(-t * t / (2 * sigma**2)) for t in around]
    inside = lambda i, n: n - 1 - abs(n - 1 - abs(i))
    return torch.tensor([[sum(g[a + reach] * g[b + reach] * x[inside(i + a, H), inside(j + b, W)].item()
                              for a in around for b in around) / sum(g) ** 2 for j in range(W)] for i in range(H)])


def slow_lars(p, grads, lr, decay, momentum, trust):
    """SimCLR's lars_optimizer.py (classic momentum), a step at a time."""
    v = torch.zeros_like(p)
    for g in grads:
        g = g + decay * p if p.dim() > 1 else g
        ratio = 1.0
        if p.dim() > 1 and p.norm() > 0 and g.norm() > 0:
            ratio = trust * p.norm() / g.norm()
        v = momentum * v + lr * ratio * g
        p = p - v
    return p


def small_simclr(size=16):
    """A patch of simclr.py for runs that take a second: few images of size × size pixels, probes of a few steps."""
    import simclr
    draw, few = getattr(simclr.make_shapes, "whole", simclr.make_shapes), {10000: 120, 1000: 40, 2000: 40}
    probe = functools.partial(simclr.linear_probe, epochs=1, at_least=3)

    def shapes(n, seed):
        x, y = drawn(draw, few.get(n, n), seed)
        return x[:, :, ::32 // size, ::32 // size], y

    shapes.whole = draw  # for a patch within a patch
    return mock.patch.multiple(simclr, make_shapes=shapes, linear_probe=probe)


class TestSimCLR(Case):
    @classmethod
    def setUpClass(cls):
        import simclr
        cls.simclr, cls.draw = simclr, staticmethod(simclr.make_shapes)
        cls.threads = torch.get_num_threads()
        torch.set_num_threads(1)

    @classmethod
    def tearDownClass(cls):
        torch.set_num_threads(cls.threads)
        drawn.cache_clear()

    def setUp(self):
        super().setUp()
        torch.manual_seed(0)
        patch = small_simclr()
        patch.start()
        self.addCleanup(patch.stop)
        self.tiny = ["--batch_size", 8, "--width", 8, "--head_dim", 16, "--queue", 32, "--bn_splits", 2, "--steps", 6,
                     "--eval_every", 3, "--log_every", 2, "--warmup", 1, "--dtype", "float32"]
        self.vit = ["--encoder", "vit", "--width", 16, "--depth", 1]

    # helpers

    def train(self, name, *flags, tiny=True, status=0):
        """A small run into the folder name: its out, rows of the log, text, checkpoint."""
        out = self.dir / name
        got, text, err = run("simclr", *(self.tiny if tiny else ()), "--out", out, *flags)
        self.assertEqual(got, status, err)
        return self.look(out, text, err)

    def look(self, out, text="", err=""):
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        return SimpleNamespace(out=out, rows=rows, text=text, err=err,
                               ckpt=torch.load(out / "ckpt.pt", weights_only=True),
                               losses={r["step"]: r["loss"] for r in rows if "loss" in r},
                               knn={r["step"]: r["knn"] for r in rows if "knn" in r})

    def same_run(self, a, b):
        """The same parameters, buffers, optimiser, best accuracy and logged values, bit for bit."""
        for key in ("model", "optimizer", "step", "best", "encoder"):
            self.same(a.ckpt[key], b.ckpt[key], key)
        timed = ("ms", "seconds", "images_per_s", "peak_mb")
        self.assertEqual(*([{k: v for k, v in row.items() if k not in timed} for row in r.rows] for r in (a, b)))

    def bad(self, *flags, says=(), status=2):
        """Bad input: the status, one line on stderr that begins with the script's name, nothing on disk changes."""
        before = snapshot(self.dir)
        with self.subTest(flags=" ".join(map(str, flags))[-90:]), folder(self.dir):
            got, out, err = run("simclr", *flags)
            self.assertEqual(got, status, err)
            self.assertRegex(err, r"\Asimclr\.py: [^\n]+\n\Z")
            for word in [says] if isinstance(says, str) else says:
                self.assertIn(str(word), err)
            self.assertNotIn("Traceback", out)
            self.assertTrue(snapshot(self.dir) == before, "files came, went or changed")

    def config(self, **more):
        return self.simclr.Config(**{"batch_size": 8, "width": 8, "head_dim": 16, "queue": 32, "bn_splits": 2,
                                     "steps": 20, "warmup": 3, **more})

    def images(self, n, size=16, seed=0):
        g = torch.Generator().manual_seed(seed)
        return torch.randint(0, 256, (n, 3, size, size), generator=g, dtype=torch.uint8)

    def pair(self, c, double=True):
        """A network as the flags have it, in fp64 and training mode, its norms' weights not all 1."""
        model, _ = self.simclr.load_pair(c)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
        return (model.double() if double else model).train()

    def step(self, c, model, optimizer, images, step=0, steps=20):
        return self.simclr.contrastive_step(model, model, optimizer, contextlib.nullcontext(), images, c, step, steps,
                                            0, 1)

    def double_views(self):
        """A patch: views in fp64."""
        views = self.simclr.views
        return mock.patch.object(self.simclr, "views", lambda *args: views(*args).double())

    # objectives

    def unit(self, *shape, seed=0):
        g = torch.Generator().manual_seed(seed)
        return F.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=1)

    def against(self, fast, slow, *tensors, grads=None):
        """Value and gradients (of the first grads tensors) of two losses."""
        a = [t.clone().requires_grad_() for t in tensors]
        b = [t.clone().requires_grad_() for t in tensors]
        got, want = fast(*a)[0], slow(*b)
        self.close(got, want, 1e-12)
        got.backward()
        want.backward()
        for x, y in list(zip(a, b))[:grads]:
            self.close(x.grad, y.grad, 1e-10)
        return a, got

    def test_nt_xent(self):
        z1, z2 = (torch.randn(5, 7, dtype=torch.float64) for _ in range(2))
        for t in (0.1, 0.5, 3):
            self.against(lambda *z: self.simclr.nt_xent(*z, t), lambda *z: slow_nt_xent(*z, t), z1, z2)
        loss, scores = self.simclr.nt_xent(z1, z1 + 1e-3 * z2, 0.5)
        self.assertEqual(scores["accuracy"].item(), 1)
        self.assertLess(self.simclr.nt_xent(z1, z1.roll(1, 0), 0.5)[1]["accuracy"].item(), 0.3)
        same = torch.ones(4, 3)  # collapsed: all 2N - 1 candidates alike
        self.assertAlmostEqual(self.simclr.nt_xent(same, same, 0.5)[0].item(), math.log(7), places=5)

    def test_permutation(self):
        """The order of the images changes nothing; gradients go along with it; so does swapping the views."""
        order = torch.randperm(6)
        z = [torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        p = [v.detach()[order].requires_grad_() for v in z]
        a, b = self.simclr.nt_xent(*z, 0.3)[0], self.simclr.nt_xent(*p, 0.3)[0]
        (a + 2 * b).backward()
        self.close(a, b, 1e-13)
        for v, w in zip(z, p):
            self.close(2 * v.grad[order], w.grad, 1e-12)
        self.close(self.simclr.nt_xent(*z[::-1], 0.3)[0], a, 1e-13)

    def test_moco_loss(self):
        """Value and the queries' gradient; keys and queue get none."""
        q, k, queue = self.unit(4, 6), self.unit(4, 6, seed=1), self.unit(9, 6, seed=2)
        for t in (0.07, 0.5):
            (_, k_, queue_), _ = self.against(lambda *v: self.simclr.moco_loss(*v, t), lambda *v: slow_moco(*v, t),
                                              q, k, queue, grads=1)
            self.assertTrue(k_.grad is None and queue_.grad is None)
        self.assertEqual(self.simclr.moco_loss(q, q, queue, 0.1)[1]["accuracy"].item(), 1)

    def test_vicreg_loss(self):
        z1, z2 = (torch.randn(5, 4, dtype=torch.float64) * torch.tensor([0.3, 2, 0.01, 0.7]) for _ in range(2))
        for weights in ((25.0, 25.0, 1.0), (1.0, 3.0, 5.0), (0.0, 1.0, 0.0)):
            self.against(lambda *z: self.simclr.vicreg_loss(*z, *weights), lambda *z: slow_vicreg(*z, *weights)[0],
                         z1, z2)
        loss, scores = self.simclr.vicreg_loss(z1, z2)
        want, terms = slow_vicreg(z1, z2, 25, 25, 1)
        self.close(loss, want, 1e-12)
        for name, term in zip(("invariance", "variance", "covariance"), terms):
            self.close(scores[name], term, 1e-12, name)
        flat = torch.ones(4, 3, requires_grad=True)  # collapsed: the gradient stays finite
        loss, _ = self.simclr.vicreg_loss(flat, flat.detach())
        self.assertAlmostEqual(loss.item(), 25 * 0.99, places=4)
        loss.backward()
        self.assertTrue(flat.grad.isfinite().all())

    def test_precision(self):
        """bfloat16 vectors are compared in fp32, whatever autocast says; fp64 stays."""
        z = [torch.randn(32, 16).bfloat16() for _ in range(2)]
        queue = torch.randn(8, 16).bfloat16()
        losses = dict(nt_xent=lambda *v: self.simclr.nt_xent(*v, 0.1), vicreg=self.simclr.vicreg_loss,
                      moco=lambda *v: self.simclr.moco_loss(*v, queue.to(v[0].dtype), 0.7))
        for name, loss in losses.items():
            with self.subTest(name):
                want = loss(*(v.double() for v in z))[0]
                self.assertEqual(want.dtype, torch.float64)
                with torch.autocast("cpu", torch.bfloat16):
                    for got in (loss(*z)[0], loss(*(v.float() for v in z))[0]):
                        self.assertEqual(got.dtype, torch.float32)
                        self.close(got, want, 1e-5)

    # moco's queue and keys

    def test_queue(self):
        """The newest keys stand in place of the oldest; it starts with unit vectors and wraps around."""
        model = self.pair(self.config(loss="moco", queue=12, batch_size=4), double=False)
        self.close(model.queue.norm(dim=1), torch.ones(12), 1e-6)
        start, given = model.queue.clone(), torch.arange(5 * 4 * 16.0).view(5, 4, 16)
        want = collections.deque(start, maxlen=12)
        for step, keys in enumerate(given):
            model.enqueue(keys, step)
            want.extend(keys)
            self.assertEqual(model.queue.shape, (12, 16))
            self.assertEqual(sorted(model.queue[:, 0].tolist()), sorted(k[0].item() for k in want))
        self.same(model.queue, torch.cat((given[3], given[4], given[2])))

    def test_follow(self):
        """k ← m k + (1 - m) q, to the bit, for every parameter; nothing else moves."""
        model = self.pair(self.config(loss="moco"), double=False)
        for p in model.parameters():
            p.data = torch.randn(p.shape)
        before = {k: t.clone() for k, t in model.state_dict().items()}
        model.follow(0.9)
        moved = 0
        for k, t in model.state_dict().items():
            if k.startswith("key_") and k.removeprefix("key_") in dict(model.named_parameters()):
                self.same(t, before[k] * 0.9 + before[k.removeprefix("key_")] * (1 - 0.9), k)
                moved += 1
            else:
                self.same(t, before[k], k)
        self.assertEqual(2 * moved, len([*model.parameters()]))

    def test_moco_step(self):
        """A step against one by hand: keys by the encoder that has moved already, in shuffled parts; logits against
        the queue as it was; then its keys stand in the queue, in the images' order."""
        c = self.config(loss="moco", optimizer="sgd", lr=0.1, warmup=0, weight_decay=0.0)
        images, step = self.images(40), 5
        model = self.pair(c)
        for p in [*model.key_encoder.parameters(), *model.key_head.parameters()]:
            p.data += 0.05 * torch.randn(p.shape).double()
        hand = copy.deepcopy(model)
        with self.double_views():
            loss = self.step(c, model, self.simclr.make_optimizer(model, c), images, step, 10**9)["loss"]
            x = self.simclr.views(c, images, step, 8, np.arange(16))
        for p, k in zip([*hand.encoder.parameters(), *hand.head.parameters()],
                        [*hand.key_encoder.parameters(), *hand.key_head.parameters()]):
            k.data = 0.99 * k.data + 0.01 * p.data
        order = np.random.default_rng((c.seed, 3, step)).permutation(8)
        for module in hand.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.splits = 1
        keys = torch.empty(8, 16, dtype=torch.float64)
        with torch.no_grad():
            for part in (order[:4], order[4:]):  # two parts, other images than the queries' parts
                keys[part] = F.normalize(hand.key_head(hand.key_encoder(x[8 + part])), dim=1)
        self.assertNotEqual({*order[:4]}, {0, 1, 2, 3})
        q = torch.cat([hand.head(hand.encoder(part)) for part in (x[:4], x[4:8])])
        want = slow_moco(F.normalize(q, dim=1), keys, hand.queue, c.temperature)
        self.close(loss, want, 1e-12)
        want.backward()
        for (name, p), moved in zip(hand.named_parameters(), model.parameters()):
            if not name.startswith("key_"):
                self.close(moved, p - 0.1 * p.grad, 1e-12, name)
            else:
                self.close(moved, p, 1e-12, name)
                self.assertIsNone(moved.grad, name)
        start = step * 8 % 32
        self.close(model.queue[start:start + 8], keys, 1e-12)
        rest = [i for i in range(32) if not start <= i < start + 8]
        self.same(model.queue[rest], hand.queue[rest])

    def test_shuffled(self):
        """Keys are made in the order of the step's permutation, another in every step."""
        c, images, seen = self.config(loss="moco"), self.images(40), []
        model, views = self.pair(c, double=False), self.simclr.views
        optimizer = self.simclr.make_optimizer(model, c)
        with mock.patch.object(self.simclr, "views", lambda *a: seen.append(a[4].tolist()) or views(*a)):
            for step in range(3):
                self.step(c, model, optimizer, images, step)
        for at in seen[::2]:
            self.assertEqual(at, list(range(8)))
        self.assertEqual([sorted(at) for at in seen[1::2]], [list(range(8, 16))] * 3)
        self.assertEqual(len({*map(tuple, seen[1::2]), tuple(range(8, 16))}), 4)

    # gradient cache

    def test_chunks(self):
        """The loss, scores and gradient of the whole batch, from pieces of it, with a network without batch norm."""
        x = torch.randn(16, 3, 4, 4, dtype=torch.float64)
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 9), nn.Tanh(), nn.Linear(9, 6)).double()
        for loss, size in itertools.product(("simclr", "vicreg"), (2, 4, 8)):
            got = []
            for chunk in (0, size):
                model.zero_grad()
                called, encoded = [], []
                encode = lambda v: encoded.append((len(v), len(called), torch.is_grad_enabled())) or model(v)
                value, scores = self.simclr.loss_backward(encode, x, self.config(loss=loss, chunk=chunk),
                                                          lambda: called.append(1))
                got.append((value, scores, [p.grad.clone() for p in model.parameters()]))
            self.close(got[1][0], got[0][0], 1e-12)
            self.close(*(torch.cat([g.flatten() for g in grads]) for *_, grads in got), 1e-11)
            for a, b in zip(got[1][1].values(), got[0][1].values()):
                self.close(a, b, 1e-6)
            n = 8 // size  # passes: without a gradient, then with; last comes before the very last
            self.assertEqual(encoded, [(2 * size, 0, False)] * n + [(2 * size, 0, True)] * (n - 1) +
                             [(2 * size, 1, True)])

    def test_chunked_step(self):
        """A step of the real network: as of a whole batch in which batch norm sees the chunks apart, VICReg's of both
        views of the same images, SimCLR's of any; running statistics move once."""
        for loss in ("simclr", "vicreg"):
            c = self.config(loss=loss, chunk=4, optimizer="sgd", lr=0.1, warmup=0, weight_decay=0.0)
            model, images = self.pair(c), self.images(40)
            hand = copy.deepcopy(model)
            with self.double_views():
                self.step(c, model, self.simclr.make_optimizer(model, c), images)
                x = self.simclr.views(c, images, 0, 8, np.arange(16))
            if loss == "simclr":
                order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
                z = torch.empty(16, 16, dtype=torch.float64)
                for rows in (order[:8], order[8:]):
                    z[rows] = hand.head(hand.encoder(x[rows]))
                want = slow_nt_xent(*z.chunk(2), 0.2)
            else:  # an image's views one after the other, and four images at a time
                parts = [hand.head(hand.encoder(x[i:i + 4])) for i in (0, 8, 4, 12)]
                want = slow_vicreg(torch.cat(parts[::2]), torch.cat(parts[1::2]), 25, 25, 1)[0]
            want.backward()
            trained = [(p, moved) for p, moved in zip(hand.parameters(), model.parameters()) if p.requires_grad]
            self.close(torch.cat([(p - moved).flatten() for p, moved in trained]),
                       torch.cat([0.1 * p.grad.flatten() for p, _ in trained]), 1e-9)
            for name, t in model.named_buffers():
                self.close(t.double(), hand.get_buffer(name).double(), 1e-9, name)

    def test_chunks_tell_no_pair(self):
        """Two views of an image share SimCLR's chunk as often as any two views do; each view is in one chunk."""
        x, parts = torch.arange(2.0 * 512)[:, None], []

        def encode(v):
            if torch.is_grad_enabled():
                parts.append(v.flatten().long())
            return torch.cat((v, torch.ones_like(v)), dim=1).requires_grad_()

        self.simclr.loss_backward(encode, x, self.config(chunk=128, batch_size=512))
        self.assertEqual(torch.cat(parts).sort().values.tolist(), list(range(1024)))
        part = torch.empty(1024)
        for i, rows in enumerate(parts):
            part[rows] = i
        self.assertEqual(len(parts), 4)
        self.assertAlmostEqual((part[:512] == part[512:]).double().mean().item(), 255 / 1023, delta=0.06)

    # two views

    def test_crop_boxes(self):
        """Whole pixels inside the image; area and aspect within the limits and all over them; what never fits is the
        whole image."""
        top, left, height, width = self.simclr.crop_boxes(np.random.default_rng(0), 20000, 32, 0.2)
        for v in (top, left, height, width):
            self.assertTrue((v == v.round()).all())
        self.assertTrue((top >= 0).all() and (left >= 0).all() and (top + height <= 32).all() and
                        (left + width <= 32).all())
        slack = (height + 0.5) * (width + 0.5) - height * width  # sides are rounded
        area, aspect = height * width / 1024, np.log(width / height)
        self.assertTrue((area * 1024 >= 0.2 * 1024 - slack).all())
        inside = np.log((width + 0.5) / (height - 0.5)) - aspect
        self.assertTrue((abs(aspect) <= math.log(4 / 3) + inside).all())
        few = np.histogram(area, bins=4, range=(0.2, 1))[0] / 20000
        self.assertTrue(((0.1 < few) & (few < 0.33)).all(), few)  # big ones fit less often
        low = aspect[area < 0.6]  # where all fit: log-uniform
        self.assertAlmostEqual(low.mean(), 0, delta=0.01)
        self.assertAlmostEqual(low.std(), math.log(4 / 3) / 3**0.5, delta=0.01)
        free = (height < 30) & (width < 30)
        for v, size in ((top, height), (left, width)):  # every place as often
            share = (v / (32 - size))[free]
            self.assertAlmostEqual(share.mean(), 0.5, delta=0.02)
            self.assertTrue((share == 0).any() and (share == 1).any())
        boxes = self.simclr.crop_boxes(np.random.default_rng(0), 2000, 32, 1.0)
        self.assertTrue((boxes[2:] <= 32).all() and (boxes[2] * boxes[3] > 1000).all())
        boxes = self.simclr.crop_boxes(np.random.default_rng(0), 500, 32, 1e-6)
        self.assertTrue((boxes[2:] >= 1).all())

    def test_crop_resize(self):
        """Against the crop by slicing, resized by F.interpolate, mirrored; the whole image is itself to the bit."""
        x = torch.rand(7, 3, 16, 16)
        boxes = torch.tensor([[0, 0, 16, 16], [3, 5, 8, 4], [0, 9, 16, 7], [15, 15, 1, 1], [2, 0, 9, 13],
                              [1, 1, 2, 15], [0, 0, 16, 16]]).float().T
        mirror = torch.tensor([False, True, False, True, False, True, True])
        got = self.simclr.crop_resize(x, boxes, mirror)
        for i, (top, left, height, width) in enumerate(boxes.T.int().tolist()):
            want = F.interpolate(x[i:i + 1, :, top:top + height, left:left + width].double(), (16, 16),
                                 mode="bilinear", align_corners=False)[0]
            self.close(got[i], want.flip(2) if mirror[i] else want, 1e-5, i)
        self.same(got[0], x[0])
        self.same(got[6], x[6].flip(2))

    def test_hue(self):
        """There and back, and against colorsys; greys, black and white too. A turn and a half is half a turn."""
        x = torch.rand(2, 3, 6, 6, dtype=torch.float64)
        x[0, :, 0] = torch.rand(6, dtype=torch.float64)
        x[0, :, 1], x[0, :, 2] = 0, 1
        x[0, :, 3] = (torch.rand(3, 6) > 0.5).double()  # pure colours: two channels may share the largest value
        hsv = self.simclr.rgb_to_hsv(x)
        want = torch.tensor([[[colorsys.rgb_to_hsv(*p) for p in row] for row in image]
                             for image in x.permute(0, 2, 3, 1).tolist()], dtype=torch.float64).permute(0, 3, 1, 2)
        self.close(hsv, want, 1e-12)
        self.close(self.simclr.hsv_to_rgb(hsv), x, 1e-12)
        turned = [self.simclr.turn_hue(x, torch.full((2, 1, 1, 1), t)) for t in (0.0, 0.25, 0.5, 1.5, 1 / 3)]
        self.close(turned[0], x, 1e-12)
        self.close(turned[2], turned[3], 1e-12)
        self.close(self.simclr.turn_hue(turned[1], torch.full((2, 1, 1, 1), -0.25)), x, 1e-12)
        self.close(turned[4], x.roll(1, 1), 1e-6)  # a third: red becomes green

    def test_jitter(self):
        """Each image against its own loop, in its own order; a place that is left out changes nothing, and so do
        factors of no strength."""
        x, n = torch.rand(6, 3, 4, 4), 6
        factors = torch.rand(n, 4) * torch.tensor([0.8, 0.8, 0.8, 0.2]) + torch.tensor([0.6, 0.6, 0.6, -0.1])
        orders = np.array([[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1], [1, 1, 1, 1], [-1, -1, -1, -1], [-1, 3, -1, 0]])
        got = self.simclr.colour_jitter(x.clone(), factors, orders)
        for i, order in enumerate(orders):
            self.close(got[i], slow_jitter(x[i], factors[i].tolist(), [k for k in order if k >= 0]), 1e-5, i)
        self.same(got[4], x[4])
        other = self.simclr.colour_jitter(x.clone(), factors, orders[[1] * n])
        self.assertGreater((got[0] - other[0]).abs().max(), 1e-3)
        still = torch.tensor([[1.0, 1, 1, 0]]).repeat(n, 1)
        self.close(self.simclr.colour_jitter(x.clone(), still, orders), x, 1e-6)

    def test_blur(self):
        x, sigma = torch.rand(3, 3, 8, 8), torch.tensor([0.1, 0.7, 2.0])
        big = torch.rand(1, 3, 48, 48)
        got = self.simclr.gaussian_blur(x, sigma)
        for i, channel in itertools.product(range(3), range(3)):
            self.close(got[i, channel], slow_blur(x[i, channel], sigma[i].item(), 1), 1e-5)
        self.close(self.simclr.gaussian_blur(big, sigma[2:])[0, 0], slow_blur(big[0, 0], 2.0, 2), 1e-5)
        self.close(self.simclr.gaussian_blur(x, torch.zeros(3)), x, 1e-6)

    def test_views(self):
        """A view is made of its own draws in the paper's order: crop and mirror, colours, grey, blur; whoever asks, and
        for however many of them."""
        c, images = self.config(crop_min=0.2, jitter=1.0, grey=0.3, blur=0.5, seed=3), self.images(40)
        whole = self.simclr.views(c, images, 2, 10, np.arange(20))
        self.assertEqual(whole.dtype, torch.float32)
        at = np.array([3, 19, 10, 7])
        self.close(self.simclr.views(c, images, 2, 10, at), whole[at], 1e-6)
        for other in (self.simclr.views(c, images, 3, 10, np.arange(20)),
                      self.simclr.views(dataclasses.replace(c, seed=4), images, 2, 10, np.arange(20)),
                      whole.roll(10, 0)):
            self.assertGreater((other - whole).flatten(1).abs().amax(1).min().item(), 1e-3)
        index = self.simclr.batch_index(40, 10, 3, 2, 0, 1)[0]
        rng = np.random.default_rng((3, 2, 2))
        boxes, mirror = self.simclr.crop_boxes(rng, 20, 16, 0.2), rng.random(20) < 0.5
        draws, orders = rng.uniform(-1, 1, (20, 4)), rng.permuted(np.tile(np.arange(4), (20, 1)), axis=1)
        coins, sigma = rng.random((3, 20)), rng.uniform(0.1, 2, 20)
        mean, std = (torch.tensor(s).view(3, 1, 1) for s in self.simclr.CIFAR10_STATS)
        for i in range(20):
            x = self.simclr.crop_resize(images[index[i % 10]][None] / 255, torch.tensor(boxes[:, [i]]),
                                        torch.tensor(mirror[[i]]))[0]
            if coins[0, i] < 0.8:
                x = slow_jitter(x, (draws[i] * [0.8, 0.8, 0.8, 0.2] + [1, 1, 1, 0]).tolist(), orders[i])
            if coins[1, i] < 0.3:
                x = (0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2]).expand(3, -1, -1)
            if coins[2, i] < 0.5:
                x = torch.stack([slow_blur(channel, sigma[i], 1) for channel in x])
            self.close(whole[i], (x - mean) / std, 1e-4, i)

    def test_shares(self):
        """How often a view is mirrored, jittered, grey; crop_flip leaves colours alone, and nothing is left to do at
        strength 0."""
        image = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
        image[:, 0], image[:, 1, :, 8:] = 200, 100  # red, then orange
        at, n = np.arange(2000), 1000
        mean, std = (torch.tensor(s).view(3, 1, 1) for s in self.simclr.CIFAR10_STATS)

        def share(seen, **flags):
            c = self.config(**dict(crop_min=1.0, jitter=0.5, grey=0.2) | flags)
            x = self.simclr.views(c, image, 0, n, at) * std + mean
            return torch.stack([seen(v) for v in x]).float().mean().item()

        plain = image[0] / 255
        whole = lambda v: min((v - plain).abs().max(), (v - plain.flip(2)).abs().max()) < 0.02
        mirrored = lambda v: v[1, 8, 2] > v[1, 8, 13]
        grey = lambda v: (v[0] - v[1]).abs().max() < 1e-4
        self.assertAlmostEqual(share(mirrored, augment="crop_flip"), 0.5, delta=0.05)
        self.assertAlmostEqual(share(grey, jitter=0.0), 0.2, delta=0.04)
        self.assertAlmostEqual(share(whole, grey=0.0), 0.2, delta=0.04)  # 0.8 are jittered
        self.assertGreater(share(whole, augment="crop_flip", blur=1.0), 0.8)  # but for a few aspects
        self.assertEqual(share(grey, augment="crop_flip", grey=1.0), 0)
        self.assertEqual(share(whole, jitter=0.0, grey=0.0), share(whole, augment="crop_flip"))

    def test_sheet(self):
        status, out, err = run("simclr", *self.tiny, "--show_augment", "--out", self.dir / "a")
        self.assertEqual((status, err), (0, ""))
        self.assertEqual([p.name for p in (self.dir / "a").iterdir()], ["augment.png"])
        status, out, err = run("simclr", *self.tiny, "--show_augment", "--out", self.dir / "b", "--augment",
                               "crop_flip", "--crop_min", 1)
        a, b = ((self.dir / name / "augment.png").read_bytes() for name in "ab")
        self.assertNotEqual(a, b)
        self.assertEqual(struct.unpack(">II", a[16:24]), (9 * 100 + 4, 8 * 100 + 4))  # an image and four pairs

    # batch norm, encoders, heads

    def test_batch_norm(self):
        """Against torch's own, on the whole and on parts; evaluation; running statistics need a gradient."""
        for shape in ((8, 5), (8, 5, 3, 3)):
            x, ours, theirs = torch.randn(shape), self.simclr.BatchNorm(5), nn.BatchNorm2d(5)
            view = (lambda v: v) if len(shape) == 4 else (lambda v: v[:, :, None, None])
            nn.init.uniform_(ours.weight)
            theirs.load_state_dict(ours.state_dict())
            with torch.no_grad():
                self.close(view(ours(x)), theirs(view(x)), 1e-6)
            self.assertTrue((ours.running_mean == 0).all() and (ours.running_var == 1).all())
            for splits in (0, 1, 4):
                ours.splits = splits
                theirs.reset_running_stats()
                ours.reset_running_stats()
                theirs.momentum = 0.1 / max(1, splits)
                y = torch.cat([theirs(part) for part in view(x).chunk(max(1, splits))])
                self.close(view(ours(x)), y, 1e-6)
                self.close(ours.running_var, theirs.running_var, 1e-6)
                self.close(ours.running_mean, theirs.running_mean, 1e-6)
            self.close(view(ours.eval()(x)), theirs.eval()(view(x)), 1e-6)

    def test_resnet(self):
        """resnet.py's ResNet-18 with CIFAR's stem has the same names and, on the same weights, the same features."""
        import resnet
        ours, theirs = self.simclr.ConvEncoder(), resnet.resnet18(10, stem="cifar")
        w = random_weights({k: tuple(t.shape) for k, t in theirs.state_dict().items()})
        self.assertEqual({k: t.shape for k, t in ours.state_dict().items()},
                         {k: t.shape for k, t in theirs.state_dict().items() if not k.startswith("fc.")})
        theirs.load_state_dict(w)
        ours.load_state_dict({k: t for k, t in w.items() if not k.startswith("fc.")})
        x = torch.randn(4, 3, 32, 32)
        for training in (True, False):
            self.close(ours.train(training)(x), theirs.train(training).features(x), 1e-4)
        small = self.simclr.ConvEncoder(8)
        self.assertEqual((small(x[:2, :, :16, :16]).shape, small.dim), ((2, 64), 64))

    def test_heads(self):
        """The layers of each paper's head; SimCLR's last batch norm has no shift to learn."""
        kinds = dict(simclr=["Linear", "BatchNorm", "ReLU", "Linear", "BatchNorm"], moco=["Linear", "ReLU", "Linear"],
                     vicreg=["Linear", "BatchNorm", "ReLU", "Linear", "BatchNorm", "ReLU", "Linear"])
        for loss, layers in kinds.items():
            head = self.simclr.make_head(loss, 24, 10)
            self.assertEqual([type(m).__name__ for m in head], layers)
            widths = [m.weight.shape[::-1] for m in head if isinstance(m, nn.Linear)]
            self.assertEqual([tuple(w) for w in widths], [(24, 10), (10, 10), (10, 10)] if loss == "vicreg" else
                             [(24, 24), (24, 10)])
            frozen = [k for k, p in head.named_parameters() if not p.requires_grad]
            self.assertEqual(frozen, ["4.bias"] * (loss == "simclr"))

    # optimisers

    def test_lars(self):
        """Against a loop over the authors' formula, with a matrix, a filter, a bias, and norms of 0."""
        params = [nn.Parameter(t.double()) for t in (torch.randn(4, 3), torch.randn(2, 3, 3, 3), torch.randn(5),
                                                     torch.zeros(3, 3), torch.randn(3, 2), torch.randn(2, 2))]
        grads = [[torch.randn_like(p) * (i != 4) for _ in range(4)] for i, p in enumerate(params)]
        decays = [0.01, 0.01, 0.01, 0.01, 0.0, 0.0]
        want = [slow_lars(p.detach(), g, 0.3, decay, 0.9, 1e-3) for p, g, decay in zip(params, grads, decays)]
        want[5] = params[5].detach().clone()
        optimizer = self.simclr.LARS([dict(params=[p], weight_decay=d) for p, d in zip(params, decays)], 0.3)
        optimizer.param_groups[2]["weight_decay"] = 0.0  # as make_optimizer has it for 1-D tensors
        for step in range(4):
            for p, g in zip(params[:5], grads):  # the last has no gradient: as it is
                p.grad = g[step]
            optimizer.step()
        for i, (p, w) in enumerate(zip(params, want)):
            self.close(p, w, 1e-12, i)
        p = nn.Parameter(torch.full((2, 2), 3.0))  # the trust ratio itself: a step of lr · trust · |weights|
        for scale in (1e-4, 1e4):
            p.data, p.grad = torch.full((2, 2), 3.0), scale * torch.randn(2, 2)
            self.simclr.LARS([p], 2.0).step()
            self.assertAlmostEqual((p.detach() - 3).norm().item(), 2 * 1e-3 * 6, places=6)
        q = nn.Parameter(torch.ones(3))
        q.grad = torch.full((3,), 0.5)
        self.simclr.LARS([q], 0.1).step()
        self.close(q, torch.full((3,), 0.95), 1e-6)

    def test_groups(self):
        """Weights of layers decay, biases, norms and tokens don't; what is frozen and moco's keys are in no group. The
        peak rate rises with the batch unless it is given."""
        simclr = self.simclr
        for flags in (dict(), dict(optimizer="sgd"), dict(optimizer="lars", loss="vicreg"), dict(loss="moco"),
                      dict(encoder="vit", width=16, depth=1)):
            c = self.config(**flags)
            model = self.pair(c, double=False)
            optimizer = simclr.make_optimizer(model, c)
            decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
            for name, p in model.named_parameters():
                if name.startswith("key_") or name.endswith("pos_embed") or (name == "head.4.bias" and c.loss ==
                                                                             "simclr"):
                    self.assertNotIn(id(p), decay, name)
                else:
                    matrix = name.endswith("weight") and not re.search(r"norm|bn|downsample.1|head.1.w|head.4.w", name)
                    matrix = matrix or p.dim() > 1
                    self.assertEqual(decay[id(p)], c.weight_decay if matrix else 0, name)
            kind = flags.get("optimizer", "adamw")
            self.assertEqual(type(optimizer).__name__.lower(), kind)
            self.assertEqual((c.lr, c.weight_decay), dict(sgd=(0.06 * 8 / 256, 5e-4), adamw=(2e-3, 0.05),
                                                          lars=(0.3 * 8 / 256, 1e-6))[kind])
        self.assertEqual(self.config(lr=0.7, batch_size=4).lr, 0.7)
        with mock.patch.object(Path, "is_dir", lambda path: True):
            views = [(c.crop_min, c.jitter, c.grey) for c in (self.config(), self.config(data="cifar10"), self.config(
                data="elsewhere", crop_min=0.08, jitter=0.0, grey=0.0))]
        self.assertEqual(views, [(0.4, 1, 0.8), (0.2, 0.5, 0.2), (0.08, 0, 0)])
        a = self.train("a", "--lr", 0.5, "--log_every", 1, "--warmup", 2)
        rates = [row["lr"] for row in a.rows if "lr" in row]
        want = [0.5 / 3, 1 / 3] + [0.25 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]
        self.close(torch.tensor(rates), torch.tensor(want), 1e-6)

    # evaluation

    def test_alignment(self):
        z1, z2 = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
        a, u = self.simclr.alignment_and_uniformity(z1, z2)
        z = [[v / v.norm() for v in z] for z in (z1, z2)]
        self.assertAlmostEqual(a, sum(((p - q) ** 2).sum().item() for p, q in zip(*z)) / 6)
        pairs = [[math.exp(-2 * ((v[i] - v[j]) ** 2).sum().item()) for i, j in itertools.combinations(range(6), 2)]
                 for v in z]
        self.assertAlmostEqual(u, sum(math.log(sum(p) / 15) for p in pairs) / 2)
        one = torch.ones(5, 3)
        self.assertEqual([round(v, 6) for v in self.simclr.alignment_and_uniformity(one, 2 * one)], [0, 0])

    def test_evaluation(self):
        """Of the encoder's features in evaluation mode, not the head's; beside them random init and pixels; a fresh run
        scores what random init does."""
        a = self.train("a")
        first, *_, last = [row for row in a.rows if "knn" in row]
        self.assertEqual((first["knn"], first["linear"]), (first["knn_random_init"], first["linear_random_init"]))
        model, _ = self.simclr.load_pair(self.config())
        model.load_state_dict(a.ckpt["model"])
        x, y = self.simclr.make_shapes(10000, 1)
        vx, vy = self.simclr.make_shapes(1000, 2)
        stats = self.simclr.CIFAR10_STATS
        with torch.no_grad():
            z, vz = (model.eval().encoder(self.simclr.normalise(v, stats)) for v in (x, vx))
            self.assertAlmostEqual(self.simclr.knn_accuracy(z, y, vz, vy), last["knn"])
            n = len(vx)
            two = model(self.simclr.views(self.config(), vx, 0, n, np.arange(2 * n)))
        self.assertAlmostEqual(self.simclr.rankme(vz), last["rankme"], places=2)
        align, uniform = self.simclr.alignment_and_uniformity(*two.chunk(2))
        self.assertAlmostEqual(last["alignment"], align, places=4)
        self.assertAlmostEqual(last["uniformity"], uniform, places=4)
        self.assertAlmostEqual(last["head_std"], self.simclr.spread(two[:n]), places=4)
        pixels = [self.simclr.normalise(v, stats).flatten(1) for v in (x, vx)]
        self.assertAlmostEqual(self.simclr.knn_accuracy(pixels[0], y, pixels[1], vy), last["knn_pixels"])
        final = a.rows[-1]
        self.assertLessEqual({"test_knn", "test_linear", "test_linear_10%", "test_linear_1%", "test_rankme", "test_std",
                              "test_knn_random_init", "test_linear_pixels", "peak_mb"}, {*final})
        for word in ("simclr", "random_init", "pixels"):
            self.assertRegex(a.text, rf"(?m)^ *{word} +0\.\d")

    def test_evaluation_changes_nothing(self):
        runs = [self.train(f"e{every}", "--eval_every", every, "--log_every", log) for every, log in ((2, 1), (6, 3))]
        for key in ("model", "optimizer"):
            self.same(*(r.ckpt[key] for r in runs))
        self.assertNotEqual(self.train("s", "--seed", 7).losses, self.train("t").losses)

    # runs

    def test_overfits(self):
        """A batch of eight images is told apart, whatever keeps vectors apart, and no vectors collapse."""
        for loss, flags in (("simclr", ["--temperature", 0.1, "--lr", 0.005]), ("vicreg", []),
                            ("moco", ["--queue", 16, "--optimizer", "sgd", "--lr", 0.05])):
            few = {10000: 8, 1000: 40, 2000: 40}
            shapes = lambda n, seed: self.images_and_labels(few[n], seed)
            with mock.patch.object(self.simclr, "make_shapes", shapes):
                a = self.train(loss, "--loss", loss, *flags, "--steps", 40, "--eval_every", 40, "--log_every", 1,
                               "--crop_min", 0.8, "--jitter", 0.2, "--grey", 0)
            rows = [row for row in a.rows if "loss" in row]
            last = {k: sum(row[k] for row in rows[-8:]) / 8 for k in rows[0]}
            early = {k: sum(row[k] for row in rows[1:5]) / 4 for k in rows[0]}
            if loss == "vicreg":
                self.assertLess(last["loss"], 0.75 * early["loss"], loss)
                self.assertLess(last["variance"], 0.6)
            elif loss == "simclr":
                self.assertGreater(last["accuracy"], 0.9)
                self.assertLess(last["loss"], 0.5 * early["loss"])
            else:  # its queue holds these eight images too
                self.assertGreater(last["accuracy"], early["accuracy"])

    def images_and_labels(self, n, seed):
        x, y = drawn(self.draw, n, seed)
        return x[:, :, ::2, ::2], y

    def test_bfloat16(self):
        """Every objective trains in bfloat16, its views made in float32."""
        for loss in ("simclr", "moco", "vicreg"):
            a = self.train("a", "--loss", loss, "--blur", 0.5, "--dtype", "bfloat16", "--steps", 2, "--eval_every", 2)
            self.assertTrue(all(t.dtype == torch.float32 for t in a.ckpt["encoder"].values() if t.is_floating_point()))
            x = self.simclr.views(self.config(blur=1.0), self.images(8), 0, 8, np.arange(16))
            self.assertEqual(x.dtype, torch.float32)

    def test_collapse(self):
        """Without its variance term VICReg lets its vectors shrink to one, and the log shows it."""
        flags = ["--loss", "vicreg", "--steps", 30, "--eval_every", 30, "--log_every", 5, "--optimizer", "sgd", "--lr",
                 0.01, "--covariance", 0]
        hinges = [[row["variance"] for row in self.train(name, *flags, *more).rows if "variance" in row][-1]
                  for name, more in (("a", []), ("b", ["--variance", 0]))]
        self.assertLess(hinges[0], 0.7)
        self.assertGreater(hinges[1], 0.9)

    def test_resume(self):
        """6 steps are 3, stop, resume, 3 more: bit for bit, for every objective and optimiser."""
        for kind in (["--chunk", 4, "--optimizer", "lars"], ["--loss", "moco"],
                     ["--loss", "vicreg", "--optimizer", "sgd"]):
            with self.subTest(kind):
                a = self.train("a", *kind, "--blur", 0.5)
                b = self.train("b", *kind, "--blur", 0.5, "--stop_at", 3, "--log_every", 1)
                self.assertEqual((b.ckpt["step"], b.rows[-1]["step"]), (3, 3))
                self.assertFalse(torch.equal(*(r.ckpt["model"]["encoder.conv1.weight"] for r in (a, b))))
                with open(b.out / "log.jsonl", "a") as file:  # what a killed run may have left
                    file.write('{"step": 5, "loss": 9.0}\n{"step": 6, "lo')
                b = self.train("b", "--resume", tiny=False)
                for key in ("model", "optimizer", "step", "best", "encoder"):
                    self.same(a.ckpt[key], b.ckpt[key], key)
                self.assertEqual(a.knn, b.knn)
                self.assertEqual(*(r.rows[-1]["test_linear"] for r in (a, b)))
                if "--chunk" in kind:  # nothing is left to do
                    self.same_run(b, self.train("b", "--resume", tiny=False))
                for r in (a, b):
                    shutil.rmtree(r.out)

    def test_compile(self):
        """The compiled network learns as the eager one does, with chunks too, batch norm's statistics included."""
        compiled, name = functools.partial(torch.compile, backend="eager"), "encoder.bn1.running_mean"
        for flags in ([], ["--chunk", 4], ["--loss", "moco"]):
            with self.subTest(flags=flags), mock.patch.object(torch, "compile", compiled):
                a = self.train("a", *flags, "--steps", 3, "--compile")
                b = self.train("b", *flags, "--steps", 3)
                for step, loss in b.losses.items():
                    self.assertAlmostEqual(a.losses[step], loss, delta=1e-4 * loss)
                self.close(a.ckpt["model"][name], b.ckpt["model"][name], 1e-5)

    def test_torchrun(self):
        """Two processes update as one does with the joined batch, batch norm, queue and all; one of them speaks."""
        kinds = dict(simclr=[], moco=["--loss", "moco", "--bn_splits", 4, "--queue", 32],
                     joined=["--loss", "moco", "--bn_splits", 1, "--queue", 32], vicreg=["--loss", "vicreg"])
        flags = [*self.tiny, "--steps", 3, "--optimizer", "sgd", "--lr", 0.002, "--eval_every", 3, "--log_every", 1]
        (self.dir / "two.py").write_text(  # one group for all runs: to start processes takes longer than they do
            "import json\nimport sys\nimport torch\n"
            f"import simclr\nimport {Path(inspect.getfile(small_simclr)).stem} as t\n"
            "torch.set_num_threads(1)\ntorch.distributed.init_process_group('gloo')\n"
            "end = torch.distributed.destroy_process_group\n"
            "torch.distributed.init_process_group = torch.distributed.destroy_process_group = lambda *a: None\n"
            "with t.small_simclr():\n    for argv in json.loads(sys.argv[1]):\n        assert simclr.main(argv) == 0\n"
            "torch.distributed.barrier()\nend()\n")
        runs = {name: [str(f) for f in [*flags, *kind, "--out", self.dir / f"two_{name}"]]
                for name, kind in kinds.items()}
        done = child("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", self.dir / "two.py",
                     json.dumps([*runs.values()]), cwd=self.dir)
        self.assertEqual(done.returncode, 0, done.stderr[-2000:])
        self.assertEqual(done.stdout.count("step 3/3 | loss"), len(kinds))
        for name, kind in kinds.items():
            with self.subTest(name):
                one = self.train(f"one_{name}", *flags, *kind, "--batch_size", 16)
                two = self.look(self.dir / f"two_{name}")
                self.assertEqual(list(one.ckpt["model"]), list(two.ckpt["model"]))
                start = self.train("start", *flags, *kind, "--stop_at", 1, "--lr", 1e-12).ckpt["model"]
                a, b, c = (torch.cat([r[k].flatten() for k in dict(start) if k.endswith(("weight", "bias", "queue"))])
                           for r in (start, one.ckpt["model"], two.ckpt["model"]))
                self.close(c - a, b - a, 0.05)  # fp32's rounding grows; what is missed would be half or all of it
                for step, loss in one.losses.items():
                    self.assertAlmostEqual(loss / two.losses[step], 1, delta=1e-3)

    def test_gather(self):
        """Two processes' losses of vectors: their mean, and the gradients that DistributedDataParallel's mean makes,
        are those of the joined batch, for NT-Xent and VICReg, chunked too."""
        net = """if True:
            class Net(torch.nn.Module):
                def __init__(self, w):
                    super().__init__()
                    self.w = torch.nn.Parameter(w)

                def forward(self, x, passes=1):
                    return torch.tanh(x.double().mean((2, 3)).repeat(1, 2) @ self.w)
            """
        code = f"""import contextlib, torch, torch.distributed as dist, simclr\n{net}""" + """
            torch.set_num_threads(1)
            dist.init_process_group("gloo")
            rank, z = dist.get_rank(), torch.load("z.pt")
            own = slice(4 * rank, 4 * rank + 4)
            out = {}
            for name, loss in dict(nt=lambda a, b: simclr.nt_xent(a, b, 0.3), vic=simclr.vicreg_loss).items():
                a, b = (v[own].clone().requires_grad_() for v in z)
                value, scores = loss(a, b)
                value.backward()
                out[name] = [value.detach(), a.grad / 2, b.grad / 2, *scores.values()]
            x, w = torch.load("x.pt"), torch.load("w.pt").requires_grad_()
            own = torch.cat((torch.arange(4), torch.arange(8, 12))) + 4 * rank
            c = simclr.Config(batch_size=4, chunk=2)
            value, _ = simclr.loss_backward(lambda v: torch.tanh(v @ w), x[own], c)
            dist.all_reduce(w.grad)
            out["chunk"] = [value.detach(), w.grad / 2]
            for loss in ("simclr", "vicreg"):
                model = simclr.Contrastive(simclr.ConvEncoder(8), loss, 6, 4).double().train()
                model.load_state_dict(torch.load(f"{loss}.pt"))
                for module in model.modules():
                    if isinstance(module, simclr.BatchNorm):
                        module.splits = 0
                images = torch.load("images.pt")[own]
                encode = lambda v: model(v, passes=1 if loss == "simclr" else 2)
                simclr.loss_backward(encode, images, simclr.Config(batch_size=4, loss=loss))
                grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
                dist.all_reduce(grads)
                out[loss] = [grads / 2, *(t for k, t in model.named_buffers() if "running" in k)]
            net = Net(w.detach())
            simclr.contrastive_step(torch.nn.parallel.DistributedDataParallel(net), net, torch.optim.SGD([net.w], 1.0),
                                    contextlib.nullcontext(), torch.load("images.pt").mul(50).byte(),
                                    simclr.Config(batch_size=4, chunk=2, lr=1.0, warmup=0), 0, 10**9, rank, 2)
            out["step"] = net.w.detach()
            torch.save(out, f"{rank}.pt")
            dist.barrier()
            dist.destroy_process_group()"""
        z = [torch.randn(8, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        x, w = torch.randn(16, 6, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
        for name, content in dict(z=[v.detach() for v in z], x=x, w=w.detach()).items():
            torch.save(content, self.dir / f"{name}.pt")
        images, models = torch.randn(16, 3, 16, 16, dtype=torch.float64), {}
        torch.save(images, self.dir / "images.pt")
        for loss in ("simclr", "vicreg"):
            models[loss] = self.simclr.Contrastive(self.simclr.ConvEncoder(8), loss, 6, 4).double().train()
            torch.save(models[loss].state_dict(), self.dir / f"{loss}.pt")
        (self.dir / "g.py").write_text(code)
        done = child("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", self.dir / "g.py",
                     cwd=self.dir)
        self.assertEqual(done.returncode, 0, done.stderr[-2000:])
        a, b = (torch.load(self.dir / f"{rank}.pt") for rank in (0, 1))
        slow = dict(nt=lambda *v: slow_nt_xent(*v, 0.3), vic=lambda *v: slow_vicreg(*v, 25, 25, 1)[0])
        for name, loss in slow.items():
            want = loss(*z)
            grads = torch.autograd.grad(want, z)
            self.close((a[name][0] + b[name][0]) / 2, want, 1e-12, name)
            for i, g in enumerate(grads):
                self.close(torch.cat((a[name][1 + i], b[name][1 + i])), g, 1e-11, name)
        want = slow_nt_xent(*torch.tanh(x @ w).chunk(2), 0.2)
        self.close((a["chunk"][0] + b["chunk"][0]) / 2, want, 1e-12)
        for r in (a, b):
            self.close(r["chunk"][1], torch.autograd.grad(want, w, retain_graph=True)[0], 1e-11)
        Net = {"torch": torch}
        exec(net, Net)
        one = Net["Net"](w.detach().clone())
        self.simclr.contrastive_step(one, one, torch.optim.SGD([one.w], 1.0), contextlib.nullcontext(),
                                     images.mul(50).byte(), self.config(lr=1.0, warmup=0), 0, 10**9, 0, 1)
        for r in (a, b):  # pieces on each of two processes: gradients are exchanged once
            self.close(r["step"] - w.detach(), one.w.detach() - w.detach(), 1e-5)
        for loss, model in models.items():  # the real network, in which batch norm sees all processes' images
            self.simclr.loss_backward(lambda v: model(v, passes=1 if loss == "simclr" else 2), images,
                                      self.config(loss=loss))
            grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
            for r in (a, b):
                self.close(r[loss][0], grads, 1e-9, loss)
                for got, (name, want) in zip(r[loss][1:], ((k, t) for k, t in model.named_buffers() if "running" in k)):
                    self.close(got, want, 1e-9, name)

    def test_ctrl_c(self):
        """Between two steps: a checkpoint, how to go on, status 130; and the run goes on bit for bit."""
        a, step, calls = self.train("a"), self.simclr.contrastive_step, []

        def interrupted(*args):
            calls.append(1)
            if len(calls) == 5:
                signal.raise_signal(signal.SIGINT)
            return step(*args)

        handler = signal.getsignal(signal.SIGINT)
        with mock.patch.object(self.simclr, "contrastive_step", interrupted):
            b = self.train("b", status=130)
        self.assertIs(signal.getsignal(signal.SIGINT), handler)
        self.assertEqual((b.ckpt["step"], len(calls)), (5, 5))
        command = re.search(r"python simclr\.py (.*--resume.*)", b.text)[1]
        self.assertEqual(run("simclr", *shlex.split(command))[0], 0)
        b = self.look(b.out)
        for key in ("model", "optimizer", "best"):
            self.same(a.ckpt[key], b.ckpt[key], key)

    def test_best(self):
        """best.pt is the checkpoint with the best kNN on validation images; the test row and the neighbours are its."""
        a = self.train("a", "--eval_every", 1, "--lr", 0.3)
        best = torch.load(a.out / "best.pt", weights_only=True)
        self.assertEqual((best["step"], best["best"]), (max(a.knn, key=a.knn.get), max(a.knn.values())))
        self.assertEqual([*a.knn], [*range(7)])
        head = (a.out / "neighbours.png").read_bytes()
        classes = len({*self.simclr.make_shapes(2000, 3)[1].tolist()})
        self.assertEqual(struct.unpack(">II", head[16:24]), (9 * 100 + 4, classes * 100 + 4))
        xml.etree.ElementTree.parse(a.out / "curves.svg")
        self.assertIn("120 images", a.text)
        b = self.train("b", "--full_train")  # learns from the validation images, is probed as ever
        self.assertIn("160 images", b.text)
        self.assertEqual(b.rows[0]["knn_random_init"], a.rows[0]["knn_random_init"])
        self.assertIn("60 images", self.train("c", "--labels", 0.5).text)

    def test_neighbours(self):
        """Each row: a class's first test image, then the training images at the least angle."""
        images, labels = self.images(12, size=8), torch.arange(12) % 3
        encode, sheets = lambda x: x.flatten(1)[:, :6], []
        with mock.patch.object(self.simclr, "write_sheet", lambda path, rows: sheets.append(rows)):
            self.simclr.draw_neighbours(encode, (images[:9], labels[:9]), (images[9:], labels[9:]), "x",
                                        contextlib.nullcontext())
        z = self.simclr.normalise(images, self.simclr.CIFAR10_STATS).flatten(1)[:, :6]
        for query, row in zip((9, 10, 11), sheets[0]):
            self.same(row[0], images[query])
            order = sorted(range(9), key=lambda i: -F.cosine_similarity(z[query], z[i], 0).item())
            for got, i in zip(row[1:], order):
                self.same(got, images[i])

    def test_not_finite(self):
        """The run stops with status 1, names the step, and keeps the last good checkpoint."""
        for every, says in ((6, "(nan|inf)"), (1, "features")):  # with an evaluation before the next loss, too
            status, text, err = run("simclr", *self.tiny, "--out", self.dir / "a", "--loss", "vicreg", "--lr", 9e18,
                                    "--optimizer", "sgd", "--warmup", 0, "--log_every", 1, "--eval_every", every)
            self.assertEqual(status, 1, err)
            self.assertRegex(err, rf"\Asimclr\.py: [^\n]*{says}[^\n]* step [123]\b[^\n]*\n\Z")
            self.assertEqual(torch.load(self.dir / "a/ckpt.pt", weights_only=True)["step"], 0)

    # bad input

    def test_bad_flags(self):
        for flags in """--encoder resnet50, --encoder=, --loss byol, --augment none, --optimizer adam, --dtype int8,
                --lr nan, --lr 0, --lr -1, --labels 0, --labels 2, --crop_min 0, --crop_min 1.5, --jitter 2, --grey 1.1,
                --blur -0.5, --width 0, --width 12, --width -8, --encoder vit --width 100, --depth 0, --head_dim 0,
                --temperature 0, --temperature -0.5, --temperature nan, --temperature inf, --chunk -1, --chunk 1,
                --chunk 3, --chunk 16, --loss moco --chunk 4, --queue 0, --loss moco --queue 12, --loss moco --queue 4,
                --momentum 1.1, --momentum -1, --loss moco --bn_splits 3, --loss moco --bn_splits 8, --bn_splits 0,
                --invariance -1, --variance nan, --covariance inf, --weight_decay -1, --warmup -1, --batch_size 0,
                --batch_size 1, --probe_images 0, --epochs 0, --epochs nan, --steps 0, --steps 1.5, --stop_at 0,
                --eval_every 0, --log_every 0, --seed -1, --device nowhere, --data nowhere, --data=, --init=,
                --init nowhere.pt, --resume, --resume --init x.pt, --no_such_flag 1, --temp 1, --steps, stray
                """.split(","):
            self.bad(*self.tiny, *flags.split())
        for flags, says in (("--temperature 0", ("--temperature", "above 0")),
                            ("--batch_size 1", ("--batch_size 1", "2 or more")), ("--loss byol", ("byol", "vicreg")),
                            ("--loss moco --queue 12", ("--queue 12", "8 images"))):
            self.bad(*self.tiny, *flags.split(), says=says)
        self.bad("--data", self.dir / "nowhere", "--lr", "nan", says="--lr")  # flags come before data
        (self.dir / "text.txt").write_text("hello")
        self.bad(*self.tiny, "--out", self.dir / "text.txt", says="text.txt", status=1)
        with mock.patch.dict(os.environ, WORLD_SIZE="3"):  # three processes: 24 images a step
            self.bad(*self.tiny, "--loss", "moco", says=("--queue 32", "24"))
            self.bad(*self.tiny, "--loss", "moco", "--queue", 48, says=("--bn_splits 2", "3 processes"))

    def test_bad_checkpoints(self):
        a = self.train("a", "--steps", 1)
        good, saved = (a.out / "best.pt").read_bytes(), torch.load(a.out / "best.pt", weights_only=True)

        def checkpoint(name, content):
            torch.save(content, self.dir / name)
            return self.dir / name

        foreign = [checkpoint("list.pt", [1, 2]), checkpoint("object.pt", Evil(self.dir / "marker"))]
        foreign += [checkpoint(f"no_{key}.pt", {k: v for k, v in saved.items() if k != key})
                    for key in ("model", "config", "step", "model_config", "encoder", "encoder_config")]
        foreign += [checkpoint("width.pt", saved | dict(encoder_config=dict(width=16))),
                    checkpoint("none.pt", saved | dict(encoder_config=None)),
                    checkpoint("names.pt", saved | dict(encoder={"cls_token": torch.ones(1)}))]
        (self.dir / "cut.pt").write_bytes(good[:len(good) // 2])
        (self.dir / "noise.pt").write_bytes(os.urandom(5000))
        for path in [*foreign, self.dir / "cut.pt", self.dir / "noise.pt"]:
            self.bad(*self.tiny, "--init", path, says=path.name)
        self.assertFalse((self.dir / "marker").exists())
        for flags in ("--width 16", "--encoder vit", "--loss moco", "--head_dim 24", "--optimizer lars"):
            self.bad("--resume", "--out", a.out, *flags.split(), says="ckpt.pt")
        (a.out / "ckpt.pt").write_bytes((a.out / "ckpt.pt").read_bytes()[:-999])
        self.bad("--resume", "--out", a.out, says="ckpt.pt")

    def test_command_line(self):
        """As a program: the exit status, and one line on stderr."""
        done = child(HERE / "simclr.py", "--temperature", "0", cwd=self.dir)
        self.assertEqual((done.returncode, done.stdout, snapshot(self.dir)), (2, "", {}))
        self.assertRegex(done.stderr, r"\Asimclr\.py: [^\n]+\n\Z")


# --------------------------------------------------------------------------------------------------------------------
# ijepa.py


def slow_pairs(w, prefix=""):
    """A block's arguments for slow_encoder_block, one block after the other, of a state dict."""
    n = 0
    while f"{prefix}blocks.{n}.norm1.weight" in w:
        yield [(w[f"{prefix}blocks.{n}.{part}.weight"], w[f"{prefix}blocks.{n}.{part}.bias"])
               for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")]
        n += 1


def slow_ijepa_encoder(w, image, ids, heads):
    """An image's patches ids alone, (K, C), by official names: nothing else of the image is there."""
    x = slow_patches(image[None], w["patch_embed.proj.weight"], w["patch_embed.proj.bias"]) + w["pos_embed"]
    x = torch.stack([x[0, i] for i in ids])[None]
    for pairs in slow_pairs(w):
        x = slow_encoder_block(x, heads, *pairs)
    return slow_layer_norm(x, w["norm.weight"], w["norm.bias"])[0]


def slow_ijepa_predictor(w, context, context_ids, target_ids, heads):
    """An image's predictions (M, C) for one block of patches, from the encoder's (K, C) of patches context_ids."""
    x = context @ w["predictor_embed.weight"].T + w["predictor_embed.bias"]
    x = [row + w["predictor_pos_embed"][0, i] for row, i in zip(x, context_ids)]
    x = torch.stack(x + [w["mask_token"][0, 0] + w["predictor_pos_embed"][0, i] for i in target_ids])[None]
    for pairs in slow_pairs(w, "predictor_"):
        x = slow_encoder_block(x, heads, *pairs)
    x = slow_layer_norm(x, w["predictor_norm.weight"], w["predictor_norm.bias"])[0, len(context_ids):]
    return x @ w["predictor_proj.weight"].T + w["predictor_proj.bias"]


def slow_ijepa_loss(w, w_target, w_predictor, images, contexts, blocks, heads, predictor_heads):
    """The loss in loops: smooth L1 between each prediction and what the target encoder says of the full image there,
    less its mean, over its deviation. contexts: ids of each image; blocks: of each image, four lists of ids."""
    total, count = 0.0, 0
    for image, context_ids, targets in zip(images, contexts, blocks):
        z = slow_ijepa_encoder(w_target, image, range(w["pos_embed"].size(1)), heads)
        z = z - z.mean(1, keepdim=True)
        z = z / ((z**2).mean(1, keepdim=True) + 1e-5) ** 0.5
        context = slow_ijepa_encoder(w, image, context_ids, heads)
        for ids in targets:
            error = slow_ijepa_predictor(w_predictor, context, context_ids, ids, predictor_heads) - torch.stack(
                [z[i] for i in ids])
            small = error.abs() < 1
            total = total + torch.where(small, error**2 / 2, error.abs() - 0.5).sum()
            count += error.numel()
    return total / count


def official_ijepa_shapes(dim, depth, patch, image, predictor_dim, predictor_depth, encoder=True):
    """Names and shapes of the published encoder, or of its predictor."""
    N = (image // patch) ** 2
    if encoder:
        shapes = {"pos_embed": (1, N, dim), "patch_embed.proj.weight": (dim, 3, patch, patch),
                  "patch_embed.proj.bias": (dim,), "norm.weight": (dim,), "norm.bias": (dim,)}
    else:
        D = predictor_dim
        shapes = {"mask_token": (1, 1, D), "predictor_pos_embed": (1, N, D), "predictor_embed.weight": (D, dim),
                  "predictor_embed.bias": (D,), "predictor_norm.weight": (D,), "predictor_norm.bias": (D,),
                  "predictor_proj.weight": (dim, D), "predictor_proj.bias": (dim,)}
    name, C, n = ("blocks", dim, depth) if encoder else ("predictor_blocks", predictor_dim, predictor_depth)
    for i, (part, *shape) in itertools.product(range(n), (
            ("norm1", C), ("attn.qkv", 3 * C, C), ("norm2", C), ("attn.proj", C, C), ("mlp.fc1", 4 * C, C),
            ("mlp.fc2", C, 4 * C))):
        shapes |= {f"{name}.{i}.{part}.weight": tuple(shape), f"{name}.{i}.{part}.bias": (shape[0],)}
    return shapes


def slow_conditionals(x, perplexity):
    """t-SNE's p_{j|i}: for each row the width of the Gaussian at which the row's perplexity is that, by a scan."""
    N, rows = len(x), []
    for i in range(N):
        d = torch.stack([((x[i] - x[j]) ** 2).sum() for j in range(N) if j != i])
        low, high = -30.0, 30.0  # of the logarithm of the precision
        for _ in range(80):
            p = torch.softmax(-d * math.exp((low + high) / 2), 0)
            entropy = -(p * p.clamp(min=1e-300).log()).sum()
            low, high = ((low + high) / 2, high) if entropy > math.log(perplexity) else (low, (low + high) / 2)
        rows.append(torch.cat((p[:i], p.new_zeros(1), p[i:])))
    return torch.stack(rows)


def slow_kl(P, y):
    """KL(P ‖ Q) of a map y (N, 2): Q from Student's t with one degree of freedom, over all pairs."""
    weights = 1 / (1 + (y[:, None] - y[None]).square().sum(2))
    weights = weights * (1 - torch.eye(len(y), dtype=y.dtype))
    Q = weights / weights.sum()
    there = P > 0
    return (P[there] * (P[there] / Q[there]).log()).sum()


def small_ijepa():
    """A patch of ijepa.py for runs that take half a second: few images, and short probes."""
    import ijepa
    draw, few = ijepa.make_shapes, {10000: 160, 1000: 40, 2000: 40}
    return mock.patch.multiple(
        ijepa, make_shapes=lambda n, seed: drawn(draw, few.get(n, n), seed),
        linear_probe=functools.partial(ijepa.linear_probe, epochs=1, at_least=4, rates=(0.1, 1)))


class TestIJEPA(Case):
    @classmethod
    def setUpClass(cls):
        import ijepa
        cls.ijepa, cls.draw = ijepa, staticmethod(ijepa.make_shapes)
        cls.threads = torch.get_num_threads()
        torch.set_num_threads(1)

    @classmethod
    def tearDownClass(cls):
        torch.set_num_threads(cls.threads)
        drawn.cache_clear()

    def setUp(self):
        super().setUp()
        torch.manual_seed(0)
        patch = small_ijepa()
        patch.start()
        self.addCleanup(patch.stop)
        self.tiny = """--batch_size 16 --steps 12 --eval_every 6 --log_every 3 --warmup 2 --dtype float32 --dim 32
            --patch_size 8 --depth 1 --heads 2 --predictor_dim 16 --predictor_depth 1 --predictor_heads 2
            --probe_images 80""".split()

    # helpers

    def train(self, name, *flags, tiny=True, status=0):
        """A small run into the folder name: its out, rows of the log, text, checkpoint."""
        out = self.dir / name
        got, text, err = run("ijepa", *(self.tiny if tiny else ()), "--out", out, *flags)
        self.assertEqual(got, status, err)
        return self.look(out, text, err)

    def look(self, out, text="", err=""):
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        return SimpleNamespace(out=out, rows=rows, text=text, err=err,
                               ckpt=torch.load(out / "ckpt.pt", weights_only=True),
                               losses={r["step"]: r["loss"] for r in rows if "loss" in r},
                               val={r["step"]: r["val_loss"] for r in rows if "val_loss" in r})

    def same_run(self, a, b):
        """The same parameters, optimiser, best probe, and rows of the log but for times, bit for bit."""
        for key in ("model", "optimizer", "step", "best", "encoder"):
            self.same(a.ckpt[key], b.ckpt[key], key)
        times = ("ms", "seconds", "images_per_s", "peak_mb")
        self.assertEqual(*([{k: v for k, v in row.items() if k not in times} for row in r.rows] for r in (a, b)))

    def bad(self, *flags, says=(), status=2):
        """Bad input: the status, one line on stderr that begins with the script's name, nothing on disk changes."""
        before = snapshot(self.dir)
        with self.subTest(flags=" ".join(map(str, flags))[-90:]), folder(self.dir):
            got, out, err = run("ijepa", *flags)
            self.assertEqual(got, status, err)
            self.assertRegex(err, r"\Aijepa\.py: [^\n]+\n\Z")
            for word in [says] if isinstance(says, str) else says:
                self.assertIn(str(word), err)
            self.assertNotIn("Traceback", out)
            self.assertTrue(snapshot(self.dir) == before, "files came, went or changed")

    def encoder(self, image_size=16, patch_size=4, dim=24, depth=2, heads=3, seed=0):
        """A small encoder in fp64 with random weights, its positions too; and those weights."""
        model = self.ijepa.Encoder(image_size, patch_size, dim, depth, heads).double()
        w = random_vit({k: tuple(t.shape) for k, t in model.state_dict().items()}, seed)
        w = {k: t.double() for k, t in w.items()}
        model.load_state_dict(w)
        return model.eval(), w

    def predictor(self, num_patches=16, dim=24, predictor_dim=16, depth=2, heads=2, seed=1):
        model = self.ijepa.Predictor(num_patches, dim, predictor_dim, depth, heads).double()
        w = random_vit({k: tuple(t.shape) for k, t in model.state_dict().items()}, seed)
        w = {k: t.double() for k, t in w.items()}
        model.load_state_dict(w)
        return model.eval(), w

    def images(self, n, size=32, seed=0):
        g = torch.Generator().manual_seed(seed)
        return torch.randint(0, 256, (n, 3, size, size), generator=g, dtype=torch.uint8)

    def pixels(self, x, ids, patch=4):
        """Where (3, S, S) the patches ids of an image are."""
        grid = x.size(-1) // patch
        where = torch.zeros(grid, grid, dtype=torch.bool)
        where.view(-1)[list(ids)] = True
        return where.repeat_interleave(patch, 0).repeat_interleave(patch, 1).expand(3, -1, -1)

    def config(self, **more):
        return self.ijepa.Config(**{"batch_size": 8, "steps": 20, "warmup": 3, **more})

    # masks

    def masks(self, batch, grid, seed=0, **more):
        """Masks as sets: [(context, [four targets])], one pair for each image; what the contract says is checked."""
        return self.as_sets(self.ijepa.sample_masks(batch, grid, self.generator(seed), **more), batch, grid)

    def generator(self, seed):
        return torch.Generator().manual_seed(seed)

    def as_sets(self, masks, batch, grid):
        context_ids, real, targets = masks
        self.assertEqual((context_ids.dtype, real.dtype, context_ids.shape), (torch.int64, torch.bool, real.shape))
        counts = real.sum(dim=1)
        self.assertEqual((len(real), counts.max().item()), (batch, real.size(1)))  # no wider than it must be
        self.same(real, torch.arange(real.size(1)) < counts[:, None])  # padding is at the end
        self.assertGreater(counts.min().item(), 0)
        self.assertEqual(len({t.shape for t in targets}), 1)  # one block size per batch
        for ids in (context_ids, *targets):
            self.assertTrue(ids.dtype == torch.int64 and 0 <= ids.min() and ids.max() < grid**2)
        sets = []
        for n, (ids, count) in enumerate(zip(context_ids.tolist(), counts.tolist())):
            blocks = [t[n].tolist() for t in targets]
            sets.append((set(ids[:count]), [set(b) for b in blocks]))
            self.assertEqual((len(sets[-1][0]), [len(b) for b in sets[-1][1]]), (count, [len(b) for b in blocks]))
        return sets

    def box(self, ids, grid):
        """First row, first column, height and width of the smallest rectangle around ids."""
        rows, columns = zip(*(divmod(i, grid) for i in ids))
        return min(rows), min(columns), max(rows) - min(rows) + 1, max(columns) - min(columns) + 1

    def test_blocks(self):
        """Targets are four rectangles, of .15 to .2 of the patches and an aspect of .75 to 1.5; the context is one of
        .85 to 1 and square, less all of them."""
        for grid, batches in ((8, 60), (14, 30), (24, 10)):
            for seed in range(batches):
                sets = self.masks(12, grid, seed)
                [(h, w)] = {self.box(b, grid)[2:] for _, blocks in sets for b in blocks}
                around = [self.box(context, grid)[2:] for context, _ in sets]
                H, W = (max(sides) for sides in zip(*around))

                def fits(h, w, scale, aspect, slack=0.51):
                    """Some share and aspect of these ranges, rounded, gives these sides."""
                    return any(abs(h - (s * grid**2 * a) ** 0.5) <= slack and abs(w - (s * grid**2 / a) ** 0.5) <= slack
                               for s in np.linspace(*scale, 41) for a in np.linspace(*aspect, 61))

                self.assertTrue(fits(h, w, (0.15, 0.2), (0.75, 1.5)), (grid, h, w))
                self.assertTrue(fits(H, W, (0.85, 1), (1, 1), 1.01 if grid > 8 else 0.51), (grid, H, W))
                for context, blocks in sets:
                    self.assertEqual(len(blocks), 4)
                    for b in blocks:
                        y, x, _, _ = self.box(b, grid)
                        self.assertEqual(b, {i * grid + j for i in range(y, y + h) for j in range(x, x + w)})
                    gone = set().union(*blocks)
                    self.assertFalse(context & gone)
                    y, x, _, _ = self.box(context, grid)
                    wanted = [{i * grid + j for i in range(top, top + H) for j in range(left, left + W)} - gone
                              for top in range(max(0, y - H), min(y, grid - H) + 1)
                              for left in range(max(0, x - W), min(x, grid - W) + 1)]
                    self.assertIn(context, wanted)  # nothing but the targets is missing from the rectangle

    def test_positions_of_blocks(self):
        """Every place at which a block fits is as likely, the last row and column too, and each image's its own."""
        B, grid = 6000, 8
        context_ids, real, targets = self.ijepa.sample_masks(B, grid, self.generator(3))

        def sides(ids):  # (B, M): the height and width of each image's
            return [(t.amax(1) - t.amin(1) + 1).max().item() for t in (ids // grid, ids % grid)]

        h, w = sides(targets[0])
        places = (grid - h + 1) * (grid - w + 1)
        corners = torch.stack([ids.amin(dim=1) for ids in targets])  # (4, B)
        for first in corners:
            counts = torch.bincount(first, minlength=grid**2).double()
            self.assertEqual((counts > 0).sum().item(), places)
            chi = ((counts[counts > 0] - B / places) ** 2 / (B / places)).sum().item()
            self.assertLess(abs(chi - (places - 1)), 6 * (2 * (places - 1)) ** 0.5)
        self.assertLess((torch.corrcoef(corners.double()) - torch.eye(4)).abs().max().item(), 0.1)
        # a context's patch: in the rectangle, and in none of the targets, all of which lie anywhere
        H, W = sides(context_ids.where(real, context_ids[:, :1]))

        def covers(size):
            """The probability that a line's i-th patch is in an interval of that size which lies anywhere."""
            places = grid - size + 1
            return torch.tensor([sum(top <= i < top + size for top in range(places)) / places for i in range(grid)])

        inside = covers(H)[:, None] * covers(W)
        free = (1 - covers(h)[:, None] * covers(w)) ** 4
        found = torch.bincount(context_ids[real], minlength=grid**2).view(grid, grid) / B
        expected = inside * free
        self.assertLess(((found - expected).abs() / (expected * (1 - expected) / B).sqrt()).max().item(), 5)

    def test_draws(self):
        """Share and aspect of the targets and the context's share come from draws of their own, and fill their
        ranges."""
        drawn_ = []
        for seed in range(300):
            context_ids, real, targets = self.ijepa.sample_masks(6, 32, self.generator(seed))
            first = targets[0][0]
            h, w = ((t.max() - t.min() + 1).item() for t in (first // 32, first % 32))
            ids = context_ids[real]
            side = max((t.max() - t.min() + 1).item() for n in range(6) for ids in [context_ids[n][real[n]]]
                       for t in (ids // 32, ids % 32))
            drawn_.append((h * w / 1024, math.log(h / w), side))
        scale, aspect, side = torch.tensor(drawn_).T
        self.assertTrue(0.135 < scale.min() < 0.158 and 0.19 < scale.max() < 0.215, (scale.min(), scale.max()))
        ratios = aspect.exp()
        self.assertTrue(0.7 < ratios.min() < 0.82 and 1.4 < ratios.max() < 1.6, (ratios.min(), ratios.max()))
        self.assertEqual((side.min().item() in (29, 30), side.max().item() in (31, 32)), (True, True))
        self.assertLess((torch.corrcoef(torch.stack((scale, aspect, side))) - torch.eye(3)).abs().max().item(), 0.25)

    def test_coverage(self):
        """10,000 draws on 8 × 8: every patch occurs as context and as target, the commonest not much more often."""
        seen, generator = torch.zeros(2, 64), self.generator(0)
        for _ in range(400):
            context_ids, real, targets = self.ijepa.sample_masks(25, 8, generator)
            seen[0] += torch.bincount(context_ids[real], minlength=64)
            seen[1] += torch.bincount(torch.cat(targets, dim=1).flatten(), minlength=64)
        most = seen.amax(dim=1) / seen.amin(dim=1)
        self.assertTrue(most[0] <= 6 and most[1] <= 15, most)

    def test_every_grid(self):
        """It ends on every grid from 3 × 3 to 32 × 32, with nothing empty; the generator decides everything."""
        for grid in range(3, 33):
            for seed in range(4):
                sets = self.masks(16, grid, seed)
                for context, blocks in sets:
                    self.assertTrue(context and all(blocks) and not context & set().union(*blocks), grid)
        generator, again = self.generator(5), self.generator(5)
        first = self.ijepa.sample_masks(9, 8, generator)
        torch.manual_seed(1)
        np.random.seed(1)
        self.same(list(first), list(self.ijepa.sample_masks(9, 8, again)))
        second = self.ijepa.sample_masks(9, 8, generator)
        self.same(list(second), list(self.ijepa.sample_masks(9, 8, again)))
        self.assertFalse(torch.equal(first[2][0][:, 0], second[2][0][:, 0]))
        states = torch.get_rng_state()
        self.ijepa.sample_masks(9, 8, generator)
        self.assertTrue(torch.equal(states, torch.get_rng_state()))  # the global state is left alone

    # encoder and predictor

    def encode(self, model, images, ids, real=None):
        return model(images, ids, real)

    def predict(self, model, context, context_ids, real, target_ids):
        return model(context, context_ids, target_ids, real)

    def some_ids(self, B, K, N=16, seed=0):
        """K different patches of each of B images, in any order: (B, K)."""
        return torch.rand(B, N, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)[:, :K]

    def test_encoder(self):
        """On some patches, in any order, against a loop that has nothing else; gradients, too. On all it is the
        encoder of the full image, permuted."""
        model, w = self.encoder()
        x = torch.randn(3, 3, 16, 16).double()
        for K in (1, 7, 16):
            ids = self.some_ids(3, K)
            w_ = {k: t.clone().requires_grad_(k != "pos_embed") for k, t in w.items()}
            want = torch.stack([slow_ijepa_encoder(w_, image, i.tolist(), 3) for image, i in zip(x, ids)])
            got = model(x, ids)
            self.close(got, want, 1e-10)
            for p in model.parameters():
                p.grad = None
            weights = torch.randn(got.shape).double()
            (got * weights).sum().backward()
            (want * weights).sum().backward()
            for name, p in model.named_parameters():
                if name != "pos_embed":
                    self.close(p.grad, w_[name].grad, 1e-9, name)
        full, ids = model(x), self.some_ids(3, 16)
        self.assertEqual(full.shape, (3, 16, 24))
        self.close(full, torch.stack([slow_ijepa_encoder(w, image, range(16), 3) for image in x]), 1e-10)
        self.close(model(x, ids), full.gather(1, ids[:, :, None].expand(-1, -1, 24)), 1e-12)
        layer = nn.TransformerEncoderLayer(24, 3, 96, 0.0, F.gelu, 1e-6, True, True)  # torch's own, of one block
        for n in range(2):
            names = dict(self_attn_in_proj="attn.qkv", self_attn_out_proj="attn.proj", norm1="norm1", norm2="norm2",
                         linear1="mlp.fc1", linear2="mlp.fc2")
            names = {k.replace("_in_proj", ".in_proj_").replace("_out_proj", ".out_proj."): v
                     for k, v in names.items()}
            layer.double().load_state_dict({
                (k if k.endswith(("_", ".")) else f"{k}.") + part: w[f"blocks.{n}.{v}.{part}"]
                for k, v in names.items() for part in ("weight", "bias")})
            z = torch.randn(2, 9, 24).double()
            self.close(model.blocks[n](z), layer(z), 1e-10)

    def test_hidden_pixels(self):
        """The encoder cannot see other patches' pixels: with others there its output is the same bit for bit."""
        model = self.ijepa.Encoder(32, 4, 32, 2, 2).eval()
        x, (ids, real, _) = torch.randn(4, 3, 32, 32), self.ijepa.sample_masks(4, 8, self.generator(0))
        seen = torch.stack([self.pixels(x[n], ids[n][real[n]].tolist()) for n in range(4)])
        for low in (False, True):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
                z = self.encode(model, x, ids, real)
                other = self.encode(model, torch.where(seen, x, 9 * torch.randn(x.shape)), ids, real)
                changed = self.encode(model, torch.where(seen, x + 0.5, x), ids, real)
            self.same(other[real], z[real])
            for n in range(4):
                self.assertGreater((changed[n][real[n]] - z[n][real[n]]).abs().max().item(), 0.01)

    def test_padding(self):
        """Padding changes nothing: each image alone, cut to its own patches, gives the same; whatever ids it has."""
        (encoder, w), (predictor, wp) = self.encoder(), self.predictor()
        x, ids, M = torch.randn(4, 3, 16, 16).double(), self.some_ids(4, 9), 5
        counts = torch.tensor([9, 4, 1, 7])
        real, targets = torch.arange(9) < counts[:, None], self.some_ids(4, M, seed=1)
        z = self.encode(encoder, x, ids, real)
        pred = self.predict(predictor, z, ids, real, targets)
        for n, k in enumerate(counts.tolist()):
            want = slow_ijepa_encoder(w, x[n], ids[n, :k].tolist(), 3)
            self.close(z[n, :k], want, 1e-10)
            self.close(encoder(x[n:n + 1], ids[n:n + 1, :k])[0], want, 1e-10)
            self.close(pred[n], slow_ijepa_predictor(wp, want, ids[n, :k].tolist(), targets[n].tolist(), 2), 1e-9)
        for fill in (0, 15):
            garbage = ids.where(real, fill)
            other = self.encode(encoder, x, garbage, real)
            self.same(other[real], z[real])
            noise = other.where(real[:, :, None], 1e3 * torch.randn(other.shape).double())
            self.same(self.predict(predictor, noise, garbage, real, targets), pred)
        z.requires_grad_()  # no gradient reaches padding
        z = z.detach().requires_grad_()
        self.predict(predictor, z, ids, real, targets).square().sum().backward()
        self.assertTrue((z.grad[~real] == 0).all() and (z.grad[real] != 0).any())

    def test_predictor(self):
        """Each block of targets in a sequence of its own, against a loop; where it lies matters, and its order not."""
        model, w = self.predictor()
        context, ids = torch.randn(3, 6, 24).double(), self.some_ids(3, 6)
        targets = self.some_ids(3, 5, seed=1)
        pred = model(context, ids, targets)
        want = [slow_ijepa_predictor(w, *a, 2) for a in zip(context, ids.tolist(), targets.tolist())]
        self.close(pred, torch.stack(want), 1e-10)
        order = torch.tensor([3, 0, 4, 1, 2])
        self.close(model(context, ids, targets[:, order]), pred[:, order], 1e-11)
        order = torch.tensor([3, 0, 4, 1, 2, 5])
        self.close(model(context[:, order], ids[:, order], targets), pred, 1e-11)
        elsewhere = model(context, ids, (targets + 1) % 16)
        self.assertGreater((elsewhere - pred).abs().mean().item(), 0.05 * pred.abs().mean().item())
        moved = model(context, (ids + 1) % 16, targets)
        self.assertGreater((moved - pred).abs().mean().item(), 0.05 * pred.abs().mean().item())
        spread = pred.std(dim=1).mean().item()  # predictions of one image differ, by their positions alone
        self.assertGreater(spread, 0.05 * pred.std().item())

    # objective and training

    def model(self, image_size=16, patch_size=4, dim=24, depth=1, heads=3, predictor_dim=16, predictor_depth=2,
              predictor_heads=2, **more):
        """A small network in fp64 with random weights, other ones in the target encoder; copies, with gradients."""
        model = self.ijepa.IJEPA(image_size, patch_size, dim, depth, heads, predictor_dim, predictor_depth,
                                 predictor_heads, **more).double()
        parts = []
        for seed, part in enumerate((model.encoder, model.target_encoder, model.predictor)):
            w = random_vit({k: tuple(t.shape) for k, t in part.state_dict().items()}, seed)
            part.load_state_dict(w)
            parts.append({k: t.double().requires_grad_("pos_embed" not in k) for k, t in w.items()})
        return model, parts

    def test_objective(self):
        """Loss and gradients against loops: each image and each block alone, nothing padded. In the loss: the target
        encoder's vector less its mean over its deviation, and smooth L1."""
        for stop in (True, False):
            model, (w, w_target, w_predictor) = self.model(stop_gradient=stop)
            x, (ids, real, targets) = torch.randn(3, 3, 16, 16).double(), self.ijepa.sample_masks(
                3, 4, self.generator(0))
            self.assertFalse(real.all())  # there is padding
            self.assertFalse(any(p.requires_grad for p in model.target_encoder.parameters()))
            model.target_encoder.requires_grad_(True)  # even then
            loss, pred, target = model(x, ids, torch.cat(targets), real)
            contexts = [ids[n][real[n]].tolist() for n in range(3)]
            blocks = [[t[n].tolist() for t in targets] for n in range(3)]
            want = slow_ijepa_loss(w, w_target if stop else w, w_predictor, x, contexts, blocks, 3, 2)
            self.close(loss, want, 1e-6)
            self.assertEqual((pred.shape, target.shape), ((12, targets[0].size(1), 24),) * 2)
            self.close(target.mean(dim=2), torch.zeros(target.shape[:2]) + 1e-9, 1e3)
            loss.backward()
            want.backward()
            for part, copies in ((model.encoder, w), (model.predictor, w_predictor)):
                for name, p in part.named_parameters():
                    if "pos_embed" not in name:
                        self.close(p.grad, copies[name].grad, 2e-5, name)
            for p in model.target_encoder.parameters():
                self.assertIsNone(p.grad)
            self.assertEqual(pred.requires_grad, True)
            self.assertEqual(target.requires_grad, not stop)  # that is what the flag does

    def test_smooth(self):
        """Smooth L1's two branches by hand, in the mean over all numbers; a target of one value is no division by 0."""
        model, _ = self.model()
        target = torch.zeros(4, 2, 24)
        x, ids, forward = torch.zeros(1, 3, 16, 16).double(), torch.zeros(4, 2).long(), "forward"
        with mock.patch.object(model, "targets", lambda *_: target):
            for error, value in ((0.5, 0.125), (-1, 0.5), (3, 2.5), (-0.25, 0.03125)):
                with mock.patch.object(model.predictor, forward, lambda *_: torch.full((4, 2, 24), float(error))):
                    self.assertAlmostEqual(model(x, ids[:1], ids)[0].item(), value, 6)
        with mock.patch.object(model.target_encoder, forward, lambda *_: torch.full((1, 16, 24), 7.0)):
            self.assertEqual(model.targets(x, ids).abs().max().item(), 0)
        z = 1e-2 * torch.randn(1, 16, 24).double()  # so small that the eps shows: variance 1e-4 beside 1e-5
        with mock.patch.object(model.target_encoder, forward, lambda *_: z):
            got = model.targets(x, torch.arange(16)[None])
        self.close(got[0].var(dim=1, unbiased=False), (v := z[0].var(dim=1, unbiased=False)) / (v + 1e-5), 1e-5)

    def test_steps(self):
        """Several updates: AdamW by torch's own on the loop's gradients, its decay and rate by the closed forms, and
        the target encoder to the bit what the formula makes of the weights after each."""
        c = self.config(batch_size=4, grad_accum=2, lr=0.01, warmup=2, weight_decay=0.1, weight_decay_end=0.9, steps=9,
                        ema_start=0.9, ema_end=0.98, patch_size=8)
        model = self.ijepa.IJEPA(32, 8, 16, 1, 2, 8, 1, 2)
        plain, images = copy.deepcopy(model), self.images(9)
        optimizer = self.ijepa.adamw_groups(model, c.weight_decay)
        flat = [p for p in plain.parameters() if p.requires_grad and p.dim() == 1]
        decayed = [p for p in plain.parameters() if p.requires_grad and p.dim() > 1]
        theirs = torch.optim.AdamW([dict(params=decayed), dict(params=flat, weight_decay=0)], betas=(0.9, 0.999))
        for step in range(9):
            before = copy.deepcopy(model.target_encoder.state_dict())
            loss = self.ijepa.ijepa_step(model, model, optimizer, contextlib.nullcontext(), images, c, step, 9, 0, 1)
            losses = [plain(x, *masks)[0] / 2 for x, masks in (self.ijepa.jepa_batch(
                c, images, self.ijepa.CIFAR10_STATS, 4, step, slot, 2) for slot in (0, 1))]
            sum(losses).backward()
            self.assertAlmostEqual(loss.item(), sum(losses).item(), 6)
            for group in theirs.param_groups:
                group["lr"] = 0.01 * ((step + 1) / 3 if step < 2 else 0.5 + 0.5 * math.cos(math.pi * (step - 2) / 7))
            theirs.param_groups[0]["weight_decay"] = 0.9 - 0.4 * (1 + math.cos(math.pi * step / 9))
            theirs.step()
            theirs.zero_grad()
            for name, p in plain.named_parameters():
                if not name.startswith("target_encoder"):
                    self.close(model.state_dict()[name], p, 1e-5, f"{name} at step {step}")
            momentum, after = 0.9 + 0.08 * step / 9, model.target_encoder.state_dict()
            for name, t in before.items():
                q = model.encoder.state_dict()[name]
                self.same(after[name], torch.lerp(t, q, 1 - momentum), f"{name} at step {step}")
                self.close(after[name], momentum * t.double() + (1 - momentum) * q.double(), 1e-6)
            plain.load_state_dict(model.state_dict())  # else rounding grows
        self.assertGreater((model.encoder.norm.weight - model.target_encoder.norm.weight).abs().max().item(), 1e-4)

    def test_no_average(self):
        """--no-ema, and --no-stop_gradient: the target encoder is the encoder."""
        for more in (dict(ema=False), dict(stop_gradient=False)):
            c = self.config(batch_size=4, lr=0.01, warmup=0, patch_size=8, **more)
            model = self.ijepa.IJEPA(32, 8, 16, 1, 2, 8, 1, 2, stop_gradient=c.stop_gradient)
            before = copy.deepcopy(model.encoder.state_dict())
            self.ijepa.ijepa_step(model, model, self.ijepa.adamw_groups(model, 0.1), contextlib.nullcontext(),
                                  self.images(9), c, 0, 9, 0, 1)
            self.same(model.encoder.state_dict(), model.target_encoder.state_dict())
            self.assertFalse(torch.equal(before["norm.weight"], model.encoder.norm.weight))

    def test_schedules(self):
        for steps, step in ((10, 0), (10, 3), (10, 10), (10, 12), (7, 5)):
            share = min(1, step / steps)
            for first, last in ((0.04, 0.4), (0.5, 0.1)):
                want = first + (last - first) * math.sin(math.pi * share / 2) ** 2
                self.assertAlmostEqual(self.ijepa.ramp(step, first, last, steps), want, 12)

    def test_groups(self):
        """Decay on weights, not on biases and norms; the target encoder and positions are not trained."""
        model = self.ijepa.IJEPA(32, 8, 16, 2, 2, 8, 2, 2)
        optimizer = self.ijepa.adamw_groups(model, 0.3)
        names = {id(p): name for name, p in model.named_parameters()}
        decayed, others = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
        self.assertEqual([g["weight_decay"] for g in optimizer.param_groups], [0.3, 0])
        fixed = {n for n in names.values() if "pos_embed" in n or n.startswith("target_encoder.")}
        self.assertEqual(decayed | others | fixed, {*names.values()})
        self.assertEqual((decayed & others, (decayed | others) & fixed), (set(), set()))
        self.assertEqual(others, {n for n in names.values() if n.endswith("bias") or "norm" in n} - fixed)

    def test_initial_weights(self):
        """Xavier's bound, and what block l adds divided by √(2 l); the mask token's deviation .02; biases 0, but for
        the patch projection's; positions the loop's."""
        model = self.ijepa.IJEPA(32, 4, 192, 6, 3, 96, 3, 3)
        for name, t in model.state_dict().items():
            if name.endswith("pos_embed"):
                self.close(t[0], slow_positions(t.size(2), 8), 1e-6)
            elif name.endswith("mask_token"):
                self.assertLess(abs(t.std().item() / 0.02 - 1), 0.2)
            elif t.dim() > 1:
                block = re.search(r"blocks\.(\d+)\.(attn\.proj|mlp\.fc2)", name)
                bound = (6 / sum(t.flatten(1).shape)) ** 0.5 / ((2 * (int(block[1]) + 1)) ** 0.5 if block else 1)
                self.assertTrue(0.98 * bound < t.abs().max().item() <= bound * (1 + 1e-6), name)
                self.assertLess(abs(t.std().item() / bound * 3**0.5 - 1), 0.03, name)
            elif "patch_embed" not in name:
                self.assertEqual(t.unique().tolist(), [1.0 if "norm" in name and "weight" in name else 0.0], name)
        self.same(model.encoder.state_dict(), model.target_encoder.state_dict())
        with torch.device("meta"):  # [1]'s largest published encoder: 630 million numbers
            self.assertEqual(sum(t.numel() for t in self.ijepa.Encoder(224, 14, 1280, 32, 16).state_dict().values()),
                             sum(math.prod(s) for s in official_ijepa_shapes(1280, 32, 14, 224, 0, 0).values()))

    def test_batches(self):
        """A batch depends on (seed, step, slot) alone; each image has masks of its own, as the flags say."""
        images, c = self.images(40), self.config(target_min=0.05, target_max=0.3, targets=3, context_min=0.9)

        def batch(c, *where):
            torch.manual_seed(int(torch.randint(99, (1,))))
            x, (ids, targets, real) = self.ijepa.jepa_batch(c, images, self.ijepa.CIFAR10_STATS, 8, *where)
            return [x, ids, targets, torch.ones_like(ids) == 1 if real is None else real]

        a = batch(c, 3, 0, 1)
        self.same(a, batch(c, 3, 0, 1))
        for where, seed in (((4, 0, 1), 0), ((3, 1, 2), 0), ((3, 0, 1), 1)):
            other = batch(dataclasses.replace(c, seed=seed), *where)
            self.assertFalse(torch.equal(a[0], other[0]) or torch.equal(a[2], other[2]))
        shares = set()
        for step in range(15):
            x, ids, targets, real = batch(c, step, 0, 1)
            self.assertEqual((x.shape, len(targets)), ((8, 3, 32, 32), 24))
            shares.add(targets.size(1))
            sets = self.as_sets((ids, real, list(targets.view(3, 8, -1))), 8, 8)
            self.assertTrue(all(not context & set().union(*blocks) for context, blocks in sets))
        self.assertTrue(min(shares) < 8 and 15 < max(shares) < 25, shares)
        known = {y.contiguous().numpy().tobytes(): n
                 for n, y in enumerate(self.ijepa.normalise(images, self.ijepa.CIFAR10_STATS))}
        seen = [known[x.contiguous().numpy().tobytes()] for step in range(5)
                for x in batch(dataclasses.replace(c, crop=0, flip=False), step, 0, 1)[0]]
        self.assertEqual(sorted(seen), list(range(40)))  # an epoch

    def test_overfits(self):
        """One batch, one mask: what an encoder that stays as it is makes of two images is learned by heart; to know
        where a patch is, and not of which image, would not be enough."""
        c = self.config(batch_size=2, lr=0.006, warmup=5, weight_decay=0, weight_decay_end=0, ema_start=1.0)
        model = self.ijepa.IJEPA(32, 8, 32, 1, 2, 32, 1, 2)
        optimizer, batch = self.ijepa.adamw_groups(model, 0.0), self.ijepa.jepa_batch
        images = self.images(2, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)  # a colour for each patch
        with mock.patch.object(self.ijepa, "jepa_batch", lambda c, *a: batch(c, *a[:3], 0, 0, 1)):
            losses = [self.ijepa.ijepa_step(model, model, optimizer, contextlib.nullcontext(), images, c, step, 150, 0,
                                            1).item() for step in range(150)]
        x = batch(c, images, model.stats, 4, 0, 0, 1)[0]
        with torch.no_grad():
            z = F.layer_norm(model.target_encoder(x), (32,))  # (2, 16, 32)
        of_places = F.smooth_l1_loss(z.mean(dim=0).expand_as(z), z).item()
        self.assertLess(losses[-1], min(losses[0] / 20, of_places / 4))

    # evaluation

    def test_collapse_watch(self):
        """The loss on validation images and its ratio to the loss of the mean target, by hand; features that have
        collapsed, and a network that predicts the mean, look it."""
        c, off = self.config(patch_size=8, probe_images=80, targets=4), contextlib.nullcontext()
        splits = [(x, y) for x, y in (self.draw(80, 1), self.draw(30, 2))]
        model = self.ijepa.IJEPA(32, 8, 32, 1, 2, 16, 1, 2)
        with torch.no_grad():
            for p in [*model.encoder.parameters(), *model.target_encoder.parameters()]:
                p.add_(0.1 * torch.randn(p.shape))
        got = self.ijepa.evaluate(model, *splits, c, off)
        self.assertEqual(got, self.ijepa.evaluate(model, *splits, c, off))  # the same masks every time
        x = self.ijepa.normalise(splits[1][0], self.ijepa.CIFAR10_STATS)
        ids, real, targets = self.ijepa.sample_masks(30, 4, self.generator(0))
        with torch.no_grad():
            z = F.layer_norm(model.target_encoder(x), (32,))
            context = model.encoder(x, ids, real)
            want = torch.stack([z[n, t[n]] for t in targets for n in range(30)])
            pred = torch.cat([model.predictor(context, ids, t, real) for t in targets])
        places = torch.cat(targets).flatten().tolist()
        at = collections.defaultdict(list)
        for place, row in zip(places, want.flatten(0, 1)):
            at[place].append(row)
        table = torch.stack([sum(at[i]) / max(1, len(at[i])) + torch.zeros(32) for i in range(16)])
        of_mean = F.smooth_l1_loss(table[places], want.flatten(0, 1)).item()  # of the place, whatever the image
        self.assertAlmostEqual(got["val_loss"], F.smooth_l1_loss(pred, want).item(), 5)
        self.assertAlmostEqual(got["over_mean"], F.smooth_l1_loss(pred, want).item() / of_mean, 4)
        z = [model.features(self.ijepa.normalise(x, self.ijepa.CIFAR10_STATS)).detach() for x, _ in splits]
        self.assertAlmostEqual(got["rankme"], self.ijepa.rankme(z[1]), 3)
        unit = [[v / math.hypot(*row) for v in row] for row in z[1].tolist()]
        self.assertAlmostEqual(got["std"], sum(statistics.stdev(v) for v in zip(*unit)) / 32 * 32**0.5, 4)
        with mock.patch.object(model.predictor, "forward", lambda context, ids, target_ids, real: table[target_ids]):
            self.assertAlmostEqual(self.ijepa.evaluate(model, *splits, c, off)["over_mean"], 1, 5)
        with torch.no_grad():
            model.target_encoder.norm.weight.mul_(1e-4)  # all features are nearly the norm's bias
            model.target_encoder.norm.bias.normal_()
        gone = self.ijepa.evaluate(model, *splits, c, off)
        self.assertTrue(gone["std"] < 1e-3 and gone["rankme"] < 1.1, gone)
        self.assertTrue(got["std"] > 0.05 and got["rankme"] > 3, got)

    def test_collapse(self):
        """Where the gradient bends the targets, features collapse, and the log shows it."""
        flags = ["--steps", 60, "--eval_every", 60, "--lr", 0.005, "--ema_start", 0.9]
        runs = [self.train(name, *flags, *more) for name, more in (("a", []), ("b", ["--no-stop_gradient"]))]
        last = [[row for row in r.rows if "val_loss" in row][-1] for r in runs]
        self.assertLess(last[1]["std"], 0.5 * last[0]["std"])
        self.assertLess(last[1]["val_loss"], last[0]["val_loss"])  # a lower loss, and worse

    def test_show_masks(self):
        """Each row: an image, its context, its targets, the rest grey."""
        status, out, err = run("ijepa", "--show_masks", "--out", self.dir / "o", "--patch_size", 4, "--targets", 3)
        self.assertEqual((status, err, [p.name for p in (self.dir / "o").iterdir()]), (0, "", ["masks.png"]))
        sheet, images = slow_png(self.dir / "o/masks.png"), self.draw(160, 1)[0]
        self.assertEqual(sheet.shape, (4 + 6 * 100, 4 + 5 * 100, 3))
        sizes = set()
        for n in range(6):
            row = sheet[4 + n * 100:][:96:3].astype(int)
            image, *parts = [row[:, 4 + 100 * k:][:, :96:3] for k in range(5)]
            self.assertTrue((image == images[n].permute(1, 2, 0).numpy()).all())
            seen = [{i for i in range(64) if not (p[i // 8 * 4:][:4, i % 8 * 4:][:, :4] == 128).all()} for p in parts]
            for p, ids in zip(parts, seen):
                mask = self.pixels(torch.zeros(3, 32, 32), ids).permute(1, 2, 0).numpy()
                self.assertTrue((p == np.where(mask, image, 128)).all())
            self.assertFalse(seen[0] & set().union(*seen[1:]))
            self.assertEqual(len({len(ids) for ids in seen[1:]}), 1)
            sizes.add(len(seen[1]))
        self.assertGreater(len(sizes), 1)

    # runs

    def test_run(self):
        """What a run leaves: val loss under fixed masks, best.pt by the probe, random init and pixels beside it."""
        a = self.train("a", "--eval_every", 3, "--lr", 0.05)
        looks = [row for row in a.rows if "val_loss" in row]
        self.assertEqual([row["step"] for row in looks], [0, 3, 6, 9, 12])
        for row in looks:
            self.assertLessEqual({"knn", "linear", "rankme", "std", "knn_random_init", "linear_random_init",
                                  "knn_pixels", "linear_pixels", "seconds"}, set(row))
        for key in ("knn", "linear"):  # before the first step it is at random init
            self.assertEqual({row[f"{key}_random_init"] for row in looks}, {looks[0][key]})
        best = torch.load(a.out / "best.pt", weights_only=True)
        self.assertEqual(best["best"], max(row["linear"] for row in looks))
        self.assertEqual([row["linear"] for row in looks if row["step"] == best["step"]], [best["best"]])
        last = a.rows[-1]
        for name in ("", "_random_init", "_pixels"):
            for key in ("knn", "linear", "linear_10%", "linear_1%", "rankme", "std"):
                self.assertIn(f"test_{key}{name}", last)
        encoder = self.ijepa.Encoder(**{k: v for k, v in a.ckpt["encoder_config"].items() if k != "pool"})
        encoder.load_state_dict(a.ckpt["encoder"])  # what is judged is the target encoder
        few, (x, y) = [t[:80] for t in self.draw(160, 1)], self.draw(40, 2)
        z = [encoder(self.ijepa.normalise(t, self.ijepa.CIFAR10_STATS)).mean(dim=1).detach() for t in (few[0], x)]
        self.assertEqual(looks[-1]["knn"], self.ijepa.knn_accuracy(z[0], few[1], z[1], y))
        self.assertAlmostEqual(looks[-1]["std"], self.ijepa.spread(z[1]), 5)
        self.assertAlmostEqual(looks[-1]["rankme"], self.ijepa.rankme(z[1]), 4)

    def test_resume(self):
        """12 steps are 6, stop, resume, 6 more: bit for bit."""
        for kind in (["--grad_accum", 2], ["--no-ema"], ["--no-stop_gradient"]):
            a = self.train("a", *kind)
            b = self.train("b", *kind, "--stop_at", 6)
            self.assertEqual((b.ckpt["step"], b.rows[-1]["step"]), (6, 6))
            self.assertFalse(torch.equal(*(r.ckpt["encoder"]["norm.weight"] for r in (a, b))))
            with open(b.out / "log.jsonl", "a") as file:  # what a killed run may have left
                file.write('{"step": 8, "loss": 9.0}\n{"step": 9, "lo')
            b = self.train("b", "--resume", tiny=False)
            self.same_run(a, self.look(b.out))
            self.assertEqual(sum("final" in row for row in b.rows), 1)
            self.assertEqual(*({k: v for k, v in r.ckpt["config"].items() if k not in ("out", "resume")}
                               for r in (a, b)))
            shutil.rmtree(a.out)
            shutil.rmtree(b.out)

    def test_evaluation_changes_nothing(self):
        runs = [self.train(f"e{every}", "--eval_every", every, "--log_every", log)
                for every, log in ((3, 2), (12, 5))]
        for key in ("model", "optimizer", "encoder"):
            self.same(*(r.ckpt[key] for r in runs))
        self.assertNotEqual(self.train("s", "--seed", 7).losses, self.train("t").losses)

    def test_full_train(self):
        """Pre-training sees the validation images too; probes are as they were."""
        a, b = self.train("a", "--steps", 1), self.train("b", "--steps", 1, "--full_train")
        self.assertIn("160 images", a.text)
        self.assertIn("200 images", b.text)
        self.assertEqual(*({k: v for k, v in r.rows[0].items() if k != "seconds"} for r in (a, b)))

    def test_torchrun(self):
        """Two processes update as one does with twice the accumulation; the checkpoint's names are plain."""
        module = Path(inspect.getfile(small_ijepa)).stem
        (self.dir / "two.py").write_text(f"import sys\nimport {module}\nwith {module}.small_ijepa():\n"
                                         "    import ijepa\n    sys.exit(ijepa.main(sys.argv[1:]))\n")
        flags = [*self.tiny, "--steps", 6]
        done = child("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", self.dir / "two.py", *flags,
                     "--out", self.dir / "two", cwd=self.dir)
        self.assertEqual(done.returncode, 0, done.stderr[-2000:])
        one, two = self.train("one", *flags, "--grad_accum", 2), self.look(self.dir / "two")
        start = self.train("start", *flags, "--lr", 1e-12, "--stop_at", 1)
        for part in ("model", "encoder"):
            self.assertEqual(list(one.ckpt[part]), list(two.ckpt[part]))
            for name, p in one.ckpt[part].items():
                self.assertLess((p - two.ckpt[part][name]).abs().max().item(), 2e-6, name)
        moved = max((p - start.ckpt["model"][name]).abs().max().item() for name, p in one.ckpt["model"].items())
        self.assertGreater(moved, 1e-4)  # of which two processes are to miss nothing
        for step, loss in one.losses.items():
            self.assertAlmostEqual(loss, two.losses[step], delta=1e-5)
        self.assertEqual([r["lr"] for r in one.rows if "lr" in r], [r["lr"] for r in two.rows if "lr" in r])
        self.assertEqual(done.stdout.count("step 6/6 | loss"), 1)  # one process speaks

    def test_ctrl_c(self):
        """Between two steps: a checkpoint, how to go on, status 130; and the run goes on bit for bit."""
        a, step, calls = self.train("a"), self.ijepa.ijepa_step, []

        def interrupted(*args, **more):
            calls.append(1)
            if len(calls) == 4:
                signal.raise_signal(signal.SIGINT)
            return step(*args, **more)

        handler = signal.getsignal(signal.SIGINT)
        with mock.patch.object(self.ijepa, "ijepa_step", interrupted):
            b = self.train("b", status=130)
        self.assertIs(signal.getsignal(signal.SIGINT), handler)
        self.assertEqual((b.ckpt["step"], len(calls)), (4, 4))
        command = re.search(r"python ijepa\.py (.*--resume.*)", b.text)[1]
        self.assertEqual(run("ijepa", *shlex.split(command))[0], 0)
        b = self.look(b.out)
        for key in ("model", "optimizer", "best", "encoder"):
            self.same(a.ckpt[key], b.ckpt[key], key)
        self.assertEqual(a.val, b.val)

    def test_kill(self):
        """Whatever ends a run, in the middle of a checkpoint's write too: the last whole one goes on bit for bit."""
        class Killed(BaseException):
            pass

        a, save, step, count = self.train("a"), torch.save, self.ijepa.ijepa_step, []

        def half(content, file):
            if content["step"] == 6:
                file.write(b"PK half of it")
                raise Killed
            save(content, file)

        def dies(*args, **more):
            count.append(1)
            if len(count) == 10:
                raise Killed
            return step(*args, **more)

        for patch, last in ((mock.patch.object(self.ijepa.torch, "save", half), 0),
                            (mock.patch.object(self.ijepa, "ijepa_step", dies), 6)):
            with patch, self.assertRaises(Killed):
                self.train("b")
            self.assertEqual(self.look(self.dir / "b").ckpt["step"], last)
            self.assertFalse([*(self.dir / "b").glob("*.tmp")])
            (self.dir / "b/ckpt.pt.tmp").write_bytes(b"PK half of it")  # what kill -9 would have left
            self.same_run(a, self.train("b", "--resume", tiny=False))

    def test_not_finite(self):
        """The run stops with status 1, names the step, and keeps the last good checkpoint."""
        out = self.dir / "o"
        status, _, err = run("ijepa", *self.tiny, "--out", out, "--lr", 9e18, "--warmup", 0, "--log_every", 1)
        self.assertEqual(status, 1, err)
        self.assertRegex(err, r"\Aijepa\.py: [^\n]*(nan|inf)[^\n]* step [123]\b[^\n]*\n\Z")
        saved = torch.load(out / "ckpt.pt", weights_only=True)
        self.assertEqual(saved["step"], 0)
        self.assertTrue(all(p.isfinite().all() for p in saved["model"].values()))

    def test_low_precision(self):
        a, b = (self.train(dtype, "--dtype", dtype, "--lr", 0.002) for dtype in ("float32", "bfloat16"))
        for step, loss in a.losses.items():
            self.assertAlmostEqual(loss, b.losses[step], delta=0.03 * loss)
        self.assertNotEqual(a.losses, b.losses)
        self.assertEqual({p.dtype for p in b.ckpt["model"].values()}, {torch.float32})

    # official weights

    def official(self, name="IN1K-vit.s.8-9e.pth.tar", dim=128, depth=2, patch=8, image=24, **more):
        """A file as it is published, but small: its path, and what is in its target encoder."""
        shapes = official_ijepa_shapes(dim, depth, patch, image, 32, 1)
        w = random_vit(shapes, 3)
        other = random_vit(shapes, 4), random_vit(official_ijepa_shapes(dim, depth, patch, image, 32, 1, False), 5)
        encoder, predictor, target = ({f"module.{k}": t for k, t in part.items()} for part in (*other, w))
        torch.save(dict(encoder=encoder, predictor=predictor, opt=dict(state={}, param_groups=[]), scaler={},
                        target_encoder=target, epoch=300, loss=0.1, batch_size=128, world_size=16, lr=1e-3) | more,
                   self.dir / name)
        return self.dir / name, w

    def test_official_shapes(self):
        """The published file's target encoder loads strictly, and gives what a loop makes of it."""
        path, w = self.official()
        model = self.ijepa.Encoder.from_pretrained(path)
        self.same({k: model.state_dict()[k] for k in w}, w)
        x = torch.randn(2, 3, 24, 24)
        w = {k: t.double() for k, t in w.items()}
        self.close(model(x), torch.stack([slow_ijepa_encoder(w, i, range(9), 2) for i in x.double()]), 1e-5)
        self.close(model.features(x), model(x).double().mean(dim=1), 1e-6)
        predictor = self.ijepa.Predictor(9, 128, 32, 1, 1)  # its names are the published ones
        shapes = official_ijepa_shapes(128, 2, 8, 24, 32, 1, False)
        self.assertEqual({k: tuple(t.shape) for k, t in predictor.state_dict().items()}, shapes)
        with torch.device("meta"):
            model = self.ijepa.Encoder(224, 14, 1280, 32, 16)
        self.assertEqual({k: tuple(t.shape) for k, t in model.state_dict().items()},
                         official_ijepa_shapes(1280, 32, 14, 224, 0, 0))

    def test_official_refused(self):
        """Anything missing, or more, or of another shape; what is no such file; code."""
        name = "IN1K.pth.tar"
        path, w = self.official(name)
        for change in (lambda w: w.pop("norm.weight"), lambda w: w.update(more=torch.ones(1)),
                       lambda w: w.update({"norm.bias": torch.ones(65)}), lambda w: w.pop("pos_embed"),
                       lambda w: w.update(pos_embed=torch.ones(1, 10, 128)),
                       lambda w: w.update(cls_token=w["norm.bias"]), lambda w: w.pop("blocks.1.attn.qkv.bias")):
            wrong = dict(w)
            change(wrong)
            self.official(name, target_encoder={f"module.{k}": t for k, t in wrong.items()})
            self.bad("--compare", path, "--out", self.dir / "o", says=name)
        marker = self.dir / "marker"
        for content in ({"target_encoder": {**w, "norm.bias": Evil(marker)}}, [1, 2], {"a": 1}, {"target_encoder": 1},
                        {"target_encoder": {k: 1 for k in w}}, w):
            torch.save(content, path)
            self.bad("--compare", path, "--out", self.dir / "o", says=name)
        self.official(name)
        path.write_bytes(path.read_bytes()[:5000])
        self.bad("--compare", path, says=name)
        self.assertFalse(marker.exists())

    def test_official_download(self):
        """A name downloads the file from its publisher, checked by its size."""
        path, w = self.official()
        body, asked, get = path.read_bytes(), [], self.ijepa.requests.get
        server = Server(self, dict(body=body, cut=5000), dict(body=body))

        def redirected(url, **how):
            asked.append(url)
            return get(server.url, **how)

        name, data = "IN1K-vit.h.14-300e", self.dir / "data"
        with mock.patch.object(self.ijepa.requests, "get", redirected), \
                contextlib.redirect_stderr(io.StringIO()) as err:
            with self.assertRaisesRegex(ValueError, "download"):  # it breaks off; the next try goes on
                self.ijepa.Encoder.from_pretrained(name, data)
            self.assertEqual([p.suffix for p in data.iterdir()], [".part"])
            model = self.ijepa.Encoder.from_pretrained(name, data)
            self.ijepa.Encoder.from_pretrained(name, data)  # it is there
        self.same({k: model.state_dict()[k] for k in w}, w)
        self.assertIn(f"of {len(body) / 1e6:.1f} MB", err.getvalue())
        self.assertEqual(asked, ["https://dl.fbaipublicfiles.com/ijepa/IN1K-vit.h.14-300e.pth.tar"] * 2)
        self.assertEqual([p.name for p in data.iterdir()], [f"{name}.pth.tar"])
        for name, address in self.ijepa.OFFICIAL.items():
            self.assertEqual(address, f"https://dl.fbaipublicfiles.com/ijepa/{name}.pth.tar")

    # t-SNE

    def blobs(self, n=60, C=5, classes=3, apart=8.0, seed=0):
        g = torch.Generator().manual_seed(seed)
        y = torch.arange(n * classes) % classes
        return torch.randn(n * classes, C, generator=g).double() + apart * torch.eye(C).double()[y], y

    def test_affinities(self):
        """Every row has perplexity 30, by a scan of its own; for points of any scale, a far one and twins too."""
        x = torch.randn(70, 4).double()
        x[1] += 50
        x[2] = x[3]
        rows = slow_conditionals(x, 30)
        entropy = -(rows * rows.clamp(min=1e-300).log()).sum(dim=1)
        self.assertLess((entropy.exp() - 30).abs().max().item(), 1e-6)
        P = self.ijepa.affinities(x, 30.0)
        self.close(P, (rows + rows.T) / 140, 1e-6)
        self.same(P, P.T)
        self.assertAlmostEqual(P.sum().item(), 1, 9)
        for scale in (1e-5, 1e5):
            self.close(self.ijepa.affinities(x * scale, 30.0), P, 1e-6)
        self.close(self.ijepa.affinities(x, 7.0), (lambda p: (p + p.T) / 140)(slow_conditionals(x, 7)), 1e-6)

    def test_tsne_gradient(self):
        """Against autograd of the divergence."""
        P = self.ijepa.affinities(self.blobs(10)[0], 8.0)
        for scale in (1e-4, 1, 30):
            y = (scale * torch.randn(30, 2).double()).requires_grad_()
            slow_kl(P, y).backward()
            self.close(self.ijepa.tsne_gradient(P, y.detach()), y.grad, 1e-8)

    def test_tsne(self):
        """Three blobs lie apart, the divergence is small; nothing is random; scale and place do not matter."""
        x, y = self.blobs(40)
        Y = self.ijepa.tsne(x)
        state = torch.get_rng_state()
        torch.manual_seed(9)
        self.same(self.ijepa.tsne(x.float().double()), self.ijepa.tsne(x.float()))
        torch.set_rng_state(state)
        self.same(self.ijepa.tsne(x), Y)
        centres = torch.stack([Y[y == k].mean(dim=0) for k in range(3)])
        within = torch.stack([(Y[y == k] - centres[k]).norm(dim=1).max() for k in range(3)])
        self.assertGreater(torch.pdist(centres).min().item(), 2 * within.max().item())
        P = self.ijepa.affinities(x)
        random = slow_kl(P, torch.randn(120, 2, generator=torch.Generator().manual_seed(0)).double())
        self.assertLess(slow_kl(P, Y.double()).item(), 0.3 * random.item())
        for z in (x, torch.cat((x, 1e-3 * torch.randn(120, 80)), dim=1)):  # as many components as there are, or 50
            k = min(50, z.size(1))
            got, centred = self.ijepa.pca(z, k), z - z.mean(dim=0)
            values, vectors = torch.linalg.eigh(centred.T @ centred)
            want = centred @ vectors.flip(1)[:, :k]
            self.close(got @ got.T, want @ want.T, 1e-9)
            self.close(got.square().sum(dim=0), values.flip(0)[:k], 1e-8)

    def test_tsne_steps(self):
        """P is 12 times too large for 250 steps, which have momentum .5, later ones .8; rates per number."""
        x, _ = self.blobs(20)
        P, Y0 = self.ijepa.affinities(self.ijepa.pca(x, 50), (60 - 1) / 3).float(), []
        sums, signs = [], torch.tensor([1.0, -1.0]).repeat(30)[:, None]
        draws = np.random.default_rng(0).normal(size=400)

        def gradient(P_, Y):
            Y0.append(Y)
            sums.append(P_.sum().item())
            return signs * torch.tensor([[draws[len(sums) - 1], 0.5]])

        with mock.patch.object(self.ijepa, "tsne_gradient", gradient):
            Y = self.ijepa.tsne(x, iterations=300)
        self.close(torch.tensor(sums), torch.tensor([12.0] * 250 + [1.0] * 50), 1e-5)
        self.assertLess(Y0[0].abs().max().item(), 1e-3)
        steady = [0.5] * 300
        for sign, values, got in zip((1, -1, 1, -1), (draws, draws, steady, steady), (Y - Y0[0])[:2].T.flatten()):
            place, velocity, gain = 0.0, 0.0, 1.0
            for step in range(300):
                slope = sign * values[step]
                gain = max(0.01, gain * 0.8 if (slope > 0) == (velocity > 0) else gain + 0.2)
                velocity = (0.5 if step < 250 else 0.8) * velocity - 50 * gain * slope
                place += velocity
            self.assertAlmostEqual(got.item() / place, 1, delta=0.01)  # fp32
        self.assertEqual(inspect.signature(self.ijepa.tsne).parameters["perplexity"].default, 30)

    # comparison, and other scripts

    def checkpoints(self):
        """Small checkpoints of every script, two of mae.py: {name: (path, its own features of normalised images)}."""
        import mae
        import simclr
        found, short = {}, ["--steps", 1, "--batch_size", 8, "--dtype", "float32"]
        flags = ["--patch_size", 8, "--dim", 32, "--depth", 1, "--heads", 2]
        small = ["--probe_images", 40]
        for name, script, patch, more in (
                ("mae", "mae", small_mae(), [*flags, *small]),
                ("mae_cls", "mae", small_mae(), [*flags, *small, "--pool", "cls"]),
                ("simclr", "simclr", small_simclr(size=32), ["--encoder", "vit", "--width", 16, "--depth", 1, *small]),
                ("ijepa", "ijepa", contextlib.nullcontext(), [*flags, *small])):
            with patch:
                status, _, err = run(script, *short, *more, "--out", self.dir / name)
            self.assertEqual(status, 0, err)
            path = self.dir / name / "ckpt.pt"
            saved = torch.load(path, weights_only=True)
            if script == "mae":
                model = mae.MAE(**saved["model_config"])
                features = functools.partial(model.features, pool="cls" if "cls" in name else "mean")
            elif script == "simclr":
                model = features = simclr.PatchEncoder(**saved["encoder_config"])
            else:
                model = self.ijepa.Encoder(32, 8, 32, 1, 2)
                features = lambda x, model=model: model(x).mean(dim=1)
            model.load_state_dict(saved["model" if script == "mae" else "encoder"])
            model.eval()
            found[name] = path, features
        return found

    def test_compare(self):
        """Every script's encoder gives the features that its script takes; each row of the table is what the probes
        make of these; the maps are XML, the sheet shows the images that are nearest."""
        found = self.checkpoints()
        flags = ["--compare", ",".join(str(path) for path, _ in found.values()), "--dtype", "float32", "--tsne_images",
                 100, "--out", self.dir / "o"]
        before = {name: path.read_bytes() for name, (path, _) in found.items()}
        maps, tsne = [], self.ijepa.tsne
        with mock.patch.object(self.ijepa, "tsne", lambda x: maps.append(x) or tsne(x, iterations=300)):
            status, out, err = run("ijepa", *flags)
        self.assertEqual((status, err), (0, ""))
        self.assertEqual(before, {name: path.read_bytes() for name, (path, _) in found.items()})
        results = json.loads((self.dir / "o/compare.json").read_text())
        self.assertEqual([*results], [*found, "random_init", "pixels"])
        splits = [self.draw(n, seed) for n, seed in ((160, 1), (40, 2), (40, 3))]
        y = [y for _, y in splits]
        images = [self.ijepa.normalise(x, self.ijepa.CIFAR10_STATS) for x, _ in splits]
        some = {1.0: torch.arange(160)}
        some |= {share: torch.cat([(y[0] == k).nonzero()[:max(1, round(share * 16)), 0] for k in range(10)]
                                  ).sort().values for share in (0.1, 0.01)}
        features = {name: f for name, (_, f) in found.items()} | {"pixels": lambda x: x.flatten(1)}
        rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.split()[0] in results}
        for name, f in features.items():
            with torch.no_grad():
                z = [f(x) for x in images]
            scores = dict(knn=self.ijepa.knn_accuracy(z[0], y[0], z[2], y[2]))
            for share, index in some.items():
                scores["linear" if share == 1 else f"linear_{share:.0%}"] = self.ijepa.linear_probe(
                    z[0][index], y[0][index], z[1], y[1], z[2], y[2])
            scores |= dict(rankme=self.ijepa.rankme(z[2]), std=self.ijepa.spread(z[2]))
            self.assertEqual([*results[name]], [*scores])
            for key, value in scores.items():  # fp32's rounding may move an image of 40
                self.assertAlmostEqual(results[name][key] / max(1, value), value / max(1, value), delta=0.026)
            self.close(maps[[*results].index(name)], z[2], 1e-4, name)
            self.assertEqual(rows[name], [f"{v:.4f}" for v in results[name].values()])
        self.assertNotEqual(results["mae"]["rankme"], results["random_init"]["rankme"])
        svg = xml.etree.ElementTree.parse(self.dir / "o/tsne.svg").getroot()
        texts = [e.text for e in svg if e.tag.endswith("text")]
        self.assertEqual(texts, [*results, *self.ijepa.SHAPES])
        dots = [e.get("d").count("M") for e in svg if e.tag.endswith("path")]
        self.assertEqual((len(dots), sum(dots)), (10 * len(results), 40 * len(results)))
        sheet, (x, _) = slow_png(self.dir / "o/neighbours.png"), splits[0]
        self.assertEqual(sheet.shape, (10 * 68 + 4, (1 + 6 * len(results)) * 68 + 4, 3))
        tile = lambda i, j: torch.from_numpy(sheet[4 + 68 * i:][:64:2, 4 + 68 * j:][:, :64:2].copy()).permute(2, 0, 1)
        z = [F.normalize(t.flatten(1), dim=1) for t in (images[2], images[0])]
        for k in range(10):
            query = y[2].tolist().index(k)
            self.same(tile(k, 0), splits[2][0][query])
            order = (z[1] @ z[0][query]).argsort(descending=True)
            for j in range(5):
                self.same(tile(k, 2 + 6 * (len(results) - 1) + j), x[order[j]])
            self.assertTrue((tile(k, 1) == 255).all())

    # bad input

    def test_bad_flags(self):
        for flags in """--patch_size 5, --patch_size 0, --patch_size 16, --patch_size 32, --dim 30, --dim 36 --heads 5,
                --heads 3, --predictor_dim 18, --predictor_heads 3, --depth 0, --predictor_depth 0, --targets 0,
                --target_min 0, --target_min 0.3, --target_max 1.1, --target_max 0.1, --target_min nan,
                --context_min 0, --context_min 1.5, --context_min -1, --ema_start 1.1, --ema_start -1, --ema_end nan,
                --ema_end 2, --lr nan, --lr 0, --lr -1, --lr inf, --weight_decay -1, --weight_decay_end nan,
                --warmup -1, --batch_size 0, --grad_accum 0, --epochs 0, --epochs nan, --steps 0, --steps 1.5,
                --stop_at 0, --eval_every 0, --log_every 0, --probe_images 0, --tsne_images 3001, --tsne_images 0,
                --seed -1, --labels 0, --labels 2, --crop 32, --crop -1, --dtype int8, --device nowhere,
                --data nowhere, --data=, --out=, --no_such_flag 1, --step 5, --steps, stray, --resume,
                --resume --init x.pt, --init nowhere.pt, --init=, --init IN1K-vit.h.14-300e, --compare=,
                --compare nowhere.pt, --compare nowhere,
                --patch_size 4 --target_max 0.65""".split(","):
            self.bad(*self.tiny, *flags.split())
        self.bad("--patch_size", 5, says=("--patch_size", "5", "32"))
        self.bad("--show_masks", "--compare", HERE / "tests.py", says="give one of them")
        self.bad("--tsne_images", 4000, says=("--tsne_images", "4000", "3000"))
        self.bad("--target_min", 0.5, says=("--target_min", "0.5", "--target_max 0.2"))
        for flags in ("--target_min 0.9 --target_max 1", "--target_min 0.5 --target_max 0.6 --context_min 0.1"):
            self.bad(*self.tiny, *flags.split(), says="--target_max")  # nothing would be left of the context
        self.bad("--resume", "--out", self.dir / "none", says="ckpt.pt")
        (self.dir / "text.txt").write_text("hello")
        for flags in ([], ["--show_masks"]):
            self.bad(*self.tiny, *flags, "--out", self.dir / "text.txt", says="text.txt", status=1)
        self.bad("--data", self.dir / "nowhere", "--lr", "nan", says="--lr")  # flags come before data

    def test_wrong_sizes(self):
        for sizes in ((30, 4, 24, 1, 3), (32, 4, 24, 1, 5), (32, 4, 18, 1, 3)):
            with self.assertRaises(ValueError):
                self.ijepa.Encoder(*sizes)
        for sizes in ((15, 24, 16, 1, 2), (16, 24, 16, 1, 3), (16, 24, 18, 1, 2)):
            with self.assertRaises(ValueError):
                self.ijepa.Predictor(*sizes)
        model = self.ijepa.Encoder(16, 4, 24, 1, 3)
        for shape in ((1, 3, 24, 24), (1, 3, 16, 12)):
            with self.assertRaises(ValueError):
                model(torch.zeros(shape))
            with self.assertRaises(ValueError):
                model(torch.zeros(shape), torch.zeros(1, 2).long())

    def test_bad_checkpoints(self):
        a = self.train("a", "--steps", 2)
        good, saved = (a.out / "best.pt").read_bytes(), torch.load(a.out / "best.pt", weights_only=True)

        def checkpoint(name, content):
            torch.save(content, self.dir / name)
            return self.dir / name

        foreign = [checkpoint("list.pt", [1, 2]), checkpoint("object.pt", Evil(self.dir / "marker")),
                   checkpoint("arch.pt", saved | dict(model_config=dict(arch="resnet18"))),
                   checkpoint("vit.pt", saved | dict(model_config=dict(image_size=32, num_classes=10))),
                   checkpoint("names.pt", saved | dict(model=saved["encoder"] | {"head.bias": torch.ones(1)})),
                   checkpoint("shape.pt", saved | dict(model=saved["model"] | {"encoder.norm.bias": torch.ones(31)})),
                   checkpoint("size.pt", saved | dict(model_config=saved["model_config"] | dict(image_size=64)))]
        foreign += [checkpoint(f"no_{key}.pt", {k: v for k, v in saved.items() if k != key})
                    for key in ("model", "config", "step", "model_config")]
        for name, content in (("cut.pt", good[:len(good) // 2]), ("noise.pt", os.urandom(5000)), ("none.pt", b"")):
            (self.dir / name).write_bytes(content)
            foreign.append(self.dir / name)
        for path in foreign:
            self.bad(*self.tiny, "--init", path, says=path.name)
        big = self.ijepa.IJEPA(64, 8, 32, 1, 2, 16, 1, 2)
        path = checkpoint("big.pt", saved | dict(model=big.state_dict(), model_config=big.settings))
        self.bad(*self.tiny, "--init", path, says=("big.pt", "64"))
        coarse = self.ijepa.IJEPA(32, 8, 96, 4, 3, 48, 1, 3)  # of 3 × 3 context patches a target may take all
        path = checkpoint("coarse.pt", saved | dict(model=coarse.state_dict(), model_config=coarse.settings))
        self.bad("--init", path, "--context_min", 0.5, "--target_max", 0.4, "--steps", 1, says="--target_max")
        self.assertFalse((self.dir / "marker").exists())
        self.bad("--resume", "--out", a.out, "--dim", 64, says="ckpt.pt")
        (a.out / "ckpt.pt").write_bytes((a.out / "ckpt.pt").read_bytes()[:-999])
        self.bad("--resume", "--out", a.out, says="ckpt.pt")

    def test_command_line(self):
        """As a program: the exit status, and one line on stderr."""
        done = child(HERE / "ijepa.py", "--target_min", 2, cwd=self.dir)
        self.assertEqual((done.returncode, done.stdout, snapshot(self.dir)), (2, "", {}))
        self.assertRegex(done.stderr, r"\Aijepa\.py: [^\n]+\n\Z")


class PerImage(torch.utils.data.Dataset):
    """Two views of each image, made one at a time from PIL pictures: what most scripts for SimCLR do."""

    def __init__(self, images, transform):
        from PIL import Image
        self.images, self.transform = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in images], transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i]), self.transform(self.images[i])


# --------------------------------------------------------------------------------------------------------------------
# puzzles.py


# --------------------------------------------------------------------------------------------------------------------
# benchmarks: not part of the tests, run by name. Each prints what it measured; ratios come from runs in turn.


def plain_step(model, optimizer, x, y):
    loss = model(x, y)[1]
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def in_turn(functions, rounds, warm=3):
    """{name: seconds, one a round}, the functions called one after the other in every round."""
    times = {name: [] for name in functions}
    for i in range(rounds + warm):
        for name, f in functions.items():
            begin = time.perf_counter()
            f()
            if i >= warm:
                times[name].append(time.perf_counter() - begin)
    return times


def ratio(times, a, b):
    """Median over rounds of a's time over b's."""
    return statistics.median(x / y for x, y in zip(times[a], times[b]))


class Bench:
    """What measurements of a script share; nothing else should run meanwhile."""

    script = ""

    def keep(self, out, name):
        """Copy a run's log to assets/logs/SCRIPT/NAME.jsonl, behind a row that says what made it; its last row."""
        rows = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
        config = json.loads((Path(out) / "config.json").read_text())
        config = {key: value for key, value in config.items() if key not in ("data_dir", "out")}
        folder = HERE / "assets" / "logs" / self.script
        folder.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in [dict(config=config, **about(f"{self.script}.py")), *rows])
        (folder / f"{name}.jsonl").write_text(text)
        return rows[-1]

    def train(self, name, *flags):
        if importlib.import_module(self.script).main([*map(str, flags), "--out", f"out/bench/{name}"]):
            sys.exit(f"{name} failed")
        return self.keep(f"out/bench/{name}", name)

    def log(self, name):
        """The config and the rows of a committed log."""
        text = (HERE / "assets" / "logs" / self.script / f"{name}.jsonl").read_text()
        first, *rows = map(json.loads, text.splitlines())
        return first["config"], rows

    def probed(self, names):
        """The README's lines about runs {name: label} that read the test images, and the yardsticks of the first."""
        lines = ["| | lr | steps | minutes | kNN | linear | 10% of labels | 1% | RankMe |", "|---|" + 8 * "---|"]
        for name, label in (*names.items(), ("_random_init", "random init"), ("_pixels", "pixels")):
            (c, (*_, row)), suffix = self.log(name if name in names else [*names][0]), "" if name in names else name
            run = ["", "", ""] if suffix else [f"{c['lr']:g}", f"{row['step']:,}", f"{row['seconds'] / 60:.0f}"]
            keys = ("knn", "linear", "linear_10%", "linear_1%")
            scores = (f"{row[f'test_{key}{suffix}'] + 1e-9:.1%}" for key in keys)
            lines.append(f"| {' | '.join([label, *run, *scores, format(row[f'test_rankme{suffix}'], '.0f')])} |")
        return lines

    def validated(self, names, best):
        """The README's lines about runs {name: label} that have evaluations alone: the one that is best by a score."""
        lines = ["| | steps | seconds | kNN | linear |", "|---|" + 4 * "---|"]
        for name, label in names.items():
            rows = [row for row in self.log(name)[1] if best in row]
            row = max(rows, key=lambda row: row[best])
            lines.append(f"| {label} | {rows[-1]['step']:,} | {rows[-1]['seconds']:.0f} | {row['knn'] + 1e-9:.1%} | "
                         f"{row['linear'] + 1e-9:.1%} |")
        return lines


class BenchMAE(Bench):
    """python tests.py BenchMAE.NAME, where NAME is one of the methods; nothing else should run meanwhile. Flags are
    passed on: --data and --data_dir."""

    script = "mae"
    CIFAR = ("--data cifar10 --dim 192 --depth 6 --heads 3 --decoder_dim 128 --decoder_depth 2 --decoder_heads 4 "
             "--no-class_token --mask_ratio 0.75 --norm_pix_loss --batch_size 256 --lr 1.5e-3 --log_every 20").split()

    def timed(self, name, seconds, *flags, test=False):
        """A run of about so many seconds of training, as many steps as twelve say, a tenth of them warm-up; its best
        linear probe on validation images. Test images are read where test is asked for."""
        mae = importlib.import_module("mae")
        flags = [*self.CIFAR, *map(str, flags)]
        unread = mock.patch.object(mae, "finish_mae", lambda *_: None)
        with unread:
            if mae.main([*flags, "--data", "shapes", "--labels", "0.1", "--steps", "12", "--eval_every", "99",
                         "--log_every", "2", "--out", "out/bench/steps"]):
                sys.exit(f"{name} failed")
        rows = [json.loads(line) for line in open("out/bench/steps/log.jsonl")]
        ms = statistics.median(row["ms"] for row in rows if row.get("step", 0) > 2 and "ms" in row)
        steps = max(10, round(1e3 * float(seconds) / ms))
        with contextlib.nullcontext() if test else unread:
            last = self.train(name, *flags, "--steps", steps, "--warmup", steps // 10)
        rows = [json.loads(line) for line in open(f"out/bench/{name}/log.jsonl")]
        best = max((row for row in rows if "linear" in row), key=lambda row: row["linear"])
        print(f"{name}: {steps} steps, {last['seconds']:.0f} s | validation linear {best['linear']:.4f}, kNN "
              f"{best['knn']:.4f}", {key: last[key] for key in last if key.startswith("test_")}, flush=True)
        return best["linear"]

    def default(self):
        self.train("default_seed0")

    def hour(self, *flags, seconds=3600):
        """CIFAR-10, at that base rate of three which a tenth of the time chose; then what fine-tuning it gives against
        the same network from scratch, in equal steps."""
        rate = max((0.75e-3, 1.5e-3, 3e-3), key=lambda lr: self.timed(f"hour_lr{lr}", seconds / 10, "--lr", lr, *flags))
        self.timed("hour", seconds, "--lr", rate, *flags, test=True)
        self.finetune(*flags)

    def finetune(self, *flags, steps=250):
        """On all labels and on a tenth; each at that rate of three which a fifth of the steps chose by accuracy on
        validation images. The network is vit.py's without a stem; from scratch its positions stay fixed."""
        vit = Bench()
        vit.script = "vit"  # logs in assets/logs/vit/
        starts = dict(finetuned=["--init", "out/bench/hour/best.pt", "--layer_decay", 0.75],
                      scratch="--arch cifar --patch_size 4 --no-conv_stem --pool mean --pos sincos".split())

        def run(name, start, steps, *more):
            last = vit.train(name, "--data", "cifar10", *start, "--steps", steps, "--batch_size", 128, "--warmup",
                             steps // 10, "--log_every", 50, "--eval_every", math.ceil(steps / 5), *more, *flags)
            rows = [json.loads(line) for line in open(f"out/bench/{name}/log.jsonl")]
            best = max(row["val_accuracy"] for row in rows if "val_accuracy" in row)
            print(f"{name}: validation {best:.4f}, test {last['test_accuracy']:.4f}", flush=True)
            return best

        for name, start in starts.items():
            rate = max((5e-4, 1e-3, 2e-3), key=lambda lr: run(f"mae_{name}_lr{lr}", start, steps // 5, "--lr", lr))
            for labels in (1.0, 0.1):
                run(f"mae_{name}_labels{labels}", start, steps, "--lr", rate, "--labels", labels)

    def table(self):
        """The README's lines about the hour, the fine-tuning after it, and ten minutes of other sizes."""
        vit, lines = Bench(), ["| | lr | all labels | 10% of labels |", "|---|---|---|---|"]
        vit.script = "vit"
        for name, label in dict(finetuned="from MAE's encoder", scratch="from scratch").items():
            runs = [vit.log(f"mae_{name}_labels{labels}") for labels in (1.0, 0.1)]
            scores = (f"{rows[-1]['test_accuracy'] + 1e-9:.1%}" for _, rows in runs)
            lines.append(f"| {' | '.join([label, format(runs[0][0]['lr'], 'g'), *scores])} |")
        return self.probed(dict(hour="MAE")) + lines + self.validated({
            "ratio_0.5": "half of the patches hidden", "ratio_0.75": "three quarters", "ratio_0.9": "nine tenths",
            "decoder_1": "three quarters, a decoder of 1 block", "decoder_4": "three quarters, of 4 blocks"}, "linear")

    def ablation(self, *flags, seconds=600):
        """Mask ratios and depths of the decoder, ten minutes each, so that the more is hidden the more steps there
        are; [1] has equal epochs."""
        for ratio in (0.5, 0.75, 0.9):
            self.timed(f"ratio_{ratio}", seconds, "--mask_ratio", ratio, *flags)
        for depth in (1, 4):  # 2 is ratio_0.75
            self.timed(f"decoder_{depth}", seconds, "--decoder_depth", depth, *flags)

    def speed(self, rounds=5):
        """A training step of 192 × 12, patch 4, decoder 128 × 2, batch 256: mae.py's against the official design,
        with scaled_dot_product_attention and its AdamW, eager, in fp32 and under bf16 autocast; then forward and
        backward through the encoder, of a quarter of the patches and of all."""
        mae = importlib.import_module("mae")
        c = mae.Config(dim=192, depth=12, heads=3, decoder_dim=128, decoder_depth=2, decoder_heads=4, batch_size=256,
                       mask_ratio=0.75, norm_pix_loss=True)
        (images, _), counter = mae.make_shapes(1000, 0), itertools.count()
        _, _, autocast = mae.pick_device("cpu", "auto", "avx512_bf16")
        ours, plain = mae.load_mae(c), mae.load_mae(c)

        def attention(self, x, key_mask=None):
            B, N, C = x.shape
            q, k, v = self.qkv(x).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C))

        for block in [*plain.blocks, *plain.decoder_blocks]:
            block.attn.forward = functools.partial(attention, block.attn)
        trained = [p for p in plain.parameters() if p.requires_grad]
        plain_opt = torch.optim.AdamW(trained, 1e-3, betas=(0.9, 0.95), weight_decay=0.05)
        x, optimizer = mae.normalise(images[:256], plain.stats).contiguous(), mae.decay_weights(ours, 0.05)

        def plain_step(enabled):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = plain(x, 0.75)[0]
            loss.backward()
            plain_opt.step()
            plain_opt.zero_grad()

        def encoder(ratio):
            with autocast:
                z = ours.encode(x, ratio, torch.rand(256, 64))[0] if ratio else ours.encoder(ours.tokens(x))
            z.sum().backward()
            ours.zero_grad()

        run = {"fp32": lambda: plain_step(False), "autocast": lambda: plain_step(True),
               "mae.py": lambda: mae.mae_step(ours, ours, optimizer, autocast, images, c, next(counter), 10**6, 0, 1),
               "encoder at .75": lambda: encoder(0.75), "encoder of all": lambda: encoder(0)}
        times = in_turn(run, int(rounds), warm=2)
        for name, t in times.items():
            longer = [f"{other} {ratio(times, other, name):.2f}" for other in ("fp32", "autocast", "encoder of all")]
            print(f"{name:>14} {1e3 * statistics.median(t):8.1f} ms, {256 / statistics.median(t):6.0f} images/s | "
                  f"times as long take {', '.join(longer)}", flush=True)


class BenchSimCLR(Bench):
    """python tests.py BenchSimCLR.NAME, where NAME is one of the methods; nothing else should run meanwhile. Flags of
    runs on CIFAR-10 are passed on: --data and --data_dir."""

    script = "simclr"

    def default(self):
        """The run without flags."""
        began = time.perf_counter()
        last = self.train("default_seed0")
        print({key: last[key] for key in last if "knn" in key or "linear" in key},
              f"{time.perf_counter() - began:.0f} s in all")

    def speed(self, rounds=3, batch=256):
        """A step of ResNet-18, batch 256, augmentation included, in what the machine is fastest in and in fp32,
        against the same network, loss and optimiser in fp32 eager on pairs from a DataLoader of two workers that
        transform PIL pictures, which go on while steps are timed; and augmentation's share."""
        simclr, rounds, batch = importlib.import_module("simclr"), int(rounds), int(batch)
        x, counter = simclr.make_shapes((rounds + 6) * batch, 0)[0], itertools.count()
        c = simclr.Config(width=64, batch_size=batch, optimizer="sgd", crop_min=0.2, jitter=0.5, grey=0.2)
        ours = simclr.load_pair(c)[0].to(memory_format=torch.channels_last)
        optimizer = simclr.make_optimizer(ours, c)

        def step(autocast):
            simclr.contrastive_step(ours, ours, optimizer, autocast, x, c, next(counter), 10**6, 0, 1)

        kinds = {name: simclr.pick_device("cpu", name, "avx512_bf16")[1:] for name in ("auto", "float32")}
        run = {name: functools.partial(step, autocast) for name, (_, autocast) in kinds.items()}
        run["views"] = lambda: simclr.views(c, x, next(counter), batch, np.arange(2 * batch))
        times = in_turn(run, rounds, warm=1)
        rate = {name: batch / statistics.median(t) for name, t in times.items()}
        for name, (dtype, _) in kinds.items():
            print(f"simclr.py: {rate[name]:.1f} pairs/s ({dtype}), augmentation {ratio(times, 'views', name):.1%} of a "
                  "step", flush=True)
        try:
            from torchvision import transforms as T
            import PIL  # noqa: F401
        except ImportError as error:
            return print(f"nothing to compare with: {error}; pip install torchvision pillow")
        transform = T.Compose([T.RandomResizedCrop(32, scale=(0.2, 1)), T.RandomHorizontalFlip(),
                               T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8), T.RandomGrayscale(0.2),
                               T.ToTensor(), T.Normalize(*simclr.CIFAR10_STATS)])
        loader = torch.utils.data.DataLoader(PerImage(x, transform), batch, shuffle=True, num_workers=2, drop_last=True)
        plain = simclr.load_pair(c)[0].to(memory_format=torch.contiguous_format).train()
        optimizer, began, done = simclr.make_optimizer(plain, c), None, 0
        for x1, x2 in itertools.islice(loader, rounds + 1):  # workers have four more pairs of batches to go on with
            loss, _ = simclr.nt_xent(*plain(torch.cat((x1, x2))).chunk(2), c.temperature)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if began is None:  # workers start and the first batch warms up
                began = time.perf_counter()
            else:
                done += batch
        theirs = done / (time.perf_counter() - began)
        print(f"PIL, two workers, fp32 eager: {theirs:.1f} pairs/s; simclr.py does {rate['auto'] / theirs:.2f} times "
              f"as many, in fp32 {rate['float32'] / theirs:.2f}")

    def timed(self, name, minutes, *flags, test=False):
        """A run of about so many minutes of training, as many steps as eight of its own say; its best kNN on validation
        images, and where test is asked for, figures on test images."""
        simclr = importlib.import_module("simclr")
        c = simclr.parse_flags(simclr.Config, "", [*map(str, flags)])
        device, _, autocast = simclr.pick_device(c.device, c.dtype, "avx512_bf16")
        model = simclr.load_pair(c)[0].to(device, memory_format=torch.channels_last)
        x, optimizer = simclr.make_shapes(2000, 0)[0].to(device), simclr.make_optimizer(model, c)
        for step in range(11):
            if step == 3:
                began = time.perf_counter()
            value = simclr.contrastive_step(model, model, optimizer, autocast, x, c, step, 10**6, 0, 1)
            value["loss"].item()
        steps = round(60 * minutes / ((time.perf_counter() - began) / 8))
        with contextlib.nullcontext() if test else mock.patch.object(simclr, "finish_simclr", lambda *_: None):
            last = self.train(name, *flags, "--steps", steps, "--warmup", steps // 10, "--eval_every",
                              math.ceil(steps / 6), "--log_every", 50)
        rows = [json.loads(line) for line in open(f"out/bench/{name}/log.jsonl")]
        best = max((row for row in rows if "knn" in row), key=lambda row: row["knn"])
        print(f"{name}: {steps} steps, {last['seconds']:.0f} s | validation kNN {best['knn']:.4f}, linear "
              f"{best['linear']:.4f}", {key: last[key] for key in last if key.startswith("test_")}, flush=True)
        return best["knn"]

    def objective(self, loss, *flags):
        """Half an hour of one objective, at that rate of three which was best after three minutes."""
        own = ["--loss", loss, "--batch_size", 128, "--data", "cifar10", *flags]
        own += ["--temperature", 0.1] if loss == "moco" else []  # as in its authors' code for CIFAR-10
        rate = max((1e-3, 2e-3, 4e-3), key=lambda lr: self.timed(f"{loss}_lr{lr}", 3, *own, "--lr", lr))
        self.timed(loss, 30, *own, "--lr", rate, test=True)

    def hours(self, *flags):
        """Half an hour per objective, then the chart."""
        for loss in ("simclr", "moco", "vicreg"):
            self.objective(loss, *flags)
        self.curves()

    def table(self):
        """The README's lines about half an hour of each objective, and about ten minutes of SimCLR."""
        return self.probed(dict(simclr="SimCLR", vicreg="VICReg", moco="MoCo")) + self.validated({
            f"{kind}_{value}": f"{kind} {value:,}" for kind, values in dict(
                temperature=(0.1, 0.5, 1), batch=(64, 256, 1024)).items() for value in values}, "knn")

    def curves(self):
        """A chart of kNN on validation images against seconds of training, from the three objectives' logs."""
        names = ("SimCLR", "VICReg", "MoCo")
        rows = {name: [row for row in self.log(name.lower())[1] if "knn" in row] for name in names}
        series = {name: [(row["seconds"], row["knn"]) for row in of] for name, of in rows.items()}
        for name in ("pixels", "random_init"):
            series[name.replace("_", " ")] = [(row["seconds"], row[f"knn_{name}"]) for row in rows["SimCLR"]]
        importlib.import_module("simclr").curves_svg(HERE / "assets" / "simclr_knn.svg", series, "seconds of training",
                                                     "kNN, validation")

    def temperatures(self, *flags):
        for t in (0.1, 0.5, 1):
            self.timed(f"temperature_{t}", 10, "--temperature", t, "--batch_size", 128, "--data", "cifar10", *flags)

    def batches(self, *flags):
        """Equal time, so the larger the batch the fewer the steps; batch norm sees 128 views at a time; the rate goes
        with the root of the batch."""
        for batch in (64, 256, 1024):
            chunk = ["--chunk", 64] if batch > 64 else []
            self.timed(f"batch_{batch}", 10, "--batch_size", batch, "--lr", 2e-3 * (batch / 64) ** 0.5, *chunk,
                       "--data", "cifar10", *flags)

    def gpu(self, *flags):
        """ResNet-18, 100 epochs, three seeds, for each objective: for a GPU."""
        for loss, seed in itertools.product(("simclr", "moco", "vicreg"), range(3)):
            t = 0.5 if loss == "simclr" else 0.1
            last = self.train(f"gpu_{loss}_seed{seed}", "--data", "cifar10", "--loss", loss, "--width", 64,
                              "--batch_size", 512, "--optimizer", "sgd", "--temperature", t, "--warmup", 500,
                              "--epochs", 100, "--seed", seed, *flags)
            print(loss, seed, {key: last[key] for key in ("test_knn", "test_linear", "seconds")}, flush=True)


class BenchIJEPA(Bench):
    """python tests.py BenchIJEPA.NAME, where NAME is one of the methods; nothing else should run meanwhile. Flags are
    passed on: --data and --data_dir."""

    script = "ijepa"
    VIT = "--data cifar10 --batch_size 128 --log_every 20".split()  # all: AdamW, crop and flip; a ViT of width 192,
    RATES = (1e-3, 2e-3, 4e-3)  # depth 6, 3 heads, patches of 4 pixels, the mean of its tokens; peaks to choose from
    ROWS = {  # name, 11 letters at most: the script, and its flags
        "ijepa": ("ijepa", "--dim 192 --depth 6 --heads 3 --predictor_dim 96 --predictor_depth 4"),
        "mae": ("mae", "--dim 192 --depth 6 --heads 3 --patch_size 4 --no-class_token --decoder_dim 128 "
                       "--decoder_depth 2 --decoder_heads 4 --mask_ratio 0.75 --norm_pix_loss"),
        "simclr_flip": ("simclr", "--encoder vit --width 192 --augment crop_flip"),
        "simclr_full": ("simclr", "--encoder vit --width 192"),
        "supervised": ("vit", "--arch cifar --patch_size 4 --no-conv_stem --pool mean --pos sincos")}

    def default(self):
        """The run without flags."""
        began = time.perf_counter()
        last = self.train("default_seed0")
        print({key: last[key] for key in last if "knn" in key or "linear" in key},
              f"{time.perf_counter() - began:.0f} s in all")

    def coverage(self, draws=10000, grid=8):
        """How often each patch of a grid is context, and target, in so many draws."""
        ijepa, generator = importlib.import_module("ijepa"), torch.Generator().manual_seed(0)
        draws, grid = int(draws), int(grid)
        seen, kept = torch.zeros(2, grid**2), 0
        for _ in range(draws // 25):
            ids, real, targets = ijepa.sample_masks(25, grid, generator)
            seen[0] += torch.bincount(ids[real], minlength=grid**2)
            seen[1] += torch.bincount(torch.cat(targets, dim=1).flatten(), minlength=grid**2)
            kept += real.float().mean().item()
        for name, counts in zip(("context", "target"), seen):
            print(f"{name}: each patch {counts.min():.0f} to {counts.max():.0f} times in {draws:,} draws, most over "
                  f"least {counts.max() / counts.min():.2f}")
            print("\n".join(" ".join(f"{v / draws:5.2f}" for v in row) for row in counts.view(grid, grid)))
        print(f"a context has {seen[0].sum() / draws:.1f} patches, of a batch of 25 padded to "
              f"{draws // 25 / kept:.2f} times as many")

    def row(self, name, *flags, seconds=1200):
        """One row of the comparison: about so many seconds of training, as many steps as twelve say, at that rate of
        three which a tenth of the steps chose by kNN (supervised: accuracy) on validation images; evaluated six
        times, so that the log gives the table at equal seconds and at equal images. The test images are left to
        compare."""
        script, recipe = self.ROWS[name]
        module, flags, seconds = importlib.import_module(script), [*self.VIT, *recipe.split(), *flags], float(seconds)
        finish = dict(vit="finish_run").get(script, f"finish_{script}")
        logs, bench = HERE / "assets" / "logs", Bench()
        bench.script = script
        (logs / self.script).mkdir(exist_ok=True)

        def run(label, lr, steps, evaluations, *more):
            base = lr * (2 if script == "mae" else 1)  # mae.py's is for 256 images
            with mock.patch.object(module, finish, lambda *_: None):
                bench.train(label, *flags, "--lr", base, "--steps", steps, "--warmup", max(1, steps // 10),
                            "--eval_every", math.ceil(steps / evaluations), *more)
            os.replace(logs / script / f"{label}.jsonl", logs / self.script / f"{label}.jsonl")
            rows = [json.loads(line) for line in open(logs / self.script / f"{label}.jsonl")]
            scores = [row.get("knn", row.get("val_accuracy")) for row in rows if "knn" in row or "val_accuracy" in row]
            print(f"{label}: {scores[-1]:.4f} after {rows[-1]['seconds']:.0f} s", flush=True)
            return scores[-1], rows

        _, rows = run(f"{name}_short", 1e-3, 12, 1, "--data", "shapes", "--labels", 0.1, "--log_every", 2)
        os.remove(logs / self.script / f"{name}_short.jsonl")
        ms = statistics.median(row["ms"] for row in rows if row.get("step", 0) > 2 and "ms" in row)
        steps = max(10, round(1e3 * seconds / ms))
        rate = max(self.RATES, key=lambda lr: run(f"{name}_tenth_lr{lr}", lr, max(1, steps // 10), 1)[0])
        run(name, rate, steps, 6)

    def comparison(self, *flags, seconds=1200):
        """Every row for as many seconds, then the table and the t-SNE picture of what they learned."""
        for name in self.ROWS:
            self.row(name, *flags, seconds=seconds)
        self.compare(*flags)

    def compare(self, *flags):
        """The table and pictures into out/bench/compare, the table into the logs too. best.pt is chosen on validation
        images, by the probe, and for the supervised row by accuracy."""
        paths = [f"out/bench/{name}/best.pt" for name in self.ROWS]
        data = [str(f) for f in flags]
        if importlib.import_module("ijepa").main(["--data", "cifar10", "--compare", ",".join(paths), "--out",
                                                  "out/bench/compare", *data]):
            sys.exit("--compare failed")
        text = json.dumps(dict(json.loads(Path("out/bench/compare/compare.json").read_text()), **about("ijepa.py")))
        (HERE / "assets" / "logs" / self.script / "compare.json").write_text(text + "\n")
        self.curves()

    def table(self):
        """The README's lines about compare.json."""
        folder, names = HERE / "assets" / "logs" / self.script, dict(
            supervised="with labels, vit.py", simclr_full="SimCLR", simclr_flip="SimCLR, colours as they are",
            mae="MAE", ijepa="I-JEPA", random_init="random init", pixels="pixels")
        keys = ("knn", "linear", "linear_10%", "linear_1%")
        results = json.loads((folder / "compare.json").read_text())
        lines = ["| | steps | kNN | linear | 10% of labels | 1% | RankMe | std |", "|---|" + 7 * "---|"]
        for name, label in names.items():
            scores, path = results[name], folder / f"{name}.jsonl"
            steps = f"{json.loads(path.read_text().splitlines()[-1])['step']:,}" if path.exists() else ""
            cells = [label, steps, *(f"{scores[key] + 1e-9:.1%}" for key in keys), f"{scores['rankme']:.0f}",
                     f"{scores['std']:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
        return lines

    def curves(self):
        """Charts of kNN on validation images from the rows' logs, at equal images and at equal seconds."""
        ijepa, logs = importlib.import_module("ijepa"), HERE / "assets" / "logs" / self.script
        for label, x in (("images", lambda row: 128 * row["step"]), ("seconds", lambda row: row["seconds"])):
            series = {}
            for name in self.ROWS:
                path = logs / f"{name}.jsonl"
                rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
                points = [(x(row), row["knn"]) for row in rows if "knn" in row]
                series |= {name: points} if points else {}
            ijepa.curves_svg(HERE / "assets" / f"ijepa_knn_{label}.svg", series, f"{label}, of training",
                             "kNN, validation")

    def speed(self, rounds=5):
        """A step of 192 × 6, patch 4, predictor 96 × 4, batch 256, contexts of 30 patches and four targets of 10:
        ijepa.py's against the official design, eager, with scaled_dot_product_attention, its AdamW and its loop over
        parameters for the average, in fp32 and under bf16 autocast, at the same masks. Then ijepa.py's with masks as
        it draws them, whose contexts are padded."""
        ijepa = importlib.import_module("ijepa")
        c = ijepa.Config(dim=192, depth=6, heads=3, predictor_dim=96, predictor_depth=4, predictor_heads=3,
                         batch_size=256, targets=4)
        (images, _), counter, B = ijepa.make_shapes(1000, 0), itertools.count(), 256
        _, _, autocast = ijepa.pick_device("cpu", "auto", "avx512_bf16")
        ours, free, plain = (ijepa.load_ijepa(c) for _ in range(3))
        order = torch.rand(B, 64).argsort(dim=1)
        context = order[:, :30].sort(dim=1).values
        targets = [order[:, 30:].gather(1, torch.rand(B, 34).argsort(dim=1)[:, :10]) for _ in range(4)]  # of the rest
        fixed = [context, torch.cat(targets), None]

        def attention(self, x, key_mask=None):
            B, N, C = x.shape
            q, k, v = self.qkv(x).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C))

        encoder, target, predictor = plain.encoder, plain.target_encoder, plain.predictor
        for block in [*encoder.blocks, *target.blocks, *predictor.predictor_blocks]:
            block.attn.forward = functools.partial(attention, block.attn)
        plain_opt = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], 1e-3, weight_decay=0.04)
        x = ijepa.normalise(images[:B], plain.stats).contiguous()

        def gather(x, masks):  # apply_masks of the official code
            return torch.cat([x.gather(1, ids[:, :, None].repeat(1, 1, x.size(2))) for ids in masks])

        def plain_step(enabled):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                with torch.no_grad():
                    h = gather(F.layer_norm(target(x), (192,)), targets)  # (4 B, 10, 192)
                z = gather(encoder.patch_embed(x) + encoder.pos_embed, [context])
                for block in encoder.blocks:
                    z = block(z)
                pos = predictor.predictor_pos_embed.repeat(B, 1, 1)
                z = predictor.predictor_embed(encoder.norm(z)) + gather(pos, [context])
                places = gather(pos, targets)  # (4 B, 10, 96)
                z = torch.cat((z.repeat(4, 1, 1), predictor.mask_token.repeat(4 * B, 10, 1) + places), dim=1)
                for block in predictor.predictor_blocks:
                    z = block(z)
                z = predictor.predictor_proj(predictor.predictor_norm(z)[:, 30:])
                loss = F.smooth_l1_loss(z, h)
            loss.backward()
            plain_opt.step()
            plain_opt.zero_grad()
            with torch.no_grad():
                for q, k in zip(encoder.parameters(), target.parameters()):
                    k.data.mul_(0.996).add_((1 - 0.996) * q.detach().data)

        def step(model, optimizer):
            ijepa.ijepa_step(model, model, optimizer, autocast, images, c, next(counter), 10**6, 0, 1)

        def at_fixed_masks():
            with mock.patch.object(ijepa, "draw_masks", lambda *_: fixed):
                step(ours, optimizer)

        optimizer, other = ijepa.adamw_groups(ours, 0.04), ijepa.adamw_groups(free, 0.04)
        run = {"fp32": lambda: plain_step(False), "autocast": lambda: plain_step(True), "ijepa.py": at_fixed_masks,
               "own masks": lambda: step(free, other)}
        times = in_turn(run, int(rounds), warm=2)
        for name, t in times.items():
            print(f"{name:>9} {1e3 * statistics.median(t):8.1f} ms, {256 / statistics.median(t):6.0f} images/s | fp32 "
                  f"takes {ratio(times, 'fp32', name):.2f} times as long, autocast "
                  f"{ratio(times, 'autocast', name):.2f}", flush=True)


def about(script):
    """What a log says of where it was made."""
    cpu = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line]
    return dict(script=script, sha256=hashlib.sha256((HERE / script).read_bytes()).hexdigest(), torch=torch.__version__,
                device=f"{len(cpu)} x {cpu[0]}")


# --------------------------------------------------------------------------------------------------------------------
# running


class Result(unittest.TextTestResult):
    """Keeps each test's seconds, and counts a test once however many of its subtests fail."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seconds = {}

    def startTest(self, test):
        self.started = time.perf_counter()
        super().startTest(test)

    def stopTest(self, test):
        self.seconds[test.id()] = time.perf_counter() - self.started
        super().stopTest(test)


def main():
    if sys.argv[1:] and sys.argv[1].startswith("Bench"):
        bench, name = sys.argv[1].split(".")
        return getattr(globals()[bench](), name)(*sys.argv[2:])
    runner = unittest.TextTestRunner(sys.stdout, resultclass=Result, warnings="ignore")
    result = unittest.main(testRunner=runner, exit=False).result
    for name, seconds in sorted(result.seconds.items(), key=lambda item: -item[1])[:5]:
        print(f"{seconds:6.1f} s  {name.removeprefix('__main__.')}")
    bad = [getattr(test, "test_case", test).id() for test, _ in result.failures + result.errors]
    bad = {*bad, *(test.id() for test in result.unexpectedSuccesses)}
    skipped = {getattr(test, "test_case", test).id() for test, _ in result.skipped} - bad
    print(f"{len({*result.seconds} - bad - skipped)} passed, {len(bad)} failed, {len(skipped)} skipped")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
