"""LARS as a `torch.optim.Optimizer`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from byol_kernels.derivatives import refuse_transforms
from byol_kernels.ema.ops import check_tau
from byol_kernels.lars.ops import check_hyperparameters
from byol_kernels.layout import same_layout


class LARS(torch.optim.Optimizer):
    """LARS by the rule of BYOL's reference code, for all parameters in two launches and without a host sync.

    Per tensor (google-deepmind/deepmind-research, byol/utils/optimizers.py; LARS: You et al. 2017, arXiv 1708.03888):

        d = g + weight_decay p
        r = trust_coefficient |p| / |d|             (1 where either norm is 0)
        v = momentum v + r d
        p = p - lr v

    Biases and the parameters of normalization layers, which are those of one dimension or none, have d = g and r = 1.

    `step` can also update the target network and write low-precision copies in the same two launches. It can be
    captured into a CUDA graph once one step has run; lr and tau as 0-dim tensors on the device are then read at every
    replay. With `torch.amp.GradScaler` the unscaling and the skipping of a step happen on the device.

    The attribute `found_inf` (set by `GradScaler` or by the training loop) is None or a float32 flag on the device of
    the parameters, an input and an output. A step sets it to 1 if any gradient, before unscaling, has an infinity or a
    NaN; the launch that computes the norms finds them, so no separate pass over the gradients is needed. If the flag
    is not 0 then or was not on entry, the step writes nothing else. It is never reset to 0. None: no check.

    Args:
        params: parameters, or groups of them with their own lr, momentum, weight_decay, trust_coefficient or
            exclude_1d. They are floating point, dense, on one device. Momentum has the dtype of its parameter; the
            arithmetic is in float32, or in float64 for float64 parameters (norms and scalars are float32 on a GPU all
            the same). Norms are right for all normal float32 numbers; the ratio r has to be one too.
        lr: learning rate; a float, or a 0-dim tensor (float32 if it is on a GPU). A tensor on a GPU cannot raise: one
            that is NaN, infinite or negative skips the step, as `found_inf` does.
        momentum: decay of the momentum.
        weight_decay: L2 penalty, added to the gradient.
        trust_coefficient: of the ratio r.
        exclude_1d: leave tensors of one dimension or none out of weight decay and adaptation.

    Raises:
        ValueError: on hyperparameters out of range, or parameters that are not floating point.
    """

    _step_supports_amp_scaling = True  # GradScaler then hands over grad_scale and found_inf instead of acting on them
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        *,
        exclude_1d: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "exclude_1d": exclude_1d,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Check the hyperparameters of a group and add it."""
        group = {**self.defaults, **param_group}
        lr = group["lr"]
        if isinstance(lr, Tensor) and (
            lr.dim() != 0 or not lr.is_floating_point() or (lr.device.type == "cuda" and lr.dtype != torch.float32)
        ):
            raise ValueError(
                f"LARS: lr must be a number or a 0-dim tensor (float32 on a GPU), got shape {tuple(lr.shape)} of "
                f"{lr.dtype} on {lr.device}; make it with torch.tensor(0.2, device='cuda')"
            )
        check_hyperparameters(
            "LARS",
            0.0 if isinstance(lr, Tensor) else lr,
            group["momentum"],
            group["weight_decay"],
            group["trust_coefficient"],
        )
        super().add_param_group(param_group)
        for index, p in enumerate(self.param_groups[-1]["params"]):
            if not p.is_floating_point():
                del self.param_groups[-1]
                raise ValueError(
                    f"LARS: params[{index}] must be floating point, got {p.dtype}; leave integer tensors out"
                )

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        ema: tuple[Iterable[Tensor | None] | Mapping[Tensor, Tensor], float | Tensor] | None = None,
        copies: Iterable[Tensor | None] | Mapping[Tensor, Tensor] | None = None,
    ) -> Any:
        """One step; optionally the target's EMA and low-precision copies in the same two launches.

        Parameters without a gradient stay as they are; their targets and copies are written all the same. With a
        `found_inf` flag (see the class) that is not 0, or that an infinity or a NaN in a gradient sets to 1, nothing
        else is written, targets and copies included.

        Args:
            closure: evaluates the model again and returns the loss.
            ema: (targets, tau): afterwards target = tau * target + (1 - tau) * parameter, as `ema_update_`, float32 or
                float64. A tau on a GPU is clamped to [0, 1], and if it is NaN, the whole step is skipped. Targets
                are a mapping from parameter to target, or one entry per parameter in the order of `param_groups`, None
                for a parameter without a target (the predictor's).
            copies: where to write the updated weights in another dtype: a mapping from parameter or target to its
                copy, or one entry per parameter, None for no copy.

        Returns:
            The closure's result, or None.

        Raises:
            ValueError: on targets or copies that do not fit their parameters, or that share memory with anything
                else of the step; on a `found_inf` that is not one float32 number on their device; on hyperparameters
                out of range that are numbers or on the CPU. Nothing has been written then.
            RuntimeError: if the first step is being captured into a CUDA graph.
            NotImplementedError: within `torch.func` and forward-mode differentiation.
        """
        refuse_transforms("LARS.step")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        params = [p for group in self.param_groups for p in group["params"]]
        if not params:
            return loss
        target_of, tau_tensor, tau = {}, None, 1.0
        if ema is not None:
            target_of = _by_partner("ema targets", ema[0], params, params)
            tau_tensor, tau = check_tau("LARS.step", ema[1])
        copy_of = _by_partner("copies", copies, params, [*params, *target_of.values()]) if copies is not None else {}

        # --- lists of what there is, and the rows they belong to
        ids = [*map(id, params)]
        grad_rows, grads = _present([p.grad for p in params])
        target_rows, targets = _present([target_of.get(i) for i in ids])
        param_copy_rows, param_copies = _present([copy_of.get(i) for i in ids])
        target_copy_rows, target_copies = _present([copy_of.get(id(target_of.get(i))) for i in ids])
        for row, grad in zip(grad_rows, grads, strict=True):
            if grad.layout != torch.strided:
                raise ValueError(
                    f"LARS.step: the gradient of params[{row}] must be dense, got {grad.layout}; "
                    "make the embedding with sparse=False"
                )
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None:
            _check_found_inf(found_inf, params[0].device)
        groups = self.param_groups
        group_of = [g for g, group in enumerate(groups) for _ in group["params"]]
        torch.ops.byol_kernels.lars_step_.default(
            params,
            grads,
            [self._momentum_buffer(params[row]) for row in grad_rows],
            grad_rows,
            targets,
            target_rows,
            param_copies,
            param_copy_rows,
            target_copies,
            target_copy_rows,
            group_of,
            [p.dim() > 1 or not groups[g]["exclude_1d"] for g, p in zip(group_of, params, strict=True)],
            [group["lr"] if isinstance(group["lr"], Tensor) else None for group in groups],
            [0.0 if isinstance(group["lr"], Tensor) else float(group["lr"]) for group in groups],
            *([float(group[name]) for group in groups] for name in ("momentum", "weight_decay", "trust_coefficient")),
            tau_tensor,
            tau,
            getattr(self, "grad_scale", None),
            found_inf,
        )
        return loss

    def _momentum_buffer(self, param: Tensor) -> Tensor:
        """The momentum of a parameter, in the parameter's layout; a checkpoint may have another one."""
        state = self.state[param]
        buffer = cast("Tensor | None", state.get("momentum_buffer"))
        if buffer is None or not same_layout(buffer, param):
            if param.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "LARS.step: momentum must exist before a CUDA graph is captured, got a first step within the "
                    "capture; run one step before it"
                )
            laid_out = torch.zeros_like(param, memory_format=torch.preserve_format)
            buffer = state["momentum_buffer"] = laid_out if buffer is None else laid_out.copy_(buffer)
        return buffer


