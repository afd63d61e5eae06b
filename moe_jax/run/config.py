"""Configs: one Python file each, variants by name, overrides by dotted key."""

import argparse
import ast
import errno
import importlib.util
import inspect
import json
import os
import pathlib
import re
import signal
import sys
import traceback

import ml_collections

from moe_jax.core.errors import (
  ConfigError,
  Interrupted,
  RunError,
  did_you_mean,
  first_line,
)

# Keys that a run's numbers do not depend on.
_SAME_NUMBERS = (
  "mesh",
  "writers",
  "checkpoint.",
  "data.cache_dir",
  "data.dir",
  "train.check_mesh",
  "train.max_skipped_in_a_row",
  "train.profile_steps",
)
# Keys that are younger than some runs, and what was done without them.
_YOUNGER = {
  "model.vocab_size": None,
  "model.attention": {},
  "model.variants": {},
  "model.norm": "rms",
  "model.scale_embedding": True,
  "model.moe.shared_gate": False,
}
# What jax says where a process that it talks to is gone.
_PEER = re.compile("Gloo|(closed|reset) by peer|remote process exited")
_FOLDER_OF_A_PART = re.compile(r"data\.mixture\..+\.dir")


def load(spec: str, overrides=()) -> ml_collections.ConfigDict:
  """The locked config of FILE[:VARIANT] with overrides applied.

  Args:
    spec: path of a Python file with `get_config()`, or with
      `get_config(variant)` for a ":VARIANT"; or the config.json of a run.
    overrides: texts such as "model.moe.top_k=4"; values as Python writes
      them, or bare words.

  Raises:
    ConfigError: no such file, variant or key, or a value of another type.
  """
  path, _, variant = spec.partition(":")
  if path.endswith(".json"):
    config = _from_json(pathlib.Path(path))
    for text in overrides:
      override(config, text)
    return config
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
  if not config.is_locked:
    config.lock()
  for text in overrides:
    override(config, text)
  return config


def override(config: ml_collections.ConfigDict, text: str) -> None:
  """Sets one dotted key, "optim.learning_rate=1e-3".

  A whole section is set by a dict: "model.moe.router={'name': 'random'}".
  """
  key, equals, value = text.partition("=")
  if not equals:
    raise ConfigError(f'"{text}" is not KEY=VALUE')
  *sections, last = key.split(".")
  section = config
  for i, name in enumerate([*sections, last]):
    is_section = isinstance(section, ml_collections.ConfigDict)
    is_new = is_section and not section.is_locked and name is last
    if not is_section or (name not in section and not is_new):
      _unknown_key(section, sections[:i], key, name)
    if i < len(sections):
      section = section[name]
  value = _parse(value)
  old = section.get(last, value)
  if isinstance(section.get(last), ml_collections.ConfigDict):
    _set_section(config, key, section, last, value)
    return
  try:
    section[last] = value
  except (TypeError, ValueError):
    like = "('a', 'b') or ('a',)" if isinstance(old, tuple) else "one like it"
    raise ConfigError(
      f"config.{key} = {value!r} is of type {type(value).__name__}, but its"
      f" default {old!r} is of type {type(old).__name__}; give {like}"
    ) from None


def _set_section(config, key, parent, name, value):
  """Replaces the options of a part, or sets known keys of a fixed section."""
  if not isinstance(value, dict):
    raise ConfigError(
      f"config.{key} is a section and {value!r} is no dict; set it by one, such"
      " as {'name': 'random'}, with all its quotes and braces"
    )
  section = parent[name]
  if section.is_locked:
    for k, v in value.items():
      override(config, f"{key}.{k}={v!r}")
    return
  for k in list(section):
    del section[k]
  section.update(value)


def to_json(config: ml_collections.ConfigDict) -> str:
  """The config as JSON text, keys sorted."""
  return json.dumps(config.to_dict(), indent=2, sort_keys=True)


