"""Several processes are one run: `tests.pod` with two of them, and refusals."""

import io
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

import pytest

from moe_jax.core.errors import ConfigError, InUse
from moe_jax.launch import local
from moe_jax.run import config as config_lib
from moe_jax.run import processes, run_directory, signals
from moe_jax.training import program, starts
from tests import kill, pod, tiers


@pytest.mark.long
def test_two_processes_stopped_and_gone_on_in_one(tmp_path):
  """Losses and one step to stop at; `python -m tests.pod` does more."""
  # Its experts are made of a dense network.
  config = config_lib.load("configs/tiny.py")
  config.model.update(pattern=("dense",), d_ff=32)
  task = program.build_task(config, prepare=False)
  model = program.build_model(config, task)
  starts.write(tmp_path / "dense", config, starts.own(task, model, seed=0))
  options = [f"--config.init_from={tmp_path}/dense"]
  options += ["--config.upcycle={'method': 'drop'}"]
  pods = pod.Pods(tmp_path, 30, options)
  pods.finish("alone", 1, 1)
  stopped, measured = pods.stop("run", 2, 1)
  assert stopped, measured
  pods.finish("run", 1, 1)
  same, measured = pods.compare("run")
  assert same, measured
  facts = json.loads((tmp_path / "run" / "run.json").read_text())
  assert facts["processes"] == len(facts["devices"]) == 2
  assert facts["continued"][0]["processes"] == 1


ROWS = """
from moe_jax.core import parallel
from moe_jax.run import processes
processes.join()
mesh = parallel.make_mesh((2, 1, 2, 1))
print("rows", parallel.local_rows(mesh, 8).tolist())
"""


def test_each_process_reads_its_own_rows():
  started = local.start([sys.executable, "-c", ROWS], 2, 2, cwd=pod.ROOT)
  for process, rows in zip(started, ([0, 1, 2, 3], [4, 5, 6, 7])):
    assert f"rows {rows}" in process.communicate()[0].decode()


def refused(tmp_path, command, count=2):
  """Last lines of processes, which must all end with exit code 2."""
  started = local.start(command, count, 1, cwd=tmp_path)
  texts = [process.communicate()[0].decode() for process in started]
  assert [p.returncode for p in started] == [2] * count, texts
  return [text.strip().splitlines()[-1] for text in texts]


def shell(flags):
  """The command, in which $JAX_PROCESS_ID may stand."""
  return ["sh", "-c", f"exec {sys.executable} -m moe_jax.main {flags}"]


def test_other_configs_code_and_runs_are_refused(tmp_path):
  shutil.copytree(pod.ROOT / "configs", tmp_path / "configs")
  tiny = f"--config=configs/tiny.py --workdir={tmp_path / 'run'}"
  for said in refused(tmp_path, shell(f"{tiny} --config.seed=$JAX_PROCESS_ID")):
    assert said.startswith(
      "error: process 1 has config.seed = 1, and process 0"
    )
  # A line more in a file of the first one.
  for number in range(2):
    package = tmp_path / f"code{number}" / "moe_jax"
    shutil.copytree(pod.ROOT / "moe_jax", package)
  with (tmp_path / "code0" / "moe_jax" / "moe" / "layer.py").open("a") as f:
    f.write("# Edited.\n")
  config = f"--config={tmp_path}/configs/tiny.py --workdir={tmp_path / 'run'}"
  moved = f"cd code$JAX_PROCESS_ID && {shell(config)[-1]}"
  for said in refused(tmp_path, ["sh", "-c", moved]):
    assert "process 1 has moe_jax/moe/layer.py = '" in said
  assert not (tmp_path / "run").exists()
  # The first one alone meets the other run; both say so.
  from configs import tiny as config_file

  with run_directory.RunDirectory(tmp_path / "run", config_file.get_config()):
    for said in refused(tmp_path, shell(tiny)):
      assert said.startswith("error: another run is going on in")


