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
from typing import Any, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp

Array = jax.Array
# Parts compare by identity: the registry gives the same object for the same
# options, which is what makes them static arguments and linen fields. It fills
# in `spec` (`registry.Spec`): the name and options that a part was made of.
_part = dataclasses.dataclass(frozen=True, eq=False)


class Mean(flax.struct.PyTreeNode):
  """A mean that has not been divided yet, so that means can be added up."""

  total: Array
  weight: Array

  def value(self) -> Array:
    """Returns total / weight, and 0 where nothing was counted."""
    return self.total / jnp.where(self.weight == 0, 1, self.weight)

  def __add__(self, other: Mean) -> Mean:
    return Mean(self.total + other.total, self.weight + other.weight)


class Bound(NamedTuple):
  """A limit on the rows that the experts of one group may receive.

  slots: rows per bucket of experts and group, >= 1.
  expert_buckets: contiguous buckets of equally many experts. As many buckets
    as experts is ordinary capacity; fewer is a bounded ragged buffer.
  """

  slots: int
  expert_buckets: int


class Side(flax.struct.PyTreeNode):
  """Facts about each token besides its vector.

  mask_T: bool, False for padding, which takes no slot and is not counted.
  features: per-token arrays [T, ...] that a router may look at: token_id,
    position, modality, timestep, domain, ...; "replayed" [T, K]: experts
    forced on a token, for routers that `replays`; where all are -1 the router chooses.
  """

  mask_T: Array
  features: Mapping[str, Array] = flax.struct.field(default_factory=dict)


class TokenChoice(flax.struct.PyTreeNode):
  """Every token names its experts. Laid out by the config's dispatcher.

  expert_TK: int32 in [0, E), a token's experts, all different, best first.
  weight_TK: at least float32, the factor of each chosen expert.
  valid_TK: bool, False for padding and for a choice that was not made.
  priority_TK: float, larger takes its slot earlier; None: in token order.
  weight_input: scale the expert's input by weight_TK, not its output.
  """

  expert_TK: Array
  weight_TK: Array
  valid_TK: Array
  priority_TK: Array | None = None
  weight_input: bool = flax.struct.field(pytree_node=False, default=False)


class SlotChoice(flax.struct.PyTreeNode):
  """Every expert names its tokens (expert choice, 2202.09368).

  An expert names a token at most once.

  token_EC: int32 in [0, T), the tokens of an expert.
  weight_EC: at least float32, the factor of each token's result.
  valid_EC: bool, False for a slot that stays empty. Padding is never valid.
  """

  token_EC: Array
  weight_EC: Array
  valid_EC: Array


class Mixture(flax.struct.PyTreeNode):
  """Every slot holds a weighted mean of tokens (Soft MoE, 2308.00951).

  dispatch_TEC: weights of the tokens in each slot, 0 for padding.
  combine_TEC: weights of the slots in each token, 0 for padding.
  """

  dispatch_TEC: Array
  combine_TEC: Array


class Routing(flax.struct.PyTreeNode):
  """A router's decision for one group (with a leading G after vmap).

  choice: in the form in which the router decides.
  prob_TE: rows sum to 1, the distribution that losses and entropy are computed
    from; None where a router has none.
  logits_TE: the router's raw scores, for the z-loss; None where there are none.
  chance_TE: the chance that a token would choose an expert if the router's
    noise were drawn again, for a loss of smooth loads; None where there is no
    noise.
  score_TE: the argument of `select`, for balancers that observe scores; None
    where the router does not return it.
  extra: per-token arrays [T] that the router wants logged: extra/NAME is their
    mean over unpadded tokens.
  """

  choice: TokenChoice | SlotChoice | Mixture
  prob_TE: Array | None = None
  logits_TE: Array | None = None
  chance_TE: Array | None = None
  score_TE: Array | None = None
  extra: Mapping[str, Array] = flax.struct.field(default_factory=dict)


class Rows(flax.struct.PyTreeNode):
  """Tokens laid out for experts, in one of two ways.

  Slots: x [G, E, C, D], tokens_per_expert_GE None.
  Ragged rows: x [N, D], the rows of all G groups sorted by expert and inside
    an expert by group; tokens_per_expert_GE int32 keeps the groups apart.
    Rows beyond its sum are unused.
  """

  x: Array
  tokens_per_expert_GE: Array | None = None


