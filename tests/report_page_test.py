"""The page of a run: right values, whole HTML, nothing from elsewhere."""

import fcntl
import html.parser
import json
import math
import pathlib
import re
import webbrowser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from experiments import page as experiment_page
from experiments import report as experiment_report
from moe_jax import report
from moe_jax.core.errors import ConfigError
from moe_jax.run.pages import (
  curves,
  describe,
  heat,
  page,
  plots,
  read,
  words,
)
from moe_jax.run.pages.plots import Plot, Trace
from moe_jax.run.pages.read import Record
from tests import small

STEPS = 30
EVIL = '"><script>alert(1)</script><img src=x onerror=alert(1)>$x_$'
FACTS = {
  "parameters": {"total": 12_345_678, "active": 4321},
  "devices": ["cpu", "cpu"],
  "mesh": {"data": 2, "expert": 1},
  "versions": {"moe_jax": "0.1.0", "jax": "0.10.2"},
  "python": "3.11.7",
  "git": "0123456789abcdef" * 2 + "01234567+",
  "started": "2026-11-30T10:29:18+0000",
  "tokens_per_step": 512,
  "recipe": {
    "0, 1": {
      "num_experts": 4,
      "router": {"name": "top_k", "top_k": 2},
      "balancers": {"a": {"name": "bias"}, "b": {"name": "z_loss"}},
      "capacity_factor": 1.0,
    }
  },
}


def lines(scale=1.0):
  """Lines of metrics, as a run of two layers with four experts writes them."""
  for step in range(10, STEPS + 1, 10):
    numbers = {"loss": scale * 50 / step, "max_vio": 1 / step}
    numbers |= {"max_vio/00": 0.5 / step, "max_vio/01": 1.5 / step}
    numbers |= {"max_vio_floor": 0.01, "dropped": 0.0, "grad_norm": step / 7}
    numbers |= {"dropped/capacity": 0.0, "dropped/buffer": 0.0}
    numbers |= {"tokens_per_second": 12_345.0, "extra/mine": step**2}
    yield {"step": step, "split": "train"} | numbers
    loads = {"00": [step, 0, 3 * step, 0], "01": [1, 1, 1, 1]}
    yield {"step": step, "split": "loads"} | loads
    yield {"step": step, "split": "validation", "loss": scale * 60 / step}


def few():
  """Lines that are one figure, which is quick to draw."""
  return [
    {k: line[k] for k in ("step", "split", "loss")}
    for line in lines()
    if "loss" in line
  ]


def write(path, some=None, facts=FACTS, **changes):
  """A folder with the files of a run."""
  path.mkdir(parents=True)
  config = small.config().to_dict()
  config["train"]["num_steps"] = STEPS
  config |= changes
  (path / "config.json").write_text(json.dumps(config))
  (path / "run.json").write_text(json.dumps(facts))
  some = list(lines()) if some is None else some
  text = "".join(json.dumps(line) + "\n" for line in some)
  (path / "metrics.jsonl").write_text(text)
  return path


def drawn(*paths):
  named = zip(paths, read.labels(paths))
  return page.make([read.run(*each) for each in named])


class Seen(html.parser.HTMLParser):
  """The elements, the attributes and the text of a page that is whole."""

  EMPTY = {"meta", "link", "img", "br", "wbr", "hr"}

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.attributes, self.texts = [], [], [], []
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attributes):
    self.tags.append(tag)
    self.attributes += attributes
    if tag not in self.EMPTY:
      self.open.append(tag)

  def handle_startendtag(self, tag, attributes):
    self.tags.append(tag)
    self.attributes += attributes

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.texts.append(data.strip())

  @property
  def text(self):
    return " ".join(self.texts)


