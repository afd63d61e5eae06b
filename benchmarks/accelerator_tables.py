"""The results of `benchmarks.on_accelerator` as markdown."""

from benchmarks import shapes, timing


def table(rows: list[dict]) -> str:
  """The results as markdown, a table for each part that ran."""
  parts = {"right": _right, "layer": _layers, "tiles": _tiles, "step": _steps}
  found = []
  for part, text in parts.items():
    own = [row for row in rows if row.get("stage", "layer") == part]
    found += [text(own)] if own else []
  left = [row for row in rows if row.get("stage") == "left out"]
  if left:
    words = "; ".join(f"{row['what']} ({row['why']})" for row in left)
    found.append(f"Left out: {words}.\n")
  return "\n".join(found)


def _right(rows):
  wrong = [row for row in rows if not row["passed"]]
  lines = [f"{len(rows) - len(wrong)} passed, {len(wrong)} failed.\n"]
  for row in wrong:
    lines.append(f"FAILED: {row['what']}: {row['distance']:.1e}\n")
  return "\n".join(lines)


def _layers(rows):
  lines = {"down": "implementation", "across": "shape"}
  ran = [row for row in rows if "forward_seconds" in row]
  return "\n".join(
    (
      timing.grid(rows, **lines, text=_ratios, title="f / f+b, ÷ dense"),
      timing.grid(ran, **lines, text=_rate, title="forward, TFLOP/s"),
    )
  )


def _ratios(row):
  return " / ".join(
    timing.cell(row, f"{d}_ratio") if f"{d}_ratio" in row else "did not run"
    for d in shapes.DIRECTIONS
  )


def _rate(row):
  return _short(row["forward_flops_per_second"] / 1e12)


def _tiles(rows):
  def shown(row):
    return row | {
      "of": f"{row['product']}, {row['rows']} rows,"
      f" {row['num_experts']} x {row['d']} x {row['f']}"
    }

  def rate(row):
    flops = 2 * row["rows"] * row["d"] * row["f"]
    return _short(flops / row["milliseconds"] / 1e9)

  rows = [shown(row) for row in rows]
  return timing.grid(
    rows, down="of", across="candidate", text=rate, title="product, TFLOP/s"
  )


def _steps(rows):
  lines = [
    "| step | tokens/s | speed ÷ dense | TFLOP/s | MFU | memory planned, GB |",
    "|---|---|---|---|---|---|",
  ]
  for row in rows:
    mfu = f"{row['mfu']:.2f}" if row["mfu"] else "–"
    lines.append(
      f"| {row['arm']} | {row['tokens_per_second']:.0f}"
      f" | {timing.cell(row, 'relative_speed')}"
      f" | {_short(row['flops_per_second'] / 1e12)} | {mfu}"
      f" | {_short(row['planned_bytes'] / 1e9)} |"
    )
  return "\n".join(lines) + "\n"


def _short(number: float) -> str:
  return f"{number:.0f}" if number >= 100 else f"{number:.2g}"
