"""Loss and routing metrics on a dataset, of a run or of published weights.

moe-jax evaluate --hf=PATH --dataset=python_sources
moe-jax evaluate --checkpoint=RUN --config.model.moe.router.priority=score
moe-jax evaluate --hf=PREFIX --config=configs/vmoe.py:imagenet_s_32
"""

from moe_jax.core import hub
from moe_jax.core.errors import ConfigError
from moe_jax.run import command
from moe_jax.run import config as config_lib
from moe_jax.training import trained

_OF_TEXT = {"text_feature", "domain_feature", "skip_not_utf8"}


def main(argv=None) -> int:
  """Runs the command; raises ConfigError for flags that do not fit."""
  args, overrides = _arguments(argv)

  from moe_jax.tasks import next_token
  from moe_jax.training import traces

  if args.json:
    command.check_writable(args.json)  # Tells now, not after minutes.
  if args.checkpoint and overrides:
    print(f"Other than in the run: {', '.join(overrides)}")
  args.hf = args.hf and hub.weights(args.hf)
  if args.hf and args.dataset is None and not args.config:
    _refuse_no_text(args.hf)
  if (config := _read(args, overrides)) is not None:
    return _without_text(args, config)
  if args.few_shot:
    raise ConfigError(
      "--few_shot is of a run that classifies images, and this is none; leave it out"
    )
  own = () if args.config else overrides
  loaded = trained.load(args, dropless=args.dropless, overrides=own)
  if len(loaded.model.arch.stacks) > 1:
    return _of_two_texts(args, overrides, loaded)
  if args.config or args.bleu:
    flag = "--config" if args.config else "--bleu"
    raise ConfigError(
      f"{flag} is for an encoder-decoder, and this model is none; leave it out"
    )
  settings, corpus = _settings(args, loaded), _text(args, loaded)
  if args.trace:
    command.check_writable(args.trace)
  trace = args.trace and traces.Writer(loaded.model, corpus.domains)
  task, sums = next_token.on_corpus(loaded, corpus, trace=trace, **settings)
  scored = sum(int(part["loss"].weight) for part in sums.values())
  words = [f"{k} = {'all' if v is None else v}" for k, v in settings.items()]
  words += ["dropless" if args.hf or args.dropless else "the run's capacity"]
  print(f"{scored} tokens, with {', '.join(words)}")
  told = _report(sums, task, loaded.model)
  if trace:
    trace.save(args.trace, loaded.step)
    print(f"The experts of every token are in {args.trace}.")
  if args.json:
    command.write_json(args.json, told)
  return 0


def _read(args, overrides):
  """The config of a run or a file, if its task has no text; else None."""
  from moe_jax.training import program

  trust = args.trust_plugins
  if args.checkpoint and not args.config:
    config = trained.config_of(args.checkpoint, overrides, trust)
    return None if trained.has_text(config) else config
  if not args.hf or not args.config:
    return None
  config = config_lib.load(args.config, overrides, trust_plugins=trust)
  if trained.is_of_text(config):
    return None
  program.check(config)
  return config


def _without_text(args, config) -> int:
  """The metrics of a task without text, of a run or of published weights."""
  from moe_jax import models
  from moe_jax.core import parallel
  from moe_jax.training import evaluation, program

  for name in ("seq_len", "trace", "bleu", "beams"):
    if getattr(args, name):
      raise ConfigError(
        f"--{name} is for text, and the task {config.task.name} has none;"
        " leave it out"
      )
  given = {
    "data.name": args.dataset,
    "eval.batch_size": args.batch_size,
    "eval.batches_per_domain": args.batches_per_domain,
    "model.dtype": args.dtype if args.hf else None,
  }
  texts = [f"{k}={x!r}" for k, x in given.items() if x is not None]
  if args.dataset:  # The run's own data.dir is the folder of another dataset.
    texts.append(f"data.dir={args.data_dir!r}")
  config = config_lib.overridden(config, texts)
  if args.dropless:
    values = config.to_dict()
    values["model"] = models.dropless(values["model"])
    config = config_lib.locked(values)
  mesh = args.mesh and parallel.mesh_or_none(args.mesh)
  task = program.build_task(config, mesh)
  model = program.build_model(config, task, mesh)
  if args.few_shot and task.few_shot is None:
    raise ConfigError(
      f"the task {config.task.name} has no classes for --few_shot; leave it out"
    )
  if args.few_shot:
    task.check_few_shot(args.few_shot)
  variables = _weights(args, model)
  sums = evaluation.of_task(model, variables, task)
  scored = sum(int(part["loss"].weight) for part in sums.values())
  print(f"{scored} examples, {config.eval.batch_size} at a time")
  more = {}
  if args.few_shot:
    options = args.few_shot, config.eval.batch_size
    more = task.few_shot(model, variables, *options)
  told = _report(sums, task, model, **more)
  if args.json:
    command.write_json(args.json, told)
  return 0


