"""People's answers: who is asked what, that nothing is lost or kept twice, and what the answers become."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from postgres import postgres
from test_pairs import pair, png
from test_training import run

from rlhf_img.errors import RlhfImgError
from rlhf_img.training.annotation import store as store_room
from rlhf_img.training.annotation.answers import agreement, krippendorff, preferences
from rlhf_img.training.annotation.candidates import Candidate, batch_of, read_candidates, wanted
from rlhf_img.training.annotation.store import Label, Store
from rlhf_img.training.pairs import read_pairs, write_pairs

PAIRS = [f"{i:032x}" for i in range(6)]


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    # Not under pytest's own folder, which no other user may enter.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        with postgres(Path(folder) / "server") as url:
            yield url


@pytest.fixture(params=["sqlite", "postgres"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "a.sqlite") if request.param == "sqlite" else request.getfixturevalue("server")


@pytest.fixture
def store(where: str, request: pytest.FixtureRequest) -> Store:
    return Store(where, request.node.name)


def names(request: pytest.FixtureRequest) -> list[str]:
    """Of pairs, each test's own: the tests share one server."""
    return [f"{request.node.name} {i}" for i in range(6)]


def said(pair_id: str, who: str, choice: str = "0") -> Label:
    return Label(pair_id, who, choice, 0, 1.5)  # type: ignore[arg-type]


def test_everybody_gets_another_pair_and_a_reload_the_same(store: Store, request: pytest.FixtureRequest) -> None:
    pairs = names(request)
    store.add(dict.fromkeys(pairs, 1))
    assert [store.take(who) for who in ("ann", "bob", "ann", "cyd")] == [pairs[0], pairs[1], pairs[0], pairs[2]]
    assert store.record(said(pairs[0], "ann")) is True
    assert store.take("ann") == pairs[3]
    assert store.progress("ann") == (1, 6, 1)


def test_the_same_answer_again_changes_nothing(store: Store, request: pytest.FixtureRequest) -> None:
    pairs = names(request)
    store.add(dict.fromkeys(pairs, 1))
    assert store.record(said(pairs[0], "ann", "1")) and not store.record(said(pairs[0], "ann", "tie"))
    assert store.labels() == [said(pairs[0], "ann", "1")]


def test_a_skipped_pair_goes_to_somebody_else_and_never_back(store: Store, request: pytest.FixtureRequest) -> None:
    pairs = names(request)[:1]
    store.add(dict.fromkeys(pairs, 1))
    assert store.take("ann") == pairs[0]
    store.record(said(pairs[0], "ann", "skip"))
    assert store.take("ann") is None and store.take("bob") == pairs[0]
    assert store.progress("ann") == (0, 1, 1)


def test_a_pair_for_two_people_is_not_asked_of_one_twice(store: Store, request: pytest.FixtureRequest) -> None:
    pairs = names(request)[:1]
    store.add(dict.fromkeys(pairs, 2))
    for who in ("ann", "bob"):
        assert store.take(who) == pairs[0]
        store.record(said(pairs[0], who))
        assert store.take(who) is None
    assert store.take("cyd") is None and store.progress("cyd").done == 2


