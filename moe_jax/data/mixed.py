"""The corpus of a config: one dataset, or several with a share of the rows."""

import hashlib
import itertools
from collections.abc import Mapping

from moe_jax.core.errors import ConfigError
from moe_jax.core.options import labelled, number, section
from moe_jax.data import corpora

_DATASET = {
  "name": str,
  "dir": str | None,
  "text_feature": str,
  "domain_feature": str,
}
# Keys of `config.data`.
OPTIONS = _DATASET | {
  "mixture": labelled(
    section(_DATASET | {"weight": number(above=0)}, ["name"])
  ),
  "tokenizer": str,
  "cache_dir": str | None,
}


def prepare(
  data: Mapping,
  *,
  plugins: tuple[str, ...] = (),
  fingerprint: str | None = None,
) -> corpora.Corpus:
  """Returns the corpus of the section `data` of a config.

  Args:
    data: see `configs/base.py`.
    plugins: folders with datasets of your own.
    fingerprint: only this content will do; None: any.

  Raises:
    ConfigError: as `corpora.prepare`; an impossible part or weight.
  """
  shared = {k: data[k] for k in ("tokenizer", "cache_dir")}
  shared["plugins"] = tuple(plugins)
  if data["mixture"]:
    return _prepare_parts(dict(data["mixture"]), fingerprint, shared)
  return corpora.prepare(
    data["name"],
    data_dir=data["dir"],
    text_feature=data["text_feature"],
    domain_feature=data["domain_feature"],
    fingerprint=fingerprint,
    **shared,
  )


def _prepare_parts(mixture, fingerprint, shared):
  parts = {label: dict(mixture[label]) for label in sorted(mixture)}
  weights = {label: part.pop("weight", 1.0) for label, part in parts.items()}
  if fingerprint is not None:
    # The parts as the run knew them: a source may have changed since.
    caches = (
      list(corpora.cached(part["name"], shared["cache_dir"]))
      for part in parts.values()
    )
    for choice in itertools.product(*caches):
      corpus = join(dict(zip(parts, choice)), weights)
      if corpus.fingerprint == fingerprint:
        return corpus
  prepared = {
    label: corpora.prepare(data_dir=part.pop("dir", None), **part, **shared)
    for label, part in parts.items()
  }
  corpus = join(prepared, weights)
  if fingerprint not in (None, corpus.fingerprint):
    raise ConfigError(
      f"the mixture {corpus.name} has fingerprint {corpus.fingerprint}, but"
      f" {fingerprint} was asked for; bring the data of its parts back, or start"
      " a new run"
    )
  return corpus


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
  names = {
    label: {
      domain: f"{label}/{domain}" if len(corpus.domains) > 1 else label
      for domain in corpus.domains
    }
    for label, corpus in parts.items()
  }

  def table(attribute):
    return {
      split: {
        names[label][domain]: getattr(corpus, attribute)[split][domain]
        for label, corpus in parts.items()
        for domain in corpus.domains
      }
      for split in corpora.SPLITS
    }

  text = "".join(f"{k} {c.fingerprint}\n" for k, c in parts.items())
  return corpora.Corpus(
    name="+".join(parts),
    fingerprint=hashlib.sha256(text.encode()).hexdigest(),
    num_bytes_V=next(iter(parts.values())).num_bytes_V,
    parts=tuple((weights[k], tuple(names[k].values())) for k in parts),
    files=table("files"),
    num_tokens=table("num_tokens"),
    num_documents=table("num_documents"),
    sources={label: dict(c.sources) for label, c in parts.items()},
  )
