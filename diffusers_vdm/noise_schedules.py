"""Noise schedules: maps t ∈ [0, 1] → γ(t) = −log SNR(t), increasing by construction.

γ **grows with t**: t = 0 is nearly clean data, t = 1 nearly pure noise. A *schedule* is this map; a *scheduler*
(schedulers.py) is the sampler that uses it. γ is computed in float64 whatever the type of the parameters, and casting
a pipeline to half precision does not cast them.

Papers: VDM = Kingma et al. 2021 (arXiv 2107.00630); DDPM = Ho et al. 2020 (arXiv 2006.11239).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  diffusers looks for this name in the module
from diffusers.utils import is_accelerate_available
from torch import nn

from .diffusion import gamma_of_timestep, gammas_from_betas, linear_betas, prior_kl_nats, to_high_precision
from .pchip import pchip, pchip_slopes
from .whole_models import WholeModelMixin

# prior KL in bits/dim above which sampling starts from noise that training never saw
PRIOR_KL_WARNING_BPD = 0.01
# values of `device_map` that are strategies, not devices
_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
_EMPTY_LOADING_INFO = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}


@dataclass(frozen=True)
class ScheduleSummary:
    """The ends of a noise schedule in the units of the papers.

    γ at t = 0 and 1 (log SNR is −γ); ᾱ_T = α² at t = 1, the fraction of the data's power that remains there; and the
    prior KL(q(z_1|x) ‖ N(0, I)) in bits per dimension for data with E[x²] = `data_power`.
    """

    gamma_0: float
    gamma_1: float
    alpha_bar_1: float
    data_power: float
    prior_kl_bpd: float

    @property
    def log_snr_range(self) -> tuple[float, float]:
        """`(smallest, largest)` log SNR."""
        return -self.gamma_1, -self.gamma_0

    def __str__(self) -> str:
        return (
            f"log SNR {-self.gamma_0:.3f} … {-self.gamma_1:.3f}, alpha_bar_T {self.alpha_bar_1:.3e}, "
            f"prior KL {self.prior_kl_bpd:.3e} bits/dim (E[x²] = {self.data_power:g})"
        )


class NoiseSchedule(WholeModelMixin, ConfigMixin):
    """Base class of the schedules; a subclass defines `gamma_and_slope(t)` and `ends()`."""

    _has_parameters = True
    _place = torch.device("cpu")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As [`ModelMixin.from_pretrained`]; a schedule without parameters has only a config and no weight file."""
        if cls._has_parameters:
            if not is_accelerate_available():  # diffusers would create the parameters in that dtype
                kwargs = {name: value for name, value in kwargs.items() if name not in ("dtype", "torch_dtype")}
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        wants_info, device_map = kwargs.pop("output_loading_info", False), kwargs.pop("device_map", None)
        config, _ = cls.load_config(pretrained_model_name_or_path, return_unused_kwargs=True, **kwargs)
        schedule: Any = cls.from_config(config)
        schedule.eval()
        place = device_map.get("") if isinstance(device_map, dict) else device_map
        if place is not None and place not in (*_STRATEGIES, "disk"):
            schedule.to(place)
        return (schedule, dict(_EMPTY_LOADING_INFO)) if wants_info else schedule

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs: bool = False, **kwargs):
        """As [`ConfigMixin.from_config`], keeping every value in the file; `ValueError` for another class's config."""
        name = config.get("_class_name", cls.__name__) if isinstance(config, dict) else cls.__name__
        if name != cls.__name__:
            raise ValueError(f"this is the config of a {name}; load it with {name}, not with {cls.__name__}.")
        return super().from_config(as_written(config), return_unused_kwargs=return_unused_kwargs, **kwargs)

    def ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        """γ(0) and γ(1), float64 tensors of shape `()`, differentiable where they are learned."""
        raise NotImplementedError(f"{type(self).__name__} must define ends().")

    def gamma_and_slope(
        self, t: torch.Tensor, scale_shape_grad: Callable[[], torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """γ(t) and dγ/dt, float64, of the shape of `t`.

        Args:
            t (`torch.Tensor`): times in [0, 1], any shape.
            scale_shape_grad (`Callable`, *optional*): called in the backward pass; its result, of the shape of `t`,
                multiplies the gradient of the parameters of the *interior* of γ, if it has any, and leaves the
                gradient of the ends unchanged (see `VariationalBound`).
        """
        raise NotImplementedError(f"{type(self).__name__} must define gamma_and_slope().")

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """γ(t), float64, of the shape of `t` ∈ [0, 1]; `ValueError` for a Python number out of range."""
        return self.gamma_and_slope(self._times(t))[0]

    def slope(self, t: torch.Tensor) -> torch.Tensor:
        """dγ/dt ≥ 0, float64, of the shape of `t` ∈ [0, 1]."""
        return self.gamma_and_slope(self._times(t))[1]

    @torch.no_grad()
    def inverse(self, gamma: torch.Tensor) -> torch.Tensor:
        """t with γ(t) = `gamma` of any shape, by bisection to float64 precision.

        Raises: `ValueError` if any `gamma` is outside [γ(0), γ(1)].
        """
        gamma = torch.as_tensor(gamma, dtype=torch.float64, device=self._device())
        gamma_0, gamma_1 = self.ends()
        if not bool(((gamma >= gamma_0) & (gamma <= gamma_1)).all()):
            raise ValueError(
                f"gamma must be within [{float(gamma_0):.6g}, {float(gamma_1):.6g}], the range of this schedule, "
                f"got values from {float(gamma.min()):.6g} to {float(gamma.max()):.6g}."
            )
        low, high = torch.zeros_like(gamma), torch.ones_like(gamma)
        for _ in range(60):
            middle = 0.5 * (low + high)
            above = self.forward(middle) > gamma
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return torch.where(gamma == gamma_1, 1.0, torch.where(gamma == gamma_0, 0.0, 0.5 * (low + high)))

    def timestep(self, t: torch.Tensor | None, gamma_t: torch.Tensor) -> torch.Tensor:
        """The timestep that conditions the network: `num_train_timesteps` · (γ − γ_min)/(γ_max − γ_min).

        γ_min and γ_max are the *configured* ends, as in the official network, even if the ends are learned. `t` may be
        `None` if only γ is known.
        """
        low, high = self.config.gamma_min, self.config.gamma_max
        return self.config.num_train_timesteps * (gamma_t - low) / (high - low)

    def gamma_of_timestep(self, timesteps: torch.Tensor | float) -> torch.Tensor:
        """γ of a timestep of the network, the inverse of `timestep`; float64, of the shape of `timesteps`.

        The result may lie outside [γ(0), γ(1)] if the configured ends are further apart.
        """
        ends = (self.config.gamma_min, self.config.gamma_max)
        return gamma_of_timestep(_in_float64(timesteps), *ends, self.config.num_train_timesteps)

    @torch.no_grad()
    def table(self, num_knots: int = 1025) -> torch.Tensor:
        """γ at `num_knots` equidistant times from 0 to 1, float64 on the CPU, shape `(num_knots,)`."""
        return self.forward(torch.linspace(0, 1, num_knots, dtype=torch.float64, device=self._device())).cpu()

    @torch.no_grad()
    def describe(self, data_power: float = 0.25) -> ScheduleSummary:
        """ᾱ at t = 1, the log-SNR range, and the prior KL for data with E[x²] = `data_power` (CIFAR-10: 0.25).

        Warns (`UserWarning`) if the prior KL is above 0.01 bits/dim: z_1 then still contains information about x.
        """
        if not 0 <= data_power <= 1:
            raise ValueError(f"data_power, E[x²] of data in [−1, 1], must be within [0, 1], got {data_power}.")
        gamma_0, gamma_1 = (end.cpu() for end in self.ends())
        x = torch.tensor([math.sqrt(data_power)], dtype=torch.float64)
        prior_kl_bpd = float(prior_kl_nats(x, gamma_1)) / math.log(2)
        alpha_bar_1 = float(torch.sigmoid(-gamma_1))
        summary = ScheduleSummary(float(gamma_0), float(gamma_1), alpha_bar_1, data_power, prior_kl_bpd)
        if summary.prior_kl_bpd > PRIOR_KL_WARNING_BPD:
            warnings.warn(
                f"The prior KL of this {type(self).__name__} is {summary.prior_kl_bpd:.3g} bits/dim, above "
                f"{PRIOR_KL_WARNING_BPD}: at t = 1 a fraction {summary.alpha_bar_1:.3g} of the data's power remains, "
                "so sampling starts from noise that training never saw. Raise gamma_max, or the betas.",
                stacklevel=3,  # past the no_grad wrapper, at the caller
            )
        return summary

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters; float32 without parameters, where diffusers' property fails."""
        return next((p.dtype for p in self.parameters()), torch.float32)

    @property
    def device(self) -> torch.device:
        """Device of the parameters; without parameters, the device that the schedule was last moved to."""
        return super().device if self._has_parameters else self._place

    def _device(self) -> torch.device:
        """The device for times that are Python numbers; schedules without parameters keep their tables on the CPU."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    @staticmethod
    def _times(t: torch.Tensor | float) -> torch.Tensor:
        if not torch.is_tensor(t):
            if not 0 <= t <= 1:
                raise ValueError(f"t must be within [0, 1], got {t}.")
            t = torch.tensor(t, dtype=torch.float64)
        return to_high_precision(t)

    def _apply(self, fn, recurse=True):
        # `.to(bfloat16)` of a pipeline would move γ(1) from 11.30 to 11.25: change the device, not the precision
        def keep_digits(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            too_low = moved.is_floating_point() and moved.element_size() < 4
            return tensor.to(moved.device) if too_low else moved

        if not self._has_parameters:
            self._place = _moved(self._place, fn)
        return super()._apply(keep_digits, recurse)


def _in_float64(numbers: torch.Tensor | float) -> torch.Tensor:
    """A tensor or Python number in float64; PyTorch by default rounds a Python number to float32."""
    return to_high_precision(numbers if torch.is_tensor(numbers) else torch.tensor(numbers, dtype=torch.float64))


def _moved(place: torch.device, fn: Callable[[torch.Tensor], torch.Tensor]) -> torch.device:
    """The device to which `fn`, a function for `nn.Module._apply`, moves a tensor on `place`."""
    try:
        return fn(torch.empty(0, device=place)).device
    except NotImplementedError:  # a meta tensor has no data to copy
        return fn(torch.empty(0)).device


def as_written(config):
    """A config without diffusers' list of default values, which also lists positional arguments and so drops them."""
    return {k: v for k, v in config.items() if k != "_use_default_values"} if isinstance(config, dict) else config


def check_ends(gamma_min: float, gamma_max: float) -> None:
    """Raises `ValueError` unless both are finite and γ_min < γ_max."""
    if not (math.isfinite(gamma_min) and math.isfinite(gamma_max) and gamma_min < gamma_max):
        raise ValueError(
            f"gamma_min must be below gamma_max, both finite (gamma = −log SNR grows with the noise), got "
            f"gamma_min={gamma_min}, gamma_max={gamma_max}; the paper's CIFAR-10 values are -13.3 and 5."
        )


def check_num_train_timesteps(num_train_timesteps: int) -> None:
    """Raises `ValueError` unless it is a positive integer."""
    if not isinstance(num_train_timesteps, int) or num_train_timesteps < 1:
        raise ValueError(f"num_train_timesteps must be an integer of at least 1, got {num_train_timesteps!r}.")


def _if_accelerate(names: list[str]) -> list[str] | None:
    """`names`, to be loaded in float32; `None` without accelerate, where diffusers rejects the option."""
    return names if is_accelerate_available() else None


class _StraightLine(NoiseSchedule):
    """Base class of schedules that are a straight line between their ends, fixed or learned."""

    def gamma_and_slope(self, t, scale_shape_grad=None):
        gamma_0, gamma_1 = self.ends()
        return torch.lerp(gamma_0.to(t), gamma_1.to(t), t), (gamma_1 - gamma_0).to(t).expand(t.shape)

    def table(self, num_knots: int = 2) -> torch.Tensor:
        """As [`NoiseSchedule.table`]; two knots are exact for a straight line."""
        return super().table(num_knots)


class FixedLinearGamma(_StraightLine):
    """γ(t) = γ_min + (γ_max − γ_min) t, without parameters [VDM's fixed linear schedule].

    Args:
        gamma_min, gamma_max (`float`, default to −13.3 and 5.0): γ(0) and γ(1).
        num_train_timesteps (`int`, defaults to 1000): scale of the network's timestep.
    """

    _has_parameters = False

    @register_to_config
    def __init__(self, gamma_min: float = -13.3, gamma_max: float = 5.0, num_train_timesteps: int = 1000):
        super().__init__()
        check_ends(gamma_min, gamma_max)
        check_num_train_timesteps(num_train_timesteps)

    def ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        gamma_0, gamma_1 = (
            torch.tensor(g, dtype=torch.float64) for g in (self.config.gamma_min, self.config.gamma_max)
        )
        return gamma_0, gamma_1


class LearnedLinearGamma(_StraightLine):
    """γ(t) = b + |w| t with learned ends, the official code's `learnable_scalar` [VDM §3.2].

    The arguments are those of [`FixedLinearGamma`]; γ_min and γ_max are the initial ends, and always scale the
    timestep.
    """

    _keep_in_fp32_modules = _if_accelerate(["bias", "weight"])

    @register_to_config
    def __init__(self, gamma_min: float = -13.3, gamma_max: float = 5.0, num_train_timesteps: int = 1000):
        super().__init__()
        check_ends(gamma_min, gamma_max)
        check_num_train_timesteps(num_train_timesteps)
        self.bias = nn.Parameter(torch.tensor([float(gamma_min)]))
        self.weight = nn.Parameter(torch.tensor([float(gamma_max) - float(gamma_min)]))

    def ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        return _learned_ends(self.bias, self.weight)


class MonotoneGammaNetwork(NoiseSchedule):
    """γ(t) from a monotone network 1 → hidden → 1, normalized so that its ends are exactly γ_0 and γ_1 [VDM app. H].

    f(t) = t + (1/n) Σ_j |a_j| 2 sigmoid(|w_j| (2t − 1) + b_j)
    γ(t) = γ_0 + (γ_1 − γ_0) (f(t) − f(0))/(f(1) − f(0))

    The linear term of f has weight one, because the normalization cancels a common factor; it keeps the slope positive
    for any parameters. The published code does not normalize, so its ends drift from the values that scale the time
    embedding.

    Args:
        gamma_min, gamma_max (`float`, default to −13.3 and 5.0):
            the ends, or with `learn_ends` their initial values; they also scale the network's timestep.
        hidden_dim (`int`, defaults to 1024): n, the number of hidden units.
        learn_ends (`bool`, defaults to `False`): also train γ_0 and γ_1 = γ_0 + |w|.
        num_train_timesteps (`int`, defaults to 1000): scale of the network's timestep.
    """

    _keep_in_fp32_modules = _if_accelerate(["bias", "weight", "hidden_weight", "hidden_bias", "output_weight"])

    @register_to_config
    def __init__(
        self,
        gamma_min: float = -13.3,
        gamma_max: float = 5.0,
        hidden_dim: int = 1024,
        learn_ends: bool = False,
        num_train_timesteps: int = 1000,
    ):
        super().__init__()
        check_ends(gamma_min, gamma_max)
        check_num_train_timesteps(num_train_timesteps)
        if hidden_dim < 1:
            raise ValueError(f"hidden_dim must be at least 1, got {hidden_dim}.")
        if learn_ends:
            self.bias = nn.Parameter(torch.tensor([float(gamma_min)]))
            self.weight = nn.Parameter(torch.tensor([float(gamma_max) - float(gamma_min)]))
        # equal units spread evenly over t: γ starts nearly straight, and each unit can bend its own part
        steepness = 8.0
        centers = (torch.arange(hidden_dim) + 0.5) / hidden_dim
        self.hidden_weight = nn.Parameter(torch.full((hidden_dim,), steepness))
        self.hidden_bias = nn.Parameter(-steepness * (2 * centers - 1))
        self.output_weight = nn.Parameter(torch.full((hidden_dim,), 0.1))

    def ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.config.learn_ends:
            return _learned_ends(self.bias, self.weight)
        ends = (self.config.gamma_min, self.config.gamma_max)
        # filled there: a copy of the numbers to a GPU would wait for it
        gamma_0, gamma_1 = (torch.full((), g, dtype=torch.float64, device=self._device()) for g in ends)
        return gamma_0, gamma_1

    def gamma_and_slope(self, t, scale_shape_grad=None):
        unit, unit_slope = self._unit(t)
        if scale_shape_grad is not None and unit.requires_grad:
            unit.register_hook(lambda grad: grad * scale_shape_grad())
            unit_slope.register_hook(lambda grad: grad * scale_shape_grad())
        gamma_0, gamma_1 = self.ends()
        return torch.lerp(gamma_0, gamma_1, unit), (gamma_1 - gamma_0) * unit_slope

    def _unit(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(f(t) − f(0))/(f(1) − f(0)) and its derivative."""
        w, b, a = (to_high_precision(p) for p in (self.hidden_weight, self.hidden_bias, self.output_weight))
        w, a = w.abs(), 2 * a.abs() / len(a)
        at_0, at_1 = torch.sigmoid(b - w), torch.sigmoid(b + w)
        span = 1 + (a * (at_1 - at_0)).sum()
        at_t = torch.sigmoid(w * (2 * t[..., None] - 1) + b)
        unit = (t + (a * (at_t - at_0)).sum(-1)) / span
        # exact ends despite the rounding of the sums: the first step of a T-step bound must end at γ(0) itself
        unit = torch.where(t <= 0, 0.0, torch.where(t >= 1, 1.0, unit))
        return unit, (1 + (a * 2 * w * at_t * (1 - at_t)).sum(-1)) / span


class TableGamma(NoiseSchedule):
    """γ(t) through a table of values at equidistant times, by monotone cubic interpolation (PCHIP). No parameters.

    Args:
        gammas (`Sequence[float]`): increasing values of γ at t = 0, 1/(n − 1), …, 1; at least two.
        gamma_min, gamma_max (`float`, *optional*, default to the ends of `gammas`): scale of the network's timestep.
        num_train_timesteps (`int`, defaults to 1000): scale of the network's timestep.
    """

    _has_parameters = False

    @register_to_config
    def __init__(
        self,
        gammas: Sequence[float],
        gamma_min: float | None = None,
        gamma_max: float | None = None,
        num_train_timesteps: int = 1000,
    ):
        super().__init__()
        self._set_table(torch.as_tensor(gammas, dtype=torch.float64))
        check_num_train_timesteps(num_train_timesteps)
        ends = {
            "gamma_min": float(self._gammas[0]) if gamma_min is None else gamma_min,
            "gamma_max": float(self._gammas[-1]) if gamma_max is None else gamma_max,
        }
        check_ends(**ends)
        self.register_to_config(gammas=self._gammas.tolist(), **ends)

    def _set_table(self, gammas: torch.Tensor) -> None:
        check_gamma_table(gammas)
        # plain attributes, not buffers, so that no cast or state dict changes them
        self._gammas = gammas
        self._knot_slopes = pchip_slopes(gammas)

    def ends(self):
        return self._gammas[0], self._gammas[-1]

    def table(self, num_knots: int | None = None) -> torch.Tensor:
        """The knots of this table, or γ at `num_knots` times; see [`NoiseSchedule.table`]."""
        return self._gammas.clone() if num_knots is None else super().table(num_knots)

    def gamma_and_slope(self, t, scale_shape_grad=None):
        return pchip(self._gammas.to(t), self._knot_slopes.to(t), t)


class BetaGamma(TableGamma):
    """γ_i = log((1 − ᾱ_i)/ᾱ_i), ᾱ_i = Π_{j ≤ i} (1 − β_j), of any betas, at t = i/(T − 1); the timestep is i.

    Args:
        betas (`Sequence[float]`): T numbers in (0, 1), at least two.
    """

    @register_to_config
    def __init__(self, betas: Sequence[float]):
        NoiseSchedule.__init__(self)
        self._set_table(gammas_from_betas(torch.as_tensor(betas, dtype=torch.float64)))

    def timestep(self, t: torch.Tensor | None, gamma_t: torch.Tensor) -> torch.Tensor:
        """DDPM's index i = t (T − 1), a fractional number between two indices. Shape of `gamma_t`."""
        t = self.inverse(gamma_t) if t is None else t
        return t * (len(self._gammas) - 1)

    def gamma_of_timestep(self, timesteps: torch.Tensor | float) -> torch.Tensor:
        """γ of an index, interpolated between integers; `ValueError` outside [0, T − 1]."""
        timesteps, last = _in_float64(timesteps), len(self._gammas) - 1
        position = timesteps / last
        if not bool(((position >= 0) & (position <= 1)).all()):
            raise ValueError(f"timesteps must be within [0, {last}], got {timesteps.tolist()}.")
        return self.forward(position)


class LinearBetaGamma(BetaGamma):
    """DDPM's linear-beta schedule: γ_i = log((1 − ᾱ_i)/ᾱ_i), ᾱ_i = Π_{j ≤ i} (1 − β_j) [DDPM §4].

    DDPM's index i is the time t = i/(T − 1) here, so that γ(0) is the level of its first step; γ is interpolated
    between the indices. The network's timestep is i.

    The betas 1e-4 … 0.02 are meant for 1,000 steps. For another number they are **rescaled** by 1000/T, which keeps
    ᾱ_T; without rescaling, a fraction ᾱ_T = 0.13 of the data's power would remain at the end for T = 200.

    Args:
        num_train_timesteps (`int`, defaults to 1000): T, at least 2.
        beta_start, beta_end (`float`, default to 1e-4 and 0.02): first and last β for 1,000 steps.
        rescale_betas (`bool`, defaults to `True`): multiply the betas by 1000/T.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        rescale_betas: bool = True,
    ):
        NoiseSchedule.__init__(self)
        betas = linear_betas(num_train_timesteps, beta_start, beta_end, rescale_betas)
        self._set_table(gammas_from_betas(betas))


def check_gamma_table(gammas: torch.Tensor) -> None:
    """Raises `ValueError` unless `gammas` is one-dimensional with at least 2 finite, strictly increasing values."""
    if gammas.ndim != 1 or len(gammas) < 2:
        raise ValueError(f"gammas must be a list of at least 2 numbers, got shape {tuple(gammas.shape)}.")
    if not bool(gammas.isfinite().all()):
        raise ValueError(f"gammas must be finite, got {gammas[~gammas.isfinite()][0].item()}.")
    wrong = (gammas[1:] <= gammas[:-1]).nonzero()
    if len(wrong):
        i = int(wrong[0])
        raise ValueError(
            f"gammas must increase (gamma = −log SNR grows with the noise), got {gammas[i].item():.9g} at index {i} "
            f"and {gammas[i + 1].item():.9g} after it."
        )


def _learned_ends(bias: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gamma_0 = to_high_precision(bias).squeeze(0)
    return gamma_0, gamma_0 + to_high_precision(weight).abs().squeeze(0)
