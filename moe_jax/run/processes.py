"""Several processes as one run: on a pod, a cluster, or this machine."""

import atexit
import contextlib
import itertools
import json
import os
import pathlib
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

# Variables that `moe_jax.launch.local`, or a launcher of yours, sets.
ADDRESS = "JAX_COORDINATOR_ADDRESS"
COUNT = "JAX_NUM_PROCESSES"
INDEX = "JAX_PROCESS_ID"
_PATIENCE = 10.0  # Seconds for a file to be seen by other processes.
_SILENCE = 60  # Seconds without a sign of life: then a process is given up.
_BEAT = 5.0  # Seconds between two signs of life.
_ALIVE = "moe_jax/alive/{}/{}"  # Process, round.


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
    ConfigError: "on" without a cluster; values that are none; the others did
      not come in time, or with other facts.
  """
  if mode == "on" or (mode == "auto" and detected(os.environ)):
    _meet(mode, timeout)
  check_same(facts)


def _meet(mode, timeout):
  """Waits for the other processes."""
  given = _given(os.environ)
  # A thread, because jax itself ends the process when the time runs out.
  done = futures.Future()
  threading.Thread(
    target=_initialize, args=(done, given, timeout), daemon=True
  ).start()
  try:
    done.result(timeout)
  except ValueError as e:
    if mode == "auto" and not _told(os.environ):
      return  # A machine with a TPU, and no pod.
    raise ConfigError(
      "there are to be several processes, but this is no cluster that jax knows"
      f" ({first_line(e)}); set {ADDRESS}, {COUNT} and {INDEX}, use"
      " python -m moe_jax.launch.local, or run alone with --multihost=off"
    ) from None
  except (RuntimeError, TimeoutError) as e:
    where = given.get("coordinator_address", "the first process")
    problem = f" ({first_line(e)})" if str(e) else ""
    raise ConfigError(
      f"the processes of this run did not meet at {where} within {timeout} s"
      f"{problem}; see that all were started, and can reach that address, or"
      " raise --multihost_timeout"
    ) from None
  command.joined(jax.process_index())
  client = distributed.global_state.client
  threading.Thread(target=_watch, args=(client,), daemon=True).start()


def _initialize(done, given, timeout):
  """jax.distributed.initialize, with more time than anyone waits."""
  try:
    jax.distributed.initialize(
      **given,
      initialization_timeout=2 * timeout + 60,
      # It would abort this process with a stack of C++; `_watch` is earlier.
      heartbeat_timeout_seconds=5 * _SILENCE,
    )
    done.set_result(None)
  except Exception as e:
    done.set_exception(e)


def _watch(client):
  """Ends this process with a sentence when another process falls silent.

  In every round each process writes a key to the store of jax.distributed,
  which lies in process 0, and waits for the keys of all.
  """
  ended = threading.Event()
  # Asked now: at the end of a process jax would make its backend anew.
  own, count = jax.process_index(), jax.process_count()
  # jax waits for the other processes at exit, and silence is no fault then.
  atexit.register(ended.set)

  def write(number):  # It has no time limit, so it gets a thread.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      client.key_value_set(_ALIVE.format(own, number), "")
      if number > 1:  # All have read the key of number - 2.
        client.key_value_delete(_ALIVE.format(own, number - 2))

  def hear(process, number, seconds=_SILENCE):
    key = _ALIVE.format(process, number)
    client.blocking_key_value_get(key, 1000 * seconds)

  try:
    for number in itertools.count():
      threading.Thread(target=write, args=(number,), daemon=True).start()
      for process in range(count):
        hear(process, number)
      time.sleep(_BEAT)
  except jax.errors.JaxRuntimeError as e:
    if "DEADLINE_EXCEEDED" in str(e) and not ended.is_set():
      try:
        hear(0, number, seconds=1)
      except jax.errors.JaxRuntimeError:
        process = 0
      command.leave(
        f"error: process {process} of this run has given no sign of life for"
        f" {_SILENCE} s; end it if it hangs, and give the same command to go on"
        " from the last checkpoint",
        2,
      )


def detected(environment: Mapping[str, str]) -> bool:
  """Whether there are, or may be, several processes."""
  return _told(environment) or _has_tpu(environment)


def _told(environment):
  """Whether the environment tells of several processes."""
  known = ["OMPI_COMM_WORLD_SIZE"]
  known += ["SLURM_NTASKS"] if "SLURM_STEP_NODELIST" in environment else []
  several = (_number(environment.get(k) or "1", k) > 1 for k in known)
  return ADDRESS in environment or any(several)


def _number(text, name):
  if not text.isdecimal():
    raise ConfigError(f"{name} = {text!r} is not a whole number")
  return int(text)


def _has_tpu(environment):
  """Whether jax would run on a TPU here; then it knows whether it is a pod."""
  platforms = environment.get("JAX_PLATFORMS", "")
  if platforms and "tpu" not in platforms:
    return False
  return any(map(os.path.exists, ("/dev/accel0", "/dev/vfio/0")))


def _given(environment):
  """Arguments of jax.distributed.initialize that variables of ours set."""
  if ADDRESS not in environment:
    return {}
  address = environment[ADDRESS]
  host, _, port = address.rpartition(":")
  if not host or not port.isdecimal():
    raise ConfigError(f"{ADDRESS} = {address!r} is not HOST:PORT")
  given = {"coordinator_address": address}
  for name, argument in ((COUNT, "num_processes"), (INDEX, "process_id")):
    if name in environment:  # Or a cluster that jax knows may tell.
      given[argument] = _number(environment[name], name)
  count, index = given.get("num_processes"), given.get("process_id")
  if count is not None and index is not None and index >= count:
    raise ConfigError(f"{INDEX} = {index} is not below {COUNT} = {count}")
  return given


def is_first() -> bool:
  """Whether this process is the one that writes."""
  return jax.process_index() == 0


def gather(value: Any) -> list:
  """Gathers a value from every process: the same list, in order, on all.

  All have to call it, as often and in the same order.

  Args:
    value: what JSON can hold.
  """
  text = json.dumps(value).encode()
  if jax.process_count() == 1:
    return [json.loads(text)]
  sizes = multihost_utils.process_allgather(np.int32(len(text))).tolist()
  # Each size is compiled, so there are few of them.
  padded = np.zeros(1 << max(sizes).bit_length(), np.uint8)
  padded[: len(text)] = np.frombuffer(text, np.uint8)
  found = multihost_utils.process_allgather(padded)
  return [json.loads(row[:size].tobytes()) for row, size in zip(found, sizes)]


def by_first(function: Callable, *args, **options) -> Any:
  """Calls a function on the first process; returns its result on all of them.

  It is not called inside of another one.

  Args:
    function: returns what JSON can hold.
    *args, **options: of the function.

  Raises:
    What the function raises, on all of them; on the others as one of our errors.
  """
  if jax.process_count() == 1:
    return function(*args, **options)
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

  def read():
    return path.read_text(errors="replace") if path.exists() else None

  text, end = by_first(read), time.monotonic() + _PATIENCE
  while read() != text and time.monotonic() < end:
    time.sleep(0.1)
  seen = gather(read() == text)
  if not all(seen):
    raise ConfigError(
      f"process {seen.index(False)} does not see what process 0 has written in"
      f" {path.parent.absolute()}; give a --workdir that all processes share"
    )


def check_same(facts: Mapping[str, Any]) -> None:
  """Raises ConfigError, on all processes, if facts differ between them.

  Args:
    facts: by name; what JSON can hold.
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
