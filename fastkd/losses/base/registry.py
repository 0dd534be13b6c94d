"""Names of loss terms: recipe keys in, LossTerm modules out.

`losses.kd.temperature=4` is validated by the config class of the term called `kd`.
"""

import difflib
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from pydantic import ValidationError

from fastkd.augment.views import XPRIMES
from fastkd.config.mistakes import explain
from fastkd.config.section import Section
from fastkd.losses.base.term import LossTerm, Need, check_names

__all__ = [
    "ALIASES",
    "NO_LOSSES",
    "build_terms",
    "called",
    "check_needs",
    "plain",
    "term_names",
    "typed_config",
]

# name -> (module, config class); the config's `build()` makes the term.
_TERMS = {
    "bce": ("fastkd.losses.multilabel", "BinaryCrossEntropyConfig"),
    "ce": ("fastkd.losses.logits", "CrossEntropyConfig"),
    "kd": ("fastkd.losses.logits", "KDConfig"),
    "mixed_ce": ("fastkd.losses.logits", "MixedCEConfig"),
    "ab": ("fastkd.losses.hints", "ABConfig"),
    "at": ("fastkd.losses.features", "ATConfig"),
    "cc": ("fastkd.losses.relations", "CCConfig"),
    "crd": ("fastkd.losses.crd", "CRDConfig"),
    "fitnet": ("fastkd.losses.hints", "FitNetConfig"),
    "fsp": ("fastkd.losses.fsp", "FSPConfig"),
    "ft": ("fastkd.losses.factors", "FTConfig"),
    "nst": ("fastkd.losses.nst", "NSTConfig"),
    "pkt": ("fastkd.losses.relations", "PKTConfig"),
    "rkd": ("fastkd.losses.relations", "RKDConfig"),
    "sp": ("fastkd.losses.relations", "SPConfig"),
    "vid": ("fastkd.losses.hints", "VIDConfig"),
    "soft_ce": ("fastkd.losses.logits", "SoftCEConfig"),
    "dkd": ("fastkd.losses.dkd", "DKDConfig"),
    "dist": ("fastkd.losses.dist", "DISTConfig"),
    "reviewkd": ("fastkd.losses.review", "ReviewKDConfig"),
    "simkd": ("fastkd.losses.simkd", "SimKDConfig"),
    "jointrd": ("fastkd.losses.jointrd", "JointRDConfig"),
    "stage_mse": ("fastkd.losses.jointrd", "StageMSEConfig"),
    "discriminator": ("fastkd.losses.meal", "DiscriminatorConfig"),
}

_STANDARDIZED, _MEAL = ("kd.standardize=true",), ("soft_ce", "discriminator")
ALIASES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("abound", "activation_boundaries"), ("ab",)),
    **dict.fromkeys(("attention", "attention_transfer"), ("at",)),
    "correlation": ("cc",),
    "cross_entropy": ("ce",),
    **dict.fromkeys(("factor", "factor_transfer", "paraphraser"), ("ft",)),
    **dict.fromkeys(("hint", "hints"), ("fitnet",)),
    **dict.fromkeys(("hinton", "kl", "kl_div", "softmax_kl", "soft_target"), ("kd",)),
    **dict.fromkeys(
        ("lskd", "logit_standardisation", "logit_standardization", "standardize"), _STANDARDIZED
    ),
    **dict.fromkeys(("meal", "meal_v2"), _MEAL),
    "alignkd": ("stage_mse",),
    "residual_distillation": ("jointrd",),
    "similarity": ("sp",),
}
"""What other packages and papers call a loss -> what a recipe writes behind `losses.`."""

_VIEWS = {"tlcutmix": "cutmix", "tlmixup": "mixup"} | {
    view: view for view in XPRIMES if view != "none"
}
NO_LOSSES = {
    **{
        name: f"augment.xprime={view} losses.kd.views=x,xprime, a second view of the images"
        for name, view in _VIEWS.items()
    },
    "pick": "augment.pick.criterion=kl, a choice among the views of augment.xprime=cutmix",
    "label_smoothing": "losses.ce.label_smoothing=0.1 or losses.kd.label_smoothing=0.1, a key",
}
"""What people look for among the losses and is none -> what a recipe writes."""


