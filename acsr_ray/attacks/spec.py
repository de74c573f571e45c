"""One attack of a sweep as a frozen settings object: what it is, its budget, its options.

Own attacks are named by `ATTACKS`; every attack of the torchattacks package is `torchattacks.<Class>`.
"""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from acsr_ray.attacks.threat import Norm, ThreatModel
from acsr_ray.config import ConfigError, Described, did_you_mean

TORCHATTACKS = "torchattacks."
TITLES = {
    "noise": "Noise",
    "fgsm": "FGSM",
    "bim": "BIM",
    "pgd": "PGD",
    "apgd": "APGD",
    "tpgd": "TPGD",
    "cw": "CW",
    "deepfool": "DeepFool",
    "square": "Square",
}
ATTACKS = tuple(TITLES)
MINIMAL_NORM = ("cw", "deepfool")
RANDOM = ("noise", "pgd", "apgd", "tpgd", "square")
"""Attacks that draw random numbers; `restarts` means something for them."""

DEFAULT_STEPS = {"fgsm": 1, "bim": 100, "pgd": 20, "apgd": 100, "tpgd": 20, "cw": 100, "deepfool": 100}
STEP_OF_EPSILON = 2.5
"""Default step is `2.5 epsilon / steps`: enough to cross the ball and come back (Madry et al. 2018)."""
KAPPAS = (1.0, 2.0, 4.0, 8.0, 16.0)
OVERSHOOTS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)

VERSIONS = {"deepfool": 3}
"""Raised when an attack would give other images for the same settings; 1 where absent."""

TAKES = {
    "noise": ("restarts",),
    "fgsm": (),
    "bim": ("steps", "step_size"),
    "pgd": ("steps", "step_size", "random_start", "restarts"),
    "apgd": ("steps", "loss", "random_start", "restarts"),
    "tpgd": ("steps", "step_size", "restarts"),
    "cw": ("steps", "c", "kappa", "lr", "binary_search_steps", "strengths"),
    "deepfool": ("steps", "overshoot", "classes", "strengths"),
    "square": ("queries", "restarts"),
    TORCHATTACKS: ("options", "strengths"),
}
"""Fields that an attack reads beside name, norm and epsilon."""