def _from_json(path):
  """The config that a run left behind, locked as that of configs/base.py."""
  try:
    values = json.loads(path.read_text())
    moe = values["model"]["moe"]
    for key, value in _YOUNGER.items():
      *sections, last = key.split(".")
      section = values
      for name in sections:
        section = section[name]
      section.setdefault(last, value)
    for key in ("tokens_per_group", "eval_capacity_factor"):
      # A word or a number, whichever it is in the file.
      moe[key] = ml_collections.FieldReference(moe[key], object)
    config = ml_collections.ConfigDict(_with_tuples(values)).lock()
    model, moe = config.model, config.model.moe
    sections = (config.data.mixture, model.attention, model.variants)
    sections += (moe.router, moe.dispatcher, moe.balancers)
    for section in sections:
      section.keys()  # A section, not a value.
  except FileNotFoundError:
    raise ConfigError(f'there is no config file "{path}"') from None
  except (ValueError, AttributeError, KeyError, TypeError) as e:
    raise ConfigError(
      f"{path} is not the config.json of a run ({e}); give one, or a Python"
      " file such as configs/base.py"
    ) from None
  for section in sections:
    section.unlock()
  return config


def _with_tuples(value):
  """JSON has lists where configs have tuples."""
  if isinstance(value, dict):
    return {k: _with_tuples(v) for k, v in value.items()}
  return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def flat(tree, prefix=""):
  """(dotted key, value) of all values.

  Args:
    tree: a config as nested dicts.
    prefix: of the keys.
  """
  for key, value in tree.items():
    if isinstance(value, dict) and value:
      yield from flat(value, f"{prefix}{key}.")
    else:
      yield prefix + key, value


def numbers(tree):
  """(dotted key, value) of all values that a run's numbers depend on.

  Args:
    tree: a config as nested dicts.
  """
  return ((k, v) for k, v in flat(tree) if not _same_numbers(k, v))


def _same_numbers(key, value):
  return (
    key.startswith(_SAME_NUMBERS)
    or _FOLDER_OF_A_PART.fullmatch(key)
    or (key in _YOUNGER and _YOUNGER[key] == value)
  )


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
  return parser


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
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
  return int(text)


def parse(parser: argparse.ArgumentParser, argv=None):
  """(arguments, loaded config) from a command line.

  Raises:
    ConfigError: an unknown flag or anything `load` refuses.
  """
  args, overrides = parse_overrides(parser, argv)
  return args, load(args.config, overrides)


def parse_overrides(parser: argparse.ArgumentParser, argv=None):
  """(arguments, texts KEY=VALUE of the flags --config.KEY=VALUE).

  Raises:
    ConfigError: an unknown flag.
  """
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


def run(main) -> None:
  """Calls main() and turns errors of ours into one sentence and exit codes.

  2: something is wrong, and says what to do. 75: a signal stopped it, and the
  same command goes on.
  """

  def interrupt(number, frame):
    raise KeyboardInterrupt

  before = signal.signal(signal.SIGTERM, interrupt)
  try:
    sys.exit(main())
  except KeyboardInterrupt:
    print("stopped by a signal; the same command goes on", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(75)  # Threads that compile would crash on a slower way out.
  except Interrupted as e:
    print(e, file=sys.stderr)
    sys.exit(75)
  except Exception as e:
    sentence = _sentence(e)
    text = f"error: {sentence}" if sentence else traceback.format_exc()
    # Imported by those who joined others, and slowly.
    processes = sys.modules.get("moe_jax.run.processes")
    if processes:
      processes.leave(text, 2 if sentence else 1)
    if sentence is None:
      raise
    print(text, file=sys.stderr)
    sys.exit(2)
  finally:
    signal.signal(signal.SIGTERM, before)


def _sentence(error):
  """What to tell the user; None for an error that nobody thought of."""
  if isinstance(error, ConfigError | RunError):
    return str(error)
  if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
    return (
      f"{error.filename or 'a file'} cannot be written ({error.strerror}); free"
      " space on that disk, older runs for instance, and give the same command"
      " again"
    )
  if _PEER.search(str(error)):
    return (
      f"another process of this run has ended ({first_line(error)}); see what it"
      " said"
    )
  return None


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
  except (ValueError, SyntaxError):
    return text  # A bare word.


def _unknown_key(section, parents, key, name):
  place = ".".join(["config", *parents])
  if not isinstance(section, ml_collections.ConfigDict):
    raise ConfigError(f"config.{key}: {place} is a value, not a section")
  remedy = did_you_mean(name, section.keys())
  if not section.is_locked:
    remedy = f"; set the whole section, {place}=" + "{...}"
  raise ConfigError(f'config.{key}: there is no "{name}" in {place}{remedy}')
