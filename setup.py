"""The packages of a wheel; everything else stands in setup.cfg.

Other projects have folders with the names `configs` and `experiments` too, so a
wheel has ours inside of the package, in moe_jax/shipped.
"""

import setuptools

OURS = setuptools.find_packages(include=["moe_jax*"])
SHIPPED = setuptools.find_packages(include=["configs*", "experiments*"])

setuptools.setup(
  packages=[*OURS, *(f"moe_jax.shipped.{name}" for name in SHIPPED)],
  package_dir={"moe_jax.shipped": "."},
)
