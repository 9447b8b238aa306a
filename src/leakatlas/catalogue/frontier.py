"""The figures of the frontier, taken apart again, and their page in Markdown.

Their names are ``what | network | defense``; :mod:`leakatlas.bench.frontier` says what each is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from leakatlas.catalogue import loader, tables
from leakatlas.catalogue.results import FRONTIER, JOIN, Colour, Measure, Result, measured_colours
from leakatlas.catalogue.schema import LETTERS
from leakatlas.errors import UnknownName

UNDEFENDED = "none"


@dataclass
class Strength:
    """One defense at one strength, on one network.

    Args:
        recovered: Share of images that some adversary recovered.
        loss: Points of accuracy lost; None if that was not measured.
        noise: DB that a search gains over noise of equal size; None where nothing compares.
        levels: Share that each adversary alone recovered.
    """

    recovered: Measure
    loss: Measure | None = None
    noise: Measure | None = None
    levels: dict[str, Measure] = field(default_factory=dict)


@dataclass
class Row:
    """One defense on one network.

    Args:
        key: Of its row; ``none`` for the undefended set-up.
        name: For people.
        points: By strength.
        private: Least share recovered at an affordable price, if a strength has one.
        price: Least price at which next to nothing is recovered, if a strength does that.
    """

    key: str
    name: str
    points: dict[str, Strength] = field(default_factory=dict)
    private: Measure | None = None
    price: Measure | None = None

    @property
    def dear(self) -> str:
        """Why nothing stands under :attr:`private`."""
        return "no strength costs so little" if self.priced else "price not measured"

    @property
    def open(self) -> str:
        """Why nothing stands under :attr:`price`."""
        return "no strength stops so much" if self.priced else "price not measured"

    @property
    def priced(self) -> bool:
        """Whether the price of any strength was measured."""
        return any(point.loss is not None for point in self.points.values())


def result_of(measured: Iterable[Result]) -> Result | None:
    """The frontier among all results."""
    return next((r for r in measured if (r.kind, r.key) == ("benchmark", FRONTIER)), None)


def networks(measures: Iterable[Measure]) -> dict[str, list[Row]]:
    """Rows by network, in the order of the study."""
    found: dict[str, dict[str, Row]] = defaultdict(dict)
    measures = list(measures)
    for measure in measures:
        match measure.name.split(JOIN):
            case ["recovered", network, defense]:
                key, _, strength = defense.partition(", ")
                row = found[network].setdefault(key, Row(key, name_of(key)))
                row.points[strength] = Strength(measure)
    for measure in measures:
        match measure.name.split(JOIN):
            case ["level", network, defense, adversary]:
                _point(found, network, defense).levels[adversary] = measure
            case ["loss", network, defense]:
                _point(found, network, defense).loss = measure
            case ["noise", network, defense]:
                _point(found, network, defense).noise = measure
            case ["private", network, key]:
                found[network][key].private = measure
            case ["price", network, key]:
                found[network][key].price = measure
    return {network: list(rows.values()) for network, rows in found.items()}


def nulls(measures: Iterable[Measure]) -> dict[str, dict[str, Measure]]:
    """Null baselines, by network and name."""
    found: dict[str, dict[str, Measure]] = defaultdict(dict)
    for measure in measures:
        match measure.name.split(JOIN):
            case ["null", network, name]:
                found[network][name.replace("_", " ")] = measure
    return dict(found)


def undefended(measures: Iterable[Measure]) -> dict[str, Measure]:
    """Accuracy of the training without a defense, in percent, by network."""
    found = {}
    for measure in measures:
        match measure.name.split(JOIN):
            case ["accuracy", network, key] if key == UNDEFENDED:
                found[network] = measure
    return found


ELSEWHERE = ("utility_standard", "utility_batch_norm", "dp_many_users")
"""Studies that ask for prices in federations unlike the frontier's."""


WAY = {"quarter": "after a quarter", "half": "after half", "rounds_to_goal": "rounds to goal"}
"""How a training got there, where a study follows it: names of its measures, and for people."""


