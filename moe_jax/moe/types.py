"""The values that routers, dispatchers, experts and balancers exchange.

The axis legend. A name ends in the letters of its shape, and einsum strings
use the same letters. A lower-case letter is one device's share of that axis.

  B batch              G groups of tokens       E experts
  L sequence length    T tokens in a group      K experts a token is sent to
  D model width        S sequences in a group   C capacity: slots an expert
  V vocabulary         N rows of tokens           has in a group
  H attention heads    R repeats of a layer     F hidden width of an expert

A *group* is the set of tokens among which experts have slots and statistics
are counted. Groups come from the config, never from the devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

Array = jax.Array
# Parts compare by identity: the registry gives the same object for the same
# options, which is what makes them static arguments and linen fields.
_part = dataclasses.dataclass(frozen=True, eq=False)


@flax.struct.dataclass
class Mean:
  """A mean that has not been divided yet, so that means can be added up."""

  total: Array
  weight: Array

  def value(self) -> Array:
    """total / weight, and 0 where nothing was counted."""
    return self.total / jnp.where(self.weight == 0, 1, self.weight)

  def __add__(self, other: Mean) -> Mean:
    return Mean(self.total + other.total, self.weight + other.weight)


class Bound(NamedTuple):
  """How many rows the experts of one group may receive.

  slots: rows per bucket of experts and group, >= 1.
  expert_buckets: contiguous buckets of equally many experts. As many buckets
    as experts is ordinary capacity; fewer is a bounded ragged buffer.
  """

  slots: int
  expert_buckets: int


@flax.struct.dataclass
class Side:
  """What is known of each token besides its vector.

  mask_T: bool, False for padding, which takes no slot and is not counted.
  features: per-token arrays [T, ...] that a router may look at: token_id,
    position, modality, timestep, domain, forced_expert, ...
  """

  mask_T: Array
  features: Mapping[str, Array] = flax.struct.field(default_factory=dict)


@flax.struct.dataclass
class Routing:
  """What a router decided for one group (with a leading G after vmap).

  expert_TK: int32 in [0, E), a token's experts, best first.
  weight_TK: at least float32, what each chosen expert is scaled by.
  valid_TK: bool, False for padding and for a choice that was not made.
  priority_TK: float, larger takes its slot earlier; None: in token order.
  prob_TE: rows sum to 1, the distribution that losses and entropy are
    computed from; None where a router has none.
  logits_TE: the router's raw scores, for the z-loss; None where there are none.
  extra: per-token arrays [T] of what else the router wants logged: extra/NAME
    is their mean over unpadded tokens.
  weight_input: scale the expert's input by weight_TK, not its output.
  """

  expert_TK: Array
  weight_TK: Array
  valid_TK: Array
  priority_TK: Array | None = None
  prob_TE: Array | None = None
  logits_TE: Array | None = None
  extra: Mapping[str, Array] = flax.struct.field(default_factory=dict)
  weight_input: bool = flax.struct.field(pytree_node=False, default=False)


@flax.struct.dataclass
class Rows:
  """Tokens laid out for experts, in one of two ways.

  Slots: x [G, E, C, D], tokens_per_expert_GE None.
  Ragged rows: x [N, D], the rows of all G groups sorted by expert and inside
    an expert by group; tokens_per_expert_GE int32 keeps the groups apart.
    Rows beyond its sum belong to nobody.
  """

  x: Array
  tokens_per_expert_GE: Array | None = None


@flax.struct.dataclass
class Stats:
  """Sums over the unpadded tokens of a sequence, with leading axes [G, S].

  tokens: int32, unpadded tokens.
  count_E: int32, tokens the router sent to each expert, dropped ones included.
  first_choice_E: int32, the same for first choices alone.
  prob_E: sum of prob_TE.
  weight_E: sum of weight_TK by expert.
  kept_E: int32, assignments that got a slot.
  dropped: int32 by cause. capacity: the expert was full; buffer: its bucket
    of experts was full; unrouted: the router chose fewer than K.
  z: sum of logsumexp(logits)^2.
  entropy: sum of the entropy of prob_TE, in nats.
  confidence: sum of the probability of the chosen experts.
  extra: sums of what the router reported for each token.
  groups_per_sequence: above 1 where groups are fractions of a sequence, whose
    entries then lie one after the other along G.
  """

  tokens: Array
  count_E: Array
  first_choice_E: Array
  prob_E: Array
  weight_E: Array
  kept_E: Array
  dropped: Mapping[str, Array]
  z: Array
  entropy: Array
  confidence: Array
  extra: Mapping[str, Array] = flax.struct.field(default_factory=dict)
  groups_per_sequence: int = flax.struct.field(pytree_node=False, default=1)


@_part
class Router:
  """Scores tokens and chooses their experts. Knows no mesh and no capacity.

  init: (rng, d_model, num_experts) -> params, a flat dict of arrays.
  axes: {parameter: logical axis names}.
  route: (params, x_TD, *, num_experts, select, side, rng) -> Routing, for one
    group. select maps scores_TE to the scores that choose; rng None means no noise.
  causal: whether a token's choice is independent of the tokens after it.
  top_k: K.
  always_draws: whether it needs a key outside training too; else it is given
    none there.
  """

  init: Callable[..., dict[str, Array]]
  axes: Mapping[str, tuple[str | None, ...]]
  route: Callable[..., Routing]
  causal: bool
  top_k: int
  always_draws: bool = False


@_part
class Dispatcher:
  """Lays tokens out for their experts and brings the results back.

  plan: (Routing with leading G, num_experts, Bound | None) -> Plan.
  causal: (top_k, Bound | None) -> bool, whether a token's slots are
    independent of the tokens after it.
  ragged: whether its Rows are ragged rows; if not, it needs a Bound with one
    bucket per expert.
  """

  plan: Callable[..., Any]
  causal: Callable[[int, Bound | None], bool]
  ragged: bool


@_part
class Experts:
  """The networks that are the experts.

  The shards of F (axis "mlp") add up to the output. The parameter "down_bias"
  is a bias of the output: it is zero in all shards but one.

  init: (rng, num_experts, d_model) -> params.
  axes: {parameter: logical axis names}.
  apply: (params, Rows) -> Rows, with expert e's own weights for its rows.
  activation: name of the activation, for who writes a model's config.
  """

  init: Callable[..., dict[str, Array]]
  axes: Mapping[str, tuple[str | None, ...]]
  apply: Callable[[Mapping[str, Array], Rows], Rows]
  activation: str = ""


@_part
class Mlp:
  """A dense network: what experts replace, and what shared experts are.

  init: (rng, d_model) -> params; axes: {parameter: logical axis names};
  apply: (params, x [..., D]) -> y [..., D].
  activation: name of the activation, for who writes a model's config.
  """

  init: Callable[..., dict[str, Array]]
  axes: Mapping[str, tuple[str | None, ...]]
  apply: Callable[[Mapping[str, Array], Array], Array]
  activation: str = ""


@_part
class Balancer:
  """A way to keep experts equally loaded.

  init: (num_experts) -> state, a dict of arrays.
  select: (state, score_TE) -> score_TE, for choosing only.
  loss: (state, Stats, count_E so far in this step) -> Mean, coefficient
    included; None if it adds no loss.
  update: (state, Stats, step) -> state, once per optimizer step.
  """

  init: Callable[[int], dict[str, Array]]
  select: Callable[[Mapping[str, Array], Array], Array]
  loss: Callable[[Mapping[str, Array], Stats, Array], Mean] | None
  update: Callable[[Mapping[str, Array], Stats, Array], dict[str, Array]]


class Axes(NamedTuple):
  """Names of the mesh axes inside the sharded region, and what it runs on."""

  data: str = "data"
  fsdp: str = "fsdp"
  expert: str = "expert"
  tensor: str = "tensor"
  platform: str = "cpu"

  @property
  def tokens(self) -> tuple[str, str, str]:
    """The axes that tokens are sharded over."""
    return (self.data, self.fsdp, self.expert)
