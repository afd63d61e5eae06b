"""Several processes as one run: on a pod, a cluster, or this machine."""

import json
import os
import pathlib
import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent import futures
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from moe_jax.core import errors
from moe_jax.core.errors import ConfigError, RunError, first_line
from moe_jax.run import command

# Variables that `moe_jax.launch.local`, or your own launcher, sets.
_ADDRESS = "JAX_COORDINATOR_ADDRESS"
_COUNT, _INDEX = "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_PATIENCE = 10.0  # Seconds for a file, or an answer, to reach other processes.
_SILENCE = 60  # Seconds without a sign of life: then a process is given up.
_BEAT = 5.0  # Seconds between two signs of life.
# The first number in a list of processes that did not come to a barrier.
_LATE = re.compile(r"timed out task names:\s*\S*?(\d+)\s")


def join(
  mode: str = "auto",
  timeout: int = 300,
  facts: Mapping[str, Any] = MappingProxyType({}),
) -> None:
  """Makes this process one of several; before anything that needs a device.

  All of them have to be started with the same facts.

  Args:
    mode: "on": by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID,
      or as jax.distributed finds out (Cloud TPU, GKE, SLURM, Open MPI); "off":
      alone; "auto": "on" where the environment tells of several processes.
    timeout: seconds to wait for all of them, >= 1.
    facts: see `check_same`; flags of the command, for instance.

  Raises:
    ConfigError: "on" without a cluster; or values are invalid; or the other
      processes did not come in time, or have other facts.
  """
  if mode == "on" or (mode == "auto" and detected(os.environ)):
    _meet(mode, timeout)
  check_same(facts)


def _meet(mode, timeout):
  """Waits for the other processes."""
  given = _given(os.environ)
  # Longer than our wait: at its own timeout jax aborts with a stack of C++.
  meeting = _in_thread(
    jax.distributed.initialize,
    **given,
    initialization_timeout=2 * timeout + 60,
    heartbeat_timeout_seconds=5 * _SILENCE,
  )
  try:
    meeting.result(timeout)
  except ValueError as e:
    if mode == "auto" and not _told(os.environ):
      return  # This machine has a TPU, and is no pod.
    raise ConfigError(
      "there are to be several processes, but this is no cluster that jax knows"
      f" ({first_line(e)}); set {_ADDRESS}, {_COUNT} and {_INDEX}, use"
      " moe-jax launch, or run alone with --multihost=off"
    ) from None
  except (RuntimeError, TimeoutError) as e:
    where = given.get("coordinator_address", "the first process")
    raise ConfigError(
      f"the processes of this run did not meet at {where} within {timeout} s"
      f" ({first_line(e) or 'no answer'}); see that all were started, and can"
      " reach that address, or raise --multihost_timeout"
    ) from None
  command.index = jax.process_index()
  _in_thread(_watch, distributed.global_state.client)


def _in_thread(function, *args, **options) -> futures.Future:
  """The future result of a function, called in a thread that may hang."""
  future = futures.Future()

  def call():
    try:
      future.set_result(function(*args, **options))
    except Exception as e:
      future.set_exception(e)

  threading.Thread(target=call, daemon=True).start()
  return future


def _watch(client):
  """Ends this process with a sentence when another process falls silent.

  All processes meet at a barrier of process 0 every few seconds.
  """
  try:
    while True:
      time.sleep(_BEAT)
      met = _in_thread(client.wait_at_barrier, "moe_jax/alive", 1000 * _SILENCE)
      met.result(_SILENCE + _PATIENCE)
  except TimeoutError:
    silent = "0"
  except jax.errors.JaxRuntimeError as e:
    late = _LATE.search(str(e))  # None: another process has ended.
    silent = late and late[1]
  # At exit jax waits for the other processes, and silence is no fault.
  if silent and threading.main_thread().is_alive():
    command.leave(
      f"error: process {silent} of this run has given no sign of life for"
      f" {_SILENCE} s; end it if it hangs, and give the same command to go on"
      " from the last checkpoint",
      2,
    )


def detected(environment: Mapping[str, str]) -> bool:
  """Returns whether there are, or may be, several processes.

  Args:
    environment: variables, such as `os.environ`.
  """
  return _told(environment) or _has_tpu(environment)


