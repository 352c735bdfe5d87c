"""How a sweep's jobs start: whether their launcher can work at all, and `torchrun` for a run on several GPUs.

    python -m experiments.run -m hydra/launcher=submitit_slurm hydra.launcher.gpus_per_node=4 num_processes=4 seed=0,1

A launcher starts one task per node, which starts torchrun, which starts `num_processes` on that node. The task waits:
it is the one that hydra knows, and that Slurm signals.
"""

import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence

from omegaconf import DictConfig, ListConfig

from experiments.cli import command_of
from experiments.schema import ConfigError

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
PROGRAM = ("-m", "experiments.run")
SUBMITIT = "hydra_plugins.hydra_submitit_launcher"  # our YAML names it whether it is installed or not
ENDING_SECONDS = 30.0  # that torchrun has to end its processes
FIRST_PORT, NUM_PORTS = 20_000, 20_000  # for the meeting of several nodes
# Children ignore the signal with which Slurm announces the end of a job: this process acts on it and ends them.
WITHOUT_SIGNAL = ("sh", "-c", 'trap "" USR2; exec "$@"', "sh")


def check_launcher(launcher: DictConfig) -> None:
    """Refuses a launcher that cannot start a job here.

    Raises:
        ConfigError: if its plugin is not installed, or if it needs Slurm and there is none.
    """
    target = str(launcher._target_)
    name = target.rsplit(".", 1)[-1]
    if target.startswith(SUBMITIT) and not _is_installed(SUBMITIT):
        raise ConfigError(
            f"hydra/launcher must be one that is installed, got {name} of {SUBMITIT}. Install it with: "
            "pip install 'gradpruner[cluster]'."
        )
    if name == "SlurmLauncher" and shutil.which("sbatch") is None:
        raise ConfigError(
            "hydra/launcher=submitit_slurm needs a machine that submits jobs to Slurm, got no sbatch in PATH. Start "
            "the sweep on a login node of the cluster, or use hydra/launcher=joblib on one machine."
        )


def outlives_sweep(launcher: DictConfig) -> bool:
    """Returns whether jobs go on when the process that started the sweep ends."""
    return str(launcher._target_).endswith(".SlurmLauncher")


def starts_torchrun(cfg: DictConfig) -> bool:
    """Returns whether this process is to start torchrun, rather than to be a process of the run itself.

    Raises:
        ConfigError: if there would be no process.
    """
    if cfg.num_processes < 1:
        raise ConfigError(
            f"num_processes must be 1 or more, got {cfg.num_processes}. Leave it out for a run on one GPU or CPU."
        )
    return cfg.num_processes > 1 and "LOCAL_RANK" not in os.environ and not cfg.dry_run


def run_with_torchrun(overrides: Sequence[str], num_processes: int) -> None:
    """Runs a job on several processes and waits for it; ends them if this process is interrupted.

    Args:
        overrides: arguments of the job.
        num_processes: processes on this node.

    Raises:
        ConfigError: if the machine has fewer GPUs.
        ChildProcessError: if the run failed, with the reason that it gave.
    """
    _check_gpus(num_processes)
    command = [*WITHOUT_SIGNAL, *torchrun_command(overrides, num_processes)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace")
    reason = ""
    assert process.stderr is not None
    with process.stderr as stream:
        try:
            for line in stream:
                sys.stderr.write(line)
                if line.startswith("Error: "):  # as `experiments.run` ends
                    reason = line.removeprefix("Error: ").strip()
            status = process.wait()
        except BaseException:
            _end(process)
            raise
    if status:
        raise ChildProcessError(reason or f"torchrun ended with status {status}: see its output in the log of this job")


def torchrun_command(overrides: Sequence[str], num_processes: int) -> list[str]:
    """Returns the command that runs a job on the processes of this node, and meets the other nodes of a Slurm job."""
    return [
        *TORCHRUN,
        *_meeting(),
        f"--nproc-per-node={num_processes}",
        *PROGRAM,
        *overrides,
        "hydra.mode=RUN",  # a preset of a table says MULTIRUN
    ]


def config_dir_arguments(sources: ListConfig) -> list[str]:
    """Returns the `--config-dir` of a command, if it had one.

    Args:
        sources: where hydra looked for options, its `runtime.config_sources`.
    """
    folders = [str(source.path) for source in sources if source.provider == "command-line"]
    return [f"--config-dir={folder}" for folder in folders]


def _meeting() -> list[str]:
    """Returns how the nodes of a job find each other: torchrun's rendezvous on the first one."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return ["--standalone"]
    import submitit

    job = submitit.JobEnvironment()
    if job.num_nodes == 1:
        return ["--standalone"]
    number = int("".join(filter(str.isdigit, job.job_id)))
    port = FIRST_PORT + number % NUM_PORTS  # two jobs on one node need two
    return [
        f"--nnodes={job.num_nodes}",
        f"--node-rank={job.node}",
        "--rdzv-backend=c10d",
        f"--rdzv-id={job.job_id}",
        f"--rdzv-endpoint={job.hostnames[0]}:{port}",
    ]


def is_first_node() -> bool:
    """Returns whether this task is the one of its job that notes how the job ended."""
    return os.environ.get("SLURM_NODEID", "0") == "0"


def _check_gpus(num_processes: int) -> None:
    import torch

    count = torch.cuda.device_count()
    if 0 < count < num_processes:
        raise ConfigError(
            f"num_processes must be at most the GPUs of a node, got num_processes={num_processes} and {count} visible "
            "GPUs. Lower num_processes, or raise hydra.launcher.gpus_per_node."
        )


def _end(process: "subprocess.Popen[str]") -> None:
    """Ends torchrun, which ends its processes when it is asked to."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(ENDING_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def describe_going_on(submitit_folder: str) -> str:
    """Returns what to do about jobs that go on without the process that started them."""
    return (
        f"\nJobs that Slurm has go on; their logs are in {shlex.quote(submitit_folder)}. `squeue --me` lists them, "
        f"`scancel` ends them, and `{' '.join(command_of('experiments.status'))}` with the same arguments shows what "
        "is done."
    )