def test_a_pair_that_was_left_lying_is_offered_again(
    store: Store, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = names(request)[:1]
    store.add(dict.fromkeys(pairs, 1))
    monkeypatch.setattr(store_room, "LEASE_S", -1.0)
    assert store.take("ann") == pairs[0] == store.take("bob")
    # Both answer in the end: both answers are kept.
    assert store.record(said(pairs[0], "ann")) and store.record(said(pairs[0], "bob"))
    assert len(store.labels()) == 2


def test_answers_outlive_the_process_and_adding_again_adds_nothing(
    where: str, store: Store, request: pytest.FixtureRequest
) -> None:
    pairs = names(request)
    store.add(dict.fromkeys(pairs, 1))
    store.take("ann")
    store.record(said(pairs[0], "ann"))
    again = Store(where, request.node.name)
    again.add(dict.fromkeys(pairs, 1))
    assert again.labels() == [said(pairs[0], "ann")] and again.progress("ann") == (1, 6, 1)
    assert Store(where, "another").labels() == []


def test_many_people_at_a_time_never_get_the_same_pair(store: Store, request: pytest.FixtureRequest) -> None:
    pairs = [f"{request.node.name} {i}" for i in range(40)]
    store.add(dict.fromkeys(pairs, 1))

    def work(who: str) -> list[str]:
        done = []
        while (found := store.take(who)) is not None:
            store.record(said(found, who))
            done.append(found)
        return done

    with ThreadPoolExecutor(8) as pool:
        given = [p for done in pool.map(work, [f"person {i}" for i in range(8)]) for p in done]
    assert sorted(given) == sorted(pairs) and len(store.labels()) == len(pairs)


@pytest.mark.parametrize(
    ("label", "message"),
    [(said("nothing", "ann"), "there is no pair"), (said("x 0", "ann", "2"), "is no answer")],
)
def test_what_is_no_answer_is_refused(tmp_path: Path, label: Label, message: str) -> None:
    store = Store(str(tmp_path / "a.sqlite"), "x")
    store.add({"x 0": 1})
    with pytest.raises(RlhfImgError, match=message):
        store.record(label)
    assert store.labels() == []


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("mysql://host", "is no store"),
        ("/nowhere/at/all.sqlite", "is no folder"),
        ("postgresql://tester@/postgres?host=/nowhere", "the PostgreSQL store failed"),
    ],
)
def test_a_store_that_cannot_be_used_is_named(where: str, message: str) -> None:
    if where.startswith("postgresql"):
        pytest.importorskip("psycopg", reason="psycopg is not installed")
    with pytest.raises(RlhfImgError, match=message):
        Store(where, "x")


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.sqlite").write_text("no database " * 100)
    with pytest.raises(RlhfImgError, match="answers cannot be kept"):
        Store(str(tmp_path / "a.sqlite"), "x")


def candidate(i: int, names: tuple[str, str] = ("before", "after")) -> Candidate:
    return Candidate(id=PAIRS[i], prompt=f"prompt {i}", images=(png(i), png(100 + i)), names=names, on_policy=True)


def test_the_majority_decides_and_its_lead_is_the_margin() -> None:
    votes = {0: "11", 1: "110", 2: "10", 3: ["tie"], 4: ["skip"], 5: ["0", "tie"]}
    labels = [said(PAIRS[i], f"p{n}", choice) for i, given in votes.items() for n, choice in enumerate(given)]
    pairs, undecided = preferences([candidate(i) for i in range(6)], labels)
    assert undecided == 2
    found = {p.prompt: (p.chosen, p.margin, p.source) for p in pairs}
    assert found == {
        "prompt 0": (png(100), 1.0, "people: after > before"),
        "prompt 1": (png(101), pytest.approx(1 / 3), "people: after > before"),
        "prompt 5": (png(5), 0.5, "people: before > after"),
    }
    assert all(p.on_policy for p in pairs)


def test_agreement_counts_what_people_said() -> None:
    labels = [
        said(PAIRS[0], "ann", "1"), said(PAIRS[0], "bob", "1"), said(PAIRS[1], "ann", "1"), said(PAIRS[1], "bob", "0"),
        said(PAIRS[2], "ann", "tie"), said(PAIRS[3], "ann", "skip"), said("f" * 32, "ann", "1"),
    ]  # fmt: skip
    found = agreement([candidate(i) for i in range(6)], labels)
    assert (found.answers, found.skipped, found.annotators) == (5, 1, {"ann": 3, "bob": 2})
    assert found.ties == pytest.approx(1 / 5) and found.left == pytest.approx(1 / 4)  # the left one is number 0
    assert (found.judged_twice, found.agree) == (2, 0.5)
    # of the pairs, the later checkpoint won one in full and one by half
    assert found.preferred["after > before"]["mean"] == 0.75 and found.preferred["after > before"]["n"] == 2
    assert "after > before: 75% of 2 pairs" in "\n".join(found.lines())


def test_a_data_sets_own_order_is_what_people_are_compared_with() -> None:
    labels = [said(PAIRS[0], "ann", "0"), said(PAIRS[1], "ann", "0"), said(PAIRS[2], "ann", "1")]
    found = agreement([candidate(i, ("chosen", "rejected")) for i in range(3)], labels)
    assert found.preferred["chosen > rejected"]["mean"] == pytest.approx(2 / 3)


def test_krippendorffs_alpha_by_hand() -> None:
    # coincidences: aa 2, ab 1, ba 1, bb 2; n_a = n_b = 3, n = 6: alpha = 1 - (6 - 1) * 2 / (2 * 3 * 3)
    assert krippendorff([["a", "a"], ["a", "b"], ["b", "b"]]) == pytest.approx(1 - 5 * 2 / 18)
    assert krippendorff([["a", "a"], ["b", "b"]]) == 1.0
    assert krippendorff([["a", "a"]]) is None and krippendorff([]) is None


