"""Plans of a run on devices that are not there: `moe-jax plan`."""
