"""Measures how fast balancers get to even loads, on one synthetic stream.

  python -m experiments.balancers.dynamics

A router of 32 experts, 4 a token, starts with skewed scores, and a task wants them so:
its loss is the divergence of the router's probabilities from those that it began with.
Every step has 2,048 new tokens, the same for every balancer. Balancers that add a loss
pull against the task; the others shift scores, or choose by a plan. The table says
from which step on MaxVio, median over 20 steps, stays at 1.5 times that of a random
router or below.
"""

import argparse
import csv
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import figures, runs
from moe_jax.core import registry
from moe_jax.moe import layer, plans
from moe_jax.moe.types import Side
from moe_jax.training import balancing, metrics

T, D, E, K, STEPS = 2048, 16, 32, 4, 400
WINDOW, NEAR = 20, 1.5
FOLDER = pathlib.Path(__file__).parent / "figures"

_TOP_K = {"name": "top_k", "score": "sigmoid", "renormalize": True}
_LOSS = {"name": "switch", "coefficient": 1e-2}
_BIAS = {"name": "bias", "rate": 1e-2}
# {name: (router, balancers)}
BALANCERS = {
  "none": (_TOP_K, []),
  "switch 1e-2": (_TOP_K, [_LOSS]),
  "switch 1e-1": (_TOP_K, [_LOSS | {"coefficient": 1e-1}]),
  "switch 1": (_TOP_K, [_LOSS | {"coefficient": 1.0}]),
  "adaptive": (_TOP_K, [{"name": "adaptive", "target": 0.2, "factor": 1.1}]),
  "importance 1e-1": (_TOP_K, [{"name": "cv_squared", "coefficient": 1e-1}]),
  "load 1e-1": (
    _TOP_K | {"noise": 1 / E},
    [{"name": "cv_squared", "of": "load", "coefficient": 1e-1}],
  ),
  "device 1e-1": (
    _TOP_K,
    [{"name": "device", "devices": 8, "coefficient": 1e-1}],
  ),
  "z_loss": (_TOP_K, [{"name": "z_loss", "coefficient": 1e-3}]),
  "entropy": (_TOP_K, [{"name": "entropy", "coefficient": 1e-2}]),
  "orthogonality": (_TOP_K, [{"name": "orthogonality", "coefficient": 1e-2}]),
  "sign 1e-2": (_TOP_K, [_BIAS]),
  "sign 3e-3": (_TOP_K, [_BIAS | {"rate": 3e-3}]),
  "sign 1e-3": (_TOP_K, [_BIAS | {"rate": 1e-3}]),
  "proportional": (_TOP_K, [_BIAS | {"rule": "proportional", "rate": 3e-2}]),
  "multiplicative": (_TOP_K, [_BIAS | {"form": "multiply", "rate": 2e-2}]),
  "pid": (
    _TOP_K,
    [_BIAS | {"rule": "pid", "rate": 3e-2, "gain": 0.01, "damping": 3e-3}],
  ),
  "quantile": (_TOP_K, [{"name": "quantile"}]),
  "quantile, average": (_TOP_K, [{"name": "quantile", "decay": 0.9}]),
  "bip": (_TOP_K, [{"name": "bip", "top_k": K}]),
  "bip, 16 sweeps": (_TOP_K, [{"name": "bip", "top_k": K, "sweeps": 16}]),
  "sinkhorn": ({"name": "sinkhorn"}, []),
  "threshold": (
    {"name": "expert_threshold"},
    [{"name": "threshold", "share": K / E, "decay": 0.5}],
  ),
  "l1": (
    {"name": "relu", "average": float(K)},
    [{"name": "l1", "experts": float(K), "start": 1e-2}],
  ),
}
_WIDE = ("expert_threshold", "relu")  # A token may have all experts.


def recipe_of(router: dict, balancers: list) -> layer.Recipe:
  """The parts of a layer without its experts."""
  wide = router["name"] in _WIDE
  made = tuple(
    (str(i), registry.from_config("balancers", own, f"balancers.{i}"))
    for i, own in enumerate(balancers)
  )
  return layer.Recipe(
    num_experts=E,
    router=registry.from_config(
      "routers", router, "router", top_k=E if wide else K
    ),
    dispatcher=registry.load("dispatchers", "sorted"),
    experts=None,
    balancers=made,
  )


def start(seed: int = 0):
  """The router's first kernel; the last feature is always 1 and makes the skew."""
  rng = np.random.default_rng(seed)
  kernel_DE = rng.normal(size=(D, E)) / np.sqrt(D)
  kernel_DE[-1] = np.linspace(-1, 1, E)
  return {"kernel": jnp.asarray(kernel_DE, jnp.float32)}


