"""Labelled images: what a CSV may say, what becomes of it in the loss, and labels of a policy's own images."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import PROMPTS, SIZE, save_tiny
from typer.testing import CliRunner

from rlhf_img.cli.reward import app
from rlhf_img.errors import RlhfImgError
from rlhf_img.judges import FakeJudge
from rlhf_img.playground.render import render
from rlhf_img.playground.scene import Scene, Thing
from rlhf_img.rewards.appearance import STYLES, style_look
from rlhf_img.rewards.artifact import artifact
from rlhf_img.rewards.artifact_labels import join, read_labels
from rlhf_img.rewards.artifact_losses import class_balance, detector_loss, nothing_broken, pair_targets, style_variance
from rlhf_img.rewards.artifact_model import DefectNet, load_detector
from rlhf_img.rewards.artifact_pairs import make_pairs
from rlhf_img.rewards.artifact_training import AGAIN, ArtifactTraining, train_artifact
from rlhf_img.rewards.calibration import image_loss, known_cross_entropy
from rlhf_img.rewards.defects import APPEARANCES, CLASSES, permitted
from rlhf_img.rewards.folder_images import digest
from rlhf_img.rewards.protocol import Images
from rlhf_img.rubrics.schema import Requirement, Rubric
from rlhf_img.training.on_policy import OnPolicy, by_judge, by_residual, draw_labelled

HOLE, SEAM = CLASSES.index("hole"), CLASSES.index("seam")


def write(folder: Path, *rows: str, header: str = "image,class,x,y,width,height") -> Path:
    """A CSV, and an image of 64 x 32 px for each name in it."""
    for i, row in enumerate(rows):
        name = row.split(",")[0]
        if name.endswith(".png") and not (folder / name).exists():
            noise = np.random.default_rng(i).integers(0, 256, (32, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / name)
    (folder / "labels.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder / "labels.csv"


def targets_of(labels, name: str, size=(4, 4), mirrored=None):
    return labels.targets([labels.names.index(name)], size, mirrored)


def test_boxes_points_clean_and_unknown_defects_become_targets(tmp_path):
    file = write(tmp_path, "a.png,hole,32,0,16,8", "a.png,Seam,4,28", "b.png,clean", "c.png,broken,0,0,32,16",
                 "d.png,torn_edge", "e.png,broken")  # fmt: skip
    labels = read_labels(file, 32)
    assert labels.pixels_NHW3.shape == (5, 32, 32, 3) and len(labels.heldout) == 2 and len(labels.train) == 3
    assert labels.counts == {"hole": 1, "seam": 1, "clean": 1, "broken": 2, "torn edge": 1}

    a = targets_of(labels, "a.png")
    assert a.damaged_B.item() and a.class_BK.nonzero().tolist() == [[0, HOLE], [0, SEAM]]
    assert a.cells_BKhw[0, HOLE].tolist() == [[0, 0, 1, 0]] + [[0] * 4] * 3
    # A point is a square of a sixteenth of the side around it: (4/64, 28/32) reaches over x 0 to 0.125, y 0.81 to 0.94.
    assert a.cells_BKhw[0, SEAM].nonzero().tolist() == [[3, 0]]
    assert (a.cells_BKhw[0, [HOLE, SEAM]].sum(), a.cells_BKhw.sum()) == (2, 2)
    mirrored = targets_of(labels, "a.png", mirrored=torch.tensor([True]))
    assert mirrored.cells_BKhw[0, HOLE].nonzero().tolist() == [[0, 1]]
    i = labels.names.index("a.png")
    assert (labels.images([i], torch.tensor([True])) == labels.images([i]).flip(-1)).all()

    b = targets_of(labels, "b.png")
    assert not b.damaged_B.item() and b.class_BK.sum() == 0 and b.cells_BKhw.sum() == 0
    c = targets_of(labels, "c.png")
    assert c.damaged_B.item() and c.class_BK.isnan().all()
    assert c.cells_BKhw[0, :, :2, :2].isnan().all() and c.cells_BKhw.nan_to_num(9.0).sum() == 9 * 4 * len(CLASSES)
    assert c.broken_Bhw[0, :2, :2].all() and c.broken_Bhw.sum() == 4 and a.broken_Bhw.sum() == 0
    assert targets_of(labels, "c.png", mirrored=torch.tensor([True])).broken_Bhw[0, :2, 2:].all()
    d = targets_of(labels, "d.png")
    assert d.class_BK[0].tolist() == [1.0] + [0.0] * (len(CLASSES) - 1)
    assert d.cells_BKhw[0, 0].isnan().all() and d.cells_BKhw[0, 1:].sum() == 0
    e = targets_of(labels, "e.png")
    assert e.damaged_B.item() and e.class_BK.isnan().all() and e.cells_BKhw.isnan().all()
    assert e.broken_Bhw.sum() == 0  # something is broken, but nobody says where


def test_in_a_box_of_no_class_any_class_will_do(tmp_path):
    target = targets_of(read_labels(write(tmp_path, "a.png,broken,0,0,32,16", "b.png,clean", "c.png,clean",
                                          "d.png,clean"), 32), "a.png")  # fmt: skip
    heat = torch.full((1, len(CLASSES), 4, 4), -20.0)
    heat[0, HOLE, :2, :2] = heat[0, SEAM, 0, 0] = 0.0
    # Four of sixteen cells: of one P is 1 - 1/4, of three 1/2; all else is known to be whole, and said to be.
    loss = detector_loss(heat, torch.zeros(1, len(CLASSES)), target, 1.0) - detector_loss(
        heat, torch.zeros(1, len(CLASSES)), target, 0.0)  # fmt: skip
    assert loss.item() == pytest.approx(-(math.log(0.75) + 3 * math.log(0.5)) / 16, rel=1e-4)


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (["a.png,hole"], "image,klass", r'line 1: no column is called "klass"; did you mean "class"'),
        (["a.png"], "image", "line 1: columns are .* given image"),
        (["a.png,clean", "b.png,hol"], None, r'line 3: no class is called "hol"; did you mean "hole"'),
        (["a.png,blur"], None, "line 2: no class is called \"blur\".* unless --appearance"),
        (["a.png,hole,3"], None, "line 2: a point has x and y, a box has .* given x"),
        (["a.png,hole,3,4,5"], None, "line 2: a point has x and y"),
        (["a.png,hole,3,four"], None, "line 2: x, y are numbers of pixels; given 3, four"),
        (["a.png,hole,3,nan"], None, r"line 2: it reaches from \(3, nan\)"),
        (["a.png,hole,60,4,5,5"], None, r"line 2: it reaches from \(60, 4\) to \(65, 9\), but a.png has 64 x 32 px"),
        (["a.png,hole,6,4,-5,5"], None, "line 2: it reaches from"),
        (["a.png,clean", "a.png,hole"], None, "line 3: a.png is clean and something of it is marked"),
        (["a.png,hole", "a.png,clean"], None, "line 3: a.png is clean and something"),
        (["a.png,clean,3,3"], None, "line 2: a.png is clean and something"),
        (["nowhere.jpg,clean"], None, "line 2: .*nowhere.jpg cannot be read as an image"),
        (["a.png,clean,1,1,1,1,1"], None, "line 2: more fields than columns"),
        (["a.png,clean", "b.png,clean", "c.png,hole"], None, "labels 3 images; give at least 4"),
        ([], None, "labels 0 images"),
        (["a.png,\"clean"], None, "is no CSV in UTF-8"),
    ],
)
def test_bad_labels_are_refused_with_their_line(tmp_path, rows, header, message):
    file = write(tmp_path, *rows, **({} if header is None else {"header": header}))
    with pytest.raises(RlhfImgError, match=message):
        read_labels(file, 32)


def test_labels_of_missing_small_broken_or_binary_files_are_refused(tmp_path):
    with pytest.raises(RlhfImgError, match="no file .*give a CSV with the columns image,class,x,y"):
        read_labels(tmp_path / "none.csv", 32)
    file = write(tmp_path, *(f"{i}.png,clean" for i in range(4)))
    with pytest.raises(RlhfImgError, match=r"line 2: .*0\.png cannot be used: smaller than 64 px"):
        read_labels(file, 64)
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RlhfImgError, match=r"line 4: .*2\.png cannot be (used|read)"):
        read_labels(file, 32)
    file.write_bytes(b"image,class\n\xff\xfe,clean\n")
    with pytest.raises(RlhfImgError, match="is no CSV in UTF-8"):
        read_labels(file, 32)


def test_the_order_of_rows_means_nothing_and_files_join(tmp_path):
    rows = ["a.png,hole,1,1,9,9", "b.png,clean", "c.png,clean", "d.png,seam"]
    one = read_labels(write(tmp_path, *rows), 32)
    other = read_labels(write(tmp_path, *reversed(rows)), 32)
    assert one.names == other.names and one.fingerprint == other.fingerprint
    moved = read_labels(write(tmp_path, "a.png,hole,2,1,9,9", *rows[1:]), 32)
    assert moved.fingerprint != one.fingerprint
    (tmp_path / "second").mkdir()
    more = read_labels(write(tmp_path / "second", "p.png,clean", "x.png,hole", "y.png,clean", "z.png,seam"), 32)
    both = join([one, more])
    # p, x, y, z hold the same pixels as a to d.
    assert sorted(both.names) == sorted([*one.names, *more.names])
    assert both.fingerprint == join([more, one]).fingerprint != one.fingerprint


def test_class_balance_by_hand():
    # (1 - 1/2) / (1 - 1/2^2) = 2/3 for the two, 1 for the one; mean 7/9.
    assert class_balance({"clean": 2, "hole": 1}, [["clean"], ["clean"], ["hole"]], beta=0.5) == pytest.approx(
        [6 / 7, 6 / 7, 9 / 7], abs=1e-6)
    assert class_balance({"a": 5}, [["a"]] * 5) == [1.0] * 5
    many = class_balance({"clean": 1000, "hole": 10}, [["clean"]] * 1000 + [["clean", "hole"]] * 10)
    assert many[-1] > 8 * many[0] and sum(many) == pytest.approx(1010, rel=1e-3)


def test_what_is_not_known_costs_nothing_and_pulls_nowhere():
    logits = torch.tensor([[0.0, math.log(3.0)]], requires_grad=True)
    loss = known_cross_entropy(logits, torch.tensor([[torch.nan, 1.0]]))
    assert loss.tolist() == [[0.0, pytest.approx(-math.log(0.75))]]
    loss.sum().backward()
    assert logits.grad[0].tolist() == [0.0, pytest.approx(-0.25)]


def test_a_defect_of_no_known_class_raises_the_likeliest_class_most():
    logits = torch.full((1, len(CLASSES)), -4.0)
    logits[0, HOLE] = 0.0
    logits.requires_grad_()
    image_loss(logits, torch.full_like(logits, torch.nan), torch.tensor([True])).sum().backward()
    assert (logits.grad < 0).all() and logits.grad[0].argmin() == HOLE


def test_style_variance_by_hand_and_its_pull():
    # p = 1/2 and 3/4 against 1/4 and 3/4.
    first = torch.tensor([[0.0, math.log(3.0)]], requires_grad=True)
    second = torch.tensor([[-math.log(3.0), math.log(3.0)]], requires_grad=True)
    loss = style_variance(first, second)
    assert loss.tolist() == [pytest.approx(1 / 16)]
    loss.sum().backward()
    assert first.grad[0, 0] > 0 > second.grad[0, 0] and first.grad[0, 1] == second.grad[0, 1] == 0
    assert style_variance(first, first).tolist() == [0.0]


def test_pairs_come_with_the_clean_images_in_another_look():
    pairs = make_pairs(7, split="train", seed=(5, 0))
    change = (pairs.restyled_B3HW - pairs.clean_B3HW).abs().flatten(1).mean(dim=1)
    assert (change > 0).all() and change.max() < 0.3
    net_heat = torch.zeros(14, len(CLASSES), 16, 16)
    targets = pair_targets(pairs, net_heat)
    assert targets.damaged_B.tolist() == [False] * 7 + [True] * 7
    assert targets.class_BK[7:].argmax(dim=1).tolist() == pairs.class_B.tolist() and targets.class_BK[:7].sum() == 0
    assert (targets.cells_BKhw[7:].sum(dim=(1, 2, 3)) > 0)[pairs.visible_B].all()


def test_a_clean_image_in_another_look_is_taught_to_be_whole_and_nothing_of_its_look():
    heat = torch.zeros(2, len(CLASSES + APPEARANCES), 4, 4, requires_grad=True)
    logits = torch.zeros(2, len(CLASSES + APPEARANCES), requires_grad=True)
    detector_loss(heat, logits, nothing_broken(heat), 1.0).sum().backward()
    for gradient in (logits.grad, heat.grad):
        assert (gradient[:, : len(CLASSES)] > 0).all() and (gradient[:, len(CLASSES) :] == 0).all()


# Classes of looks


@pytest.mark.parametrize(("style", "name"), [("blur", "blur"), ("depth blur", "bokeh"), ("grain", "grain"),
                                             ("tone", "exposure"), ("JPEG", "compression")])
def test_a_strong_style_is_of_its_class_alone_and_none_is_of_none(style, name):
    look = style_look(style, STYLES[style][2], 3, 64, torch.Generator().manual_seed(0))
    labels = dict(zip(APPEARANCES, look.appearance().T, strict=True))
    assert (labels.pop(name) == 1).all() and all((of == 0).all() for of in labels.values())
    nothing = style_look("blur", 0.0, 3, 64, torch.Generator().manual_seed(0))
    assert (nothing.appearance() == 0).all()
    between = style_look("blur", 0.75, 3, 64, torch.Generator().manual_seed(0))
    assert between.appearance()[:, 0].isnan().all()


def test_looks_make_no_image_damaged_and_their_cells_are_taught():
    pairs = make_pairs(7, split="train", seed=(5, 0))
    classes = CLASSES + APPEARANCES
    targets = pair_targets(pairs, torch.zeros(14, len(classes), 16, 16))
    assert targets.damaged_B.sum() == 7
    blurred = pairs.appearance_BA[:, 0] == 1
    assert blurred.any() and (targets.cells_BKhw[:7, len(CLASSES)][blurred] == 1).all()
    # However blurred: it is the structural classes that decide whether an image is broken.
    logits = torch.full((14, len(classes)), -9.0)
    logits[:, len(CLASSES)] = 9.0
    clean = torch.zeros(14, len(classes))
    clean[:, len(CLASSES)] = 1.0
    assert image_loss(logits, clean, torch.zeros(14, dtype=torch.bool)).max() < 0.01


def test_looks_count_where_they_are_wanted_and_not_permitted(tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_img.rewards.artifact_training.evaluate", lambda net, **settings: {})
    monkeypatch.setattr("rlhf_img.rewards.artifact_training._CALIBRATED", 14)
    monkeypatch.setattr("rlhf_img.rewards.artifact_training._WATCHED", 14)
    out = tmp_path / "looks.safetensors"
    card = train_artifact(out, ArtifactTraining(steps=2, pairs=7, appearance=True))
    assert tuple(card["classes"]) == CLASSES + APPEARANCES
    images = Images(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))

    def judged(*permits: str, **options):
        asked = Requirement(id="r", check="vqa", ask="?", permits=permits)
        rubric = Rubric(prompt="a", requirements=(asked,))
        return artifact(["a"], images, rubrics=[rubric], weights=str(out), **options)[0]

    plain, wanting = judged(), judged(appearance=["blur"])
    assert set(plain.details.probability) == set(CLASSES)
    p_blur = wanting.details.probability["blur"]
    assert 0 < p_blur < 1 and wanting.value == pytest.approx(plain.value * (1 - p_blur), rel=1e-4)
    allowed = judged("soft focus", appearance=["blur"])
    assert allowed.value == pytest.approx(plain.value) and "blur" not in allowed.details.against
    with pytest.raises(RlhfImgError, match='no look is called "blurr"; did you mean "blur"'):
        judged(appearance=["blurr"])
    with pytest.raises(RlhfImgError, match="these weights know no looks, and so no grain"):
        artifact(["a"], images, rubrics=[Rubric(prompt="a")], appearance=["grain"])
    assert permitted(["depth_of_field"], APPEARANCES) == {"bokeh"}


# Training with them


def test_training_learns_from_labels_and_resumes_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_img.rewards.artifact_training.evaluate", lambda net, **settings: {})
    monkeypatch.setattr("rlhf_img.rewards.artifact_training._CALIBRATED", 14)
    monkeypatch.setattr("rlhf_img.rewards.artifact_training._WATCHED", 14)
    file = write(tmp_path, *(f"{i}.png,{'clean' if i % 2 else 'hole,20,10,9,9'}" for i in range(8)))
    labels = read_labels(file, 64 // 2)
    config = ArtifactTraining(steps=3, pairs=7, labelled=4, save_every=2)
    with pytest.raises(RlhfImgError, match="labelled images of 32 px"):
        train_artifact(tmp_path / "x.safetensors", config, labels=labels)
    for i in range(8):
        Image.open(tmp_path / f"{i}.png").resize((128, 64)).save(tmp_path / f"{i}.png")
    labels = read_labels(file, 64)
    card = train_artifact(tmp_path / "a.safetensors", config, labels=labels)
    assert card["labelled"]["held out"]["clean"] + card["labelled"]["held out"]["damaged"] == 2

    def interrupt(step: int, loss: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_artifact(tmp_path / "b.safetensors", config, labels=labels, progress=interrupt)
    with pytest.raises(RlhfImgError, match="another training: labels was "):
        train_artifact(tmp_path / "b.safetensors", config, resume=True)
    train_artifact(tmp_path / "b.safetensors", config, labels=labels, resume=True)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    train_artifact(tmp_path / "c.safetensors", config)
    assert (tmp_path / "a.safetensors").read_bytes() != (tmp_path / "c.safetensors").read_bytes()


def test_labels_are_learnt():
    """A mark that no injector makes: after a few steps on it, the labelled class is found where it was marked."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(8, 3, 32, 32, generator=generator) * 0.2 + 0.4
    x[4:, 0, 8:16, 16:24] = 1.0
    class_BK = torch.zeros(8, len(CLASSES))
    class_BK[4:, HOLE] = 1
    cells = torch.zeros(8, len(CLASSES), 8, 8)
    cells[4:, HOLE, 2:4, 4:6] = 1
    from rlhf_img.rewards.artifact_losses import Targets

    targets = Targets(damaged_B=torch.arange(8) >= 4, class_BK=class_BK, cells_BKhw=cells)
    torch.manual_seed(0)
    net = DefectNet().train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(40):
        heat = net(x)
        loss = detector_loss(heat, net.pool(heat), targets, 20.0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    heat = net(x).detach()
    assert (heat[4:, HOLE].flatten(1).argmax(dim=1) // 8).float().mean().item() == pytest.approx(2.5, abs=0.6)
    assert net.pool(heat)[4:, HOLE].min() > net.pool(heat)[:4].max()


# Labels of a policy's own images


def scene() -> np.ndarray:
    things = (Thing(shape="circle", color="red", size="large", x=32, y=30, radius=12),)
    return render(Scene(things=things, background="white")).copy()


def test_the_residual_marks_what_no_clean_scene_explains():
    broken = scene()
    broken[24:34, 26:30] = (20, 20, 20)
    broken[4:7, 48:60] = (40, 80, 210)
    speck = scene()
    speck[5, 5:13] = (20, 20, 20)
    clean, marked, unsure = by_residual([scene(), broken, speck])
    assert clean == [("clean",)] and unsure == []
    assert {row[0] for row in marked} == {"broken"}
    inside = [any(x <= px < x + w and y <= py < y + h for _, x, y, w, h in marked) for px, py in ((28, 29), (54, 5))]
    assert inside == [True, True]


def test_a_judge_is_believed_where_it_is_sure():
    answers = iter([0.9, 0.1, 0.5, None])
    judge = FakeJudge(answer=lambda ask: next(answers), max_failed=1.0)
    assert by_judge(judge, [scene()] * 4) == [[("broken",)], [("clean",)], [], []]


def test_a_policys_images_are_drawn_labelled_and_go_on_where_they_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_img.training.on_policy._SHARD", 2)
    monkeypatch.setattr("rlhf_img.training.on_policy._SURE", 0.5)
    model = save_tiny(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:3]))
    config = OnPolicy(policy=str(model), prompts=str(tmp_path / "prompts.txt"), count=5, num_steps=2, labeller="fake")
    with pytest.raises(RlhfImgError, match=f"draws {SIZE} px, and without a judge only images of the playground"):
        draw_labelled(config, tmp_path / "none")
    first = draw_labelled(config, tmp_path / "first", FakeJudge())
    seen = []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw_labelled(config, tmp_path / "second", FakeJudge(), stop)
    second = draw_labelled(config, tmp_path / "second", FakeJudge(), lambda done, total: seen.append(done))
    assert seen == [2, 4, 5]
    assert first.read_text() == second.read_text()
    rows = list(csv.DictReader(first.read_text().splitlines()))
    assert len(rows) == 5 and {row["class"] for row in rows} <= {"clean", "broken"}
    for row in rows:
        assert (first.parent / row["image"]).read_bytes() == (second.parent / row["image"]).read_bytes()
    assert read_labels(first, SIZE).counts.keys() <= {"clean", "broken"}
    with pytest.raises(RlhfImgError, match="drawn with another count"):
        draw_labelled(OnPolicy(policy=str(model), count=6, prompts=config.prompts, num_steps=2, labeller="fake"),
                      tmp_path / "first", FakeJudge())


