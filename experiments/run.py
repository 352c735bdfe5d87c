"""Run one experiment, or a sweep with -m.

    python -m experiments.run experiment=quickstart
    python -m experiments.run -m sparsity=0.2,0.3,0.4 merge_count=0,1,3
    torchrun --nproc-per-node=4 -m experiments.run finetune=full

Composes the config. `experiments.job` does the rest, and is imported only then: torch and transformers take seconds to
import, for which nobody should wait to learn of a typo.
"""

import gc

import hydra
from omegaconf import DictConfig

from experiments.command_line import run_command
from experiments.config import CONF
from gradpruner import processes


def main() -> None:
    """Runs the command."""
    try:
        run_command(hydra_job, "config", "experiments.run")
    finally:
        processes.finish()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def hydra_job(cfg: DictConfig) -> None:
    """Runs one job of hydra's."""
    gc.disable()  # what imports make stays: looking through it for garbage takes a second now and in every collection
    from experiments.job import run_hydra_job

    gc.freeze()
    gc.enable()
    run_hydra_job(cfg)


if __name__ == "__main__":
    main()
