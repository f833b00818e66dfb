"""Optimisers: which parameters each one owns, and how their state is named.

What belongs here: grouping, construction and naming. Imports ``errors``, ``config``.

Design: every parameter belongs to exactly one optimiser and one group, or we raise. State is named by
the parameter it serves, so a checkpoint reads like the model and not like a list of numbers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pocketlm.config import OptimizerConfig
from pocketlm.errors import ConfigError


class Optimizers:
    """AdamW, or Muon beside AdamW, stepped as one.

    Matrices and embeddings are decayed, vectors (norms, biases) never (Radford et al., 2019; nanoGPT).
    With Muon the matrices inside the blocks are orthogonalised (Jordan et al., 2024) with the
    update scaled to AdamW's root mean square (Liu et al., 2025, "Muon is scalable"), so one learning rate serves both.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self.names: dict[Tensor, str] = {p: name for name, p in model.named_parameters() if p.requires_grad}
        matrices = {p for p in self.names if p.ndim >= 2}
        vectors = [p for p in self.names if p not in matrices]
        muon = config.name == "muon"
        hidden = [p for p, name in self.names.items() if muon and p in matrices and name.startswith("blocks.")]
        others = [p for p in self.names if p in matrices.difference(hidden)]
        device = next(iter(self.names)).device
        groups = [
            {"params": others, "weight_decay": config.weight_decay, "decayed": True},
            {"params": vectors, "weight_decay": 0.0, "decayed": False},
        ]
        adamw = torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=device.type in ("cuda", "cpu"),
        )
        self.parts: list[torch.optim.Optimizer] = [adamw]
        if hidden:
            if not hasattr(torch.optim, "Muon"):
                raise ConfigError(f"optimizer.name is muon, which torch {torch.__version__} lacks: use adamw")
            muons = [{"params": hidden, "decayed": True}]
            self.parts.append(
                torch.optim.Muon(muons, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
            )
        owned = [p for part in self.parts for group in part.param_groups for p in group["params"]]
        assert len(owned) == len(set(owned)) == len(self.names), "every parameter has one optimiser"

    def configure(self, config: OptimizerConfig, lr: float) -> None:
        """Put these settings, and ``lr`` at this step, in force for the next step."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
                group["weight_decay"] = config.weight_decay if group["decayed"] else 0.0
                if "betas" in group:
                    group["betas"], group["eps"] = (config.beta1, config.beta2), config.eps

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """State as ``{parameter name}/{state name}`` -> tensor."""
        state: dict[str, Tensor] = {}
        for part in self.parts:
            for parameter, values in part.state.items():
                for key, value in values.items():
                    state[f"{self.names[parameter]}/{key}"] = torch.as_tensor(value)
        return state

    def load_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Put back what ``tensors`` gave. Learning rate and decay stay as they are configured now."""
        by_name: dict[str, dict[str, Tensor]] = {}
        for full, value in state.items():
            name, _, key = full.rpartition("/")
            by_name.setdefault(name, {})[key] = value
        for part in self.parts:
            for group in part.param_groups:
                for parameter in group["params"]:
                    found = by_name.get(self.names[parameter], {})
                    # AdamW keeps its step count on the CPU unless it is fused or capturable.
                    on_device = group.get("fused") or group.get("capturable")
                    part.state[parameter] = {
                        key: value.to(parameter.device if key != "step" or on_device else "cpu", copy=True)
                        for key, value in found.items()
                    }
