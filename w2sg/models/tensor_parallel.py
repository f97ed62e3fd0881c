"""A frozen model cut over all ranks, which read the same rows together (tensor parallelism, arXiv 1909.08053).

Of each block the linear layers are cut as the plan of its architecture in transformers says: by outputs (``colwise``),
which each rank then has a part of, or by inputs (``rowwise``), whose products are summed over ranks. Embeddings, norms
and the output layer are whole on each. One rank reads the weights, and each is sent its part
(`w2sg.training.sending`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from w2sg.errors import UserError

COLUMNS, ROWS = "colwise", "rowwise"
WHOLE = {"replicated_with_grad_allreduce"}  # layers that a plan names and does not cut


def plan_of(config: Any, role: str, ranks: int) -> dict[str, str]:
    """How the linear layers of a model's body are cut: names with ``*`` for numbers, and `COLUMNS` or `ROWS`.

    Args:
        config: of a text model of transformers. role: of the model, for messages. ranks: that it is cut over.

    Raises:
        UserError: the architecture has no plan, or one with other cuts, or its heads are not divisible.
    """
    remedy = f"use {role}.device_map=auto with trainer.devices=1, or set {role}.tp_plan=null"
    plan = {name: how for name, how in (getattr(config, "base_model_tp_plan", None) or {}).items() if how not in WHOLE}
    if not plan:
        raise UserError(f"{role}.tp_plan: transformers cannot cut a model of type {config.model_type}; {remedy}")
    if other := sorted(set(plan.values()) - {COLUMNS, ROWS}):
        raise UserError(
            f"{role}.tp_plan: the plan for models of type {config.model_type} cuts layers in a way that is not "
            f"supported here ({', '.join(other)}); {remedy}"
        )
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        size = getattr(config, name, None)
        if isinstance(size, int) and size % ranks:
            raise UserError(
                f"{role}.tp_plan: {name}={size} of the model is no multiple of the {ranks} devices; {remedy}"
            )
    return plan


def mark(model: nn.Module, plan: dict[str, str]) -> None:
    """Have a model cut where it is placed."""
    model.tensor_parallel_plan = plan


def parallel(module: nn.Module) -> bool:
    """Whether a model inside is cut over ranks, so that all of them read the same rows."""
    return any(hasattr(part, "tensor_parallel_plan") for part in module.modules())


def layers(model: nn.Module) -> Iterator[tuple[nn.Linear, str]]:
    """The linear layers inside that are cut, and how."""
    for part in model.modules():
        plan = getattr(part, "tensor_parallel_plan", None)
        for name, layer in part.base_model.named_modules() if plan else ():
            how = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
            if how is not None:
                yield layer, how


def cut(model: nn.Module, mesh: DeviceMesh) -> None:
    """Give the weights of `layers`, which have no numbers yet, their cuts; those of a bias follow."""
    for layer, how in layers(model):
        for name, weight in list(layer._parameters.items()):
            if weight is not None:
                dim = 0 if how == COLUMNS else 1
                place = Shard(dim) if weight.ndim > dim else Replicate()
                part = distribute_tensor(weight.detach(), mesh, [place], src_data_rank=None)
                layer._parameters[name] = nn.Parameter(part, weight.requires_grad)


def work_locally(model: nn.Module) -> None:
    """Once weights are there: each rank's parts are its ordinary weights; what is cut by inputs sums its products."""
    for layer, how in layers(model):
        for name, weight in list(layer._parameters.items()):
            if isinstance(weight, DTensor):
                layer._parameters[name] = nn.Parameter(weight.detach().to_local(), weight.requires_grad)
        layer.out_features, layer.in_features = layer.weight.shape
        if how == ROWS:
            bias, layer.bias = layer.bias, None  # added once, and not by each rank
            layer.register_forward_hook(_Sum(bias))


class _Sum:
    """Adds up what ranks have of a product."""

    def __init__(self, bias: Tensor | None):
        self.bias = bias

    def __call__(self, _layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        output = output.contiguous()
        dist.all_reduce(output)
        return output if self.bias is None else output + self.bias.to(output.dtype)


def count_parts(model: nn.Module, ranks: int) -> None:
    """Of a plan: what one device holds of weights that have no numbers."""
    for layer, _ in layers(model):
        layer.weight.bytes_held = layer.weight.numel() * layer.weight.element_size() / ranks