def _weights(args, model):
  """The variables of a run, or of published weights."""
  from moe_jax.hf import of_config

  if args.checkpoint:
    return trained.weights(args.checkpoint, model, args.ema)[1]
  if args.ema:
    raise ConfigError("--ema is of a run: give --checkpoint, or leave it out")
  params = of_config.load(args.hf, model)
  if params is None:
    raise ConfigError(
      f"--hf={args.hf} has no weights for the task of --config; give the prefix of"
      " V-MoE's files, or the folder of a network of Wan2.2"
    )
  return trained.placed({"params": params}, model)


def _refuse_no_text(path):
  """Raises ConfigError for a published model without a text to score it on."""
  from moe_jax import hf
  from moe_jax.hf import of_config

  if of_config.exists(path):
    raise ConfigError(
      f"{path} says nothing about its model; give a config that does, such as"
      " --config=configs/vmoe.py:imagenet_s_32"
    )
  if hf.section(path)["name"] == "decoder":
    raise ConfigError("give the text to evaluate on with --dataset=NAME")
  raise ConfigError(
    f"{path} is of an encoder-decoder, whose task its folder does not name; give a"
    " config that does, such as --config=configs/switch.py:base_8"
  )


def _report(sums, task, model, **more) -> dict:
  """Prints metrics and the most used experts; returns them for a file."""
  from moe_jax import models
  from moe_jax.run.pages import words
  from moe_jax.training import evaluation

  values, rows = evaluation.table(sums, task, model) | more, []
  for name, value in values.items():
    print(f"{name:32}{value:12.4f}  {words.unit(name)}".rstrip())
  if models.sublayers(model):
    shares = evaluation.specialisation(sums, models.sublayers(model))
    table = evaluation.describe(shares)
    print(f"\nThe most used experts of each domain:\n\n{table}")
    rows = [
      {"layer": layer, "domain": domain, "expert": e, "share": float(share)}
      for (layer, domain), share_E in shares.items()
      for e, share in enumerate(share_E)
    ]
  return {"metrics": values, "shares": rows}


def _of_two_texts(args, overrides, loaded) -> int:
  """The metrics of an encoder-decoder on its task."""
  from moe_jax import models
  from moe_jax.tasks import bleu, translation
  from moe_jax.training import evaluation, program

  if args.trace:
    raise ConfigError(
      "--trace has the experts of one sequence of tokens, and an encoder-decoder has"
      " two; leave it out"
    )
  config = _task_of(args, overrides, loaded)
  begin = ()
  if args.bleu:
    bleu.check(config)
    _, begin = translation.begins(config)
  arch = loaded.model.arch
  task = program.build_task(config, arch.mesh)
  if task.given["vocab_size"] > arch.vocab_size:
    raise ConfigError(
      f"the task has {task.given['vocab_size']} tokens, and the model knows"
      f" {arch.vocab_size}; set config.task.sentinels, end and start to its own"
    )
  models.check(
    loaded.model,
    lengths=task.lengths,
    batches={"--batch_size": config.eval.batch_size},
    mesh=arch.mesh,
  )
  sums = evaluation.of_task(loaded.model, loaded.variables, task)
  scored = sum(int(part["loss"].weight) for part in sums.values())
  lengths = " and ".join(f"{n} {name}" for name, n in task.lengths.items())
  bound = "dropless" if args.dropless else "the capacity of its config"
  print(
    f"{scored} target tokens, in {config.eval.batch_size} rows at a time of {lengths},"
    f" with {bound}"
  )
  more, signature = {}, None
  if args.bleu:
    # A run's slots are for whole texts, and generation goes token by token.
    writer = loaded if args.hf else trained.load(args)
    options = args.bleu, args.beams or 4, begin
    more, signature = bleu.of_run(writer, task, *options)
  told = _report(sums, task, loaded.model, **more)
  if signature:
    told["bleu_signature"] = signature
    print(f"\nBLEU as sacrebleu computes it: {signature}")
  if args.json:
    command.write_json(args.json, told)
  return 0


def _task_of(args, overrides, loaded):
  """The config of a run; or of a file, with the tokens of published weights."""
  from moe_jax.data.text import mixed

  config = loaded.config
  if config is not None and args.config:
    raise ConfigError(
      "--checkpoint has the task of its run; leave --config out, or give --hf"
    )
  if config is None:
    if not args.config:
      _refuse_no_text(args.hf)
    if args.dropless:
      raise ConfigError(
        "--dropless is of a run: published encoder-decoders have the slots that their"
        " config.json names; leave it out"
      )
    config = _of_file(args, overrides, loaded)
  given = {
    "data.seq_len": args.seq_len,
    "eval.batch_size": args.batch_size,
    "eval.batches_per_domain": args.batches_per_domain,
  }
  texts = [f"{k}={x!r}" for k, x in given.items() if x is not None]
  if args.dataset is not None:
    part = _part(config.data, args.dataset)
    own = {"mixture": {}, "name": part.get("name", args.dataset)}
    own["dir"] = args.data_dir or part.get("dir")
    own |= {k: part[k] for k in _OF_TEXT & {*part}}
    texts += [f"data.{k}={x!r}" for k, x in own.items()]
    pair = {k: part[k] for k in mixed.PAIR if k in part}
    texts += [f"task.{k}={x!r}" for k, x in pair.items()]
  return config_lib.overridden(config, texts)


