"""The corpus of a config: one dataset, or several with a share of the rows."""

import hashlib
import itertools
import pathlib
from collections.abc import Mapping

from moe_jax.core.errors import ConfigError
from moe_jax.core.options import (
  integer,
  items,
  labelled,
  number,
  section,
  text,
)
from moe_jax.data.text import corpora, tokenizers

_DATASET = {
  "name": str,
  "dir": str | None,
  "text_feature": str,
  "domain_feature": str,
  "skip_not_utf8": bool,
}
_DEFAULT = "python_sources"  # `data.name` of `configs/base.py`.
# Keys of a part that has pairs, whose defaults are those of the task.
_IDS = items(integer(0))
PAIR = {"source": text(), "target": text(), "prefix": str}
PAIR |= {"source_begin": _IDS, "target_begin": _IDS}
_PART = _DATASET | PAIR | {"weight": number(above=0)}
# Keys of `config.data`.
OPTIONS = _DATASET | {
  "mixture": labelled(section(_PART, ["name"])),
  "tokenizer": str,
  "cache_dir": str | None,
}


def of_config(
  config, fingerprint: str | None, prepared: bool, **how
) -> corpora.Corpus:
  """Returns the corpus of a config.

  Args:
    config: a whole config.
    fingerprint: see `prepare`.
    prepared: False: a corpus that knows its vocabulary and has no text.
    **how: more arguments of `prepare`.

  Raises:
    ConfigError: as in `prepare`.
  """
  data = config.data
  if prepared:
    how |= {"plugins": config.plugins, "fingerprint": fingerprint}
    return prepare(data, **how)
  tokenizer = tokenizers.load(data.tokenizer)
  return corpora.Corpus(_name(data), tokenizer.num_bytes_V)


def _name(part):
  """The name of a dataset; files that got no name have that of their place."""
  if part.get("dir") and part["name"] == _DEFAULT:
    return pathlib.PurePath(part["dir"]).name or _DEFAULT
  return part["name"]


def prepare(
  data: Mapping,
  *,
  plugins: tuple[str, ...] = (),
  fingerprint: str | None = None,
  pair: Mapping | None = None,
  whole: bool = True,
) -> corpora.Corpus:
  """Returns the corpus of the section `data` of a config.

  Args:
    data: see `configs/base.py`.
    plugins: folders with datasets of your own.
    fingerprint: the one that the corpus must have; None: any.
    pair: options of the task translation that define a pair, unless a part
      has its own: {"source", "target", "prefix", "source_begin",
      "target_begin"}.
    whole: as in `corpora.prepare`.

  Raises:
    ConfigError: as in `corpora.prepare`; or a part or weight is impossible.
  """
  shared = {k: data[k] for k in ("tokenizer", "cache_dir")}
  shared |= {"plugins": tuple(plugins), "whole": whole}

  def prepared(part, **options):
    options |= {k: part[k] for k in _DATASET if k in part and k != "dir"}
    options["name"] = _name(part)
    own = {k: part[k] for k in PAIR if k in part}
    if pair is not None:
      own = {**pair, **own}
      sides = own["source"], own["target"]
      begins = (own.get(f"{k}_begin", ()) for k in ("source", "target"))
      options |= {"text_feature": sides, "prefix": own["prefix"]}
      options["begins"] = tuple(map(tuple, begins))
    elif own:
      raise ConfigError(
        f"{', '.join(own)} of data.mixture is of the task translation, and this task"
        " has no pairs; leave it out"
      )
    return corpora.prepare(data_dir=part.get("dir"), **options, **shared)

  if not data["mixture"]:
    return prepared(data, fingerprint=fingerprint)
  parts = dict(sorted(data["mixture"].items()))
  weights = {label: part.get("weight", 1.0) for label, part in parts.items()}
  if fingerprint is not None:
    # A source may have changed since the run began: look for the parts it had.
    names = map(_name, parts.values())
    caches = (corpora.cached(name, shared["cache_dir"]) for name in names)
    for choice in itertools.product(*caches):
      corpus = join(dict(zip(parts, choice)), weights)
      if corpus.fingerprint == fingerprint:
        for part, own in zip(parts.values(), choice):  # Tells of changed files.
          prepared(part, fingerprint=own.fingerprint)
        return corpus
  made = {label: prepared(part) for label, part in parts.items()}
  return corpora.wanted(join(made, weights), fingerprint)


def join(
  parts: Mapping[str, corpora.Corpus], weights: Mapping[str, float]
) -> corpora.Corpus:
  """Returns several corpora as one.

  Args:
    parts: by label. A domain is called by the label of its part, and
      "label/domain" where the part has several.
    weights: by label; a part's share of the training rows is its weight over
      their sum. They are not in the fingerprint, but in the config.
  """

  def names(label):
    domains = parts[label].domains
    return [f"{label}/{d}" for d in domains] if domains[1:] else [label]

  def table(attribute):
    joined = {split: {} for split in corpora.SPLITS}
    for label, corpus in parts.items():
      for split, values in getattr(corpus, attribute).items():
        values = [values[domain] for domain in corpus.domains]
        joined[split] |= zip(names(label), values)
    return joined

  content = "".join(f"{k} {c.fingerprint}\n" for k, c in parts.items())
  return corpora.Corpus(
    name="+".join(parts),
    num_bytes_V=next(iter(parts.values())).num_bytes_V,
    fingerprint=hashlib.sha256(content.encode()).hexdigest(),
    parts=tuple((weights[label], tuple(names(label))) for label in parts),
    sources={label: dict(c.sources) for label, c in parts.items()},
    **{k: table(k) for k in ("arrays", "num_tokens", "num_documents")},
  )
