"""Configs: one Python file each, variants by name, overrides by dotted key."""

import argparse
import ast
import functools
import inspect
import itertools
import pathlib
import re
import sys
import traceback

import ml_collections

from moe_jax.core import files
from moe_jax.core.errors import ConfigError, did_you_mean, first_line
from moe_jax.core.options import integer
from moe_jax.run import command, shipped

# Keys that change no number of a run.
IDLE = ("mesh", "writers", "checkpoint.", "data.cache_dir")
IDLE += ("train.check_mesh", "train.profile_steps", "train.hooks")
IDLE += ("train.loads_every",)
_FREE = (*IDLE, "data.dir", "train.max_skipped_in_a_row")  # May change later.
# Sections whose keys a config may choose: options of a part, or labels.
OPEN = ("task", "upcycle", "data.mixture", "optim.optimizer", "model.attention")
OPEN += (
  "model.encoder",
  "model.image",
  "model.video",
  "model.variants",
  "model.moe.router",
  "model.moe.dispatcher",
)
OPEN += ("model.moe.balancers", "train.hooks", "optim.part_warmup_steps")
OPEN += ("optim.learning_rate_factors", "optim.weight_decay_factors")
_FOLDER_OF_A_PART = re.compile(r"data\.mixture\..+\.dir")
# Sections of one part, whose options go when it gets another name.
_A_PART = re.compile(
  r"config\.(task|optim\.optimizer|model\.attention|train\.hooks\.[^.]+"
  r"|model\.(variants\.[^.]+\.|encoder\.)?moe\.(router|dispatcher|balancers\.[^.]+))"
)


def load(spec: str, overrides=(), *, trust_plugins: bool = False):
  """Returns the locked config of FILE[:VARIANT] with overrides applied.

  Args:
    spec: a Python file with `get_config()`, or `get_config(variant)` for a
      ":VARIANT"; or a run's config.json; or a name in configs/, such as "tiny".
    overrides: texts such as "model.moe.top_k=4", with Python's values or words.
    trust_plugins: whether code may be run that a config.json names. Plugins of
      a Python file or of an override are the user's own.

  Raises:
    ConfigError: there is no such file, variant or key, or a value has another
      type, or plugins are not trusted.
  """
  path, variant = re.fullmatch("(.*?)(?::([^/:]*))?", spec, re.S).groups()
  path = shipped.config(path)
  if path.endswith(".json"):
    if variant:
      raise ConfigError(f'{path} has no variants, so it has no ":{variant}"')
    config = _from_json(path)
    own = any(text.startswith("plugins=") for text in overrides)
    if config.plugins and not trust_plugins and not own:
      raise ConfigError(
        f"{path} names plugins = {config.plugins}, whose code would be run"
        f" ({_some_files(config.plugins)}); read it, and give --trust_plugins"
        " if it may run"
      )
  else:
    config = _from_python(path, variant)
  return overridden(config, overrides)


def _from_python(path, variant):
  get_config = shipped.get_config(pathlib.Path(path))
  if variant and not inspect.signature(get_config).parameters:
    raise ConfigError(f'{path} has no variants, so it has no ":{variant}"')
  try:
    return get_config(variant) if variant else get_config()
  except (AttributeError, KeyError, TypeError) as e:
    frames = traceback.extract_tb(e.__traceback__)
    lines = [f", line {f.lineno}" for f in frames if f.filename.endswith(path)]
    place = "".join([path, *lines[-1:]])
    raise ConfigError(f"{place}: {_problem(e)}") from None


def _problem(error):
  """Returns a few words for what is wrong with a line of a config."""
  text = str(error.args[0] if error.args else error)
  unknown = re.search('Key "([^"]*)" does not exist', text)
  if not unknown:
    return first_line(text)
  near = re.search('Did you mean "([^"]*)"', text)
  remedy = f'; did you mean "{near[1]}"?' if near else "; see configs/base.py"
  return f'there is no key "{unknown[1]}"{remedy}'


def locked(values) -> ml_collections.ConfigDict:
  """Returns nested dicts as a config in which an unknown key is an error.

  Open sections take any key. The types of values are checked elsewhere, see
  `program.check`.
  """
  config = ml_collections.ConfigDict(values, type_safe=False).lock()
  for key in OPEN:
    functools.reduce(getattr, key.split("."), config).unlock()
  return config