def test_sides_are_by_chance_and_stay() -> None:
    ids = [Candidate(id=f"{i:032x}", prompt="", images=(b"", b""), names=("a", "b")) for i in range(400)]
    lefts = [c.left_image("ann") for c in ids]
    assert 150 < sum(lefts) < 250 and lefts == [c.left_image("ann") for c in ids]
    assert lefts != [c.left_image("bob") for c in ids]
    twice = Counter(wanted(ids, 1, 0.25).values())
    assert twice.keys() <= {1, 2}


def fake_run(folder: Path) -> Path:
    """A run's folder as the loop leaves it, with samples before, during and after."""
    (folder / "config.yaml").parent.mkdir(parents=True)
    (folder / "config.yaml").write_text("config: {eval: {guidance: 0.0}}")
    for level, tag in enumerate(("before", "step_000010", "after")):
        (folder / "samples" / tag).mkdir(parents=True)
        rows = []
        for i in range(3):
            (folder / "samples" / tag / f"{i:03d}.png").write_bytes(png(0 if i == 2 else 10 * level + i))
            rows.append({"file": f"{i:03d}.png", "prompt": f"prompt {i}", "seed": i})
        (folder / "samples" / tag / "samples.json").write_text(json.dumps(rows))
    return folder


def test_a_runs_checkpoints_are_compared_two_by_two(tmp_path: Path) -> None:
    found = read_candidates(fake_run(tmp_path / "run"))
    assert Counter(c.names for c in found) == {  # the third prompt's images are all the same
        ("before", "step_000010"): 2, ("before", "after"): 2, ("step_000010", "after"): 2,
    }  # fmt: skip
    assert all(c.on_policy == ("after" in c.names) for c in found)
    assert batch_of(found) == batch_of(read_candidates(tmp_path / "run")) != batch_of(found[1:])
    with pytest.raises(RlhfImgError, match="there are no pairs"):
        read_candidates(tmp_path)


# The server as a process, over plain HTTP.


