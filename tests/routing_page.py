"""Writes the tables of docs/routing.md from the files of the parts.

  python -m tests.routing_page

The text around the tables is written by hand; a table stands between the comments
`<!-- table: NAME -->` and `<!-- end -->`.
"""

import re

import jax

from moe_jax.core import registry
from moe_jax.core.errors import ConfigError
from moe_jax.moe import balancers as balancers_
from moe_jax.moe import types
from tests.house import ROOT

PAGE = ROOT / "docs" / "routing.md"
# What a part needs beside its name, in the tables.
EXAMPLES = {
  "top_k": 2,
  "coefficient": 1e-2,
  "rate": 1e-3,
  "vocab_size": 50_000,
  "feature": "token_id",
  "num_values": 2,
  "num_groups": 8,
  "tile": 128,
  "experts": 2.0,
  "target": 0.3,
  "share": 0.125,
  "devices": 8,
}
# What makes the values of a feature, and is no need of the part alone.
MORE = {"by_feature": {"boundaries": (128,)}}
GIVEN = {"routers": {"top_k"}}  # Options that other keys of `model.moe` set.
FORMS = {
  "TokenChoice": "tokens name experts",
  "SlotChoice": "experts name tokens",
  "Mixture": "slots are means of tokens",
}
DROPS = {
  "TokenChoice": "beyond capacity",
  "SlotChoice": "tokens that no expert takes",
  "Mixture": "nothing",
}
SIZES = {"D": 64, "E": 16, "M": 8}
_PAPER = re.compile(r"\b\d{4}\.\d{5}\b")


def build(kind, name):
  """(part, the options that it cannot do without, its module)."""
  module = registry.find(kind, name)
  made, needed = None, dict(MORE.get(name, {}))
  while made is None:
    try:
      made = registry.load(kind, name, **needed)
    except ConfigError as e:
      missing = re.search(r'needs "(\w+)"', str(e))
      if not missing or missing[1] in needed:
        raise
      needed[missing[1]] = EXAMPLES[missing[1]]
  return made, needed, module


def about(module):
  """(the first sentence of a docstring without papers, its papers, its rule)."""
  head, _, rest = module.__doc__.partition("\n")
  papers = dict.fromkeys(_PAPER.findall(module.__doc__))
  links = ", ".join(f"[{p}](https://arxiv.org/abs/{p})" for p in papers)
  head = re.sub(r" \([^()]*\d{4}\.\d{5}[^()]*\)", "", head).rstrip(".")
  # The first rule, and what an option makes of it.
  blocks, rule = re.findall(r"(?:^  +\S.*\n?)+", rest, re.M), ""
  blocks[1:] = [b for b in blocks[1:] if re.match(r' +\w+ = "', b)]
  for line in "".join(blocks).splitlines():
    line = re.sub(r"  +\(.*", "", line.strip())  # The numbers of equations.
    line = re.sub(r'^(\w+ = "\w+")  +', r"\1: ", line)  # Under an option.
    begins = re.match(r"[^=;]{1,25}(\+?=|<-)", line)  # Another line goes on.
    rule = rule.rstrip(";.") + (";  " if begins and rule else " ")
    rule += re.sub("  +", " ", line)
  rule = rule.strip().replace("`", "'")
  return head, links, f"`{rule}`" if rule else ""


def section(kind, name, needed):
  """The words by which a config names a part."""
  options = {k: v for k, v in needed.items() if k not in GIVEN.get(kind, ())}
  return f"`{ {'name': name} | options }`"


