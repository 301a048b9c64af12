"""What can be done with a finished or stopped run: evaluate it, sample from it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from maxlm.checkpoint import read_meta, require_step, restore_state
from maxlm.config import DatasetConfig, MeshConfig, RunConfig
from maxlm.data.folders import datasets_of
from maxlm.data.loader import HeldoutData
from maxlm.data.tokenizer import Tokenizer, load_tokenizer
from maxlm.model import Transformer
from maxlm.model.decode import sample
from maxlm.parallel.mesh import check_divisible, make_mesh
from maxlm.schema import ConfigError, from_dict
from maxlm.training.evaluate import local_rows, make_evaluator
from maxlm.training.state import abstract_state

CHECKPOINTS, CONFIG_FILE, DATA, TOKENIZER = "checkpoints", "config.json", "data", "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"  # names the end-of-text token of TOKENIZER


def load_config_of(run_dir: Path, step: int | None) -> tuple[RunConfig, int]:
    """The config a checkpoint was trained with, and its step (the newest one's where `step` is None)."""
    if not run_dir.is_dir():
        raise ConfigError(f"--run-dir {run_dir}: no such folder; give the folder that `maxlm train` wrote")
    step = require_step(run_dir / CHECKPOINTS, step)
    config = from_dict(RunConfig, read_meta(run_dir / CHECKPOINTS, step)["config"])
    here = dataclasses.replace(config.compute, attention="auto")  # this machine's, not the one it was trained on
    return dataclasses.replace(config, compute=here), step


def evaluate(run_dir: Path, step: int | None, data: str | None, batches: int) -> dict[str, Any]:
    """Held-out loss of a checkpoint over `batches` global batches (0: all), as the JSON of `maxlm eval`.

    On any number of devices: the mesh is the run's where it fits, else all devices along `fsdp`.
    """
    config, step = load_config_of(run_dir, step)
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, num_batches=batches))
    try:
        mesh = make_mesh(config.mesh)
    except ConfigError:
        mesh = make_mesh(dataclasses.replace(config.mesh, data=1, stage=1, fsdp="rest", tensor=1))
    check_divisible(mesh, config)
    folders = (DatasetConfig(data),) if data else datasets_of(config.data, config.train.seq_len, run_dir / DATA)
    size = config.train.global_batch_size
    heldout = HeldoutData(folders, seq_len=config.train.seq_len, global_batch_size=size)
    _check_heldout(heldout, folders, run_dir)
    with jax.set_mesh(mesh):
        params = _restored_params(config, run_dir, step, mesh)
        result = make_evaluator(config, mesh)(params, heldout, local_rows(mesh, size))
    return {
        "step": step, "loss": result.loss, "perplexity": math.exp(min(result.loss, 700.0)),
        "bits_per_byte": result.bits_per_byte, "tokens": result.tokens, "bytes": result.bytes,
    }


def _check_heldout(heldout: HeldoutData, folders: tuple[DatasetConfig, ...], run_dir: Path) -> None:
    where = ", ".join(folder.path for folder in folders)
    if not heldout.rows:
        raise ConfigError(f"{where}: no held-out text; give --data a folder prepared with a larger --heldout-fraction")
    if heldout.datasets[0].manifest.tokenizer.sha256 != tokenizer_of(run_dir).sha256:
        raise ConfigError(
            f"{where}: prepared with another tokenizer than this run's; prepare it with --tokenizer "
            + (str(run_dir / TOKENIZER) if (run_dir / TOKENIZER).exists() else "bytes")
        )


def tokenizer_of(run_dir: Path) -> Tokenizer:
    """The tokenizer that the run directory keeps; bytes where it keeps none."""
    saved = run_dir / TOKENIZER
    return load_tokenizer(str(saved) if saved.exists() else "bytes")


def generate(run_dir: Path, step: int | None, prompt: str, **options: Any) -> str:
    """`prompt` and its continuation by a checkpoint, restored onto one device."""
    config, step = load_config_of(run_dir, step)
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    return continue_text(_restored_params(config, run_dir, step, mesh), run_dir, prompt, **options)


def _restored_params(config: RunConfig, run_dir: Path, step: int, mesh: Mesh) -> Transformer:
    """A checkpoint's parameters alone: the optimizer state stays on disk."""
    like = {"params": abstract_state(config, mesh).params}
    return restore_state(run_dir / CHECKPOINTS, step, like)["params"]


def on_host(params: Transformer) -> Transformer:
    """The parameters as numpy arrays on every process. Collective, one array after another."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, params)
    from jax.experimental import multihost_utils

    return jax.tree.map(lambda a: multihost_utils.process_allgather(a, tiled=True), params)


def continue_text(params: Transformer, run_dir: Path, prompt: str, *, num_tokens: int, seed: int = 0,
                  temperature: float = 0.8, top_k: int = 0, top_p: float = 0.95) -> str:
    """`prompt` and `num_tokens` sampled tokens after it, cut at the end of the document. Deterministic in `seed`.
    Samples on one device of this process; `params` must be whole here (`on_host`)."""
    for name, value, fine in (
        ("--tokens", num_tokens, num_tokens > 0),
        ("--temperature", temperature, temperature >= 0),
        ("--top-k", top_k, top_k >= 0),
        ("--top-p", top_p, 0 < top_p <= 1),
        ("--seed", seed, 0 <= seed < 2**32),
    ):
        if not fine:
            raise ConfigError(f"{name}={value} is out of range")
    tokenizer = tokenizer_of(run_dir)
    ids = [tokenizer.eot_id, *tokenizer.encode_batch([prompt])[0].tolist()]
    params = jax.tree.map(lambda a: jax.device_put(np.asarray(a), jax.local_devices()[0]), params)
    new = sample(params, jnp.asarray([ids], jnp.int32), jax.random.key(seed), num_tokens=num_tokens,
                 temperature=temperature, top_k=top_k, top_p=top_p)
    tokens = np.asarray(new)[0].tolist()
    if tokenizer.eot_id in tokens:
        tokens = tokens[: tokens.index(tokenizer.eot_id)]
    return tokenizer.decode(ids[1:] + tokens)
