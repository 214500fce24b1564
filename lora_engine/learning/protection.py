"""What a training pipeline asks of EWC, and nothing where there is none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_engine.learning.ewc import EWC
from lora_engine.learning.training_config import TrainingConfig

if TYPE_CHECKING:
    from lora_engine.adapters.micro_lora import MicroLoRA, _Module


def _new_ewc(lora: MicroLoRA, config: TrainingConfig) -> Any:
    make: Any = EWC
    return make(
        lora,
        ewc_lambda=config.ewc_lambda,
        gamma=config.online_ewc_gamma,
        form=config.ewc_form,
        fisher_samples=config.fisher_samples,
    )


class Protection:
    """EWC over the modules of a MicroLoRA; without an ewc_lambda no call does anything."""

    def __init__(self, lora: MicroLoRA, config: TrainingConfig) -> None:
        self.ewc = _new_ewc(lora, config) if config.ewc_lambda else None

    def of(self, m: _Module) -> Any:
        """The penalty in a step of a module, None without one."""
        return None if self.ewc is None else self.ewc._pools[m.pool]

    def observe(self, x: Any, grad: Any, module: str) -> None:
        """Samples of the present task, a row each."""
        if self.ewc is not None:
            self.ewc.observe(x, grad, module)

    def consolidate(self) -> bool:
        """Ends the task; whether anything of it was consolidated."""
        return self.ewc is not None and bool(self.ewc.consolidate().consolidated)

    def state(self) -> dict[str, Any]:
        """Records, anchors and the average within the task."""
        return {} if self.ewc is None else dict(self.ewc.state())

    def load_state(self, state: dict[str, Any]) -> None:
        """What ``state`` gave. A record is of the weights in a slot, so weights come first."""
        if self.ewc is not None:
            self.ewc.load_state(state)