def test_the_page_of_a_run(tmp_path):
  """It says what the run is, shows its curves, and asks for nothing."""
  path = write(tmp_path / "mine")
  text = drawn(path)
  assert text == drawn(path)  # Equal runs are equal pages.
  seen = Seen(text)
  for words_of_it in (
    "finished , step 30 of 30",
    "12.35 million, of which 4,321 active",
    "2 × cpu; mesh data 2",
    "moe_jax 0.1.0, jax 0.10.2, Python 3.11.7",
    "git 0123456789ab+",
    "2026-11-30 10:29:18+0000",
    "next_token on small",
    "top_k 2 of 4 experts, capacity factor 1.0, balanced by bias and z_loss",
    "12,345 tokens per second",
    "training, floor 0.01",
    "nats per token",
  ):
    assert words_of_it in seen.text, words_of_it
  titles = re.findall("<figure><h3>(.*?)</h3>", text)
  mine = "mine (reported by a part)"
  expected = ["Loss", "MaxVio", "MaxVio of each layer", "Layer 00", "Layer 01"]
  assert titles == [*expected, "Norm of the gradient", mine]
  assert "dropped (0), tokens_per_second (12,345)" in text
  policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
  assert ("content", policy) in seen.attributes and "script" not in seen.tags
  sources = [
    v for k, v in seen.attributes if k in ("src", "href", "xlink:href")
  ]
  assert sources and all(v.startswith(("data:", "#")) for v in sources)
  assert "refresh" not in text and len(text) < 300_000
  targets = {v[1:] for v in sources if v.startswith("#word-")}
  ids = [v for k, v in seen.attributes if k == "id"]
  assert targets and targets <= {*ids}
  assert len(ids) == len({*ids})


def test_no_file_can_write_html(tmp_path):
  """Neither names nor values of metrics, configs, facts, layers and folders."""
  some = [{**line, EVIL: line["step"]} for line in lines()]
  for line in some:
    if line["split"] == "loads":
      line[f"a{EVIL}"] = line.pop(EVIL, None) and [1, 2]
    else:
      line[f"max_vio/{EVIL}"] = line["step"] / 7
  facts = FACTS | {"git": EVIL, "started": EVIL, "python": EVIL}
  facts |= {"devices": [EVIL], "mesh": {EVIL: 3}, "versions": {"jax": EVIL}}
  task = {"name": EVIL}
  folder = write(tmp_path / "<b>&x\udcff", some, facts, task=task, seed=EVIL)
  pictures = folder / "pictures" / "<i>"
  pictures.mkdir(parents=True)
  Image.new("RGB", (4, 4)).save(pictures / "00000010.png")
  for paths in ([folder], [folder, write(tmp_path / "b", few(), task=task)]):
    text = drawn(*paths)
    text.encode()
    seen = Seen(text)
    assert not {"script", "b", "i"} & {*seen.tags}
    assert not [k for k, _ in seen.attributes if k.startswith("on")]
    assert EVIL in seen.text


def test_cards_are_of_the_last_evaluation_where_it_has_the_metric(tmp_path):
  """Training comes before there is any, and for what is in training alone."""
  train = {"step": 20, "split": "train", "loss": 3, "max_vio": 0.2}
  train |= {"max_vio_floor": 0.05, "grad_norm": 7}
  late = {"step": 20, "split": "validation", "loss": 4, "max_vio": 0.5}
  run = read.run(write(tmp_path / "a", [train, late]), "a")
  shown = {k: Seen(v).text for k, v in describe.latest(run).items()}
  assert shown == {
    "Loss": "4 validation",
    "MaxVio": "0.5 validation",
  }
  run = read.run(write(tmp_path / "b", [train]), "b")
  shown = {k: Seen(v).text for k, v in describe.latest(run).items()}
  assert shown["Loss"] == "3 training"
  assert shown["MaxVio"] == "0.2 training, floor 0.05"


def test_times_have_the_same_form(tmp_path):
  facts = describe.facts(read.run(write(tmp_path / "a"), "a"))
  for name in ("Started", "Last line written"):
    form = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d{4}"
    assert re.fullmatch(form, facts[name]), name


def test_lines_of_equal_runs_are_all_seen(tmp_path):
  """Each is thinner than the ones below it, and has gaps of another form."""
  assert len({plots.look(i) for i in range(32)}) == 32
  train = [{"step": s, "loss": s} for s in (1, 2, 3)]
  made = plots.make([Record(name, train, []) for name in "abc"])
  ((_, (plot, *_)), *_) = made.groups
  widths = [t.width for t in plot.traces]
  assert widths == sorted(widths, reverse=True) and len({*widths}) == 3
  assert [t.style for t in plot.traces] == ["line", "dashes", "points"]
  svg = curves.svg(plot)
  drawn = re.findall(r"stroke: var\(--c(\d)\)[^\"]*", svg)
  assert drawn == ["0", "1", "2"]  # The whole line is below the others.


