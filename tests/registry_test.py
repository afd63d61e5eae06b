"""Parts by name."""

import jax
import jax.numpy as jnp
import pytest

from configs import tiny
from moe_jax.core import options, registry
from moe_jax.core.errors import ConfigError
from moe_jax.moe.types import Balancer, Dispatcher, Router
from moe_jax.training import program

PART = '''"""A part for a test."""

from moe_jax.moe.types import Balancer


def build(top_k=1, color="red"):
  {0}
'''
RIGHT = "return Balancer(select=lambda *a: '{0}', update=lambda *a: color)"
KINDS = ("routers", "balancers", "dispatchers")
NEEDED = {"top_k": 2, "coefficient": 1.0, "rate": 1e-3, "vocab_size": 1000}
NEEDED |= {"feature": "position", "num_values": 2, "num_groups": 2, "tile": 8}
NEEDED |= {"experts": 2.0, "target": 0.5, "share": 0.25, "devices": 2}
# Values that no option of any part takes.
NEVER = (float("nan"), float("inf"), 1e39, 10**39, [], {}, object(), (None,))


def plugin(folder, name, body):
  path = folder / "balancers" / f"{name}.py"
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(PART.replace("{0}", body))
  return str(folder)


def right(folder, name, word):
  return plugin(folder, name, RIGHT.replace("{0}", word))


def says(name, folders, **options):
  """The (word, color) that a plugin's part returns."""
  part = registry.load("balancers", name, plugins=tuple(folders), **options)
  return part.select(), part.update()


def all_parts():
  for kind in KINDS:
    for name in registry.names(kind):
      build = registry.load(kind, name, **needed(kind, name)).spec.build
      yield kind, name, options.of(build)


def needed(kind, name):
  build = registry.Spec(kind, name, (), {}).build
  return {k: v for k, v in NEEDED.items() if k in options.of(build)}


def test_names_are_sorted():
  assert registry.names("routers") == [
    *("by_feature", "expert_choice", "expert_threshold", "forced", "hash"),
    *("hierarchical", "noisy_top_k", "random", "relu", "sinkhorn", "soft"),
    *("tile_rounded", "top_k", "top_p"),
  ]
  assert registry.names("models") == [
    "decoder",
    "diffusion",
    "encoder_decoder",
    "vision",
  ]
  for kind in ("balancers", "dispatchers"):
    names = registry.names(kind)
    assert names == sorted(names) and len(names) >= 3
  for kind in (
    *KINDS,
    "models",
    "attention",
    "datasets",
    "optimizers",
    "hooks",
  ):
    for name in registry.names(kind):
      assert callable(registry.Spec(kind, name, (), {}).build)


def test_what_is_built():
  assert isinstance(registry.load("routers", "top_k", top_k=2), Router)
  assert isinstance(registry.load("dispatchers", "einsum"), Dispatcher)
  z_loss = registry.load("balancers", "z_loss", coefficient=1e-3)
  assert isinstance(z_loss, Balancer)


def test_a_part_remembers_what_it_was_made_of():
  router = registry.load("routers", "top_k", top_k=2, score="sigmoid")
  assert router.spec[:3] == ("routers", "top_k", ())
  assert router.spec.options["score"] == "sigmoid"
  assert router.spec.options["renormalize"] is False  # A default of `build`.
  section = {"name": "top_k", "score": "sigmoid"}
  again = registry.from_config("routers", section, "model.router", top_k=2)
  assert again is router
  spec = registry.spec("routers", section, "model.router", top_k=2)
  assert dict(spec.options) == dict(router.spec.options)


def test_equal_options_are_the_same_object():
  one = registry.load("routers", "top_k", top_k=2, score="sigmoid")
  assert one is registry.load("routers", "top_k", score="sigmoid", top_k=2)
  assert one is not registry.load("routers", "top_k", top_k=2)
  plain = registry.load("routers", "top_k", top_k=2)
  assert plain is registry.load("routers", "top_k", top_k=2, renormalize=False)
  assert hash(one) == hash(one)