@dataclass(frozen=True)
class Elsewhere:
    """One training in another federation.

    Args:
        accuracy: At the end.
        way: Of the measures of :data:`WAY` those that were taken.
        reached: Share of trainings that reached the goal.
        diverged: Share of trainings that ended with entries that are not finite.
    """

    accuracy: Measure
    way: Mapping[str, Measure]
    reached: float = 1.0
    diverged: float = 0.0

    @property
    def federation(self) -> str:
        """Of which federation it is; empty if its study has one."""
        return self.accuracy.case.rpartition("/")[0]

    @property
    def defense(self) -> str:
        """Under which defense."""
        return self.accuracy.case.rpartition("/")[2]

    def remarks(self, common: str) -> str:
        """What a reader must know beside what is said of the whole federation."""
        said = common.split("; ")
        own = [part for part in self.accuracy.note.split("; ") if part not in said]
        if self.diverged:
            own.insert(0, f"{self.diverged:.0%} of the trainings diverged")
        return "; ".join(own)

    def on_the_way(self, name: str) -> str:
        """A measure of the way, in words."""
        if name not in self.way:
            return "-"
        measure = self.way[name]
        if name != "rounds_to_goal":
            return accuracy(measure)
        if not self.reached:
            return "missed"
        low, high = measure.interval or (measure.value, measure.value)
        missed = f", {1 - self.reached:.0%} missed it" if self.reached < 1 else ""
        return f"{measure.value:.0f} [{low:.0f}, {high:.0f}]{missed}"


def elsewhere(measured: Iterable[Result]) -> dict[str, list[list[Elsewhere]]]:
    """Trainings in other federations, by study: a list for each, the undefended one first."""
    found: dict[str, dict[str, dict[str, Measure]]] = {study: {} for study in ELSEWHERE}
    for result in measured:
        for measure in result.measures if result.study in found else ():
            found[result.study].setdefault(measure.case, {})[measure.name] = measure

    federations: dict[str, list[list[Elsewhere]]] = {}
    for study, cases in found.items():
        trainings: dict[str, list[Elsewhere]] = defaultdict(list)
        for taken in cases.values():
            if (final := taken.get("accuracy")) is None:
                continue
            way = {name: taken[name] for name in WAY if name in taken}
            shares = {n: taken[n].value for n in ("reached", "diverged") if n in taken}
            one = Elsewhere(final, way, **shares)
            trainings[one.federation].append(one)
        if trainings:
            federations[study] = [
                sorted(trainings[name], key=lambda one: (one.defense != UNDEFENDED, one.defense))
                for name in sorted(trainings)
            ]
    return federations


def followed(trainings: Iterable[Elsewhere]) -> dict[str, str]:
    """The columns of :data:`WAY` that a table of them needs."""
    return {n: title for n, title in WAY.items() if any(n in one.way for one in trainings)}


def run(measures: Iterable[Measure]) -> str:
    """How many cells have been run, and what they took; empty if that was not recorded."""
    found = {m.name: m for m in measures if m.name.startswith(f"run{JOIN}")}
    if not found:
        return ""
    cells, hours = found[f"run{JOIN}cells"], found[f"run{JOIN}CPU hours"]
    return f"{cells.value:.0f} {cells.note} cells, {hours.value:.1f} CPU hours {hours.note}"


def described(measures: Iterable[Measure]) -> dict[str, str]:
    """What every network is."""
    found = {}
    for measure in measures:
        match measure.name.split(JOIN):
            case ["network", network]:
                found[network] = measure.note
    return found


def untried(measures: Iterable[Measure]) -> dict[str, dict[str, str]]:
    """Where no adversary could try: why, by network and strength."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for measure in measures:
        match measure.name.split(JOIN):
            case ["untried", network, defense]:
                found[network][defense] = measure.note
    return dict(found)


def unmeasured(measures: Iterable[Measure]) -> dict[str, dict[str, str]]:
    """What was not run yet, by network and adversary."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for measure in measures:
        match measure.name.split(JOIN):
            case ["unmeasured", network, adversary]:
                found[network][adversary] = (
                    f"{measure.value:.0f} of {measure.n} cells: {measure.note}"
                )
    return dict(found)


def _point(found: Mapping[str, Mapping[str, Row]], network: str, defense: str) -> Strength:
    key, _, strength = defense.partition(", ")
    return found[network][key].points[strength]


def name_of(key: str) -> str:
    """A defense's name for people."""
    try:
        return tables.name_of(loader.defense(key))
    except UnknownName:  # the undefended set-up
        return "no defense" if key == UNDEFENDED else key


LOCAL = "FedAVG"
"""In the name of a network whose clients take several local steps."""

BATCH_NORM = "batch norm"
"""In the name of a network that keeps running statistics, which tell of a client's batch whatever
becomes of its gradients."""


@dataclass(frozen=True)
class Expectation:
    """What the frontier found of a defense at one strength.

    Args:
        network: The network on which most was recovered.
        recovered: Share of images.
        loss: Points of accuracy; None if that was not measured.
    """

    network: str
    recovered: Measure
    loss: Measure | None

    @property
    def order(self) -> tuple[float, float]:
        """What stops more comes first, and of that the cheaper."""
        return self.recovered.value, float("inf") if self.loss is None else self.loss.value

    @property
    def words(self) -> str:
        """Share and price."""
        price = "" if self.loss is None else f" at {points(self.loss)} points"
        return f"{share(self.recovered)} recovered{price} ({self.network})"


