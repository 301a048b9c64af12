"""Quickstart training speed on this CPU: maxlm's step against a plain PyTorch loop of the same model and batches.

    python3 benchmarks/quickstart_vs_torch.py --json record.json        (PyTorch is needed here and nowhere else)

Both train the model of configs/quickstart.py in float32 from the same initial weights on the same packed rows, with
the same optimizer and learning rates, in turns of `--steps` steps, and must reach the same losses. The figure is the
ratio of tokens/s in each turn; its median and spread over the turns are what these noisy machines allow to be said.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from maxlm.cli import use_huge_pages
from maxlm.config import ModelConfig, OptimizerConfig, RunConfig
from maxlm.overrides import apply_overrides, load_config
from maxlm.parallel.mesh import make_mesh
from maxlm.training.benchmark import synthetic_batch
from maxlm.training.evaluate import to_device
from maxlm.training.schedule import make_schedule
from maxlm.training.state import init_state
from maxlm.training.step import compile_step

LOSS_TOLERANCE = 2e-3


class TorchBlock(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.c = c
        self.n1, self.n2 = nn.Parameter(torch.ones(c.hidden_dim)), nn.Parameter(torch.ones(c.hidden_dim))
        self.qkv = nn.Linear(c.hidden_dim, (c.num_heads + 2 * c.num_kv_heads) * c.head_dim, bias=False)
        self.out = nn.Linear(c.num_heads * c.head_dim, c.hidden_dim, bias=False)
        self.up = nn.Linear(c.hidden_dim, 2 * c.mlp_dim, bias=False)
        self.down = nn.Linear(c.mlp_dim, c.hidden_dim, bias=False)
        if c.qk_norm:
            self.qn, self.kn = nn.Parameter(torch.ones(c.head_dim)), nn.Parameter(torch.ones(c.head_dim))

    def forward(self, x, cos, sin, mask):
        c = self.c
        norm = lambda a, g: F.rms_norm(a, a.shape[-1:], g, c.norm_eps)  # noqa: E731
        group = c.num_heads // c.num_kv_heads
        b, t, _ = x.shape
        qkv = self.qkv(norm(x, self.n1)).view(b, t, c.num_kv_heads, group + 2, c.head_dim)
        q = qkv[:, :, :, :group].reshape(b, t, c.num_heads, c.head_dim)
        k, v = qkv[:, :, :, group], qkv[:, :, :, group + 1]
        if c.qk_norm:
            q, k = norm(q, self.qn), norm(k, self.kn)

        def turn(a):
            first, second = a.chunk(2, -1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).transpose(1, 2)

        o = F.scaled_dot_product_attention(turn(q), turn(k), v.transpose(1, 2), attn_mask=mask, enable_gqa=group > 1)
        x = x + self.out(o.transpose(1, 2).reshape(b, t, -1))
        gate, up = self.up(norm(x, self.n2)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class TorchModel(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.c = c
        self.embedding = nn.Embedding(c.vocab_size, c.hidden_dim)
        self.blocks = nn.ModuleList(TorchBlock(c) for _ in range(c.num_layers))
        self.nf = nn.Parameter(torch.ones(c.hidden_dim))

    def forward(self, tokens, targets, segments, positions):
        c = self.c
        frequency = c.rope.theta ** (-torch.arange(0, c.head_dim, 2).double() / c.head_dim)
        angle = positions[:, :, None, None].float() * frequency.float()
        cos, sin = angle.cos(), angle.sin()
        t = tokens.shape[1]
        mask = (segments[:, None, :, None] == segments[:, None, None, :]) & torch.ones(t, t, dtype=torch.bool).tril()
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cos, sin, mask)
        logits = F.rms_norm(x, x.shape[-1:], self.nf, c.norm_eps) @ self.embedding.weight.T
        return F.cross_entropy(logits.view(-1, c.vocab_size), targets.view(-1), ignore_index=-1)


def copy_weights(model: TorchModel, params) -> None:
    """maxlm's initial weights, so that the losses can be compared."""
    c = model.c
    take = lambda p: torch.from_numpy(np.array(p[...]))  # noqa: E731
    with torch.no_grad():
        model.embedding.weight.copy_(take(params.embedding))
        layers = params.layers_0
        for i, block in enumerate(model.blocks):
            block.qkv.weight.copy_(take(layers.attention.qkv)[i].reshape(c.hidden_dim, -1).T)
            block.out.weight.copy_(take(layers.attention.out)[i].reshape(-1, c.hidden_dim).T)
            gate, up = take(layers.mlp.gate)[i], take(layers.mlp.up)[i]
            block.up.weight.copy_(torch.cat([gate, up], dim=1).T)
            block.down.weight.copy_(take(layers.mlp.down)[i].T)


def torch_optimizer(model: TorchModel, o: OptimizerConfig):
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decay, "weight_decay": o.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=o.learning_rate, betas=(o.b1, o.b2), eps=o.eps, fused=True)


class TorchLoop:
    def __init__(self, config: RunConfig, params):
        self.config, self.model, self.step = config, TorchModel(config.model), 0
        copy_weights(self.model, params)
        self.optimizer = torch_optimizer(self.model, config.optimizer)
        self.schedule = [float(make_schedule(config.schedule, 1.0, config.train.num_steps)(i)) for i in range(400)]

    def __call__(self, batch) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.optimizer.learning_rate * self.schedule[self.step]
        loss = self.model(batch["tokens"], batch["targets"], batch["segment_ids"], batch["positions"])
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss.item()


class JaxLoop:
    def __init__(self, config: RunConfig, mesh):
        self.mesh, self.compiled, self.state = mesh, compile_step(config, mesh), init_state(config, mesh)

    def __call__(self, batch) -> float:
        self.state, metrics = self.compiled(self.state, to_device(batch, self.mesh))
        return float(metrics.loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(Path(__file__).resolve().parent.parent / "configs/quickstart.py"))
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=10, help="steps a turn")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    config = apply_overrides(load_config(arguments.config), ["optimizer.name=adamw", *arguments.overrides])
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=None))
    rows = range(config.train.global_batch_size)
    numpy_batches = [synthetic_batch(config, seed, 2, rows) for seed in range(4)]
    torch_batches = [{n: torch.from_numpy(a).long() for n, a in b.items()} for b in numpy_batches]
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        ours = JaxLoop(config, mesh)
        theirs = TorchLoop(config, ours.state.params)
        losses = {"maxlm": [], "torch": []}
        rates = {"maxlm": [], "torch": []}
        for turn in range(arguments.turns + 1):
            for name, loop, batches in (("maxlm", ours, numpy_batches), ("torch", theirs, torch_batches)):
                clock = time.perf_counter()
                losses[name] += [loop(batches[i % 4]) for i in range(arguments.steps)]
                if turn:  # the first turn warms up
                    positions = arguments.steps * len(rows) * config.train.seq_len
                    rates[name].append(positions / (time.perf_counter() - clock))
    apart = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    if not apart < LOSS_TOLERANCE:
        sys.exit(f"the two loops do not train the same model: losses differ by up to {apart:.2e}")
    ratios = [a / b for a, b in zip(rates["maxlm"], rates["torch"], strict=True)]
    record = {
        "benchmark": "quickstart_vs_torch",
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios), "count": len(ratios)},
        "tokens_per_second": {name: statistics.median(r) for name, r in rates.items()},
        "largest_loss_difference": apart,
        "versions": {"jax": jax.__version__, "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "overrides": arguments.overrides,
    }
    print(json.dumps(record, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    use_huge_pages()  # as the maxlm command does; PyTorch has them here too
    main()
