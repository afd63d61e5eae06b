"""Cheap experts in the pool: they compute nothing, or next to nothing.

The router chooses among E networks and, behind them, cheap experts of three kinds
(MoE++, 2410.07348, 3.1; LongCat-Flash, 2509.01322, has copies alone):

  zero      f(x) = 0, so that the token has fewer experts
  copy      f(x) = x
  constant  f(x) = a x + b v, with (a, b) = softmax(x M) and a learnt vector v

A token that is easy takes cheap experts in the place of networks, so that the number
of networks per token varies while K stays. They need no slot and are sent nowhere.

The mean number of networks per token is set by a balancer alone: `bias` with `targets`
sets any number, and a load loss aims at equal shares of all experts. MoE++ also adds the
scores of the layer before to a router's and weighs load losses by kind, and
LongCat-Flash has no bias for its copies; none of the three is built.
"""

import functools

import jax
import jax.numpy as jnp

from moe_jax.core.errors import ConfigError
from moe_jax.moe.dispatchers import TokenPlan
from moe_jax.moe.types import Array, Mlp, TokenChoice

KINDS = ("zero", "copy", "constant")


@functools.cache
def build(zero: int = 0, copy: int = 0, constant: int = 0) -> Mlp:
  """Cheap experts, in the order of `KINDS`.

  Args:
    zero: how many have the output 0.
    copy: how many have the output x.
    constant: how many have a learnt mean of x and a vector.

  Returns:
    A network whose width is their number, and whose `apply` takes the weights of
    all of them for each token: (params, x_GTD, weight [G, T, number]) -> y_GTD.
  """

  def init(rng, d_model):
    if not constant:
      return {}
    initializer = jax.nn.initializers.truncated_normal(d_model**-0.5)
    return {
      "constant": jnp.zeros((constant, d_model)),
      "mix": initializer(rng, (d_model, 2 * constant)),
    }

  def apply(params, x_GTD, weight_GTZ):
    copied = weight_GTZ[..., zero : zero + copy].sum(-1)
    y_GTD = copied[..., None] * x_GTD
    if not constant:
      return y_GTD
    weight_GTC = weight_GTZ[..., zero + copy :]
    mix = jnp.dot(x_GTD, params["mix"], precision="highest")
    mix = jax.nn.softmax(mix.reshape(*mix.shape[:-1], constant, 2))
    own, learnt = weight_GTC * mix[..., 0], weight_GTC * mix[..., 1]
    y_GTD += own.sum(-1)[..., None] * x_GTD
    return y_GTD + learnt @ params["constant"]

  axes = {"constant": (None, "embed"), "mix": ("embed", None)}
  width = zero + copy + constant
  return Mlp(init, axes if constant else {}, apply=apply, width=width)


def networks(choice, recipe):
  """A choice without its cheap experts, which have no rows.

  Args:
    choice: of the router, with a leading G.
    recipe: `layer.Recipe`; without cheap experts nothing changes.
  """
  if not recipe.cheap:
    return choice
  real_TK = choice.expert_TK < recipe.num_experts
  return choice.replace(
    expert_TK=jnp.where(real_TK, choice.expert_TK, 0),
    valid_TK=choice.valid_TK & real_TK,
  )


def output(recipe, weights, choice: TokenChoice, x_GTD: Array):
  """The summed output of the cheap experts for each token: y_GTD.

  Args:
    recipe: `layer.Recipe` with cheap experts.
    weights: (part, network) -> its parameters.
    choice: of the router, with a leading G.
    x_GTD: tokens.
  """
  cheap = recipe.cheap
  number_GTK = choice.expert_TK - recipe.num_experts
  weight_GTK = jnp.where(choice.valid_TK, choice.weight_TK, 0)
  # No row of one_hot for a network, whose number is below 0.
  one_hot = jax.nn.one_hot(number_GTK, cheap.width, dtype=weight_GTK.dtype)
  weight_GTZ = (weight_GTK[..., None] * one_hot).sum(-2)
  wide = weight_GTZ.dtype
  params = weights("cheap", cheap) if cheap.axes else {}
  params = {k: w.astype(wide) for k, w in params.items()}
  return cheap.apply(params, x_GTD.astype(wide), weight_GTZ).astype(x_GTD.dtype)


def whole(plan: TokenPlan, choice: TokenChoice, recipe) -> TokenPlan:
  """The plan with its cheap experts, which all have a place, for its loads.

  Args:
    plan: of `networks(choice)`.
    choice: of the router, with a leading G.
    recipe: `layer.Recipe`.
  """
  real_GTK = choice.expert_TK < recipe.num_experts
  bound = recipe.bound
  if bound is not None and bound.expert_buckets == recipe.num_experts:
    bound = bound._replace(expert_buckets=recipe.pool)
  kept_GTK = jnp.where(real_GTK, plan.kept_GTK, choice.valid_TK)
  return TokenPlan(choice, kept_GTK, recipe.pool, bound)


def check(recipe, place: str = "moe") -> None:
  """Raises ConfigError for cheap experts, or a number of networks, that cannot be.

  Args:
    recipe: `layer.Recipe`.
    place: key of the config's section, for messages.
  """
  if not recipe.cheap:
    if recipe.real_experts is not None:
      raise ConfigError(
        f"{place}.real_experts is for experts that cost nothing; set"
        f" {place}.num_copy_experts for instance, or leave it out"
      )
    return
  if recipe.router.form is not TokenChoice:
    raise ConfigError(
      f"{place} has experts that cost nothing, which no token can choose with the"
      f' router "{recipe.router.spec.name}"; change {place}.router'
    )
  if recipe.real_experts is not None and recipe.router.top_k is not None:
    _check_number(recipe, recipe.router.top_k, recipe.real_experts, place)


def _check_number(recipe, top_k, wanted, place):
  """Raises ConfigError for a `real_experts` that no balancer aims at."""
  least = max(0, top_k - recipe.cheap.width)
  if not least <= wanted <= top_k:
    raise ConfigError(
      f"{place}.real_experts = {wanted:g} cannot be met: a token chooses {top_k}"
      f" experts, of which {least} to {top_k} can be networks"
    )
  moving = {k: b.targets for k, b in recipe.balancers if b.targets}
  for label, targets in moving.items():
    meant = top_k * sum(targets[: recipe.num_experts])
    if abs(meant - wanted) > 1e-3:
      raise ConfigError(
        f"{place}.real_experts = {wanted:g}, and {place}.balancers.{label}.targets"
        f" give a token {meant:g} networks; make them agree"
      )
  if not moving:
    share = wanted / top_k
    raise ConfigError(
      f"{place}.real_experts = {wanted:g} needs a balancer that moves loads there:"
      f' add {{"name": "bias", "rate": 1e-3, "targets": (({recipe.num_experts},'
      f" {share:.4g}), ({recipe.cheap.width}, {1 - share:.4g}))}} to"
      f" {place}.balancers"
    )