def expectations(
    measured: Iterable[Result], *, local: bool, batch_norm: bool
) -> dict[str, Expectation]:
    """What to expect of every defense at every strength, by ``key, knob=value``.

    Args:
        measured: All results.
        local: Whether clients take several local steps; networks of the other kind do not count.
        batch_norm: Whether the model has batch normalisation; the frontier's networks that have it
            do not count otherwise.
    """
    found: dict[str, Expectation] = {}
    result = result_of(measured)
    for network, rows in networks(result.measures if result else ()).items():
        like = (LOCAL in network) == local and (batch_norm or BATCH_NORM not in network)
        for row in rows if like else ():
            for strength, point in row.points.items():
                name = f"{row.key}, {strength}"
                if name not in found or point.recovered.value > found[name].recovered.value:
                    found[name] = Expectation(network, point.recovered, point.loss)
    return found


@dataclass(frozen=True)
class Verdict:
    """A defense's colours: printed beside measured.

    Args:
        key: Of its row.
        name: For people.
        printed: In a word, by letter; empty for rows without printed colours.
        measured: By letter.
    """

    key: str
    name: str
    printed: Mapping[str, str]
    measured: Mapping[str, Colour]

    @property
    def apart(self) -> dict[str, list[str]]:
        """What decided where measured and printed colours differ, and for which letters."""
        found: dict[str, list[str]] = defaultdict(list)
        for letter, colour in self.measured.items():
            if letter in self.printed and self.printed[letter] != colour.stance:
                found[f"{colour.stance}, {colour.words}"].append(letter)
        return dict(found)


def verdicts(measured: Sequence[Result]) -> list[Verdict]:
    """Of every defense that has a measured colour."""
    found = []
    for row in loader.defenses():
        colours = measured_colours(measured, row.key)
        if colours:
            printed = row.stance.model_dump() if row.stance is not None else {}
            found.append(Verdict(row.key, tables.name_of(row), printed, colours))
    return found


# -- in Markdown -----------------------------------------------------------------------------------

UNPRICED = "What defenses cost in accuracy was not measured here."

INTRODUCTION = """# The frontier

<!-- generated by scripts/generate.py from results/frontier.json; do not edit -->

What every defense stops, at each strength, and the accuracy that it costs. An image counts as
recovered if any adversary of its network reaches 19 dB on it; all but the ignorant ones know the
defense. Who holds its secret is a bound and does not count. That nothing was recovered says nothing
about attacks that were not tried, and of so few images little about others: read the intervals.
*Dominated*: another point of the network costs no more and stops more, intervals aside. *Over equal
noise*: what the search gains over one on an upload that noise of the same size moved instead; where
the defense cannot be told from that noise, or is worse, the remark says so. The site draws the same
figures. Searches have fixed settings, priors from weak to strong and two distances, chosen on
images that nobody attacks here; the worst of them counts, image by image, which is at least what an
adversary reaches that rehearses among them. One that rehearses among the declared variants of its
attack, under the defense, stands beside them on the first images. Who learns an inverter learns it
once, for one network. H is alone with its victim: the other members of the cohort are its own and
send nothing. E matches the statistics of the client's batch, which the buffers of batch
normalisation give away, from the mean image that it knows; networks of its own have such buffers.
Prices are those of the networks with group normalisation, also where the probe is attacked; under
FedAVG clients train an epoch in batches of ten between rounds. The small grid has a few strengths;
`frontier_full` has all, `frontier_cifar` is the grid for a cluster.
"""


OTHER_FEDERATIONS = (
    "A price is that of a federation: what is free among a few like clients need not be elsewhere. "
    "No attack was run here. Where trainings were followed, the goal is nine tenths of what they "
    "reach without a defense."
)


def render(measured: Sequence[Result]) -> str | None:
    """The page, or None if the frontier was not measured."""
    result = result_of(measured)
    if result is None:
        return None
    took = run(result.measures)
    lines = [INTRODUCTION, f"`{result.command}` ({result.hardware}, {result.date})", ""]
    lines[1] += f": {took}." if took else "."
    lines += _colours(verdicts(measured))
    baselines, closed = nulls(result.measures), untried(result.measures)
    open_, what_it_is = unmeasured(result.measures), described(result.measures)
    for network, rows in networks(result.measures).items():
        lines += [f"## {network}", ""]
        if network in what_it_is:
            lines += [f"{what_it_is[network]}.", ""]
        if (plain := undefended(result.measures).get(network)) is not None:
            lines += [
                f"Prices are held against {plain.value:.1f} % without a defense ({plain.note}): a "
                "price within the spread of seeds is none.", "",
            ]  # fmt: skip
        lines += _baselines(baselines.get(network, {}))
        headlines = _headlines(rows) if any(row.priced for row in rows) else [UNPRICED]
        lines += [*headlines, "", *_points(rows), ""]
        lines += [f"- Nobody could try {d}: {why}" for d, why in closed.get(network, {}).items()]
        lines += [f"- Not measured, {a}: {what}" for a, what in open_.get(network, {}).items()]
        lines.append("")
    return "\n".join([*lines, *_elsewhere(measured)])


