"""Eight virtual CPU devices, strict numerics, and no skipped tests."""

import gc
import os
import platform
import signal
import sys
import tempfile

from tests import virtual_devices

virtual_devices.begin()
# Tracing makes many objects that live on; looking through all of them each time
# takes a tenth of a test.
gc.set_threshold(100_000, 20, 20)
# Tests, workers and the commands they start share compiled programs here.
_COMPILED = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  _COMPILED = tempfile.TemporaryDirectory(prefix="moe_jax-compiled-")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name
  # jaxlib 0.12 crashes now and then as it writes a program: it writes fewer.
  least = "0.1" if sys.version_info < (3, 12) else "1"
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = least
  os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# Every pytest worker may load the TPU compiler, which else serves one process.
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import hypothesis  # noqa: E402
import pytest  # noqa: E402

hypothesis.settings.register_profile(
  "moe_jax",
  deadline=None,  # The first example of a test compiles.
  derandomize=True,
  max_examples=25,
  database=None,
)
hypothesis.settings.load_profile("moe_jax")


def pytest_collection_modifyitems(config, items):
  """Leaves out what this platform has no TPU compiler for."""
  if sys.platform == "linux" and platform.machine() == "x86_64":
    return
  left_out = [i for i in items if i.get_closest_marker("aot")]
  items[:] = [i for i in items if i not in left_out]
  config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True)
def handlers():
  """Takes back the handlers of signals that a command leaves in place."""
  numbers = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
  before = {number: signal.getsignal(number) for number in numbers}
  yield
  for number, handler in before.items():
    signal.signal(number, handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
  return _fail_if_skipped((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
  return _fail_if_skipped((yield))


def _fail_if_skipped(report):
  """A skipped test proves nothing: install what it needs, or mark it long."""
  if report.skipped and not hasattr(report, "wasxfail"):
    reason = report.longrepr
    if isinstance(reason, tuple):  # Path, line, reason.
      reason = reason[-1]
    report.outcome = "failed"
    report.longrepr = f"{report.nodeid}: a skip is a failure here. {reason}"
  return report
