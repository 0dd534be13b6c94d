"""A cache of answers as a run meets it: found or not yet made, then bound to what the losses need.

Flow: `fastkd.runs.teacher_cache` makes an `AnswerCache` of a recipe -> `fastkd.training.build`
calls `around` -> the trainer asks the `CachedTeacher`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastkd.compute.machine import version_of
from fastkd.compute.ranks import World, on_main
from fastkd.errors import RunFailed, UserError
from fastkd.losses.base.needs import Need
from fastkd.printable import few
from fastkd.storage.atomic import atomic_path, writing
from fastkd.teachers.cache.cached import CachedTeacher, Keeping, answers_to
from fastkd.teachers.cache.identity import Identity, refuse
from fastkd.teachers.cache.store import AnswerStore, Manifest, TeacherFacts, size_in_words
from fastkd.teachers.ensemble import Ensemble
from fastkd.teachers.loaded import LoadedNet
from fastkd.teachers.teacher import Teacher

__all__ = ["AnswerCache", "HeadParts"]

CLASSIFIER = "classifier.safetensors"


@dataclass(frozen=True)
class HeadParts:
    """What a loss that takes over the teacher's classifier wants to know."""

    head: nn.Linear
    """Its outputs in the class order of the data."""
    pooled: tuple[str, ...]
    """Taps that it pools."""


