"""What the configuration of a run promises."""

from dataclasses import dataclass

from torch import Tensor

from stackproof.config import AdamW, Muon, RunConfig
from stackproof.contracts.subject import Architecture, Declared, Schedule, UpdateLaw
from stackproof.spec.formulas import parameter_count
from stackproof.train import device


@dataclass(frozen=True)
class RunDeclared(Declared):
    """The promises of a configuration, for a vocabulary of this size."""

    cfg: RunConfig
    vocab_size: int

    @property
    def seed(self) -> int:
        return self.cfg.seed

    @property
    def architecture(self) -> Architecture:
        return self.cfg.model.model_dump()

    @property
    def n_parameters(self) -> int:
        return parameter_count(self.architecture, self.vocab_size)

    @property
    def tied_head(self) -> bool:
        return self.cfg.model.tied_head

    @property
    def dtype(self) -> str:
        return self.cfg.train.dtype

    @property
    def schedule(self) -> Schedule:
        return self.cfg.schedule.model_dump()

    @property
    def max_steps(self) -> int:
        return self.cfg.train.max_steps

    @property
    def tokens_per_step(self) -> int:
        return self.cfg.train.tokens_per_step

    @property
    def max_grad_norm(self) -> float:
        return self.cfg.optim.max_grad_norm

    def update_law(self, name: str, parameter: Tensor) -> UpdateLaw:
        """From the parameter's shape and place, not from the optimizer's own table."""
        optim = self.cfg.optim
        decay = {"weight_decay": optim.weight_decay if parameter.ndim >= 2 else 0.0}
        in_block = parameter.ndim == 2 and name.startswith("layers.") and ".router." not in name
        match optim:
            case Muon() if in_block:
                settings = optim.model_dump(include=set(UpdateLaw.__annotations__))
                return settings | {"rule": "muon"} | decay
            case Muon(adamw_lr=lr) | AdamW(lr=lr):
                betas = {"betas": (optim.beta1, optim.beta2), "eps": optim.eps}
                return {"rule": "adamw", "lr": lr} | betas | decay
        raise NotImplementedError(f"stack/subject/declared.py has no law of {type(optim).__name__}")

    @property
    def flops_per_step(self) -> float:
        return device.flops_per_step(self.cfg, self.vocab_size)

    @property
    def attention_flops_per_step(self) -> float:
        return device.attention_flops_per_step(self.cfg, self.vocab_size)
