"""The types of the catalogue's rows.

A *published* row holds what the systematization prints, typed: numbers are numbers, choices are
closed. Where the print is wrong, a :class:`Correction` stands beside it with both values and the
reason; :meth:`Row.corrected` is the row with all of them applied. Rows that LeakAtlas adds are
*newer* works or *deployed* defenses; nothing of theirs is printed, so they are corrected in place.
Rows name one another by key: only references carry numbers, and only those that are printed.

The JSON Schema that editors use is generated from these classes, and so are the hints in the
messages of ``leakatlas validate``: a field's ``description`` and ``examples`` are what a
contributor is shown.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Letter = Literal["A", "B", "C", "D", "E", "F", "G", "H"]
KnowledgeName = Literal[
    "updates", "basic", "training", "surrogate", "distribution", "manipulation", "selection"
]
Stance = Literal["holds", "partial", "fails"]
Modality = Literal["image", "text", "tabular", "series", "graph", "speech"]
Payload = Literal["full", "head", "adapter", "embedding"]
Algorithm = Literal["fedsgd", "fedavg", "both"]
AttackCategory = Literal["optimization", "generative", "analytic"]
AttackTechnique = Literal[
    "basic",
    "augmented",
    "online",
    "direct",
    "latent",
    "closed_form",
    "sparsification",
    "isolation",
]
Mechanism = Literal[
    "gradient-matching",
    "source-separation",
    "update-denoising",
    "generator-training",
    "feature-inversion",
    "latent-search",
    "diffusion-guidance",
    "layer-recursion",
    "attention-algebra",
    "low-rank-sparsity",
    "binning",
    "fishing",
    "trap",
    "class-decoupling",
    "learned",
]
DefenseCategory = Literal["formal", "heuristic"]
DefenseTechnique = Literal["dp", "crypto", "perturbation", "learning", "model"]
Hook = Literal[
    "setup",
    "model",
    "batch",
    "local_step",
    "update",
    "peer",
    "wire",
    "aggregate",
    "evaluate",
]

LETTERS: tuple[Letter, ...] = get_args(Letter)

# A technique belongs to one category; together they are the path of the module.
ATTACK_TECHNIQUES: dict[str, tuple[str, ...]] = {
    "optimization": ("basic", "augmented"),
    "generative": ("online", "direct", "latent"),
    "analytic": ("closed_form", "sparsification", "isolation"),
}
DEFENSE_TECHNIQUES: dict[str, tuple[str, ...]] = {
    "formal": ("dp", "crypto"),
    "heuristic": ("perturbation", "learning", "model"),
}

Key = Annotated[
    str,
    StringConstraints(pattern=r"^[a-z][a-z0-9_]*$"),
    Field(
        description="Name of the module, the page and the test: lower case, digits, underscores.",
        examples=["inverting_gradients"],
    ),
]
Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
Url = Annotated[
    str,
    StringConstraints(pattern=r"^https?://[^\s<>\"']+$"),
    Field(description="A full http(s) link.", examples=["https://arxiv.org/abs/1906.08935"]),
]
Count = Annotated[int, Field(gt=0, strict=True)]
Year = Annotated[
    int,
    Field(ge=1990, le=2100, strict=True, description="Year of publication.", examples=[2024]),
]
BibKey = Annotated[
    str,
    StringConstraints(pattern=r"^[a-z0-9]+$"),
    Field(description="BibTeX key: family name, year, word.", examples=["zhu2019deep"]),
]
ReferenceKey = Annotated[str, Field(description="Key of a reference.", examples=["zhu2019deep"])]


class Strict(BaseModel):
    """Frozen, and refuses names that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Correction(Strict):
    """One cell in which the print and the sources disagree."""

    field: Annotated[
        str, Field(description="Name of the corrected field.", examples=["threat_model"])
    ]
    printed: Annotated[Any, Field(description="The printed value, repeated from the row.")]
    corrected: Annotated[Any, Field(description="The value that the sources support.")]
    reason: Annotated[
        Text,
        Field(
            description="Why, and according to what source.",
            examples=["The released code reads no statistics of the client's data."],
        ),
    ]


