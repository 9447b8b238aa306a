"""What ``study.yaml`` may say: a closed, typed description of everything that is varied.

A study has one set-up and some axes; every combination of one value from each axis, laid over the
set-up, is a case. The same keys may stand in the set-up and in a value of an axis.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from leakatlas.catalogue.schema import Letter, Strict, Text

SCHEMA = "leakatlas/study/1"

REHEARSED = "rehearsed"
"""The preset that the study's own ``choose(cell)`` gives."""

Whole = Annotated[int, Field(strict=True, ge=0)]
Counted = Annotated[int, Field(strict=True, gt=0)]
Duration = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(s|m|h)$")]
PositiveNumber = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Images(Strict):
    """A part of a data set; a plain text is short for ``{set: text}``."""

    set: Annotated[
        Text,
        Field(
            description="A data set as `leakatlas.data.load` names it; relative paths start from "
            "the data folder.",
            examples=["parquet:cifar10/test.parquet"],
        ),
    ]
    first: Annotated[Whole, Field(description="Index of its first image.", examples=[0])] = 0
    count: Annotated[
        Counted | None, Field(description="How many images; all if left out.", examples=[1000])
    ] = None
    size: Annotated[
        Counted | None, Field(description="Side to resize to, in pixels.", examples=[16])
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"set": value} if isinstance(value, str) else value


class Training(Strict):
    """Weights that a few epochs of Adam on public images give, before anybody attacks."""

    images: Annotated[
        Images,
        Field(
            description="Training images, disjoint from the victims.",
            examples=["parquet:cifar10/train.parquet"],
        ),
    ]
    epochs: Annotated[Counted, Field(description="Passes over them.", examples=[2])]
    lr: Annotated[PositiveNumber, Field(description="Step size of Adam.", examples=[0.002])] = 0.002
    batch_size: Annotated[Counted, Field(description="Images a step.", examples=[64])] = 64


class Model(Strict):
    """Which network; a plain text is short for ``{builtin: text}``."""

    builtin: Annotated[
        Text, Field(description="A name of `leakatlas.models`.", examples=["convnet"])
    ]
    kwargs: Annotated[
        dict[str, Any],
        Field(
            description="Its settings; `seed` is the seed of the cell unless it stands here.",
            examples=[{"width": 8}],
        ),
    ] = Field(default_factory=dict)
    weights: Annotated[
        Text | None,
        Field(
            description="Shipped weights by name, or a safetensors file beside `study.py` or in "
            "the data folder; fresh ones if left out.",
            examples=["convnet-cifar10"],
        ),
    ] = None
    train: Annotated[
        Training | None,
        Field(description="Weights made by a short training.", examples=[{"epochs": 2}]),
    ] = None
    dtype: Annotated[
        Literal["float32", "float64"],
        Field(description="Precision of client and attack.", examples=["float32"]),
    ] = "float32"

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"builtin": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_origin(self) -> Model:
        if self.weights is not None and self.train is not None:
            raise ValueError("the weights either come from `weights` or from `train`, not both")
        return self


class Pixels(Strict):
    """The pixel space by hand: mean and standard deviation of every channel."""

    mean: Annotated[
        tuple[float, ...], Field(min_length=1, description="Of each channel.", examples=[[0.5]])
    ]
    std: Annotated[
        tuple[PositiveNumber, ...],
        Field(min_length=1, description="Of each channel.", examples=[[0.25]]),
    ]


class AttackSpec(Strict):
    """Which attack; a plain text is short for ``{key: text}``."""

    key: Annotated[Text, Field(description="The attack's row.", examples=["dlg"])]
    preset: Annotated[
        Text,
        Field(
            description="`published`, `tuned`, or another preset of its class; `rehearsed` is what "
            "`choose(cell)` of `study.py` or `choose.py` gives, as long as the parameters say.",
            examples=["published"],
        ),
    ] = "published"
    parameters: Annotated[
        dict[str, Any],
        Field(description="Changes to the preset.", examples=[{"steps": 2000}]),
    ] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"key": value} if isinstance(value, str) else value