@pytest.mark.long
def test_other_flags_of_an_experiment_are_refused(tmp_path, monkeypatch):
  """Also where they would not make it run the same things in turn."""
  monkeypatch.setenv("PYTHONPATH", str(pod.ROOT))
  launch = f"exec {sys.executable} -m experiments.launch load_balancing"
  for flags, words in (
    ("--seeds=$((1 + JAX_PROCESS_ID))", "has --seeds = 2, and process 0 has 1"),
    ("$(test $JAX_PROCESS_ID = 0 || echo --report)", "has --report = True"),
  ):
    command = f"{launch} --workdir={tmp_path / 'run'} {flags}"
    for said in refused(tmp_path, ["sh", "-c", command]):
      assert f"error: process 1 {words}" in said
  assert not (tmp_path / "run").exists()


def test_the_number_to_stop_at_grows_over_runs(monkeypatch):
  """A process may be in the next run already, and jax takes the largest."""
  numbers = []
  monkeypatch.setattr(signals.jax, "process_count", lambda: 2)
  monkeypatch.setattr(
    signals.multihost_utils, "reached_preemption_sync_point", numbers.append
  )
  for _ in range(2):
    with signals.Stop() as stop:
      assert not stop.asked() and not stop.asked()
  assert numbers == sorted(set(numbers)) and len(numbers) == 4


@pytest.mark.parametrize("index", [0, 1])
def test_the_clock_of_the_first_process_ends_a_run(monkeypatch, index):
  """It stops as at a signal, of which jax tells the others."""
  sent = []
  monkeypatch.setattr(signals.jax, "process_count", lambda: 2)
  monkeypatch.setattr(signals.jax, "process_index", lambda: index)
  monkeypatch.setattr(
    signals.multihost_utils, "reached_preemption_sync_point", lambda n: False
  )
  monkeypatch.setattr(signals.os, "kill", lambda *a: sent.append(a))
  stop = signals.Stop(deadline=time.monotonic() + 60)
  assert not stop.asked() and not sent
  stop = signals.Stop(deadline=time.monotonic() - 1)
  assert not stop.asked() and not stop.asked()
  assert sent == [(os.getpid(), signal.SIGTERM)] * (index == 0)


ENDING = """
import signal
from moe_jax.core.errors import ConfigError
from moe_jax.run import command, processes

processes._SILENCE, processes._BEAT = 4, 0.2

def main():
  processes.join()
  processes.gather("here")
  print("joined", flush=True)
  if processes.is_first() == (WHO == 0):
    ACTION
  processes.gather("waits")

command.run(main)
"""


def ending(who, action):
  """A process that does `action` and one that waits for it, each with its
  output."""
  text = ENDING.replace("WHO", str(who)).replace("ACTION", action)
  started = local.start([sys.executable, "-c", text], 2, 1, cwd=pod.ROOT)
  said = []
  for process in (started[1 - who], started[who]):
    said.append(process.communicate(timeout=100)[0].decode())
    for other in started:
      other.send_signal(signal.SIGCONT)
  return started[who], said[1], started[1 - who], said[0]


@pytest.mark.parametrize(
  ("who", "error", "code"), [(0, "ConfigError", 2), (1, "OSError", 1)]
)
def test_an_error_in_one_process_ends_all(who, error, code):
  """Though the other one waits for it."""
  process, said, other, last = ending(who, f"raise {error}('it is broken')")
  assert process.returncode == code and "it is broken" in said
  assert ("Traceback" in said) == (code == 1)
  assert other.returncode == 2
  # jax may have logged after it that the connection is closed.
  assert "\nerror: another process of this run has ended" in f"\n{last}"


@pytest.mark.parametrize("who", tiers.only([1], [0, 1]))
def test_a_process_that_hangs_ends_the_others(who):
  """Process 0 is the one through which they talk."""
  _, _, other, said = ending(who, "signal.raise_signal(signal.SIGSTOP)")
  assert other.returncode == 2
  last = said.strip().splitlines()[-1]
  assert last.startswith(f"error: process {who} of this run has given no sign")
  assert "    @ " not in said, "a stack of C++"


def test_a_work_directory_that_is_not_shared(tmp_path, monkeypatch):
  for number in range(2):
    (tmp_path / f"host{number}").mkdir()
  flags = f"--config={pod.ROOT}/configs/tiny.py --workdir=run"
  moved = f"cd host$JAX_PROCESS_ID && {shell(flags)[-1]}"
  monkeypatch.setenv("PYTHONPATH", str(pod.ROOT))
  for said in refused(tmp_path, ["sh", "-c", moved]):
    assert said.startswith("error: process 1 does not see what process 0 has")


