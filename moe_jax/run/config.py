"""Configs: one Python file each, variants by name, overrides by dotted key."""

import argparse
import ast
import functools
import importlib.util
import inspect
import json
import pathlib
import re
import sys
import traceback

import ml_collections

from moe_jax.core import files
from moe_jax.core.errors import ConfigError, did_you_mean, first_line
from moe_jax.core.options import integer

# Keys that a run's numbers do not depend on.
IDLE = ("mesh", "writers", "checkpoint.", "data.cache_dir")
IDLE += ("train.check_mesh", "train.profile_steps")
# And those that may be others when a run goes on.
_FREE = (*IDLE, "data.dir", "train.max_skipped_in_a_row")
# Sections whose keys are up to the config: the options of a part, and parts or
# data by a label.
OPEN = (
  "task",
  "data.mixture",
  "model.attention",
  "model.variants",
  "model.moe.router",
  "model.moe.dispatcher",
  "model.moe.balancers",
  "optim.optimizer",
)
_FOLDER_OF_A_PART = re.compile(r"data\.mixture\..+\.dir")


def load(
  spec: str, overrides=(), *, trust_plugins: bool = False
) -> ml_collections.ConfigDict:
  """The locked config of FILE[:VARIANT] with overrides applied.

  Args:
    spec: path of a Python file with `get_config()`, or with
      `get_config(variant)` for a ":VARIANT"; or the config.json of a run.
    overrides: texts such as "model.moe.top_k=4"; values as Python writes
      them, or bare words.
    trust_plugins: whether code may be run that a config.json names. Plugins of
      a Python file or of an override are the user's own.

  Raises:
    ConfigError: no such file, variant or key, a value of another type, or
      plugins that are not trusted.
  """
  path, _, variant = spec.partition(":")
  if path.endswith(".json"):
    config = _from_json(pathlib.Path(path))
    own = any(text.startswith("plugins=") for text in overrides)
    if not trust_plugins and not own:
      _check_no_plugins(path, config)
    return overridden(config, overrides)
  get_config = _get_config(pathlib.Path(path))
  if variant and not inspect.signature(get_config).parameters:
    raise ConfigError(f'{path} has no variants, so it has no ":{variant}"')
  try:
    config = get_config(variant) if variant else get_config()
  except (AttributeError, KeyError, TypeError) as e:
    sentence = str(e.args[0]).split("\n")[0] if e.args else str(e)
    lines = traceback.extract_tb(e.__traceback__)
    line = [f.lineno for f in lines if f.filename.endswith(path)]
    place = f"{path}, line {line[-1]}" if line else path
    raise ConfigError(f"{place}: {sentence}") from None
  return overridden(config if config.is_locked else config.lock(), overrides)


def locked(values) -> ml_collections.ConfigDict:
  """A config in which a misspelt key is an error, but in an open section.

  Types are not looked at here: `program.check` knows more about each value.

  Args:
    values: nested dicts.
  """
  config = ml_collections.ConfigDict(values, type_safe=False).lock()
  for key in OPEN:
    functools.reduce(getattr, key.split("."), config).unlock()
  return config


def overridden(config: ml_collections.ConfigDict, texts):
  """The config after `override` by all texts: sections before their keys, and
  the name of a part before its options."""

  def turn(text):
    key = text.partition("=")[0]
    return key.count("."), not key.endswith(".name")

  for text in sorted(texts, key=turn):
    override(config, text)
  return config


def override(config: ml_collections.ConfigDict, text: str) -> None:
  """Sets one dotted key, "optim.learning_rate=1e-3".

  A whole section is set by a dict: "model.moe.router={'name': 'random'}". In an
  open section keys and sections that are not there are made, and another name
  of a part takes the options of the old one away.
  """
  key, equals, value = text.partition("=")
  if not equals:
    raise ConfigError(f'"{text}" is not KEY=VALUE')
  try:
    _set(config, "config", key.split("."), _parse(value))
  except ConfigError:
    raise
  except (KeyError, TypeError, ValueError) as e:  # ml_collections refuses.
    raise ConfigError(f"config.{text} cannot be ({first_line(e)})") from None


