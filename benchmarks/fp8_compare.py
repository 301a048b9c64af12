"""One training step of decoder layers with our FP8 products, with Qwix's and with Flax's: speed, memory, error.

    python3 benchmarks/fp8_compare.py --json benchmarks/results/fp8_compare.json                  on an NVIDIA GPU
    python3 benchmarks/fp8_compare.py --width 64 --layers 1 --tokens 128 --rows 1 --repeats 1     to try it on a CPU

The step: layers of the shape of Llama 3.2 1B (RMS norm, grouped causal attention without rotation, gated MLP),
unrolled, float32 masters, the mean square of the result as loss, gradients, and plain gradient descent. Everything but
the five products of a layer is the same code. Qwix (pip install qwix) is left out where it is not installed, and said
so; its products come from a module that it does not call public, because its own way in, interception of a model's
calls, would take the rest of the step with it. Flax's scales are delayed: their state is in the step, and is replaced
by its 'gradient', as Flax wants it.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402
from flax.linen import fp8_ops  # noqa: E402

from maxlm.config import PrecisionConfig  # noqa: E402
from maxlm.hardware import compiler_options  # noqa: E402
from maxlm.numerics import numerics_of  # noqa: E402
from maxlm.training.benchmark import commit  # noqa: E402

HEAD, GROUP = 64, 4  # head size; query heads that share a key head
HISTORY = 1024  # largest values that Flax's scales remember, its own default
Product = Callable[[jax.Array, jax.Array, Any], jax.Array]  # (x [.., D], weight float32 [D, F], its state) -> [.., F]


def ours(recipe: str) -> Product:
    einsum = numerics_of(PrecisionConfig(recipe=recipe), jax.default_backend()).mlp.einsum
    return lambda x, w, _: einsum("BTD,DF->BTF", x, nnx.Param(w, dims=("embed", "mlp")), ("batch", None, "mlp"))


def qwixs(channelwise: bool) -> Product:
    from qwix._src.core.dot_general_qt import DotGeneralQtConfig, dot_general_qt

    whole = {} if channelwise else {
        f"{operand}_disable_channelwise_axes": True for operand in ("lhs", "rhs", "dlhs_grad", "drhs_grad")}
    config = DotGeneralQtConfig(
        lhs_qtype=jnp.float8_e4m3fn, rhs_qtype=jnp.float8_e4m3fn, dlhs_grad_qtype=jnp.float8_e5m2,
        drhs_grad_qtype=jnp.float8_e5m2, **whole,
    )
    return lambda x, w, _: dot_general_qt(x, w.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())), config)


def flaxs(x: jax.Array, w: jax.Array, state: dict[str, jax.Array]) -> jax.Array:
    return fp8_ops.fp8_scaled_dot_general(
        x, w.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=x.dtype,
        quantize_compute_type=x.dtype, **state)


def flax_state() -> dict[str, jax.Array]:
    sizes = {"scale": (jnp.ones, 1), "amax_history": (jnp.zeros, HISTORY)}
    return {f"{operand}_{name}": make((size,), jnp.float32)
            for operand in ("lhs", "rhs", "grad") for name, (make, size) in sizes.items()}


def variants() -> dict[str, Product]:
    found = {recipe: ours(recipe) for recipe in ("bf16", "fp8", "fp8_rowwise", "fp8_block")} | {"flax": flaxs}
    try:
        found |= {"qwix": qwixs(False), "qwix channelwise": qwixs(True)}
    except ImportError as error:
        print(f"without Qwix: {error}", file=sys.stderr)
    return found


def parameters(width: int, hidden: int, layers: int) -> list[dict[str, jax.Array]]:
    keys = max(width // GROUP, HEAD)
    shapes = {"qkv": (width, width + 2 * keys), "out": (width, width), "gate": (width, hidden), "up": (width, hidden),
              "down": (hidden, width)}
    draw = lambda place, shape: 0.02 * jax.random.normal(jax.random.key(place), shape)  # noqa: E731
    return [{name: draw(16 * layer + place, shape) for place, (name, shape) in enumerate(shapes.items())}
            for layer in range(layers)]


def layer(product: Product, x: jax.Array, w: dict[str, jax.Array], state: dict[str, Any]) -> jax.Array:
    def norm(x):
        wide = x.astype(jnp.float32)
        return (wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)

    by = lambda name, x: product(x, w[name], state.get(name))  # noqa: E731
    batch, length, width = x.shape
    keys = (w["qkv"].shape[1] - width) // 2
    q, k, v = (a.reshape(batch, length, -1, HEAD) for a in
               jnp.split(by("qkv", norm(x)), (width, width + keys), axis=-1))
    on_gpu = jax.default_backend() == "gpu"
    attended = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn" if on_gpu else "xla")
    x = x + by("out", attended.reshape(batch, length, width))
    h = norm(x)
    return x + by("down", jax.nn.silu(by("gate", h)) * by("up", h))


def step_of(product: Product):
    def loss(params, states, x):
        for w, state in zip(params, states, strict=True):
            x = layer(product, x, w, state)
        return jnp.mean(x.astype(jnp.float32) ** 2)

    def step(params, states, x):
        value, (grads, states) = jax.value_and_grad(loss, argnums=(0, 1))(params, states, x)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads), states, value

    return step


class Timed:
    """One variant's compiled step and its state."""

    def __init__(self, name: str, product: Product, arguments: argparse.Namespace):
        params = parameters(arguments.width, arguments.hidden or 4 * arguments.width, arguments.layers)
        states = [{key: flax_state() for key in w} if name == "flax" else {} for w in params]
        shape = (arguments.rows, arguments.tokens, arguments.width)
        self.x = jax.random.normal(jax.random.key(99), shape, jnp.bfloat16)
        self.state = (params, states)
        options = compiler_options(jax.default_backend())
        clock = time.perf_counter()
        lowered = jax.jit(step_of(product), donate_argnums=(0, 1), compiler_options=options).lower(*self.state, self.x)
        self.compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - clock
        memory = self.compiled.memory_analysis()
        self.temporaries = memory.temp_size_in_bytes if memory else None
        text = self.compiled.as_text()
        self.calls = {call: text.count(f'"{call}"') for call in ("__cublas$lt$matmul$f8", "__cublas$lt$matmul")}
        self.seconds: list[float] = []
        self.turn(1)
        self.seconds.clear()

    def turn(self, repeats: int) -> None:
        clock = time.perf_counter()
        for _ in range(repeats):
            *state, loss = self.compiled(*self.state, self.x)
            self.state = tuple(state)
        assert np.isfinite(float(loss))
        self.seconds.append((time.perf_counter() - clock) / repeats)


