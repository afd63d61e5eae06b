"""The experts of a recorded run, forced upon another run.

They are read from a folder of traces, STEP.safetensors for every step, as the
hook `trace` writes them. In training, tokens take the recorded experts; their
weights come from the live scores, as in router replay for reinforcement
learning (R3, 2510.11370). The router chooses at evaluation, and where a trace
has no experts.
"""

import functools
import pathlib
from collections.abc import Mapping

import jax
import numpy as np

from moe_jax import models
from moe_jax.core.errors import ConfigError
from moe_jax.data.batches import ByStep
from moe_jax.training import traces

KEY = "task.replay"


class Replay:
  """A folder of traces.

  layers: of its first file, see `traces.Trace`.
  shape: (layers of the model that are numbered, K) of the forced experts.
  """

  def __init__(self, folder: str, steps: int = 1):
    """Opens the traces of the first steps; ConfigError if one is missing."""
    self._folder = pathlib.Path(folder)
    for step in range(steps):
      self._check_there(step)
    first = self._read(0)
    self.layers = first.layers
    top_k = {sizes["top_k"] for sizes in first.layers.values()}
    self.shape = max(map(int, first.layers)) + 1, max(top_k)

  def spec(self, length: int) -> jax.ShapeDtypeStruct:
    """Returns shape and dtype of the experts of `length` tokens."""
    return jax.ShapeDtypeStruct((length, *self.shape), np.int16)

  def check(self, model) -> None:
    """Raises ConfigError for a model with other layers, or without replay."""
    found = traces.layers_of(models.sublayers(model))
    for name in sorted(found.keys() | self.layers.keys()):
      if found.get(name) != self.layers.get(name):
        raise ConfigError(
          f"{KEY} = {self._folder} is a trace of another model: its layer {name} has"
          f" {self.layers.get(name, 'no experts')}, and this model's"
          f" {found.get(name, 'has none')}"
        )
    for parts in models.sublayers(model).values():
      if not parts.recipe.router.replays:
        raise ConfigError(
          f"{KEY} is for routers that can be told their experts, such as top_k without"
          f' a random second one, and not for "{parts.recipe.router.spec.name}" here'
        )

  def train(self, batches: ByStep) -> ByStep:
    """Returns batches with the experts of their step."""

    def read(step):
      batch = batches[step]
      return batch | {"replayed": self._experts(step, batch["inputs"])}

    return ByStep(read)

  def none(self, batch: Mapping) -> dict:
    """Returns a batch in which the router chooses."""
    shape = (*batch["inputs"].shape, *self.shape)
    return {**batch, "replayed": np.full(shape, -1, np.int16)}

  def _experts(self, step, inputs):
    """The experts of a step, for tokens that must be those of the trace."""
    trace = self._read(step)
    token = trace.arrays["token"]
    if (
      token.size != inputs.size or (token != inputs.reshape(token.shape)).any()
    ):
      raise ConfigError(
        f"{KEY}: {self._path(step)} has other tokens than step {step + 1} of this run;"
        " use the config and the seed of the recorded run"
      )
    experts = np.full((*token.shape, *self.shape), -1, np.int16)
    for layer in trace.layers:
      chosen = trace.arrays[f"{layer}/expert"]
      experts[:, :, int(layer), : chosen.shape[-1]] = chosen
    return experts.reshape(*inputs.shape, *self.shape)

  def _path(self, step):
    return self._folder / f"{step + 1:08d}.safetensors"

  @functools.lru_cache(maxsize=2)  # noqa: B019
  def _read(self, step):
    self._check_there(step)
    return traces.load(self._path(step))

  def _check_there(self, step):
    if not self._path(step).exists():
      raise ConfigError(
        f"{KEY} = {self._folder} has no trace of step {step + 1}; record every step"
        " with --config.train.hooks.trace=\"{'name': 'trace', 'every': 1}\""
      )
