"""What the matrix products of the layers are computed in, chosen per site and layer.

    numerics = numerics_of(config.precision)
    y_BTF = numerics.mlp.einsum("BTD,DF->BTF", x_BTD, weight, ("batch", None, "mlp"))

A product takes activations in the compute dtype and a stored float32 weight, and says how the weight is cast, gathered
over `fsdp` and multiplied, forward and backward (that of experts: kernels/grouped_matmul). Routers, norms, embedding,
head and attention's scores are not sites.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import jax.numpy as jnp

from maxlm.config import PrecisionConfig
from maxlm.numerics.blocked import Fp8Blocks
from maxlm.numerics.fp8 import Fp8
from maxlm.numerics.plain import Plain

__all__ = ["FLOAT32", "Fp8", "Fp8Blocks", "Numerics", "PRODUCTS", "Plain", "numerics_of"]

PRODUCTS = ("forward", "input_gradient", "weight_gradient")  # a product in 8 bits is compiled under 'fp8_' and its name


@dataclass(frozen=True)
class Numerics:
    """The products of each site. Those of the first and last layers may stay in the compute dtype.

    fp8_exchange: whether tokens travel to experts on other devices in 8 bits (model/moe/exchange.py).
    """

    dtype: jnp.dtype
    attention: Plain | Fp8 | Fp8Blocks
    mlp: Plain | Fp8 | Fp8Blocks
    experts: Plain | Fp8
    plain_first_layers: int = 0
    plain_last_layers: int = 0
    fp8_exchange: bool = False

    def spans(self, first: int, last: int, num_layers: int) -> Iterator[tuple[int, int, Numerics]]:
        """Layers [first, last) of `num_layers` as runs of equal numerics: (first, the one after the last, numerics)."""
        cuts = (0, self.plain_first_layers, num_layers - self.plain_last_layers, num_layers)
        for start, stop, numerics in zip(cuts, cuts[1:], (self.plain(), self, self.plain()), strict=False):
            start, stop = max(start, first), min(stop, last)
            if start < stop:
                yield start, stop, numerics

    def plain(self) -> Numerics:
        """The same with every product in the compute dtype: generation computes so, for its products are too small to
        gain from less."""
        return _plain(self.dtype)


def _plain(dtype: jnp.dtype) -> Numerics:
    return Numerics(dtype, Plain(dtype), Plain(dtype), Plain(dtype))


FLOAT32 = _plain(jnp.dtype("float32"))

_SCALING = {"fp8": "tensor", "fp8_rowwise": "row"}


def numerics_of(precision: PrecisionConfig, platform: str = "cpu") -> Numerics:
    """Those of a run's `precision` on a platform of JAX."""
    dtype = jnp.dtype("float32" if precision.recipe == "float32" else "bfloat16")
    if not precision.recipe.startswith("fp8"):
        return _plain(dtype)
    sites = precision.fp8_sites
    if precision.recipe == "fp8_block":  # which has no products of experts, and config says so
        product, sites = Fp8Blocks(dtype), tuple(site for site in sites if site != "experts")
    else:
        scaling, gpu = _SCALING[precision.recipe], platform == "gpu"
        product = Fp8(dtype, scaling, precision.power_of_two_scales, gpu and scaling == "tensor", careful_sums=gpu)
    return dataclasses.replace(_plain(dtype), **{site: product for site in sites},
                               plain_first_layers=precision.plain_first_layers,
                               plain_last_layers=precision.plain_last_layers, fp8_exchange=precision.fp8_exchange)
