"""Faults put into a copy of the package, one at a time: do the tests notice?

For each fault it runs the tests named beside it and prints "caught" and the
failure if one of them failed, else "MISSED"; the last line is "N passed, M
failed".
"""

import argparse
import concurrent.futures
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
COPIED = ("moe_jax", "benchmarks", "tests", "configs", "setup.cfg")
# Compiling takes most of the time, and what is compiled runs once.
QUICK = (
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)


class Fault(NamedTuple):
  """Replaces `old`, found exactly once in `file`, by `new`."""

  name: str
  file: str
  old: str
  new: str
  tests: str


ORACLE = "layer_test.py::test_second_expert_against_the_oracle"
STEP = "train_test.py::test_a_step_is_its_pieces"
BALANCE = "parallel_test.py::test_balance_of_a_step"
SLOTTED = "parallel_test.py::test_layer_on_a_mesh[gather-True]"
RAGGED = "parallel_test.py::test_layer_on_a_mesh[sorted-True]"
NOISE = "train_test.py::test_noise_differs_by_layer_group_and_step"
RESUME = "loop_test.py::test_stopped_anywhere_it_is_the_same_run"
LOADS = "grouped_matmul_test.py"
REMAT = "remat_test.py::test_a_recompute_does_not_choose[gather-None]"

