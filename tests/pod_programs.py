"""Lowers the training step of every arm that experiments have for a pod.

  python -m tests.pod_programs [QUESTION/ARM]

For 64 devices of v5p that are not there, with the mesh that the questions'
docstrings give. Prints a line for each. An arm that is named is compiled, too.
"""

import sys

TOPOLOGY, MESH = "v5p:4x4x4", (1, 8, 8, 1)


def main(argv=None) -> int:
  from moe_jax.training.planning import topologies

  chip, shape = topologies.parse(TOPOLOGY)
  topologies.prepare(chip, shape)
  import jax

  from experiments import questions
  from moe_jax.training import program, train_step
  from moe_jax.training.planning import plan

  devices = topologies.devices(chip, shape)
  for name in questions.names():
    scales = questions.load(name).scales
    arms = scales["pod"]().configs() if "pod" in scales else {}
    for arm, config in arms.items():
      config.mesh = MESH
      if f"{name}/{arm}" in (argv or sys.argv[1:]):
        made = plan.of_train_step(config, chip, devices, TOPOLOGY)
        print(f"{name}/{arm}: compiled, fits {made.fits}", flush=True)
        continue
      mesh, task, model = program.build(config, devices, prepare=False)
      numbers = train_step.numbers(config, model)
      call = program.functions(config, mesh, task, model, numbers).train_step
      with jax.set_mesh(mesh):
        call.function.lower(*call.arguments)
      print(f"{name}/{arm}: lowered", flush=True)
  return 0


if __name__ == "__main__":
  sys.exit(main())
