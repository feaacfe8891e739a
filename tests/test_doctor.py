"""`rlhf-img doctor`: what it says of the machine, and of judges that are good, bad, or not there."""

import json
import math
import subprocess
import sys
from collections import Counter

import pytest
from test_judges import completion, serving
from typer.testing import CliRunner

from rlhf_img.cli import doctor
from rlhf_img.cli.main import app
from rlhf_img.errors import RlhfImgError
from rlhf_img.judges.protocol import QUESTION
from rlhf_img.judges.requests import png_base64


def call(*args):
    return CliRunner().invoke(app, ["doctor", *args])


def measured(server, images):
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    result = call("--judge-url", url, "--judge-model", "eye", "--images", str(images), "--json")
    assert result.exit_code == 0, result.exception
    return json.loads(result.stdout)["judge"]


def about(body):
    """The image and the question of a request."""
    image, text = body["messages"][0]["content"]
    return image["image_url"]["url"], text["text"]


def test_the_machine():
    found = json.loads(call("--json").stdout)
    assert set(found) == {"machine"} and found["machine"]["cores"] >= 1 and found["machine"]["memory_gib"] > 0.1
    assert found["machine"]["extras"] == dict.fromkeys(doctor.EXTRAS, True)
    assert "memory gib" in call().stdout


def test_a_judge_that_knows_the_truth_agrees_and_has_no_noise():
    truth = {
        (f"data:image/png;base64,{png_base64(ask.image)}", QUESTION.format(question=ask.question)): right
        for ask, right in doctor._questions(12)
    }

    def reply(handler, body, n):
        yes = 0.9 if truth[about(body)] else 0.1
        return completion(top={"Yes": yes, "No": 1 - yes})

    with serving(reply) as server:
        found = measured(server, 12)
    assert True in truth.values() and False in truth.values()
    assert found["p_yes_from_token_probabilities"] and found["answered"] == found["asked"] == len(truth)
    assert found["agreement_where_yes_is_right"] == found["agreement_where_no_is_right"] == 1
    assert found["repeat_noise"] == 0 and 0 < found["latency_p50_s"] <= found["latency_p95_s"]
    assert found["questions_per_s"] > 0 and found["failures"] == {}


def test_repeat_noise_is_the_standard_deviation_over_repeats():
    times = Counter()

    def reply(handler, body, n):
        times[about(body)] += 1
        return completion(top={"Yes": 0.6, "No": 0.4} if times[about(body)] % 2 else {"Yes": 0.4, "No": 0.6})

    with serving(reply) as server:  # of five repeats, three give the one and two the other
        assert measured(server, 1)["repeat_noise"] == pytest.approx(0.2 * math.sqrt(0.6 * 0.4))


def test_without_token_probabilities_it_votes_and_says_so():
    with serving(lambda h, body, n: completion("yes")) as server:
        found = measured(server, 1)
    assert not found["p_yes_from_token_probabilities"] and "votes8" in found["id"]
    assert found["agreement_where_yes_is_right"] == 1


def test_failures_are_counted_and_not_taken_for_an_opinion():
    def reply(handler, body, n):
        return completion("?", top={"?": 0.9}) if n > 1 and n % 2 else completion(top={"Yes": 0.9})

    with serving(reply) as server:
        found = measured(server, 1)
    assert 0 < found["answered"] < found["asked"] and "neither" in next(iter(found["failures"]))
    assert found["agreement_where_yes_is_right"] == 1 and math.isclose(found["repeat_noise"], 0)


def test_a_judge_that_is_not_there_is_a_user_error():
    with serving(lambda h, body, n: h.send(404, b"no such model")) as server:
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        result = call("--judge-url", url, "--judge-model", "eye", "--images", "1")
    assert isinstance(result.exception, RlhfImgError) and "HTTP 404: no such model" in str(result.exception)
    assert "--judge-model" in str(call("--judge-url", "http://localhost:1/v1").exception)


@pytest.mark.parametrize("args", [[], ["--judge-url", "fake:", "--judge-model", "any", "--images", "1"]])
def test_it_does_not_load_torch_where_there_is_no_gpu(args):
    code = (
        "import sys; from rlhf_img.cli import doctor; doctor.versions = lambda: {'hardware': '2 x CPU'};"
        "import typer; from typer.testing import CliRunner; app = typer.Typer(); app.command()(doctor.doctor);"
        f"assert CliRunner().invoke(app, {args}).exit_code == 0; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_a_run_would_need() -> None:
    words = ("--algorithm", "sft", "--memory", "1", "--rate", "2", "--text-tokens", "12", "--json")
    found = json.loads(call(*words, "sft.images=2", "sft.draws=1").stdout)["a step of sft"]
    assert found["fits"] and found["dtype"] == "bfloat16" and found["size_px"] == 64
    assert found["peak_gib"] == sum(found["standing_gib"].values()) + max(found["beside_it_gib"].values())
    assert found["seconds_in_all"] == pytest.approx(sum(found["tflop"].values()) / 2)
    small = json.loads(call(*words, "--memory", "0.03", "sft.images=8").stdout)["a step of sft"]
    assert not small["fits"] and "compute.offload=true" in small["would_fit"]
    assert "did you mean" in str(call("--algorithm", "grop").exception)
    assert "unknown key" in str(call("--algorithm", "grpo", "grpo.groups=3").exception)
    assert "--algorithm" in str(call("lr=3").exception)