class AttackConfig(Described):
    """One attack of a sweep."""

    name: str
    """`noise`, `fgsm`, `bim`, `pgd`, `apgd`, `tpgd`, `cw`, `deepfool`, `square` or `torchattacks.<Class>`."""
    norm: Norm = "linf"
    """Norm of the budget; `relative_l2` is ||x' - x|| <= epsilon ||x|| per image. cw, deepfool: l2 kinds."""
    epsilon: float | None = Field(None, gt=0)
    """Radius on [0, 1] pixels. None: unbounded, only for cw, deepfool and torchattacks. There, and where it
    is a cap, a larger perturbation is scaled back to the ball and counted as it then is."""
    steps: int | None = Field(None, ge=1)
    """Gradient steps; None: 100, pgd and tpgd 20."""
    step_size: float | None = Field(None, gt=0)
    """Step length in the norm; None: 2.5 epsilon / steps."""
    random_start: bool | None = None
    """Start at a random point of the ball; None: yes. bim and fgsm never do, tpgd always nearly at x."""
    restarts: int = Field(1, ge=1)
    """Runs from other random numbers on the images that stood every run before."""
    loss: Literal["ce", "dlr"] = "ce"
    """What apgd maximises: cross-entropy, or the difference of logits ratio (3 classes or more)."""
    c: float = Field(1.0, gt=0)
    """cw: weight of the margin against the squared l2 distance."""
    kappa: float = Field(0.0, ge=0)
    """cw: logit margin that a success must have."""
    lr: float = Field(0.01, gt=0)
    """cw: Adam's learning rate in tanh space."""
    binary_search_steps: int = Field(0, ge=0)
    """cw: searches for the smallest c per image after the first run; 0: none."""
    overshoot: float = Field(0.02, ge=0)
    """deepfool: share by which the perturbation goes beyond the linearised boundary."""
    classes: int | None = Field(None, ge=1)
    """deepfool: rival classes that are looked at, by logit; None: the 3 best."""
    queries: int = Field(5000, ge=1)
    """square: model queries per image."""
    options: dict[str, Any] = Field(default_factory=dict)
    """torchattacks: arguments of the class. `eps` is taken from `epsilon` (linf, l2) when not given."""
    strengths: tuple[dict[str, Any], ...] | None = None
    """What to raise where rounding to 8 bits undid a success, one rung after the other: `[{kappa: 1}, ...]`
    (cw), `[{overshoot: 0.1}, ...]` (deepfool), or options (torchattacks). None: a fixed ladder for cw and
    deepfool, none for torchattacks; `[]`: none."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.is_torchattacks and self.name not in ATTACKS:
            hint = did_you_mean(self.name, [*ATTACKS, f"{TORCHATTACKS}<Class>"])
            raise ConfigError(f"unknown attack {self.name!r}{hint}")
        takes = TAKES[TORCHATTACKS if self.is_torchattacks else self.name]
        for field, about in type(self).model_fields.items():
            given = getattr(self, field) != about.get_default(call_default_factory=True)
            if given and field not in ("name", "norm", "epsilon", *takes):
                raise ConfigError(f"{self.name} does not take {field}; it takes {', '.join(takes) or 'none'}")
        if self.name in MINIMAL_NORM:
            if self.epsilon is not None and self.norm == "linf":
                raise ConfigError(f"{self.name} is capped in norm l2 or relative_l2, not linf")
            self._check_strengths("kappa" if self.name == "cw" else "overshoot")
        elif self.epsilon is None and not self.is_torchattacks:
            raise ConfigError(f"{self.name} needs epsilon")
        return self

    def _check_strengths(self, raised: str) -> None:
        for strength in self.strengths or ():
            if set(strength) != {raised} or not isinstance(strength[raised], float | int):
                raise ConfigError(f"a strength of {self.name} is {{{raised}: number}}, got {strength}")

    @property
    def is_torchattacks(self) -> bool:
        """Whether torchattacks does the work."""
        return self.name.startswith(TORCHATTACKS)

    @property
    def threat(self) -> ThreatModel | None:
        """The set to stay in; None when unbounded."""
        return None if self.epsilon is None else ThreatModel(self.norm, self.epsilon)

    @property
    def num_steps(self) -> int:
        """Gradient steps, the default filled in."""
        return self.steps or DEFAULT_STEPS.get(self.name, 1)

    @property
    def step(self) -> float:
        """Length of a step in the norm, the default filled in."""
        return self.step_size or STEP_OF_EPSILON * (self.epsilon or 0.0) / self.num_steps

    @property
    def ladder(self) -> tuple[dict[str, Any], ...]:
        """What is raised where rounding undid a success, the default filled in."""
        if self.strengths is not None:
            return self.strengths
        if self.name == "cw":
            return tuple({"kappa": kappa} for kappa in KAPPAS if kappa > self.kappa)
        if self.name == "deepfool":
            return tuple({"overshoot": value} for value in OVERSHOOTS if value > self.overshoot)
        return ()

    def identity(self) -> dict[str, Any]:
        """Return what decides the attacked images: the settings, and the version of the code behind them."""
        version = VERSIONS.get(self.name)
        return self.describe() if version is None else {**self.describe(), "version": version}

    def with_epsilon(self, epsilon: float | None) -> "AttackConfig":
        """Return the attack at another radius; an explicit step size keeps its share of the radius."""
        step_size = self.step_size
        if step_size and self.epsilon and epsilon:
            step_size *= epsilon / self.epsilon
        return self.model_copy(update={"epsilon": epsilon, "step_size": step_size})

    @property
    def label(self) -> str:
        """Short name for people, such as `BIM l2rel .04 x100`."""
        parts = [TITLES.get(self.name, self.name)]
        if self.name == "apgd" and self.loss != "ce":
            parts[0] += f"-{self.loss.upper()}"
        if self.epsilon is not None:
            short = "l2rel" if self.norm == "relative_l2" else self.norm
            parts.append(f"{short} {_short_epsilon(self.norm, self.epsilon)}")
        if self.name in DEFAULT_STEPS and self.name != "fgsm":
            parts.append(f"x{self.num_steps}")
        if self.name == "square":
            parts.append(f"{self.queries}q")
        for field in ("kappa", "overshoot", "c", "binary_search_steps"):
            value = getattr(self, field)
            if value != type(self).model_fields[field].default:
                parts.append(f"{field.removesuffix('_steps')} {value:g}")
        if self.restarts > 1:
            parts.append(f"r{self.restarts}")
        return " ".join(parts)


def _short_epsilon(norm: str, epsilon: float) -> str:
    levels = epsilon * 255
    if norm == "linf" and abs(levels - round(levels)) < 1e-6:
        return f"{round(levels)}/255"
    return f"{epsilon:.3g}".removeprefix("0") if epsilon < 1 else f"{epsilon:.3g}"