def errors(product: Product, name: str) -> dict[str, dict[str, float]]:
    """|got - exact| / |exact| of the product and its two gradients, from bfloat16 inputs: normal, and with an outlier.
    Flax's scales are those that its state holds after three rounds of the same inputs."""

    @functools.partial(jax.jit, compiler_options=compiler_options(jax.default_backend()))
    def gradients(x, w, g, state):
        y, pull = jax.vjp(product, x, w, state)
        return y, *pull(g)

    rng, found = np.random.default_rng(0), {}
    for case in ("normal", "outlier 1e6 times the rest"):
        x, w, g = (np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in (
            rng.normal(size=(2, 256, 256)), rng.normal(size=(256, 384)) / 16, rng.normal(size=(2, 256, 384))))
        if case != "normal":
            x *= 2.0**-7
            x[0, 0, 0] = 1e4

        inputs = (jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.float32), jnp.asarray(g, jnp.bfloat16))
        state = flax_state() if name == "flax" else None
        for _ in range(4 if state else 1):
            y, dx, dw, state = gradients(*inputs, state)
        exact = x @ w, g @ w.T, np.einsum("btd,btf->df", x, g)
        # Beside the outlier: of the result, without the row that holds it; of the weight's gradient, without its row.
        parts = {"y": np.s_[:, 1:], "dx": np.s_[:, :], "dw": np.s_[1:]}
        found[case] = {part: float(np.linalg.norm((np.asarray(got, np.float64) - want)[where])
                                   / np.linalg.norm(want[where]))
                       for (part, where), got, want in zip(parts.items(), (y, dx, dw), exact, strict=True)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--hidden", type=int, help="of the MLP (default: four times the width)")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096, help="in a row")
    parser.add_argument("--repeats", type=int, default=5, help="steps in a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="these variants, and bf16")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    products = {name: p for name, p in variants().items()
                if not arguments.only or name in ("bf16", *arguments.only)}
    record = {"benchmark": "fp8_compare", "chip": jax.devices()[0].device_kind, "commit": commit(),
              "date": time.strftime("%Y-%m-%d"),
              "versions": {name: version(name) for name in ("jax", "jaxlib", "flax")},
              "shape": {name: getattr(arguments, name) for name in ("width", "hidden", "layers", "rows", "tokens")}}
    if any("qwix" in name for name in products):
        record["versions"]["qwix"] = version("qwix")
    timed = measured(products, arguments)
    tokens = arguments.rows * arguments.tokens
    record["variants"] = {}
    for name, one in timed.items():
        ratios = [a / b for a, b in zip(timed["bf16"].seconds, one.seconds, strict=True)]
        rate = tokens / statistics.median(one.seconds)
        record["variants"][name] = {
            "tokens_per_second": rate, "over_bf16": {"median": statistics.median(ratios), "min": min(ratios),
                                                     "max": max(ratios)},
            "compile_seconds": one.compile_seconds, "temporary_bytes": one.temporaries, "calls": one.calls,
            "errors": errors(products[name], name)}
        print(f"{name:17}{rate:10,.0f} tokens/s  {statistics.median(ratios):.3f} of bf16 ({min(ratios):.3f}-"
              f"{max(ratios):.3f})  compiled in {one.compile_seconds:.1f} s  {one.calls}")
        for case, parts in record["variants"][name]["errors"].items():
            print(f"{'':17}{case}: " + ", ".join(f"{part} {error:.4f}" for part, error in parts.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


def measured(products: dict[str, Product], arguments: argparse.Namespace) -> dict[str, Timed]:
    """All variants compiled first, then timed in turns; each holds its parameters for that long."""
    timed = {name: Timed(name, product, arguments) for name, product in products.items()}
    for _ in range(arguments.turns):
        for one in timed.values():
            one.turn(arguments.repeats)
    return timed


if __name__ == "__main__":
    main()