class Loads(flax.struct.PyTreeNode):
  """Work of the experts by sequence, with leading axes [G, S]: sums.

  An assignment is a pair of a token and one of its experts. Counts are int32;
  for a `Mixture` they are floats, the shares of tokens in the slots.

  count_E: assignments to each expert, dropped ones included.
  first_choice_E: the same for first choices alone.
  kept_E: assignments that got a slot.
  weight_E: sum of the weights by expert.
  dropped: by cause. capacity: the expert was full; buffer: its bucket of
    experts was full; unrouted: a token got fewer experts than K.
  confidence: summed probability of the chosen experts.
  """

  count_E: Array
  first_choice_E: Array
  kept_E: Array
  weight_E: Array
  dropped: Mapping[str, Array]
  confidence: Array


class Plan(Protocol):
  """A choice laid out for the experts: the layer below it knows no K."""

  def dispatch(self, x_GTD: Array) -> Rows:
    """Lays the tokens x_GTD out as the rows of their experts."""

  def combine(self, rows: Rows) -> Array:
    """Returns y_GTD from the results of the rows, in the dtype of the rows."""

  def loads(self, tokens: Any) -> Loads:
    """Returns the loads by sequence; `tokens` is a `plans.Tokens`."""


class Stats(Loads):
  """Sums over the unpadded tokens of a sequence, with leading axes [G, S].

  They are the loads of the experts, see `Loads`, and:

  tokens: int32, unpadded tokens.
  prob_E: sum of prob_TE.
  z: sum of logsumexp(logits)^2.
  entropy: sum of the entropy of prob_TE, in nats.
  extra: sums of what the router reported for each token.
  observed: {balancer label: sums of its `observe`}, of whole groups, S = 1.
  beyond: {capacity factor: assignments beyond that factor times the mean load of
    their group}, of whole groups, S = 1.
  groups_per_sequence: above 1 where groups are fractions of a sequence, whose
    entries then lie one after the other along G.
  """

  tokens: Array
  prob_E: Array
  z: Array
  entropy: Array
  extra: Mapping[str, Array] = flax.struct.field(default_factory=dict)
  observed: Mapping[str, Mapping] = flax.struct.field(default_factory=dict)
  beyond: Mapping[str, Array] = flax.struct.field(default_factory=dict)
  groups_per_sequence: int = flax.struct.field(pytree_node=False, default=1)


# Requirements of routers and balancers on each other, in the words of messages.
FACTS = {
  "selection": "scores that a balancer can shift before experts are chosen",
  "score_range": "shiftable scores between 0 and 1",
  "token_choice": "tokens that choose their experts",
  "prob_TE": "probabilities that a loss can change",
  "logits_TE": "logits",
  "kernel": "a matrix with a column for each expert",
  "chance_TE": "noise, from which smooth loads are computed",
  "weights": "weights that are above 0 for chosen experts alone",
  "thresholds": "a threshold for each expert",
  "loads": "loads that can be uneven",
  "fixed": "a fixed number of experts for each token",
  "ungrouped": "a choice among all experts, not inside of groups of them",
  "networks": "a pool without cheap experts",
}


GIVEN = frozenset(
  {"selection", "token_choice", "prob_TE", "logits_TE", "kernel", "loads"}
  | {"ungrouped"}
)


@_part
class Router:
  """Scores tokens and chooses their experts. Knows no mesh.

  init: (rng, d_model, num_experts) -> params, a flat dict of arrays.
  axes: {parameter: logical axis names}.
  route: (params, x_TD, *, num_experts, select, side, rng) -> Routing, for one
    group. select maps scores_TE to the scores that choose; rng None means no
    noise.
  causal: whether a token's choice is independent of the tokens after it.
  top_k: K, the most experts that a token may get; None: as many as there are.
  fixed: whether a token always gets K; then missing ones count as dropped.
  average_k: mean number of experts per token, if it is not top_k.
  always_draws: whether it needs a key at evaluation too; if not, it is given
    none there.
  replays: whether it takes the experts of the feature "replayed".
  form: of its choices. Dispatchers and capacities are for `TokenChoice` alone.
  features: names of the features that it looks at, each with the number of values
    that it knows, whole numbers from 0 on; or the boundaries between values; None: any
    numbers.
  gives: keys of `FACTS`: what balancers can rely on.
  needs: keys of `FACTS` that a balancer has to give.
  spec: set by the registry.
  """

  init: Callable[..., dict[str, Array]]
  axes: Mapping[str, tuple[str | None, ...]]
  route: Callable[..., Routing]
  causal: bool
  top_k: int | None = None
  fixed: bool = True
  average_k: float | None = None
  always_draws: bool = False
  replays: bool = False
  form: type = TokenChoice
  features: Mapping[str, int | tuple[float, ...] | None] = dataclasses.field(
    default_factory=dict
  )
  gives: frozenset[str] = GIVEN
  needs: frozenset[str] = frozenset()
  spec: Any = None