def test_the_label_of_a_map_is_not_cut_off():
  """It is shorter than the height of its bar, where letters are widest."""
  shown = heat.Map("0", np.array([1, 2]), np.ones((1, 2)))
  root = ElementTree.fromstring(heat.svg(shown, 2.0, "a"))
  texts = [e for e in root.iter("{http://www.w3.org/2000/svg}text")]
  (label,) = (e for e in texts if e.text and e.text.startswith("load"))
  size = float(re.search(r"([\d.]+)px", label.get("style"))[1])
  height = float(root.get("viewBox").split()[3])
  assert 0.75 * size * len(label.text) < height


def test_a_figure_has_its_numbers():
  """Ticks are whole numbers of the axis, and the line has the right shape."""
  y = [0.021, 0.029, 0.025]
  trace = Trace("", [0, 10, 20], y, "c0", "line")
  made = curves.svg(Plot("a", "", "step", "what it is", [trace]))
  root = ElementTree.fromstring(made)
  texts = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
  for label in ("0.022", "0.024", "0.026", "0.028", "what it is", "step"):
    assert texts.count(label) == 1, texts
  paths = [e.attrib for e in root.iter("{http://www.w3.org/2000/svg}path")]
  (line,) = (p["d"] for p in paths if "var(--c0)" in p.get("style", ""))
  corners = np.array(re.findall(r"(-?[\d.]+) (-?[\d.]+)", line), float)
  assert len(corners) == 3
  np.testing.assert_allclose(
    np.diff(corners[:, 0])[0], np.diff(corners[:, 0])[1]
  )
  rise = np.diff(corners[:, 1])
  np.testing.assert_allclose(rise[1] / rise[0], -0.5, atol=0.01)
  assert "#0" not in made  # All colours are of the page's style.


def test_the_scale_and_the_points_of_a_figure():
  """A logarithmic axis says so, and two points are not connected."""

  def shown(y, style="line", log=False):
    trace = Trace("", range(len(y)), y, "c0", style)
    svg = curves.svg(Plot("a", "", "step", "unit", [trace], log))
    found = ElementTree.fromstring(svg).iter()
    found = [(e.tag.rpartition("}")[2], e) for e in found]
    texts = {e.text for tag, e in found if tag == "text"}
    drawn = [
      (tag, e) for tag, e in found if "stroke: var(--c0)" in e.get("style", "")
    ]
    lines = sum(tag == "path" and bool(e.get("clip-path")) for tag, e in drawn)
    return texts, lines, sum(tag == "use" for tag, e in drawn)

  texts, *drawn = shown([1, 2, 30], log=True)
  assert "unit (log)" in texts and drawn == [1, 0]
  texts, *drawn = shown([1, 2])
  assert "unit" in texts and drawn == [0, 2]
  assert shown([1, 2], "floor")[1:] == (1, 0)
  assert "unit" in shown([1, 2, 3], log=True)[0]  # It spans too little.


def test_long_lines_keep_their_extremes():
  """A part is averaged, and its lowest and highest value are kept."""
  y = np.sin(np.arange(1001) / 50)
  y[500], y[700] = 40.0, np.nan
  x, mean, low, high = curves._thin(range(1001), y)
  assert len(x) <= curves.MOST and high.max() == 40.0
  np.testing.assert_allclose([x[-1], mean[-1]], [999.0, y[998:].mean()])
  assert (low <= mean).all() and (mean <= high).all()
  short = curves._thin([1, 2], [3.0, 4.0])
  assert all(np.array_equal(v, [3.0, 4.0]) for v in short[1:])


def test_maps_are_relative_to_the_mean_of_a_step():
  loads = {"01": ([10, 20], [[1, 3], [0, 0]]), "00": ([10], [[2, 2]])}
  first, second = heat.maps(loads)
  assert (first.layer, second.layer) == ("00", "01")
  np.testing.assert_array_equal(first.load_ES, [[1.0], [1.0]])
  np.testing.assert_array_equal(second.load_ES, [[0.5, np.nan], [1.5, np.nan]])
  np.testing.assert_array_equal(
    heat._edges(np.array([10, 20, 60])), [5, 15, 40, 80]
  )
  assert heat.largest([first]) == 2.0
  assert heat.largest(heat.maps({"0": ([1], [[0, 0, 0, 0, 9]])})) == 4.0
  many = heat.maps({f"{i:02d}": ([1], [[1, 2]]) for i in range(61)})
  assert [many[0].layer, many[-1].layer, len(many)] == ["00", "60", 12]
  wide = heat.maps({"0": (list(range(900)), [[1.0] * 64] * 900)})[0]
  assert wide.steps[[0, -1]].tolist() == [0, 899] and len(wide.steps) == 160