def overridden(config: ml_collections.ConfigDict, texts):
  """Returns a config with other values.

  A whole section is set by a dict: "model.moe.router={'name': 'random'}". In an
  open section, missing keys and sections are made, and a new name of a part
  removes the options of the old part.

  Args:
    config: stays unchanged.
    texts: such as "optim.learning_rate=1e-3". Sections are set before their
      keys, and the name of a part before its options.

  Raises:
    ConfigError: a text is no KEY=VALUE, or its key or value is impossible.
  """

  def turn(text):
    key = text.partition("=")[0]
    return key.count("."), not key.endswith(".name")

  values = config.to_dict()
  for text in sorted(texts, key=turn):
    key, equals, value = text.partition("=")
    if not equals:
      raise ConfigError(f'"{text}" is not KEY=VALUE')
    _set(values, "config", key.split("."), _parse(value))
    try:
      config = locked(values)
    except (AttributeError, ValueError) as e:
      raise ConfigError(
        f"config.{text} is not possible: {first_line(e)}"
      ) from None
  return config


def _set(section, place, names, value):
  """Sets a value in a section, under names from the outside in."""
  key, (name, *rest) = ".".join([place, *names]), names
  if not isinstance(section, dict):
    raise ConfigError(f"{key}: {place} is a value, not a section")
  if name not in section and not _is_open(place):
    remedy = did_you_mean(name, section)
    raise ConfigError(f'{key}: there is no "{name}" in {place}{remedy}')
  old = section.get(name)
  if rest:
    _set(section.setdefault(name, {}), f"{place}.{name}", rest, value)
  elif isinstance(old, dict) and not isinstance(value, dict):
    raise ConfigError(
      f"{key} is a section and {value!r} is no dict; set it by one, such as"
      " {'name': 'random'}, with all its quotes and braces"
    )
  elif isinstance(old, dict) and not _is_open(key):
    for k, v in value.items():
      _set(old, key, [str(k)], v)
  else:
    if name == "name" and value != old and _A_PART.fullmatch(place):
      section.clear()
    if value == "none" and name in section and not isinstance(old, str):
      value = None  # In other keys it is a word, as in model.remat=none.
    whole = isinstance(old, float) and type(value) is int
    section[name] = float(value) if whole else value


def _is_open(place):
  """Whether the config may choose the keys of a section."""
  return f"{place}.".startswith(tuple(f"config.{key}." for key in OPEN))


def _from_json(path):
  """The config that a run left behind; a key that it lacks has its default."""
  what = "the config.json of a run"
  remedy = "bring it back as it was, or give another config"
  values = files.read_json(path, what, remedy)
  try:
    for name in ("data", "model", "optim", "train"):
      values[name].items()  # A section, not a value.
    config = locked(_with_tuples(complete(values)))
  except (ValueError, AttributeError, KeyError, TypeError) as e:
    raise ConfigError(f"{path} is not {what} ({e}); {remedy}") from None
  if words := of_another_version(values):
    raise ConfigError(f"{path} {words}, or take out what is not known")
  return config


def _some_files(plugins):
  """Words that name the first Python files of plugin folders."""
  folders = plugins if isinstance(plugins, tuple) else ()
  paths = (f for name in folders for f in pathlib.Path(str(name)).rglob("*.py"))
  some = [str(file.absolute()) for file in itertools.islice(paths, 5)]
  return ", ".join(some) or "no file is there"


def _with_tuples(value):
  """Tuples, which configs have, in place of JSON's lists."""
  if isinstance(value, dict):
    return {k: _with_tuples(v) for k, v in value.items()}
  return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


@functools.cache
def defaults() -> dict:
  """Returns the values of configs/base.py, as nested dicts."""
  return shipped.get_config(
    shipped.folder() / "configs" / "base.py"
  )().to_dict()


def complete(values: dict) -> dict:
  """Returns an older config.json's values, with defaults for missing keys."""

  def filled(given, default, key):
    if key in OPEN or not all(isinstance(x, dict) for x in (given, default)):
      return given
    place = f"{key}." if key else ""
    pairs = ((k, default.get(k), v) for k, v in given.items())
    return default | {k: filled(v, d, place + k) for k, d, v in pairs}

  return filled(values, defaults(), "")


def of_another_version(values: dict) -> str:
  """Returns words for an error about keys unknown to this version, or ""."""
  known = {key for key, _ in flat(defaults(), whole=OPEN)}
  unknown = [key for key, _ in flat(values, whole=OPEN) if key not in known]
  if not unknown:
    return ""
  names = ", ".join([*unknown[:3], *["..."] * (len(unknown) > 3)])
  return (
    f"is a config of another version of moe_jax, with {names}, which this version"
    " does not know; use the revision of the code that run.json names"
  )


def flat(tree: dict, prefix="", whole=()):
  """Yields (dotted key, value) of all values.

  Args:
    tree, prefix: a config as nested dicts, and the beginning of its keys.
    whole: keys of sections that are one value.
  """
  for key, value in tree.items():
    key = prefix + key
    if isinstance(value, dict) and value and key not in whole:
      yield from flat(value, f"{key}.", whole)
    else:
      yield key, value


