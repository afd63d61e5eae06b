"""Tests the declared roles of parameters, and what follows from them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from configs import base, deepseek_v3, gpt_oss
from moe_jax import models
from moe_jax.core import roles
from moe_jax.core.roles import Role

# (axes, batch axes, (input axes, output axes) or None)
AXES = [
  (("embed", "mlp"), (), ((0,), (1,))),
  (("layers", "embed", "mlp"), (0,), ((1,), (2,))),
  (("layers", "expert", "mlp", "embed"), (0, 1), ((2,), (3,))),
  (("layers", "embed", "kv_heads", None), (0,), ((1,), (2, 3))),
  (("layers", "heads", None, "embed"), (0,), ((1, 2), (3,))),
  (("layers", None, "heads", None), (0,), ((1,), (2, 3))),
  (("layers", "heads", None), (0,), None),
  (("layers", "expert", "mlp"), (0, 1), None),
  (("layers",), (0,), None),
  ((), (), None),
  # A router scores experts; its matrix is one.
  (("embed", "expert"), (), ((0,), (1,))),
  ((None, None, None, None), (), ((0, 1, 2), (3,))),  # a convolution
]


@pytest.mark.parametrize(("axes", "batch", "matrix"), AXES)
def test_axes_make_sides(axes, batch, matrix):
  role = Role("other", axes)
  assert role.batch_axes == batch
  assert role.matrix_axes == matrix
  assert role.is_decayed == role.is_hidden == (matrix is not None)


def test_embedding_and_head():
  embedding = Role("embedding", ("vocab", "embed"))
  assert not embedding.is_decayed and not embedding.is_hidden
  head = Role("head", ("embed", "vocab"))
  assert head.is_decayed and not head.is_hidden


def test_parts_and_their_factors():
  parts = ("router", "experts", "shared", "attention", "a_part_of_mine")
  factors = [Role(part, ()).factor for part in parts]
  assert factors == ["router", "experts", "shared", "attention", "rest"]


class Mixed(nn.Module):
  """A declared parameter, one of linen's own, and one in linen's box."""

  @nn.compact
  def __call__(self, x, _):
    init = roles.declared(nn.initializers.ones, ("embed", "mlp"), "dense")
    boxed = nn.with_logical_partitioning(nn.initializers.ones, ("embed", None))
    x = x @ self.param("w_scale", init, (2, 2))
    x = x @ self.param("embedding", boxed, (2, 2))
    return nn.Dense(2, name="scale")(x), None


def test_a_box_passes_through_scan_remat_and_shapes():
  scanned = nn.scan(
    nn.remat(Mixed),
    variable_axes={"params": 0},
    split_rngs={"params": True},
    length=3,
    metadata_params={nn.PARTITION_NAME: "layers"},
  )()
  x = jnp.ones((1, 2))
  init = lambda rng: scanned.init(rng, x, None)["params"]  # noqa: E731
  for params in (
    jax.eval_shape(init, jax.random.key(0)),
    jax.jit(init)(jax.random.key(0)),
  ):
    assert roles.of(params) == {
      "w_scale": Role("dense", ("layers", "embed", "mlp")),
      "embedding": Role("other", ("layers", "embed", None)),
      "scale": {
        "kernel": Role("other", (None, None, None)),
        "bias": Role("other", (None, None)),
      },
    }
    assert nn.unbox(params)["w_scale"].shape == (3, 2, 2)
    spec = nn.get_partition_spec(params)["w_scale"]
    assert spec == jax.P("layers", "embed", "mlp")
    assert params["w_scale"] == params["w_scale"]


def tied():
  c = base.get_config()
  c.model.moe.update(num_shared_experts=1, shared_gate=True)
  return c


# config: {parameter: (part, is it decayed, (input, output) of Muon's)}
PRESETS = {
  tied: {
    "embedding": ("embedding", False, None),
    "final_norm/scale": ("norm", False, None),
    "decoder/0/attention/query": ("attention", True, ((1,), (2, 3))),
    "decoder/0/moe/router/kernel": ("router", True, ((1,), (2,))),
    "decoder/0/moe/experts/down": ("experts", True, ((2,), (3,))),
    "decoder/0/moe/shared/up": ("shared", True, ((1,), (2,))),
    "decoder/0/moe/shared/token_gate": ("shared", True, ((1,), (2,))),
  },
  lambda: deepseek_v3.get_config("tiny"): {
    "head": ("head", True, None),
    "prefix/0/mlp/gate": ("dense", True, ((1,), (2,))),
    "prefix/0/attention/kv_norm/scale": ("attention", False, None),
    "decoder/0/attention/kv_down": ("attention", True, ((1,), (2,))),
    "decoder/0/attention/kv_up": ("attention", True, ((1,), (2, 3))),
    "decoder/0/attention/out": ("attention", True, ((1, 2), (3,))),
    "decoder/0/ffn_norm/scale": ("norm", False, None),
  },
  lambda: gpt_oss.get_config("tiny"): {
    "decoder/0/attention/query_bias": ("attention", False, None),
    "decoder/0/attention/out_bias": ("attention", False, None),
    "decoder/0/attention/sinks": ("attention", False, None),
    "decoder/0/moe/router/kernel_bias": ("router", False, None),
    "decoder/0/moe/experts/down_bias": ("experts", False, None),
    "decoder/0/moe/experts/gate": ("experts", True, ((2,), (3,))),
  },
}


@pytest.mark.parametrize("config", PRESETS)
def test_parameters_of_the_models(config):
  c = config()
  model = models.build(c.model, vocab_size=288)
  tokens = jnp.zeros((1, 32), jnp.int32)
  params = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens))
  of_params = roles.of(params["params"])
  leaves = {
    jax.tree_util.keystr(path, simple=True, separator="/"): role
    for path, role in jax.tree_util.tree_leaves_with_path(of_params)
  }
  for name, (part, decayed, matrix) in PRESETS[config].items():
    role = leaves[name]
    assert (role.part, role.is_decayed) == (part, decayed), name
    assert (role.matrix_axes if role.is_hidden else None) == matrix, name
  assert not {role.part for role in leaves.values()} - {
    *("router", "experts", "shared", "attention", "dense", "norm"),
    *("embedding", "head"),
  }