def _set(section, place, names, value):
  """Sets the value under some names, one inside of the other, in a section."""
  key, (name, *rest) = ".".join([place, *names]), names
  if not isinstance(section, ml_collections.ConfigDict):
    raise ConfigError(f"{key}: {place} is a value, not a section")
  if name not in section and section.is_locked:
    remedy = did_you_mean(name, section.keys())
    raise ConfigError(f'{key}: there is no "{name}" in {place}{remedy}')
  old = section.get(name)
  if rest:
    if name not in section:
      section[name] = ml_collections.ConfigDict(type_safe=False)
    _set(section[name], f"{place}.{name}", rest, value)
  elif isinstance(old, ml_collections.ConfigDict):
    _set_section(section, key, name, value)
  else:
    if name == "name" and value != old and not section.is_locked:
      for other in list(section):
        del section[other]
    whole = isinstance(old, float) and type(value) is int
    section[name] = float(value) if whole else value


def _set_section(parent, key, name, value):
  """Replaces an open section, or sets some keys of another one."""
  if not isinstance(value, dict):
    raise ConfigError(
      f"{key} is a section and {value!r} is no dict; set it by one, such as"
      " {'name': 'random'}, with all its quotes and braces"
    )
  if not parent[name].is_locked:
    parent[name] = value
    return
  for k, v in value.items():
    _set(parent[name], key, [k], v)


def to_json(config: ml_collections.ConfigDict) -> str:
  """The config as JSON text, keys sorted."""
  return json.dumps(config.to_dict(), indent=2, sort_keys=True)


def _from_json(path):
  """The config that a run left behind; a key that it lacks has its default."""
  what = "the config.json of a run"
  remedy = "give one, or a Python file such as configs/base.py"
  try:
    values = files.read_json(path, what, remedy)
    for name in ("data", "model", "optim", "train"):
      values[name].items()  # A section, not a value.
    return locked(_with_tuples(complete(values)))
  except FileNotFoundError:
    raise ConfigError(f'there is no config file "{path}"') from None
  except ConfigError:
    raise
  except (ValueError, AttributeError, KeyError, TypeError) as e:
    raise ConfigError(f"{path} is not {what} ({e}); {remedy}") from None


def _check_no_plugins(path, config):
  """Raises ConfigError where a config from elsewhere names code."""
  if not config.plugins:
    return
  folders = config.plugins if isinstance(config.plugins, tuple) else ()
  files = [f for name in folders for f in pathlib.Path(str(name)).rglob("*.py")]
  some = [str(file.absolute()) for file in sorted(files)[:5]]
  some += ["..."] * (len(files) > 5)
  raise ConfigError(
    f"{path} names plugins = {config.plugins}, whose code would be run"
    f" ({', '.join(some) or 'no file is there'}); read it, and give"
    " --trust_plugins if it may run"
  )


def _with_tuples(value):
  """JSON has lists where configs have tuples."""
  if isinstance(value, dict):
    return {k: _with_tuples(v) for k, v in value.items()}
  return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


@functools.cache
def defaults() -> dict:
  """configs/base.py, as nested dicts; {} where that file is not installed."""
  path = pathlib.Path(__file__).parents[2] / "configs" / "base.py"
  return _get_config(path)().to_dict() if path.is_file() else {}


def complete(values: dict) -> dict:
  """The values of an older config.json, with defaults for keys that it lacks."""

  def filled(given, default, key):
    if key in OPEN or not all(isinstance(x, dict) for x in (given, default)):
      return given
    place = f"{key}." if key else ""
    pairs = ((k, default.get(k), v) for k, v in given.items())
    return default | {k: filled(v, d, place + k) for k, d, v in pairs}

  return filled(values, defaults(), "")


def flat(tree: dict, prefix="", whole=()):
  """(dotted key, value) of all values.

  Args:
    tree: a config as nested dicts.
    prefix: of the keys.
    whole: keys of sections that are one value.
  """
  for key, value in tree.items():
    key = prefix + key
    if isinstance(value, dict) and value and key not in whole:
      yield from flat(value, f"{key}.", whole)
    else:
      yield key, value


def numbers(tree: dict):
  """(dotted key, value) of all values that a run's numbers depend on."""
  return (
    (key, value)
    for key, value in flat(tree)
    if not key.startswith(_FREE) and not _FOLDER_OF_A_PART.fullmatch(key)
  )