class TermConfig(Section):
    """Base of the recipe keys of one loss term."""

    def needs(self) -> tuple[str, ...]:
        """What the built term will ask for."""
        return self.build("probe").needs

    def build(self, name: str) -> LossTerm:
        """The term itself, not yet bound."""
        raise TypeError(f"{type(self).__name__} must define build(name)")


def term_names() -> list[str]:
    """All registered loss names."""
    return sorted(_TERMS)


def plain(name: str) -> str:
    """A loss name as it is spelled here: `LS-KD` and `ls_kd` are one."""
    return name.lower().replace("-", "_")


def called(name: str) -> tuple[str, ...]:
    """What a recipe writes for a loss of another name, spelling or case; () where none is like it.

    An entry is a loss, or a loss with a key: `kd.standardize=true`.
    """
    name = plain(name)
    if name in _TERMS:
        return (name,)
    # Only the name itself may be an alias: a misspelled one is as likely a misspelled loss.
    return ALIASES.get(name) or tuple(difflib.get_close_matches(name, _TERMS, n=1))


def config_class(name: str) -> type[TermConfig]:
    """The config class of a loss name; ValueError names what it is called here, or the nearest."""
    if name not in _TERMS:
        if plain(name) in NO_LOSSES:
            raise ValueError(f"{name} is no loss but {NO_LOSSES[plain(name)]}")
        near = " and ".join(f"losses.{one}" for one in called(name))
        hint = f", did you mean {near}?" if near else "."
        raise ValueError(f"there is no loss {name!r}{hint} Losses: {', '.join(term_names())}")
    module, attribute = _TERMS[name]
    return getattr(import_module(module), attribute)


def typed_config(name: str, keys: object) -> Section:
    """Validate the keys of one loss."""
    if isinstance(keys, Section):
        return keys
    cls = config_class(name)
    if not isinstance(keys, Mapping):
        fields = ", ".join(cls.model_fields)
        raise ValueError(f"losses.{name}={keys}: expected keys of its own ({fields}), not a value")
    try:
        return cls.model_validate(dict(keys))
    except ValidationError as error:
        prefix = f"losses.{name}."
        known = [prefix + field for field in cls.model_fields]
        raise ValueError("\n".join(explain(error, cls, keys, known, prefix=prefix))) from None


def build_terms(losses: Mapping[str, Section]) -> list[LossTerm]:
    """One unbound term per recipe entry, in recipe order; part names must not collide."""
    terms: list[LossTerm] = []
    for name, config in losses.items():
        if not isinstance(config, TermConfig):
            raise TypeError(f"losses.{name} is a {type(config).__name__}, expected a TermConfig")
        terms.append(config.build(name))
    check_names(terms)
    return terms


def check_needs(
    losses: Mapping[str, Any],
    *,
    has_teacher: bool,
    xprime: str,
    picks: bool = False,
    frozen: bool = False,
) -> None:
    """ValueError where a term lacks its net or view in the recipe, or a pick lacks a term."""
    terms = build_terms(losses)
    needs = [text for term in terms for text in term.needs]
    if picks and "xprime/teacher/logits" not in needs:
        raise ValueError(
            "augment.pick chooses x' by what the teacher says to it, which no loss looks at: set "
            "augment.xprime=cutmix losses.kd.views=x,xprime"
        )
    if xprime != "none" and not any(text.startswith("xprime/") for text in needs):
        raise ValueError(
            f"augment.xprime={xprime} would make a view x' that no loss looks at: set "
            f"losses.kd.views=x,xprime, or leave it away (augment.xprime=none)"
        )
    for term in terms:
        parsed = [Need.parse(text) for text in term.needs]
        taps = [need.tap for need in parsed if need.net == "student"]
        if frozen and "logits" not in taps:
            raise ValueError(
                f"student.frozen=backbone leaves losses.{term.name} nothing to teach: it looks at "
                f"{', '.join(taps)}, where only frozen layers come before. Take it away "
                f"(losses.{term.name}=null), or train all (student.frozen=null)"
            )
        for need in parsed:
            if need.net == "teacher" and not has_teacher:
                raise ValueError(f"losses.{term.name} needs a teacher: set teacher.name")
            if need.view not in ("x", "xprime"):
                raise ValueError(f"losses.{term.name} asks for the view {need.view!r}: x or xprime")
            if need.view == "xprime" and xprime == "none":
                raise ValueError(
                    f"losses.{term.name} needs the view x': set augment.xprime=cutmix or another"
                )
