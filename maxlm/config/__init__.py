"""The configuration of a whole run, as frozen dataclasses of plain values.

A run is one `RunConfig`. `configs/*.py` build one, `--set a.b=c` edits one (overrides.py), and the
resolved value is saved with the run as `config.json` and read back by `from_dict`. Every dataclass
checks itself on construction and raises `schema.ConfigError`, a `ValueError` that names the field and the fix.

The sections of the model, of how it is computed and of resilience have files of their own (model.py, compute.py,
resilience.py).
Standard library only: reading a config must never start an accelerator runtime.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from maxlm.config.compute import ComputeConfig, PrecisionConfig, RematConfig
from maxlm.config.model import ModelConfig
from maxlm.config.model import MoEConfig as MoEConfig
from maxlm.config.model import ParametrizationConfig as ParametrizationConfig
from maxlm.config.model import RopeConfig as RopeConfig
from maxlm.config.resilience import ResilienceConfig
from maxlm.schema import check_types, flatten, not_negative, positive, require


@dataclass(frozen=True)
class DatasetConfig:
    """One prepared folder of a mixture and its sampling weight (in rows of `train.seq_len` tokens). 0 is for one that
    only a later stage draws from."""

    path: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_types(self, "data.mixture")
        not_negative("data.mixture", weight=self.weight)


@dataclass(frozen=True)
class StageConfig:
    """From step `from_step` on, rows are drawn with these weights in place of `data.mixture`'s; folders that are not
    named here rest. Each folder goes on where it was, so that no row comes again before its epoch is over."""

    from_step: int
    mixture: tuple[DatasetConfig, ...]

    def __post_init__(self) -> None:
        check_types(self, "data.stages")
        positive("data.stages", from_step=self.from_step)


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from: one prepared folder (`path`), several (`mixture`), or a named `source` that
    `maxlm train` prepares into `RUN_DIR/data` on first use, with the tokenizer and split given here. `stages` change
    the weights of `mixture` during the run."""

    path: str | None = None
    source: str | None = None
    mixture: tuple[DatasetConfig, ...] = ()
    stages: tuple[StageConfig, ...] = ()
    tokenizer: str = "bytes"  # for `source`: 'bytes', 'bpe:SIZE', or a tokenizer.json
    heldout_fraction: float = 0.02  # for `source`: share of documents, chosen by hash
    read_threads: int = 4
    worker_processes: int = 0  # 0 reads in threads of the training process
    prefetch_batches: int = 8

    def __post_init__(self) -> None:
        check_types(self, "data")
        given = [n for n in ("path", "source", "mixture") if getattr(self, n)]
        require(len(given) <= 1, f"data.{' and data.'.join(given)} are both given: keep one of path, source, mixture")
        self._check_stages()
        require(0 < self.heldout_fraction < 1, f"data.heldout_fraction={self.heldout_fraction} must be between 0 and 1")
        positive("data", read_threads=self.read_threads, prefetch_batches=self.prefetch_batches)
        not_negative("data", worker_processes=self.worker_processes)

    def _check_stages(self) -> None:
        require(not self.stages or self.mixture, "data.stages needs data.mixture, which names the folders")
        steps = [stage.from_step for stage in self.stages]
        require(all(a < b for a, b in zip(steps, steps[1:], strict=False)),
                f"data.stages: from_step must ascend from stage to stage, not {', '.join(map(str, steps))}")
        paths = [dataset.path for dataset in self.mixture]
        for stage in self.stages:
            named = [dataset.path for dataset in stage.mixture]
            where = f"data.stages from step {stage.from_step}"
            for path in named:
                require(path in paths, f"{where}: {path!r} is not a folder of data.mixture ({', '.join(paths)}): add "
                                       "it there, with weight 0 if earlier stages leave it out")
            require(len(set(named)) == len(named) and len(set(paths)) == len(paths),
                    f"{where}: a folder is named twice, in the stage or in data.mixture")
        weights = self.weights_by_step()
        for from_step, of_stage in weights if self.mixture else ():
            require(any(of_stage), "data.mixture: all weights are 0" if not from_step else
                    f"data.stages from step {from_step}: all weights are 0: give a folder a weight")
        for path, ever in zip(paths, zip(*(of_stage for _, of_stage in weights), strict=True), strict=False):
            require(any(ever), f"data.mixture: {path} has weight 0 in every stage: give it one, or leave it out")

    def weights_by_step(self) -> tuple[tuple[int, tuple[float, ...]], ...]:
        """(first step, weight of each folder of `mixture`) for each stage, the first from step 0."""
        paths = [dataset.path for dataset in self.mixture]
        stages = [(0, self.mixture), *((stage.from_step, stage.mixture) for stage in self.stages)]
        return tuple(
            (first, tuple(float({d.path: d.weight for d in named}.get(path, 0.0)) for path in paths))
            if first else (0, tuple(float(d.weight) for d in named))
            for first, named in stages
        )