@pytest.mark.parametrize("index", tiers.only([1], [0, 1]))
def test_a_coordinator_that_is_not_there(tmp_path, index):
  """Nor, for the coordinator, the other process."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{s.getsockname()[1]}"
  known = {
    "JAX_COORDINATOR_ADDRESS": address,
    "JAX_COORDINATOR_BIND_ADDRESS": address,
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": f"{index}",
  }
  flags = ["--config=configs/tiny.py", f"--workdir={tmp_path / 'run'}"]
  done = subprocess.run(
    [sys.executable, "-m", "moe_jax.main", *flags, "--multihost_timeout=2"],
    env=os.environ | known,
    cwd=pod.ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2, done.stderr
  said = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
  assert len(said) == 1 and f"did not meet at {address} within 2 s" in said[0]
  assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_damaged_checkpoint_is_set_aside_by_all(tmp_path):
  """Whichever process reads the part that is damaged."""
  pods = pod.Pods(tmp_path, steps=6)
  pods.finish("run", 2, 2, more=("--config.checkpoint.every=3",))
  folder = tmp_path / "run" / "checkpoints"
  largest = max(
    (folder / "6" / "state").rglob("*"),
    key=lambda p: p.stat().st_size if p.is_file() else 0,
  )
  data = bytearray(largest.read_bytes())
  data[len(data) // 2] ^= 255
  largest.write_bytes(bytes(data))
  whole = kill.lines(tmp_path / "run")
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  # The run looks as if it had been killed before its last evaluation.
  text = "".join(f"{line}\n" for line in lines[:-1])
  (tmp_path / "run" / "metrics.jsonl").write_text(text)
  pods.finish("run", 2, 2, more=("--config.checkpoint.every=3",))
  assert "is damaged" in (tmp_path / "run.log").read_text()
  assert (tmp_path / "run" / "damaged_checkpoints" / "6.1").is_dir()
  assert kill.lines(tmp_path / "run") == whole


# A single process.


@pytest.mark.parametrize(
  "environment,detected",
  [
    ({}, False),
    ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}, True),
    ({"SLURM_NTASKS": "8"}, False),  # The script itself, outside of srun.
    ({"SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "node[1-8]"}, True),
    ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "node1"}, False),
    ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
    ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
  ],
)
def test_a_cluster_is_detected(environment, detected):
  platforms = {"JAX_PLATFORMS": "cpu"}
  assert processes.detected(environment | platforms) == detected


def test_impossible_numbers_of_processes(monkeypatch):
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
  for bad in ("two", "²", ""):
    monkeypatch.setenv("JAX_NUM_PROCESSES", bad)
    with pytest.raises(ConfigError, match=f"JAX_NUM_PROCESSES = '{bad}' is"):
      processes.join()
  monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
  monkeypatch.setenv("JAX_PROCESS_ID", "2")
  with pytest.raises(ConfigError, match="PROCESS_ID = 2 is not below .* = 2"):
    processes.join()
  for bad in ("localhost", ":1234", "host:port"):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", bad)
    with pytest.raises(ConfigError, match=f"= '{bad}' is not HOST:PORT"):
      processes.join()
  monkeypatch.delenv("JAX_COORDINATOR_ADDRESS")
  monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "abc")
  with pytest.raises(ConfigError, match="OMPI_COMM_WORLD_SIZE = 'abc' is"):
    processes.join()


@pytest.mark.parametrize(
  "environment",
  [
    {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1"},  # And no numbers.
    {"OMPI_COMM_WORLD_SIZE": "2"},  # jax needs other variables.
  ],
)
def test_nobody_trains_alone_by_mistake(monkeypatch, environment):
  """A variable may tell of several processes, and not where they are."""
  for name, value in environment.items():
    monkeypatch.setenv(name, value)

  def initialize(**given):
    raise ValueError("Number of processes must be defined.")

  monkeypatch.setattr(processes.jax.distributed, "initialize", initialize)
  with pytest.raises(ConfigError, match="no cluster .* must be defined"):
    processes.join()
  processes.join("off")
  monkeypatch.setattr(processes, "_told", lambda environment: False)
  monkeypatch.setattr(processes, "_has_tpu", lambda environment: True)
  processes.join()  # A single machine with a TPU.


def test_alone():
  assert processes.is_first()
  assert processes.gather({"a": (1, None)}) == [{"a": [1, None]}]
  assert processes.by_first(lambda: 3) == 3
  processes.check_same({"a": 1})


def test_of_several(monkeypatch):
  """`gather` is replaced by stand-ins for three processes."""
  monkeypatch.setattr(processes.jax, "process_count", lambda: 3)
  told = {"raised": "InUse", "text": "busy"}
  monkeypatch.setattr(processes, "gather", lambda value: [told, None, None])
  monkeypatch.setattr(processes, "is_first", lambda: False)
  with pytest.raises(InUse, match="busy"):
    processes.by_first(lambda: pytest.fail("only the first one calls it"))
  monkeypatch.setattr(processes, "gather", lambda x: [x, x, {"b": 2}])
  with pytest.raises(ConfigError, match="process 2 has a = 'not there', and"):
    processes.check_same({"a": 1, "b": 2})


def test_launch_local_shows_who_says_what(tmp_path, capsys):
  flags = ["--config=configs/nothing.py", f"--workdir={tmp_path}"]
  assert local.main(["--processes=2", "--", *flags]) == 2
  said = capsys.readouterr().out.splitlines()
  error = 'error: there is no config file "configs/nothing.py"'
  starts = sorted(line.split(";")[0] for line in said if "error" in line)
  assert starts == [f"[1] {error}", error]
  # What a library says of every connection is left out.
  lines = b"[Gloo] Rank 1 is connected to 1 peer ranks.\na step\n"
  local._show(1, types.SimpleNamespace(stdout=io.BytesIO(lines)))
  assert capsys.readouterr().out == "[1] a step\n"


@pytest.mark.parametrize(
  ("number", "code"), [(signal.SIGHUP, 75), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_processes_end_with_their_launcher(tmp_path, monkeypatch, number, code):
  """A closed terminal stops them, so that they save; nobody listens any more
  to what they say."""
  (tmp_path / "waits.py").write_text("""
