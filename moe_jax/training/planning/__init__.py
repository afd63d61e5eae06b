"""What a config does on devices that are not there: `python -m moe_jax.plan`."""