class Reported(Strict):
    """One number that the authors publish, and the setting it belongs to."""

    measure: Annotated[Text, Field(description="What was measured.", examples=["psnr"])]
    value: Annotated[
        float, Field(strict=True, description="The published number.", examples=[23.4])
    ]
    unit: Annotated[str, Field(description="Unit, empty for a ratio.", examples=["dB"])] = ""
    setting: Annotated[
        Text,
        Field(
            description="Data, model, batch and protocol of the number.",
            examples=["CIFAR-10, ConvNet, batch 1"],
        ),
    ]
    source: Annotated[
        Text, Field(description="Where it was read.", examples=["README of the official code"])
    ]


class Code(Strict):
    """Whether the authors' code can be had."""

    kind: Annotated[
        Literal["none", "link", "colab", "various", "promised", "gone"],
        Field(
            description=(
                "none; a link; a colab; various implementations; promised but not there yet; or "
                "gone, the address no longer answers."
            ),
            examples=["link"],
        ),
    ] = "none"
    url: Annotated[
        Url | None,
        Field(
            description="The repository as a full http(s) link, for kind link and colab.",
            examples=["https://github.com/mit-han-lab/dlg"],
        ),
    ] = None
    official: Annotated[
        bool, Field(description="false for a third party's copy.", examples=[True])
    ] = True


class Batch(Strict):
    """The largest batch: images (FedSGD), or E x B (FedAVG)."""

    size: Annotated[
        Count | None,
        Field(description="Images in one local batch (B).", examples=[8]),
    ] = None
    epochs: Annotated[
        Count | None,
        Field(description="Local iterations or epochs (E), for FedAVG.", examples=[10]),
    ] = None
    local_steps: Annotated[
        Count | None,
        Field(description="Local steps, where the count is of steps and not of epochs."),
    ] = None
    images: Annotated[
        Count | None, Field(description="Images the client trains on, where it is known.")
    ] = None


class LabelRecovery(Strict):
    """How the attack comes by the labels."""

    kind: Annotated[
        Literal["new", "assumed", "optimised", "none", "row", "outside"],
        Field(
            description=(
                "new: proposes a method; assumed: labels are given; optimised: found together "
                "with the images; none: not needed or not treated; row: uses another row's method; "
                "outside: uses a work that is no row."
            ),
            examples=["new"],
        ),
    ]
    row: Annotated[
        str | None, Field(description="Key of that attack, for kind = 'row'.", examples=["idlg"])
    ] = None
    url: Annotated[Url | None, Field(description="Which work, for kind = 'outside'.")] = None


class Row(Strict):
    """What attacks, defenses, threat models and references share."""

    corrections: tuple[Correction, ...] = ()
    notes: Annotated[
        tuple[Text, ...], Field(description="What a reader must know to use the row.")
    ] = ()

    def corrected(self) -> Self:
        """This row with every correction applied (fields keep their types)."""
        if not self.corrections:
            return self
        values = self.model_dump() | {c.field: c.corrected for c in self.corrections}
        return type(self).model_validate(values)


class ThreatModel(Row):
    """One letter: a set of knowledge."""

    letter: Annotated[Letter, Field(description="A-H.", examples=["B"])]
    name: Annotated[Text, Field(description="The published name.")]
    knowledge: Annotated[
        tuple[KnowledgeName, ...],
        Field(description="What this adversary holds.", examples=[["updates", "basic"]]),
    ]
    applicability: Annotated[
        int,
        Field(ge=1, le=3, strict=True, description="Printed stars, 1 to 3.", examples=[2]),
    ]
    summary: Annotated[Text, Field(description="Who this is, in our own words.")]