import os, signal, sys, time
def stop(*_):
  for _ in range(5000):
    print("it stops" * 50)
  sys.exit(75)
signal.signal(signal.SIGTERM, stop)
print("process", os.getpid(), flush=True)
time.sleep(60)
""")
  path = f"{tmp_path}{os.pathsep}{pod.ROOT}"
  monkeypatch.setenv("PYTHONPATH", path)
  command = [sys.executable, "-m", "moe_jax.launch.local", "--module=waits"]
  launcher = subprocess.Popen(
    [*command, "--", "x"],
    stdout=subprocess.PIPE,
    # The tests may run under nohup.
    preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
  )
  pids = [int(launcher.stdout.readline().split()[-1]) for _ in range(2)]
  launcher.stdout.close()
  launcher.send_signal(number)
  assert launcher.wait(30) == code
  end = time.monotonic() + 10
  while any(map(running, pids)) and time.monotonic() < end:
    time.sleep(0.05)
  assert not any(map(running, pids))


def running(pid):
  try:
    state = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()
  except FileNotFoundError:
    return False
  return state[0] != "Z"


def test_a_second_signal_ends_a_pod(tmp_path):
  """The first one waits for the end of a step, here of the compiler."""
  flags = ["--config=configs/tiny.py", f"--workdir={tmp_path}"]
  command = [sys.executable, "-m", "moe_jax.launch.local", "--", *flags]
  with subprocess.Popen(
    command, stdout=subprocess.PIPE, cwd=pod.ROOT
  ) as process:
    while not (tmp_path / "config.json").exists():  # Next it compiles.
      assert process.poll() is None
      time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.stdout.read()
    assert process.wait(20) == 128 + signal.SIGKILL


def test_launch_local_without_a_command(capsys):
  with pytest.raises(SystemExit) as e:
    local.main(["--processes=2"])
  assert e.value.code == 2
  assert "are required: -- --config=... --work" in capsys.readouterr().err