def _told(environment):
  """Whether the environment tells of several processes."""
  known = ["OMPI_COMM_WORLD_SIZE"]
  known += ["SLURM_NTASKS"] * ("SLURM_STEP_NODELIST" in environment)
  several = (_number(environment, k) > 1 for k in known if k in environment)
  return _ADDRESS in environment or any(several)


def _number(environment, name):
  if not environment[name].isdecimal():
    raise ConfigError(f"{name} = {environment[name]!r} is not a whole number")
  return int(environment[name])


def _has_tpu(environment):
  """Whether jax would run on a TPU here; then it knows whether it is a pod."""
  wanted = "tpu" in (environment.get("JAX_PLATFORMS") or "tpu")
  return wanted and any(map(os.path.exists, ("/dev/accel0", "/dev/vfio/0")))


def _given(environment):
  """Arguments of jax.distributed.initialize that variables of ours set."""
  if _ADDRESS not in environment:
    return {}
  address = environment[_ADDRESS]
  if not re.fullmatch(r".+:[0-9]+", address):
    raise ConfigError(f"{_ADDRESS} = {address!r} is not HOST:PORT")
  given = {"coordinator_address": address}
  for name, argument in ((_COUNT, "num_processes"), (_INDEX, "process_id")):
    if name in environment:  # Otherwise a cluster that jax knows may tell.
      given[argument] = _number(environment, name)
  index, count = given.get("process_id", 0), given.get("num_processes")
  if count is not None and index >= count:
    raise ConfigError(f"{_INDEX} = {index} is not below {_COUNT} = {count}")
  return given


def is_first() -> bool:
  """Whether this process is the one that writes."""
  return jax.process_index() == 0


def gather(value: Any) -> list:
  """Gathers a value from every process: the same list, in order, on all.

  All processes must call it equally often, in the same order.

  Args:
    value: any that JSON can hold.
  """
  text = json.dumps(value).encode()
  if jax.process_count() == 1:
    return [json.loads(text)]
  sizes = multihost_utils.process_allgather(np.int32(len(text))).tolist()
  # Each size is compiled: powers of two are few.
  padded = np.zeros(1 << max(sizes).bit_length(), np.uint8)
  padded[: len(text)] = np.frombuffer(text, np.uint8)
  rows = multihost_utils.process_allgather(padded)
  return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes)]


def by_first(function: Callable, *args, **options) -> Any:
  """Calls a function on the first process; returns its result on all of them.

  The function must not call `by_first` itself.

  Args:
    function: returns a value that JSON can hold.
    *args, **options: of the function.

  Raises:
    The function's error, on all processes; on the others as an error of
    `core.errors`.
  """
  told, error = {}, None
  if is_first():
    try:
      told["returned"] = function(*args, **options)
    except Exception as e:
      error, told = e, {"raised": type(e).__name__, "text": str(e)}
  told = gather(told)[0]
  if "raised" in told:
    raise error or getattr(errors, told["raised"], RunError)(told["text"])
  return told["returned"]


def check_shared(path: pathlib.Path) -> None:
  """Raises ConfigError, on all processes, if they do not share a file.

  Args:
    path: of a file that the first process has written. A file system that
      processes share may take some seconds to tell all of them.
  """

  def same():
    return path.exists() and path.read_text() == text

  text, end = by_first(path.read_text), time.monotonic() + _PATIENCE
  while not same() and time.monotonic() < end:
    time.sleep(0.1)
  seen = gather(same())
  if not all(seen):
    raise ConfigError(
      f"process {seen.index(False)} does not see what process 0 has written in"
      f" {path.parent.absolute()}; give a --workdir that all processes share"
    )


def check_same(facts: Mapping[str, Any]) -> None:
  """Raises ConfigError, on all processes, if facts differ between them.

  Args:
    facts: {name: a value that JSON can hold}.
  """
  first, *others = gather(dict(facts))
  for number, other in enumerate(others, 1):
    for name in sorted({*first, *other}):
      here, there = (known.get(name, "not there") for known in (first, other))
      if here != there:
        raise ConfigError(
          f"process {number} has {name} = {there!r}, and process 0 has"
          f" {here!r}; start all processes with the same command, code and"
          " versions"
        )
