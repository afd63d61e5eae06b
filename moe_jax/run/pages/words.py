"""Titles and explanations of the metrics of a run, for its page.

A word in brackets, as [load] or [loads|load], is a link to the glossary.
"""

from collections.abc import Iterable
from typing import NamedTuple


class Metric(NamedTuple):
  """The words for a metric.

  title: of its figure.
  unit: of the vertical axis.
  about: the meaning of the figure, and how to read it.
  log: whether its axis may be logarithmic.
  """

  title: str
  unit: str
  about: str
  log: bool = False


class Group(NamedTuple):
  """Metrics that stand together on a page.

  metrics: by name.
  families: by name; a figure has all metrics NAME/... of a family.
  both: whether the validation split is drawn too.
  """

  heading: str
  about: str
  metrics: dict[str, Metric]
  families: dict[str, Metric]
  both: bool = False


LEARNING = Group(
  "Learning",
  "How well the task is learned, on training batches and on the [validation]"
  " split.",
  {
    "loss": Metric(
      "Loss",
      "loss",
      "The loss of the task, without the losses of [balancers|balancer]; lower is"
      " better.",
    ),
    "bits_per_byte": Metric(
      "Bits per byte",
      "bits per byte of text",
      "The loss as [bits per byte] of text, which does not depend on the tokenizer;"
      " lower is better.",
    ),
    "accuracy": Metric(
      "Accuracy",
      "share of targets",
      "The share of targets to which the model gives the highest probability; 1 is"
      " perfect.",
    ),
    "accuracy_5": Metric(
      "Accuracy of the best five",
      "share of targets",
      "The share of targets among the five that the model finds most probable; 1"
      " is perfect.",
    ),
  },
  {
    "loss": Metric(
      "Loss by part",
      "loss",
      "The loss of each part of the data; lower is better.",
    ),
    "bits_per_byte": Metric(
      "Bits per byte by domain",
      "bits per byte of text",
      "[Bits per byte|bits per byte] of each domain of the data; lower is better.",
    ),
    "accuracy": Metric(
      "Accuracy by domain",
      "share of targets",
      "The share of right targets in each domain of the data; 1 is perfect.",
    ),
  },
  both=True,
)
BALANCE = Group(
  "Balance",
  "How evenly the [assignments|assignment] of a [step] are spread over the experts.",
  {
    "max_vio": Metric(
      "MaxVio",
      "MaxVio, mean over layers",
      "[MaxVio] is how far the fullest expert is above the mean [load]: 0 is"
      " perfect balance, 1 is twice the mean. The dashed [floor] is what uniform"
      " random routing would have, so balance cannot be expected below it.",
      log=True,
    ),
    "min_vio": Metric(
      "MinVio",
      "MinVio, mean over layers",
      "How far the emptiest expert is below the mean [load]: 0 is perfect balance, 1"
      " is an expert without a token.",
    ),
    "load_cv": Metric(
      "Spread of the loads",
      "standard deviation / mean",
      "The standard deviation of the [loads|load] over their mean; 0 is perfect"
      " balance.",
      log=True,
    ),
    "dead_experts": Metric(
      "Dead experts",
      "experts, mean over layers",
      "Experts that got no token in a whole [step]; 0 is best.",
    ),
    "balance_loss": Metric(
      "Balance loss",
      "E Σ f P",
      "The usual load-balancing loss, whether or not it is trained on: 1 where"
      " [loads|load] and probabilities are equal, higher where the router prefers"
      " full experts.",
    ),
    "aux_loss": Metric(
      "Loss of the balancers",
      "added to the loss",
      "What the [balancers|balancer] add to the loss of the task.",
    ),
    "bias_range": Metric(
      "Range of the bias",
      "highest − lowest bias",
      "How far apart the [biases|bias] of the experts are, mean over layers; it"
      " levels off once the balancer has found its balance.",
    ),
    "max_vio_global": Metric(
      "MaxVio of the validation split",
      "MaxVio, mean over layers",
      "[MaxVio] of the whole [validation] split, which has many more tokens than a"
      " [step] and so a lower [floor].",
      log=True,
    ),
    "max_vio_domains": Metric(
      "MaxVio within domains",
      "MaxVio, mean over domains",
      "[MaxVio] of each domain of the [validation] split, averaged; it is high where"
      " experts specialise in domains.",
      log=True,
    ),
  },
  {
    "max_vio": Metric(
      "MaxVio of each layer",
      "MaxVio",
      "[MaxVio] layer by layer; a layer far above the others is where balance fails.",
      log=True,
    ),
    "max_vio_global": Metric(
      "MaxVio of each domain",
      "MaxVio, mean over layers",
      "[MaxVio] of each domain of the [validation] split; it is high where experts"
      " specialise in the domain.",
      log=True,
    ),
  },
)
DROPPED = Group(
  "Dropped assignments",
  "[Assignments|assignment] that were not computed.",
  {
    "dropped": Metric(
      "Dropped assignments",
      "share of assignments",
      "The share of [assignments|assignment] that were [dropped]; 0 is best.",
    ),
  },
  {
    "dropped": Metric(
      "Dropped assignments by cause",
      "share of assignments",
      "The share of [assignments|assignment] that were [dropped], by cause: the"
      " expert was full (capacity), its bucket of experts was full (buffer), or the"
      " router chose too few experts (unrouted).",
    ),
    "beyond_capacity": Metric(
      "Beyond a capacity factor",
      "share of assignments",
      "The share of [assignments|assignment] that would be [dropped] if the"
      " [capacity] of experts were the mean [load] times this factor.",
    ),
  },
)
ROUTER = Group(
  "Router",
  "How the [router] decides.",
  {
    "router_entropy": Metric(
      "Entropy of the router",
      "nats per token",
      "The [entropy] of the probabilities that the router gives to experts: 0 if it"
      " is certain, the logarithm of the number of experts if it has no preference.",
    ),
    "router_confidence": Metric(
      "Confidence of the router",
      "probability",
      "The summed probability of the experts that a token got: 1 if the router gave"
      " nothing to the others.",
    ),
    "experts_per_token": Metric(
      "Experts per token",
      "experts, mean over tokens",
      "The number of experts that the router chose for a token.",
    ),
    "real_experts_per_token": Metric(
      "Networks per token",
      "experts, mean over tokens",
      "The number of chosen experts that are networks, and not cheap ones.",
    ),
    "z_loss": Metric(
      "Size of the router's logits",
      "mean of logsumexp²",
      "It grows with the logits of the router; a steady rise is a sign of"
      " instability.",
      log=True,
    ),
  },
  {},
)
OPTIMIZER = Group(
  "Optimizer and speed",
  "How the optimizer moves, and how fast.",
  {
    "grad_norm": Metric(
      "Norm of the gradient",
      "norm, before clipping",
      "The [gradient norm]; lone peaks are unusual batches, a steady rise is a sign"
      " of instability.",
      log=True,
    ),
    "learning_rate": Metric(
      "Learning rate",
      "learning rate",
      "The learning rate of the schedule, before factors of parts of the model.",
    ),
    "tokens_per_second": Metric(
      "Throughput",
      "tokens per second",
      "Tokens that were trained on per second of wall time, without compilation.",
    ),
    "skipped_steps": Metric(
      "Skipped steps",
      "steps so far",
      "[Steps|step] that were not applied because a number in them was not finite; 0"
      " is best.",
    ),
  },
  {},
)
OTHER = Group(
  "Other metrics",
  "Metrics of the run that this page has no words for.",
  {},
  {},
  True,
)
GROUPS = (LEARNING, BALANCE, DROPPED, ROUTER, OPTIMIZER)