class Unit(Row):
    """What an attack and a defense share: a place in the code, and claims about it."""

    key: Key
    origin: Annotated[
        Literal["published", "newer", "deployed"],
        Field(
            description=(
                "published: a row of the systematization's tables; newer: a work that they lack; "
                "deployed: what a framework ships. Whoever adds a row leaves it out or says "
                "deployed."
            ),
            examples=["newer"],
        ),
    ] = "newer"
    superseded_by: Annotated[
        Key | None,
        Field(description="The row that does the same better.", examples=["gifd"]),
    ] = None
    modality: Annotated[
        Modality, Field(description="What is reconstructed.", examples=["image"])
    ] = "image"
    payload: Annotated[
        Payload,
        Field(
            description="What of the model travels: all of it, its head, adapters, embeddings.",
            examples=["full"],
        ),
    ] = "full"
    name: Annotated[Text, Field(description="Short name for people.", examples=["GIFD"])]
    aliases: Annotated[tuple[Text, ...], Field(description="Other names in use.")] = ()
    category: str
    technique: str
    code: Annotated[Code, Field(description="The authors' code.")] = Code()
    reported: Annotated[tuple[Reported, ...], Field(description="Published numbers.")] = ()
    reconstructed: Annotated[
        str, Field(description="Set where the method was rebuilt from an abstract: say why.")
    ] = ""
    planned: Annotated[bool, Field(description="true until the module exists.")] = False


class Attack(Unit):
    """One attack."""

    reference: ReferenceKey
    category: Annotated[
        AttackCategory, Field(description="First folder of the path.", examples=["optimization"])
    ]
    technique: Annotated[
        AttackTechnique, Field(description="Second folder of the path.", examples=["basic"])
    ]
    mechanism: Annotated[
        Mechanism, Field(description="What makes it work.", examples=["gradient-matching"])
    ]
    threat_model: Annotated[
        Letter, Field(description="The letter A-H that the table gives.", examples=["D"])
    ]
    algorithm: Annotated[Algorithm, Field(description="What the clients run.", examples=["fedsgd"])]
    resolution: Annotated[
        tuple[Count, Count] | Literal["input", "unknown"],
        Field(
            description='Largest image as [height, width]; "input" for any; "unknown".',
            examples=[[64, 64]],
        ),
    ]
    batch: Annotated[Batch, Field(description="The largest batch.", examples=[{"size": 8}])]
    models: Annotated[
        tuple[Text, ...],
        Field(description="Shared models of the experiments.", examples=[["ResNet-18"]]),
    ]
    tasks: Annotated[
        tuple[Literal["object", "face", "x-ray", "medical", "text", "tabular"], ...],
        Field(min_length=1, description="Learning tasks.", examples=[["object"]]),
    ]
    label_recovery: Annotated[
        LabelRecovery,
        Field(description="How it comes by the labels.", examples=[{"kind": "new"}]),
    ]
    footnotes: Annotated[
        tuple[Literal[2, 3], ...],
        Field(description="Printed footnotes of the shared model.", examples=[[2]]),
    ] = ()
    summary: Annotated[Text, Field(description="The idea in one sentence, in our own words.")]


StanceCell = Annotated[Stance, Field(description="holds, partial or fails.", examples=["partial"])]


class Stances(Strict):
    """How well a defense does against each letter."""

    A: StanceCell
    B: StanceCell
    C: StanceCell
    D: StanceCell
    E: StanceCell
    F: StanceCell
    G: StanceCell
    H: StanceCell

    def of(self, letter: str) -> Stance:
        """The stance against one letter."""
        stance: Stance = getattr(self, letter)
        return stance


class Evidence(Strict):
    """What another work says about a defense."""

    letters: Annotated[
        tuple[Letter, ...], Field(min_length=1, description="Which cells it concerns.")
    ]
    stance: Annotated[Stance, Field(description="What it supports.", examples=["fails"])]
    works: Annotated[
        tuple[ReferenceKey, ...], Field(min_length=1, description="Which references say so.")
    ]
    text: Annotated[Text, Field(description="What they show, in our own words.")]