def _check_found_inf(found_inf: Tensor, device: torch.device) -> None:
    if found_inf.numel() != 1 or found_inf.dtype != torch.float32 or found_inf.device != device:
        raise ValueError(
            f"LARS.step: found_inf must be one float32 number on {device}, where the parameters are, got shape "
            f"{tuple(found_inf.shape)} of {found_inf.dtype} on {found_inf.device}; make it with "
            f"torch.zeros((), device='{device}')"
        )


def _by_partner(
    name: str,
    entries: Iterable[Tensor | None] | Mapping[Tensor, Tensor],
    params: Sequence[Tensor],
    partners: Sequence[Tensor],
) -> dict[int, Tensor]:
    """Map the `id` of a tensor to its entry."""
    if isinstance(entries, Mapping):
        known = set(map(id, partners))
        for key in entries:
            if id(key) not in known:
                raise ValueError(
                    f"LARS.step: {name} must map tensors of this step, got a key of shape {tuple(key.shape)} that is "
                    "none of them; take the keys from the optimizer's param_groups"
                )
        return {id(key): entry for key, entry in entries.items()}
    listed = list(entries)
    if len(listed) != len(params):
        raise ValueError(
            f"LARS.step: {name} must have one entry for each of the {len(params)} parameters, got {len(listed)}; "
            "put None where a parameter has none, or pass a mapping from parameter to entry"
        )
    return {id(p): entry for p, entry in zip(params, listed, strict=True) if entry is not None}


def _present(entries: Iterable[Tensor | None]) -> tuple[list[int], list[Tensor]]:
    """Rows that have an entry, and the entries."""
    present = [(row, entry) for row, entry in enumerate(entries) if entry is not None]
    return [row for row, _ in present], [entry for _, entry in present]
