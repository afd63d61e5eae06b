"""Parts by name."""

import pytest

from moe_jax.core import registry
from moe_jax.core.errors import ConfigError
from moe_jax.moe.types import Balancer, Dispatcher, Router

PART = '''"""A part for a test."""


def build(top_k=1, color="red"):
  return ("{0}", top_k, color)
'''


def plugin(folder, kind, name, text):
  path = folder / kind / f"{name}.py"
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(PART.format(text))
  return str(folder)


def test_names_are_sorted():
  assert registry.names("routers") == ["random", "top_k"]
  for kind in ("balancers", "dispatchers"):
    names = registry.names(kind)
    assert names == sorted(names) and len(names) >= 3


def test_what_is_built():
  assert isinstance(registry.load("routers", "top_k", top_k=2), Router)
  assert isinstance(registry.load("dispatchers", "einsum"), Dispatcher)
  z_loss = registry.load("balancers", "z_loss", coefficient=1e-3)
  assert isinstance(z_loss, Balancer)


def test_equal_options_are_the_same_object():
  one = registry.load("routers", "top_k", top_k=2, score="sigmoid")
  assert one is registry.load("routers", "top_k", score="sigmoid", top_k=2)
  assert one is not registry.load("routers", "top_k", top_k=2)
  assert hash(one) == hash(one)


@pytest.mark.parametrize(
  "kind,name,options,message",
  [
    ("routers", "topk", {"top_k": 1}, 'no "topk" in routers.*mean "top_k"'),
    ("balancers", "swich", {}, 'no "swich" in balancers.*mean "switch"'),
    ("dispatchers", "nonsense", {}, "known: einsum, gather, sorted"),
    ("routers", "top_k", {"topk": 1}, 'no option "topk".*mean "top_k"'),
    ("routers", "top_k", {}, "needs the option.*top_k"),
    (
      "routers",
      "top_k",
      {"top_k": 1, "score": "softmaxx"},
      'no score "softmaxx".*mean "softmax"',
    ),
    ("routers", "top_k", {"top_k": 0}, "at least 1, not 0"),
    (
      "routers",
      "top_k",
      {"top_k": 1, "second_expert": "random"},
      "needs top_k = 2, not 1",
    ),
    (
      "routers",
      "top_k",
      {"top_k": 1, "num_expert_groups": 2, "top_expert_groups": 3},
      "top_expert_groups = 3",
    ),
    ("dispatchers", "gather", {"order": "chioce"}, "order.*chioce"),
    (
      "balancers",
      "switch",
      {"coefficient": 1.0, "scope": "sequenc"},
      'no scope "sequenc".*mean "sequence"',
    ),
    ("balancers", "bias", {"rate": 1.0, "rule": "x"}, 'rule is.*not "x"'),
  ],
)
def test_errors_name_the_remedy(kind, name, options, message):
  with pytest.raises(ConfigError, match=message):
    registry.load(kind, name, **options)


def test_plugin_is_found_and_preferred(tmp_path):
  folder = plugin(tmp_path / "one", "routers", "mine", "mine")
  plugin(tmp_path / "one", "routers", "top_k", "replaced")
  assert registry.load("routers", "mine", plugins=(folder,)) == (
    "mine",
    1,
    "red",
  )
  load = registry.load("routers", "top_k", plugins=(folder,), color="blue")
  assert load == ("replaced", 1, "blue")
  # Without the folder nothing changed.
  assert isinstance(registry.load("routers", "top_k", top_k=1), Router)
  with pytest.raises(ConfigError, match='no "mine" in routers'):
    registry.load("routers", "mine")


def test_names_with_plugins(tmp_path):
  folder = plugin(tmp_path, "routers", "mine", "mine")
  assert registry.names("routers", (folder,)) == ["mine", "random", "top_k"]
  assert registry.names("balancers", (folder,)) == registry.names("balancers")
  with pytest.raises(ConfigError, match='mean "mine"'):
    registry.load("routers", "mien", plugins=(folder,))
  with pytest.raises(ConfigError, match='no option "colour".*mean "color"'):
    registry.load("routers", "mine", plugins=(folder,), colour="blue")


def test_a_package_file_is_no_part(tmp_path):
  """A folder of plugins may be a package."""
  folder = plugin(tmp_path, "routers", "mine", "mine")
  (tmp_path / "routers" / "__init__.py").write_text("")
  assert registry.names("routers", (folder,)) == ["mine", "random", "top_k"]


def test_the_first_folder_wins(tmp_path):
  first = plugin(tmp_path / "first", "routers", "mine", "first")
  second = plugin(tmp_path / "second", "routers", "mine", "second")
  both = registry.load("routers", "mine", plugins=(first, second))
  assert both[0] == "first"
  other = registry.load("routers", "mine", plugins=(second, first))
  assert other[0] == "second"