def differences(tree: dict, other: dict) -> dict:
  """{dotted key: value} of what is not the same in two configs.

  An open section that differs is there as a whole.
  """
  old = dict(flat(other, whole=OPEN))
  new = flat(tree, whole=OPEN)
  return {k: v for k, v in new if k not in old or old[k] != v}


def parser(description: str) -> argparse.ArgumentParser:
  """A parser with the flags that every command on a config has."""
  parser = argparse.ArgumentParser(
    description=description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog="Any value of the config is set by --config.SECTION.KEY=VALUE.",
  )
  parser.add_argument(
    "--config",
    required=True,
    metavar="FILE[:VARIANT]",
    help="a Python file with get_config(), or the config.json of a run",
  )
  add_trust(parser)
  return parser


def add_trust(parser: argparse.ArgumentParser) -> None:
  """Adds the flag of `load` for the config.json of a run."""
  parser.add_argument(
    "--trust_plugins",
    action="store_true",
    help="run the code of plugins that a run's config.json names",
  )


def add_multihost(parser: argparse.ArgumentParser) -> None:
  """Adds the flags that `processes.join` takes."""
  parser.add_argument(
    "--multihost",
    choices=("auto", "on", "off"),
    default="auto",
    help="run together with other processes; auto: where there is a cluster",
  )
  parser.add_argument(
    "--multihost_timeout",
    type=at_least_1,
    default=300,
    metavar="SECONDS",
    help="that they may take to meet",
  )


def at_least_1(text: str) -> int:
  """The type of a flag that counts something."""
  if not text.isdecimal() or not integer(1).fits(int(text)):
    raise argparse.ArgumentTypeError(f"{text} is not {integer(1).words}")
  return int(text)


def check_utf8(argv=None) -> None:
  """Raises ConfigError for an argument that is not UTF-8.

  Args:
    argv: the arguments; None: those of the process.
  """
  for text in sys.argv[1:] if argv is None else argv:
    try:
      text.encode()
    except UnicodeEncodeError:
      raise ConfigError(
        f"the argument {ascii(text)} is not UTF-8; give texts and paths in UTF-8"
      ) from None


def parse(parser: argparse.ArgumentParser, argv=None):
  """(arguments, loaded config) from a command line.

  Raises:
    ConfigError: an unknown flag or anything `load` refuses.
  """
  args, overrides = parse_overrides(parser, argv)
  return args, load(args.config, overrides, trust_plugins=args.trust_plugins)


def parse_overrides(parser: argparse.ArgumentParser, argv=None):
  """(arguments, texts KEY=VALUE of the flags --config.KEY=VALUE).

  Raises:
    ConfigError: an unknown flag, or one that is not UTF-8.
  """
  check_utf8(argv)
  args, rest = parser.parse_known_args(argv)
  prefix = "--config."
  unknown = [r for r in rest if not r.startswith(prefix)]
  if unknown:
    flags = [s for a in parser._actions for s in a.option_strings]
    raise ConfigError(
      f'unknown argument "{unknown[0]}"'
      + did_you_mean(unknown[0].partition("=")[0], flags)
    )
  return args, [r[len(prefix) :] for r in rest]


def _get_config(path):
  if not path.is_file():
    folder = path.parent
    known = [str(p) for p in folder.glob("*.py")] if folder.is_dir() else []
    hint = did_you_mean(str(path), known) if known else ""
    raise ConfigError(f'there is no config file "{path}"{hint}')
  if path.suffix != ".py":
    raise ConfigError(
      f"{path} is neither a Python file with get_config() nor the config.json of"
      " a run"
    )
  spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
  module = importlib.util.module_from_spec(spec)
  # Configs import each other as `configs.base` from the folder above theirs.
  sys.path.insert(0, str(path.resolve().parent.parent))
  try:
    spec.loader.exec_module(module)
  finally:
    sys.path.pop(0)
  if not hasattr(module, "get_config"):
    raise ConfigError(f"{path} has no function get_config()")
  return module.get_config


def _parse(text):
  words = {"true": True, "false": False, "none": None}
  if text.lower() in words:
    return words[text.lower()]
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    return text  # A bare word.