def cost(router):
  """Multiplications for a token, in the router's matrices."""
  params = jax.eval_shape(
    lambda: router.init(jax.random.key(0), SIZES["D"], SIZES["E"])
  )
  matrices = [x for x in params.values() if x.ndim > 1]
  if not matrices:
    return "0"
  names = {"16": "E", "8": "groups"}
  widths = (str(x.size // SIZES["D"]) for x in matrices)
  wide = [names.get(w, "E K" if w == "32" else w) for w in widths]
  return "D " + (f"({' + '.join(wide)})" if len(wide) > 1 else wide[0])


def routers():
  """The table of all routers."""
  rows = [
    (
      *(
        "router",
        "what it does",
        "rule",
        "form",
        "causal",
        "experts of a token",
        "drops",
      ),
      *("multiplications", "balancers that shift scores", "paper", "config"),
    )
  ]
  for name in registry.names("routers"):
    router, needed, module = build("routers", name)
    head, papers, rule = about(module)
    top_k = needed.get("top_k", 1)
    most = router.top_k and f"{router.top_k // top_k} K".removeprefix("1 ")
    count = "K" if router.fixed else f"up to {most or 'E'}"
    if not router.fixed and router.top_k is None:
      mixes = router.form is types.Mixture
      count = "all, through K slots of each" if mixes else "K on average"
    rows.append(
      (
        *(f"`{name}`", head, rule, FORMS[router.form.__name__]),
        "yes" if router.causal else "**no**",
        *(count, DROPS[router.form.__name__], cost(router)),
        "yes" if "selection" in router.gives else "no",
        *(papers or "–", section("routers", name, needed)),
      )
    )
  return rows


def balancers():
  """The table of all balancers."""
  rows = [
    (
      *("balancer", "what it does", "rule", "acts by", "state of a layer"),
      *("causal", "needs", "paper", "config"),
    )
  ]
  for name in registry.names("balancers"):
    balancer, needed, module = build("balancers", name)
    head, papers, rule = about(module)
    acts = [
      words
      for words, field in (
        ("a loss", balancer.loss),
        ("scores that choose", balancer.select),
      )
      if field is not None
    ]
    state = jax.eval_shape(lambda b=balancer: b.init(SIZES["E"]))
    sizes = [
      f"`{k}` [{', '.join('E' if n == SIZES['E'] else str(n) for n in x.shape)}]"
      for k, x in state.items()
    ]
    needs = balancer.needs | ({"selection"} if balancer.select else set())
    rows.append(
      (
        *(f"`{name}`", head, rule, " and ".join(acts)),
        ", ".join(sizes) or "none",
        "yes" if balancer.causal else "**no**",
        ", ".join(f"`{k}`" for k in sorted(needs)) or "–",
        *(papers or "–", section("balancers", name, needed)),
      )
    )
  return rows


def misfits():
  """The pairs of a router and a balancer that are refused, with the reason."""
  rows = [("router", "balancers that it is refused with, and what they need")]
  for name in registry.names("routers"):
    router = build("routers", name)[0]
    reasons = {}
    for other in registry.names("balancers"):
      balancer = build("balancers", other)[0]
      facts = balancers_.missing(router, balancer)
      reason = types.FACTS[facts[0]] if facts else None
      if reason is None and balancer.select and router.needs - balancer.gives:
        reason = (
          "scores that no other balancer shifts, as `threshold` does here"
        )
      if reason:
        reasons.setdefault(reason, []).append(f"`{other}`")
    if reasons:
      words = "; ".join(
        f"{', '.join(them)}: {reason}"
        for reason, them in sorted(reasons.items())
      )
      rows.append((f"`{name}`", words))
  return rows


TABLES = {"routers": routers, "balancers": balancers, "misfits": misfits}


def render(rows):
  """Rows as markdown; a bar inside of a cell is escaped."""
  lines = [
    "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
    for row in rows
  ]
  return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def rewritten(text: str) -> str:
  """The page with its tables made again."""
  for name, make in TABLES.items():
    between = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.S)
    table = render(make())
    text, count = between.subn(lambda m: f"{m[1]}\n{table}\n\n{m[2]}", text)  # noqa: B023
    assert count == 1, f"{PAGE} has no place for the table {name}"
  return text


if __name__ == "__main__":
  PAGE.write_text(rewritten(PAGE.read_text()))