class Beside(Strict):
    """The row of the catalogue that a figure stands beside."""

    attack: Annotated[Text | None, Field(description="An attack's row.", examples=["dlg"])] = None
    defense: Annotated[
        Text | None, Field(description="A defense's row.", examples=["clipping"])
    ] = None
    reported: Annotated[
        Text | None,
        Field(
            description="The printed figure of that row, by its `measure`, that ours answers.",
            examples=["label accuracy"],
        ),
    ] = None

    @model_validator(mode="after")
    def _one_row(self) -> Beside:
        if (self.attack is None) == (self.defense is None):
            raise ValueError("exactly one of `attack` and `defense`")
        return self


class Course(Strict):
    """Looks at a federation's accuracy while it trains.

    Measures besides those of ``utility``: ``quarter`` and ``half``, the accuracy after so much of
    the rounds; ``rounds_to_goal``, the first look that reached the goal (one round more than there
    are if none did); ``reached`` and ``diverged``, shares of trainings.
    """

    images: Annotated[
        Images,
        Field(
            description="Images whose accuracy is looked at.",
            examples=[{"set": "digits", "first": 620, "count": 300}],
        ),
    ]
    every: Annotated[
        Counted, Field(description="Rounds from one look to the next.", examples=[2])
    ] = 1
    goal: Annotated[
        float,
        Field(
            gt=0,
            le=1,
            description="An accuracy, such as nine tenths of the undefended federation's.",
            examples=[0.45],
        ),
    ]