class Defense(Unit):
    """One defense."""

    works: Annotated[
        tuple[ReferenceKey, ...],
        Field(description="Keys of its references.", examples=[["sun2021soteria"]]),
    ] = ()
    ships_in: Annotated[
        str,
        Field(
            description="Framework, version and class of a deployed defense.",
            examples=["Flower 1.42: flwr.clientapp.mod.LocalDpMod"],
        ),
    ] = ""
    label: Annotated[str, Field(description="Word printed before the reference, if any.")] = ""
    category: Annotated[
        DefenseCategory, Field(description="First folder of the path.", examples=["heuristic"])
    ]
    technique: Annotated[
        DefenseTechnique, Field(description="Second folder of the path.", examples=["model"])
    ]
    year: Annotated[
        Year | None, Field(description="Printed year, or of the release; leave out for N/A.")
    ] = None
    where: Annotated[
        Literal["client", "server"], Field(description="Who applies it.", examples=["client"])
    ]
    hooks: Annotated[
        tuple[Hook, ...],
        Field(min_length=1, description="Where in the round it acts.", examples=[["update"]]),
    ]
    stance: Annotated[
        Stances | None,
        Field(
            description=(
                "holds, partial or fails for every letter, as printed (green, orange, red). Rows "
                "that are not printed leave it out: claims are `evidence`, colours are measured."
            ),
            examples=[dict.fromkeys(LETTERS, "partial")],
        ),
    ] = None
    stance_breaks: Annotated[
        tuple[Letter, ...], Field(description="Letters after which the print breaks the line.")
    ] = ()
    intuition: Annotated[Text, Field(description="Why it should work, in our own words.")]
    weakness: Annotated[Text, Field(description="Where it fails, in our own words.")]
    evidence: Annotated[
        tuple[Evidence, ...], Field(description="What works say of it, its own among them.")
    ] = ()

    def stance_against(self, letter: str) -> Stance | None:
        """The printed stance against one letter, or None for a row that is not printed."""
        return None if self.stance is None else self.stance.of(letter)


class Link(Strict):
    """A printed link of a reference."""

    label: Annotated[Text, Field(description="Printed text of the link.", examples=["paper"])]
    url: Url


class Reference(Row):
    """One work."""

    number: Annotated[
        int | None,
        Field(
            gt=0,
            strict=True,
            description="Number that the systematization prints; others have none.",
            examples=[59],
        ),
    ] = None
    key: BibKey
    entry: Annotated[
        Literal["article", "inproceedings", "incollection", "misc"],
        Field(description="BibTeX entry type.", examples=["inproceedings"]),
    ]
    title: Annotated[Text, Field(description="Title of the work.")]
    authors: Annotated[
        tuple[Text, ...],
        Field(
            min_length=1,
            description="Authors as 'Family, Given'; 'others' where the rest is unknown to us.",
            examples=[["Zhu, Ligeng", "Liu, Zhijian", "Han, Song"]],
        ),
    ]
    year: Year
    venue: Annotated[Text, Field(description="Journal, proceedings or archive.")]
    volume: str = ""
    issue: str = ""
    eprint: Annotated[str, Field(description="arXiv identifier.", examples=["1906.08935"])] = ""
    doi: Annotated[str, Field(description="DOI.", examples=["10.1145/3592800"])] = ""
    printed: Annotated[
        Text | None, Field(description="The printed text before the links, for a printed number.")
    ] = None
    links: Annotated[
        tuple[Link, ...],
        Field(
            min_length=1,
            description="Links, in the printed order.",
            examples=[[{"label": "paper", "url": "https://arxiv.org/abs/1906.08935"}]],
        ),
    ]


class Catalogue(Strict):
    """All rows of one kind in one file."""

    threat_model: tuple[ThreatModel, ...] = ()
    attack: tuple[Attack, ...] = ()
    defense: tuple[Defense, ...] = ()
    reference: tuple[Reference, ...] = ()


ROW_TYPES: dict[str, type[Row]] = {
    "threat_model": ThreatModel,
    "attack": Attack,
    "defense": Defense,
    "reference": Reference,
}


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a catalogue file (any mix of ``[[attack]]``, ``[[reference]]``, ...)."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Catalogue.model_json_schema(),
        "title": "LeakAtlas catalogue",
    }
