"""The grammar decomposer against public prompt sets: requirements, dependencies, quoted text, and prompts a second.

    python benchmarks/decomposer.py --data DIR [--json FILE] [--errors N]

DIR holds geneval/evaluation_metadata.jsonl (djghosh13/geneval), dsg/dsg-1k-anns.csv (j-min/DSG) and
flow_grpo/ocr_test.txt (yifan123/flow_grpo). What is compared, and how:

GenEval: exact tuples. A prompt's metadata say (object, class), (count, class, n), (color, class, colour) and
(relation, class, position, class); ours are the requirements of these checks. Styles, backgrounds and questions, of
which the metadata never speak, are not compared. A class goes by our name for its singular, a colour by our spelling.

DSG: a tuple is covered if one of our requirements of a fitting check holds the head word (the last word that is no
function word, as its stem) of each of the tuple's arguments. Checks that fit: entity: object, style; attribute: color,
size, vqa, style, background; relation: relation, vqa (its phrase by our name for it: "under" is "below", "has" is
"with"); count: count, vqa; global: any; text: the text requirement with the same letters and digits. An edge of DSG is
a tuple and one that it depends on. Ours: a covered tuple depends on another if the requirement that covers it needs
that of the other. Prompts whose dependencies are cyclic are left out of the edges, and counted.

OCR: the text requirements of a prompt are exactly its quoted text.

Speed is processor time of one thread.
"""

import argparse
import csv
import json
import re
import time
from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rlhf_img.rubrics import Requirement, decompose, lexicon
from rlhf_img.rubrics.words import singular

_FUNCTION_WORDS = frozenset((
    "a", "an", "the", "of", "to", "in", "on", "at", "and", "or", "is", "are", "be", "with", "their", "his", "her", "it",
    "its",
))  # fmt: skip
_RELATIONS = {**lexicon.ALL_RELATIONS, "has": "with", "have": "with"}
_FITTING = {
    "entity": ("object", "style"),
    "attribute": ("color", "size", "vqa", "style", "background"),
    "relation": ("relation", "vqa"),
    "count": ("count", "vqa"),
    "text rendering": ("text",),
}


def prf(matched: int, ours: int, theirs: int) -> dict[str, float]:
    """Precision, recall and F1 of `matched` out of `ours` and `theirs`."""
    precision, recall = matched / max(ours, 1), matched / max(theirs, 1)
    f1 = 2 * precision * recall / max(precision + recall, 1e-9)
    return {"precision": precision, "recall": recall, "f1": f1, "ours": ours, "theirs": theirs}


def geneval(path: Path) -> tuple[dict[str, float], list[str]]:
    """Exact (check, arguments) tuples; prompts with an error as lines."""
    matched = ours = theirs = 0
    errors = []
    for line in path.read_text(encoding="utf-8").splitlines():
        data = json.loads(line)
        wanted = set()
        for item in data["include"]:
            name = singular(item["class"])
            wanted |= {("object", name), ("count", name, item["count"])}
            if "color" in item:
                wanted.add(("color", name, item["color"].replace("gray", "grey")))
            if "position" in item:
                relation, other = item["position"]
                wanted.add(("relation", name, relation, singular(data["include"][other]["class"])))
        found = {t for r in decompose(data["prompt"]).rubric.requirements if (t := as_tuple(r))}
        matched, ours, theirs = matched + len(found & wanted), ours + len(found), theirs + len(wanted)
        if found != wanted:
            missed, extra = (sorted(map(str, names)) for names in (wanted - found, found - wanted))
            errors.append(f"{data['prompt']}: missed {missed}, extra {extra}")
    return prf(matched, ours, theirs), errors


def as_tuple(r: Requirement) -> tuple[object, ...] | None:
    """A requirement as (check, arguments); None for what GenEval's metadata never speak of."""
    match r.check:
        case "object":
            return ("object" if r.expect == "present" else "no object", r.target)
        case "count" | "color" | "size" | "text":
            return (r.check, r.target, r.equals)
        case "relation":
            return ("relation", r.subject, r.relation, r.object)
    return None


@cache
def stem(word: str) -> str:
    """One form for a word's inflections: the singular's, less the ending of a participle."""
    word = singular(word)
    verb = re.sub(r"(ing|ed|s|e)$", "", word)
    return re.sub(r"(.)\1$", r"\1", verb) if len(verb) > 2 else word


def stems(text: str) -> list[str]:
    return [stem(w) for w in re.findall(r"[^\W_]+", text.lower()) if w not in _FUNCTION_WORDS]


def fits(category: str, detail: str) -> tuple[str, ...] | None:
    """The checks that can cover a tuple of this kind; None for all."""
    return _FITTING.get(detail) or _FITTING.get(category)


def covering(row: dict[str, str], requirements: list[tuple[Requirement, set[str]]]) -> Requirement | None:
    """The first requirement that covers a tuple of DSG."""
    checks = fits(row["category_broad"], row["category_detailed"])
    inside = re.search(r"\((.*)\)\s*$", row["tuple"], re.DOTALL)
    arguments = inside[1] if inside else row["tuple"]
    if row["category_detailed"] == "text rendering":
        said = letters(arguments.partition(", ")[2])
        return next((r for r, _ in requirements if r.check == "text" and letters(str(r.equals)) == said), None)
    parts = [stems(_RELATIONS.get(part, part)) for part in arguments.split(", ")]
    heads = {part[-1] for part in parts if part}
    for requirement, words in requirements:
        if (checks is None or requirement.check in checks) and heads and heads <= words:
            return requirement
    return None