class Utility(Strict):
    """A federation that trains under the defenses of the case: what they cost.

    Its measures are ``accuracy``, on the test images, and ``lr``, the step size that was best.
    """

    train: Annotated[
        Images,
        Field(
            description="Training images, shared out equally among the clients.",
            examples=[{"set": "digits", "count": 320}],
        ),
    ]
    test: Annotated[
        Images,
        Field(
            description="Images whose accuracy is reported.",
            examples=[{"set": "digits", "first": 620, "count": 300}],
        ),
    ]
    validation: Annotated[
        Images | None, Field(description="Images on which the step size is chosen.")
    ] = None
    clients: Annotated[Counted, Field(description="Number of clients.", examples=[8])] = 8
    split: Annotated[
        PositiveNumber | None,
        Field(
            description="Concentration of the symmetric Dirichlet distribution that every client "
            "draws its mix of classes from; images are shared out in order if left out.",
            examples=[0.5],
        ),
    ] = None
    sampled: Annotated[
        float | None,
        Field(
            gt=0,
            le=1,
            description="Probability with which a client takes part in a round, independently of "
            "the others; all take part if left out.",
            examples=[0.05],
        ),
    ] = None
    rounds: Annotated[Counted, Field(description="Number of rounds.", examples=[25])]
    rates: Annotated[
        tuple[PositiveNumber, ...],
        Field(min_length=1, description="Step sizes tried (`lr`).", examples=[[0.5, 0.15]]),
    ]
    course: Annotated[
        Course | None,
        Field(description="How it gets there is measured, too; for a single one of `rates`."),
    ] = None

    @model_serializer(mode="wrap")
    def _as_before_they_were_keys(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Not used, they change no cell's name."""
        values: dict[str, Any] = plain(self)
        later = ("split", "sampled", "course")
        return {k: v for k, v in values.items() if k not in later or v is not None}

    @model_validator(mode="after")
    def _chosen_on_something(self) -> Utility:
        if (len(self.rates) > 1) != (self.validation is not None):
            raise ValueError("several `rates` are chosen among on `validation` images, one is not")
        if self.course is not None and len(self.rates) > 1:
            raise ValueError("`course` follows one training: name one of the `rates`")
        return self


class SyntheticHead(Strict):
    """A head over rectified Gaussian features, in place of a network."""

    classes: Annotated[Counted, Field(description="Number of classes.", examples=[100])]
    aligned: Annotated[
        bool, Field(description="Whether its rows point at their classes, as after training.")
    ] = False


class LabelBatches(Strict):
    """Batches whose labels rules recover: the measures of the case are rules by name.

    Every measure is IRec, the multiset overlap with the true labels; ``even-spread`` reads no
    update, and ``refusals`` counts the rules that refused a batch.
    """

    batches: Annotated[Counted, Field(description="Batches a seed.", examples=[10])] = 10
    draw: Annotated[
        Literal["any", "distinct classes", "one class", "in order"],
        Field(description="How a batch is taken from the victims.", examples=["any"]),
    ] = "any"
    dummies: Annotated[
        Whole, Field(description="Inputs from N(0, 1) that the adversary runs.", examples=[400])
    ] = 400
    anew: Annotated[
        bool, Field(description="Whether every batch meets a network with a seed of its own.")
    ] = False
    synthetic: Annotated[SyntheticHead | None, Field(description="In place of a network.")] = None


class OwnMeasure(Strict):
    """A measure that is described here: a look of the bench, or what ``study.py`` computes.

    Under `utility` and `labelling` it is what these give.
    """

    name: Annotated[Text, Field(description="What it is called, and what `study.py` returns.")]
    by: Annotated[
        Text | None,
        Field(
            description="The look or label rule that gives it, if not called so.", examples=["gdbr"]
        ),
    ] = None
    kind: Annotated[
        Literal["mean", "share"],
        Field(
            description="`mean` (bootstrap interval), or `share` of yes and no (Wilson).",
            examples=["mean"],
        ),
    ] = "mean"
    unit: Annotated[str, Field(description="Unit, empty for a ratio.", examples=["dB"])] = ""
    note: Annotated[str, Field(description="What a reader must know.")] = ""

    @property
    def computes(self) -> str:
        """What gives it."""
        return self.by or self.name


class Case(Strict):
    """One full set-up: everything that decides what is attacked, how, and how it is measured."""

    model: Annotated[Model, Field(description="The network.", examples=["convnet"])]
    victims: Annotated[
        Images, Field(description="Private images.", examples=["parquet:cifar10/test.parquet"])
    ]
    choose: Annotated[
        Literal["in order", "distinct labels", "one class"],
        Field(
            description="How a batch is taken from the victims.",
            examples=["in order"],
        ),
    ] = "in order"
    label: Annotated[
        Whole | None, Field(description="The class of `choose: one class`.", examples=[3])
    ] = None
    classes_a_client: Annotated[
        Counted | None,
        Field(
            description="Classes that a client holds and no other does: the first client the "
            "first so many, and so on, in the first batch; they go round with the number of the "
            "batch. Its images are the next ones of its classes, in order.",
            examples=[2],
        ),
    ] = None
    surrogate: Annotated[
        Images | None,
        Field(
            description="Public images, for letters that hold them and for the null baselines.",
            examples=[{"set": "parquet:cifar10/test.parquet", "first": 8000, "count": 1000}],
        ),
    ] = None
    pixels: Annotated[
        Literal["unit", "cifar10"] | Pixels,
        Field(description="Pixel space of the model.", examples=["cifar10"]),
    ] = "unit"
    batch: Annotated[Counted, Field(description="Images a client.", examples=[1])] = 1
    clients: Annotated[Counted, Field(description="Number of clients.", examples=[1])] = 1
    target: Annotated[Whole, Field(description="The client under attack.", examples=[0])] = 0
    rounds: Annotated[
        Counted, Field(description="Rounds that a passive adversary watches.", examples=[1])
    ] = 1
    lean: Annotated[
        bool,
        Field(
            description="Whether clients train one after the other and only their sum is kept, "
            "for rounds whose models would not fit in memory together.",
            examples=[True],
        ),
    ] = False
    protocol: Annotated[
        dict[str, Any],
        Field(
            description="`algorithm: fedsgd` or `fedavg`, and its parameters.",
            examples=[{"algorithm": "fedavg", "epochs": 2}],
        ),
    ] = Field(default_factory=lambda: {"algorithm": "fedsgd"})
    defenses: Annotated[
        tuple[dict[str, Any], ...],
        Field(
            description="Defenses in force: `key` and parameters.",
            examples=[[{"key": "clipping", "max_norm": 1.0}]],
        ),
    ] = ()
    attack: Annotated[
        AttackSpec | None,
        Field(description="The attack; none if `study.py` measures by itself.", examples=["dlg"]),
    ] = None
    utility: Annotated[
        Utility | None,
        Field(description="A training under the defenses, in place of an attack."),
    ] = None
    labelling: Annotated[
        LabelBatches | None,
        Field(description="Batches for label rules, in place of an attack."),
    ] = None
    letter: Annotated[Letter, Field(description="Threat model.", examples=["B"])] = "B"
    vantage: Annotated[
        Literal["wire", "server", "aggregate", "peer"],
        Field(description="Where the adversary looks.", examples=["server"]),
    ] = "server"
    grants: Annotated[
        tuple[Text, ...], Field(description="Extra facts.", examples=[["labels"]])
    ] = ()
    budget: Annotated[
        Literal["paper"] | Duration,
        Field(
            description="`paper` runs the attack's own steps to their end; `30s` or `10m` is what "
            "an audit would give it.",
            examples=["paper"],
        ),
    ] = "paper"
    execution: Annotated[
        Literal["auto", "eager", "channels_last", "vmap", "traced", "compiled", "finite"],
        Field(
            description="How slopes are computed; `eager` repeats long runs bit for bit.",
            examples=["eager"],
        ),
    ] = "eager"
    seeds: Annotated[
        tuple[Whole, ...],
        Field(min_length=1, description="Seeds of networks, noise and attacks.", examples=[[0, 1]]),
    ] = (0,)
    batches: Annotated[
        Counted | Literal["one a seed"],
        Field(
            description="How many disjoint batches every seed attacks, or `one a seed`: the first "
            "seed the first batch, the second the next.",
            examples=[10],
        ),
    ] = 1
    control: Annotated[
        bool,
        Field(
            description="Whether the attack also runs on another batch with the same labels, a "
            "null baseline.",
            examples=[True],
        ),
    ] = False
    measures: Annotated[
        tuple[Text | OwnMeasure, ...],
        Field(
            min_length=1,
            description="What is reported: names, or measures of `study.py`.",
            examples=[["psnr", "exact"]],
        ),
    ]
    beside: Annotated[
        Beside | None,
        Field(description="The row that the figures stand beside.", examples=[{"attack": "dlg"}]),
    ] = None
    memory: Annotated[
        PositiveNumber,
        Field(description="GiB that the attack may take on top of its libraries.", examples=[4.0]),
    ] = 4.0
    time: Annotated[
        Duration, Field(description="Time after which the attack is killed.", examples=["1h"])
    ] = "6h"
    note: Annotated[str, Field(description="What a reader must know of this case.")] = ""

    @model_validator(mode="after")
    def _fits(self) -> Case:
        if (self.choose == "one class") != (self.label is not None):
            raise ValueError("`label` goes with `choose: one class`, and only with it")
        if self.classes_a_client is not None and self.choose != "in order":
            raise ValueError("`classes_a_client` says how images are taken, and so does `choose`")
        if self.target >= self.clients:
            raise ValueError(f"client {self.target} is not one of the {self.clients} clients")
        if self.lean and (self.vantage != "aggregate" or self.rounds > 1):
            raise ValueError("a `lean` round is one round seen from the vantage `aggregate`")
        if sum(what is not None for what in (self.attack, self.utility, self.labelling)) > 1:
            raise ValueError("one of `attack`, `utility` and `labelling`")
        if self.control and self.attack is None:
            raise ValueError("`control` runs the attack once more, and there is no `attack`")
        return self


class Comparison(Strict):
    """A paired difference: one measure of a case minus that of another, image by image."""

    measure: Annotated[Text, Field(description="Which measure.", examples=["psnr"])]
    of: Annotated[Text, Field(description="The case that is held against the other.")]
    minus: Annotated[Text, Field(description="The other case.")]


class Where(Strict):
    """What is laid over some combinations, on top of the values of their axes."""

    match: Annotated[
        dict[str, Text],
        Field(
            min_length=1,
            description="By axis a pattern of its values, with `*` for anything.",
            examples=[{"defense": "central_dp*"}],
        ),
    ]
    lay: Annotated[
        dict[str, Any],
        Field(min_length=1, description="Keys of the set-up.", examples=[{"clients": 4}]),
    ]


EVERY_DEFENSE = "every defense"
"""As the values of an axis: ``none``, and every implemented defense at each of its strengths."""


class StudyFile(Strict):
    """One ``study.yaml``."""

    schema_: Annotated[
        Literal["leakatlas/study/1"],
        Field(alias="schema", description="Version of the format.", examples=[SCHEMA]),
    ]
    title: Annotated[Text, Field(description="One line.", examples=["DLG to machine precision"])]
    question: Annotated[
        Text,
        Field(
            description="What the study answers.",
            examples=["Does DLG reach machine precision on a sigmoid LeNet?"],
        ),
    ]
    chosen: Annotated[
        Text,
        Field(
            description="What was chosen (step sizes, weights) on which images; never the victims.",
            examples=["nothing; the published preset"],
        ),
    ]
    setup: Annotated[
        dict[str, Any],
        Field(min_length=1, description="What all cases share.", examples=[{"model": "lenet"}]),
    ]
    axes: Annotated[
        dict[str, dict[str, dict[str, Any]] | list[Any] | Literal["every defense"]],
        Field(
            description="What is varied. Either named values, each laid over the set-up, or, under "
            "the dotted name of one key, the list of its values; `every defense` stands for none "
            "and all that are implemented, each at its strengths.",
            examples=[{"batch": [1, 8]}],
        ),
    ] = Field(default_factory=dict)
    exclude: Annotated[
        tuple[dict[str, Text], ...],
        Field(
            description="Combinations that make no case, by axis a pattern of its values.",
            examples=[[{"attack": "full", "batch": "*"}]],
        ),
    ] = ()
    where: Annotated[
        tuple[Where, ...],
        Field(
            description="What some combinations need beside the values of their axes.",
            examples=[[{"match": {"defense": "central_dp*"}, "lay": {"clients": 4}}]],
        ),
    ] = ()
    compare: Annotated[
        tuple[Comparison, ...],
        Field(
            description="Paired differences between cases.",
            examples=[[{"measure": "psnr", "of": "full", "minus": "no_bn"}]],
        ),
    ] = ()
    correlate: Annotated[
        bool,
        Field(
            description="Whether rank correlations of the described measures with PSNR are added, "
            "attack by attack of the last axis.",
            examples=[True],
        ),
    ] = False
    summary: Annotated[
        bool | Literal["frontier"],
        Field(
            description="Whether `summarise(study, records)` of `study.py` adds figures over all "
            "cases, such as a correlation; `frontier` is the bench's own, what defenses stop "
            "against what they cost.",
            examples=[True],
        ),
    ] = False

    @field_validator("axes")
    @classmethod
    def _not_empty(cls, axes: dict[str, Any]) -> dict[str, Any]:
        for name, values in axes.items():
            if not values:
                raise ValueError(f"axis {name!r} has no value")
        return axes


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a study file, set-up and axis values included."""
    whole = StudyFile.model_json_schema()
    case = Case.model_json_schema()
    whole["$defs"] = {**whole.get("$defs", {}), **case.pop("$defs", {})}
    # A set-up may be completed by an axis, so nothing in it is required by itself.
    case.pop("required", None)
    whole["$defs"]["SetUp"] = case
    whole["properties"]["setup"] = {
        "$ref": "#/$defs/SetUp", "description": whole["properties"]["setup"]["description"],
    }  # fmt: skip
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **whole}