def _elsewhere(measured: Sequence[Result]) -> list[str]:
    lines: list[str] = []
    for study, federations in elsewhere(measured).items():
        lines += [f"`leakatlas bench {study}`", ""]
        for trainings in federations:
            way, about = followed(trainings), trainings[0].accuracy.note
            title = trainings[0].federation
            lines += [f"**{title}**: {about}." if title else f"{about}.", ""]
            lines += [" | ".join(["| Defense | accuracy", *way.values(), "n | |"])]
            lines += ["|---" * (4 + len(way)) + "|"]
            lines += [
                " | ".join([
                    f"| {one.defense} | {accuracy(one.accuracy)}", *map(one.on_the_way, way),
                    f"{one.accuracy.n} | {one.remarks(about)} |",
                ])
                for one in trainings
            ]  # fmt: skip
            lines.append("")
    return ["## Prices elsewhere", "", OTHER_FEDERATIONS, "", *lines] if lines else []


def _colours(found: Sequence[Verdict]) -> list[str]:
    lines = [
        "## Colours", "",
        "Printed / measured at the published strength, on the network that is worst for the "
        "defense: + holds (at most 5 % recovered), ~ in part, x fails (half or more).", "",
        "| Defense | " + " | ".join(LETTERS) + " |", "|---|" + "---|" * len(LETTERS),
    ]  # fmt: skip
    signs = {"holds": "+", "partial": "~", "fails": "x", "": "-"}
    for verdict in found:
        cells = []
        for letter in LETTERS:
            colour = verdict.measured.get(letter)
            both = verdict.printed.get(letter, ""), colour.stance if colour else ""
            cells.append(" / ".join(signs[word] for word in both))
        lines.append(f"| [{verdict.name}](defenses/{verdict.key}.md) | " + " | ".join(cells) + " |")
    lines += ["", "Where they differ:", ""]
    for verdict in found:
        for why, letters in verdict.apart.items():
            lines.append(f"- {verdict.name}, {', '.join(letters)}: {why}.")
    return [*lines, ""]


def _baselines(found: Mapping[str, Measure]) -> list[str]:
    if not found:
        return []
    return [f"Without any update: {in_words(found)}.", ""]


def in_words(found: Mapping[str, Measure]) -> str:
    """Null baselines as a list."""
    return ", ".join(f"{name} {measure.value:.1f} dB" for name, measure in found.items())


def _headlines(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| Defense | recovered at 1 point or less | points lost at 5 % recovered or less |",
        "|---|---|---|",
    ]
    for row in rows:
        if row.key == UNDEFENDED:
            continue
        private = f"{share(row.private)}, {row.private.note}" if row.private else row.dear
        price = f"{points(row.price)}, {row.price.note}" if row.price else row.open
        lines.append(f"| {row.name} | {private} | {price} |")
    return lines


def _points(rows: Sequence[Row]) -> list[str]:
    names = list(dict.fromkeys(n for row in rows for p in row.points.values() for n in p.levels))
    columns = ["Defense", "Strength", "recovered", "points lost", *names, "over equal noise", ""]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        for strength, point in row.points.items():
            cells = [row.name, strength or "-", share(point.recovered)]
            cells.append("-" if point.loss is None else points(point.loss))
            cells += [f"{point.levels[n].value:.0%}" if n in point.levels else "-" for n in names]
            cells.append("-" if point.noise is None else f"{point.noise.value:+.1f} dB")
            lines.append("| " + " | ".join([*cells, point.recovered.note]) + " |")
    return lines


def share(measure: Measure) -> str:
    """Percent, interval and number of images."""
    low, high = measure.interval or (measure.value, measure.value)
    return f"{measure.value:.0%} [{low:.0%}, {high:.0%}] of {measure.n}"


def accuracy(measure: Measure) -> str:
    """Percent and interval."""
    low, high = measure.interval or (measure.value, measure.value)
    return f"{measure.value:.1%} [{low:.1%}, {high:.1%}]"


def points(measure: Measure) -> str:
    """Points of accuracy and their interval."""
    low, high = measure.interval or (measure.value, measure.value)
    return f"{measure.value:+.1f} [{low:+.1f}, {high:+.1f}]"