def test_the_command_learns_from_labels_and_refuses_what_does_not_fit(tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_img.rewards.artifact_training.evaluate", lambda net, **settings: {})
    monkeypatch.setattr("rlhf_img.rewards.artifact_training._CALIBRATED", 14)
    monkeypatch.setattr("rlhf_img.rewards.artifact_training._WATCHED", 14)
    file = write(tmp_path, *(f"{i}.png,clean" for i in range(4)))
    for i in range(4):
        Image.open(tmp_path / f"{i}.png").resize((64, 64)).save(tmp_path / f"{i}.png")
    out = tmp_path / "own.safetensors"
    args = ["train", "artifact", "--labels", str(file), "--steps", "1", "--vae", "none", "--out", str(out)]
    result = CliRunner().invoke(app, args, catch_exceptions=False)
    assert "3 labelled images to learn from, 1 held out (4 clean)" in result.stdout
    assert json.loads(out.with_suffix(".json").read_text())["labelled"]["auc"] is None
    again = [*args[:-1], str(tmp_path / "again.safetensors"), "--start", str(out)]
    CliRunner().invoke(app, again, catch_exceptions=False)
    before, after = (torch.cat([x.flatten() for x in load_detector(file).net.parameters()])
                     for file in (out, tmp_path / "again.safetensors"))  # fmt: skip
    # One step of AdamW from those weights moves each by its learning rate; a new network would be far away.
    assert 0 < (after - before).abs().median() < 2 * AGAIN.lr
    assert json.loads((tmp_path / "again.json").read_text())["weights"] == digest(out.read_bytes())
    for more, message in ((["--appearance"], "--appearance is for your own pictures"),
                          (["--start", str(out), "--backbone", "x"], "give one of them"),
                          (["--start", str(tmp_path / "none.safetensors")], "no file"),
                          (["--judge-model", "playground"], "give it with --policy")):
        with pytest.raises(RlhfImgError, match=message):
            CliRunner().invoke(app, [*args, *more], catch_exceptions=False)