def test_a_metric_without_a_number_is_named(tmp_path):
  nan = [{"step": i, "split": "train", "loss": math.nan} for i in (1, 2)]
  assert "as they never change: loss (nan)" in drawn(write(tmp_path / "a", nan))
  one = {"step": 2, "split": "validation", "loss": 3, "max_vio_global": 0.5}
  shown = drawn(write(tmp_path / "b", [one]))
  assert "(nan)" not in shown and "max_vio_global" in shown  # In the table.


def test_states(tmp_path):
  path = write(tmp_path / "a", list(lines())[:4])
  assert read.run(path, "a").state == "stopped"
  with (path / ".lock").open("a") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    run = read.run(path, "a")
    assert (run.state, run.step, run.num_steps) == ("running", 20, STEPS)
    # 10 steps of 512 tokens at 12,345 a second.
    assert "running</span>, step 20 of 30, about 0 min left" in drawn(path)
  assert read.run(write(tmp_path / "b"), "b").state == "finished"
  new = write(tmp_path / "c", [])
  (new / "run.json").unlink()
  run = read.run(new, "c")
  assert run.state == "not begun" and not run.problems
  assert "There are no metrics yet." in drawn(new)


def test_runs_are_laid_over_each_other(tmp_path):
  """Their differences, last evaluations and curves, each in its colour."""
  one = write(tmp_path / "one" / "0")
  two = write(
    tmp_path / "two" / "0", list(lines(2.0)), FACTS | {"git": "f"}, seed=7
  )
  text = drawn(one, two)
  rows = re.sub("\n|<wbr>", "", text)
  rows = re.findall("<tr>(.*?)</tr>", rows)
  rows = [re.sub("<[^>]*>", " ", row).split() for row in rows]
  assert ["seed", "0", "7"] in rows
  assert ["run.json:", "git", "0123456789ab+", "f"] in rows
  assert ["loss", "2", "4"] in rows
  differing = rows.index(["key", "one/0", "two/0"])
  assert rows[differing + 3] == [
    *("metric", "one/0", "step", "30", "two/0", "step", "30"),
  ]
  titles = re.findall("<figure><h3>(.*?)</h3>", text)
  assert titles[:3] == ["Loss, training", "Loss, validation", "MaxVio"]
  svg = text.split("<figure><h3>Loss, training</h3>")[1].split("</figure>")[0]
  lines_of = re.findall(r'd="(M[^"]*)"[^>]*var\(--(c\d)\)', svg, re.S)
  assert [color for _, color in lines_of] == ["c0", "c1"]
  Seen(text)


def test_differences_of_one_config_are_none(tmp_path):
  text = drawn(*(write(tmp_path / n, few()) for n in "ab"))
  assert "Their configs are equal." in text


def test_an_option_that_is_not_given_has_its_default(tmp_path):
  """It is not known for other parts, nor where the code is of a plugin."""
  model = small.config().to_dict()["model"]

  def differing(plugins=(), **more):
    runs = []
    for router in ({"name": "top_k"}, {"name": "top_k"} | more):
      changes = {"model": model | {"moe": model["moe"] | {"router": router}}}
      path = tmp_path / str(len([*tmp_path.iterdir()]))
      path = write(path, [], **changes, plugins=plugins)
      runs.append(read.run(path, "a"))
    return describe.differing(runs)

  key = "model.moe.router.score"
  assert differing(score="sigmoid") == [[key, "softmax", "sigmoid"]]
  assert differing(score="softmax") == []
  assert differing(["x"], score="sigmoid") == [[key, "–", "sigmoid"]]
  assert differing(odd=1) == [["model.moe.router.odd", "–", "1"]]


def test_the_differences_from_the_defaults(tmp_path):
  text = re.sub("<wbr>", "", drawn(write(tmp_path / "a", [])))
  row = "<tr><td>data.seq_len</td>\n<td>16</td>\n<td>256</td></tr>"
  assert row in text and "<td>data.tokenizer</td>" not in text


