"""How a step is computed: precision, rematerialisation, kernels."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from maxlm.schema import check_types, not_negative, require


@dataclass(frozen=True)
class PrecisionConfig:
    """Dtype of activations and of the operands of matrix products. Parameters are float32 in every recipe; optimizer
    state is what `optimizer` says. Products of float32 run as the backend does by default, which is TF32 on NVIDIA
    GPUs; under bf16 weight gradients are summed over devices in bfloat16 and added to float32 masters.

    fp8, fp8_rowwise, fp8_block: bf16, with the products at `fp8_sites` in 8 bits (docs/FP8.md): one scale a tensor, one
    a row, or one a block (1x128 activations by 128x128 weights). The first `plain_first_layers` and the last
    `plain_last_layers` stay in bf16. power_of_two_scales: scales are rounded down to powers of two, which makes scaling
    exact; those of blocks always are. fp8_exchange: tokens travel to experts on other
    devices in 8 bits, and gradients of their results (docs/MOE.md).
    """

    recipe: Literal["float32", "bf16", "fp8", "fp8_rowwise", "fp8_block"] = "bf16"
    fp8_sites: tuple[Literal["attention", "mlp", "experts"], ...] = ("attention", "mlp", "experts")
    plain_first_layers: int = 0
    plain_last_layers: int = 0
    power_of_two_scales: bool = False
    fp8_exchange: bool = False

    def __post_init__(self) -> None:
        check_types(self, "precision")
        not_negative("precision", plain_first_layers=self.plain_first_layers, plain_last_layers=self.plain_last_layers)
        if not self.recipe.startswith("fp8"):
            for each in fields(self)[1:]:
                require(
                    getattr(self, each.name) == each.default,
                    f"precision.{each.name} is for the fp8 recipes, and precision.recipe={self.recipe!r}: leave it out",
                )


@dataclass(frozen=True)
class RematConfig:
    """What a layer keeps for its backward pass: all of it ('none'), its input alone ('full'), beside it the results of
    attention and of the MLP's first products ('names'), or those and the results of all other matrix products
    ('dots'), so that only norms, rotations, activations, routers and the experts' rows are computed again.

    full_offload, names_offload: what these keep waits in the host's memory (docs/PIPELINE.md).
    stage: with mesh.stage, a stage keeps its input alone, and all of its layers while a microbatch goes back through
    it; what is outside of the stages is as with 'full'.
    """

    policy: Literal["none", "full", "dots", "names", "full_offload", "names_offload", "stage"] = "none"

    def __post_init__(self) -> None:
        check_types(self, "remat")


@dataclass(frozen=True)
class ComputeConfig:
    """How the step is computed, never what: kernels, layer loop, loss chunks, the way of tokens to their experts.

    context_attention: along mesh.context: keys and values go round a ring, or are gathered, or heads are exchanged for
    tokens; 'auto' is the way that the platform has the fast kernel for (docs/PARALLELISM.md).
    expert_exchange: along mesh.expert; 'auto' is ragged_all_to_all on TPUs, elsewhere what sends less (docs/MOE.md).
    layer_unroll: repeats of the layer pattern compiled into one scan iteration; 'all' unrolls the whole stack.
    loss_chunks: pieces of the sequence whose logits exist at one time; 'auto' picks from the vocabulary.
    pipeline_microbatches, pipeline_repeats: along mesh.stage (docs/PIPELINE.md), how many microbatches flow through the
    stages ('auto': of one row on each device), and how many pieces of the layers each stage holds: more of either leave
    a smaller share of the step idle.
    offload_optimizer: the optimizer's state waits in the host's memory between updates (docs/PIPELINE.md).
    deterministic: on GPUs, kernels and compilation that give the same bits every time (elsewhere they do anyway); what
    it costs is in docs/RESILIENCE.md.
    """

    attention: Literal["auto", "reference", "cudnn", "splash"] = "auto"
    context_attention: Literal["auto", "ring", "all_gather", "all_to_all"] = "auto"
    grouped_matmul: Literal["auto", "blocks", "ragged_dot", "mosaic_gpu", "mosaic_tpu"] = "auto"
    expert_exchange: Literal["auto", "all_to_all", "ragged_all_to_all", "all_gather"] = "auto"
    deterministic: bool = False
    layer_unroll: int | Literal["all"] = 1
    loss_chunks: int | Literal["auto"] = "auto"
    pipeline_microbatches: int | Literal["auto"] = "auto"
    pipeline_repeats: int = 1
    offload_optimizer: bool = False

    def __post_init__(self) -> None:
        check_types(self, "compute")
        for name in ("layer_unroll", "loss_chunks", "pipeline_microbatches", "pipeline_repeats"):
            value = getattr(self, name)
            require(isinstance(value, str) or value > 0, f"compute.{name}={value!r} must be 1 or more")