@_part
class Dispatcher:
  """Lays a `TokenChoice` out for the experts and brings the results back.

  plan: (TokenChoice with leading G, num_experts, Bound | None) -> Plan.
  causal: (top_k, Bound | None) -> bool, whether a token's slots are
    independent of the tokens after it.
  ragged: whether its Rows are ragged rows; if not, it needs a Bound with one
    bucket per expert.
  spec: set by the registry.
  """

  plan: Callable[..., Plan]
  causal: Callable[[int, Bound | None], bool]
  ragged: bool
  spec: Any = None


@_part
class Mlp:
  """A dense network, which experts replace; shared experts are one, too.

  The shards of F (axis "mlp") add up to the output.

  init: (rng, d_model) -> params.
  axes: {parameter: logical axis names}.
  apply: (params, x [..., D]) -> y [..., D].
  added_once: parameters that are added to the output, such as its bias; they
    are zero in all shards of F but one.
  width: F, for the check that it divides over a mesh.
  resized: (F) -> the same with another hidden width.
  activation: name of the activation, for writing a model's config.
  """

  init: Callable[..., dict[str, Array]]
  axes: Mapping[str, tuple[str | None, ...]]
  apply: Callable[..., Any]
  added_once: tuple[str, ...] = ()
  width: int = 0
  resized: Callable[[int], Any] | None = None
  activation: str = ""


@_part
class Experts(Mlp):
  """The networks that are the experts: the fields of `Mlp`, but for E of them.

  init: (rng, num_experts, d_model) -> params.
  apply: (params, Rows, rng_GE) -> Rows, with expert e's own weights for its
    rows. rng_GE: one key for each group and expert; None unless it `draws`, and
    outside of training.
  draws: whether it needs keys in training.
  checked: whether its kernels declare over which mesh axes their results vary,
    so that shard_map can check them.
  """

  draws: bool = False
  checked: bool = True


@_part
class Balancer:
  """A way to keep experts equally loaded. Every field has a default.

  init: (num_experts) -> state, a dict of arrays.
  select: (state, score_TE, mask_T) -> the scores that choose, of one group;
    weights do not use them. None: the scores as they are.
  observe: (state, Routing, mask_T) -> {name: array of sums} of one group;
    carried like counts; `loss` and `update` find them in `stats.observed`.
    None: it needs no more than counts.
  loss: (state, Stats, count_E so far in this step, router's parameters) ->
    Mean, coefficient included; None: it adds no loss.
  update: (state, Stats, step) -> state, once per optimizer step.
  causal: whether `select` looks at each token by itself.
  per_token: (num_experts) -> the mean number of experts per token that its options
    assume; None: any number.
  needs: keys of `FACTS` that the recipe has to give: "networks" by having no cheap
    experts, "fixed" by the router's `fixed`, the others by its `gives`.
  gives: keys of `FACTS` that a router may need.
  targets: the share of assignments that it moves each expert to, in their order;
    None: equal shares.
  max_vio: that it moves loads to; None: 0.
  spec: set by the registry.
  """

  init: Callable[[int], dict[str, Array]] = lambda num_experts: {}
  select: Callable[..., Array] | None = None
  observe: Callable[..., dict[str, Array]] | None = None
  loss: Callable[..., Mean] | None = None
  update: Callable[..., dict[str, Array]] = lambda state, stats, step: state
  causal: bool = True
  per_token: Callable[[int], float] | None = None
  needs: frozenset[str] = frozenset()
  gives: frozenset[str] = frozenset()
  targets: tuple[float, ...] | None = None
  max_vio: Any = None
  spec: Any = None


class Sublayer(NamedTuple):
  """MoE layers of a model that share a recipe and lie in the same arrays.

  recipe: `layer.Recipe`.
  grouping: `groups.Grouping`.
  numbers: number of the layer in the model, for each repeat.
  stacked: whether arrays have a leading axis of repeats; if not, there is one.
  sequence: the array of a batch whose tokens pass the layers.
  """

  recipe: Any
  grouping: Any
  numbers: tuple[int, ...]
  stacked: bool = True
  sequence: str = "inputs"
