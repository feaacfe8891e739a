"""The sparse autoencoder, the list of its features, and what the list does to the artifact reward."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import yaml
from safetensors.torch import save_file
from typer.testing import CliRunner

from rlhf_img.cli.reward import app
from rlhf_img.errors import RlhfImgError
from rlhf_img.judges import FakeJudge
from rlhf_img.rewards.allow_list import (
    AllowList,
    Feature,
    FeatureList,
    digest_of,
    embedding_of,
    kept_by_hand,
    open_list,
    read_list,
    write_list,
)
from rlhf_img.rewards.artifact import artifact
from rlhf_img.rewards.artifact_model import DefectNet, load_detector
from rlhf_img.rewards.artifact_pairs import PLAYGROUND, make_pairs
from rlhf_img.rewards.protocol import Images
from rlhf_img.rewards.sae import SparseAutoencoder, cells_of, keep_top, sae_loss, unexplained
from rlhf_img.rewards.sae_features import (
    Top,
    _proposed,
    measure_features,
    name_features,
    reconstruction,
    sae_card,
    top_images,
)
from rlhf_img.rewards.sae_training import SaeTraining, train_sae
from rlhf_img.rubrics.schema import Rubric

NONE = torch.zeros(3, dtype=torch.bool)


def by_hand(k: int = 1) -> SparseAutoencoder:
    """Two channels, three features: right, up, left; centre (1, 0), scale 2."""
    sae = SparseAutoencoder(2, 3, k)
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    sae.decoder_FC.data, sae.encoder_FC.data = directions, directions.clone()
    sae.center_C.data = torch.tensor([1.0, 0.0])
    sae.scale.fill_(2.0)
    return sae


# The autoencoder


def test_codes_and_reconstruction_by_hand():
    sae = by_hand()
    x = torch.tensor([[5.0, 2.0], [-1.0, 0.5], [1.0, 0.0]])
    assert sae.before_top_k(x).tolist() == [[2, 1, 0], [0, 0.25, 1], [0, 0, 0]]
    assert sae.encode(x).tolist() == [[2, 0, 0], [0, 0, 1], [0, 0, 0]]
    assert sae.decode(sae.encode(x)).tolist() == [[5, 0], [-1, 0], [1, 0]]
    assert by_hand(k=2).decode(by_hand(k=2).encode(x)).tolist() == x.tolist()
    assert keep_top(torch.tensor([[3.0, 1.0, 2.0]]), 5).tolist() == [[3, 1, 2]]


def test_unexplained_is_0_for_all_1_for_the_mean():
    x = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    assert unexplained(x, x) == 0 and unexplained(x, x.mean(dim=0).expand(2, 2)) == 1
    assert unexplained(x, torch.tensor([[1.0, 0.0], [2.0, 0.0]])).item() == pytest.approx(0.5)


def test_only_features_that_are_active_learn_and_dead_ones_are_revived_by_the_rest():
    x = torch.tensor([[5.0, 2.0], [7.0, 1.0]])
    sae = by_hand()
    loss, z = sae_loss(sae, x, NONE)
    assert z[:, 0].gt(0).all() and loss.item() == pytest.approx(5 / 2.5)  # 2^2 + 1^2 over 2 x (1 + 0.25)
    loss.backward()
    assert sae.decoder_FC.grad[1].abs().sum() == 0
    sae = by_hand()
    dead = torch.tensor([False, True, True])
    with_aux, _ = sae_loss(sae, x, dead)
    # The dead feature "up" explains all that is left.
    assert with_aux.item() == pytest.approx(loss.item(), abs=1e-6)
    sae.encoder_FC.data[1] *= 0.5
    partly, _ = sae_loss(sae, x, dead)
    assert partly.item() == pytest.approx(loss.item() + 0.25 / 32)
    partly.backward()
    assert sae.encoder_FC.grad[1, 1] < 0, "its activation must grow"


def test_features_are_found_where_there_are_some():
    generator = torch.Generator().manual_seed(0)
    truth = torch.nn.functional.normalize(torch.randn(12, 8, generator=generator), dim=1)
    torch.manual_seed(0)
    sae = SparseAutoencoder(8, 24, 2)

    def draw() -> torch.Tensor:
        codes = keep_top(torch.rand(256, 12, generator=generator), 2)
        return codes @ truth

    sae.fit_scale(draw())
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    for _ in range(150):
        loss, _ = sae_loss(sae, draw(), torch.zeros(24, dtype=torch.bool))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sae.normalize()
    assert loss < 0.2
    torch.testing.assert_close(sae.decoder_FC.norm(dim=1), torch.ones(24))
    nearest = (truth @ sae.decoder_FC.T).max(dim=1).values
    assert nearest.median() > 0.9


# The list


def tiny_net() -> tuple[DefectNet, SparseAutoencoder]:
    """A net whose first class is channel 0 of its embedding, and features that are the first three channels."""
    torch.manual_seed(0)
    net = DefectNet().eval()
    net.head.weight.data.zero_()
    net.head.weight.data[0, 0], net.head.weight.data[0, 1] = 1.0, -1.0
    sae = SparseAutoencoder(96, 3, 3)
    sae.decoder_FC.data = torch.eye(96)[:3]
    sae.encoder_FC.data = sae.decoder_FC.data.clone()
    return net, sae.requires_grad_(False)


def heat_with(net, sae, x, unmarked="keep", **marks):
    features = tuple(Feature(id=int(i[1:]), mark=mark) for i, mark in marks.items())
    allowed = AllowList(listed=FeatureList(sae="", unmarked=unmarked, features=features), sae=sae)
    before, after, named = allowed(net, x)
    torch.testing.assert_close(before, net(x))
    return before[:, 0], after[:, 0], named


def test_what_a_style_says_is_no_evidence_and_a_list_can_only_exonerate():
    net, sae = tiny_net()
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    e = net.embed(x)
    assert (e[:, :2] > 0).any()
    with torch.no_grad():
        before, same, nobody = heat_with(net, sae, x)
        assert (before == same).all() and nobody == [(), ()]
        # Channel 0 speaks for a defect: without it what is left is -channel 1.
        _, after, named = heat_with(net, sae, x, f0="style")
        torch.testing.assert_close(after, torch.minimum(before, -e[:, 1].relu() - 4.0 - e[:, 0].clamp(max=0) * -1))
        assert named == [("feature 0",)] * 2
        # Channel 1 speaks against one: to take it away would make the image worse, so nothing happens.
        _, after, named = heat_with(net, sae, x, f1="style")
        assert (after == before).all() and named == [(), ()]
        # A strict list keeps what is marked artifact and the part of the embedding that no feature stands for.
        _, strict, _ = heat_with(net, sae, x, unmarked="drop", f1="artifact")
        _, loose, _ = heat_with(net, sae, x, f0="style", f2="style")
        torch.testing.assert_close(strict, loose)


def write_folder(folder, net, sae, features, **more):
    folder.mkdir(exist_ok=True)
    save_file(sae.state_dict(), folder / "sae.safetensors")
    card = {"embedding": embedding_of(net), "width": sae.decoder_FC.shape[1],
            "config": {"features": sae.decoder_FC.shape[0], "k": sae.k}}
    (folder / "sae.json").write_text(json.dumps(card | more))
    listed = FeatureList(sae=digest_of(folder / "sae.safetensors"), features=tuple(features))
    write_list(folder / "features.yaml", listed)
    return folder / "features.yaml"


def test_the_reward_says_what_the_list_changed(tmp_path):
    detector = load_detector()
    torch.manual_seed(0)
    sae = SparseAutoencoder(96, 96, 96).requires_grad_(False)
    sae.decoder_FC.data = torch.eye(96)
    sae.encoder_FC.data = torch.eye(96)
    every = [Feature(id=i, name=f"channel {i}", mark="style") for i in range(96)]
    pairs = make_pairs(7, split="heldout", seed=(3, 3))
    images, rubrics = Images(pairs.damaged_B3HW), [Rubric(prompt="a")] * 7
    plain = artifact(["a"] * 7, images, rubrics=rubrics)
    file = write_folder(tmp_path / "all", detector.net, sae, every)
    listed = artifact(["a"] * 7, images, rubrics=rubrics, features=str(file))
    assert [v.details.unlisted for v in listed] == pytest.approx([v.value for v in plain], abs=1e-5)
    assert min(v.value for v in plain) < 0.1 and min(v.value for v in listed) > 0.5
    caught = min(range(7), key=lambda i: plain[i].value)
    assert listed[caught].details.explained[0].startswith("channel ")
    none = write_folder(tmp_path / "none", detector.net, sae, [replace(f, mark="artifact") for f in every])
    same = artifact(["a"] * 7, images, rubrics=rubrics, features=str(none))
    assert [v.value for v in same] == pytest.approx([v.value for v in plain], abs=1e-6)
    assert same[0].details.explained == () and plain[0].details.unlisted is None


def test_a_list_survives_people(tmp_path):
    net, sae = tiny_net()
    named = Feature(id=1, name="no", mark="style", proposed="artifact", defect_auc=0.7, style="grain, weak",
                    style_auc=0.5)
    file = write_folder(tmp_path, net, sae, [named, Feature(id=0)])
    assert read_list(file).features == (named, Feature(id=0))
    assert [line for line in file.read_text().splitlines() if line.startswith("  - {id: 0")]
    open_list(file, net)
    new = [Feature(id=1, defect_auc=0.9), Feature(id=2, name="by the judge")]
    assert kept_by_hand(read_list(file), new) == (
        Feature(id=1, name="no", mark="style", defect_auc=0.9), Feature(id=2, name="by the judge"))
    write_list(file, FeatureList(sae="x", features=()))
    assert yaml.safe_load(file.read_text())["features"] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.replace("mark: null", "mark: stile", 1), r'features\[0\]\.mark: .*did you mean "style"'),
        (lambda t: t.replace("name: null", "nmae: null", 1), r'features\[0\]: unknown key "nmae": did you mean "name"'),
        (lambda t: t.replace("name: null", "name: no", 1), r"features\[0\]\.name"),
        (lambda t: t.replace("id: 0", "id: 1"), "feature 1 is there twice"),
        (lambda t: t.replace("id: 0", "id: 3"), "there is no feature 3; ids are 0 to 2"),
        (lambda t: t.replace("unmarked: keep", "unmarked: dorp"), 'did you mean "drop"'),
        (lambda t: t.replace("sae: ", "sae: other"), "is a list of another autoencoder"),
        (lambda t: "features: [", "not valid YAML"),
        (lambda t: "", "missing sae, features"),
    ],
)
def test_bad_lists_are_refused(tmp_path, change, message):
    net, sae = tiny_net()
    file = write_folder(tmp_path, net, sae, [Feature(id=0), Feature(id=1)])
    file.write_text(change(file.read_text()))
    with pytest.raises(RlhfImgError, match=message):
        open_list(file, net)


def test_lists_of_other_embeddings_and_missing_files_are_refused(tmp_path):
    net, sae = tiny_net()
    file = write_folder(tmp_path, net, sae, [])
    with pytest.raises(RlhfImgError, match="are of other embeddings"):
        open_list(file, load_detector().net)
    with pytest.raises(RlhfImgError, match="are of other embeddings .google/siglip2"):
        open_list(write_folder(tmp_path, net, sae, [], embedding="google/siglip2-base-patch16-256"), net)
    for torn in ("", "{}", '{"embedding": '):
        (tmp_path / "sae.json").write_text(torn)
        with pytest.raises(RlhfImgError, match=r"cannot be read .*make it again with: rlhf-img reward train sae"):
            open_list(file, net)
    (tmp_path / "sae.json").unlink()
    with pytest.raises(RlhfImgError, match=r"no file .*sae\.json; make it with: rlhf-img reward train sae"):
        open_list(file, net)
    with pytest.raises(RlhfImgError, match="cannot be read"):
        open_list(tmp_path / "none.yaml", net)


# Training, measuring, naming


def test_training_resumes_to_the_same_weights_and_refuses_another(tmp_path):
    net = load_detector().net
    config = SaeTraining(features=16, k=2, steps=3, pairs=7, cells=64, save_every=2)
    sae, curve = train_sae(tmp_path / "a", config, net, PLAYGROUND)
    assert [point["step"] for point in curve] == [2, 3]

    def interrupt(step: int, loss: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_sae(tmp_path / "b", config, net, PLAYGROUND, progress=interrupt)
    with pytest.raises(RlhfImgError, match="go on with --resume"):
        train_sae(tmp_path / "b", config, net, PLAYGROUND)
    with pytest.raises(RlhfImgError, match="another training: k was 2, is 3"):
        train_sae(tmp_path / "b", replace(config, k=3), net, PLAYGROUND, resume=True)
    with pytest.raises(RlhfImgError, match="embedding was "):
        train_sae(tmp_path / "b", config, DefectNet().eval(), PLAYGROUND, resume=True)
    train_sae(tmp_path / "b", config, net, PLAYGROUND, resume=True)
    assert (tmp_path / "a" / "sae.safetensors").read_bytes() == (tmp_path / "b" / "sae.safetensors").read_bytes()
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "features.yaml").write_text("by hand")
    with pytest.raises(RlhfImgError, match="may have been edited by hand"):
        train_sae(tmp_path / "c", config, net, PLAYGROUND)
    with pytest.raises(ValueError, match="k is at least 1 and below"):
        SaeTraining(features=4, k=4)

    features = measure_features(net, sae, PLAYGROUND, n=14)
    assert features and all(0 <= f.defect_auc <= 1 and 0 <= f.style_auc <= 1 for f in features)
    card = sae_card(net, sae, PLAYGROUND, features, config, curve, head=True, n=14)
    assert card["explained_variance"] < 1 and 0 <= card["dead"] <= 1 and card["active"] <= 2
    assert set(card["separation"]) == {"artifact", "style"} and set(card["reward"]) == {"without", "proposed"}


def test_what_is_explained_does_not_depend_on_how_images_are_divided():
    net, sae = tiny_net()
    images = torch.rand(19, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    x, _ = cells_of(net, images)
    z = sae.encode(x)
    found = reconstruction(net, sae, images)
    assert found["explained_variance"] == pytest.approx(1 - unexplained(x, sae.decode(z)).item(), abs=1e-4)
    assert found["active"] == pytest.approx((z > 0).sum(dim=1).float().mean().item(), rel=1e-5)
    assert found["dead"] == (z.amax(dim=0) == 0).float().mean().item()


def test_marks_are_proposed_where_one_thing_is_told_much_better_than_the_other():
    assert _proposed(0.3, 0.1) == "artifact" and _proposed(0.3, 0.2) is None
    assert _proposed(0.04, -0.2) is None and _proposed(-0.1, 0.06) == "style"
    assert _proposed(0.2, -0.3) == "artifact"


def test_the_top_images_are_those_with_the_hottest_cell():
    net, sae = tiny_net()
    pool = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        channel = net.embed(pool)[:, 0].relu()
    tops = top_images(net, sae, pool, [0], 2)[0]
    order = channel.flatten(1).amax(dim=1).argsort(descending=True)
    assert [top.place for top in tops] == order[:2].tolist()
    assert tops[0].heat_hw.max() == pytest.approx(1.0) and tops[1].heat_hw.max() < 1.0
    assert divmod(int(tops[0].heat_hw.argmax()), 16) == divmod(int(channel[order[0]].argmax()), 16)


def test_a_judge_names_what_it_sees_more_often_than_usual():
    pool = [torch.full((4, 4, 3), i, dtype=torch.uint8).numpy() for i in range(32)]

    def answer(ask):
        if "hole" in ask.question:
            return 0.9 if ask.image[0, 0, 0] < 3 else 0.1
        return None if "seam" in ask.question else 0.8  # of everything it says that there is blur

    tops = {7: [Top(place=p, activation=1.0, heat_hw=torch.ones(1, 1).numpy()) for p in (0, 1, 2)],
            8: [Top(place=20, activation=1.0, heat_hw=torch.ones(1, 1).numpy())]}  # fmt: skip
    judge = FakeJudge(answer=answer, max_failed=1.0)
    assert name_features(judge, pool, tops, ["blur", "hole", "seam"]) == {7: "hole"}


def test_the_command_makes_a_list_and_a_sheet_and_keeps_what_was_written_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_img.cli.train_sae._POOL", 7)
    monkeypatch.setattr("rlhf_img.rewards.sae_features.measure_features", partial(measure_features, n=14))
    monkeypatch.setattr("rlhf_img.rewards.sae_features.sae_card", partial(sae_card, n=14))
    out = tmp_path / "sae"
    args = ["train", "sae", "--out", str(out), "--steps", "2", "--features", "16", "--k", "2"]
    args += ["--shown", "5", "--top", "3"]
    first = CliRunner().invoke(app, args, catch_exceptions=False)
    assert "0 marked artifact, 0 style" in first.stdout
    sheet = (out / "features.html").read_text()
    assert 0 < sheet.count('class="card feature"') <= 5 and 0 < sheet.count("data:image/") <= 15
    assert 'src="http' not in sheet
    listed = read_list(out / "features.yaml")
    ours = replace(listed.features[0], name="<b>edges", mark="style")
    write_list(out / "features.yaml", replace(listed, unmarked="drop", features=(ours, *listed.features[1:])))
    CliRunner().invoke(app, [*args, "--resume", "--accept"], catch_exceptions=False)
    again = read_list(out / "features.yaml")
    assert again.features[0] == ours and again.unmarked == "drop" and again.sae == listed.sae
    assert [f.mark for f in again.features[1:]] == [f.proposed for f in listed.features[1:]]
    assert "&lt;b&gt;edges" in (out / "features.html").read_text()
    for more, message in ((["--k", "16"], "k is at least 1 and below the number of features"),
                          (["--names", "x"], "give one with --judge-model"),
                          (["--weights", "x", "--backbone", "y"], "give --weights or --backbone")):
        with pytest.raises(RlhfImgError, match=message):
            CliRunner().invoke(app, [*args, *more], catch_exceptions=False)