def test_metrics_are_in_the_right_place():
  """Floors and moving averages with their metric; what is not known at the end."""
  train = [
    {"step": s, "max_vio": s, "max_vio_floor": 0.5, "odd": s} for s in (1, 2)
  ]
  late = [{"step": s, "accuracy": s, "ema/accuracy": s + 1} for s in (1, 2)]
  late += [{"step": 3, "accuracy": 0, "accuracy/a": 1, "accuracy/b": 2}]
  made = plots.make([Record("a", train, late)])
  found = {p.title: p for _, some in made.groups for p in some}
  assert [*found] == ["Accuracy", "MaxVio", "odd"]
  labels = [t.label for t in found["Accuracy"].traces]
  assert labels == ["validation", "validation, moving average"]
  assert found["MaxVio"].traces[1] == Trace(
    "floor", [1, 2], [0.5, 0.5], "neutral", "floor"
  )


def test_families_of_several_runs():
  """One figure for each of a few domains, one over all layers."""
  runs = [
    Record(
      name,
      [
        {"step": s} | {f"max_vio/{i:02d}": i * s for i in range(6)}
        for s in (1, 2)
      ],
      [{"step": s, "loss/a": s, "loss/b": 2 * s * k} for s in (1, 2)],
    )
    for k, name in enumerate(("x", "y"), 1)
  ]
  found = {p.title: p for _, g in plots.make(runs).groups for p in g}
  assert [*found] == [
    "Loss by part: a",
    "Loss by part: b",
    "MaxVio of each layer",
  ]
  layers = found["MaxVio of each layer"]
  assert layers.names == [f"{i:02d}" for i in range(6)]
  assert [t.y for t in layers.traces] == [[0, 2, 4, 6, 8, 10]] * 2
  assert [t.y for t in found["Loss by part: b"].traces] == [[2, 4], [4, 8]]


def test_words_are_explained():
  metrics = [
    m for g in words.GROUPS for m in (*g.metrics.values(), *g.families.values())
  ]
  about = [*(m.about for m in metrics), *(g.about for g in words.GROUPS)]
  for text in about:
    for word in re.findall(r"\[([^\]]+)\]", text):
      assert word.split("|")[-1] in words.GLOSSARY, text


@pytest.mark.parametrize("name", ["config.json", "run.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]\n[]\n", b"[" * 99])
def test_a_damaged_file_is_one_sentence(name, content, tmp_path):
  """The page says so once, and shows the rest."""
  path = write(tmp_path / "a")
  (path / name).write_bytes(content)
  run = read.run(path, "a")
  # A last line may be half written.
  begun = name == "metrics.jsonl" and content != b"[]\n[]\n"
  assert len(run.problems) == (not begun)
  assert all(name in p and "bring it back" in p for p in run.problems)
  assert len(run.record.train) == 3 * (name != "metrics.jsonl")
  assert bool(run.config) == (name != "config.json")


