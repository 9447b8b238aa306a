"""What an attack is: a frozen recipe that turns a view into candidates.

An author writes :meth:`Attack.run` (and :meth:`ActiveAttack.tamper`). The final ``__call__``
checks what the attack needs, isolates randomness, times the run and stamps the result, so that
no author can forget to.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar, final

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

import leakatlas
from leakatlas import sealed
from leakatlas.blocks.labels import require_plain
from leakatlas.blocks.watch import Watch
from leakatlas.data import ImageSet
from leakatlas.devices import CPU
from leakatlas.errors import InvalidParameter, NotGranted
from leakatlas.fl import TamperedModel as TamperedModel
from leakatlas.fl import Tampering as Tampering
from leakatlas.fl import View, state_hash, stream, stream_seed
from leakatlas.fl.state import model_state
from leakatlas.params import Configured
from leakatlas.threat import Grant, Knowledge

CUT = "the time budget ended, or the run was stopped"
"""Why a run was cut short."""

Status = Literal["complete", "cut short", "failed"]
"""How a run of an attack can end by itself; a report knows three more words, for those that did not
run."""


_NO_TENSORS: tuple[type[Exception], ...] = (*sealed.MALFORMED, SafetensorError)


@dataclass(frozen=True)
class Recipe:
    """The full description of a run: equal recipes mean equal results.

    Args:
        attack: ``{"key", "version", "parameters"}``.
        scenario: The scenario as JSON, or empty for a view from elsewhere.
        seed: Seed of the attack.
        versions: LeakAtlas and torch.
        rehearsal: How the parameters were chosen, if the adversary rehearsed; no part of the
            identity, since equal parameters give equal results.
        conditions: What else can change the answer: threads, kind of device, hashes of the code
            behind model and attack, how slopes are computed.
    """

    attack: Mapping[str, Any]
    scenario: Mapping[str, Any]
    seed: int
    versions: Mapping[str, str]
    rehearsal: Mapping[str, Any] = field(default_factory=dict)
    conditions: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "attack": dict(self.attack),
            "scenario": dict(self.scenario),
            "seed": self.seed,
            "versions": dict(self.versions),
            "rehearsal": dict(self.rehearsal),
            "conditions": dict(self.conditions),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Recipe:
        """The recipe whose :meth:`to_json` is ``values``."""
        return cls(**values)

    @property
    def content_hash(self) -> str:
        """SHA-256 of the canonical JSON, the versions and the rehearsal left out."""
        left_out = ("versions", "rehearsal")
        plain = {k: v for k, v in self.to_json().items() if k not in left_out}
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """What the adversary claims to have found.

    Args:
        images: ``(M, C, H, W)`` candidates in the model's input space, any number, unordered.
        labels: ``(M,)`` the label of each candidate, or None.
        label_counts: ``(K,)`` recovered class counts, if the attack only knows how many.
        confidence: ``(M,)`` the adversary's own criterion, larger is better.
        status: ``failed`` means that the attack itself saw that it did not work.
        reason: Why, for ``failed`` and ``cut short``.
        notes: Figures that the attack computed (final objective, rank, ...), all adversary-side.
        seconds: Wall time of ``run``.
        execution: How slopes were computed, in words; empty where nothing was minimised.
        reads: View fields that were read.
        recipe: Stamped by the runner.
    """

    images: Tensor
    labels: Tensor | None = None
    label_counts: Tensor | None = None
    confidence: Tensor | None = None
    status: Status = "complete"
    reason: str = ""
    notes: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    execution: str = ""
    reads: frozenset[str] = frozenset()
    recipe: Recipe | None = None

    def on_cpu(self) -> Self:
        """The same claims on the CPU, where the truth is."""
        return replace(
            self,
            images=self.images.cpu(),
            labels=None if self.labels is None else self.labels.cpu(),
            label_counts=None if self.label_counts is None else self.label_counts.cpu(),
            confidence=None if self.confidence is None else self.confidence.cpu(),
        )

    def or_failed(self, trouble: str) -> Self:
        """These candidates, failed if the attack itself saw ``trouble``; as they are if empty."""
        return replace(self, status="failed", reason=trouble) if trouble else self


@dataclass(frozen=True)
class Outlook:
    """What an attack expects of a view before any compute is spent.

    Args:
        verdict: ``hopeless`` means that theory rules success out, not that it is hard.
        reason: One sentence for people.
    """

    verdict: Literal["applicable", "hopeless", "unknown"]
    reason: str


def nothing_found(shape: tuple[int, ...], reason: str, **notes: float) -> Reconstruction:
    """A failed reconstruction without candidates.

    Args:
        shape: ``(C, H, W)``.
        reason: What the attack saw.
        notes: Figures behind the reason.
    """
    return Reconstruction(
        images=torch.empty(0, *shape), status="failed", reason=reason, notes=notes
    )


@dataclass(frozen=True, kw_only=True)
class Attack(Configured, ABC):
    """A passive attack; subclasses are final, frozen and keyword-only."""

    key: ClassVar[str]
    """Catalogue key; equals the module's name."""
    needs: ClassVar[Knowledge] = Knowledge.UPDATES
    """The knowledge without which ``run`` cannot start."""
    version: ClassVar[int] = 1
    """Raised whenever results may change."""
    plain_loss_only: ClassVar[bool] = False
    """Whether the method rests on plain softmax cross-entropy; it refuses other losses."""
    replays: ClassVar[bool] = False
    """Whether every run goes through the client's local steps, which may need much memory."""
    watches_others: ClassVar[bool] = False
    """Whether it also reads the other clients' updates, as a server sees them (``view.others``);
    the view of an attack that does not say so has none."""
    departs_from_letter: ClassVar[str] = ""
    """Why ``needs`` differs from what the row's letter gives, if it does."""
    counts: ClassVar[tuple[str, ...]] = ("steps",)
    """Parameters that count iterations along the run's schedule; those that it lacks are passed
    over."""
    fewest: ClassVar[int] = 20
    """Iterations below which a run is no try of the method: what does not fit is not begun."""
    learned_by: ClassVar[tuple[str, ...] | None] = None
    """Parameters on which :meth:`prepare` depends; all of them if None."""
    draws_on_prior: ClassVar[bool] = False
    """Whether it holds a learned picture of what images look like, beside what it may learn in
    :meth:`prepare`: then a picture may be owed to that alone."""

    def knowledge(self) -> Knowledge:
        """The knowledge that these parameters need: :attr:`needs`, or less where options say so."""
        return self.needs

    def grants(self) -> frozenset[Grant]:
        """Grants that these parameters need."""
        return frozenset()

    @classmethod
    def tuned(cls) -> Self:
        """The preset for short budgets, chosen on public images; the published one by default."""
        return cls()

    @classmethod
    def variants(cls) -> Mapping[str, Self]:
        """What a rehearsal chooses from, by name: our short preset, the published one, others.

        A rehearsal makes all of them equally long. The first is what runs without a rehearsal.
        """
        return {"tuned": cls.tuned(), "published": cls()}

    @property
    @final
    def length(self) -> int | None:
        """Iterations of the whole run; None if no schedule depends on their number."""
        counted = [getattr(self, name) for name in self.counts if hasattr(self, name)]
        return sum(counted) if counted else None

    @final
    def lasting(self, iterations: int) -> Self:
        """The same attack with its schedule stretched over so many iterations, at least one each.

        Args:
            iterations: In place of :attr:`length`; an attack without one stays as it is.
        """
        length = self.length
        if length is None:
            return self
        scaled = {
            name: max(1, getattr(self, name) * iterations // length)
            for name in self.counts
            if getattr(self, name, 0)
        }
        return replace(self, **scaled)

    def priors(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        """Kept priors, by name or folder, that it may use on inputs ``(C, H, W)``.

        Whoever knows the truth refuses a victim that one of them was trained on.
        """
        del shape
        return ()

    def outlook(self, view: View) -> Outlook:
        """Whether this attack can work on ``view``, judged in a second from what it holds."""
        return Outlook("unknown", "nothing rules it out, nothing promises success")

    @abstractmethod
    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        """The algorithm, in the paper's order."""

    def prepare(
        self, surrogate: ImageSet, model: nn.Module, *, generator: torch.Generator, watch: Watch
    ) -> dict[str, Tensor]:
        """Offline learning on public data (generators, decoders, malicious encoders)."""
        return {}

    @final
    def artefact(
        self, surrogate: ImageSet, model: nn.Module, *, watch: Watch | None = None
    ) -> dict[str, Tensor]:
        """What :meth:`prepare` learned, from the cache if the same was learned before.

        The surrogate images and the model's weights belong to the cache key, so a changed
        checkpoint is learned anew.
        """
        return self.learned_once(
            [surrogate.fingerprint(), state_hash(model_state(model))],
            lambda generator, watch: self.prepare(
                surrogate, model, generator=generator, watch=watch
            ),
            watch=watch or Watch(),
            device=surrogate.images.device,
        )

    @final
    def learned_once(
        self,
        facts: Sequence[Any],
        learn: Callable[[torch.Generator, Watch], dict[str, Tensor]],
        *,
        watch: Watch,
        device: torch.device = CPU,
    ) -> dict[str, Tensor]:
        """What ``learn`` gives, from the cache if the same was learned before.

        Args:
            facts: All that the lesson rests on besides the attack's version and the parameters
                on which it depends, which are part of the cache key anyway; plain JSON.
            learn: ``(generator, watch) -> tensors by name``.
            watch: Budget and progress.
            device: Where it learns; its kind is part of the cache key, too.
        """
        parameters = self.to_json()
        if self.learned_by is not None:
            parameters = {name: parameters[name] for name in self.learned_by}
        return learned(
            self.key, [self.version, parameters, *facts], learn, watch=watch, device=device
        )

    @final
    def missing(self, view: View) -> Knowledge:
        """The knowledge that this attack needs and ``view`` does not hold."""
        return self.lacks(view.knowledge, view.grants)

    @final
    def lacks(self, knowledge: Knowledge, grants: frozenset[Grant]) -> Knowledge:
        """The knowledge that this attack needs besides what an adversary holds."""
        held = knowledge | (Knowledge.BASIC if Grant.PIXEL_RANGE in grants else Knowledge(0))
        return self.knowledge() & ~held

    @final
    def check(self, view: View) -> None:
        """Refuse a view that lacks what this attack needs.

        Raises:
            NotGranted: Naming the knowledge or the grant, and the way out.
            UnsupportedModel: If the method rests on another loss than the client's.
        """
        missing = self.missing(view)
        if missing:
            raise NotGranted(
                f"{type(self).__name__} needs {', '.join(missing.names()).upper()}, which "
                f"{view.describe()} does not hold; choose a threat model that does."
            )
        ungranted = self.grants() - view.grants
        if ungranted:
            names = ", ".join(sorted(ungranted))
            raise NotGranted(
                f"{type(self).__name__} with these parameters needs the grant {names}, which "
                f"this scenario does not give ({view.describe()}); add it to `grants`, or change "
                "the parameters that need it."
            )
        if self.plain_loss_only:
            require_plain(view.loss, type(self).__name__)

    @final
    def __call__(
        self,
        view: View,
        *,
        seed: int = 0,
        watch: Watch | None = None,
        scenario: Mapping[str, Any] | None = None,
    ) -> Reconstruction:
        """Run on a view and stamp the result.

        Args:
            view: The adversary's side.
            seed: Of everything random in the attack.
            watch: Budget and progress.
            scenario: The scenario behind the view, for the recipe.

        Raises:
            NotGranted: If the view lacks what the attack needs or reads.
        """
        self.check(view)
        watch = watch or Watch()
        recipe = self.recipe(seed, scenario or {})
        if watch.conduct.checkpoints is not None:
            # Equal recipes on different views start from the same noise; they must not mix.
            watch.conduct.begin(f"{recipe.content_hash[:16]}-{view.fingerprint()[:16]}")
        view.forget_reads()
        begun = time.perf_counter()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(self.key, seed))
            found = self.run(view, generator=stream(self.key, "run", seed), watch=watch)
        images = found.images.detach()
        finite = torch.isfinite(images).flatten(1).all(1)
        status, reason = found.status, found.reason
        if not bool(finite.all()):
            status, reason = "failed", f"{int((~finite).sum())} candidates are not finite"
            images = images[finite]
            found = replace(
                found,
                labels=None if found.labels is None else found.labels[finite],
                confidence=None if found.confidence is None else found.confidence[finite],
            )
        if status == "complete" and watch.cut_short:
            status, reason = "cut short", CUT
        return replace(
            found,
            images=images,
            status=status,
            reason=reason,
            seconds=time.perf_counter() - begun,
            execution=" | ".join(dict.fromkeys(watch.conduct.executions)),
            reads=view.reads,
            recipe=recipe,
        )

    @final
    def recipe(self, seed: int, scenario: Mapping[str, Any]) -> Recipe:
        """The recipe of a run with this seed on this scenario."""
        return Recipe(
            {"key": self.key, "version": self.version, "parameters": self.to_json()},
            dict(scenario),
            seed,
            {"leakatlas": leakatlas.__version__, "torch": torch.__version__},
        )


@dataclass(frozen=True, kw_only=True)
class ActiveAttack(Attack):
    """An attack that changes what clients receive before they train."""

    @abstractmethod
    def tamper(self, view: View, *, generator: torch.Generator, watch: Watch) -> Tampering | None:
        """Prepare the next round, knowing the earlier ones; None when enough was seen.

        Args:
            view: The adversary's side so far; ``view.rounds`` is empty at first.
            generator: The adversary's randomness.
            watch: Budget for what is learned before the first round.
        """


A = TypeVar("A", bound=type[Attack])


def attack(key: str, *, needs: Knowledge) -> Callable[[A], A]:
    """Declare an attack class: its catalogue key and the knowledge that it needs.

    Raises:
        InvalidParameter: If an active attack does not declare MANIPULATION, or the reverse.
    """

    def declare(cls: A) -> A:
        if issubclass(cls, ActiveAttack) != bool(needs & Knowledge.MANIPULATION):
            raise InvalidParameter(
                f"{cls.__name__} must be an ActiveAttack exactly if it needs MANIPULATION."
            )
        cls.key = key
        cls.needs = needs
        return cls

    return declare


def learned(
    name: str,
    facts: Sequence[Any],
    learn: Callable[[torch.Generator, Watch], dict[str, Tensor]],
    *,
    watch: Watch,
    device: torch.device = CPU,
) -> dict[str, Tensor]:
    """What ``learn`` gives, from the cache if the same was learned before.

    Args:
        name: What it is; also whose random streams it draws from.
        facts: All that the lesson rests on; plain JSON.
        learn: ``(generator, watch) -> tensors by name``.
        watch: Budget and progress.
        device: Where it learns; its kind is part of the cache key, too.
    """
    where = [] if device.type == "cpu" else [device.type]
    identity = json.dumps([name, *facts, *where], sort_keys=True)
    file = cache_folder() / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()}"
    file = file.with_suffix(".sealed")
    if (held := sealed.unseal(file)) is not None:
        try:
            return {n: t.to(device) for n, t in safetensors.torch.load(held).items()}
        except _NO_TENSORS:
            sealed.discard(file, "it holds no tensors")
    watch = Watch(parent=watch)
    with torch.random.fork_rng(devices=[]):
        # The cache key has no seed of the attack, so no draw may depend on one.
        torch.manual_seed(stream_seed(name, "prepare"))
        found = learn(stream(name, "prepare"), watch)
    # Learned in less time than asked for: good for this run, not for the next.
    if watch.cut_short or watch.planned is not None:
        return found
    tensors = {n: t.detach().cpu().clone().contiguous() for n, t in found.items()}
    try:
        sealed.seal(file, safetensors.torch.save(tensors))
    except OSError as problem:  # what was learned serves this run all the same
        warnings.warn(f"{file} cannot be written ({problem.strerror}).", stacklevel=4)
    return found


def cache_folder() -> Path:
    """Where learned artefacts are kept: ``$LEAKATLAS_CACHE``, else the user's cache folder."""
    import os

    chosen = os.environ.get("LEAKATLAS_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "leakatlas"
