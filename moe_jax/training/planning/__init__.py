"""Plans of a run on devices that are not there: `python -m moe_jax.plan`."""