@dataclass(frozen=True, kw_only=True)
class AnswerCache:
    """A folder of answers and what it must belong to. All ranks have the same."""

    folder: Path
    identity: Identity
    manifest: Manifest | None
    """What lies there; None if nothing does."""
    facts: TeacherFacts | None = None
    """Of the teacher that has just been evaluated, if it was."""
    believed: bool
    """Whether what the manifest says of the teacher would be found again."""
    compiled: bool = False
    """Whether the recipe compiles a teacher of its own accord."""
    writes: bool = True
    """Whether anything is written, or all is tried only."""
    load: Callable[[], tuple[LoadedNet, ...]]
    """Builds the teachers with their weights."""
    part: Callable[[int], slice]
    """This rank's places of a step, in the order of an epoch."""
    places: int
    """Images of an epoch."""
    epochs: int
    """Different epochs of the run."""
    keeping: Keeping
    world: World
    say: Callable[[str], None]

    @property
    def replaces_teacher(self) -> bool:
        """Whether the teacher need not be built: what a run says of it is kept here."""
        return self.facts is None and self.believed

    @property
    def known(self) -> TeacherFacts:
        """What is known of the teacher."""
        if self.facts is not None:
            return self.facts
        assert self.manifest is not None
        return self.manifest.teacher

    def around(
        self,
        teacher: Teacher | Ensemble | None,
        taps: Mapping[str, Sequence[str]],
        probe_NCHW: Tensor,
        *,
        bind: Callable[[tuple[LoadedNet, ...]], Teacher | Ensemble],
        parts: HeadParts | None,
    ) -> CachedTeacher:
        """The teacher that answers from here. All ranks must call this.

        teacher: bound, if it was built. taps: what the losses need, by view. probe_NCHW: a few
        images. bind: of the teachers that `load` builds. parts: where a loss takes over the
            classifier.

        Raises:
            UserError: what lies there belongs to something else, or lacks what the losses need; a
                map that nobody has asked to keep.
        """
        manifest = self.manifest
        if manifest is None:
            assert teacher is not None, "a cache is made of a teacher that was built"
            manifest = self._made(teacher, probe_NCHW, parts)
        refuse(self.folder, manifest.identity, self.identity, taps)
        self._check(manifest, taps)
        if self.facts and self.manifest and self.writes:
            manifest = self._refreshed(manifest, self.facts)
        needs = tuple(
            str(Need.of(view, "teacher", tap))
            for view, wanted in taps.items()
            for tap in dict.fromkeys(("logits", *wanted))
        )
        # An encoder has no logits, and no loss has asked for them.
        asked = {str(Need.of(view, "teacher", tap)) for view in taps for tap in taps[view]}
        lacking = [need for need in needs if need in asked and need not in manifest.columns]
        if lacking:
            raise UserError(
                f"teacher.cache={self.folder} holds {few(manifest.columns)}, and the losses need "
                f"{few(lacking)}: name another folder"
            )
        store = AnswerStore(
            self.folder,
            manifest,
            tuple(need for need in needs if need in manifest.columns),
            rank=self.world.rank,
            ranks=self.world.size,
            batch=len(range(self.places)[self.part(0)]) or None,
            writes=self.writes,
            say=self.say,
        )
        if self.writes:
            self._announce(store)
        return CachedTeacher(
            store,
            part=self.part,
            device=self.world.device,
            teacher=teacher,
            bind=lambda: bind(self.load()),
        )

    def _check(self, manifest: Manifest, views: Iterable[str]) -> None:
        """UserError if the manifest contradicts the data that it belongs to."""
        pools = {Need(need).view: column.images for need, column in manifest.columns.items()}
        expected = {view: self.keeping.pool if view == "xprime" else 1 for view in views}
        if manifest.places != self.places or any(
            pools.get(view, images) != images for view, images in expected.items()
        ):
            raise UserError(
                f"the manifest of {self.folder} is damaged: it is for {manifest.places} images, "
                f"and an epoch has {self.places}. Remove the folder, and the cache is made anew"
            )

    def _refreshed(self, manifest: Manifest, facts: TeacherFacts) -> Manifest:
        """The manifest with what the teacher reaches on today's validation images."""
        facts = facts.model_copy(update={"pooled": manifest.teacher.pooled})
        fresh = manifest.model_copy(update={"teacher": facts})

        def write() -> None:
            with suppress(RunFailed):  # a folder that can only be read stays as it is
                fresh.write(self.folder)

        on_main(self.world, write)
        return fresh

    def head(self) -> nn.Linear | None:
        """The teacher's classifier, if it is kept here. UserError for a damaged file."""
        path = self.folder / CLASSIFIER
        if not path.exists():
            return None
        try:
            state = load_file(path)
            weight_CF = state["weight"]
            classes, features = weight_CF.shape
            # Initial values would be drawn from the generator that the student's come from.
            head = nn.Linear(features, classes, bias="bias" in state, device="meta")
            head.to_empty(device=self.world.device)
            head.load_state_dict(state)
        except (SafetensorError, OSError, LookupError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{path} is damaged ({error}): remove {self.folder}, and the cache is made anew"
            ) from None
        return head.requires_grad_(False)

    def _made(
        self,
        teacher: Teacher | Ensemble,
        probe_NCHW: Tensor,
        parts: HeadParts | None,
    ) -> Manifest:
        columns = self.keeping.columns(answers_to(probe_NCHW, teacher))
        facts = self.known
        if parts:
            facts = facts.model_copy(update={"pooled": parts.pooled})
        manifest = Manifest(
            identity=self.identity,
            places=self.places,
            columns=columns,
            teacher=facts,
            written_by={name: str(version_of(name)) for name in ("fastkd", "torch")},
        )
        return on_main(self.world, lambda: self._written(manifest, parts))

    def _written(self, manifest: Manifest, parts: HeadParts | None) -> Manifest:
        """The manifest in the folder: this one, or one that another run wrote meanwhile."""
        if (earlier := Manifest.read(self.folder)) is not None:
            return earlier
        try:
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            if parts:
                state = {key: one.detach().cpu() for key, one in parts.head.state_dict().items()}
                with atomic_path(self.folder / CLASSIFIER) as beside:
                    save_file(state, beside)
            manifest.write(self.folder)
        except RunFailed as error:
            self.say(f"{error}. The teacher is asked in every step")
        return manifest

    def _announce(self, store: AnswerStore) -> None:
        """How large, and whether the disk takes it."""
        whole = store.epoch_bytes * self.epochs

        def sizes() -> tuple[int, int]:
            return store.there_bytes(), store.lacking_bytes(self.epochs)

        there, lacking = on_main(self.world, sizes)
        each, whole, there = map(size_in_words, (store.epoch_bytes, whole, there))
        self.say(
            f"the teacher's answers, in {self.folder}: {each} an epoch, {whole} in all, {there} "
            f"on the disk"
        )
        if lacking > 0:
            self.say(
                f"note: the disk of {self.folder} lacks {size_in_words(lacking)} for all of them: "
                f"what fits is kept"
            )