@dataclass(frozen=True)
class TrainConfig:
    """What is trained: how long, on how much, from which seed. Batch sizes count sequences."""

    num_steps: int = 1000
    global_batch_size: int = 32
    seq_len: int = 1024
    seed: int = 0
    grad_accumulation: int = 1
    z_loss: float = 0.0  # weight of mean(logsumexp^2) (PaLM, arXiv:2204.02311, section 5)

    def __post_init__(self) -> None:
        check_types(self, "train")
        positive("train", num_steps=self.num_steps, global_batch_size=self.global_batch_size, seq_len=self.seq_len,
                  grad_accumulation=self.grad_accumulation)
        not_negative("train", z_loss=self.z_loss, seed=self.seed)
        require(self.seed < 2**32, f"train.seed={self.seed} must be below 2**32")
        require(
            self.global_batch_size % self.grad_accumulation == 0,
            f"train.global_batch_size={self.global_batch_size} must be a multiple of "
            f"train.grad_accumulation={self.grad_accumulation}",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """`adamw` (Loshchilov & Hutter, arXiv:1711.05101), or `muon` (Jordan et al. 2024) on the layers' matrices with
    AdamW on everything else. Muon's updates are scaled to the size of AdamW's (Liu et al. 2025, arXiv:2502.16982,
    section 2.2), so one learning rate serves both. Weight decay is decoupled and skips norm gains.

    mu_dtype, nu_dtype: what the first and the second moment are stored in; they are computed in float32. float8 is a
    byte a value and one a block of up to 128 (training/moments.py), always rounded stochastically. stochastic_rounding:
    bfloat16 moments are rounded so too.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 3e-4
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0  # global gradient norm; 0 means no clipping
    mu_dtype: Literal["float32", "bfloat16", "float8"] = "float32"
    nu_dtype: Literal["float32", "bfloat16", "float8"] = "float32"
    stochastic_rounding: bool = False
    muon_momentum: float = 0.95

    def __post_init__(self) -> None:
        check_types(self, "optimizer")
        positive("optimizer", learning_rate=self.learning_rate, eps=self.eps)
        not_negative("optimizer", weight_decay=self.weight_decay, clip_norm=self.clip_norm)
        for name in ("b1", "b2", "muon_momentum"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name}={getattr(self, name)} must be in [0, 1)")
        require(not self.stochastic_rounding or "bfloat16" in (self.mu_dtype, self.nu_dtype),
                "optimizer.stochastic_rounding is for bfloat16 moments: set mu_dtype or nu_dtype so, or leave it out")


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over steps: linear warm-up, then the named shape down to `final_fraction` of the peak.

    wsd: warm-up, stable, then linear decay over the last `decay_steps` (Hu et al. 2024, arXiv:2404.06395).
    """

    name: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    warmup_steps: int = 100
    decay_steps: int = 0  # wsd only
    final_fraction: float = 0.1

    def __post_init__(self) -> None:
        check_types(self, "schedule")
        not_negative("schedule", warmup_steps=self.warmup_steps, decay_steps=self.decay_steps)
        require(0 <= self.final_fraction <= 1, f"schedule.final_fraction={self.final_fraction} must be in [0, 1]")
        require(self.name != "wsd" or self.decay_steps > 0, "schedule.decay_steps must be set for schedule.name='wsd'")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis. `fsdp='rest'` takes the devices that the other axes leave over."""

    data: int = 1
    stage: int = 1
    fsdp: int | Literal["rest"] = "rest"
    expert: int = 1
    context: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        check_types(self, "mesh")
        for name in AXES:
            size = getattr(self, name)
            require(size == "rest" or size > 0, f"mesh.{name}={size!r} must be 1 or more (sizes are absolute numbers)")


AXES = ("data", "stage", "fsdp", "expert", "context", "tensor")


@dataclass(frozen=True)
class CheckpointConfig:
    """Saves every `every_steps` and at the end. The newest `keep_last` stay, and every multiple of `keep_every`.

    path: the folder that keeps this run's checkpoints, on storage which every host sees, or the URL of an object store,
    'gs://BUCKET/RUN' or 's3://BUCKET/RUN' ('file:///FOLDER' keeps their format in a folder); None: RUN_DIR/checkpoints.
    local_path: a folder on each host's own fast storage (/dev/shm/maxlm, an NVMe disk), where every process saves its
    part of the state every `local_every_steps`, and the newest `local_keep_last` stay beside the one being written.
    """

    every_steps: int = 500
    keep_last: int = 2
    keep_every: int = 0  # 0 keeps none beyond keep_last
    path: str | None = None
    local_path: str | None = None
    local_every_steps: int = 0
    local_keep_last: int = 2

    def __post_init__(self) -> None:
        check_types(self, "checkpoint")
        positive("checkpoint", every_steps=self.every_steps, keep_last=self.keep_last)
        not_negative("checkpoint", keep_every=self.keep_every, local_every_steps=self.local_every_steps)
        require(
            self.keep_every % self.every_steps == 0,
            f"checkpoint.keep_every={self.keep_every} must be a multiple of checkpoint.every_steps={self.every_steps}",
        )
        require(
            "://" not in (self.path or "") or bool(re.fullmatch(r"((gs|s3)://[^/]+|file://)/.+", self.path or "")),
            f"checkpoint.path={self.path!r} must be a folder, gs://BUCKET/RUN, s3://BUCKET/RUN or file:///FOLDER",
        )
        require(
            "://" not in (self.local_path or ""),
            f"checkpoint.local_path={self.local_path!r} is a URL: give a folder on each host's own storage",
        )
        require(
            (self.local_path is None) == (self.local_every_steps == 0),
            "checkpoint.local_path and checkpoint.local_every_steps go together: give both, or neither",
        )
        require(
            self.local_keep_last >= 2,
            f"checkpoint.local_keep_last={self.local_keep_last} must be 2 or more: hosts may be one save apart",
        )


@dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation every `every_steps` (0: at the end only) on `num_batches` global batches (0: all)."""

    every_steps: int = 500
    num_batches: int = 16

    def __post_init__(self) -> None:
        check_types(self, "eval")
        not_negative("eval", every_steps=self.every_steps, num_batches=self.num_batches)


@dataclass(frozen=True)
class LoggingConfig:
    """`profile_steps` steps from `profile_start` are traced into `RUN_DIR/profile` (0 steps: never)."""

    every_steps: int = 10
    tensorboard: bool = True
    sample_prompt: str = ""  # text continued at the end of the run into sample.txt; empty: none
    profile_start: int = 10
    profile_steps: int = 0

    def __post_init__(self) -> None:
        check_types(self, "logging")
        positive("logging", every_steps=self.every_steps)
        not_negative("logging", profile_start=self.profile_start, profile_steps=self.profile_steps)


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    remat: RematConfig = field(default_factory=RematConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        check_types(self, "")
        ramp = self.schedule.warmup_steps + (self.schedule.decay_steps if self.schedule.name == "wsd" else 0)
        require(
            ramp <= self.train.num_steps,
            f"schedule.warmup_steps + decay_steps = {ramp} is more than train.num_steps={self.train.num_steps}",
        )
        require(
            self.optimizer.name == "adamw" or self.model.parametrization.name == "standard",
            f"model.parametrization.name={self.model.parametrization.name!r} is for optimizer.name='adamw': set it to "
            "'standard', or the optimizer to adamw",
        )
        require(
            self.model.num_experts > 0 or not self.precision.fp8_exchange,
            "precision.fp8_exchange is for models with experts, and model.num_experts=0: leave it out",
        )
        for name in ("plain_first_layers", "plain_last_layers"):
            count, pattern = getattr(self.precision, name), len(self.model.layer_pattern)
            require(
                count <= self.model.num_layers and count % pattern == 0,
                f"precision.{name}={count} must be a multiple of the {pattern} layers of model.layer_pattern, up to "
                f"model.num_layers={self.model.num_layers}",
            )
        require(
            self.precision.recipe != "fp8_block" or not self.model.num_experts or "experts" not in
            self.precision.fp8_sites,
            "precision.recipe='fp8_block' has no products of experts: set precision.fp8_sites=attention,mlp, or the "
            "recipe to fp8 or fp8_rowwise",
        )
        if self.mesh.stage > 1:
            self._check_pipeline()
        chunks = self.compute.loss_chunks
        require(
            chunks == "auto" or self.train.seq_len % (chunks * self.mesh.context) == 0,
            f"compute.loss_chunks={chunks} does not divide train.seq_len / mesh.context = "
            f"{self.train.seq_len / self.mesh.context:g}: use a divisor or 'auto'",
        )
        size = self.data.tokenizer.removeprefix("bpe:")
        require(
            not self.data.source or not size.isdecimal() or int(size) <= self.model.vocab_size,
            f"data.tokenizer={self.data.tokenizer!r} makes more tokens than model.vocab_size={self.model.vocab_size}: "
            "set model.vocab_size to its size",
        )

    def _check_pipeline(self) -> None:
        stage, repeats, count = self.mesh.stage, self.compute.pipeline_repeats, self.compute.pipeline_microbatches
        pattern, dense = len(self.model.layer_pattern), self.model.moe.dense_layers
        layers, unit = self.model.num_layers - dense, stage * repeats * pattern
        require(layers % unit == 0,
                f"model.num_layers{' - model.moe.dense_layers' if dense else ''} = {layers} is not a multiple of "
                f"mesh.stage * compute.pipeline_repeats * layers of model.layer_pattern = {unit}: change one of them")
        require(count == "auto" or count % stage == 0,
                f"compute.pipeline_microbatches={count} must be a multiple of mesh.stage={stage}")
        first, last = self.precision.plain_first_layers, self.precision.plain_last_layers
        require(first <= dense and last == 0,
                f"precision.plain_first_layers={first} and plain_last_layers={last} cut the layers that the stages "
                f"share, which are computed alike: with mesh.stage={stage} set the first to at most "
                f"model.moe.dense_layers={dense} and the other to 0")
        require(self.resilience.corruption_check_every_steps == 0,
                f"resilience.corruption_check_every_steps does not compare stages: with mesh.stage={stage} set it to 0")


# What only changes how a run runs, and so may differ when it resumes. Everything else decides what is trained.
RESUMABLE = frozenset(
    {"mesh", "remat", "compute", "checkpoint", "eval", "logging", "resilience", "train.num_steps", "data.path",
     "data.read_threads", "data.worker_processes", "data.prefetch_batches"}
)


def training_difference(saved: RunConfig, now: RunConfig, *, at_step: int = 0) -> list[str]:
    """Lines 'key: saved -> now' for every field that differs and decides what is trained.

    `resilience` decides about training only once something went wrong, and so may change, as a person would have it.
    The folders of `data.path` and `data.mixture` may move, because the manifests' digest and not a folder's name
    identifies the data (training/loop.py compares it). The step count may grow; a schedule that depends on it is the
    user's choice. A decay that has not begun at `at_step` may change: a branch leaves a constant rate where it likes.
    """
    before, after = flatten(saved), flatten(now)
    for leaves, config in ((before, saved), (after, now)):
        del leaves["data.stages"]
        leaves["data.mixture"] = [weights for _, weights in config.data.weights_by_step()]
        leaves["data.stages"] = [first for first, _ in config.data.weights_by_step()[1:]]
        if 0 < at_step <= _stable_until(config):
            leaves |= {"schedule.name": "stable", "schedule.decay_steps": 0, "schedule.final_fraction": 1.0}
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and key not in RESUMABLE and key.split(".")[0] not in RESUMABLE
    ]


def _stable_until(config: RunConfig) -> int:
    """The steps before which the learning rate does not fall."""
    if config.schedule.name in ("constant", "wsd"):
        return config.train.num_steps - (config.schedule.decay_steps if config.schedule.name == "wsd" else 0)
    return 0
