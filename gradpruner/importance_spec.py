"""Settings of the importance run.

GradPruner (arXiv:2601.19503), Section 3.1. The defaults are those of Appendix C.2.
"""

import importlib.util
import re
from dataclasses import dataclass

from gradpruner.checks import check_above_zero, check_choice
from gradpruner.igia import GRADIENT_ESTIMATES

ADAPTERS = ("lora", "dora", "qlora")
# Name -> peft's value. `mica` freezes B, so B has no gradient; eva, corda, loftq and lora_ga need data first.
LORA_INITS: dict[str, bool | str] = {
    "default": True,
    "gaussian": "gaussian",
    "pissa": "pissa",
    "olora": "olora",
    "orthogonal": "orthogonal",
}
PLAIN_INITS = ("default", "gaussian")  # these leave the base weights unchanged


@dataclass(frozen=True)
class ImportanceSettings:
    """Settings of the importance run except the number of steps; `GradPruner` inherits them.

    Attributes:
        batch_size: rows per batch.
        accumulation: batches per optimizer step.
        learning_rate: constant rate of AdamW. "Early" means that the model has hardly moved, so keep it small.
        lora_rank: rank r of the adapters.
        lora_alpha: alpha of the adapters.
        lora_init: one of `LORA_INITS`.
        adapter: `lora`; `dora`; or `qlora`, LoRA beside weights in 4 bits, which needs bitsandbytes (Table 13).
        max_grad_norm: clips the gradient to this norm before it is captured, as the authors' code does; 0: no clipping.
        gradient_estimate: one of `igia.GRADIENT_ESTIMATES`.
        gradient_checkpointing: recompute activations, which saves memory and costs time.
        seed: seed of the adapters' initial values.
    """

    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 1e-5
    lora_rank: int = 8
    lora_alpha: int = 32
    lora_init: str = "default"
    adapter: str = "lora"
    max_grad_norm: float = 0.0
    gradient_estimate: str = "product"
    gradient_checkpointing: bool = False
    seed: int = 0

    def check_importance_settings(self) -> None:
        """Raises ValueError on values that cannot work."""
        check_choice("adapter", self.adapter, ADAPTERS)
        check_choice("gradient_estimate", self.gradient_estimate, GRADIENT_ESTIMATES)
        if self.lora_init == "mica":
            raise ValueError(
                "lora_init 'mica' freezes B, so there is no gradient of B to watch. "
                f"Use one of {', '.join(LORA_INITS)}."
            )
        if self.lora_init not in LORA_INITS and not re.fullmatch(r"pissa_niter_\d+", self.lora_init):
            raise ValueError(
                f"lora_init must be one of {', '.join(LORA_INITS)} or pissa_niter_<n>, got {self.lora_init!r}."
            )
        if self.adapter == "qlora":
            self._check_qlora()
        check_above_zero(self, "batch_size", "accumulation", "lora_rank", "lora_alpha", "learning_rate")
        if self.max_grad_norm < 0:
            raise ValueError(f"max_grad_norm must be 0 (no clipping) or above, got {self.max_grad_norm}.")

    def _check_qlora(self) -> None:
        if self.lora_init not in PLAIN_INITS:
            raise ValueError(
                f"adapter=qlora has no full weights for an initial value that is made of them, got lora_init="
                f"{self.lora_init!r}. Use one of {', '.join(PLAIN_INITS)}, or adapter=lora."
            )
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError(
                "adapter=qlora needs bitsandbytes for 4-bit weights, got an environment without it. Run "
                "`pip install 'gradpruner[qlora]'`, or use adapter=lora."
            )


@dataclass(frozen=True)
class ImportanceSpec(ImportanceSettings):
    """All settings of an importance run.

    Attributes:
        steps: optimizer steps, at least 2: the first has grad_A = 0 because LoRA's B starts at zero.
    """

    steps: int = 40

    def __post_init__(self) -> None:
        """Raises ValueError on values that cannot work."""
        if self.steps < 2:
            raise ValueError(
                f"The importance run needs at least 2 steps, got steps={self.steps}. LoRA's B starts at zero, so the "
                "gradient of A, and with it Eq. 2, is zero at step 1. Raise method.steps."
            )
        self.check_importance_settings()
