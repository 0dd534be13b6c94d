"""Names of loss terms: recipe keys in, LossTerm modules out.

`losses.kd.temperature=4` is validated by the keys of the term named `kd` (`losses.base.keys`).
"""

import difflib
from collections.abc import Mapping

from pydantic import ValidationError

import fastkd.losses
from fastkd.augment.views import XPRIMES
from fastkd.config.mistakes import explain
from fastkd.config.section import Section
from fastkd.errors import UserError
from fastkd.losses.base.keys import LossKeys, keys_of
from fastkd.losses.base.needs import NeedRule, first_unmet
from fastkd.losses.base.term import LossTerm, check_parts
from fastkd.printable import shown

__all__ = [
    "ALIASES",
    "NO_LOSSES",
    "build_terms",
    "called",
    "check_needs",
    "config_class",
    "plain",
    "register",
    "term_class",
    "term_names",
    "typed_config",
]

# Name in a recipe -> name in fastkd.losses, which loads the module on first use; or the class.
_TERMS: dict[str, str | type[LossTerm]] = {
    "bce": "BinaryCrossEntropy",
    "ce": "CrossEntropy",
    "kd": "KD",
    "mixed_ce": "MixedCE",
    "ab": "AB",
    "at": "AT",
    "cc": "CC",
    "crd": "CRD",
    "cwd": "CWD",
    "fitnet": "FitNet",
    "fsp": "FSP",
    "ft": "FT",
    "mgd": "MGD",
    "nst": "NST",
    "pkt": "PKT",
    "rkd": "RKD",
    "sp": "SP",
    "vid": "VID",
    "soft_ce": "SoftCE",
    "dkd": "DKD",
    "dist": "DIST",
    "reviewkd": "ReviewKD",
    "simkd": "SimKD",
    "jointrd": "JointRD",
    "stage_mse": "StageMSE",
    "discriminator": "Discriminator",
}

ALIASES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("abound", "activation_boundaries"), ("ab",)),
    **dict.fromkeys(("attention", "attention_transfer"), ("at",)),
    **dict.fromkeys(("channel_wise", "channelwise", "channel_wise_divergence"), ("cwd",)),
    "correlation": ("cc",),
    "cross_entropy": ("ce",),
    **dict.fromkeys(("factor", "factor_transfer", "paraphraser"), ("ft",)),
    **dict.fromkeys(("hint", "hints"), ("fitnet",)),
    **dict.fromkeys(("hinton", "kl", "kl_div", "softmax_kl", "soft_target"), ("kd",)),
    **dict.fromkeys(
        ("lskd", "logit_standardisation", "logit_standardization", "standardize"),
        ("kd.standardize=true",),
    ),
    **dict.fromkeys(("masked_generative", "masked_generative_distillation"), ("mgd",)),
    **dict.fromkeys(("meal", "meal_v2"), ("soft_ce", "discriminator")),
    "alignkd": ("stage_mse",),
    "residual_distillation": ("jointrd",),
    "similarity": ("sp",),
}
"""Name of a loss in other packages and papers -> what a recipe writes after `losses.`."""

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
"""What people look for among the losses but is not a loss -> what a recipe writes instead."""

_UNMET: dict[NeedRule, str] = {
    "pick": "augment.pick chooses x' by the teacher's answers to it, which no loss uses: set "
    "augment.xprime=cutmix losses.kd.views=x,xprime",
    "xprime unused": "augment.xprime={xprime} would make a view x' that no loss uses: set "
    "losses.kd.views=x,xprime, or leave it out (augment.xprime=none)",
    "frozen": "student.frozen=backbone leaves {loss} nothing to teach: it uses {taps}, where only "
    "frozen layers come before. Remove it ({loss}=null), or train all (student.frozen=null)",
    "teacher": "{loss} needs a teacher: set teacher.name, or train on the labels alone: "
    "{loss}=null losses.ce.weight=1",
    "xprime": "{loss} needs the view x': set augment.xprime=cutmix or another",
}


def register(name: str, term: type[LossTerm]) -> None:
    """Make `losses.<name>` known to this process."""
    _TERMS[name] = term


def term_names() -> list[str]:
    """All registered loss names."""
    return sorted(_TERMS)


def plain(name: str) -> str:
    """A loss name in fastkd's spelling: `LS-KD` and `ls_kd` are the same."""
    return name.lower().replace("-", "_")


def called(name: str) -> tuple[str, ...]:
    """What a recipe writes for a loss with another name, spelling or case; () if none is similar.

    An entry is a loss, or a loss with a key: `kd.standardize=true`.
    """
    name = plain(name)
    if name in _TERMS:
        return (name,)
    # Only an exact name counts as an alias: a misspelled one may equally be a misspelled loss.
    return ALIASES.get(name) or tuple(difflib.get_close_matches(name, _TERMS, n=1))


def term_class(name: str) -> type[LossTerm]:
    """The class of a loss; UserError gives its name in fastkd, or the nearest."""
    if name not in _TERMS:
        if plain(name) in NO_LOSSES:
            raise UserError(f"{name} is not a loss; set {NO_LOSSES[plain(name)]}")
        near = " and ".join(f"losses.{one}" for one in called(name))
        hint = f", did you mean {near}?" if near else "."
        raise UserError(f"there is no loss {name!r}{hint} Losses: {', '.join(term_names())}")
    term = _TERMS[name]
    return getattr(fastkd.losses, term) if isinstance(term, str) else term


def config_class(name: str) -> type[LossKeys]:
    """The recipe keys of a loss; UserError as of `term_class`."""
    return keys_of(term_class(name))


def typed_config(name: str, keys: object) -> Section:
    """Validate the keys of one loss."""
    if isinstance(keys, Section):
        return keys
    cls = config_class(name)
    if not isinstance(keys, Mapping):
        fields = ", ".join(cls.model_fields)
        raise UserError(
            f"losses.{name}={shown(str(keys))}: expected keys of its own ({fields}), not a value"
        )
    try:
        return cls.model_validate(dict(keys))
    except ValidationError as error:
        prefix = f"losses.{name}."
        known = [prefix + field for field in cls.model_fields]
        raise UserError(*explain(error, cls, keys, known, prefix=prefix)) from None


def build_terms(losses: Mapping[str, Section]) -> list[LossTerm]:
    """One unbound term per recipe entry, in recipe order; part names must not collide."""
    keys = _keys(losses)
    check_parts((name, one.weights(name)) for name, one in keys.items())
    return [one.build(name) for name, one in keys.items()]


def check_needs(
    losses: Mapping[str, Section],
    *,
    has_teacher: bool,
    xprime: str,
    picks: bool = False,
    frozen: bool = False,
) -> None:
    """UserError if the recipe lacks a loss's net or view, or a pick has no loss that uses it.

    From the keys alone: no term is built.
    """
    keys = _keys(losses)
    check_parts((name, one.weights(name)) for name, one in keys.items())
    unmet = first_unmet(
        {name: one.needs() for name, one in keys.items()},
        has_teacher=has_teacher,
        xprime=xprime,
        picks=picks,
        frozen=frozen,
    )
    if unmet is not None:
        words = {"loss": f"losses.{unmet.loss}", "taps": ", ".join(unmet.taps), "xprime": xprime}
        raise UserError(_UNMET[unmet.rule].format(**words))


def _keys(losses: Mapping[str, Section]) -> dict[str, LossKeys]:
    for name, keys in losses.items():
        if not isinstance(keys, LossKeys):
            raise TypeError(f"losses.{name} is a {type(keys).__name__}, expected LossKeys")
    return {name: keys for name, keys in losses.items() if isinstance(keys, LossKeys)}