@pytest.mark.parametrize(
  "kind,name,options,message",
  [
    ("routers", "topk", {"top_k": 1}, 'no "topk" in routers.*mean "top_k"'),
    ("balancers", "swich", {}, 'no "swich" in balancers.*mean "switch"'),
    ("dispatchers", "nonsense", {}, "known: einsum, gather, sorted"),
    ("dispatchers", "../gather", {}, 'no "../gather" in dispatchers'),
    ("models", "norms", {}, 'no "norms" in models'),
    ("routers", "top_k", {"topk": 1}, 'top_k has no "topk".*mean "top_k"'),
    ("routers", "top_k", {}, 'routers/top_k needs "top_k", a whole number'),
    (
      "routers",
      "top_k",
      {"top_k": 1, "score": "softmaxx"},
      "routers/top_k.score = 'softmaxx' is not one of.*mean \"softmax\"",
    ),
    ("routers", "top_k", {"top_k": 0}, "top_k.top_k = 0 is not a whole number"),
    (
      "routers",
      "top_k",
      {"top_k": 1, "second_expert": "random"},
      "needs top_k = 2, not 1",
    ),
    ("routers", "top_k", {"top_k": 1, "renormalize": True}, "is always 1"),
    (
      "routers",
      "top_k",
      {"top_k": 1, "num_expert_groups": 2, "top_expert_groups": 3},
      "top_expert_groups = 3",
    ),
    ("dispatchers", "gather", {"order": "chioce"}, 'mean "choice"'),
    (
      "balancers",
      "switch",
      {"coefficient": 1.0, "scope": "sequenc"},
      'mean "sequence"',
    ),
    ("balancers", "bias", {"rate": 1.0, "rule": "x"}, '"sign", "proportional"'),
  ],
)
def test_errors_name_the_remedy(kind, name, options, message):
  with pytest.raises(ConfigError, match=message):
    registry.load(kind, name, **options)


def test_no_option_of_a_part_takes_what_no_part_takes():
  """None is one of them, unless the description is optional."""
  tried = 0
  for kind, name, table in all_parts():
    for option, description in table.items():
      values = NEVER if description.fits(None) else (*NEVER, None)
      for value in values:
        section = {"name": name, **needed(kind, name), option: value}
        with pytest.raises(ConfigError) as e:
          registry.from_config(kind, section, "model.here")
        assert f"model.here.{option}" in str(e.value)
        tried += 1
  assert tried > 200


def test_sections_of_parts():
  for section in (None, 3, {}, {"nme": "x"}):
    with pytest.raises(ConfigError, match="model.router = .* with the name"):
      registry.from_config("routers", section, "model.router")
  with pytest.raises(ConfigError, match="model.router.name = 3 is not a text"):
    registry.from_config("routers", {"name": 3}, "model.router")
  c = tiny.get_config()
  c.task = {"name": None}
  with pytest.raises(ConfigError, match="^task.name = None is not a text"):
    program.build_task(c)
  c.task = {"name": "next_token", "foo": 3}
  with pytest.raises(ConfigError, match='^task has no "foo"'):
    program.build_task(c)
  c.task = {"name": "next_token", "mesh": None}
  with pytest.raises(ConfigError, match='^task has no "mesh"'):
    program.build_task(c)
  twice = {"name": "top_k", "top_k": 2}
  with pytest.raises(ConfigError, match="top_k is set outside of model.router"):
    registry.from_config("routers", twice, "model.router", top_k=2)