@functools.partial(jax.jit, static_argnums=0)
def loads_of(recipe, params, rng):
  """The loads of all steps: [STEPS, E]."""
  teacher, optimizer = params, optax.adam(3e-3)
  side = Side(jnp.ones((1, T), bool))

  def of_step(params, balance, x_GTD, rng_G):
    routing = layer.route(recipe, params, balance, x_GTD, side, rng_G)
    plan = plans.make(routing.choice, recipe, T)
    stats = plans.report(recipe, routing, plan, side, balance)
    wanted_TE = jax.nn.log_softmax(x_GTD[0] @ teacher["kernel"])
    own_TE = jax.nn.log_softmax(routing.logits_TE[0])
    task = (jnp.exp(wanted_TE) * (wanted_TE - own_TE)).sum(-1).mean()
    total = task
    for label, balancer in recipe.balancers:
      if balancer.loss is not None:
        own = balancing.of_balancer(stats, label)
        none_E = jnp.zeros(E, jnp.int32)
        loss = balancer.loss(balance[label], own, none_E, params)
        total += loss.value()
    return total, stats

  def step(carry, number):
    params, balance, state = carry
    keys = jax.random.split(jax.random.fold_in(rng, number))
    x_TD = jax.random.normal(keys[0], (T, D)).at[:, -1].set(1)
    grads, stats = jax.grad(of_step, has_aux=True)(
      params, balance, x_TD[None], keys[1:]
    )
    updates, state = optimizer.update(grads, state)
    new = {
      label: balancer.update(
        balance[label], balancing.of_balancer(stats, label), number
      )
      for label, balancer in recipe.balancers
    }
    params = optax.apply_updates(params, updates)
    return (params, new, state), stats.count_E.sum((0, 1))

  balance = {label: b.init(E) for label, b in recipe.balancers}
  carry = params, balance, optimizer.init(params)
  return jax.lax.scan(step, carry, jnp.arange(STEPS))[1]


def max_vio(loads_SE) -> np.ndarray:
  """MaxVio of every step."""
  loads_SE = np.float64(loads_SE)
  return loads_SE.max(1) / loads_SE.mean(1) - 1


def settled(vio_S: np.ndarray, floor: float) -> int | None:
  """The first step near the floor after which medians of windows stay near it."""
  windows = np.lib.stride_tricks.sliding_window_view(vio_S, WINDOW)
  far = np.flatnonzero(np.median(windows, axis=1) > NEAR * floor)
  first = int(far[-1]) + 1 if far.size else 0
  if first >= len(windows):
    return None
  # A window of many near steps may begin with some that are not.
  return first + int(np.flatnonzero(vio_S[first:] <= NEAR * floor)[0])


def run() -> tuple[list[dict], dict[str, np.ndarray]]:
  """(a row for each balancer, {balancer: MaxVio over the floor by step})."""
  rows, curves = [], {}
  floor = metrics.max_vio_floor(T, E, K)
  for name, parts in BALANCERS.items():
    loads_SE = loads_of(recipe_of(*parts), start(), jax.random.key(0))
    vio_S = max_vio(loads_SE)
    curves[name] = vio_S / floor
    steps = settled(vio_S, floor)
    rows.append(
      {
        "balancer": name,
        "first": vio_S[0] / floor,
        "last": float(np.median(vio_S[-WINDOW:])) / floor,
        "steps": "never" if steps is None else steps,
      }
    )
  return rows, curves


def table(rows: list[dict]) -> str:
  """Rows as markdown."""
  lines = ["| balancer | first step | last steps | settled from step |"]
  lines.append("|---|---|---|---|")
  for row in rows:
    lines.append(
      f"| {row['balancer']} | {row['first']:.1f} | {row['last']:.2f} |"
      f" {row['steps']} |"
    )
  return "\n".join(lines)


def draw(curves: dict[str, np.ndarray], folder: pathlib.Path) -> None:
  """Writes dynamics.png and dynamics.pdf."""
  figure, (axes,) = figures.panels(1)
  for name, style in figures.styles(curves).items():
    smooth = np.convolve(curves[name], np.ones(5) / 5, "valid")
    axes.plot(smooth, label=name, color=style.color, ls=style.line, lw=1)
  axes.axhline(NEAR, color="black", lw=0.5)
  axes.set(
    yscale="log", xlabel="step", ylabel="MaxVio over that of random choices"
  )
  figures.save(figure, axes, folder, "dynamics")


def read(folder: pathlib.Path = FOLDER) -> list[dict]:
  """The committed rows."""
  with open(folder / "dynamics.csv", newline="") as f:
    return [
      row | {k: float(row[k]) for k in ("first", "last")}
      for row in csv.DictReader(f)
    ]


def main(argv=None) -> int:
  """The command."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", default=str(FOLDER), metavar="DIR")
  folder = pathlib.Path(parser.parse_args(argv).out)
  folder.mkdir(parents=True, exist_ok=True)
  rows, curves = run()
  runs.write_csv(folder / "dynamics.csv", rows)
  draw(curves, folder)
  print(table(rows))
  return 0


if __name__ == "__main__":
  raise SystemExit(main())