FAULTS = (
  # The router.
  Fault(
    "weights are not normalised",
    "moe_jax/moe/routers/top_k.py",
    "weight_TK = shares_TK if renormalize else chosen_TK",
    "weight_TK = chosen_TK",
    ORACLE,
  ),
  Fault(
    "the bias enters the weights",
    "moe_jax/moe/routers/top_k.py",
    "chosen_TK = jnp.take_along_axis(score_TE, expert_TK, axis=-1)",
    "chosen_TK = jnp.take_along_axis(select(score_TE), expert_TK, axis=-1)",
    "layer_test.py::test_bias_chooses_and_does_not_weigh",
  ),
  Fault(
    "weights are chosen again, not read at the saved index",
    "moe_jax/moe/routers/top_k.py",
    "chosen_TK = jnp.take_along_axis(logits_TE, expert_TK, axis=-1)",
    "chosen_TK = jax.lax.top_k(logits_TE, top_k)[0]",
    REMAT,
  ),
  Fault(
    "padding takes slots",
    "moe_jax/moe/routers/top_k.py",
    "valid_TK = jnp.broadcast_to(side.mask_T[:, None], expert_TK.shape)",
    "valid_TK = jnp.ones(expert_TK.shape, bool)",
    ORACLE,
  ),
  # Slots.
  Fault(
    "one slot too many",
    "moe_jax/moe/dispatchers/__init__.py",
    "kept_TK &= slot_TK < bound.slots",
    "kept_TK &= slot_TK <= bound.slots",
    "slots_test.py::test_assign",
  ),
  Fault(
    "choice-major slots where token-major ones are asked for",
    "moe_jax/moe/capacity.py",
    '(turn_TK if order == "token" else turn_TK.T)',
    '(turn_TK if order == "choice" else turn_TK.T)',
    "slots_test.py::test_rank",
  ),
  Fault(
    "the lowest priority goes first",
    "moe_jax/moe/capacity.py",
    '"token": (choice, token, -priority_TK)',
    '"token": (choice, token, priority_TK)',
    "slots_test.py::test_rank",
  ),
  Fault(
    "the gradient of a gather forgets the second choice",
    "moe_jax/moe/dispatchers/__init__.py",
    "choices = range(inverse_NK.shape[1])",
    "choices = range(1)",
    "layer_test.py::test_gradient[tight-gather-float64]",
  ),
  # Statistics.
  Fault(
    "padding is counted",
    "moe_jax/moe/layer.py",
    "    value = jnp.where(_like(mask_GT, value), value, 0)\n",
    "",
    ORACLE,
  ),
  Fault(
    "the z-loss is not squared",
    "moe_jax/moe/layer.py",
    "z = jax.nn.logsumexp(logits_GTE, axis=-1) ** 2",
    "z = jax.nn.logsumexp(logits_GTE, axis=-1)",
    ORACLE,
  ),
  Fault(
    "statistics of a group's sequences are merged",
    "moe_jax/moe/layer.py",
    "    return value.reshape(shape).sum(2, dtype=value.dtype)",
    "    total = value.reshape(shape).sum(2, dtype=value.dtype)\n"
    "    return jnp.broadcast_to(total.sum(1, keepdims=True), total.shape)",
    ORACLE,
  ),
  Fault(
    "a full bucket is reported as a full expert",
    "moe_jax/moe/layer.py",
    "    recipe.bound is None or recipe.bound.expert_buckets =="
    " recipe.num_experts",
    "    True",
    "layer_test.py::test_batch_prioritized_routing[sorted-token-bound2]",
  ),
  Fault(
    "max_vio is divided by the largest load",
    "moe_jax/training/metrics.py",
    "(np.max(count_E) - mean) / mean)",
    "(np.max(count_E) - mean) / np.max(count_E))",
    "metrics_test.py::test_routing_metrics_by_definition",
  ),
  # Balancers.
  Fault(
    "the balance loss lacks its factor E",
    "moe_jax/moe/balancers/switch.py",
    "return prob_E.shape[-1] * (f_E",
    "return (f_E",
    "contracts_test.py::test_balancer_uniform",
  ),
  Fault(
    "f is not divided by the sum of the counts",
    "moe_jax/moe/balancers/switch.py",
    "f_E = count_E / jnp.maximum(count_E.sum(-1, keepdims=True), 1)",
    "f_E = count_E / 1",
    "contracts_test.py::test_balancer_uniform",
  ),
  Fault(
    "global_batch forgets the micro-batches before",
    "moe_jax/moe/balancers/switch.py",
    "count = count + so_far_E",
    "count = count + 0 * so_far_E",
    BALANCE,
  ),
  Fault(
    "the scope sequence is a group",
    "moe_jax/moe/balancers/switch.py",
    "_whole_sequences(x, stats.groups_per_sequence)",
    "x.sum(1)",
    BALANCE,
  ),
  Fault(
    "fractions of a sequence stand alone",
    "moe_jax/moe/balancers/switch.py",
    "return x.reshape(-1, groups, *x.shape[1:]).sum(1, dtype=x.dtype)",
    "return x",
    "balancing_test.py::test_scope_sequence_sums_the_groups_of_a_sequence",
  ),
  Fault(
    "the bias moves the wrong way",
    "moe_jax/moe/balancers/bias.py",
    "error_E = load_E.mean() - load_E",
    "error_E = load_E - load_E.mean()",
    "balancing_test.py::test_rules_by_hand",
  ),
  # The training step.
  Fault(
    "the counts are those of the last micro-batch",
    "moe_jax/training/train_step.py",
    "return jax.tree.map(jnp.add, (grads, sums), (new_grads, new_sums)), None",
    "return (jax.tree.map(jnp.add, grads, new_grads), new_sums), None",
    STEP,
  ),
  Fault(
    "balance losses are not averaged over micro-batches",
    "moe_jax/training/train_step.py",
    "    balance /= accumulation\n",
    "",
    STEP,
  ),
  Fault(
    "the loss is a mean of means",
    "moe_jax/training/train_step.py",
    "return loss.total / step_tokens + balance, sums",
    "return loss.value() / accumulation + balance, sums",
    STEP,
  ),
  Fault(
    "every micro-batch draws the same noise",
    "moe_jax/training/train_step.py",
    "first = index * batch_size",
    "first = 0 * index",
    "parallel_test.py::test_accumulation_is_one_large_batch",
  ),
  Fault(
    "all layers draw the same noise",
    "moe_jax/models/transformer.py",
    "rng_G = jax.vmap(jax.random.fold_in, (0, None))(rng_G, layer_index)",
    "rng_G = jax.vmap(jax.random.fold_in, (0, None))(rng_G, 0 * layer_index)",
    NOISE,
  ),
  Fault(
    "all groups draw the same noise",
    "moe_jax/moe/layer.py",
    "lambda g: jax.random.fold_in(rng, g)",
    "lambda g: jax.random.fold_in(rng, 0 * g)",
    NOISE,
  ),
  # The loop over experts.
  Fault(
    "a gradient counts the rows of the next expert",
    "moe_jax/moe/kernels/cpu.py",
    "return jnp.where((row < chunk.live)[:, None], x, 0)",
    "return x",
    LOADS,
  ),
  Fault(
    "a later chunk replaces the gradient of its expert",
    "moe_jax/moe/kernels/cpu.py",
    "if not chunk.begins:",
    "if False:",
    LOADS,
  ),
  Fault(
    "a chunk that is exactly full is left out",
    "moe_jax/moe/kernels/cpu.py",
    "(smaller < live) & (live <= size)",
    "(smaller < live) & (live < size)",
    LOADS,
  ),
  Fault(
    "the last chunk's other rows stay",
    "moe_jax/moe/kernels/cpu.py",
    "lax.dynamic_update_slice_in_dim(x_ND, nothing, sizes_E.sum(), 0)",
    "lax.dynamic_update_slice_in_dim(x_ND, nothing, rows, 0)",
    LOADS,
  ),
  Fault(
    "combining does not weigh in the backward pass",
    "moe_jax/moe/dispatchers/__init__.py",
    "dx_ND = weight_N[:, None] * _take(dy_TD, owner_N // top_k)",
    "dx_ND = _take(dy_TD, owner_N // top_k)",
    "layer_test.py::test_gradient[tight-gather-float32]",
  ),
  Fault(
    "all choices are first choices",
    "moe_jax/moe/layer.py",
    "valid_GTK.at[..., 1:].set(False)",
    "valid_GTK",
    "layer_test.py::test_oracle",
  ),
  # The mesh.
  Fault(
    "the shards of F are not added up",
    "moe_jax/moe/exchange.py",
    "return y if axes is None else jax.lax.psum(y, axes.tensor)",
    "return y",
    "parallel_test.py::test_layer_on_a_mesh[gather-False]",
  ),
  Fault(
    "the bias of down is added by every shard of F",
    "moe_jax/moe/layer.py",
    'k: exchange.once(w, axes) if k == "down_bias" else w',
    "k: w",
    SLOTTED,
  ),
  Fault(
    "weights are gathered along another axis",
    "moe_jax/moe/exchange.py",
    "jax.lax.all_gather(w, axes.fsdp, axis=dim, tiled=True)",
    "jax.lax.all_gather(w, axes.fsdp, axis=0, tiled=True)",
    SLOTTED,
  ),
  Fault(
    "rows come back in the order of experts",
    "moe_jax/moe/exchange.py",
    "rows_back = _take(result.x, by_sender)",
    "rows_back = _take(result.x, by_expert)",
    RAGGED,
  ),
  Fault(
    "rows come back to where they were sent from elsewhere",
    "moe_jax/moe/exchange.py",
    "        transpose(send_start),",
    "        send_start,",
    RAGGED,
  ),
  Fault(
    "a buffer is for the rows of one group",
    "moe_jax/moe/exchange.py",
    "groups * bound.expert_buckets * bound.slots",
    "bound.expert_buckets * bound.slots",
    "parallel_test.py::test_layer_on_a_mesh[buckets-True]",
  ),
  Fault(
    "the check of a mesh looks at no gradient",
    "moe_jax/training/mesh_check.py",
    'return found | {"gradients": of_params}',
    "return found",
    "mesh_check_test.py::test_a_wrong_gradient_alone_stops_the_run",
  ),
  Fault(
    "collectives of a loop count once",
    "benchmarks/hlo.py",
    "count + one.times, size + one.times * one.size",
    "count + 1, size + one.size",
    "collectives_test.py::test_hlo_is_read",
  ),
  # Processes.
  Fault(
    "processes of different minds go on",
    "moe_jax/run/processes.py",
    "      if here != there:",
    "      if False:",
    "processes_test.py::test_other_configs_code_and_runs_are_refused",
  ),
  Fault(
    "a process reads the rows of all",
    "moe_jax/core/parallel.py",
    "sharding.addressable_devices_indices_map(",
    "sharding.devices_indices_map(",
    "processes_test.py::test_two_processes_stopped_and_gone_on_in_one",
  ),
  # Remat and causality.
  Fault(
    "a recompute chooses again",
    "moe_jax/moe/dispatchers/__init__.py",
    'SAVED = ("expert", "slot", "kept")',
    'SAVED = ("slot", "kept")',
    REMAT,
  ),
  Fault(
    "a decoder takes slots by choice",
    "moe_jax/models/transformer.py",
    "    if not recipe.causal:",
    "    if False:",
    "causality_test.py::test_what_leaks_is_refused[choice-gather]",
  ),
  Fault(
    "attention sees the future",
    "moe_jax/models/attention.py",
    "  return before_1LM & (seen_BLM | itself_1LM)",
    "  return seen_BLM | itself_1LM",
    "causality_test.py::test_the_past_does_not_see_the_future[gather]",
  ),
  # Published decoders.
  Fault(
    "a window is one token wider",
    "moe_jax/models/attention.py",
    "seen_BLM &= back_BLM < options.window",
    "seen_BLM &= back_BLM <= options.window",
    "attention_test.py::test_what_a_token_sees",
  ),
  Fault(
    "a token of the cache lies a place too far",
    "moe_jax/models/attention.py",
    "      variable.value, part, cache.first, axis=1",
    "      variable.value, part, cache.first + 1, axis=1",
    "attention_test.py::test_incremental_decoding_is_the_whole_forward_pass",
  ),
  Fault(
    "top-p leaves out the token that reaches it",
    "moe_jax/generate.py",
    "inside_BV = jnp.cumsum(prob_BV, axis=-1) - prob_BV < top_p",
    "inside_BV = jnp.cumsum(prob_BV, axis=-1) < top_p",
    "generate_test.py::test_sampling_as_it_is_defined",
  ),
  Fault(
    "unknown tensors are ignored",
    "moe_jax/hf/huggingface.py",
    '("has", "unknown ", names - expected.keys() - extra),',
    '("has", "unknown ", set()),',
    "interop_test.py::test_tensors_that_do_not_fit",
  ),
  # The run.
  Fault(
    "a step that is not finite is applied",
    "moe_jax/training/train_step.py",
    "jnp.where(finite, n, o)",
    "jnp.where(True, n, o)",
    "loop_test.py::test_a_step_that_is_not_finite_changes_nothing",
  ),
  Fault(
    "a line that was begun before a restart is lost",
    "moe_jax/training/loop.py",
    '"line": begun,',
    '"line": {},',
    RESUME,
  ),
  Fault(
    "lines after the restored step stay",
    "moe_jax/training/loop.py",
    '  directory.cut(found.step, at_least=found.meta.get("lines", 0))\n',
    "",
    "loop_test.py::test_killed_and_asked_to_stop_it_is_the_same_run",
  ),
  Fault(
    "the data of a checkpoint is not looked at",
    "moe_jax/training/loop.py",
    "if known != program.corpus.fingerprint:",
    "if False:",
    "loop_test.py::test_other_data",
  ),
  Fault(
    "too many steps that are not finite do not stop a run",
    "moe_jax/training/loop.py",
    "if in_a_row < most:",
    "if in_a_row < 10 * most:",
    "loop_test.py::test_too_many_in_a_row_stop_the_run",
  ),
  Fault(
    "the digest of a checkpoint is not compared",
    "moe_jax/training/checkpoint.py",
    "if problem is None and digest(found.state) != saved:",
    "if False:",
    "checkpoint_test.py"
    "::test_a_damaged_one_is_set_aside_and_the_one_before_is_used",
  ),
  Fault(
    "the digest does not see an exchange of two elements",
    "moe_jax/training/checkpoint.py",
    "bits.astype(jnp.uint32) ^ _mixed(place)",
    "bits.astype(jnp.uint32)",
    "checkpoint_test.py::test_the_digest_sees_one_bit_and_one_exchange",
  ),
  Fault(
    "a checkpoint of another model is not noticed",
    "moe_jax/training/checkpoint.py",
    '    _check_shapes(self.folder / str(step), about["shapes"], _shapes(like))\n',
    "",
    "checkpoint_test.py::test_one_of_another_model_is_refused",
  ),
  Fault(
    "a checkpoint that a machine has no memory for is damaged",
    "moe_jax/training/checkpoint.py",
    "if _LACKS.search(problem):",
    "if False:",
    "checkpoint_test.py::test_what_a_machine_lacks_is_no_damage",
  ),
  Fault(
    "a run is sampled from in the groups that it was trained in",
    "moe_jax/training/trained.py",
    '  section["moe"] |= models.DROPLESS\n',
    "",
    "generate_test.py::test_the_command_on_a_run",
  ),
  Fault(
    "texts are not filled up to the devices of a mesh",
    "moe_jax/generate.py",
    "-asked % parallel.token_shards(model.arch.mesh)",
    "0",
    "generate_test.py::test_a_mesh_changes_nothing",
  ),
  # Optimizers.
  Fault(
    "experts are one matrix",
    "moe_jax/training/optim.py",
    '(keys[0] in segments) + (label(path) == "experts")',
    "(keys[0] in segments) + 0",
    "optim_test.py::test_an_expert_does_not_feel_another_ones_gradient",
  ),
  Fault(
    "routed and shared experts have the rate of the rest",
    "moe_jax/training/optim.py",
    "rates[label(path)]",
    'rates["rest"]',
    "optim_test.py::test_parts_have_rates_of_their_own",
  ),
  Fault(
    "an update is not scaled to the size of Adam's",
    "moe_jax/training/optim.py",
    "0.2 * math.sqrt(max(map(math.prod, sides)))",
    "0.2 * math.sqrt(min(map(math.prod, sides)))",
    "optim_test.py::test_muon_is_orthogonal_in_every_matrix_and_of_adams_size",
  ),
  # Data.
  Fault(
    "held-out documents are those trained on",
    "moe_jax/data/batches.py",
    'corpus, "validation", seq_len, whole=False',
    'corpus, "train", seq_len, whole=False',
    "batches_test.py::test_validation_loses_no_token_and_repeats_none",
  ),
  Fault(
    "the parts of a mixture have equal shares",
    "moe_jax/data/batches.py",
    "grain.MapDataset.mix(parts, weights)",
    "grain.MapDataset.mix(parts)",
    "moe_jax/mixture_test.py",
  ),
)


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m tests.mutations",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "--only",
    action="append",
    metavar="TEXT",
    help="faults that contain this text; repeatable",
  )
  parser.add_argument(
    "--jobs", type=int, default=2, help="at a time; default: %(default)s"
  )
  args = parser.parse_args(argv)
  faults = [f for f in FAULTS if any(x in f.name for x in args.only or [""])]
  sources = [faulty(f) for f in faults]
  _check_without_a_fault(faults)
  missed = 0
  with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
    for fault, (failure, seconds) in zip(
      faults, pool.map(_try, faults, sources)
    ):
      missed += not failure
      word = "caught" if failure else "MISSED"
      print(f"{word} {fault.name} ({seconds:.0f} s)", flush=True)
      print(f"       {failure or fault.tests}", flush=True)
  print(f"{len(faults) - missed} passed, {missed} failed")
  return 1 if missed or not faults else 0