def numbers(tree: dict):
  """Yields (dotted key, value) of all values that a run's numbers depend on."""
  return (
    (key, value)
    for key, value in flat(_with_tuples(tree))
    if not key.startswith(_FREE) and not _FOLDER_OF_A_PART.fullmatch(key)
  )


def differences(tree: dict, other: dict) -> dict:
  """Returns {dotted key: value} of the values that differ between two configs.

  Args:
    tree, other: the configs; the values are those of `tree`. An open section
      that differs is there as a whole.
  """
  old = dict(flat(other, whole=OPEN))
  new = flat(tree, whole=OPEN)
  return {k: v for k, v in new if k not in old or old[k] != v}


class Parser(argparse.ArgumentParser):
  """A parser of the flags of a command, which are texts in UTF-8."""

  def __init__(self, description: str, multihost: bool = False, **options):
    """Makes a parser.

    Args:
      description: what the command does.
      multihost: whether to add the flags that `processes.join` takes.
      **options: of argparse.ArgumentParser.
    """
    layout = argparse.RawDescriptionHelpFormatter
    main = sys.modules["__main__"].__spec__
    options["prog"] = command.called or (main and f"python -m {main.name}")
    super().__init__(description=description, formatter_class=layout, **options)
    if multihost:
      self.add_argument(
        "--multihost",
        choices=("auto", "on", "off"),
        default="auto",
        help="run together with other processes; auto: where there is a cluster",
      )
      self.add_argument(
        "--multihost_timeout",
        type=at_least_1,
        default=300,
        metavar="SECONDS",
        help="that they may take to meet",
      )

  def parse_known_args(self, args=None, namespace=None):
    """Parses as argparse does; raises ConfigError for texts not in UTF-8.

    Args:
      args, namespace: as in argparse.
    """
    for text in sys.argv[1:] if args is None else args:
      if text.encode(errors="ignore").decode() != text:
        raise ConfigError(
          f"the argument {ascii(text)} is not UTF-8; give texts in UTF-8"
        )
    return super().parse_known_args(args, namespace)


def parser(description: str, multihost: bool = False) -> Parser:
  """Returns a parser with the flags that every command on a config has.

  Args:
    description, multihost: as in `Parser`.
  """
  epilog = "Any value of the config is set by --config.SECTION.KEY=VALUE."
  parser = Parser(description, multihost, epilog=epilog)
  words = "a Python file with get_config(), a name in configs/, or a run's config.json"
  add = parser.add_argument
  add("--config", required=True, metavar="FILE[:VARIANT]", help=words)
  add_trust(parser)
  return parser


def add_trust(parser: argparse.ArgumentParser) -> None:
  """Adds the flag of `load` for the config.json of a run."""
  words = "run the code of plugins that a run's config.json names"
  parser.add_argument("--trust_plugins", action="store_true", help=words)


def at_least_1(text: str) -> int:
  """The type of a flag that counts; raises ArgumentTypeError otherwise."""
  if not text.isdecimal() or not integer(1).fits(int(text)):
    raise argparse.ArgumentTypeError(f"{text} is not {integer(1).words}")
  return int(text)


def at_least_0(text: str) -> int:
  """The type of a flag for an index; raises ArgumentTypeError otherwise."""
  if not text.isdecimal() or not integer(0).fits(int(text)):
    raise argparse.ArgumentTypeError(f"{text} is not {integer(0).words}")
  return int(text)


def parse(parser: Parser, argv=None):
  """Returns (arguments, loaded config) from a command line; raises as `load`.

  Args:
    parser, argv: from `parser`; the words, or None for those of the process.
  """
  args, overrides = parse_overrides(parser, argv)
  return args, load(args.config, overrides, trust_plugins=args.trust_plugins)


def parse_overrides(parser: Parser, argv=None):
  """Returns (arguments, texts KEY=VALUE of the flags --config.KEY=VALUE).

  Args:
    parser, argv: as in `parse`.

  Raises:
    ConfigError: a flag is unknown, or not UTF-8.
  """
  args, rest = parser.parse_known_args(argv)
  for text in rest:
    if not text.startswith("--"):
      raise ConfigError(f'"{text}" belongs to no flag; write --FLAG={text}')
    if not text.startswith("--config."):
      if text[2:].partition(".")[0] in defaults():
        raise ConfigError(
          f'unknown argument "{text}"; write --config.{text[2:]}'
        )
      flags = parser._option_string_actions
      remedy = did_you_mean(text.partition("=")[0], flags)
      raise ConfigError(f'unknown argument "{text}"{remedy}')
  return args, [text.removeprefix("--config.") for text in rest]


def _parse(text):
  is_name = text in ("true", "TRUE", "false", "FALSE")
  try:
    return ast.literal_eval(text.capitalize() if is_name else text)
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    return text  # A bare word.