def test_numbers_of_a_part_may_be_tracers():
  """Balancers are built again inside of a compiled step, unchecked."""
  switch = registry.load("balancers", "switch", coefficient=0.5)
  assert registry.number_options(switch) == {"coefficient": 0.5}
  router = registry.load("routers", "top_k", top_k=2)
  assert set(registry.number_options(router)) == {
    *("scale", "jitter", "noise", "init_scale"),
    *("output_masking", "second_threshold"),
  }
  bias = registry.load("balancers", "bias", rate=1e-3, freeze_after=3)
  assert registry.number_options(bias) == {
    **{"rate": 1e-3, "gain": 0.0, "damping": 0.0},
  }
  for name in registry.names("balancers"):
    part = registry.load("balancers", name, **needed("balancers", name))
    numbers = registry.number_options(part)
    assert numbers or name == "bip"  # It has none.

    def build(numbers, part=part):
      again = registry.rebuild(part, numbers)
      assert isinstance(again, Balancer) and again.spec == part.spec
      return again.init(4)

    jax.eval_shape(build, jax.tree.map(jnp.float32, numbers))
  # The new number is the one that counts.
  new = registry.rebuild(bias, {"rate": 0.25})
  stats = type("", (), {"count_E": jnp.array([[[3, 1]]])})
  moved = new.update({"bias_E": jnp.zeros(2)}, stats, 0)["bias_E"]
  assert moved.tolist() == [-0.25, 0.25]


def test_plugin_is_found_and_preferred(tmp_path):
  folder = right(tmp_path / "one", "mine", "mine")
  right(tmp_path / "one", "switch", "replaced")
  assert says("mine", [folder]) == ("mine", "red")
  assert says("switch", [folder], color="blue") == ("replaced", "blue")
  # Nothing changed for calls that do not name the folder.
  registry.load("balancers", "switch", coefficient=1.0)
  with pytest.raises(ConfigError, match='no "mine" in balancers'):
    registry.load("balancers", "mine")


def test_names_with_plugins(tmp_path):
  folder = right(tmp_path, "mine", "mine")
  known = registry.names("balancers")
  assert registry.names("balancers", (folder,)) == sorted([*known, "mine"])
  assert registry.names("routers", (folder,)) == registry.names("routers")
  with pytest.raises(ConfigError, match='mean "mine"'):
    registry.load("balancers", "mien", plugins=(folder,))
  with pytest.raises(ConfigError, match='no "colour".*mean "color"'):
    registry.load("balancers", "mine", plugins=(folder,), colour="blue")
  gone = str(tmp_path / "gone")
  with pytest.raises(ConfigError, match="gone is not there"):
    registry.load("balancers", "mine", plugins=(gone,))


def test_a_package_file_is_no_part(tmp_path):
  """A folder of plugins may be a package, with shared code in _NAME.py."""
  folder = right(tmp_path, "mine", "mine")
  (tmp_path / "balancers" / "__init__.py").write_text("")
  (tmp_path / "balancers" / "_shared.py").write_text("")
  known = registry.names("balancers")
  assert registry.names("balancers", (folder,)) == sorted([*known, "mine"])


def test_the_first_folder_wins(tmp_path):
  first = right(tmp_path / "first", "mine", "first")
  second = right(tmp_path / "second", "mine", "second")
  assert says("mine", [first, second])[0] == "first"
  assert says("mine", [second, first])[0] == "second"


@pytest.mark.parametrize(
  ("body", "words"),
  [
    ("return 3", ["broken.py", "returned 3", "Balancer"]),
    ("return Balancer(lost=None)", ["broken.py", "__init__", "'lost'"]),
    (
      "return Balancer(select=3)",
      ["broken.py", "Balancer.select is 3", "Callable"],
    ),
  ],
)
def test_a_part_that_breaks_its_contract_is_named(tmp_path, body, words):
  folder = plugin(tmp_path, "broken", body)
  with pytest.raises(ConfigError) as e:
    registry.load("balancers", "broken", plugins=(folder,))
  assert all(word in str(e.value) for word in words), str(e.value)


def test_a_file_without_build_is_named(tmp_path):
  path = tmp_path / "balancers" / "empty.py"
  path.parent.mkdir()
  path.write_text("")
  with pytest.raises(ConfigError, match=r"empty.py has no function build\("):
    registry.load("balancers", "empty", plugins=(str(tmp_path),))