def test_all_but_damaged_lines_are_shown(tmp_path):
  """The run is as far as its last whole line."""
  path = write(tmp_path / "a")
  text = (path / "metrics.jsonl").read_text()
  half = text[: len(text) // 2]
  (path / "metrics.jsonl").write_text(half)  # As while it is written.
  assert not read.run(path, "a").problems
  (path / "metrics.jsonl").write_text(f"{half}\n{text}")
  run = read.run(path, "a")
  told = (
    f"1 of 13 lines of {path / 'metrics.jsonl'} cannot be read: 4; bring it back"
    " as it was. The page shows the other lines."
  )
  assert run.problems == [told] and told in Seen(drawn(path)).text
  assert [line["step"] for line in run.record.train] == [10, 10, 20, 30]
  assert (run.state, run.step) == ("finished", 30)
  (path / "metrics.jsonl").write_text("?\n" * 12 + text)
  (problem,) = read.run(path, "a").problems
  assert "12 of 21 lines of" in problem and ": 1, 2," in problem
  assert "9, 10, ...; bring" in problem


def test_strange_numbers(tmp_path):
  """Other types are left out, and what cannot be drawn is a gap."""
  strange = {"a": True, "b": "x", "c": None, "d": 10**400, "e": float("inf")}
  some = [{**line, **strange} for line in lines()]
  some += [{"step": 30, "split": "loads", "00": [1, 2], "02": ["a"], "03": []}]
  run = read.run(write(tmp_path / "a", some), "a")
  assert {*"abcde"} & run.record.train[0].keys() == {*"de"}
  assert np.isnan(run.record.train[0]["d"])
  assert run.loads.keys() == {"00", "01"} and len(run.loads["00"][0]) == 3
  Seen(drawn(run.path))


def test_a_folder_of_another_version(tmp_path):
  facts = {"parameters": 3, "devices": "x"}
  path = write(tmp_path / "a", few(), facts, model=[1])
  config = json.loads((path / "config.json").read_text())
  del config["train"]
  (path / "config.json").write_text(json.dumps(config | {"new": {"key": 1}}))
  run = read.run(path, "a")
  assert run.state == "stopped"
  (problem,) = run.problems
  assert problem.startswith(f"{path / 'config.json'} is a config of another")
  assert "with model, new.key, which this version does not know" in problem
  assert "<td>new.<wbr>key</td>" in drawn(path)
  Seen(drawn(path, write(tmp_path / "b", few())))


def test_pictures(tmp_path):
  """The latest three that are whole images."""
  folder = write(tmp_path / "a") / "pictures" / "seen"
  folder.mkdir(parents=True)
  for step in range(1, 6):
    Image.new("RGB", (8, 4), (step, 0, 0)).save(folder / f"{step:08d}.png")
  whole = (folder / "00000004.png").read_bytes()
  (folder / "00000005.png").write_bytes(whole[:-20])  # While it is written.
  run = read.run(tmp_path / "a", "a")
  assert [step for step, _ in run.pictures["seen"]] == [4, 3]
  text = drawn(tmp_path / "a")
  assert text.count("<img") == 2 and 'alt="seen, step 4"' in text


def test_labels():
  assert read.labels(["x/a", "y/b/"]) == ["a", "b"]
  assert read.labels(["x/0", "y/0"]) == ["x/0", "y/0"]
  assert read.labels(["x/../b"]) == ["b"]


def test_the_command(tmp_path, monkeypatch, capsys):
  one, two = (write(tmp_path / name, few()) for name in "ab")
  opened = []
  monkeypatch.setattr(webbrowser, "open", lambda x: not opened.append(x))
  monkeypatch.chdir(tmp_path)
  assert not report.main([str(one), "--open"])
  assert opened == [(one / "report.html").as_uri()]
  assert f"{one}: finished, step 30" in capsys.readouterr().out
  assert not report.main([str(one), str(two)])
  assert "<h1>2 runs</h1>" in (tmp_path / "report.html").read_text()
  assert not report.main([str(one), f"--out={tmp_path / 'other.html'}"])
  text = (tmp_path / "other.html").read_text()
  assert text == (one / "report.html").read_text()


def test_folders_of_refused_runs_are_left_out(tmp_path, monkeypatch, capsys):
  """Among several folders, but not where there is no other."""
  run, refused = write(tmp_path / "a", few()), tmp_path / "b"
  refused.mkdir()
  (refused / ".lock").touch()
  monkeypatch.chdir(tmp_path)
  assert not report.main([str(run), str(refused)])
  told = capsys.readouterr()
  assert told.err.startswith(f"{refused} is left out: it holds only .lock")
  assert told.out.splitlines()[0] == f"{run}: finished, step 30"
  for paths in ([refused], [refused, refused]):
    with pytest.raises(ConfigError, match="b holds no run"):
      report.main([*map(str, paths)])
  assert not capsys.readouterr().err


def test_the_page_follows_a_run(tmp_path, monkeypatch, capsys):
  """It waits for the run, and is drawn again until the run is finished or killed."""
  path, all_lines = tmp_path / "a", few()
  pages, lock = [], []

  def more(seconds):
    assert seconds >= 5
    if not (path / "config.json").exists():
      if path.exists():
        path.rmdir()
        write(path, [])
        lock.append((path / ".lock").open("w"))
        fcntl.flock(lock[0], fcntl.LOCK_EX)
      else:
        path.mkdir()
      return
    pages.append((path / "report.html").read_text())
    with (path / "metrics.jsonl").open("a") as file:
      file.write("".join(json.dumps(x) + "\n" for x in all_lines[:2]))
    del all_lines[:2]

  monkeypatch.setattr(report.time, "sleep", more)
  assert not report.main([str(path), "--follow=5"])
  pages.append((path / "report.html").read_text())
  assert len(pages) == 4
  page_path = path / "report.html"
  assert capsys.readouterr().out.splitlines() == [
    f"waiting for a run to begin in {path}",
    f"{path}: running, step 0",
    f"Page: {page_path}",
    f"finished, step 30 of 30: {page_path}",
  ]
  reloads = ['http-equiv="refresh" content="5"' in text for text in pages]
  assert reloads == [True, True, True, False]
  assert [f"step {n} of 30" in t for n, t in zip((0, 10, 20, 30), pages)] == [
    True
  ] * 4


def test_the_page_follows_no_run_that_was_killed(tmp_path, monkeypatch, capsys):
  path = write(tmp_path / "a", few()[:2])
  lock = (path / ".lock").open("w")
  fcntl.flock(lock, fcntl.LOCK_EX)
  monkeypatch.setattr(report.time, "sleep", lambda seconds: lock.close())
  assert not report.main([str(path), "--follow"])
  *_, last = capsys.readouterr().out.splitlines()
  assert last == f"stopped, step 10 of 30: {path / 'report.html'}"
  assert 'http-equiv="refresh"' not in (path / "report.html").read_text()


def test_bad_arguments(tmp_path):
  run = write(tmp_path / "arm" / "0")
  file = tmp_path / "file"
  file.write_text("")
  for arguments, words_of_it in (
    (["nowhere"], "nowhere is not there; give a run's folder, or a trace"),
    ([run, file], "file is no folder; give work directories of runs"),
    ([file, "--open"], "without --open and --follow"),
    ([tmp_path], f"give a run inside of it, such as {run}$"),
    ([run / ".."], f"such as {run}/../0"),
    ([run, "--follow=0"], "--follow=0 is no time"),
    ([run, f"--out={tmp_path}"], "is a folder; give a file"),
    ([run, "--out=a.pdf"], "--out=a.pdf would be a page in HTML; give a name"),
    ([tmp_path, "--follow"], f"give a run inside of it, such as {run}$"),
  ):
    with pytest.raises(ConfigError, match=words_of_it):
      report.main([*map(str, arguments)])
  (run / "sub").mkdir()
  with pytest.raises(ConfigError, match="give the --workdir of a run"):
    report.main([str(run / "sub")])


def test_the_page_of_an_experiment(tmp_path):
  """Its table, its figures, and the mean curves of its arms."""
  keys = {"scale": "demo", "config_digest": "0"}
  rows, points = [], []
  for arm, factor in (("a", 1), ("b<", 2)):
    for seed in (0, 1):
      key = keys | {"arm": arm, "seed": seed}
      rows.append(key | {"loss": factor + seed, "max_vio": 1.0})
      points += [
        key | {"step": s, "loss": factor * s + seed, "validation/loss": s}
        for s in (1, 2)
      ]
  made = experiment_report.Report(
    (experiment_report.Column("loss", digits=2, meaning="of `it`."),),
    plots=[experiment_report_plot()],
  )
  experiment_report.write(
    *(tmp_path, "Why?", made, rows, points, ["A note."]),
    loss_unit="nats per image",
  )
  text = (tmp_path / "report.html").read_text()
  seen = Seen(text)
  assert "b&lt;" in text and "Why?" in seen.text and "A note." in seen.text
  assert "1.50 [1.00, 2.00]" in seen.text and "<code>it</code>" in text
  titles = re.findall("<figure><h3>(.*?)</h3>", text)
  assert titles == ["Loss", "Loss, training", "Loss, validation"]
  assert text.count("nats per image") == 2  # The axes of these.
  record = experiment_page._record("a", points[:4])
  assert record.train == [{"step": 1, "loss": 1.5}, {"step": 2, "loss": 2.5}]
  assert record.validation == [
    {"step": 1, "loss": 1.0},
    {"step": 2, "loss": 2.0},
  ]


@pytest.mark.parametrize(
  "stem, title",
  [
    ("max_vio", "MaxVio"),
    (
      "bits_per_byte_over_max_vio_global",
      "Bits per byte over MaxVio of the validation split",
    ),
    ("validation_loss", "Loss, validation"),
    ("train_dropped_over_my_own", "Dropped assignments, training over my own"),
    ("ranges", "Ranges"),
  ],
)
def test_titles_of_the_figures_of_an_experiment(stem, title):
  assert experiment_page.figure_title(stem) == title


def experiment_report_plot():
  from experiments import figures

  return figures.Curve("loss", "nats")


def test_written_paths(tmp_path):
  """A folder that cannot be written to is one sentence."""
  path = write(tmp_path / "a", [])
  out = pathlib.Path(tmp_path, "no", "report.html")
  with pytest.raises(Exception, match="no/report.html cannot be written to"):
    report.main([str(path), f"--out={out}"])