def _of_file(args, overrides, loaded):
  """The config of --config, for the tokens of published weights."""
  from moe_jax.training import program

  for text in overrides:
    if not text.startswith(("task", "data.", "eval.", "plugins")):
      raise ConfigError(
        f"--config.{text} has no effect on published weights; leave it out"
      )
  trust = args.trust_plugins
  config = config_lib.load(args.config, overrides, trust_plugins=trust)
  program.check(config)
  config = trained.with_tokens(config, loaded)
  if config.task.name == "span_corruption" and not config.task.get("sentinels"):
    raise ConfigError(
      "task.sentinels is not given, and the published model knows its own; give them,"
      ' as --config.task.sentinels="(32099, -1)" for T5 and Switch'
    )
  return config


def _part(data, name):
  """The part of the data that is a dataset; {} if there is no such part.

  Args:
    data: a section `data`, which is the only part if it has no mixture.
    name: of the dataset, or the label of a part.

  Raises:
    ConfigError: several parts are of this dataset.
  """
  if name in data.mixture:
    return data.mixture[name]
  parts = data.mixture or {"": data}
  labels = [label for label, part in parts.items() if part["name"] == name]
  if len(labels) > 1:
    raise ConfigError(
      f"--dataset={name} is in several parts of data.mixture; give the label of one"
      f" in its place: {', '.join(labels)}"
    )
  return parts[labels[0]] if labels else {}


def _arguments(argv):
  parser = config_lib.Parser(__doc__)
  add, count = parser.add_argument, config_lib.at_least_1
  trained.add_flags(parser)
  words = "config.data.name, or a label of data.mixture (default: all)"
  add("--dataset", metavar="NAME", help=words)
  add("--data_dir", metavar="DIR", help="folder of a prepared TFDS dataset")
  add("--seq_len", type=count, help="tokens (default: the run's, or 256)")
  add("--batch_size", type=count, help="sequences (default: the run's, or 8)")
  words = "experts take all their tokens, as those of published decoders do"
  add("--dropless", action="store_true", help=words)
  add("--batches_per_domain", type=count, help="default: all")
  add("--trace", metavar="FILE", help="experts of tokens, see docs/runs.md")
  words = "also translate N validation pairs, for their BLEU (extra: bleu)"
  add("--bleu", type=count, metavar="N", help=words)
  add("--beams", type=count, metavar="N", help="of --bleu (default: 4)")
  words = "accuracy of a linear classifier after 1,5,... images of every class"
  add("--few_shot", type=_shots, metavar="N,N,...", help=words)
  words = "has the task of --hf, and the model of V-MoE's and Wan2.2's weights"
  add("--config", metavar="FILE[:VARIANT]", help=words)
  add("--json", metavar="PATH", help="metrics, and shares of experts")
  args, overrides = config_lib.parse_overrides(parser, argv)
  if overrides and args.hf and not args.config:
    raise ConfigError(f"--config.{overrides[0]} changes a --config; give one")
  if args.beams and not args.bleu:
    raise ConfigError(f"--beams={args.beams} is of --bleu; give --bleu=N too")
  if args.dataset is None and args.data_dir:
    raise ConfigError("give the dataset in --data_dir with --dataset=NAME")
  return args, overrides


def _shots(text):
  """The numbers of a flag --few_shot=1,5,10."""
  return tuple(config_lib.at_least_1(one) for one in text.split(","))


def _text(args, loaded):
  """The corpus of the flags, or of the run."""
  from moe_jax.data.text import corpora, mixed

  run = loaded.config
  if args.dataset is None:
    return mixed.prepare(run.data, plugins=run.plugins)
  name = args.dataset
  own = {"tokenizer": loaded.tokenizer.name, "data_dir": args.data_dir}
  if run is not None:
    own |= {"plugins": run.plugins, "cache_dir": run.data.cache_dir}
    part = _part(run.data, args.dataset)
    name = part.get("name", name)
    own |= {k: part[k] for k in _OF_TEXT & {*part}}
    own["data_dir"] = args.data_dir or part.get("dir")
  return corpora.prepare(name, **own)


def _settings(args, loaded) -> dict:
  """Lengths and batches: those of the flags, of the run, or the defaults.

  Raises:
    ConfigError: batches do not divide, or a text has no end.
  """
  from moe_jax import models

  if not loaded.ends:
    raise ConfigError(
      f"{args.hf}/config.json has no eos_token_id, which ends a document; add it"
    )
  run = loaded.config
  settings = {
    "seq_len": args.seq_len or (run.data.seq_len if run else 256),
    "batch_size": args.batch_size or (run.eval.batch_size if run else 8),
    "batches_per_domain": args.batches_per_domain,
    "separate_documents": run.data.separate_documents if run else True,
  }
  models.check(
    loaded.model,
    lengths={"inputs": settings["seq_len"]},
    batches={"--batch_size": settings["batch_size"]},
    mesh=loaded.model.arch.mesh,
  )
  return settings


if __name__ == "__main__":
  command.run(main)