# Floors are drawn or shown beside their metric; others repeat a sum that is drawn.
BESIDE = ("max_vio_floor", "neg_log_perplexity")
FLOORS = {"max_vio": "max_vio_floor", "max_vio_global": "max_vio_floor"}
LOSS_UNITS = {
  "next_token": "nats per token",
  "span_corruption": "nats per target token",
  "translation": "nats per target token",
  "classify_images": "nats per image",
  "denoise": "mean square error",
}

GLOSSARY = {
  "active parameters": "the parameters that one token uses: those of its chosen"
  " experts, and all that are not in experts",
  "assignment": "a pair of a token and one of its chosen experts; with K experts for"
  " each token, there are K times as many assignments as tokens",
  "balancer": "keeps the loads equal, by a loss or by a bias on the scores that"
  " choose experts",
  "bias": "a number of each expert that is added to its scores for the choice only,"
  " and is moved until the loads are equal",
  "bits per byte": "the cross-entropy in bits, summed over a text and divided by its"
  " number of bytes",
  "capacity": "the number of tokens that an expert has room for, in each group of"
  " tokens",
  "dropped": "an assignment that is not computed, because there was no room for it"
  " or because the router chose fewer experts than it may",
  "entropy": "how undecided a distribution is: 0 if one expert has all probability,"
  " the logarithm of the number of experts if all have the same",
  "floor": "the mean MaxVio of uniform random routing of as many tokens; it is above"
  " zero and shrinks with the number of tokens",
  "gradient norm": "the length of the gradient of all parameters together, before"
  " it is clipped",
  "load": "the number of assignments of an expert, dropped ones included",
  "MaxVio": "(highest load − mean load) / mean load, of the experts of a layer",
  "moving average": "an exponential average of the parameters over the steps, which"
  " is evaluated beside them",
  "router": "the part of a layer that chooses the experts of each token",
  "step": "one update of the optimizer, by one batch",
  "validation": "data that is held out of training, evaluated now and then",
}


def loss_unit(tasks: Iterable[str]) -> str:
  """Returns the unit of the loss of tasks; "loss" if they do not share one.

  Args:
    tasks: names of the tasks.
  """
  units = {LOSS_UNITS.get(task, "loss") for task in tasks}
  return units.pop() if len(units) == 1 else "loss"


def metric(name: str) -> Metric:
  """Returns a metric by name; an unknown metric is described by its name."""
  for group in GROUPS:
    if name in group.metrics:
      return group.metrics[name]
  return Metric(
    name, name, "A metric that the task or a part of the run reports."
  )
