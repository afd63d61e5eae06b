"""The published models: the fields and tensors of theirs that are ours.

A file here has the families of one kind, each in a variable of its own.
"""

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, NamedTuple

from moe_jax.hf.tensors import Map


class Family(NamedTuple):
  """A model_type of config.json.

  model_type: its name.
  architecture: the reference's class of such models.
  rows: the meaning of its fields here, see `rows`; a row that sets "layers"
    gives the kind of every layer, else all are "moe". Keys of an encoder begin
    with "encoder.".
  tensors: maps of the tensors of a layer that have other names than those in
    `tensors.LAYER`.
  constants: {key of ours: value} that all its models have; "left_out" lists
    prefixes of tensors that belong to parts which are not here.
  ends: the reference's values of absent fields of special tokens.
  sections: fields that hold further fields, with names "SECTION.FIELD".
  inner: the field with the decoder's fields, in a config of a larger model.
  ignored: more fields that change nothing.
  prefix: the beginning of all tensors' names.
  layer: the beginning of a layer's tensors' names, after the prefix; "{stack}"
    is "encoder" or "decoder".
  outer: maps of the tensors beside the layers that have other names than those
    in `tensors.OUTER`.
  model: the kind of our model, a file of `models`.
  copies: {tensor: another with the same numbers}; files may lack the first ones
    where the output layer is the embedding.
  """

  model_type: str
  architecture: str
  rows: tuple[Any, ...]
  tensors: tuple[Map, ...] = ()
  constants: Mapping[str, Any] = {}
  ends: Mapping[str, int] = {}
  sections: tuple[str, ...] = ()
  inner: str = ""
  ignored: tuple[str, ...] = ()
  prefix: str = ""
  layer: str = "model.layers.{i}."
  outer: tuple[Map, ...] = ()
  model: str = "decoder"
  copies: Mapping[str, str] = {}


@functools.cache
def known() -> dict[str, Family]:
  """Returns all families, by model_type."""
  all_families = []
  for module in pkgutil.iter_modules(__path__):
    values = vars(importlib.import_module(f"{__name__}.{module.name}")).values()
    all_families += [value for value in values if isinstance(value, Family)]
  return {family.model_type: family for family in all_families}


def as_named(family: Family, names) -> Family:
  """Returns the family with the names of tensors that files have.

  Files of a model without its output layer lack the prefix.

  Args:
    family: from `known`.
    names: of the tensors in the files.
  """
  if any(name.startswith(family.prefix) for name in names):
    return family
  bare = len(family.prefix)
  copies = {k[bare:]: name[bare:] for k, name in family.copies.items()}
  return family._replace(prefix="", copies=copies)