def faulty(fault: Fault) -> str:
  """The text of the file with the fault in it."""
  text = (ROOT / fault.file).read_text()
  if text.count(fault.old) != 1:
    sys.exit(
      f'the fault "{fault.name}" needs exactly one of\n{fault.old}\nin'
      f" {fault.file}, which has {text.count(fault.old)}; write the"
      " fault for the code as it is now"
    )
  return text.replace(fault.old, fault.new)


def _check_without_a_fault(faults):
  """A test that fails anyway catches nothing."""
  started = time.monotonic()
  with tempfile.TemporaryDirectory() as copy:
    _copy(copy)
    done = _pytest(copy, sorted({f.tests for f in faults}))
  if done.returncode:
    sys.exit(f"these tests fail without any fault:\n{done.stdout}")
  print(f"without a fault all pass ({time.monotonic() - started:.0f} s)")


def _try(fault, source):
  """The failure of a test that notices, or "", and how long it took."""
  started = time.monotonic()
  with tempfile.TemporaryDirectory() as copy:
    _copy(copy)
    (pathlib.Path(copy) / fault.file).write_text(source)
    done = _pytest(copy, [fault.tests])
  # 0: all passed; 1: a test failed; the rest: pytest could not even run them.
  if done.returncode not in (0, 1):
    sys.exit(f'"{fault.name}" could not be tested:\n{done.stdout}')
  failed = [x for x in done.stdout.splitlines() if x.startswith("FAILED ")]
  failure = failed[0][len("FAILED tests/") :][:160] if failed else ""
  return failure, time.monotonic() - started


def _copy(to):
  for name in COPIED:
    source, target = ROOT / name, pathlib.Path(to) / name
    if source.is_dir():
      no_caches = shutil.ignore_patterns("__pycache__")
      shutil.copytree(source, target, ignore=no_caches)
    else:
      shutil.copy(source, target)


def _pytest(folder, tests):
  flags = os.environ.get("XLA_FLAGS", "")
  return subprocess.run(
    [
      *(sys.executable, "-m", "pytest", "-x", "-q", "-n", "0"),
      *("-p", "no:cacheprovider", "--no-header"),
      *(f"tests/{test}" for test in tests),
    ],
    cwd=folder,
    # Wide enough for pytest to say why a test failed.
    env={**os.environ, "XLA_FLAGS": f"{flags} {QUICK}", "COLUMNS": "200"},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


if __name__ == "__main__":
  sys.exit(main())
