"""The data of a config: one dataset, or several with a share of the rows each."""

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping

import numpy as np

from moe_jax.core.errors import ConfigError, did_you_mean
from moe_jax.data import tokens

_OF_A_PART = ("name", "dir", "text_feature", "domain_feature", "weight")


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Prepared datasets under one roof; to its readers it is a `tokens.Corpus`.

  A domain is called by the label of its part, and by "label/domain" where the
  part has several.

  Attributes:
    corpora: by label.
    weights: by label; a part's share of the training rows is its weight over
      their sum.
  """

  corpora: Mapping[str, tokens.Corpus]
  weights: Mapping[str, float]

  @property
  def name(self) -> str:
    return "+".join(self.corpora)

  @property
  def fingerprint(self) -> str:
    """Of the tokens of all parts; weights are in the config."""
    text = "".join(f"{k} {c.fingerprint}\n" for k, c in self.corpora.items())
    return hashlib.sha256(text.encode()).hexdigest()

  @property
  def sources(self) -> dict:
    return {label: dict(c.sources) for label, c in self.corpora.items()}

  @property
  def num_bytes_V(self) -> tuple[int, ...]:
    return next(iter(self.corpora.values())).num_bytes_V

  @property
  def vocab_size(self) -> int:
    return len(self.num_bytes_V)

  @property
  def end_of_document(self) -> int:
    return self.vocab_size - 1

  @property
  def parts(self) -> tuple[tuple[float, tuple[str, ...]], ...]:
    """(weight, domains) of each part."""
    return tuple(
      (self.weights[label], tuple(self._named(label))) for label in self.corpora
    )

  @property
  def domains(self) -> tuple[str, ...]:
    return tuple(name for label in self.corpora for name in self._named(label))

  @property
  def num_tokens(self) -> dict[str, dict[str, int]]:
    return self._by_split("num_tokens")

  @property
  def num_documents(self) -> dict[str, dict[str, int]]:
    return self._by_split("num_documents")

  def tokens(self, split: str, domain: str) -> np.ndarray:
    """As `tokens.Corpus.tokens`."""
    for label, corpus in self.corpora.items():
      named = self._named(label)
      if domain in named:
        return corpus.tokens(split, named[domain])
    raise ConfigError(
      f'the mixture has no domain "{domain}"'
      + did_you_mean(domain, self.domains)
    )

  def _named(self, label):
    """{name here: name in the part} of a part's domains."""
    domains = self.corpora[label].domains
    if len(domains) == 1:
      return {label: domains[0]}
    return {f"{label}/{domain}": domain for domain in domains}

  def _by_split(self, what):
    return {
      split: {
        name: getattr(self.corpora[label], what)[split][domain]
        for label in self.corpora
        for name, domain in self._named(label).items()
      }
      for split in tokens.SPLITS
    }


def prepare(
  data: Mapping,
  *,
  plugins: tuple[str, ...] = (),
  fingerprint: str | None = None,
) -> tokens.Corpus | Mixture:
  """Prepares the section `data` of a config.

  Args:
    data: see `configs/base.py`.
    plugins: folders with datasets of your own.
    fingerprint: only this content will do; None: any.

  Raises:
    ConfigError: as `tokens.prepare`; an impossible part or weight.
  """
  shared = {k: data[k] for k in ("tokenizer", "cache_dir")}
  shared["plugins"] = tuple(plugins)
  if not data["mixture"]:
    return tokens.prepare(
      data["name"],
      data_dir=data["dir"],
      text_feature=data["text_feature"],
      domain_feature=data["domain_feature"],
      fingerprint=fingerprint,
      **shared,
    )
  parts = {
    label: _part(label, part)
    for label, part in sorted(dict(data["mixture"]).items())
  }
  weights = {label: part.pop("weight") for label, part in parts.items()}
  names = {label: part.pop("name") for label, part in parts.items()}
  if fingerprint is not None:
    # As a run knew them; a part's own source may have changed since.
    found = [tokens.cached(name, data["cache_dir"]) for name in names.values()]
    for corpora in itertools.product(*found):
      mixture = Mixture(dict(zip(names, corpora)), weights)
      if mixture.fingerprint == fingerprint:
        return mixture
  corpora = {
    label: tokens.prepare(
      names[label], data_dir=part.pop("dir", None), **part, **shared
    )
    for label, part in parts.items()
  }
  mixture = Mixture(corpora, weights)
  if fingerprint not in (None, mixture.fingerprint):
    raise ConfigError(
      f"the mixture {mixture.name} has fingerprint {mixture.fingerprint}, but"
      f" {fingerprint} was asked for; bring the data of its parts back, or start"
      " a new run"
    )
  return mixture


def _part(label, part):
  place = f"data.mixture.{label}"
  if not isinstance(part, Mapping) and not hasattr(part, "items"):
    raise ConfigError(
      f'{place} = {part!r} is no dict such as {{"name": "python_sources",'
      ' "weight": 1.0}'
    )
  part = dict(part.items())
  for key in part:
    if key not in _OF_A_PART:
      raise ConfigError(
        f'{place} has no "{key}"' + did_you_mean(key, _OF_A_PART)
      )
  weight = part.setdefault("weight", 1.0)
  if not isinstance(weight, int | float) or not 0 < weight < float("inf"):
    raise ConfigError(f"{place}.weight = {weight!r} is not a number above 0")
  if "name" not in part:
    raise ConfigError(f"{place} needs the name of a dataset")
  return part
