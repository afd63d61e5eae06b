"""Parameters that a run takes from other weights, and those that begin new."""

import sys
from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
from flax import traverse_util

from moe_jax import models
from moe_jax.core import roles
from moe_jax.core.errors import ConfigError
from moe_jax.core.options import items, word
from moe_jax.run import config as config_lib
from moe_jax.run import processes

NEW = "init_new"
# In sections of factors, "rest" stands for the parts that are not named.
OPTION = items(word(*(part for part in roles.FACTORS if part != "rest")))
_SHOWN = 3  # Parameters in a message.


def of(model) -> dict[str, str]:
  """Returns {path of a parameter: the part of the model that it belongs to}."""
  return _parts(models.variables(model)["params"])


def of_run(file: str, plugins: tuple[str, ...]) -> dict[str, str]:
  """Returns `of` the model of a run; {} for a model that cannot be built here.

  Args:
    file: the run's config.json.
    plugins: the folders whose code may be run, in place of the run's own.
  """
  from moe_jax.training import program

  try:
    config = config_lib.load(file, [f"plugins={tuple(plugins)!r}"])
    given = program.build_task(config, prepare=False).given
    return of(models.build(config.model, plugins=config.plugins, **given))
  except ConfigError:
    return {}


def taken(
  given: Mapping,
  model,
  new: Sequence[str],
  path: str,
  parts_there: Callable[[], Mapping[str, str]],
) -> dict:
  """Returns the parameters that a model takes from other weights, nested.

  Parameters of the parts in `new` begin new, whether they would fit or not. All
  others must be there in the same shape, and nothing else may be there.

  Args:
    given: the other weights, nested.
    model: from `models.build`.
    new: names of parts.
    path: of the other weights, for messages.
    parts_there: () -> {parameter: its part} of the model of the other weights,
      or {} if that is not known.

  Raises:
    ConfigError: parameters do not fit, all of them in one sentence; or neither
      model has a part.
  """
  boxed = models.variables(model)["params"]
  there, here, own = _flat(given), _flat(nn.unbox(boxed)), _parts(boxed)
  left = there.keys() - here.keys()
  parts = {**(parts_there() if left else {}), **own}
  other = {k for k in there.keys() & here if there[k].shape != here[k].shape}
  misfits = {
    "parameters of another shape": other,
    "missing there": here.keys() - there.keys(),
    "left over there": left,
  }
  misfits = {
    words: sorted(name for name in names if parts.get(name) not in new)
    for words, names in misfits.items()
  }
  if any(misfits.values()):
    raise ConfigError(_sentence(path, misfits, there, here, parts, new))
  for name in {*new} - {*parts.values()}:
    raise ConfigError(
      f"{NEW} has the part {name}, of which neither this model nor that of {path} has"
      " a parameter; leave it out"
    )
  kept = {name: there[name] for name in here if own[name] not in new}
  _tell(path, new, here.keys() - kept.keys(), left)
  return traverse_util.unflatten_dict(kept, sep="/")


def _tell(path, new, begun, left):
  """Says which parameters begin new, and which are not used."""
  if not new or not processes.is_first():
    return
  words = f"parameters that begin new, of {', '.join(new)}: {_counted(begun)}"
  words += f"; left out of {path}: {_counted(left)}" if left else ""
  print(f"{words}; all others are those of {path}", file=sys.stderr)


def _sentence(path, misfits, there, here, parts, new):
  """The error for parameters that do not fit: how many, the first, a remedy."""
  words = []
  for what, names in misfits.items():
    tables = {"there": there, "here": here}
    listed = []
    for name in names:
      sizes = [
        f"{list(x[name].shape)} {k}" for k, x in tables.items() if name in x
      ]
      listed.append(f"{name}: {' and '.join(sizes)}")
    if names:
      words.append(f"{what}: {_counted(listed)}")
  named = {parts.get(name) for name in sum(misfits.values(), [])}
  named = {*named, *new} - {"rest"}
  if {*parts.values()} - {"rest"} <= named:
    named = ()  # Nothing would be kept.
  new = tuple(part for part in roles.FACTORS if part in named)
  remedy = f', or let parts begin new, --config.{NEW}="{new}"' if new else ""
  return (
    f"init_from = {path} is of another model ({', '.join(words)}); make the sizes"
    " equal, give other weights (moe-jax upcycle makes experts of dense"
    f" ones){remedy}"
  )


def _counted(names):
  """The number of names, and the first of them."""
  first = [*sorted(names)[:_SHOWN], *["..."] * (len(names) > _SHOWN)]
  return f"{len(names)} ({', '.join(first)})" if names else "0"


def _parts(boxed):
  return {name: role.factor for name, role in _flat(roles.of(boxed)).items()}


def _flat(tree):
  return traverse_util.flatten_dict(dict(tree), sep="/")