@contextmanager
def serving(data: Path, *more: str, port: int = 0) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`rlhf-img annotate` as a process, and its address."""
    pytest.importorskip("uvicorn", reason="no web server is installed: pip install 'rlhf-img[annotate]'")
    command = [sys.executable, "-u", "-m", "rlhf_img.cli.main", "annotate", str(data), "--port", str(port), *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            found = re.search(r"http://\S+", first)
            assert found, first
            yield process, found[0]
        finally:
            process.kill()


def ask(
    address: str, path: str, body: object, host: str | None = None, kind: str = "application/json"
) -> dict[str, object]:
    headers = {"Content-Type": kind, **({"Host": host} if host else {})}
    request = urllib.request.Request(address + path, json.dumps(body).encode(), headers)
    for _ in range(100):
        try:
            with urllib.request.urlopen(request, timeout=10) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError as error:
            with error:
                return {"status": error.code, "text": error.read().decode()}
        except urllib.error.URLError:
            time.sleep(0.1)  # it is starting
    raise AssertionError("the server never answered")


def twenty(folder: Path) -> Path:
    write_pairs(folder / "data" / "pairs.parquet", [pair(i, f"prompt {i}") for i in range(20)])
    return folder / "data"


def test_a_server_that_is_killed_loses_nothing_and_keeps_nothing_twice(tmp_path: Path) -> None:
    data = twenty(tmp_path)
    seen = []
    with serving(data, "--twice", "0") as (process, address):
        for _ in range(9):
            found = ask(address, "/next", {"annotator": "ann"})
            seen.append(found["pair"])
            body = {"annotator": "ann", "pair": found["pair"], "answer": "left", "seconds": 1}
            assert ask(address, "/answer", body) == {"kept": True, "new": True}
        waiting = ask(address, "/next", {"annotator": "ann"})["pair"]
        os.kill(process.pid, signal.SIGKILL)
    with serving(data, "--twice", "0") as (_, address):
        # The last answer comes again, as from a page that never saw it confirmed.
        assert ask(address, "/answer", body) == {"kept": True, "new": False}
        while (found := ask(address, "/next", {"annotator": "ann"}))["pair"] is not None:
            seen.append(found["pair"])
            ask(address, "/answer", {"annotator": "ann", "pair": found["pair"], "answer": "right", "seconds": 1})
        assert (found["done"], found["total"]) == (20, 20)
    assert seen[9] == waiting and len(set(seen)) == len(seen) == 20
    labels = Store(str(data / "answers.sqlite"), batch_of(read_candidates(data))).labels()
    assert [label.pair for label in labels] == seen


def test_answers_become_the_pairs_that_people_prefer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = twenty(tmp_path)
    given = {p.prompt: (p.chosen, p.rejected) for p in read_pairs(data)}
    with serving(data, "--twice", "0") as (_, address):
        for number in range(20):
            found = ask(address, "/next", {"annotator": "ann"})
            left = urllib.request.urlopen(address + str(found["left"]), timeout=10).read()
            # Against the data's own order in the first five, as it is in the rest.
            better = given[str(found["prompt"])][int(number < 5)]
            side = "left" if left == better else "right"
            ask(address, "/answer", {"annotator": "ann", "pair": found["pair"], "answer": side, "seconds": 1})
    assert run(monkeypatch, ["annotate", str(data), "--twice", "0", "--export", str(tmp_path / "human"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pairs"] == 20
    human = list(read_pairs(tmp_path / "human"))
    turned = [p for p in human if (p.rejected, p.chosen) == given[p.prompt]]
    kept = [p for p in human if (p.chosen, p.rejected) == given[p.prompt]]
    assert (len(turned), len(kept)) == (5, 15)
    assert run(monkeypatch, ["annotate", str(data), "--twice", "0", "--agreement", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["preferred"]["chosen > rejected"]["mean"] == 0.75


def test_other_sites_and_nonsense_are_refused(tmp_path: Path) -> None:
    with serving(twenty(tmp_path)) as (_, address):
        found = ask(address, "/next", {"annotator": "ann"})
        answer = {"annotator": "ann", "pair": found["pair"], "answer": "left"}
        assert ask(address, "/answer", answer, host="elsewhere.example")["status"] == 400
        assert "is JSON" in str(ask(address, "/answer", answer, kind="text/plain")["text"])
        for wrong in ({"pair": "x"}, {"answer": "both"}, {"annotator": "<b>"}, {"annotator": ""}):
            assert ask(address, "/answer", {**answer, **wrong})["status"] == 400
        assert ask(address, "/next", ["ann"])["status"] == 400
        assert ask(address, "/next", {"annotator": "ann"})["mine"] == 0


def test_the_page_and_its_images_do_not_say_what_is_what(tmp_path: Path) -> None:
    with serving(fake_run(tmp_path / "run")) as (_, address):
        found = ask(address, "/next", {"annotator": "ann"})
        page = urllib.request.urlopen(address, timeout=10).read().decode()
        for name in ("before", "after", "step_0", "chosen", "rejected"):
            assert name not in json.dumps(found) and name not in page.replace("is confirmed", "")
        urls = [urllib.request.urlopen(address + str(found[side]), timeout=10) for side in ("left", "right")]
        assert [reply.headers["Content-Type"] for reply in urls] == ["image/png"] * 2
        assert len({reply.read() for reply in urls}) == 2


def test_a_database_that_is_away_is_no_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page asks again after 503 and gives an answer up after 400."""
    testclient = pytest.importorskip("starlette.testclient", reason="starlette or its test client is not installed")
    from rlhf_img.training.annotation.databases import StoreFailed
    from rlhf_img.training.annotation.server import make_app

    candidates = read_candidates(twenty(tmp_path))
    store = Store(str(tmp_path / "a.sqlite"), "x")
    client = testclient.TestClient(make_app(candidates, store, ["127.0.0.1"]), base_url="http://127.0.0.1")
    answer = {"annotator": "ann", "pair": candidates[0].id, "answer": "tie"}
    assert client.post("/answer", json=answer).status_code == 400  # nobody asked about it
    monkeypatch.setattr(store, "record", lambda label: (_ for _ in ()).throw(StoreFailed("away")))
    assert client.post("/answer", json=answer).status_code == 503


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--export", "out"], "nobody has preferred an image yet"), (["--port", "TAKEN"], "give another --port")],
)
def test_what_cannot_be_done_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = [str(taken.getsockname()[1]) if word == "TAKEN" else word for word in more]
        assert run(monkeypatch, ["annotate", str(twenty(tmp_path)), *words]) == 2
    assert message in capsys.readouterr().err


def test_without_a_web_server_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert run(monkeypatch, ["annotate", str(twenty(tmp_path))]) == 2
    assert "rlhf-img[annotate]" in capsys.readouterr().err


def test_pairs_images_are_read_as_they_are(tmp_path: Path) -> None:
    data = twenty(tmp_path)
    first = read_candidates(data)[0]
    assert not np.array_equal(first.images[0], first.images[1]) and first.names == ("chosen", "rejected")