def letters(text: str) -> str:
    return "".join(c for c in text.casefold() if c.isalnum())


def words_of(r: Requirement) -> set[str]:
    values = (r.target, r.equals, r.subject, r.relation, r.object, r.ask)
    return set(stems(" ".join(str(v) for v in values if v is not None)))


def dsg(path: Path) -> tuple[dict[str, object], list[str]]:
    """Coverage by kind of tuple, and dependency edges."""
    prompts: dict[str, list[dict[str, str]]] = defaultdict(list)
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            prompts[row["item_id"]].append(row)
    covered: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    matched = ours = theirs = cyclic = 0
    missed = []
    for rows in prompts.values():
        requirements = [(r, words_of(r)) for r in decompose(rows[0]["text"]).rubric.requirements]
        cover = {row["proposition_id"]: covering(row, requirements) for row in rows}
        for row in rows:
            kind = row["category_detailed"] if row["category_broad"] == "other" else row["category_broad"]
            hit = cover[row["proposition_id"]] is not None
            for name in (kind, "all"):
                covered[name][0] += hit
                covered[name][1] += 1
            if not hit:
                missed.append(f"{row['tuple']}   <- {row['text'][:150]}")
        needs = {row["proposition_id"]: {p.strip() for p in row["dependency"].split(",")} - {"0", ""} for row in rows}
        try:
            TopologicalSorter(needs).prepare()
        except CycleError:
            cyclic += 1
            continue
        gold = {(child, parent) for child, parents in needs.items() for parent in parents}
        mine = {
            (child, parent)
            for child, r in cover.items()
            for parent, other in cover.items()
            if r and other and child != parent and other.id in r.needs
        }
        matched, ours, theirs = matched + len(gold & mine), ours + len(mine), theirs + len(gold)
    return {
        "coverage": {name: hit / total for name, (hit, total) in covered.items() if total >= 20},
        "tuples": {name: total for name, (_, total) in covered.items() if total >= 20},
        "edges": prf(matched, ours, theirs),
        "cyclic_prompts_left_out": cyclic,
    }, missed


def ocr(path: Path) -> tuple[dict[str, float], list[str]]:
    """Share of prompts whose one quoted text is the one text requirement, and of those bound to a bearer."""
    exact = bound = 0
    errors = []
    prompts = path.read_text(encoding="utf-8").splitlines()
    for prompt in prompts:
        quoted = re.findall(r'"([^"]*)"', prompt)
        texts = [r for r in decompose(prompt).rubric.requirements if r.check == "text"]
        if [r.equals for r in texts] == quoted:
            exact += 1
            bound += texts[0].target is not None
        else:
            errors.append(f"{[r.equals for r in texts]} <- {prompt}")
    return {"exact": exact / len(prompts), "bound_to_a_bearer": bound / len(prompts), "prompts": len(prompts)}, errors


def throughput(prompts: list[str]) -> dict[str, float]:
    """Prompts a second; the first pass fills the caches of words, the second finds them full."""
    decompose("two cats")  # loads the lexicon
    speeds = []
    for _ in range(2):
        start = time.process_time()
        for prompt in prompts:
            decompose(prompt)
        speeds.append(len(prompts) / (time.process_time() - start))
    return {"prompts": len(prompts), "first_pass": speeds[0], "second_pass": speeds[1]}


def all_prompts(folder: Path) -> list[str]:
    """Every distinct prompt of the three sets."""
    lines = (folder / "geneval/evaluation_metadata.jsonl").read_text(encoding="utf-8").splitlines()
    with (folder / "dsg/dsg-1k-anns.csv").open(encoding="utf-8", newline="") as file:
        dsg_prompts = [row["text"] for row in csv.DictReader(file)]
    ocr_prompts = (folder / "flow_grpo/ocr_test.txt").read_text(encoding="utf-8").splitlines()
    return list(dict.fromkeys([*(json.loads(line)["prompt"] for line in lines), *dsg_prompts, *ocr_prompts]))


def show(result: dict[str, dict[str, object]]) -> None:
    """The result as a table."""
    table = Table(title="grammar decomposer")
    table.add_column("set")
    table.add_column("measure")
    table.add_column("value", justify="right")

    def add(name: str, values: dict[str, object], prefix: str = "") -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                add(name, value, f"{prefix}{key}: ")
            else:
                small = isinstance(value, float) and value <= 1
                table.add_row(name, prefix + key, f"{value:.3f}" if small else f"{value:,.0f}")

    for name, values in result.items():
        add(name, values)
        table.add_section()
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the prompt sets")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--errors", type=int, default=0, help="also print so many errors of each set")
    options = parser.parse_args()
    speed = throughput(all_prompts(options.data))  # first, while the caches are empty
    measured: dict[str, tuple[Mapping[str, object], list[str]]] = {
        "GenEval": geneval(options.data / "geneval/evaluation_metadata.jsonl"),
        "DSG-1k": dsg(options.data / "dsg/dsg-1k-anns.csv"),
        "OCR": ocr(options.data / "flow_grpo/ocr_test.txt"),
    }
    result = {name: dict(values) for name, (values, _) in measured.items()} | {"speed": dict(speed)}
    show(result)
    for name, (_, errors) in measured.items():
        for error in errors[:: max(1, len(errors) // options.errors)] if options.errors else ():
            print(f"{name}: {error}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
