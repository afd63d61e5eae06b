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
COPIED = ("moe_jax", "benchmarks", "experiments", "tests", "configs")
COPIED += ("setup.cfg",)
# Runs share the programs that no fault changes.
CACHE = {
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
  "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


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
GPU = "gpu_kernels_test.py"
REMAT = "remat_test.py::test_a_recompute_does_not_choose[gather-None]"

FAULTS = (
  # The router.
  Fault(
    "weights are not normalised",
    "moe_jax/moe/routers/top_k.py",
    "(shares_TK if renormalize else chosen_TK) * scale",
    "chosen_TK * scale",
    ORACLE,
  ),
  Fault(
    "the bias enters the weights",
    "moe_jax/moe/routers/top_k.py",
    "scores.weigh(expert_TK, logits_TE, score_TE, score)",
    "scores.weigh(expert_TK, logits_TE, select(score_TE), score)",
    "layer_test.py::test_bias_chooses_and_does_not_weigh",
  ),
  Fault(
    "weights are chosen again, not read at the saved index",
    "moe_jax/moe/scores.py",
    "chosen_TK = jnp.take_along_axis(logits_TE, expert_TK, axis=-1)",
    "chosen_TK = jax.lax.top_k(logits_TE, expert_TK.shape[1])[0]",
    REMAT,
  ),
  Fault(
    "padding takes slots",
    "moe_jax/moe/routers/top_k.py",
    "valid_TK = jnp.broadcast_to(mask_T[:, None], shares_TK.shape)",
    "valid_TK = jnp.ones(shares_TK.shape, bool)",
    ORACLE,
  ),
  # Routers and balancers.
  Fault(
    "the losses see the noise of the router",
    "moe_jax/moe/routers/top_k.py",
    "routing = _routing(choice, clean_TE, score_TE, score)",
    "routing = _routing(choice, logits_TE, score_TE, score)",
    "balancers_test.py::test_importance_does_not_see_the_noise",
  ),
  Fault(
    "replayed experts are not forced",
    "moe_jax/moe/routers/top_k.py",
    "expert_TK = jnp.where(forced_TK, replayed_TK, expert_TK)",
    "expert_TK = jnp.where(forced_TK, expert_TK, expert_TK)",
    "traces_test.py::test_replayed_experts_are_forced",
  ),
  Fault(
    "a smooth load takes the rival of those inside for all experts",
    "moe_jax/moe/routers/noisy_top_k.py",
    "rival_TE = jnp.where(noisy_TE >= inside, outside, inside)",
    "rival_TE = jnp.where(noisy_TE >= inside, inside, inside)",
    "routers_test.py::test_noise_and_smooth_loads[noisy_top_k-options0-noisy_by_hand]",
  ),
  Fault(
    "padding takes capacity in expert choice",
    "moe_jax/moe/routers/expert_choice.py",
    "valid_EC=side.mask_T[token_EC] & (jnp.arange(slots) < full)[None, :],",
    "valid_EC=side.mask_T[token_EC],",
    "routers_test.py::test_padding_takes_no_capacity",
  ),
  Fault(
    "top-p stops before p is reached",
    "moe_jax/moe/routers/top_p.py",
    "jnp.cumsum(weight_TK, axis=-1) - weight_TK",
    "jnp.cumsum(weight_TK, axis=-1)",
    "routers_test.py::test_weights_and_their_gradients",
  ),
  Fault(
    "Sinkhorn's plan counts padding",
    "moe_jax/moe/routers/sinkhorn.py",
    "masked_TE = jnp.where(mask_T[:, None], logits_TE, -jnp.inf)",
    "masked_TE = jnp.where(mask_T[:, None], logits_TE, logits_TE)",
    "routers_test.py::test_sinkhorn_balances_a_group",
  ),
  Fault(
    "quantile balancing takes the K-th score as a cutoff",
    "moe_jax/moe/balancers/quantile.py",
    "last = min(top_k + 1, score_TE.shape[-1])",
    "last = min(top_k, score_TE.shape[-1])",
    "balancers_test.py::test_quantile_within_a_bin_of_the_exact_one",
  ),
  Fault(
    "padding is in the histogram",
    "moe_jax/moe/balancers/quantile.py",
    "ones_TE = jnp.broadcast_to(mask_T[:, None], bin_TE.shape)",
    "ones_TE = jnp.broadcast_to(mask_T[:, None] | True, bin_TE.shape)",
    "balancers_test.py::test_quantile_within_a_bin_of_the_exact_one",
  ),
  Fault(
    "a coefficient moves the wrong way",
    "moe_jax/moe/balancers/adaptive.py",
    "factor ** jnp.sign(excess)",
    "factor ** -jnp.sign(excess)",
    "balancers_test.py::test_l1_moves_its_coefficient",
  ),
  Fault(
    "a token is counted twice on a device",
    "moe_jax/moe/balancers/device.py",
    "of_devices(sent_TE).any(-1).sum(0, dtype=jnp.int32)",
    "of_devices(sent_TE).sum(-1).sum(0, dtype=jnp.int32)",
    "balancers_test.py::test_device_counts_a_token_once_for_a_device",
  ),
  Fault(
    "targets of a bias are forgotten",
    "moe_jax/moe/balancers/bias.py",
    "goal_E = jnp.asarray(share_E, dtype) * load_E.sum()",
    "goal_E = jnp.full(load_E.shape, mean)",
    "balancers_test.py::test_bias_toward_targets",
  ),
  Fault(
    "probabilities of zero make gradients of the entropy NaN",
    "moe_jax/moe/plans.py",
    "jax.scipy.special.entr(jnp.where(some, prob_GTE, 1)).sum(-1)",
    "jax.scipy.special.entr(jnp.where(some, prob_GTE, prob_GTE)).sum(-1)",
    "combinations_test.py",
  ),
  # Latent and cheap experts.
  Fault(
    "latent experts are projected back before the shards of F are summed",
    "moe_jax/moe/layer.py",
    """    y_GTD = exchange.sum_tensor(y_GTD, mesh)
    y_GTD = recipe.latent.apply(own, "out_of", y_GTD)
""",
    """    y_GTD = recipe.latent.apply(own, "out_of", y_GTD)
""",
    "latent_test.py::test_it_is_the_same_on_a_mesh",
  ),
  Fault(
    "cheap experts take slots",
    "moe_jax/moe/pool.py",
    "valid_TK=choice.valid_TK & real_TK,",
    "valid_TK=choice.valid_TK,",
    "pool_test.py::test_a_layer_is_what_the_papers_write",
  ),
  Fault(
    "a constant expert mixes the other way round",
    "moe_jax/moe/pool.py",
    "own, learnt = weight_GTC * mix[..., 0], weight_GTC * mix[..., 1]",
    "learnt, own = weight_GTC * mix[..., 0], weight_GTC * mix[..., 1]",
    "pool_test.py::test_a_layer_is_what_the_papers_write",
  ),
  Fault(
    "counts forget that a token has fewer networks",
    "moe_jax/moe/layer.py",
    "return self.real_experts or taken * self.num_experts / self.pool",
    "return taken",
    "pool_test.py::test_costs_and_counts_follow",
  ),
  # Slots.
  Fault(
    "one slot too many",
    "moe_jax/moe/dispatchers/__init__.py",
    "kept_TK &= slot_TK < bound.slots",
    "kept_TK &= slot_TK <= bound.slots",
    "capacity_test.py::test_assign",
  ),
  Fault(
    "choice-major slots where token-major ones are asked for",
    "moe_jax/moe/dispatchers/__init__.py",
    '(turn_TK if order == "token" else turn_TK.T)',
    '(turn_TK if order == "choice" else turn_TK.T)',
    "capacity_test.py::test_rank",
  ),
  Fault(
    "the lowest priority goes first",
    "moe_jax/moe/dispatchers/__init__.py",
    '"token": (choice, token, -priority_TK)',
    '"token": (choice, token, priority_TK)',
    "capacity_test.py::test_rank",
  ),
  Fault(
    "the gradient of a gather forgets the second choice",
    "moe_jax/moe/dispatchers/gather.py",
    "choices = range(inverse_NK.shape[1])",
    "choices = range(1)",
    "layer_test.py::test_gradient[tight-gather-float64]",
  ),
  Fault(
    "the minimum of slots is forgotten",
    "moe_jax/moe/groups.py",
    "max(-(-slots // multiple) * multiple, minimum)",
    "-(-slots // multiple) * multiple",
    "capacity_test.py::test_capacity_rounding",
  ),
  Fault(
    "slots are rounded down to a multiple",
    "moe_jax/moe/groups.py",
    "-(-slots // multiple) * multiple",
    "slots // multiple * multiple",
    "capacity_test.py::test_capacity_rounding",
  ),
  # Statistics.
  Fault(
    "padding is counted",
    "moe_jax/moe/plans.py",
    "    value = jnp.where(mask, value, 0)\n",
    "",
    ORACLE,
  ),
  Fault(
    "the z-loss is not squared",
    "moe_jax/moe/plans.py",
    "z_GT = jax.nn.logsumexp(routing.logits_TE, axis=-1) ** 2",
    "z_GT = jax.nn.logsumexp(routing.logits_TE, axis=-1)",
    ORACLE,
  ),
  Fault(
    "statistics of a group's sequences are merged",
    "moe_jax/moe/plans.py",
    "    return value.reshape(shape).sum(2, dtype=value.dtype)",
    "    total = value.reshape(shape).sum(2, dtype=value.dtype)\n"
    "    return jnp.broadcast_to(total.sum(1, keepdims=True), total.shape)",
    ORACLE,
  ),
  Fault(
    "a full bucket is reported as a full expert",
    "moe_jax/moe/dispatchers/__init__.py",
    "shared = shares_slots(self.num_experts, self.bound)",
    "shared = False",
    "layer_test.py::test_batch_prioritized_routing[sorted-token-bound2]",
  ),
  Fault(
    "fewer experts than K are drops of any router",
    "moe_jax/moe/plans.py",
    "  if not recipe.router.fixed:",
    "  if False:",
    ORACLE,
  ),
  Fault(
    "what is under the mask enters the layer",
    "moe_jax/moe/layer.py",
    "  x_GTD = jnp.where(side.mask_T[..., None], x_GTD, 0)\n",
    "",
    "layer_test.py::test_what_is_under_the_mask_reaches_nothing",
  ),
  Fault(
    "drops are over one choice a token",
    "moe_jax/training/metrics.py",
    "wanted = tokens * layer.router.top_k",
    "wanted = tokens",
    "metrics_test.py"
    "::test_kinds_of_layers_with_other_numbers_of_experts_and_choices",
  ),
  Fault(
    "layers are in the order of their kinds",
    "moe_jax/training/metrics.py",
    "return dict(sorted(layers.items()))",
    "return layers",
    "metrics_test.py::test_layers_are_named_by_their_number",
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
    "count_E = count_E + so_far_E",
    "count_E = count_E + 0 * so_far_E",
    BALANCE,
  ),
  Fault(
    "the scope sequence is a group",
    "moe_jax/moe/balancers/switch.py",
    '"sequence": _whole_sequences,',
    '"sequence": lambda x, groups: x.sum(1),',
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
    "return jnp.where(above_whole_mean, 1, jnp.sign(mean - count_E))",
    "return -jnp.where(above_whole_mean, 1, jnp.sign(mean - count_E))",
    "balancing_test.py::test_rules_by_hand",
  ),
  Fault(
    "experts at the mean are moved",
    "moe_jax/moe/balancers/bias.py",
    "(count_E == mean) & (rest > 0)",
    "(count_E == mean)",
    "balancing_test.py::test_the_sign_rule_is_exact",
  ),
  # Kinds of layers.
  Fault(
    "a variant has the MoE keys of the model",
    "moe_jax/models/parts/layers.py",
    'moe = dict(model["moe"]) | dict(own.get("moe", {}))',
    'moe = dict(own.get("moe", {})) | dict(model["moe"])',
    "recipes_test.py::test_a_variant_overrides_the_keys_that_it_has",
  ),
  Fault(
    "only the first kind is checked on a mesh",
    "moe_jax/training/mesh_check.py",
    "for recipe in recipes",
    "for recipe in [*recipes][:1]",
    "mesh_check_test.py::test_every_kind_of_layer_is_checked",
  ),
  # The training step.
  Fault(
    "the counts are those of the last micro-batch",
    "moe_jax/training/train_step.py",
    "return jax.tree.map(jnp.add, (grads, sums), new), routing",
    "return (jax.tree.map(jnp.add, grads, new_grads), new_sums), routing",
    STEP,
  ),
  Fault(
    "the balance loss has no gradient",
    "moe_jax/moe/plans.py",
    "  prob_GTE = routing.prob_TE\n",
    "  prob_GTE = jax.lax.stop_gradient(routing.prob_TE)\n",
    "combinations_test.py::test_a_loss_moves_the_router[switch]",
  ),
  Fault(
    "the balance loss is of the last layer alone",
    "moe_jax/training/balancing.py",
    "        total += losses_R.value().sum()",
    "        total += losses_R.value()[-1:].sum()",
    "parallel_test.py::test_balance_of_a_step",
  ),
  Fault(
    "a trace has experts that are not there",
    "moe_jax/training/traces.py",
    "    if not ((x >= least) & (x <= most)).all():",
    "    if False:",
    "traces_test.py::test_damaged_traces",
  ),
  Fault(
    "smooth loads beside a balancer that shifts scores",
    "moe_jax/moe/balancers/__init__.py",
    "  if smooth and shifting:",
    "  if False:",
    "balancers_test.py::test_smooth_loads_are_of_scores_that_nobody_shifts",
  ),
  Fault(
    "capacity counts cheap experts as networks",
    "moe_jax/moe/groups.py",
    "    mean_k = recipe.experts_per_token",
    "    mean_k = recipe.router.average_k or top_k",
    "pool_test.py::test_capacity_is_of_the_networks",
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
    "return loss.total / weight + balance, (sums, routing)",
    "return loss.value() / accumulation + balance, (sums, routing)",
    STEP,
  ),
  Fault(
    "every micro-batch draws the same noise",
    "moe_jax/training/train_step.py",
    "micro, rng, index * batch_size, train=True",
    "micro, rng, 0 * index, train=True",
    "parallel_test.py::test_accumulation_is_one_large_batch",
  ),
  Fault(
    "two balancers that shift scores are taken",
    "moe_jax/moe/balancers/__init__.py",
    "if len(shifting) > 1:",
    "if len(shifting) > 2:",
    "balancers_test.py::test_two_balancers_that_shift_scores_are_refused",
  ),
  Fault(
    "a capacity is of the most experts that a token may have",
    "moe_jax/moe/groups.py",
    "mean_k = recipe.experts_per_token",
    "mean_k = top_k",
    "capacity_test.py::test_capacity_of_a_mean_number_of_experts",
  ),
  Fault(
    "a replay has K of the widest layer",
    "moe_jax/moe/linen.py",
    "own[..., : recipe.router.top_k]",
    "own",
    "traces_test.py::test_a_replay_of_layers_with_other_numbers_of_experts",
  ),
  Fault(
    "rows of an expert lose the same hidden units",
    "moe_jax/moe/experts.py",
    "jax.random.fold_in(rng, place)",
    "jax.random.fold_in(rng, 0 * place)",
    "experts_test.py::test_units_are_dropped_and_the_others_are_larger",
  ),
  Fault(
    "all shards of the hidden layer lose the same units",
    "moe_jax/moe/experts.py",
    'first = jax.lax.axis_index("tensor") * here',
    'first = jax.lax.axis_index("tensor") * 0',
    "experts_test.py::test_a_mesh_drops_the_same_units",
  ),
  Fault(
    "hidden units drop out in evaluation",
    "moe_jax/moe/groups.py",
    "recipe.experts.draws and not train",
    "recipe.experts.draws and train",
    "experts_test.py::test_nothing_is_dropped_outside_of_training",
  ),
  Fault(
    "layers take their number for that of the first sequence",
    "moe_jax/models/parts/stack.py",
    "segment(x_BLD, index_R, call)",
    "segment(x_BLD, index_R, call._replace(experts={**call.experts, 'first': start}))",
    "parallel_test.py::test_accumulation_is_one_large_batch",
  ),
  Fault(
    "a balancer that is not finite is kept",
    "moe_jax/training/train_step.py",
    "    finite &= jnp.isfinite(leaf).all()\n",
    "    pass\n",
    "train_test.py::test_a_step_that_spoils_a_balancer_changes_nothing",
  ),
  Fault(
    "all layers draw the same noise",
    "moe_jax/moe/linen.py",
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
  # The kernel for TPUs.
  Fault(
    "weights receive the gradient of another expert",
    "moe_jax/moe/kernels/tpu.py",
    "megablox.tgmm(x_MD.T, dy_MF, sizes_E,",
    "megablox.tgmm(x_MD.T, dy_MF, sizes_E[::-1],",
    "grouped_matmul_test.py::test_network_with_the_tpu_kernel",
  ),
  Fault(
    "tiles may take twice the VMEM that there is",
    "moe_jax/moe/kernels/tpu.py",
    "if vmem(product, t) <= chip.vmem",
    "if vmem(product, t) <= 2 * chip.vmem",
    "grouped_matmul_test.py::test_tiles_of_published_shapes",
  ),
  Fault(
    "a tile with rows of two experts counts once",
    "moe_jax/moe/kernels/tpu.py",
    "_up(end, row_tile) - begin // row_tile",
    "_up(size, row_tile)",
    "grouped_matmul_test.py::test_rows_that_a_tpu_visits",
  ),
  Fault(
    "the rest of an expert's rows is not in a chunk",
    "moe_jax/moe/kernels/cpu.py",
    "(rest and min(s for s in sizes if s >= rest))",
    "rest",
    "grouped_matmul_test.py::test_work_of_other_backends",
  ),
  # Kernels for GPUs.
  Fault(
    "the slowest kernel that was measured is taken",
    "moe_jax/moe/kernels/gpu/__init__.py",
    '(round(far(e), 6), e["milliseconds"])',
    '(round(far(e), 6), -e["milliseconds"])',
    GPU,
  ),
  Fault(
    "the gradient of weights gets rows that are no whole tiles",
    "moe_jax/moe/kernels/gpu/mosaic.py",
    'b = gpu.whole_tiles(b) if kind == "dw" else b',
    "b = b",
    GPU,
  ),
  Fault(
    "Triton writes for the newest assembler, which XLA may not have",
    "moe_jax/moe/kernels/gpu/triton.py",
    "oldest := min(filter",
    "oldest := max(filter",
    GPU,
  ),
  Fault(
    "tiles of another shape are taken as they are",
    "moe_jax/moe/kernels/gpu/pallas.py",
    "if width % tiles[k] == 0 else 64",
    "if width else 64",
    GPU,
  ),
  Fault(
    "a kernel that is wrong on this accelerator is timed all the same",
    "benchmarks/on_accelerator.py",
    'if not all(row.get("passed", True) for row in rows):',
    "if not rows:",
    "on_accelerator_test.py::test_a_wrong_kernel_is_caught",
  ),
  Fault(
    "a part takes the time of the next ones",
    "benchmarks/on_accelerator.py",
    "started + share * seconds",
    "started + seconds",
    "on_accelerator_test.py::test_a_part_takes_no_time_from_the_next_ones",
  ),
  Fault(
    "a notice is said again and again",
    "moe_jax/moe/kernels/gpu/__init__.py",
    "and reasons not in _said:",
    "and _said is not None:",
    GPU,
  ),
  Fault(
    "combining does not weigh in the backward pass",
    "moe_jax/moe/dispatchers/gather.py",
    "dx_ND = weight_N[:, None] * _take(dy_TD, owner_N // top_k)",
    "dx_ND = _take(dy_TD, owner_N // top_k)",
    "layer_test.py::test_gradient[tight-gather-float32]",
  ),
  Fault(
    "all choices are first choices",
    "moe_jax/moe/dispatchers/__init__.py",
    "valid_GTK.at[..., 1:].set(False)",
    "valid_GTK",
    "layer_test.py::test_oracle",
  ),
  # The mesh.
  Fault(
    "the shards of F are not added up",
    "moe_jax/moe/exchange.py",
    'return y if mesh is None else jax.lax.psum(y, "tensor")',
    "return y",
    "parallel_test.py::test_layer_on_a_mesh[dropless-False]",
  ),
  Fault(
    "the bias of down is added by every shard of F",
    "moe_jax/moe/exchange.py",
    "if name in network.added_once else w",
    "if name in () else w",
    SLOTTED,
  ),
  Fault(
    "the bias of the output is known by its name",
    "moe_jax/moe/exchange.py",
    "if name in network.added_once else w",
    'if name == "down_bias" else w',
    "parallel_test.py::test_layer_on_a_mesh[einsum-True]",
  ),
  Fault(
    "weights are gathered along another axis",
    "moe_jax/moe/exchange.py",
    "jax.lax.all_gather(w, axes, axis=dim, tiled=True)",
    "jax.lax.all_gather(w, axes, axis=0, tiled=True)",
    SLOTTED,
  ),
  Fault(
    "parts of a weight are gathered in another order",
    "moe_jax/moe/exchange.py",
    "jax.lax.all_gather(w, axes, axis=dim, tiled=True)",
    "jax.lax.all_gather("
    "w, axes if isinstance(axes, str) else axes[::-1], axis=dim, tiled=True)",
    SLOTTED,
  ),
  Fault(
    "groups of experts are chosen by their saturated scores",
    "moe_jax/moe/routers/top_k.py",
    "best = scores.choose(*of_groups, full_TG, top_groups)",
    "best = scores.choose(*of_groups, None, top_groups)",
    "layer_test.py::test_saturated_scores_choose_by_logits",
  ),
  Fault(
    "a dataset's folder names code that is run",
    "moe_jax/data/sources.py",
    'if not name.startswith("tensorflow_datasets."):',
    "if False:",
    "corpora_test.py::test_a_folder_that_names_code_runs_none",
  ),
  Fault(
    "rows come back in the order of experts",
    "moe_jax/moe/exchange.py",
    "rows_back = jnp.take(result.x, by_sender",
    "rows_back = jnp.take(result.x, by_expert",
    RAGGED,
  ),
  Fault(
    "rows come back to where they were sent from elsewhere",
    "moe_jax/moe/exchange.py",
    "landing = transpose(start_there)",
    "landing = start_there",
    RAGGED,
  ),
  Fault(
    "a buffer is for the rows of one group",
    "moe_jax/moe/exchange.py",
    "return devices * groups * most",
    "return devices * most",
    "parallel_test.py::test_layer_on_a_mesh[buckets-True]",
  ),
  Fault(
    "a buffer has no room for all tokens",
    "moe_jax/moe/dispatchers/__init__.py",
    "rows = tokens * min(top_k, num_experts)",
    "rows = tokens * min(top_k, num_experts) - 1",
    "parallel_test.py::test_all_tokens_on_one_device",
  ),
  Fault(
    "experts of other devices work on gathered tokens",
    "moe_jax/moe/exchange.py",
    "valid_TK=choice.valid_TK & here_TK",
    "valid_TK=choice.valid_TK",
    "parallel_test.py::test_layer_whose_tokens_are_gathered",
  ),
  Fault(
    "gathered tokens have slots of their own on every device",
    "moe_jax/moe/exchange.py",
    "expert_buckets=bound.expert_buckets // devices",
    "slots=bound.slots * devices, expert_buckets=bound.expert_buckets // devices",
    "parallel_test.py::test_layer_whose_tokens_are_gathered",
  ),
  Fault(
    "gathered tokens are sent again for the backward pass",
    "moe_jax/moe/exchange.py",
    'rows = plan.dispatch(checkpoint_name(x_GTD, "sent"))',
    "rows = plan.dispatch(x_GTD)",
    "remat_test.py::test_no_rows_are_sent_twice",
  ),
  Fault(
    "gradients of experts are always added up in every micro-batch",
    "moe_jax/training/train_step.py",
    "return parallel.of_automatic_axes(mesh) if wanted else None",
    "return None",
    "collectives_test.py::test_gradients_of_experts_are_summed_once_a_step",
  ),
  Fault(
    "gradients that are added up later are whole on every device of fsdp",
    "moe_jax/moe/reduction.py",
    'tuple(a for a in parallel.RULES["shards"] if a not in split)',
    'parallel.RULES["shards"]',
    "parallel_test.py::test_gradients_that_are_added_up_later",
  ),
  Fault(
    "configs that add gradients up at other times share a program",
    "moe_jax/training/program.py",
    "    config.train.reduce_experts_once,\n",
    "",
    "programs_test.py::test_what_devices_send_makes_another_program",
  ),
  Fault(
    "arguments on explicit axes are taken as they lie",
    "moe_jax/core/parallel.py",
    "  if not mesh.explicit_axes:\n    return run\n",
    "  return run\n",
    "explicit_axes_test.py::test_layer",
  ),
  Fault(
    "a step puts its state on every device of explicit axes",
    "moe_jax/training/train_step.py",
    "parallel.automatic(step, (as_before, jax.P()))",
    "parallel.automatic(step, (jax.P(), jax.P()))",
    "explicit_axes_test.py::test_a_step_leaves_the_state_where_it_lies",
  ),
  Fault(
    "the check of a mesh looks at no gradient",
    "moe_jax/training/mesh_check.py",
    'outputs | {"gradients": of_params}',
    "outputs",
    "mesh_check_test.py::test_a_wrong_gradient_alone_stops_the_run",
  ),
  Fault(
    "collectives of a loop count once",
    "moe_jax/training/planning/hlo.py",
    "one.times * one.size",
    "one.size",
    "collectives_test.py::test_hlo_is_read",
  ),
  # A run's files, and the end of a command.
  Fault(
    "a signal is handled by an exception",
    "moe_jax/run/command.py",
    "      signal.signal(number, _end)",
    "      signal.signal(number, signal.default_int_handler)",
    "main_test.py::test_a_signal_ends_a_command_wherever_it_arrives",
  ),
  Fault(
    "a file that is changed under a run is not noticed",
    "moe_jax/run/run_directory.py",
    "      if there != size:",
    "      if False:",
    "run_directory_test.py::test_a_file_changed_under_a_run_stops_it",
  ),
  Fault(
    "a damaged line of metrics ends them without a word",
    "moe_jax/core/files.py",
    'if not (line.endswith(b"\\n") or file.peek(1)):',
    "if True:",
    "run_directory_test.py::test_a_damaged_line_of_metrics",
  ),
  Fault(
    "a plugin that changed under a run is not told",
    "moe_jax/run/provenance.py",
    '**({"plugins": plugins} if plugins else {}),',
    "",
    "run_directory_test.py::test_what_a_run_is_made_with",
  ),
  Fault(
    "the plugins of a run from elsewhere are run",
    "moe_jax/run/config.py",
    "    if config.plugins and not trust_plugins and not own:",
    "    if False:",
    "main_test.py::test_code_that_the_config_of_a_run_names",
  ),
  # Processes.
  Fault(
    "processes go on without their launcher",
    "moe_jax/launch/local.py",
    "as readers, tied(started):",
    "as readers:",
    "processes_test.py::test_processes_end_with_their_launcher",
  ),
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
    "processes_test.py::test_each_process_reads_its_own_rows",
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
    "moe_jax/models/parts/stack.py",
    "      if not recipe.looking_ahead:",
    "      if True:",
    "causality_test.py::test_what_leaks_is_refused[choice-gather]",
  ),
  Fault(
    "attention sees the future",
    "moe_jax/models/attention/context.py",
    "return (back_1LM >= 0) & sees_BLM if options.causal else sees_BLM",
    "return sees_BLM",
    "causality_test.py::test_the_past_does_not_see_the_future[gather]",
  ),
  # Published decoders.
  Fault(
    "a window is one token wider",
    "moe_jax/models/attention/context.py",
    "sees_BLM &= query - key < options.window",
    "sees_BLM &= query - key <= options.window",
    "attention_test.py::test_what_a_token_sees",
  ),
  Fault(
    "a document's positions are counted from the start of its row",
    "moe_jax/models/attention/context.py",
    "jnp.where(begins_BL, before_BL, 0)",
    "jnp.where(begins_BL, 0, 0)",
    "attention_test.py::test_documents_and_own_positions",
  ),
  Fault(
    "padding has a position",
    "moe_jax/models/attention/context.py",
    "before_BL = jnp.cumsum(mask_BL, axis=1, dtype=jnp.int32) - mask_BL",
    "before_BL = jnp.cumsum(mask_BL | True, axis=1, dtype=jnp.int32) - 1",
    "attention_test.py::test_documents_and_own_positions",
  ),
  Fault(
    "a cache does not know where documents end",
    "moe_jax/models/attention/context.py",
    "keys = located(mask_BM, ends_BM)",
    "keys = located(mask_BM, ends_BM & False)",
    "attention_test.py::test_a_text_is_the_same_wherever_it_stands[grouped]",
  ),
  Fault(
    "padding is masked by a weight of zero",
    "moe_jax/models/attention/context.py",
    "return jnp.where(self.tokens.mask_BL[..., None], x_BLD, 0)",
    "return x_BLD",
    "attention_test.py"
    "::test_a_padded_vector_that_is_not_finite_stays_where_it_is",
  ),
  Fault(
    "a token of the cache lies a place too far",
    "moe_jax/models/attention/context.py",
    "variable.value, part_BL, first, axis=1",
    "variable.value, part_BL, first + 1, axis=1",
    "attention_test.py::test_a_text_is_the_same_wherever_it_stands[grouped]",
  ),
  Fault(
    "top-p leaves out the token that reaches it",
    "moe_jax/models/generation/decoding.py",
    "jnp.cumsum(prob_BV, axis=-1) - prob_BV < sampling.top_p",
    "jnp.cumsum(prob_BV, axis=-1) < sampling.top_p",
    "generate_test.py::test_sampling_as_it_is_defined",
  ),
  Fault(
    "unknown tensors are ignored",
    "moe_jax/hf/weights.py",
    '("has unknown", names - wanted.keys() - needless - {*left}),',
    '("has unknown", set()),',
    "interop_test.py::test_tensors_that_do_not_fit",
  ),
  Fault(
    "an absent number of groups is one group",
    "moe_jax/hf/families/deepseek.py",
    '"moe.router.num_expert_groups", 8, null=1',
    '"moe.router.num_expert_groups", 1, null=1',
    "hf_config_test.py::test_absent_fields_have_the_values_of_the_references_class",
  ),
  Fault(
    "null is read as if the field were absent",
    "moe_jax/hf/fields.py",
    "default if absent or null is SAME else null",
    "default",
    "hf_config_test.py::test_null_and_other_names",
  ),
  Fault(
    "a size of config.json is not bounded by the files",
    "moe_jax/hf/fields.py",
    "if bounded and value > self._room:",
    "if False:",
    "interop_test.py::test_configs_that_do_not_fit",
  ),
  Fault(
    "end tokens of generation_config.json are not read",
    "moe_jax/hf/config.py",
    '((first, where), (generation, "generation_config.json")):',
    "((first, where),):",
    "hf_config_test.py::test_what_a_folder_says_beside_is_kept",
  ),
  Fault(
    "a difference between layers is not seen when a model is saved",
    "moe_jax/hf/architecture.py",
    "for where, x, y in pairs:",
    "for where, x, y in pairs[:1]:",
    "hf_config_test.py::test_layers_are_compared_one_by_one",
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
    'directory.go_on(restored.step, restored.meta["lines"], **facts)',
    'directory.go_on(restored.step + 9, restored.meta["lines"], **facts)',
    "loop_test.py::test_killed_it_is_the_same_run",
  ),
  Fault(
    "the data of a checkpoint is not looked at",
    "moe_jax/training/loop.py",
    "if known != program.task.fingerprint:",
    "if False:",
    "loop_test.py::test_other_data",
  ),
  Fault(
    "too many steps that are not finite do not stop a run",
    "moe_jax/training/loop.py",
    "if in_a_row >= self._program",
    "if in_a_row >= 10 * self._program",
    "loop_test.py::test_too_many_in_a_row_stop_the_run",
  ),
  Fault(
    "the checksums of a checkpoint's arrays are not compared",
    "moe_jax/training/checkpoint.py",
    "if checksums.of_arrays(arrays) != saved:",
    "if False:",
    "checkpoint_test.py"
    "::test_a_damaged_one_is_set_aside_and_the_one_before_is_used",
  ),
  Fault(
    "the checksum of a checkpoint's JSON is not compared",
    "moe_jax/training/checkpoint.py",
    "if checksum != checksums.of_json(about):",
    "if False:",
    "checkpoint_test.py"
    "::test_a_damaged_one_is_set_aside_and_the_one_before_is_used",
  ),
  Fault(
    "the checksum does not see an exchange of two elements",
    "moe_jax/core/checksums.py",
    "bits.astype(jnp.uint32) ^ _mixed(place)",
    "bits.astype(jnp.uint32)",
    "checkpoint_test.py::test_the_digest_sees_one_bit_and_one_exchange",
  ),
  Fault(
    "a checkpoint of another model is not noticed",
    "moe_jax/training/checkpoint.py",
    "if wanted is not None:",
    "if False:",
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
    "an argument that is not UTF-8 passes",
    "moe_jax/run/config.py",
    'if text.encode(errors="ignore").decode() != text:',
    "if False:",
    "generate_test.py::test_arguments_that_are_not_utf8",
  ),
  Fault(
    "a run is sampled from in the groups that it was trained in",
    "moe_jax/training/trained.py",
    "models.dropless(section) if dropless else section",
    "section",
    "generate_test.py::test_the_command_on_a_run",
  ),
  Fault(
    "texts are not filled up to the devices of a mesh",
    "moe_jax/models/generation/decoding.py",
    "-len(prompts) % shards",
    "0",
    "generate_test.py::test_the_command_on_a_run",
  ),
  # Parts that do not fit.
  Fault(
    "a router's arrays may have any shapes",
    "moe_jax/moe/layer.py",
    "if len(axes) != x.ndim or x.shape != wanted:",
    "if False:",
    "parts_test.py::test_a_router_of_other_shapes_is_refused",
  ),
  Fault(
    "a balancer sees the sums of all that observed",
    "moe_jax/training/balancing.py",
    "stats.observed.get(label, {})",
    "stats.observed",
    "parts_test.py::test_a_balancer_sees_its_own_sums",
  ),
  Fault(
    "a bound of slots is asked of a router with slots of its own",
    "moe_jax/moe/groups.py",
    "if recipe.router.form is TokenChoice:",
    "if True:",
    "parts_test.py::test_what_is_for_tokens_alone",
  ),
  Fault(
    "the name of a variant's attention takes its other keys away",
    "moe_jax/run/config.py",
    "_A_PART.fullmatch(place)",
    "_is_open(place)",
    "config_test.py::test_a_name_that_is_no_part_s_takes_nothing_away",
  ),
  # Experiments.
  Fault(
    "each process ends a run by its own clock",
    "moe_jax/run/signals.py",
    "elif jax.process_index() == 0:",
    "else:",
    "processes_test.py::test_the_clock_of_the_first_process_ends_a_run",
  ),
  Fault(
    "three seeds are shown by their interval",
    "experiments/intervals.py",
    "FEW = 3 ",
    "FEW = 1 ",
    "report_test.py::test_two_or_three_seeds_are_shown_by_their_ends",
  ),
  Fault(
    "the best value is bold though it is not significant",
    "experiments/report.py",
    "all(pair and pair.decides for pair in pairs)",
    "all(pair for pair in pairs)",
    "report_test.py::test_the_latex_table",
  ),
  Fault(
    "arms are told by keys in which they agree",
    "experiments/plan.py",
    "len(texts[key]) > 1",
    "len(texts[key]) > 0",
    "launch_test.py::test_arms_are_told_by_what_they_differ_in",
  ),
  # Optimizers.
  Fault(
    "experts are one matrix",
    "moe_jax/core/roles.py",
    '_BATCH = ("layers", "expert")',
    '_BATCH = ("layers",)',
    "optim_test.py::test_an_expert_does_not_feel_another_ones_gradient",
  ),
  Fault(
    "routed and shared experts have the rate of the rest",
    "moe_jax/training/optimizers/__init__.py",
    'numbers["factors"][role.factor]',
    'numbers["factors"]["rest"]',
    "optim_test.py::test_parts_have_rates_of_their_own",
  ),
  Fault(
    "an update is not scaled to the size of Adam's",
    "moe_jax/training/optimizers/muon.py",
    "0.2 * math.sqrt(max(map(math.prod, sides)))",
    "0.2 * math.sqrt(min(map(math.prod, sides)))",
    "optim_test.py::test_muon_is_orthogonal_in_every_matrix_and_of_adams_size",
  ),
  # Configs.
  Fault(
    "sizes have no upper bound",
    "moe_jax/core/options.py",
    "_is(x, int) and low <= x <= high",
    "_is(x, int) and low <= x",
    "options_test.py::test_what_fits_and_what_does_not",
  ),
  Fault(
    "infinite numbers pass",
    "moe_jax/core/options.py",
    "_SMALLEST <= abs(x or 1) <= _LARGEST",
    "_SMALLEST <= abs(x or 1)",
    "config_test.py::test_what_no_key_takes_is_refused_with_its_name",
  ),
  Fault(
    "elements of tuples are not checked",
    "moe_jax/core/options.py",
    'check(value, f"{key}[{i}]")',
    'check(value, f"{key}[{i}]") if option is None else None',
    "config_test.py::test_elements_are_checked",
  ),
  Fault(
    "a part is built again with its old numbers",
    "moe_jax/core/registry.py",
    "{**made_of.options, **numbers}",
    "{**numbers, **made_of.options}",
    "registry_test.py::test_numbers_of_a_part_may_be_tracers",
  ),
  Fault(
    "another part keeps the options of the old one",
    "moe_jax/run/config.py",
    'if name == "name" and value != old',
    'if name == "name" and value == old',
    "config_test.py::test_another_name_takes_the_options_of_the_old_part_away",
  ),
  Fault(
    "an older config.json has no defaults",
    "moe_jax/run/config.py",
    "return default | {k:",
    "return {k:",
    "config_test.py::test_an_older_config_has_the_defaults_of_keys_that_it_lacks",
  ),
  Fault(
    "the momentum of Muon is Adam's b2",
    "moe_jax/training/optimizers/muon.py",
    'beta=numbers["momentum"]',
    'beta=numbers["b2"]',
    "optim_test.py::test_the_momentum_of_muon_is_its_own",
  ),
  Fault(
    "the embedding decays",
    "moe_jax/core/roles.py",
    'return self.matrix_axes is not None and self.part != "embedding"',
    "return self.matrix_axes is not None",
    "roles_test.py::test_embedding_and_head",
  ),
  Fault(
    "the width of a head is a side of its own",
    "moe_jax/core/roles.py",
    "if i and self.axes[i] is None and self.axes[i - 1] in _HEADS:",
    "if False:",
    "roles_test.py::test_axes_make_sides",
  ),
  Fault(
    "1 - b1 is computed in float32",
    "moe_jax/training/optimizers/adamw.py",
    '"new1": 1 - b1',
    '"new1": float(jnp.float32(1) - jnp.float32(b1))',
    "optim_test.py::test_adamw_is_optax_adam",
  ),
  Fault(
    "a skipped step moves the average",
    "moe_jax/training/train_step.py",
    "state = state.replace(step=state.step + 1)",
    "state = state.replace(step=state.step + 1, ema=new.ema)",
    "loop_test.py::test_a_step_that_is_not_finite_changes_nothing",
  ),
  # Data.
  Fault(
    "held-out documents are those trained on",
    "moe_jax/data/batches.py",
    'corpus.tokens("validation", domain)',
    'corpus.tokens("train", domain)',
    "batches_test.py::test_validation_loses_no_token_and_repeats_none",
  ),
  Fault(
    "the parts of a mixture have equal shares",
    "moe_jax/data/batches.py",
    "[int(weight * scale) for weight in weights]",
    "[1 for weight in weights]",
    "batches_test.py::test_a_part_has_its_exact_share_of_any_first_rows",
  ),
  Fault(
    "rows of evaluation begin with no token of the model",
    "moe_jax/data/batches.py",
    "(np.append(begin, tokens[i:j]), skipped)",
    "(tokens[i:j], skipped)",
    "batches_test.py::test_rows_begin_as_the_model_wants_and_no_token_is_lost",
  ),
  Fault(
    "text that spells a special token becomes that token",
    "moe_jax/data/text/tokenizers.py",
    "tokenizer.encode_special_tokens = as_text",
    "tokenizer.encode_special_tokens = False",
    "tokenizers_test.py::test_text_that_spells_a_special_token_is_text",
  ),
  Fault(
    "the index of a token cache is believed without its digest",
    "moe_jax/data/caches.py",
    "if digest == sha256(index):",
    "if digest or sha256(index):",
    "corpora_test.py::test_all_of_the_index_is_under_its_digest",
  ),
  # Images and videos.
  Fault(
    "the class token stands after the patches",
    "moe_jax/models/parts/image.py",
    "[token, x_BLD]",
    "[x_BLD, token]",
    "vision_test.py::test_patches_by_loops",
  ),
  Fault(
    "pixels of an image are read column by column",
    "moe_jax/models/parts/image.py",
    "x.swapaxes(2, 3).reshape",
    "x.reshape",
    "vision_test.py::test_patches_by_loops",
  ),
  Fault(
    "of equal classes all are the best",
    "moe_jax/tasks/classify_images.py",
    "((logits_BC == own_B1) & before_BC)",
    "(logits_BC < logits_BC)",
    "images_test.py::test_equal_logits_are_not_right",
  ),
  Fault(
    "images change by their place in the micro-batch",
    "moe_jax/data/images/augment.py",
    "jnp.asarray(first) + jnp.arange(rows)",
    "0 * jnp.asarray(first) + jnp.arange(rows)",
    "images_test.py::test_changes_by_the_place_in_the_step",
  ),
  Fault(
    "labels are not mixed with their images",
    "moe_jax/data/images/augment.py",
    "return mix(x_BHWC), mix(target_BC)",
    "return mix(x_BHWC), target_BC",
    "images_test.py::test_mixtures_are_shares_of_two",
  ),
  Fault(
    "a step at the boundary is of the network for less noise",
    "moe_jax/models/generation/flow.py",
    "time >= one.lowest - _ROUNDING",
    "time > one.lowest + _ROUNDING",
    "diffusion_test.py::test_two_networks_as_each_by_hand",
  ),
  Fault(
    "both networks stay in memory",
    "moe_jax/models/generation/flow.py",
    "    del variables, run, moved  # They",
    "    del n  # They",
    "diffusion_test.py::test_one_network_is_in_memory_at_a_time",
  ),
  Fault(
    "samples on the second part go on from the condition of the first",
    "moe_jax/models/generation/flow.py",
    "x = [*map(moved, x, beside)]",
    "x = [moved(own, beside[0]) for own in x]",
    "sample_test.py::test_samples_in_parts",
  ),
  Fault(
    "the map of loads shows counts in place of their ratio to the mean",
    "moe_jax/training/hooks/loads.py",
    "load_E / np.maximum(np.mean(load_E), 1e-9)",
    "load_E",
    "hooks_test.py::test_the_map_of_loads",
  ),
  Fault(
    "published weights are evaluated as a decoder's",
    "moe_jax/evaluate.py",
    "  if not args.hf or not args.config:\n    return None",
    "  return None",
    "classify_images_test.py::test_files_of_vmoe_are_evaluated",
  ),
  Fault(
    "guidance points away from the condition",
    "moe_jax/models/generation/flow.py",
    "without + guidance * (with_it - without)",
    "with_it + guidance * (without - with_it)",
    "diffusion_test.py::test_two_networks_as_each_by_hand",
  ),
  Fault(
    "noise at the first step is divided by almost nothing",
    "moe_jax/models/generation/flow.py",
    "jnp.maximum(1 - time, (time - after) / 2)",
    "jnp.maximum(1 - time, 1e-3)",
    "diffusion_test.py::test_noise_says_the_same_as_velocity",
  ),
  Fault(
    "the second network is checked when its first step comes",
    "moe_jax/sample.py",
    "    trained.check(run, model, args.ema)\n",
    "",
    "sample_test.py::test_the_second_network_is_checked_before_the_first_runs",
  ),
  Fault(
    "published weights of other sizes are taken",
    "moe_jax/hf/of_config/by_layer.py",
    "if shape in (None, made.shape):",
    "if True:",
    "diffusion_test.py::test_the_public_code",
  ),
  Fault(
    "logits that are no numbers are right",
    "moe_jax/tasks/classify_images.py",
    "~(logits_BC <= own_B1)",
    "(logits_BC > own_B1)",
    "images_test.py::test_a_model_that_diverged_is_right_nowhere",
  ),
  Fault(
    "images are held out by what they are resized to",
    "moe_jax/data/images/prepared.py",
    "sources.split_of(pixels.tobytes())",
    "sources.split_of(_sized(pixels, size).tobytes())",
    "images_test.py::test_images_are_held_out_alike_at_any_size",
  ),
  Fault(
    "the images that count choose the regularisation",
    "moe_jax/tasks/few_shot.py",
    "if right_M[::2].mean() > most:",
    "if right_M[::2].mean() >= most:",
    "classify_images_test.py::test_few_shots_choose_without_the_images_that_count",
  ),
  Fault(
    "a range of tokens lacks its first one",
    "moe_jax/tasks/next_token.py",
    "targets >= first_token",
    "targets > first_token",
    "next_token_test.py::test_ranges_of_tokens_have_losses_of_their_own",
  ),
  Fault(
    "a cache is trusted when its files have changed",
    "moe_jax/data/caches.py",
    "if mark.read_text() == wanted:",
    "if mark.exists():",
    "images_test.py::test_a_cache_is_used_again_and_mended",
  ),
  Fault(
    "two networks have the loss of one",
    "experiments/timesteps/plot.py",
    "both = high | low | added",
    "both = low | added",
    "vision_questions_test.py::test_two_networks_are_one_row",
  ),
  Fault(
    "sublayers have no gate",
    "moe_jax/models/parts/modulation.py",
    "(y_BLD * self.gate)",
    "(y_BLD * (self.gate == self.gate))",
    "diffusion_test.py::test_the_public_code",
  ),
  Fault(
    "rows of patches turn as frames do",
    "moe_jax/models/attention/grouped.py",
    "zip(jnp.split(x_BLHh, ends, axis=-1), axes_1L)",
    "zip(jnp.split(x_BLHh, ends, axis=-1), axes_1L[::-1])",
    "diffusion_test.py::test_the_public_code",
  ),
  Fault(
    "the velocity points to the video",
    "moe_jax/tasks/denoise.py",
    "noise - x if",
    "x - noise if",
    "diffusion_test.py::test_the_loss_by_hand",
  ),
  Fault(
    "an expert of timesteps sees all of them",
    "moe_jax/tasks/denoise.py",
    "minval=low, maxval=high",
    "minval=0 * low, maxval=high",
    "diffusion_test.py::test_timesteps_have_their_shift_and_range",
  ),
  Fault(
    "parts of an array may be missing",
    "moe_jax/hf/of_config/vmoe_files.py",
    "if filled[path] != array.size:",
    "if False:",
    "vision_test.py::test_damaged_files",
  ),
  Fault(
    "equal experts begin differently",
    "moe_jax/moe/experts.py",
    "  if equal:",
    "  if not equal:",
    "vision_test.py::test_equal_experts",
  ),
  Fault(
    "the output of other classes is kept",
    "moe_jax/models/parts/image.py",
    "head.shape[1] != arch.num_classes",
    "head.shape[1] < 0",
    "classify_images_test.py::test_other_images_and_classes",
  ),
  Fault(
    "expert choice rounds down",
    "moe_jax/moe/routers/expert_choice.py",
    "getattr(numpy, rounding)",
    'getattr(numpy, "floor")',
    "vision_test.py::test_the_public_code",
  ),
  # Hooks.
  Fault(
    "hooks are called a step late",
    "moe_jax/training/loop.py",
    "if done % period == 0",
    "if done % period == 1",
    "hooks_test.py::test_a_hook_sees_its_steps_and_changes_nothing",
  ),
  Fault(
    "hooks change the digest of a run",
    "moe_jax/run/config.py",
    '"train.profile_steps", "train.hooks")',
    '"train.profile_steps")',
    "hooks_test.py::test_hooks_are_part_of_no_digest",
  ),
  Fault(
    "hooks are not checked before a run",
    "moe_jax/training/program.py",
    "  hooks.check(config)\n",
    "",
    "hooks_test.py::test_a_wrong_hook_is_refused_before_anything_compiles",
  ),
  # Encoder-decoders.
  Fault(
    "an encoder sees earlier tokens only",
    "moe_jax/models/attention/options.py",
    "dataclasses.replace(self, causal=False)",
    "dataclasses.replace(self, causal=True)",
    "encoder_decoder_test.py::test_the_decoder_is_causal_and_the_encoder_is_not",
  ),
  Fault(
    "a packed target attends to all inputs",
    "moe_jax/models/attention/context.py",
    "  if context.is_cross:\n    return sees_BLM\n",
    "  if context.is_cross:\n    return sees_BLM | True\n",
    "encoder_decoder_test.py::test_packed_texts_are_those_alone",
  ),
  Fault(
    "buckets of later tokens are those of earlier ones",
    "moe_jax/models/attention/positions.py",
    "later = jnp.where(back < 0, number, 0)",
    "later = jnp.where(back < 0, 0, 0)",
    "encoder_decoder_test.py::test_buckets_of_distances",
  ),
  Fault(
    "positions go on over the ends of documents",
    "moe_jax/models/attention/context.py",
    "begins_BL = document_BL[:, 1:] != document_BL[:, :-1]",
    "begins_BL = document_BL[:, 1:] > document_BL[:, 1:]",
    "attention_test.py",
  ),
  Fault(
    "layers of the decoder are numbered from 0",
    "moe_jax/models/encoder_decoder.py",
    '"first_number": encoder.num_layers',
    '"first_number": 0',
    "encoder_decoder_test.py::test_numbers_of_layers_and_their_sequences",
  ),
  Fault(
    "every place drops the same numbers",
    "moe_jax/models/parts/dropout.py",
    "number = layer_index * len(PLACES) + PLACES.index(place)",
    "number = layer_index * len(PLACES)",
    "encoder_decoder_test.py::test_every_place_drops_with_keys_of_its_own",
  ),
  Fault(
    "dropout depends on the micro-batch",
    "moe_jax/models/parts/dropout.py",
    "first + jnp.arange(batch)",
    "jnp.arange(batch)",
    "encoder_decoder_test.py::test_dropout_of_a_model",
  ),
  Fault(
    "what is left is not larger",
    "moe_jax/models/parts/dropout.py",
    "x / (1 - rate), 0)",
    "x, 0)",
    "encoder_decoder_test.py::test_what_drops_out",
  ),
  Fault(
    "the network after the experts is left out",
    "moe_jax/models/parts/stack.py",
    '      x_BLD = add("mlp", mlp(norm(name), rng_B("hidden")), name)',
    '      mlp(norm(name), rng_B("hidden"))',
    "encoder_decoder_test.py::test_dense_networks_after_experts",
  ),
  Fault(
    "a second expert is kept by twice its share",
    "moe_jax/moe/routers/top_k.py",
    "shares_TK[:, 1] / threshold",
    "shares_TK[:, 1] * 2",
    "layer_test.py::test_second_expert_is_kept_in_proportion",
  ),
  Fault(
    "masked outputs are as large in evaluation",
    "moe_jax/moe/routers/top_k.py",
    "  factor = 1 - chance\n",
    "  factor = 1 - chance * (rng is not None)\n",
    "routers_test.py::test_output_masking",
  ),
  Fault(
    "the first target sees itself",
    "moe_jax/data/batches.py",
    "np.where(same, targets[:, :-1], start)",
    "np.where(same, targets[:, 1:], start)",
    "spans_test.py",
  ),
  Fault(
    "z-loss is a part of the reported loss",
    "moe_jax/tasks/next_token.py",
    'Mean(sums.get("cross_entropy", loss.total), loss.weight)',
    "Mean(loss.total, loss.weight)",
    "next_token_test.py::test_z_loss_is_minimised_and_not_reported",
  ),
  Fault(
    "beams keep the cache of their place",
    "moe_jax/models/generation/beam.py",
    "index = parent_BW.reshape(",
    "index = (0 * parent_BW).reshape(",
    "beam_test.py::test_texts_and_experts_are_those_of_whole_passes",
  ),
  Fault(
    "parts of a network are not larger",
    "moe_jax/training/starts/upcycling.py",
    "parts = [x * cuts for x in",
    "parts = [x for x in",
    "upcycling_test.py::test_the_function_is_kept",
  ),
  Fault(
    "experts begin anew with the same units",
    "moe_jax/training/starts/upcycling.py",
    "units = rng.permutation(width)",
    "units = np.arange(width)",
    "upcycling_test.py::test_a_share_of_units_begins_anew",
  ),
  Fault(
    "the last token of a span is its first",
    "moe_jax/data/spans.py",
    "first_RN[:, 1:] &= ~noise_RN[:, :-1]",
    "first_RN[:, :-1] &= ~noise_RN[:, 1:]",
    "spans_test.py::test_sides_are_those_of_the_oracle",
  ),
  Fault(
    "all runs have the same noise",
    "moe_jax/data/spans.py",
    "noise(seed, places[rows], size, corruption)",
    "noise(0, places[rows], size, corruption)",
    "spans_test.py::test_an_epoch_has_every_window_once_and_other_noise",
  ),
  Fault(
    "all sentinels ascend",
    "moe_jax/data/spans.py",
    "return first + step * np.arange",
    "return first + np.arange",
    "sequence_to_sequence_test.py::test_tokens_that_a_published_model_knows",
  ),
  Fault(
    "an empty target is learnt",
    "moe_jax/data/pairs.py",
    "empty_P, long_P = (size_P2 == 1).any(1)",
    "empty_P, long_P = (size_P2[:, :1] == 1).any(1)",
    "pairs_test.py::test_an_empty_side_is_refused_or_dropped",
  ),
  Fault(
    "pairs that are too long are cut without a word",
    "moe_jax/data/pairs.py",
    'if packing.too_long == "error":',
    'if packing.too_long == "word":',
    "pairs_test.py::test_pairs_that_are_too_long_are_refused",
  ),
  Fault(
    "a row has a token more than it has room for",
    "moe_jax/data/pairs.py",
    "size_P2[:, side] + limit",
    "size_P2[:, side] + limit + 1",
    "pairs_test.py::test_any_pairs_are_there_once_and_never_mixed",
  ),
  Fault(
    "BLEU is of the first domain alone",
    "moe_jax/tasks/bleu.py",
    "for several in itertools.zip_longest(*pairs.values()):",
    "for several in pairs.values():",
    "bleu_test.py::test_bleu_is_of_the_first_pairs_of_all_domains",
  ),
  Fault(
    "a text that has ended goes on",
    "moe_jax/models/generation/beam.py",
    "score_BW=jnp.where(ended_BJ, -jnp.inf, score_BJ)",
    "score_BW=jnp.where(ended_BJ, score_BJ, score_BJ)",
    "beam_test.py::test_against_plain_loops",
  ),
  Fault(
    "scores of texts are not divided by their length",
    "moe_jax/models/generation/beam.py",
    "jnp.where(counts_BJ, score_BJ / now.divisor, -jnp.inf)",
    "jnp.where(counts_BJ, score_BJ, -jnp.inf)",
    "beam_test.py::test_against_plain_loops",
  ),
  Fault(
    "the parts of a network are chosen apart",
    "moe_jax/training/starts/upcycling.py",
    "return np.repeat(own[..., ::cuts], cuts, axis=-1) if last else own",
    "return own",
    "upcycling_test.py::test_the_function_is_kept",
  ),
  Fault(
    "biases of the source are left out",
    "moe_jax/training/starts/fit.py",
    'if biased != ("down_bias" in experts.axes):',
    "if False:",
    "upcycling_test.py::test_sources_that_do_not_fit",
  ),
  Fault(
    "the first experts begin anew with the others",
    "moe_jax/training/starts/upcycling.py",
    "range(kept if kept > 1 else 0, number)",
    "range(0, number)",
    "upcycling_test.py::test_experts_that_were_there_stay",
  ),
  Fault(
    "balancers of a run begin again in one that goes on from it",
    "moe_jax/training/starts/__init__.py",
    "if _shapes(before) == _shapes(balance):",
    "if False:",
    "upcycling_test.py::test_what_a_run_takes_from_its_start",
  ),
  Fault(
    "the average of parameters is of those that a start replaces",
    "moe_jax/training/starts/__init__.py",
    'ema = state.ema and _placed(given["params"], state.ema)',
    "ema = state.ema",
    "upcycling_test.py::test_what_a_run_takes_from_its_start",
  ),
  Fault(
    "a step gives up the average with the parameters",
    "moe_jax/training/starts/__init__.py",
    'ema = state.ema and _placed(given["params"], state.ema)\n'
    '  params = _placed(given["params"], state.params)',
    'params = _placed(given["params"], state.params)\n'
    "  ema = state.ema and params",
    "upcycling_test.py::test_what_a_run_takes_from_its_start",
  ),
  Fault(
    "weights of other tokens begin a run",
    "moe_jax/training/starts/__init__.py",
    "fit.check_run(old, config, path)",
    "pass",
    "upcycling_test.py::test_weights_of_other_tokens_begin_no_run",
  ),
  Fault(
    "parameters of the source are dropped",
    "moe_jax/training/starts/fit.py",
    "  _check_used(source, target)\n\n\ndef",
    "  pass\n\n\ndef",
    "upcycling_test.py::test_nothing_of_the_source_is_dropped",
  ),
  Fault(
    "a copy begins without the bias of its expert",
    "moe_jax/training/starts/upcycling.py",
    "return np.concatenate([state] * times, axis=-1)",
    "return None",
    "upcycling_test.py::test_a_bias_of_selection_goes_on",
  ),
  Fault(
    "routers that differ are said to keep the function",
    "moe_jax/training/starts/fit.py",
    "if operator.ne(*map(_that_count, (layer.recipe, made.recipe))):",
    "if False:",
    "upcycling_test.py::test_other_choices_keep_no_function",
  ),
  Fault(
    "layers without a position bias get that of others",
    "moe_jax/models/attention/heads.py",
    'bias = context.bias if kind == "shared" else None',
    "bias = context.bias",
    "encoder_decoder_test.py::test_layers_without_a_position_bias_get_none",
  ),
  Fault(
    "an answer begins without its language",
    "moe_jax/generate.py",
    "said = [*of_target, *_without_begin(tokenizer, args.start)]",
    "said = _without_begin(tokenizer, args.start)",
    "bleu_test.py::test_prompts_of_a_run_get_the_tokens_of_its_languages",
  ),
  Fault(
    "the first of several parts is scored",
    "moe_jax/evaluate.py",
    "if len(labels) > 1:",
    "if False:",
    "bleu_test.py::test_a_dataset_that_several_parts_have",
  ),
  Fault(
    "sentinels are letters too",
    "moe_jax/tasks/span_corruption.py",
    "if num_bytes_V[token : token + 1].any():",
    "if False:",
    "sequence_to_sequence_test.py::test_impossible_options_are_refused",
  ),
  Fault(
    "the tokens of a language hide an empty text",
    "moe_jax/data/text/corpora.py",
    "begin if tokens.size else ()",
    "begin",
    "pairs_test.py::test_tokens_of_languages_stand_before_both_sides",
  ),
  Fault(
    "a refused run leaves its config",
    "moe_jax/run/run_directory.py",
    "(self.path / _CONFIG).unlink(missing_ok=True)",
    "pass",
    "run_directory_test.py::test_a_folder_in_which_nothing_began",
  ),
  Fault(
    "the warm-up of the rest is left out",
    "moe_jax/training/optimizers/__init__.py",
    'warmups = _of_all_parts(section["part_warmup_steps"], None)',
    'warmups = dict(section["part_warmup_steps"])',
    "optim_test.py::test_a_part_may_warm_up_later",
  ),
  Fault(
    "equal compute is that of a later step",
    "experiments/upcycling/plot.py",
    'share = scratch[-1][0] / by_place[twin]["steps"]',
    "share = 1.0",
    "upcycling_question_test.py::test_equal_compute_counts_what_an_arm_started_from",
  ),
  Fault(
    "scaled weights are said to keep the function",
    "moe_jax/training/starts/fit.py",
    'plain = {"scale": 1.0, "apply_to": "output", "output_masking": 0.0}',
    'plain = {"apply_to": "output", "output_masking": 0.0}',
    "upcycling_test.py::test_weights_that_do_not_add_up_to_1",
  ),
  Fault(
    "a run compiles before its start is looked at",
    "moe_jax/training/loop.py",
    "    if is_new and config.init_from is not None:",
    "    if is_new and not config:",
    "starts_test.py::test_weights_are_read_once_before_compiling_and_let_go",
  ),
  Fault(
    "tokens of languages stand before empty texts",
    "moe_jax/data/text/corpora.py",
    "begin if tokens.size else ()",
    "begin",
    "pairs_test.py::test_tokens_of_languages_stand_before_both_sides",
  ),
  Fault(
    "experts take the dropout of the model before their own",
    "moe_jax/models/parts/layers.py",
    'rates = moe["expert_dropout"], model["hidden_dropout"], model["dropout"]',
    'rates = model["dropout"], model["hidden_dropout"], moe["expert_dropout"]',
    "encoder_decoder_test.py::test_parts_take_the_dropout_of_the_model",
  ),
  Fault(
    "queries begin as large as keys",
    "moe_jax/models/attention/grouped.py",
    "scale = divisor**2 / m.head_dim",
    "scale = 1.0",
    "encoder_decoder_test.py::test_first_weights",
  ),
  Fault(
    "heads are rows of their own for Adafactor",
    "moe_jax/training/optimizers/adafactor.py",
    "if role.matrix_axes is None:",
    "if True:",
    "optim_test.py::test_adafactor_takes_heads_together",
  ),
  Fault(
    "weights of what has no slot are lost",
    "moe_jax/moe/dispatchers/__init__.py",
    "weight_GTK = whole_GT1 * scores.over_sum(weight_GTK, kept_GTK)",
    "pass",
    "capacity_test.py::test_the_weights_of_what_has_no_slot_go_to_the_other_experts",
  ),
  Fault(
    "weights of what has a slot add up to 1",
    "moe_jax/moe/dispatchers/__init__.py",
    "whole_GT1 * scores.over_sum(",
    "scores.over_sum(",
    "capacity_test.py::test_the_weights_of_what_has_no_slot_go_to_the_other_experts",
  ),
  Fault(
    "runs start from the first seed of another arm",
    "experiments/plan.py",
    "start=starts.get(n),",
    "start=starts.get(0),",
    "launch_test.py::test_arms_that_start_from_the_runs_of_another",
  ),
  Fault(
    "runs that others start from are not made again",
    "experiments/plan.py",
    "opened = [*starts, *unfinished]",
    "opened = unfinished",
    "launch_test.py::test_arms_that_start_from_the_runs_of_another",
  ),
  Fault(
    "a part warms up with the others",
    "moe_jax/training/optimizers/__init__.py",
    "u * (-rate(step) * ramp)",
    "u * (-rate(step))",
    "optim_test.py::test_a_part_may_warm_up_later",
  ),
  Fault(
    "the inverse square root begins at once",
    "moe_jax/training/optimizers/schedules.py",
    'jnp.maximum(step + 1.0, n["held"])',
    "(step + 1.0)",
    "t5_presets_test.py::test_rates_of_t5",
  ),
  # Plans.
  Fault(
    "a segment of one repeat keeps all that its forward pass computes",
    "moe_jax/models/parts/stack.py",
    "prevent_cse=self.alone",
    "prevent_cse=False",
    "plan_test.py::test_a_step_on_tpus",
  ),
  Fault(
    "each use of a weight gathers it",
    "moe_jax/core/parallel.py",
    "  return constrain(w, tuple(whole), mesh)\n\n\ngathered.",
    "  return w\n\n\ngathered.",
    "collectives_test.py::test_a_whole_step[sizes1-all_to_all]",
  ),
  Fault(
    "what is computed again counts as useful",
    "moe_jax/training/planning/products.py",
    '"rematted_computation" in self.name',
    '"rematted" == self.name',
    "plan_test.py::test_products_of_a_program",
  ),
  Fault(
    "zeros between the inputs of a convolution are multiplied",
    "moe_jax/training/planning/products.py",
    "(place % spread == 0)",
    "(place % spread < spread)",
    "plan_test.py::test_products_of_a_program",
  ),
  Fault(
    "a plan forgets the gradients of what it sends",
    "moe_jax/training/planning/costs.py",
    'exchanges=3 if remat == "block" else 2',
    "exchanges=1",
    "plan_test.py::test_a_step_on_a_mesh",
  ),
  Fault(
    "candidates that do not fit come first",
    "moe_jax/training/planning/search.py",
    "(0, c.high) if c.fits(chip) else (1, c.memory)",
    "(1, c.high) if c.fits(chip) else (0, c.memory)",
    "plan_test.py::test_candidates_of_a_search",
  ),
  Fault(
    "a remedy names the settings that were refused",
    "moe_jax/training/planning/search.py",
    "tuple(made.mesh.values())",
    "tuple(made.config.mesh)",
    "plan_test.py::test_what_would_fit",
  ),
  Fault(
    "a search ends at what does not fit",
    "moe_jax/plan.py",
    'sum(row.get("fits", False) for row in rows)',
    "len(rows)",
    "plan_test.py::test_a_search_that_finds_nothing",
  ),
  Fault(
    "the products of all experts are scaled by the rows of one kind of layer",
    "moe_jax/training/planning/products.py",
    "own = _layer_of(one, experts)",
    "own = next(iter(experts.values()))",
    "plan_test.py::test_flops_of_unlike_layers",
  ),
  Fault(
    "a gradient of the embedding is scattered before it is summed",
    "moe_jax/training/planning/costs.py",
    'part == "router" or part in OUTSIDE',
    'part == "router"',
    "plan_test.py::test_what_is_sent[sizes0-1]",
  ),
  Fault(
    "GPUs of a host talk over the network between hosts",
    "moe_jax/training/planning/plan.py",
    'chip.platform == "gpu" and _within',
    'chip.platform == "none" and _within',
    "plan_test.py::test_what_gpus_send_within_a_host",
  ),
  Fault(
    "the word none is no word for a config",
    "moe_jax/run/config.py",
    "name in section and not isinstance(old, str)",
    "name in section",
    "config_test.py::test_values_are_python_or_bare_words",
  ),
  Fault(
    "a task of a measurement runs as long as it likes",
    "benchmarks/on_accelerator.py",
    "signal.setitimer(signal.ITIMER_REAL, seconds)",
    "signal.setitimer(signal.ITIMER_REAL, 1e4)",
    "on_accelerator_test.py::test_a_task_that_takes_too_long_is_ended",
  ),
  Fault(
    "the load of a device is that of its largest expert",
    "moe_jax/training/planning/loads.py",
    "parts(devices).max(1) * devices",
    "share_NE.max(1) * devices",
    "plan_test.py::test_loads_of_a_run",
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
  with tempfile.TemporaryDirectory(prefix="moe_jax-compiled-") as compiled:
    os.environ |= CACHE | {"JAX_COMPILATION_CACHE_DIR": compiled}
    missed = _missed(faults, args.jobs)
  print(f"{len(faults) - missed} passed, {missed} failed")
  return 1 if missed or not faults else 0


def _missed(faults, jobs) -> int:
  """Tries the faults, prints what happens, and counts those nobody notices."""
  sources = [faulty(f) for f in faults]
  _check_without_a_fault(faults)
  missed = 0
  with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
    tried = pool.map(_try, faults, sources)
    for fault, (failure, seconds) in zip(faults, tried):
      missed += not failure
      word = "caught" if failure else "MISSED"
      print(f"{word} {fault.name} ({seconds:.0f} s)", flush=True)
      print(f"       {failure or fault.tests}", flush=True)
  return missed


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
  return subprocess.run(
    [
      *(sys.executable, "-m", "pytest", "-x", "-q", "-n", "0"),
      *("-p", "no:cacheprovider", "--no-header"),
      *(f"tests/{test}" for test in tests),
    ],
    cwd=folder,
    # Wide enough for pytest to say why a test failed.
    env={**os.environ, "COLUMNS": "200"},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


if __name__ == "__main__":
  sys.exit(main())
